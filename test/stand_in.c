// A stand-in for SmolLM2 where there is no network: stand_in FROM TO makes a plain Llama of 30
// layers by repeating those of a smaller one. `make readme` runs the README's commands on it.
// stand_in FROM TO LAYER... takes these layers: 0 1 1 1 2 loops the middle one, untrained, three
// times. What recurrence is worth without training is one of test/experiment.sh's questions.
#define RETROFIT_IMPLEMENTATION
#include "../retrofit.h"

static void *need(void *p) {
    if (p) return p;
    fprintf(stderr, "stand_in: %s\n", retrofit_error());
    exit(1);
}

static void copy_layer(retrofit_layer *to, const retrofit_layer *from) {
    const retrofit_parameter *source = &from->norm_1;
    retrofit_parameter *target = &to->norm_1;
    for (size_t i = 0; i < sizeof *to / sizeof *target; i++) {
        size_t count = source[i].rows * source[i].cols;
        // What an architecture lacks, such as biases, has no numbers and no place.
        if (count) memcpy(target[i].master, source[i].master, count * sizeof(float));
    }
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    retrofit_model *from = need(retrofit_load(argv[1], &retrofit_cpu, RETROFIT_TRAINING));
    retrofit_config config = from->config;
    config.coda = argc > 3 ? (size_t)(argc - 3) : 30;
    retrofit_model *to = need(retrofit_model_new(&config, &retrofit_cpu));
    if (!retrofit_model_allocate(to, RETROFIT_INFERENCE)) need(NULL);
    for (size_t i = 0; i < config.coda; i++) {
        size_t layer = argc > 3 ? strtoul(argv[3 + i], NULL, 10) : i;
        copy_layer(&to->coda[i], &from->coda[layer % from->config.coda]);
    }
    size_t embedding = from->wte.rows * from->wte.cols * sizeof(float);
    memcpy(to->wte.master, from->wte.master, embedding);
    memcpy(to->lm_head.master, from->lm_head.master, embedding);
    memcpy(to->ln_f.master, from->ln_f.master, from->ln_f.cols * sizeof(float));
    char *path = need(strdup(argv[2]));
    if (!retrofit_make_directories(path, true)) need(NULL);
    if (!retrofit_save(to, argv[2], RETROFIT_F32, argv[1])) need(NULL);
    free(path);
    retrofit_free(from);
    retrofit_free(to);
    return 0;
}

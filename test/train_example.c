// train_example MODEL SHARDS STEPS OUT: a training loop of one's own. It draws, computes and
// updates as train does, to the bit; test/library.sh says with which options.
#define RETROFIT_IMPLEMENTATION
#include "../retrofit.h"

enum { B = 4, T = 64 }; // rows, tokens in each

static void *need(void *p) {
    if (p) return p;
    fprintf(stderr, "train_example: %s\n", retrofit_error());
    exit(1);
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    retrofit_model *model = need(retrofit_load(argv[1], &retrofit_cpu, RETROFIT_TRAINING));
    retrofit_data *data = need(retrofit_data_open(argv[2], T, model->config.vocab, true, 1));
    size_t S = strtoul(argv[3], NULL, 10), K = model->config.backprop_depth, n, k;
    double R = (double)model->config.mean_recurrence, w = 0.75; // the mean grows to R until w·S
    retrofit_optimizer optimizer = retrofit_paper_training.optimizer; // β, weight decay, clipping
    optimizer.kind = RETROFIT_ADAMW;
    optimizer.eps = 1e-8f;
    if (!retrofit_optimizer_init(model, optimizer.kind)) need(NULL);
    retrofit_buffers *buffers = need(retrofit_buffers_new(model, B, T, K, RETROFIT_KEEP_ALL, NULL));

    for (size_t step = 0; step < S; step++) {
        int32_t tokens[B * T], labels[B * T];
        for (size_t i = 0; i < B; i++) {
            size_t row = step * B + i;
            if (!retrofit_data_row(data, row, tokens + i * T, labels + i * T)) need(NULL);
        }
        double mean = retrofit_curriculum(RETROFIT_CURRICULUM_1_SQRT, step, S, w, R);
        size_t r = retrofit_max(1, (size_t)ceil(mean));
        retrofit_draw_recurrences(step + 1, r, retrofit_min(r, K), &n, &k, NULL);

        uint64_t seed = retrofit_hash(1, step); // of s_0
        retrofit_zero_grad(model);
        if (!retrofit_forward(buffers, tokens, B, T, model->config.state_std, seed, n, k))
            need(NULL);
        double loss = retrofit_loss(buffers, labels, 1);
        retrofit_backward(buffers);
        optimizer.lr = (float)retrofit_learning_rate(step, S, 0.1, 0.5, 0.001, 1e-3);
        double norm = isfinite(loss) ? retrofit_optimizer_step(model, &optimizer, step + 1) : NAN;
        printf("step %zu  loss %.4f  n,k %zu,%zu  |g| %.2f\n", step + 1, loss, n, k, norm);
    }
    if (!retrofit_make_directories(argv[4], true)) need(NULL);
    if (!retrofit_save(model, argv[4], RETROFIT_F32, argv[1])) need(NULL);
    retrofit_data_close(data);
    retrofit_buffers_free(buffers);
    retrofit_free(model);
    return 0;
}

// The README's program of one's own: the likeliest next token after r recurrences.
#include "../retrofit.h"
#include <stdlib.h>
#include <string.h>

static void *need(void *p) {
    if (p) return p;
    puts(retrofit_error());
    exit(1);
}

int main(int argc, char **argv) {
    if (argc != 4) exit(2); // DIR PROMPT R
    size_t r = strtoul(argv[3], NULL, 10), count, length;
    retrofit_tokenizer *tokenizer = need(retrofit_tokenizer_load(argv[1]));
    retrofit_model *model = need(retrofit_load(argv[1], &retrofit_cpu, RETROFIT_INFERENCE));
    int32_t *ids = need(retrofit_encode(tokenizer, argv[2], strlen(argv[2]), true, &count));

    retrofit_kv_cache cache = {.capacity = count, .recurrences = r};
    retrofit_recurrence_options options = {.recurrences = r}; // from the start state 0
    retrofit_buffers *buffers =
        need(retrofit_buffers_new(model, 1, count, 0, RETROFIT_KEEP_NOTHING, &cache));
    const float *logits =
        need((void *)retrofit_next_logits(buffers, ids, 1, count, NULL, &options));

    int32_t next = retrofit_argmax(logits, model->config.vocab);
    char *text = need(retrofit_decode(tokenizer, &next, 1, true, &length));
    printf("%d '%s'\n", (int)next, text);
    free(text);
    free(ids);
    retrofit_buffers_free(buffers);
    retrofit_free(model);
    retrofit_tokenizer_free(tokenizer);
    return 0;
}

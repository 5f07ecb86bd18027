// The README's program of one's own: the likeliest next token after r recurrences.
#include "../retrofit.h"
#include <stdlib.h>

int main(int argc, char **argv) {
    if (argc != 4) return puts("usage: example DIR PROMPT R"), 2;
    size_t r = strtoul(argv[3], NULL, 10), count, length, bytes = 0;
    while (argv[2][bytes]) bytes++;
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(argv[1]);
    retrofit_model *model = retrofit_load(argv[1], &retrofit_cpu, RETROFIT_INFERENCE);
    int32_t *ids = tokenizer ? retrofit_encode(tokenizer, argv[2], bytes, true, &count) : NULL;
    retrofit_kv_cache cache = {.capacity = count, .recurrences = r};
    retrofit_recurrence_options how = {.recurrences = r}; // start state 0
    retrofit_buffers *a = model && ids ? retrofit_buffers_new(model, 1, count, 0, RETROFIT_KEEP_NOTHING, &cache) : NULL;
    const float *logits = a ? retrofit_next_logits(a, ids, 1, count, NULL, &how) : NULL;
    if (!logits) return printf("%s\n", retrofit_error()), 1;
    int32_t next = retrofit_argmax(logits, model->config.vocab);
    char *text = retrofit_decode(tokenizer, &next, 1, true, &length);
    printf("%d '%s'\n", (int)next, text ? text : "");
    free(text), free(ids), retrofit_buffers_free(a), retrofit_free(model), retrofit_tokenizer_free(tokenizer);
    return 0;
}

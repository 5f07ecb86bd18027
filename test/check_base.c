// check_base DIR CASES.json: a converted model against what the authors' framework gave for the same file: ids, loss of every token,
// greedy continuation. For models too large to ship; `make smollm2` runs it.
#include "test.h"

static const retrofit_json *member(const retrofit_json *j, const char *key) {
    const retrofit_json *m = retrofit_json_get(j, key);
    if (!m) retrofit_fail("the cases have no %s", key);
    need(m != NULL, key);
    return m;
}

int main(int argc, char **argv) {
    if (argc != 3) return fputs("usage: check_base DIR CASES.json\n", stderr), 2;
    size_t size;
    char *text = retrofit_read_file(argv[2], &size);
    retrofit_json *cases = text ? retrofit_json_parse(text, size, argv[2]) : NULL;
    retrofit_tokenizer *t = cases ? retrofit_tokenizer_load(argv[1]) : NULL;
    retrofit_model *m = t ? retrofit_load(argv[1], &retrofit_cpu, RETROFIT_INFERENCE) : NULL;
    need(m != NULL, argv[1]);
    size_t V = m->config.vocab;
    for (const retrofit_json *c = cases->child; c; c = c->next) {
        const retrofit_json *prompt = member(c, "text"), *ids = member(c, "ids"), *losses = member(c, "loss_per_token"), *greedy = member(c, "greedy_16");
        size_t n;
        int32_t *tokens = retrofit_encode(t, prompt->string, prompt->length, false, &n);
        need(tokens != NULL, "encode");
        bool same = n == ids->count;
        size_t i = 0;
        for (const retrofit_json *id = ids->child; same && id; id = id->next) same = tokens[i++] == (int32_t)id->number;
        check(same, "\"%s\": the ids differ", prompt->string);
        retrofit_buffers *a = retrofit_buffers_new(m, 1, n, 0, RETROFIT_KEEP_NOTHING, &(retrofit_kv_cache){.capacity = n + 16, .recurrences = 1});
        retrofit_buffers *whole = retrofit_buffers_new(m, 1, n, 0, RETROFIT_KEEP_NOTHING, NULL);
        float *logits = (float *)retrofit_allocate(n * V, 4), worst = 0, loss;
        need(a && whole && retrofit_forward(whole, tokens, 1, n, 0, 0, 0, 0), "forward");
        retrofit_logits(whole, 0, n, logits);
        i = 0;
        for (const retrofit_json *l = losses->child; l; l = l->next, i++) {
            cross_entropy(&loss, logits + i * V, tokens + i + 1, 1, V, 0);
            worst = fmaxf(worst, fabsf(loss - (float)l->number));
        }
        check(worst < 1e-3f, "\"%s\": a token's loss is off by %.2e", prompt->string, (double)worst);
        const float *next = retrofit_next_logits(a, tokens, 1, n, NULL, &(retrofit_recurrence_options){.recurrences = 1});
        same = true;
        for (const retrofit_json *g = greedy->child; g; g = g->next) {
            need(next != NULL, "feed");
            int32_t id = retrofit_argmax(next, V);
            same = same && id == (int32_t)g->number;
            next = retrofit_next_logits(a, &id, 1, 1, NULL, &(retrofit_recurrence_options){.recurrences = 1});
        }
        check(same, "\"%s\": the greedy continuation differs", prompt->string);
        printf("  %zu ids, losses within %.1e, %zu greedy tokens\n", n, (double)worst, greedy->count);
        free(tokens), free(logits), retrofit_buffers_free(a), retrofit_buffers_free(whole);
    }
    retrofit_free(m), retrofit_tokenizer_free(t), retrofit_json_free(cases), free(text);
    return finish("smollm2 base");
}

// check_base DIR CASES.json: a converted model against what the authors' framework gave for the
// same file: ids, the loss of every token, greedy continuation. For models too large to ship; `make
// smollm2` runs it.
#include "test.h"

static const retrofit_json *member(const retrofit_json *j, const char *key) {
    const retrofit_json *m = retrofit_json_get(j, key);
    if (!m) retrofit_fail("the cases have no %s", key);
    need(m != NULL, key);
    return m;
}

static bool same_ids(const int32_t *tokens, size_t n, const retrofit_json *ids) {
    if (n != ids->count) return false;
    for (const retrofit_json *id = ids->child; id; id = id->next) {
        if (*tokens++ != (int32_t)id->number) return false;
    }
    return true;
}

// The largest difference of a token's loss.
static float worst_loss(const retrofit_model *model, const int32_t *tokens, size_t n,
                        const retrofit_json *losses) {
    size_t V = model->config.vocab, i = 0;
    retrofit_buffers *buffers = retrofit_buffers_new(model, 1, n, 0, RETROFIT_KEEP_NOTHING, NULL);
    need(buffers && retrofit_forward(buffers, tokens, 1, n, 0, 0, 0, 0), "forward");
    float *logits = retrofit_allocate(n * V, sizeof *logits), worst = 0, loss;
    retrofit_logits(buffers, 0, n, logits);
    for (const retrofit_json *theirs = losses->child; theirs; theirs = theirs->next) {
        cross_entropy(&loss, logits + i * V, tokens + i + 1, 1, V, 0);
        worst = fmaxf(worst, fabsf(loss - (float)theirs->number));
        i++;
    }
    free(logits);
    retrofit_buffers_free(buffers);
    return worst;
}

static bool same_text(const retrofit_model *model, const int32_t *tokens, size_t n,
                      const retrofit_json *greedy) {
    retrofit_kv_cache cache = {.capacity = n + greedy->count, .recurrences = 1};
    retrofit_recurrence_options options = {.recurrences = 1};
    retrofit_buffers *buffers = retrofit_buffers_new(model, 1, n, 0, RETROFIT_KEEP_NOTHING, &cache);
    need(buffers != NULL, "buffers");
    const float *logits = retrofit_next_logits(buffers, tokens, 1, n, NULL, &options);
    bool same = true;
    for (const retrofit_json *theirs = greedy->child; theirs; theirs = theirs->next) {
        need(logits != NULL, "decoding");
        int32_t id = retrofit_argmax(logits, model->config.vocab);
        same = same && id == (int32_t)theirs->number;
        logits = retrofit_next_logits(buffers, &id, 1, 1, NULL, &options);
    }
    retrofit_buffers_free(buffers);
    return same;
}

static void check_case(const retrofit_model *model, const retrofit_tokenizer *tokenizer,
                       const retrofit_json *c) {
    const retrofit_json *prompt = member(c, "text"), *greedy = member(c, "greedy_16");
    size_t n;
    int32_t *tokens = retrofit_encode(tokenizer, prompt->string, prompt->length, false, &n);
    need(tokens != NULL, "encode");
    check(same_ids(tokens, n, member(c, "ids")), "\"%s\": the ids differ", prompt->string);
    float worst = worst_loss(model, tokens, n, member(c, "loss_per_token"));
    check(worst < 1e-3f, "\"%s\": a token's loss is off by %.2e", prompt->string, (double)worst);
    check(same_text(model, tokens, n, greedy), "\"%s\": the greedy continuation differs",
          prompt->string);
    printf("  %zu ids, losses within %.1e, %zu greedy tokens\n", n, (double)worst, greedy->count);
    free(tokens);
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fputs("usage: check_base DIR CASES.json\n", stderr);
        return 2;
    }
    size_t size;
    char *text = retrofit_read_file(argv[2], &size);
    retrofit_json *cases = text ? retrofit_json_parse(text, size, argv[2]) : NULL;
    retrofit_tokenizer *tokenizer = cases ? retrofit_tokenizer_load(argv[1]) : NULL;
    need(tokenizer != NULL, argv[1]);
    retrofit_model *model = retrofit_load(argv[1], &retrofit_cpu, RETROFIT_INFERENCE);
    need(model != NULL, argv[1]);
    for (const retrofit_json *c = cases->child; c; c = c->next) check_case(model, tokenizer, c);
    retrofit_free(model);
    retrofit_tokenizer_free(tokenizer);
    retrofit_json_free(cases);
    free(text);
    return finish("smollm2 base");
}

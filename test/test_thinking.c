// What a recurrent model can do at test time: exits per token, KV caches that hold less, drafts
// through the depths, continuous thinking, noise; on random prompts, against plain decoding,
// the full pass and definitions written out.
#include "test.h"

static const char *const models[] = {"tiny/recurrent", "llama3/recurrent", "head64/recurrent",
                                     "olmo2/recurrent", "qwen3/recurrent"};
#ifdef __SANITIZE_ADDRESS__ // ten times as slow
enum { PROMPTS = 25 };
#else
enum { PROMPTS = 200 }; // 1,000 with five models
#endif
// Tokens of a prompt and behind it, at most; positions in a cache; recurrences at most.
enum { MODELS = 5, PROMPT = 12, REST = 7, CAPACITY = 32, DEEPEST = 9 };

static uint64_t random_state;
static size_t random_between(size_t low, size_t high) {
    return low + (size_t)(retrofit_hash(1, random_state++) % (high - low + 1));
}

static retrofit_model *load(size_t which) {
    char path[256];
    snprintf(path, sizeof path, FIXTURES "%s", models[which]);
    retrofit_model *model = retrofit_load(path, &retrofit_cpu, RETROFIT_INFERENCE);
    need(model != NULL, path);
    return model;
}

static void *allocate(size_t count, size_t size) {
    void *p = retrofit_allocate(count, size);
    need(p != NULL, "memory");
    return p;
}

static retrofit_buffers *with_cache(const retrofit_model *model, size_t B, retrofit_cache_kind kind,
                                    size_t M, bool bf16) {
    retrofit_kv_cache cache = {CAPACITY, DEEPEST, kind, M, bf16};
    retrofit_buffers *buffers =
        retrofit_buffers_new(model, B, PROMPT, 0, RETROFIT_KEEP_NOTHING, &cache);
    need(buffers != NULL, "buffers with a cache");
    return buffers;
}

static retrofit_buffers *with_full_cache(const retrofit_model *model, size_t B) {
    return with_cache(model, B, RETROFIT_CACHE_FULL, 0, false);
}

static retrofit_buffers *without_cache(const retrofit_model *model, size_t T) {
    retrofit_buffers *buffers = retrofit_buffers_new(model, 1, T, 0, RETROFIT_KEEP_NOTHING, NULL);
    need(buffers != NULL, "buffers without a cache");
    return buffers;
}

static const float *feed(retrofit_buffers *buffers, const int32_t *tokens, size_t b, size_t t,
                         const retrofit_recurrence_options *options) {
    const float *logits = retrofit_next_logits(buffers, tokens, b, t, NULL, options);
    need(logits != NULL, "feed");
    return logits;
}

static bool same(const float *x, const float *y, size_t n) { return !memcmp(x, y, n * sizeof *x); }

// A prompt, what follows it, and a start state that matters for half of the prompts.
typedef struct {
    int32_t tokens[PROMPT + REST];
    size_t n; // tokens of the prompt
    retrofit_recurrence_options options;
} random_prompt;

static random_prompt draw_prompt(size_t V) {
    random_prompt prompt = {.n = random_between(1, PROMPT)};
    for (size_t i = 0; i < PROMPT + REST; i++) prompt.tokens[i] = (int32_t)random_between(0, V - 1);
    prompt.options.recurrences = random_between(1, DEEPEST - 1);
    prompt.options.sigma = random_between(0, 1) ? 0.3f : 0;
    prompt.options.seed = random_between(1, 99);
    prompt.options.threshold = -1;
    return prompt;
}

// ---- What should equal plain decoding, to the bit -----------------------------------------------
// Caches that are large enough and exits that never fire; and exits that always do, equal to r = 1.

enum { PLAIN, SHARED, GROUPED, NEVER, ALWAYS, ONE, WAYS };
static const char *const way_names[WAYS] = {
    "plain",
    "shared by as many",
    "grouped one by one",
    "an exit that never fires",
    "one that always fires",
    "one recurrence",
};

static void begin_ways(retrofit_buffers **ways, retrofit_recurrence_options *options,
                       const random_prompt *prompt, retrofit_exit exit) {
    bool stability = exit == RETROFIT_EXIT_ARGMAX_STABILITY;
    for (int way = 0; way < WAYS; way++) options[way] = prompt->options;
    options[NEVER].exit = exit;
    options[NEVER].threshold = stability ? 1e9f : 0;
    options[ALWAYS].exit = exit;
    options[ALWAYS].threshold = stability ? 0 : 1e30f;
    for (int way = 0; way < WAYS; way++) {
        retrofit_clear_cache(ways[way]);
        feed(ways[way], prompt->tokens, 1, prompt->n, &options[way]);
    }
    options[ONE].recurrences = 1; // the prompt went as deep as the others
}

// One token all the ways; full: the full pass's logits behind it.
static void compare_ways(retrofit_buffers **ways, const retrofit_recurrence_options *options,
                         const int32_t *token, const float *full, const char *where) {
    size_t V = ways[PLAIN]->model->config.vocab, r = options[PLAIN].recurrences;
    const float *plain = feed(ways[PLAIN], token, 1, 1, &options[PLAIN]);
    // roundings add up with the depth; 1e-5 at 4, as in test_decode
    double error = relative_error(plain, full, V);
    check(error < 2.5e-6 * fmax(4, (double)r), "%s, r %zu: %.2e off the full pass", where, r,
          error);
    for (int way = SHARED; way <= NEVER; way++) {
        const float *logits = feed(ways[way], token, 1, 1, &options[way]);
        check(same(logits, plain, V) && ways[way]->decoder->used[0] == (int32_t)r,
              "%s, r %zu: %s differs", where, r, way_names[way]);
    }
    const float *one = feed(ways[ONE], token, 1, 1, &options[ONE]);
    const float *always = feed(ways[ALWAYS], token, 1, 1, &options[ALWAYS]);
    check(same(always, one, V) && ways[ALWAYS]->decoder->used[0] == 1, "%s: %s differs from r = 1",
          where, way_names[ALWAYS]);
}

static void equal_to_plain(size_t which) {
    retrofit_model *model = load(which);
    size_t V = model->config.vocab, shallow_differs = 0;
    retrofit_buffers *ways[WAYS], *whole = without_cache(model, PROMPT + REST);
    float *full = allocate(REST * V, sizeof *full);
    for (int way = 0; way < WAYS; way++) ways[way] = with_full_cache(model, 1);
    retrofit_buffers_free(ways[SHARED]);
    retrofit_buffers_free(ways[GROUPED]);
    ways[SHARED] = with_cache(model, 1, RETROFIT_CACHE_SHARED, DEEPEST, false);
    ways[GROUPED] = with_cache(model, 1, RETROFIT_CACHE_GROUPED, 1, false);
    for (size_t i = 0; i < PROMPTS; i++) {
        random_prompt prompt = draw_prompt(V);
        retrofit_recurrence_options options[WAYS];
        begin_ways(ways, options, &prompt, (retrofit_exit)(1 + i % 5));
        need(retrofit_forward(whole, prompt.tokens, 1, prompt.n + REST, prompt.options.sigma,
                              prompt.options.seed, prompt.options.recurrences, 0),
             "forward");
        retrofit_logits(whole, prompt.n, REST, full);
        for (size_t j = 0; j < REST; j++) {
            char where[64];
            snprintf(where, sizeof where, "%s, prompt %zu, token %zu", models[which], i, j);
            compare_ways(ways, options, &prompt.tokens[prompt.n + j], full + j * V, where);
        }
        shallow_differs += !same(ways[ONE]->decoder->next, ways[PLAIN]->decoder->next, V);
    }
    check(shallow_differs > PROMPTS / 2, "%s: r = 1 and r agree: nothing was tested",
          models[which]);
    for (int way = 0; way < WAYS; way++) retrofit_buffers_free(ways[way]);
    free(full);
    retrofit_buffers_free(whole);
    retrofit_free(model);
}

// ---- Exits: the criteria written out ------------------------------------------------------------

static void softmax(double *p, const float *z, size_t V) {
    double max = -INFINITY, sum = 0;
    for (size_t v = 0; v < V; v++) max = fmax(max, (double)z[v]);
    for (size_t v = 0; v < V; v++) {
        p[v] = exp((double)z[v] - max);
        sum += p[v];
    }
    for (size_t v = 0; v < V; v++) p[v] /= sum;
}

static double entropy_of(const double *p, size_t V) {
    double h = 0;
    for (size_t v = 0; v < V; v++)
        if (p[v] > 0) h -= p[v] * log(p[v]);
    return h;
}

static double kl_of(const double *q, const double *p, size_t V) {
    double sum = 0;
    for (size_t v = 0; v < V; v++)
        if (q[v] > 0) sum += q[v] * log(q[v] / p[v]);
    return sum;
}

// min-p: what is below a tenth of the largest becomes 1/V, then the sum 1 again.
static void cut_below(double *p, size_t V) {
    double max = 0, sum = 0;
    for (size_t v = 0; v < V; v++) max = fmax(max, p[v]);
    for (size_t v = 0; v < V; v++) {
        if (p[v] < 0.1 * max) p[v] = 1 / (double)V;
        sum += p[v];
    }
    for (size_t v = 0; v < V; v++) p[v] /= sum;
}

static double distance(const float *x, const float *y, size_t d) {
    double sum = 0;
    for (size_t c = 0; c < d; c++) sum += pow((double)x[c] - y[c], 2);
    return sqrt(sum);
}

// values[i]: what a criterion compares after recurrence i = 1 … DEEPEST of a token behind those
// that `buffers` holds, from plain decoding of the same token at each depth.
static void measure(double *values, retrofit_buffers *buffers, retrofit_exit exit, int32_t token,
                    const retrofit_recurrence_options *options) {
    size_t V = buffers->model->config.vocab, d = buffers->model->config.n_embd, repeats = 0;
    double *p = allocate(V, sizeof *p), *before = allocate(V, sizeof *before);
    float *state = allocate(d, sizeof *state), *zero = allocate(d, sizeof *zero);
    int32_t likeliest = -1, *seen = buffers->decoder->seen, n = *seen;
    retrofit_recurrence_options plain = {.sigma = options->sigma, .seed = options->seed};
    need(set_batch(buffers, &token, 1, 1), "batch");
    memcpy(buffers->past, seen, sizeof *seen);
    retrofit_init_state(buffers, options->sigma, options->seed);
    memcpy(state, buffers->state, d * sizeof *state);
    for (size_t v = 0; v < V; v++) before[v] = 1 / (double)V;
    for (size_t i = 1; i <= DEEPEST; i++) {
        plain.recurrences = i;
        const float *logits = feed(buffers, &token, 1, 1, &plain);
        *seen = n;
        int32_t now = retrofit_argmax(logits, V);
        repeats = now == likeliest ? repeats + 1 : 0;
        likeliest = now;
        softmax(p, logits, V);
        if (exit == RETROFIT_EXIT_MINP_KL) cut_below(p, V);
        if (exit == RETROFIT_EXIT_ENTROPY_DIFF)
            values[i] = fabs(entropy_of(p, V) - (i > 1 ? entropy_of(before, V) : 100));
        else if (exit == RETROFIT_EXIT_LATENT_DIFF)
            values[i] = distance(buffers->state, state, d) / distance(buffers->state, zero, d);
        else if (exit == RETROFIT_EXIT_ARGMAX_STABILITY) values[i] = (double)repeats;
        else values[i] = kl_of(before, p, V);
        memcpy(state, buffers->state, d * sizeof *state);
        memcpy(before, p, V * sizeof *p);
    }
    free(p);
    free(before);
    free(state);
    free(zero);
}

// A threshold that lies just beyond what recurrence `pick` has, so that it or an earlier one stops;
// the recurrence that stops; and whether only rounding decides which.
typedef struct {
    double threshold;
    size_t due;
    bool close;
} exit_case;

static exit_case choose_threshold(const double *values, retrofit_exit exit, size_t r) {
    bool stability = exit == RETROFIT_EXIT_ARGMAX_STABILITY;
    size_t pick = random_between(1, r);
    exit_case chosen = {.due = r};
    double limit = stability ? values[pick] : (double)(float)(values[pick] * 1.001);
    chosen.threshold = limit;
    for (size_t i = r; i-- > 1;)
        if (stability ? values[i] >= limit : values[i] < limit) chosen.due = i;
    for (size_t i = 1; i < DEEPEST && !stability; i++)
        if (fabs(values[i] - limit) < 1e-4 * limit + 1e-7) chosen.close = true;
    return chosen;
}

// Fills the slots that the token at position `at` has not reached, after `used` recurrences, with
// the entries of the last one it has.
static void fill_slots(retrofit_buffers *buffers, size_t used, size_t at) {
    const retrofit_config *c = &buffers->model->config;
    const retrofit_decoder *decoder = buffers->decoder;
    size_t P = c->prelude, C = c->core, M = decoder->cache.M, reached = used;
    size_t entry = c->n_kv_heads * c->head_dim * (decoder->cache.bf16 ? 2 : 4);
    size_t stride = C * CAPACITY * entry; // from one recurrence to the next
    if (decoder->cache.kind == RETROFIT_CACHE_SHARED) reached = retrofit_min(used, M);
    if (decoder->cache.kind == RETROFIT_CACHE_GROUPED) reached = (used - 1) / M + 1;
    for (size_t i = reached; P + i * C + c->coda < decoder->slots; i++) {
        for (size_t j = 0; j < C; j++) {
            size_t offset = ((P + j) * CAPACITY + at) * entry;
            char *keys = (char *)decoder->keys + offset, *values = (char *)decoder->values + offset;
            memcpy(keys + i * stride, keys + (reached - 1) * stride, entry);
            memcpy(values + i * stride, values + (reached - 1) * stride, entry);
        }
    }
}

// A token of `buffers` that may exit, against `plain`, which decodes as deep as it did. Returns
// whether it stopped early.
static bool check_exit(retrofit_buffers *buffers, retrofit_buffers *plain, random_prompt *prompt,
                       retrofit_exit exit, size_t r, const char *where) {
    size_t V = buffers->model->config.vocab, n = prompt->n;
    const int32_t *tokens = prompt->tokens;
    retrofit_recurrence_options options = prompt->options, deep = prompt->options;
    double values[DEEPEST + 1];
    deep.recurrences = DEEPEST;
    retrofit_recurrence_options prompt_options = deep;
    prompt_options.exit = exit;
    prompt_options.threshold = 1e30f;
    retrofit_clear_cache(buffers);
    retrofit_clear_cache(plain);
    feed(buffers, tokens, 1, n, &prompt_options);
    feed(plain, tokens, 1, n, &deep);
    check(buffers->decoder->used[0] == DEEPEST, "%s: a prompt stopped early", where);

    measure(values, plain, exit, tokens[n], &options);
    exit_case chosen = choose_threshold(values, exit, r);
    options.exit = exit;
    options.recurrences = r;
    options.threshold = (float)chosen.threshold;
    const float *logits = feed(buffers, tokens + n, 1, 1, &options);
    size_t used = (size_t)buffers->decoder->used[0];
    check(chosen.close || used == chosen.due, "%s at %g stops after %zu recurrences, not %zu",
          where, chosen.threshold, used, chosen.due);

    // The logits are those of so many recurrences; the slots not reached hold the last one's
    // entries; the next token, all the way down, reads them.
    options = deep;
    options.recurrences = used;
    check(same(logits, feed(plain, tokens + n, 1, 1, &options), V), "%s after %zu: other logits",
          where, used);
    fill_slots(plain, used, n);
    logits = feed(buffers, tokens + n + 1, 1, 1, &deep);
    check(same(logits, feed(plain, tokens + n + 1, 1, 1, &deep), V),
          "%s: the token behind reads something else", where);
    return used < r;
}

static void exits(size_t which) {
    retrofit_model *model = load(which);
    size_t V = model->config.vocab, fired[6] = {0}, early[6] = {0};
    static const retrofit_kv_cache kinds[4] = {
        {.kind = RETROFIT_CACHE_FULL},
        {.kind = RETROFIT_CACHE_SHARED, .M = 4},
        {.kind = RETROFIT_CACHE_GROUPED, .M = 2},
        {.bf16 = true},
    };
    retrofit_buffers *buffers[4], *plain[4];
    for (size_t k = 0; k < 4; k++) {
        buffers[k] = with_cache(model, 1, kinds[k].kind, kinds[k].M, kinds[k].bf16);
        plain[k] = with_cache(model, 1, kinds[k].kind, kinds[k].M, kinds[k].bf16);
    }
    for (size_t i = 0; i < PROMPTS; i++) {
        char where[64];
        size_t r = i % 3 ? DEEPEST : random_between(2, DEEPEST), k = i / 5 % 4;
        random_prompt prompt = draw_prompt(V);
        retrofit_exit exit = (retrofit_exit)(1 + i % 5);
        snprintf(where, sizeof where, "%s, prompt %zu, exit %d", models[which], i, (int)exit);
        early[exit] += check_exit(buffers[k], plain[k], &prompt, exit, r, where);
        fired[exit]++;
    }
    for (int exit = 1; exit < 6; exit++)
        check(early[exit] > fired[exit] / 3, "%s: exit %d stopped %zu of %zu tokens early",
              models[which], exit, early[exit], fired[exit]);
    for (size_t k = 0; k < 4; k++) {
        retrofit_buffers_free(buffers[k]);
        retrofit_buffers_free(plain[k]);
    }
    retrofit_free(model);
}

// The authors' thresholds are the defaults.
static void default_thresholds(size_t which) {
    static const float authors[] = {0, 1e-3f, 0.03f, 5e-4f, 1e-6f, 5};
    retrofit_model *model = load(which);
    retrofit_buffers *buffers = with_full_cache(model, 1);
    for (int i = 0; i < 100; i++) {
        int exit = 1 + i % 5, used[2];
        random_prompt prompt = draw_prompt(model->config.vocab);
        prompt.options.recurrences = DEEPEST;
        prompt.options.exit = (retrofit_exit)exit;
        for (int named = 0; named < 2; named++) {
            prompt.options.threshold = named ? authors[exit] : -1;
            retrofit_clear_cache(buffers);
            feed(buffers, prompt.tokens, 1, prompt.n, &prompt.options);
            feed(buffers, prompt.tokens + prompt.n, 1, 1, &prompt.options);
            used[named] = buffers->decoder->used[0];
        }
        check(used[0] == used[1], "exit %d: %d recurrences by default, %d at %g", exit, used[0],
              used[1], (double)authors[exit]);
    }
    retrofit_buffers_free(buffers);
    retrofit_free(model);
}

enum { SMALL_V = 8 }; // tokens of a vocabulary

// Logits a step away from z.
static void step_away(float *next, const float *z, double step) {
    for (int v = 0; v < SMALL_V; v++) next[v] = z[v] + (float)((v % 3 - 1) * step);
}

// What a criterion compares between logits z and next.
static double compared(int exit, const float *z, const float *next) {
    double p[SMALL_V], q[SMALL_V];
    softmax(q, z, SMALL_V);
    softmax(p, next, SMALL_V);
    if (exit == RETROFIT_EXIT_ENTROPY_DIFF)
        return fabs(entropy_of(p, SMALL_V) - entropy_of(q, SMALL_V));
    if (exit == RETROFIT_EXIT_MINP_KL) {
        cut_below(q, SMALL_V);
        cut_below(p, SMALL_V);
    }
    return kl_of(q, p, SMALL_V);
}

// The thresholds of the criteria that compare distributions: a tenth below stops, a tenth above
// does not.
static void thresholds(void) {
    static const float z[SMALL_V] = {1.2f, 0.4f, -0.7f, 0.9f, 0.1f, -3, -4, 1.6f};
    static const double authors[] = {0, 1e-3, 0, 5e-4, 1e-6};
    for (int i = 0; i < 8; i++) {
        int exit = 1 + i / 2;
        bool above = i % 2;
        float next[SMALL_V];
        double noted[SMALL_V] = {0}, low = 0, high = 1;
        double target = authors[exit] * (above ? 1.1 : 0.9);
        if (exit == RETROFIT_EXIT_LATENT_DIFF) continue;
        for (int halving = 0; halving < 60; halving++) { // the step that changes so much
            double step = (low + high) / 2;
            step_away(next, z, step);
            if (compared(exit, z, next) < target) low = step;
            else high = step;
        }
        retrofit_recurrence_options options = {.exit = (retrofit_exit)exit, .threshold = -1};
        recurrence_result first = {.i = 1, .V = SMALL_V, .logits = z, .noted = noted};
        recurrence_result second = {.i = 2, .V = SMALL_V, .logits = next, .noted = noted};
        check(!should_exit(&options, &first), "exit %d stops after the first recurrence", exit);
        check(should_exit(&options, &second) == !above, "exit %d: %g %s", exit, target,
              above ? "stops" : "does not stop");
    }
}

// ---- Rows of a batch that stop at different times -----------------------------------------------

enum { ROWS = 4, STEPS = 6 };

// Each row alone: logits (STEPS,ROWS,V) and the recurrences used.
static void run_alone(retrofit_buffers *buffers, const retrofit_recurrence_options *options,
                      int32_t tokens[STEPS][ROWS], float *logits, int32_t used[STEPS][ROWS]) {
    size_t V = buffers->model->config.vocab;
    for (size_t row = 0; row < ROWS; row++) {
        retrofit_clear_cache(buffers);
        for (size_t i = 0; i < STEPS; i++) {
            tokens[i][row] = (int32_t)random_between(0, V - 1);
            memcpy(logits + (i * ROWS + row) * V, feed(buffers, &tokens[i][row], 1, 1, options),
                   V * sizeof *logits);
            used[i][row] = buffers->decoder->used[0];
        }
    }
}

// Rows think what they think alone. With slots that are written more than once that would not hold.
static void exits_together(size_t which) {
    retrofit_model *model = load(which);
    size_t V = model->config.vocab, apart = 0;
    retrofit_buffers *buffers = with_full_cache(model, ROWS);
    retrofit_buffers *shared = with_cache(model, ROWS, RETROFIT_CACHE_SHARED, 2, false);
    float *alone = allocate(STEPS * ROWS * V, sizeof *alone);
    for (int round = 0; round < 40; round++) {
        int32_t tokens[STEPS][ROWS], used[STEPS][ROWS];
        retrofit_recurrence_options options = {.recurrences = DEEPEST, // s_0 = 0: rows are alike
                                               .exit = (retrofit_exit)(1 + round % 5),
                                               .threshold = round % 5 == 4 ? 1 : 0.05f,
                                               .continuous = round % 3 == 0};
        run_alone(buffers, &options, tokens, alone, used);
        retrofit_clear_cache(buffers);
        for (size_t i = 0; i < STEPS; i++) {
            const float *logits = feed(buffers, tokens[i], ROWS, 1, &options);
            for (size_t row = 0; row < ROWS; row++) {
                int32_t together = buffers->decoder->used[row];
                apart += used[i][row] != used[i][0];
                check(same(logits + row * V, alone + (i * ROWS + row) * V, V) &&
                          together == used[i][row],
                      "%s, exit %d: row %zu of a batch takes %d, alone %d recurrences",
                      models[which], (int)options.exit, row, (int)together, (int)used[i][row]);
            }
        }
        check(!retrofit_next_logits(shared, tokens[0], ROWS, 1, NULL, &options) &&
                  strstr(retrofit_error(), "full KV cache"),
              "exits of a batch with shared slots are accepted");
    }
    check(apart > 50, "%s: the rows stopped at the same times: nothing was tested", models[which]);
    free(alone);
    retrofit_buffers_free(buffers);
    retrofit_buffers_free(shared);
    retrofit_free(model);
}

// ---- Caches that hold less: which recurrence's entries a later token meets ----------------------

// After one token: slot s holds what the newest recurrence that belongs there left, as does the
// slot of that recurrence in the full cache.
static void check_slots(const retrofit_buffers *buffers, const retrofit_buffers *full,
                        size_t slots) {
    const retrofit_config *c = &buffers->model->config;
    const retrofit_decoder *decoder = buffers->decoder;
    retrofit_cache_kind kind = decoder->cache.kind;
    size_t M = decoder->cache.M, width = c->n_kv_heads * c->head_dim;
    const float *keys = decoder->keys, *full_keys = full->decoder->keys;
    const float *values = decoder->values, *full_values = full->decoder->values;
    for (size_t s = 0; s < slots; s++) {
        size_t newest = s;
        for (size_t i = 0; i < DEEPEST; i++) {
            if (kind == RETROFIT_CACHE_SHARED && i % M == s) newest = i;
            if (kind == RETROFIT_CACHE_GROUPED && i / M == s) newest = i;
        }
        for (size_t j = 0; j < c->core; j++) {
            size_t at = (c->prelude + s * c->core + j) * CAPACITY * width;
            size_t full_at = (c->prelude + newest * c->core + j) * CAPACITY * width;
            check(same(keys + at, full_keys + full_at, width) &&
                      same(values + at, full_values + full_at, width),
                  "kind %d of %zu: slot %zu does not hold recurrence %zu", (int)kind, M, s, newest);
        }
    }
}

// The first layer's keys and values, which depend on no other's, are the same rounded.
static void check_bf16(const retrofit_buffers *half, const retrofit_buffers *buffers,
                       size_t count) {
    const uint16_t *half_keys = half->decoder->keys, *half_values = half->decoder->values;
    const float *keys = buffers->decoder->keys, *values = buffers->decoder->values;
    for (size_t i = 0; i < count; i++)
        check(half_keys[i] == retrofit_float_to_bf16(keys[i]) &&
                  half_values[i] == retrofit_float_to_bf16(values[i]),
              "key or value %zu is not the same in bf16", i);
}

// slots: what a core layer should need for DEEPEST recurrences.
static void check_cache(const retrofit_model *model, retrofit_cache_kind kind, size_t M,
                        size_t slots) {
    const retrofit_config *c = &model->config;
    size_t V = c->vocab, width = c->n_kv_heads * c->head_dim;
    size_t all = c->prelude + slots * c->core + c->coda;
    retrofit_buffers *buffers = with_cache(model, 1, kind, M, false);
    retrofit_buffers *full = with_full_cache(model, 1), *half = with_cache(model, 1, kind, M, true);
    check(buffers->decoder->slots == all, "kind %d of %zu: %zu slots", (int)kind, M,
          buffers->decoder->slots);
    check(retrofit_cache_bytes(buffers) == 2 * all * width * 4 &&
              retrofit_cache_bytes(half) == 2 * all * width * 2,
          "bytes per token: %zu", retrofit_cache_bytes(buffers));
    random_prompt prompt = draw_prompt(V);
    retrofit_recurrence_options *options = &prompt.options;
    options->recurrences = DEEPEST;

    // One token alone attends to itself only: the same in every cache.
    const float *logits = feed(buffers, prompt.tokens, 1, 1, options);
    check(same(logits, feed(full, prompt.tokens, 1, 1, options), V),
          "a first token differs, kind %d of %zu", (int)kind, M);
    check_slots(buffers, full, slots);

    retrofit_clear_cache(buffers);
    logits = feed(buffers, prompt.tokens, 1, prompt.n, options);
    const float *rounded = feed(half, prompt.tokens, 1, prompt.n, options);
    check(relative_error(rounded, logits, V) > 0,
          "kind %d of %zu: keys and values in bf16 change nothing", (int)kind, M);
    check_bf16(half, buffers, prompt.n * width);
    retrofit_buffers_free(buffers);
    retrofit_buffers_free(full);
    retrofit_buffers_free(half);
}

static void caches(size_t which) {
    retrofit_model *model = load(which);
    check_cache(model, RETROFIT_CACHE_FULL, 0, DEEPEST);
    check_cache(model, RETROFIT_CACHE_SHARED, 1, 1);
    check_cache(model, RETROFIT_CACHE_SHARED, 4, 4);
    check_cache(model, RETROFIT_CACHE_SHARED, 100, DEEPEST);
    check_cache(model, RETROFIT_CACHE_GROUPED, 2, 5);
    check_cache(model, RETROFIT_CACHE_GROUPED, 4, 3);
    check_cache(model, RETROFIT_CACHE_GROUPED, 100, 1);
    for (int kind = RETROFIT_CACHE_SHARED; kind <= RETROFIT_CACHE_GROUPED; kind++) {
        retrofit_kv_cache none = {8, 4, (retrofit_cache_kind)kind, 0, false};
        check(!retrofit_buffers_new(model, 1, 4, 0, RETROFIT_KEEP_NOTHING, &none),
              "a cache without slots");
    }
    retrofit_free(model);
}

// ---- Drafts through the depths ------------------------------------------------------------------

enum { FRONT_ROWS = 3 };

// A text of plain decoding, to be compared with a row of a front.
typedef struct {
    retrofit_buffers *buffers;
    retrofit_sampling sampling;
    int32_t next;
} plain_text;

// Plain decoding's next token, and the front's, with their logits.
static void compare_answer(plain_text *plain, const retrofit_front_row *row,
                           const retrofit_front *front, void *scratch, const char *where) {
    size_t V = front->vocab, r = front->options.recurrences;
    const float *logits = feed(plain->buffers, &plain->next, 1, 1, &front->options);
    size_t number = (size_t)(row - front->rows);
    plain->next = retrofit_sample(logits, V, &plain->sampling, scratch);
    check(row->answer == plain->next, "%s: token %d is %d, not %d", where,
          (int)plain->buffers->decoder->seen[0], (int)row->answer, (int)plain->next);
    check(same(logits, row->logits, V), "%s: other logits than plainly", where);
    check(row->sampling->seed == plain->sampling.seed, "%s: other random numbers", where);
    check(front->buffers->decoder->seen[number] == plain->buffers->decoder->seen[0] &&
              front->buffers->decoder->used[number] == (int32_t)r,
          "%s: %d tokens in the cache, not %d", where, (int)front->buffers->decoder->seen[number],
          (int)plain->buffers->decoder->seen[0]);
}

// A proposal that nobody has confirmed is replaced by a random one, now and then.
static void disturb(retrofit_front *front) {
    for (size_t i = 0; i < front->buffers->B; i++) {
        retrofit_front_row *row = &front->rows[i];
        bool proposed = row->next.position > front->buffers->decoder->seen[i];
        if (!row->waits || !proposed || random_between(0, 3)) continue;
        row->next.id = (int32_t)random_between(0, front->vocab - 1);
    }
}

// Prompts of different lengths, greedy and drawn: each alone in `plain`, together in a front's
// buffers, where the first tokens behind them begin. ends: where each text is to end.
static void begin_texts(retrofit_front *front, plain_text *plain, retrofit_sampling *samplings,
                        int32_t *ends, void *scratch, const char *where) {
    size_t V = front->vocab, B = front->buffers->B;
    int32_t tokens[FRONT_ROWS * PROMPT] = {0}, lengths[FRONT_ROWS];
    for (size_t i = 0; i < B; i++) {
        random_prompt prompt = draw_prompt(V);
        lengths[i] = (int32_t)prompt.n;
        memcpy(tokens + i * PROMPT, prompt.tokens, PROMPT * sizeof *tokens);
    }
    const float *logits =
        retrofit_next_logits(front->buffers, tokens, B, PROMPT, lengths, &front->options);
    need(logits != NULL, "prompts of a front");
    for (size_t i = 0; i < B; i++) {
        size_t n = (size_t)lengths[i];
        float temperature = random_between(0, 1) ? 0.5f : 0;
        samplings[i] = (retrofit_sampling){temperature, random_between(0, 6), 1, 0, i};
        plain[i].sampling = samplings[i];
        retrofit_clear_cache(plain[i].buffers);
        const float *alone = feed(plain[i].buffers, tokens + i * PROMPT, 1, n, &front->options);
        plain[i].next = retrofit_sample(alone, V, &plain[i].sampling, scratch);
        int32_t id = retrofit_sample(logits + i * V, V, &samplings[i], scratch);
        check(id == plain[i].next, "%s: first token", where);
        ends[i] = lengths[i] + (int32_t)random_between(1, CAPACITY - PROMPT);
        need(retrofit_front_begin(front, i, id, ends[i], &samplings[i]), "begin");
    }
}

// What a front leaves in the cache is what plain decoding does: the next logits are the same. Rows
// from that on whose context is full are not looked at.
static void compare_caches(retrofit_buffers *buffers, plain_text *plain, const int32_t *ends,
                           const retrofit_recurrence_options *options, const char *where) {
    size_t V = buffers->model->config.vocab, b = 0;
    int32_t next[FRONT_ROWS] = {0};
    while (b < buffers->B && ends[b] < CAPACITY) b++;
    if (b == 0) return;
    for (size_t i = 0; i < b; i++) next[i] = plain[i].next;
    const float *after = feed(buffers, next, b, 1, options);
    for (size_t i = 0; i < b; i++)
        check(same(after + i * V, feed(plain[i].buffers, &next[i], 1, 1, options), V),
              "%s: the cache is another one than plain decoding's", where);
}

static void add_counts(retrofit_front_counts *sum, const retrofit_front_counts *counts) {
    sum->answers += counts->answers;
    sum->kept += counts->kept;
    sum->restarts += counts->restarts;
    sum->most = retrofit_max(sum->most, counts->most);
}

// Texts in one front, against each alone in plain decoding. In half of the fronts some proposals
// are replaced by others, in a third the depths are chosen as they go.
static void compare_front(const retrofit_model *model, size_t B, plain_text *plain, void *scratch,
                          retrofit_front_counts *counts, const char *where) {
    size_t V = model->config.vocab, ended = 0;
    int32_t ends[FRONT_ROWS];
    retrofit_sampling samplings[FRONT_ROWS];
    retrofit_recurrence_options options = draw_prompt(V).options;
    size_t r = ++options.recurrences, first = random_between(1, r);
    size_t second = first + 1 < r && random_between(0, 1) ? random_between(first + 1, r - 1) : 0;
    bool rough = random_between(0, 1), tuned = random_between(0, 2) == 0;
    retrofit_tuning tuning = {0};
    retrofit_buffers *buffers = with_full_cache(model, B);
    retrofit_front *front =
        retrofit_front_new(buffers, &options, first, second, V, tuned ? &tuning : NULL);
    need(front != NULL, "a front");
    begin_texts(front, plain, samplings, ends, scratch, where);
    while (ended < B) {
        if (rough) disturb(front);
        retrofit_front_advance(front);
        need(front->counts.passes <= CAPACITY * r, "an end of passes");
        for (size_t i = 0; i < B; i++) {
            if (front->rows[i].answer < 0) continue;
            compare_answer(&plain[i], &front->rows[i], front, scratch, where);
            if (buffers->decoder->seen[i] < ends[i]) continue;
            retrofit_front_end(front, i);
            ended++;
        }
    }
    check(front->count == 0, "%s: %zu tokens are left under way", where, front->count);
    compare_caches(buffers, plain, ends, &options, where);
    add_counts(counts, &front->counts);
    retrofit_front_free(front);
    retrofit_buffers_free(buffers);
}

static void refuse_fronts(const retrofit_model *model) {
    static const struct {
        const char *what;
        size_t first, second;
        retrofit_recurrence_options options;
    } cases[] = {
        {"no reading", 0, 0, {.recurrences = 4}},
        {"a second reading before the first", 2, 1, {.recurrences = 4}},
        {"more recurrences than the cache holds", 2, 0, {.recurrences = DEEPEST + 1}},
        {"drafts with an exit", 2, 0, {.recurrences = 4, .exit = RETROFIT_EXIT_KL}},
        {"drafts with noise", 2, 0, {.recurrences = 4, .noise = 1}},
        {"drafts that go on", 2, 0, {.recurrences = 4, .continuous = true}},
    };
    size_t V = model->config.vocab;
    retrofit_buffers *buffers = with_full_cache(model, 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check(!retrofit_front_new(buffers, &cases[i].options, cases[i].first, cases[i].second, V,
                                  NULL), "%s", cases[i].what);
    retrofit_buffers *shared = with_cache(model, 1, RETROFIT_CACHE_SHARED, 2, false);
    const retrofit_recurrence_options *options = &cases[0].options;
    check(!retrofit_front_new(shared, options, 2, 0, V, NULL), "drafts with shared slots");
    retrofit_buffers_free(shared);

    retrofit_front *front = retrofit_front_new(buffers, options, 2, 0, V, NULL);
    retrofit_sampling greedy = {0, 0, 1, 0, 1};
    need(front != NULL, "a front");
    buffers->decoder->seen[0] = CAPACITY - 1;
    check(!retrofit_front_begin(front, 0, (int32_t)V, CAPACITY, &greedy), "a token beyond V");
    check(!retrofit_front_begin(front, 0, 1, CAPACITY + 1, &greedy), "an end beyond the context");
    check(!retrofit_front_begin(front, 0, 1, CAPACITY - 1, &greedy), "a token at the end");
    check(retrofit_front_begin(front, 0, 1, CAPACITY, &greedy), "a token in the last place");
    for (size_t i = 0; i < 4; i++) retrofit_front_advance(front);
    check(front->rows[0].answer >= 0 && front->count == 0, "its answer, and nothing behind it");
    retrofit_front_advance(front);
    check(front->rows[0].answer == -1, "an answer without a token");
    retrofit_front_free(front);
    retrofit_buffers_free(buffers);
}

static void fronts(size_t which) {
    retrofit_model *model = load(which);
    size_t V = model->config.vocab;
    retrofit_front_counts counts = {0};
    plain_text plain[FRONT_ROWS];
    void *scratch = allocate(V, sizeof(candidate));
    for (size_t i = 0; i < FRONT_ROWS; i++) plain[i].buffers = with_full_cache(model, 1);
    for (size_t i = 0; i < PROMPTS; i++) {
        char where[64];
        snprintf(where, sizeof where, "%s, front %zu", models[which], i);
        compare_front(model, 1 + i % FRONT_ROWS, plain, scratch, &counts, where);
    }
    check(2 * counts.restarts > PROMPTS && 2 * counts.kept > PROMPTS && counts.most > FRONT_ROWS,
          "%s: %zu proposals kept, %zu replaced: little was tested", models[which], counts.kept,
          counts.restarts);
    printf("%s: %zu answers, %zu as proposed, %zu restarts, %zu tokens under way\n", models[which],
           counts.answers, counts.kept, counts.restarts, counts.most);
    refuse_fronts(model);
    for (size_t i = 0; i < FRONT_ROWS; i++) retrofit_buffers_free(plain[i].buffers);
    free(scratch);
    retrofit_free(model);
}

// χ² of counts against `draws` draws from p; its degrees of freedom; draws of what p excludes.
typedef struct {
    double chi, freedom;
    size_t strays;
} goodness;

static goodness compare_counts(const size_t *count, const double *p, size_t n, size_t draws) {
    goodness fit = {0, -1, 0};
    for (size_t v = 0; v < n; v++) {
        double due = (double)draws * p[v];
        if (p[v] == 0) {
            fit.strays += count[v];
            continue;
        }
        fit.freedom++;
        fit.chi += ((double)count[v] - due) * ((double)count[v] - due) / due;
    }
    return fit;
}

// p (V): what the filters leave, as probabilities.
static void filtered(double *p, const float *logits, size_t V, const retrofit_sampling *sampling,
                     candidate *scratch) {
    size_t left = apply_filters(logits, V, sampling, scratch);
    double total = total_weight(scratch, left);
    memset(p, 0, V * sizeof *p);
    for (size_t i = 0; i < left; i++) p[scratch[i].id] = (double)scratch[i].p / total;
}

// pairs (V,V): probabilities of the two tokens behind `token`, at position 3, by plain decoding.
static void pair_probabilities(double *pairs, retrofit_buffers *buffers, int32_t token,
                               const retrofit_recurrence_options *options,
                               const retrofit_sampling *sampling, candidate *scratch) {
    size_t V = buffers->model->config.vocab, tops = 0;
    double *first = allocate(V, sizeof *first);
    filtered(first, feed(buffers, &token, 1, 1, options), V, sampling, scratch);
    for (size_t v = 0; v < V; v++) {
        int32_t id = (int32_t)v;
        if (first[v] == 0) continue;
        buffers->decoder->seen[0] = 4;
        filtered(pairs + v * V, feed(buffers, &id, 1, 1, options), V, sampling, scratch);
        for (size_t u = 0; u < V; u++) pairs[v * V + u] *= first[v];
        tops++;
    }
    check(tops == 4, "%zu tokens may follow, not top-k's 4", tops);
    free(first);
}

// Drawn text through a front: pairs of tokens behind a prompt as often as plain decoding's
// probabilities say.
static void drawn_fronts(void) {
    enum { ROUNDS = 12000 };
    retrofit_model *model = load(0);
    size_t V = model->config.vocab;
    retrofit_buffers *buffers = with_full_cache(model, 1);
    candidate *scratch = allocate(V, sizeof *scratch);
    double *pairs = allocate(V * V, sizeof *pairs);
    size_t *count = allocate(V * V, sizeof *count);
    retrofit_recurrence_options options = {.recurrences = 4};
    retrofit_sampling sampling = {0.5f, 4, 1, 0, 5};
    int32_t prompt[] = {5, 77, 31}, token = 9;
    feed(buffers, prompt, 1, 3, &options);
    pair_probabilities(pairs, buffers, token, &options, &sampling, scratch);
    retrofit_front *front = retrofit_front_new(buffers, &options, 1, 3, V, NULL);
    need(front != NULL, "a front");
    for (size_t i = 0; i < ROUNDS; i++) {
        int32_t text[2];
        size_t have = 0;
        buffers->decoder->seen[0] = 3;
        need(retrofit_front_begin(front, 0, token, 5, &sampling), "begin");
        while (have < 2) {
            retrofit_front_advance(front);
            if (front->rows[0].answer >= 0) text[have++] = front->rows[0].answer;
        }
        count[(size_t)text[0] * V + (size_t)text[1]]++;
    }
    goodness fit = compare_counts(count, pairs, V * V, ROUNDS);
    check(fit.strays == 0, "pairs that cannot be came %zu times", fit.strays);
    check(fit.chi < fit.freedom + 1 + 5 * sqrt(2 * (fit.freedom + 1)),
          "pairs of drafted tokens: χ² %.1f with %g degrees of freedom", fit.chi, fit.freedom);
    retrofit_front_free(front);
    free(scratch);
    free(pairs);
    free(count);
    retrofit_buffers_free(buffers);
    retrofit_free(model);
}

// ---- Continuous thinking: the state goes on from token to token ---------------------------------

// One token for each of two rows by hand, from `state` (2,d), which then is the last one: prelude,
// the state put in place, the recurrences, the coda.
static void step_by_hand(retrofit_buffers *buffers, const int32_t *tokens, size_t r, float *state,
                         float *logits) {
    size_t bytes = 2 * buffers->model->config.n_embd * sizeof *state;
    int32_t *seen = buffers->decoder->seen;
    need(set_batch(buffers, tokens, 2, 1), "batch");
    memcpy(buffers->past, seen, 2 * sizeof *seen);
    prelude_forward(buffers);
    memcpy(buffers->state, state, bytes);
    retrofit_recur(buffers, r, 0);
    memcpy(state, buffers->state, bytes);
    retrofit_coda(buffers);
    retrofit_logits(buffers, 0, 2, logits);
    seen[0]++;
    seen[1]++;
}

// Two prompts of different lengths, then three tokens each.
static void continue_prompts(retrofit_buffers *buffers, retrofit_buffers *hand, const char *name) {
    size_t V = buffers->model->config.vocab, d = buffers->model->config.n_embd;
    float *state = allocate(2 * d, sizeof *state), *logits = allocate(2 * V, sizeof *logits);
    int32_t prompts[2 * 5], lengths[2] = {(int32_t)random_between(1, 5), 5};
    retrofit_recurrence_options plain = {
        .recurrences = random_between(1, DEEPEST), .sigma = 0.3f, .seed = 5};
    retrofit_recurrence_options options = plain;
    options.continuous = true;
    for (size_t i = 0; i < 10; i++) prompts[i] = (int32_t)random_between(0, V - 1);
    retrofit_clear_cache(buffers);
    retrofit_clear_cache(hand);
    need(retrofit_next_logits(buffers, prompts, 2, 5, lengths, &options) &&
             retrofit_next_logits(hand, prompts, 2, 5, lengths, &plain),
         "prompts");
    check(same(buffers->decoder->next, hand->decoder->next, 2 * V),
          "%s: a prompt does not start from s_0", name);
    for (size_t row = 0; row < 2; row++) {
        size_t last = row * 5 + (size_t)lengths[row] - 1;
        memcpy(state + row * d, hand->state + last * d, d * sizeof *state);
    }
    for (size_t i = 0; i < 3; i++) {
        int32_t tokens[2] = {(int32_t)random_between(0, V - 1), (int32_t)random_between(0, V - 1)};
        const float *got = feed(buffers, tokens, 2, 1, &options);
        step_by_hand(hand, tokens, options.recurrences, state, logits);
        check(same(got, logits, 2 * V), "%s: token %zu does not start from the last state", name,
              i);
    }
    free(state);
    free(logits);
}

static void continuous(size_t which) {
    retrofit_model *model = load(which);
    const char *name = models[which];
    size_t V = model->config.vocab;
    retrofit_buffers *a = with_full_cache(model, 2), *b = with_full_cache(model, 2);
    for (int round = 0; round < 30; round++) continue_prompts(a, b, name);

    retrofit_clear_cache(a); // forgets the states
    retrofit_clear_cache(b);
    int32_t tokens[] = {3, 9};
    retrofit_recurrence_options plain = {.recurrences = 2, .sigma = 0.3f, .seed = 5};
    retrofit_recurrence_options options = plain;
    options.continuous = true;
    const float *logits = feed(a, tokens, 1, 1, &options);
    check(same(logits, feed(b, tokens, 1, 1, &plain), V), "%s: a first token, not from s_0", name);
    logits = feed(a, tokens, 2, 1, &options);
    check(same(logits, feed(b, tokens, 2, 1, &plain), 2 * V), "%s: a row more, not from s_0", name);
    logits = feed(a, tokens, 1, 2, &options);
    check(same(logits, feed(b, tokens, 1, 2, &plain), V), "%s: two tokens, not from s_0", name);
    retrofit_buffers_free(a);
    retrofit_buffers_free(b);
    retrofit_free(model);
}

// ---- Noise --------------------------------------------------------------------------------------

enum { NOISY = 6 }; // tokens
static const int32_t noisy_tokens[NOISY] = {1, 5, 9, 90, 3, 8};

static void begin_noisy(retrofit_buffers *buffers, const retrofit_recurrence_options *options) {
    need(retrofit_prelude(buffers, noisy_tokens, 1, NOISY), "prelude");
    retrofit_init_state(buffers, options->sigma, options->seed);
}

static double strength_by_definition(int kind, double y, size_t i, size_t r) {
    if (kind == RETROFIT_NOISE_GEOM) return y / (double)i;
    if (kind == RETROFIT_NOISE_SQRT) return y / sqrt((double)i);
    if (kind == RETROFIT_NOISE_LINE) return fmax(y, 1 - (double)(i - 1) / (double)r);
    return y;
}

// What is added is x·z, z cut at three deviations: found by taking the rest away.
static void check_strengths(retrofit_buffers *buffers, const retrofit_recurrence_options *options,
                            const char *name) {
    size_t count = NOISY * buffers->model->config.n_embd;
    int kind = options->noise_kind;
    float *before = allocate(count, sizeof *before);
    begin_noisy(buffers, options);
    memcpy(before, buffers->state, count * sizeof *before);
    for (size_t i = 1; i <= options->recurrences; i++) {
        double y = (double)options->noise * RETROFIT_STATE_STD, squares = 0, largest = 0;
        double x = strength_by_definition(kind, y, i, options->recurrences);
        buffers->n = i - 1;
        add_noise(buffers, options);
        for (size_t c = 0; c < count; c++) {
            double z = ((double)buffers->state[c] - (1 - x) * before[c]) / x;
            squares += z * z / (double)count;
            largest = fmax(largest, fabs(z));
        }
        check(largest < 3.01 && fabs(squares - 0.973) < 10 / sqrt((double)count),
              "%s, noise %d, recurrence %zu: z has a mean square of %g, at most %g", name, kind, i,
              squares, largest);
        memcpy(buffers->state, before, count * sizeof *before); // for the next one
    }
    free(before);
}

// The noise comes before each recurrence. The logits of the last token go to `logits`.
static void check_order(retrofit_buffers *a, retrofit_buffers *b,
                        const retrofit_recurrence_options *options, float *logits,
                        const char *name) {
    size_t count = NOISY * a->model->config.n_embd;
    begin_noisy(a, options);
    begin_noisy(b, options);
    retrofit_recur_noisy(b, options, options->recurrences);
    while (a->n < options->recurrences) {
        add_noise(a, options);
        retrofit_recur(a, 1, 0);
    }
    check(same(a->state, b->state, count), "%s: noise %d is not before each recurrence", name,
          (int)options->noise_kind);
    retrofit_coda(b);
    retrofit_logits(b, NOISY - 1, 1, logits);
}

static const float *feed_one_by_one(retrofit_buffers *buffers,
                                    const retrofit_recurrence_options *options) {
    const float *logits = NULL;
    retrofit_clear_cache(buffers);
    for (size_t i = 0; i < NOISY; i++) logits = feed(buffers, &noisy_tokens[i], 1, 1, options);
    return logits;
}

// The same seed, the same noise, cached or not; one by one, behind a prompt, with an exit that
// never fires.
static void check_cached_noise(retrofit_buffers *buffers,
                               const retrofit_recurrence_options *options, const float *full,
                               const char *name) {
    size_t V = buffers->model->config.vocab;
    int kind = options->noise_kind;
    retrofit_recurrence_options never = *options, none = *options;
    never.exit = RETROFIT_EXIT_KL;
    never.threshold = 0;
    none.noise = 0;
    double apart = relative_error(feed_one_by_one(buffers, options), full, V);
    check(apart < 1e-5, "%s: noise %d: cached %.2e off the full pass", name, kind, apart);
    retrofit_clear_cache(buffers);
    feed(buffers, noisy_tokens, 1, NOISY - 1, options);
    apart = relative_error(feed(buffers, &noisy_tokens[NOISY - 1], 1, 1, &never), full, V);
    check(apart < 1e-5, "%s: noise %d: a prompt or an exit is %.2e off the full pass", name, kind,
          apart);
    apart = relative_error(feed_one_by_one(buffers, &none), full, V);
    check(apart > 1e-4, "%s: noise %d changes nothing", name, kind);
}

static void noise(size_t which) {
    retrofit_model *model = load(which);
    retrofit_buffers *a = without_cache(model, NOISY), *b = without_cache(model, NOISY);
    retrofit_buffers *cached = with_full_cache(model, 1);
    float *logits = allocate(model->config.vocab, sizeof *logits);
    for (int kind = RETROFIT_NOISE_FIXED; kind <= RETROFIT_NOISE_CHI; kind++) {
        retrofit_recurrence_options options = {.recurrences = 4,
                                               .sigma = 0.3f,
                                               .seed = 9,
                                               .noise = 20,
                                               .noise_kind = (retrofit_noise)kind};
        bool fixed = kind != RETROFIT_NOISE_CHI; // its strength is drawn anew for every pass
        if (fixed) check_strengths(a, &options, models[which]);
        check_order(a, b, &options, logits, models[which]);
        if (fixed) check_cached_noise(cached, &options, logits, models[which]);
    }
    free(logits);
    retrofit_buffers_free(a);
    retrofit_buffers_free(b);
    retrofit_buffers_free(cached);
    retrofit_free(model);
}

static double product(const float *x, const float *y, size_t d) {
    double sum = 0;
    for (size_t c = 0; c < d; c++) sum += (double)x[c] * y[c];
    return sum;
}

// Every recurrence and seed has a z of its own.
static void noise_draws(void) {
    retrofit_model *model = load(0);
    size_t d = model->config.n_embd;
    retrofit_buffers *buffers = with_full_cache(model, 1);
    float *z = allocate(5 * d, sizeof *z);
    int32_t token = 1;
    need(set_batch(buffers, &token, 1, 1), "batch");
    // the start state, two recurrences, another seed, the first recurrence again
    for (size_t i = 0; i < 5; i++) {
        retrofit_recurrence_options options = {
            .recurrences = 4, .seed = i == 3 ? 8 : 9, .noise = 20};
        retrofit_init_state(buffers, i ? 0 : 20 * model->config.state_std, 9);
        buffers->n = i == 2;
        if (i > 0) add_noise(buffers, &options);
        memcpy(z + i * d, buffers->state, d * sizeof *z);
    }
    for (size_t i = 0; i < 4; i++) {
        for (size_t j = 0; j < i; j++) {
            double along = product(z + i * d, z + j * d, d);
            double size = product(z + j * d, z + j * d, d);
            check(fabs(along) < 0.8 * size, "noise %zu is noise %zu: %g of it", i, j, along / size);
        }
    }
    check(same(z + d, z + 4 * d, d), "the same seed and recurrence have another noise");
    free(z);
    retrofit_buffers_free(buffers);
    retrofit_free(model);
}

// CHI has a strength of its own at every position: twice a uniform number.
static void chi_strengths(void) {
    retrofit_model *model = load(0);
    size_t d = model->config.n_embd;
    retrofit_buffers *buffers = with_full_cache(model, 1);
    retrofit_recurrence_options options = {
        .recurrences = 4, .seed = 9, .noise = 20, .noise_kind = RETROFIT_NOISE_CHI};
    double mean = 0, min = 2, max = 0;
    int32_t token = 1;
    need(set_batch(buffers, &token, 1, 1), "batch");
    for (int32_t position = 0; position < CAPACITY; position++) {
        buffers->decoder->seen[0] = position;
        buffers->n = 0;
        retrofit_init_state(buffers, 0, 9);
        add_noise(buffers, &options);
        double size = sqrt(product(buffers->state, buffers->state, d) / (double)d);
        double strength = size / (20 * (double)model->config.state_std);
        mean += strength / CAPACITY;
        min = fmin(min, strength);
        max = fmax(max, strength);
    }
    check(fabs(mean - 1) < 0.4 && min < 0.5 && max > 1.5,
          "chi noise: strengths from %g to %g, %g on average", min, max, mean);
    retrofit_buffers_free(buffers);
    retrofit_free(model);
}

// ---- A plain Llama has no recurrence to stop, whatever it is asked ------------------------------
static void plain_model(void) {
    retrofit_model *model = retrofit_load(FIXTURES "tiny/base", &retrofit_cpu, RETROFIT_INFERENCE);
    need(model != NULL, "a plain model");
    retrofit_buffers *a = with_full_cache(model, 1), *b = with_full_cache(model, 1);
    retrofit_recurrence_options none = {0}, options = {.recurrences = 3, .noise = 1};
    options.exit = RETROFIT_EXIT_KL;
    options.threshold = -1;
    options.continuous = true;
    for (int32_t token = 1; token < 9; token++) {
        const float *logits = feed(a, &token, 1, 1, &options);
        check(same(logits, feed(b, &token, 1, 1, &none), model->config.vocab) &&
                  a->decoder->used[0] == 0,
              "a plain model thinks %d recurrences", (int)a->decoder->used[0]);
    }
    retrofit_buffers_free(a);
    retrofit_buffers_free(b);
    retrofit_free(model);
}

int main(void) {
    for (size_t which = 0; which < MODELS; which++) {
        equal_to_plain(which);
        exits(which);
        default_thresholds(which);
        exits_together(which);
        caches(which);
        fronts(which);
        continuous(which);
        noise(which);
    }
    thresholds();
    noise_draws();
    chi_strengths();
    plain_model();
    drawn_fronts();
    return finish("thinking");
}

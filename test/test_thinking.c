// What a recurrent model can do at test time: exits per token, KV caches that hold less, drafts that the whole depth verifies, continuous
// thinking, noise; on random prompts, against plain decoding, the full pass and definitions written out.
#include "test.h"

static const char *const models[] = {"tiny/recurrent", "llama3/recurrent", "head64/recurrent"};
#ifdef __SANITIZE_ADDRESS__ // ten times as slow
enum { PROMPTS = 25 };
#else
enum { PROMPTS = 334 }; // 1,002 with three models
#endif
enum { MODELS = 3, REST = 7, DEEPEST = 9 }; // tokens behind each prompt; recurrences at most

static uint64_t random_state;
static size_t any(size_t lo, size_t hi) { return lo + (size_t)(retrofit_hash(1, random_state++) % (hi - lo + 1)); }

static retrofit_model *load(size_t which) {
    char path[256];
    snprintf(path, sizeof path, FIXTURES "%s", models[which]);
    retrofit_model *m = retrofit_load(path, &retrofit_cpu, RETROFIT_INFERENCE);
    need(m != NULL, path);
    return m;
}

static retrofit_buffers *with_cache(const retrofit_model *m, size_t B, retrofit_cache_kind kind, size_t M, bool bf16) {
    retrofit_buffers *a = retrofit_buffers_new(m, B, 12, 0, RETROFIT_KEEP_NOTHING, &(retrofit_kv_cache){32, DEEPEST, kind, M, bf16});
    need(a != NULL, "activations with a cache");
    return a;
}

static const float *feed(retrofit_buffers *a, const int32_t *tokens, size_t b, size_t t, const retrofit_recurrence_options *how) {
    const float *logits = retrofit_next_logits(a, tokens, b, t, NULL, how);
    need(logits != NULL, "feed");
    return logits;
}

// A start state that matters, and a prompt of one's own.
static retrofit_recurrence_options random_prompt(int32_t *tokens, size_t *n, size_t V) {
    *n = any(1, 12);
    for (size_t i = 0; i < 12 + REST; i++) tokens[i] = (int32_t)any(0, V - 1);
    return (retrofit_recurrence_options){.recurrences = any(1, DEEPEST - 1), .sigma = any(0, 1) ? 0.3f : 0, .seed = any(1, 99), .threshold = -1};
}

// ---- What should equal plain decoding, to the bit: caches large enough, exits that never fire; and r = 1, those that always do ----------
static void equal_to_plain(size_t which) {
    retrofit_model *m = load(which);
    size_t V = m->config.vocab, worst_latest = 0;
    enum { PLAIN, SHARED, GROUPED, NEVER, ALWAYS, ONE, KINDS };
    static const char *const names[] = {
        "plain", "shared by as many", "grouped one by one", "an exit that never fires", "one that always fires", "one recurrence"};
    retrofit_buffers *a[KINDS], *whole = retrofit_buffers_new(m, 1, 12 + REST, 0, RETROFIT_KEEP_NOTHING, NULL);
    float *logits = (float *)retrofit_allocate(REST * V, 4);
    need(whole && logits, "activations");
    for (int k = 0; k < KINDS; k++)
        a[k] = with_cache(m, 1,
                          k == SHARED    ? RETROFIT_CACHE_SHARED
                          : k == GROUPED ? RETROFIT_CACHE_GROUPED
                                         : RETROFIT_CACHE_FULL,
                          k == SHARED ? DEEPEST : 1, false);
    for (size_t prompt = 0; prompt < PROMPTS; prompt++) {
        int32_t tokens[12 + REST];
        size_t n;
        retrofit_recurrence_options how = random_prompt(tokens, &n, V), ways[KINDS] = {how, how, how, how, how, how};
        ways[NEVER].exit = ways[ALWAYS].exit = (retrofit_exit)(1 + prompt % 5);
        bool stable = ways[NEVER].exit == RETROFIT_EXIT_ARGMAX_STABILITY;
        ways[NEVER].threshold = stable ? 1e9f : 0, ways[ALWAYS].threshold = stable ? 0 : 1e30f;
        for (int k = 0; k < KINDS; k++) retrofit_clear_cache(a[k]), feed(a[k], tokens, 1, n, &ways[k]);
        ways[ONE].recurrences = 1; // the prompt thought as deep as the others
        need(retrofit_forward(whole, tokens, 1, n + REST, how.sigma, how.seed, how.recurrences, 0), "forward");
        retrofit_logits(whole, n, REST, logits);
        for (size_t i = n; i < n + REST; i++) {
            const float *plain = feed(a[PLAIN], tokens + i, 1, 1, &ways[PLAIN]);
            double apart = relative_error(plain, logits + (i - n) * V, V); // roundings add up with the depth; 1e-5 at 4, as in test_decode
            check(apart < 2.5e-6 * fmax(4, (double)how.recurrences), "%s, prompt %zu, r %zu: token %zu is %.2e off the full pass",
                  models[which], prompt, how.recurrences, i, apart);
            for (int k = SHARED; k <= NEVER; k++)
                check(!memcmp(feed(a[k], tokens + i, 1, 1, &ways[k]), plain, V * 4) && a[k]->decoder->used[0] == (int32_t)how.recurrences,
                      "%s, prompt %zu: %s, r %zu: token %zu differs", models[which], prompt, names[k], how.recurrences, i);
            const float *one = feed(a[ONE], tokens + i, 1, 1, &ways[ONE]);
            check(!memcmp(feed(a[ALWAYS], tokens + i, 1, 1, &ways[ALWAYS]), one, V * 4) && a[ALWAYS]->decoder->used[0] == 1,
                  "%s, prompt %zu: %s, token %zu differs from r = 1", models[which], prompt, names[ALWAYS], i);
        }
        worst_latest += memcmp(a[ONE]->decoder->next, a[PLAIN]->decoder->next, V * 4) != 0;
    }
    check(worst_latest > PROMPTS / 2, "%s: r = 1 and r agree: nothing was tested", models[which]);
    for (int k = 0; k < KINDS; k++) retrofit_buffers_free(a[k]);
    free(logits), retrofit_buffers_free(whole), retrofit_free(m);
}

// ---- Exits: the recurrence at which each criterion, written out, stops; and what a token that stopped leaves in the cache ---------------
static void probabilities(double *p, const float *z, size_t V) {
    double top = -INFINITY, sum = 0;
    for (size_t v = 0; v < V; v++) top = fmax(top, (double)z[v]);
    for (size_t v = 0; v < V; v++) sum += p[v] = exp((double)z[v] - top);
    for (size_t v = 0; v < V; v++) p[v] /= sum;
}
static double entropy_of(const double *p, size_t V) {
    double h = 0;
    for (size_t v = 0; v < V; v++) h -= p[v] > 0 ? p[v] * log(p[v]) : 0;
    return h;
}
static void cut_below(double *p, size_t V) { // min-p: what is below a tenth of the largest becomes 1/V, then the sum 1 again
    double top = 0, sum = 0;
    for (size_t v = 0; v < V; v++) top = fmax(top, p[v]);
    for (size_t v = 0; v < V; v++) sum += p[v] = p[v] < 0.1 * top ? 1 / (double)V : p[v];
    for (size_t v = 0; v < V; v++) p[v] /= sum;
}

// What a criterion compares after recurrences 1, 2, …, R of a token behind those that `a` holds: each by plain decoding so deep, of the same token.
static void measure(double value[DEEPEST + 1], retrofit_buffers *a, retrofit_exit exit, int32_t token, const retrofit_recurrence_options *how) {
    const retrofit_model *m = a->model;
    size_t V = m->config.vocab, d = m->config.n_embd, same = 0;
    double *p = (double *)retrofit_allocate(V, 8), *q = (double *)retrofit_allocate(V, 8), entropy = 100;
    float *s = (float *)retrofit_allocate(d, 4);
    int32_t likeliest = -1, n = a->decoder->seen[0];
    for (size_t v = 0; v < V; v++) q[v] = 1 / (double)V;
    need(set_batch(a, &token, 1, 1), "batch");
    m->ops->upload(a->past, a->decoder->seen, 4), retrofit_init_state(a, how->sigma, how->seed), memcpy(s, a->state, d * 4);
    for (size_t i = 1; i <= DEEPEST; i++) {
        double change = 0, size = 0;
        retrofit_recurrence_options plain = {.recurrences = i, .sigma = how->sigma, .seed = how->seed};
        const float *z = feed(a, &token, 1, 1, &plain);
        a->decoder->seen[0] = n;
        for (size_t c = 0; c < d; c++) change += pow((double)a->state[c] - s[c], 2), size += pow(a->state[c], 2);
        memcpy(s, a->state, d * 4);
        probabilities(p, z, V);
        if (exit == RETROFIT_EXIT_ENTROPY_DIFF) value[i] = fabs(entropy_of(p, V) - entropy), entropy = entropy_of(p, V);
        if (exit == RETROFIT_EXIT_LATENT_DIFF) value[i] = sqrt(change / size);
        if (exit == RETROFIT_EXIT_MINP_KL) cut_below(p, V);
        if (exit == RETROFIT_EXIT_KL || exit == RETROFIT_EXIT_MINP_KL) {
            value[i] = 0;
            for (size_t v = 0; v < V; v++) value[i] += q[v] > 0 ? q[v] * log(q[v] / p[v]) : 0;
        }
        if (exit == RETROFIT_EXIT_ARGMAX_STABILITY) {
            int32_t now = retrofit_argmax(z, V);
            same = now == likeliest ? same + 1 : 0, likeliest = now, value[i] = (double)same;
        }
        memcpy(q, p, V * 8);
    }
    free(p), free(q), free(s);
}

static void exits(size_t which) {
    retrofit_model *m = load(which);
    size_t V = m->config.vocab, C = m->config.core, fired[6] = {0}, early[6] = {0}, width = m->config.n_kv_heads * m->config.head_dim;
    static const retrofit_kv_cache kinds[] = {
        {0}, {.kind = RETROFIT_CACHE_SHARED, .M = 4}, {.kind = RETROFIT_CACHE_GROUPED, .M = 2}, {.bf16 = true}};
    retrofit_buffers *pair[4][2], *a, *b;
    for (size_t i = 0; i < 8; i++) pair[i / 2][i % 2] = with_cache(m, 1, kinds[i / 2].kind, kinds[i / 2].M, kinds[i / 2].bf16);
    for (size_t prompt = 0; prompt < PROMPTS; prompt++) {
        int32_t tokens[12 + REST];
        size_t n, R = prompt % 3 ? DEEPEST : any(2, DEEPEST), entry = width * (prompt / 5 % 4 == 3 ? 2 : 4);
        double value[DEEPEST + 1];
        retrofit_recurrence_options how = random_prompt(tokens, &n, V), plain = how;
        a = pair[prompt / 5 % 4][0], b = pair[prompt / 5 % 4][1];
        how.exit = (retrofit_exit)(1 + prompt % 5), how.recurrences = R, plain.recurrences = DEEPEST;
        retrofit_clear_cache(a), retrofit_clear_cache(b);
        feed(a, tokens, 1, n, &plain), feed(b, tokens, 1, n, &plain);
        check(a->decoder->used[0] == DEEPEST, "a prompt stopped early, after %d", (int)a->decoder->used[0]);
        measure(value, b, how.exit, tokens[n], &how);
        bool stable = how.exit == RETROFIT_EXIT_ARGMAX_STABILITY;
        size_t pick = any(1, R), due = 0; // a threshold just beyond what some recurrence has, so that it or an earlier one stops
        double limit = stable ? value[pick] : value[pick] * 1.001;
        how.threshold = (float)limit;
        for (size_t i = 1; i <= R && !due; i++)
            if (i == R || (stable ? value[i] >= limit : value[i] < (double)how.threshold)) due = i;
        bool close = false; // of a threshold only rounding decides about
        for (size_t i = 1; i < DEEPEST && !stable; i++)
            close |= fabs(value[i] - (double)how.threshold) < 1e-4 * (double)how.threshold + 1e-7;
        const float *z = feed(a, tokens + n, 1, 1, &how);
        fired[how.exit]++, early[how.exit] += (size_t)a->decoder->used[0] < R;
        if (!close)
            check((size_t)a->decoder->used[0] == due, "%s, prompt %zu: exit %d at %g stops after %d recurrences, not %zu (there %g, before %g)",
                  models[which], prompt, (int)how.exit, limit, (int)a->decoder->used[0], due, value[due], due > 1 ? value[due - 1] : 0);
        // The logits are those of so many recurrences; the slots not reached hold the last one's entries; the next token, all the way down, reads them.
        plain.recurrences = (size_t)a->decoder->used[0];
        check(!memcmp(z, feed(b, tokens + n, 1, 1, &plain), V * 4), "%s, prompt %zu: exit %d after %d: other logits", models[which], prompt,
              (int)how.exit, (int)a->decoder->used[0]);
        size_t M = b->decoder->cache.M, reached = prompt / 5 % 4 == 1   ? retrofit_min(plain.recurrences, M)
                                         : prompt / 5 % 4 == 2 ? (plain.recurrences - 1) / M + 1
                                                               : plain.recurrences;
        for (size_t i = reached; m->config.prelude + i * C + m->config.coda < b->decoder->slots; i++)
            for (size_t j = 0; j < C; j++)
                for (int values = 0; values < 2; values++) {
                    char *layer = (char *)(values ? b->decoder->values : b->decoder->keys) + ((m->config.prelude + j) * 32 + n) * entry;
                    memcpy(layer + i * C * 32 * entry, layer + (reached - 1) * C * 32 * entry, entry);
                }
        plain.recurrences = DEEPEST;
        z = feed(a, tokens + n + 1, 1, 1, &plain);
        check(!memcmp(z, feed(b, tokens + n + 1, 1, 1, &plain), V * 4), "%s, prompt %zu: exit %d: the token behind reads something else",
              models[which], prompt, (int)how.exit);
    }
    for (int exit = 1; exit < 6; exit++)
        check(early[exit] > fired[exit] / 3, "%s: exit %d stopped %zu of %zu tokens early", models[which], exit, early[exit], fired[exit]);
    // The authors' thresholds are the defaults.
    a = pair[0][0];
    static const float usual[] = {0, 1e-3f, 0.03f, 5e-4f, 1e-6f, 5};
    for (int exit = 1; exit < 6; exit++)
        for (int i = 0; i < 20; i++) {
            int32_t tokens[12 + REST], used[2];
            size_t n;
            retrofit_recurrence_options how = random_prompt(tokens, &n, V);
            how.recurrences = DEEPEST, how.exit = (retrofit_exit)exit;
            for (int named = 0; named < 2; named++) {
                how.threshold = named ? usual[exit] : -1;
                retrofit_clear_cache(a), feed(a, tokens, 1, n, &how), feed(a, tokens + n, 1, 1, &how), used[named] = a->decoder->used[0];
            }
            check(used[0] == used[1], "exit %d: %d recurrences by default, %d at %g", exit, (int)used[0], (int)used[1],
                  (double)usual[exit]);
        }
    for (size_t i = 0; i < 8; i++) retrofit_buffers_free(pair[i / 2][i % 2]);
    retrofit_free(m);
}

// The thresholds of the criteria that compare distributions: a tenth below stops, a tenth above does not.
static void thresholds(void) {
    enum { V = 8 };
    static const float z[V] = {1.2f, 0.4f, -0.7f, 0.9f, 0.1f, -3, -4, 1.6f};
    static const double limit[] = {0, 1e-3, 0, 5e-4, 1e-6};
    for (int exit = 1; exit < 5; exit++)
        for (int above = 0; above < 2 && exit != RETROFIT_EXIT_LATENT_DIFF; above++) {
            float next[V];
            double p[V], q[V], was[V] = {0}, low = 0, high = 1, target = limit[exit] * (above ? 1.1 : 0.9);
            for (int i = 0; i < 60; i++) { // a step of the logits that changes so much
                double value = 0, step = (low + high) / 2;
                for (int v = 0; v < V; v++) next[v] = z[v] + (float)((v % 3 - 1) * step);
                probabilities(q, z, V), probabilities(p, next, V);
                if (exit == RETROFIT_EXIT_MINP_KL) cut_below(q, V), cut_below(p, V);
                for (int v = 0; v < V; v++) value += q[v] * log(q[v] / p[v]);
                if (exit == RETROFIT_EXIT_ENTROPY_DIFF) value = fabs(entropy_of(p, V) - entropy_of(q, V));
                *(value < target ? &low : &high) = step;
            }
            retrofit_recurrence_options how = {.exit = (retrofit_exit)exit, .threshold = -1};
            check(!should_exit(&how, 1, z, V, was) && should_exit(&how, 2, next, V, was) == !above, "exit %d: %g %s", exit, target,
                  above ? "stops" : "does not stop");
        }
}

// Rows of a batch that stop at different times think what they think alone. With slots that are written more than once that would not hold.
static void exits_together(size_t which) {
    retrofit_model *m = load(which);
    enum { B = 4 };
    size_t V = m->config.vocab, apart = 0;
    retrofit_buffers *a = with_cache(m, B, RETROFIT_CACHE_FULL, 0, false), *shared = with_cache(m, B, RETROFIT_CACHE_SHARED, 2, false);
    int32_t tokens[B][6], together[B * 6];
    for (int round = 0; round < 40; round++) {
        retrofit_recurrence_options how = {.recurrences = DEEPEST,
                                 .exit = (retrofit_exit)(1 + round % 5),
                                 .threshold = round % 5 == 4 ? 1 : 0.05f,
                                 .continuous = round % 3 == 0};
        float *alone = (float *)retrofit_allocate(6 * B * V, 4); // start state 0: rows are alike
        int32_t used[6][B];
        for (size_t b = 0; b < B; b++) {
            retrofit_clear_cache(a);
            for (int i = 0; i < 6; i++) {
                tokens[b][i] = (int32_t)any(0, V - 1);
                memcpy(alone + ((size_t)i * B + b) * V, feed(a, &tokens[b][i], 1, 1, &how), V * 4), used[i][b] = a->decoder->used[0];
            }
        }
        retrofit_clear_cache(a);
        for (size_t i = 0; i < 6; i++) {
            for (size_t b = 0; b < B; b++) together[b] = tokens[b][i], apart += used[i][b] != used[i][0];
            const float *z = feed(a, together, B, 1, &how);
            for (size_t b = 0; b < B; b++)
                check(!memcmp(z + b * V, alone + (i * B + b) * V, V * 4) && a->decoder->used[b] == used[i][b],
                      "%s, exit %d: row %zu of a batch thinks %d, alone %d recurrences", models[which], (int)how.exit, b, (int)a->decoder->used[b],
                      (int)used[i][b]);
        }
        check(!retrofit_next_logits(shared, together, B, 1, NULL, &how) && strstr(retrofit_error(), "full KV cache"),
              "exits of a batch with shared slots are accepted");
        free(alone);
    }
    check(apart > 50, "%s: the rows stopped at the same times: nothing was tested", models[which]);
    retrofit_buffers_free(a), retrofit_buffers_free(shared), retrofit_free(m);
}

// ---- Caches that hold less: which recurrence's entries a later token meets ------------------------------------------------------------
static void caches(size_t which) {
    retrofit_model *m = load(which);
    size_t V = m->config.vocab, P = m->config.prelude, C = m->config.core, D = m->config.coda,
           width = m->config.n_kv_heads * m->config.head_dim;
    static const struct { retrofit_cache_kind kind; size_t M, slots;
    } kinds[] = {{RETROFIT_CACHE_FULL, 0, DEEPEST},     {RETROFIT_CACHE_SHARED, 1, 1},  {RETROFIT_CACHE_SHARED, 4, 4},
                 {RETROFIT_CACHE_SHARED, 100, DEEPEST}, {RETROFIT_CACHE_GROUPED, 2, 5}, {RETROFIT_CACHE_GROUPED, 4, 3},
                 {RETROFIT_CACHE_GROUPED, 100, 1}};
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        retrofit_buffers *a = with_cache(m, 1, kinds[k].kind, kinds[k].M, false),
                             *full = with_cache(m, 1, RETROFIT_CACHE_FULL, 0, false),
                             *half = with_cache(m, 1, kinds[k].kind, kinds[k].M, true);
        check(a->decoder->slots == P + kinds[k].slots * C + D, "kind %d of %zu: %zu slots", (int)kinds[k].kind, kinds[k].M, a->decoder->slots);
        check(retrofit_cache_bytes(a) == 2 * a->decoder->slots * width * 4 && retrofit_cache_bytes(half) == 2 * a->decoder->slots * width * 2,
              "bytes per token: %zu", retrofit_cache_bytes(a));
        int32_t tokens[12 + REST];
        size_t n;
        retrofit_recurrence_options how = random_prompt(tokens, &n, V);
        how.recurrences = DEEPEST;
        // One token alone attends to itself only: the same in every cache. What it leaves in slot s is the newest recurrence's that belongs there.
        const float *z = feed(a, tokens, 1, 1, &how);
        check(!memcmp(z, feed(full, tokens, 1, 1, &how), V * 4), "a first token differs, kind %d of %zu", (int)kinds[k].kind, kinds[k].M);
        for (size_t s = 0; s < kinds[k].slots; s++) {
            size_t newest = s;
            for (size_t i = 0; i < DEEPEST; i++)
                if (kinds[k].kind == RETROFIT_CACHE_SHARED    ? i % kinds[k].M == s
                    : kinds[k].kind == RETROFIT_CACHE_GROUPED ? i / kinds[k].M == s
                                                              : i == s)
                    newest = i;
            for (size_t j = 0; j < C; j++)
                check(!memcmp((float *)a->decoder->keys + (P + s * C + j) * 32 * width, (float *)full->decoder->keys + (P + newest * C + j) * 32 * width,
                              width * 4) &&
                          !memcmp((float *)a->decoder->values + (P + s * C + j) * 32 * width,
                                  (float *)full->decoder->values + (P + newest * C + j) * 32 * width, width * 4),
                      "kind %d of %zu: slot %zu does not hold recurrence %zu", (int)kinds[k].kind, kinds[k].M, s, newest);
        }
        // In bf16 the first layer's, which depend on no other's, are the same rounded; and the rest feels it.
        retrofit_clear_cache(a);
        double apart = relative_error(feed(half, tokens, 1, n, &how), feed(a, tokens, 1, n, &how), V);
        check(apart > 0, "kind %d of %zu: keys and values in bf16 change nothing", (int)kinds[k].kind, kinds[k].M);
        for (size_t i = 0; i < n * width; i++)
            check(((uint16_t *)half->decoder->keys)[i] == retrofit_float_to_bf16(((float *)a->decoder->keys)[i]) &&
                      ((uint16_t *)half->decoder->values)[i] == retrofit_float_to_bf16(((float *)a->decoder->values)[i]),
                  "key or value %zu is not the same in bf16", i);
        retrofit_buffers_free(a), retrofit_buffers_free(full), retrofit_buffers_free(half);
    }
    for (int kind = RETROFIT_CACHE_SHARED; kind <= RETROFIT_CACHE_GROUPED; kind++)
        check(!retrofit_buffers_new(m, 1, 4, 0, RETROFIT_KEEP_NOTHING, &(retrofit_kv_cache){8, 4, (retrofit_cache_kind)kind, 0, false}),
              "a cache without slots");
    retrofit_free(m);
}

// ---- Self-speculation -------------------------------------------------------------------------------------------------------------------
static void speculation(size_t which) {
    retrofit_model *m = load(which);
    size_t V = m->config.vocab, kept = 0, drafted = 0;
    retrofit_buffers *a = with_cache(m, 1, RETROFIT_CACHE_FULL, 0, false), *plain = with_cache(m, 1, RETROFIT_CACHE_FULL, 0, false);
    float *scratch = (float *)retrofit_allocate((2 * RETROFIT_LOOKAHEAD + 2) * V, 4);
    for (size_t prompt = 0; prompt < PROMPTS; prompt++) {
        int32_t tokens[12 + REST], text[64], out[RETROFIT_LOOKAHEAD];
        size_t n, L = any(1, 8), made = 0, wanted = 0,
                  fed = 0; // up to 8 rows a product's rows don't depend on each other, so even bits are equal
        retrofit_recurrence_options how = random_prompt(tokens, &n, V);
        how.recurrences++;
        size_t draft = prompt % 2 ? any(1, how.recurrences - 1) : how.recurrences - 1;
        retrofit_sampling greedy = {0, 0, 1, 0, 1};
        retrofit_clear_cache(a), retrofit_clear_cache(plain);
        text[0] = retrofit_argmax(feed(plain, tokens, 1, n, &how), V);
        int32_t next = retrofit_argmax(feed(a, tokens, 1, n, &how), V);
        check(next == text[0], "first token");
        while (n + wanted < 31) wanted++, text[wanted] = retrofit_argmax(feed(plain, &text[wanted - 1], 1, 1, &how), V);
        while (made < wanted && n + made + L <= 32) {
            size_t count = retrofit_speculate(a, next, draft, L, &how, &greedy, V, out, scratch);
            need(count > 0 && count <= L, "speculate");
            for (size_t i = 0; i < count && made < wanted; i++)
                made++, check(out[i] == text[made], "%s, prompt %zu, draft %zu of %zu, %zu ahead: token %zu is %d, plainly %d",
                              models[which], prompt, draft, how.recurrences, L, made, (int)out[i], (int)text[made]);
            kept += count - 1, drafted += L, next = out[count - 1];
            fed += count, check((size_t)a->decoder->seen[0] == n + fed && a->decoder->used[0] == (int32_t)how.recurrences, "the cache holds %d tokens of %zu",
                                (int)a->decoder->seen[0], n + fed);
        }
        // What is in the cache now is what plain decoding has there: the next logits are the same to the bit.
        if (n + made < 31 && made < wanted) {
            size_t at = (size_t)a->decoder->seen[0];
            plain->decoder->seen[0] = (int32_t)at;
            const float *z = feed(a, &next, 1, 1, &how);
            check(!memcmp(z, feed(plain, &next, 1, 1, &how), V * 4), "%s, prompt %zu: the cache is another one after drafts", models[which],
                  prompt);
        }
    }
    check(4 * kept > PROMPTS, "%s: of %zu drafted tokens only %zu were kept: little was tested", models[which], drafted, kept);
    printf("%s: %zu of %zu drafted tokens kept\n", models[which], kept, drafted);
    // refusals
    int32_t out[RETROFIT_LOOKAHEAD + 1];
    retrofit_sampling s = {0, 0, 1, 0, 1};
    retrofit_recurrence_options how = {.recurrences = 4}, exit = {.recurrences = 4, .exit = RETROFIT_EXIT_KL}, noise = {.recurrences = 4, .noise = 1},
                      goes_on = {.recurrences = 4, .continuous = true};
    retrofit_buffers *shared = with_cache(m, 1, RETROFIT_CACHE_SHARED, 2, false);
    retrofit_clear_cache(a);
    check(!retrofit_speculate(a, 1, 4, 2, &how, &s, V, out, scratch) && !retrofit_speculate(a, 1, 0, 2, &how, &s, V, out, scratch),
          "a draft as deep as the whole, or of nothing");
    check(!retrofit_speculate(a, 1, 2, 0, &how, &s, V, out, scratch) && !retrofit_speculate(a, 1, 2, 13, &how, &s, V, out, scratch),
          "no lookahead, or too much");
    check(!retrofit_speculate(a, 1, 2, 2, &exit, &s, V, out, scratch) && !retrofit_speculate(a, 1, 2, 2, &noise, &s, V, out, scratch) &&
              !retrofit_speculate(a, 1, 2, 2, &goes_on, &s, V, out, scratch) &&
              !retrofit_speculate(shared, 1, 2, 2, &how, &s, V, out, scratch),
          "drafts with what does not go with them");
    a->decoder->seen[0] = 31;
    check(!retrofit_speculate(a, 1, 2, 2, &how, &s, V, out, scratch) && a->decoder->seen[0] == 31, "more drafts than the context holds");
    free(scratch), retrofit_buffers_free(a), retrofit_buffers_free(plain), retrofit_buffers_free(shared), retrofit_free(m);
}

// The rule's outcome has the whole depth's distribution, whatever the draft's: against p by χ², five deviations and what its tail is longer than a normal one.
static void acceptance(void) {
    enum { V = 9, DRAWS = 60000 };
    for (int round = 0; round < 60; round++) {
        float shallow[V], deep[V], q[V];
        candidate c[V];
        double p[V], total, chi = 0, freedom = -1;
        size_t count[V] = {0}, n, strays = 0;
        retrofit_sampling s = {round % 3 ? 1 : 0.6f, round % 4 == 1 ? 4 : 0, round % 5 == 2 ? 0.8f : 1, round % 7 == 3 ? 0.2f : 0,
                               (uint64_t)round};
        for (int v = 0; v < V; v++) shallow[v] = (float)any(0, 30) / 10, deep[v] = round % 6 ? (float)any(0, 30) / 10 : shallow[v];
        n = apply_filters(deep, V, &s, c, &total), memset(p, 0, sizeof p);
        for (size_t i = 0; i < n; i++) p[c[i].id] = (double)c[i].p / total;
        n = apply_filters(shallow, V, &s, c, &total), memset(q, 0, sizeof q);
        for (size_t i = 0; i < n; i++) q[c[i].id] = (float)(c[i].p / total);
        for (size_t i = 0; i < DRAWS; i++) {
            candidate d[V];
            int32_t y = draw_filtered(shallow, V, &s, d, &n, &total);
            count[accept_or_resample(y, q, deep, V, &s, d)]++;
        }
        for (size_t v = 0; v < V; v++)
            if (p[v] == 0) strays += count[v];
            else freedom++, chi += ((double)count[v] - DRAWS * p[v]) * ((double)count[v] - DRAWS * p[v]) / (DRAWS * p[v]);
        check(strays == 0 && chi < freedom + 5 * sqrt(2 * freedom) + 10, "round %d: χ² %.1f with %g degrees of freedom, %zu strays", round,
              chi, freedom, strays);
    }
}

// Sampled text through drafts: pairs of tokens behind a prompt as often as plain decoding's probabilities say.
static void sampled_drafts(void) {
    retrofit_model *m = load(0);
    enum { ROUNDS = 12000 };
    size_t V = m->config.vocab, tops = 0;
    retrofit_buffers *a = with_cache(m, 1, RETROFIT_CACHE_FULL, 0, false);
    float *scratch = (float *)retrofit_allocate((2 * RETROFIT_LOOKAHEAD + 2) * V, 4);
    double *first = (double *)retrofit_allocate(V, 8), *second = (double *)retrofit_allocate(V * V, 8), chi = 0;
    retrofit_recurrence_options how = {.recurrences = 4};
    retrofit_sampling s = {0.5f, 4, 1, 0, 5};
    int32_t prompt[] = {5, 77, 31}, token = 9, out[RETROFIT_LOOKAHEAD];
    size_t *count = (size_t *)retrofit_allocate(V * V, sizeof *count), freedom = 0;
    feed(a, prompt, 1, 3, &how);
    double total;
    candidate *c = (candidate *)(void *)scratch;
    size_t n = apply_filters(feed(a, &token, 1, 1, &how), V, &s, c, &total);
    for (size_t i = 0; i < n; i++) first[c[i].id] = (double)c[i].p / total;
    for (size_t v = 0; v < V; v++) {
        int32_t id = (int32_t)v;
        if (first[v] == 0) continue;
        a->decoder->seen[0] = 4, n = apply_filters(feed(a, &id, 1, 1, &how), V, &s, c, &total), tops++;
        for (size_t i = 0; i < n; i++) second[v * V + (size_t)c[i].id] = first[v] * (double)c[i].p / total;
    }
    for (int i = 0; i < ROUNDS; i++) {
        int32_t pair[2];
        size_t have = 0;
        a->decoder->seen[0] = 3;
        for (int32_t next = token; have < 2; next = pair[have - 1]) {
            size_t got = retrofit_speculate(a, next, 1 + (size_t)i % 3, 1 + (size_t)i % 4, &how, &s, V, out, scratch);
            need(got > 0, "speculate");
            for (size_t j = 0; j < got && have < 2; j++) pair[have++] = out[j];
        }
        count[(size_t)pair[0] * V + (size_t)pair[1]]++;
    }
    for (size_t v = 0; v < V * V; v++) {
        if (second[v] == 0) check(count[v] == 0, "a pair that cannot be came %zu times", count[v]);
        else freedom++, chi += ((double)count[v] - ROUNDS * second[v]) * ((double)count[v] - ROUNDS * second[v]) / (ROUNDS * second[v]);
    }
    check(tops == 4 && chi < (double)freedom + 5 * sqrt(2 * (double)freedom),
          "pairs of drafted tokens: χ² %.1f with %zu degrees of freedom", chi, freedom);
    free(scratch), free(first), free(second), free(count), retrofit_buffers_free(a), retrofit_free(m);
}

// ---- Continuous thinking: the state goes on from token to token ---------------------------------------------------------------------
static void continuous(size_t which) {
    retrofit_model *m = load(which);
    size_t V = m->config.vocab, d = m->config.n_embd;
    retrofit_buffers *a = with_cache(m, 2, RETROFIT_CACHE_FULL, 0, false), *b = with_cache(m, 2, RETROFIT_CACHE_FULL, 0, false);
    float *state = (float *)retrofit_allocate(2 * d, 4), *z = (float *)retrofit_allocate(2 * V, 4);
    for (int round = 0; round < 30; round++) {
        int32_t tokens[2][8], some[16], lengths[2] = {(int32_t)any(1, 5), 5};
        for (size_t i = 0; i < 16; i++) tokens[i / 8][i % 8] = (int32_t)any(0, V - 1);
        for (size_t i = 0; i < 10; i++) some[i] = tokens[i / 5][i % 5];
        retrofit_recurrence_options how = {.recurrences = any(1, DEEPEST), .sigma = 0.3f, .seed = 5, .continuous = true}, plain = how;
        plain.continuous = false;
        retrofit_clear_cache(a), retrofit_clear_cache(b);
        need(retrofit_next_logits(a, some, 2, 5, lengths, &how) && retrofit_next_logits(b, some, 2, 5, lengths, &plain), "prompts");
        check(!memcmp(a->decoder->next, b->decoder->next, 2 * V * 4), "%s: a prompt's logits differ", models[which]); // it starts from s_0 as ever
        for (size_t row = 0; row < 2; row++) memcpy(state + row * d, b->state + (row * 5 + (size_t)lengths[row] - 1) * d, d * 4);
        for (size_t i = 5; i < 8; i++) { // by hand: prelude, the state put in place, the loop, the coda
            some[0] = tokens[0][i], some[1] = tokens[1][i];
            const float *got = feed(a, some, 2, 1, &how);
            need(set_batch(b, some, 2, 1), "batch");
            m->ops->upload(b->past, b->decoder->seen, 2 * 4);
            prelude_forward(b), memcpy(b->state, state, 2 * d * 4), retrofit_recur(b, how.recurrences, 0), retrofit_coda(b),
                retrofit_logits(b, 0, 2, z);
            memcpy(state, b->state, 2 * d * 4), b->decoder->seen[0]++, b->decoder->seen[1]++;
            check(!memcmp(got, z, 2 * V * 4), "%s: token %zu does not start from the last state", models[which], i);
        }
    }
    retrofit_clear_cache(a), retrofit_clear_cache(b); // forgets
    int32_t some[] = {3, 9};
    retrofit_recurrence_options how = {.recurrences = 2, .sigma = 0.3f, .seed = 5, .continuous = true},
                      plain = {.recurrences = 2, .sigma = 0.3f, .seed = 5};
    check(!memcmp(feed(a, some, 1, 1, &how), feed(b, some, 1, 1, &plain), V * 4), "%s: a first token does not start from s_0",
          models[which]);
    check(!memcmp(feed(a, some, 2, 1, &how), feed(b, some, 2, 1, &plain), 2 * V * 4), "%s: a row more does not start from s_0",
          models[which]);
    check(!memcmp(feed(a, some, 1, 2, &how), feed(b, some, 1, 2, &plain), V * 4), "%s: two tokens at a time do not start from s_0",
          models[which]);
    free(state), free(z), retrofit_buffers_free(a), retrofit_buffers_free(b), retrofit_free(m);
}

// ---- Noise: the formula of each kind, by hand; the same seed the same noise, cached or not ------------------------------------------------
static void noise(size_t which) {
    retrofit_model *m = load(which);
    size_t V = m->config.vocab, d = m->config.n_embd, n = 6;
    retrofit_buffers *a = retrofit_buffers_new(m, 1, n, 0, RETROFIT_KEEP_NOTHING, NULL),
                         *b = retrofit_buffers_new(m, 1, n, 0, RETROFIT_KEEP_NOTHING, NULL);
    retrofit_buffers *cached = with_cache(m, 1, RETROFIT_CACHE_FULL, 0, false);
    need(a && b, "activations");
    float *z = (float *)retrofit_allocate(V, 4), *noisy = (float *)retrofit_allocate(n * d, 4);
    int32_t tokens[] = {1, 5, 9, 90, 3, 8};
    for (int kind = RETROFIT_NOISE_FIXED; kind <= RETROFIT_NOISE_CHI; kind++) {
        retrofit_recurrence_options how = {.recurrences = 4, .sigma = 0.3f, .seed = 9, .noise = 20, .noise_kind = (retrofit_noise)kind};
        double y = 20 * RETROFIT_STATE_STD, sizes[5] = {0};
        need(retrofit_prelude(a, tokens, 1, n) && retrofit_prelude(b, tokens, 1, n), "prelude");
        retrofit_init_state(a, how.sigma, how.seed), retrofit_init_state(b, how.sigma, how.seed);
        for (size_t i = 1; i <= 4; i++) {
            double x = kind == RETROFIT_NOISE_GEOM   ? y / (double)i
                       : kind == RETROFIT_NOISE_SQRT ? y / sqrt((double)i)
                       : kind == RETROFIT_NOISE_LINE ? fmax(y, 1 - (double)(i - 1) / 4)
                                                     : y;
            // what is added is x·z, z cut at three deviations: found by taking the rest away
            memcpy(noisy, a->state, n * d * 4);
            add_noise(a, &how);
            double squares = 0, largest_z = 0;
            if (kind == RETROFIT_NOISE_CHI) continue;
            for (size_t c = 0; c < n * d; c++) {
                double zc = ((double)a->state[c] - (1 - x) * noisy[c]) / x;
                squares += zc * zc, largest_z = fmax(largest_z, fabs(zc));
            }
            sizes[i] = squares / (double)(n * d);
            check(largest_z < 3.01 && fabs(sizes[i] - 0.973) < 10 / sqrt((double)(n * d)),
                  "%s, noise %d, recurrence %zu: z has a mean square of %g, at most %g", models[which], kind, i, sizes[i], largest_z);
            memcpy(a->state, noisy, n * d * 4), a->n = i; // the next one's
        }
        retrofit_recur_noisy(b, &how, 4); // the noise comes before the recurrence
        for (retrofit_init_state(a, how.sigma, how.seed), a->n = 0; a->n < 4;) add_noise(a, &how), retrofit_recur(a, 1, 0);
        check(!memcmp(a->state, b->state, n * d * 4), "%s: noise %d is not before each recurrence", models[which], kind);
        retrofit_coda(b), retrofit_logits(b, n - 1, 1, z);
        if (kind == RETROFIT_NOISE_CHI) continue; // its strength is drawn anew for every pass
        retrofit_clear_cache(cached);
        for (size_t i = 0; i + 1 < n; i++) feed(cached, tokens + i, 1, 1, &how);
        double apart = relative_error(feed(cached, tokens + n - 1, 1, 1, &how), z, V);
        check(apart < 1e-5, "%s: noise %d: cached %.2e off the full pass", models[which], kind, apart);
        retrofit_recurrence_options never = how; // the prompt as a whole, and behind it an exit that never fires
        never.exit = RETROFIT_EXIT_KL, never.threshold = 0;
        retrofit_clear_cache(cached), feed(cached, tokens, 1, n - 1, &how);
        apart = relative_error(feed(cached, tokens + n - 1, 1, 1, &never), z, V);
        check(apart < 1e-5, "%s: noise %d: a prompt or an exit is %.2e off the full pass", models[which], kind, apart);
        how.noise = 0, retrofit_clear_cache(cached);
        for (size_t i = 0; i + 1 < n; i++) feed(cached, tokens + i, 1, 1, &how);
        check(relative_error(feed(cached, tokens + n - 1, 1, 1, &how), z, V) > 1e-4, "%s: noise %d changes nothing", models[which], kind);
    }
    free(z), free(noisy), retrofit_buffers_free(a), retrofit_buffers_free(b), retrofit_buffers_free(cached), retrofit_free(m);
}

// Every recurrence and seed has a z of its own; CHI a strength of its own at every position, twice a uniform one.
static void noise_draws(void) {
    retrofit_model *m = load(0);
    size_t d = m->config.n_embd;
    retrofit_buffers *a = with_cache(m, 1, RETROFIT_CACHE_FULL, 0, false);
    float *z = (float *)retrofit_allocate(5 * d, 4);
    retrofit_recurrence_options how = {.recurrences = 4, .seed = 9, .noise = 20};
    int32_t token = 1;
    need(set_batch(a, &token, 1, 1), "batch");
    for (size_t i = 0; i < 5; i++) { // start state, two recurrences, another seed, the first recurrence again
        retrofit_init_state(a, i ? 0 : 20 * m->config.state_std, 9);
        a->n = i == 2, how.seed = i == 3 ? 8 : 9;
        if (i) add_noise(a, &how);
        memcpy(z + i * d, a->state, d * 4);
        for (size_t j = 0; j < i && i < 4; j++) {
            double along = 0, size = 0;
            for (size_t c = 0; c < d; c++) along += (double)z[i * d + c] * z[j * d + c], size += (double)z[j * d + c] * z[j * d + c];
            check(fabs(along) < 0.8 * size, "noise %zu is noise %zu: %g of it", i, j, along / size);
        }
    }
    check(!memcmp(z + d, z + 4 * d, d * 4), "the same seed and recurrence have another noise");
    double sum = 0, least_u = 2, most_u = 0;
    how.noise_kind = RETROFIT_NOISE_CHI;
    for (a->decoder->seen[0] = 0; a->decoder->seen[0] < 32; a->decoder->seen[0]++) {
        double size = 0;
        retrofit_init_state(a, 0, 9), a->n = 0, add_noise(a, &how);
        for (size_t c = 0; c < d; c++) size += (double)a->state[c] * a->state[c] / (double)d;
        double u = sqrt(size) / (20 * (double)m->config.state_std);
        sum += u / 32, least_u = fmin(least_u, u), most_u = fmax(most_u, u);
    }
    check(fabs(sum - 1) < 0.4 && least_u < 0.5 && most_u > 1.5, "chi noise: strengths from %g to %g, %g on average", least_u, most_u, sum);
    free(z), retrofit_buffers_free(a), retrofit_free(m);
}

// A plain Llama has no recurrence to stop, whatever it is asked.
static void plain_model(void) {
    retrofit_model *m = retrofit_load(FIXTURES "tiny/base", &retrofit_cpu, RETROFIT_INFERENCE);
    need(m != NULL, "a plain model");
    retrofit_buffers *a = with_cache(m, 1, RETROFIT_CACHE_FULL, 0, false), *b = with_cache(m, 1, RETROFIT_CACHE_FULL, 0, false);
    retrofit_recurrence_options how = {.recurrences = 3, .exit = RETROFIT_EXIT_KL, .threshold = -1, .continuous = true, .noise = 1}, none = {0};
    for (int32_t token = 1; token < 9; token++)
        check(!memcmp(feed(a, &token, 1, 1, &how), feed(b, &token, 1, 1, &none), m->config.vocab * 4) && a->decoder->used[0] == 0,
              "a plain model thinks %d recurrences", (int)a->decoder->used[0]);
    retrofit_buffers_free(a), retrofit_buffers_free(b), retrofit_free(m);
}

int main(void) {
    for (size_t which = 0; which < MODELS; which++)
        equal_to_plain(which), exits(which), exits_together(which), caches(which), speculation(which), continuous(which), noise(which);
    thresholds(), noise_draws(), plain_model(), acceptance(), sampled_drafts();
    return finish("thinking");
}

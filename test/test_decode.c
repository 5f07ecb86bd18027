// Decoding with the KV cache against the full forward pass, position by position, and sampling against what the filters are to keep.
#include "test.h"

// A token sequence of one's own for every row.
static int32_t nth(size_t row, size_t i, size_t V) { return (int32_t)(retrofit_hash(row + 1, i) % V); }

static retrofit_buffers *with_cache(const retrofit_model *m, size_t B, size_t T, size_t capacity, size_t r) {
    retrofit_buffers *a =
        retrofit_buffers_new(m, B, T, 0, RETROFIT_KEEP_NOTHING, &(retrofit_kv_cache){.capacity = capacity, .recurrences = r});
    need(a != NULL, "activations with a cache");
    return a;
}

// Logits (B,L,V) of every row's sequence by the full forward pass, without a cache: what decoding has to agree with.
static float *full(const retrofit_model *m, size_t B, size_t L, size_t r, float sigma, uint64_t seed) {
    size_t V = m->config.vocab;
    int32_t *tokens = (int32_t *)retrofit_allocate(B * L, 4);
    float *logits = (float *)retrofit_allocate(B * L * V, 4);
    for (size_t i = 0; i < B * L; i++) tokens[i] = nth(i / L, i % L, V);
    retrofit_buffers *a = retrofit_buffers_new(m, 1, L, 0, RETROFIT_KEEP_NOTHING, NULL);
    for (size_t row = 0; row < B; row++) { // one by one: a row's start state does not depend on the others
        need(a && retrofit_forward(a, tokens + row * L, 1, L, sigma, seed, r, 0), "full forward");
        retrofit_logits(a, 0, L, logits + row * L * V);
    }
    retrofit_buffers_free(a), free(tokens);
    return logits;
}

// Decoding of several rows: `seen` counts what each has been fed so far.
typedef struct {
    const char *name;
    retrofit_buffers *a;
    size_t B, L, r, seen[4];
    float sigma;
    uint64_t seed;
    const float *full;
    double worst;
} decoding;

// Feeds row i its next lengths[i] tokens (t of them if NULL), padded to t with `padding`, and compares the logits with the full pass's.
static const float *feed(decoding *x, size_t b, size_t t, const int32_t *lengths, int32_t padding) {
    int32_t tokens[512];
    size_t V = x->a->model->config.vocab;
    need(b * t <= 512, "room for the tokens");
    for (size_t i = 0; i < b * t; i++)
        tokens[i] = lengths && i % t >= (size_t)lengths[i / t] ? padding : nth(i / t, x->seen[i / t] + i % t, V);
    const float *logits =
        retrofit_next_logits(x->a, tokens, b, t, lengths, &(retrofit_recurrence_options){.recurrences = x->r, .sigma = x->sigma, .seed = x->seed});
    need(logits != NULL, x->name);
    for (size_t i = 0; i < b; i++) {
        x->seen[i] += lengths ? (size_t)lengths[i] : t;
        double e = relative_error(logits + i * V, x->full + (i * x->L + x->seen[i] - 1) * V, V);
        check(e < 1e-5, "%s r %zu sigma %g: row %zu of %zu after %zu tokens, %zu at a time: logits %.2e off", x->name, x->r,
              (double)x->sigma, i, b, x->seen[i], t, e);
        if (e > x->worst) x->worst = e;
    }
    return logits;
}

static void start_again(decoding *x) { retrofit_clear_cache(x->a), memset(x->seen, 0, sizeof x->seen); }

static void decode(const char *name, size_t L) {
    char path[256];
    snprintf(path, sizeof path, FIXTURES "%s", name);
    retrofit_model *m = retrofit_load(path, &retrofit_cpu, RETROFIT_INFERENCE);
    need(m != NULL, path);
    size_t V = m->config.vocab;
    bool plain = retrofit_is_plain(&m->config);
    double worst = 0;
    for (size_t r = 1; r <= (plain ? 1 : 4); r++)
        for (int random = 0; random < (plain ? 1 : 2); random++) {
            // a larger σ than the models', so that the start state matters beyond the tolerance
            decoding x = {.name = name, .B = 3, .L = L, .r = r, .sigma = random ? 0.5f : 0, .seed = 42};
            float *logits = full(m, x.B, L, r, x.sigma, x.seed), *kept = (float *)retrofit_allocate(2 * x.B * V, 4);
            x.full = logits, x.a = with_cache(m, x.B, L > 40 ? 100 : 16, L, 4); // room for more recurrences than are asked for
            // a prompt, a second piece of it, then token by token; and when the context is full, no more
            size_t prompt = L > 40 ? 97 : 7;
            feed(&x, 1, prompt, NULL, 0), feed(&x, 1, 4, NULL, 0);
            while (x.seen[0] < L) feed(&x, 1, 1, NULL, 0);
            check(!retrofit_next_logits(x.a, (int32_t[]){0}, 1, 1, NULL, &(retrofit_recurrence_options){.recurrences = r}) &&
                      strstr(retrofit_error(), "context"),
                  "%s: a token too many: %s", name, retrofit_error());
            // one by one from the start
            start_again(&x);
            for (size_t i = 0; i < 9; i++) feed(&x, 1, 1, NULL, 0);
            // rows of different lengths together; what pads them must leave no trace, so different paddings give the same bits
            for (int padding = 0; padding < 2; padding++) {
                int32_t pad = padding ? (int32_t)V - 1 : 3;
                start_again(&x);
                feed(&x, 3, 9, (int32_t[]){5, 9, 1}, pad), feed(&x, 3, 3, (int32_t[]){3, 1, 2}, pad),
                    feed(&x, 3, 4, (int32_t[]){1, 2, 4}, pad);
                for (int i = 0; i < 3; i++) memcpy(kept + (size_t)padding * 3 * V, feed(&x, 3, 1, NULL, 0), 3 * V * 4);
                feed(&x, 2, 1, NULL, 0), feed(&x, 1, 2, NULL, 0), feed(&x, 3, 1, NULL, 0); // the later rows may pause
            }
            check(!memcmp(kept, kept + 3 * V, 3 * V * 4), "%s r %zu: logits depend on the padding, by %.2e", name, r,
                  relative_error(kept, kept + 3 * V, 3 * V));
            if (x.worst > worst) worst = x.worst;
            retrofit_buffers_free(x.a), free(logits), free(kept);
        }
    printf("%s: %zu positions, logits at most %.1e off\n", name, L, worst);
    retrofit_free(m);
}

// What cannot be decoded is refused in one line, and leaves the cache as it was: the next tokens come out to the last bit as without it.
static void errors(void) {
    retrofit_model *m = retrofit_load(FIXTURES "tiny/recurrent", &retrofit_cpu, RETROFIT_INFERENCE);
    need(m != NULL, "tiny");
    int32_t V = (int32_t)m->config.vocab, tokens[64] = {1, 2, 3};
    retrofit_buffers *a = with_cache(m, 2, 8, 12, 3), *quiet = with_cache(m, 2, 8, 12, 3),
                         *none = retrofit_buffers_new(m, 2, 8, 0, RETROFIT_KEEP_NOTHING, NULL);
    float before[2][256];
    need(V <= 256 && none && retrofit_next_logits(a, tokens, 2, 5, NULL, &(retrofit_recurrence_options){.recurrences = 3}) &&
             retrofit_next_logits(quiet, tokens, 2, 5, NULL, &(retrofit_recurrence_options){.recurrences = 3}),
         "feed");
    for (int i = 0; i < 2; i++) memcpy(before[i], quiet->decoder->next + (size_t)(i * V), (size_t)V * 4);
    const struct {
        const char *what;
        retrofit_buffers *a;
        int32_t token;
        size_t b, t;
        const int32_t *lengths;
        size_t r;
    } cases[] = {{"a batch too wide", a, 0, 3, 1, NULL, 3},
                 {"no rows", a, 0, 0, 1, NULL, 3},
                 {"no tokens", a, 0, 1, 0, NULL, 3},
                 {"more tokens than the buffers hold", a, 0, 1, 9, NULL, 3},
                 {"more tokens than the context has left", a, 0, 2, 8, NULL, 3},
                 {"more recurrences than the cache holds", a, 0, 2, 1, NULL, 4},
                 {"no recurrences", a, 0, 2, 1, NULL, 0},
                 {"so many recurrences that their layers overflow to none", a, 0, 2, 1, NULL, SIZE_MAX / m->config.core + 1},
                 {"a negative token", a, -1, 2, 1, NULL, 3},
                 {"a token of V", a, V, 2, 1, NULL, 3},
                 {"a row of no tokens", a, 0, 2, 2, (const int32_t[]){2, 0}, 3},
                 {"a row of -1 tokens", a, 0, 2, 2, (const int32_t[]){-1, 2}, 3},
                 {"a row longer than the batch", a, 0, 2, 2, (const int32_t[]){2, 3}, 3},
                 {"buffers without a cache", none, 0, 2, 1, NULL, 3}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (size_t j = 0; j < 64; j++) tokens[j] = j == cases[i].b * cases[i].t - 1 ? cases[i].token : 0;
        error_text[0] = 0;
        bool worked = retrofit_next_logits(cases[i].a, tokens, cases[i].b, cases[i].t, cases[i].lengths,
                                    &(retrofit_recurrence_options){.recurrences = cases[i].r}) != NULL;
        check(!worked && *retrofit_error() && !strchr(retrofit_error(), '\n'), "%s: %s, error \"%s\"", cases[i].what,
              worked ? "accepted" : "refused", retrofit_error());
    }
    tokens[0] = 7, tokens[1] = 9;
    need(retrofit_next_logits(a, tokens, 2, 1, NULL, &(retrofit_recurrence_options){.recurrences = 2}) &&
             retrofit_next_logits(quiet, tokens, 2, 1, NULL, &(retrofit_recurrence_options){.recurrences = 2}),
         "feed");
    check(!memcmp(a->decoder->next, quiet->decoder->next, 2 * (size_t)V * 4), "refused calls left a trace of %.2e in the logits",
          relative_error(a->decoder->next, quiet->decoder->next, 2 * (size_t)V));
    // from the start again the same bits
    for (size_t j = 0; j < 64; j++) tokens[j] = (int32_t[]){1, 2, 3, 0}[j < 3 ? j : 3];
    retrofit_clear_cache(a);
    need(retrofit_next_logits(a, tokens, 2, 5, NULL, &(retrofit_recurrence_options){.recurrences = 3}) != NULL, "feed");
    for (int i = 0; i < 2; i++)
        check(!memcmp(a->decoder->next + (size_t)(i * V), before[i], (size_t)V * 4), "after rewinding, row %d has other logits", i);
    error_text[0] = 0;
    check(!retrofit_buffers_new(m, 1, 8, 0, RETROFIT_KEEP_NOTHING,
                                    &(retrofit_kv_cache){.capacity = m->config.context + 1, .recurrences = 3}) &&
              *retrofit_error(),
          "a cache longer than the model's context");
    check(!retrofit_buffers_new(m, 1, m->config.context + 1, 0, RETROFIT_KEEP_NOTHING, NULL) &&
              !retrofit_buffers_new(m, 0, 8, 0, RETROFIT_KEEP_NOTHING, &(retrofit_kv_cache){.capacity = 8, .recurrences = 1}),
          "no batch that could be");
    retrofit_buffers_free(a), retrofit_buffers_free(quiet), retrofit_buffers_free(none), retrofit_free(m);
}

// ---- Sampling ------------------------------------------------------------------------------------------------------------------
// Probabilities after temperature, top-k, top-p and min-p, in this order, each filter acting on what the one before has kept: the
// definition, with as many loops as it takes. Of equal logits the first ids count as larger.
static void expected(double *p, const float *logits, size_t V, const retrofit_sampling *s) {
    size_t rank[64];
    double sum = 0, top = -INFINITY, kept = 0, most = 0;
    for (size_t v = 0; v < V; v++) top = fmax(top, (double)logits[v]);
    for (size_t v = 0; v < V; v++) p[v] = exp(((double)logits[v] - top) / (double)s->temperature), rank[v] = 0;
    for (size_t v = 0; v < V; v++)
        for (size_t u = 0; u < V; u++) rank[v] += logits[u] > logits[v] || (logits[u] == logits[v] && u < v);
    for (size_t v = 0; v < V; v++) p[v] = s->top_k && rank[v] >= s->top_k ? 0 : p[v], sum += p[v];
    for (size_t place = 0; place < V; place++)
        for (size_t v = 0; v < V; v++)
            if (rank[v] == place) {
                double share = p[v] / sum;
                if (place && s->top_p < 1 && kept >= (double)s->top_p) p[v] = 0; // the ones before it are enough
                kept += share;
            }
    for (size_t v = 0; v < V; v++) most = fmax(most, p[v]);
    sum = 0;
    for (size_t v = 0; v < V; v++) p[v] = p[v] < (double)s->min_p * most ? 0 : p[v], sum += p[v];
    for (size_t v = 0; v < V; v++) p[v] /= sum;
}

static void frequencies(const float *logits, size_t V, retrofit_sampling s, const char *what) {
    enum { DRAWS = 20000 };
    double p[64], chi = 0, freedom = -1;
    size_t count[64] = {0}, strays = 0;
    float copy[64];
    void *scratch = malloc(V * 8); // exactly what the header asks for
    need(scratch && V <= 64, "scratch");
    memcpy(copy, logits, V * 4), expected(p, logits, V, &s);
    for (size_t i = 0; i < DRAWS; i++) {
        int32_t id = retrofit_sample(logits, V, &s, scratch);
        if (id >= 0 && (size_t)id < V) count[id]++;
        else strays++;
    }
    for (size_t v = 0; v < V; v++) {
        if (p[v] == 0) strays += count[v];
        else freedom++, chi += (count[v] - DRAWS * p[v]) * (count[v] - DRAWS * p[v]) / (DRAWS * p[v]);
    }
    // χ² has mean f and deviation √2f: five deviations and a little for small f; the draws are the same in every run
    check(strays == 0, "%s: %zu draws of tokens that the filters take out", what, strays);
    check(chi < freedom + 5 * sqrt(2 * freedom) + 5, "%s: χ² is %.1f with %g degrees of freedom", what, chi, freedom);
    check(!memcmp(copy, logits, V * 4), "%s: the logits were changed", what);
    free(scratch);
}

static void sampling(void) {
    float logits[12], many[40];
    const double p[] = {0.02, 0.3, 0.05, 0.13, 0.02, 0.2, 0.08, 0.01, 0.1, 0.04, 0.03, 0.02};
    for (size_t i = 0; i < 12; i++) logits[i] = (float)log(p[i]) + 3;
    for (size_t i = 0; i < 40; i++) many[i] = (float)(retrofit_hash(9, i) % 5) * 0.5f; // eight or so of each: ties
    const struct {
        const char *what;
        retrofit_sampling s;
    } cases[] = {{"temperature 1", {1, 0, 1, 0, 1}},
                 {"temperature 0.5", {0.5f, 0, 1, 0, 2}},
                 {"temperature 2", {2, 0, 1, 0, 3}},
                 {"top-k 3", {1, 3, 1, 0, 4}},
                 {"top-k 1", {1, 1, 1, 0, 5}},
                 {"top-k beyond V", {1, 1000, 1, 0, 6}},
                 {"top-p 0.7", {1, 0, 0.7f, 0, 7}},
                 {"top-p 0", {1, 0, 0, 0, 8}},
                 {"top-p 0.99", {1, 0, 0.99f, 0, 9}},
                 {"min-p 0.3", {1, 0, 1, 0.3f, 10}},
                 {"min-p 1", {1, 0, 1, 1, 11}},
                 {"top-k 5, top-p 0.8", {1, 5, 0.8f, 0, 12}},
                 {"top-p 0.6, min-p 0.3", {1, 0, 0.6f, 0.3f, 13}},
                 {"temperature 0.7, min-p 0.3", {0.7f, 0, 1, 0.3f, 14}},
                 {"all of them", {1.3f, 6, 0.75f, 0.35f, 15}}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char what[64];
        frequencies(logits, 12, cases[i].s, cases[i].what);
        snprintf(what, sizeof what, "ties, %s", cases[i].what), frequencies(many, 40, cases[i].s, what);
    }
    // greedy: the largest, the first of equals, whatever the filters say
    retrofit_sampling greedy = {0, 3, 0.5f, 0.5f, 1};
    char scratch[64 * 8];
    check(retrofit_sample(logits, 12, &greedy, scratch) == 1, "greedy is not the largest");
    for (size_t same = 1; same < 40; same++) {
        float tie[40] = {0};
        tie[same] = tie[39] = 1;
        check(retrofit_argmax(tie, 40) == (int32_t)same && retrofit_sample(tie, 40, &greedy, scratch) == (int32_t)same,
              "of equals not the first, %zu", same);
    }
    check(greedy.seed == 1, "greedy choices took from the random numbers");
    // a seed's draws are its own, and the seed goes on
    retrofit_sampling a = {1, 0, 1, 0, 77}, b = a, c = a;
    size_t other = 0;
    c.seed = 78;
    for (int i = 0; i < 200; i++) {
        int32_t x = retrofit_sample(many, 40, &a, scratch), y = retrofit_sample(many, 40, &b, scratch);
        check(x == y, "draw %d of one seed is %d and %d", i, x, y), other += x != retrofit_sample(many, 40, &c, scratch);
    }
    check(other > 100 && a.seed != 77, "two seeds agree in %zu of 200 draws", 200 - other);
    // logits that ask for trouble: huge, tiny, none. What has no probability never comes.
    for (int which = 0; which < 6; which++)
        for (int filters = 0; filters < 4; filters++) {
            retrofit_sampling s = {which == 3 ? 1e-30f : 1, filters == 1 ? 3 : 0, filters == 2 ? 0.9f : 1, filters == 3 ? 0.1f : 0, 5};
            float odd[20];
            for (size_t v = 0; v < 20; v++)
                odd[v] = which == 0   ? (v == 7 ? 1e4f : -1e4f)
                         : which == 1 ? (v == 7 ? 0.5f : -INFINITY)
                         : which == 2 ? (v == 7 ? -1e4f : -INFINITY)
                         : which == 3 ? (v == 7 ? 1e4f : 9e3f)
                         : which == 4 ? (v == 7 || v == 8 ? 3e38f : -3e38f)
                                      : -INFINITY; // nothing is possible: any token will do, but a token
            int32_t stray = -1;
            size_t strays = 0;
            for (int i = 0; i < 500; i++) {
                int32_t id = retrofit_sample(odd, 20, &s, scratch);
                if (id < 0 || id >= 20 || (which != 5 && id != 7 && (which != 4 || id != 8))) stray = id, strays++;
            }
            check(strays == 0, "extreme logits %d, filters %d: %zu of 500 draws are wrong, such as %d", which, filters, strays, stray);
        }
    retrofit_sampling strict = {1, 0, 1, 2, 5}; // a min-p above 1 leaves nothing: then the largest
    check(retrofit_sample(logits, 12, &strict, scratch) == 1, "min-p 2 does not choose the largest");
    check(retrofit_sample(logits, 1, &a, scratch) == 0, "a vocabulary of one");
}

int main(void) {
    decode("tiny/recurrent", 110); // more than a tile of attention
    decode("llama3/recurrent", 33), decode("head64/recurrent", 26), decode("tiny/base", 110);
    errors(), sampling();
    return finish("decode");
}

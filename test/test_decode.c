// Decoding with the KV cache against the full forward pass, position by position, and sampling
// against what the filters are to keep.
#include "test.h"

// A token sequence of its own for every row.
static int32_t nth(size_t row, size_t i, size_t V) {
    return (int32_t)(retrofit_hash(row + 1, i) % V);
}

static retrofit_buffers *with_cache(const retrofit_model *model, size_t B, size_t T,
                                    size_t capacity, size_t r) {
    retrofit_kv_cache cache = {.capacity = capacity, .recurrences = r};
    retrofit_buffers *buffers = retrofit_buffers_new(model, B, T, 0, RETROFIT_KEEP_NOTHING, &cache);
    need(buffers != NULL, "buffers with a cache");
    return buffers;
}

// ---- Cached decoding against the full pass ------------------------------------------------------

// Logits (B,L,V) of every row's sequence by the full forward pass, without a cache. Rows one by
// one: in decoding a row's start state does not depend on the others.
static float *full_pass(const retrofit_model *model, size_t B, size_t L, size_t r, float sigma,
                        uint64_t seed) {
    size_t V = model->config.vocab;
    int32_t *tokens = retrofit_allocate(L, sizeof *tokens);
    float *logits = retrofit_allocate(B * L * V, sizeof *logits);
    retrofit_buffers *buffers = retrofit_buffers_new(model, 1, L, 0, RETROFIT_KEEP_NOTHING, NULL);
    need(tokens && logits && buffers, "the full pass's buffers");
    for (size_t row = 0; row < B; row++) {
        for (size_t i = 0; i < L; i++) tokens[i] = nth(row, i, V);
        need(retrofit_forward(buffers, tokens, 1, L, sigma, seed, r, 0), "full forward");
        retrofit_logits(buffers, 0, L, logits + row * L * V);
    }
    retrofit_buffers_free(buffers);
    free(tokens);
    return logits;
}

// Decoding of several rows: `seen` counts what each has been fed so far.
typedef struct {
    const char *name;
    retrofit_buffers *buffers;
    size_t L, r, seen[4];
    float sigma;
    uint64_t seed;
    const float *full;
    double worst;
} decoding;

// Feeds row i its next lengths[i] tokens (t of them if NULL), padded to t with `padding`, and
// compares the logits with the full pass's.
static const float *feed_padded(decoding *x, size_t b, size_t t, const int32_t *lengths,
                                int32_t padding) {
    int32_t tokens[512];
    size_t V = x->buffers->model->config.vocab;
    retrofit_recurrence_options options = {.recurrences = x->r, .sigma = x->sigma, .seed = x->seed};
    need(b * t <= 512, "room for the tokens");
    for (size_t i = 0; i < b * t; i++) {
        size_t row = i / t, at = i % t;
        bool padded = lengths && at >= (size_t)lengths[row];
        tokens[i] = padded ? padding : nth(row, x->seen[row] + at, V);
    }
    const float *logits = retrofit_next_logits(x->buffers, tokens, b, t, lengths, &options);
    need(logits != NULL, x->name);
    for (size_t i = 0; i < b; i++) {
        x->seen[i] += lengths ? (size_t)lengths[i] : t;
        const float *full = x->full + (i * x->L + x->seen[i] - 1) * V;
        double error = relative_error(logits + i * V, full, V);
        check(error < 1e-5,
              "%s r %zu sigma %g: row %zu of %zu after %zu tokens, %zu at a time: logits %.2e off",
              x->name, x->r, (double)x->sigma, i, b, x->seen[i], t, error);
        if (error > x->worst) x->worst = error;
    }
    return logits;
}

static const float *feed(decoding *x, size_t b, size_t t) { return feed_padded(x, b, t, NULL, 0); }

static void start_again(decoding *x) {
    retrofit_clear_cache(x->buffers);
    memset(x->seen, 0, sizeof x->seen);
}

// A prompt, a second piece of it, then token by token; when the context is full, no more.
static void decode_one_row(decoding *x) {
    retrofit_recurrence_options options = {.recurrences = x->r};
    int32_t token = 0;
    feed(x, 1, x->L > 40 ? 97 : 7);
    feed(x, 1, 4);
    while (x->seen[0] < x->L) feed(x, 1, 1);
    check(!retrofit_next_logits(x->buffers, &token, 1, 1, NULL, &options) &&
              strstr(retrofit_error(), "context"),
          "%s: a token too many: %s", x->name, retrofit_error());

    start_again(x); // one by one from the start
    for (size_t i = 0; i < 9; i++) feed(x, 1, 1);
}

// Rows of different lengths together. Their logits (3,V) after all of it go to `kept`.
static void decode_padded_rows(decoding *x, int32_t padding, float *kept) {
    size_t V = x->buffers->model->config.vocab;
    start_again(x);
    feed_padded(x, 3, 9, (int32_t[]){5, 9, 1}, padding);
    feed_padded(x, 3, 3, (int32_t[]){3, 1, 2}, padding);
    feed_padded(x, 3, 4, (int32_t[]){1, 2, 4}, padding);
    for (int i = 0; i < 3; i++) memcpy(kept, feed(x, 3, 1), 3 * V * sizeof *kept);
    feed(x, 2, 1); // the later rows may pause
    feed(x, 1, 2);
    feed(x, 3, 1);
}

// Padding must leave no trace: another one gives the same bits.
static void decode_at_depth(decoding *x, const retrofit_model *model) {
    enum { B = 3 };
    size_t V = model->config.vocab;
    float *full = full_pass(model, B, x->L, x->r, x->sigma, x->seed);
    float *kept = retrofit_allocate(2 * B * V, sizeof *kept);
    need(kept != NULL, "memory for logits");
    x->full = full;
    // room for more recurrences than are asked for
    x->buffers = with_cache(model, B, x->L > 40 ? 100 : 16, x->L, 4);
    decode_one_row(x);
    decode_padded_rows(x, 3, kept);
    decode_padded_rows(x, (int32_t)V - 1, kept + B * V);
    check(!memcmp(kept, kept + B * V, B * V * sizeof *kept),
          "%s r %zu: logits depend on the padding, by %.2e", x->name, x->r,
          relative_error(kept, kept + B * V, B * V));
    retrofit_buffers_free(x->buffers);
    free(full);
    free(kept);
}

static void decode(const char *name, size_t L) {
    char path[256];
    snprintf(path, sizeof path, FIXTURES "%s", name);
    retrofit_model *model = retrofit_load(path, &retrofit_cpu, RETROFIT_INFERENCE);
    need(model != NULL, path);
    bool plain = retrofit_is_plain(&model->config);
    double worst = 0;
    for (size_t r = 1; r <= (plain ? 1 : 4); r++) {
        for (int random = 0; random < (plain ? 1 : 2); random++) {
            // a larger σ than the models', so that the start state matters beyond the tolerance
            decoding x = {.name = name, .L = L, .r = r, .sigma = random ? 0.5f : 0, .seed = 42};
            decode_at_depth(&x, model);
            worst = fmax(worst, x.worst);
        }
    }
    printf("%s: %zu positions, logits at most %.1e off\n", name, L, worst);
    retrofit_free(model);
}

// ---- Errors -------------------------------------------------------------------------------------

static const float *feed_two(retrofit_buffers *buffers, const int32_t *tokens, size_t t, size_t r) {
    retrofit_recurrence_options options = {.recurrences = r};
    const float *logits = retrofit_next_logits(buffers, tokens, 2, t, NULL, &options);
    need(logits != NULL, "two rows");
    return logits;
}

// What cannot be decoded is refused in one line.
static void refuse(retrofit_buffers *buffers, retrofit_buffers *without) {
    const retrofit_config *c = &buffers->model->config;
    int32_t V = (int32_t)c->vocab, tokens[64];
    const struct {
        const char *what;
        retrofit_buffers *buffers;
        int32_t last; // token
        size_t b, t;
        const int32_t *lengths;
        size_t r;
    } cases[] = {
        {"a batch too wide", buffers, 0, 3, 1, NULL, 3},
        {"no rows", buffers, 0, 0, 1, NULL, 3},
        {"no tokens", buffers, 0, 1, 0, NULL, 3},
        {"more tokens than the buffers hold", buffers, 0, 1, 9, NULL, 3},
        {"more tokens than the context has left", buffers, 0, 2, 8, NULL, 3},
        {"more recurrences than the cache holds", buffers, 0, 2, 1, NULL, 4},
        {"no recurrences", buffers, 0, 2, 1, NULL, 0},
        {"layers that overflow to none", buffers, 0, 2, 1, NULL, SIZE_MAX / c->core + 1},
        {"a negative token", buffers, -1, 2, 1, NULL, 3},
        {"a token of V", buffers, V, 2, 1, NULL, 3},
        {"a row of no tokens", buffers, 0, 2, 2, (const int32_t[]){2, 0}, 3},
        {"a row of -1 tokens", buffers, 0, 2, 2, (const int32_t[]){-1, 2}, 3},
        {"a row longer than the batch", buffers, 0, 2, 2, (const int32_t[]){2, 3}, 3},
        {"buffers without a cache", without, 0, 2, 1, NULL, 3},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t b = cases[i].b, t = cases[i].t;
        retrofit_recurrence_options options = {.recurrences = cases[i].r};
        memset(tokens, 0, sizeof tokens);
        if (b * t > 0) tokens[b * t - 1] = cases[i].last;
        error_text[0] = 0;
        const float *logits =
            retrofit_next_logits(cases[i].buffers, tokens, b, t, cases[i].lengths, &options);
        check(!logits && *retrofit_error() && !strchr(retrofit_error(), '\n'),
              "%s: %s, error \"%s\"", cases[i].what, logits ? "accepted" : "refused",
              retrofit_error());
    }
}

static void impossible_buffers(const retrofit_model *model) {
    size_t context = model->config.context;
    retrofit_kv_cache long_cache = {.capacity = context + 1, .recurrences = 3};
    retrofit_kv_cache cache = {.capacity = 8, .recurrences = 1};
    error_text[0] = 0;
    check(!retrofit_buffers_new(model, 1, 8, 0, RETROFIT_KEEP_NOTHING, &long_cache) &&
              *retrofit_error(),
          "a cache longer than the model's context");
    check(!retrofit_buffers_new(model, 1, context + 1, 0, RETROFIT_KEEP_NOTHING, NULL) &&
              !retrofit_buffers_new(model, 0, 8, 0, RETROFIT_KEEP_NOTHING, &cache),
          "no batch that could be");
}

// Refused calls leave the cache as it was: the next tokens come out to the last bit as without
// them.
static void errors(void) {
    retrofit_model *model =
        retrofit_load(FIXTURES "tiny/recurrent", &retrofit_cpu, RETROFIT_INFERENCE);
    need(model != NULL, "tiny");
    size_t V = model->config.vocab;
    int32_t tokens[64] = {1, 2, 3}, others[2] = {7, 9};
    retrofit_buffers *buffers = with_cache(model, 2, 8, 12, 3);
    retrofit_buffers *quiet = with_cache(model, 2, 8, 12, 3);
    retrofit_buffers *without = retrofit_buffers_new(model, 2, 8, 0, RETROFIT_KEEP_NOTHING, NULL);
    float *before = retrofit_allocate(2 * V, sizeof *before);
    need(without && before, "buffers without a cache");
    feed_two(buffers, tokens, 5, 3);
    memcpy(before, feed_two(quiet, tokens, 5, 3), 2 * V * sizeof *before);

    refuse(buffers, without);
    const float *after = feed_two(buffers, others, 1, 2);
    const float *undisturbed = feed_two(quiet, others, 1, 2);
    check(!memcmp(after, undisturbed, 2 * V * sizeof *after),
          "refused calls left a trace of %.2e in the logits",
          relative_error(after, undisturbed, 2 * V));

    retrofit_clear_cache(buffers); // from the start again the same bits
    after = feed_two(buffers, tokens, 5, 3);
    for (size_t i = 0; i < 2; i++)
        check(!memcmp(after + i * V, before + i * V, V * sizeof *after),
              "after the cache was cleared, row %zu has other logits", i);

    impossible_buffers(model);
    free(before);
    retrofit_buffers_free(buffers);
    retrofit_buffers_free(quiet);
    retrofit_buffers_free(without);
    retrofit_free(model);
}

// ---- Sampling -----------------------------------------------------------------------------------

// ranks[v]: how many tokens come before v; of equal logits the first ids count as larger.
static void rank_tokens(size_t *ranks, const float *logits, size_t V) {
    for (size_t v = 0; v < V; v++) {
        ranks[v] = 0;
        for (size_t u = 0; u < V; u++)
            ranks[v] += logits[u] > logits[v] || (logits[u] == logits[v] && u < v);
    }
}

static double sum_up(const double *p, size_t V) {
    double sum = 0;
    for (size_t v = 0; v < V; v++) sum += p[v];
    return sum;
}

// Removes the tokens whose predecessors by rank have a share of top_p already, but never the first.
static void remove_beyond_top_p(double *p, const size_t *ranks, size_t V, double top_p) {
    double sum = sum_up(p, V), kept = 0;
    for (size_t rank = 0; rank < V; rank++) {
        for (size_t v = 0; v < V; v++) {
            if (ranks[v] != rank) continue;
            double share = p[v] / sum;
            if (rank > 0 && top_p < 1 && kept >= top_p) p[v] = 0;
            kept += share;
        }
    }
}

// Probabilities after temperature, top-k, top-p and min-p, in this order, each filter acting on
// what the one before has kept: the definition, with as many loops as it takes.
static void expected(double *p, const float *logits, size_t V, const retrofit_sampling *sampling) {
    size_t ranks[64];
    double max = -INFINITY, most = 0;
    rank_tokens(ranks, logits, V);
    for (size_t v = 0; v < V; v++) max = fmax(max, (double)logits[v]);
    for (size_t v = 0; v < V; v++) {
        p[v] = exp(((double)logits[v] - max) / (double)sampling->temperature);
        if (sampling->top_k && ranks[v] >= sampling->top_k) p[v] = 0;
    }
    remove_beyond_top_p(p, ranks, V, (double)sampling->top_p);
    for (size_t v = 0; v < V; v++) most = fmax(most, p[v]);
    for (size_t v = 0; v < V; v++)
        if (p[v] < (double)sampling->min_p * most) p[v] = 0;
    double sum = sum_up(p, V);
    for (size_t v = 0; v < V; v++) p[v] /= sum;
}

// χ² has mean f, its degrees of freedom, and deviation √(2f): draws are allowed five deviations and
// a little for small f. They are the same in every run.
static void frequencies(const float *logits, size_t V, retrofit_sampling sampling,
                        const char *what) {
    enum { DRAWS = 20000 };
    double p[64], chi = 0, freedom = -1;
    size_t count[64] = {0}, strays = 0;
    float copy[64];
    void *scratch = malloc(V * 8); // exactly what the header asks for
    need(scratch && V <= 64, "scratch");
    memcpy(copy, logits, V * sizeof *copy);
    expected(p, logits, V, &sampling);
    for (size_t i = 0; i < DRAWS; i++) {
        int32_t id = retrofit_sample(logits, V, &sampling, scratch);
        if (id >= 0 && (size_t)id < V) count[id]++;
        else strays++;
    }
    for (size_t v = 0; v < V; v++) {
        double due = DRAWS * p[v];
        if (p[v] == 0) {
            strays += count[v];
            continue;
        }
        freedom++;
        chi += (count[v] - due) * (count[v] - due) / due;
    }
    check(strays == 0, "%s: %zu draws of tokens that the filters take out", what, strays);
    check(chi < freedom + 5 * sqrt(2 * freedom) + 5, "%s: χ² is %.1f with %g degrees of freedom",
          what, chi, freedom);
    check(!memcmp(copy, logits, V * sizeof *copy), "%s: the logits were changed", what);
    free(scratch);
}

// Twelve tokens, no two alike; 40 tokens, eight or so of each logit.
static float distinct[12], ties[40];

static void make_logits(void) {
    static const double p[] = {0.02, 0.3, 0.05, 0.13, 0.02, 0.2, 0.08, 0.01, 0.1, 0.04, 0.03, 0.02};
    for (size_t i = 0; i < 12; i++) distinct[i] = (float)log(p[i]) + 3;
    for (size_t i = 0; i < 40; i++) ties[i] = (float)(retrofit_hash(9, i) % 5) * 0.5f;
}

static void filters(void) {
    const struct {
        const char *what;
        retrofit_sampling sampling;
    } cases[] = {
        {"temperature 1", {1, 0, 1, 0, 1}},
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
        {"all of them", {1.3f, 6, 0.75f, 0.35f, 15}},
        {"top-k 5, min-p 0.3", {1, 5, 1, 0.3f, 16}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char what[64];
        snprintf(what, sizeof what, "ties, %s", cases[i].what);
        frequencies(distinct, 12, cases[i].sampling, cases[i].what);
        frequencies(ties, 40, cases[i].sampling, what);
    }
}

// Greedy: the largest, the first of equals, whatever the filters say, and without random numbers.
static void greedy(void) {
    retrofit_sampling sampling = {0, 3, 0.5f, 0.5f, 1};
    char scratch[64 * 8];
    check(retrofit_sample(distinct, 12, &sampling, scratch) == 1, "greedy is not the largest");
    for (size_t same = 1; same < 40; same++) {
        float tie[40] = {0};
        tie[same] = 1;
        tie[39] = 1;
        check(retrofit_argmax(tie, 40) == (int32_t)same &&
                  retrofit_sample(tie, 40, &sampling, scratch) == (int32_t)same,
              "of equals not the first, %zu", same);
    }
    check(sampling.seed == 1, "greedy choices took from the random numbers");
}

// A seed's draws are its own, and the seed goes on.
static void seeds(void) {
    retrofit_sampling a = {1, 0, 1, 0, 77}, b = a, c = a;
    char scratch[64 * 8];
    size_t other = 0;
    c.seed = 78;
    for (int i = 0; i < 200; i++) {
        int32_t x = retrofit_sample(ties, 40, &a, scratch);
        int32_t y = retrofit_sample(ties, 40, &b, scratch);
        check(x == y, "draw %d of one seed is %d and %d", i, x, y);
        other += x != retrofit_sample(ties, 40, &c, scratch);
    }
    check(other > 100 && a.seed != 77, "two seeds agree in %zu of 200 draws", 200 - other);
    check(retrofit_sample(distinct, 1, &a, scratch) == 0, "a vocabulary of one");
}

// Logits that ask for trouble: huge, tiny, none. What has no probability never comes.
static void extremes(void) {
    static const struct {
        float seven, eight, rest, temperature; // logits of tokens 7 and 8, of the others
    } cases[] = {
        {1e4f, -1e4f, -1e4f, 1},
        {0.5f, -INFINITY, -INFINITY, 1},
        {-1e4f, -INFINITY, -INFINITY, 1},
        {1e4f, 9e3f, 9e3f, 1e-30f},
        {3e38f, 3e38f, -3e38f, 1},
        {-INFINITY, -INFINITY, -INFINITY, 1}, // nothing is possible: any token will do, but a token
    };
    char scratch[64 * 8];
    for (size_t i = 0; i < 6; i++) {
        for (int filter = 0; filter < 4; filter++) {
            retrofit_sampling sampling = {cases[i].temperature, filter == 1 ? 3 : 0,
                                          filter == 2 ? 0.9f : 1, filter == 3 ? 0.1f : 0, 5};
            float logits[20];
            int32_t stray = -1;
            size_t strays = 0;
            for (size_t v = 0; v < 20; v++) logits[v] = cases[i].rest;
            logits[7] = cases[i].seven;
            logits[8] = cases[i].eight;
            for (int draw = 0; draw < 500; draw++) {
                int32_t id = retrofit_sample(logits, 20, &sampling, scratch);
                bool possible = id == 7 || (id == 8 && i == 4) || i == 5;
                if (id >= 0 && id < 20 && possible) continue;
                stray = id;
                strays++;
            }
            check(strays == 0,
                  "extreme logits %zu, filter %d: %zu of 500 draws are wrong, such as %d", i,
                  filter, strays, stray);
        }
    }
    retrofit_sampling strict = {1, 0, 1, 2, 5}; // a min-p above 1 leaves nothing: then the largest
    check(retrofit_sample(distinct, 12, &strict, scratch) == 1,
          "min-p 2 does not choose the largest");
}

int main(void) {
    decode("tiny/recurrent", 110); // more than a tile of attention
    decode("llama3/recurrent", 33);
    decode("head64/recurrent", 26);
    decode("tiny/base", 110);
    decode("olmo2/recurrent", 26);
    errors();
    make_logits();
    filters();
    greedy();
    seeds();
    extremes();
    return finish("decode");
}

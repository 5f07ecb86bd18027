// How fast gemm is: next to OpenBLAS on the shapes of training, and next to reading memory on those
// of decoding. OpenBLAS is loaded when the program runs, if it is there ($OPENBLAS or
// libopenblas.so.0). The two take turns, so that whatever else the machine is doing slows both, and
// the best turn of each counts. Between turns we sleep: both libraries' threads spin for a while
// after their work, and would take the other's time. Then the other operations of a training step
// beside what their arithmetic and their memory allow. An argument: only the products whose names
// contain it, "step" or "decode".
#define RETROFIT_IMPLEMENTATION
#include "../retrofit.h"
#include <dlfcn.h>

__attribute__((noreturn)) static void die(const char *why) {
    puts(why);
    exit(1);
}

static int threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static float *random_floats(size_t n) {
    float *x = malloc(n * sizeof *x);
    uint32_t state = 1;
    if (!x) die("out of memory");
    for (size_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        x[i] = (float)(state >> 8) / 16777216.f - .5f;
    }
    return x;
}

// ---- Products beside OpenBLAS's ----------------------------------------------------------------

enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 }; // CBLAS's numbers
static void (*sgemm)(int order, int trans_a, int trans_b, int M, int N, int K, float alpha,
                     const float *a, int lda, const float *b, int ldb, float beta, float *c,
                     int ldc);
static void (*set_threads)(int);
static const char *(*core_name)(void);

// A product. a_t, b_t: the operand is stored transposed; gap: elements between its rows beyond
// their own.
typedef struct {
    const char *name;
    size_t M, N, K;
    bool a_t, b_t, serial;
    size_t gap;
} product;

static void run_product(const product *p, bool ours, const float *a, const float *b, float *c) {
    size_t lda = (p->a_t ? p->M : p->K) + p->gap, ldb = (p->b_t ? p->K : p->N) + p->gap;
    if (!ours) {
        sgemm(ROW_MAJOR, p->a_t ? TRANSPOSED : PLAIN, p->b_t ? TRANSPOSED : PLAIN, (int)p->M,
              (int)p->N, (int)p->K, 1, a, (int)lda, b, (int)ldb, 0, c, (int)p->N);
        return;
    }
    matrix_view A = p->a_t ? view_transposed(a, lda) : view(a, lda);
    matrix_view B = p->b_t ? view_transposed(b, ldb) : view(b, ldb);
    (p->serial ? gemm_serial : gemm)(p->M, p->N, p->K, A, B, c, p->N, NULL, 0);
}

// The best time of a product, in seconds, in a turn of at least `seconds`.
static double best_of_turn(const product *p, bool ours, int batch, double seconds, const float *a,
                           const float *b, float *c) {
    double best = 1e9, begin = retrofit_seconds();
    run_product(p, ours, a, b, c); // wakes the threads
    do {
        double start = retrofit_seconds();
        for (int i = 0; i < batch; i++) run_product(p, ours, a, b, c);
        best = fmin(best, (retrofit_seconds() - start) / batch);
    } while (retrofit_seconds() - begin < seconds);
    return best;
}

static void compare(const product *p, double *log_sum, int *count) {
    float *a = random_floats(p->M * p->K + p->gap * (p->M + p->K));
    float *b = random_floats(p->K * p->N + p->gap * (p->K + p->N));
    float *c = random_floats(p->M * p->N);
    double gflop = 2e-9 * (double)p->M * (double)p->N * (double)p->K, best[2] = {1e9, 1e9};
    int batch = 1 + (int)(.02 / gflop); // long enough for the clock
    if (sgemm) set_threads(p->serial ? 1 : threads());
    for (int round = 0; round < 10; round++) {
        bool ours = round % 2 == 0;
        if (!ours && !sgemm) continue;
        double seconds = best_of_turn(p, ours, batch, fmax(.03, gflop / 50), a, b, c);
        best[ours] = fmin(best[ours], seconds);
        usleep(5000);
    }
    printf("%-36s %5zu %5zu %5zu %8.1f", p->name, p->M, p->N, p->K, gflop / best[1]);
    if (sgemm) {
        printf(" %8.1f %6.2f", gflop / best[0], best[0] / best[1]);
        *log_sum += log(best[0] / best[1]);
        ++*count;
    }
    puts("");
    fflush(stdout);
    free(a);
    free(b);
    free(c);
}

static const product products[] = {
    {"square", 1024, 1024, 1024, false, false, false, 0},
    // SmolLM2-135M: d = 576, q + k + v = 960, gate + up = 3072, F = 1536
    {"135M, 256 rows: X Wqkv^T", 256, 960, 576, false, true, false, 0},
    {"135M, 256 rows: X Wo^T", 256, 576, 576, false, true, false, 0},
    {"135M, 256 rows: X Wfc^T", 256, 3072, 576, false, true, false, 0},
    {"135M, 256 rows: X Wproj^T", 256, 576, 1536, false, true, false, 0},
    {"135M, 256 rows: X vocabulary^T", 256, 49152, 576, false, true, false, 0},
    {"135M, 1024 rows: X Wqkv^T", 1024, 960, 576, false, true, false, 0},
    {"135M, 1024 rows: X Wo^T", 1024, 576, 576, false, true, false, 0},
    {"135M, 1024 rows: X Wfc^T", 1024, 3072, 576, false, true, false, 0},
    {"135M, 1024 rows: X Wproj^T", 1024, 576, 1536, false, true, false, 0},
    {"135M, 1024 rows: dY Wqkv", 1024, 576, 960, false, false, false, 0},
    {"135M, 1024 rows: dY Wfc", 1024, 576, 3072, false, false, false, 0},
    {"135M, 1024 rows: dY Wproj", 1024, 1536, 576, false, false, false, 0},
    {"135M, 1024 rows: dYqkv^T X", 960, 576, 1024, true, false, false, 0},
    {"135M, 1024 rows: dYfc^T X", 3072, 576, 1024, true, false, false, 0},
    {"135M, 1024 rows: dYproj^T X", 576, 1536, 1024, true, false, false, 0},
    {"135M, 256 rows: dYfc^T X", 3072, 576, 256, true, false, false, 0},
    // TinyLlama-1.1B: d = 2048, q + k + v = 2560, gate + up = 11264, F = 5632
    {"TinyLlama, 256 rows: X Wqkv^T", 256, 2560, 2048, false, true, false, 0},
    {"TinyLlama, 256 rows: X Wfc^T", 256, 11264, 2048, false, true, false, 0},
    {"TinyLlama, 256 rows: X Wproj^T", 256, 2048, 5632, false, true, false, 0},
    {"TinyLlama, 256 rows: dY Wfc", 256, 2048, 11264, false, false, false, 0},
    {"TinyLlama, 256 rows: dYfc^T X", 11264, 2048, 256, true, false, false, 0},
    // the demonstration: d = 64, heads of 16, F = 176, a vocabulary of 112, 48 sequences of 80
    {"demo: X Wqkv^T", 3840, 192, 64, false, true, false, 0},
    {"demo: X Wo^T", 3840, 64, 64, false, true, false, 0},
    {"demo: X Wfc^T", 3840, 352, 64, false, true, false, 0},
    {"demo: X Wproj^T", 3840, 64, 176, false, true, false, 0},
    {"demo: X vocabulary^T", 3840, 112, 64, false, true, false, 0},
    {"demo: dY Wfc", 3840, 64, 352, false, false, false, 0},
    {"demo: dYqkv^T X", 192, 64, 3840, true, false, false, 0},
    {"demo: dYo^T X", 64, 64, 3840, true, false, false, 0},
    {"demo: one head, Q K^T (one thread)", 80, 80, 16, false, true, true, 176},
    {"demo: one head, P V (one thread)", 80, 16, 80, false, false, true, 176},
    {"135M: one head, Q K^T (one thread)", 256, 256, 64, false, true, true, 896},
    {"135M: one head, P V (one thread)", 256, 64, 256, false, false, true, 896},
};

static void compare_products(const char *only) {
    double log_sum = 0;
    int count = 0;
    printf("%d threads, vectors of %d floats\n%-36s %5s %5s %5s %8s", threads(), VECTOR, "GFLOP/s",
           "M", "N", "K", "ours");
    if (sgemm) printf(" OpenBLAS  ratio (kernels: %s)", core_name());
    puts("");
    for (size_t i = 0; i < sizeof products / sizeof *products; i++) {
        if (strstr(products[i].name, only)) compare(&products[i], &log_sum, &count);
    }
    if (count) printf("geometric mean of the ratios: %.3f\n", exp(log_sum / count));
}

// ---- The rest of a step beside its limits ------------------------------------------------------
// An operation takes at least as long as its multiply-adds and its exponentials together, and as
// its bytes: every input read once, every output written once. The three rates are measured first,
// with all threads: multiply-adds on registers, fast_exp on an array in the nearest cache, and an
// array larger than all caches that is read and written in place.

typedef struct {
    size_t B, T, H, G, h, F, V; // as in retrofit.h
    float *qkv, *dqkv, *y, *dy, *lse, *delta, *gate_up, *dgate_up, *x, *rstd, *weight, *logits;
    float *table, *w, *m, *v, *losses;
    int32_t *labels;
    size_t parameters;
    double sum;
} step;

typedef struct {
    double multiply_adds, exponentials, bytes; // a second
} rates;

static volatile float sink; // what was computed goes here, so that nothing optimises it away

static double multiply_add_rate(void) {
    enum { TIMES = 1 << 20, CHAINS = 12 };
    double best = 1e9;
    for (int round = 0; round < 40; round++) {
        double start = retrofit_seconds();
        float total = 0;
#ifdef _OPENMP
#pragma omp parallel for reduction(+ : total)
#endif
        for (int thread = 0; thread < threads(); thread++) {
            vector sum[CHAINS] = {{0}};
            vector a = BROADCAST(.5f), b = BROADCAST(.25f);
            for (size_t i = 0; i < TIMES; i++) {
                UNROLL(c, CHAINS) {
                    sum[c] = MULTIPLY_ADD(a, sum[c], b);
                    STAYS_IN_REGISTER(sum[c]);
                }
            }
            UNROLL(c, CHAINS) total += sum[c][0];
        }
        sink = total;
        best = fmin(best, retrofit_seconds() - start);
    }
    return (double)TIMES * CHAINS * VECTOR * threads() / best;
}

static double exponential_rate(void) {
    enum { TIMES = 1 << 12, COUNT = 2048 };
    double best = 1e9;
    for (int round = 0; round < 40; round++) {
        double start = retrofit_seconds();
#ifdef _OPENMP
#pragma omp parallel for
#endif
        for (int thread = 0; thread < threads(); thread++) {
            float x[COUNT] = {0};
            for (size_t i = 0; i < TIMES; i++)
                for (size_t j = 0; j < COUNT; j++) x[j] = fast_exp(x[j] - 1);
            sink = x[thread];
        }
        best = fmin(best, retrofit_seconds() - start);
    }
    return (double)TIMES * COUNT * threads() / best;
}

static double update_rate(void) {
    size_t n = (size_t)1 << 26;
    float *x = random_floats(n);
    double best = 1e9;
    for (int round = 0; round < 5; round++) {
        double start = retrofit_seconds();
        PARALLEL_FOR(n)
        for (size_t i = 0; i < n; i++) x[i] = x[i] * .5f + .5f;
        best = fmin(best, retrofit_seconds() - start);
    }
    free(x);
    return 8. * (double)n / best;
}

static void attention_forth(step *s) {
    attention_forward(s->y, s->lse, s->qkv, s->B, s->T, s->H, s->G, s->h);
}

static void attention_back(step *s) {
    attention_backward(s->dqkv, s->delta, s->dy, s->qkv, s->y, s->lse, s->B, s->T, s->H, s->G,
                       s->h);
}

static void rope(step *s) {
    rope_forward(s->dqkv, s->table, NULL, s->B, s->T, s->H, s->G, s->h);
}

static void rmsnorm_forth(step *s) {
    rmsnorm_forward(s->y, s->rstd, s->x, s->weight, s->B * s->T, s->H * s->h, 1e-5f);
}

static void rmsnorm_back(step *s) {
    rmsnorm_backward(s->dy, s->weight, s->y, s->x, s->rstd, s->weight, s->B * s->T, s->H * s->h);
}

static void swiglu_forth(step *s) {
    swiglu_forward(s->dgate_up, s->gate_up, s->B * s->T, s->F);
}

static void swiglu_back(step *s) {
    swiglu_backward(s->dgate_up, s->logits, s->gate_up, s->gate_up, s->B * s->T, s->F);
}

static void cross_entropy_both(step *s) {
    cross_entropy(s->losses, s->logits, s->labels, s->B * s->T, s->V, 1e-3f);
}

static void adamw(step *s) {
    adamw_update(s->w, s->m, s->v, s->logits, s->parameters, 1, 1e-3f, .9f, .95f, .1, .05, 1e-8f,
                 1e-4f);
}

static void gradient_norm(step *s) { sum_squares(&s->sum, s->w, s->parameters); }

static void report(const char *name, step *s, void (*run)(step *), const rates *rate,
                   double multiply_adds, double exponentials, double elements) {
    double best = 1e9, begin = retrofit_seconds();
    do {
        double start = retrofit_seconds();
        run(s);
        best = fmin(best, retrofit_seconds() - start);
    } while (retrofit_seconds() - begin < .4);
    double arithmetic = multiply_adds / rate->multiply_adds + exponentials / rate->exponentials;
    double memory = 4 * elements / rate->bytes;
    printf("%-36s %13.3f %8.3f %6.2f  %s\n", name, 1e3 * best, 1e3 * fmax(arithmetic, memory),
           fmax(arithmetic, memory) / best, arithmetic > memory ? "arithmetic" : "memory");
    fflush(stdout);
}

static void measure_step(const char *name, step s, const rates *rate) {
    size_t N = s.B * s.T, d = s.H * s.h, Q = (s.H + 2 * s.G) * s.h;
    size_t logits = retrofit_max(retrofit_max(N * s.V, s.parameters), N * s.F);
    const struct {
        float **at;
        size_t n;
    } arrays[] = {
        {&s.qkv, N * Q},
        {&s.dqkv, N * Q},
        {&s.y, N * d},
        {&s.dy, N * d},
        {&s.x, N * d},
        {&s.lse, N * s.H},
        {&s.delta, N * s.H},
        {&s.rstd, N},
        {&s.losses, N},
        {&s.weight, d},
        {&s.gate_up, 2 * N * s.F},
        {&s.dgate_up, 2 * N * s.F},
        {&s.logits, logits},
        {&s.table, s.T * s.h},
        {&s.w, s.parameters},
        {&s.m, s.parameters},
        {&s.v, s.parameters},
    };
    size_t count = sizeof arrays / sizeof *arrays;
    for (size_t i = 0; i < count; i++) *arrays[i].at = random_floats(arrays[i].n);
    for (size_t i = 0; i < s.parameters; i++) s.v[i] = fabsf(s.v[i]);
    s.labels = calloc(N, sizeof *s.labels);
    if (!s.labels) die("out of memory");

    double n = (double)N, pairs = n * (double)(s.T + 1) / 2 * (double)s.H; // queries with keys
    double width = (double)d, qkv = (double)Q, F = (double)s.F, V = (double)s.V;
    printf("%s: %zu sequences of %zu, d = %zu, %zu heads, F = %zu, V = %zu\n", name, s.B, s.T, d,
           s.H, s.F, s.V);
    report("attention forward", &s, attention_forth, rate, 2 * pairs * (double)s.h, pairs,
           n * (qkv + width));
    report("attention backward", &s, attention_back, rate, 5 * pairs * (double)s.h, pairs,
           n * (2 * qkv + 2 * width));
    report("rope", &s, rope, rate, 2 * n * qkv, 0, 2 * n * (qkv - (double)(s.G * s.h)));
    report("rmsnorm forward", &s, rmsnorm_forth, rate, 2 * n * width, 0, 2 * n * width);
    report("rmsnorm backward", &s, rmsnorm_back, rate, 4 * n * width, 0, 4 * n * width);
    report("swiglu forward", &s, swiglu_forth, rate, 2 * n * F, n * F, 3 * n * F);
    report("swiglu backward", &s, swiglu_back, rate, 6 * n * F, n * F, 6 * n * F);
    report("cross-entropy and its gradient", &s, cross_entropy_both, rate, 2 * n * V, n * V,
           2 * n * V);
    report("AdamW", &s, adamw, rate, 0, 0, 7 * (double)s.parameters);
    report("the gradient's norm", &s, gradient_norm, rate, 0, 0, (double)s.parameters);
    for (size_t i = 0; i < count; i++) free(*arrays[i].at);
    free(s.labels);
}

static void measure_steps(void) {
    rates rate = {multiply_add_rate(), exponential_rate(), update_rate()};
    printf("\n%.1f GFLOP/s, %.2f G exponentials/s, %.1f GB/s\n%-36s %13s %8s %6s\n",
           2e-9 * rate.multiply_adds, 1e-9 * rate.exponentials, 1e-9 * rate.bytes, "milliseconds",
           "ours", "limit", "ratio");
    measure_step("SmolLM2-135M", (step){.B = 1, .T = 1024, .H = 9, .G = 3, .h = 64, .F = 1536,
                                        .V = 49152, .parameters = 28311552}, &rate);
    measure_step("the demonstration", (step){.B = 48, .T = 80, .H = 4, .G = 4, .h = 16, .F = 176,
                                             .V = 112, .parameters = 33792}, &rate);
}

// ---- Decoding beside reading -------------------------------------------------------------------

// Adds up an array with all threads: the bandwidth that reading can have. What is needed later is
// fetched ahead, as the products of few rows do; the processor alone is slower.
static void read_all(const float *x, size_t n) {
    float total = 0;
#ifdef _OPENMP
#pragma omp parallel for reduction(+ : total)
#endif
    for (size_t block = 0; block < n / 4096; block++) {
        float sum[128] = {0};
        for (size_t i = block * 4096; i < (block + 1) * 4096; i += 128) {
            for (size_t u = 0; u < 128; u += 16) __builtin_prefetch(x + i + FAR + u, 0, 2);
            for (size_t u = 0; u < 128; u++) sum[u] += x[i + u];
        }
        for (size_t u = 0; u < 128; u++) total += sum[u];
    }
    sink = total;
}

// Makes bf16 of n numbers, twice. Any bits would do on some processors; others are slow where an
// operand is no normal number.
static void round_pool(float *pool, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t half = retrofit_float_to_bf16(pool[i]);
        uint16_t pair[2] = {half, half};
        memcpy(pool + i, pair, sizeof pair);
    }
}

// M tokens meet N x K weights. A pool larger than the caches holds many such matrices, and each
// call takes the next.
static void decode(size_t M, size_t N, size_t K, retrofit_type type, const float *pool,
                   size_t pool_size) {
    size_t size = N * K * retrofit_type_size(type), matrices = pool_size / size;
    float *x = random_floats(M * K), *y = random_floats(M * N);
    double best = 1e9, reading = 1e9, gb = 1e-9 * (double)(matrices * size);
    for (int round = 0; round < 5; round++) {
        double start = retrofit_seconds();
        read_all(pool, matrices * size / 4);
        reading = fmin(reading, retrofit_seconds() - start);
        start = retrofit_seconds();
        for (size_t i = 0; i < matrices; i++) {
            matrix_view B = {(const char *)pool + i * size, type, 1, K};
            gemm(M, N, K, view(x, K), B, y, N, NULL, 0);
        }
        best = fmin(best, retrofit_seconds() - start);
    }
    printf("%5zu tokens, %6zu x %5zu, %s %17.1f %8.1f %6.2f\n", M, N, K,
           type == RETROFIT_F32 ? "fp32" : "bf16", gb / best, gb / reading, reading / best);
    fflush(stdout);
    free(x);
    free(y);
}

// ---- Whole steps of decoding -------------------------------------------------------------------

// SmolLM2-135M retrofitted (4,6,4), with made-up weights.
static const retrofit_config smollm2 = {
    .n_embd = 576,
    .n_heads = 9,
    .n_kv_heads = 3,
    .head_dim = 64,
    .intermediate = 1536,
    .vocab = 49152,
    .context = 64,
    .prelude = 4,
    .core = 6,
    .coda = 4,
    .norm_eps = 1e-5f,
    .rope_theta = 1e5,
    .state_std = (float)RETROFIT_STATE_STD,
    .mean_recurrence = 4,
    .backprop_depth = 4,
    .bos = -1,
};

// Fills the weights, in bf16 to `halves` if that is not NULL; bytes: of each part's weights.
static void make_weights(retrofit_model *model, uint16_t *halves, double bytes[RETROFIT_PARTS]) {
    for (size_t i = 0; i < model->parameter_count; i++) {
        retrofit_parameter *p = model->parameters[i];
        size_t n = p->rows * p->cols;
        bool norm = p->kind == RETROFIT_NORM;
        for (size_t j = 0; j < n; j++) {
            float random = (float)(retrofit_hash(i, j) >> 40) * 0x1p-23f - 1;
            p->master[j] = norm ? 1 : 0.05f * random;
        }
        if (halves && !norm) {
            for (size_t j = 0; j < n; j++) halves[j] = retrofit_float_to_bf16(p->master[j]);
            p->weight.data = halves;
            p->weight.type = RETROFIT_BF16;
            halves += n;
        }
        bytes[p->part] += (double)(n * retrofit_type_size(p->weight.type));
    }
}

// Seconds a token, of 32 behind a prompt of 8, one at a time.
static double decoding_time(const retrofit_model *model, size_t r) {
    enum { PROMPT = 8, TOKENS = 32 };
    retrofit_kv_cache cache = {.capacity = 64, .recurrences = r};
    retrofit_recurrence_options options = {.recurrences = r};
    retrofit_buffers *buffers =
        retrofit_buffers_new(model, 1, PROMPT, 0, RETROFIT_KEEP_NOTHING, &cache);
    if (!buffers) die(retrofit_error());
    int32_t tokens[PROMPT] = {1, 2, 3, 4, 5, 6, 7, 8};
    double best = 1e9;
    for (int round = 0; round < 3; round++) {
        retrofit_clear_cache(buffers);
        const float *logits = retrofit_next_logits(buffers, tokens, 1, PROMPT, NULL, &options);
        double start = retrofit_seconds();
        for (int i = 0; i < TOKENS; i++) {
            int32_t id = retrofit_argmax(logits, model->config.vocab);
            logits = retrofit_next_logits(buffers, &id, 1, 1, NULL, &options);
        }
        best = fmin(best, (retrofit_seconds() - start) / TOKENS);
    }
    retrofit_buffers_free(buffers);
    return best;
}

// Against the time it takes to read the weights that a token needs as often as it needs them: A_e
// once, A_s and the core in every recurrence.
static void decoding(bool bf16, const float *pool, size_t pool_size) {
    retrofit_model *model = retrofit_model_new(&smollm2, &retrofit_cpu);
    if (!model || !retrofit_model_allocate(model, RETROFIT_INFERENCE)) die(retrofit_error());
    uint16_t *halves = bf16 ? malloc(model->weight_count * sizeof *halves) : NULL;
    double reading = 1e9, weights[RETROFIT_PARTS] = {0};
    make_weights(model, halves, weights);
    for (int round = 0; round < 5; round++) {
        double start = retrofit_seconds();
        read_all(pool, pool_size / 4);
        reading = fmin(reading, retrofit_seconds() - start);
    }
    double bandwidth = (double)pool_size / reading;
    double once = weights[RETROFIT_PART_PRELUDE] + weights[RETROFIT_PART_CODA] +
                  weights[RETROFIT_PART_HEAD] + weights[RETROFIT_PART_ADAPTER] / 2;
    double each = weights[RETROFIT_PART_CORE] + weights[RETROFIT_PART_ADAPTER] / 2;
    for (size_t r = 1; r <= 16; r *= 4) {
        double seconds = decoding_time(model, r), bytes = once + (double)r * each;
        printf("a model of 107M, %s, r = %-2zu %15.1f tok/s %8.1f %8.1f %6.2f\n",
               bf16 ? "bf16" : "fp32", r, 1 / seconds, 1e-9 * bytes / seconds, 1e-9 * bandwidth,
               bytes / seconds / bandwidth);
        fflush(stdout);
    }
    free(halves);
    retrofit_free(model);
}

// On processors that are younger than it, OpenBLAS takes the kernels of the oldest (0.3.21 does on
// Xeons of 2023): it is told which to take, unless the user has.
static void open_blas(void) {
    const char *name = getenv("OPENBLAS");
    setenv("OPENBLAS_THREAD_TIMEOUT", "20", 0); // 2^20 cycles of spinning instead of 2^26
#if VECTOR == 16
    setenv("OPENBLAS_CORETYPE", "SkylakeX", 0);
#elif defined __AVX2__
    setenv("OPENBLAS_CORETYPE", "Haswell", 0);
#endif
    void *library = dlopen(name ? name : "libopenblas.so.0", RTLD_NOW);
    if (!library) return;
    *(void **)&sgemm = dlsym(library, "cblas_sgemm");
    *(void **)&set_threads = dlsym(library, "openblas_set_num_threads");
    *(void **)&core_name = dlsym(library, "openblas_get_corename");
    if (!sgemm || !set_threads || !core_name) die("OpenBLAS lacks functions: use another version");
}

int main(int argc, char **argv) {
    static const size_t weights[][2] = {{960, 576},   {3072, 576},   {576, 1536},
                                        {49152, 576}, {11264, 2048}, {2048, 5632}};
    const char *only = argc > 1 ? argv[1] : "";
    open_blas();
    compare_products(only);
    if (!*only || !strcmp(only, "step")) measure_steps();
    if (*only && strcmp(only, "decode")) return 0;

    size_t pool_size = (size_t)256 << 20;
    float *pool = random_floats(pool_size / sizeof *pool);
    printf("\n%-53s %8s %8s %6s\n", "GB/s", "ours", "reading", "ratio");
    for (int bf16 = 0; bf16 < 2; bf16++) {
        retrofit_type type = bf16 ? RETROFIT_BF16 : RETROFIT_F32;
        if (bf16) round_pool(pool, pool_size / sizeof *pool);
        for (size_t i = 0; i < sizeof weights / sizeof *weights; i++) {
            for (size_t M = 1; M <= 32; M *= 2)
                decode(M, weights[i][0], weights[i][1], type, pool, pool_size);
        }
    }
    for (int bf16 = 0; bf16 < 2; bf16++) decoding(bf16, pool, pool_size);
    free(pool);
    return 0;
}

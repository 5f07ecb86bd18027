// How fast gemm is: next to OpenBLAS on the shapes of training, and next to reading memory on those of decoding.
// OpenBLAS is loaded when the program runs, if it is there ($OPENBLAS or libopenblas.so.0). The two take turns, so that whatever else the
// machine is doing slows both, and the best turn of each counts. Between turns we sleep: both libraries' threads spin for a while after
// their work, and would take the other's time. An argument: only the products whose names contain it, or "decode".
#define RETROFIT_IMPLEMENTATION
#include "../retrofit.h"
#include <dlfcn.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static float *random_floats(size_t n) {
    float *x = (float *)malloc(n * 4);
    uint32_t state = 1;
    if (!x) puts("out of memory"), exit(1);
    for (size_t i = 0; i < n; i++) state = state * 1664525u + 1013904223u, x[i] = (float)(state >> 8) / 16777216.f - .5f;
    return x;
}

enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 }; // CBLAS's numbers
static void (*sgemm)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);
static void (*set_threads)(int);

// A product. a_t, b_t: the operand is stored transposed; gap: elements between its rows beyond their own.
typedef struct {
    const char *name;
    size_t M, N, K;
    bool a_t, b_t, serial;
    size_t gap;
} product;

static void multiply(const product *p, bool ours, const float *a, const float *b, float *c) {
    size_t lda = (p->a_t ? p->M : p->K) + p->gap, ldb = (p->b_t ? p->K : p->N) + p->gap;
    if (ours)
        (p->serial ? gemm_serial : gemm)(p->M, p->N, p->K, p->a_t ? view_transposed(a, lda) : view(a, lda),
                                         p->b_t ? view_transposed(b, ldb) : view(b, ldb), c, p->N, NULL, 0);
    else
        sgemm(ROW_MAJOR, p->a_t ? TRANSPOSED : PLAIN, p->b_t ? TRANSPOSED : PLAIN, (int)p->M, (int)p->N, (int)p->K, 1, a, (int)lda, b,
              (int)ldb, 0, c, (int)p->N);
}

static void compare(const product *p, double *log_sum, int *count) {
    float *a = random_floats(p->M * p->K + p->gap * (p->M + p->K)), *b = random_floats(p->K * p->N + p->gap * (p->K + p->N));
    float *c = random_floats(p->M * p->N);
    double gflop = 2e-9 * (double)p->M * (double)p->N * (double)p->K, best[2] = {1e9, 1e9};
    int batch = 1 + (int)(.02 / gflop); // long enough for the clock
    if (sgemm) set_threads(p->serial ? 1 : threads());
    for (int round = 0; round < 10; round++) {
        bool ours = round % 2 == 0;
        if (!ours && !sgemm) continue;
        multiply(p, ours, a, b, c); // wakes the threads
        for (double begin = now(); now() - begin < fmax(.03, gflop / 50);) {
            double start = now();
            for (int i = 0; i < batch; i++) multiply(p, ours, a, b, c);
            best[ours] = fmin(best[ours], (now() - start) / batch);
        }
        usleep(5000);
    }
    printf("%-36s %5zu %5zu %5zu %8.1f", p->name, p->M, p->N, p->K, gflop / best[1]);
    if (sgemm) printf(" %8.1f %6.2f", gflop / best[0], best[0] / best[1]), *log_sum += log(best[0] / best[1]), ++*count;
    puts(""), fflush(stdout);
    free(a), free(b), free(c);
}

// Adds up an array with all threads: the bandwidth that reading can have.
static float read_all(const float *x, size_t n) {
    float total = 0;
#ifdef _OPENMP
#pragma omp parallel for reduction(+ : total)
#endif
    for (size_t block = 0; block < n / 4096; block++) {
        float sum[128] = {0};
        for (size_t i = block * 4096; i < (block + 1) * 4096; i += 128)
            for (size_t u = 0; u < 128; u++) sum[u] += x[i + u];
        for (size_t u = 0; u < 128; u++) total += sum[u];
    }
    return total;
}

// Decoding: M tokens meet N x K weights. A pool larger than the caches holds many such matrices, and each call takes the next.
static void decode(size_t M, size_t N, size_t K, retrofit_type type, const float *pool, size_t pool_size) {
    size_t size = N * K * retrofit_type_size(type), matrices = pool_size / size;
    float *x = random_floats(M * K), *y = random_floats(M * N), total = 0;
    double best = 1e9, reading = 1e9, gb = 1e-9 * (double)(matrices * size);
    for (int round = 0; round < 5; round++) {
        double start = now();
        total += read_all(pool, matrices * size / 4);
        reading = fmin(reading, now() - start), start = now();
        for (size_t i = 0; i < matrices; i++) {
            matrix_view B = {(const char *)pool + i * size, type, 1, K};
            gemm(M, N, K, view(x, K), B, y, N, NULL, 0);
        }
        best = fmin(best, now() - start);
    }
    printf("%5zu tokens, %6zu x %5zu, %s %17.1f %8.1f %6.2f%s\n", M, N, K, type == RETROFIT_F32 ? "fp32" : "bf16", gb / best, gb / reading,
           reading / best, total == 12345 ? " " : ""); // the last: nothing may optimize the reading away
    fflush(stdout);
    free(x), free(y);
}

// Whole steps of decoding: SmolLM2-135M retrofitted (4,6,4), 32 tokens behind a prompt of 8, one at a time. Against the time it takes to read the
// weights that a token needs as often as it needs them.
static void decoding(bool bf16, const float *pool, size_t pool_size) {
    retrofit_config c = {.n_embd = 576,
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
                         .eos = -1};
    retrofit_model *m = retrofit_model_new(&c, &retrofit_cpu);
    if (!m || !retrofit_model_allocate(m, RETROFIT_INFERENCE)) puts(retrofit_error()), exit(1);
    uint16_t *halves = malloc(m->weight_count * 2), *next = halves;
    double total = 0, reading = 1e9, weights[RETROFIT_PARTS] = {0};
    for (size_t i = 0; i < m->parameter_count; i++) {
        retrofit_parameter *p = m->parameters[i];
        size_t n = p->rows * p->cols;
        for (size_t j = 0; j < n; j++) p->master[j] = p->kind == RETROFIT_NORM ? 1 : 0.05f * ((float)(retrofit_hash(i, j) >> 40) * 0x1p-23f - 1);
        if (bf16 && p->kind != RETROFIT_NORM) {
            for (size_t j = 0; j < n; j++) next[j] = retrofit_float_to_bf16(p->master[j]);
            p->weight.data = next, p->weight.type = RETROFIT_BF16, next += n;
        }
        weights[p->part] += (double)(n * retrofit_type_size(p->weight.type));
    }
    for (int round = 0; round < 5; round++) {
        double start = now();
        total += read_all(pool, pool_size / 4), reading = fmin(reading, now() - start);
    }
    double bandwidth = (double)pool_size / reading;
    for (size_t r = 1; r <= 16; r *= 4) {
        retrofit_buffers *a =
            retrofit_buffers_new(m, 1, 8, 0, RETROFIT_KEEP_NOTHING, &(retrofit_kv_cache){.capacity = 64, .recurrences = r});
        retrofit_recurrence_options how = {.recurrences = r};
        int32_t tokens[8] = {1, 2, 3, 4, 5, 6, 7, 8};
        double best = 1e9, bytes = weights[RETROFIT_PART_PRELUDE] + weights[RETROFIT_PART_CODA] + weights[RETROFIT_PART_HEAD] +
                                   (double)r * weights[RETROFIT_PART_CORE] +
                                   ((double)r + 1) / 2 * weights[RETROFIT_PART_ADAPTER]; // A_e once, A_s every time
        for (int round = 0; round < 3; round++) {
            retrofit_clear_cache(a);
            const float *logits = retrofit_next_logits(a, tokens, 1, 8, NULL, &how);
            double start = now();
            for (int i = 0; i < 32; i++) {
                int32_t id = retrofit_argmax(logits, c.vocab);
                logits = retrofit_next_logits(a, &id, 1, 1, NULL, &how);
            }
            best = fmin(best, (now() - start) / 32);
        }
        printf("a model of 107M, %s, r = %-2zu %15.1f tok/s %8.1f %8.1f %6.2f%s\n", bf16 ? "bf16" : "fp32", r, 1 / best,
               1e-9 * bytes / best, 1e-9 * bandwidth, bytes / best / bandwidth, total == 12345 ? " " : "");
        fflush(stdout), retrofit_buffers_free(a);
    }
    free(halves), retrofit_free(m);
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

int main(int argc, char **argv) {
    const char *name = getenv("OPENBLAS"), *only = argc > 1 ? argv[1] : "";
    setenv("OPENBLAS_THREAD_TIMEOUT", "20", 0); // 2^20 cycles of spinning instead of 2^26
    void *library = dlopen(name ? name : "libopenblas.so.0", RTLD_NOW);
    if (library) {
        *(void **)&sgemm = dlsym(library, "cblas_sgemm");
        *(void **)&set_threads = dlsym(library, "openblas_set_num_threads");
        if (!sgemm || !set_threads) puts("OpenBLAS: no cblas_sgemm or openblas_set_num_threads"), exit(1);
    }
    double log_sum = 0;
    int count = 0;
    printf("%d threads, vectors of %d floats\n%-36s %5s %5s %5s %8s", threads(), GEMM_LANES, "GFLOP/s", "M", "N", "K", "ours");
    puts(sgemm ? " OpenBLAS  ratio" : "");
    for (size_t i = 0; i < sizeof products / sizeof *products; i++)
        if (strstr(products[i].name, only)) compare(&products[i], &log_sum, &count);
    if (count) printf("geometric mean of the ratios: %.3f\n", exp(log_sum / count));
    if (*only && strcmp(only, "decode")) return 0;

    static const size_t weights[][2] = {{960, 576}, {3072, 576}, {576, 1536}, {49152, 576}, {11264, 2048}, {2048, 5632}};
    size_t pool_size = (size_t)256 << 20;
    float *pool = random_floats(pool_size / 4);
    printf("\n%-53s %8s %8s %6s\n", "GB/s", "ours", "reading", "ratio");
    for (int bf16 = 0; bf16 < 2; bf16++)
        for (size_t i = 0; i < sizeof weights / sizeof *weights; i++)
            for (size_t M = 1; M <= 8; M *= 2)
                decode(M, weights[i][0], weights[i][1], bf16 ? RETROFIT_BF16 : RETROFIT_F32, pool, pool_size);
    for (int bf16 = 0; bf16 < 2; bf16++) decoding(bf16, pool, pool_size);
    free(pool);
    return 0;
}

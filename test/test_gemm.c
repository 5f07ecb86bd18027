// gemm and gemm_serial against sums in double precision, with the bound that rounding explains, and
// the bits for any number of threads. The hash of all results must not depend on OMP_NUM_THREADS
// either.
#include "test.h"

static uint64_t seed = 1, hash = 14695981039346656037u;

static size_t below(size_t n) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (size_t)(seed >> 33) % n;
}

static float uniform(void) {
    return (float)below((size_t)1 << 24) / 8388608 - 1;
}

// A random matrix in a block of NaN: what is read outside of it shows. Layouts: row-major,
// column-major, and neither, each with or without a gap between rows. The data start at an odd
// element, so that nothing is aligned better than its type, and end with the block.
static matrix_view matrix(size_t rows, size_t cols, retrofit_type type, void **block) {
    size_t layout = below(5), gap = below(2) ? 1 + below(20) : 0;
    size_t inner = layout == 4 ? 2 + below(3) : 1, size = retrofit_type_size(type);
    matrix_view x = {NULL, type, cols * inner + gap, inner};
    if (layout & 1) {
        x.row = inner;
        x.col = rows * inner + gap;
    }
    size_t last_row = rows ? rows - 1 : 0, last_col = cols ? cols - 1 : 0;
    size_t bytes = (2 + last_row * x.row + last_col * x.col) * size;
    *block = malloc(bytes);
    need(*block != NULL, "memory");
    memset(*block, 0xff, bytes);
    x.data = (char *)*block + size;
    for (size_t i = 0; i < rows; i++) {
        for (size_t j = 0; j < cols; j++) {
            size_t at = 1 + i * x.row + j * x.col;
            if (type == RETROFIT_F32) ((float *)*block)[at] = uniform();
            else ((uint16_t *)*block)[at] = retrofit_float_to_bf16(uniform());
        }
    }
    return x;
}

static double element(matrix_view x, size_t i, size_t j) {
    size_t at = i * x.row + j * x.col;
    if (x.type == RETROFIT_F32) return ((const float *)x.data)[at];
    return retrofit_bf16_to_float(((const uint16_t *)x.data)[at]);
}

// What is added to the product: nothing, a matrix of its own, or C itself.
enum { NO_D, OWN_D, C_AS_D, D_KINDS };

// One product with all that goes with it.
typedef struct {
    size_t M, N, K, c_row, d_row, count; // count: elements of c
    matrix_view A, B;
    int kind;
    float *c, *again, *before, *other;   // results; what C held; a matrix D of its own
} product;

static const float *added(const product *p, const float *c) {
    return p->kind == NO_D ? NULL : p->kind == OWN_D ? p->other : c;
}

// Whether gemm takes another order of terms than gemm_serial.
static bool has_few_rows(const product *p) {
    return is_few(&(matrix_product){p->M, p->N, p->K, p->A, p->B, NULL, NULL, 0, 0});
}

// gemm gives the same bits with 1, 3 and 5 threads and as many as there are, and so does
// gemm_serial where its order is the same.
static void compare_threads(product *p) {
    for (int threads = has_few_rows(p) ? 1 : 0; threads < 5; threads++) {
#ifdef _OPENMP
        int usual = omp_get_max_threads();
        if (threads > 1) omp_set_num_threads(threads * 2 - 3);
#endif
        memcpy(p->again, p->before, p->count * sizeof(float));
        (threads ? gemm : gemm_serial)(p->M, p->N, p->K, p->A, p->B, p->again, p->c_row,
                                       added(p, p->again), p->d_row);
        bool same = !memcmp(p->c, p->again, p->count * sizeof(float));
        check(same, "%zu x %zu x %zu: other bits (%d)", p->M, p->N, p->K, threads);
#ifdef _OPENMP
        omp_set_num_threads(usual);
#endif
    }
}

// A row has the bits that it has alone: up to 64 rows of weights' products in gemm, and any number
// in gemm_serial.
static void compare_rows(product *p) {
    bool few = has_few_rows(p);
    memcpy(p->again, p->before, p->count * sizeof(float));
    for (size_t i = 0; i < p->M; i++) {
        float *c = p->again + i * p->c_row;
        const float *d = added(p, p->again) ? added(p, p->again) + i * p->d_row : NULL;
        (few ? gemm : gemm_serial)(1, p->N, p->K, view_part(p->A, i, 0), p->B, c, p->c_row, d,
                                   p->d_row);
    }
    bool same = !memcmp(p->c, p->again, p->count * sizeof(float));
    check(same, "%zu x %zu x %zu: a row alone has other bits", p->M, p->N, p->K);
}

// Whether element (i, j) of C is the sum, up to rounding; what lies between rows is as it was.
static bool is_right(const product *p, size_t i, size_t j) {
    size_t at = i * p->c_row + j;
    if (j >= p->N) return !memcmp(&p->c[at], &p->before[at], sizeof(float));
    double sum = 0;
    if (p->kind == OWN_D) sum = p->other[i * p->d_row + j];
    if (p->kind == C_AS_D) sum = p->before[at];
    double size = fabs(sum);
    for (size_t k = 0; k < p->K; k++) {
        double term = element(p->A, i, k) * element(p->B, k, j);
        sum += term;
        size += fabs(term);
    }
    return fabs(p->c[at] - sum) <= ((double)p->K + 2) * 0x1p-24 * size;
}

static void compare(size_t M, size_t N, size_t K) {
    void *block[2];
    product p = {.M = M, .N = N, .K = K};
    p.A = matrix(M, K, below(2) ? RETROFIT_F32 : RETROFIT_BF16, &block[0]);
    p.B = matrix(K, N, below(2) ? RETROFIT_F32 : RETROFIT_BF16, &block[1]);
    p.c_row = N + below(3) * 5;
    p.d_row = N + below(3) * 3;
    p.kind = (int)below(D_KINDS);
    p.count = M * p.c_row + 1;
    size_t others = M * p.d_row + 1, wrong = 0;
    p.c = malloc(p.count * sizeof(float));
    p.again = malloc(p.count * sizeof(float));
    p.before = malloc(p.count * sizeof(float));
    p.other = malloc(others * sizeof(float));
    need(p.c && p.again && p.before && p.other, "memory");
    for (size_t i = 0; i < p.count; i++) p.before[i] = p.kind == C_AS_D ? uniform() : NAN;
    for (size_t i = 0; i < others; i++) p.other[i] = uniform();
    if (p.kind == C_AS_D) p.d_row = p.c_row;
    memcpy(p.c, p.before, p.count * sizeof(float));

    gemm(M, N, K, p.A, p.B, p.c, p.c_row, added(&p, p.c), p.d_row);
    compare_threads(&p);
    compare_rows(&p);
    for (size_t i = 0; i < M; i++) {
        for (size_t j = 0; j < p.c_row; j++) {
            uint32_t bits;
            memcpy(&bits, &p.c[i * p.c_row + j], sizeof bits);
            hash = (hash ^ bits) * 1099511628211u;
            if (!is_right(&p, i, j)) wrong++;
        }
    }
    check(!wrong, "%zu x %zu x %zu: %zu elements are wrong", M, N, K, wrong);
    free(block[0]);
    free(block[1]);
    free(p.c);
    free(p.again);
    free(p.before);
    free(p.other);
}

// One NaN or infinity in A or B must spoil its row or column of C (0 times either is NaN), and
// nothing else.
static void spoil(size_t M, size_t N, size_t K, bool in_a, float value, bool transposed) {
    float *a = retrofit_allocate(M * K, sizeof *a), *b = retrofit_allocate(K * N, sizeof *b);
    float *c = retrofit_allocate(M * N, sizeof *c);
    need(a && b && c, "memory");
    matrix_view A = transposed ? view_transposed(a, M) : view(a, K);
    matrix_view B = transposed ? view_transposed(b, K) : view(b, N);
    size_t i = below(M), j = below(N), k = below(K), wrong = 0;
    if (in_a) a[i * A.row + k * A.col] = value;
    else b[k * B.row + j * B.col] = value;
    gemm(M, N, K, A, B, c, N, NULL, 0);
    for (size_t at = 0; at < M * N; at++) {
        bool spoilt = in_a ? at / N == i : at % N == j;
        wrong += spoilt ? !isnan(c[at]) : c[at] != 0;
    }
    check(!wrong, "%zu x %zu x %zu: %zu elements are wrong after a %g", M, N, K, wrong, value);
    free(a);
    free(b);
    free(c);
}

int main(void) {
    for (int i = 0; i < 2000; i++) {
        size_t M = below(i % 2 ? 9 : 70) + 1, N = below(70) + 1, K = below(70) + 1;
        compare(i % 50 == 0 ? 0 : M, i % 50 == 1 ? 0 : N, i % 50 == 2 ? 0 : K);
    }
    for (int i = 0; i < 40; i++) {
        size_t longest = below(3);
        size_t M = below(150) + 1, N = below(150) + 1, K = below(150) + 1;
        compare(longest == 0 ? M * 8 : M, longest == 1 ? N * 8 : N, longest == 2 ? K * 8 : K);
        compare(1 + below(9), N, K * 150); // more terms than a buffer holds
    }
    compare(192, 64, 3840);
    compare(80, 16, 80);
    compare(80, 80, 16);
    compare(256, 960, 576);
    compare(33, 2000, 1000);
    for (int i = 0; i < 800; i++) {
        size_t M = 1 + below(i % 2 ? 8 : 40), N = 1 + below(60), K = 1 + below(i % 8 ? 40 : 1000);
        spoil(M, N, K, i & 4, i & 16 ? NAN : INFINITY, i & 32);
    }
    printf("gemm's bits: %016llx\n", (unsigned long long)hash);
    return finish("gemm");
}

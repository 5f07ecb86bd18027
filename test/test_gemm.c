// gemm and gemm_serial against sums in double precision, with the bound that rounding explains, and the bits for any number of threads.
// The hash of all results must not depend on OMP_NUM_THREADS either.
#include "test.h"

static uint64_t seed = 1, hash = 14695981039346656037u;
static size_t below(size_t n) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (size_t)(seed >> 33) % n;
}
static float uniform(void) { return (float)below((size_t)1 << 24) / 8388608 - 1; }

// A random matrix in a block of NaN: read outside, it shows. Layouts: row-major, column-major, and neither, each with or without a gap
// between rows. The data start at an odd element, so that nothing is aligned better than its type, and end with the block.
static matrix_view matrix(size_t rows, size_t cols, retrofit_type type, void **block) {
    size_t layout = below(5), gap = below(2) ? 1 + below(20) : 0, inner = layout == 4 ? 2 + below(3) : 1, size = retrofit_type_size(type);
    matrix_view x = {NULL, type, layout & 1 ? inner : cols * inner + gap, layout & 1 ? rows * inner + gap : inner};
    size_t bytes = (2 + (rows ? rows - 1 : 0) * x.row + (cols ? cols - 1 : 0) * x.col) * size;
    *block = malloc(bytes);
    need(*block != NULL, "memory");
    memset(*block, 0xff, bytes);
    x.data = (char *)*block + size;
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++) {
            size_t at = 1 + i * x.row + j * x.col;
            if (type == RETROFIT_F32) ((float *)*block)[at] = uniform();
            else ((uint16_t *)*block)[at] = retrofit_float_to_bf16(uniform());
        }
    return x;
}
static double element(matrix_view x, size_t i, size_t j) {
    size_t at = i * x.row + j * x.col;
    return x.type == RETROFIT_F32 ? ((const float *)x.data)[at] : retrofit_bf16_to_float(((const uint16_t *)x.data)[at]);
}

static void compare(size_t M, size_t N, size_t K) {
    void *block[2];
    matrix_view A = matrix(M, K, below(2) ? RETROFIT_F32 : RETROFIT_BF16, &block[0]);
    matrix_view B = matrix(K, N, below(2) ? RETROFIT_F32 : RETROFIT_BF16, &block[1]);
    size_t c_row = N + below(3) * 5, d_row = N + below(3) * 3, kind = below(3), count = M * c_row + 1, wrong = 0; // no D, a D, C itself
    float *c = (float *)malloc(count * 4), *again = (float *)malloc(count * 4), *before = (float *)malloc(count * 4);
    float *other = (float *)malloc((M * d_row + 1) * 4);
    need(c && again && before && other, "memory");
    for (size_t i = 0; i < count; i++) before[i] = kind == 2 ? uniform() : NAN;
    for (size_t i = 0; i < M * d_row + 1; i++) other[i] = uniform();
    if (kind == 2) d_row = c_row;
    memcpy(c, before, count * 4);
    gemm_serial(M, N, K, A, B, c, c_row, kind == 0 ? NULL : kind == 1 ? other : c, d_row);
    for (int threads = 0; threads < 4; threads++) { // 0: as many as there are
#ifdef _OPENMP
        int usual = omp_get_max_threads();
        if (threads) omp_set_num_threads(threads * 2 - 1);
#endif
        memcpy(again, before, count * 4);
        gemm(M, N, K, A, B, again, c_row, kind == 0 ? NULL : kind == 1 ? other : again, d_row);
        check(!memcmp(c, again, count * 4), "%zu x %zu x %zu: gemm and gemm_serial differ (%d)", M, N, K, threads);
#ifdef _OPENMP
        omp_set_num_threads(usual);
#endif
    }
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < c_row; j++) {
            size_t x = i * c_row + j;
            uint32_t bits;
            memcpy(&bits, &c[x], 4);
            hash = (hash ^ bits) * 1099511628211u;
            if (j >= N) { // between rows
                wrong += memcmp(&c[x], &before[x], 4) != 0;
                continue;
            }
            double sum = kind == 0 ? 0 : kind == 1 ? other[i * d_row + j] : before[x], size = fabs(sum);
            for (size_t k = 0; k < K; k++) {
                double product = element(A, i, k) * element(B, k, j);
                sum += product, size += fabs(product);
            }
            wrong += !(fabs(c[x] - sum) <= ((double)K + 2) * 0x1p-24 * size);
        }
    check(!wrong, "%zu x %zu x %zu: %zu elements are wrong", M, N, K, wrong);
    free(block[0]), free(block[1]), free(c), free(again), free(before), free(other);
}

// One NaN or infinity in A or B must spoil its row or column of C (0 times either is NaN), and nothing else.
static void spoil(size_t M, size_t N, size_t K, bool in_a, float value, bool transposed) {
    float *a = (float *)retrofit_allocate(M * K, 4), *b = (float *)retrofit_allocate(K * N, 4), *c = (float *)retrofit_allocate(M * N, 4);
    need(a && b && c, "memory");
    matrix_view A = transposed ? view_transposed(a, M) : view(a, K), B = transposed ? view_transposed(b, K) : view(b, N);
    size_t i = below(M), j = below(N), k = below(K), wrong = 0;
    if (in_a) a[i * A.row + k * A.col] = value;
    else b[k * B.row + j * B.col] = value;
    gemm(M, N, K, A, B, c, N, NULL, 0);
    for (size_t x = 0; x < M * N; x++) wrong += (in_a ? x / N == i : x % N == j) ? !isnan(c[x]) : c[x] != 0;
    check(!wrong, "%zu x %zu x %zu: %zu elements are wrong after a %g", M, N, K, wrong, value);
    free(a), free(b), free(c);
}

int main(void) {
    for (int i = 0; i < 2000; i++) {
        size_t M = below(i % 2 ? 9 : 70) + 1, N = below(70) + 1, K = below(70) + 1;
        compare(i % 50 == 0 ? 0 : M, i % 50 == 1 ? 0 : N, i % 50 == 2 ? 0 : K);
    }
    for (int i = 0; i < 40; i++) {
        size_t longest = below(3), M = below(150) + 1, N = below(150) + 1, K = below(150) + 1;
        compare(longest == 0 ? M * 8 : M, longest == 1 ? N * 8 : N, longest == 2 ? K * 8 : K);
        compare(1 + below(9), N, K * 150); // more than a buffer's worth of k
    }
    compare(192, 64, 3840), compare(80, 16, 80), compare(80, 80, 16), compare(256, 960, 576), compare(33, 2000, 1000);
    for (int i = 0; i < 800; i++)
        spoil(1 + below(i % 2 ? 8 : 40), 1 + below(60), 1 + below(i % 8 ? 40 : 1000), i & 4, i & 16 ? NAN : INFINITY, i & 32);
    printf("gemm's bits: %016llx\n", (unsigned long long)hash);
    return finish("gemm");
}

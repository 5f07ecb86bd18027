// Every operation of a table against its definition: plain loops in double, and central differences
// of those loops for derivatives.
//
// Inputs are first rounded to the type in which the table holds them, so that a reference sees the
// very same numbers. What remains are the roundings of the operation itself. One rounding to fp32
// changes a number by at most U = 2^-24 of itself. K roundings of independent sign add up to about
// √K of them (Higham and Mary 2019), so a sum of K terms may be off by (4 + 2√K)·U·Σ|terms|, and an
// output in bf16 by 2^-8 of itself more. Gradients of what is not linear are compared tensor by
// tensor: ‖a - b‖ / ‖b‖ must be below 20·U, for bf16 below 20·U + 4·2^-8.
#include "test.h"
#include <float.h>

#ifndef __has_feature
#define __has_feature(x) 0
#endif
// Bytes behind each block on the device that must stay as they are. AddressSanitizer watches what
// lies behind a block itself, reads too.
#if defined __SANITIZE_ADDRESS__ || __has_feature(address_sanitizer)
static const size_t guard = 0;
#else
static const size_t guard = 64;
#endif

static const double U = 0x1p-24, U_BF16 = 0x1p-8;

static const retrofit_ops *ops; // the table under test
static bool on_cpu;             // a CPU reads matrices in either type, a GPU in its act_type only
static char op[64];             // the table and the operation under test
static char sizes[256];         // and the sizes of its arguments: both go into every message
static size_t trials, trial;    // trial 0 has the smallest sizes, 1 the largest, others random ones
static bool replay;             // the second run, which only has to repeat the first one's bits
static uint64_t digest;         // of all bits that operations have returned
static uint64_t rng, draws;     // the seed of the random numbers, and how many have been drawn

static double uniform(void) { return retrofit_hash_uniform(rng, draws++); }

static double normal(void) {
    double radius = sqrt(-2 * log(uniform()));
    return radius * cos(2 * 3.14159265358979323846 * uniform());
}

static size_t random_between(size_t min, size_t max) {
    return min + (size_t)(uniform() * (double)(max - min + 1));
}

static size_t pick_size(size_t min, size_t max) {
    if (trial == 0) return min;
    if (trial == 1) return max;
    return random_between(min, max);
}

__attribute__((format(printf, 1, 2))) static void describe(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(sizes, sizeof sizes, format, args);
    va_end(args);
}

// ---- Arrays: numbers on the host in double, and the same on the device -------------------------
typedef struct {
    retrofit_type type;
    size_t n;
    double *host;
    void *data;   // on the device
    float *f32;   // the same address, for an array of fp32
    int32_t *i32; // the same address, for an array of integers
} array;

// What a trial allocates lives until `release` at the trial's end.
enum { MAX_HOST_BLOCKS = 256, MAX_DEVICE_BLOCKS = 64 };
static void *host_blocks[MAX_HOST_BLOCKS], *device_blocks[MAX_DEVICE_BLOCKS];
static size_t host_count, device_count;

static void release(void) {
    while (host_count) free(host_blocks[--host_count]);
    while (device_count) ops->free(device_blocks[--device_count]);
}

static double *zeros(size_t n) {
    double *x = retrofit_allocate(n, sizeof *x);
    need(x && host_count < MAX_HOST_BLOCKS, "memory");
    host_blocks[host_count++] = x;
    return x;
}

static double *copy_of(const double *x, size_t n) { return memcpy(zeros(n), x, n * sizeof *x); }

static double *magnitudes(const double *x, size_t n) {
    double *out = zeros(n);
    for (size_t i = 0; i < n; i++) out[i] = fabs(x[i]);
    return out;
}

static void *device_alloc(size_t bytes) {
    void *p = ops->alloc(bytes);
    need(p && device_count < MAX_DEVICE_BLOCKS, "device memory");
    device_blocks[device_count++] = p;
    return p;
}

typedef union {
    float f32;
    uint16_t bf16;
    int32_t i32;
    double f64; // as large as any element of a file
} element;

static double decode(retrofit_type type, const void *from) {
    element e;
    memcpy(&e, from, retrofit_type_size(type));
    if (type == RETROFIT_F32) return e.f32;
    if (type == RETROFIT_BF16) return retrofit_bf16_to_float(e.bf16);
    return e.i32;
}

static void encode(retrofit_type type, void *to, double x) {
    element e;
    if (type == RETROFIT_F32) e.f32 = (float)x;
    else if (type == RETROFIT_BF16) e.bf16 = retrofit_float_to_bf16((float)x);
    else e.i32 = (int32_t)x;
    memcpy(to, &e, retrofit_type_size(type));
}

// Also rounds a.host to what the device gets. NaN goes there in two forms: at even places as the
// conversion makes it, at odd ones with all bits set, as memset(…, 0xff) leaves it.
static void upload(array a) {
    size_t size = retrofit_type_size(a.type);
    char *bytes = retrofit_allocate(a.n * size + guard, 1);
    need(bytes != NULL, "memory");
    for (size_t i = 0; i < a.n; i++) {
        char *at = bytes + i * size;
        if (isnan(a.host[i]) && i % 2) memset(at, 0xff, size);
        else encode(a.type, at, a.host[i]);
        a.host[i] = decode(a.type, at);
    }
    memset(bytes + a.n * size, 0xa5, guard);
    ops->upload(a.data, bytes, a.n * size + guard);
    free(bytes);
}

static double *download(array a) {
    size_t size = retrofit_type_size(a.type), broken = 0;
    unsigned char *bytes = retrofit_allocate(a.n * size + guard, 1);
    need(bytes != NULL, "memory");
    ops->download(bytes, a.data, a.n * size + guard);
    double *x = zeros(a.n);
    for (size_t i = 0; i < a.n; i++) x[i] = decode(a.type, bytes + i * size);
    for (size_t i = 0; i < a.n * size; i++) digest = (digest ^ bytes[i]) * 0x100000001b3;
    for (size_t i = 0; i < guard; i++) broken += bytes[a.n * size + i] != 0xa5;
    free(bytes);
    check(!broken, "%s, %s: wrote %zu bytes behind the end of an array of %zu", op, sizes, broken,
          a.n);
    return x;
}

static array array_of(retrofit_type type, size_t n, double *host) {
    void *data = device_alloc(n * retrofit_type_size(type) + guard);
    array a = {type, n, host, data, data, data};
    upload(a);
    return a;
}

// Outputs that an operation sets begin as NaN, which shows unless it is overwritten.
static array unset(retrofit_type type, size_t n) {
    double *x = zeros(n);
    for (size_t i = 0; i < n; i++) x[i] = NAN;
    return array_of(type, n, x);
}

static array random_array(retrofit_type type, size_t n, double scale) {
    double *x = zeros(n);
    for (size_t i = 0; i < n; i++) x[i] = scale * normal();
    return array_of(type, n, x);
}

static array unset_f32(size_t n) { return unset(RETROFIT_F32, n); }
static array unset_act(size_t n) { return unset(ops->act_type, n); }
static array random_f32(size_t n) { return random_array(RETROFIT_F32, n, 1); }
static array random_act(size_t n, double scale) { return random_array(ops->act_type, n, scale); }

static array random_integers(size_t n, size_t min, size_t max) {
    double *x = zeros(n);
    for (size_t i = 0; i < n; i++) x[i] = (double)random_between(min, max);
    return array_of(RETROFIT_I32, n, x);
}

// Between the rows lies NaN, behind the last one nothing.
static array random_matrix(retrofit_type type, size_t rows, size_t cols, size_t stride) {
    size_t n = (rows - 1) * stride + cols;
    double *x = zeros(n);
    for (size_t i = 0; i < n; i++) x[i] = i % stride < cols ? normal() : NAN;
    return array_of(type, n, x);
}

static void set_nan(array a, size_t i) {
    a.host[i] = NAN;
    upload(a);
}

// One number in double, which is how operations return sums.
static double *device_number(double x) {
    double *number = device_alloc(sizeof x);
    ops->upload(number, &x, sizeof x);
    return number;
}

static double download_number(const double *number) {
    double x;
    ops->download(&x, number, sizeof x);
    return x;
}

// ---- Comparisons -------------------------------------------------------------------------------
// The largest relative error of one rounding.
static double rounding_of(retrofit_type type) {
    if (type == RETROFIT_F32) return U;
    return type == RETROFIT_BF16 ? U_BF16 : 0;
}

// The error of a sum of K terms, relative to the sum of their magnitudes.
static double sum_error(size_t K) { return (4 + 2 * sqrt((double)K)) * U; }

// The difference relative to what it may be. NaN must stand where, and only where, it is wanted.
static double relative_to(double bound, double got, double want) {
    if (isnan(want) && isnan(got)) return 0;
    if (isnan(want) || isnan(got)) return INFINITY;
    return fabs(got - want) / bound;
}

// Element by element: |out - want| <= error·|terms| + one rounding of the result. Without terms
// that leaves equality for numbers that the type can hold. Where terms are infinite, anything goes.
static void check_near(const char *what, array out, const double *want, const double *terms,
                       double error) {
    const double *got = download(out);
    double worst = 0;
    size_t at = 0, wrong = 0, first = 0;
    for (size_t i = 0; !replay && i < out.n; i++) {
        if (terms && isinf(terms[i])) continue;
        double bound = rounding_of(out.type) * fabs(want[i]) + FLT_MIN;
        if (terms) bound += error * fabs(terms[i]);
        double excess = relative_to(bound, got[i], want[i]);
        if (!(excess <= 1) && wrong++ == 0) first = i;
        if (excess <= worst) continue;
        worst = excess;
        at = i;
    }
    check(wrong == 0,
          "%s, %s: %s[%zu] is %.9g, should be %.9g: the first of %zu wrong ones of %zu; the worst, "
          "[%zu], is %.9g, should be %.9g: %.3g times the error that rounding explains",
          op, sizes, what, first, got[first], want[first], wrong, out.n, at, got[at], want[at],
          worst);
}

// As a tensor: ‖out - want‖ / ‖want‖.
static void check_tensor(const char *what, array out, const double *want) {
    const double *got = download(out);
    double difference = 0, size = 0, limit = 20 * U;
    size_t at = 0; // of the largest difference
    if (ops->act_type == RETROFIT_BF16) limit += 4 * U_BF16;
    for (size_t i = 0; i < out.n; i++) {
        if (!(fabs(got[i] - want[i]) <= fabs(got[at] - want[at]))) at = i;
        difference += (got[i] - want[i]) * (got[i] - want[i]);
        size += want[i] * want[i];
    }
    double error = difference == 0 ? 0 : sqrt(difference / size);
    check(replay || error < limit,
          "%s, %s: %s is off by %.3g of its norm, more than %.3g; most at [%zu]: it is %.9g, "
          "should be %.9g",
          op, sizes, what, error, limit, at, got[at], want[at]);
}

// A sum that the operation has left in a number on the device. It is summed in double, but a few
// hundred terms at a time may be summed in fp32.
static void check_sum(const double *sum, double want, double error) {
    double got = download_number(sum);
    digest += (uint64_t)llrint(ldexp(got, 20)) * (trial + 1);
    check(fabs(got - want) <= error * want, "%s, %s: the sum is %.17g, should be %.17g", op, sizes,
          got, want);
}

// Σ weights·(upper - lower).
static double lower[1 << 15];
static double weighted_change(const double *upper, const double *weights, size_t count) {
    double sum = 0;
    for (size_t i = 0; i < count; i++) sum += weights[i] * (upper[i] - lower[i]);
    return sum;
}

// out[i] += ∂(weights·y)/∂x[i] by central differences, (y(x + δ) - y(x - δ)) / 2δ, where the
// statement `forward` computes y from x. In double the error is about 1e-9. It is a macro so that
// `forward` can be any call, with whatever arguments the operation has.
#define DIFFERENCES(out, x, x_count, forward, y, weights, y_count)             \
    for (size_t i_ = 0; !replay && i_ < (x_count); i_++) {                     \
        double kept_ = (x)[i_], below_ = kept_ - 1e-5, above_ = kept_ + 1e-5;  \
        (x)[i_] = below_;                                                      \
        forward;                                                               \
        memcpy(lower, y, (y_count) * sizeof *lower);                           \
        (x)[i_] = above_;                                                      \
        forward;                                                               \
        (x)[i_] = kept_;                                                       \
        (out)[i_] += weighted_change(y, weights, y_count) / (above_ - below_); \
    }

// ---- Embedding ---------------------------------------------------------------------------------
static void reference_embedding(double *x, const double *tokens, const double *wte, size_t stride,
                                size_t N, size_t d) {
    for (size_t i = 0; i < N * d; i++) x[i] = wte[(size_t)tokens[i / d] * stride + i % d];
}

static void test_embedding_forward(void) {
    size_t N = pick_size(1, 70), d = trial == 2 ? 2500 : pick_size(1, 100);
    size_t V = pick_size(1, 50), stride = d + trial % 3;
    retrofit_type type = trial % 2 ? RETROFIT_BF16 : RETROFIT_F32;
    describe("N %zu d %zu V %zu stride %zu, %s", N, d, V, stride, trial % 2 ? "bf16" : "f32");
    array tokens = random_integers(N, 0, V - 1), x = unset_f32(N * d);
    array wte = random_matrix(type, V, d, stride);
    retrofit_weight weight = {wte.data, type, stride};
    ops->embedding_forward(x.f32, tokens.i32, weight, N, d);
    double *want = zeros(N * d);
    reference_embedding(want, tokens.host, wte.host, stride, N, d);
    check_near("x", x, want, NULL, 0);
}

static void test_embedding_backward(void) {
    size_t N = trial == 2 ? 600 : pick_size(1, 70);
    size_t d = trial == 2 ? 3 : trial == 3 ? 300 : pick_size(1, 100);
    size_t V = pick_size(1, 20); // tokens repeat, and some do not occur
    if (trial == 3) {
        N = 5;
        V = 2;
    }
    describe("N %zu d %zu V %zu", N, d, V);
    array tokens = random_integers(N, 0, V - 1), dx = random_f32(N * d), dwte = random_f32(V * d);
    ops->embedding_backward(dwte.f32, tokens.i32, dx.f32, N, d);

    double *wte = zeros(V * d), *x = zeros(N * d);
    double *want = copy_of(dwte.host, V * d), *terms = magnitudes(dwte.host, V * d);
    DIFFERENCES(want, wte, V * d, reference_embedding(x, tokens.host, wte, d, N, d), x, dx.host,
                N * d);
    for (size_t i = 0; i < N * d; i++)
        terms[(size_t)tokens.host[i / d] * d + i % d] += fabs(dx.host[i]);
    check_near("dwte", dwte, want, terms, sum_error(N));
}

// ---- RMSNorm -----------------------------------------------------------------------------------
static void reference_rmsnorm(double *out, double *rstd, const double *x, const double *weight,
                              size_t N, size_t d, double eps) {
    for (size_t n = 0; n < N; n++) {
        double squares = 0;
        for (size_t c = 0; c < d; c++) squares += x[n * d + c] * x[n * d + c];
        rstd[n] = 1 / sqrt(squares / (double)d + eps);
        for (size_t c = 0; c < d; c++) out[n * d + c] = x[n * d + c] * rstd[n] * weight[c];
    }
}

static void test_rmsnorm_forward(void) {
    size_t N = pick_size(1, 70), d = trial == 2 ? 2500 : pick_size(1, 100);
    float eps = trial % 2 ? 1e-5f : 0.1f;
    bool with_nan = trial % 3 == 2;
    describe("N %zu d %zu eps %g%s", N, d, eps, with_nan ? ", with NaN" : "");
    array x = random_f32(N * d), weight = random_f32(d);
    array out = unset_act(N * d), rstd = unset_f32(N);
    if (with_nan && trial % 2) set_nan(x, random_between(0, N * d - 1));
    if (with_nan && !(trial % 2)) set_nan(weight, random_between(0, d - 1));
    ops->rmsnorm_forward(out.data, rstd.f32, x.f32, weight.f32, N, d, eps);

    // The terms of Σx² are positive: sum, root and quotient are each off by a part of themselves.
    double *want = zeros(N * d), *want_rstd = zeros(N);
    reference_rmsnorm(want, want_rstd, x.host, weight.host, N, d, eps);
    check_near("out", out, want, want, sum_error(d));
    check_near("rstd", rstd, want_rstd, want_rstd, sum_error(d));
}

static void test_rmsnorm_backward(void) {
    size_t N = trial == 2 ? 2500 : trial == 3 ? 2 : pick_size(1, 70);
    size_t d = trial == 2 ? 4 : trial == 3 ? 2100 : pick_size(1, 100);
    // In trial 0, d = 1: there y is ±weight but for eps, and dx the small difference of two large
    // terms, so eps must not be small.
    double eps = trial % 2 ? 1e-5 : 0.1;
    describe("N %zu d %zu eps %g", N, d, eps);
    array x = random_f32(N * d), weight = random_f32(d), dout = random_act(N * d, 1);
    array dx = random_f32(N * d), dweight = random_f32(d);

    double *y = zeros(N * d), *r = zeros(N);
    double *want = copy_of(dx.host, N * d), *want_weight = copy_of(dweight.host, d);
    DIFFERENCES(want_weight, weight.host, d,
                reference_rmsnorm(y, r, x.host, weight.host, N, d, eps), y, dout.host, N * d);
    for (size_t n = 0; n < N; n++) { // a row depends on itself alone
        double *row = x.host + n * d;
        DIFFERENCES(want + n * d, row, d, reference_rmsnorm(y, r, row, weight.host, 1, d, eps), y,
                    dout.host + n * d, d);
    }
    reference_rmsnorm(y, r, x.host, weight.host, N, d, eps);
    array rstd = array_of(RETROFIT_F32, N, r);
    ops->rmsnorm_backward(dx.f32, dweight.f32, dout.data, x.f32, rstd.f32, weight.f32, N, d);
    check_tensor("dx", dx, want);
    check_tensor("dweight", dweight, want_weight);

    upload(dx); // a frozen weight has no gradient
    ops->rmsnorm_backward(dx.f32, NULL, dout.data, x.f32, rstd.f32, weight.f32, N, d);
    check_tensor("dx without dweight", dx, want);

    // With a NaN in dout all of its row is NaN, and its element of the weight, and nothing else.
    size_t bad = random_between(0, N * d - 1);
    double *dx_nan = download(dx), *dweight_nan = download(dweight);
    for (size_t c = 0; c < d; c++) dx_nan[bad / d * d + c] = NAN;
    dweight_nan[bad % d] = NAN;
    set_nan(dout, bad);
    upload(dx);
    upload(dweight);
    ops->rmsnorm_backward(dx.f32, dweight.f32, dout.data, x.f32, rstd.f32, weight.f32, N, d);
    check_near("dx with NaN", dx, dx_nan, NULL, 0);
    check_near("dweight with NaN", dweight, dweight_nan, NULL, 0);
}

// ---- RMSNorm behind a branch -------------------------------------------------------------------
static void test_rmsnorm_residual_forward(void) {
    size_t N = pick_size(1, 70), d = trial == 2 ? 2500 : pick_size(1, 100);
    float eps = trial % 2 ? 1e-5f : 0.1f;
    bool in_place = trial % 3 == 1;
    describe("N %zu d %zu eps %g%s", N, d, eps, in_place ? ", in place" : "");
    array x = random_f32(N * d), weight = random_f32(d), residual = random_f32(N * d);
    array out = in_place ? residual : unset_f32(N * d), rstd = unset_f32(N);
    double *want = zeros(N * d), *want_rstd = zeros(N), *terms = zeros(N * d);
    reference_rmsnorm(want, want_rstd, x.host, weight.host, N, d, eps);
    for (size_t i = 0; i < N * d; i++) {
        terms[i] = fabs(want[i]) + fabs(residual.host[i]);
        want[i] += residual.host[i];
    }
    ops->rmsnorm_residual_forward(out.f32, rstd.f32, residual.f32, x.f32, weight.f32, N, d, eps);
    check_near("out", out, want, terms, sum_error(d));
    check_near("rstd", rstd, want_rstd, want_rstd, sum_error(d));
}

static void test_rmsnorm_residual_backward(void) {
    size_t N = trial == 2 ? 2500 : pick_size(1, 70);
    size_t d = trial == 2 ? 4 : trial == 3 ? 2100 : pick_size(1, 100);
    if (trial == 3) N = 2;
    double eps = trial % 2 ? 1e-5 : 0.1;
    describe("N %zu d %zu eps %g", N, d, eps);
    array x = random_f32(N * d), weight = random_f32(d), dout = random_f32(N * d);
    array dinp = unset_act(N * d), dweight = random_f32(d);
    double *y = zeros(N * d), *r = zeros(N), *want = zeros(N * d);
    double *want_weight = copy_of(dweight.host, d);
    DIFFERENCES(want_weight, weight.host, d,
                reference_rmsnorm(y, r, x.host, weight.host, N, d, eps), y, dout.host, N * d);
    for (size_t n = 0; n < N; n++) {
        double *row = x.host + n * d;
        DIFFERENCES(want + n * d, row, d, reference_rmsnorm(y, r, row, weight.host, 1, d, eps), y,
                    dout.host + n * d, d);
    }
    reference_rmsnorm(y, r, x.host, weight.host, N, d, eps);
    array rstd = array_of(RETROFIT_F32, N, r);
    double *terms = magnitudes(dweight.host, d);
    for (size_t i = 0; i < N * d; i++)
        terms[i % d] += fabs(dout.host[i] * x.host[i] * rstd.host[i / d]);
    ops->rmsnorm_residual_backward(dinp.data, dweight.f32, dout.f32, x.f32, rstd.f32, weight.f32, N,
                                   d);
    check_tensor("dinp", dinp, want);
    check_near("dweight", dweight, want_weight, terms, sum_error(N));
    ops->rmsnorm_residual_backward(dinp.data, NULL, dout.f32, x.f32, rstd.f32, weight.f32, N, d);
    check_tensor("dinp without dweight", dinp, want);
}

// ---- Biases ------------------------------------------------------------------------------------
static void test_bias_forward(void) {
    size_t N = pick_size(1, 70), O = trial == 2 ? 2500 : pick_size(1, 100);
    describe("N %zu O %zu", N, O);
    array y = random_act(N * O, 1), bias = random_f32(O);
    double *want = zeros(N * O), *terms = zeros(N * O);
    for (size_t i = 0; i < N * O; i++) {
        want[i] = y.host[i] + bias.host[i % O];
        terms[i] = fabs(y.host[i]) + fabs(bias.host[i % O]);
    }
    ops->bias_forward(y.data, bias.f32, N, O);
    check_near("y", y, want, terms, 2 * U);
}

static void test_bias_backward(void) {
    size_t N = trial == 2 ? 2500 : pick_size(1, 70), O = trial == 3 ? 2500 : pick_size(1, 100);
    describe("N %zu O %zu", N, O);
    array dy = random_act(N * O, 1), dbias = random_f32(O);
    double *want = copy_of(dbias.host, O), *terms = magnitudes(dbias.host, O);
    for (size_t i = 0; i < N * O; i++) {
        want[i % O] += dy.host[i];
        terms[i % O] += fabs(dy.host[i]);
    }
    ops->bias_backward(dbias.f32, dy.data, N, O);
    check_near("dbias", dbias, want, terms, sum_error(N));
}

// ---- Matrix products ---------------------------------------------------------------------------
// Element (i, j) of a matrix is x[i·row + j·col].
typedef struct {
    const double *x;
    size_t row, col;
} strided;

static strided by_rows(const double *x, size_t stride) { return (strided){x, stride, 1}; }
static strided by_columns(const double *x, size_t stride) { return (strided){x, 1, stride}; }

// out (M,N), rows `stride` apart, += a·b; terms += |a|·|b|, if wanted.
static void add_product(double *out, double *terms, size_t stride, size_t M, size_t N, size_t K,
                        strided a, strided b) {
    for (size_t i = 0; i < M * N; i++) {
        size_t row = i / N, col = i % N, to = row * stride + col;
        for (size_t k = 0; k < K; k++) {
            double term = a.x[row * a.row + k * a.col] * b.x[k * b.row + col * b.col];
            out[to] += term;
            if (terms) terms[to] += fabs(term);
        }
    }
}

static void reference_matmul(double *out, const double *inp, const double *w, size_t stride,
                             size_t N, size_t I, size_t O) {
    memset(out, 0, N * O * sizeof *out);
    add_product(out, NULL, O, N, O, I, by_rows(inp, I), by_columns(w, stride));
}

// What the tests of the five products begin with.
typedef struct {
    size_t N, I, O, stride;
    bool large, with_nan;
    array inp, dout, w;
    retrofit_weight weight; // w as operations take it
} matmul_case;

static matmul_case pick_matmul_sizes(void) {
    // Each longer than any tile in some direction.
    static const size_t large[][3] = {{9, 773, 5},   {3, 18500, 6}, {13, 390, 401},
                                      {500, 33, 17}, {12, 30, 800}, {1200, 24, 136}};
    matmul_case matmul = {.large = trial >= 2 && trial < 8, .with_nan = trial % 4 == 3};
    if (matmul.large) {
        matmul.N = large[trial - 2][0];
        matmul.I = large[trial - 2][1];
        matmul.O = large[trial - 2][2];
    } else {
        matmul.N = pick_size(1, 70);
        matmul.I = pick_size(1, 100);
        matmul.O = pick_size(1, 100);
    }

    // Models' rows are multiples of 16 bytes: a GPU has other kernels for these.
    bool aligned = !matmul.large && trial % 2;
    if (aligned) {
        matmul.I = (matmul.I + 7) / 8 * 8;
        matmul.O = (matmul.O + 7) / 8 * 8;
    }
    // Decoding multiplies few tokens, here by long rows now and then.
    bool decoding = !matmul.large && trial % 3 == 2;
    if (decoding) matmul.N = random_between(1, 10);
    if (decoding && trial % 4 == 0) matmul.I *= 8;
    matmul.stride = matmul.I;
    if (trial % 3) matmul.stride += aligned ? 8 * random_between(0, 2) : random_between(1, 9);
    return matmul;
}

static matmul_case pick_matmul(void) {
    matmul_case matmul = pick_matmul_sizes();
    retrofit_type type = ops->act_type;
    if (on_cpu) type = trial % 2 ? RETROFIT_BF16 : RETROFIT_F32;
    describe("N %zu I %zu O %zu stride %zu, w %s%s", matmul.N, matmul.I, matmul.O, matmul.stride,
             type == RETROFIT_BF16 ? "bf16" : "f32", matmul.with_nan ? ", with NaN" : "");
    matmul.inp = random_act(matmul.N * matmul.I, 1);
    matmul.dout = random_act(matmul.N * matmul.O, 1);
    matmul.w = random_matrix(type, matmul.O, matmul.I, matmul.stride);
    matmul.weight = (retrofit_weight){matmul.w.data, type, matmul.stride};
    return matmul;
}

// A NaN in the weight, in its last row, or in the middle row of what is multiplied by it.
static void set_nan_in_operand(const matmul_case *matmul, array operand, size_t width) {
    if (!matmul->with_nan) return;
    if (trial & 8) set_nan(matmul->w, (matmul->O - 1) * matmul->stride + matmul->I / 2);
    else set_nan(operand, matmul->N / 2 * width);
}

typedef enum { PLAIN, NO_RESIDUAL, RESIDUAL_APART, RESIDUAL_IN_PLACE } matmul_form;

static void check_forward(const matmul_case *matmul, matmul_form form) {
    static const char *const names[] = {"out", "out", "out with residual", "out on its residual"};
    size_t N = matmul->N, I = matmul->I, O = matmul->O;
    array out = form == PLAIN ? unset_act(N * O) : unset_f32(N * O);
    array residual = random_f32(N * O);
    double *want = zeros(N * O);
    if (form == RESIDUAL_APART || form == RESIDUAL_IN_PLACE)
        memcpy(want, residual.host, N * O * sizeof *want);
    if (form == RESIDUAL_IN_PLACE) {
        memcpy(out.host, residual.host, N * O * sizeof *want);
        upload(out);
        residual = out;
    }
    double *terms = magnitudes(want, N * O);
    add_product(want, terms, O, N, O, I, by_rows(matmul->inp.host, I),
                by_columns(matmul->w.host, matmul->stride));

    float *added = form == NO_RESIDUAL ? NULL : residual.f32;
    if (form == PLAIN) ops->matmul_forward(out.data, matmul->inp.data, matmul->weight, N, I, O);
    else ops->matmul_residual_forward(out.f32, added, matmul->inp.data, matmul->weight, N, I, O);
    check_near(names[form], out, want, terms, sum_error(I));
}

static void test_matmul_forward(void) {
    matmul_case matmul = pick_matmul();
    set_nan_in_operand(&matmul, matmul.inp, matmul.I);
    check_forward(&matmul, PLAIN);
}

static void test_matmul_residual_forward(void) {
    matmul_case matmul = pick_matmul();
    set_nan_in_operand(&matmul, matmul.inp, matmul.I);
    check_forward(&matmul, NO_RESIDUAL);
    check_forward(&matmul, RESIDUAL_APART);
    check_forward(&matmul, RESIDUAL_IN_PLACE);
}

static void check_dinp(const matmul_case *matmul, array dinp) {
    size_t N = matmul->N, I = matmul->I, O = matmul->O;
    double *want = zeros(N * I), *terms = zeros(N * I), *differences = zeros(N * I), *y = zeros(O);
    add_product(want, terms, I, N, I, O, by_rows(matmul->dout.host, O),
                by_rows(matmul->w.host, matmul->stride));
    check_near("dinp", dinp, want, terms, sum_error(O));
    if (matmul->large || matmul->with_nan) return;

    for (size_t n = 0; n < N; n++) {
        double *row = matmul->inp.host + n * I;
        DIFFERENCES(differences + n * I, row, I,
                    reference_matmul(y, row, matmul->w.host, matmul->stride, 1, I, O), y,
                    matmul->dout.host + n * O, O);
    }
    check_near("dinp by differences", dinp, differences, terms, sum_error(O));
}

static void test_matmul_backward_input(void) {
    matmul_case matmul = pick_matmul();
    set_nan_in_operand(&matmul, matmul.dout, matmul.O);
    array dinp = unset_act(matmul.N * matmul.I);
    ops->matmul_backward_input(dinp.data, matmul.dout.data, matmul.weight, matmul.N, matmul.I,
                               matmul.O);
    check_dinp(&matmul, dinp);
}

static void test_matmul_residual_backward_input(void) {
    matmul_case matmul = pick_matmul();
    set_nan_in_operand(&matmul, matmul.dout, matmul.O);
    array dinp = unset_f32(matmul.N * matmul.I);
    ops->matmul_residual_backward_input(dinp.f32, matmul.dout.data, matmul.weight, matmul.N,
                                        matmul.I, matmul.O);
    check_dinp(&matmul, dinp);
}

static void test_matmul_backward_weight(void) {
    matmul_case matmul = pick_matmul();
    size_t N = matmul.N, I = matmul.I, O = matmul.O, stride = matmul.stride;
    double *inp = matmul.inp.host, *dout = matmul.dout.host, *w = matmul.w.host;
    if (matmul.with_nan && trial & 8) set_nan(matmul.inp, I / 2);
    if (matmul.with_nan && !(trial & 8)) {
        set_nan(matmul.dout, N / 2 * O);
        set_nan(matmul.dout, O / 2);
    }
    // The gradient adds to random contents, and the NaN between its rows must stay.
    array dw = random_matrix(RETROFIT_F32, O, I, stride);
    double *want = copy_of(dw.host, dw.n), *terms = magnitudes(dw.host, dw.n);
    add_product(want, terms, stride, O, I, N, by_columns(dout, O), by_rows(inp, I));
    ops->matmul_backward_weight(dw.f32, stride, matmul.dout.data, matmul.inp.data, N, I, O);
    check_near("dw", dw, want, terms, sum_error(N));
    if (matmul.large || matmul.with_nan) return;

    double *differences = copy_of(dw.host, dw.n), *y = zeros(N), *dy = zeros(N);
    for (size_t o = 0; o < O; o++) { // a row of w makes one column of out
        double *row = w + o * stride;
        for (size_t n = 0; n < N; n++) dy[n] = dout[n * O + o];
        DIFFERENCES(differences + o * stride, row, I,
                    reference_matmul(y, inp, row, stride, N, I, 1), y, dy, N);
    }
    check_near("dw by differences", dw, differences, terms, sum_error(N));
}

// Newton-Schulz needs what is symmetric to be so to the bit.
static void test_matmul_symmetric(void) {
    size_t N = trial % 4 ? pick_size(1, 100) : pick_size(90, 300), I = pick_size(1, 200);
    describe("N %zu I %zu", N, I);
    array inp = random_act(N * I, 1), out = unset_act(N * N);
    double *want = zeros(N * N), *terms = zeros(N * N);
    add_product(want, terms, N, N, N, I, by_rows(inp.host, I), by_columns(inp.host, I));
    ops->matmul_symmetric(out.data, inp.data, N, I);
    check_near("out", out, want, terms, sum_error(I));
    const double *got = download(out);
    size_t differ = 0;
    for (size_t i = 0; i < N; i++)
        for (size_t j = 0; j < i; j++) differ += got[i * N + j] != got[j * N + i];
    check(!differ, "%s, %s: %zu elements differ from their mirror image", op, sizes, differ);
}

// ---- RoPE --------------------------------------------------------------------------------------
typedef struct {
    size_t B, T, H, G, h, Q;
} attention_shape;

static void describe_attention(attention_shape s) {
    describe("B %zu T %zu H %zu G %zu h %zu", s.B, s.T, s.H, s.G, s.h);
}

static attention_shape pick_attention(size_t max_T) {
    static const size_t heads[][2] = {{1, 1}, {8, 1}, {3, 3}, {4, 2}, {9, 3}, {6, 1}};
    static const size_t widths[] = {2, 6, 8, 16, 64, 40, 128};
    attention_shape s;
    const size_t *H_and_G = heads[trial < 6 ? trial : random_between(0, 5)];
    s.H = H_and_G[0];
    s.G = H_and_G[1];
    s.B = pick_size(1, 3);
    s.T = pick_size(1, max_T);
    s.h = widths[trial < 7 ? trial : random_between(0, 6)];
    s.Q = (s.H + 2 * s.G) * s.h;
    describe_attention(s);
    return s;
}

// One token: pair (i, i + h/2) of each query and key head, read as a complex number, times
// e^{i·angle}. A row of `angles` holds the real and the imaginary part for each pair.
static void reference_rope(double *y, double *terms, const double *x, const double *angles,
                           attention_shape s) {
    size_t rotated = (s.H + s.G) * s.h; // the values behind stay as they are
    memcpy(y, x, s.Q * sizeof *y);
    for (size_t i = 0; i < rotated; i++) {
        size_t pair = i % s.h % (s.h / 2), re = i / s.h * s.h + pair, im = re + s.h / 2;
        double cosine = angles[2 * pair], sine = angles[2 * pair + 1];
        if (i == re) y[i] = x[re] * cosine - x[im] * sine;
        else y[i] = x[re] * sine + x[im] * cosine;
        if (!terms) continue;
        if (i == re) terms[i] = fabs(x[re] * cosine) + fabs(x[im] * sine);
        else terms[i] = fabs(x[re] * sine) + fabs(x[im] * cosine);
    }
}

// Any angles do: nothing says that they must come from positions.
static array angle_table(size_t positions, size_t h) {
    double *x = zeros(positions * h);
    for (size_t i = 0; i < positions * h / 2; i++) {
        x[2 * i] = cos((double)i * i);
        x[2 * i + 1] = sin((double)i * i);
    }
    return array_of(RETROFIT_F32, positions * h, x);
}

static void test_rope_forward(void) {
    attention_shape s = pick_attention(40);
    size_t N = s.B * s.T;
    array qkv = random_act(N * s.Q, 1), past = random_integers(s.B, 0, 50);
    array table = angle_table(50 + s.T, s.h);
    double *want = zeros(qkv.n), *terms = zeros(qkv.n);
    for (int shifted = 0; shifted < 2; shifted++) {
        for (size_t n = 0; n < N; n++) {
            size_t position = n % s.T + (shifted ? (size_t)past.host[n / s.T] : 0);
            reference_rope(want + n * s.Q, terms + n * s.Q, qkv.host + n * s.Q,
                           table.host + position * s.h, s);
        }
        upload(qkv);
        ops->rope_forward(qkv.data, table.f32, shifted ? past.i32 : NULL, s.B, s.T, s.H, s.G, s.h);
        check_near(shifted ? "qkv with past" : "qkv", qkv, want, terms, 3 * U);
    }
}

static void test_rope_backward(void) {
    attention_shape s = pick_attention(20);
    size_t N = s.B * s.T, rotated = (s.H + s.G) * s.h;
    array dqkv = random_act(N * s.Q, 1), table = angle_table(s.T, s.h);
    double *x = zeros(s.Q), *y = zeros(s.Q), *want = zeros(dqkv.n), *terms = zeros(dqkv.n);
    // Token by token. A rotation is linear: its derivative is the same everywhere, also at x = 0.
    for (size_t n = 0; n < N; n++) {
        const double *angles = table.host + n % s.T * s.h, *dy = dqkv.host + n * s.Q;
        DIFFERENCES(want + n * s.Q, x, s.Q, reference_rope(y, NULL, x, angles, s), y, dy, s.Q);
        for (size_t i = 0; i < rotated; i++) {
            size_t partner = i / s.h * s.h + (i + s.h / 2) % s.h;
            terms[n * s.Q + i] = fabs(dy[i]) + fabs(dy[partner]);
        }
    }
    ops->rope_backward(dqkv.data, table.f32, s.B, s.T, s.H, s.G, s.h);
    // Differences give the values' gradient, which stays as it was, only nearly.
    for (size_t i = 0; i < dqkv.n; i++)
        if (i % s.Q >= rotated) terms[i] += 1e-3 * fabs(want[i]);
    check_near("dqkv", dqkv, want, terms, 3 * U);
}

// ---- Norms of q and k --------------------------------------------------------------------------
// Of one token: y (Q) from x (Q), and the norms' rstd, H + G of them, or 2.
static void reference_qk_norm(double *y, double *rstd, const double *x, const double *q_norm,
                              const double *k_norm, attention_shape s, bool per_head, double eps) {
    size_t widths[] = {s.H * s.h, s.G * s.h}, first = 0, count = 0;
    memcpy(y, x, s.Q * sizeof *y);
    for (int of_k = 0; of_k < 2; of_k++) {
        size_t width = per_head ? s.h : widths[of_k];
        for (size_t end = first + widths[of_k]; first < end; first += width)
            reference_rmsnorm(y + first, rstd + count++, x + first, of_k ? k_norm : q_norm, 1,
                              width, eps);
    }
}

static void test_qk_norm_forward(void) {
    attention_shape s = pick_attention(trial == 3 ? 90 : 20);
    size_t N = s.B * s.T, both = (s.H + s.G) * s.h;
    bool per_head = trial % 2, keeps = trial % 3;
    size_t count = per_head ? s.H + s.G : 2;
    size_t q_width = per_head ? s.h : s.H * s.h, k_width = per_head ? s.h : s.G * s.h;
    float eps = trial % 4 ? 1e-5f : 0.1f;
    array qkv = random_act(N * s.Q, 1), qk = unset_act(N * both), rstd = unset_f32(N * count);
    array q_norm = random_f32(q_width), k_norm = random_f32(k_width);
    double *want = zeros(qkv.n), *want_rstd = zeros(rstd.n), *want_qk = zeros(qk.n);
    for (size_t n = 0; n < N; n++) {
        const double *x = qkv.host + n * s.Q;
        memcpy(want_qk + n * both, x, both * sizeof *x);
        reference_qk_norm(want + n * s.Q, want_rstd + n * count, x, q_norm.host, k_norm.host, s,
                          per_head, eps);
    }
    ops->qk_norm_forward(qkv.data, keeps ? qk.data : NULL, keeps ? rstd.f32 : NULL, q_norm.f32,
                         k_norm.f32, N, s.H, s.G, s.h, per_head, eps);
    check_near("qkv", qkv, want, want, sum_error(s.H * s.h));
    if (!keeps) return;
    check_near("rstd", rstd, want_rstd, want_rstd, sum_error(s.H * s.h));
    check_near("qk", qk, want_qk, NULL, 0);
}

static void test_qk_norm_backward(void) {
    attention_shape s = pick_attention(trial == 3 ? 90 : 12);
    size_t N = s.B * s.T, both = (s.H + s.G) * s.h;
    bool per_head = trial % 2;
    size_t count = per_head ? s.H + s.G : 2;
    size_t q_width = per_head ? s.h : s.H * s.h, k_width = per_head ? s.h : s.G * s.h;
    double eps = 0.1, *x = zeros(s.Q), *y = zeros(s.Q);
    array dqkv = random_act(N * s.Q, 1), qk = random_act(N * both, 1);
    array q_norm = random_f32(q_width), k_norm = random_f32(k_width);
    array dq_norm = random_f32(q_width), dk_norm = random_f32(k_width);
    double *want = zeros(dqkv.n), *rstds = zeros(N * count);
    double *want_q = copy_of(dq_norm.host, q_width), *want_k = copy_of(dk_norm.host, k_width);
    for (size_t n = 0; n < N; n++) {
        double *rstd = rstds + n * count, *dy = dqkv.host + n * s.Q;
        memcpy(x, qk.host + n * both, both * sizeof *x);
        memset(x + both, 0, (s.Q - both) * sizeof *x); // values pass unchanged, whatever they are
        DIFFERENCES(want + n * s.Q, x, s.Q,
                    reference_qk_norm(y, rstd, x, q_norm.host, k_norm.host, s, per_head, eps), y,
                    dy, s.Q);
        DIFFERENCES(want_q, q_norm.host, q_width,
                    reference_qk_norm(y, rstd, x, q_norm.host, k_norm.host, s, per_head, eps), y,
                    dy, s.Q);
        DIFFERENCES(want_k, k_norm.host, k_width,
                    reference_qk_norm(y, rstd, x, q_norm.host, k_norm.host, s, per_head, eps), y,
                    dy, s.Q);
        reference_qk_norm(y, rstd, x, q_norm.host, k_norm.host, s, per_head, eps);
    }
    array rstd = array_of(RETROFIT_F32, N * count, rstds);
    for (int frozen = 0; frozen < 2; frozen++) {
        upload(dqkv);
        ops->qk_norm_backward(dqkv.data, frozen ? NULL : dq_norm.f32, frozen ? NULL : dk_norm.f32,
                              qk.data, rstd.f32, q_norm.f32, k_norm.f32, N, s.H, s.G, s.h,
                              per_head);
        check_tensor("dqkv", dqkv, want);
    }
    check_tensor("dq_norm", dq_norm, want_q);
    check_tensor("dk_norm", dk_norm, want_k);
}

// ---- Attention ---------------------------------------------------------------------------------
// What one query makes of the keys up to it.
typedef struct {
    double p[1024];  // their probabilities
    double lse;      // log Σ e^score
    double size;     // the largest Σ|q·k| of a score
    const double *v; // their values, Q apart
} query_result;

// Query t of one head over the keys 0 … t of qkv (T,Q), one row of the batch:
//     p = softmax(q·k/√h)     lse = log Σ e^{q·k/√h}     out (h) = Σ p·v
static void reference_query(double *out, query_result *result, const double *qkv, size_t t,
                            size_t head, attention_shape s) {
    const double *q = qkv + t * s.Q + head * s.h, *k = qkv + (s.H + head / (s.H / s.G)) * s.h;
    const double *v = k + s.G * s.h;
    double max = -INFINITY, max_size = 0, sum = 0, *p = result->p;
    for (size_t i = 0; i <= t; i++) {
        double score = 0, size = 0;
        for (size_t c = 0; c < s.h; c++) {
            score += q[c] * k[i * s.Q + c] / sqrt((double)s.h);
            size += fabs(q[c] * k[i * s.Q + c]);
        }
        p[i] = score;
        if (score > max) max = score;
        if (size > max_size) max_size = size;
    }
    for (size_t i = 0; i <= t; i++) {
        p[i] = exp(p[i] - max);
        sum += p[i];
    }
    for (size_t c = 0; c < s.h; c++) out[c] = 0;
    for (size_t i = 0; i <= t; i++) {
        p[i] /= sum;
        for (size_t c = 0; c < s.h; c++) out[c] += p[i] * v[i * s.Q + c];
    }
    result->lse = max + log(sum);
    result->size = max_size;
    result->v = v;
}

// How far roundings may move out and lse. A score q·k/√h is off by sum_error(h) of its terms, which
// changes p by as much, relative to itself. A table in bf16 rounds p before it meets v.
static void attention_errors(double *terms, double *lse_terms, const query_result *result, size_t t,
                             attention_shape s) {
    double score = (sum_error(s.h) + 2 * U) * result->size / sqrt((double)s.h) + 4 * U;
    double relative = 2 * score + sum_error(t + 1) + 2 * rounding_of(ops->act_type);
    *lse_terms = score + (sum_error(t + 1) + 2 * U * fabs(result->lse));
    for (size_t c = 0; c < s.h; c++) terms[c] = 0;
    for (size_t i = 0; i <= t; i++) {
        const double *v = result->v + i * s.Q;
        for (size_t c = 0; c < s.h; c++) terms[c] += result->p[i] * fabs(v[c]) * relative;
    }
}

// All queries of a batch. terms and lse_terms may be NULL, both or none.
static void reference_attention(double *out, double *lse, double *terms, double *lse_terms,
                                const double *qkv, attention_shape s) {
    static query_result result;
    for (size_t i = 0; i < s.B * s.T * s.H; i++) {
        size_t n = i / s.H, t = n % s.T, head = i % s.H;
        reference_query(out + i * s.h, &result, qkv + (n - t) * s.Q, t, head, s);
        lse[i] = result.lse;
        if (terms) attention_errors(terms + i * s.h, lse_terms + i, &result, t, s);
    }
}

// The queries of one row of the batch from position t on, of `count` heads.
static void reference_queries(double *out, const double *qkv, size_t t, size_t head, size_t count,
                              attention_shape s) {
    static query_result result;
    for (size_t i = 0; i < (s.T - t) * count; i++)
        reference_query(out + i * s.h, &result, qkv, t + i / count, head + i % count, s);
}

typedef enum { NO_NAN, NAN_IN_Q, NAN_IN_K, NAN_IN_V } nan_place;

static void check_attention_forward(attention_shape s, double scale, nan_place place) {
    static const char *const names[] = {"", ", NaN in q", ", NaN in k", ", NaN in v"};
    size_t N = s.B * s.T, d = s.H * s.h, share = s.H / s.G;
    describe("B %zu T %zu H %zu G %zu h %zu, scale %g%s", s.B, s.T, s.H, s.G, s.h, scale,
             names[place]);
    array qkv = random_act(N * s.Q, scale), out = unset_act(N * d), lse = unset_f32(N * s.H);
    size_t b = random_between(0, s.B - 1), t = random_between(0, s.T - 1);
    size_t head = random_between(0, s.H - 1), g = head / share;
    if (place != NO_NAN) {
        const size_t slots[] = {0, head, s.H + g, s.H + s.G + g}; // in a row of qkv
        size_t column = slots[place] * s.h + random_between(0, s.h - 1);
        set_nan(qkv, (b * s.T + t) * s.Q + column);
    }
    double *want = zeros(N * d), *want_lse = zeros(N * s.H);
    double *terms = zeros(N * d), *lse_terms = zeros(N * s.H);
    reference_attention(want, want_lse, terms, lse_terms, qkv.host, s);
    // Earlier queries may meet a NaN in a key or value with p = 0: there it may show or not.
    if (place == NAN_IN_K || place == NAN_IN_V)
        for (size_t i = b * s.T * d; i < (b * s.T + t) * d; i++)
            if (i % d / s.h / share == g) terms[i] = INFINITY;
    ops->attention_forward(out.data, lse.f32, qkv.data, s.B, s.T, s.H, s.G, s.h);
    check_near("out", out, want, terms, 1);
    check_near("lse", lse, want_lse, lse_terms, 1);
    release();
}

static void test_attention_forward(void) {
    static const size_t edges[] = {95, 96, 97, 192, 193}; // on, before and behind tiles' edges
    attention_shape s = pick_attention(200);
    if (trial >= 2 && trial < 7) s.T = edges[trial - 2];
    // Scores of 100 and more: e^score without the maximum taken off would overflow.
    double scale = trial % 3 == 2 ? 6 : 1;
    check_attention_forward(s, scale, NO_NAN);
    if (trial == 1) return; // once will do for the largest sizes
    check_attention_forward(s, scale, NAN_IN_Q);
    check_attention_forward(s, scale, NAN_IN_K);
    check_attention_forward(s, scale, NAN_IN_V);
}

// dqkv (N,Q) += the gradient of Σ dout·out with respect to qkv.
static void attention_differences(double *dqkv, const double *dout, array qkv, attention_shape s) {
    static query_result result;
    size_t d = s.H * s.h, share = s.H / s.G;
    double *y = zeros(s.T * share * s.h), *dy = zeros(s.T * share * s.h);
    for (size_t n = 0; n < s.B * s.T && !replay; n++) {
        size_t t = n % s.T;
        double *row = qkv.host + (n - t) * s.Q; // of the batch
        double *x = row + t * s.Q, *dx = dqkv + n * s.Q;
        for (size_t head = 0; head < s.H; head++) { // a query makes one row of one head
            size_t at = head * s.h;
            DIFFERENCES(dx + at, x + at, s.h, reference_query(y, &result, row, t, head, s), y,
                        dout + n * d + at, s.h);
        }
        // A key or value is seen from its own position on, by the heads of its group.
        for (size_t i = 0; i < 2 * s.G; i++) {
            size_t at = (s.H + i) * s.h, head = i % s.G * share, rows = (s.T - t) * share;
            for (size_t j = 0; j < rows; j++)
                memcpy(dy + j * s.h, dout + (n + j / share) * d + (head + j % share) * s.h,
                       s.h * sizeof *dy);
            DIFFERENCES(dx + at, x + at, s.h, reference_queries(y, row, t, head, share, s), y, dy,
                        rows * s.h);
        }
    }
}

// What one NaN in dout, at query n, column c of one head, makes of dqkv: NaN in the gradients of
// the query, of all keys that it sees, and of their values' column c. What else there is in the
// same row of the batch and group of heads may become NaN or not; other rows and groups stay.
static void spread_nan(double *dqkv, double *terms, size_t n, size_t head, size_t c,
                       attention_shape s) {
    size_t share = s.H / s.G;
    for (size_t i = 0; i < s.B * s.T * s.Q; i++) {
        size_t at = i / s.Q, slot = i % s.Q / s.h; // slots: H queries, G keys, G values
        bool is_query = slot < s.H, is_key = !is_query && slot < s.H + s.G;
        size_t group = is_query ? slot / share : (slot - s.H) % s.G;
        if (at / s.T != n / s.T || group != head / share) continue;
        bool reached = at <= n && (is_key || i % s.h == c);
        if (is_query) reached = at == n && slot == head;
        if (reached) dqkv[i] = NAN;
        else terms[i] = INFINITY;
    }
}

static void test_attention_backward(void) {
    static const attention_shape shapes[] = {
        {1, 1, 1, 1, 2, 0},   {1, 200, 2, 1, 2, 0}, {2, 97, 2, 2, 6, 0}, {1, 33, 8, 1, 8, 0},
        {3, 12, 4, 2, 16, 0}, {1, 20, 2, 2, 64, 0}, {1, 193, 1, 1, 2, 0}};
    attention_shape s = trial < 7 ? shapes[trial] : pick_attention(16);
    double scale = trial % 4 == 3 ? 2 : 1;
    s.Q = (s.H + 2 * s.G) * s.h;
    size_t N = s.B * s.T, d = s.H * s.h;
    describe("B %zu T %zu H %zu G %zu h %zu, scale %g", s.B, s.T, s.H, s.G, s.h, scale);
    array qkv = random_act(N * s.Q, scale), dout = random_act(N * d, 1), dqkv = unset_act(N * s.Q);
    double *want = zeros(N * s.Q), *want_out = zeros(N * d), *want_lse = zeros(N * s.H);
    attention_differences(want, dout.host, qkv, s);
    reference_attention(want_out, want_lse, NULL, NULL, qkv.host, s);
    array out = array_of(ops->act_type, N * d, want_out);
    array lse = array_of(RETROFIT_F32, N * s.H, want_lse), delta = unset_f32(N * s.H);
    ops->attention_backward(dqkv.data, delta.f32, dout.data, qkv.data, out.data, lse.f32, s.B, s.T,
                            s.H, s.G, s.h);
    check_tensor("dqkv", dqkv, want);

    double *want_delta = zeros(N * s.H), *delta_terms = zeros(N * s.H);
    for (size_t i = 0; i < N * d; i++) {
        want_delta[i / s.h] += dout.host[i] * out.host[i];
        delta_terms[i / s.h] += fabs(dout.host[i] * out.host[i]);
    }
    check_near("delta", delta, want_delta, delta_terms, sum_error(s.h));

    double *with_nan = download(dqkv), *terms = zeros(N * s.Q);
    size_t n = random_between(0, N - 1), head = random_between(0, s.H - 1);
    size_t c = random_between(0, s.h - 1);
    spread_nan(with_nan, terms, n, head, c, s);
    set_nan(dout, n * d + head * s.h + c);
    upload(dqkv);
    ops->attention_backward(dqkv.data, delta.f32, dout.data, qkv.data, out.data, lse.f32, s.B, s.T,
                            s.H, s.G, s.h);
    check_near("dqkv with NaN in dout", dqkv, with_nan, terms, 0);
}

// ---- KV cache ----------------------------------------------------------------------------------
// What keys and values may be on this device.
static retrofit_type pick_kv_type(void) {
    return on_cpu && trial % 2 ? RETROFIT_BF16 : ops->act_type;
}

// Whether rows get other lanes than their own: with either type of keys.
static bool picks_lanes(void) { return trial / 2 % 2; }

// Which of 2·B + 1 lanes each row has, each row another.
static array pick_lanes(size_t B) {
    double *lanes = zeros(B);
    size_t first = random_between(0, 2 * B);
    for (size_t b = 0; b < B; b++)
        lanes[b] = (double)(picks_lanes() ? (first + 2 * b) % (2 * B + 1) : b);
    return array_of(RETROFIT_I32, B, lanes);
}

// What operations get for them.
static const int32_t *given_lanes(array lanes) { return picks_lanes() ? lanes.i32 : NULL; }

static void test_kv_store(void) {
    attention_shape s = pick_attention(20);
    retrofit_type type = pick_kv_type();
    size_t width = s.G * s.h, capacity = s.T + 10 + trial, lanes = 2 * s.B + 1;
    size_t n_kv = lanes * capacity * width;
    array qkv = random_act(s.B * s.T * s.Q, 1), past = random_integers(s.B, 0, 10 + trial);
    array lane = pick_lanes(s.B);
    array keys = unset(type, n_kv), values = unset(type, n_kv);
    for (size_t i = 0; i < s.B * s.T * width; i++) { // what it does not write stays NaN
        size_t n = i / width, c = i % width, b = n / s.T;
        size_t position = (size_t)past.host[b] + n % s.T;
        size_t to = ((size_t)lane.host[b] * capacity + position) * width + c;
        const double *k = qkv.host + n * s.Q + s.H * s.h;
        keys.host[to] = k[c];
        values.host[to] = k[width + c];
    }
    ops->kv_store(keys.data, values.data, qkv.data, past.i32, given_lanes(lane), s.B, s.T, capacity,
                  s.H, s.G, s.h, type);
    check_near("keys", keys, keys.host, NULL, 0);
    check_near("values", values, values.host, NULL, 0);
}

// A decoder's memory, and what all S tokens of each row should give, from attention without a
// cache.
typedef struct {
    size_t S, capacity, width;
    retrofit_type type;
    double *qkv, *want, *terms;
    array past, lanes, keys, values;
} cache_case;

static cache_case pick_cache(attention_shape s) {
    size_t S = trial < 2 ? 1 + 240 * trial : random_between(2, 240), d = s.H * s.h;
    cache_case cache = {
        .S = S, .capacity = S + trial % 4 * 7, .width = s.G * s.h, .type = pick_kv_type()};
    s.T = S;
    cache.qkv = copy_of(random_act(s.B * S * s.Q, 1).host, s.B * S * s.Q);
    for (size_t i = 0; i < s.B * S * s.Q; i++) { // keys and values that their type can hold
        if (i % s.Q < d || cache.type != RETROFIT_BF16) continue;
        cache.qkv[i] = retrofit_bf16_to_float(retrofit_float_to_bf16((float)cache.qkv[i]));
    }
    cache.want = zeros(s.B * S * d);
    cache.terms = zeros(s.B * S * d);
    double *lse = zeros(s.B * S * s.H), *lse_terms = zeros(s.B * S * s.H);
    reference_attention(cache.want, lse, cache.terms, lse_terms, cache.qkv, s);
    cache.past = array_of(RETROFIT_I32, s.B, zeros(s.B));
    cache.lanes = pick_lanes(s.B);
    cache.keys = unset(cache.type, (2 * s.B + 1) * cache.capacity * cache.width);
    cache.values = unset(cache.type, (2 * s.B + 1) * cache.capacity * cache.width);
    return cache;
}

// The next T tokens of each row, `width` numbers each, from `all` S of them.
static double *next_tokens(const cache_case *cache, const double *all, size_t width,
                           attention_shape s) {
    double *out = zeros(s.B * s.T * width);
    for (size_t n = 0; n < s.B * s.T; n++) {
        size_t b = n / s.T, position = (size_t)cache->past.host[b] + n % s.T;
        memcpy(out + n * width, all + (b * cache->S + position) * width, width * sizeof *out);
    }
    return out;
}

// The tokens that are left in the row that has gone furthest.
static size_t tokens_left(const cache_case *cache, size_t B) {
    size_t left = cache->S;
    for (size_t b = 0; b < B; b++)
        left = retrofit_min(left, cache->S - (size_t)cache->past.host[b]);
    return left;
}

static void test_attention_cached(void) {
    attention_shape s = pick_attention(1);
    size_t d = s.H * s.h;
    cache_case cache = pick_cache(s);
    for (size_t step = 0; step < 6; step++) {
        size_t left = tokens_left(&cache, s.B);
        if (!left) break;
        s.T = step % 2 ? 1 : random_between(1, left);
        describe("B %zu T %zu past %g.. capacity %zu H %zu G %zu h %zu", s.B, s.T,
                 cache.past.host[0], cache.capacity, s.H, s.G, s.h);
        array out = unset_act(s.B * s.T * d);
        array qkv =
            array_of(ops->act_type, s.B * s.T * s.Q, next_tokens(&cache, cache.qkv, s.Q, s));
        upload(cache.past);
        const int32_t *lanes = given_lanes(cache.lanes);
        ops->kv_store(cache.keys.data, cache.values.data, qkv.data, cache.past.i32, lanes, s.B, s.T,
                      cache.capacity, s.H, s.G, s.h, cache.type);
        ops->attention_cached(out.data, qkv.data, cache.keys.data, cache.values.data,
                              cache.past.i32, lanes, s.B, s.T, cache.capacity, s.H, s.G, s.h,
                              cache.type);
        check_near("out", out, next_tokens(&cache, cache.want, d, s),
                   next_tokens(&cache, cache.terms, d, s), 1);

        // After the first step some rows keep less than what they were fed, so that they are of
        // unequal length. What lies behind a row's end is NaN again.
        cache.keys.host = download(cache.keys);
        cache.values.host = download(cache.values);
        for (size_t b = 0; b < s.B; b++)
            cache.past.host[b] += (double)(step ? s.T : random_between(1, s.T));
        for (size_t i = 0; i < cache.keys.n; i++) {
            size_t place = i / cache.width / cache.capacity, b = 0;
            size_t position = i / cache.width % cache.capacity;
            while (b < s.B && (size_t)cache.lanes.host[b] != place) b++;
            if (b < s.B && position < (size_t)cache.past.host[b]) continue;
            cache.keys.host[i] = NAN;
            cache.values.host[i] = NAN;
        }
        upload(cache.keys);
        upload(cache.values);
    }
}

// In each row of the batch, at the position past[b], the slots from used[b] on become copies of the
// last slot before them.
static void reference_backfill(double *kv, const double *past, const double *used, size_t S,
                               size_t C, size_t stride, size_t B, size_t capacity, size_t width) {
    for (size_t i = 0; i < S * C * stride; i++) {
        size_t slot = i / stride / C, b = i % stride / width / capacity;
        size_t position = i % stride / width % capacity;
        if (b >= B || position != (size_t)past[b] || slot < (size_t)used[b]) continue;
        kv[i] = kv[i - (slot + 1 - (size_t)used[b]) * C * stride];
    }
}

static void test_kv_backfill(void) {
    size_t S = pick_size(1, 9), C = pick_size(1, 4), B = pick_size(1, 5), G = pick_size(1, 3);
    size_t h = 2 * pick_size(1, 20), capacity = pick_size(1, 30), width = G * h;
    size_t stride = (B + trial % 2) * capacity * width; // sometimes the cache has more than B rows
    describe("S %zu C %zu B %zu capacity %zu G %zu h %zu", S, C, B, capacity, G, h);
    retrofit_type type = pick_kv_type();
    array keys = random_array(type, S * C * stride, 1);
    array values = random_array(type, S * C * stride, 1);
    array past = random_integers(B, 0, capacity - 1), used = random_integers(B, 1, S);
    if (trial % 2) set_nan(keys, random_between(0, keys.n - 1)); // is copied like any number
    ops->kv_backfill(keys.data, values.data, past.i32, used.i32, S, C, stride, B, capacity, G, h,
                     type);
    reference_backfill(keys.host, past.host, used.host, S, C, stride, B, capacity, width);
    reference_backfill(values.host, past.host, used.host, S, C, stride, B, capacity, width);
    check_near("keys", keys, keys.host, NULL, 0);
    check_near("values", values, values.host, NULL, 0);
}

// ---- SwiGLU ------------------------------------------------------------------------------------
static void reference_swiglu(double *y, const double *gate_up, size_t N, size_t F) {
    for (size_t i = 0; i < N * F; i++) {
        const double *row = gate_up + i / F * 2 * F;
        double gate = row[i % F], up = row[F + i % F];
        y[i] = gate / (1 + exp(-gate)) * up;
    }
}

static void test_swiglu_forward(void) {
    size_t N = trial == 5 ? 70000 : pick_size(1, 70), F = trial == 5 ? 2 : pick_size(1, 150);
    bool with_nan = trial % 4 == 3;
    // At scale 25 e^-gate is far beyond fp32's range. There |silu(gate)| < 1e-35, and a little of
    // up may be wrong.
    double scale = trial % 3 ? 1 : 25;
    describe("N %zu F %zu scale %g%s", N, F, scale, with_nan ? ", with NaN" : "");
    array gate_up = random_act(N * 2 * F, scale), out = unset_act(N * F);
    if (with_nan) set_nan(gate_up, random_between(0, gate_up.n - 1));
    double *want = zeros(N * F), *terms = zeros(N * F);
    reference_swiglu(want, gate_up.host, N, F);
    for (size_t i = 0; i < N * F; i++) {
        double up = gate_up.host[i / F * 2 * F + F + i % F];
        terms[i] = fabs(want[i]) + 1e-28 * fabs(up);
    }
    ops->swiglu_forward(out.data, gate_up.data, N, F);
    check_near("out", out, want, terms, 8 * U);
}

static void test_swiglu_backward(void) {
    size_t N = pick_size(1, 70), F = pick_size(1, 100);
    describe("N %zu F %zu", N, F);
    array gate_up = random_act(N * 2 * F, trial % 3 ? 1 : 4), dout = random_act(N * F, 1);
    array dgate_up = unset_act(N * 2 * F), out = unset_act(N * F);
    double *want = zeros(N * 2 * F), *y = zeros(F), *want_out = zeros(N * F);
    for (size_t n = 0; n < N; n++) {
        double *row = gate_up.host + n * 2 * F;
        DIFFERENCES(want + n * 2 * F, row, 2 * F, reference_swiglu(y, row, 1, F), y,
                    dout.host + n * F, F);
    }
    reference_swiglu(want_out, gate_up.host, N, F);
    ops->swiglu_backward(dgate_up.data, out.data, dout.data, gate_up.data, N, F);
    check_tensor("dgate_up", dgate_up, want);
    check_near("out", out, want_out, want_out, 8 * U);

    // A NaN in dout goes into two derivatives, and into no other.
    size_t bad = random_between(0, N * F - 1), gate = bad / F * 2 * F + bad % F;
    double *with_nan = download(dgate_up);
    with_nan[gate] = NAN;
    with_nan[gate + F] = NAN;
    set_nan(dout, bad);
    upload(dgate_up);
    ops->swiglu_backward(dgate_up.data, out.data, dout.data, gate_up.data, N, F);
    check_near("dgate_up with NaN", dgate_up, with_nan, NULL, 0);
}

// ---- Cross-entropy -----------------------------------------------------------------------------
static double largest(const double *x, size_t n) {
    double max = -INFINITY;
    for (size_t i = 0; i < n; i++)
        if (x[i] > max) max = x[i];
    return max;
}

// log Σ e^z - z[label].
static double reference_loss(const double *z, size_t label, size_t V) {
    double max = largest(z, V), sum = 0;
    for (size_t v = 0; v < V; v++) sum += exp(z[v] - max);
    return log(sum) + max - z[label];
}

// One row's loss and gradient, scale·(softmax(z) - 1 at the label), and what may be wrong with
// them.
static void reference_cross_entropy(double *loss, double *loss_terms, double *gradient,
                                    double *gradient_terms, const double *z, size_t label, size_t V,
                                    double scale) {
    double max = largest(z, V);
    *loss = reference_loss(z, label, V);
    *loss_terms = sum_error(V) + 2 * U * (fabs(*loss + z[label]) + fabs(z[label]));
    for (size_t v = 0; v < V; v++) {
        double p = exp(z[v] - z[label] - *loss), error = sum_error(V) + U * fabs(z[v] - max);
        gradient[v] = scale * (p - (v == label));
        gradient_terms[v] = scale * (p * error + 2 * U * (v == label));
    }
}

static void test_cross_entropy(void) {
    bool long_rows = trial == 2, with_nan = trial % 4 == 3, underflow = trial % 5 == 2;
    size_t N = long_rows ? 2 : pick_size(1, 40);
    size_t V = long_rows ? 4111 : trial == 4 ? 9001 : pick_size(1, 300);
    double spread = trial % 3 == 1 ? 30 : 3; // logits of 100: e^logit overflows
    float scales[] = {0, 0.37f / (float)N};
    describe("N %zu V %zu spread %g%s", N, V, spread, with_nan ? ", with NaN" : "");
    array logits = random_act(N * V, spread), losses = unset_f32(N);
    array labels = random_integers(N, 0, V - 1);
    for (size_t i = 0; underflow && i < N * V; i++) logits.host[i] -= 200; // e^logit is 0
    upload(logits);
    for (size_t n = 1; n < N; n += 3) labels.host[n] = -100;
    upload(labels);
    size_t bad = random_between(0, N - 1) / 3 * 3; // a row that has a label
    if (with_nan) set_nan(logits, bad * V + random_between(0, V - 1));

    double *want = zeros(N), *terms = zeros(N), *gradient = zeros(N * V);
    double *gradient_terms = zeros(N * V), *differences = zeros(N * V), y, scale = scales[1];
    for (size_t n = 0; n < N; n++) {
        if (labels.host[n] < 0) continue; // loss 0, gradient 0
        size_t label = (size_t)labels.host[n], row = n * V;
        double *z = logits.host + row;
        reference_cross_entropy(want + n, terms + n, gradient + row, gradient_terms + row, z, label,
                                V, scale);
        if (trial < 5 && !with_nan && n < 4 && V < 5000) {
            DIFFERENCES(differences + row, z, V, y = reference_loss(z, label, V), &y, &scale, 1);
        } else memcpy(differences + row, gradient + row, V * sizeof *gradient);
    }

    ops->cross_entropy(losses.f32, logits.data, labels.i32, N, V, scales[0]);
    check_near("losses", losses, want, terms, 1);
    check_near("logits at scale 0", logits, logits.host, NULL, 1);
    upload(losses);
    ops->cross_entropy(losses.f32, logits.data, labels.i32, N, V, scales[1]);
    check_near("losses", losses, want, terms, 1);
    check_near("gradient", logits, gradient, gradient_terms, 1);
    if (!with_nan) check_tensor("gradient by differences", logits, differences);
}

// ---- Elementwise -------------------------------------------------------------------------------
static bool same_number(double a, double b) {
    if (isnan(a) || isnan(b)) return isnan(a) && isnan(b);
    return a == b && signbit(a) == signbit(b);
}

static void test_cast(void) {
    // Zeros, a denormal, ties between bf16 numbers.
    static const double special[] = {0, -0.0, 1e-40, 3e38, -1.00390625, 1.01171875, INFINITY, NAN};
    size_t n = pick_size(8, 5000), wrong = 0, at = 0;
    describe("n %zu", n);
    array x = random_f32(n), out = unset_act(n);
    memcpy(x.host, special, sizeof special);
    upload(x);
    array exact = array_of(ops->act_type, n, copy_of(x.host, n)); // upload rounds to nearest
    ops->cast(out.data, x.f32, n);
    const double *got = download(out);
    for (size_t i = 0; i < n; i++)
        if (!same_number(got[i], exact.host[i]) && wrong++ == 0) at = i;
    check(!wrong, "%s, %s: out[%zu] is %.9g, should be %.9g: the first of %zu that are not nearest",
          op, sizes, at, got[at], exact.host[at], wrong);
}

static void test_add(void) {
    size_t n = pick_size(1, 5000);
    describe("n %zu", n);
    array x = random_f32(n), y = random_f32(n);
    if (trial % 2) set_nan(trial & 2 ? x : y, n / 2);
    float keep = trial % 3 ? (float)normal() : 1;
    double *want = zeros(n), *terms = zeros(n);
    for (size_t i = 0; i < n; i++) {
        want[i] = keep * x.host[i] + y.host[i];
        terms[i] = fabs(keep * x.host[i]) + fabs(y.host[i]);
    }
    ops->add(x.f32, y.f32, n, keep);
    check_near("x", x, want, terms, 2 * U);
}

static void test_axpby(void) {
    size_t n = pick_size(1, 5000);
    float a = (float)normal(), b = trial % 3 ? (float)normal() : 1;
    describe("n %zu a %g b %g", n, a, b);
    array x = random_act(n, 1), y = random_act(n, 1);
    double *want = zeros(n), *terms = zeros(n);
    for (size_t i = 0; i < n; i++) {
        want[i] = a * x.host[i] + b * y.host[i];
        terms[i] = fabs(a * x.host[i]) + fabs(b * y.host[i]);
    }
    ops->axpby(y.data, x.data, n, a, b);
    check_near("y", y, want, terms, 3 * U);
}

// ---- s_0 ---------------------------------------------------------------------------------------
static double *states(const double *past, size_t B, size_t T, size_t d, float sigma,
                      uint64_t seed) {
    array state = unset_f32(B * T * d);
    int32_t *starts = past ? array_of(RETROFIT_I32, B, copy_of(past, B)).i32 : NULL;
    ops->state_init(state.f32, starts, B, T, d, sigma, seed);
    return download(state);
}

// In standard deviations of what independent numbers show.
static double correlation(const double *x, const double *y, size_t n) {
    double xy = 0, xx = 0, yy = 0;
    for (size_t i = 0; i < n; i++) {
        xy += x[i] * y[i];
        xx += x[i] * x[i];
        yy += y[i] * y[i];
    }
    return fabs(xy) / sqrt(xx * yy / (double)n);
}

// Of two batches of states (2,T,d) of different seeds.
static void check_independence(const double *x, const double *other, size_t T, size_t d,
                               int power) {
    size_t n = 2 * T * d;
    double columns = correlation(x, x + 1, n - 1), positions = correlation(x, x + d, n - d);
    double rows = correlation(x, x + n / 2, n / 2), seeds = correlation(x, other, n);
    check(columns < 4 && positions < 4 && rows < 4 && seeds < 4,
          "%s, %s: neighbours correlate (power %d): columns %g, positions %g, rows %g, seeds %g "
          "standard deviations",
          op, sizes, power, columns, positions, rows, seeds);
}

// A normal distribution cut at ±3: its standard deviation is .98658, .68454 of it lie within ±1.
// n numbers show that to some /√n.
static void check_distribution(void) {
    size_t T = 100, d = 1000, n = 2 * T * d, beyond = 0, within = 0;
    float sigma = (float)RETROFIT_STATE_STD;
    double sum = 0, squares = 0, limit = 4 / sqrt((double)n);
    describe("B 2 T %zu d %zu", T, d);
    double *x = states(NULL, 2, T, d, sigma, rng), *other = states(NULL, 2, T, d, sigma, rng + 1);
    for (size_t i = 0; i < n; i++) {
        x[i] /= sigma;
        other[i] /= sigma;
        beyond += fabs(x[i]) > 3 * (1 + U);
        within += fabs(x[i]) < 1;
        sum += x[i];
        squares += x[i] * x[i];
    }
    double mean = sum / (double)n, deviation = sqrt(squares / (double)n - mean * mean);
    double share = (double)within / (double)n;
    bool is_normal = fabs(deviation - 0.98658) < limit && fabs(share - 0.68454) < limit;
    check(!beyond, "%s, %s: %zu numbers are beyond 3 sigma", op, sizes, beyond);
    check(fabs(mean) < limit && is_normal, "%s, %s: mean %g, deviation %g, %g within 1 sigma", op,
          sizes, mean, deviation, share);

    // Neither the numbers nor their squares may depend on each other.
    check_independence(x, other, T, d, 1);
    for (size_t i = 0; i < n; i++) {
        x[i] = x[i] * x[i] - deviation * deviation;
        other[i] = other[i] * other[i] - deviation * deviation;
    }
    check_independence(x, other, T, d, 2);
}

// σ·normal(hash(hash(seed, b), past + t), column). Logarithm and cosine may differ from the host's
// in their last bit, and with them a number in fp32; then σ's product is rounded.
static void check_states(const double *got, const double *past, size_t B, size_t T, size_t d,
                         float sigma) {
    size_t wrong = 0, first = 0;
    double first_want = 0;
    for (size_t i = 0; i < B * T * d; i++) {
        size_t b = i / d / T;
        uint64_t position = (uint64_t)past[b] + i / d % T;
        uint64_t key = retrofit_hash(retrofit_hash(rng, b), position);
        double want = (double)sigma * retrofit_hash_normal(key, i % d);
        if (fabs(got[i] - want) <= 3 * U * fabs(want) || wrong++) continue;
        first = i;
        first_want = want;
    }
    check(!wrong, "%s, %s: s[%zu] is %.9g, should be %.9g: the first of %zu wrong ones of %zu", op,
          sizes, first, got[first], first_want, wrong, B * T * d);
}

// A state depends on (seed, b, past + t, column) alone.
static void test_state_init(void) {
    size_t B = pick_size(1, 3), T = pick_size(2, 40), d = pick_size(2, 100);
    size_t cut = random_between(1, T - 1), narrow = random_between(1, d), n = B * T * d;
    double past[3], no_past[3] = {0}, past_cut[3];
    for (size_t b = 0; b < 3; b++) {
        past[b] = (double)random_between(0, 1000);
        past_cut[b] = past[b] + (double)cut;
    }
    describe("B %zu T %zu d %zu", B, T, d);
    const double *all = states(past, B, T, d, 0.5f, rng);
    const double *head = states(past, B, cut, d, 0.5f, rng);
    const double *tail = states(past_cut, B, T - cut, d, 0.5f, rng);
    const double *one = states(past, 1, T, narrow, 0.5f, rng);
    const double *start = states(no_past, B, T, d, 0.5f, rng);
    const double *without = states(NULL, B, T, d, 0.5f, rng);
    const double *still = states(past, B, T, d, 0, rng);
    size_t wrong_cut = 0, wrong_one = 0, wrong_start = 0, wrong_still = 0;
    check_states(all, past, B, T, d, 0.5f);
    for (size_t i = 0; i < n; i++) {
        size_t b = i / d / T, t = i / d % T, c = i % d;
        const double *row = head + (b * cut + t) * d;
        if (t >= cut) row = tail + (b * (T - cut) + t - cut) * d;
        wrong_cut += all[i] != row[c];
        wrong_one += b == 0 && c < narrow && all[i] != one[t * narrow + c];
        wrong_start += start[i] != without[i];
        wrong_still += still[i] != 0;
    }
    check(!wrong_cut, "%s, %s: cut at %zu, %zu numbers differ", op, sizes, cut, wrong_cut);
    check(!wrong_one, "%s, %s: one row alone, %zu columns wide, %zu numbers differ", op, sizes,
          narrow, wrong_one);
    check(!wrong_start && !wrong_still,
          "%s, %s: %zu numbers differ without past, %zu are not 0 at sigma 0", op, sizes,
          wrong_start, wrong_still);
    if (trial == 0) check_distribution();
}

// ---- Optimizers --------------------------------------------------------------------------------
// Like a second moment: not negative.
static void square(array a) {
    for (size_t i = 0; i < a.n; i++) a.host[i] *= a.host[i];
}

static void test_sum_squares(void) {
    size_t n = trial == 3   ? (1 << 22) + 4097
               : trial == 4 ? 16384
               : trial == 5 ? 16385
                            : pick_size(1, 100000);
    describe("n %zu", n);
    array x = random_f32(n);
    double want = 0.75, *sum = device_number(want); // the operation adds to what is there
    ops->sum_squares(sum, x.f32, n);
    for (size_t i = 0; i < n; i++) want += x.host[i] * x.host[i];
    check_sum(sum, want, 8 * U);
    set_nan(x, n / 2);
    ops->sum_squares(sum, x.f32, n);
    check(isnan(download_number(sum)), "%s, %s: NaN does not show", op, sizes);
}

// torch.optim.AdamW, the single-tensor form.
static void test_adamw_update(void) {
    static const size_t steps[] = {1, 7, 1000};
    size_t n = pick_size(1, 5000), t = steps[trial % 3];
    float scale = (float)uniform(), lr = (float)(uniform() * 1e-2), eps = 1e-8f;
    float beta1 = 0.9f, beta2 = trial % 2 ? 0.95f : 0.999f, decay = trial % 4 ? 0.1f : 0;
    double bias1 = 1 - pow(beta1, (double)t), bias2 = 1 - pow(beta2, (double)t);
    describe("n %zu t %zu beta2 %g decay %g", n, t, beta2, decay);
    array w = random_f32(n), m = random_f32(n), v = random_f32(n), g = random_f32(n);
    square(v);
    for (size_t i = 0; t == 1 && i < n; i++) { // moments are zero at first
        m.host[i] = 0;
        v.host[i] = 0;
    }
    g.host[0] = 0;
    upload(m);
    upload(v);
    upload(g);
    double *w_terms = zeros(n), *m_terms = zeros(n), *v_terms = zeros(n);
    for (size_t i = 0; i < n; i++) {
        double gi = (double)g.host[i] * scale;
        m_terms[i] = fabs(m.host[i]) + fabs(gi);
        m.host[i] = beta1 * m.host[i] + (1.0 - beta1) * gi;
        v.host[i] = beta2 * v.host[i] + (1.0 - beta2) * gi * gi;
        v_terms[i] = v.host[i];
        double step = lr / bias1 / (sqrt(v.host[i]) / sqrt(bias2) + eps);
        w_terms[i] = fabs(w.host[i]) + step * m_terms[i];
        w.host[i] = w.host[i] * (1 - (double)lr * decay) - step * m.host[i];
    }
    ops->adamw_update(w.f32, m.f32, v.f32, g.f32, n, scale, lr, beta1, beta2, bias1, bias2, eps,
                      decay);
    check_near("w", w, w.host, w_terms, 10 * U);
    check_near("m", m, m.host, m_terms, 4 * U);
    check_near("v", v, v.host, v_terms, 6 * U);
}

static void test_ellisadam_moments(void) {
    size_t n = trial == 2 ? (1 << 20) + 4099 : pick_size(1, 5000);
    float scale = (float)uniform(), eps = trial % 3 ? 1e-6f : 0.5f;
    float beta1 = trial % 2 ? 0.9f : 0, beta2 = trial % 2 ? 0.95f : 0;
    describe("n %zu beta %g %g eps %g", n, beta1, beta2, eps);
    array m = random_f32(n), v = random_f32(n), g = random_f32(n);
    square(v);
    if (n > 1) g.host[1] = 0;
    upload(v);
    upload(g);
    double *m_terms = zeros(n), *v_terms = zeros(n), want = 0.5, *sum = device_number(want);
    for (size_t i = 0; i < n; i++) {
        double gi = (double)g.host[i] * scale;
        m_terms[i] = fabs(m.host[i]) + fabs(gi);
        m.host[i] = beta1 * m.host[i] + (1.0 - beta1) * gi;
        v.host[i] = fmax(beta2 * v.host[i] + (1.0 - beta2) * gi * gi, (double)eps * eps);
        v_terms[i] = v.host[i];
        want += gi * gi / v.host[i];
    }
    ops->ellisadam_moments(m.f32, v.f32, sum, g.f32, n, scale, beta1, beta2, eps);
    check_near("m", m, m.host, m_terms, 4 * U);
    check_near("v", v, v.host, v_terms, 6 * U);
    check_sum(sum, want, 12 * U);
}

static void test_ellisadam_update(void) {
    size_t n = pick_size(1, 5000);
    float lr = (float)(uniform() * 1e-2), decay = trial % 4 ? 0.1f : 0;
    double bias1 = trial % 2 ? 0.1 : 0.9, bias2 = trial % 2 ? 0.05 : 0.99;
    double mean = trial % 3 ? 2.5 : 0.3, sum = (double)n * mean; // of g²/v
    describe("n %zu bias %g %g decay %g, sum / n %g", n, bias1, bias2, decay, mean);
    array w = random_f32(n), m = random_f32(n), v = random_f32(n);
    square(v);
    if (n > 2) v.host[2] = 0;
    upload(v);
    double *terms = zeros(n), step = lr / bias1 / fmax(1, sqrt(sum / (double)n));
    for (size_t i = 0; i < n; i++) {
        double update = step * atan2(m.host[i], sqrt(v.host[i] / bias2));
        terms[i] = fabs(w.host[i]) + fabs(update);
        w.host[i] = w.host[i] * (1 - (double)decay) - update;
    }
    ops->ellisadam_update(w.f32, m.f32, v.f32, device_number(sum), n, lr, bias1, bias2, decay);
    check_near("w", w, w.host, terms, 10 * U);
}

static void test_muon_momentum(void) {
    size_t n = pick_size(1, 5000);
    float scale = (float)uniform(), momentum = trial % 2 ? 0.95f : 0.5f;
    describe("n %zu momentum %g", n, momentum);
    array u = unset_f32(n), m = random_f32(n), g = random_f32(n);
    double *terms = zeros(n);
    for (size_t i = 0; i < n; i++) {
        double gi = (double)g.host[i] * scale;
        terms[i] = fabs(m.host[i]) + fabs(gi);
        m.host[i] = momentum * m.host[i] + (1.0 - momentum) * gi;
        u.host[i] = momentum * m.host[i] + (1.0 - momentum) * gi;
    }
    ops->muon_momentum(u.f32, m.f32, g.f32, n, scale, momentum);
    check_near("m", m, m.host, terms, 4 * U);
    check_near("u", u, u.host, terms, 7 * U);
}

// Where Muon keeps element i of a matrix: a tall one lies transposed.
static size_t muon_place(size_t i, size_t rows, size_t cols) {
    return rows > cols ? i % cols * rows + i / cols : i;
}

static void test_muon_load(void) {
    size_t rows = pick_size(1, 70), cols = trial == 2 ? rows : pick_size(1, 50);
    describe("rows %zu cols %zu", rows, cols);
    array u = random_f32(rows * cols), x = unset_act(rows * cols);
    double squares = trial == 3 ? 0 : exp(4 * normal()), scale = 1 / (sqrt(squares) + 1e-7);
    for (size_t i = 0; i < x.n; i++) x.host[muon_place(i, rows, cols)] = u.host[i] * scale;
    ops->muon_load(x.data, u.f32, device_number(squares), rows, cols);
    check_near("x", x, x.host, x.host, 2 * U);
}

static void test_muon_update(void) {
    size_t rows = pick_size(1, 70), cols = trial == 2 ? rows : pick_size(1, 50);
    float lr = (float)uniform(), scale = (float)uniform() + 1, decay = trial % 3 ? 0.1f : 0;
    describe("rows %zu cols %zu lr %g scale %g decay %g", rows, cols, lr, scale, decay);
    array w = random_f32(rows * cols), x = random_act(rows * cols, 1);
    double *terms = zeros(w.n);
    for (size_t i = 0; i < w.n; i++) {
        double step = (double)lr * scale * x.host[muon_place(i, rows, cols)];
        terms[i] = fabs(w.host[i]) + fabs(step);
        w.host[i] = w.host[i] * (1 - (double)lr * decay) - step;
    }
    ops->muon_update(w.f32, x.data, rows, cols, lr, scale, decay);
    check_near("w", w, w.host, terms, 5 * U);
}

// ---- All of them -------------------------------------------------------------------------------
// An operation without a test does not compile.
#define X(name, parameters) {#name, test_##name},
static const struct {
    const char *name;
    void (*run)(void);
} cases[] = {RETROFIT_OPS(X)};
#undef X

static void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// All trials of one operation; the digest of what it has returned.
static uint64_t run_trials(size_t i) {
    snprintf(op, sizeof op, "%s %s", ops->name, cases[i].name);
    *sizes = 0;
    rng = 1000 + i;
    draws = 0;
    digest = 0;
    for (trial = 0; trial < trials; trial++) {
        cases[i].run();
        release();
    }
    return digest;
}

static void test_table(const retrofit_ops *table, const char *only) {
    ops = table;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (only && !strstr(cases[i].name, only)) continue;
        uint64_t digests[2];
        for (int run = 0; run < 2; run++) {
            replay = run == 1;
            set_threads(replay ? 1 : 3);
            digests[run] = run_trials(i);
        }
        check(digests[0] == digests[1],
              "%s: a second run, with another number of threads, gives other bits", op);
    }
    *op = 0;
}

// A failing call of CUDA ends the program, a kernel that hangs is ended from outside. Then this is
// its last line.
static void say_where(void) {
    if (*op) printf("FAILED %s, %s: the program ended here\n", op, sizes);
    fflush(stdout);
}

static void stop(int signal) {
    say_where();
    _exit(128 + signal);
}

// retrofit_cpu's own blocks are a little larger than asked for, so the sanitizer would miss what is
// written or read closely behind them.
static void *exact_alloc(size_t bytes) {
    void *p = NULL;
    need(!posix_memalign(&p, 64, bytes ? bytes : 1), "memory");
    return memset(p, 0, bytes);
}

// An argument: only operations that have it in their name.
int main(int count, char **args) {
    const char *only = count > 1 ? args[1] : NULL;
#ifdef RETROFIT_CUDA
    char text[256];
    need(retrofit_device(RETROFIT_ON_CUDA, false, text) != NULL, "a GPU");
    atexit(say_where);
    signal(SIGTERM, stop);
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ); // for whoever looks while it runs, or after it hung
    trials = getenv("TRIALS") ? strtoul(getenv("TRIALS"), NULL, 10) : 52;
    test_table(&retrofit_cuda, only);
    test_table(&retrofit_cuda_fp32, only);
    return finish("operations on a GPU");
#else
    retrofit_ops cpu = retrofit_cpu;
    if (!guard) {
        cpu.alloc = exact_alloc;
        cpu.free = free;
    }
    on_cpu = true;
    trials = 12;
    test_table(&cpu, only);
    return finish("operations");
#endif
}

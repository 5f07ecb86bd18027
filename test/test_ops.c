// Every operation of a table against its definition: plain loops in double, and central differences of those loops for derivatives.
//
// Inputs are first rounded to the type in which the table holds them, so a reference sees the very same numbers. What remains are the
// roundings of the operation itself. U = 2^-24 is the largest relative error of one rounding to fp32; K roundings of independent sign add
// up to about √K of them (Higham and Mary 2019), so a sum may be off by (4 + 2√K)·U·Σ|terms|, and an output in bf16 by 2^-8 of itself more.
// Gradients of what is not linear are compared tensor by tensor, ‖a - b‖ / ‖b‖: 60·U (and 4·2^-8 for bf16).
#include "test.h"
#include <float.h>
#if defined __SANITIZE_ADDRESS__
#define SANITIZED 1
#elif defined __has_feature
#if __has_feature(address_sanitizer)
#define SANITIZED 1
#endif
#endif
#ifdef SANITIZED
enum { GUARD = 0 }; // the sanitizer watches what lies behind a block, reads too
#else
enum { GUARD = 64 }; // bytes behind each block that must stay as they are
#endif
enum { TRIALS = 12 };
static const double U = 0x1p-24;

static const char *op;     // the operation under test
static char shape[256];    // and the sizes it is given: both go into every message
static size_t trial;       // 0: the smallest sizes, 1: the largest, then random ones
static bool replay;        // the second run, which only has to repeat the first one's bits
static uint64_t digest;    // of all bits that operations have returned
static uint64_t rng, draws;

static double uniform(void) { return hash_uniform(rng, draws++); }
static double normal(void) {
    double r = sqrt(-2 * log(uniform()));
    return r * cos(2 * 3.14159265358979323846 * uniform());
}
static size_t any(size_t lo, size_t hi) { return lo + (size_t)(uniform() * (double)(hi - lo + 1)); }
static size_t pick(size_t lo, size_t hi) { return trial == 0 ? lo : trial == 1 ? hi : any(lo, hi); }
#define SHAPE(...) snprintf(shape, sizeof shape, __VA_ARGS__)
#define EACH_TRIAL(ops, seed) for (rng = (seed), draws = trial = 0; trial < TRIALS; trial++, release(ops))

// ---- Arrays: numbers on the host in double, and the same on the device -----------------------------------------------------
typedef struct {
    const retrofit_ops *ops;
    retrofit_type type;
    size_t n;
    double *x;
    void *at;
} array;

static void *on_host[256], *on_device[64];
static size_t hosts, devices;

static double *doubles(size_t n) { // zeros, until release
    double *x = (double *)allocate(n, sizeof *x);
    need(x && hosts < 256, "memory");
    return on_host[hosts++] = x, x;
}

static void release(const retrofit_ops *ops) {
    while (hosts) free(on_host[--hosts]);
    while (devices) ops->free(on_device[--devices]);
}

static double decode(retrofit_type type, const void *from) {
    float f;
    uint16_t half;
    int32_t i;
    if (type == RETROFIT_F32) return memcpy(&f, from, 4), f;
    if (type == RETROFIT_BF16) return memcpy(&half, from, 2), bf16_to_float(half);
    return memcpy(&i, from, 4), i;
}

static void encode(retrofit_type type, void *to, double x, bool odd) { // odd: a NaN as memset(…, 0xff) leaves it, all its bits set
    float f = (float)x;
    uint16_t half = float_to_bf16(f);
    int32_t i = type == RETROFIT_I32 ? (int32_t)x : 0;
    if (isnan(x) && odd) memset(to, 0xff, retrofit_type_size(type));
    else memcpy(to, type == RETROFIT_F32 ? (void *)&f : type == RETROFIT_BF16 ? (void *)&half : &i, retrofit_type_size(type));
}

static void send(array a) { // and rounds a.x to what was sent
    size_t size = retrofit_type_size(a.type);
    char *bytes = (char *)doubles(a.n * size / 8 + GUARD / 8 + 1);
    for (size_t i = 0; i < a.n; i++) encode(a.type, bytes + i * size, a.x[i], i & 1), a.x[i] = decode(a.type, bytes + i * size);
    memset(bytes + a.n * size, 0xa5, GUARD);
    a.ops->upload(a.at, bytes, a.n * size + GUARD);
}

static double *fetch(array a) {
    size_t size = retrofit_type_size(a.type), broken = 0;
    unsigned char *bytes = (unsigned char *)doubles(a.n * size / 8 + GUARD / 8 + 1);
    double *x = doubles(a.n);
    a.ops->download(bytes, a.at, a.n * size + GUARD);
    for (size_t i = 0; i < a.n; i++) x[i] = decode(a.type, bytes + i * size);
    for (size_t i = 0; i < a.n * size; i++) digest = (digest ^ bytes[i]) * 0x100000001b3;
    for (size_t i = 0; i < GUARD; i++) broken += bytes[a.n * size + i] != 0xa5;
    check(!broken, "%s, %s: wrote %zu bytes behind the end of an array of %zu", op, shape, broken, a.n);
    return x;
}

static array put(const retrofit_ops *ops, retrofit_type type, size_t n, double *x) {
    array a = {ops, type, n, x, ops->alloc(n * retrofit_type_size(type) + GUARD)};
    need(a.at && devices < 64, "device memory");
    on_device[devices++] = a.at;
    return send(a), a;
}
static array randoms(const retrofit_ops *ops, retrofit_type type, size_t n) {
    double *x = doubles(n);
    for (size_t i = 0; i < n; i++) x[i] = normal();
    return put(ops, type, n, x);
}
static array garbage(const retrofit_ops *ops, retrofit_type type, size_t n) { // NaN: shows unless it is overwritten
    double *x = doubles(n);
    for (size_t i = 0; i < n; i++) x[i] = NAN;
    return put(ops, type, n, x);
}
static array integers(const retrofit_ops *ops, size_t n, size_t lo, size_t hi) {
    double *x = doubles(n);
    for (size_t i = 0; i < n; i++) x[i] = (double)any(lo, hi);
    return put(ops, RETROFIT_I32, n, x);
}
static array act_randoms(const retrofit_ops *ops, size_t n) { return randoms(ops, ops->act_type, n); }
static array act_garbage(const retrofit_ops *ops, size_t n) { return garbage(ops, ops->act_type, n); }

static void poison(array a, size_t i) { a.x[i] = NAN, send(a); }
static double *copy(const double *x, size_t n) { return (double *)memcpy(doubles(n), x, n * sizeof *x); }
static double *zeros_then(const double *x, size_t n) { return x ? copy(x, n) : doubles(n); }

// A matrix in either type; between its rows lies NaN, behind the last one nothing.
static array matrix(const retrofit_ops *ops, retrofit_type type, size_t rows, size_t cols, size_t stride) {
    double *x = doubles((rows - 1) * stride + cols);
    for (size_t i = 0; i < (rows - 1) * stride + cols; i++) x[i] = i % stride < cols ? normal() : NAN;
    return put(ops, type, (rows - 1) * stride + cols, x);
}
static retrofit_weight weight_of(array a, size_t stride) {
    retrofit_weight w = {a.at, a.type, stride};
    return w;
}

// ---- Comparisons -----------------------------------------------------------------------------------------------------------
static double unit(retrofit_type type) { return type == RETROFIT_F32 ? U : type == RETROFIT_BF16 ? 0x1p-8 : 0; }
static double sum_of(size_t K) { return (4 + 2 * sqrt((double)K)) * U; }

// Element by element: |out - want| <= error·terms + one rounding of the result; NaN where, and only where, NaN is wanted. Without terms that
// leaves equality for numbers that the type can hold. Infinite terms: anything goes.
static void near(const char *what, array out, const double *want, const double *terms, double error) {
    const double *got = fetch(out);
    double worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < out.n && !replay; i++) {
        if (terms && isinf(terms[i])) continue;
        double bound = (terms && !isnan(want[i]) ? error * terms[i] : 0) + unit(out.type) * fabs(want[i]) + FLT_MIN;
        double excess = isnan(want[i]) || isnan(got[i]) ? (isnan(want[i]) && isnan(got[i]) ? 0 : INFINITY) : fabs(got[i] - want[i]) / bound;
        if (!(excess <= worst)) worst = excess, at = i;
    }
    check(worst <= 1, "%s, %s: %s[%zu] is %.9g, should be %.9g: %.3g times the error that rounding explains", op, shape, what, at, got[at],
          want[at], worst);
}

// As a tensor: ‖out - want‖ / ‖want‖.
static void near_tensor(const char *what, array out, const double *want) {
    const double *got = fetch(out);
    double difference = 0, size = 0, limit = 60 * U + (out.ops->act_type == RETROFIT_BF16 ? 0x4p-8 : 0);
    for (size_t i = 0; i < out.n; i++) difference += (got[i] - want[i]) * (got[i] - want[i]), size += want[i] * want[i];
    double error = difference == 0 ? 0 : sqrt(difference / size);
    check(replay || error < limit, "%s, %s: %s is off by %.3g of its norm, more than %.3g", op, shape, what, error, limit);
}

// out[i] += d(w·y)/dx[i], y = (m) what `forward` computes from x: (y(x + h) - y(x - h)) / 2h. In double its error is about 1e-9.
static double lower_side[1 << 15];
#define DIFFERENCES(out, x, n, forward, y, w, m)                                                                                           \
    for (size_t i_ = 0; !replay && i_ < (n); i_++) {                                                                                       \
        double keep_ = (x)[i_], lo_ = keep_ - 1e-5, hi_ = keep_ + 1e-5, sum_ = 0;                                                          \
        (x)[i_] = lo_, forward, memcpy(lower_side, y, (m) * sizeof *lower_side);                                                           \
        (x)[i_] = hi_, forward, (x)[i_] = keep_;                                                                                           \
        for (size_t j_ = 0; j_ < (m); j_++) sum_ += (w)[j_] * ((y)[j_] - lower_side[j_]);                                                  \
        (out)[i_] += sum_ / (hi_ - lo_);                                                                                                   \
    }

// ---- Embedding -------------------------------------------------------------------------------------------------------------
static void embed(double *x, const double *tokens, const double *wte, size_t stride, size_t N, size_t d) {
    for (size_t i = 0; i < N * d; i++) x[i] = wte[(size_t)tokens[i / d] * stride + i % d];
}

static void test_embedding_forward(const retrofit_ops *ops, uint64_t seed) {
    EACH_TRIAL(ops, seed) {
        size_t N = pick(1, 70), d = pick(1, 100), V = pick(1, 50), stride = d + trial % 3;
        SHAPE("N %zu d %zu V %zu stride %zu, %s", N, d, V, stride, trial & 1 ? "bf16" : "f32");
        array tokens = integers(ops, N, 0, V - 1), x = garbage(ops, RETROFIT_F32, N * d);
        array wte = matrix(ops, trial & 1 ? RETROFIT_BF16 : RETROFIT_F32, V, d, stride);
        ops->embedding_forward((float *)x.at, (int32_t *)tokens.at, weight_of(wte, stride), N, d);
        double *want = doubles(N * d);
        embed(want, tokens.x, wte.x, stride, N, d);
        near("x", x, want, NULL, 0);
    }
}

static void test_embedding_backward(const retrofit_ops *ops, uint64_t seed) {
    EACH_TRIAL(ops, seed) {
        size_t N = pick(1, 70), d = pick(1, 100), V = pick(1, 20); // tokens repeat, and some do not occur
        SHAPE("N %zu d %zu V %zu", N, d, V);
        array tokens = integers(ops, N, 0, V - 1), dx = randoms(ops, RETROFIT_F32, N * d), dwte = randoms(ops, RETROFIT_F32, V * d);
        ops->embedding_backward((float *)dwte.at, (int32_t *)tokens.at, (float *)dx.at, N, d);
        double *wte = doubles(V * d), *want = copy(dwte.x, V * d), *x = doubles(N * d), *terms = doubles(V * d);
        DIFFERENCES(want, wte, V * d, embed(x, tokens.x, wte, d, N, d), x, dx.x, N * d)
        for (size_t i = 0; i < V * d; i++) terms[i] = fabs(dwte.x[i]);
        for (size_t i = 0; i < N * d; i++) terms[(size_t)tokens.x[i / d] * d + i % d] += fabs(dx.x[i]);
        near("dwte", dwte, want, terms, sum_of(N));
    }
}

// ---- RMSNorm ---------------------------------------------------------------------------------------------------------------
static void normalize(double *out, double *rstd, const double *x, const double *weight, size_t N, size_t d, double eps) {
    for (size_t n = 0; n < N; n++) {
        double squares = 0;
        for (size_t c = 0; c < d; c++) squares += x[n * d + c] * x[n * d + c];
        rstd[n] = 1 / sqrt(squares / (double)d + eps);
        for (size_t c = 0; c < d; c++) out[n * d + c] = x[n * d + c] * rstd[n] * weight[c];
    }
}

static void test_rmsnorm_forward(const retrofit_ops *ops, uint64_t seed) {
    EACH_TRIAL(ops, seed) {
        size_t N = pick(1, 70), d = pick(1, 100);
        float eps = trial & 1 ? 1e-5f : 0.1f;
        SHAPE("N %zu d %zu eps %g%s", N, d, eps, trial % 3 == 2 ? ", with NaN" : "");
        array x = randoms(ops, RETROFIT_F32, N * d), w = randoms(ops, RETROFIT_F32, d);
        array out = act_garbage(ops, N * d), rstd = garbage(ops, RETROFIT_F32, N);
        if (trial % 3 == 2) poison(trial & 1 ? x : w, any(0, trial & 1 ? N * d - 1 : d - 1));
        ops->rmsnorm_forward(out.at, (float *)rstd.at, (float *)x.at, (float *)w.at, N, d, eps);
        double *want = doubles(N * d), *r = doubles(N); // the terms of Σx² are positive: sum, root and quotient are each off relatively
        normalize(want, r, x.x, w.x, N, d, eps);
        near("out", out, want, want, 0);
        near("rstd", rstd, r, r, sum_of(d));
    }
}

static void test_rmsnorm_backward(const retrofit_ops *ops, uint64_t seed) {
    EACH_TRIAL(ops, seed) {
        size_t N = pick(1, 70), d = pick(1, 100);
        double eps = trial & 1 ? 1e-5 : 0.1; // with d = 1, y is ±w but for eps, and dx what two large terms leave: eps must not be small
        SHAPE("N %zu d %zu eps %g", N, d, eps);
        array x = randoms(ops, RETROFIT_F32, N * d), w = randoms(ops, RETROFIT_F32, d), dout = act_randoms(ops, N * d);
        array dx = randoms(ops, RETROFIT_F32, N * d), dw = randoms(ops, RETROFIT_F32, d);
        double *y = doubles(N * d), *r = doubles(N), *want = copy(dx.x, N * d), *dwant = copy(dw.x, d);
        DIFFERENCES(dwant, w.x, d, normalize(y, r, x.x, w.x, N, d, eps), y, dout.x, N * d)
        for (size_t n = 0; n < N; n++) // a row depends on itself alone
            DIFFERENCES(want + n * d, x.x + n * d, d, normalize(y, r, x.x + n * d, w.x, 1, d, eps), y, dout.x + n * d, d)
        normalize(y, r, x.x, w.x, N, d, eps);
        array rstd = put(ops, RETROFIT_F32, N, r);
        ops->rmsnorm_backward((float *)dx.at, (float *)dw.at, dout.at, (float *)x.at, (float *)rstd.at, (float *)w.at, N, d);
        near_tensor("dx", dx, want);
        near_tensor("dweight", dw, dwant);
        size_t bad = any(0, N * d - 1); // the same again with a NaN: all of its row, its element of the weight, and no other
        double *before = copy(dx.x, N * d), *dbefore = copy(dw.x, d);
        send(dx), send(dw), ops->rmsnorm_backward((float *)dx.at, (float *)dw.at, dout.at, (float *)x.at, (float *)rstd.at, (float *)w.at, N, d);
        before = fetch(dx), dbefore = fetch(dw);
        poison(dout, bad), send(dx), send(dw);
        ops->rmsnorm_backward((float *)dx.at, (float *)dw.at, dout.at, (float *)x.at, (float *)rstd.at, (float *)w.at, N, d);
        for (size_t c = 0; c < d; c++) before[bad / d * d + c] = NAN;
        dbefore[bad % d] = NAN;
        near("dx with NaN", dx, before, NULL, 0), near("dweight with NaN", dw, dbefore, NULL, 0);
    }
}


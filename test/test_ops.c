// Every operation of a table against its definition: plain loops in double, and central differences of those loops for derivatives.
//
// Inputs are first rounded to the type in which the table holds them, so a reference sees the very same numbers. What remains are the
// roundings of the operation itself. U = 2^-24 is the largest relative error of one rounding to fp32; K roundings of independent sign add
// up to about √K of them (Higham and Mary 2019), so a sum may be off by (4 + 2√K)·U·Σ|terms|, and an output in bf16 by 2^-8 of itself more.
// Gradients of what is not linear are compared tensor by tensor, ‖a - b‖ / ‖b‖: 20·U (and 4·2^-8 for bf16).
#include "test.h"
#include <float.h>
#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined __SANITIZE_ADDRESS__ || __has_feature(address_sanitizer)
static const size_t guard = 0; // the sanitizer watches what lies behind a block, reads too
#else
static const size_t guard = 64; // bytes behind each block that must stay as they are
#endif
static size_t trials;
static const double U = 0x1p-24;

static const retrofit_ops *device;
static bool on_cpu; // which reads matrices in either type; a GPU in its act_type only
static const char *op;  // the operation under test
static char shape[256]; // and the sizes it is given: both go into every message
static size_t trial;    // 0: the smallest sizes, 1: the largest, then random ones
static bool replay;     // the second run, which only has to repeat the first one's bits
static uint64_t digest; // of all bits that operations have returned
static uint64_t rng, draws;

static double uniform(void) { return retrofit_hash_uniform(rng, draws++); }
static double normal(void) {
    double r = sqrt(-2 * log(uniform()));
    return r * cos(2 * 3.14159265358979323846 * uniform());
}
static size_t any(size_t lo, size_t hi) { return lo + (size_t)(uniform() * (double)(hi - lo + 1)); }
static size_t pick(size_t lo, size_t hi) { return trial == 0 ? lo : trial == 1 ? hi : any(lo, hi); }
// One trial of the operation `name`, with random numbers from rng.
#define TEST(name) static void test_##name(const retrofit_ops *ops)
#define SHAPE(...) snprintf(shape, sizeof shape, __VA_ARGS__)

// ---- Arrays: numbers on the host in double, and the same on the device -----------------------------------------------------
typedef struct {
    retrofit_type type;
    size_t n;
    double *x; // on the host
    void *at;  // on the device; f and i: the same address, for arrays of fp32 and of integers
    float *f;
    int32_t *i;
} array;

static void *on_host[256], *on_device[64];
static size_t hosts, devices;

static double *doubles(size_t n) { // zeros, until release
    double *x = (double *)retrofit_allocate(n, sizeof *x);
    need(x && hosts < 256, "memory");
    return on_host[hosts++] = x, x;
}

static void release(void) {
    while (hosts) free(on_host[--hosts]);
    while (devices) device->free(on_device[--devices]);
}

static double decode(retrofit_type type, const void *from) {
    float f;
    uint16_t half;
    int32_t i;
    if (type == RETROFIT_F32) return memcpy(&f, from, 4), f;
    if (type == RETROFIT_BF16) return memcpy(&half, from, 2), retrofit_bf16_to_float(half);
    return memcpy(&i, from, 4), i;
}

static void encode(retrofit_type type, void *to, double x, bool odd) { // odd: a NaN as memset(…, 0xff) leaves it, all its bits set
    float f = (float)x;
    uint16_t half = retrofit_float_to_bf16(f);
    int32_t i = type == RETROFIT_I32 ? (int32_t)x : 0;
    if (isnan(x) && odd) memset(to, 0xff, retrofit_type_size(type));
    else memcpy(to, type == RETROFIT_F32 ? (void *)&f : type == RETROFIT_BF16 ? (void *)&half : &i, retrofit_type_size(type));
}

static void send(array a) { // and rounds a.x to what was sent
    size_t size = retrofit_type_size(a.type);
    char *bytes = (char *)doubles(a.n * size / 8 + guard / 8 + 1);
    for (size_t i = 0; i < a.n; i++) encode(a.type, bytes + i * size, a.x[i], i & 1), a.x[i] = decode(a.type, bytes + i * size);
    memset(bytes + a.n * size, 0xa5, guard);
    device->upload(a.at, bytes, a.n * size + guard);
}

static double *fetch(array a) {
    size_t size = retrofit_type_size(a.type), broken = 0;
    unsigned char *bytes = (unsigned char *)doubles(a.n * size / 8 + guard / 8 + 1);
    double *x = doubles(a.n);
    device->download(bytes, a.at, a.n * size + guard);
    for (size_t i = 0; i < a.n; i++) x[i] = decode(a.type, bytes + i * size);
    for (size_t i = 0; i < a.n * size; i++) digest = (digest ^ bytes[i]) * 0x100000001b3;
    for (size_t i = 0; i < guard; i++) broken += bytes[a.n * size + i] != 0xa5;
    check(!broken, "%s, %s: wrote %zu bytes behind the end of an array of %zu", op, shape, broken, a.n);
    return x;
}

static array array_of(retrofit_type type, size_t n, double *x) {
    void *p = device->alloc(n * retrofit_type_size(type) + guard);
    need(p && devices < 64, "device memory");
    array a = {type, n, x, p, (float *)p, (int32_t *)p};
    return on_device[devices++] = p, send(a), a;
}
static array filled(retrofit_type type, size_t n, double scale) { // NaN: garbage, which shows unless it is overwritten
    double *x = doubles(n);
    for (size_t i = 0; i < n; i++) x[i] = isnan(scale) ? scale : scale * normal();
    return array_of(type, n, x);
}
static array f32(size_t n) { return filled(RETROFIT_F32, n, 1); }
static array f32_unset(size_t n) { return filled(RETROFIT_F32, n, NAN); }
static array acts(size_t n, double scale) { return filled(device->act_type, n, scale); }
static array acts_unset(size_t n) { return filled(device->act_type, n, NAN); }
static array integers(size_t n, size_t lo, size_t hi) {
    double *x = doubles(n);
    for (size_t i = 0; i < n; i++) x[i] = (double)any(lo, hi);
    return array_of(RETROFIT_I32, n, x);
}
static void poison(array a, size_t i) { a.x[i] = NAN, send(a); }
static double *copy(const double *x, size_t n) { return (double *)memcpy(doubles(n), x, n * sizeof *x); }

// A matrix in either type; between its rows lies NaN, behind the last one nothing.
static array matrix(retrofit_type type, size_t rows, size_t cols, size_t stride) {
    double *x = doubles((rows - 1) * stride + cols);
    for (size_t i = 0; i < (rows - 1) * stride + cols; i++) x[i] = i % stride < cols ? normal() : NAN;
    return array_of(type, (rows - 1) * stride + cols, x);
}
static retrofit_weight weight_of(array a, size_t stride) {
    retrofit_weight w = {a.at, a.type, stride};
    return w;
}

// ---- Comparisons -----------------------------------------------------------------------------------------------------------
static double unit(retrofit_type type) { return type == RETROFIT_F32 ? U : type == RETROFIT_BF16 ? 0x1p-8 : 0; }
static double sum_of(size_t K) { return (4 + 2 * sqrt((double)K)) * U; }

// Element by element: |out - want| <= error·terms + one rounding of the result; NaN where, and only where, NaN is wanted. Without terms
// that leaves equality for numbers that the type can hold. Infinite terms: anything goes.
static void near(const char *what, array out, const double *want, const double *terms, double error) {
    const double *got = fetch(out);
    double worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < out.n && !replay; i++) {
        if (terms && isinf(terms[i])) continue;
        double bound = (terms && !isnan(want[i]) ? error * fabs(terms[i]) : 0) + unit(out.type) * fabs(want[i]) + FLT_MIN;
        double excess = isnan(want[i]) || isnan(got[i]) ? (isnan(want[i]) && isnan(got[i]) ? 0 : INFINITY) : fabs(got[i] - want[i]) / bound;
        if (!(excess <= worst)) worst = excess, at = i;
    }
    check(worst <= 1, "%s, %s: %s[%zu] is %.9g, should be %.9g: %.3g times the error that rounding explains", op, shape, what, at, got[at],
          want[at], worst);
}

// As a tensor: ‖out - want‖ / ‖want‖.
static void near_tensor(const char *what, array out, const double *want) {
    const double *got = fetch(out);
    double difference = 0, size = 0, limit = 20 * U + (device->act_type == RETROFIT_BF16 ? 0x4p-8 : 0);
    for (size_t i = 0; i < out.n; i++) difference += (got[i] - want[i]) * (got[i] - want[i]), size += want[i] * want[i];
    double error = difference == 0 ? 0 : sqrt(difference / size);
    check(replay || error < limit, "%s, %s: %s is off by %.3g of its norm, more than %.3g", op, shape, what, error, limit);
}

// out[i] += d(w·y)/dx[i], y = (m) what `forward` computes from x: (y(x + h) - y(x - h)) / 2h. In double its error is about 1e-9.
static double lower_side[1 << 15];
#define DIFFERENCES(out, x, n, forward, y, w, m)                                          \
    for (size_t i_ = 0; !replay && i_ < (n); i_++) {                                      \
        double keep_ = (x)[i_], lo_ = keep_ - 1e-5, hi_ = keep_ + 1e-5, sum_ = 0;         \
        (x)[i_] = lo_, forward, memcpy(lower_side, y, (m) * sizeof *lower_side);          \
        (x)[i_] = hi_, forward, (x)[i_] = keep_;                                          \
        for (size_t j_ = 0; j_ < (m); j_++) sum_ += (w)[j_] * ((y)[j_] - lower_side[j_]); \
        (out)[i_] += sum_ / (hi_ - lo_);                                                  \
    }

// ---- Embedding -------------------------------------------------------------------------------------------------------------
static void embed(double *x, const double *tokens, const double *wte, size_t stride, size_t N, size_t d) {
    for (size_t i = 0; i < N * d; i++) x[i] = wte[(size_t)tokens[i / d] * stride + i % d];
}

TEST(embedding_forward) {
    size_t N = pick(1, 70), d = trial == 2 ? 2500 : pick(1, 100), V = pick(1, 50), stride = d + trial % 3;
    SHAPE("N %zu d %zu V %zu stride %zu, %s", N, d, V, stride, trial & 1 ? "bf16" : "f32");
    array tokens = integers(N, 0, V - 1), x = f32_unset(N * d);
    array wte = matrix(trial & 1 ? RETROFIT_BF16 : RETROFIT_F32, V, d, stride);
    ops->embedding_forward(x.f, tokens.i, weight_of(wte, stride), N, d);
    double *want = doubles(N * d);
    embed(want, tokens.x, wte.x, stride, N, d);
    near("x", x, want, NULL, 0);
}

TEST(embedding_backward) {
    size_t N = trial == 2 ? 600 : pick(1, 70), d = trial == 2 ? 3 : trial == 3 ? 300 : pick(1, 100), V = pick(1, 20); // tokens repeat, some do not occur
    if (trial == 3) N = 5, V = 2;
    SHAPE("N %zu d %zu V %zu", N, d, V);
    array tokens = integers(N, 0, V - 1), dx = f32(N * d), dwte = f32(V * d);
    ops->embedding_backward(dwte.f, tokens.i, dx.f, N, d);
    double *wte = doubles(V * d), *want = copy(dwte.x, V * d), *x = doubles(N * d), *terms = doubles(V * d);
    DIFFERENCES(want, wte, V * d, embed(x, tokens.x, wte, d, N, d), x, dx.x, N * d);
    for (size_t i = 0; i < V * d; i++) terms[i] = fabs(dwte.x[i]);
    for (size_t i = 0; i < N * d; i++) terms[(size_t)tokens.x[i / d] * d + i % d] += fabs(dx.x[i]);
    near("dwte", dwte, want, terms, sum_of(N));
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

TEST(rmsnorm_forward) {
    size_t N = pick(1, 70), d = trial == 2 ? 2500 : pick(1, 100);
    float eps = trial & 1 ? 1e-5f : 0.1f;
    SHAPE("N %zu d %zu eps %g%s", N, d, eps, trial % 3 == 2 ? ", with NaN" : "");
    array x = f32(N * d), w = f32(d);
    array out = acts_unset(N * d), rstd = f32_unset(N);
    if (trial % 3 == 2) poison(trial & 1 ? x : w, any(0, trial & 1 ? N * d - 1 : d - 1));
    ops->rmsnorm_forward(out.at, rstd.f, x.f, w.f, N, d, eps);
    double *want = doubles(N * d), *r = doubles(N); // the terms of Σx² are positive: sum, root and quotient are each off relatively
    normalize(want, r, x.x, w.x, N, d, eps);
    near("out", out, want, want, sum_of(d));
    near("rstd", rstd, r, r, sum_of(d));
}

TEST(rmsnorm_backward) {
    size_t N = trial == 2 ? 2500 : trial == 3 ? 2 : pick(1, 70), d = trial == 2 ? 4 : trial == 3 ? 2100 : pick(1, 100);
    double eps = trial & 1 ? 1e-5 : 0.1; // with d = 1, y is ±w but for eps, and dx what two large terms leave: eps must not be small
    SHAPE("N %zu d %zu eps %g", N, d, eps);
    array x = f32(N * d), w = f32(d), dout = acts(N * d, 1);
    array dx = f32(N * d), dw = f32(d);
    double *y = doubles(N * d), *r = doubles(N), *want = copy(dx.x, N * d), *dwant = copy(dw.x, d);
    DIFFERENCES(dwant, w.x, d, normalize(y, r, x.x, w.x, N, d, eps), y, dout.x, N * d);
    for (size_t n = 0; n < N; n++) // a row depends on itself alone
        DIFFERENCES(want + n * d, x.x + n * d, d, normalize(y, r, x.x + n * d, w.x, 1, d, eps), y, dout.x + n * d, d);
    normalize(y, r, x.x, w.x, N, d, eps);
    array rstd = array_of(RETROFIT_F32, N, r);
    ops->rmsnorm_backward(dx.f, dw.f, dout.at, x.f, rstd.f, w.f, N, d);
    near_tensor("dx", dx, want);
    near_tensor("dweight", dw, dwant);
    send(dx), ops->rmsnorm_backward(dx.f, NULL, dout.at, x.f, rstd.f, w.f, N, d); // frozen
    near_tensor("dx without dweight", dx, want);
    size_t bad = any(0, N * d - 1); // the same again with a NaN: all of its row, its element of the weight, and nothing else
    double *dx_nan = fetch(dx), *dw_nan = fetch(dw);
    for (size_t c = 0; c < d; c++) dx_nan[bad / d * d + c] = NAN;
    dw_nan[bad % d] = NAN;
    poison(dout, bad), send(dx), send(dw);
    ops->rmsnorm_backward(dx.f, dw.f, dout.at, x.f, rstd.f, w.f, N, d);
    near("dx with NaN", dx, dx_nan, NULL, 0), near("dweight with NaN", dw, dw_nan, NULL, 0);
}

// ---- Matrix products -------------------------------------------------------------------------------------------------------
// c (M,N; rows c_row apart) += a·b, terms += |a|·|b|; element (i, j) of a is a[i*a_row + j*a_col], and so for b.
static void product(double *c, double *terms, size_t c_row, size_t M, size_t N, size_t K, const double *a, size_t a_row, size_t a_col,
                    const double *b, size_t b_row, size_t b_col) {
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++)
            for (size_t k = 0; k < K; k++) {
                double term = a[i * a_row + k * a_col] * b[k * b_row + j * b_col];
                c[i * c_row + j] += term;
                if (terms) terms[i * c_row + j] += fabs(term);
            }
}

static void forward_product(double *out, const double *inp, const double *w, size_t stride, size_t N, size_t I, size_t O) {
    memset(out, 0, N * O * sizeof *out);
    product(out, NULL, O, N, O, I, inp, I, 1, w, 1, stride);
}

typedef enum { FORWARD, RESIDUAL, INPUT, INPUT_RESIDUAL, WEIGHT } which_product;

static void products(const retrofit_ops *ops, which_product which) {
    static const size_t large[][3] = {{9, 773, 5}, {3, 18500, 6}, {13, 390, 401}, {500, 33, 17}, {12, 30, 800}, {1200, 24, 136}}; // longer than any tile
    const size_t *sizes = trial >= 2 && trial < 8 ? large[trial - 2] : NULL;
    size_t N = sizes ? sizes[0] : pick(1, 70), I = sizes ? sizes[1] : pick(1, 100), O = sizes ? sizes[2] : pick(1, 100);
    bool whole = !sizes && trial % 2; // in multiples of 16 bytes, as models' sizes are: a GPU takes another way then
    if (whole) I = (I + 7) / 8 * 8, O = (O + 7) / 8 * 8;
    if (!sizes && trial % 3 == 2) N = any(1, 10), I *= trial % 4 ? 1 : 8; // decoding: few tokens, of a long row now and then
    size_t stride = I + (trial % 3 ? whole ? 8 * any(0, 2) : any(1, 9) : 0);
    retrofit_type type = on_cpu ? (trial & 1 ? RETROFIT_BF16 : RETROFIT_F32) : ops->act_type;
    bool with_nan = trial % 4 == 3;
    SHAPE("N %zu I %zu O %zu stride %zu, w %s%s", N, I, O, stride, type == RETROFIT_BF16 ? "bf16" : "f32", with_nan ? ", with NaN" : "");
    array inp = acts(N * I, 1), dout = acts(N * O, 1), w = matrix(type, O, I, stride);
    if (with_nan)
        poison(trial & 8 ? w : which < INPUT ? inp : dout, trial & 8 ? (O - 1) * stride + I / 2 : N / 2 * (which < INPUT ? I : O));
    if (which == FORWARD || which == RESIDUAL)
        for (int form = 0; form < (which == RESIDUAL ? 3 : 1); form++) { // no residual, one apart, one in the output's own place
            array out = which == FORWARD ? acts_unset(N * O) : f32_unset(N * O);
            array residual = form == 2 ? out : f32(N * O);
            for (size_t i = 0; form == 2 && i < N * O; i++) out.x[i] = normal();
            send(out);
            double *want = form ? copy(residual.x, N * O) : doubles(N * O), *terms = doubles(N * O);
            for (size_t i = 0; i < N * O; i++) terms[i] = fabs(want[i]);
            product(want, terms, O, N, O, I, inp.x, I, 1, w.x, 1, stride);
            if (which == FORWARD) ops->matmul_forward(out.at, inp.at, weight_of(w, stride), N, I, O);
            else ops->matmul_residual_forward(out.f, form ? residual.f : NULL, inp.at, weight_of(w, stride), N, I, O);
            near(form == 0 ? "out" : form == 1 ? "out with residual" : "out on its residual", out, want, terms, sum_of(I));
        }
    else if (which == INPUT || which == INPUT_RESIDUAL) {
        array dinp = which == INPUT ? acts_unset(N * I) : f32_unset(N * I);
        double *want = doubles(N * I), *terms = doubles(N * I), *differences = doubles(N * I), *y = doubles(O);
        product(want, terms, I, N, I, O, dout.x, O, 1, w.x, stride, 1);
        if (which == INPUT) ops->matmul_backward_input(dinp.at, dout.at, weight_of(w, stride), N, I, O);
        else ops->matmul_residual_backward_input(dinp.f, dout.at, weight_of(w, stride), N, I, O);
        near("dinp", dinp, want, terms, sum_of(O));
        if (sizes || with_nan) return;
        for (size_t n = 0; n < N; n++)
            DIFFERENCES(differences + n * I, inp.x + n * I, I, forward_product(y, inp.x + n * I, w.x, stride, 1, I, O), y, dout.x + n * O,
                        O);
        near("dinp by differences", dinp, differences, terms, sum_of(O));
    } else {
        array dw = matrix(RETROFIT_F32, O, I, stride); // random contents, and NaN between the rows that must stay
        double *want = copy(dw.x, dw.n), *terms = doubles(dw.n), *differences = copy(dw.x, dw.n), *y = doubles(N), *dy = doubles(N);
        for (size_t i = 0; i < dw.n; i++) terms[i] = fabs(dw.x[i]);
        if (with_nan) poison(trial & 8 ? inp : dout, trial & 8 ? I / 2 : O / 2);
        product(want, terms, stride, O, I, N, dout.x, 1, O, inp.x, I, 1);
        ops->matmul_backward_weight(dw.f, stride, dout.at, inp.at, N, I, O);
        near("dw", dw, want, terms, sum_of(N));
        if (sizes || with_nan) return;
        for (size_t o = 0; o < O; o++) { // a row of w makes one column of out
            for (size_t n = 0; n < N; n++) dy[n] = dout.x[n * O + o];
            DIFFERENCES(differences + o * stride, w.x + o * stride, I, forward_product(y, inp.x, w.x + o * stride, stride, N, I, 1), y, dy,
                        N);
        }
        near("dw by differences", dw, differences, terms, sum_of(N));
    }
}

TEST(matmul_forward) { products(ops, FORWARD); }
TEST(matmul_residual_forward) { products(ops, RESIDUAL); }
TEST(matmul_backward_input) { products(ops, INPUT); }
TEST(matmul_residual_backward_input) { products(ops, INPUT_RESIDUAL); }
TEST(matmul_backward_weight) { products(ops, WEIGHT); }

// ---- RoPE ------------------------------------------------------------------------------------------------------------------
// One token: pair (i, i + h/2) of each query and key head, read as a complex number, times e^{i·angle}.
static void rotated(double *y, double *terms, const double *x, const double *angles, size_t H, size_t G, size_t h) {
    for (size_t i = 0; i < (H + 2 * G) * h; i++) {
        size_t pair = i % h % (h / 2), lo = i / h * h + pair, hi = lo + h / 2;
        double re = angles[2 * pair], im = angles[2 * pair + 1];
        y[i] = i >= (H + G) * h ? x[i] : i == lo ? x[lo] * re - x[hi] * im : x[lo] * im + x[hi] * re;
        if (terms) terms[i] = i >= (H + G) * h ? 0 : i == lo ? fabs(x[lo] * re) + fabs(x[hi] * im) : fabs(x[lo] * im) + fabs(x[hi] * re);
    }
}

typedef struct {
    size_t B, T, H, G, h, Q;
} heads;

static heads pick_heads(size_t longest) {
    static const size_t sizes[] = {2, 6, 8, 16, 64, 40, 128}, groups[][2] = {{1, 1}, {8, 1}, {3, 3}, {4, 2}, {9, 3}, {6, 1}};
    const size_t *g = groups[trial < 6 ? trial : any(0, 5)];
    heads s = {pick(1, 3), pick(1, longest), g[0], g[1], sizes[trial < 7 ? trial : any(0, 6)], 0};
    s.Q = (s.H + 2 * s.G) * s.h;
    SHAPE("B %zu T %zu H %zu G %zu h %zu", s.B, s.T, s.H, s.G, s.h);
    return s;
}

static array angles_of(size_t positions, size_t h) { // any angles do: nothing says they must come from positions
    double *x = doubles(positions * h);
    for (size_t i = 0; i < positions * h / 2; i++) x[2 * i] = cos((double)i * i), x[2 * i + 1] = sin((double)i * i);
    return array_of(RETROFIT_F32, positions * h, x);
}

TEST(rope_forward) {
    heads s = pick_heads(40);
    array qkv = acts(s.B * s.T * s.Q, 1), past = integers(s.B, 0, 50), table = angles_of(50 + s.T, s.h);
    double *want = doubles(qkv.n), *terms = doubles(qkv.n);
    for (int shifted = 0; shifted < 2; shifted++) {
        for (size_t n = 0; n < s.B * s.T; n++) {
            size_t position = n % s.T + (shifted ? (size_t)past.x[n / s.T] : 0);
            rotated(want + n * s.Q, terms + n * s.Q, qkv.x + n * s.Q, table.x + position * s.h, s.H, s.G, s.h);
        }
        send(qkv);
        ops->rope_forward(qkv.at, table.f, shifted ? past.i : NULL, s.B, s.T, s.H, s.G, s.h);
        near(shifted ? "qkv with past" : "qkv", qkv, want, terms, 3 * U);
    }
}

TEST(rope_backward) {
    heads s = pick_heads(20);
    array dqkv = acts(s.B * s.T * s.Q, 1), table = angles_of(s.T, s.h);
    double *x = doubles(s.Q), *y = doubles(s.Q), *want = doubles(dqkv.n), *terms = doubles(dqkv.n);
    for (size_t n = 0; n < s.B * s.T; n++) { // token by token; a rotation is linear: its derivative is the same everywhere
        const double *angles = table.x + n % s.T * s.h;
        DIFFERENCES(want + n * s.Q, x, s.Q, rotated(y, NULL, x, angles, s.H, s.G, s.h), y, dqkv.x + n * s.Q, s.Q);
        for (size_t i = 0; i < (s.H + s.G) * s.h; i++)
            terms[n * s.Q + i] = fabs(dqkv.x[n * s.Q + i]) + fabs(dqkv.x[n * s.Q + i / s.h * s.h + (i + s.h / 2) % s.h]);
    }
    ops->rope_backward(dqkv.at, table.f, s.B, s.T, s.H, s.G, s.h);
    for (size_t i = 0; i < dqkv.n; i++) terms[i] += i % s.Q < (s.H + s.G) * s.h ? 0 : 1e-3 * fabs(want[i]); // differences are not exact
    near("dqkv", dqkv, want, terms, 3 * U);
}

// ---- Attention -------------------------------------------------------------------------------------------------------------
// Query t of one head over the keys 0 … t of qkv (T,Q), one row of the batch: out (h) = Σ p·v, lse = log Σ e^{q·k/√h}. terms, if wanted:
// how far roundings may move out, relative to U. A score q·k/√h is off by sum_of(h) of its terms; that changes p by as much, relative to
// itself.
static void attend_row(double *out, double *lse, double *terms, double *score_error, const double *qkv, size_t t, size_t head, heads s,
                       double rounding) {
    static double p[1024];
    const double *q = qkv + t * s.Q + head * s.h, *k = qkv + (s.H + head / (s.H / s.G)) * s.h, *v = k + s.G * s.h;
    double top = -INFINITY, sum = 0, largest_size = 0;
    for (size_t u = 0; u <= t; u++) {
        double size = 0;
        p[u] = 0;
        for (size_t c = 0; c < s.h; c++) p[u] += q[c] * k[u * s.Q + c] / sqrt((double)s.h), size += fabs(q[c] * k[u * s.Q + c]);
        if (p[u] > top) top = p[u];
        if (size > largest_size) largest_size = size;
    }
    for (size_t u = 0; u <= t; u++) sum += p[u] = exp(p[u] - top);
    for (size_t c = 0; c < s.h; c++) out[c] = 0;
    for (size_t u = 0; u <= t; u++)
        for (size_t c = 0; c < s.h; c++) out[c] += p[u] / sum * v[u * s.Q + c];
    *lse = top + log(sum);
    if (!terms) return;
    *score_error = (sum_of(s.h) + 2 * U) * largest_size / sqrt((double)s.h) + 4 * U;
    for (size_t c = 0; c < s.h; c++) terms[c] = 0;
    for (size_t u = 0; u <= t; u++)
        for (size_t c = 0; c < s.h; c++) terms[c] += p[u] / sum * fabs(v[u * s.Q + c]) * (2 * *score_error + sum_of(t + 1) + rounding);
}

// Queries from t on, of `count` heads.
static void attend_later(double *out, const double *qkv, size_t t, size_t head, size_t count, heads s) {
    double lse;
    for (size_t i = 0; i < (s.T - t) * count; i++) attend_row(out + i * s.h, &lse, NULL, NULL, qkv, t + i / count, head + i % count, s, 0);
}

static void attend_all(double *out, double *lse, double *terms, double *lse_terms, const double *qkv, heads s, double rounding) {
    for (size_t i = 0; i < s.B * s.T * s.H; i++) {
        size_t n = i / s.H, t = n % s.T, head = i % s.H;
        attend_row(out + i * s.h, lse + i, terms ? terms + i * s.h : NULL, lse_terms ? lse_terms + i : NULL, qkv + (n - t) * s.Q, t, head,
                   s, rounding);
        if (lse_terms) lse_terms[i] += sum_of(t + 1) + 2 * U * fabs(lse[i]);
    }
}

// What a table in bf16 may do to P before it meets V.
static double p_rounding(void) { return 2 * unit(device->act_type); }

TEST(attention_forward) {
    heads s = pick_heads(200);
    if (trial >= 2 && trial < 7) s.T = (const size_t[]){95, 96, 97, 192, 193}[trial - 2]; // on, before and behind tiles' edges
    double scale = trial % 3 == 2 ? 6 : 1; // scores of 100 and more: e^score without the maximum taken off would overflow
    size_t N = s.B * s.T, d = s.H * s.h;
    for (int nan = 0; nan < 4; nan++) { // none; in q, k, v
        SHAPE("B %zu T %zu H %zu G %zu h %zu, scale %g%s", s.B, s.T, s.H, s.G, s.h, scale,
              (const char *[]){"", ", NaN in q", ", NaN in k", ", NaN in v"}[nan]);
        array qkv = acts(N * s.Q, scale), out = acts_unset(N * d), lse = f32_unset(N * s.H);
        size_t b = any(0, s.B - 1), t = any(0, s.T - 1), head = any(0, s.H - 1), g = head / (s.H / s.G);
        if (nan) poison(qkv, (b * s.T + t) * s.Q + (nan == 1 ? head : nan == 2 ? s.H + g : s.H + s.G + g) * s.h + any(0, s.h - 1));
        double *want = doubles(N * d), *l = doubles(N * s.H), *terms = doubles(N * d), *l_terms = doubles(N * s.H);
        attend_all(want, l, terms, l_terms, qkv.x, s, p_rounding());
        for (size_t i = b * s.T * d; nan >= 2 && i < (b * s.T + t) * d;
             i++) // a NaN that queries before it meet with p = 0: may show or not
            if (i % d / s.h / (s.H / s.G) == g) terms[i] = INFINITY;
        ops->attention_forward(out.at, lse.f, qkv.at, s.B, s.T, s.H, s.G, s.h);
        near("out", out, want, terms, 1);
        near("lse", lse, l, l_terms, 1);
        release();
        if (trial == 1) break; // the largest: once will do
    }
}

TEST(attention_backward) {
    static const heads list[] = {{1, 1, 1, 1, 2, 0},   {1, 200, 2, 1, 2, 0}, {2, 97, 2, 2, 6, 0}, {1, 33, 8, 1, 8, 0},
                                 {3, 12, 4, 2, 16, 0}, {1, 20, 2, 2, 64, 0}, {1, 193, 1, 1, 2, 0}};
    heads s = trial < 7 ? list[trial] : pick_heads(16);
    double scale = trial % 4 == 3 ? 2 : 1;
    s.Q = (s.H + 2 * s.G) * s.h;
    size_t N = s.B * s.T, d = s.H * s.h, share = s.H / s.G;
    SHAPE("B %zu T %zu H %zu G %zu h %zu, scale %g", s.B, s.T, s.H, s.G, s.h, scale);
    array qkv = acts(N * s.Q, scale), dout = acts(N * d, 1), dqkv = acts_unset(N * s.Q);
    double *o = doubles(N * d), *l = doubles(N * s.H), *want = doubles(N * s.Q), *y = doubles(s.T * share * s.h),
           *dy = doubles(s.T * share * s.h), lse;
    for (size_t n = 0; n < N && !replay; n++) {
        size_t t = n % s.T;
        double *x = qkv.x + (n - t) * s.Q;        // this row of the batch
        for (size_t head = 0; head < s.H; head++) // a query makes one row of one head
            DIFFERENCES(want + n * s.Q + head * s.h, x + t * s.Q + head * s.h, s.h, attend_row(y, &lse, NULL, NULL, x, t, head, s, 0), y,
                        dout.x + n * d + head * s.h, s.h);
        for (size_t g = 0; g < 2 * s.G; g++) { // a key or value is seen from its own position on, by the heads of its group
            size_t rows = (s.T - t) * share, first = g % s.G * share;
            for (size_t i = 0; i < rows; i++)
                memcpy(dy + i * s.h, dout.x + (n + i / share) * d + (first + i % share) * s.h, s.h * sizeof *dy);
            DIFFERENCES(want + n * s.Q + (s.H + g) * s.h, x + t * s.Q + (s.H + g) * s.h, s.h, attend_later(y, x, t, first, share, s), y, dy,
                        rows * s.h);
        }
    }
    attend_all(o, l, NULL, NULL, qkv.x, s, 0);
    array out = array_of(ops->act_type, N * d, o), lse_ = array_of(RETROFIT_F32, N * s.H, l), delta = f32_unset(N * s.H);
    ops->attention_backward(dqkv.at, delta.f, dout.at, qkv.at, out.at, lse_.f, s.B, s.T, s.H, s.G, s.h);
    near_tensor("dqkv", dqkv, want);
    double *sums = doubles(N * s.H), *sizes = doubles(N * s.H);
    for (size_t i = 0; i < N * d; i++) sums[i / s.h] += dout.x[i] * out.x[i], sizes[i / s.h] += fabs(dout.x[i] * out.x[i]);
    near("delta", delta, sums, sizes, sum_of(s.h));
    // With a NaN in dout: the query's gradient, those of all keys it sees and their values' are NaN; other groups' and rows' stay.
    double *again = fetch(dqkv), *terms = doubles(N * s.Q);
    size_t n = any(0, N - 1), head = any(0, s.H - 1), c = any(0, s.h - 1);
    for (size_t i = 0; i < N * s.Q; i++) {
        size_t at = i / s.Q, block = i % s.Q / s.h, g = block < s.H ? block / share : (block - s.H) % s.G;
        if (at / s.T != n / s.T || g != head / share) continue;
        if (block < s.H ? block == head && at == n : at <= n && (block < s.H + s.G || i % s.h == c)) again[i] = NAN;
        else terms[i] = INFINITY;
    }
    poison(dout, n * d + head * s.h + c), send(dqkv);
    ops->attention_backward(dqkv.at, delta.f, dout.at, qkv.at, out.at, lse_.f, s.B, s.T, s.H, s.G, s.h);
    near("dqkv with NaN in dout", dqkv, again, terms, 0);
}

// ---- KV cache ----------------------------------------------------------------------------------------------------------------
// Rows from (B,S,Q), each `past` behind its start: what the model would feed next.
static void next_tokens(double *to, const double *all, const double *past, heads s, size_t S) {
    for (size_t i = 0; i < s.B * s.T * s.Q; i++)
        to[i] = all[(i / s.Q / s.T * S + (size_t)past[i / s.Q / s.T] + i / s.Q % s.T) * s.Q + i % s.Q];
}

// What keys and values may be on this device.
static retrofit_type kv_type(size_t trial) { return device == &retrofit_cpu && trial % 2 ? RETROFIT_BF16 : device->act_type; }

TEST(kv_store) {
    heads s = pick_heads(20);
    retrofit_type type = kv_type(trial);
    size_t width = s.G * s.h, capacity = s.T + 10 + trial;
    array qkv = acts(s.B * s.T * s.Q, 1), past = integers(s.B, 0, 10 + trial);
    array keys = filled(type, s.B * capacity * width, NAN), values = filled(type, s.B * capacity * width, NAN);
    for (size_t i = 0; i < s.B * s.T * width; i++) {
        size_t n = i / width, to = (n / s.T * capacity + (size_t)past.x[n / s.T] + n % s.T) * width + i % width;
        keys.x[to] = qkv.x[n * s.Q + s.H * s.h + i % width], values.x[to] = qkv.x[n * s.Q + s.H * s.h + width + i % width];
    }
    ops->kv_store(keys.at, values.at, qkv.at, past.i, s.B, s.T, capacity, s.H, s.G, s.h, type);
    near("keys", keys, keys.x, NULL, 0), near("values", values, values.x, NULL, 0); // what it does not write stays NaN
}

TEST(attention_cached) {
    heads s = pick_heads(1);
    size_t S = trial < 2 ? 1 + 240 * trial : any(2, 240), d = s.H * s.h, width = s.G * s.h,
           capacity = S + trial % 4 * 7; // S tokens in all
    heads all = s;
    all.T = S;
    double *x = doubles(s.B * S * s.Q), *want = doubles(s.B * S * d), *terms = doubles(s.B * S * d), *l = doubles(s.B * S * s.H),
           *le = doubles(s.B * S * s.H);
    array qkv_all = acts(s.B * S * s.Q, 1);
    retrofit_type type = kv_type(trial);
    memcpy(x, qkv_all.x, s.B * S * s.Q * sizeof *x);
    for (size_t i = 0; i < s.B * S * s.Q; i++) // keys and values that their type can hold
        if (i % s.Q >= d && type == RETROFIT_BF16) x[i] = retrofit_bf16_to_float(retrofit_float_to_bf16((float)x[i]));
    attend_all(want, l, terms, le, x, all, p_rounding());
    double *past_x = doubles(s.B);
    array past = array_of(RETROFIT_I32, s.B, past_x), keys = filled(type, s.B * capacity * width, NAN),
          values = filled(type, s.B * capacity * width, NAN);
    for (size_t step = 0; step < 6; step++) {
        size_t room = S;
        for (size_t b = 0; b < s.B; b++) room = retrofit_min(room, S - (size_t)past_x[b]);
        if (!room) break;
        s.T = step % 2 ? 1 : any(1, room);
        SHAPE("B %zu T %zu past %g.. capacity %zu H %zu G %zu h %zu", s.B, s.T, past_x[0], capacity, s.H, s.G, s.h);
        array qkv = acts_unset(s.B * s.T * s.Q), out = acts_unset(s.B * s.T * d);
        next_tokens(qkv.x, x, past_x, s, S);
        send(qkv), send(past);
        ops->kv_store(keys.at, values.at, qkv.at, past.i, s.B, s.T, capacity, s.H, s.G, s.h, type);
        ops->attention_cached(out.at, qkv.at, keys.at, values.at, past.i, s.B, s.T, capacity, s.H, s.G, s.h, type);
        double *w = doubles(out.n), *e = doubles(out.n);
        heads rows = s;
        rows.Q = d; // outputs lie as their tokens do
        next_tokens(w, want, past_x, rows, S), next_tokens(e, terms, past_x, rows, S);
        near("out", out, w, e, 1);
        // Rows of unequal length: some keep less of what they were fed. What lies behind the end is NaN again.
        keys.x = fetch(keys), values.x = fetch(values);
        for (size_t b = 0; b < s.B; b++) past_x[b] += (double)(step ? s.T : any(1, s.T));
        for (size_t i = 0; i < keys.n; i++)
            if (i / width % capacity >= (size_t)past_x[i / width / capacity]) keys.x[i] = values.x[i] = NAN;
        send(keys), send(values);
    }
}

TEST(kv_backfill) {
    size_t S = pick(1, 9), C = pick(1, 4), B = pick(1, 5), G = pick(1, 3), h = 2 * pick(1, 20), capacity = pick(1, 30), width = G * h;
    size_t stride = (B + trial % 2) * capacity * width; // more rows than are lent to
    SHAPE("S %zu C %zu B %zu capacity %zu G %zu h %zu", S, C, B, capacity, G, h);
    retrofit_type type = kv_type(trial);
    array kv[2] = {filled(type, S * C * stride, 1), filled(type, S * C * stride, 1)}, past = integers(B, 0, capacity - 1),
          used = integers(B, 1, S);
    if (trial & 1) poison(kv[0], any(0, S * C * stride - 1)); // is lent like any number
    ops->kv_backfill(kv[0].at, kv[1].at, past.i, used.i, S, C, stride, B, capacity, G, h, type);
    for (size_t i = 0; i < 2 * S * C * stride; i++) {
        double *x = kv[i % 2].x;
        size_t at = i / 2, slot = at / stride / C, in = at % stride, b = in / width / capacity;
        if (b < B && in / width % capacity == (size_t)past.x[b] && slot >= (size_t)used.x[b])
            x[at] = x[at - (slot + 1 - (size_t)used.x[b]) * C * stride];
    }
    near("keys", kv[0], kv[0].x, NULL, 0), near("values", kv[1], kv[1].x, NULL, 0);
}

// ---- SwiGLU ------------------------------------------------------------------------------------------------------------------
static void gated(double *y, const double *gate_up, size_t N, size_t F) {
    for (size_t i = 0; i < N * F; i++) {
        double gate = gate_up[i / F * 2 * F + i % F], up = gate_up[i / F * 2 * F + F + i % F];
        y[i] = gate / (1 + exp(-gate)) * up;
    }
}

TEST(swiglu_forward) {
    size_t N = trial == 5 ? 70000 : pick(1, 70), F = trial == 5 ? 2 : pick(1, 150);
    double scale = trial % 3 ? 1 : 25; // e^-gate far beyond fp32's range; there |silu(gate)| < 1e-35, and a little of up may be wrong
    SHAPE("N %zu F %zu scale %g%s", N, F, scale, trial % 4 == 3 ? ", with NaN" : "");
    array gate_up = acts(N * 2 * F, scale), out = acts_unset(N * F);
    if (trial % 4 == 3) poison(gate_up, any(0, gate_up.n - 1));
    double *want = doubles(N * F), *terms = doubles(N * F);
    gated(want, gate_up.x, N, F);
    for (size_t i = 0; i < N * F; i++) terms[i] = fabs(want[i]) + 1e-28 * fabs(gate_up.x[i / F * 2 * F + F + i % F]);
    ops->swiglu_forward(out.at, gate_up.at, N, F);
    near("out", out, want, terms, 8 * U);
}

TEST(swiglu_backward) {
    size_t N = pick(1, 70), F = pick(1, 100);
    SHAPE("N %zu F %zu", N, F);
    array gate_up = acts(N * 2 * F, trial % 3 ? 1 : 4), dout = acts(N * F, 1), dgate_up = acts_unset(N * 2 * F), out = acts_unset(N * F);
    double *want = doubles(N * 2 * F), *y = doubles(F), *forward = doubles(N * F);
    for (size_t n = 0; n < N; n++)
        DIFFERENCES(want + n * 2 * F, gate_up.x + n * 2 * F, 2 * F, gated(y, gate_up.x + n * 2 * F, 1, F), y, dout.x + n * F, F);
    gated(forward, gate_up.x, N, F);
    ops->swiglu_backward(dgate_up.at, out.at, dout.at, gate_up.at, N, F);
    near_tensor("dgate_up", dgate_up, want);
    near("out", out, forward, forward, 8 * U);
    size_t bad = any(0, N * F - 1); // with a NaN: the two derivatives it goes into, and no other
    double *again = fetch(dgate_up);
    again[bad / F * 2 * F + bad % F] = again[bad / F * 2 * F + F + bad % F] = NAN;
    poison(dout, bad), send(dgate_up);
    ops->swiglu_backward(dgate_up.at, out.at, dout.at, gate_up.at, N, F);
    near("dgate_up with NaN", dgate_up, again, NULL, 0);
}

// ---- Cross-entropy -------------------------------------------------------------------------------------------------------------
static double entropy(const double *z, size_t label, size_t V) {
    double top = z[0], sum = 0;
    for (size_t v = 0; v < V; v++) top = z[v] > top ? z[v] : top;
    for (size_t v = 0; v < V; v++) sum += exp(z[v] - top);
    return log(sum) + top - z[label];
}

TEST(cross_entropy) {
    bool long_rows = trial == 2, differ = trial < 5, with_nan = trial % 4 == 3;
    size_t N = long_rows ? 2 : pick(1, 40), V = long_rows ? 4111 : trial == 4 ? 9001 : pick(1, 300);
    double spread = trial % 3 == 1 ? 30 : 3; // logits of 100: e^logit overflows
    float scales[] = {0, 0.37f / (float)N};
    SHAPE("N %zu V %zu spread %g%s", N, V, spread, with_nan ? ", with NaN" : "");
    array logits = acts(N * V, spread), losses = f32_unset(N), labels = integers(N, 0, V - 1);
    for (size_t i = 0; trial % 5 == 2 && i < N * V; i++) logits.x[i] -= 200; // e^logit underflows
    send(logits);
    for (size_t n = 1; n < N; n += 3) labels.x[n] = -100;
    send(labels);
    size_t bad = any(0, N - 1) / 3 * 3; // a row that has a label
    if (with_nan) poison(logits, bad * V + any(0, V - 1));
    double *want = doubles(N), *terms = doubles(N), *gradient = doubles(N * V), *differences = doubles(N * V), *g_terms = doubles(N * V),
           y[1], one[] = {scales[1]};
    for (size_t n = 0; n < N; n++) {
        if (labels.x[n] < 0) continue; // loss 0, gradient 0
        size_t label = (size_t)labels.x[n];
        double *z = logits.x + n * V, top = -INFINITY;
        want[n] = entropy(z, label, V);
        terms[n] = sum_of(V) + 2 * U * (fabs(want[n] + z[label]) + fabs(z[label]));
        for (size_t v = 0; v < V; v++) top = fmax(top, z[v]);
        for (size_t v = 0; v < V; v++) {
            double p = exp(z[v] - z[label] - want[n]);
            gradient[n * V + v] = scales[1] * (p - (v == label));
            g_terms[n * V + v] = scales[1] * (p * (sum_of(V) + U * fabs(z[v] - top)) + 2 * U * (v == label));
        }
        if (differ && !with_nan && n < 4 && V < 5000) {
            DIFFERENCES(differences + n * V, z, V, *y = entropy(z, label, V), y, one, 1);
        } else memcpy(differences + n * V, gradient + n * V, V * sizeof *gradient);
    }
    for (int i = 0; i < 2; i++) {
        ops->cross_entropy(losses.f, logits.at, labels.i, N, V, scales[i]);
        near("losses", losses, want, terms, 1);
        near(i ? "gradient" : "logits at scale 0", logits, i ? gradient : logits.x, i ? g_terms : NULL, 1);
        if (i && !with_nan) near_tensor("gradient by differences", logits, differences);
        send(losses);
    }
}

// ---- Elementwise -----------------------------------------------------------------------------------------------------------------
TEST(cast) {
    static const double special[] = {0, -0.0, 1e-40, 3e38, -1.00390625, 1.01171875, INFINITY, NAN}; // a denormal, ties between bf16 numbers
    size_t n = pick(8, 5000);
    SHAPE("n %zu", n);
    array x = f32(n), out = acts_unset(n), exact = acts_unset(n);
    memcpy(x.x, special, sizeof special), send(x);
    memcpy(exact.x, x.x, n * sizeof *x.x), send(exact); // rounds to nearest, as the operation should
    ops->cast(out.at, x.f, n);
    const double *got = fetch(out);
    size_t wrong = 0;
    for (size_t i = 0; i < n; i++)
        wrong += isnan(exact.x[i]) ? !isnan(got[i]) : got[i] != exact.x[i] || signbit(got[i]) != signbit(exact.x[i]);
    check(!wrong, "%s, %s: %zu elements are not the nearest", op, shape, wrong);
}

TEST(add) {
    size_t n = pick(1, 5000);
    SHAPE("n %zu", n);
    array x = f32(n), y = f32(n);
    if (trial & 1) poison(trial & 2 ? x : y, n / 2);
    float keep = trial % 3 ? (float)normal() : 1;
    double *terms = doubles(n);
    for (size_t i = 0; i < n; i++) terms[i] = fabs(keep * x.x[i]) + fabs(y.x[i]), x.x[i] = keep * x.x[i] + y.x[i];
    ops->add(x.f, y.f, n, keep);
    near("x", x, x.x, terms, 2 * U);
}

TEST(axpby) {
    size_t n = pick(1, 5000);
    float a = (float)normal(), b = trial % 3 ? (float)normal() : 1;
    SHAPE("n %zu a %g b %g", n, a, b);
    array x = acts(n, 1), y = acts(n, 1);
    double *terms = doubles(n);
    for (size_t i = 0; i < n; i++) terms[i] = fabs(a * x.x[i]) + fabs(b * y.x[i]), y.x[i] = a * x.x[i] + b * y.x[i];
    ops->axpby(y.at, x.at, n, a, b);
    near("y", y, y.x, terms, 3 * U);
}

// ---- s_0 -------------------------------------------------------------------------------------------------------------------------
static double *states(const retrofit_ops *ops, const double *past, size_t B, size_t T, size_t d, float sigma, uint64_t seed) {
    array s = f32_unset(B * T * d);
    array p = past ? array_of(RETROFIT_I32, B, copy(past, B)) : s;
    ops->state_init(s.f, past ? p.i : NULL, B, T, d, sigma, seed);
    return fetch(s);
}

static double correlation(const double *x, const double *y, size_t n) { // in standard deviations of what independent numbers show
    double sum = 0, xx = 0, yy = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] * y[i], xx += x[i] * x[i], yy += y[i] * y[i];
    return fabs(sum) / sqrt(xx * yy / (double)n);
}

// A normal distribution cut at ±3: its standard deviation is .98658, .68454 of it lie within ±1. n numbers show that to some /√n.
static void distribution(const retrofit_ops *ops) {
    size_t T = 100, d = 1000, n = 2 * T * d, beyond = 0, within = 0;
    double sigma = RETROFIT_STATE_STD, sum = 0, squares = 0;
    SHAPE("B 2 T %zu d %zu", T, d);
    double *x = states(ops, NULL, 2, T, d, (float)sigma, rng), *other = states(ops, NULL, 2, T, d, (float)sigma, rng + 1);
    for (size_t i = 0; i < n; i++) {
        x[i] /= (float)sigma, other[i] /= (float)sigma;
        beyond += fabs(x[i]) > 3 * (1 + U), within += fabs(x[i]) < 1, sum += x[i], squares += x[i] * x[i];
    }
    double mean = sum / (double)n, deviation = sqrt(squares / (double)n - mean * mean), share = (double)within / (double)n,
           limit = 4 / sqrt((double)n);
    check(!beyond, "%s, %s: %zu numbers are beyond 3 sigma", op, shape, beyond);
    check(fabs(mean) < limit && fabs(deviation - 0.98658) < limit && fabs(share - 0.68454) < limit,
          "%s, %s: mean %g, deviation %g, %g within 1 sigma", op, shape, mean, deviation, share);
    for (int power = 1; power <= 2; power++) { // neither the numbers nor their squares may depend on each other
        double columns = correlation(x, x + 1, n - 1), positions = correlation(x, x + d, n - d), rows = correlation(x, x + n / 2, n / 2);
        double seeds = correlation(x, other, n);
        check(columns < 4 && positions < 4 && rows < 4 && seeds < 4,
              "%s, %s: neighbours correlate (power %d): columns %g, positions %g, rows %g, seeds %g standard deviations", op, shape, power,
              columns, positions, rows, seeds);
        for (size_t i = 0; i < n; i++) x[i] = x[i] * x[i] - deviation * deviation, other[i] = other[i] * other[i] - deviation * deviation;
    }
}

TEST(state_init) { // of (seed, b, past + t, column) alone
    size_t B = pick(1, 3), T = pick(2, 40), d = pick(2, 100), cut = any(1, T - 1), narrow = any(1, d), wrong[4] = {0};
    double past[3], zero[3] = {0}, later[3];
    for (size_t b = 0; b < 3; b++) past[b] = (double)any(0, 1000), later[b] = past[b] + (double)cut;
    SHAPE("B %zu T %zu d %zu", B, T, d);
    const double *all = states(ops, past, B, T, d, 0.5f, rng), *head = states(ops, past, B, cut, d, 0.5f, rng);
    const double *tail = states(ops, later, B, T - cut, d, 0.5f, rng), *one = states(ops, past, 1, T, narrow, 0.5f, rng);
    const double *start = states(ops, zero, B, T, d, 0.5f, rng), *plain = states(ops, NULL, B, T, d, 0.5f, rng),
                 *none = states(ops, past, B, T, d, 0, rng);
    for (size_t i = 0; i < B * T * d; i++) {
        size_t b = i / d / T, t = i / d % T, c = i % d;
        wrong[0] += all[i] != (t < cut ? head[(b * cut + t) * d + c] : tail[(b * (T - cut) + t - cut) * d + c]);
        wrong[1] += b == 0 && c < narrow && all[i] != one[t * narrow + c];
        wrong[2] += start[i] != plain[i];
        wrong[3] += none[i] != 0;
    }
    check(!wrong[0], "%s, %s: cut at %zu, %zu numbers differ", op, shape, cut, wrong[0]);
    check(!wrong[1], "%s, %s: one row alone, %zu columns wide, %zu numbers differ", op, shape, narrow, wrong[1]);
    check(!wrong[2] && !wrong[3], "%s, %s: %zu numbers differ without past, %zu are not 0 at sigma 0", op, shape, wrong[2], wrong[3]);
    if (!trial) distribution(ops);
}

// ---- Optimizers ------------------------------------------------------------------------------------------------------------------
TEST(sum_squares) {
    size_t n = trial == 3 ? (1 << 22) + 4097 : trial == 4 ? 16384 : trial == 5 ? 16385 : pick(1, 100000);
    SHAPE("n %zu", n);
    array x = f32(n);
    double want = 0.75, got = want, *sum = (double *)device->alloc(sizeof *sum);
    need(sum != NULL, "device memory");
    device->upload(sum, &got, sizeof got);
    ops->sum_squares(sum, x.f, n); // adds to what is there
    device->download(&got, sum, sizeof got);
    for (size_t i = 0; i < n; i++) want += x.x[i] * x.x[i];
    digest += (uint64_t)llrint(ldexp(got, 20)) * (trial + 1);
    check(fabs(got - want) <= 8 * U * want, // in double, but a few hundred squares at a time may be summed in fp32
          "%s, %s: %.17g, should be %.17g", op, shape, got, want);
    poison(x, n / 2);
    ops->sum_squares(sum, x.f, n);
    device->download(&got, sum, sizeof got), device->free(sum);
    check(isnan(got), "%s, %s: NaN does not show", op, shape);
}

TEST(adamw_update) { // torch.optim.AdamW, the single-tensor form
    size_t n = pick(1, 5000), t = trial % 3 == 0 ? 1 : trial % 3 == 1 ? 7 : 1000;
    float scale = (float)uniform(), lr = (float)(uniform() * 1e-2), beta1 = 0.9f, beta2 = trial & 1 ? 0.95f : 0.999f, eps = 1e-8f,
          decay = trial % 4 ? 0.1f : 0;
    double bias1 = 1 - pow(beta1, (double)t), bias2 = 1 - pow(beta2, (double)t);
    SHAPE("n %zu t %zu beta2 %g decay %g", n, t, beta2, decay);
    array w = f32(n), m = f32(n), v = f32(n), g = f32(n);
    for (size_t i = 0; i < n; i++)
        v.x[i] *= v.x[i], m.x[i] *= t > 1, v.x[i] *= t > 1, g.x[i] *= i ? 1 : 0; // all zero at first, one without gradient
    send(m), send(v), send(g);
    double *terms[3] = {doubles(n), doubles(n), doubles(n)};
    for (size_t i = 0; i < n; i++) {
        double gi = (double)g.x[i] * scale, sizes = fabs(m.x[i]) + fabs(gi);
        m.x[i] = beta1 * m.x[i] + (1.0 - beta1) * gi;
        v.x[i] = beta2 * v.x[i] + (1.0 - beta2) * gi * gi;
        double step = lr / bias1 / (sqrt(v.x[i]) / sqrt(bias2) + eps);
        terms[0][i] = fabs(w.x[i]) + step * sizes, terms[1][i] = sizes, terms[2][i] = v.x[i];
        w.x[i] = w.x[i] * (1 - (double)lr * decay) - step * m.x[i];
    }
    ops->adamw_update(w.f, m.f, v.f, g.f, n, scale, lr, beta1, beta2, bias1, bias2, eps, decay);
    near("w", w, w.x, terms[0], 10 * U), near("m", m, m.x, terms[1], 4 * U), near("v", v, v.x, terms[2], 6 * U);
}

static double *number(double x) { // one on the device; the caller frees it
    double *at = (double *)device->alloc(sizeof *at);
    need(at != NULL, "device memory");
    return device->upload(at, &x, sizeof x), at;
}

TEST(ellisadam_moments) {
    size_t n = trial == 2 ? (1 << 20) + 4099 : pick(1, 5000);
    float scale = (float)uniform(), beta1 = trial & 1 ? 0.9f : 0, beta2 = trial & 1 ? 0.95f : 0, eps = trial % 3 ? 1e-6f : 0.5f;
    SHAPE("n %zu beta %g %g eps %g", n, beta1, beta2, eps);
    array m = f32(n), v = f32(n), g = f32(n);
    for (size_t i = 0; i < n; i++) v.x[i] *= v.x[i], g.x[i] *= i != 1; // one without gradient
    send(v), send(g);
    double *terms[2] = {doubles(n), doubles(n)}, want = 0.5, got, *sum = number(want);
    for (size_t i = 0; i < n; i++) {
        double gi = (double)g.x[i] * scale;
        terms[0][i] = fabs(m.x[i]) + fabs(gi);
        m.x[i] = beta1 * m.x[i] + (1.0 - beta1) * gi;
        terms[1][i] = v.x[i] = fmax(beta2 * v.x[i] + (1.0 - beta2) * gi * gi, (double)eps * eps);
        want += gi * gi / v.x[i];
    }
    ops->ellisadam_moments(m.f, v.f, sum, g.f, n, scale, beta1, beta2, eps);
    near("m", m, m.x, terms[0], 4 * U), near("v", v, v.x, terms[1], 6 * U);
    device->download(&got, sum, sizeof got), device->free(sum);
    digest += (uint64_t)llrint(ldexp(got, 20)) * (trial + 1);
    check(fabs(got - want) <= 12 * U * want, "%s, %s: the sum is %.17g, should be %.17g", op, shape, got, want);
}

TEST(ellisadam_update) {
    size_t n = pick(1, 5000);
    float lr = (float)(uniform() * 1e-2), decay = trial % 4 ? 0.1f : 0;
    double bias1 = trial & 1 ? 0.1 : 0.9, bias2 = trial & 1 ? 0.05 : 0.99, sum = (double)n * (trial % 3 ? 2.5 : 0.3), *at = number(sum);
    SHAPE("n %zu bias %g %g decay %g, sum / n %g", n, bias1, bias2, decay, sum / (double)n);
    array w = f32(n), m = f32(n), v = f32(n);
    double *terms = doubles(n), step = lr / bias1 / fmax(1, sqrt(sum / (double)n));
    for (size_t i = 0; i < n; i++) v.x[i] *= i == 2 ? 0 : v.x[i];
    send(v);
    for (size_t i = 0; i < n; i++) {
        double update = step * atan2(m.x[i], sqrt(v.x[i] / bias2));
        terms[i] = fabs(w.x[i]) + fabs(update), w.x[i] = w.x[i] * (1 - (double)decay) - update;
    }
    ops->ellisadam_update(w.f, m.f, v.f, at, n, lr, bias1, bias2, decay);
    device->free(at);
    near("w", w, w.x, terms, 10 * U);
}

TEST(muon_momentum) {
    size_t n = pick(1, 5000);
    float scale = (float)uniform(), momentum = trial & 1 ? 0.95f : 0.5f;
    SHAPE("n %zu momentum %g", n, momentum);
    array u = f32_unset(n), m = f32(n), g = f32(n);
    double *terms = doubles(n);
    for (size_t i = 0; i < n; i++) {
        double gi = (double)g.x[i] * scale;
        terms[i] = fabs(m.x[i]) + fabs(gi);
        m.x[i] = momentum * m.x[i] + (1.0 - momentum) * gi, u.x[i] = momentum * m.x[i] + (1.0 - momentum) * gi;
    }
    ops->muon_momentum(u.f, m.f, g.f, n, scale, momentum);
    near("m", m, m.x, terms, 4 * U), near("u", u, u.x, terms, 7 * U);
}

TEST(muon_load) {
    size_t rows = pick(1, 70), cols = trial == 2 ? rows : pick(1, 50);
    SHAPE("rows %zu cols %zu", rows, cols);
    array u = f32(rows * cols), x = acts_unset(rows * cols);
    double squares = trial == 3 ? 0 : exp(4 * normal()), scale = 1 / (sqrt(squares) + 1e-7), *at = (double *)device->alloc(sizeof *at);
    need(at != NULL, "device memory");
    device->upload(at, &squares, sizeof squares);
    for (size_t i = 0; i < x.n; i++) x.x[rows > cols ? i % cols * rows + i / cols : i] = u.x[i] * scale;
    ops->muon_load(x.at, u.f, at, rows, cols);
    device->free(at);
    near("x", x, x.x, x.x, 2 * U);
}

TEST(muon_update) {
    size_t rows = pick(1, 70), cols = trial == 2 ? rows : pick(1, 50);
    float lr = (float)uniform(), scale = (float)uniform() + 1, decay = trial % 3 ? 0.1f : 0;
    SHAPE("rows %zu cols %zu lr %g scale %g decay %g", rows, cols, lr, scale, decay);
    array w = f32(rows * cols), x = acts(rows * cols, 1);
    double *terms = doubles(w.n);
    for (size_t i = 0; i < w.n; i++) {
        double step = (double)lr * scale * x.x[rows > cols ? i % cols * rows + i / cols : i];
        terms[i] = fabs(w.x[i]) + fabs(step), w.x[i] = w.x[i] * (1 - (double)lr * decay) - step;
    }
    ops->muon_update(w.f, x.at, rows, cols, lr, scale, decay);
    near("w", w, w.x, terms, 5 * U);
}

// ---- All of them -------------------------------------------------------------------------------------------------------------------
static const struct {
    const char *name;
    void (*run)(const retrofit_ops *ops);
} cases[] = {
#define X(name, parameters) {#name, test_##name},
    RETROFIT_OPS(X) // an operation without a test does not compile
#undef X
};

static void threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

static void test_table(const retrofit_ops *ops, const char *only) {
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (only && !strstr(cases[i].name, only)) continue;
        uint64_t digests[2];
        for (int run = 0; run < 2; run++) {
            op = cases[i].name, device = ops, rng = 1000 + i, draws = digest = 0, replay = run, threads(run ? 1 : 3);
            for (trial = 0; trial < trials; trial++, release()) cases[i].run(ops);
            digests[run] = digest;
        }
        check(digests[0] == digests[1], "%s %s: a second run, with another number of threads, gives other bits", ops->name, op);
    }
}

static void *exact_alloc(size_t bytes) { // retrofit_cpu's own blocks are a little larger than asked for
    void *p = NULL;
    need(!posix_memalign(&p, 64, bytes ? bytes : 1), "memory");
    return memset(p, 0, bytes);
}

int main(int count, char **args) { // an argument: only operations that have it in their name
    const char *only = count > 1 ? args[1] : NULL;
#ifdef RETROFIT_CUDA
    char text[256];
    need(retrofit_device(RETROFIT_ON_CUDA, false, text) != NULL, "a GPU");
    trials = getenv("TRIALS") ? strtoul(getenv("TRIALS"), NULL, 10) : 52;
    test_table(&retrofit_cuda, only), test_table(&retrofit_cuda_fp32, only);
    return finish("operations on a GPU");
#else
    retrofit_ops cpu = retrofit_cpu;
    if (!guard) cpu.alloc = exact_alloc, cpu.free = free;
    on_cpu = true, trials = 12;
    test_table(&cpu, only);
    return finish("operations");
#endif
}

// The GPU beside its limits: every operation at TinyLlama's sizes, whole training steps, decoding. `make bench-cuda` runs it, and beside it
// PyTorch where that is installed (bench_cuda.sh).
//
// Times are the host's clock around many calls, which are recorded and replayed, as in decoding, so that launching does not count; a
// download waits for them. The median of five measurements of 0.2 s counts. Calls take turns with so many copies of their arrays that the
// second-level cache holds nothing of the turn before. Limits are measured in the same run: copying a large block (read and written), and a
// large product of matrices.
//
// Errors are ‖out - want‖ / ‖want‖: against retrofit_cuda_fp32 over all of the output, and against the CPU over its beginning. All get the
// same numbers, rounded to bf16 where retrofit_cuda holds bf16. Beside them stands the error that roundings explain: ‖round(want) - want‖ /
// ‖want‖ for a result in bf16, (2 + √K)·2^-24 for a sum of K terms in fp32, and what a note adds. More than twice that is a fault.
#define RETROFIT_IMPLEMENTATION
#include "../retrofit.h"
#ifdef _OPENMP
#define SUMS(...) PRAGMA(omp parallel for reduction(+ : __VA_ARGS__))
#else
#define SUMS(...)
#endif

static bool miniature, fp32;
static const char *only = "", *markdown_path, *commit = "unknown";
static FILE *markdown;
static const retrofit_ops *device;      // the table that is measured
static double copy_limit, matmul_limit; // bytes and FLOP per second
static size_t faults;                   // errors above what roundings explain, runs that differ, losses that are no numbers

static void *need(void *p, const char *what) {
    if (!p) fprintf(stderr, "bench_cuda: %s: %s\n", what, retrofit_error()), exit(1);
    return p;
}
static void *memory(size_t n, size_t size) { return need(retrofit_allocate(n, size), "memory"); }

static int by_value(const void *a, const void *b) { return *(double *)a < *(double *)b ? -1 : *(double *)a > *(double *)b; }
static double median(double *x, size_t n) { return qsort(x, n, sizeof *x, by_value), x[n / 2]; }

static void wait(const void *p) { // for all that the device was told to do
    char byte;
    device->download(&byte, p, 1);
}

static const char *share(double x, double of) {
    static char text[16];
    if (of > 0) snprintf(text, sizeof text, "%.3f", x / of);
    return of > 0 ? text : "-"; // unknown
}

// A line between tables, or a row of one: the cells are divided by '|'. A head's cells are as wide as their columns; those that begin with
// a space stand on the right.
typedef enum { LINE, HEAD, ROW } line_kind;
__attribute__((format(printf, 2, 3))) static void say(line_kind kind, const char *format, ...) {
    static int widths[16];
    char text[512], *end;
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    size_t columns = 0;
    if (markdown && kind == LINE) fprintf(markdown, "\n%s\n\n", text);
    if (kind == LINE) puts(text);
    for (char *cell = text; kind != LINE && cell; cell = end, columns++) {
        if ((end = strchr(cell, '|'))) *end++ = 0;
        if (kind == HEAD) widths[columns] = *cell == ' ' ? (int)strlen(cell) : -(int)strlen(cell);
        printf("%*s%s", widths[columns], cell, end ? "  " : "\n");
        if (markdown) fprintf(markdown, "| %s %s", cell, end ? "" : "|\n");
    }
    for (size_t i = 0; markdown && kind == HEAD && i < columns; i++)
        fprintf(markdown, "%s%s", widths[i] > 0 ? "|--:" : "|---", i + 1 < columns ? "" : "|\n");
    fflush(stdout);
}

// ---- Numbers -------------------------------------------------------------------------------------------------------------------
// Sizes have the letters of retrofit.h, and W = 2F; S = 2d, from row to row of the adapter; C rows go through the head at a time; P
// positions in the KV cache; M: a side of the large product; K: floats in the large copy.
static size_t sizes[128], pool_size;
// All random numbers are stretches of one pool of normal ones: as fp32, rounded to bf16 in either type, and without their signs.
static float *normals, *rounded, *positives;
static uint16_t *halves;

static void prepare(void) {
    static const char letters[] = "BTHGhFVCPMK1";
    static const size_t full[] = {8, 1024, 32, 4, 64, 5632, 32000, 1024, 1024, 8192, 1 << 28, 1};
    static const size_t small[] = {3, 24, 4, 1, 16, 56, 120, 24, 40, 128, 1 << 16, 1};
    for (size_t i = 0; letters[i]; i++) sizes[(int)letters[i]] = (miniature ? small : full)[i];
    sizes['N'] = sizes['B'] * sizes['T'], sizes['d'] = sizes['H'] * sizes['h'], sizes['S'] = 2 * sizes['d'];
    sizes['Q'] = (sizes['H'] + 2 * sizes['G']) * sizes['h'], sizes['W'] = 2 * sizes['F'];
    pool_size = miniature ? 65521 : 16777213; // primes, so that no two rows of a matrix are alike
    normals = memory(pool_size, 4), rounded = memory(pool_size, 4), positives = memory(pool_size, 4), halves = memory(pool_size, 2);
    PARALLEL_FOR(pool_size)
    for (size_t i = 0; i < pool_size; i++) {
        normals[i] = retrofit_hash_normal(1, i), positives[i] = fabsf(normals[i]);
        halves[i] = retrofit_float_to_bf16(normals[i]), rounded[i] = retrofit_bf16_to_float(halves[i]);
    }
}

static void upload_pool(const retrofit_ops *ops, void *to, size_t n, size_t at, const void *pool, size_t size) {
    at %= pool_size;
    for (size_t done = 0, piece; done < n; done += piece, at = 0) {
        piece = retrofit_min(n - done, pool_size - at);
        ops->upload((char *)to + done * size, (const char *)pool + at * size, piece * size);
    }
}

static int32_t *random_integers(size_t n, size_t from, size_t to) { // below `to`, or `from` if that is the same
    int32_t *x = memory(n, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = (int32_t)(from + (size_t)(retrofit_hash_uniform(2, i) * (double)(to - from)));
    return x;
}

// ---- Arrays of a call ----------------------------------------------------------------------------------------------------------
typedef enum { F32, POSITIVE, I32, F64, ACT } element; // ACT: as the table holds activations and matrices
enum { COPIES = 128, ARRAYS = 8 };
typedef struct {
    char role; // 'i' read, 'o' written, 'b' both
    element type;
    size_t n;
    void *at[COPIES];
} array;
static const retrofit_ops *on; // the table that is called
static array arrays[ARRAYS];
static size_t count, turn; // arrays this call has asked for so far; which copy of them
static bool fresh;         // this is the first call of the turn
static size_t whole;       // a shape's first size before it was cut for the CPU
static struct {            // what a call says of itself
    double flops, bytes;   // bytes: each input read once, each output written once
    size_t terms;          // K
    const char *notes;
} about;

static size_t size_of(element type) { return type == F64 ? 8 : type == ACT ? retrofit_type_size(on->act_type) : 4; }

// The next array: the first call of a turn makes it, later ones find it. It holds `rows` stretches of the pool, each `pitch` after the
// last, or what `given` says. A call must ask for the same arrays in the same order every time, before anything else happens.
static void *next_array(char role, element type, size_t n, size_t rows, size_t pitch, const void *given) {
    size_t size = size_of(type), columns = n / rows;
    array *a = &arrays[count++];
    about.bytes += (double)(n * size) * (role == 'b' ? 2 : 1);
    if (a->at[turn]) return a->at[turn];
    void *p = need(on->alloc(n * size), "memory for an operation");
    void *pool = type == ACT ? (size == 2 ? (void *)halves : rounded) : type == POSITIVE ? positives : normals;
    fresh = true, a->role = role, a->type = type, a->n = n, a->at[turn] = p;
    if (turn) on->copy(p, a->at[0], n * size);
    else if (given) on->upload(p, given, n * size);
    else if (columns == pitch) upload_pool(on, p, n, count * 1000003, pool, size);
    else if (role != 'o')
        for (size_t i = 0; i < rows; i++) upload_pool(on, (char *)p + i * columns * size, columns, count * 1000003 + i * pitch, pool, size);
    return p;
}
static void *in(element type, size_t n) { return next_array('i', type, n, 1, n, NULL); }
static void *out(element type, size_t n) { return next_array('o', type, n, 1, 0, NULL); }
static void *both(element type, size_t n) { return next_array('b', type, n, 1, n, NULL); }
static int32_t *integers(size_t n, size_t from, size_t to) {
    int32_t *x = random_integers(n, from, to), *p = next_array('i', I32, n, 1, 0, x);
    return free(x), p;
}
static double *number(char role, double x) { return next_array(role, F64, 1, 1, 0, &x); }
static float *angles(size_t positions, size_t h) {
    retrofit_config c = {.head_dim = h, .rope_theta = 10000};
    float *x = memory(positions * h, 4), *p;
    return rope_table(x, &c, positions), p = next_array('i', F32, positions * h, 1, 0, x), free(x), p;
}
static retrofit_weight matrix(size_t rows, size_t cols, size_t stride) { // stride 0: no gaps
    if (stride == 0) stride = cols;
    retrofit_weight w = {in(ACT, (rows - 1) * stride + cols), on->act_type, stride};
    about.bytes -= (double)((rows - 1) * (stride - cols) * size_of(ACT)); // what lies in them
    return w;
}
static void multiplies(size_t N, size_t I, size_t O, size_t terms) {
    if (N > 8) about.flops = 2.0 * N * I * O; // of fewer rows, reading the matrix is all the cost
    about.terms = terms, about.notes = "t";
}

// ---- The operations ------------------------------------------------------------------------------------------------------------
// OP(name, cut, shapes) { a call }: a shape's letters become the sizes s; the CPU gets `cut` of the first one only.
enum { ROWS = 64, SEQUENCE = 1, ALL = 1 << 30 };
#define OP(name, cut, ...)                                          \
    static const char *const shapes_##name[] = {__VA_ARGS__, NULL}; \
    enum { cut_##name = cut };                                      \
    static void call_##name(const size_t *s)

OP(embedding_forward, ROWS, "NdV") {
    size_t N = s[0], d = s[1], V = s[2];
    float *x = out(F32, N * d);
    int32_t *tokens = integers(N, 0, V);
    retrofit_weight wte = {in(F32, V * d), RETROFIT_F32, d};
    about.bytes = N * (8.0 * d + 4); // of wte only the tokens' rows
    on->embedding_forward(x, tokens, wte, N, d);
}
OP(embedding_backward, ALL, "NdV") {
    size_t N = s[0], d = s[1], V = s[2];
    float *dwte = both(F32, V * d), *dx = in(F32, N * d);
    int32_t *tokens = integers(N, 0, V);
    double different = V * (1 - exp(-(double)N / V)); // tokens
    about.bytes = N * (4.0 * d + 4) + different * 8 * d, about.terms = 8;
    on->embedding_backward(dwte, tokens, dx, N, d);
}
OP(rmsnorm_forward, ROWS, "Nd", "1d") {
    about.terms = s[1];
    on->rmsnorm_forward(out(ACT, s[0] * s[1]), out(F32, s[0]), in(F32, s[0] * s[1]), in(F32, s[1]), s[0], s[1], 1e-5f);
}
OP(rmsnorm_backward, ALL, "Nd") {
    size_t n = s[0] * s[1];
    about.terms = s[0];
    on->rmsnorm_backward(both(F32, n), both(F32, s[1]), in(ACT, n), in(F32, n), in(F32, s[0]), in(F32, s[1]), s[0], s[1]);
}
OP(matmul_forward, ROWS, "NdQ w_qkv", "NdW fc", "CdV head", "dWd muon", "ddd muon", "1dQ w_qkv", "1dW fc") {
    multiplies(s[0], s[1], s[2], s[1]);
    on->matmul_forward(out(ACT, s[0] * s[2]), in(ACT, s[0] * s[1]), matrix(s[2], s[1], 0), s[0], s[1], s[2]);
}
OP(matmul_residual_forward, ROWS, "Ndd proj", "NFd w_down", "NddS adapter", "1dd proj", "1Fd w_down", "1ddS adapter", "1dV head") {
    size_t N = s[0], I = s[1], O = s[2];
    multiplies(N, I, O, I);
    on->matmul_residual_forward(out(F32, N * O), in(F32, N * O), in(ACT, N * I), matrix(O, I, s[3]), N, I, O);
}
OP(matmul_backward_input, ROWS, "NdQ w_qkv", "Ndd proj", "NdW fc", "NFd w_down", "CdV head", "dWd muon") {
    multiplies(s[0], s[1], s[2], s[2]);
    on->matmul_backward_input(out(ACT, s[0] * s[1]), in(ACT, s[0] * s[2]), matrix(s[2], s[1], 0), s[0], s[1], s[2]);
}
OP(matmul_residual_backward_input, ROWS, "NddS adapter") {
    multiplies(s[0], s[1], s[2], s[2]);
    on->matmul_residual_backward_input(out(F32, s[0] * s[1]), in(ACT, s[0] * s[2]), matrix(s[2], s[1], s[3]), s[0], s[1], s[2]);
}
OP(matmul_backward_weight, ROWS, "QNd w_qkv", "dNd proj", "WNd fc", "dNF w_down", "dNdS adapter", "VCd head") {
    size_t O = s[0], N = s[1], I = s[2], stride = s[3] ? s[3] : I; // cut to 64 rows of dw, dout is the first columns of all of it
    multiplies(N, I, O, N);
    on->matmul_backward_weight(both(F32, (O - 1) * stride + I), stride, next_array('i', ACT, N * O, N, whole, NULL), in(ACT, N * I), N, I,
                               O);
}
static double turned(const size_t *s) { return (double)s[0] * s[1] * (s[2] + s[3]) * s[4]; } // queries and keys, not values
OP(rope_forward, SEQUENCE, "BTHGh") {
    void *qkv = both(ACT, s[0] * s[1] * (s[2] + 2 * s[3]) * s[4]), *table = angles(s[1], s[4]);
    about.bytes = 2 * turned(s) * size_of(ACT) + 4.0 * s[1] * s[4];
    on->rope_forward(qkv, table, NULL, s[0], s[1], s[2], s[3], s[4]);
}
OP(rope_backward, SEQUENCE, "BTHGh") {
    void *qkv = both(ACT, s[0] * s[1] * (s[2] + 2 * s[3]) * s[4]), *table = angles(s[1], s[4]);
    about.bytes = 2 * turned(s) * size_of(ACT) + 4.0 * s[1] * s[4];
    on->rope_backward(qkv, table, s[0], s[1], s[2], s[3], s[4]);
}
OP(attention_forward, SEQUENCE, "BTHGh") {
    size_t B = s[0], T = s[1], H = s[2], G = s[3], h = s[4], N = B * T;
    about.flops = 2.0 * N * T * H * h, about.terms = T, about.notes = "p";
    on->attention_forward(out(ACT, N * H * h), out(F32, N * H), in(ACT, N * (H + 2 * G) * h), B, T, H, G, h);
}
OP(attention_backward, SEQUENCE, "BTHGh") { // five products, of which each counts once, as in the literature
    size_t B = s[0], T = s[1], H = s[2], G = s[3], h = s[4], N = B * T;
    void *dqkv = out(ACT, N * (H + 2 * G) * h), *qkv = in(ACT, N * (H + 2 * G) * h), *dy = in(ACT, N * H * h), *y = in(ACT, N * H * h);
    float *lse = in(F32, N * H), *delta = in(F32, N * H); // delta is for its own use
    if (fresh) on->attention_forward(y, lse, qkv, B, T, H, G, h);
    about.flops = 5.0 * N * T * H * h, about.terms = T * (H / G), about.notes = "p";
    on->attention_backward(dqkv, delta, dy, qkv, y, lse, B, T, H, G, h);
}
OP(swiglu_forward, ROWS, "NF", "1F") { on->swiglu_forward(out(ACT, s[0] * s[1]), in(ACT, s[0] * 2 * s[1]), s[0], s[1]); }
OP(swiglu_backward, ROWS, "NF") {
    size_t n = s[0] * s[1];
    on->swiglu_backward(out(ACT, 2 * n), out(ACT, n), in(ACT, n), in(ACT, 2 * n), s[0], s[1]);
}
OP(cross_entropy, ROWS, "CV") {
    about.terms = s[1];
    on->cross_entropy(out(F32, s[0]), both(ACT, s[0] * s[1]), integers(s[0], 0, s[1]), s[0], s[1], 1);
}
OP(cast, ROWS, "Nd", "Wd fc") { on->cast(out(ACT, s[0] * s[1]), in(F32, s[0] * s[1]), s[0] * s[1]); }
OP(add, ROWS, "Nd") { on->add(both(F32, s[0] * s[1]), in(F32, s[0] * s[1]), s[0] * s[1], 0.5f); }
OP(state_init, SEQUENCE, "BTd") { on->state_init(out(F32, s[0] * s[1] * s[2]), NULL, s[0], s[1], s[2], (float)RETROFIT_STATE_STD, 1); }
OP(kv_store, SEQUENCE, "BTTHGh", "11PHGh") { // the third: capacity; tokens go to its end
    size_t B = s[0], T = s[1], n = B * s[2] * s[4] * s[5];
    void *keys = both(ACT, n), *values = both(ACT, n), *qkv = in(ACT, B * T * (s[3] + 2 * s[4]) * s[5]);
    int32_t *past = integers(B, s[2] - T, s[2] - T);
    about.bytes = 4.0 * B * T * s[4] * s[5] * size_of(ACT);
    on->kv_store(keys, values, qkv, past, B, T, s[2], s[3], s[4], s[5], on->act_type);
}
OP(attention_cached, SEQUENCE, "11PHGh") {
    size_t N = s[0] * s[1], P = s[2], H = s[3], G = s[4], h = s[5];
    void *qkv = in(ACT, N * (H + 2 * G) * h), *keys = in(ACT, s[0] * P * G * h), *values = in(ACT, s[0] * P * G * h);
    about.terms = P, about.notes = "p";
    on->attention_cached(out(ACT, N * H * h), qkv, keys, values, integers(s[0], P - s[1], P - s[1]), s[0], s[1], P, H, G, h, on->act_type);
}
OP(kv_backfill, SEQUENCE, "1PGh") { // a token that stopped after the first of 8 recurrences of 8 layers; the second: capacity
    size_t S = 8, C = 8, B = s[0], P = s[1], width = s[2] * s[3];
    void *keys = both(ACT, S * C * B * P * width), *values = both(ACT, S * C * B * P * width);
    int32_t *past = integers(B, P - 1, P - 1), *used = integers(B, 1, 1);
    about.bytes = 2.0 * S * C * B * width * size_of(ACT);
    on->kv_backfill(keys, values, past, used, S, C, B * P * width, B, P, s[2], s[3], on->act_type);
}
OP(sum_squares, ALL, "Wd fc") { about.terms = 256, on->sum_squares(number('b', 0), in(F32, s[0] * s[1]), s[0] * s[1]); }
OP(adamw_update, ROWS, "Wd fc") {
    size_t n = s[0] * s[1];
    about.terms = 4;
    on->adamw_update(both(F32, n), both(F32, n), both(POSITIVE, n), in(F32, n), n, 0.5f, 1e-3f, 0.9f, 0.95f, 0.5, 0.4, 1e-8f, 0.1f);
}
OP(ellisadam_moments, ALL, "Wd fc") {
    size_t n = s[0] * s[1];
    about.terms = 256;
    on->ellisadam_moments(both(F32, n), both(POSITIVE, n), number('b', 0), in(F32, n), n, 0.5f, 0.9f, 0.95f, 1e-6f);
}
OP(ellisadam_update, ROWS, "Wd fc") {
    size_t n = s[0] * s[1];
    about.terms = 4;
    on->ellisadam_update(both(F32, n), in(F32, n), in(POSITIVE, n), number('i', (double)n), n, 1e-3f, 0.5, 0.4, 0.1f);
}
OP(muon_momentum, ROWS, "Wd fc") {
    size_t n = s[0] * s[1];
    on->muon_momentum(out(F32, n), both(F32, n), in(F32, n), n, 0.5f, 0.95f);
}
OP(muon_load, ALL, "Wd fc", "dd proj") { on->muon_load(out(ACT, s[0] * s[1]), in(F32, s[0] * s[1]), number('i', 2), s[0], s[1]); }
OP(axpby, ROWS, "dW fc", "dd proj") { on->axpby(both(ACT, s[0] * s[1]), in(ACT, s[0] * s[1]), s[0] * s[1], 2.0315f, 0.5f); }
OP(muon_update, ALL, "Wd fc", "dd proj") { on->muon_update(both(F32, s[0] * s[1]), in(ACT, s[0] * s[1]), s[0], s[1], 1e-3f, 2, 0.1f); }

static void call_copy(const size_t *s) { on->copy(out(F32, s[0]), in(F32, s[0]), s[0] * 4); }

typedef void call(const size_t *s);
static const struct {
    const char *name;
    call *call;
    const char *const *shapes;
    size_t cut;
} operations[] = {
#define X(name, parameters) {#name, call_##name, shapes_##name, cut_##name},
    RETROFIT_OPS(X) // an operation that is not measured does not compile
#undef X
};

// ---- What a call computes, and what it costs --------------------------------------------------------------------------------------
static void call_once(call *f, const size_t *s) {
    memset(&about, 0, sizeof about);
    about.terms = 1, about.notes = "", count = 0, fresh = false;
    f(s);
}
static void release(void) {
    for (size_t i = 0; i < ARRAYS; i++)
        for (size_t j = 0; j < COPIES; j++)
            if (arrays[i].at[j]) on->free(arrays[i].at[j]);
    memset(arrays, 0, sizeof arrays), turn = 0;
}

typedef struct { // what a first call has written to an array; x: NULL if nothing
    float *x;
    size_t n;
    bool half; // it may round to bf16
} result;
static void results(const retrofit_ops *ops, call *f, const size_t *s, result r[ARRAYS]) {
    on = ops, call_once(f, s), memset(r, 0, ARRAYS * sizeof *r);
    for (size_t i = 0; i < count; i++) {
        size_t n = arrays[i].n, size = size_of(arrays[i].type);
        if (arrays[i].role == 'i') continue;
        union {
            void *bytes;
            uint16_t *half;
            float *single;
            double *twice;
        } from = {memory(n, size)};
        float *x = memory(n, 4);
        on->download(from.bytes, arrays[i].at[0], n * size);
        PARALLEL_FOR(n)
        for (size_t j = 0; j < n; j++) x[j] = size == 2 ? retrofit_bf16_to_float(from.half[j]) : size == 8 ? (float)from.twice[j] : from.single[j];
        r[i] = (result){x, n, arrays[i].type == ACT}, free(from.bytes);
    }
    release();
}

// The error of that result where it is largest beside what roundings explain, and that; `want` may be its beginning. Frees `want`.
static void compare(const result got[ARRAYS], const result want[ARRAYS], double *error, double *explained) {
    bool bf16 = device->act_type == RETROFIT_BF16;
    double worst = -1, sums = (2 + sqrt((double)about.terms) + (bf16 && *about.notes == 't' ? (double)about.terms / 8 : 0)) * 0x1p-24;
    for (size_t i = 0; i < ARRAYS; free(want[i++].x)) {
        double off = 0, size = 0, round = 0;
        SUMS(off, size, round)
        for (size_t j = 0; j < (want[i].x ? want[i].n : 0); j++) {
            double y = want[i].x[j], nearest = bf16 && want[i].half ? retrofit_bf16_to_float(retrofit_float_to_bf16(want[i].x[j])) : y;
            off += (got[i].x[j] - y) * (got[i].x[j] - y), size += y * y, round += (nearest - y) * (nearest - y);
        }
        double e = sqrt(off / size), limit = sqrt((*about.notes == 'p' ? 2 : 1) * round / size + sums * sums);
        double ratio = isfinite(e / limit) ? e / limit : INFINITY;
        if (want[i].x && ratio > worst) worst = ratio, *error = e, *explained = limit;
    }
}

static double seconds_of(call *f, const size_t *s) {
    double bytes = 0, t[5];
    size_t copies = 1, calls, repeats = 1, rounds = miniature ? 1 : 5;
    on = device, call_once(f, s);
    for (size_t i = 0; i < count; i++) bytes += (double)(arrays[i].n * size_of(arrays[i].type));
    while (copies < (miniature ? 2 : COPIES) && (double)copies * bytes < 256e6) copies++;
    for (turn = 1; turn < copies; turn++) call_once(f, s);
    calls = miniature || copies >= 32 ? copies : 32 / copies * copies;
    on->record_begin();
    for (size_t i = 0; i < calls; i++) turn = i % copies, call_once(f, s);
    void *list = on->record_end();
    for (size_t i = 0; i < rounds + 2; i++) { // the first warms up, the second tells how many make 0.2 s
        double start = retrofit_seconds();
        for (size_t j = 0; j < repeats; j++) on->replay(list);
        wait(arrays[0].at[0]);
        double passed = (retrofit_seconds() - start) / (double)repeats;
        if (i == 1 && !miniature) repeats = 1 + (size_t)(0.2 / passed);
        if (i >= 2) t[i - 2] = passed / (double)calls;
    }
    return on->record_free(list), release(), median(t, rounds);
}

static void limits(void) {
    const size_t *K = &sizes['K'], M[8] = {sizes['M'], sizes['M'], sizes['M']};
    copy_limit = 8.0 * *K / seconds_of(call_copy, K), matmul_limit = 2.0 * *M * *M * *M / seconds_of(call_matmul_forward, M);
    say(LINE, "## Limits");
    say(HEAD, "%-36s|%16s|%14s", "what", " measured", " of data sheet");
    say(ROW, "copying %.3f GB, read and written|%.0f GB/s|-", 4e-9 * *K, copy_limit / 1e9);
    say(ROW, "product, %zu on a side, %s|%.1f TFLOP/s|%s", *M, fp32 ? "fp32" : "bf16", matmul_limit / 1e12,
        share(matmul_limit, device->peak_flops()));
}

static void measure(const char *name, call *f, const char *text, size_t cut) {
    size_t s[8] = {0}, small[8], letters = strcspn(text, " ");
    const char *what = text[letters] ? text + letters + 1 : "-";
    char shape[128] = "", *end = shape;
    result got[ARRAYS], want[ARRAYS];
    double error = NAN, explained = NAN, cpu_error = NAN, cpu_explained = NAN;
    if (!strstr(name, only) && !strstr(what, only)) return;
    for (size_t i = 0; i < letters; i++) {
        s[i] = sizes[(int)text[i]];
        end += sprintf(end, text[i] == '1' ? "%s1" : "%s%c=%zu", i ? "," : "", text[i], s[i]);
    }
    memcpy(small, s, sizeof s), whole = s[0], small[0] = retrofit_min(cut, s[0]);
    results(device, f, s, got);
    if (!fp32) results(&retrofit_cuda_fp32, f, s, want), compare(got, want, &error, &explained);
    results(&retrofit_cpu, f, small, want), compare(got, want, &cpu_error, &cpu_explained);
    for (size_t i = 0; i < ARRAYS; i++) free(got[i].x);
    bool fault = !(fp32 || error <= 2 * explained) || !(cpu_error <= 2 * cpu_explained);
    if (fp32) error = cpu_error;
    if (fp32 || !(cpu_error <= 2 * cpu_explained)) explained = cpu_explained; // that of the error to look at
    double t = seconds_of(f, s), flops = about.flops / t, bytes = about.bytes / t;
    faults += fault;
    say(ROW, "%s|%s|%s|%.1e|%.1e|%.1e|%s%s|%.1f|%.*f %s|%.2f", name, what, shape, error, cpu_error, explained, fault ? "ABOVE " : "",
        fp32 ? "" : about.notes, 1e6 * t, flops > 0, flops > 0 ? flops / 1e12 : bytes / 1e9, flops > 0 ? "TFLOP/s" : "GB/s",
        flops > 0 ? flops / matmul_limit : bytes / copy_limit);
}

static void all_operations(void) {
    say(LINE, "## Operations of %s", device->name);
    say(HEAD, "%-30s|%-8s|%-33s|%8s|%8s|%10s|%-7s|%9s|%14s|%6s", "operation", "what", "shape", " error", " CPU", " explained", "notes",
        " us", " rate", " share");
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
        for (const char *const *shape = operations[i].shapes; *shape; shape++)
            measure(operations[i].name, operations[i].call, *shape, operations[i].cut);
    say(LINE,
        "error: against %s. CPU: the first 64 rows or the first sequence, or, where rows are summed up or turned, everything, against the "
        "CPU. share: of the copy's GB/s or the large product's TFLOP/s.",
        fp32 ? "the CPU" : "cuda-fp32");
    say(LINE,
        "explained: by one rounding of the result; t: and by tensor cores, which cut sums off instead of rounding them after every 8 or 16 "
        "terms, K/8 2^-24; p: and by P and dS, which are bf16 where they meet V, K and Q: as much again as the result.");
}

// ---- The model -------------------------------------------------------------------------------------------------------------------
// TinyLlama's sizes without memory; fill_model then draws its weights.
static retrofit_model *new_model(size_t P, size_t C, size_t D) {
    retrofit_config c = {.context = 2048, .norm_eps = 1e-5f, .rope_theta = 10000, .mean_recurrence = 32, .backprop_depth = 8, .bos = -1};
    c.n_embd = sizes['d'], c.n_heads = sizes['H'], c.n_kv_heads = sizes['G'], c.head_dim = sizes['h'], c.intermediate = sizes['F'];
    c.vocab = sizes['V'], c.prelude = P, c.core = C, c.coda = D, c.state_std = (float)RETROFIT_STATE_STD, c.eos = -1;
    return need(retrofit_model_new(&c, device), "model");
}
static void fill_model(retrofit_model *m) {
    size_t d = m->config.n_embd, at = 0;
    float *x = memory(pool_size, 4), *ones = memory(d, 4);
    for (size_t i = 0; i < pool_size; i++) x[i] = sqrtf(2 / (5 * (float)d)) * normals[i];
    for (size_t i = 0; i < d; i++) ones[i] = 1;
    for (size_t i = 0; i < m->parameter_count; i++) {
        retrofit_parameter *p = m->parameters[i];
        if (p->kind == RETROFIT_NORM) device->upload(p->master, ones, d * 4);
        else upload_pool(device, p->master, p->rows * p->cols, at, x, 4), at += p->rows * p->cols;
    }
    retrofit_refresh_weights(m), free(x), free(ones);
}
static bool fits(const char *what, size_t bytes) {
    size_t room = device->free_memory();
    if (bytes > room) say(LINE, "%s does not fit: it takes %.2f GB, %.2f are free", what, (double)bytes / 1e9, (double)room / 1e9);
    return bytes <= room;
}
static double pass(retrofit_buffers *a, const int32_t *tokens, size_t n, size_t k) { // forward, loss, backward: the loss
    if (!retrofit_forward(a, tokens, a->B, a->T, a->model->config.state_std, 1, n, k)) need(NULL, "forward pass");
    double loss = retrofit_loss(a, tokens + 1, 1);
    return retrofit_backward(a), faults += !isfinite(loss), loss;
}

static void determinism(void) {
    size_t B = sizes['B'], T = sizes['T'], weights, gradients, moments, runs = miniature ? 5 : 20, differ = 0;
    retrofit_model *m = new_model(1, 2, 1);
    retrofit_training_bytes(m, RETROFIT_TRAINING, RETROFIT_ADAMW, &weights, &gradients, &moments);
    say(LINE, "## Determinism");
    if (fits("The model", weights + gradients + retrofit_buffers_bytes(&m->config, device, B, T, 2, RETROFIT_KEEP_ALL))) {
        if (!retrofit_model_allocate(m, RETROFIT_TRAINING)) need(NULL, "model");
        retrofit_buffers *a = need(retrofit_buffers_new(m, B, T, 2, RETROFIT_KEEP_ALL, NULL), "activations");
        int32_t *tokens = random_integers(B * T + 1, 0, sizes['V']);
        uint64_t *bits = memory(m->grad_bytes / 8, 8), first = 0;
        fill_model(m);
        for (size_t i = 0; i < runs; i++) {
            uint64_t hash = 0;
            double loss = (retrofit_zero_grad(m), pass(a, tokens, 2, 2));
            device->download(bits, m->grads, m->grad_bytes), memcpy(&hash, &loss, sizeof hash);
            SUMS(hash)
            for (size_t j = 0; j < m->grad_bytes / 8; j++) hash += retrofit_hash(bits[j], j);
            first = i ? first : hash, differ += hash != first;
        }
        faults += differ;
        say(LINE,
            "%zu runs of a pass of %zu x %zu tokens, (n,k) = (2,2), 4 layers: %zu differ from the first; loss and gradients hash to "
            "%016llx",
            runs, B, T, differ, (unsigned long long)first);
        free(tokens), free(bits), retrofit_buffers_free(a);
    }
    retrofit_free(m);
}

// ---- Training -------------------------------------------------------------------------------------------------------------------
// fixed: bytes of weights, gradients, moments; before: what was free before them.
static void train_steps(retrofit_model *m, retrofit_optimizer_kind kind, size_t n, size_t k, retrofit_keep keep, size_t fixed,
                        size_t before) {
    const char *name = kind == RETROFIT_MUON ? "Muon" : "AdamW", *kept = keep == RETROFIT_KEEP_INPUTS ? "inputs" : "all";
    retrofit_optimizer o = {kind, 5e-5f, 1e-3f, 0.9f, 0.95f, kind == RETROFIT_MUON ? 1e-10f : 1e-8f, 1e-4f, 0.95f, 1, 0, 0};
    size_t B = sizes['B'], T = sizes['T'], bytes = retrofit_buffers_bytes(&m->config, device, B, T, k, keep),
           rounds = miniature ? 1 : 5;
    char what[64];
    snprintf(what, sizeof what, "%s (%zu,%zu), %s kept,", name, n, k, kept);
    if (!fits(what, bytes)) return;
    retrofit_buffers *a = need(retrofit_buffers_new(m, B, T, k, keep, NULL), "activations");
    int32_t *tokens = random_integers(B * T + 1, 0, sizes['V']);
    double step[7], passes[7];
    for (size_t i = 0; i < rounds + 2 * !miniature; i++) { // the first two warm up
        double start = (wait(a->losses), retrofit_seconds());
        pass(a, tokens, n, k), wait(a->losses);
        passes[i] = retrofit_seconds() - start;
        retrofit_optimizer_step(m, &o, i + 1), retrofit_zero_grad(m), wait(a->losses);
        step[i] = retrofit_seconds() - start;
    }
    double t = median(step + 2 * !miniature, rounds), p = median(passes + 2 * !miniature, rounds), speed = (double)(B * T) / t,
           flops = speed * retrofit_flops_per_token(&m->config, RETROFIT_TRAINING, T, n, k);
    say(ROW, "%s|(%zu,%zu)|%s|%.0f|%.1f|%s|%.3f|%.1f|%.1f|%.2f|%.2f", name, n, k, kept, speed, flops / 1e12, share(flops, device->peak_flops()),
        flops / matmul_limit, 1e3 * p, 1e3 * (t - p), (double)(fixed + bytes) / 1e9, (double)(before - device->free_memory()) / 1e9);
    free(tokens), retrofit_buffers_free(a);
}

static void training(void) {
    static const size_t runs[][2] = {{0, 4}, {4, 4}, {8, 8}, {24, 8}, {8, 8}};
    retrofit_model *m = miniature ? new_model(1, 2, 1) : new_model(4, 8, 4);
    size_t before = device->free_memory(), weights, gradients, moments[2];
    for (int kind = RETROFIT_ADAMW; kind <= RETROFIT_MUON; kind++)
        retrofit_training_bytes(m, RETROFIT_TRAINING, (retrofit_optimizer_kind)kind, &weights, &gradients, &moments[kind]);
    say(LINE, "## Training: %zu-%zu-%zu layers, %.3fG parameters, micro-batches of %zu x %zu tokens", m->config.prelude, m->config.core,
        m->config.coda, (double)m->weight_count / 1e9, sizes['B'], sizes['T']);
    if (fits("The model", weights + gradients + moments[RETROFIT_ADAMW])) {
        if (!retrofit_model_allocate(m, RETROFIT_TRAINING)) need(NULL, "model");
        say(HEAD, "optimizer|(n,k) |kept  | tokens/s| TFLOP/s| of peak| of product| pass, ms| optimizer, ms| GB predicted| GB used");
        for (int kind = RETROFIT_ADAMW; kind <= RETROFIT_MUON; kind++) {
            if (m->moments) device->free(m->moments), m->moments = NULL;
            if (!retrofit_optimizer_init(m, (retrofit_optimizer_kind)kind)) need(NULL, "moments");
            fill_model(m), retrofit_zero_grad(m);
            for (size_t i = miniature ? 2 : 0; i < 5; i++)
                train_steps(m, (retrofit_optimizer_kind)kind, miniature ? 1 : runs[i][0], miniature ? 2 : runs[i][1],
                            i == 4 ? RETROFIT_KEEP_INPUTS : RETROFIT_KEEP_ALL, weights + gradients + moments[kind], before);
        }
    }
    retrofit_free(m);
}

// ---- Decoding -------------------------------------------------------------------------------------------------------------------
static void decoding(void) {
    size_t prompt = miniature ? 16 : 128, tokens = miniature ? 4 : 64, rounds = miniature ? 1 : 3, most = miniature ? 4 : 32, weights,
           unused[2];
    retrofit_model *m = miniature ? new_model(1, 2, 1) : new_model(4, 8, 4);
    const retrofit_config *c = &m->config;
    retrofit_training_bytes(m, RETROFIT_TRAINING, RETROFIT_ADAMW, &weights, &unused[0], &unused[1]);
    say(LINE, "## Decoding: %zu tokens, one at a time, after a prompt of %zu, weights in bf16", tokens, prompt);
    if (fits("The model", weights)) {
        if (!retrofit_model_allocate(m, RETROFIT_INFERENCE)) need(NULL, "model");
        retrofit_buffers *a =
            need(retrofit_buffers_new(m, 1, prompt, 0, RETROFIT_KEEP_NOTHING,
                                          &(retrofit_kv_cache){.capacity = prompt + tokens + 3, .recurrences = most}), "activations");
        int32_t *text = random_integers(prompt, 0, c->vocab);
        fill_model(m);
        say(HEAD, "    r| tokens/s| ms/token| GB/token|    GB/s| of copy");
        for (size_t r = 1; r <= most; r = r == 1 || r == 8 ? 4 * r : 2 * r) {
            double t[3], d = (double)c->n_embd, start = 0;
            retrofit_recurrence_options how = {.recurrences = r};
            for (size_t j = 0; j < rounds; j++) {
                retrofit_clear_cache(a);
                const float *logits = need((void *)retrofit_next_logits(a, text, 1, prompt, NULL, &how), "decoding");
                for (size_t i = 0; i < tokens + 3; i++) { // the first three prepare, record and replay a step
                    if (i == 3) start = retrofit_seconds();
                    int32_t next = retrofit_argmax(logits, c->vocab); // as infer does
                    logits = need((void *)retrofit_next_logits(a, &next, 1, 1, NULL, &how), "decoding");
                }
                t[j] = (retrofit_seconds() - start) / (double)tokens;
            }
            double layer = 2 * d * (retrofit_qkv_width(c) + d + 3.0 * c->intermediate) + 8 * d; // matrices in bf16, norms in fp32
            double bytes = (c->prelude + c->coda) * layer + r * (c->core * layer + 2 * d * d) + 2 * d * d + 2 * d * c->vocab + 8 * d;
            double s = median(t, rounds);
            say(ROW, "%zu|%.1f|%.3f|%.4f|%.0f|%.3f", r, 1 / s, 1e3 * s, bytes / 1e9, bytes / s / 1e9, bytes / s / copy_limit);
        }
        say(LINE, "GB: of weights; the KV cache is not counted.");
        free(text), retrofit_buffers_free(a);
    }
    retrofit_free(m);
}

int main(int argc, char **argv) {
    const retrofit_option table[] = {
        {"miniature", RETROFIT_FLAG, &miniature, NULL, "tiny sizes: does it all run? Times mean nothing"},
        {"only", RETROFIT_STRING, &only, "TEXT", "operations and shapes, or determinism, training, decoding, with TEXT in their names"},
        {"fp32", RETROFIT_FLAG, &fp32, NULL, "the operations of retrofit_cuda_fp32, and no more"},
        {"markdown", RETROFIT_STRING, &markdown_path, "FILE", "the tables there too, for doc/results.md"},
        {"commit", RETROFIT_STRING, &commit, "TEXT", "the version that is measured"}};
    int code =
        retrofit_options(argc, argv, table, sizeof table / sizeof *table, "bench_cuda [OPTIONS]: the GPU beside its limits\n", NULL, NULL);
    if (code >= 0) return code;
    char name[256], day[32];
    time_t now = time(NULL);
    strftime(day, sizeof day, "%Y-%m-%d", localtime(&now));
    device = need((void *)retrofit_device(RETROFIT_ON_CUDA, fp32, name), "start");
    if (markdown_path && !(markdown = fopen(markdown_path, "we"))) return perror(markdown_path), 1;
    say(LINE, "%s, %s, commit %s%s", name, day, commit, miniature ? ", in miniature: times mean nothing" : "");
    prepare(), limits(), all_operations();
    if (!fp32 && strstr("determinism", only)) determinism();
    if (!fp32 && strstr("training", only)) training();
    if (!fp32 && strstr("decoding", only)) decoding();
    say(LINE, "%zu faults: errors above twice what roundings explain, runs that differ, losses that are no numbers", faults);
    bool written = !markdown || !ferror(markdown);
    if (markdown && fclose(markdown)) written = false;
    if (!written) fprintf(stderr, "bench_cuda: %s: writing failed\n", markdown_path);
    return faults > 0 || !written;
}

// The GPU beside its limits: every operation at TinyLlama's sizes, whole training steps, decoding.
// `make bench-cuda` runs it, and beside it PyTorch where that is installed (bench_cuda.sh).
//
// Times are the host's clock around many calls, which are recorded and replayed, as in decoding, so
// that launching does not count; a download waits for them. The median of five measurements of 0.2
// s (with --brief of 0.04 s) counts. Calls take turns with so many copies of their arrays that the
// second-level cache holds nothing of the turn before. Limits are measured in the same run: copying
// a large block (read and written), and a large product of matrices.
//
// Errors are ‖out - want‖ / ‖want‖: against retrofit_cuda_fp32 over all of the output, and against
// the CPU over its beginning. All get the same numbers, rounded to bf16 where retrofit_cuda holds
// bf16. Beside them stands the error that roundings explain: ‖round(want) - want‖ / ‖want‖ for a
// result in bf16, (2 + √K)·2^-24 for a sum of K terms in fp32, and what a note adds. More than
// twice that is a fault.
#define RETROFIT_IMPLEMENTATION
#include "../retrofit.h"
#ifdef _OPENMP
#define PARALLEL_SUMS(...) PRAGMA(omp parallel for reduction(+ : __VA_ARGS__))
#else
#define PARALLEL_SUMS(...)
#endif

extern size_t retrofit_cuda_launches; // of kernels so far: retrofit_cuda.cu

static bool miniature, fp32, brief;
static const char *only = "", *markdown_path, *commit = "unknown";
static FILE *markdown;
static const retrofit_ops *device;      // the table that is measured
static double copy_limit, matmul_limit; // bytes and FLOP per second
static size_t faults; // errors above what roundings explain, runs that differ, losses that are NaN

static void fail(const char *what) {
    fprintf(stderr, "bench_cuda: %s: %s\n", what, retrofit_error());
    exit(1);
}

static void *need(void *p, const char *what) {
    if (!p) fail(what);
    return p;
}

static void *allocate(size_t n, size_t size) { return need(retrofit_allocate(n, size), "memory"); }

static int by_value(const void *a, const void *b) {
    const double *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

static double median(double *x, size_t n) {
    qsort(x, n, sizeof *x, by_value);
    return x[n / 2];
}

// Returns when the device has done all that it was told to do; p: any of its memory.
static void wait_for_device(const void *p) {
    char byte;
    device->download(&byte, p, 1);
}

// x / whole as text; - if the whole is not known.
static const char *share(double x, double whole) {
    static char text[16];
    if (whole <= 0) return "-";
    snprintf(text, sizeof text, "%.3f", x / whole);
    return text;
}

// ---- Tables ------------------------------------------------------------------------------------

enum { LINE_LENGTH = 512, MAX_COLUMNS = 16 };
static int widths[MAX_COLUMNS]; // of the columns of the current table, as printf takes them

// A line between tables.
__attribute__((format(printf, 1, 2))) static void print_line(const char *format, ...) {
    char text[LINE_LENGTH];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    puts(text);
    if (markdown) fprintf(markdown, "\n%s\n\n", text);
    fflush(stdout);
}

// Cuts a text at every '|'; returns the number of cells.
static size_t split_cells(char *text, char *cells[MAX_COLUMNS]) {
    size_t count = 0;
    for (char *cell = text; cell; count++) {
        char *end = strchr(cell, '|');
        cells[count] = cell;
        if (end) *end++ = 0;
        cell = end;
    }
    return count;
}

static void print_cells(char *const *cells, size_t count) {
    for (size_t i = 0; i < count; i++) {
        bool last = i + 1 == count;
        printf("%*s%s", widths[i], cells[i], last ? "\n" : "  ");
        if (markdown) fprintf(markdown, "| %s %s", cells[i], last ? "|\n" : "");
    }
    fflush(stdout);
}

// The head of a table, its cells divided by '|'. They are as wide as their columns; the columns of
// those that begin with a space stand on the right.
__attribute__((format(printf, 1, 2))) static void print_head(const char *format, ...) {
    char text[LINE_LENGTH], *cells[MAX_COLUMNS];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    size_t count = split_cells(text, cells);
    for (size_t i = 0; i < count; i++) {
        int width = (int)strlen(cells[i]);
        widths[i] = cells[i][0] == ' ' ? width : -width;
    }
    print_cells(cells, count);
    if (!markdown) return;
    for (size_t i = 0; i < count; i++) fprintf(markdown, "%s", widths[i] > 0 ? "|--:" : "|---");
    fprintf(markdown, "|\n");
}

__attribute__((format(printf, 1, 2))) static void print_row(const char *format, ...) {
    char text[LINE_LENGTH], *cells[MAX_COLUMNS];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    print_cells(cells, split_cells(text, cells));
}

// ---- Numbers -----------------------------------------------------------------------------------

// Sizes by the letters of retrofit.h, and W = 2F; S = 2d, from row to row of the adapter; C rows go
// through the head at a time; P positions in the KV cache; M: a side of the large product; K:
// floats in the large copy.
static size_t sizes[128], pool_size;
// All random numbers are stretches of one pool of normal ones: as fp32, rounded to bf16 in either
// type, and without their signs.
static float *normals, *rounded, *positives;
static uint16_t *halves;

static void set_sizes(void) {
    static const char letters[] = "BTHGhFVCPMK1";
    static const size_t full[] = {8, 1024, 32, 4, 64, 5632, 32000, 1024, 1024, 8192, 1 << 28, 1};
    static const size_t small[] = {3, 24, 4, 1, 16, 56, 120, 24, 40, 128, 1 << 16, 1};
    for (size_t i = 0; letters[i]; i++) sizes[(int)letters[i]] = miniature ? small[i] : full[i];
    sizes['N'] = sizes['B'] * sizes['T'];
    sizes['d'] = sizes['H'] * sizes['h'];
    sizes['S'] = 2 * sizes['d'];
    sizes['Q'] = (sizes['H'] + 2 * sizes['G']) * sizes['h'];
    sizes['W'] = 2 * sizes['F'];
}

static void fill_pool(void) {
    pool_size = miniature ? 65521 : 16777213; // primes, so that no two rows of a matrix are alike
    normals = allocate(pool_size, sizeof *normals);
    rounded = allocate(pool_size, sizeof *rounded);
    positives = allocate(pool_size, sizeof *positives);
    halves = allocate(pool_size, sizeof *halves);
    PARALLEL_FOR(pool_size)
    for (size_t i = 0; i < pool_size; i++) {
        normals[i] = retrofit_hash_normal(1, i);
        positives[i] = fabsf(normals[i]);
        halves[i] = retrofit_float_to_bf16(normals[i]);
        rounded[i] = retrofit_bf16_to_float(halves[i]);
    }
}

// n elements of a pool, from number `first` on and again from its beginning.
static void upload_pool(const retrofit_ops *ops, void *to, size_t n, size_t first, const void *pool,
                        size_t size) {
    size_t at = first % pool_size, done = 0;
    while (done < n) {
        size_t count = retrofit_min(n - done, pool_size - at);
        ops->upload((char *)to + done * size, (const char *)pool + at * size, count * size);
        done += count;
        at = 0;
    }
}

// Below `to`, or `from` if that is the same.
static int32_t *random_integers(size_t n, size_t from, size_t to) {
    int32_t *x = allocate(n, sizeof *x);
    for (size_t i = 0; i < n; i++) {
        double offset = retrofit_hash_uniform(2, i) * (double)(to - from);
        x[i] = (int32_t)(from + (size_t)offset);
    }
    return x;
}

// ---- Arrays of a call --------------------------------------------------------------------------

typedef enum { F32, POSITIVE, I32, F64, ACT } element; // ACT: what the table calls act
enum { COPIES = 128, ARRAYS = 8 };
typedef struct {
    char role; // 'i' read, 'o' written, 'b' both
    element type;
    size_t n;
    void *at[COPIES];
} array;
static const retrofit_ops *ops; // the table that is called
static array arrays[ARRAYS];
static size_t array_count; // arrays that this call has asked for so far
static size_t turn;        // which copy of them it takes
static bool fresh;         // this is the first call of the turn
static size_t uncut;       // a shape's first size before it was cut for the CPU
static struct {            // what a call says of itself
    double flops, bytes;   // bytes: each input read once, each output written once
    size_t terms;          // K
    const char *notes;
} info;

static size_t size_of(element type) {
    if (type == F64) return 8;
    return type == ACT ? retrofit_type_size(ops->act_type) : 4;
}

// Fills a new array: `rows` stretches of the pool, each `pitch` after the last.
static void fill_array(const array *a, void *p, size_t rows, size_t pitch) {
    size_t size = size_of(a->type), columns = a->n / rows, first = array_count * 1000003;
    const void *pool = normals;
    if (a->role == 'o') return; // the operation writes it
    if (a->type == POSITIVE) pool = positives;
    if (a->type == ACT) pool = size == 2 ? (void *)halves : rounded;
    if (columns == pitch) {
        upload_pool(ops, p, a->n, first, pool, size);
        return;
    }
    for (size_t i = 0; i < rows; i++) {
        char *row = (char *)p + i * columns * size;
        upload_pool(ops, row, columns, first + i * pitch, pool, size);
    }
}

// The next array: the first call of a turn makes it, later ones find it. It holds what `given`
// says, or numbers of the pool. A call must ask for the same arrays in the same order every time,
// before anything else happens.
static void *next_array(char role, element type, size_t n, size_t rows, size_t pitch,
                        const void *given) {
    array *a = &arrays[array_count++];
    size_t bytes = n * size_of(type);
    info.bytes += (double)bytes * (role == 'b' ? 2 : 1);
    if (a->at[turn]) return a->at[turn];
    void *p = need(ops->alloc(bytes), "memory for an operation");
    fresh = true;
    a->role = role;
    a->type = type;
    a->n = n;
    a->at[turn] = p;
    if (turn) ops->copy(p, a->at[0], bytes);
    else if (given) ops->upload(p, given, bytes);
    else fill_array(a, p, rows, pitch);
    return p;
}

static void *in(element type, size_t n) { return next_array('i', type, n, 1, n, NULL); }
static void *out(element type, size_t n) { return next_array('o', type, n, 1, 0, NULL); }
static void *both(element type, size_t n) { return next_array('b', type, n, 1, n, NULL); }

static int32_t *integers(size_t n, size_t from, size_t to) {
    int32_t *x = random_integers(n, from, to);
    int32_t *p = next_array('i', I32, n, 1, 0, x);
    free(x);
    return p;
}

static double *number(char role, double x) { return next_array(role, F64, 1, 1, 0, &x); }

// RoPE's table.
static float *angles(size_t positions, size_t h) {
    retrofit_config config = {.head_dim = h, .rope_theta = 10000};
    float *x = allocate(positions * h, sizeof *x);
    rope_table(x, &config, positions);
    float *p = next_array('i', F32, positions * h, 1, 0, x);
    free(x);
    return p;
}

// stride 0: no gaps between the rows. What lies in gaps is not read.
static retrofit_weight matrix(size_t rows, size_t cols, size_t stride) {
    if (stride == 0) stride = cols;
    void *data = in(ACT, (rows - 1) * stride + cols);
    info.bytes -= (double)((rows - 1) * (stride - cols) * size_of(ACT));
    return (retrofit_weight){data, ops->act_type, stride};
}

static void multiplies(size_t N, size_t I, size_t O, size_t terms) {
    if (N > 8) info.flops = 2.0 * N * I * O; // of fewer rows, reading the matrix is all the cost
    info.terms = terms;
    info.notes = "t";
}

static void sums_up(size_t terms, const char *notes) {
    info.terms = terms;
    info.notes = notes;
}

// ---- The operations ----------------------------------------------------------------------------

// OP(name, cut, shapes) { a call }: a shape's letters become the sizes s; the CPU gets `cut` of the
// first one only.
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
    info.bytes = N * (8.0 * d + 4); // of wte only the tokens' rows
    ops->embedding_forward(x, tokens, wte, N, d);
}

OP(embedding_backward, ALL, "NdV") {
    size_t N = s[0], d = s[1], V = s[2];
    float *dwte = both(F32, V * d), *dx = in(F32, N * d);
    int32_t *tokens = integers(N, 0, V);
    double different = V * (1 - exp(-(double)N / V)); // tokens
    info.bytes = N * (4.0 * d + 4) + different * 8 * d;
    info.terms = 8;
    ops->embedding_backward(dwte, tokens, dx, N, d);
}

OP(rmsnorm_forward, ROWS, "Nd", "1d") {
    size_t N = s[0], d = s[1], n = N * d;
    info.terms = d;
    ops->rmsnorm_forward(out(ACT, n), out(F32, N), in(F32, n), in(F32, d), N, d, 1e-5f);
}

OP(rmsnorm_backward, ALL, "Nd") {
    size_t N = s[0], d = s[1], n = N * d;
    info.terms = N;
    ops->rmsnorm_backward(both(F32, n), both(F32, d), in(ACT, n), in(F32, n), in(F32, N),
                          in(F32, d), N, d);
}

OP(rmsnorm_residual_forward, ALL, "Nd") {
    size_t N = s[0], d = s[1], n = N * d;
    info.terms = d;
    ops->rmsnorm_residual_forward(out(F32, n), out(F32, N), in(F32, n), in(F32, n), in(F32, d), N,
                                  d, 1e-5f);
}

OP(rmsnorm_residual_backward, ALL, "Nd") {
    size_t N = s[0], d = s[1], n = N * d;
    info.terms = N;
    ops->rmsnorm_residual_backward(out(ACT, n), both(F32, d), in(F32, n), in(F32, n), in(F32, N),
                                   in(F32, d), N, d);
}

OP(bias_forward, ALL, "NQ") {
    ops->bias_forward(both(ACT, s[0] * s[1]), in(F32, s[1]), s[0], s[1]);
}

OP(bias_backward, ALL, "NQ") {
    info.terms = s[0];
    ops->bias_backward(both(F32, s[1]), in(ACT, s[0] * s[1]), s[0], s[1]);
}

OP(matmul_forward, ROWS, "NdQ w_qkv", "NdW fc", "CdV head", "1dQ w_qkv", "1dW fc") {
    size_t N = s[0], I = s[1], O = s[2];
    multiplies(N, I, O, I);
    ops->matmul_forward(out(ACT, N * O), in(ACT, N * I), matrix(O, I, 0), N, I, O);
}

OP(matmul_residual_forward, ROWS, "Ndd proj", "NFd w_down", "NddS adapter", "1dd proj",
   "1Fd w_down", "1ddS adapter", "1dV head") {
    size_t N = s[0], I = s[1], O = s[2], stride = s[3];
    multiplies(N, I, O, I);
    ops->matmul_residual_forward(out(F32, N * O), in(F32, N * O), in(ACT, N * I),
                                 matrix(O, I, stride), N, I, O);
}

OP(matmul_backward_input, ROWS, "NdQ w_qkv", "Ndd proj", "NdW fc", "NFd w_down", "CdV head",
   "dWd muon") {
    size_t N = s[0], I = s[1], O = s[2];
    multiplies(N, I, O, O);
    ops->matmul_backward_input(out(ACT, N * I), in(ACT, N * O), matrix(O, I, 0), N, I, O);
}

OP(matmul_residual_backward_input, ROWS, "NddS adapter") {
    size_t N = s[0], I = s[1], O = s[2], stride = s[3];
    multiplies(N, I, O, O);
    ops->matmul_residual_backward_input(out(F32, N * I), in(ACT, N * O), matrix(O, I, stride), N, I,
                                        O);
}

// Cut to 64 rows of dw, dout is the first columns of all of it.
OP(matmul_backward_weight, ROWS, "QNd w_qkv", "dNd proj", "WNd fc", "dNF w_down", "dNdS adapter",
   "VCd head") {
    size_t O = s[0], N = s[1], I = s[2], stride = s[3] ? s[3] : I;
    multiplies(N, I, O, N);
    ops->matmul_backward_weight(both(F32, (O - 1) * stride + I), stride,
                                next_array('i', ACT, N * O, N, uncut, NULL), in(ACT, N * I), N, I,
                                O);
}

// Newton-Schulz' products, whose halves are the same.
OP(matmul_symmetric, ALL, "dW muon", "dd muon") {
    size_t N = s[0], I = s[1];
    multiplies(N, I, N, I);
    ops->matmul_symmetric(out(ACT, N * N), in(ACT, N * I), N, I);
}

// Queries and keys are turned, not values; each is read and written.
static double rope_bytes(size_t B, size_t T, size_t H, size_t G, size_t h) {
    return 2 * (double)B * T * (H + G) * h * size_of(ACT) + 4.0 * T * h;
}

// Of each head, as Qwen3's.
OP(qk_norm_forward, ALL, "NHGh") {
    size_t N = s[0], H = s[1], G = s[2], h = s[3], both_heads = (H + G) * h;
    info.terms = h;
    ops->qk_norm_forward(both(ACT, N * (H + 2 * G) * h), out(ACT, N * both_heads),
                         out(F32, N * (H + G)), in(F32, h), in(F32, h), N, H, G, h, true, 1e-5f);
}

OP(qk_norm_backward, ALL, "NHGh") {
    size_t N = s[0], H = s[1], G = s[2], h = s[3];
    info.terms = N * H;
    ops->qk_norm_backward(both(ACT, N * (H + 2 * G) * h), both(F32, h), both(F32, h),
                          in(ACT, N * (H + G) * h), in(F32, N * (H + G)), in(F32, h), in(F32, h), N,
                          H, G, h, true);
}

OP(rope_forward, SEQUENCE, "BTHGh") {
    size_t B = s[0], T = s[1], H = s[2], G = s[3], h = s[4];
    void *qkv = both(ACT, B * T * (H + 2 * G) * h), *table = angles(T, h);
    info.bytes = rope_bytes(B, T, H, G, h);
    ops->rope_forward(qkv, table, NULL, B, T, H, G, h);
}

OP(rope_backward, SEQUENCE, "BTHGh") {
    size_t B = s[0], T = s[1], H = s[2], G = s[3], h = s[4];
    void *qkv = both(ACT, B * T * (H + 2 * G) * h), *table = angles(T, h);
    info.bytes = rope_bytes(B, T, H, G, h);
    ops->rope_backward(qkv, table, B, T, H, G, h);
}

OP(attention_forward, SEQUENCE, "BTHGh") {
    size_t B = s[0], T = s[1], H = s[2], G = s[3], h = s[4], N = B * T;
    info.flops = 2.0 * N * T * H * h;
    sums_up(T, "p");
    ops->attention_forward(out(ACT, N * H * h), out(F32, N * H), in(ACT, N * (H + 2 * G) * h), B, T,
                           H, G, h);
}

// Five products, of which each counts once, as in the literature. delta is for its own use.
OP(attention_backward, SEQUENCE, "BTHGh") {
    size_t B = s[0], T = s[1], H = s[2], G = s[3], h = s[4], N = B * T;
    void *dqkv = out(ACT, N * (H + 2 * G) * h), *qkv = in(ACT, N * (H + 2 * G) * h);
    void *dy = in(ACT, N * H * h), *y = in(ACT, N * H * h);
    float *lse = in(F32, N * H), *delta = in(F32, N * H);
    if (fresh) ops->attention_forward(y, lse, qkv, B, T, H, G, h);
    info.flops = 5.0 * N * T * H * h;
    sums_up(T * (H / G), "p");
    ops->attention_backward(dqkv, delta, dy, qkv, y, lse, B, T, H, G, h);
}

OP(swiglu_forward, ROWS, "NF", "1F") {
    size_t N = s[0], F = s[1];
    ops->swiglu_forward(out(ACT, N * F), in(ACT, N * 2 * F), N, F);
}

OP(swiglu_backward, ROWS, "NF") {
    size_t N = s[0], F = s[1], n = N * F;
    ops->swiglu_backward(out(ACT, 2 * n), out(ACT, n), in(ACT, n), in(ACT, 2 * n), N, F);
}

OP(cross_entropy, ROWS, "CV") {
    size_t N = s[0], V = s[1];
    info.terms = V;
    ops->cross_entropy(out(F32, N), both(ACT, N * V), integers(N, 0, V), N, V, 1);
}

OP(cast, ROWS, "Nd", "Wd fc") {
    size_t n = s[0] * s[1];
    ops->cast(out(ACT, n), in(F32, n), n);
}

OP(add, ROWS, "Nd") {
    size_t n = s[0] * s[1];
    ops->add(both(F32, n), in(F32, n), n, 0.5f);
}

OP(state_init, SEQUENCE, "BTd") {
    size_t B = s[0], T = s[1], d = s[2];
    ops->state_init(out(F32, B * T * d), NULL, B, T, d, (float)RETROFIT_STATE_STD, 1);
}

// The third size is the capacity, to whose end tokens go.
OP(kv_store, SEQUENCE, "BTTHGh", "11PHGh") {
    size_t B = s[0], T = s[1], P = s[2], H = s[3], G = s[4], h = s[5], n = B * P * G * h;
    void *keys = both(ACT, n), *values = both(ACT, n), *qkv = in(ACT, B * T * (H + 2 * G) * h);
    int32_t *past = integers(B, P - T, P - T);
    info.bytes = 4.0 * B * T * G * h * size_of(ACT);
    ops->kv_store(keys, values, qkv, past, NULL, B, T, P, H, G, h, ops->act_type);
}

OP(attention_cached, SEQUENCE, "11PHGh") {
    size_t B = s[0], T = s[1], P = s[2], H = s[3], G = s[4], h = s[5], N = B * T;
    void *qkv = in(ACT, N * (H + 2 * G) * h);
    void *keys = in(ACT, B * P * G * h), *values = in(ACT, B * P * G * h);
    sums_up(P, "p");
    ops->attention_cached(out(ACT, N * H * h), qkv, keys, values, integers(B, P - T, P - T), NULL,
                          B, T, P, H, G, h, ops->act_type);
}

// A token that stopped after the first of 8 recurrences of 8 layers; the second size: capacity.
OP(kv_backfill, SEQUENCE, "1PGh") {
    size_t S = 8, C = 8, B = s[0], P = s[1], G = s[2], h = s[3], width = G * h;
    void *keys = both(ACT, S * C * B * P * width), *values = both(ACT, S * C * B * P * width);
    int32_t *past = integers(B, P - 1, P - 1), *used = integers(B, 1, 1);
    info.bytes = 2.0 * S * C * B * width * size_of(ACT);
    ops->kv_backfill(keys, values, past, used, S, C, B * P * width, B, P, G, h, ops->act_type);
}

OP(sum_squares, ALL, "Wd fc") {
    size_t n = s[0] * s[1];
    info.terms = 256;
    ops->sum_squares(number('b', 0), in(F32, n), n);
}

OP(adamw_update, ROWS, "Wd fc") {
    size_t n = s[0] * s[1];
    info.terms = 4;
    ops->adamw_update(both(F32, n), both(F32, n), both(POSITIVE, n), in(F32, n), n, 0.5f, 1e-3f,
                      0.9f, 0.95f, 0.5, 0.4, 1e-8f, 0.1f);
}

OP(ellisadam_moments, ALL, "Wd fc") {
    size_t n = s[0] * s[1];
    info.terms = 256;
    ops->ellisadam_moments(both(F32, n), both(POSITIVE, n), number('b', 0), in(F32, n), n, 0.5f,
                           0.9f, 0.95f, 1e-6f);
}

OP(ellisadam_update, ROWS, "Wd fc") {
    size_t n = s[0] * s[1];
    info.terms = 4;
    ops->ellisadam_update(both(F32, n), in(F32, n), in(POSITIVE, n), number('i', (double)n), n,
                          1e-3f, 0.5, 0.4, 0.1f);
}

OP(muon_momentum, ROWS, "Wd fc") {
    size_t n = s[0] * s[1];
    ops->muon_momentum(out(F32, n), both(F32, n), in(F32, n), n, 0.5f, 0.95f);
}

OP(muon_load, ALL, "Wd fc", "dd proj") {
    size_t n = s[0] * s[1];
    ops->muon_load(out(ACT, n), in(F32, n), number('i', 2), s[0], s[1]);
}

OP(axpby, ROWS, "dW fc", "dd proj") {
    size_t n = s[0] * s[1];
    ops->axpby(both(ACT, n), in(ACT, n), n, 2.0315f, 0.5f);
}

OP(muon_update, ALL, "Wd fc", "dd proj") {
    size_t n = s[0] * s[1];
    ops->muon_update(both(F32, n), in(ACT, n), s[0], s[1], 1e-3f, 2, 0.1f);
}

static void call_copy(const size_t *s) { ops->copy(out(F32, s[0]), in(F32, s[0]), s[0] * 4); }

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

// ---- What a call computes, and what it costs ---------------------------------------------------

static void call_once(call *f, const size_t *s) {
    memset(&info, 0, sizeof info);
    info.terms = 1;
    info.notes = "";
    array_count = 0;
    fresh = false;
    f(s);
}

static void free_arrays(void) {
    for (size_t i = 0; i < ARRAYS; i++)
        for (size_t j = 0; j < COPIES; j++)
            if (arrays[i].at[j]) ops->free(arrays[i].at[j]);
    memset(arrays, 0, sizeof arrays);
    turn = 0;
}

typedef struct { // what a first call has written to an array; x: NULL if nothing
    float *x;
    size_t n;
    bool half; // it may round to bf16
} result;

static result result_of(const array *a) {
    size_t n = a->n, size = size_of(a->type);
    void *bytes = allocate(n, size);
    const uint16_t *half = bytes;
    const float *single = bytes;
    const double *twice = bytes;
    float *x = allocate(n, sizeof *x);
    ops->download(bytes, a->at[0], n * size);
    PARALLEL_FOR(n)
    for (size_t j = 0; j < n; j++) {
        if (size == 2) x[j] = retrofit_bf16_to_float(half[j]);
        else if (size == 8) x[j] = (float)twice[j];
        else x[j] = single[j];
    }
    free(bytes);
    return (result){x, n, a->type == ACT};
}

static void results_on(const retrofit_ops *table, call *f, const size_t *s,
                       result results[ARRAYS]) {
    ops = table;
    call_once(f, s);
    memset(results, 0, ARRAYS * sizeof *results);
    for (size_t i = 0; i < array_count; i++)
        if (arrays[i].role != 'i') results[i] = result_of(&arrays[i]);
    free_arrays();
}

// The error of one result, and what roundings explain; `want` may be its beginning.
static void compare_result(const result *got, const result *want, double *error,
                           double *explained) {
    bool bf16 = device->act_type == RETROFIT_BF16, rounds = bf16 && want->half;
    double off = 0, size = 0, round = 0, terms = (double)info.terms, sums = 2 + sqrt(terms);
    if (bf16 && *info.notes == 't') sums += terms / 8;
    sums *= 0x1p-24;
    PARALLEL_SUMS(off, size, round)
    for (size_t j = 0; j < want->n; j++) {
        double x = got->x[j], y = want->x[j], nearest = y;
        if (rounds) nearest = retrofit_bf16_to_float(retrofit_float_to_bf16(want->x[j]));
        off += (x - y) * (x - y);
        size += y * y;
        round += (nearest - y) * (nearest - y);
    }
    *error = sqrt(off / size);
    *explained = sqrt((*info.notes == 'p' ? 2 : 1) * round / size + sums * sums);
}

// The error of that result where it is largest beside what roundings explain, and that. Frees
// `want`.
static void compare(const result got[ARRAYS], const result want[ARRAYS], double *error,
                    double *explained) {
    double worst = -1;
    for (size_t i = 0; i < ARRAYS; i++) {
        double e, limit;
        if (!want[i].x) continue;
        compare_result(&got[i], &want[i], &e, &limit);
        double ratio = isfinite(e / limit) ? e / limit : INFINITY;
        if (ratio > worst) {
            worst = ratio;
            *error = e;
            *explained = limit;
        }
        free(want[i].x);
    }
}

static double seconds_of(call *f, const size_t *s) {
    double bytes = 0, seconds[5];
    size_t copies = 1, max_copies = miniature ? 2 : COPIES, repeats = 1, rounds = miniature ? 1 : 5;
    ops = device;
    call_once(f, s);
    for (size_t i = 0; i < array_count; i++)
        bytes += (double)(arrays[i].n * size_of(arrays[i].type));
    while (copies < max_copies && (double)copies * bytes < 256e6) copies++;
    for (turn = 1; turn < copies; turn++) call_once(f, s);

    size_t calls = miniature || copies >= 32 ? copies : 32 / copies * copies;
    ops->record_begin();
    for (size_t i = 0; i < calls; i++) {
        turn = i % copies;
        call_once(f, s);
    }
    void *recording = ops->record_end();
    for (size_t i = 0; i < rounds + 2; i++) { // one to warm up, one to tell how many make 0.2 s
        double start = retrofit_seconds();
        for (size_t j = 0; j < repeats; j++) ops->replay(recording);
        wait_for_device(arrays[0].at[0]);
        double passed = (retrofit_seconds() - start) / (double)repeats;
        if (i == 1 && !miniature) repeats = 1 + (size_t)((brief ? 0.04 : 0.2) / passed);
        if (i >= 2) seconds[i - 2] = passed / (double)calls;
    }
    ops->record_free(recording);
    free_arrays();
    return median(seconds, rounds);
}

// Where cuBLASLt is it is opened for the first product, and its library then lies in this process'
// memory. Where it is not, the program has said so on stderr.
static void print_matmul_library(void) {
    char line[1024], *path = NULL;
    FILE *maps = fopen("/proc/self/maps", "re");
    while (maps && !path && fgets(line, sizeof line, maps))
        if (strstr(line, "libcublasLt")) path = strchr(line, '/');
    if (maps) fclose(maps);
    if (path) path[strcspn(path, "\n")] = 0;
    print_line("matrix products by %s", path ? path : "our own kernels");
}

static void limits(void) {
    size_t K = sizes['K'], M = sizes['M'], copy[8] = {K}, product[8] = {M, M, M};
    copy_limit = 8.0 * K / seconds_of(call_copy, copy);
    matmul_limit = 2.0 * M * M * M / seconds_of(call_matmul_forward, product);
    print_line("## Limits");
    print_head("%-36s|%16s|%14s", "what", " measured", " of data sheet");
    print_row("copying %.3f GB, read and written|%.0f GB/s|-", 4e-9 * K, copy_limit / 1e9);
    print_row("product, %zu on a side, %s|%.1f TFLOP/s|%s", M, fp32 ? "fp32" : "bf16",
              matmul_limit / 1e12, share(matmul_limit, device->peak_flops()));
    print_matmul_library();
}

// The error of the device's results, what explains it, and whether it is a fault.
typedef struct {
    double error, cpu_error, explained; // cpu_error: against the CPU
    bool fault;
} errors;

static errors errors_of(call *f, const size_t *s, const size_t *cut) {
    result got[ARRAYS], want[ARRAYS];
    errors e = {NAN, NAN, NAN, false};
    double cpu_explained = NAN;
    results_on(device, f, s, got);
    if (!fp32) {
        results_on(&retrofit_cuda_fp32, f, s, want);
        compare(got, want, &e.error, &e.explained);
    }
    results_on(&retrofit_cpu, f, cut, want);
    compare(got, want, &e.cpu_error, &cpu_explained);
    for (size_t i = 0; i < ARRAYS; i++) free(got[i].x);

    bool cpu_fault = !(e.cpu_error <= 2 * cpu_explained); // also if either is NaN
    e.fault = cpu_fault || (!fp32 && !(e.error <= 2 * e.explained));
    if (fp32) e.error = e.cpu_error;
    if (fp32 || cpu_fault) e.explained = cpu_explained; // of the error to look at
    return e;
}

// What is multiplied, the word behind a shape's letters.
static const char *what_of(const char *shape) {
    const char *space = strchr(shape, ' ');
    return space ? space + 1 : "-";
}

static bool is_selected(const char *name, const char *shape) {
    return strstr(name, only) || strstr(what_of(shape), only);
}

static void measure(const char *name, call *f, const char *text, size_t cut) {
    size_t s[8] = {0}, small[8], letters = strcspn(text, " ");
    const char *what = what_of(text);
    char shape[128] = "", *end = shape;
    for (size_t i = 0; i < letters; i++) {
        s[i] = sizes[(int)text[i]];
        if (i) end += sprintf(end, ",");
        if (text[i] == '1') end += sprintf(end, "1");
        else end += sprintf(end, "%c=%zu", text[i], s[i]);
    }
    memcpy(small, s, sizeof s);
    small[0] = retrofit_min(cut, s[0]);
    uncut = s[0];

    errors e = errors_of(f, s, small);
    faults += e.fault;
    double seconds = seconds_of(f, s);
    const char *notes = fp32 ? "" : info.notes, *unit = "GB/s";
    double rate = info.bytes / seconds / 1e9, part = info.bytes / seconds / copy_limit;
    int decimals = 0;
    if (info.flops > 0) {
        rate = info.flops / seconds / 1e12;
        part = info.flops / seconds / matmul_limit;
        decimals = 1;
        unit = "TFLOP/s";
    }
    print_row("%s|%s|%s|%.1e|%.1e|%.1e|%s%s|%.1f|%.*f %s|%.2f", name, what, shape, e.error,
              e.cpu_error, e.explained, e.fault ? "ABOVE " : "", notes, 1e6 * seconds, decimals,
              rate, unit, part);
}

static bool any_selected(void) {
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
        for (const char *const *shape = operations[i].shapes; *shape; shape++)
            if (is_selected(operations[i].name, *shape)) return true;
    return false;
}

static void all_operations(void) {
    if (!any_selected()) return;
    print_line("## Operations of %s", device->name);
    print_head("%-30s|%-8s|%-33s|%8s|%8s|%10s|%-7s|%9s|%14s|%6s", "operation", "what", "shape",
               " error", " CPU", " explained", "notes", " us", " rate", " share");
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
        for (const char *const *shape = operations[i].shapes; *shape; shape++)
            if (is_selected(operations[i].name, *shape))
                measure(operations[i].name, operations[i].call, *shape, operations[i].cut);
    print_line(
        "error: against %s. CPU: the first 64 rows or the first sequence, or, where rows are "
        "summed up or turned, everything, against the CPU. share: of the copy's GB/s or the "
        "large product's TFLOP/s.",
        fp32 ? "the CPU" : "cuda-fp32");
    print_line(
        "explained: by one rounding of the result; t: and by tensor cores, which cut sums off "
        "instead of rounding them after every 8 or 16 terms, K/8 2^-24; p: and by P and dS, "
        "which are bf16 where they meet V, K and Q: as much again as the result.");
}

// ---- The model ---------------------------------------------------------------------------------

// TinyLlama's sizes without memory; allocate_model then draws its weights.
static retrofit_model *new_model(size_t P, size_t C, size_t D) {
    retrofit_config config = {.n_embd = sizes['d'],
                              .n_heads = sizes['H'],
                              .n_kv_heads = sizes['G'],
                              .head_dim = sizes['h'],
                              .intermediate = sizes['F'],
                              .vocab = sizes['V'],
                              .context = 2048,
                              .prelude = P,
                              .core = C,
                              .coda = D,
                              .norm_eps = 1e-5f,
                              .rope_theta = 10000,
                              .state_std = (float)RETROFIT_STATE_STD,
                              .mean_recurrence = 32,
                              .backprop_depth = 8,
                              .bos = -1};
    return need(retrofit_model_new(&config, device), "model");
}

static void fill_model(retrofit_model *model) {
    size_t d = model->config.n_embd, first = 0;
    float *x = allocate(pool_size, sizeof *x), *ones = allocate(d, sizeof *ones);
    for (size_t i = 0; i < pool_size; i++) x[i] = sqrtf(2 / (5 * (float)d)) * normals[i];
    for (size_t i = 0; i < d; i++) ones[i] = 1;
    for (size_t i = 0; i < model->parameter_count; i++) {
        retrofit_parameter *p = model->parameters[i];
        size_t n = p->rows * p->cols;
        if (p->kind == RETROFIT_NORM) {
            device->upload(p->master, ones, d * sizeof *ones);
            continue;
        }
        upload_pool(device, p->master, n, first, x, sizeof *x);
        first += n;
    }
    retrofit_refresh_weights(model);
    free(x);
    free(ones);
}

static void allocate_model(retrofit_model *model, retrofit_mode mode) {
    if (!retrofit_model_allocate(model, mode)) fail("model");
}

static retrofit_buffers *new_buffers(retrofit_model *model, size_t B, size_t T, size_t K,
                                     retrofit_keep keep, const retrofit_kv_cache *cache) {
    return need(retrofit_buffers_new(model, B, T, K, keep, cache), "activations");
}

static bool fits(const char *what, size_t bytes) {
    size_t free_bytes = device->free_memory();
    if (bytes <= free_bytes) return true;
    print_line("%s does not fit: it takes %.2f GB, %.2f are free", what, (double)bytes / 1e9,
               (double)free_bytes / 1e9);
    return false;
}

// Forward, loss, backward; returns the loss.
static double pass(retrofit_buffers *buffers, const int32_t *tokens, size_t n, size_t k) {
    float sigma = buffers->model->config.state_std;
    if (!retrofit_forward(buffers, tokens, buffers->B, buffers->T, sigma, 1, n, k))
        fail("forward pass");
    double loss = retrofit_loss(buffers, tokens + 1, 1);
    retrofit_backward(buffers);
    faults += !isfinite(loss);
    return loss;
}

// ---- Determinism -------------------------------------------------------------------------------

// Of the loss and all gradients of a pass.
static uint64_t hash_of_pass(retrofit_model *model, retrofit_buffers *buffers,
                             const int32_t *tokens, uint64_t *bits) {
    uint64_t hash = 0;
    retrofit_zero_grad(model);
    double loss = pass(buffers, tokens, 2, 2);
    device->download(bits, model->grads, model->grad_bytes);
    memcpy(&hash, &loss, sizeof hash);
    PARALLEL_SUMS(hash)
    for (size_t j = 0; j < model->grad_bytes / 8; j++) hash += retrofit_hash(bits[j], j);
    return hash;
}

static void determinism(void) {
    size_t B = sizes['B'], T = sizes['T'], weights, gradients, moments;
    size_t runs = miniature ? 5 : 20, different = 0;
    retrofit_model *model = new_model(1, 2, 1);
    print_line("## Determinism");
    retrofit_training_bytes(model, RETROFIT_TRAINING, RETROFIT_ADAMW, &weights, &gradients,
                            &moments);
    size_t activations = retrofit_buffers_bytes(&model->config, device, B, T, 2, RETROFIT_KEEP_ALL);
    if (fits("The model", weights + gradients + activations)) {
        allocate_model(model, RETROFIT_TRAINING);
        fill_model(model);
        retrofit_buffers *buffers = new_buffers(model, B, T, 2, RETROFIT_KEEP_ALL, NULL);
        int32_t *tokens = random_integers(B * T + 1, 0, sizes['V']);
        uint64_t *bits = allocate(model->grad_bytes / 8, sizeof *bits), first = 0;
        for (size_t i = 0; i < runs; i++) {
            uint64_t hash = hash_of_pass(model, buffers, tokens, bits);
            if (i == 0) first = hash;
            different += hash != first;
        }
        faults += different;
        print_line(
            "%zu runs of a pass of %zu x %zu tokens, (n,k) = (2,2), 4 layers: %zu differ from "
            "the first; loss and gradients hash to %016llx",
            runs, B, T, different, (unsigned long long)first);
        free(tokens);
        free(bits);
        retrofit_buffers_free(buffers);
    }
    retrofit_free(model);
}

// ---- Training ----------------------------------------------------------------------------------

// A run of steps. fixed: bytes of weights, gradients, moments; before: what was free before them.
typedef struct {
    retrofit_optimizer_kind kind;
    size_t n, k;
    retrofit_keep keep;
    size_t fixed, before;
} training_run;

static retrofit_optimizer optimizer_of(retrofit_optimizer_kind kind) {
    return (retrofit_optimizer){.kind = kind,
                                .lr = 5e-5f,
                                .muon_lr = 1e-3f,
                                .beta1 = 0.9f,
                                .beta2 = 0.95f,
                                .eps = kind == RETROFIT_MUON ? 1e-10f : 1e-8f,
                                .weight_decay = 1e-4f,
                                .momentum = 0.95f,
                                .clip = 1};
}

// The median seconds of a step, and of its pass alone.
static void time_steps(retrofit_model *model, retrofit_buffers *buffers, const training_run *run,
                       double *step_seconds, double *pass_seconds) {
    size_t rounds = miniature ? 1 : 5, warm_up = miniature ? 0 : 2;
    double steps[7], passes[7];
    retrofit_optimizer optimizer = optimizer_of(run->kind);
    int32_t *tokens = random_integers(buffers->B * buffers->T + 1, 0, sizes['V']);
    for (size_t i = 0; i < warm_up + rounds; i++) {
        wait_for_device(buffers->losses);
        double start = retrofit_seconds();
        pass(buffers, tokens, run->n, run->k);
        wait_for_device(buffers->losses);
        passes[i] = retrofit_seconds() - start;
        retrofit_optimizer_step(model, &optimizer, i + 1);
        retrofit_zero_grad(model);
        wait_for_device(buffers->losses);
        steps[i] = retrofit_seconds() - start;
    }
    *step_seconds = median(steps + warm_up, rounds);
    *pass_seconds = median(passes + warm_up, rounds);
    free(tokens);
}

static void measure_steps(retrofit_model *model, const training_run *run) {
    const char *name = run->kind == RETROFIT_MUON ? "Muon" : "AdamW";
    const char *kept = run->keep == RETROFIT_KEEP_INPUTS ? "inputs" : "all";
    size_t B = sizes['B'], T = sizes['T'], n = run->n, k = run->k;
    size_t bytes = retrofit_buffers_bytes(&model->config, device, B, T, k, run->keep);
    char what[64];
    double step, forward_backward;
    snprintf(what, sizeof what, "%s (%zu,%zu), %s kept,", name, n, k, kept);
    if (!fits(what, bytes)) return;
    retrofit_buffers *buffers = new_buffers(model, B, T, k, run->keep, NULL);
    time_steps(model, buffers, run, &step, &forward_backward);
    double speed = (double)(B * T) / step;
    double flops = speed * retrofit_flops_per_token(&model->config, RETROFIT_TRAINING, T, n, k);
    print_row("%s|(%zu,%zu)|%s|%.0f|%.1f|%s|%.3f|%.1f|%.1f|%.2f|%.2f", name, n, k, kept, speed,
              flops / 1e12, share(flops, device->peak_flops()), flops / matmul_limit,
              1e3 * forward_backward, 1e3 * (step - forward_backward),
              (double)(run->fixed + bytes) / 1e9,
              (double)(run->before - device->free_memory()) / 1e9);
    retrofit_buffers_free(buffers);
}

// Its moments take the place of those before; the weights are as at first.
static void set_optimizer(retrofit_model *model, retrofit_optimizer_kind kind) {
    if (model->moments) device->free(model->moments);
    model->moments = NULL;
    if (!retrofit_optimizer_init(model, kind)) fail("moments");
    fill_model(model);
    retrofit_zero_grad(model);
}

// All runs with one optimizer.
static void train_with(retrofit_model *model, training_run run) {
    static const struct {
        size_t n, k;
        retrofit_keep keep;
    } full[] = {
        {0, 4, RETROFIT_KEEP_ALL},  {4, 4, RETROFIT_KEEP_ALL},    {8, 8, RETROFIT_KEEP_ALL},
        {24, 8, RETROFIT_KEEP_ALL}, {8, 8, RETROFIT_KEEP_INPUTS},
    };
    set_optimizer(model, run.kind);
    for (size_t i = miniature ? 2 : 0; i < 5; i++) {
        run.n = miniature ? 1 : full[i].n;
        run.k = miniature ? 2 : full[i].k;
        run.keep = full[i].keep;
        measure_steps(model, &run);
    }
}

enum { MAX_DRAWS = 16 };
typedef struct {
    size_t count, n[MAX_DRAWS], k[MAX_DRAWS], deepest; // deepest: the largest k
    double flops; // of all steps
    char list[256];
} draws;

// The depths of a training like the paper's with R = 8, but of 16 steps of one micro-batch.
static draws draw_depths(const retrofit_config *config) {
    draws d = {.count = miniature ? 3 : MAX_DRAWS};
    retrofit_training training = retrofit_paper_training;
    training.steps = d.count;
    training.accumulate = 1;
    training.mean_recurrence = 8;
    for (size_t i = 0; i < d.count; i++) {
        retrofit_plan plan = retrofit_plan_step(&training, config, i);
        retrofit_plan_draw(&training, &plan, i, 0, &d.n[i], &d.k[i]);
        size_t used = strlen(d.list), n = d.n[i], k = d.k[i];
        snprintf(d.list + used, sizeof d.list - used, " %zu,%zu", n, k);
        d.deepest = retrofit_max(d.deepest, k);
        d.flops += (double)sizes['N'] *
                   retrofit_flops_per_token(config, RETROFIT_TRAINING, sizes['T'], n, k);
    }
    return d;
}

// Steps whose depths are drawn, by the wall time of all of them: whoever compiles anew for a depth
// pays for it there (pytorch_peer.py --draw).
static void train_with_draws(retrofit_model *model, size_t before) {
    size_t B = sizes['B'], T = sizes['T'];
    const retrofit_config *config = &model->config;
    retrofit_optimizer optimizer = optimizer_of(RETROFIT_ADAMW);
    draws d = draw_depths(config);
    set_optimizer(model, RETROFIT_ADAMW);
    size_t bytes = retrofit_buffers_bytes(config, device, B, T, d.deepest, RETROFIT_KEEP_ALL);
    if (!fits("AdamW, drawn depths,", bytes)) return;
    retrofit_buffers *buffers = new_buffers(model, B, T, d.deepest, RETROFIT_KEEP_ALL, NULL);
    int32_t *tokens = random_integers(B * T + 1, 0, sizes['V']);
    double start = 0;
    for (size_t i = 0; i < 1 + d.count; i++) { // the first step warms up
        size_t which = i ? i - 1 : 0;
        if (i == 1) {
            wait_for_device(buffers->losses);
            start = retrofit_seconds();
        }
        pass(buffers, tokens, d.n[which], d.k[which]);
        retrofit_optimizer_step(model, &optimizer, i + 1);
        retrofit_zero_grad(model);
    }
    wait_for_device(buffers->losses);
    double seconds = retrofit_seconds() - start, flops = d.flops / seconds;
    print_line("Depths drawn, (n,k) =%s: AdamW, %zu steps in %.2f s, %.0f tokens/s, %.1f TFLOP/s, "
               "%s of peak, %.2f GB used",
               d.list, d.count, seconds, (double)(d.count * B * T) / seconds, flops / 1e12,
               share(flops, device->peak_flops()), (double)(before - device->free_memory()) / 1e9);
    free(tokens);
    retrofit_buffers_free(buffers);
}

static retrofit_model *full_model(void) {
    return miniature ? new_model(1, 2, 1) : new_model(4, 8, 4);
}

static void training(void) {
    retrofit_model *model = full_model();
    const retrofit_config *c = &model->config;
    size_t before = device->free_memory(), weights, gradients, adamw, muon;
    retrofit_training_bytes(model, RETROFIT_TRAINING, RETROFIT_ADAMW, &weights, &gradients, &adamw);
    retrofit_training_bytes(model, RETROFIT_TRAINING, RETROFIT_MUON, &weights, &gradients, &muon);
    print_line(
        "## Training: %zu-%zu-%zu layers, %.3fG parameters, micro-batches of %zu x %zu tokens",
        c->prelude, c->core, c->coda, (double)model->weight_count / 1e9, sizes['B'], sizes['T']);
    if (fits("The model", weights + gradients + adamw)) {
        training_run run = {.before = before};
        allocate_model(model, RETROFIT_TRAINING);
        print_head("optimizer|(n,k) |kept  | tokens/s| TFLOP/s| of peak| of product| pass, ms| "
                   "optimizer, ms| GB predicted| GB used");
        run.kind = RETROFIT_ADAMW;
        run.fixed = weights + gradients + adamw;
        train_with(model, run);
        run.kind = RETROFIT_MUON;
        run.fixed = weights + gradients + muon;
        train_with(model, run);
        train_with_draws(model, run.before);
    }
    retrofit_free(model);
}

// ---- Decoding ----------------------------------------------------------------------------------

// Bytes of weights that a token reads with r recurrences: matrices in bf16, norms in fp32.
static double weight_bytes(const retrofit_config *c, size_t r) {
    double d = (double)c->n_embd;
    double layer = 2 * d * (retrofit_qkv_width(c) + d + 3.0 * c->intermediate) + 8 * d;
    double adapter_half = 2 * d * d, head = 2 * d * c->vocab + 8 * d;
    double recurrence = c->core * layer + adapter_half;
    return (c->prelude + c->coda) * layer + r * recurrence + adapter_half + head;
}

static const float *next_logits(retrofit_buffers *buffers, const int32_t *tokens, size_t count,
                                const retrofit_recurrence_options *options) {
    const float *logits = retrofit_next_logits(buffers, tokens, 1, count, NULL, options);
    if (!logits) fail("decoding");
    return logits;
}

// Seconds a token, of `count` that follow a prompt. launches: of the first of them, which is not
// replayed from a recording.
static double seconds_per_token(retrofit_buffers *buffers, const int32_t *prompt,
                                size_t prompt_count, size_t count, size_t r, size_t *launches) {
    enum { WARM_UP = 3 }; // tokens: they prepare, record and replay a step
    retrofit_recurrence_options options = {.recurrences = r};
    double start = 0;
    retrofit_clear_cache(buffers);
    const float *logits = next_logits(buffers, prompt, prompt_count, &options);
    for (size_t i = 0; i < WARM_UP + count; i++) {
        if (i == WARM_UP) start = retrofit_seconds();
        int32_t token = retrofit_argmax(logits, buffers->model->config.vocab); // as infer does
        size_t before = retrofit_cuda_launches;
        logits = next_logits(buffers, &token, 1, &options);
        if (i == 0) *launches = retrofit_cuda_launches - before;
    }
    return (retrofit_seconds() - start) / (double)count;
}

// Seconds of a pass over the core with the tokens of `front` under way, and of reading them off
// besides. Every row is a text of its own, since what random weights propose is never right.
static double pass_seconds_of(retrofit_front *front, double *reading) {
    retrofit_buffers *buffers = front->buffers;
    size_t r = front->options.recurrences, timed = r - 4;
    static retrofit_sampling greedy = {.top_p = 1};
    double start = 0, pass = 0;
    retrofit_clear_cache(buffers);
    for (size_t row = 0; row < buffers->B; row++) {
        if (!retrofit_front_begin(front, row, (int32_t)row, 4, &greedy)) fail("a front");
    }
    for (size_t i = 0; i < 3 * r; i++) { // of three tokens; parts are recorded the second time
        bool begins = i == 2 * r + 3, reads = i == 3 * r - 1;
        if (begins || reads) {
            wait_for_device(buffers->decoder->drafted);
            double now = retrofit_seconds();
            if (reads) pass = (now - start) / (double)timed;
            start = now;
        }
        retrofit_front_advance(front);
    }
    wait_for_device(buffers->decoder->drafted);
    *reading = fmax(0, retrofit_seconds() - start - pass);
    return pass;
}

// What drafts through the depths cost, and what they would give in one text if every proposal were
// right: with n tokens under way, a token takes r/n passes and a reading of two.
static void drafts(retrofit_model *model) {
    static const size_t rows[] = {1, 2, 4, 8, 16, 32};
    size_t count = miniature ? 3 : 6, r = miniature ? 8 : 32;
    const retrofit_config *c = &model->config;
    double core = weight_bytes(c, 2) - weight_bytes(c, 1);
    print_line("## Drafts: passes over the core with n tokens under way, r = %zu", r);
    print_head("    n| ms/pass|    GB/s| of copy| ms/reading| tokens/s at best");
    for (size_t i = 0; i < count; i++) {
        size_t n = rows[i];
        retrofit_recurrence_options options = {.recurrences = r};
        retrofit_kv_cache cache = {.capacity = 8, .recurrences = r};
        retrofit_buffers *buffers = new_buffers(model, n, 1, 0, RETROFIT_KEEP_NOTHING, &cache);
        retrofit_front *front = retrofit_front_new(buffers, &options, r, 0, c->vocab, NULL);
        double reading, pass = pass_seconds_of(need(front, "a front"), &reading);
        double token = pass * (double)r / (double)n + reading;
        print_row("%zu|%.3f|%.0f|%.3f|%.3f|%.0f", n, 1e3 * pass, core / pass / 1e9,
                  core / pass / copy_limit, 1e3 * reading, 1 / token);
        retrofit_front_free(front);
        retrofit_buffers_free(buffers);
    }
}

static void decoding(void) {
    static const size_t recurrences[] = {1, 4, 8, 32};
    size_t prompt_count = miniature ? 16 : 128, count = miniature ? 4 : 64;
    size_t rounds = miniature ? 1 : 3, depths = miniature ? 2 : 4, weights, unused[2];
    retrofit_model *model = full_model();
    const retrofit_config *c = &model->config;
    retrofit_training_bytes(model, RETROFIT_TRAINING, RETROFIT_ADAMW, &weights, &unused[0],
                            &unused[1]);
    print_line("## Decoding: %zu tokens, one at a time, after a prompt of %zu, weights in bf16",
               count, prompt_count);
    if (fits("The model", weights)) {
        retrofit_kv_cache cache = {.capacity = prompt_count + count + 3,
                                   .recurrences = recurrences[depths - 1]};
        allocate_model(model, RETROFIT_INFERENCE);
        fill_model(model);
        retrofit_buffers *buffers =
            new_buffers(model, 1, prompt_count, 0, RETROFIT_KEEP_NOTHING, &cache);
        int32_t *prompt = random_integers(prompt_count, 0, c->vocab);
        print_head("    r| tokens/s| ms/token| GB/token|    GB/s| of copy| launches");
        for (size_t i = 0; i < depths; i++) {
            size_t r = recurrences[i], launches[3];
            double times[3];
            for (size_t j = 0; j < rounds; j++)
                times[j] =
                    seconds_per_token(buffers, prompt, prompt_count, count, r, &launches[j]);
            double seconds = median(times, rounds), bytes = weight_bytes(c, r);
            print_row("%zu|%.1f|%.3f|%.4f|%.0f|%.3f|%zu", r, 1 / seconds, 1e3 * seconds,
                      bytes / 1e9, bytes / seconds / 1e9, bytes / seconds / copy_limit,
                      launches[0]);
        }
        print_line("GB: of weights; the KV cache is not counted. launches: kernels a token takes.");
        free(prompt);
        retrofit_buffers_free(buffers);
        drafts(model);
    }
    retrofit_free(model);
}

// ---- The program -------------------------------------------------------------------------------

static const retrofit_option options[] = {
    {"miniature", RETROFIT_FLAG, &miniature, NULL,
     "tiny sizes: does it all run? Times mean nothing"},
    {"only", RETROFIT_STRING, &only, "TEXT",
     "operations and shapes, or determinism, training, decoding, with TEXT in their names"},
    {"brief", RETROFIT_FLAG, &brief, NULL, "operations: a fifth of the time for each measurement"},
    {"fp32", RETROFIT_FLAG, &fp32, NULL, "the operations of retrofit_cuda_fp32, and no more"},
    {"markdown", RETROFIT_STRING, &markdown_path, "FILE",
     "the tables there too, for doc/results.md"},
    {"commit", RETROFIT_STRING, &commit, "TEXT", "the version that is measured"},
};

// Returns the exit code.
static int finish(void) {
    print_line(
        "%zu faults: errors above twice what roundings explain, runs that differ, losses that "
        "are no numbers",
        faults);
    bool written = !markdown || !ferror(markdown);
    if (markdown && fclose(markdown)) written = false;
    if (!written) fprintf(stderr, "bench_cuda: %s: writing failed\n", markdown_path);
    return faults > 0 || !written;
}

int main(int argc, char **argv) {
    int code = retrofit_options(argc, argv, options, sizeof options / sizeof *options,
                                "bench_cuda [OPTIONS]: the GPU beside its limits\n", NULL, NULL);
    if (code >= 0) return code;
    char name[256], day[32];
    time_t now = time(NULL);
    strftime(day, sizeof day, "%Y-%m-%d", localtime(&now));
    device = retrofit_device(RETROFIT_ON_CUDA, fp32, name);
    if (!device) fail("start");
    if (markdown_path) {
        markdown = fopen(markdown_path, "we");
        if (!markdown) {
            perror(markdown_path);
            return 1;
        }
    }
    print_line("%s, %s, commit %s%s", name, day, commit,
               miniature ? ", in miniature: times mean nothing" : "");
    set_sizes();
    fill_pool();
    limits();
    all_operations();
    if (!fp32 && strstr("determinism", only)) determinism();
    if (!fp32 && strstr("training", only)) training();
    if (!fp32 && strstr("decoding", only)) decoding();
    return finish();
}

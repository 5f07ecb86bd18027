// What a layer moves through the GPU's memory, operation by operation: counted over the emulator,
// where each byte counts once a kernel, and compared with what the operation's shapes ask for. Then
// the same for TinyLlama in kilobytes a token, beside the least: what products and attention must
// move if all else were done while they load and store. doc/gpu.md has the table.
#include "test.h"

extern size_t emulator_bytes_read, emulator_bytes_written; // test/emulator.h

typedef struct {
    const char *name;
    double read, written; // bytes, as the shapes ask for
    double least;         // of both
    size_t was_read, was_written;
} row;

enum { MAX_ROWS = 32 };
static row rows[MAX_ROWS];
static size_t row_count, forward_count;
static const retrofit_ops *device = &retrofit_cuda;

static void *allocate(size_t bytes) {
    void *p = device->alloc(bytes);
    need(p != NULL, "memory of the emulated GPU");
    return p;
}

static void wait_for_device(const void *p) {
    char byte;
    device->download(&byte, p, 1);
}

static void note(const char *name, double read, double written, double least) {
    need(row_count < MAX_ROWS, "rows");
    rows[row_count++] = (row){.name = name, .read = read, .written = written, .least = least};
}

// Does an operation, and writes what it moved to the row noted last.
#define COUNT(...)                                                                \
    if (counted) {                                                                \
        size_t bytes_read = emulator_bytes_read;                                  \
        size_t bytes_written = emulator_bytes_written;                            \
        device->__VA_ARGS__;                                                      \
        wait_for_device(rstd);                                                    \
        rows[row_count - 1].was_read = emulator_bytes_read - bytes_read;          \
        rows[row_count - 1].was_written = emulator_bytes_written - bytes_written; \
    }

// ---- Sizes and arrays, by the letters of retrofit.h ---------------------------------------------
// Rows, tokens of each, heads, key/value heads, their size, the MLP's width; B·T, H·h, qkv's width.
static size_t B, T, H, G, h, F, N, d, Q;
static double Nd, NF, NQ, NH, dd, dF, dQ; // products of two
static double turned;                     // numbers that RoPE turns
static double table_bytes, rstd_bytes, norm_bytes;
static double sum_bytes; // of the gradient of a norm's weight, of the blocks that share the rows

static bool counted; // operations are done, not only noted
static float *x, *dx, *weight, *gradient, *rstd, *lse, *delta, *table;
static act *branch, *branch_2, *qkv, *dqkv, *gate_up, *dgate_up, *swiglu, *dswiglu;
static retrofit_weight w, w_down; // of d and of F columns, in the same place

static void set_sizes(size_t rows_of_tokens, size_t tokens, size_t heads, size_t kv_heads,
                      size_t head_dim, size_t intermediate) {
    B = rows_of_tokens;
    T = tokens;
    H = heads;
    G = kv_heads;
    h = head_dim;
    F = intermediate;
    N = B * T;
    d = H * h;
    Q = (H + 2 * G) * h;
    Nd = (double)(N * d);
    NF = (double)(N * F);
    NQ = (double)(N * Q);
    NH = (double)(N * H);
    dd = (double)(d * d);
    dF = (double)(d * F);
    dQ = (double)(d * Q);
    turned = (double)(N * (H + G) * h);
    table_bytes = (double)(T * h * sizeof(float));
    rstd_bytes = (double)(N * sizeof(float));
    norm_bytes = (double)(d * sizeof(float));
    sum_bytes = (double)(retrofit_min(N, 1024) * d * sizeof(float));
}

static void allocate_arrays(void) {
    x = allocate(N * d * sizeof(float));
    dx = allocate(N * d * sizeof(float));
    weight = allocate(d * sizeof(float));
    gradient = allocate(2 * d * F * sizeof(float));
    rstd = allocate(N * sizeof(float));
    lse = allocate(N * H * sizeof(float));
    delta = allocate(N * H * sizeof(float));
    table = allocate(T * h * sizeof(float));
    branch = allocate(2 * N * d);
    branch_2 = allocate(2 * N * d);
    qkv = allocate(2 * N * Q);
    dqkv = allocate(2 * N * Q);
    gate_up = allocate(4 * N * F);
    dgate_up = allocate(4 * N * F);
    swiglu = allocate(2 * N * F);
    dswiglu = allocate(2 * N * F);
    w = (retrofit_weight){allocate(4 * d * F), device->act_type, d};
    w_down = (retrofit_weight){w.data, w.type, F};
}

// ---- A layer (section 4): n numbers in bf16 are 2·n bytes, in fp32 4·n --------------------------

static void note_norm(const char *name) {
    note(name, 4 * Nd + norm_bytes, 2 * Nd + rstd_bytes, norm_bytes + rstd_bytes);
    COUNT(rmsnorm_forward(branch, rstd, x, weight, N, d, 1e-5f));
}

static void note_forward(void) {
    note_norm("norm");
    note("q, k, v", 2 * Nd + 2 * dQ, 2 * NQ, 4 * Nd + 2 * dQ + 2 * NQ);
    COUNT(matmul_forward(qkv, branch, w, N, d, Q));
    note("RoPE", 2 * turned + table_bytes, 2 * turned, table_bytes);
    COUNT(rope_forward(qkv, table, NULL, B, T, H, G, h));
    note("attention", 2 * NQ, 2 * Nd + 4 * NH, 2 * NQ + 2 * Nd + 4 * NH);
    COUNT(attention_forward(branch, lse, qkv, B, T, H, G, h));
    note("output, + x", 6 * Nd + 2 * dd, 4 * Nd, 10 * Nd + 2 * dd);
    COUNT(matmul_residual_forward(dx, x, branch, w, N, d, d));
    note_norm("norm");
    note("gate and up", 2 * Nd + 4 * dF, 4 * NF, 4 * Nd + 4 * dF + 6 * NF);
    COUNT(matmul_forward(gate_up, branch, w, N, d, 2 * F));
    note("SwiGLU", 4 * NF, 2 * NF, 0);
    COUNT(swiglu_forward(swiglu, gate_up, N, F));
    note("down, + x", 2 * NF + 2 * dF + 4 * Nd, 4 * Nd, 2 * NF + 2 * dF + 8 * Nd);
    COUNT(matmul_residual_forward(dx, x, swiglu, w_down, N, F, d));
    forward_count = row_count;
}

// What the norm's gradient writes could be the next product's input at once: the least of a cast.
static void note_cast(void) {
    note("cast", 4 * Nd, 2 * Nd, 2 * Nd);
    COUNT(cast(branch, dx, N * d));
}

static void note_norm_backward(void) {
    double read = 10 * Nd + rstd_bytes + 2 * norm_bytes + sum_bytes;
    double written = 4 * Nd + norm_bytes + sum_bytes;
    note("norm, backward", read, written, read + written);
    COUNT(rmsnorm_backward(dx, gradient, branch, x, rstd, weight, N, d));
}

static void note_mlp_backward(void) {
    note_cast();
    note("down, backward", 2 * Nd + 2 * dF, 2 * NF, 2 * Nd + 2 * dF + 10 * NF);
    COUNT(matmul_backward_input(dswiglu, branch, w_down, N, F, d));
    note("SwiGLU, backward", 6 * NF, 6 * NF, 0);
    COUNT(swiglu_backward(dgate_up, swiglu, dswiglu, gate_up, N, F));
    note("down's weights", 2 * Nd + 2 * NF + 4 * dF, 4 * dF, 2 * Nd + 2 * NF + 8 * dF);
    COUNT(matmul_backward_weight(gradient, F, branch, swiglu, N, F, d));
    note_norm("norm, again");
    note("gate's and up's weights", 2 * Nd + 4 * NF + 8 * dF, 8 * dF, 4 * Nd + 4 * NF + 16 * dF);
    COUNT(matmul_backward_weight(gradient, d, dgate_up, branch, N, d, 2 * F));
    note("gate and up, backward", 4 * NF + 4 * dF, 2 * Nd, 2 * Nd + 4 * NF + 4 * dF);
    COUNT(matmul_backward_input(branch, dgate_up, w, N, d, 2 * F));
    note_norm_backward();
}

static void note_attention_backward(void) {
    note_cast();
    note("output's weights", 4 * Nd + 4 * dd, 4 * dd, 4 * Nd + 8 * dd);
    COUNT(matmul_backward_weight(gradient, d, branch, branch_2, N, d, d));
    note("output, backward", 2 * Nd + 2 * dd, 2 * Nd, 4 * Nd + 2 * dd);
    COUNT(matmul_backward_input(branch_2, branch, w, N, d, d));
    // Three kernels: delta from dout and out; dK and dV; dQ. The latter two read all but out.
    note("attention, backward", 8 * Nd + 4 * NQ + 16 * NH, 2 * NQ + 4 * NH,
         4 * Nd + 4 * NQ + 4 * NH);
    COUNT(attention_backward(dqkv, delta, branch, qkv, branch_2, lse, B, T, H, G, h));
    note("RoPE, backward", 2 * turned + table_bytes, 2 * turned, table_bytes);
    COUNT(rope_backward(dqkv, table, B, T, H, G, h));
    note_norm("norm, again");
    note("q's, k's, v's weights", 2 * Nd + 2 * NQ + 4 * dQ, 4 * dQ, 4 * Nd + 2 * NQ + 8 * dQ);
    COUNT(matmul_backward_weight(gradient, d, dqkv, branch, N, d, Q));
    note("q, k, v, backward", 2 * NQ + 2 * dQ, 2 * Nd, 2 * Nd + 2 * NQ + 2 * dQ);
    COUNT(matmul_backward_input(branch, dqkv, w, N, d, Q));
    note_norm_backward();
}

static void note_layer(void) {
    row_count = 0;
    note_forward();
    note_mlp_backward();
    note_attention_backward();
}

// ---- The table, in Markdown ---------------------------------------------------------------------

static void print_sum(const char *name, size_t from, size_t to) {
    double read = 0, written = 0, least = 0, thousands = (double)N * 1e3;
    for (size_t i = from; i < to; i++) {
        read += rows[i].read;
        written += rows[i].written;
        least += rows[i].least;
    }
    printf("| **%s** | **%.1f** | **%.1f** | **%.1f** | **%.2f** |\n", name, read / thousands,
           written / thousands, least / thousands, (read + written) / least);
}

static void print_table(void) {
    double thousands = (double)N * 1e3;
    puts("| kB a token | read | written | the least of both | times |\n|---|---|---|---|---|");
    for (size_t i = 0; i < row_count; i++) {
        const row *r = &rows[i];
        printf("| %s | %.1f | %.1f | %.1f | |\n", r->name, r->read / thousands,
               r->written / thousands, r->least / thousands);
        if (i + 1 == forward_count) print_sum("forward", 0, forward_count);
    }
    print_sum("backward", forward_count, row_count);
    print_sum("all", 0, row_count);
}

int main(void) {
    char text[256];
    need(device->start(text), "the emulated GPU");
    set_sizes(2, 128, 2, 1, 64, 192);
    allocate_arrays();
    counted = true;
    note_layer();
    for (size_t i = 0; i < row_count; i++) {
        const row *r = &rows[i];
        check((double)r->was_read == r->read, "%s: reads %zu bytes, its shapes ask for %.0f",
              r->name, r->was_read, r->read);
        check((double)r->was_written == r->written, "%s: writes %zu bytes, its shapes ask for %.0f",
              r->name, r->was_written, r->written);
    }
    counted = false;
    set_sizes(8, 1024, 32, 4, 64, 5632); // TinyLlama
    note_layer();
    print_table();
    return finish("bytes moved");
}

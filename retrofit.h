/* retrofit.h - Teaching Pretrained Language Models to Think Deeper with Retrofitted Recurrence, in one header.

   The method of McLeish et al. (arXiv 2511.07384): a pretrained Llama is cut into three parts, and a small new matrix, the
   adapter, feeds the middle part its own output r times. A short training teaches the model to use that loop; from then on
   it thinks deeper the more recurrences it is given.

       tokens ── wte ── prelude ── e ─────────────┬─────────────┬─ … ─────────┐
                       P blocks    │              │             │             │
                                   ▼              ▼             ▼             ▼
              s_0 ~ N(0, σ²) ── adapter ─ core ─ adapter ─ core ─ … ─ adapter ─ core ── s_r ── coda ── RMSNorm ── lm_head ── logits
                                      C blocks                                                D blocks
                               └──────────────────── r recurrences, the same weights ───┘

       e    = prelude(wte[tokens])
       s_0  ~ normal cut at ±3σ, or zero
       s_i  = core(A·concat(s_{i-1}, e)),  A·concat(s, e) = A_s·s + A_e·e                 i = 1..r = n + k
       loss = cross_entropy(lm_head·RMSNorm(coda(s_r)), labels)

   Training draws r anew for every micro-batch from a Poisson around a log-normal rate whose mean grows by a curriculum. The
   first n recurrences run without storing anything; gradients flow back through the last k only (truncated backpropagation).

   Shape letters, used in every comment:
       B sequences   T tokens in each   N = B·T      d = n_embd       H query heads, G key/value heads, h = d/H their size
       Q = (H+2G)·h  F = intermediate   V vocabulary                  P, C, D layers in prelude, core, coda

   Usage: in ONE C or C++ file
       #define RETROFIT_IMPLEMENTATION
       #include "retrofit.h"
   and plain #include "retrofit.h" elsewhere. Compile with -fopenmp for threads, -march=native for the fast kernels, link with -lm.
   Functions that can fail return false or NULL; retrofit_error() then says what was wrong, where, and what to do.

   Contents                                              Where the paper's equations are
       1  declarations: config, parameters, operations       e = prelude(wte[x])              retrofit_prelude
       2  memory, files, errors, random numbers              s_i = core(A·concat(s, e))       retrofit_recur
       3  JSON, safetensors                                  logits                           retrofit_coda, retrofit_logits
       4  tokenizer                                          loss and its gradient            retrofit_loss, retrofit_backward
       5  operations on the CPU, forward beside backward     x += proj(attn(RMSNorm x)) ...   block_forward, block_backward
       6  block, model: forward and backward                 r ~ Poisson(LogNormal) + 1       retrofit_draw_recurrences
       7  recurrence sampler, curriculum, learning rate      r̄(t), curriculum                 retrofit_curriculum
       8  optimizers: AdamW, Muon; clipping                  AdamW, Muon                      retrofit_optimizer_step
       9  decoding with a KV cache, sampling                 next token                       retrofit_feed, retrofit_sample
      10  checkpoints, token shards                          surgery                          convert.c

   License: MIT. */
#ifndef RETROFIT_H
#define RETROFIT_H

#if defined RETROFIT_IMPLEMENTATION && !defined _GNU_SOURCE
#define _GNU_SOURCE // mmap, glob, fsync, open_memstream: include this header before any other where it is implemented
#endif
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

// =====================================================================================================================
// 1  Declarations
// =====================================================================================================================

// The last failure of this thread, one line without a newline: what was wrong, where, what to do.
const char *retrofit_error(void);
// directory/name into path; false + error if it is too long.
#define RETROFIT_PATH 4096
bool retrofit_path(char path[RETROFIT_PATH], const char *directory, const char *name);

// Element types of tensors. Files may hold any of them; operations read weights in F32 or BF16.
typedef enum { RETROFIT_F32, RETROFIT_BF16, RETROFIT_F16, RETROFIT_I32 } retrofit_type;
size_t retrofit_type_size(retrofit_type type); // bytes of one element

// ---- Configuration: what config.json says -------------------------------------------------------------------------
typedef struct {
    size_t n_embd, n_heads, n_kv_heads, head_dim;  // d, H, G, h
    size_t intermediate, vocab, context;           // F, V, longest sequence
    size_t prelude, core, coda;                    // P, C, D; a plain Llama has P = C = 0 and all its layers in the coda
    float norm_eps;
    double rope_theta;
    bool rope_llama3;                              // Llama-3.2's rescaled frequencies, with the four numbers below
    double rope_factor, rope_low, rope_high, rope_original_context;
    float state_std;                               // σ of s_0
    size_t mean_recurrence, backprop_depth;        // what the model was trained for: defaults for train and infer
    bool tied;                                     // plain only: the file has no lm_head.weight of its own
    int32_t bos, eos;                              // token ids, -1 if the config has none
} retrofit_config;

#define RETROFIT_STATE_STD 0.008703882797784892 // sqrt(2 / (5 * 5280)): Huginn's constant, kept by the paper for every model

bool retrofit_is_plain(const retrofit_config *c);                        // no core: a plain Llama
bool retrofit_config_check(const retrofit_config *c, const char *where); // false + error if the numbers make no model
bool retrofit_config_read(retrofit_config *c, const char *directory);    // DIR/config.json: model_type huginn_raven or llama
bool retrofit_config_write(const retrofit_config *c, retrofit_type type, const char *directory); // type: of the tensors beside it
size_t retrofit_qkv_width(const retrofit_config *c);                     // Q = (H + 2G)·h

typedef void act; // an element of a branch activation: fp32 or bf16, as the operations' table says

// ---- Parameters ------------------------------------------------------------------------------------------------------
// A matrix as the operations read it: element (i, j) is data[i*stride + j].
typedef struct {
    const void *data;
    retrofit_type type; // F32 or BF16
    size_t stride;
} retrofit_weight;

typedef enum { RETROFIT_EMBEDDING, RETROFIT_HEAD, RETROFIT_NORM, RETROFIT_MATRIX } retrofit_kind;
typedef enum { RETROFIT_PART_EMBEDDING, RETROFIT_PART_PRELUDE, RETROFIT_PART_ADAPTER, RETROFIT_PART_CORE, RETROFIT_PART_CODA,
               RETROFIT_PART_NORM, RETROFIT_PART_HEAD, RETROFIT_PARTS } retrofit_part;

// One tensor of a checkpoint. A plain Llama stores q, k, v and gate, up apart: its fused parameters are made of several.
typedef struct {
    char name[88];
    size_t rows;
} retrofit_piece;

typedef struct {
    retrofit_piece piece[3]; // piece[0].name labels the parameter
    size_t pieces, rows, cols;
    retrofit_kind kind;
    retrofit_part part;
    retrofit_weight weight;       // (rows, cols), what the operations read
    float *master, *grad, *m, *v; // (rows, cols), training only: fp32 weight, gradient, first and second moment
} retrofit_parameter;

typedef struct {
    retrofit_parameter norm_1;   // (d)
    retrofit_parameter wqkv;     // (Q, d)    rows q, then k, then v
    retrofit_parameter proj;     // (d, d)
    retrofit_parameter norm_2;   // (d)
    retrofit_parameter fc;       // (2F, d)   rows gate, then up
    retrofit_parameter mlp_proj; // (d, F)
} retrofit_layer;

typedef struct retrofit_ops retrofit_ops;

typedef struct {
    retrofit_config config;
    const retrofit_ops *ops;            // where the model lives
    retrofit_parameter wte;             // (V, d)
    retrofit_layer *prelude;            // [P]
    retrofit_parameter adapter;         // (d, 2d) = [A_s | A_e]; absent from a plain Llama
    retrofit_layer *core;               // [C]
    retrofit_layer *coda;               // [D]
    retrofit_parameter ln_f;            // (d)
    retrofit_parameter lm_head;         // (V, d)
    retrofit_parameter **parameters;    // the one list of all of them, in the order above
    size_t parameter_count, weight_count; // entries of that list; numbers in them
    void *weights, *masters, *grads, *moments; // arenas; what is unused is NULL
    size_t grad_bytes, moment_bytes;
    float *muon_u;                      // Newton-Schulz scratch for the largest matrix, in the moments' arena
    act *muon_x, *muon_y, *muon_a, *muon_b;
    struct retrofit_map *maps;          // files the weights lie in (inference)
    size_t map_count;
} retrofit_model;

// ---- Operations ------------------------------------------------------------------------------------------------------
// The model is written once, over this table; retrofit_cpu is below, retrofit_cuda.cu holds the same rows for a GPU.
// One contract for all: outputs, inputs, sizes, in this order. Gradients of parameters add (+=); gradients of activations are
// set (=), except rmsnorm_backward's dx, the residual stream's, which adds. Nothing allocates. Every reduction has a fixed
// order, so a run repeats bit for bit. `act` is the table's type for branch activations (act_type): norm outputs, qkv,
// attention, fc, swiglu and their gradients. The residual stream, states, parameters and their gradients are fp32.
//   embedding_forward      x (N,d) = wte[tokens];                          backward: dwte[tokens] += dx
//   rmsnorm_forward        out (N,d) = x·rstd·weight, rstd (N) = 1/sqrt(mean(x²) + eps); backward: dx +=, dweight +=
//   matmul_forward         out (N,O) = inp (N,I) · wᵀ, w (O,I)
//   matmul_residual_forward  out = residual + inp · wᵀ in fp32; residual may be NULL (zero) or out itself
//   matmul_backward_input  dinp (N,I) = dout (N,O) · w;  matmul_residual_backward_input: the same into fp32
//   matmul_backward_weight dw (O,I; rows `stride` apart) += doutᵀ · inp
//   rope_forward           rotates q and k of qkv (N,Q) in place by the table (positions, h/2, {cos, sin}); row b starts at
//                          position past[b], or 0 if past is NULL;         backward: rotates dqkv back
//   attention_forward      out (N,d), lse (N,H) = causal grouped-query attention over qkv; backward: dqkv (N,Q)
//   swiglu_forward         out (N,F) = silu(gate)·up, fc (N,2F) = gate | up; backward: dfc (N,2F)
//   cross_entropy          losses (N) = -log softmax(logits)[label], 0 where label is -100; if scale is not 0 the logits are
//                          replaced by their gradient, scale·(softmax - onehot)
//   cast, add              out = (act) x; x += y
//   state_init             s (B,T,d) ~ N(0, sigma²) cut at ±3 sigma, a function of (seed, b, past[b] + t, column) alone
//   kv_store               writes k and v of qkv to keys, values (B,capacity,G·h) at positions past[b] + t
//   attention_cached       out (N,d): T new queries per row against positions 0 .. past[b]+t of the cache
//   sum_squares            returns Σ x² (summed in double)
//   adamw_update           w, m, v from g·scale; bias1/2 = 1 - beta^t
//   muon_momentum          m = lerp(m, scale·g, 1-momentum); u = lerp(scale·g, m, momentum)
//   muon_load              x = scale·u as act, transposed if rows > cols: (min, max)
//   axpby                  y = a·x + b·y
//   muon_update            w = w·(1 - lr·decay) - lr·scale·x, x as muon_load laid it out
#define RETROFIT_OPS(X)                                                                                                                    \
    X(void, embedding_forward, (float *x, const int32_t *tokens, retrofit_weight wte, size_t N, size_t d))                                 \
    X(void, embedding_backward, (float *dwte, const int32_t *tokens, const float *dx, size_t N, size_t d))                                 \
    X(void, rmsnorm_forward, (act * out, float *rstd, const float *x, const float *weight, size_t N, size_t d, float eps))                 \
    X(void, rmsnorm_backward,                                                                                                              \
      (float *dx, float *dweight, const act *dout, const float *x, const float *rstd, const float *weight, size_t N, size_t d))            \
    X(void, matmul_forward, (act * out, const act *inp, retrofit_weight w, size_t N, size_t I, size_t O))                                  \
    X(void, matmul_residual_forward,                                                                                                       \
      (float *out, const float *residual, const act *inp, retrofit_weight w, size_t N, size_t I, size_t O))                                \
    X(void, matmul_backward_input, (act * dinp, const act *dout, retrofit_weight w, size_t N, size_t I, size_t O))                         \
    X(void, matmul_residual_backward_input, (float *dinp, const act *dout, retrofit_weight w, size_t N, size_t I, size_t O))               \
    X(void, matmul_backward_weight, (float *dw, size_t stride, const act *dout, const act *inp, size_t N, size_t I, size_t O))             \
    X(void, rope_forward, (act * qkv, const float *table, const int32_t *past, size_t B, size_t T, size_t H, size_t G, size_t h))          \
    X(void, rope_backward, (act * dqkv, const float *table, size_t B, size_t T, size_t H, size_t G, size_t h))                             \
    X(void, attention_forward, (act * out, float *lse, const act *qkv, size_t B, size_t T, size_t H, size_t G, size_t h))                  \
    X(void, attention_backward,                                                                                                            \
      (act * dqkv, const act *dout, const act *qkv, const act *out, const float *lse, size_t B, size_t T, size_t H, size_t G, size_t h))   \
    X(void, swiglu_forward, (act * out, const act *fc, size_t N, size_t F))                                                                \
    X(void, swiglu_backward, (act * dfc, const act *dout, const act *fc, size_t N, size_t F))                                              \
    X(void, cross_entropy, (float *losses, act *logits, const int32_t *labels, size_t N, size_t V, float scale))                           \
    X(void, cast, (act * out, const float *x, size_t n))                                                                                   \
    X(void, add, (float *x, const float *y, size_t n))                                                                                     \
    X(void, state_init, (float *s, const int32_t *past, size_t B, size_t T, size_t d, float sigma, uint64_t seed))                         \
    X(void, kv_store,                                                                                                                      \
      (act * keys, act * values, const act *qkv, const int32_t *past, size_t B, size_t T, size_t capacity, size_t H, size_t G, size_t h))  \
    X(void, attention_cached,                                                                                                              \
      (act * out, const act *qkv, const act *keys, const act *values, const int32_t *past, size_t B, size_t T, size_t capacity, size_t H,  \
       size_t G, size_t h))                                                                                                                \
    X(double, sum_squares, (const float *x, size_t n))                                                                                     \
    X(void, adamw_update,                                                                                                                  \
      (float *w, float *m, float *v, const float *g, size_t n, float scale, float lr, float beta1, float beta2, double bias1,              \
       double bias2, float eps, float decay))                                                                                              \
    X(void, muon_momentum, (float *u, float *m, const float *g, size_t n, float scale, float momentum))                                    \
    X(void, muon_load, (act * x, const float *u, size_t rows, size_t cols, float scale))                                                   \
    X(void, axpby, (act * y, const act *x, size_t n, float a, float b))                                                                    \
    X(void, muon_update, (float *w, const act *x, size_t rows, size_t cols, float lr, float scale, float decay))

struct retrofit_ops {
    const char *name;       // "cpu", "cuda", "cuda-fp32"
    retrofit_type act_type; // of `act`; also the type matrices have while training
    void *(*alloc)(size_t bytes); // zeroed, 64-byte aligned; NULL + error
    void (*free)(void *p);
    void (*upload)(void *to, const void *host, size_t bytes);
    void (*download)(void *host, const void *from, size_t bytes);
    void (*copy)(void *to, const void *from, size_t bytes); // within the device
    void (*zero)(void *p, size_t bytes);
#define X(type, name, parameters) type(*name) parameters;
    RETROFIT_OPS(X)
#undef X
};
extern const retrofit_ops retrofit_cpu;

// ---- The model: load, forward, backward ----------------------------------------------------------------------------
typedef enum { RETROFIT_INFERENCE, RETROFIT_TRAINING } retrofit_mode;

// A model of this shape without weights: the list of parameters alone. NULL + error.
retrofit_model *retrofit_model_new(const retrofit_config *config, const retrofit_ops *ops);
// Memory for its parameters, in fp32, zeroed; for TRAINING also gradients and optimizer state. false + error.
bool retrofit_model_allocate(retrofit_model *m, retrofit_mode mode);
// Reads a Hugging Face directory (config.json, model.safetensors or its shards), or DIR/latest if DIR itself holds no model.
// INFERENCE on a CPU leaves the weights in the mapped files, in their type; TRAINING makes fp32 copies. NULL + error.
retrofit_model *retrofit_load(const char *directory, const retrofit_ops *ops, retrofit_mode mode);
void retrofit_free(retrofit_model *m);
// Copies the masters into the type the matrices have on this device; needed after masters were changed by hand.
void retrofit_refresh(retrofit_model *m);

typedef struct {         // what backward needs of one block; norms and swiglu are recomputed
    const float *x;      // (N,d)   its input, the output of the block before
    float *rstd_1;       // (N)
    act *qkv;            // (N,Q)   after RoPE
    act *attention;      // (N,d)
    float *lse;          // (N,H)
    float *mid;          // (N,d)   residual stream between attention and MLP
    float *rstd_2;       // (N)
    act *fc;             // (N,2F)
    float *out;          // (N,d)
} retrofit_block;

// Buffers for batches of up to B·T tokens on one device. For training they hold K recurrences; without, blocks run in place.
typedef struct {
    const retrofit_model *model;
    size_t B, T, K, capacity; // largest batch, recurrences with gradient, positions in the KV cache (0: none)
    size_t slots;             // (layer, recurrence) pairs the cache holds
    bool train;
    void *arena;
    size_t bytes;
    // of the current batch
    size_t b, t, N, n, k;     // rows, columns, b·t; recurrences run without and with gradient
    int32_t *tokens, *labels; // (N)
    int32_t *past;            // (B)     tokens each row has in the cache
    float *rope;              // (max(T, capacity), h/2, 2)
    float *embedded;          // (N,d)   wte[tokens]
    const float *e;           // (N,d)   the prelude's output
    float *injected;          // (N,d)   A_e·e, the same in every recurrence
    float *state;             // (N,d)   s_0 at first, then s_n (training) or the latest state (inference)
    float **adapted;          // [K]     (N,d) the adapter's output, input of the core's first block
    retrofit_block *prelude, *core, *coda; // [P], [K·C], [D]: what backward needs; only when training
    retrofit_block scratch;   // shared by the blocks that keep nothing
    float *x;                 // (N,d)   the coda's stream when not training
    const float *last;        // (N,d)   the coda's output
    float *rstd_f;            // (N)
    act *final;               // (N,d)   RMSNorm_f of it: what the head reads
    float *losses;            // (N)
    act *logits;              // (chunk,V)
    size_t chunk;             // rows of logits that exist at a time
    act *norm, *swiglu;       // (N,d), (N,F) recomputed in backward
    float *wide;              // (chunk or B,V) fp32 logits
    float *next;              // (B,V)   the same on the host: what retrofit_feed returns
    int32_t *seen;            // (B)     `past`, on the host
    act *keys, *values;       // (slots,B,capacity,G·h)
    float *dx, *dinjected;    // (N,d)
    act *dbranch, *dinner, *dattention, *dqkv, *dswiglu, *dfc, *dfinal; // gradients of the branches' activations
} retrofit_activations;

// NULL + error. K is ignored unless train; capacity and recurrences (the largest r a cache must hold) unless it is for decoding.
retrofit_activations *retrofit_activations_new(const retrofit_model *m, size_t B, size_t T, size_t K, bool train, size_t capacity,
                                               size_t recurrences);
void retrofit_activations_free(retrofit_activations *a);
size_t retrofit_activations_bytes(const retrofit_config *c, const retrofit_ops *ops, size_t B, size_t T, size_t K, bool train);

// One pass, piece by piece. tokens: (b,t) on the host; false + error if one is not below V or the batch is too large.
bool retrofit_prelude(retrofit_activations *a, const int32_t *tokens, size_t b, size_t t); // e and A_e·e
void retrofit_start(retrofit_activations *a, float sigma, uint64_t seed);                  // s_0; sigma 0: zero
void retrofit_recur(retrofit_activations *a, size_t n, size_t k);                          // n, then k recurrences; k only if training
void retrofit_coda(retrofit_activations *a);                                               // coda and final norm
// All of it: e, s_0, n + k recurrences, coda. sigma and seed as in retrofit_start.
bool retrofit_forward(retrofit_activations *a, const int32_t *tokens, size_t b, size_t t, float sigma, uint64_t seed, size_t n, size_t k);
void retrofit_logits(retrofit_activations *a, size_t first, size_t count, float *logits);  // rows first.. of (N,V), to the host
// Mean cross-entropy over the labels (b,t) that are not -100, in nats; NaN + error if one is not below V. With scale not 0 also
// the gradient of scale·loss with respect to the coda's output (and to lm_head, ln_f), for retrofit_backward.
double retrofit_loss(retrofit_activations *a, const int32_t *labels, float scale);
void retrofit_backward(retrofit_activations *a);                                           // adds to every parameter's grad
void retrofit_zero_grad(retrofit_model *m);

// Floating-point operations of training on one token with (n,k): 2 per multiply-add of a matrix, attention included; forward
// costs 1, backward 2, gradient-free recurrences no backward.
double retrofit_flops_per_token(const retrofit_config *c, size_t T, size_t n, size_t k);

// ---- Training: sampler, schedules, optimizers (method: paper section 3; the authors' code) --------------------------
// n and k of micro-batch m = 1, 2, 3, … for mean recurrence r and backprop depth K; *rate (may be NULL): the log-normal draw.
void retrofit_draw_recurrences(uint64_t m, size_t r, size_t K, size_t *n, size_t *k, float *rate);

typedef enum { RETROFIT_CURRICULUM_NONE, RETROFIT_CURRICULUM_LINEAR, RETROFIT_CURRICULUM_1_SQRT } retrofit_curriculum_kind;
// Mean recurrence at step t (from 0) of S, before rounding up: R·f(t / ceil(w·S)); R after the warm-up.
double retrofit_curriculum(retrofit_curriculum_kind kind, size_t t, size_t S, double w, double R);
// Linear from start·base to base over ceil(w·S) steps: backprop depth.
double retrofit_linear_schedule(size_t t, size_t S, double w, double start, double base);
// Warm-up from min·lr over ceil(w·S) steps, stable, then cosine decay over the last ceil(c·S) steps to min·lr.
double retrofit_learning_rate(size_t t, size_t S, double w, double c, double min, double lr);

typedef enum { RETROFIT_ADAMW, RETROFIT_MUON } retrofit_optimizer_kind;
typedef struct {
    retrofit_optimizer_kind kind;
    float lr, muon_lr;          // this step's
    float beta1, beta2, eps, weight_decay, momentum;
    float clip;                 // largest global gradient norm; 0: none
} retrofit_optimizer;
// One optimizer step (t from 1) from the accumulated gradients; returns their 2-norm before clipping.
double retrofit_optimizer_step(retrofit_model *m, const retrofit_optimizer *o, size_t t);

// Memory for the optimizer's moments (and Muon's scratch). false + error.
bool retrofit_optimizer_init(retrofit_model *m, retrofit_optimizer_kind kind);

// ---- Decoding ----------------------------------------------------------------------------------------------------------
// Feeds t new tokens per row (tokens (b,t), of which the first lengths[i] count; NULL: all) through r recurrences and the KV cache of
// `a`, and returns the logits (b,V) after each row's last token, on the host, valid until the next call. NULL + error.
const float *retrofit_feed(retrofit_activations *a, const int32_t *tokens, size_t b, size_t t, const int32_t *lengths, size_t r, float sigma,
                           uint64_t seed);
void retrofit_rewind(retrofit_activations *a); // empties the cache

typedef struct {
    float temperature; // 0: greedy
    size_t top_k;      // 0: all
    float top_p, min_p; // 1, 0: all
    uint64_t seed;     // advances with every draw
} retrofit_sampling;
// Draws a token; filters in the order temperature, top-k, top-p, min-p. scratch: V pairs of 8 bytes. logits are left as they are.
int32_t retrofit_sample(const float *logits, size_t V, retrofit_sampling *s, void *scratch);
int32_t retrofit_argmax(const float *logits, size_t V); // the first of equals

// ---- JSON, tokenizer ------------------------------------------------------------------------------------------------------
typedef enum {
    RETROFIT_JSON_NULL,
    RETROFIT_JSON_BOOL,
    RETROFIT_JSON_NUMBER,
    RETROFIT_JSON_STRING,
    RETROFIT_JSON_ARRAY,
    RETROFIT_JSON_OBJECT
} retrofit_json_type;

typedef struct retrofit_json retrofit_json;
struct retrofit_json {
    retrofit_json_type type;
    size_t count;              // children of an array or object
    size_t length, key_length; // of string and key, which may contain NUL
    const char *string, *key;  // UTF-8 with a NUL behind it; a number's string is the number as written; key is NULL outside objects
    double number;             // the number, correctly rounded; 0 or 1 for a bool
    retrofit_json *child, *next;
};

// Parses size bytes of text as strict RFC 8259 JSON: valid UTF-8, no lone surrogates, at most 64 levels, nothing but white space after
// the value. Of equal keys in an object all are kept and retrofit_json_get finds the first. Copies what it needs from text. Returns the
// root, freed with retrofit_json_free, or NULL with retrofit_error() naming `where` (a file name, say) and the byte.
retrofit_json *retrofit_json_parse(const char *text, size_t size, const char *where);
// Frees the whole tree of a root that retrofit_json_parse returned, or NULL.
void retrofit_json_free(retrofit_json *root);
// The first member of that name; NULL if there is none or object is not an object (NULL included). Cannot fail.
const retrofit_json *retrofit_json_get(const retrofit_json *object, const char *key);


// A Hugging Face tokenizer.json (byte-pair encoding only), reproduced id for id. Read-only once loaded: threads may share one.
typedef struct retrofit_tokenizer retrofit_tokenizer;

// Reads directory/tokenizer.json and, if there, tokenizer_config.json (bos_token, eos_token; add_bos_token and add_eos_token count only
// where tokenizer.json has no post_processor). Returns a tokenizer, freed with retrofit_tokenizer_free, or NULL with retrofit_error():
// whatever in tokenizer.json is unknown or unsupported is an error, nothing is skipped.
retrofit_tokenizer *retrofit_tokenizer_load(const char *directory);
// Frees a tokenizer, or NULL.
void retrofit_tokenizer_free(retrofit_tokenizer *t);
// Encodes size bytes of UTF-8; special tokens written out in text become their ids. with_special adds what the post-processor adds (BOS,
// mostly). Each stretch of invalid UTF-8 is read as U+FFFD, as Python's errors="replace" does before Hugging Face sees a text. Returns
// malloc'd ids and *count, or NULL with retrofit_error(): out of memory, or text that is not in the NFC form the tokenizer asks for.
int32_t *retrofit_encode(const retrofit_tokenizer *t, const char *text, size_t size, bool with_special, size_t *count);
// Decodes ids to malloc'd valid UTF-8 with a NUL behind it, *size without the NUL; skip_special leaves special tokens out. NULL with
// retrofit_error() for an id that is no token's.
char *retrofit_decode(const retrofit_tokenizer *t, const int32_t *ids, size_t count, bool skip_special, size_t *size);

// Text as it is generated. Tokens cannot be decoded one by one: one may be half a character, and the first one's leading space goes. So
// the caller keeps all ids and, after each new one, asks what text they added; `last` says that no more will come. The pieces make up
// exactly what retrofit_decode makes of all ids. A piece is empty while the last character is incomplete. Start from a zeroed stream;
// only tokens since the last but one piece are decoded each time. Returns and fails like retrofit_decode.
typedef struct {
    size_t from, done;
} retrofit_stream;
char *retrofit_decode_next(const retrofit_tokenizer *t, retrofit_stream *s, const int32_t *ids, size_t count, bool skip_special, bool last,
                           size_t *size);

// The ids of the beginning and end of text that tokenizer_config.json names; -1 if it names none.
int32_t retrofit_tokenizer_bos(const retrofit_tokenizer *t);
int32_t retrofit_tokenizer_eos(const retrofit_tokenizer *t);
// The id of the token spelt so in tokenizer.json ("<|im_end|>", "▁the"); -1 if there is none.
int32_t retrofit_tokenizer_id(const retrofit_tokenizer *t, const char *token);
// Highest id + 1.
size_t retrofit_tokenizer_size(const retrofit_tokenizer *t);


// ---- Files -----------------------------------------------------------------------------------------------------------
typedef struct {
    const char *name;
    retrofit_type type;
    size_t dims, shape[4], count; // count: the product
    const void *data;
} retrofit_tensor;

typedef struct retrofit_map { // a safetensors file mapped into memory
    char *path;
    void *base;
    size_t bytes;
    retrofit_tensor *tensors; // those of types this library reads (F32, BF16, F16, I32); others are checked and left out
    size_t count;
    retrofit_json *header;
} retrofit_map;

bool retrofit_safetensors_open(retrofit_map *f, const char *path); // checks every size, offset and overlap; false + error
void retrofit_safetensors_close(retrofit_map *f);
const retrofit_tensor *retrofit_safetensors_find(const retrofit_map *f, const char *name);
const char *retrofit_safetensors_metadata(const retrofit_map *f, const char *key); // NULL if absent
// Writes tensors whose data lie in memory of `ops`; floats are stored as `type`. metadata: key, value, …, NULL. On failure no file.
bool retrofit_safetensors_write(const char *path, const retrofit_ops *ops, const retrofit_tensor *tensors, size_t count,
                                retrofit_type type, const char *const *metadata);

// A directory is made under a temporary name and takes its place in one step: begin returns the temporary name (malloc'd; NULL +
// error), commit flushes and renames (`final` must not exist, or be empty), abandon removes a directory of files.
char *retrofit_directory_begin(const char *final);
bool retrofit_directory_commit(const char *temporary, const char *final);
void retrofit_directory_abandon(const char *temporary);

// DIR, or DIR/latest if DIR itself holds no config.json (a training run's output): written to path, returned.
const char *retrofit_model_directory(const char *directory, char path[RETROFIT_PATH]);
// config.json, model.safetensors and the tokenizer files found in tokenizer_from (may be NULL), into an existing directory.
bool retrofit_save(const retrofit_model *m, const char *directory, retrofit_type type, const char *tokenizer_from);
// optimizer.safetensors: the moments, with metadata (key, value, …, NULL). Loading checks every name and shape.
bool retrofit_save_optimizer(const retrofit_model *m, const char *directory, const char *const *metadata);
bool retrofit_load_optimizer(retrofit_model *m, retrofit_map *f, const char *directory); // leaves f open for its metadata

// Token shards (llm.c's .bin): 256 int32 of header {magic, version, tokens}, then uint16 or uint32 tokens.
#define RETROFIT_SHARD_MAGIC_16 20240520 // version 1
#define RETROFIT_SHARD_MAGIC_32 20240801 // version 7
typedef struct retrofit_data retrofit_data;
// Every file that matches the glob, in name order, cut into rows of T+1 tokens that do not overlap. vocab: ids are checked when
// read. shuffle: rows in a random order, another in each epoch. NULL + error.
retrofit_data *retrofit_data_open(const char *pattern, size_t T, size_t vocab, bool shuffle, uint64_t seed);
void retrofit_data_close(retrofit_data *d);
size_t retrofit_data_rows(const retrofit_data *d);
// Row `index` (counted on over epochs): T tokens and the T that follow each. false + error if an id is not below vocab.
bool retrofit_data_row(retrofit_data *d, uint64_t index, int32_t *tokens, int32_t *labels);

// ---- Command lines: what the three programs share ----------------------------------------------------------------------------
typedef enum { RETROFIT_FLAG, RETROFIT_STRING, RETROFIT_SIZE, RETROFIT_REAL, RETROFIT_CHOICE, RETROFIT_HEADING } retrofit_option_type;
typedef struct {
    const char *name;     // without the dashes; a HEADING's is a line of the help
    retrofit_option_type type;
    void *value;          // bool *, const char **, size_t *, double *, int * (the choice's index)
    const char *argument; // what the help calls it; a CHOICE's alternatives, "a|b|c"
    const char *help;
} retrofit_option;
// Reads --name value and --name=value by the table; what has no dashes goes to `others` if that is not NULL (at most argc). Returns -1 to go
// on, or the exit code: 0 after --help (usage and table on stdout), 2 after one line on stderr about what is wrong.
int retrofit_options(int argc, char **argv, const retrofit_option *table, size_t count, const char *usage, const char **others, size_t *other_count);
bool retrofit_sizes(const char *text, size_t *out, size_t most, size_t *count); // "1,2,4": positive sizes; false + error
double retrofit_seconds(void);                                                  // of a clock that only goes forward

#ifdef __cplusplus
}
#endif
#endif // RETROFIT_H

// =====================================================================================================================
#ifdef RETROFIT_IMPLEMENTATION
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __cplusplus
#define RETROFIT_THREAD_LOCAL thread_local
extern "C" {
#else
#define RETROFIT_THREAD_LOCAL _Thread_local
#endif


// =====================================================================================================================
// 2  Memory, files, errors, random numbers
// =====================================================================================================================

static RETROFIT_THREAD_LOCAL char error_text[1024];
const char *retrofit_error(void) { return error_text; }

// Records one line about what went wrong, where, and what to do. Always returns false, so that a caller can `return fail(...)`.
__attribute__((format(printf, 1, 2))) static bool fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(error_text, sizeof error_text, format, args);
    va_end(args);
    for (char *c = error_text; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 127) *c = '?'; // names in files may hold anything: one line it stays
    return false;
}

// count * size zeroed bytes; NULL and an error if the product overflows or memory is out. Freed with free().
static void *allocate(size_t count, size_t size) {
    if (size && count > SIZE_MAX / size) return fail("a size of %zu x %zu bytes overflows", count, size), (void *)NULL;
    void *p = calloc(count ? count : 1, size ? size : 1);
    if (!p) fail("out of memory: %zu bytes", count * size);
    return p;
}

// The whole file, with a NUL behind it; NULL and an error. Freed with free().
static char *read_file(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    if (!f) return fail("%s: %s", path, strerror(errno)), (char *)NULL;
    struct stat st;
    char *text = NULL;
    if (fstat(fileno(f), &st) || !S_ISREG(st.st_mode)) fail("%s: not a regular file", path);
    else if ((text = (char *)allocate((size_t)st.st_size + 1, 1)) && fread(text, 1, (size_t)st.st_size, f) != (size_t)st.st_size) {
        fail("%s: reading failed: %s", path, ferror(f) ? strerror(errno) : "the file became shorter");
        free(text), text = NULL;
    }
    if (text) *size = (size_t)st.st_size;
    fclose(f);
    return text;
}

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

bool retrofit_path(char path[RETROFIT_PATH], const char *directory, const char *name) {
    int n = snprintf(path, RETROFIT_PATH, "%s/%s", directory, name);
    return (n > 0 && n < RETROFIT_PATH) || fail("%.60s…: a path longer than %d bytes", directory, RETROFIT_PATH - 1);
}

// One block of memory handed out in pieces. Laying something out twice, first with base NULL, measures it before it is allocated.
typedef struct {
    char *base;
    size_t used; // SIZE_MAX once a size has overflowed
} arena;

static void *take(arena *a, size_t count, size_t size) {
    size_t at = a->used, bytes;
    if (__builtin_mul_overflow(count, size, &bytes) || bytes > SIZE_MAX / 2 || at > SIZE_MAX / 2) return a->used = SIZE_MAX, (void *)NULL;
    a->used = at + (bytes + 63) / 64 * 64;
    return a->base ? a->base + at : NULL;
}

size_t retrofit_type_size(retrofit_type type) { return type == RETROFIT_F32 || type == RETROFIT_I32 ? 4 : 2; }

static float bf16_to_float(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static uint16_t float_to_bf16(float f) { // round to nearest even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float f16_to_float(uint16_t x) {
    uint32_t exponent = x >> 10 & 31, mantissa = x & 1023;
    float f = exponent == 31  ? (mantissa ? NAN : INFINITY)
              : exponent == 0 ? ldexpf((float)mantissa, -24)
                              : ldexpf((float)(mantissa | 1024), (int)exponent - 25);
    return x >> 15 ? -f : f;
}

static uint16_t half_at(const void *data, size_t i) { // at any address: a file's header may have an odd length
    uint16_t x;
    memcpy(&x, (const char *)data + 2 * i, 2);
    return x;
}

// n elements of a tensor in a file's type as fp32.
static void to_float(float *out, const void *data, retrofit_type type, size_t n) {
    if (type == RETROFIT_F32) memcpy(out, data, n * 4);
    else if (type == RETROFIT_BF16)
        for (size_t i = 0; i < n; i++) out[i] = bf16_to_float(half_at(data, i));
    else
        for (size_t i = 0; i < n; i++) out[i] = f16_to_float(half_at(data, i));
}

// ---- Random numbers: PyTorch's CPU generator, because the authors' draws come from it -------------------------------
typedef struct {
    uint32_t state[624];
    size_t next;
} mt19937;

static void mt19937_seed(mt19937 *g, uint32_t seed) {
    g->state[0] = seed;
    for (uint32_t i = 1; i < 624; i++) g->state[i] = 1812433253u * (g->state[i - 1] ^ g->state[i - 1] >> 30) + i;
    g->next = 624;
}

static uint32_t mt19937_next(mt19937 *g) {
    if (g->next == 624) {
        for (size_t i = 0; i < 624; i++) {
            uint32_t y = (g->state[i] & 0x80000000u) | (g->state[(i + 1) % 624] & 0x7fffffffu);
            g->state[i] = g->state[(i + 397) % 624] ^ y >> 1 ^ (y & 1 ? 0x9908b0dfu : 0);
        }
        g->next = 0;
    }
    uint32_t y = g->state[g->next++];
    y ^= y >> 11, y ^= y << 7 & 0x9d2c5680u, y ^= y << 15 & 0xefc60000u;
    return y ^ y >> 18;
}

static double mt19937_uniform(mt19937 *g) { // [0, 1): the low 53 bits of two outputs, the first one high
    uint64_t high = mt19937_next(g), low = mt19937_next(g);
    return (double)((high << 32 | low) & ((1ull << 53) - 1)) * 0x1p-53;
}

static double mt19937_normal(mt19937 *g) {
    double u1 = mt19937_uniform(g), u2 = mt19937_uniform(g);
    return sqrt(-2 * log1p(-u2)) * cos(2 * 3.14159265358979323846 * u1);
}

// Poisson as PyTorch draws it: by multiplying uniforms for small rates, by Hörmann's transformed rejection (PTRS, 1993) from 10 on.
static size_t mt19937_poisson(mt19937 *g, double rate) {
    if (rate < 10) {
        double floor_ = exp(-rate), product = 1;
        for (size_t k = 0;; k++)
            if ((product *= mt19937_uniform(g)) <= floor_) return k;
    }
    double b = 0.931 + 2.53 * sqrt(rate), a = -0.059 + 0.02483 * b, log_rate = log(rate);
    double inverse_alpha = 1.1239 + 1.1328 / (b - 3.4), v_r = 0.9277 - 3.6224 / (b - 2);
    for (;;) {
        double u = mt19937_uniform(g) - 0.5, v = mt19937_uniform(g), us = 0.5 - fabs(u);
        double k = floor((2 * a / us + b) * u + rate + 0.43);
        if (us >= 0.07 && v <= v_r) return (size_t)k;
        if (k < 0 || (us < 0.013 && v > us)) continue;
        if (log(v) + log(inverse_alpha) - log(a / (us * us) + b) <= -rate + k * log_rate - lgamma(k + 1)) return (size_t)k;
    }
}

// A counter-based generator (splitmix64's finaliser) for everything that is ours to choose: the same bits from any thread, in any order.
static uint64_t hash64(uint64_t seed, uint64_t counter) {
    uint64_t z = seed + 0x9e3779b97f4a7c15ull * (counter + 1);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

static double hash_uniform(uint64_t seed, uint64_t counter) { // (0, 1)
    return ((double)(hash64(seed, counter) >> 11) + 0.5) * 0x1p-53;
}

// A standard normal cut at ±3, by Box and Muller; the one draw in 370 beyond is drawn again.
static float hash_normal(uint64_t seed, uint64_t counter) {
    for (uint64_t key = hash64(seed, counter), i = 0;; i += 2) {
        double z = sqrt(-2 * log(hash_uniform(key, i))) * cos(2 * 3.14159265358979323846 * hash_uniform(key, i + 1));
        if (fabs(z) <= 3) return (float)z;
    }
}

// =====================================================================================================================
// 3  JSON, safetensors
// =====================================================================================================================

// Decodes the character at s[0..n), n > 0: its length, and *c. Where s is not UTF-8, *c is UTF8_INVALID and the length that of the longest
// beginning of a character, the unit that Unicode (and Rust, hence Hugging Face) replaces by one U+FFFD.
#define UTF8_INVALID UINT32_MAX
static size_t utf8_next(const char *s, size_t n, uint32_t *c) {
    unsigned lead = (unsigned char)s[0];
    *c = lead;
    if (lead < 0x80) return 1;
    size_t more = lead < 0xc2 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : lead < 0xf5 ? 3 : 0;
    // The second byte's range is narrower where the full one would allow overlong forms, surrogates or values above U+10FFFF.
    unsigned low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80, high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    *c = lead & (0x3fu >> more);
    for (size_t i = 1; i <= more; i++, low = 0x80, high = 0xbf) {
        unsigned byte = i < n ? (unsigned char)s[i] : 0;
        if (byte < low || byte > high) return *c = UTF8_INVALID, i;
        *c = *c << 6 | (byte & 0x3f);
    }
    if (!more) *c = UTF8_INVALID;
    return more + 1;
}

// Writes c, a valid code point, as UTF-8 to out[0..4) and returns its length.
static size_t utf8_put(uint32_t c, char *out) {
    if (c < 0x80) return out[0] = (char)c, 1;
    size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3f));
    out[0] = (char)((0xf00u >> n & 0xf0) | c);
    return n;
}

// Nodes and strings live in blocks that the root owns: a big vocabulary has a million of them.
typedef struct json_block json_block;
struct json_block {
    json_block *next;
    size_t used, room;
    char *bytes; // directly behind the block
};

typedef struct {
    retrofit_json root; // first, so that a root's address is its tree's
    json_block *blocks;
} json_tree;

typedef struct {
    const char *text, *where;
    size_t size, at;
    json_tree *tree;
} json_parser;

static bool json_fail(const json_parser *p, const char *what) { return fail("%s: byte %zu: bad JSON: %s", p->where, p->at, what); }

static void *json_take(json_parser *p, size_t size) {
    size = (size + 15) / 16 * 16; // no overflow: size is at most a string of the text
    json_block *b = p->tree->blocks;
    if (!b || b->room - b->used < size) {
        size_t room = p->size < 4096 ? 4096 : p->size < 1 << 20 ? p->size : 1 << 20; // small texts, small blocks
        if (room < size) room = size;
        if (!(b = (json_block *)malloc(sizeof *b + room))) return fail("%s: out of memory", p->where), (void *)NULL;
        b->next = p->tree->blocks, b->used = 0, b->room = room, b->bytes = (char *)(b + 1);
        p->tree->blocks = b;
    }
    b->used += size;
    return b->bytes + b->used - size;
}

static char json_peek(const json_parser *p) { return p->at < p->size ? p->text[p->at] : 0; }

static char json_skip(json_parser *p) {
    while (p->at < p->size && strchr(" \t\r\n", p->text[p->at]) && p->text[p->at]) p->at++;
    return json_peek(p);
}

static bool json_hex4(json_parser *p, uint32_t *c) {
    *c = 0;
    for (int i = 0; i < 4; i++, p->at++) {
        char h = json_peek(p);
        int digit = h >= '0' && h <= '9' ? h - '0' : h >= 'a' && h <= 'f' ? h - 'a' + 10 : h >= 'A' && h <= 'F' ? h - 'A' + 10 : -1;
        if (digit < 0) return json_fail(p, "\\u needs four hexadecimal digits");
        *c = *c << 4 | (uint32_t)digit;
    }
    return true;
}

// A string from its opening quote on.
static bool json_string(json_parser *p, const char **string, size_t *length) {
    if (json_peek(p) != '"') return json_fail(p, "expected a string");
    size_t end = ++p->at;
    while (end < p->size && p->text[end] != '"') end += p->text[end] == '\\' ? 2 : 1;
    if (end >= p->size) return json_fail(p, "this string does not end");
    char *out = (char *)json_take(p, end - p->at + 1), *start = out; // no escape is shorter than what it stands for
    if (!out) return false;
    while (p->at < end) {
        uint32_t c, low;
        size_t n = utf8_next(p->text + p->at, end - p->at, &c);
        if (c == UTF8_INVALID) return json_fail(p, "not UTF-8");
        if (c < 0x20) return json_fail(p, "a control character in a string must be escaped");
        if (c != '\\') {
            memcpy(out, p->text + p->at, n);
            p->at += n, out += n;
            continue;
        }
        static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
        char escape = p->text[p->at + 1]; // there: the loop above skipped over it
        const char *name = escape ? strchr(names, escape) : NULL;
        if (!name && escape != 'u') return json_fail(p, "unknown escape");
        p->at += 2;
        if (name) {
            *out++ = values[name - names];
            continue;
        }
        if (!json_hex4(p, &c)) return false;
        if (c >= 0xd800 && c < 0xdc00 && json_peek(p) == '\\' && p->at + 1 < end && p->text[p->at + 1] == 'u') {
            p->at += 2;
            if (!json_hex4(p, &low)) return false;
            if (low < 0xdc00 || low > 0xdfff) return json_fail(p, "a lone surrogate before this");
            c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
        } else if (c >= 0xd800 && c < 0xe000) return json_fail(p, "a lone surrogate before this");
        out += utf8_put(c, out);
    }
    p->at = end + 1;
    *out = 0;
    *string = start, *length = (size_t)(out - start);
    return true;
}

static size_t json_digits(json_parser *p) {
    size_t from = p->at;
    while (json_peek(p) >= '0' && json_peek(p) <= '9') p->at++;
    return p->at - from;
}

static bool json_number(json_parser *p, retrofit_json *v) {
    size_t from = p->at;
    if (json_peek(p) == '-') p->at++;
    bool zero = json_peek(p) == '0';
    size_t digits = json_digits(p);
    if (!digits) return json_fail(p, "expected a value");
    if (zero && digits > 1) return json_fail(p, "a number with a leading zero");
    if (json_peek(p) == '.') {
        p->at++;
        if (!json_digits(p)) return json_fail(p, "expected a digit after the point");
    }
    if (json_peek(p) == 'e' || json_peek(p) == 'E') {
        p->at++;
        if (json_peek(p) == '+' || json_peek(p) == '-') p->at++;
        if (!json_digits(p)) return json_fail(p, "expected a digit in the exponent");
    }
    v->length = p->at - from;
    char *copy = (char *)json_take(p, v->length + 1), *end;
    if (!copy) return false;
    memcpy(copy, p->text + from, v->length);
    copy[v->length] = 0;
    v->type = RETROFIT_JSON_NUMBER, v->string = copy, v->number = strtod(copy, &end);
    if (*end) return json_fail(p, "strtod stops early: set LC_NUMERIC to \"C\"");
    return isfinite(v->number) ? true : json_fail(p, "a number too large for a double");
}

// Any value; v is zeroed. The depth bounds the recursion.
static bool json_value(json_parser *p, retrofit_json *v, int depth) {
    char c = json_skip(p);
    if (c == '"') return v->type = RETROFIT_JSON_STRING, json_string(p, &v->string, &v->length);
    static const char *const words[] = {"null", "false", "true"};
    for (int i = 0; i < 3; i++) {
        size_t n = strlen(words[i]);
        if (c != words[i][0] || p->size - p->at < n || memcmp(p->text + p->at, words[i], n)) continue;
        p->at += n, v->type = i ? RETROFIT_JSON_BOOL : RETROFIT_JSON_NULL, v->number = i == 2;
        return true;
    }
    if (c != '[' && c != '{') return json_number(p, v);
    if (depth == 64) return json_fail(p, "more than 64 levels");
    char close = c == '[' ? ']' : '}';
    v->type = c == '[' ? RETROFIT_JSON_ARRAY : RETROFIT_JSON_OBJECT;
    p->at++;
    if (json_skip(p) == close) return p->at++, true;
    for (retrofit_json **tail = &v->child;; tail = &(*tail)->next) {
        retrofit_json *child = (retrofit_json *)json_take(p, sizeof *child);
        if (!child) return false;
        memset(child, 0, sizeof *child);
        *tail = child, v->count++;
        if (close == '}') {
            json_skip(p);
            if (!json_string(p, &child->key, &child->key_length)) return false;
            if (json_skip(p) != ':') return json_fail(p, "expected ':'");
            p->at++;
        }
        if (!json_value(p, child, depth + 1)) return false;
        char after = json_skip(p);
        if (after != ',' && after != close) return json_fail(p, close == ']' ? "expected ',' or ']'" : "expected ',' or '}'");
        p->at++;
        if (after == close) return true;
    }
}

retrofit_json *retrofit_json_parse(const char *text, size_t size, const char *where) {
    json_tree *tree = (json_tree *)allocate(1, sizeof *tree);
    if (!tree) return NULL;
    json_parser p = {text, where, size, 0, tree};
    bool ok = json_value(&p, &tree->root, 0);
    json_skip(&p);
    if (ok && p.at < size) ok = json_fail(&p, "something follows the value");
    if (ok) return &tree->root;
    retrofit_json_free(&tree->root);
    return NULL;
}

void retrofit_json_free(retrofit_json *root) {
    if (!root) return;
    json_tree *tree = (json_tree *)(void *)root;
    for (json_block *b = tree->blocks, *next; b; b = next) next = b->next, free(b);
    free(tree);
}

const retrofit_json *retrofit_json_get(const retrofit_json *object, const char *key) {
    if (!object || object->type != RETROFIT_JSON_OBJECT) return NULL;
    const retrofit_json *m = object->child;
    while (m && (m->key_length != strlen(key) || memcmp(m->key, key, m->key_length))) m = m->next;
    return m;
}

// Writes n bytes of UTF-8 to f as a quoted, escaped JSON string; failures show in ferror(f).
static void json_write_string(FILE *f, const char *s, size_t n) {
    fputc('"', f);
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c < 0x20) fprintf(f, "\\u%04x", c);
        else if (c == '"' || c == '\\') fprintf(f, "\\%c", c);
        else fputc(c, f);
    }
    fputc('"', f);
}

// ---- safetensors -----------------------------------------------------------------------------------------------------
// 8 bytes: length of the header; the header, JSON: {"name": {"dtype": "F32", "shape": [r, c], "data_offsets": [begin, end]}, …};
// then the data, little endian, offsets counted from its start.

static const struct {
    const char *name;
    int type; // -1: known, but nothing this library reads
    size_t size;
} file_types[] = {{"F32", RETROFIT_F32, 4}, {"BF16", RETROFIT_BF16, 2}, {"F16", RETROFIT_F16, 2}, {"I32", RETROFIT_I32, 4},
                  {"F64", -1, 8},           {"I64", -1, 8},             {"U64", -1, 8},           {"U32", -1, 4},
                  {"I16", -1, 2},           {"U16", -1, 2},             {"I8", -1, 1},            {"U8", -1, 1},
                  {"BOOL", -1, 1}};

// A JSON number that is a size.
static bool json_size(const retrofit_json *j, size_t *out) {
    if (!j || j->type != RETROFIT_JSON_NUMBER || !(j->number >= 0) || j->number > 0x1p53 || j->number != floor(j->number)) return false;
    *out = (size_t)j->number;
    return true;
}

// Maps a file for reading. A file of no bytes is an error.
static void *map_file(const char *path, size_t *bytes) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return fail("%s: %s", path, strerror(errno)), (void *)NULL;
    struct stat st;
    void *base = MAP_FAILED;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode) || st.st_size == 0) fail("%s: not a file with anything in it", path);
    else if ((base = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0)) == MAP_FAILED)
        fail("%s: mapping %zu bytes failed: %s", path, (size_t)st.st_size, strerror(errno));
    else *bytes = (size_t)st.st_size;
    close(fd);
    return base == MAP_FAILED ? NULL : base;
}

static int by_address(const void *a, const void *b) {
    const char *x = *(const char *const *)a, *y = *(const char *const *)b;
    return x < y ? -1 : x > y;
}

static bool safetensors_entry(retrofit_map *f, const retrofit_json *j, const char *data, size_t data_bytes, const char **range) {
    const retrofit_json *dtype = retrofit_json_get(j, "dtype"), *shape = retrofit_json_get(j, "shape");
    const retrofit_json *offsets = retrofit_json_get(j, "data_offsets");
    size_t begin = 0, end = 0, type = 0, count = 1, types = sizeof file_types / sizeof *file_types;
    if (!dtype || dtype->type != RETROFIT_JSON_STRING || !shape || shape->type != RETROFIT_JSON_ARRAY || !offsets || offsets->count != 2 ||
        !json_size(offsets->child, &begin) || !json_size(offsets->child->next, &end))
        return fail("%s: tensor %s: needs dtype, shape and two data_offsets", f->path, j->key);
    while (type < types && strcmp(file_types[type].name, dtype->string)) type++;
    if (type == types) return fail("%s: tensor %s: unknown dtype %s", f->path, j->key, dtype->string);
    retrofit_tensor *t = &f->tensors[f->count];
    if (shape->count > 4 && file_types[type].type >= 0) return fail("%s: tensor %s: %zu dimensions, at most 4", f->path, j->key, shape->count);
    for (const retrofit_json *s = shape->child; s; s = s->next) {
        size_t n = 0;
        if (!json_size(s, &n) || __builtin_mul_overflow(count, n, &count))
            return fail("%s: tensor %s: the shape is not a list of sizes, or too large", f->path, j->key);
        if (t->dims < 4) t->shape[t->dims++] = n;
    }
    if (begin > end || end > data_bytes)
        return fail("%s: tensor %s: bytes %zu to %zu lie outside the %zu bytes of data: truncated?", f->path, j->key, begin, end, data_bytes);
    if (count > SIZE_MAX / 8 || count * file_types[type].size != end - begin)
        return fail("%s: tensor %s: its shape needs %zu elements of %s, its offsets hold %zu bytes", f->path, j->key, count, dtype->string,
                    end - begin);
    if (begin % file_types[type].size) return fail("%s: tensor %s: offset %zu is not aligned to %s", f->path, j->key, begin, dtype->string);
    range[0] = data + begin, range[1] = data + end;
    if (file_types[type].type < 0) return t->dims = 0, true; // the place is used again
    t->name = j->key, t->type = (retrofit_type)file_types[type].type, t->count = count, t->data = data + begin;
    f->count++;
    return true;
}

bool retrofit_safetensors_open(retrofit_map *f, const char *path) {
    memset(f, 0, sizeof *f);
    uint64_t header = 0;
    const char **ranges = NULL;
    size_t n = 0, covered = 0;
    bool ok = false;
    if (!(f->path = strdup(path))) return fail("out of memory");
    if (!(f->base = map_file(path, &f->bytes))) goto done;
    if (f->bytes >= 8) memcpy(&header, f->base, 8);
    if (f->bytes < 8 || header < 2 || header > f->bytes - 8 || header > 100000000) {
        fail("%s: not a safetensors file, or truncated: %zu bytes, header of %llu", path, f->bytes, (unsigned long long)header);
        goto done;
    }
    if (!(f->header = retrofit_json_parse((const char *)f->base + 8, (size_t)header, path))) goto done;
    if (f->header->type != RETROFIT_JSON_OBJECT) {
        fail("%s: the header is not a JSON object", path);
        goto done;
    }
    f->tensors = (retrofit_tensor *)allocate(f->header->count + 1, sizeof *f->tensors);
    ranges = (const char **)allocate(2 * f->header->count + 2, sizeof *ranges);
    if (!f->tensors || !ranges) goto done;
    for (const retrofit_json *j = f->header->child; j; j = j->next) {
        if (!strcmp(j->key, "__metadata__")) continue;
        if (!safetensors_entry(f, j, (const char *)f->base + 8 + header, f->bytes - 8 - (size_t)header, ranges + 2 * n)) goto done;
        if (ranges[2 * n] != ranges[2 * n + 1]) n++;
    }
    // Sorted, the ends of ranges that do not overlap come in turn: begin, end, begin, end, …, each begin at or after the end before.
    qsort(ranges, n, 2 * sizeof *ranges, by_address);
    for (size_t i = 1; i < n; i++)
        if (ranges[2 * i] < ranges[2 * i - 1]) {
            fail("%s: two tensors overlap at byte %zu of the data", path, (size_t)(ranges[2 * i] - (const char *)f->base) - 8 - (size_t)header);
            goto done;
        }
    for (size_t i = 0; i < n; i++) covered += (size_t)(ranges[2 * i + 1] - ranges[2 * i]);
    ok = covered == f->bytes - 8 - (size_t)header;
    if (!ok) fail("%s: the tensors cover %zu of %zu bytes of data: damaged?", path, covered, f->bytes - 8 - (size_t)header);
done:
    free(ranges);
    if (!ok) retrofit_safetensors_close(f);
    return ok;
}

void retrofit_safetensors_close(retrofit_map *f) {
    if (f->base) munmap(f->base, f->bytes);
    retrofit_json_free(f->header);
    free(f->tensors), free(f->path);
    memset(f, 0, sizeof *f);
}

const retrofit_tensor *retrofit_safetensors_find(const retrofit_map *f, const char *name) {
    for (size_t i = 0; i < f->count; i++)
        if (!strcmp(f->tensors[i].name, name)) return &f->tensors[i];
    return NULL;
}

const char *retrofit_safetensors_metadata(const retrofit_map *f, const char *key) {
    const retrofit_json *j = retrofit_json_get(retrofit_json_get(f->header, "__metadata__"), key);
    return j && j->type == RETROFIT_JSON_STRING ? j->string : NULL;
}

// Flushes and closes; a file that could not be written whole is removed.
static bool finish_file(FILE *f, const char *path, bool ok) {
    int why = errno;
    if (ok && (ferror(f) || fflush(f) || fsync(fileno(f)))) ok = false, why = errno;
    if (fclose(f) && ok) ok = false, why = errno;
    if (why == 0) why = EIO;
    if (!ok) remove(path), fail("%s: writing failed: %s", path, strerror(why));
    return ok;
}

bool retrofit_safetensors_write(const char *path, const retrofit_ops *ops, const retrofit_tensor *tensors, size_t count,
                                retrofit_type type, const char *const *metadata) {
    static const char *names[] = {"F32", "BF16", "F16", "I32"};
    enum { CHUNK = 1 << 18 };
    char *text = NULL;
    size_t length = 0, offset = 0;
    FILE *h = open_memstream(&text, &length);
    float *in = (float *)allocate(CHUNK, sizeof *in);
    uint16_t *out = (uint16_t *)allocate(CHUNK, sizeof *out);
    FILE *f = h && in && out ? fopen(path, "wb") : NULL;
    bool ok = f != NULL;
    if (h && in && out && !f) fail("%s: %s", path, strerror(errno));
    if (ok) {
        fprintf(h, "{\"__metadata__\":{\"format\":\"pt\"");
        for (size_t i = 0; metadata && metadata[i]; i += 2) {
            fputc(',', h), json_write_string(h, metadata[i], strlen(metadata[i]));
            fputc(':', h), json_write_string(h, metadata[i + 1], strlen(metadata[i + 1]));
        }
        fputc('}', h);
        for (size_t i = 0; i < count; i++) {
            retrofit_type stored = tensors[i].type == RETROFIT_I32 ? RETROFIT_I32 : type;
            fputc(',', h), json_write_string(h, tensors[i].name, strlen(tensors[i].name));
            fprintf(h, ":{\"dtype\":\"%s\",\"shape\":[", names[stored]);
            for (size_t j = 0; j < tensors[i].dims; j++) fprintf(h, "%s%zu", j ? "," : "", tensors[i].shape[j]);
            fprintf(h, "],\"data_offsets\":[%zu,%zu]}", offset, offset + tensors[i].count * retrofit_type_size(stored));
            offset += tensors[i].count * retrofit_type_size(stored);
        }
        fputc('}', h);
        fflush(h);
        while ((8 + length) % 64) fputc(' ', h), fflush(h); // tensors start aligned, so that they can be used where they lie
        uint64_t header = length;
        errno = 0;
        ok = fwrite(&header, 8, 1, f) == 1 && fwrite(text, 1, length, f) == length;
        for (size_t i = 0; ok && i < count; i++) {
            retrofit_type stored = tensors[i].type == RETROFIT_I32 ? RETROFIT_I32 : type;
            size_t size = retrofit_type_size(tensors[i].type);
            for (size_t at = 0; ok && at < tensors[i].count; at += CHUNK) {
                size_t n = least(tensors[i].count - at, CHUNK);
                void *raw = size == 4 ? (void *)in : (void *)out;
                ops->download(raw, (const char *)tensors[i].data + at * size, n * size);
                if (stored != tensors[i].type) {
                    if (tensors[i].type != RETROFIT_F32) to_float(in, out, tensors[i].type, n);
                    for (size_t j = 0; stored == RETROFIT_BF16 && j < n; j++) out[j] = float_to_bf16(in[j]);
                    raw = stored == RETROFIT_F32 ? (void *)in : (void *)out;
                }
                ok = fwrite(raw, retrofit_type_size(stored), n, f) == n;
            }
        }
        ok = finish_file(f, path, ok);
    }
    if (h) fclose(h);
    free(text), free(in), free(out);
    return ok;
}

// =====================================================================================================================
// 4  Tokenizer
// =====================================================================================================================

// Unicode 16 in run lengths: so many code points outside the class, so many inside, and so on. The classes are \p{L}, \p{N} and \s.
// In tok_combining_runs a third number is the canonical combining class (0 outside); tok_unstable_runs are the characters that NFC may
// change. Runs too long for 16 bits are 65535, 0, rest.
// clang-format off
static const uint16_t tok_letter_runs[] = {
    65, 26, 6, 26, 47, 1, 10, 1, 4, 1, 5, 23, 1, 31, 1, 458, 4, 12, 14, 5, 7, 1, 1, 1, 129, 5, 1, 2, 2, 4, 1, 1, 6, 1, 1, 3, 1, 1, 1, 20,
    1, 83, 1, 139, 8, 166, 1, 38, 2, 1, 6, 41, 71, 27, 4, 4, 45, 43, 35, 2, 1, 99, 1, 1, 15, 2, 7, 2, 10, 3, 2, 1, 16, 1, 1, 30, 29, 89,
    11, 1, 24, 33, 9, 2, 4, 1, 5, 22, 4, 1, 9, 1, 3, 1, 23, 25, 7, 11, 5, 24, 1, 6, 17, 42, 58, 54, 3, 1, 18, 1, 7, 10, 15, 16, 4, 8, 2, 2,
    2, 22, 1, 7, 1, 1, 3, 4, 3, 1, 16, 1, 13, 2, 1, 3, 14, 2, 10, 1, 8, 6, 4, 2, 2, 22, 1, 7, 1, 2, 1, 2, 1, 2, 31, 4, 1, 1, 19, 3, 16, 9,
    1, 3, 1, 22, 1, 7, 1, 2, 1, 5, 3, 1, 18, 1, 15, 2, 23, 1, 11, 8, 2, 2, 2, 22, 1, 7, 1, 2, 1, 5, 3, 1, 30, 2, 1, 3, 15, 1, 17, 1, 1, 6,
    3, 3, 1, 4, 3, 2, 1, 1, 1, 2, 3, 2, 3, 3, 3, 12, 22, 1, 52, 8, 1, 3, 1, 23, 1, 16, 3, 1, 26, 3, 2, 1, 2, 2, 30, 1, 4, 8, 1, 3, 1, 23,
    1, 10, 1, 5, 3, 1, 31, 2, 1, 2, 15, 2, 17, 9, 1, 3, 1, 41, 2, 1, 16, 1, 5, 3, 8, 3, 24, 6, 5, 18, 3, 24, 1, 9, 1, 1, 2, 7, 58, 48, 1,
    2, 12, 7, 58, 2, 1, 1, 1, 5, 1, 24, 1, 1, 1, 10, 1, 2, 9, 1, 2, 5, 1, 1, 21, 4, 32, 1, 63, 8, 1, 36, 27, 5, 115, 43, 20, 1, 16, 6, 4,
    4, 3, 1, 3, 2, 7, 3, 4, 13, 12, 1, 17, 38, 1, 1, 5, 1, 2, 43, 1, 333, 1, 4, 2, 7, 1, 1, 1, 4, 2, 41, 1, 4, 2, 33, 1, 4, 2, 7, 1, 1, 1,
    4, 2, 15, 1, 57, 1, 4, 2, 67, 37, 16, 16, 86, 2, 6, 3, 620, 2, 17, 1, 26, 5, 75, 6, 8, 7, 18, 13, 19, 14, 18, 14, 13, 1, 3, 15, 52, 35,
    1, 4, 1, 67, 89, 7, 5, 2, 34, 1, 1, 5, 70, 10, 31, 49, 30, 2, 5, 11, 44, 4, 26, 54, 23, 9, 53, 82, 1, 93, 47, 17, 8, 54, 30, 13, 2, 10,
    44, 26, 36, 41, 3, 10, 36, 2, 11, 5, 43, 2, 3, 41, 4, 1, 6, 1, 2, 3, 1, 5, 192, 64, 278, 2, 6, 2, 38, 2, 6, 2, 8, 1, 1, 1, 1, 1, 1, 1,
    31, 2, 53, 1, 7, 1, 1, 3, 3, 1, 7, 3, 4, 2, 6, 4, 13, 5, 3, 1, 7, 116, 1, 13, 1, 16, 13, 101, 1, 4, 1, 2, 10, 1, 1, 3, 5, 6, 1, 1, 1,
    1, 1, 1, 4, 1, 11, 2, 4, 5, 5, 4, 1, 52, 2, 2683, 229, 6, 4, 3, 2, 12, 38, 1, 1, 5, 1, 2, 56, 7, 1, 16, 23, 9, 7, 1, 7, 1, 7, 1, 7, 1,
    7, 1, 7, 1, 7, 1, 7, 80, 1, 469, 2, 42, 5, 5, 2, 4, 86, 6, 3, 1, 90, 1, 4, 5, 43, 1, 94, 17, 32, 48, 16, 512, 6592, 64, 22157, 67, 46,
    2, 269, 3, 16, 10, 2, 20, 47, 16, 31, 2, 70, 49, 9, 2, 103, 2, 67, 2, 2, 1, 1, 1, 8, 21, 16, 1, 3, 1, 4, 1, 23, 29, 52, 14, 50, 62, 6,
    3, 1, 1, 2, 11, 28, 10, 23, 25, 29, 7, 47, 28, 1, 16, 5, 1, 10, 10, 5, 1, 41, 23, 3, 1, 8, 20, 23, 3, 1, 3, 50, 1, 1, 3, 2, 2, 5, 2, 1,
    1, 1, 24, 3, 2, 11, 7, 3, 12, 6, 2, 6, 2, 6, 9, 7, 1, 7, 1, 43, 1, 14, 6, 115, 29, 11172, 12, 23, 4, 49, 8452, 366, 2, 106, 38, 7, 12,
    5, 5, 1, 1, 10, 1, 13, 1, 5, 1, 1, 1, 2, 1, 2, 1, 108, 33, 363, 18, 64, 2, 54, 40, 12, 116, 5, 1, 135, 36, 26, 6, 26, 11, 89, 3, 6, 2,
    6, 2, 6, 2, 3, 35, 12, 1, 26, 1, 19, 1, 2, 1, 15, 2, 14, 34, 123, 389, 29, 3, 49, 47, 32, 13, 20, 1, 8, 6, 38, 10, 30, 2, 36, 4, 8, 48,
    158, 18, 36, 4, 36, 4, 40, 8, 52, 12, 11, 1, 15, 1, 7, 1, 2, 1, 11, 1, 15, 1, 7, 1, 2, 3, 52, 12, 311, 9, 22, 10, 8, 24, 6, 1, 42, 1,
    9, 69, 6, 2, 1, 1, 44, 1, 2, 3, 1, 2, 23, 10, 23, 9, 31, 65, 19, 1, 2, 10, 22, 10, 26, 70, 56, 6, 2, 64, 1, 15, 4, 1, 3, 1, 29, 42, 29,
    3, 29, 35, 8, 1, 28, 27, 54, 10, 22, 10, 19, 13, 18, 110, 73, 55, 51, 13, 51, 13, 36, 38, 28, 9, 23, 250, 42, 6, 2, 16, 3, 59, 29, 10,
    1, 8, 22, 42, 18, 46, 21, 27, 23, 12, 53, 57, 2, 2, 1, 13, 45, 32, 25, 26, 36, 29, 1, 2, 1, 8, 35, 3, 1, 12, 48, 14, 4, 21, 1, 1, 1,
    35, 18, 1, 25, 19, 2, 63, 7, 1, 1, 1, 4, 1, 15, 1, 10, 7, 47, 38, 8, 2, 2, 2, 22, 1, 7, 1, 2, 1, 5, 3, 1, 18, 1, 12, 5, 30, 10, 1, 1,
    2, 1, 1, 38, 1, 1, 25, 1, 1, 1, 44, 53, 18, 4, 20, 3, 30, 48, 20, 2, 1, 1, 184, 47, 41, 4, 36, 48, 20, 1, 59, 43, 13, 1, 71, 27, 37, 7,
    185, 44, 116, 64, 31, 8, 2, 1, 2, 8, 1, 2, 1, 24, 15, 1, 1, 1, 94, 8, 2, 39, 16, 1, 1, 1, 28, 1, 10, 40, 7, 1, 21, 1, 11, 46, 19, 1,
    18, 73, 199, 33, 31, 9, 1, 37, 17, 1, 49, 30, 112, 7, 1, 2, 1, 38, 21, 1, 25, 6, 1, 2, 1, 32, 14, 1, 327, 19, 15, 1, 1, 13, 1, 34, 124,
    1, 79, 922, 230, 196, 2636, 97, 15, 1072, 17, 6, 25, 3995, 5, 583, 6841, 30, 1762, 569, 7, 31, 17, 79, 17, 30, 18, 48, 16, 4, 31, 21,
    5, 19, 432, 45, 211, 64, 128, 75, 5, 1, 66, 13, 64, 2, 1, 1, 28, 6136, 8, 1238, 41, 10, 8935, 4, 1, 7, 1, 2, 1, 291, 15, 1, 29, 3, 2,
    1, 14, 4, 8, 396, 2308, 107, 5, 13, 3, 9, 7, 10, 5990, 85, 1, 71, 1, 2, 2, 1, 2, 2, 2, 4, 1, 12, 1, 1, 1, 7, 1, 65, 1, 4, 2, 8, 1, 7,
    1, 28, 1, 4, 1, 5, 1, 1, 3, 7, 1, 340, 2, 25, 1, 25, 1, 31, 1, 25, 1, 31, 1, 25, 1, 31, 1, 25, 1, 31, 1, 25, 1, 8, 1844, 31, 6, 6, 261,
    62, 146, 45, 10, 7, 16, 1, 321, 30, 18, 44, 484, 28, 228, 30, 2, 1, 495, 7, 1, 4, 1, 2, 1, 15, 1, 197, 59, 68, 7, 1, 1204, 4, 1, 27, 1,
    2, 1, 1, 2, 1, 1, 10, 1, 4, 1, 1, 1, 1, 6, 1, 4, 1, 1, 1, 1, 1, 1, 3, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 2, 4, 1, 7,
    1, 4, 1, 4, 1, 1, 1, 10, 1, 17, 5, 3, 1, 5, 1, 17, 4420, 42720, 32, 4154, 6, 222, 2, 5762, 14, 7473, 15, 622, 2466, 542, 1506, 4939, 5,
    4192};
static const uint16_t tok_number_runs[] = {
    48, 10, 120, 2, 5, 1, 2, 3, 1441, 10, 134, 10, 198, 10, 412, 10, 118, 10, 4, 6, 108, 10, 118, 10, 118, 10, 2, 6, 110, 13, 115, 10, 8,
    7, 103, 10, 104, 7, 7, 19, 109, 10, 96, 10, 118, 10, 70, 20, 268, 10, 70, 10, 719, 20, 881, 3, 239, 10, 6, 10, 22, 10, 300, 10, 128,
    11, 165, 10, 6, 10, 182, 10, 86, 10, 134, 10, 6, 10, 1046, 1, 3, 6, 6, 10, 198, 51, 2, 5, 726, 60, 78, 22, 630, 30, 1385, 1, 777, 1,
    25, 9, 14, 3, 343, 4, 138, 10, 30, 8, 1, 15, 32, 10, 39, 15, 29536, 10, 188, 10, 320, 6, 154, 10, 38, 10, 198, 10, 22, 10, 86, 10, 406,
    10, 21270, 10, 493, 45, 12, 57, 17, 2, 341, 27, 36, 4, 29, 1, 8, 1, 134, 5, 202, 10, 942, 8, 25, 7, 39, 9, 75, 5, 22, 6, 160, 2, 2, 16,
    2, 46, 64, 9, 52, 2, 30, 3, 75, 5, 104, 8, 24, 8, 41, 7, 330, 6, 48, 10, 6, 10, 278, 31, 158, 10, 42, 4, 112, 7, 134, 30, 128, 10, 60,
    10, 144, 10, 7, 20, 251, 10, 342, 10, 118, 10, 374, 10, 102, 10, 6, 20, 76, 12, 420, 19, 93, 10, 662, 10, 86, 29, 227, 10, 70, 10, 422,
    10, 102, 21, 1067, 111, 15553, 10, 2342, 10, 86, 10, 134, 10, 1, 7, 526, 10, 262, 23, 24153, 10, 1478, 20, 12, 20, 108, 25, 1109, 50,
    2368, 10, 422, 10, 502, 10, 247, 10, 716, 9, 128, 10, 791, 59, 1, 3, 1, 4, 76, 45, 1, 15, 962, 13, 2787, 10};
static const uint16_t tok_space_runs[] = {
    9, 5, 18, 1, 100, 1, 26, 1, 5599, 1, 2431, 11, 29, 2, 5, 1, 47, 1, 4000, 1};
static const uint16_t tok_combining_runs[] = {
    768, 21, 230, 0, 1, 232, 0, 4, 220, 0, 1, 232, 0, 1, 216, 0, 5, 220, 0, 2, 202, 0, 4, 220, 0, 2, 202, 0, 11, 220, 0, 5, 1, 0, 4, 220,
    0, 8, 230, 0, 1, 240, 0, 1, 230, 0, 3, 220, 0, 3, 230, 0, 2, 220, 1, 3, 230, 0, 4, 220, 0, 1, 230, 0, 1, 232, 0, 2, 220, 0, 1, 230, 0,
    1, 233, 0, 2, 234, 0, 1, 233, 0, 2, 234, 0, 1, 233, 0, 13, 230, 275, 5, 230, 265, 1, 220, 0, 4, 230, 0, 1, 220, 0, 3, 230, 0, 1, 222,
    0, 1, 220, 0, 6, 230, 0, 6, 220, 0, 2, 230, 0, 1, 220, 0, 2, 230, 0, 1, 222, 0, 1, 228, 0, 1, 230, 0, 1, 10, 0, 1, 11, 0, 1, 12, 0, 1,
    13, 0, 1, 14, 0, 1, 15, 0, 1, 16, 0, 1, 17, 0, 1, 18, 0, 2, 19, 0, 1, 20, 0, 1, 21, 0, 1, 22, 1, 1, 23, 1, 1, 24, 0, 1, 25, 1, 1, 230,
    0, 1, 220, 1, 1, 18, 72, 8, 230, 0, 1, 30, 0, 1, 31, 0, 1, 32, 48, 1, 27, 0, 1, 28, 0, 1, 29, 0, 1, 30, 0, 1, 31, 0, 1, 32, 0, 1, 33,
    0, 1, 34, 0, 2, 230, 0, 2, 220, 0, 5, 230, 0, 1, 220, 0, 2, 230, 0, 1, 220, 16, 1, 35, 101, 7, 230, 2, 4, 230, 0, 1, 220, 0, 1, 230, 2,
    2, 230, 1, 1, 220, 0, 2, 230, 0, 1, 220, 35, 1, 36, 30, 1, 230, 0, 1, 220, 0, 2, 230, 0, 1, 220, 0, 2, 230, 0, 3, 220, 0, 1, 230, 0, 2,
    220, 0, 1, 230, 0, 1, 220, 0, 3, 230, 0, 1, 220, 0, 1, 230, 0, 1, 220, 0, 1, 230, 0, 1, 220, 0, 1, 230, 0, 1, 220, 0, 2, 230, 160, 7,
    230, 0, 1, 220, 0, 1, 230, 9, 1, 220, 24, 4, 230, 1, 9, 230, 1, 3, 230, 1, 5, 230, 43, 3, 220, 60, 1, 230, 0, 3, 220, 0, 4, 230, 42, 5,
    230, 0, 5, 220, 0, 14, 230, 1, 1, 220, 0, 2, 230, 0, 1, 220, 0, 2, 230, 0, 1, 220, 0, 3, 230, 0, 3, 220, 0, 1, 27, 0, 1, 28, 0, 1, 29,
    0, 3, 230, 0, 1, 220, 0, 2, 230, 0, 2, 220, 0, 5, 230, 60, 1, 7, 16, 1, 9, 3, 1, 230, 0, 1, 220, 0, 2, 230, 103, 1, 7, 16, 1, 9, 48, 1,
    230, 61, 1, 7, 16, 1, 9, 110, 1, 7, 16, 1, 9, 110, 1, 7, 16, 1, 9, 127, 1, 9, 110, 1, 7, 16, 1, 9, 7, 1, 84, 0, 1, 91, 101, 1, 7, 16,
    1, 9, 109, 2, 9, 16, 1, 9, 124, 1, 9, 109, 2, 103, 0, 1, 9, 13, 4, 107, 108, 2, 118, 0, 1, 9, 13, 4, 122, 76, 2, 220, 27, 1, 220, 1, 1,
    220, 1, 1, 216, 55, 1, 129, 0, 1, 130, 1, 1, 132, 5, 4, 130, 2, 1, 130, 1, 2, 230, 0, 1, 9, 1, 2, 230, 62, 1, 220, 112, 1, 7, 1, 2, 9,
    82, 1, 220, 719, 3, 230, 948, 2, 9, 30, 1, 9, 157, 1, 9, 10, 1, 230, 203, 1, 228, 143, 1, 222, 0, 1, 230, 0, 1, 220, 219, 1, 230, 0, 1,
    220, 71, 1, 9, 20, 8, 230, 2, 1, 220, 48, 5, 230, 0, 6, 220, 0, 2, 230, 0, 1, 220, 1, 2, 220, 0, 2, 230, 0, 2, 220, 0, 5, 230, 0, 1,
    220, 0, 4, 230, 101, 1, 7, 15, 1, 9, 38, 1, 230, 0, 1, 220, 0, 7, 230, 54, 2, 9, 58, 1, 7, 11, 2, 9, 67, 1, 7, 152, 3, 230, 1, 1, 1, 0,
    5, 220, 0, 2, 230, 0, 4, 220, 0, 1, 230, 1, 7, 1, 4, 1, 220, 6, 1, 230, 3, 2, 230, 198, 2, 230, 0, 1, 220, 0, 7, 230, 0, 1, 220, 0, 2,
    230, 0, 1, 234, 0, 1, 214, 0, 1, 220, 0, 1, 202, 0, 37, 230, 0, 1, 232, 0, 2, 228, 0, 1, 220, 0, 1, 218, 0, 1, 230, 0, 1, 233, 0, 1,
    220, 0, 1, 230, 0, 1, 220, 720, 2, 230, 0, 2, 1, 0, 4, 230, 0, 3, 1, 0, 2, 230, 4, 1, 230, 3, 2, 1, 0, 1, 230, 0, 1, 220, 0, 1, 230, 0,
    2, 1, 0, 4, 220, 0, 1, 230, 3070, 3, 230, 141, 1, 9, 96, 32, 230, 554, 1, 218, 0, 1, 228, 0, 1, 232, 0, 1, 222, 0, 2, 224, 105, 2, 8,
    30164, 1, 230, 4, 10, 230, 32, 2, 230, 80, 2, 230, 276, 1, 9, 37, 1, 9, 151, 1, 9, 27, 18, 230, 57, 3, 220, 37, 1, 9, 95, 1, 7, 12, 1,
    9, 239, 1, 230, 1, 2, 230, 0, 1, 220, 2, 2, 230, 5, 2, 230, 1, 1, 230, 52, 1, 9, 246, 1, 9, 20272, 1, 26, 769, 7, 230, 0, 7, 220, 0, 2,
    230, 973, 1, 220, 226, 1, 220, 149, 5, 230, 1682, 1, 220, 1, 1, 230, 40, 1, 230, 0, 1, 1, 0, 1, 220, 4, 1, 9, 165, 1, 230, 0, 1, 220,
    573, 4, 230, 387, 2, 230, 153, 2, 220, 0, 3, 230, 0, 1, 220, 0, 1, 230, 0, 4, 220, 49, 1, 230, 0, 1, 220, 0, 1, 230, 0, 1, 220, 192, 1,
    9, 41, 1, 9, 14, 1, 9, 57, 1, 9, 0, 1, 7, 69, 3, 230, 48, 2, 9, 62, 1, 7, 76, 1, 9, 9, 1, 7, 106, 1, 9, 0, 1, 7, 178, 1, 7, 0, 1, 9,
    80, 2, 7, 16, 1, 9, 24, 7, 230, 3, 5, 230, 205, 1, 9, 3, 1, 7, 23, 1, 230, 99, 1, 9, 0, 1, 7, 251, 1, 9, 0, 1, 7, 126, 1, 9, 118, 1, 9,
    0, 1, 7, 115, 1, 9, 269, 1, 9, 0, 1, 7, 258, 2, 9, 4, 1, 7, 156, 1, 9, 83, 1, 9, 18, 1, 9, 81, 1, 9, 421, 1, 9, 258, 1, 7, 1, 2, 9, 81,
    1, 9, 19800, 5, 1, 59, 7, 230, 1209, 2, 6, 19628, 1, 1, 5318, 2, 216, 0, 3, 1, 3, 1, 226, 0, 5, 216, 8, 8, 220, 2, 5, 230, 0, 2, 220,
    30, 4, 230, 148, 3, 230, 3515, 7, 230, 1, 17, 230, 2, 7, 230, 1, 2, 230, 1, 5, 230, 261, 7, 230, 375, 1, 230, 61, 4, 230, 1504, 7, 220,
    109, 6, 230, 0, 1, 7};
static const uint16_t tok_unstable_runs[] = {
    768, 5, 1, 7, 2, 1, 1, 1, 1, 2, 6, 1, 7, 6, 4, 2, 1, 2, 6, 1, 7, 6, 46, 1, 9, 1, 8, 1, 715, 3, 742, 1, 27, 8, 94, 1, 24, 1, 4, 2, 1, 1,
    83, 1, 2, 1, 34, 3, 2, 1, 223, 1, 23, 2, 4, 2, 96, 1, 24, 1, 126, 1, 107, 1, 18, 2, 103, 1, 24, 1, 114, 1, 4, 1, 15, 1, 355, 1, 9, 1,
    4, 1, 4, 1, 4, 1, 12, 1, 9, 1, 1, 2, 1, 1, 8, 1, 17, 1, 9, 1, 4, 1, 4, 1, 4, 1, 12, 1, 116, 1, 306, 21, 50, 27, 2418, 1, 1083, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 61, 1, 2, 1, 10, 1, 1, 1, 7, 1, 7, 1, 7, 1, 7, 1, 2, 2, 9, 1, 1, 1, 1, 1, 2, 2, 292, 1, 3, 2, 509, 2,
    1969, 1, 1468, 2, 51301, 270, 2, 1, 1, 1, 2, 10, 1, 1, 1, 1, 2, 2, 3, 68, 2, 106, 67, 1, 1, 1, 10, 13, 1, 5, 1, 1, 1, 2, 1, 2, 1, 9,
    5483, 1, 108, 1, 534, 1, 24, 1, 344, 1, 9, 1, 2, 1, 241, 1, 896, 1, 47149, 7, 86, 6, 65535, 0, 9792, 542};
// clang-format on

enum {
    TOK_LETTER = 1,
    TOK_NUMBER = 2,
    TOK_SPACE = 4,
    TOK_UNSTABLE = 8,
    TOK_MAX_STEPS = 16,
    TOK_MAX_ID = 1 << 22,
    TOK_MAX_ADDED = 512,
    TOK_MAX_PROBE = 1024
};
enum { TOK_ONLY_FIRST = 1, TOK_UNLESS_THERE = 2 }; // PREPEND only to the beginning of the text; only where a is not there already

// A list of strings, end to end in one buffer: every step of encoding and decoding maps one such list to another. Running out of memory
// sets `failed`, for callers to look at once at the end.
typedef struct {
    char *bytes;
    size_t size, room, *end, count, slots;
    bool failed;
} tok_pieces;

// One step of a normalizer, pre-tokenizer or decoder; Sequences are flattened into lists of them.
typedef enum {
    TOK_PREPEND,       // a in front of text that is not empty; flags below
    TOK_REPLACE,       // a by b; flag: in the first piece by nothing
    TOK_NFC,           // checks that the text is in that form already
    TOK_BYTE_LEVEL,    // bytes to printable characters
    TOK_SPLIT,         // into words: GPT-2's pattern, or Llama 3's if flag, which says how many digits make a piece
    TOK_DIGITS,        // numbers apart from the rest; flag: each digit for itself
    TOK_CUT_BEFORE,    // a piece begins at every a
    TOK_UNBYTE_LEVEL,  // printable characters to bytes, all in one piece
    TOK_LOSSY,         // invalid UTF-8 to U+FFFD
    TOK_BYTE_FALLBACK, // tokens like <0x0A> to bytes
    TOK_FUSE,          // all in one piece
    TOK_STRIP,         // one a off the front
    TOK_JOIN           // no decoder: spaces between tokens
} tok_step_kind;
typedef struct {
    tok_step_kind kind;
    const char *a, *b;
    size_t a_size, b_size;
    int flag;
} tok_step;
typedef struct {
    tok_step at[TOK_MAX_STEPS];
    size_t count;
} tok_steps;

typedef struct {
    const char *text;
    size_t size;
    bool used, model, special; // model: BPE may produce it; not so for most added tokens
} tok_token;
typedef struct {
    const char *text; // as it is searched for: normalized if it says so
    size_t size;
    int32_t id;
    bool strip_left, strip_right;
} tok_added_token;
typedef struct {
    tok_added_token *at; // sorted by text
    size_t count;
    bool first[256]; // bytes a token begins with
} tok_added_set;
typedef struct {
    uint64_t pair; // left id << 32 | right id
    uint32_t rank; // 1 and up; 0 is a free slot
    int32_t id;
} tok_merge;

struct retrofit_tokenizer {
    char *strings; // what tokens and steps point to
    size_t strings_used, size, merge_mask, token_mask;
    tok_token *tokens;
    int32_t *by_text;       // open-addressed hash table of id + 1; token_mask is its size - 1
    tok_merge *merges;      // the same by pair
    tok_added_set added[2]; // searched for in the text as given, and as normalized
    tok_pieces added_text;
    tok_steps normalizer, pre_tokenizer, decoder;
    int32_t before[TOK_MAX_STEPS], after[TOK_MAX_STEPS]; // what with_special adds
    size_t before_count, after_count;
    int32_t bos, eos, unk, byte_ids[256];
    bool fuse_unk, byte_fallback, ignore_merges, meet[1 << 16]; // meet: see tok_meeting
    uint16_t *unicode; // by code point: class bits, combining class << 8; most of it pages never touched
};

static bool tok_grow(void **p, size_t *room, size_t need, size_t each) {
    if (need <= *room) return true;
    size_t more = need + need / 2 + 64;
    void *bigger = more < need || more > SIZE_MAX / each ? NULL : realloc(*p, more * each);
    if (!bigger) return fail("out of memory: %zu x %zu bytes", need, each);
    *p = bigger, *room = more;
    return true;
}

static void tok_put(tok_pieces *p, const char *bytes, size_t n) {
    void *buffer = p->bytes;
    if (p->failed || !tok_grow(&buffer, &p->room, p->size + n + 1, 1)) p->failed = true;
    p->bytes = (char *)buffer;
    if (p->failed || !n) return;
    memcpy(p->bytes + p->size, bytes, n);
    p->size += n;
}

static void tok_cut(tok_pieces *p) {
    tok_put(p, "", 0); // so that bytes is never NULL where there is a piece
    void *ends = p->end;
    if (p->failed || !tok_grow(&ends, &p->slots, p->count + 1, sizeof *p->end)) p->failed = true;
    p->end = (size_t *)ends;
    if (!p->failed) p->end[p->count++] = p->size;
}

static void tok_clear(tok_pieces *p) { p->size = p->count = 0; }
static void tok_pieces_free(tok_pieces *p) { free(p->bytes), free(p->end); }

static void tok_put_lossy(tok_pieces *p, const char *s, size_t n) {
    size_t start = 0, i = 0, k;
    for (uint32_t c; i < n; i += k) {
        k = utf8_next(s + i, n - i, &c);
        if (c != UTF8_INVALID) continue;
        tok_put(p, s + start, i - start), tok_put(p, "\xef\xbf\xbd", 3);
        start = i + k;
    }
    tok_put(p, s + start, n - start);
}

// Byte-level alphabets show a byte that is not printable Latin-1 as the next free code point from 256 up.
static uint32_t tok_byte_to_char(unsigned byte) {
    if (byte <= 32) return 256 + byte;
    if (byte >= 127 && byte <= 160) return 256 + 33 + byte - 127;
    return byte == 173 ? 256 + 67 : byte;
}

static int tok_char_to_byte(uint32_t c) {
    uint32_t byte = c < 256 ? c : c < 256 + 33 ? c - 256 : c < 256 + 67 ? c - 256 - 33 + 127 : 173;
    return c <= 256 + 67 && tok_byte_to_char(byte) == c ? (int)byte : -1;
}

static int tok_class_of(const retrofit_tokenizer *t, uint32_t c) { return t->unicode[c] & 0xff; }

// The length of the run of characters at s[i..n) that are in (or, if `out`, out of) the classes.
static size_t tok_run_of(const retrofit_tokenizer *t, const char *s, size_t i, size_t n, int classes, bool out) {
    size_t start = i;
    for (uint32_t c; i < n;) {
        size_t k = utf8_next(s + i, n - i, &c);
        if (((tok_class_of(t, c) & classes) != 0) == out) break;
        i += k;
    }
    return i - start;
}

// The length of 's 't 'm 'd 're 've 'll at s, or 0. fold is (?i:...), to which long s (U+017F) is an s too.
static size_t tok_contraction(const char *s, size_t n, bool fold) {
    if (n < 2 || s[0] != '\'') return 0;
    if (fold && n > 2 && !memcmp(s + 1, "\xc5\xbf", 2)) return 3;
    char a = s[1], b = n > 2 ? s[2] : 0;
    if (fold) a = (char)(a >= 'A' && a <= 'Z' ? a | 32 : a), b = (char)(b >= 'A' && b <= 'Z' ? b | 32 : b);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

// The length of the pattern's match at s, n > 0, alternative by alternative; every character is in one. digits: 0 is GPT-2's pattern
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// and otherwise Llama 3's, with at most so many digits:
//   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
static size_t tok_split_match(const retrofit_tokenizer *t, const char *s, size_t n, int digits) {
    uint32_t c;
    size_t k = tok_contraction(s, n, digits != 0), first = utf8_next(s, n, &c), lead = c == ' ', spaces, last = 0, newline = 0;
    if (k) return k;
    int class_ = tok_class_of(t, c);
    size_t letters_from = !digits ? lead : class_ & (TOK_LETTER | TOK_NUMBER) || c == '\r' || c == '\n' ? 0 : first;
    if ((k = tok_run_of(t, s, letters_from, n, TOK_LETTER, false))) return letters_from + k;
    if (!digits && (k = tok_run_of(t, s, lead, n, TOK_NUMBER, false))) return lead + k;
    if (class_ & TOK_NUMBER) {
        for (k = 0; digits-- && k < n; k += first) {
            first = utf8_next(s + k, n - k, &c);
            if (!(tok_class_of(t, c) & TOK_NUMBER)) break;
        }
        return k;
    }
    if ((k = tok_run_of(t, s, lead, n, TOK_SPACE | TOK_LETTER | TOK_NUMBER, true))) {
        k += lead;
        while (digits && k < n && (s[k] == '\r' || s[k] == '\n')) k++;
        return k;
    }
    for (spaces = 0; spaces < n; last = spaces, spaces += k) {
        k = utf8_next(s + spaces, n - spaces, &c);
        if (!(tok_class_of(t, c) & TOK_SPACE)) break;
        if (c == '\r' || c == '\n') newline = spaces + 1;
    }
    if (digits && newline) return newline;
    return spaces == n ? n : last ? last : spaces; // the last space before a word goes with the word
}

// Cuts text into pieces: numbers apart from the rest, and from each other if `each`.
static void tok_split_digits(const retrofit_tokenizer *t, tok_pieces *out, const char *s, size_t n, bool each) {
    uint32_t c;
    for (size_t i = 0, k; i < n; i += k) {
        bool number = tok_class_of(t, (utf8_next(s + i, n - i, &c), c)) & TOK_NUMBER;
        k = number && each ? utf8_next(s + i, n - i, &c) : tok_run_of(t, s, i, n, TOK_NUMBER, !number);
        tok_put(out, s + i, k), tok_cut(out);
    }
}

// False if s may not be in NFC: Unicode's quick check, which takes all but texts with decomposed (or very rare) characters.
static bool tok_is_nfc(const retrofit_tokenizer *t, const char *s, size_t n) {
    uint32_t c;
    unsigned before = 0, combining;
    for (size_t i = 0; i < n; before = combining) {
        i += utf8_next(s + i, n - i, &c);
        combining = t->unicode[c] >> 8;
        if (tok_class_of(t, c) & TOK_UNSTABLE || (combining && combining < before)) return false;
    }
    return true;
}

// The byte that a token "<0x0A>" stands for, or -1.
static int tok_fallback_byte(const char *s, size_t n) {
    static const char hex[] = "0123456789ABCDEF0123456789abcdef";
    if (n != 6 || memcmp(s, "<0x", 3) || s[5] != '>' || !s[3] || !s[4]) return -1;
    const char *high = strchr(hex, s[3]), *low = strchr(hex, s[4]);
    return high && low ? (int)((high - hex) % 16 * 16 + (low - hex) % 16) : -1;
}

// A run of fallback bytes, out's last from `start` on, is kept if it is UTF-8 as a whole; otherwise each byte becomes U+FFFD.
static void tok_end_fallback(tok_pieces *out, size_t start) {
    uint32_t c = 0;
    size_t n = out->size - start;
    if (out->failed || !n) return;
    for (size_t i = start; i < out->size && c != UTF8_INVALID;) i += utf8_next(out->bytes + i, out->size - i, &c);
    if (c == UTF8_INVALID)
        for (out->size = start; n--;) tok_put(out, "\xef\xbf\xbd", 3);
    tok_cut(out);
}

// One step from `in` to `out`. first: in begins at the beginning of the whole text.
static bool tok_apply(const retrofit_tokenizer *t, const tok_step *st, const tok_pieces *in, tok_pieces *out, bool first) {
    tok_clear(out);
    size_t run = 0; // where the current run of fallback bytes starts in out
    for (size_t i = 0, from = 0, n, k; i < in->count; from = in->end[i++]) {
        const char *s = in->bytes + from, *hit;
        n = in->end[i] - from;
        switch (st->kind) {
        case TOK_PREPEND:
            if (n && !(st->flag & TOK_ONLY_FIRST && (i || !first)) &&
                !(st->flag & TOK_UNLESS_THERE && n >= st->a_size && !memcmp(s, st->a, st->a_size)))
                tok_put(out, st->a, st->a_size);
            tok_put(out, s, n), tok_cut(out);
            break;
        case TOK_REPLACE:
            for (; (hit = (const char *)memmem(s, n, st->a, st->a_size)); n -= k, s += k) {
                k = (size_t)(hit - s) + st->a_size;
                tok_put(out, s, k - st->a_size), tok_put(out, st->b, st->flag && !i ? 0 : st->b_size);
            }
            tok_put(out, s, n), tok_cut(out);
            break;
        case TOK_NFC:
            if (!tok_is_nfc(t, s, n)) return fail("the tokenizer wants text in Unicode form NFC, and this may not be: convert it first");
            tok_put(out, s, n), tok_cut(out);
            break;
        case TOK_BYTE_LEVEL:
            for (k = 0; k < n; k++) {
                char c[4];
                tok_put(out, c, utf8_put(tok_byte_to_char((unsigned char)s[k]), c));
            }
            tok_cut(out);
            break;
        case TOK_SPLIT:
            for (; n; s += k, n -= k) tok_put(out, s, k = tok_split_match(t, s, n, st->flag)), tok_cut(out);
            break;
        case TOK_DIGITS: tok_split_digits(t, out, s, n, st->flag); break;
        case TOK_CUT_BEFORE:
            for (; n; s += k, n -= k) {
                hit = n > st->a_size ? (const char *)memmem(s + 1, n - 1, st->a, st->a_size) : NULL;
                tok_put(out, s, k = hit ? (size_t)(hit - s) : n), tok_cut(out);
            }
            break;
        case TOK_UNBYTE_LEVEL:
            run = out->size;
            for (size_t j = 0; j < n;) {
                uint32_t c;
                j += utf8_next(s + j, n - j, &c);
                char byte = (char)tok_char_to_byte(c);
                if (tok_char_to_byte(c) >= 0) tok_put(out, &byte, 1);
                else out->size = run, tok_put(out, s, n), j = n; // not byte-level, an added token: as it is
            }
            break;
        case TOK_LOSSY: tok_put_lossy(out, s, n), tok_cut(out); break;
        case TOK_BYTE_FALLBACK: {
            int value = tok_fallback_byte(s, n);
            char byte = (char)value;
            if (value >= 0) tok_put(out, &byte, 1);
            else tok_end_fallback(out, run), tok_put(out, s, n), tok_cut(out), run = out->size;
            break;
        }
        case TOK_FUSE: tok_put(out, s, n); break;
        case TOK_STRIP:
            k = n >= st->a_size && !memcmp(s, st->a, st->a_size) ? st->a_size : 0;
            tok_put(out, s + k, n - k), tok_cut(out);
            break;
        case TOK_JOIN: tok_put(out, " ", i > 0), tok_put(out, s, n), tok_cut(out); break;
        }
    }
    if (st->kind == TOK_BYTE_FALLBACK) tok_end_fallback(out, run);
    if (st->kind == TOK_FUSE || st->kind == TOK_UNBYTE_LEVEL) tok_cut(out);
    return !out->failed;
}

// All steps; what p[0] holds is replaced by the result, p[1] is scratch.
static bool tok_apply_all(const retrofit_tokenizer *t, const tok_steps *list, tok_pieces p[2], bool first) {
    for (size_t i = 0; i < list->count; i++) {
        if (!tok_apply(t, &list->at[i], &p[0], &p[1], first)) return false;
        tok_pieces swap = p[0];
        p[0] = p[1], p[1] = swap;
    }
    return !p[0].failed;
}

// The slot of a token's text: its own, or the free one where it would go; SIZE_MAX after MAX_PROBE steps, which only a file made to
// collide needs.
static size_t tok_text_slot(const retrofit_tokenizer *t, const char *s, size_t n) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++) hash = (hash ^ (unsigned char)s[i]) * 0x100000001b3u;
    hash ^= hash >> 29;
    for (size_t probe = 0; probe < TOK_MAX_PROBE; probe++) {
        size_t slot = (size_t)(hash + probe) & t->token_mask;
        const tok_token *k = t->by_text[slot] ? &t->tokens[t->by_text[slot] - 1] : NULL;
        if (!k || (k->size == n && !memcmp(k->text, s, n))) return slot;
    }
    return SIZE_MAX;
}

static int32_t tok_find_token(const retrofit_tokenizer *t, const char *s, size_t n, bool model) {
    size_t slot = tok_text_slot(t, s, n);
    int32_t id = slot == SIZE_MAX ? -1 : t->by_text[slot] - 1;
    return id >= 0 && model && !t->tokens[id].model ? -1 : id;
}

static tok_merge *tok_merge_slot(const retrofit_tokenizer *t, int32_t left, int32_t right) {
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right, hash = pair * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
    for (size_t probe = 0; probe < TOK_MAX_PROBE; probe++) {
        tok_merge *m = &t->merges[(size_t)(hash + probe) & t->merge_mask];
        if (!m->rank || m->pair == pair) return m;
    }
    return NULL;
}

typedef struct {
    int32_t id; // -1: merged into the one before
    uint32_t previous, next;
} tok_symbol;
typedef struct {
    uint64_t order; // rank << 32 | position: lowest rank first, then leftmost
    int32_t id;
} tok_candidate;
typedef struct {
    const retrofit_tokenizer *t;
    tok_pieces text[2], work[2];
    tok_symbol *symbols;
    tok_candidate *heap;
    int32_t *ids;
    size_t symbol_count, symbol_room, heap_count, heap_room, count, room;
} tok_encoder;

static bool tok_add_id(tok_encoder *e, int32_t id) {
    void *ids = e->ids;
    if (!tok_grow(&ids, &e->room, e->count + 1, sizeof *e->ids)) return false;
    e->ids = (int32_t *)ids, e->ids[e->count++] = id;
    return true;
}

static bool tok_add_symbol(tok_encoder *e, int32_t id) {
    void *symbols = e->symbols;
    size_t i = e->symbol_count;
    if (i >= UINT32_MAX - 1) return fail("more than %u symbols in one piece of text: encode it in parts", UINT32_MAX - 1);
    if (!tok_grow(&symbols, &e->symbol_room, i + 1, sizeof *e->symbols)) return false;
    e->symbols = (tok_symbol *)symbols;
    tok_symbol s = {id, (uint32_t)i - 1, (uint32_t)i + 1}; // for the first, previous is UINT32_MAX
    e->symbols[e->symbol_count++] = s;
    return true;
}

// Queues the merge of the symbol at `at` with the next one, if there is such a merge.
static bool tok_add_candidate(tok_encoder *e, uint32_t at) {
    uint32_t next = at == UINT32_MAX ? at : e->symbols[at].next;
    if (next >= e->symbol_count) return true;
    const tok_merge *m = tok_merge_slot(e->t, e->symbols[at].id, e->symbols[next].id);
    if (!m || !m->rank) return true;
    void *heap = e->heap;
    if (!tok_grow(&heap, &e->heap_room, e->heap_count + 1, sizeof *e->heap)) return false;
    e->heap = (tok_candidate *)heap;
    tok_candidate c = {(uint64_t)m->rank << 32 | at, m->id};
    size_t i = e->heap_count++;
    for (; i && e->heap[(i - 1) / 2].order > c.order; i = (i - 1) / 2) e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = c;
    return true;
}

static tok_candidate tok_best_candidate(tok_encoder *e) {
    tok_candidate best = e->heap[0], c = e->heap[--e->heap_count];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < e->heap_count; i = child) {
        if (child + 1 < e->heap_count && e->heap[child + 1].order < e->heap[child].order) child++;
        if (e->heap[child].order >= c.order) break;
        e->heap[i] = e->heap[child];
    }
    e->heap[i] = c;
    return best;
}

// Merges the lowest-ranked, leftmost pair of the symbols until none is left, and moves what remains to the ids.
static bool tok_merge_symbols(tok_encoder *e) {
    for (uint32_t i = 0; i + 1 < e->symbol_count; i++)
        if (!tok_add_candidate(e, i)) return false;
    while (e->heap_count) {
        tok_candidate c = tok_best_candidate(e);
        tok_symbol *left = &e->symbols[(uint32_t)c.order];
        if (left->id < 0 || left->next >= e->symbol_count) continue;
        tok_symbol *right = &e->symbols[left->next];
        const tok_merge *m = tok_merge_slot(e->t, left->id, right->id);
        if (!m || !m->rank || m->id != c.id) continue; // outdated: one of the two has merged since
        left->id = c.id, left->next = right->next, right->id = -1;
        if (left->next < e->symbol_count) e->symbols[left->next].previous = (uint32_t)c.order;
        if (!tok_add_candidate(e, left->previous) || !tok_add_candidate(e, (uint32_t)c.order)) return false;
    }
    for (size_t i = 0; i < e->symbol_count; i = e->symbols[i].next)
        if (!tok_add_id(e, e->symbols[i].id)) return false;
    e->symbol_count = 0;
    return true;
}

// Where a merge of tokens that end in a and begin with b is noted: characters that meet in no merge part words. Chance hits cost only time.
static size_t tok_meeting(uint32_t a, uint32_t b) { return (a * 0x9e3779b1u ^ b * 0x85ebca77u) >> 16; }

// Byte-pair encoding of one piece. Characters without a token become byte tokens, the unknown token, or nothing, in that order.
static bool tok_encode_piece(tok_encoder *e, const char *s, size_t n) {
    const retrofit_tokenizer *t = e->t;
    int32_t whole = t->ignore_merges ? tok_find_token(t, s, n, true) : -1;
    if (whole >= 0) return tok_add_id(e, whole);
    bool unknown = false; // an unknown token is due before the next known one; later bytes overtake it, as in Hugging Face's
    uint32_t c, before = UTF8_INVALID;
    for (size_t i = 0, k; i < n; i += k) {
        k = utf8_next(s + i, n - i, &c);
        int32_t id = tok_find_token(t, s + i, k, true);
        if (id >= 0) {
            // Without this cut a SentencePiece text would be one word of megabytes: the result is the same, the queue stays in cache.
            if (before != UTF8_INVALID && !t->meet[tok_meeting(before, c)] && !tok_merge_symbols(e)) return false;
            if ((unknown && !tok_add_symbol(e, t->unk)) || !tok_add_symbol(e, id)) return false;
            unknown = false, before = c;
            continue;
        }
        before = UTF8_INVALID;
        size_t bytes = 0;
        while (t->byte_fallback && bytes < k && t->byte_ids[(unsigned char)s[i + bytes]] >= 0) bytes++;
        for (size_t j = 0; bytes == k && j < k; j++)
            if (!tok_add_symbol(e, t->byte_ids[(unsigned char)s[i + j]])) return false;
        if (bytes == k || t->unk < 0) continue;
        if (unknown && !t->fuse_unk && !tok_add_symbol(e, t->unk)) return false;
        unknown = true;
    }
    return (!unknown || tok_add_symbol(e, t->unk)) && tok_merge_symbols(e);
}

// The longest added token that s begins with, or NULL: narrows the sorted list byte by byte.
static const tok_added_token *tok_match_added(const tok_added_set *set, const char *s, size_t n) {
    const tok_added_token *best = NULL;
    size_t low = 0, high = set->count;
    if (!set->first[(unsigned char)s[0]]) return NULL;
    for (size_t depth = 0; low < high; depth++) {
        if (set->at[low].size == depth) best = &set->at[low++];
        if (depth == n) break;
        unsigned byte = (unsigned char)s[depth];
        for (int bound = 0; bound < 2; bound++) { // the first entry with at least this byte, then the first with more
            size_t a = low, b = high;
            while (a < b) {
                size_t middle = a + (b - a) / 2;
                if ((unsigned char)set->at[middle].text[depth] < byte + (unsigned)bound) a = middle + 1;
                else b = middle;
            }
            if (bound) high = a;
            else low = a;
        }
    }
    return best;
}

static bool tok_encode_text(tok_encoder *e, const char *s, size_t n, bool normalized, bool first);

// Text without added tokens: normalizes it, or, if it is normalized, cuts it into pieces and encodes those.
static bool tok_encode_gap(tok_encoder *e, const char *s, size_t n, bool normalized, bool first) {
    if (!n) return true;
    tok_pieces *p = normalized ? e->work : e->text;
    tok_clear(p);
    tok_put(p, s, n), tok_cut(p);
    if (!tok_apply_all(e->t, normalized ? &e->t->pre_tokenizer : &e->t->normalizer, p, first)) return false;
    if (!normalized) return tok_encode_text(e, p->bytes, p->size, true, first);
    for (size_t i = 0, from = 0; i < p->count; from = p->end[i++])
        if (p->end[i] > from && !tok_encode_piece(e, p->bytes + from, p->end[i] - from)) return false;
    return true;
}

// Finds added tokens, leftmost and longest first, and encodes what is between them.
static bool tok_encode_text(tok_encoder *e, const char *s, size_t n, bool normalized, bool first) {
    const tok_added_set *set = &e->t->added[normalized];
    size_t done = 0;
    for (size_t i = 0; i < n;) {
        const tok_added_token *a = tok_match_added(set, s + i, n - i);
        if (!a) {
            i++;
            continue;
        }
        size_t start = i, c, end = i += a->size; // searching goes on behind the token itself, whatever it strips
        if (a->strip_right) end += tok_run_of(e->t, s, end, n, TOK_SPACE, false);
        while (a->strip_left && start > done) {
            for (c = start - 1; c > done && ((unsigned char)s[c] & 0xc0) == 0x80;) c--;
            if (!tok_run_of(e->t, s, c, start, TOK_SPACE, false)) break;
            start = c;
        }
        if (start > done && !tok_encode_gap(e, s + done, start - done, normalized, first && !done)) return false;
        if (!tok_add_id(e, a->id)) return false;
        done = end;
    }
    return tok_encode_gap(e, s + done, n - done, normalized, first && !done);
}

int32_t *retrofit_encode(const retrofit_tokenizer *t, const char *text, size_t size, bool with_special, size_t *count) {
    tok_encoder e;
    memset(&e, 0, sizeof e);
    e.t = t;
    tok_pieces valid = e.text[0];
    tok_put_lossy(&valid, size ? text : "", size);
    bool ok = !valid.failed && tok_grow((void **)&e.ids, &e.room, 1, sizeof *e.ids);
    for (size_t i = 0; ok && with_special && i < t->before_count; i++) ok = tok_add_id(&e, t->before[i]);
    ok = ok && tok_encode_text(&e, valid.bytes, valid.size, false, true);
    for (size_t i = 0; ok && with_special && i < t->after_count; i++) ok = tok_add_id(&e, t->after[i]);
    tok_pieces_free(&valid);
    for (int i = 0; i < 2; i++) tok_pieces_free(&e.text[i]), tok_pieces_free(&e.work[i]);
    free(e.symbols), free(e.heap);
    if (ok) return *count = e.count, e.ids;
    free(e.ids);
    return NULL;
}

char *retrofit_decode(const retrofit_tokenizer *t, const int32_t *ids, size_t count, bool skip_special, size_t *size) {
    tok_pieces p[2];
    memset(p, 0, sizeof p);
    bool ok = true;
    for (size_t i = 0; ok && i < count; i++) {
        const tok_token *k = ids[i] >= 0 && (size_t)ids[i] < t->size ? &t->tokens[ids[i]] : NULL;
        if (!k || !k->used) ok = fail("id %d (number %zu of %zu) is no token's: ids go up to %zu", (int)ids[i], i, count, t->size - 1);
        else if (!skip_special || !k->special) tok_put(p, k->text, k->size), tok_cut(p);
    }
    ok = ok && tok_apply_all(t, &t->decoder, p, true);
    if (ok) *size = p->size, tok_put(p, "", 1);
    tok_pieces_free(&p[1]);
    if (ok && !p->failed) return free(p->end), p->bytes;
    tok_pieces_free(p);
    return NULL;
}

char *retrofit_decode_next(const retrofit_tokenizer *t, retrofit_stream *s, const int32_t *ids, size_t count, bool skip_special, bool last,
                           size_t *size) {
    if (s->from > s->done || s->done > count)
        return fail("a stream at token %zu cannot go on with %zu tokens: zero it to start again", s->done, count), (char *)NULL;
    size_t old_size = 0;
    if (count) ids += s->from;
    char *text = retrofit_decode(t, ids, count - s->from, skip_special, size);
    char *old = text ? retrofit_decode(t, ids, s->done - s->from, skip_special, &old_size) : NULL;
    bool wait = false;
    if (old && !last && count > s->from) { // U+FFFD may become a character; fallback bytes count only when their run is over
        size_t end = count - s->from;
        while (end > 1 && skip_special && t->tokens[ids[end - 1]].special) end--;
        const tok_token *k = &t->tokens[ids[end - 1]];
        wait = *size >= 3 && !memcmp(text + *size - 3, "\xef\xbf\xbd", 3);
        for (size_t i = 0; i < t->decoder.count; i++)
            wait |= t->decoder.at[i].kind == TOK_BYTE_FALLBACK && tok_fallback_byte(k->text, k->size) >= 0;
    }
    if (old && (old_size > *size || memcmp(text, old, old_size)))
        fail("tokens %zu to %zu change text already given out: decode them together", s->done, count), free(old), old = NULL;
    free(old);
    if (!old) return free(text), (char *)NULL;
    *size = wait ? 0 : *size - old_size;
    memmove(text, text + old_size, *size);
    text[*size] = 0;
    if (*size) s->from = s->done, s->done = count; // else keep a window that yields text: only its first space may go
    return text;
}

int32_t retrofit_tokenizer_bos(const retrofit_tokenizer *t) { return t->bos; }
int32_t retrofit_tokenizer_eos(const retrofit_tokenizer *t) { return t->eos; }
int32_t retrofit_tokenizer_id(const retrofit_tokenizer *t, const char *token) { return tok_find_token(t, token, strlen(token), false); }
size_t retrofit_tokenizer_size(const retrofit_tokenizer *t) { return t->size; }

// What loading needs in every function. Errors stick: the first one is reported, and what is returned after it does not matter.
typedef struct {
    retrofit_tokenizer *t;
    const char *where;
    bool bad, template_seen;
} tok_loader;

static bool tok_refuse(tok_loader *l, const char *what, const char *which) {
    if (!l->bad) fail("%s: %s \"%.200s\"", l->where, what, which);
    l->bad = true;
    return false;
}

static const retrofit_json *tok_present(const retrofit_json *object, const char *key) { // null is as good as absent
    const retrofit_json *v = retrofit_json_get(object, key);
    return v && v->type == RETROFIT_JSON_NULL ? NULL : v;
}

static bool tok_get_flag(tok_loader *l, const retrofit_json *object, const char *key, bool otherwise) {
    const retrofit_json *v = tok_present(object, key);
    if (!v) return otherwise;
    if (v->type != RETROFIT_JSON_BOOL) tok_refuse(l, "expected true or false as", key);
    return v->number != 0;
}

static const retrofit_json *tok_get(tok_loader *l, const retrofit_json *object, const char *key, retrofit_json_type type) {
    static const retrofit_json none[] = {{RETROFIT_JSON_NULL, 0, 0, 0, "", "", 0, NULL, NULL}};
    const retrofit_json *v = retrofit_json_get(object, key);
    if (v && v->type == type) return v;
    tok_refuse(l, "missing, or of the wrong type:", key);
    return none;
}

static int32_t tok_get_id(tok_loader *l, const retrofit_json *v) {
    if (v->type == RETROFIT_JSON_NUMBER && v->number >= 0 && v->number < TOK_MAX_ID && v->number == floor(v->number))
        return (int32_t)v->number;
    tok_refuse(l, "not a token id from 0 to 4194303:", v->string ? v->string : "");
    return 0;
}

// A copy of a string of the file, which outlives the parsed JSON. The file's size is room for all of them.
static const char *tok_keep(tok_loader *l, const char *s, size_t n) {
    char *copy = l->t->strings + l->t->strings_used;
    memcpy(copy, s, n + 1);
    l->t->strings_used += n + 1;
    return copy;
}

// Refuses members whose name is not one of the words in `known`, which has spaces around all.
static void tok_only(tok_loader *l, const retrofit_json *object, const char *known) {
    if (object->type != RETROFIT_JSON_OBJECT) tok_refuse(l, "expected an object with", known);
    for (const retrofit_json *m = object->child; m && object->type == RETROFIT_JSON_OBJECT; m = m->next) {
        char word[64];
        snprintf(word, sizeof word, " %s ", m->key);
        if (m->key_length > 60 || strlen(m->key) != m->key_length || strchr(m->key, ' ') || !strstr(known, word))
            tok_refuse(l, "this implementation does not know the key", m->key);
    }
}

static tok_step *tok_add_step(tok_loader *l, tok_steps *list, tok_step_kind kind, int flag) {
    if (list->count == TOK_MAX_STEPS) tok_refuse(l, "too many steps in a", "Sequence"), list->count--;
    tok_step *st = &list->at[list->count++];
    memset(st, 0, sizeof *st);
    st->kind = kind, st->flag = flag;
    return st;
}

static void tok_set_a(tok_loader *l, tok_step *st, const retrofit_json *string) {
    st->a = tok_keep(l, string->string, string->length), st->a_size = string->length;
    if (!st->a_size) tok_refuse(l, "empty, and should not be:", string->key ? string->key : "");
}

static void tok_load_replace(tok_loader *l, const retrofit_json *o, tok_steps *list) {
    const retrofit_json *pattern = tok_get(l, o, "pattern", RETROFIT_JSON_OBJECT),
                        *content = tok_get(l, o, "content", RETROFIT_JSON_STRING);
    tok_only(l, o, " type pattern content "), tok_only(l, pattern, " String ");
    tok_step *st = tok_add_step(l, list, TOK_REPLACE, 0);
    tok_set_a(l, st, tok_get(l, pattern, "String", RETROFIT_JSON_STRING));
    st->b = tok_keep(l, content->string, content->length), st->b_size = content->length;
}

static void tok_load_split(tok_loader *l, const retrofit_json *o, tok_steps *list) {
    static const struct {
        const char *pattern;
        int digits;
    } known[] = {
        {"'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", 0},
        {"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| "
         "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
         3},
        {"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
         1},
    };
    const retrofit_json *pattern = tok_get(l, o, "pattern", RETROFIT_JSON_OBJECT);
    tok_only(l, o, " type pattern behavior invert "), tok_only(l, pattern, " Regex ");
    const char *regex = tok_get(l, pattern, "Regex", RETROFIT_JSON_STRING)->string;
    const char *behavior = tok_get(l, o, "behavior", RETROFIT_JSON_STRING)->string;
    if (strcmp(behavior, "Isolated")) tok_refuse(l, "only the behavior Isolated is supported, not", behavior);
    if (tok_get_flag(l, o, "invert", false)) tok_refuse(l, "not supported as true:", "invert");
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(regex, known[i].pattern)) return (void)tok_add_step(l, list, TOK_SPLIT, known[i].digits);
    tok_refuse(l, "only the patterns of GPT-2, Llama 3 and Qwen 2 are supported, not", regex);
}

// Metaspace is a pre-tokenizer and a decoder. Older files say add_prefix_space, newer ones prepend_scheme.
static void tok_load_metaspace(tok_loader *l, const retrofit_json *o, tok_steps *list, bool decoder) {
    tok_only(l, o, " type replacement add_prefix_space prepend_scheme split str_rep ");
    const retrofit_json *mark = tok_get(l, o, "replacement", RETROFIT_JSON_STRING);
    const char *scheme = tok_get_flag(l, o, "add_prefix_space", true) ? "always" : "never";
    if (tok_present(o, "prepend_scheme")) scheme = tok_get(l, o, "prepend_scheme", RETROFIT_JSON_STRING)->string;
    bool never = !strcmp(scheme, "never"), first = !strcmp(scheme, "first");
    if (!never && !first && strcmp(scheme, "always")) tok_refuse(l, "unknown prepend_scheme", scheme);
    if (first && !decoder && (list->count || l->t->normalizer.count))
        tok_refuse(l, "supported only without steps before it: prepend_scheme", scheme);
    tok_step *st = tok_add_step(l, list, TOK_REPLACE, decoder && !never);
    st->a = " ", st->b = tok_keep(l, mark->string, mark->length), st->a_size = 1, st->b_size = mark->length;
    if (decoder) st->a = st->b, st->b = " ", st->a_size = st->b_size, st->b_size = 1;
    uint32_t c;
    if (!mark->length || utf8_next(mark->string, mark->length, &c) != mark->length) tok_refuse(l, "not one character:", "replacement");
    tok_step mark_step = *st;
    if (decoder) return;
    if (!never)
        st = tok_add_step(l, list, TOK_PREPEND, TOK_UNLESS_THERE | (first ? TOK_ONLY_FIRST : 0)), st->a = mark_step.b,
        st->a_size = mark_step.b_size;
    if (tok_get_flag(l, o, "split", true))
        st = tok_add_step(l, list, TOK_CUT_BEFORE, 0), st->a = mark_step.b, st->a_size = mark_step.b_size;
}

static void tok_load_byte_level(tok_loader *l, const retrofit_json *o, tok_steps *list, bool decoder) {
    tok_only(l, o, " type add_prefix_space trim_offsets use_regex ");
    if (decoder) {
        tok_add_step(l, list, TOK_UNBYTE_LEVEL, 0), tok_add_step(l, list, TOK_LOSSY, 0);
        return;
    }
    if (tok_get_flag(l, o, "add_prefix_space", true)) {
        tok_step *st = tok_add_step(l, list, TOK_PREPEND, TOK_UNLESS_THERE);
        st->a = " ", st->a_size = 1;
    }
    if (tok_get_flag(l, o, "use_regex", true)) tok_add_step(l, list, TOK_SPLIT, 0);
    tok_add_step(l, list, TOK_BYTE_LEVEL, 0);
}

static void tok_load_strip(tok_loader *l, const retrofit_json *o, tok_steps *list) {
    tok_only(l, o, " type content start stop ");
    double start = tok_get(l, o, "start", RETROFIT_JSON_NUMBER)->number;
    if (tok_get(l, o, "stop", RETROFIT_JSON_NUMBER)->number != 0 || (start != 0 && start != 1))
        tok_refuse(l, "only start 0 or 1 and stop 0 are supported in", "Strip");
    if (start == 1) tok_set_a(l, tok_add_step(l, list, TOK_STRIP, 0), tok_get(l, o, "content", RETROFIT_JSON_STRING));
}

// Appends the steps of a normalizer, pre_tokenizer or decoder. The parser's depth limit bounds the recursion.
static void tok_load_steps(tok_loader *l, const retrofit_json *o, tok_steps *list, const char *role) {
    const char *type = tok_get(l, o, "type", RETROFIT_JSON_STRING)->string;
    bool normalizer = *role == 'n', pre = *role == 'p', decoder = *role == 'd';
    if (l->bad) return;
    if (!strcmp(type, "Sequence")) {
        const char *key = normalizer ? "normalizers" : pre ? "pretokenizers" : "decoders";
        tok_only(l, o, normalizer ? " type normalizers " : pre ? " type pretokenizers " : " type decoders ");
        for (const retrofit_json *m = tok_get(l, o, key, RETROFIT_JSON_ARRAY)->child; m; m = m->next) tok_load_steps(l, m, list, role);
    } else if (!pre && !strcmp(type, "Replace")) tok_load_replace(l, o, list);
    else if (!normalizer && !strcmp(type, "ByteLevel")) tok_load_byte_level(l, o, list, decoder);
    else if (!normalizer && !strcmp(type, "Metaspace")) tok_load_metaspace(l, o, list, decoder);
    else if (pre && !strcmp(type, "Split")) tok_load_split(l, o, list);
    else if (decoder && !strcmp(type, "Strip")) tok_load_strip(l, o, list);
    else if (normalizer && !strcmp(type, "Prepend"))
        tok_only(l, o, " type prepend "),
            tok_set_a(l, tok_add_step(l, list, TOK_PREPEND, 0), tok_get(l, o, "prepend", RETROFIT_JSON_STRING));
    else if (pre && !strcmp(type, "Digits"))
        tok_only(l, o, " type individual_digits "), tok_add_step(l, list, TOK_DIGITS, tok_get_flag(l, o, "individual_digits", false));
    else if (normalizer && !strcmp(type, "NFC")) tok_only(l, o, " type "), tok_add_step(l, list, TOK_NFC, 0);
    else if (decoder && !strcmp(type, "ByteFallback")) tok_only(l, o, " type "), tok_add_step(l, list, TOK_BYTE_FALLBACK, 0);
    else if (decoder && !strcmp(type, "Fuse")) tok_only(l, o, " type "), tok_add_step(l, list, TOK_FUSE, 0);
    else {
        char what[80];
        snprintf(what, sizeof what, "this implementation does not know the %s", role);
        tok_refuse(l, what, type);
    }
}

static void tok_add_special(tok_loader *l, int32_t id, bool after) {
    retrofit_tokenizer *t = l->t;
    size_t *count = after ? &t->after_count : &t->before_count;
    if (*count == TOK_MAX_STEPS || (size_t)id >= t->size || !t->tokens[id].used)
        return (void)tok_refuse(l, "a bad or a 17th token in", "post_processor");
    (after ? t->after : t->before)[(*count)++] = id;
}

// ByteLevel only moves offsets here. Of several templates Hugging Face applies but the first, which nobody can have wanted.
static void tok_load_post_processor(tok_loader *l, const retrofit_json *o) {
    const char *type = tok_get(l, o, "type", RETROFIT_JSON_STRING)->string;
    if (l->bad) return;
    if (!strcmp(type, "Sequence")) {
        tok_only(l, o, " type processors ");
        for (const retrofit_json *m = tok_get(l, o, "processors", RETROFIT_JSON_ARRAY)->child; m; m = m->next)
            tok_load_post_processor(l, m);
    } else if (!strcmp(type, "TemplateProcessing")) {
        tok_only(l, o, " type single pair special_tokens ");
        const retrofit_json *specials = tok_get(l, o, "special_tokens", RETROFIT_JSON_OBJECT);
        size_t texts = 0;
        if (l->template_seen) tok_refuse(l, "more than one", type);
        l->template_seen = true;
        for (const retrofit_json *m = tok_get(l, o, "single", RETROFIT_JSON_ARRAY)->child; m && !l->bad; m = m->next) {
            tok_only(l, m, " SpecialToken Sequence ");
            const retrofit_json *special = retrofit_json_get(m, "SpecialToken");
            if (!special) {
                const char *id = tok_get(l, tok_get(l, m, "Sequence", RETROFIT_JSON_OBJECT), "id", RETROFIT_JSON_STRING)->string;
                if (strcmp(id, "A") || texts++) tok_refuse(l, "TemplateProcessing should have the text once, as A, not", id);
                continue;
            }
            const retrofit_json *found =
                tok_get(l, specials, tok_get(l, special, "id", RETROFIT_JSON_STRING)->string, RETROFIT_JSON_OBJECT);
            for (const retrofit_json *id = tok_get(l, found, "ids", RETROFIT_JSON_ARRAY)->child; id && !l->bad; id = id->next)
                tok_add_special(l, tok_get_id(l, id), texts > 0);
        }
        if (!texts) tok_refuse(l, "no text in", "TemplateProcessing");
    } else if (strcmp(type, "ByteLevel")) tok_refuse(l, "this implementation does not know the post_processor", type);
}

static void tok_add_token(tok_loader *l, const char *text, size_t size, int32_t id, bool model) {
    retrofit_tokenizer *t = l->t;
    size_t slot = tok_text_slot(t, text, size);
    if (slot == SIZE_MAX) return (void)tok_refuse(l, "too many hash collisions, at token", text);
    if (t->by_text[slot] || t->tokens[id].used) return (void)tok_refuse(l, "this text, or its id, is in the vocabulary twice:", text);
    tok_token k = {tok_keep(l, text, size), size, true, model, false};
    t->tokens[id] = k, t->by_text[slot] = id + 1;
}

// One less than the size of a hash table, a power of two, that count entries fill at most by half.
static size_t tok_mask_for(size_t count) {
    size_t size = 2;
    while (size < 2 * count) size *= 2;
    return size - 1;
}

static int tok_by_added_text(const void *a, const void *b) {
    const tok_added_token *x = (const tok_added_token *)a, *y = (const tok_added_token *)b;
    int order = memcmp(x->text, y->text, x->size < y->size ? x->size : y->size);
    return order ? order : (x->size > y->size) - (x->size < y->size);
}

static void tok_load_vocabulary(tok_loader *l, const retrofit_json *vocabulary, const retrofit_json *added) {
    retrofit_tokenizer *t = l->t;
    for (const retrofit_json *v = vocabulary->child; v; v = v->next) {
        size_t id = (size_t)tok_get_id(l, v);
        if (id >= t->size) t->size = id + 1;
    }
    for (const retrofit_json *v = added->child; v; v = v->next) {
        tok_only(l, v, " id content single_word lstrip rstrip normalized special ");
        size_t id = (size_t)tok_get_id(l, tok_get(l, v, "id", RETROFIT_JSON_NUMBER));
        if (id >= t->size) t->size = id + 1;
    }
    if (!t->size) tok_refuse(l, "no token in the", "vocab");
    t->token_mask = tok_mask_for(vocabulary->count + added->count);
    t->tokens = (tok_token *)allocate(t->size, sizeof *t->tokens);
    t->by_text = (int32_t *)allocate(t->token_mask + 1, sizeof *t->by_text);
    if (!t->tokens || !t->by_text) l->bad = true;
    for (const retrofit_json *v = vocabulary->child; v && !l->bad; v = v->next)
        tok_add_token(l, v->key, v->key_length, tok_get_id(l, v), true);
}

static void tok_load_added(tok_loader *l, const retrofit_json *added) {
    retrofit_tokenizer *t = l->t;
    for (int i = 0; i < 2; i++)
        if (!(t->added[i].at = (tok_added_token *)allocate(added->count, sizeof *t->added[i].at))) l->bad = true;
    for (const retrofit_json *v = added->child; v && !l->bad; v = v->next) {
        const retrofit_json *content = tok_get(l, v, "content", RETROFIT_JSON_STRING);
        const char *text = content->string;
        int32_t id = tok_get_id(l, tok_get(l, v, "id", RETROFIT_JSON_NUMBER)), known = tok_find_token(t, text, content->length, false);
        if (l->bad) return;
        if (known < 0) tok_add_token(l, text, content->length, id, false);
        else if (known != id) tok_refuse(l, "an added token has another id in the vocabulary:", text);
        if (l->bad) return;
        if (tok_get_flag(l, v, "single_word", false)) tok_refuse(l, "single_word is not supported, as in the added token", text);
        bool special = tok_get_flag(l, v, "special", false), normalized = tok_get_flag(l, v, "normalized", !special);
        tok_added_token a = {t->tokens[id].text, content->length, id, tok_get_flag(l, v, "lstrip", false),
                             tok_get_flag(l, v, "rstrip", false)};
        t->tokens[id].special = special;
        // Decoding gives the text as written here, as tokenizers 0.21 does; 0.23 gives the normalized text.
        if (normalized) { // added_text may move while it grows: its texts are pointed to below
            tok_pieces p[2];
            memset(p, 0, sizeof p);
            tok_put(&p[0], text, a.size), tok_cut(&p[0]);
            if (!tok_apply_all(t, &t->normalizer, p, true)) tok_refuse(l, "cannot normalize the added token", text);
            else tok_put(&t->added_text, p[0].bytes, a.size = p[0].size), l->bad |= t->added_text.failed;
            tok_pieces_free(&p[0]), tok_pieces_free(&p[1]);
        }
        // White space stripped on the right could be searched again and again if tokens began with it.
        if (!a.size || a.size > TOK_MAX_ADDED || (a.strip_right && tok_run_of(t, text, 0, content->length, TOK_SPACE, false)))
            tok_refuse(l, "an added token that is empty, longer than 512 bytes, or starts with white space and strips it:", text);
        tok_added_set *set = &t->added[normalized];
        set->at[set->count++] = a;
    }
    for (size_t i = 0, from = 0; i < t->added[1].count; from += t->added[1].at[i++].size)
        t->added[1].at[i].text = t->added_text.bytes + from;
    for (int s = 0; s < 2 && !l->bad; s++) {
        tok_added_set *set = &t->added[s];
        if (set->count) qsort(set->at, set->count, sizeof *set->at, tok_by_added_text);
        for (size_t i = 0; i < set->count; i++) {
            set->first[(unsigned char)set->at[i].text[0]] = true;
            if (i && !tok_by_added_text(&set->at[i - 1], &set->at[i]))
                tok_refuse(l, "listed twice, the added token", t->tokens[set->at[i].id].text);
        }
    }
}

static void tok_load_merges(tok_loader *l, const retrofit_json *merges) {
    retrofit_tokenizer *t = l->t;
    uint32_t rank = 0;
    tok_pieces joined;
    memset(&joined, 0, sizeof joined);
    t->merge_mask = tok_mask_for(merges->count);
    if (!(t->merges = (tok_merge *)allocate(t->merge_mask + 1, sizeof *t->merges))) l->bad = true;
    for (const retrofit_json *m = merges->child; m && !l->bad; m = m->next) {
        const char *part[2] = {m->string, NULL},
                   *space = m->type == RETROFIT_JSON_STRING ? (const char *)memchr(m->string, ' ', m->length) : NULL;
        size_t size[2] = {0, 0};
        if (space) size[0] = (size_t)(space - m->string), part[1] = space + 1, size[1] = m->length - size[0] - 1;
        else if (m->type == RETROFIT_JSON_ARRAY && m->count == 2)
            for (int i = 0; i < 2; i++) {
                const retrofit_json *v = i ? m->child->next : m->child;
                if (v->type == RETROFIT_JSON_STRING) part[i] = v->string, size[i] = v->length;
            }
        if (!part[0] || !part[1]) return tok_refuse(l, "a merge should be [\"a\", \"b\"] or", "a b"), tok_pieces_free(&joined);
        tok_clear(&joined), tok_put(&joined, part[0], size[0]), tok_put(&joined, part[1], size[1]), tok_put(&joined, "", 1);
        if (joined.failed) break;
        int32_t a = tok_find_token(t, part[0], size[0], true), b = tok_find_token(t, part[1], size[1], true);
        int32_t both = tok_find_token(t, joined.bytes, joined.size - 1, true);
        tok_merge *slot = a < 0 || b < 0 || both < 0 ? NULL : tok_merge_slot(t, a, b);
        size_t tail = size[0];
        while (tail && ((unsigned char)part[0][--tail] & 0xc0) == 0x80) {}
        uint32_t end, start;
        utf8_next(part[0] + tail, size[0] - tail, &end), utf8_next(part[1], size[1], &start);
        t->meet[tok_meeting(end, start)] = true;
        if (!slot) tok_refuse(l, "a merge whose parts or result are not in the vocabulary (or collide), with the result", joined.bytes);
        else slot->pair = (uint64_t)(uint32_t)a << 32 | (uint32_t)b, slot->rank = ++rank, slot->id = both; // of equal ones the last counts
    }
    l->bad |= joined.failed;
    tok_pieces_free(&joined);
}

static void tok_load_model(tok_loader *l, const retrofit_json *o, const retrofit_json *added) {
    retrofit_tokenizer *t = l->t;
    tok_only(l, o,
             " type dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback ignore_merges vocab merges ");
    const char *type = tok_get(l, o, "type", RETROFIT_JSON_STRING)->string;
    const retrofit_json *dropout = tok_present(o, "dropout"), *unk = tok_present(o, "unk_token");
    if (strcmp(type, "BPE")) tok_refuse(l, "only the model BPE is supported, not", type);
    if (dropout && (dropout->type != RETROFIT_JSON_NUMBER || dropout->number != 0)) tok_refuse(l, "not supported:", "dropout");
    for (int i = 0; i < 2; i++) {
        const char *key = i ? "end_of_word_suffix" : "continuing_subword_prefix";
        if (tok_present(o, key) && tok_get(l, o, key, RETROFIT_JSON_STRING)->length) tok_refuse(l, "not supported:", key);
    }
    t->fuse_unk = tok_get_flag(l, o, "fuse_unk", false), t->byte_fallback = tok_get_flag(l, o, "byte_fallback", false);
    t->ignore_merges = tok_get_flag(l, o, "ignore_merges", false);
    tok_load_vocabulary(l, tok_get(l, o, "vocab", RETROFIT_JSON_OBJECT), added);
    if (!l->bad) tok_load_merges(l, tok_get(l, o, "merges", RETROFIT_JSON_ARRAY));
    if (l->bad) return;
    for (unsigned i = 0; i < 256; i++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", i);
        t->byte_ids[i] = tok_find_token(t, name, 6, true);
    }
    if (!unk) return;
    unk = tok_get(l, o, "unk_token", RETROFIT_JSON_STRING);
    t->unk = tok_find_token(t, unk->string, unk->length, true);
    if (t->unk < 0) tok_refuse(l, "not in the vocabulary, the unk_token", unk->string);
}

static void tok_load_runs(retrofit_tokenizer *t, const uint16_t *runs, size_t count, int class_) {
    size_t each = class_ ? 2 : 3; // without a class: the combining class is in the third number
    for (size_t i = 0, c = 0; i < count; i += each) {
        c += runs[i];
        for (size_t k = 0; k < runs[i + 1]; k++) t->unicode[c++] |= (uint16_t)(class_ ? class_ : runs[i + 2] << 8);
    }
}

static void tok_load_tokenizer(tok_loader *l, const retrofit_json *root) {
    retrofit_tokenizer *t = l->t;
    tok_only(l, root, " version truncation padding added_tokens normalizer pre_tokenizer post_processor decoder model ");
    if (tok_present(root, "truncation")) tok_refuse(l, "set to null what should not happen here:", "truncation");
    if (tok_present(root, "padding")) tok_refuse(l, "set to null what should not happen here:", "padding");
    static const retrofit_json none[] = {{RETROFIT_JSON_ARRAY, 0, 0, 0, "", "", 0, NULL, NULL}};
    const retrofit_json *added = tok_present(root, "added_tokens") ? tok_get(l, root, "added_tokens", RETROFIT_JSON_ARRAY) : none;
    static const char *const roles[] = {"normalizer", "pre_tokenizer", "decoder"};
    tok_steps *const lists[] = {&t->normalizer, &t->pre_tokenizer, &t->decoder};
    for (int i = 0; i < 3; i++)
        if (tok_present(root, roles[i])) tok_load_steps(l, tok_present(root, roles[i]), lists[i], roles[i]);
    if (!tok_present(root, "decoder")) tok_add_step(l, &t->decoder, TOK_JOIN, 0);
    if (!l->bad) tok_load_model(l, tok_get(l, root, "model", RETROFIT_JSON_OBJECT), added);
    if (!l->bad) tok_load_added(l, added);
    if (!l->bad && tok_present(root, "post_processor")) tok_load_post_processor(l, tok_present(root, "post_processor"));
}

// The id of a token in tokenizer_config.json: a string, an object with its content, or null.
static int32_t tok_config_token(tok_loader *l, const retrofit_json *config, const char *key) {
    const retrofit_json *v = tok_present(config, key);
    if (v && v->type == RETROFIT_JSON_OBJECT) v = tok_get(l, v, "content", RETROFIT_JSON_STRING);
    if (!v) return -1;
    int32_t id = v->type == RETROFIT_JSON_STRING ? tok_find_token(l->t, v->string, v->length, false) : -1;
    if (id < 0) tok_refuse(l, "tokenizer.json does not have the token that is said to be", key);
    return id;
}

static retrofit_json *tok_read_json(const char *directory, const char *name, char path[4096], size_t *size) {
    if (snprintf(path, 4096, "%s/%s", directory, name) >= 4096) return fail("%.200s...: path too long", path), (retrofit_json *)NULL;
    char *text = read_file(path, size);
    retrofit_json *root = text ? retrofit_json_parse(text, *size, path) : NULL;
    free(text);
    return root;
}

// tokenizer_config.json, which may be missing and may hold anything else too. own_specials: tokenizer.json has a post_processor.
static void tok_load_config(tok_loader *l, const char *directory, char path[4096], bool own_specials) {
    retrofit_tokenizer *t = l->t;
    size_t size;
    snprintf(path, 4096, "%s/tokenizer_config.json", directory);
    if (access(path, F_OK) && errno == ENOENT) return;
    retrofit_json *config = tok_read_json(directory, "tokenizer_config.json", path, &size);
    if (!config) return (void)(l->bad = true);
    t->bos = tok_config_token(l, config, "bos_token"), t->eos = tok_config_token(l, config, "eos_token");
    if (!own_specials && tok_get_flag(l, config, "add_bos_token", false) && t->bos >= 0) t->before[t->before_count++] = t->bos;
    if (!own_specials && tok_get_flag(l, config, "add_eos_token", false) && t->eos >= 0) t->after[t->after_count++] = t->eos;
    retrofit_json_free(config);
}

retrofit_tokenizer *retrofit_tokenizer_load(const char *directory) {
    char path[4096];
    size_t size;
    retrofit_tokenizer *t = (retrofit_tokenizer *)allocate(1, sizeof *t);
    if (!t) return NULL;
    retrofit_json *root = tok_read_json(directory, "tokenizer.json", path, &size);
    tok_loader l = {t, path, !root, false};
    t->bos = t->eos = t->unk = -1;
    l.bad = l.bad || !(t->strings = (char *)allocate(size + 1, 1)) || !(t->unicode = (uint16_t *)allocate(0x110000, sizeof *t->unicode));
    if (!l.bad) {
        tok_load_runs(t, tok_letter_runs, sizeof tok_letter_runs / sizeof *tok_letter_runs, TOK_LETTER);
        tok_load_runs(t, tok_number_runs, sizeof tok_number_runs / sizeof *tok_number_runs, TOK_NUMBER);
        tok_load_runs(t, tok_space_runs, sizeof tok_space_runs / sizeof *tok_space_runs, TOK_SPACE);
        tok_load_runs(t, tok_unstable_runs, sizeof tok_unstable_runs / sizeof *tok_unstable_runs, TOK_UNSTABLE);
        tok_load_runs(t, tok_combining_runs, sizeof tok_combining_runs / sizeof *tok_combining_runs, 0);
        tok_load_tokenizer(&l, root);
    }
    if (!l.bad) tok_load_config(&l, directory, path, tok_present(root, "post_processor") != NULL);
    retrofit_json_free(root);
    if (!l.bad) return t;
    retrofit_tokenizer_free(t);
    return NULL;
}

void retrofit_tokenizer_free(retrofit_tokenizer *t) {
    if (!t) return;
    tok_pieces_free(&t->added_text);
    free(t->strings), free(t->tokens), free(t->by_text), free(t->merges), free(t->unicode);
    free(t->added[0].at), free(t->added[1].at), free(t);
}

// =====================================================================================================================
// 5  Operations on the CPU, forward beside backward (act is float here)
// =====================================================================================================================

#ifdef _OPENMP
#define PARALLEL_FOR _Pragma("omp parallel for schedule(static)")
#define PARALLEL_TASKS _Pragma("omp parallel for schedule(dynamic)") // tasks of unequal length that share no output
#else
#define PARALLEL_FOR
#define PARALLEL_TASKS
#endif
enum { LANES = 16 }; // reductions run in this many partial sums, added in a fixed order, so that compilers can vectorise them

static float sum_lanes(const float *lanes) {
    float s[8];
    for (int i = 0; i < 8; i++) s[i] = lanes[i] + lanes[i + 8];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

static float dot(const float *a, const float *b, size_t n) {
    float lanes[LANES] = {0}, tail = 0;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += a[i + l] * b[i + l];
    for (; i < n; i++) tail += a[i] * b[i];
    return sum_lanes(lanes) + tail;
}

static float largest(const float *x, size_t n) { // of the numbers: a NaN is passed over, and shows in the sum that follows
    float lanes[LANES], top = -INFINITY;
    for (int l = 0; l < LANES; l++) lanes[l] = -INFINITY;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
    for (; i < n; i++) top = x[i] > top ? x[i] : top;
    for (int l = 0; l < LANES; l++) top = lanes[l] > top ? lanes[l] : top;
    return top;
}

// e^x to 1 part in 10^7 in arithmetic that vectorises: 2^n by adding n to the exponent's bits, the rest by a polynomial. NaN stays NaN.
static inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f; // 1.5·2^23: rounds to the nearest integer
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f, p = 1.3888889e-3f;
    p = p * r + 8.3333333e-3f, p = p * r + 4.1666667e-2f, p = p * r + 1.6666667e-1f, p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    uint32_t bits, power;
    memcpy(&bits, &shifted, 4), memcpy(&power, &p, 4);
    power += bits << 23;
    memcpy(&p, &power, 4);
    return p + (x - x); // NaN stays NaN, whatever its bits
}

// Matrix multiplication, C = D + A·B.
//
// The arithmetic is done by a small kernel that keeps a block of C, GEMM_ROWS x 3 vectors, in registers, and for every k adds the outer
// product of a column of A and a row of B: GEMM_ROWS numbers and 3 vectors are loaded for 3 * GEMM_ROWS multiply-adds, so that
// arithmetic is the bottleneck and not loading. All else serves to keep that kernel fed from the caches:
//   - K is cut into pieces of at most GEMM_DEPTH. The piece of B that goes with a tile of C is copied ("packed") into a thread's own
//     buffer, which the second-level cache holds, as panels of 3 vectors in the very order in which the kernel reads them. Packing also
//     widens bf16, and transposes.
//   - Then GEMM_ROWS rows of A at a time, small enough for the first-level cache, meet every panel in turn. They are packed too if that
//     pays: the kernel takes A with any strides, and what it reads once only or twice it may as well read in place.
//   - C is cut into a grid of tiles for the threads. Every element of C belongs to one tile and sums over k in an order that depends on
//     K alone: its bits depend neither on the number of threads nor on the tiles.
// A product with few rows (decoding some tokens) is another matter: every weight is needed only a few times, so reading B is all the
// cost, and packing would double it. If B is stored with k contiguous (a weight matrix in X·Wᵀ), see gemm_dots.
typedef struct {
    const void *data;
    retrofit_type type;
    size_t row, col; // element (i, j) is data[i * row + j * col]
} matrix_view;

// gcc in strict ISO mode (-std=c11) would not fuse multiplications and additions, at half the speed. No other liberty is taken.
#if defined __GNUC__ && !defined __clang__
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#endif

#if defined __AVX512F__
#define GEMM_LANES 16 // floats in a vector
#define GEMM_ROWS  8  // of the kernel's block: 24 of the 32 registers hold it
#elif defined __AVX2__ && defined __FMA__
#define GEMM_LANES 8
#define GEMM_ROWS  4 // 12 of 16 registers
#else
#define GEMM_LANES 4
#define GEMM_ROWS  4
#endif
#define GEMM_DEPTH    512
#define GEMM_BUFFER   (512 * 288) // floats: 576 KiB
#define GEMM_PANEL    (3 * GEMM_LANES)
#define GEMM_FEW      8                // rows of A up to which gemm_dots is the faster way
#define GEMM_IN_PLACE (2 * GEMM_PANEL) // columns of a tile up to which A is not packed
#define GEMM_INLINE   static inline __attribute__((always_inline))
#ifdef __clang__
#define GEMM_UNROLL _Pragma("clang loop unroll(full)")
#else
#define GEMM_UNROLL _Pragma("GCC unroll 16")
#endif

// Has the compiler keep in a register what it would else load again for every use, gcc 12 for one.
#ifdef __x86_64__
#define GEMM_KEEP(x) __asm__("" : "+v"(x))
#else
#define GEMM_KEEP(x)
#endif

// A vector, and the same in memory: aligned like its elements only, and free to alias them.
typedef float gemm_vector __attribute__((vector_size(4 * GEMM_LANES)));
typedef float gemm_vector_at __attribute__((vector_size(4 * GEMM_LANES), aligned(4), may_alias));
typedef uint16_t gemm_half_at __attribute__((vector_size(2 * GEMM_LANES), aligned(2), may_alias));
typedef uint32_t gemm_word __attribute__((vector_size(4 * GEMM_LANES)));
typedef uint32_t gemm_word_at __attribute__((vector_size(4 * GEMM_LANES), aligned(2), may_alias));
typedef float gemm_quad __attribute__((vector_size(16)));
typedef float gemm_quad_at __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint16_t gemm_quad_half_at __attribute__((vector_size(8), aligned(2), may_alias));
typedef uint32_t gemm_quad_word __attribute__((vector_size(16)));

static RETROFIT_THREAD_LOCAL __attribute__((aligned(64))) float gemm_b[GEMM_BUFFER];
static RETROFIT_THREAD_LOCAL __attribute__((aligned(64))) float gemm_a[GEMM_ROWS * GEMM_DEPTH];

GEMM_INLINE size_t gemm_min(size_t a, size_t b) { return a < b ? a : b; }
GEMM_INLINE size_t gemm_ceil(size_t a, size_t b) { return (a + b - 1) / b; }

// bf16 is the upper half of an fp32.
GEMM_INLINE float gemm_element(const void *data, retrofit_type type, size_t at) {
    if (type == RETROFIT_F32) return ((const float *)data)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)data)[at] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
GEMM_INLINE gemm_vector gemm_load(const void *data, retrofit_type type, size_t at) {
    if (type == RETROFIT_F32) return *(const gemm_vector_at *)((const float *)data + at);
    return (gemm_vector)(__builtin_convertvector(*(const gemm_half_at *)((const uint16_t *)data + at), gemm_word) << 16);
}
GEMM_INLINE gemm_quad gemm_load4(const void *data, retrofit_type type, size_t at) {
    if (type == RETROFIT_F32) return *(const gemm_quad_at *)((const float *)data + at);
    return (gemm_quad)(__builtin_convertvector(*(const gemm_quad_half_at *)((const uint16_t *)data + at), gemm_quad_word) << 16);
}
GEMM_INLINE void gemm_transpose4(gemm_quad q[4]) {
    gemm_quad a = __builtin_shufflevector(q[0], q[1], 0, 4, 1, 5), b = __builtin_shufflevector(q[2], q[3], 0, 4, 1, 5);
    gemm_quad c = __builtin_shufflevector(q[0], q[1], 2, 6, 3, 7), d = __builtin_shufflevector(q[2], q[3], 2, 6, 3, 7);
    q[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5), q[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
    q[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5), q[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// out[k * width + i] = V(i, k) for k < depth and i < count, and 0 for count <= i < width. What V has contiguous in i is copied by vectors.
// What it has contiguous in k is transposed in blocks of 4x4, going along k by whole cache lines: rows a power of two apart compete for
// the same few places in the cache, and would not be there when we came back. The edges, and matrices that are neither, go one by one.
GEMM_INLINE void gemm_pack_as(float *out, size_t width, matrix_view V, retrofit_type type, size_t count, size_t depth) {
    size_t i_done = 0, k_done = 0; // by vectors
    if (V.row == 1) {
        i_done = count / 4 * 4, k_done = depth;
        for (size_t k = 0; k < depth; k++) {
            size_t i = 0;
            for (; i + GEMM_LANES <= count; i += GEMM_LANES)
                *(gemm_vector_at *)(out + k * width + i) = gemm_load(V.data, type, k * V.col + i);
            for (; i < i_done; i += 4) *(gemm_quad_at *)(out + k * width + i) = gemm_load4(V.data, type, k * V.col + i);
        }
    } else if (V.col == 1) {
        i_done = count / 4 * 4, k_done = depth / 4 * 4;
        for (size_t start = 0; start < k_done; start += 16)
            for (size_t i = 0; i < i_done; i += 4)
                for (size_t k = start; k < gemm_min(start + 16, k_done); k += 4) {
                    size_t at = i * V.row + k;
                    float *to = out + k * width + i;
                    gemm_quad q[4] = {gemm_load4(V.data, type, at), gemm_load4(V.data, type, at + V.row),
                                      gemm_load4(V.data, type, at + 2 * V.row), gemm_load4(V.data, type, at + 3 * V.row)};
                    gemm_transpose4(q);
                    GEMM_UNROLL for (size_t r = 0; r < 4; r++) * (gemm_quad_at *)(to + r * width) = q[r];
                }
    }
    for (size_t k = i_done == width ? k_done : 0; k < depth; k++)
        for (size_t i = k < k_done ? i_done : 0; i < width; i++)
            out[k * width + i] = i < count ? gemm_element(V.data, type, i * V.row + k * V.col) : 0;
}
static void gemm_pack(float *out, size_t width, matrix_view V, size_t count, size_t depth) {
    if (V.type == RETROFIT_F32) gemm_pack_as(out, width, V, RETROFIT_F32, count, depth);
    else gemm_pack_as(out, width, V, RETROFIT_BF16, count, depth);
}

// The kernel: c = d + a·b for a block of GEMM_ROWS x (vectors * GEMM_LANES), of which the first m rows and n columns are stored.
GEMM_INLINE void gemm_kernel(size_t vectors, size_t depth, const float *a, size_t a_row, size_t a_col, const float *b, size_t m, size_t n,
                             float *c, size_t c_row, const float *d, size_t d_row) {
    gemm_vector sum[GEMM_ROWS][3], zero = {0};
    GEMM_UNROLL for (size_t i = 0; i < GEMM_ROWS; i++) GEMM_UNROLL for (size_t v = 0; v < vectors; v++) sum[i][v] = zero;
    for (size_t k = 0; k < depth; k++, a += a_col, b += vectors * GEMM_LANES)
        GEMM_UNROLL for (size_t i = 0; i < GEMM_ROWS; i++) GEMM_UNROLL for (size_t v = 0; v < vectors; v++) sum[i][v] +=
            a[i * a_row] * *(const gemm_vector_at *)(b + v * GEMM_LANES);
    GEMM_UNROLL for (size_t i = 0; i < GEMM_ROWS; i++) GEMM_UNROLL for (size_t v = 0; v < vectors; v++) {
        size_t j = v * GEMM_LANES;
        if (i >= m || j >= n) continue;
        gemm_vector t = zero;
        if (n - j >= GEMM_LANES) {
            if (d) t = *(const gemm_vector_at *)(d + i * d_row + j);
            *(gemm_vector_at *)(c + i * c_row + j) = t + sum[i][v];
        } else {
            if (d) memcpy(&t, d + i * d_row + j, (n - j) * sizeof *d);
            t += sum[i][v];
            memcpy(c + i * c_row + j, &t, (n - j) * sizeof *c);
        }
    }
}

// Everything a thread needs to know: the operands, and the grid of tiles that C is cut into.
typedef struct {
    size_t M, N, K;
    matrix_view A, B;
    float *c;
    size_t c_row;
    const float *d;
    size_t d_row, tiles_m, tiles_n;
} gemm_job;

// One tile of C, by the kernel.
static void gemm_tile(const gemm_job *g, size_t i0, size_t i1, size_t j0, size_t j1) {
    size_t step = gemm_ceil(g->K, gemm_ceil(g->K, GEMM_DEPTH)), strip = j1 - j0;
    for (size_t k0 = 0; k0 < g->K; k0 += step) {
        size_t depth = gemm_min(step, g->K - k0);
        const float *from = k0 ? g->c : g->d; // later pieces of K add to what the earlier ones left
        size_t from_row = k0 ? g->c_row : g->d_row;
        for (size_t j = 0; j < strip; j += GEMM_PANEL) {
            size_t n = gemm_min(GEMM_PANEL, strip - j);
            matrix_view B = {NULL, g->B.type, g->B.col, g->B.row}; // transposed: its columns are what a panel has side by side
            B.data = (const char *)g->B.data + (k0 * g->B.row + (j0 + j) * g->B.col) * (B.type == RETROFIT_F32 ? 4 : 2);
            gemm_pack(gemm_b + j * depth, gemm_ceil(n, GEMM_LANES) * GEMM_LANES, B, n, depth);
        }
        for (size_t i = i0; i < i1; i += GEMM_ROWS) {
            size_t m = gemm_min(GEMM_ROWS, i1 - i);
            matrix_view A = g->A;
            A.data = (const char *)A.data + (i * A.row + k0 * A.col) * (A.type == RETROFIT_F32 ? 4 : 2);
            if (m < GEMM_ROWS || strip > GEMM_IN_PLACE || A.type != RETROFIT_F32) {
                gemm_pack(gemm_a, GEMM_ROWS, A, m, depth);
                A.data = gemm_a, A.row = 1, A.col = GEMM_ROWS;
            }
            for (size_t j = 0; j < strip; j += GEMM_PANEL) {
                const float *a = (const float *)A.data, *b = gemm_b + j * depth, *d = from ? from + i * from_row + j0 + j : NULL;
                float *c = g->c + i * g->c_row + j0 + j;
                size_t n = gemm_min(GEMM_PANEL, strip - j);
                if (n > 2 * GEMM_LANES) gemm_kernel(3, depth, a, A.row, A.col, b, m, n, c, g->c_row, d, from_row);
                else if (n > GEMM_LANES) gemm_kernel(2, depth, a, A.row, A.col, b, m, n, c, g->c_row, d, from_row);
                else gemm_kernel(1, depth, a, A.row, A.col, b, m, n, c, g->c_row, d, from_row);
            }
        }
    }
}

// Decoding takes elements of B two vectors at a time. Of bf16 that is one vector of 32-bit words, which hold an odd element above an even
// one: a shift and a mask widen them, the even ones (half = 0) and the odd ones (1) apart. A is put into the same order beforehand.
enum { GEMM_PAIR = 2 * GEMM_LANES };
GEMM_INLINE gemm_vector gemm_load_half(const char *p, retrofit_type type, size_t half) {
    if (type == RETROFIT_F32) return *(const gemm_vector_at *)(p + half * sizeof(gemm_vector));
    gemm_word words = *(const gemm_word_at *)p;
    return (gemm_vector)(half ? words & 0xffff0000u : words << 16);
}
GEMM_INLINE void gemm_dots_step(size_t rows, retrofit_type type, const float *a, size_t a_row, const char *const b[4], size_t at,
                                gemm_vector sum[4][4]) {
    GEMM_UNROLL for (size_t half = 0; half < 2; half++) {
        gemm_vector x[4];
        GEMM_UNROLL for (size_t i = 0; i < rows; i++) {
            x[i] = *(const gemm_vector_at *)(a + i * a_row + half * GEMM_LANES);
            GEMM_KEEP(x[i]);
        }
        GEMM_UNROLL for (size_t j = 0; j < 4; j++) {
            gemm_vector w = gemm_load_half(b[j] + at, type, half);
            GEMM_KEEP(w);
            GEMM_UNROLL for (size_t i = 0; i < rows; i++) sum[i][j] += w * x[i];
        }
    }
}

// The products of `rows` rows of A and 4 columns of B, which are contiguous in k: one sum per lane, then the sum of the lanes, for 4
// columns at once. A is packed: fp32, in the order said, and padded with zeros. A column is too short for the processor to find out by
// itself what to fetch ahead, so we ask for the one `ahead` bytes on (asking for what does not exist does no harm).
GEMM_INLINE void gemm_dots_as(size_t rows, retrofit_type type, size_t depth, const float *a, size_t a_row, const char *const b[4],
                              size_t ahead, float out[][4]) {
    size_t size = type == RETROFIT_F32 ? 4 : 2, whole = depth / GEMM_PAIR * GEMM_PAIR;
    gemm_vector sum[4][4], zero = {0};
    GEMM_UNROLL for (size_t i = 0; i < rows; i++) GEMM_UNROLL for (size_t j = 0; j < 4; j++) sum[i][j] = zero;
    for (size_t k = 0; k < whole; k += GEMM_PAIR) {
        GEMM_UNROLL for (size_t j = 0; j < 4; j++) GEMM_UNROLL for (size_t line = 0; line < GEMM_PAIR * size; line += 64)
            __builtin_prefetch(b[j] + k * size + line + ahead, 0, 2);
        gemm_dots_step(rows, type, a + k, a_row, b, k * size, sum);
    }
    if (whole < depth) {
        char rest[4][GEMM_PAIR * 4] = {{0}};
        for (size_t j = 0; j < 4; j++) memcpy(rest[j], b[j] + whole * size, (depth - whole) * size);
        const char *const from[4] = {rest[0], rest[1], rest[2], rest[3]};
        gemm_dots_step(rows, type, a + whole, a_row, from, 0, sum);
    }
    GEMM_UNROLL for (size_t i = 0; i < rows; i++) {
        gemm_quad q[4];
        GEMM_UNROLL for (size_t j = 0; j < 4; j++) {
            gemm_quad part[GEMM_LANES / 4];
            memcpy(part, &sum[i][j], sizeof part);
            q[j] = part[0];
            GEMM_UNROLL for (size_t l = 1; l < GEMM_LANES / 4; l++) q[j] += part[l];
        }
        gemm_transpose4(q);
        *(gemm_quad_at *)out[i] = (q[0] + q[1]) + (q[2] + q[3]);
    }
}

// Columns j0..j1 of a C with few rows, at the speed at which B can be read: 4 columns of B at a time meet all rows of A, in place.
static void gemm_dots(const gemm_job *g, size_t j0, size_t j1) {
    bool f32 = g->B.type == RETROFIT_F32;
    size_t size = f32 ? 4 : 2, parts = gemm_ceil(g->K, GEMM_BUFFER / GEMM_FEW);
    size_t most = gemm_ceil(gemm_ceil(g->K, parts), GEMM_PAIR) * GEMM_PAIR, ahead = 8 * g->B.col * size;
    for (size_t k0 = 0; k0 < g->K; k0 += most) {
        size_t depth = gemm_min(most, g->K - k0), a_row = gemm_ceil(depth, GEMM_PAIR) * GEMM_PAIR;
        const float *d = k0 ? g->c : g->d;
        size_t d_row = k0 ? g->c_row : g->d_row;
        for (size_t i = 0; i < g->M; i++)
            for (size_t k = 0; k < a_row; k += GEMM_PAIR) {
                float x[GEMM_PAIR] = {0}, *to = gemm_b + i * a_row + k;
                for (size_t l = 0; l < gemm_min(GEMM_PAIR, depth - k); l++)
                    x[l] = gemm_element(g->A.data, g->A.type, i * g->A.row + (k0 + k + l) * g->A.col);
                if (f32) memcpy(to, x, sizeof x);
                else
                    for (size_t l = 0; l < GEMM_LANES; l++) to[l] = x[2 * l], to[GEMM_LANES + l] = x[2 * l + 1];
            }
        for (size_t j = j0; j < j1; j += 4) {
            const char *b[4];
            for (size_t s = 0; s < 4; s++) // past the end: the last column again
                b[s] = (const char *)g->B.data + (gemm_min(j + s, j1 - 1) * g->B.col + k0) * size;
            for (size_t i = 0, step = GEMM_ROWS / 2; i < g->M; i += step) {
                const float *a = gemm_b + i * a_row;
                size_t m = gemm_min(step, g->M - i);
                float out[4][4];
                if (m == 1 && f32) gemm_dots_as(1, RETROFIT_F32, depth, a, a_row, b, ahead, out);
                else if (m == 1) gemm_dots_as(1, RETROFIT_BF16, depth, a, a_row, b, ahead, out);
                else if (m == 2 && f32) gemm_dots_as(2, RETROFIT_F32, depth, a, a_row, b, ahead, out);
                else if (m == 2) gemm_dots_as(2, RETROFIT_BF16, depth, a, a_row, b, ahead, out);
                else if (f32) gemm_dots_as(GEMM_ROWS / 2, RETROFIT_F32, depth, a, a_row, b, ahead, out); // of 3 rows too: the 4th is left
                else gemm_dots_as(GEMM_ROWS / 2, RETROFIT_BF16, depth, a, a_row, b, ahead, out);
                for (size_t r = 0; r < m; r++)
                    for (size_t s = 0; s < gemm_min(4, j1 - j); s++)
                        g->c[(i + r) * g->c_row + j + s] = (d ? d[(i + r) * d_row + j + s] : 0) + out[r][s];
            }
        }
    }
}

static bool gemm_few(const gemm_job *g) { return g->M <= GEMM_FEW && g->B.row == 1; }

// Tile t of the grid. Tiles begin where blocks of the kernel do, and are as equal as that allows.
static void gemm_run(const gemm_job *g, size_t t) {
    size_t rows = gemm_ceil(g->M, GEMM_ROWS), columns = gemm_ceil(g->N, GEMM_LANES), u = t / g->tiles_n, v = t % g->tiles_n;
    size_t i0 = u * rows / g->tiles_m * GEMM_ROWS, i1 = gemm_min(g->M, (u + 1) * rows / g->tiles_m * GEMM_ROWS);
    size_t j0 = v * columns / g->tiles_n * GEMM_LANES, j1 = gemm_min(g->N, (v + 1) * columns / g->tiles_n * GEMM_LANES);
    if (gemm_few(g)) gemm_dots(g, j0, j1);
    else gemm_tile(g, i0, i1, j0, j1);
}

// Chooses the grid that takes `threads` threads the least time: a tile of m x n costs m * n multiplications and m + n packings per k, one
// of which takes about as long as 8 multiplications. B's part of a tile has to fit into the buffer.
static gemm_job gemm_plan(size_t threads, size_t M, size_t N, size_t K, matrix_view A, matrix_view B, float *c, size_t c_row,
                          const float *d, size_t d_row) {
    gemm_job g = {M, N, K, A, B, c, c_row, d, d_row, 0, 0};
    if (!K)
        for (size_t i = 0; i < M; i++)
            for (size_t j = 0; j < N; j++) c[i * c_row + j] = d ? d[i * d_row + j] : 0;
    if (!M || !N || !K) return g;
    size_t depth = gemm_ceil(K, gemm_ceil(K, GEMM_DEPTH)), rows = gemm_ceil(M, GEMM_ROWS), columns = gemm_ceil(N, GEMM_LANES);
    size_t fit = gemm_few(&g) ? columns : GEMM_BUFFER / (depth * GEMM_LANES), least = SIZE_MAX;
    for (size_t p = 1; p <= gemm_min(threads, gemm_few(&g) ? 1 : rows); p++) {
        if (threads % p) continue;
        size_t q = gemm_min(columns, gemm_ceil(gemm_ceil(columns, fit), threads / p) * (threads / p)); // p * q: a multiple of threads
        size_t m = gemm_ceil(rows, p) * GEMM_ROWS, n = gemm_ceil(columns, q) * GEMM_LANES;
        size_t cost = gemm_ceil(p * q, threads) * (m * n + 8 * (m + n));
        if (cost < least) least = cost, g.tiles_m = p, g.tiles_n = q;
    }
    return g;
}

static void gemm_serial(size_t M, size_t N, size_t K, matrix_view A, matrix_view B, float *c, size_t c_row, const float *d, size_t d_row) {
    gemm_job g = gemm_plan(1, M, N, K, A, B, c, c_row, d, d_row);
    for (size_t t = 0; t < g.tiles_m * g.tiles_n; t++) gemm_run(&g, t);
}

// The same with all threads, unless the product is so small that waking them would take longer.
static void gemm(size_t M, size_t N, size_t K, matrix_view A, matrix_view B, float *c, size_t c_row, const float *d, size_t d_row) {
#ifdef _OPENMP
    size_t threads = M * N * K < 65536 ? 1 : (size_t)omp_get_max_threads();
    if (threads > 1 && !omp_in_parallel()) {
        gemm_job g = gemm_plan(threads, M, N, K, A, B, c, c_row, d, d_row);
#pragma omp parallel for schedule(dynamic)
        for (size_t t = 0; t < g.tiles_m * g.tiles_n; t++) gemm_run(&g, t);
        return;
    }
#endif
    gemm_serial(M, N, K, A, B, c, c_row, d, d_row);
}
#if defined __GNUC__ && !defined __clang__
#pragma GCC pop_options
#endif

static matrix_view view(const void *data, size_t row) {
    matrix_view v = {data, RETROFIT_F32, row, 1};
    return v;
}

static matrix_view view_transposed(const void *data, size_t row) {
    matrix_view v = {data, RETROFIT_F32, 1, row};
    return v;
}

// ---- Embedding: x_n = wte[token_n]. Backward runs over columns, so that rows of one token add up in order. --------
static void embedding_forward(float *x, const int32_t *tokens, retrofit_weight wte, size_t N, size_t d) {
    PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        const char *row = (const char *)wte.data + (size_t)tokens[n] * wte.stride * retrofit_type_size(wte.type);
        to_float(x + n * d, row, wte.type, d);
    }
}

static void embedding_backward(float *dwte, const int32_t *tokens, const float *dx, size_t N, size_t d) {
    PARALLEL_FOR
    for (size_t c0 = 0; c0 < d; c0 += 64)
        for (size_t n = 0; n < N; n++) {
            float *dw = dwte + (size_t)tokens[n] * d;
            for (size_t c = c0; c < d && c < c0 + 64; c++) dw[c] += dx[n * d + c];
        }
}

// ---- RMSNorm: y = x·ρ·w, ρ = 1/sqrt(mean(x²) + eps) ---------------------------------------------------------------------
// With g = dy·w: dx += ρ·(g - x·ρ²·mean(g·x)), dw += Σ_n dy·x·ρ.
static void rmsnorm_forward(act *out_, float *rstd, const float *x, const float *weight, size_t N, size_t d, float eps) {
    float *out = (float *)out_;
    PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        float scale = 1.0f / sqrtf(dot(x + n * d, x + n * d, d) / (float)d + eps);
        for (size_t c = 0; c < d; c++) out[n * d + c] = x[n * d + c] * scale * weight[c];
        rstd[n] = scale;
    }
}

static void rmsnorm_backward(float *dx, float *dweight, const act *dout_, const float *x, const float *rstd, const float *weight, size_t N,
                             size_t d) {
    const float *dout = (const float *)dout_;
    PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        const float *dy = dout + n * d, *xn = x + n * d;
        float lanes[LANES] = {0}, tail = 0, r = rstd[n];
        size_t c = 0;
        for (; c + LANES <= d; c += LANES)
            for (int l = 0; l < LANES; l++) lanes[l] += dy[c + l] * weight[c + l] * xn[c + l];
        for (; c < d; c++) tail += dy[c] * weight[c] * xn[c];
        float along = (sum_lanes(lanes) + tail) * r * r / (float)d;
        for (c = 0; c < d; c++) dx[n * d + c] += r * (dy[c] * weight[c] - xn[c] * along);
    }
    PARALLEL_FOR
    for (size_t c0 = 0; c0 < d; c0 += 64)
        for (size_t n = 0; n < N; n++)
            for (size_t c = c0; c < d && c < c0 + 64; c++) dweight[c] += dout[n * d + c] * x[n * d + c] * rstd[n];
}

// ---- Matrix products: out = inp·wᵀ, dinp = dout·w, dw += doutᵀ·inp ------------------------------------------------------
static void matmul_residual_forward(float *out, const float *residual, const act *inp, retrofit_weight w, size_t N, size_t I, size_t O) {
    matrix_view wt = {w.data, w.type, 1, w.stride};
    gemm(N, O, I, view(inp, I), wt, out, O, residual, O);
}

static void matmul_forward(act *out, const act *inp, retrofit_weight w, size_t N, size_t I, size_t O) {
    matmul_residual_forward((float *)out, NULL, inp, w, N, I, O);
}

static void matmul_residual_backward_input(float *dinp, const act *dout, retrofit_weight w, size_t N, size_t I, size_t O) {
    matrix_view wv = {w.data, w.type, w.stride, 1};
    gemm(N, I, O, view(dout, O), wv, dinp, I, NULL, 0);
}

static void matmul_backward_input(act *dinp, const act *dout, retrofit_weight w, size_t N, size_t I, size_t O) {
    matmul_residual_backward_input((float *)dinp, dout, w, N, I, O);
}

static void matmul_backward_weight(float *dw, size_t stride, const act *dout, const act *inp, size_t N, size_t I, size_t O) {
    gemm(O, I, N, view_transposed(dout, O), view(inp, I), dw, stride, dw, stride);
}

// ---- RoPE: dims i and i + h/2 of q and k turn by the angle position·θ_i. Backward turns by the opposite angle. ------------
static void rotate(float *qkv, const float *table, const int32_t *past, size_t B, size_t T, size_t H, size_t G, size_t h, float sign) {
    size_t Q = (H + 2 * G) * h, half = h / 2;
    PARALLEL_FOR
    for (size_t n = 0; n < B * T; n++) {
        const float *angles = table + ((past ? (size_t)past[n / T] : 0) + n % T) * h;
        for (size_t head = 0; head < H + G; head++) {
            float *lo = qkv + n * Q + head * h, *hi = lo + half;
            for (size_t i = 0; i < half; i++) {
                float c = angles[2 * i], s = sign * angles[2 * i + 1], a = lo[i], b = hi[i];
                lo[i] = a * c - b * s, hi[i] = b * c + a * s;
            }
        }
    }
}

static void rope_forward(act *qkv, const float *table, const int32_t *past, size_t B, size_t T, size_t H, size_t G, size_t h) {
    rotate((float *)qkv, table, past, B, T, H, G, h, 1);
}

static void rope_backward(act *dqkv, const float *table, size_t B, size_t T, size_t H, size_t G, size_t h) {
    rotate((float *)dqkv, table, NULL, B, T, H, G, h, -1);
}

// ---- Attention: o_t = Σ_u p_tu·v_u, p_tu = softmax_u≤t(q_t·k_u/√h); query head j reads key/value head j/(H/G) -------------
// In tiles (FlashAttention-2): of P only one tile exists at a time; a running maximum and sum make the softmax exact, and backward
// finds P again from lse_t = log Σ_u e^{q_t·k_u/√h}.
enum { TILE = 96 };

// One tile of queries against keys [0, keys): o (rows, h; o_row apart) and lse (lse_row apart). Query i may see keys up to first + i.
static void attend(float *o, size_t o_row, float *lse, size_t lse_row, const float *q, size_t q_row, const float *k, const float *v,
                   size_t kv_row, size_t rows, size_t first, size_t h) {
    float s[TILE * TILE], maximum[TILE], sum[TILE], scale = 1.0f / sqrtf((float)h);
    size_t keys = first + rows;
    for (size_t u0 = 0; u0 < keys; u0 += TILE) {
        size_t width = least(keys - u0, TILE);
        // (1) scores of the tile
        gemm_serial(rows, width, h, view(q, q_row), view_transposed(k + u0 * kv_row, kv_row), s, TILE, NULL, 0);
        for (size_t i = 0; i < rows; i++) {
            float *p = s + i * TILE, top = u0 ? maximum[i] : -INFINITY, lanes[LANES] = {0}, tail = 0;
            size_t seen = first + i + 1 <= u0 ? 0 : least(first + i + 1 - u0, width), u = 0;
            // (2) the maximum so far; what was summed up under the old one is scaled down
            float tile_top = largest(p, seen);
            top = tile_top > top ? tile_top : top;
            float shrink = u0 ? fast_exp((maximum[i] - top) * scale) : 0;
            // (3) e^{score - maximum}, and their sum
            for (u = 0; u < seen; u++) p[u] = fast_exp((p[u] - top) * scale);
            for (; u < width; u++) p[u] = 0;
            for (u = 0; u + LANES <= width; u += LANES)
                for (int l = 0; l < LANES; l++) lanes[l] += p[u + l];
            for (; u < width; u++) tail += p[u];
            sum[i] = (u0 ? sum[i] * shrink : 0) + sum_lanes(lanes) + tail;
            maximum[i] = top;
            for (size_t c = 0; u0 && c < h; c++) o[i * o_row + c] *= shrink;
        }
        // (4) the tile's share of the output
        gemm_serial(rows, h, width, view(s, TILE), view(v + u0 * kv_row, kv_row), o, o_row, u0 ? o : NULL, o_row);
    }
    for (size_t i = 0; i < rows; i++) {
        for (size_t c = 0; c < h; c++) o[i * o_row + c] /= sum[i];
        if (lse) lse[i * lse_row] = maximum[i] * scale + logf(sum[i]);
    }
}

static void attention_forward(act *out_, float *lse, const act *qkv_, size_t B, size_t T, size_t H, size_t G, size_t h) {
    float *out = (float *)out_;
    size_t Q = (H + 2 * G) * h, tiles = (T + TILE - 1) / TILE;
    PARALLEL_TASKS
    for (size_t task = 0; task < B * H * tiles; task++) {
        size_t b = task / tiles / H, head = task / tiles % H, t0 = task % tiles * TILE, n = b * T + t0;
        const float *row = (const float *)qkv_ + b * T * Q, *k = row + (H + head / (H / G)) * h;
        attend(out + n * H * h + head * h, H * h, lse + n * H + head, H, row + t0 * Q + head * h, Q, k, k + G * h, Q,
               least(T - t0, TILE), t0, h);
    }
}

// dV = Pᵀ·dO;  dS = P∘(dO·Vᵀ - δ)/√h with δ_t = dO_t·O_t;  dQ = dS·K;  dK = dSᵀ·Q. The heads of one key/value head in turn.
static void attention_backward(act *dqkv_, const act *dout_, const act *qkv_, const act *out_, const float *lse, size_t B, size_t T, size_t H,
                               size_t G, size_t h) {
    float *dqkv = (float *)dqkv_, scale = 1.0f / sqrtf((float)h);
    size_t Q = (H + 2 * G) * h, O = H * h;
    PARALLEL_TASKS
    for (size_t task = 0; task < B * G; task++) {
        size_t b = task / G, g = task % G;
        float p[TILE * TILE], ds[TILE * TILE], delta[TILE];
        for (size_t head = g * (H / G); head < (g + 1) * (H / G); head++)
            for (size_t t0 = 0; t0 < T; t0 += TILE) {
                size_t rows = least(T - t0, TILE), n = b * T + t0;
                const float *q = (const float *)qkv_ + n * Q + head * h, *o = (const float *)out_ + n * O + head * h;
                const float *dout = (const float *)dout_ + n * O + head * h;
                float *dq = dqkv + n * Q + head * h;
                for (size_t i = 0; i < rows; i++) delta[i] = dot(dout + i * O, o + i * O, h);
                for (size_t u0 = 0; u0 < t0 + rows; u0 += TILE) {
                    size_t width = least(t0 + rows - u0, TILE);
                    const float *k = (const float *)qkv_ + (b * T + u0) * Q + (H + g) * h, *v = k + G * h;
                    float *dk = dqkv + (b * T + u0) * Q + (H + g) * h, *dv = dk + G * h;
                    bool fresh = head == g * (H / G) && t0 == u0; // the first tile of queries that sees these keys
                    // (1) P again, (2) dO·Vᵀ, (3) dS
                    gemm_serial(rows, width, h, view(q, Q), view_transposed(k, Q), p, TILE, NULL, 0);
                    gemm_serial(rows, width, h, view(dout, O), view_transposed(v, Q), ds, TILE, NULL, 0);
                    for (size_t i = 0; i < rows; i++) {
                        size_t seen = least(t0 + i + 1 - u0, width);
                        float *pi = p + i * TILE, *di = ds + i * TILE, l = lse[(n + i) * H + head];
                        for (size_t u = 0; u < seen; u++) pi[u] = fast_exp(pi[u] * scale - l);
                        for (size_t u = 0; u < seen; u++) di[u] = pi[u] * (di[u] - delta[i]) * scale;
                        for (size_t u = seen; u < width; u++) pi[u] = di[u] = 0;
                    }
                    // (4) dV, dK, dQ
                    gemm_serial(width, h, rows, view_transposed(p, TILE), view(dout, O), dv, Q, fresh ? NULL : dv, Q);
                    gemm_serial(width, h, rows, view_transposed(ds, TILE), view(q, Q), dk, Q, fresh ? NULL : dk, Q);
                    gemm_serial(rows, h, width, view(ds, TILE), view(k, Q), dq, Q, u0 ? dq : NULL, Q);
                }
            }
    }
}

// ---- SwiGLU: y = silu(g)·u, silu(g) = g·σ(g); dg = dy·u·σ(g)·(1 + g·(1 - σ(g))), du = dy·silu(g) ----------------------------
static void swiglu_forward(act *out_, const act *fc_, size_t N, size_t F) {
    float *out = (float *)out_;
    PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        const float *gate = (const float *)fc_ + n * 2 * F, *up = gate + F;
        for (size_t i = 0; i < F; i++) out[n * F + i] = gate[i] / (1.0f + fast_exp(-gate[i])) * up[i];
    }
}

static void swiglu_backward(act *dfc, const act *dout, const act *fc, size_t N, size_t F) {
    PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        const float *gate = (const float *)fc + n * 2 * F, *up = gate + F, *dy = (const float *)dout + n * F;
        float *dgate = (float *)dfc + n * 2 * F, *dup = dgate + F;
        for (size_t i = 0; i < F; i++) {
            float sigma = 1.0f / (1.0f + fast_exp(-gate[i]));
            dgate[i] = dy[i] * up[i] * sigma * (1.0f + gate[i] * (1.0f - sigma));
            dup[i] = dy[i] * gate[i] * sigma;
        }
    }
}

// ---- Cross-entropy: loss = log Σ_v e^{z_v} - z_label; dz = scale·(softmax(z) - onehot) ---------------------------------------
static void cross_entropy(float *losses, act *logits, const int32_t *labels, size_t N, size_t V, float scale) {
    PARALLEL_FOR
    for (size_t n = 0; n < N; n++) {
        float *z = (float *)logits + n * V;
        int32_t label = labels[n];
        if (label < 0) {
            losses[n] = 0;
            if (scale != 0) memset(z, 0, V * sizeof *z);
            continue;
        }
        float target = z[label], top = largest(z, V);
        double sum = 0; // vocabularies are large: lanes in fp32, their blocks in fp64
        for (size_t v0 = 0; v0 < V; v0 += 4096) {
            size_t end = least(V, v0 + 4096), v = v0;
            float lanes[LANES] = {0}, tail = 0;
            for (; v + LANES <= end; v += LANES)
                for (int l = 0; l < LANES; l++) {
                    float e = fast_exp(z[v + l] - top);
                    lanes[l] += e;
                    if (scale != 0) z[v + l] = e;
                }
            for (; v < end; v++) {
                float e = fast_exp(z[v] - top);
                tail += e;
                if (scale != 0) z[v] = e;
            }
            sum += (double)sum_lanes(lanes) + tail;
        }
        losses[n] = (float)(log(sum) + (double)top - target);
        if (scale == 0) continue;
        float factor = (float)(scale / sum);
        for (size_t v = 0; v < V; v++) z[v] *= factor;
        z[label] -= scale;
    }
}

// ---- Elementwise ------------------------------------------------------------------------------------------------------------
static void cast(act *out, const float *x, size_t n) { memcpy(out, x, n * sizeof *x); }

static void add(float *x, const float *y, size_t n) {
    PARALLEL_FOR
    for (size_t i = 0; i < n; i++) x[i] += y[i];
}

static void state_init(float *s, const int32_t *past, size_t B, size_t T, size_t d, float sigma, uint64_t seed) {
    PARALLEL_FOR
    for (size_t n = 0; n < B * T; n++) {
        uint64_t key = hash64(hash64(seed, n / T), (past ? (uint64_t)past[n / T] : 0) + n % T);
        for (size_t c = 0; c < d; c++) s[n * d + c] = sigma == 0 ? 0 : sigma * hash_normal(key, c);
    }
}

// ---- KV cache: what a new token needs of the old ones --------------------------------------------------------------------
static void kv_store(act *keys, act *values, const act *qkv, const int32_t *past, size_t B, size_t T, size_t capacity, size_t H, size_t G,
                     size_t h) {
    size_t width = G * h;
    for (size_t n = 0; n < B * T; n++) {
        const float *k = (const float *)qkv + n * (H + 2 * G) * h + H * h;
        size_t at = (n / T * capacity + (size_t)past[n / T] + n % T) * width;
        memcpy((float *)keys + at, k, width * sizeof *k), memcpy((float *)values + at, k + width, width * sizeof *k);
    }
}

static void attention_cached(act *out, const act *qkv, const act *keys, const act *values, const int32_t *past, size_t B, size_t T,
                             size_t capacity, size_t H, size_t G, size_t h) {
    size_t Q = (H + 2 * G) * h, tiles = (T + TILE - 1) / TILE;
    PARALLEL_TASKS
    for (size_t task = 0; task < B * H * tiles; task++) {
        size_t b = task / tiles / H, head = task / tiles % H, t0 = task % tiles * TILE, n = b * T + t0;
        size_t kv = b * capacity * G * h + head / (H / G) * h;
        attend((float *)out + n * H * h + head * h, H * h, NULL, 0, (const float *)qkv + n * Q + head * h, Q, (const float *)keys + kv,
               (const float *)values + kv, G * h, least(T - t0, TILE), (size_t)past[b] + t0, h);
    }
}

// ---- Optimizers: the arithmetic of one tensor (section 8 explains) -----------------------------------------------------------
static double sum_squares(const float *x, size_t n) {
    double total = 0;
    enum { BLOCK = 1 << 14, MANY = 256 }; // blocks are summed side by side and added in order, whatever the number of threads
    for (size_t at = 0; at < n; at += (size_t)BLOCK * MANY) {
        double sums[MANY] = {0};
        PARALLEL_FOR
        for (size_t i = 0; i < MANY; i++) {
            size_t begin = at + i * BLOCK, end = least(begin + BLOCK, n);
            for (size_t j = begin; j < end; j += 256) sums[i] += dot(x + j, x + j, least(end - j, 256));
        }
        for (size_t i = 0; i < MANY; i++) total += sums[i];
    }
    return total;
}

static void adamw_update(float *w, float *m, float *v, const float *g, size_t n, float scale, float lr, float beta1, float beta2, double bias1,
                         double bias2, float eps, float decay) {
    float step = (float)(lr / bias1), root = (float)sqrt(bias2), keep = 1.0f - lr * decay;
    PARALLEL_FOR
    for (size_t i = 0; i < n; i++) {
        float gi = g[i] * scale;
        m[i] += (1.0f - beta1) * (gi - m[i]);
        v[i] = beta2 * v[i] + (1.0f - beta2) * gi * gi;
        w[i] = w[i] * keep - step * m[i] / (sqrtf(v[i]) / root + eps);
    }
}

static void muon_momentum(float *u, float *m, const float *g, size_t n, float scale, float momentum) {
    PARALLEL_FOR
    for (size_t i = 0; i < n; i++) {
        float gi = g[i] * scale;
        m[i] += (1.0f - momentum) * (gi - m[i]);
        u[i] = gi + momentum * (m[i] - gi);
    }
}

static void muon_load(act *x_, const float *u, size_t rows, size_t cols, float scale) {
    float *x = (float *)x_;
    PARALLEL_FOR
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) x[rows > cols ? c * rows + r : r * cols + c] = u[r * cols + c] * scale;
}

static void axpby(act *y_, const act *x_, size_t n, float a, float b) {
    float *y = (float *)y_;
    const float *x = (const float *)x_;
    PARALLEL_FOR
    for (size_t i = 0; i < n; i++) y[i] = a * x[i] + b * y[i];
}

static void muon_update(float *w, const act *x_, size_t rows, size_t cols, float lr, float scale, float decay) {
    const float *x = (const float *)x_;
    PARALLEL_FOR
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) {
            float u = x[rows > cols ? c * rows + r : r * cols + c];
            w[r * cols + c] = w[r * cols + c] * (1.0f - lr * decay) - lr * scale * u;
        }
}

// ---- The table ----------------------------------------------------------------------------------------------------------------
static void *cpu_alloc(size_t bytes) { // calloc's fresh pages are zero without being touched; the pointer to free lies before the block
    char *p = bytes < SIZE_MAX / 2 ? (char *)calloc(bytes + 128, 1) : NULL;
    if (!p) return fail("out of memory: %.2f GB could not be had", (double)bytes / 1e9), (void *)NULL;
    void **aligned = (void **)(void *)(p + 128 - (uintptr_t)p % 64);
    aligned[-1] = p;
    return aligned;
}
static void cpu_free(void *p) {
    if (p) free(((void **)p)[-1]);
}
static void cpu_copy(void *to, const void *from, size_t bytes) { memmove(to, from, bytes); }
static void cpu_zero(void *p, size_t bytes) { memset(p, 0, bytes); }

const retrofit_ops retrofit_cpu = {"cpu",    RETROFIT_F32, cpu_alloc, cpu_free, cpu_copy, cpu_copy, cpu_copy, cpu_zero,
#define X(type, name, parameters) name,
                                   RETROFIT_OPS(X)
#undef X
};

// =====================================================================================================================
// 6  The model: configuration, parameters, block and model forward and backward
// =====================================================================================================================

bool retrofit_is_plain(const retrofit_config *c) { return c->core == 0; }

size_t retrofit_qkv_width(const retrofit_config *c) { return (c->n_heads + 2 * c->n_kv_heads) * c->head_dim; }

bool retrofit_config_check(const retrofit_config *c, const char *where) {
    struct { const char *name; size_t value, most; } sizes[] = { // small enough that no product of them overflows
        {"the width (n_embd, hidden_size)", c->n_embd, 1 << 20}, {"the number of heads", c->n_heads, 1 << 16},
        {"the number of key/value heads", c->n_kv_heads, 1 << 16}, {"intermediate_size", c->intermediate, 1 << 22},
        {"the vocabulary", c->vocab, 1 << 24}, {"the context (max_position_embeddings)", c->context, 1 << 24},
        {"the number of layers", c->prelude + c->core + c->coda, 4096}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value == 0 || sizes[i].value > sizes[i].most)
            return fail("%s: %s is %zu, not between 1 and %zu", where, sizes[i].name, sizes[i].value, sizes[i].most);
    if (c->n_embd != c->n_heads * c->head_dim)
        return fail("%s: %zu heads of %zu do not make a width of %zu", where, c->n_heads, c->head_dim, c->n_embd);
    if (c->n_heads % c->n_kv_heads) return fail("%s: %zu heads cannot share %zu key/value heads", where, c->n_heads, c->n_kv_heads);
    if (c->head_dim % 2) return fail("%s: a head size of %zu is odd: RoPE needs pairs", where, c->head_dim);
    if (!(c->norm_eps > 0 && c->norm_eps < 1)) return fail("%s: norm eps %g is not between 0 and 1", where, (double)c->norm_eps);
    if (!(c->rope_theta > 1 && c->rope_theta < 1e12)) return fail("%s: rope_theta %g is not between 1 and 1e12", where, c->rope_theta);
    if (c->rope_llama3 && !(c->rope_factor >= 1 && c->rope_low > 0 && c->rope_high > c->rope_low && c->rope_original_context > 0))
        return fail("%s: rope_scaling's numbers make no sense", where);
    if (!(c->state_std >= 0 && c->state_std < 100)) return fail("%s: init_values.std %g is not between 0 and 100", where, (double)c->state_std);
    if (c->core == 0 && c->prelude) return fail("%s: a prelude without a recurrent core", where);
    if (c->mean_recurrence == 0 || c->mean_recurrence > 1 << 16 || c->backprop_depth == 0 || c->backprop_depth > 1 << 16)
        return fail("%s: mean_recurrence and mean_backprop_depth must be between 1 and 65536", where);
    return true;
}

// The sizes of a config, under a plain Llama's names and under the authors'.
static const struct {
    const char *plain, *recurrent; // NULL: not in such a config
    size_t field;
    bool required;
} config_sizes[] = {{"hidden_size", "n_embd", offsetof(retrofit_config, n_embd), true},
                    {"num_attention_heads", "n_heads", offsetof(retrofit_config, n_heads), true},
                    {"num_key_value_heads", "num_key_value_heads", offsetof(retrofit_config, n_kv_heads), false},
                    {"intermediate_size", "intermediate_size", offsetof(retrofit_config, intermediate), true},
                    {"vocab_size", "padded_vocab_size", offsetof(retrofit_config, vocab), false},
                    {"max_position_embeddings", "max_position_embeddings", offsetof(retrofit_config, context), true},
                    {NULL, "n_layers_in_prelude", offsetof(retrofit_config, prelude), true},
                    {NULL, "n_layers_in_recurrent_block", offsetof(retrofit_config, core), true},
                    {"num_hidden_layers", "n_layers_in_coda", offsetof(retrofit_config, coda), true},
                    {NULL, "mean_recurrence", offsetof(retrofit_config, mean_recurrence), false},
                    {NULL, "mean_backprop_depth", offsetof(retrofit_config, backprop_depth), false}};

// What a config may say in words, and the one thing that is supported.
static const char *const config_words[][2] = {{"norm_class_name", "RMSNorm_llama"}, {"block_class_name", "SandwichBlock"}, {"hidden_act", "silu"},
                                              {"nonlin_name", "SiLU"}, {"injection_type", "linear"}};
static const char *const config_flags[] = {"attention_bias", "mlp_bias", "qk_bias", "bias", "tie_embeddings"}; // none of them may be true

static double config_number(const retrofit_json *j, const char *where, const char *key, double otherwise, bool *ok) { // ok is sticky
    const retrofit_json *n = retrofit_json_get(j, key);
    if (n && n->type == RETROFIT_JSON_ARRAY && n->child) n = n->child; // Llama-3's chat models list several ends: the first is the document's
    if (!n || n->type == RETROFIT_JSON_NULL) return otherwise;
    if (*ok && n->type != RETROFIT_JSON_NUMBER) *ok = fail("%s: %s is not a number", where, key);
    return n->type == RETROFIT_JSON_NUMBER ? n->number : otherwise;
}

static bool config_is(const retrofit_json *j, const char *word) { return j && j->type == RETROFIT_JSON_STRING && !strcmp(j->string, word); }

static bool config_true(const retrofit_json *j, const char *key) {
    const retrofit_json *b = retrofit_json_get(j, key);
    return b && b->type == RETROFIT_JSON_BOOL && b->number != 0;
}

static int32_t config_id(double x) { return (int32_t)fmax(-1, fmin(1 << 24, x)); }

static bool config_parse(retrofit_config *c, const retrofit_json *j, const char *where) {
    const retrofit_json *type = retrofit_json_get(j, "model_type"), *init = retrofit_json_get(j, "init_values"), *n;
    bool plain = config_is(type, "llama"), ok = true;
    if (!plain && !config_is(type, "huginn_raven")) return fail("%s: model_type is neither llama nor huginn_raven: no other is known", where);
    memset(c, 0, sizeof *c);
    c->mean_recurrence = c->backprop_depth = 1;
    for (size_t i = 0; i < sizeof config_sizes / sizeof *config_sizes; i++) {
        const char *key = plain ? config_sizes[i].plain : config_sizes[i].recurrent;
        if (!key || (!(n = retrofit_json_get(j, key)) && !config_sizes[i].required)) continue;
        if (!json_size(n, (size_t *)(void *)((char *)c + config_sizes[i].field))) return fail("%s: %s is missing or not a size", where, key);
    }
    if (!retrofit_json_get(j, "num_key_value_heads")) c->n_kv_heads = c->n_heads;
    if (c->vocab == 0 && !json_size(retrofit_json_get(j, "vocab_size"), &c->vocab)) return fail("%s: vocab_size is missing or not a size", where);
    for (size_t i = 0; i < sizeof config_words / sizeof *config_words; i++)
        if ((n = retrofit_json_get(j, config_words[i][0])) && !config_is(n, config_words[i][1]))
            return fail("%s: %s is not %s: only Llama's blocks are supported", where, config_words[i][0], config_words[i][1]);
    for (size_t i = 0; i < sizeof config_flags / sizeof *config_flags; i++)
        if (config_true(j, config_flags[i])) return fail("%s: %s is true: such models are not supported", where, config_flags[i]);
    // transformers 5 keeps rope_theta and the scaling in rope_parameters
    const retrofit_json *rope = retrofit_json_get(j, retrofit_json_get(j, "rope_parameters") ? "rope_parameters" : "rope_scaling"), *kind;
    c->rope_theta = config_number(j, where, "rope_theta", config_number(rope, where, "rope_theta", 10000, &ok), &ok);
    if ((kind = retrofit_json_get(rope, "rope_type")) || (kind = retrofit_json_get(rope, "type"))) {
        c->rope_llama3 = config_is(kind, "llama3");
        if (!c->rope_llama3 && !config_is(kind, "default")) return fail("%s: rope_scaling is not of type llama3: no other is known", where);
        c->rope_factor = config_number(rope, where, "factor", 0, &ok), c->rope_low = config_number(rope, where, "low_freq_factor", 0, &ok);
        c->rope_high = config_number(rope, where, "high_freq_factor", 0, &ok);
        c->rope_original_context = config_number(rope, where, "original_max_position_embeddings", 0, &ok);
    }
    c->head_dim = c->n_heads ? c->n_embd / c->n_heads : 0;
    if (config_number(j, where, "head_dim", (double)c->head_dim, &ok) != (double)c->head_dim && ok)
        return fail("%s: head_dim is not %zu / %zu: such models are not supported", where, c->n_embd, c->n_heads);
    if (config_number(init, where, "embed_scale", 1, &ok) != 1 && ok) return fail("%s: init_values.embed_scale is not 1", where);
    c->norm_eps = (float)config_number(j, where, plain ? "rms_norm_eps" : "norm_eps", plain ? 1e-6 : 0, &ok);
    c->state_std = (float)config_number(init, where, "std", RETROFIT_STATE_STD, &ok);
    c->tied = plain && config_true(j, "tie_word_embeddings");
    c->bos = config_id(config_number(j, where, "bos_token_id", -1, &ok)), c->eos = config_id(config_number(j, where, "eos_token_id", -1, &ok));
    return ok && retrofit_config_check(c, where);
}

bool retrofit_config_read(retrofit_config *c, const char *directory) {
    char path[RETROFIT_PATH];
    size_t size;
    char *text = retrofit_path(path, directory, "config.json") ? read_file(path, &size) : NULL;
    retrofit_json *j = text ? retrofit_json_parse(text, size, path) : NULL;
    bool ok = j && config_parse(c, j, path);
    retrofit_json_free(j), free(text);
    return ok;
}

static const char *number_text(double x, char *buffer) { // the shortest decimal that reads back as the same float, else double
    bool narrow = (double)(float)x == x;
    for (int digits = 1; digits <= 17; digits++) {
        snprintf(buffer, 32, "%.*g", digits, x);
        if (narrow ? strtof(buffer, NULL) == (float)x : strtod(buffer, NULL) == x) break;
    }
    return buffer;
}

bool retrofit_config_write(const retrofit_config *c, retrofit_type type, const char *directory) {
    char path[RETROFIT_PATH], a[32], b[32], e[32];
    bool plain = retrofit_is_plain(c);
    FILE *f = retrofit_path(path, directory, "config.json") ? fopen(path, "wb") : NULL;
    if (!f) return fail("%s: %s", path, strerror(errno));
    errno = 0;
    fprintf(f, "{\n");
    for (size_t i = 0; i < sizeof config_sizes / sizeof *config_sizes; i++) {
        const char *key = plain ? config_sizes[i].plain : config_sizes[i].recurrent;
        if (key) fprintf(f, "  \"%s\": %zu,\n", key, *(const size_t *)(const void *)((const char *)c + config_sizes[i].field));
    }
    if (plain)
        fprintf(f, "  \"architectures\": [\"LlamaForCausalLM\"],\n  \"model_type\": \"llama\",\n  \"hidden_act\": \"silu\",\n"
                   "  \"attention_bias\": false,\n  \"mlp_bias\": false,\n");
    else {
        size_t depth = c->prelude + c->core * c->mean_recurrence + c->coda;
        double sigma = sqrt(2.0 / (5.0 * (double)c->n_embd));
        fprintf(f,
                "  \"architectures\": [\"RavenForCausalLM\"],\n  \"model_type\": \"huginn_raven\",\n"
                "  \"auto_map\": {\n    \"AutoConfig\": \"raven_config_minimal.RavenConfig\",\n"
                "    \"AutoModelForCausalLM\": \"raven_modeling_minimal_llama.RavenForCausalLM\"\n  },\n"
                "  \"architecture_class_name\": \"RecurrentGPT\",\n  \"block_class_name\": \"SandwichBlock\",\n"
                "  \"norm_class_name\": \"RMSNorm_llama\",\n  \"mlp_class_name\": \"GatedMLP\",\n  \"nonlin_name\": \"SiLU\",\n"
                "  \"injection_type\": \"linear\",\n  \"state_init\": \"like-init\",\n  \"init_strategy\": \"takase\",\n"
                "  \"sampling_scheme\": \"poisson-lognormal-filling\",\n  \"test_time_noise\": 0,\n  \"test_time_noise_type\": \"fixed\",\n"
                "  \"bias\": false,\n  \"qk_bias\": false,\n  \"tie_embeddings\": false,\n  \"vocab_size\": %zu,\n  \"block_size\": %zu,\n"
                "  \"n_layers\": %zu,\n  \"effective_expected_depth\": %zu,\n",
                c->vocab, c->context, c->prelude + c->core + c->coda, depth);
        fprintf(f, "  \"init_values\": {\"embed_scale\": 1.0, \"embedding\": %s, \"out_proj\": %s, \"std\": %s},\n", number_text(sigma, a),
                number_text(sigma / sqrt(2.0 * (double)depth), b),
                number_text(c->state_std == (float)RETROFIT_STATE_STD ? RETROFIT_STATE_STD : (double)c->state_std, e));
    }
    if (c->bos >= 0) fprintf(f, "  \"bos_token_id\": %d,\n", (int)c->bos);
    if (c->eos >= 0) fprintf(f, "  \"eos_token_id\": %d,\n", (int)c->eos);
    if (c->rope_llama3)
        fprintf(f, "  \"rope_scaling\": {\"factor\": %s, \"high_freq_factor\": %s, \"low_freq_factor\": %s, "
                   "\"original_max_position_embeddings\": %.0f, \"rope_type\": \"llama3\"},\n",
                number_text(c->rope_factor, a), number_text(c->rope_high, b), number_text(c->rope_low, e), c->rope_original_context);
    fprintf(f, "  \"head_dim\": %zu,\n  \"%s\": %s,\n  \"rope_theta\": %s,\n  \"tie_word_embeddings\": false,\n  \"torch_dtype\": \"%s\"\n}\n",
            c->head_dim, plain ? "rms_norm_eps" : "norm_eps", number_text((double)c->norm_eps, a), number_text(c->rope_theta, b),
            type == RETROFIT_BF16 ? "bfloat16" : "float32");
    return finish_file(f, path, true);
}

// ---- The one list of parameters -------------------------------------------------------------------------------------------
static void piece(retrofit_parameter *p, size_t rows, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(p->piece[p->pieces].name, sizeof p->piece->name, format, args);
    va_end(args);
    p->piece[p->pieces++].rows = rows;
    p->rows += rows;
}

static void list(retrofit_model *m, retrofit_parameter *p, size_t cols, retrofit_kind kind, retrofit_part part) {
    p->cols = cols, p->kind = kind, p->part = part;
    p->weight.stride = cols, p->weight.type = RETROFIT_F32;
    m->parameters[m->parameter_count++] = p;
    m->weight_count += p->rows * cols;
}

// One layer under the authors' names, or under a plain Llama's, whose q, k, v and gate, up are separate tensors.
static void list_layer(retrofit_model *m, retrofit_layer *w, const char *group, size_t i, retrofit_part part) {
    const retrofit_config *c = &m->config;
    size_t d = c->n_embd, F = c->intermediate, kv = c->n_kv_heads * c->head_dim;
    if (retrofit_is_plain(c)) {
        piece(&w->norm_1, 1, "model.layers.%zu.input_layernorm.weight", i);
        piece(&w->wqkv, d, "model.layers.%zu.self_attn.q_proj.weight", i);
        piece(&w->wqkv, kv, "model.layers.%zu.self_attn.k_proj.weight", i);
        piece(&w->wqkv, kv, "model.layers.%zu.self_attn.v_proj.weight", i);
        piece(&w->proj, d, "model.layers.%zu.self_attn.o_proj.weight", i);
        piece(&w->norm_2, 1, "model.layers.%zu.post_attention_layernorm.weight", i);
        piece(&w->fc, F, "model.layers.%zu.mlp.gate_proj.weight", i);
        piece(&w->fc, F, "model.layers.%zu.mlp.up_proj.weight", i);
        piece(&w->mlp_proj, d, "model.layers.%zu.mlp.down_proj.weight", i);
    } else {
        piece(&w->norm_1, 1, "transformer.%s.%zu.norm_1.weight", group, i);
        piece(&w->wqkv, d + 2 * kv, "transformer.%s.%zu.attn.Wqkv.weight", group, i);
        piece(&w->proj, d, "transformer.%s.%zu.attn.proj.weight", group, i);
        piece(&w->norm_2, 1, "transformer.%s.%zu.norm_2.weight", group, i);
        piece(&w->fc, 2 * F, "transformer.%s.%zu.mlp.fc.weight", group, i);
        piece(&w->mlp_proj, d, "transformer.%s.%zu.mlp.proj.weight", group, i);
    }
    list(m, &w->norm_1, d, RETROFIT_NORM, part), list(m, &w->wqkv, d, RETROFIT_MATRIX, part), list(m, &w->proj, d, RETROFIT_MATRIX, part);
    list(m, &w->norm_2, d, RETROFIT_NORM, part), list(m, &w->fc, d, RETROFIT_MATRIX, part), list(m, &w->mlp_proj, F, RETROFIT_MATRIX, part);
}

retrofit_model *retrofit_model_new(const retrofit_config *config, const retrofit_ops *ops) {
    if (!retrofit_config_check(config, "model")) return NULL;
    retrofit_model *m = (retrofit_model *)allocate(1, sizeof *m);
    if (!m) return NULL;
    m->config = *config, m->ops = ops;
    size_t P = config->prelude, C = config->core, D = config->coda, d = config->n_embd, V = config->vocab;
    bool plain = retrofit_is_plain(config);
    m->prelude = (retrofit_layer *)allocate(P, sizeof *m->prelude);
    m->core = (retrofit_layer *)allocate(C, sizeof *m->core);
    m->coda = (retrofit_layer *)allocate(D, sizeof *m->coda);
    m->parameters = (retrofit_parameter **)allocate(6 * (P + C + D) + 4, sizeof *m->parameters);
    if (!m->prelude || !m->core || !m->coda || !m->parameters) return retrofit_free(m), (retrofit_model *)NULL;
    piece(&m->wte, V, plain ? "model.embed_tokens.weight" : "transformer.wte.weight");
    list(m, &m->wte, d, RETROFIT_EMBEDDING, RETROFIT_PART_EMBEDDING);
    for (size_t i = 0; i < P; i++) list_layer(m, &m->prelude[i], "prelude", i, RETROFIT_PART_PRELUDE);
    if (!plain) {
        piece(&m->adapter, d, "transformer.adapter.weight");
        list(m, &m->adapter, 2 * d, RETROFIT_MATRIX, RETROFIT_PART_ADAPTER);
    }
    for (size_t i = 0; i < C; i++) list_layer(m, &m->core[i], "core_block", i, RETROFIT_PART_CORE);
    for (size_t i = 0; i < D; i++) list_layer(m, &m->coda[i], "coda", i, RETROFIT_PART_CODA);
    piece(&m->ln_f, 1, plain ? "model.norm.weight" : "transformer.ln_f.weight");
    list(m, &m->ln_f, d, RETROFIT_NORM, RETROFIT_PART_NORM);
    piece(&m->lm_head, V, "lm_head.weight");
    list(m, &m->lm_head, d, RETROFIT_HEAD, RETROFIT_PART_HEAD);
    return m;
}

void retrofit_free(retrofit_model *m) {
    if (!m) return;
    void *arenas[] = {m->weights, m->masters, m->grads, m->moments};
    for (size_t i = 0; i < 4; i++)
        if (arenas[i]) m->ops->free(arenas[i]);
    for (size_t i = 0; i < m->map_count; i++) retrofit_safetensors_close(&m->maps[i]);
    free(m->maps), free(m->prelude), free(m->core), free(m->coda), free(m->parameters), free(m);
}

// One fp32 copy of every parameter in one arena: its size, and where each copy lies (`member`: which of master, grad, m, v).
static float **copy_of(retrofit_parameter *p, size_t member) { return (float **)(void *)((char *)p + member); }

static void *allocate_copies(retrofit_model *m, size_t member, size_t *bytes) {
    arena a = {NULL, 0};
    for (int pass = 0; pass < 2; pass++) {
        for (size_t i = 0; i < m->parameter_count; i++)
            *copy_of(m->parameters[i], member) = (float *)take(&a, m->parameters[i]->rows * m->parameters[i]->cols, sizeof(float));
        if (pass == 0) {
            if (bytes) *bytes = a.used;
            if (!(a.base = (char *)m->ops->alloc(a.used))) return NULL;
            a.used = 0;
        }
    }
    return a.base;
}

// The type the operations read a parameter in: norms and the embedding stay fp32, matrices take the table's type.
static retrofit_type compute_type(const retrofit_model *m, const retrofit_parameter *p) {
    return p->kind == RETROFIT_NORM || p->kind == RETROFIT_EMBEDDING ? RETROFIT_F32 : m->ops->act_type;
}

bool retrofit_model_allocate(retrofit_model *m, retrofit_mode mode) {
    if (!(m->masters = allocate_copies(m, offsetof(retrofit_parameter, master), NULL))) return false;
    if (mode == RETROFIT_TRAINING && !(m->grads = allocate_copies(m, offsetof(retrofit_parameter, grad), &m->grad_bytes))) return false;
    arena a = {NULL, 0};
    for (int pass = 0; pass < 2; pass++) {
        for (size_t i = 0; i < m->parameter_count; i++) {
            retrofit_parameter *p = m->parameters[i];
            p->weight.type = compute_type(m, p), p->weight.data = p->master;
            if (p->weight.type != RETROFIT_F32) p->weight.data = take(&a, p->rows * p->cols, retrofit_type_size(p->weight.type));
        }
        if (pass == 0 && a.used) {
            if (!(m->weights = m->ops->alloc(a.used))) return false;
            a.base = (char *)m->weights, a.used = 0;
        }
    }
    return true;
}

void retrofit_refresh(retrofit_model *m) {
    for (size_t i = 0; i < m->parameter_count; i++) {
        retrofit_parameter *p = m->parameters[i];
        if (p->weight.type != RETROFIT_F32) m->ops->cast((act *)p->weight.data, p->master, p->rows * p->cols);
    }
}

void retrofit_zero_grad(retrofit_model *m) { m->ops->zero(m->grads, m->grad_bytes); }

// ---- Loading ---------------------------------------------------------------------------------------------------------------
static bool open_map(retrofit_model *m, const char *path) {
    retrofit_map *maps = (retrofit_map *)realloc(m->maps, (m->map_count + 1) * sizeof *maps);
    if (!maps) return fail("out of memory");
    m->maps = maps;
    if (!retrofit_safetensors_open(&maps[m->map_count], path)) return false;
    m->map_count++;
    return true;
}

// model.safetensors, or every file its index names.
static bool open_maps(retrofit_model *m, const char *directory) {
    char path[RETROFIT_PATH], index[RETROFIT_PATH];
    size_t size;
    if (!retrofit_path(path, directory, "model.safetensors") || !retrofit_path(index, directory, "model.safetensors.index.json")) return false;
    if (access(path, F_OK) == 0) return open_map(m, path);
    if (access(index, F_OK)) return fail("%s: there is no model.safetensors and no model.safetensors.index.json", directory);
    char *text = read_file(index, &size);
    retrofit_json *j = text ? retrofit_json_parse(text, size, index) : NULL;
    const retrofit_json *map = retrofit_json_get(j, "weight_map");
    bool ok = j && (map || fail("%s: no weight_map", index));
    for (const retrofit_json *e = map ? map->child : NULL; ok && e; e = e->next) {
        size_t seen = 0;
        if (e->type != RETROFIT_JSON_STRING || strchr(e->string, '/')) ok = fail("%s: %s is not in a file of this directory", index, e->key);
        ok = ok && retrofit_path(path, directory, e->string);
        while (ok && seen < m->map_count && strcmp(m->maps[seen].path, path)) seen++;
        if (ok && seen == m->map_count) ok = open_map(m, path);
    }
    retrofit_json_free(j), free(text);
    return ok;
}

static const retrofit_tensor *find_tensor(const retrofit_model *m, const char *name) {
    for (size_t i = 0; i < m->map_count; i++) {
        const retrofit_tensor *t = retrofit_safetensors_find(&m->maps[i], name);
        if (t) return t;
    }
    return NULL;
}

static bool find_piece(const retrofit_model *m, const retrofit_parameter *p, size_t i, const char *where, const retrofit_tensor **out) {
    const retrofit_tensor *t = find_tensor(m, p->piece[i].name);
    if (!t && p->kind == RETROFIT_HEAD && m->config.tied) t = find_tensor(m, m->wte.piece[0].name);
    if (!t) return fail("%s: tensor %s is missing", where, p->piece[i].name);
    bool norm = p->kind == RETROFIT_NORM;
    if (t->type == RETROFIT_I32 || t->dims != (norm ? 1u : 2u) || t->shape[0] != (norm ? p->cols : p->piece[i].rows) ||
        (!norm && t->shape[1] != p->cols))
        return fail("%s: tensor %s has the shape (%zu, %zu), the config asks for (%zu, %zu)", where, t->name, t->dims ? t->shape[0] : 1,
                    t->dims > 1 ? t->shape[1] : 1, norm ? p->cols : p->piece[i].rows, norm ? 1 : p->cols);
    *out = t;
    return true;
}

// n elements from a file to memory of the device, changing their type on the way.
static bool store(const retrofit_ops *ops, char *to, retrofit_type type, const char *from, retrofit_type from_type, size_t n) {
    if (type == from_type) return ops->upload(to, from, n * retrofit_type_size(type)), true;
    enum { CHUNK = 1 << 16 };
    float *wide = (float *)allocate(CHUNK, sizeof *wide);
    uint16_t *half = (uint16_t *)allocate(CHUNK, sizeof *half);
    for (size_t at = 0; wide && half && at < n; at += CHUNK) {
        size_t count = least(n - at, CHUNK);
        to_float(wide, from + at * retrofit_type_size(from_type), from_type, count);
        for (size_t i = 0; type == RETROFIT_BF16 && i < count; i++) half[i] = float_to_bf16(wide[i]);
        ops->upload(to + at * retrofit_type_size(type), type == RETROFIT_F32 ? (void *)wide : (void *)half, count * retrofit_type_size(type));
    }
    bool ok = wide && half;
    free(wide), free(half);
    return ok;
}

// Decides where each parameter lies, twice: to measure, and to copy what cannot stay in the file.
static bool load_weights(retrofit_model *m, retrofit_mode mode, const char *where) {
    bool in_place = mode == RETROFIT_INFERENCE && m->ops == &retrofit_cpu;
    arena a = {NULL, 0};
    for (int pass = 0; pass < 2; pass++) {
        for (size_t i = 0; i < m->parameter_count; i++) {
            retrofit_parameter *p = m->parameters[i];
            const retrofit_tensor *t[3];
            for (size_t j = 0; j < p->pieces; j++)
                if (!find_piece(m, p, j, where, &t[j])) return false;
            if (mode == RETROFIT_INFERENCE) {
                p->weight.type = compute_type(m, p);
                if (in_place && p->kind != RETROFIT_NORM && t[0]->type == RETROFIT_BF16 && (p->pieces == 1 || t[1]->type == RETROFIT_BF16) &&
                    (p->pieces < 3 || t[2]->type == RETROFIT_BF16))
                    p->weight.type = RETROFIT_BF16;
                if (in_place && p->pieces == 1 && t[0]->type == p->weight.type &&
                    (uintptr_t)t[0]->data % retrofit_type_size(t[0]->type) == 0) {
                    p->weight.data = t[0]->data;
                    continue;
                }
                p->weight.data = take(&a, p->rows * p->cols, retrofit_type_size(p->weight.type));
            }
            if (pass == 0) continue;
            char *to = mode == RETROFIT_TRAINING ? (char *)p->master : (char *)p->weight.data;
            retrofit_type type = mode == RETROFIT_TRAINING ? RETROFIT_F32 : p->weight.type;
            for (size_t j = 0; j < p->pieces; j++) {
                if (!store(m->ops, to, type, (const char *)t[j]->data, t[j]->type, t[j]->count)) return false;
                to += t[j]->count * retrofit_type_size(type);
            }
        }
        if (pass == 0 && mode == RETROFIT_TRAINING && !retrofit_model_allocate(m, mode)) return false;
        if (pass == 0 && a.used) {
            if (!(m->weights = m->ops->alloc(a.used))) return false;
            a.base = (char *)m->weights, a.used = 0;
        }
    }
    return true;
}

// Every tensor of the files must have a place; rotary tables and a tied head, which older files carry, need none.
static bool check_all_used(const retrofit_model *m) {
    for (size_t f = 0; f < m->map_count; f++)
        for (size_t i = 0; i < m->maps[f].count; i++) {
            const char *name = m->maps[f].tensors[i].name;
            bool used = strstr(name, "rotary_emb.inv_freq") || (m->config.tied && !strcmp(name, "lm_head.weight"));
            for (size_t p = 0; !used && p < m->parameter_count; p++)
                for (size_t j = 0; !used && j < m->parameters[p]->pieces; j++) used = !strcmp(name, m->parameters[p]->piece[j].name);
            if (used && find_tensor(m, name) != &m->maps[f].tensors[i]) return fail("%s: tensor %s is there twice", m->maps[f].path, name);
            if (!used) return fail("%s: tensor %s has no place in a model of this config.json", m->maps[f].path, name);
        }
    return true;
}

retrofit_model *retrofit_load(const char *directory, const retrofit_ops *ops, retrofit_mode mode) {
    char path[RETROFIT_PATH];
    retrofit_config config;
    directory = retrofit_model_directory(directory, path);
    if (!retrofit_config_read(&config, directory)) return NULL;
    retrofit_model *m = retrofit_model_new(&config, ops);
    if (!m) return NULL;
    if (!open_maps(m, directory) || !load_weights(m, mode, directory) || !check_all_used(m)) return retrofit_free(m), (retrofit_model *)NULL;
    if (mode == RETROFIT_TRAINING) {
        retrofit_refresh(m);
        while (m->map_count) retrofit_safetensors_close(&m->maps[--m->map_count]);
    }
    return m;
}

// ---- Activations ---------------------------------------------------------------------------------------------------------
// HF's RoPE: angle of position p and pair i is p·θ^(-2i/h); Llama-3.2 turns long wavelengths `factor` times slower, with a ramp between.
static void rope_table(float *table, const retrofit_config *c, size_t positions) {
    for (size_t i = 0; i < c->head_dim / 2; i++) {
        float inverse = 1.0f / powf((float)c->rope_theta, (float)(2 * i) / (float)c->head_dim);
        if (c->rope_llama3) {
            double wavelength = 2 * 3.14159265358979323846 / (double)inverse, turns = c->rope_original_context / wavelength;
            double keep = fmin(1, fmax(0, (turns - c->rope_low) / (c->rope_high - c->rope_low)));
            inverse = (float)((double)inverse * (keep + (1 - keep) / c->rope_factor));
        }
        for (size_t p = 0; p < positions; p++) {
            float angle = (float)p * inverse;
            table[(p * c->head_dim / 2 + i) * 2] = cosf(angle), table[(p * c->head_dim / 2 + i) * 2 + 1] = sinf(angle);
        }
    }
}

enum { LOGITS_BYTES = 1 << 26 }; // rows of logits exist in chunks of about this size, never (N,V) at once

static void lay_out_block(retrofit_block *s, arena *a, const retrofit_config *c, size_t N, size_t size, bool in_place) {
    s->rstd_1 = (float *)take(a, N, 4), s->rstd_2 = (float *)take(a, N, 4);
    s->qkv = take(a, N * retrofit_qkv_width(c), size);
    s->attention = take(a, N * c->n_embd, size);
    s->lse = (float *)take(a, N * c->n_heads, 4);
    s->fc = take(a, N * 2 * c->intermediate, size);
    if (!in_place) s->mid = (float *)take(a, N * c->n_embd, 4), s->out = (float *)take(a, N * c->n_embd, 4);
}

static void lay_out_activations(retrofit_activations *s, arena *a, const retrofit_config *c, retrofit_type type) {
    size_t N = s->B * s->T, d = c->n_embd, V = c->vocab, size = retrofit_type_size(type);
    size_t positions = s->T > s->capacity ? s->T : s->capacity;
    s->tokens = (int32_t *)take(a, N, 4), s->labels = (int32_t *)take(a, N, 4), s->past = (int32_t *)take(a, s->B, 4);
    s->rope = (float *)take(a, positions * c->head_dim, 4);
    s->embedded = (float *)take(a, N * d, 4), s->state = (float *)take(a, N * d, 4), s->injected = (float *)take(a, N * d, 4);
    s->x = s->train ? NULL : (float *)take(a, N * d, 4);
    lay_out_block(&s->scratch, a, c, N, size, true);
    for (size_t i = 0; s->train && i < c->prelude; i++) lay_out_block(&s->prelude[i], a, c, N, size, false);
    for (size_t i = 0; s->train && i < s->K * c->core; i++) lay_out_block(&s->core[i], a, c, N, size, false);
    for (size_t i = 0; s->train && i < c->coda; i++) lay_out_block(&s->coda[i], a, c, N, size, false);
    for (size_t i = 0; s->train && i < s->K; i++) s->adapted[i] = (float *)take(a, N * d, 4);
    s->rstd_f = (float *)take(a, N, 4), s->final = take(a, N * d, size), s->losses = (float *)take(a, N, 4);
    s->norm = take(a, N * d, size), s->swiglu = take(a, N * c->intermediate, size);
    s->chunk = least(N, LOGITS_BYTES / (V * size) + 16);
    s->logits = take(a, s->chunk * V, size);
    s->wide = (float *)take(a, s->chunk > s->B ? s->chunk * V : s->B * V, 4);
    s->keys = take(a, s->slots * s->B * s->capacity, c->n_kv_heads * c->head_dim * size);
    s->values = take(a, s->slots * s->B * s->capacity, c->n_kv_heads * c->head_dim * size);
    if (!s->train) return;
    s->dx = (float *)take(a, N * d, 4), s->dinjected = (float *)take(a, N * d, 4);
    s->dbranch = take(a, N * d, size), s->dinner = take(a, N * d, size), s->dattention = take(a, N * d, size), s->dfinal = take(a, N * d, size);
    s->dqkv = take(a, N * retrofit_qkv_width(c), size);
    s->dswiglu = take(a, N * c->intermediate, size), s->dfc = take(a, N * 2 * c->intermediate, size);
}

// The arrays of pointers that live on the host; false + error.
static bool allocate_blocks(retrofit_activations *s, const retrofit_config *c) {
    s->prelude = (retrofit_block *)allocate(c->prelude, sizeof *s->prelude);
    s->core = (retrofit_block *)allocate(s->K * c->core, sizeof *s->core);
    s->coda = (retrofit_block *)allocate(c->coda, sizeof *s->coda);
    s->adapted = (float **)allocate(s->K, sizeof *s->adapted);
    s->seen = (int32_t *)allocate(s->B, sizeof *s->seen);
    s->next = (float *)allocate(s->capacity ? s->B * c->vocab : 1, sizeof *s->next);
    return s->prelude && s->core && s->coda && s->adapted && s->seen && s->next;
}

size_t retrofit_activations_bytes(const retrofit_config *c, const retrofit_ops *ops, size_t B, size_t T, size_t K, bool train) {
    retrofit_activations s;
    arena a = {NULL, 0};
    memset(&s, 0, sizeof s);
    s.B = B, s.T = T, s.K = train ? K : 0, s.train = train;
    if (allocate_blocks(&s, c)) lay_out_activations(&s, &a, c, ops->act_type);
    free(s.prelude), free(s.core), free(s.coda), free(s.adapted), free(s.seen), free(s.next);
    return a.used;
}

retrofit_activations *retrofit_activations_new(const retrofit_model *m, size_t B, size_t T, size_t K, bool train, size_t capacity,
                                               size_t recurrences) {
    const retrofit_config *c = &m->config;
    size_t positions = T > capacity ? T : capacity;
    if (B == 0 || T == 0 || B > SIZE_MAX / 2 / T) return fail("a batch of %zu x %zu tokens", B, T), (retrofit_activations *)NULL;
    if (positions > c->context)
        return fail("%zu positions are more than the model's context of %zu", positions, c->context), (retrofit_activations *)NULL;
    retrofit_activations *s = (retrofit_activations *)allocate(1, sizeof *s);
    if (!s) return NULL;
    s->model = m, s->B = B, s->T = T, s->K = train && c->core ? K : 0, s->train = train, s->capacity = capacity;
    s->slots = capacity ? c->prelude + recurrences * c->core + c->coda : 0;
    arena a = {NULL, 0};
    float *table = (float *)allocate(positions * c->head_dim, 4);
    if (table && allocate_blocks(s, c)) {
        lay_out_activations(s, &a, c, m->ops->act_type);
        s->bytes = a.used;
        if (a.used == SIZE_MAX) fail("a batch of %zu x %zu tokens is larger than memory can be", B, T);
        else s->arena = m->ops->alloc(a.used);
    }
    if (!s->arena) return free(table), retrofit_activations_free(s), (retrofit_activations *)NULL;
    a.base = (char *)s->arena, a.used = 0;
    lay_out_activations(s, &a, c, m->ops->act_type);
    rope_table(table, c, positions);
    m->ops->upload(s->rope, table, positions * c->head_dim * 4);
    free(table);
    return s;
}

void retrofit_activations_free(retrofit_activations *a) {
    if (!a) return;
    if (a->arena) a->model->ops->free(a->arena);
    free(a->prelude), free(a->core), free(a->coda), free(a->adapted), free(a->seen), free(a->next), free(a);
}

// ---- Block: x += proj(attention(RMSNorm_1 x)); x += mlp_proj(swiglu(fc(RMSNorm_2 x))) ----------------------------------------
static act *act_at(const retrofit_ops *ops, act *p, size_t i) { return (char *)p + i * retrofit_type_size(ops->act_type); }

// x may be s->mid and s->out too: then nothing but the result is kept. slot: where in the KV cache this layer's keys go, if there is one.
static void block_forward(retrofit_activations *a, const retrofit_layer *w, retrofit_block *s, const float *x, size_t slot) {
    const retrofit_config *c = &a->model->config;
    const retrofit_ops *ops = a->model->ops;
    size_t N = a->N, d = c->n_embd, Q = retrofit_qkv_width(c), F = c->intermediate, H = c->n_heads, G = c->n_kv_heads, h = c->head_dim;
    s->x = x;
    ops->rmsnorm_forward(a->norm, s->rstd_1, x, (const float *)w->norm_1.weight.data, N, d, c->norm_eps);
    ops->matmul_forward(s->qkv, a->norm, w->wqkv.weight, N, d, Q);
    ops->rope_forward(s->qkv, a->rope, a->capacity ? a->past : NULL, a->b, a->t, H, G, h);
    if (a->capacity) {
        size_t at = slot * a->B * a->capacity * G * h;
        act *keys = act_at(ops, a->keys, at), *values = act_at(ops, a->values, at);
        ops->kv_store(keys, values, s->qkv, a->past, a->b, a->t, a->capacity, H, G, h);
        ops->attention_cached(s->attention, s->qkv, keys, values, a->past, a->b, a->t, a->capacity, H, G, h);
    } else ops->attention_forward(s->attention, s->lse, s->qkv, a->b, a->t, H, G, h);
    ops->matmul_residual_forward(s->mid, x, s->attention, w->proj.weight, N, d, d);
    ops->rmsnorm_forward(a->norm, s->rstd_2, s->mid, (const float *)w->norm_2.weight.data, N, d, c->norm_eps);
    ops->matmul_forward(s->fc, a->norm, w->fc.weight, N, d, 2 * F);
    ops->swiglu_forward(a->swiglu, s->fc, N, F);
    ops->matmul_residual_forward(s->out, s->mid, a->swiglu, w->mlp_proj.weight, N, F, d);
}

// a->dx comes in as the gradient of s->out and leaves as that of s->x. Norms and swiglu are computed again.
static void block_backward(retrofit_activations *a, retrofit_layer *w, const retrofit_block *s) {
    const retrofit_config *c = &a->model->config;
    const retrofit_ops *ops = a->model->ops;
    size_t N = a->N, d = c->n_embd, Q = retrofit_qkv_width(c), F = c->intermediate, H = c->n_heads, G = c->n_kv_heads, h = c->head_dim;
    const float *norm_1 = (const float *)w->norm_1.weight.data, *norm_2 = (const float *)w->norm_2.weight.data;

    ops->cast(a->dbranch, a->dx, N * d);
    ops->swiglu_forward(a->swiglu, s->fc, N, F);
    ops->matmul_backward_weight(w->mlp_proj.grad, F, a->dbranch, a->swiglu, N, F, d);
    ops->matmul_backward_input(a->dswiglu, a->dbranch, w->mlp_proj.weight, N, F, d);
    ops->swiglu_backward(a->dfc, a->dswiglu, s->fc, N, F);
    ops->rmsnorm_forward(a->norm, s->rstd_2, s->mid, norm_2, N, d, c->norm_eps);
    ops->matmul_backward_weight(w->fc.grad, d, a->dfc, a->norm, N, d, 2 * F);
    ops->matmul_backward_input(a->dinner, a->dfc, w->fc.weight, N, d, 2 * F);
    ops->rmsnorm_backward(a->dx, w->norm_2.grad, a->dinner, s->mid, s->rstd_2, norm_2, N, d);

    ops->cast(a->dbranch, a->dx, N * d);
    ops->matmul_backward_weight(w->proj.grad, d, a->dbranch, s->attention, N, d, d);
    ops->matmul_backward_input(a->dattention, a->dbranch, w->proj.weight, N, d, d);
    ops->attention_backward(a->dqkv, a->dattention, s->qkv, s->attention, s->lse, a->b, a->t, H, G, h);
    ops->rope_backward(a->dqkv, a->rope, a->b, a->t, H, G, h);
    ops->rmsnorm_forward(a->norm, s->rstd_1, s->x, norm_1, N, d, c->norm_eps);
    ops->matmul_backward_weight(w->wqkv.grad, d, a->dqkv, a->norm, N, d, Q);
    ops->matmul_backward_input(a->dinner, a->dqkv, w->wqkv.weight, N, d, Q);
    ops->rmsnorm_backward(a->dx, w->norm_1.grad, a->dinner, s->x, s->rstd_1, norm_1, N, d);
}

// Blocks in a row: each into its own buffers (saved), or all of them in place on x.
static const float *blocks_forward(retrofit_activations *a, const retrofit_layer *layers, size_t count, retrofit_block *saved, float *x, size_t slot) {
    for (size_t i = 0; i < count; i++) {
        retrofit_block *s = saved ? &saved[i] : &a->scratch;
        if (!saved) s->mid = s->out = x;
        block_forward(a, &layers[i], s, x, slot + i);
        x = s->out;
    }
    return x;
}

static void blocks_backward(retrofit_activations *a, retrofit_layer *layers, size_t count, const retrofit_block *saved) {
    while (count--) block_backward(a, &layers[count], &saved[count]);
}

// ---- Model -----------------------------------------------------------------------------------------------------------------
// The two halves of the adapter: A_s reads the state, A_e what the prelude made of the tokens.
static retrofit_weight adapter_half(const retrofit_model *m, bool second) {
    retrofit_weight w = m->adapter.weight;
    if (second) w.data = (const char *)w.data + m->config.n_embd * retrofit_type_size(w.type);
    return w;
}

bool retrofit_prelude(retrofit_activations *a, const int32_t *tokens, size_t b, size_t t) {
    const retrofit_model *m = a->model;
    size_t d = m->config.n_embd;
    if (b == 0 || t == 0 || b > a->B || t > a->T) return fail("a batch of %zu x %zu tokens where at most %zu x %zu fit", b, t, a->B, a->T);
    for (size_t i = 0; i < b * t; i++)
        if (tokens[i] < 0 || (size_t)tokens[i] >= m->config.vocab)
            return fail("token %zu is %d, but the vocabulary has %zu entries", i, (int)tokens[i], m->config.vocab);
    a->b = b, a->t = t, a->N = b * t, a->n = a->k = 0;
    m->ops->upload(a->tokens, tokens, a->N * sizeof *tokens);
    m->ops->embedding_forward(a->embedded, a->tokens, m->wte.weight, a->N, d);
    a->e = blocks_forward(a, m->prelude, m->config.prelude, a->train ? a->prelude : NULL, a->embedded, 0);
    if (retrofit_is_plain(&m->config)) return true;
    m->ops->cast(a->norm, a->e, a->N * d);
    m->ops->matmul_residual_forward(a->injected, NULL, a->norm, adapter_half(m, true), a->N, d, d);
    return true;
}

void retrofit_start(retrofit_activations *a, float sigma, uint64_t seed) {
    a->model->ops->state_init(a->state, a->capacity ? a->past : NULL, a->b, a->t, a->model->config.n_embd, sigma, seed);
}

// s_i = core(A_s·s_{i-1} + A_e·e). Without gradient, in place on a->state; with, every s_i stays where the core's last block left it.
void retrofit_recur(retrofit_activations *a, size_t n, size_t k) {
    const retrofit_model *m = a->model;
    size_t C = m->config.core, d = m->config.n_embd;
    for (size_t i = 0; C && i < n + k; i++) {
        bool save = i >= n;
        size_t j = a->k; // of the recurrences with gradient
        const float *s = j ? a->core[j * C - 1].out : a->state;
        float *x = save ? a->adapted[j] : a->state;
        m->ops->cast(a->norm, s, a->N * d);
        m->ops->matmul_residual_forward(x, a->injected, a->norm, adapter_half(m, false), a->N, d, d);
        blocks_forward(a, m->core, C, save ? &a->core[j * C] : NULL, x, m->config.prelude + (a->n + a->k) * C);
        if (save) a->k++;
        else a->n++;
    }
}

static const float *latest_state(const retrofit_activations *a) {
    const retrofit_config *c = &a->model->config;
    return retrofit_is_plain(c) ? a->embedded : a->k ? a->core[a->k * c->core - 1].out : a->state;
}

void retrofit_coda(retrofit_activations *a) {
    const retrofit_model *m = a->model;
    const retrofit_config *c = &m->config;
    float *x = (float *)latest_state(a);
    if (!a->train) m->ops->copy(a->x, x, a->N * c->n_embd * sizeof *x), x = a->x; // the state goes on; the coda works on a copy
    a->last = blocks_forward(a, m->coda, c->coda, a->train ? a->coda : NULL, x, a->slots - (a->slots ? c->coda : 0));
    m->ops->rmsnorm_forward(a->final, a->rstd_f, a->last, (const float *)m->ln_f.weight.data, a->N, c->n_embd, c->norm_eps);
}

bool retrofit_forward(retrofit_activations *a, const int32_t *tokens, size_t b, size_t t, float sigma, uint64_t seed, size_t n, size_t k) {
    if (k > a->K && a->model->config.core) return fail("%zu recurrences with gradient where %zu fit", k, a->K);
    if (!retrofit_prelude(a, tokens, b, t)) return false;
    if (a->model->config.core) retrofit_start(a, sigma, seed);
    retrofit_recur(a, n, k);
    retrofit_coda(a);
    return true;
}

void retrofit_logits(retrofit_activations *a, size_t first, size_t count, float *logits) {
    const retrofit_model *m = a->model;
    size_t d = m->config.n_embd, V = m->config.vocab;
    for (size_t at = 0; at < count; at += a->chunk) {
        size_t rows = least(count - at, a->chunk);
        m->ops->matmul_residual_forward(a->wide, NULL, act_at(m->ops, a->final, (first + at) * d), m->lm_head.weight, rows, d, V);
        m->ops->download(logits + at * V, a->wide, rows * V * sizeof *logits);
    }
}

double retrofit_loss(retrofit_activations *a, const int32_t *labels, float scale) {
    const retrofit_model *m = a->model;
    const retrofit_ops *ops = m->ops;
    size_t d = m->config.n_embd, V = m->config.vocab, counted = 0;
    for (size_t i = 0; i < a->N; i++) {
        if (labels[i] != -100 && (labels[i] < 0 || (size_t)labels[i] >= V))
            return fail("label %zu is %d, but the vocabulary has %zu entries", i, (int)labels[i], V), (double)NAN;
        counted += labels[i] >= 0;
    }
    if (counted == 0) return fail("all labels of the batch are -100: there is no loss"), (double)NAN;
    ops->upload(a->labels, labels, a->N * sizeof *labels);
    for (size_t at = 0; at < a->N; at += a->chunk) {
        size_t rows = least(a->N - at, a->chunk);
        act *final = act_at(ops, a->final, at * d);
        ops->matmul_forward(a->logits, final, m->lm_head.weight, rows, d, V);
        ops->cross_entropy(a->losses + at, a->logits, a->labels + at, rows, V, scale / (float)counted);
        if (scale == 0) continue;
        ops->matmul_backward_weight(m->lm_head.grad, d, a->logits, final, rows, d, V);
        ops->matmul_backward_input(act_at(ops, a->dfinal, at * d), a->logits, m->lm_head.weight, rows, d, V);
    }
    if (scale != 0) {
        ops->zero(a->dx, a->N * d * sizeof *a->dx);
        ops->rmsnorm_backward(a->dx, m->ln_f.grad, a->dfinal, a->last, a->rstd_f, (const float *)m->ln_f.weight.data, a->N, d);
    }
    float *losses = (float *)malloc(a->N * sizeof *losses);
    if (!losses) return fail("out of memory"), (double)NAN;
    ops->download(losses, a->losses, a->N * sizeof *losses);
    double sum = 0;
    for (size_t i = 0; i < a->N; i++) sum += losses[i];
    free(losses);
    return sum / (double)counted;
}

// Truncated backpropagation (method: paper section 3): through the coda, then back over the k recurrences, where the gradients of A_s, A_e,
// the core's weights and e add up; it stops at s_n. Since A_e·e is the same in all of them, dA_e and de need only the sum of the dY.
void retrofit_backward(retrofit_activations *a) {
    retrofit_model *m = (retrofit_model *)a->model;
    const retrofit_ops *ops = m->ops;
    size_t C = m->config.core, d = m->config.n_embd;
    blocks_backward(a, m->coda, m->config.coda, a->coda);
    if (C) {
        ops->zero(a->dinjected, a->N * d * sizeof *a->dx);
        for (size_t j = a->k; j--;) {
            blocks_backward(a, m->core, C, &a->core[j * C]);
            ops->add(a->dinjected, a->dx, a->N * d);
            ops->cast(a->dbranch, a->dx, a->N * d);
            ops->cast(a->norm, j ? a->core[j * C - 1].out : a->state, a->N * d);
            ops->matmul_backward_weight(m->adapter.grad, 2 * d, a->dbranch, a->norm, a->N, d, d);
            if (j) ops->matmul_residual_backward_input(a->dx, a->dbranch, adapter_half(m, false), a->N, d, d);
        }
        ops->cast(a->dbranch, a->dinjected, a->N * d);
        ops->cast(a->norm, a->e, a->N * d);
        ops->matmul_backward_weight(m->adapter.grad + d, 2 * d, a->dbranch, a->norm, a->N, d, d);
        ops->matmul_residual_backward_input(a->dx, a->dbranch, adapter_half(m, true), a->N, d, d);
        blocks_backward(a, m->prelude, m->config.prelude, a->prelude);
    }
    ops->embedding_backward(m->wte.grad, a->tokens, a->dx, a->N, d);
}

double retrofit_flops_per_token(const retrofit_config *c, size_t T, size_t n, size_t k) {
    double d = (double)c->n_embd, F = (double)c->intermediate;
    double layer = 2 * (d * (double)retrofit_qkv_width(c) + d * d + 3 * d * F) + 2 * (double)T * d; // causal attention: T/2 keys on average
    double outside = (double)(c->prelude + c->coda) * layer + 2 * d * (double)c->vocab;
    double recurrence = c->core ? (double)c->core * layer + 2 * 2 * d * d : 0;
    return 3 * outside + recurrence * (double)(n + 3 * k);
}

// =====================================================================================================================
// 7  How many recurrences, how much of them, how fast: sampler, curriculum, learning rate
// =====================================================================================================================

// rate ~ LogNormal(ln r - σ²/2, σ = 1/2), so that its mean is r; p ~ Poisson(rate) + 1 recurrences; the last min(K, p) get gradients.
// The draw depends on m alone, so every device of a run, and a resumed run, makes the same one.
void retrofit_draw_recurrences(uint64_t m, size_t r, size_t K, size_t *n, size_t *k, float *rate) {
    mt19937 g;
    mt19937_seed(&g, (uint32_t)((514229 + m) % 0x7fffffffu));
    const double sigma = 0.5;
    float drawn = (float)exp(log((double)(r > K ? r : K)) - sigma * sigma / 2 + sigma * mt19937_normal(&g));
    size_t p = mt19937_poisson(&g, (double)drawn) + 1;
    *n = p > K ? p - K : 0;
    *k = p < K ? p : K;
    if (rate) *rate = drawn;
}

double retrofit_curriculum(retrofit_curriculum_kind kind, size_t t, size_t S, double w, double R) {
    double warm = ceil(w * (double)S);
    if (kind == RETROFIT_CURRICULUM_NONE || (double)t >= warm) return R;
    double x = (double)t / warm;
    return R * (kind == RETROFIT_CURRICULUM_LINEAR ? x : 1 - sqrt(1 - x));
}

double retrofit_linear_schedule(size_t t, size_t S, double w, double start, double base) {
    double warm = ceil(w * (double)S);
    return (double)t >= warm ? base : base * (start + (1 - start) * ((double)t / warm));
}

double retrofit_learning_rate(size_t t, size_t S, double w, double c, double min, double lr) {
    double warm = ceil(w * (double)S), cool = ceil(c * (double)S), s = (double)t;
    if (s < warm) return lr * (min + (1 - min) * (s / warm));
    if (s < (double)S - cool) return lr;
    double x = cool > 0 ? fmin(1, (s - ((double)S - cool)) / cool) : 1;
    return lr * (min + (1 - min) * 0.5 * (1 + cos(3.14159265358979323846 * x)));
}

// =====================================================================================================================
// 8  Optimizers
// =====================================================================================================================

static bool by_muon(const retrofit_parameter *p, retrofit_optimizer_kind kind) { return kind == RETROFIT_MUON && p->kind == RETROFIT_MATRIX; }

bool retrofit_optimizer_init(retrofit_model *m, retrofit_optimizer_kind kind) {
    arena a = {NULL, 0};
    size_t size = retrofit_type_size(m->ops->act_type);
    for (int pass = 0; pass < 2; pass++) {
        size_t largest = 0, side = 0;
        for (size_t i = 0; i < m->parameter_count; i++) {
            retrofit_parameter *p = m->parameters[i];
            size_t n = p->rows * p->cols, shorter = p->rows < p->cols ? p->rows : p->cols;
            p->m = (float *)take(&a, n, 4);
            p->v = by_muon(p, kind) ? NULL : (float *)take(&a, n, 4);
            if (by_muon(p, kind) && n > largest) largest = n;
            if (by_muon(p, kind) && shorter > side) side = shorter;
        }
        m->muon_u = (float *)take(&a, largest, 4);
        m->muon_x = take(&a, largest, size), m->muon_y = take(&a, largest, size);
        m->muon_a = take(&a, side * side, size), m->muon_b = take(&a, side * side, size);
        if (pass == 0) {
            m->moment_bytes = a.used;
            if (!(m->moments = m->ops->alloc(a.used))) return false;
            a.base = (char *)m->moments, a.used = 0;
        }
    }
    return true;
}

// Muon: the momentum's update direction u, with its singular values pushed towards 1 by five steps of the quintic iteration
// X ← aX + (bA + cA²)X, A = XXᵀ, on X = u/(‖u‖ + 1e-7); X is kept with at most as many rows as columns.
static void muon_step(retrofit_model *m, const retrofit_parameter *p, const retrofit_optimizer *o, float scale) {
    const retrofit_ops *ops = m->ops;
    size_t rows = p->rows, cols = p->cols, r = rows < cols ? rows : cols, c = rows < cols ? cols : rows;
    retrofit_weight x = {m->muon_x, ops->act_type, c}, a = {m->muon_a, ops->act_type, r};
    ops->muon_momentum(m->muon_u, p->m, p->grad, rows * cols, scale, o->momentum);
    ops->muon_load(m->muon_x, m->muon_u, rows, cols, (float)(1 / (sqrt(ops->sum_squares(m->muon_u, rows * cols)) + 1e-7)));
    for (int i = 0; i < 5; i++) {
        ops->matmul_forward(m->muon_a, m->muon_x, x, r, c, r);
        ops->matmul_forward(m->muon_b, m->muon_a, a, r, r, r); // A is symmetric: A·Aᵀ = A²
        ops->axpby(m->muon_b, m->muon_a, r * r, -4.7750f, 2.0315f);
        ops->matmul_backward_input(m->muon_y, m->muon_b, x, r, c, r);
        ops->axpby(m->muon_x, m->muon_y, r * c, 1, 3.4445f);
    }
    ops->muon_update(p->master, m->muon_x, rows, cols, o->muon_lr, sqrtf(fmaxf(1, (float)rows / (float)cols)), o->weight_decay);
}

double retrofit_optimizer_step(retrofit_model *m, const retrofit_optimizer *o, size_t t) {
    double norm = sqrt(m->ops->sum_squares((const float *)m->grads, m->grad_bytes / sizeof(float)));
    float scale = o->clip > 0 ? (float)fmin(1, o->clip / (norm + 1e-6)) : 1;
    double bias1 = 1 - pow(o->beta1, (double)t), bias2 = 1 - pow(o->beta2, (double)t);
    for (size_t i = 0; i < m->parameter_count; i++) {
        retrofit_parameter *p = m->parameters[i];
        if (by_muon(p, o->kind)) muon_step(m, p, o, scale);
        else
            m->ops->adamw_update(p->master, p->m, p->v, p->grad, p->rows * p->cols, scale, o->lr, o->beta1, o->beta2, bias1, bias2, o->eps,
                                 o->weight_decay);
    }
    retrofit_refresh(m);
    return norm;
}

// =====================================================================================================================
// 9  Decoding with a KV cache
// =====================================================================================================================

// Each (layer, recurrence) has keys and values of its own: prelude layer i in slot i, core layer j of recurrence i in slot
// P + i·C + j, the coda in the last D. A row shorter than t is padded on the right: what the padding leaves in the cache lies behind
// the row's end, where no query looks before the next tokens have overwritten it.
const float *retrofit_feed(retrofit_activations *a, const int32_t *tokens, size_t b, size_t t, const int32_t *lengths, size_t r, float sigma,
                           uint64_t seed) {
    const retrofit_model *m = a->model;
    const retrofit_config *c = &m->config;
    size_t d = c->n_embd, V = c->vocab;
    if (!a->capacity || a->train) return fail("these activations have no KV cache"), (const float *)NULL;
    if (c->core && (r == 0 || r > (a->slots - c->prelude - c->coda) / c->core))
        return fail("%zu recurrences, but the KV cache has room for %zu", r, (a->slots - c->prelude - c->coda) / c->core), (const float *)NULL;
    for (size_t i = 0; i < b && i < a->B; i++) {
        if (lengths && (lengths[i] < 1 || (size_t)lengths[i] > t)) return fail("row %zu: %d tokens of %zu", i, (int)lengths[i], t), (const float *)NULL;
        if ((size_t)a->seen[i] + t > a->capacity)
            return fail("%zu tokens after %d do not fit in a context of %zu", t, (int)a->seen[i], a->capacity), (const float *)NULL;
    }
    m->ops->upload(a->past, a->seen, a->B * sizeof *a->seen);
    if (!retrofit_forward(a, tokens, b, t, sigma, seed, r, 0)) return NULL;
    for (size_t i = 0; i < b; i++) {
        size_t length = lengths ? (size_t)lengths[i] : t;
        if (t > 1) m->ops->matmul_residual_forward(a->wide + i * V, NULL, act_at(m->ops, a->final, (i * t + length - 1) * d), m->lm_head.weight, 1, d, V);
        a->seen[i] += (int32_t)length;
    }
    if (t == 1) m->ops->matmul_residual_forward(a->wide, NULL, a->final, m->lm_head.weight, b, d, V);
    m->ops->download(a->next, a->wide, b * V * sizeof *a->next);
    return a->next;
}

void retrofit_rewind(retrofit_activations *a) { memset(a->seen, 0, a->B * sizeof *a->seen); }

int32_t retrofit_argmax(const float *logits, size_t V) {
    size_t best = 0;
    for (size_t v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    return (int32_t)best;
}

typedef struct {
    float p;
    int32_t id;
} weighed;

static int by_probability(const void *x, const void *y) { // descending; equals by id, so that a seed decides alone
    const weighed *a = (const weighed *)x, *b = (const weighed *)y;
    return a->p > b->p ? -1 : a->p < b->p ? 1 : a->id < b->id ? -1 : 1;
}

int32_t retrofit_sample(const float *logits, size_t V, retrofit_sampling *s, void *scratch) {
    if (!(s->temperature > 0)) return retrofit_argmax(logits, V);
    weighed *c = (weighed *)scratch;
    size_t n = V;
    float top = largest(logits, V), min_p = fminf(s->min_p, 1); // the largest stays, whatever min_p is
    if (!isfinite(top)) return retrofit_argmax(logits, V);
    for (size_t v = 0; v < V; v++) c[v].p = fmaxf(0, expf((logits[v] - top) / s->temperature)), c[v].id = (int32_t)v; // fmaxf: NaN is 0
    if (min_p > 0 && !(s->top_p < 1)) { // relative to the largest, whose weight is 1: needs no sorting, and leaves less to sort
        n = 0;
        for (size_t v = 0; v < V; v++)
            if (c[v].p >= min_p) c[n++] = c[v];
    }
    if (s->top_k || s->top_p < 1) qsort(c, n, sizeof *c, by_probability);
    if (s->top_k && s->top_k < n) n = s->top_k;
    double total = 0, kept = 0;
    for (size_t i = 0; i < n; i++) total += c[i].p;
    if (s->top_p < 1) { // the fewest whose share reaches top_p
        size_t i = 0;
        while (i < n && kept < s->top_p * total) kept += c[i++].p;
        for (n = i ? i : 1; n > 1 && c[n - 1].p < min_p;) n--;
        for (total = 0, i = 0; i < n; i++) total += c[i].p;
    }
    s->seed = hash64(s->seed, 0);
    double u = hash_uniform(s->seed, 1) * total;
    for (size_t i = 0; i < n; i++)
        if ((u -= c[i].p) < 0) return c[i].id;
    return c[n - 1].id;
}

// =====================================================================================================================
// 10  Checkpoints, token shards
// =====================================================================================================================

static bool sync_directory(const char *path) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool ok = fd >= 0 && fsync(fd) == 0;
    if (!ok) fail("%s: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    return ok;
}

// The directory a path lies in, in place.
static void cut_to_parent(char *path) {
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') path[--n] = 0;
    char *slash = strrchr(path, '/');
    if (!slash) strcpy(path, ".");
    else slash[slash == path] = 0;
}

char *retrofit_directory_begin(const char *final) {
    char path[RETROFIT_PATH];
    size_t n = strlen(final);
    while (n > 1 && final[n - 1] == '/') n--;
    if (n == 0 || n > 4000) return fail("'%s' is no name for a directory", final), (char *)NULL;
    snprintf(path, sizeof path, "%.*s", (int)n, final);
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) { // its parents, as mkdir -p does
        *slash = 0;
        if (mkdir(path, 0777) && errno != EEXIST) return fail("%s: %s", path, strerror(errno)), (char *)NULL;
        *slash = '/';
    }
    snprintf(path + n, sizeof path - n, ".tmp-%ld", (long)getpid());
    retrofit_directory_abandon(path); // of an earlier process of this number
    if (mkdir(path, 0777)) return fail("%s: %s", path, strerror(errno)), (char *)NULL;
    char *name = strdup(path);
    if (!name) fail("out of memory");
    return name;
}

void retrofit_directory_abandon(const char *temporary) {
    DIR *d = opendir(temporary);
    if (!d) return;
    char path[RETROFIT_PATH];
    for (struct dirent *e; (e = readdir(d));)
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..") && retrofit_path(path, temporary, e->d_name)) unlink(path);
    closedir(d), rmdir(temporary);
}

bool retrofit_directory_commit(const char *temporary, const char *final) {
    char parent[RETROFIT_PATH];
    snprintf(parent, sizeof parent, "%s", temporary);
    cut_to_parent(parent);
    if (!sync_directory(temporary)) return false;
    if (rename(temporary, final)) return fail("%s: %s", final, errno == ENOTEMPTY || errno == ENOTDIR ? "exists already: remove it" : strerror(errno));
    return sync_directory(parent);
}

static bool copy_file(const char *from, const char *to) {
    size_t size;
    char *text = read_file(from, &size);
    FILE *f = text ? fopen(to, "wb") : NULL;
    bool ok = f != NULL;
    if (text && !f) fail("%s: %s", to, strerror(errno));
    if (f) errno = 0, ok = finish_file(f, to, fwrite(text, 1, size, f) == size);
    free(text);
    return ok;
}

// What belongs to a tokenizer, and the authors' modelling code where the source has it.
static bool copy_tokenizer(const char *from, const char *to) {
    static const char *const names[] = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                                        "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
                                        "raven_config_minimal.py", "raven_modeling_minimal_llama.py"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char source[RETROFIT_PATH], target[RETROFIT_PATH];
        if (!retrofit_path(source, from, names[i]) || !retrofit_path(target, to, names[i])) return false;
        if (strcmp(from, to) && access(source, F_OK) == 0 && !copy_file(source, target)) return false;
    }
    return true;
}

const char *retrofit_model_directory(const char *directory, char path[RETROFIT_PATH]) {
    bool here = retrofit_path(path, directory, "config.json") && access(path, F_OK) == 0;
    if (!here && retrofit_path(path, directory, "latest/config.json") && access(path, F_OK) == 0 && retrofit_path(path, directory, "latest")) return path;
    return directory;
}

// The tensors a checkpoint is written from: the weights (kind 'w'), every piece under its name; or a kind of moments ('m', 'v'), each
// parameter whole under its label behind "m." or "v.". Appended to t; returns how many.
enum { TENSOR_NAME = 96 };
static size_t list_tensors(const retrofit_model *m, char kind, retrofit_tensor *t, char (*names)[TENSOR_NAME]) {
    size_t count = 0;
    for (size_t i = 0; i < m->parameter_count; i++) {
        const retrofit_parameter *p = m->parameters[i];
        const char *data = (const char *)(kind == 'm' ? p->m : kind == 'v' ? p->v : p->master ? p->master : p->weight.data);
        retrofit_type type = kind == 'w' && !p->master ? p->weight.type : RETROFIT_F32;
        for (size_t j = 0; data && j < (kind == 'w' ? p->pieces : 1); j++, count++) {
            size_t rows = kind == 'w' ? p->piece[j].rows : p->rows;
            snprintf(names[count], TENSOR_NAME, "%s%s", kind == 'm' ? "m." : kind == 'v' ? "v." : "", p->piece[j].name);
            retrofit_tensor out = {names[count], type, 2, {rows, p->cols, 0, 0}, rows * p->cols, data};
            if (kind == 'w' && p->kind == RETROFIT_NORM) out.dims = 1, out.shape[0] = p->cols;
            data += out.count * retrofit_type_size(type);
            t[count] = out;
        }
    }
    return count;
}

typedef struct {
    retrofit_tensor *t;
    char (*names)[TENSOR_NAME];
    size_t count;
} tensor_list;

static tensor_list tensors_of(const retrofit_model *m, const char *kinds) {
    tensor_list l = {NULL, NULL, 0};
    l.t = (retrofit_tensor *)allocate(3 * m->parameter_count, sizeof *l.t);
    l.names = (char (*)[TENSOR_NAME])allocate(3 * m->parameter_count, sizeof *l.names);
    for (; l.t && l.names && *kinds; kinds++) l.count += list_tensors(m, *kinds, l.t + l.count, l.names + l.count);
    return l;
}

static bool write_tensors(const retrofit_model *m, const char *kinds, const char *directory, const char *file, retrofit_type type,
                          const char *const *metadata) {
    char path[RETROFIT_PATH];
    tensor_list l = tensors_of(m, kinds);
    bool ok = l.count && retrofit_path(path, directory, file) && retrofit_safetensors_write(path, m->ops, l.t, l.count, type, metadata);
    free(l.t), free(l.names);
    return ok;
}

bool retrofit_save(const retrofit_model *m, const char *directory, retrofit_type type, const char *tokenizer_from) {
    return write_tensors(m, "w", directory, "model.safetensors", type, NULL) && retrofit_config_write(&m->config, type, directory) &&
           (!tokenizer_from || copy_tokenizer(tokenizer_from, directory));
}

bool retrofit_save_optimizer(const retrofit_model *m, const char *directory, const char *const *metadata) {
    return write_tensors(m, "mv", directory, "optimizer.safetensors", RETROFIT_F32, metadata);
}

bool retrofit_load_optimizer(retrofit_model *m, retrofit_map *f, const char *directory) {
    char path[RETROFIT_PATH];
    if (!retrofit_path(path, directory, "optimizer.safetensors") || !retrofit_safetensors_open(f, path)) return false;
    tensor_list l = tensors_of(m, "mv");
    bool ok = l.count && (l.count == f->count || fail("%s: %zu moments where the optimizer has %zu: was it another one?", path, f->count, l.count));
    for (size_t i = 0; ok && i < l.count; i++) {
        const retrofit_tensor *saved = retrofit_safetensors_find(f, l.t[i].name);
        if (!saved || saved->type != RETROFIT_F32 || saved->dims != 2 || saved->shape[0] != l.t[i].shape[0] || saved->shape[1] != l.t[i].shape[1])
            ok = fail("%s: %s is missing or of another shape", path, l.t[i].name);
        else m->ops->upload((void *)l.t[i].data, saved->data, saved->count * sizeof(float));
    }
    free(l.t), free(l.names);
    if (!ok) retrofit_safetensors_close(f);
    return ok;
}

// ---- Token shards -----------------------------------------------------------------------------------------------------------
typedef struct {
    void *base;
    size_t bytes, tokens, width, rows; // width: bytes of a token
} shard;

struct retrofit_data {
    size_t T, vocab, rows, shards;
    shard *shard;
    bool shuffle;
    uint64_t seed, epoch; // of `order`
    size_t *order;        // [rows] the rows of this epoch, when shuffling
    char *pattern;
};

static bool open_shard(retrofit_data *d, shard *s, const char *path) {
    if (!(s->base = map_file(path, &s->bytes))) return false;
    const int32_t *header = (const int32_t *)s->base;
    if (s->bytes < 1024) return fail("%s: %zu bytes are no token shard: the header alone has 1024", path, s->bytes);
    if (header[0] == RETROFIT_SHARD_MAGIC_16 && header[1] == 1) s->width = 2;
    else if (header[0] == RETROFIT_SHARD_MAGIC_32 && header[1] == 7) s->width = 4;
    else return fail("%s: not a token shard (magic %d, version %d): make one with convert --tokenize", path, header[0], header[1]);
    s->tokens = (s->bytes - 1024) / s->width;
    if (header[2] < 0 || (size_t)header[2] != s->tokens || (s->bytes - 1024) % s->width)
        return fail("%s: the header promises %d tokens, the file holds %zu: truncated?", path, header[2], s->tokens);
    s->rows = s->tokens / (d->T + 1);
    d->rows += s->rows;
    return true;
}

retrofit_data *retrofit_data_open(const char *pattern, size_t T, size_t vocab, bool shuffle, uint64_t seed) {
    glob_t found;
    memset(&found, 0, sizeof found);
    retrofit_data *d = (retrofit_data *)allocate(1, sizeof *d);
    int why = glob(pattern, 0, NULL, &found);
    bool ok = d && (why == 0 || fail("%s: %s", pattern, why == GLOB_NOMATCH ? "no such file" : "cannot be searched"));
    if (ok) {
        d->T = T, d->vocab = vocab, d->shuffle = shuffle, d->seed = seed, d->epoch = UINT64_MAX;
        d->pattern = strdup(pattern);
        d->shard = (shard *)allocate(found.gl_pathc, sizeof *d->shard);
        ok = d->pattern && d->shard;
        for (size_t i = 0; ok && i < found.gl_pathc; i++) d->shards++, ok = open_shard(d, &d->shard[i], found.gl_pathv[i]);
        if (ok && d->rows == 0) ok = fail("%s: fewer tokens than one row of %zu: no data", pattern, T + 1);
        if (ok && shuffle) ok = (d->order = (size_t *)allocate(d->rows, sizeof *d->order)) != NULL;
    }
    globfree(&found);
    if (!ok) retrofit_data_close(d), d = NULL;
    return d;
}

void retrofit_data_close(retrofit_data *d) {
    if (!d) return;
    for (size_t i = 0; i < d->shards; i++)
        if (d->shard[i].base) munmap(d->shard[i].base, d->shard[i].bytes);
    free(d->shard), free(d->order), free(d->pattern), free(d);
}

size_t retrofit_data_rows(const retrofit_data *d) { return d->rows; }

bool retrofit_data_row(retrofit_data *d, uint64_t index, int32_t *tokens, int32_t *labels) {
    size_t row = (size_t)(index % d->rows), s = 0;
    if (d->shuffle && d->epoch != index / d->rows) { // Fisher and Yates, from the seed and the epoch alone
        d->epoch = index / d->rows;
        uint64_t key = hash64(d->seed, d->epoch);
        for (size_t i = 0; i < d->rows; i++) {
            size_t j = (size_t)(hash64(key, i) % (i + 1));
            d->order[i] = d->order[j], d->order[j] = i;
        }
    }
    if (d->shuffle) row = d->order[row];
    while (row >= d->shard[s].rows) row -= d->shard[s++].rows;
    const char *at = (const char *)d->shard[s].base + 1024 + row * (d->T + 1) * d->shard[s].width;
    for (size_t t = 0; t <= d->T; t++) {
        uint32_t id = 0;
        memcpy(&id, at + t * d->shard[s].width, d->shard[s].width);
        if (id >= d->vocab)
            return fail("%s: shard %zu, token %zu is %u, but the vocabulary has %zu entries: tokenized for another model?", d->pattern, s,
                        row * (d->T + 1) + t, id, d->vocab);
        if (t < d->T) tokens[t] = (int32_t)id;
        if (t > 0) labels[t - 1] = (int32_t)id;
    }
    return true;
}

// ---- Command lines ----------------------------------------------------------------------------------------------------------
double retrofit_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

bool retrofit_sizes(const char *text, size_t *out, size_t most, size_t *count) {
    for (*count = 0;; text++) {
        char *end;
        unsigned long long n = strtoull(text, &end, 10);
        if (*text < '0' || *text > '9' || n == 0 || n > 1 << 20) return fail("'%s' is not a list of positive numbers like 1,2,4", text);
        if (*count == most) return fail("a list of more than %zu numbers", most);
        out[(*count)++] = (size_t)n;
        if (*(text = end) == 0) return true;
        if (*text != ',') return fail("'%s' is not a list of positive numbers like 1,2,4", text);
    }
}

static bool read_option(const retrofit_option *o, const char *text) {
    char *end = NULL;
    if (o->type == RETROFIT_STRING) return *(const char **)o->value = text, true;
    if (o->type == RETROFIT_SIZE) {
        errno = 0;
        unsigned long long n = strtoull(text, &end, 10);
        *(size_t *)o->value = (size_t)n;
        return (*text >= '0' && *text <= '9' && *end == 0 && errno == 0) || fail("--%s needs a whole number, not '%s'", o->name, text);
    }
    if (o->type == RETROFIT_REAL) {
        double x = *(double *)o->value = strtod(text, &end);
        return (*text && *end == 0 && isfinite(x)) || fail("--%s needs a number, not '%s'", o->name, text);
    }
    size_t n = strlen(text);
    const char *c = o->argument;
    for (int i = 0; c; i++, c = strchr(c, '|'), c += c != NULL)
        if (!strncmp(c, text, n) && (c[n] == 0 || c[n] == '|')) return *(int *)o->value = i, true;
    return fail("--%s is one of %s, not '%s'", o->name, o->argument, text);
}

static size_t common_letters(const char *a, const char *b) { // at their beginnings and ends: enough to guess what was meant
    size_t n = strlen(a), m = strlen(b), front = 0, back = 0;
    while (front < n && front < m && a[front] == b[front]) front++;
    while (back < n && back < m && a[n - 1 - back] == b[m - 1 - back]) back++;
    return front + back;
}

int retrofit_options(int argc, char **argv, const retrofit_option *table, size_t count, const char *usage, const char **others, size_t *other_count) {
    const char *program = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i], *nearest = "help";
        if (!strcmp(arg, "--help") || !strcmp(arg, "-h")) {
            printf("%s", usage);
            for (size_t j = 0; j < count; j++) {
                char left[64];
                snprintf(left, sizeof left, "--%s %s", table[j].name, table[j].argument ? table[j].argument : "");
                if (table[j].type == RETROFIT_HEADING) printf("\n%s\n", table[j].name);
                else printf(strlen(left) <= 32 ? "  %-32s  %s\n" : "  %s\n                                    %s\n", left, table[j].help);
            }
            return 0;
        }
        if (strncmp(arg, "--", 2)) {
            if (others) others[(*other_count)++] = arg;
            else return fprintf(stderr, "%s: '%s' is not an option: options begin with -- (see --help)\n", program, arg), 2;
            continue;
        }
        const char *value = strchr(arg, '=');
        size_t length = value ? (size_t)(value - arg - 2) : strlen(arg) - 2, j = 0;
        while (j < count && (table[j].type == RETROFIT_HEADING || strlen(table[j].name) != length || strncmp(table[j].name, arg + 2, length))) j++;
        if (j == count) {
            for (size_t k = 0; k < count; k++)
                if (table[k].type != RETROFIT_HEADING && common_letters(table[k].name, arg + 2) > common_letters(nearest, arg + 2)) nearest = table[k].name;
            return fprintf(stderr, "%s: unknown option %s: did you mean --%s? (see --help)\n", program, arg, nearest), 2;
        }
        if (table[j].type == RETROFIT_FLAG) {
            if (value) return fprintf(stderr, "%s: --%s takes no value\n", program, table[j].name), 2;
            *(bool *)table[j].value = true;
            continue;
        }
        if (!value && i + 1 == argc) return fprintf(stderr, "%s: --%s needs a value (see --help)\n", program, table[j].name), 2;
        if (!read_option(&table[j], value ? value + 1 : argv[++i])) return fprintf(stderr, "%s: %s (see --help)\n", program, retrofit_error()), 2;
    }
    return -1;
}

#ifdef __cplusplus
} // extern "C"
#endif
#endif // RETROFIT_IMPLEMENTATION

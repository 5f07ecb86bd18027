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
   and plain #include "retrofit.h" elsewhere. Compile with -O3 -march=native -ffp-contract=fast for the fast
   kernels, -fopenmp for threads; link with -lm.
   Functions that can fail return false or NULL; retrofit_error() then says what was wrong, where, and what to do.

   Contents                                              Where the paper's equations are
       1  declarations: config, parameters, operations       e = prelude(wte[x])              retrofit_prelude
       2  memory, files, errors, random numbers              s_i = core(A·concat(s, e))       retrofit_recur
       3  JSON, safetensors                                  logits                           retrofit_coda, retrofit_logits
       4  tokenizer                                          loss and its gradient            retrofit_loss, retrofit_backward
       5  operations on the CPU, forward beside backward     x += proj(attn(RMSNorm x)) ...   block_forward, block_backward
       6  block, model: forward and backward                 r ~ Poisson(LogNormal) + 1       retrofit_draw_recurrences
       7  recurrence sampler, curriculum, learning rate      r̄(t), curriculum                 retrofit_curriculum
       8  optimizers: AdamW, Muon, AdamW*; clipping          AdamW, Muon, AdamW*              retrofit_optimizer_step
       9  decoding: KV cache, exits, sampling, drafts        next token                       retrofit_feed, retrofit_sample
      10  checkpoints, token shards                          surgery                          convert.c

   License: MIT. */
#ifndef RETROFIT_H
#define RETROFIT_H

#if defined RETROFIT_IMPLEMENTATION && !defined _GNU_SOURCE
#define _GNU_SOURCE // mmap, glob, fsync, open_memstream: where this header is implemented it must come first
#endif
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#ifdef __cplusplus
extern "C" {
#endif

// =================================================================================================
// 1  Declarations
// =================================================================================================
// Functions that can fail return false, NULL or NaN; retrofit_error() then says in one line what was
// wrong, where, and what to do. "or error" below means that.
const char *retrofit_error(void);

// ---- Configuration: the numbers of config.json ----------------------------------------------------

// Element types of tensors. Files may hold any of them; operations read weights in F32 or BF16.
typedef enum { RETROFIT_F32, RETROFIT_BF16, RETROFIT_F16, RETROFIT_I32 } retrofit_type;

typedef struct {
    size_t n_embd, n_heads, n_kv_heads, head_dim;  // d, H, G, h
    size_t intermediate, vocab, context;           // F, V, the longest sequence
    size_t prelude, core, coda;                    // P, C, D; a plain Llama has P = C = 0
    float norm_eps;
    double rope_theta;
    bool rope_llama3;                              // Llama-3.2's rescaled frequencies, by these four:
    double rope_factor, rope_low, rope_high, rope_original_context;
    float state_std;                               // σ of s_0
    size_t mean_recurrence, backprop_depth;        // R and K that the model was trained for
    bool tied;                                     // a plain Llama whose file has no lm_head.weight
    int32_t bos, eos;                              // token ids; -1 if the config has none
} retrofit_config;

// σ of s_0, for every model: √(2 / (5·5280)). Huginn, the recurrent model that the authors' code was
// first written for, is 5280 wide and starts its matrices with the variance 2/(5·width); the paper
// kept the number for models of other widths.
#define RETROFIT_STATE_STD 0.008703882797784892

bool retrofit_is_plain(const retrofit_config *config);         // a Llama without recurrence: C = 0
size_t retrofit_qkv_width(const retrofit_config *config);      // Q = (H + 2G)·h

// ---- Parameters -----------------------------------------------------------------------------------

// An element of a branch activation: fp32 or bf16, as the operations' table says (act_type).
typedef void act;

// A matrix as the operations read it: element (i, j) is data[i·stride + j].
typedef struct {
    const void *data;
    retrofit_type type; // F32 or BF16
    size_t stride;
} retrofit_weight;

typedef enum { RETROFIT_EMBEDDING, RETROFIT_HEAD, RETROFIT_NORM, RETROFIT_MATRIX } retrofit_kind;
typedef enum {
    RETROFIT_PART_EMBEDDING,
    RETROFIT_PART_PRELUDE,
    RETROFIT_PART_ADAPTER,
    RETROFIT_PART_CORE,
    RETROFIT_PART_CODA,
    RETROFIT_PART_NORM,
    RETROFIT_PART_HEAD,
    RETROFIT_PARTS // their number
} retrofit_part;

// A tensor of a checkpoint file. Where a plain Llama stores q, k, v or gate, up apart, our fused
// parameter is made of several, one below the other.
typedef struct {
    char name[88];
    size_t rows;
} retrofit_source_tensor;

typedef struct {
    retrofit_source_tensor source[3];    // the name of source[0] labels the parameter
    size_t sources, rows, cols;
    retrofit_kind kind;
    retrofit_part part;
    retrofit_weight weight;              // (rows,cols) what the operations read
    float *master, *grad, *m, *v;        // (rows,cols) training: fp32 weight, gradient, two moments
    bool frozen;                         // not trained: it has a master at most
} retrofit_parameter;

// A block's parameters. Matrices are (outputs, inputs), as in PyTorch: y = x·wᵀ.
typedef struct {
    retrofit_parameter norm_1;    // (d)
    retrofit_parameter w_qkv;     // (Q,d)   rows q, then k, then v          attn.Wqkv
    retrofit_parameter w_out;     // (d,d)                                   attn.proj
    retrofit_parameter norm_2;    // (d)
    retrofit_parameter w_gate_up; // (2F,d)  rows gate, then up              mlp.fc
    retrofit_parameter w_down;    // (d,F)                                   mlp.proj
} retrofit_layer;

typedef struct retrofit_ops retrofit_ops;

typedef struct {
    retrofit_config config;
    const retrofit_ops *ops;                // of the device that it lives on
    retrofit_parameter wte;                 // (V,d)   token embeddings
    retrofit_layer *prelude, *core, *coda;  // [P], [C], [D]
    retrofit_parameter adapter;             // (d,2d)  [A_s | A_e]; a plain Llama has none
    retrofit_parameter ln_f;                // (d)     the final norm
    retrofit_parameter lm_head;             // (V,d)
    retrofit_parameter **parameters;        // the one list of all of them, as section 8 makes it
    size_t parameter_count, weight_count;   // entries of that list; numbers in all of them
    void *weights, *masters, *grads, *moments; // arenas; NULL where there is nothing to hold
    size_t grad_bytes, moment_bytes;
    double *sums;                           // [2] sums of squares: of all gradients; of one tensor
    float *muon_u;                          // scratch of Newton-Schulz for the largest matrix
    act *muon_x, *muon_y, *muon_a, *muon_b;
    struct retrofit_map *maps;              // [map_count] files that weights lie in (inference)
    size_t map_count;
} retrofit_model;

// ---- Operations -----------------------------------------------------------------------------------
// The model is written once, over this table. The CPU's rows are in section 6, a GPU's, under the
// same names and in the same order, in retrofit_cuda.cu. One contract holds for all of them:
//   - arguments are outputs, inputs, sizes, in this order;
//   - gradients of parameters add (+=), gradients of activations are set (=), but for the residual
//     stream's, dx of rmsnorm_backward, which adds;
//   - nothing allocates; every sum has a fixed order, so a run repeats bit for bit;
//   - the residual stream, states, parameters and their gradients are fp32; `act` is the table's type.
// The formulas stand at the definitions. Rows n = b·T + t of an activation are the tokens in order.
//   embedding              x (N,d) are rows of wte (V,d)
//   rmsnorm                out (N,d), rstd (N); backward: dweight may be NULL
//   matmul                 out (N,O) = inp (N,I)·wᵀ, w (O,I); backward: dinp (N,I), and dw (O,I)
//                          whose rows are `stride` apart
//   matmul_residual        the same into fp32, plus residual (N,O): NULL for zero, or out itself
//   rope                   turns q and k inside qkv (N,Q), in place; table: (positions, h/2, {cos, sin});
//                          row b begins at position past[b], or at 0 if past is NULL
//   attention              out (N,d), lse (N,H) from qkv (N,Q), T tokens in each of B rows, causal;
//                          backward: dqkv (N,Q), and delta (N,H), which it needs on the way
//   swiglu                 out (N,F) from gate_up (N,2F); backward: dgate_up (N,2F), and out again
//   cross_entropy          losses (N), 0 where a label is negative; if scale is not 0 the logits (N,V)
//                          are replaced by their gradient
//   cast, add              out = (act) x; x = keep·x + y
//   state_init             s (B,T,d), a function of (seed, b, past[b] + t, column) alone
//   kv_store               k and v of qkv to keys, values (B,capacity,G·h) at positions past[b] + t;
//                          type: of the cache, the table's own or, on a CPU, bf16
//   attention_cached       out (N,d): T new queries a row over the positions 0 … past[b] + t
//   kv_backfill            section 7: a token that stopped early fills the slots it did not reach
//   sum_squares            *sum += Σ x², in double, on the device
//   adamw_update … muon_update   section 5
#define RETROFIT_OPS(X) \
    X(embedding_forward, \
      (float *x, const int32_t *tokens, retrofit_weight wte, size_t N, size_t d)) \
    X(embedding_backward, \
      (float *dwte, const int32_t *tokens, const float *dx, size_t N, size_t d)) \
    X(rmsnorm_forward, \
      (act *out, float *rstd, const float *x, const float *weight, size_t N, size_t d, float eps)) \
    X(rmsnorm_backward, \
      (float *dx, float *dweight, const act *dout, const float *x, const float *rstd, \
       const float *weight, size_t N, size_t d)) \
    X(matmul_forward, \
      (act *out, const act *inp, retrofit_weight w, size_t N, size_t I, size_t O)) \
    X(matmul_residual_forward, \
      (float *out, const float *residual, const act *inp, retrofit_weight w, size_t N, size_t I, \
       size_t O)) \
    X(matmul_backward_input, \
      (act *dinp, const act *dout, retrofit_weight w, size_t N, size_t I, size_t O)) \
    X(matmul_residual_backward_input, \
      (float *dinp, const act *dout, retrofit_weight w, size_t N, size_t I, size_t O)) \
    X(matmul_backward_weight, \
      (float *dw, size_t stride, const act *dout, const act *inp, size_t N, size_t I, size_t O)) \
    X(rope_forward, \
      (act *qkv, const float *table, const int32_t *past, size_t B, size_t T, size_t H, size_t G, \
       size_t h)) \
    X(rope_backward, \
      (act *dqkv, const float *table, size_t B, size_t T, size_t H, size_t G, size_t h)) \
    X(attention_forward, \
      (act *out, float *lse, const act *qkv, size_t B, size_t T, size_t H, size_t G, size_t h)) \
    X(attention_backward, \
      (act *dqkv, float *delta, const act *dout, const act *qkv, const act *out, const float *lse, \
       size_t B, size_t T, size_t H, size_t G, size_t h)) \
    X(swiglu_forward, (act *out, const act *gate_up, size_t N, size_t F)) \
    X(swiglu_backward, \
      (act *dgate_up, act *out, const act *dout, const act *gate_up, size_t N, size_t F)) \
    X(cross_entropy, \
      (float *losses, act *logits, const int32_t *labels, size_t N, size_t V, float scale)) \
    X(cast, (act *out, const float *x, size_t n)) \
    X(add, (float *x, const float *y, size_t n, float keep)) \
    X(state_init, \
      (float *s, const int32_t *past, size_t B, size_t T, size_t d, float sigma, uint64_t seed)) \
    X(kv_store, \
      (act *keys, act *values, const act *qkv, const int32_t *past, size_t B, size_t T, \
       size_t capacity, size_t H, size_t G, size_t h, retrofit_type type)) \
    X(attention_cached, \
      (act *out, const act *qkv, const act *keys, const act *values, const int32_t *past, size_t B, \
       size_t T, size_t capacity, size_t H, size_t G, size_t h, retrofit_type type)) \
    X(kv_backfill, \
      (act *keys, act *values, const int32_t *past, const int32_t *used, size_t S, size_t C, \
       size_t stride, size_t B, size_t capacity, size_t G, size_t h, retrofit_type type)) \
    X(sum_squares, (double *sum, const float *x, size_t n)) \
    X(adamw_update, \
      (float *w, float *m, float *v, const float *g, size_t n, float scale, float lr, float beta1, \
       float beta2, double bias1, double bias2, float eps, float decay)) \
    X(ellisadam_moments, \
      (float *m, float *v, double *sum, const float *g, size_t n, float scale, float beta1, \
       float beta2, float eps)) \
    X(ellisadam_update, \
      (float *w, const float *m, const float *v, const double *sum, size_t n, float lr, \
       double bias1, double bias2, float decay)) \
    X(muon_momentum, \
      (float *u, float *m, const float *g, size_t n, float scale, float momentum)) \
    X(muon_load, (act *x, const float *u, const double *squares, size_t rows, size_t cols)) \
    X(axpby, (act *y, const act *x, size_t n, float a, float b)) \
    X(muon_update, \
      (float *w, const act *x, size_t rows, size_t cols, float lr, float scale, float decay))

struct retrofit_ops {
    const char *name;              // "cpu", "cuda", "cuda-fp32"
    retrofit_type act_type;        // of `act`; also of matrices while training, and on a GPU always
    size_t max_head_dim;           // the largest h that its attention takes
    bool (*start)(char text[256]); // makes the device ready; text: its name, or why there is none
    double (*peak_flops)(void);    // FLOP/s that its data sheet promises for act_type; 0: not known
    size_t (*free_memory)(void);   // bytes
    void *(*alloc)(size_t bytes);  // zeroed, 64-byte aligned; NULL or error
    void (*free)(void *p);
    void (*upload)(void *to, const void *host, size_t bytes); // host may be overwritten on return
    void (*download)(void *host, const void *from, size_t bytes);
    void (*copy)(void *to, const void *from, size_t bytes);   // within the device
    void (*zero)(void *p, size_t bytes);
    // A device that can, else NULL: between record_begin and record_end operations and copies are
    // noted, not done; replay does what was noted, with the same arguments, in one go.
    void (*record_begin)(void);
    void *(*record_end)(void);
    void (*replay)(void *recording);
    void (*record_free)(void *recording);
#define X(name, parameters) void (*name) parameters;
    RETROFIT_OPS(X)
#undef X
};
extern const retrofit_ops retrofit_cpu;
extern const retrofit_ops retrofit_cuda, retrofit_cuda_fp32; // in retrofit_cuda.cu: bf16, and fp32

typedef enum { RETROFIT_AUTO, RETROFIT_ON_CPU, RETROFIT_ON_CUDA } retrofit_place;
// The table for a place, made ready; text: what it is and, if AUTO took the CPU in a program built
// with RETROFIT_CUDA, why. NULL or error.
const retrofit_ops *retrofit_device(retrofit_place place, bool fp32, char text[256]);

// ---- Models and buffers ---------------------------------------------------------------------------

// What is trained: all of it, the adapter and the core, or the adapter alone. The rest is frozen.
typedef enum {
    RETROFIT_INFERENCE,
    RETROFIT_TRAINING,
    RETROFIT_TRAINING_CORE,
    RETROFIT_TRAINING_ADAPTER
} retrofit_mode;

// A model of this shape without memory for its weights: the list of parameters alone. NULL or error.
retrofit_model *retrofit_model_new(const retrofit_config *config, const retrofit_ops *ops);
// Memory for its parameters, in fp32, zeroed; for training also for gradients. false or error.
bool retrofit_model_allocate(retrofit_model *model, retrofit_mode mode);
// Reads a Hugging Face directory: config.json, model.safetensors or its shards; or directory/latest
// if it holds no model itself. INFERENCE on a CPU leaves weights in the mapped files, in their type;
// everything else copies them, to fp32 masters for training. NULL or error.
retrofit_model *retrofit_load(const char *directory, const retrofit_ops *ops, retrofit_mode mode);
void retrofit_free(retrofit_model *model);
// Copies masters to where operations read them; needed after masters were changed by hand.
void retrofit_refresh_weights(retrofit_model *model);

// What a forward pass keeps for backward: nothing (blocks run in place), all that retrofit_block
// lists, or each block's input alone, from which backward computes the rest again (--recompute).
typedef enum {
    RETROFIT_KEEP_NOTHING,
    RETROFIT_KEEP_ALL,
    RETROFIT_KEEP_INPUTS
} retrofit_keep;

// What backward needs of one block.
typedef struct {
    const float *x;      // (N,d)   its input, the output of the block before
    float *rstd_1;       // (N)
    act *qkv;            // (N,Q)   after RoPE
    act *attention;      // (N,d)
    float *lse;          // (N,H)
    float *mid;          // (N,d)   the residual stream between attention and MLP
    float *rstd_2;       // (N)
    act *gate_up;        // (N,2F)
    float *out;          // (N,d)
} retrofit_block;

// What a forward pass saves for backward.
typedef struct {
    retrofit_block *prelude, *core, *coda; // [P], [K·C], [D]
    float **adapted;                       // [K] (N,d)  A·concat(s_{i-1}, e), the core's input
} retrofit_saved;

// Gradients of activations; each holds what stands in its comment until the next operation needs it.
typedef struct {
    float *dx;         // (N,d)   of the residual stream
    float *dinjected;  // (N,d)   of A_e·e: Σ dY_i
    float *delta;      // (N,H)   Σ_c dout·out of attention's backward pass
    act *dbranch;      // (N,d)   dx, cast, as what a branch added
    act *dinner;       // (N,d)   of a norm's output
    act *dattention;   // (N,d)
    act *dqkv;         // (N,Q)
    act *dswiglu;      // (N,F)
    act *dgate_up;     // (N,2F)
    act *dfinal;       // (N,d)   of the final norm's output
} retrofit_gradients;

typedef struct retrofit_decoder retrofit_decoder; // the KV cache and what decoding notes: section 7
typedef struct retrofit_kv_cache retrofit_kv_cache;

// Buffers on one device for batches of up to B rows of T tokens: the current batch and its stream,
// what is saved for backward, gradients, the decoder. Section 8 says what shares memory.
typedef struct {
    const retrofit_model *model;
    size_t B, T, K;           // the largest batch; recurrences with gradient
    retrofit_keep keep;
    void *arena;
    size_t bytes;

    size_t b, t, N;           // of the current batch: rows, columns, b·t
    size_t n, k;              // recurrences it has run without and with gradient
    int32_t *tokens, *labels; // (N)
    int32_t *past;            // (B)     tokens that each row has in the KV cache
    float *rope;              // (positions,h/2,2) cosines and sines
    float *embedded;          // (N,d)   wte[tokens]
    const float *e;           // (N,d)   the prelude's output
    float *injected;          // (N,d)   A_e·e, the same in every recurrence
    float *state;             // (N,d)   s_0 at first, then s_n
    float *x;                 // (N,d)   the coda's stream when nothing is kept
    const float *last;        // (N,d)   the coda's output
    float *rstd_f;            // (N)
    act *final;               // (N,d)   RMSNorm_f of it: what the head reads
    act *norm, *swiglu;       // (N,d), (N,F) of the block at work; backward computes them again
    retrofit_block scratch;   // shared by blocks that keep nothing
    float *losses;            // (N)
    act *logits;              // (chunk,V)
    size_t chunk;             // rows of logits that exist at a time
    float *wide_logits;       // (rows,V) in fp32, for the host
    int32_t *host_tokens, *host_labels; // (B·T) on the host: the rows that a training step reads
    float *host_losses;       // (B·T) on the host

    retrofit_saved saved;
    retrofit_gradients gradients;
    retrofit_decoder *decoder; // NULL without a KV cache
} retrofit_buffers;

// K is ignored where nothing is kept; cache: NULL unless it is for decoding. NULL or error.
retrofit_buffers *retrofit_buffers_new(const retrofit_model *model, size_t B, size_t T, size_t K,
                                       retrofit_keep keep, const retrofit_kv_cache *cache);
void retrofit_buffers_free(retrofit_buffers *buffers);
// The bytes that retrofit_buffers_new would take, without a cache; SIZE_MAX if they overflow.
size_t retrofit_buffers_bytes(const retrofit_config *config, const retrofit_ops *ops, size_t B,
                              size_t T, size_t K, retrofit_keep keep);

// ---- Forward and backward -------------------------------------------------------------------------

// One pass, piece by piece. tokens (b,t) lie on the host; each is below V and the batch fits, or error.
bool retrofit_prelude(retrofit_buffers *buffers, const int32_t *tokens, size_t b, size_t t);
// s_0; sigma 0: zero. With a KV cache every row's state is what it would be if the row were alone.
void retrofit_init_state(retrofit_buffers *buffers, float sigma, uint64_t seed);
// n recurrences without gradient, then k with; k = 0 unless training, and K at most in all.
void retrofit_recur(retrofit_buffers *buffers, size_t n, size_t k);
void retrofit_coda(retrofit_buffers *buffers); // the coda and the final norm
// All four. false or error.
bool retrofit_forward(retrofit_buffers *buffers, const int32_t *tokens, size_t b, size_t t,
                      float sigma, uint64_t seed, size_t n, size_t k);
// Rows first … first + count - 1 of the logits (N,V), to the host.
void retrofit_logits(retrofit_buffers *buffers, size_t first, size_t count, float *logits);
// The mean cross-entropy, in nats, over labels (b,t) that are not -100; NaN or error if one is not
// below V. With scale not 0 also the gradient of scale·loss for retrofit_backward to go on from.
double retrofit_loss(retrofit_buffers *buffers, const int32_t *labels, float scale);
void retrofit_zero_grad(retrofit_model *model);
void retrofit_backward(retrofit_buffers *buffers); // adds to the gradient of every parameter
// Root mean squares of the states s_n … s_{n+k} of a training pass; returns k + 1, their number. If
// they grow from one recurrence to the next, training is about to fail. Needs the optimizer's memory.
size_t retrofit_state_rms(const retrofit_buffers *buffers, double *rms);

// Floating-point operations of training on one token with (n,k), and as the paper's figures count.
double retrofit_flops_per_token(const retrofit_config *config, retrofit_mode mode, size_t T,
                                size_t n, size_t k);
double retrofit_paper_flops_per_token(const retrofit_config *config, size_t n, size_t k);

// ---- Training -------------------------------------------------------------------------------------

// n and k of micro-batch m = 1, 2, 3, … for mean recurrence r and backprop depth K; *rate (may be
// NULL): the log-normal draw.
void retrofit_draw_recurrences(uint64_t m, size_t r, size_t K, size_t *n, size_t *k, float *rate);

typedef enum {
    RETROFIT_CURRICULUM_NONE,
    RETROFIT_CURRICULUM_LINEAR,
    RETROFIT_CURRICULUM_1_SQRT
} retrofit_curriculum_kind;
// Schedules at step t (from 0) of S: the mean recurrence before it is rounded up; a value that grows
// linearly from start·base to base (the backprop depth); the learning rate. w, c: shares of S.
double retrofit_curriculum(retrofit_curriculum_kind kind, size_t t, size_t S, double w, double R);
double retrofit_linear_schedule(size_t t, size_t S, double w, double start, double base);
double retrofit_learning_rate(size_t t, size_t S, double w, double c, double min, double lr);

typedef enum { RETROFIT_ADAMW, RETROFIT_MUON, RETROFIT_ELLISADAM } retrofit_optimizer_kind;
typedef struct {
    retrofit_optimizer_kind kind;
    float lr, muon_lr;    // this step's
    float beta1, beta2, eps, weight_decay;
    float momentum;       // Muon's
    float clip;           // the largest norm of the whole gradient; 0: no clipping
    float peak_lr;        // ELLISADAM: the lr that the weight decay is meant for; 0: this step's
    float throttle;       // divides the learning rates of adapter and core; 0: 1
} retrofit_optimizer;
// Memory for the moments and Muon's scratch. false or error.
bool retrofit_optimizer_init(retrofit_model *model, retrofit_optimizer_kind kind);
// Update t = 1, 2, … from the accumulated gradients; returns their 2-norm before clipping. If that is
// not finite, nothing changes.
double retrofit_optimizer_step(retrofit_model *model, const retrofit_optimizer *optimizer, size_t t);
// What training a model without memory would take: bytes of weights (with their copies in act_type),
// gradients, moments.
void retrofit_training_bytes(retrofit_model *model, retrofit_mode mode, retrofit_optimizer_kind kind,
                             size_t *weights, size_t *gradients, size_t *moments);

// A whole training; retrofit_paper_training, beside the step in section 4, has the paper's numbers.
typedef struct {
    size_t steps, accumulate;               // S; micro-batches in a step
    size_t mean_recurrence, backprop_depth; // R, K: where the schedules end
    retrofit_curriculum_kind curriculum;
    double curriculum_warmup;               // share of the steps in which the mean grows to R
    size_t depth_start;
    double depth_warmup;                    // share in which the depth grows from depth_start; 0: none
    size_t fixed_n, fixed_k;                // fixed_k > 0: these in every micro-batch, no draws
    double lr, muon_lr;                     // peaks
    double warmup, cooldown, min_lr_ratio;  // shares of the steps; where the rates start and end
    bool throttle;                          // divide adapter's and core's lr by the step's mean k
    retrofit_mode mode;
    retrofit_optimizer optimizer;           // its lr, muon_lr and throttle are set by every step
    float sigma;                            // of s_0
    uint64_t seed;                          // of the start states
} retrofit_training;
extern const retrofit_training retrofit_paper_training;

// What one step does; a plain Llama has mean = depth = 0.
typedef struct {
    size_t mean, depth;  // the mean of the draws, r̄(t); how many recurrences get gradients
    float lr, muon_lr;
} retrofit_plan;
retrofit_plan retrofit_plan_step(const retrofit_training *training, const retrofit_config *config,
                                 size_t step);
// n and k of micro-batch j (from 0) of that step.
void retrofit_plan_draw(const retrofit_training *training, const retrofit_plan *plan, size_t step,
                        size_t j, size_t *n, size_t *k);

// What a step gave.
typedef struct {
    retrofit_plan plan;
    double loss, norm;         // norm: of the gradient before clipping; NaN if the loss is not finite
    size_t n, k;               // of the last micro-batch
    double mean_k;
    double flops, paper_flops;
} retrofit_step;

typedef struct retrofit_data retrofit_data; // token shards: section 9
// Step number `step` (from 0), whose optimizer update is number t (from 1: skipped steps do not
// count). buffers->B rows make a micro-batch. false or error.
bool retrofit_training_step(retrofit_buffers *buffers, retrofit_data *data,
                            const retrofit_training *training, size_t step, size_t t,
                            retrofit_step *result);

// ---- What the method needs besides operations, from Part III ---------------------------------------

// Records an error, one line, and returns false, so that a caller can return it.
#ifdef __GNUC__
__attribute__((format(printf, 1, 2)))
#endif
bool retrofit_fail(const char *format, ...);
// count·size zeroed bytes, freed with free(). NULL or error, also if the product overflows.
void *retrofit_allocate(size_t count, size_t size);
size_t retrofit_type_size(retrofit_type type); // bytes of an element
static inline size_t retrofit_min(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t retrofit_max(size_t a, size_t b) { return a > b ? a : b; }

// Random numbers that are a function of (seed, counter), so that they are the same from any thread
// and on any device: 64 bits, a number in (0, 1), a normal number cut at ±3. See section 12.
#ifdef __CUDACC__
#define RETROFIT_DEVICE __host__ __device__
#else
#define RETROFIT_DEVICE
#endif
RETROFIT_DEVICE static inline uint64_t retrofit_hash(uint64_t seed, uint64_t counter);
RETROFIT_DEVICE static inline double retrofit_hash_uniform(uint64_t seed, uint64_t counter);
RETROFIT_DEVICE static inline float retrofit_hash_normal(uint64_t seed, uint64_t counter);

// splitmix64's finaliser.
RETROFIT_DEVICE static inline uint64_t retrofit_hash(uint64_t seed, uint64_t counter) {
    uint64_t z = seed + 0x9e3779b97f4a7c15ull * (counter + 1);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

RETROFIT_DEVICE static inline double retrofit_hash_uniform(uint64_t seed, uint64_t counter) {
    return ((double)(retrofit_hash(seed, counter) >> 11) + 0.5) * 0x1p-53;
}

// By Box and Muller; the one draw in 370 that lies beyond is drawn again.
RETROFIT_DEVICE static inline float retrofit_hash_normal(uint64_t seed, uint64_t counter) {
    uint64_t key = retrofit_hash(seed, counter);
    for (uint64_t i = 0;; i += 2) {
        double radius = sqrt(-2 * log(retrofit_hash_uniform(key, i)));
        double z = radius * cos(2 * 3.14159265358979323846 * retrofit_hash_uniform(key, i + 1));
        if (fabs(z) <= 3) return (float)z;
    }
}

#ifdef __cplusplus
}
#endif
#endif // RETROFIT_H

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
#define RETROFIT_THREAD_LOCAL _Thread_local

static void *fail_null(const char *format, ...); // the same, for functions that return pointers

// PyTorch's CPU generator, because the authors' draws come from it: section 12.
typedef struct {
    uint32_t state[624];
    size_t next;
} mt19937;
static void mt19937_seed(mt19937 *generator, uint32_t seed);
static double mt19937_normal(mt19937 *generator);
static size_t mt19937_poisson(mt19937 *generator, double rate);

// The operations: on a CPU in section 6, an optimizer's in 5, the KV cache's in 7.
#define X(name, parameters) static void name parameters;
RETROFIT_OPS(X)
#undef X

// The operations: on a CPU in section 6, an optimizer's in 5, the KV cache's in 7.
#define X(name, parameters) static void name parameters;
RETROFIT_OPS(X)
#undef X

// The operations: on a CPU in section 6, an optimizer's in 5, the KV cache's in 7.
#define X(name, parameters) static void name parameters;
RETROFIT_OPS(X)
#undef X

// The operations: on a CPU in section 6, an optimizer's in 5, the KV cache's in 7.
#define X(name, parameters) static void name parameters;
RETROFIT_OPS(X)
#undef X

// The operations: on a CPU in section 6, an optimizer's in 5, the KV cache's in 7.
#define X(name, parameters) static void name parameters;
RETROFIT_OPS(X)
#undef X

// The operations: on a CPU in section 6, an optimizer's in 5, the KV cache's in 7.
#define X(name, parameters) static void name parameters;
RETROFIT_OPS(X)
#undef X

// C = D + A·B on matrices in memory, C (M,N); D may be NULL (zero) or C itself. Section 10.
typedef struct {
    const void *data;
    retrofit_type type;
    size_t row, col; // element (i, j) is data[i·row + j·col]
} matrix_view;
static void gemm(size_t M, size_t N, size_t K, matrix_view A, matrix_view B, float *c, size_t c_row,
                 const float *d, size_t d_row);
static void gemm_serial(size_t M, size_t N, size_t K, matrix_view A, matrix_view B, float *c,
                        size_t c_row, const float *d, size_t d_row); // by the thread that calls
static matrix_view view(const void *data, size_t row);            // fp32, rows `row` apart
static matrix_view view_transposed(const void *data, size_t row); // of it

// Sums and maxima in a fixed order that compilers can vectorise, and e^x that they can. Section 10.
static float dot(const float *a, const float *b, size_t n);
static float weighted_dot(const float *a, const float *weight, const float *b, size_t n);
static float max_element(const float *x, size_t n);
static double sum_exp(float *terms, const float *x, size_t n, float max); // Σ e^{x - max}
static inline float fast_exp(float x);

// Loops over threads, if the work, in elements, is worth waking them.
#ifdef _OPENMP
#define PRAGMA(x) _Pragma(#x)
#define PARALLEL_FOR(work) PRAGMA(omp parallel for schedule(static) if ((work) > 16384))
#define PARALLEL_TASKS PRAGMA(omp parallel for schedule(dynamic)) // of unequal length
#else
#define PARALLEL_FOR(work)
#define PARALLEL_TASKS
#endif

enum { WIDE_ROWS = 256 }; // rows of fp32 logits that exist at a time

// Section 7: attention over the KV cache, for a layer whose entries lie in `slot`; the first slot of the
// core's recurrence i = 0, 1, …, and of the coda. Without a cache slots mean nothing.
static void attend_to_cache(retrofit_buffers *buffers, retrofit_block *block, size_t slot);
static size_t core_slot(const retrofit_buffers *buffers, size_t i);
static size_t coda_slot(const retrofit_buffers *buffers);
// Normal numbers for every state.
static void draw_states(retrofit_buffers *buffers, float *states, float sigma, uint64_t seed);
// Section 9: row `index`, counted on over epochs: T tokens and the T that follow each.
bool retrofit_data_row(retrofit_data *data, uint64_t index, int32_t *tokens, int32_t *labels);

uint16_t retrofit_float_to_bf16(float f);
void retrofit_to_float(float *out, const void *data, retrofit_type type, size_t n);
bool retrofit_config_check(const retrofit_config *config, const char *where);
// Attention of one head of one sequence, tile by tile: section 10.
enum { TILE = 96 };
static void attend(float *y, size_t y_row, float *lse, size_t lse_row, matrix_view q, matrix_view k,
                   matrix_view v, size_t rows, size_t before, size_t h);
typedef struct {
    size_t T, h, Q, H;
    matrix_view q, k, v, dy;  // (T,h)
    const float *lse, *delta; // (T), elements H apart
    float *dq, *dk, *dv;      // (T,h), rows Q apart; added to
} attention_head;
static void attend_backward(const attention_head *head);

// =================================================================================================
// 2  A block, forward and backward
// =================================================================================================

// Llama's block, on the residual stream x (N,d):
//
//     a   = attention(rope(W_qkv·RMSNorm_1(x)))          mid = x + W_out·a
//     s   = swiglu(W_gate_up·RMSNorm_2(mid))             out = mid + W_down·s
//
// Backward has dx, the gradient of out, and turns it into that of x. Each branch adds to the stream,
// so the stream's gradient passes unchanged and the branch's is added to it:
//
//     ds   = W_downᵀ·dx       dW_down    += dx·sᵀ        dx += RMSNorm_2ᵀ(W_gate_upᵀ·swigluᵀ(ds))
//     da   = W_outᵀ·dx        dW_out     += dx·aᵀ        dx += RMSNorm_1ᵀ(W_qkvᵀ·ropeᵀ(attentionᵀ(da)))
//
// where fᵀ(dy) is the derivative of f applied to dy, and dW_gate_up, dW_qkv are the products of what
// came in from behind with the norms' outputs.
//
// What is kept for that: with c bytes for an element of act, 8 + 4H for rstd and lse, (Q + d + 2F)·c
// for qkv, attention and gate_up, 8d for mid and out; for TinyLlama in bf16 48 KB per token and layer.
// The norms' outputs and swiglu's, 2d + F elements, are cheap and are computed again. With
// RETROFIT_KEEP_INPUTS only out is kept, 4d bytes (8 KB), and the rest is computed again as well:
// about a third more work.
// A layer's own block of buffers and the shared scratch have the same type, so that one function
// serves both. slot: where the layer's keys and values go in the KV cache, if there is one.
static void block_until_gate_up(retrofit_buffers *buffers, const retrofit_layer *layer,
                                retrofit_block *block, const float *x, size_t slot) {
    const retrofit_config *c = &buffers->model->config;
    const retrofit_ops *ops = buffers->model->ops;
    const float *norm_1 = (const float *)layer->norm_1.weight.data;
    const float *norm_2 = (const float *)layer->norm_2.weight.data;
    size_t N = buffers->N, d = c->n_embd, Q = retrofit_qkv_width(c), F = c->intermediate;
    size_t H = c->n_heads, G = c->n_kv_heads, h = c->head_dim;
    const int32_t *past = buffers->decoder ? buffers->past : NULL;
    act *norm = buffers->norm;
    block->x = x;

    ops->rmsnorm_forward(norm, block->rstd_1, x, norm_1, N, d, c->norm_eps);
    ops->matmul_forward(block->qkv, norm, layer->w_qkv.weight, N, d, Q);
    ops->rope_forward(block->qkv, buffers->rope, past, buffers->b, buffers->t, H, G, h);
    if (buffers->decoder) attend_to_cache(buffers, block, slot);
    else
        ops->attention_forward(block->attention, block->lse, block->qkv, buffers->b, buffers->t, H,
                               G, h);
    ops->matmul_residual_forward(block->mid, x, block->attention, layer->w_out.weight, N, d, d);
    ops->rmsnorm_forward(norm, block->rstd_2, block->mid, norm_2, N, d, c->norm_eps);
    ops->matmul_forward(block->gate_up, norm, layer->w_gate_up.weight, N, d, 2 * F);
}

static void block_forward(retrofit_buffers *buffers, const retrofit_layer *layer,
                          retrofit_block *block, const float *x, size_t slot) {
    const retrofit_ops *ops = buffers->model->ops;
    size_t N = buffers->N, d = buffers->model->config.n_embd, F = buffers->model->config.intermediate;
    act *swiglu = buffers->swiglu;
    block_until_gate_up(buffers, layer, block, x, slot);
    ops->swiglu_forward(swiglu, block->gate_up, N, F);
    ops->matmul_residual_forward(block->out, block->mid, swiglu, layer->w_down.weight, N, F, d);
}

static void mlp_backward(retrofit_buffers *buffers, retrofit_layer *layer, retrofit_block *block) {
    const retrofit_config *c = &buffers->model->config;
    const retrofit_ops *ops = buffers->model->ops;
    const retrofit_gradients *g = &buffers->gradients;
    const float *norm_2 = (const float *)layer->norm_2.weight.data;
    size_t N = buffers->N, d = c->n_embd, F = c->intermediate;
    act *norm = buffers->norm, *swiglu = buffers->swiglu;

    ops->cast(g->dbranch, g->dx, N * d);
    ops->matmul_backward_input(g->dswiglu, g->dbranch, layer->w_down.weight, N, F, d);
    ops->swiglu_backward(g->dgate_up, swiglu, g->dswiglu, block->gate_up, N, F);
    if (!layer->w_down.frozen) {
        ops->matmul_backward_weight(layer->w_down.grad, F, g->dbranch, swiglu, N, F, d);
        ops->rmsnorm_forward(norm, block->rstd_2, block->mid, norm_2, N, d, c->norm_eps);
        ops->matmul_backward_weight(layer->w_gate_up.grad, d, g->dgate_up, norm, N, d, 2 * F);
    }
    ops->matmul_backward_input(g->dinner, g->dgate_up, layer->w_gate_up.weight, N, d, 2 * F);
    ops->rmsnorm_backward(g->dx, layer->norm_2.grad, g->dinner, block->mid, block->rstd_2, norm_2, N,
                          d);
}

static void attention_branch_backward(retrofit_buffers *buffers, retrofit_layer *layer,
                                      retrofit_block *block) {
    const retrofit_config *c = &buffers->model->config;
    const retrofit_ops *ops = buffers->model->ops;
    const retrofit_gradients *g = &buffers->gradients;
    const float *norm_1 = (const float *)layer->norm_1.weight.data;
    size_t N = buffers->N, b = buffers->b, t = buffers->t, d = c->n_embd, Q = retrofit_qkv_width(c);
    size_t H = c->n_heads, G = c->n_kv_heads, h = c->head_dim;
    bool trained = !layer->w_qkv.frozen;

    ops->cast(g->dbranch, g->dx, N * d);
    if (trained)
        ops->matmul_backward_weight(layer->w_out.grad, d, g->dbranch, block->attention, N, d, d);
    ops->matmul_backward_input(g->dattention, g->dbranch, layer->w_out.weight, N, d, d);
    ops->attention_backward(g->dqkv, g->delta, g->dattention, block->qkv, block->attention,
                            block->lse, b, t, H, G, h);
    ops->rope_backward(g->dqkv, buffers->rope, b, t, H, G, h);
    if (trained) {
        ops->rmsnorm_forward(buffers->norm, block->rstd_1, block->x, norm_1, N, d, c->norm_eps);
        ops->matmul_backward_weight(layer->w_qkv.grad, d, g->dqkv, buffers->norm, N, d, Q);
    }
    ops->matmul_backward_input(g->dinner, g->dqkv, layer->w_qkv.weight, N, d, Q);
    ops->rmsnorm_backward(g->dx, layer->norm_1.grad, g->dinner, block->x, block->rstd_1, norm_1, N,
                          d);
}

static void block_backward(retrofit_buffers *buffers, retrofit_layer *layer, retrofit_block *block) {
    if (buffers->keep == RETROFIT_KEEP_INPUTS)
        block_until_gate_up(buffers, layer, block, block->x, 0);
    mlp_backward(buffers, layer, block);
    attention_branch_backward(buffers, layer, block);
}

// Blocks in a row: each into its own buffers (`saved`), or all of them in place on x. Returns where
// the last one's output lies. first_slot: of the first layer in the KV cache.
static const float *blocks_forward(retrofit_buffers *buffers, const retrofit_layer *layers,
                                   size_t count, retrofit_block *saved, float *x,
                                   size_t first_slot) {
    for (size_t i = 0; i < count; i++) {
        retrofit_block *block = saved ? &saved[i] : &buffers->scratch;
        if (!saved) {
            block->mid = x;
            block->out = x;
        }
        block_forward(buffers, &layers[i], block, x, first_slot + i);
        x = block->out;
    }
    return x;
}

static void blocks_backward(retrofit_buffers *buffers, retrofit_layer *layers, size_t count,
                            retrofit_block *saved) {
    for (size_t i = count; i-- > 0;) block_backward(buffers, &layers[i], &saved[i]);
}

// =================================================================================================
// 3  Prelude, recurrence, coda, loss; backpropagation truncated to the last k
// =================================================================================================

// ---- Prelude: e = prelude(wte[tokens]), and A_e·e -------------------------------------------------

// The two halves of the adapter A = [A_s | A_e]: columns that read the state, columns that read e.
static retrofit_weight adapter_s(const retrofit_model *model) { return model->adapter.weight; }

static retrofit_weight adapter_e(const retrofit_model *model) {
    retrofit_weight w = model->adapter.weight;
    w.data = (const char *)w.data + model->config.n_embd * retrofit_type_size(w.type);
    return w;
}

// Checks the next batch's token ids and uploads them.
static bool set_batch(retrofit_buffers *buffers, const int32_t *tokens, size_t b, size_t t) {
    const retrofit_model *model = buffers->model;
    size_t V = model->config.vocab;
    if (b == 0 || t == 0 || b > buffers->B || t > buffers->T)
        return retrofit_fail("a batch of %zu x %zu tokens where at most %zu x %zu fit", b, t,
                             buffers->B, buffers->T);
    for (size_t i = 0; i < b * t; i++) {
        if (tokens[i] < 0 || (size_t)tokens[i] >= V)
            return retrofit_fail("token %zu is %d, but the vocabulary has %zu entries", i,
                                 (int)tokens[i], V);
    }
    buffers->b = b;
    buffers->t = t;
    buffers->N = b * t;
    buffers->n = 0;
    buffers->k = 0;
    model->ops->upload(buffers->tokens, tokens, buffers->N * sizeof *tokens);
    return true;
}

static void prelude_forward(retrofit_buffers *buffers) {
    const retrofit_model *model = buffers->model;
    const retrofit_ops *ops = model->ops;
    size_t N = buffers->N, d = model->config.n_embd, P = model->config.prelude;
    retrofit_block *saved = buffers->keep ? buffers->saved.prelude : NULL;
    ops->embedding_forward(buffers->embedded, buffers->tokens, model->wte.weight, N, d);
    buffers->e = blocks_forward(buffers, model->prelude, P, saved, buffers->embedded, 0);
    if (retrofit_is_plain(&model->config)) return;
    ops->cast(buffers->norm, buffers->e, N * d);
    ops->matmul_residual_forward(buffers->injected, NULL, buffers->norm, adapter_e(model), N, d, d);
}

bool retrofit_prelude(retrofit_buffers *buffers, const int32_t *tokens, size_t b, size_t t) {
    if (!set_batch(buffers, tokens, b, t)) return false;
    prelude_forward(buffers);
    return true;
}

// ---- Recurrence: s_i = core(A_s·s_{i-1} + A_e·e) --------------------------------------------------

// s_0 ~ N(0, σ²), cut at ±3σ; the same in training and at test time, drawn anew for every batch, so
// that the model learns to reach its answer from anywhere. σ = 0 gives s_0 = 0, for tests that must
// not depend on a draw. Each number is a function of (seed, row, position, column): a row's states do
// not depend on how a text is cut into batches, and a cached decode equals the full forward pass.
void retrofit_init_state(retrofit_buffers *buffers, float sigma, uint64_t seed) {
    draw_states(buffers, buffers->state, sigma, seed);
}

// x = A_s·state + A_e·e = A·concat(state, e)
static void inject(retrofit_buffers *buffers, const float *state, float *x) {
    const retrofit_model *model = buffers->model;
    size_t N = buffers->N, d = model->config.n_embd;
    act *norm = buffers->norm;
    model->ops->cast(norm, state, N * d);
    model->ops->matmul_residual_forward(x, buffers->injected, norm, adapter_s(model), N, d, d);
}

// Where recurrence j = 1 … k with gradient left its state; s_n for j = 0.
static const float *saved_state(const retrofit_buffers *buffers, size_t j) {
    size_t C = buffers->model->config.core;
    return j ? buffers->saved.core[j * C - 1].out : buffers->state;
}

static void recur_without_gradient(retrofit_buffers *buffers, size_t n) {
    const retrofit_model *model = buffers->model;
    size_t C = model->config.core;
    float *state = buffers->state;
    for (size_t i = 0; i < n; i++) {
        inject(buffers, state, state);
        blocks_forward(buffers, model->core, C, NULL, state, core_slot(buffers, buffers->n));
        buffers->n++;
    }
}

static void recur_and_save(retrofit_buffers *buffers, size_t k) {
    const retrofit_model *model = buffers->model;
    size_t C = model->config.core;
    for (size_t i = 0; i < k; i++) {
        float *x = buffers->saved.adapted[buffers->k];
        inject(buffers, saved_state(buffers, buffers->k), x);
        blocks_forward(buffers, model->core, C, &buffers->saved.core[buffers->k * C], x, 0);
        buffers->k++;
    }
}

void retrofit_recur(retrofit_buffers *buffers, size_t n, size_t k) {
    if (retrofit_is_plain(&buffers->model->config)) return;
    recur_without_gradient(buffers, n);
    recur_and_save(buffers, k);
}

// ---- Coda: logits = lm_head·RMSNorm_f(coda(s_r)) --------------------------------------------------

static const float *latest_state(const retrofit_buffers *buffers) {
    if (retrofit_is_plain(&buffers->model->config)) return buffers->embedded;
    return saved_state(buffers, buffers->k);
}

void retrofit_coda(retrofit_buffers *buffers) {
    const retrofit_model *model = buffers->model;
    const retrofit_ops *ops = model->ops;
    const float *ln_f = (const float *)model->ln_f.weight.data;
    size_t N = buffers->N, d = model->config.n_embd, D = model->config.coda;
    float *x = (float *)latest_state(buffers);
    if (!buffers->keep) { // blocks run in place, and the state must live on: recurrences may follow
        ops->copy(buffers->x, x, N * d * sizeof *x);
        x = buffers->x;
    }
    retrofit_block *saved = buffers->keep ? buffers->saved.coda : NULL;
    buffers->last = blocks_forward(buffers, model->coda, D, saved, x, coda_slot(buffers));
    ops->rmsnorm_forward(buffers->final, buffers->rstd_f, buffers->last, ln_f, N, d,
                         model->config.norm_eps);
}

bool retrofit_forward(retrofit_buffers *buffers, const int32_t *tokens, size_t b, size_t t,
                      float sigma, uint64_t seed, size_t n, size_t k) {
    bool plain = retrofit_is_plain(&buffers->model->config);
    if (k > buffers->K && !plain)
        return retrofit_fail("%zu recurrences with gradient where %zu fit", k, buffers->K);
    if (!retrofit_prelude(buffers, tokens, b, t)) return false;
    if (!plain) retrofit_init_state(buffers, sigma, seed);
    retrofit_recur(buffers, n, k);
    retrofit_coda(buffers);
    return true;
}

// Element i of an array of `act`.
static act *act_at(const retrofit_ops *ops, act *p, size_t i) {
    return (char *)p + i * retrofit_type_size(ops->act_type);
}

void retrofit_logits(retrofit_buffers *buffers, size_t first, size_t count, float *logits) {
    const retrofit_model *model = buffers->model;
    const retrofit_ops *ops = model->ops;
    size_t d = model->config.n_embd, V = model->config.vocab;
    size_t rows = retrofit_min(buffers->chunk, WIDE_ROWS);
    float *wide = buffers->wide_logits;
    for (size_t at = 0; at < count; at += rows) {
        size_t some = retrofit_min(rows, count - at);
        act *final = act_at(ops, buffers->final, (first + at) * d);
        ops->matmul_residual_forward(wide, NULL, final, model->lm_head.weight, some, d, V);
        ops->download(logits + at * V, wide, some * V * sizeof *logits);
    }
}

// ---- Loss -----------------------------------------------------------------------------------------
// The mean of -log softmax(logits)[label] over the labels of a micro-batch that are not -100. A step
// accumulates micro-batches: each counts 1/accumulate (`scale`), however many labels it has, so a
// step's loss is the mean of its micro-batches' means.

// How many labels count; 0 and an error if one is not below V, or none counts.
static size_t count_labels(const retrofit_buffers *buffers, const int32_t *labels) {
    size_t V = buffers->model->config.vocab, counted = 0;
    for (size_t i = 0; i < buffers->N; i++) {
        if (labels[i] == -100) continue;
        if (labels[i] < 0 || (size_t)labels[i] >= V) {
            retrofit_fail("label %zu is %d, but the vocabulary has %zu entries", i, (int)labels[i],
                          V);
            return 0;
        }
        counted++;
    }
    if (counted == 0) retrofit_fail("all labels of the batch are -100: there is no loss");
    return counted;
}

// The logits exist in chunks of rows, never all (N,V) at once: a chunk's gradient takes its place and
// goes on to the head and to dfinal before the next chunk is computed.
static void head_and_loss(retrofit_buffers *buffers, float scale) {
    const retrofit_model *model = buffers->model;
    const retrofit_ops *ops = model->ops;
    const retrofit_parameter *head = &model->lm_head;
    size_t N = buffers->N, d = model->config.n_embd, V = model->config.vocab;
    act *logits = buffers->logits;
    for (size_t at = 0; at < N; at += buffers->chunk) {
        size_t rows = retrofit_min(N - at, buffers->chunk);
        act *final = act_at(ops, buffers->final, at * d);
        ops->matmul_forward(logits, final, head->weight, rows, d, V);
        ops->cross_entropy(buffers->losses + at, logits, buffers->labels + at, rows, V, scale);
        if (scale == 0) continue;
        act *dfinal = act_at(ops, buffers->gradients.dfinal, at * d);
        if (!head->frozen) ops->matmul_backward_weight(head->grad, d, logits, final, rows, d, V);
        ops->matmul_backward_input(dfinal, logits, head->weight, rows, d, V);
    }
}

double retrofit_loss(retrofit_buffers *buffers, const int32_t *labels, float scale) {
    const retrofit_model *model = buffers->model;
    const retrofit_ops *ops = model->ops;
    const retrofit_gradients *g = &buffers->gradients;
    size_t N = buffers->N, d = model->config.n_embd;
    size_t counted = count_labels(buffers, labels);
    if (counted == 0) return NAN;
    ops->upload(buffers->labels, labels, N * sizeof *labels);
    head_and_loss(buffers, scale / (float)counted);
    if (scale != 0) {
        ops->zero(g->dx, N * d * sizeof *g->dx);
        ops->rmsnorm_backward(g->dx, model->ln_f.grad, g->dfinal, buffers->last, buffers->rstd_f,
                              (const float *)model->ln_f.weight.data, N, d);
    }
    ops->download(buffers->host_losses, buffers->losses, N * sizeof(float));
    double sum = 0;
    for (size_t i = 0; i < N; i++) sum += buffers->host_losses[i];
    return sum / (double)counted;
}

// ---- Backward: through the coda, the last k recurrences, the prelude ------------------------------

void retrofit_zero_grad(retrofit_model *model) {
    model->ops->zero(model->grads, model->grad_bytes);
}

// From i = n + k down to n + 1. dx comes in as ds_i and leaves as ds_{i-1}; in between it is dY_i, the
// gradient of A·concat(s_{i-1}, e). At i = n + 1 it stops: s_n counts as a constant.
static void recurrence_backward(retrofit_buffers *buffers) {
    retrofit_model *model = (retrofit_model *)buffers->model;
    const retrofit_ops *ops = model->ops;
    const retrofit_gradients *g = &buffers->gradients;
    size_t N = buffers->N, d = model->config.n_embd, C = model->config.core;
    ops->zero(g->dinjected, N * d * sizeof *g->dinjected);
    for (size_t j = buffers->k; j-- > 0;) {
        blocks_backward(buffers, model->core, C, &buffers->saved.core[j * C]);
        ops->add(g->dinjected, g->dx, N * d, 1);
        ops->cast(g->dbranch, g->dx, N * d);
        ops->cast(buffers->norm, saved_state(buffers, j), N * d);
        ops->matmul_backward_weight(model->adapter.grad, 2 * d, g->dbranch, buffers->norm, N, d, d);
        if (j > 0) ops->matmul_residual_backward_input(g->dx, g->dbranch, adapter_s(model), N, d, d);
    }
}

// dA_e = (Σ dY_i)·eᵀ and, unless the prelude is frozen, de = A_eᵀ·(Σ dY_i) into dx.
static void injection_backward(retrofit_buffers *buffers) {
    retrofit_model *model = (retrofit_model *)buffers->model;
    const retrofit_ops *ops = model->ops;
    const retrofit_gradients *g = &buffers->gradients;
    size_t N = buffers->N, d = model->config.n_embd;
    float *dA_e = model->adapter.grad + d;
    ops->cast(g->dbranch, g->dinjected, N * d);
    ops->cast(buffers->norm, buffers->e, N * d);
    ops->matmul_backward_weight(dA_e, 2 * d, g->dbranch, buffers->norm, N, d, d);
    if (!model->wte.frozen)
        ops->matmul_residual_backward_input(g->dx, g->dbranch, adapter_e(model), N, d, d);
}

void retrofit_backward(retrofit_buffers *buffers) {
    retrofit_model *model = (retrofit_model *)buffers->model;
    const retrofit_config *c = &model->config;
    float *dx = buffers->gradients.dx;
    blocks_backward(buffers, model->coda, c->coda, buffers->saved.coda);
    if (!retrofit_is_plain(c)) {
        recurrence_backward(buffers);
        injection_backward(buffers);
        if (model->wte.frozen) return;
        blocks_backward(buffers, model->prelude, c->prelude, buffers->saved.prelude);
    }
    model->ops->embedding_backward(model->wte.grad, buffers->tokens, dx, buffers->N, c->n_embd);
}

size_t retrofit_state_rms(const retrofit_buffers *buffers, double *rms) {
    const retrofit_model *model = buffers->model;
    size_t count = buffers->N * model->config.n_embd;
    double *sum = model->sums + 1;
    if (retrofit_is_plain(&model->config)) return 0;
    for (size_t j = 0; j <= buffers->k; j++) {
        model->ops->zero(sum, sizeof *sum);
        model->ops->sum_squares(sum, saved_state(buffers, j), count);
        model->ops->download(&rms[j], sum, sizeof *rms);
        rms[j] = sqrt(rms[j] / (double)count);
    }
    return buffers->k + 1;
}

// ---- What it costs --------------------------------------------------------------------------------
// A multiply-add of a matrix is 2 operations; causal attention reads T/2 keys on average. Forward
// costs 1; backward 1 for the gradient of what came in and 1 for that of the weights, unless they are
// frozen. The n recurrences without gradient cost 1 each. A_e·e is computed once per pass, whatever r
// is, and so are its gradients. (The ds of the first recurrence with gradient, which truncation saves,
// is counted: 2d² of some billions.)
double retrofit_flops_per_token(const retrofit_config *config, retrofit_mode mode, size_t T,
                                size_t n, size_t k) {
    double d = (double)config->n_embd, F = (double)config->intermediate;
    double Q = (double)retrofit_qkv_width(config), V = (double)config->vocab;
    double layer = 2 * (d * Q + d * d + 3 * d * F) + 2 * (double)T * d;
    double adapter_half = retrofit_is_plain(config) ? 0 : 2 * d * d;
    bool all = mode == RETROFIT_TRAINING, none = mode == RETROFIT_INFERENCE;

    double of_prelude = all ? 3 : 1;
    double of_A_e = all ? 3 : none ? 1 : 2;
    double of_A_s = none ? 1 : 3;
    double of_core = none ? 1 : mode == RETROFIT_TRAINING_ADAPTER ? 2 : 3;
    double of_coda = all ? 3 : none ? 1 : 2;
    double P = (double)config->prelude, C = (double)config->core, D = (double)config->coda;
    double without_gradient = (double)n * (C * layer + adapter_half);
    double with_gradient = (double)k * (of_core * C * layer + of_A_s * adapter_half);
    return of_prelude * P * layer + of_A_e * adapter_half + without_gradient + with_gradient +
           of_coda * (D * layer + 2 * d * V);
}

// As the paper's figures count: 6·N_1 + 2·N_2 per token, N_1 the parameters of prelude, k times the
// core, and coda, N_2 those of n times the core. Attention, adapter, embedding and head do not count,
// nor does freezing: it is a measure of the body's size times its passes.
double retrofit_paper_flops_per_token(const retrofit_config *config, size_t n, size_t k) {
    double d = (double)config->n_embd, F = (double)config->intermediate;
    double layer = d * (double)retrofit_qkv_width(config) + d * d + 3 * d * F + 2 * d;
    size_t with_gradient = config->prelude + k * config->core + config->coda;
    return layer * (6 * (double)with_gradient + 2 * (double)(n * config->core));
}

// =================================================================================================
// 4  How many recurrences, how much of them, how fast: sampler, curriculum, learning rate
// =================================================================================================

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

// Step S, behind the last, has the authors' schedules back at their start; so do these.
double retrofit_curriculum(retrofit_curriculum_kind kind, size_t t, size_t S, double w, double R) {
    double warm = ceil(w * (double)S);
    if (kind == RETROFIT_CURRICULUM_NONE || ((double)t >= warm && t < S)) return R;
    if (t >= S) return 0;
    double x = (double)t / warm;
    return R * (kind == RETROFIT_CURRICULUM_LINEAR ? x : 1 - sqrt(1 - x));
}

double retrofit_linear_schedule(size_t t, size_t S, double w, double start, double base) {
    double warm = ceil(w * (double)S);
    if (t >= S) return base * start;
    return (double)t >= warm ? base : base * (start + (1 - start) * ((double)t / warm));
}

double retrofit_learning_rate(size_t t, size_t S, double w, double c, double min, double lr) {
    double warm = ceil(w * (double)S), cool = ceil(c * (double)S), s = (double)t;
    if (s < warm) return lr * (min + (1 - min) * (s / warm));
    if (s < (double)S - cool) return lr;
    double x = cool > 0 ? fmin(1, (s - ((double)S - cool)) / cool) : 1;
    return lr * (min + (1 - min) * 0.5 * (1 + cos(3.14159265358979323846 * x)));
}

const retrofit_training retrofit_paper_training = {
    .steps = 50000,
    .accumulate = 128,
    .mean_recurrence = 32,
    .backprop_depth = 8,
    .curriculum = RETROFIT_CURRICULUM_1_SQRT,
    .curriculum_warmup = 0.75,
    .depth_start = 1,
    .depth_warmup = 0,
    .lr = 5e-5,
    .muon_lr = 1e-3,
    .warmup = 0.0025,
    .cooldown = 0.6,
    .min_lr_ratio = 0.001,
    .mode = RETROFIT_TRAINING,
    .optimizer = {.kind = RETROFIT_MUON,
                  .beta1 = 0.9f,
                  .beta2 = 0.95f,
                  .eps = 1e-10f,
                  .weight_decay = 1e-4f,
                  .momentum = 0.95f,
                  .clip = 1,
                  .peak_lr = 5e-5f},
    .sigma = (float)RETROFIT_STATE_STD,
    .seed = 1,
};

retrofit_plan retrofit_plan_step(const retrofit_training *training, const retrofit_config *config,
                                 size_t step) {
    size_t S = training->steps;
    retrofit_plan plan = {0, 0, 0, 0};
    plan.lr = (float)retrofit_learning_rate(step, S, training->warmup, training->cooldown,
                                            training->min_lr_ratio, training->lr);
    plan.muon_lr = (float)retrofit_learning_rate(step, S, training->warmup, training->cooldown,
                                                 training->min_lr_ratio, training->muon_lr);
    if (retrofit_is_plain(config)) return plan;

    double mean = retrofit_curriculum(training->curriculum, step, S, training->curriculum_warmup,
                                      (double)training->mean_recurrence);
    plan.mean = retrofit_max(1, (size_t)ceil(mean));
    double K = (double)training->backprop_depth;
    double warmup = training->depth_warmup;
    if (training->fixed_k) {
        plan.mean = training->fixed_n + training->fixed_k;
        warmup = 0;
    }
    // A little is taken off before rounding up: start/K·K may come out a bit more than start.
    double start = (double)training->depth_start / K;
    double depth = retrofit_linear_schedule(step, S, warmup, start, K) - 1e-9;
    plan.depth = retrofit_min(plan.mean, (size_t)ceil(depth));
    return plan;
}

void retrofit_plan_draw(const retrofit_training *training, const retrofit_plan *plan, size_t step,
                        size_t j, size_t *n, size_t *k) {
    *n = training->fixed_n;
    *k = training->fixed_k;
    if (plan->mean == 0 || training->fixed_k) return;
    uint64_t m = step * training->accumulate + j + 1;
    retrofit_draw_recurrences(m, plan->mean, plan->depth, n, k, NULL);
}

static bool read_micro_batch(retrofit_buffers *buffers, retrofit_data *data, uint64_t index) {
    size_t T = buffers->T;
    for (size_t i = 0; i < buffers->B; i++) {
        int32_t *tokens = buffers->host_tokens + i * T;
        int32_t *labels = buffers->host_labels + i * T;
        if (!retrofit_data_row(data, index * buffers->B + i, tokens, labels)) return false;
    }
    return true;
}

static void count_micro_batch(retrofit_step *result, const retrofit_training *training,
                              const retrofit_config *config, size_t tokens, size_t T, size_t n,
                              size_t k) {
    retrofit_mode mode = training->mode;
    result->n = n;
    result->k = k;
    result->mean_k += (double)k / (double)training->accumulate;
    result->flops += retrofit_flops_per_token(config, mode, T, n, k) * (double)tokens;
    result->paper_flops += retrofit_paper_flops_per_token(config, n, k) * (double)tokens;
}

bool retrofit_training_step(retrofit_buffers *buffers, retrofit_data *data,
                            const retrofit_training *training, size_t step, size_t t,
                            retrofit_step *result) {
    retrofit_model *model = (retrofit_model *)buffers->model;
    const retrofit_config *config = &model->config;
    size_t B = buffers->B, T = buffers->T, accumulate = training->accumulate;
    retrofit_plan plan = retrofit_plan_step(training, config, step);
    *result = (retrofit_step){.plan = plan, .norm = NAN};

    retrofit_zero_grad(model);
    for (size_t j = 0; j < accumulate; j++) {
        size_t n, k;
        uint64_t index = (uint64_t)step * accumulate + j;
        uint64_t seed = retrofit_hash(training->seed, index);
        if (!read_micro_batch(buffers, data, index)) return false;
        retrofit_plan_draw(training, &plan, step, j, &n, &k);
        if (!retrofit_forward(buffers, buffers->host_tokens, B, T, training->sigma, seed, n, k)) return false;
        result->loss += retrofit_loss(buffers, buffers->host_labels, 1.0f / (float)accumulate) / (double)accumulate;
        retrofit_backward(buffers);
        count_micro_batch(result, training, config, B * T, T, n, k);
    }

    retrofit_optimizer optimizer = training->optimizer;
    optimizer.lr = plan.lr;
    optimizer.muon_lr = plan.muon_lr;
    optimizer.throttle = training->throttle ? (float)result->mean_k : 0;
    if (isfinite(result->loss)) result->norm = retrofit_optimizer_step(model, &optimizer, t);
    return true;
}

// =================================================================================================
// 5  Optimizers
// =================================================================================================

static bool by_muon(const retrofit_parameter *p, retrofit_optimizer_kind kind) { return kind == RETROFIT_MUON && p->kind == RETROFIT_MATRIX; }

static void sum_squares(double *sum, const float *x, size_t n) {
    double total = 0;
    enum { BLOCK = 1 << 14, MANY = 256 }; // blocks are summed side by side and added in order, whatever the number of threads
    for (size_t at = 0; at < n; at += (size_t)BLOCK * MANY) {
        double sums[MANY] = {0};
        PARALLEL_FOR(n - at)
        for (size_t i = 0; i < MANY; i++) {
            size_t begin = at + i * BLOCK, end = retrofit_min(begin + BLOCK, n);
            for (size_t j = begin; j < end; j += 256) sums[i] += dot(x + j, x + j, retrofit_min(end - j, 256));
        }
        for (size_t i = 0; i < MANY; i++) total += sums[i];
    }
    *sum += total;
}

static void adamw_update(float *w, float *m, float *v, const float *g, size_t n, float scale, float lr, float beta1, float beta2, double bias1,
                         double bias2, float eps, float decay) {
    float step = (float)(lr / bias1), root = (float)sqrt(bias2), keep = 1.0f - lr * decay;
    PARALLEL_FOR(n)
    for (size_t i = 0; i < n; i++) {
        float gi = g[i] * scale;
        m[i] += (1.0f - beta1) * (gi - m[i]);
        v[i] = beta2 * v[i] + (1.0f - beta2) * gi * gi;
        w[i] = w[i] * keep - step * m[i] / (sqrtf(v[i]) / root + eps);
    }
}

static void ellisadam_moments(float *m, float *v, double *sum, const float *g, size_t n, float scale, float beta1, float beta2, float eps) {
    double total = 0;
    enum { BLOCK = 1 << 12, MANY = 256 }; // as in sum_squares
    for (size_t at = 0; at < n; at += (size_t)BLOCK * MANY) {
        double sums[MANY] = {0};
        PARALLEL_FOR(n - at)
        for (size_t i = 0; i < MANY; i++)
            for (size_t j = at + i * BLOCK; j < retrofit_min(at + (i + 1) * BLOCK, n); j++) {
                float gj = g[j] * scale;
                m[j] += (1.0f - beta1) * (gj - m[j]);
                v[j] = beta2 * v[j] + (1.0f - beta2) * gj * gj;
                if (v[j] < eps * eps) v[j] = eps * eps;
                sums[i] += gj * gj / v[j];
            }
        for (size_t i = 0; i < MANY; i++) total += sums[i];
    }
    *sum += total;
}

static void ellisadam_update(float *w, const float *m, const float *v, const double *sum, size_t n, float lr, double bias1, double bias2,
                             float decay) {
    float step = (float)(lr / bias1 / fmax(1, sqrt(*sum / (double)n))), root = (float)sqrt(bias2);
    PARALLEL_FOR(n)
    for (size_t i = 0; i < n; i++) w[i] = w[i] * (1.0f - decay) - step * atan2f(m[i], sqrtf(v[i]) / root);
}

static void muon_momentum(float *u, float *m, const float *g, size_t n, float scale, float momentum) {
    PARALLEL_FOR(n)
    for (size_t i = 0; i < n; i++) {
        float gi = g[i] * scale;
        m[i] += (1.0f - momentum) * (gi - m[i]);
        u[i] = gi + momentum * (m[i] - gi);
    }
}

static void muon_load(act *x_, const float *u, const double *squares, size_t rows, size_t cols) {
    float *x = (float *)x_, scale = (float)(1 / (sqrt(*squares) + 1e-7));
    PARALLEL_FOR(rows * cols)
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) x[rows > cols ? c * rows + r : r * cols + c] = u[r * cols + c] * scale;
}

static void axpby(act *y_, const act *x_, size_t n, float a, float b) {
    float *y = (float *)y_;
    const float *x = (const float *)x_;
    PARALLEL_FOR(n)
    for (size_t i = 0; i < n; i++) y[i] = a * x[i] + b * y[i];
}

static void muon_update(float *w, const act *x_, size_t rows, size_t cols, float lr, float scale, float decay) {
    const float *x = (const float *)x_;
    PARALLEL_FOR(rows * cols)
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) {
            float u = x[rows > cols ? c * rows + r : r * cols + c];
            w[r * cols + c] = w[r * cols + c] * (1.0f - lr * decay) - lr * scale * u;
        }
}

// Muon: the momentum's update direction u, with its singular values pushed towards 1 by five steps of the quintic iteration
// X ← aX + (bA + cA²)X, A = XXᵀ, on X = u/(‖u‖ + 1e-7); X is kept with at most as many rows as columns.
static void muon_step(retrofit_model *m, const retrofit_parameter *p, const retrofit_optimizer *o, float scale, float lr) {
    const retrofit_ops *ops = m->ops;
    size_t rows = p->rows, cols = p->cols, r = rows < cols ? rows : cols, c = rows < cols ? cols : rows;
    retrofit_weight x = {m->muon_x, ops->act_type, c}, a = {m->muon_a, ops->act_type, r};
    ops->muon_momentum(m->muon_u, p->m, p->grad, rows * cols, scale, o->momentum);
    ops->zero(m->sums + 1, sizeof *m->sums);
    ops->sum_squares(m->sums + 1, m->muon_u, rows * cols);
    ops->muon_load(m->muon_x, m->muon_u, m->sums + 1, rows, cols);
    for (int i = 0; i < 5; i++) {
        ops->matmul_forward(m->muon_a, m->muon_x, x, r, c, r);
        ops->matmul_forward(m->muon_b, m->muon_a, a, r, r, r); // A is symmetric: A·Aᵀ = A²
        ops->axpby(m->muon_b, m->muon_a, r * r, -4.7750f, 2.0315f);
        ops->matmul_backward_input(m->muon_y, m->muon_b, x, r, c, r);
        ops->axpby(m->muon_x, m->muon_y, r * c, 1, 3.4445f);
    }
    ops->muon_update(p->master, m->muon_x, rows, cols, lr, sqrtf(fmaxf(1, (float)rows / (float)cols)), o->weight_decay);
}

// AdamW*, the authors' ELLISAdam: m and v begin as the first gradient and its square; atan2 needs no eps, but v is never below eps²; a tensor
// whose gradient is larger than v expects takes a smaller step; weight decay follows the schedule, not the learning rate.
static void ellisadam_step(retrofit_model *m, const retrofit_parameter *p, const retrofit_optimizer *o, float scale, float lr, size_t t,
                           double bias1, double bias2) {
    size_t n = p->rows * p->cols;
    m->ops->zero(m->sums + 1, sizeof *m->sums);
    m->ops->ellisadam_moments(p->m, p->v, m->sums + 1, p->grad, n, scale, t > 1 ? o->beta1 : 0, t > 1 ? o->beta2 : 0, o->eps);
    m->ops->ellisadam_update(p->master, p->m, p->v, m->sums + 1, n, lr, bias1, bias2,
                             o->weight_decay * (o->peak_lr > 0 ? o->lr / o->peak_lr : 1));
}

double retrofit_optimizer_step(retrofit_model *m, const retrofit_optimizer *o, size_t t) {
    double norm;
    m->ops->zero(m->sums, sizeof *m->sums);
    m->ops->sum_squares(m->sums, (const float *)m->grads, m->grad_bytes / sizeof(float));
    m->ops->download(&norm, m->sums, sizeof norm);
    if (!isfinite(norm = sqrt(norm))) return norm;
    float scale = o->clip > 0 ? (float)fmin(1, o->clip / (norm + 1e-6)) : 1;
    double bias1 = 1 - pow(o->beta1, (double)t), bias2 = 1 - pow(o->beta2, (double)t);
    for (size_t i = 0; i < m->parameter_count; i++) {
        retrofit_parameter *p = m->parameters[i];
        bool throttled = o->throttle > 0 && (p->part == RETROFIT_PART_CORE || p->part == RETROFIT_PART_ADAPTER);
        float slower = throttled ? o->throttle : 1, lr = o->lr / slower;
        size_t n = p->rows * p->cols;
        if (p->frozen) continue;
        if (by_muon(p, o->kind)) muon_step(m, p, o, scale, o->muon_lr / slower);
        else if (o->kind == RETROFIT_ELLISADAM) ellisadam_step(m, p, o, scale, lr, t, bias1, bias2);
        else
            m->ops->adamw_update(p->master, p->m, p->v, p->grad, n, scale, lr, o->beta1, o->beta2, bias1, bias2, o->eps, o->weight_decay);
    }
    retrofit_refresh_weights(m);
    return norm;
}

// =================================================================================================
// 6  The operations on a CPU, forward beside backward
// =================================================================================================
// `act` is float here. Above each operation stand its formula and its gradient, where dy means
// ∂loss/∂y and ∘ multiplies element by element. Section 10 has the matrix products, the tiles of
// attention, and sums over a row in an order that is fast.

// Gradients that are sums over rows are divided among the threads by columns, so many at a time: then
// each element's rows add up in their order, however many threads there are.
enum { COLUMNS = 64 };

// ---- Embedding ----------------------------------------------------------------------------------
//     x_n = wte[token_n]            dwte[token_n] += dx_n

static void embedding_forward(float *x, const int32_t *tokens, retrofit_weight wte, size_t N,
                              size_t d) {
    const char *rows = wte.data;
    size_t row_bytes = wte.stride * retrofit_type_size(wte.type);
    PARALLEL_FOR(N * d)
    for (size_t n = 0; n < N; n++)
        retrofit_to_float(x + n * d, rows + (size_t)tokens[n] * row_bytes, wte.type, d);
}

static void embedding_backward(float *dwte, const int32_t *tokens, const float *dx, size_t N,
                               size_t d) {
    PARALLEL_FOR(N * d)
    for (size_t first = 0; first < d; first += COLUMNS) {
        size_t end = retrofit_min(first + COLUMNS, d);
        for (size_t n = 0; n < N; n++) {
            float *dw = dwte + (size_t)tokens[n] * d;
            for (size_t c = first; c < end; c++) dw[c] += dx[n * d + c];
        }
    }
}

// ---- RMSNorm ------------------------------------------------------------------------------------
//     y = ρ·x∘w                     dx += ρ·(g - ρ²·mean(g∘x)·x)     with g = dy∘w
//     ρ = 1/√(mean(x²) + ε)         dw += Σ_n ρ_n·dy_n∘x_n
// The second term of dx is ρ's own derivative, ∂ρ/∂x = -ρ³·x/d.

static void rmsnorm_forward(act *out, float *rstd, const float *x, const float *weight, size_t N,
                            size_t d, float eps) {
    float *y = out;
    PARALLEL_FOR(N * d)
    for (size_t n = 0; n < N; n++) {
        float rho = 1.0f / sqrtf(dot(x + n * d, x + n * d, d) / (float)d + eps);
        for (size_t c = 0; c < d; c++) y[n * d + c] = x[n * d + c] * rho * weight[c];
        rstd[n] = rho;
    }
}

static void rmsnorm_backward(float *dx, float *dweight, const act *dout, const float *x,
                             const float *rstd, const float *weight, size_t N, size_t d) {
    const float *dy = dout;
    PARALLEL_FOR(N * d)
    for (size_t n = 0; n < N; n++) {
        const float *dyn = dy + n * d, *xn = x + n * d;
        float rho = rstd[n];
        float along = weighted_dot(dyn, weight, xn, d) * rho * rho / (float)d;
        for (size_t c = 0; c < d; c++)
            dx[n * d + c] += rho * (dyn[c] * weight[c] - xn[c] * along);
    }
    if (!dweight) return;
    PARALLEL_FOR(N * d)
    for (size_t first = 0; first < d; first += COLUMNS) {
        size_t end = retrofit_min(first + COLUMNS, d);
        for (size_t n = 0; n < N; n++)
            for (size_t c = first; c < end; c++)
                dweight[c] += dy[n * d + c] * x[n * d + c] * rstd[n];
    }
}

// ---- Matrix products ----------------------------------------------------------------------------
//     y = x·wᵀ + residual           dx = dy·w            dw += dyᵀ·x
// for x (N,I), w (O,I), y (N,O).

static void matmul_residual_forward(float *out, const float *residual, const act *inp,
                                    retrofit_weight w, size_t N, size_t I, size_t O) {
    matrix_view w_transposed = {w.data, w.type, 1, w.stride};
    gemm(N, O, I, view(inp, I), w_transposed, out, O, residual, O);
}

static void matmul_forward(act *out, const act *inp, retrofit_weight w, size_t N, size_t I,
                           size_t O) {
    matmul_residual_forward(out, NULL, inp, w, N, I, O);
}

static void matmul_residual_backward_input(float *dinp, const act *dout, retrofit_weight w,
                                           size_t N, size_t I, size_t O) {
    matrix_view w_as_stored = {w.data, w.type, w.stride, 1};
    gemm(N, I, O, view(dout, O), w_as_stored, dinp, I, NULL, 0);
}

static void matmul_backward_input(act *dinp, const act *dout, retrofit_weight w, size_t N, size_t I,
                                  size_t O) {
    matmul_residual_backward_input(dinp, dout, w, N, I, O);
}

static void matmul_backward_weight(float *dw, size_t stride, const act *dout, const act *inp,
                                   size_t N, size_t I, size_t O) {
    gemm(O, I, N, view_transposed(dout, O), view(inp, I), dw, stride, dw, stride);
}

// ---- RoPE ---------------------------------------------------------------------------------------
// Elements i and i + h/2 of a head of q or k are a point (a, b) of the plane. At position t it turns
// by the angle φ = t·θ_i:
//     a' = a·cos φ - b·sin φ        b' = b·cos φ + a·sin φ
// so that q·k depends on the distance of their positions alone. The gradient turns back, by -φ.

static void rotate(float *qkv, const float *table, const int32_t *past, size_t B, size_t T,
                   size_t H, size_t G, size_t h, float sign) {
    size_t Q = (H + 2 * G) * h;
    PARALLEL_FOR(B * T * Q)
    for (size_t n = 0; n < B * T; n++) {
        size_t position = (past ? (size_t)past[n / T] : 0) + n % T;
        const float *angles = table + position * h;
        for (size_t head = 0; head < H + G; head++) {
            float *low = qkv + n * Q + head * h, *high = low + h / 2;
            for (size_t i = 0; i < h / 2; i++) {
                float a = low[i], b = high[i];
                float cosine = angles[2 * i], sine = sign * angles[2 * i + 1];
                low[i] = a * cosine - b * sine;
                high[i] = b * cosine + a * sine;
            }
        }
    }
}

static void rope_forward(act *qkv, const float *table, const int32_t *past, size_t B, size_t T,
                         size_t H, size_t G, size_t h) {
    rotate(qkv, table, past, B, T, H, G, h, 1);
}

static void rope_backward(act *dqkv, const float *table, size_t B, size_t T, size_t H, size_t G,
                          size_t h) {
    rotate(dqkv, table, NULL, B, T, H, G, h, -1);
}

// ---- Attention ----------------------------------------------------------------------------------
// For every query head, over the tokens u ≤ t:
//     s_tu = q_t·k_u/√h             dv_u  = Σ_t p_tu·dy_t
//     p_tu = e^{s_tu - lse_t}       dp_tu = dy_t·v_u
//     lse_t = log Σ_u e^{s_tu}      ds_tu = p_tu·(dp_tu - δ_t)       δ_t = Σ_u p_tu·dp_tu = dy_t·y_t
//     y_t = Σ_u p_tu·v_u            dq_t  = Σ_u ds_tu·k_u/√h         dk_u = Σ_t ds_tu·q_t/√h
//
// p is the softmax of s; lse (log-sum-exp) is the one number per query and head that forward keeps, and
// from which backward finds p again. δ comes from the softmax's denominator; it needs no p, since
// Σ_u p_tu·(dy_t·v_u) = dy_t·Σ_u p_tu·v_u. p (T,T) is never whole in memory: section 10 works on tiles
// of TILE queries by TILE keys.
//
// Grouped queries: head j of the H query heads reads key/value head j/(H/G), whose dk and dv
// therefore are sums over H/G query heads.

static void attention_forward(act *out, float *lse, const act *qkv, size_t B, size_t T, size_t H,
                              size_t G, size_t h) {
    size_t Q = (H + 2 * G) * h, tiles = (T + TILE - 1) / TILE;
    float *y = out;
    PARALLEL_TASKS
    for (size_t task = 0; task < B * H * tiles; task++) {
        size_t b = task / tiles / H, head = task / tiles % H, t = task % tiles * TILE;
        size_t n = b * T + t, group = head / (H / G);
        const float *row = (const float *)qkv + b * T * Q;
        matrix_view q = view(row + t * Q + head * h, Q);
        matrix_view k = view(row + (H + group) * h, Q);
        matrix_view v = view(row + (H + G + group) * h, Q);
        attend(y + (n * H + head) * h, H * h, lse + n * H + head, H, q, k, v,
               retrofit_min(T - t, TILE), t, h);
    }
}

static void attention_backward(act *dqkv, float *delta, const act *dout, const act *qkv,
                               const act *out, const float *lse, size_t B, size_t T, size_t H,
                               size_t G, size_t h) {
    size_t Q = (H + 2 * G) * h;
    const float *y = out, *dy = dout;
    PARALLEL_FOR(B * T * Q)
    for (size_t n = 0; n < B * T; n++) {
        memset((float *)dqkv + n * Q, 0, Q * sizeof(float)); // the tiles add to it
        for (size_t i = n * H; i < (n + 1) * H; i++) delta[i] = dot(dy + i * h, y + i * h, h);
    }
    PARALLEL_TASKS
    for (size_t task = 0; task < B * G; task++) {
        size_t b = task / G, group = task % G;
        const float *row = (const float *)qkv + b * T * Q;
        float *drow = (float *)dqkv + b * T * Q;
        for (size_t head = group * (H / G); head < (group + 1) * (H / G); head++) {
            size_t first = b * T * H + head;
            attend_backward(&(attention_head){
                .T = T, .h = h, .Q = Q, .H = H,
                .q = view(row + head * h, Q), .dq = drow + head * h,
                .k = view(row + (H + group) * h, Q), .dk = drow + (H + group) * h,
                .v = view(row + (H + G + group) * h, Q), .dv = drow + (H + G + group) * h,
                .dy = view(dy + first * h, H * h), .lse = lse + first, .delta = delta + first});
        }
    }
}

// ---- SwiGLU -------------------------------------------------------------------------------------
//     y = silu(g)∘u                 dg = dy∘u∘σ(g)∘(1 + g∘(1 - σ(g)))
//     silu(g) = g·σ(g)              du = dy∘silu(g)
//     σ(g) = 1/(1 + e^-g)
// Backward also gives y again, which w_down's gradient needs and forward did not keep.

static void swiglu_forward(act *out, const act *gate_up, size_t N, size_t F) {
    PARALLEL_FOR(N * F)
    for (size_t n = 0; n < N; n++) {
        const float *gate = (const float *)gate_up + n * 2 * F, *up = gate + F;
        float *y = (float *)out + n * F;
        for (size_t i = 0; i < F; i++) y[i] = gate[i] / (1.0f + fast_exp(-gate[i])) * up[i];
    }
}

static void swiglu_backward(act *dgate_up, act *out, const act *dout, const act *gate_up, size_t N,
                            size_t F) {
    PARALLEL_FOR(N * F)
    for (size_t n = 0; n < N; n++) {
        const float *gate = (const float *)gate_up + n * 2 * F, *up = gate + F;
        const float *dy = (const float *)dout + n * F;
        float *dgate = (float *)dgate_up + n * 2 * F, *dup = dgate + F;
        float *y = (float *)out + n * F;
        for (size_t i = 0; i < F; i++) {
            float sigma = 1.0f / (1.0f + fast_exp(-gate[i]));
            dgate[i] = dy[i] * up[i] * sigma * (1.0f + gate[i] * (1.0f - sigma));
            dup[i] = dy[i] * gate[i] * sigma;
            y[i] = gate[i] * sigma * up[i];
        }
    }
}

// ---- Cross-entropy ------------------------------------------------------------------------------
//     loss = log Σ_v e^{z_v} - z_label               dz = scale·(softmax(z) - onehot(label))
//          = log Σ_v e^{z_v - max} + max - z_label
// The second form, because e^{z_v} itself may overflow. A negative label counts for nothing.

static void cross_entropy(float *losses, act *logits, const int32_t *labels, size_t N, size_t V,
                          float scale) {
    PARALLEL_FOR(N * V)
    for (size_t n = 0; n < N; n++) {
        float *z = (float *)logits + n * V;
        if (labels[n] < 0) {
            losses[n] = 0;
            if (scale != 0) memset(z, 0, V * sizeof *z);
            continue;
        }
        float target = z[labels[n]], max = max_element(z, V);
        double sum = sum_exp(scale != 0 ? z : NULL, z, V, max); // z becomes e^{z - max}
        losses[n] = (float)(log(sum) + (double)max - target);
        if (scale == 0) continue;

        float factor = (float)(scale / sum);
        for (size_t v = 0; v < V; v++) z[v] *= factor;
        z[labels[n]] -= scale;
    }
}

// ---- Elementwise --------------------------------------------------------------------------------

static void cast(act *out, const float *x, size_t n) { memcpy(out, x, n * sizeof *x); }

static void add(float *x, const float *y, size_t n, float keep) {
    PARALLEL_FOR(n)
    for (size_t i = 0; i < n; i++) x[i] = keep * x[i] + y[i];
}

static void state_init(float *s, const int32_t *past, size_t B, size_t T, size_t d, float sigma,
                       uint64_t seed) {
    PARALLEL_FOR(B * T * d)
    for (size_t n = 0; n < B * T; n++) {
        uint64_t position = (past ? (uint64_t)past[n / T] : 0) + n % T;
        uint64_t key = retrofit_hash(retrofit_hash(seed, n / T), position);
        for (size_t c = 0; c < d; c++)
            s[n * d + c] = sigma == 0 ? 0 : sigma * retrofit_hash_normal(key, c);
    }
}

// ---- The table ----------------------------------------------------------------------------------

static bool cpu_start(char text[256]) {
    snprintf(text, 256, "the CPU");
    return true;
}

static double cpu_peak_flops(void) { return 0; }

// What the system would still give without swapping.
static size_t cpu_free_memory(void) {
    char line[256];
    size_t kilobytes = 0;
    FILE *f = fopen("/proc/meminfo", "re");
    if (!f) return SIZE_MAX;
    while (kilobytes == 0 && fgets(line, sizeof line, f))
        sscanf(line, "MemAvailable: %zu", &kilobytes);
    fclose(f);
    return kilobytes ? kilobytes << 10 : SIZE_MAX;
}

// By calloc, whose fresh pages are zero without being touched. The pointer that it gave is kept just
// below the aligned one, for cpu_free.
static void *cpu_alloc(size_t bytes) {
    char *p = bytes < SIZE_MAX / 2 ? calloc(bytes + 128, 1) : NULL;
    if (!p) return fail_null("out of memory: %.2f GB could not be had", (double)bytes / 1e9);
    void **aligned = (void **)(void *)(p + 128 - (uintptr_t)p % 64);
    aligned[-1] = p;
    return aligned;
}

static void cpu_free(void *p) {
    if (p) free(((void **)p)[-1]);
}

static void cpu_copy(void *to, const void *from, size_t bytes) { memmove(to, from, bytes); }
static void cpu_zero(void *p, size_t bytes) { memset(p, 0, bytes); }

const retrofit_ops retrofit_cpu = {
    .name = "cpu",
    .act_type = RETROFIT_F32,
    .max_head_dim = SIZE_MAX,
    .start = cpu_start,
    .peak_flops = cpu_peak_flops,
    .free_memory = cpu_free_memory,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .upload = cpu_copy,
    .download = cpu_copy,
    .copy = cpu_copy,
    .zero = cpu_zero,
#define X(operation, parameters) .operation = operation,
    RETROFIT_OPS(X)
#undef X
};

const retrofit_ops *retrofit_device(retrofit_place place, bool fp32, char text[256]) {
    retrofit_cpu.start(text);
    if (place == RETROFIT_ON_CPU) return &retrofit_cpu;
#ifdef RETROFIT_CUDA
    char why[256];
    const retrofit_ops *cuda = fp32 ? &retrofit_cuda_fp32 : &retrofit_cuda;
    if (cuda->start(text)) return cuda;
    if (place == RETROFIT_ON_CUDA) return fail_null("no GPU: %s", text);
    snprintf(why, sizeof why, "%s", text);
    snprintf(text, 256, "the CPU (no GPU: %.200s)", why);
#else
    (void)fp32;
    if (place == RETROFIT_ON_CUDA)
        return fail_null("no GPU: this program was built without it: make, with the CUDA toolkit's "
                         "nvcc on PATH");
#endif
    return &retrofit_cpu;
}

#endif // RETROFIT_IMPLEMENTATION

// =================================================================================================
//                                  The method ends here.
// =================================================================================================

#ifndef RETROFIT_DECODING_H
#define RETROFIT_DECODING_H
#ifdef __cplusplus
extern "C" {
#endif
// =================================================================================================
// PART II  THINKING LONGER
// 7  Decoding: KV cache, exits, sampling, drafts
// =================================================================================================

// A KV cache, and where recurrence i = 0, 1, … of a core layer keeps its keys and values: in slot i
// (full), i mod M (shared: the newest recurrence wins) or i div M (grouped).
typedef enum {
    RETROFIT_CACHE_FULL,
    RETROFIT_CACHE_SHARED,
    RETROFIT_CACHE_GROUPED
} retrofit_cache_kind;
struct retrofit_kv_cache {
    size_t capacity, recurrences; // positions; the largest r
    retrofit_cache_kind kind;
    size_t M;
    bool bf16;                    // keys and values in bf16 where activations are fp32; on a CPU
};
size_t retrofit_cache_bytes(const retrofit_buffers *buffers); // of keys and values, per token

// When a token's recurrences stop early: section 7 has each criterion's formula and the authors'
// threshold. Prompts never stop early.
typedef enum {
    RETROFIT_EXIT_NONE,
    RETROFIT_EXIT_ENTROPY_DIFF,
    RETROFIT_EXIT_LATENT_DIFF, // the only one that needs no coda and head in every recurrence
    RETROFIT_EXIT_KL,
    RETROFIT_EXIT_MINP_KL,
    RETROFIT_EXIT_ARGMAX_STABILITY
} retrofit_exit;
// How strong test-time noise is in recurrence i.
typedef enum {
    RETROFIT_NOISE_FIXED,
    RETROFIT_NOISE_GEOM,
    RETROFIT_NOISE_SQRT,
    RETROFIT_NOISE_LINE,
    RETROFIT_NOISE_CHI
} retrofit_noise;
typedef struct {
    size_t recurrences;  // r; with an exit the most that a token takes
    float sigma;         // of s_0 and
    uint64_t seed;       // its seed, as in retrofit_init_state
    retrofit_exit exit;
    float threshold;     // of the exit; below 0: the authors'
    bool continuous;     // a token fed alone starts from the last state of the one before it
    float noise;         // 0: none
    retrofit_noise noise_kind;
} retrofit_recurrence_options;

#define RETROFIT_LOOKAHEAD 16 // tokens that can be drafted at a time

// The KV cache and what decoding notes.
struct retrofit_decoder {
    retrofit_kv_cache cache;
    retrofit_type kv_type;
    size_t slots;        // prelude layers, core layers times the slots of one, coda layers
    act *keys, *values;  // (slots,B,capacity,G·h) of kv_type
    int32_t *reached;    // (B)     slots that hold entries of the row's newest token
    float *carried;      // (B,d)   states of rows that stopped; with `continuous`, to start from
    size_t carries;      // rows of it
    float *drafted;      // (2,RETROFIT_LOOKAHEAD,d) states and A_e·e of drafted tokens

    // On the host:
    int32_t *seen;       // (B)     tokens that each row has in the cache: `past`
    int32_t *used;       // (B)     recurrences that each row's last token took
    float *next;         // (B,V)   the logits that retrofit_next_logits returns
    double *measure;     // (B,V)   what an exit's criterion noted in the recurrence before
    float *latent;       // (2,B,d) states before and now

    void *step;          // one decoding step as the device recorded it, for
    size_t step_b;       // so many rows and
    retrofit_recurrence_options step_options;
    size_t steps;        // such steps so far
};

// n recurrences without gradient, with noise if the options ask for it.
void retrofit_recur_noisy(retrofit_buffers *buffers, const retrofit_recurrence_options *options,
                          size_t n);

// Feeds t new tokens per row (tokens (b,t), of which the first lengths[i] count; NULL: all) through
// the recurrences and the KV cache; returns the logits (b,V) behind each row's last token, on the host,
// valid until the next call. decoder->used[i] then is the recurrences it took. NULL or error.
const float *retrofit_next_logits(retrofit_buffers *buffers, const int32_t *tokens, size_t b, size_t t,
                                  const int32_t *lengths,
                                  const retrofit_recurrence_options *options);
void retrofit_clear_cache(retrofit_buffers *buffers);

typedef struct {
    float temperature;  // 0: greedy
    size_t top_k;       // 0: all
    float top_p, min_p; // 1, 0: all
    uint64_t seed;      // advances with every draw
} retrofit_sampling;
// Draws a token; filters in the order temperature, top-k, top-p, min-p. scratch: V pairs of 8 bytes.
int32_t retrofit_sample(const float *logits, size_t V, retrofit_sampling *sampling, void *scratch);
int32_t retrofit_argmax(const float *logits, size_t V); // the first of equals

// Self-speculative decoding: `token` and L - 1 tokens drafted behind it go through `draft` recurrences
// one by one, then through the other r - draft together. Returns how many tokens follow `token`
// (1 … L; out has room for L), distributed exactly as those of plain decoding; greedy ones are the same
// tokens. The last one is not fed yet. One row; no exit, noise or `continuous`. Only ids below n are
// drawn: V, or fewer if the others are padding. scratch: (2L + 2)·V floats, of which the first L·V are
// then the logits (L,V) that the tokens were judged by. 0 or error.
size_t retrofit_speculate(retrofit_buffers *buffers, int32_t token, size_t draft, size_t L,
                          const retrofit_recurrence_options *options, retrofit_sampling *sampling,
                          size_t n, int32_t *out, float *scratch);
// ‖now - before‖ / ‖now‖ of one state (d).
double retrofit_relative_change(const float *now, const float *before, size_t d);
#ifdef __cplusplus
}
#endif
#endif // RETROFIT_DECODING_H

#ifdef RETROFIT_IMPLEMENTATION

// Slots of a core layer after so many recurrences.
static size_t slots_of(const retrofit_kv_cache *cache, size_t recurrences) {
    switch (cache->kind) {
    case RETROFIT_CACHE_SHARED: return retrofit_min(cache->M, recurrences);
    case RETROFIT_CACHE_GROUPED: return (recurrences + cache->M - 1) / cache->M;
    default: return recurrences;
    }
}

// The slot of recurrence i = 0, 1, … in a core layer.
static size_t kv_slot(const retrofit_kv_cache *cache, size_t i) {
    switch (cache->kind) {
    case RETROFIT_CACHE_SHARED: return i % cache->M;
    case RETROFIT_CACHE_GROUPED: return i / cache->M;
    default: return i;
    }
}

static size_t core_slot(const retrofit_buffers *buffers, size_t i) {
    const retrofit_config *c = &buffers->model->config;
    if (!buffers->decoder) return 0;
    return c->prelude + kv_slot(&buffers->decoder->cache, i) * c->core;
}

static size_t coda_slot(const retrofit_buffers *buffers) {
    return buffers->decoder ? buffers->decoder->slots - buffers->model->config.coda : 0;
}

// The decoder with its number of slots; its memory comes with the buffers'. false or error.
static bool decoder_new(retrofit_buffers *buffers, const retrofit_kv_cache *cache) {
    const retrofit_model *model = buffers->model;
    const retrofit_config *c = &model->config;
    retrofit_decoder *decoder = (retrofit_decoder *)retrofit_allocate(1, sizeof *decoder);
    if (!decoder) return false;
    decoder->cache = *cache;
    decoder->kv_type = cache->bf16 ? RETROFIT_BF16 : model->ops->act_type;
    decoder->slots = c->prelude + slots_of(cache, cache->recurrences) * c->core + c->coda;
    buffers->decoder = decoder;
    return true;
}

size_t retrofit_cache_bytes(const retrofit_buffers *buffers) {
    const retrofit_config *c = &buffers->model->config;
    const retrofit_decoder *decoder = buffers->decoder;
    size_t entry = c->n_kv_heads * c->head_dim * retrofit_type_size(decoder->kv_type);
    return 2 * decoder->slots * entry;
}

static void attend_to_cache(retrofit_buffers *buffers, retrofit_block *block, size_t slot) {
    const retrofit_config *c = &buffers->model->config;
    const retrofit_ops *ops = buffers->model->ops;
    const retrofit_decoder *decoder = buffers->decoder;
    size_t H = c->n_heads, G = c->n_kv_heads, h = c->head_dim;
    size_t capacity = decoder->cache.capacity;
    size_t entry = G * h * retrofit_type_size(decoder->kv_type);
    size_t at = slot * buffers->B * capacity * entry;
    act *keys = (char *)decoder->keys + at, *values = (char *)decoder->values + at;
    ops->kv_store(keys, values, block->qkv, buffers->past, buffers->b, buffers->t, capacity, H, G, h,
                  decoder->kv_type);
    ops->attention_cached(block->attention, block->qkv, keys, values, buffers->past, buffers->b,
                          buffers->t, capacity, H, G, h, decoder->kv_type);
}

// Normal numbers for every state. In decoding a row's are what they would be if it were alone: a text does not depend on its batch.
static void draw_states(retrofit_buffers *a, float *states, float sigma, uint64_t seed) {
    const retrofit_ops *ops = a->model->ops;
    size_t d = a->model->config.n_embd;
    if (!a->decoder) ops->state_init(states, NULL, a->b, a->t, d, sigma, seed);
    else
        for (size_t i = 0; i < a->b; i++) ops->state_init(states + i * a->t * d, a->past + i, 1, a->t, d, sigma, seed);
}

// ---- KV cache: what a new token needs of the old ones

// Keys and values of T new tokens a row, to positions past[b] … past[b] + T - 1.
static void kv_store(act *keys, act *values, const act *qkv, const int32_t *past, size_t B, size_t T,
                     size_t capacity, size_t H, size_t G, size_t h, retrofit_type type) {
    size_t width = G * h, Q = (H + 2 * G) * h;
    for (size_t n = 0; n < B * T; n++) {
        const float *k = (const float *)qkv + n * Q + H * h, *v = k + width;
        size_t b = n / T, position = (size_t)past[b] + n % T;
        size_t first = (b * capacity + position) * width;
        if (type == RETROFIT_F32) {
            memcpy((float *)keys + first, k, width * sizeof *k);
            memcpy((float *)values + first, v, width * sizeof *v);
            continue;
        }
        uint16_t *keys_bf16 = (uint16_t *)keys + first, *values_bf16 = (uint16_t *)values + first;
        for (size_t c = 0; c < width; c++) {
            keys_bf16[c] = retrofit_float_to_bf16(k[c]);
            values_bf16[c] = retrofit_float_to_bf16(v[c]);
        }
    }
}

// attention_forward for T new queries a row, over the past[b] positions before them and their own.
static void attention_cached(act *out, const act *qkv, const act *keys, const act *values,
                             const int32_t *past, size_t B, size_t T, size_t capacity, size_t H,
                             size_t G, size_t h, retrofit_type type) {
    size_t Q = (H + 2 * G) * h, tiles = (T + TILE - 1) / TILE, size = retrofit_type_size(type);
    PARALLEL_TASKS
    for (size_t task = 0; task < B * H * tiles; task++) {
        size_t b = task / tiles / H, head = task / tiles % H, t = task % tiles * TILE;
        size_t n = b * T + t, group = head / (H / G);
        size_t first = (b * capacity * G + group) * h * size;
        matrix_view q = view((const float *)qkv + n * Q + head * h, Q);
        matrix_view k = {(const char *)keys + first, type, G * h, 1};
        matrix_view v = {(const char *)values + first, type, G * h, 1};
        attend((float *)out + (n * H + head) * h, H * h, NULL, 0, q, k, v,
               retrofit_min(T - t, TILE), (size_t)past[b] + t, h);
    }
}

// Row b's newest token, at position past[b], has entries in the core's first used[b] slots. The others
// of the S slots get what the last of those has, for each of the C layers. Layers lie `stride` elements
// apart, and slot i's layer j is layer i·C + j.
static void kv_backfill(act *keys, act *values, const int32_t *past, const int32_t *used, size_t S,
                        size_t C, size_t stride, size_t B, size_t capacity, size_t G, size_t h,
                        retrofit_type type) {
    size_t bytes = G * h * retrofit_type_size(type), layer = stride * retrofit_type_size(type);
    for (size_t b = 0; b < B; b++) {
        size_t in_layer = (b * capacity + (size_t)past[b]) * bytes;
        size_t first = (size_t)used[b] * C; // the first layer without an entry
        for (size_t i = first; i < S * C; i++) {
            size_t from = (first - C + i % C) * layer + in_layer, to = i * layer + in_layer;
            memcpy((char *)keys + to, (char *)keys + from, bytes);
            memcpy((char *)values + to, (char *)values + from, bytes);
        }
    }
}

// z goes where the coda's stream will be: it is not there yet.
static void add_noise(retrofit_buffers *a, const retrofit_recurrence_options *how) {
    const retrofit_model *m = a->model;
    uint64_t key = retrofit_hash(how->seed, ~(uint64_t)a->n);
    float i = (float)(a->n + 1), y = how->noise * m->config.state_std, x = y;
    if (how->noise_kind == RETROFIT_NOISE_GEOM) x = y / i;
    if (how->noise_kind == RETROFIT_NOISE_SQRT) x = y / sqrtf(i);
    if (how->noise_kind == RETROFIT_NOISE_LINE) x = fmaxf(y, 1 - (i - 1) / (float)how->recurrences);
    if (how->noise_kind == RETROFIT_NOISE_CHI) x = 2 * y * (float)retrofit_hash_uniform(key, (uint64_t)a->decoder->seen[0]);
    draw_states(a, a->x, x, key);
    m->ops->add(a->state, a->x, a->N * m->config.n_embd, 1 - x);
}

void retrofit_recur_noisy(retrofit_buffers *a, const retrofit_recurrence_options *how, size_t n) {
    bool noisy = how->noise > 0 && !a->keep && a->model->config.core;
    for (; noisy && n; n--) add_noise(a, how), retrofit_recur(a, 1, 0);
    retrofit_recur(a, n, 0);
}

static void begin_recurrence(retrofit_buffers *a, const retrofit_recurrence_options *how) {
    const retrofit_config *c = &a->model->config;
    prelude_forward(a);
    if (!c->core) return;
    if (how->continuous && a->t == 1 && a->b <= a->decoder->carries) a->model->ops->copy(a->state, a->decoder->carried, a->b * c->n_embd * sizeof *a->state);
    else retrofit_init_state(a, how->sigma, how->seed);
}

// Logits of the next token after each of b rows of one token.
static void read_next(retrofit_buffers *a) {
    const retrofit_model *m = a->model;
    retrofit_coda(a);
    m->ops->matmul_residual_forward(a->wide_logits, NULL, a->final, m->lm_head.weight, a->b, m->config.n_embd, m->config.vocab);
}

// One token for each of b rows. A step is hundreds of short operations that differ from those of the step before only in what lies in
// memory: a device that can record them does so (the second time: the first may still have to prepare itself) and then repeats them.
static void decode_step(retrofit_buffers *a, const retrofit_recurrence_options *how) {
    const retrofit_ops *ops = a->model->ops;
    const retrofit_recurrence_options *was = &a->decoder->step_options;
    bool carried = how->continuous && a->b <= a->decoder->carries;
    if (a->b != a->decoder->step_b || how->recurrences != was->recurrences || how->sigma != was->sigma || how->seed != was->seed ||
        carried != was->continuous || how->noise != was->noise || how->noise_kind != was->noise_kind) {
        if (a->decoder->step) ops->record_free(a->decoder->step);
        a->decoder->step = NULL, a->decoder->steps = 0, a->decoder->step_b = a->b, a->decoder->step_options = *how, a->decoder->step_options.continuous = carried;
    }
    bool record = ops->record_begin && a->decoder->steps++ == 1 && !(how->noise > 0);
    if (record) ops->record_begin();
    if (!a->decoder->step) begin_recurrence(a, how), retrofit_recur_noisy(a, how, how->recurrences), read_next(a);
    if (record) a->decoder->step = ops->record_end();
    if (a->decoder->step) ops->replay(a->decoder->step), a->n = a->model->config.core ? how->recurrences : 0;
}

static double exit_limit(const retrofit_recurrence_options *how) {
    static const double usual[] = {0, 1e-3, 0.03, 5e-4, 1e-6, 5}; // by retrofit_exit
    return how->threshold < 0 ? usual[how->exit] : (double)how->threshold;
}

// ‖now - before‖ / ‖now‖ of one state. (inline: not every program looks at states.)
double retrofit_relative_change(const float *now, const float *before, size_t d) {
    double change = 0, size = 0;
    for (size_t c = 0; c < d; c++) size += (double)now[c] * now[c], change += ((double)now[c] - before[c]) * ((double)now[c] - before[c]);
    return sqrt(change / size);
}

// Whether a row may stop after recurrence i = 1, 2, …, by its logits z; `was` is what the criterion noted the recurrence before.
static bool should_exit(const retrofit_recurrence_options *how, size_t i, const float *z, size_t V, double *was) {
    double limit = exit_limit(how), sum = 0, entropy = 0, kl = 0;
    if (how->exit == RETROFIT_EXIT_ARGMAX_STABILITY) {
        double likeliest = retrofit_argmax(z, V);
        was[1] = i > 1 && was[0] == likeliest ? was[1] + 1 : 0, was[0] = likeliest;
        return was[1] >= limit;
    }
    float top = max_element(z, V);
    for (size_t v = 0; v < V; v++) sum += (double)fast_exp(z[v] - top);
    double log_sum = log(sum);
    if (how->exit == RETROFIT_EXIT_ENTROPY_DIFF) {
        for (size_t v = 0; v < V; v++) entropy -= (double)fast_exp(z[v] - top) / sum * ((double)(z[v] - top) - log_sum);
        double before = i > 1 ? was[0] : 100; // nats: more than there are
        return was[0] = entropy, fabs(entropy - before) < limit;
    }
    bool cut = how->exit == RETROFIT_EXIT_MINP_KL; // what is below a tenth of the largest becomes 1/V, then the sum 1 again
    float tenth = cut ? logf(0.1f) : -INFINITY;
    double low = -log((double)V), total = 0, log_total = 0;
    for (size_t v = 0; cut && v < V; v++) total += z[v] - top < tenth ? 1 / (double)V : (double)fast_exp(z[v] - top) / sum;
    if (cut) log_total = log(total);
    for (size_t v = 0; v < V; v++) {
        double before = i > 1 ? was[v] : low, now = (z[v] - top < tenth ? low : (double)(z[v] - top) - log_sum) - log_total;
        kl += (double)fast_exp((float)before) * (before - now), was[v] = now;
    }
    return kl < limit;
}

// The same token by token as long as it takes, at most r recurrences. Rows that have stopped go through the motions until all have; their
// states are put aside, and nobody reads what their deeper recurrences leave in the cache: it is overwritten by what they lend.
static void recur_until_exit(retrofit_buffers *a, const retrofit_recurrence_options *how) {
    const retrofit_model *m = a->model;
    const retrofit_ops *ops = m->ops;
    size_t b = a->b, d = m->config.n_embd, V = m->config.vocab, i = 0, stopped = 0, G = m->config.n_kv_heads, h = m->config.head_dim;
    bool by_latent = how->exit == RETROFIT_EXIT_LATENT_DIFF, read = false;
    begin_recurrence(a, how);
    memset(a->decoder->used, 0, b * sizeof *a->decoder->used);
    if (by_latent) ops->download(a->decoder->latent, a->state, b * d * sizeof(float));
    while (stopped < b && i < how->recurrences) {
        retrofit_recur_noisy(a, how, 1), i++;
        const float *before = a->decoder->latent + (i - 1) % 2 * b * d, *now = a->decoder->latent + i % 2 * b * d;
        if (by_latent) ops->download((float *)now, a->state, b * d * sizeof(float));
        else read_next(a), ops->download(a->decoder->next, a->wide_logits, b * V * sizeof(float));
        read = !by_latent;
        for (size_t row = 0; row < b; row++) {
            if (a->decoder->used[row]) continue;
            bool rests = by_latent ? retrofit_relative_change(now + row * d, before + row * d, d) < exit_limit(how)
                                   : should_exit(how, i, a->decoder->next + row * V, V, a->decoder->measure + row * V);
            if (i < how->recurrences && !rests) continue;
            a->decoder->used[row] = (int32_t)i, stopped++;
            ops->copy(a->decoder->carried + row * d, a->state + row * d, d * sizeof(float));
        }
    }
    for (size_t row = 0; row < b; row++) read = read && (size_t)a->decoder->used[row] == i;
    ops->copy(a->state, a->decoder->carried, b * d * sizeof(float));
    if (!read) read_next(a);
    int32_t *reached = (int32_t *)a->decoder->latent; // on the host; the states in there have served
    for (size_t row = 0; row < b; row++) reached[row] = (int32_t)slots_of(&a->decoder->cache, (size_t)a->decoder->used[row]);
    ops->upload(a->decoder->reached, reached, b * sizeof *reached);
    size_t first = m->config.prelude * a->B * a->decoder->cache.capacity * G * h * retrofit_type_size(a->decoder->kv_type);
    ops->kv_backfill((char *)a->decoder->keys + first, (char *)a->decoder->values + first, a->past, a->decoder->reached, slots_of(&a->decoder->cache, a->decoder->cache.recurrences),
                 m->config.core, a->B * a->decoder->cache.capacity * G * h, b, a->decoder->cache.capacity, G, h, a->decoder->kv_type);
}

// Prelude layer i has its keys and values in slot i, core layer j of recurrence i in slot P + i·C + j (or that which the cache's kind says),
// the coda in the last D. A row shorter than t is padded on the right: what the padding leaves in the cache lies behind the row's end, where no
// query looks before the next tokens have overwritten it.
const float *retrofit_next_logits(retrofit_buffers *a, const int32_t *tokens, size_t b, size_t t, const int32_t *lengths,
                           const retrofit_recurrence_options *how) {
    const retrofit_model *m = a->model;
    const retrofit_config *c = &m->config;
    size_t d = c->n_embd, V = c->vocab, r = how->recurrences;
    if (!a->decoder || a->keep) return retrofit_fail("these activations have no KV cache"), (const float *)NULL;
    if (c->core && (r == 0 || r > a->decoder->cache.recurrences))
        return retrofit_fail("%zu recurrences, but the KV cache has room for %zu", r, a->decoder->cache.recurrences), (const float *)NULL;
    if (how->exit && b > 1 && a->decoder->cache.kind != RETROFIT_CACHE_FULL) // of these slots a row that has stopped would lose what it wrote
        return retrofit_fail("rows that stop thinking at different times need the full KV cache, or one row at a time"), (const float *)NULL;
    bool prompt = false;
    for (size_t i = 0; i < b && i < a->B; i++) {
        prompt = prompt || a->decoder->seen[i] == 0;
        if (lengths && (lengths[i] < 1 || (size_t)lengths[i] > t)) return retrofit_fail("row %zu: %d tokens of %zu", i, (int)lengths[i], t), (const float *)NULL;
        if ((size_t)a->decoder->seen[i] + t > a->decoder->cache.capacity)
            return retrofit_fail("%zu tokens after %d do not fit in a context of %zu", t, (int)a->decoder->seen[i], a->decoder->cache.capacity), (const float *)NULL;
    }
    if (!set_batch(a, tokens, b, t)) return NULL;
    m->ops->upload(a->past, a->decoder->seen, a->B * sizeof *a->decoder->seen);
    for (size_t i = 0; i < b; i++) a->decoder->used[i] = c->core ? (int32_t)r : 0;
    if (t == 1 && c->core && how->exit && !prompt) recur_until_exit(a, how);
    else if (t == 1) decode_step(a, how);
    else begin_recurrence(a, how), retrofit_recur_noisy(a, how, r), retrofit_coda(a);
    for (size_t i = 0; i < b; i++) {
        size_t last = i * t + (lengths ? (size_t)lengths[i] : t) - 1;
        if (t > 1) m->ops->matmul_residual_forward(a->wide_logits + i * V, NULL, act_at(m->ops, a->final, last * d), m->lm_head.weight, 1, d, V);
        if (how->continuous && c->core) m->ops->copy(a->decoder->carried + i * d, a->state + last * d, d * sizeof(float)), a->decoder->carries = b;
        a->decoder->seen[i] += (int32_t)(last - i * t + 1);
    }
    m->ops->download(a->decoder->next, a->wide_logits, b * V * sizeof *a->decoder->next);
    return a->decoder->next;
}

void retrofit_clear_cache(retrofit_buffers *a) { memset(a->decoder->seen, 0, a->B * sizeof *a->decoder->seen), a->decoder->carries = 0; }

int32_t retrofit_argmax(const float *logits, size_t V) {
    size_t best = 0;
    for (size_t v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    return (int32_t)best;
}

typedef struct {
    float p;
    int32_t id;
} candidate;

static int by_probability(const void *x, const void *y) { // descending; equals by id, so that a seed decides alone
    const candidate *a = (const candidate *)x, *b = (const candidate *)y;
    return a->p > b->p ? -1 : a->p < b->p ? 1 : a->id < b->id ? -1 : 1;
}

// What the filters leave of the distribution, as weights that add up to *total; their number.
static size_t apply_filters(const float *logits, size_t V, const retrofit_sampling *s, candidate *c, double *total) {
    size_t n = V;
    float top = max_element(logits, V), min_p = fminf(s->min_p, 1); // the largest stays, whatever min_p is
    if (!(s->temperature > 0) || !isfinite(top)) return c->p = 1, c->id = retrofit_argmax(logits, V), *total = 1, (size_t)1;
    for (size_t v = 0; v < V; v++) c[v].p = fmaxf(0, expf((logits[v] - top) / s->temperature)), c[v].id = (int32_t)v; // fmaxf: NaN is 0
    if (min_p > 0 && !(s->top_p < 1)) { // relative to the largest, whose weight is 1: needs no sorting, and leaves less to sort
        n = 0;
        for (size_t v = 0; v < V; v++)
            if (c[v].p >= min_p) c[n++] = c[v];
    }
    if (s->top_k || s->top_p < 1) qsort(c, n, sizeof *c, by_probability);
    if (s->top_k && s->top_k < n) n = s->top_k;
    double kept = 0;
    *total = 0;
    for (size_t i = 0; i < n; i++) *total += c[i].p;
    if (s->top_p < 1) { // the fewest whose share reaches top_p
        size_t i = 0;
        while (i < n && kept < s->top_p * *total) kept += c[i++].p;
        for (n = i ? i : 1; n > 1 && c[n - 1].p < min_p;) n--;
        for (*total = 0, i = 0; i < n; i++) *total += c[i].p;
    }
    return n;
}

static double draw_uniform(retrofit_sampling *s) { return s->seed = retrofit_hash(s->seed, 0), retrofit_hash_uniform(s->seed, 1); }

static int32_t draw_from(const candidate *c, size_t n, double total, retrofit_sampling *s) { // one of n by weight
    double u = draw_uniform(s) * total;
    for (size_t i = 0; i < n; i++)
        if ((u -= c[i].p) < 0) return c[i].id;
    return c[n - 1].id;
}

// From what the filters leave, which is in c then; where they leave one, no random number is taken.
static int32_t draw_filtered(const float *logits, size_t V, retrofit_sampling *s, candidate *c, size_t *n, double *total) {
    *n = apply_filters(logits, V, s, c, total);
    return *n == 1 ? c->id : draw_from(c, *n, *total, s);
}

int32_t retrofit_sample(const float *logits, size_t V, retrofit_sampling *s, void *scratch) {
    double total;
    size_t n;
    return draw_filtered(logits, V, s, (candidate *)scratch, &n, &total);
}

// ---- Self-speculative decoding ------------------------------------------------------------------------------------------------
// The rule that keeps the distribution: a token y drafted from q stays with probability min(1, p(y)/q(y)), where p is what the whole depth says;
// if not, another is drawn from what p has more than q. q (V): probabilities; logits: the whole depth's. Returns y or the other one.
static int32_t accept_or_resample(int32_t y, const float *q, const float *logits, size_t V, retrofit_sampling *s, candidate *c) {
    double total, p = 0, rest = 0;
    size_t n = apply_filters(logits, V, s, c, &total), left = 0;
    for (size_t i = 0; i < n; i++) p = c[i].id == y ? c[i].p / total : p;
    if (n == 1) return c->id; // greedy, or nothing else is left: y stays if it is that
    if (draw_uniform(s) * q[y] < p) return y;
    for (size_t i = 0; i < n; i++) {
        candidate more = {(float)(c[i].p / total - q[c[i].id]), c[i].id};
        if (more.p > 0) rest += more.p, c[left++] = more;
    }
    return left ? draw_from(c, left, rest, s) : y; // none: p and q are equal but for rounding
}

size_t retrofit_speculate(retrofit_buffers *a, int32_t token, size_t draft, size_t L, const retrofit_recurrence_options *how,
                          retrofit_sampling *s, size_t n, int32_t *out, float *scratch) {
    const retrofit_model *m = a->model;
    const retrofit_ops *ops = m->ops;
    size_t d = m->config.n_embd, V = m->config.vocab, r = how->recurrences, count = 0;
    if (!m->config.core || draft == 0 || draft >= r)
        return retrofit_fail("a draft of %zu recurrences for %zu: from 1 to one less", draft, r), (size_t)0;
    if (L == 0 || L > RETROFIT_LOOKAHEAD || L > a->T)
        return retrofit_fail("%zu tokens cannot be drafted: from 1 to %zu", L, retrofit_min(RETROFIT_LOOKAHEAD, a->T)), (size_t)0;
    if (how->exit || how->continuous || how->noise > 0) return retrofit_fail("drafts go with no exit, continuous thinking or noise"), (size_t)0;
    if (a->decoder->cache.kind != RETROFIT_CACHE_FULL) return retrofit_fail("drafts need the full KV cache"), (size_t)0;
    float *logits = scratch, *q = scratch + L * V; // q: what the drafts were drawn from
    candidate *c = (candidate *)(void *)(q + L * V);
    int32_t fed[RETROFIT_LOOKAHEAD + 1] = {token}, start = a->decoder->seen[0];
    retrofit_recurrence_options shallow = *how;
    shallow.recurrences = draft;
    for (size_t j = 0; j < L; j++) {
        const float *z = retrofit_next_logits(a, &fed[j], 1, 1, NULL, &shallow);
        if (!z) return a->decoder->seen[0] = start, (size_t)0;
        ops->copy(a->decoder->drafted + j * d, a->state, d * sizeof(float));
        ops->copy(a->decoder->drafted + (RETROFIT_LOOKAHEAD + j) * d, a->injected, d * sizeof(float));
        double total;
        size_t left;
        fed[j + 1] = draw_filtered(z, n, s, c, &left, &total);
        memset(q + j * V, 0, n * sizeof *q);
        for (size_t i = 0; i < left; i++) q[j * V + (size_t)c[i].id] = (float)(c[i].p / total);
    }
    a->decoder->seen[0] = start;
    if (!set_batch(a, fed, 1, L)) return 0;
    ops->upload(a->past, a->decoder->seen, a->B * sizeof *a->decoder->seen);
    ops->copy(a->state, a->decoder->drafted, L * d * sizeof(float)),
        ops->copy(a->injected, a->decoder->drafted + RETROFIT_LOOKAHEAD * d, L * d * sizeof(float));
    a->n = draft;
    retrofit_recur(a, r - draft, 0), retrofit_coda(a), retrofit_logits(a, 0, L, logits);
    while (count < L) {
        out[count] = accept_or_resample(fed[count + 1], q + count * V, logits + count * V, n, s, c);
        count++;
        if (out[count - 1] != fed[count]) break;
    }
    return a->decoder->seen[0] = start + (int32_t)count, a->decoder->used[0] = (int32_t)r, count;
}

#endif // RETROFIT_IMPLEMENTATION

#ifndef RETROFIT_MACHINERY_H
#define RETROFIT_MACHINERY_H
#ifdef __cplusplus
extern "C" {
#endif
// =================================================================================================
// PART III  MACHINERY
// =================================================================================================

// ---- Small things that programs need too ----------------------------------------------------------

// directory/name into path. false or error if it is too long.
#define RETROFIT_PATH 4096
bool retrofit_path(char path[RETROFIT_PATH], const char *directory, const char *name);
FILE *retrofit_open_file(const char *path, size_t *size); // a regular file, to read. NULL or error
char *retrofit_read_file(const char *path, size_t *size); // with a NUL behind it. NULL or error
void *retrofit_map_file(const char *path, size_t *size);  // into memory. NULL or error
// Flushes and closes f; a file that could not be written whole is removed. false or error.
bool retrofit_finish_file(FILE *f, const char *path, bool ok);
// A directory and its parents, as mkdir -p makes them; `fresh`: it must not exist yet. path is written
// to, but left as it was. false or error.
bool retrofit_make_directories(char *path, bool fresh);
bool retrofit_sync_directory(const char *path); // false or error
void retrofit_parent_directory(char *path);     // cut to it, in place
double retrofit_seconds(void);                  // of a clock that only goes forward

float retrofit_bf16_to_float(uint16_t x);
uint16_t retrofit_float_to_bf16(float f);       // to nearest even; NaN stays NaN
float retrofit_f16_to_float(uint16_t x);
// n elements of a tensor in a file's type, at any address, as fp32.
void retrofit_to_float(float *out, const void *data, retrofit_type type, size_t n);

// ---- Text, JSON, tokenizer ------------------------------------------------------------------------

// Bytes that grow. Running out of memory sets `failed`, for callers to look at once at the end.
typedef struct {
    char *bytes;
    size_t size, room;
    bool failed;
} retrofit_text;
void retrofit_text_append(retrofit_text *text, const void *bytes, size_t n);
// Cuts off both ends what Python's str.strip would.
void retrofit_strip(const char **s, size_t *n);
// The length of the character at s[0 … n), n > 0, and the character. Where s is not UTF-8, *c is
// RETROFIT_UTF8_INVALID and the length that of what Unicode replaces by one U+FFFD.
#define RETROFIT_UTF8_INVALID UINT32_MAX
size_t retrofit_utf8_next(const char *s, size_t n, uint32_t *c);

enum { RETROFIT_JSON_NULL, RETROFIT_JSON_BOOL, RETROFIT_JSON_NUMBER, RETROFIT_JSON_STRING, RETROFIT_JSON_ARRAY, RETROFIT_JSON_OBJECT };
typedef int retrofit_json_type; // one of these
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
// Whether j is that string; whether it is a number that is a size, in *out. j may be NULL.
bool retrofit_json_is(const retrofit_json *j, const char *word);
bool retrofit_json_size(const retrofit_json *j, size_t *out);
// Writes n bytes of UTF-8 to f as a quoted, escaped JSON string; failures show in ferror(f).
void retrofit_json_write_string(FILE *f, const char *s, size_t n);
// Frees the whole tree of a root that retrofit_json_parse returned, or NULL.
void retrofit_json_free(retrofit_json *root);
// The first member of that name; NULL if there is none or object is not an object (NULL included). Cannot fail.
const retrofit_json *retrofit_json_get(const retrofit_json *object, const char *key);

// A Hugging Face tokenizer.json, reproduced id for id: byte-level BPE with the patterns of GPT-2, Llama 3 and Qwen 2, and SentencePiece's
// BPE as in Llama 2. Read-only once loaded: threads may share one.
typedef struct retrofit_tokenizer retrofit_tokenizer;

// Reads directory/tokenizer.json and, if there, tokenizer_config.json (bos_token, eos_token; add_bos_token and add_eos_token count only
// where tokenizer.json has no post_processor). Freed with retrofit_tokenizer_free. NULL with retrofit_error() for a step or option that is
// not supported: none that would change ids is skipped.
retrofit_tokenizer *retrofit_tokenizer_load(const char *directory);
void retrofit_tokenizer_free(retrofit_tokenizer *t); // or NULL
// Encodes size bytes of UTF-8; special tokens written out in text become their ids. with_special adds what the post-processor adds (BOS,
// mostly). Each stretch of invalid UTF-8 is read as U+FFFD, as Python's errors="replace" does before Hugging Face sees a text. Returns
// malloc'd ids and *count, or NULL with retrofit_error() if memory is out.
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

// Which of count ids generated text is to be decoded behind, in *id. SentencePiece's decoder takes a space off the front: not off this
// text, if there is text before it. Byte tokens would not do: what a run of them says is known only at its end. false: decode it alone.
bool retrofit_decode_context(const retrofit_tokenizer *t, const int32_t *ids, size_t count, int32_t *id);

// The ids of the beginning and end of text that tokenizer_config.json names; -1 if it names none.
int32_t retrofit_tokenizer_bos(const retrofit_tokenizer *t);
int32_t retrofit_tokenizer_eos(const retrofit_tokenizer *t);
int32_t retrofit_tokenizer_id(const retrofit_tokenizer *t, const char *token); // of a token spelt as in the file ("▁the"), or -1
size_t retrofit_tokenizer_size(const retrofit_tokenizer *t);                   // highest id + 1
uint64_t retrofit_tokenizer_hash(const retrofit_tokenizer *t); // of what decides ids, however the file is laid out; never 0

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

bool retrofit_config_check(const retrofit_config *config, const char *where); // false or error
// DIR/config.json: model_type huginn_raven or llama. type: of the tensors beside it. false or error.
bool retrofit_config_read(retrofit_config *config, const char *directory);
bool retrofit_config_write(const retrofit_config *config, retrofit_type type, const char *directory);

// DIR, or DIR/latest if DIR itself holds no config.json (a training run's output): written to path, returned.
const char *retrofit_model_directory(const char *directory, char path[RETROFIT_PATH]);
// config.json, model.safetensors and the tokenizer files found in tokenizer_from (may be NULL), into an existing directory.
bool retrofit_save(const retrofit_model *m, const char *directory, retrofit_type type, const char *tokenizer_from);
// optimizer.safetensors: the moments, with metadata (key, value, …, NULL). Loading checks every name and shape.
bool retrofit_save_optimizer(const retrofit_model *m, const char *directory, const char *const *metadata);
bool retrofit_load_optimizer(retrofit_model *m, retrofit_map *f, const char *directory); // leaves f open for its metadata

// Token shards (llm.c's .bin): 256 int32 of header {magic, version, tokens}, then uint16 or uint32 tokens. Ours also have the tokenizer's
// hash in the header, its low half in int32 3, its high half in 4; llm.c's have zeros there.
#define RETROFIT_SHARD_MAGIC_16 20240520 // version 1
#define RETROFIT_SHARD_MAGIC_32 20240801 // version 7
// Every file that matches the glob, in name order, cut into rows of T+1 tokens that do not overlap. vocab: ids are checked when
// read. shuffle: rows in a random order, another in each epoch. NULL + error.
retrofit_data *retrofit_data_open(const char *pattern, size_t T, size_t vocab, bool shuffle, uint64_t seed);
void retrofit_data_close(retrofit_data *d);
size_t retrofit_data_rows(const retrofit_data *d);
// false + error if a shard was made with another tokenizer than that of this hash; shards that do not say pass.
bool retrofit_data_check(const retrofit_data *d, uint64_t tokenizer);
// Row `index` (counted on over epochs): T tokens and the T that follow each. false + error if an id is not below vocab.
bool retrofit_data_row(retrofit_data *d, uint64_t index, int32_t *tokens, int32_t *labels);

// ---- Command lines: what the three programs share ----------------------------------------------------------------------------
enum { RETROFIT_FLAG, RETROFIT_STRING, RETROFIT_SIZE, RETROFIT_REAL, RETROFIT_CHOICE, RETROFIT_SWITCH, RETROFIT_HEADING };
typedef int retrofit_option_type; // one of these
typedef struct {
    const char *name;     // without the dashes; a HEADING's is a line of the help
    retrofit_option_type type;
    void *value;          // bool *, const char **, size_t *, double *, int * (the choice's index; a SWITCH's + 2, or 1 for the name alone)
    const char *argument; // what the help calls it; a CHOICE's or SWITCH's alternatives, "a|b|c"
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
#endif // RETROFIT_MACHINERY_H

#ifdef RETROFIT_IMPLEMENTATION

// =================================================================================================
// 8  Memory: the one list of parameters, arenas, who shares what
// =================================================================================================

bool retrofit_is_plain(const retrofit_config *c) { return c->core == 0; }

size_t retrofit_qkv_width(const retrofit_config *c) { return (c->n_heads + 2 * c->n_kv_heads) * c->head_dim; }

// One block of memory handed out in pieces. Laying something out twice, first with base NULL, measures it before it is allocated.
typedef struct {
    char *base;
    size_t used; // SIZE_MAX once a size has overflowed
} arena;

static void *arena_alloc(arena *a, size_t count, size_t size) {
    size_t at = a->used, bytes;
    if (__builtin_mul_overflow(count, size, &bytes) || bytes > SIZE_MAX / 2 || at > SIZE_MAX / 2) return a->used = SIZE_MAX, (void *)NULL;
    a->used = at + (bytes + 63) / 64 * 64;
    return a->base ? a->base + at : NULL;
}

// ---- The one list of parameters -------------------------------------------------------------------------------------------
static void piece(retrofit_parameter *p, size_t rows, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(p->source[p->sources].name, sizeof p->source->name, format, args);
    va_end(args);
    p->source[p->sources++].rows = rows;
    p->rows += rows;
}

static void list(retrofit_model *m, retrofit_parameter *p, size_t cols, retrofit_kind kind, retrofit_part part) {
    p->cols = cols, p->kind = kind, p->part = part;
    p->weight.stride = cols, p->weight.type = RETROFIT_F32;
    m->parameters[m->parameter_count++] = p;
    m->weight_count += p->rows * cols;
}

// A layer's parameters, by the authors' names and by a plain Llama's, where q, k, v and gate, up are tensors of their own.
static const struct {
    size_t field;
    retrofit_kind kind;
    const char *name, *plain[3];
} layer_list[] = {{offsetof(retrofit_layer, norm_1), RETROFIT_NORM, "norm_1", {"input_layernorm", NULL, NULL}},
                  {offsetof(retrofit_layer, w_qkv), RETROFIT_MATRIX, "attn.Wqkv", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}},
                  {offsetof(retrofit_layer, w_out), RETROFIT_MATRIX, "attn.proj", {"self_attn.o_proj", NULL, NULL}},
                  {offsetof(retrofit_layer, norm_2), RETROFIT_NORM, "norm_2", {"post_attention_layernorm", NULL, NULL}},
                  {offsetof(retrofit_layer, w_gate_up), RETROFIT_MATRIX, "mlp.fc", {"mlp.gate_proj", "mlp.up_proj", NULL}},
                  {offsetof(retrofit_layer, w_down), RETROFIT_MATRIX, "mlp.proj", {"mlp.down_proj", NULL, NULL}}};

static void list_layer(retrofit_model *m, retrofit_layer *w, const char *group, size_t i, retrofit_part part) {
    size_t d = m->config.n_embd, F = m->config.intermediate, kv = m->config.n_kv_heads * m->config.head_dim;
    size_t rows[6][3] = {{1, 0, 0}, {d, kv, kv}, {d, 0, 0}, {1, 0, 0}, {F, F, 0}, {d, 0, 0}}, cols[6] = {d, d, d, d, d, F};
    for (size_t j = 0; j < 6; j++) {
        retrofit_parameter *p = (retrofit_parameter *)(void *)((char *)w + layer_list[j].field);
        if (!retrofit_is_plain(&m->config)) piece(p, rows[j][0] + rows[j][1] + rows[j][2], "transformer.%s.%zu.%s.weight", group, i, layer_list[j].name);
        else
            for (size_t k = 0; k < 3 && layer_list[j].plain[k]; k++) piece(p, rows[j][k], "model.layers.%zu.%s.weight", i, layer_list[j].plain[k]);
        list(m, p, cols[j], layer_list[j].kind, part);
    }
}

retrofit_model *retrofit_model_new(const retrofit_config *config, const retrofit_ops *ops) {
    if (!retrofit_config_check(config, "model")) return NULL;
    if (config->head_dim > ops->max_head_dim)
        return retrofit_fail("heads of %zu are more than the %zu that %s takes: use the CPU", config->head_dim, ops->max_head_dim, ops->name), (retrofit_model *)NULL;
    retrofit_model *m = (retrofit_model *)retrofit_allocate(1, sizeof *m);
    if (!m) return NULL;
    m->config = *config, m->ops = ops;
    size_t P = config->prelude, C = config->core, D = config->coda, d = config->n_embd, V = config->vocab;
    bool plain = retrofit_is_plain(config);
    m->prelude = (retrofit_layer *)retrofit_allocate(P, sizeof *m->prelude);
    m->core = (retrofit_layer *)retrofit_allocate(C, sizeof *m->core);
    m->coda = (retrofit_layer *)retrofit_allocate(D, sizeof *m->coda);
    m->parameters = (retrofit_parameter **)retrofit_allocate(6 * (P + C + D) + 4, sizeof *m->parameters);
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

// Marks what a mode does not train.
static void freeze(retrofit_model *m, retrofit_mode mode) {
    for (size_t i = 0; i < m->parameter_count; i++) {
        retrofit_parameter *p = m->parameters[i];
        p->frozen = (mode == RETROFIT_TRAINING_CORE || mode == RETROFIT_TRAINING_ADAPTER) && p->part != RETROFIT_PART_ADAPTER &&
                    (mode == RETROFIT_TRAINING_ADAPTER || p->part != RETROFIT_PART_CORE);
    }
}

// One fp32 copy of every parameter in one arena: its size, and where each copy lies (`member`: master or grad; a frozen one has no grad).
static float **copy_slot(retrofit_parameter *p, size_t member) { return (float **)(void *)((char *)p + member); }

static void lay_out_copies(retrofit_model *m, arena *a, size_t member) {
    for (size_t i = 0; i < m->parameter_count; i++) {
        retrofit_parameter *p = m->parameters[i];
        bool none = p->frozen && member == offsetof(retrofit_parameter, grad);
        *copy_slot(p, member) = none ? NULL : (float *)arena_alloc(a, p->rows * p->cols, sizeof(float));
    }
}

static void *allocate_copies(retrofit_model *m, size_t member, size_t *bytes) {
    arena a = {NULL, 0};
    lay_out_copies(m, &a, member);
    if (bytes) *bytes = a.used;
    if (!(a.base = (char *)m->ops->alloc(a.used))) return NULL;
    a.used = 0, lay_out_copies(m, &a, member);
    return a.base;
}

// The type the operations read a parameter in: norms and the embedding stay fp32, matrices take the table's type.
static retrofit_type compute_type(const retrofit_model *m, const retrofit_parameter *p) {
    return p->kind == RETROFIT_NORM || p->kind == RETROFIT_EMBEDDING ? RETROFIT_F32 : m->ops->act_type;
}

// What the operations read: the master itself, or its copy in the table's type.
static void lay_out_weights(retrofit_model *m, arena *a) {
    for (size_t i = 0; i < m->parameter_count; i++) {
        retrofit_parameter *p = m->parameters[i];
        p->weight.type = compute_type(m, p), p->weight.data = p->master;
        if (p->weight.type != RETROFIT_F32) p->weight.data = arena_alloc(a, p->rows * p->cols, retrofit_type_size(p->weight.type));
    }
}

bool retrofit_model_allocate(retrofit_model *m, retrofit_mode mode) {
    freeze(m, mode);
    if (!(m->masters = allocate_copies(m, offsetof(retrofit_parameter, master), NULL))) return false;
    if (mode != RETROFIT_INFERENCE && !(m->grads = allocate_copies(m, offsetof(retrofit_parameter, grad), &m->grad_bytes))) return false;
    arena a = {NULL, 0};
    lay_out_weights(m, &a);
    if (a.used && !(m->weights = m->ops->alloc(a.used))) return false;
    a.base = (char *)m->weights, a.used = 0, lay_out_weights(m, &a);
    return true;
}

void retrofit_refresh_weights(retrofit_model *m) {
    for (size_t i = 0; i < m->parameter_count; i++) {
        retrofit_parameter *p = m->parameters[i];
        if (p->weight.type != RETROFIT_F32) m->ops->cast((act *)p->weight.data, p->master, p->rows * p->cols);
    }
}

static void lay_out_moments(retrofit_model *m, arena *a, retrofit_optimizer_kind kind) {
    size_t size = retrofit_type_size(m->ops->act_type), largest = 0, side = 0;
    for (size_t i = 0; i < m->parameter_count; i++) {
        retrofit_parameter *p = m->parameters[i];
        size_t n = p->rows * p->cols, shorter = p->rows < p->cols ? p->rows : p->cols;
        if (p->frozen) continue;
        p->m = (float *)arena_alloc(a, n, 4);
        p->v = by_muon(p, kind) ? NULL : (float *)arena_alloc(a, n, 4);
        if (by_muon(p, kind) && n > largest) largest = n;
        if (by_muon(p, kind) && shorter > side) side = shorter;
    }
    m->sums = (double *)arena_alloc(a, 2, sizeof(double));
    m->muon_u = (float *)arena_alloc(a, largest, 4);
    m->muon_x = arena_alloc(a, largest, size), m->muon_y = arena_alloc(a, largest, size);
    m->muon_a = arena_alloc(a, side * side, size), m->muon_b = arena_alloc(a, side * side, size);
}

bool retrofit_optimizer_init(retrofit_model *m, retrofit_optimizer_kind kind) {
    arena a = {NULL, 0};
    lay_out_moments(m, &a, kind);
    m->moment_bytes = a.used;
    if (!(m->moments = m->ops->alloc(a.used))) return false;
    a.base = (char *)m->moments, a.used = 0, lay_out_moments(m, &a, kind);
    return true;
}

void retrofit_training_bytes(retrofit_model *m, retrofit_mode mode, retrofit_optimizer_kind kind, size_t *weights, size_t *gradients,
                             size_t *moments) {
    arena a = {NULL, 0}, g = {NULL, 0}, o = {NULL, 0};
    freeze(m, mode);
    lay_out_copies(m, &a, offsetof(retrofit_parameter, master)), lay_out_weights(m, &a);
    lay_out_copies(m, &g, offsetof(retrofit_parameter, grad)), lay_out_moments(m, &o, kind);
    *weights = a.used, *gradients = g.used, *moments = o.used;
}

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

// ---- Buffers: one arena for each retrofit_buffers --------------------------------------------------
// What is never needed at the same time shares memory:
//
//     buffers            shares with         because
//     final              norm                the head reads it before the next block computes a norm
//     dinjected          injected            the forward pass is over when its gradient begins
//     dfinal             dinner              the head's gradient is used up before the coda's blocks
//     dattention         scratch.attention   with RETROFIT_KEEP_ALL no block uses the scratch; with
//     dqkv               scratch.qkv         KEEP_INPUTS blocks are computed again in it, so these
//     dgate_up           scratch.gate_up     three have memory of their own
//     block.mid, .out    x, or state         with KEEP_NOTHING: blocks run in place on their input
//     all of a block     scratch             with KEEP_INPUTS, but for its out

// Rows of logits exist in chunks of about this many bytes, in whole tiles of a matrix product.
enum { LOGITS_BYTES = 1 << 26, LOGITS_TILE = 128 };

static void lay_out_block(retrofit_block *block, arena *a, const retrofit_config *c, size_t N,
                          size_t size) {
    block->rstd_1 = (float *)arena_alloc(a, N, sizeof(float));
    block->rstd_2 = (float *)arena_alloc(a, N, sizeof(float));
    block->qkv = arena_alloc(a, N * retrofit_qkv_width(c), size);
    block->attention = arena_alloc(a, N * c->n_embd, size);
    block->lse = (float *)arena_alloc(a, N * c->n_heads, sizeof(float));
    block->gate_up = arena_alloc(a, N * 2 * c->intermediate, size);
}

static void lay_out_saved_blocks(retrofit_buffers *buffers, retrofit_block *blocks, size_t count,
                                 arena *a, const retrofit_config *c, size_t size) {
    size_t N = buffers->B * buffers->T;
    for (size_t i = 0; i < count; i++) {
        if (buffers->keep == RETROFIT_KEEP_INPUTS) blocks[i] = buffers->scratch;
        else {
            lay_out_block(&blocks[i], a, c, N, size);
            blocks[i].mid = (float *)arena_alloc(a, N * c->n_embd, sizeof(float));
        }
        blocks[i].out = (float *)arena_alloc(a, N * c->n_embd, sizeof(float));
    }
}

static void lay_out_saved(retrofit_buffers *buffers, arena *a, const retrofit_config *c,
                          size_t size) {
    size_t N = buffers->B * buffers->T, K = buffers->K;
    retrofit_saved *saved = &buffers->saved;
    lay_out_saved_blocks(buffers, saved->prelude, c->prelude, a, c, size);
    lay_out_saved_blocks(buffers, saved->core, K * c->core, a, c, size);
    lay_out_saved_blocks(buffers, saved->coda, c->coda, a, c, size);
    for (size_t i = 0; i < K; i++)
        saved->adapted[i] = (float *)arena_alloc(a, N * c->n_embd, sizeof(float));
}

static void lay_out_gradients(retrofit_buffers *buffers, arena *a, const retrofit_config *c,
                              size_t size) {
    size_t N = buffers->B * buffers->T, d = c->n_embd;
    retrofit_gradients *g = &buffers->gradients;
    g->dx = (float *)arena_alloc(a, N * d, sizeof(float));
    g->delta = (float *)arena_alloc(a, N * c->n_heads, sizeof(float));
    g->dbranch = arena_alloc(a, N * d, size);
    g->dinner = arena_alloc(a, N * d, size);
    g->dswiglu = arena_alloc(a, N * c->intermediate, size);
    g->dinjected = buffers->injected;
    g->dfinal = g->dinner;
    if (buffers->keep == RETROFIT_KEEP_ALL) {
        g->dattention = buffers->scratch.attention;
        g->dqkv = buffers->scratch.qkv;
        g->dgate_up = buffers->scratch.gate_up;
        return;
    }
    g->dattention = arena_alloc(a, N * d, size);
    g->dqkv = arena_alloc(a, N * retrofit_qkv_width(c), size);
    g->dgate_up = arena_alloc(a, N * 2 * c->intermediate, size);
}

static void lay_out_decoder(retrofit_buffers *buffers, arena *a, const retrofit_config *c) {
    retrofit_decoder *decoder = buffers->decoder;
    size_t B = buffers->B, d = c->n_embd;
    size_t positions = decoder->slots * B * decoder->cache.capacity;
    size_t entry = c->n_kv_heads * c->head_dim * retrofit_type_size(decoder->kv_type);
    decoder->reached = (int32_t *)arena_alloc(a, B, sizeof(int32_t));
    decoder->carried = (float *)arena_alloc(a, B * d, sizeof(float));
    decoder->drafted = (float *)arena_alloc(a, 2 * RETROFIT_LOOKAHEAD * d, sizeof(float));
    decoder->keys = arena_alloc(a, positions, entry);
    decoder->values = arena_alloc(a, positions, entry);
}

static size_t rope_positions(const retrofit_buffers *buffers) {
    size_t capacity = buffers->decoder ? buffers->decoder->cache.capacity : 0;
    return retrofit_max(buffers->T, capacity);
}

static void lay_out_logits(retrofit_buffers *buffers, arena *a, const retrofit_config *c,
                           size_t size) {
    size_t N = buffers->B * buffers->T, V = c->vocab;
    size_t tiles = LOGITS_BYTES / (V * size) / LOGITS_TILE + 1;
    buffers->chunk = retrofit_min(N, tiles * LOGITS_TILE);
    buffers->logits = arena_alloc(a, buffers->chunk * V, size);
    size_t wide_rows = retrofit_max(retrofit_min(buffers->chunk, WIDE_ROWS), buffers->B);
    buffers->wide_logits = (float *)arena_alloc(a, wide_rows * V, sizeof(float));
}

// Twice: with a.base NULL to measure, then to hand out the memory.
static void lay_out_buffers(retrofit_buffers *buffers, arena *a, const retrofit_config *c,
                            retrofit_type type) {
    size_t N = buffers->B * buffers->T, d = c->n_embd, size = retrofit_type_size(type);
    buffers->tokens = (int32_t *)arena_alloc(a, N, sizeof(int32_t));
    buffers->labels = (int32_t *)arena_alloc(a, N, sizeof(int32_t));
    buffers->past = (int32_t *)arena_alloc(a, buffers->B, sizeof(int32_t));
    buffers->rope = (float *)arena_alloc(a, rope_positions(buffers) * c->head_dim, sizeof(float));
    buffers->embedded = (float *)arena_alloc(a, N * d, sizeof(float));
    buffers->state = (float *)arena_alloc(a, N * d, sizeof(float));
    buffers->injected = (float *)arena_alloc(a, N * d, sizeof(float));
    if (!buffers->keep) buffers->x = (float *)arena_alloc(a, N * d, sizeof(float));
    lay_out_block(&buffers->scratch, a, c, N, size);
    if (buffers->keep == RETROFIT_KEEP_INPUTS)
        buffers->scratch.mid = (float *)arena_alloc(a, N * d, sizeof(float));
    if (buffers->keep) lay_out_saved(buffers, a, c, size);
    buffers->rstd_f = (float *)arena_alloc(a, N, sizeof(float));
    buffers->losses = (float *)arena_alloc(a, N, sizeof(float));
    buffers->norm = arena_alloc(a, N * d, size);
    buffers->swiglu = arena_alloc(a, N * c->intermediate, size);
    buffers->final = buffers->norm;
    lay_out_logits(buffers, a, c, size);
    if (buffers->decoder) lay_out_decoder(buffers, a, c);
    if (buffers->keep) lay_out_gradients(buffers, a, c, size);
}

// What lies on the host. false or error.
static bool allocate_decoder(retrofit_buffers *buffers, const retrofit_config *c) {
    size_t B = buffers->B, V = c->vocab, d = c->n_embd;
    retrofit_decoder *decoder = buffers->decoder;
    decoder->seen = (int32_t *)retrofit_allocate(B, sizeof(int32_t));
    decoder->used = (int32_t *)retrofit_allocate(B, sizeof(int32_t));
    decoder->next = (float *)retrofit_allocate(B * V, sizeof(float));
    decoder->measure = (double *)retrofit_allocate(B * V, sizeof(double));
    decoder->latent = (float *)retrofit_allocate(2 * B * d, sizeof(float));
    return decoder->seen && decoder->used && decoder->next && decoder->measure && decoder->latent;
}

static bool allocate_on_host(retrofit_buffers *buffers, const retrofit_config *c) {
    size_t N = buffers->B * buffers->T, K = buffers->K;
    retrofit_saved *saved = &buffers->saved;
    saved->prelude = (retrofit_block *)retrofit_allocate(c->prelude, sizeof(retrofit_block));
    saved->core = (retrofit_block *)retrofit_allocate(K * c->core, sizeof(retrofit_block));
    saved->coda = (retrofit_block *)retrofit_allocate(c->coda, sizeof(retrofit_block));
    saved->adapted = (float **)retrofit_allocate(K, sizeof(float *));
    buffers->host_tokens = (int32_t *)retrofit_allocate(N, sizeof(int32_t));
    buffers->host_labels = (int32_t *)retrofit_allocate(N, sizeof(int32_t));
    buffers->host_losses = (float *)retrofit_allocate(N, sizeof(float));
    if (!saved->prelude || !saved->core || !saved->coda || !saved->adapted) return false;
    if (!buffers->host_tokens || !buffers->host_labels || !buffers->host_losses) return false;
    return !buffers->decoder || allocate_decoder(buffers, c);
}

static void free_on_host(retrofit_buffers *buffers) {
    retrofit_decoder *decoder = buffers->decoder;
    if (decoder) {
        free(decoder->seen);
        free(decoder->used);
        free(decoder->next);
        free(decoder->measure);
        free(decoder->latent);
        free(decoder);
    }
    free(buffers->saved.prelude);
    free(buffers->saved.core);
    free(buffers->saved.coda);
    free(buffers->saved.adapted);
    free(buffers->host_tokens);
    free(buffers->host_labels);
    free(buffers->host_losses);
}

// Small enough that no product overflows before arena_alloc sees it.
static bool batch_possible(size_t B, size_t positions, size_t K, size_t recurrences) {
    if (B == 0 || positions == 0 || B > ((size_t)1 << 32) / positions) return false;
    return K <= 1 << 16 && recurrences <= 1 << 20;
}

size_t retrofit_buffers_bytes(const retrofit_config *config, const retrofit_ops *ops, size_t B,
                              size_t T, size_t K, retrofit_keep keep) {
    if (!batch_possible(B, T, K, 0)) return SIZE_MAX;
    retrofit_buffers buffers = {.B = B, .T = T, .K = keep && config->core ? K : 0, .keep = keep};
    retrofit_saved *saved = &buffers.saved;
    arena a = {NULL, 0};
    saved->prelude = (retrofit_block *)retrofit_allocate(config->prelude, sizeof(retrofit_block));
    saved->core = (retrofit_block *)retrofit_allocate(buffers.K * config->core, sizeof(retrofit_block));
    saved->coda = (retrofit_block *)retrofit_allocate(config->coda, sizeof(retrofit_block));
    saved->adapted = (float **)retrofit_allocate(buffers.K, sizeof(float *));
    if (saved->prelude && saved->core && saved->coda && saved->adapted)
        lay_out_buffers(&buffers, &a, config, ops->act_type);
    free_on_host(&buffers);
    return a.used;
}

static bool check_buffers(const retrofit_model *model, size_t B, size_t T, size_t K,
                          const retrofit_kv_cache *cache) {
    size_t capacity = cache ? cache->capacity : 0, recurrences = cache ? cache->recurrences : 0;
    size_t positions = retrofit_max(T, capacity);
    if (T == 0 || !batch_possible(B, positions, K, recurrences))
        return retrofit_fail("a batch of %zu x %zu tokens (depth %zu, %zu recurrences) is impossible",
                             B, T, K, recurrences);
    if (positions > model->config.context)
        return retrofit_fail("%zu positions are more than the model's context of %zu", positions,
                             model->config.context);
    if (cache && cache->kind != RETROFIT_CACHE_FULL && (cache->M == 0 || cache->M > 1 << 20))
        return retrofit_fail("a KV cache of %zu slots a layer: from 1 to %d", cache->M, 1 << 20);
    bool own_type = model->ops != &retrofit_cpu && model->ops->act_type != RETROFIT_BF16;
    if (cache && cache->bf16 && own_type)
        return retrofit_fail("%s keeps keys and values in its own precision: use --precision bf16",
                             model->ops->name);
    return true;
}

static bool upload_rope(retrofit_buffers *buffers) {
    const retrofit_config *c = &buffers->model->config;
    size_t positions = rope_positions(buffers), count = positions * c->head_dim;
    float *table = (float *)retrofit_allocate(count, sizeof *table);
    if (!table) return false;
    rope_table(table, c, positions);
    buffers->model->ops->upload(buffers->rope, table, count * sizeof *table);
    free(table);
    return true;
}

static bool place_buffers(retrofit_buffers *buffers) {
    const retrofit_model *model = buffers->model;
    const retrofit_config *c = &model->config;
    arena a = {NULL, 0};
    if (!allocate_on_host(buffers, c)) return false;
    lay_out_buffers(buffers, &a, c, model->ops->act_type);
    buffers->bytes = a.used;
    if (a.used == SIZE_MAX)
        return retrofit_fail("a batch of %zu x %zu tokens is larger than memory can be", buffers->B,
                             buffers->T);
    buffers->arena = model->ops->alloc(a.used);
    if (!buffers->arena) return false;
    a.base = (char *)buffers->arena;
    a.used = 0;
    lay_out_buffers(buffers, &a, c, model->ops->act_type);
    return upload_rope(buffers);
}

retrofit_buffers *retrofit_buffers_new(const retrofit_model *model, size_t B, size_t T, size_t K,
                                       retrofit_keep keep, const retrofit_kv_cache *cache) {
    const retrofit_config *c = &model->config;
    if (cache && cache->capacity == 0) cache = NULL;
    if (!check_buffers(model, B, T, K, cache)) return NULL;
    retrofit_buffers *buffers = (retrofit_buffers *)retrofit_allocate(1, sizeof *buffers);
    if (!buffers) return NULL;
    buffers->model = model;
    buffers->B = B;
    buffers->T = T;
    buffers->K = keep && c->core ? K : 0;
    buffers->keep = keep;
    bool ok = !cache || decoder_new(buffers, cache);
    if (ok && place_buffers(buffers)) return buffers;
    retrofit_buffers_free(buffers);
    return NULL;
}

void retrofit_buffers_free(retrofit_buffers *buffers) {
    if (!buffers) return;
    const retrofit_ops *ops = buffers->model->ops;
    if (buffers->decoder && buffers->decoder->step) ops->record_free(buffers->decoder->step);
    if (buffers->arena) ops->free(buffers->arena);
    free_on_host(buffers);
    free(buffers);
}

// =================================================================================================
// 9  Files: safetensors, checkpoints, token shards
// =================================================================================================

// ---- safetensors -----------------------------------------------------------------------------------------------------
// 8 bytes: length of the header; the header, JSON: {"name": {"dtype": "F32", "shape": [r, c], "data_offsets": [begin, end]}, …};
// then the data, little endian, offsets counted from its start.

static const struct {
    const char *name;
    size_t size;
} file_types[] = {{"F32", 4}, {"BF16", 2}, {"F16", 2}, {"I32", 4}, // in retrofit_type's order; the others are known, but not read
                  {"F64", 8}, {"I64", 8},  {"U64", 8}, {"U32", 4}, {"I16", 2}, {"U16", 2}, {"I8", 1}, {"U8", 1}, {"BOOL", 1}, {NULL, 1}};

static int by_size(const void *a, const void *b) {
    size_t x = *(const size_t *)a, y = *(const size_t *)b;
    return x < y ? -1 : x > y;
}

// Checks the entry j of the header; the tensor joins the list if its type is one of ours.
static bool safetensors_entry(retrofit_map *f, const retrofit_json *j, const char *data, size_t data_bytes, size_t range[2]) {
    const retrofit_json *dtype = retrofit_json_get(j, "dtype"), *shape = retrofit_json_get(j, "shape");
    const retrofit_json *offsets = retrofit_json_get(j, "data_offsets");
    size_t begin = 0, end = 0, type = 0, bytes;
    if (!dtype || dtype->type != RETROFIT_JSON_STRING || !shape || shape->type != RETROFIT_JSON_ARRAY || !offsets || offsets->count != 2 ||
        !retrofit_json_size(offsets->child, &begin) || !retrofit_json_size(offsets->child->next, &end))
        return retrofit_fail("%s: tensor %s: needs dtype, shape and two data_offsets", f->path, j->key);
    while (file_types[type].name && strcmp(file_types[type].name, dtype->string)) type++;
    bool ours = type <= RETROFIT_I32, sizes = !ours || shape->count <= 4;
    retrofit_tensor t = {j->key, ours ? (retrofit_type)type : RETROFIT_F32, 0, {0}, 1, NULL};
    for (const retrofit_json *s = shape->child; s && sizes; s = s->next) {
        size_t n = 0;
        sizes = retrofit_json_size(s, &n) && !__builtin_mul_overflow(t.count, n, &t.count);
        if (ours) t.shape[t.dims++] = n;
    }
    bool fits = !__builtin_mul_overflow(t.count, file_types[type].size, &bytes);
    const char *wrong = !file_types[type].name              ? "unknown dtype"
                        : !sizes || !fits                   ? "the shape is not at most 4 sizes, or too large"
                        : begin > end || end > data_bytes   ? "it lies outside the data: truncated?"
                        : bytes != end - begin              ? "its shape needs another number of bytes"
                        : begin % file_types[type].size > 0 ? "it is not aligned to its dtype"
                                                            : NULL;
    if (wrong) return retrofit_fail("%s: tensor %s: %s, bytes %zu to %zu of %zu: %s", f->path, j->key, dtype->string, begin, end, data_bytes, wrong);
    range[0] = begin, range[1] = end;
    t.data = data + begin;
    if (ours) f->tensors[f->count++] = t;
    return true;
}

static bool safetensors_read(retrofit_map *f) { // what it has opened so far when it fails, its caller closes
    if (!(f->base = retrofit_map_file(f->path, &f->bytes))) return false;
    const char *text = (const char *)f->base + 8;
    uint64_t header = 0;
    if (f->bytes >= 8) memcpy(&header, f->base, 8);
    if (f->bytes < 8 || header < 2 || header > f->bytes - 8 || header > 100000000)
        return retrofit_fail("%s: not a safetensors file, or truncated: %zu bytes, header of %llu", f->path, f->bytes, (unsigned long long)header);
    if (!(f->header = retrofit_json_parse(text, (size_t)header, f->path))) return false;
    if (f->header->type != RETROFIT_JSON_OBJECT) return retrofit_fail("%s: the header is not a JSON object", f->path);
    size_t bytes = f->bytes - 8 - (size_t)header, n = 0, covered = 0;
    f->tensors = (retrofit_tensor *)retrofit_allocate(f->header->count + 1, sizeof *f->tensors + 2 * sizeof(size_t));
    if (!f->tensors) return false;
    size_t *ranges = (size_t *)(f->tensors + f->header->count + 1); // begin, end; begin, end; … of those that are not empty
    for (const retrofit_json *j = f->header->child; j; j = j->next) {
        if (!strcmp(j->key, "__metadata__")) continue;
        if (!safetensors_entry(f, j, text + header, bytes, ranges + n)) return false;
        n += ranges[n] != ranges[n + 1] ? 2 : 0;
    }
    // In the order of the file, every tensor must begin where the one before it ends, and the last one end with the file.
    qsort(ranges, n / 2, 2 * sizeof *ranges, by_size);
    size_t i = 0;
    for (; i < n && ranges[i] == covered; i += 2) covered = ranges[i + 1];
    return (i == n && covered == bytes) || retrofit_fail("%s: tensors overlap or leave a hole at byte %zu of %zu", f->path, covered, bytes);
}

bool retrofit_safetensors_open(retrofit_map *f, const char *path) {
    memset(f, 0, sizeof *f);
    if ((f->path = strdup(path)) ? safetensors_read(f) : retrofit_fail("out of memory")) return true;
    return retrofit_safetensors_close(f), false;
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

static retrofit_type stored_type(const retrofit_tensor *t, retrofit_type floats) { return t->type == RETROFIT_I32 ? RETROFIT_I32 : floats; }

// Failures to write show in ferror(f), for finish_file.
bool retrofit_safetensors_write(const char *path, const retrofit_ops *ops, const retrofit_tensor *tensors, size_t count,
                                retrofit_type type, const char *const *metadata) {
    enum { CHUNK = 1 << 18 };
    float *wide = (float *)retrofit_allocate(CHUNK, sizeof(float) + sizeof(uint16_t));
    if (!wide) return false;
    uint16_t *half = (uint16_t *)(wide + CHUNK);
    FILE *f = fopen(path, "wb");
    if (!f) return free(wide), retrofit_fail("%s: %s", path, strerror(errno));
    uint64_t header = 0;
    size_t offset = 0;
    fwrite(&header, 8, 1, f); // its length, written again once it is known
    fprintf(f, "{\"__metadata__\":{\"format\":\"pt\"");
    for (size_t i = 0; metadata && metadata[i]; i++) fputc(i % 2 ? ':' : ',', f), retrofit_json_write_string(f, metadata[i], strlen(metadata[i]));
    fputc('}', f);
    for (const retrofit_tensor *t = tensors; t < tensors + count; t++) {
        size_t bytes = t->count * retrofit_type_size(stored_type(t, type));
        fputc(',', f), retrofit_json_write_string(f, t->name, strlen(t->name));
        fprintf(f, ":{\"dtype\":\"%s\",\"shape\":[", file_types[stored_type(t, type)].name);
        for (size_t j = 0; j < t->dims; j++) fprintf(f, "%s%zu", j ? "," : "", t->shape[j]);
        fprintf(f, "],\"data_offsets\":[%zu,%zu]}", offset, offset + bytes);
        offset += bytes;
    }
    fputc('}', f);
    long at = ftell(f);
    for (; at % 64; at++) fputc(' ', f); // tensors start aligned, so that they can be used where they lie
    header = (uint64_t)at - 8;
    bool ok = at > 0 && !fseek(f, 0, SEEK_SET) && fwrite(&header, 8, 1, f) == 1 && !fseek(f, at, SEEK_SET);
    for (const retrofit_tensor *t = tensors; t < tensors + count; t++) {
        retrofit_type stored = stored_type(t, type);
        size_t size = retrofit_type_size(t->type);
        for (size_t i = 0; ok && i < t->count; i += CHUNK) {
            size_t n = retrofit_min(t->count - i, CHUNK);
            ops->download(size == 4 ? (void *)wide : (void *)half, (const char *)t->data + i * size, n * size);
            if (stored != t->type && size == 2) retrofit_to_float(wide, half, t->type, n);
            for (size_t j = 0; stored != t->type && stored == RETROFIT_BF16 && j < n; j++) half[j] = retrofit_float_to_bf16(wide[j]);
            size_t to = retrofit_type_size(stored);
            ok = fwrite(to == 4 ? (void *)wide : (void *)half, to, n, f) == n;
        }
    }
    free(wide);
    return retrofit_finish_file(f, path, ok);
}

// ---- config.json
bool retrofit_config_check(const retrofit_config *c, const char *where) {
    struct { const char *name; size_t value, most; } sizes[] = { // small enough that no product of them overflows
        {"the width (n_embd, hidden_size)", c->n_embd, 1 << 20}, {"the number of heads", c->n_heads, 1 << 16},
        {"the number of key/value heads", c->n_kv_heads, 1 << 16}, {"intermediate_size", c->intermediate, 1 << 22},
        {"the vocabulary", c->vocab, 1 << 24}, {"the context (max_position_embeddings)", c->context, 1 << 24},
        {"the number of layers", c->prelude + c->core + c->coda, 4096}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value == 0 || sizes[i].value > sizes[i].most)
            return retrofit_fail("%s: %s is %zu, not between 1 and %zu", where, sizes[i].name, sizes[i].value, sizes[i].most);
    if (c->n_embd != c->n_heads * c->head_dim)
        return retrofit_fail("%s: %zu heads of %zu do not make a width of %zu", where, c->n_heads, c->head_dim, c->n_embd);
    if (c->n_heads % c->n_kv_heads) return retrofit_fail("%s: %zu heads cannot share %zu key/value heads", where, c->n_heads, c->n_kv_heads);
    if (c->head_dim % 2) return retrofit_fail("%s: a head size of %zu is odd: RoPE needs pairs", where, c->head_dim);
    if (!(c->norm_eps > 0 && c->norm_eps < 1)) return retrofit_fail("%s: norm eps %g is not between 0 and 1", where, (double)c->norm_eps);
    if (!(c->rope_theta > 1 && c->rope_theta < 1e12)) return retrofit_fail("%s: rope_theta %g is not between 1 and 1e12", where, c->rope_theta);
    if (c->rope_llama3 && !(c->rope_factor >= 1 && c->rope_low > 0 && c->rope_high > c->rope_low && c->rope_original_context > 0))
        return retrofit_fail("%s: rope_scaling's numbers make no sense", where);
    if (!(c->state_std >= 0 && c->state_std < 100)) return retrofit_fail("%s: init_values.std %g is not between 0 and 100", where, (double)c->state_std);
    if (c->core == 0 && c->prelude) return retrofit_fail("%s: a prelude without a recurrent core", where);
    if (c->mean_recurrence == 0 || c->mean_recurrence > 1 << 16 || c->backprop_depth == 0 || c->backprop_depth > 1 << 16)
        return retrofit_fail("%s: mean_recurrence and mean_backprop_depth must be between 1 and 65536", where);
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
    if (*ok && n->type != RETROFIT_JSON_NUMBER) *ok = retrofit_fail("%s: %s is not a number", where, key);
    return n->type == RETROFIT_JSON_NUMBER ? n->number : otherwise;
}

static bool config_true(const retrofit_json *j, const char *key) {
    const retrofit_json *b = retrofit_json_get(j, key);
    return b && b->type == RETROFIT_JSON_BOOL && b->number != 0;
}

static int32_t config_id(double x) { return (int32_t)fmax(-1, fmin(1 << 24, x)); }

static bool config_parse(retrofit_config *c, const retrofit_json *j, const char *where) {
    const retrofit_json *type = retrofit_json_get(j, "model_type"), *init = retrofit_json_get(j, "init_values"), *n;
    bool plain = retrofit_json_is(type, "llama"), ok = true;
    if (!plain && !retrofit_json_is(type, "huginn_raven")) return retrofit_fail("%s: model_type is neither llama nor huginn_raven: no other is known", where);
    memset(c, 0, sizeof *c);
    c->mean_recurrence = c->backprop_depth = 1;
    for (size_t i = 0; i < sizeof config_sizes / sizeof *config_sizes; i++) {
        const char *key = plain ? config_sizes[i].plain : config_sizes[i].recurrent;
        if (!key || (!(n = retrofit_json_get(j, key)) && !config_sizes[i].required)) continue;
        if (!retrofit_json_size(n, (size_t *)(void *)((char *)c + config_sizes[i].field))) return retrofit_fail("%s: %s is missing or not a size", where, key);
    }
    if (!retrofit_json_get(j, "num_key_value_heads")) c->n_kv_heads = c->n_heads;
    if (c->vocab == 0 && !retrofit_json_size(retrofit_json_get(j, "vocab_size"), &c->vocab)) return retrofit_fail("%s: vocab_size is missing or not a size", where);
    for (size_t i = 0; i < sizeof config_words / sizeof *config_words; i++)
        if ((n = retrofit_json_get(j, config_words[i][0])) && !retrofit_json_is(n, config_words[i][1]))
            return retrofit_fail("%s: %s is not %s: only Llama's blocks are supported", where, config_words[i][0], config_words[i][1]);
    for (size_t i = 0; i < sizeof config_flags / sizeof *config_flags; i++)
        if (config_true(j, config_flags[i])) return retrofit_fail("%s: %s is true: such models are not supported", where, config_flags[i]);
    // transformers 5 keeps rope_theta and the scaling in rope_parameters
    const retrofit_json *rope = retrofit_json_get(j, retrofit_json_get(j, "rope_parameters") ? "rope_parameters" : "rope_scaling"), *kind;
    c->rope_theta = config_number(j, where, "rope_theta", config_number(rope, where, "rope_theta", 10000, &ok), &ok);
    if ((kind = retrofit_json_get(rope, "rope_type")) || (kind = retrofit_json_get(rope, "type"))) {
        c->rope_llama3 = retrofit_json_is(kind, "llama3");
        if (!c->rope_llama3 && !retrofit_json_is(kind, "default")) return retrofit_fail("%s: rope_scaling is not of type llama3: no other is known", where);
        c->rope_factor = config_number(rope, where, "factor", 0, &ok), c->rope_low = config_number(rope, where, "low_freq_factor", 0, &ok);
        c->rope_high = config_number(rope, where, "high_freq_factor", 0, &ok);
        c->rope_original_context = config_number(rope, where, "original_max_position_embeddings", 0, &ok);
    }
    c->head_dim = c->n_heads ? c->n_embd / c->n_heads : 0;
    if (config_number(j, where, "head_dim", (double)c->head_dim, &ok) != (double)c->head_dim && ok)
        return retrofit_fail("%s: head_dim is not %zu / %zu: such models are not supported", where, c->n_embd, c->n_heads);
    if (config_number(init, where, "embed_scale", 1, &ok) != 1 && ok) return retrofit_fail("%s: init_values.embed_scale is not 1", where);
    c->norm_eps = (float)config_number(j, where, plain ? "rms_norm_eps" : "norm_eps", plain ? 1e-6 : 0, &ok);
    c->state_std = (float)config_number(init, where, "std", RETROFIT_STATE_STD, &ok);
    c->tied = plain && config_true(j, "tie_word_embeddings");
    c->bos = config_id(config_number(j, where, "bos_token_id", -1, &ok)), c->eos = config_id(config_number(j, where, "eos_token_id", -1, &ok));
    return ok && retrofit_config_check(c, where);
}

bool retrofit_config_read(retrofit_config *c, const char *directory) {
    char path[RETROFIT_PATH];
    size_t size;
    char *text = retrofit_path(path, directory, "config.json") ? retrofit_read_file(path, &size) : NULL;
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
    if (!f) return retrofit_fail("%s: %s", path, strerror(errno));
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
    return retrofit_finish_file(f, path, true);
}

// ---- Loading ---------------------------------------------------------------------------------------------------------------
static bool open_map(retrofit_model *m, const char *path) {
    retrofit_map *maps = (retrofit_map *)realloc(m->maps, (m->map_count + 1) * sizeof *maps);
    if (!maps) return retrofit_fail("out of memory");
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
    if (access(index, F_OK)) return retrofit_fail("%s: there is no model.safetensors and no model.safetensors.index.json", directory);
    char *text = retrofit_read_file(index, &size);
    retrofit_json *j = text ? retrofit_json_parse(text, size, index) : NULL;
    const retrofit_json *map = retrofit_json_get(j, "weight_map");
    bool ok = j && (map || retrofit_fail("%s: no weight_map", index));
    for (const retrofit_json *e = map ? map->child : NULL; ok && e; e = e->next) {
        size_t seen = 0;
        if (e->type != RETROFIT_JSON_STRING || strchr(e->string, '/')) ok = retrofit_fail("%s: %s is not in a file of this directory", index, e->key);
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
    const retrofit_tensor *t = find_tensor(m, p->source[i].name);
    if (!t && p->kind == RETROFIT_HEAD && m->config.tied) t = find_tensor(m, m->wte.source[0].name);
    if (!t) return retrofit_fail("%s: tensor %s is missing", where, p->source[i].name);
    bool norm = p->kind == RETROFIT_NORM;
    if (t->type == RETROFIT_I32 || t->dims != (norm ? 1u : 2u) || t->shape[0] != (norm ? p->cols : p->source[i].rows) ||
        (!norm && t->shape[1] != p->cols))
        return retrofit_fail("%s: tensor %s has the shape (%zu, %zu), the config asks for (%zu, %zu)", where, t->name, t->dims ? t->shape[0] : 1,
                    t->dims > 1 ? t->shape[1] : 1, norm ? p->cols : p->source[i].rows, norm ? 1 : p->cols);
    *out = t;
    return true;
}

// n elements from a file to memory of the device, changing their type on the way.
static bool store(const retrofit_ops *ops, char *to, retrofit_type type, const char *from, retrofit_type from_type, size_t n) {
    if (type == from_type) return ops->upload(to, from, n * retrofit_type_size(type)), true;
    enum { CHUNK = 1 << 16 };
    float *wide = (float *)retrofit_allocate(CHUNK, sizeof *wide);
    uint16_t *half = (uint16_t *)retrofit_allocate(CHUNK, sizeof *half);
    for (size_t at = 0; wide && half && at < n; at += CHUNK) {
        size_t count = retrofit_min(n - at, CHUNK);
        retrofit_to_float(wide, from + at * retrofit_type_size(from_type), from_type, count);
        for (size_t i = 0; type == RETROFIT_BF16 && i < count; i++) half[i] = retrofit_float_to_bf16(wide[i]);
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
            for (size_t j = 0; j < p->sources; j++)
                if (!find_piece(m, p, j, where, &t[j])) return false;
            if (mode == RETROFIT_INFERENCE) {
                p->weight.type = compute_type(m, p);
                if (in_place && p->kind != RETROFIT_NORM && t[0]->type == RETROFIT_BF16 && (p->sources == 1 || t[1]->type == RETROFIT_BF16) &&
                    (p->sources < 3 || t[2]->type == RETROFIT_BF16))
                    p->weight.type = RETROFIT_BF16;
                if (in_place && p->sources == 1 && t[0]->type == p->weight.type &&
                    (uintptr_t)t[0]->data % retrofit_type_size(t[0]->type) == 0) {
                    p->weight.data = t[0]->data;
                    continue;
                }
                p->weight.data = arena_alloc(&a, p->rows * p->cols, retrofit_type_size(p->weight.type));
            }
            if (pass == 0) continue;
            char *to = mode != RETROFIT_INFERENCE ? (char *)p->master : (char *)p->weight.data;
            retrofit_type type = mode != RETROFIT_INFERENCE ? RETROFIT_F32 : p->weight.type;
            for (size_t j = 0; j < p->sources; j++) {
                if (!store(m->ops, to, type, (const char *)t[j]->data, t[j]->type, t[j]->count)) return false;
                to += t[j]->count * retrofit_type_size(type);
            }
        }
        if (pass == 0 && mode != RETROFIT_INFERENCE && !retrofit_model_allocate(m, mode)) return false;
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
                for (size_t j = 0; !used && j < m->parameters[p]->sources; j++) used = !strcmp(name, m->parameters[p]->source[j].name);
            if (used && find_tensor(m, name) != &m->maps[f].tensors[i]) return retrofit_fail("%s: tensor %s is there twice", m->maps[f].path, name);
            if (!used) return retrofit_fail("%s: tensor %s has no place in a model of this config.json", m->maps[f].path, name);
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
    if (mode != RETROFIT_INFERENCE) {
        retrofit_refresh_weights(m);
        while (m->map_count) retrofit_safetensors_close(&m->maps[--m->map_count]);
    }
    return m;
}

// ---- Checkpoints
char *retrofit_directory_begin(const char *final) {
    size_t n = strlen(final);
    while (n > 1 && final[n - 1] == '/') n--;
    if (n == 0 || n > 4000) return retrofit_fail("'%s' is no name for a directory", final), (char *)NULL;
    char *path = (char *)retrofit_allocate(RETROFIT_PATH, 1);
    if (!path) return NULL;
    snprintf(path, RETROFIT_PATH, "%.*s.tmp-%ld", (int)n, final, (long)getpid());
    retrofit_directory_abandon(path); // of an earlier process of this number
    return retrofit_make_directories(path, true) ? path : (free(path), (char *)NULL);
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
    snprintf(parent, sizeof parent, "%s", temporary), retrofit_parent_directory(parent);
    if (!retrofit_sync_directory(temporary)) return false;
    if (rename(temporary, final))
        return retrofit_fail("%s: %s", final, errno == ENOTEMPTY || errno == ENOTDIR ? "exists already: remove it" : strerror(errno));
    return retrofit_sync_directory(parent);
}

const char *retrofit_model_directory(const char *directory, char path[RETROFIT_PATH]) {
    bool here = retrofit_path(path, directory, "config.json") && access(path, F_OK) == 0;
    bool latest = !here && retrofit_path(path, directory, "latest/config.json") && access(path, F_OK) == 0;
    return latest && retrofit_path(path, directory, "latest") ? path : directory;
}

// What a checkpoint is written from: the weights, every piece under its name; or the moments, each parameter whole under its label behind
// "m." or "v.". malloc'd, with the names behind the tensors.
static retrofit_tensor *list_tensors(const retrofit_model *m, bool moments, size_t *count) {
    enum { MOST = 3, NAME = 96 }; // tensors of a parameter, bytes of a name
    retrofit_tensor *t = (retrofit_tensor *)retrofit_allocate(MOST * m->parameter_count, sizeof *t + NAME);
    *count = 0;
    for (size_t i = 0; t && i < m->parameter_count; i++) {
        const retrofit_parameter *p = m->parameters[i];
        const char *data = (const char *)(p->master ? p->master : p->weight.data);
        for (size_t j = 0; j < (moments ? 2 : p->sources); j++) {
            if (moments) data = (const char *)(j ? p->v : p->m);
            if (!data) continue;
            char *name = (char *)(t + MOST * m->parameter_count) + *count * NAME;
            snprintf(name, NAME, "%s%s", !moments ? "" : j ? "v." : "m.", p->source[moments ? 0 : j].name);
            size_t rows = moments ? p->rows : p->source[j].rows;
            retrofit_type type = moments || p->master ? RETROFIT_F32 : p->weight.type;
            retrofit_tensor out = {name, type, 2, {rows, p->cols, 0, 0}, rows * p->cols, data};
            if (!moments && p->kind == RETROFIT_NORM) out.dims = 1, out.shape[0] = p->cols;
            data += out.count * retrofit_type_size(type);
            t[(*count)++] = out;
        }
    }
    return t;
}

static bool write_tensors(const retrofit_model *m, bool moments, const char *directory, retrofit_type type, const char *const *metadata) {
    char path[RETROFIT_PATH];
    size_t count;
    retrofit_tensor *t = list_tensors(m, moments, &count);
    bool ok = t && retrofit_path(path, directory, moments ? "optimizer.safetensors" : "model.safetensors") &&
              retrofit_safetensors_write(path, m->ops, t, count, type, metadata);
    free(t);
    return ok;
}

static bool copy_file(const char *from, const char *to) {
    size_t size;
    char *text = retrofit_read_file(from, &size);
    FILE *f = text ? fopen(to, "wb") : NULL;
    bool ok = f ? retrofit_finish_file(f, to, fwrite(text, 1, size, f) == size) : text && retrofit_fail("%s: %s", to, strerror(errno));
    free(text);
    return ok;
}

bool retrofit_save(const retrofit_model *m, const char *directory, retrofit_type type, const char *tokenizer_from) {
    // What belongs to a tokenizer, and the authors' modelling code where the source has it.
    static const char *const names[] = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                                        "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
                                        "raven_config_minimal.py", "raven_modeling_minimal_llama.py"};
    bool ok = write_tensors(m, false, directory, type, NULL) && retrofit_config_write(&m->config, type, directory);
    for (size_t i = 0; ok && tokenizer_from && i < sizeof names / sizeof *names; i++) {
        char source[RETROFIT_PATH], target[RETROFIT_PATH];
        ok = retrofit_path(source, tokenizer_from, names[i]) && retrofit_path(target, directory, names[i]) &&
             (access(source, F_OK) || copy_file(source, target));
    }
    return ok;
}

bool retrofit_save_optimizer(const retrofit_model *m, const char *directory, const char *const *metadata) {
    return write_tensors(m, true, directory, RETROFIT_F32, metadata);
}

bool retrofit_load_optimizer(retrofit_model *m, retrofit_map *f, const char *directory) {
    char path[RETROFIT_PATH];
    if (!retrofit_path(path, directory, "optimizer.safetensors") || !retrofit_safetensors_open(f, path)) return false;
    size_t count;
    retrofit_tensor *t = list_tensors(m, true, &count);
    bool ok = t && (count == f->count || retrofit_fail("%s: %zu moments where the optimizer has %zu: was it another one?", path, f->count, count));
    for (size_t i = 0; ok && i < count; i++) {
        const retrofit_tensor *saved = retrofit_safetensors_find(f, t[i].name);
        ok = saved && saved->type == RETROFIT_F32 && saved->dims == 2 && !memcmp(saved->shape, t[i].shape, 2 * sizeof *t->shape);
        if (ok) m->ops->upload((void *)t[i].data, saved->data, saved->count * sizeof(float));
        else retrofit_fail("%s: %s is missing or of another shape", path, t[i].name);
    }
    free(t);
    if (!ok) retrofit_safetensors_close(f);
    return ok;
}

// ---- Token shards -----------------------------------------------------------------------------------------------------------
typedef struct { void *base; size_t bytes, width, rows; } shard; // width: bytes of a token

struct retrofit_data {
    size_t T, vocab, rows;
    glob_t files;
    shard *shard;         // [files.gl_pathc]
    uint64_t seed, epoch; // of `order`
    size_t *order;        // [rows] the rows of this epoch; NULL: as they lie in the files
};

static bool open_shard(retrofit_data *d, shard *s, const char *path) {
    if (!(s->base = retrofit_map_file(path, &s->bytes))) return false;
    const int32_t *header = (const int32_t *)s->base;
    if (s->bytes < 1024) return retrofit_fail("%s: %zu bytes are no token shard: the header alone has 1024", path, s->bytes);
    if (header[0] == RETROFIT_SHARD_MAGIC_16 && header[1] == 1) s->width = 2;
    else if (header[0] == RETROFIT_SHARD_MAGIC_32 && header[1] == 7) s->width = 4;
    else return retrofit_fail("%s: not a token shard (magic %d, version %d): make one with convert --tokenize", path, header[0], header[1]);
    size_t tokens = (s->bytes - 1024) / s->width;
    if (header[2] < 0 || (size_t)header[2] != tokens || (s->bytes - 1024) % s->width)
        return retrofit_fail("%s: the header promises %d tokens, the file holds %zu: truncated?", path, header[2], tokens);
    d->rows += s->rows = tokens / (d->T + 1);
    return true;
}

retrofit_data *retrofit_data_open(const char *pattern, size_t T, size_t vocab, bool shuffle, uint64_t seed) {
    retrofit_data *d = (retrofit_data *)retrofit_allocate(1, sizeof *d);
    if (!d) return NULL;
    d->T = T, d->vocab = vocab, d->seed = seed, d->epoch = UINT64_MAX;
    int why = glob(pattern, 0, NULL, &d->files);
    bool ok = why == 0 ? (d->shard = (shard *)retrofit_allocate(d->files.gl_pathc, sizeof *d->shard)) != NULL
                       : retrofit_fail("%s: %s", pattern, why == GLOB_NOMATCH ? "no such file" : "cannot be searched");
    for (size_t i = 0; ok && i < d->files.gl_pathc; i++) ok = open_shard(d, &d->shard[i], d->files.gl_pathv[i]);
    if (ok && d->rows == 0) ok = retrofit_fail("%s: fewer tokens than one row of %zu: no data", pattern, T + 1);
    if (ok && shuffle) ok = (d->order = (size_t *)retrofit_allocate(d->rows, sizeof *d->order)) != NULL;
    if (!ok) retrofit_data_close(d), d = NULL;
    return d;
}

void retrofit_data_close(retrofit_data *d) {
    if (!d) return;
    for (size_t i = 0; d->shard && i < d->files.gl_pathc; i++)
        if (d->shard[i].base) munmap(d->shard[i].base, d->shard[i].bytes);
    globfree(&d->files), free(d->shard), free(d->order), free(d);
}

size_t retrofit_data_rows(const retrofit_data *d) { return d->rows; }

bool retrofit_data_check(const retrofit_data *d, uint64_t tokenizer) {
    for (size_t i = 0; i < d->files.gl_pathc; i++) {
        const uint32_t *header = (const uint32_t *)d->shard[i].base;
        uint64_t made_with = header[3] | (uint64_t)header[4] << 32;
        if (made_with && made_with != tokenizer)
            return retrofit_fail("%s: made with another tokenizer (%016llx) than the model's (%016llx): make it anew, convert --tokenize --tokenizer MODEL",
                        d->files.gl_pathv[i], (unsigned long long)made_with, (unsigned long long)tokenizer);
    }
    return true;
}

bool retrofit_data_row(retrofit_data *d, uint64_t index, int32_t *tokens, int32_t *labels) {
    if (d->order && d->epoch != index / d->rows) { // Fisher and Yates, from the seed and the epoch alone
        uint64_t key = retrofit_hash(d->seed, d->epoch = index / d->rows);
        for (size_t i = 0; i < d->rows; i++) {
            size_t j = (size_t)(retrofit_hash(key, i) % (i + 1));
            d->order[i] = d->order[j], d->order[j] = i;
        }
    }
    size_t place = (size_t)(index % d->rows), row = d->order ? d->order[place] : place, s = 0;
    while (row >= d->shard[s].rows) row -= d->shard[s++].rows;
    for (size_t t = 0, first = row * (d->T + 1), width = d->shard[s].width; t <= d->T; t++) {
        uint32_t id = 0;
        memcpy(&id, (const char *)d->shard[s].base + 1024 + (first + t) * width, width);
        if (id >= d->vocab)
            return retrofit_fail("%s: token %zu is %u, but the vocabulary has %zu entries: tokenized for another model?", d->files.gl_pathv[s],
                        first + t, id, d->vocab);
        if (t < d->T) tokens[t] = (int32_t)id;
        if (t > 0) labels[t - 1] = (int32_t)id;
    }
    return true;
}

// =================================================================================================
// 10  Matrix products at the machine's speed
// =================================================================================================

// ---- Sums, maxima, exponentials -----------------------------------------------------------------
// A compiler must not reorder a floating-point sum, and in a single running sum each addition waits
// for the one before. So element i is added to lane i mod LANES, which vectorises; the lanes are then
// added in pairs. The n mod LANES last elements, the tail, make a sum of their own.
enum { LANES = 16 };

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

static float weighted_dot(const float *a, const float *weight, const float *b, size_t n) {
    float lanes[LANES] = {0}, tail = 0;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += a[i + l] * weight[i + l] * b[i + l];
    for (; i < n; i++) tail += a[i] * weight[i] * b[i];
    return sum_lanes(lanes) + tail;
}

// start + Σ x_i.
static float add_up(float start, const float *x, size_t n) {
    float lanes[LANES] = {0}, tail = 0;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += x[i + l];
    for (; i < n; i++) tail += x[i];
    return start + sum_lanes(lanes) + tail;
}

// NaN is passed over: it shows in the sum of exponentials that follows.
static float max_element(const float *x, size_t n) {
    float lanes[LANES], max = -INFINITY;
    for (int l = 0; l < LANES; l++) lanes[l] = -INFINITY;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
    for (; i < n; i++) max = x[i] > max ? x[i] : max;
    for (int l = 0; l < LANES; l++) max = lanes[l] > max ? lanes[l] : max;
    return max;
}

// e^x to 1 part in 10^7, in arithmetic that vectorises: e^x = 2^n·e^r with n = round(x/log 2), where
// e^r is a polynomial in r, |r| ≤ log(2)/2, and 2^n is n added to the exponent's bits.
static inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f; // adding 1.5·2^23 rounds to an integer
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; // log 2 in two parts, to keep its digits
    float p = 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;

    uint32_t n_bits, power;
    memcpy(&n_bits, &shifted, sizeof n_bits); // n is in the lowest bits of the mantissa
    memcpy(&power, &p, sizeof power);
    power += n_bits << 23;
    memcpy(&p, &power, sizeof p);
    return p + (x - x); // NaN stays NaN, whatever its bits
}

// Σ e^{x_i - max}. The terms are stored too unless `terms` is NULL; it may be x. Vocabularies are
// large: blocks are summed in fp32, and the blocks' sums in double.
static double sum_exp(float *terms, const float *x, size_t n, float max) {
    enum { BLOCK = 4096 };
    float e[BLOCK];
    double sum = 0;
    for (size_t first = 0; first < n; first += BLOCK) {
        size_t count = retrofit_min(n - first, BLOCK), whole = count / LANES * LANES;
        for (size_t i = 0; i < count; i++) e[i] = fast_exp(x[first + i] - max);
        sum += (double)add_up(0, e, whole) + add_up(0, e + whole, count - whole);
        if (terms) memcpy(terms + first, e, count * sizeof *e);
    }
    return sum;
}

// ---- Matrix products: C = D + A·B ---------------------------------------------------------------
// The loops are those of BLIS (Van Zee, van de Geijn: BLIS, a framework for rapidly instantiating BLAS
// functionality, 2015), outermost first:
//
//     jc        strips of NC columns of B and C
//     pc          blocks of KC terms of each sum. B's part (KC,NC) is packed and stays in the L2 cache
//     ir            MR rows of A and C. A's part (MR,KC) is packed and stays in the L1 cache
//     jr              panels of NR columns
//                       micro-kernel: C's part (MR,NR) stays in registers
//
//                 K                          N                            N
//          ┌────┬────┬────┐       ┌────┬────┬────┬────┐        ┌────┬────┬────┬────┐
//       MR │▒▒▒▒│    │    │    KC │▒▒▒▒│▒▒▒▒│    │    │     MR │████│    │    │    │
//          ├────┴────┴────┤       ├────┴────┼────┴────┤        ├────┘    │         │
//        M │              │   ·   │         │         │ K  =   │         │         │ M
//          │              │       │         │         │        │         │         │
//          └──────────────┘       └─────────┴─────────┘        └─────────┴─────────┘
//            KC                     NR   NR                      NR
//                                  └── NC ───┘                  └── NC ───┘
//
// For every k of its block the micro-kernel adds the outer product of a column of A (MR) and a row of
// B (NR): MR + NR numbers are loaded for MR·NR multiply-adds, so that arithmetic is the bottleneck and
// not loading. All else serves to keep it fed from the caches. "Packed" means copied into a thread's
// own buffer in the very order in which the micro-kernel reads. (BLIS has one loop more, over MC rows
// of A: with B's part in L2 instead of L3, MC = MR is enough.)
//
// A product with few rows (decoding a few tokens) needs every weight only a few times: reading B is all
// the cost, and packing would double it. If B has k contiguous, as a weight matrix in x·wᵀ has, it is
// read in place: see few_rows.
//
// The threads divide C among them. Every element of C is summed over k by one thread, in an order that
// depends on K alone, so that its bits depend neither on the number of threads nor on the strips.

#if defined __AVX512F__
enum { VECTOR = 16, MR = 8 }; // VECTOR: floats in a register. C takes 24 of the 32 registers,
#elif defined __AVX2__ && defined __FMA__
enum { VECTOR = 8, MR = 4 }; // 12 of 16,
#else
enum { VECTOR = 4, MR = 4 }; // 12 of 16.
#endif
enum {
    NR = 3 * VECTOR,
    KC = 512,                   // at most; NC is as much as the buffer then holds
    B_BUFFER = (KC + 1) * 288,  // floats: 577 KiB
    FEW = 8,                    // rows up to which few_rows is the faster way
};
static RETROFIT_THREAD_LOCAL _Alignas(64) float packed_a[MR * KC], packed_b[B_BUFFER];

// Without this the micro-kernel would be a call for each of its constant arguments' values.
#define INLINE static inline __attribute__((always_inline))
// A loop of constant length over registers, which have no index: only unrolled can they be the
// elements of an array.
#ifdef __clang__
#define UNROLL(i, n) _Pragma("clang loop unroll(full)") for (size_t i = 0; i < n; i++)
#else
#define UNROLL(i, n) _Pragma("GCC unroll 16") for (size_t i = 0; i < n; i++)
#endif

// What a register holds, and the same in memory (_at): aligned like its elements only, and free to
// alias them. A quad is what can be transposed on every machine.
typedef float vector __attribute__((vector_size(4 * VECTOR)));
typedef float vector_at __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
typedef uint32_t vector_bits __attribute__((vector_size(4 * VECTOR)));
typedef float quad __attribute__((vector_size(16)));
typedef float quad_at __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t quad_bits __attribute__((vector_size(16)));

static size_t ceil_of(size_t a, size_t b) { return (a + b - 1) / b; }

// ---- Views and parts of a product ---------------------------------------------------------------

static matrix_view view(const void *data, size_t row) {
    return (matrix_view){data, RETROFIT_F32, row, 1};
}

static matrix_view transposed(matrix_view V) {
    return (matrix_view){V.data, V.type, V.col, V.row};
}

static matrix_view view_transposed(const void *data, size_t row) {
    return transposed(view(data, row));
}

// The part of a matrix that begins at (i, j).
static matrix_view view_part(matrix_view V, size_t i, size_t j) {
    V.data = (const char *)V.data + (i * V.row + j * V.col) * retrofit_type_size(V.type);
    return V;
}

typedef struct {
    size_t M, N, K;
    matrix_view A, B; // (M,K), (K,N)
    float *c;         // (M,N), rows c_row apart
    const float *d;   // (M,N), rows d_row apart; NULL: zero
    size_t c_row, d_row;
} matrix_product;

// M rows from row i, and N columns from column j.
INLINE matrix_product product_part(matrix_product p, size_t i, size_t M, size_t j, size_t N) {
    p.M = M;
    p.N = N;
    p.A = view_part(p.A, i, 0);
    p.B = view_part(p.B, 0, j);
    p.c += i * p.c_row + j;
    if (p.d) p.d += i * p.d_row + j;
    return p;
}

// Terms k … end - 1 of the sums; those before are in C already.
static matrix_product product_terms(matrix_product p, size_t k, size_t end) {
    p.K = end - k;
    p.A = view_part(p.A, 0, k);
    p.B = view_part(p.B, k, 0);
    if (k == 0) return p;
    p.d = p.c;
    p.d_row = p.c_row;
    return p;
}

// ---- Packing ------------------------------------------------------------------------------------

// One element, four, or a vector of them, as fp32. bf16 is the upper half of an fp32.
INLINE float load_one(const void *data, retrofit_type type, size_t at) {
    if (type == RETROFIT_F32) return ((const float *)data)[at];
    return retrofit_bf16_to_float(((const uint16_t *)data)[at]);
}

INLINE quad load_quad(const void *data, retrofit_type type, size_t at) {
    if (type == RETROFIT_F32) return *(const quad_at *)((const float *)data + at);
    quad_bits bits;
    UNROLL(l, 4) bits[l] = ((const uint16_t *)data)[at + l];
    return (quad)(bits << 16);
}

INLINE vector load_vector(const void *data, retrofit_type type, size_t at) {
    if (type == RETROFIT_F32) return *(const vector_at *)((const float *)data + at);
    vector_bits bits;
    UNROLL(l, VECTOR) bits[l] = ((const uint16_t *)data)[at + l];
    return (vector)(bits << 16);
}

INLINE void transpose_quads(quad q[4]) {
    quad a = __builtin_shufflevector(q[0], q[1], 0, 4, 1, 5);
    quad b = __builtin_shufflevector(q[2], q[3], 0, 4, 1, 5);
    quad c = __builtin_shufflevector(q[0], q[1], 2, 6, 3, 7);
    quad d = __builtin_shufflevector(q[2], q[3], 2, 6, 3, 7);
    q[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
    q[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
    q[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
    q[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// Elements (i … i + 3, k … k + 3) of V, which has k contiguous, into a panel as described at pack.
INLINE void pack_4x4(float *panel, size_t width, matrix_view V, retrofit_type type, size_t i,
                     size_t k) {
    quad q[4];
    UNROLL(r, 4) q[r] = load_quad(V.data, type, (i + r) * V.row + k);
    transpose_quads(q);
    UNROLL(r, 4) *(quad_at *)(panel + (k + r) * width + i) = q[r];
}

// Elements (i … count - 1, k) of V, and zeros up to the panel's width.
INLINE void pack_row(float *row, size_t width, matrix_view V, retrofit_type type, size_t i,
                     size_t count, size_t k) {
    if (V.row == 1) {
        const size_t at = k * V.col;
        for (; i + VECTOR <= count; i += VECTOR)
            *(vector_at *)(row + i) = load_vector(V.data, type, at + i);
        for (; i + 4 <= count; i += 4) *(quad_at *)(row + i) = load_quad(V.data, type, at + i);
    }
    for (; i < count; i++) row[i] = load_one(V.data, type, i * V.row + k * V.col);
    for (; i < width; i++) row[i] = 0;
}

// panel[k·width + i] = V(i, k) for k < depth and i < count, and 0 for count ≤ i < width. V is A, or B
// transposed. What has k contiguous goes in blocks of 4x4, along k by whole cache lines: rows a power
// of two apart compete for the same few places in the cache, and would be gone when we came back.
INLINE void pack_as(retrofit_type type, float *panel, size_t width, matrix_view V, size_t count,
                    size_t depth) {
    enum { LINE = 16 };
    size_t i4 = V.col == 1 ? count / 4 * 4 : 0, k4 = depth / 4 * 4; // where such blocks end
    for (size_t line = 0; line < k4; line += LINE)
        for (size_t i = 0; i < i4; i += 4)
            for (size_t k = line; k < retrofit_min(line + LINE, k4); k += 4)
                pack_4x4(panel, width, V, type, i, k);
    for (size_t k = i4 == width ? k4 : 0; k < depth; k++)
        pack_row(panel + k * width, width, V, type, k < k4 ? i4 : 0, count, k);
}

static void pack(float *panel, size_t width, matrix_view V, size_t count, size_t depth) {
    if (V.type == RETROFIT_F32) pack_as(RETROFIT_F32, panel, width, V, count, depth);
    else pack_as(RETROFIT_BF16, panel, width, V, count, depth);
}

// ---- Many rows ----------------------------------------------------------------------------------

// The first n of a vector's elements, if it has more.
INLINE void copy_floats(void *to, const void *from, size_t n) {
    if (n >= VECTOR) *(vector_at *)to = *(const vector_at *)from;
    else memcpy(to, from, n * sizeof(float));
}

// C(i, j …) = D(i, j …) + sum.
INLINE void store_vector(matrix_product p, size_t i, size_t j, vector sum) {
    vector start = {0};
    if (p.d) copy_floats(&start, p.d + i * p.d_row + j, p.N - j);
    start += sum;
    copy_floats(p.c + i * p.c_row + j, &start, p.N - j);
}

// C = D + A·B for a tile of MR rows and `vectors` registers of columns, from column j on. All MR rows
// of A can be read; of C those rows and columns are stored that exist.
INLINE void micro_kernel(size_t vectors, matrix_product p, size_t j) {
    const float *a = p.A.data, *b = packed_b + j * p.K;
    vector sum[MR][3] = {{{0}}};
    for (size_t k = 0; k < p.K; k++) {
        UNROLL(i, MR) UNROLL(v, vectors)
            sum[i][v] += a[i * p.A.row] * *(const vector_at *)(b + v * VECTOR);
        a += p.A.col;
        b += vectors * VECTOR;
    }
    UNROLL(v, vectors) {
        UNROLL(i, MR) if (i < p.M && j < p.N) store_vector(p, i, j, sum[i][v]);
        j += VECTOR;
    }
}

// Loop jr: MR rows meet the panels of a packed strip of B. Not inlined: in a larger function gcc runs
// out of registers for the micro-kernel's addresses.
static void multiply_panels(matrix_product p) {
    for (size_t j = 0; j < p.N; j += NR) {
        if (p.N - j > 2 * VECTOR) micro_kernel(3, p, j);
        else if (p.N - j > VECTOR) micro_kernel(2, p, j);
        else micro_kernel(1, p, j);
    }
}

// Loop ir: one block of terms of one strip. A is packed unless all MR rows are there and so few panels
// that reading them in place costs no more.
static __attribute__((noinline)) void multiply_strip(matrix_product p) {
    for (size_t j = 0; j < p.N; j += NR) {
        size_t n = retrofit_min(NR, p.N - j), width = ceil_of(n, VECTOR) * VECTOR;
        pack(packed_b + j * p.K, width, transposed(view_part(p.B, 0, j)), n, p.K);
    }
    for (size_t i = 0; i < p.M; i += MR) {
        matrix_product rows = product_part(p, i, retrofit_min(MR, p.M - i), 0, p.N);
        if (rows.M < MR || p.N > 2 * NR || p.A.type != RETROFIT_F32) {
            pack(packed_a, MR, rows.A, rows.M, p.K);
            rows.A = view_transposed(packed_a, MR);
        }
        multiply_panels(rows);
    }
}

// Loops jc and pc.
static void many_rows(matrix_product p) {
    size_t blocks = p.K ? ceil_of(p.K, KC) : 1;
    size_t NC = B_BUFFER / (p.K / blocks + 1) / VECTOR * VECTOR;
    for (size_t j = 0; j < p.N; j += NC) {
        matrix_product strip = product_part(p, 0, p.M, j, retrofit_min(NC, p.N - j));
        for (size_t block = 0; block < blocks; block++)
            multiply_strip(product_terms(strip, block * p.K / blocks, (block + 1) * p.K / blocks));
    }
}

// ---- Few rows -----------------------------------------------------------------------------------

// The lanes of four vectors added up, the total of sum[s] in element s.
INLINE quad add_lanes(const vector sum[4]) {
    quad q[4], part[VECTOR / 4];
    UNROLL(s, 4) {
        memcpy(part, &sum[s], sizeof part);
        q[s] = part[0];
        for (size_t l = 1; l < VECTOR / 4; l++) q[s] += part[l];
    }
    transpose_quads(q);
    return (q[0] + q[1]) + (q[2] + q[3]);
}

// Up to `rows` rows of C, from row i on, and up to 4 columns from j on. A is packed row by row, and B is
// read in place.
INLINE void dots(size_t rows, retrofit_type type, matrix_product p, size_t i, size_t j) {
    const float *a = packed_b + i * p.K;
    vector sum[4][4] = {{{0}}}; // of each row and column, a partial sum in every lane
    size_t column[4], k = 0;
    UNROLL(s, 4) column[s] = retrofit_min(j + s, p.N - 1) * p.B.col; // past the end: the last again
    for (; k + VECTOR <= p.K; k += VECTOR) {
        vector w[4];
        UNROLL(s, 4) {
            // A column is too short for the processor to find out by itself what to fetch ahead. We
            // ask for the one 8 columns on; asking for what does not exist does no harm.
            size_t ahead = (column[s] + 8 * p.B.col + k) * (type == RETROFIT_F32 ? 4 : 2);
            __builtin_prefetch((const char *)p.B.data + ahead, 0, 2);
            w[s] = load_vector(p.B.data, type, column[s] + k);
        }
        UNROLL(r, rows) {
            vector x = *(const vector_at *)(a + r * p.K + k);
#ifdef __x86_64__
            __asm__("" : "+v"(x)); // stays in a register: gcc 12 would load it again for every use
#endif
            UNROLL(s, 4) sum[r][s] += w[s] * x;
        }
    }
    UNROLL(r, rows) {
        quad lanes = add_lanes(sum[r]);
        for (size_t s = 0; s < retrofit_min(4, p.N - j) && r < p.M - i; s++) {
            float total = lanes[s];
            for (size_t l = k; l < p.K; l++)
                total += a[r * p.K + l] * load_one(p.B.data, type, column[s] + l);
            float start = p.d ? p.d[(i + r) * p.d_row + j + s] : 0;
            p.c[(i + r) * p.c_row + j + s] = start + total;
        }
    }
}

// The dot products of all rows of A with all columns of B, whose elements are contiguous.
INLINE void few_rows_as(size_t rows, retrofit_type type, matrix_product p) {
    for (size_t j = 0; j < p.N; j += 4)
        for (size_t i = 0; i < p.M; i += rows) dots(rows, type, p, i, j);
}

static void few_rows(matrix_product p) {
    pack(packed_b, p.K, transposed(p.A), p.K, p.M); // A, row by row
    if (p.M == 1 && p.B.type == RETROFIT_F32) few_rows_as(1, RETROFIT_F32, p);
    else if (p.M == 1) few_rows_as(1, RETROFIT_BF16, p);
    else if (p.B.type == RETROFIT_F32) few_rows_as(MR / 2, RETROFIT_F32, p);
    else few_rows_as(MR / 2, RETROFIT_BF16, p);
}

// ---- The whole product --------------------------------------------------------------------------

static void multiply(matrix_product p) {
    if (p.M <= FEW && p.B.row == 1 && p.K <= B_BUFFER / FEW) few_rows(p);
    else many_rows(p);
}

static void gemm_serial(size_t M, size_t N, size_t K, matrix_view A, matrix_view B, float *c,
                        size_t c_row, const float *d, size_t d_row) {
    multiply((matrix_product){M, N, K, A, B, c, d, c_row, d_row});
}

// How many threads are worth waking for so many multiply-adds.
static size_t gemm_threads(size_t work) {
#ifdef _OPENMP
    if (work >= 65536 && !omp_in_parallel()) return (size_t)omp_get_max_threads();
#endif
    (void)work;
    return 1;
}

// Where part number `index` begins if units of `size` elements are divided into `parts`.
static size_t part_begin(size_t index, size_t units, size_t parts, size_t size) {
    return index * units / parts * size;
}

// C is cut into a grid, `down` x `across` parts that are about square rather than wide. None is so low
// that it would go the way of few rows if C as a whole does not: at least 3·MR rows.
static void gemm(size_t M, size_t N, size_t K, matrix_view A, matrix_view B, float *c, size_t c_row,
                 const float *d, size_t d_row) {
    matrix_product p = {M, N, K, A, B, c, d, c_row, d_row};
    size_t threads = gemm_threads(M * N * K);
    if (threads == 1) {
        multiply(p);
        return;
    }
    size_t rows = ceil_of(M, MR), columns = ceil_of(N, VECTOR), down = 1;
    for (size_t x = 2; x <= retrofit_min(threads, rows / 3); x++)
        if (threads % x == 0 && x * x * N <= threads * M) down = x;
    size_t across = threads / down; // times a whole number, so that none is wider than 512
    across = retrofit_min(columns, across * ceil_of(N, across * 512));
    PARALLEL_TASKS
    for (size_t t = 0; t < down * across; t++) {
        size_t i = part_begin(t / across, rows, down, MR);
        size_t i_end = retrofit_min(M, part_begin(t / across + 1, rows, down, MR));
        size_t j = part_begin(t % across, columns, across, VECTOR);
        size_t j_end = retrofit_min(N, part_begin(t % across + 1, columns, across, VECTOR));
        multiply(product_part(p, i, i_end - i, j, j_end - j));
    }
}

// ---- Attention in tiles -------------------------------------------------------------------------
// FlashAttention-2 (Dao, arXiv 2307.08691). Of the scores of T queries and T keys one tile exists at a
// time, and those above the diagonal never do:
//
//                     keys u
//                 ┌────┬────┬────┐
//                 │ ◣  │    │    │      forward: a task is a row of tiles, from left to right
//       queries t ├────┼────┼────┤
//                 │ ██ │ ◣  │    │      backward: a task is all tiles of the query heads that share a
//                 ├────┼────┼────┤      key/value head, whose dk and dv it adds up in a fixed order
//                 │ ██ │ ██ │ ◣  │
//                 └────┴────┴────┘
//
// Forward keeps for each query the maximum m of the scores so far, l = Σ e^{s - m} and o = Σ e^{s - m}·v.
// A tile that raises the maximum to m' first scales l and o by e^{m - m'}. At the end y = o/l, and
// lse = m + log l. The products are gemm_serial's: the threads have a task each.

// A tile's row of scores becomes e^{(score - max)·scale} for the first `seen` keys, which the query may
// see, and 0 for the rest. Updates its maximum and sum; returns the factor by which to scale what was
// summed up under the old maximum. The sum ends at `seen`, not at the tile's width: a query's bits do
// not depend on how many others come with it.
static float softmax_row(float *p, size_t seen, size_t width, float scale, float *max, float *sum) {
    float tile_max = max_element(p, seen), new_max = tile_max > *max ? tile_max : *max;
    float shrink = fast_exp((*max - new_max) * scale);
    for (size_t u = 0; u < seen; u++) p[u] = fast_exp((p[u] - new_max) * scale);
    memset(p + seen, 0, (width - seen) * sizeof *p);
    *sum = add_up(*sum * shrink, p, seen);
    *max = new_max;
    return shrink;
}

// One row of tiles: y (rows,h) and, unless NULL, lse, each with rows y_row and lse_row apart. q (rows,h)
// begins at its first query, which sees `before` keys besides its own; k and v begin at key 0.
static void attend(float *y, size_t y_row, float *lse, size_t lse_row, matrix_view q, matrix_view k,
                   matrix_view v, size_t rows, size_t before, size_t h) {
    float s[TILE * TILE], max[TILE], sum[TILE], scale = 1.0f / sqrtf((float)h);
    size_t keys = before + rows;
    for (size_t i = 0; i < rows; i++) {
        max[i] = -INFINITY;
        sum[i] = 0;
        memset(y + i * y_row, 0, h * sizeof *y);
    }
    for (size_t u = 0; u < keys; u += TILE) {
        size_t width = retrofit_min(keys - u, TILE);
        // (1) the tile's scores, q·kᵀ
        gemm_serial(rows, width, h, q, transposed(view_part(k, u, 0)), s, TILE, NULL, 0);
        // (2) e^{s - m}, and what was summed up so far under the new maximum
        for (size_t i = 0; i < rows; i++) {
            size_t end = before + i + 1; // of the keys that query i sees
            size_t seen = end > u ? retrofit_min(end - u, width) : 0;
            float shrink = softmax_row(s + i * TILE, seen, width, scale, &max[i], &sum[i]);
            for (size_t c = 0; c < h; c++) y[i * y_row + c] *= shrink;
        }
        // (3) the tile's share of the output
        gemm_serial(rows, h, width, view(s, TILE), view_part(v, u, 0), y, y_row, y, y_row);
    }
    for (size_t i = 0; i < rows; i++) {
        for (size_t c = 0; c < h; c++) y[i * y_row + c] /= sum[i];
        if (lse) lse[i * lse_row] = max[i] * scale + logf(sum[i]);
    }
}

// p = e^{s·scale - lse} and ds = p·(dp - delta)·scale in place of s and dp, for the keys that the query
// sees; 0 for the rest.
static void softmax_backward_row(float *p, float *ds, size_t seen, size_t width, float scale,
                                 float lse, float delta) {
    for (size_t u = 0; u < seen; u++) p[u] = fast_exp(p[u] * scale - lse);
    for (size_t u = 0; u < seen; u++) ds[u] = p[u] * (ds[u] - delta) * scale;
    memset(p + seen, 0, (width - seen) * sizeof *p);
    memset(ds + seen, 0, (width - seen) * sizeof *ds);
}

// What queries t … and keys u … of a tile add to dq, dk and dv.
static void attend_backward_tile(const attention_head *a, size_t t, size_t u) {
    float p[TILE * TILE], ds[TILE * TILE], scale = 1.0f / sqrtf((float)a->h);
    size_t rows = retrofit_min(a->T - t, TILE), width = retrofit_min(t + rows - u, TILE);
    size_t h = a->h, Q = a->Q;
    matrix_view q = view_part(a->q, t, 0), dy = view_part(a->dy, t, 0);
    matrix_view k = view_part(a->k, u, 0), v = view_part(a->v, u, 0);
    float *dq = a->dq + t * Q, *dk = a->dk + u * Q, *dv = a->dv + u * Q;
    // (1) s = q·kᵀ, (2) dp = dy·vᵀ, (3) p and ds
    gemm_serial(rows, width, h, q, transposed(k), p, TILE, NULL, 0);
    gemm_serial(rows, width, h, dy, transposed(v), ds, TILE, NULL, 0);
    for (size_t i = 0; i < rows; i++) {
        size_t seen = retrofit_min(t + i + 1 - u, width), at = (t + i) * a->H;
        softmax_backward_row(p + i * TILE, ds + i * TILE, seen, width, scale, a->lse[at],
                             a->delta[at]);
    }
    // (4) dv += pᵀ·dy, dk += dsᵀ·q, dq += ds·k
    gemm_serial(width, h, rows, view_transposed(p, TILE), dy, dv, Q, dv, Q);
    gemm_serial(width, h, rows, view_transposed(ds, TILE), q, dk, Q, dk, Q);
    gemm_serial(rows, h, width, view(ds, TILE), k, dq, Q, dq, Q);
}

static void attend_backward(const attention_head *head) {
    for (size_t t = 0; t < head->T; t += TILE)
        for (size_t u = 0; u <= t; u += TILE) attend_backward_tile(head, t, u);
}

// =================================================================================================
// 11  JSON, tokenizer
// =================================================================================================

size_t retrofit_utf8_next(const char *s, size_t n, uint32_t *c) {
    unsigned lead = (unsigned char)s[0];
    if (lead < 0x80) return *c = lead, 1;
    size_t more = lead < 0xc2 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : lead < 0xf5 ? 3 : 0;
    // The second byte's range is narrower where the full one would allow overlong forms, surrogates or values above U+10FFFF.
    unsigned low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80, high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    *c = more ? lead & (0x3fu >> more) : RETROFIT_UTF8_INVALID;
    for (size_t i = 1; i <= more; i++, low = 0x80, high = 0xbf) {
        unsigned byte = i < n ? (unsigned char)s[i] : 0;
        if (byte < low || byte > high) return *c = RETROFIT_UTF8_INVALID, i;
        *c = *c << 6 | (byte & 0x3f);
    }
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

// The parser works on its own copy of the text, with a NUL behind it, and decodes strings in place: `out` never overtakes `at`.
typedef struct {
    const char *where, *begin;
    char *at, *out;       // the next character to read; where the next decoded string goes
    retrofit_json *nodes; // the next free one
} json_parser;

static bool json_fail(const json_parser *p, const char *why) { return retrofit_fail("%s: byte %td: bad JSON: %s", p->where, p->at - p->begin, why); }

static char json_skip(json_parser *p) { // white space; the character behind it
    while (*p->at == ' ' || *p->at == '\t' || *p->at == '\r' || *p->at == '\n') p->at++;
    return *p->at;
}

static bool json_escape(json_parser *p, uint32_t *c) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    const char *name = p->at[1] ? strchr(names, p->at[1]) : NULL;
    if (name) return p->at += 2, *c = (uint32_t)values[name - names], true;
    uint32_t unit[2] = {0, 0}; // UTF-16; the second only behind the first half of a pair
    for (int i = 0; i == 0 || (i == 1 && unit[0] >> 10 == 0xd800 >> 10); i++, p->at += 6) {
        bool ok = p->at[0] == '\\' && p->at[1] == 'u' && strspn(p->at + 2, "0123456789abcdefABCDEF") >= 4;
        if (!ok) return json_fail(p, "an unknown escape, or half of a surrogate pair");
        for (int j = 2; j < 6; j++) unit[i] = unit[i] << 4 | ((p->at[j] & 15) + (p->at[j] > '9' ? 9 : 0));
    }
    *c = unit[0];
    if (*c < 0xd800 || *c > 0xdfff) return true;
    *c = 0x10000 + ((unit[0] - 0xd800) << 10) + (unit[1] - 0xdc00);
    return unit[1] >> 10 == 0xdc00 >> 10 || json_fail(p, "half of a surrogate pair before this");
}

static bool json_string(json_parser *p, const char **string, size_t *length) {
    if (*p->at != '"') return json_fail(p, "expected a string");
    *string = p->out;
    uint32_t c = 0;
    for (p->at++; *p->at != '"';) {
        if ((unsigned char)*p->at < ' ') return json_fail(p, "a string does not end, or a control character in it is not escaped");
        if (*p->at != '\\') *p->out++ = *p->at++;
        else if (json_escape(p, &c)) p->out += utf8_put(c, p->out);
        else return false;
    }
    *length = (size_t)(p->out - *string);
    *p->out++ = 0;
    return p->at++, true;
}

static bool json_number(json_parser *p, retrofit_json *v) {
    static const char digits[] = "0123456789";
    char *text = p->out, *end;
    size_t n = strspn(p->at, "0123456789+-.eE");
    memmove(text, p->at, n), text[n] = 0;
    v->type = RETROFIT_JSON_NUMBER, v->string = text, v->length = n, v->number = strtod(text, &end);
    // What strtod takes and JSON does not: leading zeros or '+', no digit before or behind the point.
    const char *first = text + (*text == '-'), *point = strchr(text, '.');
    size_t whole = strspn(first, digits);
    if (*end || !whole || (whole > 1 && *first == '0') || (point && !strspn(point + 1, digits)) || !isfinite(v->number))
        return json_fail(p, "not a value, or a number too large for a double (or LC_NUMERIC is not \"C\")");
    return p->at += n, p->out += n + 1, true;
}

// Any value; v is zeroed. The depth bounds the recursion.
static bool json_value(json_parser *p, retrofit_json *v, int depth) {
    static const char *const words[] = {"null", "false", "true"};
    char c = json_skip(p);
    if (c == '"') return v->type = RETROFIT_JSON_STRING, json_string(p, &v->string, &v->length);
    for (int i = 0; i < 3; i++)
        if (!strncmp(p->at, words[i], strlen(words[i])))
            return p->at += strlen(words[i]), v->type = i ? RETROFIT_JSON_BOOL : RETROFIT_JSON_NULL, v->number = i == 2, true;
    if (c != '[' && c != '{') return json_number(p, v);
    if (depth == 64) return json_fail(p, "more than 64 levels");
    char object = c == '{', close = object ? '}' : ']';
    p->at++, v->type = object ? RETROFIT_JSON_OBJECT : RETROFIT_JSON_ARRAY;
    if (json_skip(p) == close) return p->at++, true;
    for (retrofit_json **tail = &v->child; c != close; tail = &(*tail)->next, p->at++) {
        retrofit_json *child = *tail = p->nodes++;
        v->count++, json_skip(p);
        if (object && !json_string(p, &child->key, &child->key_length)) return false;
        if (object && json_skip(p) != ':') return json_fail(p, "expected ':'");
        p->at += object;
        if (!json_value(p, child, depth + 1)) return false;
        c = json_skip(p);
        if (c != ',' && c != close) return json_fail(p, object ? "expected ',' or '}'" : "expected ',' or ']'");
    }
    return true;
}

// All is one block: the nodes, at most one for each opening bracket and comma, and one more; then the text. It starts a byte late, so
// that a number has room for its NUL: before every other one, a bracket, comma or colon has been read.
retrofit_json *retrofit_json_parse(const char *text, size_t size, const char *where) {
    size_t nodes = 1;
    for (size_t i = 0; i < size;) {
        uint32_t c;
        size_t n = retrofit_utf8_next(text + i, size - i, &c);
        if (c == RETROFIT_UTF8_INVALID) return retrofit_fail("%s: byte %zu: bad JSON: not UTF-8", where, i), (retrofit_json *)NULL;
        nodes += c == '[' || c == '{' || c == ',', i += n;
    }
    retrofit_json *root = (retrofit_json *)retrofit_allocate(nodes + (size + 2) / sizeof *root + 1, sizeof *root);
    if (!root) return NULL;
    char *out = (char *)(root + nodes), *begin = (char *)memcpy(out + 1, text, size);
    json_parser p = {where, begin, begin, out, root + 1};
    if (json_value(&p, root, 0) && (json_skip(&p), p.at == begin + size || json_fail(&p, "something follows the value"))) return root;
    return free(root), (retrofit_json *)NULL;
}

void retrofit_json_free(retrofit_json *root) { free(root); }

const retrofit_json *retrofit_json_get(const retrofit_json *object, const char *key) {
    const retrofit_json *m = object && object->type == RETROFIT_JSON_OBJECT ? object->child : NULL;
    while (m && (m->key_length != strlen(key) || memcmp(m->key, key, m->key_length))) m = m->next;
    return m;
}

bool retrofit_json_is(const retrofit_json *j, const char *word) { return j && j->type == RETROFIT_JSON_STRING && !strcmp(j->string, word); }

// A JSON number that is a size.
bool retrofit_json_size(const retrofit_json *j, size_t *out) {
    if (!j || j->type != RETROFIT_JSON_NUMBER || j->number < 0 || j->number > 0x1p53 || j->number != floor(j->number)) return false;
    return *out = (size_t)j->number, true;
}

// Writes n bytes of UTF-8 to f as a quoted, escaped JSON string; failures show in ferror(f).
void retrofit_json_write_string(FILE *f, const char *s, size_t n) {
    fputc('"', f);
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)s[i] < 0x20) fprintf(f, "\\u%04x", s[i]);
        else fprintf(f, s[i] == '"' || s[i] == '\\' ? "\\%c" : "%c", s[i]);
    fputc('"', f);
}

// ---- Tokenizer
// Unicode 16's \p{L}, \p{N} and \s in run lengths: so many code points outside the class, so many inside, and so on; each number in base
// 26, its last digit a capital.
// clang-format off
static const char *const tok_runs[] = {
    "cNbAGbAbVBKBEBFXBbFBrQEMOFHBBBeZFBCCEBBGBBDBBBUBdFBfJIgKBbMCBGbPcTbBEEbTbRbJCBdVBBPCHCKDCBQBBbEbDdLLBYbHJCEBFWEBJBDBXZHLFYBGRbQcGcCDB"
    "SBHKPQEICCCWBHBBDEDBQBNCBDOCKBIGECCWBHBCBCBCbFEBBTDQJBDBWBHBCBFDBSBPCXBLICCCWBHBCBFDBbECBDPBRBBGDDBEDCBBBCDCDDDMWBcAIBDBXBQDBbADCBCCb"
    "EBEIBDBXBKBFDBbFCBCPCRJBDBbPCBQBFDIDYGFSDYBJBBCHcGbWBCMHcGCBBBFBYBBBKBCJBCFBBVEbGBcLIBbKbBFeLbRUBQGEEDBDCHDENMBRbMBBFBCbRBmVBECHBBBEC"
    "bPBECbHBECHBBBECPBcFBECcPbLQQdICGDxWCRBbAFcXGIHSNTOSONBDPcAbJBEBcPdLHFCbIBBFcSKbFbXbECFLbSEbAcCXJcBdEBdPbVRIcCbENCKbSbAbKbPDKbKCLFbRC"
    "DbPEBGBCDBFhKcMkSCGCbMCGCIBBBBBBBbFCcBBHBBDDBHDECGENFDBHeMBNBQNdXBEBCKBBDFGBBBBBBEBLCEFFEBcACdzFiVGEDCMbMBBFBCcEHBQXJHBHBHBHBHBHBHBHd"
    "CBsBCbQFFCEdIGDBdMBEFbRBdQRbGbWQtSjtOcMbguFcPbUCkJDQKCUbVQbFCcSbXJCdZCcPCCBBBIVQBDBEBXbDcAObYcKGDBBCLbCKXZbDHbVbCBQFBKKFBbPXDBIUXDBDb"
    "YBBDCCFCBBBYDCLHDMGCGCGJHBHBbRBOGeLbDqnSMXEbXmnCoCCeCbMHMFFBBKBNBFBBBCBCBeEbHnZScMCcCbOMeMFBfFbKbAGbALdLDGCGCGCDbJMBbABTBCBPCObIeToZb"
    "DDbXbVbGNUBIGbMKbECbKEIbWgCSbKEbKEbOIcAMLBPBHBCBLBPBHBCDcAMlZJWKIYGBbQBJcRGCBBbSBCDBCXKXJbFcNTBCKWKbAcScEGCcMBPEBDBbDbQbDDbDbJIBbCbBc"
    "CKWKTNSeGcVcDbZNbZNbKbMbCJXjQbQGCQDcHbDKBIWbQSbUVbBXMcBcFCCBNbTbGZbAbKbDBCBIbJDBMbWOEVBBBbJSBZTCcLHBBBEBPBKHbVbMICCCWBHBCBFDBSBMFbEKB"
    "BCBBbMBBZBBBbScBSEUDbEbWUCBBhCbVbPEbKbWUBcHbRNBcTbBbLHhDbSeMcMbFICBCIBCBYPBBBdQICbNQBBBbCBKbOHBVBLbUTBScVhRbHbFJBbLRBbXbEeIHBCBbMVBZG"
    "BCBbGOBmPTPBBNBbIeUBdBbjMiWhOdxKdTPbpGRGZfxRFwLkdDbEcpUvXHbFRdBRbESbWQEbFVFTqQbTiDcMeYcXFBcONcMCBBbCjcAIbvQbPKnfREBHBCBlFPBbDDCBOEIpG"
    "dkUeDFNDJHKiwKdHBcTBCCBCCCEBMBBBHBcNBECIBHBbCBEBFBBDHBnCCZBZBbFBZBbFBZBbFBZBbFBZBIcsYbFGGkBcKfQbTKHQBmJbESbSsQbCiUbECBtBHBEBCBPBhPcHc"
    "QHBbuIEBbBBCBBCBBKBEBBBBGBEBBBBBBDBCBBCBBBBBBBBBBCBBCEBHBEBEBBBKBRFDBFBRgoAclfCbGgdUGiOCinQOlbLPxYdqWuWcfYhhZFgfG",
    "bWKeQCFBCDcdLKfEKhQKpWKeOKEGeEKeOKeOKCGeGNeLKIHdZKeAHHTeFKdSKeOKcSUkIKcSKbbRUbhXDjFKGKWKlOKeYLgJKGKhAKdIKfEKGKboGBDGGKhQbZCFbbYcIdAWy"
    "GbEcbHBbdXBZJODnFEfIKbEIBPbGKbNPbrsAKhGKmIGfYKbMKhQKWKdIKpQKbfmCKsZbTMcFRCnDbBbKEbDBIBfEFhUKbkGIZHbNJcXFWGgECCQCbUcMJcACbEDcXFeAIYIbP"
    "HmSGbWKGKkSbFgCKbQEeIHfEbEeYKcIKfOKHUjRKnEKeOKoKKdYKGUcYMqETdPKzMKdIbDiTKcSKqGKdYVbpBeHxaFKdmCKdIKfEKBHuGKkCXbjsZKceWUMUeEZbqRbYdnCKq"
    "GKtIKjNKbbOJeYKbeLcHBDBEcYbTBPblANedFK",
    "JFSBdWBbABihJBdpNLbDCFBbVBfxWB"};
// clang-format on

enum { TOK_LETTER = 1, TOK_NUMBER = 2, TOK_WHITE = 4, TOK_MAX_ID = 1 << 22, TOK_MAX_PROBE = 1024, TOK_MAX_SPECIALS = 16 };
#define TOK_MARK "▁" // SentencePiece's space, U+2581

// All that may happen to text before and after BPE, in the only order there may be: the roles are the members of tokenizer.json, each a
// step or a Sequence of steps; a step is known by its type and these settings.
enum { TOK_PREPEND, TOK_REPLACE, TOK_DIGITS, TOK_GPT2, TOK_QWEN2, TOK_LLAMA3, TOK_BYTES, TOK_GPT2_BYTES };
enum { TOK_UNREPLACE = TOK_GPT2_BYTES + 1, TOK_BYTE_FALLBACK, TOK_FUSE, TOK_STRIP, TOK_UNBYTES, TOK_OFFSETS, TOK_TEMPLATE, TOK_STEPS };
static const char *const tok_roles[] = {"normalizer", "pre_tokenizer", "decoder", "post_processor"};
static const char *const tok_lists[] = {"normalizers", "pretokenizers", "decoders", "processors"};
// clang-format off
#define TOK_SPLIT(pattern) {1, "Split", {"behavior", "Isolated", "invert", "false", "Regex", pattern}}
#define TOK_PATTERN(digits) "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" digits \
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
static const struct { int role; const char *type, *settings[7]; } tok_steps[TOK_STEPS] = {
    {0, "Prepend", {"prepend", TOK_MARK}}, {0, "Replace", {"String", " ", "content", TOK_MARK}},
    {1, "Digits", {"individual_digits", "true"}}, // each digit for itself
    TOK_SPLIT("'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"),
    TOK_SPLIT(TOK_PATTERN("\\p{N}")), TOK_SPLIT(TOK_PATTERN("\\p{N}{1,3}")),
    {1, "ByteLevel", {"add_prefix_space", "false", "use_regex", "false"}}, // bytes to printable characters
    {1, "ByteLevel", {"add_prefix_space", "false"}},                       // with GPT-2's pattern before that
    {2, "Replace", {"String", TOK_MARK, "content", " "}}, {2, "ByteFallback", {NULL}}, // tokens like <0x0A> to bytes
    {2, "Fuse", {NULL}}, {2, "Strip", {"content", " ", "start", "1", "stop", "0"}},    // a space off the front
    {2, "ByteLevel", {NULL}}, {3, "ByteLevel", {NULL}}, {3, "TemplateProcessing", {NULL}}}; // the second does nothing here

// text: NULL if no token has the id. model: BPE may produce it; not so for most added tokens.
typedef struct { const char *text; size_t size; bool model, added, special; } tok_token;
// key: first byte, + 256 if the token is to be found in normalized text, where its own text is normalized too.
typedef struct { const char *text; size_t size; int32_t id, key; } tok_added;
typedef struct { uint64_t pair; uint32_t rank; int32_t id; } tok_merge; // pair: left id << 32 | right id; rank: 1 and up, 0 is a free slot
typedef struct { int32_t id; uint32_t previous, next; } tok_symbol;     // id -1: merged into the one before
typedef struct { uint64_t order; int32_t id; } tok_candidate;           // order: rank << 32 | position, lowest rank first, then leftmost
typedef struct {
    const retrofit_tokenizer *t; retrofit_text text, normal, piece, ids;
    tok_symbol *symbols; tok_candidate *heap; size_t room, heap_count; uint32_t symbol_count; // room: for a piece of so many bytes
} tok_encoder;
// clang-format on

struct retrofit_tokenizer {
    char *strings;                      // what tokens point to
    tok_token *tokens;                  // by id
    int32_t *by_text;                   // open-addressed hash table of id + 1; token_mask is its size - 1
    tok_merge *merges;                  // the same by pair
    tok_added *added;                   // sorted by key, the longest first; those with key k are first[k] to first[k + 1]
    uint8_t *classes;                   // by code point
    uint16_t chars[256], bytes_of[324]; // of the byte-level alphabet, and back, + 1
    size_t strings_used, size, token_mask, merge_mask, first[513], before_count, after_count;
    int32_t before[TOK_MAX_SPECIALS], after[TOK_MAX_SPECIALS], bos, eos, unk;           // before, after: what with_special adds
    int32_t byte_ids[256];                                                              // of tokens like <0x0A>, + 1
    bool has[TOK_STEPS], split, bytes, decodes, fuse_unk, byte_fallback, ignore_merges; // decodes: if not, spaces go between tokens
    bool meet[256][256], bad; // meet: whether a merge joins text ending in the one byte to text beginning with the other
    int digits, last;         // digits: of the pattern, see tok_split. While loading: the last step, whether an error has been reported
    const char *where;        // (the first counts; what functions return after it does not matter), and the file
};

void retrofit_text_append(retrofit_text *out, const void *bytes, size_t n) {
    if (!out->failed && out->size + n >= out->room) {
        size_t room = out->room + out->room / 2 + n + 64;
        char *bigger = (char *)realloc(out->bytes, room);
        if (bigger) out->bytes = bigger, out->room = room;
        else out->failed = !retrofit_fail("out of memory: %zu bytes", room);
    }
    if (out->failed || !n) return;
    memcpy(out->bytes + out->size, bytes, n);
    out->size += n;
}

// Appends s with U+FFFD for what is not UTF-8; with `each` for each byte of s if any is not.
static void tok_put_valid(retrofit_text *out, const char *s, size_t n, bool each) {
    size_t start = out->size;
    uint32_t c = 0;
    for (size_t i = 0, k; i < n && !(each && c == RETROFIT_UTF8_INVALID); i += k) {
        k = retrofit_utf8_next(s + i, n - i, &c);
        retrofit_text_append(out, c == RETROFIT_UTF8_INVALID ? "\xef\xbf\xbd" : s + i, c == RETROFIT_UTF8_INVALID ? 3 : k);
    }
    if (!each || c != RETROFIT_UTF8_INVALID) return;
    for (out->size = start; n--;) retrofit_text_append(out, "\xef\xbf\xbd", 3);
}

// What Python's str.strip takes off both ends. (inline: not every program has text to strip.)
static inline bool is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

void retrofit_strip(const char **s, size_t *n) {
    uint32_t c;
    for (size_t k; *n && (k = retrofit_utf8_next(*s, *n, &c), is_space(c));) *s += k, *n -= k;
    for (size_t k; *n; *n -= k) {
        for (k = 1; k < 3 && k < *n && ((*s)[*n - k] & 0xc0) == 0x80;) k++;
        if (retrofit_utf8_next(*s + *n - k, k, &c) != k || !is_space(c)) break;
    }
}

// The byte that a token "<0x0A>" stands for, or -1.
static int tok_fallback_byte(const tok_token *k) {
    bool is = k->size == 6 && !memcmp(k->text, "<0x", 3) && k->text[5] == '>' && strspn(k->text + 3, "0123456789ABCDEF") == 2;
    return is ? (int)strtol(k->text + 3, NULL, 16) : -1;
}

// The length of the run of characters at the beginning of s that are in (or, if `out`, out of) the classes.
static size_t tok_run(const retrofit_tokenizer *t, const char *s, size_t n, int classes, bool out) {
    size_t i = 0;
    uint32_t c;
    for (size_t k; i < n && (k = retrofit_utf8_next(s + i, n - i, &c), !(t->classes[c] & classes) == out);) i += k;
    return i;
}

// The length of 's 't 'm 'd 're 've 'll at s, or 0. fold is (?i:...), to which long s (U+017F) is an s too.
static size_t tok_contraction(const char *s, size_t n, bool fold) {
    if (n < 2 || s[0] != '\'') return 0;
    if (fold && n > 2 && !memcmp(s + 1, "\xc5\xbf", 2)) return 3;
    int a = s[1] | (fold ? 32 : 0), b = n > 2 ? s[2] | (fold ? 32 : 0) : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

// The length of the pattern's match at s, n > 0, alternative by alternative; every character is in one. digits: 0 is GPT-2's
// pattern, 1 and 3 are Qwen 2's and Llama 3's with at most so many digits.
static size_t tok_split(const retrofit_tokenizer *t, const char *s, size_t n, int digits) {
    uint32_t c;
    size_t k = tok_contraction(s, n, digits != 0), first = retrofit_utf8_next(s, n, &c), lead = c == ' ';
    if (k) return k;
    int class_ = t->classes[c];
    size_t skip = !digits ? lead : class_ & (TOK_LETTER | TOK_NUMBER) || c == '\r' || c == '\n' ? 0 : first;
    if ((k = tok_run(t, s + skip, n - skip, TOK_LETTER, false))) return skip + k;
    if (!digits && (k = tok_run(t, s + lead, n - lead, TOK_NUMBER, false))) return lead + k;
    while (class_ & TOK_NUMBER && digits-- && k < n && (first = retrofit_utf8_next(s + k, n - k, &c), t->classes[c] & TOK_NUMBER)) k += first;
    if (k) return k;
    if ((k = tok_run(t, s + lead, n - lead, TOK_WHITE | TOK_LETTER | TOK_NUMBER, true))) {
        for (k += lead; digits && k < n && (s[k] == '\r' || s[k] == '\n');) k++;
        return k;
    }
    size_t white = tok_run(t, s, n, TOK_WHITE, false), last = white;
    for (k = white; digits && k; k--)
        if (s[k - 1] == '\r' || s[k - 1] == '\n') return k;
    while (((unsigned char)s[--last] & 0xc0) == 0x80) {}
    return white < n && last ? last : white; // the last space before a word goes with the word
}

// The slot of a token's text: its own, or the free one where it would go; NULL after MAX_PROBE steps: a file made to collide.
static int32_t *tok_text_slot(const retrofit_tokenizer *t, const char *s, size_t n) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++) hash = (hash ^ (unsigned char)s[i]) * 0x100000001b3u;
    for (size_t probe = 0; probe < TOK_MAX_PROBE; probe++) {
        int32_t *slot = &t->by_text[((hash ^ hash >> 29) + probe) & t->token_mask];
        if (!*slot || (t->tokens[*slot - 1].size == n && !memcmp(t->tokens[*slot - 1].text, s, n))) return slot;
    }
    return NULL;
}

// The id of a token, or -1; with `model` only if BPE may produce it.
static int32_t tok_find(const retrofit_tokenizer *t, const char *s, size_t n, bool model) {
    const int32_t *slot = tok_text_slot(t, s, n);
    return slot && *slot && (!model || t->tokens[*slot - 1].model) ? *slot - 1 : -1;
}

static tok_merge *tok_merge_slot(const retrofit_tokenizer *t, int32_t left, int32_t right) {
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right, hash = pair * 0x9e3779b97f4a7c15u;
    for (size_t probe = 0; probe < TOK_MAX_PROBE; probe++) {
        tok_merge *m = &t->merges[(size_t)((hash ^ hash >> 32) + probe) & t->merge_mask];
        if (!m->rank || m->pair == pair) return m;
    }
    return NULL;
}

static void tok_add_symbol(tok_encoder *e, int32_t id) {
    tok_symbol s = {id, e->symbol_count - 1, e->symbol_count + 1}; // for the first, previous is UINT32_MAX
    e->symbols[e->symbol_count++] = s;
}

// Queues the merge of the symbol at `at` with the next one, if there is such a merge.
static void tok_add_candidate(tok_encoder *e, uint32_t at) {
    if (at == UINT32_MAX || e->symbols[at].next >= e->symbol_count) return;
    const tok_merge *m = tok_merge_slot(e->t, e->symbols[at].id, e->symbols[e->symbols[at].next].id);
    if (!m || !m->rank) return;
    tok_candidate c = {(uint64_t)m->rank << 32 | at, m->id};
    size_t i = e->heap_count++;
    for (; i && e->heap[(i - 1) / 2].order > c.order; i = (i - 1) / 2) e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = c;
}

// Merges the lowest-ranked, leftmost pair of the symbols until none is left, and moves what remains to the ids.
static void tok_merge_symbols(tok_encoder *e) {
    for (uint32_t i = 0; i < e->symbol_count; i++) tok_add_candidate(e, i);
    while (e->heap_count) {
        tok_candidate best = e->heap[0], c = e->heap[--e->heap_count];
        size_t i = 0;
        for (size_t child; (child = 2 * i + 1) < e->heap_count; e->heap[i] = e->heap[child], i = child) {
            child += child + 1 < e->heap_count && e->heap[child + 1].order < e->heap[child].order;
            if (e->heap[child].order >= c.order) break;
        }
        e->heap[i] = c;
        uint32_t at = (uint32_t)best.order;
        tok_symbol *left = &e->symbols[at], *right = left->next < e->symbol_count ? &e->symbols[left->next] : NULL;
        const tok_merge *m = left->id >= 0 && right ? tok_merge_slot(e->t, left->id, right->id) : NULL;
        if (!m || !m->rank || m->id != best.id) continue; // outdated: one of the two has merged since
        left->id = best.id, left->next = right->next, right->id = -1;
        if (left->next < e->symbol_count) e->symbols[left->next].previous = at;
        tok_add_candidate(e, left->previous), tok_add_candidate(e, at);
    }
    for (size_t i = 0; i < e->symbol_count; i = e->symbols[i].next) retrofit_text_append(&e->ids, &e->symbols[i].id, sizeof(int32_t));
    e->symbol_count = 0;
}

// Byte-pair encoding of one piece. Characters without a token become byte tokens, the unknown token, or nothing, in that order.
static void tok_encode_piece(tok_encoder *e, const char *s, size_t n) {
    const retrofit_tokenizer *t = e->t;
    int32_t id = t->ignore_merges ? tok_find(t, s, n, true) : -1;
    if (id >= 0) return retrofit_text_append(&e->ids, &id, sizeof id);
    if (n > e->room) {
        free(e->symbols), free(e->heap);
        e->room = 2 * n; // no more symbols than bytes; each is queued once at first, and every merge queues two
        e->symbols = (tok_symbol *)retrofit_allocate(e->room, sizeof *e->symbols);
        e->heap = (tok_candidate *)retrofit_allocate(3 * e->room, sizeof *e->heap);
    }
    if (!e->symbols || !e->heap || (n >= UINT32_MAX && !retrofit_fail("4 GB in one piece: encode the text in parts"))) e->ids.failed = true;
    bool known = false, unknown = false; // an unknown token is due before the next known one; bytes overtake it, as in Hugging Face's
    for (size_t i = 0, k; i < n && !e->ids.failed; i += k) {
        uint32_t c;
        k = retrofit_utf8_next(s + i, n - i, &c);
        if ((id = tok_find(t, s + i, k, true)) >= 0) { // where no merge can join two characters the text may be cut: the queue stays short
            if (known && !t->meet[(unsigned char)s[i - 1]][(unsigned char)s[i]]) tok_merge_symbols(e);
            if (unknown) tok_add_symbol(e, t->unk);
            tok_add_symbol(e, id);
            known = true, unknown = false;
            continue;
        }
        bool bytes = t->byte_fallback;
        for (size_t j = 0; j < k; j++) bytes = bytes && t->byte_ids[(unsigned char)s[i + j]];
        for (size_t j = 0; bytes && j < k; j++) tok_add_symbol(e, t->byte_ids[(unsigned char)s[i + j]] - 1);
        if (!bytes && unknown && !t->fuse_unk) tok_add_symbol(e, t->unk);
        known = false, unknown |= !bytes && t->unk >= 0;
    }
    if (unknown) tok_add_symbol(e, t->unk);
    tok_merge_symbols(e);
}

static void tok_replace(retrofit_text *out, const char *s, size_t n, const char *from, const char *to) {
    const char *hit, *end = s + n;
    for (; (hit = (const char *)memmem(s, (size_t)(end - s), from, strlen(from))); s = hit + strlen(from))
        retrofit_text_append(out, s, (size_t)(hit - s)), retrofit_text_append(out, to, strlen(to));
    retrofit_text_append(out, s, (size_t)(end - s));
}

static void tok_normalize(const retrofit_tokenizer *t, retrofit_text *out, const char *s, size_t n) {
    out->size = 0;
    if (t->has[TOK_PREPEND]) retrofit_text_append(out, TOK_MARK, 3);
    tok_replace(out, s, n, " ", t->has[TOK_REPLACE] ? TOK_MARK : " ");
}

// Cuts normalized text into pieces and encodes them.
static void tok_encode_pieces(tok_encoder *e, const char *s, size_t n) {
    const retrofit_tokenizer *t = e->t;
    for (size_t i = 0, end = 0, k; i < n; i += k) { // end: of the digit, or of what is before the next digit
        uint32_t c;
        if (i == end) end = t->has[TOK_DIGITS] ? i + tok_run(t, s + i, n - i, TOK_NUMBER, true) : n;
        if (i == end) end += retrofit_utf8_next(s + i, n - i, &c);
        k = t->split ? tok_split(t, s + i, end - i, t->digits) : end - i;
        char text[4];
        e->piece.size = 0;
        for (size_t j = 0; t->bytes && j < k; j++) retrofit_text_append(&e->piece, text, utf8_put(t->chars[(unsigned char)s[i + j]], text));
        tok_encode_piece(e, t->bytes ? e->piece.bytes : s + i, t->bytes ? e->piece.size : k);
    }
}

// Finds added tokens, the longest first, in text as it is given, and then others in what is between those, normalized.
static void tok_encode_text(tok_encoder *e, const char *s, size_t n, bool normalized) {
    for (size_t i = 0, done = 0; i < n; done = i) {
        const tok_added *a = NULL, *end = NULL;
        for (; i < n; i++) {
            const size_t *first = &e->t->first[(unsigned char)s[i] + (normalized ? 256 : 0)];
            for (a = e->t->added + first[0], end = e->t->added + first[1]; a < end && (a->size > n - i || memcmp(a->text, s + i, a->size));)
                a++;
            if (a < end) break;
        }
        if (i > done && normalized) tok_encode_pieces(e, s + done, i - done);
        else if (i > done) tok_normalize(e->t, &e->normal, s + done, i - done), tok_encode_text(e, e->normal.bytes, e->normal.size, true);
        if (i < n) retrofit_text_append(&e->ids, &a->id, sizeof a->id), i += a->size;
    }
}

int32_t *retrofit_encode(const retrofit_tokenizer *t, const char *text, size_t size, bool with_special, size_t *count) {
    tok_encoder e = {t, {NULL, 0, 0, false}, {NULL, 0, 0, false}, {NULL, 0, 0, false}, {NULL, 0, 0, false}, NULL, NULL, 0, 0, 0};
    tok_put_valid(&e.text, text, size, false);
    retrofit_text_append(&e.ids, t->before, with_special ? t->before_count * sizeof *t->before : 0);
    tok_encode_text(&e, e.text.bytes, e.text.size, false);
    retrofit_text_append(&e.ids, t->after, with_special ? t->after_count * sizeof *t->after : 0);
    bool ok = !e.text.failed && !e.normal.failed && !e.piece.failed && !e.ids.failed;
    free(e.text.bytes), free(e.normal.bytes), free(e.piece.bytes), free(e.symbols), free(e.heap);
    if (ok) return *count = e.ids.size / sizeof(int32_t), (int32_t *)(void *)e.ids.bytes;
    return free(e.ids.bytes), (int32_t *)NULL;
}

char *retrofit_decode(const retrofit_tokenizer *t, const int32_t *ids, size_t count, bool skip_special, size_t *size) {
    retrofit_text out = {NULL, 0, 0, false}, run = out; // run: bytes, which need not be characters yet
    bool ok = true, join = false;
    for (size_t i = 0; ok && i < count; i++) {
        const tok_token *k = ids[i] >= 0 && (size_t)ids[i] < t->size ? &t->tokens[ids[i]] : NULL;
        if (!k || !k->text) ok = retrofit_fail("id %d (number %zu of %zu) is no token's: ids go up to %zu", (int)ids[i], i, count, t->size - 1);
        if (!ok || (skip_special && k->special)) continue;
        int byte = t->has[TOK_BYTE_FALLBACK] ? tok_fallback_byte(k) : -1;
        char character = (char)byte;
        if (byte >= 0) retrofit_text_append(&run, &character, 1);
        else if (t->has[TOK_UNBYTES]) {
            size_t start = run.size, n = 0;
            for (uint32_t c; n < k->size && (n += retrofit_utf8_next(k->text + n, k->size - n, &c), byte = c < 324 ? t->bytes_of[c] - 1 : -1) >= 0;)
                character = (char)byte, retrofit_text_append(&run, &character, 1);
            if (byte < 0) run.size = start, retrofit_text_append(&run, k->text, k->size); // not of the byte-level alphabet, an added token: as it is
        } else {
            tok_put_valid(&out, run.bytes, run.size, true), run.size = 0, retrofit_text_append(&out, " ", join);
            tok_replace(&out, k->text, k->size, TOK_MARK, t->has[TOK_UNREPLACE] ? " " : TOK_MARK);
        }
        join = !t->decodes;
    }
    tok_put_valid(&out, run.bytes, run.size, !t->has[TOK_UNBYTES]);
    size_t strip = t->has[TOK_STRIP] && out.size && out.bytes[0] == ' ';
    retrofit_text_append(&out, "", 1), free(run.bytes);
    if (!ok || out.failed || run.failed) return free(out.bytes), (char *)NULL;
    *size = out.size - strip - 1;
    return (char *)memmove(out.bytes, out.bytes + strip, *size + 1);
}

char *retrofit_decode_next(const retrofit_tokenizer *t, retrofit_stream *s, const int32_t *ids, size_t count, bool skip_special, bool last,
                           size_t *size) {
    if (s->from > s->done || s->done > count)
        return retrofit_fail("a stream at token %zu cannot go on with %zu tokens: zero it to start again", s->done, count), (char *)NULL;
    size_t old_size = 0, end = count - s->from;
    if (count) ids += s->from;
    char *text = retrofit_decode(t, ids, end, skip_special, size);
    char *old = text ? retrofit_decode(t, ids, s->done - s->from, skip_special, &old_size) : NULL;
    bool ok = old && old_size <= *size && !memcmp(text, old, old_size);
    if (old && !ok) retrofit_fail("tokens %zu to %zu change text already given out: decode them together", s->done, count);
    if (free(old), !ok) return free(text), (char *)NULL;
    // U+FFFD may yet become a character, and what a run of byte tokens stands for is known only when it is over.
    while (end > 1 && skip_special && t->tokens[ids[end - 1]].special) end--;
    bool wait = (*size >= 3 && !memcmp(text + *size - 3, "\xef\xbf\xbd", 3)) ||
                (end && t->has[TOK_BYTE_FALLBACK] && tok_fallback_byte(&t->tokens[ids[end - 1]]) >= 0);
    *size = wait && !last ? 0 : *size - old_size;
    memmove(text, text + old_size, *size), text[*size] = 0;
    if (*size) s->from = s->done, s->done = count; // else keep a window that yields text: only its first space may go
    return text;
}

bool retrofit_decode_context(const retrofit_tokenizer *t, const int32_t *ids, size_t count, int32_t *id) {
    for (size_t i = count; !t->has[TOK_UNBYTES] && i-- > 0;) {
        const tok_token *before = &t->tokens[ids[i]];
        if (before->special || tok_fallback_byte(before) >= 0) continue;
        *id = ids[i];
        return true;
    }
    return false;
}

int32_t retrofit_tokenizer_bos(const retrofit_tokenizer *t) { return t->bos; }
int32_t retrofit_tokenizer_eos(const retrofit_tokenizer *t) { return t->eos; }
int32_t retrofit_tokenizer_id(const retrofit_tokenizer *t, const char *token) { return tok_find(t, token, strlen(token), false); }
size_t retrofit_tokenizer_size(const retrofit_tokenizer *t) { return t->size; }

uint64_t retrofit_tokenizer_hash(const retrofit_tokenizer *t) {
    uint64_t h = t->size, sum = 0;
    for (size_t id = 0; id < t->size; id++) {
        for (size_t i = 0; i < t->tokens[id].size; i++) h = (h ^ (unsigned char)t->tokens[id].text[i]) * 0x100000001b3;
        h = retrofit_hash(h, 2 * id + t->tokens[id].model);
    }
    for (size_t i = 0; i <= t->merge_mask; i++) // in the order of the table, hence a sum
        if (t->merges[i].rank) sum += retrofit_hash(t->merges[i].pair, t->merges[i].rank);
    for (size_t i = 0; i < t->first[512]; i++) sum += retrofit_hash(~(uint64_t)t->added[i].id, (uint64_t)t->added[i].key);
    for (size_t i = 0; i < TOK_STEPS; i++) h = retrofit_hash(h, t->has[i]);
    h = retrofit_hash(h, (uint64_t)(t->fuse_unk + 2 * t->byte_fallback + 4 * t->ignore_merges)),
    h = retrofit_hash(retrofit_hash(h, (uint64_t)t->unk), (uint64_t)t->eos);
    for (size_t i = 0; i < t->before_count; i++) h = retrofit_hash(h, (uint64_t)t->before[i]);
    for (size_t i = 0; i < t->after_count; i++) h = retrofit_hash(h, ~(uint64_t)t->after[i]);
    return h + sum ? h + sum : 1;
}

static void tok_refuse(retrofit_tokenizer *t, const char *what, const char *name) {
    char line[200]; // names come from the file: no control character of theirs may break the line
    snprintf(line, sizeof line, "%s", name);
    for (char *c = line; *c; c++) *c = (unsigned char)*c < 32 || *c == 127 ? '?' : *c;
    if (!t->bad) t->bad = !retrofit_fail("%s: %s \"%s\"", t->where, what, line);
}

static const retrofit_json tok_none = {RETROFIT_JSON_ARRAY, 0, 0, 0, "", "", 0, NULL, NULL};
static const retrofit_json *tok_present(const retrofit_json *object, const char *key) { // null is as good as absent
    const retrofit_json *v = retrofit_json_get(object, key);
    return v && v->type == RETROFIT_JSON_NULL ? NULL : v;
}

static const retrofit_json *tok_get(retrofit_tokenizer *t, const retrofit_json *object, const char *key, retrofit_json_type type) {
    const retrofit_json *v = retrofit_json_get(object, key);
    if (v && v->type == type) return v;
    return tok_refuse(t, "missing, or of the wrong type:", key), &tok_none;
}

static bool tok_flag(retrofit_tokenizer *t, const retrofit_json *object, const char *key, bool otherwise) {
    return tok_present(object, key) ? tok_get(t, object, key, RETROFIT_JSON_BOOL)->number != 0 : otherwise;
}

static int32_t tok_get_id(retrofit_tokenizer *t, const retrofit_json *v) {
    bool good = v->type == RETROFIT_JSON_NUMBER && v->number >= 0 && v->number < TOK_MAX_ID && v->number == floor(v->number);
    if (!good) tok_refuse(t, "not a token id from 0 to 4194303:", v->string ? v->string : "");
    return good ? (int32_t)v->number : 0;
}

static const char *tok_keep(retrofit_tokenizer *t, const char *s, size_t n) {
    char *copy = (char *)memcpy(t->strings + t->strings_used, s, n);
    t->strings_used += n + 1;
    return copy;
}

// A setting may be one of the step's pattern.
static bool tok_setting_is(const retrofit_json *o, const char *key, const char *value) {
    const retrofit_json *v = retrofit_json_get(o, key);
    if (!v) v = retrofit_json_get(retrofit_json_get(o, "pattern"), key);
    if (v && v->type == RETROFIT_JSON_BOOL) return !strcmp(value, v->number != 0 ? "true" : "false");
    return v && v->string && !strcmp(value, v->string);
}

static void tok_load_template(retrofit_tokenizer *t, const retrofit_json *o) {
    const retrofit_json *all = tok_get(t, o, "special_tokens", RETROFIT_JSON_OBJECT), *special, *v;
    const retrofit_json *m = tok_get(t, o, "single", RETROFIT_JSON_ARRAY)->child;
    bool text = false; // has been there: as A; B, of pairs, is not supported
    for (; m && !t->bad; m = m->next) {
        special = retrofit_json_get(m, "SpecialToken");
        if (!special && (text || !tok_setting_is(retrofit_json_get(m, "Sequence"), "id", "A"))) break;
        text |= !special;
        if (special) special = tok_get(t, all, tok_get(t, special, "id", RETROFIT_JSON_STRING)->string, RETROFIT_JSON_OBJECT);
        for (v = special ? tok_get(t, special, "ids", RETROFIT_JSON_ARRAY)->child : NULL; v && !t->bad; v = v->next) {
            size_t *count = text ? &t->after_count : &t->before_count, id = (size_t)tok_get_id(t, v);
            if (*count == TOK_MAX_SPECIALS || id >= t->size || !t->tokens[id].text) tok_refuse(t, "a bad or a 17th", "SpecialToken");
            else (text ? t->after : t->before)[(*count)++] = (int32_t)id;
        }
    }
    if (!text || m) tok_refuse(t, "needs the text once, as A:", "TemplateProcessing");
}

// A step or a Sequence of steps. The parser's depth limit bounds the recursion.
static void tok_load_step(retrofit_tokenizer *t, const retrofit_json *o, int role) {
    const char *type = tok_get(t, o, "type", RETROFIT_JSON_STRING)->string;
    int step = t->last + 1;
    if (!strcmp(type, "Sequence")) {
        const retrofit_json *s = tok_get(t, o, tok_lists[role], RETROFIT_JSON_ARRAY)->child;
        for (; s && !t->bad; s = s->next) tok_load_step(t, s, role);
        return;
    }
    for (; step < TOK_STEPS; step++) {
        if (tok_steps[step].role != role || strcmp(type, tok_steps[step].type)) continue;
        const char *const *set = tok_steps[step].settings;
        while (*set && tok_setting_is(o, set[0], set[1])) set += 2;
        if (!*set) break;
    }
    if (step == TOK_STEPS) return tok_refuse(t, "this step is unsupported (or its settings, or its place):", type);
    t->has[t->last = step] = true;
    if (step == TOK_TEMPLATE) tok_load_template(t, o);
}

static void tok_add_token(retrofit_tokenizer *t, const char *text, size_t size, int32_t id, bool model) {
    int32_t *slot = tok_text_slot(t, text, size);
    if (!slot || *slot || t->tokens[id].text) return tok_refuse(t, "this text, or its id, is in the vocabulary twice (or collides):", text);
    tok_token k = {tok_keep(t, text, size), size, model, false, false};
    t->tokens[id] = k, *slot = id + 1;
    if (model && tok_fallback_byte(&k) >= 0) t->byte_ids[tok_fallback_byte(&k)] = id + 1;
}

// A hash table that count entries fill at most by half; *mask is its size, a power of two, less one.
static void *tok_table(size_t count, size_t each, size_t *mask) {
    for (*mask = 1; *mask < 2 * count;) *mask = 2 * *mask + 1;
    return retrofit_allocate(*mask + 1, each);
}

static void tok_load_vocabulary(retrofit_tokenizer *t, const retrofit_json *vocabulary, const retrofit_json *added) {
    const retrofit_json *v;
    int32_t last = -1, id;
    for (v = vocabulary->child; v; v = v->next) last = (id = tok_get_id(t, v)) > last ? id : last;
    for (v = added->child; v; v = v->next) last = (id = tok_get_id(t, tok_get(t, v, "id", RETROFIT_JSON_NUMBER))) > last ? id : last;
    t->size = (size_t)(last + 1);
    if (!t->size) tok_refuse(t, "no token in the", "vocab");
    t->tokens = (tok_token *)retrofit_allocate(t->size, sizeof *t->tokens);
    t->by_text = (int32_t *)tok_table(vocabulary->count + added->count, sizeof *t->by_text, &t->token_mask);
    t->bad |= !t->tokens || !t->by_text;
    for (v = vocabulary->child; v && !t->bad; v = v->next) tok_add_token(t, v->key, v->key_length, tok_get_id(t, v), true);
}

// Merges are ["a", "b"] or "a b"; of equal ones the last counts.
static void tok_load_merges(retrofit_tokenizer *t, const retrofit_json *merges) {
    retrofit_text joined = {NULL, 0, 0, false};
    uint32_t rank = 0;
    t->bad |= !(t->merges = (tok_merge *)tok_table(merges->count, sizeof *t->merges, &t->merge_mask));
    for (const retrofit_json *m = merges->child; m && !t->bad; m = m->next, t->bad |= joined.failed) {
        bool pair = m->type == RETROFIT_JSON_ARRAY && m->count == 2;
        const char *space = m->type == RETROFIT_JSON_STRING ? (const char *)memchr(m->string, ' ', m->length) : NULL;
        size_t cut = pair ? m->child->length : space ? (size_t)(space - m->string) : 0;
        joined.size = 0;
        if (pair) retrofit_text_append(&joined, m->child->string, cut), retrofit_text_append(&joined, m->child->next->string, m->child->next->length);
        if (space) retrofit_text_append(&joined, m->string, cut), retrofit_text_append(&joined, space + 1, m->length - cut - 1);
        retrofit_text_append(&joined, "", 1);
        size_t n = joined.failed ? 0 : joined.size - 1;
        int32_t a = tok_find(t, joined.bytes, n ? cut : 0, true), b = n ? tok_find(t, joined.bytes + cut, n - cut, true) : -1;
        int32_t both = tok_find(t, joined.bytes, n, true);
        tok_merge *slot = !cut || cut == n || a < 0 || b < 0 || both < 0 ? NULL : tok_merge_slot(t, a, b);
        if (!slot && !joined.failed) tok_refuse(t, "not [\"a\", \"b\"] or \"a b\" of tokens that make a token: the merge to", joined.bytes);
        if (!slot) continue;
        slot->pair = (uint64_t)(uint32_t)a << 32 | (uint32_t)b, slot->rank = ++rank, slot->id = both;
        t->meet[(unsigned char)joined.bytes[cut - 1]][(unsigned char)joined.bytes[cut]] = true;
    }
    free(joined.bytes);
}

static int tok_by_key(const void *a, const void *b) {
    const tok_added *x = (const tok_added *)a, *y = (const tok_added *)b;
    return x->key != y->key ? x->key - y->key : (x->size < y->size) - (x->size > y->size);
}

static void tok_load_added(retrofit_tokenizer *t, const retrofit_json *added) {
    retrofit_text normal = {NULL, 0, 0, false};
    size_t n = 0;
    if (!(t->added = (tok_added *)retrofit_allocate(added->count, sizeof *t->added))) t->bad = true;
    for (const retrofit_json *v = added->child; v && !t->bad; v = v->next) {
        const retrofit_json *content = tok_get(t, v, "content", RETROFIT_JSON_STRING);
        int32_t id = tok_get_id(t, tok_get(t, v, "id", RETROFIT_JSON_NUMBER)), known = tok_find(t, content->string, content->length, false);
        bool bad =
            !content->length || (known >= 0 && (known != id || t->tokens[id].added)); // empty, or there with another id, or listed twice
        if (bad || tok_flag(t, v, "lstrip", false) || tok_flag(t, v, "rstrip", false) || tok_flag(t, v, "single_word", false))
            tok_refuse(t, "empty, twice there, or with lstrip, rstrip or single_word, which are unsupported: the added token",
                       content->string);
        if (known < 0 && !t->bad) tok_add_token(t, content->string, content->length, id, false);
        if (t->bad) break;
        tok_token *k = &t->tokens[id];
        tok_added a = {k->text, k->size, id, 0};
        k->added = true, k->special = tok_flag(t, v, "special", false);
        if (tok_flag(t, v, "normalized", !k->special)) { // decoding gives the text as written here, as tokenizers 0.21 does
            tok_normalize(t, &normal, k->text, k->size);
            if ((t->bad |= normal.failed)) break;
            a.text = tok_keep(t, normal.bytes, normal.size), a.size = normal.size, a.key = 256;
        }
        a.key += (unsigned char)a.text[0], t->added[n++] = a;
    }
    free(normal.bytes);
    if (!t->bad) qsort(t->added, n, sizeof *t->added, tok_by_key);
    for (size_t key = 0, i = 0; key < 513; t->first[key++] = i)
        while (i < n && t->added[i].key < (int)key) i++;
}

static void tok_load_tokenizer(retrofit_tokenizer *t, const retrofit_json *root) {
    static const char *const neutral[] = {"truncation", "padding", "dropout", "continuing_subword_prefix", "end_of_word_suffix"};
    const retrofit_json *added = tok_present(root, "added_tokens") ? tok_get(t, root, "added_tokens", RETROFIT_JSON_ARRAY) : &tok_none;
    const retrofit_json *model = tok_get(t, root, "model", RETROFIT_JSON_OBJECT), *v;
    for (int i = 0; i < 5; i++)
        if ((v = tok_present(i < 2 ? root : model, neutral[i])) && !(v->type == RETROFIT_JSON_STRING && !v->length))
            tok_refuse(t, "not supported, should be null:", neutral[i]);
    if (!tok_setting_is(model, "type", "BPE")) tok_refuse(t, "only BPE is supported as", "model");
    for (int role = 0; role < 3 && !t->bad; role++)
        if ((v = tok_present(root, tok_roles[role]))) tok_load_step(t, v, role);
    for (int k = 0; k < 3; k++) {
        unsigned c = 0, run = 0, inside = 0;
        for (const char *p = tok_runs[k]; *p; inside ^= *p++ < 'a') {
            run = run * 26 + (unsigned)((*p | 32) - 'a');
            for (; *p < 'a' && run; run--) t->classes[c++] |= (uint8_t)(inside << k);
        }
    }
    // The byte-level alphabet shows a byte that is not printable Latin-1 as the next free code point from 256 up.
    for (unsigned b = 0, next = 256; b < 256; b++) {
        t->chars[b] = (uint16_t)((b > 32 && b < 127) || (b > 160 && b != 173) ? b : next++);
        t->bytes_of[t->chars[b]] = (uint16_t)(b + 1);
    }
    const bool *has = t->has;
    int patterns = has[TOK_GPT2] + has[TOK_QWEN2] + has[TOK_LLAMA3] + has[TOK_GPT2_BYTES], bytes = has[TOK_BYTES] + has[TOK_GPT2_BYTES];
    if (patterns > 1 || bytes > 1 || (has[TOK_STRIP] && !has[TOK_FUSE]) ||
        (has[TOK_UNBYTES] && (has[TOK_UNREPLACE] || has[TOK_BYTE_FALLBACK] || has[TOK_FUSE])))
        tok_refuse(t, "steps that are not supported together, in", "pre_tokenizer or decoder");
    t->split = patterns, t->bytes = bytes, t->digits = has[TOK_LLAMA3] ? 3 : has[TOK_QWEN2];
    t->fuse_unk = tok_flag(t, model, "fuse_unk", false), t->byte_fallback = tok_flag(t, model, "byte_fallback", false);
    t->ignore_merges = tok_flag(t, model, "ignore_merges", false), t->decodes = tok_present(root, "decoder") != NULL;
    const retrofit_json *vocabulary = tok_get(t, model, "vocab", RETROFIT_JSON_OBJECT);
    if (!t->bad) tok_load_vocabulary(t, vocabulary, added);
    if (!t->bad) tok_load_merges(t, tok_get(t, model, "merges", RETROFIT_JSON_ARRAY));
    if (!t->bad && tok_present(model, "unk_token")) {
        v = tok_get(t, model, "unk_token", RETROFIT_JSON_STRING), t->unk = tok_find(t, v->string, v->length, true);
        if (t->unk < 0) tok_refuse(t, "not in the vocabulary, the unk_token", v->string);
    }
    if (!t->bad) tok_load_added(t, added);
    if (!t->bad && (v = tok_present(root, "post_processor"))) tok_load_step(t, v, 3);
}

// tokenizer_config.json may hold anything else too. own_specials: tokenizer.json has a post_processor.
static void tok_load_config(retrofit_tokenizer *t, const retrofit_json *config, bool own_specials) {
    for (int i = 0; i < 2; i++) {
        const char *key = i ? "eos_token" : "bos_token";
        const retrofit_json *v = tok_present(config, key);
        if (v && v->type == RETROFIT_JSON_OBJECT) v = tok_get(t, v, "content", RETROFIT_JSON_STRING);
        int32_t id = v && v->type == RETROFIT_JSON_STRING ? tok_find(t, v->string, v->length, false) : -1;
        if (v && id < 0) tok_refuse(t, "tokenizer.json does not have the token that is said to be", key);
        *(i ? &t->eos : &t->bos) = id;
        if (!own_specials && tok_flag(t, config, i ? "add_eos_token" : "add_bos_token", false) && id >= 0)
            (i ? t->after : t->before)[0] = id, *(i ? &t->after_count : &t->before_count) = 1;
    }
}

static retrofit_json *tok_read(const char *directory, const char *name, char path[RETROFIT_PATH], size_t *size) {
    char *text = retrofit_path(path, directory, name) ? retrofit_read_file(path, size) : NULL;
    retrofit_json *root = text ? retrofit_json_parse(text, *size, path) : NULL;
    return free(text), root;
}

retrofit_tokenizer *retrofit_tokenizer_load(const char *directory) {
    char path[RETROFIT_PATH];
    size_t size, ignored;
    retrofit_json *root = tok_read(directory, "tokenizer.json", path, &size), *config = NULL;
    retrofit_tokenizer *t = root ? (retrofit_tokenizer *)retrofit_allocate(1, sizeof *t) : NULL;
    if (!t) return retrofit_json_free(root), (retrofit_tokenizer *)NULL;
    t->where = path, t->bos = t->eos = t->unk = t->last = -1;
    t->strings = (char *)retrofit_allocate(size + 1, 4); // enough: the texts of added tokens may be there twice, with ▁ for each space
    t->classes = (uint8_t *)retrofit_allocate(0x110000, 1);
    if (!(t->bad = !t->strings || !t->classes)) tok_load_tokenizer(t, root);
    if (!t->bad && (!retrofit_path(path, directory, "tokenizer_config.json") || !access(path, F_OK) || errno != ENOENT)) {
        config = tok_read(directory, "tokenizer_config.json", path, &ignored);
        if (!(t->bad = !config)) tok_load_config(t, config, tok_present(root, "post_processor") != NULL);
    }
    retrofit_json_free(root), retrofit_json_free(config);
    if (!t->bad) return t;
    return retrofit_tokenizer_free(t), (retrofit_tokenizer *)NULL;
}

void retrofit_tokenizer_free(retrofit_tokenizer *t) {
    if (!t) return;
    free(t->strings), free(t->tokens), free(t->by_text), free(t->merges), free(t->added), free(t->classes), free(t);
}

// =================================================================================================
// 12  Errors, files, random numbers, command lines
// =================================================================================================

static RETROFIT_THREAD_LOCAL char error_text[1024];
const char *retrofit_error(void) { return error_text; }

// Records one line about what went wrong. Names in files may hold anything: one line it stays.
static void record_error(const char *format, va_list args) {
    vsnprintf(error_text, sizeof error_text, format, args);
    for (char *c = error_text; *c; c++) {
        if ((unsigned char)*c < ' ' || *c == 127) *c = '?';
    }
}

bool retrofit_fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    record_error(format, args);
    va_end(args);
    return false;
}

static void *fail_null(const char *format, ...) {
    va_list args;
    va_start(args, format);
    record_error(format, args);
    va_end(args);
    return NULL;
}

// count * size zeroed bytes; NULL and an error if the product overflows or memory is out. Freed with free().
void *retrofit_allocate(size_t count, size_t size) {
    if (size && count > SIZE_MAX / size) return retrofit_fail("a size of %zu x %zu bytes overflows", count, size), (void *)NULL;
    void *p = calloc(count ? count : 1, size ? size : 1);
    if (!p) retrofit_fail("out of memory: %zu bytes", count * size);
    return p;
}

// Opens a regular file for reading.
FILE *retrofit_open_file(const char *path, size_t *size) {
    FILE *f = fopen(path, "rbe");
    if (!f) return retrofit_fail("%s: %s", path, strerror(errno)), (FILE *)NULL;
    struct stat st;
    if (!fstat(fileno(f), &st) && S_ISREG(st.st_mode)) return *size = (size_t)st.st_size, f;
    return fclose(f), retrofit_fail("%s: not a regular file", path), (FILE *)NULL;
}

// The whole file, with a NUL behind it; NULL and an error. Freed with free().
char *retrofit_read_file(const char *path, size_t *size) {
    FILE *f = retrofit_open_file(path, size);
    char *text = f ? (char *)retrofit_allocate(*size + 1, 1) : NULL;
    bool ok = text && (fread(text, 1, *size, f) == *size || retrofit_fail("%s: reading failed, or it became shorter", path));
    if (f) fclose(f);
    return ok ? text : (free(text), (char *)NULL);
}

// The whole file mapped into memory; NULL and an error, also for a file of no bytes.
void *retrofit_map_file(const char *path, size_t *size) {
    FILE *f = retrofit_open_file(path, size);
    if (!f) return NULL;
    void *base = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, fileno(f), 0);
    if (base == MAP_FAILED) base = NULL, retrofit_fail("%s: mapping its %zu bytes failed: %s", path, *size, strerror(errno));
    return fclose(f), base;
}

// Flushes and closes; a file that could not be written whole is removed.
bool retrofit_finish_file(FILE *f, const char *path, bool ok) {
    ok = ok && !ferror(f) && !fflush(f) && !fsync(fileno(f));
    int why = errno;
    if (fclose(f) && ok) ok = false, why = errno;
    if (!ok) remove(path), retrofit_fail("%s: writing failed: %s", path, strerror(why ? why : EIO));
    return ok;
}

bool retrofit_path(char path[RETROFIT_PATH], const char *directory, const char *name) {
    int n = snprintf(path, RETROFIT_PATH, "%s/%s", directory, name);
    return (n > 0 && n < RETROFIT_PATH) || retrofit_fail("%.60s…: a path longer than %d bytes", directory, RETROFIT_PATH - 1);
}

size_t retrofit_type_size(retrofit_type type) { return type == RETROFIT_F32 || type == RETROFIT_I32 ? 4 : 2; }

float retrofit_bf16_to_float(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

uint16_t retrofit_float_to_bf16(float f) { // round to nearest even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float retrofit_f16_to_float(uint16_t x) {
    int exponent = x >> 10 & 31, mantissa = x & 1023;
    float f = exponent ? ldexpf((float)(mantissa + 1024), exponent - 25) : ldexpf((float)mantissa, -24);
    if (exponent == 31) f = mantissa ? NAN : INFINITY;
    return x >> 15 ? -f : f;
}

// n elements of a tensor in a file's type as fp32.
void retrofit_to_float(float *out, const void *data, retrofit_type type, size_t n) {
    if (type == RETROFIT_F32) memcpy(out, data, n * 4);
    for (size_t i = 0; type != RETROFIT_F32 && i < n; i++) {
        uint16_t x;
        memcpy(&x, (const char *)data + 2 * i, 2); // at any address: a file's header may have an odd length
        out[i] = type == RETROFIT_BF16 ? retrofit_bf16_to_float(x) : retrofit_f16_to_float(x);
    }
}

bool retrofit_sync_directory(const char *path) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool ok = (fd >= 0 && fsync(fd) == 0) || retrofit_fail("%s: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    return ok;
}

void retrofit_parent_directory(char *path) { // in place
    char *slash = strrchr(path, '/');
    if (slash) slash[slash == path] = 0;
    else strcpy(path, ".");
}

// A directory and its parents, as mkdir -p makes them; `fresh`: it must not exist yet. path is written to, but left as it was.
bool retrofit_make_directories(char *path, bool fresh) {
    char *end = path;
    if (!*path) return retrofit_fail("'' is no name for a directory");
    for (char next = '/'; next; *end = next) {
        end += 1 + strcspn(end + 1, "/"), next = *end, *end = 0;
        if (mkdir(path, 0777) && (errno != EEXIST || (fresh && !next))) return retrofit_fail("%s: %s", path, strerror(errno));
    }
    return true;
}

// ---- Random numbers: PyTorch's CPU generator, because the authors' draws come from it -------------------------------

static void mt19937_seed(mt19937 *g, uint32_t seed) {
    g->state[0] = seed;
    for (uint32_t i = 1; i < 624; i++) g->state[i] = 1812433253u * (g->state[i - 1] ^ g->state[i - 1] >> 30) + i;
    g->next = 0;
}

static uint32_t mt19937_next(mt19937 *g) { // twists one word at a time, as it is needed: most draws need few of the 624
    size_t i = g->next;
    g->next = (i + 1) % 624;
    uint32_t y = (g->state[i] & 0x80000000u) | (g->state[g->next] & 0x7fffffffu);
    y = g->state[i] = g->state[(i + 397) % 624] ^ y >> 1 ^ (y & 1 ? 0x9908b0dfu : 0);
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

// ---- Command lines ----------------------------------------------------------------------------------------------------------
double retrofit_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

bool retrofit_sizes(const char *text, size_t *out, size_t most, size_t *count) {
    *count = 0;
    for (char *end;; text = end + 1) {
        unsigned long long n = strtoull(text, &end, 10);
        if (*text < '0' || *text > '9' || n == 0 || n > 1 << 20 || (*end && *end != ','))
            return retrofit_fail("'%s' is not a list of positive numbers like 1,2,4", text);
        if (*count == most) return retrofit_fail("a list of more than %zu numbers", most);
        out[(*count)++] = (size_t)n;
        if (*end == 0) return true;
    }
}

static bool read_option(const retrofit_option *o, const char *text) { // text: the value; NULL if there is none
    char *end = NULL;
    if (o->type == RETROFIT_SWITCH && !text) return *(int *)o->value = 1, true;
    if (o->type == RETROFIT_FLAG) return text ? retrofit_fail("--%s takes no value", o->name) : (*(bool *)o->value = true);
    if (!text) return retrofit_fail("--%s needs a value", o->name);
    if (o->type == RETROFIT_STRING) return *(const char **)o->value = text, true;
    if (o->type == RETROFIT_SIZE) {
        errno = 0;
        *(size_t *)o->value = (size_t)strtoull(text, &end, 10);
        return (*text >= '0' && *text <= '9' && *end == 0 && errno == 0) || retrofit_fail("--%s needs a whole number, not '%s'", o->name, text);
    }
    if (o->type == RETROFIT_REAL) {
        double x = *(double *)o->value = strtod(text, &end);
        return (*text && *end == 0 && isfinite(x)) || retrofit_fail("--%s needs a number, not '%s'", o->name, text);
    }
    size_t n = strlen(text);
    const char *c = o->argument;
    for (int i = 0; c; i++, c = strchr(c, '|'), c += c != NULL)
        if (!strchr(text, '|') && !strncmp(c, text, n) && (c[n] == 0 || c[n] == '|'))
            return *(int *)o->value = i + (o->type == RETROFIT_SWITCH ? 2 : 0), true;
    return retrofit_fail("--%s is one of %s, not '%s'", o->name, o->argument, text);
}

static size_t common_letters(const char *a, const char *b) { // at their beginnings and ends: enough to guess what was meant
    size_t n = strlen(a), m = strlen(b), front = 0, back = 0;
    while (front < n && front < m && a[front] == b[front]) front++;
    while (back < n && back < m && a[n - 1 - back] == b[m - 1 - back]) back++;
    return front + back;
}

int retrofit_options(int argc, char **argv, const retrofit_option *table, size_t count, const char *usage, const char **others,
                     size_t *other_count) {
    const char *program = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i], *value = strchr(arg, '='), *nearest = "help";
        if (!strcmp(arg, "--help") || !strcmp(arg, "-h")) {
            printf("%s", usage);
            for (const retrofit_option *o = table; o < table + count; o++) {
                bool heading = o->type == RETROFIT_HEADING;
                const char *form = o->type == RETROFIT_SWITCH ? "  --%s[=%s]" : "  --%s %s";
                int n = heading ? printf("\n%s\n", o->name) : printf(form, o->name, o->argument ? o->argument : "");
                if (!heading) printf("%s%*s%s\n", n > 34 ? "\n" : "", n > 34 ? 36 : 36 - n, "", o->help);
            }
            return 0;
        }
        if (strncmp(arg, "--", 2)) {
            if (!others) return fprintf(stderr, "%s: '%s' is not an option: options begin with -- (see --help)\n", program, arg), 2;
            others[(*other_count)++] = arg;
            continue;
        }
        const retrofit_option *found = NULL;
        size_t length = strcspn(arg, "=") - 2;
        for (const retrofit_option *o = table; o < table + count; o++) {
            if (o->type == RETROFIT_HEADING) continue;
            if (!found && strlen(o->name) == length && !strncmp(o->name, arg + 2, length)) found = o;
            if (common_letters(o->name, arg + 2) > common_letters(nearest, arg + 2)) nearest = o->name;
        }
        if (value) value++;
        else if (found && found->type != RETROFIT_FLAG && found->type != RETROFIT_SWITCH && i + 1 < argc) value = argv[++i];
        if (!(found ? read_option(found, value) : retrofit_fail("unknown option %s: did you mean --%s?", arg, nearest)))
            return fprintf(stderr, "%s: %s (see --help)\n", program, retrofit_error()), 2;
    }
    return -1;
}

#endif // RETROFIT_IMPLEMENTATION

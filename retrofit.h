/* retrofit.h - Teaching Pretrained Language Models to Think Deeper with Retrofitted Recurrence

   The method of McLeish et al. (arXiv 2511.07384) in one header. A pretrained Llama is cut into
   three parts, prelude, core and coda; a new matrix, the adapter, feeds the core its own output r
   times. A short training teaches the model to use that loop; from then on it thinks deeper the
   more recurrences it is given.

       tokens ─ wte ─ prelude ─ e ────┬─────────────┬── … ───────┐
                      P blocks        │             │            │
                                      ▼             ▼            ▼
              s_0 ~ N(0, σ²) ── adapter ─ core ─ adapter ─ core … core ─ s_r ─ coda ─ norm ─ lm_head
                                         C blocks                            D blocks
                                └──── r recurrences, the same weights ────┘

   This file is a book in three parts. PART I is the method: whoever reads up to the line "The
   method ends here" has understood the paper. PART II thinks longer (decoding), PART III is
   machinery; what Part I needs of it is declared, with a sentence each, before section 2.

   0  The method in formulas

   Letters:  B rows   T tokens in each   N = B·T   d = n_embd   H query heads   G key/value heads
             h = d/H   Q = (H+2G)·h   F = intermediate size   V vocabulary   P, C, D layers in
             prelude, core, coda   r = n + k recurrences, n without and k with gradient

       e      = prelude(wte[tokens])                                                (N,d)
       s_0    ~ N(0, σ²), what lies beyond ±3σ drawn again                          (N,d)
       y_i    = A·concat(s_{i-1}, e) = A_s·s_{i-1} + A_e·e     i = 1 … r            (N,d)
       s_i    = core(y_i)                                                           (N,d)
       logits = lm_head·RMSNorm_f(coda(s_r))                                        (N,V)
       L      = mean cross-entropy of the labels

   A = [A_s | A_e] (d,2d), without a bias. Apart from RMSNorm_f the only norms are those inside the
   blocks. Formulas are for one token, a column; gradients of weights are sums over the N tokens.

   The gradient. Write dX for ∂L/∂X, and coreᵀ for the derivative of the core, at y_i, applied to a
   gradient. Backward through head and coda gives ds_r. Then, for i = r, r - 1, …

       dY_i     = coreᵀ(ds_i)              and the core's own gradient, as of any stack of blocks
       ds_{i-1} = A_sᵀ·dY_i

   A_s, A_e, the core's weights and e are the same in every recurrence. L depends on them in many
   places, and the derivative is the sum, not the mean, over the places:

       dA_s  = Σ_i dY_i·s_{i-1}ᵀ                  a product for each i: s_{i-1} differs, and is kept
       dA_e  = Σ_i dY_i·eᵀ    = (Σ_i dY_i)·eᵀ     e does not depend on i, so the sum comes first:
       de    = Σ_i A_eᵀ·dY_i  = A_eᵀ·(Σ_i dY_i)   one product each, whatever k is
       dcore = Σ_i of its gradient at y_i

   For the same reason A_e·e is computed once in the forward pass. de goes on through the prelude to
   wte. s_0 is drawn, not learned, and needs no gradient.

   Truncation. Only the last k recurrences are followed back: the sums run over i = n + 1 … n + k,
   and ds_n is taken as zero, as if s_n were a constant like s_0. What is left out is every term of
   i ≤ n, through the state and through e: in dA_s, dA_e, the core's gradient, de and so the
   prelude's and wte's. Head, final norm and coda have their exact gradients; with n = 0 all have.
   The terms left out have come back through k cores or more. Where states converge, which is what
   the training brings about, each core makes them smaller, so they matter little; and the n first
   recurrences need to store nothing: memory grows with k, not with r.

   Surgery (convert.c) makes the parts from the source's layers. The paper takes the first for the
   prelude, the last for the coda and the last before those for the core: 0-3, 10-17, 18-21 of
   TinyLlama's 22; 0-3, 6-11, 12-15, or 0-1, 10-13, 14-15, of Llama-3.2-1B's 16. Any list may be
   given. Layers in no part are dropped for good. wte, final norm and head are copied; a head that
   shared wte becomes a matrix of its own. The adapter is new. As PyTorch's uniform of ±1/√(2d), the
   authors' choice, it throws the pretrained signal away, which a long training heals: y_1 is a
   random mixture that the core has never seen, and more recurrences do not help it. As [0 | I], y_i
   = e at every i: the model starts as the source without the dropped layers, whatever r is, until
   A_s has grown. In a short training this choice decides everything.

   Contents                                            function                          line
       e = prelude(wte[tokens]), A_e·e                 prelude_forward                   783
       s_0                                             retrofit_init_state               806
       y_i = A_s·s_{i-1} + A_e·e                       inject                            811
       s_i, without and with gradient                  retrofit_recur                    847
       a block: x + W·attention(…), x + W·swiglu(…)    block_until_gate_up               673
       its gradient                                    block_backward                    708
       logits = lm_head·RMSNorm_f(coda(s_r))           retrofit_coda                     859
       L                                               retrofit_loss                     913
       dY_i, ds_{i-1}, dA_s, dcore                     recurrence_backward               936
       dA_e, de                                        injection_backward                954
       floating-point operations                       retrofit_flops_per_token          3502
       n, k ~ Poisson(LogNormal) + 1                   retrofit_draw_recurrences         1017
       the curriculum r̄(t)                             retrofit_curriculum               1050
       a training step                                 retrofit_training_step            1120
       AdamW, Muon, AdamW*                             retrofit_optimizer_step           1327
       Newton-Schulz                                   newton_schulz                     1230
       the operations: rmsnorm, rope, attention …      embedding_forward                 1366
       KV cache, exits, sampling, drafts               retrofit_next_logits              2283

   Usage: #define RETROFIT_IMPLEMENTATION before this header, and this before any other, in ONE C
   file; include it plainly elsewhere, in C11 or C++17. Compile with -O3 -march=native
   -ffp-contract=fast, and -fopenmp for threads; link with -lm. License: MIT. */
#ifndef RETROFIT_H
#define RETROFIT_H

#if defined RETROFIT_IMPLEMENTATION && !defined _GNU_SOURCE
#define _GNU_SOURCE // mmap, glob, fsync: where this header is implemented it comes first
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
// PART I  THE METHOD
// 1  Declarations
// =================================================================================================
// Functions that can fail return false, NULL or NaN; retrofit_error() then says in one line what
// was wrong, where, and what to do. "or error" below means that.
const char *retrofit_error(void);

// ---- Configuration: the numbers of config.json -------------------------------------------------
// Types of elements. Files may hold any of them; operations read weights in F32 or BF16.
typedef enum { RETROFIT_F32, RETROFIT_BF16, RETROFIT_F16, RETROFIT_I32,
               RETROFIT_F64 } retrofit_type;

// Norms of q and k before RoPE: none, of all of q and of all of k, or of each head.
typedef enum { RETROFIT_QK_NORM_NONE, RETROFIT_QK_NORM_FULL,
               RETROFIT_QK_NORM_HEAD } retrofit_qk_norm;

typedef struct {
    size_t n_embd, n_heads, n_kv_heads, head_dim;  // d, H, G, h
    size_t intermediate, vocab, context;           // F, V, the longest sequence
    size_t prelude, core, coda;                    // P, C, D; a plain Llama has P = C = 0
    float norm_eps, state_std;                     // ε of every norm; σ of s_0
    double rope_theta;
    bool post_norm, qkv_bias;                      // OLMo-2's norms behind branches; Qwen2's biases
    retrofit_qk_norm qk_norm;                      // none; full: OLMo-2's; head: Qwen3's
    bool rope_llama3;                              // Llama-3.2's rescaled frequencies, by these;
    double rope_factor, rope_low, rope_high, rope_original_context; // if not, ω_i/factor for all i
    size_t mean_recurrence, backprop_depth;        // R and K that the model was trained for,
    size_t trained_seq_len;                        // in rows of so many tokens; 0: not known
    bool trained_state_zero, tied;                 // from s_0 = 0; a Llama's head is its embedding
    int32_t bos, pad, eos[8];                      // token ids, -1 for none; [eos_count] end a text
    size_t eos_count;
} retrofit_config;

// σ of s_0, for every model: √(2 / (5·5280)). Huginn, the recurrent model that the authors' code
// was first written for, is 5280 wide and starts its matrices with the variance 2/(5·width); the
// paper kept the number for models of other widths.
#define RETROFIT_STATE_STD 0.008703882797784892

bool retrofit_is_plain(const retrofit_config *config);         // a Llama without recurrence: C = 0
size_t retrofit_qkv_width(const retrofit_config *config);      // Q = (H + 2G)·h

// ---- Parameters --------------------------------------------------------------------------------
typedef void act; // an element of a branch activation: fp32 or bf16, as the operations' table says

// A matrix as the operations read it: element (i, j) is data[i·stride + j].
typedef struct {
    const void *data;
    retrofit_type type; // F32 or BF16
    size_t stride;
} retrofit_weight;

typedef enum { RETROFIT_EMBEDDING, RETROFIT_HEAD, RETROFIT_NORM, RETROFIT_BIAS,
               RETROFIT_MATRIX } retrofit_kind;
typedef enum { // RETROFIT_PARTS is their number
    RETROFIT_PART_EMBEDDING, RETROFIT_PART_PRELUDE, RETROFIT_PART_ADAPTER, RETROFIT_PART_CORE,
    RETROFIT_PART_CODA, RETROFIT_PART_NORM, RETROFIT_PART_HEAD, RETROFIT_PARTS
} retrofit_part;

// A tensor of a checkpoint file. Where a plain Llama stores q, k, v or gate, up apart, our fused
// parameter is made of several, one below the other.
typedef struct {
    char name[88];
    size_t rows;
} retrofit_source_tensor;

typedef struct {
    retrofit_source_tensor source[3];    // the name of source[0] labels the parameter
    size_t sources, rows, cols, owner;   // owner: the rank that updates it and has m and v
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
    retrofit_parameter b_qkv;     // (Q,1)   no rows without qkv_bias        attn.Wqkv.bias
    retrofit_parameter q_norm, k_norm; // (H·h), (G·h), or (h) both; no rows without qk_norm
} retrofit_layer;

typedef struct retrofit_ops retrofit_ops;
typedef struct {
    retrofit_config config;
    const retrofit_ops *ops;                // of the device that it lives on
    struct retrofit_ranks *ranks;           // the processes that train it: section 8; NULL: one
    retrofit_parameter wte;                 // (V,d)   token embeddings
    retrofit_layer *prelude, *core, *coda;  // [P], [C], [D]
    retrofit_parameter adapter;             // (d,2d)  [A_s | A_e]; a plain Llama has none
    retrofit_parameter ln_f;                // (d)     the final norm
    retrofit_parameter lm_head;             // (V,d)
    retrofit_parameter **parameters;        // the one list of all of them: section 8
    size_t parameter_count, weight_count;   // entries of that list; numbers in all of them
    void *weights, *masters, *grads, *moments; // arenas; NULL where there is nothing to hold
    size_t grad_bytes, moment_bytes;
    double *sum;                            // a sum of squares on the device
    float *muon_u;                          // scratch of Newton-Schulz for the largest matrix
    act *muon_x, *muon_y, *muon_a, *muon_b;
    struct retrofit_map *maps;              // [map_count] files that weights lie in (inference)
    size_t map_count;
} retrofit_model;

// ---- Operations --------------------------------------------------------------------------------
// The model is written once, over this table. The CPU's rows are in sections 5, 6, 7 and, where
// they have no formula, in 10; a GPU's, under the same names and in the same order, in
// retrofit_cuda.cu. One contract holds for all of them: arguments are outputs, inputs, sizes.
// Gradients of parameters add (+=), gradients of activations are set (=), except the residual
// stream's, dx of rmsnorm_backward, which adds. Nothing allocates. Every sum has a fixed order, so
// a run repeats bit for bit. The residual stream, states, parameters and their gradients are fp32,
// `act` is the table's type. The formulas stand at the definitions.
//   embedding         x (N,d) from wte (V,d)
//   rmsnorm           out (N,d), rstd (N); dweight may be NULL
//   rmsnorm_residual  out (N,d) = residual + the norm of x, in fp32; dinp is set, from dout in fp32
//   matmul            out (N,O) = inp (N,I)·wᵀ, w (O,I); dinp (N,I); dw (O,I), rows `stride` apart
//   matmul_residual   the same into fp32, plus residual (N,O): NULL for zero, or out itself
//   matmul_symmetric  out (N,N) = inp (N,I)·inpᵀ
//   bias, qk_norm     in place on y (N,O); on q and k of qkv, which go to qk (N,(H+G)·h) before if
//                     it is not NULL, as then rstd (N, norms of a token)
//   rope              in place on q and k of qkv (N,Q); table (positions,h/2,{cos, sin}); row b
//                     begins at position past[b], or at 0 if past is NULL
//   attention         out (N,d), lse (N,H) from qkv (N,Q); dqkv (N,Q), delta (N,H)
//   swiglu            out (N,F) from gate_up (N,2F); backward gives out again
//   cross_entropy     losses (N), 0 where a label is -100; unless scale is 0 the logits (N,V)
//                     are replaced by their gradient
//   cast, add, axpby  out = (act) x; x = keep·x + y; y = a·x + b·y
//   state_init        s (B,T,d), a function of (seed, b, past[b] + t, column) alone
//   kv_store …        keys, values (lanes,capacity,G·h) of `type`; row b's: lane[b], or b if NULL
//   sum_squares …     *sum += Σ x², by 256 in fp32, then in double; and the optimizers': section 5
#define RETROFIT_OPS(X) \
    X(embedding_forward, (float *x, const int32_t *tokens, retrofit_weight wte, size_t N, \
      size_t d)) \
    X(embedding_backward, (float *dwte, const int32_t *tokens, const float *dx, size_t N, \
      size_t d)) \
    X(rmsnorm_forward, (act *out, float *rstd, const float *x, const float *weight, size_t N, \
      size_t d, float eps)) \
    X(rmsnorm_backward, (float *dx, float *dweight, const act *dout, const float *x, \
      const float *rstd, const float *weight, size_t N, size_t d)) \
    X(rmsnorm_residual_forward, (float *out, float *rstd, const float *residual, const float *x, \
      const float *weight, size_t N, size_t d, float eps)) \
    X(rmsnorm_residual_backward, (act *dinp, float *dweight, const float *dout, const float *x, \
      const float *rstd, const float *weight, size_t N, size_t d)) \
    X(matmul_forward, (act *out, const act *inp, retrofit_weight w, size_t N, size_t I, \
      size_t O)) \
    X(matmul_residual_forward, (float *out, const float *residual, const act *inp, \
      retrofit_weight w, size_t N, size_t I, size_t O)) \
    X(matmul_backward_input, (act *dinp, const act *dout, retrofit_weight w, size_t N, size_t I, \
      size_t O)) \
    X(matmul_residual_backward_input, (float *dinp, const act *dout, retrofit_weight w, size_t N, \
      size_t I, size_t O)) \
    X(matmul_backward_weight, (float *dw, size_t stride, const act *dout, const act *inp, \
      size_t N, size_t I, size_t O)) \
    X(matmul_symmetric, (act *out, const act *inp, size_t N, size_t I)) \
    X(bias_forward, (act *y, const float *bias, size_t N, size_t O)) \
    X(bias_backward, (float *dbias, const act *dy, size_t N, size_t O)) \
    X(qk_norm_forward, (act *qkv, act *qk, float *rstd, const float *q_norm, \
      const float *k_norm, size_t N, size_t H, size_t G, size_t h, bool per_head, float eps)) \
    X(qk_norm_backward, (act *dqkv, float *dq_norm, float *dk_norm, const act *qk, \
      const float *rstd, const float *q_norm, const float *k_norm, size_t N, size_t H, size_t G, \
      size_t h, bool per_head)) \
    X(rope_forward, (act *qkv, const float *table, const int32_t *past, size_t B, size_t T, \
      size_t H, size_t G, size_t h)) \
    X(rope_backward, (act *dqkv, const float *table, size_t B, size_t T, size_t H, size_t G, \
      size_t h)) \
    X(attention_forward, (act *out, float *lse, const act *qkv, size_t B, size_t T, size_t H, \
      size_t G, size_t h)) \
    X(attention_backward, (act *dqkv, float *delta, const act *dout, const act *qkv, \
      const act *out, const float *lse, size_t B, size_t T, size_t H, size_t G, size_t h)) \
    X(swiglu_forward, (act *out, const act *gate_up, size_t N, size_t F)) \
    X(swiglu_backward, (act *dgate_up, act *out, const act *dout, const act *gate_up, size_t N, \
      size_t F)) \
    X(cross_entropy, (float *losses, act *logits, const int32_t *labels, size_t N, size_t V, \
      float scale)) \
    X(cast, (act *out, const float *x, size_t n)) \
    X(add, (float *x, const float *y, size_t n, float keep)) \
    X(state_init, (float *s, const int32_t *past, size_t B, size_t T, size_t d, float sigma, \
      uint64_t seed)) \
    X(kv_store, (act *keys, act *values, const act *qkv, const int32_t *past, const int32_t *lane, \
      size_t B, size_t T, size_t capacity, size_t H, size_t G, size_t h, retrofit_type type)) \
    X(attention_cached, (act *out, const act *qkv, const act *keys, const act *values, \
      const int32_t *past, const int32_t *lane, size_t B, size_t T, size_t capacity, size_t H, \
      size_t G, size_t h, retrofit_type type)) \
    X(kv_backfill, (act *keys, act *values, const int32_t *past, const int32_t *used, size_t S, \
      size_t C, size_t stride, size_t B, size_t capacity, size_t G, size_t h, \
      retrofit_type type)) \
    X(sum_squares, (double *sum, const float *x, size_t n)) \
    X(adamw_update, (float *w, float *m, float *v, const float *g, size_t n, float scale, \
      float lr, float beta1, float beta2, double bias1, double bias2, float eps, float decay)) \
    X(ellisadam_moments, (float *m, float *v, double *sum, const float *g, size_t n, float scale, \
      float beta1, float beta2, float eps)) \
    X(ellisadam_update, (float *w, const float *m, const float *v, const double *sum, size_t n, \
      float lr, double bias1, double bias2, float decay)) \
    X(muon_momentum, (float *u, float *m, const float *g, size_t n, float scale, float momentum)) \
    X(muon_load, (act *x, const float *u, const double *squares, size_t rows, size_t cols)) \
    X(axpby, (act *y, const act *x, size_t n, float a, float b)) \
    X(muon_update, (float *w, const act *x, size_t rows, size_t cols, float lr, float scale, \
      float decay))

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
    // NULL if a device cannot: from record_begin to record_end operations and copies are noted, not
    // done; replay does them, with the same arguments, in one go.
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

// ---- Models and buffers ------------------------------------------------------------------------
// What is trained: all of it, the adapter and the core, or the adapter alone. The rest is frozen.
typedef enum {
    RETROFIT_INFERENCE, RETROFIT_TRAINING, RETROFIT_TRAINING_CORE, RETROFIT_TRAINING_ADAPTER
} retrofit_mode;
// What a forward pass keeps for backward: nothing (blocks run in place), all that retrofit_block
// lists, or each block's output alone, from which backward computes the rest (--recompute).
typedef enum { RETROFIT_KEEP_NOTHING, RETROFIT_KEEP_ALL, RETROFIT_KEEP_INPUTS } retrofit_keep;

// What backward needs of one block.
typedef struct {
    const float *x;          // (N,d)   its input, the output of the block before
    float *rstd_1, *rstd_2;  // (N)
    act *qkv;                // (N,Q)   after RoPE
    act *attention;          // (N,d)
    float *lse;              // (N,H)
    float *mid;              // (N,d)   the residual stream between attention and MLP
    act *gate_up;            // (N,2F)
    float *out;              // (N,d)
    float *projected_1, *projected_2; // (N,d)  W_out·a and W_down·s, if norms stand behind them
    act *qk;                 // (N,(H+G)·h)  q and k before their norms, if they have any, and
    float *rstd_qk;          // (N,2) or (N,H+G)  of those
} retrofit_block;

// What a forward pass saves for backward.
typedef struct {
    retrofit_block *prelude, *core, *coda; // [P], [K·C], [D]
    float **adapted;                       // [K] (N,d)  y_i, the input of the core
} retrofit_saved;

// Gradients of activations; each holds what its comment says until the next operation needs it.
typedef struct {
    float *dx;                        // (N,d)   of the residual stream
    float *dinjected;                 // (N,d)   of A_e·e: Σ dY_i
    float *delta;                     // (N,H)   of attention's backward pass
    act *dbranch;                     // (N,d)   dx, cast, as what a branch added
    act *dinner;                      // (N,d)   of a norm's output
    act *dattention, *dqkv;           // (N,d), (N,Q)
    act *dswiglu, *dgate_up;          // (N,F), (N,2F)
    float *dstream;                   // (N,d)   what a branch adds to dx, with norms behind it
    act *dfinal;                      // (N,d)   of the final norm's output
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
    float *rstd_f, *losses;   // (N)
    act *final;               // (N,d)   RMSNorm_f of it: what the head reads
    act *norm, *swiglu;       // (N,d), (N,F) of the block at work; backward computes them again
    retrofit_block scratch;   // shared by blocks that keep nothing
    bool alike;               // states are drawn for each row as if it were the only one
    act *logits;              // (chunk,V)
    size_t chunk;             // rows of logits that exist at a time
    float *wide_logits, *host_losses;   // (rows,V) in fp32, for the host; (B·T) on the host
    int32_t *host_tokens, *host_labels; // (B·T) on the host: the rows of a training step
    retrofit_saved saved;
    retrofit_gradients gradients;
    retrofit_decoder *decoder; // NULL without a KV cache
} retrofit_buffers;

// ---- Forward and backward ----------------------------------------------------------------------
// One pass, piece by piece. tokens (b,t) lie on the host; each below V, and all fit, or error.
bool retrofit_prelude(retrofit_buffers *buffers, const int32_t *tokens, size_t b, size_t t);
void retrofit_init_state(retrofit_buffers *buffers, float sigma, uint64_t seed);
// n recurrences without gradient, then k with; k = 0 unless training, and K at most in all.
void retrofit_recur(retrofit_buffers *buffers, size_t n, size_t k);
void retrofit_coda(retrofit_buffers *buffers); // and the final norm
// All four. false or error.
bool retrofit_forward(retrofit_buffers *buffers, const int32_t *tokens, size_t b, size_t t,
                      float sigma, uint64_t seed, size_t n, size_t k);
// The mean loss, in nats, over labels (b,t) that are not -100, of which there may be none; NaN or
// error if one is not below V. Unless scale is 0 also the gradient of scale·loss, for backward.
double retrofit_loss(retrofit_buffers *buffers, const int32_t *labels, float scale);
void retrofit_zero_grad(retrofit_model *model);
void retrofit_backward(retrofit_buffers *buffers); // adds to the gradient of every parameter
// Floating-point operations of training on one token with (n,k), and as the paper's figures count.
double retrofit_flops_per_token(const retrofit_config *config, retrofit_mode mode, size_t T,
                                size_t n, size_t k);
double retrofit_paper_flops_per_token(const retrofit_config *config, size_t n, size_t k);

// ---- Training ----------------------------------------------------------------------------------
typedef enum {
    RETROFIT_CURRICULUM_NONE, RETROFIT_CURRICULUM_LINEAR, RETROFIT_CURRICULUM_1_SQRT
} retrofit_curriculum_kind;
typedef enum { RETROFIT_ADAMW, RETROFIT_MUON, RETROFIT_ELLISADAM } retrofit_optimizer_kind;
typedef struct {
    retrofit_optimizer_kind kind;
    float lr, muon_lr;                     // this step's
    float beta1, beta2, eps, weight_decay;
    float momentum;                        // Muon's
    float clip;                            // the largest norm of the whole gradient; 0: no clipping
    float peak_lr;                         // ELLISADAM: the lr that its weight decay is meant for
    float throttle;                        // divides the learning rates of adapter and core; 0: 1
} retrofit_optimizer;

// A whole training; retrofit_paper_training, beside the step in section 4, has the paper's numbers.
typedef struct {
    size_t steps, accumulate, ranks;        // S; micro-batches in a step; processes (0: one)
    size_t mean_recurrence, backprop_depth; // R, K: where the schedules end
    retrofit_curriculum_kind curriculum;
    double curriculum_warmup;               // share of the steps in which the mean grows to R
    size_t depth_start;                     // the depth grows from here to K over the share
    double depth_warmup;                    // depth_warmup; 0: it is K from the beginning
    size_t fixed_n, fixed_k;                // fixed_k > 0: these in every micro-batch, no draws
    double lr, muon_lr;                     // peaks
    double warmup, cooldown, min_lr_ratio;  // shares of the steps; where the rates start and end
    bool throttle;                          // divide adapter's and core's lr by the step's mean k
    retrofit_mode mode;                     // what is trained
    retrofit_optimizer optimizer;           // its lr, muon_lr and throttle are set by every step
    float sigma;                            // of s_0
    uint64_t seed;                          // of the start states
} retrofit_training;
extern const retrofit_training retrofit_paper_training;

// What one step does; a plain Llama has mean = depth = 0.
typedef struct {
    size_t mean, depth; // of the draws: r̄(t), and how many recurrences get gradients at most
    float lr, muon_lr;
} retrofit_plan;

// What a step gave: the gradient's norm before clipping is NaN if the loss is not finite.
typedef struct {
    retrofit_plan plan;
    double loss, norm, mean_k, flops, paper_flops;
    size_t n, k; // of the last micro-batch
} retrofit_step;

// n and k of micro-batch m = 1, 2, 3, … for the mean r̄ and the depth K; *rate: NULL, or the draw.
void retrofit_draw_recurrences(uint64_t m, size_t mean, size_t K, size_t *n, size_t *k,
                               float *rate);
// Schedules at step t (from 0) of S: the mean recurrence before it is rounded up, a value that
// grows linearly from start·base to base (the depth), the learning rate. w, c: shares of S.
double retrofit_curriculum(retrofit_curriculum_kind kind, size_t t, size_t S, double w, double R);
double retrofit_linear_schedule(size_t t, size_t S, double w, double start, double base);
double retrofit_learning_rate(size_t t, size_t S, double w, double c, double min, double lr);
// What step number `step` (from 0) does, and n and k of its micro-batch j (from 0).
retrofit_plan retrofit_plan_step(const retrofit_training *training, const retrofit_config *config,
                                 size_t step);
void retrofit_plan_draw(const retrofit_training *training, const retrofit_plan *plan, size_t step,
                        size_t j, size_t *n, size_t *k);
// Update t = 1, 2, … from the gradients' sum; its 2-norm before clipping. NaN or ∞: no update.
double retrofit_optimizer_step(retrofit_model *model, const retrofit_optimizer *optimizer,
                               size_t t);
// That step, whose update is number t (skipped ones don't count); B rows a time. false or error.
typedef struct retrofit_data retrofit_data; // token shards: section 9
bool retrofit_training_step(retrofit_buffers *buffers, retrofit_data *data,
                            const retrofit_training *training, size_t step, size_t t,
                            retrofit_step *result);

// ---- What the method needs besides operations, from Part III -----------------------------------
// Records an error, one line, and returns false, so that a caller can return it.
__attribute__((format(printf, 1, 2))) bool retrofit_fail(const char *format, ...);
size_t retrofit_type_size(retrofit_type type); // bytes of an element
static inline size_t retrofit_min(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t retrofit_max(size_t a, size_t b) { return a > b ? a : b; }

#ifdef __cplusplus
}
#endif
#endif // RETROFIT_H

#ifdef RETROFIT_IMPLEMENTATION
#include <stdlib.h>
#include <string.h>

// PyTorch's CPU generator, because the authors' draws come from it: section 12.
typedef struct {
    uint32_t state[624];
    size_t next;
} mt19937;
static void mt19937_seed(mt19937 *generator, uint32_t seed);
static double mt19937_normal(mt19937 *generator);
static size_t mt19937_poisson(mt19937 *generator, double rate);

// The operations of a CPU: sections 5, 6, 7 and 10.
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
static matrix_view view(const void *data, size_t row);            // fp32, rows `row` apart
static matrix_view view_transposed(const void *data, size_t row); // of it

// Sums and maxima in a fixed order that compilers can vectorise, and e^x that they can. Section 10.
static float dot(const float *a, const float *b, size_t n);
static float weighted_dot(const float *a, const float *weight, const float *b, size_t n);
static float max_element(const float *x, size_t n);
static double sum_exp(float *terms, const float *x, size_t n, float max); // Σ e^{x - max}
static inline float fast_exp(float x);

// Loops over threads, if the work (elements; of unequal tasks, multiply-adds) is worth waking them.
#ifdef _OPENMP
#define PRAGMA(x) _Pragma(#x)
#else
#define PRAGMA(x)
#endif
enum { FEW_ELEMENTS = 1 << 14, FEW_MULTIPLY_ADDS = 1 << 16 }; // quicker done than handed out
#define PARALLEL_FOR(work) PRAGMA(omp parallel for schedule(static) if ((work) > FEW_ELEMENTS))
#define PARALLEL_TASKS(n) PRAGMA(omp parallel for schedule(dynamic) if ((n) > FEW_MULTIPLY_ADDS))

// Section 7: attention over the KV cache, for a layer whose entries lie in `slot`; the first slot
// of the core's recurrence i = 0, 1, …, and of the coda. Without a cache slots mean nothing.
static void attend_to_cache(retrofit_buffers *buffers, retrofit_block *block, size_t slot);
static size_t core_slot(const retrofit_buffers *buffers, size_t i);
static size_t coda_slot(const retrofit_buffers *buffers);
// Section 10: biases and norms of q and k, where a model has them, and their gradients.
static void finish_qkv(retrofit_buffers *buffers, const retrofit_layer *layer, retrofit_block *to);
static void finish_qkv_backward(retrofit_buffers *buffers, retrofit_layer *layer,
                                const retrofit_block *block);
// Normal numbers for every state.
static void draw_states(retrofit_buffers *buffers, float *states, float sigma, uint64_t seed);
// Section 8: checks the next batch's token ids and uploads them; counts the labels. false or error.
static bool set_batch(retrofit_buffers *buffers, const int32_t *tokens, size_t b, size_t t);
static bool count_labels(const retrofit_buffers *buffers, const int32_t *labels, size_t *counted);
static act *act_at(const retrofit_ops *ops, act *p, size_t i); // element i
// Section 8: masters to where operations read them. Counter-based random bits.
void retrofit_refresh_weights(retrofit_model *model);
static inline uint64_t retrofit_hash(uint64_t seed, uint64_t counter);
static inline float retrofit_hash_normal(uint64_t seed, uint64_t counter);
// Section 8: a micro-batch's rows, counted from 0 over the training. Section 12: elements as fp32.
static bool read_micro_batch(retrofit_buffers *buffers, retrofit_data *data, uint64_t index);
// Section 8: is micro-batch j this process's; parts whose sums over all are due. false or error.
static void gradients_done(retrofit_model *model, retrofit_part part);
static bool is_own(retrofit_model *model, const retrofit_training *training, size_t j);
static bool sum_over_ranks(retrofit_model *model, double *loss);
void retrofit_to_float(float *out, const void *data, retrofit_type type, size_t n);

// =================================================================================================
// 2  A block, forward and backward
// =================================================================================================
// Llama's block, on the residual stream x (N,d):
//     a   = attention(rope(W_qkv·RMSNorm_1(x)))          mid = x + W_out·a
//     s   = swiglu(W_gate_up·RMSNorm_2(mid))             out = mid + W_down·s
// Backward has dx, the gradient of out, and turns it into that of x. Each branch adds to the
// stream, so the stream's gradient passes unchanged and the branch's is added to it:
//
//     ds   = W_downᵀ·dx       dW_down    += dx·sᵀ        dx += RMSNorm_2ᵀ(W_gate_upᵀ·swigluᵀ(ds))
//     da   = W_outᵀ·dx        dW_out     += dx·aᵀ        dx += RMSNorm_1ᵀ(W_qkvᵀ·ropeᵀ(attnᵀ(da)))
// where fᵀ(dy) is the derivative of f applied to dy, and dW_gate_up, dW_qkv are the products of
// their outputs' gradients with the norms' outputs.
//
// What is kept for that: with c bytes for an element of act, 8 + 4H for rstd and lse, (Q + d +
// 2F)·c for qkv, attention and gate_up, 8d for mid and out; for TinyLlama in bf16 48 KB per token
// and layer. The norms' outputs and swiglu's, 2d + F elements, are cheap and are computed again.
// With RETROFIT_KEEP_INPUTS only out, the next block's input, is kept, 4d bytes (8 KB), and the
// rest is computed again as well: a quarter more work. Each of the k recurrences keeps its C blocks
// and y_i, the n nothing: memory grows with P + D + k·C.
//
// Other families differ in where a norm stands. Qwen2 adds a bias to W_qkv·RMSNorm_1(x), Qwen3 has
// a norm of each head of q and k, OLMo-2 of q and k whole; rope comes after. And OLMo-2's branches
// read the stream itself, while what they give passes a norm before it is added:
//     mid = x + RMSNorm_1(W_out·attention(…))            out = mid + RMSNorm_2(W_down·swiglu(…))
// The four functions that follow are the two ends of a branch, and their gradients; finish_qkv, in
// section 10, is what Qwen2 and Qwen3 add between W_qkv and rope.

// What a branch reads of the stream: its norm, or, with norms behind branches, the stream, cast.
static void branch_input(retrofit_buffers *buffers, float *rstd, const float *x,
                         const retrofit_parameter *norm) {
    const retrofit_config *c = &buffers->model->config;
    const retrofit_ops *ops = buffers->model->ops;
    size_t N = buffers->N, d = c->n_embd;
    if (c->post_norm) ops->cast(buffers->norm, x, N * d);
    else ops->rmsnorm_forward(buffers->norm, rstd, x, norm->weight.data, N, d, c->norm_eps);
}

// out = x + w·inp, or out = x + RMSNorm(w·inp); inp (N,I).
static void branch_output(retrofit_buffers *buffers, float *out, const float *x, const act *inp,
                          retrofit_weight w, size_t I, float *projected, float *rstd,
                          const retrofit_parameter *norm) {
    const retrofit_config *c = &buffers->model->config;
    const retrofit_ops *ops = buffers->model->ops;
    size_t N = buffers->N, d = c->n_embd;
    if (!c->post_norm) {
        ops->matmul_residual_forward(out, x, inp, w, N, I, d);
        return;
    }
    ops->matmul_residual_forward(projected, NULL, inp, w, N, I, d);
    ops->rmsnorm_residual_forward(out, rstd, x, projected, norm->weight.data, N, d, c->norm_eps);
}

// dbranch, the gradient of w·inp, from dx.
static void branch_output_backward(retrofit_buffers *buffers, const float *projected,
                                   const float *rstd, const retrofit_parameter *norm) {
    const retrofit_ops *ops = buffers->model->ops;
    const retrofit_gradients *g = &buffers->gradients;
    size_t N = buffers->N, d = buffers->model->config.n_embd;
    if (!buffers->model->config.post_norm) ops->cast(g->dbranch, g->dx, N * d);
    else ops->rmsnorm_residual_backward(g->dbranch, norm->grad, g->dx, projected, rstd,
                                        norm->weight.data, N, d);
}

// Adds to dx what comes through the branch's first matrix w (O,d), from dout (N,O).
static void branch_input_backward(retrofit_buffers *buffers, const act *dout, retrofit_weight w,
                                  size_t O, const float *x, const float *rstd,
                                  const retrofit_parameter *norm) {
    const retrofit_ops *ops = buffers->model->ops;
    const retrofit_gradients *g = &buffers->gradients;
    size_t N = buffers->N, d = buffers->model->config.n_embd;
    if (buffers->model->config.post_norm) {
        ops->matmul_residual_backward_input(g->dstream, dout, w, N, d, O);
        ops->add(g->dx, g->dstream, N * d, 1);
        return;
    }
    ops->matmul_backward_input(g->dinner, dout, w, N, d, O);
    ops->rmsnorm_backward(g->dx, norm->grad, g->dinner, x, rstd, norm->weight.data, N, d);
}

// slot: where the layer's keys and values go in the KV cache, if there is one.
static void block_until_gate_up(retrofit_buffers *buffers, const retrofit_layer *layer,
                                retrofit_block *block, const float *x, size_t slot) {
    const retrofit_config *c = &buffers->model->config;
    const retrofit_ops *ops = buffers->model->ops;
    size_t N = buffers->N, b = buffers->b, t = buffers->t, d = c->n_embd, F = c->intermediate;
    size_t H = c->n_heads, G = c->n_kv_heads, h = c->head_dim, Q = retrofit_qkv_width(c);
    const int32_t *past = buffers->decoder ? buffers->past : NULL;
    block->x = x;

    branch_input(buffers, block->rstd_1, x, &layer->norm_1);
    ops->matmul_forward(block->qkv, buffers->norm, layer->w_qkv.weight, N, d, Q);
    finish_qkv(buffers, layer, block);
    ops->rope_forward(block->qkv, buffers->rope, past, b, t, H, G, h);
    if (buffers->decoder) attend_to_cache(buffers, block, slot);
    else ops->attention_forward(block->attention, block->lse, block->qkv, b, t, H, G, h);
    branch_output(buffers, block->mid, x, block->attention, layer->w_out.weight, d,
                  block->projected_1, block->rstd_1, &layer->norm_1);
    branch_input(buffers, block->rstd_2, block->mid, &layer->norm_2);
    ops->matmul_forward(block->gate_up, buffers->norm, layer->w_gate_up.weight, N, d, 2 * F);
}

static void block_after_gate_up(retrofit_buffers *buffers, const retrofit_layer *layer,
                                retrofit_block *block) {
    size_t F = buffers->model->config.intermediate;
    buffers->model->ops->swiglu_forward(buffers->swiglu, block->gate_up, buffers->N, F);
    branch_output(buffers, block->out, block->mid, buffers->swiglu, layer->w_down.weight, F,
                  block->projected_2, block->rstd_2, &layer->norm_2);
}

static void block_forward(retrofit_buffers *buffers, const retrofit_layer *layer,
                          retrofit_block *block, const float *x, size_t slot) {
    block_until_gate_up(buffers, layer, block, x, slot);
    block_after_gate_up(buffers, layer, block);
}

static void block_backward(retrofit_buffers *buffers, retrofit_layer *layer,
                           retrofit_block *block) {
    const retrofit_config *c = &buffers->model->config;
    const retrofit_ops *ops = buffers->model->ops;
    const retrofit_gradients *g = &buffers->gradients;
    size_t N = buffers->N, b = buffers->b, t = buffers->t, d = c->n_embd, F = c->intermediate;
    size_t H = c->n_heads, G = c->n_kv_heads, h = c->head_dim, Q = retrofit_qkv_width(c);
    act *norm = buffers->norm, *swiglu = buffers->swiglu;
    bool trained = !layer->w_qkv.frozen; // a layer is frozen as a whole

    if (buffers->keep == RETROFIT_KEEP_INPUTS) {
        block_until_gate_up(buffers, layer, block, block->x, 0);
        if (c->post_norm) block_after_gate_up(buffers, layer, block); // for projected_2
    }

    branch_output_backward(buffers, block->projected_2, block->rstd_2, &layer->norm_2);
    ops->matmul_backward_input(g->dswiglu, g->dbranch, layer->w_down.weight, N, F, d);
    ops->swiglu_backward(g->dgate_up, swiglu, g->dswiglu, block->gate_up, N, F);
    if (trained) {
        ops->matmul_backward_weight(layer->w_down.grad, F, g->dbranch, swiglu, N, F, d);
        branch_input(buffers, block->rstd_2, block->mid, &layer->norm_2);
        ops->matmul_backward_weight(layer->w_gate_up.grad, d, g->dgate_up, norm, N, d, 2 * F);
    }
    branch_input_backward(buffers, g->dgate_up, layer->w_gate_up.weight, 2 * F, block->mid,
                          block->rstd_2, &layer->norm_2);

    branch_output_backward(buffers, block->projected_1, block->rstd_1, &layer->norm_1);
    if (trained)
        ops->matmul_backward_weight(layer->w_out.grad, d, g->dbranch, block->attention, N, d, d);
    ops->matmul_backward_input(g->dattention, g->dbranch, layer->w_out.weight, N, d, d);
    ops->attention_backward(g->dqkv, g->delta, g->dattention, block->qkv, block->attention,
                            block->lse, b, t, H, G, h);
    ops->rope_backward(g->dqkv, buffers->rope, b, t, H, G, h);
    finish_qkv_backward(buffers, layer, block);
    if (trained) {
        branch_input(buffers, block->rstd_1, block->x, &layer->norm_1);
        ops->matmul_backward_weight(layer->w_qkv.grad, d, g->dqkv, norm, N, d, Q);
    }
    branch_input_backward(buffers, g->dqkv, layer->w_qkv.weight, Q, block->x, block->rstd_1,
                          &layer->norm_1);
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
// ---- Prelude: e = prelude(wte[tokens]), and A_e·e ----------------------------------------------
// The second half of the adapter's columns; A_s begins where A does. Rows are 2d numbers apart.
static retrofit_weight adapter_e(const retrofit_model *model) {
    retrofit_weight w = model->adapter.weight;
    w.data = (const char *)w.data + model->config.n_embd * retrofit_type_size(w.type);
    return w;
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

// ---- Recurrence: s_i = core(A_s·s_{i-1} + A_e·e) -----------------------------------------------
// The same distribution in training and at test time (σ: RETROFIT_STATE_STD), drawn anew for every
// micro-batch: the model learns to reach its answer from anywhere. σ = 0 gives s_0 = 0, for tests.
// Each number is a function of (seed, row, position, column); the authors' are drawn by torch for
// the whole batch at once, so that in their module a row's logits depend on what comes with it.
void retrofit_init_state(retrofit_buffers *buffers, float sigma, uint64_t seed) {
    draw_states(buffers, buffers->state, sigma, seed);
}

// x = A_s·state + A_e·e = A·concat(state, e)
static void inject(retrofit_buffers *buffers, const float *state, float *x) {
    const retrofit_model *model = buffers->model;
    size_t N = buffers->N, d = model->config.n_embd;
    act *norm = buffers->norm;
    model->ops->cast(norm, state, N * d);
    model->ops->matmul_residual_forward(x, buffers->injected, norm, model->adapter.weight, N, d, d);
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

// ---- Coda: logits = lm_head·RMSNorm_f(coda(s_r)) -----------------------------------------------
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

// ---- Loss --------------------------------------------------------------------------------------
// The mean of -log softmax(logits)[label] over the labels of a micro-batch that are not -100. A
// step accumulates micro-batches: each counts 1/accumulate (`scale`), however many labels it has,
// so a step's loss is the mean of its micro-batches' means, not that of all its tokens. One without
// a label has the loss 0 and no gradient (torch's mean over nothing, NaN, would undo its step).

// The logits exist in chunks of rows, never all (N,V) at once: a chunk's gradient takes its place
// and goes on to the head and to dfinal before the next chunk is computed.
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
    size_t N = buffers->N, d = model->config.n_embd, counted = 0;
    if (!count_labels(buffers, labels, &counted)) return NAN;
    if (counted == 0) counted = 1; // all sums are 0
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

// ---- Backward: through the coda, the last k recurrences, the prelude ---------------------------
// From i = n + k down to n + 1. dx comes in as ds_i and leaves as ds_{i-1}; in between it is dY_i,
// the gradient of A·concat(s_{i-1}, e). At i = n + 1 it stops: s_n counts as a constant.
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
        if (j == 0) break;
        ops->matmul_residual_backward_input(g->dx, g->dbranch, model->adapter.weight, N, d, d);
    }
}

// dA_e = (Σ dY_i)·eᵀ and, unless the prelude is frozen, de = A_eᵀ·(Σ dY_i), which overwrites dx.
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
    const float *dx = buffers->gradients.dx;
    blocks_backward(buffers, model->coda, c->coda, buffers->saved.coda);
    gradients_done(model, RETROFIT_PART_CODA);
    if (!retrofit_is_plain(c)) {
        recurrence_backward(buffers);
        injection_backward(buffers);
        gradients_done(model, RETROFIT_PART_ADAPTER);
        if (model->wte.frozen) return;
        blocks_backward(buffers, model->prelude, c->prelude, buffers->saved.prelude);
    }
    model->ops->embedding_backward(model->wte.grad, buffers->tokens, dx, buffers->N, c->n_embd);
}

// =================================================================================================
// 4  How many recurrences, and the step: sampler, schedules, plan, training
// =================================================================================================
// ---- The sampler -------------------------------------------------------------------------------
// How often the core runs is drawn anew for every micro-batch m = 1, 2, 3, …:
//
//     rate ~ LogNormal(ln r̄ - σ²/2, σ),  σ = 1/2         its mean is r̄, the plan's
//     p    ~ Poisson(rate) + 1                            recurrences, section 0's r
//     n = max(p - K, 0) without gradient, then k = min(p, K) with
//
// A model trained at one depth is good at that depth alone. A Poisson draw varies depth, but too
// little: 8 ± 2.8. Its rate being log-normal makes the tail heavy, 8 ± 5, so that now and then the
// model must still be right three or four times as deep as usual, and becomes stable there. The
// rows of a micro-batch share a draw, for they go through the core together. The mean of a
// log-normal number is e^{μ + σ²/2}: hence the -σ²/2. A Poisson draw can be 0, and a model must run
// its core once: hence the + 1, and hence the mean of n + k is r̄ + 1. A hundred thousand draws for
// r̄ = K = 8 have the mean 8.98 and the deviation 5.1; the largest is 77:
//
//     recurrences   1 –  4   █████████                17.0 %
//                   5 –  8   ███████████████████      37.5 %
//                   9 – 16   ███████████████████      37.5 %
//                  17 – 77   ████                      8.1 %
//
// In place of r̄ the code has max(r̄, K): the authors write ln(max(r̄ - K, 0) + K), so that a mean
// below K draws like K. Without the max such draws would differ from theirs. A training never sees
// it, because its plan lowers K to r̄ first.
//
// The draw depends on m, r̄ and K alone; m counts on over steps and epochs. Every device of a run,
// and a run that was resumed, makes the same one, so no device waits for another that thinks
// longer. The generator is PyTorch's, seeded anew for each draw as the authors do: 514229 (a
// Fibonacci number) plus m, modulo 2³¹ - 1. The low 53 bits of two words, the first one high, make
// a uniform, two uniforms a normal number, √(-2·log(1 - u₂))·cos(2πu₁). The Poisson number is how
// many uniforms can be multiplied before the product falls to e^-rate; from a rate of 10 on it is
// Hörmann's PTRS (section 12). The rate is rounded to fp32, as torch's is.
void retrofit_draw_recurrences(uint64_t m, size_t mean, size_t K, size_t *n, size_t *k,
                               float *rate) {
    const double sigma = 0.5;
    mt19937 generator;
    mt19937_seed(&generator, (uint32_t)((514229 + m) % 0x7fffffffu));
    double mu = log((double)retrofit_max(mean, K)) - sigma * sigma / 2;
    float drawn = (float)exp(mu + sigma * mt19937_normal(&generator));
    size_t p = mt19937_poisson(&generator, (double)drawn) + 1;
    *n = p > K ? p - K : 0;
    *k = retrofit_min(p, K);
    if (rate) *rate = drawn;
}

// ---- Schedules ---------------------------------------------------------------------------------
// All are functions of the step t = 0 … S - 1. w and c are shares of S; each has its own w.
//
//     curriculum     r̄(t) = ceil(R·f(t / ceil(w·S))),  f(x) = x or 1 - √(1 - x);  0 becomes 1
//     depth          K(t) = ceil(K·(a + (1 - a)·t / ceil(w·S))),  a = start/K, and at most r̄(t)
//     learning rate  lr·(a + (1 - a)·t / ceil(w·S)),  a = min_lr_ratio, then lr, and over the last
//                    u = ceil(c·S) steps  lr·(a + (1 - a)·(1 + cos(π·x))/2),  x = (t - (S - u))/u
//
// The curriculum lets most of the training happen where recurrences are cheap. In the paper's runs,
// R = 32, K = 8, S = 50,000, its w = .75 and 1 - √(1 - x), which stays low long and rises late:
//
//     step t                  0   3,750   9,375   18,750   28,125   33,750   37,500 …
//     r̄(t)                    1       2       5       10       16       22       32
//     (n,k) of p = r̄ + 1    1,1     1,2     1,5      3,8      9,8     15,8     25,8
//
// After its warm-up the curriculum stays at R, the depth at K (in the paper's runs from the
// beginning), the learning rate at lr until it falls; a warm-up that reaches into the fall goes
// first, then the rate jumps onto the cosine. At t = S, one step past the end, the authors'
// schedules return to their starting value: the curriculum to 0, the depth to its start, the rate
// to a·lr, where its cosine ends anyway. Ours do so too: the fixtures include that step.
double retrofit_curriculum(retrofit_curriculum_kind kind, size_t t, size_t S, double w, double R) {
    double warmup = ceil(w * (double)S);
    if (kind == RETROFIT_CURRICULUM_NONE) return R;
    if (t >= S) return 0;
    if ((double)t >= warmup) return R;
    double x = (double)t / warmup;
    return R * (kind == RETROFIT_CURRICULUM_LINEAR ? x : 1 - sqrt(1 - x));
}

double retrofit_linear_schedule(size_t t, size_t S, double w, double start, double base) {
    double warmup = ceil(w * (double)S);
    if (t >= S) return base * start;
    if ((double)t >= warmup) return base;
    return base * (start + (1 - start) * ((double)t / warmup));
}

double retrofit_learning_rate(size_t t, size_t S, double w, double c, double min, double lr) {
    double warmup = ceil(w * (double)S), cooldown = ceil(c * (double)S), step = (double)t;
    if (step < warmup) return lr * (min + (1 - min) * (step / warmup));
    double begin = (double)S - cooldown;
    if (step < begin) return lr;
    double x = cooldown > 0 ? fmin(1, (step - begin) / cooldown) : 1;
    return lr * (min + (1 - min) * 0.5 * (1 + cos(3.14159265358979323846 * x)));
}

// ---- The training ------------------------------------------------------------------------------
// The paper's training of TinyLlama: 50,000 steps of 1,024 rows in micro-batches of 8 rows of 1,024
// tokens. (The authors' 4 to 64 GPUs run as many micro-batches at a time with the same m and draw,
// as .ranks do. Here one process runs the 128 one after another, each with an m of its own.)
const retrofit_training retrofit_paper_training = {
    .steps = 50000, .accumulate = 128, .seed = 1, .sigma = (float)RETROFIT_STATE_STD,
    .mean_recurrence = 32, .curriculum = RETROFIT_CURRICULUM_1_SQRT, .curriculum_warmup = 0.75,
    .backprop_depth = 8, .depth_start = 1, .depth_warmup = 0,
    .lr = 5e-5, .muon_lr = 1e-3, .warmup = 0.0025, .cooldown = 0.6, .min_lr_ratio = 0.001,
    .mode = RETROFIT_TRAINING,
    .optimizer = {.kind = RETROFIT_MUON, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-10f,
                  .weight_decay = 1e-4f, .momentum = 0.95f, .clip = 1, .peak_lr = 5e-5f},
};

retrofit_plan retrofit_plan_step(const retrofit_training *training, const retrofit_config *config,
                                 size_t step) {
    const retrofit_training *run = training;
    size_t S = run->steps;
    double w = run->warmup, c = run->cooldown, min = run->min_lr_ratio;
    retrofit_plan plan = {0};
    plan.lr = (float)retrofit_learning_rate(step, S, w, c, min, run->lr);
    plan.muon_lr = (float)retrofit_learning_rate(step, S, w, c, min, run->muon_lr);
    if (retrofit_is_plain(config)) return plan;

    double R = (double)run->mean_recurrence, K = (double)run->backprop_depth;
    double mean = retrofit_curriculum(run->curriculum, step, S, run->curriculum_warmup, R);
    plan.mean = retrofit_max(1, (size_t)ceil(mean));
    if (run->fixed_k) plan.mean = run->fixed_n + run->fixed_k;
    // A little is taken off before rounding up: K·start/K may come out a bit more than start.
    w = run->fixed_k ? 0 : run->depth_warmup;
    double depth = retrofit_linear_schedule(step, S, w, (double)run->depth_start / K, K) - 1e-9;
    plan.depth = retrofit_min(plan.mean, (size_t)ceil(depth));
    return plan;
}

void retrofit_plan_draw(const retrofit_training *training, const retrofit_plan *plan, size_t step,
                        size_t j, size_t *n, size_t *k) {
    *n = training->fixed_n;
    *k = training->fixed_k;
    if (plan->mean == 0 || training->fixed_k) return;
    size_t count = training->accumulate / retrofit_max(1, training->ranks);
    uint64_t m = step * count + j % count + 1;
    retrofit_draw_recurrences(m, plan->mean, plan->depth, n, k, NULL);
}

bool retrofit_training_step(retrofit_buffers *buffers, retrofit_data *data,
                            const retrofit_training *training, size_t step, size_t t,
                            retrofit_step *result) {
    retrofit_model *model = (retrofit_model *)buffers->model;
    const retrofit_config *c = &model->config;
    const int32_t *tokens = buffers->host_tokens, *labels = buffers->host_labels;
    size_t B = buffers->B, T = buffers->T, count = training->accumulate;
    retrofit_plan plan = retrofit_plan_step(training, c, step);
    retrofit_step r = {.plan = plan, .norm = NAN};

    retrofit_zero_grad(model);
    for (size_t j = 0; j < count; j++) {
        uint64_t index = (uint64_t)step * count + j, seed = retrofit_hash(training->seed, index);
        retrofit_plan_draw(training, &plan, step, j, &r.n, &r.k);
        r.flops += retrofit_flops_per_token(c, training->mode, T, r.n, r.k) * (double)(B * T);
        r.paper_flops += retrofit_paper_flops_per_token(c, r.n, r.k) * (double)(B * T);
        r.mean_k += (double)r.k / (double)count;
        if (!is_own(model, training, j)) continue;
        if (!read_micro_batch(buffers, data, index)) return false;
        if (!retrofit_forward(buffers, tokens, B, T, training->sigma, seed, r.n, r.k)) return false;
        r.loss += retrofit_loss(buffers, labels, 1.0f / (float)count) / (double)count;
        retrofit_backward(buffers);
    }
    if (!sum_over_ranks(model, &r.loss)) return false;

    retrofit_optimizer optimizer = training->optimizer;
    optimizer.lr = plan.lr;
    optimizer.muon_lr = plan.muon_lr;
    optimizer.throttle = training->throttle ? (float)r.mean_k : 0;
    if (isfinite(r.loss)) r.norm = retrofit_optimizer_step(model, &optimizer, t);
    *result = r;
    return true;
}

// =================================================================================================
// 5  Optimizers: AdamW, Muon, AdamW*
// =================================================================================================
// g below is the accumulated gradient times min(1, clip / (‖g‖ + 1e-6)), ‖g‖ the 2-norm over all
// parameters that are trained. The updates hardly depend on the gradient's scale; clipping keeps
// one large gradient from ruling the moments for many steps. t counts updates from 1.
//     parameter                      updated by   learning rate   weight decay   eps
//     muon       w_qkv w_out         Muon         1e-3            1e-4
//                w_gate_up w_down A
//                wte lm_head norms   AdamW        5e-5            1e-4           1e-10
//     adamw      all                 AdamW        5e-5            1e-4           1e-8
//     ellisadam  all                 AdamW*       5e-5            1e-4           1e-6
//
// β₁ = .9 and β₂ = .95 for all three. 1e-8 is PyTorch's default for AdamW, 1e-10 that of the Adam
// which the Muon package brings along for what is no matrix. Weight decay is on every parameter,
// norms and embeddings too. Learning rates are peaks; all follow one schedule (section 4), and the
// decay with them. throttle divides those of adapter and core by the step's mean k: what runs k
// times moves the output k times as far.
// ---- AdamW -------------------------------------------------------------------------------------
//     m ← m + (1 - β₁)·(g - m)             m̂ = m / (1 - β₁ᵗ)
//     v ← β₂·v + (1 - β₂)·g²               v̂ = v / (1 - β₂ᵗ)
//     w ← w·(1 - lr·decay) - lr·m̂ / (√v̂ + eps)
// m and v start at 0; bias1 and bias2 are the two denominators.
static void adamw_update(float *w, float *m, float *v, const float *g, size_t n, float scale,
                         float lr, float beta1, float beta2, double bias1, double bias2, float eps,
                         float decay) {
    float step = (float)(lr / bias1), root = (float)sqrt(bias2), keep = 1.0f - lr * decay;
    PARALLEL_FOR(n)
    for (size_t i = 0; i < n; i++) {
        float gi = g[i] * scale;
        m[i] += (1.0f - beta1) * (gi - m[i]);
        v[i] = beta2 * v[i] + (1.0f - beta2) * gi * gi;
        w[i] = w[i] * keep - step * m[i] / (sqrtf(v[i]) / root + eps);
    }
}

// ---- Muon --------------------------------------------------------------------------------------
//     m ← m + (1 - μ)·(g - m)                      momentum, μ = .95
//     u = g + μ·(m - g)                            Nesterov's look ahead
//     X = u / (‖u‖ + 1e-7), ‖u‖² = Σ u_ij², transposed if it has more rows than columns
//     five times:  X ← a·X + (b·M + c·M²)·X,  M = X·Xᵀ,  (a, b, c) = (3.4445, -4.7750, 2.0315)
//     w ← w·(1 - lr·decay) - lr·√max(1, rows/cols)·X
//
// Adam steps along a matrix's few strongest directions; Muon takes an equally long step along all
// of them. With u = U·diag(s)·Vᵀ that step would be U·Vᵀ. The iteration comes close without U and
// V: it leaves them as they are and maps every singular value s to a·s + b·s³ + c·s⁵. Its
// coefficients (Jordan 2024) are chosen for speed: five times brings all s from .002 to 1 to
// between .68 and 1.20; it does not converge to 1. The last factor, √(Q/d) for w_qkv, √(2F/d) for
// w_gate_up, else 1, makes a tall matrix's step change its output as much as a wide one's.
//
// w_qkv and w_gate_up are orthogonalised whole, although they stack three and two matrices. If two
// stacked gradients both have the input direction x, with singular values s₁ and s₂, the stack has
// it once, with √(s₁² + s₂²), and their steps along x are s₁ and s₂ over that instead of 1 each. So
// it is in the authors' models; only their baseline, Hugging Face's Llama, has matrices apart.
static void muon_momentum(float *u, float *m, const float *g, size_t n, float scale,
                          float momentum) {
    PARALLEL_FOR(n)
    for (size_t i = 0; i < n; i++) {
        float gi = g[i] * scale;
        m[i] += (1.0f - momentum) * (gi - m[i]);
        u[i] = gi + momentum * (m[i] - gi);
    }
}

static void muon_update(float *w, const act *x_, size_t rows, size_t cols, float lr, float scale,
                        float decay) {
    const float *x = x_;
    PARALLEL_FOR(rows * cols)
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c < cols; c++) {
            float step = x[rows > cols ? c * rows + r : r * cols + c];
            w[r * cols + c] = w[r * cols + c] * (1.0f - lr * decay) - lr * scale * step;
        }
    }
}

static void newton_schulz(retrofit_model *model, size_t rows, size_t cols) {
    const retrofit_ops *ops = model->ops;
    size_t r = retrofit_min(rows, cols), c = retrofit_max(rows, cols);
    act *X = model->muon_x, *Y = model->muon_y, *M = model->muon_a, *B = model->muon_b;
    retrofit_weight x = {X, ops->act_type, c};
    for (int i = 0; i < 5; i++) {
        ops->matmul_symmetric(M, X, r, c);                   // M = X·Xᵀ
        ops->matmul_symmetric(B, M, r, r);                   // B = M·Mᵀ = M², M being symmetric
        ops->axpby(B, M, r * r, -4.7750f, 2.0315f);          // B = b·M + c·M²
        ops->matmul_backward_input(Y, B, x, r, c, r);        // Y = B·X
        ops->axpby(X, Y, r * c, 1, 3.4445f);                 // X = Y + a·X
    }
}

static void muon_step(retrofit_model *model, const retrofit_parameter *p,
                      const retrofit_optimizer *optimizer, float scale, float lr) {
    const retrofit_ops *ops = model->ops;
    size_t n = p->rows * p->cols;
    float tall = sqrtf(fmaxf(1, (float)p->rows / (float)p->cols));
    double *squares = model->sum;
    ops->muon_momentum(model->muon_u, p->m, p->grad, n, scale, optimizer->momentum);
    ops->zero(squares, sizeof *squares);
    ops->sum_squares(squares, model->muon_u, n);
    ops->muon_load(model->muon_x, model->muon_u, squares, p->rows, p->cols);
    newton_schulz(model, p->rows, p->cols);
    ops->muon_update(p->master, model->muon_x, p->rows, p->cols, lr, tall,
                     optimizer->weight_decay);
}

// ---- AdamW*: the paper's name; ELLISAdam in the authors' code, with their switches -------------
//     m, v as AdamW's, but they begin as the first gradient and its square; v ← max(v, eps²)
//     step = lr / bias1 / max(1, √mean(g²/v))      a tensor whose gradient is larger than v expects
//                                                  takes a smaller step
//     w ← w·(1 - decay·lr/peak_lr) - step·atan2(m, √(v / bias2))
// atan2(m, √v) is about m/√v where that is small and never above π/2: eps is only the floor of √v.
// The weight decay follows the schedule, not the size of the learning rate. The bias corrections
// stay although the moments do not start at 0: the first step is 2.2·lr long.
static void ellisadam_moments(float *m, float *v, double *sum, const float *g, size_t n,
                              float scale, float beta1, float beta2, float eps) {
    enum { BLOCK = 1 << 12, BLOCKS = 256 }; // summed side by side, added in order
    double total = 0;
    for (size_t at = 0; at < n; at += (size_t)BLOCK * BLOCKS) {
        double sums[BLOCKS] = {0};
        PARALLEL_FOR(n - at)
        for (size_t i = 0; i < BLOCKS; i++) {
            size_t end = retrofit_min(at + (i + 1) * BLOCK, n);
            for (size_t j = at + i * BLOCK; j < end; j++) {
                float gj = g[j] * scale;
                m[j] += (1.0f - beta1) * (gj - m[j]);
                v[j] = beta2 * v[j] + (1.0f - beta2) * gj * gj;
                if (v[j] < eps * eps) v[j] = eps * eps;
                sums[i] += gj * gj / v[j];
            }
        }
        for (size_t i = 0; i < BLOCKS; i++) total += sums[i];
    }
    *sum += total;
}

static void ellisadam_update(float *w, const float *m, const float *v, const double *sum, size_t n,
                             float lr, double bias1, double bias2, float decay) {
    double rms = sqrt(*sum / (double)n);
    float step = (float)(lr / bias1 / fmax(1, rms)), root = (float)sqrt(bias2);
    PARALLEL_FOR(n)
    for (size_t i = 0; i < n; i++)
        w[i] = w[i] * (1.0f - decay) - step * atan2f(m[i], sqrtf(v[i]) / root);
}

static void ellisadam_step(retrofit_model *model, const retrofit_parameter *p,
                           const retrofit_optimizer *optimizer, float scale, float lr, size_t t,
                           double bias1, double bias2) {
    const retrofit_ops *ops = model->ops;
    size_t n = p->rows * p->cols;
    double *sum = model->sum;
    bool first = t == 1; // with β = 0 the moments become the gradient and its square
    float beta1 = first ? 0 : optimizer->beta1, beta2 = first ? 0 : optimizer->beta2;
    float of_peak = optimizer->peak_lr > 0 ? optimizer->lr / optimizer->peak_lr : 1;
    ops->zero(sum, sizeof *sum);
    ops->ellisadam_moments(p->m, p->v, sum, p->grad, n, scale, beta1, beta2, optimizer->eps);
    ops->ellisadam_update(p->master, p->m, p->v, sum, n, lr, bias1, bias2,
                          optimizer->weight_decay * of_peak);
}

// ---- One update of all parameters --------------------------------------------------------------
bool retrofit_by_muon(const retrofit_parameter *p, retrofit_optimizer_kind kind) {
    return kind == RETROFIT_MUON && p->kind == RETROFIT_MATRIX;
}

double retrofit_sum_squares(const retrofit_model *model, const float *x, size_t n) {
    const retrofit_ops *ops = model->ops;
    double squares;
    ops->zero(model->sum, sizeof *model->sum);
    ops->sum_squares(model->sum, x, n);
    ops->download(&squares, model->sum, sizeof squares);
    return squares;
}

double retrofit_optimizer_step(retrofit_model *model, const retrofit_optimizer *optimizer,
                               size_t t) {
    const retrofit_optimizer *o = optimizer;
    size_t numbers = model->grad_bytes / sizeof(float);
    double norm = sqrt(retrofit_sum_squares(model, model->grads, numbers));
    if (!isfinite(norm)) return norm;
    float scale = o->clip > 0 ? (float)fmin(1, o->clip / (norm + 1e-6)) : 1;
    double bias1 = 1 - pow(o->beta1, (double)t), bias2 = 1 - pow(o->beta2, (double)t);

    for (size_t i = 0; i < model->parameter_count; i++) {
        const retrofit_parameter *p = model->parameters[i];
        bool repeated = p->part == RETROFIT_PART_CORE || p->part == RETROFIT_PART_ADAPTER;
        float slower = repeated && o->throttle > 0 ? o->throttle : 1;
        float lr = o->lr / slower;
        if (!p->m) continue; // frozen, or updated by another process
        if (retrofit_by_muon(p, o->kind)) muon_step(model, p, o, scale, o->muon_lr / slower);
        else if (o->kind == RETROFIT_ELLISADAM)
            ellisadam_step(model, p, o, scale, lr, t, bias1, bias2);
        else
            model->ops->adamw_update(p->master, p->m, p->v, p->grad, p->rows * p->cols, scale, lr,
                                     o->beta1, o->beta2, bias1, bias2, o->eps, o->weight_decay);
    }
    retrofit_refresh_weights(model);
    return norm;
}

// =================================================================================================
// 6  The operations on a CPU, forward beside backward
// =================================================================================================
// `act` is float here. Above each operation stand its formula and its gradient, where dy means
// ∂loss/∂y and ∘ multiplies element by element. Section 10 has the matrix products, the tiles of
// attention, and sums over a row in an order that is fast.

// Gradients that are sums over rows are divided among the threads by columns, so many at a time:
// then each element's rows add up in their order, however many threads there are.
enum { COLUMNS = 64 };

// ---- Embedding ---------------------------------------------------------------------------------
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

// ---- RMSNorm -----------------------------------------------------------------------------------
//     y = ρ·x∘w                     dx += ρ·(g - ρ²·mean(g∘x)·x)     with g = dy∘w
//     ρ = 1/√(mean(x²) + ε)         dw += Σ_n ρ_n·dy_n∘x_n
// dx has ρ's own derivative as its second term, ∂ρ/∂x = -ρ³·x/d. In bf16 y alone is rounded.
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

// ---- Matrix products ---------------------------------------------------------------------------
//     y = x·wᵀ + residual        dx = dy·w        dw += dyᵀ·x        x (N,I), w (O,I), y (N,O)
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

// ---- RoPE --------------------------------------------------------------------------------------
// Elements i and i + h/2 of a head of q or k are a point (a, b) of the plane. At position t it
// turns by the angle φ = t·ω_i, ω_i = θ^{-2i/h} (Llama-3.2 rescales the slow ones: rope_frequency):
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
                float cosine = angles[2 * i], sine = sign * angles[2 * i + 1];
                float a = low[i], b = high[i];
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

// ---- Attention ---------------------------------------------------------------------------------
// For every query head, with sums over the tokens u ≤ t that token t sees, or t ≥ u that see u:
//     s_tu = q_t·k_u/√h           dv_u = Σ_t p_tu·dy_t       dp_tu = dy_t·v_u
//     lse_t = log Σ_u e^{s_tu}    δ_t = Σ_u p_tu·dp_tu       ds_tu = p_tu·(dp_tu - δ_t)
//     p_tu = e^{s_tu - lse_t}     dq_t = Σ_u ds_tu·k_u/√h
//     y_t = Σ_u p_tu·v_u          dk_u = Σ_t ds_tu·q_t/√h
// p is the softmax of s. Kept for backward are qkv after RoPE, y, and lse (log-sum-exp), one number
// per query and head, from which p is found again. δ needs neither p nor dp, since
// Σ_u p_tu·(dy_t·v_u) = dy_t·Σ_u p_tu·v_u = dy_t·y_t. Attention crosses the borders of documents
// inside a row. Query head j reads key/value head j/(H/G), whose dk and dv therefore are sums over
// H/G query heads. attention_forward and attention_backward stand in section 10, which works in
// tiles: s and p (T,T) are never whole.

// ---- SwiGLU ------------------------------------------------------------------------------------
//     y = silu(g)∘u                 dg = dy∘u∘σ(g)∘(1 + g∘(1 - σ(g)))
//     silu(g) = g·σ(g)              du = dy∘silu(g)
//     σ(g) = 1/(1 + e^-g)
// Backward also gives y again, which w_down's gradient needs and forward did not keep.
static void swiglu_forward(act *out, const act *gate_up, size_t N, size_t F) {
    PARALLEL_FOR(N * F)
    for (size_t n = 0; n < N; n++) {
        const float *gate = (const float *)gate_up + n * 2 * F, *up = gate + F;
        float *y = (float *)out + n * F;
        for (size_t i = 0; i < F; i++) y[i] = 1.0f / (1.0f + fast_exp(-gate[i])); // σ(g)
        for (size_t i = 0; i < F; i++) y[i] = gate[i] * y[i] * up[i];
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
        for (size_t i = 0; i < F; i++) y[i] = 1.0f / (1.0f + fast_exp(-gate[i])); // σ(g)
        for (size_t i = 0; i < F; i++) {
            dgate[i] = dy[i] * up[i] * y[i] * (1.0f + gate[i] * (1.0f - y[i]));
            dup[i] = dy[i] * gate[i] * y[i];
            y[i] = gate[i] * y[i] * up[i];
        }
    }
}

// ---- Cross-entropy -----------------------------------------------------------------------------
//     loss = log Σ_v e^{z_v} - z_label               dz = scale·(softmax(z) - onehot(label))
//          = log Σ_v e^{z_v - max} + max - z_label
// The second form, because e^{z_v} itself may overflow. A label of -100 counts for nothing. scale
// is 1/(micro-batches of the step · labels of this one).
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
// A decoding step takes one new token per row through the prelude, r recurrences and the coda, and
// ends with the logits of the token that follows. Attention reads the keys and values of earlier
// tokens from the KV cache, to which the new token's are added. r is free at test time: it may be
// larger than in training, end early for easy tokens, and be small for drafts.

// How the recurrences of a core layer share the cache's slots.
typedef enum {
    RETROFIT_CACHE_FULL,   // each has its own
    RETROFIT_CACHE_SHARED, // M slots, taken in turn
    RETROFIT_CACHE_GROUPED // M successive recurrences have one in common
} retrofit_cache_kind;
struct retrofit_kv_cache {
    size_t capacity, recurrences; // positions; the largest r
    retrofit_cache_kind kind;
    size_t M;
    bool bf16;                    // on a CPU: keys and values in bf16 rather than fp32
};
size_t retrofit_cache_bytes(const retrofit_buffers *buffers); // of keys and values, per token

// What has to become stable for a token's recurrences to stop early. LATENT_DIFF is the fastest,
// since the others need coda and head in every recurrence.
typedef enum {
    RETROFIT_EXIT_NONE, RETROFIT_EXIT_ENTROPY_DIFF, RETROFIT_EXIT_LATENT_DIFF,
    RETROFIT_EXIT_KL, RETROFIT_EXIT_MINP_KL, RETROFIT_EXIT_ARGMAX_STABILITY
} retrofit_exit;
// How strong test-time noise is in each recurrence.
typedef enum {
    RETROFIT_NOISE_FIXED, RETROFIT_NOISE_GEOM, RETROFIT_NOISE_SQRT, RETROFIT_NOISE_LINE,
    RETROFIT_NOISE_CHI
} retrofit_noise;
typedef struct {
    size_t recurrences;  // r; with an exit, the most that a token takes
    float sigma;         // of s_0
    uint64_t seed;       // of s_0 and of the noise
    retrofit_exit exit;  // a prompt takes all r recurrences even so
    float threshold;     // of the exit; below 0: the authors'
    bool continuous;     // a token fed alone starts from the last state of the token before it
    float noise;         // in units of the model's state_std; 0: none
    retrofit_noise noise_kind;
} retrofit_recurrence_options;

#define RETROFIT_UNDER_WAY 64 // tokens of a front, at most

// The KV cache and what decoding notes.
struct retrofit_decoder {
    retrofit_kv_cache cache;
    retrofit_type kv_type;
    size_t slots;        // of all layers together
    act *keys, *values;  // (slots,B,capacity,G·h) of kv_type
    int32_t *reached;    // (B)     slots per core layer that the row's newest token has written
    float *carried;      // (B,d)   states of rows that stopped; with `continuous`, to start from
    size_t carries;      // rows that have one to start from
    float *drafted;      // (2,RETROFIT_UNDER_WAY,d) states and A_e·e of a front's tokens
    int32_t *lanes;      // (RETROFIT_UNDER_WAY) where their keys and values are, and
    int32_t *lane;       // that, or NULL if each row of the batch has its own place

    // On the host:
    int32_t *seen;       // (B)     tokens that each row has in the cache: `past`
    int32_t *used;       // (B)     recurrences that each row's last token took
    float *next;         // (B,V)   the logits that retrofit_next_logits returns
    double *measure;     // (B,V)   what the exit's criterion noted in the recurrence before
    float *latent;       // (2,B,d) states of even and of odd recurrences

    void *step;          // one decoding step as the device recorded it, for
    size_t step_b;       // so many rows and
    retrofit_recurrence_options step_options;
};

// n recurrences without gradient, with noise if the options ask for it and nothing is kept.
void retrofit_recur_noisy(retrofit_buffers *buffers, const retrofit_recurrence_options *options,
                          size_t n);

// Feeds t new tokens per row: tokens (b,t), of which the first lengths[i] count (NULL: all).
// Returns the logits (b,V) behind each row's last token, on the host, valid until the next call.
// NULL or error.
const float *retrofit_next_logits(retrofit_buffers *buffers, const int32_t *tokens, size_t b,
                                  size_t t, const int32_t *lengths,
                                  const retrofit_recurrence_options *options);
void retrofit_clear_cache(retrofit_buffers *buffers);
// How far a state (d) has moved, relative to its size.
double retrofit_relative_change(const float *now, const float *before, size_t d);

typedef struct {
    float temperature;  // 0: greedy
    size_t top_k;       // 0: all
    float top_p, min_p; // 1, 0: all
    uint64_t seed;      // advances with every draw
} retrofit_sampling;
// Draws the next token. scratch: V pairs of 8 bytes.
int32_t retrofit_sample(const float *logits, size_t V, retrofit_sampling *sampling, void *scratch);
int32_t retrofit_argmax(const float *logits, size_t V); // the first of equals

// Drafts through the depths: a front of tokens under way, each at its own depth, that go deeper
// together. What it generates is plain decoding's text, drawn text too.
#define RETROFIT_GUESSES 8 // depths at which a token may be asked what follows
typedef struct {
    int32_t id, position;
    size_t row, depth; // of the KV cache; recurrences done
    uint64_t seed;     // of sampling, after `id` was drawn
    bool was_read;     // by the first reading
    bool is_asked;     // at all of the depths, for tuning
    int32_t guesses[RETROFIT_GUESSES]; // what it said at each, -1 where it was not read
} retrofit_draft;

// What one row of the KV cache is at.
typedef struct {
    retrofit_sampling *sampling; // its seed is that behind the newest answer
    int32_t end;                 // there is no token at this position or behind it
    bool waits;                  // `next` is to begin
    retrofit_draft next;
    int32_t answer;              // the token that the last pass found to follow; -1: none
    const float *logits;         // (V) that it was drawn by
} retrofit_front_row;

// What a front has done: sums over its passes.
typedef struct {
    size_t passes, rows, most;       // over the core; tokens in them; the most in one
    size_t readings;                 // passes over coda and head
    size_t answers, proposed;        // tokens
    size_t kept_second, kept;        // proposals that the second reading, and the answer, confirmed
    size_t restarts;                 // proposals that a deeper reading replaced
} retrofit_front_counts;

// Measured while fronts run, to choose the depths of the readings.
typedef struct {
    size_t begun;                    // tokens
    double asked[RETROFIT_GUESSES];  // answered tokens that were read at each of the depths, and
    double agreed[RETROFIT_GUESSES]; // those that had said there what the answer was
    double passes, rows, squares;    // over passes of n rows in s seconds: Σ 1, Σ n, Σ n²,
    double seconds, products;        // Σ s, Σ n·s
    double reading_seconds;          // of prelude, coda and head, for one reading
} retrofit_tuning;

typedef struct {
    retrofit_buffers *buffers;
    retrofit_recurrence_options options;
    retrofit_tuning *tuning;  // NULL: the depths stay as they are
    size_t depths[2];         // of the readings
    size_t vocab, most;       // only ids below it are drawn; tokens under way, at most
    size_t count;             // tokens under way; number i has row i of the decoder's states
    retrofit_draft *drafts;   // [most]
    retrofit_front_row *rows; // [B]
    float *logits;            // (most,V) of the last pass's readings
    void *scratch;            // of sampling
    void *recordings[3][RETROFIT_UNDER_WAY]; // of the parts of a pass, by the number of rows
    bool were_run[3][RETROFIT_UNDER_WAY];
    retrofit_front_counts counts;
} retrofit_front;

// A token is read at depth `first`, and at `second` if that is not 0; from r on nothing is read on
// the way. With tuning the depths change as it goes. The KV cache is full; no exit, noise or
// `continuous`. NULL or error.
retrofit_front *retrofit_front_new(retrofit_buffers *buffers,
                                   const retrofit_recurrence_options *options, size_t first,
                                   size_t second, size_t vocab, retrofit_tuning *tuning);
void retrofit_front_free(retrofit_front *front);
// Token `id`, which was drawn with `sampling`, begins behind what its row has in the cache. Nothing
// comes to positions from `end` on. false or error.
bool retrofit_front_begin(retrofit_front *front, size_t row, int32_t id, int32_t end,
                          retrofit_sampling *sampling);
// One pass. A row with an answer has one more token in the cache, and goes on behind it.
void retrofit_front_advance(retrofit_front *front);
void retrofit_front_end(retrofit_front *front, size_t row); // drops what it has under way
#ifdef __cplusplus
}
#endif
#endif // RETROFIT_DECODING_H

#ifdef RETROFIT_IMPLEMENTATION

void retrofit_logits(retrofit_buffers *buffers, size_t first, size_t count, float *logits);
static void *fail_null(const char *format, ...); // retrofit_fail for functions that return pointers
void *retrofit_allocate(size_t count, size_t size);
uint16_t retrofit_float_to_bf16(float f);
static inline double retrofit_hash_uniform(uint64_t seed, uint64_t counter);
double retrofit_seconds(void);
// Attention of one head of one sequence, or of heads that share keys, tile by tile: section 10.
enum { TILE = 96, HEADS_TOGETHER = 16 };
static void attend(float *y, size_t y_row, float *lse, size_t lse_row, matrix_view q, matrix_view k,
                   matrix_view v, size_t rows, bool single, size_t before, size_t h);
static size_t gemm_threads(size_t work);
// The next batch has b rows of t tokens, and has run no recurrence: section 8.
static void set_shape(retrofit_buffers *buffers, size_t b, size_t t);

// ---- KV cache ----------------------------------------------------------------------------------
// A core layer's input differs from recurrence to recurrence, and so do its keys and values. A slot
// (B,capacity,G·h) holds those of one layer in one recurrence, for every position:
//
//     first slot    0         P              P+C            P+2C               slots - D
//     holds         prelude | core, i = 0  | core, i = 1  | core, i = 2  | …  | coda
//
// The core needs r·C slots that way. In other kinds of cache recurrences share slots, and what a
// token leaves in a slot is from its last recurrence there. With M = 4:
//
//     recurrence i  0  1  2  3  4  5  6  7
//     full          0  1  2  3  4  5  6  7       slot i
//     shared        0  1  2  3  0  1  2  3       slot i mod M
//     grouped       0  0  0  0  1  1  1  1       slot i div M

// The slot of recurrence i = 0, 1, … in a core layer.
static size_t kv_slot(const retrofit_kv_cache *cache, size_t i) {
    switch (cache->kind) {
    case RETROFIT_CACHE_SHARED: return i % cache->M;
    case RETROFIT_CACHE_GROUPED: return i / cache->M;
    default: return i;
    }
}

// Slots of a core layer that r recurrences use.
static size_t slots_of(const retrofit_kv_cache *cache, size_t r) {
    if (cache->kind == RETROFIT_CACHE_SHARED) return retrofit_min(cache->M, r);
    return r ? kv_slot(cache, r - 1) + 1 : 0;
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
    retrofit_decoder *decoder = retrofit_allocate(1, sizeof *decoder);
    if (!decoder) return false;
    decoder->cache = *cache;
    decoder->kv_type = cache->bf16 ? RETROFIT_BF16 : model->ops->act_type;
    decoder->slots = c->prelude + slots_of(cache, cache->recurrences) * c->core + c->coda;
    buffers->decoder = decoder;
    return true;
}

// Bytes of one token's keys, or values, in a slot.
static size_t entry_bytes(const retrofit_buffers *buffers) {
    const retrofit_config *c = &buffers->model->config;
    return c->n_kv_heads * c->head_dim * retrofit_type_size(buffers->decoder->kv_type);
}

size_t retrofit_cache_bytes(const retrofit_buffers *buffers) {
    return 2 * buffers->decoder->slots * entry_bytes(buffers);
}

// Keys or values (`base`) of a slot.
static act *slot_at(const retrofit_buffers *buffers, act *base, size_t slot) {
    size_t positions = buffers->B * buffers->decoder->cache.capacity;
    return (char *)base + slot * positions * entry_bytes(buffers);
}

static void attend_to_cache(retrofit_buffers *buffers, retrofit_block *block, size_t slot) {
    const retrofit_config *c = &buffers->model->config;
    const retrofit_ops *ops = buffers->model->ops;
    const retrofit_decoder *decoder = buffers->decoder;
    size_t H = c->n_heads, G = c->n_kv_heads, h = c->head_dim, b = buffers->b, t = buffers->t;
    size_t capacity = decoder->cache.capacity;
    act *keys = slot_at(buffers, decoder->keys, slot);
    act *values = slot_at(buffers, decoder->values, slot);
    ops->kv_store(keys, values, block->qkv, buffers->past, decoder->lane, b, t, capacity, H, G, h,
                  decoder->kv_type);
    ops->attention_cached(block->attention, block->qkv, keys, values, buffers->past, decoder->lane,
                          b, t, capacity, H, G, h, decoder->kv_type);
}

// Normal numbers, cut at ±3, times sigma, for every state of the batch. Decoding draws each row's
// as if it were the only one, so that a text does not depend on those beside it; with `alike` so
// does a pass without a cache, whose rows are to be compared.
static void draw_states(retrofit_buffers *buffers, float *states, float sigma, uint64_t seed) {
    const retrofit_ops *ops = buffers->model->ops;
    size_t b = buffers->b, t = buffers->t, d = buffers->model->config.n_embd;
    bool decoding = buffers->decoder != NULL;
    if (!decoding && !buffers->alike) {
        ops->state_init(states, NULL, b, t, d, sigma, seed);
        return;
    }
    for (size_t row = 0; row < b; row++) {
        const int32_t *past = decoding ? buffers->past + row : NULL;
        ops->state_init(states + row * t * d, past, 1, t, d, sigma, seed);
    }
}

// ---- What a new token needs of the old ones ----------------------------------------------------

// Keys and values of T new tokens a row, to positions past[b] … past[b] + T - 1 of its lane.
static void kv_store(act *keys, act *values, const act *qkv, const int32_t *past,
                     const int32_t *lane, size_t B, size_t T, size_t capacity, size_t H, size_t G,
                     size_t h, retrofit_type type) {
    size_t width = G * h, Q = (H + 2 * G) * h;
    for (size_t n = 0; n < B * T; n++) {
        const float *k = (const float *)qkv + n * Q + H * h, *v = k + width;
        size_t b = n / T, position = (size_t)past[b] + n % T;
        size_t first = ((lane ? (size_t)lane[b] : b) * capacity + position) * width;
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
// With one query a row, heads that share keys go together, if that leaves enough tasks.
static void attention_cached(act *out, const act *qkv, const act *keys, const act *values,
                             const int32_t *past, const int32_t *lane, size_t B, size_t T,
                             size_t capacity, size_t H, size_t G, size_t h, retrofit_type type) {
    size_t Q = (H + 2 * G) * h, tiles = (T + TILE - 1) / TILE, size = retrofit_type_size(type);
    size_t work = B * T * H * h * ((size_t)past[0] + T), heads = H / G;
    bool single = T == 1; // then rows are heads, which lie side by side
    if (!single || heads > HEADS_TOGETHER || B * G < gemm_threads(work)) heads = 1;
    PARALLEL_TASKS(work)
    for (size_t task = 0; task < B * H / heads * tiles; task++) {
        size_t t = task % tiles * TILE, first_head = task / tiles * heads;
        size_t b = first_head / H, head = first_head % H;
        size_t n = b * T + t, group = head / (H / G), rows = retrofit_min(T - t, TILE) * heads;
        size_t first = ((lane ? (size_t)lane[b] : b) * capacity * G + group) * h * size;
        matrix_view q = view((const float *)qkv + n * Q + head * h, single ? h : Q);
        matrix_view k = {(const char *)keys + first, type, G * h, 1};
        matrix_view v = {(const char *)values + first, type, G * h, 1};
        attend((float *)out + (n * H + head) * h, single ? h : H * h, NULL, 0, q, k, v, rows,
               single, (size_t)past[b] + t, h);
    }
}

// Row b's newest token, at position past[b], has entries in the core's first used[b] slots. The
// others of the S slots get what the last of those has, for each of the C layers. Layers lie
// `stride` elements apart, and slot i's layer j is layer i·C + j.
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

// ---- Noise: s ← (1 - x)·s + x·z before recurrence i = 1, 2, … ----------------------------------

// x, from y = noise·σ; u is uniform in (0, 1).
static float noise_strength(const retrofit_buffers *buffers,
                            const retrofit_recurrence_options *options, uint64_t key) {
    uint64_t position = buffers->decoder ? (uint64_t)buffers->decoder->seen[0] : 0;
    float i = (float)(buffers->n + 1), r = (float)options->recurrences;
    float y = options->noise * buffers->model->config.state_std;
    switch (options->noise_kind) {
    case RETROFIT_NOISE_GEOM: return y / i;
    case RETROFIT_NOISE_SQRT: return y / sqrtf(i);
    case RETROFIT_NOISE_LINE: return fmaxf(y, 1 - (i - 1) / r);
    case RETROFIT_NOISE_CHI: return 2 * y * (float)retrofit_hash_uniform(key, position); // 2uy
    default: return y;
    }
}

// z is drawn as s_0 is, but anew for each recurrence. The noise is drawn into buffers->x, which is
// free until the coda runs.
static void add_noise(retrofit_buffers *buffers, const retrofit_recurrence_options *options) {
    const retrofit_model *model = buffers->model;
    uint64_t key = retrofit_hash(options->seed, ~(uint64_t)buffers->n);
    float x = noise_strength(buffers, options, key);
    draw_states(buffers, buffers->x, x, key);
    model->ops->add(buffers->state, buffers->x, buffers->N * model->config.n_embd, 1 - x);
}

void retrofit_recur_noisy(retrofit_buffers *buffers, const retrofit_recurrence_options *options,
                          size_t n) {
    bool noisy = options->noise > 0 && !buffers->keep;
    if (!noisy || retrofit_is_plain(&buffers->model->config)) {
        retrofit_recur(buffers, n, 0);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        add_noise(buffers, options);
        retrofit_recur(buffers, 1, 0);
    }
}

// ---- One decoding step -------------------------------------------------------------------------

// Whether the batch goes on from the states in `carried`.
static bool carries_on(const retrofit_buffers *buffers,
                       const retrofit_recurrence_options *options) {
    return options->continuous && buffers->t == 1 && buffers->b <= buffers->decoder->carries;
}

// e, and the state that the first recurrence reads.
static void begin_recurrence(retrofit_buffers *buffers,
                             const retrofit_recurrence_options *options) {
    const retrofit_model *model = buffers->model;
    size_t bytes = buffers->b * model->config.n_embd * sizeof *buffers->state;
    prelude_forward(buffers);
    if (retrofit_is_plain(&model->config)) return;
    if (carries_on(buffers, options))
        model->ops->copy(buffers->state, buffers->decoder->carried, bytes);
    else retrofit_init_state(buffers, options->sigma, options->seed);
}

// The logits behind `count` tokens of the batch, from number `token` on, to rows of wide_logits.
static void head_forward(retrofit_buffers *buffers, size_t row, size_t token, size_t count) {
    const retrofit_model *model = buffers->model;
    size_t d = model->config.n_embd, V = model->config.vocab;
    const act *final = act_at(model->ops, buffers->final, token * d);
    model->ops->matmul_residual_forward(buffers->wide_logits + row * V, NULL, final,
                                        model->lm_head.weight, count, d, V);
}

// The logits that the states of b rows of one token lead to.
static void read_next_logits(retrofit_buffers *buffers) {
    retrofit_coda(buffers);
    head_forward(buffers, 0, 0, buffers->b);
}

static void run_step(retrofit_buffers *buffers, const retrofit_recurrence_options *options) {
    begin_recurrence(buffers, options);
    retrofit_recur_noisy(buffers, options, options->recurrences);
    read_next_logits(buffers);
}

// A step is hundreds of short operations, and starting each of them can take longer than doing it.
// So a GPU records them once (a CUDA graph) and then replays the recording. It fits as long as the
// operations get the same arguments; what differs from token to token lies in memory.
static bool recording_fits(const retrofit_buffers *buffers,
                           const retrofit_recurrence_options *options) {
    const retrofit_decoder *decoder = buffers->decoder;
    const retrofit_recurrence_options *recorded = &decoder->step_options;
    return decoder->step_b == buffers->b && recorded->recurrences == options->recurrences &&
           recorded->sigma == options->sigma && recorded->seed == options->seed &&
           recorded->continuous == carries_on(buffers, options);
}

// The next recording is to be of a step like this one.
static void await_recording(retrofit_buffers *buffers, const retrofit_recurrence_options *options) {
    retrofit_decoder *decoder = buffers->decoder;
    if (decoder->step) buffers->model->ops->record_free(decoder->step);
    decoder->step = NULL;
    decoder->step_b = buffers->b;
    decoder->step_options = *options;
    decoder->step_options.continuous = carries_on(buffers, options);
}

static void record_step(retrofit_buffers *buffers, const retrofit_recurrence_options *options) {
    const retrofit_ops *ops = buffers->model->ops;
    ops->record_begin();
    run_step(buffers, options);
    buffers->decoder->step = ops->record_end();
}

// One token for each of b rows, through r recurrences. The second step of its kind is recorded, not
// the first, in which the device may still have to load kernels and choose algorithms: a recording
// cannot contain that. Noise is not recorded, as its strength may differ from token to token.
static void decode_step(retrofit_buffers *buffers, const retrofit_recurrence_options *options) {
    const retrofit_ops *ops = buffers->model->ops;
    bool recordable = ops->record_begin && !(options->noise > 0);
    if (!recordable || !recording_fits(buffers, options)) {
        if (recordable) await_recording(buffers, options);
        run_step(buffers, options);
        return;
    }
    if (!buffers->decoder->step) record_step(buffers, options);
    ops->replay(buffers->decoder->step);
    buffers->n = retrofit_is_plain(&buffers->model->config) ? 0 : options->recurrences;
}

// ---- Exits -------------------------------------------------------------------------------------
// A criterion compares a token's distribution p_i = softmax(logits_i), or its state s_i, with that
// of the recurrence before, and says whether the token may stop after recurrence i = 1, 2, ….

// What recurrence i left of one row.
typedef struct {
    size_t i, V, d;
    const float *logits;               // (V) logits_i, or
    const float *state, *state_before; // (d) s_i and s_{i-1}
    double *noted;                     // (V) what the criterion noted in the recurrence before
} recurrence_result;

// Σ_v e^{z_v - max}: with it p_v = e^{z_v - max} / sum, log p_v = z_v - max - log sum.
static double softmax_sum(const float *z, size_t V, float max) {
    double sum = 0;
    for (size_t v = 0; v < V; v++) sum += (double)fast_exp(z[v] - max);
    return sum;
}

// |H(p_i) - H(p_{i-1})| in nats, with the entropy H(p) = -Σ_v p_v·log p_v
static bool entropy_diff(const recurrence_result *result, double threshold) {
    const float *z = result->logits;
    size_t V = result->V;
    float max = max_element(z, V);
    double sum = softmax_sum(z, V, max), log_sum = log(sum), entropy = 0;
    for (size_t v = 0; v < V; v++)
        entropy -= (double)fast_exp(z[v] - max) / sum * ((double)(z[v] - max) - log_sum);
    double before = result->i > 1 ? result->noted[0] : 100; // more than any vocabulary has
    result->noted[0] = entropy;
    return fabs(entropy - before) < threshold;
}

// ‖s_i - s_{i-1}‖ / ‖s_i‖
double retrofit_relative_change(const float *now, const float *before, size_t d) {
    double change = 0, size = 0;
    for (size_t c = 0; c < d; c++) {
        size += (double)now[c] * now[c];
        change += ((double)now[c] - before[c]) * ((double)now[c] - before[c]);
    }
    return sqrt(change / size);
}

static bool latent_diff(const recurrence_result *result, double threshold) {
    return retrofit_relative_change(result->state, result->state_before, result->d) < threshold;
}

// KL(p_{i-1} | p_i) = Σ_v p_{i-1,v}·(log p_{i-1,v} - log p_{i,v}), where p_0 is uniform. Given a
// cut, probabilities below e^cut times the largest become 1/V; then all are divided by their sum.
static double divergence(const recurrence_result *result, float cut) {
    const float *z = result->logits;
    size_t V = result->V;
    float max = max_element(z, V);
    double sum = softmax_sum(z, V, max), log_sum = log(sum), log_uniform = -log((double)V);
    double new_sum = 0, log_new_sum = 0, total = 0;
    for (size_t v = 0; cut > -INFINITY && v < V; v++)
        new_sum += z[v] - max < cut ? 1 / (double)V : (double)fast_exp(z[v] - max) / sum;
    if (cut > -INFINITY) log_new_sum = log(new_sum);
    for (size_t v = 0; v < V; v++) {
        double before = result->i > 1 ? result->noted[v] : log_uniform;
        double now = z[v] - max < cut ? log_uniform : (double)(z[v] - max) - log_sum;
        now -= log_new_sum;
        total += (double)fast_exp((float)before) * (before - now);
        result->noted[v] = now;
    }
    return total;
}

static bool kl(const recurrence_result *result, double threshold) {
    return divergence(result, -INFINITY) < threshold;
}

// The same where every p_v below a tenth of the largest counts as 1/V: unlikely tokens have no say.
static bool minp_kl(const recurrence_result *result, double threshold) {
    return divergence(result, logf(0.1f)) < threshold;
}

// The likeliest token has stayed the same for `threshold` recurrences more.
static bool argmax_stability(const recurrence_result *result, double threshold) {
    double *likeliest = &result->noted[0], *repeats = &result->noted[1];
    double before = result->i > 1 ? *likeliest : -1;
    *likeliest = retrofit_argmax(result->logits, result->V);
    *repeats = *likeliest == before ? *repeats + 1 : 0;
    return *repeats >= threshold;
}

// By retrofit_exit: each criterion, the authors' threshold, and whether it reads states or logits.
static const struct {
    bool (*is_met)(const recurrence_result *result, double threshold);
    double threshold;
    bool reads_states;
} criteria[] = {
    {NULL, 0, false},
    {entropy_diff, 1e-3, false},
    {latent_diff, 0.03, true},
    {kl, 5e-4, false},
    {minp_kl, 1e-6, false},
    {argmax_stability, 5, false},
};

static bool should_exit(const retrofit_recurrence_options *options,
                        const recurrence_result *result) {
    double threshold = (double)options->threshold;
    if (threshold < 0) threshold = criteria[options->exit].threshold;
    return criteria[options->exit].is_met(result, threshold);
}

// Where the states s_i (b,d) lie on the host: the last two are kept.
static float *latent_states(const retrofit_buffers *buffers, size_t i) {
    return buffers->decoder->latent + i % 2 * buffers->b * buffers->model->config.n_embd;
}

// Downloads what the criterion reads of the recurrence just done.
static void download_result(retrofit_buffers *buffers, bool states) {
    const retrofit_ops *ops = buffers->model->ops;
    const retrofit_config *c = &buffers->model->config;
    size_t b = buffers->b;
    float *latent = latent_states(buffers, buffers->n), *next = buffers->decoder->next;
    if (states) {
        ops->download(latent, buffers->state, b * c->n_embd * sizeof *latent);
        return;
    }
    read_next_logits(buffers);
    ops->download(next, buffers->wide_logits, b * c->vocab * sizeof *next);
}

static void keep_state_of(retrofit_buffers *buffers, size_t row, size_t token) {
    size_t d = buffers->model->config.n_embd;
    float *state = buffers->state + token * d;
    buffers->model->ops->copy(buffers->decoder->carried + row * d, state, d * sizeof *state);
}

// Stops the rows that meet the criterion after the recurrence just done, and after recurrence r all
// that are left. Returns how many stopped.
static size_t check_exits(retrofit_buffers *buffers, const retrofit_recurrence_options *options) {
    retrofit_decoder *decoder = buffers->decoder;
    size_t V = buffers->model->config.vocab, d = buffers->model->config.n_embd;
    size_t i = buffers->n, stopped = 0;
    for (size_t row = 0; row < buffers->b; row++) {
        if (decoder->used[row] > 0) continue; // stopped before
        recurrence_result result = {.i = i, .V = V, .d = d};
        result.logits = decoder->next + row * V;
        result.state = latent_states(buffers, i) + row * d;
        result.state_before = latent_states(buffers, i - 1) + row * d;
        result.noted = decoder->measure + row * V;
        if (i < options->recurrences && !should_exit(options, &result)) continue;
        decoder->used[row] = (int32_t)i;
        keep_state_of(buffers, row, row);
        stopped++;
    }
    return stopped;
}

// A token that stopped early has left nothing in the slots of deeper recurrences. Later tokens that
// go deeper find there copies of what its last recurrence left.
static void backfill_cache(retrofit_buffers *buffers) {
    const retrofit_config *c = &buffers->model->config;
    const retrofit_ops *ops = buffers->model->ops;
    const retrofit_decoder *decoder = buffers->decoder;
    size_t B = buffers->B, b = buffers->b, capacity = decoder->cache.capacity;
    size_t G = c->n_kv_heads, h = c->head_dim, P = c->prelude, C = c->core;
    size_t slots = slots_of(&decoder->cache, decoder->cache.recurrences);
    for (size_t row = 0; row < b; row++) {
        int32_t reached = (int32_t)slots_of(&decoder->cache, (size_t)decoder->used[row]);
        ops->upload(decoder->reached + row, &reached, sizeof reached);
    }
    ops->kv_backfill(slot_at(buffers, decoder->keys, P), slot_at(buffers, decoder->values, P),
                     buffers->past, decoder->reached, slots, C, B * capacity * G * h, b, capacity,
                     G, h, decoder->kv_type);
}

// A decoding step with an exit. All rows run until the last one stops. A row that stopped earlier
// keeps its saved state; what it writes to the cache after that is overwritten by kv_backfill
// below, so nothing reads it.
static void recur_until_exit(retrofit_buffers *buffers,
                             const retrofit_recurrence_options *options) {
    retrofit_decoder *decoder = buffers->decoder;
    size_t b = buffers->b, d = buffers->model->config.n_embd, running = b, stopped = 0;
    bool states = criteria[options->exit].reads_states;
    memset(decoder->used, 0, b * sizeof *decoder->used);
    begin_recurrence(buffers, options);
    if (states) download_result(buffers, true); // s_0
    while (running > 0) {
        retrofit_recur_noisy(buffers, options, 1);
        download_result(buffers, states);
        stopped = check_exits(buffers, options);
        running -= stopped;
    }
    if (states || stopped < b) { // wide_logits are not those of every row's last state
        buffers->model->ops->copy(buffers->state, decoder->carried, b * d * sizeof *buffers->state);
        read_next_logits(buffers);
    }
    backfill_cache(buffers);
}

// ---- The next token's logits -------------------------------------------------------------------

static bool check_next_logits(const retrofit_buffers *buffers, size_t b, size_t t,
                              const int32_t *lengths, const retrofit_recurrence_options *options) {
    const retrofit_decoder *decoder = buffers->decoder;
    size_t r = options->recurrences;
    bool plain = retrofit_is_plain(&buffers->model->config);
    if (!decoder || buffers->keep) return retrofit_fail("these activations have no KV cache");
    if (!plain && (r == 0 || r > decoder->cache.recurrences))
        return retrofit_fail("%zu recurrences, but the KV cache has room for %zu", r,
                             decoder->cache.recurrences);
    // A row that runs on after it stopped would overwrite entries in slots that recurrences share.
    if (options->exit && b > 1 && decoder->cache.kind != RETROFIT_CACHE_FULL)
        return retrofit_fail("rows that stop thinking at different times need the full KV cache, "
                             "or one row at a time");
    for (size_t row = 0; row < retrofit_min(b, buffers->B); row++) {
        if (lengths && (lengths[row] < 1 || (size_t)lengths[row] > t))
            return retrofit_fail("row %zu: %d tokens of %zu", row, (int)lengths[row], t);
        if ((size_t)decoder->seen[row] + t > decoder->cache.capacity)
            return retrofit_fail("%zu tokens after %d do not fit in a context of %zu", t,
                                 (int)decoder->seen[row], decoder->cache.capacity);
    }
    return true;
}

// The number in the batch of a row's last token.
static size_t last_token(const retrofit_buffers *buffers, const int32_t *lengths, size_t row) {
    return row * buffers->t + (lengths ? (size_t)lengths[row] : buffers->t) - 1;
}

// Several tokens per row, in one pass; logits only behind the last. Shorter rows are padded at the
// end: causal attention hides the padding from the row's own tokens, and its entries in the cache
// lie behind the row's end, where later tokens overwrite them before anything reads there.
static void read_prompts(retrofit_buffers *buffers, const int32_t *lengths,
                         const retrofit_recurrence_options *options) {
    begin_recurrence(buffers, options);
    retrofit_recur_noisy(buffers, options, options->recurrences);
    retrofit_coda(buffers);
    for (size_t row = 0; row < buffers->b; row++)
        head_forward(buffers, row, last_token(buffers, lengths, row), 1);
}

const float *retrofit_next_logits(retrofit_buffers *buffers, const int32_t *tokens, size_t b,
                                  size_t t, const int32_t *lengths,
                                  const retrofit_recurrence_options *options) {
    const retrofit_ops *ops = buffers->model->ops;
    const retrofit_config *c = &buffers->model->config;
    retrofit_decoder *decoder = buffers->decoder;
    bool plain = retrofit_is_plain(c), begins = false;
    if (!check_next_logits(buffers, b, t, lengths, options)) return NULL;
    if (!set_batch(buffers, tokens, b, t)) return NULL;
    ops->upload(buffers->past, decoder->seen, buffers->B * sizeof *decoder->seen);
    for (size_t row = 0; row < b; row++) {
        decoder->used[row] = plain ? 0 : (int32_t)options->recurrences;
        begins = begins || decoder->seen[row] == 0;
    }

    if (t > 1) read_prompts(buffers, lengths, options);
    else if (plain || !options->exit || begins) decode_step(buffers, options);
    else recur_until_exit(buffers, options);

    for (size_t row = 0; row < b; row++) {
        size_t last = last_token(buffers, lengths, row);
        if (options->continuous && !plain) keep_state_of(buffers, row, last);
        decoder->seen[row] += (int32_t)(last + 1 - row * t);
    }
    if (options->continuous && !plain) decoder->carries = b;
    ops->download(decoder->next, buffers->wide_logits, b * c->vocab * sizeof *decoder->next);
    return decoder->next;
}

void retrofit_clear_cache(retrofit_buffers *buffers) {
    memset(buffers->decoder->seen, 0, buffers->B * sizeof *buffers->decoder->seen);
    buffers->decoder->carries = 0;
}

// ---- Sampling: softmax(logits/temperature), then top-k, top-p, min-p, in this order ------------

int32_t retrofit_argmax(const float *logits, size_t V) {
    size_t best = 0;
    for (size_t v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    return (int32_t)best;
}

// A token that may come next. p is relative to the likeliest token's, which is 1.
typedef struct {
    float p;
    int32_t id;
} candidate;

// Likeliest first; equals by id, so that a seed alone decides what is drawn.
static int by_probability(const void *x, const void *y) {
    const candidate *a = x, *b = y;
    if (a->p != b->p) return a->p > b->p ? -1 : 1;
    return a->id < b->id ? -1 : 1;
}

static double total_weight(const candidate *candidates, size_t n) {
    double total = 0;
    for (size_t i = 0; i < n; i++) total += candidates[i].p;
    return total;
}

// top-p: the fewest of n sorted candidates whose share of all reaches top_p, and at least one.
static size_t keep_top_p(const candidate *candidates, size_t n, float top_p) {
    double enough = top_p * total_weight(candidates, n), kept = 0;
    size_t i = 0;
    while (i < n && kept < enough) {
        kept += candidates[i].p;
        i++;
    }
    return retrofit_max(i, 1);
}

// min-p: those at least min_p times as likely as the likeliest, which stays whatever min_p is.
static size_t keep_min_p(candidate *candidates, size_t n, float min_p) {
    size_t kept = 0;
    for (size_t i = 0; i < n; i++)
        if (candidates[i].p >= fminf(min_p, 1)) candidates[kept++] = candidates[i];
    return kept;
}

// Returns how many candidates the filters leave.
static size_t apply_filters(const float *logits, size_t V, const retrofit_sampling *sampling,
                            candidate *candidates) {
    float max = max_element(logits, V), temperature = sampling->temperature;
    size_t n = V, top_k = sampling->top_k;
    bool by_share = sampling->top_p < 1;
    if (!(temperature > 0) || !isfinite(max)) {
        candidates[0] = (candidate){1, retrofit_argmax(logits, V)};
        return 1;
    }
    for (size_t v = 0; v < V; v++) { // fmaxf makes NaN 0
        candidates[v].p = fmaxf(0, expf((logits[v] - max) / temperature));
        candidates[v].id = (int32_t)v;
    }
    // Without top-p, min-p may come before top-k: the same are left, and fewer are sorted.
    if (!by_share) n = keep_min_p(candidates, n, sampling->min_p);
    if (top_k || by_share) qsort(candidates, n, sizeof *candidates, by_probability);
    if (top_k && top_k < n) n = top_k;
    if (by_share) {
        n = keep_top_p(candidates, n, sampling->top_p);
        n = keep_min_p(candidates, n, sampling->min_p);
    }
    return n;
}

// Each token waits for a random time, exponentially distributed with the mean 1/p. The first to
// arrive is v with probability p_v / Σ p (the Gumbel-max trick). Its time is a function of the seed
// and its id alone: from a similar distribution the same seed mostly draws the same token.
static int32_t draw_from(const candidate *candidates, size_t n, uint64_t seed) {
    double earliest = INFINITY;
    int32_t first = candidates[0].id;
    for (size_t i = 0; i < n; i++) {
        uint64_t id = (uint64_t)candidates[i].id;
        double arrival = -log(retrofit_hash_uniform(seed, id)) / candidates[i].p;
        if (arrival < earliest) {
            earliest = arrival;
            first = candidates[i].id;
        }
    }
    return first;
}

int32_t retrofit_sample(const float *logits, size_t V, retrofit_sampling *sampling, void *scratch) {
    size_t n = apply_filters(logits, V, sampling, scratch);
    if (sampling->temperature > 0) sampling->seed = retrofit_hash(sampling->seed, 0);
    return draw_from(scratch, n, sampling->seed);
}

// ---- Drafts through the depths -----------------------------------------------------------------
// Recurrence i of a token reads what earlier tokens left at recurrence i, and nothing deeper. So a
// token can begin as soon as it is proposed, while those before it are still on their way. All
// tokens under way go one recurrence deeper in one pass, which reads the core's weights once for
// all of them. With readings at depths 2 and 4 and r = 6, the recurrences are done in the passes
//
//                       token t   t+1   t+2   t+3
//     recurrence 1            1     3     5     7
//                2            2     4     6     8     read off: the next token begins
//                3            3     5     7     9
//                4            4     6     8    10     read off: is what has begun still right?
//                5            5     7     9    11
//                6            6     8    10    12     read off: the answer
//
// A token costs first = 2 passes, of r/first = 3 rows, if every proposal is right. With the share
// a₁ of first readings and a₂ of second ones that agree with the answer it costs about
//
//     a₁·first + (a₂ - a₁)·second + (1 - a₂)·r  passes.
//
// To be read off is to go through coda and head. A reading leaves the coda's keys and values of its
// token, and the next reading of that token replaces them.
//
// The text is that of plain decoding:
// 1. What recurrence i of a token computes depends on its id, its position, and the entries that
//    the positions before it have at recurrence i.
// 2. Tokens begin in the order of their positions, in different passes: it finds those entries.
// 3. If a reading disagrees with what has begun behind its token, all of that is dropped, and what
//    the reading says begins.
// 4. What the dropped ones left is overwritten, depth by depth, by the token that begins at their
//    position and by those behind it, before any later token reads there.
// 5. So the oldest token reaches r as in plain decoding. In the coda its answer sees the entries of
//    older tokens, which their own answers left. It is the same to the bit, for a row's bits do not
//    depend on the rows beside it (section 10), and is drawn with the same random numbers, a
//    function of how many were drawn before in the text.

enum { READ_ANSWER, READ_FIRST, READ_SECOND, READ_GUESS };

// A token that is read off.
typedef struct {
    size_t row;
    int32_t position;
    int kind;
} reading;

// ---- Which depths to read at -------------------------------------------------------------------
// How often readings at each depth agreed with the answer, and how long passes of n rows take,
// α + β·n, tell what a token costs with other depths. Some tokens are read at all depths.
static const size_t guess_depths[RETROFIT_GUESSES] = {1, 2, 3, 4, 6, 8, 12, 16};
enum { FIRST_ASKED = 3, TOKENS_AN_ASKED = 24 };

static void prepare_draft(retrofit_tuning *tuning, retrofit_draft *draft) {
    for (size_t k = 0; k < RETROFIT_GUESSES; k++) draft->guesses[k] = -1;
    if (!tuning) return;
    draft->is_asked = tuning->begun < FIRST_ASKED || tuning->begun % TOKENS_AN_ASKED == 0;
    tuning->begun++;
}

static void note_guess(retrofit_draft *draft, int32_t id) {
    for (size_t k = 0; k < RETROFIT_GUESSES; k++)
        if (guess_depths[k] == draft->depth) draft->guesses[k] = id;
}

static void judge_guesses(retrofit_tuning *tuning, const retrofit_draft *draft, int32_t answer) {
    for (size_t k = 0; k < RETROFIT_GUESSES; k++) {
        tuning->asked[k] += draft->guesses[k] >= 0;
        tuning->agreed[k] += draft->guesses[k] == answer;
    }
}

// The share of tokens for which a reading at this depth, or at a shallower one, is right. One more
// token counts, which is right by 0.8: nothing is certain after a few.
static double agreement(const retrofit_tuning *tuning, size_t depth) {
    double most = 0;
    for (size_t k = 0; k < RETROFIT_GUESSES && guess_depths[k] <= depth; k++)
        most = fmax(most, (tuning->agreed[k] + 0.8) / (tuning->asked[k] + 1));
    return most;
}

// Older passes count less and less.
static void note_pass(retrofit_tuning *tuning, double n, double seconds) {
    const double keep = 0.99;
    tuning->passes = keep * tuning->passes + 1;
    tuning->rows = keep * tuning->rows + n;
    tuning->squares = keep * tuning->squares + n * n;
    tuning->seconds = keep * tuning->seconds + seconds;
    tuning->products = keep * tuning->products + n * seconds;
}

// Of a pass with n rows: a line through what was measured (least squares).
static double pass_seconds(const retrofit_tuning *t, double n) {
    double spread = t->passes * t->squares - t->rows * t->rows;
    double slope = (t->passes * t->products - t->rows * t->seconds) / spread;
    if (!(spread > 1e-3 * t->squares) || !(slope > 0)) slope = 0;
    slope = fmin(slope, t->seconds / t->rows);
    return (t->seconds + slope * (n * t->passes - t->rows)) / t->passes;
}

// Rows that generate; before anything has begun, all.
static size_t active_rows(const retrofit_front *front) {
    size_t B = front->buffers->B, active = 0;
    for (size_t row = 0; row < B; row++) active += front->rows[row].sampling != NULL;
    return active ? active : B;
}

// Seconds a token, with readings at these depths. first = r: without any; second = 0: with one.
static double token_seconds(const retrofit_front *front, size_t first, size_t second) {
    const retrofit_tuning *tuning = front->tuning;
    double r = (double)front->options.recurrences, active = (double)active_rows(front);
    if (first >= front->options.recurrences)
        return r * pass_seconds(tuning, active) + tuning->reading_seconds;
    double right = agreement(tuning, first), mended = second ? agreement(tuning, second) : right;
    double passes = right * (double)first + (mended - right) * (double)second + (1 - mended) * r;
    double rows = active * r / (double)first, most = (double)front->most;
    if (rows > most) passes = fmax(passes, active * r / most);
    double readings = passes / (double)first; // a second one that comes with a first one is free
    if (second && second % first) readings++;
    return passes * pass_seconds(tuning, fmin(rows, most)) + readings * tuning->reading_seconds;
}

// Takes the depths that cost least, if that is worth a change.
static void choose_depths(retrofit_front *front) {
    size_t *depths = front->depths, r = front->options.recurrences, best[2] = {r, 0};
    if (!front->tuning || front->tuning->asked[0] == 0) return;
    double cost = token_seconds(front, r, 0);
    for (size_t i = 0; i < RETROFIT_GUESSES && guess_depths[i] < r; i++) {
        for (size_t j = i; j < RETROFIT_GUESSES && guess_depths[j] < r; j++) {
            size_t first = guess_depths[i], second = j > i ? guess_depths[j] : 0;
            double seconds = token_seconds(front, first, second);
            if (seconds >= cost) continue;
            cost = seconds;
            best[0] = first;
            best[1] = second;
        }
    }
    if (cost > 0.9 * token_seconds(front, depths[0], depths[1])) return;
    depths[0] = best[0];
    depths[1] = best[1];
}

// ---- Tokens under way ---------------------------------------------------------------------------

static retrofit_draft *find_draft(retrofit_front *front, size_t row, int32_t position) {
    for (size_t i = 0; i < front->count; i++) {
        retrofit_draft *draft = &front->drafts[i];
        if (draft->row == row && draft->position == position) return draft;
    }
    return NULL;
}

// What has begun at a position, or is to begin there. NULL: nothing.
static retrofit_draft *find_proposal(retrofit_front *front, size_t row, int32_t position) {
    retrofit_front_row *at = &front->rows[row];
    if (at->waits && at->next.position == position) return &at->next;
    return find_draft(front, row, position);
}

// The last one takes its place.
static void remove_draft(retrofit_front *front, size_t i) {
    const retrofit_ops *ops = front->buffers->model->ops;
    size_t d = front->buffers->model->config.n_embd, bytes = d * sizeof(float);
    float *states = front->buffers->decoder->drafted, *injected = states + RETROFIT_UNDER_WAY * d;
    size_t last = --front->count;
    if (i == last) return;
    front->drafts[i] = front->drafts[last];
    ops->copy(states + i * d, states + last * d, bytes);
    ops->copy(injected + i * d, injected + last * d, bytes);
}

// Drops a row's tokens behind a position.
static void drop_behind(retrofit_front *front, size_t row, int32_t position) {
    front->rows[row].waits = false;
    for (size_t i = front->count; i-- > 0;) {
        const retrofit_draft *draft = &front->drafts[i];
        if (draft->row == row && draft->position > position) remove_draft(front, i);
    }
}

// The parts of a pass; with a GPU each is recorded for each number of rows when it is done for the
// second time, as decoding steps are.
enum { FRONT_BEGIN, FRONT_DEEPEN, FRONT_READ };

static void do_part(retrofit_buffers *buffers, const retrofit_recurrence_options *options,
                    int part) {
    if (part == FRONT_BEGIN) begin_recurrence(buffers, options);
    if (part == FRONT_DEEPEN) retrofit_recur(buffers, 1, 0);
    if (part == FRONT_READ) read_next_logits(buffers);
}

static void run_part(retrofit_front *front, retrofit_buffers *buffers, int part) {
    const retrofit_ops *ops = buffers->model->ops;
    void **recording = &front->recordings[part][buffers->b - 1];
    bool *was_run = &front->were_run[part][buffers->b - 1];
    if (!*recording && *was_run && ops->record_begin) {
        ops->record_begin();
        do_part(buffers, &front->options, part);
        *recording = ops->record_end();
    }
    if (*recording) ops->replay(*recording);
    else do_part(buffers, &front->options, part);
    *was_run = true;
}

// The batch becomes n rows of one token at these positions, with these lanes of the cache.
static void set_rows(retrofit_buffers *buffers, size_t n, const int32_t *positions,
                     const int32_t *lanes) {
    const retrofit_ops *ops = buffers->model->ops;
    retrofit_decoder *decoder = buffers->decoder;
    set_shape(buffers, n, 1);
    ops->upload(buffers->past, positions, n * sizeof *positions);
    ops->upload(decoder->lanes, lanes, n * sizeof *lanes);
    decoder->lane = decoder->lanes;
}

// Prelude and s_0 of the tokens that wait, as far as there is room.
static void begin_waiting(retrofit_front *front) {
    retrofit_buffers *buffers = front->buffers;
    const retrofit_ops *ops = buffers->model->ops;
    size_t d = buffers->model->config.n_embd, n = 0, at = front->count;
    int32_t ids[RETROFIT_UNDER_WAY], positions[RETROFIT_UNDER_WAY], lanes[RETROFIT_UNDER_WAY];
    for (size_t row = 0; row < buffers->B && at + n < front->most; row++) {
        retrofit_front_row *from = &front->rows[row];
        if (!from->waits) continue;
        from->waits = false;
        front->drafts[at + n] = from->next;
        prepare_draft(front->tuning, &front->drafts[at + n]);
        ids[n] = from->next.id;
        positions[n] = from->next.position;
        lanes[n++] = (int32_t)row;
    }
    if (n == 0) return;
    front->count += n;
    set_rows(buffers, n, positions, lanes);
    ops->upload(buffers->tokens, ids, n * sizeof *ids);
    run_part(front, buffers, FRONT_BEGIN);
    float *states = buffers->decoder->drafted + at * d;
    ops->copy(states, buffers->state, n * d * sizeof *states);
    ops->copy(states + RETROFIT_UNDER_WAY * d, buffers->injected, n * d * sizeof *states);
}

// One recurrence for each token under way. That of depth i has recurrence i's slots.
static void go_deeper(retrofit_front *front) {
    retrofit_buffers pass = *front->buffers; // but for where the states are
    size_t C = pass.model->config.core, d = pass.model->config.n_embd, n = front->count;
    int32_t positions[RETROFIT_UNDER_WAY], lanes[RETROFIT_UNDER_WAY];
    for (size_t i = 0; i < n; i++) {
        retrofit_draft *draft = &front->drafts[i];
        positions[i] = draft->position;
        lanes[i] = (int32_t)(draft->depth * C * pass.B + draft->row);
        draft->depth++;
    }
    pass.state = pass.decoder->drafted;
    pass.injected = pass.decoder->drafted + RETROFIT_UNDER_WAY * d;
    set_rows(&pass, n, positions, lanes);
    run_part(front, &pass, FRONT_DEEPEN);
    front->counts.passes++;
    front->counts.rows += n;
    front->counts.most = retrofit_max(front->counts.most, n);
}

// ---- Readings ----------------------------------------------------------------------------------

// What a token is read off for at its depth; -1: nothing.
static int reading_kind(const retrofit_front *front, const retrofit_draft *draft) {
    if (draft->depth == front->options.recurrences) return READ_ANSWER;
    if (!draft->was_read && draft->depth >= front->depths[0]) return READ_FIRST;
    if (draft->depth == front->depths[1]) return READ_SECOND;
    for (size_t k = 0; k < RETROFIT_GUESSES && draft->is_asked; k++)
        if (guess_depths[k] == draft->depth) return READ_GUESS;
    return -1;
}

// Coda and head for all tokens that are at a depth to be read at. Returns their number; deeper
// readings come first.
static size_t read_off(retrofit_front *front, reading readings[RETROFIT_UNDER_WAY]) {
    retrofit_buffers *buffers = front->buffers;
    const retrofit_ops *ops = buffers->model->ops;
    const retrofit_config *c = &buffers->model->config;
    const float *states = buffers->decoder->drafted;
    int32_t positions[RETROFIT_UNDER_WAY], lanes[RETROFIT_UNDER_WAY];
    static const int kinds[] = {READ_ANSWER, READ_SECOND, READ_FIRST, READ_GUESS};
    size_t n = 0, d = c->n_embd;
    for (size_t k = 0; k < 4; k++) {
        for (size_t i = 0; i < front->count; i++) {
            const retrofit_draft *draft = &front->drafts[i];
            if (reading_kind(front, draft) != kinds[k]) continue;
            readings[n] = (reading){draft->row, draft->position, kinds[k]};
            positions[n] = draft->position;
            lanes[n] = (int32_t)draft->row;
            ops->copy(buffers->state + n * d, states + i * d, d * sizeof *states);
            n++;
        }
    }
    if (n == 0) return 0;
    front->counts.readings++;
    set_rows(buffers, n, positions, lanes);
    run_part(front, buffers, FRONT_READ);
    ops->download(front->logits, buffers->wide_logits, n * c->vocab * sizeof *front->logits);
    return n;
}

// `id` is to begin behind the token that was read, in place of all that has begun there.
static void propose(retrofit_front *front, const retrofit_draft *from, int32_t id, uint64_t seed) {
    retrofit_front_row *row = &front->rows[from->row];
    int32_t position = from->position + 1;
    drop_behind(front, from->row, from->position);
    row->waits = position < row->end;
    row->next = (retrofit_draft){.id = id, .position = position, .row = from->row, .seed = seed};
}

static void judge_reading(retrofit_front *front, const reading *what, const float *logits) {
    retrofit_draft *found = find_draft(front, what->row, what->position);
    retrofit_front_row *row = &front->rows[what->row];
    if (!found) return; // a deeper reading dropped it
    retrofit_sampling sampling = *row->sampling;
    sampling.seed = found->seed;
    int32_t id = retrofit_sample(logits, front->vocab, &sampling, front->scratch);
    note_guess(found, id);
    if (what->kind == READ_GUESS) return;
    found->was_read = true;
    retrofit_draft draft = *found, *begun = find_proposal(front, what->row, what->position + 1);
    bool confirmed = begun && begun->id == id;
    front->counts.proposed += what->kind == READ_FIRST;
    front->counts.kept_second += what->kind == READ_SECOND && confirmed;
    front->counts.kept += what->kind == READ_ANSWER && confirmed;
    front->counts.restarts += begun && !confirmed;
    if (!confirmed) propose(front, &draft, id, sampling.seed);
    if (what->kind != READ_ANSWER) return;

    if (front->tuning) judge_guesses(front->tuning, &draft, id);
    front->counts.answers++;
    row->answer = id;
    row->logits = logits;
    row->sampling->seed = sampling.seed;
    front->buffers->decoder->seen[draft.row] = draft.position + 1;
    front->buffers->decoder->used[draft.row] = (int32_t)draft.depth;
    found = find_draft(front, draft.row, draft.position);
    remove_draft(front, (size_t)(found - front->drafts));
}

void retrofit_front_advance(retrofit_front *front) {
    retrofit_buffers *buffers = front->buffers;
    retrofit_tuning *tuning = front->tuning;
    reading readings[RETROFIT_UNDER_WAY];
    float wait;
    for (size_t row = 0; row < buffers->B; row++) front->rows[row].answer = -1;
    double start = retrofit_seconds();
    begin_waiting(front);
    if (front->count == 0) return;
    double begun = retrofit_seconds();
    size_t under_way = front->count;
    go_deeper(front);
    if (tuning) buffers->model->ops->download(&wait, buffers->decoder->drafted, sizeof wait);
    double passed = retrofit_seconds();
    size_t count = read_off(front, readings);
    buffers->decoder->lane = NULL;
    if (tuning) note_pass(tuning, (double)under_way, passed - begun);
    for (size_t i = 0; i < count; i++)
        judge_reading(front, &readings[i], front->logits + i * buffers->model->config.vocab);
    if (!tuning || count == 0) return;
    double seconds = begun - start + retrofit_seconds() - passed;
    tuning->reading_seconds += (seconds - tuning->reading_seconds) / 4;
    choose_depths(front);
}

// ---- A front's life ----------------------------------------------------------------------------

static bool check_front(const retrofit_buffers *buffers, const retrofit_recurrence_options *options,
                        size_t first, size_t second) {
    const retrofit_decoder *decoder = buffers->decoder;
    size_t r = options->recurrences;
    if (retrofit_is_plain(&buffers->model->config))
        return retrofit_fail("a model without recurrences has no depths to draft at");
    if (!decoder || decoder->cache.kind != RETROFIT_CACHE_FULL)
        return retrofit_fail("drafts need the full KV cache");
    if (options->exit || options->continuous || options->noise > 0)
        return retrofit_fail("drafts go with no exit, continuous thinking or noise");
    if (r == 0 || r > decoder->cache.recurrences)
        return retrofit_fail("%zu recurrences, but the KV cache has room for %zu", r,
                             decoder->cache.recurrences);
    if (first == 0 || (second && second <= first))
        return retrofit_fail("readings at depths %zu and %zu", first, second);
    return true;
}

retrofit_front *retrofit_front_new(retrofit_buffers *buffers,
                                   const retrofit_recurrence_options *options, size_t first,
                                   size_t second, size_t vocab, retrofit_tuning *tuning) {
    if (!check_front(buffers, options, first, second)) return NULL;
    retrofit_front *front = retrofit_allocate(1, sizeof *front);
    if (!front) return NULL;
    size_t V = buffers->model->config.vocab, r = options->recurrences;
    front->buffers = buffers;
    front->options = *options;
    front->tuning = tuning;
    front->depths[0] = retrofit_min(first, r);
    front->depths[1] = second < r ? second : 0;
    front->vocab = retrofit_min(vocab, V);
    front->most = retrofit_min(RETROFIT_UNDER_WAY, buffers->B * buffers->T);
    front->drafts = retrofit_allocate(front->most, sizeof *front->drafts);
    front->rows = retrofit_allocate(buffers->B, sizeof *front->rows);
    front->logits = retrofit_allocate(front->most * V, sizeof *front->logits);
    front->scratch = retrofit_allocate(V, sizeof(candidate));
    if (!front->drafts || !front->rows || !front->logits || !front->scratch) {
        retrofit_front_free(front);
        return NULL;
    }
    choose_depths(front);
    return front;
}

void retrofit_front_free(retrofit_front *front) {
    if (!front) return;
    for (size_t i = 0; i < 3 * RETROFIT_UNDER_WAY; i++) {
        void *recording = front->recordings[i / RETROFIT_UNDER_WAY][i % RETROFIT_UNDER_WAY];
        if (recording) front->buffers->model->ops->record_free(recording);
    }
    free(front->drafts);
    free(front->rows);
    free(front->logits);
    free(front->scratch);
    free(front);
}

bool retrofit_front_begin(retrofit_front *front, size_t row, int32_t id, int32_t end,
                          retrofit_sampling *sampling) {
    const retrofit_buffers *buffers = front->buffers;
    int32_t position = buffers->decoder->seen[row];
    if (id < 0 || (size_t)id >= buffers->model->config.vocab)
        return retrofit_fail("token %d, but the vocabulary has %zu entries", (int)id,
                             buffers->model->config.vocab);
    if (position >= end || (size_t)end > buffers->decoder->cache.capacity)
        return retrofit_fail("a token at position %d of %d, in a context of %zu", (int)position,
                             (int)end, buffers->decoder->cache.capacity);
    retrofit_front_end(front, row);
    retrofit_draft next = {.id = id, .position = position, .row = row, .seed = sampling->seed};
    front->rows[row] = (retrofit_front_row){
        .sampling = sampling, .end = end, .waits = true, .next = next, .answer = -1};
    return true;
}

void retrofit_front_end(retrofit_front *front, size_t row) {
    drop_behind(front, row, -1);
    front->rows[row].sampling = NULL;
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

// ---- Devices, models and buffers in memory: section 8 ------------------------------------------

typedef enum { RETROFIT_AUTO, RETROFIT_ON_CPU, RETROFIT_ON_CUDA } retrofit_place;
// The table for a place, made ready; text: what it is and, if AUTO took the CPU in a program built
// with RETROFIT_CUDA, why. NULL or error.
const retrofit_ops *retrofit_device(retrofit_place place, bool fp32, char text[256]);
// A model of this shape without memory for its weights: the list of parameters alone. NULL or
// error.
retrofit_model *retrofit_model_new(const retrofit_config *config, const retrofit_ops *ops);
// Memory for its parameters, in fp32, zeroed; for training also for gradients. false or error.
bool retrofit_model_allocate(retrofit_model *model, retrofit_mode mode);
// Reads a Hugging Face directory: config.json, model.safetensors or its shards; or directory/latest
// if it holds no model itself. INFERENCE on a CPU leaves weights in the mapped files, in their
// type; everything else copies them, to fp32 masters for training. All are read once, since an
// infinity or a NaN among them is an error, with the tensor's name and the index. NULL or error.
retrofit_model *retrofit_load(const char *directory, const retrofit_ops *ops, retrofit_mode mode);
void retrofit_free(retrofit_model *model);
// Copies masters to where operations read them; needed after masters were changed by hand.
void retrofit_refresh_weights(retrofit_model *model);

// K is ignored where nothing is kept; cache: NULL unless it is for decoding. NULL or error.
retrofit_buffers *retrofit_buffers_new(const retrofit_model *model, size_t B, size_t T, size_t K,
                                       retrofit_keep keep, const retrofit_kv_cache *cache);
void retrofit_buffers_free(retrofit_buffers *buffers);
// The bytes that retrofit_buffers_new would take, without a cache. SIZE_MAX or error.
size_t retrofit_buffers_bytes(const retrofit_config *config, const retrofit_ops *ops, size_t B,
                              size_t T, size_t K, retrofit_keep keep);

// Whether this kind of optimizer updates p by Muon, which keeps one moment instead of two.
bool retrofit_by_muon(const retrofit_parameter *p, retrofit_optimizer_kind kind);
// Memory for the moments and Muon's scratch. false or error.
bool retrofit_optimizer_init(retrofit_model *model, retrofit_optimizer_kind kind);
// What training a model without memory would take: bytes of weights (with their copies in
// act_type), gradients, moments.
void retrofit_training_bytes(retrofit_model *model, retrofit_mode mode,
                             retrofit_optimizer_kind kind, size_t *weights, size_t *gradients,
                             size_t *moments);

// ---- Several processes train together: retrofit_ranks.h ----------------------------------------

// What a step calls, and what it is done with: retrofit_mpi.c has it for CPUs, retrofit_cuda.cu for
// GPUs. Each process computes micro-batches of its own and updates parameters of its own.
typedef struct retrofit_ranks retrofit_ranks;
struct retrofit_ranks {
    size_t rank, count;        // this process, of so many
    size_t local, local_count; // the same among those on this machine
    double patience;           // seconds that it waits for the others
    bool failed;               // an exchange did: retrofit_error() says why
    bool (*is_own)(retrofit_model *model, const retrofit_training *training, size_t j);
    void (*gradients_done)(retrofit_model *model, retrofit_part part);
    bool (*sum)(retrofit_model *model, double *loss);
    void (*deal)(retrofit_model *model, retrofit_optimizer_kind kind);
    void (*gather_weights)(retrofit_model *model);
    // On the device of the model: x becomes its sum over the ranks, on a CPU from the last to the
    // first; all get the x that `root` has. A GPU does both beside its other work, until `finish`,
    // which is NULL on a CPU. false or error.
    bool (*all_reduce)(retrofit_ranks *ranks, float *x, size_t n);
    bool (*broadcast)(retrofit_ranks *ranks, float *x, size_t n, size_t root);
    bool (*finish)(retrofit_ranks *ranks);
    // NULL without MPI: rank 0's bytes on the host, to all; answers who asks whether this rank is
    // there; who does not answer, or `count`; the end, of all at once unless the code is 0.
    void (*share)(void *bytes, size_t size);
    void (*answer)(const retrofit_ranks *ranks);
    size_t (*silent)(const retrofit_ranks *ranks);
    void (*end)(int code);
};
bool retrofit_mpi_start(retrofit_ranks *ranks); // false or error
// They meet at that path, a file that rank 0 makes, where there is no MPI. false or error.
bool retrofit_nccl_start(retrofit_ranks *ranks, const char *meeting);
// Which process this is, as mpirun, srun or torchrun have it in the environment.
void retrofit_ranks_find(retrofit_ranks *ranks);
extern bool retrofit_silent; // neither notes nor live lines

// Rows first … first + count - 1 of the logits (N,V), to the host.
void retrofit_logits(retrofit_buffers *buffers, size_t first, size_t count, float *logits);
// Σ x² of n numbers on the device, to the host. Needs the optimizer's memory.
double retrofit_sum_squares(const retrofit_model *model, const float *x, size_t n);
// Root mean squares of the states s_n … s_{n+k} of a training pass; returns k + 1, their number. If
// they grow from one recurrence to the next, training is about to fail. Needs the optimizer's
// memory.
size_t retrofit_state_rms(const retrofit_buffers *buffers, double *rms);

// ---- Random numbers ----------------------------------------------------------------------------

// Random numbers that are a function of (seed, counter), so that they are the same from any thread
// and on any device: 64 bits, a number in (0, 1), a normal number cut at ±3.
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

// ---- Small things that programs need too -------------------------------------------------------

// Says on stderr, in one line that begins with "note: ", what a user may not expect although
// nothing failed: a key that is not followed, a file that is not used. A thread says a line once.
void retrofit_note(const char *format, ...);
// Makes one line of a text that goes to a terminal: control characters, which names and texts in
// files may contain, become question marks.
void retrofit_make_line(char *text);
// Prints "who: text" on stderr, made one line, in the place of a live line.
void retrofit_say(const char *who, char *text);

// How far long work is: a line on stderr, without control characters. On a terminal it takes the
// place of the one before and is cut to the terminal's width. NULL takes it away; a note does so
// too, and so must whatever else is written there. A signal handler may call it with NULL.
void retrofit_live_line(const char *text);
// How many columns of it are shown. SIZE_MAX: all, since stderr is no terminal with such lines.
size_t retrofit_live_columns(void);
// Whether it is time for the next one: on a terminal five times in a second, elsewhere every two
// seconds, from the first call on.
bool retrofit_live_line_due(void);
// Where a program has set the flag: shows, if it is time for it, that done/total of this is done,
// as "45 % of model.safetensors written"; at the end takes the line away. Loading and saving do so.
extern bool retrofit_shows_shares;
__attribute__((format(printf, 3, 4))) void retrofit_show_share(size_t done, size_t total,
                                                               const char *format, ...);

// Whether what failed, since errno was set to 0, failed for want of memory or descriptors or by a
// disk's fault, and not because of what a file says.
bool retrofit_machine_failed(void);

// count·size zeroed bytes, freed with free(). NULL or error, also if the product overflows.
void *retrofit_allocate(size_t count, size_t size);
// realloc and strdup, but with an error where they fail, and the first for count·size bytes. NULL
// or error, and then `memory` is as it was.
void *retrofit_reallocate(void *memory, size_t count, size_t size);
char *retrofit_copy_string(const char *string);
// Brings what was printed to where stdout leads. false or error, also if printing failed before.
bool retrofit_flush_stdout(void);
#define RETROFIT_PATH 4096 // bytes of a path, its NUL included
// Writes directory/name to path. false or error if it is too long.
bool retrofit_path(char path[RETROFIT_PATH], const char *directory, const char *name);
// Opens a regular file for reading and sets *size to its bytes. NULL or error.
FILE *retrofit_open_file(const char *path, size_t *size);
// Reads a whole file; a NUL follows its *size bytes. Freed with free(). NULL or error.
char *retrofit_read_file(const char *path, size_t *size);
// A hash of bytes, begun with RETROFIT_HASH_START. It may go on from one piece to the next where
// all but the last have a multiple of 8 bytes.
#define RETROFIT_HASH_START 0xcbf29ce484222325u
uint64_t retrofit_hash_bytes(uint64_t hash, const char *data, size_t size);
// A hash of a block of memory: of all of it up to 1 MiB, else of its size, its first and last bytes
// and 64 KiB out of every 64th part. Files that differ have different ones, unless somebody changed
// a few bytes of a large one.
uint64_t retrofit_sample_hash(const void *data, size_t size);
// Whether something of this name is there, be it a link that leads nowhere. What cannot be looked
// at counts as being there, so that who opens it hears why.
bool retrofit_is_there(const char *path);
// Whether there is a directory of this name, for a model, and not that of a training run which has
// no checkpoint yet. false or error.
bool retrofit_check_directory(const char *path);
// Whether a file of this name could be written, as far as can be known before. false or error.
bool retrofit_check_writable(const char *path);
// Maps a whole file into memory, to be read only; munmap gives it back. NULL or error, also if the
// file is empty.
void *retrofit_map_file(const char *path, size_t *size);
// Lets go of the memory that holds a part of a mapped file which has been read; whoever reads it
// again gets it from the file.
void retrofit_release_pages(const void *data, size_t bytes);
// Brings what was written to the disk and closes the file. If `ok` is false, or if any of it failed
// since the file was opened, the file is removed: false or error.
bool retrofit_finish_file(FILE *file, const char *path, bool ok);
// Makes a directory and its parents, as mkdir -p does. fresh: it must not exist yet. path must be
// writable, since it is changed on the way and then restored. false or error.
bool retrofit_make_directories(char *path, bool fresh);
// Brings a directory to the disk: which files it has and under which names. false or error.
bool retrofit_sync_directory(const char *path);
// Cuts a path, in place, to the directory that it lies in: "a/b" to "a", "a" to ".".
void retrofit_parent_directory(char *path);
// Whether two paths lead to one file or directory, which is there.
bool retrofit_same_file(const char *a, const char *b);
// Seconds on a clock that only goes forward; differences alone have a meaning.
double retrofit_seconds(void);

float retrofit_bf16_to_float(uint16_t x);
uint16_t retrofit_float_to_bf16(float f); // to nearest, ties to even; NaN stays NaN
float retrofit_f16_to_float(uint16_t x);
// n elements of type F32, BF16, F16 or F64, at any address, as fp32.
void retrofit_to_float(float *out, const void *data, retrofit_type type, size_t n);

// ---- Text, JSON, tokenizer ---------------------------------------------------------------------

// Bytes that grow, from a zeroed struct; freed with free(text.bytes). Running out of memory records
// an error and sets `failed`, after which nothing is appended: callers look at it once, at the end.
typedef struct {
    char *bytes;
    size_t size, capacity;
    bool failed;
} retrofit_text;
void retrofit_text_append(retrofit_text *text, const void *bytes, size_t size);
// Appends an item of a list like "a, b, c".
void retrofit_text_append_item(retrofit_text *text, const char *item);

// Moves the text's beginning and reduces its size, so that neither end has what Python's str.strip
// removes.
void retrofit_strip(const char **text, size_t *size);
// The same at its beginning alone.
void retrofit_strip_begin(const char **text, size_t *size);
// The bytes of that at the text's beginning; the size of the text without it at its end.
size_t retrofit_spaces_at(const char *text, size_t size);
size_t retrofit_size_without_spaces(const char *text, size_t size);
// Moves the text's beginning behind the byte order mark that some editors put there.
void retrofit_skip_mark(const char **text, size_t *size);

// The first character of text, size > 0, and its length. If it is not valid UTF-8, *code_point is
// RETROFIT_UTF8_INVALID, and the length is that of the stretch for which Unicode puts one U+FFFD.
#define RETROFIT_UTF8_INVALID UINT32_MAX
size_t retrofit_utf8_next(const char *text, size_t size, uint32_t *code_point);
// Where text is first not UTF-8: from `begin` on; `size` if nowhere.
size_t retrofit_find_invalid(const char *text, size_t begin, size_t size);
// Whether a text is UTF-8; `where` begins the error, which names the byte. false or error.
bool retrofit_check_utf8(const char *text, size_t size, const char *where);
// Appends text with one U+FFFD for each stretch that is not UTF-8. Returns the number of stretches.
size_t retrofit_append_valid(retrofit_text *out, const char *text, size_t size);

enum {
    RETROFIT_JSON_NULL,
    RETROFIT_JSON_BOOL,
    RETROFIT_JSON_NUMBER,
    RETROFIT_JSON_STRING,
    RETROFIT_JSON_ARRAY,
    RETROFIT_JSON_OBJECT,
};
typedef int retrofit_json_type; // one of these
typedef struct retrofit_json retrofit_json;
struct retrofit_json {
    retrofit_json_type type;
    uint32_t count;       // children of an array or object
    uint32_t key_length;  // of key, which may contain NUL too
    uint32_t length;      // of string, which may contain NUL too
    const char *key;      // the name of an object's member, else NULL. UTF-8 with a NUL at its end
    const char *string;   // a string, or a number as it is written. UTF-8 with a NUL at its end
    double number;        // a number, correctly rounded; 0 or 1 for a bool
    retrofit_json *child; // the first child of an array or object
    retrofit_json *next;  // the next child of the same parent
};

// Parses strict RFC 8259 JSON: valid UTF-8, no lone surrogates, at most 64 levels, nothing but
// white space after the value. At most 2^24 values, which take 0.9 GB, and 4 GB of text. Members of
// an object must have different names: with two values of one name readers disagree about which
// counts. Copies what it needs from text. Returns the root, freed with retrofit_json_free, or NULL
// with an error that names `where` (a file, say) and the byte, or the name that is there twice.
retrofit_json *retrofit_json_parse(const char *text, size_t size, const char *where);
// Reads a file that holds an object, perhaps behind a byte order mark. *size: its bytes; size may
// be NULL. Freed with retrofit_json_free. NULL or error.
retrofit_json *retrofit_json_read(const char *path, size_t *size);
// Frees the tree of a root that one of these returned; root may be NULL.
void retrofit_json_free(retrofit_json *root);
// The member of this name; NULL if there is none or `object` is NULL or not an object.
const retrofit_json *retrofit_json_get(const retrofit_json *object, const char *key);
// Whether value is the string `word`. It may be NULL.
bool retrofit_json_is(const retrofit_json *value, const char *word);
// Whether value is a whole number from 0 to 2^53, which *out then is. It may be NULL.
bool retrofit_json_size(const retrofit_json *value, size_t *out);
// What the keys of a file mean to us. Each file that we read has a table of all that are known, so
// that none is passed over in silence (doc/checks.md lists them).
typedef struct {
    const char *key;     // one or several, with spaces between; "name*" is all that begin so
    const char *neutral; // NULL: the key is used. "*": it changes nothing here, whatever it says.
                         // Else the values that change nothing, as "false|1.0": what has another
                         // one is refused. null, false, "", [] and {} never change anything,
                         // but where it is "true".
    const char *why;     // what it is about; for a refusal also what to do, or NULL
} retrofit_key;

// The row of a key; NULL if the table has none.
const retrofit_key *retrofit_key_find(const char *key, const retrofit_key *table, size_t count);
// Checks the members of `object` by a table. What is refused, or unknown with a name that speaks of
// what a model computes, is an error that names key and value; other keys that are unknown are said
// in a note. `where` is the file. false or error.
bool retrofit_keys_check(const retrofit_json *object, const retrofit_key *table, size_t count,
                         const char *where);
// The same for one key, whose value is written as in the table's `neutral`. *known is set to
// whether it may be passed over without a note.
bool retrofit_key_check(const char *key, const char *value, const retrofit_key *table, size_t count,
                        const char *where, bool *known);
// A value as it is written in a table of keys; what has members in it is "[...]" or "{...}".
const char *retrofit_json_value_text(const retrofit_json *value);
// Writes UTF-8 to file as a quoted and escaped JSON string. Failures show in ferror(file).
void retrofit_json_write_string(FILE *file, const char *text, size_t size);

// A Hugging Face tokenizer, reproduced id for id: byte-level BPE with the patterns of GPT-2,
// Llama 3 and Qwen 2, and SentencePiece's BPE as in Llama 2. Once loaded nothing changes it, so
// that threads may share one.
typedef struct retrofit_tokenizer retrofit_tokenizer;

// Reads directory/tokenizer.json and, if they are there, tokenizer_config.json, and
// special_tokens_map.json as transformers does; from directory/latest if it has no tokenizer.json,
// as the output of a training. doc/checks.md lists the keys. Freed with retrofit_tokenizer_free.
// NULL or error, also for a step or setting that is not supported: none that would change ids is
// skipped. Where versions of transformers differ, a note says which one is followed.
retrofit_tokenizer *retrofit_tokenizer_load(const char *directory);
void retrofit_tokenizer_free(retrofit_tokenizer *tokenizer); // or NULL

// Encodes UTF-8. Special tokens that are spelt out in text become their ids. with_special adds what
// the post-processor adds (BOS, mostly). Each invalid stretch of UTF-8 is read as U+FFFD, as
// Python's errors="replace" does before Hugging Face's tokenizers see a text. Returns malloc'd ids
// and *count; NULL or error if memory is out.
int32_t *retrofit_encode(const retrofit_tokenizer *tokenizer, const char *text, size_t size,
                         bool with_special, size_t *count);
// The same for many texts, or a long one, several times as fast: an encoder keeps its memory, and
// the ids of words that it has seen. Each thread needs its own. A text of megabytes is shared out
// to all threads, with the same ids; `progress`, unless it is NULL, is then called now and then by
// the first thread, with the context, when about so many bytes of the text are done.
typedef struct retrofit_encoder retrofit_encoder;
retrofit_encoder *retrofit_encoder_new(const retrofit_tokenizer *tokenizer); // NULL or error
void retrofit_encoder_free(retrofit_encoder *encoder);                       // or NULL
int32_t *retrofit_encode_with(retrofit_encoder *encoder, const char *text, size_t size,
                              bool with_special, size_t *count,
                              void (*progress)(void *context, size_t bytes), void *context);
// Decodes ids to malloc'd valid UTF-8 with a NUL at its end, which *size does not count.
// skip_special leaves special tokens out. An id that no token has gives no text, as the ids that a
// model has beyond its tokenizer's. NULL or error for one that no tokenizer could have.
char *retrofit_decode(const retrofit_tokenizer *tokenizer, const int32_t *ids, size_t count,
                      bool skip_special, size_t *size);

// Text as it is generated. Tokens cannot be decoded one by one: one may be half of a character, and
// the first one loses its leading space. So the caller keeps all ids and asks after each new one
// what text has come; `last` says that no more ids will. The texts together are exactly what
// retrofit_decode makes of all ids; what is only the beginning of a character waits for the rest.
// Start from a zeroed stream. Each token is decoded once, however long it waits: the cost of a call
// does not grow. Returns and fails like retrofit_decode.
typedef struct {
    size_t begin, end;        // the tokens before `end` are known, those before `begin` decoded
    bool has_token, has_text; // whether one of these counted, and whether there was text
    char cut[3];              // the beginning of a character, of which the rest is to come
    size_t cut_size;
} retrofit_stream;
char *retrofit_decode_next(const retrofit_tokenizer *tokenizer, retrofit_stream *stream,
                           const int32_t *ids, size_t count, bool skip_special, bool last,
                           size_t *size);

// Generated text must be decoded together with a token of the text before it, if there is one:
// SentencePiece's decoder takes a space off the front, which is wrong in the middle of a text.
// Finds the token to use in the count ids of that text. (Byte tokens would not do, since what a run
// of them stands for is known only at its end.) false: there is none, or none is needed.
bool retrofit_decode_context(const retrofit_tokenizer *tokenizer, const int32_t *ids, size_t count,
                             int32_t *id);

// The ids of beginning and end of text that tokenizer_config.json names; -1 if it names none.
int32_t retrofit_tokenizer_bos(const retrofit_tokenizer *tokenizer);
int32_t retrofit_tokenizer_eos(const retrofit_tokenizer *tokenizer);
// Whether decoded text would lose spaces before punctuation in transformers, by the setting
// clean_up_tokenization_spaces, which is not followed: what is shown could not take a space back.
bool retrofit_tokenizer_cleans_up(const retrofit_tokenizer *tokenizer);
// Whether encoding with_special ends every text with this id.
bool retrofit_tokenizer_adds_at_end(const retrofit_tokenizer *tokenizer, int32_t id);
// The id of a token spelt as in the file ("▁the"), or -1.
int32_t retrofit_tokenizer_id(const retrofit_tokenizer *tokenizer, const char *token);
// The highest id + 1.
size_t retrofit_tokenizer_size(const retrofit_tokenizer *tokenizer);
// A hash, never 0, of all that decides ids, however the file is laid out.
uint64_t retrofit_tokenizer_hash(const retrofit_tokenizer *tokenizer);

// ---- Chat templates ----------------------------------------------------------------------------

// A model's own chat template, which writes a conversation out as the text that the model knows.
// Once loaded nothing changes it, so that threads may share one.
typedef struct retrofit_chat retrofit_chat;

typedef struct {
    const char *role, *content;
    size_t size;               // of content
    const retrofit_json *json; // with all else it has, if it is of a file; or NULL
} retrofit_message;

// Reads the template of a directory as transformers does: chat_template.jinja, or what
// tokenizer_config.json has. The tokenizer must stay until it is freed. NULL or error.
retrofit_chat *retrofit_chat_load(const char *directory, const retrofit_tokenizer *tokenizer);
void retrofit_chat_free(retrofit_chat *chat);                // or NULL
const char *retrofit_chat_where(const retrofit_chat *chat);  // the file, for errors
// The text of a conversation; prompt: up to where the model answers, by add_generation_prompt.
// Special tokens are spelt out in it, BOS too where the template has one: it is encoded without
// with_special. marks: NULL, or gets where in the text each {% generation %} begins and ends, pairs
// of size_t. Freed with free(text->bytes) and free(marks->bytes). false or error, and then both are
// empty.
bool retrofit_chat_render(const retrofit_chat *chat, const retrofit_message *messages, size_t count,
                          bool prompt, retrofit_text *text, retrofit_text *marks);
// Whether the template marks what the model says itself, by {% generation %}.
bool retrofit_chat_has_marks(const retrofit_chat *chat);
// The same, and a template that writes nothing of a message, for its role mostly, is an error.
bool retrofit_chat_write(const retrofit_chat *chat, const retrofit_message *messages, size_t count,
                         bool prompt, retrofit_text *text, retrofit_text *marks);

// ---- Files -------------------------------------------------------------------------------------

// A tensor in a file or in memory. Dimensions beyond `dims` are unused.
typedef struct {
    const char *name;
    retrofit_type type;
    size_t dims, shape[4], count; // count: elements
    const void *data;
} retrofit_tensor;

// A safetensors file, mapped into memory. Only tensors of types that this library reads are listed;
// the others are checked and left out.
typedef struct retrofit_map {
    char *path;
    void *base;
    size_t bytes;
    retrofit_tensor *tensors; // [count], in the order of the header
    const retrofit_tensor **by_name; // [count] the same, sorted
    size_t count;
    retrofit_json *header;
} retrofit_map;

// Opens a file and checks every size and offset; tensors may neither overlap nor leave holes. false
// or error, and then there is nothing to close.
bool retrofit_safetensors_open(retrofit_map *map, const char *path);
void retrofit_safetensors_close(retrofit_map *map);
// The tensor of that name; the text that __metadata__ has under that key. NULL if there is none.
const retrofit_tensor *retrofit_safetensors_find(const retrofit_map *map, const char *name);
const char *retrofit_safetensors_metadata(const retrofit_map *map, const char *key);
// Looks at all numbers. Sets *infinite to the first tensor that has one that is infinite or no
// number, *zeros to the first that has zeros alone; each to map->count if there is none. release:
// the file takes no memory meanwhile, at any time; but who reads it again pays for its pages again.
void retrofit_safetensors_survey(const retrofit_map *map, bool release, size_t *infinite,
                                 size_t *zeros);
// Writes tensors whose data lie in memory of `ops`. Floats are stored as `type`: F32, BF16, or F16
// if they are F16 already; integers stay as they are. metadata: key, value, …, NULL; or just NULL.
// false or error, and then there is no file.
bool retrofit_safetensors_write(const char *path, const retrofit_ops *ops,
                                const retrofit_tensor *tensors, size_t count, retrofit_type type,
                                const char *const *metadata);

// A directory or file is made under a temporary name and takes its place in one step, so that it is
// there as a whole or not at all.
// Makes a directory beside `final`; returns its temporary name, freed with free(). NULL or error.
char *retrofit_directory_begin(const char *final);
// Renames it. Its files must be on the disk; `final` must not exist, or be empty. false or error.
bool retrofit_directory_commit(const char *temporary, const char *final);
// Copies a file. false or error, and then there is no copy.
bool retrofit_copy_file(const char *from, const char *to);
// Removes it and the files in it.
void retrofit_directory_abandon(const char *temporary);
// The name under which to write a file that is to become `final`; of a pipe or a device its own.
// Freed with free(). NULL or error.
char *retrofit_file_begin(const char *final);
// Gives the file, which is on the disk, its final name. false or error.
bool retrofit_file_commit(const char *temporary, const char *final);
// Removes what was begun last, two at most, and is neither committed nor abandoned, if it is a file
// or holds no other files than retrofit_model_files. For programs that end early, in a signal
// handler too.
void retrofit_abandon(void);
// From here on SIGINT, SIGTERM, SIGHUP and SIGPIPE do that, say so on stderr and end the program,
// which has this name. Those that it was started to ignore (by nohup, say) it still ignores.
void retrofit_abandon_on_signals(const char *program);

// Whether the numbers make a model; `where` begins the error. false or error.
bool retrofit_config_check(const retrofit_config *config, const char *where);
// Sets what makes the blocks of a family of plain models, by its model_type. false or error.
bool retrofit_config_set_family(retrofit_config *config, const char *type);
// Reads directory/config.json, of model_type huginn_raven, llama, qwen2, qwen3 or olmo2. false or
// error, also if it asks for what is not supported.
bool retrofit_config_read(retrofit_config *config, const char *directory);
// The same of a config.json under any name. false or error.
bool retrofit_config_read_file(retrofit_config *config, const char *path);
// Ids of beginning and end of a text that are another model's, Huginn's or beyond the vocabulary,
// become the tokenizer's, with a note; so do those that the config lacks, without. `where` is the
// model's directory.
void retrofit_config_mend_ids(retrofit_config *config, const retrofit_tokenizer *tokenizer,
                              const char *where);
// Writes it. type: of the tensors beside it. It names our own modelling code for Python where that
// lies in the directory, else the authors'. false or error.
bool retrofit_config_write(const retrofit_config *config, retrofit_type type,
                           const char *directory);

// The newest checkpoint of a training's output directory, as directory/latest says. false or error.
bool retrofit_latest(const char *directory, char path[RETROFIT_PATH]);
// Where the model is: in `directory`, or in directory/latest if `directory` has no config.json, as
// the output of a training. Returns one of the two; the second one is written to `path`.
const char *retrofit_model_directory(const char *directory, char path[RETROFIT_PATH]);
// Our own modelling code for Python, at the root of retrofit and, maybe, beside a model.
#define RETROFIT_MODELLING "modeling_retrofit.py"
// The files that retrofit_save may write. The last one is NULL.
extern const char *const retrofit_model_files[];
// As retrofit_load, but without memory for the weights, which have no addresses: for who reads the
// tensors where they lie in the mapped files. That all are there is checked; none takes memory
// meanwhile. NULL or error.
retrofit_model *retrofit_open(const char *directory, const retrofit_ops *ops);
// Of the tensors that make up a parameter, one below the other, number j. NULL or error.
const retrofit_tensor *retrofit_find_source(const retrofit_model *model,
                                            const retrofit_parameter *parameter, size_t j);
// Writes config.json and model.safetensors to a directory that exists, floats as `type`, and copies
// the tokenizer's files and modelling code from tokenizer_from, or its latest checkpoint, unless
// they are there already; it may be NULL. false or error.
bool retrofit_save(const retrofit_model *model, const char *directory, retrofit_type type,
                   const char *tokenizer_from);
// Writes the optimizer's moments to directory/optimizer.safetensors; metadata as above. false or
// error.
bool retrofit_save_optimizer(const retrofit_model *model, const char *directory,
                             const char *const *metadata);
// Reads them back, into a model with an optimizer's memory; checks every name and shape. The file
// stays open as `map`, for its metadata. false or error, and then there is nothing to close.
bool retrofit_load_optimizer(retrofit_model *model, retrofit_map *map, const char *directory);

// Token shards: llm.c's .bin files. A header of 256 int32, then the tokens as uint16 or uint32. The
// header begins with {magic, version, number of tokens}. Ours go on with the hash of the tokenizer,
// its low half in int32 3 and its high half in int32 4, and with 1 in int32 5 if labels go with it;
// llm.c's have zeros there.
#define RETROFIT_SHARD_MAGIC_16 20240520 // version 1, uint16
#define RETROFIT_SHARD_MAGIC_32 20240801 // version 7, uint32
// Not all that is read need be learned: NAME.bin.labels has a label for each token of NAME.bin, the
// token itself or -100, which does not count. A header of 256 int32, which begins with {magic, 1,
// number of labels, low and high half of NAME.bin's retrofit_sample_hash}; then int32 labels.
#define RETROFIT_LABELS_MAGIC 20251107
#define RETROFIT_LABELS_SUFFIX ".labels"
enum { RETROFIT_IGNORED = -100 };
size_t retrofit_count_labels(const int32_t *labels, size_t n); // those of n that count
// Opens every file that the glob matches, in the order of their names, as rows of T + 1 tokens that
// do not overlap; a file with just that name is taken as it is. Files that are too short for a row
// are said in a note. vocab: ids must be below it. shuffle: rows come in a random order, which
// differs from epoch to epoch. NULL or error, also if labels are not there or not a shard's own.
retrofit_data *retrofit_data_open(const char *pattern, size_t T, size_t vocab, bool shuffle,
                                  uint64_t seed);
void retrofit_data_close(retrofit_data *data);
size_t retrofit_data_rows(const retrofit_data *data);
// false or error if a shard was made with another tokenizer than this one, which is NULL where it
// could not be loaded. What cannot be checked is said in a note: why there is no tokenizer, by
// retrofit_error; which shards do not say what made them.
bool retrofit_data_check(const retrofit_data *data, const retrofit_tokenizer *tokenizer);
// Reads all tokens of all shards, and their labels; a note says how many count. false or error if
// an id is not below vocab, or a label is neither -100 nor its token.
bool retrofit_data_check_ids(const retrofit_data *data);
// false or error if none of the labels of the first `rows` rows of the files counts.
bool retrofit_data_check_counted(const retrofit_data *data, size_t rows);
// false or error if a shard of `data` is also one of `other`: the same file, or the same tokens.
bool retrofit_data_check_apart(const retrofit_data *data, const retrofit_data *other);
// What the data are, to find out later whether they are still the same: for each shard a line of
// its name without directories, its size in bytes and its retrofit_sample_hash. Freed with free().
// NULL or error.
char *retrofit_data_describe(const retrofit_data *data);
// Row `index`, which counts on over the epochs: T tokens, and as labels the token after each, or
// -100 where the shard's own labels say so. false or error if an id is not below vocab.
bool retrofit_data_row(retrofit_data *data, uint64_t index, int32_t *tokens, int32_t *labels);

// ---- Command lines -----------------------------------------------------------------------------

#define RETROFIT_VERSION "0.9"

// What an option's value points to, and what sets it:
enum {
    RETROFIT_FLAG,   // bool: true by --name
    RETROFIT_STRING, // const char *: the value
    RETROFIT_SIZE,   // size_t
    RETROFIT_REAL,   // double, finite
    RETROFIT_CHOICE, // int: the index of the value among the alternatives
    RETROFIT_SWITCH, // int: 1 by --name alone, 2 + that index by --name=value
    RETROFIT_MAYBE,  // const char *: the value, "" by --name alone
    RETROFIT_HEADING // nothing: its name is a line of the help
};
typedef int retrofit_option_type; // one of these
typedef struct {
    const char *name; // without the dashes
    retrofit_option_type type;
    void *value;
    const char *argument; // what the help calls the value; of a CHOICE or SWITCH "a|b|c"
    const char *help;
} retrofit_option;
// Reads --name value and --name=value by a table of `count` options. Arguments without dashes go to
// `others`, which has memory for argc; if it is NULL, they are errors. Returns -1 to go on, or the
// program's exit code: 0 after --help (usage and the table on stdout) and --version, 1 if stdout
// cannot be written, 2 after one line on stderr that says what is wrong.
int retrofit_options(int argc, char **argv, const retrofit_option *table, size_t count,
                     const char *usage, const char **others, size_t *other_count);
// Lets threads that wait fall asleep soon, so that a program runs well beside others: what main
// calls first, since it starts the program once more. What the user's environment says stands.
void retrofit_share_processors(char **argv);
// A list like "1,2,4" of at most `max` positive sizes. false or error.
bool retrofit_sizes(const char *text, size_t *out, size_t max, size_t *count);

#ifdef __cplusplus
}
#endif
#endif // RETROFIT_MACHINERY_H

#ifdef RETROFIT_IMPLEMENTATION
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#define RETROFIT_THREAD_LOCAL _Thread_local

// =================================================================================================
// 8  Memory: the one list of parameters, arenas, who shares what
// =================================================================================================

bool retrofit_is_plain(const retrofit_config *config) { return config->core == 0; }

size_t retrofit_qkv_width(const retrofit_config *config) {
    return (config->n_heads + 2 * config->n_kv_heads) * config->head_dim;
}

// ---- What it costs -----------------------------------------------------------------------------
// A multiply-add of a matrix is 2 operations; causal attention reads T/2 keys on average. Forward
// costs 1 pass; backward 1 for the gradient of what came in and 1 for that of the weights, unless
// they are frozen. Recurrences without gradient cost 1. A_e·e and its gradients are computed once,
// whatever r is. (A_sᵀ·dY_{n+1}, which truncation never computes, is counted all the same.)
// TinyLlama (4,8,4) with n = 25, k = 8 costs 6 times as much as the 22 layers of its source.
double retrofit_flops_per_token(const retrofit_config *config, retrofit_mode mode, size_t T,
                                size_t n, size_t k) {
    static const int passes[4][5] = { // over prelude, A_e, core, A_s, coda with head
        {1, 1, 1, 1, 1},              // inference
        {3, 3, 3, 3, 3},              // training all of it,
        {1, 2, 3, 3, 2},              // the adapter and the core,
        {1, 2, 2, 3, 2},              // the adapter
    };
    const int *times = passes[mode];
    double d = (double)config->n_embd, F = (double)config->intermediate, V = (double)config->vocab;
    double P = (double)config->prelude, C = (double)config->core, D = (double)config->coda;
    double weights = d * (double)retrofit_qkv_width(config) + d * d + 3 * d * F;
    double layer = 2 * weights + 2 * (double)T * d;
    double half = retrofit_is_plain(config) ? 0 : 2 * d * d; // A_s or A_e
    double once = times[0] * P * layer + times[1] * half + times[4] * (D * layer + 2 * d * V);
    double with_gradient = times[2] * C * layer + times[3] * half;
    return once + (double)n * (C * layer + half) + (double)k * with_gradient;
}

// As the paper's figures count: 6·N_1 + 2·N_2, N_1 the parameters of prelude, k times the core, and
// coda, N_2 those of n times the core. Attention, adapter, embedding, head and freezing do not
// count: it is a measure of the body's size times its passes.
double retrofit_paper_flops_per_token(const retrofit_config *config, size_t n, size_t k) {
    double d = (double)config->n_embd, F = (double)config->intermediate;
    double layer = d * (double)retrofit_qkv_width(config) + d * d + 3 * d * F + 2 * d;
    size_t with_gradient = config->prelude + k * config->core + config->coda;
    return layer * (6 * (double)with_gradient + 2 * (double)(n * config->core));
}

// ---- The CPU as a device -----------------------------------------------------------------------
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

// By calloc, whose fresh pages are zero without being touched. The pointer that it gave is kept
// just below the aligned one, for cpu_free.
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
    // The driver of a GPU is there, which the user may expect to be used.
    if (retrofit_is_there("/dev/nvidiactl")) snprintf(text, 256, "the CPU (built without CUDA)");
#endif
    return &retrofit_cpu;
}

// ---- Arenas ------------------------------------------------------------------------------------
// An arena is one block of memory that is handed out in parts. Everything here is laid out twice by
// the same function: the first time `base` is NULL and sizes only add up; then the block is
// allocated, and the second time hands out addresses in it. So the total and the addresses come
// from the same lines of code.
typedef struct {
    char *base;  // NULL while measuring
    size_t used; // bytes handed out; SIZE_MAX once a size has overflowed
} arena;

// count·size bytes, aligned to 64. NULL while measuring.
static void *arena_alloc(arena *a, size_t count, size_t size) {
    size_t start = a->used, bytes;
    bool overflow = __builtin_mul_overflow(count, size, &bytes);
    if (overflow || bytes > SIZE_MAX / 2 || start > SIZE_MAX / 2) {
        a->used = SIZE_MAX;
        return NULL;
    }
    a->used = start + (bytes + 63) / 64 * 64;
    return a->base ? a->base + start : NULL;
}

// Between the two times: allocates what was measured, and starts again at its beginning. The block,
// zeroed, which ops->free frees. NULL or error.
static void *arena_reserve(arena *a, const retrofit_ops *ops) {
    a->base = ops->alloc(a->used);
    a->used = 0;
    return a->base;
}

// ---- The one list of parameters ----------------------------------------------------------------
// Loading, saving, the optimizers and the tests go through model->parameters; names and shapes are
// written down here alone. Surgery (convert.c) copies the layers that were chosen, whole, from a
// list with the names on the right to one with those on the left; the other layers have no place
// there, and the adapter is new.
//
//     in a recurrent checkpoint             in a plain Llama's file
//     transformer.wte.weight                model.embed_tokens.weight
//     transformer.prelude.i.….weight        -
//     transformer.adapter.weight            -
//     transformer.core_block.i.….weight     -
//     transformer.coda.i.….weight           model.layers.i.….weight
//     transformer.ln_f.weight               model.norm.weight
//     lm_head.weight                        lm_head.weight; none if it is tied to the embedding
//
// list_model has these rows, list_layer those of the tensors at …; both in the order of the list.

// A row of the list: a parameter (rows,cols) with its names. A plain Llama keeps q, k, v and gate,
// up in tensors of their own, which lie in the parameter one below the other.
typedef struct {
    retrofit_parameter *parameter;
    retrofit_kind kind;
    size_t cols;
    const char *recurrent;
    struct {
        const char *name;
        size_t rows;
    } plain[3];
} listed;

static void add_source(retrofit_parameter *parameter, const char *prefix, const char *name,
                       size_t rows) {
    retrofit_source_tensor *source = &parameter->source[parameter->sources++];
    const char *what = parameter->kind == RETROFIT_BIAS ? "bias" : "weight";
    snprintf(source->name, sizeof source->name, "%s%s.%s", prefix, name, what);
    source->rows = rows;
}

static void list_parameter(retrofit_model *model, const listed *row, const char *prefix,
                           retrofit_part part) {
    retrofit_parameter *parameter = row->parameter;
    bool plain = retrofit_is_plain(&model->config);
    if (row->plain[0].rows == 0) return; // another family's
    parameter->kind = row->kind;
    for (size_t i = 0; i < 3 && row->plain[i].rows > 0; i++) {
        parameter->rows += row->plain[i].rows;
        if (plain) add_source(parameter, prefix, row->plain[i].name, row->plain[i].rows);
    }
    if (!plain) add_source(parameter, prefix, row->recurrent, parameter->rows);

    parameter->cols = row->cols;
    parameter->part = part;
    parameter->weight.type = RETROFIT_F32;
    parameter->weight.stride = row->cols;
    model->parameters[model->parameter_count++] = parameter;
    model->weight_count += parameter->rows * parameter->cols;
}

enum { LAYER_PARAMETERS = 9 }; // at most

// The parameters of one layer; matrices are (outputs,inputs).
static void list_layer(retrofit_model *model, retrofit_layer *layer, const char *prefix,
                       retrofit_part part) {
    const retrofit_config *c = &model->config;
    size_t d = c->n_embd, F = c->intermediate, kv = c->n_kv_heads * c->head_dim; // kv = G·h
    bool per_head = c->qk_norm == RETROFIT_QK_NORM_HEAD;
    size_t q_cols = per_head ? c->head_dim : d, k_cols = per_head ? c->head_dim : kv;
    size_t q_bias = c->qkv_bias ? d : 0, k_bias = c->qkv_bias ? kv : 0; // 0: the family has none
    size_t n = c->qk_norm ? 1 : 0;
    const char *norm_1 = c->post_norm ? "post_attention_layernorm" : "input_layernorm";
    const char *norm_2 = c->post_norm ? "post_feedforward_layernorm" : "post_attention_layernorm";
    // clang-format off
    const listed rows[LAYER_PARAMETERS] = {
        {&layer->norm_1,    RETROFIT_NORM,   d,      "norm_1",      {{norm_1,             1}}},
        {&layer->w_qkv,     RETROFIT_MATRIX, d,      "attn.Wqkv",   {{"self_attn.q_proj", d},
                                                                     {"self_attn.k_proj", kv},
                                                                     {"self_attn.v_proj", kv}}},
        {&layer->b_qkv,     RETROFIT_BIAS,   1,      "attn.Wqkv",   {{"self_attn.q_proj", q_bias},
                                                                     {"self_attn.k_proj", k_bias},
                                                                     {"self_attn.v_proj", k_bias}}},
        {&layer->q_norm,    RETROFIT_NORM,   q_cols, "attn.q_norm", {{"self_attn.q_norm", n}}},
        {&layer->k_norm,    RETROFIT_NORM,   k_cols, "attn.k_norm", {{"self_attn.k_norm", n}}},
        {&layer->w_out,     RETROFIT_MATRIX, d,      "attn.proj",   {{"self_attn.o_proj", d}}},
        {&layer->norm_2,    RETROFIT_NORM,   d,      "norm_2",      {{norm_2,             1}}},
        {&layer->w_gate_up, RETROFIT_MATRIX, d,      "mlp.fc",      {{"mlp.gate_proj",    F},
                                                                     {"mlp.up_proj",      F}}},
        {&layer->w_down,    RETROFIT_MATRIX, F,      "mlp.proj",    {{"mlp.down_proj",    d}}}};
    // clang-format on
    for (size_t i = 0; i < LAYER_PARAMETERS; i++) list_parameter(model, &rows[i], prefix, part);
}

static void list_layers(retrofit_model *model, retrofit_layer *layers, size_t count,
                        const char *group, retrofit_part part) {
    char prefix[64];
    for (size_t i = 0; i < count; i++) {
        if (retrofit_is_plain(&model->config))
            snprintf(prefix, sizeof prefix, "model.layers.%zu.", i);
        else snprintf(prefix, sizeof prefix, "transformer.%s.%zu.", group, i);
        list_layer(model, &layers[i], prefix, part);
    }
}

// A tied head is the embedding: it is not in the list, shares wte's master, and its gradient adds
// to the same matrix. Only what operations read may be a copy, since a head's type is act's.
static void tie_head(retrofit_model *model) {
    retrofit_weight weight = model->lm_head.weight;
    model->lm_head = model->wte;
    model->lm_head.kind = RETROFIT_HEAD;
    model->lm_head.part = RETROFIT_PART_HEAD;
    if (weight.data) model->lm_head.weight = weight;
}

static void list_model(retrofit_model *model) {
    const retrofit_config *c = &model->config;
    size_t d = c->n_embd, V = c->vocab;
    bool plain = retrofit_is_plain(c);
    const char *prefix = plain ? "model." : "transformer.";
    // clang-format off
    listed wte     = {&model->wte,     RETROFIT_EMBEDDING, d,     "wte",     {{"embed_tokens", V}}};
    listed adapter = {&model->adapter, RETROFIT_MATRIX,    2 * d, "adapter", {{NULL,           d}}};
    listed ln_f    = {&model->ln_f,    RETROFIT_NORM,      d,     "ln_f",    {{"norm",         1}}};
    listed lm_head = {&model->lm_head, RETROFIT_HEAD,      d,     "lm_head", {{"lm_head",      V}}};
    // clang-format on
    list_parameter(model, &wte, prefix, RETROFIT_PART_EMBEDDING);
    list_layers(model, model->prelude, c->prelude, "prelude", RETROFIT_PART_PRELUDE);
    if (!plain) list_parameter(model, &adapter, prefix, RETROFIT_PART_ADAPTER);
    list_layers(model, model->core, c->core, "core_block", RETROFIT_PART_CORE);
    list_layers(model, model->coda, c->coda, "coda", RETROFIT_PART_CODA);
    list_parameter(model, &ln_f, prefix, RETROFIT_PART_NORM);
    if (!c->tied) list_parameter(model, &lm_head, "", RETROFIT_PART_HEAD);
    else tie_head(model);
}

retrofit_model *retrofit_model_new(const retrofit_config *config, const retrofit_ops *ops) {
    if (!retrofit_config_check(config, "model")) return NULL;
    if (config->head_dim > ops->max_head_dim)
        return fail_null("heads of %zu are more than the %zu that %s takes: use the CPU",
                         config->head_dim, ops->max_head_dim, ops->name);
    retrofit_model *model = retrofit_allocate(1, sizeof *model);
    if (!model) return NULL;
    model->config = *config;
    model->ops = ops;
    size_t layers = config->prelude + config->core + config->coda;
    size_t max_parameters = LAYER_PARAMETERS * layers + 4;
    model->prelude = retrofit_allocate(config->prelude, sizeof *model->prelude);
    model->core = retrofit_allocate(config->core, sizeof *model->core);
    model->coda = retrofit_allocate(config->coda, sizeof *model->coda);
    model->parameters = retrofit_allocate(max_parameters, sizeof *model->parameters);
    if (!model->prelude || !model->core || !model->coda || !model->parameters) {
        retrofit_free(model);
        return NULL;
    }
    list_model(model);
    return model;
}

void retrofit_free(retrofit_model *model) {
    if (!model) return;
    void *arenas[] = {model->weights, model->masters, model->grads, model->moments};
    for (size_t i = 0; i < 4; i++) {
        if (arenas[i]) model->ops->free(arenas[i]);
    }
    for (size_t i = 0; i < model->map_count; i++) retrofit_safetensors_close(&model->maps[i]);
    free(model->maps);
    free(model->prelude);
    free(model->core);
    free(model->coda);
    free(model->parameters);
    free(model);
}

// ---- Where parameters lie ----------------------------------------------------------------------
//
//     arena     what it holds                    in training             in inference
//     masters   fp32 weights: the optimizer      all parameters          if the model was loaded,
//               updates them, checkpoints                                none; if it was made, as
//               are written from them                                    by convert, all
//     weights   what operations read, if that    matrices and the head   what can't stay in the
//               is not the master                where act is bf16       mapped file (section 9)
//     grads     fp32 gradients                   trained parameters      none
//     moments   m and v; Muon's scratch          trained parameters      none
//
// A frozen parameter has a master, for checkpoints, but neither a gradient nor moments.

static bool is_trained(retrofit_mode mode, retrofit_part part) {
    if (mode == RETROFIT_TRAINING_ADAPTER) return part == RETROFIT_PART_ADAPTER;
    if (mode == RETROFIT_TRAINING_CORE)
        return part == RETROFIT_PART_ADAPTER || part == RETROFIT_PART_CORE;
    return true;
}

static void freeze(retrofit_model *model, retrofit_mode mode) {
    for (size_t i = 0; i < model->parameter_count; i++) {
        retrofit_parameter *parameter = model->parameters[i];
        parameter->frozen = !is_trained(mode, parameter->part);
    }
}

static void lay_out_masters(retrofit_model *model, arena *a) {
    for (size_t i = 0; i < model->parameter_count; i++) {
        retrofit_parameter *parameter = model->parameters[i];
        parameter->master = arena_alloc(a, parameter->rows * parameter->cols, sizeof(float));
    }
    if (model->config.tied) tie_head(model);
}

static void lay_out_grads(retrofit_model *model, arena *a) {
    for (size_t i = 0; i < model->parameter_count; i++) {
        retrofit_parameter *parameter = model->parameters[i];
        if (parameter->frozen) parameter->grad = NULL;
        else parameter->grad = arena_alloc(a, parameter->rows * parameter->cols, sizeof(float));
    }
    if (model->config.tied) tie_head(model);
}

// Norms and biases are one-dimensional in files, and fp32 where operations read them.
static bool is_vector(retrofit_kind kind) {
    return kind == RETROFIT_NORM || kind == RETROFIT_BIAS;
}

// The type in which operations read a parameter.
static retrofit_type compute_type(const retrofit_model *model, retrofit_kind kind) {
    if (is_vector(kind) || kind == RETROFIT_EMBEDDING) return RETROFIT_F32;
    return model->ops->act_type;
}

// The embedding's own weight serves where it has the type in which operations read a head.
static void lay_out_tied_head(retrofit_model *model, arena *a) {
    retrofit_weight *weight = &model->lm_head.weight;
    retrofit_type type = compute_type(model, RETROFIT_HEAD);
    *weight = model->wte.weight;
    if (model->ops == &retrofit_cpu || type == weight->type) return;
    weight->type = type;
    weight->data = arena_alloc(a, model->wte.rows * model->wte.cols, retrofit_type_size(type));
}

static void lay_out_weights(retrofit_model *model, arena *a) {
    for (size_t i = 0; i < model->parameter_count; i++) {
        retrofit_parameter *parameter = model->parameters[i];
        retrofit_type type = compute_type(model, parameter->kind);
        size_t count = parameter->rows * parameter->cols;
        parameter->weight.type = type;
        if (type == RETROFIT_F32) parameter->weight.data = parameter->master;
        else parameter->weight.data = arena_alloc(a, count, retrofit_type_size(type));
    }
    if (model->config.tied) lay_out_tied_head(model, a);
}

bool retrofit_model_allocate(retrofit_model *model, retrofit_mode mode) {
    arena masters = {NULL, 0}, grads = {NULL, 0}, weights = {NULL, 0};
    freeze(model, mode);

    lay_out_masters(model, &masters);
    model->masters = arena_reserve(&masters, model->ops);
    if (!model->masters) return false;
    lay_out_masters(model, &masters);

    if (mode != RETROFIT_INFERENCE) {
        lay_out_grads(model, &grads);
        model->grad_bytes = grads.used;
        model->grads = arena_reserve(&grads, model->ops);
        if (!model->grads) return false;
        lay_out_grads(model, &grads);
    }

    lay_out_weights(model, &weights);
    if (weights.used == 0) return true; // operations read the masters
    model->weights = arena_reserve(&weights, model->ops);
    if (!model->weights) return false;
    lay_out_weights(model, &weights);
    return true;
}

static void refresh_weight(const retrofit_model *model, const retrofit_parameter *parameter) {
    if (parameter->weight.type == RETROFIT_F32) return;
    act *copy = (act *)parameter->weight.data;
    model->ops->cast(copy, parameter->master, parameter->rows * parameter->cols);
}

void retrofit_refresh_weights(retrofit_model *model) {
    if (model->ranks) model->ranks->gather_weights(model);
    for (size_t i = 0; i < model->parameter_count; i++)
        refresh_weight(model, model->parameters[i]);
    if (model->config.tied) refresh_weight(model, &model->lm_head);
}

// Every trained parameter has a first moment m, and with AdamW and AdamW* a second one, v. Those
// that Muon updates share scratch instead: u, x and y are as large as the largest matrix; a and b
// hold products of x with itself, which are square, and as wide as a matrix's shorter side.
static void lay_out_moments(retrofit_model *model, arena *a, retrofit_optimizer_kind kind) {
    size_t size = retrofit_type_size(model->ops->act_type), max_count = 0, max_side = 0;
    size_t rank = model->ranks ? model->ranks->rank : 0;
    if (model->ranks) model->ranks->deal(model, kind);
    for (size_t i = 0; i < model->parameter_count; i++) {
        retrofit_parameter *parameter = model->parameters[i];
        size_t rows = parameter->rows, cols = parameter->cols;
        if (parameter->frozen || parameter->owner != rank) continue;
        parameter->m = arena_alloc(a, rows * cols, sizeof(float));
        if (retrofit_by_muon(parameter, kind)) {
            parameter->v = NULL;
            max_count = retrofit_max(max_count, rows * cols);
            max_side = retrofit_max(max_side, retrofit_min(rows, cols));
        } else parameter->v = arena_alloc(a, rows * cols, sizeof(float));
    }
    model->sum = arena_alloc(a, 1, sizeof(double));
    model->muon_u = arena_alloc(a, max_count, sizeof(float));
    model->muon_x = arena_alloc(a, max_count, size);
    model->muon_y = arena_alloc(a, max_count, size);
    model->muon_a = arena_alloc(a, max_side * max_side, size);
    model->muon_b = arena_alloc(a, max_side * max_side, size);
}

bool retrofit_optimizer_init(retrofit_model *model, retrofit_optimizer_kind kind) {
    arena a = {NULL, 0};
    lay_out_moments(model, &a, kind);
    model->moment_bytes = a.used;
    model->moments = arena_reserve(&a, model->ops);
    if (!model->moments) return false;
    lay_out_moments(model, &a, kind);
    return true;
}

// Measures all arenas and allocates none.
void retrofit_training_bytes(retrofit_model *model, retrofit_mode mode,
                             retrofit_optimizer_kind kind, size_t *weights, size_t *gradients,
                             size_t *moments) {
    arena for_weights = {NULL, 0}, for_gradients = {NULL, 0}, for_moments = {NULL, 0};
    freeze(model, mode);
    lay_out_masters(model, &for_weights);
    lay_out_weights(model, &for_weights);
    lay_out_grads(model, &for_gradients);
    lay_out_moments(model, &for_moments, kind);
    *weights = for_weights.used;
    *gradients = for_gradients.used;
    *moments = for_moments.used;
}

// ---- Several processes -------------------------------------------------------------------------
static bool is_own(retrofit_model *model, const retrofit_training *training, size_t j) {
    return !model->ranks || model->ranks->is_own(model, training, j);
}

static void gradients_done(retrofit_model *model, retrofit_part part) {
    if (model->ranks) model->ranks->gradients_done(model, part);
}

static bool sum_over_ranks(retrofit_model *model, double *loss) {
    return !model->ranks || model->ranks->sum(model, loss);
}

// What launchers say: rank, number of ranks, and the same on this machine. Where mpirun was started
// in a job of Slurm, both do. (A job's script has SLURM_PROCID too, and is one task.)
void retrofit_ranks_find(retrofit_ranks *ranks) {
    static const char *const names[][4] = {
        {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
         "OMPI_COMM_WORLD_LOCAL_SIZE"},
        {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"},
        {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"},
        {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
    };
    *ranks = (retrofit_ranks){.count = 1, .local_count = 1, .patience = 1800};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        size_t said[4];
        for (size_t j = 0; j < 4; j++) {
            const char *value = getenv(names[i][j]);
            said[j] = value ? strtoul(value, NULL, 10) : 0;
        }
        if (said[1] < 2 || said[0] >= said[1]) continue;
        ranks->rank = said[0];
        ranks->count = said[1];
        ranks->local = said[2];
        ranks->local_count = retrofit_max(said[3], 1);
        return;
    }
}

// ---- RoPE's table ------------------------------------------------------------------------------
// As in HF: pair i = 0 … h/2 - 1 of a head at position p turns by the angle p·ω_i, with
//
//     ω_i = θ^(-2i/h)
//
// Linear scaling makes all pairs `factor` times slower. Llama 3 was first trained on a shorter
// context, the original one. What counts is how many turns a pair makes there: with more than
// `high` it keeps its ω_i, with fewer than `low` it becomes `factor` times slower, and in between
// lies a ramp:
//
//     turns_i = original_context·ω_i / 2π
//     keep_i  = (turns_i - low) / (high - low), cut to [0, 1]
//     ω_i    ←  ω_i·(keep_i + (1 - keep_i)/factor)
static float rope_frequency(const retrofit_config *c, size_t i) {
    float frequency = 1.0f / powf((float)c->rope_theta, (float)(2 * i) / (float)c->head_dim);
    if (!c->rope_llama3) return c->rope_factor > 0 ? frequency / (float)c->rope_factor : frequency;
    double wavelength = 2 * 3.14159265358979323846 / (double)frequency; // in positions
    double turns = c->rope_original_context / wavelength;
    double keep = fmin(1, fmax(0, (turns - c->rope_low) / (c->rope_high - c->rope_low)));
    return (float)((double)frequency * (keep + (1 - keep) / c->rope_factor));
}

// table: (positions, h/2, {cos, sin}).
static void rope_table(float *table, const retrofit_config *c, size_t positions) {
    size_t pairs = c->head_dim / 2;
    for (size_t i = 0; i < pairs; i++) {
        float frequency = rope_frequency(c, i);
        for (size_t p = 0; p < positions; p++) {
            float angle = (float)p * frequency;
            float *pair = table + (p * pairs + i) * 2;
            pair[0] = cosf(angle);
            pair[1] = sinf(angle);
        }
    }
}

// Rows of logits exist in chunks of about this many bytes, in whole tiles of a matrix product;
// those in fp32, for the host, WIDE_ROWS at a time.
enum { LOGITS_BYTES = 1 << 26, LOGITS_TILE = 128, WIDE_ROWS = 256 };

void retrofit_zero_grad(retrofit_model *model) {
    model->ops->zero(model->grads, model->grad_bytes);
}

// Element i of an array of `act`.
static act *act_at(const retrofit_ops *ops, act *p, size_t i) {
    return (char *)p + i * retrofit_type_size(ops->act_type);
}

// ---- What a caller gives and gets --------------------------------------------------------------

static void set_shape(retrofit_buffers *buffers, size_t b, size_t t) {
    buffers->b = b;
    buffers->t = t;
    buffers->N = b * t;
    buffers->n = 0;
    buffers->k = 0;
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
    set_shape(buffers, b, t);
    model->ops->upload(buffers->tokens, tokens, buffers->N * sizeof *tokens);
    return true;
}

size_t retrofit_count_labels(const int32_t *labels, size_t n) {
    size_t counted = 0;
    for (size_t i = 0; i < n; i++) counted += labels[i] != RETROFIT_IGNORED;
    return counted;
}

// How many labels count. false or error if one is not below V.
static bool count_labels(const retrofit_buffers *buffers, const int32_t *labels, size_t *counted) {
    size_t V = buffers->model->config.vocab;
    for (size_t i = 0; i < buffers->N; i++) {
        if (labels[i] == RETROFIT_IGNORED || (labels[i] >= 0 && (size_t)labels[i] < V)) continue;
        return retrofit_fail("label %zu is %d, but the vocabulary has %zu entries", i,
                             (int)labels[i], V);
    }
    *counted = retrofit_count_labels(labels, buffers->N);
    return true;
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

// Rows of a micro-batch, counted from 0 over the whole training, to the host.
static bool read_micro_batch(retrofit_buffers *buffers, retrofit_data *data, uint64_t index) {
    size_t T = buffers->T;
    for (size_t i = 0; i < buffers->B; i++) {
        int32_t *tokens = buffers->host_tokens + i * T;
        int32_t *labels = buffers->host_labels + i * T;
        if (!retrofit_data_row(data, index * buffers->B + i, tokens, labels)) return false;
    }
    return true;
}

size_t retrofit_state_rms(const retrofit_buffers *buffers, double *rms) {
    const retrofit_model *model = buffers->model;
    size_t count = buffers->N * model->config.n_embd;
    if (retrofit_is_plain(&model->config)) return 0;
    for (size_t j = 0; j <= buffers->k; j++)
        rms[j] = sqrt(retrofit_sum_squares(model, saved_state(buffers, j), count) / (double)count);
    return buffers->k + 1;
}

// ---- Buffers: one arena for each retrofit_buffers ----------------------------------------------
// What is never needed at the same time shares memory:
//
//     buffers            shares with         because
//     final              norm                the head reads it before a block computes a norm again
//     wide_logits        logits              one is for the host, the other for the loss
//     dinjected          injected            the forward pass is over when its gradient begins
//     dfinal             dinner              the head's gradient is used up before any block's
//     dattention         scratch.attention   with RETROFIT_KEEP_ALL no block uses the scratch; with
//     dqkv               scratch.qkv         KEEP_INPUTS blocks are computed again in it, so these
//     dgate_up           scratch.gate_up     three have memory of their own
//     block.mid, .out    x, or state         with KEEP_NOTHING: blocks run in place on their input
//     all of a block     scratch             with KEEP_INPUTS, but for its out

static void lay_out_block(retrofit_block *block, arena *a, const retrofit_config *c, size_t N,
                          size_t size, retrofit_keep keep) {
    size_t H = c->n_heads, G = c->n_kv_heads;
    block->rstd_1 = arena_alloc(a, N, sizeof(float));
    block->rstd_2 = arena_alloc(a, N, sizeof(float));
    block->qkv = arena_alloc(a, N * retrofit_qkv_width(c), size);
    block->attention = arena_alloc(a, N * c->n_embd, size);
    block->lse = arena_alloc(a, N * H, sizeof(float));
    block->gate_up = arena_alloc(a, N * 2 * c->intermediate, size);
    if (c->post_norm) {
        block->projected_1 = arena_alloc(a, N * c->n_embd, sizeof(float));
        block->projected_2 = block->projected_1;
        if (keep) block->projected_2 = arena_alloc(a, N * c->n_embd, sizeof(float));
    }
    if (c->qk_norm && keep) {
        block->qk = arena_alloc(a, N * (H + G) * c->head_dim, size);
        block->rstd_qk = arena_alloc(a, N * (H + G), sizeof(float));
    }
}

static void lay_out_saved_blocks(retrofit_buffers *buffers, retrofit_block *blocks, size_t count,
                                 arena *a, const retrofit_config *c, size_t size) {
    size_t N = buffers->B * buffers->T;
    for (size_t i = 0; i < count; i++) {
        if (buffers->keep == RETROFIT_KEEP_INPUTS) blocks[i] = buffers->scratch;
        else {
            lay_out_block(&blocks[i], a, c, N, size, buffers->keep);
            blocks[i].mid = arena_alloc(a, N * c->n_embd, sizeof(float));
        }
        blocks[i].out = arena_alloc(a, N * c->n_embd, sizeof(float));
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
        saved->adapted[i] = arena_alloc(a, N * c->n_embd, sizeof(float));
}

static void lay_out_gradients(retrofit_buffers *buffers, arena *a, const retrofit_config *c,
                              size_t size) {
    size_t N = buffers->B * buffers->T, d = c->n_embd;
    retrofit_gradients *g = &buffers->gradients;
    g->dx = arena_alloc(a, N * d, sizeof(float));
    g->delta = arena_alloc(a, N * c->n_heads, sizeof(float));
    g->dbranch = arena_alloc(a, N * d, size);
    g->dinner = arena_alloc(a, N * d, size);
    g->dswiglu = arena_alloc(a, N * c->intermediate, size);
    if (c->post_norm) g->dstream = arena_alloc(a, N * d, sizeof(float));
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
    decoder->reached = arena_alloc(a, B, sizeof(int32_t));
    decoder->carried = arena_alloc(a, B * d, sizeof(float));
    decoder->drafted = arena_alloc(a, 2 * RETROFIT_UNDER_WAY * d, sizeof(float));
    decoder->lanes = arena_alloc(a, RETROFIT_UNDER_WAY, sizeof(int32_t));
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
    size_t wide_rows = retrofit_max(retrofit_min(buffers->chunk, WIDE_ROWS), buffers->B);
    size_t row_bytes = retrofit_max(buffers->chunk * size, wide_rows * sizeof(float));
    buffers->logits = arena_alloc(a, row_bytes, V);
    buffers->wide_logits = buffers->logits;
}

// Twice: with a.base NULL to measure, then to hand out the memory.
static void lay_out_buffers(retrofit_buffers *buffers, arena *a, const retrofit_config *c,
                            retrofit_type type) {
    size_t N = buffers->B * buffers->T, d = c->n_embd, size = retrofit_type_size(type);
    buffers->tokens = arena_alloc(a, N, sizeof(int32_t));
    buffers->labels = arena_alloc(a, N, sizeof(int32_t));
    buffers->past = arena_alloc(a, retrofit_max(buffers->B, RETROFIT_UNDER_WAY), sizeof(int32_t));
    buffers->rope = arena_alloc(a, rope_positions(buffers) * c->head_dim, sizeof(float));
    buffers->embedded = arena_alloc(a, N * d, sizeof(float));
    buffers->state = arena_alloc(a, N * d, sizeof(float));
    buffers->injected = arena_alloc(a, N * d, sizeof(float));
    if (!buffers->keep) buffers->x = arena_alloc(a, N * d, sizeof(float));
    lay_out_block(&buffers->scratch, a, c, N, size, buffers->keep);
    if (buffers->keep == RETROFIT_KEEP_INPUTS)
        buffers->scratch.mid = arena_alloc(a, N * d, sizeof(float));
    if (buffers->keep) lay_out_saved(buffers, a, c, size);
    buffers->rstd_f = arena_alloc(a, N, sizeof(float));
    buffers->losses = arena_alloc(a, N, sizeof(float));
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
    decoder->seen = retrofit_allocate(B, sizeof(int32_t));
    decoder->used = retrofit_allocate(B, sizeof(int32_t));
    decoder->next = retrofit_allocate(B * V, sizeof(float));
    decoder->measure = retrofit_allocate(B * V, sizeof(double));
    decoder->latent = retrofit_allocate(2 * B * d, sizeof(float));
    return decoder->seen && decoder->used && decoder->next && decoder->measure && decoder->latent;
}

static bool allocate_saved(retrofit_saved *saved, const retrofit_config *c, size_t K) {
    saved->prelude = retrofit_allocate(c->prelude, sizeof(retrofit_block));
    saved->core = retrofit_allocate(K * c->core, sizeof(retrofit_block));
    saved->coda = retrofit_allocate(c->coda, sizeof(retrofit_block));
    saved->adapted = retrofit_allocate(K, sizeof(float *));
    return saved->prelude && saved->core && saved->coda && saved->adapted;
}

static bool allocate_on_host(retrofit_buffers *buffers, const retrofit_config *c) {
    size_t N = buffers->B * buffers->T;
    if (!allocate_saved(&buffers->saved, c, buffers->K)) return false;
    buffers->host_tokens = retrofit_allocate(N, sizeof(int32_t));
    buffers->host_labels = retrofit_allocate(N, sizeof(int32_t));
    buffers->host_losses = retrofit_allocate(N, sizeof(float));
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
    retrofit_buffers buffers = {.B = B, .T = T, .K = keep && config->core ? K : 0, .keep = keep};
    arena a = {NULL, SIZE_MAX};
    retrofit_fail("%zu x %zu tokens are more than memory can hold", B, T); // if not, nobody asks
    if (!batch_possible(B, T, K, 0)) return SIZE_MAX;
    if (allocate_saved(&buffers.saved, config, buffers.K)) {
        a.used = 0;
        lay_out_buffers(&buffers, &a, config, ops->act_type);
    }
    free_on_host(&buffers);
    return a.used;
}

static bool check_buffers(const retrofit_model *model, size_t B, size_t T, size_t K,
                          const retrofit_kv_cache *cache) {
    size_t capacity = cache ? cache->capacity : 0, recurrences = cache ? cache->recurrences : 0;
    size_t positions = retrofit_max(T, capacity);
    if (T == 0 || !batch_possible(B, positions, K, recurrences))
        return retrofit_fail("a batch of %zu x %zu tokens (depth %zu, %zu recurrences) "
                             "is impossible",
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
    float *table = retrofit_allocate(count, sizeof *table);
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
    buffers->arena = arena_reserve(&a, model->ops);
    if (!buffers->arena) return false;
    lay_out_buffers(buffers, &a, c, model->ops->act_type);
    return upload_rope(buffers);
}

retrofit_buffers *retrofit_buffers_new(const retrofit_model *model, size_t B, size_t T, size_t K,
                                       retrofit_keep keep, const retrofit_kv_cache *cache) {
    const retrofit_config *c = &model->config;
    if (cache && cache->capacity == 0) cache = NULL;
    if (!check_buffers(model, B, T, K, cache)) return NULL;
    retrofit_buffers *buffers = retrofit_allocate(1, sizeof *buffers);
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

// ---- safetensors: reading ----------------------------------------------------------------------
// A file of tensors, little endian:
//
//     8 bytes    the length of the header
//     header     JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, …}
//     data       the elements of all tensors; the offsets count from the start of the data
//
// We map files into memory and use tensors where they lie, so everything is checked before.

// Types in a file: first those that we read, in the order of retrofit_type. Tensors of the others
// are checked, too, but are not listed; if a model needs one, it is refused by name.
static const struct {
    const char *name;
    size_t size;
} file_types[] = {{"F32", 4}, {"BF16", 2}, {"F16", 2}, {"I32", 4}, {"F64", 8}, // ours
                  {"I64", 8}, {"U64", 8},  {"U32", 4}, {"I16", 2}, {"U16", 2},
                  {"I8", 1},  {"U8", 1},   {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
enum { FILE_TYPES = sizeof file_types / sizeof *file_types };

typedef struct {
    size_t begin, end; // bytes, from the start of the data
} byte_range;

static int by_begin(const void *a, const void *b) {
    const byte_range *x = a, *y = b;
    return x->begin < y->begin ? -1 : x->begin > y->begin;
}

// false if one of the sizes is none, or if their product overflows.
static bool read_tensor_shape(retrofit_tensor *tensor, const retrofit_json *shape) {
    tensor->count = 1;
    for (const retrofit_json *size = shape->child; size; size = size->next) {
        size_t n = 0;
        if (!retrofit_json_size(size, &n)) return false;
        if (__builtin_mul_overflow(tensor->count, n, &tensor->count)) return false;
        if (tensor->dims < 4) tensor->shape[tensor->dims] = n;
        tensor->dims++;
    }
    return true;
}

// Reads the shape. What is wrong with the tensor, or NULL.
static const char *tensor_problem(retrofit_tensor *tensor, size_t type, const retrofit_json *shape,
                                  byte_range range, size_t data_bytes) {
    size_t bytes;
    if (type == FILE_TYPES) return "unknown dtype";
    bool is_shape = read_tensor_shape(tensor, shape) && (type > RETROFIT_F64 || tensor->dims <= 4);
    if (!is_shape || __builtin_mul_overflow(tensor->count, file_types[type].size, &bytes))
        return "the shape is not at most 4 sizes, or too large";
    if (range.begin > range.end || range.end > data_bytes)
        return "it lies outside the data: truncated?";
    if (bytes != range.end - range.begin) return "its shape needs another number of bytes";
    if (range.begin % file_types[type].size > 0) return "it is not aligned to its dtype";
    return NULL;
}

// Checks one entry of the header and lists its tensor. false or error.
static bool read_tensor_entry(retrofit_map *map, const retrofit_json *entry, const char *data,
                              size_t data_bytes, byte_range *range) {
    const retrofit_json *dtype = retrofit_json_get(entry, "dtype");
    const retrofit_json *shape = retrofit_json_get(entry, "shape");
    const retrofit_json *offsets = retrofit_json_get(entry, "data_offsets");
    bool complete = dtype && dtype->type == RETROFIT_JSON_STRING && shape &&
                    shape->type == RETROFIT_JSON_ARRAY && offsets && offsets->count == 2 &&
                    retrofit_json_size(offsets->child, &range->begin) &&
                    retrofit_json_size(offsets->child->next, &range->end);
    if (!complete)
        return retrofit_fail("%s: tensor %s: needs dtype, shape and two data_offsets", map->path,
                             entry->key);

    size_t type = 0;
    while (type < FILE_TYPES && strcmp(file_types[type].name, dtype->string)) type++;
    retrofit_tensor tensor = {.name = entry->key, .type = (retrofit_type)type};
    const char *problem = tensor_problem(&tensor, type, shape, *range, data_bytes);
    if (problem)
        return retrofit_fail("%s: tensor %s: %s, bytes %zu to %zu of %zu: %s", map->path,
                             entry->key, dtype->string, range->begin, range->end, data_bytes,
                             problem);
    tensor.data = data + range->begin;
    if (type <= RETROFIT_F64) map->tensors[map->count++] = tensor;
    return true;
}

// In the order of the file every tensor must begin where the one before it ends, and the last one
// must end with the file.
static bool check_tensor_ranges(const retrofit_map *map, byte_range *ranges, size_t count,
                                size_t data_bytes) {
    size_t covered = 0, i = 0;
    qsort(ranges, count, sizeof *ranges, by_begin);
    for (; i < count && ranges[i].begin == covered; i++) covered = ranges[i].end;
    if (i == count && covered == data_bytes) return true;
    return retrofit_fail("%s: tensors overlap or leave a hole at byte %zu of %zu", map->path,
                         covered, data_bytes);
}

// Maps the file and parses its header, which ends where the data start.
static bool read_tensor_header(retrofit_map *map, size_t *data_start) {
    uint64_t length = 0;
    map->base = retrofit_map_file(map->path, &map->bytes);
    if (!map->base) return false;
    if (map->bytes >= 8) memcpy(&length, map->base, 8);
    if (map->bytes < 8 || length < 2 || length > map->bytes - 8 || length > 100000000)
        return retrofit_fail("%s: not a safetensors file, or truncated: %zu bytes, header of %llu",
                             map->path, map->bytes, (unsigned long long)length);
    map->header = retrofit_json_parse((const char *)map->base + 8, length, map->path);
    if (!map->header) return false;
    if (map->header->type != RETROFIT_JSON_OBJECT)
        return retrofit_fail("%s: the header is not a JSON object", map->path);
    *data_start = 8 + length;
    return true;
}

static int by_tensor_name(const void *a, const void *b) {
    const retrofit_tensor *const *x = a;
    const retrofit_tensor *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

static bool read_tensor_entries(retrofit_map *map, size_t data_start) {
    const char *data = (const char *)map->base + data_start;
    size_t data_bytes = map->bytes - data_start, count = 0;
    map->tensors = retrofit_allocate(map->header->count, sizeof *map->tensors);
    map->by_name = retrofit_allocate(map->header->count, sizeof *map->by_name);
    byte_range *ranges = retrofit_allocate(map->header->count, sizeof *ranges);
    bool ok = map->tensors && map->by_name && ranges;
    for (const retrofit_json *entry = map->header->child; ok && entry; entry = entry->next) {
        if (!strcmp(entry->key, "__metadata__")) continue;
        ok = read_tensor_entry(map, entry, data, data_bytes, &ranges[count]);
        if (ranges[count].begin != ranges[count].end) count++; // an empty tensor may lie anywhere
    }
    ok = ok && check_tensor_ranges(map, ranges, count, data_bytes);
    free(ranges);
    if (!ok) return false;
    for (size_t i = 0; i < map->count; i++) map->by_name[i] = &map->tensors[i];
    qsort(map->by_name, map->count, sizeof *map->by_name, by_tensor_name);
    return true;
}

bool retrofit_safetensors_open(retrofit_map *map, const char *path) {
    size_t data_start = 0;
    memset(map, 0, sizeof *map);
    map->path = retrofit_copy_string(path);
    if (!map->path) return false;
    if (read_tensor_header(map, &data_start) && read_tensor_entries(map, data_start)) return true;
    retrofit_safetensors_close(map);
    return false;
}

void retrofit_safetensors_close(retrofit_map *map) {
    if (map->base) munmap(map->base, map->bytes);
    retrofit_json_free(map->header);
    free(map->tensors);
    free(map->by_name);
    free(map->path);
    memset(map, 0, sizeof *map);
}

const retrofit_tensor *retrofit_safetensors_find(const retrofit_map *map, const char *name) {
    const retrofit_tensor wanted = {.name = name}, *key = &wanted;
    const retrofit_tensor **found =
        bsearch(&key, map->by_name, map->count, sizeof *map->by_name, by_tensor_name);
    return found ? *found : NULL;
}

const char *retrofit_safetensors_metadata(const retrofit_map *map, const char *key) {
    const retrofit_json *metadata = retrofit_json_get(map->header, "__metadata__");
    const retrofit_json *value = retrofit_json_get(metadata, key);
    return value && value->type == RETROFIT_JSON_STRING ? value->string : NULL;
}

// ---- safetensors: writing ----------------------------------------------------------------------

// Elements on their way between a file and a device.
enum { CONVERSION_CHUNK = 1 << 18 };
typedef struct {
    float raw[CONVERSION_CHUNK]; // memory for elements of any type, as the device has them
    float fp32[CONVERSION_CHUNK];
    uint16_t bf16[CONVERSION_CHUNK];
} conversion;

// n elements, at most a chunk, in type `to`: `data` itself if they have it, else part of `scratch`.
static const void *convert_chunk(const void *data, retrofit_type from, retrofit_type to, size_t n,
                                 conversion *scratch) {
    if (from == to) return data;
    retrofit_to_float(scratch->fp32, data, from, n);
    if (to == RETROFIT_F32) return scratch->fp32;
    for (size_t i = 0; i < n; i++) scratch->bf16[i] = retrofit_float_to_bf16(scratch->fp32[i]);
    return scratch->bf16;
}

static retrofit_type stored_type(const retrofit_tensor *tensor, retrofit_type floats) {
    return tensor->type == RETROFIT_I32 ? RETROFIT_I32 : floats;
}

static void write_json_key(FILE *file, const char *key) {
    retrofit_json_write_string(file, key, strlen(key));
    fputc(':', file);
}

static void write_tensor_metadata(FILE *file, const char *const *metadata) {
    write_json_key(file, "__metadata__");
    fprintf(file, "{\"format\":\"pt\"");
    for (size_t i = 0; metadata && metadata[i]; i += 2) {
        fputc(',', file);
        write_json_key(file, metadata[i]);
        retrofit_json_write_string(file, metadata[i + 1], strlen(metadata[i + 1]));
    }
    fputc('}', file);
}

// The length in front is written again once it is known. Spaces let the data start at a multiple of
// 64, so that tensors can be used where they lie.
static bool write_tensor_header(FILE *file, const retrofit_tensor *tensors, size_t count,
                                retrofit_type type, const char *const *metadata) {
    uint64_t length = 0;
    size_t offset = 0;
    fwrite(&length, 8, 1, file);
    fputc('{', file);
    write_tensor_metadata(file, metadata);
    for (size_t i = 0; i < count; i++) {
        const retrofit_tensor *tensor = &tensors[i];
        retrofit_type stored = stored_type(tensor, type);
        size_t end = offset + tensor->count * retrofit_type_size(stored);
        fputc(',', file);
        write_json_key(file, tensor->name);
        fprintf(file, "{\"dtype\":\"%s\",\"shape\":[", file_types[stored].name);
        for (size_t j = 0; j < tensor->dims; j++)
            fprintf(file, "%s%zu", j ? "," : "", tensor->shape[j]);
        fprintf(file, "],\"data_offsets\":[%zu,%zu]}", offset, end);
        offset = end;
    }
    fputc('}', file);

    long data_start = ftell(file);
    if (data_start < 0) return false;
    for (; data_start % 64; data_start++) fputc(' ', file);
    length = (uint64_t)data_start - 8;
    return !fseek(file, 0, SEEK_SET) && fwrite(&length, 8, 1, file) == 1 &&
           !fseek(file, data_start, SEEK_SET);
}

static bool write_tensor(FILE *file, const retrofit_ops *ops, const retrofit_tensor *tensor,
                         retrofit_type stored, conversion *scratch) {
    size_t size = retrofit_type_size(tensor->type), stored_size = retrofit_type_size(stored);
    for (size_t i = 0; i < tensor->count; i += CONVERSION_CHUNK) {
        size_t n = retrofit_min(tensor->count - i, CONVERSION_CHUNK);
        ops->download(scratch->raw, (const char *)tensor->data + i * size, n * size);
        const void *out = convert_chunk(scratch->raw, tensor->type, stored, n, scratch);
        if (fwrite(out, stored_size, n, file) != n) return false;
    }
    return true;
}

// Most calls' failures show only in ferror, which retrofit_finish_file looks at.
bool retrofit_safetensors_write(const char *path, const retrofit_ops *ops,
                                const retrofit_tensor *tensors, size_t count, retrofit_type type,
                                const char *const *metadata) {
    conversion *scratch = retrofit_allocate(1, sizeof *scratch);
    if (!scratch) return false;
    FILE *file = fopen(path, "wb");
    if (!file) {
        retrofit_fail("%s: %s", path, strerror(errno));
        free(scratch);
        return false;
    }
    bool ok = write_tensor_header(file, tensors, count, type, metadata);
    size_t done = 0, all = 0;
    for (size_t i = 0; i < count; i++) all += tensors[i].count;
    for (size_t i = 0; ok && i < count; i++) {
        ok = write_tensor(file, ops, &tensors[i], stored_type(&tensors[i], type), scratch);
        done += tensors[i].count;
        retrofit_show_share(done, all, "%s written", path);
    }
    free(scratch);
    return retrofit_finish_file(file, path, ok);
}

// ---- config.json: checking and reading ---------------------------------------------------------

// The limits are so small that no product of sizes overflows.
static bool check_config_sizes(const retrofit_config *c, const char *where) {
    const struct {
        const char *name;
        size_t value, max;
    } sizes[] = {{"the width (n_embd, hidden_size)", c->n_embd, 1 << 20},
                 {"the number of heads", c->n_heads, 1 << 16},
                 {"the number of key/value heads", c->n_kv_heads, 1 << 16},
                 {"intermediate_size", c->intermediate, 1 << 22},
                 {"the vocabulary", c->vocab, 1 << 24},
                 {"the context (max_position_embeddings)", c->context, 1 << 24},
                 {"the number of layers", c->prelude + c->core + c->coda, 4096}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        if (sizes[i].value == 0 || sizes[i].value > sizes[i].max)
            return retrofit_fail("%s: %s is %zu, not between 1 and %zu", where, sizes[i].name,
                                 sizes[i].value, sizes[i].max);
    }
    if (c->core == 0 && c->prelude > 0)
        return retrofit_fail("%s: a prelude without a recurrent core", where);
    return true;
}

static bool check_config_heads(const retrofit_config *c, const char *where) {
    if (c->n_embd != c->n_heads * c->head_dim)
        return retrofit_fail("%s: %zu heads of %zu do not make a width of %zu", where, c->n_heads,
                             c->head_dim, c->n_embd);
    if (c->n_heads % c->n_kv_heads)
        return retrofit_fail("%s: %zu heads cannot share %zu key/value heads", where, c->n_heads,
                             c->n_kv_heads);
    if (c->head_dim % 2)
        return retrofit_fail("%s: a head size of %zu is odd: RoPE needs pairs", where, c->head_dim);
    return true;
}

// Every comparison is false for a NaN, so a NaN is refused as well.
static bool check_config_numbers(const retrofit_config *c, const char *where) {
    if (!(c->norm_eps > 0 && c->norm_eps < 1))
        return retrofit_fail("%s: norm eps %g is not between 0 and 1", where, (double)c->norm_eps);
    if (!(c->rope_theta > 1 && c->rope_theta < 1e12))
        return retrofit_fail("%s: rope_theta %g is not between 1 and 1e12", where, c->rope_theta);
    bool llama3 = c->rope_factor >= 1 && c->rope_low > 0 && c->rope_high > c->rope_low &&
                  c->rope_original_context > 0;
    bool linear = c->rope_factor == 0 || (c->rope_factor >= 1 && c->rope_factor < 1e6);
    if (c->rope_llama3 ? !llama3 : !linear)
        return retrofit_fail("%s: rope_scaling's numbers make no sense", where);
    if (!(c->state_std >= 0 && c->state_std < 100))
        return retrofit_fail("%s: init_values.std %g is not between 0 and 100", where,
                             (double)c->state_std);
    size_t R = c->mean_recurrence, K = c->backprop_depth;
    if (R == 0 || R > 1 << 16 || K == 0 || K > 1 << 16)
        return retrofit_fail(
            "%s: mean_recurrence and mean_backprop_depth must be between 1 and 65536", where);
    if (c->trained_seq_len > 1 << 24)
        return retrofit_fail("%s: trained_seq_len is %zu, above %d", where, c->trained_seq_len,
                             1 << 24);
    return true;
}

// The families of plain models, which differ in their blocks: section 2 says how.
typedef struct {
    const char *type, *class;  // as config.json calls them
    bool post_norm, qkv_bias;
    retrofit_qk_norm qk_norm;
    double norm_eps;           // without rms_norm_eps
} model_family;
enum { FAMILY_LLAMA, FAMILY_QWEN2, FAMILY_QWEN3, FAMILY_OLMO2, MODEL_FAMILIES };
static const model_family model_families[MODEL_FAMILIES] = {
    [FAMILY_LLAMA] = {"llama", "LlamaForCausalLM", false, false, RETROFIT_QK_NORM_NONE, 1e-6},
    [FAMILY_QWEN2] = {"qwen2", "Qwen2ForCausalLM", false, true, RETROFIT_QK_NORM_NONE, 1e-6},
    [FAMILY_QWEN3] = {"qwen3", "Qwen3ForCausalLM", false, false, RETROFIT_QK_NORM_HEAD, 1e-6},
    [FAMILY_OLMO2] = {"olmo2", "Olmo2ForCausalLM", true, false, RETROFIT_QK_NORM_FULL, 1e-5},
};

// Of that model_type, or NULL: it is recurrent, or not supported.
static const model_family *find_family(const retrofit_json *type) {
    for (size_t i = 0; i < MODEL_FAMILIES; i++)
        if (retrofit_json_is(type, model_families[i].type)) return &model_families[i];
    return NULL;
}

// The family whose blocks a model has; NULL if it mixes those of several.
static const model_family *family_of(const retrofit_config *c) {
    for (size_t i = 0; i < MODEL_FAMILIES; i++) {
        const model_family *family = &model_families[i];
        if (family->post_norm == c->post_norm && family->qkv_bias == c->qkv_bias &&
            family->qk_norm == c->qk_norm)
            return family;
    }
    return NULL;
}

bool retrofit_config_check(const retrofit_config *config, const char *where) {
    if (retrofit_is_plain(config) && !family_of(config))
        return retrofit_fail("%s: these blocks are of no family", where);
    return check_config_sizes(config, where) && check_config_heads(config, where) &&
           check_config_numbers(config, where);
}

// The sizes of a config, as a plain Llama and as the authors call them. NULL: it has no such size.
static const struct {
    const char *plain, *recurrent;
    size_t offset; // of the field in retrofit_config
    bool required;
} config_sizes[] = {
    {"hidden_size", "n_embd", offsetof(retrofit_config, n_embd), true},
    {"num_attention_heads", "n_heads", offsetof(retrofit_config, n_heads), true},
    {"num_key_value_heads", "num_key_value_heads", offsetof(retrofit_config, n_kv_heads), false},
    {"intermediate_size", "intermediate_size", offsetof(retrofit_config, intermediate), true},
    {"vocab_size", "padded_vocab_size", offsetof(retrofit_config, vocab), false},
    {"max_position_embeddings", "max_position_embeddings", offsetof(retrofit_config, context),
     false},
    {NULL, "n_layers_in_prelude", offsetof(retrofit_config, prelude), true},
    {NULL, "n_layers_in_recurrent_block", offsetof(retrofit_config, core), true},
    {"num_hidden_layers", "n_layers_in_coda", offsetof(retrofit_config, coda), true},
    {NULL, "mean_recurrence", offsetof(retrofit_config, mean_recurrence), false},
    {NULL, "mean_backprop_depth", offsetof(retrofit_config, backprop_depth), false},
    {"trained_seq_len", "trained_seq_len", offsetof(retrofit_config, trained_seq_len), false}};
enum { CONFIG_SIZES = sizeof config_sizes / sizeof *config_sizes };

static const char *config_size_key(size_t i, bool plain) {
    return plain ? config_sizes[i].plain : config_sizes[i].recurrent;
}

// Whether two strings, or two numbers, are equal; b may be NULL.
static bool same_scalar(const retrofit_json *a, const retrofit_json *b) {
    if (!b || a->type != b->type) return false;
    if (a->type == RETROFIT_JSON_STRING) return !strcmp(a->string, b->string);
    return a->number == b->number;
}

// A number that transformers and the authors call by different names.
static bool check_both_names(const retrofit_json *json, const char *plain, const char *recurrent,
                             const char *where) {
    const retrofit_json *a = retrofit_json_get(json, plain);
    const retrofit_json *b = retrofit_json_get(json, recurrent);
    if (!a || !b || same_scalar(a, b)) return true;
    return retrofit_fail("%s: %s and %s are different: remove the one that is wrong", where, plain,
                         recurrent);
}

static bool read_config_sizes(retrofit_config *c, const retrofit_json *json, bool plain,
                              const char *where) {
    for (size_t i = 0; i < CONFIG_SIZES; i++) {
        const char *key = config_size_key(i, plain);
        const retrofit_json *size = key ? retrofit_json_get(json, key) : NULL;
        bool given = size && size->type != RETROFIT_JSON_NULL;
        if (!key || (!given && !config_sizes[i].required)) continue;
        size_t *field = (void *)((char *)c + config_sizes[i].offset);
        if (!retrofit_json_size(size, field))
            return retrofit_fail("%s: %s is missing or not a size", where, key);
    }
    if (!check_both_names(json, "hidden_size", "n_embd", where)) return false;
    if (!check_both_names(json, "num_attention_heads", "n_heads", where)) return false;
    if (!check_both_names(json, "rms_norm_eps", "norm_eps", where)) return false;
    const retrofit_json *groups = retrofit_json_get(json, "num_key_value_heads");
    if (!groups || groups->type == RETROFIT_JSON_NULL) c->n_kv_heads = c->n_heads;
    const retrofit_json *vocab = retrofit_json_get(json, "vocab_size");
    if (c->vocab == 0 && !retrofit_json_size(vocab, &c->vocab))
        return retrofit_fail("%s: vocab_size is missing or not a size", where);
    c->head_dim = c->n_heads ? c->n_embd / c->n_heads : 0;
    return true;
}

static bool config_is_true(const retrofit_json *json, const char *key) {
    const retrofit_json *value = retrofit_json_get(json, key);
    return value && value->type == RETROFIT_JSON_BOOL && value->number != 0;
}

// As config.json calls them, by retrofit_qk_norm.
static const char *const qk_norm_names[] = {"none", "full", "head"};

// All keys of a config.json that are known: those of transformers' Llama and its base class, those
// of the authors' models, and some of other families that a Llama would not be with.
static const retrofit_key config_keys[] = {
    {"model_type", NULL, "llama, qwen2, qwen3, olmo2 or huginn_raven"},
    {"hidden_size n_embd", NULL, "the width d"},
    {"num_attention_heads n_heads", NULL, "H"},
    {"num_key_value_heads", NULL, "G; H without it"},
    {"head_dim", NULL, "d/H, no other"},
    {"intermediate_size", NULL, "F"},
    {"vocab_size padded_vocab_size", NULL, "V; of a recurrent model padded_vocab_size counts"},
    {"num_hidden_layers n_layers_in_*", NULL, "D of a plain Llama; P, C and D"},
    {"max_position_embeddings", NULL, "the longest context; 2048 without it"},
    {"mean_recurrence mean_backprop_depth", NULL, "R and K"},
    {"trained_seq_len", NULL, "ours: T of the training, which --eval takes"},
    {"block_norm", NULL, "ours, of a recurrent model: pre, or post as in OLMo-2's blocks"},
    {"qk_norm", NULL, "ours: norms of q and k: none, full (OLMo-2's) or head (Qwen3's)"},
    {"qkv_bias", NULL, "ours: whether q, k and v have biases, as Qwen2's"},
    {"trained_state_init", NULL, "ours: s_0 of the training, normal or zero, which infer takes"},
    {"rms_norm_eps norm_eps", NULL, "of a plain Llama; of a recurrent model"},
    {"rope_theta", NULL, "the base of RoPE's frequencies; 10000 without it"},
    {"rope_scaling rope_parameters", NULL, "see the table of its keys"},
    {"init_values", NULL, "see the table of its keys"},
    {"bos_token_id eos_token_id pad_token_id", NULL, "unless generation_config.json has them"},
    {"tie_word_embeddings", NULL, "the head is the embedding"},
    {"layer_types", NULL, "all full_attention, no other"},
    {"architectures", NULL, "names of classes; a note if they are not a Llama's"},
    {"attention_dropout", "*", "train does without, and says so"},
    {"hidden_act hidden_activation", "silu|swish", "the MLP is SwiGLU"},
    {"use_rope is_causal causal", "true", "attention is causal here, and has RoPE"},
    {"nonlin_name", "SiLU", "the MLP is SwiGLU"},
    {"mlp_class_name", "GatedMLP", "the MLP is SwiGLU"},
    {"norm_class_name", "RMSNorm_llama", "only Llama's blocks are supported"},
    {"block_class_name", "SandwichBlock", "only Llama's blocks are supported"},
    {"architecture_class_name", "RecurrentGPT", "only the authors' model is supported"},
    {"injection_type", "linear", "only the linear adapter is supported"},
    {"state_init", "like-init", "s_0 is a normal draw; --state-init zero is an option"},
    {"initial_state_mode", "random", "s_0 is a normal draw; --state-init zero is an option"},
    {"sampling_scheme", "poisson-lognormal-filling", "train draws recurrences in no other way"},
    {"test_time_noise", "0", "infer adds noise by --noise"},
    {"attention_bias mlp_bias qk_bias bias", "false", "matrices have no bias here"},
    {"tie_embeddings", "false", "a recurrent model has a head of its own"},
    {"partial_rotary_factor", "1", "RoPE turns whole heads here"},
    {"rope_interleaved", "false", "RoPE turns halves of a head here"},
    {"sliding_window", NULL, "null, no other; Qwen's counts only with use_sliding_window"},
    {"use_sliding_window", "false", "attention is over the whole context here"},
    {"quantization_config compression_config", "null", "take the model before it was quantized"},
    {"logit_scale logits_scaling", "1", "logits are not scaled here"},
    {"embedding_multiplier residual_multiplier", "1", "nothing is scaled here"},
    {"num_experts num_local_experts", "0|1", "a block has one MLP here"},
    {"is_encoder_decoder add_cross_attention", "false", "only decoders are supported"},
    {"pruned_heads", "null", "all layers have the same heads here"},
    {"n_layers effective_expected_depth", "*", "follow from the others"},
    {"block_size", "*", "max_position_embeddings counts"},
    {"rope_base", "*", "rope_theta counts"},
    {"padding_multiple", "*", "the vocabulary is padded already"},
    {"test_time_noise_type max_window_layers", "*", "of what is off"},
    {"init_orthogonal init_strategy initializer_range", "*", "of weights from scratch"},
    {"auto_map", NULL, "that the authors' model is of OLMo-2's blocks"},
    {"tokenizer_class", "*", "names of classes"},
    {"is_llama_config", "*", "where it comes from"},
    {"_name_or_path name_or_path transformers_version unsloth_*", "*", "where it comes from"},
    {"dtype torch_dtype", "*", "the file's tensors say it"},
    {"activation_checkpoint_impl use_cache use_bfloat16 pretraining_tp", "*", "how to compute"},
    {"_attn_implementation* attn_implementation chunk_size_feed_forward", "*", "how to compute"},
    {"cache_implementation torchscript _flash_attn_2_enabled", "*", "how to compute"},
    {"return_dict* output_* is_decoder tf_legacy_loss", "*", "of Python's interface"},
    {"cross_attention_hidden_size tie_encoder_decoder", "*", "of encoders"},
    {"decoder_start_token_id sep_token_id", "*", "of encoders"},
    {"finetuning_task id2label label2id problem_type prefix", "*", "of other tasks"},
    {"task_specific_params transformers.js_config", "*", "of other tasks and programs"},
    {"max_length min_length do_sample early_stopping num_beams", "*", "infer has options"},
    {"num_beam_groups diversity_penalty temperature top_k top_p", "*", "infer has options"},
    {"typical_p repetition_penalty length_penalty", "*", "infer has options"},
    {"no_repeat_ngram_size encoder_no_repeat_ngram_size", "*", "infer has options"},
    {"bad_words_ids num_return_sequences forced_* suppress_tokens", "*", "infer has options"},
    {"begin_suppress_tokens remove_invalid_values", "*", "infer has options"},
    {"exponential_decay_length_penalty", "*", "infer has options"},
};

// Keys of rope_scaling, or rope_parameters as transformers 5 calls it.
static const retrofit_key rope_keys[] = {
    {"rope_type type", NULL, "default, linear or llama3, no other; type is the older name"},
    {"factor", NULL, "of linear and llama3"},
    {"rope_theta", NULL, "transformers 5 has it here"},
    {"low_freq_factor high_freq_factor original_max_position_embeddings", NULL, "of llama3"},
    {"partial_rotary_factor", "1", "RoPE turns whole heads here"},
};

static const retrofit_key init_keys[] = {
    {"std", NULL, "the standard deviation of s_0"},
    {"embed_scale", "1", "embeddings are not scaled here"},
    {"embedding out_proj", "*", "of weights from scratch"},
};
#define KEYS(table) table, sizeof table / sizeof *table

// An object that is a member of a config, by its own table.
static bool check_config_member(const retrofit_json *json, const char *key,
                                const retrofit_key *table, size_t count, const char *where) {
    const retrofit_json *member = retrofit_json_get(json, key);
    char path[RETROFIT_PATH + 64];
    if (!member || member->type == RETROFIT_JSON_NULL) return true;
    if (member->type != RETROFIT_JSON_OBJECT)
        return retrofit_fail("%s: \"%s\" is not an object", where, key);
    snprintf(path, sizeof path, "%s: %s", where, key);
    return retrofit_keys_check(member, table, count, path);
}

// Every key is used, changes nothing, or is refused.
static bool check_config_keys(const retrofit_json *json, const char *where) {
    const retrofit_json *types = retrofit_json_get(json, "layer_types");
    for (const retrofit_json *type = types ? types->child : NULL; type; type = type->next) {
        if (!retrofit_json_is(type, "full_attention"))
            return retrofit_fail("%s: \"layer_types\" has other layers than full_attention: such "
                                 "models are not supported", where);
    }
    const retrofit_json *classes = retrofit_json_get(json, "architectures");
    const retrofit_json *class = classes ? classes->child : NULL;
    bool named = class && class->type == RETROFIT_JSON_STRING;
    const model_family *family = find_family(retrofit_json_get(json, "model_type"));
    const char *usual = family ? family->class : "RavenForCausalLM";
    if (named && strncmp(class->string, usual, 5))
        retrofit_note("%s: architectures says %s: read as the model_type says", where,
                      class->string);
    const retrofit_json *window = retrofit_json_get(json, "sliding_window");
    bool qwen = family && !strncmp(family->type, "qwen", 4);
    if (window && window->type != RETROFIT_JSON_NULL && !qwen)
        return retrofit_fail("%s: \"sliding_window\" is %s: attention is over the whole context "
                             "here", where, retrofit_json_value_text(window));
    return retrofit_keys_check(json, KEYS(config_keys), where) &&
           check_config_member(json, "rope_scaling", KEYS(rope_keys), where) &&
           check_config_member(json, "rope_parameters", KEYS(rope_keys), where) &&
           check_config_member(json, "init_values", KEYS(init_keys), where);
}

// Without one, *out stays as it was. false or error if it is something else.
static bool read_config_number(double *out, const retrofit_json *json, const char *key,
                               const char *where) {
    const retrofit_json *number = retrofit_json_get(json, key);
    if (!number || number->type == RETROFIT_JSON_NULL) return true;
    if (number->type != RETROFIT_JSON_NUMBER)
        return retrofit_fail("%s: %s is not a number", where, key);
    *out = number->number;
    return true;
}

// The object that says how RoPE is scaled, or NULL. transformers 5 calls it rope_parameters, older
// versions rope_scaling, and what says nothing is null or empty. Where a file has both, the older
// one counts in all versions, and they must not differ.
static bool find_config_rope(const retrofit_json **out, const retrofit_json *json,
                             const char *where) {
    const retrofit_json *old = retrofit_json_get(json, "rope_scaling");
    const retrofit_json *new = retrofit_json_get(json, "rope_parameters");
    if (old && old->count == 0) old = NULL;
    if (new && new->count == 0) new = NULL;
    *out = old ? old : new;
    if (!old || !new) return true;
    for (const retrofit_json *a = old->child; a; a = a->next) {
        const char *key = strcmp(a->key, "type") ? a->key : "rope_type";
        const retrofit_json *b = retrofit_json_get(new, key);
        if (!same_scalar(a, b))
            return retrofit_fail("%s: rope_scaling and rope_parameters say different things (%s): "
                                 "remove one of them", where, a->key);
    }
    return true;
}

static bool read_rope_numbers(retrofit_config *c, const retrofit_json *rope, const char *where) {
    return read_config_number(&c->rope_factor, rope, "factor", where) &&
           read_config_number(&c->rope_low, rope, "low_freq_factor", where) &&
           read_config_number(&c->rope_high, rope, "high_freq_factor", where) &&
           read_config_number(&c->rope_original_context, rope, "original_max_position_embeddings",
                              where);
}

static bool fail_thetas(double a, double b, const char *where) {
    return retrofit_fail("%s: rope_theta is %g, and %g where RoPE's scaling is: remove one of them",
                         where, a, b);
}

// θ stands at the top, or, as transformers 5 has it, where the scaling is. transformers 4 does not
// see it there: when it saves such a model again it puts its default at the top, 10000, which is
// not the model's. Any other two that differ contradict each other.
static bool read_rope_theta(retrofit_config *c, const retrofit_json *json,
                            const retrofit_json *rope, const char *where) {
    const retrofit_json *top = retrofit_json_get(json, "rope_theta");
    const retrofit_json *new = retrofit_json_get(json, "rope_parameters");
    c->rope_theta = 10000;
    bool is_default = !top || top->number == c->rope_theta;
    if (!read_config_number(&c->rope_theta, json, "rope_theta", where)) return false;
    double at_top = c->rope_theta;
    if (!read_config_number(&c->rope_theta, rope, "rope_theta", where)) return false;
    double theta = c->rope_theta;
    if (theta != at_top && top && !(is_default && rope == new))
        return fail_thetas(at_top, theta, where);
    if (theta != at_top && top)
        retrofit_note("%s: rope_theta 10000 is not used, but rope_parameters' %g: transformers 4 "
                      "writes its default there when it saves a model of transformers 5", where,
                      theta);
    double in_new = theta;
    if (!read_config_number(&in_new, new, "rope_theta", where)) return false;
    return in_new == theta || fail_thetas(theta, in_new, where);
}

static bool read_config_rope(retrofit_config *c, const retrofit_json *json, const char *where) {
    const retrofit_json *rope;
    if (!find_config_rope(&rope, json, where)) return false;
    if (!read_rope_theta(c, json, rope, where)) return false;
    const retrofit_json *type = retrofit_json_get(rope, "rope_type");
    if (!type) type = retrofit_json_get(rope, "type");
    if (!type && !retrofit_json_get(rope, "factor")) return true;
    if (!type)
        return retrofit_fail("%s: rope_scaling has no rope_type: add \"linear\" or \"llama3\", "
                             "whichever the model was trained with", where);
    c->rope_llama3 = retrofit_json_is(type, "llama3");
    if (retrofit_json_is(type, "default")) return true;
    if (c->rope_llama3) return read_rope_numbers(c, rope, where);
    if (!retrofit_json_is(type, "linear"))
        return retrofit_fail("%s: rope_scaling is of type %.40s: only default, linear and llama3 "
                             "are supported", where, type->string ? type->string : "?");
    if (!read_config_number(&c->rope_factor, rope, "factor", where)) return false;
    return c->rope_factor > 0 ||
           retrofit_fail("%s: rope_scaling is linear, but has no factor above 0", where);
}

static int32_t config_token_id(double number) { return (int32_t)fmax(-1, fmin(1 << 24, number)); }

// Ids of tokens with a role. What ends a text is a number or a list of them.
static bool read_config_ids(retrofit_config *c, const retrofit_json *json, const char *where) {
    double bos = c->bos, pad = c->pad;
    if (!read_config_number(&bos, json, "bos_token_id", where)) return false;
    if (!read_config_number(&pad, json, "pad_token_id", where)) return false;
    c->bos = config_token_id(bos);
    c->pad = config_token_id(pad);
    const retrofit_json *end = retrofit_json_get(json, "eos_token_id");
    if (!end || end->type == RETROFIT_JSON_NULL) return true;
    bool list = end->type == RETROFIT_JSON_ARRAY;
    c->eos_count = 0;
    for (end = list ? end->child : end; end; end = list ? end->next : NULL) {
        size_t id;
        bool fits = c->eos_count < sizeof c->eos / sizeof *c->eos;
        if (end->type != RETROFIT_JSON_NUMBER || !fits)
            return retrofit_fail("%s: eos_token_id is neither a token id nor a list of at most 8",
                                 where);
        if (!retrofit_json_size(end, &id)) continue; // -1 means none in older files
        c->eos[c->eos_count++] = config_token_id((double)id);
    }
    if (c->eos_count == 0)
        retrofit_note("%s: eos_token_id names no token: text ends at the tokenizer's", where);
    return true;
}

static bool read_config_numbers(retrofit_config *c, const retrofit_json *json,
                                const model_family *family, const char *where) {
    const retrofit_json *init = retrofit_json_get(json, "init_values");
    double head_dim = (double)c->head_dim, std = RETROFIT_STATE_STD;
    double eps = family ? family->norm_eps : 0;
    if (!read_config_number(&head_dim, json, "head_dim", where)) return false;
    if (head_dim != (double)c->head_dim)
        return retrofit_fail("%s: head_dim is not %zu / %zu: such models are not supported", where,
                             c->n_embd, c->n_heads);
    if (!read_config_number(&eps, json, family ? "rms_norm_eps" : "norm_eps", where)) return false;
    if (!read_config_number(&std, init, "std", where)) return false;
    c->norm_eps = (float)eps;
    c->state_std = (float)std;
    return read_config_ids(c, json, where);
}

// How s_0 was drawn while the model was trained, in a config.json of ours.
static bool read_config_state(retrofit_config *c, const retrofit_json *json, const char *where) {
    const retrofit_json *state = retrofit_json_get(json, "trained_state_init");
    c->trained_state_zero = retrofit_json_is(state, "zero");
    bool given = state && state->type != RETROFIT_JSON_NULL;
    if (!given || c->trained_state_zero || retrofit_json_is(state, "normal")) return true;
    return retrofit_fail("%s: trained_state_init is neither \"normal\" nor \"zero\"", where);
}

static void set_family(retrofit_config *c, const model_family *family) {
    c->post_norm = family->post_norm;
    c->qkv_bias = family->qkv_bias;
    c->qk_norm = family->qk_norm;
}

bool retrofit_config_set_family(retrofit_config *config, const char *type) {
    for (size_t i = 0; i < MODEL_FAMILIES; i++) {
        if (strcmp(model_families[i].type, type)) continue;
        set_family(config, &model_families[i]);
        return true;
    }
    return retrofit_fail("%s is no family of plain models", type);
}

// One of the names, by its number in *out, which stays as it is without the key. false or error.
static bool read_config_choice(size_t *out, const retrofit_json *json, const char *key,
                               const char *const *names, size_t count, const char *where) {
    const retrofit_json *value = retrofit_json_get(json, key);
    if (!value || value->type == RETROFIT_JSON_NULL) return true;
    for (size_t i = 0; i < count; i++) {
        if (!retrofit_json_is(value, names[i])) continue;
        *out = i;
        return true;
    }
    return retrofit_fail("%s: \"%s\" is %s: not known here", where, key,
                         retrofit_json_value_text(value));
}

// A plain model's blocks are its family's. The authors' models say by the name of their code alone
// that theirs are OLMo-2's; ours have keys for what differs from Llama's.
static bool read_config_blocks(retrofit_config *c, const retrofit_json *json,
                               const model_family *family, const char *where) {
    static const char *const norms[] = {"pre", "post"}, *const keys[] = {"block_norm", "qk_norm",
                                                                         "qkv_bias"};
    const retrofit_json *code = retrofit_json_get(json, "auto_map");
    code = retrofit_json_get(code, "AutoModelForCausalLM");
    bool olmo = code && code->type == RETROFIT_JSON_STRING && strstr(code->string, "_olmo.");
    if (!family && olmo) set_family(c, &model_families[FAMILY_OLMO2]);
    if (family) set_family(c, family);
    for (size_t i = 0; family && i < 3; i++) {
        if (retrofit_json_get(json, keys[i]))
            return retrofit_fail("%s: \"%s\" is a recurrent model's: a %s has the blocks of its "
                                 "family", where, keys[i], family->type);
    }
    size_t norm = c->post_norm, qk_norm = c->qk_norm;
    bool ok = read_config_choice(&norm, json, "block_norm", norms, 2, where) &&
              read_config_choice(&qk_norm, json, "qk_norm", qk_norm_names, 3, where);
    c->post_norm = norm;
    c->qk_norm = (retrofit_qk_norm)qk_norm;
    const retrofit_json *bias = retrofit_json_get(json, "qkv_bias");
    if (!bias || bias->type == RETROFIT_JSON_NULL) return ok;
    c->qkv_bias = bias->number != 0;
    if (ok && bias->type != RETROFIT_JSON_BOOL)
        return retrofit_fail("%s: \"qkv_bias\" is %s, neither true nor false", where,
                             retrofit_json_value_text(bias));
    return ok;
}

static bool config_parse(retrofit_config *c, const retrofit_json *json, const char *where) {
    const retrofit_json *type = retrofit_json_get(json, "model_type");
    const model_family *family = find_family(type);
    bool plain = family != NULL;
    if (!plain && !retrofit_json_is(type, "huginn_raven"))
        return retrofit_fail("%s: model_type is %.40s: only llama, qwen2, qwen3, olmo2 and "
                             "huginn_raven are supported",
                             where, type && type->string ? type->string : "missing");
    memset(c, 0, sizeof *c);
    c->mean_recurrence = 1;
    c->backprop_depth = 1;
    c->bos = -1;
    c->pad = -1;
    c->context = 2048; // without max_position_embeddings, as in transformers
    const retrofit_json *tie = retrofit_json_get(json, "tie_word_embeddings");
    if (tie && tie->type != RETROFIT_JSON_BOOL && tie->type != RETROFIT_JSON_NULL)
        return retrofit_fail("%s: tie_word_embeddings is neither true nor false", where);
    c->tied = config_is_true(json, "tie_word_embeddings");
    if (c->tied && !plain)
        return retrofit_fail("%s: tie_word_embeddings is true: a recurrent model has a head of its "
                             "own", where);
    return check_config_keys(json, where) && read_config_sizes(c, json, plain, where) &&
           read_config_blocks(c, json, family, where) && read_config_rope(c, json, where) &&
           read_config_numbers(c, json, family, where) &&
           read_config_state(c, json, where) && retrofit_config_check(c, where);
}

bool retrofit_config_read_file(retrofit_config *config, const char *path) {
    retrofit_json *json = retrofit_json_read(path, NULL);
    bool ok = json && config_parse(config, json, path);
    retrofit_json_free(json);
    return ok;
}

// generation_config.json's ids count, where it has them; config.json's are for older files. As in
// transformers.
static bool read_generation_config(retrofit_config *config, const char *directory) {
    char path[RETROFIT_PATH];
    if (!retrofit_path(path, directory, "generation_config.json")) return false;
    if (!retrofit_is_there(path)) return true;
    retrofit_json *json = retrofit_json_read(path, NULL);
    bool ok = json && read_config_ids(config, json, path);
    retrofit_json_free(json);
    return ok;
}

bool retrofit_config_read(retrofit_config *config, const char *directory) {
    char path[RETROFIT_PATH];
    return retrofit_check_directory(directory) && retrofit_path(path, directory, "config.json") &&
           retrofit_config_read_file(config, path) && read_generation_config(config, directory);
}

// The published checkpoints carry the ids of Huginn's tokenizer, which in theirs are words or none.
static bool has_huginns_ids(const retrofit_config *c, const retrofit_tokenizer *tokenizer) {
    bool ids = c->bos == 65504 && c->eos_count == 1 && c->eos[0] == 65505;
    return ids && retrofit_tokenizer_eos(tokenizer) != 65505;
}

void retrofit_config_mend_ids(retrofit_config *c, const retrofit_tokenizer *tokenizer,
                              const char *where) {
    int32_t bos = retrofit_tokenizer_bos(tokenizer), eos = retrofit_tokenizer_eos(tokenizer);
    bool huginns = has_huginns_ids(c, tokenizer);
    if (huginns)
        retrofit_note("%s: eos_token_id 65505 and bos_token_id 65504 are Huginn's: the tokenizer's "
                      "%d and %d count", where, (int)eos, (int)bos);
    size_t count = 0;
    for (size_t i = 0; i < c->eos_count && !huginns; i++) {
        if ((size_t)c->eos[i] < c->vocab) c->eos[count++] = c->eos[i];
        else retrofit_note("%s: eos_token_id %d is beyond the vocabulary of %zu: not used", where,
                           (int)c->eos[i], c->vocab);
    }
    c->eos_count = count;
    if (count == 0 && eos >= 0) c->eos[c->eos_count++] = eos;
    bool beyond = c->bos >= 0 && (size_t)c->bos >= c->vocab && !huginns;
    if (beyond)
        retrofit_note("%s: bos_token_id %d is beyond the vocabulary of %zu: the tokenizer's %d "
                      "counts", where, (int)c->bos, c->vocab, (int)bos);
    if (huginns || beyond || c->bos < 0) c->bos = bos;
    if (huginns || (c->pad >= 0 && (size_t)c->pad >= c->vocab)) c->pad = -1;
}

// ---- config.json: writing ----------------------------------------------------------------------

// The shortest decimal that reads back as the same float if x is one, else as the same double.
static const char *number_text(double x, char buffer[32]) {
    bool narrow = (double)(float)x == x;
    for (int digits = 1; digits <= 17; digits++) {
        snprintf(buffer, 32, "%.*g", digits, x);
        if (narrow ? strtof(buffer, NULL) == (float)x : strtod(buffer, NULL) == x) break;
    }
    return buffer;
}

static void write_config_sizes(FILE *file, const retrofit_config *c, bool plain) {
    for (size_t i = 0; i < CONFIG_SIZES; i++) {
        const size_t *field = (const void *)((const char *)c + config_sizes[i].offset);
        const char *key = config_size_key(i, plain);
        bool known = *field > 0 || config_sizes[i].required; // what no training set is 0
        if (key && known) fprintf(file, "  \"%s\": %zu,\n", key, *field);
    }
}

// What config.json says of every plain Llama, and of every model for the authors' modelling code.
static const char config_plain_words[] =
    "  \"hidden_act\": \"silu\",\n"
    "  \"attention_bias\": false,\n"
    "  \"mlp_bias\": false,\n";
static const char config_recurrent_words[] =
    "  \"architectures\": [\"RavenForCausalLM\"],\n"
    "  \"model_type\": \"huginn_raven\",\n"
    "  \"architecture_class_name\": \"RecurrentGPT\",\n"
    "  \"block_class_name\": \"SandwichBlock\",\n"
    "  \"norm_class_name\": \"RMSNorm_llama\",\n"
    "  \"mlp_class_name\": \"GatedMLP\",\n"
    "  \"nonlin_name\": \"SiLU\",\n"
    "  \"injection_type\": \"linear\",\n"
    "  \"state_init\": \"like-init\",\n"
    "  \"init_strategy\": \"takase\",\n"
    "  \"sampling_scheme\": \"poisson-lognormal-filling\",\n"
    "  \"test_time_noise\": 0,\n"
    "  \"test_time_noise_type\": \"fixed\",\n"
    "  \"bias\": false,\n"
    "  \"qk_bias\": false,\n"
    "  \"tie_embeddings\": false,\n";

static void write_config_plain(FILE *file, const retrofit_config *c) {
    const model_family *family = family_of(c);
    fprintf(file, "  \"architectures\": [\"%s\"],\n", family->class);
    fprintf(file, "  \"model_type\": \"%s\",\n", family->type);
    fputs(config_plain_words, file);
}

// The modelling code that Python's AutoModelForCausalLM takes: ours, if it lies there, or the
// authors', who have some for Llama's blocks and for OLMo-2's. The classes have the same names.
static void write_config_auto_map(FILE *file, const retrofit_config *c, bool ours) {
    const model_family *family = family_of(c);
    const char *config_code = "raven_config_minimal", *code = "raven_modeling_minimal_llama";
    bool llama = family == &model_families[FAMILY_LLAMA];
    bool olmo = family == &model_families[FAMILY_OLMO2];
    if (olmo) code = "raven_modeling_minimal_olmo";
    if (ours) {
        config_code = "modeling_retrofit";
        code = config_code;
    }
    if (!llama && !olmo && !ours) return;
    fprintf(file, "  \"auto_map\": {\n    \"AutoConfig\": \"%s.RavenConfig\",\n", config_code);
    fprintf(file, "    \"AutoModelForCausalLM\": \"%s.RavenForCausalLM\"\n  },\n", code);
}

// What a recurrent model's blocks have that Llama's have not.
static void write_config_blocks(FILE *file, const retrofit_config *c) {
    if (family_of(c) == &model_families[FAMILY_LLAMA]) return;
    fprintf(file, "  \"block_norm\": \"%s\",\n", c->post_norm ? "post" : "pre");
    fprintf(file, "  \"qk_norm\": \"%s\",\n", qk_norm_names[c->qk_norm]);
    fprintf(file, "  \"qkv_bias\": %s,\n", c->qkv_bias ? "true" : "false");
}

// init_values are the standard deviations that a training from scratch would start with, by
// Huginn's rule: σ for every matrix, σ/√(2·depth) for those that write to the residual stream.
static void write_config_recurrent(FILE *file, const retrofit_config *c) {
    char embedding[32], out_proj[32], std[32];
    size_t depth = c->prelude + c->core * c->mean_recurrence + c->coda;
    double sigma = sqrt(2.0 / (5.0 * (double)c->n_embd));
    bool usual = c->state_std == (float)RETROFIT_STATE_STD;
    fputs(config_recurrent_words, file);
    write_config_blocks(file, c);
    fprintf(file, "  \"vocab_size\": %zu,\n  \"block_size\": %zu,\n", c->vocab, c->context);
    fprintf(file, "  \"n_layers\": %zu,\n", c->prelude + c->core + c->coda);
    fprintf(file, "  \"effective_expected_depth\": %zu,\n", depth);
    if (c->trained_seq_len || c->trained_state_zero)
        fprintf(file, "  \"trained_state_init\": \"%s\",\n",
                c->trained_state_zero ? "zero" : "normal");
    number_text(sigma, embedding);
    number_text(sigma / sqrt(2.0 * (double)depth), out_proj);
    number_text(usual ? RETROFIT_STATE_STD : (double)c->state_std, std);
    fprintf(file, "  \"init_values\": {\"embed_scale\": 1.0, \"embedding\": %s, ", embedding);
    fprintf(file, "\"out_proj\": %s, \"std\": %s},\n", out_proj, std);
}

static void write_config_rope(FILE *file, const retrofit_config *c) {
    char factor[32], high[32], low[32];
    if (!c->rope_llama3) {
        fprintf(file, "  \"rope_scaling\": {\"factor\": %s, \"rope_type\": \"linear\"},\n",
                number_text(c->rope_factor, factor));
        return;
    }
    fprintf(file, "  \"rope_scaling\": {\"factor\": %s, \"high_freq_factor\": %s, ",
            number_text(c->rope_factor, factor), number_text(c->rope_high, high));
    fprintf(file, "\"low_freq_factor\": %s, \"original_max_position_embeddings\": %.0f, ",
            number_text(c->rope_low, low), c->rope_original_context);
    fprintf(file, "\"rope_type\": \"llama3\"},\n");
}

static void write_config_ids(FILE *file, const retrofit_config *c) {
    if (c->bos >= 0) fprintf(file, "  \"bos_token_id\": %d,\n", (int)c->bos);
    if (c->pad >= 0) fprintf(file, "  \"pad_token_id\": %d,\n", (int)c->pad);
    if (c->eos_count == 1) fprintf(file, "  \"eos_token_id\": %d,\n", (int)c->eos[0]);
    if (c->eos_count < 2) return;
    fprintf(file, "  \"eos_token_id\": [");
    for (size_t i = 0; i < c->eos_count; i++) fprintf(file, i ? ", %d" : "%d", (int)c->eos[i]);
    fprintf(file, "],\n");
}

bool retrofit_config_write(const retrofit_config *config, retrofit_type type,
                           const char *directory) {
    char path[RETROFIT_PATH], modelling[RETROFIT_PATH], eps[32], theta[32];
    bool plain = retrofit_is_plain(config);
    if (!retrofit_path(modelling, directory, RETROFIT_MODELLING)) return false;
    if (!retrofit_path(path, directory, "config.json")) return false;
    FILE *file = fopen(path, "wb");
    if (!file) return retrofit_fail("%s: %s", path, strerror(errno));
    errno = 0; // so that what retrofit_finish_file reports comes from writing
    fprintf(file, "{\n");
    write_config_sizes(file, config, plain);
    if (!plain) write_config_auto_map(file, config, retrofit_is_there(modelling));
    if (plain) write_config_plain(file, config);
    else write_config_recurrent(file, config);
    write_config_ids(file, config);
    if (config->rope_llama3 || config->rope_factor > 1) write_config_rope(file, config);
    fprintf(file, "  \"head_dim\": %zu,\n", config->head_dim);
    fprintf(file, "  \"%s\": %s,\n", plain ? "rms_norm_eps" : "norm_eps",
            number_text((double)config->norm_eps, eps));
    fprintf(file, "  \"rope_theta\": %s,\n", number_text(config->rope_theta, theta));
    fprintf(file, "  \"tie_word_embeddings\": %s,\n", config->tied ? "true" : "false");
    fprintf(file, "  \"torch_dtype\": \"%s\"\n}\n", type == RETROFIT_BF16 ? "bfloat16" : "float32");
    return retrofit_finish_file(file, path, true);
}

// ---- Loading -----------------------------------------------------------------------------------
// Where the tensors of a checkpoint go:
//
//     training              all of them are copied to the masters, as fp32
//     inference on a CPU    a parameter that is one tensor, of the type that operations read it in,
//                           stays where it lies in the mapped file; the others are copied to the
//                           arena of weights: norms that are not fp32, and a plain Llama's q, k, v
//                           and gate, up, which operations read as one matrix
//     inference on a GPU    all of them are copied to the arena of weights
//     retrofit_open         all of them stay where they are, and convert reads them there

static bool open_map(retrofit_model *model, const char *path) {
    size_t count = model->map_count;
    retrofit_map *maps = retrofit_reallocate(model->maps, count + 1, sizeof *maps);
    if (!maps) return false;
    model->maps = maps;
    if (!retrofit_safetensors_open(&maps[count], path)) return false;
    model->map_count++;
    return true;
}

static int by_string(const void *a, const void *b) {
    const char *const *x = a;
    const char *const *y = b;
    return strcmp(*x, *y);
}

// Opens every file that the index names: {"weight_map": {"tensor": "file", …}}.
static bool open_shards(retrofit_model *model, const char *directory, const char *index) {
    char path[RETROFIT_PATH];
    retrofit_json *json = retrofit_json_read(index, NULL);
    const retrofit_json *map = retrofit_json_get(json, "weight_map");
    const char **files = map ? retrofit_allocate(map->count, sizeof *files) : NULL;
    size_t count = 0;
    bool ok = files != NULL;
    if (json && !map) retrofit_fail("%s: no weight_map", index);
    for (const retrofit_json *entry = map ? map->child : NULL; ok && entry; entry = entry->next) {
        if (entry->type == RETROFIT_JSON_STRING && !strchr(entry->string, '/'))
            files[count++] = entry->string;
        else ok = retrofit_fail("%s: %s is not in a file of this directory", index, entry->key);
    }
    if (count) qsort(files, count, sizeof *files, by_string);
    for (size_t i = 0; ok && i < count; i++) {
        if (i > 0 && !strcmp(files[i - 1], files[i])) continue;
        ok = retrofit_path(path, directory, files[i]) && open_map(model, path);
    }
    free(files);
    retrofit_json_free(json);
    return ok;
}

static bool open_maps(retrofit_model *model, const char *directory) {
    char path[RETROFIT_PATH], index[RETROFIT_PATH];
    if (!retrofit_path(path, directory, "model.safetensors")) return false;
    if (!retrofit_path(index, directory, "model.safetensors.index.json")) return false;
    if (retrofit_is_there(path)) return open_map(model, path);
    if (retrofit_is_there(index)) return open_shards(model, directory, index);
    if (!retrofit_path(path, directory, "pytorch_model.bin")) return false;
    const char *pickled = "; pytorch_model.bin is not read: save the model with safetensors";
    if (!retrofit_is_there(path)) pickled = "";
    return retrofit_fail("%s: there is no model.safetensors and no model.safetensors.index.json%s",
                         directory, pickled);
}

static const retrofit_tensor *find_exactly(const retrofit_model *model, const char *name) {
    for (size_t i = 0; i < model->map_count; i++) {
        const retrofit_tensor *tensor = retrofit_safetensors_find(&model->maps[i], name);
        if (tensor) return tensor;
    }
    return NULL;
}

// Checkpoints that were saved from transformers' AutoModel, the Llama without its head, lack the
// "model." in front of all names.
static const retrofit_tensor *find_tensor(const retrofit_model *model, const char *name) {
    const retrofit_tensor *tensor = find_exactly(model, name);
    if (tensor || strncmp(name, "model.", 6)) return tensor;
    return find_exactly(model, name + 6);
}

// Why a tensor is missing: it has a type that we don't read, or the file is of another kind.
static const retrofit_tensor *fail_missing(const retrofit_model *model, const char *name,
                                           const char *where) {
    for (size_t i = 0; i < model->map_count; i++) {
        const retrofit_json *entry = retrofit_json_get(model->maps[i].header, name);
        const retrofit_json *type = retrofit_json_get(entry, "dtype");
        if (type && type->string)
            return fail_null("%s: tensor %s is of type %s: weights are read as F32, BF16, F16 or "
                             "F64; is the model quantized?", where, name, type->string);
    }
    if (find_exactly(model, "embed_tokens.weight") && !strcmp(name, "lm_head.weight"))
        return fail_null("%s: tensor %s is missing: this was saved from AutoModel (LlamaModel), "
                         "without its head: save it from AutoModelForCausalLM", where, name);
    const char *first = "none";
    if (model->map_count && model->maps[0].count) first = model->maps[0].tensors[0].name;
    return fail_null("%s: tensor %s is missing; the first that is there is %s", where, name, first);
}

// The tensors of the files that make up a parameter, one below the other.
typedef struct {
    const retrofit_tensor *tensor[3];
} source_tensors;

static const retrofit_tensor *find_source(const retrofit_model *model,
                                          const retrofit_parameter *parameter, size_t i,
                                          const char *where) {
    const char *name = parameter->source[i].name;
    const retrofit_tensor *tensor = find_tensor(model, name);
    if (!tensor) return fail_missing(model, name, where);

    bool norm = parameter->kind == RETROFIT_NORM;
    size_t rows = norm ? parameter->cols : parameter->source[i].rows;
    size_t cols = norm ? 1 : parameter->cols;
    size_t found_rows = tensor->dims > 0 ? tensor->shape[0] : 1;
    size_t found_cols = tensor->dims > 1 ? tensor->shape[1] : 1;
    size_t dims = is_vector(parameter->kind) ? 1 : 2;
    bool fits = tensor->dims == dims && found_rows == rows && found_cols == cols;
    if (!fits || tensor->type == RETROFIT_I32)
        return fail_null("%s: tensor %s has the shape (%zu, %zu), the config asks for (%zu, %zu)",
                         where, tensor->name, found_rows, found_cols, rows, cols);
    return tensor;
}

const retrofit_tensor *retrofit_find_source(const retrofit_model *model,
                                            const retrofit_parameter *parameter, size_t j) {
    return find_source(model, parameter, j, model->maps[0].path);
}

static bool find_sources(const retrofit_model *model, source_tensors *sources) {
    for (size_t i = 0; i < model->parameter_count; i++) {
        const retrofit_parameter *parameter = model->parameters[i];
        for (size_t j = 0; j < parameter->sources; j++) {
            sources[i].tensor[j] = retrofit_find_source(model, parameter, j);
            if (!sources[i].tensor[j]) return false;
        }
    }
    return true;
}

// Whether all tensors are there, in their shapes.
static bool check_sources(const retrofit_model *model, const char *where) {
    for (size_t i = 0; i < model->parameter_count; i++) {
        for (size_t j = 0; j < model->parameters[i]->sources; j++)
            if (!find_source(model, model->parameters[i], j, where)) return false;
    }
    return true;
}

// The type in which a loaded parameter is read. On a CPU all but norms may also stay in bf16.
static retrofit_type loaded_type(const retrofit_model *model, const retrofit_parameter *parameter,
                                 const source_tensors *sources) {
    if (model->ops != &retrofit_cpu || is_vector(parameter->kind))
        return compute_type(model, parameter->kind);
    for (size_t j = 0; j < parameter->sources; j++) {
        if (sources->tensor[j]->type != RETROFIT_BF16) return compute_type(model, parameter->kind);
    }
    return RETROFIT_BF16;
}

// Tensors that make up a parameter lie one below the other in files that we wrote.
static bool stays_in_file(const retrofit_model *model, const retrofit_parameter *parameter,
                          const source_tensors *sources) {
    size_t size = retrofit_type_size(parameter->weight.type);
    const char *next = sources->tensor[0]->data;
    bool as_it_is = (uintptr_t)next % size == 0;
    for (size_t j = 0; j < parameter->sources; j++) {
        const retrofit_tensor *tensor = sources->tensor[j];
        as_it_is = as_it_is && tensor->type == parameter->weight.type && tensor->data == next;
        next += tensor->count * size;
    }
    return model->ops == &retrofit_cpu && as_it_is;
}

static void lay_out_loaded(retrofit_model *model, arena *a, const source_tensors *sources) {
    for (size_t i = 0; i < model->parameter_count; i++) {
        retrofit_parameter *parameter = model->parameters[i];
        retrofit_type type = loaded_type(model, parameter, &sources[i]);
        size_t count = parameter->rows * parameter->cols;
        parameter->weight.type = type;
        if (stays_in_file(model, parameter, &sources[i]))
            parameter->weight.data = sources[i].tensor[0]->data;
        else parameter->weight.data = arena_alloc(a, count, retrofit_type_size(type));
    }
    if (model->config.tied) lay_out_tied_head(model, a);
}

static bool place_for_inference(retrofit_model *model, const source_tensors *sources) {
    arena a = {NULL, 0};
    lay_out_loaded(model, &a, sources);
    if (a.used == 0) return true; // everything stays in the files
    model->weights = arena_reserve(&a, model->ops);
    if (!model->weights) return false;
    lay_out_loaded(model, &a, sources);
    return true;
}

static void upload_tensor(const retrofit_ops *ops, char *to, retrofit_type type,
                          const retrofit_tensor *tensor, conversion *scratch) {
    const char *from = tensor->data;
    size_t size = retrofit_type_size(type), from_size = retrofit_type_size(tensor->type);
    if (type == tensor->type) {
        ops->upload(to, from, tensor->count * size);
        return;
    }
    for (size_t i = 0; i < tensor->count; i += CONVERSION_CHUNK) {
        size_t n = retrofit_min(tensor->count - i, CONVERSION_CHUNK);
        const void *out = convert_chunk(from + i * from_size, tensor->type, type, n, scratch);
        ops->upload(to + i * size, out, n * size);
    }
}

// To its master, or, in inference, to where operations read it.
static void upload_parameter(const retrofit_model *model, const retrofit_parameter *parameter,
                             const source_tensors *sources, conversion *scratch) {
    char *to = parameter->master ? (char *)parameter->master : (char *)parameter->weight.data;
    retrofit_type type = parameter->master ? RETROFIT_F32 : parameter->weight.type;
    if (to == sources->tensor[0]->data) return; // it stays in the file
    for (size_t j = 0; j < parameter->sources; j++) {
        upload_tensor(model->ops, to, type, sources->tensor[j], scratch);
        to += sources->tensor[j]->count * retrofit_type_size(type);
    }
}

static bool load_weights(retrofit_model *model, retrofit_mode mode) {
    source_tensors *sources = retrofit_allocate(model->parameter_count, sizeof *sources);
    conversion *scratch = retrofit_allocate(1, sizeof *scratch);
    bool ok = sources && scratch && find_sources(model, sources);
    if (ok && mode == RETROFIT_INFERENCE) ok = place_for_inference(model, sources);
    else if (ok) ok = retrofit_model_allocate(model, mode);
    for (size_t i = 0; ok && i < model->parameter_count; i++)
        upload_parameter(model, model->parameters[i], &sources[i], scratch);
    bool head_is_copy = ok && model->config.tied && !model->lm_head.master &&
                        model->lm_head.weight.data != model->wte.weight.data;
    if (head_is_copy) upload_parameter(model, &model->lm_head, &sources[0], scratch); // of wte
    free(sources);
    free(scratch);
    return ok;
}

// The names of all tensors that the model has a place for, sorted. NULL or error.
static const char **list_places(const retrofit_model *model, size_t *count) {
    const char **names = retrofit_allocate(6 * model->parameter_count, sizeof *names);
    *count = 0;
    for (size_t i = 0; names && i < model->parameter_count; i++) {
        const retrofit_parameter *parameter = model->parameters[i];
        for (size_t j = 0; j < parameter->sources; j++) {
            const char *source = parameter->source[j].name;
            names[(*count)++] = source;
            if (!strncmp(source, "model.", 6)) names[(*count)++] = source + 6;
        }
    }
    if (names) qsort(names, *count, sizeof *names, by_string);
    return names;
}

// Rotary tables and a head that is tied, which older files carry along, need no place.
static bool needs_no_place(const retrofit_model *model, const char *name) {
    if (!strcmp(name, "__metadata__") || strstr(name, "rotary_emb.inv_freq")) return true;
    return model->config.tied && !strcmp(name, "lm_head.weight");
}

static bool check_all_used(const retrofit_model *model, const retrofit_map *map,
                           const char *const *places, size_t count) {
    const retrofit_json *entry = map->header->child;
    for (; entry; entry = entry->next) {
        if (needs_no_place(model, entry->key)) continue;
        if (!bsearch(&entry->key, places, count, sizeof *places, by_string))
            return retrofit_fail("%s: tensor %s has no place in a model of this config.json",
                                 map->path, entry->key);
    }
    for (size_t i = 0; i < map->count; i++) {
        const char *name = map->tensors[i].name;
        if (find_tensor(model, name) != &map->tensors[i])
            return retrofit_fail("%s: tensor %s is there twice", map->path, name);
    }
    return true;
}

// A file may hold a head although the config ties it. Where the two differ, transformers 4 follows
// the config, and so do we; transformers 5 follows the file.
static void note_other_head(const retrofit_model *model, const char *where) {
    const retrofit_tensor *head = find_tensor(model, "lm_head.weight");
    const retrofit_tensor *wte = find_tensor(model, model->wte.source[0].name);
    if (!model->config.tied || !head) return;
    size_t size = retrofit_type_size(wte->type);
    bool same = head->type == wte->type && head->count == wte->count &&
                !memcmp(head->data, wte->data, wte->count * size);
    if (!same)
        retrofit_note("%s: lm_head.weight is not the embedding, but tie_word_embeddings is true: "
                      "the embedding is the head, and lm_head.weight is not used", where);
}

// Files beside the weights that would make another model of them in Python.
static bool note_beside(const char *directory) {
    static const char *const names[] = {"adapter_config.json", "adapter_model.safetensors",
                                        "adapter_model.bin"};
    char path[RETROFIT_PATH], index[RETROFIT_PATH];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (!retrofit_path(path, directory, names[i])) return false;
        if (!retrofit_is_there(path)) continue;
        retrofit_note("%s: an adapter (LoRA) lies beside the weights and is not applied: merge it "
                      "into them first (PEFT's merge_and_unload)", path);
        break;
    }
    if (!retrofit_path(path, directory, "model.safetensors")) return false;
    if (!retrofit_path(index, directory, "model.safetensors.index.json")) return false;
    if (retrofit_is_there(path) && retrofit_is_there(index))
        retrofit_note("%s: not used, since model.safetensors is there", index);
    return true;
}

// What n numbers hold: one that is infinite or no number, whose exponent has ones alone; any that
// is not zero.
typedef struct {
    bool infinite, nonzero;
} number_kinds;

static number_kinds kinds_of_numbers(const char *data, retrofit_type type, size_t n) {
    uint32_t infinite = 0, nonzero = 0, exponent = type == RETROFIT_BF16 ? 0x7f80 : 0x7c00;
    for (size_t i = 0; i < n && type == RETROFIT_F32; i++) {
        uint32_t x;
        memcpy(&x, data + 4 * i, 4);
        infinite |= (x & 0x7f800000) == 0x7f800000;
        nonzero |= x;
    }
    for (size_t i = 0; i < n && retrofit_type_size(type) == 2; i++) {
        uint16_t x;
        memcpy(&x, data + 2 * i, 2);
        infinite |= (x & exponent) == exponent;
        nonzero |= x;
    }
    for (size_t i = 0; i < n && type == RETROFIT_F64; i++) {
        float x;
        retrofit_to_float(&x, data + 8 * i, type, 1);
        infinite |= !isfinite(x);
        nonzero |= x != 0;
    }
    return (number_kinds){infinite, nonzero};
}

static number_kinds kinds_in_tensor(const retrofit_tensor *tensor, bool release) {
    number_kinds kinds = {false, false};
    size_t size = retrofit_type_size(tensor->type);
    for (size_t i = 0; i < tensor->count; i += CONVERSION_CHUNK) {
        size_t n = retrofit_min(tensor->count - i, CONVERSION_CHUNK);
        const char *data = (const char *)tensor->data + i * size;
        number_kinds found = kinds_of_numbers(data, tensor->type, n);
        kinds.infinite |= found.infinite;
        kinds.nonzero |= found.nonzero;
        if (release) retrofit_release_pages(data, n * size);
    }
    return kinds;
}

// Of all threads: a region that another one encloses may count its own from 0.
static bool is_first_thread(void) {
    bool first = true;
#ifdef _OPENMP
    for (int level = 1; level <= omp_get_level(); level++)
        first = first && omp_get_ancestor_thread_num(level) == 0;
#endif
    return first;
}

void retrofit_safetensors_survey(const retrofit_map *map, bool release, size_t *infinite,
                                 size_t *zeros) {
    size_t wrong = map->count, zero = map->count;
#ifdef _OPENMP
#pragma omp parallel for reduction(min : wrong, zero) schedule(dynamic)
#endif
    for (size_t i = 0; i < map->count; i++) {
        const retrofit_tensor *tensor = &map->tensors[i];
        if (is_first_thread()) retrofit_show_share(i, map->count, "%s read", map->path);
        if (tensor->type == RETROFIT_I32) continue;
        number_kinds kinds = kinds_in_tensor(tensor, release);
        if (kinds.infinite) wrong = retrofit_min(wrong, i);
        if (!kinds.nonzero) zero = retrofit_min(zero, i);
    }
    retrofit_show_share(1, 1, "%s read", map->path);
    *infinite = wrong;
    *zeros = zero;
}

// A tensor of zeros alone is what a download with a hole in it leaves, but may be meant.
static bool check_values(const retrofit_map *map, bool release) {
    size_t wrong, zero;
    retrofit_safetensors_survey(map, release, &wrong, &zero);
    if (zero < map->count)
        retrofit_note("%s: tensor %s holds zeros alone: if that is not meant, the download is not "
                      "complete", map->path, map->tensors[zero].name);
    if (wrong == map->count) return true;

    const retrofit_tensor *tensor = &map->tensors[wrong];
    size_t at = 0, size = retrofit_type_size(tensor->type);
    const char *data = tensor->data;
    while (!kinds_of_numbers(data + at * size, tensor->type, 1).infinite) at++;
    return retrofit_fail("%s: tensor %s: number %zu is infinite or no number: the file is damaged, "
                         "or its training failed", map->path, tensor->name, at);
}

static bool check_maps(const retrofit_model *model, bool release) {
    size_t count;
    const char **places = list_places(model, &count);
    bool ok = places != NULL;
    for (size_t i = 0; ok && i < model->map_count; i++)
        ok = check_all_used(model, &model->maps[i], places, count) &&
             check_values(&model->maps[i], release);
    free(places);
    return ok;
}

// Maps the files and checks them. release: as retrofit_safetensors_survey takes it.
static bool open_files(retrofit_model *model, const char *directory, bool release) {
    if (!open_maps(model, directory)) return false;
    if (!check_sources(model, directory)) return false;
    if (!check_maps(model, release)) return false;
    note_other_head(model, directory);
    return note_beside(directory);
}

static retrofit_model *open_model(const char *directory, const retrofit_ops *ops, bool release) {
    char path[RETROFIT_PATH];
    retrofit_config config;
    directory = retrofit_model_directory(directory, path);
    if (!retrofit_config_read(&config, directory)) return NULL;
    retrofit_model *model = retrofit_model_new(&config, ops);
    if (!model) return NULL;
    if (open_files(model, directory, release)) return model;
    retrofit_free(model);
    return NULL;
}

retrofit_model *retrofit_open(const char *directory, const retrofit_ops *ops) {
    return open_model(directory, ops, true);
}

retrofit_model *retrofit_load(const char *directory, const retrofit_ops *ops, retrofit_mode mode) {
    retrofit_model *model = open_model(directory, ops, false);
    if (!model) return NULL;
    if (!load_weights(model, mode)) {
        retrofit_free(model);
        return NULL;
    }
    if (mode == RETROFIT_INFERENCE) return model;
    retrofit_refresh_weights(model);
    for (size_t i = 0; i < model->map_count; i++) retrofit_safetensors_close(&model->maps[i]);
    model->map_count = 0; // nothing lies in the files any more
    return model;
}

// ---- Checkpoints -------------------------------------------------------------------------------

// What has its temporary name still: two at most, a shard and its labels. The flag is set once the
// name is complete: a signal handler may come in between.
enum { UNFINISHED = 2 };
static struct {
    char path[RETROFIT_PATH];
    volatile sig_atomic_t set;
} unfinished[UNFINISHED];
static const char *signalled_program; // that ends on signals

// The second place is taken where the first one is in use.
static void set_unfinished(const char *path) {
    size_t i = unfinished[0].set ? 1 : 0;
    unfinished[i].set = false;
    snprintf(unfinished[i].path, sizeof unfinished[i].path, "%s", path);
    unfinished[i].set = true;
}

static void clear_unfinished(const char *path) {
    for (size_t i = 0; i < UNFINISHED; i++)
        if (unfinished[i].set && !strcmp(unfinished[i].path, path)) unfinished[i].set = false;
}

// Calls nothing but what a signal handler may call, and opens nothing, since there may be no
// descriptor left.
static void abandon(const char *begun) {
    static char path[RETROFIT_PATH + 64];
    size_t length = strlen(begun);
    memcpy(path, begun, length);
    path[length] = '/';
    for (size_t i = 0; retrofit_model_files[i]; i++) {
        const char *name = retrofit_model_files[i];
        memcpy(path + length + 1, name, strlen(name) + 1);
        unlink(path);
    }
    if (unlink(begun)) rmdir(begun);
}

void retrofit_abandon(void) {
    for (size_t i = 0; i < UNFINISHED; i++) {
        if (unfinished[i].set) abandon(unfinished[i].path);
        unfinished[i].set = false;
    }
}

// Ends the program by the signal itself, so that who waits for it sees which one it was.
static void end_by_signal(int number) {
    static const char text[] = ": stopped by a signal; nothing half-written is left behind\n";
    const char *program = signalled_program;
    bool tell = unfinished[0].set || unfinished[1].set;
    retrofit_live_line(NULL);
    retrofit_abandon();
    tell = tell && write(STDERR_FILENO, program, strlen(program)) > 0;
    tell = tell && write(STDERR_FILENO, text, sizeof text - 1) > 0;
    signal(number, SIG_DFL);
    raise(number);
}

void retrofit_abandon_on_signals(const char *program) {
    enum { SIGNALS = 4 };
    static const int signals[SIGNALS] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE};
    struct sigaction action = {.sa_handler = end_by_signal}, before;
    signalled_program = program;
    for (size_t i = 0; i < SIGNALS; i++) sigaddset(&action.sa_mask, signals[i]);
    for (size_t i = 0; i < SIGNALS; i++) {
        bool ignored = !sigaction(signals[i], NULL, &before) && before.sa_handler == SIG_IGN;
        if (!ignored) sigaction(signals[i], &action, NULL);
    }
}

char *retrofit_file_begin(const char *final) {
    struct stat status;
    char target[RETROFIT_PATH], *path = retrofit_allocate(RETROFIT_PATH, 1);
    bool there = stat(final, &status) == 0;
    if (!path) return NULL;
    if (there && !S_ISREG(status.st_mode)) {
        snprintf(path, RETROFIT_PATH, "%s", final);
        return path;
    }
    if (!there || !realpath(final, target)) snprintf(target, sizeof target, "%s", final);
    int length = snprintf(path, RETROFIT_PATH, "%s.tmp-%ld", target, (long)getpid());
    if (length < RETROFIT_PATH) {
        set_unfinished(path);
        return path;
    }
    free(path);
    return fail_null("%.60s…: a path longer than %d bytes", final, RETROFIT_PATH - 16);
}

// The final name, behind all links, is the temporary one without its end.
bool retrofit_file_commit(const char *temporary, const char *final) {
    char target[RETROFIT_PATH], parent[RETROFIT_PATH];
    if (!strcmp(temporary, final)) return true;
    snprintf(target, sizeof target, "%s", temporary);
    strrchr(target, '.')[0] = 0;
    if (rename(temporary, target)) return retrofit_fail("%s: %s", final, strerror(errno));
    clear_unfinished(temporary);
    snprintf(parent, sizeof parent, "%s", target);
    retrofit_parent_directory(parent);
    return retrofit_sync_directory(parent);
}

char *retrofit_directory_begin(const char *final) {
    size_t length = strlen(final);
    while (length > 1 && final[length - 1] == '/') length--;
    if (length == 0 || length > RETROFIT_PATH - 96)
        return fail_null("'%s' is no name for a directory", final);
    char *path = retrofit_allocate(RETROFIT_PATH, 1);
    if (!path) return NULL;
    snprintf(path, RETROFIT_PATH, "%.*s.tmp-%ld", (int)length, final, (long)getpid());
    retrofit_directory_abandon(path); // an earlier process with this number may have left one
    set_unfinished(path);
    if (retrofit_make_directories(path, true)) return path;
    clear_unfinished(path);
    free(path);
    return NULL;
}

void retrofit_directory_abandon(const char *temporary) {
    char path[RETROFIT_PATH];
    DIR *directory = opendir(temporary);
    if (!directory) return;
    for (struct dirent *e = readdir(directory); e; e = readdir(directory)) {
        bool itself = !strcmp(e->d_name, ".") || !strcmp(e->d_name, "..");
        if (!itself && retrofit_path(path, temporary, e->d_name)) unlink(path);
    }
    closedir(directory);
    rmdir(temporary);
    clear_unfinished(temporary);
}

bool retrofit_directory_commit(const char *temporary, const char *final) {
    char parent[RETROFIT_PATH];
    snprintf(parent, sizeof parent, "%s", temporary);
    retrofit_parent_directory(parent);
    if (!retrofit_sync_directory(temporary)) return false;
    if (rename(temporary, final)) {
        bool exists = errno == ENOTEMPTY || errno == ENOTDIR;
        return retrofit_fail("%s: %s", final,
                             exists ? "exists already: remove it" : strerror(errno));
    }
    clear_unfinished(temporary);
    return retrofit_sync_directory(parent);
}

// OUT/latest is a link to the newest checkpoint. Where links cannot be, it is a file that holds
// that checkpoint's name; a run that was copied without its links has a copy in its place.
bool retrofit_latest(const char *directory, char path[RETROFIT_PATH]) {
    struct stat status;
    char link[RETROFIT_PATH], name[64] = {0};
    if (!retrofit_path(path, directory, "latest")) return false;
    if (stat(path, &status) == 0 && S_ISDIR(status.st_mode)) return true;
    if (stat(path, &status) || !S_ISREG(status.st_mode))
        return retrofit_fail("%s: there is no checkpoint", path);
    memcpy(link, path, sizeof link);
    FILE *file = fopen(link, "rb");
    bool read = file && fread(name, 1, sizeof name - 1, file) > 0;
    if (file) fclose(file);
    name[strcspn(name, "\r\n")] = 0;
    bool is_name = read && !strncmp(name, "step_", 5) && !strchr(name, '/');
    if (is_name && retrofit_path(path, directory, name)) return true;
    return retrofit_fail("%s: not the name of a checkpoint", link);
}

const char *retrofit_model_directory(const char *directory, char path[RETROFIT_PATH]) {
    bool model = retrofit_path(path, directory, "config.json") && retrofit_is_there(path);
    if (model) return directory;
    return retrofit_latest(directory, path) ? path : directory;
}

// Tensors to write to a file, or to look for in one, with memory for names that have to be made.
typedef struct {
    retrofit_tensor *tensors;
    char (*names)[96];
    size_t count;
} tensor_list;

static bool tensor_list_new(tensor_list *list, size_t max) {
    list->tensors = retrofit_allocate(max, sizeof *list->tensors);
    list->names = retrofit_allocate(max, sizeof *list->names);
    list->count = 0;
    return list->tensors && list->names;
}

static void tensor_list_free(tensor_list *list) {
    free(list->tensors);
    free(list->names);
}

static retrofit_tensor *tensor_list_add(tensor_list *list, const char *prefix, const char *name,
                                        retrofit_type type, size_t rows, size_t cols,
                                        const void *data) {
    snprintf(list->names[list->count], sizeof *list->names, "%s%s", prefix, name);
    retrofit_tensor tensor = {list->names[list->count], type, 2, {rows, cols}, rows * cols, data};
    list->tensors[list->count] = tensor;
    return &list->tensors[list->count++];
}

// The weights: every source tensor under its name.
static bool list_weights(const retrofit_model *model, tensor_list *list) {
    if (!tensor_list_new(list, 3 * model->parameter_count)) return false;
    for (size_t i = 0; i < model->parameter_count; i++) {
        const retrofit_parameter *parameter = model->parameters[i];
        retrofit_type type = parameter->master ? RETROFIT_F32 : parameter->weight.type;
        const char *data = parameter->weight.data;
        if (parameter->master) data = (const char *)parameter->master;
        for (size_t j = 0; j < parameter->sources; j++) {
            const retrofit_source_tensor *source = &parameter->source[j];
            retrofit_tensor *tensor =
                tensor_list_add(list, "", source->name, type, source->rows, parameter->cols, data);
            data += tensor->count * retrofit_type_size(type);
            if (!is_vector(parameter->kind)) continue;
            tensor->dims = 1;
            if (parameter->kind == RETROFIT_NORM) tensor->shape[0] = parameter->cols;
        }
    }
    return true;
}

// The moments: m and v of a parameter, if it has them, under its label.
static bool list_moments(const retrofit_model *model, tensor_list *list) {
    if (!tensor_list_new(list, 2 * model->parameter_count)) return false;
    for (size_t i = 0; i < model->parameter_count; i++) {
        const retrofit_parameter *parameter = model->parameters[i];
        const char *label = parameter->source[0].name;
        size_t rows = parameter->rows, cols = parameter->cols;
        if (parameter->m)
            tensor_list_add(list, "m.", label, RETROFIT_F32, rows, cols, parameter->m);
        if (parameter->v)
            tensor_list_add(list, "v.", label, RETROFIT_F32, rows, cols, parameter->v);
    }
    return true;
}

bool retrofit_copy_file(const char *from, const char *to) {
    size_t size;
    char *text = retrofit_read_file(from, &size);
    if (!text) return false;
    FILE *file = fopen(to, "wb");
    bool ok = file != NULL;
    if (ok) ok = retrofit_finish_file(file, to, fwrite(text, 1, size, file) == size);
    else retrofit_fail("%s: %s", to, strerror(errno));
    free(text);
    return ok;
}

// First those that belong to a tokenizer or are modelling code, the authors' or ours, which are
// copied where the source has them; then those that are written.
const char *const retrofit_model_files[] = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja",
    "raven_config_minimal.py", "raven_modeling_minimal_llama.py", "raven_modeling_minimal_olmo.py",
    RETROFIT_MODELLING,
    "config.json", "generation_config.json", "model.safetensors", NULL};

static bool copy_companions(const char *from, const char *to) {
    char source[RETROFIT_PATH], target[RETROFIT_PATH];
    for (size_t i = 0; strcmp(retrofit_model_files[i], "config.json"); i++) {
        const char *name = retrofit_model_files[i];
        if (!retrofit_path(source, from, name)) return false;
        if (!retrofit_path(target, to, name)) return false;
        if (!retrofit_is_there(source) || retrofit_is_there(target)) continue;
        if (!retrofit_copy_file(source, target)) return false;
    }
    if (!retrofit_path(source, from, "additional_chat_templates")) return false;
    if (retrofit_is_there(source))
        retrofit_note("%s: is not copied, as chat_template.jinja and tokenizer_config.json are",
                      source);
    return true;
}

// Writes a value as JSON. The parser's limit of the depth bounds the recursion.
static void write_json_value(FILE *file, const retrofit_json *value) {
    bool is_object = value->type == RETROFIT_JSON_OBJECT;
    if (value->type == RETROFIT_JSON_STRING) {
        retrofit_json_write_string(file, value->string, value->length);
        return;
    }
    if (!is_object && value->type != RETROFIT_JSON_ARRAY) {
        fputs(retrofit_json_value_text(value), file);
        return;
    }
    fputc(is_object ? '{' : '[', file);
    for (const retrofit_json *child = value->child; child; child = child->next) {
        if (is_object) write_json_key(file, child->key);
        write_json_value(file, child);
        if (child->next) fputs(", ", file);
    }
    fputc(is_object ? '}' : ']', file);
}

// What the source's generation_config.json says, but with the model's ids.
static void write_generation_json(FILE *file, const retrofit_config *config,
                                  const retrofit_json *source) {
    const retrofit_json *version = retrofit_json_get(source, "transformers_version");
    const retrofit_key ours = {"bos_token_id eos_token_id pad_token_id transformers_version", NULL,
                               "written below"};
    bool has_version = version && version->type == RETROFIT_JSON_STRING;
    const char *last = has_version ? version->string : "4.57.1";
    fprintf(file, "{\n");
    for (const retrofit_json *member = source->child; member; member = member->next) {
        if (retrofit_key_find(member->key, &ours, 1)) continue;
        fprintf(file, "  ");
        write_json_key(file, member->key);
        fputc(' ', file);
        write_json_value(file, member);
        fprintf(file, ",\n");
    }
    write_config_ids(file, config);
    fprintf(file, "  \"transformers_version\": ");
    retrofit_json_write_string(file, last, strlen(last));
    fprintf(file, "\n}\n");
}

// transformers takes ids from generation_config.json where it is there: it is written anew, since
// the source's ids may be another model's.
static bool copy_generation_config(const retrofit_config *config, const char *from,
                                   const char *to) {
    char source[RETROFIT_PATH], target[RETROFIT_PATH];
    if (!retrofit_path(source, from, "generation_config.json")) return false;
    if (!retrofit_path(target, to, "generation_config.json")) return false;
    if (!retrofit_is_there(source)) return true;
    retrofit_json *json = retrofit_json_read(source, NULL);
    FILE *file = json ? fopen(target, "wb") : NULL;
    if (json && !file) retrofit_fail("%s: %s", target, strerror(errno));
    if (file) write_generation_json(file, config, json);
    bool ok = file && retrofit_finish_file(file, target, true);
    retrofit_json_free(json);
    return ok;
}

bool retrofit_save(const retrofit_model *model, const char *directory, retrofit_type type,
                   const char *tokenizer_from) {
    char path[RETROFIT_PATH], latest[RETROFIT_PATH];
    tensor_list list;
    bool ok = list_weights(model, &list) && retrofit_path(path, directory, "model.safetensors") &&
              retrofit_safetensors_write(path, model->ops, list.tensors, list.count, type, NULL);
    tensor_list_free(&list);
    if (!ok) return false;
    if (tokenizer_from) tokenizer_from = retrofit_model_directory(tokenizer_from, latest);
    if (tokenizer_from && !copy_companions(tokenizer_from, directory)) return false;
    if (!retrofit_config_write(&model->config, type, directory)) return false;
    return !tokenizer_from ||
           copy_generation_config(&model->config, tokenizer_from, directory);
}

bool retrofit_save_optimizer(const retrofit_model *model, const char *directory,
                             const char *const *metadata) {
    char path[RETROFIT_PATH];
    tensor_list list;
    bool ok = list_moments(model, &list) &&
              retrofit_path(path, directory, "optimizer.safetensors") &&
              retrofit_safetensors_write(path, model->ops, list.tensors, list.count, RETROFIT_F32,
                                         metadata);
    tensor_list_free(&list);
    return ok;
}

static bool upload_moments(const retrofit_model *model, const retrofit_map *map,
                           const tensor_list *list) {
    bool alone = !model->ranks || model->ranks->count == 1; // the others have the rest of them
    if (alone && list->count != map->count)
        return retrofit_fail("%s: %zu moments where the optimizer has %zu: was it another one?",
                             map->path, map->count, list->count);
    for (size_t i = 0; i < list->count; i++) {
        const retrofit_tensor *moment = &list->tensors[i];
        const retrofit_tensor *saved = retrofit_safetensors_find(map, moment->name);
        bool fits = saved && saved->type == RETROFIT_F32 && saved->dims == 2 &&
                    saved->shape[0] == moment->shape[0] && saved->shape[1] == moment->shape[1];
        if (!fits)
            return retrofit_fail("%s: %s is missing or of another shape", map->path, moment->name);
        model->ops->upload((void *)moment->data, saved->data, saved->count * sizeof(float));
    }
    return true;
}

bool retrofit_load_optimizer(retrofit_model *model, retrofit_map *map, const char *directory) {
    char path[RETROFIT_PATH];
    tensor_list list;
    if (!retrofit_path(path, directory, "optimizer.safetensors")) return false;
    if (!retrofit_safetensors_open(map, path)) return false;
    bool ok = list_moments(model, &list) && upload_moments(model, map, &list);
    tensor_list_free(&list);
    if (!ok) retrofit_safetensors_close(map);
    return ok;
}

// ---- Token shards ------------------------------------------------------------------------------

enum { SHARD_HEADER = 1024 }; // bytes

typedef struct {
    void *base;
    size_t bytes, width, rows; // width: bytes of a token; rows: what is left at the end is not used
    size_t first_row;          // how many rows are in the shards before
    void *label_file;          // as it lies in memory; NULL: every token counts
    size_t label_bytes;        // of it
    uint64_t hash;             // retrofit_sample_hash of all of it; 0: not computed yet
    struct stat status;        // of the file when it was opened
} token_shard;

struct retrofit_data {
    size_t T, vocab, rows;
    glob_t files;
    token_shard *shards;  // [files.gl_pathc]
    uint64_t seed, epoch; // of `order`
    size_t *order;        // [rows] rows in the order of the epoch; NULL: as they lie in the files
};

// Text has no control characters but white space; the header of a shard has zeros.
static bool looks_like_text(const unsigned char *bytes, size_t size) {
    for (size_t i = 0; i < size; i++) {
        bool space = bytes[i] >= '\t' && bytes[i] <= '\r';
        if (bytes[i] < ' ' && !space) return false;
    }
    return true;
}

static uint64_t shard_hash(token_shard *shard) {
    if (!shard->hash) shard->hash = retrofit_sample_hash(shard->base, shard->bytes);
    return shard->hash;
}

static const int32_t *shard_labels(const token_shard *shard) {
    if (!shard->label_file) return NULL;
    return (const void *)((const char *)shard->label_file + SHARD_HEADER);
}

// The labels beside a shard, if there are any, must be those that were made with it.
static bool open_labels(token_shard *shard, const char *path) {
    char name[RETROFIT_PATH + sizeof RETROFIT_LABELS_SUFFIX];
    const int32_t *header = shard->base;
    size_t bytes = SHARD_HEADER + (size_t)header[2] * sizeof(int32_t);
    snprintf(name, sizeof name, "%s%s", path, RETROFIT_LABELS_SUFFIX);
    if (!retrofit_is_there(name)) {
        if (!header[5]) return true;
        return retrofit_fail("%s: not there, but %s was made with labels, which say what of it is "
                             "to be learned: keep the two together, or make both anew", name, path);
    }
    shard->label_file = retrofit_map_file(name, &shard->label_bytes);
    if (!shard->label_file) return false;
    const uint32_t *labels = shard->label_file;
    bool known = shard->label_bytes >= SHARD_HEADER && labels[0] == RETROFIT_LABELS_MAGIC;
    if (!known || labels[1] != 1)
        return retrofit_fail("%s: no labels of a token shard, or of a version that is not known",
                             name);
    bool fits = labels[2] == (uint32_t)header[2] && shard->label_bytes == bytes;
    if (fits && (labels[3] | (uint64_t)labels[4] << 32) == shard_hash(shard)) return true;
    return retrofit_fail("%s: not the labels of %s as it is now: make both anew with convert "
                         "--tokenize%s", name, path, header[5] ? "" : ", or remove it");
}

static bool open_shard(retrofit_data *data, token_shard *shard, const char *path) {
    shard->base = retrofit_map_file(path, &shard->bytes);
    if (!shard->base) return false;
    if (stat(path, &shard->status)) return retrofit_fail("%s: %s", path, strerror(errno));
    const int32_t *header = shard->base;
    if (looks_like_text(shard->base, retrofit_min(shard->bytes, SHARD_HEADER)))
        return retrofit_fail("%s: text, not a token shard: make one with convert --tokenize %s "
                             "--tokenizer MODEL --to NAME.bin", path, path);
    if (shard->bytes < SHARD_HEADER)
        return retrofit_fail("%s: %zu bytes are no token shard: the header alone has 1024", path,
                             shard->bytes);
    if (header[0] == RETROFIT_SHARD_MAGIC_16 && header[1] == 1) shard->width = 2;
    else if (header[0] == RETROFIT_SHARD_MAGIC_32 && header[1] == 7) shard->width = 4;
    else if (header[0] == RETROFIT_LABELS_MAGIC)
        return retrofit_fail("%s: labels, which are read with their token shard, not a shard: "
                             "leave them out, as by '*.bin'", path);
    else
        return retrofit_fail("%s: not a token shard, or of a version that is not known: make one "
                             "with convert --tokenize FILE.txt --tokenizer MODEL --to NAME.bin",
                             path);
    size_t tokens = (shard->bytes - SHARD_HEADER) / shard->width;
    bool whole = (shard->bytes - SHARD_HEADER) % shard->width == 0;
    if (header[2] < 0 || (size_t)header[2] != tokens || !whole)
        return retrofit_fail("%s: the header promises %d tokens, the file holds %zu: truncated, "
                             "or damaged", path, header[2], tokens);
    if (header[5] < 0 || header[5] > 1)
        return retrofit_fail("%s: of a version that is not known: %d in its header", path,
                             header[5]);
    shard->rows = tokens / (data->T + 1);
    shard->first_row = data->rows;
    data->rows += shard->rows;
    return open_labels(shard, path);
}

// The name of a file as a pattern that matches it alone. NULL or error.
static char *escape_pattern(const char *name) {
    char *pattern = retrofit_allocate(2 * strlen(name) + 1, 1), *out = pattern;
    if (!pattern) return NULL;
    for (; *name; name++) {
        if (strchr("[]?*\\", *name)) *out++ = '\\';
        *out++ = *name;
    }
    return pattern;
}

// Names may hold what means something in a pattern, as data[1].bin does: a file that is there comes
// first.
static bool find_data_files(retrofit_data *data, const char *pattern) {
    bool is_file = retrofit_is_there(pattern);
    char *escaped = is_file ? escape_pattern(pattern) : NULL;
    if (is_file && !escaped) return false;
    int problem = glob(is_file ? escaped : pattern, 0, NULL, &data->files);
    free(escaped);
    if (!problem) return true;
    return retrofit_fail("%s: %s", pattern,
                         problem == GLOB_NOMATCH   ? "no such file"
                         : problem == GLOB_NOSPACE ? "out of memory"
                                                   : "cannot be searched");
}

// Says which files are too short for a row; up to three of them by their names.
static void note_short_shards(const retrofit_data *data) {
    retrofit_text names = {0};
    size_t count = 0;
    for (size_t i = 0; i < data->files.gl_pathc; i++) {
        if (data->shards[i].rows > 0) continue;
        const char *name = count < 3 ? data->files.gl_pathv[i] : "…";
        if (count <= 3) retrofit_text_append_item(&names, name);
        count++;
    }
    retrofit_text_append(&names, "", 1);
    if (count && !names.failed)
        retrofit_note("%zu of %zu shards have fewer tokens than one row of %zu and are not used: "
                      "%s", count, data->files.gl_pathc, data->T + 1, names.bytes);
    free(names.bytes);
}

// Rows do not go over from one file into the next: what is left at its end is not used.
static void note_unused_tokens(const retrofit_data *data) {
    size_t tokens = 0, used = data->rows * (data->T + 1);
    for (size_t i = 0; i < data->files.gl_pathc; i++) {
        const token_shard *shard = &data->shards[i];
        if (shard->rows > 0) tokens += (shard->bytes - SHARD_HEADER) / shard->width;
    }
    if (10 * (tokens - used) > tokens)
        retrofit_note("%zu of %zu tokens are left over at the ends of shards, where they make no "
                      "row of %zu, and are not used", tokens - used, tokens, data->T + 1);
}

static bool open_data_files(retrofit_data *data, const char *pattern, bool shuffle) {
    if (!find_data_files(data, pattern)) return false;
    data->shards = retrofit_allocate(data->files.gl_pathc, sizeof *data->shards);
    if (!data->shards) return false;
    for (size_t i = 0; i < data->files.gl_pathc; i++) {
        if (!open_shard(data, &data->shards[i], data->files.gl_pathv[i])) return false;
    }
    if (data->rows == 0)
        return retrofit_fail("%s: fewer tokens than one row of %zu: no data", pattern, data->T + 1);
    note_short_shards(data);
    note_unused_tokens(data);
    if (shuffle) data->order = retrofit_allocate(data->rows, sizeof *data->order);
    return !shuffle || data->order;
}

retrofit_data *retrofit_data_open(const char *pattern, size_t T, size_t vocab, bool shuffle,
                                  uint64_t seed) {
    retrofit_data *data = retrofit_allocate(1, sizeof *data);
    if (!data) return NULL;
    data->T = T;
    data->vocab = vocab;
    data->seed = seed;
    data->epoch = UINT64_MAX; // none is shuffled yet
    if (open_data_files(data, pattern, shuffle)) return data;
    retrofit_data_close(data);
    return NULL;
}

void retrofit_data_close(retrofit_data *data) {
    if (!data) return;
    for (size_t i = 0; data->shards && i < data->files.gl_pathc; i++) {
        token_shard *shard = &data->shards[i];
        if (shard->base) munmap(shard->base, shard->bytes);
        if (shard->label_file) munmap(shard->label_file, shard->label_bytes);
    }
    globfree(&data->files);
    free(data->shards);
    free(data->order);
    free(data);
}

size_t retrofit_data_rows(const retrofit_data *data) { return data->rows; }

bool retrofit_data_check(const retrofit_data *data, const retrofit_tokenizer *tokenizer) {
    uint64_t ours = tokenizer ? retrofit_tokenizer_hash(tokenizer) : 0;
    size_t count = data->files.gl_pathc, unknown = 0;
    const char *first = NULL; // of those whose tokenizer is unknown
    if (!tokenizer)
        retrofit_note("whether the data were made with the model's tokenizer cannot be checked: %s",
                      retrofit_error());
    for (size_t i = 0; i < count; i++) {
        const uint32_t *header = data->shards[i].base;
        const char *name = data->files.gl_pathv[i];
        uint64_t made_with = header[3] | (uint64_t)header[4] << 32;
        if (made_with == 0 && unknown++ == 0) first = name;
        if (!ours || !made_with || made_with == ours) continue;
        return retrofit_fail("%s: made with another tokenizer (%016llx) than the model's "
                             "(%016llx): make it anew, convert --tokenize --tokenizer MODEL", name,
                             (unsigned long long)made_with, (unsigned long long)ours);
    }
    if (unknown)
        retrofit_note("%zu of %zu shards, the first is %s, do not say which tokenizer made them "
                      "(llm.c's do not): that the ids are this model's cannot be checked", unknown,
                      count, first);
    return true;
}

static uint32_t shard_id(const token_shard *shard, size_t i) {
    uint32_t id = 0;
    memcpy(&id, (const char *)shard->base + SHARD_HEADER + i * shard->width, shard->width);
    return id;
}

static bool fail_id(const retrofit_data *data, size_t shard, size_t i, uint32_t id) {
    return retrofit_fail("%s: token %zu is %u, but the vocabulary has %zu entries: tokenized for "
                         "another model?", data->files.gl_pathv[shard], i, id, data->vocab);
}

static bool fail_label(const retrofit_data *data, size_t shard, size_t i, int32_t label) {
    return retrofit_fail("%s%s: label %zu is %d, neither -100 nor the token there: damaged; make "
                         "it anew with convert --tokenize", data->files.gl_pathv[shard],
                         RETROFIT_LABELS_SUFFIX, i, (int)label);
}

static bool label_fits(const token_shard *shard, size_t i) {
    int32_t label = shard_labels(shard)[i];
    return label == RETROFIT_IGNORED || label == (int32_t)shard_id(shard, i);
}

static bool check_labels(const retrofit_data *data) {
    for (size_t s = 0; s < data->files.gl_pathc; s++) {
        const token_shard *shard = &data->shards[s];
        size_t count = (shard->bytes - SHARD_HEADER) / shard->width, wrong = count;
        if (!shard->label_file) continue;
#ifdef _OPENMP
#pragma omp parallel for reduction(min : wrong) schedule(static)
#endif
        for (size_t i = 0; i < count; i++)
            if (!label_fits(shard, i)) wrong = retrofit_min(wrong, i);
        if (wrong < count) return fail_label(data, s, wrong, shard_labels(shard)[wrong]);
    }
    return true;
}

// Says how many labels count in rows, if there are any but the tokens themselves.
static void note_labels(const retrofit_data *data) {
    size_t T = data->T, counted = 0, rows = 0, shards = 0, without = 0;
    for (size_t s = 0; s < data->files.gl_pathc; s++) {
        const token_shard *shard = &data->shards[s];
        const int32_t *labels = shard_labels(shard);
        if (!labels) continue;
        shards++;
        rows += shard->rows;
#ifdef _OPENMP
#pragma omp parallel for reduction(+ : counted, without) schedule(static)
#endif
        for (size_t row = 0; row < shard->rows; row++) {
            size_t n = retrofit_count_labels(labels + row * (T + 1) + 1, T);
            counted += n;
            without += n == 0;
        }
    }
    if (!shards) return;
    char none[128] = "";
    if (without)
        snprintf(none, sizeof none, "; %zu rows have none, and a micro-batch of such rows alone "
                 "counts as 0, without a gradient", without);
    retrofit_note("%zu of %zu shards have labels: by them %zu of %zu tokens in %zu rows count%s",
                  shards, data->files.gl_pathc, counted, rows * T, rows, none);
}

static bool check_ids(const retrofit_data *data);

bool retrofit_data_check_ids(const retrofit_data *data) {
    if (!check_ids(data) || !check_labels(data)) return false;
    note_labels(data);
    return true;
}

bool retrofit_data_check_counted(const retrofit_data *data, size_t rows) {
    size_t T = data->T;
    for (size_t s = 0; s < data->files.gl_pathc; s++) {
        const token_shard *shard = &data->shards[s];
        const int32_t *labels = shard_labels(shard);
        for (size_t row = 0; row < shard->rows && shard->first_row + row < rows; row++)
            if (!labels || retrofit_count_labels(labels + row * (T + 1) + 1, T)) return true;
    }
    return retrofit_fail("%s: by the labels nothing counts in the first %zu rows of %zu tokens: "
                         "there is nothing to learn or to measure", data->files.gl_pathv[0],
                         retrofit_min(rows, data->rows), T);
}

// The largest id of a shard decides; only if it is too large is the first such one looked for.
static bool check_ids(const retrofit_data *data) {
    for (size_t s = 0; s < data->files.gl_pathc; s++) {
        const token_shard *shard = &data->shards[s];
        size_t count = (shard->bytes - SHARD_HEADER) / shard->width, i = 0;
        const uint16_t *narrow = (const void *)((const char *)shard->base + SHARD_HEADER);
        const uint32_t *wide = (const void *)narrow;
        uint32_t max = 0;
        if (shard->width == 2 && data->vocab > UINT16_MAX) continue; // any uint16 will do
#ifdef _OPENMP
#pragma omp parallel for reduction(max : max) schedule(static)
#endif
        for (size_t j = 0; j < count; j++) {
            uint32_t id = shard->width == 2 ? narrow[j] : wide[j];
            if (id > max) max = id;
        }
        if (max < data->vocab) continue;
        while (shard_id(shard, i) < data->vocab) i++;
        return fail_id(data, s, i, shard_id(shard, i));
    }
    return true;
}

// Headers may differ: in labels, or in the tokenizer's hash, which llm.c does not write.
static bool same_tokens(const token_shard *a, const token_shard *b) {
    if (a->status.st_dev == b->status.st_dev && a->status.st_ino == b->status.st_ino) return true;
    const char *x = a->base, *y = b->base;
    if (a->bytes != b->bytes || a->width != b->width) return false;
    return !memcmp(x + SHARD_HEADER, y + SHARD_HEADER, a->bytes - SHARD_HEADER);
}

bool retrofit_data_check_apart(const retrofit_data *data, const retrofit_data *other) {
    for (size_t i = 0; i < data->files.gl_pathc; i++) {
        const token_shard *a = &data->shards[i];
        for (size_t j = 0; j < other->files.gl_pathc; j++) {
            const token_shard *b = &other->shards[j];
            const char *x = data->files.gl_pathv[i], *y = other->files.gl_pathv[j];
            if (same_tokens(a, b))
                return retrofit_fail("%s: the same as %s: validation data must not be trained on: "
                                     "keep them in a place of their own", y, x);
        }
    }
    return true;
}

char *retrofit_data_describe(const retrofit_data *data) {
    retrofit_text text = {0};
    for (size_t i = 0; i < data->files.gl_pathc; i++) {
        const char *path = data->files.gl_pathv[i], *slash = strrchr(path, '/');
        token_shard *shard = &data->shards[i];
        char line[64];
        unsigned long long hash = shard_hash(shard);
        if (shard->label_file)
            hash = retrofit_hash(hash, retrofit_sample_hash(shard->label_file, shard->label_bytes));
        snprintf(line, sizeof line, " %zu %016llx\n", shard->bytes, hash);
        const char *name = slash ? slash + 1 : path;
        retrofit_text_append(&text, name, strlen(name));
        retrofit_text_append(&text, line, strlen(line));
    }
    retrofit_text_append(&text, "", 1);
    if (!text.failed) return text.bytes;
    free(text.bytes);
    return NULL;
}

// The order of an epoch, by Fisher and Yates: a function of the seed and the epoch alone, so that a
// run that is resumed goes on with the same rows.
static void shuffle_rows(retrofit_data *data, uint64_t epoch) {
    uint64_t key = retrofit_hash(data->seed, epoch);
    for (size_t i = 0; i < data->rows; i++) {
        size_t j = (size_t)(retrofit_hash(key, i) % (i + 1));
        data->order[i] = data->order[j];
        data->order[j] = i;
    }
    data->epoch = epoch;
}

// The last shard that begins with this row or before it: it has the row, since shards that are too
// short for one lie before another that begins with the same row, or behind all rows.
static size_t find_shard(const retrofit_data *data, size_t row) {
    size_t low = 0, high = data->files.gl_pathc;
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (data->shards[middle].first_row <= row) low = middle;
        else high = middle;
    }
    return low;
}

// A file that became shorter ends the program where the missing part is touched.
static bool is_still_whole(const token_shard *shard, const char *path) {
    char name[RETROFIT_PATH + sizeof RETROFIT_LABELS_SUFFIX];
    struct stat status;
    snprintf(name, sizeof name, "%s", path);
    bool shorter = stat(name, &status) == 0 && (size_t)status.st_size < shard->bytes;
    if (!shorter && shard->label_file) {
        snprintf(name, sizeof name, "%s%s", path, RETROFIT_LABELS_SUFFIX);
        shorter = stat(name, &status) == 0 && (size_t)status.st_size < shard->label_bytes;
    }
    if (!shorter) return true;
    return retrofit_fail("%s: became shorter while it was read: a shard must not change during a "
                         "run", name);
}

bool retrofit_data_row(retrofit_data *data, uint64_t index, int32_t *tokens, int32_t *labels) {
    uint64_t epoch = index / data->rows;
    size_t row = (size_t)(index % data->rows);
    if (data->order && data->epoch != epoch) shuffle_rows(data, epoch);
    if (data->order) row = data->order[row];
    size_t s = find_shard(data, row);
    row -= data->shards[s].first_row;

    size_t first = row * (data->T + 1);
    const token_shard *shard = &data->shards[s];
    const int32_t *own = shard_labels(shard);
    if (!is_still_whole(shard, data->files.gl_pathv[s])) return false;
    for (size_t t = 0; t <= data->T; t++) {
        uint32_t id = shard_id(shard, first + t);
        if (id >= data->vocab) return fail_id(data, s, first + t, id);
        if (own && !label_fits(shard, first + t))
            return fail_label(data, s, first + t, own[first + t]);
        if (t < data->T) tokens[t] = (int32_t)id;
        if (t > 0) labels[t - 1] = own ? own[first + t] : (int32_t)id;
    }
    return true;
}

// =================================================================================================
// 10  Matrix products at the machine's speed
// =================================================================================================

// ---- Vectors -----------------------------------------------------------------------------------
// VECTOR is the number of floats in a register. MULTIPLY_ADD rounds once: gcc may split what is
// written as a product and a sum, where it thinks that faster, and so give some rows other bits
// than others. WIDEN turns 16 bits into 32, and MAXIMUM is b where a is NaN: one instruction each,
// where gcc takes four, or works element by element.
#if defined __AVX512F__
#include <immintrin.h>
#define VECTOR 16
#define BROADCAST(x) (vector)_mm512_set1_ps(x)
#define MULTIPLY_ADD(a, b, c) (vector)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c))
#define MAXIMUM(a, b) (vector)_mm512_max_ps((__m512)(a), (__m512)(b))
#define WIDEN(halves) (vector_bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256(halves))
#elif defined __AVX2__ && defined __FMA__
#include <immintrin.h>
#define VECTOR 8
#define BROADCAST(x) (vector)_mm256_set1_ps(x)
#define MULTIPLY_ADD(a, b, c) (vector)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c))
#define MAXIMUM(a, b) (vector)_mm256_max_ps((__m256)(a), (__m256)(b))
#define WIDEN(halves) (vector_bits)_mm256_cvtepu16_epi32(_mm_loadu_si128(halves))
#else
#define VECTOR 4
#define BROADCAST(x) ((vector){x, x, x, x})
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#define MAXIMUM(a, b) maximum(a, b)
#define WIDEN(halves) __builtin_convertvector(*(const vector_halves_at *)(halves), vector_bits)
#endif

// Inlined even where a compiler finds it too large: its constant arguments must become constants.
#define INLINE static inline __attribute__((always_inline))
// A loop over registers. These have no index: an array of them exists only if the loop is unrolled.
#ifdef __clang__
#define UNROLL(i, n) _Pragma("clang loop unroll(full)") for (size_t i = 0; i < n; i++)
#else
#define UNROLL(i, n) _Pragma("GCC unroll 16") for (size_t i = 0; i < n; i++)
#endif

// gcc would load again what is used several times, and have no loads left for the rest.
#ifdef __x86_64__
#define STAYS_IN_REGISTER(x) __asm__("" : "+v"(x))
#else
#define STAYS_IN_REGISTER(x) (void)(x)
#endif

// A register, and the same in memory (_at): aligned like its elements only, and free to alias them.
typedef float vector __attribute__((vector_size(4 * VECTOR)));
typedef float vector_at __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
typedef float quad __attribute__((vector_size(16)));
typedef uint32_t vector_bits __attribute__((vector_size(4 * VECTOR)));
typedef uint16_t vector_halves_at __attribute__((vector_size(2 * VECTOR), aligned(2), may_alias));

#if VECTOR == 4
static inline vector maximum(vector a, vector b) {
    for (size_t l = 0; l < VECTOR; l++) a[l] = a[l] > b[l] ? a[l] : b[l];
    return a;
}
#endif

// ---- Sums, maxima, exponentials ----------------------------------------------------------------
// In a single running sum each addition waits for the one before, and a compiler must not reorder
// floating-point sums. So we do: element i is added to lane i mod LANES, which vectorises, and the
// lanes are added in pairs. The n mod LANES last elements, the tail, make a sum of their own.
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

// start·factor + Σ x_i.
static float add_up(float start, float factor, const float *x, size_t n) {
    float lanes[LANES] = {0}, tail = 0;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += x[i + l];
    for (; i < n; i++) tail += x[i];
    return start * factor + sum_lanes(lanes) + tail;
}

// NaN is passed over: it shows in the sum of exponentials that follows.
static float max_element(const float *x, size_t n) {
    vector lanes[4];
    UNROLL(v, 4) lanes[v] = BROADCAST(-INFINITY);
    size_t i = 0;
    for (; i + 4 * VECTOR <= n; i += 4 * VECTOR)
        UNROLL(v, 4) lanes[v] = MAXIMUM(*(const vector_at *)(x + i + v * VECTOR), lanes[v]);
    vector all = MAXIMUM(MAXIMUM(lanes[0], lanes[1]), MAXIMUM(lanes[2], lanes[3]));
    for (; i + VECTOR <= n; i += VECTOR) all = MAXIMUM(*(const vector_at *)(x + i), all);
    float max[VECTOR];
    memcpy(max, &all, sizeof max);
    for (size_t half = VECTOR / 2; half > 0; half /= 2)
        for (size_t l = 0; l < half; l++) max[l] = max[l] > max[l + half] ? max[l] : max[l + half];
    for (; i < n; i++) max[0] = x[i] > max[0] ? x[i] : max[0];
    return max[0];
}

// e^x to 1 part in 10^7, in arithmetic that vectorises: e^x = 2^n·e^r with n = round(x/log 2). For
// |r| ≤ log(2)/2 a polynomial is e^r, and 2^n is n added to the exponent's bits.
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

// Σ e^{x_i - max}. Also stores the terms, unless `terms` is NULL; it may be x. Vocabularies are
// large: blocks are summed in fp32, and the sums of blocks in double.
static double sum_exp(float *terms, const float *x, size_t n, float max) {
    enum { BLOCK = 4096 };
    float e[BLOCK];
    double sum = 0;
    for (size_t first = 0; first < n; first += BLOCK) {
        size_t count = retrofit_min(n - first, BLOCK), whole = count / LANES * LANES;
        for (size_t i = 0; i < count; i++) e[i] = fast_exp(x[first + i] - max);
        sum += (double)add_up(0, 1, e, whole) + add_up(0, 1, e + whole, count - whole);
        if (terms) memcpy(terms + first, e, count * sizeof *e);
    }
    return sum;
}

// ---- Matrix products: C = D + A·B --------------------------------------------------------------
// By the loops of BLIS (Van Zee and van de Geijn, ACM TOMS 41, 2015), outermost first:
//
//     jc      strips of NC columns of B and C
//     pc        blocks of KC terms of the sums: B's part (KC,NC) is packed
//     ic          MC rows of A and C: A's part (MC,KC) stays in the L2 cache
//     jr            panels of NR columns: B's part (KC,NR) stays in the L1
//     ir              MR rows
//                       micro-kernel: C's part (MR,NR) stays in registers
//
//                 K                          N                            N
//          ┌────┬─────────┐       ┌────┬────┬─────────┐        ┌────┬──────────────┐
//       MR │▒▒▒▒│         │    KC │▒▒▒▒│▒▒▒▒│         │     MR │████│              │
//          ├────┘         │       ├────┴────┘         │        ├────┘              │
//        M │              │   ·   │                   │ K  =   │                   │ M
//          │              │       │                   │        │                   │
//          └──────────────┘       └───────────────────┘        └───────────────────┘
//            KC                     NR   NR = NC                 NR
//
// For every k the micro-kernel adds the outer product of a column of A (MR) and a row of B (NR): it
// loads MR + NR numbers for MR·NR multiply-adds, so that arithmetic is the bottleneck, not loading.
// All else serves to keep it fed from the caches. "Packed" means copied to a buffer of the thread,
// in the very order in which the micro-kernel reads.
//
// A few rows (decoding some tokens) need every weight only a few times: reading B is all the cost,
// and packing would double it. If B has k contiguous, as wᵀ in y = x·wᵀ has, it is read in place:
// see multiply_group.
//
// The threads divide C among them. Each element is summed up by one thread, in an order that
// depends on nothing but K and whether the rows are few: its bits depend neither on the number of
// threads nor on the rows and columns that come with it.

// The micro-kernel's part of C takes 3·MR registers: 24 of AVX-512's 32, or 12 of 16; that of few
// rows 4·ABREAST.
#if VECTOR == 16
enum { MR = 8, MC = 64, ABREAST = 4 };
#else
enum { MR = 4, MC = 192, ABREAST = 3 };
#endif
enum {
    NR = 3 * VECTOR,
    KC = 384,
    NC = 576,            // a multiple of NR
    FEW = 64,            // rows, at most
    GROUP = 2 * ABREAST, // columns of B whose DEPTH terms stay in the L1 cache for all few rows
    DEPTH = 640,
    FAR = 12000          // elements of B, how far ahead it is fetched at least
};
static RETROFIT_THREAD_LOCAL _Alignas(64) float packed_a[MC * KC];
static RETROFIT_THREAD_LOCAL _Alignas(64) float packed_b[NC * KC];

static size_t ceil_of(size_t a, size_t b) { return (a + b - 1) / b; }

// ---- Views and parts of a product --------------------------------------------------------------

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
static matrix_product product_part(const matrix_product *product, size_t i, size_t M, size_t j,
                                   size_t N) {
    matrix_product p = *product;
    p.M = M;
    p.N = N;
    p.A = view_part(p.A, i, 0);
    p.B = view_part(p.B, 0, j);
    p.c += i * p.c_row + j;
    if (p.d) p.d += i * p.d_row + j;
    return p;
}

// Terms k … end - 1 of the sums; those before are in C already.
static matrix_product product_terms(const matrix_product *product, size_t k, size_t end) {
    matrix_product p = *product;
    p.K = end - k;
    p.A = view_part(p.A, 0, k);
    p.B = view_part(p.B, k, 0);
    if (k == 0) return p;
    p.d = p.c;
    p.d_row = p.c_row;
    return p;
}

// ---- Packing -----------------------------------------------------------------------------------

// One element, or a vector of them, as fp32. bf16 is the upper half of an fp32.
INLINE float load_one(const void *data, retrofit_type type, size_t at) {
    if (type == RETROFIT_F32) return ((const float *)data)[at];
    return retrofit_bf16_to_float(((const uint16_t *)data)[at]);
}

INLINE vector load_vector(const void *data, retrofit_type type, size_t at) {
    if (type == RETROFIT_F32) return *(const vector_at *)((const float *)data + at);
    return (vector)(WIDEN((const void *)((const uint16_t *)data + at)) << 16);
}

// A vector's quads are four elements each. Of each quad of a and the same of b, elements w, x, y
// and z: 0 to 3 are a's, 4 to 7 are b's.
#define PICK(q, e) ((e) < 4 ? 4 * (q) + (e) : VECTOR + 4 * (q) + (e)-4)
#define PICKS(q, w, x, y, z) PICK(q, w), PICK(q, x), PICK(q, y), PICK(q, z)
#if VECTOR == 16
#define SHUFFLE(a, b, w, x, y, z)                                                                  \
    __builtin_shufflevector(a, b, PICKS(0, w, x, y, z), PICKS(1, w, x, y, z),                      \
                            PICKS(2, w, x, y, z), PICKS(3, w, x, y, z))
#elif VECTOR == 8
#define SHUFFLE(a, b, w, x, y, z)                                                                  \
    __builtin_shufflevector(a, b, PICKS(0, w, x, y, z), PICKS(1, w, x, y, z))
#else
#define SHUFFLE(a, b, w, x, y, z) __builtin_shufflevector(a, b, PICKS(0, w, x, y, z))
#endif

// Each quad becomes a row of what was a column of quads.
INLINE void transpose_quads(vector v[4]) {
    vector a = SHUFFLE(v[0], v[1], 0, 4, 1, 5), b = SHUFFLE(v[2], v[3], 0, 4, 1, 5);
    vector c = SHUFFLE(v[0], v[1], 2, 6, 3, 7), d = SHUFFLE(v[2], v[3], 2, 6, 3, 7);
    v[0] = SHUFFLE(a, b, 0, 1, 4, 5);
    v[1] = SHUFFLE(a, b, 2, 3, 6, 7);
    v[2] = SHUFFLE(c, d, 0, 1, 4, 5);
    v[3] = SHUFFLE(c, d, 2, 3, 6, 7);
}

// Elements (i … i + 3, k … k + VECTOR - 1) of V, which has k contiguous, into a panel as described
// at pack.
INLINE void pack_block(float *panel, size_t width, matrix_view V, retrofit_type type, size_t i,
                       size_t k) {
    vector v[4];
    UNROLL(r, 4) v[r] = load_vector(V.data, type, (i + r) * V.row + k);
    transpose_quads(v);
    UNROLL(r, 4) UNROLL(q, VECTOR / 4)
        memcpy(panel + (k + 4 * q + r) * width + i, (const float *)&v[r] + 4 * q, 16);
}

// Elements (i … count - 1, k) of V, and zeros up to the panel's width.
INLINE void pack_row(float *row, size_t width, matrix_view V, retrofit_type type, size_t i,
                     size_t count, size_t k) {
    if (V.row == 1) {
        size_t at = k * V.col;
        for (; i + VECTOR <= count; i += VECTOR)
            *(vector_at *)(row + i) = load_vector(V.data, type, at + i);
        for (; type == RETROFIT_F32 && i + 4 <= count; i += 4)
            memcpy(row + i, (const float *)V.data + at + i, 16);
    }
    for (; i < width; i++)
        row[i] = i < count ? load_one(V.data, type, i * V.row + k * V.col) : 0;
}

// panel[k·width + i] = V(i, k) for k < depth and i < count, and 0 for count ≤ i < width; V is A or
// Bᵀ. What has k contiguous goes in blocks.
INLINE void pack_as(retrofit_type type, float *panel, size_t width, matrix_view V, size_t count,
                    size_t depth) {
    size_t i_end = V.col == 1 ? count / 4 * 4 : 0, k_end = depth / VECTOR * VECTOR;
    for (size_t i = 0; i < i_end; i += 4)
        for (size_t k = 0; k < k_end; k += VECTOR) pack_block(panel, width, V, type, i, k);
    for (size_t k = i_end == width ? k_end : 0; k < depth; k++)
        pack_row(panel + k * width, width, V, type, k < k_end ? i_end : 0, count, k);
}

static void pack(float *panel, size_t width, matrix_view V, size_t count, size_t depth) {
    if (V.type == RETROFIT_F32) pack_as(RETROFIT_F32, panel, width, V, count, depth);
    else pack_as(RETROFIT_BF16, panel, width, V, count, depth);
}

// ---- The micro-kernel --------------------------------------------------------------------------

// C = D + A·B for `rows` rows from i on, and from j on `vectors` registers of columns, as far as
// they exist. A: those rows; b: the panel, whose rows are b_row apart.
INLINE void micro_kernel(size_t rows, size_t vectors, const matrix_product *p, matrix_view A,
                         const float *b, size_t b_row, size_t i, size_t j) {
    const float *a = A.data;
    vector sum[MR][3] = {{{0}}};
    float *c = p->c + i * p->c_row + j;
    UNROLL(r, rows) {
        __builtin_prefetch(c + r * p->c_row, 1);
        __builtin_prefetch(c + r * p->c_row + vectors * VECTOR - 1, 1);
    }
    for (size_t k = 0; k < p->K; k++) {
        vector w[3];
        UNROLL(v, vectors) {
            w[v] = *(const vector_at *)(b + v * VECTOR);
            STAYS_IN_REGISTER(w[v]);
        }
        UNROLL(r, rows) UNROLL(v, vectors)
            sum[r][v] = MULTIPLY_ADD(BROADCAST(a[r * A.row]), w[v], sum[r][v]);
        a += A.col;
        b += b_row;
    }
    const float *d = p->d ? p->d + i * p->d_row + j : NULL;
    size_t n = p->N - j, c_row = p->c_row, d_row = p->d_row; // not read again after each store
    if (n < vectors * VECTOR) {
        for (size_t s = 0; s < n; s++)
            UNROLL(r, rows) c[r * c_row + s] =
                (d ? d[r * d_row + s] : 0) + sum[r][s / VECTOR][s % VECTOR];
        return;
    }
    if (d) {
        UNROLL(r, rows) UNROLL(v, vectors)
            sum[r][v] += *(const vector_at *)(d + r * d_row + v * VECTOR);
    }
    UNROLL(r, rows) UNROLL(v, vectors) *(vector_at *)(c + r * c_row + v * VECTOR) = sum[r][v];
}

// One function for each number of rows and registers: in a larger one gcc runs out of registers for
// the addresses.
typedef void kernel(const matrix_product *p, matrix_view A, const float *b, size_t b_row, size_t i,
                    size_t j);
#define KERNEL(rows, vectors)                                                                      \
    static void kernel_##rows##x##vectors(const matrix_product *p, matrix_view A, const float *b,  \
                                          size_t b_row, size_t i, size_t j) {                      \
        micro_kernel(rows, vectors, p, A, b, b_row, i, j);                                         \
    }
#define KERNELS(rows) KERNEL(rows, 1) KERNEL(rows, 2) KERNEL(rows, 3)
#define KERNEL_NAMES(rows) {kernel_##rows##x1, kernel_##rows##x2, kernel_##rows##x3}
KERNELS(1)
KERNELS(2)
KERNELS(4)
#if VECTOR == 16
KERNELS(8)
#endif
static kernel *const kernels[MR + 1][3] = {
    [1] = KERNEL_NAMES(1),
    [2] = KERNEL_NAMES(2),
    [4] = KERNEL_NAMES(4),
#if VECTOR == 16
    [8] = KERNEL_NAMES(8),
#endif
};

// ---- Many rows ---------------------------------------------------------------------------------

// Rows of A that are contiguous are read in place. So are others if only one or two panels need
// them: packing would cost more than it saves.
static bool is_packed(const matrix_product *p) {
    return p->A.type != RETROFIT_F32 || (p->A.col != 1 && p->N > 2 * NR);
}

// The first `rows` of A from row i on, whose columns are contiguous: each is read across all rows
// before the next, and every vector fills several panels.
static void pack_columns(const matrix_product *p, size_t i, size_t rows) {
    for (size_t k = 0; k < p->K; k++) {
        const float *column = (const float *)p->A.data + k * p->A.col + i;
        for (size_t row = 0; row < rows; row += VECTOR) {
            vector v = *(const vector_at *)(column + row);
            UNROLL(q, VECTOR / MR)
                memcpy(packed_a + (row + q * MR) * p->K + k * MR, (float *)&v + q * MR, 4 * MR);
        }
    }
}

static void pack_rows(const matrix_product *p, size_t begin, size_t end) {
    bool columns = p->A.row == 1 && p->A.type == RETROFIT_F32;
    size_t whole = columns ? (end - begin) / VECTOR * VECTOR : 0;
    if (whole) pack_columns(p, begin, whole);
    for (size_t i = begin + whole; i < end; i += MR) {
        size_t m = retrofit_min(MR, end - i);
        pack(packed_a + (i - begin) * p->K, MR, view_part(p->A, i, 0), m, p->K);
    }
}

// Loop ir: rows begin … end - 1 of A meet a panel, MR at a time, the rest by powers of 2.
static void multiply_panel(const matrix_product *p, const float *panel, size_t panel_row,
                           size_t begin, size_t end, size_t j) {
    size_t vectors = ceil_of(retrofit_min(NR, p->N - j), VECTOR), rows = MR;
    for (size_t i = begin; i < end; i += rows) {
        while (rows > end - i) rows /= 2;
        matrix_view A = view_part(p->A, i, 0);
        if (is_packed(p)) {
            size_t strip = (i - begin) / MR * MR;
            A = view_transposed(packed_a + strip * p->K + (i - begin - strip), MR);
        }
        kernels[rows][vectors - 1](p, A, panel, panel_row, i, j);
    }
}

// Rows of B that are contiguous are read to the strip's end, eight at a time.
static void pack_strip(const matrix_product *p) {
    size_t step = p->B.col == 1 ? 8 : p->K;
    for (size_t k = 0; k < p->K; k += step) {
        for (size_t j = 0; j < p->N; j += NR) {
            size_t n = retrofit_min(NR, p->N - j), width = ceil_of(n, VECTOR) * VECTOR;
            matrix_view part = transposed(view_part(p->B, k, j));
            pack(packed_b + j * p->K + k * width, width, part, n, retrofit_min(step, p->K - k));
        }
    }
}

// Whether panels of B are read in place: if they are needed once, and their rows are whole vectors.
static bool is_in_place(const matrix_product *p) {
    return p->M <= MR && p->B.type == RETROFIT_F32 && p->B.col == 1 && p->N % VECTOR == 0;
}

// Loops ic and jr, for one strip and one block of terms.
static void multiply_strip(const matrix_product *p) {
    bool in_place = is_in_place(p);
    if (!in_place) pack_strip(p);
    for (size_t i = 0; i < p->M; i += MC) {
        size_t end = retrofit_min(i + MC, p->M);
        if (is_packed(p)) pack_rows(p, i, end);
        for (size_t j = 0; j < p->N; j += NR) {
            size_t width = ceil_of(retrofit_min(NR, p->N - j), VECTOR) * VECTOR;
            if (in_place) multiply_panel(p, (const float *)p->B.data + j, p->B.row, i, end, j);
            else multiply_panel(p, packed_b + j * p->K, width, i, end, j);
        }
    }
}

// ---- Few rows ----------------------------------------------------------------------------------

static bool is_few(const matrix_product *p) {
    return p->M >= 1 && p->M <= FEW && p->B.row == 1 && p->A.col == 1 && p->A.type == RETROFIT_F32;
}

// The n elements at the end of a row or column, and zeros.
static vector load_rest(const void *data, retrofit_type type, size_t at, size_t n) {
    vector v = {0};
    for (size_t l = 0; l < n; l++) v[l] = load_one(data, type, at + l);
    return v;
}

// The lanes of four vectors added up.
INLINE void add_lanes(float totals[4], const vector sum[4]) {
    vector v[4] = {sum[0], sum[1], sum[2], sum[3]};
    transpose_quads(v);
    vector quads = (v[0] + v[1]) + (v[2] + v[3]);
    quad part[VECTOR / 4];
    memcpy(part, &quads, sizeof quads);
    for (size_t half = VECTOR / 8; half > 0; half /= 2)
        for (size_t q = 0; q < half; q++) part[q] += part[q + half];
    memcpy(totals, part, 16);
}

// What the processor is asked to fetch meanwhile, from each of the columns: `step` bytes for each
// vector of terms. Columns are too short for it to find out by itself. Asking for what does not
// exist does no harm.
typedef struct {
    const char *data;
    size_t column, step;
} lookahead;

// C = D + A·B for `rows` rows from i on and ABREAST columns from j on, as far as they exist. w: B,
// or a copy of it.
INLINE void dots(size_t rows, retrofit_type type, const matrix_product *p, matrix_view w, size_t i,
                 size_t j, lookahead ahead) {
    const float *a = (const float *)p->A.data + i * p->A.row;
    vector sum[ABREAST * 4] = {{0}}; // of each row and column, a partial sum in every lane
    size_t column[ABREAST], k = 0;
    UNROLL(s, ABREAST) column[s] = retrofit_min(j + s, p->N - 1) * w.col; // past the end: the last
    for (; k + VECTOR <= p->K; k += VECTOR) {
        vector b[ABREAST];
        UNROLL(s, ABREAST) {
            b[s] = load_vector(w.data, type, column[s] + k);
            STAYS_IN_REGISTER(b[s]);
            __builtin_prefetch(ahead.data + s * ahead.column, 0, 2);
        }
        ahead.data += ahead.step;
        UNROLL(r, rows) {
            vector x = *(const vector_at *)(a + r * p->A.row + k);
            STAYS_IN_REGISTER(x);
            UNROLL(s, ABREAST) sum[r * ABREAST + s] = MULTIPLY_ADD(b[s], x, sum[r * ABREAST + s]);
        }
    }
    if (k < p->K) {
        vector b[ABREAST];
        UNROLL(s, ABREAST) b[s] = load_rest(w.data, type, column[s] + k, p->K - k);
        UNROLL(r, rows) {
            vector x = load_rest(a, RETROFIT_F32, r * p->A.row + k, p->K - k);
            UNROLL(s, ABREAST) sum[r * ABREAST + s] = MULTIPLY_ADD(b[s], x, sum[r * ABREAST + s]);
        }
    }
    float totals[ABREAST * 4];
    UNROLL(four, ceil_of(rows * ABREAST, 4)) add_lanes(totals + 4 * four, sum + 4 * four);
    size_t n = retrofit_min(ABREAST, p->N - j);
    UNROLL(r, rows) {
        float *c = p->c + (i + r) * p->c_row + j;
        const float *d = p->d ? p->d + (i + r) * p->d_row + j : NULL;
        for (size_t s = 0; s < n; s++) c[s] = (d ? d[s] : 0) + totals[r * ABREAST + s];
    }
}

// A pass: `rows` rows from i on meet all columns.
#define PASS(rows)                                                                                 \
    static void pass_##rows(const matrix_product *p, matrix_view w, size_t i, lookahead ahead) {   \
        for (size_t j = 0; j < p->N; j += ABREAST) {                                               \
            if (w.type == RETROFIT_F32) dots(rows, RETROFIT_F32, p, w, i, j, ahead);               \
            else dots(rows, RETROFIT_BF16, p, w, i, j, ahead);                                     \
            ahead.data += ABREAST * ahead.column;                                                  \
        }                                                                                          \
    }
PASS(1)
PASS(2)
PASS(3)
PASS(4)
static void (*const pass_of[])(const matrix_product *, matrix_view, size_t, lookahead) = {
    pass_1, pass_2, pass_3, pass_4};

// One group of columns and one block of terms, by passes over the columns. What several of them
// read is widened once. Each fetches its share of a later group.
static void multiply_group(const matrix_product *p) {
    size_t size = retrofit_type_size(p->B.type), passes = ceil_of(p->M, 4);
    matrix_view w = p->B;
    if (passes > 1 && w.type != RETROFIT_F32) {
        pack(packed_b, p->K, w, p->K, p->N);
        w = view_transposed(packed_b, p->K);
    }
    size_t far = GROUP * (1 + FAR / (GROUP * p->B.col + 1)); // columns
    lookahead ahead = {NULL, p->B.col * size, VECTOR * size / passes};
    for (size_t pass = 0; pass < passes; pass++) {
        ahead.data = (const char *)p->B.data + far * ahead.column + pass * p->K * size / passes;
        pass_of[retrofit_min(4, p->M - pass * 4) - 1](p, w, pass * 4, ahead);
    }
}

// ---- The whole product -------------------------------------------------------------------------

// Loops jc and pc, for both ways.
static void multiply(const matrix_product *p, bool few) {
    size_t depth = few ? DEPTH : KC, width = few ? GROUP : p->M > MC ? NC : NR;
    size_t blocks = p->K ? ceil_of(p->K, depth) : 1;
    if (few && p->M <= 4 && blocks == 1) width = p->N; // a single pass keeps nothing in a cache
    for (size_t j = 0; j < p->N; j += width) {
        matrix_product strip = product_part(p, 0, p->M, j, retrofit_min(width, p->N - j));
        for (size_t block = 0; block < blocks; block++) {
            size_t k = block * p->K / blocks, end = (block + 1) * p->K / blocks;
            matrix_product terms = product_terms(&strip, k, end);
            (few ? multiply_group : multiply_strip)(&terms);
        }
    }
}

// By one thread, and never as few rows: the bits of attention's tiles must not depend on how many
// queries there are, whatever their number.
static void gemm_serial(size_t M, size_t N, size_t K, matrix_view A, matrix_view B, float *c,
                        size_t c_row, const float *d, size_t d_row) {
    multiply(&(matrix_product){M, N, K, A, B, c, d, c_row, d_row}, false);
}

// A tile's scores, q·kᵀ (rows,width), to rows TILE apart. The heads of a single query are few rows.
static void tile_scores(float *s, matrix_view q, matrix_view k, size_t rows, size_t width, size_t h,
                        bool single) {
    matrix_product p = {rows, width, h, q, transposed(k), s, NULL, TILE, 0};
    multiply(&p, single);
}

// How many threads are worth waking for so many multiply-adds.
static size_t gemm_threads(size_t work) {
#ifdef _OPENMP
    if (work > FEW_MULTIPLY_ADDS && !omp_in_parallel()) return (size_t)omp_get_max_threads();
#endif
    (void)work;
    return 1;
}

// Where part number `index` begins if units of `size` elements are divided into `parts`.
static size_t part_begin(size_t index, size_t units, size_t parts, size_t size) {
    return index * units / parts * size;
}

// C is cut into a grid of parts that are about square, not wide. Few rows make no more parts than
// there are threads: each begins with columns that nobody has fetched ahead.
static void gemm(size_t M, size_t N, size_t K, matrix_view A, matrix_view B, float *c, size_t c_row,
                 const float *d, size_t d_row) {
    matrix_product p = {M, N, K, A, B, c, d, c_row, d_row};
    bool few = is_few(&p);
    size_t threads = gemm_threads(M * N * K);
    if (threads == 1) {
        multiply(&p, few);
        return;
    }
    size_t rows = ceil_of(M, MR), down = 1;
    for (size_t x = 2; x <= (few ? 1 : retrofit_min(threads, rows)); x++)
        if (threads % x == 0 && x * x * N <= 2 * threads * M) down = x;
    size_t across = threads / down; // times a whole number, so that none is wider than NC
    if (!few) across *= ceil_of(N, across * NC);
    size_t unit = N >= 4 * across * NR ? NR : VECTOR, columns = ceil_of(N, unit);
    across = retrofit_min(columns, across);
    PARALLEL_TASKS(M * N * K)
    for (size_t t = 0; t < down * across; t++) {
        size_t i = part_begin(t / across, rows, down, MR);
        size_t i_end = retrofit_min(M, part_begin(t / across + 1, rows, down, MR));
        size_t j = part_begin(t % across, columns, across, unit);
        size_t j_end = retrofit_min(N, part_begin(t % across + 1, columns, across, unit));
        matrix_product part = product_part(&p, i, i_end - i, j, j_end - j);
        multiply(&part, few);
    }
}

// ---- Attention in tiles ------------------------------------------------------------------------
// FlashAttention-2 (Dao, arXiv 2307.08691). Of the scores (T,T) one tile exists at a time, and what
// lies above the diagonal never does:
//
//                    keys u
//                ┌────┬────┬────┐
//                │ ◣  │    │    │    forward: a task is a row of tiles, from left to right
//      queries t ├────┼────┼────┤
//                │ ██ │ ◣  │    │    backward: a task is all tiles of the query heads that share a
//                ├────┼────┼────┤    key/value head, whose dk and dv it adds up in a fixed order
//                │ ██ │ ██ │ ◣  │
//                └────┴────┴────┘
//
// Forward keeps the maximum m of a query's scores so far, l = Σ e^{s - m}, and y = Σ e^{s - m}·v.
// If a tile raises the maximum to m', l and y are first multiplied by e^{m - m'}. At the end y is
// divided by l, and lse = m + log l.

// One head of one sequence.
typedef struct {
    size_t T, h, Q, H;
    matrix_view q, k, v, dy;  // (T,h)
    const float *lse, *delta; // (T), elements H apart
    float *dq, *dk, *dv;      // (T,h), rows Q apart; added to
} attention_head;

// Up to where a row of a tile is computed of which a query sees so many keys: loops over whole
// vectors have no remainder, which would take longer than they. What is too much becomes 0.
static size_t whole_lanes(size_t seen) { return ceil_of(seen, LANES) * LANES; }

// Turns a query's q·k into e^{q·k/√h - m}, for the `seen` keys that it may see, and 0 for the rest.
// scale is 1/√h, and *max is m without it. Updates *max and the sum l; returns e^{m - m'}. The sum
// goes to `seen` and not to the tile's width: a query's bits must not depend on how many others
// come with it.
static float softmax_row(float *p, size_t seen, size_t width, float scale, float *max, float *sum) {
    size_t end = whole_lanes(seen);
    for (size_t u = seen; u < end; u++) p[u] = -INFINITY;
    float tile_max = max_element(p, end);
    float new_max = tile_max > *max ? tile_max : *max;
    float shrink = fast_exp((*max - new_max) * scale);
    for (size_t u = 0; u < end; u++) p[u] = fast_exp((p[u] - new_max) * scale);
    memset(p + seen, 0, (retrofit_max(width, end) - seen) * sizeof *p);
    *sum = add_up(*sum, shrink, p, end);
    *max = new_max;
    return shrink;
}

// One row of tiles: y (rows,h), whose rows are y_row apart, and lse, NULL or with elements lse_row
// apart. q begins at its first query, k and v at key 0. Row i is query i, which sees before + i + 1
// keys; or, with `single`, a head of the one query, and they share the keys.
static void attend(float *y, size_t y_row, float *lse, size_t lse_row, matrix_view q, matrix_view k,
                   matrix_view v, size_t rows, bool single, size_t before, size_t h) {
    float s[TILE * TILE], max[TILE], sum[TILE], scale = 1.0f / sqrtf((float)h);
    size_t keys = before + (single ? 1 : rows);
    for (size_t i = 0; i < rows; i++) {
        max[i] = -INFINITY;
        sum[i] = 0;
    }
    for (size_t u = 0; u < keys; u += TILE) {
        size_t width = retrofit_min(keys - u, TILE);
        // (1) the tile's scores, q·kᵀ
        tile_scores(s, q, view_part(k, u, 0), rows, width, h, single);
        // (2) e^{s - m}; what was summed up under another maximum is scaled
        for (size_t i = 0; i < rows; i++) {
            size_t end = before + (single ? 1 : i + 1); // of the keys that the query sees
            size_t seen = end > u ? retrofit_min(end - u, width) : 0;
            float shrink = softmax_row(s + i * TILE, seen, width, scale, &max[i], &sum[i]);
            if (u == 0 || shrink == 1) continue;
            for (size_t c = 0; c < h; c++) y[i * y_row + c] *= shrink;
        }
        // (3) the tile's share of the output
        gemm_serial(rows, h, width, view(s, TILE), view_part(v, u, 0), y, y_row, u ? y : NULL,
                    y_row);
    }
    for (size_t i = 0; i < rows; i++) {
        for (size_t c = 0; c < h; c++) y[i * y_row + c] /= sum[i];
        if (lse) lse[i * lse_row] = max[i] * scale + logf(sum[i]);
    }
}

// Turns a query's q·k into p = e^{q·k/√h - lse}, and its dp into ds/√h = p·(dp - δ)/√h, for the
// keys that it sees; 0 for the rest.
static void softmax_backward_row(float *p, float *ds, size_t seen, size_t width, float scale,
                                 float lse, float delta) {
    size_t end = whole_lanes(seen), unseen = retrofit_max(width, end) - seen;
    memset(p + seen, 0, unseen * sizeof *p);
    memset(ds + seen, 0, unseen * sizeof *ds);
    for (size_t u = 0; u < end; u++) p[u] = fast_exp(p[u] * scale - lse);
    for (size_t u = 0; u < end; u++) ds[u] = p[u] * (ds[u] - delta) * scale;
    memset(p + seen, 0, unseen * sizeof *p);
    memset(ds + seen, 0, unseen * sizeof *ds);
}

// What the tile at (t, u) adds to dq, dk and dv.
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

static void attention_forward(act *out, float *lse, const act *qkv, size_t B, size_t T, size_t H,
                              size_t G, size_t h) {
    size_t Q = (H + 2 * G) * h, tiles = (T + TILE - 1) / TILE;
    float *y = out;
    PARALLEL_TASKS(B * T * H * h * T)
    for (size_t task = 0; task < B * H * tiles; task++) {
        size_t b = task / tiles / H, head = task / tiles % H, t = task % tiles * TILE;
        size_t n = b * T + t, group = head / (H / G);
        const float *row = (const float *)qkv + b * T * Q;
        matrix_view q = view(row + t * Q + head * h, Q);
        matrix_view k = view(row + (H + group) * h, Q);
        matrix_view v = view(row + (H + G + group) * h, Q);
        attend(y + (n * H + head) * h, H * h, lse + n * H + head, H, q, k, v,
               retrofit_min(T - t, TILE), false, t, h);
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
    PARALLEL_TASKS(B * T * H * h * T)
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

// ---- Other families' blocks: norms behind branches, norms of q and k, biases -------------------
// The norms are section 6's, y = ρ·x∘w. Behind a branch y is added to the stream, unrounded, and
// the gradient of y is that of the stream.
static void rmsnorm_residual_forward(float *out, float *rstd, const float *residual, const float *x,
                                     const float *weight, size_t N, size_t d, float eps) {
    PARALLEL_FOR(N * d)
    for (size_t n = 0; n < N; n++) {
        const float *xn = x + n * d, *base = residual + n * d;
        float rho = 1.0f / sqrtf(dot(xn, xn, d) / (float)d + eps);
        for (size_t c = 0; c < d; c++) out[n * d + c] = base[c] + xn[c] * rho * weight[c];
        rstd[n] = rho;
    }
}

static void rmsnorm_residual_backward(act *dinp, float *dweight, const float *dout, const float *x,
                                      const float *rstd, const float *weight, size_t N, size_t d) {
    memset(dinp, 0, N * d * sizeof(float)); // rmsnorm_backward adds
    rmsnorm_backward(dinp, dweight, dout, x, rstd, weight, N, d);
}

// y += bias          dbias += Σ_n dy_n
static void bias_forward(act *y_, const float *bias, size_t N, size_t O) {
    float *y = y_;
    PARALLEL_FOR(N * O)
    for (size_t n = 0; n < N; n++)
        for (size_t o = 0; o < O; o++) y[n * O + o] += bias[o];
}

static void bias_backward(float *dbias, const act *dy_, size_t N, size_t O) {
    const float *dy = dy_;
    PARALLEL_FOR(N * O)
    for (size_t first = 0; first < O; first += COLUMNS) {
        size_t end = retrofit_min(first + COLUMNS, O);
        for (size_t n = 0; n < N; n++)
            for (size_t o = first; o < end; o++) dbias[o] += dy[n * O + o];
    }
}

// The norms of each token's q and k: of each head, or one of q and one of k.
typedef struct {
    size_t N, H, G, h, Q;
    size_t both;  // (H+G)·h, the numbers of q and k
    size_t count; // of the norms
} qk_norms;

static qk_norms qk_norms_of(size_t N, size_t H, size_t G, size_t h, bool per_head) {
    return (qk_norms){N, H, G, h, (H + 2 * G) * h, (H + G) * h, per_head ? H + G : 2};
}

// Norm number i is of `width` numbers, from `first` on.
typedef struct {
    size_t first, width;
    bool of_q;
} qk_norm;

static qk_norm qk_norm_at(const qk_norms *norms, size_t i) {
    size_t H = norms->H, G = norms->G, h = norms->h;
    if (norms->count == H + G) return (qk_norm){i * h, h, i < H};
    return i == 0 ? (qk_norm){0, H * h, true} : (qk_norm){H * h, G * h, false};
}

static void qk_norm_forward(act *qkv, act *qk, float *rstd, const float *q_norm,
                            const float *k_norm, size_t N, size_t H, size_t G, size_t h,
                            bool per_head, float eps) {
    qk_norms norms = qk_norms_of(N, H, G, h, per_head);
    PARALLEL_FOR(N * norms.both)
    for (size_t n = 0; n < N; n++) {
        float *row = (float *)qkv + n * norms.Q;
        if (qk) memcpy((float *)qk + n * norms.both, row, norms.both * sizeof *row);
        for (size_t i = 0; i < norms.count; i++) {
            qk_norm norm = qk_norm_at(&norms, i);
            const float *weight = norm.of_q ? q_norm : k_norm;
            float *x = row + norm.first;
            float rho = 1.0f / sqrtf(dot(x, x, norm.width) / (float)norm.width + eps);
            for (size_t c = 0; c < norm.width; c++) x[c] = x[c] * rho * weight[c];
            if (rstd) rstd[n * norms.count + i] = rho;
        }
    }
}

// dw += Σ ρ·dy∘x over the tokens, and over all `count` norms from number i on, which share weights.
static void qk_weight_backward(float *dw, const float *dy, const float *x, const float *rstd,
                               const qk_norms *norms, size_t i, size_t count) {
    size_t width = qk_norm_at(norms, i).width;
    PARALLEL_FOR(norms->N * count * width)
    for (size_t column = 0; column < width; column += COLUMNS) {
        size_t end = retrofit_min(column + COLUMNS, width);
        for (size_t task = 0; task < norms->N * count; task++) {
            size_t n = task / count, norm = i + task % count;
            size_t first = qk_norm_at(norms, norm).first;
            const float *dyn = dy + n * norms->Q + first, *xn = x + n * norms->both + first;
            for (size_t c = column; c < end; c++)
                dw[c] += dyn[c] * xn[c] * rstd[n * norms->count + norm];
        }
    }
}

static void qk_norm_backward(act *dqkv, float *dq_norm, float *dk_norm, const act *qk,
                             const float *rstd, const float *q_norm, const float *k_norm, size_t N,
                             size_t H, size_t G, size_t h, bool per_head) {
    qk_norms norms = qk_norms_of(N, H, G, h, per_head);
    size_t of_q = per_head ? H : 1;
    const float *x = qk;
    float *dy = dqkv; // it becomes dx, when the weights have had it
    if (dq_norm) qk_weight_backward(dq_norm, dy, x, rstd, &norms, 0, of_q);
    if (dk_norm) qk_weight_backward(dk_norm, dy, x, rstd, &norms, of_q, norms.count - of_q);
    PARALLEL_FOR(N * norms.both)
    for (size_t n = 0; n < N; n++) {
        for (size_t i = 0; i < norms.count; i++) {
            qk_norm norm = qk_norm_at(&norms, i);
            const float *weight = norm.of_q ? q_norm : k_norm;
            const float *xn = x + n * norms.both + norm.first;
            float *dyn = dy + n * norms.Q + norm.first, rho = rstd[n * norms.count + i];
            float along =
                weighted_dot(dyn, weight, xn, norm.width) * rho * rho / (float)norm.width;
            for (size_t c = 0; c < norm.width; c++)
                dyn[c] = rho * (dyn[c] * weight[c] - xn[c] * along);
        }
    }
}

static void finish_qkv(retrofit_buffers *buffers, const retrofit_layer *layer,
                       retrofit_block *block) {
    const retrofit_config *c = &buffers->model->config;
    const retrofit_ops *ops = buffers->model->ops;
    size_t N = buffers->N, H = c->n_heads, G = c->n_kv_heads, h = c->head_dim;
    const float *q_norm = layer->q_norm.weight.data, *k_norm = layer->k_norm.weight.data;
    bool per_head = c->qk_norm == RETROFIT_QK_NORM_HEAD;
    if (c->qkv_bias)
        ops->bias_forward(block->qkv, layer->b_qkv.weight.data, N, retrofit_qkv_width(c));
    if (c->qk_norm)
        ops->qk_norm_forward(block->qkv, block->qk, block->rstd_qk, q_norm, k_norm, N, H, G, h,
                             per_head, c->norm_eps);
}

static void finish_qkv_backward(retrofit_buffers *buffers, retrofit_layer *layer,
                                const retrofit_block *block) {
    const retrofit_config *c = &buffers->model->config;
    const retrofit_ops *ops = buffers->model->ops;
    act *dqkv = buffers->gradients.dqkv;
    size_t N = buffers->N, H = c->n_heads, G = c->n_kv_heads, h = c->head_dim;
    const float *q_norm = layer->q_norm.weight.data, *k_norm = layer->k_norm.weight.data;
    bool per_head = c->qk_norm == RETROFIT_QK_NORM_HEAD;
    if (c->qk_norm)
        ops->qk_norm_backward(dqkv, layer->q_norm.grad, layer->k_norm.grad, block->qk,
                              block->rstd_qk, q_norm, k_norm, N, H, G, h, per_head);
    if (c->qkv_bias && !layer->b_qkv.frozen)
        ops->bias_backward(layer->b_qkv.grad, dqkv, N, retrofit_qkv_width(c));
}

// ---- Operations without a formula worth a place in Part I --------------------------------------
// Start states, by a function of (seed, row, position, column).
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

// Of a symmetric matrix the squares on the diagonal and below it are computed; what lies above is
// their mirror image: the same sums of the same terms in the same order.
static void matmul_symmetric(act *out, const act *inp, size_t N, size_t I) {
    enum { SQUARE = 96 };
    float *c = out;
    matrix_view A = view(inp, I);
    matrix_product all = {N, N, I, A, transposed(A), c, NULL, N, 0};
    size_t side = ceil_of(N, SQUARE);
    PARALLEL_TASKS(N * N * I)
    for (size_t task = 0; task < side * side; task++) {
        size_t i = task / side * SQUARE, i_end = retrofit_min(i + SQUARE, N);
        size_t j = task % side * SQUARE, j_end = retrofit_min(j + SQUARE, N);
        if (j > i) continue;
        matrix_product square = product_part(&all, i, i_end - i, j, j_end - j);
        multiply(&square, false);
        for (size_t row = i; row < i_end && j < i; row++)
            for (size_t column = j; column < j_end; column++)
                c[column * N + row] = c[row * N + column];
    }
}

static void cast(act *out, const float *x, size_t n) { memcpy(out, x, n * sizeof *x); }

static void add(float *x, const float *y, size_t n, float keep) {
    PARALLEL_FOR(n)
    for (size_t i = 0; i < n; i++) x[i] = keep * x[i] + y[i];
}

// y = a·x + b·y
static void axpby(act *y_, const act *x_, size_t n, float a, float b) {
    float *y = y_;
    const float *x = x_;
    PARALLEL_FOR(n)
    for (size_t i = 0; i < n; i++) y[i] = a * x[i] + b * y[i];
}

static void muon_load(act *x_, const float *u, const double *squares, size_t rows, size_t cols) {
    float *x = x_, scale = (float)(1 / (sqrt(*squares) + 1e-7));
    PARALLEL_FOR(rows * cols)
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c < cols; c++)
            x[rows > cols ? c * rows + r : r * cols + c] = u[r * cols + c] * scale;
    }
}

// Blocks are summed side by side and added in order, whatever the number of threads.
static void sum_squares(double *sum, const float *x, size_t n) {
    enum { BLOCK = 1 << 14, BLOCKS = 256 };
    double total = 0;
    for (size_t at = 0; at < n; at += (size_t)BLOCK * BLOCKS) {
        double sums[BLOCKS] = {0};
        PARALLEL_FOR(n - at)
        for (size_t i = 0; i < BLOCKS; i++) {
            size_t begin = at + i * BLOCK, end = retrofit_min(begin + BLOCK, n);
            for (size_t j = begin; j < end; j += 256)
                sums[i] += dot(x + j, x + j, retrofit_min(end - j, 256));
        }
        for (size_t i = 0; i < BLOCKS; i++) total += sums[i];
    }
    *sum += total;
}

// =================================================================================================
// 11  JSON, tokenizer, chat templates
// =================================================================================================

// ---- UTF-8 -------------------------------------------------------------------------------------

// The lead byte tells how many continuation bytes (80 to BF) follow it. After E0, ED, F0 and F4 the
// first of them has a narrower range: the full one would allow overlong forms, surrogates and
// values above U+10FFFF. An invalid stretch is as long as it could be the beginning of a character.
size_t retrofit_utf8_next(const char *text, size_t size, uint32_t *code_point) {
    unsigned lead = (unsigned char)text[0];
    if (lead < 0x80) {
        *code_point = lead;
        return 1;
    }
    *code_point = RETROFIT_UTF8_INVALID;
    if (lead < 0xc2 || lead > 0xf4) return 1;

    size_t more = lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
    unsigned low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    unsigned high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    uint32_t value = lead & (0x3fu >> more);
    for (size_t i = 1; i <= more; i++) {
        unsigned byte = i < size ? (unsigned char)text[i] : 0;
        if (byte < low || byte > high) return i;
        value = value << 6 | (byte & 0x3f);
        low = 0x80;
        high = 0xbf;
    }
    *code_point = value;
    return more + 1;
}

size_t retrofit_find_invalid(const char *text, size_t begin, size_t size) {
    uint32_t code_point;
    size_t length;
    for (size_t i = begin; i < size; i += length) {
        length = 1;
        if (!(text[i] & 0x80)) continue;
        length = retrofit_utf8_next(text + i, size - i, &code_point);
        if (code_point == RETROFIT_UTF8_INVALID) return i;
    }
    return size;
}

bool retrofit_check_utf8(const char *text, size_t size, const char *where) {
    size_t invalid = retrofit_find_invalid(text, 0, size);
    if (invalid == size) return true;
    return retrofit_fail("%s: byte %zu: not UTF-8: convert it first (iconv -t UTF-8)", where,
                         invalid);
}

#define UTF8_REPLACEMENT "\xef\xbf\xbd" // U+FFFD, for what is not UTF-8

size_t retrofit_append_valid(retrofit_text *out, const char *text, size_t size) {
    size_t count = 0, end;
    uint32_t code_point;
    for (size_t begin = 0; begin < size; begin = end) {
        end = retrofit_find_invalid(text, begin, size);
        retrofit_text_append(out, text + begin, end - begin);
        if (end == size) break;
        retrofit_text_append(out, UTF8_REPLACEMENT, 3);
        end += retrofit_utf8_next(text + end, size - end, &code_point);
        count++;
    }
    return count;
}

// Writes a valid code point as UTF-8 to out, which has room for four bytes, and returns its length.
static size_t utf8_put(uint32_t code_point, char *out) {
    static const unsigned char lead[] = {0, 0x00, 0xc0, 0xe0, 0xf0}; // by length
    size_t length = code_point < 0x80 ? 1 : code_point < 0x800 ? 2 : code_point < 0x10000 ? 3 : 4;
    for (size_t i = length - 1; i > 0; i--) {
        out[i] = (char)(0x80 | (code_point & 0x3f));
        code_point >>= 6;
    }
    out[0] = (char)(lead[length] | code_point);
    return length;
}

// The characters that Python's str.strip removes: White_Space and the separators U+001C to U+001F.
static bool is_space(uint32_t c) {
    if (c <= 0x20) return (c >= 9 && c <= 13) || c >= 0x1c;
    if (c >= 0x2000 && c <= 0x200a) return true;
    return c == 0x85 || c == 0xa0 || c == 0x1680 || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

void retrofit_strip_begin(const char **text, size_t *size) {
    while (*size) {
        uint32_t code_point;
        size_t length = retrofit_utf8_next(*text, *size, &code_point);
        if (!is_space(code_point)) break;
        *text += length;
        *size -= length;
    }
}

void retrofit_strip(const char **text, size_t *size) {
    uint32_t code_point;
    retrofit_strip_begin(text, size);
    while (*size) {
        const char *end = *text + *size;
        size_t length = 1; // of the last character; no white space is longer than three bytes
        while (length < 3 && length < *size && (end[-(ptrdiff_t)length] & 0xc0) == 0x80) length++;
        if (retrofit_utf8_next(end - length, length, &code_point) != length) break;
        if (!is_space(code_point)) break;
        *size -= length;
    }
}

size_t retrofit_spaces_at(const char *text, size_t size) {
    const char *stripped = text;
    retrofit_strip_begin(&stripped, &size);
    return (size_t)(stripped - text);
}

size_t retrofit_size_without_spaces(const char *text, size_t size) {
    const char *stripped = text;
    retrofit_strip(&stripped, &size);
    return size ? (size_t)(stripped - text) + size : 0;
}

void retrofit_skip_mark(const char **text, size_t *size) {
    if (*size < 3 || memcmp(*text, "\xef\xbb\xbf", 3)) return;
    *text += 3;
    *size -= 3;
}

void retrofit_text_append(retrofit_text *text, const void *bytes, size_t size) {
    if (!text->failed && text->size + size >= text->capacity) {
        size_t capacity = text->capacity + text->capacity / 2 + size + 64;
        char *bigger = retrofit_reallocate(text->bytes, capacity, 1);
        text->failed = !bigger;
        if (bigger) {
            text->bytes = bigger;
            text->capacity = capacity;
        }
    }
    if (text->failed || !size) return;
    memcpy(text->bytes + text->size, bytes, size);
    text->size += size;
}

void retrofit_text_append_item(retrofit_text *text, const char *item) {
    if (text->size) retrofit_text_append(text, ", ", 2);
    retrofit_text_append(text, item, strlen(item));
}

// ---- JSON --------------------------------------------------------------------------------------

enum { JSON_MAX_VALUES = 1 << 24 };

// The parser works on its own copy of the text, which ends in a NUL. It decodes strings inside this
// copy: `out` never overtakes `at`, since no escape is shorter than the character it stands for.
typedef struct {
    const char *where;    // for errors: a file name, say
    const char *begin;    // of the copy
    char *at;             // the next character to read
    char *out;            // where the next decoded string goes
    retrofit_json *nodes; // the next free node
} json_parser;

static bool json_fail(const json_parser *parser, const char *why) {
    ptrdiff_t byte = parser->at - parser->begin;
    return retrofit_fail("%s: byte %td: bad JSON: %s", parser->where, byte, why);
}

// Skips white space and returns the character behind it.
static char json_skip(json_parser *parser) {
    char c = *parser->at;
    while (c == ' ' || c == '\t' || c == '\r' || c == '\n') c = *++parser->at;
    return c;
}

// \uXXXX: one UTF-16 code unit.
static bool json_code_unit(json_parser *parser, uint32_t *unit) {
    const char *at = parser->at;
    if (at[0] != '\\' || at[1] != 'u' || strspn(at + 2, "0123456789abcdefABCDEF") < 4)
        return json_fail(parser, "an unknown escape, or half of a surrogate pair");
    char digits[5] = {at[2], at[3], at[4], at[5], 0};
    *unit = (uint32_t)strtoul(digits, NULL, 16);
    parser->at += 6;
    return true;
}

// Characters above U+FFFF are written as two code units, a surrogate pair:
//     code point = 0x10000 + (high - 0xD800)·0x400 + (low - 0xDC00)
static bool json_escape(json_parser *parser, uint32_t *code_point) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    const char *name = parser->at[1] ? strchr(names, parser->at[1]) : NULL;
    if (name) {
        *code_point = (uint32_t)values[name - names];
        parser->at += 2;
        return true;
    }
    uint32_t high, low = 0;
    if (!json_code_unit(parser, &high)) return false;
    *code_point = high;
    if (high < 0xd800 || high > 0xdfff) return true;
    if (high < 0xdc00 && !json_code_unit(parser, &low)) return false;
    if (low < 0xdc00 || low > 0xdfff)
        return json_fail(parser, "half of a surrogate pair before this");
    *code_point = 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00);
    return true;
}

static bool json_string(json_parser *parser, const char **string, uint32_t *length) {
    if (*parser->at != '"') return json_fail(parser, "expected a string");
    parser->at++;
    char *begin = parser->out;
    while (*parser->at != '"') {
        if ((unsigned char)*parser->at < ' ')
            return json_fail(parser, "a string does not end, or a control character in it is not "
                                     "escaped");
        if (*parser->at != '\\') {
            *parser->out++ = *parser->at++;
            continue;
        }
        uint32_t code_point;
        if (!json_escape(parser, &code_point)) return false;
        parser->out += utf8_put(code_point, parser->out);
    }
    parser->at++;
    *string = begin;
    *length = (uint32_t)(parser->out - begin);
    *parser->out++ = 0;
    return true;
}

// strtod accepts more than JSON does: leading zeros, a '+' in front, and a point without digits on
// either side. These are refused here.
static bool json_number(json_parser *parser, retrofit_json *value) {
    static const char digits[] = "0123456789";
    char *text = parser->out, *end;
    size_t length = strspn(parser->at, "0123456789+-.eE");
    memmove(text, parser->at, length);
    text[length] = 0;
    double number = strtod(text, &end);

    const char *first = text + (*text == '-'), *point = strchr(text, '.');
    size_t whole_digits = strspn(first, digits);
    bool leading_zero = whole_digits > 1 && *first == '0';
    bool fraction = !point || strspn(point + 1, digits) > 0;
    if (*end || !whole_digits || leading_zero || !fraction || !isfinite(number))
        return json_fail(parser, "not a value, or a number too large for a double (or LC_NUMERIC "
                                 "is not \"C\")");
    value->type = RETROFIT_JSON_NUMBER;
    value->number = number;
    value->string = text;
    value->length = (uint32_t)length;
    parser->at += length;
    parser->out += length + 1;
    return true;
}

static bool json_value(json_parser *parser, retrofit_json *value, int depth);

static int by_key(const void *a, const void *b) {
    const retrofit_json *x = *(retrofit_json *const *)a, *y = *(retrofit_json *const *)b;
    size_t shorter = x->key_length < y->key_length ? x->key_length : y->key_length;
    int order = memcmp(x->key, y->key, shorter);
    if (order) return order;
    return x->key_length < y->key_length ? -1 : x->key_length > y->key_length;
}

// false or error if two members of an object have the same name.
static bool json_check_names(const json_parser *parser, const retrofit_json *object) {
    if (object->count < 2) return true;
    const retrofit_json **members = retrofit_allocate(object->count, sizeof *members);
    if (!members) return false;
    size_t count = 0;
    for (const retrofit_json *member = object->child; member; member = member->next)
        members[count++] = member;
    qsort(members, count, sizeof *members, by_key);
    bool ok = true;
    for (size_t i = 1; ok && i < count; i++) {
        if (by_key(&members[i - 1], &members[i])) continue;
        ok = retrofit_fail("%s: \"%s\" is there twice in one object: remove the one that should "
                           "not count", parser->where, members[i]->key);
    }
    free(members);
    return ok;
}

// The children of an array or object, from its opening bracket to its closing one.
static bool json_children(json_parser *parser, retrofit_json *parent, int depth) {
    bool is_object = parent->type == RETROFIT_JSON_OBJECT;
    char close = is_object ? '}' : ']';
    parser->at++;
    char next = json_skip(parser);
    if (next == close) parser->at++;

    for (retrofit_json **link = &parent->child; next != close; parser->at++) {
        retrofit_json *child = parser->nodes++;
        *link = child;
        link = &child->next;
        parent->count++;
        json_skip(parser);
        if (is_object) {
            if (!json_string(parser, &child->key, &child->key_length)) return false;
            if (json_skip(parser) != ':') return json_fail(parser, "expected ':'");
            parser->at++;
        }
        if (!json_value(parser, child, depth + 1)) return false;
        next = json_skip(parser);
        if (next != ',' && next != close)
            return json_fail(parser, is_object ? "expected ',' or '}'" : "expected ',' or ']'");
    }
    return !is_object || json_check_names(parser, parent);
}

// Any value, into a zeroed node. The limit of the depth bounds the recursion.
static bool json_value(json_parser *parser, retrofit_json *value, int depth) {
    char first = json_skip(parser);
    if (first == '"') {
        value->type = RETROFIT_JSON_STRING;
        return json_string(parser, &value->string, &value->length);
    }
    if (first == '[' || first == '{') {
        if (depth == 64) return json_fail(parser, "more than 64 levels");
        value->type = first == '[' ? RETROFIT_JSON_ARRAY : RETROFIT_JSON_OBJECT;
        return json_children(parser, value, depth);
    }
    static const char *const words[] = {"null", "false", "true"};
    for (int i = 0; i < 3; i++) {
        size_t length = strlen(words[i]);
        if (strncmp(parser->at, words[i], length)) continue;
        value->type = i == 0 ? RETROFIT_JSON_NULL : RETROFIT_JSON_BOOL;
        value->number = i == 2;
        parser->at += length;
        return true;
    }
    return json_number(parser, value);
}

// At least as many as there are values in the text: each but the first comes behind an opening
// bracket or a comma that is in no string. 0 or error if the text is not UTF-8, or too large.
static size_t json_count_nodes(const char *text, size_t size, const char *where) {
    size_t count = 1, length;
    bool in_string = false;
    for (size_t i = 0; i < size; i += length) {
        uint32_t c;
        length = retrofit_utf8_next(text + i, size - i, &c);
        if (c == RETROFIT_UTF8_INVALID) {
            retrofit_fail("%s: byte %zu: bad JSON: not UTF-8", where, i);
            return 0;
        }
        if (c == '"') in_string = !in_string;
        else if (!in_string) count += c == '[' || c == '{' || c == ',';
        else if (c == '\\' && i + 1 < size && !(text[i + 1] & 0x80)) length = 2;
    }
    if (count <= JSON_MAX_VALUES && size < UINT32_MAX) return count;
    retrofit_fail("%s: more than %d values, or 4 GB: too much JSON in one piece", where,
                  JSON_MAX_VALUES);
    return 0;
}

// The tree is one block of memory: the nodes, then the copy of the text. Decoded strings end in a
// NUL, for which their quotes leave room. A number has no quotes: its NUL takes the room of the
// bracket, comma or colon before it, or of the byte by which the copy starts late.
retrofit_json *retrofit_json_parse(const char *text, size_t size, const char *where) {
    size_t nodes = json_count_nodes(text, size, where);
    if (!nodes) return NULL;
    size_t text_nodes = (size + 2) / sizeof(retrofit_json) + 1; // the text's size, in nodes
    retrofit_json *root = retrofit_allocate(nodes + text_nodes, sizeof *root);
    if (!root) return NULL;
    char *out = (char *)(root + nodes);
    char *begin = memcpy(out + 1, text, size);

    json_parser parser = {where, begin, begin, out, root + 1};
    bool ok = json_value(&parser, root, 0);
    if (ok) {
        json_skip(&parser);
        if (parser.at != begin + size) ok = json_fail(&parser, "something follows the value");
    }
    if (ok) return root;
    free(root);
    return NULL;
}

retrofit_json *retrofit_json_read(const char *path, size_t *size) {
    size_t all;
    char *bytes = retrofit_read_file(path, &all);
    if (!bytes) return NULL;
    if (size) *size = all;
    const char *text = bytes;
    retrofit_skip_mark(&text, &all);
    retrofit_json *root = retrofit_json_parse(text, all, path);
    free(bytes);
    if (!root || root->type == RETROFIT_JSON_OBJECT) return root;
    retrofit_json_free(root);
    return fail_null("%s: not a JSON object", path);
}

void retrofit_json_free(retrofit_json *root) { free(root); }

const retrofit_json *retrofit_json_get(const retrofit_json *object, const char *key) {
    if (!object || object->type != RETROFIT_JSON_OBJECT) return NULL;
    size_t length = strlen(key);
    const retrofit_json *member = object->child;
    while (member && (member->key_length != length || memcmp(member->key, key, length)))
        member = member->next;
    return member;
}

bool retrofit_json_is(const retrofit_json *value, const char *word) {
    return value && value->type == RETROFIT_JSON_STRING && !strcmp(value->string, word);
}

bool retrofit_json_size(const retrofit_json *value, size_t *out) {
    if (!value || value->type != RETROFIT_JSON_NUMBER) return false;
    double number = value->number;
    if (number < 0 || number > 0x1p53 || number != floor(number)) return false;
    *out = (size_t)number;
    return true;
}

void retrofit_json_write_string(FILE *file, const char *text, size_t size) {
    fputc('"', file);
    for (size_t i = 0; i < size; i++) {
        if ((unsigned char)text[i] < 0x20) {
            fprintf(file, "\\u%04x", text[i]);
            continue;
        }
        if (text[i] == '"' || text[i] == '\\') fputc('\\', file);
        fputc(text[i], file);
    }
    fputc('"', file);
}

// ---- Keys --------------------------------------------------------------------------------------

// Words in the name of a key that speak of what a model computes. An unknown key with one of them
// may make the model another one than we would compute.
static const char *const telling_words[] = {
    "rope", "rotary", "attn", "attention", "scal", "multiplier", "cap", "bias", "norm", "window",
    "logit", "expert", "moe", "quant", "clip", "alibi", "sink", "layer", "embed", "head", "state",
    "recur", "residual", "sparse", "compress", "ratio", "chunk", "position", "pattern", "router",
};

static bool is_telling(const char *key) {
    for (size_t i = 0; i < sizeof telling_words / sizeof *telling_words; i++) {
        if (strcasestr(key, telling_words[i])) return true;
    }
    return false;
}

// Whether value is one of those in a list like "false|1.0". Numbers are compared as numbers.
static bool is_one_of(const char *value, const char *list) {
    char *end, *item_end;
    double number = strtod(value, &end);
    bool is_number = *value && !*end;
    for (;;) {
        size_t length = strcspn(list, "|");
        if (strlen(value) == length && !strncmp(value, list, length)) return true;
        double item = strtod(list, &item_end);
        bool is_item = length > 0 && item_end == list + length;
        if (is_number && is_item && item == number) return true;
        if (!list[length]) return false;
        list += length + 1;
    }
}

static bool row_has_key(const char *names, const char *key) {
    while (*names) {
        size_t length = strcspn(names, " ");
        bool open = names[length - 1] == '*';
        if (!strncmp(names, key, length - open) && (open || !key[length])) return true;
        names += length + (names[length] == ' ');
    }
    return false;
}

const retrofit_key *retrofit_key_find(const char *key, const retrofit_key *table, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (row_has_key(table[i].key, key)) return &table[i];
    }
    return NULL;
}

bool retrofit_key_check(const char *key, const char *value, const retrofit_key *table, size_t count,
                        const char *where, bool *known) {
    const retrofit_key *row = retrofit_key_find(key, table, count);
    *known = true;
    bool must_be_true = row && row->neutral && !strcmp(row->neutral, "true");
    if (is_one_of(value, must_be_true ? "null" : "null|false||[]|{}")) return true;
    if (row && (!row->neutral || !strcmp(row->neutral, "*"))) return true;
    if (row && is_one_of(value, row->neutral)) return true;
    if (row)
        return retrofit_fail("%s: \"%s\" is %.80s, which is not supported%s%s", where, key, value,
                             row->why ? ": " : "", row->why ? row->why : "");
    *known = !strcmp(value, "0");
    if (*known || !is_telling(key)) return true;
    return retrofit_fail("%s: \"%s\" (%.80s) is not known here, and it may change what is "
                         "computed: remove it if it does not", where, key, value);
}

const char *retrofit_json_value_text(const retrofit_json *value) {
    switch (value->type) {
    case RETROFIT_JSON_NULL: return "null";
    case RETROFIT_JSON_BOOL: return value->number != 0 ? "true" : "false";
    case RETROFIT_JSON_ARRAY: return value->count ? "[...]" : "[]";
    case RETROFIT_JSON_OBJECT: return value->count ? "{...}" : "{}";
    default: return value->string;
    }
}

bool retrofit_keys_check(const retrofit_json *object, const retrofit_key *table, size_t count,
                         const char *where) {
    retrofit_text unknown = {0};
    bool ok = true;
    for (const retrofit_json *member = object->child; ok && member; member = member->next) {
        bool known;
        ok = retrofit_key_check(member->key, retrofit_json_value_text(member), table, count, where,
                                &known);
        if (known) continue;
        retrofit_text_append_item(&unknown, member->key);
    }
    retrofit_text_append(&unknown, "", 1);
    if (ok && !unknown.failed && unknown.size > 1)
        retrofit_note("%s: not known here, and not used: %s", where, unknown.bytes);
    ok = ok && !unknown.failed;
    free(unknown.bytes);
    return ok;
}

// ---- Tokenizer: its parts ----------------------------------------------------------------------
// From text to ids:
//     1  what is not UTF-8 becomes U+FFFD;
//     2  added tokens that are spelt out in the text are taken out of it, the longest first;
//     3  what is between them is normalized (the normalizer's steps), and those added tokens that
//        are to be found in normalized text are taken out of that;
//     4  the rest is cut into pieces (the pre_tokenizer's steps);
//     5  byte-pair encoding turns each piece into ids;
//     6  special tokens go around all ids (the post_processor's steps).
// From ids to text: the tokens' texts are joined, after the decoder's steps.

// Which code points are letters, numbers, white space and parts of words, \p{L}, \p{N}, \s and \w,
// in Unicode 16. A string lists run lengths: how many code points from U+0000 on are outside of the
// class, how many after them are inside, then outside again, and so on; after the last run all are
// outside. A length is written in base 26 with digits a = 0 to z = 25, the most significant first;
// its last digit is a capital. So \s begins with J = 9 outside, F = 5 inside (U+0009 to U+000D),
// S = 18 outside, B = 1 inside (U+0020), dW = 3·26 + 22 = 100 outside.
// test/unicode_classes.py made these tables from the Unicode data and can check them.
// clang-format off
static const char *const tok_class_runs[] = {
    // \p{L}
    "cNbAGbAbVBKBEBFXBbFBrQEMOFHBBBeZFBCCEBBGBBDBBBUBdFBfJIgKBbMCBGbPcTbBEEbTbRbJCBdVBBPCHCKDCBQBB"
    "bEbDdLLBYbHJCEBFWEBJBDBXZHLFYBGRbQcGcCDBSBHKPQEICCCWBHBBDEDBQBNCBDOCKBIGECCWBHBCBCBCbFEBBTDQJ"
    "BDBWBHBCBFDBSBPCXBLICCCWBHBCBFDBbECBDPBRBBGDDBEDCBBBCDCDDDMWBcAIBDBXBQDBbADCBCCbEBEIBDBXBKBFD"
    "BbFCBCPCRJBDBbPCBQBFDIDYGFSDYBJBBCHcGbWBCMHcGCBBBFBYBBBKBCJBCFBBVEbGBcLIBbKbBFeLbRUBQGEEDBDCH"
    "DENMBRbMBBFBCbRBmVBECHBBBECbPBECbHBECHBBBECPBcFBECcPbLQQdICGDxWCRBbAFcXGIHSNTOSONBDPcAbJBEBcP"
    "dLHFCbIBBFcSKbFbXbECFLbSEbAcCXJcBdEBdPbVRIcCbENCKbSbAbKbPDKbKCLFbRCDbPEBGBCDBFhKcMkSCGCbMCGCI"
    "BBBBBBBbFCcBBHBBDDBHDECGENFDBHeMBNBQNdXBEBCKBBDFGBBBBBBEBLCEFFEBcACdzFiVGEDCMbMBBFBCcEHBQXJHB"
    "HBHBHBHBHBHBHdCBsBCbQFFCEdIGDBdMBEFbRBdQRbGbWQtSjtOcMbguFcPbUCkJDQKCUbVQbFCcSbXJCdZCcPCCBBBIV"
    "QBDBEBXbDcAObYcKGDBBCLbCKXZbDHbVbCBQFBKKFBbPXDBIUXDBDbYBBDCCFCBBBYDCLHDMGCGCGJHBHBbRBOGeLbDqn"
    "SMXEbXmnCoCCeCbMHMFFBBKBNBFBBBCBCBeEbHnZScMCcCbOMeMFBfFbKbAGbALdLDGCGCGCDbJMBbABTBCBPCObIeToZ"
    "bDDbXbVbGNUBIGbMKbECbKEIbWgCSbKEbKEbOIcAMLBPBHBCBLBPBHBCDcAMlZJWKIYGBbQBJcRGCBBbSBCDBCXKXJbFc"
    "NTBCKWKbAcScEGCcMBPEBDBbDbQbDDbDbJIBbCbBcCKWKTNSeGcVcDbZNbZNbKbMbCJXjQbQGCQDcHbDKBIWbQSbUVbBX"
    "McBcFCCBNbTbGZbAbKbDBCBIbJDBMbWOEVBBBbJSBZTCcLHBBBEBPBKHbVbMICCCWBHBCBFDBSBMFbEKBBCBBbMBBZBBB"
    "bScBSEUDbEbWUCBBhCbVbPEbKbWUBcHbRNBcTbBbLHhDbSeMcMbFICBCIBCBYPBBBdQICbNQBBBbCBKbOHBVBLbUTBScV"
    "hRbHbFJBbLRBbXbEeIHBCBbMVBZGBCBbGOBmPTPBBNBbIeUBdBbjMiWhOdxKdTPbpGRGZfxRFwLkdDbEcpUvXHbFRdBRb"
    "ESbWQEbFVFTqQbTiDcMeYcXFBcONcMCBBbCjcAIbvQbPKnfREBHBCBlFPBbDDCBOEIpGdkUeDFNDJHKiwKdHBcTBCCBCC"
    "CEBMBBBHBcNBECIBHBbCBEBFBBDHBnCCZBZBbFBZBbFBZBbFBZBbFBZBIcsYbFGGkBcKfQbTKHQBmJbESbSsQbCiUbECB"
    "tBHBEBCBPBhPcHcQHBbuIEBbBBCBBCBBKBEBBBBGBEBBBBBBDBCBBCBBBBBBBBBBCBBCEBHBEBEBBBKBRFDBFBRgoAclf"
    "CbGgdUGiOCinQOlbLPxYdqWuWcfYhhZFgfG",
    // \p{N}
    "bWKeQCFBCDcdLKfEKhQKpWKeOKEGeEKeOKeOKCGeGNeLKIHdZKeAHHTeFKdSKeOKcSUkIKcSKbbRUbhXDjFKGKWKlOKeY"
    "LgJKGKhAKdIKfEKGKboGBDGGKhQbZCFbbYcIdAWyGbEcbHBbdXBZJODnFEfIKbEIBPbGKbNPbrsAKhGKmIGfYKbMKhQKW"
    "KdIKpQKbfmCKsZbTMcFRCnDbBbKEbDBIBfEFhUKbkGIZHbNJcXFWGgECCQCbUcMJcACbEDcXFeAIYIbPHmSGbWKGKkSbF"
    "gCKbQEeIHfEbEeYKcIKfOKHUjRKnEKeOKoKKdYKGUcYMqETdPKzMKdIbDiTKcSKqGKdYVbpBeHxaFKdmCKdIKfEKBHuGK"
    "kCXbjsZKceWUMUeEZbqRbYdnCKqGKtIKjNKbbOJeYKbeLcHBDBEcYbTBPblANedFK",
    // \s
    "JFSBdWBbABihJBdpNLbDCFBbVBfxWB",
    // \w
    "bWKHbAEBBbAbVBKBEBFXBbFBrQEMOFHBBBReNBCCEBBGBBDBBBUBdFBfJBgRBbMCBGbPIbTBBBCBCBBIbBEEbDLFcWEdY"
    "BICKBTCBQcHCdXOcCEBCBCbUSbCELFYBGIcXBeZCKBTBICCCWBHBBDECJCCCEIBECBFCMKBBBCDBGECCWBHBCBCBCCBBF"
    "ECCDDBHEBBHQLDBJBDBWBHBCBFCKBDBDCBPECKJHBDBICCCWBHBCBFCJCCCDHDECBFCKBBQCBGDDBEDCBBBCDCDDDMEFD"
    "DBECBGBOKQNBDBXBQCJBDBEHCBDCBCECKQEBIBDBXBKBFCJBDBEHCGCBECKBDMNBDBbZBDBFFEHFCKKGBDBSDYBJBBCHD"
    "BEGBBBIGKCCNcGFPBKbNCBBBFBYBBBXCFBBBHBKCEbGBXCGKLBBBBBEKBbKEUBSBbKJBcFcWGdACbMBBFBCbRBmVBECHB"
    "BBECbPBECbHBECHBBBECPBcFBECcPCDbGQQdICGDxWCRBbAFcXDLHWJWLUMNBDBCMdGDBECCKbHDBLGdLHbRFcSKbFBME"
    "MKbOCFLbSEbAGKbMbCEcLBbDCLGKNBIbFbXcZDKRJMeMMcEIKDbXCLFbRCDQDBbNFuOCGCbMCGCIBBBBBBBbFCcBBHBBD"
    "DBHDECGENFDBHPCbXCTBbCBNBQNbZbHRBEBCKBBDFGBBBBBBEBLCEFFEBRbPbfHcAcrUiVGJMbMBBFBCcEHBPYJHBHBHB"
    "HBHBHBHBHBbGbVBsBDZPBFCFEdICCCDBdMBEFbRBdQRbGbWQtSjtOcMbguFcPbUCkJDbCUbZBKBeLbLJCdZCcPCCBBBIV"
    "cCEBTcAMcSKKGYDBBbXCbKMbDDcNOLGbFBcDJOCKGXDcVYDCQCFKGCGCGJHBHBbRBOGeTBCCKGqnSMXEbXmnCoCCeCbMH"
    "MFFMBNBFBBBCBCBeEbHnZScMCcCbOMEQQQDCYDbGFBfFTKHbAEBBbALdLDGCGCGCDbJMBbABTBCBPCObIeTcRcBfGBfAb"
    "DDbXPBbFbGNbEFbRFbECbKEIBFbQgCCKGbKEbKEbOIcAMLBPBHBCBLBPBHBCDcAMlZJWKIYGBbQBJcRGCBBbSBCDBCXKX"
    "JbFcNTBCKWKbAcScEGCcMEBCFIBDBbDCDEBbGbDDbDbJIBbEZcCKWKTNSeGcVcDbZNbZNbOIKGbMDFBXjQbQBCDCQDcDb"
    "HKBIbHbFWbQVbBXJcTbFQJcIHBNZHKGcBBKEEIbKCBJcREEBNBBbJSBbLGEcKHBBBEBPBKHcHFKGEBICCCWBHBCBFBKCC"
    "CDCBGBFHCHDFLKBBCBBbMBKBBCBBEBINCbDcXFKEEbEcSBBIKgKcCCJXGbIcNDBLKbMcFHKGUbCbBCPEKGHhDcHdXcWVI"
    "CBCIBCBbEBCCJMKcSICbUCIBCbBcLIBIcWDBScVhRbHPKGJBbTBJPKYbECWBOcVHBCBbSDBBCBJIKGGBCBbLBCBGHKlYX"
    "JRBbPDFNLdHBdBbjMdYeHRhOdxKdTPbpGQWKfxRFwLkdDcGcoSvXHbFBKGdBBKGbECFLcDJEMKJVFTqQbTDKhQcMeYcXE"
    "cFHRcMCBCLCOjcAIbvQbPKnfREBHBCBlFPBbDDCBOEIpGdkUeDFNDJHKDCgeRKtYbUCXuWFDGIICHbEEfSDrBdHBcTBCC"
    "BCCCEBMBBBHBcNBECIBHBbCBEBFBBDHBnCCZBZBbFBZBbFBZBbFBZBbFBZBICbYtScDEbYIBOBWFBPbqMbFGGiFHBRCHB"
    "CBFFcKbHBeIbTDOCKEBmJbFRcGsCbQiGbRsRHBEBCBPBhPLHbPcYEKbtUEBbBBCBBCBBKBEBBBBGBEBBBBBBDBCBBCBBB"
    "BBBBBBBCBBCEBHBEBEBBBKBRFDBFBRyEbAGbAGbAdyKKbnQclfCbGgdUGiOCinQOlbLPxYdqWuWcfYhhZFgfGbonhGjG",
};

// NFC, in Unicode 9 as Hugging Face's tokenizers have it. The canonical decompositions, three
// numbers each: how far the code point is from the one before it in the table; the first code point
// that it becomes; and the second, 0 if there is none, else 2·(the second - U+02FF), + 1 if the two
// are not composed again.
static const char *const tok_nfc_pairs =
    "hKcNCBcNEBcNGBcNIBcNSBcNWCcPdCBcRCBcREBcRGBcRSBcVCBcVEBcVGBcVSCdAIBdBCBdBEBdBGBdBIBdBSDdHCBdH"
    "EBdHGBdHSBdLEDdTCBdTEBdTGBdTIBdTSBdTWCdVdCBdXCBdXEBdXGBdXSBeBCBeBEBeBGBeBSCeGIBeHCBeHEBeHGBeH"
    "IBeHSDeNCBeNEBeNGBeNSBeRECeRSBcNKBdTKBcNOBdTOBcNdEBdTdEBcPEBdVEBcPGBdVGBcPQBdVQBcPbABdVbABcQb"
    "ABdWbADcRKBdXKBcROBdXOBcRQBdXQBcRdEBdXdEBcRbABdXbABcTGBdZGBcTOBdZOBcTQBdZQBcTdCBdZdCBcUGBeAGD"
    "cVIBeBIBcVKBeBKBcVOBeBOBcVdEBeBdEBcVQEcWGBeCGBcXdCBeDdCCcYEBeEEBcYdCBeEdCBcYbABeEbAFdAEBeGEBd"
    "AdCBeGdCBdAbABeGbAEdBKBeHKBdBOBeHOBdBYBeHYDdEEBeKEBdEdCBeKdCBdEbABeKbABdFEBeLEBdFGBeLGBdFdCBe"
    "LdCBdFbABeLbABdGdCBeMdCBdGbABeMbADdHIBeNIBdHKBeNKBdHOBeNOBdHWBeNWBdHYBeNYBdHdEBeNdEBdJGBePGBd"
    "LGBeRGBdLSBdMEBeSEBdMQBeSQBdMbABeSbAbIdBcEBeHcEOdHcEBeNcEbDcNbABdTbABcVbABeBbABdBbABeHbABdHbA"
    "BeNbABiMKBjSKBiMEBjSEBiMbABjSbABiMCBjSCChOKBiUKBvEKBvFKBhQKBiWKDcTbABdZbABcXbABeDbABdBdEBeHdE"
    "BsWKBsXKBqXbABzIbABeCbAEcTEBdZEDdACBeGCBhPEBiVEBhQEBiWEBiIEBjOEBcNbGBdTbGBcNbKBdTbKBcRbGBdXbG"
    "BcRbKBdXbKBcVbGBeBbGBcVbKBeBbKBdBbGBeHbGBdBbKBeHbKBdEbGBeKbGBdEbKBeKbKBdHbGBeNbGBdHbKBeNbKBdF"
    "dABeLdABdGdABeMdADcUbABeAbAHcNQBdTQBcRdCBdXdCBiGKBjMKBiFKBjLKBdBQBeHQBvMKBvNKBdLKBeRKkJbdOABb"
    "dPACbeHABbdWFbWbaVAKcHAHgMEBbjDEBhBABbjHEBbjJEBbjLECbjRECbjXEBbkBEBblIEbAbjLSBbjXSBbkJEBbkNEB"
    "bkPEBbkREBblJEbAbkRSBblDSBbkXEBblDEBblHEFblQEBblQSbSboFCBboFSCboDEEbnQSFboKEBboICBboTOLboIObG"
    "bpOOXbpLCBbpLSCbpJEEbqSSFbpQEBbpOCBbpZOYbrWbGBbrXbGcWboGOBbpMOOboAOBbpGOBboASBbpGSDboFOBbpLOD"
    "bvSSBbvTSBboGSBbpMSBboHSBbpNSDboIKBbpOKBboISBbpOSBboOSBbpUSDbwISBbwJSBbpDSBbqJSBboTKBbpZKBboT"
    "SBbpZSBboTYBbpZYBboXSBbqDSDbpBSBbqHSlLciPcnOBciPcnQBcjWcnQBciPcnSBcjYcnQfYcpHcnQCcoNcnQRcpEcn"
    "QxAdmEesWIdmMesWDdmPesWbKdlLesXBdlMesXBdlNesXBdlSesXBdlXesXBdlYesXBdmHesXBdmLesXeEdsHfcWBdsHf"
    "eUQdqVfcTBdqWfcTCdrJfcTdGdwKfmPDdwQfmPbJdvIfmPBdvJfmPBdvOfmPDdwDfmPjAehBgiGDehBggKBehBgiIQefP"
    "ggHBefQggHcDejYgsEcCelYgqGBelZgqGBelYgsEeUeqWhbYeQevNhlSHevUhlSBevUhlUCevUhkGBevYhlSeXfaShtUB"
    "faThtUBfaShvSfMfgJieOCfgJieYBfgMieOBfgJigEnTfuGjqNKfuQjqNFfuVjqNFfvAjqNFfvFjqNNfuEjqJKfwBjlFC"
    "fwBjlJBfyOjmHCfyPjmHJfwBjmHSfxIjqNKfxSjqNFfxXjqNFfyCjqNFfyHjqNNfxGjqJeFgcZjzQedCkgBsiUCkgDsiU"
    "CkgFsiUCkgHsiUCkgJsiUEkgNsiUbPkiCsiUCkiEsiUDkiGsiUBkiHsiUCkiKsiUbaZcNcYBdTcYBcOQBdUQBcOcUBdUc"
    "UBcOdWBdUdWBhREBiXEBcQQBdWQBcQcUBdWcUBcQdWBdWdWBcQdCBdWdCBcQdOBdWdOBkOCBkPCBkOEBkPEBcRdOBdXdO"
    "BcRdUBdXdUBvGOBvHOBcSQBdYQBcTKBdZKBcUQBeAQBcUcUBeAcUBcUSBeASBcUdCBeAdCBcUdQBeAdQBcVdUBeBdUBhZ"
    "EBjFEBcXEBeDEBcXcUBeDcUBcXdWBeDdWBcYcUBeEcUBllMKBllNKBcYdWBeEdWBcYdOBeEdOBcZEBeFEBcZQBeFQBcZc"
    "UBeFcUBdAQBeGQBdAcUBeGcUBdAdWBeGdWBdAdOBeGdOBiFEBjLEBiFSBjLSBmUCBmVCBmUEBmVEBdCEBeIEBdCQBeIQB"
    "dEQBeKQBdEcUBeKcUBlmWKBlmXKBdEdWBeKdWBdFQBeLQBdFcUBeLcUBnIQBnJQBnOQBnPQBlnEQBlnFQBdGQBeMQBdGc"
    "UBeMcUBdGdWBeMdWBdGdOBeMdOBdHcWBeNcWBdHdUBeNdUBdHdOBeNdOBnWEBnXEBnYSBnZSBdIIBeOIBdIcUBeOcUBdJ"
    "CBePCBdJEBePEBdJSBePSBdJQBePQBdJcUBePcUBdKQBeQQBdKSBeQSBdLQBeRQBdMGBeSGBdMcUBeScUBdMdWBeSdWBe"
    "AdWBeMSBePWBeRWCoTQFcNcUBdTcUBcNUBdTUBhMEBiSEBhMCBiSCBhMUBiSUBhMIBiSIBlpOGBlpPGBjYEBjZEBjYCBj"
    "ZCBjYUBjZUBjYIBjZIBlpOOBlpPOBcRcUBdXcUBcRUBdXUBcRIBdXIBhUEBjAEBhUCBjACBhUUBjAUBhUIBjAIBlqMGBl"
    "qNGBcVUBeBUBcVcUBeBcUBdBcUBeHcUBdBUBeHUBiEEBjKEBiECBjKCBiEUBjKUBiEIBjKIBlrGGBlrHGBqAEBqBEBqAC"
    "BqBCBqAUBqBUBqAIBqBIBqAcUBqBcUBdHcUBeNcUBdHUBeNUBqPEBqQEBqPCBqQCBqPUBqQUBqPIBqQIBqPcUBqQcUBdL"
    "CBeRCBdLcUBeRcUBdLUBeRUBdLIBeRIHbkJbOBbkJbQBltGCBltHCBltGEBltHEBltGfEBltHfEBbjDbOBbjDbQBltOCB"
    "ltPCBltOEBltPEBltOfEBltPfEBbkNbOBbkNbQBltWCBltXCBltWEBltXEDbjHbOBbjHbQBluECBluFCBluEEBluFEDbk"
    "PbOBbkPbQBluMCBluNCBluMEBluNEBluMfEBluNfEBbjJbOBbjJbQBluUCBluVCBluUEBluVEBluUfEBluVfEBbkRbOBb"
    "kRbQBlvCCBlvDCBlvCEBlvDEBlvCfEBlvDfEBbjLbOBbjLbQBlvKCBlvLCBlvKEBlvLEBlvKfEBlvLfEBbkXbOBbkXbQB"
    "lvSCBlvTCBlvSEBlvTEDbjRbOBbjRbQBlwACBlwBCBlwAEBlwBEDblDbOBblDbQBlwICBlwJCBlwIEBlwJEBlwIfEBlwJ"
    "fECbjXbQClwRCClwREClwRfEBblHbOBblHbQBlwYCBlwZCBlwYEBlwZEBlwYfEBlwZfEBbkBbOBbkBbQBlxGCBlxHCBlx"
    "GEBlxHEBlxGfEBlxHfEBbkJCBbkEABbkNCBbkFABbkPCBbkGABbkRCBbkHABbkXCBblKABblDCBblLABblHCBblMADltG"
    "fKBltHfKBltIfKBltJfKBltKfKBltLfKBltMfKBltNfKBltOfKBltPfKBltQfKBltRfKBltSfKBltTfKBltUfKBltVfKB"
    "luMfKBluNfKBluOfKBluPfKBluQfKBluRfKBluSfKBluTfKBluUfKBluVfKBluWfKBluXfKBluYfKBluZfKBlvAfKBlvB"
    "fKBlwYfKBlwZfKBlxAfKBlxBfKBlxCfKBlxDfKBlxEfKBlxFfKBlxGfKBlxHfKBlxIfKBlxJfKBlxKfKBlxLfKBlxMfKB"
    "lxNfKBbkJOBbkJKBlxOfKBbkJfKBbkEfKCbkJfEBmaGfKBbjDOBbjDKBbjDCBbiSABbjDfKCbkRADgMfEBlxSfKBbkPfK"
    "BbkGfKCbkPfEBmaWfKBbjHCBbiUABbjJCBbiVABbjJfKBmaPCBmaPEBmaPfEBbkROBbkRKBblICBbjCADbkRfEBblIfEB"
    "bjLOBbjLKBbjLCBbiWACmdACBmdAEBmdAfEBblDOBblDKBblJCBbkIABbkZbOBbkZbQBblDfEBblJfEBbjXOBbjXKBbjX"
    "CBbjAABbjTbQBgMCBbiRABdSADlyAfKBblHfKBblMfKCblHfEBmcSfKBbjRCBbiYABbkBCBbjBABbkBfKBgYADmdEABmd"
    "FAlHbkBAEcXABhPAeHmsMeKBmsOeKTmsQeKbFmuYeKBmvCeKBmvAeKcBmwXeKFmxCeKDmxFeKYmyDeKCmyFeKbBmzCeKD"
    "mzJeKDmzLeKCmzOeKXcJeKCnaNeKLmzTeKBcIeKBcKeKBnaQeKBnaReKDnbEeKBnbFeKDnbIeKBnbJeKHnbMeKBnbNeKD"
    "nbUeKBnbVeKDnbYeKBnbZeKbJndAeKBndGeKBndHeKBndJeKbXnbOeKBnbPeKBncJeKBncKeKHndQeKBndReKBndSeKBn"
    "dTeKcIseYABseZAcxUqgBeLcbOshNbioACshPbioACshRbioACshTbioACshVbioACshXbioACshZbioACsiBbioACsiD"
    "bioACsiFbioACsiHbioACsiJbioADsiMbioACsiObioACsiQbioAHsiXbioABsiXbioCCsjAbioABsjAbioCCsjDbioAB"
    "sjDbioCCsjGbioABsjGbioCCsjJbioABsjJbioCXshIbioAKskRbioAOslFbioACslHbioACslJbioACslLbioACslNbi"
    "oACslPbioACslRbioACslTbioACslVbioACslXbioACslZbioACsmBbioADsmEbioACsmGbioACsmIbioAHsmPbioABsm"
    "PbioCCsmSbioABsmSbioCCsmVbioABsmVbioCCsmYbioABsmYbioCCsnBbioABsnBbioCXslAbioADsnVbioABsnWbioA"
    "BsnXbioABsnYbioAEsoJbioAcxtIcbdGABbmzSABccbYABcbiEABbpzDABbdpYABbfuBABcilOABcilOABbhvLABcdfTA"
    "BbgkDABbhvCABblcOABbsvXABbwhPABbyvVABbzkKABbzwQABcctJABbodUABbpiHABbqtDABbrwWABbycBABcdbUABcg"
    "hTABbdtAABbfpTABbonSABbrfNABbyvDABchwWABbjiUABbqjZABbyrLABcaaUABblkRABbxeMABbzoHABbjxIABbnbBA"
    "BbplIABbroEABccvUABbedAABbeyPABbfjYABbmeEABbolVABbrfCABbtaTABbwmJABbytQABbywYABcbtNABcfgSABcg"
    "wLABchvMABbtqYABbuaHABbvoYABbxxPABcdrOABciaPABcapAABbhrBABbjzOABbvcQABbwrEABbriGABbttIABcbhYA"
    "BcfeLABbhqUABbizQABboeLABbppQABbqbNABbvkPABbvuTABcexVABbfjMABbwrRABbfaAABbezKABbugIABbvqCABbx"
    "zDABcezLABcavOABblkXABbodUABcaqOABbdqFABbiuXABbkjYABbrtNABbsmIABbfmDABbtvFABbefFABbkfXABbdoNA"
    "BbpfGABbmlCABbvkCABbfsTABbhmCABbtbTABbycNABcanIABbouSABcckUABbpcQABblmSABbxoVABblsYABbslXABbd"
    "uSABbevPABbezHABbnoZABbvhVABbxkHABcaoWABcdfRABbfkVABbfxQABbhwTABbjyQABbmoBABbqkSABbtxAABcerTA"
    "BcgmKABcibNABcidQABbfhJABbmxYABbosDABcchUABbjuAABbkyQABblcYABbmcOABbqcHABbqxLABbsdLABbudEABbv"
    "sEABbwqPABccfMABbyiWABccpFABcduGABbfcHABbfhRABbgcJABbqsMABbzuOABcanIABbjxHABbkiVABblrNABbouGA"
    "BbvbIABbrsVABbdwUABbgyJABbiuXABbjmWABbkkIABbrvEABbscFABbwiKABbwpAABcdjOABcfeKABcfhOABcfpOABbe"
    "dFABbucCABcdeQABcfcAABbkrXABbdtEABbeqCABbivEABbiyHABbmmJABbodUABbrcOABbsuKABbyjKABccsQABcikZA"
    "BbmvOABcewSABbfgRABbneXABbnjNABbpjTABbpxCABbryNABbslLABbtpRABbvjKABcfsGABbevTABbleSABcezOABbe"
    "jJABbjgRABbpqGABccfQABbkeTABbkvSABbnkXABbrtNABcfaCABbfcZABbfvRABbizTABbmrBABbndEABbnqMABbpgFA"
    "BbryKABbsqSABbwhDABbzvBABbzvTABcdfOABcfdQABbfnRABbpyGABbfwFABbrcQABbseAABbytEABcfbFABchfJABci"
    "bVABbnfZABbppBABbxfCABbunBABbuqIABbveOABbrlWABbqqRABcauAABbdvKABbxrYABbfdQABbfbRABbjvYABbllBA"
    "BbvhEABbirDABbpiKABbmxGABccgHABbzqAABcexXABcacHABbjxRABbeuAABbgmIADbhlYACbmuUADbfaCABbrpYABbs"
    "zQABbtxSABbtzAABbtzHABbuaXABcfiCABbvgGABbwjTACbyuCACcaqIADccqAABccxPAEcfxVABcfyIABcgaAABchsUA"
    "BccwKABcfbZABbeeOABbeqPABbeuNABbfjDABbfkEABbfoJABbgkZABbgpAABbgsUABbhkYABbhoYABbizSABbjaCABbk"
    "oYABbkxCABbkyOABblcKABbmjNABbmpEABbmvXABbnpDABbplVABbpsCABbqcGABbqyWABbrgDABbrzMABbtrDABbtxUA"
    "BbtyFABbtyEABbtyMABbtySABbtyZABbuaVABbuaWABbuhSABbukFABbuwMABbvsEABbvsZABbvvDABbwgWABbwmNABbx"
    "fHABbxkRABbxkRABbydBABbzxOABcacSABcaqRABcasVABcbiPABcbkQABcclAABccqAABcfdRABcfoPABcfqXABbknTA"
    "BilgGABbxgYADbdpMABbeyNABbevOABbecUABbeuFABbewMABbfjBABbflAABbgkZABbgiFABbgkVABbgnQABbhlYABbh"
    "pJABbhuYABbhvOABbifYABbinOABbjxQABbjxXABbkdLABbkgBABbkrOABbkwCABbktKABbkyOABbkwUABblcKABbleYA"
    "BbluIABblxSABblzUABbmjUABbmuUABbnbBABbnbFABbndMABbosFABbouSABbpjTABbpzNABbpyXABbqcGABbqlYABbq"
    "yWABbtiDABbrgNABbrlFABbrpYABbscNABbsiGABbskHABbssZABbstBABbszQABbtaHABbtbGABbteOABbteEABbttKA"
    "BbumBABbuwMABbvdRABbvmHABbvsEABbweWABbwmNABbxtAABbxzBABbzhXABbzzLABcacCABcacSABcaoDABcaqIABca"
    "oPABcaqRABcaqOABcapXABcasVABcavYABcbkQABccgEABccsGABcddPABcdmCABcezSABcfdRABcfiCABcfnFABcfoPA"
    "BcfpBABcfqXABcgsWABcilOABibdYABibdSABifnPABwoZAByhCAByiJABirbLABivbCABjhxZABciiDABcilAAcQcfPc"
    "bJCcgOcbPLcgFccJBcgFccLBdreFccJBdreFccLBcfGcbPBcfGcbRBcfGcbZBcfHcbZBcfIcbZBcfJcbZBcfKcbZBcfLc"
    "bZBcfMcbZCcfOcbZBcfPcbZBcfQcbZBcfRcbZBcfScbZCcfUcbZCcfWcbZBcfXcbZCcfZcbZBcgAcbZCcgCcbZBcgDcbZ"
    "BcgEcbZBcgFcbZBcgGcbZBcfLcbTBcfHccFBcfRccFBcgAccFibSdzgBhwhQCdzgDhwhQPdzgNhwhQfBdzlXhwqABdzlY"
    "hwqAuUeagLhyfEBeagLhyhCoDeauRhziKBeauRhzhQCeauRhziQjSebeMiabGBebeNiabGctbNgufVnmfTBgufWnmfTBg"
    "ugDnmgLBgugDnmgNBgugDnmgPBgugDnmgRBgugDnmgTdJgujPnmfTBgujQnmfTBgujRnmgLBgujSnmgLBgujRnmgNBguj"
    "SnmgNehlGbdqJABbdqEABbdqNABhmiKABbebOABbeeOABbefBABbehUABbemKABbenPABbeqPABbepRABtyCABhogOABb"
    "euNABbeuUABbevKABbewDABhnvOABtzDABbevNABbewZABhnxJABbexJABbexWABbdvWABbeyEABbeyNABjpdNABbfaZA"
    "BbfbNABuaPABbfdRABbfeCABbffUABbffZABucRABbfjBABbfjDABbfkEABbflAABbflLABbflMABbfmDABbfoBABbfoJ"
    "ABbfoSABbfpRABbfqBABbfqDABbfqDABbfqDABhptKABbqpCABbftAABbftVABhqfJABbfuHABbfuNABbfvIABbgbEABb"
    "fxGABbfxWABbfzCABbgbIABbgeOABbgfOABbgiDABbgiTABbgkAABbgkAABbgkVABbglNABbglVABbgmKABbgzMABbgpA"
    "ABbgzNABbgrXABbgtGABbfbRABbhrQABbhgOABbhiAABbhiZABbhdZABbhkKABbhkJABbhpCABhtuYABbhrUABbhrZABb"
    "hsOABbhtIABbhtQABbhwCABhumIABhuoWABbibKABbidFABbidRABbiaQABbigCABuuWABuvKABbimIABbioKABbioKAB"
    "hvrCABbitNABbiuIABbiuXABbivJABhweAABbivVABbiwCABbkcPABbixEABvaNABbizOABbjaCABbjdGABbjbHABhxfO"
    "ABbjiHABhxfQABbjjYABbjjVABbjkMABbjoJABbjoKABvhFABbjpLABbjrCABbjrXABbjtPABvjEABhypFABvkEABbjwI"
    "ABbjwLABbjwOABbjxIABjvvUABbjzIABhzfTABhzfTABbxgBABbkaSABbkaSABvnBABifcQABiwySABbkdEABbkdNABvo"
    "DABbkfIABbkhHABbkhRABbkiZABbkoFABvrMABvqIABbkoYABiapOABbkqXABbkvWABbkwAABbkwCABbkwAABbkxUABbk"
    "yOABbkzYABbkzKABbkzVABblbQABblcKABblcOABbldOABbldZABblgNABbljTABbllCABblpWABicfCABblpDABblmQA"
    "BblqUABblrVABblvOABicnXABblxYABbluJABbltHABwaWABbmaRABbmbMABbmcRABbmbFABwdGABbmjNABbmkQABiecG"
    "ABbmpFABbmzWABbmtDABwjXABbmvXABwjGABwhWABbexEABbexHABbnaEABbmwIABbwsZABzsBABbnbBABbnbFABbnbLA"
    "BbndUABbndJABifmXABwlTABbnjUABbnfHABbnnEABbnpDABiftLABbnpMABbnlFABbnuQABwoZABbnwKABboaDABbocW"
    "ABbokEABigpFABbomDABwtSABbooVABihjBABboqUABwvUABborYABbotRABbouSABbouTABiibTABhwxFABiifYABbpa"
    "KABiixGABbpeTABbpfHABbpbJABbpiCABbpjQABbplVABbpjTABbplHABbplWABbpmJABijbAABbpjGABbpsXABbpvIAB"
    "xePABbpyXABbpyTABijrTABbpqVABbqfEABijxEABijzAABbqiOABbqmZABbqlYABbqlVABxiKABbqnQABbqpPABbqpJA"
    "BbqrLABhnvXABbqxHABilaXABbraQABilnNABbrgAABbrgNABbrhOABimkUABbrjKABbrkFABimwJABineYABbrtAABbr"
    "tRABxtCABbruRABxtOABxtOABbsaXABbsbSABbscNABbsdHABbsfYABxxJABbsjKABiotQABbskKABioxEABbsmIABhyq"
    "HABbssMABiqbHABiqcEABiqhOABygAABygMABbtbGABiqoHABiqoGABiqpTABiqqTABbtcWABbtcXABbtcXABbteOAByi"
    "JABbthBAByiWABylYABirtLABbtoOABbtqYABbttKAByoXABisnMABbtySABisrYABistPABbuaXABbueLAByrVABbuhS"
    "ABbuiCABbuiHABituIABiufVABiufVABbuoKAByzYABiupVABbuwSABbuwVABzbJABiuyAABbvhAABzgAABbvhWABbvhR"
    "ABbviUABiwbUABbvmPABzjTABbvqLABbvsSABbvvHABzlSABixbSABixcXABznDABixiNABbwhEABixmKABbwiFABbwmC"
    "ABbwmNABiycGABiyfBABbwqAABiykEABbwqQABifjBABzrXABbwtEABbwwHABztZABbwyOABbijDABizdVABizeJABifl"
    "BABiflKABbxgBABbxgEABcckCABzxRABbxlPABbxlJABbxmBABbfiHABbxmVABbxmXABbxnHABbxoWABjanCABbxoVABb"
    "xqZABbxtRABbxwNABbxrFABbxxDABbxyTABbydBABbxtBABbxxQABbxxSABbxyIABjawSABjbiPABjbcVABbafBABbyiZ"
    "ABbyjBABbykKABjdtIABbynKABjbzWABbagZABbahDABjceZABjcqCABbahNABbywMABbywYABbyxJABbyxLABbyzXABb"
    "yyQABbzdUABbzcCABbzhXABbzeUABbzhJABbziKABbalRABbzlXABbznDABbamZABbzqUABbzqXABjetBABbzvJABbzvQ"
    "ABbapHABbzwSABtzFABjfpMABjfwOABbauOABbauXABcamYABcapXABcavYABcbdTABjhcQABcbhBABcbhXABcblJABcb"
    "oXABjibNABhoyEABcbsDABcbrOABcbtOABhpgOABcccIABccgEABjkoWABjkpXABcctOABccxDABccyJABjlcGABccyTA"
    "BcdjSABcdpVABcdpWABcdmIABceaZABcecBABjmxMABceqLABbbwNABcesDABjnmDABbbzQABcfcLABbjmOABcfgDABjo"
    "xPABjpfUABbceWABbcfEABcfnKABjpyWABbchMABjqeGABcfpBABcfpBABcfqFABjqpIABcfxIABbcmLABcgaBABcgeXA"
    "BcgfYABcgiGABbcsKABjsrGABcgsWABcheMABchlTABbdcGABbddLABchpVABjuuOABbddWABjuwRABjvgWABjvlXABci"
    "cXABbdhMABcifHABcifMABcifTABcigDABcigKABcihVABjwtSA";

// The combining classes that are not 0, three numbers for each run of code points: how far it is
// from the end of the run before, how many they are, their class.
static const char *const tok_nfc_classes =
    "bdOViWABiYAEiMABiYABiIAFiMAChUAEiMAChUALiMAFBAEiMAIiWABjGABiWADiMADiWACiMBDiWAEiMABiWABiYACiM"
    "ABiWABiZACjAABiZACjAABiZANiWkPFiWkFBiMAEiWABiMADiWABiOABiMAGiWAGiMACiWABiMACiWABiOABiUABiWABK"
    "ABLABMABNABOABPABQABRABSACTABUABVABWBBXBBYABZBBiWABiMBBScUIiWABbEABbFABbGbWBbBABbCABbDABbEABb"
    "FABbGABbHABbIACiWACiMAFiWABiMACiWABiMQBbJdXHiWCEiWABiMABiWCCiWBBiMACiWABiMbJBbKbEBiWABiMACiWA"
    "BiMACiWADiMABiWACiMABiWABiMADiWABiMABiWABiMABiWABiMABiWABiMACiWgEHiWABiMABiWbIEiWBJiWBDiWBFiW"
    "bRDiMeQOiWBBiMACiWABiMACiWABiMADiWADiMABbBABbCABbDADiWABiMACiWACiMAFiWcIBHQBJDBiWABiMACiWdZBH"
    "QBJeGBHQBJeGBHQBJeGBHQBJeXBJeXBJHBdGABdNdXBHQBJeXBJeUBJeFCdZABJNEeDeECeOOEeScYCiMbBBiMBBiMBBi"
    "IcDBeZABfABBfCFEfACBfABCiWABJBCiWcKBiMeIBHBCJdEBiMbbRDiWbkMBJbFBJgBBJKBiWhVBiUfNBiOABiWABiMiL"
    "BiWABiMcTBJUIiWCBiMbWFiWAGiMACiWABiMeOBHPBJbMBiWABiMAHiWcCCJcGBHLCJcPBHfWDiWBBBAFiMACiWAEiMAB"
    "iWBHBEBiMGBiWDCiWhQCiWABiMAHiWABiMACiWABjAABiGABiMABhUAbLiWFBiWABiZABiMABiWABiMbbSCiWACBAEiWA"
    "DBACiWEBiWDCBABiWABiMABiWACBAEiMABiWeoCDiWfLBJdSbGiWvIBiKABiUABiYABiOACiQeBCIbsqEBiWEKiWbGCiW"
    "dCCiWkQBJhHBJbBSiWcFDiMbLBJdRBHMBJjFBiWBCiWABiMCCiWFCiWBBiWcABJjMBJbdzSBbAbdPHiWAHiMACiWblLBi"
    "MiSBiMfTFiWcmSBiMBBiWbOBiWABBABiMEBJgJBiWABiMcaXBJcEBJcFBJABHcRDiWbWCJcKBHcYBJJBHeCBJABHgWBHA"
    "BJdDBHQBJYHiWDFiWhXBJDBHeTBJABHjRBJABHeWBJeOBJABHeLBJbxZBJbduUFBcHHiWbevNBBhwOCiIADBDBiSAFiII"
    "IiMCFiWACiMbEEiWfSDiWffFHiWBRiWCHiWBCiWBFiWdhDHiMeFGiWABH";
// clang-format on

// Each character is in one of the first four classes; those of words are in TOK_WORD as well.
enum { TOK_LETTER = 1, TOK_NUMBER = 2, TOK_WHITE = 4, TOK_OTHER = 8, TOK_WORD = 16 };

enum {
    TOK_MAX_ID = 1 << 22,
    TOK_MAX_PROBE = 1024,  // steps in a hash table: more are a file made to collide
    TOK_MAX_SPECIALS = 16, // before the text, and after it
};
#define TOK_MARK    "▁"            // U+2581, which SentencePiece writes for a space

// The members of tokenizer.json that hold a step, or a Sequence, which holds a list of steps.
enum { TOK_NORMALIZER, TOK_PRE_TOKENIZER, TOK_DECODER, TOK_POST_PROCESSOR };
static const struct {
    const char *member, *list;
} tok_roles[] = {
    [TOK_NORMALIZER] = {"normalizer", "normalizers"},
    [TOK_PRE_TOKENIZER] = {"pre_tokenizer", "pretokenizers"},
    [TOK_DECODER] = {"decoder", "decoders"},
    [TOK_POST_PROCESSOR] = {"post_processor", "processors"},
};

// What a tokenizer does. (The numbers are part of retrofit_tokenizer_hash: new ones go to the end.)
enum {
    TOK_PREPEND_MARK,  // normalizer: "▁" goes in front of the text
    TOK_MARK_SPACES,   // normalizer: each space becomes "▁"
    TOK_SPLIT_DIGITS,  // pre_tokenizer: each digit is a piece
    TOK_SPLIT_GPT2,    // pre_tokenizer: each match of GPT-2's pattern is a piece
    TOK_SPLIT_QWEN2,   // pre_tokenizer: each match of Qwen 2's pattern
    TOK_SPLIT_LLAMA3,  // pre_tokenizer: each match of Llama 3's pattern
    TOK_BYTE_LEVEL,    // pre_tokenizer: each byte becomes a character of the byte-level alphabet
    TOK_GPT2_BYTES,    // pre_tokenizer: TOK_SPLIT_GPT2, then TOK_BYTE_LEVEL
    TOK_UNMARK_SPACES, // decoder: each "▁" becomes a space
    TOK_BYTE_FALLBACK, // decoder: tokens like <0x0A> become bytes
    TOK_FUSE,          // decoder: the tokens' texts are joined
    TOK_STRIP_SPACE,   // decoder: a space at the beginning goes
    TOK_UNDO_BYTES,    // decoder: characters of the byte-level alphabet become bytes
    TOK_OFFSETS,       // post_processor: changes offsets in the text, which we don't give: no ids
    TOK_TEMPLATE,      // post_processor: special tokens go before and after the text's ids
    TOK_FIRST_HASHES,  // the first hashes in users' files are of these steps

    TOK_NFC = TOK_FIRST_HASHES, // normalizer: characters and their marks are composed
    TOK_SPLIT_NUMBERS,    // pre_tokenizer: each run of digits is cut on its own
    TOK_PREFIX_SPACE,     // pre_tokenizer: the byte-level steps put a space before what has none
    TOK_METASPACE,        // pre_tokenizer: each space becomes "▁",
    TOK_METASPACE_ALWAYS, // … all text between two added tokens begins with one,
    TOK_METASPACE_FIRST,  // … or only text at the very beginning does,
    TOK_METASPACE_SPLIT,  // … and each "▁" begins a piece
    TOK_UNMARK_METASPACE, // decoder: each "▁" becomes a space,
    TOK_UNMARK_FIRST,     // … but those of the first token go
    TOK_SPLIT_SPECIAL,    // tokenizer_config.json: special tokens spelt out in a text are text
    TOK_STEPS
};

// clang-format off
// The patterns, as the files have them. They differ in how they cut contractions and digits. Each
// character is in one of their alternatives, so that nothing is left between two matches.
#define TOK_GPT2_PATTERN \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
#define TOK_QWEN2_PATTERN  TOK_PATTERN("\\p{N}")
#define TOK_LLAMA3_PATTERN TOK_PATTERN("\\p{N}{1,3}")
#define TOK_PATTERN(digits) \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" digits \
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
// GPT-4's own spelling of what became Llama 3's pattern. ++ and ?+ give nothing back, but nothing
// that follows here could begin with it; and \s* goes on to the last line break anyway.
#define TOK_GPT4_PATTERN \
    "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}{1,3}" \
    "| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+"

// How a file spells the steps, in the only order in which it may list them: the role, the type, and
// the settings it must have (name, value, name, value, …; TOK_ANY is any value that is there). A
// step in a file is the first row that fits, below the row of the step before.
#define TOK_ANY "*"
static const struct {
    int step, role;
    const char *type, *settings[7];
} tok_steps[] = {
    {TOK_NFC,           TOK_NORMALIZER, "NFC", {NULL}},
    {TOK_PREPEND_MARK,  TOK_NORMALIZER, "Prepend", {"prepend", TOK_MARK}},
    {TOK_MARK_SPACES,   TOK_NORMALIZER, "Replace", {"String", " ", "content", TOK_MARK}},
    {TOK_METASPACE,     TOK_PRE_TOKENIZER, "Metaspace", {"replacement", TOK_MARK}},
    {TOK_SPLIT_NUMBERS, TOK_PRE_TOKENIZER, "Digits", {"individual_digits", "false"}},
    {TOK_SPLIT_DIGITS,  TOK_PRE_TOKENIZER, "Digits", {"individual_digits", "true"}},
    {TOK_SPLIT_GPT2,    TOK_PRE_TOKENIZER, "Split", {"Regex", TOK_GPT2_PATTERN}},
    {TOK_SPLIT_QWEN2,   TOK_PRE_TOKENIZER, "Split", {"Regex", TOK_QWEN2_PATTERN}},
    {TOK_SPLIT_LLAMA3,  TOK_PRE_TOKENIZER, "Split", {"Regex", TOK_LLAMA3_PATTERN}},
    {TOK_SPLIT_LLAMA3,  TOK_PRE_TOKENIZER, "Split", {"Regex", TOK_GPT4_PATTERN}},
    {TOK_BYTE_LEVEL,    TOK_PRE_TOKENIZER, "ByteLevel", {"add_prefix_space", TOK_ANY,
                                                         "use_regex", "false"}},
    {TOK_GPT2_BYTES,    TOK_PRE_TOKENIZER, "ByteLevel", {"add_prefix_space", TOK_ANY}},
    {TOK_UNMARK_METASPACE, TOK_DECODER, "Metaspace", {"replacement", TOK_MARK}},
    {TOK_UNMARK_SPACES, TOK_DECODER, "Replace", {"String", TOK_MARK, "content", " "}},
    {TOK_BYTE_FALLBACK, TOK_DECODER, "ByteFallback", {NULL}},
    {TOK_FUSE,          TOK_DECODER, "Fuse", {NULL}},
    {TOK_STRIP_SPACE,   TOK_DECODER, "Strip", {"content", " ", "start", "1", "stop", "0"}},
    {TOK_UNDO_BYTES,    TOK_DECODER, "ByteLevel", {NULL}},
    {TOK_OFFSETS,       TOK_POST_PROCESSOR, "ByteLevel", {NULL}},
    {TOK_TEMPLATE,      TOK_POST_PROCESSOR, "TemplateProcessing", {NULL}},
};
enum { TOK_ROWS = sizeof tok_steps / sizeof *tok_steps };
// clang-format on

typedef struct {
    const char *text; // NULL: no token has this id
    size_t size;      // of text
    bool in_model;    // whether byte-pair encoding may give it: not so for most added tokens
    bool special;     // decoding can leave it out
    int32_t added;    // its number among the added tokens, from 1 on; 0: it is none
} tok_token;

// An added token, found wherever its text is spelt out.
typedef struct {
    const char *text; // what to look for: the token's text, normalized where the text searched is
    size_t size;
    int32_t id;
    int32_t key;      // text's first byte, + 256 if it is to be found in normalized text
    int32_t order;    // of two with one text, once normalized, the lower is found
    int32_t shorter;  // number of the longest one that this one's text begins with; -1: none
    bool special;     // as the token
    bool normalized;  // to be found in normalized text
    bool single_word; // not found inside of a word
    bool lstrip;      // takes white space before it with it
    bool rstrip;      // and behind it
    bool again;       // transformers adds it once more when tokenizer.json is loaded
} tok_added;

// Two neighbours become one token.
typedef struct {
    uint64_t pair; // tok_pair of their ids
    uint32_t rank; // place in the list of merges from 1 on, the lowest goes first; 0: a free slot
    int32_t id;    // what they become
} tok_merge;

typedef struct {
    int32_t ids[TOK_MAX_SPECIALS];
    size_t count;
} tok_specials;

// A canonical decomposition; second is 0 if there is none.
typedef struct {
    uint32_t whole, first, second;
} tok_nfc_pair;

enum { TOK_NFC_PAIRS = 2100 }; // room for those of the table
typedef struct {
    tok_nfc_pair decompositions[TOK_NFC_PAIRS];
    tok_nfc_pair compositions[TOK_NFC_PAIRS]; // those that may be composed again, by first, second
    size_t composition_count;
    uint16_t decomposition[0x110000]; // by code point: its place in decompositions + 1, or 0
    uint8_t classes[0x110000];        // by code point: its combining class, or TOK_NFC_JOINS
} tok_nfc;
// Instead of class 0, for code points that may be composed with one before them.
enum { TOK_NFC_JOINS = 255 };

enum { TOK_CHAR_IDS = 0x180 }; // Latin letters, and the byte-level alphabet

struct retrofit_tokenizer {
    // The vocabulary
    tok_token *tokens;     // by id
    size_t size;           // of tokens: the highest id + 1
    int32_t *by_text;      // hash table from a token's text to its id + 1; 0 is a free slot
    size_t text_mask;      // number of its slots, a power of two, minus 1
    tok_merge *merges;     // hash table from a pair of ids to its merge
    size_t merge_mask;     // number of its slots minus 1
    bool joins[256][256];  // whether a merge joins text that ends in the first byte to text that
                           // begins with the second
    int32_t char_ids[TOK_CHAR_IDS]; // by code point: tok_find_in_model of this one character
    int32_t byte_ids[256]; // id + 1 of the token that stands for a byte, as <0x0A> does; 0 if none
    char *strings;         // the bytes of all tokens' texts

    // Added tokens
    tok_added *added;            // by key, then by text
    size_t added_count;
    size_t added_begin[512 + 1]; // those with key k are added_begin[k] … added_begin[k + 1] - 1

    // Settings
    bool has[TOK_STEPS];   // which steps it has
    int pattern;           // TOK_SPLIT_GPT2, _QWEN2 or _LLAMA3 cuts text into pieces; -1: none
    bool byte_level;       // pieces are spelt in the byte-level alphabet
    bool has_decoder;      // if not, decoding puts spaces between tokens
    bool fuse_unk;         // neighbouring unknown characters become one unknown token
    bool byte_fallback;    // unknown characters become byte tokens, where each byte has one
    bool ignore_merges;    // a piece that is a token needs no merges
    bool cleans_up;        // in transformers decoded text loses spaces before punctuation
    int32_t bos, eos, unk; // ids of beginning and end of text, of unknown characters; -1 if none
    tok_specials before;   // what with_special adds in front of the text
    tok_specials after;    // and behind it

    // Characters
    uint8_t *classes;           // by code point: TOK_LETTER, TOK_NUMBER, TOK_WHITE or TOK_OTHER
    uint16_t byte_to_char[256]; // the byte-level alphabet
    uint16_t char_to_byte[324]; // and back: byte + 1; 0: not in the alphabet
    tok_nfc *nfc;               // NULL without TOK_NFC
};

// ---- Tokenizer: what all its parts use ---------------------------------------------------------

// The byte that a token like <0x0A> stands for, or -1.
static int tok_fallback_byte(const tok_token *token) {
    const char *text = token->text;
    if (token->size != 6 || memcmp(text, "<0x", 3) || text[5] != '>') return -1;
    if (strspn(text + 3, "0123456789ABCDEF") != 2) return -1;
    return (int)strtol(text + 3, NULL, 16);
}

// FNV-1a, continued over the bytes of a text.
static uint64_t tok_hash_text(uint64_t hash, const char *text, size_t size) {
    for (size_t i = 0; i < size; i++) hash = (hash ^ (unsigned char)text[i]) * 0x100000001b3u;
    return hash;
}

// The slot of a token's text: its own, or the free one where it would go. NULL if not found soon.
static int32_t *tok_text_slot(const retrofit_tokenizer *tokenizer, const char *text, size_t size) {
    uint64_t hash = tok_hash_text(RETROFIT_HASH_START, text, size);
    hash ^= hash >> 29;
    for (size_t probe = 0; probe < TOK_MAX_PROBE; probe++) {
        int32_t *slot = &tokenizer->by_text[(hash + probe) & tokenizer->text_mask];
        if (!*slot) return slot;
        const tok_token *token = &tokenizer->tokens[*slot - 1];
        if (token->size == size && !memcmp(token->text, text, size)) return slot;
    }
    return NULL;
}

// The id of the token with this text, or -1.
static int32_t tok_find(const retrofit_tokenizer *tokenizer, const char *text, size_t size) {
    const int32_t *slot = tok_text_slot(tokenizer, text, size);
    return slot ? *slot - 1 : -1;
}

// The same, only for tokens that byte-pair encoding may give.
static int32_t tok_find_in_model(const retrofit_tokenizer *tokenizer, const char *text,
                                 size_t size) {
    int32_t id = tok_find(tokenizer, text, size);
    return id >= 0 && tokenizer->tokens[id].in_model ? id : -1;
}

// The same for the first character of a text, of `length` bytes.
static int32_t tok_find_character(const retrofit_tokenizer *tokenizer, uint32_t code_point,
                                  const char *text, size_t length) {
    if (code_point < TOK_CHAR_IDS) return tokenizer->char_ids[code_point];
    return tok_find_in_model(tokenizer, text, length);
}

static uint64_t tok_pair(int32_t left, int32_t right) {
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

// The slot of a pair: its own, or the free one where it would go. NULL if not found soon.
static tok_merge *tok_merge_slot(const retrofit_tokenizer *tokenizer, uint64_t pair) {
    uint64_t hash = pair * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
    for (size_t probe = 0; probe < TOK_MAX_PROBE; probe++) {
        tok_merge *merge = &tokenizer->merges[(hash + probe) & tokenizer->merge_mask];
        if (!merge->rank || merge->pair == pair) return merge;
    }
    return NULL;
}

// Appends text with `to` wherever it has `from`.
static void tok_append_replaced(retrofit_text *out, const char *text, size_t size, const char *from,
                                const char *to) {
    size_t from_size = strlen(from);
    const char *end = text + size;
    for (;;) {
        const char *hit = memmem(text, (size_t)(end - text), from, from_size);
        if (!hit) break;
        retrofit_text_append(out, text, (size_t)(hit - text));
        retrofit_text_append(out, to, strlen(to));
        text = hit + from_size;
    }
    retrofit_text_append(out, text, (size_t)(end - text));
}

// The next number of a table in base 26, whose last digit is a capital.
static uint32_t tok_table_number(const char **digits) {
    uint32_t number = 0;
    for (;; ++*digits) {
        bool is_last = **digits >= 'A' && **digits <= 'Z';
        number = 26 * number + (uint32_t)(**digits - (is_last ? 'A' : 'a'));
        if (!is_last) continue;
        ++*digits;
        return number;
    }
}

// ---- Tokenizer: NFC ----------------------------------------------------------------------------
// Unicode's canonical composition: all that can be taken apart is, marks are sorted by their class,
// and what can be put together is. Text is done in stretches, from a character that cannot join
// those before it to the next such one. A stretch is an array of code points with their classes,
// class << 56 | place << 24 | code point, so that sorting them as numbers sorts marks by class.

enum { HANGUL_L = 0x1100, HANGUL_V = 0x1161, HANGUL_T = 0x11a7, HANGUL_S = 0xac00 };
enum { HANGUL_V_COUNT = 21, HANGUL_T_COUNT = 28, HANGUL_COUNT = 19 * 21 * 28 };

static int tok_compare_numbers(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static int tok_compare_pairs(const void *a, const void *b) {
    const tok_nfc_pair *x = a, *y = b;
    if (x->first != y->first) return x->first < y->first ? -1 : 1;
    return (x->second > y->second) - (x->second < y->second);
}

static void tok_nfc_append(const tok_nfc *nfc, retrofit_text *stretch, uint32_t code_point) {
    uint64_t class = nfc->classes[code_point];
    if (class == TOK_NFC_JOINS) class = 0;
    uint64_t item = class << 56 | (uint64_t)(stretch->size / sizeof item) << 24 | code_point;
    retrofit_text_append(stretch, &item, sizeof item);
}

// Appends the full decomposition of a code point. Only its first part may be decomposed further.
static void tok_nfc_decompose(const tok_nfc *nfc, retrofit_text *stretch, uint32_t code_point) {
    uint32_t syllable = code_point - HANGUL_S; // of Hangul, if it is one: L, V and perhaps T
    if (code_point >= HANGUL_S && syllable < HANGUL_COUNT) {
        uint32_t t = syllable % HANGUL_T_COUNT, lv = syllable / HANGUL_T_COUNT;
        tok_nfc_append(nfc, stretch, HANGUL_L + lv / HANGUL_V_COUNT);
        tok_nfc_append(nfc, stretch, HANGUL_V + lv % HANGUL_V_COUNT);
        if (t) tok_nfc_append(nfc, stretch, HANGUL_T + t);
        return;
    }
    if (!nfc->decomposition[code_point]) {
        tok_nfc_append(nfc, stretch, code_point);
        return;
    }
    const tok_nfc_pair *pair = &nfc->decompositions[nfc->decomposition[code_point] - 1];
    tok_nfc_decompose(nfc, stretch, pair->first);
    if (pair->second) tok_nfc_append(nfc, stretch, pair->second);
}

// What two code points compose to, or 0.
static uint32_t tok_nfc_compose(const tok_nfc *nfc, uint32_t first, uint32_t second) {
    uint32_t l = first - HANGUL_L, v = second - HANGUL_V, t = second - HANGUL_T;
    if (l < 19 && v < HANGUL_V_COUNT)
        return HANGUL_S + (l * HANGUL_V_COUNT + v) * HANGUL_T_COUNT;
    uint32_t syllable = first - HANGUL_S;
    if (syllable < HANGUL_COUNT && syllable % HANGUL_T_COUNT == 0 && t > 0 && t < HANGUL_T_COUNT)
        return first + t;
    tok_nfc_pair key = {0, first, second};
    const tok_nfc_pair *pair = bsearch(&key, nfc->compositions, nfc->composition_count, sizeof key,
                                       tok_compare_pairs);
    return pair ? pair->whole : 0;
}

// Sorts the marks of a stretch, composes it, appends it to out and empties it. A mark joins the
// last character of class 0, unless one of its class, or of a higher one, stands between the two.
static void tok_nfc_flush(const tok_nfc *nfc, retrofit_text *stretch, retrofit_text *out) {
    uint64_t *items = (uint64_t *)(void *)stretch->bytes;
    size_t count = stretch->size / sizeof *items, kept = 0;
    for (size_t begin = 0, end; begin < count; begin = end + 1) {
        end = begin;
        while (end < count && items[end] >> 56) end++;
        if (end > begin + 1) qsort(items + begin, end - begin, sizeof *items, tok_compare_numbers);
    }
    size_t base = SIZE_MAX; // the last character of class 0
    for (size_t i = 0; i < count; i++) {
        uint64_t class = items[i] >> 56, before = kept ? items[kept - 1] >> 56 : 0;
        uint32_t code_point = items[i] & 0x1fffff, whole = 0;
        bool joins = base != SIZE_MAX && (base == kept - 1 || before < class);
        if (joins) whole = tok_nfc_compose(nfc, items[base] & 0x1fffff, code_point);
        if (whole) {
            items[base] = whole;
            continue;
        }
        if (!class) base = kept;
        items[kept++] = items[i];
    }
    for (size_t i = 0; i < kept; i++) {
        char character[4];
        size_t length = utf8_put(items[i] & 0x1fffff, character);
        retrofit_text_append(out, character, length);
    }
    stretch->size = 0;
}

// Appends text in NFC. Before U+0300 (CC 80 in UTF-8) there is nothing to be done.
static void tok_nfc_put(const tok_nfc *nfc, retrofit_text *out, const char *text, size_t size) {
    size_t i = 0, length;
    while (i < size && (unsigned char)text[i] < 0xcc) i++;
    if (i == size) {
        retrofit_text_append(out, text, size);
        return;
    }
    retrofit_text stretch = {0};
    for (i = 0; i < size; i += length) {
        uint32_t code_point;
        length = retrofit_utf8_next(text + i, size - i, &code_point);
        size_t old_size = stretch.size;
        tok_nfc_decompose(nfc, &stretch, code_point);
        if (stretch.failed) break;
        // Did this character begin a new stretch? Then the old one is done.
        const uint64_t *items = (const uint64_t *)(void *)stretch.bytes;
        uint32_t first = items[old_size / sizeof *items] & 0x1fffff;
        if (nfc->classes[first] || !old_size) continue;
        stretch.size = old_size;
        tok_nfc_flush(nfc, &stretch, out);
        tok_nfc_decompose(nfc, &stretch, code_point);
    }
    tok_nfc_flush(nfc, &stretch, out);
    out->failed = out->failed || stretch.failed;
    free(stretch.bytes);
}

// Reads the tables. NULL or error.
static tok_nfc *tok_nfc_make(void) {
    tok_nfc *nfc = retrofit_allocate(1, sizeof *nfc);
    if (!nfc) return NULL;
    uint32_t at = 0;
    const char *digits = tok_nfc_classes;
    while (*digits) {
        at += tok_table_number(&digits);
        uint32_t length = tok_table_number(&digits);
        memset(nfc->classes + at, (int)tok_table_number(&digits), length);
        at += length;
    }
    size_t count = 0;
    at = 0;
    for (digits = tok_nfc_pairs; *digits; count++) {
        at += tok_table_number(&digits);
        uint32_t first = tok_table_number(&digits), second = tok_table_number(&digits);
        tok_nfc_pair pair = {at, first, second ? second / 2 + 0x2ff : 0};
        nfc->decompositions[count] = pair;
        nfc->decomposition[at] = (uint16_t)(count + 1);
        if (!second || second % 2) continue;
        nfc->compositions[nfc->composition_count++] = pair;
        if (!nfc->classes[pair.second]) nfc->classes[pair.second] = TOK_NFC_JOINS;
    }
    memset(nfc->classes + HANGUL_V, TOK_NFC_JOINS, HANGUL_V_COUNT);
    memset(nfc->classes + HANGUL_T + 1, TOK_NFC_JOINS, HANGUL_T_COUNT - 1);
    qsort(nfc->compositions, nfc->composition_count, sizeof *nfc->compositions, tok_compare_pairs);
    return nfc;
}

// The normalizer: text, normalized, replaces what out holds.
static void tok_normalize(const retrofit_tokenizer *tokenizer, retrofit_text *out, const char *text,
                          size_t size) {
    retrofit_text composed = {0};
    if (tokenizer->nfc) {
        tok_nfc_put(tokenizer->nfc, &composed, text, size);
        text = composed.bytes;
        size = composed.size;
    }
    out->size = 0;
    if (tokenizer->has[TOK_PREPEND_MARK]) retrofit_text_append(out, TOK_MARK, strlen(TOK_MARK));
    if (tokenizer->has[TOK_MARK_SPACES]) tok_append_replaced(out, text, size, " ", TOK_MARK);
    else retrofit_text_append(out, text, size);
    out->failed = out->failed || composed.failed;
    free(composed.bytes);
}

// ---- Tokenizer: the patterns that cut text into pieces -----------------------------------------

// The size of the characters at the beginning of text, of at most `most`, that are in the classes.
static size_t tok_run(const retrofit_tokenizer *tokenizer, const char *text, size_t size,
                      int classes, size_t most) {
    size_t end = 0;
    for (size_t i = 0; i < most && end < size; i++) {
        uint32_t code_point = (unsigned char)text[end];
        size_t length = 1;
        if (code_point >= 0x80) length = retrofit_utf8_next(text + end, size - end, &code_point);
        if (!(tokenizer->classes[code_point] & classes)) break;
        end += length;
    }
    return end;
}

// Each tok_match function returns the length of the match at the beginning of text, or 0.
// 's|'t|'re|'ve|'m|'ll|'d, or with any_case (?i:…), where the long s (U+017F) is an s too.
static size_t tok_match_contraction(const char *text, size_t size, bool any_case) {
    if (size < 2 || text[0] != '\'') return 0;
    if (any_case && size > 2 && !memcmp(text + 1, "ſ", 2)) return 3;
    int lower = any_case ? 'a' - 'A' : 0; // the bit that capital letters lack
    int first = text[1] | lower;
    int second = size > 2 ? text[2] | lower : 0;
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
    if ((first == 'r' || first == 'v') && second == 'e') return 3;
    return first == 'l' && second == 'l' ? 3 : 0;
}

// \s+(?!\S)|\s+ where text begins with `white` > 0 bytes of white space. Before anything else the
// last character of white space is left for the next match, unless it is the only one.
static size_t tok_match_white(const char *text, size_t size, size_t white) {
    if (white == size) return white;
    size_t last = white - 1;
    while (((unsigned char)text[last] & 0xc0) == 0x80) last--;
    return last ? last : white;
}

// The alternatives of GPT-2's pattern, one by one; size > 0. Every character is in one of them.
static size_t tok_match_gpt2(const retrofit_tokenizer *tokenizer, const char *text, size_t size) {
    // 's|'t|'re|'ve|'m|'ll|'d
    size_t length = tok_match_contraction(text, size, false);
    if (length) return length;
    //  ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+
    static const int classes[] = {TOK_LETTER, TOK_NUMBER, TOK_OTHER};
    size_t space = text[0] == ' ';
    for (int i = 0; i < 3; i++) {
        length = tok_run(tokenizer, text + space, size - space, classes[i], SIZE_MAX);
        if (length) return space + length;
    }
    // \s+(?!\S)|\s+
    return tok_match_white(text, size, tok_run(tokenizer, text, size, TOK_WHITE, SIZE_MAX));
}

static bool is_line_break(int32_t c) { return c == '\r' || c == '\n'; }

// The alternatives of Llama 3's pattern, with at most 3 digits, and of Qwen 2's, with 1.
static size_t tok_match_llama3(const retrofit_tokenizer *tokenizer, const char *text, size_t size,
                               size_t most_digits) {
    // (?i:'s|'t|'re|'ve|'m|'ll|'d)
    size_t length = tok_match_contraction(text, size, true);
    if (length) return length;
    // [^\r\n\p{L}\p{N}]?\p{L}+
    uint32_t first;
    size_t skip = retrofit_utf8_next(text, size, &first);
    bool is_word = tokenizer->classes[first] & (TOK_LETTER | TOK_NUMBER);
    if (is_word || is_line_break((int32_t)first)) skip = 0;
    length = tok_run(tokenizer, text + skip, size - skip, TOK_LETTER, SIZE_MAX);
    if (length) return skip + length;
    // \p{N}{1,most_digits}
    length = tok_run(tokenizer, text, size, TOK_NUMBER, most_digits);
    if (length) return length;
    //  ?[^\s\p{L}\p{N}]+[\r\n]*
    size_t space = first == ' ';
    length = tok_run(tokenizer, text + space, size - space, TOK_OTHER, SIZE_MAX);
    if (length) {
        length += space;
        while (length < size && is_line_break(text[length])) length++;
        return length;
    }
    // \s*[\r\n]+, which is white space up to its last line break
    size_t white = tok_run(tokenizer, text, size, TOK_WHITE, SIZE_MAX);
    for (length = white; length > 0; length--)
        if (is_line_break(text[length - 1])) return length;
    // \s+(?!\S)|\s+
    return tok_match_white(text, size, white);
}

// The length of the piece at the beginning of text.
static size_t tok_match(const retrofit_tokenizer *tokenizer, const char *text, size_t size) {
    switch (tokenizer->pattern) {
    case TOK_SPLIT_GPT2: return tok_match_gpt2(tokenizer, text, size);
    case TOK_SPLIT_QWEN2: return tok_match_llama3(tokenizer, text, size, 1);
    case TOK_SPLIT_LLAMA3: return tok_match_llama3(tokenizer, text, size, 3);
    default: return size;
    }
}

// ---- Tokenizer: byte-pair encoding -------------------------------------------------------------
// A piece begins as a row of symbols, one for each character. As long as any two neighbours have a
// merge, the pair whose merge has the lowest rank is merged, of equal ones the leftmost. A queue, a
// binary heap in this order, holds the pairs that may come next: n symbols take O(n·log n) steps.
// Of two pairs that share a symbol the later one cannot, and waits outside: so in a long run of
// spaces the queue stays short.

// A symbol stays where its first character was put. The next one begins `length` behind it; to find
// the one before that, the last of its places has the length too.
typedef struct {
    int32_t id;
    uint32_t rank;   // of its merge with the next symbol; 0: there is none
    uint32_t length; // in characters, or byte tokens
} tok_symbol;

// A piece that was encoded before, and its ids: 64 bytes, as a cache line has. A longer piece, or
// one of more ids, is not kept. Each piece has one place, by its hash, where the newest stays.
enum { TOK_CACHE = 1 << 15, TOK_CACHED_TEXT = 30, TOK_CACHED_IDS = 8 };
typedef struct {
    uint8_t size, count; // of text and ids; size 0: nothing yet
    char text[TOK_CACHED_TEXT];
    int32_t ids[TOK_CACHED_IDS];
} tok_cached;

typedef struct retrofit_encoder {
    const retrofit_tokenizer *tokenizer;
    tok_cached *cache;        // [TOK_CACHE], or NULL
    void (*progress)(void *context, size_t bytes);
    void *context;
    size_t done;              // bytes of a text that are encoded
    retrofit_text valid;      // the text with U+FFFD for what is not UTF-8, if there is any
    retrofit_text normalized; // what is between two added tokens
    retrofit_text stretch;    // text to be cut into pieces, with a space or "▁" before it
    retrofit_text piece;      // a piece in the byte-level alphabet
    retrofit_text ids;        // the result: its bytes are int32_t
    tok_symbol *symbols;
    uint32_t symbol_count;
    uint64_t *heap;  // tok_order of pairs
    size_t heap_count;
    size_t capacity; // symbols and heap have room for a piece of so many bytes
} tok_encoder;

static void tok_append_id(tok_encoder *encoder, int32_t id) {
    retrofit_text_append(&encoder->ids, &id, sizeof id);
}

static void tok_add_symbol(tok_encoder *encoder, int32_t id) {
    encoder->symbols[encoder->symbol_count++] = (tok_symbol){id, 0, 1};
}

static uint32_t tok_next(const tok_encoder *encoder, uint32_t at) {
    return at + encoder->symbols[at].length;
}

// The first symbol has itself before it.
static uint32_t tok_before(const tok_encoder *encoder, uint32_t at) {
    return at > 0 ? at - encoder->symbols[at - 1].length : at;
}

// The merge of the symbol at `at` with the next one. Without one its rank is 0, or it is NULL.
static const tok_merge *tok_merge_at(const tok_encoder *encoder, uint32_t at) {
    uint32_t next = tok_next(encoder, at);
    if (next >= encoder->symbol_count) return NULL;
    uint64_t pair = tok_pair(encoder->symbols[at].id, encoder->symbols[next].id);
    return tok_merge_slot(encoder->tokenizer, pair);
}

static void tok_set_rank(tok_encoder *encoder, uint32_t at) {
    const tok_merge *merge = tok_merge_at(encoder, at);
    encoder->symbols[at].rank = merge ? merge->rank : 0;
}

// The lowest comes first.
static uint64_t tok_order(const tok_encoder *encoder, uint32_t at) {
    uint64_t rank = encoder->symbols[at].rank;
    return rank ? rank << 32 | at : UINT64_MAX;
}

// Puts the merge of the symbol at `at` with the next one into the queue, if there is one and it
// comes before those of its two neighbours.
static void tok_queue_merge(tok_encoder *encoder, uint32_t at) {
    uint64_t order = tok_order(encoder, at), *heap = encoder->heap;
    if (order == UINT64_MAX || tok_order(encoder, tok_before(encoder, at)) < order) return;
    uint32_t next = tok_next(encoder, at); // there is one, with which it is merged
    if (tok_order(encoder, next) < order) return;
    size_t i = encoder->heap_count++;
    while (i > 0 && heap[(i - 1) / 2] > order) {
        heap[i] = heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    heap[i] = order;
}

// Takes the first merge out of the queue, which is not empty.
static uint64_t tok_pop_merge(tok_encoder *encoder) {
    uint64_t *heap = encoder->heap, first = heap[0];
    size_t count = --encoder->heap_count;
    uint64_t last = heap[count]; // goes where the heap has room for it
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= count) break;
        if (child + 1 < count && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= last) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return first;
}

// Merges the symbol at `at` with the next one. That changes the merges at `at` and before it, and
// so, for these and their neighbours, which one comes first.
static void tok_join(tok_encoder *encoder, uint32_t at) {
    tok_symbol *symbols = encoder->symbols;
    uint32_t next = tok_next(encoder, at), before = tok_before(encoder, at);
    symbols[at].id = tok_merge_at(encoder, at)->id;
    symbols[next].rank = 0;
    symbols[at].length += symbols[next].length;
    next = tok_next(encoder, at);
    symbols[next - 1].length = symbols[at].length;
    tok_set_rank(encoder, at);
    if (before < at) tok_set_rank(encoder, before);
    for (uint32_t i = tok_before(encoder, before); i <= next && i < encoder->symbol_count;
         i = tok_next(encoder, i))
        tok_queue_merge(encoder, i);
}

// Does all merges of the symbols and moves what remains to the ids.
static void tok_merge_symbols(tok_encoder *encoder) {
    uint32_t count = encoder->symbol_count;
    for (uint32_t i = 0; i < count; i++) {
        tok_set_rank(encoder, i);
        if (i > 0) tok_queue_merge(encoder, i - 1);
    }
    while (encoder->heap_count) {
        uint64_t best = tok_pop_merge(encoder);
        uint32_t at = (uint32_t)best; // one of the two may have changed since
        if (encoder->symbols[at].rank == best >> 32) tok_join(encoder, at);
    }
    for (uint32_t i = 0; i < count; i = tok_next(encoder, i))
        tok_append_id(encoder, encoder->symbols[i].id);
    encoder->symbol_count = 0;
}

// Makes room for a piece of `size` bytes. It has no more symbols than bytes. At first at most every
// other one is queued; each merge, of which there are fewer than symbols, is taken out of the queue
// and puts at most two of four neighbours into it. false or error.
static bool tok_reserve(tok_encoder *encoder, size_t size) {
    if (size > encoder->capacity) {
        free(encoder->symbols);
        free(encoder->heap);
        encoder->capacity = 2 * size;
        encoder->symbols = retrofit_allocate(encoder->capacity, sizeof *encoder->symbols);
        encoder->heap = retrofit_allocate(2 * encoder->capacity, sizeof *encoder->heap);
    }
    if (!encoder->symbols || !encoder->heap) return false;
    if (size < UINT32_MAX) return true;
    return retrofit_fail("4 GB in one piece: encode the text in parts");
}

// Byte fallback: adds the byte tokens of a character, if there is one for each of its bytes.
static bool tok_add_bytes(tok_encoder *encoder, const char *character, size_t length) {
    const retrofit_tokenizer *tokenizer = encoder->tokenizer;
    if (!tokenizer->byte_fallback) return false;
    for (size_t i = 0; i < length; i++)
        if (!tokenizer->byte_ids[(unsigned char)character[i]]) return false;
    for (size_t i = 0; i < length; i++)
        tok_add_symbol(encoder, tokenizer->byte_ids[(unsigned char)character[i]] - 1);
    return true;
}

// Byte-pair encoding of one piece. A character without a token becomes byte tokens, or else the
// unknown token, or else nothing. An unknown token waits for the next character that is no byte
// token, or the end: so byte tokens overtake it, as in Hugging Face's tokenizers.
// Where no merge joins text that ends in the byte before to text that begins with this byte, no
// merge can ever reach over this place. So what is before it is merged at once: the queue stays
// short.
static void tok_encode_piece(tok_encoder *encoder, const char *text, size_t size) {
    const retrofit_tokenizer *tokenizer = encoder->tokenizer;
    if (tokenizer->ignore_merges) {
        int32_t whole = tok_find_in_model(tokenizer, text, size);
        if (whole >= 0) {
            tok_append_id(encoder, whole);
            return;
        }
    }
    if (!tok_reserve(encoder, size)) {
        encoder->ids.failed = true;
        return;
    }
    bool known = false;   // the character before this one has a token
    bool unknown = false; // an unknown token is still to be added
    size_t length;
    for (size_t i = 0; i < size; i += length) {
        uint32_t code_point;
        length = retrofit_utf8_next(text + i, size - i, &code_point);
        int32_t id = tok_find_character(tokenizer, code_point, text + i, length);
        if (id >= 0) {
            const bool *joins = known ? tokenizer->joins[(unsigned char)text[i - 1]] : NULL;
            if (joins && !joins[(unsigned char)text[i]]) tok_merge_symbols(encoder);
            if (unknown) tok_add_symbol(encoder, tokenizer->unk);
            tok_add_symbol(encoder, id);
            unknown = false;
        } else if (!tok_add_bytes(encoder, text + i, length)) {
            if (unknown && !tokenizer->fuse_unk) tok_add_symbol(encoder, tokenizer->unk);
            unknown = tokenizer->unk >= 0;
        }
        known = id >= 0;
    }
    if (unknown) tok_add_symbol(encoder, tokenizer->unk);
    tok_merge_symbols(encoder);
}

// ---- Tokenizer: from text to ids ---------------------------------------------------------------

static void tok_append_byte(tok_encoder *encoder, char byte) {
    char character[4];
    uint32_t code_point = encoder->tokenizer->byte_to_char[(unsigned char)byte];
    retrofit_text_append(&encoder->piece, character, utf8_put(code_point, character));
}

// Encodes a piece spelt in the byte-level alphabet.
static void tok_encode_bytes(tok_encoder *encoder, const char *text, size_t size) {
    const bool *has = encoder->tokenizer->has;
    bool prefix = has[TOK_PREFIX_SPACE] && has[TOK_BYTE_LEVEL] && text[0] != ' ';
    encoder->piece.size = 0;
    if (prefix) tok_append_byte(encoder, ' ');
    for (size_t i = 0; i < size; i++) tok_append_byte(encoder, text[i]);
    tok_encode_piece(encoder, encoder->piece.bytes, encoder->piece.size);
}

static void tok_encode_uncached(tok_encoder *encoder, const char *text, size_t size) {
    if (encoder->tokenizer->byte_level) tok_encode_bytes(encoder, text, size);
    else tok_encode_piece(encoder, text, size);
}

// A piece has the same ids wherever it stands.
static void tok_encode_cached(tok_encoder *encoder, const char *text, size_t size) {
    if (!encoder->cache || size == 0 || size > TOK_CACHED_TEXT) {
        tok_encode_uncached(encoder, text, size);
        return;
    }
    uint64_t hash = tok_hash_text(RETROFIT_HASH_START, text, size);
    tok_cached *cached = &encoder->cache[(hash ^ hash >> 32) % TOK_CACHE];
    if (cached->size == size && !memcmp(cached->text, text, size)) {
        retrofit_text_append(&encoder->ids, cached->ids, cached->count * sizeof(int32_t));
        return;
    }
    size_t begin = encoder->ids.size;
    tok_encode_uncached(encoder, text, size);
    size_t bytes = encoder->ids.size - begin;
    if (encoder->ids.failed || bytes > sizeof cached->ids) return;
    cached->size = (uint8_t)size;
    cached->count = (uint8_t)(bytes / sizeof(int32_t));
    memcpy(cached->text, text, size);
    if (bytes > 0) memcpy(cached->ids, encoder->ids.bytes + begin, bytes);
}

// The Metaspace step: "▁" for each space, and one in front, if there is none and this is `first` or
// it is so everywhere. Each "▁" begins a piece, or else all is one.
static void tok_encode_metaspace(tok_encoder *encoder, const char *text, size_t size, bool first) {
    const bool *has = encoder->tokenizer->has;
    const size_t mark = strlen(TOK_MARK);
    retrofit_text *out = &encoder->stretch;
    out->size = 0;
    bool marked = text[0] == ' ' || (size >= mark && !memcmp(text, TOK_MARK, mark));
    bool prepend = has[TOK_METASPACE_ALWAYS] || (has[TOK_METASPACE_FIRST] && first);
    if (prepend && !marked) retrofit_text_append(out, TOK_MARK, mark);
    tok_append_replaced(out, text, size, " ", TOK_MARK);
    const char *end = out->bytes + out->size;
    for (const char *at = out->bytes; at < end;) {
        const char *next = NULL;
        if (has[TOK_METASPACE_SPLIT])
            next = memmem(at + 1, (size_t)(end - at) - 1, TOK_MARK, mark);
        if (!next) next = end;
        tok_encode_cached(encoder, at, (size_t)(next - at));
        at = next;
    }
}

// Cuts text that a step before may have cut already, and encodes its pieces.
static void tok_encode_stretch(tok_encoder *encoder, const char *text, size_t size, bool first) {
    const retrofit_tokenizer *tokenizer = encoder->tokenizer;
    const bool *has = tokenizer->has;
    if (has[TOK_METASPACE]) {
        tok_encode_metaspace(encoder, text, size, first);
        return;
    }
    if (has[TOK_PREFIX_SPACE] && has[TOK_GPT2_BYTES] && text[0] != ' ') {
        encoder->stretch.size = 0;
        retrofit_text_append(&encoder->stretch, " ", 1);
        retrofit_text_append(&encoder->stretch, text, size);
        text = encoder->stretch.bytes;
        size = encoder->stretch.size;
    }
    size_t length;
    for (size_t i = 0; i < size; i += length) {
        length = tok_match(tokenizer, text + i, size - i);
        tok_encode_cached(encoder, text + i, length);
    }
}

// Cuts normalized text into pieces and encodes them; `first`: it is the beginning of all text. With
// a Digits step each digit, or each run of them, and each stretch between is cut on its own.
static void tok_encode_part(tok_encoder *encoder, const char *text, size_t size, bool first) {
    const retrofit_tokenizer *tokenizer = encoder->tokenizer;
    size_t most = tokenizer->has[TOK_SPLIT_DIGITS]    ? 1
                  : tokenizer->has[TOK_SPLIT_NUMBERS] ? SIZE_MAX
                                                      : 0;
    const int others = TOK_LETTER | TOK_WHITE | TOK_OTHER;
    size_t length;
    for (size_t i = 0; i < size; i += length) {
        length = most ? tok_run(tokenizer, text + i, size - i, others, SIZE_MAX) : size;
        if (!length) length = tok_run(tokenizer, text + i, size - i, TOK_NUMBER, most);
        tok_encode_stretch(encoder, text + i, length, first && !i);
    }
}

// Whether text[0 … at) ends with a letter, and a character that is none begins at text[at].
static bool tok_ends_word(const retrofit_tokenizer *tokenizer, const char *text, size_t size,
                          size_t at) {
    size_t begin = at - 1;
    while (begin > 0 && ((unsigned char)text[begin] & 0xc0) == 0x80) begin--;
    if (tok_run(tokenizer, text + begin, size - begin, TOK_LETTER, 2) != at - begin) return false;
    return tok_run(tokenizer, text + at, size - at, TOK_LETTER, 1) == 0;
}

// Whether both sides of text[at] can be encoded apart, whatever is further away, with the same ids.
// Patterns: what they match goes on behind a letter only with letters. Metaspace: each "▁" begins a
// piece. Where the text is not cut into pieces, no merge may join the two bytes, and as in
// tok_encode_piece the first must have a token.
static bool tok_can_cut(const retrofit_tokenizer *tokenizer, const char *text, size_t size,
                        size_t at) {
    size_t mark = strlen(TOK_MARK);
    const bool *has = tokenizer->has;
    unsigned char before = (unsigned char)text[at - 1], behind = (unsigned char)text[at];
    bool marked = size - at >= mark && !memcmp(text + at, TOK_MARK, mark);
    if (has[TOK_METASPACE] && behind == ' ') marked = true;
    if (has[TOK_METASPACE] && has[TOK_METASPACE_SPLIT]) return marked;
    if (!has[TOK_METASPACE] && tokenizer->pattern >= 0)
        return tok_ends_word(tokenizer, text, size, at);
    if (tokenizer->byte_level || !marked || before >= 0x80) return false;
    if (!(tokenizer->classes[before] & TOK_LETTER)) return false;
    return !tokenizer->joins[before][(unsigned char)*TOK_MARK] &&
           tok_find_in_model(tokenizer, text + at - 1, 1) >= 0;
}

// Where the parts begin, each of about TOK_PART bytes, and the size at the end. NULL or error.
enum { TOK_PART = 1 << 18 };
static size_t *tok_cut_parts(const retrofit_tokenizer *tokenizer, const char *text, size_t size,
                             size_t *parts) {
    size_t *begins = retrofit_allocate(size / TOK_PART + 2, sizeof *begins), count = 1;
    if (!begins) return NULL;
    for (size_t at = TOK_PART; at < size; at++) {
        if (!tok_can_cut(tokenizer, text, size, at)) continue;
        begins[count++] = at;
        at += TOK_PART - 1;
    }
    begins[count] = size;
    *parts = count;
    return begins;
}

static void tok_add_progress(tok_encoder *encoder, size_t bytes) {
    size_t done;
    PRAGMA(omp atomic capture)
    done = encoder->done += bytes;
    if (encoder->progress && is_first_thread()) encoder->progress(encoder->context, done);
}

// What a thread does: the parts whose turn comes.
static void tok_encode_some_parts(tok_encoder *encoder, const char *text, const size_t *begins,
                                  size_t parts, bool first, retrofit_text *results) {
    retrofit_encoder *own = retrofit_encoder_new(encoder->tokenizer);
    PRAGMA(omp for schedule(dynamic))
    for (size_t i = 0; i < parts; i++) {
        results[i].failed = !own;
        if (!own) continue;
        size_t size = begins[i + 1] - begins[i];
        own->ids = (retrofit_text){0};
        tok_encode_part(own, text + begins[i], size, first && i == 0);
        own->ids.failed = own->ids.failed || own->stretch.failed || own->piece.failed;
        results[i] = own->ids;
        tok_add_progress(encoder, size);
    }
    if (own) own->ids = (retrofit_text){0};
    retrofit_encoder_free(own);
}

// A long text is cut into parts for all threads, whose ids are put together in their order.
static void tok_encode_pieces(tok_encoder *encoder, const char *text, size_t size, bool first) {
    if (size < 2 * TOK_PART) {
        tok_encode_part(encoder, text, size, first);
        return;
    }
    size_t parts = 0, *begins = tok_cut_parts(encoder->tokenizer, text, size, &parts);
    retrofit_text *results = begins ? retrofit_allocate(parts, sizeof *results) : NULL;
    if (results) {
        PRAGMA(omp parallel)
        tok_encode_some_parts(encoder, text, begins, parts, first, results);
    }
    bool failed = !results;
    for (size_t i = 0; i < parts && results; i++) {
        failed = failed || results[i].failed;
        retrofit_text_append(&encoder->ids, results[i].bytes, results[i].size);
        free(results[i].bytes);
    }
    if (failed) retrofit_fail("out of memory: %zu bytes of text", size); // each thread has its own
    encoder->ids.failed = encoder->ids.failed || failed;
    free(results);
    free(begins);
}

// The longest of the added tokens number low … high - 1 that text begins with, or NULL. In their
// order it is the last one that is not behind text, or one that this one begins with.
static const tok_added *tok_added_at(const retrofit_tokenizer *tokenizer, size_t low, size_t high,
                                     const char *text, size_t size) {
    const tok_added *all = tokenizer->added;
    size_t first = low, same = 0;
    while (low < high) {
        size_t middle = low + (high - low) / 2, length = retrofit_min(all[middle].size, size);
        int order = memcmp(all[middle].text, text, length);
        if (order < 0 || (order == 0 && all[middle].size <= size)) low = middle + 1;
        else high = middle;
    }
    if (low == first) return NULL;
    const tok_added *added = &all[low - 1];
    while (same < added->size && same < size && added->text[same] == text[same]) same++;
    while (added->size > same) {
        if (added->shorter < 0) return NULL;
        added = &all[added->shorter];
    }
    return added;
}

// The first added token in text from `from` on, of several at one place the longest, and where it
// begins; NULL if there is none.
static const tok_added *tok_find_added(const retrofit_tokenizer *tokenizer, const char *text,
                                       size_t size, size_t from, bool normalized, size_t *at) {
    for (size_t i = from; i < size; i++) {
        const size_t *begin = &tokenizer->added_begin[(unsigned char)text[i] + 256 * normalized];
        if (begin[0] == begin[1]) continue;
        const tok_added *added = tok_added_at(tokenizer, begin[0], begin[1], text + i, size - i);
        if (!added) continue;
        *at = i;
        return added;
    }
    return NULL;
}

// Where the last character of text[0 … end) begins, and whether it is in the class; end > 0.
static size_t tok_last_character(const retrofit_tokenizer *tokenizer, const char *text, size_t end,
                                 int class, bool *is_in_class) {
    size_t begin = end - 1;
    while (begin > 0 && ((unsigned char)text[begin] & 0xc0) == 0x80) begin--;
    *is_in_class = tok_run(tokenizer, text + begin, end - begin, class, 1) > 0;
    return begin;
}

// Whether an added token that is spelt out in text[begin … end) counts there.
static bool tok_added_counts(const retrofit_tokenizer *tokenizer, const tok_added *added,
                             const char *text, size_t size, size_t begin, size_t end) {
    bool special = tokenizer->tokens[added->id].special;
    if (special && tokenizer->has[TOK_SPLIT_SPECIAL]) return false;
    if (!added->single_word) return true;
    bool word_before = false;
    if (begin > 0) tok_last_character(tokenizer, text, begin, TOK_WORD, &word_before);
    return !word_before && !tok_run(tokenizer, text + end, size - end, TOK_WORD, 1);
}

// Where text[done … end) ends without its last white space; `done` if it begins behind the end.
static size_t tok_strip_end(const retrofit_tokenizer *tokenizer, const char *text, size_t done,
                            size_t end) {
    bool is_white = true;
    while (end > done) {
        size_t begin = tok_last_character(tokenizer, text, end, TOK_WHITE, &is_white);
        if (!is_white) break;
        end = begin;
    }
    return retrofit_max(end, done);
}

static void tok_encode_text(tok_encoder *encoder, const char *text, size_t size, bool normalized,
                            bool first);

// Encodes text between two added tokens: text as given is normalized and searched again; normalized
// text is cut into pieces.
static void tok_encode_between(tok_encoder *encoder, const char *text, size_t size, bool normalized,
                               bool first) {
    if (!size) return;
    if (normalized) {
        tok_encode_pieces(encoder, text, size, first);
        return;
    }
    retrofit_text *out = &encoder->normalized;
    tok_normalize(encoder->tokenizer, out, text, size);
    tok_encode_text(encoder, out->bytes, out->size, true, first);
}

// Takes added tokens out of text and encodes what is between them. The search goes on behind a
// token's text, also where it does not count. (With rstrip this may be before `done`, as in Hugging
// Face's tokenizers.)
static void tok_encode_text(tok_encoder *encoder, const char *text, size_t size, bool normalized,
                            bool first) {
    size_t white = 0; // up to there white space has been seen
    const retrofit_tokenizer *tokenizer = encoder->tokenizer;
    size_t done = 0, from = 0, begin;
    for (;;) {
        const tok_added *added = tok_find_added(tokenizer, text, size, from, normalized, &begin);
        if (!added) break;
        size_t end = begin + added->size;
        from = end;
        if (!tok_added_counts(tokenizer, added, text, size, begin, end)) continue;
        if (added->lstrip) begin = tok_strip_end(tokenizer, text, done, begin);
        if (added->rstrip) {
            end = retrofit_max(end, white);
            end += tok_run(tokenizer, text + end, size - end, TOK_WHITE, SIZE_MAX);
            white = end;
        }
        if (begin > done)
            tok_encode_between(encoder, text + done, begin - done, normalized, first && !done);
        tok_append_id(encoder, added->id);
        done = end;
    }
    tok_encode_between(encoder, text + done, size - done, normalized, first && !done);
}

retrofit_encoder *retrofit_encoder_new(const retrofit_tokenizer *tokenizer) {
    retrofit_encoder *encoder = retrofit_allocate(1, sizeof *encoder);
    if (!encoder) return NULL;
    encoder->tokenizer = tokenizer;
    encoder->cache = retrofit_allocate(TOK_CACHE, sizeof *encoder->cache);
    if (encoder->cache) return encoder;
    free(encoder);
    return NULL;
}

static void tok_free_memory(tok_encoder *encoder) {
    free(encoder->cache);
    free(encoder->valid.bytes);
    free(encoder->normalized.bytes);
    free(encoder->stretch.bytes);
    free(encoder->piece.bytes);
    free(encoder->ids.bytes);
    free(encoder->symbols);
    free(encoder->heap);
}

void retrofit_encoder_free(retrofit_encoder *encoder) {
    if (!encoder) return;
    tok_free_memory(encoder);
    free(encoder);
}

int32_t *retrofit_encode_with(retrofit_encoder *encoder, const char *text, size_t size,
                              bool with_special, size_t *count,
                              void (*progress)(void *context, size_t bytes), void *context) {
    const retrofit_tokenizer *tokenizer = encoder->tokenizer;
    encoder->progress = progress;
    encoder->context = context;
    encoder->done = 0;
    encoder->valid.size = 0;
    if (retrofit_find_invalid(text, 0, size) < size) {
        retrofit_append_valid(&encoder->valid, text, size);
        text = encoder->valid.bytes;
        size = encoder->valid.size;
    }
    size_t before = with_special ? tokenizer->before.count : 0;
    size_t after = with_special ? tokenizer->after.count : 0;
    retrofit_text_append(&encoder->ids, tokenizer->before.ids, before * sizeof(int32_t));
    if (!encoder->valid.failed) tok_encode_text(encoder, text, size, false, true);
    retrofit_text_append(&encoder->ids, tokenizer->after.ids, after * sizeof(int32_t));

    // The ids are the caller's. What failed for want of memory may do so only this once.
    retrofit_text ids = encoder->ids;
    encoder->ids = (retrofit_text){0};
    bool failed = ids.failed || encoder->valid.failed || encoder->normalized.failed ||
                  encoder->stretch.failed || encoder->piece.failed;
    encoder->valid.failed = false;
    encoder->normalized.failed = false;
    encoder->stretch.failed = false;
    encoder->piece.failed = false;
    *count = ids.size / sizeof(int32_t);
    if (!failed) return (int32_t *)(void *)ids.bytes;
    free(ids.bytes);
    return NULL;
}

int32_t *retrofit_encode(const retrofit_tokenizer *tokenizer, const char *text, size_t size,
                         bool with_special, size_t *count) {
    tok_encoder encoder = {.tokenizer = tokenizer};
    int32_t *ids = retrofit_encode_with(&encoder, text, size, with_special, count, NULL, NULL);
    tok_free_memory(&encoder);
    return ids;
}

// ---- Tokenizer: from ids to text ---------------------------------------------------------------

// Appends the bytes that byte tokens stand for, a run of them, and empties the run. If they are not
// UTF-8, each byte becomes U+FFFD.
static void tok_flush_bytes(retrofit_text *out, retrofit_text *run) {
    bool valid = true;
    size_t length;
    for (size_t i = 0; valid && i < run->size; i += length) {
        uint32_t code_point;
        length = retrofit_utf8_next(run->bytes + i, run->size - i, &code_point);
        valid = code_point != RETROFIT_UTF8_INVALID;
    }
    if (valid) retrofit_text_append(out, run->bytes, run->size);
    else
        for (size_t i = 0; i < run->size; i++) retrofit_text_append(out, UTF8_REPLACEMENT, 3);
    run->size = 0;
}

// Appends the bytes that a token's characters stand for in the byte-level alphabet; if one of them
// is not in it, as in added tokens, the token's text as it is.
static void tok_undo_bytes(const retrofit_tokenizer *tokenizer, retrofit_text *out,
                           const tok_token *token) {
    size_t size_before = out->size, length;
    for (size_t i = 0; i < token->size; i += length) {
        uint32_t c;
        length = retrofit_utf8_next(token->text + i, token->size - i, &c);
        if (c >= 324 || !tokenizer->char_to_byte[c]) {
            out->size = size_before;
            retrofit_text_append(out, token->text, token->size);
            return;
        }
        char byte = (char)(tokenizer->char_to_byte[c] - 1);
        retrofit_text_append(out, &byte, 1);
    }
}

// Appends a token's text. Bytes wait in `run` until all are there, since one token may hold only a
// part of a character.
static void tok_decode_token(const retrofit_tokenizer *tokenizer, const tok_token *token,
                             bool first, retrofit_text *out, retrofit_text *run) {
    if (tokenizer->has[TOK_UNDO_BYTES]) {
        tok_undo_bytes(tokenizer, run, token);
        return;
    }
    int byte = tokenizer->has[TOK_BYTE_FALLBACK] ? tok_fallback_byte(token) : -1;
    if (byte >= 0) {
        char character = (char)byte;
        retrofit_text_append(run, &character, 1);
        return;
    }
    tok_flush_bytes(out, run);
    if (tokenizer->has[TOK_UNMARK_FIRST] && first)
        tok_append_replaced(out, token->text, token->size, TOK_MARK, "");
    else if (tokenizer->has[TOK_UNMARK_SPACES] || tokenizer->has[TOK_UNMARK_METASPACE])
        tok_append_replaced(out, token->text, token->size, TOK_MARK, " ");
    else retrofit_text_append(out, token->text, token->size);
}

// The token of an id; NULL if no token has it. A model may have more ids than its tokenizer has
// tokens, and a vocabulary may have holes: such ids have no text.
static const tok_token *tok_token_at(const retrofit_tokenizer *tokenizer, int32_t id) {
    if (id < 0 || (size_t)id >= tokenizer->size || !tokenizer->tokens[id].text) return NULL;
    return &tokenizer->tokens[id];
}

// Whether a token gives no text before others come: it is left out, or it is a byte token, since
// what a run of these stands for is known only when it is over.
static bool tok_waits(const retrofit_tokenizer *tokenizer, int32_t id, bool skip_special) {
    const tok_token *token = tok_token_at(tokenizer, id);
    if (!token) return id >= 0 && id < TOK_MAX_ID;
    if (skip_special && token->special) return true;
    return tokenizer->has[TOK_BYTE_FALLBACK] && tok_fallback_byte(token) >= 0;
}

// How many bytes at the end of text are a character that lacks its last bytes.
static size_t tok_cut_size(const char *text, size_t size) {
    uint32_t code_point;
    size_t length = 1;
    while (length < 3 && length < size && (text[size - length] & 0xc0) == 0x80) length++;
    if (length > size) return 0;
    const char *begin = text + size - length;
    unsigned lead = (unsigned char)*begin;
    bool whole = retrofit_utf8_next(begin, length, &code_point) == length;
    bool cut = whole && code_point == RETROFIT_UTF8_INVALID && lead >= 0xc2 && lead <= 0xf4;
    return cut ? length : 0;
}

// Decodes the next tokens to `out`, and to `run` what may wait there. false or error.
static bool tok_decode_tokens(const retrofit_tokenizer *tokenizer, retrofit_stream *stream,
                              const int32_t *ids, size_t end, bool skip_special,
                              retrofit_text *out, retrofit_text *run) {
    for (; stream->begin < end; stream->begin++) {
        int32_t id = ids[stream->begin];
        const tok_token *token = tok_token_at(tokenizer, id);
        if (!token && (id < 0 || id >= TOK_MAX_ID))
            return retrofit_fail("id %d (number %zu) is no token's: ids go up to %zu", (int)id,
                                 stream->begin, tokenizer->size - 1);
        if (!token || (skip_special && token->special)) continue;
        if (stream->has_token && !tokenizer->has_decoder) retrofit_text_append(out, " ", 1);
        tok_decode_token(tokenizer, token, !stream->has_token, out, run);
        stream->has_token = true;
    }
    return true;
}

// Tokens at the end that wait are not decoded. In the byte-level alphabet tokens may end within a
// character: its bytes wait in `cut`.
char *retrofit_decode_next(const retrofit_tokenizer *tokenizer, retrofit_stream *stream,
                           const int32_t *ids, size_t count, bool skip_special, bool last,
                           size_t *size) {
    if (stream->begin > stream->end || stream->end > count)
        return fail_null(
            "a stream at token %zu cannot go on with %zu tokens: zero it to start again",
            stream->end, count);
    size_t end = count;
    while (!last && end > stream->end && tok_waits(tokenizer, ids[end - 1], skip_special)) end--;
    if (!last && end == stream->end) end = stream->begin; // all that is new waits
    stream->end = count;

    retrofit_text out = {0}, run = {0};
    retrofit_text_append(&run, stream->cut, stream->cut_size);
    bool ok = tok_decode_tokens(tokenizer, stream, ids, end, skip_special, &out, &run);
    if (tokenizer->has[TOK_UNDO_BYTES]) {
        stream->cut_size = last ? 0 : tok_cut_size(run.bytes, run.size);
        run.size -= stream->cut_size;
        for (size_t i = 0; i < stream->cut_size; i++) stream->cut[i] = run.bytes[run.size + i];
        retrofit_append_valid(&out, run.bytes, run.size);
    } else tok_flush_bytes(&out, &run);
    retrofit_text_append(&out, "", 1);
    free(run.bytes);
    if (!ok || out.failed || run.failed) {
        free(out.bytes);
        return NULL;
    }
    bool strip = tokenizer->has[TOK_STRIP_SPACE] && !stream->has_text && out.bytes[0] == ' ';
    stream->has_text = stream->has_text || out.size > 1;
    *size = out.size - strip - 1;
    return memmove(out.bytes, out.bytes + strip, *size + 1);
}

char *retrofit_decode(const retrofit_tokenizer *tokenizer, const int32_t *ids, size_t count,
                      bool skip_special, size_t *size) {
    retrofit_stream stream = {0};
    return retrofit_decode_next(tokenizer, &stream, ids, count, skip_special, true, size);
}

bool retrofit_decode_context(const retrofit_tokenizer *tokenizer, const int32_t *ids, size_t count,
                             int32_t *id) {
    if (tokenizer->has[TOK_UNDO_BYTES]) return false;
    for (size_t i = count; i > 0; i--) {
        const tok_token *before = tok_token_at(tokenizer, ids[i - 1]);
        if (!before || before->special || tok_fallback_byte(before) >= 0) continue;
        *id = ids[i - 1];
        return true;
    }
    return false;
}

// ---- Tokenizer: what a caller may ask ----------------------------------------------------------

int32_t retrofit_tokenizer_bos(const retrofit_tokenizer *tokenizer) { return tokenizer->bos; }
int32_t retrofit_tokenizer_eos(const retrofit_tokenizer *tokenizer) { return tokenizer->eos; }
size_t retrofit_tokenizer_size(const retrofit_tokenizer *tokenizer) { return tokenizer->size; }

bool retrofit_tokenizer_cleans_up(const retrofit_tokenizer *tokenizer) {
    return tokenizer->cleans_up;
}

bool retrofit_tokenizer_adds_at_end(const retrofit_tokenizer *tokenizer, int32_t id) {
    const tok_specials *after = &tokenizer->after;
    return after->count > 0 && after->ids[after->count - 1] == id;
}

int32_t retrofit_tokenizer_id(const retrofit_tokenizer *tokenizer, const char *token) {
    return tok_find(tokenizer, token, strlen(token));
}

// Token shards hold this number: what it is made of, and in which order, cannot change. Merges and
// added tokens enter as a sum, since their order in memory means nothing.
uint64_t retrofit_tokenizer_hash(const retrofit_tokenizer *tokenizer) {
    uint64_t hash = tokenizer->size, sum = 0;
    for (size_t id = 0; id < tokenizer->size; id++) {
        const tok_token *token = &tokenizer->tokens[id];
        hash = tok_hash_text(hash, token->text, token->size);
        hash = retrofit_hash(hash, 2 * id + token->in_model);
    }
    for (size_t i = 0; i <= tokenizer->merge_mask; i++) {
        const tok_merge *merge = &tokenizer->merges[i];
        if (merge->rank) sum += retrofit_hash(merge->pair, merge->rank);
    }
    for (size_t i = 0; i < tokenizer->added_count; i++) {
        const tok_added *added = &tokenizer->added[i];
        bool split = tokenizer->has[TOK_SPLIT_SPECIAL] && tokenizer->tokens[added->id].special;
        int flags = added->single_word + 2 * added->lstrip + 4 * added->rstrip + 8 * split;
        sum += retrofit_hash(~(uint64_t)added->id, (uint64_t)(added->key + 512 * flags));
    }
    for (size_t i = 0; i < TOK_FIRST_HASHES; i++) hash = retrofit_hash(hash, tokenizer->has[i]);
    for (size_t i = TOK_FIRST_HASHES; i < TOK_STEPS; i++)
        if (tokenizer->has[i]) hash = retrofit_hash(hash, i);
    int flags = tokenizer->fuse_unk + 2 * tokenizer->byte_fallback + 4 * tokenizer->ignore_merges;
    hash = retrofit_hash(hash, (uint64_t)flags);
    hash = retrofit_hash(hash, (uint64_t)tokenizer->unk);
    hash = retrofit_hash(hash, (uint64_t)tokenizer->eos);
    for (size_t i = 0; i < tokenizer->before.count; i++)
        hash = retrofit_hash(hash, (uint64_t)tokenizer->before.ids[i]);
    for (size_t i = 0; i < tokenizer->after.count; i++)
        hash = retrofit_hash(hash, ~(uint64_t)tokenizer->after.ids[i]);
    hash += sum;
    return hash ? hash : 1;
}

// ---- Tokenizer: loading ------------------------------------------------------------------------

// The keys of tokenizer.json: its own, its model's, those of any step, those of an added token.
static const retrofit_key tok_file_keys[] = {
    {"added_tokens normalizer pre_tokenizer post_processor decoder model padding", NULL,
     "see below"},
    {"truncation", "*", "transformers resets it"},
    {"version", "*", "of the format"},
};
static const retrofit_key tok_model_keys[] = {
    {"type vocab merges unk_token fuse_unk byte_fallback ignore_merges", NULL, "see below"},
    {"dropout", "0", "merges left out at random"},
    {"continuing_subword_prefix", "", "WordPiece's spelling of tokens"},
    {"end_of_word_suffix", "", "tokens that end a word"},
};
static const retrofit_key tok_step_keys[] = {
    {"type prepend pattern content individual_digits behavior invert add_prefix_space use_regex "
     "replacement prepend_scheme split start stop single special_tokens normalizers "
     "pretokenizers decoders processors", NULL, "see below"},
    {"pair", "*", "for two texts"},
    {"str_rep", "*", "the replacement again"},
    {"trim_offsets", "*", "places in the text, which we don't give"},
};
static const retrofit_key tok_added_keys[] = {
    {"id content special lstrip rstrip single_word normalized", NULL, "see below"},
    {"__type", "*", "says AddedToken"},
};

// Those of special_tokens_map.json, which are among those of tokenizer_config.json.
static const retrofit_key tok_map_keys[] = {
    {"bos_token eos_token unk_token sep_token pad_token cls_token mask_token "
     "additional_special_tokens", NULL, "tokens with a role"},
};
static const retrofit_key tok_config_keys[] = {
    {"bos_token eos_token unk_token sep_token pad_token cls_token mask_token "
     "additional_special_tokens", NULL, "tokens with a role"},
    {"extra_special_tokens added_tokens_decoder tokenizer_class add_bos_token add_eos_token "
     "add_prefix_space split_special_tokens clean_up_tokenization_spaces", NULL, "see below"},
    {"tokenizer_file", "tokenizer.json|./tokenizer.json",
     "the tokenizer.json beside tokenizer_config.json is read: remove the key"},
    {"from_slow", "", "the tokenizer would be made from another file than tokenizer.json"},
    {"legacy sp_model_kwargs", "*", "of making tokenizer.json from another file"},
    {"chat_template", "*", "not the tokenizer's"},
    {"use_default_system_prompt", "*", "of the chat template"},
    {"model_max_length max_length max_len", "*", "texts are not cut"},
    {"vocab_size", "*", "tokenizer.json has the vocabulary"},
    {"stride truncation_side truncation_strategy", "*", "of cutting"},
    {"padding_side padding pad_to* pad_token_type_id", "*", "of padding"},
    {"model_input_names return_token_type_ids", "*", "of Python's results"},
    {"name_or_path special_tokens_map_file", "*", "where it came from"},
    {"vocab_file merges_file", "*", "tokenizer.json has it all"},
    {"errors", "*", "of Python's own tokenizers; the others have \"replace\""},
    {"spaces_between_special_tokens", "*", "of Python's own tokenizers"},
    {"do_lower_case keep_accents remove_space strip_accents", "*",
     "tokenizer.json's normalizer decides"},
    {"trim_offsets", "*", "places in the text, which we don't give"},
    {"use_fast auto_map processor_class backend is_local local_files_only transformers_version "
     "device_map tokenizer_type init_inputs", "*", "Python's"},
    {"image* video* vision*", "*", "of images"},
    {"audio*", "*", "of sounds"},
};
#define TOK_CHECK_KEYS(loader, object, table, where) \
    tok_check_keys(loader, object, table, sizeof(table) / sizeof *(table), where)

// The tokens that tokenizer_config.json names, in the order in which they are added.
enum { TOK_BOS, TOK_EOS, TOK_UNK, TOK_SEP, TOK_PAD, TOK_CLS, TOK_MASK, TOK_NAMES };
static const char *const tok_names[TOK_NAMES] = {
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
};

// Classes of transformers, by their names without "Fast": the tokens that they have by themselves
// ("" for none, also where tokenizer.json has one for padding); whether they put their own bos and
// eos tokens around a text, not tokenizer.json's; whether they set the flags of their tokens; and
// the steps before the merges that they have in transformers 5 whatever tokenizer.json says.
#define TOK_END "<|endoftext|>"
#define TOK_BIT(step) (1u << TOK_##step)
static const struct tok_class {
    const char *name, *tokens[TOK_NAMES];
    bool own_ends, add_bos, sets_flags;
    uint32_t steps_5; // bits; 0: those of tokenizer.json
} tok_classes[] = {
    {.name = "PreTrainedTokenizer"},
    {.name = "TokenizersBackend"}, // the same, from transformers 5 on
    {"LlamaTokenizer", {"<s>", "</s>", "<unk>"}, true, true, false, TOK_BIT(METASPACE)},
    {"GPTNeoXTokenizer", {TOK_END, TOK_END, TOK_END, NULL, ""}, true, false, false,
     TOK_BIT(NFC) | TOK_BIT(GPT2_BYTES)},
    {"GPT2Tokenizer", {TOK_END, TOK_END, TOK_END}, false, false, false, TOK_BIT(GPT2_BYTES)},
    {"Qwen2Tokenizer", {NULL, TOK_END, TOK_END, NULL, TOK_END}, false, false, true,
     TOK_BIT(NFC) | TOK_BIT(SPLIT_QWEN2) | TOK_BIT(BYTE_LEVEL)},
};
enum { TOK_CLASSES = sizeof tok_classes / sizeof *tok_classes };

// The functions below report an error by `failed` and go on with harmless values; only the first
// error counts. Callers stop where it suits them.
typedef struct {
    retrofit_tokenizer *tokenizer;
    const char *directory;
    char path[RETROFIT_PATH]; // of the file being read
    bool failed;              // an error has been reported
    int last_row;             // of tok_steps: the step loaded before; -1 at first
    size_t strings_size;      // bytes of tokenizer->strings in use
    size_t vocabulary_size;   // tokens in the vocabulary, without added ones
    int32_t last_added;       // the highest id of an added token; -1: none yet
    size_t added_capacity;    // added tokens that there may be at most

    // The files: tokenizer.json, and NULL or what lies beside it.
    retrofit_json *root, *config, *map, *added_json;
    bool map_counts; // special_tokens_map.json and added_tokens.json do: see tok_load_config
    const struct tok_class *class; // NULL: none is named, or one that is not known here
} tok_loader;

// An error, unless there was one before: the file, what is wrong, and in quotes with what.
static void tok_refuse(tok_loader *loader, const char *what, const char *name) {
    if (!loader->failed) retrofit_fail("%s: %s \"%.200s\"", loader->path, what, name);
    loader->failed = true;
}

// An error for a key that is refused, or whose name says that it matters and is not known here.
static void tok_check_keys(tok_loader *loader, const retrofit_json *object,
                           const retrofit_key *table, size_t count, const char *where) {
    char place[RETROFIT_PATH + 40];
    if (loader->failed) return;
    snprintf(place, sizeof place, "%s%s%s", loader->path, *where ? ": " : "", where);
    loader->failed = !retrofit_keys_check(object, table, count, place);
}

static const retrofit_json tok_nothing = {.type = RETROFIT_JSON_ARRAY, .string = "", .key = ""};

// The member of this name; NULL if it is absent, or null, which means the same.
static const retrofit_json *tok_present(const retrofit_json *object, const char *key) {
    const retrofit_json *value = retrofit_json_get(object, key);
    return value && value->type == RETROFIT_JSON_NULL ? NULL : value;
}

// The member of this name and type. If there is none, an error, and a value without children.
static const retrofit_json *tok_get(tok_loader *loader, const retrofit_json *object,
                                    const char *key, retrofit_json_type type) {
    const retrofit_json *value = retrofit_json_get(object, key);
    if (value && value->type == type) return value;
    tok_refuse(loader, "missing, or of the wrong type:", key);
    return &tok_nothing;
}

static bool tok_flag(tok_loader *loader, const retrofit_json *object, const char *key,
                     bool otherwise) {
    if (!tok_present(object, key)) return otherwise;
    return tok_get(loader, object, key, RETROFIT_JSON_BOOL)->number != 0;
}

static int32_t tok_read_id(tok_loader *loader, const retrofit_json *value) {
    size_t id;
    if (retrofit_json_size(value, &id) && id < TOK_MAX_ID) return (int32_t)id;
    tok_refuse(loader, "not a token id from 0 to 4194303:", value->string ? value->string : "");
    return 0;
}

// Whether a setting of a step has this value. It may also be a setting of the step's pattern.
static bool tok_setting_is(const retrofit_json *step, const char *key, const char *value) {
    const retrofit_json *found = retrofit_json_get(step, key);
    if (!found) found = retrofit_json_get(retrofit_json_get(step, "pattern"), key);
    if (!found) return false;
    if (!strcmp(value, TOK_ANY)) return true;
    if (found->type == RETROFIT_JSON_BOOL) return !strcmp(value, found->number ? "true" : "false");
    return found->string && !strcmp(value, found->string);
}

static bool tok_add_special(tok_specials *specials, int32_t id) {
    if (specials->count == TOK_MAX_SPECIALS) return false;
    specials->ids[specials->count++] = id;
    return true;
}

// The ids of one special token of the template.
static void tok_load_special(tok_loader *loader, const retrofit_json *special,
                             tok_specials *specials) {
    const retrofit_tokenizer *tokenizer = loader->tokenizer;
    const retrofit_json *value = tok_get(loader, special, "ids", RETROFIT_JSON_ARRAY)->child;
    if (!value) tok_refuse(loader, "without an id, the", "SpecialToken");
    for (; value && !loader->failed; value = value->next) {
        int32_t id = tok_read_id(loader, value);
        bool is_token = (size_t)id < tokenizer->size && tokenizer->tokens[id].text;
        if (!is_token || !tok_add_special(specials, id))
            tok_refuse(loader, "a bad or a 17th", "SpecialToken");
    }
}

// "single" lists what a text becomes: special tokens and, once, the text itself, "Sequence" A. (B,
// the second text of a pair, is not supported.)
static void tok_load_template(tok_loader *loader, const retrofit_json *step) {
    const retrofit_json *all = tok_get(loader, step, "special_tokens", RETROFIT_JSON_OBJECT);
    const retrofit_json *part = tok_get(loader, step, "single", RETROFIT_JSON_ARRAY)->child;
    tok_specials *specials = &loader->tokenizer->before;
    bool has_text = false;
    for (; part && !loader->failed; part = part->next) {
        const retrofit_json *special = retrofit_json_get(part, "SpecialToken");
        if (special) {
            const char *id = tok_get(loader, special, "id", RETROFIT_JSON_STRING)->string;
            tok_load_special(loader, tok_get(loader, all, id, RETROFIT_JSON_OBJECT), specials);
            continue;
        }
        if (has_text || !tok_setting_is(retrofit_json_get(part, "Sequence"), "id", "A")) break;
        has_text = true;
        specials = &loader->tokenizer->after;
    }
    if (!has_text || part) tok_refuse(loader, "needs the text once, as A:", "TemplateProcessing");
}

// A Metaspace step, which is a pre_tokenizer or a decoder. Old files have add_prefix_space.
static void tok_load_metaspace(tok_loader *loader, const retrofit_json *step, bool is_decoder) {
    bool *has = loader->tokenizer->has;
    const char *scheme = "always";
    if (tok_present(step, "prepend_scheme"))
        scheme = tok_get(loader, step, "prepend_scheme", RETROFIT_JSON_STRING)->string;
    bool always = !strcmp(scheme, "always"), first = !strcmp(scheme, "first");
    if (!always && !first && strcmp(scheme, "never"))
        tok_refuse(loader, "not always, first or never, Metaspace's prepend_scheme", scheme);
    bool prefix = always || first;
    if (tok_flag(loader, step, "add_prefix_space", prefix) != prefix)
        tok_refuse(loader, "add_prefix_space contradicts Metaspace's prepend_scheme", scheme);
    if (is_decoder) {
        has[TOK_UNMARK_FIRST] = prefix;
        return;
    }
    has[TOK_METASPACE_ALWAYS] = always;
    has[TOK_METASPACE_FIRST] = first;
    has[TOK_METASPACE_SPLIT] = tok_flag(loader, step, "split", true);
}

// What a pattern matches is a piece, and so is what it doesn't match; but the patterns that we have
// match all there is. So whether the two change places matters only where one of them is removed.
static void tok_check_split(tok_loader *loader, const retrofit_json *step) {
    const char *behavior = tok_get(loader, step, "behavior", RETROFIT_JSON_STRING)->string;
    bool invert = tok_flag(loader, step, "invert", false);
    if (strcmp(behavior, "Isolated") && (strcmp(behavior, "Removed") || !invert))
        tok_refuse(loader, "unsupported, behavior (and invert) of the step \"Split\":", behavior);
}

// The settings of a step that are not in tok_steps.
static void tok_load_settings(tok_loader *loader, const retrofit_json *json, int step) {
    bool *has = loader->tokenizer->has;
    if (step == TOK_TEMPLATE) tok_load_template(loader, json);
    if (step >= TOK_SPLIT_GPT2 && step <= TOK_SPLIT_LLAMA3) tok_check_split(loader, json);
    if (step == TOK_BYTE_LEVEL || step == TOK_GPT2_BYTES)
        has[TOK_PREFIX_SPACE] = tok_flag(loader, json, "add_prefix_space", false);
    if (step == TOK_METASPACE || step == TOK_UNMARK_METASPACE)
        tok_load_metaspace(loader, json, step == TOK_UNMARK_METASPACE);
}

// Whether a step of the file is the one in this row of tok_steps.
static bool tok_step_is(const retrofit_json *json, int role, const char *type, int row) {
    if (tok_steps[row].role != role || strcmp(type, tok_steps[row].type)) return false;
    const char *const *setting = tok_steps[row].settings;
    while (setting[0] && tok_setting_is(json, setting[0], setting[1])) setting += 2;
    return !setting[0];
}

// Refuses a step by its type and its settings, those of its pattern among them.
static void tok_refuse_step(tok_loader *loader, const retrofit_json *json, const char *type) {
    char text[160] = "";
    size_t n = 0;
    for (const retrofit_json *v = json->child; v && n < sizeof text; v = v->next) {
        const retrofit_json *value = v->type == RETROFIT_JSON_OBJECT && v->child ? v->child : v;
        const char *is = value->string ? value->string : "null";
        if (value->type == RETROFIT_JSON_BOOL) is = value->number != 0 ? "true" : "false";
        if (!strcmp(v->key, "type") || value->child) continue;
        n += (size_t)snprintf(text + n, sizeof text - n, ", %.30s %.60s", value->key, is);
    }
    if (!loader->failed)
        retrofit_fail("%s: this step is unsupported (or its settings, or its place): \"%.60s\"%s",
                      loader->path, type, text);
    loader->failed = true;
}

// A step, or a Sequence of steps. The parser's limit of the depth bounds the recursion.
static void tok_load_step(tok_loader *loader, const retrofit_json *json, int role) {
    const char *type = tok_get(loader, json, "type", RETROFIT_JSON_STRING)->string;
    if (loader->failed) return;
    if (!strcmp(type, "Sequence")) {
        json = tok_get(loader, json, tok_roles[role].list, RETROFIT_JSON_ARRAY)->child;
        for (; json && !loader->failed; json = json->next) tok_load_step(loader, json, role);
        return;
    }
    int row = loader->last_row + 1;
    while (row < TOK_ROWS && !tok_step_is(json, role, type, row)) row++;
    if (row == TOK_ROWS) {
        tok_refuse_step(loader, json, type);
        return;
    }
    TOK_CHECK_KEYS(loader, json, tok_step_keys, tok_roles[role].member);
    loader->tokenizer->has[tok_steps[row].step] = true;
    loader->last_row = row;
    tok_load_settings(loader, json, tok_steps[row].step);
}

static void tok_load_role(tok_loader *loader, const retrofit_json *root, int role) {
    const retrofit_json *json = tok_present(root, tok_roles[role].member);
    if (json && !loader->failed) tok_load_step(loader, json, role);
}

// Refuses steps that do not go together, and draws from the others what encoding needs to know.
static void tok_check_steps(tok_loader *loader) {
    retrofit_tokenizer *tokenizer = loader->tokenizer;
    const bool *has = tokenizer->has;
    int patterns = has[TOK_SPLIT_GPT2] + has[TOK_SPLIT_QWEN2] + has[TOK_SPLIT_LLAMA3];
    patterns += has[TOK_GPT2_BYTES];
    tokenizer->pattern = has[TOK_SPLIT_LLAMA3]  ? TOK_SPLIT_LLAMA3
                         : has[TOK_SPLIT_QWEN2] ? TOK_SPLIT_QWEN2
                         : patterns             ? TOK_SPLIT_GPT2
                                                : -1;
    tokenizer->byte_level = has[TOK_BYTE_LEVEL] || has[TOK_GPT2_BYTES];

    bool bytes_twice = has[TOK_BYTE_LEVEL] && has[TOK_GPT2_BYTES];
    bool digits = has[TOK_SPLIT_DIGITS] || has[TOK_SPLIT_NUMBERS];
    bool digits_twice = has[TOK_SPLIT_DIGITS] && has[TOK_SPLIT_NUMBERS];
    bool marked_twice = has[TOK_METASPACE] && (patterns || digits || tokenizer->byte_level ||
                                               has[TOK_PREPEND_MARK] || has[TOK_MARK_SPACES]);
    bool strips_each_token = has[TOK_STRIP_SPACE] && !has[TOK_FUSE];
    bool spm_decoder = has[TOK_UNMARK_SPACES] || has[TOK_BYTE_FALLBACK] || has[TOK_FUSE];
    bool two_decoders = has[TOK_UNDO_BYTES] && (spm_decoder || has[TOK_UNMARK_METASPACE]);
    bool unmarked = has[TOK_UNMARK_SPACES] || has[TOK_BYTE_FALLBACK] || has[TOK_STRIP_SPACE];
    bool unmarked_twice = has[TOK_UNMARK_METASPACE] && unmarked;
    if (patterns > 1 || bytes_twice || digits_twice || marked_twice)
        tok_refuse(loader, "steps that are not supported together, in", "pre_tokenizer");
    if (strips_each_token || two_decoders || unmarked_twice)
        tok_refuse(loader, "steps that are not supported together, in", "decoder");
}

// A piece of text that stays as long as the tokenizer, with a NUL behind it.
static const char *tok_keep(tok_loader *loader, const char *text, size_t size) {
    char *copy = memcpy(loader->tokenizer->strings + loader->strings_size, text, size);
    loader->strings_size += size + 1;
    return copy;
}

static void tok_add_token(tok_loader *loader, const char *text, size_t size, int32_t id,
                          bool in_model) {
    retrofit_tokenizer *tokenizer = loader->tokenizer;
    tok_token *token = &tokenizer->tokens[id];
    int32_t *slot = tok_text_slot(tokenizer, text, size);
    if (!slot || *slot || token->text) {
        tok_refuse(loader, "this text, or its id, is in the vocabulary twice (or collides):", text);
        return;
    }
    token->text = tok_keep(loader, text, size);
    token->size = size;
    token->in_model = in_model;
    *slot = id + 1;
    int byte = tok_fallback_byte(token);
    if (in_model && byte >= 0) tokenizer->byte_ids[byte] = id + 1;
}

// An empty hash table that `count` entries fill at most by half. *mask is its number of slots, a
// power of two, minus 1.
static void *tok_allocate_table(tok_loader *loader, size_t count, size_t slot_size, size_t *mask) {
    size_t slots = 2;
    while (slots <= 2 * count) slots *= 2;
    *mask = slots - 1;
    void *table = retrofit_allocate(slots, slot_size);
    if (!table) loader->failed = true;
    return table;
}

// The vocabulary, with room for all tokens that may be added, those of tokenizer.json and others.
static void tok_load_vocabulary(tok_loader *loader, const retrofit_json *vocabulary,
                                const retrofit_json *added) {
    retrofit_tokenizer *tokenizer = loader->tokenizer;
    int32_t last = -1;
    const retrofit_json *entry;
    for (entry = vocabulary->child; entry; entry = entry->next) {
        int32_t id = tok_read_id(loader, entry);
        if (id > last) last = id;
    }
    for (entry = added->child; entry; entry = entry->next) {
        int32_t id = tok_read_id(loader, tok_get(loader, entry, "id", RETROFIT_JSON_NUMBER));
        if (id > last) last = id;
    }
    if (last < 0) tok_refuse(loader, "no token in the", "vocab");
    if (loader->failed) return;

    loader->vocabulary_size = vocabulary->count;
    tokenizer->size = (size_t)last + 1;
    size_t room = retrofit_max(tokenizer->size, vocabulary->count) + loader->added_capacity;
    tokenizer->tokens = retrofit_allocate(room, sizeof *tokenizer->tokens);
    tokenizer->added = retrofit_allocate(loader->added_capacity, sizeof *tokenizer->added);
    if (!tokenizer->tokens || !tokenizer->added) loader->failed = true;
    tokenizer->by_text = tok_allocate_table(loader, vocabulary->count + loader->added_capacity,
                                            sizeof *tokenizer->by_text, &tokenizer->text_mask);
    for (entry = vocabulary->child; entry && !loader->failed; entry = entry->next)
        tok_add_token(loader, entry->key, entry->key_length, tok_read_id(loader, entry), true);
}

// Adds the merge of text[0 … cut) and text[cut … size). Of equal ones the last counts.
static void tok_add_merge(tok_loader *loader, const char *text, size_t cut, size_t size,
                          uint32_t rank) {
    retrofit_tokenizer *tokenizer = loader->tokenizer;
    bool two = cut > 0 && cut < size;
    int32_t left = two ? tok_find_in_model(tokenizer, text, cut) : -1;
    int32_t right = two ? tok_find_in_model(tokenizer, text + cut, size - cut) : -1;
    int32_t both = two ? tok_find_in_model(tokenizer, text, size) : -1;
    bool known = left >= 0 && right >= 0 && both >= 0;
    tok_merge *slot = known ? tok_merge_slot(tokenizer, tok_pair(left, right)) : NULL;
    if (!slot) {
        tok_refuse(loader,
                   "not [\"a\", \"b\"] or \"a b\" of tokens that make a token: the merge to", text);
        return;
    }
    slot->pair = tok_pair(left, right);
    slot->rank = rank;
    slot->id = both;
    tokenizer->joins[(unsigned char)text[cut - 1]][(unsigned char)text[cut]] = true;
}

// Merges are ["a", "b"] or "a b", the one of the lowest rank first.
static void tok_load_merges(tok_loader *loader, const retrofit_json *merges) {
    retrofit_tokenizer *tokenizer = loader->tokenizer;
    tokenizer->merges = tok_allocate_table(loader, merges->count, sizeof *tokenizer->merges,
                                           &tokenizer->merge_mask);
    retrofit_text both = {0};
    uint32_t rank = 1;
    const retrofit_json *merge = merges->child;
    for (; merge && !loader->failed; merge = merge->next) {
        size_t cut = 0;
        both.size = 0;
        if (merge->type == RETROFIT_JSON_ARRAY && merge->count == 2) {
            const retrofit_json *left = merge->child, *right = left->next;
            cut = left->length;
            retrofit_text_append(&both, left->string, left->length);
            retrofit_text_append(&both, right->string, right->length);
        } else if (merge->type == RETROFIT_JSON_STRING) {
            const char *space = memchr(merge->string, ' ', merge->length);
            cut = space ? (size_t)(space - merge->string) : 0;
            retrofit_text_append(&both, merge->string, cut);
            if (space) retrofit_text_append(&both, space + 1, merge->length - cut - 1);
        }
        retrofit_text_append(&both, "", 1);
        if (both.failed) loader->failed = true;
        else tok_add_merge(loader, both.bytes, cut, both.size - 1, rank++);
    }
    free(both.bytes);
}

// By key, then by text, where the one to be found is the last of those with the same.
static int tok_compare_added(const void *a, const void *b) {
    const tok_added *x = a, *y = b;
    if (x->key != y->key) return x->key - y->key;
    int order = memcmp(x->text, y->text, retrofit_min(x->size, y->size));
    if (order) return order;
    if (x->size != y->size) return x->size < y->size ? -1 : 1;
    return y->order - x->order;
}

// An added token as a file describes it: its text, as a string or as "content" beside its flags.
static tok_added tok_read_added(tok_loader *loader, const retrofit_json *entry, bool special) {
    bool is_text = entry->type == RETROFIT_JSON_STRING;
    const retrofit_json *text =
        is_text ? entry : tok_get(loader, entry, "content", RETROFIT_JSON_STRING);
    if (!is_text) TOK_CHECK_KEYS(loader, entry, tok_added_keys, "an added token");
    special = special || tok_flag(loader, entry, "special", false);
    return (tok_added){
        .text = text->string,
        .size = text->length,
        .id = -1,
        .special = special,
        .normalized = tok_flag(loader, entry, "normalized", !special),
        .single_word = tok_flag(loader, entry, "single_word", false),
        .lstrip = tok_flag(loader, entry, "lstrip", false),
        .rstrip = tok_flag(loader, entry, "rstrip", false),
    };
}

// The id that Hugging Face's tokenizers give to the next new token, whatever a file says.
// tokenizer.json may say another one only where somebody has edited it; then the file counts.
static int32_t tok_next_id(const tok_loader *loader) {
    int32_t size = (int32_t)loader->vocabulary_size;
    return loader->last_added >= size ? loader->last_added + 1 : size;
}

// Adds a token, with the next id if it has none, or changes the flags of one that was added before,
// as transformers does: special and normalized cannot be taken back. Returns it; NULL or error.
static tok_token *tok_enter_added(tok_loader *loader, tok_added new) {
    retrofit_tokenizer *tokenizer = loader->tokenizer;
    if (!new.size) tok_refuse(loader, "empty: an", "added token");
    if (loader->failed) return NULL;
    int32_t known = tok_find(tokenizer, new.text, new.size);
    if (known >= 0) new.id = known;
    if (known < 0) {
        if (new.id < 0) new.id = tok_next_id(loader);
        if (tokenizer->tokens[new.id].text)
            tok_refuse(loader, "would get the id of another token, the added token", new.text);
        else tok_add_token(loader, new.text, new.size, new.id, false);
        if (loader->failed) return NULL;
        tokenizer->size = retrofit_max(tokenizer->size, (size_t)new.id + 1);
    }
    tok_token *token = &tokenizer->tokens[new.id];
    if (!token->added) {
        token->added = (int32_t)++tokenizer->added_count;
    } else {
        const tok_added *old = &tokenizer->added[token->added - 1];
        if (!token->special && old->normalized != new.normalized) {
            tok_refuse(loader, "normalized in one place and not in another, the added token",
                       new.text);
            return NULL;
        }
        new.normalized = old->normalized;
    }
    new.text = token->text;
    token->special = token->special || new.special;
    tokenizer->added[token->added - 1] = new;
    if (new.id > loader->last_added) loader->last_added = new.id;
    return token;
}

// One of tokenizer.json's added_tokens, which may be in the vocabulary too. It may be there twice
// if both say the same.
static void tok_load_added(tok_loader *loader, const retrofit_json *entry) {
    retrofit_tokenizer *tokenizer = loader->tokenizer;
    tok_added new = tok_read_added(loader, entry, false);
    int32_t said = tok_read_id(loader, tok_get(loader, entry, "id", RETROFIT_JSON_NUMBER));
    if (loader->failed) return;
    int32_t known = tok_find(tokenizer, new.text, new.size);
    const tok_token *token = known >= 0 ? &tokenizer->tokens[known] : tok_token_at(tokenizer, said);
    bool bad = known >= 0 ? known != said : token != NULL;
    if (known >= 0 && token->added) {
        const tok_added *old = &tokenizer->added[token->added - 1];
        bad = bad || old->special != new.special || old->normalized != new.normalized ||
              old->single_word != new.single_word || old->lstrip != new.lstrip ||
              old->rstrip != new.rstrip;
    }
    if (bad) tok_refuse(loader, "twice there, with other ids or flags, the added token", new.text);
    if (known < 0 && !loader->failed && said != tok_next_id(loader))
        retrofit_note("%s: the added token \"%s\" has id %d, but %d in Hugging Face's tokenizers",
                      loader->path, new.text, (int)said, (int)tok_next_id(loader));
    new.id = said;
    tok_enter_added(loader, new);
}

// Sets `shorter`, in the tokens' order: it is the token before, or one that this one begins with.
static void tok_link_added(retrofit_tokenizer *tokenizer) {
    tok_added *all = tokenizer->added;
    for (size_t i = 0; i < tokenizer->added_count; i++) {
        int32_t j = (int32_t)i - 1;
        while (j >= 0 && (all[j].key != all[i].key || all[j].size > all[i].size ||
                          memcmp(all[j].text, all[i].text, all[j].size)))
            j = all[j].shorter;
        all[i].shorter = j;
    }
}

// Makes the added tokens ready to be found. Where one's text is normalized to be found, decoding
// still gives the text as it stands in the file, as Hugging Face's tokenizers do since 0.21.
static void tok_index_added(tok_loader *loader) {
    retrofit_tokenizer *tokenizer = loader->tokenizer;
    size_t count = tokenizer->added_count, i = 0;
    retrofit_text normal = {0};
    for (tok_added *added = tokenizer->added; added < tokenizer->added + count; added++) {
        added->order = (int32_t)(added - tokenizer->added);
        if (!added->special) added->order += TOK_MAX_ID;
        added->key = 0;
        if (added->normalized) {
            tok_normalize(tokenizer, &normal, added->text, added->size);
            if (normal.failed) loader->failed = true;
            if (loader->failed) break;
            added->text = tok_keep(loader, normal.bytes, normal.size);
            added->size = normal.size;
            added->key = 256;
        }
        added->key += (unsigned char)added->text[0];
    }
    free(normal.bytes);
    if (loader->failed) return;

    qsort(tokenizer->added, count, sizeof *tokenizer->added, tok_compare_added);
    tok_link_added(tokenizer);
    for (int key = 0; key <= 512; key++) {
        while (i < count && tokenizer->added[i].key < key) i++;
        tokenizer->added_begin[key] = i;
    }
}

// Enters the code points of a class, in run lengths: see tok_class_runs.
static void tok_enter_class(uint8_t *classes, const char *runs, uint8_t class) {
    size_t end = 0;
    for (bool inside = false; *runs; inside = !inside) {
        size_t begin = end;
        end += tok_table_number(&runs);
        for (size_t i = begin; inside && i < end; i++) {
            if (class == TOK_WORD) classes[i] |= class;
            else classes[i] = class;
        }
    }
}

static void tok_make_classes(uint8_t *classes) {
    memset(classes, TOK_OTHER, 0x110000);
    tok_enter_class(classes, tok_class_runs[0], TOK_LETTER);
    tok_enter_class(classes, tok_class_runs[1], TOK_NUMBER);
    tok_enter_class(classes, tok_class_runs[2], TOK_WHITE);
    tok_enter_class(classes, tok_class_runs[3], TOK_WORD);
}

// GPT-2's byte-level alphabet: a byte that is printable in Latin-1 stands for itself; the others
// are the code points from 256 on.
static void tok_make_byte_level(retrofit_tokenizer *tokenizer) {
    uint16_t next = 256;
    for (int byte = 0; byte < 256; byte++) {
        bool printable = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
        uint16_t code_point = printable ? (uint16_t)byte : next++;
        tokenizer->byte_to_char[byte] = code_point;
        tokenizer->char_to_byte[code_point] = (uint16_t)(byte + 1);
    }
}

static void tok_load_unk(tok_loader *loader, const retrofit_json *model) {
    if (!tok_present(model, "unk_token")) return;
    const retrofit_json *unk = tok_get(loader, model, "unk_token", RETROFIT_JSON_STRING);
    int32_t id = tok_find_in_model(loader->tokenizer, unk->string, unk->length);
    if (id < 0) tok_refuse(loader, "not in the vocabulary, the unk_token", unk->string);
    loader->tokenizer->unk = id;
}

// The vocabulary and the merges of tokenizer.json's model.
static void tok_load_model(tok_loader *loader, const retrofit_json *model,
                           const retrofit_json *added) {
    retrofit_tokenizer *tokenizer = loader->tokenizer;
    if (!tok_setting_is(model, "type", "BPE"))
        tok_refuse(loader, "only BPE is supported as", "model");
    TOK_CHECK_KEYS(loader, model, tok_model_keys, "model");
    tokenizer->fuse_unk = tok_flag(loader, model, "fuse_unk", false);
    tokenizer->byte_fallback = tok_flag(loader, model, "byte_fallback", false);
    tokenizer->ignore_merges = tok_flag(loader, model, "ignore_merges", false);
    const retrofit_json *vocabulary = tok_get(loader, model, "vocab", RETROFIT_JSON_OBJECT);
    if (!loader->failed) tok_load_vocabulary(loader, vocabulary, added);
    if (loader->failed) return;
    tok_load_merges(loader, tok_get(loader, model, "merges", RETROFIT_JSON_ARRAY));
    tok_load_unk(loader, model);
}

// tokenizer.json, but for its post_processor. The order matters: merges are of tokens, and added
// tokens are normalized.
static void tok_load_tokenizer(tok_loader *loader, const retrofit_json *root) {
    retrofit_tokenizer *tokenizer = loader->tokenizer;
    const retrofit_json *added = &tok_nothing;
    if (tok_present(root, "added_tokens"))
        added = tok_get(loader, root, "added_tokens", RETROFIT_JSON_ARRAY);
    const retrofit_json *model = tok_get(loader, root, "model", RETROFIT_JSON_OBJECT);
    TOK_CHECK_KEYS(loader, root, tok_file_keys, "");
    tok_load_role(loader, root, TOK_NORMALIZER);
    tok_load_role(loader, root, TOK_PRE_TOKENIZER);
    tok_load_role(loader, root, TOK_DECODER);
    if (!loader->failed) tok_check_steps(loader);
    tokenizer->has_decoder = tok_present(root, "decoder") != NULL;
    if (tokenizer->has[TOK_NFC]) {
        tokenizer->nfc = tok_nfc_make();
        if (!tokenizer->nfc) loader->failed = true;
    }
    tok_load_model(loader, model, added);
    for (const retrofit_json *v = added->child; v && !loader->failed; v = v->next)
        tok_load_added(loader, v);
}

// The token that a key such as eos_token names; without a text if there is none.
// special_tokens_map.json comes first, then tokenizer_config.json, then what the class has by
// itself, then padding's token. What is there as null, or empty, names none.
static tok_added tok_named(tok_loader *loader, int name) {
    const char *key = tok_names[name];
    const retrofit_json *value = loader->map_counts ? retrofit_json_get(loader->map, key) : NULL;
    if (!value) value = retrofit_json_get(loader->config, key);
    const char *own = loader->class ? loader->class->tokens[name] : NULL;
    if (!value && !own && name == TOK_PAD)
        value = retrofit_json_get(tok_present(loader->root, "padding"), key);
    tok_added token = {.id = -1, .special = true};
    if (value && value->type != RETROFIT_JSON_NULL) token = tok_read_added(loader, value, true);
    if (!value && own) token.text = own;
    if (!value && own) token.size = strlen(own);
    return token;
}

// Adds a special token, unless it is there; its flags count where tokenizer_config.json has them.
static void tok_enter_special(tok_loader *loader, tok_added new, bool has_flags, const char *key) {
    retrofit_tokenizer *tokenizer = loader->tokenizer;
    if (loader->failed || !new.size) return;
    int32_t id = tok_find(tokenizer, new.text, new.size);
    int32_t number = id >= 0 ? tokenizer->tokens[id].added : 0;
    if (number && tokenizer->added[number - 1].again) tokenizer->tokens[id].special = true;
    else if (!number || has_flags) tok_enter_added(loader, new);
    if (id < 0 && !loader->failed)
        retrofit_note("%s: \"%s\" names \"%s\", which tokenizer.json does not have: it is added as "
                      "id %d, as in transformers", loader->path, key, new.text,
                      (int)tok_find(tokenizer, new.text, new.size));
}

// The tokens in a list, or in an object.
static void tok_enter_specials(tok_loader *loader, const retrofit_json *object, const char *key) {
    const retrofit_json *list = tok_present(object, key);
    if (list && list->type != RETROFIT_JSON_OBJECT)
        list = tok_get(loader, object, key, RETROFIT_JSON_ARRAY);
    for (const retrofit_json *v = list ? list->child : NULL; v && !loader->failed; v = v->next)
        tok_enter_special(loader, tok_read_added(loader, v, true), v->type == RETROFIT_JSON_OBJECT,
                          key);
}

// A member of added_tokens_decoder, whose name is an id: they are added in the order of these ids.
typedef struct {
    size_t id;
    const retrofit_json *entry;
} tok_numbered;

static int tok_compare_numbered(const void *a, const void *b) {
    const tok_numbered *x = a, *y = b;
    return (x->id > y->id) - (x->id < y->id);
}

static void tok_load_decoder_tokens(tok_loader *loader) {
    const retrofit_json *list =
        tok_get(loader, loader->config, "added_tokens_decoder", RETROFIT_JSON_OBJECT);
    tok_numbered *all = retrofit_allocate(list->count, sizeof *all);
    if (!all) loader->failed = true;
    size_t count = 0;
    for (const retrofit_json *v = list->child; v && !loader->failed; v = v->next) {
        all[count] = (tok_numbered){strtoul(v->key, NULL, 10), v};
        bool digits = v->key_length > 0 && strspn(v->key, "0123456789") == v->key_length;
        if (!digits || all[count++].id >= TOK_MAX_ID)
            tok_refuse(loader, "no id from 0 to 4194303, in added_tokens_decoder:", v->key);
    }
    if (count) qsort(all, count, sizeof *all, tok_compare_numbered);
    for (size_t i = 0; i < count && !loader->failed; i++) {
        tok_added new = tok_read_added(loader, all[i].entry, false);
        new.again = true;
        const tok_token *token = tok_enter_added(loader, new);
        if (!token) break;
        size_t id = (size_t)(token - loader->tokenizer->tokens);
        if (id != all[i].id)
            retrofit_note("%s: the added token \"%s\" has id %zu, not %zu, as in transformers",
                          loader->path, token->text, id, all[i].id);
    }
    free(all);
}

// added_tokens.json, where it counts, has to say what tokenizer.json says.
static void tok_check_added_json(tok_loader *loader) {
    if (!loader->added_json) return;
    for (const retrofit_json *v = loader->added_json->child; v; v = v->next)
        if (tok_find(loader->tokenizer, v->key, v->key_length) != tok_read_id(loader, v))
            tok_refuse(loader, "tokenizer.json does not have this id for a token that "
                       "added_tokens.json has: add it to its added_tokens, the token", v->key);
}

// All tokens that transformers adds to those of tokenizer.json. special_tokens_map.json and
// added_tokens.json count only where tokenizer_config.json has no added_tokens_decoder.
static void tok_load_more_tokens(tok_loader *loader) {
    retrofit_tokenizer *tokenizer = loader->tokenizer;
    loader->map_counts = !retrofit_json_get(loader->config, "added_tokens_decoder");
    for (size_t i = 0; i < tokenizer->added_count; i++)
        tokenizer->added[i].again = loader->map_counts;
    if (loader->map_counts) tok_check_added_json(loader);
    else tok_load_decoder_tokens(loader);
    for (int i = 0; i < TOK_NAMES; i++) {
        tok_added token = tok_named(loader, i);
        tok_enter_special(loader, token, loader->class && loader->class->sets_flags, tok_names[i]);
        int32_t id = token.size ? tok_find(tokenizer, token.text, token.size) : -1;
        if (i == TOK_BOS) tokenizer->bos = id;
        if (i == TOK_EOS) tokenizer->eos = id;
    }
    tok_enter_specials(loader, loader->config, "additional_special_tokens");
    if (loader->map_counts) tok_enter_specials(loader, loader->map, "additional_special_tokens");
    tok_enter_specials(loader, loader->config, "extra_special_tokens");
}

// Where no class is named, transformers takes one by config.json's model_type; for a Llama one that
// adds <s>, whatever tokenizer.json says. Here a tokenizer does not depend on the model beside it.
static void tok_note_missing_class(const tok_loader *loader) {
    char path[RETROFIT_PATH];
    bool fits = retrofit_path(path, loader->directory, "config.json");
    if (!fits || !retrofit_is_there(path)) return;
    retrofit_json *json = retrofit_json_read(path, NULL);
    if (retrofit_json_is(retrofit_json_get(json, "model_type"), "llama"))
        retrofit_note("%s/tokenizer_config.json: no tokenizer_class: tokenizer.json is followed as "
                      "it is; transformers 4 would take LlamaTokenizer, which adds its own <s>: "
                      "name the class", loader->directory);
    retrofit_json_free(json);
}

// The class of the tokenizer, without "Fast".
static void tok_load_class(tok_loader *loader) {
    if (!tok_present(loader->config, "tokenizer_class")) {
        tok_note_missing_class(loader);
        return;
    }
    const retrofit_json *class =
        tok_get(loader, loader->config, "tokenizer_class", RETROFIT_JSON_STRING);
    size_t length = class->length;
    if (length > 4 && !strcmp(class->string + length - 4, "Fast")) length -= 4;
    for (int i = 0; i < TOK_CLASSES; i++) {
        const char *name = tok_classes[i].name;
        if (strlen(name) == length && !memcmp(name, class->string, length))
            loader->class = &tok_classes[i];
    }
    if (!loader->class && !loader->failed)
        retrofit_note("%s: the tokenizer_class \"%s\" is not known here: tokenizer.json is "
                      "followed as it is", loader->path, class->string);
}

// add_bos_token and add_eos_token. They count for classes that put their own tokens around a text;
// where no class is known, they do if tokenizer.json has no post_processor.
static void tok_load_ends(tok_loader *loader) {
    retrofit_tokenizer *tokenizer = loader->tokenizer;
    const struct tok_class *class = loader->class;
    bool own = class ? class->own_ends : !tok_present(loader->root, "post_processor");
    const retrofit_json *config = loader->config;
    bool add_bos = tok_flag(loader, config, "add_bos_token", false);
    bool add_eos = tok_flag(loader, config, "add_eos_token", false);
    if (class && class->add_bos && !retrofit_json_get(config, "add_bos_token")) add_bos = true;
    tok_specials before = {.count = 0}, after = {.count = 0};
    if (add_bos && tokenizer->bos >= 0) tok_add_special(&before, tokenizer->bos);
    if (add_eos && tokenizer->eos >= 0) tok_add_special(&after, tokenizer->eos);
    if (own && class && (before.count < add_bos || after.count < add_eos))
        tok_refuse(loader, "there is no such token, but it is to be added:",
                   before.count < add_bos ? "bos_token" : "eos_token");
    bool same = !memcmp(&before, &tokenizer->before, sizeof before) &&
                !memcmp(&after, &tokenizer->after, sizeof after);
    if (same || loader->failed) return;
    const char *followed = own ? "followed, not tokenizer.json's post_processor"
                               : "not followed, but tokenizer.json's post_processor";
    if (class && (own || add_bos || add_eos))
        retrofit_note("%s: add_bos_token and add_eos_token are %s, as %s has it in transformers 4",
                      loader->path, followed, class->name);
    if (!own) return;
    tokenizer->before = before;
    tokenizer->after = after;
}

// add_prefix_space. LlamaTokenizer makes its tokenizer from another file if it has this key, which
// we can't: tokenizer.json must agree. The other classes set it in a ByteLevel step that stands
// alone, and have false where the key is missing; they leave it where it stands in a Sequence.
static void tok_load_prefix(tok_loader *loader) {
    bool *has = loader->tokenizer->has;
    const char *key = "add_prefix_space";
    const retrofit_json *value = retrofit_json_get(loader->config, key);
    bool llama = loader->class && loader->class->add_bos;
    bool absent = value ? value->type == RETROFIT_JSON_NULL : llama || !loader->class;
    bool wanted = tok_flag(loader, loader->config, key, false);
    bool metaspace = has[TOK_METASPACE_ALWAYS] || has[TOK_METASPACE_FIRST];
    bool prefix = has[TOK_PREFIX_SPACE] || has[TOK_PREPEND_MARK] || metaspace;
    if (absent || prefix == wanted || loader->failed) return;

    const retrofit_json *step = tok_present(loader->root, "pre_tokenizer");
    bool alone = tok_setting_is(step, "type", "ByteLevel");
    if (llama) {
        tok_refuse(loader, "tokenizer.json has it another way, and there is no other file to make "
                   "the tokenizer from: remove", key);
    } else if (alone) {
        has[TOK_PREFIX_SPACE] = wanted;
        retrofit_note("%s: add_prefix_space %s is followed, not tokenizer.json's, as in "
                      "transformers 4", loader->path, wanted ? "true" : "false");
    } else if (value) {
        retrofit_note("%s: add_prefix_space %s is not followed, but tokenizer.json's steps, as in "
                      "transformers 4", loader->path, wanted ? "true" : "false");
    }
}

// Whether a token of the vocabulary has a digit and something else: if not, it makes no difference
// that digits are cut from each other.
static bool tok_joins_digits(const retrofit_tokenizer *tokenizer) {
    for (size_t id = 0; id < tokenizer->size; id++) {
        const tok_token *token = &tokenizer->tokens[id];
        if (!token->text || !token->in_model) continue;
        for (size_t i = 0; i < token->size && token->size > 1; i++)
            if (token->text[i] >= '0' && token->text[i] <= '9') return true;
    }
    return false;
}

// The steps before the merges, as bits.
static uint32_t tok_steps_before(const retrofit_tokenizer *tokenizer) {
    const uint32_t all = TOK_BIT(NFC) | TOK_BIT(PREPEND_MARK) | TOK_BIT(MARK_SPACES) |
                         TOK_BIT(METASPACE) | TOK_BIT(METASPACE_ALWAYS) |
                         TOK_BIT(METASPACE_FIRST) | TOK_BIT(METASPACE_SPLIT) |
                         TOK_BIT(SPLIT_NUMBERS) | TOK_BIT(SPLIT_DIGITS) | TOK_BIT(SPLIT_GPT2) |
                         TOK_BIT(SPLIT_QWEN2) | TOK_BIT(SPLIT_LLAMA3) | TOK_BIT(BYTE_LEVEL) |
                         TOK_BIT(GPT2_BYTES);
    const uint32_t split = TOK_BIT(SPLIT_GPT2) | TOK_BIT(BYTE_LEVEL);
    uint32_t steps = 0;
    for (int i = 0; i < TOK_STEPS; i++) steps |= tokenizer->has[i] ? 1u << i & all : 0;
    if ((steps & split) == split) steps = (steps & ~split) | TOK_BIT(GPT2_BYTES);
    if (!tok_joins_digits(tokenizer)) steps &= ~TOK_BIT(SPLIT_DIGITS);
    return steps;
}

// transformers 5 makes the tokenizers of some classes from vocabulary and merges alone, with steps
// of the class's own; LlamaTokenizer's depend on two keys, and where tokenizer.json is of the
// byte-level kind it is followed after all. We follow it always, as transformers 4 does.
static void tok_note_steps(const tok_loader *loader) {
    const struct tok_class *class = loader->class;
    const retrofit_tokenizer *tokenizer = loader->tokenizer;
    const retrofit_json *prefix = retrofit_json_get(loader->config, "add_prefix_space");
    const retrofit_json *legacy = retrofit_json_get(loader->config, "legacy");
    if (!class || !class->steps_5) return;
    uint32_t steps = class->steps_5;
    bool llama = steps == TOK_BIT(METASPACE);
    if (llama && (tokenizer->has[TOK_BYTE_LEVEL] || tokenizer->has[TOK_GPT2_BYTES])) return;
    if (llama && !(prefix && prefix->type == RETROFIT_JSON_BOOL && prefix->number == 0))
        steps |= legacy && legacy->number ? TOK_BIT(METASPACE_ALWAYS) : TOK_BIT(METASPACE_FIRST);
    bool model = llama ? tokenizer->byte_fallback && tokenizer->fuse_unk : !tokenizer->fuse_unk;
    if (steps == tok_steps_before(tokenizer) && model && !tokenizer->ignore_merges) return;
    retrofit_note("%s: tokenizer.json's steps are followed, as in transformers 4; in transformers "
                  "5 %s has its own: name PreTrainedTokenizerFast, which follows them in both",
                  loader->path, class->name);
}

// What lies beside tokenizer.json, and tokenizer.json's post_processor, which needs all tokens.
static void tok_load_config(tok_loader *loader, const char *directory) {
    retrofit_tokenizer *tokenizer = loader->tokenizer;
    const retrofit_json *config = loader->config;
    if (!retrofit_path(loader->path, directory, "special_tokens_map.json")) loader->failed = true;
    if (loader->map) TOK_CHECK_KEYS(loader, loader->map, tok_map_keys, "");
    if (!retrofit_path(loader->path, directory, "tokenizer_config.json")) loader->failed = true;
    if (config) TOK_CHECK_KEYS(loader, config, tok_config_keys, "");
    tok_load_class(loader);
    if (!loader->failed) tok_load_more_tokens(loader);
    if (!loader->failed) tok_index_added(loader);
    if (!retrofit_path(loader->path, directory, "tokenizer.json")) loader->failed = true;
    tok_load_role(loader, loader->root, TOK_POST_PROCESSOR);
    if (!retrofit_path(loader->path, directory, "tokenizer_config.json")) loader->failed = true;
    if (loader->failed) return;
    tok_load_ends(loader);
    tok_load_prefix(loader);
    tokenizer->has[TOK_SPLIT_SPECIAL] = tok_flag(loader, config, "split_special_tokens", false);
    loader->tokenizer->cleans_up = tok_flag(loader, config, "clean_up_tokenization_spaces", false);
    if (!loader->failed) tok_note_steps(loader);
}

// Memory for files of this size, and what does not depend on their contents.
static void tok_prepare(tok_loader *loader, size_t size) {
    retrofit_tokenizer *tokenizer = loader->tokenizer;
    tokenizer->bos = -1;
    tokenizer->eos = -1;
    tokenizer->unk = -1;
    // All texts are in the files, or the names of a class's tokens. Those of added tokens may be
    // here twice, normalized: then a space becomes "▁", and no other character more than thrice
    // its bytes.
    tokenizer->strings = retrofit_allocate(size + 256, 4);
    tokenizer->classes = retrofit_allocate(0x110000, 1);
    if (!tokenizer->strings || !tokenizer->classes) {
        loader->failed = true;
        return;
    }
    tok_make_classes(tokenizer->classes);
    tok_make_byte_level(tokenizer);
}

// Reads a file, if it is there, and adds its size. NULL or error, or it is not there.
static retrofit_json *tok_read_json(tok_loader *loader, const char *directory, const char *name,
                                    bool needed, size_t *sum) {
    size_t size;
    if (loader->failed) return NULL;
    bool has_path = retrofit_path(loader->path, directory, name);
    if (has_path && !needed && !retrofit_is_there(loader->path)) return NULL;
    retrofit_json *root = has_path ? retrofit_json_read(loader->path, &size) : NULL;
    if (!root) loader->failed = true;
    else *sum += size;
    return root;
}

// The number of tokens in a list, or of the tokens or flags in an object.
static size_t tok_count(const retrofit_json *object, const char *key) {
    const retrofit_json *list = retrofit_json_get(object, key);
    return list ? list->count : 0;
}

static void tok_index_characters(retrofit_tokenizer *tokenizer) {
    for (uint32_t code_point = 0; code_point < TOK_CHAR_IDS; code_point++) {
        char text[4];
        size_t length = utf8_put(code_point, text);
        tokenizer->char_ids[code_point] = tok_find_in_model(tokenizer, text, length);
    }
}

static void tok_load_directory(tok_loader *loader, const char *directory) {
    size_t size = 0;
    loader->directory = directory;
    loader->root = tok_read_json(loader, directory, "tokenizer.json", true, &size);
    loader->config = tok_read_json(loader, directory, "tokenizer_config.json", false, &size);
    loader->map = tok_read_json(loader, directory, "special_tokens_map.json", false, &size);
    loader->added_json = tok_read_json(loader, directory, "added_tokens.json", false, &size);
    if (!loader->failed) tok_prepare(loader, size);
    if (loader->failed) return;
    loader->added_capacity = TOK_NAMES + tok_count(loader->root, "added_tokens") +
                             tok_count(loader->config, "added_tokens_decoder") +
                             tok_count(loader->config, "additional_special_tokens") +
                             tok_count(loader->config, "extra_special_tokens") +
                             tok_count(loader->map, "additional_special_tokens");
    if (!retrofit_path(loader->path, directory, "tokenizer.json")) loader->failed = true;
    tok_load_tokenizer(loader, loader->root);
    if (!loader->failed) tok_load_config(loader, directory);
    if (!loader->failed) tok_index_characters(loader->tokenizer);
}

// A directory may have SentencePiece's file alone, which we don't read.
static void tok_explain_missing(const char *directory) {
    char path[RETROFIT_PATH];
    bool fits = retrofit_path(path, directory, "tokenizer.json");
    if (!fits || retrofit_is_there(path)) return;
    if (retrofit_path(path, directory, "tokenizer.model") && retrofit_is_there(path))
        retrofit_fail("%s: there is no tokenizer.json beside it: make one with transformers, "
                      "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)", path);
}

retrofit_tokenizer *retrofit_tokenizer_load(const char *directory) {
    if (!retrofit_check_directory(directory)) return NULL;
    tok_loader loader = {.tokenizer = retrofit_allocate(1, sizeof(retrofit_tokenizer))};
    if (!loader.tokenizer) return NULL;
    loader.last_row = -1;
    loader.last_added = -1;
    char path[RETROFIT_PATH];
    bool here = retrofit_path(path, directory, "tokenizer.json") && retrofit_is_there(path);
    tok_load_directory(&loader, here ? directory : retrofit_model_directory(directory, path));
    retrofit_json_free(loader.root);
    retrofit_json_free(loader.config);
    retrofit_json_free(loader.map);
    retrofit_json_free(loader.added_json);
    if (!loader.failed) return loader.tokenizer;
    tok_explain_missing(directory);
    retrofit_tokenizer_free(loader.tokenizer);
    return NULL;
}

void retrofit_tokenizer_free(retrofit_tokenizer *tokenizer) {
    if (!tokenizer) return;
    free(tokenizer->strings);
    free(tokenizer->tokens);
    free(tokenizer->by_text);
    free(tokenizer->merges);
    free(tokenizer->added);
    free(tokenizer->classes);
    free(tokenizer->nfc);
    free(tokenizer);
}

// ---- Chat templates: their pieces --------------------------------------------------------------

// A chat template is a program in Jinja that writes a conversation out. What follows runs the small
// part of Jinja that chat templates are written in, just as transformers has it run (trim_blocks,
// lstrip_blocks). All else is refused by its name, as soon as a conversation comes to it: what a
// template has for tools does no harm. Templates are hostile: nesting, steps, memory are limited.
enum { CHAT_MAX_NESTING = 60, CHAT_MAX_STEPS = 50 * 1000 * 1000, CHAT_MAX_MEMORY = 1 << 28 };

typedef enum {
    CHAT_END, CHAT_TEXT, CHAT_STATEMENT, CHAT_OUTPUT, CHAT_CLOSE, CHAT_WORD, CHAT_QUOTED,
    CHAT_INTEGER, CHAT_OPERATOR
} chat_token_kind;

// Text, {% {{ %} or }}, or what is between those: a word, string, whole number or operator.
typedef struct {
    chat_token_kind kind;
    const char *bytes; // of a string: without its quotes
    size_t size;
} chat_token;

typedef enum {
    CHAT_UNDEFINED, CHAT_NONE, CHAT_BOOL, CHAT_NUMBER, CHAT_STRING, CHAT_LIST, CHAT_MESSAGE,
    CHAT_LOOP, CHAT_FUNCTION
} chat_value_type;

typedef struct chat_value {
    chat_value_type type;
    int64_t number;                 // BOOL, NUMBER
    const char *bytes;              // STRING
    const struct chat_value *items; // LIST
    size_t size;                    // of bytes or items
    const retrofit_message *message;
} chat_value;

typedef struct {
    chat_token name;
    chat_value value;
} chat_variable;

typedef struct chat_block { // of memory that a rendering needs
    struct chat_block *next;
    max_align_t bytes[];
} chat_block;

struct retrofit_chat {
    char where[RETROFIT_PATH + 32]; // which file
    char *text;                     // each line ends in \n
    retrofit_text tokens;           // its bytes are chat_token
    retrofit_json *config;          // tokenizer_config.json, which names special tokens; or NULL
    const retrofit_tokenizer *tokenizer;
    time_t now;                     // as at the start: one day for a whole conversation
};

typedef struct {
    const retrofit_chat *chat;
    size_t at, steps, nesting;     // at which token; so far; blocks and brackets around it
    size_t unused;                 // > 0: expressions are read, but not evaluated
    chat_variable *variables;      // [variable_count], those of the innermost loop from scope on
    size_t variable_count, variable_capacity, scope;
    size_t loop_index, loop_count; // of the innermost loop
    chat_block *memory;
    size_t memory_size;
    retrofit_text output, marks; // marks: pairs of size_t, places in the output
    char problem[512]; // why it cannot go on; else ""
} chat_rendering;

static const chat_token *chat_peek(const chat_rendering *run) {
    return (const chat_token *)(const void *)run->chat->tokens.bytes + run->at;
}

// Ends the rendering: it goes to the end of the tokens, and finds none there.
static void chat_end(chat_rendering *run) {
    while (chat_peek(run)->kind != CHAT_END) run->at++;
}

static void chat_too_much(chat_rendering *run, const char *what) {
    if (!*run->problem) snprintf(run->problem, sizeof run->problem, "it takes too much %s", what);
    chat_end(run);
}

// The same where something is not followed.
__attribute__((format(printf, 2, 3))) static void chat_refuse(chat_rendering *run,
                                                              const char *format, ...) {
    if (*run->problem) return;
    size_t line = 1;
    for (const char *c = run->chat->text; c < chat_peek(run)->bytes; c++) line += *c == '\n';
    int n = snprintf(run->problem, sizeof run->problem, "line %zu: ", line);
    va_list args;
    va_start(args, format);
    vsnprintf(run->problem + n, sizeof run->problem - (size_t)n, format, args);
    va_end(args);
    for (char *c = run->problem; *c; c++)
        if ((unsigned char)*c < ' ') *c = ' ';
    chat_end(run);
}

static void chat_spend(chat_rendering *run, size_t steps) {
    run->steps += steps;
    if (run->steps > CHAT_MAX_STEPS) chat_too_much(run, "time");
}

// What goes over so many bytes of a text.
static void chat_spend_on(chat_rendering *run, size_t bytes) { chat_spend(run, bytes / 64); }

static const chat_token *chat_take(chat_rendering *run) {
    chat_spend(run, 1);
    const chat_token *token = chat_peek(run);
    if (token->kind != CHAT_END) run->at++;
    return token;
}

static bool chat_is_text(const char *bytes, size_t size, const char *word) {
    return size == strlen(word) && !memcmp(bytes, word, size);
}

static bool chat_is_word(const chat_token *token, const char *word) {
    bool fits = token->kind == CHAT_WORD || token->kind == CHAT_OPERATOR;
    return fits && chat_is_text(token->bytes, token->size, word);
}

static bool chat_accept(chat_rendering *run, const char *word) {
    bool found = chat_is_word(chat_peek(run), word);
    if (found) chat_take(run);
    return found;
}

static void chat_refuse_token(chat_rendering *run, const chat_token *token) {
    int size = (int)retrofit_min(token->size, 40);
    if (token->kind == CHAT_END) chat_refuse(run, "it ends within a block or a tag");
    else chat_refuse(run, "'%.*s' is not followed here", size, token->bytes);
}

static void chat_expect(chat_rendering *run, const char *word) {
    if (!chat_accept(run, word)) chat_refuse_token(run, chat_peek(run));
}

static const chat_token *chat_expect_kind(chat_rendering *run, chat_token_kind kind) {
    if (chat_peek(run)->kind != kind) chat_refuse_token(run, chat_peek(run));
    return chat_take(run);
}

static void chat_add_token(retrofit_chat *chat, chat_token_kind kind, const char *bytes,
                           size_t size) {
    retrofit_text_append(&chat->tokens, &(chat_token){kind, bytes, size}, sizeof(chat_token));
}

static void chat_enter(chat_rendering *run) {
    if (++run->nesting > CHAT_MAX_NESTING) chat_too_much(run, "nesting");
}

// The size of the text before a tag. {%- takes all white space before it, and {% or {# that begins
// its line what is before it on that line.
static size_t chat_text_before(const retrofit_chat *chat, const char *text, size_t size,
                               const char *tag) {
    if (tag[2] == '-') return retrofit_size_without_spaces(text, size);
    if (tag[2] == '+' || tag[1] == '{') return size;
    size_t line = size;
    while (line > 0 && text[line - 1] != '\n') line--;
    bool begins = line > 0 || text == chat->text || text[-1] == '\n';
    return begins && retrofit_spaces_at(text + line, size - line) == size - line ? line : size;
}

// The bytes of a tag's end, with the white space it takes: all behind -%}, a newline behind %}.
// 0: it does not end here. text ends in a NUL.
static size_t chat_tag_end(const char *text, const char *end, char close) {
    bool variable = close == '}', minus = *text == '-';
    size_t sign = minus || (*text == '+' && !variable);
    if (text[sign] != close || text[sign + 1] != '}') return 0;
    const char *behind = text + sign + 2;
    if (minus) return 3 + retrofit_spaces_at(behind, (size_t)(end - behind));
    return sign + 2 + (!sign && !variable && *behind == '\n');
}

static bool chat_is_letter(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
}

static bool chat_is_digit(char c) { return c >= '0' && c <= '9'; }

// The bytes of the token at the beginning of a tag's text; 0: it has no end.
static size_t chat_token_size(const char *text, const char *end, chat_token_kind *kind) {
    static const char *const pairs[] = {"==", "!=", "<=", ">=", "//", "**"};
    const char *c = text + 1;
    *kind = CHAT_OPERATOR;
    if (*text == '\'' || *text == '"') {
        *kind = CHAT_QUOTED;
        while (c < end && *c != *text) c += *c == '\\' ? 2 : 1;
        return c < end ? (size_t)(c + 1 - text) : 0;
    }
    if (chat_is_letter(*text) || chat_is_digit(*text)) {
        *kind = chat_is_letter(*text) ? CHAT_WORD : CHAT_INTEGER;
        while (chat_is_letter(*c) || chat_is_digit(*c)) c++;
        return (size_t)(c - text);
    }
    for (size_t i = 0; i < 6; i++)
        if (!strncmp(text, pairs[i], 2)) return 2;
    return 1;
}

// Adds the tokens from behind {% or {{ to the end of the tag. NULL: it has none; else what follows.
static const char *chat_read_tag(retrofit_chat *chat, const char *at, const char *end,
                                 char close) {
    size_t brackets = 0; // in which no tag ends
    for (;;) {
        at += retrofit_spaces_at(at, (size_t)(end - at));
        if (at == end) return NULL;
        chat_token_kind kind;
        size_t size = brackets ? 0 : chat_tag_end(at, end, close);
        if (size) {
            chat_add_token(chat, CHAT_CLOSE, at, 2);
            return at + size;
        }
        size = chat_token_size(at, end, &kind);
        if (size == 0) return NULL;
        if (kind == CHAT_OPERATOR && strchr("([{", *at)) brackets++;
        if (kind == CHAT_OPERATOR && brackets && strchr(")]}", *at)) brackets--;
        size_t quote = kind == CHAT_QUOTED;
        chat_add_token(chat, kind, at + quote, size - 2 * quote);
        at += size;
    }
}

static const char *chat_behind_comment(const char *at, const char *end) { // NULL: it has no end
    for (; at < end; at++) {
        size_t size = chat_tag_end(at, end, '#');
        if (size) return at + size;
    }
    return NULL;
}

// Cuts the template into tokens, in which white space is as Jinja leaves it. false or error.
static bool chat_read_tokens(retrofit_chat *chat, const char *end) {
    const char *at = chat->text; // what is not yet in tokens
    for (const char *tag = at; tag < end; tag++) {
        if (*tag != '{' || !tag[1] || !strchr("%{#", tag[1])) continue;
        size_t before = chat_text_before(chat, at, (size_t)(tag - at), tag);
        if (before) chat_add_token(chat, CHAT_TEXT, at, before);
        const char *inside = tag + 2;
        if (*inside == '-' || *inside == '+') inside++;
        if (tag[1] != '#')
            chat_add_token(chat, tag[1] == '%' ? CHAT_STATEMENT : CHAT_OUTPUT, tag, 2);
        if (tag[1] == '#') at = chat_behind_comment(inside, end);
        else at = chat_read_tag(chat, inside, end, tag[1] == '%' ? '%' : '}');
        if (!at)
            return retrofit_fail("%s: a '%.2s' of the chat template has no end", chat->where, tag);
        tag = at - 1;
    }
    const chat_token *tokens = (const void *)chat->tokens.bytes;
    for (size_t i = 1; i < chat->tokens.size / sizeof *tokens; i++)
        if (tokens[i - 1].kind == CHAT_STATEMENT && chat_is_word(&tokens[i], "raw"))
            return retrofit_fail("%s: 'raw' in the chat template is not followed here",
                                 chat->where);
    if (at < end) chat_add_token(chat, CHAT_TEXT, at, (size_t)(end - at));
    chat_add_token(chat, CHAT_END, end, 0);
    return !chat->tokens.failed;
}

// ---- Chat templates: values --------------------------------------------------------------------

// Memory until the rendering is over. NULL, and the rendering has ended, if there is too little.
static void *chat_memory(chat_rendering *run, size_t size) {
    run->memory_size += size + sizeof(chat_block);
    bool fits = size <= CHAT_MAX_MEMORY && run->memory_size <= CHAT_MAX_MEMORY;
    chat_block *block = fits ? retrofit_allocate(1, sizeof *block + size) : NULL;
    if (!block) {
        chat_too_much(run, "memory");
        return NULL;
    }
    block->next = run->memory;
    run->memory = block;
    return block->bytes;
}

static chat_value chat_nothing(void) { return (chat_value){.type = CHAT_UNDEFINED}; }

static chat_value chat_of_bool(bool truth) {
    return (chat_value){.type = CHAT_BOOL, .number = truth};
}

static chat_value chat_of_number(chat_rendering *run, int64_t number) {
    if (number > INT32_MAX || number < INT32_MIN)
        chat_refuse(run, "a number of this size is not followed");
    return (chat_value){.type = CHAT_NUMBER, .number = number};
}

static chat_value chat_of_string(const char *bytes, size_t size) {
    return (chat_value){.type = CHAT_STRING, .bytes = bytes, .size = size};
}

static chat_value chat_of_token(chat_rendering *run, const chat_token *token) { // a quoted string
    static const char escapes[] = "nrt\\'\"", meanings[] = "\n\r\t\\'\"";
    if (!memchr(token->bytes, '\\', token->size)) return chat_of_string(token->bytes, token->size);
    char *bytes = chat_memory(run, token->size);
    size_t size = 0;
    for (size_t i = 0; bytes && i < token->size; i++) {
        bytes[size] = token->bytes[i];
        if (bytes[size] == '\\') {
            char c = token->bytes[++i];
            const char *escape = memchr(escapes, c, sizeof escapes - 1);
            if (!escape) chat_refuse(run, "the escape \\%c is not followed here", c);
            else bytes[size] = meanings[escape - escapes];
        }
        size++;
    }
    return chat_of_string(bytes, size);
}

static bool chat_is_true(chat_value v) {
    if (v.type == CHAT_BOOL || v.type == CHAT_NUMBER) return v.number != 0;
    if (v.type == CHAT_STRING || v.type == CHAT_LIST) return v.size > 0;
    return v.type >= CHAT_MESSAGE;
}

static bool chat_are_equal(chat_rendering *run, chat_value a, chat_value b) {
    bool numbers = (a.type == CHAT_BOOL || a.type == CHAT_NUMBER) &&
                   (b.type == CHAT_BOOL || b.type == CHAT_NUMBER);
    if (numbers) return a.number == b.number;
    if (a.type != b.type) return false;
    if (a.type == CHAT_STRING && a.size == b.size) chat_spend_on(run, a.size);
    if (a.type == CHAT_STRING) return a.size == b.size && !memcmp(a.bytes, b.bytes, a.size);
    if (a.type > CHAT_STRING) chat_refuse(run, "lists and messages are not compared here");
    return true;
}

// What {{ }} writes of a value.
static chat_value chat_text_of(chat_rendering *run, chat_value v) {
    if (v.type != CHAT_STRING && v.type != CHAT_UNDEFINED)
        chat_refuse(run, "only text is written out here");
    return v.type == CHAT_STRING ? v : chat_of_string("", 0);
}

static chat_value chat_joined(chat_rendering *run, chat_value a, chat_value b) {
    char *bytes = chat_memory(run, a.size + b.size);
    if (!bytes) return chat_nothing();
    memcpy(bytes, a.bytes, a.size);
    memcpy(bytes + a.size, b.bytes, b.size);
    return chat_of_string(bytes, a.size + b.size);
}

static chat_value chat_message_member(chat_rendering *run, const retrofit_message *message,
                                      const chat_token *name) {
    if (chat_is_text(name->bytes, name->size, "role"))
        return chat_of_string(message->role, strlen(message->role));
    if (chat_is_text(name->bytes, name->size, "content"))
        return chat_of_string(message->content, message->size);
    const retrofit_json *other = message->json ? message->json->child : NULL;
    chat_spend(run, message->json ? message->json->count / 4 : 0);
    for (; other; other = other->next)
        if (chat_is_text(name->bytes, name->size, other->key)) chat_refuse_token(run, name);
    return chat_nothing();
}

static chat_value chat_member(chat_rendering *run, chat_value of, const chat_token *name) {
    int64_t i = (int64_t)run->loop_index, n = (int64_t)run->loop_count;
    if (of.type == CHAT_MESSAGE) return chat_message_member(run, of.message, name);
    if (of.type == CHAT_LOOP && chat_is_word(name, "index0")) return chat_of_number(run, i);
    if (of.type == CHAT_LOOP && chat_is_word(name, "index")) return chat_of_number(run, i + 1);
    if (of.type == CHAT_LOOP && chat_is_word(name, "first")) return chat_of_bool(i == 0);
    if (of.type == CHAT_LOOP && chat_is_word(name, "last")) return chat_of_bool(i == n - 1);
    if (of.type == CHAT_LOOP && chat_is_word(name, "length")) return chat_of_number(run, n);
    chat_refuse_token(run, name);
    return chat_nothing();
}

static chat_variable *chat_find_variable(chat_rendering *run, const chat_token *name) {
    chat_spend(run, run->variable_count / 4);
    for (size_t i = run->variable_count; i > 0; i--) {
        const chat_token *other = &run->variables[i - 1].name;
        bool same = other->size == name->size && !memcmp(other->bytes, name->bytes, name->size);
        if (same) return &run->variables[i - 1];
    }
    return NULL;
}

// Makes room for one more: it doubles when it is full. false: the rendering has ended.
static bool chat_grow_variables(chat_rendering *run) {
    size_t count = run->variable_count, capacity = run->variable_capacity;
    if (count < capacity) return true;
    size_t size = sizeof *run->variables;
    chat_variable *more = chat_memory(run, (2 * capacity + 16) * size);
    if (!more) return false;
    if (count > 0) memcpy(more, run->variables, count * size);
    run->variables = more;
    run->variable_capacity = 2 * capacity + 16;
    return true;
}

// As in Jinja, what is set in a loop is gone behind it.
static void chat_set_variable(chat_rendering *run, const chat_token *name, chat_value value) {
    chat_variable *variable = chat_find_variable(run, name);
    if (!variable || variable < run->variables + run->scope) {
        if (!chat_grow_variables(run)) return;
        variable = &run->variables[run->variable_count++];
    }
    *variable = (chat_variable){*name, value};
}

// ---- Chat templates: expressions ---------------------------------------------------------------

static chat_value chat_read_expression(chat_rendering *run);

// The day, in a format whose parts C and Python write alike.
static chat_value chat_format_now(chat_rendering *run, chat_value format) {
    enum { SIZE = 128 };
    char text[SIZE] = "", *out = chat_memory(run, SIZE);
    bool known = out && format.type == CHAT_STRING && format.size > 0 && format.size < SIZE;
    struct tm now;
    if (known) memcpy(text, format.bytes, format.size);
    for (const char *c = text; known && (c = strchr(c, '%')); c++) {
        c += c[1] == '-' ? 2 : 1;
        known = *c && strchr("aAbBdHIjmMpSyY%", *c);
    }
    size_t size = known ? strftime(out, SIZE, text, localtime_r(&run->chat->now, &now)) : 0;
    if (size == 0) chat_refuse(run, "this call of strftime_now is not followed here");
    return chat_of_string(out, size);
}

// Calls a function or, where its name is behind `of`, a method with no argument or one.
static chat_value chat_read_call(chat_rendering *run, chat_value of, const chat_token *name) {
    bool given = !chat_is_word(chat_peek(run), ")");
    chat_value argument = given ? chat_read_expression(run) : chat_nothing();
    chat_expect(run, ")");
    if (run->unused) return chat_nothing();
    bool both = chat_is_word(name, "strip"), left = both || chat_is_word(name, "lstrip");
    bool right = both || chat_is_word(name, "rstrip"), function = of.type == CHAT_FUNCTION;
    if (of.type == CHAT_STRING && (left || right) && !given) {
        chat_spend_on(run, of.size);
        size_t spaces = left ? retrofit_spaces_at(of.bytes, of.size) : 0, size = of.size - spaces;
        if (right) size = retrofit_size_without_spaces(of.bytes + spaces, size);
        return chat_of_string(of.bytes + spaces, size);
    }
    if (function && chat_is_word(name, "strftime_now")) return chat_format_now(run, argument);
    if (function && chat_is_word(name, "raise_exception") && argument.type == CHAT_STRING)
        chat_refuse(run, "it does not take this conversation: %.*s",
                    (int)retrofit_min(argument.size, 300), argument.bytes);
    chat_refuse_token(run, name);
    return chat_nothing();
}

// The text of BOS or EOS. Where no file names them, some classes of tokenizers have their own.
static chat_value chat_special_token(chat_rendering *run, int32_t id, const chat_token *name) {
    const retrofit_json *class = retrofit_json_get(run->chat->config, "tokenizer_class");
    bool none = id < 0 && retrofit_json_is(class, "PreTrainedTokenizerFast");
    if (id < 0 && !none)
        chat_refuse(run, "%.9s, which no file names, is not followed here", name->bytes);
    if (id < 0) return chat_nothing();
    size_t size;
    char *text = retrofit_decode(run->chat->tokenizer, &id, 1, false, &size);
    char *copy = text ? chat_memory(run, size) : NULL;
    if (copy) memcpy(copy, text, size);
    else chat_too_much(run, "memory");
    free(text);
    return copy ? chat_of_string(copy, size) : chat_nothing();
}

static chat_value chat_read_name(chat_rendering *run, const chat_token *name) {
    static const char *const functions[] = {"raise_exception", "strftime_now", "namespace",
                                            "range", "dict", "lipsum", "cycler", "joiner"};
    static const char *const tokens[] = {"unk_token", "pad_token", "sep_token", "cls_token",
                                         "mask_token", "additional_special_tokens"};
    const chat_variable *variable = chat_find_variable(run, name);
    if (run->unused) return chat_nothing();
    if (chat_is_word(name, "true") || chat_is_word(name, "True")) return chat_of_bool(true);
    if (chat_is_word(name, "false") || chat_is_word(name, "False")) return chat_of_bool(false);
    if (chat_is_word(name, "none") || chat_is_word(name, "None"))
        return (chat_value){.type = CHAT_NONE};
    if (variable) return variable->value;
    if (chat_is_word(name, "loop") && run->loop_count) return (chat_value){.type = CHAT_LOOP};
    if (chat_is_word(name, "bos_token"))
        return chat_special_token(run, retrofit_tokenizer_bos(run->chat->tokenizer), name);
    if (chat_is_word(name, "eos_token"))
        return chat_special_token(run, retrofit_tokenizer_eos(run->chat->tokenizer), name);
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
        if (chat_is_word(name, functions[i])) return (chat_value){.type = CHAT_FUNCTION};
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++)
        if (chat_is_word(name, tokens[i])) chat_refuse_token(run, name);
    return chat_nothing();
}

// What is between brackets: one value, or a list.
static chat_value chat_read_items(chat_rendering *run, const char *close, bool list) {
    enum { MAX = 8 };
    chat_value *items = chat_memory(run, MAX * sizeof *items);
    size_t count = 0;
    while (items && !chat_accept(run, close)) {
        if (count > 0) {
            chat_expect(run, ",");
            list = true;
            if (chat_accept(run, close)) break;
        }
        if (count == MAX || chat_peek(run)->kind == CHAT_END) {
            chat_refuse(run, "a list of more than %d is not followed here", MAX);
            return chat_nothing();
        }
        items[count++] = chat_read_expression(run);
    }
    if (!items) return chat_nothing();
    if (!list && count == 1) return items[0];
    return (chat_value){.type = CHAT_LIST, .items = items, .size = count};
}

static chat_value chat_read_primary(chat_rendering *run) {
    const chat_token *token = chat_take(run);
    if (token->kind == CHAT_WORD) return chat_read_name(run, token);
    if (token->kind == CHAT_QUOTED) {
        chat_value text = chat_of_token(run, token);
        while (chat_peek(run)->kind == CHAT_QUOTED)
            text = chat_joined(run, text, chat_of_token(run, chat_take(run)));
        return text;
    }
    if (token->kind == CHAT_INTEGER && token->size < 10) {
        char *end;
        int64_t number = strtol(token->bytes, &end, 10);
        if (end == token->bytes + token->size) return chat_of_number(run, number);
    }
    bool round = chat_is_word(token, "(");
    if (round || chat_is_word(token, "[")) return chat_read_items(run, round ? ")" : "]", !round);
    chat_refuse_token(run, token);
    return chat_nothing();
}

// list[i], list[i:j], message['role']
static chat_value chat_read_subscript(chat_rendering *run, chat_value of) {
    chat_value none = {.type = CHAT_NONE}, from = none, to = none;
    if (!chat_is_word(chat_peek(run), ":")) from = chat_read_expression(run);
    bool slice = chat_accept(run, ":");
    if (slice && !chat_is_word(chat_peek(run), "]")) to = chat_read_expression(run);
    chat_expect(run, "]");
    if (run->unused) return chat_nothing();
    const chat_token name = {CHAT_WORD, from.bytes, from.size};
    if (!slice && from.type == CHAT_STRING) return chat_member(run, of, &name);

    int64_t n = (int64_t)of.size, i = from.type == CHAT_NUMBER ? from.number : 0;
    int64_t j = to.type == CHAT_NUMBER ? to.number : n;
    bool numbers = from.type == CHAT_NUMBER || (slice && from.type == CHAT_NONE);
    numbers = numbers && (to.type == CHAT_NUMBER || to.type == CHAT_NONE);
    if (of.type != CHAT_LIST || !numbers) {
        chat_refuse(run, "this use of [ ] is not followed here");
        return chat_nothing();
    }
    if (i < 0) i += n;
    if (j < 0) j += n;
    if (!slice) return i >= 0 && i < n ? of.items[i] : chat_nothing();
    i = i < 0 ? 0 : i > n ? n : i;
    j = j < i ? i : j > n ? n : j;
    return (chat_value){.type = CHAT_LIST, .items = of.items + i, .size = (size_t)(j - i)};
}

static chat_value chat_read_test(chat_rendering *run, chat_value v) {
    bool negated = chat_accept(run, "not"), yes = false;
    const chat_token *name = chat_expect_kind(run, CHAT_WORD);
    if (chat_is_word(name, "defined")) yes = v.type != CHAT_UNDEFINED;
    else if (chat_is_word(name, "undefined")) yes = v.type == CHAT_UNDEFINED;
    else if (chat_is_word(name, "none")) yes = v.type == CHAT_NONE;
    else if (chat_is_word(name, "string")) yes = v.type == CHAT_STRING;
    else if (chat_is_word(name, "mapping")) yes = v.type == CHAT_MESSAGE;
    else if (chat_is_word(name, "true")) yes = v.type == CHAT_BOOL && v.number;
    else if (chat_is_word(name, "false")) yes = v.type == CHAT_BOOL && !v.number;
    else chat_refuse_token(run, name);
    return chat_of_bool(yes != negated);
}

static chat_value chat_read_filter(chat_rendering *run, chat_value v) {
    const chat_token *name = chat_expect_kind(run, CHAT_WORD);
    bool trims = chat_is_word(name, "trim"),
         length = chat_is_word(name, "length") || chat_is_word(name, "count");
    if (chat_is_word(chat_peek(run), "(")) chat_refuse_token(run, chat_peek(run));
    if (run->unused) return chat_nothing();
    if (trims) {
        v = chat_text_of(run, v);
        chat_spend_on(run, v.size);
        retrofit_strip(&v.bytes, &v.size);
        return v;
    }
    if (length && v.type == CHAT_LIST) return chat_of_number(run, (int64_t)v.size);
    chat_refuse_token(run, name);
    return chat_nothing();
}

// A value with all that is behind it: .name [i] (argument) | filter, is test
static chat_value chat_read_operand(chat_rendering *run) {
    const chat_token *name = chat_peek(run);
    bool minus = chat_accept(run, "-");
    chat_value v = chat_read_primary(run);
    for (;;) {
        if (chat_accept(run, "(")) v = chat_read_call(run, v, name);
        else if (chat_accept(run, "[")) v = chat_read_subscript(run, v);
        else if (chat_accept(run, ".")) {
            name = chat_expect_kind(run, CHAT_WORD);
            if (v.type == CHAT_STRING) chat_expect(run, "(");
            if (v.type == CHAT_STRING) v = chat_read_call(run, v, name);
            else if (!run->unused) v = chat_member(run, v, name);
        } else break;
    }
    if (minus && v.type != CHAT_NUMBER && !run->unused)
        chat_refuse(run, "- of this is not followed here");
    if (minus) v.number = -v.number;
    for (;;) {
        if (chat_accept(run, "|")) v = chat_read_filter(run, v);
        else if (chat_accept(run, "is")) v = chat_read_test(run, v);
        else return v;
    }
}

static chat_value chat_is_in(chat_rendering *run, chat_value part, chat_value whole) {
    bool found = false;
    chat_spend_on(run, whole.type == CHAT_STRING ? whole.size : 0);
    if (part.type == CHAT_STRING && whole.type == CHAT_STRING)
        found = memmem(whole.bytes, whole.size, part.bytes, part.size);
    else if (part.type == CHAT_STRING && whole.type == CHAT_MESSAGE) {
        const chat_token name = {CHAT_WORD, part.bytes, part.size};
        found = chat_message_member(run, whole.message, &name).type != CHAT_UNDEFINED;
    } else if (whole.type == CHAT_LIST) {
        for (size_t i = 0; i < whole.size; i++)
            found = found || chat_are_equal(run, part, whole.items[i]);
    } else chat_refuse(run, "'in' is followed for texts, lists and messages only");
    return chat_of_bool(found);
}

// From what binds least: each level's operators. `not` stands between the second and the third.
enum { CHAT_COMPARISON = 2, CHAT_LEVELS = 6, CHAT_MAX_OPERATORS = 8 };
static const char *const chat_operators[CHAT_LEVELS][CHAT_MAX_OPERATORS] = {
    {"or"}, {"and"}, {"==", "!=", "<", ">", "<=", ">=", "in", "not"}, {"+", "-"}, {"~"}, {"%"},
};

static chat_value chat_apply(chat_rendering *run, const char *operator, chat_value a,
                             chat_value b) {
    bool numbers = a.type == CHAT_NUMBER && b.type == CHAT_NUMBER;
    if (!strcmp(operator, "or") || !strcmp(operator, "and")) return b;
    if (!strcmp(operator, "==")) return chat_of_bool(chat_are_equal(run, a, b));
    if (!strcmp(operator, "!=")) return chat_of_bool(!chat_are_equal(run, a, b));
    if (!strcmp(operator, "in")) return chat_is_in(run, a, b);
    if (!strcmp(operator, "not")) return chat_of_bool(!chat_is_true(chat_is_in(run, a, b)));
    if (*operator== '~') return chat_joined(run, chat_text_of(run, a), chat_text_of(run, b));
    if (*operator== '+' && a.type == CHAT_STRING && b.type == CHAT_STRING)
        return chat_joined(run, a, b);
    if (*operator== '+' && numbers) return chat_of_number(run, a.number + b.number);
    if (*operator== '-' && numbers) return chat_of_number(run, a.number - b.number);
    if (*operator== '%' && numbers && b.number> 0)
        return chat_of_number(run, (a.number % b.number + b.number) % b.number);
    if (*operator== '<' && numbers)
        return chat_of_bool(operator[1] ? a.number <= b.number : a.number<b.number);
    if (*operator== '>' && numbers)
        return chat_of_bool(operator[1] ? a.number >= b.number : a.number> b.number);
    chat_refuse(run, "'%s' of these is not followed here", operator);
    return chat_nothing();
}

static const char *chat_accept_operator(chat_rendering *run, size_t level) {
    for (size_t i = 0; i < CHAT_MAX_OPERATORS && chat_operators[level][i]; i++) {
        if (!chat_accept(run, chat_operators[level][i])) continue;
        if (!strcmp(chat_operators[level][i], "not")) chat_expect(run, "in");
        return chat_operators[level][i];
    }
    return NULL;
}

static chat_value chat_read_level(chat_rendering *run, size_t level) {
    if (level == CHAT_LEVELS) return chat_read_operand(run);
    if (level == CHAT_COMPARISON && chat_accept(run, "not")) {
        chat_enter(run);
        chat_value negated = chat_read_level(run, CHAT_COMPARISON);
        run->nesting--;
        return chat_of_bool(!chat_is_true(negated));
    }
    chat_value v = chat_read_level(run, level + 1);
    for (;;) {
        const char *operator= chat_accept_operator(run, level);
        if (!operator) return v;
        bool decided = (level == 0 && chat_is_true(v)) || (level == 1 && !chat_is_true(v));
        run->unused += decided;
        chat_value right = chat_read_level(run, level + 1);
        run->unused -= decided;
        if (run->unused) v = chat_nothing();
        else if (!decided) v = chat_apply(run, operator, v, right);
        if (level == CHAT_COMPARISON) return v; // a second one would be about all three
    }
}

static chat_value chat_read_expression(chat_rendering *run) {
    chat_enter(run);
    chat_value v = chat_read_level(run, 0);
    run->nesting--;
    return v;
}

// ---- Chat templates: statements ----------------------------------------------------------------

static const chat_token *chat_run_block(chat_rendering *run);

static void chat_write_out(chat_rendering *run, const char *bytes, size_t size) {
    if (run->output.size + size > CHAT_MAX_MEMORY) chat_too_much(run, "memory");
    retrofit_text_append(&run->output, bytes, size);
}

static void chat_skip_tag(chat_rendering *run) {
    while (chat_peek(run)->kind != CHAT_CLOSE && chat_peek(run)->kind != CHAT_END) chat_take(run);
    chat_take(run);
}

// The word behind {% that ends a block or begins the next part of one.
static bool chat_ends_block(const chat_token *word) {
    return chat_is_word(word, "elif") || chat_is_word(word, "else") ||
           (word->kind == CHAT_WORD && word->size > 3 && !memcmp(word->bytes, "end", 3));
}

// {% set name %} without a value has a block.
static bool chat_begins_block(const chat_token *word) {
    static const char *const words[] = {"if",         "for",  "macro", "call",       "filter",
                                        "generation", "with", "block", "autoescape", "trans"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (chat_is_word(word, words[i])) return true;
    return chat_is_word(word, "set") && word[1].kind == CHAT_WORD && word[2].kind == CHAT_CLOSE;
}

// Goes over what is not run, to the same word where run_block would end.
static const chat_token *chat_skip_block(chat_rendering *run) {
    for (size_t depth = 0; chat_peek(run)->kind != CHAT_END;) {
        if (chat_take(run)->kind != CHAT_STATEMENT) continue;
        const chat_token *word = chat_take(run);
        if (depth == 0 && chat_ends_block(word)) return word;
        if (chat_begins_block(word)) depth++;
        else if (chat_ends_block(word) && *word->bytes == 'e' && word->bytes[1] == 'n') depth--;
    }
    return chat_peek(run);
}

static void chat_run_if(chat_rendering *run) {
    bool done = false;
    const chat_token *word = NULL;
    do {
        bool last = word && chat_is_word(word, "else");
        bool chosen = !done && (last || chat_is_true(chat_read_expression(run)));
        if (done) chat_skip_tag(run);
        else chat_expect_kind(run, CHAT_CLOSE);
        done = done || chosen;
        word = chosen ? chat_run_block(run) : chat_skip_block(run);
        if (last && !chat_is_word(word, "endif")) chat_refuse_token(run, word);
    } while (chat_is_word(word, "elif") || chat_is_word(word, "else"));
    if (!chat_is_word(word, "endif")) chat_refuse_token(run, word);
    chat_expect_kind(run, CHAT_CLOSE);
}

static void chat_run_for(chat_rendering *run) {
    const chat_token *name = chat_expect_kind(run, CHAT_WORD), *word = NULL;
    chat_expect(run, "in");
    chat_value list = chat_read_expression(run);
    chat_expect_kind(run, CHAT_CLOSE);
    bool loops = list.type == CHAT_LIST || list.type == CHAT_UNDEFINED;
    if (!loops) chat_refuse(run, "a loop over this is not followed here");
    size_t body = run->at, index = run->loop_index, count = run->loop_count;
    size_t scope = run->scope;
    run->scope = run->variable_count;
    for (size_t i = 0; i < list.size && !*run->problem; i++) {
        run->at = body;
        run->loop_index = i;
        run->loop_count = list.size;
        run->variable_count = run->scope;
        chat_set_variable(run, name, list.items[i]);
        word = chat_run_block(run);
    }
    if (list.size == 0) word = chat_skip_block(run);
    run->variable_count = run->scope;
    run->scope = scope;
    run->loop_index = index;
    run->loop_count = count;
    if (word && !chat_is_word(word, "endfor")) chat_refuse_token(run, word);
    chat_expect_kind(run, CHAT_CLOSE);
}

// What training marks as the model's own.
static void chat_run_generation(chat_rendering *run) {
    size_t scope = run->scope, mark[2] = {run->output.size};
    chat_expect_kind(run, CHAT_CLOSE);
    run->scope = run->variable_count;
    const chat_token *word = chat_run_block(run);
    mark[1] = run->output.size;
    retrofit_text_append(&run->marks, mark, sizeof mark);
    run->variable_count = run->scope;
    run->scope = scope;
    if (!chat_is_word(word, "endgeneration")) chat_refuse_token(run, word);
    chat_expect_kind(run, CHAT_CLOSE);
}

static void chat_run_set(chat_rendering *run) {
    const chat_token *name = chat_expect_kind(run, CHAT_WORD);
    chat_expect(run, "=");
    chat_set_variable(run, name, chat_read_expression(run));
    chat_expect_kind(run, CHAT_CLOSE);
}

// Runs the template to a word that belongs to the block around it, which it returns, or to the end.
static const chat_token *chat_run_block(chat_rendering *run) {
    chat_enter(run);
    const chat_token *word;
    for (;;) {
        const chat_token *token = chat_take(run);
        word = token->kind == CHAT_STATEMENT ? chat_take(run) : token;
        if (token->kind == CHAT_TEXT) chat_write_out(run, token->bytes, token->size);
        else if (token->kind == CHAT_OUTPUT) {
            chat_value text = chat_text_of(run, chat_read_expression(run));
            chat_write_out(run, text.bytes, text.size);
            chat_expect_kind(run, CHAT_CLOSE);
        } else if (chat_is_word(word, "if")) chat_run_if(run);
        else if (chat_is_word(word, "for")) chat_run_for(run);
        else if (chat_is_word(word, "set")) chat_run_set(run);
        else if (chat_is_word(word, "generation")) chat_run_generation(run);
        else break;
    }
    run->nesting--;
    return word;
}

// ---- Chat templates: the model's ---------------------------------------------------------------

static void chat_define(chat_rendering *run, const char *name, chat_value value) {
    chat_set_variable(run, &(chat_token){CHAT_WORD, name, strlen(name)}, value);
}

static void chat_define_all(chat_rendering *run, const retrofit_message *messages, size_t count,
                            bool prompt) {
    chat_value *items = chat_memory(run, count * sizeof *items), none = {.type = CHAT_NONE};
    for (size_t i = 0; items && i < count; i++)
        items[i] = (chat_value){.type = CHAT_MESSAGE, .message = &messages[i]};
    chat_define(run, "messages", (chat_value){.type = CHAT_LIST, .items = items, .size = count});
    chat_define(run, "add_generation_prompt", chat_of_bool(prompt));
    chat_define(run, "tools", none);
    chat_define(run, "documents", none);
}

bool retrofit_chat_render(const retrofit_chat *chat, const retrofit_message *messages, size_t count,
                          bool prompt, retrofit_text *text, retrofit_text *marks) {
    chat_rendering run = {.chat = chat};
    chat_define_all(&run, messages, count, prompt);
    chat_write_out(&run, "", 0); // so that there are bytes even if there is no text
    const chat_token *end = chat_run_block(&run);
    if (end->kind != CHAT_END) chat_refuse_token(&run, end);
    while (run.memory) {
        chat_block *block = run.memory;
        run.memory = block->next;
        free(block);
    }
    bool ok = !*run.problem && !run.output.failed && !run.marks.failed;
    if (!ok || !marks) free(run.marks.bytes);
    if (!ok) free(run.output.bytes);
    *text = ok ? run.output : (retrofit_text){0};
    if (marks) *marks = ok ? run.marks : (retrofit_text){0};
    if (ok) return true;
    return *run.problem && retrofit_fail("%s: chat template: %s", chat->where, run.problem);
}

// Copies of messages, each with a mark \1number\1 at the end of its content. NULL or error.
static retrofit_message *chat_mark_messages(const retrofit_message *messages, size_t count) {
    enum { MARK = 32 };
    size_t size = 0;
    for (size_t i = 0; i < count; i++) size += messages[i].size + MARK;
    retrofit_message *marked = retrofit_allocate(1, count * sizeof *marked + size);
    if (!marked) return NULL;
    char *content = (char *)(marked + count);
    for (size_t i = 0; i < count; i++) {
        marked[i] = messages[i];
        marked[i].content = content;
        memcpy(content, messages[i].content, messages[i].size);
        content += messages[i].size;
        marked[i].size += (size_t)snprintf(content, MARK, "\1%zu\1", i);
        content += MARK;
    }
    return marked;
}

// Whether each mark is in the text. false or error.
static bool chat_check_marks(const retrofit_chat *chat, const retrofit_message *messages,
                             const retrofit_message *marked, size_t count, retrofit_text text) {
    const char *end = text.bytes + text.size, *found = text.bytes; // where the mark before is
    for (size_t i = 0; i < count; i++) {
        const char *mark = marked[i].content + messages[i].size;
        size_t size = marked[i].size - messages[i].size;
        found = memmem(found, (size_t)(end - found), mark, size); // mostly they come in order
        if (!found) found = memmem(text.bytes, text.size, mark, size);
        if (!found)
            return retrofit_fail("%s: chat template: it writes nothing of a message of the role "
                                 "\"%s\"", chat->where, messages[i].role);
    }
    return true;
}

// A template may pass over a message, for its role mostly, of which nobody would hear: so it writes
// them all once more, each with a mark, for a check.
bool retrofit_chat_write(const retrofit_chat *chat, const retrofit_message *messages, size_t count,
                         bool prompt, retrofit_text *text, retrofit_text *marks) {
    *text = (retrofit_text){0};
    if (marks) *marks = (retrofit_text){0};
    retrofit_message *marked = chat_mark_messages(messages, count);
    if (!marked) return false;
    bool ok = retrofit_chat_render(chat, marked, count, prompt, text, NULL);
    if (ok) ok = chat_check_marks(chat, messages, marked, count, *text);
    free(text->bytes);
    free(marked);
    *text = (retrofit_text){0};
    return ok && retrofit_chat_render(chat, messages, count, prompt, text, marks);
}

// ---- Chat templates: loading -------------------------------------------------------------------

// tokenizer_config.json has one template or a list of named ones, of which "default" counts: its
// value, or NULL. false or error.
static bool chat_find_template(retrofit_chat *chat, const retrofit_json **found) {
    const retrofit_json *entry = retrofit_json_get(chat->config, "chat_template");
    *found = entry && entry->type == RETROFIT_JSON_NULL ? NULL : entry;
    if (entry && entry->type == RETROFIT_JSON_ARRAY) {
        *found = NULL;
        for (entry = entry->child; entry; entry = entry->next)
            if (retrofit_json_is(retrofit_json_get(entry, "name"), "default"))
                *found = retrofit_json_get(entry, "template");
        if (!*found)
            return retrofit_fail("%s: none of its chat templates is named \"default\"",
                                 chat->where);
    }
    if (!*found || (*found)->type == RETROFIT_JSON_STRING) return true;
    return retrofit_fail("%s: chat_template is no text", chat->where);
}

// The template as it lies in the directory. Where several do, the order is that of transformers.
// false or error, also where there is none.
static bool chat_read_file(retrofit_chat *chat, const char *directory, size_t *size) {
    static const char *const files[] = {"additional_chat_templates/default.jinja",
                                        "chat_template.jinja"};
    char path[RETROFIT_PATH];
    for (size_t i = 0; i < 2; i++) {
        if (!retrofit_path(chat->where, directory, files[i])) return false;
        if (!retrofit_is_there(chat->where)) continue;
        chat->text = retrofit_read_file(chat->where, size);
        return chat->text;
    }
    if (!retrofit_path(path, directory, "additional_chat_templates")) return false;
    if (retrofit_is_there(path))
        return retrofit_fail("%s: without a chat_template.jinja beside it, it does not say which "
                             "chat template is for chats", path);
    const retrofit_json *found = NULL;
    if (!retrofit_path(chat->where, directory, "tokenizer_config.json")) return false;
    if (chat->config && !chat_find_template(chat, &found)) return false;
    if (!found)
        return retrofit_fail("%s: no chat template, neither chat_template.jinja nor chat_template "
                             "in tokenizer_config.json: a base model", directory);
    *size = found->length;
    chat->text = retrofit_allocate(found->length + 1, 1);
    if (chat->text) memcpy(chat->text, found->string, found->length);
    return chat->text;
}

static bool chat_load(retrofit_chat *chat, const char *directory) {
    char path[RETROFIT_PATH];
    size_t size = 0, kept = 0;
    if (!retrofit_path(path, directory, "tokenizer_config.json")) return false;
    if (retrofit_is_there(path)) {
        chat->config = retrofit_json_read(path, NULL);
        if (!chat->config) return false;
    }
    if (!chat_read_file(chat, directory, &size)) return false;
    if (retrofit_find_invalid(chat->text, 0, size) < size)
        return retrofit_fail("%s: the chat template is not UTF-8", chat->where);

    // Jinja reads \r\n and \r as \n, and drops one at the end.
    for (size_t i = 0; i < size; i++) {
        char c = chat->text[i];
        if (c == '\r' && chat->text[i + 1] == '\n') continue;
        chat->text[kept++] = c == '\r' ? '\n' : c;
    }
    if (kept > 0 && chat->text[kept - 1] == '\n') kept--;
    chat->text[kept] = 0;
    return chat_read_tokens(chat, chat->text + kept);
}

retrofit_chat *retrofit_chat_load(const char *directory, const retrofit_tokenizer *tokenizer) {
    retrofit_chat *chat = retrofit_allocate(1, sizeof *chat);
    if (!chat) return NULL;
    chat->tokenizer = tokenizer;
    chat->now = time(NULL);
    if (chat_load(chat, directory)) return chat;
    retrofit_chat_free(chat);
    return NULL;
}

void retrofit_chat_free(retrofit_chat *chat) {
    if (!chat) return;
    free(chat->text);
    free(chat->tokens.bytes);
    retrofit_json_free(chat->config);
    free(chat);
}

const char *retrofit_chat_where(const retrofit_chat *chat) { return chat->where; }

bool retrofit_chat_has_marks(const retrofit_chat *chat) {
    const chat_token *tokens = (const void *)chat->tokens.bytes;
    for (size_t i = 0; tokens[i].kind != CHAT_END; i++)
        if (tokens[i].kind == CHAT_STATEMENT && chat_is_word(&tokens[i + 1], "generation"))
            return true;
    return false;
}

// =================================================================================================
// 12  Errors, files, random numbers, command lines
// =================================================================================================

// ---- Errors ------------------------------------------------------------------------------------

static RETROFIT_THREAD_LOCAL char error_text[1024];

const char *retrofit_error(void) { return error_text; }

bool retrofit_machine_failed(void) {
    return errno == ENOMEM || errno == EMFILE || errno == ENFILE || errno == EIO;
}

// Latin-1's control characters are c2 80 … c2 9f in UTF-8.
void retrofit_make_line(char *text) {
    for (unsigned char *c = (unsigned char *)text; *c; c++) {
        if (*c < ' ' || *c == 127) *c = '?';
        if (*c == 0xc2 && c[1] >= 0x80 && c[1] < 0xa0) memset(c, '?', 2);
    }
}

bool retrofit_silent;

void retrofit_say(const char *who, char *text) {
    if (retrofit_silent) return;
    retrofit_make_line(text);
    retrofit_live_line(NULL);
    fprintf(stderr, "%s: %s\n", who, text);
}

static void format_line(char line[1024], const char *format, va_list args) {
    vsnprintf(line, 1024, format, args);
    retrofit_make_line(line);
}

static void record_error(const char *format, va_list args) {
    char line[1024]; // the arguments may be the error before
    format_line(line, format, args);
    memcpy(error_text, line, sizeof error_text);
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

// The lines that were said are known by their hashes; behind the 256th a line may be said again.
void retrofit_note(const char *format, ...) {
    static RETROFIT_THREAD_LOCAL uint64_t said[256];
    static RETROFIT_THREAD_LOCAL size_t count;
    char line[1024];
    va_list args;
    va_start(args, format);
    format_line(line, format, args);
    va_end(args);
    uint64_t hash = retrofit_hash_bytes(RETROFIT_HASH_START, line, strlen(line));
    size_t i = 0;
    while (i < count && said[i] != hash) i++;
    if (i < count) return;
    retrofit_say("note", line);
    if (count < sizeof said / sizeof *said) said[count++] = hash;
}

// A terminal that can go back to the beginning of its line.
static bool has_live_lines(void) {
    const char *kind = getenv("TERM");
    return isatty(STDERR_FILENO) && !(kind && !strcmp(kind, "dumb"));
}

// How many bytes of text fit into so many columns. East Asian characters, and with them all above
// U+10FF but punctuation and symbols, are counted as two wide.
static size_t clip_to_columns(const char *text, size_t columns) {
    size_t size = strlen(text), at = 0;
    while (at < size) {
        uint32_t c;
        size_t n = retrofit_utf8_next(text + at, size - at, &c);
        size_t width = c < 0x1100 || (c >= 0x2000 && c < 0x2e80) ? 1 : 2;
        if (width > columns) break;
        columns -= width;
        at += n;
    }
    return at;
}

// The last column stays free: what stands in it makes some terminals begin a new line. A terminal
// that does not say how wide it is has 80, as most do.
size_t retrofit_live_columns(void) {
    struct winsize window;
    if (!has_live_lines()) return SIZE_MAX;
    bool known = !ioctl(STDERR_FILENO, TIOCGWINSZ, &window) && window.ws_col > 0;
    return known ? window.ws_col - 1u : 79;
}

void retrofit_live_line(const char *text) {
    if (retrofit_silent) return;
    static volatile sig_atomic_t shown;
    static const char erase[] = "\r\033[K";
    if (!text) {
        bool erased = !shown || write(STDERR_FILENO, erase, sizeof erase - 1) > 0;
        shown = !erased;
        return;
    }
    size_t columns = retrofit_live_columns();
    if (columns == SIZE_MAX) {
        fprintf(stderr, "%s\n", text);
        return;
    }
    size_t size = clip_to_columns(text, columns);
    shown = true;
    fprintf(stderr, "\r%.*s\033[K", (int)size, text);
}

bool retrofit_live_line_due(void) {
    static double last;
    double now = retrofit_seconds();
    if (last == 0) last = now;
    if (now - last < (has_live_lines() ? 0.2 : 2)) return false;
    last = now;
    return true;
}

bool retrofit_shows_shares;

void retrofit_show_share(size_t done, size_t total, const char *format, ...) {
    if (!retrofit_shows_shares) return;
    if (done == total) retrofit_live_line(NULL);
    if (done == total || !retrofit_live_line_due()) return;
    char what[1024], line[1088];
    va_list args;
    va_start(args, format);
    format_line(what, format, args);
    va_end(args);
    snprintf(line, sizeof line, "%.0f %% of %s", 100 * (double)done / (double)total, what);
    retrofit_live_line(line);
}

void *retrofit_allocate(size_t count, size_t size) {
    if (size > 0 && count > SIZE_MAX / size)
        return fail_null("a size of %zu x %zu bytes overflows", count, size);
    void *memory = calloc(retrofit_max(count, 1), retrofit_max(size, 1));
    if (!memory) return fail_null("out of memory: %zu bytes", retrofit_max(count * size, 1));
    return memory;
}

void *retrofit_reallocate(void *memory, size_t count, size_t size) {
    if (size > 0 && count > SIZE_MAX / size)
        return fail_null("a size of %zu x %zu bytes overflows", count, size);
    void *bigger = realloc(memory, retrofit_max(count * size, 1));
    if (!bigger) return fail_null("out of memory: %zu bytes", retrofit_max(count * size, 1));
    return bigger;
}

char *retrofit_copy_string(const char *string) {
    size_t size = strlen(string) + 1;
    char *copy = retrofit_reallocate(NULL, size, 1);
    return copy ? memcpy(copy, string, size) : NULL;
}

bool retrofit_flush_stdout(void) {
    errno = 0;
    bool failed = fflush(stdout) || ferror(stdout);
    if (!failed) return true;
    int flags = fcntl(STDOUT_FILENO, F_GETFL), error = errno ? errno : EIO;
    bool closed = flags < 0 || (flags & O_ACCMODE) == O_RDONLY;
    return retrofit_fail("writing to stdout failed: %s", closed ? "it is closed" : strerror(error));
}

// ---- Files and directories ---------------------------------------------------------------------

bool retrofit_path(char path[RETROFIT_PATH], const char *directory, const char *name) {
    int length = snprintf(path, RETROFIT_PATH, "%s/%s", directory, name);
    if (length > 0 && length < RETROFIT_PATH) return true;
    return retrofit_fail("%.60s…: a path longer than %d bytes", directory, RETROFIT_PATH - 1);
}

// What Git LFS leaves in place of a large file until it has fetched it: some lines of text.
static bool is_lfs_pointer(FILE *file, size_t size) {
    static const char begin[] = "version https://git-lfs.github.com/spec/";
    char text[sizeof begin] = {0};
    if (size < sizeof begin || size > 1024) return false;
    bool read = fread(text, 1, sizeof begin - 1, file) == sizeof begin - 1;
    return read && !strcmp(text, begin);
}

FILE *retrofit_open_file(const char *path, size_t *size) {
    struct stat status;
    bool pipe = stat(path, &status) == 0 && S_ISFIFO(status.st_mode); // opening one may wait
    FILE *file = pipe ? NULL : fopen(path, "rbe");
    if (pipe) return fail_null("%s: not a regular file", path);
    if (!file) return fail_null("%s: %s", path, strerror(errno));
    bool regular = fstat(fileno(file), &status) == 0 && S_ISREG(status.st_mode);
    *size = regular ? (size_t)status.st_size : 0;
    bool pointer = regular && is_lfs_pointer(file, *size);
    if (regular && !pointer && !fseek(file, 0, SEEK_SET)) return file;
    int problem = errno;
    fclose(file);
    if (pointer)
        return fail_null("%s: a Git LFS pointer, not the file itself: fetch it with git lfs pull",
                         path);
    return fail_null("%s: %s", path, regular ? strerror(problem) : "not a regular file");
}

char *retrofit_read_file(const char *path, size_t *size) {
    FILE *file = retrofit_open_file(path, size);
    if (!file) return NULL;
    char *text = retrofit_allocate(*size + 1, 1);
    bool ok = text != NULL;
    if (ok && fread(text, 1, *size, file) != *size)
        ok = retrofit_fail("%s: reading failed, or it became shorter", path);
    fclose(file);
    if (ok) return text;
    free(text);
    return NULL;
}

void *retrofit_map_file(const char *path, size_t *size) {
    FILE *file = retrofit_open_file(path, size);
    if (!file) return NULL;
    if (*size == 0) {
        fclose(file);
        return fail_null("%s: is empty", path);
    }
    void *base = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, fileno(file), 0);
    if (base == MAP_FAILED)
        base = fail_null("%s: mapping its %zu bytes failed: %s", path, *size, strerror(errno));
    fclose(file);
    return base;
}

// A page that holds other data too, at either end, stays.
void retrofit_release_pages(const void *data, size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), start = (size_t)data;
    size_t first = (start + page - 1) / page * page, end = (start + bytes) / page * page;
    if (first < end) madvise((void *)first, end - first, MADV_DONTNEED);
}

// FNV-1a over words of 8 bytes. hash ^= hash >> 32 follows each word, since a product only carries
// upwards: a change of a word's high bits would otherwise never reach the low ones.
uint64_t retrofit_hash_bytes(uint64_t hash, const char *data, size_t size) {
    for (size_t i = 0; i < size; i += 8) {
        uint64_t word = 0;
        memcpy(&word, data + i, size - i < 8 ? size - i : 8);
        hash = (hash ^ word) * 0x100000001b3;
        hash ^= hash >> 32;
    }
    return hash;
}

uint64_t retrofit_sample_hash(const void *data, size_t size) {
    enum { ALL = 1 << 20, PARTS = 64, SAMPLE = 1 << 16 };
    const char *bytes = data;
    uint64_t hash = retrofit_hash_bytes(RETROFIT_HASH_START, (const char *)&size, sizeof size);
    if (size <= ALL) return retrofit_hash_bytes(hash, bytes, size);
    size_t step = (size - SAMPLE) / PARTS; // the last sample ends where the data end
    for (size_t i = 0; i <= PARTS; i++) {
        size_t begin = i < PARTS ? i * step : size - SAMPLE;
        hash = retrofit_hash_bytes(hash, bytes + begin, retrofit_min(SAMPLE, size - begin));
    }
    return hash;
}

bool retrofit_is_there(const char *path) {
    struct stat status;
    return !lstat(path, &status) || (errno != ENOENT && errno != ENOTDIR);
}

// Whether a directory has something of this name.
static bool has_entry(const char *directory, const char *name) {
    char path[RETROFIT_PATH];
    return retrofit_path(path, directory, name) && retrofit_is_there(path);
}

// What train makes, before it saves for the first time: a log, but no model.
static bool is_run_without_checkpoint(const char *directory) {
    bool model = has_entry(directory, "config.json") || has_entry(directory, "tokenizer.json");
    return !model && !has_entry(directory, "latest") && has_entry(directory, "log.jsonl");
}

bool retrofit_check_directory(const char *path) {
    struct stat status;
    if (stat(path, &status))
        return retrofit_fail("%s: %s: a model is a directory here; download it first (for example "
                             "hf download NAME --local-dir DIR)", path, strerror(errno));
    if (S_ISDIR(status.st_mode) && is_run_without_checkpoint(path))
        return retrofit_fail("%s: a training run that has no checkpoint yet: wait for its first "
                             "(at --save-every, or at its end), or end it with Ctrl-C, which saves",
                             path);
    if (S_ISDIR(status.st_mode)) return true;
    return retrofit_fail("%s: a file, not a model's directory: name the directory; a GGUF is made "
                         "one by convert --from FILE --to DIR", path);
}

// A regular file is made beside its final place, so that the directory must be writable.
bool retrofit_check_writable(const char *path) {
    char parent[RETROFIT_PATH];
    struct stat status;
    if (strlen(path) >= sizeof parent)
        return retrofit_fail("%.60s…: a path longer than %d bytes", path, RETROFIT_PATH - 1);
    bool there = stat(path, &status) == 0;
    if (there && S_ISDIR(status.st_mode)) return retrofit_fail("%s: is a directory", path);
    if (there && access(path, W_OK)) return retrofit_fail("%s: %s", path, strerror(errno));
    if (there && !S_ISREG(status.st_mode)) return true;
    if (!there || !realpath(path, parent)) strcpy(parent, path);
    retrofit_parent_directory(parent);
    if (stat(parent, &status) == 0 && !S_ISDIR(status.st_mode)) errno = ENOTDIR;
    else if (access(parent, W_OK | X_OK) == 0) return true;
    return retrofit_fail("%s: %s", path, strerror(errno));
}

bool retrofit_finish_file(FILE *file, const char *path, bool ok) {
    ok = ok && !ferror(file) && !fflush(file);
    ok = ok && (!fsync(fileno(file)) || errno == EINVAL); // which a pipe answers
    int problem = errno;
    if (fclose(file) && ok) {
        ok = false;
        problem = errno;
    }
    if (ok) return true;
    struct stat status; // a device, /dev/full say, is not ours to remove
    if (lstat(path, &status) || S_ISREG(status.st_mode)) remove(path);
    return retrofit_fail("%s: writing failed: %s", path, strerror(problem ? problem : EIO));
}

bool retrofit_sync_directory(const char *path) {
    int descriptor = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool ok = descriptor >= 0 && fsync(descriptor) == 0;
    if (!ok) retrofit_fail("%s: %s", path, strerror(errno));
    if (descriptor >= 0) close(descriptor);
    return ok;
}

void retrofit_parent_directory(char *path) {
    char *slash = strrchr(path, '/');
    if (slash == path) slash[1] = 0; // the root
    else if (slash) slash[0] = 0;
    else strcpy(path, ".");
}

bool retrofit_same_file(const char *a, const char *b) {
    struct stat x, y;
    return !stat(a, &x) && !stat(b, &y) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

// Cuts the path behind each of its names in turn, makes that directory, and mends the cut.
bool retrofit_make_directories(char *path, bool fresh) {
    if (!*path) return retrofit_fail("'' is no name for a directory");
    char *end = path;
    bool ok = true;
    while (ok && *end) {
        end += 1 + strcspn(end + 1, "/");
        char next = *end;
        *end = 0;
        bool may_exist = next != 0 || !fresh;
        if (mkdir(path, 0777) && !(errno == EEXIST && may_exist))
            ok = retrofit_fail("%s: %s", path, strerror(errno));
        *end = next;
    }
    return ok;
}

double retrofit_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---- Types of elements -------------------------------------------------------------------------
//                  sign   exponent   mantissa
//     F32          1      8          23
//     BF16         1      8           7           the upper half of an F32
//     F16          1      5          10           (1024 + mantissa)·2^(exponent - 25); exponent 0:
//                                                 mantissa·2^-24; exponent 31: infinity and NaN

size_t retrofit_type_size(retrofit_type type) {
    if (type == RETROFIT_F64) return 8;
    return type == RETROFIT_F32 || type == RETROFIT_I32 ? 4 : 2;
}

float retrofit_bf16_to_float(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// Adding half of the last place that is kept, less one bit if that place is even, rounds to nearest
// even. A NaN gets a mantissa bit that survives.
uint16_t retrofit_float_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The bits, where an F32 has them, are those of a number that is 2^112 times too small, since an
// exponent of 15 there means what 127 does here: subnormal numbers too. No product is rounded.
float retrofit_f16_to_float(uint16_t x) {
    uint32_t bits = (uint32_t)(x & 0x7fff) << 13, sign = (uint32_t)(x & 0x8000) << 16;
    float f;
    memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    if (bits >= 31u << 23) f = bits == 31u << 23 ? INFINITY : NAN;
    memcpy(&bits, &f, 4);
    bits |= sign;
    memcpy(&f, &bits, 4);
    return f;
}

void retrofit_to_float(float *out, const void *data, retrofit_type type, size_t n) {
    if (type == RETROFIT_F32) {
        memcpy(out, data, n * sizeof(float));
        return;
    }
    for (size_t i = 0; i < n && type == RETROFIT_F64; i++) {
        double x;
        memcpy(&x, (const char *)data + 8 * i, 8);
        out[i] = (float)x;
    }
    for (size_t i = 0; i < n && type != RETROFIT_F64; i++) {
        uint16_t x;
        memcpy(&x, (const char *)data + 2 * i, 2); // the address may be odd
        out[i] = type == RETROFIT_BF16 ? retrofit_bf16_to_float(x) : retrofit_f16_to_float(x);
    }
}

// ---- Random numbers: PyTorch's CPU generator, because the authors' draws come from it ----------

static void mt19937_seed(mt19937 *generator, uint32_t seed) {
    uint32_t *state = generator->state;
    state[0] = seed;
    for (uint32_t i = 1; i < 624; i++)
        state[i] = 1812433253u * (state[i - 1] ^ state[i - 1] >> 30) + i;
    generator->next = 0;
}

// Renews one word of the state when it is needed: most draws need few of the 624.
static uint32_t mt19937_next(mt19937 *generator) {
    uint32_t *state = generator->state;
    size_t i = generator->next, next = (i + 1) % 624;
    uint32_t y = (state[i] & 0x80000000u) | (state[next] & 0x7fffffffu);
    y = state[(i + 397) % 624] ^ y >> 1 ^ (y & 1 ? 0x9908b0dfu : 0);
    state[i] = y;
    generator->next = next;
    y ^= y >> 11;
    y ^= y << 7 & 0x9d2c5680u;
    y ^= y << 15 & 0xefc60000u;
    return y ^ y >> 18;
}

// Two outputs, the first one high, make 64 bits. The low 53 of them times 2^-53 lie in [0, 1).
static double mt19937_uniform(mt19937 *generator) {
    uint64_t high = mt19937_next(generator);
    uint64_t low = mt19937_next(generator);
    return (double)((high << 32 | low) & ((1ull << 53) - 1)) * 0x1p-53;
}

// Box and Muller: √(-2·log(1 - u_2))·cos(2π·u_1). PyTorch keeps the sine for a second number, but
// here a generator draws only one.
static double mt19937_normal(mt19937 *generator) {
    double u1 = mt19937_uniform(generator);
    double u2 = mt19937_uniform(generator);
    return sqrt(-2 * log1p(-u2)) * cos(2 * 3.14159265358979323846 * u1);
}

// Knuth: how many uniforms can be multiplied before the product falls to e^-λ or below.
static size_t poisson_by_product(mt19937 *generator, double rate) {
    double limit = exp(-rate), product = mt19937_uniform(generator);
    size_t k = 0;
    for (; product > limit; k++) product *= mt19937_uniform(generator);
    return k;
}

// Hörmann's transformed rejection (PTRS, 1993). Of uniforms u in [-1/2, 1/2) and v in [0, 1),
//
//     k = ⌊(2a/u_s + b)·u + λ + 0.43⌋    u_s = 1/2 - |u|
//
// is accepted if v/α ≤ (a/u_s² + b)·e^-λ·λ^k/k!. Two comparisons mostly spare the logarithms.
static size_t poisson_by_rejection(mt19937 *generator, double rate) {
    double b = 0.931 + 2.53 * sqrt(rate), a = -0.059 + 0.02483 * b, log_rate = log(rate);
    double inverse_alpha = 1.1239 + 1.1328 / (b - 3.4), v_r = 0.9277 - 3.6224 / (b - 2);
    for (;;) {
        double u = mt19937_uniform(generator) - 0.5;
        double v = mt19937_uniform(generator);
        double us = 0.5 - fabs(u);
        double k = floor((2 * a / us + b) * u + rate + 0.43);
        if (us >= 0.07 && v <= v_r) return (size_t)k;
        if (k < 0 || (us < 0.013 && v > us)) continue;
        double left = log(v) + log(inverse_alpha) - log(a / (us * us) + b);
        if (left <= -rate + k * log_rate - lgamma(k + 1)) return (size_t)k;
    }
}

// As PyTorch draws it.
static size_t mt19937_poisson(mt19937 *generator, double rate) {
    if (rate < 10) return poisson_by_product(generator, rate);
    return poisson_by_rejection(generator, rate);
}

// ---- Command lines -----------------------------------------------------------------------------

bool retrofit_sizes(const char *text, size_t *out, size_t max, size_t *count) {
    *count = 0;
    for (char *end;; text = end + 1) {
        unsigned long long n = strtoull(text, &end, 10);
        bool digit = *text >= '0' && *text <= '9';
        bool separated = *end == 0 || *end == ',';
        if (!digit || n == 0 || n > 1 << 20 || !separated)
            return retrofit_fail("'%s' is not a list of positive numbers like 1,2,4", text);
        if (*count == max) return retrofit_fail("a list of more than %zu numbers", max);
        out[(*count)++] = (size_t)n;
        if (*end == 0) return true;
    }
}

static bool read_option_size(const retrofit_option *option, const char *text) {
    char *end;
    errno = 0;
    *(size_t *)option->value = (size_t)strtoull(text, &end, 10);
    if (*text >= '0' && *text <= '9' && *end == 0 && errno == 0) return true;
    return retrofit_fail("--%s needs a whole number, not '%s'", option->name, text);
}

static bool read_option_real(const retrofit_option *option, const char *text) {
    char *end;
    double x = strtod(text, &end);
    *(double *)option->value = x;
    if (*text && *end == 0 && isfinite(x)) return true;
    return retrofit_fail("--%s needs a number, not '%s'", option->name, text);
}

static bool read_option_choice(const retrofit_option *option, const char *text) {
    int first = option->type == RETROFIT_SWITCH ? 2 : 0;
    const char *choice = option->argument;
    for (int i = 0;; i++) {
        size_t length = strcspn(choice, "|");
        if (strlen(text) == length && !strncmp(choice, text, length)) {
            *(int *)option->value = first + i;
            return true;
        }
        if (choice[length] == 0) break;
        choice += length + 1;
    }
    return retrofit_fail("--%s is one of %s, not '%s'", option->name, option->argument, text);
}

// text: the value; NULL if there is none.
static bool read_option(const retrofit_option *option, const char *text) {
    if (option->type == RETROFIT_FLAG) {
        if (text) return retrofit_fail("--%s takes no value", option->name);
        *(bool *)option->value = true;
        return true;
    }
    if (option->type == RETROFIT_SWITCH && !text) {
        *(int *)option->value = 1;
        return true;
    }
    if (option->type == RETROFIT_MAYBE) {
        *(const char **)option->value = text ? text : "";
        return true;
    }
    if (!text) return retrofit_fail("--%s needs a value", option->name);
    if (option->type == RETROFIT_SIZE) return read_option_size(option, text);
    if (option->type == RETROFIT_REAL) return read_option_real(option, text);
    if (option->type != RETROFIT_STRING) return read_option_choice(option, text);
    *(const char **)option->value = text;
    return true;
}

enum { HELP_COLUMN = 36 }; // where the explanations begin

static void print_options(const retrofit_option *table, size_t count, const char *usage) {
    printf("%s", usage);
    for (size_t i = 0; i < count; i++) {
        const retrofit_option *option = &table[i];
        if (option->type == RETROFIT_HEADING) {
            printf("\n%s\n", option->name);
            continue;
        }
        const char *argument = option->argument ? option->argument : "";
        const char *shape = "  --%s %s";
        if (option->type == RETROFIT_SWITCH) shape = "  --%s[=%s]";
        if (option->type == RETROFIT_MAYBE) shape = "  --%s [%s]";
        int width = printf(shape, option->name, argument);
        if (width > HELP_COLUMN - 2) {
            printf("\n");
            width = 0;
        }
        printf("%*s%s\n", HELP_COLUMN - width, "", option->help);
    }
    printf("\n%-*s%s\n", HELP_COLUMN, "  --help, --version", "this text; what this program is");
}

// What a report of a fault should say.
static void print_version(const char *program) {
#ifdef _OPENMP
    const char *threads = "threads";
#else
    const char *threads = "one thread";
#endif
#ifdef RETROFIT_CUDA
    const char *gpu = "for CPU and GPU";
#else
    const char *gpu = "for CPUs";
#endif
#ifdef __clang__
    const char *compiler = ""; // __VERSION__ names it
#else
    const char *compiler = "gcc ";
#endif
    printf("%s of retrofit %s, %s, %s, compiled by %s%s\n", program, RETROFIT_VERSION, gpu, threads,
           compiler, __VERSION__);
}

// name: up to "=" or the end.
static const retrofit_option *find_option(const retrofit_option *table, size_t count,
                                          const char *name) {
    size_t length = strcspn(name, "=");
    for (size_t i = 0; i < count; i++) {
        const retrofit_option *option = &table[i];
        if (option->type == RETROFIT_HEADING || strlen(option->name) != length) continue;
        if (!strncmp(option->name, name, length)) return option;
    }
    return NULL;
}

// How many mistakes make the one name of the other: letters that are missing, added or others, and
// neighbours that changed places (the Damerau-Levenshtein distance, where no part is edited twice).
// The missing end of an abbreviation is one mistake. `length` letters of `typed` count.
static size_t count_mistakes(const char *typed, size_t length, const char *name) {
    enum { MAX = 32 };
    size_t n = strlen(name), rows[3][MAX + 1]; // row i, modulo 3: of the first i letters of `typed`
    if (length > MAX || n > MAX) return MAX;
    if (length > 0 && length < n && !strncmp(typed, name, length)) return 1;
    for (size_t i = 0; i <= length; i++) {
        size_t *row = rows[i % 3];
        const size_t *before = rows[(i + 2) % 3], *two_before = rows[(i + 1) % 3];
        row[0] = i;
        for (size_t j = 1; j <= n; j++) {
            row[j] = i == 0 ? j : retrofit_min(before[j], row[j - 1]) + 1;
            if (i == 0) continue;
            bool same = typed[i - 1] == name[j - 1];
            row[j] = retrofit_min(row[j], before[j - 1] + !same);
            bool swapped = i > 1 && j > 1 && typed[i - 1] == name[j - 2] &&
                           typed[i - 2] == name[j - 1];
            if (swapped) row[j] = retrofit_min(row[j], two_before[j - 2] + 1);
        }
    }
    return rows[length % 3][n];
}

// The option with the fewest mistakes, the first of several; NULL if half of the letters or more
// would be mistakes: such a guess would only mislead.
static const char *nearest_option(const retrofit_option *table, size_t count, const char *typed) {
    const char *nearest = NULL;
    size_t length = strcspn(typed, "="), fewest = length / 2 + length % 2;
    for (size_t i = 0; i < count + 2; i++) {
        const char *name = i == count ? "help" : i > count ? "version" : table[i].name;
        if (i < count && table[i].type == RETROFIT_HEADING) continue;
        size_t mistakes = count_mistakes(typed, length, name);
        if (mistakes >= fewest) continue;
        fewest = mistakes;
        nearest = name;
    }
    return nearest;
}

static bool fail_unknown_option(const retrofit_option *table, size_t count, const char *argument) {
    const char *nearest = nearest_option(table, count, argument + 2);
    if (!nearest) return retrofit_fail("unknown option %s", argument);
    return retrofit_fail("unknown option %s: did you mean --%s?", argument, nearest);
}

// Whether an argument before this one names the same option.
static bool is_given_before(char **argv, const char *argument) {
    size_t length = strcspn(argument, "=");
    for (size_t i = 1; argv[i] != argument; i++) {
        if (strcspn(argv[i], "=") == length && !strncmp(argv[i], argument, length)) return true;
    }
    return false;
}

// What a program needs of the system that started it: three open streams, so that no file of ours
// takes the number of one and gets what is printed; and a write beyond a limit on file sizes fails
// like any other, instead of ending the program. What takes the place of a closed stdout can
// only be read: printing must fail, or a text that is lost would seem to have been printed.
static void prepare_process(void) {
    for (int fd = 0; fd < 3; fd++) {
        bool closed = fcntl(fd, F_GETFD) < 0 && errno == EBADF;
        if (closed && open("/dev/null", fd == STDOUT_FILENO ? O_RDONLY : O_RDWR) < 0) return;
    }
    signal(SIGXFSZ, SIG_IGN);
}

#ifdef _OPENMP
// Whether something else computes at this moment: more runs than this program.
static bool machine_is_busy(void) {
    unsigned running = 0;
    FILE *f = fopen("/proc/loadavg", "re");
    if (!f) return false;
    if (fscanf(f, "%*f %*f %*f %u/", &running) != 1) running = 0;
    fclose(f);
    return running > 1;
}

// OpenMP's threads spin for milliseconds where they wait for each other. On a processor that they
// share, this uses up the time that they would need a moment later: a training beside one other
// program becomes 5 to 20 times as slow. Falling asleep after 2000 turns, some ten microseconds,
// costs little alone (doc/results.md). The libraries read the environment before main, hence the
// new start.
// libgomp counts turns. libomp knows milliseconds only: even one is too many on a busy machine,
// and none costs a fifth of the speed of decoding on a quiet one.
void retrofit_share_processors(char **argv) {
    const char *chosen[] = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"};
    for (size_t i = 0; i < sizeof chosen / sizeof *chosen; i++) {
        if (getenv(chosen[i])) return;
    }
    if (setenv("GOMP_SPINCOUNT", "2000", true)) return;
    if (setenv("KMP_BLOCKTIME", machine_is_busy() ? "0" : "1", true)) return;
    execv("/proc/self/exe", argv); // returns only where there is no /proc: then it stays as it is
}
#else
void retrofit_share_processors(char **argv) { (void)argv; }
#endif

int retrofit_options(int argc, char **argv, const retrofit_option *table, size_t count,
                     const char *usage, const char **others, size_t *other_count) {
    prepare_process();
    const char *slash = strrchr(argv[0], '/'), *program = slash ? slash + 1 : argv[0];
    for (int i = 1; i < argc; i++) {
        const char *argument = argv[i], *name = argument + 2, *value = strchr(argument, '=');
        bool help = !strcmp(argument, "--help") || !strcmp(argument, "-h");
        if (help || !strcmp(argument, "--version")) {
            if (help) print_options(table, count, usage);
            else print_version(program);
            if (retrofit_flush_stdout()) return 0;
            fprintf(stderr, "%s: %s\n", program, retrofit_error());
            return 1;
        }
        bool dashes = !strncmp(argument, "--", 2);
        if (!dashes && !others) {
            const char *hint = "options begin with -- (see --help)";
            if (access(argument, F_OK) == 0)
                hint = "if the shell made it from a pattern, quote the pattern: '*.bin'";
            fprintf(stderr, "%s: '%s' is not an option: %s\n", program, argument, hint);
            return 2;
        }
        if (!dashes) {
            others[(*other_count)++] = argument;
            continue;
        }
        const retrofit_option *option = find_option(table, count, name);
        bool alone = !option || option->type == RETROFIT_FLAG || option->type == RETROFIT_SWITCH;
        if (option && option->type == RETROFIT_MAYBE)
            alone = i + 1 < argc && !strncmp(argv[i + 1], "--", 2);
        if (value) value++;
        else if (!alone && i + 1 < argc) value = argv[++i];
        bool forgotten = value && value == argv[i] && !strncmp(value, "--", 2) &&
                         find_option(table, count, value + 2);
        if (forgotten) {
            fprintf(stderr, "%s: --%s needs a value before %s (if that is the value: --%s=%s)\n",
                    program, option->name, value, option->name, value);
            return 2;
        }
        if (option && value && is_given_before(argv, argument))
            retrofit_note("--%s is given twice: %s counts", option->name, value);
        bool ok = option ? read_option(option, value)
                         : fail_unknown_option(table, count, argument);
        if (!ok) {
            fprintf(stderr, "%s: %s (see --help)\n", program, retrofit_error());
            return 2;
        }
    }
    return -1;
}

#endif // RETROFIT_IMPLEMENTATION

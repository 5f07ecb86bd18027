// The whole model on a GPU's tables: against the authors' numbers, against the CPU, decoding,
// recomputing, memory, repeatability. Linked with retrofit_cuda.cu as nvcc makes it, or as C++ over
// the emulator: then it needs no GPU.
//
// The strict table (fp32) is held to the CPU's tolerances. For the one in bf16 the error that
// rounding explains is measured: `rounded` is the CPU's table with every result that is bf16 on the
// GPU rounded to bf16. How far that takes a number from the one in fp32, the GPU's may be off;
// twice as far, since there is chance in it.
#include "test.h"

// ---- A CPU that rounds as the GPU does ---------------------------------------------------------

static void round_all(act *values, size_t n) {
    float *x = values;
    for (size_t i = 0; i < n; i++) x[i] = retrofit_bf16_to_float(retrofit_float_to_bf16(x[i]));
}

// A copy of a matrix in bf16, as retrofit_refresh_weights makes one for the GPU; for free_weight.
static retrofit_weight rounded_weight(retrofit_weight w, size_t rows, size_t cols) {
    float *copy = retrofit_allocate(rows * cols, sizeof *copy);
    const float *x = w.data;
    for (size_t i = 0; i < rows; i++)
        memcpy(copy + i * cols, x + i * w.stride, cols * sizeof *copy);
    round_all(copy, rows * cols);
    return (retrofit_weight){copy, w.type, cols};
}

static void free_weight(retrofit_weight w) { free((void *)w.data); }

static void rounded_rmsnorm_forward(act *out, float *rstd, const float *x, const float *weight,
                                    size_t N, size_t d, float eps) {
    rmsnorm_forward(out, rstd, x, weight, N, d, eps);
    round_all(out, N * d);
}

static void rounded_rmsnorm_residual_backward(act *dinp, float *dweight, const float *dout,
                                              const float *x, const float *rstd,
                                              const float *weight, size_t N, size_t d) {
    rmsnorm_residual_backward(dinp, dweight, dout, x, rstd, weight, N, d);
    round_all(dinp, N * d);
}

static void rounded_bias_forward(act *y, const float *bias, size_t N, size_t O) {
    bias_forward(y, bias, N, O);
    round_all(y, N * O);
}

static void rounded_qk_norm_forward(act *qkv, act *qk, float *rstd, const float *q_norm,
                                    const float *k_norm, size_t N, size_t H, size_t G, size_t h,
                                    bool per_head, float eps) {
    qk_norm_forward(qkv, qk, rstd, q_norm, k_norm, N, H, G, h, per_head, eps);
    round_all(qkv, N * (H + 2 * G) * h);
}

static void rounded_qk_norm_backward(act *dqkv, float *dq_norm, float *dk_norm, const act *qk,
                                     const float *rstd, const float *q_norm, const float *k_norm,
                                     size_t N, size_t H, size_t G, size_t h, bool per_head) {
    qk_norm_backward(dqkv, dq_norm, dk_norm, qk, rstd, q_norm, k_norm, N, H, G, h, per_head);
    round_all(dqkv, N * (H + 2 * G) * h);
}

static void rounded_matmul_residual_forward(float *out, const float *residual, const act *inp,
                                            retrofit_weight w, size_t N, size_t I, size_t O) {
    retrofit_weight copy = rounded_weight(w, O, I);
    matmul_residual_forward(out, residual, inp, copy, N, I, O);
    free_weight(copy);
}

static void rounded_matmul_forward(act *out, const act *inp, retrofit_weight w, size_t N, size_t I,
                                   size_t O) {
    rounded_matmul_residual_forward(out, NULL, inp, w, N, I, O);
    round_all(out, N * O);
}

static void rounded_matmul_residual_backward_input(float *dinp, const act *dout, retrofit_weight w,
                                                   size_t N, size_t I, size_t O) {
    retrofit_weight copy = rounded_weight(w, O, I);
    matmul_residual_backward_input(dinp, dout, copy, N, I, O);
    free_weight(copy);
}

static void rounded_matmul_backward_input(act *dinp, const act *dout, retrofit_weight w, size_t N,
                                          size_t I, size_t O) {
    rounded_matmul_residual_backward_input(dinp, dout, w, N, I, O);
    round_all(dinp, N * I);
}

static void rounded_rope_forward(act *qkv, const float *table, const int32_t *past, size_t B,
                                 size_t T, size_t H, size_t G, size_t h) {
    rope_forward(qkv, table, past, B, T, H, G, h);
    round_all(qkv, B * T * (H + 2 * G) * h);
}

static void rounded_rope_backward(act *dqkv, const float *table, size_t B, size_t T, size_t H,
                                  size_t G, size_t h) {
    rope_backward(dqkv, table, B, T, H, G, h);
    round_all(dqkv, B * T * (H + 2 * G) * h);
}

static void rounded_attention_forward(act *out, float *lse, const act *qkv, size_t B, size_t T,
                                      size_t H, size_t G, size_t h) {
    attention_forward(out, lse, qkv, B, T, H, G, h);
    round_all(out, B * T * H * h);
}

static void rounded_attention_backward(act *dqkv, float *delta, const act *dout, const act *qkv,
                                       const act *out, const float *lse, size_t B, size_t T,
                                       size_t H, size_t G, size_t h) {
    attention_backward(dqkv, delta, dout, qkv, out, lse, B, T, H, G, h);
    round_all(dqkv, B * T * (H + 2 * G) * h);
}

static void rounded_swiglu_forward(act *out, const act *gate_up, size_t N, size_t F) {
    swiglu_forward(out, gate_up, N, F);
    round_all(out, N * F);
}

static void rounded_swiglu_backward(act *dgate_up, act *out, const act *dout, const act *gate_up,
                                    size_t N, size_t F) {
    swiglu_backward(dgate_up, out, dout, gate_up, N, F);
    round_all(dgate_up, N * 2 * F);
    round_all(out, N * F);
}

static void rounded_cross_entropy(float *losses, act *logits, const int32_t *labels, size_t N,
                                  size_t V, float scale) {
    cross_entropy(losses, logits, labels, N, V, scale);
    round_all(logits, N * V);
}

static void rounded_cast(act *out, const float *x, size_t n) {
    cast(out, x, n);
    round_all(out, n);
}

static void rounded_matmul_symmetric(act *out, const act *inp, size_t N, size_t I) {
    matmul_symmetric(out, inp, N, I);
    round_all(out, N * N);
}

static void rounded_muon_load(act *x, const float *u, const double *squares, size_t rows,
                              size_t cols) {
    muon_load(x, u, squares, rows, cols);
    round_all(x, rows * cols);
}

static void rounded_axpby(act *y, const act *x, size_t n, float a, float b) {
    axpby(y, x, n, a, b);
    round_all(y, n);
}

static retrofit_ops rounded; // retrofit_cpu with the above

static void fill_rounded_table(void) {
    rounded = retrofit_cpu;
    rounded.rmsnorm_forward = rounded_rmsnorm_forward;
    rounded.rmsnorm_residual_backward = rounded_rmsnorm_residual_backward;
    rounded.bias_forward = rounded_bias_forward;
    rounded.qk_norm_forward = rounded_qk_norm_forward;
    rounded.qk_norm_backward = rounded_qk_norm_backward;
    rounded.matmul_residual_forward = rounded_matmul_residual_forward;
    rounded.matmul_forward = rounded_matmul_forward;
    rounded.matmul_residual_backward_input = rounded_matmul_residual_backward_input;
    rounded.matmul_backward_input = rounded_matmul_backward_input;
    rounded.rope_forward = rounded_rope_forward;
    rounded.rope_backward = rounded_rope_backward;
    rounded.attention_forward = rounded_attention_forward;
    rounded.attention_backward = rounded_attention_backward;
    rounded.swiglu_forward = rounded_swiglu_forward;
    rounded.swiglu_backward = rounded_swiglu_backward;
    rounded.cross_entropy = rounded_cross_entropy;
    rounded.matmul_symmetric = rounded_matmul_symmetric;
    rounded.cast = rounded_cast;
    rounded.muon_load = rounded_muon_load;
    rounded.axpby = rounded_axpby;
}

// ---- What the tests share ----------------------------------------------------------------------

static float *on_host(const retrofit_ops *ops, const void *from, size_t n) {
    float *x = retrofit_allocate(n, sizeof *x);
    need(x != NULL, "memory");
    ops->download(x, from, n * sizeof *x);
    return x;
}

static retrofit_model *load(const char *name, const retrofit_ops *ops, retrofit_mode mode) {
    char path[512];
    snprintf(path, sizeof path, FIXTURES "%s", name);
    retrofit_model *model = retrofit_load(path, ops, mode);
    need(model != NULL, path);
    return model;
}

static retrofit_buffers *new_buffers(const retrofit_model *model, size_t B, size_t T, size_t K,
                                     retrofit_keep keep, const retrofit_kv_cache *cache) {
    retrofit_buffers *buffers = retrofit_buffers_new(model, B, T, K, keep, cache);
    need(buffers != NULL, "buffers");
    return buffers;
}

static void open_fixture(retrofit_map *f, const char *name) {
    char path[256];
    snprintf(path, sizeof path, FIXTURES "%s/forward_backward.safetensors", name);
    need(retrofit_safetensors_open(f, path), path);
}

// Not further from `exact` than twice what rounding explains. `share`: the largest part of that
// which was needed so far.
static void within(const char *what, const char *name, const float *gpu, const float *exact,
                   const float *explained, size_t n, double *share) {
    double error = relative_error(gpu, exact, n);
    double limit = 2 * relative_error(explained, exact, n) + 1e-6;
    check(error < limit, "%s: %s is off by %.2e, rounding explains %.2e", what, name, error,
          limit / 2);
    *share = fmax(*share, error / limit);
}

// ---- The authors' passes -----------------------------------------------------------------------

typedef struct {
    double loss;
    float *logits, *state;
    size_t logit_count, state_count;
    retrofit_model *model; // with its gradients
} outcome;

// The pass of a fixture, forward and backward.
static outcome run(const retrofit_ops *ops, const char *name, size_t n, size_t k,
                   retrofit_keep keep) {
    char path[256];
    retrofit_map f;
    snprintf(path, sizeof path, "%s/recurrent", name);
    retrofit_model *model = load(path, ops, RETROFIT_TRAINING);
    open_fixture(&f, name);
    const retrofit_tensor *tokens = fixture(&f, "tokens"), *labels = fixture(&f, "labels");
    const retrofit_tensor *s0 = fixture(&f, "s0");
    size_t B = tokens->shape[0], T = tokens->shape[1];
    retrofit_buffers *buffers = new_buffers(model, B, T, k, keep, NULL);
    need(retrofit_prelude(buffers, tokens->data, B, T), name);
    ops->upload(buffers->state, s0->data, s0->count * sizeof(float));
    retrofit_recur(buffers, n, k);
    retrofit_coda(buffers);

    outcome o = {.model = model, .state_count = s0->count};
    o.logit_count = B * T * model->config.vocab;
    o.logits = retrofit_allocate(o.logit_count, sizeof *o.logits);
    retrofit_logits(buffers, 0, B * T, o.logits);
    o.state = on_host(ops, latest_state(buffers), o.state_count);
    o.loss = retrofit_loss(buffers, labels->data, 1);
    retrofit_backward(buffers);
    retrofit_buffers_free(buffers);
    retrofit_safetensors_close(&f);
    return o;
}

static float *gradient(const outcome *o, size_t i) {
    const retrofit_parameter *p = o->model->parameters[i];
    return on_host(o->model->ops, p->grad, p->rows * p->cols);
}

static void free_outcome(outcome *o) {
    free(o->logits);
    free(o->state);
    retrofit_free(o->model);
}

// A fixture's pass on the strict table, on the one in bf16, on the CPU that rounds, and in bf16
// once more with everything recomputed in backward.
typedef struct {
    outcome strict, fast, explained, recomputed;
} outcomes;

static void compare_forward(const retrofit_map *f, const char *name, const char *run_name,
                            const outcomes *o, double *share) {
    const outcome *strict = &o->strict, *fast = &o->fast, *explained = &o->explained;
    const float *logits = fixture(f, "%s.logits", run_name)->data;
    const float *state = fixture(f, "%s.latents", run_name)->data;
    double loss = *(const float *)fixture(f, "%s.loss", run_name)->data;
    char what[64];
    double error = relative_error(strict->logits, logits, strict->logit_count);
    check(error < 1e-5, "fp32 %s %s: logits %.2e off", name, run_name, error);
    error = relative_error(strict->state, state, strict->state_count);
    check(error < 1e-5, "fp32 %s %s: states %.2e off", name, run_name, error);
    check(fabs(strict->loss - loss) < 1e-5 * loss, "fp32 %s %s: loss %.9g, the authors' %.9g", name,
          run_name, strict->loss, loss);

    snprintf(what, sizeof what, "bf16 %s %s", name, run_name);
    within(what, "logits", fast->logits, logits, explained->logits, fast->logit_count, share);
    within(what, "the state", fast->state, state, explained->state, fast->state_count, share);
    check(fabs(fast->loss - loss) < 0.01 * loss, "%s: loss %.6f, the authors' %.6f", what,
          fast->loss, loss);
    size_t bytes = fast->logit_count * sizeof(float);
    bool same = !memcmp(fast->logits, o->recomputed.logits, bytes);
    check(same && fast->loss == o->recomputed.loss, "%s: recomputing gives another forward pass",
          what);
}

static void compare_gradient(const retrofit_map *f, const char *name, const char *run_name,
                             const outcomes *o, size_t i, double *worst, double *share) {
    const retrofit_parameter *p = o->strict.model->parameters[i];
    const char *label = p->source[0].name;
    const float *theirs = fixture(f, "%s.grad.%s", run_name, label)->data;
    size_t n = p->rows * p->cols;
    float *strict = gradient(&o->strict, i), *fast = gradient(&o->fast, i);
    float *explained = gradient(&o->explained, i), *recomputed = gradient(&o->recomputed, i);
    char what[64];
    snprintf(what, sizeof what, "bf16 %s %s", name, run_name);
    double error = relative_error(strict, theirs, n);
    check(error < 1e-4, "fp32 %s %s: gradient of %s %.2e off", name, run_name, label, error);
    *worst = fmax(*worst, error);
    within(what, label, fast, theirs, explained, n, share);
    check(!memcmp(fast, recomputed, n * sizeof *fast),
          "%s: recomputing gives another gradient of %s", what, label);
    free(strict);
    free(fast);
    free(explained);
    free(recomputed);
}

static void fixture_runs(const char *name, const char *run_name, size_t n, size_t k) {
    retrofit_map f;
    outcomes o = {run(&retrofit_cuda_fp32, name, n, k, RETROFIT_KEEP_ALL),
                  run(&retrofit_cuda, name, n, k, RETROFIT_KEEP_ALL),
                  run(&rounded, name, n, k, RETROFIT_KEEP_ALL),
                  run(&retrofit_cuda, name, n, k, RETROFIT_KEEP_INPUTS)};
    double worst = 0, share = 0;
    open_fixture(&f, name);
    compare_forward(&f, name, run_name, &o, &share);
    for (size_t i = 0; i < o.strict.model->parameter_count; i++)
        compare_gradient(&f, name, run_name, &o, i, &worst, &share);
    printf("%s %s: fp32 worst gradient %.1e; bf16 at most %.2f of what is allowed\n", name,
           run_name, worst, share);
    free_outcome(&o.strict);
    free_outcome(&o.fast);
    free_outcome(&o.explained);
    free_outcome(&o.recomputed);
    retrofit_safetensors_close(&f);
}

// ---- Three steps of training -------------------------------------------------------------------

static const char *const optimizer_names[] = {"adamw", "muon", "ellisadam"};

// Random tokens and labels; every seventh label does not count.
static void draw_batch(int32_t *tokens, int32_t *labels, size_t count, uint64_t seed, size_t V) {
    for (size_t i = 0; i < count; i++) {
        tokens[i] = (int32_t)(retrofit_hash(seed, i) % V);
        labels[i] = i % 7 ? (int32_t)(retrofit_hash(seed, i + 1) % V) : -100;
    }
}

static retrofit_model *three_steps(const retrofit_ops *ops, const char *name,
                                   retrofit_optimizer_kind kind, double norms[3]) {
    enum { B = 2, T = 21 };
    int32_t tokens[B * T], labels[B * T];
    retrofit_model *model = load(name, ops, RETROFIT_TRAINING);
    retrofit_buffers *buffers = new_buffers(model, B, T, 2, RETROFIT_KEEP_ALL, NULL);
    retrofit_optimizer optimizer = {.kind = kind,
                                    .lr = 1e-3f,
                                    .muon_lr = 2e-3f,
                                    .beta1 = 0.9f,
                                    .beta2 = 0.95f,
                                    .eps = kind == RETROFIT_MUON ? 1e-10f : 1e-6f,
                                    .weight_decay = 0.01f,
                                    .momentum = 0.95f,
                                    .clip = 1,
                                    .peak_lr = 2e-3f,
                                    .throttle = 1.5f};
    need(retrofit_optimizer_init(model, kind), "memory");
    for (size_t t = 1; t <= 3; t++) {
        retrofit_zero_grad(model);
        for (size_t micro = 0; micro < 2; micro++) {
            draw_batch(tokens, labels, B * T, t * 2 + micro, model->config.vocab);
            need(retrofit_forward(buffers, tokens, B, T, 0.01f, t, micro, 2), "forward");
            need(isfinite(retrofit_loss(buffers, labels, 0.5f)), "loss");
            retrofit_backward(buffers);
        }
        norms[t - 1] = retrofit_optimizer_step(model, &optimizer, t);
    }
    retrofit_buffers_free(buffers);
    return model;
}

// How far a parameter went.
static float *way(const retrofit_model *model, const retrofit_model *start, size_t i) {
    const retrofit_parameter *p = start->parameters[i];
    size_t n = p->rows * p->cols;
    float *x = on_host(model->ops, model->parameters[i]->master, n);
    for (size_t j = 0; j < n; j++) x[j] -= p->master[j];
    return x;
}

// The same runs on the CPU, on the strict table, on the CPU that rounds, and on the one in bf16.
enum { EXACT, STRICT, EXPLAINED, FAST, RUNS };

// How far the parameters went, and in which direction. AdamW's first steps are little more than the
// gradient's sign: where rounding turns one that is almost zero, that number goes the other way. So
// in bf16 single tensors count if they are large, and all of them together.
static void compare_ways(const char *what, const retrofit_model *start,
                         retrofit_model *const models[RUNS]) {
    double worst = 0, share = 0;
    float *all[RUNS], *one[RUNS];
    size_t total = 0;
    for (int j = 0; j < RUNS; j++) all[j] = retrofit_allocate(start->weight_count, sizeof *all[j]);
    for (size_t i = 0; i < start->parameter_count; i++) {
        const retrofit_parameter *p = start->parameters[i];
        const char *label = p->source[0].name;
        size_t n = p->rows * p->cols;
        for (int j = 0; j < RUNS; j++) one[j] = way(models[j], start, i);
        double error = relative_error(one[STRICT], one[EXACT], n);
        check(error < 1e-3, "%s, fp32: %s went %.2e of its way off the CPU's", what, label, error);
        worst = fmax(worst, error);
        if (n > 1000) within(what, label, one[FAST], one[EXACT], one[EXPLAINED], n, &share);
        for (int j = 0; j < RUNS; j++) {
            memcpy(all[j] + total, one[j], n * sizeof *one[j]);
            free(one[j]);
        }
        total += n;
    }
    within(what, "all of it", all[FAST], all[EXACT], all[EXPLAINED], total, &share);
    for (int j = 0; j < RUNS; j++) free(all[j]);
    printf("%s: fp32 %.1e of its way off; bf16 at most %.2f of what is allowed\n", what, worst,
           share);
}

static void training(const char *name, retrofit_optimizer_kind kind) {
    const retrofit_ops *tables[RUNS] = {&retrofit_cpu, &retrofit_cuda_fp32, &rounded,
                                        &retrofit_cuda};
    retrofit_model *start = load(name, &retrofit_cpu, RETROFIT_TRAINING), *models[RUNS];
    double norms[RUNS][3];
    char what[64];
    snprintf(what, sizeof what, "three steps of %s, %s", name, optimizer_names[kind]);
    for (int j = 0; j < RUNS; j++) models[j] = three_steps(tables[j], name, kind, norms[j]);
    for (int t = 0; t < 3; t++) {
        double exact = norms[EXACT][t], strict = norms[STRICT][t], fast = norms[FAST][t];
        check(fabs(strict - exact) < 1e-4 * exact, "%s, fp32: gradient norm %g, on the CPU %g",
              what, strict, exact);
        check(fabs(fast - exact) < 0.02 * exact, "%s, bf16: gradient norm %g, on the CPU %g", what,
              fast, exact);
    }
    compare_ways(what, start, models);
    retrofit_free(start);
    for (int j = 0; j < RUNS; j++) retrofit_free(models[j]);
}

// ---- Decoding ----------------------------------------------------------------------------------

enum { DECODED_ROWS = 2, DECODED = 24, PROMPT = 9 }; // rows; tokens of a row; of its prompt

// A prompt, then token after token, against the logits of a full forward pass. Returns the largest
// error.
static double decode(retrofit_buffers *buffers, const int32_t *tokens, const float *full,
                     const retrofit_recurrence_options *options, double tolerance,
                     const char *what) {
    size_t V = buffers->model->config.vocab, B = DECODED_ROWS, count;
    int32_t next[DECODED_ROWS * PROMPT];
    double worst = 0;
    retrofit_clear_cache(buffers);
    for (size_t done = 0; done < DECODED; done += count) {
        count = done ? 1 : PROMPT;
        for (size_t i = 0; i < B * count; i++)
            next[i] = tokens[i / count * DECODED + done + i % count];
        const float *logits = retrofit_next_logits(buffers, next, B, count, NULL, options);
        need(logits != NULL, "next logits");
        for (size_t row = 0; row < B; row++) {
            const float *exact = full + (row * DECODED + done + count - 1) * V;
            double error = relative_error(logits + row * V, exact, V);
            check(error < tolerance,
                  "%s: logits of row %zu after %zu tokens are %.2e off the full pass's", what, row,
                  done + count, error);
            worst = fmax(worst, error);
        }
    }
    return worst;
}

// On a GPU the first two single tokens are done, the later ones replay what was recorded then;
// other recurrences or another start state must not replay what was recorded for these.
static void decoding(const retrofit_ops *ops, const char *name, double tolerance) {
    static const retrofit_recurrence_options passes[] = {
        {.recurrences = 3, .sigma = 0.02f, .seed = 7},
        {.recurrences = 2, .sigma = 0.02f, .seed = 7},
        {.recurrences = 3, .sigma = 0.02f, .seed = 8},
        {.recurrences = 3, .sigma = 0, .seed = 7},
    };
    retrofit_model *model = load(name, ops, RETROFIT_INFERENCE);
    size_t V = model->config.vocab, B = DECODED_ROWS;
    int32_t tokens[DECODED_ROWS * DECODED];
    char what[128];
    double worst = 0;
    float *full = retrofit_allocate(B * DECODED * V, sizeof *full);
    retrofit_kv_cache cache = {.capacity = DECODED, .recurrences = 3};
    retrofit_buffers *cached = new_buffers(model, B, PROMPT, 0, RETROFIT_KEEP_NOTHING, &cache);
    retrofit_buffers *whole = new_buffers(model, B, DECODED, 0, RETROFIT_KEEP_NOTHING, NULL);
    for (size_t i = 0; i < B * DECODED; i++) tokens[i] = (int32_t)(retrofit_hash(5, i) % V);
    for (size_t i = 0; i < 4; i++) {
        const retrofit_recurrence_options *options = &passes[i];
        // Row by row, since in decoding a row's start state does not depend on the other rows.
        for (size_t row = 0; row < B; row++) {
            need(retrofit_forward(whole, tokens + row * DECODED, 1, DECODED, options->sigma,
                                  options->seed, options->recurrences, 0),
                 "forward");
            retrofit_logits(whole, 0, DECODED, full + row * DECODED * V);
        }
        snprintf(what, sizeof what, "%s %s, pass %zu", ops->name, name, i);
        worst = fmax(worst, decode(cached, tokens, full, options, tolerance, what));
    }
    printf("%s %s: decoding %.1e off the full pass\n", ops->name, name, worst);
    free(full);
    retrofit_buffers_free(cached);
    retrofit_buffers_free(whole);
    retrofit_free(model);
}

// ---- Exits, noise and drafts, as on a CPU ------------------------------------------------------

enum { EXIT_ROWS = 3, EXIT_PROMPT = 8 };

// The same model, and buffers of the same sizes, on a GPU and on the CPU.
typedef struct {
    const char *name;
    retrofit_model *gpu_model, *cpu_model;
    retrofit_buffers *gpu, *cpu;
} both;

static void clear_both(both *b) {
    retrofit_clear_cache(b->gpu);
    retrofit_clear_cache(b->cpu);
}

// Both take the same tokens; returns how far the GPU's logits are off the CPU's.
static double next_on_both(both *b, const int32_t *tokens, size_t rows, size_t count,
                           const retrofit_recurrence_options *options) {
    size_t V = b->cpu_model->config.vocab;
    const float *gpu = retrofit_next_logits(b->gpu, tokens, rows, count, NULL, options);
    const float *cpu = retrofit_next_logits(b->cpu, tokens, rows, count, NULL, options);
    need(gpu && cpu, "next logits");
    return relative_error(gpu, cpu, rows * V);
}

static retrofit_recurrence_options exit_options(retrofit_exit exit) {
    retrofit_recurrence_options options = {.recurrences = 5,
                                           .sigma = 0.1f,
                                           .seed = 3,
                                           .exit = exit,
                                           .threshold = 0.2f,
                                           .continuous = exit % 2 == 0};
    if (exit == RETROFIT_EXIT_ARGMAX_STABILITY) options.threshold = 1;
    if (exit == RETROFIT_EXIT_KL) options.noise = 3;
    return options;
}

// What all rows get in step i: a prompt, then token after token.
static size_t exit_tokens(int32_t *tokens, retrofit_exit exit, size_t i, size_t V) {
    for (size_t j = 0; j < EXIT_ROWS * EXIT_PROMPT; j++)
        tokens[j] = (int32_t)(retrofit_hash(i + 10 * (size_t)exit, j) % V);
    return i ? 1 : EXIT_PROMPT;
}

// Whether the CPU lets the row stop after `used` recurrences in step `last` when its threshold is a
// thousandth lower or higher: then the two only round to different sides of it. Leaves the CPU's
// cache after that step.
static bool is_next_to_threshold(both *b, retrofit_exit exit, size_t last, size_t row, int used) {
    static const float shifts[] = {0.999f, 1.001f};
    int32_t tokens[EXIT_ROWS * EXIT_PROMPT];
    if (exit == RETROFIT_EXIT_ARGMAX_STABILITY) return false; // it counts
    for (size_t j = 0; j < 2; j++) {
        retrofit_recurrence_options options = exit_options(exit);
        options.threshold *= shifts[j];
        retrofit_clear_cache(b->cpu);
        for (size_t i = 0; i <= last; i++) {
            size_t count = exit_tokens(tokens, exit, i, b->cpu_model->config.vocab);
            need(retrofit_next_logits(b->cpu, tokens, EXIT_ROWS, count, NULL, &options) != NULL,
                 "next logits");
        }
        if ((int)b->cpu->decoder->used[row] == used) return true;
    }
    return false;
}

// Whether in step i all rows stopped after as many recurrences; one may differ next to the
// threshold.
static bool same_recurrences(both *b, retrofit_exit exit, size_t i, size_t *early) {
    int gpu[EXIT_ROWS], cpu[EXIT_ROWS];
    bool same = true;
    for (size_t row = 0; row < EXIT_ROWS; row++) {
        gpu[row] = (int)b->gpu->decoder->used[row];
        cpu[row] = (int)b->cpu->decoder->used[row];
        *early += gpu[row] < 5;
    }
    for (size_t row = 0; row < EXIT_ROWS; row++) {
        bool alike = gpu[row] == cpu[row];
        same = same && alike;
        check(alike || is_next_to_threshold(b, exit, i, row, gpu[row]),
              "%s %s, exit %d: in step %zu row %zu took %d recurrences, on a CPU %d, and it was "
              "not next to the threshold",
              b->gpu_model->ops->name, b->name, exit, i, row, gpu[row], cpu[row]);
    }
    return same;
}

// Rows stop after as many recurrences, with the same logits. Leaves the last tokens. Returns how
// many tokens stopped early.
static size_t compare_exit(both *b, retrofit_exit exit, int32_t *tokens) {
    size_t early = 0;
    retrofit_recurrence_options options = exit_options(exit);
    clear_both(b);
    for (size_t i = 0; i < 6; i++) {
        size_t count = exit_tokens(tokens, exit, i, b->cpu_model->config.vocab);
        double error = next_on_both(b, tokens, EXIT_ROWS, count, &options);
        if (!same_recurrences(b, exit, i, &early)) break; // from here on the caches differ
        check(error < 1e-4, "%s %s, exit %d: token %zu's logits are %.2e off the CPU's",
              b->gpu_model->ops->name, b->name, exit, i, error);
    }
    return early;
}

// A step that was recorded is replayed only with the same options; and one whose noise differs from
// token to token is not recorded.
static void compare_noise(both *b, const int32_t *tokens) {
    static const retrofit_recurrence_options ways[] = {
        {.noise = 0}, {.continuous = true}, {.noise = 0},
        {.noise = 3}, {.noise = 9},         {.noise = 9, .noise_kind = RETROFIT_NOISE_CHI},
        {.noise = 0},
    };
    clear_both(b);
    for (size_t i = 0; i < 21; i++) {
        retrofit_recurrence_options options = ways[i / 3];
        options.recurrences = 3;
        options.sigma = 0.3f;
        options.seed = 5;
        double error = next_on_both(b, tokens + i % 8, 1, 1, &options);
        check(error < 1e-4, "%s %s, way %zu: token %zu's logits are %.2e off the CPU's",
              b->gpu_model->ops->name, b->name, i / 3, i, error);
    }
}

// A front's tokens are those of plain decoding on the CPU.
static void compare_drafts(both *b, const int32_t *prompt) {
    size_t V = b->cpu_model->config.vocab;
    retrofit_recurrence_options options = {.recurrences = 5, .sigma = 0.1f, .seed = 3};
    retrofit_sampling greedy = {.top_p = 1, .seed = 1};
    retrofit_front *front = retrofit_front_new(b->gpu, &options, 1, 3, V, NULL);
    clear_both(b);
    const float *gpu = retrofit_next_logits(b->gpu, prompt, 1, EXIT_PROMPT, NULL, &options);
    const float *cpu = retrofit_next_logits(b->cpu, prompt, 1, EXIT_PROMPT, NULL, &options);
    need(gpu && cpu && front, "next logits");
    int32_t plain = retrofit_argmax(cpu, V);
    check(retrofit_argmax(gpu, V) == plain, "the first token is another one");
    need(retrofit_front_begin(front, 0, plain, EXIT_PROMPT + 10, &greedy), "begin");
    for (size_t made = 0; made < 10;) {
        retrofit_front_advance(front);
        int32_t answer = front->rows[0].answer;
        need(front->counts.passes <= 50, "an end of passes");
        if (answer < 0) continue;
        cpu = retrofit_next_logits(b->cpu, &plain, 1, 1, NULL, &options);
        need(cpu != NULL, "next logits");
        plain = retrofit_argmax(cpu, V);
        check(answer == plain, "%s %s: drafted token %zu is %d, on a CPU plainly %d",
              b->gpu_model->ops->name, b->name, made, (int)answer, (int)plain);
        made++;
    }
    check(front->counts.most > 1, "%s %s: one token under way", b->gpu_model->ops->name, b->name);
    retrofit_front_free(front);
}

static void decoding_as_on_a_cpu(const retrofit_ops *ops, const char *name) {
    retrofit_kv_cache cache = {.capacity = 24, .recurrences = 5};
    int32_t tokens[EXIT_ROWS * EXIT_PROMPT];
    size_t early = 0;
    both b = {.name = name};
    b.gpu_model = load(name, ops, RETROFIT_INFERENCE);
    b.cpu_model = load(name, &retrofit_cpu, RETROFIT_INFERENCE);
    b.gpu = new_buffers(b.gpu_model, EXIT_ROWS, EXIT_PROMPT, 0, RETROFIT_KEEP_NOTHING, &cache);
    b.cpu = new_buffers(b.cpu_model, EXIT_ROWS, EXIT_PROMPT, 0, RETROFIT_KEEP_NOTHING, &cache);
    for (int exit = RETROFIT_EXIT_NONE; exit <= RETROFIT_EXIT_ARGMAX_STABILITY; exit++)
        early += compare_exit(&b, (retrofit_exit)exit, tokens);
    check(early > 20, "%s %s: %zu tokens stopped early", ops->name, name, early);
    compare_noise(&b, tokens);
    cache.bf16 = true;
    check(!retrofit_buffers_new(b.gpu_model, 1, 8, 0, RETROFIT_KEEP_NOTHING, &cache),
          "%s: keys and values in bf16, activations not", ops->name);
    compare_drafts(&b, tokens);
    retrofit_buffers_free(b.gpu);
    retrofit_buffers_free(b.cpu);
    retrofit_free(b.gpu_model);
    retrofit_free(b.cpu_model);
}

// ---- The same bits, whatever the order of threads ----------------------------------------------

// Of all gradients of a pass.
static uint64_t hash_of_gradients(void) {
    outcome o = run(&retrofit_cuda, "tiny", 1, 2, RETROFIT_KEEP_ALL);
    uint64_t hash = 0;
    for (size_t i = 0; i < o.model->parameter_count; i++) {
        size_t n = o.model->parameters[i]->rows * o.model->parameters[i]->cols;
        float *g = gradient(&o, i);
        for (size_t j = 0; j < n; j++) {
            uint32_t bits;
            memcpy(&bits, &g[j], sizeof bits);
            hash = (hash ^ bits) * 0x100000001b3;
        }
        free(g);
    }
    free_outcome(&o);
    return hash;
}

static void repetition(int times) {
    uint64_t first = hash_of_gradients();
    for (int i = 1; i < times; i++)
        check(hash_of_gradients() == first, "the same pass twice gives other bits");
}

// ---- Memory is what was predicted --------------------------------------------------------------

static size_t allocated; // bytes asked of counting_alloc
static void *counting_alloc(size_t bytes) {
    allocated += bytes;
    return retrofit_cuda.alloc(bytes);
}

static void memory_of(retrofit_optimizer_kind kind, retrofit_keep keep) {
    retrofit_ops counting = retrofit_cuda;
    retrofit_config config;
    size_t weights, gradients, moments;
    counting.alloc = counting_alloc;
    need(retrofit_config_read(&config, FIXTURES "head64/recurrent"), "config");
    retrofit_model *shape = retrofit_model_new(&config, &counting);
    need(shape != NULL, "model");
    retrofit_training_bytes(shape, RETROFIT_TRAINING, kind, &weights, &gradients, &moments);
    size_t expected = weights + gradients + moments;
    expected += retrofit_buffers_bytes(&config, &counting, 2, 16, 3, keep);
    retrofit_free(shape);

    allocated = 0;
    retrofit_model *model = load("head64/recurrent", &counting, RETROFIT_TRAINING);
    retrofit_buffers *buffers = new_buffers(model, 2, 16, 3, keep, NULL);
    need(retrofit_optimizer_init(model, kind), "memory");
    check(allocated == expected, "memory: %zu bytes predicted, %zu taken", expected, allocated);
    retrofit_buffers_free(buffers);
    retrofit_free(model);
}

static void memory(bool fails_too) {
    for (int kind = RETROFIT_ADAMW; kind <= RETROFIT_MUON; kind++)
        for (int keep = RETROFIT_KEEP_ALL; keep <= RETROFIT_KEEP_INPUTS; keep++)
            memory_of((retrofit_optimizer_kind)kind, (retrofit_keep)keep);
    if (!fails_too) return; // compute-sanitizer would count the failing call
    void *exabyte = retrofit_cuda.alloc((size_t)1 << 60);
    check(!exabyte && strstr(retrofit_error(), "out of memory"),
          "an exabyte is had, or the error is '%s'", retrofit_error());
}

int main(void) {
    char text[256];
    bool all = !getenv("TRIALS"); // under sanitizers, which take long, one of each kind
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ); // for whoever looks while it runs, or after it hung
    need(retrofit_device(RETROFIT_ON_CUDA, false, text) != NULL, "a GPU");
    fill_rounded_table();
    fixture_runs("tiny", "n2k3", 2, 3);
    fixture_runs("olmo2", "n1k2", 1, 2);
    training("tiny/recurrent", RETROFIT_MUON);
    if (all) {
        fixture_runs("llama3", "n1k2", 1, 2);
        fixture_runs("head64", "n1k2", 1, 2);
        fixture_runs("qwen2", "n1k2", 1, 2);
        fixture_runs("qwen3", "n1k2", 1, 2);
        training("tiny/recurrent", RETROFIT_ELLISADAM);
        training("tiny/recurrent", RETROFIT_ADAMW);
        training("head64/recurrent", RETROFIT_ADAMW);
        training("tiny/base", RETROFIT_ADAMW); // a plain model
        training("olmo2/recurrent", RETROFIT_MUON);
        training("qwen2/recurrent", RETROFIT_ADAMW);
        training("qwen3/base", RETROFIT_MUON);
    }
    decoding(&retrofit_cuda, "tiny/recurrent", 0.03);
    decoding_as_on_a_cpu(&retrofit_cuda_fp32, "tiny/recurrent");
    if (all) {
        decoding(&retrofit_cuda_fp32, "tiny/recurrent", 1e-5);
        decoding(&retrofit_cuda_fp32, "head64/recurrent", 1e-5);
        decoding(&retrofit_cuda_fp32, "olmo2/recurrent", 1e-5);
    }
    memory(all);
    repetition(all ? 20 : 3);
    return finish("model on a GPU");
}

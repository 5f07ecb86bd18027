// The whole model on a GPU's tables: against the authors' numbers, against the CPU, decoding, recomputing, memory, repeatability. Linked with
// retrofit_cuda.cu as nvcc makes it, or as C++ over the emulator: then it needs no GPU.
//
// The strict table (fp32) is held to the CPU's tolerances. For the one in bf16 the error that rounding explains is measured: `rounded` is the
// CPU's table with every result that is bf16 on the GPU rounded to bf16; how far that takes a number from the one in fp32 is how far the GPU's
// may be off, but for chance: twice as far.
#include "test.h"

// ---- A CPU that rounds as the GPU does ---------------------------------------------------------------------------------------------
static void round_all(act *x_, size_t n) {
    float *x = (float *)x_;
    for (size_t i = 0; i < n; i++) x[i] = retrofit_bf16_to_float(retrofit_float_to_bf16(x[i]));
}
static void r_rmsnorm_forward(act *out, float *rstd, const float *x, const float *weight, size_t N, size_t d, float eps) {
    rmsnorm_forward(out, rstd, x, weight, N, d, eps), round_all(out, N * d);
}
static retrofit_weight rounded_weight(retrofit_weight w, size_t rows, size_t cols) { // as retrofit_refresh's copy has it; lives until the process ends
    float *copy = (float *)retrofit_allocate(rows * cols, sizeof *copy);
    for (size_t i = 0; i < rows; i++) memcpy(copy + i * cols, (const float *)w.data + i * w.stride, cols * sizeof *copy);
    round_all(copy, rows * cols);
    w.data = copy, w.stride = cols;
    return w;
}
static void drop(retrofit_weight w) { free((void *)w.data); }
static void r_matmul_residual_forward(float *out, const float *residual, const act *inp, retrofit_weight w, size_t N, size_t I, size_t O) {
    w = rounded_weight(w, O, I), matmul_residual_forward(out, residual, inp, w, N, I, O), drop(w);
}
static void r_matmul_forward(act *out, const act *inp, retrofit_weight w, size_t N, size_t I, size_t O) {
    r_matmul_residual_forward((float *)out, NULL, inp, w, N, I, O), round_all(out, N * O);
}
static void r_matmul_residual_backward_input(float *dinp, const act *dout, retrofit_weight w, size_t N, size_t I, size_t O) {
    w = rounded_weight(w, O, I), matmul_residual_backward_input(dinp, dout, w, N, I, O), drop(w);
}
static void r_matmul_backward_input(act *dinp, const act *dout, retrofit_weight w, size_t N, size_t I, size_t O) {
    r_matmul_residual_backward_input((float *)dinp, dout, w, N, I, O), round_all(dinp, N * I);
}
static void r_rope_forward(act *qkv, const float *table, const int32_t *past, size_t B, size_t T, size_t H, size_t G, size_t h) {
    rope_forward(qkv, table, past, B, T, H, G, h), round_all(qkv, B * T * (H + 2 * G) * h);
}
static void r_rope_backward(act *dqkv, const float *table, size_t B, size_t T, size_t H, size_t G, size_t h) {
    rope_backward(dqkv, table, B, T, H, G, h), round_all(dqkv, B * T * (H + 2 * G) * h);
}
static void r_attention_forward(act *out, float *lse, const act *qkv, size_t B, size_t T, size_t H, size_t G, size_t h) {
    attention_forward(out, lse, qkv, B, T, H, G, h), round_all(out, B * T * H * h);
}
static void r_attention_backward(act *dqkv, float *delta, const act *dout, const act *qkv, const act *out, const float *lse, size_t B, size_t T,
                                 size_t H, size_t G, size_t h) {
    attention_backward(dqkv, delta, dout, qkv, out, lse, B, T, H, G, h), round_all(dqkv, B * T * (H + 2 * G) * h);
}
static void r_swiglu_forward(act *out, const act *gate_up, size_t N, size_t F) { swiglu_forward(out, gate_up, N, F), round_all(out, N * F); }
static void r_swiglu_backward(act *dgate_up, act *out, const act *dout, const act *gate_up, size_t N, size_t F) {
    swiglu_backward(dgate_up, out, dout, gate_up, N, F), round_all(dgate_up, N * 2 * F), round_all(out, N * F);
}
static void r_cross_entropy(float *losses, act *logits, const int32_t *labels, size_t N, size_t V, float scale) {
    cross_entropy(losses, logits, labels, N, V, scale), round_all(logits, N * V);
}
static void r_cast(act *out, const float *x, size_t n) { cast(out, x, n), round_all(out, n); }
static void r_muon_load(act *x, const float *u, const double *squares, size_t rows, size_t cols) {
    muon_load(x, u, squares, rows, cols), round_all(x, rows * cols);
}
static void r_axpby(act *y, const act *x, size_t n, float a, float b) { axpby(y, x, n, a, b), round_all(y, n); }

static retrofit_ops rounded; // retrofit_cpu with the above

// ---- One run of a fixture --------------------------------------------------------------------------------------------------------
typedef struct {
    double loss;
    float *logits, *state;
    size_t count, states;
    retrofit_model *m; // with its gradients
} outcome;

static float *on_host(const retrofit_ops *ops, const void *from, size_t n) {
    float *x = (float *)retrofit_allocate(n, sizeof *x);
    need(x != NULL, "memory");
    ops->download(x, from, n * sizeof *x);
    return x;
}

static retrofit_model *load(const char *name, const retrofit_ops *ops, retrofit_mode mode) {
    char path[512];
    snprintf(path, sizeof path, FIXTURES "%s", name);
    retrofit_model *m = retrofit_load(path, ops, mode);
    need(m != NULL, path);
    return m;
}

static outcome run(const retrofit_ops *ops, const char *name, size_t n, size_t k, retrofit_keep keep) {
    char path[256];
    retrofit_map f;
    snprintf(path, sizeof path, "%s/recurrent", name);
    outcome o = {0, NULL, NULL, 0, 0, load(path, ops, RETROFIT_TRAINING)};
    snprintf(path, sizeof path, FIXTURES "%s/forward_backward.safetensors", name);
    need(retrofit_safetensors_open(&f, path), path);
    const retrofit_tensor *tokens = fixture(&f, "tokens"), *labels = fixture(&f, "labels"), *s0 = fixture(&f, "s0");
    size_t B = tokens->shape[0], T = tokens->shape[1];
    retrofit_buffers *a = retrofit_buffers_new(o.m, B, T, k, keep, NULL);
    need(a && retrofit_prelude(a, (const int32_t *)tokens->data, B, T), name);
    ops->upload(a->state, s0->data, s0->count * 4);
    retrofit_recur(a, n, k);
    retrofit_coda(a);
    o.count = B * T * o.m->config.vocab, o.states = s0->count;
    o.logits = (float *)retrofit_allocate(o.count, 4);
    retrofit_logits(a, 0, B * T, o.logits);
    o.state = on_host(ops, latest_state(a), o.states);
    o.loss = retrofit_loss(a, (const int32_t *)labels->data, 1);
    retrofit_backward(a);
    retrofit_buffers_free(a), retrofit_safetensors_close(&f);
    return o;
}

static float *gradient(const outcome *o, size_t i) {
    const retrofit_parameter *p = o->m->parameters[i];
    return on_host(o->m->ops, p->grad, p->rows * p->cols);
}

static void forget(outcome *o) { free(o->logits), free(o->state), retrofit_free(o->m); }

// Tensor by tensor: as far from `exact` as `explained` is, twice at most.
static void within(const char *what, const char *name, const float *gpu, const float *exact, const float *explained, size_t n, double *worst) {
    double e = relative_error(gpu, exact, n), limit = 2 * relative_error(explained, exact, n) + 1e-6;
    check(e < limit, "%s: %s is off by %.2e, rounding explains %.2e", what, name, e, limit / 2);
    if (e / limit > *worst) *worst = e / limit;
}

static void fixture_runs(const char *name, const char *run_name, size_t n, size_t k) {
    char path[256], what[64];
    retrofit_map f;
    snprintf(path, sizeof path, FIXTURES "%s/forward_backward.safetensors", name);
    need(retrofit_safetensors_open(&f, path), path);
    outcome strict = run(&retrofit_cuda_fp32, name, n, k, RETROFIT_KEEP_ALL), fast = run(&retrofit_cuda, name, n, k, RETROFIT_KEEP_ALL);
    outcome explained = run(&rounded, name, n, k, RETROFIT_KEEP_ALL), again = run(&retrofit_cuda, name, n, k, RETROFIT_KEEP_INPUTS);
    const float *logits = (const float *)fixture(&f, "%s.logits", run_name)->data, *state = (const float *)fixture(&f, "%s.latents", run_name)->data;
    double loss = *(const float *)fixture(&f, "%s.loss", run_name)->data, e = relative_error(strict.logits, logits, strict.count), worst = 0, of = 0;
    check(e < 1e-5, "fp32 %s %s: logits %.2e off", name, run_name, e);
    e = relative_error(strict.state, state, strict.states);
    check(e < 1e-5, "fp32 %s %s: states %.2e off", name, run_name, e);
    check(fabs(strict.loss - loss) < 1e-5 * loss, "fp32 %s %s: loss %.9g, the authors' %.9g", name, run_name, strict.loss, loss);
    snprintf(what, sizeof what, "bf16 %s %s", name, run_name);
    within(what, "logits", fast.logits, logits, explained.logits, fast.count, &of);
    within(what, "the state", fast.state, state, explained.state, fast.states, &of);
    check(fabs(fast.loss - loss) < 0.01 * loss, "%s: loss %.6f, the authors' %.6f", what, fast.loss, loss);
    check(!memcmp(fast.logits, again.logits, fast.count * 4) && fast.loss == again.loss, "%s: recomputing gives another forward pass", what);
    for (size_t i = 0; i < strict.m->parameter_count; i++) {
        const retrofit_parameter *p = strict.m->parameters[i];
        const float *theirs = (const float *)fixture(&f, "%s.grad.%s", run_name, p->source[0].name)->data;
        float *g[4] = {gradient(&strict, i), gradient(&fast, i), gradient(&explained, i), gradient(&again, i)};
        e = relative_error(g[0], theirs, p->rows * p->cols);
        if (e > worst) worst = e;
        check(e < 1e-4, "fp32 %s %s: gradient of %s %.2e off", name, run_name, p->source[0].name, e);
        within(what, p->source[0].name, g[1], theirs, g[2], p->rows * p->cols, &of);
        check(!memcmp(g[1], g[3], p->rows * p->cols * 4), "%s: recomputing gives another gradient of %s", what, p->source[0].name);
        for (int j = 0; j < 4; j++) free(g[j]);
    }
    printf("%s %s: fp32 worst gradient %.1e; bf16 at most %.2f of what is allowed\n", name, run_name, worst, of);
    forget(&strict), forget(&fast), forget(&explained), forget(&again), retrofit_safetensors_close(&f);
}

// ---- Three steps of training -----------------------------------------------------------------------------------------------------
static retrofit_model *three_steps(const retrofit_ops *ops, const char *name, retrofit_optimizer_kind kind, double norms[3]) {
    retrofit_model *m = load(name, ops, RETROFIT_TRAINING);
    enum { B = 2, T = 21 };
    int32_t tokens[B * T], labels[B * T];
    retrofit_buffers *a = retrofit_buffers_new(m, B, T, 2, RETROFIT_KEEP_ALL, NULL);
    need(a && retrofit_optimizer_init(m, kind), "memory");
    for (size_t t = 1; t <= 3; t++) {
        retrofit_optimizer o = {kind, 1e-3f, 2e-3f, 0.9f, 0.95f, kind == RETROFIT_MUON ? 1e-10f : 1e-6f, 0.01f, 0.95f, 1, 2e-3f, 1.5f};
        retrofit_zero_grad(m);
        for (size_t micro = 0; micro < 2; micro++) {
            for (size_t i = 0; i < B * T; i++)
                tokens[i] = (int32_t)(retrofit_hash(t * 2 + micro, i) % m->config.vocab), labels[i] = i % 7 ? (int32_t)(retrofit_hash(t * 2 + micro, i + 1) % m->config.vocab) : -100;
            need(retrofit_forward(a, tokens, B, T, 0.01f, t, micro, 2), "forward");
            need(isfinite(retrofit_loss(a, labels, 0.5f)), "loss");
            retrofit_backward(a);
        }
        norms[t - 1] = retrofit_optimizer_step(m, &o, t);
    }
    retrofit_buffers_free(a);
    return m;
}

static void training(const char *name, retrofit_optimizer_kind kind) {
    double norms[4][3], of = 0, worst = 0;
    char what[64];
    snprintf(what, sizeof what, "three steps of %s, %s", name, (const char *[]){"adamw", "muon", "ellisadam"}[kind]);
    retrofit_model *start = load(name, &retrofit_cpu, RETROFIT_TRAINING), *exact = three_steps(&retrofit_cpu, name, kind, norms[0]);
    retrofit_model *strict = three_steps(&retrofit_cuda_fp32, name, kind, norms[1]), *explained = three_steps(&rounded, name, kind, norms[2]);
    retrofit_model *fast = three_steps(&retrofit_cuda, name, kind, norms[3]);
    for (int t = 0; t < 3; t++) {
        check(fabs(norms[1][t] - norms[0][t]) < 1e-4 * norms[0][t], "%s, fp32: gradient norm %g, on the CPU %g", what, norms[1][t], norms[0][t]);
        check(fabs(norms[3][t] - norms[0][t]) < 0.02 * norms[0][t], "%s, bf16: gradient norm %g, on the CPU %g", what, norms[3][t], norms[0][t]);
    }
    // How far each parameter went, and whither. AdamW's first steps are little more than the gradient's sign: where rounding turns one that is
    // almost zero, that number goes the other way. So in bf16 single tensors count if they are large, and all of them together.
    float *ways[4];
    size_t all = 0;
    for (int j = 0; j < 4; j++) ways[j] = (float *)retrofit_allocate(start->weight_count, 4);
    for (size_t i = 0; i < start->parameter_count; i++) {
        const retrofit_parameter *p = start->parameters[i];
        size_t n = p->rows * p->cols;
        float *way[4] = {on_host(&retrofit_cpu, exact->parameters[i]->master, n), on_host(&retrofit_cuda_fp32, strict->parameters[i]->master, n),
                         on_host(&rounded, explained->parameters[i]->master, n), on_host(&retrofit_cuda, fast->parameters[i]->master, n)};
        for (int j = 0; j < 4; j++)
            for (size_t e = 0; e < n; e++) way[j][e] -= p->master[e];
        double e = relative_error(way[1], way[0], n);
        if (e > worst) worst = e;
        check(e < 1e-3, "%s, fp32: %s went %.2e of its way off the CPU's", what, p->source[0].name, e);
        if (n > 1000) within(what, p->source[0].name, way[3], way[0], way[2], n, &of);
        for (int j = 0; j < 4; j++) memcpy(ways[j] + all, way[j], n * 4), free(way[j]);
        all += n;
    }
    within(what, "all of it", ways[3], ways[0], ways[2], all, &of);
    for (int j = 0; j < 4; j++) free(ways[j]);
    printf("%s: fp32 %.1e of its way off; bf16 at most %.2f of what is allowed\n", what, worst, of);
    retrofit_free(start), retrofit_free(exact), retrofit_free(strict), retrofit_free(explained), retrofit_free(fast);
}

// ---- Decoding --------------------------------------------------------------------------------------------------------------------
// A prompt, then token after token: the first two steps are done, the later ones replayed, and a change of recurrences or start state must not
// replay what was recorded for another. Against the full forward pass of the same table.
static void decoding(const retrofit_ops *ops, const char *name, double tolerance) {
    retrofit_model *m = load(name, ops, RETROFIT_INFERENCE);
    size_t V = m->config.vocab, L = 24, B = 2;
    int32_t tokens[2 * 24], some[2 * 24];
    float *full = (float *)retrofit_allocate(B * L * V, 4);
    double worst = 0;
    retrofit_buffers *a =
        retrofit_buffers_new(m, B, 9, 0, RETROFIT_KEEP_NOTHING, &(retrofit_kv_cache){.capacity = L, .recurrences = 3});
    retrofit_buffers *whole = retrofit_buffers_new(m, B, L, 0, RETROFIT_KEEP_NOTHING, NULL);
    need(a && whole && full, "activations");
    for (size_t i = 0; i < B * L; i++) tokens[i] = (int32_t)(retrofit_hash(5, i) % V);
    for (size_t pass = 0; pass < 4; pass++) {
        size_t r = pass == 1 ? 2 : 3;
        float sigma = pass == 3 ? 0 : 0.02f;
        uint64_t seed = pass == 2 ? 8 : 7;
        for (size_t row = 0; row < B; row++) { // one by one: in decoding a row's start state does not depend on the others
            need(retrofit_forward(whole, tokens + row * L, 1, L, sigma, seed, r, 0), "forward");
            retrofit_logits(whole, 0, L, full + row * L * V);
        }
        retrofit_clear_cache(a);
        for (size_t at = 0, t; at < L; at += t) {
            t = at ? 1 : 9;
            for (size_t i = 0; i < B * t; i++) some[i] = tokens[i / t * L + at + i % t];
            const float *logits = retrofit_next_logits(a, some, B, t, NULL, &(retrofit_recurrence_options){.recurrences = r, .sigma = sigma, .seed = seed});
            need(logits != NULL, "feed");
            for (size_t b = 0; b < B; b++) {
                double e = relative_error(logits + b * V, full + (b * L + at + t - 1) * V, V);
                if (!(e <= worst)) worst = e;
                check(e < tolerance, "%s %s, pass %zu: logits of row %zu after %zu tokens are %.2e off the full pass's", ops->name, name, pass, b, at + t, e);
            }
        }
    }
    printf("%s %s: decoding %.1e off the full pass\n", ops->name, name, worst);
    free(full), retrofit_buffers_free(a), retrofit_buffers_free(whole), retrofit_free(m);
}

// Exits, drafts and continuous thinking as on a CPU: rows that stop after as many recurrences, the same tokens.
static void thinking(const retrofit_ops *ops, const char *name) {
    retrofit_model *m = load(name, ops, RETROFIT_INFERENCE), *exact = load(name, &retrofit_cpu, RETROFIT_INFERENCE);
    size_t V = m->config.vocab, B = 3, early = 0;
    retrofit_kv_cache cache = {.capacity = 24, .recurrences = 5};
    retrofit_buffers *a = retrofit_buffers_new(m, B, 8, 0, RETROFIT_KEEP_NOTHING, &cache),
                         *b = retrofit_buffers_new(exact, B, 8, 0, RETROFIT_KEEP_NOTHING, &cache);
    float *scratch = (float *)retrofit_allocate(10 * V, 4);
    need(a && b && scratch, "activations");
    int32_t tokens[3 * 8], out[4];
    for (int exit = RETROFIT_EXIT_NONE; exit <= RETROFIT_EXIT_ARGMAX_STABILITY; exit++) {
        retrofit_recurrence_options how = {.recurrences = 5,
                                 .sigma = 0.1f,
                                 .seed = 3,
                                 .exit = (retrofit_exit)exit,
                                 .threshold = exit == RETROFIT_EXIT_ARGMAX_STABILITY ? 1 : 0.2f,
                                 .continuous = exit % 2 == 0,
                                 .noise = exit == RETROFIT_EXIT_KL ? 3 : 0};
        retrofit_clear_cache(a), retrofit_clear_cache(b);
        for (size_t i = 0; i < 6; i++) {
            for (size_t j = 0; j < B * 8; j++) tokens[j] = (int32_t)(retrofit_hash(i + 10 * (size_t)exit, j) % V);
            size_t t = i ? 1 : 8;
            need(retrofit_next_logits(a, tokens, B, t, NULL, &how) && retrofit_next_logits(b, tokens, B, t, NULL, &how), "feed");
            double e = relative_error(a->decoder->next, b->decoder->next, B * V);
            check(e < 1e-4, "%s %s, exit %d: token %zu's logits are %.2e off the CPU's", ops->name, name, exit, i, e);
            for (size_t row = 0; row < B; row++)
                check(a->decoder->used[row] == b->decoder->used[row], "%s %s, exit %d: row %zu took %d recurrences, on a CPU %d", ops->name, name, exit, row,
                      (int)a->decoder->used[row], (int)b->decoder->used[row]),
                    early += a->decoder->used[row] < 5;
        }
    }
    check(early > 20, "%s %s: %zu tokens stopped early", ops->name, name, early);
    // What a recorded step is for: another way to think is another recording, and one whose noise differs from token to token is not recorded.
    static const retrofit_recurrence_options ways[] = {{.noise = 0}, {.continuous = true}, {.noise = 0},
                                             {.noise = 3}, {.noise = 9},         {.noise = 9, .noise_kind = RETROFIT_NOISE_CHI},
                                             {.noise = 0}};
    retrofit_clear_cache(a), retrofit_clear_cache(b);
    for (size_t i = 0; i < 21; i++) {
        retrofit_recurrence_options how = ways[i / 3];
        how.recurrences = 3, how.sigma = 0.3f, how.seed = 5;
        need(retrofit_next_logits(a, tokens + i % 8, 1, 1, NULL, &how) && retrofit_next_logits(b, tokens + i % 8, 1, 1, NULL, &how), "feed");
        double e = relative_error(a->decoder->next, b->decoder->next, V);
        check(e < 1e-4, "%s %s, way %zu: token %zu's logits are %.2e off the CPU's", ops->name, name, i / 3, i, e);
    }
    cache.bf16 = true;
    check(!retrofit_buffers_new(m, 1, 8, 0, RETROFIT_KEEP_NOTHING, &cache), "%s: keys and values in bf16, activations not", ops->name);
    retrofit_recurrence_options how = {.recurrences = 5, .sigma = 0.1f, .seed = 3};
    retrofit_sampling greedy = {0, 0, 1, 0, 1};
    retrofit_clear_cache(a), retrofit_clear_cache(b);
    int32_t next = retrofit_argmax(retrofit_next_logits(a, tokens, 1, 8, NULL, &how), V),
            plain = retrofit_argmax(retrofit_next_logits(b, tokens, 1, 8, NULL, &how), V);
    for (size_t made = 0; made < 10;) {
        size_t count = retrofit_speculate(a, next, 4, 4, &how, &greedy, V, out, scratch);
        need(count > 0, "speculate");
        for (size_t i = 0; i < count; i++, made++) {
            plain = retrofit_argmax(retrofit_next_logits(b, &plain, 1, 1, NULL, &how), V);
            check(out[i] == plain, "%s %s: drafted token %zu is %d, on a CPU plainly %d", ops->name, name, made, (int)out[i], (int)plain);
        }
        next = out[count - 1];
    }
    free(scratch), retrofit_buffers_free(a), retrofit_buffers_free(b), retrofit_free(m), retrofit_free(exact);
}

// ---- The same bits, whatever the order of threads; memory as foretold --------------------------------------------------------------
static uint64_t hash_of(const retrofit_ops *ops) {
    outcome o = run(ops, "tiny", 1, 2, RETROFIT_KEEP_ALL);
    uint64_t hash = 0;
    for (size_t i = 0; i < o.m->parameter_count; i++) {
        size_t n = o.m->parameters[i]->rows * o.m->parameters[i]->cols;
        float *g = gradient(&o, i);
        for (size_t j = 0; j < n; j++) {
            uint32_t bits;
            memcpy(&bits, &g[j], 4), hash = (hash ^ bits) * 0x100000001b3;
        }
        free(g);
    }
    forget(&o);
    return hash;
}

static size_t taken; // bytes asked of `counting`
static void *count_alloc(size_t bytes) {
    taken += bytes;
    return retrofit_cuda.alloc(bytes);
}

static void memory(void) {
    retrofit_ops counting = retrofit_cuda;
    counting.alloc = count_alloc;
    for (int kind = RETROFIT_ADAMW; kind <= RETROFIT_MUON; kind++)
        for (int keep = RETROFIT_KEEP_ALL; keep <= RETROFIT_KEEP_INPUTS; keep++) {
            retrofit_config c;
            size_t weights, gradients, moments, activations;
            need(retrofit_config_read(&c, FIXTURES "head64/recurrent"), "config");
            retrofit_model *shape = retrofit_model_new(&c, &counting);
            need(shape != NULL, "model");
            retrofit_training_bytes(shape, RETROFIT_TRAINING, (retrofit_optimizer_kind)kind, &weights, &gradients, &moments);
            activations = retrofit_buffers_bytes(&c, &counting, 2, 16, 3, (retrofit_keep)keep);
            retrofit_free(shape);
            taken = 0;
            retrofit_model *m = load("head64/recurrent", &counting, RETROFIT_TRAINING);
            retrofit_buffers *a = retrofit_buffers_new(m, 2, 16, 3, (retrofit_keep)keep, NULL);
            need(a && retrofit_optimizer_init(m, (retrofit_optimizer_kind)kind), "memory");
            check(taken == weights + gradients + moments + activations, "memory: %zu bytes foretold, %zu taken", weights + gradients + moments + activations, taken);
            retrofit_buffers_free(a), retrofit_free(m);
        }
    check(!retrofit_cuda.alloc((size_t)1 << 60) && strstr(retrofit_error(), "out of memory"), "an exabyte is had, or the error is '%s'", retrofit_error());
}

int main(void) {
    char text[256];
    need(retrofit_device(RETROFIT_ON_CUDA, false, text) != NULL, "a GPU");
    rounded = retrofit_cpu;
#define ROUNDED(op) rounded.op = r_##op;
    ROUNDED(rmsnorm_forward) ROUNDED(matmul_residual_forward) ROUNDED(matmul_forward) ROUNDED(matmul_residual_backward_input)
    ROUNDED(matmul_backward_input) ROUNDED(rope_forward) ROUNDED(rope_backward) ROUNDED(attention_forward) ROUNDED(attention_backward)
    ROUNDED(swiglu_forward) ROUNDED(swiglu_backward) ROUNDED(cross_entropy) ROUNDED(cast) ROUNDED(muon_load) ROUNDED(axpby)
    bool all = !getenv("TRIALS"); // under sanitizers, which take long, one of each kind
    fixture_runs("tiny", "n2k3", 2, 3);
    if (all) fixture_runs("llama3", "n1k2", 1, 2);
    fixture_runs("head64", "n1k2", 1, 2);
    training("tiny/recurrent", RETROFIT_MUON), training("tiny/recurrent", RETROFIT_ELLISADAM);
    if (all) training("tiny/recurrent", RETROFIT_ADAMW), training("head64/recurrent", RETROFIT_ADAMW);
    if (all) training("tiny/base", RETROFIT_ADAMW); // the plain Llama
    decoding(&retrofit_cuda, "tiny/recurrent", 0.03);
    thinking(&retrofit_cuda_fp32, "tiny/recurrent");
    if (all) decoding(&retrofit_cuda_fp32, "tiny/recurrent", 1e-5), decoding(&retrofit_cuda_fp32, "head64/recurrent", 1e-5);
    memory();
    uint64_t first = hash_of(&retrofit_cuda);
    for (int i = 1; i < (all ? 20 : 3); i++) check(hash_of(&retrofit_cuda) == first, "the same pass twice gives other bits");
    return finish("model on a GPU");
}

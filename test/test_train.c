// Training end to end against the authors' runs, gradients against finite differences and unrolled models, checkpoints and token shards
// there and back again, and files made to do harm.
#include "test.h"
#include <ftw.h>

static char root[64]; // everything is written under it, and removed at the end

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *at) {
    (void)st, (void)type, (void)at;
    return remove(path);
}
static void remove_root(void) { nftw(root, remove_entry, 8, FTW_DEPTH | FTW_PHYS); }

// A path under root; eight of them can be in use at a time.
__attribute__((format(printf, 1, 2))) static char *at(const char *format, ...) {
    static char paths[8][512];
    static size_t next;
    char *path = paths[next++ % 8];
    int n = snprintf(path, sizeof *paths, "%s/", root);
    va_list args;
    va_start(args, format);
    vsnprintf(path + n, sizeof *paths - (size_t)n, format, args);
    va_end(args);
    return path;
}

static void write_file(const char *path, const void *data, size_t size) {
    FILE *f = fopen(path, "wb");
    need(f && fwrite(data, 1, size, f) == size && !fclose(f), path);
}

// A call that must have failed, saying so in one line that names the culprit.
static void refused(bool worked, const char *name, const char *what) {
    const char *e = retrofit_error();
    check(!worked && *e && !strchr(e, '\n') && strstr(e, name), "%s: %s, error \"%s\" (must name %s)", what,
          worked ? "accepted" : "refused", e, name);
    error_text[0] = 0;
}

static retrofit_model *load(const char *path, retrofit_mode mode) {
    retrofit_model *m = retrofit_load(path, &retrofit_cpu, mode);
    need(m != NULL, path);
    return m;
}

// Largest difference between two models' parameters, by relative_error; 0 only if all bits are equal.
enum { MASTER, GRAD, M, V };
static const float *numbers(const retrofit_parameter *p, int which) {
    return which == MASTER ? p->master : which == GRAD ? p->grad : which == M ? p->m : p->v;
}
static double difference(const retrofit_model *a, const retrofit_model *b, int which, const char **name) {
    double worst = 0;
    need(a->parameter_count == b->parameter_count, "models of one shape");
    for (size_t i = 0; i < a->parameter_count; i++) {
        const retrofit_parameter *p = a->parameters[i], *q = b->parameters[i];
        const float *x = numbers(p, which), *y = numbers(q, which);
        size_t n = p->rows * p->cols;
        double e = p->rows != q->rows || p->cols != q->cols || !x != !y ? INFINITY
                   : !x || !memcmp(x, y, n * 4)                         ? 0
                                                                        : relative_error(x, y, n) + 1e-30;
        if (e > worst) worst = e, *name = p->source[0].name;
    }
    return worst;
}
static void same(const retrofit_model *a, const retrofit_model *b, int which, const char *what) {
    const char *name = "";
    double e = difference(a, b, which, &name);
    check(e == 0, "%s: %s differs by %.2e, not a bit was to", what, name, e);
}

// ---- The authors' tables -----------------------------------------------------------------------------------------------
static void sampler(void) {
    FILE *f = fopen(FIXTURES "tables/sampler.tsv", "r");
    need(f && fscanf(f, "%*[^\n]") == 0, "sampler.tsv");
    size_t m, r, K, n, k, my_n, my_k, count = 0;
    for (double rate; fscanf(f, "%zu %zu %zu %lf %zu %zu", &m, &r, &K, &rate, &n, &k) == 6; count++) {
        float mine;
        retrofit_draw_recurrences(m, r, K, &my_n, &my_k, &mine);
        check(mine == (float)rate && my_n == n && my_k == k, "draw %zu, mean %zu, K %zu: rate %.9g (%zu,%zu), the authors' %.9g (%zu,%zu)",
              m, r, K, (double)mine, my_n, my_k, rate, n, k);
    }
    fclose(f);
    check(count == 8000, "%zu draws in the table, not 8000", count);
}

static void schedules(void) {
    FILE *f = fopen(FIXTURES "tables/schedules.tsv", "r");
    need(f && fscanf(f, "%*[^\n]") == 0, "schedules.tsv");
    char name[32];
    size_t S, t, up, count = 0;
    double w, c, min, peak, value;
    for (; fscanf(f, "%31s %zu %lf %lf %lf %lf %zu %lf %zu", name, &S, &w, &c, &min, &peak, &t, &value, &up) == 9; count++) {
        double mine = !strcmp(name, "learning_rate")       ? retrofit_learning_rate(t, S, w, c, min, peak)
                      : !strcmp(name, "recurrence_linear") ? retrofit_curriculum(RETROFIT_CURRICULUM_LINEAR, t, S, w, peak)
                      : !strcmp(name, "recurrence_1-sqrt") ? retrofit_curriculum(RETROFIT_CURRICULUM_1_SQRT, t, S, w, peak)
                      : !strcmp(name, "backprop_linear")   ? retrofit_linear_schedule(t, S, w, min, peak)
                                                           : NAN;
        // one rounding of a double is 1.1e-16; near the decay's end 1 + cos(πx) cancels, which costs digits of the part above min·lr
        check(fabs(mine - value) <= 1e-15 * fabs(value) && (size_t)ceil(mine) == up,
              "%s S %zu w %g step %zu: %.17g, ceil %g; the authors' %.17g, %zu", name, S, w, t, mine, ceil(mine), value, up);
    }
    fclose(f);
    // the tables' warm-ups are whole numbers of steps; ours is rounded up: 2.5 of 10 to 3, and so is the decay
    double up_2 = retrofit_learning_rate(2, 10, 0.25, 0.25, 0.1, 1), down_8 = retrofit_learning_rate(8, 10, 0.25, 0.25, 0.1, 1);
    check(fabs(up_2 - 0.7) < 1e-15 && fabs(down_8 - 0.775) < 1e-15, "warm-up or decay not rounded up: %.17g, %.17g", up_2, down_8);
    check(count == 1629, "%zu rows of schedules, not 1629", count);
}

// The sizes of the states against a pass that stops at each of them.
static void state_sizes(void) {
    retrofit_model *m = load(FIXTURES "tiny/recurrent", RETROFIT_TRAINING);
    int32_t tokens[12];
    double rms[8];
    for (int i = 0; i < 12; i++) tokens[i] = i * 7 % 131;
    retrofit_buffers *a = retrofit_buffers_new(m, 2, 6, 3, RETROFIT_KEEP_ALL, NULL);
    retrofit_buffers *b = retrofit_buffers_new(m, 2, 6, 0, RETROFIT_KEEP_NOTHING, NULL);
    need(a && b && retrofit_optimizer_init(m, RETROFIT_ADAMW) && retrofit_forward(a, tokens, 2, 6, 0.5f, 3, 2, 3), "forward");
    size_t count = retrofit_state_rms(a, rms);
    check(count == 4, "%zu sizes of 4 states", count);
    for (size_t j = 0; j < count; j++) {
        double sum = 0;
        need(retrofit_forward(b, tokens, 2, 6, 0.5f, 3, 2 + j, 0), "forward");
        for (size_t i = 0; i < 12 * m->config.n_embd; i++) sum += (double)b->state[i] * b->state[i];
        sum = sqrt(sum / (12.0 * (double)m->config.n_embd));
        check(fabs(rms[j] - sum) < 1e-6 * sum, "the size of s_%zu is %g, should be %g", 2 + j, rms[j], sum);
    }
    retrofit_buffers_free(a), retrofit_buffers_free(b), retrofit_free(m);
}

// ---- The authors' ten steps ----------------------------------------------------------------------------------------------
static const char *const names[] = {"adamw", "muon", "ellisadam"}; // by retrofit_optimizer_kind
static retrofit_map fixtures;
static retrofit_json *recipe;
enum { STEPS = 10, ROWS = 2 }; // rows in a micro-batch

static double setting(const char *key) {
    const retrofit_json *j = retrofit_json_get(recipe, key);
    need(j && j->type == RETROFIT_JSON_NUMBER, key);
    return j->number;
}

static retrofit_buffers *activations(const retrofit_model *m, size_t rows, size_t K) {
    retrofit_buffers *a =
        retrofit_buffers_new(m, rows, fixture(&fixtures, "train.tokens")->shape[1] - 1, K, RETROFIT_KEEP_ALL, NULL);
    need(a != NULL, "activations");
    return a;
}

// Rows first .. first+count of train.tokens as tokens and labels, through (n,k), and back with the loss scaled. Zero start state.
static double pass(retrofit_buffers *a, size_t first, size_t count, size_t n, size_t k, float scale) {
    const retrofit_tensor *t = fixture(&fixtures, "train.tokens");
    size_t T = t->shape[1] - 1;
    int32_t *tokens = (int32_t *)retrofit_allocate(2 * count * T, 4), *labels = tokens + count * T;
    for (size_t i = 0; i < count * T; i++) tokens[i] = ((const int32_t *)t->data)[(first + i / T) * (T + 1) + i % T];
    for (size_t i = 0; i < count * T; i++) labels[i] = ((const int32_t *)t->data)[(first + i / T) * (T + 1) + i % T + 1];
    need(first + count <= t->shape[0] && retrofit_forward(a, tokens, count, T, 0, 0, n, k), "forward");
    double loss = retrofit_loss(a, labels, scale);
    need(isfinite(loss), "loss");
    if (scale != 0) retrofit_backward(a);
    free(tokens);
    return loss;
}

static double from(const retrofit_json *record, const char *key, size_t i, size_t j) {
    const retrofit_json *x = retrofit_json_get(record, key);
    if (x && x->type == RETROFIT_JSON_ARRAY) {
        for (x = x->child; x && i--;) x = x->next;
        if (x && x->type == RETROFIT_JSON_ARRAY)
            for (x = x->child; x && j--;) x = x->next;
    }
    need(x && x->type == RETROFIT_JSON_NUMBER, key);
    return x->number;
}

static void close_to(double mine, double theirs, double tolerance, const char *kind, size_t t, const char *what) {
    check(fabs(mine - theirs) <= tolerance * fabs(theirs), "%s step %zu: %s %.9g, the authors' %.9g (%.1e)", kind, t + 1, what, mine,
          theirs, fabs(mine - theirs) / fabs(theirs));
}

// Optimizer step t (from 0) of the recipe; with the authors' record of it also compared.
static void train_step(retrofit_model *m, retrofit_buffers *a, retrofit_optimizer_kind kind, size_t t, const retrofit_json *theirs) {
    const char *name = names[kind];
    size_t accumulate = (size_t)setting("accumulation"), K = (size_t)setting("max_backprop_depth");
    double warmup = setting("lr_warmup"), cooldown = setting("lr_cooldown"), min = setting("min_lr_ratio");
    size_t mean = (size_t)ceil(
        retrofit_curriculum(RETROFIT_CURRICULUM_1_SQRT, t, STEPS, setting("curriculum_warmup"), setting("max_mean_recurrence")));
    if (mean == 0) mean = 1;
    if (K > mean) K = mean;
    retrofit_zero_grad(m);
    for (size_t i = 0; i < accumulate; i++) {
        size_t n, k, batch = t * accumulate + i + 1;
        retrofit_draw_recurrences(batch, mean, K, &n, &k, NULL);
        double loss = pass(a, ROWS * (batch - 1), ROWS, n, k, 1.0f / (float)accumulate);
        if (!theirs) continue;
        check((double)n == from(theirs, "nk", i, 0) && (double)k == from(theirs, "nk", i, 1), "%s step %zu: drew (%zu,%zu)", name, t + 1, n,
              k);
        close_to(loss, from(theirs, "micro_losses", i, 0), 1e-5, name, t, "loss");
    }
    double lr = retrofit_learning_rate(t, STEPS, warmup, cooldown, min, setting("lr"));
    double muon_lr = retrofit_learning_rate(t, STEPS, warmup, cooldown, min, setting("muon_lr"));
    const retrofit_json *betas = retrofit_json_get(recipe, "betas");
    retrofit_optimizer o = {.kind = kind,
                            .lr = (float)lr,
                            .muon_lr = (float)muon_lr,
                            .beta1 = (float)betas->child->number,
                            .beta2 = (float)betas->child->next->number,
                            .eps = kind == RETROFIT_MUON ? 1e-10f : kind == RETROFIT_ELLISADAM ? 1e-6f : (float)setting("eps"),
                            .peak_lr = (float)setting("lr"),
                            .weight_decay = (float)setting("weight_decay"),
                            .momentum = 0.95f,
                            .clip = (float)setting("clip")};
    double norm = retrofit_optimizer_step(m, &o, t + 1);
    if (!theirs) return;
    check((double)mean == from(theirs, "mean_recurrence", 0, 0) && (double)K == from(theirs, "backprop_depth", 0, 0),
          "%s step %zu: mean recurrence %zu, backprop depth %zu", name, t + 1, mean, K);
    double exact = kind == RETROFIT_ELLISADAM ? 0x1p-23 : 1e-15; // theirs keeps its learning rate in fp32
    close_to(lr, from(theirs, "lr", 0, 0), exact, name, t, "learning rate");
    close_to(kind == RETROFIT_MUON ? muon_lr : lr, from(theirs, "lr_first_group", 0, 0), exact, name, t, "first group's learning rate");
    close_to(norm, from(theirs, "grad_norm", 0, 0), 1e-5, name, t, "gradient norm");
}

static void ten_steps(retrofit_optimizer_kind kind) {
    const char *name = names[kind];
    retrofit_model *m = load(FIXTURES "tiny/recurrent", RETROFIT_TRAINING), *start = load(FIXTURES "tiny/recurrent", RETROFIT_TRAINING);
    retrofit_buffers *a = activations(m, ROWS, 4);
    need(retrofit_optimizer_init(m, kind), "moments");
    const retrofit_json *record = retrofit_json_get(retrofit_json_get(recipe, "runs"), name)->child;
    for (size_t t = 0; t < STEPS; t++, record = record->next) need(record != NULL, "ten records"), train_step(m, a, kind, t, record);
    double worst = 0, moved = INFINITY;
    for (size_t i = 0; i < m->parameter_count; i++) {
        const retrofit_parameter *p = m->parameters[i];
        const retrofit_tensor *final = fixture(&fixtures, "%s.final.%s", name, p->source[0].name);
        size_t n = p->rows * p->cols;
        double e = relative_error(p->master, (const float *) final->data, n),
               way = relative_error(start->parameters[i]->master, (const float *) final->data, n);
        check(final->count == n && e < 1e-4, "%s: %s after ten steps is off by %.2e; it moved by %.2e", name, p->source[0].name, e, way);
        if (e > worst) worst = e;
        if (way < moved) moved = way;
    }
    printf("%s: worst final parameter %.1e off, where each moved by %.1e or more\n", name, worst, moved);
    retrofit_buffers_free(a);

    // The same in two sittings: bits must not show where it was interrupted. Everything kept is what the files hold.
    retrofit_model *one = load(FIXTURES "tiny/recurrent", RETROFIT_TRAINING), *two;
    need(retrofit_optimizer_init(one, kind), "moments");
    a = activations(one, ROWS, 4);
    for (size_t t = 0; t < 5; t++) train_step(one, a, kind, t, NULL);
    char *final = strdup(at("runs/%s/latest", name)), *temporary = retrofit_directory_begin(final);
    const char *metadata[] = {"step", "5", "a \"key\"", "a\tvalue\n", NULL};
    need(temporary && retrofit_save(one, temporary, RETROFIT_F32, NULL) && retrofit_save_optimizer(one, temporary, metadata) &&
             retrofit_directory_commit(temporary, final),
         "checkpoint");
    retrofit_buffers_free(a);
    retrofit_map f;
    two = load(at("runs/%s", name), RETROFIT_TRAINING); // finds DIR/latest
    need(retrofit_optimizer_init(two, kind) && retrofit_load_optimizer(two, &f, final), "optimizer.safetensors");
    const char *step = retrofit_safetensors_metadata(&f, "step"), *odd = retrofit_safetensors_metadata(&f, "a \"key\"");
    check(step && !strcmp(step, "5") && odd && !strcmp(odd, "a\tvalue\n") && !retrofit_safetensors_metadata(&f, "none"),
          "metadata came back as %s, %s", step ? step : "nothing", odd ? odd : "nothing");
    retrofit_safetensors_close(&f);
    same(two, one, MASTER, "parameters read back"), same(two, one, M, "first moments read back"),
        same(two, one, V, "second moments read back");
    a = activations(two, ROWS, 4);
    for (size_t t = 5; t < STEPS; t++) train_step(two, a, kind, t, NULL);
    same(two, m, MASTER, name), same(two, m, M, name), same(two, m, V, name);

    // another optimizer's moments, and another model's, are no good
    retrofit_model *other = load(FIXTURES "tiny/recurrent", RETROFIT_TRAINING), *plain = load(FIXTURES "tiny/base", RETROFIT_TRAINING);
    need(retrofit_optimizer_init(other, kind == RETROFIT_MUON ? RETROFIT_ADAMW : RETROFIT_MUON) && retrofit_optimizer_init(plain, kind),
         "moments");
    refused(retrofit_load_optimizer(other, &f, final), final, "moments of another optimizer");
    refused(retrofit_load_optimizer(plain, &f, final), final, "moments of another model");
    refused(retrofit_load_optimizer(other, &f, root), "optimizer.safetensors", "moments that are not there");
    retrofit_buffers_free(a), free(final), free(temporary);
    retrofit_free(m), retrofit_free(start), retrofit_free(one), retrofit_free(two), retrofit_free(other), retrofit_free(plain);
}

// ---- Gradients -------------------------------------------------------------------------------------------------------------
// Along a unit direction u of one tensor the loss must change by g·u. Two central differences, combined so that the error is of order
// h⁴, allow steps large enough for fp32: what is left is far below 1e-3 of ‖g‖. u is g/‖g‖ itself, then half of it in random directions.
static void finite_differences(const char *name, size_t k) {
    retrofit_model *m = load(name, RETROFIT_TRAINING);
    retrofit_buffers *a = activations(m, ROWS, k);
    double worst = 0;
    pass(a, 0, ROWS, 0, k, 1);
    for (size_t i = 0; i < m->parameter_count; i++) {
        retrofit_parameter *p = m->parameters[i];
        size_t n = p->rows * p->cols;
        float *old = (float *)retrofit_allocate(n, 4), *u = (float *)retrofit_allocate(n, 4);
        memcpy(old, p->master, n * 4);
        double size = 0;
        sum_squares(&size, p->grad, n), size = sqrt(size);
        for (int random = 0; random < 2; random++) {
            double length = 0, slope = 0, loss[4];
            for (size_t j = 0; j < n; j++)
                u[j] = p->grad[j] / (float)size + (random ? (retrofit_hash(i, j) & 1 ? 1.0f : -1.0f) / sqrtf((float)n) : 0),
                length += (double)u[j] * u[j];
            for (size_t j = 0; j < n; j++) slope += (double)p->grad[j] * u[j] / sqrt(length);
            double h =
                0.003 / size; // the loss changes by about 0.003: less drowns in rounding, more in the curvature of what few rows of wte do
            for (int s = 0; s < 4; s++) {
                const double steps[] = {-2, -1, 1, 2};
                for (size_t j = 0; j < n; j++) p->master[j] = (float)(old[j] + steps[s] * h * u[j] / sqrt(length));
                loss[s] = pass(a, 0, ROWS, 0, k, 0);
            }
            memcpy(p->master, old, n * 4);
            double e = fabs((8 * (loss[2] - loss[1]) - (loss[3] - loss[0])) / (12 * h) - slope) / size;
            check(e < 1e-3, "%s: gradient of %s and finite differences are %.2e apart", name, p->source[0].name, e);
            if (e > worst) worst = e;
        }
        free(old), free(u);
    }
    printf("%s: worst finite difference %.1e\n", name, worst);
    retrofit_buffers_free(a), retrofit_free(m);
}

// With (n,k) nothing flows into the first n recurrences: the gradients are those of (0,k) started from s_n, to the last bit.
static void truncation(void) {
    retrofit_model *m = load(FIXTURES "tiny/recurrent", RETROFIT_TRAINING), *fresh = load(FIXTURES "tiny/recurrent", RETROFIT_TRAINING);
    retrofit_buffers *a = activations(m, ROWS, 3), *b = activations(fresh, ROWS, 3);
    const retrofit_tensor *t = fixture(&fixtures, "train.tokens");
    size_t T = t->shape[1] - 1, N = ROWS * T, V_ = m->config.vocab;
    int32_t tokens[1024];
    need(N <= 1024, "room for the tokens");
    for (size_t i = 0; i < N; i++) tokens[i] = ((const int32_t *)t->data)[i];
    float *x = (float *)retrofit_allocate(3 * N * V_, 4), *y = x + N * V_, *z = y + N * V_;
    need(retrofit_forward(a, tokens, ROWS, T, 0.01f, 7, 2, 2) && retrofit_prelude(b, tokens, ROWS, T), "forward");
    memcpy(b->state, a->state, N * m->config.n_embd * 4); // in training `state` stays s_n
    retrofit_recur(b, 0, 2), retrofit_coda(b);
    double one = retrofit_loss(a, tokens, 1), two = retrofit_loss(b, tokens, 1);
    retrofit_backward(a), retrofit_backward(b);
    check(one == two, "loss with (2,2) %.9g, with (0,2) from s_2 %.9g", one, two);
    same(fresh, m, GRAD, "(0,2) from s_2 against (2,2)");
    // gradients matter to nothing but gradients; three recurrences are one, and one, and one
    need(retrofit_forward(a, tokens, ROWS, T, 0.01f, 7, 0, 3), "forward"), retrofit_logits(a, 0, N, x);
    need(retrofit_forward(a, tokens, ROWS, T, 0.01f, 7, 3, 0), "forward"), retrofit_logits(a, 0, N, y);
    need(retrofit_prelude(b, tokens, ROWS, T), "prelude"), retrofit_init_state(b, 0.01f, 7);
    for (int i = 0; i < 3; i++) retrofit_recur(b, 0, 1);
    retrofit_coda(b), retrofit_logits(b, 0, N, z);
    check(!memcmp(x, y, N * V_ * 4), "logits of (0,3) and (3,0) are %.2e apart", relative_error(x, y, N * V_));
    check(!memcmp(x, z, N * V_ * 4), "logits of (0,3) and three times (0,1) are %.2e apart", relative_error(x, z, N * V_));
    // a row's place in the batch changes nothing
    for (size_t i = 0; i < T; i++) {
        int32_t other = tokens[i];
        tokens[i] = tokens[T + i], tokens[T + i] = other;
    }
    need(retrofit_forward(a, tokens, ROWS, T, 0, 0, 1, 2), "forward"), retrofit_logits(a, 0, N, x);
    for (size_t i = 0; i < T; i++) {
        int32_t other = tokens[i];
        tokens[i] = tokens[T + i], tokens[T + i] = other;
    }
    need(retrofit_forward(a, tokens, ROWS, T, 0, 0, 1, 2), "forward"), retrofit_logits(a, 0, N, y);
    check(!memcmp(x, y + T * V_, T * V_ * 4) && !memcmp(x + T * V_, y, T * V_ * 4), "logits depend on the row's place in the batch");
    // what has no loss is no number
    for (size_t i = 0; i < N; i++) tokens[i] = -100;
    check(isnan(retrofit_loss(a, tokens, 0)) && *retrofit_error(), "the loss of no labels is a number"), tokens[3] = (int32_t)V_;
    check(isnan(retrofit_loss(a, tokens, 0)) && strstr(retrofit_error(), "label 3"), "a label of V: %s", retrofit_error());
    check(!retrofit_forward(a, tokens, ROWS, T, 0, 0, 0, 4), "4 recurrences with gradient where 3 fit");
    free(x), retrofit_buffers_free(a), retrofit_buffers_free(b), retrofit_free(m), retrofit_free(fresh);
}

// With A = [I | 0] and s_0 = e the loop is a plain stack of P + r·C + D layers with the core's repeated: logits equal to the last bit, and
// the core's gradient is the sum of its copies'. (s_0 gets no gradient, so what lies before it cannot be compared; with A_e = 0 it is 0.)
static void unrolled(void) {
    enum { R = 3 };
    retrofit_model *m = load(FIXTURES "tiny/recurrent", RETROFIT_TRAINING);
    size_t d = m->config.n_embd, P = m->config.prelude, C = m->config.core, D = m->config.coda, V_ = m->config.vocab, T = 16;
    for (size_t i = 0; i < d * 2 * d; i++) m->adapter.master[i] = i % (2 * d) == i / (2 * d);
    retrofit_config c = m->config;
    c.prelude = c.core = 0, c.coda = P + R * C + D;
    retrofit_model *stack = retrofit_model_new(&c, &retrofit_cpu);
    need(stack && retrofit_model_allocate(stack, RETROFIT_TRAINING), "stack");
#define LAYER(i) ((i) < P ? &m->prelude[i] : (i) < P + R * C ? &m->core[((i)-P) % C] : &m->coda[(i)-P - R * C])
#define EACH(X)  X(norm_1) X(w_qkv) X(w_out) X(norm_2) X(w_gate_up) X(w_down)
    for (size_t i = 0; i < c.coda; i++) {
#define COPY(w) memcpy(stack->coda[i].w.master, LAYER(i)->w.master, LAYER(i)->w.rows *LAYER(i)->w.cols * 4);
        EACH(COPY)
    }
    memcpy(stack->wte.master, m->wte.master, V_ * d * 4), memcpy(stack->lm_head.master, m->lm_head.master, V_ * d * 4);
    memcpy(stack->ln_f.master, m->ln_f.master, d * 4);
    retrofit_refresh_weights(m), retrofit_refresh_weights(stack);
    retrofit_buffers *a = retrofit_buffers_new(m, 1, T, R, RETROFIT_KEEP_ALL, NULL),
                         *b = retrofit_buffers_new(stack, 1, T, 0, RETROFIT_KEEP_ALL, NULL);
    const int32_t *tokens = (const int32_t *)fixture(&fixtures, "train.tokens")->data;
    need(a && b && retrofit_prelude(a, tokens, 1, T) && retrofit_forward(b, tokens, 1, T, 0, 0, 0, 0), "forward");
    memcpy(a->state, a->e, T * d * 4), retrofit_recur(a, 0, R), retrofit_coda(a);
    float *x = (float *)retrofit_allocate(2 * T * V_, 4), *y = x + T * V_;
    retrofit_logits(a, 0, T, x), retrofit_logits(b, 0, T, y);
    check(!memcmp(x, y, T * V_ * 4), "looped and unrolled: logits are %.2e apart", relative_error(x, y, T * V_));
    retrofit_loss(a, tokens + 1, 1), retrofit_loss(b, tokens + 1, 1), retrofit_backward(a), retrofit_backward(b);
    for (size_t i = 0; i < C + D; i++) {
        retrofit_layer *w = i < C ? &m->core[i] : &m->coda[i - C];
        for (size_t r = 1; i < C && r < R; r++) {
#define SUM(w) add(stack->coda[P + i].w.grad, stack->coda[P + r * C + i].w.grad, stack->coda[P + i].w.rows * stack->coda[P + i].w.cols, 1);
            EACH(SUM)
        }
        retrofit_layer *u = &stack->coda[i < C ? P + i : P + R * C + i - C];
        double e;
#define COMPARE(p)                                                   \
    e = relative_error(w->p.grad, u->p.grad, w->p.rows * w->p.cols), \
    check(e < 1e-6, "looped and unrolled: gradients of %s %.2e apart", w->p.source[0].name, e);
        EACH(COMPARE)
    }
    double squares = 0;
    sum_squares(&squares, m->wte.grad, V_ * d), sum_squares(&squares, m->prelude[0].w_qkv.grad, m->prelude[0].w_qkv.rows * d);
    check(squares == 0, "a gradient went past s_0");
    free(x), retrofit_buffers_free(a), retrofit_buffers_free(b), retrofit_free(m), retrofit_free(stack);
}

// With parts frozen the others' gradients are the same to the bit, and nothing else has any, or moments, or moves.
static void freezing(void) {
    const int32_t *tokens = (const int32_t *)fixture(&fixtures, "train.tokens")->data;
    for (int how = RETROFIT_KEEP_ALL; how <= RETROFIT_KEEP_INPUTS; how++)
        for (int kind = RETROFIT_ADAMW; kind <= RETROFIT_ELLISADAM; kind++) {
            retrofit_model *whole = NULL, *start = load(FIXTURES "tiny/recurrent", RETROFIT_TRAINING);
            for (int mode = RETROFIT_TRAINING; mode <= RETROFIT_TRAINING_ADAPTER; mode++) {
                retrofit_model *m = load(FIXTURES "tiny/recurrent", (retrofit_mode)mode);
                need(retrofit_optimizer_init(m, (retrofit_optimizer_kind)kind), "moments");
                retrofit_buffers *a = retrofit_buffers_new(m, 2, 9, 2, (retrofit_keep)how, NULL);
                need(a && retrofit_forward(a, tokens, 2, 9, 0.1f, 5, 1, 2), "forward");
                retrofit_loss(a, tokens + 1, 1), retrofit_backward(a);
                retrofit_optimizer o = {.kind = (retrofit_optimizer_kind)kind,
                                        .lr = 1e-3f,
                                        .muon_lr = 1e-2f,
                                        .beta1 = 0.9f,
                                        .beta2 = 0.95f,
                                        .eps = 1e-8f,
                                        .momentum = 0.95f};
                double norm = retrofit_optimizer_step(m, &o, 1), squares = 0;
                if (mode == RETROFIT_TRAINING) whole = m;
                for (size_t i = 0; i < m->parameter_count; i++) {
                    const retrofit_parameter *p = m->parameters[i], *q = whole->parameters[i], *before = start->parameters[i];
                    size_t bytes = p->rows * p->cols * sizeof(float);
                    bool trained = mode == RETROFIT_TRAINING || p->part == RETROFIT_PART_ADAPTER ||
                                   (mode == RETROFIT_TRAINING_CORE && p->part == RETROFIT_PART_CORE);
                    if (trained) sum_squares(&squares, p->grad, p->rows * p->cols);
                    check(trained ? p->grad && p->m && !memcmp(p->grad, q->grad, bytes) && !memcmp(p->master, q->master, bytes)
                                  : !p->grad && !p->m && !p->v,
                          "%s, mode %d: gradient, moment or step of %s", names[kind], mode, p->source[0].name);
                    check(trained == (memcmp(p->master, before->master, bytes) != 0), "%s, mode %d: %s moved, or did not", names[kind],
                          mode, p->source[0].name);
                }
                check(fabs(norm - sqrt(squares)) < 1e-6 * norm, "mode %d: the norm is %g, of the trained gradients %g", mode, norm,
                      sqrt(squares));
                size_t weights, gradients, moments;
                retrofit_model *shape = retrofit_model_new(&m->config, &retrofit_cpu);
                need(shape != NULL, "shape");
                retrofit_training_bytes(shape, (retrofit_mode)mode, (retrofit_optimizer_kind)kind, &weights, &gradients, &moments),
                    retrofit_free(shape);
                check(gradients == m->grad_bytes && moments == m->moment_bytes, "mode %d: %zu and %zu bytes foretold, %zu and %zu taken",
                      mode, gradients, moments, m->grad_bytes, m->moment_bytes);
                retrofit_buffers_free(a);
                if (m != whole) retrofit_free(m);
            }
            retrofit_free(whole), retrofit_free(start);
        }
}

// Against a count by hand of a model of one layer per part, and the paper's parameter counts of Llama-3.2 (2,4,2).
static void flops(void) {
    retrofit_config c = {
        .n_embd = 4, .n_heads = 2, .n_kv_heads = 1, .head_dim = 2, .intermediate = 8, .vocab = 10, .prelude = 1, .core = 1, .coda = 1};
    // T = 3: qkv 4x8, out 4x4, gate and up 4x16, down 8x4: 144 weights; attention 2·3·4; each half of
    // the adapter 4x4; head 4x10.
    double layer = 2 * 144 + 24, half = 2 * 16, head = 80;
    // Passes over the prelude, A_e, the core and A_s without gradient, with gradient, coda and head.
    static const int passes[4][6] = {
        {1, 1, 1, 1, 1, 1}, {3, 3, 1, 3, 3, 3}, {1, 2, 1, 3, 3, 2}, {1, 2, 1, 2, 3, 2}};
    for (int mode = 0; mode < 4; mode++) {
        const int *times = passes[mode];
        double due = times[0] * layer + times[1] * half + 5 * times[2] * (layer + half);
        due += 2 * (times[3] * layer + times[4] * half) + times[5] * (layer + head);
        double got = retrofit_flops_per_token(&c, (retrofit_mode)mode, 3, 5, 2);
        check(got == due, "mode %d: %g FLOPs per token, should be %g", mode, got, due);
    }
    retrofit_config llama = {.n_embd = 2048,
                             .n_heads = 32,
                             .n_kv_heads = 8,
                             .head_dim = 64,
                             .intermediate = 8192,
                             .vocab = 128256,
                             .prelude = 2,
                             .core = 4,
                             .coda = 2};
    double got = retrofit_paper_flops_per_token(&llama, 7, 3),
           due = 6.0 * (121643008.0 + 3 * 243286016.0 + 121643008.0) + 2 * 7 * 243286016.0;
    check(got == due, "Llama-3.2 (2,4,2): %.0f of the paper's FLOPs per token, should be %.0f", got, due);
}

static void accumulation(void) {
    retrofit_model *m[4];
    for (int i = 0; i < 4; i++)
        m[i] = load(FIXTURES "tiny/recurrent", RETROFIT_TRAINING), need(retrofit_optimizer_init(m[i], RETROFIT_ADAMW), "moments");
    retrofit_buffers *a = activations(m[0], ROWS, 3), *b = activations(m[1], 2 * ROWS, 3);
    double halves = pass(a, 0, ROWS, 1, 3, 0.5f) / 2 + pass(a, ROWS, ROWS, 1, 3, 0.5f) / 2, whole = pass(b, 0, 2 * ROWS, 1, 3, 1);
    const char *name = "";
    double e = difference(m[0], m[1], GRAD, &name);
    check(e < 1e-6 && fabs(halves - whole) < 1e-6 * whole, "two micro-batches: loss %.9g, one: %.9g; gradients of %s %.2e apart", halves,
          whole, name, e);
    retrofit_buffers_free(a), retrofit_buffers_free(b);
    for (int i = 2; i < 4; i++) { // the second run in buffers that have seen other work
        a = activations(m[i], ROWS + (size_t)i % 2, 4);
        if (i == 3) pass(a, 10, ROWS + 1, 2, 4, 1);
        for (size_t t = 0; t < 3; t++) train_step(m[i], a, RETROFIT_ADAMW, t, NULL);
        retrofit_buffers_free(a);
    }
    same(m[2], m[3], MASTER, "three steps, twice");
    for (int i = 0; i < 4; i++) retrofit_free(m[i]);
}

// In the authors' steps weight decay is too weak to show. It takes lr·decay of the weight, whatever the gradient, beside the update; of ELLISAdam
// lr/peak·decay, which is all of it where no peak is named.
static void decay(retrofit_optimizer_kind kind) {
    retrofit_model *m[2], *start = load(FIXTURES "tiny/recurrent", RETROFIT_TRAINING);
    for (int i = 0; i < 2; i++) {
        m[i] = load(FIXTURES "tiny/recurrent", RETROFIT_TRAINING);
        retrofit_buffers *a = activations(m[i], ROWS, 1);
        retrofit_optimizer o = {kind, 0.01f, 0.02f, 0.9f, 0.95f, 1e-8f, i ? 0.5f : 0, 0.95f, 0, 0, 0};
        need(retrofit_optimizer_init(m[i], kind), "moments"), pass(a, 0, ROWS, 0, 1, 1);
        retrofit_optimizer_step(m[i], &o, 1), retrofit_buffers_free(a);
    }
    for (size_t i = 0; i < start->parameter_count; i++) {
        const retrofit_parameter *p = start->parameters[i];
        double lr = kind == RETROFIT_ELLISADAM ? 1 : kind == RETROFIT_MUON && p->kind == RETROFIT_MATRIX ? 0.02 : 0.01, worst = 0;
        for (size_t j = 0; j < p->rows * p->cols; j++) {
            double with = (double)m[1]->parameters[i]->master[j], without = (double)m[0]->parameters[i]->master[j];
            worst = fmax(worst, fabs(with - without + lr * 0.5 * (double)p->master[j]));
        }
        check(worst < 1e-6, "%s: weight decay of %s is off by %.2e", names[kind], p->source[0].name, worst);
    }
    retrofit_free(m[0]), retrofit_free(m[1]), retrofit_free(start);
}

// With a throttle of 4, adapter and core go a quarter of the way, and all else goes all of it.
static void throttling(void) {
    for (int kind = RETROFIT_ADAMW; kind <= RETROFIT_ELLISADAM; kind++) {
        retrofit_model *m[2], *start = load(FIXTURES "tiny/recurrent", RETROFIT_TRAINING);
        for (int i = 0; i < 2; i++) {
            m[i] = load(FIXTURES "tiny/recurrent", RETROFIT_TRAINING);
            retrofit_buffers *a = activations(m[i], ROWS, 1);
            retrofit_optimizer o = {(retrofit_optimizer_kind)kind, 0.01f, 0.02f, 0.9f, 0.95f, 1e-8f, 0, 0.95f, 0, 0, i ? 4.0f : 0};
            need(retrofit_optimizer_init(m[i], (retrofit_optimizer_kind)kind), "moments"), pass(a, 0, ROWS, 0, 1, 1);
            retrofit_optimizer_step(m[i], &o, 1), retrofit_buffers_free(a);
        }
        for (size_t i = 0; i < start->parameter_count; i++) {
            const retrofit_parameter *p = start->parameters[i];
            double worst = 0, share = p->part == RETROFIT_PART_CORE || p->part == RETROFIT_PART_ADAPTER ? 0.25 : 1;
            for (size_t j = 0; j < p->rows * p->cols; j++) {
                double way = (double)m[0]->parameters[i]->master[j] - p->master[j], slow = (double)m[1]->parameters[i]->master[j] - p->master[j];
                worst = fmax(worst, fabs(slow - share * way));
            }
            check(worst < 1e-6, "%s: throttled by 4, %s is %.2e off", names[kind], p->source[0].name, worst);
        }
        retrofit_free(m[0]), retrofit_free(m[1]), retrofit_free(start);
    }
}

// The source model trained by the same loop, on one batch again and again, must learn it.
static void baseline(void) {
    retrofit_model *m = load(FIXTURES "tiny/base", RETROFIT_TRAINING);
    retrofit_buffers *a = activations(m, ROWS, 0);
    need(retrofit_optimizer_init(m, RETROFIT_ADAMW), "moments");
    double first = 0, last = 0;
    for (size_t t = 0; t < 20; t++) {
        retrofit_optimizer o = {
            .kind = RETROFIT_ADAMW, .lr = 3e-3f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 1e-4f, .clip = 1};
        retrofit_zero_grad(m);
        last = pass(a, 0, ROWS, 0, 0, 1);
        if (t == 0) first = last;
        retrofit_optimizer_step(m, &o, t + 1);
    }
    check(last < 0.8 * first, "20 steps on one batch: loss from %.4f to %.4f only", first, last);
    retrofit_buffers_free(a), retrofit_free(m);
}

// ---- Checkpoints -----------------------------------------------------------------------------------------------------------
// To bf16 by another way than the header's: of the two neighbours the nearer, of two equally near the one whose last bit is 0.
static uint16_t nearest_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint16_t below = (uint16_t)(bits >> 16);
    double down = (double)f - (double)retrofit_bf16_to_float(below), up = (double)retrofit_bf16_to_float((uint16_t)(below + 1)) - (double)f;
    return fabs(down) < fabs(up) || (fabs(down) == fabs(up) && below % 2 == 0) ? below : (uint16_t)(below + 1);
}

// Every field but `tied`: a saved model has a head of its own.
static void describe(char *out, const retrofit_config *c) {
    sprintf(out, "%zu %zu %zu %zu %zu %zu %zu, %zu %zu %zu, eps %a, theta %a, llama3 %d %a %a %a %a, std %a, %zu %zu, %d %d", c->n_embd,
            c->n_heads, c->n_kv_heads, c->head_dim, c->intermediate, c->vocab, c->context, c->prelude, c->core, c->coda,
            (double)c->norm_eps, c->rope_theta, c->rope_llama3, c->rope_factor, c->rope_low, c->rope_high, c->rope_original_context,
            (double)c->state_std, c->mean_recurrence, c->backprop_depth, c->bos, c->eos);
}

static void there_and_back(const char *name) {
    retrofit_model *m = load(name, RETROFIT_TRAINING), *n, *other;
    // ties, the largest, a denormal, -0, and neighbours of a tie
    const float odd[] = {0x1.01p0f, 0x1.03p0f, -0x1.01p0f, -0x1.03p0f, 0x1.ffp-1f, 3e38f, 1e-40f, -0.0f, 0x1.010002p0f, 0x1.00fffep0f};
    char was[1024], is[1024], *f32 = strdup(at("f32")), *bf16 = strdup(at("bf16"));
    memcpy(m->wte.master, odd, sizeof odd);
    m->config.bos = 7, m->config.norm_eps = 1.2345678e-5f, m->config.rope_theta = 12345.678;
    if (m->config.core) m->config.state_std = 0.0123456789f, m->config.mean_recurrence = 11, m->config.backprop_depth = 5;
    mkdir(f32, 0777), mkdir(bf16, 0777);
    need(retrofit_save(m, f32, RETROFIT_F32, FIXTURES "lookup/base") && retrofit_save(m, bf16, RETROFIT_BF16, NULL), "save");
    check(!access(at("f32/tokenizer.json"), R_OK) && access(at("bf16/tokenizer.json"), F_OK), "%s: a tokenizer is not where it should be",
          name);
    n = load(f32, RETROFIT_TRAINING), same(n, m, MASTER, name);
    describe(was, &m->config), describe(is, &n->config), retrofit_free(n);
    check(!strcmp(was, is), "%s: config\n%s read back as\n%s", name, was, is);
    n = load(bf16, RETROFIT_TRAINING);
    for (size_t i = 0, bad = 0; i < n->parameter_count; i++)
        for (size_t j = 0; !bad && j < n->parameters[i]->rows * n->parameters[i]->cols; j++) {
            float x = m->parameters[i]->master[j], y = n->parameters[i]->master[j], z = retrofit_bf16_to_float(nearest_bf16(x));
            bad += !check(!memcmp(&y, &z, 4), "%s: %s[%zu] = %a in bf16 is %a, not %a", name, n->parameters[i]->source[0].name, j, (double)x,
                          (double)y, (double)z);
        }
    other = load(bf16, RETROFIT_INFERENCE); // written as fp32 from bf16, nothing changes
    need(retrofit_save(other, f32, RETROFIT_F32, NULL), "save");
    retrofit_free(other), other = load(f32, RETROFIT_TRAINING), same(other, n, MASTER, "bf16 to fp32"), retrofit_free(other);
    // another space in the header, and every bf16 lies at an odd address; for the sanitizer
    size_t size;
    char *file = retrofit_read_file(at("bf16/model.safetensors"), &size);
    need(file && ++*(uint8_t *)file, "a header whose length can be raised"), memmove(file + 10, file + 9, size - 9), file[9] = ' ';
    write_file(at("bf16/model.safetensors"), file, size + 1), free(file);
    other = load(bf16, RETROFIT_TRAINING), same(other, n, MASTER, "bf16 at odd addresses"), retrofit_free(other), retrofit_free(n);
    retrofit_free(m), free(f32), free(bf16);
}

static size_t entries(const char *directory) {
    size_t n = 0;
    DIR *d = opendir(directory);
    for (struct dirent *e; d && (e = readdir(d));) n += strcmp(e->d_name, ".") && strcmp(e->d_name, "..");
    if (d) closedir(d);
    return n;
}

// A directory appears whole or not at all, never in place of another.
static void directories(void) {
    char *final = strdup(at("made/of/parts")), name[600];
    for (int round = 0; round < 3; round++) {
        char *temporary = retrofit_directory_begin(round == 1 ? at("made/of/parts/") : final);
        need(temporary != NULL, "begin");
        snprintf(name, sizeof name, "%s/%d", temporary, round), write_file(name, "x", 1);
        check(entries(final) == (round > 0) && strcmp(temporary, final), "round %d: the directory changed before its time", round);
        if (round == 0) check(retrofit_directory_commit(temporary, final), "round %d: %s", round, retrofit_error());
        else refused(retrofit_directory_commit(temporary, final), "parts", "a directory in the place of another");
        retrofit_directory_abandon(temporary);
        size_t all = entries(at("made/of")), files = entries(final);
        check(all == 1 && files == 1, "round %d: %zu directories, %zu files; not one each", round, all, files);
        free(temporary);
    }
    check(!access(at("made/of/parts/0"), R_OK), "the first directory is gone");
    write_file(at("file"), "x", 1);
    refused(retrofit_directory_begin(at("file/sub")), "file", "a directory in a file");
    refused(retrofit_directory_begin(""), "''", "a directory without a name");
    refused(retrofit_directory_commit(at("nothing"), at("other")), "nothing", "commit of what is not there");
    free(final);
}

// ---- Files made to do harm: in root/hostile, beside tiny/base's config.json ---------------------------------------------------
static void hostile_load(const char *name, const char *what) {
    for (int mode = RETROFIT_INFERENCE; mode <= RETROFIT_TRAINING; mode++) {
        retrofit_model *m = retrofit_load(at("hostile"), &retrofit_cpu, (retrofit_mode)mode);
        refused(m != NULL, name, what), retrofit_free(m);
    }
}

static void hostile(const void *data, size_t size, const char *what) {
    write_file(at("hostile/model.safetensors"), data, size), hostile_load("hostile", what);
}

static bool opens(const char *header, size_t data_bytes) {
    char data[1024] = {0};
    uint64_t n = strlen(header);
    retrofit_map f;
    memcpy(data, &n, 8), memcpy(data + 8, header, n), write_file(at("hostile/header"), data, 8 + n + data_bytes);
    bool ok = retrofit_safetensors_open(&f, at("hostile/header"));
    if (ok) retrofit_safetensors_close(&f);
    return ok;
}

static void hostile_bytes(void) {
    size_t size, header;
    char *file = retrofit_read_file(FIXTURES "tiny/base/model.safetensors", &size), *copy = file ? (char *)malloc(size) : NULL, text[512];
    need(copy != NULL, "tiny/base"), memcpy(&header, file, 8);
    for (size_t i = 0; i < 40; i++) { // cut at the seams and anywhere between
        const size_t seams[] = {0, 1, 7, 8, 9, header, header + 7, header + 8, header + 9, size - 4, size - 1};
        hostile(file, i < 11 ? seams[i] : retrofit_hash(1, i) % (i % 2 ? size : header), "a truncated file");
    }
    const uint64_t lengths[] = {0, 1, header - 1, header + 1, size - 8, size - 7, size, 1ull << 31, 1ull << 63, UINT64_MAX - 7, UINT64_MAX};
    for (size_t i = 0; i < 11; i++) {
        snprintf(text, sizeof text, "a header of %llu bytes, where %zu are right", (unsigned long long)lengths[i], header);
        memcpy(copy, file, size), memcpy(copy, &lengths[i], 8), hostile(copy, size, text);
    }
    for (size_t i = 0; i < 200; i++) { // one bit of the header: refused, or harmless
        memcpy(copy, file, size), copy[8 + retrofit_hash(2, i) % header] ^= (char)(1 << i % 8), error_text[0] = 0;
        write_file(at("hostile/model.safetensors"), copy, size);
        retrofit_model *m = retrofit_load(at("hostile"), &retrofit_cpu, RETROFIT_INFERENCE);
        if (!m) refused(false, "hostile", "a header with one bit changed");
        retrofit_free(m);
    }
    free(file), free(copy);
    // dtype, shape, offsets of a tensor a, bytes of data; the first two are right, each of the others has one thing wrong
    char list[] = "'F32' [4] [0,16] 16;'I64' [1] [8,16]},'b':{'dtype':'F32','shape':[2],'data_offsets':[0,8] 16;"
                  "'F32' [1099511627776,1099511627776] [0,64] 64;'F32' [4611686018427387904] [0,0] 0;"
                  "'F32' [4294967296,4294967296,4294967296] [0,0] 0;'F32' [16] [0,63] 63;'F32' [16] [0,65] 65;'F32' [17] [0,68] 64;"
                  "'F32' [4] [32,16] 32;'F32' [4] [-16,0] 16;'F32' [4] [18446744073709551600,0] 16;'F32' [4] [0,1e300] 16;"
                  "'F32' [4] [0.5,16.5] 17;'F32' [4] [0] 16;'F32' [4] [0,16,16] 16;'F32' 4 [0,16] 16;'F32' [-4] [0,16] 16;"
                  "'F32' ['4'] [0,16] 16;'F31' [4] [0,16] 16;7 [4] [0,16] 16;'F31\\n' [4] [0,16] 16;'F32' [1,1,1,1,4] [0,16] 16;"
                  "'F32' [4] [0,16]}, 16;'F32' [4] [0,16]},'b':{'dtype':'F32','shape':[4],'data_offsets':[8,24] 32;"
                  "'F32' [4] [0,16]},'b':{'dtype':'F32','shape':[4],'data_offsets':[0,16] 32;"
                  "'F32' [4] [0,16]},'b':{'dtype':'I64','shape':[1],'data_offsets':[8,16] 24;'F32' [4] [0,16] 17;'F32' [4] [16,32] 32";
    size_t number = 0;
    for (char *e = list; *e; e++) *e = *e == '\'' ? '"' : *e;
    for (char *e = strtok(list, ";"); e; e = strtok(NULL, ";"), number++) {
        char *shape = strchr(e, ' ') + 1, *offsets = strchr(shape, ' ') + 1, *bytes = strrchr(e, ' ');
        snprintf(text, sizeof text, "{\"a\":{\"dtype\":%.*s,\"shape\":%.*s,\"data_offsets\":%.*s}}", (int)(shape - e - 1), e,
                 (int)(offsets - shape - 1), shape, (int)(bytes - offsets), offsets);
        bool ok = opens(text, strtoul(bytes, NULL, 10));
        if (number < 2) check(ok, "%s: %s", text, retrofit_error());
        else refused(ok, "hostile/header", text);
    }
    static const char *const others[] = {"[]", "null", "{\"a\":1}", "{\"a\":{}}", "          ", "{", "{}}"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) refused(opens(others[i], 0), "hostile/header", others[i]);
}

// The tensors of tiny/base, written again with something done to them.
typedef enum { ALL, FIRST_HALF, SECOND_HALF, MISSING, INTEGERS, TURNED, FLAT, F16S } edit;
static uint16_t patterns[1 << 17];
static bool edited(retrofit_tensor *t, edit e) { // false: left out
    static size_t next;
    if (e == FIRST_HALF || e == SECOND_HALF) return (strlen(t->name) % 2 == 0) == (e == FIRST_HALF);
    if (e == INTEGERS && strstr(t->name, "q_proj")) t->type = RETROFIT_I32;
    if (e == TURNED && strstr(t->name, "down_proj")) t->shape[0] = 88, t->shape[1] = 32;
    if (e == FLAT && strstr(t->name, "o_proj")) t->dims = 1, t->shape[0] = 1024;
    if (e == F16S) t->type = RETROFIT_F16, t->data = patterns + (next += t->count) % (1 << 16);
    return e != MISSING || strcmp(t->name, "model.norm.weight");
}
static void rewrite(const char *path, edit e, const char *extra) {
    retrofit_map f;
    need(retrofit_safetensors_open(&f, FIXTURES "tiny/base/model.safetensors"), "tiny/base");
    retrofit_tensor *t = (retrofit_tensor *)retrofit_allocate(f.count + 1, sizeof *t);
    size_t n = 0;
    for (size_t i = 0; i < f.count; i++) t[n] = f.tensors[i], n += edited(&t[n], e);
    if (extra) t[n] = t[0], t[n++].name = extra;
    need(retrofit_safetensors_write(path, &retrofit_cpu, t, n, e == F16S ? RETROFIT_F16 : RETROFIT_F32, NULL), path);
    free(t), retrofit_safetensors_close(&f);
}

static void hostile_tensors(void) {
    char *one = strdup(at("hostile/model.safetensors")), *index = strdup(at("hostile/model.safetensors.index.json"));
    rewrite(one, MISSING, NULL), hostile_load("model.norm.weight", "a missing tensor");
    rewrite(one, INTEGERS, NULL), hostile_load("q_proj", "a weight of integers");
    rewrite(one, TURNED, NULL), hostile_load("down_proj", "a transposed tensor");
    rewrite(one, FLAT, NULL), hostile_load("o_proj", "a flattened tensor");
    rewrite(one, ALL, "model.embed_tokens.weight"), hostile_load("embed_tokens", "a tensor twice");
    rewrite(one, ALL, "model.layers.8.mlp.up_proj.weight"), hostile_load("layers.8", "a tensor too many");
    // F16: every finite pattern, against ldexp
    for (size_t i = 0; i < 1 << 17; i++) patterns[i] = (uint16_t)i & ((i >> 10 & 31) == 31 ? 0xfbff : 0xffff);
    rewrite(one, F16S, NULL);
    for (int mode = RETROFIT_INFERENCE; mode <= RETROFIT_TRAINING; mode++) {
        retrofit_model *m = load(at("hostile"), (retrofit_mode)mode);
        retrofit_map f;
        need(retrofit_safetensors_open(&f, one), one);
        for (size_t i = 0, bad = 0; i < m->parameter_count; i++) {
            const float *w = (const float *)m->parameters[i]->weight.data;
            need(m->parameters[i]->weight.type == RETROFIT_F32, "F16 read as F32");
            for (size_t j = 0; j < m->parameters[i]->sources; j++) {
                const retrofit_tensor *t = fixture(&f, "%s", m->parameters[i]->source[j].name);
                for (size_t k = 0; !bad && k < t->count; k++, w++) {
                    int bits = ((const uint16_t *)t->data)[k], e = bits >> 10 & 31;
                    double value = (bits & 0x8000 ? -1 : 1) * ldexp((e ? 1024 : 0) + (bits & 1023), (e ? e : 1) - 25);
                    bad += !check((double)*w == value, "F16 %04x is read as %.9g, not %.9g", bits, (double)*w, value);
                }
            }
        }
        retrofit_safetensors_close(&f), retrofit_free(m);
    }
    remove(one), hostile_load("hostile", "no weights");

    // in shards: as good as whole; but not without a shard, nor with a tensor in both, nor from outside the directory
    retrofit_model *whole = load(FIXTURES "tiny/base", RETROFIT_TRAINING), *m;
    rewrite(at("hostile/one.st"), FIRST_HALF, NULL), rewrite(at("hostile/two.st"), SECOND_HALF, NULL);
    static const char good[] = "{\"weight_map\":{\"a\":\"one.st\",\"b\":\"two.st\",\"c\":\"one.st\"}}";
    write_file(index, good, sizeof good - 1);
    m = load(at("hostile"), RETROFIT_TRAINING), same(m, whole, MASTER, "shards against one file"), retrofit_free(m);
    rewrite(at("hostile/two.st"), ALL, NULL), hostile_load("hostile", "tensors in two shards");
    rewrite(at("hostile/two.st"), SECOND_HALF, NULL);
    char maps[] = "{'a':'one.st'};{'a':'three.st'};{'a':'../hostile/one.st','b':'two.st'};{'a':'..'};{'a':''};{'a':1};[];7;[";
    for (char *e = maps; *e; e++) *e = *e == '\'' ? '"' : *e;
    for (char *e = strtok(maps, ";"), text[128]; e; e = strtok(NULL, ";"))
        snprintf(text, sizeof text, "{\"weight_map\":%s}", e), write_file(index, text, strlen(text)), hostile_load("hostile", text);
    write_file(index, "{}", 2), hostile_load("hostile", "an index without a map");
    write_file(index, "", 0), hostile_load("hostile", "an empty index");
    remove(index), retrofit_free(whole), free(one), free(index);
}

// A config made of `fields` ("key value;…"), with key's value replaced, or left out if value is NULL.
static bool read_config(const char *fields, const char *key, const char *value) {
    char text[2048], *end = text + sprintf(text, "{\"comment\":0");
    for (const char *f = fields; *f; f += strcspn(f, ";"), f += *f == ';') {
        int name = (int)strcspn(f, " "), all = (int)strcspn(f, ";");
        if ((size_t)name != strlen(key) || memcmp(f, key, strlen(key)))
            end += sprintf(end, ",\"%.*s\":%.*s", name, f, all - name - 1, f + name + 1);
    }
    if (value) end += sprintf(end, ",\"%s\":%s", key, value);
    sprintf(end, "}"), write_file(at("hostile/config.json"), text, strlen(text));
    retrofit_config c;
    return retrofit_config_read(&c, at("hostile"));
}

static void hostile_configs(void) {
    static const char llama[] = "model_type \"llama\";hidden_size 32;num_attention_heads 4;intermediate_size 88;num_hidden_layers 8;"
                                "vocab_size 131;max_position_embeddings 128";
    static const char raven[] = "model_type \"huginn_raven\";n_embd 32;n_heads 4;intermediate_size 88;n_layers_in_prelude 2;"
                                "n_layers_in_recurrent_block 3;n_layers_in_coda 2;vocab_size 131;max_position_embeddings 128;norm_eps 1e-5";
    const char *const bad[] = {
        NULL, "-1",  "1.5",  "1e30", "99999999999999999999", "1e999", "9007199254740993", "\"8\"", "null", "true", "[8]",
        "{}", "NaN", "0x10", "08"};
    char what[256], key[64];
    check(read_config(llama, "", NULL) && read_config(raven, "", NULL), "the configs these are made from: %s", retrofit_error());
    for (int recurrent = 0; recurrent < 2; recurrent++) // what every config must have, and all it must not be
        for (const char *f = recurrent ? raven : llama; *f; f += strcspn(f, ";"), f += *f == ';')
            for (size_t j = 0; j < sizeof bad / sizeof *bad; j++) {
                snprintf(key, sizeof key, "%.*s", (int)strcspn(f, " "), f);
                snprintf(what, sizeof what, "config with %s %s", key, bad[j] ? bad[j] : "missing");
                refused(read_config(recurrent ? raven : llama, key, bad[j]), "config.json", what);
            }
    char llamas[] =
        "num_attention_heads 0;hidden_size 0;vocab_size 0;num_hidden_layers 0;intermediate_size 0;max_position_embeddings 0;"
        "num_attention_heads 3;num_attention_heads 32;num_key_value_heads 3;num_key_value_heads 0;num_key_value_heads 8;"
        "num_key_value_heads -2;head_dim 16;head_dim '8';rms_norm_eps 0;rms_norm_eps -1;rms_norm_eps 1e30;rms_norm_eps 1e300;"
        "rms_norm_eps 'x';rope_theta 0;rope_theta -5;rope_theta 1e300;rope_theta [];rope_scaling {'rope_type':'yarn','factor':4};"
        "rope_scaling {'rope_type':'llama3'};rope_scaling {'type':'linear','factor':2};rope_scaling {'rope_type':'llama3','factor':32,"
        "'low_freq_factor':4,'high_freq_factor':1,'original_max_position_embeddings':8192};model_type 'gpt2';model_type '';"
        "attention_bias true;mlp_bias true;hidden_act 'gelu';eos_token_id 'x';bos_token_id 'x'";
    char ravens[] =
        "n_layers_in_coda 5000;n_layers_in_recurrent_block 0;n_layers_in_recurrent_block 1e15;mean_recurrence 0;mean_recurrence -3;"
        "mean_recurrence 1e300;mean_recurrence '8';mean_backprop_depth 0;mean_backprop_depth 70000;init_values {'std':-1};"
        "init_values {'std':1e9};init_values {'embed_scale':2};tie_embeddings true;norm_class_name 'RMSNorm';qk_bias true";
    for (int recurrent = 0; recurrent < 2; recurrent++) {
        char *list = recurrent ? ravens : llamas;
        for (char *e = list; *e; e++) *e = *e == '\'' ? '"' : *e;
        for (char *e = strtok(list, ";"); e; e = strtok(NULL, ";")) {
            snprintf(what, sizeof what, "config with %s", e), e[strcspn(e, " ")] = 0;
            refused(read_config(recurrent ? raven : llama, e, e + strlen(e) + 1), "config.json", what);
        }
    }
    read_config(llama, "eos_token_id", "[1e300, 2]"); // accepted or not, without an undefined cast
    size_t size;
    char *config = retrofit_read_file(FIXTURES "tiny/base/config.json", &size);
    retrofit_config c;
    for (size_t cut = 0; config && cut + 1 < size; cut++) { // the last byte may be a newline
        write_file(at("hostile/config.json"), config, cut);
        refused(retrofit_config_read(&c, at("hostile")), "config.json", "a truncated config.json");
    }
    free(config), remove(at("hostile/config.json")), hostile_load("config.json", "no config.json");
}

// ---- Token shards --------------------------------------------------------------------------------------------------------------
static void shard_file(const char *name, int32_t magic, int32_t version, int32_t promised, size_t count, uint32_t first) {
    FILE *f = fopen(at("%s", name), "wb");
    int32_t header[256] = {magic, version, promised};
    fwrite(header, 4, 256, f);
    for (size_t i = 0; i < count; i++) {
        uint32_t id = first + (uint32_t)i;
        uint16_t narrow = (uint16_t)id;
        fwrite(magic == RETROFIT_SHARD_MAGIC_16 ? (void *)&narrow : (void *)&id, magic == RETROFIT_SHARD_MAGIC_16 ? 2 : 4, 1, f);
    }
    fclose(f);
}

static void shards(void) {
    enum { T = 4 };
    int32_t x[T], y[T];
    shard_file("b_2.bin", RETROFIT_SHARD_MAGIC_16, 1, 12, 12, 65000), shard_file("b_0.bin", RETROFIT_SHARD_MAGIC_32, 7, 23, 23, 100000),
        shard_file("b_1.bin", RETROFIT_SHARD_MAGIC_16, 1, 3, 3, 0);
    retrofit_data *d = retrofit_data_open(at("b_*.bin"), T, 131072, false, 0), *e;
    need(d != NULL, "shards");
    check(retrofit_data_rows(d) == 6, "%zu rows, not 4 of the first shard, none of the second, 2 of the third", retrofit_data_rows(d));
    for (uint64_t i = 0; i < 20; i++) {
        int32_t first = i % 6 < 4 ? 100000 + 5 * (int32_t)(i % 6) : 65000 + 5 * (int32_t)(i % 6 - 4);
        bool ok = retrofit_data_row(d, i, x, y);
        for (int t = 0; t < T; t++) ok = ok && x[t] == first + t && y[t] == first + t + 1;
        check(ok, "row %d starts with %d, %d; not %d", (int)i, x[0], x[1], first);
    }
    retrofit_data_close(d);

    enum { N = 500 }; // rows of one token and the next
    shard_file("many.bin", RETROFIT_SHARD_MAGIC_32, 7, 2 * N, 2 * N, 0);
    d = retrofit_data_open(at("many.bin"), 1, 2 * N, true, 5), e = retrofit_data_open(at("many.bin"), 1, 2 * N, true, 6);
    need(d && e, "many.bin");
    static int32_t order[4][N];
    for (size_t epoch = 0; epoch < 4; epoch++) { // the fourth is another seed's first
        static size_t seen[N];
        memset(seen, 0, sizeof seen);
        size_t lost = 0, fixed = 0;
        for (size_t i = 0; i < N; i++) {
            need(retrofit_data_row(epoch == 3 ? e : d, epoch % 3 * N + i, &order[epoch][i], y) && y[0] == order[epoch][i] + 1, "row");
            seen[order[epoch][i] / 2]++, fixed += order[epoch][i] / 2 == (int32_t)i;
        }
        for (size_t i = 0; i < N; i++) lost += seen[i] != 1;
        check(lost == 0 && fixed < 10, "epoch %zu: %zu rows not seen once, %zu in their old place", epoch, lost, fixed);
        for (size_t other = 0; other < epoch; other++)
            check(memcmp(order[epoch], order[other], sizeof *order) != 0, "orders %zu and %zu are equal", epoch, other);
    }
    retrofit_data_close(e), e = retrofit_data_open(at("many.bin"), 1, 2 * N, true, 5);
    for (size_t i = 3 * N; i--;) // backwards, from another reader of the same seed
        if (need(retrofit_data_row(e, i, x, y), "row"), x[0] != order[i / N][i % N]) {
            check(false, "row %zu depends on what was read before", i);
            break;
        }
    retrofit_data_close(d), retrofit_data_close(e);

    d = retrofit_data_open(at("b_2.bin"), T, 65009, false, 0), need(d != NULL, "b_2.bin");
    check(retrofit_data_row(d, 0, x, y), "ids below the vocabulary: %s", retrofit_error()),
        refused(retrofit_data_row(d, 1, x, y), "b_2.bin", "an id of V"), retrofit_data_close(d);
    const struct {
        int32_t magic, version, promised, count;
        const char *what;
    } bad[] = {
        // clang-format off
        {RETROFIT_SHARD_MAGIC_16, 1, 20, 19, "a truncated shard"}, {RETROFIT_SHARD_MAGIC_16, 1, 19, 20, "tokens too many"},
        {RETROFIT_SHARD_MAGIC_16, 1, -20, 20, "a negative count"}, {RETROFIT_SHARD_MAGIC_16, 7, 20, 20, "another version"},
        {RETROFIT_SHARD_MAGIC_32, 1, 20, 20, "another version"}, {20240521, 1, 20, 20, "another magic"},
        {RETROFIT_SHARD_MAGIC_16, 1, 4, 4, "fewer tokens than a row"}, {RETROFIT_SHARD_MAGIC_16, 1, 0, 0, "no tokens"}}; // clang-format on
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        shard_file("bad.bin", bad[i].magic, bad[i].version, bad[i].promised, (size_t)bad[i].count, 0);
        refused(retrofit_data_open(at("bad.bin"), T, 99, i % 2, 0), "bad.bin", bad[i].what);
    }
    write_file(at("bad.bin"), "\0", 1), refused(retrofit_data_open(at("bad.bin"), T, 99, false, 0), "bad.bin", "a shard of one byte");
    write_file(at("bad.bin"), "", 0),
        refused(retrofit_data_open(at("b*.bin"), T, 131072, false, 0), "bad.bin", "an empty file among shards");
    // A shard says which tokenizer made it, or does not.
    int32_t header[256];
    shard_file("bad.bin", RETROFIT_SHARD_MAGIC_16, 1, 20, 20, 0);
    d = retrofit_data_open(at("bad.bin"), T, 99, false, 0);
    check(d && retrofit_data_check(d, 1) && retrofit_data_check(d, 2), "a shard that does not name its tokenizer is refused"),
        retrofit_data_close(d);
    FILE *f = fopen(at("bad.bin"), "r+b");
    need(f && fread(header, sizeof header, 1, f) == 1, "bad.bin"), rewind(f);
    header[3] = -2, header[4] = 5;
    need(fwrite(header, sizeof header, 1, f) == 1 && !fclose(f), "bad.bin");
    d = retrofit_data_open(at("bad.bin"), T, 99, false, 0);
    check(d && retrofit_data_check(d, 5ull << 32 | 0xfffffffe), "the tokenizer of a shard is not known again: %s", retrofit_error());
    refused(d && retrofit_data_check(d, 5), "bad.bin", "another tokenizer's shard"), retrofit_data_close(d);
    refused(retrofit_data_open(at("none*.bin"), T, 99, false, 0), "none*.bin", "a pattern without a match");
}

int main(void) {
    strcpy(root, "/tmp/retrofit_XXXXXX");
    size_t size;
    char *text = retrofit_read_file(FIXTURES "tiny/train.json", &size);
    need(mkdtemp(root) && !atexit(remove_root), "temporary directory");
    need(text && (recipe = retrofit_json_parse(text, size, "train.json")) &&
             retrofit_safetensors_open(&fixtures, FIXTURES "tiny/train.safetensors"),
         "fixtures");
    sampler(), schedules();
    ten_steps(RETROFIT_ADAMW), ten_steps(RETROFIT_MUON), ten_steps(RETROFIT_ELLISADAM);
    finite_differences(FIXTURES "tiny/recurrent", 3), finite_differences(FIXTURES "tiny/base", 0);
    truncation(), unrolled(), state_sizes(), freezing(), flops(), accumulation(), decay(RETROFIT_ADAMW), decay(RETROFIT_MUON),
        decay(RETROFIT_ELLISADAM), throttling(), baseline();
    there_and_back(FIXTURES "tiny/recurrent"), there_and_back(FIXTURES "tiny/base"), there_and_back(FIXTURES "llama3/recurrent");
    directories();
    char *config = retrofit_read_file(FIXTURES "tiny/base/config.json", &size);
    need(config && !mkdir(at("hostile"), 0777), "hostile"), write_file(at("hostile/config.json"), config, size), free(config);
    hostile_bytes(), hostile_tensors(), hostile_configs(), shards();
    retrofit_json_free(recipe), free(text), retrofit_safetensors_close(&fixtures);
    return finish("train");
}

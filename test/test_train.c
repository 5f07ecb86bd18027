// Training end to end against the authors' runs; gradients against finite differences and against
// unrolled models; checkpoints and token shards written and read back; and damaged files.
#include "test.h"
#include <ftw.h>

#define TINY  FIXTURES "tiny/recurrent"
#define PLAIN FIXTURES "tiny/base"

static char root[64]; // everything is written under this directory, which is removed at the end

static int remove_entry(const char *path, const struct stat *status, int type, struct FTW *where) {
    (void)status;
    (void)type;
    (void)where;
    return remove(path);
}

static void remove_root(void) { nftw(root, remove_entry, 8, FTW_DEPTH | FTW_PHYS); }

// A path under root; eight of them can be in use at a time.
__attribute__((format(printf, 1, 2))) static char *at(const char *format, ...) {
    static char paths[8][512];
    static size_t next;
    char *path = paths[next++ % 8];
    int length = snprintf(path, sizeof *paths, "%s/", root);
    va_list args;
    va_start(args, format);
    vsnprintf(path + length, sizeof *paths - (size_t)length, format, args);
    va_end(args);
    return path;
}

static void write_file(const char *path, const void *data, size_t size) {
    FILE *f = fopen(path, "wb");
    need(f && fwrite(data, 1, size, f) == size && !fclose(f), path);
}

static void write_text(const char *path, const char *text) { write_file(path, text, strlen(text)); }

// A call must have failed, with an error of one line that contains `name`.
static void refused(bool worked, const char *name, const char *what) {
    const char *error = retrofit_error();
    bool one_line = *error && !strchr(error, '\n') && strstr(error, name);
    check(!worked && one_line, "%s: %s, error \"%s\" (must name %s)", what,
          worked ? "accepted" : "refused", error, name);
    error_text[0] = 0;
}

static retrofit_model *load(const char *path, retrofit_mode mode) {
    retrofit_model *model = retrofit_load(path, &retrofit_cpu, mode);
    need(model != NULL, path);
    return model;
}

static retrofit_model *load_tiny(void) { return load(TINY, RETROFIT_TRAINING); }

// What of a parameter two models are compared by.
typedef enum { MASTER, GRADIENT, FIRST_MOMENT, SECOND_MOMENT } quantity;

static const float *numbers(const retrofit_parameter *p, quantity which) {
    switch (which) {
    case MASTER: return p->master;
    case GRADIENT: return p->grad;
    case FIRST_MOMENT: return p->m;
    default: return p->v;
    }
}

// By relative_error; 0 only if all bits are equal.
static double parameter_difference(const retrofit_parameter *p, const retrofit_parameter *q,
                                   quantity which) {
    const float *x = numbers(p, which), *y = numbers(q, which);
    size_t n = p->rows * p->cols;
    if (p->rows != q->rows || p->cols != q->cols || !x != !y) return INFINITY;
    if (!x || !memcmp(x, y, n * sizeof *x)) return 0;
    return relative_error(x, y, n) + 1e-30;
}

// The largest difference between parameters of two models, and the name of that parameter.
static double difference(const retrofit_model *a, const retrofit_model *b, quantity which,
                         const char **name) {
    double worst = 0;
    need(a->parameter_count == b->parameter_count, "models of one shape");
    for (size_t i = 0; i < a->parameter_count; i++) {
        double error = parameter_difference(a->parameters[i], b->parameters[i], which);
        if (error <= worst) continue;
        worst = error;
        *name = a->parameters[i]->source[0].name;
    }
    return worst;
}

static void same(const retrofit_model *a, const retrofit_model *b, quantity which,
                 const char *what) {
    const char *name = "";
    double error = difference(a, b, which, &name);
    check(error == 0, "%s: %s differs by %.2e, but every bit should be the same", what, name,
          error);
}

static void same_masters_and_moments(const retrofit_model *a, const retrofit_model *b,
                                     const char *what) {
    same(a, b, MASTER, what);
    same(a, b, FIRST_MOMENT, what);
    same(a, b, SECOND_MOMENT, what);
}

// ---- The authors' tables -----------------------------------------------------------------------

// A table of fixtures/tables, after its line of titles.
static FILE *open_tsv(const char *path) {
    FILE *f = fopen(path, "r");
    need(f && fscanf(f, "%*[^\n]") == 0, path);
    return f;
}

static void sampler(void) {
    FILE *f = open_tsv(FIXTURES "tables/sampler.tsv");
    size_t m, r, K, n, k, count = 0;
    double rate;
    while (fscanf(f, "%zu %zu %zu %lf %zu %zu", &m, &r, &K, &rate, &n, &k) == 6) {
        size_t our_n, our_k;
        float our_rate;
        retrofit_draw_recurrences(m, r, K, &our_n, &our_k, &our_rate);
        check(our_rate == (float)rate && our_n == n && our_k == k,
              "draw %zu, mean %zu, K %zu: rate %.9g (%zu,%zu), the authors' %.9g (%zu,%zu)", m, r,
              K, (double)our_rate, our_n, our_k, rate, n, k);
        count++;
    }
    fclose(f);
    check(count == 8000, "%zu draws in the table, not 8000", count);
}

typedef struct {
    char name[32];
    size_t S, t, rounded_up;
    double w, c, min, peak, value;
} schedule_row;

static bool read_schedule_row(FILE *f, schedule_row *row) {
    return fscanf(f, "%31s %zu %lf %lf %lf %lf %zu %lf %zu", row->name, &row->S, &row->w, &row->c,
                  &row->min, &row->peak, &row->t, &row->value, &row->rounded_up) == 9;
}

static double our_schedule(const schedule_row *row) {
    size_t S = row->S, t = row->t;
    double w = row->w, peak = row->peak;
    if (!strcmp(row->name, "learning_rate"))
        return retrofit_learning_rate(t, S, w, row->c, row->min, peak);
    if (!strcmp(row->name, "recurrence_linear"))
        return retrofit_curriculum(RETROFIT_CURRICULUM_LINEAR, t, S, w, peak);
    if (!strcmp(row->name, "recurrence_1-sqrt"))
        return retrofit_curriculum(RETROFIT_CURRICULUM_1_SQRT, t, S, w, peak);
    if (!strcmp(row->name, "backprop_linear"))
        return retrofit_linear_schedule(t, S, w, row->min, peak);
    return NAN;
}

static void schedules(void) {
    FILE *f = open_tsv(FIXTURES "tables/schedules.tsv");
    schedule_row row;
    size_t count = 0;
    while (read_schedule_row(f, &row)) {
        double ours = our_schedule(&row);
        // The relative rounding error of a double is 1.1e-16. Near the end of the decay 1 + cos(πx)
        // cancels, which costs digits of what the learning rate is above min·lr.
        bool close = fabs(ours - row.value) <= 1e-15 * fabs(row.value);
        check(close && (size_t)ceil(ours) == row.rounded_up,
              "%s S %zu w %g step %zu: %.17g, ceil %g; the authors' %.17g, %zu", row.name, row.S,
              row.w, row.t, ours, ceil(ours), row.value, row.rounded_up);
        count++;
    }
    fclose(f);
    check(count == 1629, "%zu rows of schedules, not 1629", count);
}

// The tables' warm-ups are whole numbers of steps. Ours are rounded up: 2.5 of 10 steps are 3, and
// so it is with the decay.
static void rounded_shares(void) {
    double warmup = retrofit_learning_rate(2, 10, 0.25, 0.25, 0.1, 1);
    double decay = retrofit_learning_rate(8, 10, 0.25, 0.25, 0.1, 1);
    check(fabs(warmup - 0.7) < 1e-15 && fabs(decay - 0.775) < 1e-15,
          "warm-up or decay not rounded up: %.17g, %.17g", warmup, decay);
}

// ---- The authors' ten steps --------------------------------------------------------------------

static const char *const names[] = {"adamw", "muon", "ellisadam"}; // by retrofit_optimizer_kind
static retrofit_map fixtures;
// tiny/train.json: the settings of those runs, and what they logged.
static retrofit_json *recipe;
enum { STEPS = 10, ROWS = 2 }; // steps of a run; rows in a micro-batch

static double setting(const char *key) {
    const retrofit_json *value = retrofit_json_get(recipe, key);
    need(value && value->type == RETROFIT_JSON_NUMBER, key);
    return value->number;
}

static const int32_t *train_tokens(void) { return fixture(&fixtures, "train.tokens")->data; }

// T: rows of train.tokens hold T + 1 tokens.
static size_t train_length(void) { return fixture(&fixtures, "train.tokens")->shape[1] - 1; }

static retrofit_buffers *new_buffers(const retrofit_model *model, size_t rows, size_t T, size_t K,
                                     retrofit_keep keep) {
    retrofit_buffers *buffers = retrofit_buffers_new(model, rows, T, K, keep, NULL);
    need(buffers != NULL, "buffers");
    return buffers;
}

// For rows of train.tokens.
static retrofit_buffers *train_buffers(const retrofit_model *model, size_t rows, size_t K) {
    return new_buffers(model, rows, train_length(), K, RETROFIT_KEEP_ALL);
}

static void init_optimizer(retrofit_model *model, retrofit_optimizer_kind kind) {
    need(retrofit_optimizer_init(model, kind), "moments");
}

static void run_forward(retrofit_buffers *buffers, const int32_t *tokens, size_t b, size_t t,
                        float sigma, uint64_t seed, size_t n, size_t k) {
    need(retrofit_forward(buffers, tokens, b, t, sigma, seed, n, k), "forward");
}

// Rows first … first + count - 1 of train.tokens from the zero state through n recurrences without
// gradient and k with; unless scale is 0, the gradient of scale·loss is added. Returns the loss.
static double pass(retrofit_buffers *buffers, size_t first, size_t count, size_t n, size_t k,
                   float scale) {
    size_t T = train_length();
    need(first + count <= fixture(&fixtures, "train.tokens")->shape[0], "rows of train.tokens");
    int32_t *tokens = retrofit_allocate(2 * count * T, sizeof *tokens);
    int32_t *labels = tokens + count * T;
    for (size_t i = 0; i < count; i++) {
        const int32_t *row = train_tokens() + (first + i) * (T + 1);
        memcpy(tokens + i * T, row, T * sizeof *tokens);
        memcpy(labels + i * T, row + 1, T * sizeof *labels);
    }
    run_forward(buffers, tokens, count, T, 0, 0, n, k);
    double loss = retrofit_loss(buffers, labels, scale);
    need(isfinite(loss), "loss");
    if (scale != 0) retrofit_backward(buffers);
    free(tokens);
    return loss;
}

// Element i of a list; what is no list stays as it is.
static const retrofit_json *element(const retrofit_json *value, size_t i) {
    if (!value || value->type != RETROFIT_JSON_ARRAY) return value;
    value = value->child;
    while (value && i > 0) {
        value = value->next;
        i--;
    }
    return value;
}

// record[key], or record[key][i], or record[key][i][j].
static double recorded(const retrofit_json *record, const char *key, size_t i, size_t j) {
    const retrofit_json *value = element(element(retrofit_json_get(record, key), i), j);
    need(value && value->type == RETROFIT_JSON_NUMBER, key);
    return value->number;
}

static void close_to(double ours, double theirs, double tolerance, const char *name, size_t step,
                     const char *what) {
    double error = fabs(ours - theirs);
    check(error <= tolerance * fabs(theirs), "%s step %zu: %s %.9g, the authors' %.9g (%.1e)", name,
          step + 1, what, ours, theirs, error / fabs(theirs));
}

static retrofit_optimizer recipe_optimizer(retrofit_optimizer_kind kind, double lr,
                                           double muon_lr) {
    const retrofit_json *betas = retrofit_json_get(recipe, "betas");
    const float eps[] = {(float)setting("eps"), 1e-10f, 1e-6f}; // by kind
    return (retrofit_optimizer){.kind = kind,
                                .lr = (float)lr,
                                .muon_lr = (float)muon_lr,
                                .beta1 = (float)betas->child->number,
                                .beta2 = (float)betas->child->next->number,
                                .eps = eps[kind],
                                .peak_lr = (float)setting("lr"),
                                .weight_decay = (float)setting("weight_decay"),
                                .momentum = 0.95f,
                                .clip = (float)setting("clip")};
}

// The gradient of one step's micro-batches. `record`: the authors' of that step, or NULL.
static void accumulate(retrofit_buffers *buffers, const char *name, size_t step, size_t mean,
                       size_t depth, const retrofit_json *record) {
    size_t micro_batches = (size_t)setting("accumulation");
    for (size_t i = 0; i < micro_batches; i++) {
        size_t n, k, number = step * micro_batches + i; // of all micro-batches
        retrofit_draw_recurrences(number + 1, mean, depth, &n, &k, NULL);
        double loss = pass(buffers, ROWS * number, ROWS, n, k, 1.0f / (float)micro_batches);
        if (!record) continue;
        double their_n = recorded(record, "nk", i, 0), their_k = recorded(record, "nk", i, 1);
        check((double)n == their_n && (double)k == their_k, "%s step %zu: drew (%zu,%zu)", name,
              step + 1, n, k);
        close_to(loss, recorded(record, "micro_losses", i, 0), 1e-5, name, step, "loss");
    }
}

// Step number `step` (from 0) of the recipe, compared with the authors' record of it if given.
static void train_step(retrofit_model *model, retrofit_buffers *buffers,
                       retrofit_optimizer_kind kind, size_t step, const retrofit_json *record) {
    const char *name = names[kind];
    double warmup = setting("lr_warmup"), cooldown = setting("lr_cooldown");
    double min = setting("min_lr_ratio");
    double real_mean =
        retrofit_curriculum(RETROFIT_CURRICULUM_1_SQRT, step, STEPS, setting("curriculum_warmup"),
                            setting("max_mean_recurrence"));
    size_t mean = retrofit_max((size_t)ceil(real_mean), 1);
    size_t depth = retrofit_min((size_t)setting("max_backprop_depth"), mean);

    retrofit_zero_grad(model);
    accumulate(buffers, name, step, mean, depth, record);
    double lr = retrofit_learning_rate(step, STEPS, warmup, cooldown, min, setting("lr"));
    double muon_lr = retrofit_learning_rate(step, STEPS, warmup, cooldown, min, setting("muon_lr"));
    retrofit_optimizer optimizer = recipe_optimizer(kind, lr, muon_lr);
    double norm = retrofit_optimizer_step(model, &optimizer, step + 1);

    if (!record) return;
    bool planned = (double)mean == recorded(record, "mean_recurrence", 0, 0) &&
                   (double)depth == recorded(record, "backprop_depth", 0, 0);
    check(planned, "%s step %zu: mean recurrence %zu, backprop depth %zu", name, step + 1, mean,
          depth);
    // Their ELLISAdam keeps its learning rate in fp32.
    double exact = kind == RETROFIT_ELLISADAM ? 0x1p-23 : 1e-15;
    close_to(lr, recorded(record, "lr", 0, 0), exact, name, step, "learning rate");
    double first = recorded(record, "lr_first_group", 0, 0);
    close_to(kind == RETROFIT_MUON ? muon_lr : lr, first, exact, name, step,
             "first group's learning rate");
    close_to(norm, recorded(record, "grad_norm", 0, 0), 1e-5, name, step, "gradient norm");
}

// Steps first … last - 1, in buffers of their own.
static void train_steps(retrofit_model *model, retrofit_optimizer_kind kind, size_t first,
                        size_t last, const retrofit_json *records) {
    retrofit_buffers *buffers = train_buffers(model, ROWS, 4);
    for (size_t step = first; step < last; step++) {
        train_step(model, buffers, kind, step, records);
        if (records) records = records->next;
    }
    retrofit_buffers_free(buffers);
}

static void compare_final_parameters(const retrofit_model *model, const char *name) {
    retrofit_model *start = load_tiny();
    double worst = 0, least_moved = INFINITY;
    for (size_t i = 0; i < model->parameter_count; i++) {
        const retrofit_parameter *p = model->parameters[i];
        const char *label = p->source[0].name;
        const retrofit_tensor *final = fixture(&fixtures, "%s.final.%s", name, label);
        size_t n = p->rows * p->cols;
        double error = relative_error(p->master, final->data, n);
        double moved = relative_error(start->parameters[i]->master, final->data, n);
        check(final->count == n && error < 1e-4,
              "%s: %s after ten steps is off by %.2e; it moved by %.2e", name, label, error, moved);
        worst = fmax(worst, error);
        least_moved = fmin(least_moved, moved);
    }
    printf("%s: worst final parameter %.1e off, where each moved by %.1e or more\n", name, worst,
           least_moved);
    retrofit_free(start);
}

// The moments of a checkpoint are refused by another optimizer and by another model.
static void refuse_other_moments(retrofit_optimizer_kind kind, const char *directory) {
    retrofit_model *other = load_tiny(), *plain = load(PLAIN, RETROFIT_TRAINING);
    retrofit_map f;
    init_optimizer(other, kind == RETROFIT_MUON ? RETROFIT_ADAMW : RETROFIT_MUON);
    init_optimizer(plain, kind);
    refused(retrofit_load_optimizer(other, &f, directory), directory,
            "moments of another optimizer");
    refused(retrofit_load_optimizer(plain, &f, directory), directory, "moments of another model");
    refused(retrofit_load_optimizer(other, &f, root), "optimizer.safetensors",
            "moments that are not there");
    retrofit_free(other);
    retrofit_free(plain);
}

static void save_checkpoint(const retrofit_model *model, const char *directory) {
    const char *metadata[] = {"step", "5", "a \"key\"", "a\tvalue\n", NULL};
    char *temporary = retrofit_directory_begin(directory);
    need(temporary != NULL, "temporary directory");
    need(retrofit_save(model, temporary, RETROFIT_F32, NULL), "model.safetensors");
    need(retrofit_save_optimizer(model, temporary, metadata), "optimizer.safetensors");
    need(retrofit_directory_commit(temporary, directory), "checkpoint");
    free(temporary);
}

// What save_checkpoint wrote for that optimizer, with its metadata checked.
static retrofit_model *load_checkpoint(retrofit_optimizer_kind kind, const char *directory) {
    retrofit_map f;
    retrofit_model *model = load(at("runs/%s", names[kind]), RETROFIT_TRAINING); // finds latest
    init_optimizer(model, kind);
    need(retrofit_load_optimizer(model, &f, directory), "optimizer.safetensors");
    const char *step = retrofit_safetensors_metadata(&f, "step");
    const char *odd = retrofit_safetensors_metadata(&f, "a \"key\"");
    bool right = step && !strcmp(step, "5") && odd && !strcmp(odd, "a\tvalue\n");
    check(right && !retrofit_safetensors_metadata(&f, "none"), "metadata came back as %s, %s",
          step ? step : "nothing", odd ? odd : "nothing");
    retrofit_safetensors_close(&f);
    return model;
}

static void ten_steps(retrofit_optimizer_kind kind) {
    const char *name = names[kind];
    retrofit_model *whole = load_tiny();
    init_optimizer(whole, kind);
    const retrofit_json *records = retrofit_json_get(retrofit_json_get(recipe, "runs"), name);
    need(records && records->count >= STEPS, "ten records");
    train_steps(whole, kind, 0, STEPS, records->child);
    compare_final_parameters(whole, name);

    // The same run, interrupted after five steps, must give the same bits: files hold all there is.
    retrofit_model *first_half = load_tiny();
    init_optimizer(first_half, kind);
    train_steps(first_half, kind, 0, 5, NULL);
    char *directory = strdup(at("runs/%s/latest", name));
    save_checkpoint(first_half, directory);
    retrofit_model *second_half = load_checkpoint(kind, directory);
    same_masters_and_moments(second_half, first_half, "read back");
    train_steps(second_half, kind, 5, STEPS, NULL);
    same_masters_and_moments(second_half, whole, name);
    refuse_other_moments(kind, directory);

    free(directory);
    retrofit_free(whole);
    retrofit_free(first_half);
    retrofit_free(second_half);
}

// ---- Gradients ---------------------------------------------------------------------------------

// A unit vector u: g/‖g‖, or half of that and half of a vector of random signs. Returns g·u.
static double draw_direction(double *u, const retrofit_parameter *p, double size, bool random,
                             uint64_t seed) {
    size_t n = p->rows * p->cols;
    double squares = 0, slope = 0;
    for (size_t j = 0; j < n; j++) {
        float sign = retrofit_hash(seed, j) & 1 ? 1.0f : -1.0f;
        float x = p->grad[j] / (float)size + (random ? sign / sqrtf((float)n) : 0);
        u[j] = x;
        squares += (double)x * x;
    }
    for (size_t j = 0; j < n; j++) {
        slope += (double)p->grad[j] * u[j] / sqrt(squares);
        u[j] /= sqrt(squares);
    }
    return slope;
}

// The slope of the loss along u at the parameter's value, from four losses L(x) at x = ±h, ±2h:
// (8·(L(h) - L(-h)) - (L(2h) - L(-2h))) / 12h. It is off by O(h⁴), which allows steps large enough
// for fp32.
static double difference_quotient(retrofit_buffers *buffers, retrofit_parameter *p, const double *u,
                                  double h, size_t k) {
    static const double steps[] = {-2, -1, 1, 2};
    size_t n = p->rows * p->cols;
    double loss[4];
    float *old = retrofit_allocate(n, sizeof *old);
    memcpy(old, p->master, n * sizeof *old);
    for (int s = 0; s < 4; s++) {
        for (size_t j = 0; j < n; j++) p->master[j] = (float)(old[j] + steps[s] * h * u[j]);
        loss[s] = pass(buffers, 0, ROWS, 0, k, 0);
    }
    memcpy(p->master, old, n * sizeof *old);
    free(old);
    return (8 * (loss[2] - loss[1]) - (loss[3] - loss[0])) / (12 * h);
}

// Along a unit direction u of one tensor the slope of the loss must be g·u. What finite differences
// leave of an error is far below 1e-3 of ‖g‖.
static void finite_differences(const char *name, size_t k) {
    retrofit_model *model = load(name, RETROFIT_TRAINING);
    retrofit_buffers *buffers = train_buffers(model, ROWS, k);
    double worst = 0;
    pass(buffers, 0, ROWS, 0, k, 1);
    for (size_t i = 0; i < model->parameter_count; i++) {
        retrofit_parameter *p = model->parameters[i];
        size_t n = p->rows * p->cols;
        double *u = retrofit_allocate(n, sizeof *u), squares = 0;
        sum_squares(&squares, p->grad, n);
        double size = sqrt(squares);
        // The loss changes by about 0.003. Less would drown in rounding; more, in the curvature of
        // the loss in those few rows of wte that these tokens use.
        double h = 0.003 / size;
        for (int random = 0; random < 2; random++) {
            double slope = draw_direction(u, p, size, random, i);
            double error = fabs(difference_quotient(buffers, p, u, h, k) - slope) / size;
            check(error < 1e-3, "%s: gradient of %s and finite differences are %.2e apart", name,
                  p->source[0].name, error);
            worst = fmax(worst, error);
        }
        free(u);
    }
    printf("%s: worst finite difference %.1e\n", name, worst);
    retrofit_buffers_free(buffers);
    retrofit_free(model);
}

// What the tests below run: train.tokens cut into ROWS rows of T, without regard to its own rows.
static size_t batch_size(void) { return ROWS * train_length(); }

static float *logits_of(retrofit_buffers *buffers, size_t N) {
    size_t V = buffers->model->config.vocab;
    float *logits = retrofit_allocate(N * V, sizeof *logits);
    retrofit_logits(buffers, 0, N, logits);
    return logits;
}

// The logits of a forward pass over ROWS rows.
static float *forward_logits(retrofit_buffers *buffers, const int32_t *tokens, float sigma,
                             size_t n, size_t k) {
    run_forward(buffers, tokens, ROWS, train_length(), sigma, 7, n, k);
    return logits_of(buffers, batch_size());
}

// With (n,k) nothing flows into the first n recurrences: the gradients are those of (0,k) started
// from s_n, to the last bit.
static void truncation(void) {
    retrofit_model *model = load_tiny(), *other = load_tiny();
    retrofit_buffers *whole = train_buffers(model, ROWS, 3), *end = train_buffers(other, ROWS, 3);
    const int32_t *tokens = train_tokens(), *labels = tokens;
    size_t T = train_length(), d = model->config.n_embd;
    run_forward(whole, tokens, ROWS, T, 0.01f, 7, 2, 2);
    need(retrofit_prelude(end, tokens, ROWS, T), "prelude");
    memcpy(end->state, whole->state, ROWS * T * d * sizeof(float)); // in training `state` stays s_n
    retrofit_recur(end, 0, 2);
    retrofit_coda(end);

    double loss = retrofit_loss(whole, labels, 1), end_loss = retrofit_loss(end, labels, 1);
    check(loss == end_loss, "loss with (2,2) %.9g, with (0,2) from s_2 %.9g", loss, end_loss);
    retrofit_backward(whole);
    retrofit_backward(end);
    same(other, model, GRADIENT, "(0,2) from s_2 against (2,2)");
    retrofit_buffers_free(whole);
    retrofit_buffers_free(end);
    retrofit_free(model);
    retrofit_free(other);
}

static void same_logits(const float *a, const float *b, size_t n, const char *what) {
    check(!memcmp(a, b, n * sizeof *a), "logits of %s are %.2e apart", what,
          relative_error(a, b, n));
}

// Whether recurrences have gradients does not change what they compute; and three recurrences are
// one and one and one.
static void ways_to_run_three_recurrences(void) {
    retrofit_model *model = load_tiny();
    retrofit_buffers *buffers = train_buffers(model, ROWS, 3);
    size_t count = batch_size() * model->config.vocab;
    float *saved = forward_logits(buffers, train_tokens(), 0.01f, 0, 3);
    float *unsaved = forward_logits(buffers, train_tokens(), 0.01f, 3, 0);
    need(retrofit_prelude(buffers, train_tokens(), ROWS, train_length()), "prelude");
    retrofit_init_state(buffers, 0.01f, 7);
    for (int i = 0; i < 3; i++) retrofit_recur(buffers, 0, 1);
    retrofit_coda(buffers);
    float *one_by_one = logits_of(buffers, batch_size());

    same_logits(saved, unsaved, count, "(0,3) and (3,0)");
    same_logits(saved, one_by_one, count, "(0,3) and three times (0,1)");
    free(saved);
    free(unsaved);
    free(one_by_one);
    retrofit_buffers_free(buffers);
    retrofit_free(model);
}

// A row's place in the batch changes nothing.
static void places_in_the_batch(void) {
    retrofit_model *model = load_tiny();
    retrofit_buffers *buffers = train_buffers(model, ROWS, 3);
    size_t T = train_length(), row = T * model->config.vocab; // logits of a row
    int32_t *swapped = retrofit_allocate(ROWS * T, sizeof *swapped);
    memcpy(swapped, train_tokens() + T, T * sizeof *swapped);
    memcpy(swapped + T, train_tokens(), T * sizeof *swapped);
    float *x = forward_logits(buffers, swapped, 0, 1, 2);
    float *y = forward_logits(buffers, train_tokens(), 0, 1, 2);
    bool equal = !memcmp(x, y + row, row * sizeof *x) && !memcmp(x + row, y, row * sizeof *x);
    check(equal, "logits depend on the row's place in the batch");
    free(swapped);
    free(x);
    free(y);
    retrofit_buffers_free(buffers);
    retrofit_free(model);
}

// A loss over no labels is 0, without a gradient; over one that is no token NaN, with an error.
static void impossible_passes(void) {
    retrofit_model *model = load_tiny();
    retrofit_buffers *buffers = train_buffers(model, ROWS, 3);
    size_t N = batch_size(), T = train_length();
    int32_t *labels = retrofit_allocate(N, sizeof *labels);
    run_forward(buffers, train_tokens(), ROWS, T, 0, 0, 1, 2);
    for (size_t i = 0; i < N; i++) labels[i] = -100;
    retrofit_zero_grad(model);
    check(retrofit_loss(buffers, labels, 1) == 0, "the loss of no labels is not 0");
    retrofit_backward(buffers);
    for (size_t i = 0; i < model->parameter_count; i++) {
        const retrofit_parameter *p = model->parameters[i];
        size_t zeros = 0, count = p->rows * p->cols;
        for (size_t j = 0; j < count; j++) zeros += p->grad[j] == 0;
        check(zeros == count, "no labels give %s a gradient", p->source[0].name);
    }
    labels[3] = (int32_t)model->config.vocab;
    bool no_number = isnan(retrofit_loss(buffers, labels, 0));
    check(no_number && strstr(retrofit_error(), "label 3"), "a label of V: %s", retrofit_error());
    check(!retrofit_forward(buffers, train_tokens(), ROWS, T, 0, 0, 0, 4),
          "4 recurrences with gradient where 3 fit");
    free(labels);
    retrofit_buffers_free(buffers);
    retrofit_free(model);
}

enum { UNROLLED = 3, LAYER_TENSORS = 6 }; // recurrences of the unrolled model

static void parameters_of(retrofit_layer *layer, retrofit_parameter *list[LAYER_TENSORS]) {
    list[0] = &layer->norm_1;
    list[1] = &layer->w_qkv;
    list[2] = &layer->w_out;
    list[3] = &layer->norm_2;
    list[4] = &layer->w_gate_up;
    list[5] = &layer->w_down;
}

static void copy_master(retrofit_parameter *to, const retrofit_parameter *from) {
    memcpy(to->master, from->master, from->rows * from->cols * sizeof(float));
}

static void copy_layer(retrofit_layer *to, retrofit_layer *from) {
    retrofit_parameter *targets[LAYER_TENSORS], *sources[LAYER_TENSORS];
    parameters_of(to, targets);
    parameters_of(from, sources);
    for (int i = 0; i < LAYER_TENSORS; i++) copy_master(targets[i], sources[i]);
}

// The model as a plain stack of P + UNROLLED·C + D layers, in which the core's are repeated.
static retrofit_model *unroll(retrofit_model *model) {
    size_t P = model->config.prelude, C = model->config.core, D = model->config.coda;
    retrofit_config config = model->config;
    config.prelude = 0;
    config.core = 0;
    config.coda = P + UNROLLED * C + D;
    retrofit_model *stack = retrofit_model_new(&config, &retrofit_cpu);
    need(stack && retrofit_model_allocate(stack, RETROFIT_TRAINING), "stack");

    for (size_t i = 0; i < P; i++) copy_layer(&stack->coda[i], &model->prelude[i]);
    for (size_t i = 0; i < UNROLLED * C; i++) copy_layer(&stack->coda[P + i], &model->core[i % C]);
    for (size_t i = 0; i < D; i++) copy_layer(&stack->coda[P + UNROLLED * C + i], &model->coda[i]);
    copy_master(&stack->wte, &model->wte);
    copy_master(&stack->ln_f, &model->ln_f);
    copy_master(&stack->lm_head, &model->lm_head);
    retrofit_refresh_weights(stack);
    return stack;
}

// The gradient of a layer of the loop against the sum of its copies' gradients, which are
// `distance` layers apart.
static void compare_copies(retrofit_layer *looped, retrofit_layer *copies, size_t count,
                           size_t distance) {
    retrofit_parameter *ours[LAYER_TENSORS], *sums[LAYER_TENSORS];
    retrofit_parameter *copy[LAYER_TENSORS];
    parameters_of(looped, ours);
    parameters_of(copies, sums);
    for (size_t r = 1; r < count; r++) {
        parameters_of(&copies[r * distance], copy);
        for (int i = 0; i < LAYER_TENSORS; i++)
            add(sums[i]->grad, copy[i]->grad, sums[i]->rows * sums[i]->cols, 1);
    }
    for (int i = 0; i < LAYER_TENSORS; i++) {
        double error = relative_error(ours[i]->grad, sums[i]->grad, ours[i]->rows * ours[i]->cols);
        check(error < 1e-6, "looped and unrolled: gradients of %s %.2e apart",
              ours[i]->source[0].name, error);
    }
}

// With A = [I | 0] and s_0 = e the loop is a plain stack in which the core is repeated: logits
// equal to the last bit, and the core's gradient is the sum of its copies'. s_0 gets no gradient,
// so what lies before it cannot be compared; as A_e = 0, its gradient is 0.
static void unrolled(void) {
    retrofit_model *model = load_tiny();
    size_t d = model->config.n_embd, P = model->config.prelude, C = model->config.core;
    size_t D = model->config.coda, V = model->config.vocab, T = 16;
    for (size_t row = 0; row < d; row++)
        for (size_t col = 0; col < 2 * d; col++)
            model->adapter.master[row * 2 * d + col] = row == col;
    retrofit_refresh_weights(model);
    retrofit_model *stack = unroll(model);
    retrofit_buffers *loop = new_buffers(model, 1, T, UNROLLED, RETROFIT_KEEP_ALL);
    retrofit_buffers *plain = new_buffers(stack, 1, T, 0, RETROFIT_KEEP_ALL);

    need(retrofit_prelude(loop, train_tokens(), 1, T), "prelude");
    memcpy(loop->state, loop->e, T * d * sizeof(float));
    retrofit_recur(loop, 0, UNROLLED);
    retrofit_coda(loop);
    run_forward(plain, train_tokens(), 1, T, 0, 0, 0, 0);
    float *x = logits_of(loop, T), *y = logits_of(plain, T);
    same_logits(x, y, T * V, "looped and unrolled models");

    retrofit_loss(loop, train_tokens() + 1, 1);
    retrofit_loss(plain, train_tokens() + 1, 1);
    retrofit_backward(loop);
    retrofit_backward(plain);
    for (size_t i = 0; i < C; i++)
        compare_copies(&model->core[i], &stack->coda[P + i], UNROLLED, C);
    for (size_t i = 0; i < D; i++)
        compare_copies(&model->coda[i], &stack->coda[P + UNROLLED * C + i], 1, 0);
    double squares = 0;
    const retrofit_parameter *w_qkv = &model->prelude[0].w_qkv;
    sum_squares(&squares, model->wte.grad, V * d);
    sum_squares(&squares, w_qkv->grad, w_qkv->rows * d);
    check(squares == 0, "a gradient went past s_0");
    free(x);
    free(y);
    retrofit_buffers_free(loop);
    retrofit_buffers_free(plain);
    retrofit_free(model);
    retrofit_free(stack);
}

// The sizes that a training pass tells of its states, against passes that end at each of them.
static void state_sizes(void) {
    retrofit_model *model = load_tiny();
    int32_t tokens[12];
    double rms[8];
    size_t numbers_in_state = 12 * model->config.n_embd;
    for (int i = 0; i < 12; i++) tokens[i] = i * 7 % 131;
    init_optimizer(model, RETROFIT_ADAMW);
    retrofit_buffers *training = new_buffers(model, 2, 6, 3, RETROFIT_KEEP_ALL);
    retrofit_buffers *shorter = new_buffers(model, 2, 6, 0, RETROFIT_KEEP_NOTHING);
    run_forward(training, tokens, 2, 6, 0.5f, 3, 2, 3);
    size_t count = retrofit_state_rms(training, rms);
    check(count == 4, "%zu sizes of 4 states", count);
    for (size_t j = 0; j < count; j++) {
        double squares = 0;
        run_forward(shorter, tokens, 2, 6, 0.5f, 3, 2 + j, 0);
        for (size_t i = 0; i < numbers_in_state; i++)
            squares += (double)shorter->state[i] * shorter->state[i];
        double size = sqrt(squares / (double)numbers_in_state);
        check(fabs(rms[j] - size) < 1e-6 * size, "the size of s_%zu is %g, should be %g", 2 + j,
              rms[j], size);
    }
    retrofit_buffers_free(training);
    retrofit_buffers_free(shorter);
    retrofit_free(model);
}

// ---- Frozen parts ------------------------------------------------------------------------------

// tiny/recurrent after one step in that mode; its gradient's norm.
static retrofit_model *train_mode(retrofit_mode mode, retrofit_optimizer_kind kind,
                                  retrofit_keep keep, double *norm) {
    retrofit_model *model = load(TINY, mode);
    init_optimizer(model, kind);
    retrofit_buffers *buffers = new_buffers(model, 2, 9, 2, keep);
    run_forward(buffers, train_tokens(), 2, 9, 0.1f, 5, 1, 2);
    retrofit_loss(buffers, train_tokens() + 1, 1);
    retrofit_backward(buffers);
    retrofit_optimizer optimizer = {.kind = kind,
                                    .lr = 1e-3f,
                                    .muon_lr = 1e-2f,
                                    .beta1 = 0.9f,
                                    .beta2 = 0.95f,
                                    .eps = 1e-8f,
                                    .momentum = 0.95f};
    *norm = retrofit_optimizer_step(model, &optimizer, 1);
    retrofit_buffers_free(buffers);
    return model;
}

static bool part_is_trained(retrofit_mode mode, retrofit_part part) {
    if (mode == RETROFIT_TRAINING) return true;
    if (part == RETROFIT_PART_ADAPTER) return true;
    return mode == RETROFIT_TRAINING_CORE && part == RETROFIT_PART_CORE;
}

// A parameter against what it is where all are trained, and against what it was at the start.
static void check_part(const retrofit_parameter *p, const retrofit_parameter *whole,
                       const retrofit_parameter *start, retrofit_optimizer_kind kind,
                       retrofit_mode mode) {
    const char *label = p->source[0].name;
    size_t bytes = p->rows * p->cols * sizeof(float);
    bool trained = part_is_trained(mode, p->part), right;
    if (trained)
        right = p->grad && p->m && !memcmp(p->grad, whole->grad, bytes) &&
                !memcmp(p->master, whole->master, bytes);
    else right = !p->grad && !p->m && !p->v;
    check(right, "%s, mode %d: gradient, moment or step of %s", names[kind], mode, label);
    bool moved = memcmp(p->master, start->master, bytes) != 0;
    check(moved == trained, "%s, mode %d: %s moved, or did not", names[kind], mode, label);
}

// retrofit_training_bytes says beforehand what gradients and moments take.
static void check_training_bytes(const retrofit_model *model, retrofit_mode mode,
                                 retrofit_optimizer_kind kind) {
    size_t weights, gradients, moments;
    retrofit_model *shape = retrofit_model_new(&model->config, &retrofit_cpu);
    need(shape != NULL, "shape");
    retrofit_training_bytes(shape, mode, kind, &weights, &gradients, &moments);
    check(gradients == model->grad_bytes && moments == model->moment_bytes,
          "mode %d: %zu and %zu bytes predicted, %zu and %zu taken", mode, gradients, moments,
          model->grad_bytes, model->moment_bytes);
    retrofit_free(shape);
}

// With parts frozen the others' gradients are the same to the bit, and what is frozen has neither
// gradient nor moments and does not move.
static void freeze_parts(retrofit_keep keep, retrofit_optimizer_kind kind) {
    static const retrofit_mode modes[] = {RETROFIT_TRAINING, RETROFIT_TRAINING_CORE,
                                          RETROFIT_TRAINING_ADAPTER};
    retrofit_model *whole = NULL, *start = load_tiny();
    for (int i = 0; i < 3; i++) {
        retrofit_mode mode = modes[i];
        double norm, squares = 0;
        retrofit_model *model = train_mode(mode, kind, keep, &norm);
        if (!whole) whole = model;
        for (size_t j = 0; j < model->parameter_count; j++) {
            const retrofit_parameter *p = model->parameters[j];
            if (part_is_trained(mode, p->part)) sum_squares(&squares, p->grad, p->rows * p->cols);
            check_part(p, whole->parameters[j], start->parameters[j], kind, mode);
        }
        check(fabs(norm - sqrt(squares)) < 1e-6 * norm,
              "mode %d: the norm is %g, of the trained gradients %g", mode, norm, sqrt(squares));
        check_training_bytes(model, mode, kind);
        if (model != whole) retrofit_free(model);
    }
    retrofit_free(whole);
    retrofit_free(start);
}

static void freezing(void) {
    for (int keep = RETROFIT_KEEP_ALL; keep <= RETROFIT_KEEP_INPUTS; keep++)
        for (int kind = RETROFIT_ADAMW; kind <= RETROFIT_ELLISADAM; kind++)
            freeze_parts((retrofit_keep)keep, (retrofit_optimizer_kind)kind);
}

// ---- FLOPs -------------------------------------------------------------------------------------

// A model of one layer per part, counted by hand.
static void flops(void) {
    retrofit_config config = {.n_embd = 4,
                              .n_heads = 2,
                              .n_kv_heads = 1,
                              .head_dim = 2,
                              .intermediate = 8,
                              .vocab = 10,
                              .prelude = 1,
                              .core = 1,
                              .coda = 1};
    // T = 3: qkv 4x8, out 4x4, gate and up 4x16, down 8x4: 144 weights; attention 2·3·4; each half
    // of the adapter 4x4; head 4x10.
    double layer = 2 * 144 + 24, half = 2 * 16, head = 80;
    // Passes over the prelude, A_e, the core and A_s without gradient, with gradient, coda and
    // head.
    static const int passes[4][6] = {
        {1, 1, 1, 1, 1, 1}, {3, 3, 1, 3, 3, 3}, {1, 2, 1, 3, 3, 2}, {1, 2, 1, 2, 3, 2}};
    for (int mode = 0; mode < 4; mode++) {
        const int *times = passes[mode];
        double expected = times[0] * layer + times[1] * half + 5 * times[2] * (layer + half);
        expected += 2 * (times[3] * layer + times[4] * half) + times[5] * (layer + head);
        double flops = retrofit_flops_per_token(&config, (retrofit_mode)mode, 3, 5, 2);
        check(flops == expected, "mode %d: %g FLOPs per token, should be %g", mode, flops,
              expected);
    }
}

// The paper's way to count, with its parameter counts of Llama-3.2 (2,4,2).
static void paper_flops(void) {
    retrofit_config llama = {.n_embd = 2048,
                             .n_heads = 32,
                             .n_kv_heads = 8,
                             .head_dim = 64,
                             .intermediate = 8192,
                             .vocab = 128256,
                             .prelude = 2,
                             .core = 4,
                             .coda = 2};
    double two_layers = 121643008, four_layers = 243286016;
    double expected = 6 * (two_layers + 3 * four_layers + two_layers) + 2 * 7 * four_layers;
    double flops = retrofit_paper_flops_per_token(&llama, 7, 3);
    check(flops == expected,
          "Llama-3.2 (2,4,2): %.0f of the paper's FLOPs per token, should be %.0f", flops,
          expected);
}

// ---- Steps -------------------------------------------------------------------------------------

// Two micro-batches with half of the loss each are one of twice the size. All have more tokens than
// what a matrix product takes for few rows, whose terms it adds up in another order.
static void accumulation(void) {
    enum { MICRO = 2 * ROWS };
    retrofit_model *in_two = load_tiny(), *in_one = load_tiny();
    init_optimizer(in_two, RETROFIT_ADAMW);
    init_optimizer(in_one, RETROFIT_ADAMW);
    retrofit_buffers *small = train_buffers(in_two, MICRO, 3);
    retrofit_buffers *large = train_buffers(in_one, 2 * MICRO, 3);
    double halves = pass(small, 0, MICRO, 1, 3, 0.5f) / 2;
    halves += pass(small, MICRO, MICRO, 1, 3, 0.5f) / 2;
    double whole = pass(large, 0, 2 * MICRO, 1, 3, 1);
    const char *name = "";
    double error = difference(in_two, in_one, GRADIENT, &name);
    check(error < 1e-6 && fabs(halves - whole) < 1e-6 * whole,
          "two micro-batches: loss %.9g, one: %.9g; gradients of %s %.2e apart", halves, whole,
          name, error);
    retrofit_buffers_free(small);
    retrofit_buffers_free(large);
    retrofit_free(in_two);
    retrofit_free(in_one);
}

// Three steps in new buffers, or in larger ones that have seen another batch.
static retrofit_model *three_steps(bool used_buffers) {
    retrofit_model *model = load_tiny();
    init_optimizer(model, RETROFIT_ADAMW);
    retrofit_buffers *buffers = train_buffers(model, ROWS + used_buffers, 4);
    if (used_buffers) pass(buffers, 10, ROWS + 1, 2, 4, 1);
    for (size_t step = 0; step < 3; step++) train_step(model, buffers, RETROFIT_ADAMW, step, NULL);
    retrofit_buffers_free(buffers);
    return model;
}

static void repetition(void) {
    retrofit_model *once = three_steps(false), *again = three_steps(true);
    same(once, again, MASTER, "three steps, twice");
    retrofit_free(once);
    retrofit_free(again);
}

// tiny/recurrent after one step with that weight decay and throttle (0: none).
static retrofit_model *one_step(retrofit_optimizer_kind kind, float weight_decay, float throttle) {
    retrofit_model *model = load_tiny();
    init_optimizer(model, kind);
    retrofit_buffers *buffers = train_buffers(model, ROWS, 1);
    pass(buffers, 0, ROWS, 0, 1, 1);
    retrofit_optimizer optimizer = {.kind = kind,
                                    .lr = 0.01f,
                                    .muon_lr = 0.02f,
                                    .beta1 = 0.9f,
                                    .beta2 = 0.95f,
                                    .eps = 1e-8f,
                                    .weight_decay = weight_decay,
                                    .momentum = 0.95f,
                                    .throttle = throttle};
    retrofit_optimizer_step(model, &optimizer, 1);
    retrofit_buffers_free(buffers);
    return model;
}

// In the authors' steps weight decay is too weak to show. It takes lr·decay of the weight, whatever
// the gradient is, beside the update; ELLISAdam's takes lr/peak_lr·decay, which is all of decay
// where no peak_lr is given.
static void decay(retrofit_optimizer_kind kind) {
    retrofit_model *start = load_tiny();
    retrofit_model *without = one_step(kind, 0, 0), *with = one_step(kind, 0.5f, 0);
    for (size_t i = 0; i < start->parameter_count; i++) {
        const retrofit_parameter *p = start->parameters[i];
        const float *x = without->parameters[i]->master, *y = with->parameters[i]->master;
        double lr = 0.01, worst = 0;
        if (kind == RETROFIT_MUON && p->kind == RETROFIT_MATRIX) lr = 0.02;
        if (kind == RETROFIT_ELLISADAM) lr = 1;
        for (size_t j = 0; j < p->rows * p->cols; j++)
            worst = fmax(worst, fabs((double)y[j] - x[j] + lr * 0.5 * p->master[j]));
        check(worst < 1e-6, "%s: weight decay of %s is off by %.2e", names[kind], p->source[0].name,
              worst);
    }
    retrofit_free(start);
    retrofit_free(without);
    retrofit_free(with);
}

// With a throttle of 4, adapter and core go a quarter of the way, and all else goes all of it.
static void throttling(retrofit_optimizer_kind kind) {
    retrofit_model *start = load_tiny();
    retrofit_model *full = one_step(kind, 0, 0), *throttled = one_step(kind, 0, 4);
    for (size_t i = 0; i < start->parameter_count; i++) {
        const retrofit_parameter *p = start->parameters[i];
        const float *x = full->parameters[i]->master, *y = throttled->parameters[i]->master;
        bool slow = p->part == RETROFIT_PART_CORE || p->part == RETROFIT_PART_ADAPTER;
        double share = slow ? 0.25 : 1, worst = 0;
        for (size_t j = 0; j < p->rows * p->cols; j++) {
            double way = (double)x[j] - p->master[j], slow_way = (double)y[j] - p->master[j];
            worst = fmax(worst, fabs(slow_way - share * way));
        }
        check(worst < 1e-6, "%s: throttled by 4, %s is %.2e off", names[kind], p->source[0].name,
              worst);
    }
    retrofit_free(start);
    retrofit_free(full);
    retrofit_free(throttled);
}

// The source model, trained by the same loop on one batch again and again, must learn it.
static void baseline(void) {
    retrofit_model *model = load(PLAIN, RETROFIT_TRAINING);
    retrofit_buffers *buffers = train_buffers(model, ROWS, 0);
    retrofit_optimizer optimizer = {.kind = RETROFIT_ADAMW,
                                    .lr = 3e-3f,
                                    .beta1 = 0.9f,
                                    .beta2 = 0.95f,
                                    .eps = 1e-8f,
                                    .weight_decay = 1e-4f,
                                    .clip = 1};
    init_optimizer(model, RETROFIT_ADAMW);
    double first = 0, last = 0;
    for (size_t step = 0; step < 20; step++) {
        retrofit_zero_grad(model);
        last = pass(buffers, 0, ROWS, 0, 0, 1);
        if (step == 0) first = last;
        retrofit_optimizer_step(model, &optimizer, step + 1);
    }
    check(last < 0.8 * first, "20 steps on one batch: loss from %.4f to %.4f only", first, last);
    retrofit_buffers_free(buffers);
    retrofit_free(model);
}

// ---- Checkpoints -------------------------------------------------------------------------------

// To bf16 by another way than the header's: the nearer of the two neighbours; if both are equally
// near, the one whose last bit is 0.
static uint16_t nearest_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    uint16_t low = (uint16_t)(bits >> 16), high = (uint16_t)(low + 1);
    double to_low = fabs((double)f - (double)retrofit_bf16_to_float(low));
    double to_high = fabs((double)retrofit_bf16_to_float(high) - (double)f);
    if (to_low == to_high) return low % 2 == 0 ? low : high;
    return to_low < to_high ? low : high;
}

static void describe(char text[1024], const retrofit_config *c) {
    snprintf(text, 1024,
             "%zu %zu %zu %zu %zu %zu %zu, %zu %zu %zu, eps %a, theta %a, llama3 %d %a %a %a %a, "
             "std %a, %zu %zu %zu %d, tied %d, bos %d, pad %d, %zu ends, %d %d",
             c->n_embd, c->n_heads, c->n_kv_heads, c->head_dim, c->intermediate, c->vocab,
             c->context, c->prelude, c->core, c->coda, (double)c->norm_eps, c->rope_theta,
             c->rope_llama3, c->rope_factor, c->rope_low, c->rope_high, c->rope_original_context,
             (double)c->state_std, c->mean_recurrence, c->backprop_depth, c->trained_seq_len,
             c->trained_state_zero, c->tied, c->bos, c->pad, c->eos_count, c->eos[0], c->eos[1]);
}

// A model with numbers that are hard to round and to print, in weights and config.
static retrofit_model *load_with_odd_numbers(const char *name) {
    // Ties between two bf16, the largest, a denormal, -0, and the neighbours of a tie.
    static const float odd[] = {0x1.01p0f, 0x1.03p0f, -0x1.01p0f, -0x1.03p0f,    0x1.ffp-1f,
                                3e38f,     1e-40f,    -0.0f,      0x1.010002p0f, 0x1.00fffep0f};
    retrofit_model *model = load(name, RETROFIT_TRAINING);
    retrofit_config *c = &model->config;
    memcpy(model->wte.master, odd, sizeof odd);
    c->bos = 7;
    c->pad = 9;
    c->eos_count = 2;
    c->eos[0] = 11;
    c->eos[1] = 3;
    c->norm_eps = 1.2345678e-5f;
    c->rope_theta = 12345.678;
    c->trained_seq_len = 77;
    if (c->core) {
        c->trained_state_zero = true;
        c->state_std = 0.0123456789f;
        c->mean_recurrence = 11;
        c->backprop_depth = 5;
    }
    return model;
}

static void compare_with(const char *path, const retrofit_model *model, const char *what) {
    retrofit_model *other = load(path, RETROFIT_TRAINING);
    same(other, model, MASTER, what);
    retrofit_free(other);
}

// `read` against `model`, rounded to bf16; of every parameter the first wrong number is told.
static void check_rounding(const char *name, const retrofit_model *model,
                           const retrofit_model *read) {
    for (size_t i = 0; i < read->parameter_count; i++) {
        const retrofit_parameter *p = read->parameters[i];
        const float *exact = model->parameters[i]->master;
        bool right = true;
        for (size_t j = 0; right && j < p->rows * p->cols; j++) {
            float expected = retrofit_bf16_to_float(nearest_bf16(exact[j]));
            right = check(!memcmp(&p->master[j], &expected, sizeof expected),
                          "%s: %s[%zu] = %a in bf16 is %a, not %a", name, p->source[0].name, j,
                          (double)exact[j], (double)p->master[j], (double)expected);
        }
    }
}

// With one more space in the file's header every bf16 lies at an odd address, which the sanitizer
// must not complain of.
static void read_at_odd_addresses(const char *directory, const retrofit_model *expected) {
    size_t size;
    char path[600];
    snprintf(path, sizeof path, "%s/model.safetensors", directory);
    char *file = retrofit_read_file(path, &size); // ends in a 0 that `size` does not count
    need(file && (uint8_t)file[0] < 255, "a header whose length can be raised");
    file[0]++;
    memmove(file + 10, file + 9, size - 9);
    file[9] = ' ';
    write_file(path, file, size + 1);
    free(file);
    compare_with(directory, expected, "bf16 at odd addresses");
}

static void save_and_load(const char *name) {
    retrofit_model *model = load_with_odd_numbers(name);
    char expected[1024], config[1024], *f32 = strdup(at("f32")), *bf16 = strdup(at("bf16"));
    mkdir(f32, 0777);
    mkdir(bf16, 0777);
    need(retrofit_save(model, f32, RETROFIT_F32, FIXTURES "lookup/base"), "save");
    need(retrofit_save(model, bf16, RETROFIT_BF16, NULL), "save");
    bool carried = !access(at("f32/tokenizer.json"), R_OK);
    check(carried && access(at("bf16/tokenizer.json"), F_OK),
          "%s: a tokenizer is not where it should be", name);

    retrofit_model *read = load(f32, RETROFIT_TRAINING);
    same(read, model, MASTER, name);
    describe(expected, &model->config);
    describe(config, &read->config);
    check(!strcmp(expected, config), "%s: config\n%s read back as\n%s", name, expected, config);
    retrofit_free(read);

    read = load(bf16, RETROFIT_TRAINING);
    check_rounding(name, model, read);
    // Written as fp32 from bf16, nothing changes.
    retrofit_model *source = load(bf16, RETROFIT_INFERENCE);
    need(retrofit_save(source, f32, RETROFIT_F32, NULL), "save");
    retrofit_free(source);
    compare_with(f32, read, "bf16 to fp32");
    read_at_odd_addresses(bf16, read);
    retrofit_free(read);
    retrofit_free(model);
    free(f32);
    free(bf16);
}

static size_t entries(const char *directory) {
    size_t count = 0;
    DIR *d = opendir(directory);
    if (!d) return 0;
    for (struct dirent *e = readdir(d); e; e = readdir(d))
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) count++;
    closedir(d);
    return count;
}

// A directory appears whole or not at all, never in place of another.
static void directories(void) {
    char *final = strdup(at("made/of/parts")), name[600];
    for (int round = 0; round < 3; round++) {
        char *temporary = retrofit_directory_begin(round == 1 ? at("made/of/parts/") : final);
        need(temporary != NULL, "begin");
        snprintf(name, sizeof name, "%s/%d", temporary, round);
        write_text(name, "x");
        check(entries(final) == (round > 0) && strcmp(temporary, final),
              "round %d: the directory changed before its time", round);
        bool made = retrofit_directory_commit(temporary, final);
        if (round == 0) check(made, "round %d: %s", round, retrofit_error());
        else refused(made, "parts", "a directory in the place of another");
        retrofit_directory_abandon(temporary);
        size_t all = entries(at("made/of")), files = entries(final);
        check(all == 1 && files == 1, "round %d: %zu directories, %zu files; not one each", round,
              all, files);
        free(temporary);
    }
    check(!access(at("made/of/parts/0"), R_OK), "the first directory is gone");
    write_text(at("file"), "x");
    refused(retrofit_directory_begin(at("file/sub")), "file", "a directory in a file");
    refused(retrofit_directory_begin(""), "''", "a directory without a name");
    refused(retrofit_directory_commit(at("nothing"), at("other")), "nothing",
            "commit of what is not there");
    free(final);
}

// ---- Damaged files, in root/hostile, beside tiny/base's config.json ----------------------------

static void hostile_load(const char *name, const char *what) {
    for (int mode = RETROFIT_INFERENCE; mode <= RETROFIT_TRAINING; mode++) {
        retrofit_model *model = retrofit_load(at("hostile"), &retrofit_cpu, (retrofit_mode)mode);
        refused(model != NULL, name, what);
        retrofit_free(model);
    }
}

static void hostile(const void *data, size_t size, const char *what) {
    write_file(at("hostile/model.safetensors"), data, size);
    hostile_load("hostile", what);
}

// The tables below write ' for ", which is what files get.
static void double_quotes(char *text) {
    for (char *c = text; *c; c++)
        if (*c == '\'') *c = '"';
}

static void hostile_lengths(const char *file, size_t size, size_t header) {
    const size_t cuts[] = {0,          1,          7,          8,        9,       header,
                           header + 7, header + 8, header + 9, size - 4, size - 1};
    for (size_t i = 0; i < 40; i++) { // cut where parts of the file meet, and anywhere between
        size_t limit = i % 2 ? size : header;
        hostile(file, i < 11 ? cuts[i] : retrofit_hash(1, i) % limit, "a truncated file");
    }
    const uint64_t lengths[] = {0,    1,          header - 1, header + 1,     size - 8,  size - 7,
                                size, 1ull << 31, 1ull << 63, UINT64_MAX - 7, UINT64_MAX};
    char *copy = malloc(size), what[128];
    need(copy != NULL, "memory");
    memcpy(copy, file, size);
    for (size_t i = 0; i < 11; i++) {
        snprintf(what, sizeof what, "a header of %llu bytes, where %zu are right",
                 (unsigned long long)lengths[i], header);
        memcpy(copy, &lengths[i], sizeof *lengths);
        hostile(copy, size, what);
    }
    free(copy);
}

// With one bit of the header changed a file is refused, or is harmless.
static void hostile_bits(const char *file, size_t size, size_t header) {
    char *copy = malloc(size);
    need(copy != NULL, "memory");
    for (size_t i = 0; i < 200; i++) {
        memcpy(copy, file, size);
        copy[8 + retrofit_hash(2, i) % header] ^= (char)(1 << i % 8);
        error_text[0] = 0;
        write_file(at("hostile/model.safetensors"), copy, size);
        retrofit_model *model = retrofit_load(at("hostile"), &retrofit_cpu, RETROFIT_INFERENCE);
        if (!model) refused(false, "hostile", "a header with one bit changed");
        retrofit_free(model);
    }
    free(copy);
}

static void hostile_bytes(void) {
    size_t size, header;
    char *file = retrofit_read_file(FIXTURES "tiny/base/model.safetensors", &size);
    need(file != NULL, "tiny/base");
    memcpy(&header, file, sizeof header);
    hostile_lengths(file, size, header);
    hostile_bits(file, size, header);
    free(file);
}

// Whether a file of that header and of so many zero bytes is accepted.
static bool opens(const char *header, size_t data_bytes) {
    char data[1024] = {0};
    uint64_t length = strlen(header);
    retrofit_map f;
    memcpy(data, &length, sizeof length);
    memcpy(data + 8, header, length);
    write_file(at("hostile/header"), data, 8 + length + data_bytes);
    bool ok = retrofit_safetensors_open(&f, at("hostile/header"));
    if (ok) retrofit_safetensors_close(&f);
    return ok;
}

// The header of one tensor, from its parts. The first two are right; each of the others has one
// thing wrong. The offsets of some go on with a second tensor.
#define AND_B(dtype, shape, offsets) \
    "},'b':{'dtype':'" dtype "','shape':" shape ",'data_offsets':" offsets
static const struct {
    const char *dtype, *shape, *offsets;
    size_t data_bytes;
} headers[] = {
    {"'F32'", "[4]", "[0,16]", 16},
    {"'I64'", "[1]", "[8,16]" AND_B("F32", "[2]", "[0,8]"), 16},
    {"'F32'", "[1099511627776,1099511627776]", "[0,64]", 64},
    {"'F32'", "[4611686018427387904]", "[0,0]", 0},
    {"'F32'", "[4294967296,4294967296,4294967296]", "[0,0]", 0},
    {"'F32'", "[16]", "[0,63]", 63},
    {"'F32'", "[16]", "[0,65]", 65},
    {"'F32'", "[17]", "[0,68]", 64},
    {"'F32'", "[4]", "[32,16]", 32},
    {"'F32'", "[4]", "[-16,0]", 16},
    {"'F32'", "[4]", "[18446744073709551600,0]", 16},
    {"'F32'", "[4]", "[0,1e300]", 16},
    {"'F32'", "[4]", "[0.5,16.5]", 17},
    {"'F32'", "[4]", "[0]", 16},
    {"'F32'", "[4]", "[0,16,16]", 16},
    {"'F32'", "4", "[0,16]", 16},
    {"'F32'", "[-4]", "[0,16]", 16},
    {"'F32'", "['4']", "[0,16]", 16},
    {"'F31'", "[4]", "[0,16]", 16},
    {"7", "[4]", "[0,16]", 16},
    {"'F31\\n'", "[4]", "[0,16]", 16},
    {"'F32'", "[1,1,1,1,4]", "[0,16]", 16},
    {"'F32'", "[4]", "[0,16]},", 16},
    {"'F32'", "[4]", "[0,16]" AND_B("F32", "[4]", "[8,24]"), 32},
    {"'F32'", "[4]", "[0,16]" AND_B("F32", "[4]", "[0,16]"), 32},
    {"'F32'", "[4]", "[0,16]" AND_B("I64", "[1]", "[8,16]"), 24},
    {"'F32'", "[4]", "[0,16]", 17},
    {"'F32'", "[4]", "[16,32]", 32},
};

static void hostile_headers(void) {
    static const char *const others[] = {"[]",         "null", "{\"a\":1}", "{\"a\":{}}",
                                         "          ", "{",    "{}}"};
    char text[512];
    for (size_t i = 0; i < sizeof headers / sizeof *headers; i++) {
        snprintf(text, sizeof text, "{'a':{'dtype':%s,'shape':%s,'data_offsets':%s}}",
                 headers[i].dtype, headers[i].shape, headers[i].offsets);
        double_quotes(text);
        bool ok = opens(text, headers[i].data_bytes);
        if (i < 2) check(ok, "%s: %s", text, retrofit_error());
        else refused(ok, "hostile/header", text);
    }
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        refused(opens(others[i], 0), "hostile/header", others[i]);
}

// The tensors of tiny/base are written again with one of these changes.
typedef enum { ALL, FIRST_HALF, SECOND_HALF, MISSING, INTEGERS, TURNED, FLAT, F16S } change;
static uint16_t patterns[1 << 17]; // what F16S writes

// Changes a tensor; false if it is to be left out.
static bool change_tensor(retrofit_tensor *t, change how) {
    static size_t next;
    bool even = strlen(t->name) % 2 == 0;
    switch (how) {
    case FIRST_HALF: return even;
    case SECOND_HALF: return !even;
    case MISSING: return strcmp(t->name, "model.norm.weight") != 0;
    case INTEGERS:
        if (strstr(t->name, "q_proj")) t->type = RETROFIT_I32;
        return true;
    case TURNED:
        if (strstr(t->name, "down_proj")) {
            t->shape[0] = 88;
            t->shape[1] = 32;
        }
        return true;
    case FLAT:
        if (strstr(t->name, "o_proj")) {
            t->dims = 1;
            t->shape[0] = 1024;
        }
        return true;
    case F16S:
        next += t->count;
        t->type = RETROFIT_F16;
        t->data = patterns + next % (1 << 16);
        return true;
    default: return true;
    }
}

// extra: the name of one tensor more, or NULL.
static void rewrite(const char *path, change how, const char *extra) {
    retrofit_map f;
    need(retrofit_safetensors_open(&f, FIXTURES "tiny/base/model.safetensors"), "tiny/base");
    retrofit_tensor *tensors = retrofit_allocate(f.count + 1, sizeof *tensors);
    size_t count = 0;
    for (size_t i = 0; i < f.count; i++) {
        tensors[count] = f.tensors[i];
        if (change_tensor(&tensors[count], how)) count++;
    }
    if (extra) {
        tensors[count] = tensors[0];
        tensors[count].name = extra;
        count++;
    }
    retrofit_type type = how == F16S ? RETROFIT_F16 : RETROFIT_F32;
    need(retrofit_safetensors_write(path, &retrofit_cpu, tensors, count, type, NULL), path);
    free(tensors);
    retrofit_safetensors_close(&f);
}

static void hostile_tensors(void) {
    static const struct {
        change how;
        const char *extra, *name, *what;
    } files[] = {
        {MISSING, NULL, "model.norm.weight", "a missing tensor"},
        {INTEGERS, NULL, "q_proj", "a weight of integers"},
        {TURNED, NULL, "down_proj", "a transposed tensor"},
        {FLAT, NULL, "o_proj", "a flattened tensor"},
        {ALL, "model.embed_tokens.weight", "embed_tokens", "a tensor twice"},
        {ALL, "model.layers.8.mlp.up_proj.weight", "layers.8", "a tensor too many"},
    };
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        rewrite(at("hostile/model.safetensors"), files[i].how, files[i].extra);
        hostile_load(files[i].name, files[i].what);
    }
}

// sign · 2^(e - 25) · (1024 + fraction); of a subnormal number, sign · 2^-24 · fraction.
static double f16_value(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double size = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return bits & 0x8000 ? -size : size;
}

// The values of a parameter read from F16; of every parameter the first wrong number is told.
static void compare_f16(const retrofit_map *f, const retrofit_parameter *p) {
    const float *weight = p->weight.data;
    bool right = true;
    need(p->weight.type == RETROFIT_F32, "F16 read as F32");
    for (size_t j = 0; j < p->sources; j++) {
        const retrofit_tensor *t = fixture(f, "%s", p->source[j].name);
        const uint16_t *bits = t->data;
        for (size_t k = 0; right && k < t->count; k++) {
            double ours = weight[k], exact = f16_value(bits[k]);
            right =
                check(ours == exact, "F16 %04x is read as %.9g, not %.9g", bits[k], ours, exact);
        }
        weight += t->count;
    }
}

// Every finite pattern of F16.
static void f16_files(void) {
    char *path = strdup(at("hostile/model.safetensors"));
    for (size_t i = 0; i < 1 << 17; i++) {
        bool infinite = (i >> 10 & 31) == 31;
        patterns[i] = (uint16_t)i & (infinite ? 0xfbff : 0xffff);
    }
    rewrite(path, F16S, NULL);
    for (int mode = RETROFIT_INFERENCE; mode <= RETROFIT_TRAINING; mode++) {
        retrofit_model *model = load(at("hostile"), (retrofit_mode)mode);
        retrofit_map f;
        need(retrofit_safetensors_open(&f, path), path);
        for (size_t i = 0; i < model->parameter_count; i++) compare_f16(&f, model->parameters[i]);
        retrofit_safetensors_close(&f);
        retrofit_free(model);
    }
    remove(path);
    hostile_load("hostile", "no weights");
    free(path);
}

// KB of mapped files that are in this process' memory; 0 where the system does not say.
static long resident_files(void) {
    char line[256];
    long kilobytes = 0;
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status)) sscanf(line, "RssFile: %ld", &kilobytes);
    if (status) fclose(status);
    return kilobytes;
}

// A survey that releases what it has read sees the same, and leaves nothing of the file in memory:
// train looks so at what it has saved, while weights, gradients and moments fill the memory.
static void released_surveys(void) {
    enum { NUMBERS = 1 << 22 };
    static float numbers[NUMBERS];
    for (size_t i = 0; i < NUMBERS; i++) numbers[i] = 1;
    numbers[NUMBERS - 1] = INFINITY;
    retrofit_tensor tensor = {.name = "a", .type = RETROFIT_F32, .data = numbers};
    tensor.dims = 1;
    tensor.shape[0] = NUMBERS;
    tensor.count = NUMBERS;
    const char *path = at("large.safetensors");
    need(retrofit_safetensors_write(path, &retrofit_cpu, &tensor, 1, RETROFIT_F32, NULL), path);
    for (int release = 1; release >= 0; release--) {
        retrofit_map file;
        size_t infinite, zeros;
        need(retrofit_safetensors_open(&file, path), path);
        long before = resident_files();
        retrofit_safetensors_survey(&file, release, &infinite, &zeros);
        long more = resident_files() - before;
        check(infinite == 0 && zeros == 1, "what a survey finds, release %d", release);
        if (before)
            check(release ? more < 2048 : more > 8192, "%ld KB are left, release %d", more,
                  release);
        retrofit_safetensors_close(&file);
    }
    remove(path);
}

// A model in shards is as good as a whole one; but not without one of its shards, with a tensor in
// two of them, or with a shard from outside of its directory.
static void hostile_shards(void) {
    static const char *const maps[] = {
        "{'a':'one.st'}", "{'a':'three.st'}", "{'a':'../hostile/one.st','b':'two.st'}",
        "{'a':'..'}",     "{'a':''}",         "{'a':1}",
        "[]",             "7",                "["};
    char *index = strdup(at("hostile/model.safetensors.index.json")), text[128];
    retrofit_model *whole = load(PLAIN, RETROFIT_TRAINING);
    rewrite(at("hostile/one.st"), FIRST_HALF, NULL);
    rewrite(at("hostile/two.st"), SECOND_HALF, NULL);
    write_text(index, "{\"weight_map\":{\"a\":\"one.st\",\"b\":\"two.st\",\"c\":\"one.st\"}}");
    compare_with(at("hostile"), whole, "shards against one file");
    rewrite(at("hostile/two.st"), ALL, NULL);
    hostile_load("hostile", "tensors in two shards");
    rewrite(at("hostile/two.st"), SECOND_HALF, NULL);
    for (size_t i = 0; i < sizeof maps / sizeof *maps; i++) {
        snprintf(text, sizeof text, "{'weight_map':%s}", maps[i]);
        double_quotes(text);
        write_text(index, text);
        hostile_load("hostile", text);
    }
    write_text(index, "{}");
    hostile_load("hostile", "an index without a map");
    write_text(index, "");
    hostile_load("hostile", "an empty index");
    remove(index);
    retrofit_free(whole);
    free(index);
}

// ---- Configs that must be refused --------------------------------------------------------------

typedef struct {
    const char *key, *value;
} field;

static const field llama[] = {
    {"model_type", "'llama'"},          {"hidden_size", "32"},
    {"num_attention_heads", "4"},       {"intermediate_size", "88"},
    {"num_hidden_layers", "8"},         {"vocab_size", "131"},
    {NULL, NULL},
};
static const field raven[] = {
    {"model_type", "'huginn_raven'"},
    {"n_embd", "32"},
    {"n_heads", "4"},
    {"intermediate_size", "88"},
    {"n_layers_in_prelude", "2"},
    {"n_layers_in_recurrent_block", "3"},
    {"n_layers_in_coda", "2"},
    {"vocab_size", "131"},
    {"norm_eps", "1e-5"},
    {NULL, NULL},
};

// What else a Llama's config must not say …
static const field bad_llama[] = {
    {"num_attention_heads", "0"},
    {"hidden_size", "0"},
    {"vocab_size", "0"},
    {"num_hidden_layers", "0"},
    {"intermediate_size", "0"},
    {"max_position_embeddings", "0"},
    {"max_position_embeddings", "1.5"},
    {"max_position_embeddings", "'8'"},
    {"trained_seq_len", "-1"},
    {"trained_seq_len", "16777217"},
    {"trained_seq_len", "'8'"},
    {"trained_state_init", "'one'"},
    {"trained_state_init", "0"},
    {"num_attention_heads", "3"},
    {"num_attention_heads", "32"},
    {"num_key_value_heads", "3"},
    {"num_key_value_heads", "0"},
    {"num_key_value_heads", "8"},
    {"num_key_value_heads", "-2"},
    {"head_dim", "16"},
    {"head_dim", "'8'"},
    {"rms_norm_eps", "0"},
    {"rms_norm_eps", "-1"},
    {"rms_norm_eps", "1e30"},
    {"rms_norm_eps", "1e300"},
    {"rms_norm_eps", "'x'"},
    {"rope_theta", "0"},
    {"rope_theta", "-5"},
    {"rope_theta", "1e300"},
    {"rope_theta", "[]"},
    {"rope_scaling", "{'rope_type':'yarn','factor':4}"},
    {"rope_scaling", "{'rope_type':'llama3'}"},
    {"rope_scaling", "{'type':'linear'}"},
    {"rope_scaling", "{'type':'linear','factor':null}"},
    {"rope_scaling", "{'type':'linear','factor':0}"},
    {"rope_scaling", "{'type':'linear','factor':.5}"},
    {"rope_scaling", "{'type':'linear','factor':'4'}"},
    {"rope_scaling", "{'type':'linear','factor':4,'attention_factor':2}"},
    {"rope_scaling", "{'factor':4}"},
    {"rope_scaling", "{'rope_type':'default','partial_rotary_factor':.5}"},
    {"rope_scaling", "'linear'"},
    {"rope_parameters", "{'full_attention':{'rope_theta':10000,'rope_type':'default'}}"},
    {"rope_parameters", "{'rope_type':'dynamic','factor':2}"},
    {"partial_rotary_factor", "0.5"},
    {"partial_rotary_factor", "0"},
    {"sliding_window", "4096"},
    {"use_sliding_window", "true"},
    {"layer_types", "['full_attention','sliding_attention']"},
    {"quantization_config", "{'quant_method':'gptq','bits':4}"},
    {"logit_scale", "0.5"},
    {"logits_scaling", "8"},
    {"embedding_multiplier", "12"},
    {"residual_multiplier", "0.22"},
    {"num_local_experts", "8"},
    {"is_encoder_decoder", "true"},
    {"pruned_heads", "{'0':[1]}"},
    {"attn_logit_softcapping", "30"},    // not in the table, but with a word that tells
    {"query_pre_attn_scalar", "256"},
    {"no_rope_layers", "[0,1]"},
    {"use_qk_norm", "true"},
    {"rope_scaling", "{'rope_type':'llama3','factor':32,'low_freq_factor':4,"
                     "'high_freq_factor':1,'original_max_position_embeddings':8192}"},
    {"model_type", "'gpt2'"},
    {"model_type", "''"},
    {"attention_bias", "true"},
    {"mlp_bias", "true"},
    {"hidden_act", "'gelu'"},
    {"eos_token_id", "'x'"},
    {"bos_token_id", "'x'"},
    {NULL, NULL},
};
// … and a recurrent model's.
static const field bad_raven[] = {
    {"qkv_bias", "1"},
    {"qkv_bias", "'true'"},
    {"qk_norm", "true"},
    {"qk_norm", "'Full'"},
    {"block_norm", "'both'"},
    {"block_norm", "[]"},
    {"n_layers_in_coda", "5000"},
    {"n_layers_in_recurrent_block", "0"},
    {"n_layers_in_recurrent_block", "1e15"},
    {"mean_recurrence", "0"},
    {"mean_recurrence", "-3"},
    {"mean_recurrence", "1e300"},
    {"mean_recurrence", "'8'"},
    {"mean_backprop_depth", "0"},
    {"mean_backprop_depth", "70000"},
    {"init_values", "{'std':-1}"},
    {"init_values", "{'std':1e9}"},
    {"init_values", "{'embed_scale':2}"},
    {"tie_embeddings", "true"},
    {"norm_class_name", "'RMSNorm'"},
    {"qk_bias", "true"},
    {"tie_word_embeddings", "true"},
    {"injection_type", "'add'"},
    {"state_init", "'zero'"},
    {"test_time_noise", "0.1"},
    {"sampling_scheme", "'fixed'"},
    {"init_values", "{'logit_scale':2}"},
    {NULL, NULL},
};

// Values that change nothing, or that are followed.
static const field good_llama[] = {
    {"max_position_embeddings", NULL},
    {"max_position_embeddings", "null"},
    {"trained_seq_len", "0"},
    {"trained_seq_len", "null"},
    {"trained_state_init", "'normal'"},
    {"trained_state_init", "null"},
    {"num_key_value_heads", "null"},
    {"rms_norm_eps", "null"},
    {"rope_scaling", "null"},
    {"rope_scaling", "{}"},
    {"rope_scaling", "{'type':'linear','factor':2}"},
    {"rope_parameters", "{'rope_theta':10000,'rope_type':'default'}"},
    {"partial_rotary_factor", "1.0"},
    {"partial_rotary_factor", "null"},
    {"sliding_window", "null"},
    {"use_sliding_window", "false"},
    {"layer_types", "['full_attention','full_attention']"},
    {"quantization_config", "null"},
    {"hidden_act", "'swish'"},
    {"num_local_experts", "1"},
    {"attention_dropout", "0.1"},
    {"pretraining_tp", "2"},
    {"torch_dtype", "'bfloat16'"},
    {"unsloth_fixed", "true"},
    {"final_logit_softcapping", "null"},
    {"head_dim", "8"},
    {NULL, NULL},
};

// Reads a config of those fields, where `key` has another value, or is left out if value is NULL.
static retrofit_config config_read; // by the function below
static bool read_config(const field *fields, const char *key, const char *value) {
    char text[2048], *end = text + sprintf(text, "{'comment':0");
    for (const field *f = fields; f->key; f++)
        if (strcmp(f->key, key)) end += sprintf(end, ",'%s':%s", f->key, f->value);
    if (value) end += sprintf(end, ",'%s':%s", key, value);
    sprintf(end, "}");
    double_quotes(text);
    write_text(at("hostile/config.json"), text);
    return retrofit_config_read(&config_read, at("hostile"));
}

static void refuse_config(const field *fields, const char *key, const char *value) {
    char what[256];
    snprintf(what, sizeof what, "config with %s %s", key, value ? value : "missing");
    refused(read_config(fields, key, value), "config.json", what);
}

// What the reader makes of settings that it follows.
static void followed_configs(void) {
    for (const field *f = good_llama; f->key; f++)
        check(read_config(llama, f->key, f->value), "%s %s: %s", f->key, f->value ? f->value : "",
              retrofit_error());
    const retrofit_config *c = &config_read;
    check(read_config(llama, "", NULL) && c->context == 2048, "a context of %zu", c->context);
    read_config(llama, "rope_scaling", "{'type':'linear','factor':4}");
    check(!c->rope_llama3 && c->rope_factor == 4, "linear scaling by %g", c->rope_factor);
    read_config(llama, "rope_parameters", "{'rope_theta':5e5,'rope_type':'default'}");
    check(c->rope_theta == 5e5, "rope_theta %g in rope_parameters", c->rope_theta);
    read_config(llama, "eos_token_id", "[5, 7, 9]");
    check(c->eos_count == 3 && c->eos[0] == 5 && c->eos[2] == 9, "%zu ends", c->eos_count);
    read_config(llama, "eos_token_id", "3");
    check(c->eos_count == 1 && c->eos[0] == 3, "%zu ends", c->eos_count);
    read_config(llama, "eos_token_id", "null");
    check(c->eos_count == 0 && c->bos == -1, "%zu ends", c->eos_count);
    read_config(llama, "trained_state_init", "'zero','trained_seq_len':81");
    check(c->trained_seq_len == 81 && c->trained_state_zero, "a training: %zu tokens, %d",
          c->trained_seq_len, c->trained_state_zero);
    read_config(llama, "", NULL);
    check(c->trained_seq_len == 0 && !c->trained_state_zero, "no training: %zu tokens, %d",
          c->trained_seq_len, c->trained_state_zero);

    // generation_config.json comes first, where it has an id; what it lacks config.json gives.
    write_text(at("hostile/generation_config.json"), "{\"eos_token_id\": [2, 4]}");
    read_config(llama, "eos_token_id", "3");
    check(c->eos_count == 2 && c->eos[1] == 4, "generation_config.json: %zu ends", c->eos_count);
    write_text(at("hostile/generation_config.json"), "{\"temperature\": 0.6}");
    read_config(llama, "eos_token_id", "3");
    check(c->eos_count == 1 && c->eos[0] == 3, "config.json: %zu ends", c->eos_count);
    write_text(at("hostile/generation_config.json"), "{\"eos_token_id\": \"x\"}");
    refused(read_config(llama, "", NULL), "generation_config.json", "a word for an id");
    write_text(at("hostile/generation_config.json"), "[1]");
    refused(read_config(llama, "", NULL), "generation_config.json", "a list");
    remove(at("hostile/generation_config.json"));
}

// The blocks that a config asks for: of a plain model its family's; of a recurrent one those that
// the name of the authors' code means, or the keys of ours.
static void families(void) {
#define OLMO_CODE "{'AutoModelForCausalLM':'raven_modeling_minimal_olmo.RavenForCausalLM'}"
    static const struct {
        const field *fields;
        const char *key, *value;
        bool post_norm, qkv_bias;
        retrofit_qk_norm qk_norm;
    } good[] = {
        {llama, "model_type", "'llama'", false, false, RETROFIT_QK_NORM_NONE},
        {llama, "model_type", "'qwen2'", false, true, RETROFIT_QK_NORM_NONE},
        {llama, "model_type", "'qwen2','sliding_window':4096,'use_sliding_window':false", false,
         true, RETROFIT_QK_NORM_NONE},
        {llama, "model_type", "'qwen3'", false, false, RETROFIT_QK_NORM_HEAD},
        {llama, "model_type", "'olmo2'", true, false, RETROFIT_QK_NORM_FULL},
        {raven, "qk_norm", "null,'block_norm':null,'qkv_bias':null", false, false,
         RETROFIT_QK_NORM_NONE},
        {raven, "qkv_bias", "true", false, true, RETROFIT_QK_NORM_NONE},
        {raven, "block_norm", "'post','qk_norm':'head'", true, false, RETROFIT_QK_NORM_HEAD},
        {raven, "auto_map", OLMO_CODE, true, false, RETROFIT_QK_NORM_FULL},
        {raven, "auto_map", OLMO_CODE ",'qk_norm':'none'", true, false, RETROFIT_QK_NORM_NONE},
        {raven, "auto_map", "{'AutoModelForCausalLM':'modeling_retrofit.RavenForCausalLM'}", false,
         false, RETROFIT_QK_NORM_NONE},
        {raven, "auto_map", "'_olmo.'", false, false, RETROFIT_QK_NORM_NONE},
    };
    static const char *const bad[] = {
        "'llama','qk_norm':'none'", "'qwen2','qkv_bias':true", "'olmo2','block_norm':'post'",
        "'qwen2','use_sliding_window':true", "'olmo2','sliding_window':64", "'qwen2_moe'",
        "'mistral'", "'olmo2','clip_qkv':8",
        "'qwen2','layer_types':['full_attention','sliding_attention']"};
    const retrofit_config *c = &config_read;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        bool read = read_config(good[i].fields, good[i].key, good[i].value);
        bool same = c->post_norm == good[i].post_norm && c->qkv_bias == good[i].qkv_bias;
        check(read && same && c->qk_norm == good[i].qk_norm, "%s %s: %s; %d %d %d", good[i].key,
              good[i].value, read ? "" : retrofit_error(), c->post_norm, c->qkv_bias, c->qk_norm);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        refuse_config(llama, "model_type", bad[i]);
    read_config(llama, "model_type", "'olmo2'");
    check(c->norm_eps == 1e-5f, "OLMo-2's epsilon is %g", (double)c->norm_eps);
}

// Two places that say how RoPE is scaled must agree.
static void rope_in_two_places(void) {
    static const char scaling[] = "'rope_scaling':{'type':'linear','factor':4}";
    static const struct {
        const char *parameters;
        bool fine;
    } cases[] = {{"null", true}, {"{}", true}, {"{'rope_type':'linear','factor':4}", true},
                 {"{'rope_type':'linear','factor':2}", false},
                 {"{'rope_type':'default','rope_theta':10000}", false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char value[256];
        snprintf(value, sizeof value, "%s,%s", cases[i].parameters, scaling);
        bool read = read_config(llama, "rope_parameters", value);
        check(read == cases[i].fine, "rope_parameters %s: %s", value, retrofit_error());
        if (read) check(config_read.rope_factor == 4, "factor %g", config_read.rope_factor);
    }
    check(!read_config(llama, "rope_theta", "20000,'rope_parameters':{'rope_theta':500}"),
          "two values of rope_theta");
    // transformers 4 writes 10000 when it saves a model of transformers 5 again.
    check(read_config(llama, "rope_theta", "10000,'rope_parameters':{'rope_theta':500}") &&
              config_read.rope_theta == 500,
          "rope_theta is %g: that of rope_parameters counts", config_read.rope_theta);
}

static void refuse_configs(const field *fields, const field *bad_fields) {
    // What no field that every config needs may be.
    static const char *const bad[] = {
        NULL,   "-1",   "1.5", "1e30", "99999999999999999999", "1e999", "9007199254740993", "'8'",
        "null", "true", "[8]", "{}",   "NaN",                  "0x10",  "08"};
    for (const field *f = fields; f->key; f++)
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) refuse_config(fields, f->key, bad[i]);
    for (const field *f = bad_fields; f->key; f++) refuse_config(fields, f->key, f->value);
}

static void hostile_configs(void) {
    bool good = read_config(llama, "", NULL) && read_config(raven, "", NULL);
    check(good, "the configs these are made from: %s", retrofit_error());
    followed_configs();
    families();
    rope_in_two_places();
    refuse_configs(llama, bad_llama);
    refuse_configs(raven, bad_raven);
    read_config(llama, "eos_token_id", "[1e300, 2]"); // accepted or not, without an undefined cast

    size_t size;
    retrofit_config config;
    char *text = retrofit_read_file(FIXTURES "tiny/base/config.json", &size);
    need(text != NULL, "config.json");
    for (size_t cut = 0; cut + 1 < size; cut++) { // the last byte may be a newline
        write_file(at("hostile/config.json"), text, cut);
        refused(retrofit_config_read(&config, at("hostile")), "config.json",
                "a truncated config.json");
    }
    free(text);
    remove(at("hostile/config.json"));
    hostile_load("config.json", "no config.json");
}

// ---- Token shards ------------------------------------------------------------------------------

// The tokens first, first + 1, …; the header says that there are `promised` of them.
static void write_shard(const char *name, int32_t magic, int32_t version, int32_t promised,
                        size_t count, uint32_t first) {
    FILE *f = fopen(at("%s", name), "wb");
    int32_t header[256] = {magic, version, promised};
    need(f != NULL, name);
    fwrite(header, sizeof *header, 256, f);
    for (size_t i = 0; i < count; i++) {
        uint32_t id = first + (uint32_t)i;
        uint16_t narrow = (uint16_t)id;
        if (magic == RETROFIT_SHARD_MAGIC_16) fwrite(&narrow, sizeof narrow, 1, f);
        else fwrite(&id, sizeof id, 1, f);
    }
    fclose(f);
}

static retrofit_data *open_data(const char *pattern, size_t T, size_t vocab, bool shuffle,
                                uint64_t seed) {
    retrofit_data *data = retrofit_data_open(at("%s", pattern), T, vocab, shuffle, seed);
    need(data != NULL, pattern);
    return data;
}

static void refuse_shards(const char *pattern, size_t vocab, bool shuffle, const char *name,
                          const char *what) {
    refused(retrofit_data_open(at("%s", pattern), 4, vocab, shuffle, 0), name, what);
}

// Shards follow each other in the order of their names; rows do not cross from one into the next.
static void rows_of_shards(void) {
    enum { T = 4 };
    int32_t tokens[T], labels[T];
    write_shard("b_2.bin", RETROFIT_SHARD_MAGIC_16, 1, 12, 12, 65000);
    write_shard("b_0.bin", RETROFIT_SHARD_MAGIC_32, 7, 23, 23, 100000);
    write_shard("b_1.bin", RETROFIT_SHARD_MAGIC_16, 1, 3, 3, 0);
    retrofit_data *data = open_data("b_*.bin", T, 131072, false, 0);
    check(retrofit_data_rows(data) == 6,
          "%zu rows, not 4 of the first shard, none of the second, 2 of the third",
          retrofit_data_rows(data));
    for (uint64_t i = 0; i < 20; i++) {
        int32_t row = (int32_t)(i % 6);
        int32_t first = row < 4 ? 100000 + 5 * row : 65000 + 5 * (row - 4);
        bool right = retrofit_data_row(data, i, tokens, labels);
        for (int t = 0; t < T; t++)
            right = right && tokens[t] == first + t && labels[t] == first + t + 1;
        check(right, "row %d starts with %d, %d; not %d", (int)i, tokens[0], tokens[1], first);
    }
    retrofit_data_close(data);
    data = open_data("b_2.bin", T, 65009, false, 0);
    check(retrofit_data_row(data, 0, tokens, labels), "ids below the vocabulary: %s",
          retrofit_error());
    refused(retrofit_data_row(data, 1, tokens, labels), "b_2.bin", "an id of V");
    retrofit_data_close(data);
}

enum { SHUFFLED = 500 }; // rows, each of one token and the next

// One epoch: which token each row begins with. Every row must come once, few in their old place.
static void read_epoch(retrofit_data *data, size_t epoch, int32_t order[SHUFFLED]) {
    size_t seen[SHUFFLED] = {0}, lost = 0, fixed = 0;
    int32_t label;
    for (size_t i = 0; i < SHUFFLED; i++) {
        need(retrofit_data_row(data, epoch * SHUFFLED + i, &order[i], &label), "row");
        need(label == order[i] + 1, "the next token");
        seen[order[i] / 2]++;
        fixed += order[i] / 2 == (int32_t)i;
    }
    for (size_t i = 0; i < SHUFFLED; i++) lost += seen[i] != 1;
    check(lost == 0 && fixed < 10, "epoch %zu: %zu rows not seen once, %zu in their old place",
          epoch, lost, fixed);
}

// Every epoch and every seed has an order of its own, and the order does not depend on what was
// read before.
static void shuffling(void) {
    static int32_t order[4][SHUFFLED]; // three epochs, and another seed's first
    int32_t token, label;
    write_shard("many.bin", RETROFIT_SHARD_MAGIC_32, 7, 2 * SHUFFLED, 2 * SHUFFLED, 0);
    retrofit_data *data = open_data("many.bin", 1, 2 * SHUFFLED, true, 5);
    retrofit_data *other = open_data("many.bin", 1, 2 * SHUFFLED, true, 6);
    for (size_t epoch = 0; epoch < 3; epoch++) read_epoch(data, epoch, order[epoch]);
    read_epoch(other, 0, order[3]);
    for (size_t a = 0; a < 4; a++)
        for (size_t b = 0; b < a; b++)
            check(memcmp(order[a], order[b], sizeof *order) != 0, "orders %zu and %zu are equal", a,
                  b);

    // Backwards, by another reader with the same seed.
    retrofit_data *again = open_data("many.bin", 1, 2 * SHUFFLED, true, 5);
    bool right = true;
    for (size_t i = 3 * SHUFFLED; right && i-- > 0;) {
        need(retrofit_data_row(again, i, &token, &label), "row");
        right = token == order[i / SHUFFLED][i % SHUFFLED];
        if (!right) check(false, "row %zu depends on what was read before", i);
    }
    retrofit_data_close(data);
    retrofit_data_close(other);
    retrofit_data_close(again);
}

static void hostile_token_shards(void) {
    static const struct {
        int32_t magic, version, promised, count;
        const char *what;
    } bad[] = {
        {RETROFIT_SHARD_MAGIC_16, 1, 20, 19, "a truncated shard"},
        {RETROFIT_SHARD_MAGIC_16, 1, 19, 20, "tokens too many"},
        {RETROFIT_SHARD_MAGIC_16, 1, -20, 20, "a negative count"},
        {RETROFIT_SHARD_MAGIC_16, 7, 20, 20, "another version"},
        {RETROFIT_SHARD_MAGIC_32, 1, 20, 20, "another version"},
        {20240521, 1, 20, 20, "another magic"},
        {RETROFIT_SHARD_MAGIC_16, 1, 4, 4, "fewer tokens than a row"},
        {RETROFIT_SHARD_MAGIC_16, 1, 0, 0, "no tokens"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_shard("bad.bin", bad[i].magic, bad[i].version, bad[i].promised, (size_t)bad[i].count,
                    0);
        refuse_shards("bad.bin", 99, i % 2, "bad.bin", bad[i].what);
    }
    write_file(at("bad.bin"), "\0", 1);
    refuse_shards("bad.bin", 99, false, "bad.bin", "a shard of one byte");
    write_file(at("bad.bin"), "", 0);
    refuse_shards("b*.bin", 131072, false, "bad.bin", "an empty file among shards");
    refuse_shards("none*.bin", 99, false, "none*.bin", "a pattern without a match");
}

static void name_tokenizer(const char *name, uint64_t hash) {
    int32_t header[256];
    FILE *f = fopen(at("%s", name), "r+b");
    need(f && fread(header, sizeof header, 1, f) == 1, name);
    rewind(f);
    header[3] = (int32_t)(uint32_t)hash;
    header[4] = (int32_t)(uint32_t)(hash >> 32);
    need(fwrite(header, sizeof header, 1, f) == 1 && !fclose(f), name);
}

// A shard's header may say which tokenizer made it.
static void tokenizers_of_shards(void) {
    retrofit_tokenizer *maker = retrofit_tokenizer_load(FIXTURES "lookup/base");
    retrofit_tokenizer *other = retrofit_tokenizer_load(FIXTURES "tokenizers/llama2_style");
    need(maker && other, "tokenizers");
    write_shard("made.bin", RETROFIT_SHARD_MAGIC_16, 1, 20, 20, 0);
    retrofit_data *data = open_data("made.bin", 4, 99, false, 0);
    check(retrofit_data_check(data, maker) && retrofit_data_check(data, other),
          "a shard that does not name its tokenizer is refused");
    retrofit_data_close(data);

    name_tokenizer("made.bin", retrofit_tokenizer_hash(maker));
    data = open_data("made.bin", 4, 99, false, 0);
    check(retrofit_data_check(data, maker), "the tokenizer of a shard is not known again: %s",
          retrofit_error());
    check(retrofit_data_check(data, NULL), "without a tokenizer it is refused");
    refused(retrofit_data_check(data, other), "made.bin", "another tokenizer's shard");
    retrofit_data_close(data);
    retrofit_tokenizer_free(maker);
    retrofit_tokenizer_free(other);
}

// What a run remembers of its data, and what it tells apart.
static void identity_of_data(void) {
    write_shard("i_0.bin", RETROFIT_SHARD_MAGIC_16, 1, 20, 20, 0);
    write_shard("i_1.bin", RETROFIT_SHARD_MAGIC_16, 1, 20, 20, 1);
    write_shard("j_0.bin", RETROFIT_SHARD_MAGIC_16, 1, 20, 20, 1);
    write_shard("k[1].bin", RETROFIT_SHARD_MAGIC_16, 1, 20, 20, 2);
    retrofit_data *both = open_data("i_*.bin", 4, 99, false, 0);
    retrofit_data *copy = open_data("j_0.bin", 4, 99, false, 0);
    retrofit_data *brackets = open_data("k[1].bin", 4, 99, false, 0);
    char *before = retrofit_data_describe(both);
    check(!strncmp(before, "i_0.bin 1064 ", 13) && strstr(before, "\ni_1.bin 1064 "), "%s", before);
    refused(retrofit_data_check_apart(both, copy), "j_0.bin", "the same contents twice");
    name_tokenizer("j_0.bin", 1); // the file is mapped
    refused(retrofit_data_check_apart(both, copy), "j_0.bin", "tokens of which one file says more");
    check(retrofit_data_check_apart(both, brackets), "%s", retrofit_error());
    refused(retrofit_data_check_apart(both, both), "i_0.bin", "the same file twice");
    retrofit_data_close(copy);
    retrofit_data_close(both);

    write_shard("i_1.bin", RETROFIT_SHARD_MAGIC_16, 1, 20, 20, 3);
    both = open_data("i_*.bin", 4, 99, false, 0);
    char *after = retrofit_data_describe(both);
    check(strcmp(before, after) != 0, "other tokens, the same description: %s", after);
    free(before);
    free(after);
    check(retrofit_data_check_ids(both), "%s", retrofit_error());
    retrofit_data_close(both);
    both = open_data("i_*.bin", 4, 22, false, 0); // the last id is 22, in the last token
    refused(retrofit_data_check_ids(both), "i_1.bin: token 19 is 22", "an id of V at the end");
    retrofit_data_close(both);
    retrofit_data_close(brackets);
}

// Large blocks are sampled: a change at either end shows, and so does a shift.
static void hashes_of_samples(void) {
    size_t size = 5000003;
    char *data = retrofit_allocate(size + 1, 1);
    need(data != NULL, "memory");
    for (size_t i = 0; i < size; i++) data[i] = (char)retrofit_hash(3, i);
    uint64_t hash = retrofit_sample_hash(data, size);
    check(hash == retrofit_sample_hash(data, size), "the same block twice");
    check(hash != retrofit_sample_hash(data + 1, size), "a block moved by one byte");
    check(hash != retrofit_sample_hash(data, size - 1), "a block without its last byte");
    for (size_t i = 0; i < 2; i++) {
        size_t at = i * (size - 1);
        data[at] ^= 1;
        check(hash != retrofit_sample_hash(data, size), "a bit changed at %zu", at);
        data[at] ^= 1;
    }
    free(data);
}

// ---- All of it ---------------------------------------------------------------------------------

static void open_fixtures(void) {
    size_t size;
    char *text = retrofit_read_file(FIXTURES "tiny/train.json", &size);
    need(text != NULL, "train.json");
    recipe = retrofit_json_parse(text, size, "train.json");
    need(recipe != NULL, "train.json");
    need(retrofit_safetensors_open(&fixtures, FIXTURES "tiny/train.safetensors"), "fixtures");
    free(text);

    strcpy(root, "/tmp/retrofit_XXXXXX");
    need(mkdtemp(root) && !atexit(remove_root), "temporary directory");
    char *config = retrofit_read_file(FIXTURES "tiny/base/config.json", &size);
    need(config && !mkdir(at("hostile"), 0777), "hostile");
    write_file(at("hostile/config.json"), config, size);
    free(config);
}

int main(void) {
    open_fixtures();
    sampler();
    schedules();
    rounded_shares();
    for (int i = RETROFIT_ADAMW; i <= RETROFIT_ELLISADAM; i++) {
        retrofit_optimizer_kind kind = (retrofit_optimizer_kind)i;
        ten_steps(kind);
        decay(kind);
        throttling(kind);
    }
    finite_differences(TINY, 3);
    finite_differences(PLAIN, 0);
    truncation();
    ways_to_run_three_recurrences();
    places_in_the_batch();
    impossible_passes();
    unrolled();
    state_sizes();
    freezing();
    flops();
    paper_flops();
    accumulation();
    repetition();
    baseline();

    save_and_load(TINY);
    save_and_load(PLAIN);
    save_and_load(FIXTURES "llama3/recurrent");
    save_and_load(FIXTURES "olmo2/recurrent");
    save_and_load(FIXTURES "qwen2/base");
    save_and_load(FIXTURES "qwen3/recurrent");
    directories();
    hostile_bytes();
    hostile_headers();
    hostile_tensors();
    f16_files();
    released_surveys();
    hostile_shards();
    hostile_configs();
    rows_of_shards();
    shuffling();
    hostile_token_shards();
    tokenizers_of_shards();
    identity_of_data();
    hashes_of_samples();
    retrofit_json_free(recipe);
    retrofit_safetensors_close(&fixtures);
    return finish("train");
}

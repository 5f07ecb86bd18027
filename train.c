// train: teaches a model its recurrence (method: paper section 4), or trains a plain Llama by the same loop as the baseline.
#define RETROFIT_IMPLEMENTATION
#include "retrofit.h"

static struct {
    const char *model, *data, *val, *out, *eval_list;
    size_t steps, batch, micro, seq_len, mean_recurrence, backprop_depth, seed, save_every, eval_every, eval_rows;
    double lr, muon_lr, weight_decay, beta1, beta2, clip, warmup, cooldown, min_lr_ratio, curriculum_warmup;
    int optimizer, curriculum, state_init, device, precision;
    bool shuffle, resume, dry_run, recompute;
} o = {.eval_list = "1,2,4,8",     .micro = 8,       .seed = 1,      .eval_rows = 64,          .lr = 5e-5,        .muon_lr = 1e-3,
       .weight_decay = 1e-4,       .beta1 = 0.9,     .beta2 = 0.95,  .clip = 1,                .warmup = 0.0025,  .cooldown = 0.6,
       .min_lr_ratio = 0.001,      .curriculum_warmup = 0.75,        .curriculum = RETROFIT_CURRICULUM_1_SQRT, .optimizer = RETROFIT_MUON};

static const retrofit_option options[] = {
    {"Files", RETROFIT_HEADING, NULL, NULL, NULL},
    {"model", RETROFIT_STRING, &o.model, "DIR", "what to train: a recurrent model, or a plain Llama as the baseline"},
    {"data", RETROFIT_STRING, &o.data, "'GLOB'", "token shards (.bin, made by convert --tokenize)"},
    {"val", RETROFIT_STRING, &o.val, "'GLOB'", "shards for the validation loss"},
    {"out", RETROFIT_STRING, &o.out, "DIR", "gets step_00000100/ (a model), latest -> the newest, log.jsonl"},
    {"resume", RETROFIT_FLAG, &o.resume, NULL, "go on from DIR/latest, to the same bits as if never stopped"},
    {"save-every", RETROFIT_SIZE, &o.save_every, "N", "steps between checkpoints (0: at the end only)"},
    {"dry-run", RETROFIT_FLAG, &o.dry_run, NULL, "print parameters, memory, FLOPs and schedule, and stop"},
    {"Batches", RETROFIT_HEADING, NULL, NULL, NULL},
    {"steps", RETROFIT_SIZE, &o.steps, "N", "optimizer steps"},
    {"micro-batch-size", RETROFIT_SIZE, &o.micro, "ROWS", "rows in memory at a time; one draw of recurrences each (8)"},
    {"batch-size", RETROFIT_SIZE, &o.batch, "ROWS", "rows per optimizer step (one micro-batch)"},
    {"seq-len", RETROFIT_SIZE, &o.seq_len, "T", "tokens in a row (1024, or the model's context)"},
    {"shuffle", RETROFIT_FLAG, &o.shuffle, NULL, "read rows in a random order, another in each epoch"},
    {"seed", RETROFIT_SIZE, &o.seed, "N", "of start states and the shuffle (1); recurrences are drawn as the authors draw them"},
    {"Recurrence", RETROFIT_HEADING, NULL, NULL, NULL},
    {"mean-recurrence", RETROFIT_SIZE, &o.mean_recurrence, "R", "mean of the drawn recurrences at the end of the curriculum (the model's)"},
    {"backprop-depth", RETROFIT_SIZE, &o.backprop_depth, "K", "recurrences that get gradients (the model's)"},
    {"curriculum", RETROFIT_CHOICE, &o.curriculum, "none|linear|1-sqrt", "how the mean grows to R (1-sqrt)"},
    {"curriculum-warmup", RETROFIT_REAL, &o.curriculum_warmup, "F", "over this share of the steps (.75)"},
    {"state-init", RETROFIT_CHOICE, &o.state_init, "normal|zero", "the start state (normal)"},
    {"Optimizer", RETROFIT_HEADING, NULL, NULL, NULL},
    {"optimizer", RETROFIT_CHOICE, &o.optimizer, "adamw|muon", "muon: matrices of the body; embedding, head, norms by adamw (muon)"},
    {"lr", RETROFIT_REAL, &o.lr, "F", "peak learning rate of AdamW (5e-5)"},
    {"muon-lr", RETROFIT_REAL, &o.muon_lr, "F", "peak learning rate of Muon (1e-3)"},
    {"weight-decay", RETROFIT_REAL, &o.weight_decay, "F", "on every parameter (1e-4)"},
    {"beta1", RETROFIT_REAL, &o.beta1, "F", "AdamW (.9)"},
    {"beta2", RETROFIT_REAL, &o.beta2, "F", "AdamW (.95)"},
    {"clip", RETROFIT_REAL, &o.clip, "F", "largest norm of the gradient; 0: no clipping (1)"},
    {"warmup", RETROFIT_REAL, &o.warmup, "F", "share of the steps in which the learning rate rises (.0025)"},
    {"cooldown", RETROFIT_REAL, &o.cooldown, "F", "share of the steps in which it falls again, a cosine (.6)"},
    {"min-lr-ratio", RETROFIT_REAL, &o.min_lr_ratio, "F", "where it starts and ends, as a share of the peak (.001)"},
    {"Validation", RETROFIT_HEADING, NULL, NULL, NULL},
    {"eval-every", RETROFIT_SIZE, &o.eval_every, "N", "steps between validations (0: at the end only)"},
    {"eval-recurrences", RETROFIT_STRING, &o.eval_list, "1,2,4,8", "recurrences to validate with"},
    {"eval-rows", RETROFIT_SIZE, &o.eval_rows, "N", "rows of --val to use (64)"},
    {"Machine", RETROFIT_HEADING, NULL, NULL, NULL},
    {"device", RETROFIT_CHOICE, &o.device, "auto|cpu|cuda", "where to compute; auto: on a GPU if there is one (auto)"},
    {"precision", RETROFIT_CHOICE, &o.precision, "bf16|fp32", "of matrices and activations on a GPU; masters and sums are fp32 (bf16)"},
    {"recompute", RETROFIT_FLAG, &o.recompute, NULL, "keep a sixth of the activations and compute the rest again: a third more work"},
};

__attribute__((format(printf, 2, 3), noreturn)) static void die(int code, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("train: ", stderr), vfprintf(stderr, format, args), fputc('\n', stderr);
    va_end(args);
    exit(code);
}

// ---- What one step does ----------------------------------------------------------------------------------------------------
typedef struct {
    size_t mean, depth;  // recurrences: mean of the draw, how many get gradients
    float lr, muon_lr;
} plan;

static plan plan_of(const retrofit_config *c, size_t step) { // step from 0
    plan p = {0, 0, 0, 0};
    if (!retrofit_is_plain(c)) {
        p.mean = (size_t)ceil(retrofit_curriculum((retrofit_curriculum_kind)o.curriculum, step, o.steps, o.curriculum_warmup, (double)o.mean_recurrence));
        if (p.mean == 0) p.mean = 1;
        p.depth = p.mean < o.backprop_depth ? p.mean : o.backprop_depth;
    }
    p.lr = (float)retrofit_learning_rate(step, o.steps, o.warmup, o.cooldown, o.min_lr_ratio, o.lr);
    p.muon_lr = (float)retrofit_learning_rate(step, o.steps, o.warmup, o.cooldown, o.min_lr_ratio, o.muon_lr);
    return p;
}

// n and k of micro-batch j (from 0) of a step; none for a plain Llama.
static void draw(const plan *p, size_t step, size_t j, size_t *n, size_t *k) {
    *n = *k = 0;
    if (p->mean) retrofit_draw_recurrences(step * (o.batch / o.micro) + j + 1, p->mean, p->depth, n, k, NULL);
}

// FLOPs of the steps [from, to), by the draws they will make.
static double flops_of(const retrofit_config *c, size_t from, size_t to) {
    double flops = 0;
    for (size_t step = from; step < to; step++) {
        plan p = plan_of(c, step);
        for (size_t j = 0, n, k; j < o.batch / o.micro; j++)
            draw(&p, step, j, &n, &k), flops += retrofit_flops_per_token(c, o.seq_len, n, k) * (double)(o.micro * o.seq_len);
    }
    return flops;
}

// ---- Validation: the same rows and start states every time; s_r of every r lies on one way -----------------------------
static void evaluate(retrofit_activations *a, retrofit_data *val, FILE *log, size_t step, int32_t *tokens, int32_t *labels) {
    size_t r[32], count, rows = least(retrofit_data_rows(val), o.eval_rows), T = o.seq_len;
    double loss[32] = {0};
    retrofit_sizes(o.eval_list, r, 32, &count);
    if (retrofit_is_plain(&a->model->config)) count = 1, r[0] = 0;
    for (size_t at = 0; at < rows; at += o.micro) {
        size_t b = least(rows - at, o.micro), done = SIZE_MAX; // recurrences so far; a list that goes back begins anew
        for (size_t i = 0; i < b; i++)
            if (!retrofit_data_row(val, at + i, tokens + i * T, labels + i * T)) die(1, "%s", retrofit_error());
        if (!retrofit_prelude(a, tokens, b, T)) die(1, "%s", retrofit_error());
        for (size_t i = 0; i < count; i++) {
            if (r[i] < done && r[i]) retrofit_start(a, o.state_init ? 0 : a->model->config.state_std, at);
            if (r[i] < done) done = 0;
            retrofit_recur(a, r[i] - done, 0), done = r[i];
            retrofit_coda(a);
            loss[i] += retrofit_loss(a, labels, 0) * (double)b;
        }
    }
    fprintf(stderr, "step %zu: validation loss", step);
    fprintf(log, "{\"step\":%zu,\"val\":{", step);
    for (size_t i = 0; i < count; i++) {
        if (r[i]) fprintf(stderr, "  r=%zu", r[i]);
        fprintf(stderr, " %.4f", loss[i] / (double)rows);
        fprintf(log, "%s\"%zu\":%.6f", i ? "," : "", r[i], loss[i] / (double)rows);
    }
    fprintf(stderr, "\n"), fprintf(log, "}}\n"), fflush(log);
}

// ---- Checkpoints: OUT/step_00000100, and OUT/latest, a link that always names a complete one ----------------------------
static size_t data_rows;
static void recipe(char *text, size_t size) { // what must not change between a run and its continuation
    static const char *const curricula[] = {"none", "linear", "1-sqrt"};
    snprintf(text, size,
             "steps=%zu batch-size=%zu micro-batch-size=%zu seq-len=%zu optimizer=%s lr=%.9g muon-lr=%.9g weight-decay=%.9g beta1=%.9g beta2=%.9g "
             "clip=%.9g warmup=%.9g cooldown=%.9g min-lr-ratio=%.9g mean-recurrence=%zu backprop-depth=%zu curriculum=%s "
             "curriculum-warmup=%.9g state-init=%s seed=%zu shuffle=%d data-rows=%zu",
             o.steps, o.batch, o.micro, o.seq_len, o.optimizer == RETROFIT_MUON ? "muon" : "adamw", o.lr, o.muon_lr, o.weight_decay, o.beta1,
             o.beta2, o.clip, o.warmup, o.cooldown, o.min_lr_ratio, o.mean_recurrence, o.backprop_depth, curricula[o.curriculum],
             o.curriculum_warmup, o.state_init ? "zero" : "normal", o.seed, o.shuffle, data_rows);
}

static void save(const retrofit_model *m, size_t step, double flops, const char *tokenizer) {
    char name[32], path[RETROFIT_PATH], link[RETROFIT_PATH], temporary[RETROFIT_PATH], before[RETROFIT_PATH], text[1024], done[32], spent[32];
    snprintf(name, sizeof name, "step_%08zu", step);
    if (!retrofit_path(path, o.out, name) || !retrofit_path(link, o.out, "latest") || !retrofit_path(temporary, o.out, "latest.tmp"))
        die(1, "%s", retrofit_error());
    snprintf(done, sizeof done, "%zu", step), snprintf(spent, sizeof spent, "%.17g", flops);
    recipe(text, sizeof text);
    const char *metadata[] = {"step", done, "flops", spent, "recipe", text, NULL};
    ssize_t length = readlink(link, before, sizeof before - 1);
    before[length > 0 ? length : 0] = 0;
    char *directory = retrofit_directory_begin(path);
    if (!directory) die(1, "%s", retrofit_error());
    if (strcmp(before, name)) retrofit_directory_abandon(path); // written by a run that was stopped before it could link to it
    if (!retrofit_save(m, directory, RETROFIT_F32, tokenizer) || !retrofit_save_optimizer(m, directory, metadata) ||
        !retrofit_directory_commit(directory, path)) {
        retrofit_directory_abandon(directory);
        die(1, "%s (the checkpoint before is untouched)", retrofit_error());
    }
    free(directory);
    unlink(temporary);
    if (symlink(name, temporary) || rename(temporary, link) || !sync_directory(o.out)) die(1, "%s: %s", link, strerror(errno));
    if (*before && strcmp(before, name) && !strchr(before, '/') && retrofit_path(path, o.out, before))
        retrofit_directory_abandon(path); // only now is the one before of no more use
}

// Removes what a run that was killed while saving left beside the checkpoint that `latest` names.
static void sweep(const char *latest) {
    char path[RETROFIT_PATH], keep[RETROFIT_PATH] = {0};
    DIR *d = readlink(latest, keep, sizeof keep - 1) > 0 ? opendir(o.out) : NULL;
    for (struct dirent *e; d && (e = readdir(d));)
        if (!strncmp(e->d_name, "step_", 5) && strcmp(e->d_name, keep) && retrofit_path(path, o.out, e->d_name)) retrofit_directory_abandon(path);
    if (d) closedir(d);
}

// Takes up the moments and the progress of a checkpoint; log.jsonl is cut back to its step. validated: whether the log has that step's
// validation, which comes after the checkpoint.
static size_t resume(retrofit_model *m, const char *directory, double *flops, bool *validated) {
    retrofit_map f;
    char text[1024], path[RETROFIT_PATH];
    if (!retrofit_path(path, directory, "optimizer.safetensors") || !retrofit_safetensors_open(&f, path)) die(1, "%s", retrofit_error());
    const char *step = retrofit_safetensors_metadata(&f, "step"), *spent = retrofit_safetensors_metadata(&f, "flops");
    const char *theirs = retrofit_safetensors_metadata(&f, "recipe");
    recipe(text, sizeof text);
    if (!step || !spent || !theirs) die(1, "%s/optimizer.safetensors: no step, flops and recipe: not written by train", directory);
    for (const char *a = theirs, *b = text; *a || *b;) { // name=value, name=value, …
        size_t n = strcspn(a, " "), k = strcspn(b, " ");
        if (n != k || strncmp(a, b, n)) die(1, "--resume: the run has --%.*s, these options say --%.*s", (int)n, a, (int)k, b);
        a += n + (a[n] == ' '), b += k + (b[k] == ' ');
    }
    sweep(directory);
    size_t done = strtoul(step, NULL, 10), size, keep = 0;
    *flops = strtod(spent, NULL);
    retrofit_safetensors_close(&f);
    if (!retrofit_load_optimizer(m, &f, directory)) die(1, "%s", retrofit_error());
    retrofit_safetensors_close(&f);
    if (!retrofit_path(path, o.out, "log.jsonl")) die(1, "%s", retrofit_error());
    char *log = read_file(path, &size);
    for (char *line = log; line && *line; line = strchr(line, '\n') + 1) {
        size_t at = 0;
        if (!strchr(line, '\n') || (sscanf(line, "{\"step\":%zu", &at) == 1 && at > done)) break;
        keep = (size_t)(strchr(line, '\n') + 1 - log);
        *validated = at == done && strstr(line, "\"val\"") && strstr(line, "\"val\"") < log + keep;
    }
    if (log && truncate(path, (off_t)keep)) die(1, "%s: %s", path, strerror(errno));
    free(log);
    return done;
}

// ---- Memory -------------------------------------------------------------------------------------------------------------------
typedef struct {
    size_t weights, gradients, moments, activations, all; // bytes
} memory;

static retrofit_keep keep(void) { return o.recompute ? RETROFIT_KEEP_INPUTS : RETROFIT_KEEP_ALL; }

static memory memory_of(retrofit_model *m, size_t micro, retrofit_keep how) { // of a model that has no memory yet
    memory n;
    retrofit_training_bytes(m, (retrofit_optimizer_kind)o.optimizer, &n.weights, &n.gradients, &n.moments);
    n.activations = retrofit_activations_bytes(&m->config, m->ops, micro, o.seq_len, o.backprop_depth, how);
    if (n.activations == SIZE_MAX) die(1, "--micro-batch-size %zu of --seq-len %zu is more than memory can hold", micro, o.seq_len);
    n.all = n.weights + n.gradients + n.moments + n.activations;
    return n;
}

// Ends a run that would not fit before it begins, with what would: smaller micro-batches of the same batch, recomputing if need be.
static void check_memory(retrofit_model *m) {
    size_t room = m->ops->room(), need = memory_of(m, o.micro, keep()).all;
    if (need <= room) return;
    for (int how = keep(); how <= RETROFIT_KEEP_INPUTS; how++)
        for (size_t micro = o.micro; micro; micro--)
            if (o.batch % micro == 0 && memory_of(m, micro, (retrofit_keep)how).all <= room)
                die(1, "training needs %.1f GB, %.1f GB are free: --batch-size %zu --micro-batch-size %zu%s would fit (%.1f GB)", (double)need / 1e9,
                    (double)room / 1e9, o.batch, micro, how == RETROFIT_KEEP_INPUTS ? " --recompute" : "",
                    (double)memory_of(m, micro, (retrofit_keep)how).all / 1e9);
    die(1, "training needs %.1f GB, %.1f GB are free, and no micro-batch fits: try a shorter --seq-len or smaller --backprop-depth",
        (double)need / 1e9, (double)room / 1e9);
}

// ---- Dry run ------------------------------------------------------------------------------------------------------------------
static void dry_run(retrofit_model *m, const char *device) {
    memory need = memory_of(m, o.micro, keep());
    static const char *const parts[] = {"embedding", "prelude", "adapter", "core", "coda", "final norm", "head"};
    const retrofit_config *c = &m->config;
    size_t in[RETROFIT_PARTS] = {0};
    for (size_t i = 0; i < m->parameter_count; i++) {
        const retrofit_parameter *p = m->parameters[i];
        in[p->part] += p->rows * p->cols;
    }
    printf("parameters\n");
    for (int i = 0; i < RETROFIT_PARTS; i++)
        if (in[i]) printf("  %-12s %14zu\n", parts[i], in[i]);
    printf("  %-12s %14zu\nmemory on %s\n", "all", m->weight_count, device);
    printf("  weights      %10.3f GB\n  gradients    %10.3f GB\n  optimizer    %10.3f GB\n  activations  %10.3f GB  (micro-batch %zu x %zu, depth %zu)\n"
           "  all          %10.3f GB, %.3f GB are free\n", (double)need.weights / 1e9, (double)need.gradients / 1e9, (double)need.moments / 1e9,
           (double)need.activations / 1e9, o.micro, o.seq_len, c->core ? o.backprop_depth : 0, (double)need.all / 1e9, (double)m->ops->room() / 1e9);
    double disk = 4 * (double)m->weight_count;
    for (size_t i = 0; i < m->parameter_count; i++) {
        const retrofit_parameter *p = m->parameters[i];
        disk += (p->kind == RETROFIT_MATRIX && o.optimizer == RETROFIT_MUON ? 4.0 : 8.0) * (double)(p->rows * p->cols);
    }
    printf("checkpoint     %10.3f GB on disk\n", disk / 1e9);
    printf("training       %10.3g FLOPs, %zu steps of %zu tokens (%zu micro-batches)\n\n", flops_of(c, 0, o.steps), o.steps, o.batch * o.seq_len,
           o.batch / o.micro);
    printf("%8s %6s %6s %12s %12s   (n,k) of the micro-batches\n", "step", "mean", "depth", "lr", "muon lr");
    for (size_t i = 0, step = 0; step < o.steps; step = ++i * o.steps / 24 > step ? i * o.steps / 24 : step + 1) {
        plan p = plan_of(c, step);
        printf("%8zu %6zu %6zu %12.4e %12.4e  ", step + 1, p.mean, p.depth, (double)p.lr, o.optimizer == RETROFIT_MUON ? (double)p.muon_lr : 0.0);
        for (size_t j = 0, a, b; j < o.batch / o.micro && j < 6; j++) draw(&p, step, j, &a, &b), printf(" %zu,%zu", a, b);
        printf("%s\n", o.batch / o.micro > 6 ? " …" : "");
    }
}

// ---- The live line --------------------------------------------------------------------------------------------------------------
static void show(size_t step, double loss, double norm, const plan *p, size_t n, size_t k, double rate, double speed, double peak, double left) {
    static double last;
    char share[32] = "";
    bool live = isatty(2);
    if (!live && step != 1 && step != o.steps && retrofit_seconds() - last < 2) return; // a log file wants no line per step
    last = retrofit_seconds();
    if (peak > 0) snprintf(share, sizeof share, " (%.0f %% of peak)", 100 * speed / peak);
    fprintf(stderr, "%sstep %zu/%zu  loss %.4f  %.0f tok/s  %.1f %cFLOP/s%s  n,k %zu,%zu  r %zu  lr %.2e  |g| %.2f  ETA %zu:%02zu:%02zu%s", live ? "\r" : "",
            step, o.steps, loss, rate, speed / (speed < 1e12 ? 1e9 : 1e12), speed < 1e12 ? 'G' : 'T', share, n, k, p->mean, (double)(o.optimizer == RETROFIT_MUON ? p->muon_lr : p->lr), norm,
            (size_t)left / 3600, (size_t)left / 60 % 60, (size_t)left % 60, live ? (step == o.steps ? "\033[K\n" : "\033[K") : "\n");
}

static void check_options(const retrofit_config *c) {
    size_t r[32], count;
    if (!o.batch) o.batch = o.micro;
    if (!o.seq_len) o.seq_len = c->context < 1024 ? c->context : 1024;
    if (!o.mean_recurrence) o.mean_recurrence = c->mean_recurrence;
    if (!o.backprop_depth) o.backprop_depth = c->backprop_depth;
    if (!o.steps) die(2, "--steps is needed: how many optimizer steps?");
    if (o.batch > 1 << 24) die(2, "--batch-size is at most %d", 1 << 24);
    if (!o.micro || o.batch % o.micro) die(2, "--batch-size %zu is not a multiple of --micro-batch-size %zu", o.batch, o.micro);
    if (o.seq_len > c->context) die(2, "--seq-len %zu is more than the model's context of %zu", o.seq_len, c->context);
    if (o.mean_recurrence > 1 << 16 || o.backprop_depth > 1 << 16) die(2, "--mean-recurrence and --backprop-depth are at most 65536");
    struct { const char *name; double value, low, high; } ranges[] = {
        {"lr", o.lr, 0, 1e3}, {"muon-lr", o.muon_lr, 0, 1e3}, {"weight-decay", o.weight_decay, 0, 1e3}, {"beta1", o.beta1, 0, 0.999999},
        {"beta2", o.beta2, 0, 0.9999999}, {"clip", o.clip, 0, 1e9}, {"warmup", o.warmup, 0, 1}, {"cooldown", o.cooldown, 0, 1},
        {"min-lr-ratio", o.min_lr_ratio, 0, 1}, {"curriculum-warmup", o.curriculum_warmup, 0, 1}};
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (!(ranges[i].value >= ranges[i].low && ranges[i].value <= ranges[i].high))
            die(2, "--%s %g is not between %g and %g", ranges[i].name, ranges[i].value, ranges[i].low, ranges[i].high);
    if (!retrofit_sizes(o.eval_list, r, 32, &count)) die(2, "--eval-recurrences: %s", retrofit_error());
    if (!o.eval_rows) die(2, "--eval-rows is at least 1");
}

int main(int argc, char **argv) {
    int code = retrofit_options(argc, argv, options, sizeof options / sizeof *options,
                                "train --model DIR --data 'GLOB' --out DIR --steps N [options]\n"
                                "Trains a recurrent model made by convert, or a plain Llama as the baseline.\n", NULL, NULL);
    if (code >= 0) return code;
    if (!o.model || (!o.dry_run && (!o.data || !o.out))) die(2, "--model, --data, --out and --steps are needed (see --help)");
    char resolved[RETROFIT_PATH], latest[RETROFIT_PATH], path[RETROFIT_PATH];
    const char *source = retrofit_model_directory(o.model, resolved);
    retrofit_config config;
    if (!retrofit_config_read(&config, source)) die(1, "%s", retrofit_error());
    check_options(&config);
    char device[256];
    const retrofit_ops *ops = retrofit_device((retrofit_place)o.device, o.precision, device);
    retrofit_model *shape = ops ? retrofit_model_new(&config, ops) : NULL;
    if (!shape) die(1, "%s", retrofit_error());
    if (o.dry_run) return dry_run(shape, device), retrofit_free(shape), 0;
    size_t accumulate = o.batch / o.micro, T = o.seq_len, N = o.micro * T;
    retrofit_data *data = retrofit_data_open(o.data, T, config.vocab, o.shuffle, o.seed), *val = NULL;
    if (!data || (o.val && !(val = retrofit_data_open(o.val, T, config.vocab, false, 0)))) die(1, "%s", retrofit_error());
    if (!retrofit_path(latest, o.out, "latest") || !retrofit_path(path, o.out, "log.jsonl")) die(1, "%s", retrofit_error());
    bool exists = access(latest, F_OK) == 0;
    if (exists && !o.resume) die(2, "%s holds a run already: give --resume to go on with it, or another --out", o.out);
    if (!exists && o.resume) die(2, "--resume: there is no checkpoint in %s", o.out);

    check_memory(shape), retrofit_free(shape);
    retrofit_model *m = retrofit_load(o.resume ? latest : source, ops, RETROFIT_TRAINING);
    if (!m || !retrofit_optimizer_init(m, (retrofit_optimizer_kind)o.optimizer)) die(1, "%s", retrofit_error());
    double flops = 0;
    data_rows = retrofit_data_rows(data);
    bool validated = true;
    size_t first = o.resume ? resume(m, latest, &flops, &validated) : 0;
    m->config.mean_recurrence = o.mean_recurrence, m->config.backprop_depth = o.backprop_depth;
    retrofit_activations *a = retrofit_activations_new(m, o.micro, T, o.backprop_depth, keep(), 0, 0);
    int32_t *tokens = malloc(N * sizeof *tokens), *labels = malloc(N * sizeof *labels);
    if (!a || !tokens || !labels) die(1, "%s", a ? "out of memory" : retrofit_error());
    char out[RETROFIT_PATH];
    snprintf(out, sizeof out, "%s", o.out);
    if (!make_directories(out, false)) die(1, "%s", retrofit_error());
    FILE *log = fopen(path, o.resume ? "ab" : "wb"); // a run that ended before its first checkpoint begins anew
    if (!log) die(1, "%s: %s", path, strerror(errno));
    retrofit_optimizer optimizer = {(retrofit_optimizer_kind)o.optimizer, 0, 0, (float)o.beta1, (float)o.beta2,
                                    o.optimizer == RETROFIT_MUON ? 1e-10f : 1e-8f, (float)o.weight_decay, 0.95f, (float)o.clip};
    double ahead = flops_of(&m->config, first, o.steps), begin = retrofit_seconds(), spent = 0, step_time = 0;
    fprintf(stderr, "%s%zu parameters, %zu rows of %zu tokens, %zu steps of %zu, %.3g FLOPs, on %s\n", first ? "resumed: " : "", m->weight_count,
            retrofit_data_rows(data), T, o.steps, o.batch * T, ahead, device);
    if (val && !validated && (first == o.steps || (o.eval_every && first % o.eval_every == 0))) evaluate(a, val, log, first, tokens, labels);
    for (size_t step = first; step < o.steps; step++) {
        plan p = plan_of(&m->config, step);
        double loss = 0, before = retrofit_seconds(), step_flops = 0;
        size_t n = 0, k = 0;
        retrofit_zero_grad(m);
        for (size_t j = 0; j < accumulate; j++) {
            uint64_t batch = (uint64_t)step * accumulate + j;
            for (size_t i = 0; i < o.micro; i++)
                if (!retrofit_data_row(data, batch * o.micro + i, tokens + i * T, labels + i * T)) die(1, "%s", retrofit_error());
            draw(&p, step, j, &n, &k);
            if (!retrofit_forward(a, tokens, o.micro, T, o.state_init ? 0 : m->config.state_std, hash64(o.seed, batch), n, k)) die(1, "%s", retrofit_error());
            double micro_loss = retrofit_loss(a, labels, 1.0f / (float)accumulate);
            if (!isfinite(micro_loss)) die(1, "step %zu, micro-batch %zu: the loss is %g: nothing was saved since the last checkpoint; try a lower --lr", step + 1, j + 1, micro_loss);
            retrofit_backward(a);
            loss += micro_loss / (double)accumulate;
            step_flops += retrofit_flops_per_token(&m->config, T, n, k) * (double)N;
        }
        optimizer.lr = p.lr, optimizer.muon_lr = p.muon_lr;
        double norm = retrofit_optimizer_step(m, &optimizer, step + 1);
        if (!isfinite(norm)) die(1, "step %zu: the gradient's norm is %g: nothing was saved since the last checkpoint; try a lower --lr", step + 1, norm);
        flops += step_flops, spent += step_flops;
        step_time = retrofit_seconds() - before;
        double elapsed = retrofit_seconds() - begin;
        show(step + 1, loss, norm, &p, n, k, (double)(o.batch * T) / step_time, step_flops / step_time, ops->peak(), (ahead - spent) * elapsed / spent);
        fprintf(log,
                "{\"step\":%zu,\"loss\":%.7g,\"grad_norm\":%.7g,\"mean_recurrence\":%zu,\"n\":%zu,\"k\":%zu,\"lr\":%.7g,\"muon_lr\":%.7g,"
                "\"tokens\":%zu,\"flops\":%.7g,\"seconds\":%.3f}\n",
                step + 1, loss, norm, p.mean, n, k, (double)p.lr, o.optimizer == RETROFIT_MUON ? (double)p.muon_lr : 0.0, (step + 1) * o.batch * T, flops, step_time);
        fflush(log);
        bool last = step + 1 == o.steps;
        if (last || (o.save_every && (step + 1) % o.save_every == 0)) save(m, step + 1, flops, o.resume ? latest : source);
        if (val && (last || (o.eval_every && (step + 1) % o.eval_every == 0))) evaluate(a, val, log, step + 1, tokens, labels);
    }
    fprintf(stderr, "%s/latest after %zu steps, %.3g FLOPs, %.0f s\n", o.out, o.steps, flops, retrofit_seconds() - begin);
    if (fclose(log)) die(1, "%s: writing failed: %s", path, strerror(errno));
    free(tokens), free(labels), retrofit_activations_free(a), retrofit_free(m), retrofit_data_close(data), retrofit_data_close(val);
    return 0;
}

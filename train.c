// train: teaches a model its recurrence (method: paper section 4), or trains a plain Llama by the same loop as the baseline.
#define RETROFIT_IMPLEMENTATION
#include "retrofit.h"
#include <signal.h>
#include <sys/statvfs.h>

static struct {
    const char *model, *data, *val, *out, *eval_list, *fixed, *samples;
    size_t steps, batch, micro, seq_len, mean_recurrence, backprop_depth, depth_start, seed, save_every, keep, eval_every, eval_rows,
        sample_tokens, max_bad_steps;
    double lr, muon_lr, weight_decay, beta1, beta2, clip, warmup, cooldown, min_lr_ratio, curriculum_warmup, depth_warmup, flops,
        time_limit, save_before;
    int optimizer, trains, curriculum, state_init, device, precision, dry_run;
    bool shuffle, resume, resume_anyway, recompute, throttle;
} o = {.eval_list = "1,2,4,8,16,32", .eval_rows = 64, .sample_tokens = 32, .micro = 8, .seed = 1, .depth_start = 1, .keep = 1,
       .lr = 5e-5, .muon_lr = 1e-3, .weight_decay = 1e-4, .beta1 = 0.9, .beta2 = 0.95, .clip = 1, .warmup = 0.0025, .cooldown = 0.6,
       .min_lr_ratio = 0.001, .curriculum = RETROFIT_CURRICULUM_1_SQRT, .curriculum_warmup = 0.75, .optimizer = RETROFIT_MUON,
       .max_bad_steps = 5, .save_before = 5};

static const retrofit_option options[] = {
    {"Files", RETROFIT_HEADING, NULL, NULL, NULL},
    {"model", RETROFIT_STRING, &o.model, "DIR", "what to train: a recurrent model, or a plain Llama as the baseline"},
    {"data", RETROFIT_STRING, &o.data, "'GLOB'", "token shards (.bin, made by convert --tokenize)"},
    {"val", RETROFIT_STRING, &o.val, "'GLOB'", "shards for the validation loss"},
    {"out", RETROFIT_STRING, &o.out, "DIR", "gets step_00000100/ (a model), latest -> the newest, log.jsonl"},
    {"resume", RETROFIT_FLAG, &o.resume, NULL, "go on from DIR/latest, to the same bits as if never stopped"},
    {"resume-anyway", RETROFIT_FLAG, &o.resume_anyway, NULL, "the same with options that alter the run; says which"},
    {"save-every", RETROFIT_SIZE, &o.save_every, "N", "steps between checkpoints (0: at the end only)"},
    {"keep", RETROFIT_SIZE, &o.keep, "N", "the newest checkpoints that stay (1)"},
    {"dry-run", RETROFIT_SWITCH, &o.dry_run, "schedule", "print memory, FLOPs, time and schedule (or each micro-batch of it), and stop"},
    {"When to stop (SIGINT and SIGTERM do so too: after the running step, with a checkpoint)", RETROFIT_HEADING, NULL, NULL, NULL},
    {"steps", RETROFIT_SIZE, &o.steps, "N", "optimizer steps"},
    {"flops", RETROFIT_REAL, &o.flops, "F", "end once this many, 1e18 say, are spent; the schedules keep to --steps"},
    {"time-limit", RETROFIT_REAL, &o.time_limit, "MINUTES", "stop in time to be done by then; --resume goes on"},
    {"save-before", RETROFIT_REAL, &o.save_before, "MINUTES", "before the time limit saving begins (5)"},
    {"max-bad-steps", RETROFIT_SIZE, &o.max_bad_steps, "N", "fail when in so many steps in a row loss or gradient is no number (5)"},
    {"Batches", RETROFIT_HEADING, NULL, NULL, NULL},
    {"micro-batch-size", RETROFIT_SIZE, &o.micro, "ROWS", "rows in memory at a time; one draw of recurrences each (8)"},
    {"batch-size", RETROFIT_SIZE, &o.batch, "ROWS", "rows per optimizer step (one micro-batch)"},
    {"seq-len", RETROFIT_SIZE, &o.seq_len, "T", "tokens in a row (1024, or the model's context)"},
    {"shuffle", RETROFIT_FLAG, &o.shuffle, NULL, "read rows in a random order, another in each epoch"},
    {"seed", RETROFIT_SIZE, &o.seed, "N", "of start states and the shuffle (1); recurrences are drawn as the authors draw them"},
    {"Recurrence", RETROFIT_HEADING, NULL, NULL, NULL},
    {"mean-recurrence", RETROFIT_SIZE, &o.mean_recurrence, "R", "mean of the drawn recurrences at the end of the curriculum (the model's)"},
    {"backprop-depth", RETROFIT_SIZE, &o.backprop_depth, "K", "recurrences that get gradients (the model's)"},
    {"depth-warmup", RETROFIT_REAL, &o.depth_warmup, "F", "over this share of the steps K grows linearly (0: it is K from the beginning)"},
    {"depth-start", RETROFIT_SIZE, &o.depth_start, "N", "from N (1)"},
    {"curriculum", RETROFIT_CHOICE, &o.curriculum, "none|linear|1-sqrt", "how the mean grows to R (1-sqrt)"},
    {"curriculum-warmup", RETROFIT_REAL, &o.curriculum_warmup, "F", "over this share of the steps (.75)"},
    {"fixed-recurrences", RETROFIT_STRING, &o.fixed, "n,k", "the same n without and k with gradients always: no draws, no curriculum"},
    {"state-init", RETROFIT_CHOICE, &o.state_init, "normal|zero", "the start state (normal)"},
    {"Optimizer", RETROFIT_HEADING, NULL, NULL, NULL},
    {"optimizer", RETROFIT_CHOICE, &o.optimizer, "adamw|muon|ellisadam", "muon: matrices of the body, the rest by adamw; ellisadam: the paper's AdamW* (muon)"},
    {"train", RETROFIT_CHOICE, &o.trains, "all|core|adapter", "core: adapter and core alone; what is frozen needs no gradients and moments (all)"},
    {"throttle", RETROFIT_FLAG, &o.throttle, NULL, "divide the learning rates of adapter and core by the step's mean k"},
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
    {"eval-recurrences", RETROFIT_STRING, &o.eval_list, "1,2,4", "recurrences to validate with (1,2,4,8,16,32)"},
    {"eval-rows", RETROFIT_SIZE, &o.eval_rows, "N", "rows of --val to use (64)"},
    {"sample-prompts", RETROFIT_STRING, &o.samples, "FILE", "a prompt a line: each is continued at all these recurrences, by the likeliest tokens"},
    {"sample-tokens", RETROFIT_SIZE, &o.sample_tokens, "N", "by so many (32)"},
    {"Machine", RETROFIT_HEADING, NULL, NULL, NULL},
    {"device", RETROFIT_CHOICE, &o.device, "auto|cpu|cuda", "where to compute; auto: on a GPU if there is one (auto)"},
    {"precision", RETROFIT_CHOICE, &o.precision, "bf16|fp32", "of matrices and activations on a GPU; masters and sums are fp32 (bf16)"},
    {"recompute", RETROFIT_FLAG, &o.recompute, NULL, "keep a sixth of the activations and compute the rest again: a third more work"},
};

// Where the run is; all of it goes into every checkpoint. in_a_row: steps skipped up to this one; norm: the gradient's, averaged.
static struct {
    size_t step, skipped, in_a_row;
    double flops, paper_flops, norm;
} now;
static size_t fixed_n, fixed_k; // of --fixed-recurrences; k is 0 without it
static FILE *journal;           // OUT/log.jsonl
static bool live_line;          // the terminal's cursor is behind a line that the next one is to replace

static void end_live_line(void) {
    if (live_line) fputc('\n', stderr);
    live_line = false;
}

__attribute__((format(printf, 2, 3), noreturn)) static void die(int code, const char *format, ...) {
    va_list args;
    va_start(args, format);
    end_live_line(), fputs("train: ", stderr), vfprintf(stderr, format, args), fputc('\n', stderr);
    va_end(args);
    exit(code);
}

// ---- When to stop ----------------------------------------------------------------------------------------------------------
static volatile sig_atomic_t stop; // the signal that asked for it
static double started, seconds_per_flop, seconds_to_save; // the slowest step's; the last checkpoint's

static void on_signal(int which) { // another one ends the program at once
    stop = which;
    signal(SIGINT, SIG_DFL), signal(SIGTERM, SIG_DFL);
}

// Whether to stop now: a signal came, or work of this many more FLOPs would end later than saving must begin.
static bool stopping(double flops) {
    double left = 60 * o.time_limit - fmax(60 * o.save_before, seconds_to_save) - (retrofit_seconds() - started);
    return stop || (o.time_limit > 0 && flops * seconds_per_flop > left) || (o.time_limit > 0 && left < 0);
}

static retrofit_mode mode(void) { return (retrofit_mode)(RETROFIT_TRAINING + o.trains); }
static bool ended(void) { return now.step >= o.steps || (o.flops > 0 && now.flops >= o.flops); }
static bool due(void) { return (o.val || o.samples) && (ended() || (o.eval_every && now.step % o.eval_every == 0)); } // a validation

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
        if (fixed_k) p.mean = fixed_n + fixed_k;
        double K = (double)o.backprop_depth; // less a little before rounding up: start/K·K may be a bit more than start
        p.depth = (size_t)ceil(retrofit_linear_schedule(step, o.steps, fixed_k ? 0 : o.depth_warmup, (double)o.depth_start / K, K) - 1e-9);
        p.depth = retrofit_min(p.mean, p.depth);
    }
    p.lr = (float)retrofit_learning_rate(step, o.steps, o.warmup, o.cooldown, o.min_lr_ratio, o.lr);
    p.muon_lr = (float)retrofit_learning_rate(step, o.steps, o.warmup, o.cooldown, o.min_lr_ratio, o.muon_lr);
    return p;
}

// n and k of micro-batch j (from 0) of a step; none for a plain Llama.
static void draw(const plan *p, size_t step, size_t j, size_t *n, size_t *k) {
    *n = fixed_n, *k = fixed_k;
    if (p->mean && !fixed_k) retrofit_draw_recurrences(step * (o.batch / o.micro) + j + 1, p->mean, p->depth, n, k, NULL);
}

// What the steps [from, to) take by the draws they will make: FLOPs, ours and the paper's; the largest draw, and its step from 1.
typedef struct {
    double flops, paper;
    size_t most, at;
} cost;

static cost cost_of(const retrofit_config *c, size_t from, size_t to) {
    cost all = {0, 0, 0, 0};
    double tokens = (double)(o.micro * o.seq_len);
    for (size_t step = from; step < to; step++) {
        plan p = plan_of(c, step);
        for (size_t j = 0, n, k; j < o.batch / o.micro; j++) {
            draw(&p, step, j, &n, &k);
            all.flops += retrofit_flops_per_token(c, mode(), o.seq_len, n, k) * tokens;
            all.paper += retrofit_paper_flops_per_token(c, n, k) * tokens;
            if (n + k > all.most) all.most = n + k, all.at = step + 1;
        }
    }
    return all;
}

// ---- Validation: the same rows and start states every time; s_r of every r lies on one way -----------------------------
static const char *number(char text[32], const char *format, double x) { // as JSON has it, which knows no NaN
    return isfinite(x) ? snprintf(text, 32, format, x) : snprintf(text, 32, "null"), text;
}

static void flush_journal(void) {
    if (ferror(journal) || fflush(journal))
        die(1, "%s/log.jsonl: writing failed: %s (the checkpoint before is untouched)", o.out, strerror(errno));
}

static size_t eval_depths(const retrofit_config *c, size_t r[32]) {
    size_t count = 1;
    if (retrofit_is_plain(c)) return r[0] = 0, count;
    return retrofit_sizes(o.eval_list, r, 32, &count), count;
}

// False if it was stopped; the next run does it then.
static bool validate(retrofit_buffers *a, retrofit_data *val, int32_t *tokens, int32_t *labels) {
    char text[32];
    size_t r[32], count = eval_depths(&a->model->config, r), rows = retrofit_min(retrofit_data_rows(val), o.eval_rows), T = o.seq_len;
    double loss[32] = {0};
    for (size_t at = 0; at < rows; at += o.micro) {
        if (stopping(0)) return false;
        size_t b = retrofit_min(rows - at, o.micro), done = SIZE_MAX; // recurrences so far; a list that goes back begins anew
        for (size_t i = 0; i < b; i++)
            if (!retrofit_data_row(val, at + i, tokens + i * T, labels + i * T)) die(1, "%s", retrofit_error());
        if (!retrofit_prelude(a, tokens, b, T)) die(1, "%s", retrofit_error());
        for (size_t i = 0; i < count; i++) {
            if (r[i] < done && r[i]) retrofit_init_state(a, o.state_init ? 0 : a->model->config.state_std, at);
            if (r[i] < done) done = 0;
            retrofit_recur(a, r[i] - done, 0), done = r[i];
            retrofit_coda(a);
            loss[i] += retrofit_loss(a, labels, 0) * (double)b;
        }
    }
    end_live_line(), fprintf(stderr, "step %zu: validation loss", now.step);
    fprintf(journal, "{\"step\":%zu,\"val\":{", now.step);
    for (size_t i = 0; i < count; i++) {
        if (r[i]) fprintf(stderr, "  r=%zu", r[i]);
        fprintf(stderr, " %.4f", loss[i] / (double)rows);
        fprintf(journal, "%s\"%zu\":%s", i ? "," : "", r[i], number(text, "%.6f", loss[i] / (double)rows));
    }
    fprintf(stderr, "\n"), fprintf(journal, "}}\n");
    return true;
}

// ---- Samples: what the model makes of the same prompts, at several recurrences ------------------------------------------------
static struct {
    retrofit_tokenizer *tokenizer;
    struct { char *text; int32_t *ids; size_t count; } *prompt; // ids: with room for sample_tokens more
    size_t prompts;
    retrofit_buffers *a;
} samples;

static void open_samples(const retrofit_model *m, const char *directory) {
    size_t size, longest = 0, r[32], deepest = 0;
    char *text = retrofit_read_file(o.samples, &size);
    if (!text || !(samples.tokenizer = retrofit_tokenizer_load(directory))) die(1, "--sample-prompts: %s", retrofit_error());
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"), samples.prompts++) {
        if (!(samples.prompt = realloc(samples.prompt, (samples.prompts + 1) * sizeof *samples.prompt))) die(1, "out of memory");
        size_t count, end = strlen(line);
        int32_t *ids = retrofit_encode(samples.tokenizer, line, end, true, &count);
        if (!ids) die(1, "%s: %s", o.samples, retrofit_error());
        if (!count || count + o.sample_tokens > m->config.context)
            die(1, "%s: prompt %zu has %zu tokens; with --sample-tokens %zu the model's context of %zu does not hold it", o.samples,
                samples.prompts + 1, count, o.sample_tokens, m->config.context);
        for (size_t i = 0; i < count; i++)
            if ((size_t)ids[i] >= m->config.vocab)
                die(1, "%s: token %d is beyond the model's vocabulary of %zu", o.samples, (int)ids[i], m->config.vocab);
        samples.prompt[samples.prompts].text = strdup(line), samples.prompt[samples.prompts].count = count;
        samples.prompt[samples.prompts].ids = realloc(ids, (count + o.sample_tokens) * sizeof *ids);
        if (!samples.prompt[samples.prompts].text || !samples.prompt[samples.prompts].ids) die(1, "out of memory");
        longest = count > longest ? count : longest;
    }
    free(text);
    if (!samples.prompts) die(1, "%s: there is no prompt in it", o.samples);
    for (size_t i = 0, count = eval_depths(&m->config, r); i < count; i++) deepest = r[i] > deepest ? r[i] : deepest;
    retrofit_kv_cache cache = {.capacity = longest + o.sample_tokens, .recurrences = deepest};
    if (!(samples.a = retrofit_buffers_new(m, 1, longest, 0, RETROFIT_KEEP_NOTHING, &cache))) die(1, "%s", retrofit_error());
}

static bool sample(void) { // false if it was stopped
    const retrofit_config *c = &samples.a->model->config;
    size_t r[32], depths = eval_depths(c, r), size, known = retrofit_min(c->vocab, retrofit_tokenizer_size(samples.tokenizer));
    for (size_t p = 0; p < samples.prompts; p++)
        for (size_t i = 0; i < depths; i++) {
            int32_t *ids = samples.prompt[p].ids, eos = retrofit_tokenizer_eos(samples.tokenizer);
            size_t n = samples.prompt[p].count, fed = 0, end = n + o.sample_tokens;
            retrofit_recurrence_options how = {.recurrences = r[i], .sigma = o.state_init ? 0 : c->state_std, .seed = o.seed};
            retrofit_clear_cache(samples.a);
            while (n < end) {
                if (stopping(0)) return false;
                const float *logits = retrofit_next_logits(samples.a, ids + fed, 1, n - fed, NULL, &how);
                if (!logits) die(1, "%s", retrofit_error());
                fed = n, ids[n++] = retrofit_argmax(logits, known);
                if (ids[n - 1] == eos) break;
            }
            char *all = retrofit_decode(samples.tokenizer, ids, n, true, &size),
                 *before = retrofit_decode(samples.tokenizer, ids, samples.prompt[p].count, true, &fed);
            if (!all || !before) die(1, "%s", retrofit_error());
            const char *text = all + retrofit_min(fed, size); // decoded alone, a first token would lose its space
            fprintf(journal, "{\"step\":%zu,\"sample\":{\"prompt\":", now.step);
            retrofit_json_write_string(journal, samples.prompt[p].text, strlen(samples.prompt[p].text));
            fprintf(journal, ",\"recurrences\":%zu,\"text\":", r[i]), retrofit_json_write_string(journal, text, strlen(text)),
                fprintf(journal, "}}\n");
            end_live_line(), fprintf(stderr, "step %zu: r=%zu: %s|", now.step, r[i], samples.prompt[p].text);
            for (const char *t = text; *t; t++) fputc((unsigned char)*t < ' ' || *t == 127 ? ' ' : *t, stderr); // one line it stays
            fputc('\n', stderr), free(all), free(before);
        }
    return true;
}

static void close_samples(void) {
    for (size_t i = 0; i < samples.prompts; i++) free(samples.prompt[i].text), free(samples.prompt[i].ids);
    free(samples.prompt), retrofit_buffers_free(samples.a), retrofit_tokenizer_free(samples.tokenizer);
}

// Samples and validation, whose lines end with one that says so: where it is missing, a run that was stopped does both again.
static bool evaluate(retrofit_buffers *a, retrofit_data *val, int32_t *tokens, int32_t *labels) {
    if ((o.samples && !sample()) || (val && !validate(a, val, tokens, labels))) return false;
    if (!val) fprintf(journal, "{\"step\":%zu,\"sampled\":%zu}\n", now.step, samples.prompts);
    return flush_journal(), true;
}

// ---- Numbers that go wrong ------------------------------------------------------------------------------------------------
// The first parameter whose gradient is not finite, or NULL.
static const char *bad_gradient(const retrofit_model *m) {
    for (size_t i = 0; i < m->parameter_count; i++) {
        const retrofit_parameter *p = m->parameters[i];
        double sum;
        if (p->frozen) continue;
        m->ops->zero(m->sums + 1, sizeof sum);
        m->ops->sum_squares(m->sums + 1, p->grad, p->rows * p->cols);
        m->ops->download(&sum, m->sums + 1, sizeof sum);
        if (!isfinite(sum)) return p->source[0].name;
    }
    return NULL;
}

// Takes note of a step's gradient norm, NaN if its loss was not finite: then nothing was changed, and too many of those end the run.
static void judge(const retrofit_model *m, double loss, double norm) {
    if (isfinite(norm)) {
        now.in_a_row = 0;
        double times = now.norm > 0 ? norm / now.norm : 1;
        if (times > 10)
            end_live_line(), fprintf(stderr, "step %zu: the gradient's norm, %.3g, is %.0f times its average\n", now.step, norm, times);
        now.norm = now.norm > 0 ? now.norm * (0.95 + 0.05 * fmin(times, 10)) : norm; // fmin: the next one shall be seen too
        return;
    }
    char what[256];
    const char *bad = bad_gradient(m);
    snprintf(what, sizeof what, "step %zu: the loss is %g, %s%s", now.step, isnan(loss) ? NAN : loss,
             bad ? "not finite is the gradient of " : "every gradient is finite", bad ? bad : "");
    now.skipped++, now.in_a_row++;
    if (now.in_a_row >= o.max_bad_steps)
        die(1, "%s: %zu bad steps in a row; the last checkpoint is untouched: --resume-anyway with a lower --lr", what, now.in_a_row);
    end_live_line(), fprintf(stderr, "%s: skipped (%zu in a row, %zu end the run)\n", what, now.in_a_row, o.max_bad_steps);
}

// ---- Checkpoints: OUT/step_00000100, and OUT/latest, a link that always names a complete one ----------------------------
// What each file was when the checkpoint was made: size and hash, 64-bit FNV-1a by 8 bytes, folded so that no bit stays on top.
static bool hash_file(const char *path, size_t *size, char hash[17]) {
    static uint64_t words[1 << 13];
    uint64_t h = 0xcbf29ce484222325;
    FILE *f = retrofit_open_file(path, size);
    *size = 0;
    for (size_t n; f && (n = fread(words, 1, sizeof words, f)); *size += n) {
        memset((char *)words + n, 0, (8 - n % 8) % 8);
        for (size_t i = 0; i < (n + 7) / 8; i++) h = (h ^ words[i]) * 0x100000001b3, h ^= h >> 32;
    }
    bool ok = f && (!ferror(f) || retrofit_fail("%s: %s", path, strerror(errno)));
    if (f) fclose(f);
    return snprintf(hash, 17, "%016llx", (unsigned long long)h), ok;
}

static int visible(const struct dirent *e) { return *e->d_name != '.'; }

static bool write_manifest(const char *directory) { // of all files that are there
    char path[RETROFIT_PATH];
    struct dirent **e;
    int count = scandir(directory, &e, visible, alphasort);
    FILE *f = count > 0 && retrofit_path(path, directory, "manifest.json") ? fopen(path, "wb") : NULL;
    bool ok = f || retrofit_fail("%s/manifest.json: %s", directory, strerror(errno));
    if (f) fprintf(f, "{\n  \"step\": %zu,\n  \"files\": [", now.step);
    for (int i = 0; i < count; free(e[i++])) {
        size_t size;
        char hash[17];
        ok = ok && retrofit_path(path, directory, e[i]->d_name) && hash_file(path, &size, hash);
        if (ok) fprintf(f, "%s\n    {\"name\": \"%s\", \"size\": %zu, \"hash\": \"%s\"}", i ? "," : "", e[i]->d_name, size, hash);
    }
    if (count >= 0) free(e);
    if (f) fprintf(f, "\n  ]\n}\n"), ok = retrofit_path(path, directory, "manifest.json") && retrofit_finish_file(f, path, ok) && ok;
    return ok;
}

static bool intact(const char *directory) { // false + error, which names the file
    char path[RETROFIT_PATH], hash[17];
    size_t size;
    if (!retrofit_path(path, directory, "manifest.json")) return false;
    char *text = retrofit_read_file(path, &size);
    retrofit_json *root = text ? retrofit_json_parse(text, size, path) : NULL;
    const retrofit_json *files = retrofit_json_get(root, "files"), *f = files ? files->child : NULL;
    bool ok = root && (f || retrofit_fail("%s: names no files: not written by train", path));
    for (; ok && f; f = f->next) {
        const retrofit_json *name = retrofit_json_get(f, "name"), *sum = retrofit_json_get(f, "hash"), *bytes = retrofit_json_get(f, "size");
        if (!name || !name->string || !bytes || !sum || !sum->string) ok = retrofit_fail("%s: a file without name, size and hash", path);
        ok = ok && retrofit_path(path, directory, name->string) && hash_file(path, &size, hash);
        if (ok && ((double)size != bytes->number || strcmp(hash, sum->string)))
            ok = retrofit_fail("%s: damaged: %zu bytes with hash %s, the manifest says %.0f with %s", path, size, hash, bytes->number, sum->string);
    }
    return free(text), retrofit_json_free(root), ok;
}

static int is_step(const struct dirent *e) { return !strncmp(e->d_name, "step_", 5); }
static size_t step_of(const char *name) { return strtoul(name + 5, NULL, 10); }
static int newest_first(const struct dirent **a, const struct dirent **b) {
    size_t x = step_of((*a)->d_name), y = step_of((*b)->d_name);
    return x < y ? 1 : x > y ? -1 : strcmp((*a)->d_name, (*b)->d_name);
}

// Removes the checkpoints older than the --keep newest, and what a run that was killed left: half a checkpoint, one not linked to.
static void prune(const char *latest) {
    char path[RETROFIT_PATH];
    struct dirent **e;
    int count = scandir(o.out, &e, is_step, newest_first);
    size_t kept = 0;
    for (int i = 0; i < count; free(e[i++])) {
        bool whole = !strchr(e[i]->d_name, '.') && step_of(e[i]->d_name) <= step_of(latest);
        if (whole && kept < o.keep) kept++;
        else if (retrofit_path(path, o.out, e[i]->d_name)) retrofit_directory_abandon(path);
    }
    if (count >= 0) free(e);
}

// Ends the program unless `latest` is what was written; says which older checkpoint is, if one is.
static void check_latest(const char *latest) {
    char path[RETROFIT_PATH], name[RETROFIT_PATH] = {0}, wrong[1024];
    struct dirent **e;
    if (intact(latest)) return;
    snprintf(wrong, sizeof wrong, "%s", retrofit_error());
    if (readlink(latest, name, sizeof name - 1) < 0) die(1, "%s", wrong);
    int count = scandir(o.out, &e, is_step, newest_first);
    for (int i = 0; i < count; i++)
        if (strcmp(e[i]->d_name, name) && !strchr(e[i]->d_name, '.') && retrofit_path(path, o.out, e[i]->d_name) && intact(path))
            die(1, "%s; %s is intact: ln -sfn %s %s, then --resume", wrong, path, e[i]->d_name, latest);
    die(1, "%s; no other checkpoint in %s is intact: begin anew with another --out", wrong, o.out);
}

static size_t data_rows;
static const retrofit_ops *place;
static void recipe(char *text, size_t size) { // what must not change between a run and its continuation
    static const char *const curricula[] = {"none", "linear", "1-sqrt"}, *const optimizers[] = {"adamw", "muon", "ellisadam"},
                      *const trained[] = {"all", "core", "adapter"};
    char fixed[48] = "none";
    if (fixed_k) snprintf(fixed, sizeof fixed, "%zu,%zu", fixed_n, fixed_k);
    snprintf(
        text, size,
        "steps=%zu batch-size=%zu micro-batch-size=%zu seq-len=%zu train=%s optimizer=%s throttle=%d lr=%.9g muon-lr=%.9g weight-decay=%.9g beta1=%.9g beta2=%.9g "
        "clip=%.9g warmup=%.9g cooldown=%.9g min-lr-ratio=%.9g mean-recurrence=%zu backprop-depth=%zu depth-warmup=%.9g depth-start=%zu curriculum=%s "
        "curriculum-warmup=%.9g fixed-recurrences=%s state-init=%s seed=%zu shuffle=%d data-rows=%zu device=%.4s precision=%s",
        o.steps, o.batch, o.micro, o.seq_len, trained[o.trains], optimizers[o.optimizer], o.throttle, o.lr, o.muon_lr, o.weight_decay,
        o.beta1, o.beta2, o.clip, o.warmup, o.cooldown, o.min_lr_ratio, o.mean_recurrence, o.backprop_depth, o.depth_warmup, o.depth_start,
        curricula[o.curriculum], o.curriculum_warmup, fixed, o.state_init ? "zero" : "normal", o.seed, o.shuffle, data_rows, place->name,
        place->act_type == RETROFIT_BF16 ? "bf16" : "fp32");
}

static double checkpoint_bytes(const retrofit_model *m) { // of the two large files
    double bytes = 4 * (double)m->weight_count;
    for (size_t i = 0; i < m->parameter_count; i++) {
        const retrofit_parameter *p = m->parameters[i];
        double moments = p->frozen ? 0 : p->kind == RETROFIT_MATRIX && o.optimizer == RETROFIT_MUON ? 4 : 8;
        bytes += moments * (double)(p->rows * p->cols) + 1280; // headers
    }
    return bytes;
}

static void check_disk(const retrofit_model *m, const char *tokenizer) { // before anything is written
    static const char *const names[] = {"tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"}; // of files beside, the large ones
    char path[RETROFIT_PATH];
    struct statvfs disk;
    struct stat file;
    double need = checkpoint_bytes(m) + 1e5, room;
    for (size_t i = 0; i < 4; i++) need += retrofit_path(path, tokenizer, names[i]) && !stat(path, &file) ? (double)file.st_size : 0;
    if (!statvfs(o.out, &disk) && (room = (double)disk.f_bavail * (double)disk.f_frsize) < need)
        die(1, "%s: a checkpoint needs %.0f bytes, %.0f are free: make room (the checkpoint before is untouched)", o.out, need, room);
}

static bool all_finite(const char *directory, const char *name) { // false + error: a step's update can overflow though its gradient did not
    char path[RETROFIT_PATH];
    retrofit_map f;
    bool ok = retrofit_path(path, directory, name) && retrofit_safetensors_open(&f, path);
    if (!ok) return false;
    for (const retrofit_tensor *t = f.tensors; ok && t < f.tensors + f.count; t++) {
        const float *x = t->data;
        for (size_t i = 0; i < t->count; i++) ok &= isfinite(x[i]) != 0;
        if (!ok) retrofit_fail("step %zu: %s of %s holds nan or infinity: not saved; try a lower --lr", now.step, t->name, name);
    }
    return retrofit_safetensors_close(&f), ok;
}

static void save(const retrofit_model *m, const char *tokenizer) {
    double begin = retrofit_seconds();
    char name[32], path[RETROFIT_PATH], link[RETROFIT_PATH], temporary[RETROFIT_PATH], before[RETROFIT_PATH], text[1024], value[6][32];
    snprintf(name, sizeof name, "step_%08zu", now.step);
    if (!retrofit_path(path, o.out, name) || !retrofit_path(link, o.out, "latest") || !retrofit_path(temporary, o.out, "latest.tmp"))
        die(1, "%s", retrofit_error());
    check_disk(m, tokenizer);
    snprintf(value[0], 32, "%zu", now.step), snprintf(value[1], 32, "%.17g", now.flops), snprintf(value[2], 32, "%zu", now.skipped);
    snprintf(value[3], 32, "%zu", now.in_a_row), snprintf(value[4], 32, "%.17g", now.norm),
        snprintf(value[5], 32, "%.17g", now.paper_flops);
    recipe(text, sizeof text);
    const char *metadata[] = {"step", value[0], "flops",  value[1], "skipped", value[2], "bad_in_a_row", value[3],
                              "norm", value[4], "paper_flops", value[5], "recipe", text, NULL};
    ssize_t length = readlink(link, before, sizeof before - 1);
    before[length > 0 ? length : 0] = 0;
    char *directory = retrofit_directory_begin(path);
    if (!directory) die(1, "%s (the checkpoint before is untouched)", retrofit_error());
    if (strcmp(before, name)) retrofit_directory_abandon(path); // written by a run that was stopped before it could link to it
    if (!retrofit_save(m, directory, RETROFIT_F32, tokenizer) || !retrofit_save_optimizer(m, directory, metadata) ||
        !all_finite(directory, "model.safetensors") || !all_finite(directory, "optimizer.safetensors") || !write_manifest(directory) ||
        (fsync(fileno(journal)) && !retrofit_fail("%s/log.jsonl: %s", o.out, strerror(errno))) || !retrofit_directory_commit(directory, path)) {
        retrofit_directory_abandon(directory);
        if (strcmp(before, name)) retrofit_directory_abandon(path); // renamed, but not for good
        die(1, "%s (the checkpoint before is untouched)", retrofit_error());
    }
    free(directory);
    unlink(temporary);
    if (symlink(name, temporary) || rename(temporary, link)) {
        retrofit_fail("%s: %s (the checkpoint before is untouched)", link, strerror(errno));
        unlink(temporary), retrofit_directory_abandon(path);
        die(1, "%s", retrofit_error());
    }
    if (!retrofit_sync_directory(o.out)) die(1, "%s", retrofit_error());
    prune(name); // only now are older ones of no more use
    seconds_to_save = retrofit_seconds() - begin;
}

// What the options change of the recipe a run was begun with, listed; the number of changes.
static size_t changes(const char *theirs, const char *ours, char *list, size_t size) {
    size_t count = 0, used = 0;
    for (*list = 0; *ours; ours += strcspn(ours, " "), ours += *ours == ' ') { // name=value, name=value, …
        size_t name = strcspn(ours, "=") + 1, n = strcspn(ours, " ") - name;
        const char *old = theirs;
        while (*old && strncmp(old, ours, name)) old += strcspn(old, " "), old += *old == ' ';
        const char *was = *old ? old + name : "none";
        size_t k = strcspn(was, " ");
        if (k == n && !strncmp(was, ours + name, n)) continue;
        int more = snprintf(list + used, size - used, "%s--%.*s was %.*s, is %.*s", count++ ? "; " : "", (int)name - 1, ours, (int)k, was, (int)n,
                            ours + name);
        used = retrofit_min(used + (size_t)more, size - 1);
    }
    return count;
}

// Takes up the moments and the progress of a checkpoint; log.jsonl is cut back to its step. validated: whether the log has that step's
// validation, which comes after the checkpoint.
static void resume(retrofit_model *m, const char *directory, bool *validated) {
    static const char *const keys[] = {"step", "flops", "skipped", "bad_in_a_row", "norm", "paper_flops", "recipe"};
    retrofit_map f;
    char text[1024], list[4096], path[RETROFIT_PATH];
    const char *value[7];
    if (!retrofit_path(path, directory, "optimizer.safetensors") || !retrofit_safetensors_open(&f, path)) die(1, "%s", retrofit_error());
    for (size_t i = 0; i < 7; i++)
        if (!(value[i] = retrofit_safetensors_metadata(&f, keys[i]))) die(1, "%s: no %s: not written by train", path, keys[i]);
    recipe(text, sizeof text);
    bool changed = changes(value[6], text, list, sizeof list);
    if (changed && !o.resume_anyway) die(1, "--resume: another run: %s (--resume-anyway goes on with these)", list);
    if (changed) fprintf(stderr, "--resume-anyway: %s\n", list);
    now.step = strtoul(value[0], NULL, 10), now.flops = strtod(value[1], NULL), now.skipped = strtoul(value[2], NULL, 10);
    now.in_a_row = strtoul(value[3], NULL, 10), now.norm = strtod(value[4], NULL), now.paper_flops = strtod(value[5], NULL);
    retrofit_safetensors_close(&f);
    if (!retrofit_load_optimizer(m, &f, directory)) die(1, "%s", retrofit_error());
    retrofit_safetensors_close(&f);
    char name[32];
    snprintf(name, sizeof name, "step_%08zu", now.step), prune(name);
    if (!retrofit_path(path, o.out, "log.jsonl")) die(1, "%s", retrofit_error());
    size_t size, keep = 0;
    char *log = retrofit_read_file(path, &size);
    for (char *line = log; line && *line; line = strchr(line, '\n') + 1) {
        size_t at = 0;
        if (!strchr(line, '\n') || (sscanf(line, "{\"step\":%zu", &at) == 1 && at > now.step)) break;
        const char *what = line + strcspn(line, ",");
        *validated = at == now.step && (!strncmp(what, ",\"val\"", 6) || !strncmp(what, ",\"sampled\"", 10));
        if (at < now.step || strncmp(what, ",\"sample\"", 9))
            keep = (size_t)(strchr(line, '\n') + 1 - log); // samples count with the line that ends them
    }
    if (log && truncate(path, (off_t)keep)) die(1, "%s: %s", path, strerror(errno));
    free(log);
}

// ---- The lock: one run at a time in OUT; the kernel lets go of it, however the run ends ---------------------------------
static char lock_path[RETROFIT_PATH];
static void unlock(void) { unlink(lock_path); }

static void lock_output(void) {
    for (struct stat mine, there; !*lock_path;) {
        char path[RETROFIT_PATH];
        int fd = retrofit_path(path, o.out, "lock") ? open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666) : -1;
        struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
        if (fd < 0) die(1, "%s: %s", path, strerror(errno));
        if (!fcntl(fd, F_SETLK, &lock)) { // a file that a run which just ended has removed is no lock any more
            if (!fstat(fd, &mine) && !stat(path, &there) && mine.st_ino == there.st_ino) strcpy(lock_path, path), atexit(unlock);
        } else if (errno != EACCES && errno != EAGAIN) die(1, "%s: cannot be locked: %s", path, strerror(errno));
        else if (!fcntl(fd, F_GETLK, &lock) && lock.l_type != F_UNLCK)
            die(1, "%s: process %ld trains there: wait for its end, or give another --out", o.out, (long)lock.l_pid);
        if (!*lock_path) close(fd);
    }
}

// ---- Memory -------------------------------------------------------------------------------------------------------------------
typedef struct {
    size_t weights, gradients, moments, activations, all; // bytes
} memory;

static retrofit_keep keep(void) { return o.recompute ? RETROFIT_KEEP_INPUTS : RETROFIT_KEEP_ALL; }

static memory memory_of(retrofit_model *m, size_t micro, retrofit_keep how) { // of a model that has no memory yet
    memory n;
    retrofit_training_bytes(m, mode(), (retrofit_optimizer_kind)o.optimizer, &n.weights, &n.gradients, &n.moments);
    n.activations = retrofit_buffers_bytes(&m->config, m->ops, micro, o.seq_len, o.backprop_depth, how);
    if (n.activations == SIZE_MAX) die(1, "--micro-batch-size %zu of --seq-len %zu is more than memory can hold", micro, o.seq_len);
    n.all = n.weights + n.gradients + n.moments + n.activations;
    return n;
}

// Ends a run that would not fit before it begins, with what would: smaller micro-batches of the same batch, recomputing if need be.
static void check_memory(retrofit_model *m) {
    size_t room = m->ops->free_memory(), need = memory_of(m, o.micro, keep()).all;
    if (need <= room) return;
    for (int how = keep(); how <= RETROFIT_KEEP_INPUTS; how++)
        for (size_t micro = o.micro; micro; micro--)
            if (o.batch % micro == 0 && memory_of(m, micro, (retrofit_keep)how).all <= room)
                die(1, "training needs %.3g GB, %.3g GB are free: --batch-size %zu --micro-batch-size %zu%s would fit (%.3g GB)", (double)need / 1e9,
                    (double)room / 1e9, o.batch, micro, how == RETROFIT_KEEP_INPUTS ? " --recompute" : "",
                    (double)memory_of(m, micro, (retrofit_keep)how).all / 1e9);
    die(1, "training needs %.3g GB, %.3g GB are free, and no micro-batch fits: try a shorter --seq-len or smaller --backprop-depth",
        (double)need / 1e9, (double)room / 1e9);
}

// ---- Dry run ------------------------------------------------------------------------------------------------------------------
static double muon_lr_of(const plan *p) { return o.optimizer == RETROFIT_MUON ? (double)p->muon_lr : 0; }

static void print_schedule(const retrofit_config *c) { // every micro-batch
    printf("step micro_batch mean_recurrence depth n k lr muon_lr\n");
    for (size_t step = 0; step < o.steps; step++) {
        plan p = plan_of(c, step);
        for (size_t j = 0, n, k; j < o.batch / o.micro; j++) {
            draw(&p, step, j, &n, &k);
            printf("%zu %zu %zu %zu %zu %zu %.7g %.7g\n", step + 1, j + 1, p.mean, p.depth, n, k, (double)p.lr, muon_lr_of(&p));
        }
    }
}

// FLOP/s of a matrix product of this model's shape, measured for half a second: what a step can hope for.
static double speed_of(const retrofit_model *m) {
    const retrofit_ops *ops = m->ops;
    size_t N = retrofit_min(o.micro * o.seq_len, 4096), d = m->config.n_embd, O = 2 * m->config.intermediate,
           size = retrofit_type_size(ops->act_type);
    char *memory = ops->alloc((N * d + O * d + N * O) * size);
    if (!memory) die(1, "%s", retrofit_error());
    retrofit_weight w = {memory + N * d * size, ops->act_type, d};
    float sink;
    double begin = 0, seconds = 0, flops = 0;
    for (int i = 0; seconds < 0.5; i++) {
        if (i == 2) begin = retrofit_seconds(), flops = 0; // the first ones make ready
        for (int j = 0; j < (i < 2 ? 1 : i); j++)
            ops->matmul_forward(memory + (N + O) * d * size, memory, w, N, d, O), flops += 2 * (double)(N * d * O);
        ops->download(&sink, memory, sizeof sink); // waits for it
        if (i >= 2) seconds = retrofit_seconds() - begin;
    }
    return ops->free(memory), flops / seconds;
}

static void print_time(const char *what, double seconds) {
    if (seconds < 3600) printf("%s %.0f s", what, seconds);
    else printf("%s %.1f %s", what, seconds / (seconds < 86400 ? 3600 : 86400), seconds < 86400 ? "hours" : "days");
}

static void dry_run(retrofit_model *m, const char *device, retrofit_data *data) {
    memory need = memory_of(m, o.micro, keep());
    static const char *const parts[] = {"embedding", "prelude", "adapter", "core", "coda", "final norm", "head", "all"};
    static const char *const by[] = {"adamw", "muon", "ellisadam"};
    const retrofit_config *c = &m->config;
    size_t in[RETROFIT_PARTS + 1][3] = {{0}}, column = 0; // by muon, by the other, frozen; the last row: all
    for (size_t i = 0; i < m->parameter_count; i++) {
        const retrofit_parameter *p = m->parameters[i];
        int how = p->frozen ? 2 : p->kind != RETROFIT_MATRIX || o.optimizer != RETROFIT_MUON;
        in[p->part][how] += p->rows * p->cols, in[RETROFIT_PARTS][how] += p->rows * p->cols;
    }
    char text[1024];
    recipe(text, sizeof text), printf("options");
    for (char *word = strtok(text, " "); word; word = strtok(NULL, " ")) printf(column++ % 6 ? "  %s" : "\n  %s", word);
    printf("\nparameters                 by muon  by %-9s         frozen\n",
           by[o.optimizer == RETROFIT_MUON ? RETROFIT_ADAMW : o.optimizer]);
    for (int i = 0; i <= RETROFIT_PARTS; i++)
        if (in[i][0] + in[i][1] + in[i][2]) printf("  %-12s %15zu %15zu %15zu\n", parts[i], in[i][0], in[i][1], in[i][2]);
    printf("memory on %s\n", device);
    printf(
        "  weights      %10.3f GB\n  gradients    %10.3f GB\n  optimizer    %10.3f GB\n  activations  %10.3f GB  (micro-batch %zu x %zu, depth %zu: any draw)\n"
        "  all          %10.3f GB, %.3f GB are free\n",
        (double)need.weights / 1e9, (double)need.gradients / 1e9, (double)need.moments / 1e9, (double)need.activations / 1e9, o.micro,
        o.seq_len, c->core ? o.backprop_depth : 0, (double)need.all / 1e9, (double)m->ops->free_memory() / 1e9);
    printf("checkpoint     %10.3f GB on disk, %zu of them and one in the making\n", checkpoint_bytes(m) / 1e9, o.keep);
    if (data)
        printf("data           %zu rows of %zu tokens, read %.2f times\n", data_rows, o.seq_len,
               (double)o.steps * (double)o.batch / (double)data_rows);
    cost all = cost_of(c, 0, o.steps);
    double speed = speed_of(m);
    printf("training       %10.3g FLOPs (%.3g as the paper counts them), %zu steps of %zu tokens (%zu micro-batches)\n", all.flops,
           all.paper, o.steps, o.batch * o.seq_len, o.batch / o.micro);
    if (all.most) printf("               the largest draw is %zu recurrences, in step %zu\n", all.most, all.at);
    print_time("time           about", all.flops / speed),
        printf(" at best: this device multiplies matrices of this model at %.3g TFLOP/s\n", speed / 1e12);
    if (o.flops > 0) {
        while (!ended()) now.flops += cost_of(c, now.step, now.step + 1).flops, now.step++;
        printf("--flops %g: ends after step %zu of %zu, with %.3g FLOPs spent\n", o.flops, now.step, o.steps, now.flops);
    }
    if (fixed_k) printf("--fixed-recurrences %zu,%zu in every micro-batch, without draws or a curriculum\n", fixed_n, fixed_k);
    printf("\n%8s %6s %6s %12s %12s   (n,k) of the micro-batches\n", "step", "mean", "depth", "lr", "muon lr");
    for (size_t i = 0, step = 0; step < o.steps; step = ++i * o.steps / 24 > step ? i * o.steps / 24 : step + 1) {
        plan p = plan_of(c, step);
        printf("%8zu %6zu %6zu %12.4e %12.4e  ", step + 1, p.mean, p.depth, (double)p.lr, muon_lr_of(&p));
        for (size_t j = 0, a, b; j < o.batch / o.micro && j < 6; j++) draw(&p, step, j, &a, &b), printf(" %zu,%zu", a, b);
        printf("%s\n", o.batch / o.micro > 6 ? " …" : "");
    }
    if (fflush(stdout)) die(1, "writing to stdout failed: %s", strerror(errno));
    check_memory(m);
}

// ---- The live line --------------------------------------------------------------------------------------------------------------
static void show(double loss, double norm, const plan *p, size_t n, size_t k, double rate, double speed, double peak, double left) {
    static double last;
    char share[32] = "";
    bool live = isatty(2);
    if (!live && now.step != 1 && !ended() && retrofit_seconds() - last < 2) return; // a log file wants no line per step
    last = retrofit_seconds();
    if (peak > 0) snprintf(share, sizeof share, " (%.0f %% of peak)", 100 * speed / peak);
    fprintf(stderr, "%sstep %zu/%zu  loss %.4f  %.0f tok/s  %.1f %cFLOP/s%s  n,k %zu,%zu  r %zu  lr %.2e  |g| %.2f  ETA %zu:%02zu:%02zu%s", live ? "\r" : "",
            now.step, o.steps, loss, rate, speed / (speed < 1e12 ? 1e9 : 1e12), speed < 1e12 ? 'G' : 'T', share, n, k, p->mean,
            (double)(o.optimizer == RETROFIT_MUON ? p->muon_lr : p->lr), norm, (size_t)left / 3600, (size_t)left / 60 % 60, (size_t)left % 60,
            live ? "\033[K" : "\n");
    live_line = live;
}

// Where the model has one that we can read.
static void check_tokenizer(const char *directory, const retrofit_data *data, const retrofit_data *val) {
    retrofit_tokenizer *t = retrofit_tokenizer_load(directory);
    uint64_t hash = t ? retrofit_tokenizer_hash(t) : 0;
    if (t && (!retrofit_data_check(data, hash) || (val && !retrofit_data_check(val, hash)))) die(1, "%s", retrofit_error());
    retrofit_tokenizer_free(t);
}

static void check_options(const retrofit_config *c) {
    size_t r[32], count;
    if (!o.batch) o.batch = o.micro;
    if (!o.seq_len) o.seq_len = c->context < 1024 ? c->context : 1024;
    if (!o.mean_recurrence) o.mean_recurrence = c->mean_recurrence;
    if (!o.backprop_depth) o.backprop_depth = c->backprop_depth;
    if (o.fixed) {
        int end = 0;
        if (retrofit_is_plain(c)) die(2, "--fixed-recurrences: %s has no recurrence", o.model);
        if (strspn(o.fixed, "0123456789,") != strlen(o.fixed) || sscanf(o.fixed, "%zu,%zu%n", &fixed_n, &fixed_k, &end) != 2 || o.fixed[end] ||
            !fixed_k || fixed_n > 1 << 15 || fixed_k > 1 << 15)
            die(2, "--fixed-recurrences is n,k like 4,8: n without gradients, k from 1 on with, not '%s'", o.fixed);
        o.mean_recurrence = fixed_n + fixed_k, o.backprop_depth = fixed_k;
    }
    if (!o.steps) die(2, "--steps is needed: how many optimizer steps?");
    if (o.batch > 1 << 24) die(2, "--batch-size is at most %d", 1 << 24);
    if (!o.micro || o.batch % o.micro) die(2, "--batch-size %zu is not a multiple of --micro-batch-size %zu", o.batch, o.micro);
    if (o.seq_len > c->context) die(2, "--seq-len %zu is more than the model's context of %zu", o.seq_len, c->context);
    if (o.mean_recurrence > 1 << 16 || o.backprop_depth > 1 << 16) die(2, "--mean-recurrence and --backprop-depth are at most 65536");
    struct { const char *name; double value, low, high; } ranges[] = {
        {"lr", o.lr, 0, 1e3}, {"muon-lr", o.muon_lr, 0, 1e3}, {"weight-decay", o.weight_decay, 0, 1e3}, {"beta1", o.beta1, 0, 0.999999},
        {"beta2", o.beta2, 0, 0.9999999}, {"clip", o.clip, 0, 1e9}, {"warmup", o.warmup, 0, 1}, {"cooldown", o.cooldown, 0, 1},
        {"min-lr-ratio", o.min_lr_ratio, 0, 1}, {"curriculum-warmup", o.curriculum_warmup, 0, 1}, {"depth-warmup", o.depth_warmup, 0, 1}, {"flops", o.flops, 0, 1e300},
        {"time-limit", o.time_limit, 0, 1e9}, {"save-before", o.save_before, 0, 1e9}};
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (!(ranges[i].value >= ranges[i].low && ranges[i].value <= ranges[i].high))
            die(2, "--%s %g is not between %g and %g", ranges[i].name, ranges[i].value, ranges[i].low, ranges[i].high);
    if (!retrofit_sizes(o.eval_list, r, 32, &count)) die(2, "--eval-recurrences: %s", retrofit_error());
    if (o.depth_start < 1 || o.depth_start > o.backprop_depth)
        die(2, "--depth-start %zu is not between 1 and --backprop-depth %zu", o.depth_start, o.backprop_depth);
    if (o.trains && retrofit_is_plain(c))
        die(2, "--train %s: %s is a plain Llama, it has neither adapter nor core", o.trains == 1 ? "core" : "adapter", o.model);
    if (o.samples && (!o.sample_tokens || o.sample_tokens > c->context))
        die(2, "--sample-tokens is from 1 to the model's context of %zu", c->context);
    if (!o.eval_rows || !o.keep || !o.max_bad_steps) die(2, "--%s is at least 1", !o.eval_rows ? "eval-rows" : !o.keep ? "keep" : "max-bad-steps");
    if (o.time_limit > 0 && o.time_limit <= o.save_before)
        die(2, "--time-limit %g leaves no time to train: saving begins --save-before %g minutes earlier", o.time_limit, o.save_before);
}

int main(int argc, char **argv) {
    started = retrofit_seconds();
    int code = retrofit_options(argc, argv, options, sizeof options / sizeof *options,
                                "train --model DIR --data 'GLOB' --out DIR --steps N [options]\n"
                                "Trains a recurrent model made by convert, or a plain Llama as the baseline.\n", NULL, NULL);
    if (code >= 0) return code;
    if (!o.model || (!o.dry_run && (!o.data || !o.out))) die(2, "--model, --data, --out and --steps are needed (see --help)");
    if (o.resume_anyway) o.resume = true;
    char resolved[RETROFIT_PATH], latest[RETROFIT_PATH], path[RETROFIT_PATH];
    const char *source = retrofit_model_directory(o.model, resolved);
    retrofit_config config;
    if (!retrofit_config_read(&config, source)) die(1, "%s", retrofit_error());
    check_options(&config);
    char device[256];
    const retrofit_ops *ops = place = retrofit_device((retrofit_place)o.device, o.precision, device);
    retrofit_model *shape = ops ? retrofit_model_new(&config, ops) : NULL;
    if (!shape) die(1, "%s", retrofit_error());
    if (o.dry_run == 2) return print_schedule(&config), retrofit_free(shape), 0;
    size_t accumulate = o.batch / o.micro, T = o.seq_len, N = o.micro * T;
    retrofit_data *data = o.data ? retrofit_data_open(o.data, T, config.vocab, o.shuffle, o.seed) : NULL, *val = NULL;
    if ((o.data && !data) || (o.val && !(val = retrofit_data_open(o.val, T, config.vocab, false, 0)))) die(1, "%s", retrofit_error());
    if (data) data_rows = retrofit_data_rows(data), check_tokenizer(source, data, val);
    if (o.dry_run) return dry_run(shape, device, data), retrofit_free(shape), retrofit_data_close(data), retrofit_data_close(val), 0;
    if (!retrofit_path(latest, o.out, "latest") || !retrofit_path(path, o.out, "log.jsonl")) die(1, "%s", retrofit_error());
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigaction(SIGINT, &action, NULL), sigaction(SIGTERM, &action, NULL);
    if (access(o.out, F_OK) == 0) lock_output(); // else once all is well: what fails leaves nothing behind
    struct stat link;
    bool exists = lstat(latest, &link) == 0;
    if (exists && !o.resume) die(2, "%s holds a run already: give --resume to go on with it, or another --out", o.out);
    if (!exists && o.resume) die(2, "--resume: there is no checkpoint in %s", o.out);

    if (o.resume) check_latest(latest);
    check_memory(shape), retrofit_free(shape);
    if (o.resume) source = latest;
    retrofit_model *m = retrofit_load(source, ops, mode());
    if (!m || !retrofit_optimizer_init(m, (retrofit_optimizer_kind)o.optimizer)) die(1, "%s", retrofit_error());
    bool validated = true;
    if (o.resume) resume(m, latest, &validated);
    m->config.mean_recurrence = o.mean_recurrence, m->config.backprop_depth = o.backprop_depth;
    retrofit_buffers *a = retrofit_buffers_new(m, o.micro, T, o.backprop_depth, keep(), NULL);
    int32_t *tokens = malloc(N * sizeof *tokens), *labels = malloc(N * sizeof *labels);
    double *rms = malloc((o.backprop_depth + 1) * sizeof *rms);
    if (!a || !tokens || !labels || !rms) die(1, "%s", a ? "out of memory" : retrofit_error());
    if (o.samples) open_samples(m, source);
    char out[RETROFIT_PATH];
    snprintf(out, sizeof out, "%s", o.out);
    if (!retrofit_make_directories(out, false)) die(1, "%s", retrofit_error());
    lock_output();
    if (!o.resume && lstat(latest, &link) == 0) die(2, "%s holds a run already, begun after this one: give another --out", o.out);
    journal = fopen(path, o.resume ? "ab" : "wb"); // a run that ended before its first checkpoint begins anew
    if (!journal) die(1, "%s: %s", path, strerror(errno));
    retrofit_optimizer optimizer = {.kind = (retrofit_optimizer_kind)o.optimizer, .beta1 = (float)o.beta1, .beta2 = (float)o.beta2,
                                    .eps = (const float[]){1e-8f, 1e-10f, 1e-6f}[o.optimizer], .weight_decay = (float)o.weight_decay,
                                    .momentum = 0.95f, .clip = (float)o.clip, .peak_lr = (float)o.lr};
    size_t first = now.step, saved = first;
    double ahead = cost_of(&config, first, o.steps).flops, begin = retrofit_seconds(), spent = 0;
    if (o.flops > 0) ahead = fmin(ahead, fmax(0, o.flops - now.flops));
    fprintf(stderr, "%s%zu parameters, %zu rows of %zu tokens, %zu steps of %zu, %.3g FLOPs, on %s\n", first ? "resumed: " : "", m->weight_count,
            retrofit_data_rows(data), T, o.steps, o.batch * T, ahead, device);
    if (!ended()) check_disk(m, source);
    if (due() && !validated) validated = evaluate(a, val, tokens, labels);
    for (double next = 0; !ended() && (!stopping(next) || now.step == 0);) { // a run that has nothing to go on from takes its first step
        plan p = plan_of(&m->config, now.step);
        double loss = 0, before = retrofit_seconds(), step_flops = 0, norm = NAN, mean_k = 0;
        size_t n = 0, k = 0;
        retrofit_zero_grad(m);
        for (size_t j = 0; j < accumulate; j++) {
            uint64_t batch = (uint64_t)now.step * accumulate + j;
            for (size_t i = 0; i < o.micro; i++)
                if (!retrofit_data_row(data, batch * o.micro + i, tokens + i * T, labels + i * T)) die(1, "%s", retrofit_error());
            draw(&p, now.step, j, &n, &k);
            if (!retrofit_forward(a, tokens, o.micro, T, o.state_init ? 0 : m->config.state_std, retrofit_hash(o.seed, batch), n, k)) die(1, "%s", retrofit_error());
            loss += retrofit_loss(a, labels, 1.0f / (float)accumulate) / (double)accumulate;
            retrofit_backward(a);
            step_flops += retrofit_flops_per_token(&m->config, mode(), T, n, k) * (double)N;
            now.paper_flops += retrofit_paper_flops_per_token(&m->config, n, k) * (double)N;
            mean_k += (double)k / (double)accumulate;
        }
        if (o.throttle) optimizer.throttle = (float)mean_k;
        optimizer.lr = p.lr, optimizer.muon_lr = p.muon_lr, now.step++; // also if the step is skipped
        if (isfinite(loss)) norm = retrofit_optimizer_step(m, &optimizer, now.step - now.skipped); // its own count is of steps it made
        now.flops += step_flops, spent += step_flops;
        double time = retrofit_seconds() - before, elapsed = retrofit_seconds() - begin;
        seconds_per_flop = fmax(seconds_per_flop, time / step_flops);
        judge(m, loss, norm);
        show(loss, norm, &p, n, k, (double)(o.batch * T) / time, step_flops / time, ops->peak_flops(), fmax(0, ahead - spent) * elapsed / spent);
        char numbers[2][32];
        fprintf(journal,
                "{\"step\":%zu,\"loss\":%s,\"grad_norm\":%s,\"mean_recurrence\":%zu,\"n\":%zu,\"k\":%zu,\"lr\":%.7g,\"muon_lr\":%.7g,"
                "\"throttle\":%.7g,\"tokens\":%zu,\"flops\":%.7g,\"paper_flops\":%.7g,\"skipped\":%zu,\"seconds\":%.3f,\"state_rms\":[",
                now.step, number(numbers[0], "%.7g", loss), number(numbers[1], "%.7g", norm), p.mean, n, k, (double)p.lr,
                muon_lr_of(&p), o.throttle ? mean_k : 1, now.step * o.batch * T, now.flops, now.paper_flops, now.skipped, time);
        for (size_t j = 0, states = retrofit_state_rms(a, rms); j < states; j++) // of the last micro-batch: s_n .. s_{n+k}
            fprintf(journal, "%s%s", j ? "," : "", number(numbers[0], "%.4g", rms[j]));
        fprintf(journal, "]}\n"), flush_journal();
        next = cost_of(&config, now.step, now.step + 1).flops;
        if (ended() || stopping(next) || (o.save_every && now.step % o.save_every == 0)) save(m, source), saved = now.step;
        if (due()) validated = !stopping(0) && evaluate(a, val, tokens, labels);
    }
    if (saved != now.step) save(m, source); // stopped while it validated
    end_live_line();
    if (!ended() || (due() && !validated))
        fprintf(stderr, "train: %s: stopped after step %zu of %zu, saved in %s: --resume goes on\n",
                stop == SIGINT ? "SIGINT" : stop ? "SIGTERM" : "--time-limit", now.step, o.steps, latest);
    else fprintf(stderr, "%s after %zu steps, %.3g FLOPs, %.0f s\n", latest, now.step, now.flops, retrofit_seconds() - begin);
    if (fclose(journal)) die(1, "%s: writing failed: %s", path, strerror(errno));
    free(tokens), free(labels), free(rms), close_samples(), retrofit_buffers_free(a), retrofit_free(m), retrofit_data_close(data),
        retrofit_data_close(val);
    return 0;
}

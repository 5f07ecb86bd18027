// train and infer, run as a user would: runs stopped and continued, logits and losses against the authors' and each other, and bad input.
#include "test.h"
#include <spawn.h>
#include <sys/wait.h>

// Everything happens in a directory of this run's own, where f is the fixtures; PATH begins with BIN, so that commands read as typed.
static char *out, *err; // what the last command wrote
static size_t out_size;

static char *slurp(const char *path, size_t *size) {
    char *text = read_file(path, size);
    need(text != NULL, path);
    return text;
}

static void write_bytes(const char *path, const void *bytes, size_t size) {
    FILE *f = fopen(path, "wb");
    need(f && fwrite(bytes, 1, size, f) == size && fclose(f) == 0, path);
}

static int run_arguments(char command[16384], const char *format, va_list args) {
    char line[16384 + 64];
    vsnprintf(command, 16384, format, args);
    snprintf(line, sizeof line, "%s >stdout 2>stderr", command);
    free(out), free(err);
    int status = system(line);
    out = slurp("stdout", &out_size), err = slurp("stderr", &(size_t){0});
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

__attribute__((format(printf, 1, 2))) static bool works(const char *format, ...) {
    char command[16384];
    va_list args;
    va_start(args, format);
    int code = run_arguments(command, format, args);
    va_end(args);
    return check(code == 0, "%s: exit code %d, not 0: %s", command, code, err);
}

static bool any(const char *pattern) {
    glob_t found;
    memset(&found, 0, sizeof found);
    bool is = glob(pattern, 0, NULL, &found) == 0;
    globfree(&found);
    return is;
}

// One line on stderr, the program's name before and `what` in it, nothing on stdout, nothing left behind: what a failing command makes
// is always called bad. If the error comes up in the middle of a run, lines of progress and a log may be there, but no checkpoint.
static void refused(bool midway, int expected, const char *what, const char *format, va_list args) {
    char command[16384], name[16] = {0};
    int code = run_arguments(command, format, args);
    snprintf(name, sizeof name, "%.5s: ", command);
    const char *last = err;
    for (char *p = err; midway && (p = strchr(p, '\n')) && p[1]; p++) last = p + 1;
    const char *end = strchr(last, '\n');
    check(code == expected, "%.300s: exit code %d, not %d: %s", command, code, expected, err);
    check(end && !end[1] && !strncmp(last, name, 7) && strstr(last, what), "%.300s: not one line '%s… %s …' on stderr: '%s'", command, name, what, err);
    check(out_size == 0, "%.300s: writes to stdout: '%s'", command, out);
    check(!any(midway ? "bad*/*[!l]" : "bad*"), "%.300s: leaves something behind", command);
    if (midway || any("bad*")) check(system("rm -rf bad*") == 0, "rm");
}

__attribute__((format(printf, 3, 4))) static void fails(int expected, const char *what, const char *format, ...) {
    va_list args;
    va_start(args, format);
    refused(false, expected, what, format, args);
    va_end(args);
}

__attribute__((format(printf, 2, 3))) static void fails_midway(const char *what, const char *format, ...) {
    va_list args;
    va_start(args, format);
    refused(true, 1, what, format, args);
    va_end(args);
}

// A token shard: `promised` tokens by its header, `count` in it, the last of them `last` (if not negative).
static void shard_of(const char *path, int32_t magic, int32_t version, size_t promised, size_t count, size_t vocab, int last) {
    int32_t header[256] = {magic, version, (int32_t)promised};
    uint16_t tokens[1024] = {0};
    for (size_t i = 0; i < count; i++) tokens[i] = (uint16_t)(hash64(7, i) % vocab);
    if (last >= 0) tokens[count - 1] = (uint16_t)last;
    char bytes[sizeof header + sizeof tokens];
    memcpy(bytes, header, sizeof header), memcpy(bytes + sizeof header, tokens, sizeof tokens);
    write_bytes(path, bytes, sizeof header + count * 2);
}

static bool same_file(const char *format, const char *a, const char *b) {
    char path[2][256];
    size_t size[2];
    snprintf(path[0], sizeof *path, format, a), snprintf(path[1], sizeof *path, format, b);
    char *x = slurp(path[0], &size[0]), *y = slurp(path[1], &size[1]);
    bool same = size[0] == size[1] && !memcmp(x, y, size[0]);
    free(x), free(y);
    return same;
}

static void same_bits(const char *a, const char *b, const char *why) {
    check(same_file("%s/latest/model.safetensors", a, b), "%s and %s: model.safetensors is not the same bytes (%s)", a, b, why);
    check(same_file("%s/latest/optimizer.safetensors", a, b), "%s and %s: optimizer.safetensors is not the same bytes (%s)", a, b, why);
}

// ---- train -------------------------------------------------------------------------------------------------------------------
#define TRAIN "train --seq-len 24 --micro-batch-size 2 --batch-size 4 --data rows.bin --model f/tiny/"

// OUT holds the last checkpoint, the link to it, the log, and nothing else; the checkpoint loads, and every number is finite.
static void check_checkpoint(const char *dir, size_t steps) {
    char path[256], step[32], link[32] = {0};
    static const char *const files[] = {"config.json", "model.safetensors", "optimizer.safetensors"};
    snprintf(step, sizeof step, "step_%08zu", steps), snprintf(path, sizeof path, "%s/latest", dir);
    check(readlink(path, link, sizeof link - 1) > 0 && !strcmp(link, step), "%s is a link to '%s', not to %s", path, link, step);
    for (size_t i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s/%s", dir, step, files[i]);
        check(access(path, R_OK) == 0, "%s is missing", path);
    }
    DIR *d = opendir(dir);
    need(d != NULL, dir);
    for (struct dirent *e; (e = readdir(d));)
        check(e->d_name[0] == '.' || !strcmp(e->d_name, "latest") || !strcmp(e->d_name, "log.jsonl") || !strcmp(e->d_name, step), "%s: %s is left", dir, e->d_name);
    closedir(d);
    retrofit_model *m = retrofit_load(dir, &retrofit_cpu, RETROFIT_TRAINING);
    if (!check(m != NULL, "%s does not load: %s", dir, retrofit_error())) return;
    size_t odd = 0;
    for (size_t i = 0; i < m->parameter_count; i++)
        for (size_t j = 0; j < m->parameters[i]->rows * m->parameters[i]->cols; j++) odd += !isfinite(m->parameters[i]->master[j]);
    check(odd == 0, "%s: %zu numbers are not finite", dir, odd);
    retrofit_free(m);
}

typedef struct {
    double loss, norm, mean, n, k, lr, muon_lr, validation; // validation: at 2 recurrences (a plain model: 0)
} logged;

// Every step exactly once and in order, each validation behind its step, all numbers finite. log[1..steps].
static void read_log(const char *dir, size_t steps, size_t every, logged *log) {
    char path[256];
    size_t size, step = 0, validations = 0;
    snprintf(path, sizeof path, "%s/log.jsonl", dir);
    char *text = slurp(path, &size), *end;
    check(size && text[size - 1] == '\n', "%s: ends within a line", path);
    for (char *line = text; (end = strchr(line, '\n')); line = end + 1) {
        retrofit_json *j = retrofit_json_parse(line, (size_t)(end - line), path);
        const retrofit_json *at = retrofit_json_get(j, "step"), *val = retrofit_json_get(j, "val");
        if (!check(j && at, "%s: '%.*s': %s", path, (int)(end - line), line, retrofit_error())) continue;
        step += !val;
        check(at->number == (double)step && step <= steps, "%s: step %g where %zu is due of %zu", path, at->number, step, steps);
        for (const retrofit_json *e = (val ? val : j)->child; e; e = e->next)
            check(e->type == RETROFIT_JSON_NUMBER && isfinite(e->number), "%s: step %zu: %s is no number", path, step, e->key);
        if (val && step <= steps) validations++, log[step].validation = (retrofit_json_get(val, "2") ? retrofit_json_get(val, "2") : val->child)->number;
        static const char *const keys[] = {"loss", "grad_norm", "mean_recurrence", "n", "k", "lr", "muon_lr"};
        for (size_t i = 0; !val && step <= steps && i < 7; i++) {
            const retrofit_json *e = retrofit_json_get(j, keys[i]);
            if (check(e != NULL, "%s: step %zu: no %s", path, step, keys[i])) (&log[step].loss)[i] = e->number;
        }
        retrofit_json_free(j);
    }
    check(step == steps, "%s: %zu steps, not %zu", path, step, steps);
    check(validations == (every ? (steps + every - 1) / every : 0), "%s: %zu validations in %zu steps, one every %zu asked for", path, validations, steps, every);
    free(text);
}

// A run, the same again, and with two threads: a seed's bits are its own. What a dry run says of the schedule is what happens.
static void runs(const char *optimizer) {
    logged log[7];
    char a[32], b[32];
    snprintf(a, sizeof a, "%s.a", optimizer), snprintf(b, sizeof b, "%s.b", optimizer);
    works(TRAIN "recurrent --steps 6 --shuffle --optimizer %s --out %s", optimizer, a);
    check(out_size == 0, "train writes to stdout: %s", out);
    check_checkpoint(a, 6), read_log(a, 6, 0, log);
    works("OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive " TRAIN "recurrent --steps 6 --shuffle --optimizer %s --out %s", optimizer, b);
    same_bits(a, b, "the same run with one thread and two");
    works(TRAIN "recurrent --steps 6 --shuffle --optimizer %s --out other/place/%s --seed 2", optimizer, b);
    snprintf(b, sizeof b, "other/place/%s.b", optimizer);
    check(!same_file("%s/latest/model.safetensors", a, b), "%s: --seed 2 gives the bits of --seed 1", a);
    works(TRAIN "recurrent --steps 6 --optimizer %s --dry-run --out unmade", optimizer);
    check(!any("unmade*"), "--dry-run makes --out");
    static const char *const said[] = {"weights", "gradients", "optimizer", "activations", "FLOPs"};
    for (size_t i = 0; i < 5; i++) check(strstr(out, said[i]) != NULL, "--dry-run says nothing of %s: %s", said[i], out);
    size_t sum = 0, all = 0, number, steps = 0, count = 0, mean, n, k;
    double lr, muon;
    char name[32], *memory = strstr(out, "memory\n"), *end;
    for (char *line = out; memory && line < memory && (end = strchr(line, '\n')); line = end + 1) // "  final norm   32"
        if (sscanf(line, " %31[a-z ] %zu\n", name, &number) == 2) strncmp(name, "all", 3) ? (sum += number) : (all = number);
    for (char *line = strstr(out, "   step"); line && (line = strchr(line, '\n')) && line[1]; line++)
        if (sscanf(line, "%zu %zu %*u %lf %lf %*u,%*u %zu,%zu", &number, &mean, &lr, &muon, &n, &k) == 6 && number == ++steps && number <= 6)
            check((double)mean == log[number].mean && (double)n == log[number].n && (double)k == log[number].k && fabs(lr - log[number].lr) < 1e-4 * lr &&
                      fabs(muon - log[number].muon_lr) <= 1e-4 * muon, "%s: --dry-run's step %zu is not what the log has: %.80s", a, number, line);
    retrofit_map f;
    need(retrofit_safetensors_open(&f, "f/tiny/recurrent/model.safetensors"), "tiny");
    for (size_t i = 0; i < f.count; i++) count += f.tensors[i].count;
    retrofit_safetensors_close(&f);
    check(steps == 6, "--dry-run shows %zu of 6 steps: %s", steps, out);
    check(sum == count && all == count, "--dry-run: parts of %zu parameters in all, 'all' is %zu, the file has %zu", sum, all, count);
    check(!strcmp(optimizer, "muon") == (log[3].muon_lr > 0), "%s: muon_lr is %g", a, log[3].muon_lr);
}

// Starts a command and kills it once OUT/latest has come to `step`; false if it came to its end before.
static bool killed_at(const char *command, const char *dir, size_t step) {
    char line[1024], link[256], to[64] = {0};
    snprintf(line, sizeof line, "exec %s --out %s 2>stderr", command, dir), snprintf(link, sizeof link, "%s/latest", dir);
    char *arguments[] = {(char *)"sh", (char *)"-c", line, NULL};
    pid_t child;
    need(posix_spawn(&child, "/bin/sh", NULL, NULL, arguments, environ) == 0, "posix_spawn");
    int status;
    size_t at = 0;
    for (double begin = retrofit_seconds(); at < step && retrofit_seconds() - begin < 60; usleep(100)) {
        if (waitpid(child, &status, WNOHANG) == child) return false;
        if (readlink(link, to, sizeof to - 1) > 0) sscanf(to, "step_%zu", &at);
    }
    kill(child, SIGKILL);
    return waitpid(child, &status, 0) == child && WIFSIGNALED(status);
}

static void continues(const char *optimizer) {
    logged log[25], whole[25];
    char command[512], dir[32], through[32], path[256];
    snprintf(command, sizeof command, TRAIN "recurrent --steps 24 --shuffle --save-every 2 --val val.bin --eval-every 2 --optimizer %s", optimizer);
    snprintf(dir, sizeof dir, "%s.killed", optimizer), snprintf(through, sizeof through, "%s.through", optimizer);
    works("%s --out %s", command, through);
    check_checkpoint(through, 24), read_log(through, 24, 2, whole);
    bool killed = false;
    for (int i = 0; i < 20 && !killed; i++) killed = system("rm -rf *.killed") == 0 && killed_at(command, dir, 4);
    need(killed, "a run to kill");
    // What a kill at a worse moment leaves: half a line, half a checkpoint, the checkpoint before.
    snprintf(path, sizeof path, "%s/log.jsonl", dir);
    FILE *f = fopen(path, "a");
    need(f && fputs("{\"step\":23,\"loss\":5}\n{\"step\":24,\"lo", f) > 0 && fclose(f) == 0, path);
    check(system("for d in step_00000001 step_00000006.tmp-1; do mkdir *.killed/$d && cp f/tiny/base/* *.killed/$d; done") == 0, "mkdir");
    fails(2, "--resume", "%s --out %s", command, dir);
    static const struct { const char *name, *change; } changes[] = {
        {"steps", "--steps 25"}, {"lr", "--lr 1e-4"}, {"seed", "--seed 2"}, {"curriculum", "--curriculum none"}, {"seq-len", "--seq-len 23"},
        {"micro-batch-size", "--micro-batch-size 4"}, {"mean-recurrence", "--mean-recurrence 7"}, {"optimizer", "--optimizer "}};
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        fails(1, changes[i].name, "%s --out %s --resume %s%s", command, dir, changes[i].change, i < 7 ? "" : !strcmp(optimizer, "muon") ? "adamw" : "muon");
        check(!strstr(err, "clip"), "--resume %s names options that were not changed: %s", changes[i].change, err);
    }
    works("%s --out %s --resume", command, dir);
    check_checkpoint(dir, 24), read_log(dir, 24, 2, log), same_bits(dir, through, "killed and resumed");
    for (size_t i = 1; i <= 24; i++)
        check(log[i].loss == whole[i].loss && (i % 2 || log[i].validation == whole[i].validation), "%s: step %zu: log.jsonl has another loss than the run in one go", dir, i);
    works("%s --out %s --resume", command, dir); // nothing left to do
    check_checkpoint(dir, 24), read_log(dir, 24, 2, log), same_bits(dir, through, "resumed at its end");
}

static void nan_weight(void) {
    size_t size;
    retrofit_map f;
    char *bytes = slurp("f/tiny/recurrent/model.safetensors", &size);
    need(retrofit_safetensors_open(&f, "f/tiny/recurrent/model.safetensors"), "tiny");
    float nan = NAN;
    memcpy(bytes + ((const char *)fixture(&f, "transformer.adapter.weight")->data - (const char *)f.base) + 400, &nan, 4);
    need(mkdir("nan", 0777) == 0 && system("cp f/tiny/recurrent/config.json nan") == 0, "nan");
    write_bytes("nan/model.safetensors", bytes, size);
    retrofit_safetensors_close(&f), free(bytes);
    fails_midway("nan", "train --model nan --data rows.bin --seq-len 24 --micro-batch-size 2 --steps 2 --out bad");
}

static void training(void) {
    logged log[41], again[41];
    runs("muon"), runs("adamw");
    continues("muon"), continues("adamw");
    nan_weight();
    // A plain Llama comes back as one.
    works(TRAIN "base --steps 2 --lr 1e-3 --val val.bin --out plain");
    check_checkpoint("plain", 2), read_log("plain", 2, 2, log);
    char *config = slurp("plain/latest/config.json", &(size_t){0});
    check(strstr(config, "\"model_type\": \"llama\"") && strstr(config, "LlamaForCausalLM"), "a plain model's config.json: %s", config);
    free(config);
    retrofit_map a, b;
    need(retrofit_safetensors_open(&a, "f/tiny/base/model.safetensors") && retrofit_safetensors_open(&b, "plain/latest/model.safetensors"), "plain");
    check(a.count == b.count, "plain: %zu tensors of %zu", b.count, a.count);
    for (size_t i = 0; i < a.count; i++) {
        const retrofit_tensor *x = &a.tensors[i], *y = retrofit_safetensors_find(&b, x->name);
        bool shape = y && y->dims == x->dims && y->shape[0] == x->shape[0] && y->count == x->count;
        if (!check(shape, "plain: %s is missing or of another shape", x->name)) continue;
        double moved = relative_error((const float *)y->data, (const float *)x->data, x->count);
        check(moved > 0 && moved < .1, "plain: %s moved by %g of its size in two steps", x->name, moved);
    }
    retrofit_safetensors_close(&a), retrofit_safetensors_close(&b);
    // Two rows can be learnt by heart; and a run without a checkpoint yet may be begun anew, with a log of its own.
    for (int muon = 0; muon < 2; muon++) {
        need(mkdir("learns", 0777) == 0, "learns");
        write_bytes("learns/log.jsonl", "{\"step\":1,\"loss\":9}\n", 20);
        works("train --model f/tiny/recurrent --data two.bin --seq-len 24 --micro-batch-size 2 --steps 40 --lr 3e-3 --muon-lr .02 --optimizer %s --out learns", muon ? "muon" : "adamw");
        read_log("learns", 40, 0, log);
        check(log[40].loss < .75 * log[1].loss, "two rows, 40 steps, %s: loss from %g to %g only", muon ? "muon" : "adamw", log[1].loss, log[40].loss);
        check(log[1].loss > 4.5 && log[1].loss < 5.5, "the first loss is %g, ln 131 = 4.9", log[1].loss);
        need(system("rm -r learns") == 0, "rm");
    }
    // Both programs' losses of the same rows from the zero state, in batches of 4, 4 and 2; the latest checkpoint is found under OUT.
    works(TRAIN "recurrent --steps 1 --micro-batch-size 4 --val rows.bin --eval-recurrences 2,5 --state-init zero --out zero");
    read_log("zero", 1, 1, log);
    works("infer --model zero --eval rows.bin --seq-len 24 --recurrences 2 --state-init zero");
    double loss = 0;
    check(sscanf(strchr(out, '\n') ? strchr(out, '\n') : "", " 2 %lf", &loss) == 1 && fabs(loss - log[1].validation) < 1e-4, "train's validation loss %g, infer's: %s", log[1].validation, out);
    works(TRAIN "recurrent --steps 1 --micro-batch-size 4 --val rows.bin --eval-recurrences 2,5 --eval-rows 3 --state-init zero --out zero3");
    read_log("zero3", 1, 1, again);
    check(again[1].loss == log[1].loss && again[1].validation != log[1].validation, "--eval-rows 3 changes the run, or not the validation");
    // A tokenizer travels with its model.
    works("train --model f/lookup/base --data low.bin --seq-len 24 --micro-batch-size 2 --steps 1 --out lookup");
    works("infer --model lookup --prompt 'a=1 b=a | b' --max-tokens 2");
}

// ---- infer -------------------------------------------------------------------------------------------------------------------
static void tokens_printed(const char *style) {
    char path[256], expected[1 << 14];
    size_t size, i = 0;
    snprintf(path, sizeof path, "f/tokenizers/%s/cases.json", style);
    char *text = slurp(path, &size);
    retrofit_json *cases = retrofit_json_parse(text, size, path);
    need(cases != NULL, path);
    for (const retrofit_json *e = cases->child; e; e = e->next, i++) {
        const retrofit_json *s = retrofit_json_get(e, "text"), *ids = retrofit_json_get(e, "ids_with_special");
        if (i % 16 && i != 3) continue;
        expected[0] = 0;
        for (const retrofit_json *x = ids->child; x; x = x->next) strcat(strcat(expected, x->string), x->next ? " " : "");
        strcat(expected, "\n"), write_bytes("prompt", s->string, s->length);
        works("infer --tokenizer f/tokenizers/%s --prompt - --print-tokens <prompt", style);
        check(!strcmp(out, expected), "%s, case %zu from stdin: '%s', not '%s'", style, i, out, expected);
        if (s->length == 0 || s->string[s->length - 1] == '\n' || strlen(s->string) != s->length) continue; // what $(…) would cut
        works("infer --tokenizer f/tokenizers/%s --prompt=\"$(cat prompt)\" --print-tokens", style);
        check(!strcmp(out, expected) || !strcmp(s->string, "-"), "%s, case %zu as an argument: '%s', not '%s'", style, i, out, expected);
    }
    retrofit_json_free(cases), free(text);
}

// The tensor that infer --logits wrote for tokens (n): n rows of V, to be freed.
static float *logits_of(const char *model, const int32_t *tokens, size_t n, size_t V, const char *options) {
    char list[4096] = {0};
    for (size_t i = 0, at = 0; i < n; i++) at += (size_t)snprintf(list + at, sizeof list - at, i ? ",%d" : "%d", (int)tokens[i]);
    works("infer --model f/%s --tokens %s --logits logits.safetensors %s", model, list, options);
    check(out_size == 0, "infer --logits writes to stdout: %s", out);
    retrofit_map f;
    need(retrofit_safetensors_open(&f, "logits.safetensors"), "logits.safetensors");
    const retrofit_tensor *t = fixture(&f, "logits");
    need(t->dims == 2 && t->shape[0] == n && t->shape[1] == V && t->type == RETROFIT_F32, "the shape of logits");
    float *logits = (float *)allocate(n * V, sizeof *logits);
    memcpy(logits, t->data, n * V * sizeof *logits);
    retrofit_safetensors_close(&f), unlink("logits.safetensors");
    return logits;
}

static void authors_logits(const char *name) {
    char path[256], model[64], options[64];
    retrofit_map f;
    snprintf(path, sizeof path, "f/%s/forward_backward.safetensors", name);
    need(retrofit_safetensors_open(&f, path), path);
    const retrofit_tensor *tokens = fixture(&f, "tokens");
    for (size_t r = 0; r <= 8; r += r ? r : 1) { // 0: the plain model; r of the recurrent one
        const retrofit_tensor *theirs = r ? fixture(&f, "zero.r%zu.logits", r) : fixture(&f, "base.logits");
        size_t T = theirs->shape[1], V = theirs->shape[2];
        snprintf(model, sizeof model, "%s/%s", name, r ? "recurrent" : "base"), snprintf(options, sizeof options, "--state-init zero --recurrences %zu", r);
        float *logits = logits_of(model, (const int32_t *)tokens->data, T, V, r ? options : "");
        double error = relative_error(logits, (const float *)theirs->data, T * V);
        check(error < 1e-5, "%s, r=%zu: --logits differ from the authors' by %.1e", name, r, error);
        free(logits);
    }
    retrofit_safetensors_close(&f);
}

// --eval's loss of one row, from the logits of the same tokens.
static void losses(void) {
    works("infer --model f/tiny/recurrent --eval one.bin --seq-len 24 --recurrences 1,2,4 --state-init zero");
    char *table = strdup(out), *line = strchr(table, '\n');
    size_t size, V = 131, T = 24;
    char *shard = slurp("one.bin", &size), options[64];
    for (size_t r = 1; r <= 4; r *= 2) {
        int32_t ids[25];
        uint16_t id;
        for (size_t i = 0; i <= T; i++) memcpy(&id, shard + 1024 + 2 * i, 2), ids[i] = id;
        snprintf(options, sizeof options, "--state-init zero --recurrences %zu", r);
        float *x = logits_of("tiny/recurrent", ids, T, V, options);
        double loss = 0, theirs = 0, perplexity = 0;
        size_t shown = 0;
        for (size_t t = 0; t < T; t++) {
            double sum = 0;
            for (size_t v = 0; v < V; v++) sum += exp((double)x[t * V + v]);
            loss += (log(sum) - (double)x[t * V + (size_t)ids[t + 1]]) / (double)T;
        }
        if (line) sscanf(line, " %zu %lf %lf", &shown, &theirs, &perplexity), line = strchr(line + 1, '\n');
        check(shown == r && fabs(theirs - loss) < 1e-4 && fabs(perplexity - exp(loss)) < 1e-3 * exp(loss), "--eval, r=%zu: loss %g by the logits: %s", r, loss, table);
        free(x);
    }
    free(shard), free(table);
}

#define INFER "infer --model f/tiny/recurrent --tokenizer f/lookup/base "
static char *generated(const char *options) { // to be freed
    works(INFER "--recurrences 3 %s", options);
    return strdup(out);
}

static void differ(bool should, const char *a, const char *b) {
    char *x = generated(a), *y = generated(b);
    check(!strcmp(x, y) != should, "'%s' and '%s' give %s text: %s", a, b, should ? "the same" : "another", x);
    free(x), free(y);
}

static void generation(void) {
    size_t n, size, before, steps = 0;
    retrofit_tokenizer *t = retrofit_tokenizer_load("f/lookup/base");
    need(t != NULL, "tokenizer");
    // Greedy decoding by the cache, against the likeliest token after ever more tokens without it.
    const char *prompt = "a=1 b=a | b";
    int32_t ids[64], *begin = retrofit_encode(t, prompt, strlen(prompt), true, &n);
    memcpy(ids, begin, n * sizeof *ids), free(begin);
    free(retrofit_decode(t, ids, n, true, &before));
    for (; steps < 6; n++, steps++) {
        float *x = logits_of("tiny/recurrent", ids, n, 131, "--recurrences 3");
        ids[n] = retrofit_argmax(x + (n - 1) * 131, 131);
        free(x);
        if (ids[n] == retrofit_tokenizer_eos(t) || ids[n] >= (int32_t)retrofit_tokenizer_size(t)) break;
    }
    char *text = retrofit_decode(t, ids, n, true, &size), command[256], word[1024] = {0};
    need(text != NULL, "decode");
    check(steps > 2, "only %zu tokens to compare", steps);
    snprintf(command, sizeof command, "--prompt '%s' --max-tokens %zu", prompt, steps);
    char *theirs = generated(command), *end = strrchr(theirs, '\n');
    check(end && !end[1] && (size_t)(end - theirs) == size - before && !memcmp(theirs, text + before, size - before), "greedy: '%s', the logits say '%s'", theirs, text + before);
    free(theirs), free(text);
    differ(false, command, command);
    differ(false, "--prompt 'a=1 b' --seed 3 --temperature 2 --max-tokens 20", "--prompt - --seed 3 --temperature 2 --max-tokens 20 <ab");
    differ(true, "--prompt 'a=1 b' --seed 3 --temperature 2 --max-tokens 20", "--prompt 'a=1 b' --seed 4 --temperature 2 --max-tokens 20");
    differ(false, "--prompt 'a=1 b' --max-tokens 9", "--prompt 'a=1 b' --max-tokens 9 --temperature 2 --top-k 1");
    theirs = generated("--prompt 'a=1 b' --max-tokens 0");
    check(!strcmp(theirs, "\n"), "--max-tokens 0 writes '%s'", theirs);
    free(theirs);
    // Prompts of 127 and 128 tokens, in a context of 128.
    for (size_t i = 0; i < 200; i++) {
        strcat(word, " a");
        free(retrofit_encode(t, word, strlen(word), true, &n));
        if (n == 127) works(INFER "--prompt '%s' --max-tokens 18446744073709551615", word);
        if (n == 128) fails(1, "context 128", INFER "--prompt '%s'", word);
    }
    retrofit_tokenizer_free(t);
    works("infer --model f/lookup/base --tasks f/lookup/tasks.jsonl");
    double accuracy = 0, hops[3] = {0};
    const char *row = strchr(out, '\n');
    check(row && sscanf(row, " 0 %*f %lf ± %*f %lf %lf %lf", &accuracy, hops, hops + 1, hops + 2) == 4 && fabs(accuracy - .608) < 1e-9 && hops[0] == 1 &&
              hops[1] == 1 && hops[2] == .99, "--tasks: not .608, 1, 1, .99 but %s", out);
}

// ---- Bad input ---------------------------------------------------------------------------------------------------------------
static void bad_models_and_shards(void) {
    size_t size;
    char *bytes = slurp("f/tiny/recurrent/model.safetensors", &size);
    need(system("mkdir cut empty text && cp f/tiny/recurrent/config.json cut && echo '{' >text/config.json") == 0, "mkdir");
    write_bytes("cut/model.safetensors", bytes, size - 1000), free(bytes);
    shard_of("beyond.bin", 20240520, 1, 60, 60, 131, 131), shard_of("truncated.bin", 20240520, 1, 61, 60, 131, -1), shard_of("magic.bin", 20240521, 1, 60, 60, 131, -1);
    shard_of("version.bin", 20240520, 2, 60, 60, 131, -1), shard_of("short.bin", 20240520, 1, 20, 20, 131, -1), shard_of("none.bin", 20240520, 1, 0, 0, 131, -1);
    write_bytes("file", "x", 1);
    static const struct { const char *what, *model; } models[] = {{"No such file", "missing"}, {"truncated", "cut"}, {"config.json", "empty"}, {"config.json", "text"}};
    static const struct { const char *what, *data; } shards[] = {{"no such file", "missing.bin"}, {"truncated", "truncated.bin"}, {"not a token shard", "magic.bin"},
        {"not a token shard", "version.bin"}, {"fewer tokens", "short.bin"}, {"fewer tokens", "none.bin"}, {"no token shard", "file"}};
    for (size_t i = 0; i < 4; i++) {
        fails(1, models[i].what, "train --model %s --data rows.bin --out bad/deep --steps 2 --seq-len 24", models[i].model);
        fails(1, models[i].what, "infer --model %s --tokens 1,2 --logits bad.safetensors", models[i].model);
    }
    for (size_t i = 0; i < 7; i++) {
        fails(1, shards[i].what, "train --model f/tiny/recurrent --data %s --out bad --steps 2 --seq-len 24", shards[i].data);
        fails(1, shards[i].what, "train --model f/tiny/recurrent --data rows.bin --val %s --out bad --steps 2 --seq-len 24", shards[i].data);
        fails(1, shards[i].what, "infer --model f/tiny/recurrent --eval %s --seq-len 24", shards[i].data);
    }
    fails_midway("vocabulary", "train --model f/tiny/recurrent --data beyond.bin --out bad --steps 3 --seq-len 19 --micro-batch-size 2");
    fails(1, "vocabulary", "infer --model f/tiny/recurrent --eval beyond.bin --seq-len 19");
}

static void bad_options(void) {
    static const struct { int code; const char *what, *options; } train[] = {
        {2, "--steps is needed", "--steps 0"}, {2, "--steps", "--steps"}, {2, "whole number", "--steps x"}, {2, "whole number", "--steps -1"}, {2, "whole number", "--steps 1.5"},
        {2, "--lr needs a number", "--lr x"}, {2, "--lr needs a number", "--lr nan"}, {2, "--lr -1", "--lr=-1"}, {2, "--beta2", "--beta2 1"},
        {2, "adamw|muon", "--optimizer sgd"}, {2, "adamw|muon", "--optimizer 'adamw|muon'"}, {2, "takes no value", "--shuffle=1"}, {2, "not an option", "extra"},
        {2, "did you mean --shuffle?", "--shufle"}, {2, "multiple of --micro-batch-size 2", "--batch-size 3"}, {2, "--micro-batch-size 0", "--micro-batch-size 0"},
        {2, "context of 128", "--seq-len 129"}, {2, "--eval-recurrences", "--eval-recurrences 1,,2"}, {2, "--eval-rows", "--eval-rows 0"}, {2, "65536", "--mean-recurrence 65537"},
        {2, "65536", "--backprop-depth 65537"}, {2, "--resume", "--resume"}, {1, "file", "--out file"}, {1, "Not a directory", "--out file/below"},
        {1, "batch of 4611686018427387904", "--micro-batch-size 4611686018427387904"}, {1, "batch of 4611686018427387904", "--micro-batch-size 4611686018427387904 --dry-run"}};
    for (size_t i = 0; i < sizeof train / sizeof *train; i++)
        fails(train[i].code, train[i].what, "train --model f/tiny/recurrent --data rows.bin --out bad --seq-len 24 --micro-batch-size 2 --steps 2 %s", train[i].options);
    static const struct { int code; const char *what, *options; } infer[] = {
        {2, "--temperature needs a number", "--prompt a --temperature hot"}, {2, "--temperature", "--prompt a --temperature=-1"}, {2, "--top-p", "--prompt a --top-p 0"},
        {2, "--prompt needs a value", "--prompt"}, {2, "--prompt is needed", ""}, {2, "empty", "--prompt ''"}, {2, "empty", "--prompt - </dev/null"}, {2, "not an option", "--prompt a b"},
        {2, "did you mean --max-tokens?", "--prompt a --max-token 3"}, {2, "whole number", "--prompt a --max-tokens many"}, {2, "one number", "--prompt a --recurrences 1,2"},
        {2, "positive numbers", "--prompt a --recurrences 0"}, {2, "positive numbers", "--eval one.bin --recurrences 1,,2"}, {2, "does not grow", "--eval one.bin --recurrences 2,2"},
        {2, "does not grow", "--eval one.bin --recurrences 1,4,2"}, {2, "context of 128", "--eval one.bin --seq-len 129"}, {2, "at a time", "--eval one.bin --tasks tasks"},
        {2, "none", "--model f/tiny/base --prompt a --recurrences 2"}, {2, "none", "--model f/tiny/base --eval one.bin --seq-len 24 --recurrences 2"},
        {1, "vocabulary", "--tokens 1,131 --logits bad.safetensors"}, {1, "vocabulary", "--tokens 1,2147483647 --logits bad.safetensors"}, {2, "ids like", "--tokens '' --logits bad.safetensors"},
        {2, "ids like", "--tokens 1, --logits bad.safetensors"}, {2, "ids like", "--tokens ,1 --logits bad.safetensors"}, {2, "ids like", "--tokens '1 2' --logits bad.safetensors"},
        {2, "ids like", "--tokens=-1 --logits bad.safetensors"}, {2, "ids like", "--tokens 99999999999999999999 --logits bad.safetensors"},
        {2, "--logits", "--prompt a --tokens 1,2"}, {2, "--tokens", "--prompt a --tokens 1,2 --print-tokens"}, {1, "context of 128", "--tokens $(seq -s , 1 130) --logits bad.safetensors"},
        {1, "Not a directory", "--tokens 1 --logits file/bad"}, {1, "tokenizer", "--tokenizer empty --prompt a"}, {1, "vocabulary", "--tokenizer f/tokenizers/smollm_style --prompt a"},
        {1, "No such file", "--tasks missing"}, {1, "no tasks", "--tasks /dev/null"}, {1, "line 3", "--tasks tasks"}, {1, "is a directory", "--tasks empty"}};
    write_bytes("tasks", "{\"prompt\":\"a=1 | a\",\"answer\":\"=1\"}\n\n{\"prompt\":\"a\"}\n", 52);
    for (size_t i = 0; i < sizeof infer / sizeof *infer; i++) fails(infer[i].code, infer[i].what, INFER "%s", infer[i].options);
    fails(2, "--help", "train"), fails(2, "--model is needed", "infer");
    static const char *const named[] = {"--model", "--seed", "--seq-len", "--state-init", "--device"};
    for (int i = 0; i < 2; i++) {
        works("%s --help", i ? "infer" : "train");
        check(!*err, "--help writes to stderr: %s", err);
        for (size_t j = 0; j < 5; j++) check(strstr(out, named[j]) != NULL, "%s --help says nothing of %s", i ? "infer" : "train", named[j]);
        check(strstr(out, i ? "--print-tokens" : "--save-every") && strstr(out, i ? "--min-p" : "--curriculum-warmup"), "--help is not whole");
        for (char *line = out, *end; (end = strchr(line, '\n')); line = end + 1) check(end - line <= 120, "--help: a line of %d: %.*s", (int)(end - line), (int)(end - line), line);
    }
}

int main(void) {
    char directory[] = "/tmp/retrofit-programs-XXXXXX", bin[4096], fixtures[4096], path[8192];
    const char *from = getenv("BIN") ? getenv("BIN") : ".";
    need(realpath(from, bin) && realpath("test/fixtures", fixtures), from);
    snprintf(path, sizeof path, "%s:%s", bin, getenv("PATH") ? getenv("PATH") : "/usr/bin:/bin");
    // On small models two threads only wait for each other, and where others compute too, for long.
    need(setenv("PATH", path, 1) == 0 && setenv("OMP_NUM_THREADS", "1", 1) == 0, "setenv");
    need(mkdtemp(directory) && chdir(directory) == 0 && symlink(fixtures, "f") == 0 && system("command -v train infer >/dev/null") == 0, directory);
    shard_of("rows.bin", 20240520, 1, 251, 251, 131, -1), shard_of("one.bin", 20240520, 1, 25, 25, 131, -1), shard_of("two.bin", 20240520, 1, 50, 50, 131, -1);
    shard_of("val.bin", 20240520, 1, 80, 80, 131, -1), shard_of("low.bin", 20240520, 1, 50, 50, 60, -1), write_bytes("ab", "a=1 b", 5);
    training();
    tokens_printed("llama2_style"), tokens_printed("llama3_style"), tokens_printed("smollm_style");
    authors_logits("tiny"), authors_logits("llama3"), authors_logits("head64");
    losses();
    generation();
    bad_models_and_shards();
    bad_options();
    free(out), free(err);
    snprintf(path, sizeof path, "rm -r %s", directory);
    check(system(path) == 0, "%s: cannot be removed", directory);
    return finish("programs");
}

// train and infer, called as a user would: runs that are stopped and continued, logits and losses
// against the authors' and against each other, and bad input.
#include "run.h"
#include <spawn.h>

#define TRAIN_A "train --seq-len 24 --micro-batch-size 2 --batch-size 4 --data rows.bin --model "
#define TRAIN   TRAIN_A "f/tiny/recurrent "
#define INFER   "infer --model f/tiny/recurrent --tokenizer f/lookup/base "

// A shard of `count` random tokens below vocab, of which its header promises `promised`. The last
// one is `last`, unless that is negative.
static void write_shard(const char *path, int32_t magic, int32_t version, size_t promised,
                        size_t count, size_t vocab, int last) {
    int32_t header[256] = {magic, version, (int32_t)promised};
    uint16_t tokens[256];
    char bytes[sizeof header + sizeof tokens];
    for (size_t i = 0; i < count; i++) tokens[i] = (uint16_t)(retrofit_hash(7, i) % vocab);
    if (count > 0 && last >= 0) tokens[count - 1] = (uint16_t)last;
    memcpy(bytes, header, sizeof header);
    memcpy(bytes + sizeof header, tokens, count * sizeof *tokens);
    write_bytes(path, bytes, sizeof header + count * sizeof *tokens);
}

static retrofit_model *load(const char *directory, retrofit_mode mode) {
    retrofit_model *model = retrofit_load(directory, &retrofit_cpu, mode);
    need(model != NULL, directory);
    return model;
}

// The first line of a text, and the line after one; NULL where no whole line follows.
static char *first_line(char *text) { return strchr(text, '\n') ? text : NULL; }
static char *next_line(char *line) { return first_line(strchr(line, '\n') + 1); }

// How long a line is, as printf's precision.
static int length_of(const char *line) { return (int)strcspn(line, "\n"); }

static void same_checkpoints(const char *a, const char *b) {
    works("cmp %s/latest/model.safetensors %s/latest/model.safetensors && "
          "cmp %s/latest/optimizer.safetensors %s/latest/optimizer.safetensors",
          a, b, a, b);
}

static char *read_log_file(const char *directory, size_t *size) {
    char path[256];
    snprintf(path, sizeof path, "%s/log.jsonl", directory);
    return slurp(path, size);
}

// ---- What a run leaves -------------------------------------------------------------------------

// The directory holds the last checkpoint, the link to it and the log, and nothing else; and the
// checkpoint loads.
static void check_checkpoint(const char *directory, size_t steps) {
    char expected[160];
    snprintf(expected, sizeof expected,
             "step_%08zu\n"
             "latest\nlog.jsonl\noptions.txt\nstep_%08zu\n"
             "config.json\nmanifest.json\nmodel.safetensors\noptimizer.safetensors\n",
             steps, steps);
    works("readlink %s/latest && ls -A %s && ls -A %s/latest/", directory, directory, directory);
    check(!strcmp(out, expected), "%s holds %s instead of %s", directory, out, expected);
    retrofit_model *model = retrofit_load(directory, &retrofit_cpu, RETROFIT_TRAINING);
    check(model != NULL, "%s does not load: %s", directory, retrofit_error());
    retrofit_free(model);
}

// A step of the log. validation: the loss at 2 recurrences, or a plain model's.
typedef struct {
    double loss, norm, mean, n, k, lr, muon_lr, validation;
} logged_step;

static bool is_number(const retrofit_json *value) {
    return value->type == RETROFIT_JSON_NUMBER && isfinite(value->number);
}

// All that a line of the log holds are numbers, or lists of them: of the sizes of states.
static void check_numbers(const retrofit_json *values, const char *path, size_t step) {
    for (const retrofit_json *e = values->child; e; e = e->next) {
        if (e->type != RETROFIT_JSON_ARRAY) {
            check(is_number(e), "%s: step %zu: %s is no number", path, step, e->key);
            continue;
        }
        for (const retrofit_json *x = e->child; x; x = x->next)
            check(is_number(x) && x->number >= 0, "%s: step %zu: %s holds no number", path, step,
                  e->key);
    }
}

static double logged_number(const retrofit_json *line, const char *key, const char *path,
                            size_t step) {
    const retrofit_json *value = retrofit_json_get(line, key);
    bool found = check(value != NULL, "%s: step %zu: no %s", path, step, key);
    return found ? value->number : 0;
}

static void read_step(const retrofit_json *line, const char *path, size_t step,
                      logged_step *logged) {
    logged->loss = logged_number(line, "loss", path, step);
    logged->norm = logged_number(line, "grad_norm", path, step);
    logged->mean = logged_number(line, "mean_recurrence", path, step);
    logged->n = logged_number(line, "n", path, step);
    logged->k = logged_number(line, "k", path, step);
    logged->lr = logged_number(line, "lr", path, step);
    logged->muon_lr = logged_number(line, "muon_lr", path, step);

    // Of the states s_n … s_{n+k}; a plain model has none.
    const retrofit_json *states = retrofit_json_get(line, "state_rms");
    size_t expected = logged->k > 0 ? (size_t)logged->k + 1 : 0;
    check(states && states->count == expected, "%s: step %zu: sizes of %u states", path, step,
          states ? states->count : 0);
}

// Every step stands there once and in order, a validation follows its step every so many of them
// (0: none), and all numbers are finite. Fills log[1] … log[steps].
static void read_log(const char *directory, size_t steps, size_t every, logged_step *log) {
    size_t size, step = 0, validations = 0, expected = every ? (steps + every - 1) / every : 0;
    char *text = read_log_file(directory, &size), path[256];
    snprintf(path, sizeof path, "%s/log.jsonl", directory);
    memset(log, 0, (steps + 1) * sizeof *log);
    check(size && text[size - 1] == '\n', "%s: ends within a line", path);
    for (char *line = first_line(text); line; line = next_line(line)) {
        retrofit_json *j = retrofit_json_parse(line, strcspn(line, "\n"), path);
        const retrofit_json *number = retrofit_json_get(j, "step");
        const retrofit_json *validation = retrofit_json_get(j, "val");
        if (!check(number != NULL, "%s: '%.*s': %s", path, length_of(line), line, retrofit_error()))
            continue;
        if (!validation) step++;
        bool in_order = number->number == (double)step && step <= steps;
        check(in_order, "%s: step %g, expected %zu of %zu", path, number->number, step, steps);
        check_numbers(validation ? validation : j, path, step);
        if (step <= steps && validation) {
            const retrofit_json *loss = retrofit_json_get(validation, "2");
            log[step].validation = loss ? loss->number : validation->child->number;
            validations++;
        }
        if (step <= steps && !validation) read_step(j, path, step, &log[step]);
        retrofit_json_free(j);
    }
    check(step == steps && validations == expected,
          "%s: %zu steps, not %zu; %zu validations, not %zu", path, step, steps, validations,
          expected);
    free(text);
}

// The last number that stands after a key in a log; -1 if there is none.
static double last_of(const char *directory, const char *key) {
    char *text = read_log_file(directory, &(size_t){0});
    double number = -1;
    for (char *found = strstr(text, key); found; found = strstr(found, key)) {
        found += strlen(key);
        number = strtod(found, NULL);
    }
    free(text);
    return number;
}

// ---- Runs and dry runs -------------------------------------------------------------------------

static size_t numbers_in_file(const char *path) {
    size_t count = 0;
    retrofit_map f;
    need(retrofit_safetensors_open(&f, path), path);
    for (size_t i = 0; i < f.count; i++) count += f.tensors[i].count;
    retrofit_safetensors_close(&f);
    return count;
}

// --dry-run's table of parameters, which ends before `end`: the sum of its rows, and its last row.
static void read_parameter_table(char *text, const char *end, size_t *sum, size_t *all) {
    size_t muon, adamw, frozen;
    char name[32];
    for (char *line = first_line(text); line && line < end; line = next_line(line)) {
        if (sscanf(line, " %31[a-z ] %zu %zu %zu\n", name, &muon, &adamw, &frozen) != 4) continue;
        if (!strncmp(name, "all", 3)) *all = muon + adamw + frozen;
        else *sum += muon + adamw + frozen;
    }
}

// --dry-run's table of six steps, against the log. Returns how many it has.
static size_t check_step_table(char *text, const char *directory, const logged_step *log) {
    size_t steps = 0, number, mean, n, k;
    double lr, muon_lr;
    for (char *line = next_line(text); line; line = next_line(line)) {
        int read = sscanf(line, "%zu %zu %*u %lf %lf %*u,%*u %zu,%zu", &number, &mean, &lr,
                          &muon_lr, &n, &k);
        if (read != 6 || number != steps + 1 || number > 6) continue;
        steps++;
        const logged_step *logged = &log[number];
        bool same =
            (double)mean == logged->mean && (double)n == logged->n && (double)k == logged->k;
        bool rates =
            fabs(lr - logged->lr) < 1e-4 * lr && fabs(muon_lr - logged->muon_lr) <= 1e-4 * muon_lr;
        check(same && rates, "%s: --dry-run's step %zu is not what the log has: %.80s", directory,
              number, line);
    }
    return steps;
}

// What a dry run says is what happens.
static void check_dry_run(const char *optimizer, const char *directory, const logged_step *log) {
    works(TRAIN "--steps 6 --optimizer %s --dry-run --out unmade && ! test -e unmade", optimizer);
    bool memory = strstr(out, "weights ") && strstr(out, "gradients ") &&
                  strstr(out, "optimizer ") && strstr(out, "activations ");
    check(memory && strstr(out, "FLOPs"), "--dry-run does not tell memory and FLOPs: %s", out);

    char *end = strstr(out, "memory on "), *table = strstr(out, "   step");
    need(end && table, "the tables of --dry-run");
    size_t sum = 0, all = 0, count = numbers_in_file("f/tiny/recurrent/model.safetensors");
    read_parameter_table(out, end, &sum, &all);
    size_t steps = check_step_table(table, directory, log);
    check(steps == 6 && sum == count && all == count,
          "--dry-run: %zu of 6 steps, %zu parameters, 'all' is %zu, the file has %zu", steps, sum,
          all, count);
    check(!strcmp(optimizer, "muon") == (log[3].muon_lr > 0), "%s: muon_lr is %g", directory,
          log[3].muon_lr);
}

// A run; the same with two threads, which gives the same bits; and with another seed, which does
// not.
static void runs(const char *optimizer) {
    logged_step log[7];
    char a[32], b[64];
    snprintf(a, sizeof a, "%s.a", optimizer);
    snprintf(b, sizeof b, "deep/%s", a);
    works(TRAIN "--steps 6 --shuffle --optimizer %s --out %s", optimizer, a);
    check(out_size == 0, "train writes to stdout: %s", out);
    check_checkpoint(a, 6);
    read_log(a, 6, 0, log);
    works("OMP_NUM_THREADS=2 " TRAIN "--steps 6 --shuffle --optimizer %s --out %s", optimizer, b);
    same_checkpoints(a, b);
    works(TRAIN "--steps 6 --shuffle --optimizer %s --out %s.2 --seed 2 && "
                "! cmp %s.2/latest/model.safetensors %s/latest/model.safetensors",
          optimizer, a, a, a);
    check_dry_run(optimizer, a, log);
}

// Starts a command and kills it once its checkpoint of `step` is there. False if the run came to
// its end, or close to it, before that.
static bool killed_at(const char *command, const char *directory, size_t step) {
    char line[1024], link[256], target[64] = {0};
    char shell_name[] = "sh", option[] = "-c", *arguments[] = {shell_name, option, line, NULL};
    int status;
    size_t reached = 0;
    pid_t child;
    snprintf(line, sizeof line, "exec %s --out %s 2>stderr", command, directory);
    snprintf(link, sizeof link, "%s/latest", directory);
    need(posix_spawn(&child, "/bin/sh", NULL, NULL, arguments, environ) == 0, "posix_spawn");
    double begin = retrofit_seconds();
    while (reached < step && retrofit_seconds() - begin < 60) {
        if (waitpid(child, &status, WNOHANG) == child) return false;
        if (readlink(link, target, sizeof target - 1) > 0) sscanf(target, "step_%zu", &reached);
        usleep(100);
    }
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    if (!WIFSIGNALED(status) || readlink(link, target, sizeof target - 1) <= 0) return false;
    return sscanf(target, "step_%zu", &reached) == 1 && reached < 20;
}

// What a kill at a worse moment leaves: half a line of the log, half a checkpoint, one that is not
// linked to yet, and the one before.
static void leave_rubbish(const char *directory) {
    char command[512];
    snprintf(command, sizeof command,
             "cd %s && printf '{\"step\":23,\"loss\":5}\\n{\"step\":24,\"lo' >>log.jsonl && "
             "for d in step_00000001 step_00000006.tmp-1 step_00000022; do "
             "mkdir $d && cp ../f/tiny/base/* $d; done",
             directory);
    shell(command);
}

// A run is not continued with other options; the error names the one that was changed.
static void refuse_changes(const char *command, const char *directory, const char *optimizer) {
    char other_optimizer[32];
    const char *other = strcmp(optimizer, "muon") ? "muon" : "adamw";
    snprintf(other_optimizer, sizeof other_optimizer, "--optimizer %s", other);
    const struct {
        const char *name, *change;
    } changes[] = {
        {"steps", "--steps 25"},
        {"lr", "--lr 1e-4"},
        {"seed", "--seed 2"},
        {"curriculum", "--curriculum none"},
        {"seq-len", "--seq-len 23"},
        {"micro-batch-size", "--micro-batch-size 4"},
        {"mean-recurrence", "--mean-recurrence 7"},
        {"optimizer", other_optimizer},
    };
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        const char *change = changes[i].change;
        fails(1, changes[i].name, "%s --out %s --resume %s", command, directory, change);
        check(!strstr(err, "clip"), "--resume %s names options that were not changed: %s", change,
              err);
    }
}

// A run that was killed comes to the same bits as one that was not.
static void continues(const char *optimizer) {
    logged_step log[25], whole_log[25];
    char command[512], directory[32], whole[32];
    snprintf(command, sizeof command,
             TRAIN "--steps 24 --shuffle --save-every 2 --val val.bin --eval-every 2 "
                   "--optimizer %s",
             optimizer);
    snprintf(directory, sizeof directory, "%s.killed", optimizer);
    snprintf(whole, sizeof whole, "%s.through", optimizer);
    works("%s --out %s", command, whole);
    check_checkpoint(whole, 24);
    read_log(whole, 24, 2, whole_log);

    int tries = 0;
    shell("rm -rf *.killed");
    while (!killed_at(command, directory, 4)) {
        need(tries < 20, "a run to kill");
        shell("rm -rf *.killed");
        tries++;
    }
    leave_rubbish(directory);
    fails(2, "--resume", "%s --out %s", command, directory);
    refuse_changes(command, directory, optimizer);
    for (int again = 0; again < 2; again++) { // the second time nothing is left to do
        works("%s --out %s --resume", command, directory);
        check_checkpoint(directory, 24);
        read_log(directory, 24, 2, log);
        same_checkpoints(directory, whole);
    }
    for (size_t i = 1; i <= 24; i++) {
        bool equal =
            log[i].loss == whole_log[i].loss && log[i].validation == whole_log[i].validation;
        check(equal, "%s: step %zu: another loss than in one go", directory, i);
    }
}

// ---- The schedule ------------------------------------------------------------------------------

#define SCHEDULED                                                                         \
    "--batch-size 2 --steps 12 --mean-recurrence 6 --backprop-depth 5 --depth-warmup .5 " \
    "--depth-start 2 "

static void check_largest_draw(const logged_step *log) {
    size_t largest = 0, at = 0, largest_said = 0, at_said = 0;
    for (size_t i = 1; i <= 12; i++) {
        size_t recurrences = (size_t)(log[i].n + log[i].k);
        if (recurrences <= largest) continue;
        largest = recurrences;
        at = i;
    }
    works(TRAIN SCHEDULED "--dry-run");
    char *line = strstr(out, "the largest draw");
    if (line)
        sscanf(line, "the largest draw is %zu recurrences, in step %zu", &largest_said, &at_said);
    check(largest_said == largest && at_said == at,
          "the largest draw is %zu in step %zu, not %zu in %zu", largest, at, largest_said,
          at_said);
}

// The whole schedule, micro-batch by micro-batch, is what the log says, of one micro-batch a step;
// the depth of backpropagation grows.
static void check_schedule(const logged_step *log) {
    size_t step = 0, number, micro, mean, depth, n, k, deepest = 0;
    double lr, muon_lr;
    works(TRAIN SCHEDULED "--dry-run=schedule");
    for (char *line = next_line(out); line; line = next_line(line)) {
        int read = sscanf(line, "%zu %zu %zu %zu %zu %zu %lf %lf\n", &number, &micro, &mean, &depth,
                          &n, &k, &lr, &muon_lr);
        if (!check(read == 8, "no line of a schedule: %.80s", line)) break;
        step++;
        bool in_order = number == step && step <= 12 && micro == 1;
        bool growing = depth >= deepest && depth <= 5 && depth <= mean && k <= depth;
        check(in_order && growing, "a schedule's step %zu: %.80s", step, line);
        const logged_step *logged = &log[step <= 12 ? step : 12];
        bool same =
            (double)mean == logged->mean && (double)n == logged->n && (double)k == logged->k;
        check(same && lr == logged->lr && muon_lr == logged->muon_lr,
              "step %zu is not what the log has: %.80s", step, line);
        deepest = depth;
    }
    check(step == 12 && deepest == 5, "%zu lines of 12 steps, the last of depth %zu", step,
          deepest);
}

static void schedule(void) {
    static logged_step log[13];
    works(TRAIN SCHEDULED "--out scheduled");
    read_log("scheduled", 12, 0, log);
    check_largest_draw(log);
    // 25·(7/25) is a little above 7 in floating point, and yet the depth begins with 7.
    works(TRAIN "--steps 4 --curriculum none --mean-recurrence 30 --backprop-depth 25 "
                "--depth-warmup 1 --depth-start 7 --dry-run=schedule | grep '^1 1 30 7 '");
    works(TRAIN "--steps 1 --fixed-recurrences 3,2 --depth-warmup 1 --dry-run=schedule | "
                "grep '^1 1 5 2 3 2 '");
    check_schedule(log);

    // Two micro-batches a step.
    static const size_t expected[6] = {2, 2, 3, 3, 4, 4};
    size_t depths[6] = {0}, count = 0;
    works(TRAIN "--steps 3 --curriculum none --mean-recurrence 6 --backprop-depth 5 "
                "--depth-warmup 1 --depth-start 2 --dry-run=schedule");
    for (char *line = next_line(out); line && count < 6; line = next_line(line)) {
        sscanf(line, "%*u %*u %*u %zu", &depths[count]);
        count++;
    }
    check(!memcmp(depths, expected, sizeof depths), "depths 2 + 3·t/3 rounded up are not 2 3 4: %s",
          out);
}

// ---- Samples -----------------------------------------------------------------------------------

// A sample is what infer makes of the same checkpoint.
static void check_sample(const char *directory, const char *line, const retrofit_json *step,
                         const retrofit_json *sample, const char *options) {
    const retrofit_json *prompt = retrofit_json_get(sample, "prompt");
    const retrofit_json *text = retrofit_json_get(sample, "text");
    const retrofit_json *r = retrofit_json_get(sample, "recurrences");
    bool whole = prompt && text && r && step;
    if (!check(whole, "%s: %.*s", directory, length_of(line), line)) return;
    works("infer --model %s/step_%08.0f --prompt '%s' --recurrences %.0f --max-tokens 5%s",
          directory, step->number, prompt->string, r->number, options);
    bool same = out_size == text->length + 1 && !memcmp(out, text->string, text->length);
    check(same, "a sample '%s', infer says '%s'", text->string, out);
}

// Samples stand in the log before the line that ends an evaluation: "val", or "sampled" where there
// is no validation.
static void check_samples(const char *directory, const char *end, const char *options) {
    char *text = read_log_file(directory, &(size_t){0});
    size_t found = 0, ends = 0;
    for (char *line = first_line(text); line; line = next_line(line)) {
        retrofit_json *j = retrofit_json_parse(line, strcspn(line, "\n"), directory);
        const retrofit_json *sample = retrofit_json_get(j, "sample");
        check(j != NULL, "%s: %s", directory, retrofit_error());
        if (retrofit_json_get(j, end)) {
            ends++;
            check(found == 12 * ends, "%s: %zu samples before the end of evaluation %zu", directory,
                  found, ends);
        }
        if (sample) {
            found++;
            check_sample(directory, line, retrofit_json_get(j, "step"), sample, options);
        }
        retrofit_json_free(j);
    }
    check(ends == 2, "%s: %zu evaluations of 2", directory, ends);
    free(text);
}

static void samples(void) {
    // To this model the start state matters, and it has more ids than the tokenizer.
    shell("mkdir loop && cp f/tiny/recurrent/* f/lookup/base/tokenizer* loop");
    shell("printf 'a=1 b=a | b\\n\\nc=2 \\nz\\nq=9 | q\\nx=y\\n7\\n' >prompts");
    const struct {
        const char *directory, *train_options, *end, *infer_options;
    } cases[] = {
        {"sampled.0", "--seed 7", "sampled", " --seed 7"},
        {"sampled.1", "--val two.bin --eval-rows 1 --state-init zero", "val", " --state-init zero"},
    };
    for (int i = 0; i < 2; i++) {
        char command[512];
        const char *directory = cases[i].directory;
        snprintf(command, sizeof command,
                 "train --model loop --data low.bin --seq-len 24 --micro-batch-size 2 --steps 2 "
                 "--sample-prompts prompts --sample-tokens 5 --eval-recurrences 3,1 "
                 "--eval-every 1 --save-every 1 --keep 9 --out %s %s",
                 directory, cases[i].train_options);
        works("%s", command);
        check_samples(directory, cases[i].end, cases[i].infer_options);
        // Without the line that ends them, samples are of a run that was stopped: the next one
        // makes them anew.
        works("cp %s/log.jsonl whole && sed -i '$d' %s/log.jsonl && %s --resume && "
              "cmp whole %s/log.jsonl",
              directory, directory, command, directory);
    }
}

// ---- Frozen parts ------------------------------------------------------------------------------

// What a dry run says of FLOPs is what the run's log has; and how many of the parameters Muon,
// AdamW (or ELLISAdam) and no optimizer have.
static void check_predictions(const char *options, const char *directory, retrofit_mode mode,
                              bool muon) {
    double flops = 0, paper_flops = 0, logged = last_of(directory, "\"flops\":");
    double paper_logged = last_of(directory, "\"paper_flops\":");
    works(TRAIN "--steps 4 %s --dry-run", options);
    char *training = strstr(out, "training "), *all = strstr(out, "\n  all ");
    if (training) sscanf(training, "training %lf FLOPs (%lf", &flops, &paper_flops);
    bool close = fabs(flops / logged - 1) < 6e-3 && fabs(paper_flops / paper_logged - 1) < 6e-3;
    check(close, "%s: %g FLOPs, the paper's %g, in the log %g and %g", directory, flops,
          paper_flops, logged, paper_logged);

    size_t by_muon = 0, by_other = 0, frozen = 0, said[3] = {0};
    double products = 0, said_products = 0; // FLOPs of Muon's in four steps
    char *more = strstr(out, "Muon takes ");
    if (more) sscanf(more, "Muon takes %lf", &said_products);
    retrofit_model *model = load("f/tiny/recurrent", mode);
    for (size_t i = 0; i < model->parameter_count; i++) {
        const retrofit_parameter *p = model->parameters[i];
        size_t count = p->rows * p->cols;
        double side = (double)retrofit_min(p->rows, p->cols);
        if (!p->grad) frozen += count;
        else if (!muon || p->kind != RETROFIT_MATRIX) by_other += count;
        else {
            by_muon += count;
            products += 4 * 5 * side * (3 * (double)count + side * side);
        }
    }
    retrofit_free(model);
    check(fabs(said_products - products) <= 6e-3 * products, "%s: Muon takes %g FLOPs, not %g",
          directory, said_products, products);
    if (all) sscanf(all, " all %zu %zu %zu", &said[0], &said[1], &said[2]);
    check(said[0] == by_muon && said[1] == by_other && said[2] == frozen,
          "%s: %zu, %zu, %zu parameters, not %zu, %zu, %zu", directory, said[0], said[1], said[2],
          by_muon, by_other, frozen);
    bool named = strstr(out, muon ? " by adamw " : " by ellisadam ");
    check(named && strstr(out, "read 1.60 times"),
          "%s: no optimizer's name, or another share of 10 rows: %s", directory, out);
    works(TRAIN "--steps 4 %s --flops %.0f --dry-run | "
                "grep 'ends after step 4 of 4, with %.3g FLOPs'",
          options, logged * 0.999, logged);
}

// What is frozen stays as it is, to the bit.
static void check_frozen(const char *directory, const char *trained, bool core) {
    retrofit_model *model = load(directory, RETROFIT_INFERENCE);
    retrofit_model *start = load("f/tiny/recurrent", RETROFIT_INFERENCE);
    for (size_t i = 0; i < model->parameter_count; i++) {
        const retrofit_parameter *p = model->parameters[i], *q = start->parameters[i];
        bool is_trained =
            p->part == RETROFIT_PART_ADAPTER || (core && p->part == RETROFIT_PART_CORE);
        bool moved = memcmp(p->weight.data, q->weight.data, p->rows * p->cols * sizeof(float)) != 0;
        check(moved == is_trained, "--train %s: %s moved, or did not", trained, p->source[0].name);
    }
    retrofit_free(model);
    retrofit_free(start);
}

static void frozen(void) {
    static const struct {
        const char *part, *whole, *halves;
        retrofit_mode mode;
    } cases[] = {
        {"adapter", "frozen.0", "halves.0", RETROFIT_TRAINING_ADAPTER},
        {"core", "frozen.1", "halves.1", RETROFIT_TRAINING_CORE},
    };
    for (int i = 0; i < 2; i++) {
        const char *part = cases[i].part, *whole = cases[i].whole, *halves = cases[i].halves;
        char options[32];
        snprintf(options, sizeof options, "--train %s", part);
        works(TRAIN "--steps 4 %s --out %s", options, whole);
        works(TRAIN "--steps 4 %s --out %s --flops 1 && " TRAIN "--steps 4 %s --out %s --resume",
              options, halves, options, halves);
        same_checkpoints(whole, halves);
        fails(1, "train was", TRAIN "--steps 4 --out %s --resume", halves);
        check_frozen(whole, part, cases[i].mode == RETROFIT_TRAINING_CORE);
        check_predictions(options, whole, cases[i].mode, true);
    }
    works(TRAIN "--steps 4 --optimizer ellisadam --out unfrozen");
    check_predictions("--optimizer ellisadam", "unfrozen", RETROFIT_TRAINING, false);
    double adapter = last_of("frozen.0", "\"flops\":"), core = last_of("frozen.1", "\"flops\":");
    check(adapter < core && core < last_of("unfrozen", "\"flops\":"),
          "what is frozen costs as much");
    fails(1, "depth-warmup was 0, is 0.5; --depth-start was 1, is 2",
          TRAIN "--steps 4 --optimizer ellisadam --out unfrozen --resume --depth-warmup .5 "
                "--depth-start 2");
}

// ---- Other models and data ---------------------------------------------------------------------

// Shards of another tokenizer are refused, for training and for validation.
static void other_tokenizers(void) {
#define LOOKUP "train --model f/lookup/base --seq-len 24 --micro-batch-size 2 --steps 1 "
    shell("echo '{\"text\":\"a=1 b=a | b1 \"}' >text.jsonl && for i in 1 2 3 4 5 6; do "
          "cat text.jsonl text.jsonl >more && mv more text.jsonl; done");
    works("convert --tokenize text.jsonl --tokenizer f/lookup/base --to ours.bin && "
          "convert --tokenize text.jsonl --tokenizer f/tokenizers/llama2_style --to theirs.bin");
    works(LOOKUP "--data ours.bin --out ours");
    works("cp -r f/lookup/base indented && chmod -R u+w indented && "
          "sed -i 's/^/ /' indented/tokenizer.json && "
          "! cmp -s indented/tokenizer.json f/lookup/base/tokenizer.json");
    works("train --model indented --data ours.bin --seq-len 24 --micro-batch-size 2 --steps 1 "
          "--dry-run");
    fails(1, "another tokenizer", LOOKUP "--data '[ot]*s.bin' --out bad");
    fails(1, "another tokenizer", LOOKUP "--data ours.bin --val theirs.bin --out bad");
    fails(1, "another tokenizer", LOOKUP "--data theirs.bin --dry-run");
}

static void nan_weight(void) {
    retrofit_map f;
    shell("cp -r f/tiny/recurrent nan");
    need(retrofit_safetensors_open(&f, "nan/model.safetensors"), "nan");
    const char *adapter = fixture(&f, "transformer.adapter.weight")->data;
    long offset = adapter - (const char *)f.base + 400;
    retrofit_safetensors_close(&f);
    // A NaN in fp32, little-endian.
    works("printf '\\000\\000\\300\\177' | "
          "dd of=nan/model.safetensors bs=1 seek=%ld conv=notrunc",
          offset);
    for (int i = 0; i < 2; i++)
        fails(1, "adapter.weight: number 100 is infinite or no number",
              "train --model nan --data rows.bin --seq-len 24 --micro-batch-size 2 --steps 2 "
              "--out bad%s",
              i ? " --train adapter" : "");
}

static void plain_stays_plain(void) {
    logged_step log[3];
    works(TRAIN_A "f/tiny/base --steps 2 --lr 1e-3 --val val.bin --out plain");
    check_checkpoint("plain", 2);
    read_log("plain", 2, 2, log);
    works("grep '\"val\":{\"0\":[0-9.]*}}' plain/log.jsonl"); // no recurrence, so no list of them
    works("cd plain/latest && grep LlamaForCausalLM config.json && "
          "grep '\"model_type\": \"llama\"' config.json && grep model.layers.7.mlp.gate model*");
    retrofit_model *start = load("f/tiny/base", RETROFIT_TRAINING);
    retrofit_model *trained = load("plain", RETROFIT_TRAINING);
    need(start->parameter_count == trained->parameter_count, "two plain models of a kind");
    for (size_t i = 0; i < start->parameter_count; i++) {
        const retrofit_parameter *p = start->parameters[i];
        double moved = relative_error(trained->parameters[i]->master, p->master, p->rows * p->cols);
        check(moved > 0 && moved < .1, "plain: %s moved by %g of its size in two steps",
              p->source[0].name, moved);
    }
    retrofit_free(start);
    retrofit_free(trained);
}

// The modelling code for Python lies beside a recurrent model whose config.json names it; training
// and rewriting carry both along, and a copy that is newer than the source's counts.
static void modelling_code(void) {
#define CODE   "modeling_retrofit.py"
#define NAMED  "'\"AutoModelForCausalLM\": \"modeling_retrofit.RavenForCausalLM\"'"
#define CUT    "convert --from f/tiny/base --prelude 0-1 --core 3-5 --coda 6-7 "
    shell("mkdir code newer && cp f/../../" CODE " code && "
          "sed '1s/$/ /' code/" CODE " >newer/" CODE);
    works(CUT "--to bare && grep raven_modeling_minimal_llama bare/config.json && "
              "! test -e bare/" CODE);
    works(CUT "--hf-code code/" CODE " --to coded && cmp code/" CODE " coded/" CODE " && "
              "grep " NAMED " coded/config.json && "
              "grep '\"AutoConfig\": \"modeling_retrofit.RavenConfig\"' coded/config.json && "
              "cmp bare/model.safetensors coded/model.safetensors");
    works(TRAIN_A "coded --steps 2 --out trained && cmp code/" CODE " trained/latest/" CODE " && "
                  "grep " NAMED " trained/latest/config.json");
    works("convert --from trained --to again --hf-code newer/" CODE " && "
          "cmp newer/" CODE " again/" CODE " && grep " NAMED " again/config.json && "
          "cmp trained/latest/model.safetensors again/model.safetensors");
    works("convert --random f/tiny/recurrent --hf-code code/" CODE " --to random && "
          "grep " NAMED " random/config.json");
    fails(2, "has the code of a plain one", "convert --from f/tiny/base --hf-code code/" CODE
                                            " --to bad");
    fails(2, "only retrofit's own " CODE, CUT "--hf-code rows.bin --to bad");
    fails(1, "no such file: it lies beside retrofit.h", CUT "--hf-code no/" CODE " --to bad");
    fails(2, "has the code of a plain one", "convert --random f/tiny/base --hf-code code/" CODE
                                            " --to bad");
    shell("mkdir -p folder/" CODE);
    fails(1, "folder/" CODE ": there is no such file", CUT "--hf-code folder/" CODE " --to bad");
}

// The authors' code for OLMo-2's blocks and for Llama's is carried along where it lies.
static void authors_code(void) {
    static const char *const models[] = {"tiny", "olmo2"}, *const kinds[] = {"llama", "olmo"};
    for (int i = 0; i < 2; i++) {
        char command[512];
        snprintf(command, sizeof command,
                 "rm -rf theirs ours && mkdir theirs && cp f/%s/recurrent/* theirs && "
                 "echo A >theirs/raven_config_minimal.py && "
                 "echo B >theirs/raven_modeling_minimal_%s.py", models[i], kinds[i]);
        shell(command);
        works("convert --from theirs --to ours && "
              "cmp theirs/raven_config_minimal.py ours/raven_config_minimal.py && "
              "cmp theirs/raven_modeling_minimal_%s.py ours/raven_modeling_minimal_%s.py && "
              "grep raven_modeling_minimal_%s.RavenForCausalLM ours/config.json", kinds[i],
              kinds[i], kinds[i]);
    }
}

// Two rows can be learnt by heart. Where a run ended before its first checkpoint, another may
// begin, with a log of its own.
static void learning(void) {
    static const char *const optimizers[] = {"adamw", "muon"};
    logged_step log[41];
    for (int i = 0; i < 2; i++) {
        shell("mkdir learns && echo '{\"step\":1,\"loss\":9}' >learns/log.jsonl");
        works("train --model f/tiny/recurrent --data two.bin --seq-len 24 --micro-batch-size 2 "
              "--steps 40 --lr 3e-3 --muon-lr .02 --optimizer %s --out learns",
              optimizers[i]);
        read_log("learns", 40, 0, log);
        double first = log[1].loss, last = log[40].loss;
        check(fabs(first - 4.9) < .5 && last < .75 * first,
              "40 steps on two rows: loss from %g to %g", first, last);
        shell("rm -r learns");
    }
}

// The losses of both programs of the same rows from the zero state, in batches of 4, 4 and 2. infer
// finds the latest checkpoint in train's directory, and the tokenizer that train has carried along;
// rows and start states too.
static void validation(void) {
    logged_step ten[2], three[2];
    double loss = 0;
    for (int rows = 3; rows <= 10; rows += 7)
        works(TRAIN "--steps 1 --micro-batch-size 4 --val held.bin --eval-rows %d "
                    "--eval-recurrences 2,5 --state-init zero --out val.%d",
              rows, rows);
    read_log("val.10", 1, 1, ten);
    read_log("val.3", 1, 1, three);
    works("infer --model val.10 --eval held.bin --recurrences 2");
    check(strstr(err, "note: --state-init zero, --seq-len 24: as the model was trained") != NULL,
          "infer --eval of a run: %s", err);
    sscanf(out, "%*[^\n] 2 %lf", &loss);
    check(fabs(loss - ten[1].validation) < 1e-4, "train's validation loss %g, infer's: %s",
          ten[1].validation, out);
    check(three[1].loss == ten[1].loss && three[1].validation != ten[1].validation,
          "--eval-rows 3 changes the run, or not the validation");
    works("train --model f/lookup/base --data low.bin --seq-len 24 --micro-batch-size 2 "
          "--steps 1 --out lookup");
    works("infer --model lookup --prompt 'a=1 b=a | b' --max-tokens 2");
}

// ---- infer -------------------------------------------------------------------------------------

// Some of a tokenizer's test cases, from stdin and as arguments.
static void tokens_printed(const char *style) {
    char path[256], expected[1 << 14];
    size_t size, i = 0;
    snprintf(path, sizeof path, "f/tokenizers/%s/cases.json", style);
    char *text = slurp(path, &size);
    retrofit_json *cases = retrofit_json_parse(text, size, path);
    need(cases != NULL, path);
    for (const retrofit_json *e = cases->child; e; e = e->next, i++) {
        const retrofit_json *prompt = retrofit_json_get(e, "text");
        const retrofit_json *ids = retrofit_json_get(e, "ids_with_special");
        if (i % 16 && i != 3) continue;
        expected[0] = 0;
        for (const retrofit_json *id = ids->child; id; id = id->next) {
            strcat(expected, id->string);
            if (id->next) strcat(expected, " ");
        }
        strcat(expected, "\n");
        write_bytes("prompt", prompt->string, prompt->length);
        works("infer --tokenizer f/tokenizers/%s --prompt - --print-tokens <prompt", style);
        check(!strcmp(out, expected), "%s, case %zu from stdin: '%s', not '%s'", style, i, out,
              expected);
        // $(…) would cut off a last line break, and an argument ends at a zero byte.
        if (prompt->length == 0 || prompt->string[prompt->length - 1] == '\n') continue;
        if (strlen(prompt->string) != prompt->length) continue;
        works("infer --tokenizer f/tokenizers/%s --prompt=\"$(cat prompt)\" --print-tokens", style);
        check(!strcmp(out, expected), "%s, case %zu as an argument: '%s', not '%s'", style, i, out,
              expected);
    }
    retrofit_json_free(cases);
    free(text);
}

static void authors_logits(const char *name) {
    static const size_t recurrences[] = {0, 1, 2, 4, 8}; // 0: the plain model
    char path[256], model[64], options[64] = "";
    retrofit_map f;
    snprintf(path, sizeof path, "f/%s/forward_backward.safetensors", name);
    need(retrofit_safetensors_open(&f, path), path);
    const int32_t *tokens = fixture(&f, "tokens")->data;
    for (int i = 0; i < 5; i++) {
        size_t r = recurrences[i];
        const retrofit_tensor *theirs =
            r ? fixture(&f, "zero.r%zu.logits", r) : fixture(&f, "base.logits");
        size_t T = theirs->shape[1], V = theirs->shape[2];
        snprintf(model, sizeof model, "f/%s/%s", name, r ? "recurrent" : "base");
        if (r) snprintf(options, sizeof options, "--state-init zero --recurrences %zu", r);
        float *logits = logits_of(model, tokens, T, V, options);
        double error = relative_error(logits, theirs->data, T * V);
        check(error < 1e-5, "%s, r=%zu: --logits differ from the authors' by %.1e", name, r, error);
        free(logits);
    }
    retrofit_safetensors_close(&f);
}

// The mean of -log p(ids[t+1]) over t < T.
static double loss_of(const float *logits, const int32_t *ids, size_t T, size_t V) {
    double loss = 0;
    for (size_t t = 0; t < T; t++) {
        const float *x = logits + t * V;
        double sum = 0;
        for (size_t v = 0; v < V; v++) sum += exp((double)x[v]);
        loss += (log(sum) - (double)x[ids[t + 1]]) / (double)T;
    }
    return loss;
}

// --eval's loss of one row is that of the logits of the same tokens.
static void losses(void) {
    enum { T = 24, V = 131 };
    int32_t ids[T + 1];
    uint16_t tokens[T + 1];
    char options[64], *shard = slurp("one.bin", &(size_t){0});
    size_t shown = 0, r = 1;
    memcpy(tokens, shard + 1024, sizeof tokens);
    for (size_t i = 0; i <= T; i++) ids[i] = tokens[i];
    works("infer --model f/tiny/recurrent --eval one.bin --seq-len 24 --recurrences 1,2,4 "
          "--state-init zero");
    char *table = strdup(out);
    for (char *line = next_line(table); line && r <= 4; line = next_line(line)) {
        double said = 0, perplexity = 0;
        snprintf(options, sizeof options, "--state-init zero --recurrences %zu", r);
        float *logits = logits_of("f/tiny/recurrent", ids, T, V, options);
        double loss = loss_of(logits, ids, T, V);
        free(logits);
        sscanf(line, " %zu %lf %lf", &shown, &said, &perplexity);
        bool close = fabs(said - loss) < 1e-4 && fabs(perplexity - exp(loss)) < 1e-3 * exp(loss);
        check(shown == r && close, "--eval, r=%zu: not %g: %s", r, loss, table);
        r *= 2;
    }
    check(shown == 4, "--eval shows: %s", table);
    free(shard);
    free(table);
}

// ---- Text --------------------------------------------------------------------------------------

// Whether two sets of options give the same text.
static void compare(bool same, const char *a, const char *b) {
    works(INFER "--recurrences 3 %s", a);
    char *text = strdup(out);
    works(INFER "--recurrences 3 %s", b);
    check(!strcmp(text, out) == same, "'%s' and '%s' give %s text: %s", a, b,
          same ? "another" : "the same", text);
    free(text);
}

// Greedy decoding with the KV cache, against the likeliest of the tokenizer's ids (the model has
// more) after ever more tokens without a cache.
static void greedy_decoding(const retrofit_tokenizer *tokenizer) {
    enum { V = 131 };
    size_t count, size, prompt_size, steps;
    char options[64];
    int32_t ids[64], *prompt = retrofit_encode(tokenizer, "a=1 b=a | b", 11, true, &count);
    memcpy(ids, prompt, count * sizeof *ids);
    free(prompt);
    free(retrofit_decode(tokenizer, ids, count, true, &prompt_size));
    for (steps = 0; steps < 6; steps++) {
        float *logits = logits_of("f/tiny/recurrent", ids, count, V, "--recurrences 3");
        float *last = logits + (count - 1) * V;
        ids[count] = retrofit_argmax(last, retrofit_tokenizer_size(tokenizer));
        free(logits);
        if (ids[count] == retrofit_tokenizer_eos(tokenizer)) break;
        count++;
    }
    char *text = retrofit_decode(tokenizer, ids, count, true, &size);
    need(text && steps > 2, "tokens to compare");
    snprintf(options, sizeof options, "--prompt 'a=1 b=a | b' --max-tokens %zu", steps);
    compare(true, options, options);
    size_t made = size - prompt_size;
    check(out_size == made + 1 && !strncmp(out, text + prompt_size, made),
          "greedy: '%s', the logits say '%s'", out, text + prompt_size);
    free(text);
}

// Prompts of 127 and 128 tokens, in a context of 128.
static void full_context(const retrofit_tokenizer *tokenizer) {
    char prompt[1024] = {0};
    size_t count = 0;
    while (count < 128) {
        strcat(prompt, " a");
        free(retrofit_encode(tokenizer, prompt, strlen(prompt), true, &count));
        if (count == 127) works(INFER "--prompt '%s' --max-tokens 18446744073709551615", prompt);
    }
    fails(1, "context 128", INFER "--prompt '%s'", prompt);
}

static void generation(void) {
    static const char argument[] = "--state-init zero --prompt 'a=1 b' --seed 3 --temperature 2";
    static const char seed_3[] = "--state-init zero --prompt - --seed 3 --temperature 2 <ab";
    static const char seed_4[] = "--state-init zero --prompt - --seed 4 --temperature 2 <ab";
    static const char greedy[] = "--prompt 'a=1 b' --max-tokens 9";
    static const char top_1[] = "--prompt 'a=1 b' --max-tokens 9 --temperature 2 --top-k 1";
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load("f/lookup/base");
    need(tokenizer != NULL, "f/lookup/base");
    greedy_decoding(tokenizer);
    write_bytes("ab", "a=1 b", 5);
    compare(true, argument, seed_3);
    compare(false, seed_3, seed_4);
    compare(true, greedy, top_1);
    works(INFER "--prompt 'a=1 b' --max-tokens 0");
    check(!strcmp(out, "\n"), "--max-tokens 0 writes '%s'", out);
    full_context(tokenizer);
    retrofit_tokenizer_free(tokenizer);
}

static void tasks(void) {
    works("infer --model f/lookup/base --tasks f/lookup/tasks.jsonl");
    check(strstr(out, " 0.608 ± ") && strstr(out, " 1.00 1.00 0.99 "),
          "--tasks: not 0.608, and 1.00 1.00 0.99 of 0, 1, 2 hops, but %s", out);
    // A wrong digit (right is 1), and then what the model itself writes after it: a wrong answer.
    shell("infer --model f/lookup/base --prompt 'a=1 b=a | b=2' --max-tokens 1 2>ls | "
          "sed 's/.*/{\"prompt\":\"a=1 b=a | b\",\"answer\":\"=2&\"}/' >answers");
    works("infer --model f/lookup/base --tasks answers");
    check(strstr(out, " 0.000 ± ") != NULL, "--tasks: an answer wrong at first is not wrong: %s",
          out);
}

// ---- Bad input ---------------------------------------------------------------------------------

static void bad_models(void) {
    static const struct {
        const char *what, *model;
    } models[] = {
        {"No such file", "missing"},
        {"truncated", "cut"},
        {"config.json", "empty"},
        {"config.json", "text"},
    };
    shell("mkdir cut empty text && cp f/tiny/recurrent/* cut && "
          "truncate -s -1000 cut/model.safetensors && echo '{' >text/config.json && echo >file");
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        const char *what = models[i].what, *model = models[i].model;
        fails(1, what, "train --model %s --data rows.bin --out bad/deep --steps 2 --seq-len 24",
              model);
        fails(1, what, "infer --model %s --tokens 1,2 --logits bad.safetensors", model);
    }
}

static void bad_shards(void) {
#define TRAIN_2 "train --model f/tiny/recurrent --out bad --steps 2 --seq-len 24 "
    static const struct {
        const char *what, *data;
        int32_t magic, version; // 0: no shard is written
        size_t promised, count;
    } shards[] = {
        {"no such file", "missing.bin", 0, 0, 0, 0},
        {"not a token shard: make one with convert --tokenize file ", "file", 0, 0, 0, 0},
        {"not a token shard: make one with convert --tokenize long.txt ", "long.txt", 0, 0, 0, 0},
        {"no token shard", "zeros", 0, 0, 0, 0},
        {"not a token shard", "magic.bin", 20240521, 1, 60, 60},
        {"not a token shard", "version.bin", 20240520, 2, 60, 60},
        {"truncated", "truncated.bin", 20240520, 1, 61, 60},
        {"fewer tokens", "short.bin", 20240520, 1, 20, 20},
        {"fewer tokens", "none.bin", 20240520, 1, 0, 0},
    };
    shell("seq 1000 >long.txt && head -c 100 /dev/zero >zeros");
    for (size_t i = 0; i < sizeof shards / sizeof *shards; i++) {
        const char *what = shards[i].what, *data = shards[i].data;
        if (shards[i].magic)
            write_shard(data, shards[i].magic, shards[i].version, shards[i].promised,
                        shards[i].count, 131, -1);
        fails(1, what, TRAIN_2 "--data %s", data);
        fails(1, what, TRAIN_2 "--data rows.bin --val %s", data);
        fails(1, what, "infer --model f/tiny/recurrent --eval %s --seq-len 24", data);
    }
    write_shard("beyond.bin", 20240520, 1, 60, 60, 131, 131);
    fails(1, "token 59 is 131, but the vocabulary has 131 entries",
          "train --model f/tiny/recurrent --data beyond.bin --out bad --steps 3 --seq-len 19 "
          "--micro-batch-size 2");
    fails(1, "vocabulary", "infer --model f/tiny/recurrent --eval beyond.bin --seq-len 19");
}

typedef struct {
    int code;
    const char *what, *options;
} bad_option;

static const bad_option bad_train[] = {
    {2, "--steps is needed", "--steps 0"},
    {2, "--steps", "--steps"},
    {2, "whole number", "--steps x"},
    {2, "--lr needs a number", "--lr x"},
    {2, "--lr -1", "--lr=-1"},
    {2, "--beta2", "--beta2 1"},
    {2, "adamw|muon", "--optimizer sgd"},
    {2, "adamw|muon", "--optimizer 'adamw|muon'"},
    {2, "not an option", "extra"},
    {2, "takes no value", "--shuffle=1"},
    {2, "did you mean --shuffle?", "--shufle"},
    {2, "did you mean --version?", "--versoin"},
    {2, "did you mean --help?", "--hepl"},
    {2, "did you mean --eval-every?", "--eval-evrey=3"},
    {2, "did you mean --batch-size?", "--batch 3"},
    {2, "unknown option --learning-rate (see", "--learning-rate 1"},
    {2, "multiple of --micro-batch-size 2", "--batch-size 3"},
    {2, "--micro-batch-size 0", "--micro-batch-size 0"},
    {2, "context of 128", "--seq-len 129"},
    {2, "--eval-rows", "--eval-rows 0"},
    {2, "--eval-recurrences", "--eval-recurrences 1,,2"},
    {2, "65536", "--mean-recurrence 65537"},
    {2, "--resume", "--resume"},
    {1, "--out file: not a directory", "--out file"},
    {1, "--out file: not a directory", "--out file --resume"},
    {1, "Not a directory", "--out file/below"},
    {2, "--depth-start 9", "--backprop-depth 8 --depth-start 9"},
    {2, "--depth-start 0", "--depth-start 0"},
    {2, "all|core|adapter", "--train coda"},
    {2, "neither", "--train core --model f/tiny/base"},
    {2, "--dry-run is one of schedule", "--dry-run=all"},
    {1, "No such file", "--sample-prompts missing"},
    {1, "tokenizer", "--sample-prompts file"},
    {1, "no prompt", "--model f/lookup/base --data low.bin --sample-prompts file"},
    {1, "does not hold",
     "--model f/lookup/base --data low.bin --sample-prompts prompts --sample-tokens 256"},
    {2, "at most", "--micro-batch-size 4611686018427387904"},
    {2, "at most", "--micro-batch-size 4611686018427387904 --dry-run"},
};

static const bad_option bad_infer[] = {
    {2, "--prompt is needed", ""},
    {2, "--prompt needs a value", "--prompt"},
    {2, "empty", "--prompt ''"},
    {2, "empty", "--prompt - </dev/null"},
    {2, "not an option", "--prompt a b"},
    {2, "did you mean --max-tokens?", "--prompt a --max-token 3"},
    {2, "--top-p", "--prompt a --top-p 0"},
    {2, "whole number", "--prompt a --max-tokens many"},
    {2, "--temperature", "--prompt a --temperature=-1"},
    {2, "one number", "--prompt a --recurrences 1,2"},
    {2, "positive numbers", "--prompt a --recurrences 0"},
    {2, "does not grow", "--eval one.bin --recurrences 1,4,2"},
    {2, "context of 128", "--eval one.bin --seq-len 129"},
    {2, "at a time", "--eval one.bin --tasks tasks"},
    {2, "none", "--model f/tiny/base --prompt a --recurrences 2"},
    {2, "none", "--model f/tiny/base --eval one.bin --seq-len 24 --recurrences 2"},
    {1, "vocabulary", "--tokens 1,131 --logits bad.st"},
    {1, "vocabulary", "--tokens 1,2147483647 --logits bad.st"},
    {2, "ids like", "--tokens '' --logits bad.st"},
    {2, "ids like", "--tokens 1, --logits bad.st"},
    {2, "ids like", "--tokens ,1 --logits bad.st"},
    {2, "ids like", "--tokens '1 2' --logits bad.st"},
    {2, "ids like", "--tokens 99999999999999999999 --logits bad.st"},
    {1, "context of 128", "--tokens $(seq -s , 1 130) --logits bad.st"},
    {1, "Not a directory", "--tokens 1 --logits file/bad"},
    {2, "--logits", "--prompt a --tokens 1,2"},
    {2, "--tokens", "--prompt a --tokens 1,2 --print-tokens"},
    {1, "tokenizer", "--tokenizer empty --prompt a"},
    {1, "vocabulary", "--tokenizer f/tokenizers/smollm_style --prompt a"},
    {1, "No such file", "--tasks missing"},
    {1, "no tasks", "--tasks /dev/null"},
    {1, "line 3", "--tasks tasks"},
};

static void bad_options(void) {
    for (size_t i = 0; i < sizeof bad_train / sizeof *bad_train; i++)
        fails(bad_train[i].code, bad_train[i].what,
              "train --model f/tiny/recurrent --data rows.bin --out bad --seq-len 24 "
              "--micro-batch-size 2 --steps 2 %s",
              bad_train[i].options);
    shell("printf '{\"prompt\":\"a=1 | a\",\"answer\":\"=1\"}\\n\\n{\"prompt\":\"a\"}\\n' >tasks");
    for (size_t i = 0; i < sizeof bad_infer / sizeof *bad_infer; i++)
        fails(bad_infer[i].code, bad_infer[i].what, INFER "%s", bad_infer[i].options);
    works("! " TRAIN "--steps 2 --batch-size 16777216 --micro-batch-size 16777216 --dry-run "
          ">dry 2>&1 && tail -n 1 dry | grep 'would fit'");
    fails(1, "--out file: not a directory", "train --out file --resume");
    fails(2, "--help", "train");
    fails(2, "--model is needed", "infer");
}

// --help goes to stdout alone, names options of every kind, and fits a terminal.
static void help(const char *program, const char *const *options) {
    works("%s --help && ! %s --help 2>&1 >ls | grep .", program, program);
    bool whole = true;
    for (size_t i = 0; options[i]; i++) whole = whole && strstr(out, options[i]);
    check(whole, "--help is not whole: %s", out);
    for (char *line = first_line(out); line; line = next_line(line))
        check(length_of(line) <= 120, "--help: %d wide: %.160s", length_of(line), line);
}

// ---- All of it ---------------------------------------------------------------------------------

static void write_shards(void) {
    static const struct {
        const char *name;
        size_t count, vocab;
    } shards[] = {
        {"rows.bin", 251, 131}, {"val.bin", 80, 131}, {"one.bin", 25, 131},
        {"two.bin", 50, 131},   {"low.bin", 50, 60},  {"held.bin", 252, 131},
    };
    for (size_t i = 0; i < sizeof shards / sizeof *shards; i++)
        write_shard(shards[i].name, 20240520, 1, shards[i].count, shards[i].count, shards[i].vocab,
                    -1);
}

int main(void) {
    static const char *const optimizers[] = {"muon", "adamw", "ellisadam"};
    static const char *const styles[] = {"llama2_style", "llama3_style", "smollm_style"};
    static const char *const models[] = {"tiny", "llama3", "head64", "olmo2"};
    static const char *const train_options[] = {
        "--model",  "--seed",       "--seq-len",           "--state-init",
        "--device", "--save-every", "--curriculum-warmup", "  --dry-run[=schedule] ",
        NULL};
    static const char *const infer_options[] = {"--model",      "--seed",   "--seq-len",
                                                "--state-init", "--device", "--print-tokens",
                                                "--min-p",      NULL};
    enter("programs");
    write_shards();
    for (int i = 0; i < 3; i++) {
        runs(optimizers[i]);
        continues(optimizers[i]);
    }
    works(TRAIN "--steps 6 --shuffle --optimizer adamw --throttle --out throttled && "
                "! cmp -s throttled/latest/model.safetensors adamw.a/latest/model.safetensors");
    schedule();
    samples();
    frozen();
    other_tokenizers();
    nan_weight();
    plain_stays_plain();
    modelling_code();
    authors_code();
    learning();
    validation();

    for (int i = 0; i < 3; i++) {
        tokens_printed(styles[i]);
        authors_logits(models[i]);
    }
    losses();
    generation();
    tasks();

    bad_models();
    bad_shards();
    bad_options();
    help("train", train_options);
    help("infer", infer_options);
    return leave("programs");
}

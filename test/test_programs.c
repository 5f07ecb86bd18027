// train and infer, run as a user would: runs stopped and continued, logits and losses against the authors' and each other, and bad input.
#include "run.h"
#include <spawn.h>

// A token shard: `promised` tokens by its header, `count` in it, the last of them `last` (if not negative).
static void shard_of(const char *path, int32_t magic, int32_t version, size_t promised, size_t count, size_t vocab, int last) {
    int32_t header[256] = {magic, version, (int32_t)promised};
    uint16_t tokens[256];
    char bytes[sizeof header + sizeof tokens];
    for (size_t i = 0; i < count; i++) tokens[i] = (uint16_t)(i + 1 == count && last >= 0 ? (size_t)last : retrofit_hash(7, i) % vocab);
    memcpy(bytes, header, sizeof header), memcpy(bytes + sizeof header, tokens, count * 2);
    write_bytes(path, bytes, sizeof header + count * 2);
}

static void same_bits(const char *a, const char *b) {
    works("cmp %s/latest/model.safetensors %s/latest/model.safetensors && cmp %s/latest/optimizer.safetensors %s/latest/optimizer.safetensors", a, b, a, b);
}

// ---- train -------------------------------------------------------------------------------------------------------------------
#define TRAIN "train --seq-len 24 --micro-batch-size 2 --batch-size 4 --data rows.bin --model f/tiny/"

// OUT holds the last checkpoint, the link to it, the log, and nothing else; and the checkpoint loads.
static void check_checkpoint(const char *dir, size_t steps) {
    char expected[160];
    snprintf(expected, sizeof expected, "step_%08zu\nlatest\nlog.jsonl\nstep_%08zu\nconfig.json\nmanifest.json\nmodel.safetensors\noptimizer.safetensors\n", steps,
             steps);
    works("readlink %s/latest && ls -A %s && ls -A %s/latest/", dir, dir, dir);
    check(!strcmp(out, expected), "%s holds %s instead of %s", dir, out, expected);
    retrofit_model *m = retrofit_load(dir, &retrofit_cpu, RETROFIT_TRAINING);
    check(m != NULL, "%s does not load: %s", dir, retrofit_error()), retrofit_free(m);
}

typedef struct { double loss, norm, mean, n, k, lr, muon_lr, validation; } logged; // validation: at 2 recurrences; a plain model's

// Every step exactly once and in order, validations behind their steps, all numbers finite. log[1..steps].
static void read_log(const char *dir, size_t steps, size_t every, logged *log) {
    static const char *const keys[] = {"loss", "grad_norm", "mean_recurrence", "n", "k", "lr", "muon_lr"};
    char path[256];
    size_t size, step = 0, validations = 0;
    snprintf(path, sizeof path, "%s/log.jsonl", dir);
    memset(log, 0, (steps + 1) * sizeof *log);
    char *text = slurp(path, &size), *end;
    check(size && text[size - 1] == '\n', "%s: ends within a line", path);
    for (char *line = text; (end = strchr(line, '\n')); line = end + 1) {
        retrofit_json *j = retrofit_json_parse(line, (size_t)(end - line), path);
        const retrofit_json *at = retrofit_json_get(j, "step"), *val = retrofit_json_get(j, "val"), *e;
        if (!check(j && at, "%s: '%.*s': %s", path, (int)(end - line), line, retrofit_error())) continue;
        step += !val;
        check(at->number == (double)step && step <= steps, "%s: step %g where %zu is due of %zu", path, at->number, step, steps);
        for (e = (val ? val : j)->child; e; e = e->next)
            if (e->type == RETROFIT_JSON_ARRAY) // of the states s_n .. s_{n+k}; a plain model has none
                for (const retrofit_json *x = e->child; x; x = x->next)
                    check(x->type == RETROFIT_JSON_NUMBER && x->number >= 0 && isfinite(x->number), "%s: step %zu: %s holds no number", path, step, e->key);
            else check(e->type == RETROFIT_JSON_NUMBER && isfinite(e->number), "%s: step %zu: %s is no number", path, step, e->key);
        if (val && step <= steps) validations++, log[step].validation = ((e = retrofit_json_get(val, "2")) ? e : val->child)->number;
        for (size_t i = 0; !val && step <= steps && i < 7; i++)
            if (check((e = retrofit_json_get(j, keys[i])) != NULL, "%s: step %zu: no %s", path, step, keys[i])) (&log[step].loss)[i] = e->number;
        const retrofit_json *states = retrofit_json_get(j, "state_rms"), *k = retrofit_json_get(j, "k");
        if (!val && k) check(states && states->count == (k->number > 0 ? (size_t)k->number + 1 : 0), "%s: step %zu: sizes of %zu states", path, step, states ? states->count : 0);
        retrofit_json_free(j);
    }
    every = every ? (steps + every - 1) / every : 0;
    check(step == steps && validations == every, "%s: %zu steps, not %zu; %zu validations, not %zu", path, step, steps, validations, every);
    free(text);
}

// A run, the same with two threads, and with another seed: a seed's bits are its own. What a dry run says is what happens.
static void runs(const char *optimizer) {
    logged log[7];
    char a[32], b[64], name[32], *end;
    snprintf(a, sizeof a, "%s.a", optimizer), snprintf(b, sizeof b, "deep/%s", a);
    works(TRAIN "recurrent --steps 6 --shuffle --optimizer %s --out %s", optimizer, a);
    check(out_size == 0, "train writes to stdout: %s", out);
    check_checkpoint(a, 6), read_log(a, 6, 0, log);
    works("OMP_NUM_THREADS=2 " TRAIN "recurrent --steps 6 --shuffle --optimizer %s --out %s", optimizer, b);
    same_bits(a, b);
    works(TRAIN "recurrent --steps 6 --shuffle --optimizer %s --out %s.2 --seed 2 && ! cmp %s.2/latest/model.safetensors %s/latest/model.safetensors",
          optimizer, a, a, a);
    works(TRAIN "recurrent --steps 6 --optimizer %s --dry-run --out unmade && ! test -e unmade", optimizer);
    check(strstr(out, "weights ") && strstr(out, "gradients ") && strstr(out, "optimizer ") && strstr(out, "activations ") && strstr(out, "FLOPs"),
          "--dry-run does not tell memory and FLOPs: %s", out);
    size_t sum = 0, all = 0, number, steps = 0, count = 0, mean, n, k;
    double lr, muon;
    char *memory = strstr(out, "memory on "), *line = out;
    retrofit_map f;
    need(retrofit_safetensors_open(&f, "f/tiny/recurrent/model.safetensors"), "tiny");
    for (size_t i = 0; i < f.count; i++) count += f.tensors[i].count;
    retrofit_safetensors_close(&f);
    for (; memory && line < memory && (end = strchr(line, '\n')); line = end + 1) // "  final norm   32"
        if (sscanf(line, " %31[a-z ] %zu %zu %zu\n", name, &number, &n, &k) == 4)
            strncmp(name, "all", 3) ? (sum += number + n + k) : (all = number + n + k);
    for (line = strstr(out, "   step"); line && (line = strchr(line, '\n')) && line[1]; line++)
        if (sscanf(line, "%zu %zu %*u %lf %lf %*u,%*u %zu,%zu", &number, &mean, &lr, &muon, &n, &k) == 6 && number == ++steps && number <= 6)
            check((double)mean == log[number].mean && (double)n == log[number].n && (double)k == log[number].k &&
                      fabs(lr - log[number].lr) < 1e-4 * lr && fabs(muon - log[number].muon_lr) <= 1e-4 * muon,
                  "%s: --dry-run's step %zu is not what the log has: %.80s", a, number, line);
    check(steps == 6 && sum == count && all == count, "--dry-run: %zu of 6 steps, %zu parameters, 'all' is %zu, the file has %zu", steps, sum, all, count);
    check(!strcmp(optimizer, "muon") == (log[3].muon_lr > 0), "%s: muon_lr is %g", a, log[3].muon_lr);
}

// Starts a command and kills it once OUT/latest has come to `step`; false if it went on to its end, or nearly.
static bool killed_at(const char *command, const char *dir, size_t step) {
    char line[1024], link[256], to[64] = {0};
    snprintf(line, sizeof line, "exec %s --out %s 2>stderr", command, dir), snprintf(link, sizeof link, "%s/latest", dir);
    char *arguments[] = {(char *)"sh", (char *)"-c", line, NULL};
    int status;
    size_t at = 0;
    pid_t child;
    need(posix_spawn(&child, "/bin/sh", NULL, NULL, arguments, environ) == 0, "posix_spawn");
    for (double begin = retrofit_seconds(); at < step && retrofit_seconds() - begin < 60; usleep(100)) {
        if (waitpid(child, &status, WNOHANG) == child) return false;
        if (readlink(link, to, sizeof to - 1) > 0) sscanf(to, "step_%zu", &at);
    }
    kill(child, SIGKILL), waitpid(child, &status, 0);
    return WIFSIGNALED(status) && readlink(link, to, sizeof to - 1) > 0 && sscanf(to, "step_%zu", &at) == 1 && at < 20;
}

static void continues(const char *optimizer) {
    logged log[25], whole[25];
    char command[512], dir[32], through[32], line[512];
    snprintf(command, sizeof command, TRAIN "recurrent --steps 24 --shuffle --save-every 2 --val val.bin --eval-every 2 --optimizer %s", optimizer);
    snprintf(dir, sizeof dir, "%s.killed", optimizer), snprintf(through, sizeof through, "%s.through", optimizer);
    works("%s --out %s", command, through);
    check_checkpoint(through, 24), read_log(through, 24, 2, whole);
    for (int i = 0; shell("rm -rf *.killed"), !killed_at(command, dir, 4); i++) need(i < 20, "a run to kill");
    // What a kill at a worse moment leaves: half a line, half a checkpoint, one not yet linked to, the one before.
    snprintf(line, sizeof line, "cd %s && printf '{\"step\":23,\"loss\":5}\\n{\"step\":24,\"lo' >>log.jsonl && for d in step_00000001 step_00000006.tmp-1 "
             "step_00000022; do mkdir $d && cp ../f/tiny/base/* $d; done", dir);
    shell(line);
    fails(2, "--resume", "%s --out %s", command, dir);
    static const struct { const char *name, *change; } changes[] = {
        {"steps", "--steps 25"}, {"lr", "--lr 1e-4"}, {"seed", "--seed 2"}, {"curriculum", "--curriculum none"}, {"seq-len", "--seq-len 23"},
        {"micro-batch-size", "--micro-batch-size 4"}, {"mean-recurrence", "--mean-recurrence 7"}, {"optimizer", "--optimizer "}};
    for (size_t i = 0; i < 8; i++) {
        fails(1, changes[i].name, "%s --out %s --resume %s%s", command, dir, changes[i].change, i < 7 ? "" : *optimizer == 'm' ? "adamw" : "muon");
        check(!strstr(err, "clip"), "--resume %s names options that were not changed: %s", changes[i].change, err);
    }
    for (int again = 0; again < 2; again++) { // the second time nothing is left to do
        works("%s --out %s --resume", command, dir);
        check_checkpoint(dir, 24), read_log(dir, 24, 2, log), same_bits(dir, through);
    }
    for (size_t i = 1; i <= 24; i++)
        check(log[i].loss == whole[i].loss && log[i].validation == whole[i].validation, "%s: step %zu: another loss than in one go", dir, i);
}

// The whole schedule, micro-batch by micro-batch, is what the log says of one per step; the depth grows from its start.
static void schedule(void) {
    static logged log[13];
    const char *options = "recurrent --batch-size 2 --steps 12 --mean-recurrence 6 --backprop-depth 5 --depth-warmup .5 --depth-start 2";
    works(TRAIN "%s --out scheduled", options), read_log("scheduled", 12, 0, log);
    size_t most = 0, at = 0, said[2] = {0};
    for (size_t i = 1; i <= 12; i++)
        if (log[i].n + log[i].k > (double)most) most = (size_t)(log[i].n + log[i].k), at = i;
    works(TRAIN "%s --dry-run", options);
    char *largest_draw = strstr(out, "the largest draw");
    check(largest_draw && sscanf(largest_draw, "the largest draw is %zu recurrences, in step %zu", &said[0], &said[1]) == 2 &&
              said[0] == most && said[1] == at,
          "the largest draw is %zu in step %zu, not %zu in %zu", most, at, said[0], said[1]);
    works(
        TRAIN
        "recurrent --steps 4 --curriculum none --mean-recurrence 30 --backprop-depth 25 --depth-warmup 1 --depth-start 7 --dry-run=schedule | grep '^1 1 30 7 '"); // 25·(7/25) > 7
    works(TRAIN "recurrent --steps 1 --fixed-recurrences 3,2 --depth-warmup 1 --dry-run=schedule | grep '^1 1 5 2 3 2 '");
    works(TRAIN "%s --dry-run=schedule", options);
    size_t step = 0, number, micro, mean, depth, n, k, deepest = 0, lines = 0;
    double lr, muon;
    for (char *line = out; (line = strchr(line, '\n')) && *++line; lines++) {
        if (!check(sscanf(line, "%zu %zu %zu %zu %zu %zu %lf %lf\n", &number, &micro, &mean, &depth, &n, &k, &lr, &muon) == 8,
                   "no line of a schedule: %.80s", line))
            break;
        step++;
        check(number == step && step <= 12 && micro == 1 && depth >= deepest && depth <= 5 && depth <= mean && k <= depth,
              "a schedule's step %zu: %.80s", step, line);
        check(step > 12 || ((double)mean == log[step].mean && (double)n == log[step].n && (double)k == log[step].k && lr == log[step].lr &&
                            muon == log[step].muon_lr),
              "step %zu is not what the log has: %.80s", step, line);
        deepest = depth;
    }
    check(lines == 12 && deepest == 5, "%zu lines of 12 steps, the last of depth %zu", lines, deepest);
    works(
        TRAIN
        "recurrent --steps 3 --curriculum none --mean-recurrence 6 --backprop-depth 5 --depth-warmup 1 --depth-start 2 --dry-run=schedule");
    size_t depths[6], i = 0;
    for (char *line = out; i < 6 && (line = strchr(line, '\n')) && *++line; i++) sscanf(line, "%*u %*u %*u %zu", &depths[i]);
    check(i == 6 && depths[0] == 2 && depths[1] == 2 && depths[2] == 3 && depths[3] == 3 && depths[4] == 4 && depths[5] == 4,
          "depths 2 + 3·t/3 rounded up are not 2 3 4: %s", out);
}

// Samples stand in the log before the line that ends them, and are what infer makes of the same checkpoint.
static void sampled(void) {
    shell(
        "mkdir loop && cp f/tiny/recurrent/* f/lookup/base/tokenizer* loop"); // to this model the start state matters, and it has more ids
    shell("printf 'a=1 b=a | b\\n\\nc=2 \\nz\\nq=9 | q\\nx=y\\n7\\n' >prompts");
    const char *command =
        "train --model loop --data low.bin --seq-len 24 --micro-batch-size 2 --steps 2 --sample-prompts prompts --sample-tokens 5 --eval-recurrences 3,1 "
        "--eval-every 1 --save-every 1 --keep 9";
    for (int val = 0; val < 2; val++) {
        char dir[32];
        size_t size, found = 0, ends = 0;
        snprintf(dir, sizeof dir, "sampled.%d", val);
        const char *more = val ? " --val low.bin --eval-rows 1 --state-init zero" : " --seed 7";
        works("%s --out %s%s", command, dir, more);
        char *path = val ? (char *)"sampled.1/log.jsonl" : (char *)"sampled.0/log.jsonl", *text = slurp(path, &size), *end;
        for (char *line = text; (end = strchr(line, '\n')); line = end + 1) {
            retrofit_json *j = retrofit_json_parse(line, (size_t)(end - line), path);
            const retrofit_json *s = retrofit_json_get(j, "sample"), *step = retrofit_json_get(j, "step"),
                                *p = retrofit_json_get(s, "prompt"), *t = retrofit_json_get(s, "text"),
                                *r = retrofit_json_get(s, "recurrences");
            check(j != NULL, "%s: %s", path, retrofit_error());
            if (retrofit_json_get(j, val ? "val" : "sampled"))
                ends++, check(found == 12 * ends, "%s: %zu samples before the end of evaluation %zu", path, found, ends);
            if (s && check(p && t && r && step, "%s: %.*s", path, (int)(end - line), line)) {
                found++;
                works("infer --model %s/step_%08.0f --prompt '%s' --recurrences %.0f --max-tokens 5%s", dir, step->number, p->string,
                      r->number, val ? " --state-init zero" : " --seed 7");
                check(out_size == t->length + 1 && !memcmp(out, t->string, t->length), "a sample '%s', infer says '%s'", t->string, out);
            }
            retrofit_json_free(j);
        }
        free(text), check(ends == 2, "%s: %zu evaluations of 2", path, ends);
        // Without the line that ends them, samples are of a run that was stopped: the next one makes them anew.
        works("cp %s/log.jsonl whole && sed -i '$d' %s/log.jsonl && %s --out %s%s --resume && cmp whole %s/log.jsonl", dir, dir, command,
              dir, more, dir);
    }
}

// The last number behind a key in a log.
static double last_of(const char *dir, const char *key) {
    char path[256];
    snprintf(path, sizeof path, "%s/log.jsonl", dir);
    char *text = slurp(path, &(size_t){0}), *at = text, *found = NULL;
    while ((at = strstr(at, key))) found = at += strlen(key);
    double x = found ? strtod(found, NULL) : -1;
    return free(text), x;
}

// What a dry run says of FLOPs is what the run has then; and which optimizer has how many of the parameters.
static void foretold(const char *options, const char *dir, retrofit_mode mode, bool muon) {
    works(TRAIN "recurrent --steps 4 %s --dry-run", options);
    double flops = 0, paper = 0;
    size_t in[3] = {0}, said[3] = {0};
    char *training = strstr(out, "training "), *all = strstr(out, "\n  all ");
    bool both = training && sscanf(training, "training %lf FLOPs (%lf", &flops, &paper) == 2;
    check(both && fabs(flops / last_of(dir, "\"flops\":") - 1) < 6e-3 && fabs(paper / last_of(dir, "\"paper_flops\":") - 1) < 6e-3,
          "%s: %g FLOPs, the paper's %g, in the log %g and %g", dir, flops, paper, last_of(dir, "\"flops\":"),
          last_of(dir, "\"paper_flops\":"));
    retrofit_model *m = retrofit_load("f/tiny/recurrent", &retrofit_cpu, mode);
    need(m != NULL, "tiny");
    for (size_t i = 0; i < m->parameter_count; i++) {
        const retrofit_parameter *p = m->parameters[i];
        in[!p->grad ? 2 : muon && p->kind == RETROFIT_MATRIX ? 0 : 1] += p->rows * p->cols;
    }
    if (all) sscanf(all, " all %zu %zu %zu", &said[0], &said[1], &said[2]);
    check(!memcmp(in, said, sizeof in), "%s: %zu, %zu, %zu parameters, not %zu, %zu, %zu", dir,
          said[0], said[1], said[2], in[0], in[1], in[2]);
    check(strstr(out, muon ? " by adamw " : " by ellisadam ") && strstr(out, "read 1.60 times"),
          "%s: no optimizer's name, or another share of 10 rows: %s", dir, out);
    works(TRAIN "recurrent --steps 4 %s --flops %.0f --dry-run | grep 'ends after step 4 of 4, with %.3g FLOPs'", options,
          last_of(dir, "\"flops\":") * 0.999, last_of(dir, "\"flops\":"));
    retrofit_free(m);
}

// What is frozen stays as it is, to the bit; the checkpoint goes on; another --train is another run.
static void frozen(void) {
    static const char *const trained[] = {"adapter", "core"};
    for (int i = 0; i < 2; i++) {
        works(TRAIN "recurrent --steps 4 --train %s --out frozen.%d", trained[i], i);
        works(TRAIN "recurrent --steps 4 --train %s --out halves.%d --flops 1 && " TRAIN
                    "recurrent --steps 4 --train %s --out halves.%d --resume",
              trained[i], i, trained[i], i);
        char a[32], b[32];
        snprintf(a, sizeof a, "frozen.%d", i), snprintf(b, sizeof b, "halves.%d", i), same_bits(a, b);
        fails(1, "train was", TRAIN "recurrent --steps 4 --out halves.%d --resume", i);
        retrofit_model *m = retrofit_load(a, &retrofit_cpu, RETROFIT_INFERENCE),
                       *before = retrofit_load("f/tiny/recurrent", &retrofit_cpu, RETROFIT_INFERENCE);
        need(m && before, "a frozen model");
        for (size_t j = 0; j < m->parameter_count; j++) {
            const retrofit_parameter *p = m->parameters[j];
            bool moves = p->part == RETROFIT_PART_ADAPTER || (i && p->part == RETROFIT_PART_CORE);
            check(moves == (memcmp(p->weight.data, before->parameters[j]->weight.data, p->rows * p->cols * 4) != 0),
                  "--train %s: %s moved, or did not", trained[i], p->source[0].name);
        }
        retrofit_free(m), retrofit_free(before);
        foretold(i ? "--train core" : "--train adapter", a, i ? RETROFIT_TRAINING_CORE : RETROFIT_TRAINING_ADAPTER, true);
    }
    works(TRAIN "recurrent --steps 4 --optimizer ellisadam --out unfrozen"),
        foretold("--optimizer ellisadam", "unfrozen", RETROFIT_TRAINING, false);
    check(last_of("frozen.0", "\"flops\":") < last_of("frozen.1", "\"flops\":") &&
              last_of("frozen.1", "\"flops\":") < last_of("unfrozen", "\"flops\":"),
          "what is frozen costs as much");
    fails(1, "depth-warmup was 0, is 0.5; --depth-start was 1, is 2",
          TRAIN "recurrent --steps 4 --optimizer ellisadam --out unfrozen --resume --depth-warmup .5 --depth-start 2");
}

// Shards of another tokenizer are refused, for training and validation.
static void other_tokenizers(void) {
    shell(
        "echo '{\"text\":\"a=1 b=a | b1 \"}' >text.jsonl && for i in 1 2 3 4 5 6; do cat text.jsonl text.jsonl >more && mv more text.jsonl; done");
    works(
        "convert --tokenize text.jsonl --tokenizer f/lookup/base --to ours.bin && convert --tokenize text.jsonl --tokenizer f/tokenizers/llama2_style --to theirs.bin");
    works("train --model f/lookup/base --data ours.bin --seq-len 24 --micro-batch-size 2 --steps 1 --out ours");
    works(
        "cp -r f/lookup/base indented && chmod -R u+w indented && sed -i 's/^/ /' indented/tokenizer.json && ! cmp -s indented/tokenizer.json f/lookup/base/tokenizer.json");
    works("train --model indented --data ours.bin --seq-len 24 --micro-batch-size 2 --steps 1 --dry-run");
    fails(1, "another tokenizer", "train --model f/lookup/base --data '[ot]*s.bin' --seq-len 24 --micro-batch-size 2 --steps 1 --out bad");
    fails(1, "another tokenizer",
          "train --model f/lookup/base --data ours.bin --val theirs.bin --seq-len 24 --micro-batch-size 2 --steps 1 --out bad");
    fails(1, "another tokenizer", "train --model f/lookup/base --data theirs.bin --seq-len 24 --micro-batch-size 2 --steps 1 --dry-run");
}

static void nan_weight(void) {
    retrofit_map f;
    shell("cp -r f/tiny/recurrent nan");
    need(retrofit_safetensors_open(&f, "nan/model.safetensors"), "nan");
    long at = (const char *)fixture(&f, "transformer.adapter.weight")->data - (const char *)f.base + 400;
    retrofit_safetensors_close(&f);
    works("printf '\\000\\000\\300\\177' | dd of=nan/model.safetensors bs=1 seek=%ld conv=notrunc", at); // a NaN, little-endian
    for (int frozen = 0; frozen < 2; frozen++)
        fails(MIDWAY, "nan", "train --model nan --data rows.bin --seq-len 24 --micro-batch-size 2 --steps 2 --out bad%s",
              frozen ? " --train adapter" : "");
}

static void plain_stays_plain(void) {
    logged log[3];
    works(TRAIN "base --steps 2 --lr 1e-3 --val val.bin --out plain");
    check_checkpoint("plain", 2), read_log("plain", 2, 2, log);
    works("grep '\"val\":{\"0\":[0-9.]*}}' plain/log.jsonl"); // no recurrence, so no list of them
    works("cd plain/latest && grep LlamaForCausalLM config.json && grep '\"model_type\": \"llama\"' config.json && grep model.layers.7.mlp.gate model*");
    retrofit_model *a = retrofit_load("f/tiny/base", &retrofit_cpu, RETROFIT_TRAINING), *b = retrofit_load("plain", &retrofit_cpu, RETROFIT_TRAINING);
    need(a && b && a->parameter_count == b->parameter_count, "two plain models of a kind");
    for (size_t i = 0; i < a->parameter_count; i++) {
        double moved = relative_error(b->parameters[i]->master, a->parameters[i]->master, a->parameters[i]->rows * a->parameters[i]->cols);
        check(moved > 0 && moved < .1, "plain: %s moved by %g of its size in two steps", a->parameters[i]->source[0].name, moved);
    }
    retrofit_free(a), retrofit_free(b);
}

static void learning(void) {
    logged log[41], three[2];
    double loss = 0;
    // Two rows can be learnt by heart; and where a run ended before its first checkpoint, another may begin, with a log of its own.
    for (int muon = 0; muon < 2; muon++) {
        shell("mkdir learns && echo '{\"step\":1,\"loss\":9}' >learns/log.jsonl");
        works("train --model f/tiny/recurrent --data two.bin --seq-len 24 --micro-batch-size 2 --steps 40 --lr 3e-3 --muon-lr .02 --optimizer %s "
              "--out learns", muon ? "muon" : "adamw");
        read_log("learns", 40, 0, log);
        check(fabs(log[1].loss - 4.9) < .5 && log[40].loss < .75 * log[1].loss, "40 steps on two rows: loss from %g to %g", log[1].loss, log[40].loss);
        shell("rm -r learns");
    }
    // Both programs' losses of the same rows from the zero state, in batches of 4, 4 and 2; the latest checkpoint is found under OUT.
    for (int rows = 3; rows <= 10; rows += 7)
        works(TRAIN "recurrent --steps 1 --micro-batch-size 4 --val rows.bin --eval-rows %d --eval-recurrences 2,5 --state-init zero --out val.%d", rows, rows);
    read_log("val.10", 1, 1, log), read_log("val.3", 1, 1, three);
    works("infer --model val.10 --eval rows.bin --seq-len 24 --recurrences 2 --state-init zero");
    sscanf(out, "%*[^\n] 2 %lf", &loss);
    check(fabs(loss - log[1].validation) < 1e-4, "train's validation loss %g, infer's: %s", log[1].validation, out);
    check(three[1].loss == log[1].loss && three[1].validation != log[1].validation, "--eval-rows 3 changes the run, or not the validation");
    works("train --model f/lookup/base --data low.bin --seq-len 24 --micro-batch-size 2 --steps 1 --out lookup");
    works("infer --model lookup --prompt 'a=1 b=a | b' --max-tokens 2"); // the tokenizer has travelled with the model
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
        check(!strcmp(out, expected), "%s, case %zu as an argument: '%s', not '%s'", style, i, out, expected);
    }
    retrofit_json_free(cases), free(text);
}

static void authors_logits(const char *name) {
    char path[256], model[64], options[64];
    retrofit_map f;
    snprintf(path, sizeof path, "f/%s/forward_backward.safetensors", name);
    need(retrofit_safetensors_open(&f, path), path);
    const int32_t *tokens = (const int32_t *)fixture(&f, "tokens")->data;
    for (size_t r = 0; r <= 8; r += r ? r : 1) { // 0: the plain model
        const retrofit_tensor *theirs = r ? fixture(&f, "zero.r%zu.logits", r) : fixture(&f, "base.logits");
        size_t T = theirs->shape[1], V = theirs->shape[2];
        snprintf(model, sizeof model, "f/%s/%s", name, r ? "recurrent" : "base"),
            snprintf(options, sizeof options, "--state-init zero --recurrences %zu", r);
        float *logits = logits_of(model, tokens, T, V, r ? options : "");
        double error = relative_error(logits, (const float *)theirs->data, T * V);
        check(error < 1e-5, "%s, r=%zu: --logits differ from the authors' by %.1e", name, r, error);
        free(logits);
    }
    retrofit_safetensors_close(&f);
}

// --eval's loss of one row, from the logits of the same tokens.
static void losses(void) {
    works("infer --model f/tiny/recurrent --eval one.bin --seq-len 24 --recurrences 1,2,4 --state-init zero");
    size_t V = 131, T = 24, shown = 0;
    char *table = strdup(out), *line = strchr(table, '\n'), *shard = slurp("one.bin", &(size_t){0}), options[64];
    for (size_t r = 1; line && r <= 4; r *= 2, line = strchr(line + 1, '\n')) {
        int32_t ids[25];
        for (size_t i = 0; i <= T; i++) ids[i] = ((uint16_t *)(void *)(shard + 1024))[i];
        snprintf(options, sizeof options, "--state-init zero --recurrences %zu", r);
        float *x = logits_of("f/tiny/recurrent", ids, T, V, options);
        double loss = 0, theirs = 0, perplexity = 0, sum = 0;
        for (size_t t = 0; t < T; t++, sum = 0) {
            for (size_t v = 0; v < V; v++) sum += exp((double)x[t * V + v]);
            loss += (log(sum) - (double)x[t * V + (size_t)ids[t + 1]]) / (double)T;
        }
        sscanf(line, " %zu %lf %lf", &shown, &theirs, &perplexity), free(x);
        check(shown == r && fabs(theirs - loss) < 1e-4 && fabs(perplexity - exp(loss)) < 1e-3 * exp(loss), "--eval, r=%zu: not %g: %s", r, loss, table);
    }
    check(shown == 4, "--eval shows: %s", table), free(shard), free(table);
}

#define INFER "infer --model f/tiny/recurrent --tokenizer f/lookup/base "
static void compare(bool same, const char *a, const char *b) {
    works(INFER "--recurrences 3 %s", a);
    char *text = strdup(out);
    works(INFER "--recurrences 3 %s", b);
    check(!strcmp(text, out) == same, "'%s' and '%s' give %s text: %s", a, b, same ? "another" : "the same", text);
    free(text);
}

static void generation(void) {
    size_t n, size, before, steps = 0;
    retrofit_tokenizer *t = retrofit_tokenizer_load("f/lookup/base");
    // Greedy decoding with the cache, against the likeliest of the tokenizer's ids (the model has more) behind ever more tokens without.
    int32_t ids[64], *begin = retrofit_encode(t, "a=1 b=a | b", 11, true, &n);
    memcpy(ids, begin, n * sizeof *ids), free(begin);
    free(retrofit_decode(t, ids, n, true, &before));
    for (; steps < 6; n++, steps++) {
        float *x = logits_of("f/tiny/recurrent", ids, n, 131, "--recurrences 3");
        ids[n] = retrofit_argmax(x + (n - 1) * 131, retrofit_tokenizer_size(t)), free(x);
        if (ids[n] == retrofit_tokenizer_eos(t)) break;
    }
    char *text = retrofit_decode(t, ids, n, true, &size), command[256], word[1024] = {0};
    need(text && steps > 2, "tokens to compare");
    snprintf(command, sizeof command, "--prompt 'a=1 b=a | b' --max-tokens %zu", steps);
    compare(true, command, command), write_bytes("ab", "a=1 b", 5);
    check(out_size == size - before + 1 && !strncmp(out, text + before, size - before), "greedy: '%s', the logits say '%s'", out, text + before);
    free(text);
    compare(true, "--state-init zero --prompt 'a=1 b' --seed 3 --temperature 2", "--state-init zero --prompt - --seed 3 --temperature 2 <ab");
    compare(false, "--state-init zero --prompt - --seed 3 --temperature 2 <ab", "--state-init zero --prompt - --seed 4 --temperature 2 <ab");
    compare(true, "--prompt 'a=1 b' --max-tokens 9", "--prompt 'a=1 b' --max-tokens 9 --temperature 2 --top-k 1");
    works(INFER "--prompt 'a=1 b' --max-tokens 0");
    check(!strcmp(out, "\n"), "--max-tokens 0 writes '%s'", out);
    for (n = 0; n < 128;) { // prompts of 127 and 128 tokens, in a context of 128
        strcat(word, " a"), free(retrofit_encode(t, word, strlen(word), true, &n));
        if (n == 127) works(INFER "--prompt '%s' --max-tokens 18446744073709551615", word);
    }
    fails(1, "context 128", INFER "--prompt '%s'", word);
    retrofit_tokenizer_free(t);
    works("infer --model f/lookup/base --tasks f/lookup/tasks.jsonl");
    check(strstr(out, " 0.608 ± ") && strstr(out, " 1.00 1.00 0.99 "), "--tasks: not 0.608, and 1.00 1.00 0.99 of 0, 1, 2 hops, but %s", out);
    // A wrong digit (it is 1), and then what the model says behind it: no right answer.
    shell("infer --model f/lookup/base --prompt 'a=1 b=a | b=2' --max-tokens 1 2>ls | sed 's/.*/{\"prompt\":\"a=1 b=a | b\",\"answer\":\"=2&\"}/' >answers");
    works("infer --model f/lookup/base --tasks answers");
    check(strstr(out, " 0.000 ± ") != NULL, "--tasks: an answer wrong at first is not wrong: %s", out);
}

// ---- Bad input ---------------------------------------------------------------------------------------------------------------
static void bad_models_and_shards(void) {
    static const char *const models[] = {"missing", "cut", "empty", "text"}, *const said[] = {"No such file", "truncated", "config.json", "config.json"};
    static const struct { const char *what, *data; int32_t magic, version; size_t promised, count; } shards[] = {
        {"no such file", "missing.bin", 0, 0, 0, 0}, {"no token shard", "file", 0, 0, 0, 0}, {"not a token shard", "magic.bin", 20240521, 1, 60, 60},
        {"not a token shard", "version.bin", 20240520, 2, 60, 60}, {"truncated", "truncated.bin", 20240520, 1, 61, 60},
        {"fewer tokens", "short.bin", 20240520, 1, 20, 20}, {"fewer tokens", "none.bin", 20240520, 1, 0, 0}};
    shell("mkdir cut empty text && cp f/tiny/recurrent/* cut && truncate -s -1000 cut/model.safetensors && echo '{' >text/config.json && echo >file");
    for (size_t i = 0; i < 4; i++) {
        fails(1, said[i], "train --model %s --data rows.bin --out bad/deep --steps 2 --seq-len 24", models[i]);
        fails(1, said[i], "infer --model %s --tokens 1,2 --logits bad.safetensors", models[i]);
    }
    for (size_t i = 0; i < 7; i++) {
        if (shards[i].magic) shard_of(shards[i].data, shards[i].magic, shards[i].version, shards[i].promised, shards[i].count, 131, -1);
        fails(1, shards[i].what, "train --model f/tiny/recurrent --data %s --out bad --steps 2 --seq-len 24", shards[i].data);
        fails(1, shards[i].what, "train --model f/tiny/recurrent --data rows.bin --val %s --out bad --steps 2 --seq-len 24", shards[i].data);
        fails(1, shards[i].what, "infer --model f/tiny/recurrent --eval %s --seq-len 24", shards[i].data);
    }
    shard_of("beyond.bin", 20240520, 1, 60, 60, 131, 131);
    fails(MIDWAY, "vocabulary", "train --model f/tiny/recurrent --data beyond.bin --out bad --steps 3 --seq-len 19 --micro-batch-size 2");
    fails(1, "vocabulary", "infer --model f/tiny/recurrent --eval beyond.bin --seq-len 19");
}

static void bad_options(void) {
    static const struct { int code; const char *what, *options;
    } train[] = {{2, "--steps is needed", "--steps 0"},
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
                 {2, "multiple of --micro-batch-size 2", "--batch-size 3"},
                 {2, "--micro-batch-size 0", "--micro-batch-size 0"},
                 {2, "context of 128", "--seq-len 129"},
                 {2, "--eval-rows", "--eval-rows 0"},
                 {2, "--eval-recurrences", "--eval-recurrences 1,,2"},
                 {2, "65536", "--mean-recurrence 65537"},
                 {2, "--resume", "--resume"},
                 {1, "file", "--out file"},
                 {1, "Not a directory", "--out file/below"},
                 {2, "--depth-start 9", "--backprop-depth 8 --depth-start 9"},
                 {2, "--depth-start 0", "--depth-start 0"},
                 {2, "all|core|adapter", "--train coda"},
                 {2, "neither", "--train core --model f/tiny/base"},
                 {2, "--dry-run is one of schedule", "--dry-run=all"},
                 {1, "No such file", "--sample-prompts missing"},
                 {1, "tokenizer", "--sample-prompts file"},
                 {1, "no prompt", "--model f/lookup/base --data low.bin --sample-prompts file"},
                 {1, "does not hold", "--model f/lookup/base --data low.bin --sample-prompts prompts --sample-tokens 256"},
                 {2, "at most", "--micro-batch-size 4611686018427387904"},
                 {2, "at most", "--micro-batch-size 4611686018427387904 --dry-run"}};
    static const struct { int code; const char *what, *options; } infer[] = {
        {2, "--prompt is needed", ""}, {2, "--prompt needs a value", "--prompt"}, {2, "empty", "--prompt ''"}, {2, "empty", "--prompt - </dev/null"},
        {2, "not an option", "--prompt a b"}, {2, "did you mean --max-tokens?", "--prompt a --max-token 3"}, {2, "--top-p", "--prompt a --top-p 0"},
        {2, "whole number", "--prompt a --max-tokens many"}, {2, "--temperature", "--prompt a --temperature=-1"},
        {2, "one number", "--prompt a --recurrences 1,2"}, {2, "positive numbers", "--prompt a --recurrences 0"},
        {2, "does not grow", "--eval one.bin --recurrences 1,4,2"}, {2, "context of 128", "--eval one.bin --seq-len 129"},
        {2, "at a time", "--eval one.bin --tasks tasks"}, {2, "none", "--model f/tiny/base --prompt a --recurrences 2"},
        {2, "none", "--model f/tiny/base --eval one.bin --seq-len 24 --recurrences 2"}, {1, "vocabulary", "--tokens 1,131 --logits bad.st"},
        {1, "vocabulary", "--tokens 1,2147483647 --logits bad.st"}, {2, "ids like", "--tokens '' --logits bad.st"},
        {2, "ids like", "--tokens 1, --logits bad.st"}, {2, "ids like", "--tokens ,1 --logits bad.st"}, {2, "ids like", "--tokens '1 2' --logits bad.st"},
        {2, "ids like", "--tokens 99999999999999999999 --logits bad.st"}, {1, "context of 128", "--tokens $(seq -s , 1 130) --logits bad.st"},
        {1, "Not a directory", "--tokens 1 --logits file/bad"}, {2, "--logits", "--prompt a --tokens 1,2"},
        {2, "--tokens", "--prompt a --tokens 1,2 --print-tokens"}, {1, "tokenizer", "--tokenizer empty --prompt a"},
        {1, "vocabulary", "--tokenizer f/tokenizers/smollm_style --prompt a"}, {1, "No such file", "--tasks missing"},
        {1, "no tasks", "--tasks /dev/null"}, {1, "line 3", "--tasks tasks"}};
    for (size_t i = 0; i < sizeof train / sizeof *train; i++)
        fails(train[i].code, train[i].what, "train --model f/tiny/recurrent --data rows.bin --out bad --seq-len 24 --micro-batch-size 2 --steps 2 %s",
              train[i].options);
    shell("printf '{\"prompt\":\"a=1 | a\",\"answer\":\"=1\"}\\n\\n{\"prompt\":\"a\"}\\n' >tasks");
    for (size_t i = 0; i < sizeof infer / sizeof *infer; i++) fails(infer[i].code, infer[i].what, INFER "%s", infer[i].options);
    works("! " TRAIN
          "recurrent --steps 2 --batch-size 16777216 --micro-batch-size 16777216 --dry-run >dry 2>&1 && tail -n 1 dry | grep 'would fit'");
    fails(2, "--help", "train"), fails(2, "--model is needed", "infer");
    for (int i = 0; i < 2; i++) {
        works("%s --help && ! %s --help 2>&1 >ls | grep .", i ? "infer" : "train", i ? "infer" : "train");
        check((i || strstr(out, "  --dry-run[=schedule] ")) && strstr(out, "--model") && strstr(out, "--seed") &&
                  strstr(out, "--seq-len") && strstr(out, "--state-init") && strstr(out, "--device") &&
                  strstr(out, i ? "--print-tokens" : "--save-every") && strstr(out, i ? "--min-p" : "--curriculum-warmup"),
              "--help is not whole: %s", out);
        for (char *line = out, *end; (end = strchr(line, '\n')); line = end + 1) check(end - line <= 120, "--help: %d wide: %.160s", (int)(end - line), line);
    }
}

int main(void) {
    enter("programs");
    static const struct { const char *name; size_t count, vocab; } shards[] = {
        {"rows.bin", 251, 131}, {"val.bin", 80, 131}, {"one.bin", 25, 131}, {"two.bin", 50, 131}, {"low.bin", 50, 60}};
    for (size_t i = 0; i < 5; i++) shard_of(shards[i].name, 20240520, 1, shards[i].count, shards[i].count, shards[i].vocab, -1);
    runs("muon"), runs("adamw"), runs("ellisadam");
    continues("muon"), continues("adamw"), continues("ellisadam");
    works(TRAIN "recurrent --steps 6 --shuffle --optimizer adamw --throttle --out throttled && ! cmp -s throttled/latest/model.safetensors adamw.a/latest/model.safetensors");
    schedule(), sampled(), frozen(), other_tokenizers();
    nan_weight(), plain_stays_plain(), learning();
    tokens_printed("llama2_style"), tokens_printed("llama3_style"), tokens_printed("smollm_style");
    authors_logits("tiny"), authors_logits("llama3"), authors_logits("head64");
    losses(), generation();
    bad_models_and_shards(), bad_options();
    return leave("programs");
}

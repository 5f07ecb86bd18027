// Failing machines: every call of a program to the C library fails once, and from there on, in
// every mode; descriptors are closed, stdout is full, files may not grow, command lines are random.
// Compiled once for each program, whose source test/hooks.h includes, by -DHOOKS_CONVERT,
// -DHOOKS_INFER or -DHOOKS_TRAIN; its main runs in a child for each fault.
//
// Whatever fails, the program is not ended by a signal. Either its exit code is 0, and what it
// wrote is the same to the bit; or the code is 1 or 2, there is a line on stderr, and what it would
// have made is there as a whole or not at all.
//
// Every SAMPLE-th call fails (fewer under sanitizers), others every day; FAULTS=all: each.
// FAULT=name:kind:number repeats one and keeps its directory.
#include "hooks.h"

#include "check.h"

#include <ftw.h>
#include <sys/resource.h>
#include <sys/time.h>

enum { SECONDS = 20, MAX_ARGUMENTS = 64, COMMANDS = 150 };

// A mode of the program.
typedef struct {
    const char *name, *command; // words with spaces between
    const char *input;          // a file that is stdin, or NULL
    const char *prepare;        // a command of the shell before each run, or NULL
} scenario;

#if defined __SANITIZE_ADDRESS__ || defined __clang__
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "detect_leaks=0"; } // an exit frees nothing
#endif

#ifdef __SANITIZE_ADDRESS__
enum { SLOWER = 5 };
#else
enum { SLOWER = 1 };
#endif

static char work[64], bin[4096], tests[4096];

static void require_test(bool ok, const char *what) {
    if (ok) return;
    printf("FAILED faults " PROGRAM ": %s\n", what);
    _exit(1);
}

static void shell(const char *command) { require_test(system(command) == 0, command); }

// ---- What there is to work with -----------------------------------------------------------------

static const char config_json[] =
    "{\"model_type\":\"huginn_raven\",\"n_embd\":16,\"n_heads\":2,\"num_key_value_heads\":1,"
    "\"intermediate_size\":16,\"vocab_size\":300,\"padded_vocab_size\":300,"
    "\"max_position_embeddings\":64,\"n_layers_in_prelude\":1,\"n_layers_in_recurrent_block\":1,"
    "\"n_layers_in_coda\":1,\"mean_recurrence\":2,\"mean_backprop_depth\":2,\"norm_eps\":1e-6,"
    "\"rope_theta\":10000,\"bos_token_id\":0,\"eos_token_id\":1}";

static void write_text(const char *path, const char *text) {
    int fd = (open)(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    ssize_t size = (ssize_t)strlen(text);
    require_test(fd >= 0 && write(fd, text, (size_t)size) == size && !(close)(fd), path);
}

// Into a directory of our own with p, a plain Llama; m, a recurrent one; shards, texts, a run.
static void set_up(void) {
    char path[8192], fixtures[4096];
    const char *memory = (access)("/dev/shm", W_OK) ? "/tmp" : "/dev/shm";
    snprintf(work, sizeof work, "%s/retrofit-faults-XXXXXX", memory);
    require_test(realpath(getenv("BIN") ? getenv("BIN") : ".", bin) != NULL, "BIN");
    require_test(realpath(getenv("OUT") ? getenv("OUT") : "build", tests) != NULL, "OUT");
    require_test(realpath("test/fixtures/reports", fixtures) != NULL, "test/fixtures");
    snprintf(path, sizeof path, "%s:%s", bin, getenv("PATH"));
    setenv("PATH", path, 1);
    setenv("OMP_NUM_THREADS", "1", 1);
    setenv("F", fixtures, 1);
    setenv("TESTS", tests, 1);
    setenv("ASAN_OPTIONS", "detect_leaks=0", 1);
    require_test(mkdtemp(work) && chdir(work) == 0, work);
    setenv("TMPDIR", work, 1);
    write_text("config.json", config_json);
    write_text("a.jsonl", "{\"text\":\"four five\"}\n\n{\"text\":\"\\ud800 six\",\"x\":NaN}\n");
    write_text("b.txt", "the cat \xc3\xa9\n");
    write_text("batch.jsonl", "{\"prompt\":\"four\"}\n{\"prompt\":\"five six\",\"id\":2}\n");
    write_text("prompts.txt", "four\nfive\n");
    write_text("choices.jsonl", "{\"prompt\":\"four\",\"choices\":[\" a\",\" b\"],\"answer\":1}\n");
    write_text("target.jsonl", "{\"prompt\":\"four\",\"target\":\"7\"}\n");
    shell("cp -r $F/brackets_a/model p && cp $F/brackets_a/text.jsonl .");
    shell("convert --random config.json --to m --tokenizer p >said 2>&1");
    write_text("m/chat_template.jinja", "{% for m in messages %}<{{ m.role }}>"
                                        "{{ m.content }}{{ eos_token }}{% endfor %}{% if "
                                        "add_generation_prompt %}<assistant>{% endif %}");
    shell("convert --tokenize text.jsonl --tokenizer p --to x.bin >said 2>&1");
    shell("convert --tokenize a.jsonl b.txt --tokenizer p --to v.bin >said 2>&1");
}

#if defined HOOKS_CONVERT

enum { SAMPLE = 7 };

static void set_up_more(void) {
    char command[8192];
    snprintf(command, sizeof command, "mkdir seeds && cd $F/../../.. && SEEDS=%s/seeds "
             "$TESTS/fuzz_convert >%s/said", work, work);
    shell(command);
    shell("mv seeds/convert-gguf/seed0 spm.gguf && mv seeds/convert-gguf/seed1 bpe.gguf");
    shell("mv seeds/convert-gguf/seed10 split-00001-of-00002.gguf");
    shell("mv seeds/convert-part/seed0 split-00002-of-00002.gguf");
}

static const scenario scenarios[] = {
    {"surgery", "--from p --to o/m --prelude none --core 0 --coda none", NULL, NULL},
    {"measured", "--from p --to o/m --prelude none --core auto:1 --coda none --text a.jsonl b.txt",
     NULL, NULL},
    {"report", "--from spm.gguf --report --prelude none --core 0 --coda none --text b.txt", NULL,
     NULL},
    {"rewrite", "--from p --to o/m --dtype bf16", NULL, NULL},
    {"gguf", "--from spm.gguf --to o/m", NULL, NULL},
    {"gguf2", "--from bpe.gguf --to o/m --prelude none --core 0 --coda none", NULL, NULL},
    {"split", "--from split-00001-of-00002.gguf --to o/m --dtype bf16", NULL, NULL},
    {"random", "--random config.json --to o/m --tokenizer p", NULL, NULL},
    {"tokenize", "--tokenize a.jsonl b.txt --tokenizer p --to o/x.bin", NULL, NULL},
    {"help", "--help", NULL, NULL},
};

#elif defined HOOKS_INFER

enum { SAMPLE = 7 };

static void set_up_more(void) {}

static const scenario scenarios[] = {
    {"prompt", "--model m --prompt ab --max-tokens 3 --json", NULL, NULL},
    {"stdin", "--model m --prompt - --max-tokens 2", "b.txt", NULL},
    {"batch", "--model m --batch batch.jsonl --max-tokens 2 --batch-size 2", NULL, NULL},
    {"chat", "--model m --chat --prompt ab --max-tokens 2 --stop x|y --exit kl", NULL, NULL},
    {"interactive", "--model m --chat --interactive --max-tokens 2", "prompts.txt", NULL},
    {"eval", "--model m --eval x.bin --seq-len 8 --rows 3 --recurrences 1,2", NULL, NULL},
    {"choices", "--model m --tasks choices.jsonl --recurrences 1,2", NULL, NULL},
    {"target", "--model m --tasks target.jsonl --answer-regex ([0-9]+) --max-tokens 2", NULL, NULL},
    {"logits", "--model m --tokens 1,2,3 --logits o/l.safetensors", NULL, NULL},
    {"trace", "--model m --prompt ab --max-tokens 2 --trace o/t.jsonl", NULL, NULL},
    {"tokens", "--tokenizer m --prompt ab --print-tokens", NULL, NULL},
    {"drafts", "--model m --prompt ab --max-tokens 3 --recurrences 3 --speculative 1,2", NULL,
     NULL},
    {"help", "--help", NULL, NULL},
};

#else

enum { SAMPLE = 31 }; // whole trainings

#define SMALL "--model m --data x.bin --val v.bin --seq-len 8 --batch-size 2 --micro-batch-size 1 "
#define EVALS "--eval-recurrences 1 --eval-rows 2 --sample-prompts prompts.txt --sample-tokens 2 "

static void set_up_more(void) {
    shell("train " SMALL EVALS "--out begun --steps 2 >said 2>&1");
}

static const scenario scenarios[] = {
    {"train", SMALL EVALS "--out o/r --steps 2 --save-every 1 --eval-every 1", NULL, NULL},
    {"adamw", SMALL "--out o/r --steps 1 --optimizer adamw --recompute", NULL, NULL},
    {"resume", SMALL EVALS "--out o/r --steps 3 --resume-anyway", NULL, "cp -a begun o/r"},
    {"dry run", "--model m --data x.bin --steps 4 --seq-len 8 --dry-run", NULL, NULL},
    {"schedule", "--model m --steps 4 --seq-len 8 --dry-run=schedule", NULL, NULL},
    {"help", "--help", NULL, NULL},
};

#endif

// ---- Runs ---------------------------------------------------------------------------------------

// What happens to a run.
typedef struct {
    int kinds; // of calls that fail
    size_t fail_at;
    bool keeps_failing;
    unsigned closed;    // bit i: descriptor i is closed
    bool full;          // stdout is /dev/full
    rlim_t file_size;   // no file may be larger; 0: any size
    bool short_time;    // exit code STILL_RUNNING behind 300 ms; else a signal behind SECONDS
    size_t max_size;    // of a block of memory; 0: any size
} fault;

enum { STILL_RUNNING = 77 };

typedef struct {
    int code;         // the exit code; 128 + n of signal n
    char *out, *err;  // stdout and stderr
    size_t out_size;
    uint64_t files;   // a hash of all files below o, by name; 0: there is none
    char odd[256];    // a file that has no place there, or ""
} result;

static size_t *calls; // of the last run, in memory that is shared with it
static result *walked;

static int remove_entry(const char *path, const struct stat *status, int type, struct FTW *where) {
    (void)status;
    (void)type;
    return where->level ? remove(path) : 0;
}

static char *slurp(const char *path, size_t *size) {
    char *bytes = retrofit_read_file(path, size);
    require_test(bytes != NULL, path);
    return bytes;
}

// What is in a pipe whose other end is closed: all that a run wrote, which a pipe has room for.
static char *read_pipe(const int ends[2], size_t *size) {
    enum { ROOM = 1 << 16 };
    char *text = calloc(1, ROOM + 1);
    require_test(text != NULL, "memory");
    (close)(ends[1]);
    *size = 0;
    for (ssize_t n; (n = read(ends[0], text + *size, ROOM - *size)) > 0;) *size += (size_t)n;
    (close)(ends[0]);
    return text;
}

// Adds a file to the hash of all. The sum does not depend on their order.
static int add_entry(const char *path, const struct stat *status, int type, struct FTW *where) {
    (void)status;
    if (where->level == 0) return 0;
    uint64_t hash = retrofit_hash_bytes(RETROFIT_HASH_START, path, strlen(path));
    if (strstr(path, "tmp")) snprintf(walked->odd, 256, "%s", path);
    if (strstr(path, "/lock")) return 0; // the kernel's lock counts, not the file
    const char *step = strstr(path, "/step_");
    char newest[256] = "";
    if (step && (readlink)("o/r/latest", newest, 255) > 0 &&
        strncmp(step + 1, newest, strlen(newest)))
        return 0; // an older checkpoint, which the next one removes
    if (type == FTW_F) {
        size_t size;
        char *bytes = slurp(path, &size);
        hash = retrofit_hash_bytes(hash + size, bytes, size);
        free(bytes);
    }
    if (type == FTW_SL) {
        char target[256] = {0};
        if ((readlink)(path, target, 255) > 0) hash += retrofit_hash_bytes(1, target, 255);
    }
    walked->files += hash;
    return 0;
}

static void on_time_limit(int number) {
    (void)number;
    _exit(STILL_RUNNING);
}

__attribute__((noreturn)) static void be_the_program(char **list, int count, const char *input,
                                                     const fault *f, const int *ends) {
    static char program[] = PROGRAM;
    dup2((open)(input ? input : "/dev/null", O_RDONLY), 0);
    dup2(f->full ? (open)("/dev/full", O_WRONLY) : ends[0], 1);
    dup2(ends[1], 2);
    for (int fd = 3; fd < 32; fd++) (close)(fd);
    for (int fd = 0; fd < 3; fd++) {
        if (f->closed >> fd & 1) (close)(fd);
    }
    if (f->kinds) {
        hooks.cookies = true;
        stdin = hook_stream(0, "r");
        stdout = hook_stream(1, "w");
    }
    struct rlimit limit = {f->file_size, f->file_size}, none = {0, 0};
    if (f->file_size) setrlimit(RLIMIT_FSIZE, &limit);
    setrlimit(RLIMIT_CORE, &none);
    struct itimerval timer = {.it_value = {SECONDS, 0}};
    if (f->short_time) {
        signal(SIGALRM, on_time_limit);
        timer.it_value = (struct timeval){0, 300000};
    }
    setitimer(ITIMER_REAL, &timer, NULL);
    hooks.kinds = f->kinds;
    hooks.fail_at = f->fail_at;
    hooks.keeps_failing = f->keeps_failing;
    hooks.max_size = f->max_size;
    list[0] = program;
    exit(program_main(count, list));
}

static result run_program(char **list, int count, const scenario *s, const fault *f) {
    result r = {0};
    int status = 0, out[2], err[2];
    nftw("o", remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    if (s && s->prepare) shell(s->prepare);
    fflush(stdout);
    *calls = 0;
    require_test(pipe(out) == 0 && pipe(err) == 0, "pipe"); // to which limits of files are nothing
    pid_t child = fork();
    if (child == 0) be_the_program(list, count, s ? s->input : NULL, f, (int[]){out[1], err[1]});
    require_test(child > 0 && waitpid(child, &status, 0) == child, "fork");
    r.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    r.out = read_pipe(out, &r.out_size);
    r.err = read_pipe(err, &(size_t){0});
    walked = &r;
    nftw("o", add_entry, 16, FTW_PHYS);
    return r;
}

static void free_result(result *r) {
    free(r->out);
    free(r->err);
}

// The words of a command, from list[1] on. Returns how many there are with the program's name.
static int split(char *command, char **list) {
    int count = 1;
    for (char *word = strtok(command, " "); word && count < MAX_ARGUMENTS;
         word = strtok(NULL, " "))
        list[count++] = word;
    list[count] = NULL;
    return count;
}

static result run_scenario(const scenario *s, const fault *f) {
    char command[1024], *list[MAX_ARGUMENTS + 1];
    snprintf(command, sizeof command, "%s", s->command);
    int count = split(command, list);
    return run_program(list, count, s, f);
}

// ---- What must hold -----------------------------------------------------------------------------

// Whether stderr has a line of the program's, behind notes and progress.
static bool has_message(const char *err) {
    const char *begin = strstr(err, PROGRAM ": ");
    return begin && strlen(begin) > strlen(PROGRAM ": ") + 3 && err[strlen(err) - 1] == '\n';
}

// What is wrong with a run beside the one that nothing happened to; NULL if nothing is.
static const char *judge(const result *r, const result *good, const fault *f) {
    if (r->code > 128) return "a signal";
    if (r->code != 0 && r->code != 1 && r->code != 2) return "another exit code than 0, 1 and 2";
    if (r->odd[0]) return "a temporary file is left";
    if (r->code != 0 && !(f->closed & 4) && !has_message(r->err)) return "no message on stderr";
    bool as_a_whole = r->files == good->files;
    if (r->code == 0 && !as_a_whole) return "exit code 0, but other files";
    if (r->code == 0 && (f->full || f->closed & 2)) return NULL; // stdout was not kept
    bool same = r->out_size == good->out_size && !memcmp(r->out, good->out, r->out_size);
    if (r->code == 0 && !same) return "exit code 0, but another text on stdout";
#ifndef HOOKS_TRAIN // a run that began has a log, and its checkpoints
    if (r->code != 0 && r->files && !as_a_whole) return "something half-written is left";
#endif
    return NULL;
}

static size_t told; // lines about this scenario

static void check_run(const scenario *s, const result *good, const fault *f, const char *what,
                      size_t number) {
    result r = run_scenario(s, f);
    const char *problem = judge(&r, good, f);
    if (!problem || told++ < 10)
        check(!problem, PROGRAM " %s: FAULT='%s:%s:%zu': %s: code %d%s%s, stderr: %.300s", s->name,
              s->name, what, number, problem, r.code, *r.odd ? ", left: " : "", r.odd, r.err);
    else failed++;
    free_result(&r);
}

static const struct {
    const char *name;
    int kinds;
    bool keeps_failing;
} kinds[] = {{"memory", HOOK_MEMORY, false}, {"memory-on", HOOK_MEMORY, true},
             {"system", HOOK_SYSTEM, false}, {"system-on", HOOK_SYSTEM, true}};

static void check_calls(const scenario *s, const result *good, size_t first, size_t stride) {
    const char *one = getenv("FAULT");
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        fault f = {.kinds = kinds[i].kinds};
        result counted = run_scenario(s, &f);
        size_t count = *calls;
        const char *problem = judge(&counted, good, &f);
        check(!problem, PROGRAM " %s under hooks: %s: %s", s->name, problem, counted.err);
        free_result(&counted);
        f.keeps_failing = kinds[i].keeps_failing;
        for (f.fail_at = 1 + first % stride; f.fail_at <= count; f.fail_at += stride) {
            if (!one) check_run(s, good, &f, kinds[i].name, f.fail_at);
        }
        char name[64];
        snprintf(name, sizeof name, "%s:%s:", s->name, kinds[i].name);
        if (!one || strncmp(one, name, strlen(name))) continue;
        f.fail_at = strtoul(one + strlen(name), NULL, 10);
        check_run(s, good, &f, kinds[i].name, f.fail_at);
        result r = run_scenario(s, &f);
        printf("code %d in %s, stderr:\n%sstdout:\n%s", r.code, work, r.err, r.out);
        exit(0);
    }
}

// Descriptors 0 to 2, each closed or not; a stdout that is full; files that may not grow.
static void check_surroundings(const scenario *s, const result *good) {
    static const rlim_t sizes[] = {1, 100, 2000, 20000, 60000};
    for (unsigned closed = 1; closed < 8; closed++) {
        if (closed & 1 && s->input) continue; // reads nothing then
        check_run(s, good, &(fault){.closed = closed}, "closed", closed);
    }
    result full = run_scenario(s, &(fault){.full = true});
    bool told_so = full.code == 1 && has_message(full.err) && strstr(full.err, "stdout");
    bool whole = !full.files || full.files == good->files;
    check(good->out_size ? told_so && whole : full.code == 0,
          PROGRAM " %s >/dev/full: code %d, stderr: %s", s->name, full.code, full.err);
    free_result(&full);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        check_run(s, good, &(fault){.file_size = sizes[i]}, "file size", sizes[i]);
}

// ---- Random command lines -----------------------------------------------------------------------

static uint64_t dice_key, dice_count;

static size_t dice(size_t n) { return (size_t)(retrofit_hash(dice_key, dice_count++) % n); }

static const char *random_value(void) {
    static char long_text[6000];
    static const char *const values[] = {
        "", "0", "1", "2", "-1", "1e309", "nan", "-nan", "inf", "1e-320", "0x10", " 1", "1 ", "1.5",
        "18446744073709551615", "18446744073709551616", "9223372036854775808", "4294967296",
        "1,2", "1,,2", "0-3", "1048577", "m", "p", "o", "o/x", "x.bin", "/", ".", "/dev/null",
        "/dev/full", "missing", "missing/x", "a.jsonl", "config.json", "o/y.bin", "b.txt", "*.bin",
        "[", "\xff\xfe", "%s%n%d", "--", "-", "shared:0", "grouped:99999999999", "=", "a|b", "\\",
        "((((", "[[:x:]]", "(a*)*", "none", "f32", "cpu", "cuda", "auto", "zero", "all", "adapter"};
    memset(long_text, 'a', sizeof long_text - 1);
    return dice(40) ? values[dice(sizeof values / sizeof *values)] : long_text;
}

// Mostly beside options that a run needs, else nothing but usage would be looked at.
static int random_command(char **list, char *memory) {
    int count = 1;
    if (dice(3)) {
        const scenario *s = &scenarios[dice(sizeof scenarios / sizeof *scenarios - 1)];
        snprintf(memory, 1024, "%s", s->command);
        count = split(memory, list);
    }
    memory += 1024;
    for (size_t n = dice(5); n > 0 && count < MAX_ARGUMENTS - 2; n--) {
        const retrofit_option *option =
            &option_table[dice(sizeof option_table / sizeof *option_table)];
        bool heading = option->type == RETROFIT_HEADING;
        list[count++] = memory;
        memory += 1 + snprintf(memory, 512, "--%.100s", heading ? "no-option" : option->name);
        if (dice(8) == 0) list[count - 1] += dice(3);
        if (option->type == RETROFIT_FLAG && dice(8)) continue;
        if (dice(10)) list[count++] = (char *)random_value();
    }
    list[count] = NULL;
    return count;
}

static void check_command(uint64_t seed, size_t number) {
    static char memory[8192];
    char *list[MAX_ARGUMENTS + 1], text[400] = "";
    dice_key = retrofit_hash(seed, number);
    dice_count = 0;
    int count = random_command(list, memory);
    for (int i = 1; i < count; i++) {
        size_t used = strlen(text);
        snprintf(text + used, sizeof text - used, " '%.40s'", list[i]);
    }
    fault f = {.short_time = true, .max_size = 1 << 26};
    result r = run_program(list, count, NULL, &f);
    bool ok = r.code == 0 || r.code == STILL_RUNNING;
    ok = ok || ((r.code == 1 || r.code == 2) && has_message(r.err));
    check(ok, "command line %zu of seed %llu: code %d: " PROGRAM "%s: %.300s", number,
          (unsigned long long)seed, r.code, text, r.err);
    free_result(&r);
}

// ---- main ---------------------------------------------------------------------------------------

int main(void) {
    const char *seed_text = getenv("EMULATOR_SEED"), *one = getenv("FAULT");
    size_t seed = seed_text ? strtoul(seed_text, NULL, 10) : 1;
    bool all = getenv("FAULTS") && !strcmp(getenv("FAULTS"), "all");
    set_up();
    set_up_more();
    (mkdir)("o", 0777);
    calls = (mmap)(NULL, sizeof *calls, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    require_test(calls != MAP_FAILED, "mmap");
    hooks.calls = calls;
    for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++) {
        const scenario *s = &scenarios[i];
        if (one && strncmp(one, s->name, strlen(s->name))) continue;
        result good = run_scenario(s, &(fault){0});
        told = 0;
        if (check(good.code == 0, PROGRAM " %s: code %d: %s", s->name, good.code, good.err)) {
            check_calls(s, &good, seed, all ? 1 : SLOWER * SAMPLE);
            if (!one) check_surroundings(s, &good);
        }
        free_result(&good);
    }
    for (size_t i = 0; i < (all ? 6 * COMMANDS : COMMANDS) && !one; i++) check_command(seed, i);
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", work);
    if (chdir("/")) return 1;
    shell(command);
    return finish("faults " PROGRAM);
}

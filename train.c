// train: teaches a model its recurrence (section 4 of the paper), or trains a plain model, the
// baseline, by the same loop. What a step does stands in retrofit.h, section 4; this file has the
// command line, the loop, what it prints, and what keeps a run from being lost.
#define RETROFIT_IMPLEMENTATION
#include "retrofit.h"
#include "retrofit_ranks.h"
#include <float.h>
#include <signal.h>
#include <sys/statvfs.h>

// ---- Options -----------------------------------------------------------------------------------

enum { MAX_EVALS = 32, MAX_RECURRENCES = 1 << 16, MAX_BATCH_SIZE = 1 << 24 };
enum { NOT_GIVEN = -1 };       // a choice that the command line leaves open
enum { DRY_RUN_SCHEDULE = 2 }; // options.dry_run for --dry-run=schedule; 1 for --dry-run alone

static const char default_recurrences[] = "1,2,4,8,16,32";

// What the command line says. Numbers of the method itself go into `training` instead, at once or,
// where the types differ, by fill_training.
static struct {
    const char *model, *data, *val, *out;
    const char *fixed_recurrences, *eval_recurrences, *sample_prompts;
    size_t batch_size, micro_batch_size, seq_len, seed; // batch_size, seq_len: 0 until completed
    size_t save_every, keep, eval_every, eval_rows, sample_tokens, max_bad_steps;
    size_t as_ranks;                                    // 0 until completed
    double beta1, beta2, weight_decay, clip;
    double flops, time_limit, save_before;              // time_limit, save_before: minutes
    double gpu_memory, gpu_tflops;                      // of a GPU that is only planned with
    double patience;                                    // minutes
    int optimizer, train, curriculum, state_init;       // indices of choices
    int device, precision, dry_run;
    bool shuffle, resume, resume_anyway, recompute;
} options = {
    .eval_recurrences = default_recurrences,
    .micro_batch_size = 8,
    .keep = 1,
    .eval_rows = 64,
    .sample_tokens = 32,
    .max_bad_steps = 5,
    .save_before = 5,
    .patience = 30,
    .precision = NOT_GIVEN,
};

// The training that is to be done: the paper's, changed by the options.
static retrofit_training training;

// --eval-recurrences as numbers; a plain Llama has 0 alone.
static size_t eval_recurrences[MAX_EVALS], eval_count;

#define HEADING(text) {text, RETROFIT_HEADING, NULL, NULL, NULL}

static const retrofit_option option_table[] = {
    HEADING("Files"),
    {"model", RETROFIT_STRING, &options.model, "DIR",
     "what to train: a recurrent model, or a plain one as the baseline"},
    {"data", RETROFIT_STRING, &options.data, "'GLOB'",
     "token shards (.bin, made by convert --tokenize)"},
    {"val", RETROFIT_STRING, &options.val, "'GLOB'", "shards for the validation loss"},
    {"out", RETROFIT_STRING, &options.out, "DIR",
     "gets step_00000100/ (a model), latest -> the newest, log.jsonl"},
    {"resume", RETROFIT_FLAG, &options.resume, NULL,
     "go on from DIR/latest, to the same bits; without --model, with the run's own options"},
    {"resume-anyway", RETROFIT_FLAG, &options.resume_anyway, NULL,
     "the same with options that alter the run; says which"},
    {"save-every", RETROFIT_SIZE, &options.save_every, "N",
     "steps between checkpoints (0: at the end only)"},
    {"keep", RETROFIT_SIZE, &options.keep, "N", "the newest checkpoints that stay (1)"},
    {"dry-run", RETROFIT_SWITCH, &options.dry_run, "schedule",
     "print memory, FLOPs, time and schedule (or each micro-batch of it), and stop"},

    HEADING("When to stop (SIGINT, SIGTERM and SIGHUP do so too: after the running step, "
            "with a checkpoint)"),
    {"steps", RETROFIT_SIZE, &training.steps, "N", "optimizer steps"},
    {"flops", RETROFIT_REAL, &options.flops, "F",
     "end once this many, 1e18 say, are spent; the schedules keep to --steps"},
    {"time-limit", RETROFIT_REAL, &options.time_limit, "MINUTES",
     "stop in time to be done by then; --resume goes on"},
    {"save-before", RETROFIT_REAL, &options.save_before, "MINUTES",
     "before the time limit saving begins (5)"},
    {"max-bad-steps", RETROFIT_SIZE, &options.max_bad_steps, "N",
     "fail when in so many steps in a row loss or gradient is no number (5)"},

    HEADING("Batches"),
    {"micro-batch-size", RETROFIT_SIZE, &options.micro_batch_size, "ROWS",
     "rows in memory at a time; one draw of recurrences each (8)"},
    {"batch-size", RETROFIT_SIZE, &options.batch_size, "ROWS",
     "rows per optimizer step (one micro-batch)"},
    {"seq-len", RETROFIT_SIZE, &options.seq_len, "T",
     "tokens in a row (1024, or the model's context)"},
    {"shuffle", RETROFIT_FLAG, &options.shuffle, NULL,
     "read rows in a random order, another in each epoch"},
    {"seed", RETROFIT_SIZE, &options.seed, "N",
     "of start states and the shuffle (1); recurrences are drawn as the authors draw them"},

    HEADING("Recurrence"),
    {"mean-recurrence", RETROFIT_SIZE, &training.mean_recurrence, "R",
     "mean of the drawn recurrences at the end of the curriculum (the model's)"},
    {"backprop-depth", RETROFIT_SIZE, &training.backprop_depth, "K",
     "recurrences that get gradients (the model's)"},
    {"depth-warmup", RETROFIT_REAL, &training.depth_warmup, "F",
     "over this share of the steps K grows linearly (0: it is K from the beginning)"},
    {"depth-start", RETROFIT_SIZE, &training.depth_start, "N", "from N (1)"},
    {"curriculum", RETROFIT_CHOICE, &options.curriculum, "none|linear|1-sqrt",
     "how the mean grows to R (1-sqrt)"},
    {"curriculum-warmup", RETROFIT_REAL, &training.curriculum_warmup, "F",
     "over this share of the steps (.75)"},
    {"fixed-recurrences", RETROFIT_STRING, &options.fixed_recurrences, "n,k",
     "the same n without and k with gradients always: no draws, no curriculum"},
    {"state-init", RETROFIT_CHOICE, &options.state_init, "normal|zero", "the start state (normal)"},

    HEADING("Optimizer"),
    {"optimizer", RETROFIT_CHOICE, &options.optimizer, "adamw|muon|ellisadam",
     "muon: matrices of the body, the rest by adamw; ellisadam: the paper's AdamW* (muon)"},
    {"train", RETROFIT_CHOICE, &options.train, "all|core|adapter",
     "core: adapter and core alone; what is frozen needs no gradients and moments (all)"},
    {"throttle", RETROFIT_FLAG, &training.throttle, NULL,
     "divide the learning rates of adapter and core by the step's mean k"},
    {"lr", RETROFIT_REAL, &training.lr, "F", "peak learning rate of AdamW (5e-5)"},
    {"muon-lr", RETROFIT_REAL, &training.muon_lr, "F", "peak learning rate of Muon (1e-3)"},
    {"weight-decay", RETROFIT_REAL, &options.weight_decay, "F", "on every parameter (1e-4)"},
    {"beta1", RETROFIT_REAL, &options.beta1, "F", "AdamW (.9)"},
    {"beta2", RETROFIT_REAL, &options.beta2, "F", "AdamW (.95)"},
    {"clip", RETROFIT_REAL, &options.clip, "F",
     "largest norm of the gradient; 0: no clipping (1)"},
    {"warmup", RETROFIT_REAL, &training.warmup, "F",
     "share of the steps in which the learning rate rises (.0025)"},
    {"cooldown", RETROFIT_REAL, &training.cooldown, "F",
     "share of the steps in which it falls again, a cosine (.6)"},
    {"min-lr-ratio", RETROFIT_REAL, &training.min_lr_ratio, "F",
     "where it starts and ends, as a share of the peak (.001)"},

    HEADING("Validation"),
    {"eval-every", RETROFIT_SIZE, &options.eval_every, "N",
     "steps between validations (0: at the end only)"},
    {"eval-recurrences", RETROFIT_STRING, &options.eval_recurrences, "1,2,4",
     "recurrences to validate with (1,2,4,8,16,32)"},
    {"eval-rows", RETROFIT_SIZE, &options.eval_rows, "N", "rows of --val to use (64)"},
    {"sample-prompts", RETROFIT_STRING, &options.sample_prompts, "FILE",
     "a prompt a line: each is continued at all these recurrences, by the likeliest tokens"},
    {"sample-tokens", RETROFIT_SIZE, &options.sample_tokens, "N", "by so many (32)"},

    HEADING("Machine"),
    {"device", RETROFIT_CHOICE, &options.device, "auto|cpu|cuda",
     "where to compute; auto: on a GPU if there is one (auto)"},
    {"precision", RETROFIT_CHOICE, &options.precision, "bf16|fp32",
     "of matrices and activations on a GPU; masters and sums are fp32 (bf16)"},
    {"recompute", RETROFIT_FLAG, &options.recompute, NULL,
     "keep a sixth of the activations and compute the rest again: a quarter more work"},
    {"as-ranks", RETROFIT_SIZE, &options.as_ranks, "N",
     "the draws and sums of N processes, to the bit on CPUs (as many as mpirun starts)"},
    {"patience", RETROFIT_REAL, &options.patience, "MINUTES",
     "how long a rank waits for another one before it ends them all (30)"},
    {"gpu-memory", RETROFIT_REAL, &options.gpu_memory, "GB",
     "with --dry-run: plan for a GPU that is not here, with so much memory (H100: 80)"},
    {"gpu-tflops", RETROFIT_REAL, &options.gpu_tflops, "N",
     "and with this peak of dense bf16 products, as its maker states it (H100: 989)"},
};

enum { OPTIONS = sizeof option_table / sizeof *option_table };

// The choices by their indices.
static const char *const optimizer_names[] = {"adamw", "muon", "ellisadam"};
static const char *const curriculum_names[] = {"none", "linear", "1-sqrt"};
static const char *const train_names[] = {"all", "core", "adapter"};

// ---- The run -----------------------------------------------------------------------------------

// How far the run is. A checkpoint keeps all of it.
static struct {
    size_t step;             // steps done, those that were skipped included
    size_t skipped;          // steps without an update, since a number was not finite
    size_t skipped_in_a_row; // those at the end
    double flops, paper_flops;
    double mean_norm;        // of the gradient, a running average; 0 before the first
} progress;

// What the run works with.
static struct {
    char model_path[RETROFIT_PATH]; // storage for `source`
    const char *source;             // the directory of the model, and of its tokenizer
    retrofit_config config;         // of that directory
    char device[256];               // its name
    const retrofit_ops *ops;
    retrofit_keep keep;             // which activations are kept for backward
    retrofit_data *data, *val;      // val: NULL without --val
    size_t data_rows;
    retrofit_ranks ranks;           // the processes that train together: usually this one alone
    retrofit_model *model;          // until `load` without memory
    retrofit_buffers *buffers;
    double *state_rms;              // [backprop depth + 1] for the log
    char latest[RETROFIT_PATH];     // OUT/latest
    char newest[RETROFIT_PATH];     // the checkpoint that it names
    bool links;                     // whether OUT can hold links
    char log_path[RETROFIT_PATH];   // OUT/log.jsonl
    FILE *log;
    char *data_shards, *val_shards; // what they are, by retrofit_data_describe; NULL for none
    retrofit_text options;          // for OUT/options.txt
    char *taken_up;                 // what it was when this program began; NULL if not used
    uint64_t model_hash;            // of the files of weights of --model; 0: there are none
    uint64_t tokenizer_hash;        // 0: none that can be read
    bool training;                  // steps are being made: what fails now saves them first
    size_t first_step, saved_step;  // steps done when this program began; when it saved last
    bool evaluated;                 // the evaluation that was due last has been done
    double train_start;             // when training began
    double planned_flops;           // what was to be done from there
    size_t end_step;                // the step with which it is done
    double spent_flops;             // what has been done since
    double step_seconds;            // what that took, without evaluations and checkpoints
} run;

// ---- Messages ----------------------------------------------------------------------------------

enum { MESSAGE_SIZE = 8192 };

static bool step_shown; // the terminal's last line is a step's, which the next one would replace

// Keeps the last step's line above what comes now.
static void end_live_line(void) {
    if (step_shown) fputc('\n', stderr);
    step_shown = false;
    retrofit_live_line(NULL);
}

// Prints a line on stderr.
__attribute__((format(printf, 1, 2))) static void message(const char *format, ...) {
    char text[MESSAGE_SIZE];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    retrofit_make_line(text);
    end_live_line();
    if (run.ranks.rank == 0) fprintf(stderr, "%s\n", text);
}

// Appends to a text that has memory for so many bytes.
__attribute__((format(printf, 3, 4))) static void append(char *text, size_t size,
                                                         const char *format, ...) {
    size_t used = strlen(text);
    va_list args;
    va_start(args, format);
    vsnprintf(text + used, size - used, format, args);
    va_end(args);
}

static bool save(void);

// The steps that were made since the last checkpoint, in one. Returns what became of them.
static const char *save_unsaved_steps(void) {
    if (!run.training || progress.step == run.saved_step || run.ranks.count > 1) return "";
    run.training = false; // what fails from here on has had its chance
    return save() ? "; the steps before it are saved: --resume goes on from there"
                  : "; the steps before it could not be saved either, the checkpoint before is "
                    "untouched";
}

static volatile sig_atomic_t caught_signal; // the one that asked the run to stop; 0: none yet

// Where there are several ranks the line names this one, and all end. What fails on each of them is
// said by the first alone: the others give it time to. A rank that waits in vain after SIGTERM is
// ended by another one, which has said why.
__attribute__((noreturn)) static void end_ranks(int code, const char *text) {
    bool ended = run.ranks.failed && caught_signal == SIGTERM;
    signal(SIGTERM, SIG_DFL);
    if (run.ranks.rank > 0 && !run.ranks.failed)
        sleep((unsigned)retrofit_min(1 + run.ranks.rank, 60));
    if (!ended) fprintf(stderr, "train: rank %zu: %s\n", run.ranks.rank, text);
    if (run.ranks.end) run.ranks.end(code);
    exit(code);
}

// Ends the program with a line on stderr. Exit code 1: something failed; 2: bad usage.
__attribute__((format(printf, 2, 3), noreturn)) static void die(int code, const char *format, ...) {
    char text[MESSAGE_SIZE];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    retrofit_make_line(text);
    const char *saved = save_unsaved_steps();
    end_live_line();
    if (run.ranks.count > 1) end_ranks(code, text);
    fprintf(stderr, "train: %s%s\n", text, saved);
    exit(code);
}

// Ends the program with the error that retrofit.h recorded, unless all is well.
static void require(bool ok) {
    if (!ok) die(1, "%s", retrofit_error());
}

// Writes a number to the log. JSON has no NaN and no infinity: they become null.
static void log_number(const char *format, double x) {
    if (isfinite(x)) fprintf(run.log, format, x);
    else fputs("null", run.log);
}

static void flush_log(void) {
    if (!ferror(run.log) && fflush(run.log) == 0) return;
    die(1, "%s/log.jsonl: writing failed: %s", options.out, strerror(errno));
}

// ---- Reading and checking options --------------------------------------------------------------

// The number one would write for x: 0.9 for 0.9f, which as a double is 0.899999976.
static double shortest_decimal(float x) {
    char text[32];
    snprintf(text, sizeof text, "%.*g", FLT_DIG, (double)x);
    return strtod(text, NULL);
}

// ---- OUT/options.txt: the run's own options, with which --resume alone goes on -----------------

// As the command line has an option: --name=value; empty where there is nothing to say.
static void format_option(const retrofit_option *option, char text[RETROFIT_PATH]) {
    const void *value = option->value;
    const char *name = option->name, *string;
    text[0] = 0;
    switch (option->type) {
    case RETROFIT_FLAG:
        if (*(const bool *)value) snprintf(text, RETROFIT_PATH, "--%s", name);
        break;
    case RETROFIT_STRING:
        string = *(const char *const *)value;
        if (string) snprintf(text, RETROFIT_PATH, "--%s=%s", name, string);
        break;
    case RETROFIT_SIZE:
        snprintf(text, RETROFIT_PATH, "--%s=%zu", name, *(const size_t *)value);
        break;
    case RETROFIT_REAL: // the digits that were typed, unless they were more than 15
        snprintf(text, RETROFIT_PATH, "--%s=%.15g", name, *(const double *)value);
        if (strtod(strchr(text, '=') + 1, NULL) != *(const double *)value)
            snprintf(text, RETROFIT_PATH, "--%s=%.17g", name, *(const double *)value);
        break;
    case RETROFIT_CHOICE: {
        const char *choice = option->argument;
        for (int i = *(const int *)value; i > 0; i--) choice = strchr(choice, '|') + 1;
        snprintf(text, RETROFIT_PATH, "--%s=%.*s", name, (int)strcspn(choice, "|"), choice);
    }
    }
}

// Options of one start of the program, not of the run.
static bool is_of_one_start(const retrofit_option *option) {
    static const char *const names[] = {"out", "resume", "resume-anyway", "dry-run", "gpu-memory",
                                        "gpu-tflops"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (!strcmp(option->name, names[i])) return true;
    }
    return option->type == RETROFIT_HEADING;
}

static char default_options[OPTIONS][64];

static void remember_defaults(void) {
    char text[RETROFIT_PATH];
    for (size_t i = 0; i < OPTIONS; i++) {
        format_option(&option_table[i], text);
        snprintf(default_options[i], sizeof default_options[i], "%.63s", text);
    }
}

// Those that are not as they are without being given, one a line. A file cannot say it of a path
// with a line break: it must be given again.
static void remember_options(void) {
    char text[RETROFIT_PATH];
    for (size_t i = 0; i < OPTIONS; i++) {
        const retrofit_option *option = &option_table[i];
        if (is_of_one_start(option)) continue;
        format_option(option, text);
        if (!*text || !strcmp(text, default_options[i]) || strchr(text, '\n')) continue;
        retrofit_text_append(&run.options, text, strlen(text));
        retrofit_text_append(&run.options, "\n", 1);
    }
    require(!run.options.failed);
}

static bool is_option_of_run(const char *line) {
    for (size_t i = 0; i < OPTIONS; i++) {
        const retrofit_option *option = &option_table[i];
        size_t n = strlen(option->name);
        if (is_of_one_start(option) || strncmp(line, "--", 2)) continue;
        if (!strncmp(line + 2, option->name, n) && (line[2 + n] == '=' || line[2 + n] == 0))
            return true;
    }
    return false;
}

// Takes the options that OUT/options.txt has. Their strings stay in memory. Returns -1 to go on, or
// an exit code.
static int take_up_options(char *program) {
    char path[RETROFIT_PATH], *arguments[OPTIONS + 1] = {program};
    size_t size;
    int count = 1;
    require(retrofit_path(path, options.out, "options.txt"));
    if (access(path, F_OK))
        die(2, "--resume: %s: %s: give --model, --data and the others as when the run began", path,
            strerror(errno));
    run.taken_up = retrofit_read_file(path, &size);
    require(run.taken_up);
    for (char *line = strtok(run.taken_up, "\n"); line; line = strtok(NULL, "\n")) {
        if (!is_option_of_run(line) || count > OPTIONS)
            die(1, "%s: '%s' is not an option of a run: give --model and all others", path, line);
        arguments[count++] = line;
    }
    retrofit_note("going on with the options in %s", path);
    return retrofit_options(count, arguments, option_table, OPTIONS, "", NULL, NULL);
}

// The paper's numbers are the defaults, but for those that depend on the model or must be given.
static void set_defaults(void) {
    const retrofit_optimizer *optimizer = &retrofit_paper_training.optimizer;
    training = retrofit_paper_training;
    training.steps = 0;
    training.mean_recurrence = SIZE_MAX; // the model's
    training.backprop_depth = SIZE_MAX;  // the model's
    options.seed = training.seed;
    options.curriculum = training.curriculum;
    options.optimizer = optimizer->kind;
    options.beta1 = shortest_decimal(optimizer->beta1);
    options.beta2 = shortest_decimal(optimizer->beta2);
    options.weight_decay = shortest_decimal(optimizer->weight_decay);
    options.clip = shortest_decimal(optimizer->clip);
    remember_defaults();
}

// OUT may be missing still. A file of that name is told from it before files are looked for in it.
static void check_out_is_directory(void) {
    struct stat status;
    if (!options.out || stat(options.out, &status) || S_ISDIR(status.st_mode)) return;
    die(1, "--out %s: not a directory: give the run another name", options.out);
}

// Returns -1 to go on, or an exit code.
static int read_options(int argc, char **argv) {
    static const char usage[] =
        "train --model DIR --data 'GLOB' --out DIR --steps N [options]\n"
        "Trains a recurrent model made by convert, or a plain one as the baseline.\n";
    int code = retrofit_options(argc, argv, option_table, OPTIONS, usage, NULL, NULL);
    if (code >= 0) return code;
    if (options.resume_anyway) options.resume = true;
    if (options.resume && !options.out) die(2, "--resume: --out is needed, where the run is");
    check_out_is_directory();
    if (options.resume && !options.model) {
        code = take_up_options(argv[0]);
        if (code < 0) code = retrofit_options(argc, argv, option_table, OPTIONS, usage, NULL, NULL);
        if (code >= 0) return code;
    }
    if (!options.model || (!options.dry_run && (!options.data || !options.out)))
        die(2, "--model, --data, --out and --steps are needed (see --help)");
    bool as_many = !options.as_ranks && !run.taken_up && run.ranks.count > 1;
    if (as_many) options.as_ranks = run.ranks.count;
    return -1;
}

// All ranks read the same options: the first says what is wrong with them.
static int read_options_once(int argc, char **argv) {
    retrofit_silent = run.ranks.rank > 0;
    if (!retrofit_silent) return read_options(argc, argv);
    int nothing = open("/dev/null", O_WRONLY), errors = dup(STDERR_FILENO);
    dup2(nothing, STDOUT_FILENO);
    dup2(nothing, STDERR_FILENO);
    int code = read_options(argc, argv);
    dup2(errors, STDERR_FILENO);
    close(errors);
    close(nothing);
    return code;
}

static void read_config(void) {
    run.source = retrofit_model_directory(options.model, run.model_path);
    require(retrofit_config_read(&run.config, run.source));
}

// --fixed-recurrences n,k sets the mean and the depth too.
static void read_fixed_recurrences(void) {
    const char *text = options.fixed_recurrences;
    size_t n, k;
    int end = 0;
    if (retrofit_is_plain(&run.config))
        die(2, "--fixed-recurrences: %s has no recurrence", options.model);
    bool ok = strspn(text, "0123456789,") == strlen(text); // sscanf would take signs and spaces
    ok = ok && sscanf(text, "%zu,%zu%n", &n, &k, &end) == 2 && text[end] == 0;
    ok = ok && k > 0 && n <= MAX_RECURRENCES / 2 && k <= MAX_RECURRENCES / 2;
    if (!ok)
        die(2, "--fixed-recurrences is n,k like 4,8: n without gradients, k from 1 on with, "
            "not '%s'", text);
    training.fixed_n = n;
    training.fixed_k = k;
    training.mean_recurrence = n + k;
    training.backprop_depth = k;
}

// Options that were left out and depend on the model or on each other.
static void complete_options(void) {
    const retrofit_config *config = &run.config;
    if (!options.batch_size) options.batch_size = options.micro_batch_size;
    if (!options.seq_len) options.seq_len = retrofit_min(config->context, 1024);
    if (!options.as_ranks) options.as_ranks = 1;
    bool zero = !training.mean_recurrence || !training.backprop_depth;
    if (zero) die(2, "--mean-recurrence and --backprop-depth are at least 1");
    if (training.mean_recurrence == SIZE_MAX) training.mean_recurrence = config->mean_recurrence;
    if (training.backprop_depth == SIZE_MAX) training.backprop_depth = config->backprop_depth;
    if (options.fixed_recurrences) read_fixed_recurrences();
}

static void check_ranges(void) {
    const struct {
        const char *name;
        double value, low, high;
    } ranges[] = {
        {"lr", training.lr, 0, 1e3},
        {"muon-lr", training.muon_lr, 0, 1e3},
        {"weight-decay", options.weight_decay, 0, 1e3},
        {"beta1", options.beta1, 0, 0.999999},
        {"beta2", options.beta2, 0, 0.9999999},
        {"clip", options.clip, 0, 1e9},
        {"warmup", training.warmup, 0, 1},
        {"cooldown", training.cooldown, 0, 1},
        {"min-lr-ratio", training.min_lr_ratio, 0, 1},
        {"curriculum-warmup", training.curriculum_warmup, 0, 1},
        {"depth-warmup", training.depth_warmup, 0, 1},
        {"flops", options.flops, 0, 1e300},
        {"time-limit", options.time_limit, 0, 1e9},
        {"save-before", options.save_before, 0, 1e9},
        {"patience", options.patience, 0.01, 1e9},
        {"gpu-memory", options.gpu_memory, 0, 1e9},
        {"gpu-tflops", options.gpu_tflops, 0, 1e9},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        double value = ranges[i].value, low = ranges[i].low, high = ranges[i].high;
        if (!(value >= low && value <= high))
            die(2, "--%s %g is not between %g and %g", ranges[i].name, value, low, high);
    }
}

static void check_batches(void) {
    size_t batch = options.batch_size, micro = options.micro_batch_size;
    if (!training.steps) die(2, "--steps is needed: how many optimizer steps?");
    if (batch > MAX_BATCH_SIZE) die(2, "--batch-size is at most %d", MAX_BATCH_SIZE);
    if (!micro || batch % micro)
        die(2, "--batch-size %zu is not a multiple of --micro-batch-size %zu", batch, micro);
    size_t ranks = retrofit_max(1, run.ranks.count), parts = options.as_ranks;
    if (batch / micro % ranks || batch / micro % parts)
        die(2, "--batch-size %zu is %zu micro-batches of %zu: not a multiple of %zu ranks", batch,
            batch / micro, micro, batch / micro % ranks ? ranks : parts);
    if (options.seq_len > run.config.context)
        die(2, "--seq-len %zu is more than the model's context of %zu", options.seq_len,
            run.config.context);
    if (training.mean_recurrence > MAX_RECURRENCES || training.backprop_depth > MAX_RECURRENCES)
        die(2, "--mean-recurrence and --backprop-depth are at most %d", MAX_RECURRENCES);
}

// Options that were given, but have no effect beside the others. A value that is the default counts
// as not given.
static void note_idle_options(void) {
    const retrofit_training *usual = &retrofit_paper_training;
    bool plain = retrofit_is_plain(&run.config), evaluates = options.val || options.sample_prompts;
    bool R = training.mean_recurrence != SIZE_MAX, K = training.backprop_depth != SIZE_MAX;
    bool curriculum = options.curriculum != (int)usual->curriculum;
    bool curriculum_warmup = training.curriculum_warmup != usual->curriculum_warmup;
    bool depth = training.depth_warmup != usual->depth_warmup;
    const char *fixed = options.fixed_recurrences;
    const struct {
        bool idle;
        const char *option, *why;
    } cases[] = {
        {options.eval_every && !evaluates, "eval-every", "without --val or --sample-prompts"},
        {options.eval_rows != 64 && !options.val, "eval-rows", "without --val"},
        {options.sample_tokens != 32 && !options.sample_prompts, "sample-tokens",
         "without --sample-prompts"},
        {training.muon_lr != usual->muon_lr && options.optimizer != RETROFIT_MUON, "muon-lr",
         "but with --optimizer muon"},
        {R && plain, "mean-recurrence", "on a plain model"},
        {K && plain, "backprop-depth", "on a plain model"},
        {curriculum && plain, "curriculum", "on a plain model"},
        {depth && plain, "depth-warmup", "on a plain model"},
        {training.throttle && plain, "throttle", "on a plain model"},
        {options.state_init && plain, "state-init", "on a plain model"},
        {options.eval_recurrences != default_recurrences && plain, "eval-recurrences",
         "on a plain model"},
        {options.eval_recurrences != default_recurrences && !evaluates, "eval-recurrences",
         "without --val or --sample-prompts"},
        {R && fixed, "mean-recurrence", "beside --fixed-recurrences"},
        {K && fixed, "backprop-depth", "beside --fixed-recurrences"},
        {curriculum && fixed, "curriculum", "beside --fixed-recurrences"},
        {curriculum_warmup && fixed, "curriculum-warmup", "beside --fixed-recurrences"},
        {depth && fixed, "depth-warmup", "beside --fixed-recurrences"},
        {curriculum_warmup && options.curriculum == RETROFIT_CURRICULUM_NONE, "curriculum-warmup",
         "with --curriculum none"},
        {training.depth_start != usual->depth_start && !depth, "depth-start",
         "without --depth-warmup"},
        {options.save_before != 5 && !options.time_limit, "save-before", "without --time-limit"},
    };
    if (training.warmup + training.cooldown > 1)
        retrofit_note("--warmup %g and --cooldown %g overlap: the learning rate never reaches its "
                      "peak", training.warmup, training.cooldown);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (cases[i].idle) retrofit_note("--%s has no effect %s", cases[i].option, cases[i].why);
    }
}

// Whether a GPU is named that need not be here.
static bool names_gpu(void) { return options.gpu_memory > 0 || options.gpu_tflops > 0; }

static void check_options(void) {
    bool plain = retrofit_is_plain(&run.config);
    size_t context = run.config.context;
    check_batches();
    check_ranges();

    if (!retrofit_sizes(options.eval_recurrences, eval_recurrences, MAX_EVALS, &eval_count))
        die(2, "--eval-recurrences: %s", retrofit_error());
    if (training.depth_start < 1 || training.depth_start > training.backprop_depth)
        die(2, "--depth-start %zu is not between 1 and --backprop-depth %zu", training.depth_start,
            training.backprop_depth);
    if (options.train && plain)
        die(2, "--train %s: %s is a plain model, it has neither adapter nor core",
            train_names[options.train], options.model);
    if (names_gpu() && !options.dry_run)
        die(2, "--gpu-memory and --gpu-tflops are for --dry-run alone");
    if (names_gpu() && options.device == RETROFIT_ON_CPU)
        die(2, "--gpu-memory and --gpu-tflops: not with --device cpu");
    if (options.sample_prompts && (!options.sample_tokens || options.sample_tokens > context))
        die(2, "--sample-tokens is from 1 to the model's context of %zu", context);
    if (!options.eval_rows) die(2, "--eval-rows is at least 1");
    if (!options.keep) die(2, "--keep is at least 1");
    if (!options.max_bad_steps) die(2, "--max-bad-steps is at least 1");
    if (options.time_limit > 0 && options.time_limit <= options.save_before)
        die(2, "--time-limit %g leaves no time to train: saving begins --save-before %g minutes "
            "earlier", options.time_limit, options.save_before);

    if (plain) {
        eval_recurrences[0] = 0;
        eval_count = 1;
    }
}

// The rest of `training`. sigma is set once the model is loaded.
static void fill_training(void) {
    static const float eps[] = {1e-8f, 1e-10f, 1e-6f}; // AdamW's, of AdamW beside Muon, AdamW*'s
    retrofit_optimizer *optimizer = &training.optimizer;
    training.accumulate = options.batch_size / options.micro_batch_size;
    training.ranks = options.as_ranks;
    run.ranks.patience = 60 * options.patience;
    training.curriculum = options.curriculum;
    training.mode = RETROFIT_TRAINING + options.train;
    training.seed = options.seed;
    optimizer->kind = options.optimizer;
    optimizer->beta1 = (float)options.beta1;
    optimizer->beta2 = (float)options.beta2;
    optimizer->eps = eps[options.optimizer];
    optimizer->weight_decay = (float)options.weight_decay;
    optimizer->clip = (float)options.clip;
    optimizer->peak_lr = (float)training.lr;
}

// ---- When to stop ------------------------------------------------------------------------------

static bool on_terminal;                    // stderr is one: a signal is answered there
static double start_time;                   // when the program began; all times are in seconds
static double seconds_per_flop;             // of the slowest step
static double seconds_to_save;              // what the last checkpoint took
static double seconds_to_evaluate;          // what the last evaluation took; 0: there was none yet

// A second signal ends the program at once, unless nohup has it ignored.
static void on_signal(int number) {
    static const char text[] = "\nstopping after this step; once more ends at once\n";
    if (on_terminal && write(STDERR_FILENO, text, sizeof text - 1) < 0) on_terminal = false;
    caught_signal = number;
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    if (number == SIGHUP) signal(SIGHUP, SIG_DFL);
}

// Under nohup a terminal that closes is no reason to stop.
static void catch_signals(void) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART}, before;
    on_terminal = isatty(STDERR_FILENO);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    bool ignored = !sigaction(SIGHUP, NULL, &before) && before.sa_handler == SIG_IGN;
    if (!ignored) sigaction(SIGHUP, &action, NULL);
    if (run.ranks.count > 1) sigaction(SIGUSR1, &action, NULL); // mpirun hands this one on
}

// Whether to stop now: a signal came, or work of so many FLOPs would end after saving must begin.
static bool should_stop(double flops) {
    if (caught_signal) return true;
    if (options.time_limit == 0) return false;
    double reserve = fmax(60 * options.save_before, seconds_to_save);
    double left = 60 * options.time_limit - reserve - (retrofit_seconds() - start_time);
    return left < 0 || flops * seconds_per_flop > left;
}

// Whether all that was asked for is done after so many steps, which took so many FLOPs.
static bool is_end(size_t step, double flops) {
    if (step >= training.steps) return true;
    return options.flops > 0 && flops >= options.flops;
}

// Whether any of the ranks says yes. They wait for each other here.
static bool any_rank(bool yes) {
    require(ranks_exchange(&run.ranks, run.ops, yes));
    for (size_t i = 0; i < run.ranks.count; i++)
        if (ranks_state.numbers[i] != 0) return true;
    return false;
}

static bool finished(void) { return is_end(progress.step, progress.flops); }

static bool evaluation_due(void) {
    if (!options.val && !options.sample_prompts) return false;
    return finished() || (options.eval_every && progress.step % options.eval_every == 0);
}

// ---- The cost of steps to come -----------------------------------------------------------------

// What steps take by the draws that they will make.
typedef struct {
    double flops, paper_flops;
    size_t largest_draw;   // the most recurrences n + k of a micro-batch
    size_t at;             // the first step that has them, counted from 1
} cost;

// Of the steps [first, end), counted from 0.
static cost cost_of_steps(size_t first, size_t end) {
    const retrofit_config *config = &run.config;
    size_t T = options.seq_len;
    double tokens = (double)(options.micro_batch_size * T);
    cost sum = {0, 0, 0, 0};
    for (size_t step = first; step < end; step++) {
        retrofit_plan plan = retrofit_plan_step(&training, config, step);
        for (size_t j = 0; j < training.accumulate; j++) {
            size_t n, k;
            retrofit_plan_draw(&training, &plan, step, j, &n, &k);
            sum.flops += retrofit_flops_per_token(config, training.mode, T, n, k) * tokens;
            sum.paper_flops += retrofit_paper_flops_per_token(config, n, k) * tokens;
            if (n + k > sum.largest_draw) {
                sum.largest_draw = n + k;
                sum.at = step + 1;
            }
        }
    }
    return sum;
}

// How many steps are to be done, and what they take.
static void plan_rest(void) {
    double flops = progress.flops;
    run.end_step = progress.step;
    while (!is_end(run.end_step, flops)) {
        flops += cost_of_steps(run.end_step, run.end_step + 1).flops;
        run.end_step++;
    }
    run.planned_flops = flops - progress.flops;
}

// Muon's learning rate as it is shown: 0 where Muon takes no part.
static double shown_muon_lr(const retrofit_plan *plan) {
    return options.optimizer == RETROFIT_MUON ? (double)plan->muon_lr : 0;
}

// ---- Validation --------------------------------------------------------------------------------

// Where a long evaluation is.
static void show_evaluation(const char *what, size_t done, size_t count) {
    char text[128];
    if (!retrofit_live_line_due()) return;
    end_live_line();
    snprintf(text, sizeof text, "step %zu: evaluation, %s %zu of %zu", progress.step, what,
             done + 1, count);
    retrofit_live_line(text);
}

// Adds the sum of the losses of rows first … first + b - 1 to loss[i], at the i-th of the
// recurrences, and returns how many labels it is over. Rows and start states are the same in every
// validation. A deeper state goes on from the one before it in the list; where the list goes down
// again, it starts anew.
static size_t validate_rows(size_t first, size_t b, double *loss) {
    retrofit_buffers *buffers = run.buffers;
    int32_t *tokens = buffers->host_tokens, *labels = buffers->host_labels;
    size_t T = options.seq_len, done = 0;
    for (size_t i = 0; i < b; i++)
        require(retrofit_data_row(run.val, first + i, tokens + i * T, labels + i * T));
    size_t counted = retrofit_count_labels(labels, b * T);

    require(retrofit_prelude(buffers, tokens, b, T));
    for (size_t i = 0; i < eval_count; i++) {
        size_t r = eval_recurrences[i];
        if (i == 0 || r < done) {
            if (r > 0) retrofit_init_state(buffers, training.sigma, first);
            done = 0;
        }
        retrofit_recur(buffers, r - done, 0);
        done = r;
        retrofit_coda(buffers);
        loss[i] += retrofit_loss(buffers, labels, 0) * (double)counted;
    }
    return counted;
}

// Prints the mean losses and logs them.
static void report_validation(const double *loss, size_t labels) {
    end_live_line();
    fprintf(stderr, "step %zu: validation loss", progress.step);
    fprintf(run.log, "{\"step\":%zu,\"val\":{", progress.step);
    for (size_t i = 0; i < eval_count; i++) {
        double mean = loss[i] / (double)labels;
        if (eval_recurrences[i] > 0) fprintf(stderr, "  r=%zu", eval_recurrences[i]);
        fprintf(stderr, " %.4f", mean);
        fprintf(run.log, "%s\"%zu\":", i ? "," : "", eval_recurrences[i]);
        log_number("%.6f", mean);
    }
    fputc('\n', stderr);
    fputs("}}\n", run.log);
}

// Returns false if the run is to stop: then nothing is logged, and the next run validates.
static bool validate(void) {
    double loss[MAX_EVALS] = {0};
    size_t rows = retrofit_min(retrofit_data_rows(run.val), options.eval_rows);
    size_t micro = options.micro_batch_size, labels = 0;
    for (size_t first = 0; first < rows; first += micro) {
        if (should_stop(0)) return false;
        show_evaluation("row", first, rows);
        labels += validate_rows(first, retrofit_min(rows - first, micro), loss);
    }
    report_validation(loss, labels);
    return true;
}

// ---- Samples: what the model makes of the same prompts, at several recurrences -----------------

typedef struct {
    char *text;
    int32_t *ids; // with room for --sample-tokens more
    size_t count; // ids of the text
} prompt;

static struct {
    retrofit_tokenizer *tokenizer;
    prompt *prompts;
    size_t count;
    retrofit_buffers *buffers; // with a KV cache
} samples;

static void add_prompt(const char *line) {
    const char *file = options.sample_prompts;
    size_t count, context = run.config.context, vocab = run.config.vocab;
    int32_t *ids = retrofit_encode(samples.tokenizer, line, strlen(line), true, &count);
    if (!ids) die(1, "%s: %s", file, retrofit_error());
    if (!count || count + options.sample_tokens > context) {
        die(1, "%s: prompt %zu has %zu tokens; with --sample-tokens %zu the model's context of %zu "
            "does not hold it", file, samples.count + 1, count, options.sample_tokens, context);
    }
    for (size_t i = 0; i < count; i++) {
        if ((size_t)ids[i] >= vocab)
            die(1, "%s: token %d is beyond the model's vocabulary of %zu", file, (int)ids[i],
                vocab);
    }

    prompt *prompts = realloc(samples.prompts, (samples.count + 1) * sizeof *prompts);
    char *text = strdup(line);
    ids = realloc(ids, (count + options.sample_tokens) * sizeof *ids);
    if (!prompts || !text || !ids) die(1, "out of memory");
    prompts[samples.count] = (prompt){text, ids, count};
    samples.prompts = prompts;
    samples.count++;
}

static void open_samples(void) {
    size_t size, longest = 0, deepest = 0;
    char *text = retrofit_read_file(options.sample_prompts, &size);
    if (text) samples.tokenizer = retrofit_tokenizer_load(run.source);
    if (!samples.tokenizer) die(1, "--sample-prompts: %s", retrofit_error());
    const char *begin = text;
    retrofit_skip_mark(&begin, &size);
    char *rest = text + (begin - text);
    require(retrofit_check_utf8(rest, size, options.sample_prompts));
    for (char *line = strtok(rest, "\r\n"); line; line = strtok(NULL, "\r\n")) add_prompt(line);
    free(text);
    if (!samples.count) die(1, "%s: there is no prompt in it", options.sample_prompts);

    for (size_t i = 0; i < samples.count; i++)
        longest = retrofit_max(longest, samples.prompts[i].count);
    for (size_t i = 0; i < eval_count; i++) deepest = retrofit_max(deepest, eval_recurrences[i]);
    size_t capacity = longest + options.sample_tokens;
    retrofit_kv_cache cache = {.capacity = capacity, .recurrences = deepest};
    samples.buffers = retrofit_buffers_new(run.model, 1, longest, 0, RETROFIT_KEEP_NOTHING, &cache);
    require(samples.buffers);
}

static bool ends_text(int32_t id) {
    const retrofit_config *config = &run.model->config;
    for (size_t i = 0; i < config->eos_count; i++) {
        if (config->eos[i] == id) return true;
    }
    return false;
}

// Continues a prompt by the likeliest tokens, in its ids; *count: all of them. Returns false if the
// run is to stop.
static bool continue_prompt(const prompt *p, size_t r, size_t *count) {
    size_t vocab = retrofit_min(run.config.vocab, retrofit_tokenizer_size(samples.tokenizer));
    size_t n = p->count, cached = 0, end = p->count + options.sample_tokens;
    retrofit_recurrence_options how = {.recurrences = r, .sigma = training.sigma};
    how.seed = training.seed;
    retrofit_clear_cache(samples.buffers);
    for (bool ended = false; n < end && !ended; n++) {
        if (should_stop(0)) return false;
        const int32_t *new_ids = p->ids + cached;
        const float *logits =
            retrofit_next_logits(samples.buffers, new_ids, 1, n - cached, NULL, &how);
        require(logits);
        cached = n;
        p->ids[n] = retrofit_argmax(logits, vocab);
        ended = ends_text(p->ids[n]);
    }
    *count = n;
    return true;
}

// Prints what a prompt became and logs it. The prompt is decoded with its continuation and cut off
// again: alone, the first new token would lose its space.
static void report_sample(const prompt *p, size_t r, size_t count) {
    size_t size, prompt_size;
    char *all = retrofit_decode(samples.tokenizer, p->ids, count, true, &size);
    char *before = retrofit_decode(samples.tokenizer, p->ids, p->count, true, &prompt_size);
    require(all && before);
    const char *text = all + retrofit_min(prompt_size, size);

    fprintf(run.log, "{\"step\":%zu,\"sample\":{\"prompt\":", progress.step);
    retrofit_json_write_string(run.log, p->text, strlen(p->text));
    fprintf(run.log, ",\"recurrences\":%zu,\"text\":", r);
    retrofit_json_write_string(run.log, text, strlen(text));
    fputs("}}\n", run.log);

    end_live_line();
    fprintf(stderr, "step %zu: r=%zu: %s|", progress.step, r, p->text);
    for (const char *c = text; *c; c++) // on one line, whatever the model wrote
        fputc((unsigned char)*c < ' ' || *c == 127 ? ' ' : *c, stderr);
    fputc('\n', stderr);
    free(all);
    free(before);
}

// Returns false if the run is to stop.
static bool sample(void) {
    for (size_t i = 0; i < samples.count * eval_count; i++) { // each prompt at each depth
        const prompt *p = &samples.prompts[i / eval_count];
        size_t count, r = eval_recurrences[i % eval_count];
        show_evaluation("text", i, samples.count * eval_count);
        if (!continue_prompt(p, r, &count)) return false;
        report_sample(p, r, count);
    }
    return true;
}

static void close_samples(void) {
    for (size_t i = 0; i < samples.count; i++) {
        free(samples.prompts[i].text);
        free(samples.prompts[i].ids);
    }
    free(samples.prompts);
    retrofit_buffers_free(samples.buffers);
    retrofit_tokenizer_free(samples.tokenizer);
}

// Samples and validation. Their last line in the log, "val" or "sampled", says that both are done:
// a run that was stopped before it does both again. Returns false if the run is to stop.
static bool evaluate(void) {
    if (run.ranks.rank > 0) return true; // the first does it
    double begin = retrofit_seconds();
    if (options.sample_prompts && !sample()) return false;
    if (run.val && !validate()) return false;
    seconds_to_evaluate = retrofit_seconds() - begin;
    if (!run.val)
        fprintf(run.log, "{\"step\":%zu,\"sampled\":%zu}\n", progress.step, samples.count);
    flush_log();
    return true;
}

// ---- Numbers that go wrong ---------------------------------------------------------------------

// The first parameter whose gradient is not finite, or NULL.
static const char *find_bad_gradient(void) {
    const retrofit_model *model = run.model;
    for (size_t i = 0; i < model->parameter_count; i++) {
        const retrofit_parameter *p = model->parameters[i];
        if (p->frozen) continue;
        double squares = retrofit_sum_squares(model, p->grad, p->rows * p->cols);
        if (!isfinite(squares)) return p->source[0].name;
    }
    return NULL;
}

// A norm far above the average is reported. In the next average it counts as ten times this one at
// most, so that the next outlier is reported too.
static void check_norm(double norm) {
    double average = progress.mean_norm;
    double ratio = average > 0 ? norm / average : 1;
    if (ratio > 10)
        message("step %zu: the gradient's norm, %.3g, is %.0f times its average", progress.step,
                norm, ratio);
    progress.mean_norm = average > 0 ? average * (0.95 + 0.05 * fmin(ratio, 10)) : norm;
}

// A step whose loss or gradient was not finite has changed nothing. Too many in a row end the run.
static void check_step(const retrofit_step *step) {
    if (isfinite(step->norm)) {
        progress.skipped_in_a_row = 0;
        check_norm(step->norm);
        return;
    }
    char what[256];
    const char *bad = find_bad_gradient();
    double loss = isnan(step->loss) ? NAN : step->loss; // printf would show the sign of a NaN
    snprintf(what, sizeof what, "step %zu: the loss is %g, %s%s", progress.step, loss,
             bad ? "not finite is the gradient of " : "every gradient is finite", bad ? bad : "");
    progress.skipped++;
    progress.skipped_in_a_row++;
    if (progress.skipped_in_a_row >= options.max_bad_steps) {
        die(1, "%s: %zu bad steps in a row: --resume-anyway with a lower --lr", what,
            progress.skipped_in_a_row);
    }
    message("%s: skipped (%zu in a row, %zu end the run)", what, progress.skipped_in_a_row,
            options.max_bad_steps);
}

// ---- Manifests: what each file of a checkpoint was when it was made ----------------------------

// The file's size and retrofit_hash_bytes in hexadecimal digits.
static bool hash_file(const char *path, size_t *size, char hash[17]) {
    static char bytes[1 << 16];
    uint64_t h = RETROFIT_HASH_START;
    FILE *f = retrofit_open_file(path, size);
    if (!f) return false;
    *size = 0;
    for (size_t n; (n = fread(bytes, 1, sizeof bytes, f)) > 0; *size += n)
        h = retrofit_hash_bytes(h, bytes, n);
    bool ok = !ferror(f);
    if (!ok) retrofit_fail("%s: %s", path, strerror(errno));
    fclose(f);
    snprintf(hash, 17, "%016llx", (unsigned long long)h);
    return ok;
}

static void free_entries(struct dirent **entries, int count) {
    for (int i = 0; i < count; i++) free(entries[i]);
    if (count >= 0) free(entries);
}

static int is_visible(const struct dirent *entry) { return entry->d_name[0] != '.'; }

static bool write_manifest_entry(FILE *f, const char *directory, const char *name, bool first) {
    char path[RETROFIT_PATH], hash[17];
    size_t size;
    if (!retrofit_path(path, directory, name) || !hash_file(path, &size, hash)) return false;
    fprintf(f, "%s\n    {\"name\": \"%s\", \"size\": %zu, \"hash\": \"%s\"}", first ? "" : ",",
            name, size, hash);
    return true;
}

// Lists all files that are in the directory now.
static bool write_manifest(const char *directory) {
    char path[RETROFIT_PATH];
    if (!retrofit_path(path, directory, "manifest.json")) return false;
    struct dirent **entries;
    int count = scandir(directory, &entries, is_visible, alphasort);
    FILE *f = count > 0 ? fopen(path, "wb") : NULL;
    bool ok = f != NULL;
    if (!ok) {
        retrofit_fail("%s: %s", path, strerror(errno));
        goto done;
    }
    fprintf(f, "{\n  \"step\": %zu,\n  \"files\": [", progress.step);
    for (int i = 0; ok && i < count; i++)
        ok = write_manifest_entry(f, directory, entries[i]->d_name, i == 0);
    fprintf(f, "\n  ]\n}\n");
    ok = retrofit_finish_file(f, path, ok);
done:
    free_entries(entries, count);
    return ok;
}

// Whether a file is what the manifest says of it. false or error.
static bool check_manifest_entry(const retrofit_json *entry, const char *directory,
                                 const char *manifest) {
    const retrofit_json *name = retrofit_json_get(entry, "name");
    const retrofit_json *size = retrofit_json_get(entry, "size");
    const retrofit_json *hash = retrofit_json_get(entry, "hash");
    char path[RETROFIT_PATH], found_hash[17];
    size_t found_size;
    if (!name || !name->string || !size || !hash || !hash->string)
        return retrofit_fail("%s: a file without name, size and hash", manifest);
    if (!retrofit_path(path, directory, name->string)) return false;
    if (!hash_file(path, &found_size, found_hash)) return false;
    if ((double)found_size == size->number && !strcmp(found_hash, hash->string)) return true;
    return retrofit_fail("%s: damaged: %zu bytes with hash %s, the manifest says %.0f with %s",
                         path, found_size, found_hash, size->number, hash->string);
}

// Whether all files of a checkpoint are as they were written. false or error, which names the file.
static bool check_manifest(const char *directory) {
    char path[RETROFIT_PATH];
    if (!retrofit_path(path, directory, "manifest.json")) return false;
    retrofit_json *root = retrofit_json_read(path, NULL);
    const retrofit_json *files = retrofit_json_get(root, "files");
    bool ok = root != NULL;
    if (ok && !(files && files->child))
        ok = retrofit_fail("%s: names no files: not written by train", path);
    for (const retrofit_json *f = ok ? files->child : NULL; ok && f; f = f->next)
        ok = check_manifest_entry(f, directory, path);
    retrofit_json_free(root);
    return ok;
}

// ---- Checkpoints: OUT/step_00000100, and OUT/latest, a link that always names a whole one ------

static int is_checkpoint(const struct dirent *entry) {
    return !strncmp(entry->d_name, "step_", 5);
}

static void checkpoint_name(char name[32], size_t step) {
    snprintf(name, 32, "step_%08zu", step);
}

static size_t checkpoint_step(const char *name) { return strtoul(name + 5, NULL, 10); }

// One that is still being written has the name step_00000100.tmp-PID.
static bool is_temporary(const char *name) { return strchr(name, '.') != NULL; }

static int newest_first(const struct dirent **a, const struct dirent **b) {
    size_t x = checkpoint_step((*a)->d_name), y = checkpoint_step((*b)->d_name);
    if (x != y) return x < y ? 1 : -1;
    return strcmp((*a)->d_name, (*b)->d_name);
}

// Removes all but the --keep newest checkpoints up to progress.step, whose own OUT/latest links to;
// also what a run that was killed left: half a checkpoint, or one that was not yet linked to.
static void prune(void) {
    char path[RETROFIT_PATH];
    struct dirent **entries;
    int count = scandir(options.out, &entries, is_checkpoint, newest_first);
    size_t kept = 0;
    for (int i = 0; i < count; i++) {
        const char *name = entries[i]->d_name;
        bool whole = !is_temporary(name) && checkpoint_step(name) <= progress.step;
        if (whole && kept < options.keep) kept++;
        else if (retrofit_path(path, options.out, name)) retrofit_directory_abandon(path);
    }
    free_entries(entries, count);
}

// The newest checkpoint that is intact, but for the one of this name, which may be NULL. Sets path.
// The name, or NULL.
static const char *find_intact(const char *except, char path[RETROFIT_PATH]) {
    struct dirent **entries;
    const char *found = NULL;
    int count = scandir(options.out, &entries, is_checkpoint, newest_first);
    for (int i = 0; i < count && !found; i++) {
        const char *name = entries[i]->d_name;
        if (is_temporary(name) || (except && !strcmp(name, except))) continue;
        if (!retrofit_path(path, options.out, name) || !check_manifest(path)) continue;
        found = strrchr(path, '/') + 1;
    }
    free_entries(entries, count);
    return found;
}

// The name of the newest checkpoint, as OUT/latest says it; "latest" if that is a copy.
static void newest_name(char name[RETROFIT_PATH]) {
    ssize_t size = readlink(run.latest, name, RETROFIT_PATH - 1);
    const char *slash = strrchr(run.newest, '/');
    if (size >= 0) name[size] = 0;
    else snprintf(name, RETROFIT_PATH, "%s", slash ? slash + 1 : run.newest);
}

// Ends the program if OUT/latest is damaged, and says which older checkpoint is not.
static void check_latest(void) {
    char path[RETROFIT_PATH], linked[RETROFIT_PATH], error[1024];
    if (check_manifest(run.newest)) return;
    snprintf(error, sizeof error, "%s", retrofit_error());
    newest_name(linked);
    const char *intact = find_intact(linked, path);
    if (intact)
        die(1, "%s; %s is intact: rm %s && echo %s >%s, then --resume", error, path, run.latest,
            intact, run.latest);
    die(1, "%s; no other checkpoint in %s is intact: begin anew with another --out", error,
        options.out);
}

// ---- Hyperparameters: what must not change between a run and its continuation ------------------

enum { HYPERPARAMETERS_SIZE = 1024 };

static unsigned long long hash_of(const char *text) {
    return text ? retrofit_sample_hash(text, strlen(text)) : 0;
}

// As name=value, separated by spaces; of data, model and tokenizer a hash.
static void describe_hyperparameters(char text[HYPERPARAMETERS_SIZE]) {
    const retrofit_training *t = &training;
    const size_t size = HYPERPARAMETERS_SIZE;
    text[0] = 0;
    append(text, size, "steps=%zu batch-size=%zu micro-batch-size=%zu", t->steps,
           options.batch_size, options.micro_batch_size);
    if (t->ranks > 1) append(text, size, ",as-ranks=%zu", t->ranks);
    append(text, size, " seq-len=%zu", options.seq_len);
    append(text, size, " train=%s optimizer=%s throttle=%d", train_names[options.train],
           optimizer_names[options.optimizer], t->throttle);
    append(text, size, " lr=%.9g muon-lr=%.9g", t->lr, t->muon_lr);
    append(text, size, " weight-decay=%.9g", options.weight_decay);
    append(text, size, " beta1=%.9g beta2=%.9g clip=%.9g", options.beta1, options.beta2,
           options.clip);
    append(text, size, " warmup=%.9g cooldown=%.9g min-lr-ratio=%.9g", t->warmup, t->cooldown,
           t->min_lr_ratio);
    append(text, size, " mean-recurrence=%zu backprop-depth=%zu", t->mean_recurrence,
           t->backprop_depth);
    append(text, size, " depth-warmup=%.9g depth-start=%zu", t->depth_warmup, t->depth_start);
    append(text, size, " curriculum=%s curriculum-warmup=%.9g",
           curriculum_names[options.curriculum], t->curriculum_warmup);
    if (t->fixed_k) append(text, size, " fixed-recurrences=%zu,%zu", t->fixed_n, t->fixed_k);
    else append(text, size, " fixed-recurrences=none");
    append(text, size, " state-init=%s seed=%zu shuffle=%d", options.state_init ? "zero" : "normal",
           options.seed, options.shuffle);
    append(text, size, " data-rows=%zu device=%.4s precision=%s", run.data_rows, run.ops->name,
           run.ops->act_type == RETROFIT_BF16 ? "bf16" : "fp32");
    append(text, size, " model=%016llx tokenizer=%016llx", (unsigned long long)run.model_hash,
           (unsigned long long)run.tokenizer_hash);
    append(text, size, " data=%016llx", hash_of(run.data_shards));
    if (run.val_shards) append(text, size, " val=%016llx", hash_of(run.val_shards));
    else append(text, size, " val=none");
}

// Where the pair behind this one begins.
static const char *next_pair(const char *pair) {
    pair += strcspn(pair, " ");
    return *pair == ' ' ? pair + 1 : pair;
}

// The value that a text has for `name`, whose n bytes end with '='; "none" if it has none.
static const char *find_value(const char *text, const char *name, size_t n) {
    for (const char *pair = text; *pair; pair = next_pair(pair)) {
        if (!strncmp(pair, name, n)) return pair + n;
    }
    return "none";
}

// Lists what is not in `ours` as it was in `theirs`. Returns whether there is anything.
static bool list_changes(const char *theirs, const char *ours, char *list, size_t size) {
    size_t used = 0;
    list[0] = 0;
    for (const char *pair = ours; *pair; pair = next_pair(pair)) {
        size_t n = strcspn(pair, "=") + 1;
        const char *is = pair + n, *was = find_value(theirs, pair, n);
        size_t is_length = strcspn(is, " "), was_length = strcspn(was, " ");
        if (is_length == was_length && !strncmp(is, was, is_length)) continue;
        int added = snprintf(list + used, size - used, "%s--%.*s was %.*s, is %.*s",
                             used ? "; " : "", (int)n - 1, pair, (int)was_length, was,
                             (int)is_length, is);
        used = retrofit_min(used + (size_t)added, size - 1);
    }
    return used > 0;
}

// ---- Saving ------------------------------------------------------------------------------------

// Of model.safetensors and optimizer.safetensors: fp32, and 1280 bytes for a parameter's headers.
// A parameter that Muon updates has one moment, another two.
static double checkpoint_bytes(const retrofit_model *model) {
    double bytes = 4 * (double)model->weight_count;
    for (size_t i = 0; i < model->parameter_count; i++) {
        const retrofit_parameter *p = model->parameters[i];
        double moments = retrofit_by_muon(p, training.optimizer.kind) ? 4 : 8;
        if (p->frozen) moments = 0;
        bytes += moments * (double)(p->rows * p->cols) + 1280;
    }
    return bytes;
}

// Whether the disk has room for a checkpoint, before anything is written. false or error.
static bool check_disk(void) {
    // Of the files that are copied from the source the large ones.
    const char *names[] = {"tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"};
    char path[RETROFIT_PATH];
    struct statvfs disk;
    struct stat file;
    double need = checkpoint_bytes(run.model) + 1e5;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (retrofit_path(path, run.source, names[i]) && stat(path, &file) == 0)
            need += (double)file.st_size;
    }
    if (statvfs(options.out, &disk) != 0) return true;
    double available = (double)disk.f_bavail * (double)disk.f_frsize;
    if (available >= need) return true;
    return retrofit_fail("%s: a checkpoint needs %.0f bytes, %.0f are free: make room",
                         options.out, need, available);
}

// A step's update can overflow though its gradient did not. false or error.
static bool check_finite(const char *directory, const char *name) {
    char path[RETROFIT_PATH];
    retrofit_map file;
    if (!retrofit_path(path, directory, name)) return false;
    if (!retrofit_safetensors_open(&file, path)) return false;
    size_t infinite, zeros;
    retrofit_safetensors_survey(&file, true, &infinite, &zeros);
    bool ok = infinite == file.count;
    if (!ok)
        retrofit_fail("step %zu: %s of %s holds nan or infinity: not saved; try a lower --lr",
                      progress.step, file.tensors[infinite].name, name);
    retrofit_safetensors_close(&file);
    return ok;
}

// The moments, and in the file's metadata the progress and the hyperparameters.
static bool save_optimizer(const char *directory) {
    char step[32], flops[32], skipped[32], in_a_row[32], norm[32], paper_flops[32];
    char hyperparameters[HYPERPARAMETERS_SIZE];
    snprintf(step, sizeof step, "%zu", progress.step);
    snprintf(flops, sizeof flops, "%.17g", progress.flops);
    snprintf(skipped, sizeof skipped, "%zu", progress.skipped);
    snprintf(in_a_row, sizeof in_a_row, "%zu", progress.skipped_in_a_row);
    snprintf(norm, sizeof norm, "%.17g", progress.mean_norm);
    snprintf(paper_flops, sizeof paper_flops, "%.17g", progress.paper_flops);
    describe_hyperparameters(hyperparameters);
    const char *metadata[] = {
        "step", step, "flops", flops, "skipped", skipped, "bad_in_a_row", in_a_row,
        "norm", norm, "paper_flops", paper_flops, "recipe", hyperparameters,
        "data", run.data_shards, run.val_shards ? "val" : NULL, run.val_shards, NULL,
    };
    return ranks_save_optimizer(run.model, directory, metadata);
}

// A checkpoint gets the tokenizer's files as they lie there when it is written.
static void check_tokenizer_is_same(void) {
    if (!run.tokenizer_hash) return;
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(run.source);
    if (!tokenizer || retrofit_tokenizer_hash(tokenizer) != run.tokenizer_hash)
        message("step %zu: the tokenizer in %s changed during the run: the checkpoint gets it as "
                "it is now; put the old one into it", progress.step, run.source);
    retrofit_tokenizer_free(tokenizer);
}

// Writes a checkpoint's files. The log is flushed with them, so that it never lacks their steps.
static bool write_checkpoint(const char *directory) {
    check_tokenizer_is_same();
    if (!retrofit_save(run.model, directory, RETROFIT_F32, run.source)) return false;
    if (!save_optimizer(directory)) return false;
    if (!check_finite(directory, "model.safetensors")) return false;
    if (!check_finite(directory, "optimizer.safetensors")) return false;
    if (!write_manifest(directory)) return false;
    if (fsync(fileno(run.log)) != 0) return retrofit_fail("%s: %s", run.log_path, strerror(errno));
    return true;
}

static bool write_whole_file(const char *path, const char *text, size_t size) {
    FILE *file = fopen(path, "wb");
    if (!file) return retrofit_fail("%s: %s", path, strerror(errno));
    fwrite(text, 1, size, file);
    return retrofit_finish_file(file, path, true);
}

// Writes the name of a checkpoint to a file, on file systems that have no links.
static bool write_name(const char *path, const char *name) {
    char line[64];
    int size = snprintf(line, sizeof line, "%s\n", name);
    return write_whole_file(path, line, (size_t)size);
}

// Gives a file or link its final name; where that fails, removes it. false or error.
static bool move_into_place(const char *temporary, const char *final) {
    if (rename(temporary, final) == 0) return true;
    retrofit_fail("%s: %s", final, strerror(errno));
    unlink(temporary);
    return false;
}

static bool write_options(void) {
    char path[RETROFIT_PATH], temporary[RETROFIT_PATH];
    if (!retrofit_path(path, options.out, "options.txt")) return false;
    if (!retrofit_path(temporary, options.out, "options.txt.tmp")) return false;
    return write_whole_file(temporary, run.options.bytes, run.options.size) &&
           move_into_place(temporary, path);
}

// Lets OUT/latest name the checkpoint, in one step. false or error.
static bool link_latest(const char *name) {
    char temporary[RETROFIT_PATH];
    if (!retrofit_path(temporary, options.out, "latest.tmp")) return false;
    unlink(temporary);
    if (run.links && symlink(name, temporary))
        return retrofit_fail("%s: %s", run.latest, strerror(errno));
    if (!run.links && !write_name(temporary, name)) return false;
    return move_into_place(temporary, run.latest) && retrofit_path(run.newest, options.out, name);
}

// A kill at any moment leaves the checkpoint before, or this one, whole and linked to: files are
// written to a temporary directory, it is renamed, the link changes, and older ones go last. false
// or error; then the checkpoint before is untouched.
static bool save(void) {
    double begin = retrofit_seconds();
    char name[32], path[RETROFIT_PATH];
    if (!ranks_gather_moments(run.model)) return false;
    if (run.ranks.rank > 0) {
        run.saved_step = progress.step;
        return true;
    }
    checkpoint_name(name, progress.step);
    bool ok = retrofit_path(path, options.out, name) && check_disk();
    char *temporary = ok ? retrofit_directory_begin(path) : NULL;
    ok = temporary != NULL;
    if (ok) {
        retrofit_directory_abandon(path); // of a run that was killed before it could link to it
        ok = write_checkpoint(temporary) && retrofit_directory_commit(temporary, path);
        if (!ok) retrofit_directory_abandon(temporary);
        ok = ok && link_latest(name);
        if (!ok) retrofit_directory_abandon(path);
    }
    free(temporary);
    ok = ok && retrofit_sync_directory(options.out);
    if (!ok) return false;
    prune();
    run.saved_step = progress.step;
    seconds_to_save = retrofit_seconds() - begin;
    return true;
}

// Ends the program where a checkpoint cannot be written.
static void save_or_die(void) {
    if (save()) return;
    run.training = false; // to save once more would fail as well
    die(1, "%s (the checkpoint before is untouched)", retrofit_error());
}

// ---- Resuming ----------------------------------------------------------------------------------

static const char *read_metadata(const retrofit_map *file, const char *key) {
    const char *value = retrofit_safetensors_metadata(file, key);
    if (!value) die(1, "%s: no %s: not written by train", file->path, key);
    return value;
}

// The first shard that is not in both descriptions, as "; NAME differs"; "" if all are.
static const char *first_changed_shard(const char *theirs, const char *ours, char text[300]) {
    text[0] = 0;
    if (!theirs || !ours) return text;
    while (*theirs && *ours) {
        size_t n = strcspn(theirs, "\n") + 1, m = strcspn(ours, "\n") + 1;
        if (n != m || strncmp(theirs, ours, n)) break;
        theirs += n;
        ours += m;
    }
    const char *line = *ours ? ours : theirs;
    if (*line)
        snprintf(text, 300, "; the first shard that differs: %.*s", (int)strcspn(line, "\n"),
                 line);
    return text;
}

// The model that a run began with may have been removed since: the checkpoint has all that was its.
static void forgive_missing_model(const char *theirs) {
    const char *name = " model=", *hash = strstr(theirs, name);
    if (run.model_hash || !hash) return;
    retrofit_note("%s: there are no weights any more: the run goes on with the checkpoint's, and "
                  "cannot see whether it began with these", options.model);
    run.model_hash = strtoull(hash + strlen(name), NULL, 16);
}

// Ends the program if the hyperparameters, the data, the model or the tokenizer are not those of
// the checkpoint, or says which are not.
static void check_hyperparameters(const retrofit_map *file) {
    char ours[HYPERPARAMETERS_SIZE], list[4 * HYPERPARAMETERS_SIZE], data[300], val[300];
    const char *theirs = read_metadata(file, "recipe");
    forgive_missing_model(theirs);
    describe_hyperparameters(ours);
    if (!list_changes(theirs, ours, list, sizeof list)) return;
    first_changed_shard(retrofit_safetensors_metadata(file, "data"), run.data_shards, data);
    first_changed_shard(retrofit_safetensors_metadata(file, "val"), run.val_shards, val);
    if (!options.resume_anyway)
        die(1, "--resume: another run: %s%s%s (--resume-anyway goes on with these)", list, data,
            val);
    message("--resume-anyway: %s%s%s", list, data, val);
    if (strstr(list, "--model was"))
        retrofit_note("the weights are the checkpoint's, not those of --model %s", options.model);
}

// A number of the progress: finite, and not negative.
static double read_number(const retrofit_map *file, const char *key) {
    const char *text = read_metadata(file, key);
    char *end;
    double x = strtod(text, &end);
    if (*text < '0' || *text > '9' || *end || !isfinite(x))
        die(1, "%s: %s is '%.40s', not a number: damaged", file->path, key, text);
    return x;
}

// A number of steps: whole, and at most `max`.
static size_t read_steps(const retrofit_map *file, const char *key, size_t max) {
    double x = read_number(file, key);
    if (x > (double)max || x != floor(x))
        die(1, "%s: %s is %g, not a number of steps up to %zu: damaged", file->path, key, x, max);
    return (size_t)x;
}

// A checkpoint's name and its metadata say the same step: prune goes by the names.
static void check_step_of_name(void) {
    char name[32], newest[RETROFIT_PATH];
    checkpoint_name(name, progress.step);
    newest_name(newest);
    if (strcmp(newest, name) && strcmp(newest, "latest"))
        die(1, "%s/%s: holds step %zu: rename it to %s, and let %s name that", options.out, newest,
            progress.step, name, run.latest);
}

static void read_progress(void) {
    char path[RETROFIT_PATH];
    retrofit_map file;
    require(retrofit_path(path, run.newest, "optimizer.safetensors"));
    require(retrofit_safetensors_open(&file, path));
    progress.step = read_steps(&file, "step", (size_t)1 << 48);
    progress.flops = read_number(&file, "flops");
    progress.skipped = read_steps(&file, "skipped", progress.step);
    progress.skipped_in_a_row = read_steps(&file, "bad_in_a_row", progress.skipped);
    progress.mean_norm = read_number(&file, "norm");
    progress.paper_flops = read_number(&file, "paper_flops");
    check_step_of_name();
    check_hyperparameters(&file);
    retrofit_safetensors_close(&file);
}

static bool begins_with(const char *s, const char *with) { return !strncmp(s, with, strlen(with)); }

// Cuts log.jsonl back to progress.step, since later steps will be logged again. Returns whether it
// ends with that step's evaluation, which comes after the checkpoint; samples without the line that
// ends an evaluation are cut too.
static bool cut_log(void) {
    size_t size, kept = 0;
    bool evaluated = true; // a log without lines lacks none
    if (run.ranks.rank > 0) return evaluated;
    if (access(run.log_path, F_OK) && errno == ENOENT) return evaluated;
    char *log = retrofit_read_file(run.log_path, &size);
    require(log);
    char *line = log;
    while (*line) {
        size_t step = 0;
        char *end = strchr(line, '\n');
        if (!end) break;
        if (sscanf(line, "{\"step\":%zu", &step) == 1 && step > progress.step) break;
        const char *rest = line + strcspn(line, ",");
        evaluated = begins_with(rest, ",\"val\"") || begins_with(rest, ",\"sampled\"");
        evaluated = evaluated && step == progress.step;
        line = end + 1;
        if (step < progress.step || !begins_with(rest, ",\"sample\"")) kept = (size_t)(line - log);
    }
    if (truncate(run.log_path, (off_t)kept) != 0) die(1, "%s: %s", run.log_path, strerror(errno));
    free(log);
    return evaluated;
}

// Takes up the progress and the moments of the newest checkpoint.
static void resume(void) {
    retrofit_map file;
    read_progress();
    require(retrofit_load_optimizer(run.model, &file, run.newest));
    retrofit_safetensors_close(&file);
    run.evaluated = cut_log();
}

// ---- The lock: one run at a time in OUT; the kernel releases it, however the run ends ----------

static char lock_path[RETROFIT_PATH]; // empty while there is none

static void unlock_output(void) { unlink(lock_path); }

// Whether the open file is the one at the path. A run that has just ended may have removed it.
static bool is_file_at(int fd, const char *path) {
    struct stat ours, theirs;
    return fstat(fd, &ours) == 0 && stat(path, &theirs) == 0 && ours.st_ino == theirs.st_ino;
}

static void lock_output(void) {
    char path[RETROFIT_PATH];
    if (*lock_path || run.ranks.rank > 0) return;
    require(retrofit_path(path, options.out, "lock"));
    for (;;) {
        struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
        int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
        if (fd < 0) die(1, "%s: %s", path, strerror(errno));
        bool locked = fcntl(fd, F_SETLK, &lock) == 0;
        if (locked && is_file_at(fd, path)) break; // fd stays open: closing it would end the lock
        if (!locked && errno != EACCES && errno != EAGAIN)
            die(1, "%s: cannot be locked: %s", path, strerror(errno));
        if (!locked && fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK)
            die(1, "%s: process %ld trains there: wait for its end, or give another --out", path,
                (long)lock.l_pid);
        close(fd);
    }
    strcpy(lock_path, path);
    atexit(unlock_output);
}

// ---- Memory ------------------------------------------------------------------------------------

// What a training takes, in bytes.
typedef struct {
    size_t weights, gradients, moments, activations, all;
} memory;

// With micro-batches of so many rows. The model has no memory yet.
static memory memory_needed(size_t micro, retrofit_keep keep) {
    retrofit_model *model = run.model;
    memory need;
    retrofit_training_bytes(model, training.mode, training.optimizer.kind, &need.weights,
                            &need.gradients, &need.moments);
    need.activations = retrofit_buffers_bytes(&model->config, run.ops, micro, options.seq_len,
                                              training.backprop_depth, keep);
    if (need.activations == SIZE_MAX)
        die(1, "--micro-batch-size %zu, --seq-len %zu: %s", micro, options.seq_len,
            retrofit_error());
    need.all = need.weights + need.gradients + need.moments + need.activations;
    return need;
}

// The largest micro-batch that fits and divides the batch, or 0.
static size_t fitting_micro_batch(size_t available, retrofit_keep keep) {
    for (size_t micro = options.micro_batch_size; micro > 0; micro--) {
        if (options.batch_size % micro != 0) continue;
        if (memory_needed(micro, keep).all <= available) return micro;
    }
    return 0;
}

// Ends a run that would not fit before it begins, and says what would: smaller micro-batches of the
// same batch, with --recompute if need be.
static void check_memory(void) {
    size_t available = run.ops->free_memory();
    size_t need = memory_needed(options.micro_batch_size, run.keep).all;
    if (need <= available) return;
    double need_gb = (double)need / 1e9, available_gb = (double)available / 1e9;

    for (int keep = run.keep; keep <= RETROFIT_KEEP_INPUTS; keep++) {
        size_t micro = fitting_micro_batch(available, keep);
        if (micro == 0) continue;
        die(1, "training needs %.3g GB, %.3g GB are free: "
            "--batch-size %zu --micro-batch-size %zu%s would fit (%.3g GB)",
            need_gb, available_gb, options.batch_size, micro,
            keep == RETROFIT_KEEP_INPUTS ? " --recompute" : "",
            (double)memory_needed(micro, keep).all / 1e9);
    }
    die(1, "training needs %.3g GB, %.3g GB are free, and no micro-batch fits: "
        "try a shorter --seq-len or smaller --backprop-depth", need_gb, available_gb);
}

// ---- A GPU that is not here, for --dry-run: what is to be rented? ------------------------------

static double planned_peak(void) { return options.gpu_tflops * 1e12; }

static size_t planned_memory(void) {
    return options.gpu_memory > 0 ? (size_t)(options.gpu_memory * 1e9) : SIZE_MAX;
}

// A table without operations: what a training takes follows from its types. Those of retrofit_cuda
// and of retrofit_cuda_fp32.
static const retrofit_ops planned_gpu[2] = {
    {.name = "cuda", .act_type = RETROFIT_BF16, .max_head_dim = 128,
     .peak_flops = planned_peak, .free_memory = planned_memory},
    {.name = "cuda-fp32", .act_type = RETROFIT_F32, .max_head_dim = 128,
     .peak_flops = planned_peak, .free_memory = planned_memory},
};

static bool is_planned(void) { return run.ops >= planned_gpu && run.ops < planned_gpu + 2; }

// ---- Dry run -----------------------------------------------------------------------------------

static void print_hyperparameters(void) {
    enum { PER_LINE = 6 };
    char text[HYPERPARAMETERS_SIZE];
    size_t column = 0;
    describe_hyperparameters(text);
    printf("options");
    for (char *word = strtok(text, " "); word; word = strtok(NULL, " ")) {
        printf(column % PER_LINE ? "  %s" : "\n  %s", word);
        column++;
    }
    printf("\n");
}

// How many numbers of each part Muon updates, another optimizer updates, nothing does.
static void print_parameters(void) {
    static const char *const part_names[RETROFIT_PARTS + 1] = {
        "embedding", "prelude", "adapter", "core", "coda", "final norm", "head", "all",
    };
    enum { BY_MUON, BY_OTHER, FROZEN, COLUMNS };
    size_t table[RETROFIT_PARTS + 1][COLUMNS] = {{0}}; // the last row: all of them
    for (size_t i = 0; i < run.model->parameter_count; i++) {
        const retrofit_parameter *p = run.model->parameters[i];
        int column = retrofit_by_muon(p, training.optimizer.kind) ? BY_MUON : BY_OTHER;
        if (p->frozen) column = FROZEN;
        table[p->part][column] += p->rows * p->cols;
        table[RETROFIT_PARTS][column] += p->rows * p->cols;
    }

    int other = options.optimizer == RETROFIT_MUON ? RETROFIT_ADAMW : options.optimizer;
    printf("parameters                 by muon  by %-9s         frozen\n", optimizer_names[other]);
    for (int i = 0; i <= RETROFIT_PARTS; i++) {
        const size_t *row = table[i];
        if (row[BY_MUON] + row[BY_OTHER] + row[FROZEN] == 0) continue;
        printf("  %-12s %15zu %15zu %15zu\n", part_names[i], row[BY_MUON], row[BY_OTHER],
               row[FROZEN]);
    }
}

static void print_memory(memory need) {
    size_t depth = retrofit_is_plain(&run.config) ? 0 : training.backprop_depth;
    printf("memory on %s\n", run.device);
    printf("  weights      %10.3f GB\n", (double)need.weights / 1e9);
    printf("  gradients    %10.3f GB\n", (double)need.gradients / 1e9);
    printf("  optimizer    %10.3f GB\n", (double)need.moments / 1e9);
    printf("  activations  %10.3f GB  (micro-batch %zu x %zu, depth %zu: any draw)\n",
           (double)need.activations / 1e9, options.micro_batch_size, options.seq_len, depth);
    printf("  all          %10.3f GB", (double)need.all / 1e9);
    if (run.ops->free_memory() < SIZE_MAX)
        printf(", %.3f GB %s", (double)run.ops->free_memory() / 1e9,
               is_planned() ? "has the GPU, of which CUDA itself needs some" : "are free");
    printf("\n");
    printf("checkpoint     %10.3f GB on disk, %zu of them and one in the making\n",
           checkpoint_bytes(run.model) / 1e9, options.keep);
}

// FLOP/s of a matrix product of this model's shape: what a step can hope for. Rounds of 1, 2, 3, …
// products are timed for half a second; the first two rounds warm up and do not count.
static double measure_speed(void) {
    const retrofit_ops *ops = run.ops;
    size_t N = retrofit_min(options.micro_batch_size * options.seq_len, 4096);
    size_t d = run.config.n_embd, O = 2 * run.config.intermediate;
    size_t size = retrofit_type_size(ops->act_type);
    char *x = ops->alloc((N * d + O * d + N * O) * size);
    require(x);
    retrofit_live_line("measuring how fast this device multiplies matrices");
    retrofit_weight w = {x + N * d * size, ops->act_type, d};
    char *y = x + (N * d + O * d) * size;

    double begin = 0, seconds = 0, flops = 0;
    for (size_t count = 1; seconds < 0.5; count++) {
        for (size_t i = 0; i < count; i++) ops->matmul_forward(y, x, w, N, d, O);
        float first;
        ops->download(&first, x, sizeof first); // waits for the products
        if (count == 2) begin = retrofit_seconds();
        if (count <= 2) continue;
        seconds = retrofit_seconds() - begin;
        flops += 2 * (double)(count * N * d * O);
    }
    ops->free(x);
    retrofit_live_line(NULL);
    return flops / seconds;
}

static void print_duration(double seconds) {
    double hours = seconds / 3600;
    if (hours < 1) printf("%.0f s", seconds);
    else if (hours < 24) printf("%.1f hours", hours);
    else printf("%.1f days", hours / 24);
}

// Training reaches some share of a GPU's peak, seldom more than half.
static void print_planned_time(double flops) {
    double peak = run.ops->peak_flops();
    if (peak == 0) {
        printf("time           --gpu-tflops N, a GPU's peak, says how long it takes\n");
        return;
    }
    printf("time           ");
    for (int percent = 30; percent <= 50; percent += 10) {
        print_duration(flops / (peak * percent / 100));
        printf(" at %d %%%s", percent, percent < 50 ? ", " : "");
    }
    printf(" of %.4g TFLOP/s\n", peak / 1e12);
}

// FLOPs of Muon in a step, which neither count has: of each matrix (r,c) or (c,r), r <= c, five
// iterations of Newton-Schulz, with one triangle of X·Xᵀ and of M², and B·X.
static double muon_flops(void) {
    double flops = 0;
    for (size_t i = 0; i < run.model->parameter_count; i++) {
        const retrofit_parameter *p = run.model->parameters[i];
        if (p->frozen || !retrofit_by_muon(p, training.optimizer.kind)) continue;
        double r = (double)retrofit_min(p->rows, p->cols);
        double c = (double)retrofit_max(p->rows, p->cols);
        flops += 5 * (r * r * c + r * r * r + 2 * r * r * c);
    }
    return flops;
}

static void print_cost(void) {
    cost all = cost_of_steps(0, training.steps);
    double muon = (double)training.steps * muon_flops();
    printf("training       %10.3g FLOPs (%.3g as the paper counts them), "
           "%zu steps of %zu tokens (%zu micro-batches)\n",
           all.flops, all.paper_flops, training.steps, options.batch_size * options.seq_len,
           training.accumulate);
    if (all.largest_draw)
        printf("               the largest draw is %zu recurrences, in step %zu\n",
               all.largest_draw, all.at);
    if (muon > 0)
        printf("               Muon takes %.3g FLOPs more, %.3g %% of all, as many in each step\n",
               muon, 100 * muon / (all.flops + muon));
    if (is_planned()) {
        print_planned_time(all.flops + muon);
        return;
    }
    double speed = measure_speed();
    printf("time           about ");
    print_duration((all.flops + muon) / speed);
    printf(" at best: this device multiplies matrices of this model at %.3g TFLOP/s\n",
           speed / 1e12);
}

// Where --flops ends the run.
static void print_end(void) {
    plan_rest();
    printf("--flops %g: ends after step %zu of %zu, with %.3g FLOPs spent\n", options.flops,
           run.end_step, training.steps, progress.flops + run.planned_flops);
}

// 24 steps of the schedule, evenly spread, with their first micro-batches.
static void print_schedule(void) {
    enum { LINES = 24, MICRO_BATCHES = 6 };
    size_t S = training.steps, shown = retrofit_min(training.accumulate, MICRO_BATCHES);
    printf("\n%8s %6s %6s %12s %12s   (n,k) of the micro-batches\n", "step", "mean", "depth", "lr",
           "muon lr");
    for (size_t i = 1, step = 0; step < S; step = retrofit_max(step + 1, i++ * S / LINES)) {
        retrofit_plan plan = retrofit_plan_step(&training, &run.config, step);
        printf("%8zu %6zu %6zu %12.4e %12.4e  ", step + 1, plan.mean, plan.depth, (double)plan.lr,
               shown_muon_lr(&plan));
        for (size_t j = 0; j < shown; j++) {
            size_t n, k;
            retrofit_plan_draw(&training, &plan, step, j, &n, &k);
            printf(" %zu,%zu", n, k);
        }
        printf("%s\n", shown < training.accumulate ? " …" : "");
    }
}

// --dry-run=schedule: every micro-batch.
static void print_micro_batches(void) {
    printf("step micro_batch mean_recurrence depth n k lr muon_lr\n");
    for (size_t step = 0; step < training.steps; step++) {
        retrofit_plan plan = retrofit_plan_step(&training, &run.config, step);
        for (size_t j = 0; j < training.accumulate; j++) {
            size_t n, k;
            retrofit_plan_draw(&training, &plan, step, j, &n, &k);
            printf("%zu %zu %zu %zu %zu %zu %.7g %.7g\n", step + 1, j + 1, plan.mean, plan.depth,
                   n, k, (double)plan.lr, shown_muon_lr(&plan));
        }
    }
}

static void dry_run(void) {
    memory need = memory_needed(options.micro_batch_size, run.keep); // freezes parameters
    print_hyperparameters();
    print_parameters();
    print_memory(need);
    if (run.data) {
        double rows = (double)training.steps * (double)options.batch_size;
        printf("data           %zu rows of %zu tokens, read %.2f times\n", run.data_rows,
               options.seq_len, rows / (double)run.data_rows);
    }
    print_cost();
    if (options.flops > 0) print_end();
    if (training.fixed_k)
        printf("--fixed-recurrences %zu,%zu in every micro-batch, without draws or a curriculum\n",
               training.fixed_n, training.fixed_k);
    print_schedule();
    require(retrofit_flush_stdout());
    check_memory();
}

// ---- How long the rest takes -------------------------------------------------------------------

// How often there will still be what comes every so many steps (0: never) and at the end; that of
// the step just made is still to come.
static size_t times_left(size_t every) {
    if (!every || progress.step >= run.end_step) return 1;
    return 1 + (run.end_step - 1) / every - (progress.step - 1) / every;
}

// What a validation takes at the speed of the steps: a guess until one was measured. The prelude
// counts at each of the recurrences, although it is computed once.
static double guess_validation_seconds(void) {
    if (!run.val) return 0;
    size_t T = options.seq_len, done = 0;
    size_t rows = retrofit_min(retrofit_data_rows(run.val), options.eval_rows);
    double per_token = 0;
    for (size_t i = 0; i < eval_count; i++) {
        size_t r = eval_recurrences[i];
        if (r < done) done = 0;
        per_token += retrofit_flops_per_token(&run.config, RETROFIT_INFERENCE, T, r - done, 0);
        done = r;
    }
    return per_token * (double)(rows * T) * run.step_seconds / run.spent_flops;
}

// Steps, evaluations and checkpoints that are to come, each by what it took so far.
static double seconds_left(void) {
    double flops_left = fmax(0, run.planned_flops - run.spent_flops);
    double seconds = flops_left * run.step_seconds / run.spent_flops;
    seconds += (double)times_left(options.save_every) * seconds_to_save;
    if (!options.val && !options.sample_prompts) return seconds;
    double evaluation = seconds_to_evaluate > 0 ? seconds_to_evaluate : guess_validation_seconds();
    return seconds + (double)times_left(options.eval_every) * evaluation;
}

// ---- What is said of a step --------------------------------------------------------------------

// FLOP/s, and what share of the device's peak they are if that is known.
static void format_speed(char text[64], double speed) {
    double peak = run.ops->peak_flops();
    bool tera = speed >= 1e12;
    int n = snprintf(text, 64, "%.1f %cFLOP/s", speed / (tera ? 1e12 : 1e9), tera ? 'T' : 'G');
    if (peak > 0) snprintf(text + n, 64 - (size_t)n, " (%.0f %% of peak)", 100 * speed / peak);
}

// The learning rate of most parameters, by its option's name.
static const char *main_rate(const retrofit_plan *plan, double *rate) {
    bool muon = options.optimizer == RETROFIT_MUON;
    *rate = (double)(muon ? plan->muon_lr : plan->lr);
    return muon ? "muon-lr" : "lr";
}

enum { STEP_LINE_SIZE = 512 };

// Adds a part to the line of a step if there is room for all of it: a number must not be cut.
__attribute__((format(printf, 3, 4))) static void append_part(char text[STEP_LINE_SIZE],
                                                              size_t room, const char *format,
                                                              ...) {
    size_t used = strlen(text);
    va_list args;
    va_start(args, format);
    vsnprintf(text + used, STEP_LINE_SIZE - used, format, args);
    va_end(args);
    if (strlen(text) > room) text[used] = 0;
}

// A terminal has one line, which every step replaces. Its parts come in the order of what one wants
// to know first, and those that a narrow terminal has no room for are left out. A file gets the
// first and the last step, and between them a line every two seconds.
static void show_step(const retrofit_step *step, double seconds) {
    static double last_shown;
    const retrofit_plan *plan = &step->plan;
    bool terminal = isatty(STDERR_FILENO);
    bool always = terminal || progress.step == 1 || finished();
    if (!always && retrofit_seconds() - last_shown < 2) return;
    last_shown = retrofit_seconds();

    char text[STEP_LINE_SIZE] = {0}, speed[64];
    double rate, tokens = (double)(options.batch_size * options.seq_len);
    size_t left = (size_t)(seconds_left() + .5);
    size_t room = retrofit_min(retrofit_live_columns(), STEP_LINE_SIZE - 1);
    const char *rate_name = main_rate(plan, &rate);
    format_speed(speed, step->flops / seconds);

    append_part(text, room, "step %zu/%zu", progress.step, training.steps);
    append_part(text, room, "  loss %.4f", step->loss);
    append_part(text, room, "  ETA %zu:%02zu:%02zu", left / 3600, left / 60 % 60, left % 60);
    append_part(text, room, "  %.0f tok/s", tokens / seconds);
    append_part(text, room, "  %s %.1e", rate_name, rate);
    if (plan->mean > 0)
        append_part(text, room, "  n,k %zu,%zu  r %zu", step->n, step->k, plan->mean);
    append_part(text, room, "  |g| %.2f", step->norm);
    append_part(text, room, "  %s", speed);
    retrofit_live_line(text);
    step_shown = terminal;
}

// What is not plain in that line, once.
static void explain_step_line(void) {
    if (retrofit_is_plain(&run.config)) {
        message("|g|: the gradient's norm before clipping");
        return;
    }
    message("n,k: recurrences without and with gradient; r: their mean now; |g|: the gradient's "
            "norm before clipping");
}

// One line of JSON. The states are those of the last micro-batch, s_n … s_{n+k}.
static void log_step(const retrofit_step *step, double seconds) {
    const retrofit_plan *plan = &step->plan;
    FILE *log = run.log;
    fprintf(log, "{\"step\":%zu,\"loss\":", progress.step);
    log_number("%.7g", step->loss);
    fprintf(log, ",\"grad_norm\":");
    log_number("%.7g", step->norm);
    fprintf(log, ",\"mean_recurrence\":%zu,\"n\":%zu,\"k\":%zu", plan->mean, step->n, step->k);
    fprintf(log, ",\"lr\":%.7g,\"muon_lr\":%.7g", (double)plan->lr, shown_muon_lr(plan));
    fprintf(log, ",\"throttle\":%.7g", training.throttle ? step->mean_k : 1);
    fprintf(log, ",\"tokens\":%zu", progress.step * options.batch_size * options.seq_len);
    fprintf(log, ",\"flops\":%.7g,\"paper_flops\":%.7g", progress.flops, progress.paper_flops);
    fprintf(log, ",\"skipped\":%zu,\"seconds\":%.3f", progress.skipped, seconds);

    fprintf(log, ",\"state_rms\":[");
    size_t states = retrofit_state_rms(run.buffers, run.state_rms);
    for (size_t i = 0; i < states; i++) {
        if (i > 0) fputc(',', log);
        log_number("%.4g", run.state_rms[i]);
    }
    fprintf(log, "]}\n");
    flush_log();
    if (states && !isfinite(run.state_rms[states - 1]))
        message("step %zu: the states of the recurrence are not finite, whatever the loss: the "
                "training has diverged; try a lower --lr", progress.step);
}

// ---- main: what happens, in order --------------------------------------------------------------

// The device, and on it the model without memory.
static void choose_device(void) {
    bool fp32 = options.precision == 1;
    if (!names_gpu()) run.ops = retrofit_device((retrofit_place)options.device, fp32, run.device);
    if (!run.ops && options.dry_run) { // --device auto always finds one
        run.ops = &planned_gpu[fp32];
        snprintf(run.device, sizeof run.device, "a GPU that is not here");
    }
    require(run.ops);
    if (options.precision != NOT_GIVEN && run.ops == &retrofit_cpu)
        retrofit_note("--precision has no effect on a CPU, which computes in fp32");
    run.keep = options.recompute ? RETROFIT_KEEP_INPUTS : RETROFIT_KEEP_ALL;
    run.model = retrofit_model_new(&run.config, run.ops);
    require(run.model);
}

// Where nobody has chosen threads or processors, the ranks of a machine share its processors.
static void start_ranks(void) {
    char meeting[RETROFIT_PATH];
#ifdef _OPENMP
    size_t all = (size_t)sysconf(_SC_NPROCESSORS_ONLN), given = (size_t)omp_get_num_procs();
    bool shared = run.ranks.count > 1 && given == all && !getenv("OMP_NUM_THREADS");
    if (shared) omp_set_num_threads((int)retrofit_max(1, given / run.ranks.local_count));
#endif
    snprintf(meeting, sizeof meeting, "%s.ranks", options.out);
    require(ranks_start(&run.ranks, run.ops, meeting));
    run.model->ranks = &run.ranks;
}

// Shards that another tokenizer made are refused.
static void check_tokenizer(void) {
    errno = 0;
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(run.source);
    require(tokenizer || !retrofit_machine_failed());
    if (tokenizer) {
        run.tokenizer_hash = retrofit_tokenizer_hash(tokenizer);
        retrofit_config_mend_ids(&run.config, tokenizer, run.source);
    }
    require(retrofit_data_check(run.data, tokenizer));
    if (run.val) require(retrofit_data_check(run.val, tokenizer));
    retrofit_tokenizer_free(tokenizer);
}

// All that could stop the run at some later step.
static void check_data(void) {
    check_tokenizer();
    require(retrofit_data_check_ids(run.data));
    require(retrofit_data_check_counted(run.data, run.data_rows));
    run.data_shards = retrofit_data_describe(run.data);
    require(run.data_shards);
    if (!run.val) return;
    require(retrofit_data_check_ids(run.val));
    require(retrofit_data_check_counted(run.val, options.eval_rows));
    require(retrofit_data_check_apart(run.data, run.val));
    run.val_shards = retrofit_data_describe(run.val);
    require(run.val_shards);
}

static int is_weights(const struct dirent *entry) {
    const char *name = entry->d_name, *end = strrchr(name, '.');
    return strcmp(name, "optimizer.safetensors") && end && !strcmp(end, ".safetensors");
}

// A hash of the files of weights of --model, by samples.
static void hash_model(void) {
    char path[RETROFIT_PATH];
    struct dirent **entries;
    int count = scandir(run.source, &entries, is_weights, alphasort);
    if (count < 0) die(1, "%s: %s", run.source, strerror(errno));
    for (int i = 0; i < count; i++) {
        size_t size;
        require(retrofit_path(path, run.source, entries[i]->d_name));
        void *data = retrofit_map_file(path, &size);
        require(data);
        run.model_hash = retrofit_hash(run.model_hash, retrofit_sample_hash(data, size));
        munmap(data, size);
    }
    free_entries(entries, count);
}

// A dry run needs no --data.
static void open_data(void) {
    size_t T = options.seq_len, V = run.config.vocab;
    if (options.data) {
        run.data = retrofit_data_open(options.data, T, V, options.shuffle, options.seed);
        require(run.data);
        run.data_rows = retrofit_data_rows(run.data);
    }
    if (options.val) {
        run.val = retrofit_data_open(options.val, T, V, false, 0);
        require(run.val);
        size_t rows = retrofit_data_rows(run.val);
        if (options.eval_rows > rows && options.eval_rows != 64)
            retrofit_note("--eval-rows %zu: --val has %zu", options.eval_rows, rows);
    }
    if (run.data) check_data();
    hash_model();
}

// Training settings of config.json that transformers would obey.
static void note_dropout(void) {
    char path[RETROFIT_PATH];
    require(retrofit_path(path, run.source, "config.json"));
    retrofit_json *json = retrofit_json_read(path, NULL);
    require(json);
    for (const retrofit_json *member = json->child; member; member = member->next) {
        if (strstr(member->key, "drop") && member->number > 0)
            retrofit_note("%s: %s is %s: train does without dropout, as the authors do", path,
                          member->key, member->string);
    }
    retrofit_json_free(json);
}

// A run that was copied by a program that leaves links out still has its checkpoints.
__attribute__((noreturn)) static void die_without_latest(void) {
    char path[RETROFIT_PATH];
    const char *intact = find_intact(NULL, path);
    if (intact)
        die(1, "--resume: %s names no checkpoint, but %s is intact: echo %s >%s, then --resume",
            run.latest, path, intact, run.latest);
    die(2, "--resume: there is no checkpoint in %s", options.out);
}

// Ends the program unless OUT is new, or holds a run and --resume is given. A new directory is made
// later, once all is well, so that a run that fails leaves nothing behind.
static void check_output(void) {
    char model[RETROFIT_PATH];
    require(retrofit_path(model, options.out, "config.json"));
    if (retrofit_is_there(model))
        die(2, "--out %s: is a model's directory: give the run one of its own", options.out);
    require(retrofit_path(run.latest, options.out, "latest"));
    require(retrofit_path(run.log_path, options.out, "log.jsonl"));
    if (access(options.out, F_OK) == 0) lock_output();
    if (retrofit_is_there(run.latest) && !options.resume)
        die(2, "%s holds a run already: give --resume to go on with it, or another --out",
            options.out);
    if (!retrofit_is_there(run.latest) && options.resume) die_without_latest();
    if (!options.resume) return;
    if (!retrofit_latest(options.out, run.newest) || !retrofit_is_there(run.newest))
        die_without_latest();
    check_latest();
}

// The model in memory, as it begins or as OUT/latest has it.
static void load_model(void) {
    check_memory();
    retrofit_free(run.model);
    if (options.resume) run.source = run.newest;
    retrofit_shows_shares = true;
    run.model = retrofit_load(run.source, run.ops, training.mode);
    retrofit_shows_shares = false; // while steps are shown, saving is not
    require(run.model);
    run.model->ranks = &run.ranks;
    require(retrofit_optimizer_init(run.model, training.optimizer.kind));

    retrofit_config *config = &run.model->config;
    training.sigma = options.state_init ? 0 : config->state_std;
    memcpy(config->eos, run.config.eos, sizeof config->eos);
    config->eos_count = run.config.eos_count;
    config->bos = run.config.bos;
    config->pad = run.config.pad;
    run.evaluated = true;
    if (options.resume) resume();
    run.first_step = progress.step;
    run.saved_step = progress.step;
    config->mean_recurrence = training.mean_recurrence; // as checkpoints have them
    config->backprop_depth = training.backprop_depth;
    config->trained_seq_len = options.seq_len;
    config->trained_state_zero = options.state_init && !retrofit_is_plain(config);
}

static void allocate_buffers(void) {
    size_t K = training.backprop_depth;
    run.buffers = retrofit_buffers_new(run.model, options.micro_batch_size, options.seq_len, K,
                                       run.keep, NULL);
    require(run.buffers);
    run.state_rms = retrofit_allocate(K + 1, sizeof *run.state_rms);
    require(run.state_rms);
}

static void remove_or_die(const char *path) {
    if (unlink(path) && errno != ENOENT) die(1, "%s: %s", path, strerror(errno));
}

// Tries what a checkpoint will need at the end: to write in OUT, and whether OUT can hold a link.
static void try_output(void) {
    char path[RETROFIT_PATH];
    require(retrofit_path(path, options.out, "latest.tmp"));
    remove_or_die(path);
    run.links = symlink("latest", path) == 0;
    bool unknown = errno == EPERM || errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL;
    if (!run.links && !unknown) die(1, "%s: %s", path, strerror(errno));
    if (!run.links) require(write_name(path, "latest"));
    if (!run.links)
        retrofit_note("%s: this file system has no symbolic links: OUT/latest will be a file with "
                      "the name of the newest checkpoint", options.out);
    remove_or_die(path);
}

// In a run that was copied without its links OUT/latest is a directory, a copy of the newest
// checkpoint. It becomes what it stands for, so that the next checkpoint can take its place.
static void mend_latest(void) {
    struct stat status;
    char name[32], path[RETROFIT_PATH];
    if (lstat(run.latest, &status) || !S_ISDIR(status.st_mode)) return;
    checkpoint_name(name, progress.step);
    require(retrofit_path(path, options.out, name));
    retrofit_directory_abandon(path); // the same once more
    if (rename(run.latest, path)) die(1, "%s: %s", run.latest, strerror(errno));
    require(link_latest(name));
}

static void open_output(void) {
    any_rank(false); // all have read what is there
    if (run.ranks.rank > 0) {
        run.log = fopen("/dev/null", "wb");
        require(run.log || retrofit_fail("/dev/null: %s", strerror(errno)));
        return;
    }
    char out[RETROFIT_PATH];
    snprintf(out, sizeof out, "%s", options.out);
    require(retrofit_make_directories(out, false));
    lock_output();
    if (!options.resume && retrofit_is_there(run.latest)) {
        die(2, "%s holds a run already, begun after this one: give another --out", options.out);
    }
    try_output();
    if (options.resume) mend_latest();
    if (options.resume) prune();
    require(write_options());
    // A run that ended before its first checkpoint begins anew.
    run.log = fopen(run.log_path, options.resume ? "ab" : "wb");
    if (!run.log) die(1, "%s: %s", run.log_path, strerror(errno));
}

// Says what is to be done, and makes up for an evaluation that the run before was stopped in.
static void begin_training(void) {
    plan_rest();
    run.train_start = retrofit_seconds();
    char of[96] = "";
    if (run.ranks.count > 1)
        snprintf(of, sizeof of, ", %zu ranks, the first with %.0f %% of the moments",
                 run.ranks.count, 100 * ranks_share(&run.ranks));
    message("%s%zu parameters, %zu rows of %zu tokens, %zu steps of %zu, %.3g FLOPs, on %s%s",
            run.first_step ? "resumed: " : "", run.model->weight_count, run.data_rows,
            options.seq_len, training.steps, options.batch_size * options.seq_len,
            run.planned_flops, run.device, of);
    if (finished()) {
        message("all steps are done already: nothing is left to train");
    } else {
        require(check_disk());
        explain_step_line();
    }
    if (evaluation_due() && !run.evaluated) run.evaluated = evaluate();
}

// One optimizer step: made, counted, checked, shown and logged.
static void train_step(void) {
    retrofit_step step;
    double begin = retrofit_seconds();
    size_t update = progress.step - progress.skipped + 1; // the optimizer counts what it does
    require(retrofit_training_step(run.buffers, run.data, &training, progress.step, update, &step));
    require(!run.ranks.failed);
    double seconds = retrofit_seconds() - begin;

    progress.step++;
    progress.flops += step.flops;
    progress.paper_flops += step.paper_flops;
    run.spent_flops += step.flops;
    run.step_seconds += seconds;
    seconds_per_flop = fmax(seconds_per_flop, seconds / step.flops);
    check_step(&step);
    show_step(&step, seconds);
    log_step(&step, seconds);
}

// The loop over steps. A run without a checkpoint takes its first step, even if the time is over.
static void train(void) {
    double next_flops = 0; // of the step to come
    while (!finished()) {
        if (any_rank(should_stop(next_flops)) && progress.step > 0) break;
        train_step();

        next_flops = cost_of_steps(progress.step, progress.step + 1).flops;
        bool save_now = any_rank(finished() || should_stop(next_flops));
        if (options.save_every && progress.step % options.save_every == 0) save_now = true;
        if (save_now) save_or_die();
        if (evaluation_due()) run.evaluated = !should_stop(0) && evaluate();
    }
    if (run.saved_step != progress.step) save_or_die(); // the run was stopped while it validated
}

static void report(void) {
    end_live_line();
    if (run.ranks.rank > 0) return;
    if (finished() && (run.evaluated || !evaluation_due())) {
        fprintf(stderr, "%s after %zu steps, %.3g FLOPs, %.0f s\n", run.latest, progress.step,
                progress.flops, retrofit_seconds() - run.train_start);
        return;
    }
    const char *reason = options.time_limit > 0 ? "--time-limit" : "a signal to another rank";
    if (caught_signal == SIGINT) reason = "SIGINT";
    if (caught_signal == SIGTERM) reason = "SIGTERM";
    if (caught_signal == SIGHUP) reason = "SIGHUP";
    if (caught_signal == SIGUSR1) reason = "SIGUSR1";
    fprintf(stderr, "train: %s: stopped after step %zu of %zu, saved in %s: --resume goes on\n",
            reason, progress.step, training.steps, run.latest);
}

static void close_run(void) {
    if (run.log && fclose(run.log) != 0)
        die(1, "%s: writing failed: %s", run.log_path, strerror(errno));
    close_samples();
    free(run.state_rms);
    retrofit_buffers_free(run.buffers);
    retrofit_free(run.model);
    retrofit_data_close(run.data);
    retrofit_data_close(run.val);
    free(run.data_shards);
    free(run.val_shards);
    free(run.options.bytes);
    free(run.taken_up);
    ranks_free(run.ops);
    if (run.ranks.end) run.ranks.end(0);
}

int main(int argc, char **argv) {
    retrofit_share_processors(argv);
    start_time = retrofit_seconds();
    retrofit_ranks_find(&run.ranks);
    set_defaults();
    int code = read_options_once(argc, argv);
    if (code >= 0) return code;
    remember_options();
    read_config();
    note_idle_options();
    complete_options();
    check_options();
    fill_training();
    choose_device();
    note_dropout();

    if (options.dry_run == DRY_RUN_SCHEDULE) {
        print_micro_batches();
        require(retrofit_flush_stdout());
        close_run();
        return 0;
    }
    open_data();
    if (options.dry_run) {
        dry_run();
        close_run();
        return 0;
    }

    catch_signals();
    start_ranks();
    check_output();
    load_model();
    allocate_buffers();
    if (options.sample_prompts && run.ranks.rank == 0) open_samples();
    open_output();

    begin_training();
    run.training = true;
    train();
    run.training = false;
    report();
    close_run();
    return 0;
}

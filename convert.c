// convert: makes what train and infer work on.
//
//     surgery        cuts a pretrained Llama into a recurrent model (section 3 of the paper)
//     from scratch   makes a random model of a given shape
//     token shards   turns text into the token ids that train reads
//
// The source of a surgery is a Hugging Face directory or a GGUF file, llama.cpp's format.
//
//     1  The command line      3  Writing a model      5  Token shards      7  GGUF's tokenizer
//     2  Surgery               4  From scratch         6  GGUF              8  main
//
// Surgery
//
// A Llama is an embedding, a stack of layers, a final norm and a head. Three lists say which of its
// layers become the prelude, which the core and which the coda. With --preset llama3.2 that is
//
//     source     0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
//     prelude    0  1  2  3
//     core                         6  7  8  9 10 11
//     coda                                           12 13 14 15
//
// Layers in no list (here 4 and 5) are gone. The paper takes the last layers before the coda for
// the core, and --preset names its choices; its ablations take evenly spaced layers or those that a
// pruning score keeps, so --prelude, --core and --coda accept any lists, in any order. A layer may
// stand in two of the lists; it is then copied to both places. --core auto measures on a text how
// much each layer does, and takes those that do most.
//
// The chosen layers are copied whole, and so are the embedding, the final norm and the head. Where
// the source ties its head to the embedding, the new model gets a head of its own with the same
// numbers. Only the adapter is new:
//
//     new model          source
//     wte                wte
//     prelude[i]         layer number i of the list --prelude
//     adapter (d,2d)     none: PyTorch's default, or [0 | I]; see new_adapter
//     core[i]            layer number i of the list --core
//     coda[i]            layer number i of the list --coda
//     ln_f               ln_f
//     lm_head            lm_head, or wte if they are tied
//
// config.json records the lengths of the three lists, the mean recurrence and the backpropagation
// depth to train with, and the σ of s_0; everything else in it is the source's. At the end the
// files are read back and compared with the source, bit for bit.
#define RETROFIT_IMPLEMENTATION
#include "retrofit.h"
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// =================================================================================================
// 1  The command line
// =================================================================================================

static struct {
    const char *from, *to, *prelude, *core, *coda, *random, *tokenizer, *field, *hf_code;
    const char *const *files; // [file_count] the arguments that are no options
    size_t file_count;
    int preset, adapter_init, dtype;              // which of the alternatives; -1: not given
    int encoding_errors;                          // the same
    size_t mean_recurrence, backprop_depth, seed; // SIZE_MAX: not given
    size_t text_tokens;                           // the same
    bool tokenize, text, report;
} options = {.preset = -1, .adapter_init = -1, .dtype = -1, .encoding_errors = -1,
             .mean_recurrence = SIZE_MAX, .backprop_depth = SIZE_MAX, .seed = SIZE_MAX,
             .text_tokens = SIZE_MAX};

enum { MAX_TEXT_TOKENS = 1 << 24 };         // --text-tokens
enum { ADAPTER_DEFAULT, ADAPTER_IDENTITY }; // --adapter-init
enum { DTYPE_F32, DTYPE_BF16 };             // --dtype
enum { ERRORS_STRICT, ERRORS_REPLACE };     // --encoding-errors

static const retrofit_option option_table[] = {
    {"Surgery", RETROFIT_HEADING, NULL, NULL, NULL},
    {"from", RETROFIT_STRING, &options.from, "DIR|FILE.gguf",
     "a plain model; without layers to choose it is only rewritten"},
    {"to", RETROFIT_STRING, &options.to, "DIR|OUT.bin",
     "what to make; a directory must not exist yet"},
    {"prelude", RETROFIT_STRING, &options.prelude, "LAYERS",
     "layers of the source, like 0-3 or 2,5,8-9, or none"},
    {"core", RETROFIT_STRING, &options.core, "LAYERS|auto[:N]",
     "the layers to repeat; auto: those, N of them, that do most to the states of --text"},
    {"coda", RETROFIT_STRING, &options.coda, "LAYERS", "layers of the source, or none"},
    {"preset", RETROFIT_CHOICE, &options.preset, 
     "tinyllama|llama3.2|llama3.2-2-4-2|olmo2|smollm2|smollm2-360m",
     "the paper's layers, the core the last before the coda; the smollm2's by its rule: "
     "0-3, 20-25, 26-29 of 30, 0-3, 14-27, 28-31 of 32"},
    {"adapter-init", RETROFIT_CHOICE, &options.adapter_init, "default|identity",
     "random as in the paper, or [0 | I]: starts as the source without the dropped layers "
     "(default)"},
    {"mean-recurrence", RETROFIT_SIZE, &options.mean_recurrence, "R",
     "recorded for train and infer (8)"},
    {"backprop-depth", RETROFIT_SIZE, &options.backprop_depth, "K", "recorded for train (8)"},
    {"hf-code", RETROFIT_STRING, &options.hf_code, RETROFIT_MODELLING,
     "retrofit's file of this name is put beside the model: transformers can load it then"},
    {"dtype", RETROFIT_CHOICE, &options.dtype, "f32|bf16", "of the numbers written (f32)"},
    {"seed", RETROFIT_SIZE, &options.seed, "N", "of what is random (1)"},
    {"Measuring what layers do", RETROFIT_HEADING, NULL, NULL, NULL},
    {"text", RETROFIT_FLAG, &options.text, "FILE...",
     "what to measure on, for --core auto: .txt or .jsonl as below"},
    {"text-tokens", RETROFIT_SIZE, &options.text_tokens, "N",
     "how much of it, from each file alike (4096)"},
    {"report", RETROFIT_FLAG, &options.report, NULL,
     "print what was measured, with the choice that follows, and make nothing"},
    {"From scratch", RETROFIT_HEADING, NULL, NULL, NULL},
    {"random", RETROFIT_STRING, &options.random, "CONFIG.json",
     "a random model of this shape, plain or recurrent; or a directory with a config.json"},
    {"Token shards", RETROFIT_HEADING, NULL, NULL, NULL},
    {"tokenize", RETROFIT_FLAG, &options.tokenize, "FILE...",
     ".txt: the file is a document; .jsonl: each line has one"},
    {"tokenizer", RETROFIT_STRING, &options.tokenizer, "DIR",
     "where tokenizer.json is; with --random: to be carried along"},
    {"field", RETROFIT_STRING, &options.field, "NAME",
     "the member of a line that is the text, or the messages of a conversation (text or messages)"},
    {"encoding-errors", RETROFIT_CHOICE, &options.encoding_errors, "strict|replace",
     "text that is not UTF-8 is refused (strict), or what is wrong in it becomes U+FFFD"},
};

static const char usage[] =
    "convert --from DIR|FILE.gguf --to DIR --preset NAME | --prelude LAYERS --core LAYERS "
    "--coda LAYERS [options]\n"
    "convert --from DIR|FILE.gguf --to DIR --core auto --text FILE... [options]\n"
    "convert --from DIR|FILE.gguf --report --text FILE... [options]\n"
    "convert --random CONFIG.json --to DIR [options]\n"
    "convert --tokenize FILE... --tokenizer DIR --to OUT.bin [options]\n"
    "Cuts a plain model into a recurrent one, makes a random one, or turns text into token "
    "shards.\n";

// Ends the program with one line on stderr. Control characters, which file names may contain,
// become question marks. What is unfinished is removed.
__attribute__((format(printf, 2, 3), noreturn)) static void die(int code, const char *format, ...) {
    char text[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    retrofit_say("convert", text);
    retrofit_abandon();
    exit(code);
}

// Ends the program where a function of the library failed.
static void must(bool ok) {
    if (!ok) die(1, "%s", retrofit_error());
}

static void *allocate_or_die(size_t count, size_t size) {
    void *memory = retrofit_allocate(count, size);
    must(memory != NULL);
    return memory;
}

static bool ends_with(const char *text, const char *end) {
    size_t length = strlen(text), end_length = strlen(end);
    return length > end_length && !strcmp(text + length - end_length, end);
}

// What the program is asked to do. The values are bits, so that an option can name several.
enum { SURGERY = 1, REWRITE = 2, RANDOM = 4, TOKENIZE = 8, REPORT = 16 };

static bool lists_given(void) { return options.prelude || options.core || options.coda; }

// --core auto or auto:N
static bool core_is_auto(void) {
    const char *core = options.core;
    return core && (!strcmp(core, "auto") || !strncmp(core, "auto:", 5));
}

static int find_task(void) {
    if ((options.from != NULL) + (options.random != NULL) + options.tokenize != 1)
        die(2, "give one of --from, --random and --tokenize (see --help)");
    if (options.tokenize) return TOKENIZE;
    if (options.random) return RANDOM;
    if (options.report) return REPORT;
    return lists_given() || options.preset >= 0 ? SURGERY : REWRITE;
}

// Every option that was given must mean something for this task.
static void check_options_fit(int task) {
    const struct {
        const char *name;
        bool given;
        int tasks;
    } table[] = {
        {"to", options.to, SURGERY | REWRITE | RANDOM | TOKENIZE},
        {"prelude", options.prelude, SURGERY | REPORT},
        {"core", options.core, SURGERY | REPORT},
        {"coda", options.coda, SURGERY | REPORT},
        {"preset", options.preset >= 0, SURGERY | REPORT},
        {"text", options.text, SURGERY | REPORT},
        {"text-tokens", options.text_tokens != SIZE_MAX, SURGERY | REPORT},
        {"report", options.report, REPORT},
        {"adapter-init", options.adapter_init >= 0, SURGERY},
        {"mean-recurrence", options.mean_recurrence != SIZE_MAX, SURGERY | RANDOM},
        {"backprop-depth", options.backprop_depth != SIZE_MAX, SURGERY | RANDOM},
        {"dtype", options.dtype >= 0, SURGERY | REWRITE | RANDOM},
        {"hf-code", options.hf_code, SURGERY | REWRITE | RANDOM},
        {"seed", options.seed != SIZE_MAX, SURGERY | RANDOM},
        {"tokenizer", options.tokenizer, RANDOM | TOKENIZE},
        {"field", options.field, TOKENIZE | (options.text ? SURGERY | REPORT : 0)},
        {"encoding-errors", options.encoding_errors >= 0,
         TOKENIZE | (options.text ? SURGERY | REPORT : 0)},
    };
    const char *task_name = task == TOKENIZE ? "tokenize" : task == RANDOM ? "random" : "from";
    if (task == REPORT) task_name = "report";
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (!table[i].given || table[i].tasks & task) continue;
        if (task == REWRITE)
            die(2, "--%s goes with a choice of layers (see --help)", table[i].name);
        die(2, "--%s does not go with --%s", table[i].name, task_name);
    }
}

// The place to write to, and the arguments that are no options.
static void check_files(int task, const char *const *files, size_t count) {
    if (options.text && !count) die(2, "--text needs files");
    if (task == REPORT) return;
    if (!options.to) die(2, "--to is needed: what shall be made?");
    if (task == TOKENIZE) {
        if (!count) die(2, "--tokenize needs files");
        if (!options.tokenizer) die(2, "--tokenizer is needed: a directory with tokenizer.json");
        if (!ends_with(options.to, ".bin"))
            die(2, "--to %s: the name of a token shard ends in .bin", options.to);
        return;
    }
    // Not even an old model is replaced: a slip of the keyboard must not cost the source, or a
    // training.
    if (retrofit_is_there(options.to))
        die(1, "%s exists already: remove it or choose another --to", options.to);
    if (count && !options.text)
        die(2, "'%s' is not an option: options begin with -- (see --help)", files[0]);
}

// Which layers: by a preset, by three lists, or, for what --core auto leaves open, by measurement.
static void check_choice(int task) {
    bool fixed_core = options.core && !core_is_auto();
    if (options.preset >= 0 && (options.prelude || fixed_core || options.coda))
        die(2, "--preset and lists of layers exclude each other, but for --core auto");
    if (task == REPORT && !options.text)
        die(2, "--report needs --text FILE...: what shall the layers be measured on?");
    if (core_is_auto() && !options.text)
        die(2, "--core auto needs --text FILE...: what shall the layers be measured on?");
    if (options.text_tokens != SIZE_MAX && !options.text)
        die(2, "--text-tokens goes with --text");
    size_t tokens = options.text_tokens;
    if (tokens == 0 || (tokens != SIZE_MAX && tokens > MAX_TEXT_TOKENS))
        die(2, "--text-tokens %zu is not between 1 and %d", tokens, MAX_TEXT_TOKENS);
    if (lists_given() && !core_is_auto() && !(options.prelude && options.core && options.coda))
        die(2, "--prelude, --core and --coda go together; an empty one is none");
}

// The modelling code must have the name that config.json will have for it.
static void check_modelling(void) {
    if (!options.hf_code) return;
    const char *slash = strrchr(options.hf_code, '/');
    if (strcmp(slash ? slash + 1 : options.hf_code, RETROFIT_MODELLING))
        die(2, "--hf-code %s: only retrofit's own " RETROFIT_MODELLING " is known here",
            options.hf_code);
    struct stat status;
    if (stat(options.hf_code, &status) || !S_ISREG(status.st_mode))
        die(1, "%s: there is no such file: it lies beside retrofit.h", options.hf_code);
}

static void check_modelling_fits(const retrofit_config *config) {
    if (options.hf_code && retrofit_is_plain(config))
        die(2, "--hf-code is for a recurrent model: transformers has the code of a plain one");
}

static void check_recurrence(const char *option, size_t n) {
    if (n == SIZE_MAX || (n >= 1 && n <= 65536)) return;
    die(2, "--%s %zu is not between 1 and 65536", option, n);
}

static void check_options(int task, const char *const *files, size_t count) {
    check_options_fit(task);
    check_files(task, files, count);
    check_choice(task);
    check_modelling();
    check_recurrence("mean-recurrence", options.mean_recurrence);
    check_recurrence("backprop-depth", options.backprop_depth);
}

static void set_defaults(int task) {
    if (options.seed == SIZE_MAX) options.seed = 1;
    if (options.text_tokens == SIZE_MAX) options.text_tokens = 4096;
    if (task == REPORT && !lists_given() && options.preset < 0) options.core = "auto";
    if (task != SURGERY) return; // a random model takes its recurrence from config.json
    if (options.mean_recurrence == SIZE_MAX) options.mean_recurrence = 8;
    if (options.backprop_depth == SIZE_MAX) options.backprop_depth = 8;
}

// =================================================================================================
// 2  Surgery
// =================================================================================================

// Where a model's tokenizer comes from: from files of a directory, which are copied, or from the
// metadata of a GGUF file, which become files. Both are NULL if there is none.
typedef struct gguf_file gguf_file;
typedef struct {
    const char *directory;
    const gguf_file *gguf;
} tokenizer_source;

enum { MAX_LAYERS = 4096 };
typedef struct {
    size_t layers[MAX_LAYERS], count; // numbers of the source's layers, in the order they will have
} layer_numbers;

typedef struct {
    layer_numbers prelude, core, coda;
} layer_choice;

// Section 3. origin[i] is where the numbers of the model's i-th parameter come from; choice is NULL
// where no layers were chosen.
static void write_model(const retrofit_model *model, const retrofit_parameter *const *origin,
                        const layer_choice *choice, tokenizer_source tokenizer);

// Section 5. Rows of tokens from the files of --text.
typedef struct {
    int32_t *ids;          // [begins[rows]] those of row i are begins[i] … begins[i + 1] - 1
    size_t *begins, rows;  // [rows + 1]
    size_t longest;        // row
} text_sample;
static void read_sample(text_sample *sample, tokenizer_source tokenizer, size_t context);

// ---- Choosing layers ----------------------------------------------------------------------------

typedef struct {
    const char *name;
    size_t source_layers;
    const char *prelude, *core, *coda;
} layer_preset;

// In the order of --preset's alternatives.
static const layer_preset presets[] = {
    {"tinyllama", 22, "0-3", "10-17", "18-21"},
    {"llama3.2", 16, "0-3", "6-11", "12-15"},
    {"llama3.2-2-4-2", 16, "0-1", "10-13", "14-15"},
    {"olmo2", 16, "0-3", "6-11", "12-15"},
    {"smollm2", 30, "0-3", "20-25", "26-29"},
    {"smollm2-360m", 32, "0-3", "14-27", "28-31"},
};

// Reads "4" or "4-7" and returns where it ends, at a comma or the text's end. NULL if it is
// neither.
static const char *read_range(const char *text, size_t *first, size_t *last) {
    if (!isdigit((unsigned char)*text)) return NULL;
    char *end;
    *first = (size_t)strtoull(text, &end, 10);
    *last = *first;
    if (*end == '-' && isdigit((unsigned char)end[1]))
        *last = (size_t)strtoull(end + 1, &end, 10);
    if (*last < *first || (*end && *end != ',')) return NULL;
    return end;
}

static size_t count_layer(const layer_numbers *list, size_t layer) {
    size_t count = 0;
    for (size_t i = 0; i < list->count; i++) count += list->layers[i] == layer;
    return count;
}

// Reads a list like "0-3", "2,5,8-9" (in any order) or "none". No layer may stand in it twice.
static void read_layers(layer_numbers *list, const char *option, const char *text,
                        size_t available) {
    list->count = 0;
    if (!strcmp(text, "none")) return;
    const char *position = text;
    for (;;) {
        size_t first, last;
        position = read_range(position, &first, &last);
        if (!position)
            die(2, "--%s '%s' is not a list of layers like 0-3, 2,5,8-9 or none", option, text);
        if (last >= available)
            die(2, "--%s %s: there is no layer %zu: the source has %zu, from 0", option, text, last,
                available);
        for (size_t layer = first; layer <= last; layer++) {
            if (count_layer(list, layer))
                die(2, "--%s %s: layer %zu is there twice", option, text, layer);
            list->layers[list->count++] = layer;
        }
        if (*position == 0) return;
        position++; // behind the comma
    }
}

// The inverse. Returns the number of characters.
static int print_layers(const layer_numbers *list) {
    int width = list->count ? 0 : printf("none");
    size_t end;
    for (size_t i = 0; i < list->count; i = end) {
        end = i + 1; // of the run of consecutive layers that begins at i
        while (end < list->count && list->layers[end] == list->layers[end - 1] + 1) end++;
        if (i > 0) width += printf(",");
        width += printf("%zu", list->layers[i]);
        if (end > i + 1) width += printf("-%zu", list->layers[end - 1]);
    }
    return width;
}

// In a column of 12 characters.
static void print_layer_column(const layer_numbers *list) {
    int width = print_layers(list);
    printf("%*s", width < 12 ? 12 - width : 1, "");
}

static void take_layers(layer_numbers *list, size_t first, size_t count) {
    list->count = count;
    for (size_t i = 0; i < count; i++) list->layers[i] = first + i;
}

// How many of the three lists a layer stands in.
static size_t count_places(const layer_choice *choice, size_t layer) {
    return count_layer(&choice->prelude, layer) + count_layer(&choice->core, layer) +
           count_layer(&choice->coda, layer);
}

static size_t count_dropped(const layer_choice *choice, size_t available) {
    size_t dropped = 0;
    for (size_t layer = 0; layer < available; layer++) dropped += !count_places(choice, layer);
    return dropped;
}

// How many layers an automatic core has, of `between` that are in neither prelude nor coda: what
// --core auto:N says; the preset's number; or, as in all the paper's models, as many as prelude and
// coda have together, but three quarters of those between at most.
static size_t automatic_count(const layer_choice *choice, const layer_preset *preset,
                              size_t between) {
    const char *text = options.core + strlen("auto");
    size_t ends = choice->prelude.count + choice->coda.count, most = between * 3 / 4;
    char *end = NULL;
    if (*text && isdigit((unsigned char)text[1])) {
        size_t count = (size_t)strtoull(text + 1, &end, 10);
        if (*end == 0 && count >= 1 && count <= between) return count;
    }
    if (*text)
        die(2, "--core %s: after auto: stands a number of layers, from 1 to the %zu that are in "
               "neither prelude nor coda", options.core, between);
    if (preset) {
        layer_numbers core;
        read_layers(&core, "core", preset->core, preset->source_layers);
        return core.count;
    }
    return retrofit_max(ends ? retrofit_min(ends, most) : most, 1);
}

// Reads the lists that were given or that the preset has. Beside an automatic core, a prelude and a
// coda that were not given are the source's first and last four layers, as in the paper, or a
// quarter of its layers each if that is fewer. Returns how many layers an automatic core shall
// have, 0 if the core is known.
static size_t read_choice(layer_choice *choice, size_t available) {
    const layer_preset *preset = options.preset >= 0 ? &presets[options.preset] : NULL;
    if (preset && preset->source_layers != available)
        die(2, "--preset %s is for a model of %zu layers, this one has %zu", preset->name,
            preset->source_layers, available);
    const char *prelude = preset ? preset->prelude : options.prelude;
    const char *coda = preset ? preset->coda : options.coda;
    size_t ends = retrofit_max(retrofit_min(available / 4, 4), 1);
    if (prelude) read_layers(&choice->prelude, "prelude", prelude, available);
    else take_layers(&choice->prelude, 0, ends);
    if (coda) read_layers(&choice->coda, "coda", coda, available);
    else take_layers(&choice->coda, available - ends, ends);

    choice->core.count = 0;
    if (core_is_auto()) {
        size_t between = count_dropped(choice, available);
        if (!between)
            die(2, "--core auto: prelude and coda leave no layer of %zu%s%s: give fewer with "
                   "--prelude and --coda", available,
                prelude ? "" : " (the prelude has as many as by default)",
                coda ? "" : " (the coda has as many as by default)");
        return automatic_count(choice, preset, between);
    }
    read_layers(&choice->core, "core", preset ? preset->core : options.core, available);
    if (!choice->core.count) die(2, "--core none: there must be a layer to repeat");
    return 0;
}

// Says which layers are gone and how many parameters went with them. A plain Llama's layers, all of
// the same size, are its coda.
static void print_dropped(const retrofit_model *source, const layer_choice *choice) {
    const retrofit_config *c = &source->config;
    layer_numbers dropped = {.count = 0};
    for (size_t layer = 0; layer < c->coda; layer++) {
        size_t places = count_places(choice, layer);
        if (places == 0) dropped.layers[dropped.count++] = layer;
        if (places > 1)
            fprintf(stderr, "convert: note: layer %zu is copied to %zu places\n", layer, places);
    }
    size_t outside = 2 * c->vocab * c->n_embd + c->n_embd; // embedding, head, final norm
    size_t per_layer = (source->weight_count - outside) / c->coda;
    printf("%-12s", "dropped");
    print_layer_column(&dropped);
    printf("%16zu\n\n", dropped.count * per_layer);
}

// ---- What each layer does -----------------------------------------------------------------------

// Which layers a model can do without, measured on a text. Let x_i be the residual stream that
// enters layer i; x_L leaves the last layer, before the final norm. Then, as means over the tokens,
//
//     influence_i = 1 - cos(x_i, x_{i+1})
//     distance_i  = arccos(cos(x_i, x_{i+n})) / π
//
// The first is ShortGPT's block influence (Men et al., arXiv 2403.03853): a layer that hardly turns
// the stream is hardly missed. The paper's ablation keeps the layers with the most, in their order.
// The second is what dropping the n layers from i on would skip, the angular distance of "The
// Unreasonable Ineffectiveness of the Deeper Layers" (Gromov et al., arXiv 2403.17887), there of a
// text's last token; n is the number of layers that the choice at hand drops.
typedef struct {
    size_t n, tokens;
    double *influence, *distance; // [L] sums over the tokens, in the end their means
    size_t *counted;              // [L] tokens in them: a stream of zeros (padding's embedding,
} layer_scores;                   // say) has no direction

static double cosine(const float *a, const float *b, size_t d) {
    double product = 0, squares_a = 0, squares_b = 0;
    for (size_t i = 0; i < d; i++) {
        product += (double)a[i] * (double)b[i];
        squares_a += (double)a[i] * (double)a[i];
        squares_b += (double)b[i] * (double)b[i];
    }
    double quotient = product / sqrt(squares_a * squares_b); // NaN of what is not finite
    return quotient > 1 ? 1 : quotient < -1 ? -1 : quotient;
}

static bool is_zero(const float *x, size_t d) {
    size_t zeros = 0;
    while (zeros < d && x[zeros] == 0) zeros++;
    return zeros == d;
}

// x_i of the row that was computed last, [tokens of the row][d].
static const float *stream_into(const retrofit_buffers *buffers, size_t i) {
    const retrofit_block *blocks = buffers->saved.coda; // a plain Llama's layers
    return i == 0 ? blocks[0].x : blocks[i - 1].out;
}

// With RETROFIT_KEEP_INPUTS the stream is there before and behind every layer.
static void score_row(layer_scores *scores, retrofit_buffers *buffers, const int32_t *ids,
                      size_t count) {
    const retrofit_config *c = &buffers->model->config;
    const double pi = 3.14159265358979323846;
    size_t d = c->n_embd, layers = c->coda;
    must(retrofit_forward(buffers, ids, 1, count, 0, 0, 0, 0));
    for (size_t i = 0; i < layers; i++) {
        const float *x = stream_into(buffers, i), *next = stream_into(buffers, i + 1);
        const float *later = stream_into(buffers, retrofit_min(i + scores->n, layers));
        for (size_t t = 0; t < count * d; t += d) {
            if (is_zero(x + t, d) || is_zero(next + t, d) || is_zero(later + t, d)) continue;
            scores->counted[i]++;
            scores->influence[i] += 1 - cosine(x + t, next + t, d);
            scores->distance[i] += acos(cosine(x + t, later + t, d)) / pi;
        }
    }
    scores->tokens += count;
}

// n: for the distances. To be freed with free_scores.
static layer_scores measure_layers(const retrofit_model *source, const text_sample *sample,
                                   size_t n) {
    size_t layers = source->config.coda;
    layer_scores scores = {.n = n};
    scores.influence = allocate_or_die(layers, sizeof *scores.influence);
    scores.distance = allocate_or_die(layers, sizeof *scores.distance);
    scores.counted = allocate_or_die(layers, sizeof *scores.counted);
    retrofit_buffers *buffers =
        retrofit_buffers_new(source, 1, sample->longest, 0, RETROFIT_KEEP_INPUTS, NULL);
    must(buffers != NULL);
    for (size_t i = 0; i < sample->rows; i++) {
        size_t begin = sample->begins[i], count = sample->begins[i + 1] - begin;
        score_row(&scores, buffers, sample->ids + begin, count);
        retrofit_show_share(i + 1, sample->rows, "the layers measured");
    }
    retrofit_buffers_free(buffers);
    for (size_t i = 0; i < layers; i++) {
        scores.influence[i] /= (double)scores.counted[i];
        scores.distance[i] /= (double)scores.counted[i];
        if (!isfinite(scores.influence[i]))
            die(1, "%s: what layer %zu makes of the text is zero or not finite: is it a trained "
                   "model?", options.from, i);
    }
    return scores;
}

static void free_scores(layer_scores *scores) {
    free(scores->influence);
    free(scores->distance);
    free(scores->counted);
}

// The layer's place among those in no list, by influence; of equal ones the first comes first.
static size_t rank_of(size_t layer, const layer_choice *choice, const double *influence,
                      size_t layers) {
    size_t rank = 0;
    for (size_t i = 0; i < layers; i++) {
        bool before = influence[i] > influence[layer] ||
                      (influence[i] == influence[layer] && i < layer);
        rank += before && !count_places(choice, i);
    }
    return rank;
}

// Makes the `count` layers of most influence, of those in no list, the core.
static void choose_core(layer_choice *choice, const double *influence, size_t layers,
                        size_t count) {
    layer_numbers core = {.count = 0};
    for (size_t layer = 0; layer < layers; layer++) {
        bool is_free = !count_places(choice, layer);
        if (is_free && rank_of(layer, choice, influence, layers) < count)
            core.layers[core.count++] = layer;
    }
    choice->core = core;
}

static void print_parts(const layer_choice *choice, size_t layer) {
    const char *separator = "";
    const struct {
        const char *name;
        const layer_numbers *list;
    } parts[] = {
        {"prelude", &choice->prelude}, {"core", &choice->core}, {"coda", &choice->coda}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (!count_layer(parts[i].list, layer)) continue;
        printf("%s%s", separator, parts[i].name);
        separator = ", ";
    }
    printf("%s\n", *separator ? "" : "dropped");
}

static void print_scores(const layer_scores *scores, const layer_choice *choice, size_t layers) {
    printf("measured on %zu tokens: influence, 1 - cos(input, output) of each layer; distance, the "
           "angle / π\nbetween its input and the stream %zu %s later\n\n", scores->tokens,
           scores->n, scores->n == 1 ? "layer" : "layers");
    printf("%5s%12s%12s  %s\n", "layer", "influence", "distance", "part");
    for (size_t layer = 0; layer < layers; layer++) {
        printf("%5zu%12.6f", layer, scores->influence[layer]);
        if (layer + scores->n <= layers) printf("%12.6f  ", scores->distance[layer]);
        else printf("%12s  ", "-");
        print_parts(choice, layer);
    }
    printf("\n");
}

// A GGUF's numbers are packed: this is a model that can be run, for as long as layers are measured.
static retrofit_model *unpack(const retrofit_model *source) {
    retrofit_model *model = retrofit_model_new(&source->config, &retrofit_cpu);
    must(model != NULL);
    must(retrofit_model_allocate(model, RETROFIT_INFERENCE));
    for (size_t i = 0; i < model->parameter_count; i++) {
        const retrofit_parameter *p = model->parameters[i];
        size_t bytes = p->rows * p->cols * sizeof *p->master;
        source->ops->download(p->master, source->parameters[i]->weight.data, bytes);
        retrofit_show_share(i + 1, model->parameter_count, "%s unpacked", options.from);
    }
    return model;
}

// Reads the choice of layers, measures them if there is a text, chooses what is left open, and
// prints what was measured.
static void choose_layers(layer_choice *choice, const retrofit_model *source,
                          tokenizer_source tokenizer) {
    size_t layers = source->config.coda;
    if (!retrofit_is_plain(&source->config))
        die(1, "%s is recurrent already: surgery starts from a plain model", options.from);
    size_t automatic = read_choice(choice, layers);
    if (!options.text) return;
    size_t dropped = count_dropped(choice, layers) - automatic;
    text_sample sample;
    read_sample(&sample, tokenizer, source->config.context);
    retrofit_model *unpacked = tokenizer.gguf ? unpack(source) : NULL;
    layer_scores scores =
        measure_layers(unpacked ? unpacked : source, &sample, retrofit_max(dropped, 1));
    retrofit_free(unpacked);
    if (automatic) choose_core(choice, scores.influence, layers, automatic);
    print_scores(&scores, choice, layers);
    free_scores(&scores);
    free(sample.ids);
    free(sample.begins);
}

static void report(const retrofit_model *source, tokenizer_source tokenizer) {
    layer_choice choice;
    choose_layers(&choice, source, tokenizer);
    printf("next: convert --from %s --to DIR --prelude ", options.from);
    print_layers(&choice.prelude);
    printf(" --core ");
    print_layers(&choice.core);
    printf(" --coda ");
    print_layers(&choice.coda);
    printf("\n");
}

// ---- The new model ------------------------------------------------------------------------------

// What a training recorded is not true of a model that has not been trained yet.
static void forget_training(retrofit_config *config) {
    config->trained_seq_len = 0;
    config->trained_state_zero = false;
}

static retrofit_config recurrent_config(const retrofit_config *source, const layer_choice *choice) {
    retrofit_config config = *source;
    config.prelude = choice->prelude.count;
    config.core = choice->core.count;
    config.coda = choice->coda.count;
    config.mean_recurrence = options.mean_recurrence;
    config.backprop_depth = options.backprop_depth;
    config.state_std = (float)RETROFIT_STATE_STD;
    config.tied = false;
    forget_training(&config);
    return config;
}

// The adapter A (d,2d) = [A_s | A_e] makes the core's input A·concat(s, e) = A_s·s + A_e·e.
//     default     uniform in ±1/√(2d), as PyTorch initialises a Linear and the authors start
//     identity    [0 | I]: the core's input is e, whatever the state is, so the model starts as the
//                 source without the dropped layers
static float *new_adapter(size_t d) {
    float *A = allocate_or_die(2 * d * d, sizeof *A);
    if (options.adapter_init == ADAPTER_IDENTITY) {
        for (size_t i = 0; i < d; i++) A[i * 2 * d + d + i] = 1;
        return A;
    }
    float bound = (float)(1 / sqrt(2 * (double)d));
    for (size_t i = 0; i < 2 * d * d; i++)
        A[i] = bound * (float)(2 * retrofit_hash_uniform(options.seed, i) - 1);
    return A;
}

static const retrofit_parameter **add_layers(const retrofit_parameter **next,
                                             const retrofit_model *source,
                                             const layer_numbers *list) {
    size_t ends = source->config.tied ? 2 : 3; // embedding, final norm, head
    size_t of_layer = (source->parameter_count - ends) / source->config.coda;
    for (size_t i = 0; i < list->count; i++) {
        for (size_t j = 0; j < of_layer; j++)
            *next++ = source->parameters[1 + list->layers[i] * of_layer + j];
    }
    return next;
}

// Where each parameter of the new model comes from, in the order of model->parameters. To be freed.
static const retrofit_parameter **list_origins(const retrofit_model *model,
                                               const retrofit_model *source,
                                               const layer_choice *choice) {
    const retrofit_parameter **origin = allocate_or_die(model->parameter_count, sizeof *origin);
    const retrofit_parameter **next = origin;
    *next++ = &source->wte;
    next = add_layers(next, source, &choice->prelude);
    *next++ = &model->adapter;
    next = add_layers(next, source, &choice->core);
    next = add_layers(next, source, &choice->coda);
    *next++ = &source->ln_f;
    *next++ = &source->lm_head;
    return origin;
}

static void surgery(const retrofit_model *source, tokenizer_source tokenizer) {
    layer_choice choice;
    choose_layers(&choice, source, tokenizer);

    retrofit_config config = recurrent_config(&source->config, &choice);
    retrofit_model *model = retrofit_model_new(&config, source->ops);
    must(model != NULL);
    float *adapter = new_adapter(config.n_embd);
    model->adapter.weight.data = adapter;

    // The surgery itself: the new model's parameters are the source's, under other names.
    const retrofit_parameter **origin = list_origins(model, source, &choice);
    for (size_t i = 0; i < model->parameter_count; i++)
        model->parameters[i]->weight = origin[i]->weight;

    print_dropped(source, &choice);
    if (source->config.tied)
        printf("the source's head is its embedding, tied; here it is a matrix of its own\n\n");
    write_model(model, origin, &choice, tokenizer);
    free(adapter);
    free(origin);
    retrofit_free(model);
}

static void rewrite(retrofit_model *source, tokenizer_source tokenizer) {
    check_modelling_fits(&source->config);
    printf("no layers chosen: the model is only rewritten\n\n");
    write_model(source, (const retrofit_parameter *const *)source->parameters, NULL, tokenizer);
}

// =================================================================================================
// 3  Writing a model
// =================================================================================================

// ---- Numbers that stay in their files -----------------------------------------------------------

// Unpacked, a GGUF's model takes up to twenty times the memory that the file takes; and what is
// one matrix here, q, k, v or gate, up, lies apart in the file of a plain Llama. So the source's
// numbers stay where they are until they are written. As on a GPU, whose memory cannot be looked
// at, its weights are addresses, here of a range with no memory behind it, and whoever wants
// numbers calls `download` of its operations, which reads the tensors that lie there.

// Numbers of a type lie in blocks of so many, which take so many bytes.
typedef struct {
    const char *name;
    size_t values, bytes; // of a block
    void (*read)(float *out, const uint8_t *data, size_t blocks);
} number_type;

// A tensor of a file, whose numbers are the model's from number `first` on.
typedef struct {
    const char *name, *path;
    size_t first, rows, cols;
    const number_type *type;
    const uint8_t *data;
    size_t head_dim; // of q and k, where their rows stand in llama.cpp's order; else 0
} tensor_piece;

static struct {
    char *range; // the addresses, of fp32 numbers
    size_t bytes;
    tensor_piece *pieces; // in the order of `first`
    size_t count, numbers; // of pieces; of numbers in them
} in_files;

#define DAMAGED "damaged, fetch it again"

static void read_f32(float *out, const uint8_t *data, size_t count) {
    memcpy(out, data, count * sizeof *out);
}

static void read_f16(float *out, const uint8_t *data, size_t count) {
    retrofit_to_float(out, data, RETROFIT_F16, count);
}

static void read_bf16(float *out, const uint8_t *data, size_t count) {
    retrofit_to_float(out, data, RETROFIT_BF16, count);
}

static void read_f64(float *out, const uint8_t *data, size_t count) {
    retrofit_to_float(out, data, RETROFIT_F64, count);
}

// RoPE rotates pairs of a head's h components. llama.cpp's converter moves the rows of q and k so
// that the two of a pair become neighbours:
//
//     row in Hugging Face's order   0  1  …  h/2-1  h/2  h/2+1  …  h-1     pairs (i, i + h/2)
//     row in llama.cpp's order      0  2  …   h-2    1     3    …  h-1     pairs (2i, 2i + 1)
//
// Returns where a row of Hugging Face's order stands in the file.
static size_t row_in_file(const tensor_piece *piece, size_t row) {
    if (piece->head_dim == 0) return row;
    size_t i = row % piece->head_dim, half = piece->head_dim / 2;
    return row - i + i % half * 2 + i / half;
}

// Without a branch, in an integer as wide as a float: compilers make a fast loop of that.
static bool all_finite(const float *x, size_t n) {
    uint32_t other = 0;
    for (size_t i = 0; i < n; i++) other |= !(fabsf(x[i]) <= FLT_MAX);
    return !other;
}

// Numbers first … first + count - 1 of a tensor. Both ends must be those of blocks. Threads share
// the work where it is more than to copy. The file's pages are let go at once: when they are read
// again, they are mostly still in the system's cache.
static void read_piece(const tensor_piece *piece, size_t first, size_t count, float *out) {
    const number_type *type = piece->type;
    size_t cols = piece->cols, row_bytes = cols / type->values * type->bytes;
    size_t end = first + count, last_row = (end - 1) / cols;
    bool finite = true;
#ifdef _OPENMP
#pragma omp parallel for reduction(&& : finite) schedule(static) if (type->values > 1)
#endif
    for (size_t row = first / cols; row <= last_row; row++) {
        size_t from = retrofit_max(first, row * cols), to = retrofit_min(end, (row + 1) * cols);
        size_t skipped = (from - row * cols) / type->values * type->bytes;
        const uint8_t *data = piece->data + row_in_file(piece, row) * row_bytes + skipped;
        type->read(out + (from - first), data, (to - from) / type->values);
        finite = all_finite(out + (from - first), to - from) && finite;
    }
    retrofit_release_pages(piece->data + first / type->values * type->bytes,
                           count / type->values * type->bytes);
    for (size_t i = 0; i < count && !finite; i++)
        if (!isfinite(out[i]))
            die(1, "%s: tensor %s: number %zu is not finite: " DAMAGED, piece->path, piece->name,
                first + i);
}

// The piece that the model's number `first` is in.
static const tensor_piece *find_piece(size_t first) {
    size_t low = 0, high = in_files.count; // it is in low … high - 1
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (in_files.pieces[middle].first <= first) low = middle;
        else high = middle;
    }
    return &in_files.pieces[low];
}

// Addresses that are not in the range, as the adapter's, are those of memory.
static void download_from_files(void *host, const void *from, size_t bytes) {
    uintptr_t offset = (uintptr_t)from - (uintptr_t)in_files.range;
    if (offset >= in_files.bytes) {
        memcpy(host, from, bytes);
        return;
    }
    float *out = host;
    size_t first = offset / sizeof *out, end = first + bytes / sizeof *out;
    while (first < end) {
        const tensor_piece *piece = find_piece(first);
        size_t begin = first - piece->first;
        size_t n = retrofit_min(end - first, piece->rows * piece->cols - begin);
        read_piece(piece, begin, n, out);
        first += n;
        out += n;
    }
}

static const retrofit_ops *file_operations(void) {
    static retrofit_ops ops;
    ops = retrofit_cpu;
    ops.download = download_from_files;
    return &ops;
}

// Addresses for all of the model's numbers, which nobody may read or write.
static void begin_pieces(const retrofit_model *model, const char *path) {
    in_files.bytes = model->weight_count * sizeof(float);
    in_files.range = mmap(NULL, in_files.bytes, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (in_files.range == MAP_FAILED)
        die(1, "%s: no addresses for its %zu numbers: %s", path, model->weight_count,
            strerror(errno));
    in_files.pieces = allocate_or_die(3 * model->parameter_count, sizeof *in_files.pieces);
}

// Where the numbers of the next piece will be.
static const void *next_address(void) { return in_files.range + in_files.numbers * sizeof(float); }

static void add_piece(tensor_piece piece) {
    piece.first = in_files.numbers;
    in_files.pieces[in_files.count++] = piece;
    in_files.numbers += piece.rows * piece.cols;
}

static void forget_pieces(void) {
    if (in_files.range) munmap(in_files.range, in_files.bytes);
    free(in_files.pieces);
    memset(&in_files, 0, sizeof in_files);
}

// A Hugging Face directory's model, good until its pieces are forgotten.
static retrofit_model *open_directory(const char *directory) {
    static const number_type types[] = {[RETROFIT_F32] = {"F32", 1, 4, read_f32},
                                        [RETROFIT_BF16] = {"BF16", 1, 2, read_bf16},
                                        [RETROFIT_F16] = {"F16", 1, 2, read_f16},
                                        [RETROFIT_F64] = {"F64", 1, 8, read_f64}};
    retrofit_model *model = retrofit_open(directory, file_operations());
    must(model != NULL);
    begin_pieces(model, directory);
    for (size_t i = 0; i < model->parameter_count; i++) {
        retrofit_parameter *p = model->parameters[i];
        p->weight.data = next_address();
        for (size_t j = 0; j < p->sources; j++) {
            const retrofit_tensor *tensor = retrofit_find_source(model, p, j);
            add_piece((tensor_piece){.name = tensor->name, .path = directory,
                                     .rows = p->source[j].rows, .cols = p->cols,
                                     .type = &types[tensor->type], .data = tensor->data});
        }
    }
    if (model->config.tied) model->lm_head.weight = model->wte.weight;
    return model;
}

// ---- Writing and reading back -------------------------------------------------------------------

// Section 7. Writes tokenizer.json and tokenizer_config.json.
static void gguf_write_tokenizer(const gguf_file *gguf, const char *directory);

enum { CHUNK = 1 << 18 };

// Numbers first … first + n - 1 of a parameter, at most a chunk, as they were to be written. ops
// are those of its model.
static void read_numbers(float *out, const retrofit_parameter *p, const retrofit_ops *ops,
                         size_t first, size_t n) {
    static float raw[CHUNK]; // memory for elements of any type
    const char *data = p->weight.data;
    size_t size = retrofit_type_size(p->weight.type);
    ops->download(raw, data + first * size, n * size);
    retrofit_to_float(out, raw, p->weight.type, n);
    if (options.dtype != DTYPE_BF16) return;
    for (size_t i = 0; i < n; i++) out[i] = retrofit_bf16_to_float(retrofit_float_to_bf16(out[i]));
}

// Compares a tensor that was written with the numbers from `first` on of where it came from.
static void verify_tensor(const retrofit_tensor *written, const retrofit_parameter *origin,
                          const retrofit_ops *ops, size_t first) {
    static float now[CHUNK], before[CHUNK];
    size_t size = retrofit_type_size(written->type);
    for (size_t i = 0; i < written->count; i += CHUNK) {
        size_t n = retrofit_min(written->count - i, CHUNK);
        const char *data = (const char *)written->data + i * size;
        retrofit_to_float(now, data, written->type, n);
        retrofit_release_pages(data, n * size);
        read_numbers(before, origin, ops, first + i, n);
        if (memcmp(now, before, n * sizeof *now))
            die(1, "%s: what was written reads back as something else: is the disk sound?",
                written->name);
    }
}

static void verify_parameter(const retrofit_model *model, const retrofit_parameter *written,
                             const retrofit_parameter *origin, const retrofit_ops *ops) {
    if (written->rows != origin->rows || written->cols != origin->cols)
        die(1, "%s: written in another shape than its source's", written->source[0].name);
    size_t first = 0;
    for (size_t j = 0; j < written->sources; j++) {
        const retrofit_tensor *tensor = retrofit_find_source(model, written, j);
        must(tensor != NULL);
        verify_tensor(tensor, origin, ops, first);
        first += tensor->count;
    }
}

// Reads back what was written and compares it with where it came from, bit for bit. Returns the
// size of the file of weights.
static size_t verify(const char *directory, const retrofit_parameter *const *origin,
                     const retrofit_model *model) {
    size_t count = model->parameter_count;
    retrofit_model *written = retrofit_open(directory, &retrofit_cpu);
    if (!written) die(1, "reading back what was written: %s", retrofit_error());
    if (written->parameter_count != count)
        die(1, "reading back what was written: not all of it is there");
    for (size_t i = 0; i < count; i++) {
        verify_parameter(written, written->parameters[i], origin[i], model->ops);
        retrofit_show_share(i + 1, count, "%s compared with its source", directory);
    }
    size_t bytes = written->maps[0].bytes;
    retrofit_free(written);
    return bytes;
}

// One line of print_summary: the part's name, its layers or how the adapter starts, its size.
static void print_part(retrofit_part part, const layer_choice *choice, bool plain, size_t count) {
    static const char *const names[] = {"embedding", "prelude",    "adapter", "core",
                                        "coda",      "final norm", "head"};
    const char *adapter = options.adapter_init == ADAPTER_IDENTITY ? "[0 | I]" : "random";
    printf("%-12s", part == RETROFIT_PART_CODA && plain ? "layers" : names[part]);
    if (choice && part == RETROFIT_PART_PRELUDE) print_layer_column(&choice->prelude);
    else if (choice && part == RETROFIT_PART_CORE) print_layer_column(&choice->core);
    else if (choice && part == RETROFIT_PART_CODA) print_layer_column(&choice->coda);
    else printf("%-12s", choice && part == RETROFIT_PART_ADAPTER ? adapter : "");
    printf("%16zu\n", count);
}

static void print_summary(const retrofit_model *model, const layer_choice *choice, size_t bytes) {
    size_t counts[RETROFIT_PARTS] = {0};
    for (size_t i = 0; i < model->parameter_count; i++) {
        const retrofit_parameter *p = model->parameters[i];
        counts[p->part] += p->rows * p->cols;
    }
    bool plain = retrofit_is_plain(&model->config);
    printf("%-12s%-12s%16s\n", "part", choice ? "layers" : "", "parameters");
    for (int part = 0; part < RETROFIT_PARTS; part++)
        if (counts[part]) print_part((retrofit_part)part, choice, plain, counts[part]);
    printf("%-24s%16zu\n\n", "all", model->weight_count);
    printf("%s: %zu bytes of %s, read back and compared\n", options.to, bytes,
           options.dtype == DTYPE_BF16 ? "bf16" : "f32");
    printf("next: train --model %s --data 'SHARDS*.bin' --out RUN --steps N\n", options.to);
}

static void write_model(const retrofit_model *model, const retrofit_parameter *const *origin,
                        const layer_choice *choice, tokenizer_source tokenizer) {
    char path[RETROFIT_PATH];
    char *directory = retrofit_directory_begin(options.to);
    must(directory != NULL);
    if (options.hf_code)
        must(retrofit_path(path, directory, RETROFIT_MODELLING) &&
             retrofit_copy_file(options.hf_code, path));
    retrofit_type type = options.dtype == DTYPE_BF16 ? RETROFIT_BF16 : RETROFIT_F32;
    must(retrofit_save(model, directory, type, tokenizer.directory));
    if (tokenizer.gguf) gguf_write_tokenizer(tokenizer.gguf, directory);
    size_t bytes = verify(directory, origin, model);
    must(retrofit_directory_commit(directory, options.to));
    free(directory);
    print_summary(model, choice, bytes);
}

// =================================================================================================
// 4  From scratch
// =================================================================================================

// --random names a config.json, under any name, or a directory that has one.
static void read_shape(retrofit_config *config) {
    struct stat status;
    char path[RETROFIT_PATH];
    const char *file = options.random;
    if (!stat(options.random, &status) && S_ISDIR(status.st_mode)) {
        must(retrofit_path(path, options.random, "config.json"));
        file = path;
    }
    must(retrofit_config_read_file(config, file));
}

// W_out and W_down by their names in a recurrent model's file, then in a plain Llama's.
static bool writes_to_residual_stream(const retrofit_parameter *p) {
    static const char *const names[] = {"attn.proj.", "mlp.proj.", "o_proj.", "down_proj."};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strstr(p->source[0].name, names[i])) return true;
    return false;
}

// Huginn's rule, after Takase. With d the width and L = P + C·R + D the unrolled model's depth:
//
//     norms                   1       biases    0
//     W_out, W_down           N(0, σ²/(2L)), since 2L of them add to the residual stream
//     every other matrix      N(0, σ²),      σ² = 2/(5d)
//
// each normal number cut at three standard deviations.
static void initialise(retrofit_model *model) {
    const retrofit_config *c = &model->config;
    enum { CHUNK = 1 << 22 }; // numbers between two looks at the clock
    double sigma = sqrt(2 / (5 * (double)c->n_embd));
    size_t done = 0;
    double depth = (double)(c->prelude + c->core * c->mean_recurrence + c->coda);
    for (size_t i = 0; i < model->parameter_count; i++) {
        const retrofit_parameter *p = model->parameters[i];
        size_t count = p->rows * p->cols;
        float fixed = p->kind == RETROFIT_NORM ? 1 : 0;
        bool drawn = p->kind != RETROFIT_NORM && p->kind != RETROFIT_BIAS;
        float std = (float)(writes_to_residual_stream(p) ? sigma / sqrt(2 * depth) : sigma);
        uint64_t key = retrofit_hash(options.seed, i);
        for (size_t first = 0; first < count; first += CHUNK) {
            size_t end = retrofit_min(first + CHUNK, count);
#ifdef _OPENMP
#pragma omp parallel for schedule(static)
#endif
            for (size_t j = first; j < end; j++)
                p->master[j] = drawn ? std * retrofit_hash_normal(key, j) : fixed;
            done += end - first;
            retrofit_show_share(done, model->weight_count, "the model's numbers drawn");
        }
    }
}

static void make_random(void) {
    retrofit_config config;
    read_shape(&config);
    check_modelling_fits(&config);
    bool recurrence_given =
        options.mean_recurrence != SIZE_MAX || options.backprop_depth != SIZE_MAX;
    if (retrofit_is_plain(&config) && recurrence_given)
        die(2, "%s is a plain model: it takes no --mean-recurrence and --backprop-depth",
            options.random);
    if (options.mean_recurrence != SIZE_MAX) config.mean_recurrence = options.mean_recurrence;
    if (options.backprop_depth != SIZE_MAX) config.backprop_depth = options.backprop_depth;
    forget_training(&config);

    // What is to be carried along is read before hours are spent on a model.
    tokenizer_source tokenizer = {.directory = options.tokenizer};
    if (options.tokenizer) {
        retrofit_tokenizer *read = retrofit_tokenizer_load(options.tokenizer);
        must(read != NULL);
        retrofit_tokenizer_free(read);
    }
    retrofit_model *model = retrofit_model_new(&config, &retrofit_cpu);
    must(model != NULL);
    must(retrofit_model_allocate(model, RETROFIT_INFERENCE));
    initialise(model);
    write_model(model, (const retrofit_parameter *const *)model->parameters, NULL, tokenizer);
    retrofit_free(model);
}

// =================================================================================================
// 5  Token shards
// =================================================================================================

// A document is stripped of white space at both ends and becomes: what the tokenizer adds before a
// text (BOS, where it has one), the text's ids, EOS. Documents follow each other in the order of
// files and lines. A shard is llm.c's .bin: 256 int32 of header, then the ids, as uint16 if the
// tokenizer has at most 65,536 of them, else as uint32.
//
// A line may have a conversation instead, "messages": the model's own chat template writes it out,
// with BOS where the template has it, and EOS follows unless the template ends with it. Labels go
// with such a shard, in a file of their own: the tokens that the assistant says, with the one that
// ends its turn, and -100 for all others.

// What may be lost of a text. None of it stops the work, all of it is counted and said.
enum {
    LOST_EMPTY, LOST_NULL, LOST_MEMBER, LOST_HALF, LOST_BYTES, LOST_NUL, LOST_UNSAID, LOSSES
};
static const char *const loss_texts[LOSSES] = {
    "empty documents were skipped",
    "lines whose text is null were skipped",
    "lines without the member that is the text were skipped",
    "halves of surrogate pairs (as \\ud800) became U+FFFD",
    "stretches that are not UTF-8 became U+FFFD",
    "NUL characters are in the text",
    "conversations have nothing that the assistant says: nothing of them will be learned",
};

typedef struct {
    size_t counts[LOSSES];
    size_t lines[LOSSES]; // the first with it, from 1; of a whole file 0
    size_t members;       // lines that have the member, be it null or empty
    size_t documents;     // that have text
    size_t last_line;
} text_report;

typedef struct {
    FILE *file, *label_file;
    char *path, *label_path; // of the files, until they are finished
    retrofit_tokenizer *tokenizer;
    retrofit_chat *chat;                      // NULL: there is none, or it cannot be followed
    char *no_chat;                            // and why
    size_t conversations, labels;             // among the documents; labels that count
    retrofit_encoder **encoders;              // [threads] one for each thread
    size_t threads;
    int32_t eos;                              // to add to each document
    bool adds_eos;                            // the tokenizer adds it to a text
    bool narrow;                              // ids are written as uint16
    size_t documents, tokens;                 // so far
    size_t text_bytes, read_bytes, all_bytes; // of stripped text; of the files, so far and in all
    double start;                             // seconds
    size_t files;                             // in all
    text_report report;                       // on the file that is read
    size_t lost[LOSSES];                      // in all files
} shard_writer;

typedef struct {
    char *raw;         // the file, or a line of it
    size_t size, line; // of raw in bytes; from 1, or 0 for a whole file
    bool has_member;   // whether the line has the member that is the text
    size_t text_bytes; // of the stripped text
    int32_t *ids;      // [count] of it, NULL if it is empty
    size_t count;
    int32_t *labels;   // [count] of a conversation; NULL: it is a text
    bool eos_counts;   // whether EOS behind the conversation is learned
    size_t lost[LOSSES];
    bool failed;
    char *error; // what was wrong with it; NULL if memory is out even for that
} document;

// ---- What is no text ----------------------------------------------------------------------------

// Files that are no UTF-8 text, by how they begin.
static const struct {
    const char *begin;
    size_t at, length;
    const char *kind, *advice;
} foreign_kinds[] = {
    {"\xff\xfe\0\0", 0, 4, "UTF-32 text", "convert it first: iconv -f UTF-32 -t UTF-8"},
    {"\0\0\xfe\xff", 0, 4, "UTF-32 text", "convert it first: iconv -f UTF-32 -t UTF-8"},
    {"\xff\xfe", 0, 2, "UTF-16 text", "convert it first: iconv -f UTF-16 -t UTF-8"},
    {"\xfe\xff", 0, 2, "UTF-16 text", "convert it first: iconv -f UTF-16 -t UTF-8"},
    {"\x1f\x8b", 0, 2, "compressed with gzip", "decompress it first: gzip -d"},
    {"\x28\xb5\x2f\xfd", 0, 4, "compressed with zstd", "decompress it first: zstd -d"},
    {"\xfd" "7zXZ", 0, 5, "compressed with xz", "decompress it first: xz -d"},
    {"\x04\x22\x4d\x18", 0, 4, "compressed with lz4", "decompress it first: lz4 -d"},
    {"1AY&SY", 4, 6, "compressed with bzip2", "decompress it first: bzip2 -d"},
    {"7z\xbc\xaf\x27\x1c", 0, 6, "a 7z archive", "unpack it first"},
    {"PK\3\4", 0, 4, "a zip archive (or an Office document)", "unpack it first"},
    {"ustar", 257, 5, "a tar archive", "unpack it first"},
    {"PAR1", 0, 4, "a Parquet file", "write its text as .jsonl first"},
    {"ARROW1", 0, 6, "an Arrow file", "write its text as .jsonl first"},
    {"SQLite format 3", 0, 15, "a database", "write its text as .jsonl first"},
    {"%PDF-", 0, 5, "a PDF file", "extract its text first"},
    {"{\\rtf", 0, 5, "an RTF file", "extract its text first"},
    {"\xd0\xcf\x11\xe0", 0, 4, "an Office document", "extract its text first"},
    {"version https://git-lfs.github.com/spec", 0, 39, "a Git LFS pointer, not the file itself",
     "git lfs pull"},
};

// What is not text would mostly be refused where it is not UTF-8, but only once it is reached, and
// nobody would learn from the byte what the file is.
static void check_kind(const char *path) {
    char begin[4096];
    FILE *file = fopen(path, "rb");
    if (!file) die(1, "%s: %s", path, strerror(errno));
    size_t size = fread(begin, 1, sizeof begin, file), nuls = 0;
    fclose(file);
    for (size_t i = 0; i < sizeof foreign_kinds / sizeof *foreign_kinds; i++) {
        size_t at = foreign_kinds[i].at, length = foreign_kinds[i].length;
        if (size >= at + length && !memcmp(begin + at, foreign_kinds[i].begin, length))
            die(1, "%s: this is %s: %s", path, foreign_kinds[i].kind, foreign_kinds[i].advice);
    }
    // Latin letters in UTF-16 are half NULs.
    for (size_t i = 0; i < size; i++) nuls += begin[i] == 0;
    if (nuls > 1 && nuls >= size / 4)
        die(1, "%s: %zu of its first %zu bytes are NUL, so it is UTF-16 text without a byte order "
               "mark (convert it first: iconv -f UTF-16LE -t UTF-8), or no text", path, nuls, size);
}

// ---- Progress -----------------------------------------------------------------------------------

// part: bytes of the document at work that are done.
static void show_progress(const shard_writer *writer, size_t part) {
    if (writer->all_bytes == 0 || !retrofit_live_line_due()) return;
    double read = (double)(writer->read_bytes + part), all = (double)writer->all_bytes;
    double elapsed = retrofit_seconds() - writer->start;
    char text[160], speed[64] = "";
    if (read > 0)
        snprintf(speed, sizeof speed, ", %.1f MB/s, ETA %.0f s", read / 1e6 / elapsed,
                 (all - read) * elapsed / read);
    snprintf(text, sizeof text, "%.1f of %.1f MB, %zu documents, %zu tokens%s", read / 1e6,
             all / 1e6, writer->documents, writer->tokens, speed);
    retrofit_live_line(text);
}

// The same while a long document is encoded.
static void show_part(void *writer, size_t part) {
    show_progress(writer, part);
}

// ---- One document -------------------------------------------------------------------------------

// The UTF-16 code unit that \uXXXX at text stands for; 0 if there is none. A NUL ends the text.
static uint32_t code_unit_at(const char *text) {
    if (text[0] != '\\' || text[1] != 'u') return 0;
    if (strspn(text + 2, "0123456789abcdefABCDEF") < 4) return 0;
    char digits[5] = {text[2], text[3], text[4], text[5], 0};
    return (uint32_t)strtoul(digits, NULL, 16);
}

// Of an escape in a string, which begins at text: makes half of a surrogate pair \ufffd and counts
// it. Returns how many bytes to go on.
static size_t mend_escape(char *text, size_t *halves) {
    uint32_t high = code_unit_at(text);
    if (high < 0xd800 || high > 0xdfff) return 2;
    uint32_t low = high < 0xdc00 ? code_unit_at(text + 6) : 0;
    if (low >= 0xdc00 && low <= 0xdfff) return 12;
    memcpy(text + 2, "fffd", 4);
    (*halves)++;
    return 6;
}

// Python's json writes what is no JSON, and people have such files. This makes JSON of it in place:
// half of a surrogate pair, which is no character, becomes U+FFFD; NaN, which pandas puts where
// nothing is, an empty string; Infinity null. Returns the number of halves. A NUL follows the line.
static size_t mend_line(char *line, size_t size) {
    static const struct {
        const char *word, *json; // of the same length
    } words[] = {{"NaN", "\"\" "}, {"-Infinity", "null     "}, {"Infinity", "null    "}};
    size_t halves = 0, step;
    bool in_string = false;
    for (size_t i = 0; i < size; i += step) {
        step = 1;
        if (line[i] == '"') in_string = !in_string;
        if (in_string) {
            if (line[i] == '\\') step = mend_escape(line + i, &halves);
            continue;
        }
        for (size_t j = 0; j < sizeof words / sizeof *words; j++) {
            size_t length = strlen(words[j].word);
            if (strncmp(line + i, words[j].word, length)) continue;
            memcpy(line + i, words[j].json, length);
            step = length;
        }
    }
    return halves;
}

static const char *json_kind(const retrofit_json *value) {
    static const char *const kinds[] = {"null", "a truth value", "a number", "a string", "an array",
                                        "an object"};
    return kinds[value->type];
}

// The member of a line that --field names; without it "text" or, where that is null or not there,
// "messages". *member: NULL if it is null. false or error, also if it cannot be either.
static bool find_member(document *document, const char *where, const retrofit_json *line,
                        const retrofit_json **member) {
    const char *name = options.field ? options.field : "text";
    if (line->type != RETROFIT_JSON_OBJECT)
        return retrofit_fail("%s: %s, not an object with a \"%s\"", where, json_kind(line), name);
    const retrofit_json *found = retrofit_json_get(line, name);
    const retrofit_json *messages = options.field ? NULL : retrofit_json_get(line, "messages");
    bool has_text = found && found->type != RETROFIT_JSON_NULL;
    bool has_messages = messages && messages->type != RETROFIT_JSON_NULL;
    if (has_text && has_messages)
        return retrofit_fail("%s: it has both \"text\" and \"messages\": say which with --field",
                             where);
    if (has_messages && messages->type != RETROFIT_JSON_ARRAY)
        return retrofit_fail("%s: \"messages\" is %s, not an array", where, json_kind(messages));
    bool fits = !has_text || found->type == RETROFIT_JSON_STRING;
    if (!fits && !(options.field && found->type == RETROFIT_JSON_ARRAY))
        return retrofit_fail("%s: \"%s\" is %s, not a string: name another with --field", where,
                             name, json_kind(found));
    *member = has_text ? found : has_messages ? messages : NULL;
    document->has_member = found || messages;
    document->lost[LOST_MEMBER] = !document->has_member;
    document->lost[LOST_NULL] = document->has_member && !*member;
    return true;
}

// Parses a line of a .jsonl file. NULL or error.
static retrofit_json *parse_line(const char *where, const char *text, size_t size) {
    retrofit_json *line = retrofit_json_parse(text, size, where);
    if (!line && *text == '[')
        retrofit_fail("%s: a JSON array: each line of a .jsonl file has an object of its own; "
                      "jq -c '.[]' makes such lines", where);
    return line;
}

static retrofit_encoder *own_encoder(const shard_writer *writer) {
#ifdef _OPENMP
    return writer->encoders[omp_get_thread_num()];
#else
    return writer->encoders[0];
#endif
}

// Encodes a text, which is UTF-8. false or error.
static bool encode_text(shard_writer *writer, document *document, const char *text, size_t size) {
    retrofit_strip(&text, &size);
    document->text_bytes = size;
    for (size_t i = 0; i < size; i++) document->lost[LOST_NUL] += text[i] == 0;
    document->lost[LOST_EMPTY] = size == 0;
    if (size == 0) return true;
    document->ids = retrofit_encode_with(own_encoder(writer), text, size, true, &document->count,
                                         show_part, writer);
    return document->ids;
}

// ---- Conversations ------------------------------------------------------------------------------

// A place in the text, and how many of the ids are before it.
typedef struct {
    size_t text, ids;
} text_place;

typedef struct {
    shard_writer *writer;
    document *document;
    const char *where;
    retrofit_message *messages; // [count]
    size_t count;
    retrofit_text text, marks;  // as the template writes it
    size_t size;                // of the text without white space at its end
    text_place at;              // the last that was asked for
    text_place apart;           // the last from which on the text has the same ids by itself
} conversation;

static bool is_assistant(const retrofit_message *message) {
    return !strcmp(message->role, "assistant");
}

// A member of message number i, from 1, which must be a string. NULL or error.
static const retrofit_json *message_string(const conversation *c, const retrofit_json *message,
                                           size_t i, const char *name) {
    if (message->type != RETROFIT_JSON_OBJECT) {
        retrofit_fail("%s: message %zu is %s, not an object with \"role\" and \"content\"",
                      c->where, i, json_kind(message));
        return NULL;
    }
    const retrofit_json *value = retrofit_json_get(message, name);
    if (!value) {
        retrofit_fail("%s: message %zu has no \"%s\"", c->where, i, name);
        return NULL;
    }
    if (value->type == RETROFIT_JSON_STRING) return value;
    retrofit_fail("%s: \"%s\" of message %zu is %s, not a string: only text is followed here",
                  c->where, name, i, json_kind(value));
    return NULL;
}

// What of a message would be lost: a template that knows these is refused where it
// reads them, but others pass over them, and what is learned then is an answer without them.
static bool check_message(const conversation *c, const retrofit_json *message) {
    static const char *const names[] = {"tool_calls", "function_call", "reasoning_content",
                                        "thinking"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const retrofit_json *member = retrofit_json_get(message, names[i]);
        bool empty = !member || member->type == RETROFIT_JSON_NULL ||
                     (member->type == RETROFIT_JSON_STRING && member->length == 0) ||
                     (member->type >= RETROFIT_JSON_ARRAY && member->count == 0);
        if (!empty)
            return retrofit_fail("%s: \"%s\" of message %zu is not followed here: make it part of "
                                 "the content, or remove it", c->where, names[i], c->count + 1);
    }
    const retrofit_json *weight = retrofit_json_get(message, "weight");
    bool usual = !weight || weight->type == RETROFIT_JSON_NULL ||
                 (weight->type == RETROFIT_JSON_NUMBER && weight->number == 1);
    if (usual) return true;
    return retrofit_fail("%s: \"weight\" of message %zu is %s: all that the assistant says counts "
                         "alike here", c->where, c->count + 1, retrofit_json_value_text(weight));
}

static bool read_messages(conversation *c, const retrofit_json *list) {
    if (list->count == 0) return retrofit_fail("%s: a conversation without messages", c->where);
    c->messages = retrofit_allocate(list->count, sizeof *c->messages);
    if (!c->messages) return false;
    for (const retrofit_json *json = list->child; json; json = json->next) {
        const retrofit_json *role = message_string(c, json, c->count + 1, "role");
        if (!role) return false;
        const retrofit_json *content = message_string(c, json, c->count + 1, "content");
        if (!content) return false;
        if (strlen(role->string) != role->length)
            return retrofit_fail("%s: a NUL in the role of message %zu", c->where, c->count + 1);
        if (!check_message(c, json)) return false;
        c->messages[c->count++] =
            (retrofit_message){role->string, content->string, content->length, json};
    }
    return true;
}

// What else of a line would change how a template writes it.
static bool check_line(const retrofit_json *line, const char *where) {
    static const char *const names[] = {"tools", "documents", "chat_template_kwargs"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const retrofit_json *member = retrofit_json_get(line, names[i]);
        bool has_members = member && member->type >= RETROFIT_JSON_ARRAY;
        bool empty = !member || member->type == RETROFIT_JSON_NULL;
        if (!empty && !(has_members && member->count == 0))
            return retrofit_fail("%s: \"%s\" is not followed here: make it part of the messages, "
                                 "or remove it", where, names[i]);
    }
    return true;
}

// Whether the ids of text[from … to) by itself are the document's from number `at` on: how many of
// them are, *same, and whether that is all, *all. at is SIZE_MAX for those at its end. false or
// error.
static bool compare_ids(const conversation *c, size_t from, size_t to, size_t at, size_t *same,
                        bool *all) {
    const document *document = c->document;
    size_t count, n = 0;
    int32_t *ids = retrofit_encode_with(own_encoder(c->writer), c->text.bytes + from, to - from,
                                        false, &count, NULL, NULL);
    if (!ids) return false;
    if (at == SIZE_MAX) at = document->count - retrofit_min(count, document->count);
    while (n < count && at + n < document->count && ids[n] == document->ids[at + n]) n++;
    *same = n;
    *all = n == count;
    free(ids);
    return true;
}

// How many ids come from text[0 … to), as c->at.ids. Mostly what is between the last such place and
// this one has the same ids by itself, or what is between an earlier place and this one (a
// SentencePiece puts a space in front of what stands by itself), or what follows has. If none has,
// since a token reaches over the place, they are those that are the same if the text ends there.
// false or error.
static bool count_ids(conversation *c, size_t to) {
    size_t same;
    bool all;
    text_place from = c->at;
    if (!compare_ids(c, from.text, to, from.ids, &same, &all)) return false;
    if (all) c->apart = from;
    if (!all && c->apart.text < from.text) {
        from = c->apart;
        if (!compare_ids(c, from.text, to, from.ids, &same, &all)) return false;
    }
    size_t ids = from.ids + same;
    if (!all) {
        if (!compare_ids(c, to, c->size, SIZE_MAX, &same, &all)) return false;
        ids = c->document->count - same;
    }
    if (!all) {
        if (!compare_ids(c, 0, to, 0, &same, &all)) return false;
        ids = same;
    }
    c->at = (text_place){to, ids};
    return true;
}

static bool is_special(const retrofit_tokenizer *tokenizer, int32_t id) {
    size_t size = 1;
    free(retrofit_decode(tokenizer, &id, 1, true, &size));
    return size == 0;
}

// Ids first … end - 1 count. EOS does too where it is what ends the assistant's turn.
static void count_as_said(conversation *c, size_t first, size_t end) {
    document *document = c->document;
    for (size_t i = first; i < end; i++) document->labels[i] = document->ids[i];
    bool last = first < end && end == document->count;
    document->eos_counts = last && !is_special(c->writer->tokenizer, document->ids[end - 1]);
}

// The assistant says text[begin … end). Templates mostly write white space behind the token that
// ends a turn: that is not said, unless there is no such token.
static bool label_turn(conversation *c, size_t begin, size_t end, bool marked) {
    if (!count_ids(c, begin)) return false;
    size_t first = c->at.ids;
    size_t filled = retrofit_size_without_spaces(c->text.bytes + begin, end - begin);
    if (!marked && filled > 0) {
        if (!count_ids(c, begin + filled)) return false;
        size_t ids = c->at.ids;
        bool ends = ids > first && is_special(c->writer->tokenizer, c->document->ids[ids - 1]);
        if (ends) end = begin + filled;
    }
    if (!count_ids(c, end)) return false;
    count_as_said(c, first, c->at.ids);
    return true;
}

// The size of the first `count` messages as the template writes them, which must be how it begins
// the whole conversation. false or error.
static bool measure_prefix(const conversation *c, size_t count, bool prompt, size_t *size) {
    const retrofit_chat *chat = c->writer->chat;
    retrofit_text part;
    if (!retrofit_chat_render(chat, c->messages, count, prompt, &part, NULL))
        return retrofit_fail("%s: the first %zu messages alone: %s", c->where, count,
                             retrofit_error());
    size_t same = 0, most = retrofit_min(part.size, c->text.size);
    while (same < most && part.bytes[same] == c->text.bytes[same]) same++;
    bool begins = same == part.size;
    free(part.bytes);
    *size = same;
    if (begins) return true;
    return retrofit_fail("%s: %s: chat template: what it writes of the first %zu messages%s is not "
                         "how it begins all %zu of them (from byte %zu on), so that it cannot be "
                         "told what the assistant says: mark that with {%% generation %%} in it",
                         c->where, retrofit_chat_where(chat), count,
                         prompt ? ", up to the assistant's answer," : "", c->count, same);
}

static bool label_turns(conversation *c) {
    for (size_t i = 0; i < c->count; i++) {
        size_t begin, end;
        if (!is_assistant(&c->messages[i])) continue;
        if (!measure_prefix(c, i, true, &begin)) return false;
        if (!measure_prefix(c, i + 1, false, &end)) return false;
        end = retrofit_min(end, c->size);
        if (begin < end && !label_turn(c, begin, end, false)) return false;
    }
    return true;
}

static bool label_marks(conversation *c) {
    const size_t *marks = (const void *)c->marks.bytes;
    for (size_t i = 0; i < c->marks.size / sizeof *marks; i += 2) {
        size_t end = retrofit_min(marks[i + 1], c->size);
        if (marks[i] < end && !label_turn(c, marks[i], end, true)) return false;
    }
    return true;
}

static bool label_conversation(conversation *c, const retrofit_json *list) {
    document *document = c->document;
    const retrofit_chat *chat = c->writer->chat;
    if (!chat) return retrofit_fail("%s: a conversation, but %s", c->where, c->writer->no_chat);
    if (!read_messages(c, list)) return false;
    if (!retrofit_chat_write(chat, c->messages, c->count, false, &c->text, &c->marks))
        return retrofit_fail("%s: %s", c->where, retrofit_error());
    c->size = retrofit_size_without_spaces(c->text.bytes, c->text.size);
    document->text_bytes = c->size;
    document->lost[LOST_EMPTY] = c->size == 0;
    if (c->size == 0) return true;
    document->ids = retrofit_encode_with(own_encoder(c->writer), c->text.bytes, c->size, false,
                                         &document->count, NULL, NULL);
    document->labels = retrofit_allocate(document->count, sizeof(int32_t));
    if (!document->ids || !document->labels) return false;
    for (size_t i = 0; i < document->count; i++) document->labels[i] = RETROFIT_IGNORED;
    bool marked = retrofit_chat_has_marks(chat);
    if (!(marked ? label_marks(c) : label_turns(c))) return false;
    size_t counted = retrofit_count_labels(document->labels, document->count);
    document->lost[LOST_UNSAID] = counted == 0;
    return true;
}

// Encodes a list of messages and labels what the assistant says. false or error.
static bool encode_conversation(shard_writer *writer, document *document, const char *where,
                                const retrofit_json *list) {
    conversation c = {.writer = writer, .document = document, .where = where};
    bool ok = label_conversation(&c, list);
    free(c.messages);
    free(c.text.bytes);
    free(c.marks.bytes);
    return ok;
}

// ---- A file, or a line --------------------------------------------------------------------------

// Encodes what is in a line, or in a whole file; it is UTF-8. false or error.
static bool encode_valid(shard_writer *writer, document *document, const char *where,
                         const char *text, size_t size) {
    retrofit_skip_mark(&text, &size);
    retrofit_strip(&text, &size);
    if (document->line == 0 || size == 0) return encode_text(writer, document, text, size);
    retrofit_json *line = parse_line(where, text, size);
    const retrofit_json *member = NULL;
    bool ok = line && find_member(document, where, line, &member);
    if (ok && member && member->type == RETROFIT_JSON_STRING)
        ok = encode_text(writer, document, member->string, member->length);
    else if (ok && member)
        ok = check_line(line, where) && encode_conversation(writer, document, where, member);
    retrofit_json_free(line);
    return ok;
}

// Several threads do this at a time. false or error.
static bool encode_document(shard_writer *writer, document *document, const char *path) {
    char where[RETROFIT_PATH + 32];
    const char *text = document->raw;
    size_t size = document->size, invalid = retrofit_find_invalid(text, 0, size);
    if (document->line == 0) snprintf(where, sizeof where, "%s", path);
    else snprintf(where, sizeof where, "%s: line %zu", path, document->line);
    if (document->line > 0) document->lost[LOST_HALF] = mend_line(document->raw, size);
    if (invalid == size) return encode_valid(writer, document, where, text, size);

    if (options.encoding_errors != ERRORS_REPLACE)
        return retrofit_fail("%s: byte %zu: not UTF-8 (%02X): convert it first, e.g. iconv -f "
                             "WINDOWS-1252 -t UTF-8, or --encoding-errors replace", where, invalid,
                             (unsigned char)text[invalid]);
    retrofit_text valid = {0};
    document->lost[LOST_BYTES] = retrofit_append_valid(&valid, text, size);
    bool ok = !valid.failed && encode_valid(writer, document, where, valid.bytes, valid.size);
    free(valid.bytes);
    return ok;
}

// The name of the labels that go with the shard.
static const char *label_name(void) {
    static char name[RETROFIT_PATH + sizeof RETROFIT_LABELS_SUFFIX];
    snprintf(name, sizeof name, "%s%s", options.to, RETROFIT_LABELS_SUFFIX);
    return name;
}

static void write_ids(shard_writer *writer, const int32_t *ids, size_t count) {
    enum { BLOCK = 4096 };
    uint16_t narrow[BLOCK];
    size_t width = writer->narrow ? sizeof *narrow : sizeof *ids;
    if (writer->tokens + count > INT32_MAX)
        die(1, "more than %d tokens, the most a shard can hold: split the input", INT32_MAX);
    for (size_t i = 0; i < count; i += BLOCK) {
        size_t some = retrofit_min(count - i, BLOCK);
        for (size_t j = 0; j < some; j++) narrow[j] = (uint16_t)ids[i + j];
        const void *block = writer->narrow ? (const void *)narrow : ids + i;
        if (fwrite(block, width, some, writer->file) != some)
            die(1, "%s: writing failed: %s", options.to, strerror(errno));
    }
    writer->tokens += count;
}

// A shard has labels or none.
static void check_one_kind(const shard_writer *writer, const document *document, const char *path) {
    bool conversation = document->labels != NULL;
    if (writer->documents == 0 || conversation == (writer->conversations > 0)) return;
    die(1, "%s: line %zu: %s: make a shard of each", path, document->line,
        conversation ? "a conversation, behind texts" : "a text, behind conversations");
}

static void write_labels(shard_writer *writer, const int32_t *labels, size_t count) {
    static const int32_t header[256]; // its numbers are known at the end
    if (!writer->label_file) {
        writer->label_path = retrofit_file_begin(label_name());
        must(writer->label_path != NULL);
        writer->label_file = fopen(writer->label_path, "wb");
        bool ok = writer->label_file && fwrite(header, sizeof header, 1, writer->label_file) == 1;
        if (!ok) die(1, "%s: %s", writer->label_path, strerror(errno));
    }
    if (fwrite(labels, sizeof *labels, count, writer->label_file) != count)
        die(1, "%s: writing failed: %s", label_name(), strerror(errno));
    writer->labels += retrofit_count_labels(labels, count);
}

static void write_conversation(shard_writer *writer, const document *document) {
    int32_t eos_label = document->eos_counts ? writer->eos : RETROFIT_IGNORED;
    write_ids(writer, document->ids, document->count);
    write_labels(writer, document->labels, document->count);
    size_t count = document->count; // 0: the tokenizer has no token for any of it
    if (!count || document->ids[count - 1] != writer->eos) {
        write_ids(writer, &writer->eos, 1);
        write_labels(writer, &eos_label, 1);
    }
    writer->conversations++;
}

// Adds what was lost of a document to what its file lost.
static void add_losses(text_report *report, const document *document) {
    report->last_line = document->line;
    report->members += document->has_member;
    report->documents += document->text_bytes > 0;
    for (int i = 0; i < LOSSES; i++) {
        if (document->lost[i] && !report->counts[i]) report->lines[i] = document->line;
        report->counts[i] += document->lost[i];
    }
}

static void write_document(shard_writer *writer, const document *document, const char *path) {
    if (document->failed) die(1, "%s", document->error ? document->error : "out of memory");
    add_losses(&writer->report, document);
    writer->read_bytes += document->size;
    writer->text_bytes += document->text_bytes;
    if (document->text_bytes == 0) return;
    check_one_kind(writer, document, path);
    if (document->labels) write_conversation(writer, document);
    else {
        write_ids(writer, document->ids, document->count);
        if (!writer->adds_eos) write_ids(writer, &writer->eos, 1);
    }
    writer->documents++;
}

// ---- Files of documents -------------------------------------------------------------------------

// Says what was lost of a file, after its last line. Empty documents are counted only in the end:
// mostly they are empty lines.
static void report_file(shard_writer *writer, const char *path) {
    const text_report *report = &writer->report;
    retrofit_live_line(NULL);
    for (int i = 0; i < LOSSES; i++) {
        size_t count = report->counts[i], line = report->lines[i];
        writer->lost[i] += count;
        char where[48] = "";
        if (i == LOST_EMPTY || !count) continue;
        if (line) snprintf(where, sizeof where, ", the first in line %zu", line);
        retrofit_note("%s: %zu %s%s", path, count, loss_texts[i], where);
    }
    // That there is none in any file is an error, said in the end.
    if (!report->documents && writer->files > 1) retrofit_note("%s: there is no text in it", path);
    memset(&writer->report, 0, sizeof writer->report);
}

// Encodes documents in parallel and writes them in their order.
static void write_batch(shard_writer *writer, document *batch, size_t count, const char *path) {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) if (count > 1)
#endif
    for (size_t i = 0; i < count; i++) {
        if (encode_document(writer, &batch[i], path)) continue;
        batch[i].failed = true;
        batch[i].error = retrofit_copy_string(retrofit_error()); // of the thread's own
    }
    for (size_t i = 0; i < count; i++) {
        write_document(writer, &batch[i], path);
        free(batch[i].raw);
        free(batch[i].ids);
        free(batch[i].labels);
    }
    show_progress(writer, 0);
}

// false at the end of the file.
static bool read_line(FILE *file, const char *path, document *document) {
    size_t capacity = 0;
    ssize_t length = getline(&document->raw, &capacity, file);
    if (length < 0 && !feof(file))
        die(1, "%s: line %zu: %s", path, document->line, strerror(errno));
    if (length < 0) {
        free(document->raw);
        return false;
    }
    document->size = (size_t)length;
    return true;
}

// A line without the text is skipped. Where no line up to now has one, the text has another name.
static void check_member(const text_report *report, const char *path) {
    if (report->counts[LOST_MEMBER] && !report->members)
        die(1, "%s: line %zu: no \"%s\" in it, nor in any other up to line %zu%s: name another "
               "with --field", path, report->lines[LOST_MEMBER],
            options.field ? options.field : "text", report->last_line,
            options.field ? "" : ", and no \"messages\"");
}

// .jsonl: a document in each line.
static void tokenize_lines(shard_writer *writer, const char *path) {
    enum { BATCH_DOCUMENTS = 1024, BATCH_BYTES = 1 << 24 };
    static document batch[BATCH_DOCUMENTS];
    FILE *file = fopen(path, "rb");
    if (!file) die(1, "%s: %s", path, strerror(errno));
    size_t count = 0, bytes = 0;
    bool more = true;
    for (size_t line = 1; more; line++) {
        document next = {.line = line};
        more = read_line(file, path, &next);
        if (more) {
            batch[count++] = next;
            bytes += next.size;
        }
        if (count == BATCH_DOCUMENTS || bytes > BATCH_BYTES || !more) {
            write_batch(writer, batch, count, path);
            check_member(&writer->report, path);
            count = 0;
            bytes = 0;
        }
    }
    fclose(file);
    report_file(writer, path);
}

// .txt: the file is a document.
static void tokenize_whole(shard_writer *writer, const char *path) {
    document document = {.line = 0};
    document.raw = retrofit_read_file(path, &document.size);
    must(document.raw != NULL);
    write_batch(writer, &document, 1, path);
    report_file(writer, path);
}

// ---- One shard ----------------------------------------------------------------------------------

typedef struct {
    dev_t device;
    ino_t inode;
    const char *path;
} file_identity;

static int compare_identities(const void *a, const void *b) {
    const file_identity *x = a, *y = b;
    if (x->device != y->device) return x->device < y->device ? -1 : 1;
    return (x->inode > y->inode) - (x->inode < y->inode);
}

// Returns what stat says of the file.
static struct stat check_name(const char *path) {
    struct stat status;
    bool there = stat(path, &status) == 0;
    int error = errno;
    if (there && S_ISDIR(status.st_mode))
        die(1, "%s: a directory: name the files in it, as in %s/*.txt or %s/*.jsonl", path, path,
            path);
    if (!ends_with(path, ".txt") && !ends_with(path, ".jsonl"))
        die(2, "%s: the name ends neither in .txt nor in .jsonl, the kinds that are known", path);
    if (there && !S_ISREG(status.st_mode)) die(1, "%s: not a regular file", path);
    if (there) return status;
    if (error == ENOENT && strpbrk(path, "*?["))
        die(1, "%s: No such file: the shell found none of this pattern, or it was in quotes", path);
    die(1, "%s: %s", path, strerror(error));
}

// The output is made beside its final place and moved there at the end, which must be possible.
static void check_output(const file_identity *files, size_t count) {
    struct stat status;
    if (!stat(label_name(), &status) && !S_ISREG(status.st_mode))
        die(1, "--to %s: %s is there already, and no file", options.to, label_name());
    if (!stat(options.to, &status)) {
        if (!S_ISREG(status.st_mode)) die(1, "--to %s: there already, and no file", options.to);
        file_identity output = {status.st_dev, status.st_ino, options.to};
        for (size_t i = 0; i < count; i++)
            if (!compare_identities(&files[i], &output))
                die(1, "--to %s: this is the input %s: choose another name", options.to,
                    files[i].path);
        retrofit_note("%s is there already and will be replaced", options.to);
        return;
    }
    char parent[RETROFIT_PATH];
    int length = snprintf(parent, sizeof parent, "%s", options.to);
    if (length >= RETROFIT_PATH) die(1, "--to: the path is too long");
    retrofit_parent_directory(parent);
    if (errno != ENOENT || access(parent, W_OK | X_OK))
        die(1, "--to %s: %s: %s", options.to, parent, strerror(errno));
}

// The names and sizes of all files, and how they begin, are checked before hours are spent on the
// first. Returns the sum of the sizes.
static size_t check_text_files(const char *const *files, size_t count) {
    size_t bytes = 0;
    file_identity *identities = allocate_or_die(count, sizeof *identities);
    for (size_t i = 0; i < count; i++) {
        struct stat status = check_name(files[i]);
        check_kind(files[i]);
        identities[i] = (file_identity){status.st_dev, status.st_ino, files[i]};
        bytes += (size_t)status.st_size;
    }
    check_output(identities, count);
    qsort(identities, count, sizeof *identities, compare_identities);
    for (size_t i = 1; i < count; i++) {
        if (compare_identities(&identities[i - 1], &identities[i])) continue;
        retrofit_note("%s and %s are the same file: its text will be there twice",
                      identities[i - 1].path, identities[i].path);
    }
    free(identities);
    return bytes;
}

static void open_tokenizer(shard_writer *writer) {
    char path[RETROFIT_PATH];
    const char *directory = retrofit_model_directory(options.tokenizer, path);
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(directory);
    must(tokenizer != NULL);

    retrofit_config config;
    size_t size = retrofit_tokenizer_size(tokenizer);
    int32_t eos = retrofit_tokenizer_eos(tokenizer);
    bool has_config = eos < 0 && retrofit_config_read(&config, directory);
    if (has_config && config.eos_count) eos = config.eos[0];
    if (eos < 0 || (size_t)eos >= size)
        die(1,
            "%s: neither tokenizer_config.json (eos_token) nor config.json (eos_token_id) names a "
            "token for the end of a document: add one",
            directory);
    writer->tokenizer = tokenizer;
    writer->eos = eos;
    writer->adds_eos = retrofit_tokenizer_adds_at_end(tokenizer, eos);
    writer->chat = retrofit_chat_load(directory, tokenizer);
    if (!writer->chat) writer->no_chat = retrofit_copy_string(retrofit_error());
    writer->narrow = size <= 65536;
}

static void make_encoders(shard_writer *writer) {
    writer->threads = 1;
#ifdef _OPENMP
    writer->threads = (size_t)omp_get_max_threads();
#endif
    writer->encoders = allocate_or_die(writer->threads, sizeof *writer->encoders);
    for (size_t i = 0; i < writer->threads; i++) {
        writer->encoders[i] = retrofit_encoder_new(writer->tokenizer);
        must(writer->encoders[i] != NULL);
    }
}

static void free_encoders(shard_writer *writer) {
    for (size_t i = 0; i < writer->threads; i++) retrofit_encoder_free(writer->encoders[i]);
    free(writer->encoders);
    retrofit_chat_free(writer->chat);
    free(writer->no_chat);
    retrofit_tokenizer_free(writer->tokenizer);
}

static void create_shard(shard_writer *writer) {
    static const int32_t header[256]; // its numbers are known at the end
    writer->path = retrofit_file_begin(options.to);
    must(writer->path != NULL);
    writer->file = fopen(writer->path, "wb");
    if (!writer->file) die(1, "%s: %s", writer->path, strerror(errno));
    if (fwrite(header, sizeof header, 1, writer->file) != 1)
        die(1, "%s: %s", writer->path, strerror(errno));
}

static void finish_file(FILE *file, const char *path, const int32_t header[256]) {
    errno = 0;
    bool ok = !fseek(file, 0, SEEK_SET) && fwrite(header, 256 * sizeof *header, 1, file) == 1;
    must(retrofit_finish_file(file, path, ok));
}

// The labels get their name before the shard does: if the program ends in between, those of the
// shard that was there before are not its own, and it is refused.
static void finish_labels(shard_writer *writer) {
    size_t size;
    void *shard = retrofit_map_file(writer->path, &size);
    must(shard != NULL);
    uint64_t hash = retrofit_sample_hash(shard, size);
    munmap(shard, size);
    int32_t header[256] = {RETROFIT_LABELS_MAGIC, 1, (int32_t)writer->tokens,
                           (int32_t)(uint32_t)hash, (int32_t)(uint32_t)(hash >> 32)};
    finish_file(writer->label_file, writer->label_path, header);
    must(retrofit_file_commit(writer->label_path, label_name()));
    free(writer->label_path);
}

// Writes the header, and gives the file its name once it is on the disk.
static void finish_shard(shard_writer *writer) {
    uint64_t hash = retrofit_tokenizer_hash(writer->tokenizer);
    int32_t header[256] = {0};
    header[0] = writer->narrow ? RETROFIT_SHARD_MAGIC_16 : RETROFIT_SHARD_MAGIC_32;
    header[1] = writer->narrow ? 1 : 7; // version
    header[2] = (int32_t)writer->tokens;
    header[3] = (int32_t)(uint32_t)hash;
    header[4] = (int32_t)(uint32_t)(hash >> 32);
    header[5] = writer->conversations > 0;
    finish_file(writer->file, writer->path, header);
    if (writer->conversations > 0) finish_labels(writer);
    must(retrofit_file_commit(writer->path, options.to));
    free(writer->path);
    if (writer->conversations > 0 || !retrofit_is_there(label_name())) return;
    if (unlink(label_name())) die(1, "%s: %s", label_name(), strerror(errno));
    retrofit_note("%s: removed: it was the labels of another shard of this name", label_name());
}

static void tokenize(const char *const *files, size_t count) {
    shard_writer writer = {.all_bytes = check_text_files(files, count), .files = count};
    open_tokenizer(&writer);
    make_encoders(&writer);
    create_shard(&writer);
    writer.start = retrofit_seconds();
    for (size_t i = 0; i < count; i++) {
        if (ends_with(files[i], ".txt")) tokenize_whole(&writer, files[i]);
        else tokenize_lines(&writer, files[i]);
    }
    if (!writer.documents)
        die(1, "there is no text in %s%s", files[0], count > 1 ? " and the others" : "");
    finish_shard(&writer);

    printf("%s: %zu documents, %zu tokens of %d bits, %.2f bytes of text per token, %.1f s\n",
           options.to, writer.documents, writer.tokens, writer.narrow ? 16 : 32,
           (double)writer.text_bytes / (double)writer.tokens, retrofit_seconds() - writer.start);
    if (writer.conversations > 0)
        printf("%s: %zu of these tokens are what the assistant says, and count\n", label_name(),
               writer.labels);
    for (int i = 0; i < LOSSES; i++)
        if (writer.lost[i]) printf("%zu %s\n", writer.lost[i], loss_texts[i]);
    free_encoders(&writer);
}

// ---- Rows of tokens for section 2 ---------------------------------------------------------------

// A row is up to 512 tokens of one document. Of a file no more is read than so many documents, or
// of a .txt so many bytes, as surely have the tokens.
enum { ROW_TOKENS = 512, BYTES_PER_TOKEN = 64 };

// Adds a document's first `most` tokens at most to the sample. Returns how many it added.
static size_t add_document(text_sample *sample, const document *document, size_t most,
                           size_t row) {
    size_t count = retrofit_min(document->count, most), at = sample->begins[sample->rows];
    if (!count) return 0;
    memcpy(sample->ids + at, document->ids, count * sizeof *sample->ids);
    for (size_t i = 0; i < count; i += row) {
        size_t length = retrofit_min(count - i, row);
        sample->begins[++sample->rows] = at + i + length;
        sample->longest = retrofit_max(sample->longest, length);
    }
    return count;
}

// The beginning of a .txt, up to a whole character; or a line of a .jsonl. false at the end.
static bool read_document(FILE *file, const char *path, document *document, size_t most) {
    if (document->line > 0) return read_line(file, path, document);
    size_t limit = most * BYTES_PER_TOKEN;
    char *raw = allocate_or_die(limit + 1, 1);
    size_t size = fread(raw, 1, limit + 1, file);
    if (ferror(file)) die(1, "%s: %s", path, strerror(errno));
    bool is_cut = size > limit;
    if (is_cut) size = limit;
    while (is_cut && size > 0 && (raw[size] & 0xc0) == 0x80) size--; // amid a character
    document->raw = raw;
    document->size = size;
    return true;
}

// Adds up to `most` tokens of a file to the sample. Returns how many it added.
static size_t sample_file(text_sample *sample, shard_writer *reader, const char *path, size_t most,
                          size_t row) {
    FILE *file = fopen(path, "rb");
    if (!file) die(1, "%s: %s", path, strerror(errno));
    text_report report = {0};
    bool has_lines = ends_with(path, ".jsonl");
    size_t count = 0;
    for (size_t line = has_lines; count < most; line++) {
        document document = {.line = line};
        if (!read_document(file, path, &document, most)) break;
        if (!encode_document(reader, &document, path)) die(1, "%s", retrofit_error());
        count += add_document(sample, &document, most - count, row);
        add_losses(&report, &document);
        free(document.raw);
        free(document.ids);
        free(document.labels);
        if (!has_lines) break;
    }
    fclose(file);
    check_member(&report, path);
    return count;
}

// A GGUF's tokenizer becomes files for as long as it takes to read them: beside what is to be made,
// or, for a report, in a directory of its own.
static char report_directory[RETROFIT_PATH];
static void remove_report_directory(void) { rmdir(report_directory); }

static retrofit_tokenizer *load_gguf_tokenizer(const gguf_file *gguf) {
    char path[RETROFIT_PATH];
    const char *beside = options.to, *temporary = getenv("TMPDIR");
    if (!beside) {
        must(retrofit_path(report_directory, temporary && *temporary ? temporary : "/tmp",
                           "retrofit-XXXXXX"));
        if (!mkdtemp(report_directory)) die(1, "%s: %s", report_directory, strerror(errno));
        atexit(remove_report_directory);
        must(retrofit_path(path, report_directory, "tokenizer"));
        beside = path;
    }
    char *directory = retrofit_directory_begin(beside);
    must(directory != NULL);
    gguf_write_tokenizer(gguf, directory);
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(directory);
    must(tokenizer != NULL);
    retrofit_directory_abandon(directory);
    if (!options.to) remove_report_directory(); // a signal while layers are measured leaves nothing
    free(directory);
    return tokenizer;
}

// What reads texts but writes no shard; conversations are read by the model's template.
static void open_reader(shard_writer *reader, tokenizer_source source) {
    memset(reader, 0, sizeof *reader);
    reader->start = retrofit_seconds();
    if (source.gguf) {
        reader->tokenizer = load_gguf_tokenizer(source.gguf);
        reader->no_chat = retrofit_copy_string("a GGUF's template is not read: give text");
    } else {
        reader->tokenizer = retrofit_tokenizer_load(source.directory);
        must(reader->tokenizer != NULL);
        reader->chat = retrofit_chat_load(source.directory, reader->tokenizer);
        if (!reader->chat) reader->no_chat = retrofit_copy_string(retrofit_error());
    }
    make_encoders(reader);
}

// Each file gives the same number of tokens, and what one lacks those behind it give.
static void read_sample(text_sample *sample, tokenizer_source source, size_t context) {
    size_t row = retrofit_min(context, ROW_TOKENS), left = options.text_tokens;
    for (size_t i = 0; i < options.file_count; i++) {
        check_name(options.files[i]);
        check_kind(options.files[i]);
    }
    memset(sample, 0, sizeof *sample);
    sample->ids = allocate_or_die(left, sizeof *sample->ids);
    sample->begins = allocate_or_die(left + 1, sizeof *sample->begins);
    shard_writer reader;
    open_reader(&reader, source);
    for (size_t i = 0; i < options.file_count; i++) {
        size_t files = options.file_count - i, share = left / files + (left % files > 0);
        if (share) left -= sample_file(sample, &reader, options.files[i], share, row);
    }
    if (!sample->rows)
        die(1, "there is no text in %s%s", options.files[0],
            options.file_count > 1 ? " and the others" : "");
    free_encoders(&reader);
}

// =================================================================================================
// 6  GGUF
// =================================================================================================

// llama.cpp's file format, versions 2 and 3, little endian. Numbers stand at any address.
//
//     header       "GGUF", u32 version, u64 number of tensors, u64 number of metadata entries
//     metadata     for each: string key, u32 type, value
//     tensors      for each: string name, u32 number of dimensions, u64 each of them, the fastest
//                  first, u32 type, u64 offset
//     data         from the next multiple of general.alignment on, each tensor at its offset
//
// A string is a u64 length and so many bytes. A value that is an array is the u32 type of its
// elements, their u64 number, and the elements.
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "numbers are taken from the file as they are: this needs a little-endian machine"
#endif

typedef struct {
    const char *text; // in the mapped file, without a NUL behind it
    size_t length;
} gguf_string;
#define GGUF_SHOW(string) (int)retrofit_min((string).length, 80), (string).text // for printf's %.*s

// Types of metadata, as numbered in files.
enum { GGUF_U8, GGUF_I8, GGUF_U16, GGUF_I16, GGUF_U32, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING,
       GGUF_ARRAY, GGUF_U64, GGUF_I64, GGUF_F64, GGUF_TYPES };
static const uint8_t gguf_sizes[GGUF_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8}; // bytes
typedef struct {
    gguf_string key;
    uint32_t type, element_type; // the same unless type is GGUF_ARRAY
    size_t count;                // of elements; 1 unless type is GGUF_ARRAY
    const char *data;
    size_t bytes;
} gguf_value;

enum { GGUF_MAX_NAME = 64, GGUF_MAX_KEY = 255 }; // bytes that we read; keys may have 65535
typedef struct {
    char name[GGUF_MAX_NAME + 1];
    const gguf_file *file;
    uint32_t type;
    size_t rows, cols; // cols is the fastest dimension, rows the product of the others
    size_t offset, bytes;
    const uint8_t *data;
    bool used;
} gguf_tensor;

struct gguf_file {
    char path[RETROFIT_PATH];
    char *bytes; // the whole file, mapped
    size_t size;
    size_t position; // of what is read next, up to the data
    const char *architecture; // one of those that are read, or NULL before it is known
    gguf_value *values;
    size_t value_count;
    gguf_tensor *tensors; // by name; the first file of a split model has those of all
    size_t tensor_count;
    gguf_file *next;       // the next file of a split model
    retrofit_text unknown; // keys of metadata that are not known, for a note
};

#define CUT_OFF "cut off or damaged, fetch it again"

// Ends the program with one line on stderr about the file.
__attribute__((format(printf, 2, 3), noreturn)) static void gguf_die(const gguf_file *gguf,
                                                                     const char *format, ...) {
    char text[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    die(1, "%s: %s", gguf->path, text);
}

static bool gguf_string_is(gguf_string string, const char *text) {
    return string.length == strlen(text) && !memcmp(string.text, text, string.length);
}

// ---- Types of tensors ---------------------------------------------------------------------------

// Numbers are stored in blocks, of which each function below reads so many, one after the other, to
// the same bits as llama.cpp's own. Its comment has the block's parts in their order, with their
// sizes in bytes, and what they mean:
//
//     x       a number
//     d, m    a scale and an offset, fp16
//     q       a small whole number for each x, in 1 to 8 bits
//
// The types with a K, and IQ4_XS, have blocks of 256 numbers in 8 or 16 groups, which have scales s
// (and offsets o) of their own: whole numbers of 4 to 8 bits, in units of the block's d (and m).
//
// No product of d, s and q needs more than the 24 bits that a float has, so it does not matter
// whether a compiler fuses a multiplication with an addition.

static float f16_at(const uint8_t *bytes) {
    return retrofit_f16_to_float((uint16_t)(bytes[0] | bytes[1] << 8));
}

// x = d·q. A zero has the sign of d.
static void scale(float *out, const int8_t *q, size_t n, float d) {
    for (size_t i = 0; i < n; i++) out[i] = d * (float)q[i];
}

// x = d·q + m
static void scale_and_shift(float *out, const int8_t *q, size_t n, float d, float m) {
    for (size_t i = 0; i < n; i++) out[i] = d * (float)q[i] + m;
}

// 4 bits of 2n numbers in n bytes: number i is the low half of byte i, number i + n its high half.
static void unpack_4_bits(int8_t *q, const uint8_t *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        q[i] = (int8_t)(bytes[i] & 15);
        q[i + n] = (int8_t)(bytes[i] >> 4);
    }
}

// 2 bits of 256 numbers in 64 bytes: each half of the numbers has 32 bytes, in whose lowest bits
// its first 32 numbers are, then the next 32.
static void unpack_2_bits(int8_t *q, const uint8_t *bytes) {
    for (size_t i = 0; i < 256; i += 32)
        for (size_t j = 0; j < 32; j++)
            q[i + j] = (int8_t)(bytes[i / 128 * 32 + j] >> i % 128 / 32 * 2 & 3);
}

// 1 bit of 256 numbers in 32 bytes, the first 32 numbers in the lowest bits.
static void unpack_1_bit(int8_t *q, const uint8_t *bytes) {
    for (size_t i = 0; i < 256; i += 32)
        for (size_t j = 0; j < 32; j++) q[i + j] = (int8_t)(bytes[j] >> i / 32 & 1);
}

// d 2, q 32 of 8 bits with a sign: x = d·q
static void read_q8_0(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 34, out += 32)
        scale(out, (const int8_t *)block + 2, 32, f16_at(block));
}

// d 2, q 16 of 4 bits: x = d·(q - 8)
static void read_q4_0(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 18, out += 32) {
        int8_t q[32];
        unpack_4_bits(q, block + 2, 16);
        for (size_t i = 0; i < 32; i++) q[i] -= 8;
        scale(out, q, 32, f16_at(block));
    }
}

// d 2, m 2, q 16 of 4 bits: x = d·q + m
static void read_q4_1(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 20, out += 32) {
        int8_t q[32];
        unpack_4_bits(q, block + 4, 16);
        scale_and_shift(out, q, 32, f16_at(block), f16_at(block + 2));
    }
}

// q of 5 bits: the highest ones in 4 bytes, number i's in bit i; then 16 bytes of the other four.
static void unpack_5_bits(int8_t *q, const uint8_t *bytes) {
    uint32_t high;
    memcpy(&high, bytes, sizeof high);
    unpack_4_bits(q, bytes + 4, 16);
    for (uint32_t i = 0; i < 32; i++) q[i] += (int8_t)((high >> i & 1) << 4);
}

// d 2, q 20 of 5 bits: x = d·(q - 16)
static void read_q5_0(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 22, out += 32) {
        int8_t q[32];
        unpack_5_bits(q, block + 2);
        for (size_t i = 0; i < 32; i++) q[i] -= 16;
        scale(out, q, 32, f16_at(block));
    }
}

// d 2, m 2, q 20 of 5 bits: x = d·q + m
static void read_q5_1(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 24, out += 32) {
        int8_t q[32];
        unpack_5_bits(q, block + 4);
        scale_and_shift(out, q, 32, f16_at(block), f16_at(block + 2));
    }
}

// s and o 16 of 4 bits each, q 64 of 2 bits, d 2, m 2: x = d·s·q - m·o, for each 16 numbers
static void read_q2_k(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 84, out += 256) {
        float d = f16_at(block + 80), m = f16_at(block + 82);
        int8_t q[256];
        unpack_2_bits(q, block + 16);
        for (size_t i = 0; i < 16; i++) {
            float offset = m * (float)(block[i] >> 4);
            scale_and_shift(out + 16 * i, q + 16 * i, 16, d * (float)(block[i] & 15), -offset);
        }
    }
}

// high 32 of 1 bit, q 64 of 2 bits, s 12 of 6 bits, d 2:
// x = d·(s - 32)·(q + 4·high - 4), for each 16 numbers
//
// The low 4 bits of s lie in 8 bytes like other 4 bits. Of its high 2 bits, those of the first four
// groups are the lowest of 4 bytes, then come those of the next four.
static void read_q3_k(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 110, out += 256) {
        const uint8_t *scales = block + 96;
        float d = f16_at(block + 108);
        int8_t q[256], high[256], s[16];
        unpack_1_bit(high, block);
        unpack_2_bits(q, block + 32);
        for (size_t i = 0; i < 256; i++) q[i] += (int8_t)(4 * high[i] - 4);
        unpack_4_bits(s, scales, 8);
        for (size_t i = 0; i < 16; i++) {
            s[i] += (int8_t)((scales[8 + i % 4] >> i / 4 * 2 & 3) << 4);
            scale(out + 16 * i, q + 16 * i, 16, d * (float)(s[i] - 32));
        }
    }
}

// The 6 bits of s and o of 8 groups in 12 bytes. Those of the first four groups are the low bits of
// bytes 0-3 and 4-7, in whose 2 high bits the high ones of the last four are; their 4 low bits are
// bytes 8-11, s in the low half.
static void unpack_scales(uint8_t s[8], uint8_t o[8], const uint8_t *bytes) {
    for (size_t i = 0; i < 4; i++) {
        s[i] = bytes[i] & 63;
        o[i] = bytes[i + 4] & 63;
        s[i + 4] = (uint8_t)((bytes[i + 8] & 15) | bytes[i] >> 6 << 4);
        o[i + 4] = (uint8_t)(bytes[i + 8] >> 4 | bytes[i + 4] >> 6 << 4);
    }
}

// x = d·s·q - m·o, for each 32 numbers. The block begins with d 2, m 2, s and o 12 of 6 bits each.
static void scale_groups(float *out, const int8_t q[256], const uint8_t *block) {
    float d = f16_at(block), m = f16_at(block + 2);
    uint8_t s[8], o[8];
    unpack_scales(s, o, block + 4);
    for (size_t i = 0; i < 8; i++)
        scale_and_shift(out + 32 * i, q + 32 * i, 32, d * (float)s[i], -(m * (float)o[i]));
}

// d 2, m 2, s and o 12 of 6 bits each, q 128 of 4 bits, 64 numbers after the other:
// x = d·s·q - m·o, for each 32 numbers
static void read_q4_k(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 144, out += 256) {
        int8_t q[256];
        for (size_t i = 0; i < 4; i++) unpack_4_bits(q + 64 * i, block + 16 + 32 * i, 32);
        scale_groups(out, q, block);
    }
}

// d 2, m 2, s and o 12 of 6 bits each, high 32 of 1 bit, q 128 of 4 bits as above:
// x = d·s·(q + 16·high) - m·o, for each 32 numbers
static void read_q5_k(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 176, out += 256) {
        int8_t q[256], high[256];
        unpack_1_bit(high, block + 16);
        for (size_t i = 0; i < 4; i++) unpack_4_bits(q + 64 * i, block + 48 + 32 * i, 32);
        for (size_t i = 0; i < 256; i++) q[i] += (int8_t)(high[i] << 4);
        scale_groups(out, q, block);
    }
}

// q 128 of 4 bits, 128 numbers after the other, high 64 of 2 bits, s 16 of 8 bits with a sign, d 2:
// x = d·s·(q + 16·high - 32), for each 16 numbers
static void read_q6_k(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 210, out += 256) {
        float d = f16_at(block + 208);
        int8_t q[256], high[256];
        unpack_4_bits(q, block, 64);
        unpack_4_bits(q + 128, block + 64, 64);
        unpack_2_bits(high, block + 128);
        for (size_t i = 0; i < 256; i++) q[i] += (int8_t)(16 * high[i] - 32);
        for (size_t i = 0; i < 16; i++)
            scale(out + 16 * i, q + 16 * i, 16, d * (float)(int8_t)block[192 + i]);
    }
}

// Numbers of 4 bits that name one of 16 values.
static void look_up_4_bits(int8_t *q, const uint8_t *bytes, const int8_t values[16]) {
    unpack_4_bits(q, bytes, 16);
    for (size_t i = 0; i < 32; i++) q[i] = values[q[i]];
}

// The values of IQ4_NL and IQ4_XS: close together near 0, where most weights are.
static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                      1,    13,   25,  38,  53,  69,  89,  113};

// d 2, q 16 of 4 bits: x = d·value[q]
static void read_iq4_nl(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 18, out += 32) {
        int8_t q[32];
        look_up_4_bits(q, block + 2, iq4_values);
        scale(out, q, 32, f16_at(block));
    }
}

// d 2, s 2 with the high 2 bits and 4 with the low 4 bits, two groups a byte, q 128 of 4 bits:
// x = d·(s - 32)·value[q], for each 32 numbers
static void read_iq4_xs(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 136, out += 256) {
        float d = f16_at(block);
        int high = block[2] | block[3] << 8;
        for (size_t i = 0; i < 8; i++) {
            int s = (block[4 + i / 2] >> i % 2 * 4 & 15) + (high >> 2 * i & 3) * 16;
            int8_t q[32];
            look_up_4_bits(q, block + 8 + 16 * i, iq4_values);
            scale(out + 32 * i, q, 32, d * (float)(s - 32));
        }
    }
}

// e 1, q 16 of 4 bits: x = 2^(e - 128)·value[q], the values being twice those of a float of 4 bits.
// Below 2^-126 the scale is a subnormal number. Where e is 254 or 255, a NaN for the Open Compute
// Project, the larger values are beyond a float, here as in llama.cpp.
static void read_mxfp4(float *out, const uint8_t *block, size_t blocks) {
    static const int8_t values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    for (size_t b = 0; b < blocks; b++, block += 17, out += 32) {
        int8_t q[32];
        look_up_4_bits(q, block + 1, values);
        scale(out, q, 32, ldexpf(1, block[0] - 128));
    }
}

// Five numbers 0, 1, 2 in a byte, as digits of a fraction c/256 to the base 3. 3·c is the first
// digit times 256, plus the fraction without it. Digit i of each of the n bytes, less one.
static void unpack_digit(int8_t *q, const uint8_t *bytes, size_t n, size_t i) {
    static const uint8_t powers[5] = {1, 3, 9, 27, 81};
    for (size_t j = 0; j < n; j++) {
        uint8_t rest = (uint8_t)(bytes[j] * powers[i]);
        q[j] = (int8_t)((rest * 3 >> 8) - 1);
    }
}

// q 32 with the first digits of 32 numbers, then the second ones, to the fifth; 16 of 16 numbers
// likewise; 4 of 4 numbers with four digits; d 2: x = d·(q - 1)
static void read_tq1_0(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 54, out += 256) {
        int8_t q[256];
        for (size_t i = 0; i < 5; i++) {
            unpack_digit(q + 32 * i, block, 32, i);
            unpack_digit(q + 160 + 16 * i, block + 32, 16, i);
        }
        for (size_t i = 0; i < 4; i++) unpack_digit(q + 240 + 4 * i, block + 48, 4, i);
        scale(out, q, 256, f16_at(block + 52));
    }
}

// q 64 of 2 bits, d 2: x = d·(q - 1)
static void read_tq2_0(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 66, out += 256) {
        int8_t q[256];
        unpack_2_bits(q, block);
        for (size_t i = 0; i < 256; i++) q[i] -= 1;
        scale(out, q, 256, f16_at(block + 64));
    }
}

// By their numbers in files, up to those of llama.cpp in the autumn of 2026; those that cannot be
// read have a name alone.
static const number_type gguf_types[] = {
    [0] = {"F32", 1, 4, read_f32},          [1] = {"F16", 1, 2, read_f16},
    [2] = {"Q4_0", 32, 18, read_q4_0},      [3] = {"Q4_1", 32, 20, read_q4_1},
    [6] = {"Q5_0", 32, 22, read_q5_0},      [7] = {"Q5_1", 32, 24, read_q5_1},
    [8] = {"Q8_0", 32, 34, read_q8_0},      [10] = {"Q2_K", 256, 84, read_q2_k},
    [11] = {"Q3_K", 256, 110, read_q3_k},   [12] = {"Q4_K", 256, 144, read_q4_k},
    [13] = {"Q5_K", 256, 176, read_q5_k},   [14] = {"Q6_K", 256, 210, read_q6_k},
    [20] = {"IQ4_NL", 32, 18, read_iq4_nl}, [23] = {"IQ4_XS", 256, 136, read_iq4_xs},
    [30] = {"BF16", 1, 2, read_bf16},       [34] = {"TQ1_0", 256, 54, read_tq1_0},
    [35] = {"TQ2_0", 256, 66, read_tq2_0},  [39] = {"MXFP4", 32, 17, read_mxfp4},
    // Not read: codes of 1 to 3 bits, newer types, types of intermediate results, whole numbers,
    // and those that llama.cpp has given up.
    [16] = {.name = "IQ2_XXS"},    [17] = {.name = "IQ2_XS"},     [18] = {.name = "IQ3_XXS"},
    [19] = {.name = "IQ1_S"},      [21] = {.name = "IQ3_S"},      [22] = {.name = "IQ2_S"},
    [29] = {.name = "IQ1_M"},      [40] = {.name = "NVFP4"},      [41] = {.name = "Q1_0"},
    [42] = {.name = "Q2_0"},       [9] = {.name = "Q8_1"},        [15] = {.name = "Q8_K"},
    [24] = {.name = "I8"},         [25] = {.name = "I16"},        [26] = {.name = "I32"},
    [27] = {.name = "I64"},        [28] = {.name = "F64"},        [4] = {.name = "Q4_2"},
    [5] = {.name = "Q4_3"},        [31] = {.name = "Q4_0_4_4"},   [32] = {.name = "Q4_0_4_8"},
    [33] = {.name = "Q4_0_8_8"},   [36] = {.name = "IQ4_NL_4_4"}, [37] = {.name = "IQ4_NL_4_8"},
    [38] = {.name = "IQ4_NL_8_8"},
};
enum { GGUF_TENSOR_TYPES = sizeof gguf_types / sizeof *gguf_types };

// NULL if tensors of this type are not read.
static const number_type *gguf_find_type(uint32_t number) {
    bool is_read = number < GGUF_TENSOR_TYPES && gguf_types[number].read;
    return is_read ? &gguf_types[number] : NULL;
}

// What a type that is not read is called: by its number, if it is newer than the table.
static void gguf_type_name(uint32_t number, char name[32]) {
    if (number < GGUF_TENSOR_TYPES) snprintf(name, 32, "%s", gguf_types[number].name);
    else snprintf(name, 32, "number %u", number);
}

// ---- Opening a file: every length is checked before it is used ----------------------------------

static const char *gguf_read_bytes(gguf_file *gguf, uint64_t count) {
    if (count > gguf->size - gguf->position)
        gguf_die(gguf, "the header goes on past the file's end at byte %zu: " CUT_OFF,
                 gguf->position);
    const char *bytes = gguf->bytes + gguf->position;
    gguf->position += (size_t)count;
    return bytes;
}

static uint64_t gguf_read_number(gguf_file *gguf, size_t size) {
    uint64_t number = 0;
    memcpy(&number, gguf_read_bytes(gguf, size), size);
    return number;
}

static gguf_string gguf_read_string(gguf_file *gguf) {
    uint64_t length = gguf_read_number(gguf, 8);
    return (gguf_string){gguf_read_bytes(gguf, length), (size_t)length};
}

// A name, which has no control characters: with a NUL in it, it might pass for another.
static gguf_string gguf_read_name(gguf_file *gguf, size_t max) {
    gguf_string name = gguf_read_string(gguf);
    if (name.length > max)
        gguf_die(gguf, "the name %.*s… is longer than %zu bytes: " DAMAGED, GGUF_SHOW(name), max);
    for (size_t i = 0; i < name.length; i++)
        if ((unsigned char)name.text[i] < ' ')
            gguf_die(gguf, "the name %.*s has control characters in it: " DAMAGED,
                     GGUF_SHOW(name));
    return name;
}

static void gguf_read_value(gguf_file *gguf, gguf_value *value) {
    uint64_t count = 1;
    value->key = gguf_read_name(gguf, GGUF_MAX_KEY);
    value->type = (uint32_t)gguf_read_number(gguf, 4);
    value->element_type = value->type;
    if (value->type == GGUF_ARRAY) {
        value->element_type = (uint32_t)gguf_read_number(gguf, 4);
        count = gguf_read_number(gguf, 8);
    }
    if (value->element_type >= GGUF_TYPES || value->element_type == GGUF_ARRAY ||
        count > gguf->size)
        gguf_die(gguf,
                 "metadata %.*s: %llu values of type %u: unknown, an array of arrays, or damaged",
                 GGUF_SHOW(value->key), (unsigned long long)count, value->element_type);
    value->count = (size_t)count;
    value->data = gguf->bytes + gguf->position;
    if (value->element_type == GGUF_STRING)
        for (uint64_t i = 0; i < count; i++) gguf_read_string(gguf);
    gguf_read_bytes(gguf, count * gguf_sizes[value->element_type]);
    value->bytes = (size_t)(gguf->bytes + gguf->position - value->data);
}

// rows and cols. No product of a tensor's sizes overflows, not even times the 4 bytes of a float.
static void gguf_read_shape(gguf_file *gguf, gguf_tensor *tensor) {
    uint64_t dimensions = gguf_read_number(gguf, 4);
    bool valid = dimensions > 0;
    tensor->rows = 1;
    tensor->cols = 1;
    for (uint64_t i = 0; valid && i < dimensions; i++) {
        uint64_t n = gguf_read_number(gguf, 8);
        valid = dimensions <= 4 && n > 0 && n <= SIZE_MAX / 64 / tensor->cols / tensor->rows;
        if (i == 0) tensor->cols = (size_t)n;
        else tensor->rows *= (size_t)n;
    }
    if (!valid)
        gguf_die(gguf, "tensor %s: its sizes make none or too many numbers: " DAMAGED,
                 tensor->name);
}

__attribute__((noreturn)) static void gguf_die_type(const gguf_tensor *tensor) {
    char name[32];
    gguf_type_name(tensor->type, name);
    gguf_die(tensor->file,
             "tensor %s is of type %s; F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K, "
             "IQ4_NL, IQ4_XS, MXFP4, TQ1_0 and TQ2_0 are read: get such a file of this model",
             tensor->name, name);
}

static void gguf_read_tensor(gguf_file *gguf, gguf_tensor *tensor) {
    gguf_string name = gguf_read_name(gguf, GGUF_MAX_NAME);
    memcpy(tensor->name, name.text, name.length);
    tensor->file = gguf;
    gguf_read_shape(gguf, tensor);
    tensor->type = (uint32_t)gguf_read_number(gguf, 4);
    tensor->offset = (size_t)gguf_read_number(gguf, 8);
    const number_type *type = gguf_find_type(tensor->type);
    if (!type) gguf_die_type(tensor);
    if (tensor->cols % type->values)
        gguf_die(gguf, "tensor %s: rows of %zu are no blocks of %zu: " DAMAGED, tensor->name,
                 tensor->cols, type->values);
    tensor->bytes = tensor->rows * (tensor->cols / type->values) * type->bytes;
}

static int compare_names(const void *a, const void *b) {
    const gguf_string *x = a, *y = b;
    int order = memcmp(x->text, y->text, retrofit_min(x->length, y->length));
    return order ? order : (x->length > y->length) - (x->length < y->length);
}

// Of two entries of one name readers take one or the other.
static void gguf_check_keys_once(const gguf_file *gguf) {
    gguf_string *keys = allocate_or_die(gguf->value_count, sizeof *keys);
    for (size_t i = 0; i < gguf->value_count; i++) keys[i] = gguf->values[i].key;
    if (gguf->value_count) qsort(keys, gguf->value_count, sizeof *keys, compare_names);
    for (size_t i = 1; i < gguf->value_count; i++)
        if (!compare_names(&keys[i - 1], &keys[i]))
            gguf_die(gguf, "metadata %.*s is there twice: remove the one that should not count",
                     GGUF_SHOW(keys[i]));
    free(keys);
}

static void gguf_read_header(gguf_file *gguf) {
    if (memcmp(gguf_read_bytes(gguf, 4), "GGUF", 4))
        gguf_die(gguf, "does not start with GGUF, so it is no GGUF file");
    uint32_t version = (uint32_t)gguf_read_number(gguf, 4);
    uint64_t tensors = gguf_read_number(gguf, 8), values = gguf_read_number(gguf, 8);
    if (version != 2 && version != 3)
        gguf_die(gguf, "GGUF version %u%s, not 2 or 3", version,
                 version & 0xffff ? "" : " (big endian)");
    // An entry has at least 12 bytes, a tensor more than 16.
    if (tensors > gguf->size / 16 || values > gguf->size / 12)
        gguf_die(gguf, "it promises more than it has room for: " CUT_OFF);
    gguf->value_count = (size_t)values;
    gguf->tensor_count = (size_t)tensors;
    gguf->values = allocate_or_die(gguf->value_count, sizeof *gguf->values);
    gguf->tensors = allocate_or_die(gguf->tensor_count, sizeof *gguf->tensors);
    for (size_t i = 0; i < gguf->value_count; i++) gguf_read_value(gguf, &gguf->values[i]);
    for (size_t i = 0; i < gguf->tensor_count; i++) gguf_read_tensor(gguf, &gguf->tensors[i]);
    gguf_check_keys_once(gguf);
}

static int compare_offsets(const void *a, const void *b) {
    const gguf_tensor *x = a, *y = b;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

static uint32_t gguf_u32(const gguf_file *gguf, const char *key, uint32_t otherwise);

// Finds each tensor's data, which must be within the file and no other's. Sorts the tensors.
static void gguf_find_data(gguf_file *gguf) {
    uint32_t alignment = gguf_u32(gguf, "general.alignment", 32);
    if (!alignment || alignment & (alignment - 1))
        gguf_die(gguf, "general.alignment %u is no power of two", alignment);
    size_t start = gguf->position + (alignment - gguf->position % alignment) % alignment;
    size_t available = start < gguf->size ? gguf->size - start : 0, end = 0;
    if (gguf->tensor_count)
        qsort(gguf->tensors, gguf->tensor_count, sizeof *gguf->tensors, compare_offsets);
    for (size_t i = 0; i < gguf->tensor_count; i++) {
        gguf_tensor *tensor = &gguf->tensors[i];
        if (tensor->offset % alignment || tensor->offset > available ||
            tensor->bytes > available - tensor->offset)
            gguf_die(gguf,
                     "tensor %s: %zu bytes at offset %zu are unaligned or past the file's end: "
                     CUT_OFF, tensor->name, tensor->bytes, tensor->offset);
        if (tensor->offset < end)
            gguf_die(gguf, "tensor %s: its data begin within those of %s: " DAMAGED, tensor->name,
                     gguf->tensors[i - 1].name);
        end = tensor->offset + tensor->bytes;
        tensor->data = (const uint8_t *)gguf->bytes + start + tensor->offset;
    }
}

static void gguf_open_file(gguf_file *gguf, const char *path) {
    memset(gguf, 0, sizeof *gguf);
    snprintf(gguf->path, sizeof gguf->path, "%s", path);
    gguf->bytes = retrofit_map_file(path, &gguf->size);
    must(gguf->bytes != NULL);
    gguf_read_header(gguf);
    gguf_find_data(gguf);
}

// ---- Models in several files --------------------------------------------------------------------

// llama-gguf-split cuts a model into files NAME-00001-of-00003.gguf and so on. Each has metadata
// split.no, which counts from 0, and split.count; the first one has all others, too.

// Writes the name of part `number`, counted from 1, of the model of which path is the part `own`.
static bool gguf_part_path(char part[RETROFIT_PATH], const char *path, size_t own, size_t number,
                           size_t count) {
    char end[64];
    snprintf(end, sizeof end, "-%05zu-of-%05zu.gguf", own, count);
    if (!ends_with(path, end)) return false;
    int length = (int)(strlen(path) - strlen(end));
    int size = snprintf(part, RETROFIT_PATH, "%.*s-%05zu-of-%05zu.gguf", length, path, number,
                        count);
    return size < RETROFIT_PATH;
}

// Metadata of a later part say nothing else than the first part's.
static void gguf_check_part_keys(const gguf_file *first, const gguf_file *part) {
    static const char split[] = "split.";
    for (size_t i = 0; i < part->value_count; i++) {
        const gguf_value *value = &part->values[i], *same = NULL;
        if (gguf_string_is(value->key, "general.alignment")) continue; // of this file
        if (value->key.length > 6 && !memcmp(value->key.text, split, 6)) continue;
        for (size_t j = 0; j < first->value_count && !same; j++)
            if (!compare_names(&first->values[j].key, &value->key)) same = &first->values[j];
        if (!same || same->type != value->type || same->element_type != value->element_type ||
            same->bytes != value->bytes || memcmp(same->data, value->data, same->bytes))
            gguf_die(part, "metadata %.*s is not as in %s: only the first part's count",
                     GGUF_SHOW(value->key), first->path);
    }
}

// Opens part `number`, counted from 1, as the one behind `last`.
static gguf_file *gguf_open_part(const gguf_file *first, gguf_file *last, size_t number,
                                 size_t count) {
    char path[RETROFIT_PATH];
    if (!gguf_part_path(path, first->path, 1, number, count))
        gguf_die(first, "it is the first of %zu parts, but is not called …-00001-of-%05zu.gguf, "
                        "from which the others' names follow", count, count);
    if (!retrofit_is_there(path))
        gguf_die(first, "part %zu of %zu is missing: %s must lie beside it", number, count, path);
    gguf_file *part = allocate_or_die(1, sizeof *part);
    last->next = part;
    gguf_open_file(part, path);
    if (gguf_u32(part, "split.no", 0) != number - 1 || gguf_u32(part, "split.count", 0) != count)
        gguf_die(part, "it is not part %zu of %zu, as its name says: split.no is %u, split.count "
                       "%u", number, count, gguf_u32(part, "split.no", 0),
                 gguf_u32(part, "split.count", 0));
    gguf_check_part_keys(first, part);
    return part;
}

// Lists the tensors of all parts in the first.
static void gguf_join_tensors(gguf_file *first) {
    size_t count = 0;
    for (const gguf_file *part = first; part; part = part->next) count += part->tensor_count;
    gguf_tensor *tensors = allocate_or_die(count, sizeof *tensors), *next = tensors;
    for (const gguf_file *part = first; part; part = part->next) {
        memcpy(next, part->tensors, part->tensor_count * sizeof *next);
        next += part->tensor_count;
    }
    free(first->tensors);
    first->tensors = tensors;
    first->tensor_count = count;
    uint32_t promised = gguf_u32(first, "split.tensors.count", (uint32_t)count);
    if (promised != count)
        gguf_die(first, "split.tensors.count is %u, but its parts have %zu tensors: " DAMAGED,
                 promised, count);
}

static void gguf_open_parts(gguf_file *first) {
    uint32_t number = gguf_u32(first, "split.no", 0), count = gguf_u32(first, "split.count", 1);
    if (number >= retrofit_max(count, 1) || count > 99999)
        gguf_die(first, "split.no is %u, split.count %u: " DAMAGED, number, count);
    char path[RETROFIT_PATH];
    if (number > 0 && !gguf_part_path(path, first->path, number + 1, 1, count))
        snprintf(path, sizeof path, "…-00001-of-%05u.gguf", count);
    if (number > 0)
        gguf_die(first, "it is part %u of %u: give the first, %s", number + 1, count, path);
    gguf_file *last = first;
    for (size_t i = 2; i <= count; i++) last = gguf_open_part(first, last, i, count);
    gguf_join_tensors(first);
}

// A tensor begins with its name.
static int compare_tensors(const void *a, const void *b) { return strcmp(a, b); }

// Opens a model by its file, or the first of its files.
static void gguf_open(gguf_file *gguf, const char *path) {
    gguf_open_file(gguf, path);
    gguf_open_parts(gguf);
    qsort(gguf->tensors, gguf->tensor_count, sizeof *gguf->tensors, compare_tensors);
    for (size_t i = 1; i < gguf->tensor_count; i++) {
        const gguf_tensor *tensor = &gguf->tensors[i], *before = tensor - 1;
        if (!strcmp(before->name, tensor->name))
            gguf_die(before->file, "tensor %s is there twice, here and in %s: remove the one that "
                                   "should not count", tensor->name, tensor->file->path);
    }
}

static void gguf_close(gguf_file *gguf) {
    for (gguf_file *part = gguf, *next; part; part = next) {
        next = part->next;
        munmap(part->bytes, part->size);
        free(part->values);
        free(part->tensors);
        if (part != gguf) free(part);
    }
    free(gguf->unknown.bytes);
}

// ---- Metadata -----------------------------------------------------------------------------------

// Keys that describe the model begin with the name of its architecture: this is the one that ends
// so, as llama.block_count. The text is good until the next call but one.
static const char *gguf_key(const gguf_file *gguf, const char *end) {
    static char keys[2][GGUF_MAX_KEY + 1];
    static size_t next;
    char *key = keys[next++ % 2];
    snprintf(key, sizeof keys[0], "%s.%s", gguf->architecture, end);
    return key;
}

// The entry of this key; NULL if there is none.
static const gguf_value *gguf_entry(const gguf_file *gguf, const char *key) {
    for (size_t i = 0; i < gguf->value_count; i++)
        if (gguf_string_is(gguf->values[i].key, key)) return &gguf->values[i];
    return NULL;
}

// The same, of an entry that must be of this type, or an array of such elements.
static const gguf_value *gguf_find(const gguf_file *gguf, const char *key, uint32_t type,
                                   bool is_array) {
    const gguf_value *value = gguf_entry(gguf, key);
    if (value && (value->element_type != type || (value->type == GGUF_ARRAY) != is_array))
        gguf_die(gguf, "metadata %s has another type than %u", key, type);
    return value;
}

__attribute__((noreturn)) static void gguf_die_missing(const gguf_file *gguf, const char *key) {
    gguf_die(gguf, "metadata %s is missing: convert the model again with a newer llama.cpp", key);
}

static const gguf_value *gguf_need(const gguf_file *gguf, const char *key, uint32_t type,
                                   bool is_array) {
    const gguf_value *value = gguf_find(gguf, key, type, is_array);
    if (!value) gguf_die_missing(gguf, key);
    return value;
}

// A value that is a single whole number: sets its bits, with the sign carried up to the highest.
static bool gguf_whole(const gguf_value *value, uint64_t *bits, bool *is_signed) {
    uint32_t type = value->type;
    if (type > GGUF_I32 && type != GGUF_U64 && type != GGUF_I64) return false;
    *is_signed = type == GGUF_I8 || type == GGUF_I16 || type == GGUF_I32 || type == GGUF_I64;
    size_t size = gguf_sizes[type];
    *bits = 0;
    memcpy(bits, value->data, size);
    bool negative = *is_signed && *bits >> (8 * size - 1) & 1;
    if (negative && size < 8) *bits |= UINT64_MAX << (8 * size);
    return true;
}

// Counts and sizes are u32 in most files; the specification has them u64, and allows both.
static uint32_t gguf_u32(const gguf_file *gguf, const char *key, uint32_t otherwise) {
    const gguf_value *value = gguf_entry(gguf, key);
    uint64_t bits;
    bool is_signed;
    if (!value) return otherwise;
    if (value->type == GGUF_ARRAY)
        gguf_die(gguf, "metadata %s is an array: layers that differ in it are not supported", key);
    if (!gguf_whole(value, &bits, &is_signed) || bits > UINT32_MAX)
        gguf_die(gguf, "metadata %s is no whole number from 0 to %u", key, UINT32_MAX);
    return (uint32_t)bits;
}

static uint32_t gguf_need_u32(const gguf_file *gguf, const char *key) {
    if (!gguf_entry(gguf, key)) gguf_die_missing(gguf, key);
    return gguf_u32(gguf, key, 0);
}

static float gguf_f32(const gguf_file *gguf, const char *key, float otherwise) {
    const gguf_value *value = gguf_find(gguf, key, GGUF_F32, false);
    if (value) memcpy(&otherwise, value->data, sizeof otherwise);
    if (!isfinite(otherwise)) gguf_die(gguf, "metadata %s is not finite: " DAMAGED, key);
    return otherwise;
}

static bool gguf_bool(const gguf_file *gguf, const char *key, bool otherwise) {
    const gguf_value *value = gguf_find(gguf, key, GGUF_BOOL, false);
    return value ? *value->data != 0 : otherwise;
}

// The string at data, whose length was checked when the file was opened.
static gguf_string gguf_string_at(const char *data) {
    uint64_t length;
    memcpy(&length, data, sizeof length);
    return (gguf_string){data + sizeof length, (size_t)length};
}

static gguf_string gguf_need_string(const gguf_file *gguf, const char *key) {
    return gguf_string_at(gguf_need(gguf, key, GGUF_STRING, false)->data);
}

// An empty string if there is none.
static gguf_string gguf_optional_string(const gguf_file *gguf, const char *key) {
    const gguf_value *value = gguf_find(gguf, key, GGUF_STRING, false);
    return value ? gguf_string_at(value->data) : (gguf_string){"", 0};
}

static gguf_string *gguf_need_strings(const gguf_file *gguf, const char *key, size_t *count) {
    const gguf_value *value = gguf_need(gguf, key, GGUF_STRING, true);
    gguf_string *strings = allocate_or_die(value->count, sizeof *strings);
    const char *data = value->data;
    for (size_t i = 0; i < value->count; i++) {
        strings[i] = gguf_string_at(data);
        data = strings[i].text + strings[i].length;
    }
    *count = value->count;
    return strings;
}

// ---- What the metadata mean ---------------------------------------------------------------------

// The architectures that are read, called like the families of plain models in config.json. They
// differ in their blocks alone: section 2 of retrofit.h.
static const char *const gguf_architectures[] = {"llama", "olmo2", "qwen2", "qwen3"};

// All keys that llama.cpp's converter writes for these, and those of the specification; ARCH stands
// for the architecture's name. The first row that fits counts.
static const retrofit_key gguf_keys[] = {
    {"general.architecture general.alignment", NULL, "see below"},
    {"general.type", "model", "only models are read: an adapter must be merged into its model"},
    {"general.quantization_version", "2",
     "its blocks of numbers are of an older format: convert the model again with a newer "
     "ARCH.cpp"},
    {"general.*", "*", "says where the file comes from"},
    {"split.no split.count split.tensors.count", NULL, "see below"},
    {"split.*", "*", "says how the model was split"},
    {"adapter.*", "", "an adapter must be merged into its model first"},
    {"clip.*", "", "an encoder of images or sound"},
    {"diffusion.*", "", "not a model that predicts the next token"},
    {"xielu.*", "", "another activation than a Llama's"},
    {"imatrix.* quantize.*", "*", "says how the model was quantised"},
    {"training.*", "", "a checkpoint of a training: export the model"},
    {"ARCH.vocab_size ARCH.context_length ARCH.embedding_length ARCH.block_count "
     "ARCH.feed_forward_length ARCH.attention.head_count ARCH.attention.head_count_kv "
     "ARCH.attention.key_length ARCH.attention.value_length "
     "ARCH.attention.layer_norm_rms_epsilon ARCH.attention.causal "
     "ARCH.attention.sliding_window", NULL, "see below"},
    {"ARCH.attention.layer_norm_epsilon", "0", "a Llama has RMS norms"},
    {"ARCH.attention.clamp_kqv ARCH.attention.max_alibi_bias", "0", NULL},
    {"ARCH.attention.scale", "0", "another scale than 1/√head size"},
    {"ARCH.attention.*", "0", "another attention than a Llama's"},
    {"ARCH.rope.dimension_count ARCH.rope.freq_base ARCH.rope.scaling.type "
     "ARCH.rope.scaling.factor ARCH.rope.scale_linear", NULL, "see below"},
    {"ARCH.rope.scaling.original_context_length ARCH.rope.scaling.finetuned "
     "ARCH.rope.scaling.yarn_beta_*", "*", "only of scaling that is refused"},
    {"ARCH.rope.scaling.attn_factor ARCH.rope.scaling.yarn_attn_factor", "1",
     "it scales the scores of attention"},
    {"ARCH.rope.scaling.yarn_ext_factor", "0|-1", "it mixes in YaRN's scaling"},
    {"ARCH.rope.*", "0", "another rotation than a Llama's"},
    {"ARCH.expert_count", "0", "a mixture of experts: only dense Llamas are supported"},
    {"ARCH.expert_* ARCH.leading_dense_block_count", "*", "only of a mixture of experts"},
    {"ARCH.use_parallel_residual", "false", NULL},
    {"ARCH.tensor_data_layout", "reference|Meta AI original pth",
     "its numbers stand in another order"},
    {"ARCH.logit_scale ARCH.embedding_scale ARCH.residual_scale", "0|1", NULL},
    {"ARCH.attn_logit_softcapping ARCH.final_logit_softcapping", "0", NULL},
    {"ARCH.pooling_type", "*", "only of a model that embeds texts"},
    {"ARCH.*", "0", "not known here, and it may change what is computed"},
    {"tokenizer.ggml.model tokenizer.ggml.pre tokenizer.ggml.tokens tokenizer.ggml.token_type "
     "tokenizer.ggml.scores tokenizer.ggml.merges tokenizer.ggml.bos_token_id "
     "tokenizer.ggml.eos_token_id tokenizer.ggml.eot_token_id tokenizer.ggml.eom_token_id "
     "tokenizer.ggml.unknown_token_id tokenizer.ggml.padding_token_id "
     "tokenizer.ggml.add_bos_token tokenizer.ggml.add_eos_token "
     "tokenizer.ggml.add_space_prefix", NULL, "see below"},
    {"tokenizer.ggml.add_sep_token", "false", "it adds a token to each text"},
    {"tokenizer.ggml.remove_extra_whitespaces", "false", "it changes the text"},
    {"tokenizer.ggml.precompiled_charsmap", "", "it changes the text"},
    {"tokenizer.ggml.seperator_token_id", "*", "a name for a token; the format spells it so"},
    {"tokenizer.ggml.mask_token_id tokenizer.ggml.cls_token_id tokenizer.ggml.fim_* "
     "tokenizer.ggml.prefix_token_id tokenizer.ggml.suffix_token_id "
     "tokenizer.ggml.middle_token_id", "*", "a name for a token"},
    {"tokenizer.ggml.token_type_count", "*", "of BERT"},
    {"tokenizer.ggml.*", "", "it may change the ids of a text"},
    {"tokenizer.chat_template*", NULL, "see below"},
    {"tokenizer.huggingface.json tokenizer.rwkv.world", "*", "the same tokenizer once more"},
};

// A value as in that table.
static void gguf_value_text(const gguf_file *gguf, const gguf_value *value, char text[100]) {
    uint64_t bits;
    bool is_signed;
    float narrow;
    double wide;
    if (value->type == GGUF_ARRAY) strcpy(text, value->count ? "[...]" : "[]");
    else if (value->type == GGUF_STRING)
        snprintf(text, 100, "%.*s", GGUF_SHOW(gguf_string_at(value->data)));
    else if (value->type == GGUF_BOOL) {
        if ((unsigned char)*value->data > 1)
            gguf_die(gguf, "metadata %.*s is neither true nor false: " DAMAGED,
                     GGUF_SHOW(value->key));
        strcpy(text, *value->data ? "true" : "false");
    } else if (gguf_whole(value, &bits, &is_signed)) {
        if (is_signed) snprintf(text, 100, "%lld", (long long)bits);
        else snprintf(text, 100, "%llu", (unsigned long long)bits);
    } else if (value->type == GGUF_F32) {
        memcpy(&narrow, value->data, sizeof narrow);
        snprintf(text, 100, "%.9g", (double)narrow);
    } else {
        memcpy(&wide, value->data, sizeof wide);
        snprintf(text, 100, "%.17g", wide);
    }
}

// The table's row for a file's key, made to fit whatever the file calls it; its key is NULL if
// there is none.
static retrofit_key gguf_find_row(const gguf_file *gguf, const char *key) {
    size_t length = strlen(gguf->architecture);
    bool own = !strncmp(key, gguf->architecture, length) && key[length] == '.';
    char listed[GGUF_MAX_KEY + 8];
    snprintf(listed, sizeof listed, "%s%s", own ? "ARCH" : "", own ? key + length : key);
    const retrofit_key *row =
        retrofit_key_find(listed, gguf_keys, sizeof gguf_keys / sizeof *gguf_keys);
    bool passes_for_own = !own && !strncmp(key, "ARCH.", 5);
    if (!row || passes_for_own) return (retrofit_key){NULL, NULL, NULL};
    return (retrofit_key){"*", row->neutral, row->why};
}

// Ends the program where a key says what we would not do. What is not known at all is kept for a
// note.
static void gguf_check_keys(gguf_file *gguf) {
    for (size_t i = 0; i < gguf->value_count; i++) {
        const gguf_value *value = &gguf->values[i];
        char key[GGUF_MAX_KEY + 1], text[100];
        bool known;
        snprintf(key, sizeof key, "%.*s", (int)value->key.length, value->key.text);
        gguf_value_text(gguf, value, text);
        retrofit_key row = gguf_find_row(gguf, key);
        must(retrofit_key_check(key, text, &row, row.key != NULL, gguf->path, &known));
        if (known) continue;
        retrofit_text_append_item(&gguf->unknown, key);
    }
    retrofit_text_append(&gguf->unknown, "", 1);
    must(!gguf->unknown.failed);
}

// RoPE may rotate more slowly, for longer texts. Without a type llama.cpp takes the factor for a
// linear one, which divides positions; older files have it under another name. 0: no scaling.
static double gguf_linear_factor(const gguf_file *gguf) {
    const char *key = gguf_key(gguf, "rope.scaling.type");
    gguf_string type = gguf_optional_string(gguf, key);
    if (gguf_string_is(type, "none")) return 0;
    if (type.length && !gguf_string_is(type, "linear"))
        gguf_die(gguf, "%s is %.*s: only linear scaling and Llama 3's, rope_freqs.weight, are "
                       "supported", key, GGUF_SHOW(type));
    key = gguf_key(gguf, "rope.scaling.factor");
    if (!gguf_entry(gguf, key)) key = gguf_key(gguf, "rope.scale_linear");
    float factor = gguf_f32(gguf, key, 1);
    bool none = factor == 0 || factor == 1;
    if (!none && !(factor > 1 && factor < 1e6f))
        gguf_die(gguf, "%s is %g, not a factor above 1", key, (double)factor);
    return none ? 0 : (double)factor;
}

// Heads whose keys, values and rotated parts differ in size are not supported.
static void gguf_check_head_size(const gguf_file *gguf, const char *end, uint32_t otherwise,
                                 size_t head_dim) {
    const char *key = gguf_key(gguf, end);
    uint32_t size = gguf_u32(gguf, key, otherwise);
    if (size != head_dim)
        gguf_die(gguf, "%s is %u, but heads have %zu: not supported", key, size, head_dim);
}

static void gguf_check_attention(const gguf_file *gguf, const retrofit_config *c) {
    const char *key = gguf_key(gguf, "attention.causal");
    if (!gguf_bool(gguf, key, true))
        gguf_die(gguf, "%s is false: a model that sees what comes is not supported", key);
    key = gguf_key(gguf, "attention.sliding_window");
    uint32_t window = gguf_u32(gguf, key, 0);
    if (window && window < c->context)
        gguf_die(gguf, "%s is %u of a context of %zu: not supported", key, window, c->context);
}

// ---- The model ----------------------------------------------------------------------------------

// A tensor as it goes to section 3; head_dim is 0 but for q and k whose rows were moved.
static tensor_piece gguf_piece(const gguf_tensor *tensor, size_t head_dim) {
    return (tensor_piece){.name = tensor->name, .path = tensor->file->path, .rows = tensor->rows,
                          .cols = tensor->cols, .type = gguf_find_type(tensor->type),
                          .data = tensor->data, .head_dim = head_dim};
}

static gguf_tensor *gguf_find_tensor(const gguf_file *gguf, const char *name) {
    return bsearch(name, gguf->tensors, gguf->tensor_count, sizeof *gguf->tensors,
                   compare_tensors);
}

// Llama 3.x divides its rotary frequencies θ^(-2i/h) by numbers f_i, and a GGUF has nothing but
// these, as tensor rope_freqs.weight. If frequency i makes t_i turns in the original context of L
// tokens, then
//
//     t_i = L·θ^(-2i/h)/2π      s_i = min(max((t_i - low)/(high - low), 0), 1)
//     1/f_i = (1 - s_i)/factor + s_i
//
// so the last one, of the slowest frequency, is the factor itself: 8 in Llama 3.1, 32 in 3.2. low
// and high are 1 and 4 in all of them, and L is 8192; models of others may have another power of 2.
// The numbers that are found must give all of the divisors again.
static bool is_llama3_scaling(const retrofit_config *c, const float *divisors) {
    for (size_t i = 0; i < c->head_dim / 2; i++) {
        double frequency = pow(c->rope_theta, -2.0 * (double)i / (double)c->head_dim);
        double turns = c->rope_original_context * frequency / (2 * 3.14159265358979323846);
        double smooth = (turns - c->rope_low) / (c->rope_high - c->rope_low);
        smooth = fmin(fmax(smooth, 0), 1);
        double expected = (1 - smooth) / c->rope_factor + smooth;
        if (!(fabs((double)divisors[i] * expected - 1) < 1e-4)) return false;
    }
    return true;
}

static bool find_llama3_scaling(retrofit_config *c, const float *divisors) {
    c->rope_llama3 = true;
    c->rope_factor = (double)divisors[c->head_dim / 2 - 1];
    c->rope_low = 1;
    c->rope_high = 4;
    c->rope_original_context = 8192;
    if (c->rope_factor < 1) return false;
    if (is_llama3_scaling(c, divisors)) return true;
    for (double context = 1 << 6; context <= 1 << 24; context *= 2) {
        c->rope_original_context = context;
        if (is_llama3_scaling(c, divisors)) return true;
    }
    return false;
}

// Divisors that are all 1 change nothing.
static void gguf_read_rope(const gguf_file *gguf, retrofit_config *c) {
    gguf_tensor *tensor = gguf_find_tensor(gguf, "rope_freqs.weight");
    c->rope_factor = gguf_linear_factor(gguf);
    if (!tensor) return;
    tensor->used = true;
    size_t n = c->head_dim / 2;
    if (tensor->rows != 1 || tensor->cols != n)
        gguf_die(tensor->file, "tensor rope_freqs.weight is %zu x %zu, heads of %zu need 1 x %zu",
                 tensor->rows, tensor->cols, c->head_dim, n);
    float *divisors = allocate_or_die(n, sizeof *divisors);
    const tensor_piece piece = gguf_piece(tensor, 0);
    read_piece(&piece, 0, n, divisors);
    bool scaled = false;
    for (size_t i = 0; i < n; i++) scaled = scaled || divisors[i] != 1;
    if (scaled && c->rope_factor > 0)
        gguf_die(gguf, "RoPE is scaled twice, by rope_freqs.weight and by %s or scale_linear: not "
                       "supported", gguf_key(gguf, "rope.scaling"));
    if (scaled && !find_llama3_scaling(c, divisors))
        gguf_die(tensor->file, "tensor rope_freqs.weight is not Llama 3's scaling (low 1, high 4, "
                               "original context 8192 or another power of 2): not supported");
    free(divisors);
}

// The architecture comes first, since it begins the names of most keys; a file without one may be a
// part of a model, or none, which the keys tell.
static void gguf_check_architecture(gguf_file *gguf) {
    gguf_string name = gguf_optional_string(gguf, "general.architecture");
    gguf->architecture = name.length ? NULL : "llama";
    for (size_t i = 0; i < sizeof gguf_architectures / sizeof *gguf_architectures; i++)
        if (gguf_string_is(name, gguf_architectures[i])) gguf->architecture = gguf_architectures[i];
    if (!gguf->architecture)
        gguf_die(gguf, "the architecture is %.*s; llama, olmo2, qwen2 and qwen3 are read",
                 GGUF_SHOW(name));
    gguf_check_keys(gguf);
    if (!name.length) gguf_die_missing(gguf, "general.architecture");
}

#define NO_TOKEN UINT32_MAX // -1 in a retrofit_config

// The sizes, which almost all of them need.
static void gguf_read_sizes(const gguf_file *gguf, retrofit_config *c) {
    c->n_embd = gguf_need_u32(gguf, gguf_key(gguf, "embedding_length"));
    c->n_heads = gguf_need_u32(gguf, gguf_key(gguf, "attention.head_count"));
    c->n_kv_heads =
        gguf_u32(gguf, gguf_key(gguf, "attention.head_count_kv"), (uint32_t)c->n_heads);
    c->coda = gguf_need_u32(gguf, gguf_key(gguf, "block_count"));
    c->intermediate = gguf_need_u32(gguf, gguf_key(gguf, "feed_forward_length"));
    c->context = gguf_need_u32(gguf, gguf_key(gguf, "context_length"));

    uint32_t head_dim = c->n_heads ? (uint32_t)(c->n_embd / c->n_heads) : 0;
    c->head_dim = gguf_u32(gguf, gguf_key(gguf, "attention.key_length"), head_dim);
    gguf_check_head_size(gguf, "attention.value_length", head_dim, c->head_dim);
    gguf_check_head_size(gguf, "rope.dimension_count", (uint32_t)c->head_dim, c->head_dim);

    const gguf_tensor *embedding = gguf_find_tensor(gguf, "token_embd.weight");
    if (!embedding)
        gguf_die(gguf, "tensor token_embd.weight is missing: is it a vocabulary alone?");
    c->vocab = embedding->rows;
    const char *key = gguf_key(gguf, "vocab_size");
    uint32_t vocab = gguf_u32(gguf, key, (uint32_t)c->vocab);
    if (vocab != c->vocab)
        gguf_die(gguf, "%s is %u, but token_embd.weight has %zu rows: " DAMAGED, key, vocab,
                 c->vocab);
}

static void gguf_read_config(gguf_file *gguf, retrofit_config *c) {
    gguf_check_architecture(gguf);
    memset(c, 0, sizeof *c);
    must(retrofit_config_set_family(c, gguf->architecture));
    gguf_read_sizes(gguf, c);
    gguf_check_attention(gguf, c);
    const char *key = gguf_key(gguf, "attention.layer_norm_rms_epsilon");
    gguf_need(gguf, key, GGUF_F32, false);
    c->norm_eps = gguf_f32(gguf, key, 0);
    c->rope_theta = (double)gguf_f32(gguf, gguf_key(gguf, "rope.freq_base"), 10000);
    c->bos = (int32_t)gguf_u32(gguf, "tokenizer.ggml.bos_token_id", NO_TOKEN);
    c->pad = (int32_t)gguf_u32(gguf, "tokenizer.ggml.padding_token_id", NO_TOKEN);
    c->eos[0] = (int32_t)gguf_u32(gguf, "tokenizer.ggml.eos_token_id", NO_TOKEN);
    c->eos_count = c->eos[0] >= 0;
    c->tied = !gguf_find_tensor(gguf, "output.weight");
    c->state_std = (float)RETROFIT_STATE_STD;
    c->mean_recurrence = 1;
    c->backprop_depth = 1;
    must(retrofit_config_check(c, gguf->path));
    gguf_read_rope(gguf, c);
}

// The tensor `name`, which must be of this shape, is the next piece.
static void gguf_add_piece(const gguf_file *gguf, const char *name, size_t rows, size_t cols,
                           size_t head_dim) {
    gguf_tensor *tensor = gguf_find_tensor(gguf, name);
    if (!tensor) gguf_die(gguf, "tensor %s is missing: damaged, or not all of a model", name);
    tensor->used = true;
    if (tensor->rows != rows || tensor->cols != cols)
        gguf_die(tensor->file, "tensor %s is %zu x %zu, the metadata ask for %zu x %zu",
                 tensor->name, tensor->rows, tensor->cols, rows, cols);
    add_piece(gguf_piece(tensor, head_dim));
}

// The parameter's numbers are those of tensors that stand in it one below the other: their names,
// between `prefix` and .weight or .bias. Vectors have one row in the file.
static void gguf_place(const gguf_file *gguf, const char *prefix, const char *const names[3],
                       retrofit_parameter *p, size_t head_dim) {
    bool bias = p->kind == RETROFIT_BIAS;
    p->weight.data = next_address();
    for (size_t i = 0; i < p->sources; i++) {
        char name[GGUF_MAX_NAME + 1];
        size_t rows = p->source[i].rows;
        snprintf(name, sizeof name, "%s%s.%s", prefix, names[i], bias ? "bias" : "weight");
        gguf_add_piece(gguf, name, bias ? 1 : rows, bias ? rows : p->cols, i < 2 ? head_dim : 0);
    }
}

// The rows of q and k stand in another order in a llama alone. What an architecture's blocks lack
// has no sources.
static void gguf_place_layer(const gguf_file *gguf, const retrofit_config *c, size_t number,
                             retrofit_layer *layer) {
    size_t head_dim = strcmp(gguf->architecture, "llama") ? 0 : c->head_dim;
    const struct {
        retrofit_parameter *parameter;
        const char *names[3];
        size_t head_dim;
    } table[] = {
        {&layer->norm_1, {c->post_norm ? "post_attention_norm" : "attn_norm"}, 0},
        {&layer->w_qkv, {"attn_q", "attn_k", "attn_v"}, head_dim},
        {&layer->b_qkv, {"attn_q", "attn_k", "attn_v"}, 0},
        {&layer->q_norm, {"attn_q_norm"}, 0},
        {&layer->k_norm, {"attn_k_norm"}, 0},
        {&layer->w_out, {"attn_output"}, 0},
        {&layer->norm_2, {c->post_norm ? "post_ffw_norm" : "ffn_norm"}, 0},
        {&layer->w_gate_up, {"ffn_gate", "ffn_up"}, 0},
        {&layer->w_down, {"ffn_down"}, 0},
    };
    char prefix[32];
    snprintf(prefix, sizeof prefix, "blk.%zu.", number);
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i].parameter->sources)
            gguf_place(gguf, prefix, table[i].names, table[i].parameter, table[i].head_dim);
}

// The model is good until the file is closed.
static retrofit_model *gguf_load(gguf_file *gguf) {
    retrofit_config config;
    gguf_read_config(gguf, &config);
    retrofit_model *model = retrofit_model_new(&config, file_operations());
    must(model != NULL);
    begin_pieces(model, gguf->path);

    gguf_place(gguf, "", (const char *[3]){"token_embd"}, &model->wte, 0);
    for (size_t i = 0; i < config.coda; i++)
        gguf_place_layer(gguf, &config, i, &model->coda[i]);
    gguf_place(gguf, "", (const char *[3]){"output_norm"}, &model->ln_f, 0);
    if (config.tied) model->lm_head.weight = model->wte.weight;
    else gguf_place(gguf, "", (const char *[3]){"output"}, &model->lm_head, 0);

    for (size_t i = 0; i < gguf->tensor_count; i++)
        if (!gguf->tensors[i].used)
            gguf_die(gguf->tensors[i].file, "tensor %s has no place in a %s of these metadata",
                     gguf->tensors[i].name, gguf->architecture);
    if (gguf->unknown.size > 1)
        retrofit_note("%s: not known here, and not used: %s", gguf->path, gguf->unknown.bytes);
    return model;
}

// =================================================================================================
// 7  GGUF's tokenizer
// =================================================================================================

// The metadata become tokenizer.json and tokenizer_config.json as Hugging Face has them. There are
// two kinds, which tokenizer.ggml.model names:
//     gpt2     byte-level BPE; tokenizer.ggml.pre names the pattern that cuts a text into words
//     llama    SentencePiece's BPE, whose merges follow from the tokens' scores

enum { TYPE_UNKNOWN = 2, TYPE_CONTROL = 3, TYPE_USER_DEFINED = 4, TYPE_BYTE = 6 };
enum { MAX_TOKEN = 1024 }; // bytes of a SentencePiece token

enum { BOS, EOS, UNKNOWN, PADDING, ROLES };
static const struct {
    const char *metadata, *config; // the name in the GGUF, and in tokenizer_config.json
} roles[ROLES] = {
    {"tokenizer.ggml.bos_token_id", "bos_token"},
    {"tokenizer.ggml.eos_token_id", "eos_token"},
    {"tokenizer.ggml.unknown_token_id", "unk_token"},
    {"tokenizer.ggml.padding_token_id", "pad_token"},
};

// How byte-level BPE prepares a text, by what tokenizer.ggml.pre calls it. Its words are cut by
// GPT-2's pattern, or by Llama 3's, of which there are several that cut digits differently.
typedef struct {
    const char *name;
    const char *digits;  // in a pattern like Llama 3's; NULL: GPT-2's pattern
    bool each_digit;     // every digit is cut off before
    bool composed;       // characters and their marks are composed before: Unicode's form NFC
    bool ignores_merges; // a word that is a token is not merged
    bool adds_bos;       // unless the metadata say otherwise
} word_pattern;

// dbrx is OLMo-2's. llama.cpp does not compose characters; Qwen's own tokenizer does.
static const word_pattern word_patterns[] = {
    {"llama-bpe", .digits = "\\\\p{N}{1,3}", .ignores_merges = true, .adds_bos = true},
    {"llama3", .digits = "\\\\p{N}{1,3}", .ignores_merges = true, .adds_bos = true},
    {"dbrx", .digits = "\\\\p{N}{1,3}"},
    {"qwen2", .digits = "\\\\p{N}", .composed = true},
    {"smollm", .each_digit = true},
    {.name = "gpt-2"},
    {.name = "default"},
};

typedef struct {
    const gguf_file *gguf;
    bool sentencepiece;
    const word_pattern *pattern; // of byte-level BPE, else NULL
    size_t count;                // of tokens
    gguf_string *tokens;         // [count]
    int32_t *types;              // [count]
    float *scores;               // [count] SentencePiece
    gguf_string *merges; // [merge_count] byte-level BPE: "left right", the first to be made first
    size_t merge_count;
    uint32_t ids[ROLES]; // NO_TOKEN: none
    bool added[2];       // whether BOS goes before, EOS behind every text
    bool add_space;      // SentencePiece: before every text
} gguf_vocabulary;

// ---- Reading the metadata -----------------------------------------------------------------------

// A copy of an array of numbers of four bytes, one for each token.
static void *read_token_array(const gguf_vocabulary *vocabulary, const char *key, uint32_t type,
                              size_t *count) {
    const gguf_value *value = gguf_need(vocabulary->gguf, key, type, true);
    void *numbers = allocate_or_die(value->count, 4);
    memcpy(numbers, value->data, 4 * value->count);
    *count = value->count;
    return numbers;
}

static void read_tokens(gguf_vocabulary *v) {
    v->tokens = gguf_need_strings(v->gguf, "tokenizer.ggml.tokens", &v->count);
    size_t types, scores = v->count;
    v->types = read_token_array(v, "tokenizer.ggml.token_type", GGUF_I32, &types);
    if (v->sentencepiece)
        v->scores = read_token_array(v, "tokenizer.ggml.scores", GGUF_F32, &scores);
    size_t embeddings = gguf_find_tensor(v->gguf, "token_embd.weight")->rows;
    if (types != v->count || scores != v->count || v->count > embeddings)
        gguf_die(v->gguf,
                 "%zu tokens, but another number of token types or scores, or fewer embeddings: "
                 DAMAGED, v->count);
}

static void read_merges(gguf_vocabulary *v) {
    gguf_string pattern = gguf_need_string(v->gguf, "tokenizer.ggml.pre");
    v->merges = gguf_need_strings(v->gguf, "tokenizer.ggml.merges", &v->merge_count);
    for (size_t i = 0; i < sizeof word_patterns / sizeof *word_patterns; i++)
        if (gguf_string_is(pattern, word_patterns[i].name)) v->pattern = &word_patterns[i];
    if (!v->pattern)
        gguf_die(v->gguf, "tokenizer.ggml.pre is %.*s; known: llama-bpe, qwen2, dbrx, smollm, "
                          "gpt-2, default", GGUF_SHOW(pattern));
}

// Where the metadata don't say what is added to a text, llama.cpp's defaults hold.
static void read_roles(gguf_vocabulary *v) {
    const gguf_file *gguf = v->gguf;
    bool bos = v->sentencepiece || v->pattern->adds_bos;
    v->added[BOS] = gguf_bool(gguf, "tokenizer.ggml.add_bos_token", bos);
    v->added[EOS] = gguf_bool(gguf, "tokenizer.ggml.add_eos_token", false);
    v->add_space = gguf_bool(gguf, "tokenizer.ggml.add_space_prefix", v->sentencepiece);
    for (int i = 0; i < ROLES; i++) {
        bool needed = i <= EOS && v->added[i];
        v->ids[i] = needed ? gguf_need_u32(gguf, roles[i].metadata)
                           : gguf_u32(gguf, roles[i].metadata, NO_TOKEN);
        bool none = v->ids[i] == NO_TOKEN && !needed; // a file may say it too
        if (!none && v->ids[i] >= v->count)
            gguf_die(gguf, "%s is %u of %zu tokens", roles[i].metadata, v->ids[i], v->count);
    }
}

static void read_vocabulary(gguf_vocabulary *v, const gguf_file *gguf) {
    memset(v, 0, sizeof *v);
    v->gguf = gguf;
    gguf_string model = gguf_need_string(gguf, "tokenizer.ggml.model");
    v->sentencepiece = gguf_string_is(model, "llama");
    if (!v->sentencepiece && !gguf_string_is(model, "gpt2"))
        gguf_die(gguf, "tokenizer.ggml.model is %.*s; only gpt2 and llama are read",
                 GGUF_SHOW(model));
    read_tokens(v);
    if (!v->sentencepiece) read_merges(v);
    read_roles(v);
}

static void free_vocabulary(gguf_vocabulary *v) {
    free(v->tokens);
    free(v->types);
    free(v->scores);
    free(v->merges);
}

// ---- SentencePiece's merges ---------------------------------------------------------------------

// Two tokens that make up a third. Hugging Face's converter takes every such pair for a merge: the
// best score first, then the longer left part, then the longer right part, then the smaller id.
typedef struct {
    gguf_string token;
    size_t left; // bytes of the left part
    float score; // of the token
    size_t left_characters, right_characters, id;
} token_merge;

typedef struct {
    token_merge *merges;
    size_t count, capacity;
} merge_list;

static int compare_merges(const void *a, const void *b) {
    const token_merge *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    if (x->left_characters != y->left_characters)
        return x->left_characters > y->left_characters ? -1 : 1;
    if (x->right_characters != y->right_characters)
        return x->right_characters > y->right_characters ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

static bool is_token(const retrofit_tokenizer *tokenizer, const char *text, size_t length) {
    char token[MAX_TOKEN + 1] = "";
    memcpy(token, text, length);
    return retrofit_tokenizer_id(tokenizer, token) >= 0;
}

static size_t count_characters(const char *text, size_t length) { // of UTF-8
    size_t count = 0;
    for (size_t i = 0; i < length; i++) count += (text[i] & 0xc0) != 0x80;
    return count;
}

// Adds every way to make up a token of two others.
static void add_merges(merge_list *list, const gguf_vocabulary *v, size_t id,
                       const retrofit_tokenizer *tokenizer) {
    gguf_string token = v->tokens[id];
    for (size_t left = 1; left < token.length; left++) {
        const char *right = token.text + left;
        size_t right_length = token.length - left;
        if (!is_token(tokenizer, token.text, left) || !is_token(tokenizer, right, right_length))
            continue;
        if (list->count == list->capacity) {
            list->capacity = 2 * list->capacity + 1024;
            list->merges =
                retrofit_reallocate(list->merges, list->capacity, sizeof *list->merges);
            must(list->merges != NULL);
        }
        list->merges[list->count++] = (token_merge){
            .token = token,
            .left = left,
            .score = v->scores[id],
            .left_characters = count_characters(token.text, left),
            .right_characters = count_characters(right, right_length),
            .id = id,
        };
    }
}

// tokenizer: one that knows the tokens, if not their merges. The list's merges are to be freed.
static merge_list derive_merges(const gguf_vocabulary *v, const retrofit_tokenizer *tokenizer) {
    merge_list list = {0};
    for (size_t i = 0; i < v->count; i++) {
        if (!isfinite(v->scores[i]) || v->tokens[i].length > MAX_TOKEN)
            gguf_die(v->gguf, "token %zu is too long, or its score not finite: " DAMAGED, i);
        int32_t type = v->types[i];
        if (type == TYPE_UNKNOWN || type == TYPE_CONTROL || type == TYPE_BYTE) continue;
        add_merges(&list, v, i, tokenizer);
    }
    if (list.count) qsort(list.merges, list.count, sizeof *list.merges, compare_merges);
    return list;
}

// ---- Writing tokenizer.json ---------------------------------------------------------------------

// printf, but each ' of the format, which has fewer than 400 bytes, is written as ": so that JSON
// can be read here.
__attribute__((format(printf, 2, 3))) static void print_json(FILE *f, const char *format, ...) {
    char text[400] = {0};
    for (size_t i = 0; format[i] && i < sizeof text - 1; i++)
        text[i] = format[i] == '\'' ? '"' : format[i];
    va_list args;
    va_start(args, format);
    vfprintf(f, text, args);
    va_end(args);
}

static const char *true_or_false(bool value) { return value ? "true" : "false"; }

static void print_token(FILE *f, const gguf_vocabulary *v, size_t id) {
    retrofit_json_write_string(f, v->tokens[id].text, v->tokens[id].length);
}

static void print_added_tokens(FILE *f, const gguf_vocabulary *v) {
    const char *separator = "\n";
    print_json(f, "  'added_tokens': [");
    for (size_t i = 0; i < v->count; i++) {
        int32_t type = v->types[i];
        bool special = type == TYPE_UNKNOWN || type == TYPE_CONTROL;
        if (!special && type != TYPE_USER_DEFINED) continue;
        print_json(f, "%s    {'id': %zu, 'content': ", separator, i);
        print_token(f, v, i);
        print_json(f, ", 'single_word': false, 'lstrip': false, 'rstrip': false, ");
        print_json(f, "'normalized': false, 'special': %s}", true_or_false(special));
        separator = ",\n";
    }
    print_json(f, "\n  ],\n");
}

// SentencePiece writes a space as ▁, and has no words.
static void print_sentencepiece_steps(FILE *f, bool add_space) {
    print_json(f, "  'normalizer': {'type': 'Sequence', 'normalizers': [");
    if (add_space) print_json(f, "{'type': 'Prepend', 'prepend': '▁'}, ");
    print_json(f, "{'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}]},\n");
    print_json(f, "  'pre_tokenizer': null,\n");
}

// How byte-level BPE cuts a text into words, within which it merges.
static void print_byte_level_steps(FILE *f, const word_pattern *pattern) {
    static const char before[] =
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|";
    static const char after[] = "| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|"
                                "\\\\s+(?!\\\\S)|\\\\s+";
    bool several = pattern->each_digit || pattern->digits;
    print_json(f, pattern->composed ? "  'normalizer': {'type': 'NFC'},\n"
                                    : "  'normalizer': null,\n");
    print_json(f, "  'pre_tokenizer': ");
    if (several) print_json(f, "{'type': 'Sequence', 'pretokenizers': [");
    if (pattern->each_digit) print_json(f, "{'type': 'Digits', 'individual_digits': true}, ");
    if (pattern->digits)
        print_json(f, "{'type': 'Split', 'behavior': 'Isolated', 'invert': false, "
                      "'pattern': {'Regex': '%s%s%s'}}, ", before, pattern->digits, after);
    print_json(f, "{'type': 'ByteLevel', 'add_prefix_space': false, 'trim_offsets': true, "
                  "'use_regex': %s}", true_or_false(!pattern->digits));
    print_json(f, several ? "]},\n" : ",\n");
}

static void print_special_token(FILE *f, const gguf_vocabulary *v, int role) {
    print_json(f, "{'SpecialToken': {'id': ");
    print_token(f, v, v->ids[role]);
    print_json(f, ", 'type_id': 0}}");
}

static void print_special_token_ids(FILE *f, const gguf_vocabulary *v, int role) {
    print_token(f, v, v->ids[role]);
    print_json(f, ": {'id': ");
    print_token(f, v, v->ids[role]);
    print_json(f, ", 'ids': [%u], 'tokens': [", v->ids[role]);
    print_token(f, v, v->ids[role]);
    print_json(f, "]}");
}

// What is added to a text: BOS before it, EOS behind it.
static void print_post_processor(FILE *f, const gguf_vocabulary *v) {
    bool bos = v->added[BOS], eos = v->added[EOS];
    if (!bos && !eos) {
        print_json(f, "  'post_processor': null,\n");
        return;
    }
    print_json(f, "  'post_processor': {'type': 'TemplateProcessing', 'single': [");
    if (bos) {
        print_special_token(f, v, BOS);
        print_json(f, ", ");
    }
    print_json(f, "{'Sequence': {'id': 'A', 'type_id': 0}}");
    if (eos) {
        print_json(f, ", ");
        print_special_token(f, v, EOS);
    }
    print_json(f, "], 'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, ");
    print_json(f, "{'Sequence': {'id': 'B', 'type_id': 1}}], 'special_tokens': {");
    bool same = bos && eos && v->ids[BOS] == v->ids[EOS];
    if (bos) print_special_token_ids(f, v, BOS);
    if (bos && eos && !same) print_json(f, ", ");
    if (eos && !same) print_special_token_ids(f, v, EOS);
    print_json(f, "}},\n");
}

static void print_decoder(FILE *f, const gguf_vocabulary *v) {
    if (!v->sentencepiece) {
        print_json(f, "  'decoder': {'type': 'ByteLevel', 'add_prefix_space': true, "
                      "'trim_offsets': true, 'use_regex': true},\n");
        return;
    }
    print_json(f, "  'decoder': {'type': 'Sequence', 'decoders': ["
                  "{'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '}, "
                  "{'type': 'ByteFallback'}, {'type': 'Fuse'}");
    if (v->add_space) print_json(f, ", {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}");
    print_json(f, "]},\n");
}

static void print_merges(FILE *f, const gguf_vocabulary *v, const merge_list *derived) {
    print_json(f, "    'merges': [");
    for (size_t i = 0; i < v->merge_count; i++) {
        print_json(f, i ? ",\n      " : "\n      ");
        retrofit_json_write_string(f, v->merges[i].text, v->merges[i].length);
    }
    for (size_t i = 0; i < derived->count; i++) {
        const token_merge *merge = &derived->merges[i];
        print_json(f, i ? ",\n      [" : "\n      [");
        retrofit_json_write_string(f, merge->token.text, merge->left);
        print_json(f, ", ");
        retrofit_json_write_string(f, merge->token.text + merge->left,
                                   merge->token.length - merge->left);
        print_json(f, "]");
    }
    print_json(f, "\n    ]\n");
}

static void print_model(FILE *f, const gguf_vocabulary *v, const merge_list *derived) {
    bool byte_fallback = false, ignores_merges = v->pattern && v->pattern->ignores_merges;
    for (size_t i = 0; i < v->count; i++) byte_fallback |= v->types[i] == TYPE_BYTE;
    print_json(f, "  'model': {\n    'type': 'BPE',\n    'dropout': null,\n    'unk_token': ");
    if (v->sentencepiece && v->ids[UNKNOWN] != NO_TOKEN) print_token(f, v, v->ids[UNKNOWN]);
    else print_json(f, "null");
    print_json(f, ",\n    'continuing_subword_prefix': null,\n    'end_of_word_suffix': null,\n");
    print_json(f, "    'fuse_unk': %s,\n", true_or_false(v->sentencepiece));
    print_json(f, "    'byte_fallback': %s,\n", true_or_false(byte_fallback));
    print_json(f, "    'ignore_merges': %s,\n    'vocab': {", true_or_false(ignores_merges));
    for (size_t i = 0; i < v->count; i++) {
        print_json(f, i ? ",\n      " : "\n      ");
        print_token(f, v, i);
        print_json(f, ": %zu", i);
    }
    print_json(f, "\n    },\n");
    print_merges(f, v, derived);
    print_json(f, "  }\n");
}

static void print_tokenizer(FILE *f, const gguf_vocabulary *v, const merge_list *derived) {
    print_json(f, "{\n  'version': '1.0',\n  'truncation': null,\n  'padding': null,\n");
    print_added_tokens(f, v);
    if (v->sentencepiece) print_sentencepiece_steps(f, v->add_space);
    else print_byte_level_steps(f, v->pattern);
    print_post_processor(f, v);
    print_decoder(f, v);
    print_model(f, v, derived);
    print_json(f, "}\n");
}

// The name of a chat template that is not the default one: what stands behind the key's last dot.
static bool is_named_template(const gguf_value *value, gguf_string *name) {
    static const char begin[] = "tokenizer.chat_template.";
    size_t length = sizeof begin - 1;
    bool is_named = value->type == GGUF_STRING && value->key.length > length &&
                    !memcmp(value->key.text, begin, length);
    if (is_named)
        *name = (gguf_string){value->key.text + length, value->key.length - length};
    return is_named;
}

static void print_named_template(FILE *f, gguf_string name, gguf_string template,
                                 const char *separator) {
    print_json(f, "%s    {'name': ", separator);
    retrofit_json_write_string(f, name.text, name.length);
    print_json(f, ", 'template': ");
    retrofit_json_write_string(f, template.text, template.length);
    print_json(f, "}");
}

// A string where there is one chat template, a list of names and templates where others have names.
static void print_chat_templates(FILE *f, const gguf_vocabulary *v) {
    const gguf_file *gguf = v->gguf;
    gguf_string chat = gguf_optional_string(gguf, "tokenizer.chat_template"), name;
    size_t named = 0;
    for (size_t i = 0; i < gguf->value_count; i++)
        named += is_named_template(&gguf->values[i], &name);
    if (!named && !chat.length) return;
    print_json(f, "  'chat_template': ");
    if (!named) {
        retrofit_json_write_string(f, chat.text, chat.length);
        print_json(f, ",\n");
        return;
    }
    const char *separator = "[\n";
    if (chat.length) {
        print_named_template(f, (gguf_string){"default", 7}, chat, separator);
        separator = ",\n";
    }
    for (size_t i = 0; i < gguf->value_count; i++) {
        if (!is_named_template(&gguf->values[i], &name)) continue;
        print_named_template(f, name, gguf_string_at(gguf->values[i].data), separator);
        separator = ",\n";
    }
    print_json(f, "\n  ],\n");
}

static void print_tokenizer_config(FILE *f, const gguf_vocabulary *v) {
    print_json(f, "{\n  'tokenizer_class': 'PreTrainedTokenizerFast',\n");
    print_json(f, "  'clean_up_tokenization_spaces': false,\n");
    for (int i = 0; i < ROLES; i++) {
        if (v->ids[i] == NO_TOKEN) continue;
        print_json(f, "  '%s': ", roles[i].config);
        print_token(f, v, v->ids[i]);
        print_json(f, ",\n");
    }
    print_chat_templates(f, v);
    print_json(f, "  'add_bos_token': %s,\n", true_or_false(v->added[BOS]));
    print_json(f, "  'add_eos_token': %s\n}\n", true_or_false(v->added[EOS]));
}

// ---- The files ----------------------------------------------------------------------------------

static FILE *create_file(char path[RETROFIT_PATH], const char *directory, const char *name) {
    FILE *f = retrofit_path(path, directory, name) ? fopen(path, "wb") : NULL;
    if (!f) die(1, "%s: %s", path, strerror(errno));
    return f;
}

static void write_tokenizer_config(const gguf_vocabulary *v, const char *directory) {
    char path[RETROFIT_PATH];
    FILE *f = create_file(path, directory, "tokenizer_config.json");
    print_tokenizer_config(f, v);
    must(retrofit_finish_file(f, path, true));
}

// llama.cpp ends a generation at the end of a turn and of a message too. Hugging Face has such ids
// beside the end of the text in generation_config.json.
static void write_generation_config(const gguf_vocabulary *v, const char *directory) {
    static const char *const keys[] = {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                                       "tokenizer.ggml.eom_token_id"};
    uint32_t ids[3];
    size_t count = 0;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        uint32_t id = gguf_u32(v->gguf, keys[i], NO_TOKEN);
        if (id == NO_TOKEN) continue;
        if (id >= v->count) gguf_die(v->gguf, "%s is %u of %zu tokens", keys[i], id, v->count);
        bool is_new = true;
        for (size_t j = 0; j < count; j++) is_new = is_new && ids[j] != id;
        if (is_new) ids[count++] = id;
    }
    if (count < 2) return; // config.json has it
    char path[RETROFIT_PATH];
    FILE *f = create_file(path, directory, "generation_config.json");
    print_json(f, "{\n");
    if (v->ids[BOS] != NO_TOKEN) print_json(f, "  'bos_token_id': %u,\n", v->ids[BOS]);
    print_json(f, "  'eos_token_id': [");
    for (size_t i = 0; i < count; i++) print_json(f, i ? ", %u" : "%u", ids[i]);
    print_json(f, "]\n}\n");
    must(retrofit_finish_file(f, path, true));
}

// Returns what our reader makes of the file: it finds whatever else is wrong with the vocabulary.
static retrofit_tokenizer *write_tokenizer(const gguf_vocabulary *v, const char *directory,
                                           const merge_list *derived) {
    char path[RETROFIT_PATH];
    FILE *f = create_file(path, directory, "tokenizer.json");
    print_tokenizer(f, v, derived);
    must(retrofit_finish_file(f, path, true));
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(directory);
    if (!tokenizer) gguf_die(v->gguf, "its tokenizer makes no sense: %s", retrofit_error());
    return tokenizer;
}

// SentencePiece's merges are found with the tokenizer that knows no merges yet; then it is written
// once more.
static void gguf_write_tokenizer(const gguf_file *gguf, const char *directory) {
    gguf_vocabulary vocabulary;
    merge_list derived = {0};
    read_vocabulary(&vocabulary, gguf);
    write_tokenizer_config(&vocabulary, directory);
    write_generation_config(&vocabulary, directory);
    retrofit_tokenizer *tokenizer = write_tokenizer(&vocabulary, directory, &derived);
    if (vocabulary.sentencepiece) {
        derived = derive_merges(&vocabulary, tokenizer);
        retrofit_tokenizer_free(tokenizer);
        tokenizer = write_tokenizer(&vocabulary, directory, &derived);
    }
    free(derived.merges);
    retrofit_tokenizer_free(tokenizer);
    free_vocabulary(&vocabulary);
}

// =================================================================================================
// 8  main
// =================================================================================================

// Ids that are another model's become the tokenizer's. A tokenizer that we cannot read is copied
// all the same; that it was not looked at is said.
static void mend_ids(retrofit_model *source, const char *directory) {
    char path[RETROFIT_PATH];
    must(retrofit_path(path, directory, "tokenizer.json"));
    if (!retrofit_is_there(path)) return;
    errno = 0;
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(directory);
    must(tokenizer || !retrofit_machine_failed());
    if (tokenizer) retrofit_config_mend_ids(&source->config, tokenizer, directory);
    else retrofit_note("the tokenizer is copied as it is, since it cannot be read here: %s",
                       retrofit_error());
    retrofit_tokenizer_free(tokenizer);
}

static void convert(int task) {
    struct stat status;
    bool is_there = !stat(options.from, &status);
    bool is_file = is_there ? S_ISREG(status.st_mode) : ends_with(options.from, ".gguf");
    gguf_file gguf;
    char path[RETROFIT_PATH];
    tokenizer_source tokenizer = {NULL, NULL};
    retrofit_model *source;
    if (is_file) {
        gguf_open(&gguf, options.from);
        source = gguf_load(&gguf);
        tokenizer.gguf = &gguf;
    } else {
        // To measure its layers, the model must run; else it is only copied.
        bool runs = options.text;
        source = runs ? retrofit_load(options.from, &retrofit_cpu, RETROFIT_INFERENCE)
                      : open_directory(options.from);
        must(source != NULL);
        tokenizer.directory = retrofit_model_directory(options.from, path);
        mend_ids(source, tokenizer.directory);
    }
    if (task == SURGERY) surgery(source, tokenizer);
    else if (task == REPORT) report(source, tokenizer);
    else rewrite(source, tokenizer);
    retrofit_free(source);
    forget_pieces();
    if (is_file) gguf_close(&gguf);
}

int main(int argc, char **argv) {
    retrofit_share_processors(argv);
    const char **files = allocate_or_die((size_t)argc, sizeof *files);
    size_t count = 0;
    int code = retrofit_options(argc, argv, option_table,
                                sizeof option_table / sizeof *option_table, usage, files, &count);
    if (code < 0) {
        int task = find_task();
        options.files = files;
        options.file_count = count;
        check_options(task, files, count);
        set_defaults(task);
        retrofit_abandon_on_signals("convert");
        retrofit_shows_shares = true;
        if (options.from) convert(task);
        if (task == RANDOM) make_random();
        if (task == TOKENIZE) tokenize(files, count);
        must(retrofit_flush_stdout());
        code = 0;
    }
    free(files);
    return code;
}

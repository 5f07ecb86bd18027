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
// stand in two of the lists; it is then copied to both places.
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
    int preset, adapter_init, dtype;              // which of the alternatives; -1: not given
    int encoding_errors;                          // the same
    size_t mean_recurrence, backprop_depth, seed; // SIZE_MAX: not given
    bool tokenize;
} options = {.preset = -1, .adapter_init = -1, .dtype = -1, .encoding_errors = -1,
             .mean_recurrence = SIZE_MAX, .backprop_depth = SIZE_MAX, .seed = SIZE_MAX};

enum { ADAPTER_DEFAULT, ADAPTER_IDENTITY }; // --adapter-init
enum { DTYPE_F32, DTYPE_BF16 };             // --dtype
enum { ERRORS_STRICT, ERRORS_REPLACE };     // --encoding-errors

static const retrofit_option option_table[] = {
    {"Surgery", RETROFIT_HEADING, NULL, NULL, NULL},
    {"from", RETROFIT_STRING, &options.from, "DIR|FILE.gguf",
     "a plain Llama; without layers to choose it is only rewritten"},
    {"to", RETROFIT_STRING, &options.to, "DIR|OUT.bin",
     "what to make; a directory must not exist yet"},
    {"prelude", RETROFIT_STRING, &options.prelude, "LAYERS",
     "layers of the source, like 0-3 or 2,5,8-9, or none"},
    {"core", RETROFIT_STRING, &options.core, "LAYERS", "the layers to repeat"},
    {"coda", RETROFIT_STRING, &options.coda, "LAYERS", "layers of the source, or none"},
    {"preset", RETROFIT_CHOICE, &options.preset, "tinyllama|llama3.2|llama3.2-2-4-2|smollm2",
     "the paper's layers (smollm2: 0-3, 20-25, 26-29 of 30, by its rule): "
     "the core is the last before the coda"},
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
    {"From scratch", RETROFIT_HEADING, NULL, NULL, NULL},
    {"random", RETROFIT_STRING, &options.random, "CONFIG.json",
     "a random model of this shape, plain or recurrent; or a directory with a config.json"},
    {"Token shards", RETROFIT_HEADING, NULL, NULL, NULL},
    {"tokenize", RETROFIT_FLAG, &options.tokenize, "FILE...",
     ".txt: the file is a document; .jsonl: each line has one"},
    {"tokenizer", RETROFIT_STRING, &options.tokenizer, "DIR",
     "where tokenizer.json is; with --random: to be carried along"},
    {"field", RETROFIT_STRING, &options.field, "NAME",
     "the member of a line that is the text (text)"},
    {"encoding-errors", RETROFIT_CHOICE, &options.encoding_errors, "strict|replace",
     "text that is not UTF-8 is refused (strict), or what is wrong in it becomes U+FFFD"},
};

static const char usage[] =
    "convert --from DIR|FILE.gguf --to DIR --preset NAME | --prelude LAYERS --core LAYERS "
    "--coda LAYERS [options]\n"
    "convert --random CONFIG.json --to DIR [options]\n"
    "convert --tokenize FILE... --tokenizer DIR --to OUT.bin [options]\n"
    "Cuts a plain Llama into a recurrent model, makes a random one, or turns text into token "
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
enum { SURGERY = 1, REWRITE = 2, RANDOM = 4, TOKENIZE = 8 };

static bool lists_given(void) { return options.prelude || options.core || options.coda; }

static int find_task(void) {
    if ((options.from != NULL) + (options.random != NULL) + options.tokenize != 1)
        die(2, "give one of --from, --random and --tokenize (see --help)");
    if (options.tokenize) return TOKENIZE;
    if (options.random) return RANDOM;
    return lists_given() || options.preset >= 0 ? SURGERY : REWRITE;
}

// Every option that was given must mean something for this task.
static void check_options_fit(int task) {
    const struct {
        const char *name;
        bool given;
        int tasks;
    } table[] = {
        {"prelude", options.prelude, SURGERY},
        {"core", options.core, SURGERY},
        {"coda", options.coda, SURGERY},
        {"preset", options.preset >= 0, SURGERY},
        {"adapter-init", options.adapter_init >= 0, SURGERY},
        {"mean-recurrence", options.mean_recurrence != SIZE_MAX, SURGERY | RANDOM},
        {"backprop-depth", options.backprop_depth != SIZE_MAX, SURGERY | RANDOM},
        {"dtype", options.dtype >= 0, SURGERY | REWRITE | RANDOM},
        {"hf-code", options.hf_code, SURGERY | REWRITE | RANDOM},
        {"seed", options.seed != SIZE_MAX, SURGERY | RANDOM},
        {"tokenizer", options.tokenizer, RANDOM | TOKENIZE},
        {"field", options.field, TOKENIZE},
        {"encoding-errors", options.encoding_errors >= 0, TOKENIZE},
    };
    const char *task_name = task == TOKENIZE ? "tokenize" : task == RANDOM ? "random" : "from";
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (!table[i].given || table[i].tasks & task) continue;
        if (task == REWRITE)
            die(2, "--%s goes with a choice of layers (see --help)", table[i].name);
        die(2, "--%s does not go with --%s", table[i].name, task_name);
    }
}

// The place to write to, and the arguments that are no options.
static void check_files(int task, const char *const *files, size_t count) {
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
    if (count) die(2, "'%s' is not an option: options begin with -- (see --help)", files[0]);
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
    if (lists_given() && options.preset >= 0)
        die(2, "--preset and lists of layers exclude each other");
    if (lists_given() && !(options.prelude && options.core && options.coda))
        die(2, "--prelude, --core and --coda go together; an empty one is none");
    check_modelling();
    check_recurrence("mean-recurrence", options.mean_recurrence);
    check_recurrence("backprop-depth", options.backprop_depth);
}

static void set_defaults(int task) {
    if (options.seed == SIZE_MAX) options.seed = 1;
    if (!options.field) options.field = "text";
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
    {"smollm2", 30, "0-3", "20-25", "26-29"},
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

// The inverse, in a column of 12 characters.
static void print_layers(const layer_numbers *list) {
    int width = list->count ? 0 : printf("none");
    size_t end;
    for (size_t i = 0; i < list->count; i = end) {
        end = i + 1; // of the run of consecutive layers that begins at i
        while (end < list->count && list->layers[end] == list->layers[end - 1] + 1) end++;
        if (i > 0) width += printf(",");
        width += printf("%zu", list->layers[i]);
        if (end > i + 1) width += printf("-%zu", list->layers[end - 1]);
    }
    printf("%*s", width < 12 ? 12 - width : 1, "");
}

static void choose_layers(layer_choice *choice, size_t available) {
    const char *prelude = options.prelude, *core = options.core, *coda = options.coda;
    if (options.preset >= 0) {
        const layer_preset *preset = &presets[options.preset];
        if (preset->source_layers != available)
            die(2, "--preset %s is for a model of %zu layers, this one has %zu", preset->name,
                preset->source_layers, available);
        prelude = preset->prelude;
        core = preset->core;
        coda = preset->coda;
    }
    read_layers(&choice->prelude, "prelude", prelude, available);
    read_layers(&choice->core, "core", core, available);
    read_layers(&choice->coda, "coda", coda, available);
    if (!choice->core.count) die(2, "--core none: there must be a layer to repeat");
}

// Says which layers are gone and how many parameters went with them. A plain Llama's layers, all of
// the same size, are its coda.
static void print_dropped(const retrofit_model *source, const layer_choice *choice) {
    const retrofit_config *c = &source->config;
    layer_numbers dropped = {.count = 0};
    for (size_t layer = 0; layer < c->coda; layer++) {
        size_t places = count_layer(&choice->prelude, layer) + count_layer(&choice->core, layer) +
                        count_layer(&choice->coda, layer);
        if (places == 0) dropped.layers[dropped.count++] = layer;
        if (places > 1)
            fprintf(stderr, "convert: note: layer %zu is copied to %zu places\n", layer, places);
    }
    size_t outside = 2 * c->vocab * c->n_embd + c->n_embd; // embedding, head, final norm
    size_t per_layer = (source->weight_count - outside) / c->coda;
    printf("%-12s", "dropped");
    print_layers(&dropped);
    printf("%16zu\n\n", dropped.count * per_layer);
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
    for (size_t i = 0; i < list->count; i++) {
        const retrofit_layer *layer = &source->coda[list->layers[i]];
        *next++ = &layer->norm_1;
        *next++ = &layer->w_qkv;
        *next++ = &layer->w_out;
        *next++ = &layer->norm_2;
        *next++ = &layer->w_gate_up;
        *next++ = &layer->w_down;
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
    if (!retrofit_is_plain(&source->config))
        die(1, "%s is recurrent already: surgery starts from a plain Llama", options.from);
    layer_choice choice;
    choose_layers(&choice, source->config.coda);

    retrofit_config config = recurrent_config(&source->config, &choice);
    retrofit_model *model = retrofit_model_new(&config, &retrofit_cpu);
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

// Section 7. Writes tokenizer.json and tokenizer_config.json.
static void gguf_write_tokenizer(const gguf_file *gguf, const char *directory);

// Numbers first … first + n - 1 of a parameter as fp32, on the way rounded to bf16 if asked for.
static void read_numbers(float *out, const retrofit_parameter *p, size_t first, size_t n,
                         bool rounded) {
    const char *data = p->weight.data;
    retrofit_type type = p->weight.type;
    retrofit_to_float(out, data + first * retrofit_type_size(type), type, n);
    if (!rounded) return;
    for (size_t i = 0; i < n; i++) out[i] = retrofit_bf16_to_float(retrofit_float_to_bf16(out[i]));
}

static void verify_parameter(const retrofit_parameter *written, const retrofit_parameter *origin) {
    enum { CHUNK = 1 << 16 };
    static float now[CHUNK], before[CHUNK];
    const char *name = written->source[0].name;
    if (written->rows != origin->rows || written->cols != origin->cols)
        die(1, "%s: written in another shape than its source's", name);
    size_t count = written->rows * written->cols;
    for (size_t i = 0; i < count; i += CHUNK) {
        size_t n = retrofit_min(count - i, CHUNK);
        read_numbers(now, written, i, n, false);
        read_numbers(before, origin, i, n, options.dtype == DTYPE_BF16);
        if (memcmp(now, before, n * sizeof *now))
            die(1, "%s: what was written reads back as something else: is the disk sound?", name);
    }
}

// Reads back what was written and compares it with where it came from, bit for bit. Returns the
// size of the file of weights.
static size_t verify(const char *directory, const retrofit_parameter *const *origin,
                     size_t count) {
    retrofit_model *written = retrofit_load(directory, &retrofit_cpu, RETROFIT_INFERENCE);
    if (!written) die(1, "reading back what was written: %s", retrofit_error());
    if (written->parameter_count != count)
        die(1, "reading back what was written: not all of it is there");
    for (size_t i = 0; i < count; i++) {
        verify_parameter(written->parameters[i], origin[i]);
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
    if (choice && part == RETROFIT_PART_PRELUDE) print_layers(&choice->prelude);
    else if (choice && part == RETROFIT_PART_CORE) print_layers(&choice->core);
    else if (choice && part == RETROFIT_PART_CODA) print_layers(&choice->coda);
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
    size_t bytes = verify(directory, origin, model->parameter_count);
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
//     norms                   1
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
        bool is_norm = p->kind == RETROFIT_NORM;
        float std = (float)(writes_to_residual_stream(p) ? sigma / sqrt(2 * depth) : sigma);
        uint64_t key = retrofit_hash(options.seed, i);
        for (size_t first = 0; first < count; first += CHUNK) {
            size_t end = retrofit_min(first + CHUNK, count);
#ifdef _OPENMP
#pragma omp parallel for schedule(static)
#endif
            for (size_t j = first; j < end; j++)
                p->master[j] = is_norm ? 1 : std * retrofit_hash_normal(key, j);
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

// What may be lost of a text. None of it stops the work, all of it is counted and said.
enum { LOST_EMPTY, LOST_NULL, LOST_MEMBER, LOST_HALF, LOST_BYTES, LOST_NUL, LOSSES };
static const char *const loss_texts[LOSSES] = {
    "empty documents were skipped",
    "lines whose text is null were skipped",
    "lines without the member that is the text were skipped",
    "halves of surrogate pairs (as \\ud800) became U+FFFD",
    "stretches that are not UTF-8 became U+FFFD",
    "NUL characters are in the text",
};

typedef struct {
    size_t counts[LOSSES];
    size_t lines[LOSSES]; // the first with it, from 1; of a whole file 0
    size_t members;       // lines that have the member, be it null or empty
    size_t documents;     // that have text
    size_t last_line;
} text_report;

typedef struct {
    FILE *file;
    char *path; // of the file, until it is finished
    retrofit_tokenizer *tokenizer;
    int32_t eos;                              // to add to each document; -1: the tokenizer adds it
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

// Parses a line of a .jsonl file and finds its text, which lies within the tree that is returned;
// it is empty where the member is null or not there, as datasets has it. NULL or error.
static retrofit_json *parse_line(document *document, const char *where, const char **text,
                                 size_t *size) {
    retrofit_json *line = retrofit_json_parse(*text, *size, where);
    if (!line && **text == '[')
        retrofit_fail("%s: a JSON array: each line of a .jsonl file has an object of its own; "
                      "jq -c '.[]' makes such lines", where);
    if (!line) return NULL;
    const retrofit_json *member = retrofit_json_get(line, options.field);
    bool missing = !member || member->type == RETROFIT_JSON_NULL;
    bool ok = true;
    if (line->type != RETROFIT_JSON_OBJECT)
        ok = retrofit_fail("%s: %s, not an object with a \"%s\"", where, json_kind(line),
                           options.field);
    else if (!missing && member->type != RETROFIT_JSON_STRING)
        ok = retrofit_fail("%s: \"%s\" is %s, not a string: name another with --field", where,
                           options.field, json_kind(member));
    if (!ok) {
        retrofit_json_free(line);
        return NULL;
    }
    document->has_member = member != NULL;
    document->lost[LOST_MEMBER] = !member;
    document->lost[LOST_NULL] = member && missing;
    *text = missing ? "" : member->string;
    *size = missing ? 0 : member->length;
    return line;
}

// Encodes the text of a document, which is UTF-8. false or error.
static bool encode_text(const retrofit_tokenizer *tokenizer, document *document, const char *where,
                        const char *text, size_t size) {
    retrofit_json *line = NULL;
    retrofit_skip_mark(&text, &size);
    retrofit_strip(&text, &size);
    if (document->line > 0 && size > 0) {
        line = parse_line(document, where, &text, &size);
        if (!line) return false;
        retrofit_strip(&text, &size);
    }
    document->text_bytes = size;
    for (size_t i = 0; i < size; i++) document->lost[LOST_NUL] += text[i] == 0;
    if (size > 0) document->ids = retrofit_encode(tokenizer, text, size, true, &document->count);
    else document->lost[LOST_EMPTY] = !document->lost[LOST_MEMBER] && !document->lost[LOST_NULL];
    retrofit_json_free(line);
    return size == 0 || document->ids;
}

// Several threads do this at a time. false or error.
static bool encode_document(const retrofit_tokenizer *tokenizer, document *document,
                            const char *path) {
    char where[RETROFIT_PATH + 32];
    const char *text = document->raw;
    size_t size = document->size, invalid = retrofit_find_invalid(text, 0, size);
    if (document->line == 0) snprintf(where, sizeof where, "%s", path);
    else snprintf(where, sizeof where, "%s: line %zu", path, document->line);
    if (document->line > 0) document->lost[LOST_HALF] = mend_line(document->raw, size);
    if (invalid == size) return encode_text(tokenizer, document, where, text, size);

    if (options.encoding_errors != ERRORS_REPLACE)
        return retrofit_fail("%s: byte %zu: not UTF-8 (%02X): convert it first, e.g. iconv -f "
                             "WINDOWS-1252 -t UTF-8, or --encoding-errors replace", where, invalid,
                             (unsigned char)text[invalid]);
    retrofit_text valid = {0};
    document->lost[LOST_BYTES] = retrofit_append_valid(&valid, text, size);
    bool ok = !valid.failed && encode_text(tokenizer, document, where, valid.bytes, valid.size);
    free(valid.bytes);
    return ok;
}

static void write_id(shard_writer *writer, int32_t id) {
    uint16_t narrow = (uint16_t)id;
    size_t written = writer->narrow ? fwrite(&narrow, sizeof narrow, 1, writer->file)
                                    : fwrite(&id, sizeof id, 1, writer->file);
    if (written != 1) die(1, "%s: writing failed: %s", options.to, strerror(errno));
    writer->tokens++;
    if (writer->tokens > INT32_MAX)
        die(1, "more than %d tokens, the most a shard can hold: split the input", INT32_MAX);
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

static void write_document(shard_writer *writer, const document *document) {
    if (document->failed) die(1, "%s", document->error ? document->error : "out of memory");
    add_losses(&writer->report, document);
    writer->read_bytes += document->size;
    writer->text_bytes += document->text_bytes;
    if (document->text_bytes == 0) return;
    for (size_t i = 0; i < document->count; i++) write_id(writer, document->ids[i]);
    if (writer->eos >= 0) write_id(writer, writer->eos);
    writer->documents++;
}

// ---- Files of documents -------------------------------------------------------------------------

// next: bytes of the document that comes. One that takes long by itself is told before.
static void show_progress(const shard_writer *writer, size_t next) {
    enum { LONG = 1 << 24 };
    if (!retrofit_live_line_due() && next < LONG) return;
    double read = (double)writer->read_bytes, all = (double)writer->all_bytes;
    double elapsed = retrofit_seconds() - writer->start;
    char text[160], speed[64] = "";
    if (read > 0)
        snprintf(speed, sizeof speed, ", %.1f MB/s, ETA %.0f s", read / 1e6 / elapsed,
                 (all - read) * elapsed / read);
    snprintf(text, sizeof text, "%.1f of %.1f MB, %zu documents, %zu tokens%s", read / 1e6,
             all / 1e6, writer->documents, writer->tokens, speed);
    retrofit_live_line(text);
}

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
#pragma omp parallel for schedule(dynamic)
#endif
    for (size_t i = 0; i < count; i++) {
        if (encode_document(writer->tokenizer, &batch[i], path)) continue;
        batch[i].failed = true;
        batch[i].error = retrofit_copy_string(retrofit_error()); // of the thread's own
    }
    for (size_t i = 0; i < count; i++) {
        write_document(writer, &batch[i]);
        free(batch[i].raw);
        free(batch[i].ids);
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
        die(1, "%s: line %zu: no \"%s\" in it, nor in any other up to line %zu: name another with "
               "--field", path, report->lines[LOST_MEMBER], options.field, report->last_line);
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
    show_progress(writer, document.size);
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
    writer->eos = retrofit_tokenizer_adds_at_end(tokenizer, eos) ? -1 : eos;
    writer->narrow = size <= 65536;
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

// Writes the header, and gives the file its name once it is on the disk.
static void finish_shard(shard_writer *writer) {
    uint64_t hash = retrofit_tokenizer_hash(writer->tokenizer);
    int32_t header[256] = {0};
    header[0] = writer->narrow ? RETROFIT_SHARD_MAGIC_16 : RETROFIT_SHARD_MAGIC_32;
    header[1] = writer->narrow ? 1 : 7; // version
    header[2] = (int32_t)writer->tokens;
    header[3] = (int32_t)(uint32_t)hash;
    header[4] = (int32_t)(uint32_t)(hash >> 32);
    errno = 0;
    bool ok = !fseek(writer->file, 0, SEEK_SET);
    ok = ok && fwrite(header, sizeof header, 1, writer->file) == 1;
    must(retrofit_finish_file(writer->file, writer->path, ok));
    must(retrofit_file_commit(writer->path, options.to));
    free(writer->path);
}

static void tokenize(const char *const *files, size_t count) {
    shard_writer writer = {.all_bytes = check_text_files(files, count), .files = count};
    open_tokenizer(&writer);
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
    for (int i = 0; i < LOSSES; i++)
        if (writer.lost[i]) printf("%zu %s\n", writer.lost[i], loss_texts[i]);
    retrofit_tokenizer_free(writer.tokenizer);
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
} gguf_value;

enum { GGUF_MAX_NAME = 64, GGUF_MAX_KEY = 255 }; // bytes that we read; keys may have 65535
typedef struct {
    char name[GGUF_MAX_NAME + 1];
    uint32_t type;
    size_t rows, cols; // cols is the fastest dimension, rows the product of the others
    size_t offset, bytes;
    const uint8_t *data;
    bool used;
} gguf_tensor;

struct gguf_file {
    const char *path;
    char *bytes; // the whole file, mapped
    size_t size;
    size_t position; // of what is read next, up to the data
    gguf_value *values;
    size_t value_count;
    gguf_tensor *tensors; // by name
    size_t tensor_count;
    retrofit_text unknown; // keys of metadata that are not known, for a note
};

#define DAMAGED "damaged, fetch it again"
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

// Tensors are stored in blocks of 1 or 32 values. Below, d is a block's scale and m its minimum,
// both fp16. Two values of four bits share a byte: byte i has value i in its low half, i + 16 in
// its high half.

static float f16_at(const uint8_t *bytes) {
    return retrofit_f16_to_float((uint16_t)(bytes[0] | bytes[1] << 8));
}

static void read_f32(float *out, const uint8_t *data, size_t count) {
    memcpy(out, data, count * sizeof *out);
}

static void read_f16(float *out, const uint8_t *data, size_t count) {
    retrofit_to_float(out, data, RETROFIT_F16, count);
}

static void read_bf16(float *out, const uint8_t *data, size_t count) {
    retrofit_to_float(out, data, RETROFIT_BF16, count);
}

// d (2 bytes), q (32 signed bytes): x = d·q
static void read_q8_0(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 34, out += 32) {
        float d = f16_at(block);
        for (size_t i = 0; i < 32; i++) out[i] = d * (float)(int8_t)block[2 + i];
    }
}

// The 32 values d·q + m whose q lie in 16 bytes.
static void read_4_bits(float *out, const uint8_t *q, float d, float m) {
    for (size_t i = 0; i < 16; i++) {
        out[i] = d * (float)(q[i] & 15) + m;
        out[i + 16] = d * (float)(q[i] >> 4) + m;
    }
}

// d (2 bytes), q (32 of 4 bits in 16 bytes): x = d·(q - 8)
static void read_q4_0(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 18, out += 32) {
        float d = f16_at(block);
        read_4_bits(out, block + 2, d, -8 * d);
    }
}

// d (2 bytes), m (2 bytes), q (32 of 4 bits in 16 bytes): x = d·q + m
static void read_q4_1(float *out, const uint8_t *block, size_t blocks) {
    for (size_t b = 0; b < blocks; b++, block += 20, out += 32)
        read_4_bits(out, block + 4, f16_at(block), f16_at(block + 2));
}

typedef struct {
    const char *name;
    uint32_t number;      // in files
    size_t values, bytes; // of a block
    void (*read)(float *out, const uint8_t *data, size_t blocks);
} gguf_type;

static const gguf_type gguf_types[] = {
    {"F32", 0, 1, 4, read_f32},     {"F16", 1, 1, 2, read_f16},     {"Q4_0", 2, 32, 18, read_q4_0},
    {"Q4_1", 3, 32, 20, read_q4_1}, {"Q8_0", 8, 32, 34, read_q8_0}, {"BF16", 30, 1, 2, read_bf16},
};

// What the files of tensors that we don't read are called.
static const char *gguf_type_name(uint32_t number) {
    static const char *const names[] = {
        [6] = "Q5_0", [7] = "Q5_1", [9] = "Q8_1", [10] = "Q2_K", [11] = "Q3_K", [12] = "Q4_K",
        [13] = "Q5_K", [14] = "Q6_K", [15] = "Q8_K", [16] = "IQ2_XXS", [17] = "IQ2_XS",
        [18] = "IQ3_XXS", [19] = "IQ1_S", [20] = "IQ4_NL", [21] = "IQ3_S", [22] = "IQ2_S",
        [23] = "IQ4_XS", [24] = "I8", [25] = "I16", [26] = "I32", [27] = "I64", [28] = "F64",
        [29] = "IQ1_M", [34] = "TQ1_0", [35] = "TQ2_0", [39] = "MXFP4",
    };
    static char text[32];
    if (number < sizeof names / sizeof *names && names[number]) return names[number];
    snprintf(text, sizeof text, "number %u", number);
    return text;
}

static const gguf_type *gguf_find_type(uint32_t number) {
    for (size_t i = 0; i < sizeof gguf_types / sizeof *gguf_types; i++)
        if (gguf_types[i].number == number) return &gguf_types[i];
    return NULL;
}

// All numbers of a tensor, rows · cols of them.
static void gguf_read_numbers(const gguf_file *gguf, const gguf_tensor *tensor, float *out) {
    const gguf_type *type = gguf_find_type(tensor->type);
    size_t count = tensor->rows * tensor->cols;
    type->read(out, tensor->data, count / type->values);
    for (size_t i = 0; i < count; i++)
        if (!isfinite(out[i]))
            gguf_die(gguf, "tensor %s: number %zu is not finite: " DAMAGED, tensor->name, i);
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

static void gguf_read_tensor(gguf_file *gguf, gguf_tensor *tensor) {
    gguf_string name = gguf_read_name(gguf, GGUF_MAX_NAME);
    memcpy(tensor->name, name.text, name.length);
    gguf_read_shape(gguf, tensor);
    tensor->type = (uint32_t)gguf_read_number(gguf, 4);
    tensor->offset = (size_t)gguf_read_number(gguf, 8);
    const gguf_type *type = gguf_find_type(tensor->type);
    if (!type)
        gguf_die(gguf, "tensor %s is of type %s; F32, F16, BF16, Q8_0, Q4_0 and Q4_1 are read: "
                       "get such a file of this model", tensor->name,
                 gguf_type_name(tensor->type));
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

// A tensor begins with its name.
static int compare_tensors(const void *a, const void *b) { return strcmp(a, b); }

// Of two entries of one name readers take one or the other.
static void gguf_check_twice(const gguf_file *gguf, gguf_string *names, size_t count,
                             const char *what) {
    if (count) qsort(names, count, sizeof *names, compare_names);
    for (size_t i = 1; i < count; i++)
        if (!compare_names(&names[i - 1], &names[i]))
            gguf_die(gguf, "%s %.*s is there twice: remove the one that should not count", what,
                     GGUF_SHOW(names[i]));
}

// Sorts the tensors, so that they can be found by their names.
static void gguf_check_names(gguf_file *gguf) {
    size_t most = retrofit_max(gguf->value_count, gguf->tensor_count);
    gguf_string *names = allocate_or_die(most, sizeof *names);
    for (size_t i = 0; i < gguf->value_count; i++) names[i] = gguf->values[i].key;
    gguf_check_twice(gguf, names, gguf->value_count, "metadata");
    qsort(gguf->tensors, gguf->tensor_count, sizeof *gguf->tensors, compare_tensors);
    for (size_t i = 0; i < gguf->tensor_count; i++) {
        const char *name = gguf->tensors[i].name;
        names[i] = (gguf_string){name, strlen(name)};
    }
    gguf_check_twice(gguf, names, gguf->tensor_count, "tensor");
    free(names);
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
    gguf_check_names(gguf);
}

static uint32_t gguf_u32(const gguf_file *gguf, const char *key, uint32_t otherwise);

static void gguf_open(gguf_file *gguf, const char *path) {
    memset(gguf, 0, sizeof *gguf);
    gguf->path = path;
    gguf->bytes = retrofit_map_file(path, &gguf->size);
    must(gguf->bytes != NULL);
    gguf_read_header(gguf);

    uint32_t alignment = gguf_u32(gguf, "general.alignment", 32);
    if (!alignment || alignment & (alignment - 1))
        gguf_die(gguf, "general.alignment %u is no power of two", alignment);
    size_t start = gguf->position + (alignment - gguf->position % alignment) % alignment;
    size_t available = start < gguf->size ? gguf->size - start : 0;
    for (size_t i = 0; i < gguf->tensor_count; i++) {
        gguf_tensor *tensor = &gguf->tensors[i];
        if (tensor->offset % alignment || tensor->offset > available ||
            tensor->bytes > available - tensor->offset)
            gguf_die(gguf,
                     "tensor %s: %zu bytes at offset %zu are unaligned or past the file's end: "
                     CUT_OFF, tensor->name, tensor->bytes, tensor->offset);
        tensor->data = (const uint8_t *)gguf->bytes + start + tensor->offset;
    }
}

static void gguf_close(gguf_file *gguf) {
    munmap(gguf->bytes, gguf->size);
    free(gguf->values);
    free(gguf->tensors);
    free(gguf->unknown.bytes);
}

// ---- Metadata -----------------------------------------------------------------------------------

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

// All keys that llama.cpp's converter writes for a Llama, and those of the specification. The first
// row that fits counts.
static const retrofit_key gguf_keys[] = {
    {"general.architecture general.alignment", NULL, "see below"},
    {"general.type", "model", "only models are read: an adapter must be merged into its model"},
    {"general.quantization_version", "2",
     "its blocks of numbers are of an older format: convert the model again with a newer "
     "llama.cpp"},
    {"general.*", "*", "says where the file comes from"},
    {"split.count", "0|1", "a part of a model: llama-gguf-split --merge makes one file of all"},
    {"split.*", "*", "says which tensors are in the other parts"},
    {"adapter.*", "", "an adapter must be merged into its model first"},
    {"clip.*", "", "an encoder of images or sound"},
    {"diffusion.*", "", "not a model that predicts the next token"},
    {"xielu.*", "", "another activation than a Llama's"},
    {"imatrix.* quantize.*", "*", "says how the model was quantised"},
    {"training.*", "", "a checkpoint of a training: export the model"},
    {"llama.vocab_size llama.context_length llama.embedding_length llama.block_count "
     "llama.feed_forward_length llama.attention.head_count llama.attention.head_count_kv "
     "llama.attention.key_length llama.attention.value_length "
     "llama.attention.layer_norm_rms_epsilon llama.attention.causal "
     "llama.attention.sliding_window", NULL, "see below"},
    {"llama.attention.layer_norm_epsilon", "0", "a Llama has RMS norms"},
    {"llama.attention.clamp_kqv llama.attention.max_alibi_bias", "0", NULL},
    {"llama.attention.scale", "0", "another scale than 1/√head size"},
    {"llama.attention.*", "0", "another attention than a Llama's"},
    {"llama.rope.dimension_count llama.rope.freq_base llama.rope.scaling.type "
     "llama.rope.scaling.factor llama.rope.scale_linear", NULL, "see below"},
    {"llama.rope.scaling.original_context_length llama.rope.scaling.finetuned "
     "llama.rope.scaling.yarn_beta_*", "*", "only of scaling that is refused"},
    {"llama.rope.scaling.attn_factor llama.rope.scaling.yarn_attn_factor", "1",
     "it scales the scores of attention"},
    {"llama.rope.scaling.yarn_ext_factor", "0|-1", "it mixes in YaRN's scaling"},
    {"llama.rope.*", "0", "another rotation than a Llama's"},
    {"llama.expert_count", "0", "a mixture of experts: only dense Llamas are supported"},
    {"llama.expert_* llama.leading_dense_block_count", "*", "only of a mixture of experts"},
    {"llama.use_parallel_residual", "false", NULL},
    {"llama.tensor_data_layout", "reference|Meta AI original pth",
     "its numbers stand in another order"},
    {"llama.logit_scale llama.embedding_scale llama.residual_scale", "0|1", NULL},
    {"llama.attn_logit_softcapping llama.final_logit_softcapping", "0", NULL},
    {"llama.pooling_type", "*", "only of a model that embeds texts"},
    {"llama.*", "0", "not known here, and it may change what is computed"},
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

// Ends the program where a key says what we would not do. What is not known at all is kept for a
// note.
static void gguf_check_keys(gguf_file *gguf) {
    for (size_t i = 0; i < gguf->value_count; i++) {
        const gguf_value *value = &gguf->values[i];
        char key[GGUF_MAX_KEY + 1], text[100];
        bool known;
        snprintf(key, sizeof key, "%.*s", (int)value->key.length, value->key.text);
        gguf_value_text(gguf, value, text);
        must(retrofit_key_check(key, text, gguf_keys, sizeof gguf_keys / sizeof *gguf_keys,
                                gguf->path, &known));
        if (known) continue;
        retrofit_text_append_item(&gguf->unknown, key);
    }
    retrofit_text_append(&gguf->unknown, "", 1);
    must(!gguf->unknown.failed);
}

// RoPE may rotate more slowly, for longer texts. Without a type llama.cpp takes the factor for a
// linear one, which divides positions; older files have it under another name. 0: no scaling.
static double gguf_linear_factor(const gguf_file *gguf) {
    const char *type_key = "llama.rope.scaling.type", *key = "llama.rope.scaling.factor";
    gguf_string type = gguf_optional_string(gguf, type_key);
    if (gguf_string_is(type, "none")) return 0;
    if (type.length && !gguf_string_is(type, "linear"))
        gguf_die(gguf, "%s is %.*s: only linear scaling and Llama 3's, rope_freqs.weight, are "
                       "supported", type_key, GGUF_SHOW(type));
    if (!gguf_entry(gguf, key)) key = "llama.rope.scale_linear";
    float factor = gguf_f32(gguf, key, 1);
    bool none = factor == 0 || factor == 1;
    if (!none && !(factor > 1 && factor < 1e6f))
        gguf_die(gguf, "%s is %g, not a factor above 1", key, (double)factor);
    return none ? 0 : (double)factor;
}

// Heads whose keys, values and rotated parts differ in size are not supported.
static void gguf_check_head_size(const gguf_file *gguf, const char *key, uint32_t otherwise,
                                 size_t head_dim) {
    uint32_t size = gguf_u32(gguf, key, otherwise);
    if (size != head_dim)
        gguf_die(gguf, "%s is %u, but heads have %zu: not supported", key, size, head_dim);
}

static void gguf_check_attention(const gguf_file *gguf, const retrofit_config *c) {
    uint32_t window = gguf_u32(gguf, "llama.attention.sliding_window", 0);
    if (!gguf_bool(gguf, "llama.attention.causal", true))
        gguf_die(gguf, "llama.attention.causal is false: a model that sees what comes is not "
                       "supported");
    if (window && window < c->context)
        gguf_die(gguf, "llama.attention.sliding_window is %u of a context of %zu: not supported",
                 window, c->context);
}

// ---- The model ----------------------------------------------------------------------------------

static gguf_tensor *gguf_find_tensor(const gguf_file *gguf, const char *name) {
    return bsearch(name, gguf->tensors, gguf->tensor_count, sizeof *gguf->tensors,
                   compare_tensors);
}

// Llama 3.x divides its rotary frequencies θ^(-2i/h) by numbers f_i, which a GGUF has as tensor
// rope_freqs.weight. If frequency i makes t_i turns in the original context of 8192 tokens, then
//
//     t_i = 8192·θ^(-2i/h)/2π      s_i = min(max((t_i - 1)/(4 - 1), 0), 1)
//     1/f_i = (1 - s_i)/factor + s_i
//
// so the last one, of the slowest frequency, is the factor itself. All of them are checked.
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

static void gguf_read_rope(const gguf_file *gguf, retrofit_config *c) {
    gguf_tensor *tensor = gguf_find_tensor(gguf, "rope_freqs.weight");
    c->rope_factor = gguf_linear_factor(gguf);
    if (!tensor) return;
    if (c->rope_factor > 0)
        gguf_die(gguf, "RoPE is scaled twice, by rope_freqs.weight and by llama.rope.scaling or "
                       "llama.rope.scale_linear: not supported");
    tensor->used = true;
    float *divisors = allocate_or_die(tensor->rows * tensor->cols, sizeof *divisors);
    gguf_read_numbers(gguf, tensor, divisors);
    c->rope_llama3 = true;
    c->rope_factor = (double)divisors[tensor->cols - 1];
    c->rope_low = 1;
    c->rope_high = 4;
    c->rope_original_context = 8192;
    if (tensor->rows != 1 || tensor->cols != c->head_dim / 2 || c->rope_factor < 1 ||
        !is_llama3_scaling(c, divisors))
        gguf_die(gguf, "rope_freqs.weight is not Llama 3's scaling (low 1, high 4, original "
                       "context 8192): not supported");
    free(divisors);
}

// The architecture comes first, since it begins the names of most keys; a file without one may be a
// part of a model, or none, which the keys tell.
static void gguf_check_architecture(gguf_file *gguf) {
    gguf_string architecture = gguf_optional_string(gguf, "general.architecture");
    if (architecture.length && !gguf_string_is(architecture, "llama"))
        gguf_die(gguf, "the architecture is %.*s; only llama is read", GGUF_SHOW(architecture));
    gguf_check_keys(gguf);
    if (!architecture.length) gguf_die_missing(gguf, "general.architecture");
}

#define NO_TOKEN UINT32_MAX // -1 in a retrofit_config

static void gguf_read_config(gguf_file *gguf, retrofit_config *c) {
    gguf_check_architecture(gguf);
    memset(c, 0, sizeof *c);
    c->n_embd = gguf_need_u32(gguf, "llama.embedding_length");
    c->n_heads = gguf_need_u32(gguf, "llama.attention.head_count");
    c->n_kv_heads = gguf_u32(gguf, "llama.attention.head_count_kv", (uint32_t)c->n_heads);
    c->coda = gguf_need_u32(gguf, "llama.block_count");
    c->intermediate = gguf_need_u32(gguf, "llama.feed_forward_length");
    c->context = gguf_need_u32(gguf, "llama.context_length");

    uint32_t head_dim = c->n_heads ? (uint32_t)(c->n_embd / c->n_heads) : 0;
    c->head_dim = gguf_u32(gguf, "llama.attention.key_length", head_dim);
    gguf_check_head_size(gguf, "llama.attention.value_length", head_dim, c->head_dim);
    gguf_check_head_size(gguf, "llama.rope.dimension_count", (uint32_t)c->head_dim, c->head_dim);
    gguf_check_attention(gguf, c);

    gguf_need(gguf, "llama.attention.layer_norm_rms_epsilon", GGUF_F32, false);
    c->norm_eps = gguf_f32(gguf, "llama.attention.layer_norm_rms_epsilon", 0);
    c->rope_theta = (double)gguf_f32(gguf, "llama.rope.freq_base", 10000);
    c->bos = (int32_t)gguf_u32(gguf, "tokenizer.ggml.bos_token_id", NO_TOKEN);
    c->pad = (int32_t)gguf_u32(gguf, "tokenizer.ggml.padding_token_id", NO_TOKEN);
    c->eos[0] = (int32_t)gguf_u32(gguf, "tokenizer.ggml.eos_token_id", NO_TOKEN);
    c->eos_count = c->eos[0] >= 0;
    c->tied = !gguf_find_tensor(gguf, "output.weight");
    c->state_std = (float)RETROFIT_STATE_STD;
    c->mean_recurrence = 1;
    c->backprop_depth = 1;
    const gguf_tensor *embedding = gguf_find_tensor(gguf, "token_embd.weight");
    if (!embedding)
        gguf_die(gguf, "tensor token_embd.weight is missing: is it a vocabulary alone?");
    c->vocab = embedding->rows;
    if (gguf_u32(gguf, "llama.vocab_size", (uint32_t)c->vocab) != c->vocab)
        gguf_die(gguf, "llama.vocab_size is %u, but token_embd.weight has %zu rows: " DAMAGED,
                 gguf_u32(gguf, "llama.vocab_size", 0), c->vocab);
    must(retrofit_config_check(c, gguf->path));
    gguf_read_rope(gguf, c);
}

// RoPE rotates pairs of a head's h components. llama.cpp's converter moves the rows of q and k so
// that the two of a pair become neighbours. This moves them back, in place:
//
//     row in Hugging Face's order   0  1  …  h/2-1  h/2  h/2+1  …  h-1     pairs (i, i + h/2)
//     row in llama.cpp's order      0  2  …   h-2    1     3    …  h-1     pairs (2i, 2i + 1)
static void gguf_unpermute(float *weight, size_t head_dim, size_t heads, size_t cols) {
    size_t size = head_dim * cols;
    float *permuted = allocate_or_die(size, sizeof *permuted);
    for (float *head = weight; head < weight + heads * size; head += size) {
        memcpy(permuted, head, size * sizeof *head);
        for (size_t i = 0; i < head_dim; i++) {
            size_t row = i % 2 * (head_dim / 2) + i / 2;
            memcpy(head + row * cols, permuted + i * cols, cols * sizeof *head);
        }
    }
    free(permuted);
}

// The numbers of the tensor `name`, which must be of this shape.
static void gguf_load_tensor(const gguf_file *gguf, const char *name, float *out, size_t rows,
                             size_t cols) {
    gguf_tensor *tensor = gguf_find_tensor(gguf, name);
    if (!tensor)
        gguf_die(gguf, "tensor %s is missing: damaged, or one part of a split model", name);
    tensor->used = true;
    if (tensor->rows != rows || tensor->cols != cols)
        gguf_die(gguf, "tensor %s is %zu x %zu, the metadata ask for %zu x %zu", tensor->name,
                 tensor->rows, tensor->cols, rows, cols);
    gguf_read_numbers(gguf, tensor, out);
}

static void gguf_load_parameter(const gguf_file *gguf, const char *name,
                                const retrofit_parameter *p) {
    gguf_load_tensor(gguf, name, p->master, p->rows, p->cols);
}

static void gguf_load_layer(const gguf_file *gguf, const retrofit_config *c, size_t number,
                            const retrofit_layer *layer) {
    const struct {
        const retrofit_parameter *parameter;
        const char *tensors[3]; // they stand in the parameter one below the other
    } table[] = {
        {&layer->norm_1, {"attn_norm"}},
        {&layer->w_qkv, {"attn_q", "attn_k", "attn_v"}},
        {&layer->w_out, {"attn_output"}},
        {&layer->norm_2, {"ffn_norm"}},
        {&layer->w_gate_up, {"ffn_gate", "ffn_up"}},
        {&layer->w_down, {"ffn_down"}},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        const retrofit_parameter *p = table[i].parameter;
        float *out = p->master;
        for (size_t j = 0; j < p->sources; j++) {
            char name[65];
            size_t rows = p->source[j].rows;
            snprintf(name, sizeof name, "blk.%zu.%s.weight", number, table[i].tensors[j]);
            gguf_load_tensor(gguf, name, out, rows, p->cols);
            if (p == &layer->w_qkv && j < 2)
                gguf_unpermute(out, c->head_dim, rows / c->head_dim, p->cols);
            out += rows * p->cols;
        }
    }
}

static retrofit_model *gguf_load(gguf_file *gguf) {
    retrofit_config config;
    gguf_read_config(gguf, &config);
    retrofit_model *model = retrofit_model_new(&config, &retrofit_cpu);
    must(model != NULL);
    must(retrofit_model_allocate(model, RETROFIT_INFERENCE));

    gguf_load_parameter(gguf, "token_embd.weight", &model->wte);
    for (size_t i = 0; i < config.coda; i++) {
        gguf_load_layer(gguf, &config, i, &model->coda[i]);
        retrofit_show_share(i + 1, config.coda, "%s read", gguf->path);
    }
    gguf_load_parameter(gguf, "output_norm.weight", &model->ln_f);
    if (!config.tied) gguf_load_parameter(gguf, "output.weight", &model->lm_head);

    for (size_t i = 0; i < gguf->tensor_count; i++)
        if (!gguf->tensors[i].used)
            gguf_die(gguf, "tensor %s has no place in a Llama of these metadata "
                           "(biases, say, are not supported)", gguf->tensors[i].name);
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

typedef struct {
    const gguf_file *gguf;
    bool sentencepiece;
    bool smollm, llama3; // which pattern byte-level BPE has; neither: GPT-2's
    size_t count;        // of tokens
    gguf_string *tokens; // [count]
    int32_t *types;      // [count]
    float *scores;       // [count] SentencePiece
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
    v->smollm = gguf_string_is(pattern, "smollm");
    v->llama3 = gguf_string_is(pattern, "llama-bpe") || gguf_string_is(pattern, "llama3");
    bool gpt2 = gguf_string_is(pattern, "default") || gguf_string_is(pattern, "gpt-2");
    if (!v->smollm && !v->llama3 && !gpt2)
        gguf_die(v->gguf, "tokenizer.ggml.pre is %.*s; known: smollm, llama-bpe, gpt-2, default",
                 GGUF_SHOW(pattern));
}

// Where the metadata don't say what is added to a text, llama.cpp's defaults hold.
static void read_roles(gguf_vocabulary *v) {
    const gguf_file *gguf = v->gguf;
    bool bos = v->sentencepiece || v->llama3;
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
static void print_byte_level_steps(FILE *f, bool smollm, bool llama3) {
    static const char llama3_pattern[] =
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}{1,3}|"
        " ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+";
    print_json(f, "  'normalizer': null,\n  'pre_tokenizer': ");
    if (smollm || llama3) print_json(f, "{'type': 'Sequence', 'pretokenizers': [");
    if (smollm) print_json(f, "{'type': 'Digits', 'individual_digits': true}, ");
    if (llama3)
        print_json(f, "{'type': 'Split', 'behavior': 'Isolated', 'invert': false, "
                      "'pattern': {'Regex': '%s'}}, ", llama3_pattern);
    print_json(f, "{'type': 'ByteLevel', 'add_prefix_space': false, 'trim_offsets': true, "
                  "'use_regex': %s}", true_or_false(!llama3));
    print_json(f, smollm || llama3 ? "]},\n" : ",\n");
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
    bool byte_fallback = false;
    for (size_t i = 0; i < v->count; i++) byte_fallback |= v->types[i] == TYPE_BYTE;
    print_json(f, "  'model': {\n    'type': 'BPE',\n    'dropout': null,\n    'unk_token': ");
    if (v->sentencepiece && v->ids[UNKNOWN] != NO_TOKEN) print_token(f, v, v->ids[UNKNOWN]);
    else print_json(f, "null");
    print_json(f, ",\n    'continuing_subword_prefix': null,\n    'end_of_word_suffix': null,\n");
    print_json(f, "    'fuse_unk': %s,\n", true_or_false(v->sentencepiece));
    print_json(f, "    'byte_fallback': %s,\n", true_or_false(byte_fallback));
    print_json(f, "    'ignore_merges': %s,\n    'vocab': {", true_or_false(v->llama3));
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
    else print_byte_level_steps(f, v->smollm, v->llama3);
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
    bool is_file = !stat(options.from, &status) && S_ISREG(status.st_mode);
    gguf_file gguf;
    char path[RETROFIT_PATH];
    tokenizer_source tokenizer = {NULL, NULL};
    retrofit_model *source;
    if (is_file) {
        gguf_open(&gguf, options.from);
        source = gguf_load(&gguf);
        tokenizer.gguf = &gguf;
    } else {
        source = retrofit_load(options.from, &retrofit_cpu, RETROFIT_INFERENCE);
        must(source != NULL);
        tokenizer.directory = retrofit_model_directory(options.from, path);
        mend_ids(source, tokenizer.directory);
    }
    if (task == SURGERY) surgery(source, tokenizer);
    else rewrite(source, tokenizer);
    retrofit_free(source);
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
        check_options(task, files, count);
        set_defaults(task);
        retrofit_abandon_on_signals("convert");
        retrofit_shows_shares = true;
        if (task == SURGERY || task == REWRITE) convert(task);
        if (task == RANDOM) make_random();
        if (task == TOKENIZE) tokenize(files, count);
        must(retrofit_flush_stdout());
        code = 0;
    }
    free(files);
    return code;
}

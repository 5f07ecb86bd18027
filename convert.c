// convert: cuts a pretrained Llama into a recurrent model (method: paper section 3), makes one from nothing, and turns text into token shards.
#define RETROFIT_IMPLEMENTATION
#include "retrofit.h"

static struct {
    const char *from, *to, *random, *prelude, *core, *coda, *tokenizer, *field;
    int preset, adapter, dtype; // -1: not given
    size_t mean_recurrence, backprop_depth, seed; // SIZE_MAX: not given
    bool tokenize;
} o = {.preset = -1, .adapter = -1, .dtype = -1, .mean_recurrence = SIZE_MAX, .backprop_depth = SIZE_MAX, .seed = SIZE_MAX};

static const retrofit_option options[] = {
    {"Surgery", RETROFIT_HEADING, NULL, NULL, NULL},
    {"from", RETROFIT_STRING, &o.from, "DIR|FILE.gguf", "a plain Llama; without layers to choose it is only rewritten"},
    {"to", RETROFIT_STRING, &o.to, "DIR|OUT.bin", "what to make; a directory must not exist yet"},
    {"prelude", RETROFIT_STRING, &o.prelude, "LAYERS", "layers of the source, like 0-3 or 2,5,8-9, or none"},
    {"core", RETROFIT_STRING, &o.core, "LAYERS", "the layers to repeat"},
    {"coda", RETROFIT_STRING, &o.coda, "LAYERS", "layers of the source, or none"},
    {"preset", RETROFIT_CHOICE, &o.preset, "tinyllama|llama3.2|llama3.2-2-4-2|smollm2", "the paper's layers (smollm2: 0-3, 20-25, 26-29 of 30, by its rule): the core is the last before the coda"},
    {"adapter-init", RETROFIT_CHOICE, &o.adapter, "default|identity", "random as in the paper, or [0 | I]: starts as the source without the dropped layers (default)"},
    {"mean-recurrence", RETROFIT_SIZE, &o.mean_recurrence, "R", "recorded for train and infer (8)"},
    {"backprop-depth", RETROFIT_SIZE, &o.backprop_depth, "K", "recorded for train (8)"},
    {"dtype", RETROFIT_CHOICE, &o.dtype, "f32|bf16", "of the numbers written (f32)"},
    {"seed", RETROFIT_SIZE, &o.seed, "N", "of what is random (1)"},
    {"From scratch", RETROFIT_HEADING, NULL, NULL, NULL},
    {"random", RETROFIT_STRING, &o.random, "CONFIG.json", "a random model of this shape, plain or recurrent; or a directory with a config.json"},
    {"Token shards", RETROFIT_HEADING, NULL, NULL, NULL},
    {"tokenize", RETROFIT_FLAG, &o.tokenize, "FILE...", ".txt: the file is a document; .jsonl: each line has one"},
    {"tokenizer", RETROFIT_STRING, &o.tokenizer, "DIR", "where tokenizer.json is; with --random: to be carried along"},
    {"field", RETROFIT_STRING, &o.field, "NAME", "the member of a line that is the text (text)"},
};

static const char usage[] = "convert --from DIR|FILE.gguf --to DIR --preset NAME | --prelude LAYERS --core LAYERS --coda LAYERS [options]\n"
                            "convert --random CONFIG.json --to DIR [options]\n"
                            "convert --tokenize FILE... --tokenizer DIR --to OUT.bin [--field NAME]\n"
                            "Cuts a plain Llama into a recurrent model, makes a random one, or turns text into token shards.\n";

static char unfinished[RETROFIT_PATH]; // a file or directory under its temporary name, to be removed when something fails

// One line on stderr, whatever a file's names have in them; nothing half-written stays.
__attribute__((format(printf, 2, 3), noreturn)) static void die(int code, const char *format, ...) {
    char text[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    for (char *c = text; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 127) *c = '?';
    fprintf(stderr, "convert: %s\n", text);
    if (*unfinished) retrofit_directory_abandon(unfinished), unlink(unfinished);
    exit(code);
}

// ---- Choosing layers ----------------------------------------------------------------------------------------------------
enum { MOST_LAYERS = 4096 };
typedef struct {
    size_t at[MOST_LAYERS], count;
} layers;

static layers prelude, core, coda;

static const struct { const char *name; size_t layers; const char *prelude, *core, *coda; } presets[] = {
    {"tinyllama", 22, "0-3", "10-17", "18-21"}, {"llama3.2", 16, "0-3", "6-11", "12-15"},
    {"llama3.2-2-4-2", 16, "0-1", "10-13", "14-15"}, {"smollm2", 30, "0-3", "20-25", "26-29"}};

// "0-3", "2,5,8-9" in any order, or "none". No layer twice, none that the source lacks.
static void read_layers(const char *option, const char *text, layers *l, size_t available) {
    if (!strcmp(text, "none")) return;
    for (const char *p = text;; p++) {
        char *end = NULL;
        bool digit = *p >= '0' && *p <= '9';
        unsigned long long first = digit ? strtoull(p, &end, 10) : 0, last = first;
        if (digit && *end == '-' && end[1] >= '0' && end[1] <= '9') last = strtoull(end + 1, &end, 10);
        if (!digit || last < first || (*end && *end != ',')) die(2, "--%s '%s' is not a list of layers like 0-3, 2,5,8-9 or none", option, text);
        if (last >= available) die(2, "--%s %s: there is no layer %llu: the source has %zu, from 0", option, text, last, available);
        for (size_t i = (size_t)first; i <= last; i++) {
            for (size_t k = 0; k < l->count; k++)
                if (l->at[k] == i) die(2, "--%s %s: layer %zu is there twice", option, text, i);
            l->at[l->count++] = i;
        }
        if (!*(p = end)) return;
    }
}

static void print_layers(const layers *l) { // 0-3,5
    int width = l->count ? 0 : printf("none");
    for (size_t i = 0, to; i < l->count; i = to + 1) {
        for (to = i; to + 1 < l->count && l->at[to + 1] == l->at[to] + 1;) to++;
        width += printf(to > i ? "%s%zu-%zu" : "%s%zu", i ? "," : "", l->at[i], l->at[to]);
    }
    printf("%*s", width < 12 ? 12 - width : 1, "");
}

// ---- GGUF: llama.cpp's file format, versions 2 and 3, little endian ---------------------------------------------------------
//   header    "GGUF", u32 version, u64 number of tensors, u64 number of metadata entries
//   metadata  string key, u32 type, value; a string is u64 length and bytes, an array is u32 element type, u64 count and elements
//   tensors   string name, u32 number of dimensions, u64 each (the fastest first), u32 type, u64 offset
//   data      from the next multiple of general.alignment on; each tensor at its offset from there
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "numbers are taken from the file as they are: this needs a little-endian machine"
#endif

typedef struct {
    const char *text; // within the file, no NUL behind it
    size_t length;
} gguf_string;
#define SHOW(s) (int)retrofit_min((s).length, 80), (s).text // for %.*s

typedef struct {
    gguf_string key;
    uint32_t type, element; // of an array's elements; otherwise the same
    size_t count;
    const char *data;
} gguf_value;

typedef struct {
    char name[65];
    uint32_t type;
    size_t rows, cols, offset, bytes; // cols: the fastest dimension; rows: the product of the others
    const uint8_t *data;
    bool used;
} gguf_tensor;

enum { GGUF_U32 = 4, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING, GGUF_ARRAY };
enum { GGML_F32 = 0, GGML_F16 = 1, GGML_Q4_0 = 2, GGML_Q4_1 = 3, GGML_Q8_0 = 8, GGML_BF16 = 30, GGML_TYPES };
static const uint8_t ggml_blocks[GGML_TYPES][2] = { // values and bytes of a block, of the types that are read
    [GGML_F32] = {1, 4}, [GGML_F16] = {1, 2}, [GGML_BF16] = {1, 2}, [GGML_Q8_0] = {32, 34}, [GGML_Q4_0] = {32, 18}, [GGML_Q4_1] = {32, 20}};

static struct { // the one file that is read
    const char *path, *map;
    size_t size, at; // at: how far the header is read
    gguf_value *values;
    gguf_tensor *tensors;
    size_t value_count, tensor_count;
} g;

static bool gguf_is(gguf_string s, const char *text) { return s.length == strlen(text) && !memcmp(s.text, text, s.length); }

static const char *gguf_take(uint64_t n) {
    if (n > g.size - g.at) die(1, "%s: the header goes on past the file's end at byte %zu: cut off or damaged, fetch it again", g.path, g.at);
    g.at += (size_t)n;
    return g.map + g.at - n;
}

static uint64_t gguf_number(size_t size) {
    uint64_t n = 0;
    return memcpy(&n, gguf_take(size), size), n;
}

static gguf_string gguf_take_string(void) {
    uint64_t n = gguf_number(8);
    return (gguf_string){gguf_take(n), (size_t)n};
}

static void gguf_take_value(gguf_value *value) {
    static const uint8_t sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    uint64_t count = 1;
    value->key = gguf_take_string(), value->type = value->element = (uint32_t)gguf_number(4);
    if (value->type == GGUF_ARRAY) value->element = (uint32_t)gguf_number(4), count = gguf_number(8);
    if (value->element >= sizeof sizes || value->element == GGUF_ARRAY || count > g.size)
        die(1, "%s: metadata %.*s: %llu values of type %u: unknown, an array of arrays, or damaged", g.path, SHOW(value->key),
            (unsigned long long)count, value->element);
    value->data = g.map + g.at, value->count = (size_t)count;
    for (uint64_t i = 0; value->element == GGUF_STRING && i < count; i++) gguf_take_string();
    gguf_take(count * sizes[value->element]);
}

static void gguf_take_tensor(gguf_tensor *x) {
    gguf_string name = gguf_take_string();
    snprintf(x->name, sizeof x->name, "%.*s", SHOW(name)); // one that does not fit is none of a Llama's
    uint64_t dims = gguf_number(4), n = dims ? gguf_number(8) : 0;
    bool sound = dims <= 4 && n && n <= SIZE_MAX / 64;
    x->cols = (size_t)n, x->rows = 1;
    for (uint64_t i = 1; sound && i < dims; i++, x->rows *= (size_t)n) n = gguf_number(8), sound = n && n <= SIZE_MAX / 64 / x->cols / x->rows;
    if (!sound) die(1, "%s: tensor %s: its sizes make none or too many numbers: damaged, fetch it again", g.path, x->name);
    x->type = (uint32_t)gguf_number(4), x->offset = (size_t)gguf_number(8);
    const uint8_t *block = ggml_blocks[x->type < GGML_TYPES ? x->type : 4]; // 4 is none that is read
    if (!block[0]) die(1, "%s: tensor %s is of type %u; F32, F16, BF16, Q8_0, Q4_0 and Q4_1 are read: get such a file of this model", g.path, x->name, x->type);
    if (x->cols % block[0]) die(1, "%s: tensor %s: rows of %zu are no blocks of %u: damaged, fetch it again", g.path, x->name, x->cols, block[0]);
    x->bytes = x->rows * (x->cols / block[0]) * block[1];
}

static gguf_tensor *gguf_find(const char *name) {
    for (gguf_tensor *x = g.tensors; x < g.tensors + g.tensor_count; x++)
        if (!strcmp(x->name, name)) return x;
    return NULL;
}

// The metadata entry of this type (an array: of its elements). NULL if there is none and it is optional.
static const gguf_value *gguf_get(const char *key, uint32_t type, bool array, bool optional) {
    const gguf_value *value = g.values, *end = g.values + g.value_count;
    while (value < end && !gguf_is(value->key, key)) value++;
    if (value == end && !optional) die(1, "%s: metadata %s is missing: convert the model again with a newer llama.cpp", g.path, key);
    if (value == end) return NULL;
    if (value->element != type || (value->type == GGUF_ARRAY) != array) die(1, "%s: metadata %s has another type than %u", g.path, key, type);
    return value;
}

#define NEEDED UINT32_C(0xfffffffe) // instead of a value for entries that are not there
static uint32_t gguf_u32(const char *key, uint32_t otherwise) {
    const gguf_value *value = gguf_get(key, GGUF_U32, false, otherwise != NEEDED);
    return value ? memcpy(&otherwise, value->data, 4), otherwise : otherwise;
}

static float gguf_f32(const char *key, float otherwise) { // 0: needed
    const gguf_value *value = gguf_get(key, GGUF_F32, false, otherwise > 0);
    return value ? memcpy(&otherwise, value->data, 4), otherwise : otherwise;
}

static bool gguf_bool(const char *key, bool otherwise) {
    const gguf_value *value = gguf_get(key, GGUF_BOOL, false, true);
    return value ? *value->data != 0 : otherwise;
}

static gguf_string gguf_text(const char **data) { // the string there, whose length was checked at the opening; then *data is behind it
    uint64_t n;
    memcpy(&n, *data, 8);
    gguf_string s = {*data + 8, (size_t)n};
    return *data += 8 + n, s;
}

static gguf_string gguf_string_of(const char *key, bool optional) {
    const gguf_value *value = gguf_get(key, GGUF_STRING, false, optional);
    return value ? gguf_text(&(const char *){value->data}) : (gguf_string){"", 0};
}

static gguf_string *gguf_strings(const char *key, size_t *count) { // to be freed
    const gguf_value *value = gguf_get(key, GGUF_STRING, true, false);
    gguf_string *s = (gguf_string *)retrofit_allocate(*count = value->count, sizeof *s);
    if (!s) die(1, "%s", retrofit_error());
    const char *data = value->data;
    for (size_t i = 0; i < *count; i++) s[i] = gguf_text(&data);
    return s;
}

static void gguf_open(const char *path) {
    g.path = path;
    if (!(g.map = (const char *)retrofit_map_file(path, &g.size))) die(1, "%s", retrofit_error());
    if (memcmp(gguf_take(4), "GGUF", 4)) die(1, "%s: does not start with GGUF, so it is no GGUF file", path);
    uint64_t version = gguf_number(4), tensors = gguf_number(8), values = gguf_number(8);
    if (version != 2 && version != 3) die(1, "%s: GGUF version %u%s, not 2 or 3", path, (unsigned)version, version & 0xffff ? "" : " (big endian)");
    if (tensors > g.size / 16 || values > g.size / 12) die(1, "%s: it promises more than it has room for: cut off or damaged, fetch it again", path);
    g.values = (gguf_value *)retrofit_allocate((size_t)values, sizeof *g.values), g.tensors = (gguf_tensor *)retrofit_allocate((size_t)tensors, sizeof *g.tensors);
    if (!g.values || !g.tensors) die(1, "%s", retrofit_error());
    while (g.value_count < values) gguf_take_value(&g.values[g.value_count++]);
    while (g.tensor_count < tensors) gguf_take_tensor(&g.tensors[g.tensor_count++]);
    uint32_t alignment = gguf_u32("general.alignment", 32);
    if (!alignment || alignment & (alignment - 1)) die(1, "%s: general.alignment %u is no power of two", path, alignment);
    size_t start = g.at + (alignment - g.at % alignment) % alignment, room = start < g.size ? g.size - start : 0;
    for (gguf_tensor *x = g.tensors; x < g.tensors + tensors; x++) {
        if (x->offset % alignment || x->offset > room || x->bytes > room - x->offset)
            die(1, "%s: tensor %s: %zu bytes at offset %zu are unaligned or past the file's end: cut off or damaged, fetch it again", path, x->name,
                x->bytes, x->offset);
        x->data = (const uint8_t *)g.map + start + x->offset;
    }
}

static float gguf_half(const uint8_t *p) { return retrofit_f16_to_float((uint16_t)(p[0] | p[1] << 8)); }

// All numbers into out. Block types: a scale (and for Q4_1 a minimum) per 32 values; a byte of 4-bit ones holds values i and i + 16.
static void gguf_dequantize(const gguf_tensor *x, float *out) {
    size_t block = ggml_blocks[x->type][0], bytes = ggml_blocks[x->type][1], n = x->rows * x->cols;
    const uint8_t *p = x->data;
    for (size_t i = 0; i < n; i += block, p += bytes) {
        float *to = out + i, scale = block > 1 ? gguf_half(p) : 0, low = x->type == GGML_Q4_1 ? gguf_half(p + 2) : -8 * scale;
        const uint8_t *q = p + bytes - 16; // of the 4-bit types
        if (x->type == GGML_F32) memcpy(to, p, 4);
        else if (x->type == GGML_BF16) *to = retrofit_bf16_to_float((uint16_t)(p[0] | p[1] << 8));
        else if (x->type == GGML_F16) *to = gguf_half(p);
        else if (x->type == GGML_Q8_0)
            for (int j = 0; j < 32; j++) to[j] = scale * (float)(int8_t)p[2 + j];
        else
            for (int j = 0; j < 16; j++) to[j] = scale * (float)(q[j] & 15) + low, to[j + 16] = scale * (float)(q[j] >> 4) + low;
    }
    for (size_t i = 0; i < n; i++)
        if (!isfinite(out[i])) die(1, "%s: tensor %s: number %zu is not finite: damaged, fetch it again", g.path, x->name, i);
}

// llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head: its converter interleaves the rows. Back, in place.
static void gguf_unpermute(float *w, size_t head, size_t heads, size_t cols) {
    float *old = (float *)retrofit_allocate(head * cols, sizeof *old);
    if (!old) die(1, "%s", retrofit_error());
    for (float *h = w; h < w + heads * head * cols; h += head * cols) {
        memcpy(old, h, head * cols * sizeof *old);
        for (size_t i = 0; i < head; i++) memcpy(h + (i % 2 * (head / 2) + i / 2) * cols, old + i * cols, cols * sizeof *old);
    }
    free(old);
}

// Llama 3.x: rope_freqs.weight divides each frequency: by 1 for short wavelengths, by a factor for long ones (the last is the longest),
// smoothly in between.
static void gguf_read_rope(retrofit_config *c) {
    gguf_tensor *x = gguf_find("rope_freqs.weight");
    if (!x) return;
    float *values = (float *)retrofit_allocate(x->rows * x->cols, sizeof *values);
    if (!values) die(1, "%s", retrofit_error());
    gguf_dequantize(x, values);
    c->rope_llama3 = x->used = true, c->rope_factor = (double)values[x->cols - 1], c->rope_low = 1, c->rope_high = 4, c->rope_original_context = 8192;
    bool match = x->rows == 1 && x->cols == c->head_dim / 2 && c->rope_factor >= 1;
    for (size_t i = 0; match && i < x->cols; i++) {
        double turns = c->rope_original_context * pow(c->rope_theta, -2.0 * (double)i / (double)c->head_dim) / (2 * 3.14159265358979323846);
        double keep = fmin(fmax((turns - c->rope_low) / (c->rope_high - c->rope_low), 0), 1);
        match = fabs((double)values[i] * ((1 - keep) / c->rope_factor + keep) - 1) < 1e-4;
    }
    free(values);
    if (!match) die(1, "%s: rope_freqs.weight is not Llama 3's scaling (low 1, high 4, original context 8192): not supported", g.path);
}

static void gguf_read_config(retrofit_config *c) {
    gguf_string architecture = gguf_string_of("general.architecture", false), scaling = gguf_string_of("llama.rope.scaling.type", true);
    if (!gguf_is(architecture, "llama")) die(1, "%s: the architecture is %.*s; only llama is read", g.path, SHOW(architecture));
    if (scaling.length && !gguf_is(scaling, "none")) die(1, "%s: llama.rope.scaling.type is set: only Llama 3's rope_freqs.weight is supported", g.path);
    if (gguf_u32("llama.expert_count", 0)) die(1, "%s: a mixture of experts: only dense Llamas are supported", g.path);
    memset(c, 0, sizeof *c);
    c->n_embd = gguf_u32("llama.embedding_length", NEEDED), c->n_heads = gguf_u32("llama.attention.head_count", NEEDED);
    c->n_kv_heads = gguf_u32("llama.attention.head_count_kv", (uint32_t)c->n_heads), c->coda = gguf_u32("llama.block_count", NEEDED);
    c->intermediate = gguf_u32("llama.feed_forward_length", NEEDED), c->context = gguf_u32("llama.context_length", NEEDED);
    uint32_t head = c->n_heads ? (uint32_t)(c->n_embd / c->n_heads) : 0;
    c->head_dim = gguf_u32("llama.attention.key_length", head);
    if (gguf_u32("llama.attention.value_length", head) != c->head_dim || gguf_u32("llama.rope.dimension_count", head) != c->head_dim)
        die(1, "%s: heads whose keys, values and rotated parts differ in size are not supported", g.path);
    c->norm_eps = gguf_f32("llama.attention.layer_norm_rms_epsilon", 0), c->rope_theta = (double)gguf_f32("llama.rope.freq_base", 10000);
    c->bos = (int32_t)gguf_u32("tokenizer.ggml.bos_token_id", UINT32_MAX), c->eos = (int32_t)gguf_u32("tokenizer.ggml.eos_token_id", UINT32_MAX);
    c->state_std = (float)RETROFIT_STATE_STD, c->mean_recurrence = c->backprop_depth = 1;
    const gguf_tensor *embedding = gguf_find("token_embd.weight");
    c->vocab = embedding ? embedding->rows : 0;
    if (!retrofit_config_check(c, g.path)) die(1, "%s", retrofit_error());
    gguf_read_rope(c);
}

// The tensor for piece j of the parameter i of the list: embedding, six for each layer, final norm, head.
static gguf_tensor *gguf_piece(const retrofit_config *c, size_t i, size_t j) {
    static const char *const names[6][3] = {{"attn_norm"}, {"attn_q", "attn_k", "attn_v"}, {"attn_output"}, {"ffn_norm"}, {"ffn_gate", "ffn_up"}, {"ffn_down"}};
    char name[65] = "token_embd.weight"; // a tied model's head, too
    if (i == 6 * c->coda + 1) strcpy(name, "output_norm.weight");
    else if (i > 6 * c->coda && gguf_find("output.weight")) strcpy(name, "output.weight");
    else if (i > 0 && i <= 6 * c->coda) snprintf(name, sizeof name, "blk.%zu.%s.weight", (i - 1) / 6, names[(i - 1) % 6][j]);
    gguf_tensor *x = gguf_find(name);
    if (!x) die(1, "%s: tensor %s is missing: damaged, or one part of a split model", g.path, name);
    return x->used = true, x;
}

static retrofit_model *gguf_load(const char *path) {
    retrofit_config c;
    gguf_open(path), gguf_read_config(&c);
    retrofit_model *m = retrofit_model_new(&c, &retrofit_cpu);
    if (!m || !retrofit_model_allocate(m, RETROFIT_INFERENCE)) die(1, "%s", retrofit_error());
    for (size_t i = 0; i < m->parameter_count; i++) {
        const retrofit_parameter *p = m->parameters[i];
        float *to = p->master;
        for (size_t j = 0; j < p->sources; to += p->source[j++].rows * p->cols) {
            const gguf_tensor *x = gguf_piece(&c, i, j);
            if (x->rows != p->source[j].rows || x->cols != p->cols)
                die(1, "%s: tensor %s is %zu x %zu, the metadata ask for %zu x %zu", path, x->name, x->rows, x->cols, p->source[j].rows, p->cols);
            gguf_dequantize(x, to);
            if (p->sources == 3 && j < 2) gguf_unpermute(to, c.head_dim, j ? c.n_kv_heads : c.n_heads, p->cols); // q and k
        }
    }
    for (const gguf_tensor *x = g.tensors; x < g.tensors + g.tensor_count; x++)
        if (!x->used) die(1, "%s: tensor %s has no place in a Llama of these metadata (biases, say, are not supported)", path, x->name);
    return m;
}

// ---- The GGUF's tokenizer, as the files Hugging Face has beside the weights --------------------------------------------------
enum { TOKEN_UNKNOWN = 2, TOKEN_CONTROL = 3, TOKEN_USER = 4, TOKEN_BYTE = 6, LONGEST_TOKEN = 1024 };
static const char *const roles[4][2] = { // in the metadata, in tokenizer_config.json
    {"tokenizer.ggml.bos_token_id", "bos_token"}, {"tokenizer.ggml.eos_token_id", "eos_token"},
    {"tokenizer.ggml.unknown_token_id", "unk_token"}, {"tokenizer.ggml.padding_token_id", "pad_token"}};

static struct {
    gguf_string *tokens, *merges;                          // merges: "left right"; SentencePiece has none
    const char *types, *scores;                            // int32, float; unaligned
    size_t count, merge_count;
    uint32_t ids[4];                                       // as roles; UINT32_MAX: none
    bool sentencepiece, smollm, llama3, add[2], add_space; // add: the first two of ids, before and behind each text
} v;

static void read_vocabulary(void) {
    gguf_string model = gguf_string_of("tokenizer.ggml.model", false);
    v.sentencepiece = gguf_is(model, "llama");
    if (!v.sentencepiece && !gguf_is(model, "gpt2")) die(1, "%s: tokenizer.ggml.model is %.*s; only gpt2 and llama are read", g.path, SHOW(model));
    v.tokens = gguf_strings("tokenizer.ggml.tokens", &v.count);
    const gguf_value *types = gguf_get("tokenizer.ggml.token_type", GGUF_I32, true, false);
    const gguf_value *scores = v.sentencepiece ? gguf_get("tokenizer.ggml.scores", GGUF_F32, true, false) : types;
    if (types->count != v.count || scores->count != v.count || v.count > gguf_find("token_embd.weight")->rows)
        die(1, "%s: %zu tokens, but another number of token types or scores, or fewer embeddings: damaged, fetch it again", g.path, v.count);
    v.types = types->data, v.scores = scores->data;
    if (!v.sentencepiece) {
        gguf_string pre = gguf_string_of("tokenizer.ggml.pre", false);
        v.merges = gguf_strings("tokenizer.ggml.merges", &v.merge_count);
        v.smollm = gguf_is(pre, "smollm"), v.llama3 = gguf_is(pre, "llama-bpe") || gguf_is(pre, "llama3");
        if (!v.smollm && !v.llama3 && !gguf_is(pre, "default") && !gguf_is(pre, "gpt-2"))
            die(1, "%s: tokenizer.ggml.pre is %.*s; known: smollm, llama-bpe, gpt-2, default", g.path, SHOW(pre));
    }
    // what llama.cpp takes where nothing is said
    v.add[0] = gguf_bool("tokenizer.ggml.add_bos_token", v.sentencepiece || v.llama3), v.add[1] = gguf_bool("tokenizer.ggml.add_eos_token", false);
    v.add_space = gguf_bool("tokenizer.ggml.add_space_prefix", v.sentencepiece);
    for (int i = 0; i < 4; i++) {
        v.ids[i] = gguf_u32(roles[i][0], i < 2 && v.add[i] ? NEEDED : UINT32_MAX);
        if (v.ids[i] != UINT32_MAX && v.ids[i] >= v.count) die(1, "%s: %s is %u of %zu tokens", g.path, roles[i][0], v.ids[i], v.count);
    }
}

// printf with " for each ' of the format, a literal shorter than 400, so that JSON can be read here.
__attribute__((format(printf, 2, 3))) static void json(FILE *f, const char *format, ...) {
    char text[400] = {0};
    va_list args;
    for (size_t i = 0; format[i] && i < sizeof text - 1; i++) text[i] = format[i] == '\'' ? '"' : format[i];
    va_start(args, format), vfprintf(f, text, args), va_end(args);
}

typedef struct {
    double order[4]; // the greater first
    gguf_string token;
    size_t left; // bytes of the left part
} split;

static int by_order(const void *a, const void *b) {
    const double *x = ((const split *)a)->order, *y = ((const split *)b)->order;
    int i = 0;
    while (i < 3 && x[i] == y[i]) i++;
    return (x[i] < y[i]) - (x[i] > y[i]);
}

// SentencePiece's merges follow from the scores. As Hugging Face's converter has them: each split of a token into two tokens, the best
// score first, then the longer left and right part in characters, then the smaller token. t knows the tokens.
static void derive_merges(FILE *f, const retrofit_tokenizer *t) {
    size_t count = 0, room = 0;
    split *splits = NULL;
    for (size_t i = 0; i < v.count; i++) {
        gguf_string s = v.tokens[i];
        float score;
        int32_t type;
        memcpy(&score, v.scores + 4 * i, 4), memcpy(&type, v.types + 4 * i, 4);
        if (!isfinite(score) || s.length > LONGEST_TOKEN) die(1, "%s: token %zu is too long, or its score not finite: damaged, fetch it again", g.path, i);
        if (type == TOKEN_UNKNOWN || type == TOKEN_CONTROL || type == TOKEN_BYTE) continue;
        split m = {{(double)score, 0, 0, -(double)i}, s, 1};
        for (size_t k = 0; k < s.length; k++) m.order[2] += (s.text[k] & 0xc0) != 0x80;
        for (; m.left < s.length; m.left++) {
            if ((s.text[m.left - 1] & 0xc0) != 0x80) m.order[1]++, m.order[2]--;
            char left[LONGEST_TOKEN + 1] = "", right[LONGEST_TOKEN + 1] = "";
            memcpy(left, s.text, m.left), memcpy(right, s.text + m.left, s.length - m.left);
            if (retrofit_tokenizer_id(t, left) < 0 || retrofit_tokenizer_id(t, right) < 0) continue;
            if (count == room && !(splits = realloc(splits, (room = 2 * room + 1024) * sizeof m))) die(1, "out of memory");
            splits[count++] = m;
        }
    }
    if (count) qsort(splits, count, sizeof *splits, by_order);
    for (size_t i = 0; i < count; i++) {
        split m = splits[i];
        json(f, i ? ",\n      [" : "\n      ["), retrofit_json_write_string(f, m.token.text, m.left);
        json(f, ", "), retrofit_json_write_string(f, m.token.text + m.left, m.token.length - m.left), json(f, "]");
    }
    free(splits);
}

static void print_token(FILE *f, size_t id) { retrofit_json_write_string(f, v.tokens[id].text, v.tokens[id].length); }

static void print_template(FILE *f) { // BOS, the text, EOS: whichever are to be added
    json(f, "{'type': 'TemplateProcessing', 'single': [");
    if (v.add[0]) json(f, "{'SpecialToken': {'id': "), print_token(f, v.ids[0]), json(f, ", 'type_id': 0}}, ");
    json(f, "{'Sequence': {'id': 'A', 'type_id': 0}}");
    if (v.add[1]) json(f, ", {'SpecialToken': {'id': "), print_token(f, v.ids[1]), json(f, ", 'type_id': 0}}");
    json(f, "], 'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 1}}], 'special_tokens': {");
    for (int i = 0; i < 2; i++) {
        if (!v.add[i] || (i && v.add[0] && v.ids[0] == v.ids[1])) continue;
        json(f, i && v.add[0] ? ", " : ""), print_token(f, v.ids[i]), json(f, ": {'id': "), print_token(f, v.ids[i]);
        json(f, ", 'ids': [%u], 'tokens': [", v.ids[i]), print_token(f, v.ids[i]), json(f, "]}");
    }
    json(f, "}}");
}

static void print_tokenizer(FILE *f, const retrofit_tokenizer *known) {
    bool spm = v.sentencepiece, bytes = false;
    const char *comma = "\n";
    json(f, "{\n  'version': '1.0',\n  'truncation': null,\n  'padding': null,\n  'added_tokens': [");
    for (size_t i = 0; i < v.count; i++) {
        int32_t type;
        memcpy(&type, v.types + 4 * i, 4), bytes |= type == TOKEN_BYTE;
        if (type != TOKEN_UNKNOWN && type != TOKEN_CONTROL && type != TOKEN_USER) continue;
        json(f, "%s    {'id': %zu, 'content': ", comma, i), print_token(f, i), comma = ",\n";
        json(f, ", 'single_word': false, 'lstrip': false, 'rstrip': false, 'normalized': false, 'special': %s}", type == TOKEN_USER ? "false" : "true");
    }
    json(f, "\n  ],\n  'normalizer': %s", spm ? "" : "null"); // ▁ is SentencePiece's space
    if (spm) json(f, "{'type': 'Sequence', 'normalizers': [");
    if (spm && v.add_space) json(f, "{'type': 'Prepend', 'prepend': '▁'}, ");
    if (spm) json(f, "{'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}]}");
    json(f, ",\n  'pre_tokenizer': %s", spm ? "null" : "");
    if (v.smollm) json(f, "{'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': true}, ");
    if (v.llama3)
        json(f, "{'type': 'Sequence', 'pretokenizers': [{'type': 'Split', 'behavior': 'Isolated', 'invert': false, 'pattern': {'Regex': '%s'}}, ",
             "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}{1,3}| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|"
             "\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+");
    if (!spm) json(f, "{'type': 'ByteLevel', 'add_prefix_space': false, 'trim_offsets': true, 'use_regex': %s}", v.llama3 ? "false" : "true");
    json(f, "%s,\n  'post_processor': ", v.smollm || v.llama3 ? "]}" : "");
    if (v.add[0] || v.add[1]) print_template(f);
    else json(f, "null");
    json(f, ",\n  'decoder': ");
    json(f, spm ? "{'type': 'Sequence', 'decoders': [{'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '}, {'type': 'ByteFallback'}, {'type': 'Fuse'}"
                : "{'type': 'ByteLevel', 'add_prefix_space': true, 'trim_offsets': true, 'use_regex': true}");
    if (spm) json(f, v.add_space ? ", {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}]}" : "]}");
    json(f, ",\n  'model': {\n    'type': 'BPE',\n    'dropout': null,\n    'unk_token': ");
    if (spm && v.ids[2] != UINT32_MAX) print_token(f, v.ids[2]);
    else json(f, "null");
    json(f, ",\n    'continuing_subword_prefix': null,\n    'end_of_word_suffix': null,\n    'fuse_unk': %s,\n", spm ? "true" : "false");
    json(f, "    'byte_fallback': %s,\n    'ignore_merges': %s,\n    'vocab': {", bytes ? "true" : "false", v.llama3 ? "true" : "false");
    for (size_t i = 0; i < v.count; i++) json(f, i ? ",\n      " : "\n      "), print_token(f, i), json(f, ": %zu", i);
    json(f, "\n    },\n    'merges': [");
    for (size_t i = 0; i < v.merge_count; i++) json(f, i ? ",\n      " : "\n      "), retrofit_json_write_string(f, v.merges[i].text, v.merges[i].length);
    if (known) derive_merges(f, known);
    json(f, "\n    ]\n  }\n}\n");
}

static void print_tokenizer_config(FILE *f) {
    gguf_string chat = gguf_string_of("tokenizer.chat_template", true);
    json(f, "{\n  'tokenizer_class': 'PreTrainedTokenizerFast',\n  'clean_up_tokenization_spaces': false,\n");
    for (int i = 0; i < 4; i++)
        if (v.ids[i] != UINT32_MAX) json(f, "  '%s': ", roles[i][1]), print_token(f, v.ids[i]), json(f, ",\n");
    if (chat.length) json(f, "  'chat_template': "), retrofit_json_write_string(f, chat.text, chat.length), json(f, ",\n");
    json(f, "  'add_bos_token': %s,\n  'add_eos_token': %s\n}\n", v.add[0] ? "true" : "false", v.add[1] ? "true" : "false");
}

static void write_tokenizer(void) {
    retrofit_tokenizer *made = NULL; // what the reader makes of it: it finds whatever else is wrong with the vocabulary
    read_vocabulary();
    for (int pass = 0; pass <= (v.sentencepiece ? 2 : 1); pass++) { // tokenizer_config.json, tokenizer.json, and again with merges
        char path[RETROFIT_PATH];
        FILE *f = retrofit_path(path, unfinished, pass ? "tokenizer.json" : "tokenizer_config.json") ? fopen(path, "wb") : NULL;
        if (!f) die(1, "%s: %s", path, strerror(errno));
        if (pass) print_tokenizer(f, made);
        else print_tokenizer_config(f);
        if (!retrofit_finish_file(f, path, true)) die(1, "%s", retrofit_error());
        retrofit_tokenizer_free(made), made = NULL;
        if (pass && !(made = retrofit_tokenizer_load(unfinished))) die(1, "%s: its tokenizer makes no sense: %s", g.path, retrofit_error());
    }
    retrofit_tokenizer_free(made), free(v.tokens), free(v.merges);
}

// ---- Models -------------------------------------------------------------------------------------------------------------
// The numbers of a parameter from `at` on, n of them, as fp32; rounded to bf16 and back if asked for.
static void numbers(float *out, const retrofit_parameter *p, size_t at, size_t n, bool rounded) {
    retrofit_to_float(out, (const char *)p->weight.data + at * retrofit_type_size(p->weight.type), p->weight.type, n);
    for (size_t i = 0; rounded && i < n; i++) out[i] = retrofit_bf16_to_float(retrofit_float_to_bf16(out[i]));
}

// Reads back what was written and compares it, bit for bit, with where it came from: origin[i] is the source of the i-th parameter.
static void verify(const retrofit_parameter *const *origin, size_t count, size_t *bytes) {
    enum { CHUNK = 1 << 16 };
    static float a[CHUNK], b[CHUNK];
    retrofit_model *written = retrofit_load(unfinished, &retrofit_cpu, RETROFIT_INFERENCE);
    if (!written || written->parameter_count != count) die(1, "reading back what was written: %s", written ? "not all of it is there" : retrofit_error());
    for (size_t i = 0; i < count; i++) {
        const retrofit_parameter *p = written->parameters[i];
        if (p->rows != origin[i]->rows || p->cols != origin[i]->cols) die(1, "%s: written in another shape than its source's", p->source[0].name);
        for (size_t at = 0, n; at < p->rows * p->cols; at += n) {
            n = retrofit_min(p->rows * p->cols - at, CHUNK);
            numbers(a, p, at, n, false), numbers(b, origin[i], at, n, o.dtype == 1);
            if (memcmp(a, b, n * sizeof *a)) die(1, "%s: what was written reads back as something else: is the disk sound?", p->source[0].name);
        }
    }
    *bytes = written->maps[0].bytes;
    retrofit_free(written);
}

static void print_parts(const retrofit_model *m, size_t bytes) {
    static const char *const names[] = {"embedding", "prelude", "adapter", "core", "coda", "final norm", "head"};
    const layers *const lists[RETROFIT_PARTS] = {NULL, &prelude, NULL, &core, &coda, NULL, NULL};
    size_t in[RETROFIT_PARTS] = {0};
    for (size_t i = 0; i < m->parameter_count; i++) in[m->parameters[i]->part] += m->parameters[i]->rows * m->parameters[i]->cols;
    printf("%-12s%-12s%16s\n", "part", core.count ? "layers" : "", "parameters");
    for (int i = 0; i < RETROFIT_PARTS; i++) {
        if (!in[i]) continue;
        printf("%-12s", i == RETROFIT_PART_CODA && retrofit_is_plain(&m->config) ? "layers" : names[i]);
        if (core.count && lists[i]) print_layers(lists[i]);
        else printf("%-12s", core.count && i == RETROFIT_PART_ADAPTER ? (o.adapter == 1 ? "[0 | I]" : "random") : "");
        printf("%16zu\n", in[i]);
    }
    printf("%-24s%16zu\n\n%s: %zu bytes of %s, read back and compared\n", "all", m->weight_count, o.to, bytes, o.dtype == 1 ? "bf16" : "f32");
    printf("next: train --model %s --data 'SHARDS*.bin' --out RUN --steps N\n", o.to);
}

static void write_model(const retrofit_model *m, const retrofit_parameter *const *origin, const char *tokenizer) {
    size_t bytes = 0;
    char *directory = retrofit_directory_begin(o.to);
    if (!directory) die(1, "%s", retrofit_error());
    snprintf(unfinished, sizeof unfinished, "%s", directory), free(directory);
    if (!retrofit_save(m, unfinished, o.dtype == 1 ? RETROFIT_BF16 : RETROFIT_F32, tokenizer)) die(1, "%s", retrofit_error());
    if (g.map) write_tokenizer();
    verify(origin, m->parameter_count, &bytes);
    if (!retrofit_directory_commit(unfinished, o.to)) die(1, "%s", retrofit_error());
    *unfinished = 0;
    print_parts(m, bytes);
}

// The parameters of the chosen layers, in the order of the new model's list. In a plain model's list the embedding comes first, then
// six for each layer, then final norm and head.
static size_t choose(const retrofit_parameter **origin, size_t n, const retrofit_model *source, const layers *l) {
    for (size_t i = 0; i < l->count; i++)
        for (size_t j = 0; j < 6; j++) origin[n++] = source->parameters[1 + 6 * l->at[i] + j];
    return n;
}

// A is (d, 2d) = [A_s | A_e], the left half for the state. As PyTorch makes a Linear, or so that core(e) is what comes out at first.
static float *new_adapter(size_t d) {
    float *a = (float *)retrofit_allocate(2 * d * d, sizeof *a), bound = (float)(1 / sqrt(2 * (double)d));
    if (!a) die(1, "%s", retrofit_error());
    for (size_t i = 0; i < d; i++)
        for (size_t j = 0; j < 2 * d; j++)
            a[i * 2 * d + j] = o.adapter == 1 ? (float)(j == d + i) : bound * (float)(2 * retrofit_hash_uniform(o.seed, i * 2 * d + j) - 1);
    return a;
}

static void print_dropped(const retrofit_model *source) {
    static layers dropped;
    const layers *used[] = {&prelude, &core, &coda};
    for (size_t i = 0; i < source->config.coda; i++) {
        size_t uses = 0;
        for (size_t j = 0; j < 3; j++)
            for (size_t k = 0; k < used[j]->count; k++) uses += used[j]->at[k] == i;
        if (uses > 1) fprintf(stderr, "convert: note: layer %zu is copied to %zu places\n", i, uses);
        if (uses == 0) dropped.at[dropped.count++] = i;
    }
    printf("%-12s", "dropped"), print_layers(&dropped);
    size_t layer = (source->weight_count - 2 * source->config.vocab * source->config.n_embd - source->config.n_embd) / source->config.coda;
    printf("%16zu\n\n", dropped.count * layer);
}

static void surgery(retrofit_model *source, const char *tokenizer) {
    retrofit_config c = source->config;
    size_t available = c.coda, n = 0;
    if (!retrofit_is_plain(&c)) die(1, "%s is recurrent already: surgery starts from a plain Llama", o.from);
    if (o.preset >= 0) {
        if (presets[o.preset].layers != available)
            die(2, "--preset %s is for a model of %zu layers, this one has %zu", presets[o.preset].name, presets[o.preset].layers, available);
        o.prelude = presets[o.preset].prelude, o.core = presets[o.preset].core, o.coda = presets[o.preset].coda;
    }
    read_layers("prelude", o.prelude, &prelude, available);
    read_layers("core", o.core, &core, available), read_layers("coda", o.coda, &coda, available);
    if (!core.count) die(2, "--core none: there must be a layer to repeat");
    c.prelude = prelude.count, c.core = core.count, c.coda = coda.count;
    c.mean_recurrence = o.mean_recurrence, c.backprop_depth = o.backprop_depth;
    c.state_std = (float)RETROFIT_STATE_STD, c.tied = false;
    retrofit_model *m = retrofit_model_new(&c, &retrofit_cpu);
    const retrofit_parameter **origin = m ? (const retrofit_parameter **)retrofit_allocate(m->parameter_count, sizeof *origin) : NULL;
    if (!origin) die(1, "%s", retrofit_error());
    float *adapter = new_adapter(c.n_embd);
    m->adapter.weight.data = adapter;
    origin[n++] = &source->wte, n = choose(origin, n, source, &prelude);
    origin[n++] = &m->adapter, n = choose(origin, n, source, &core), n = choose(origin, n, source, &coda);
    origin[n++] = &source->ln_f, origin[n++] = &source->lm_head;
    for (size_t i = 0; i < n; i++) m->parameters[i]->weight = origin[i]->weight; // this is the surgery
    print_dropped(source);
    write_model(m, origin, tokenizer);
    free(adapter), free(origin), retrofit_free(m);
}

static void rewrite(retrofit_model *m, const char *tokenizer) {
    m->config.tied = false;
    printf("no layers chosen: the model is only rewritten\n\n");
    write_model(m, (const retrofit_parameter *const *)m->parameters, tokenizer);
}

static void convert(void) {
    char path[RETROFIT_PATH];
    struct stat st;
    bool file = !stat(o.from, &st) && S_ISREG(st.st_mode);
    retrofit_model *source = file ? gguf_load(o.from) : retrofit_load(o.from, &retrofit_cpu, RETROFIT_INFERENCE);
    if (!source) die(1, "%s", retrofit_error());
    const char *tokenizer = file ? NULL : retrofit_model_directory(o.from, path);
    if (o.core || o.preset >= 0) surgery(source, tokenizer);
    else rewrite(source, tokenizer);
    retrofit_free(source);
    if (file) munmap((void *)(uintptr_t)g.map, g.size), free(g.values), free(g.tensors);
}

// ---- From scratch: Takase's rule, as Huginn's -------------------------------------------------------------------------------
static void read_config(retrofit_config *c) {
    struct stat st;
    size_t size;
    char path[RETROFIT_PATH];
    bool directory = !stat(o.random, &st) && S_ISDIR(st.st_mode);
    if (directory && !retrofit_path(path, o.random, "config.json")) die(1, "%s", retrofit_error());
    const char *file = directory ? path : o.random;
    char *text = retrofit_read_file(file, &size);
    retrofit_json *j = text ? retrofit_json_parse(text, size, file) : NULL;
    if (!j || !config_parse(c, j, file)) die(1, "%s", retrofit_error());
    retrofit_json_free(j), free(text);
}

static void make_random(void) {
    retrofit_config c;
    read_config(&c);
    c.tied = false;
    if (retrofit_is_plain(&c) && (o.mean_recurrence != SIZE_MAX || o.backprop_depth != SIZE_MAX))
        die(2, "%s is a plain model: it takes no --mean-recurrence and --backprop-depth", o.random);
    if (o.mean_recurrence != SIZE_MAX) c.mean_recurrence = o.mean_recurrence;
    if (o.backprop_depth != SIZE_MAX) c.backprop_depth = o.backprop_depth;
    retrofit_model *m = retrofit_model_new(&c, &retrofit_cpu);
    if (!m || !retrofit_model_allocate(m, RETROFIT_INFERENCE)) die(1, "%s", retrofit_error());
    double sigma = sqrt(2 / (5 * (double)c.n_embd)), depth = (double)(c.prelude + c.core * c.mean_recurrence + c.coda);
    for (size_t i = 0; i < m->parameter_count; i++) {
        const retrofit_parameter *p = m->parameters[i];
        const char *name = p->source[0].name;
        bool residual = strstr(name, "attn.proj.") || strstr(name, "mlp.proj.") || strstr(name, "o_proj.") || strstr(name, "down_proj.");
        float std = (float)(residual ? sigma / sqrt(2 * depth) : sigma); // what writes to the residual stream starts smaller
        uint64_t key = retrofit_hash(o.seed, i);
        PARALLEL_FOR(p->rows * p->cols)
        for (size_t j = 0; j < p->rows * p->cols; j++) p->master[j] = p->kind == RETROFIT_NORM ? 1 : std * retrofit_hash_normal(key, j);
    }
    write_model(m, (const retrofit_parameter *const *)m->parameters, o.tokenizer);
    retrofit_free(m);
}

// ---- Token shards -----------------------------------------------------------------------------------------------------------
typedef struct {
    char *raw, *error;   // what was read; what was wrong with it, if anything
    size_t size, line;   // of raw; line: 0 for a whole file
    size_t bytes, count; // of the stripped text; ids
    int32_t *ids;
} document;

static struct {
    FILE *f;
    retrofit_tokenizer *tokenizer;
    int32_t eos; // to be put behind each document; -1 if the tokenizer does so itself
    bool narrow; // uint16
    size_t documents, empty, tokens, bytes; // so far
    size_t read, total;                     // bytes of the files
    double began, shown;
} t;

static bool ends_with(const char *s, const char *end) {
    size_t n = strlen(s), m = strlen(end);
    return n > m && !strcmp(s + n - m, end);
}

// The ids of a document, with what the tokenizer adds and EOS. Runs in several threads at a time.
static bool encode_document(document *d, const char *path) {
    const char *text = d->raw;
    size_t size = d->size;
    retrofit_json *j = NULL;
    retrofit_strip(&text, &size);
    if (d->line && size) {
        char where[RETROFIT_PATH + 32];
        snprintf(where, sizeof where, "%s: line %zu", path, d->line);
        if (!(j = retrofit_json_parse(text, size, where))) return false;
        const retrofit_json *member = retrofit_json_get(j, o.field);
        bool ok = member && member->type == RETROFIT_JSON_STRING;
        if (!ok) return retrofit_json_free(j), retrofit_fail("%s: no string \"%s\" in it: name another with --field", where, o.field);
        text = member->string, size = member->length;
        retrofit_strip(&text, &size);
    }
    d->bytes = size;
    if (size) d->ids = retrofit_encode(t.tokenizer, text, size, true, &d->count);
    retrofit_json_free(j);
    return !size || d->ids;
}

static void write_ids(const int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t narrow = (uint16_t)ids[i];
        if (t.narrow ? fwrite(&narrow, 2, 1, t.f) != 1 : fwrite(&ids[i], 4, 1, t.f) != 1) die(1, "%s: writing failed: %s", unfinished, strerror(errno));
    }
    if ((t.tokens += n) > INT32_MAX) die(1, "more than %d tokens, the most a shard can hold: split the input", INT32_MAX);
}

static void show(void) {
    double now = retrofit_seconds(), elapsed = now - t.began;
    bool live = isatty(2);
    if (now - t.shown < 1) return;
    t.shown = now;
    fprintf(stderr, "%s%.1f of %.1f MB, %zu documents, %zu tokens, %.1f MB/s, ETA %.0f s%s", live ? "\r" : "", (double)t.read / 1e6, (double)t.total / 1e6,
            t.documents, t.tokens, (double)t.read / 1e6 / elapsed, (double)(t.total - t.read) * elapsed / (double)t.read, live ? "\033[K" : "\n");
}

static void encode_batch(document *batch, size_t count, const char *path) {
    PARALLEL_TASKS
    for (size_t i = 0; i < count; i++)
        if (!encode_document(&batch[i], path)) batch[i].error = strdup(retrofit_error()); // each thread has its own
    for (size_t i = 0; i < count; i++) {
        document *d = &batch[i];
        if (d->error) die(1, "%s", d->error);
        if (d->bytes) write_ids(d->ids, d->count), write_ids(&t.eos, t.eos >= 0), t.documents++;
        else t.empty++;
        t.bytes += d->bytes, t.read += d->size;
        free(d->raw), free(d->ids);
    }
    show();
}

static void tokenize_lines(const char *path) {
    enum { DOCUMENTS = 1024, BYTES = 1 << 24 };
    static document batch[DOCUMENTS];
    FILE *f = fopen(path, "rb");
    if (!f) die(1, "%s: %s", path, strerror(errno));
    size_t line = 0, count = 0, bytes = 0;
    for (bool more = true; more;) {
        size_t room = 0;
        document d = {.line = ++line};
        errno = 0;
        ssize_t n = getline(&d.raw, &room, f);
        if (n < 0 && errno) die(1, "%s: line %zu: %s", path, line, strerror(errno));
        more = n >= 0;
        if (more) d.size = (size_t)n, bytes += d.size, batch[count++] = d;
        else free(d.raw);
        if (count == DOCUMENTS || bytes > BYTES || !more) encode_batch(batch, count, path), count = bytes = 0;
    }
    fclose(f);
}

static void tokenize_whole(const char *path) {
    document d = {.line = 0};
    if (!(d.raw = retrofit_read_file(path, &d.size))) die(1, "%s", retrofit_error());
    encode_batch(&d, 1, path);
}

static void open_tokenizer(void) {
    retrofit_config c;
    char path[RETROFIT_PATH];
    const char *directory = retrofit_model_directory(o.tokenizer, path);
    if (!(t.tokenizer = retrofit_tokenizer_load(directory))) die(1, "%s", retrofit_error());
    t.eos = retrofit_tokenizer_eos(t.tokenizer);
    if (t.eos < 0 && retrofit_config_read(&c, directory)) t.eos = c.eos;
    size_t size = retrofit_tokenizer_size(t.tokenizer), after = t.tokenizer->after_count;
    if (t.eos < 0 || (size_t)t.eos >= size)
        die(1, "%s: neither tokenizer_config.json (eos_token) nor config.json (eos_token_id) names a token for the end of a document: add one", directory);
    if (after && t.tokenizer->after[after - 1] == t.eos) t.eos = -1;
    t.narrow = size <= 65536;
}

static void tokenize(const char *const *files, size_t count) {
    int32_t header[256] = {0};
    for (size_t i = 0; i < count; i++) {
        struct stat st;
        if (!ends_with(files[i], ".txt") && !ends_with(files[i], ".jsonl")) die(2, "%s: the name ends neither in .txt nor in .jsonl, the kinds that are known", files[i]);
        if (stat(files[i], &st)) die(1, "%s: %s", files[i], strerror(errno));
        if (!S_ISREG(st.st_mode)) die(1, "%s: not a regular file", files[i]);
        t.total += (size_t)st.st_size;
    }
    open_tokenizer();
    if (snprintf(unfinished, sizeof unfinished, "%s.tmp-%ld", o.to, (long)getpid()) >= RETROFIT_PATH) *unfinished = 0, die(1, "--to: the path is too long");
    if (!(t.f = fopen(unfinished, "wb"))) die(1, "%s: %s", unfinished, strerror(errno));
    if (fwrite(header, sizeof header, 1, t.f) != 1) die(1, "%s: %s", unfinished, strerror(errno));
    t.began = t.shown = retrofit_seconds();
    for (size_t i = 0; i < count; i++) (ends_with(files[i], ".txt") ? tokenize_whole : tokenize_lines)(files[i]);
    if (isatty(2) && t.shown > t.began) fputs("\r\033[K", stderr);
    if (!t.documents) die(1, "there is no text in %s%s", files[0], count > 1 ? " and the others" : "");
    header[0] = t.narrow ? RETROFIT_SHARD_MAGIC_16 : RETROFIT_SHARD_MAGIC_32, header[1] = t.narrow ? 1 : 7, header[2] = (int32_t)t.tokens;
    uint64_t hash = retrofit_tokenizer_hash(t.tokenizer);
    header[3] = (int32_t)(uint32_t)hash, header[4] = (int32_t)(uint32_t)(hash >> 32);
    errno = 0;
    bool ok = !fseek(t.f, 0, SEEK_SET) && fwrite(header, sizeof header, 1, t.f) == 1;
    if (!retrofit_finish_file(t.f, unfinished, ok)) die(1, "%s", retrofit_error());
    if (rename(unfinished, o.to)) die(1, "%s: %s", o.to, strerror(errno));
    char parent[RETROFIT_PATH];
    strcpy(parent, unfinished), retrofit_parent_directory(parent), *unfinished = 0;
    if (!retrofit_sync_directory(parent)) die(1, "%s", retrofit_error());
    printf("%s: %zu documents, %zu tokens of %d bits, %.2f bytes of text per token, %.1f s\n", o.to, t.documents, t.tokens, t.narrow ? 16 : 32,
           (double)t.bytes / (double)t.tokens, retrofit_seconds() - t.began);
    if (t.empty) printf("%zu empty documents were skipped\n", t.empty);
    retrofit_tokenizer_free(t.tokenizer);
}

// ---- Which of the programs this is, and whether the options fit it ------------------------------------------------------------
enum { SURGERY = 1, REWRITE = 2, RANDOM = 4, TOKENIZE = 8 };

static int mode_of(const char *const *files, size_t count) {
    bool lists = o.prelude || o.core || o.coda, any = lists || o.preset >= 0;
    if ((o.from != NULL) + (o.random != NULL) + o.tokenize != 1) die(2, "give one of --from, --random and --tokenize (see --help)");
    int mode = o.tokenize ? TOKENIZE : o.random ? RANDOM : any ? SURGERY : REWRITE;
    struct { const char *name; bool given; int modes; } given[] = {
        {"prelude", o.prelude, SURGERY}, {"core", o.core, SURGERY}, {"coda", o.coda, SURGERY}, {"preset", o.preset >= 0, SURGERY},
        {"adapter-init", o.adapter >= 0, SURGERY}, {"mean-recurrence", o.mean_recurrence != SIZE_MAX, SURGERY | RANDOM},
        {"backprop-depth", o.backprop_depth != SIZE_MAX, SURGERY | RANDOM}, {"dtype", o.dtype >= 0, SURGERY | REWRITE | RANDOM},
        {"seed", o.seed != SIZE_MAX, SURGERY | RANDOM}, {"tokenizer", o.tokenizer, RANDOM | TOKENIZE}, {"field", o.field, TOKENIZE}};
    for (size_t i = 0; i < sizeof given / sizeof *given; i++)
        if (given[i].given && !(given[i].modes & mode))
            die(2, mode == REWRITE ? "--%s goes with a choice of layers (see --help)" : "--%s does not go with --%s", given[i].name,
                o.tokenize ? "tokenize" : o.random ? "random" : "from");
    if (!o.to) die(2, "--to is needed: what shall be made?");
    // Not even an old model is replaced: a slip of the keyboard must not cost the source, or a training.
    if (mode != TOKENIZE && !access(o.to, F_OK)) die(1, "%s exists already: remove it or choose another --to", o.to);
    if (count && mode != TOKENIZE) die(2, "'%s' is not an option: options begin with -- (see --help)", files[0]);
    if (mode == TOKENIZE && !count) die(2, "--tokenize needs files");
    if (mode == TOKENIZE && !o.tokenizer) die(2, "--tokenizer is needed: a directory with tokenizer.json");
    if (mode == TOKENIZE && !ends_with(o.to, ".bin")) die(2, "--to %s: the name of a token shard ends in .bin", o.to);
    if (lists && o.preset >= 0) die(2, "--preset and lists of layers exclude each other");
    if (lists && !(o.prelude && o.core && o.coda)) die(2, "--prelude, --core and --coda go together; an empty one is none");
    const size_t recurrence[] = {o.mean_recurrence, o.backprop_depth};
    for (int i = 0; i < 2; i++)
        if (recurrence[i] != SIZE_MAX && (!recurrence[i] || recurrence[i] > 1 << 16))
            die(2, "--%s %zu is not between 1 and 65536", i ? "backprop-depth" : "mean-recurrence", recurrence[i]);
    return mode;
}

int main(int argc, char **argv) {
    size_t count = 0;
    const char **files = (const char **)retrofit_allocate((size_t)argc, sizeof *files);
    if (!files) die(1, "%s", retrofit_error());
    int code = retrofit_options(argc, argv, options, sizeof options / sizeof *options, usage, files, &count);
    int mode = code < 0 ? mode_of(files, count) : 0;
    if (o.seed == SIZE_MAX) o.seed = 1;
    if (!o.field) o.field = "text";
    if (mode == SURGERY && o.mean_recurrence == SIZE_MAX) o.mean_recurrence = 8;
    if (mode == SURGERY && o.backprop_depth == SIZE_MAX) o.backprop_depth = 8;
    if (mode == SURGERY || mode == REWRITE) convert();
    if (mode == RANDOM) make_random();
    if (mode == TOKENIZE) tokenize(files, count);
    free(files);
    return code < 0 ? 0 : code;
}

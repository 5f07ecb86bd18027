// Hostile files for every reader of a program: files that are almost right, by the hundred
// thousand. Compiled once for each program, whose source test/hooks.h includes, by -DHOOKS_CONVERT,
// -DHOOKS_INFER or -DHOOKS_TRAIN, in two ways:
//
//     make test          mutants of our own, MUTANTS of each target's seeds
//     make fuzz          with -DFUZZER, for clang's libFuzzer, which also follows what is reached
//
// A reader may refuse a file, by an exit code and one line that a terminal can show. It must not
// crash, hang, or leave memory, streams or mappings behind. What fails says how to repeat it:
//
//     MUTANT=target:seed:number build/fuzz_infer        or FILE=path TARGET=name build/fuzz_infer
#include "hooks.h"

#include "check.h"

enum { MAX_SEEDS = 64, MAX_FILE = 1 << 17, TIME_LIMIT = 20 };

typedef struct {
    const char *bytes;
    size_t size;
} input;

// What is read, from what it is made, and by what.
typedef struct {
    const char *name;
    void (*run)(input);
    const char *patterns[4]; // globs of files that are seeds
    const char *texts[6];    // and texts
    bool has_length;         // it begins with the length of its header, which is kept right
} target;

static char work[64];      // a directory in memory, where there is one
static FILE *console, *nowhere; // stdout, and what it is while the program runs
static char said[1 << 14]; // what the last run wrote to stderr
static size_t said_size;
static struct { // what runs now, for whoever must say it in a hurry
    const char *target;
    unsigned long long seed;
    unsigned long long number;
    input input;
} now;

// ---- Files --------------------------------------------------------------------------------------

static void require_test(bool ok, const char *what) {
    if (ok) return;
    dprintf(STDOUT_FILENO, "FAILED %s: %s: %s\n", now.target, what, retrofit_error());
    _exit(1);
}

static const char *in_work(const char *name) {
    static char paths[8][128];
    static size_t next;
    char *path = paths[next++ % 8];
    snprintf(path, 128, "%s/%s", work, name);
    return path;
}

static void write_input(const char *name, input content) {
    int fd = (open)(in_work(name), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    bool ok = fd >= 0 && write(fd, content.bytes, content.size) == (ssize_t)content.size;
    require_test(ok && !(close)(fd), name);
}

static void copy_to_work(const char *from, const char *name) {
    input content;
    char *bytes = retrofit_read_file(from, &content.size);
    require_test(bytes != NULL, from);
    content.bytes = bytes;
    write_input(name, content);
    free(bytes);
}

static char *terminated(input in) {
    char *text = malloc(in.size + 1);
    require_test(text != NULL, "memory");
    memcpy(text, in.bytes, in.size);
    text[in.size] = 0;
    return text;
}

// ---- Seeds that no fixture has ------------------------------------------------------------------

#define FIXTURES "test/fixtures/"
#define REPORTS  FIXTURES "reports/"

__attribute__((unused)) static const char byte_level_json[] =
    "{\"added_tokens\":[{\"id\":0,\"content\":\"<s>\",\"special\":true},"
    "{\"id\":1,\"content\":\"</s>\",\"special\":true,\"lstrip\":true,\"rstrip\":true},"
    "{\"id\":9,\"content\":\"ab b\",\"special\":false,\"single_word\":true}],"
    "\"normalizer\":{\"type\":\"NFC\"},\"pre_tokenizer\":{\"type\":\"Sequence\","
    "\"pretokenizers\":[{\"type\":\"Digits\",\"individual_digits\":true},"
    "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":true}]},"
    "\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":"
    "{\"id\":\"<s>\",\"type_id\":0}},{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}],"
    "\"special_tokens\":{\"<s>\":{\"id\":\"<s>\",\"ids\":[0],\"tokens\":[\"<s>\"]}}},"
    "\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"ignore_merges\":true,"
    "\"vocab\":{\"<s>\":0,\"</s>\":1,\"a\":2,\"b\":3,\"\\u0120\":4,\"ab\":5,\"\\u0120ab\":6,"
    "\"abab\":7,\"1\":8,\"ab b\":9},\"merges\":[\"a b\",\"\\u0120 ab\",[\"ab\",\"ab\"]]}}";

__attribute__((unused)) static const char sentencepiece_json[] =
    "{\"added_tokens\":[{\"id\":0,\"content\":\"<unk>\",\"special\":true},"
    "{\"id\":1,\"content\":\"<s>\",\"special\":true},{\"id\":2,\"content\":\"</s>\","
    "\"special\":true,\"normalized\":true}],\"normalizer\":{\"type\":\"Sequence\","
    "\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"\\u2581\"},{\"type\":\"Replace\","
    "\"pattern\":{\"String\":\" \"},\"content\":\"\\u2581\"}]},\"pre_tokenizer\":null,"
    "\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":"
    "{\"id\":\"<s>\",\"type_id\":0}},{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}],"
    "\"special_tokens\":{\"<s>\":{\"id\":\"<s>\",\"ids\":[1],\"tokens\":[\"<s>\"]}}},"
    "\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":"
    "{\"String\":\"\\u2581\"},\"content\":\" \"},{\"type\":\"ByteFallback\"},"
    "{\"type\":\"Fuse\"},{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}]},"
    "\"model\":{\"type\":\"BPE\",\"unk_token\":\"<unk>\",\"fuse_unk\":true,"
    "\"byte_fallback\":true,\"vocab\":{\"<unk>\":0,\"<s>\":1,\"</s>\":2,\"<0x41>\":3,"
    "\"<0xC3>\":4,\"<0xA9>\":5,\"\\u2581\":6,\"a\":7,\"b\":8,\"ab\":9,\"\\u2581ab\":10,"
    "\"\\u2581\\u2581\":11},\"merges\":[\"a b\",\"\\u2581 ab\",\"\\u2581 \\u2581\"]}}";

__attribute__((unused)) static const char small_config_json[] =
    "{\"model_type\":\"huginn_raven\",\"n_embd\":16,\"n_heads\":2,\"num_key_value_heads\":1,"
    "\"intermediate_size\":16,\"vocab_size\":300,\"padded_vocab_size\":300,\"block_size\":64,"
    "\"max_position_embeddings\":64,\"n_layers_in_prelude\":1,\"n_layers_in_recurrent_block\":1,"
    "\"n_layers_in_coda\":1,\"mean_recurrence\":2,\"mean_backprop_depth\":2,\"norm_eps\":1e-6,"
    "\"rope_theta\":10000,\"bos_token_id\":0,\"eos_token_id\":1,\"init_values\":"
    "{\"std\":0.0086}}";

__attribute__((unused)) static const char small_tokenizer_config[] =
    "{\"tokenizer_class\":\"PreTrainedTokenizerFast\",\"bos_token\":{\"content\":\"<s>\"},"
    "\"eos_token\":\"</s>\",\"unk_token\":null,\"add_bos_token\":true,\"model_max_length\":1e30,"
    "\"added_tokens_decoder\":{\"0\":{\"content\":\"<s>\",\"special\":true},"
    "\"11\":{\"content\":\"<|x|>\",\"special\":true,\"lstrip\":false}},"
    "\"additional_special_tokens\":[\"<|y|>\"],\"clean_up_tokenization_spaces\":false}";

// Seeds that are made when the program starts.
static struct {
    const char *target;
    input input;
} made[16];
static size_t made_count;

static void add_seed(const char *name, const void *bytes, size_t size) {
    char *copy = malloc(size);
    require_test(copy != NULL, "memory");
    made[made_count].target = name;
    made[made_count++].input = (input){memcpy(copy, bytes, size), size};
}

// ---- What each program reads --------------------------------------------------------------------

// A command line: an argument a line.
enum { MAX_ARGUMENTS = 24 };
static char **split_arguments(char *text, int *count) {
    static char *list[MAX_ARGUMENTS + 2];
    char program[] = PROGRAM, *rest = text;
    *count = 0;
    list[(*count)++] = strcpy(said + sizeof said - sizeof program, program);
    for (char *line; *count <= MAX_ARGUMENTS && (line = strsep(&rest, "\n"));)
        list[(*count)++] = line;
    list[*count] = NULL;
    return list;
}

#define OPTION_COUNT (sizeof option_table / sizeof *option_table)

// The options as they are when a program begins.
static void reset_options(void) {
    static char saved[sizeof options];
    static bool is_saved;
    if (!is_saved) memcpy(saved, &options, sizeof options);
    is_saved = true;
    memcpy(&options, saved, sizeof options);
}

#if defined HOOKS_CONVERT

// A file that grows in memory.
typedef struct {
    char bytes[1 << 16];
    size_t size;
} section;

static void put(section *s, const void *bytes, size_t size) {
    memcpy(s->bytes + s->size, bytes, size);
    s->size += size;
}

static void put_number(section *s, uint64_t number, size_t size) { put(s, &number, size); }

static void put_string(section *s, const char *text) {
    put_number(s, strlen(text), 8);
    put(s, text, strlen(text));
}

static void put_key(section *s, const char *key, uint32_t type) {
    put_string(s, key);
    put_number(s, type, 4);
}

static void put_u32(section *s, const char *key, uint32_t number) {
    put_key(s, key, GGUF_U32);
    put_number(s, number, 4);
}

static void put_text(section *s, const char *key, const char *text) {
    put_key(s, key, GGUF_STRING);
    put_string(s, text);
}

static void put_array(section *s, const char *key, uint32_t type, size_t count) {
    put_key(s, key, GGUF_ARRAY);
    put_number(s, type, 4);
    put_number(s, count, 8);
}

enum { GGUF_LAYER_TENSORS = 9, GGUF_SEED_ENTRIES = 19 };

// The key of this seed's architecture that ends so; good for the next call alone.
static const char *gguf_seed_architecture = "llama";
static const char *seed_key(const char *end) {
    static char key[128];
    snprintf(key, sizeof key, "%s.%s", gguf_seed_architecture, end);
    return key;
}

static void put_tensor(section *s, const char *name, size_t rows, size_t cols, uint32_t type,
                       size_t *offset) {
    put_string(s, name);
    put_number(s, rows > 1 ? 2 : 1, 4);
    put_number(s, cols, 8);
    if (rows > 1) put_number(s, rows, 8);
    put_number(s, type, 4);
    put_number(s, *offset, 8);
    const number_type *kind = gguf_find_type(type);
    size_t bytes = rows * (cols / kind->values) * kind->bytes;
    *offset += (bytes + 31) / 32 * 32;
}

static const char *gguf_seed_pattern = "smollm";

static void put_vocabulary(section *s, bool sentencepiece, uint32_t bos) {
    static const char *const tokens[2][8] = {
        {"<s>", "</s>", "a", "b", "\xc4\xa0", "ab", "\xc4\xa0" "ab", "1"},
        {"<unk>", "<s>", "</s>", "<0x41>", "a", "b", "\xe2\x96\x81", "ab"}};
    static const uint32_t types[2][8] = {{3, 3, 1, 1, 1, 1, 1, 1}, {2, 3, 3, 6, 1, 1, 1, 1}};
    put_text(s, "tokenizer.ggml.model", sentencepiece ? "llama" : "gpt2");
    put_array(s, "tokenizer.ggml.tokens", GGUF_STRING, 8);
    for (size_t i = 0; i < 8; i++) put_string(s, tokens[sentencepiece][i]);
    put_array(s, "tokenizer.ggml.token_type", GGUF_I32, 8);
    put(s, types[sentencepiece], sizeof types[0]);
    put_u32(s, "tokenizer.ggml.bos_token_id", bos);
    put_u32(s, "tokenizer.ggml.eos_token_id", 1 + sentencepiece);
    put_u32(s, "tokenizer.ggml.eot_token_id", 0);
    put_text(s, "tokenizer.chat_template", "{{ messages }}");
    put_text(s, "tokenizer.chat_template.x", "{{ x }}");
    put_key(s, "tokenizer.ggml.add_bos_token", GGUF_BOOL);
    put_number(s, 1, 1);
    if (sentencepiece) {
        put_array(s, "tokenizer.ggml.scores", GGUF_F32, 8);
        for (size_t i = 0; i < 8; i++) put(s, &(float){-(float)i}, 4);
        put_u32(s, "tokenizer.ggml.unknown_token_id", 0);
    } else {
        put_text(s, "tokenizer.ggml.pre", gguf_seed_pattern);
        put_array(s, "tokenizer.ggml.merges", GGUF_STRING, 2);
        put_string(s, "a b");
        put_string(s, "\xc4\xa0 ab");
    }
}

// A model of one layer, and the types of its tensors: of the layer's, in their order, of the
// embedding and the head.
typedef struct {
    size_t d, heads, kv_heads, F;
    uint32_t types[GGUF_LAYER_TENSORS], embedding, head;
} gguf_shape;

// Heads of 16, and all matrices of one type, in blocks of up to 32.
static gguf_shape small_shape(uint32_t type) {
    gguf_shape shape = {.d = 32, .heads = 2, .kv_heads = 2, .F = 32, .embedding = type,
                        .head = type};
    for (size_t i = 0; i < GGUF_LAYER_TENSORS; i++) // but the norms
        if (i != 0 && i != 5) shape.types[i] = type;
    return shape;
}

static void put_header(section *s, size_t tensors, size_t entries) {
    memset(s, 0, sizeof *s);
    put(s, "GGUF", 4);
    put_number(s, 3, 4);
    put_number(s, tensors, 8);
    put_number(s, entries, 8);
    put_text(s, "general.architecture", gguf_seed_architecture);
}

static void put_metadata(section *s, const gguf_shape *shape, bool sentencepiece, uint32_t bos) {
    put_u32(s, seed_key("embedding_length"), (uint32_t)shape->d);
    put_u32(s, seed_key("attention.head_count"), (uint32_t)shape->heads);
    put_u32(s, seed_key("attention.head_count_kv"), (uint32_t)shape->kv_heads);
    put_u32(s, seed_key("block_count"), 1);
    put_u32(s, seed_key("feed_forward_length"), (uint32_t)shape->F);
    put_u32(s, seed_key("context_length"), 64);
    put_key(s, seed_key("attention.layer_norm_rms_epsilon"), GGUF_F32);
    put(s, &(float){1e-5f}, 4);
    put_vocabulary(s, sentencepiece, bos);
}

// All their bytes are the same, which makes small numbers of every type; but the divisors of rotary
// frequencies are ones.
enum { GGUF_TENSORS = GGUF_LAYER_TENSORS + 4 };
static void put_tensors(section *s, const gguf_shape *shape) {
    size_t d = shape->d, F = shape->F, head_dim = d / shape->heads, offset = 0;
    size_t kv = shape->kv_heads * head_dim;
    const struct {
        const char *name;
        size_t rows, cols;
    } table[GGUF_LAYER_TENSORS] = {{"attn_norm", 1, d}, {"attn_q", d, d}, {"attn_k", kv, d},
                                   {"attn_v", kv, d}, {"attn_output", d, d}, {"ffn_norm", 1, d},
                                   {"ffn_gate", F, d}, {"ffn_up", F, d}, {"ffn_down", d, F}};
    char name[64];
    put_tensor(s, "rope_freqs.weight", 1, head_dim / 2, 0, &offset);
    put_tensor(s, "token_embd.weight", 8, d, shape->embedding, &offset);
    for (size_t i = 0; i < GGUF_LAYER_TENSORS; i++) {
        snprintf(name, sizeof name, "blk.0.%s.weight", table[i].name);
        put_tensor(s, name, table[i].rows, table[i].cols, shape->types[i], &offset);
    }
    put_tensor(s, "output_norm.weight", 1, d, 0, &offset);
    put_tensor(s, "output.weight", 8, d, shape->head, &offset);
    size_t start = (s->size + 31) / 32 * 32;
    s->size = start + offset;
    require_test(s->size < sizeof s->bytes, "gguf");
    memset(s->bytes + start, 0x22, offset);
    for (size_t i = 0; i < head_dim / 2; i++)
        memcpy(s->bytes + start + 4 * i, &(float){1}, 4);
}

static void add_gguf(const gguf_shape *shape, bool sentencepiece, uint32_t bos) {
    static section s;
    put_header(&s, GGUF_TENSORS, GGUF_SEED_ENTRIES);
    put_metadata(&s, shape, sentencepiece, bos);
    put_tensors(&s, shape);
    add_seed("gguf", s.bytes, s.size);
}

// A layer of another family, with all tensors F32, in a vocabulary of byte-level BPE.
static void add_other_family(const char *architecture, const char *pattern,
                             const char *const names[12], size_t qk_norm) {
    static section s;
    const size_t d = 32, F = 32, V = 8;
    const size_t sizes[12][2] = {{1, d}, {d, d}, {d, d}, {d, d}, {d, d}, {1, d}, {F, d}, {F, d},
                                 {d, F}, {1, qk_norm}, {1, qk_norm}, {1, d}};
    gguf_shape shape = small_shape(0);
    char name[64];
    size_t tensors = 2, offset = 0;
    for (size_t i = 0; i < 12; i++) tensors += names[i] != NULL;
    gguf_seed_architecture = architecture;
    gguf_seed_pattern = pattern;
    put_header(&s, tensors, GGUF_SEED_ENTRIES);
    put_metadata(&s, &shape, false, 1);
    put_tensor(&s, "token_embd.weight", V, d, 0, &offset);
    for (size_t i = 0; i < 12; i++) {
        if (!names[i]) continue;
        snprintf(name, sizeof name, "blk.0.%s", names[i]);
        put_tensor(&s, name, sizes[i][0], sizes[i][1], 0, &offset);
    }
    put_tensor(&s, "output_norm.weight", 1, d, 0, &offset);
    s.size = (s.size + 31) / 32 * 32 + offset;
    require_test(s.size < sizeof s.bytes, "gguf");
    add_seed("gguf", s.bytes, s.size);
    gguf_seed_architecture = "llama";
    gguf_seed_pattern = "smollm";
}

static void add_other_families(void) {
    static const char *const olmo2[12] = {
        "post_attention_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight",
        "attn_output.weight", "post_ffw_norm.weight", "ffn_gate.weight", "ffn_up.weight",
        "ffn_down.weight", "attn_q_norm.weight", "attn_k_norm.weight", NULL};
    static const char *const qwen3[12] = {
        "attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight",
        "attn_output.weight", "ffn_norm.weight", "ffn_gate.weight", "ffn_up.weight",
        "ffn_down.weight", "attn_q_norm.weight", "attn_k_norm.weight", NULL};
    static const char *const qwen2[12] = {
        "attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight",
        "attn_output.weight", "ffn_norm.weight", "ffn_gate.weight", "ffn_up.weight",
        "ffn_down.weight", "attn_q.bias", "attn_k.bias", "attn_v.bias"};
    add_other_family("olmo2", "dbrx", olmo2, 32);
    add_other_family("qwen3", "qwen2", qwen3, 16);
    add_other_family("qwen2", "qwen2", qwen2, 32);
}

// A model in two files: metadata, which stay as they are, and tensors.
static void add_split(void) {
    static section s;
    gguf_shape shape = small_shape(7);
    for (uint32_t number = 0; number < 2; number++) {
        put_header(&s, number ? GGUF_TENSORS : 0, number ? 4 : GGUF_SEED_ENTRIES + 3);
        put_u32(&s, "split.no", number);
        put_u32(&s, "split.count", 2);
        put_u32(&s, "split.tensors.count", GGUF_TENSORS);
        if (number) put_tensors(&s, &shape);
        else put_metadata(&s, &shape, true, 1);
        add_seed(number ? "part" : "gguf", s.bytes, s.size);
        if (!number) write_input("split-00001-of-00002.gguf", (input){s.bytes, s.size});
    }
}

static void set_up(void) {
    // All types in blocks of 32 numbers, then all others.
    static const uint32_t types[] = {8, 2, 3, 6, 7, 20, 39};
    static const gguf_shape mixed = {256, 8, 1, 32, {1, 34, 11, 12, 35, 30, 13, 23, 20}, 14, 10};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        gguf_shape shape = small_shape(types[i]);
        add_gguf(&shape, i % 2 == 0, i % 2 == 0);
    }
    for (size_t i = 0; i < 2; i++) {
        gguf_shape shape = small_shape(types[i]);
        add_gguf(&shape, i == 0, NO_TOKEN); // which is added to each text all the same
    }
    add_gguf(&mixed, true, 1);
    add_other_families();
    add_split();
    mkdir(in_work("t"), 0777);
    mkdir(in_work("out"), 0777);
    copy_to_work(REPORTS "brackets_a/model/tokenizer.json", "t/tokenizer.json");
    copy_to_work(REPORTS "brackets_a/model/tokenizer_config.json", "t/tokenizer_config.json");
    static const char template[] =
        "{% for m in messages %}{{ m.role + m.content }}{% if m.role == 'user' %}{{ eos_token }}\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}";
    write_input("t/chat_template.jinja", (input){template, sizeof template - 1});
}

static void reset_program(void) {
    reset_options();
    memset(unfinished, 0, sizeof unfinished);
    memset(&in_files, 0, sizeof in_files);
}

static void read_gguf(const char *name) {
    gguf_file gguf;
    gguf_open(&gguf, in_work(name));
    retrofit_model *source = gguf_load(&gguf);
    for (size_t i = 0; i < in_files.count; i++) {
        const tensor_piece *piece = &in_files.pieces[i];
        size_t count = piece->rows * piece->cols;
        float *x = malloc(count * sizeof *x);
        if (x) download_from_files(x, (float *)in_files.range + piece->first, count * sizeof *x);
        free(x);
    }
    gguf_write_tokenizer(&gguf, in_work("out"));
    retrofit_free(source);
    forget_pieces();
    gguf_close(&gguf);
}

static void fuzz_gguf(input in) {
    write_input("model.gguf", in);
    read_gguf("model.gguf");
}

static void fuzz_part(input in) {
    write_input("split-00002-of-00002.gguf", in);
    read_gguf("split-00001-of-00002.gguf");
}

// Whether a line may have a conversation is up to the input; none has a file of labels to itself.
static void tokenize_as(const char *name, input in) {
    static retrofit_tokenizer *tokenizer;
    static retrofit_chat *chat;
    if (!tokenizer) {
        hooks.round--;
        tokenizer = retrofit_tokenizer_load(in_work("t"));
        chat = retrofit_chat_load(in_work("t"), tokenizer);
        hooks.round++;
        require_test(tokenizer && chat, "t");
    }
    char path[128];
    strcpy(path, in_work(name));
    write_input(name, in);
    shard_writer writer = {.tokenizer = tokenizer, .eos = 1, .narrow = true, .files = 1};
    writer.chat = chat;
    make_encoders(&writer);
    options.to = "/dev/null";
    options.field = in.size % 3 ? NULL : "text";
    options.encoding_errors = in.size % 2 ? ERRORS_STRICT : ERRORS_REPLACE;
    check_kind(path);
    writer.file = fopen("/dev/null", "wb");
    writer.label_file = fopen("/dev/null", "wb");
    if (ends_with(name, ".txt")) tokenize_whole(&writer, path);
    else tokenize_lines(&writer, path);
    fclose(writer.file);
    fclose(writer.label_file);
    for (size_t i = 0; i < writer.threads; i++) retrofit_encoder_free(writer.encoders[i]);
    free(writer.encoders);
}

static void fuzz_text(input in) { tokenize_as("x.txt", in); }
static void fuzz_lines(input in) { tokenize_as("x.jsonl", in); }

static void fuzz_layers(input in) {
    char *text = terminated(in);
    layer_numbers *list = malloc(sizeof *list);
    read_layers(list, "core", text, 30);
    print_layers(list);
    free(list);
    free(text);
}

static void fuzz_command(input in) {
    const char *files[MAX_ARGUMENTS + 2];
    char *text = terminated(in);
    size_t others = 0;
    int count;
    char **list = split_arguments(text, &count);
    int code = retrofit_options(count, list, option_table, OPTION_COUNT, usage, files, &others);
    if (code < 0) {
        int task = find_task();
        check_options(task, files, others);
        set_defaults(task);
    }
    free(text);
}

static const target targets[] = {
    {"gguf", fuzz_gguf, {REPORTS "gguf_rope_a/*.gguf"}, {0}, false},
    {"part", fuzz_part, {0}, {0}, false},
    {"lines", fuzz_lines, {REPORTS "small_shards_a/*.jsonl", REPORTS "prompts_*/*.jsonl"},
     {"{\"text\":\"x\\ud800y\"}\n{\"text\":NaN,\"a\":[-Infinity,Infinity]}\n{\"text\":null}\n",
      "{\"other\":1}\n\n{\"text\":\"\\\\ud800 \\ud83d\\ude00\"}\r\n[1]\n", "\"text\"",
      "{\"messages\":[{\"role\":\"user\",\"content\":\"the cat\"},"
      "{\"role\":\"assistant\",\"content\":\" sat \"}]}\n",
      "{\"messages\":[{\"role\":\"assistant\",\"content\":null}],\"tools\":[1]}\n"}, false},
    {"text", fuzz_text, {REPORTS "crlf_prompts_a/*.txt"},
     {"\xef\xbb\xbfthe cat\r\nsat  <|eos|> \xe9 12345", "\xff\xfe" "a\0b", "1AY&SY"}, false},
    {"layers", fuzz_layers, {0},
     {"0-3,5,8-9", "none", "29,0-1", "20-25", "\x1b[2J", "\xc2\x9b" "2J"}, false},
    {"command", fuzz_command, {0},
     {"--from\na\n--to\nb\n--preset\nsmollm2\n--adapter-init=default\n--seed=3",
      "--tokenize\na.txt\n--tokenizer\nt\n--to\nx.bin\n--field=a\n--encoding-errors\nstrict",
      "--random\nc.json\n--to=d\n--dtype\nbf16\n--mean-recurrence\n8", "--help",
      "--from=a\n--to=b\n--hf-code=modeling_retrofit.py",
      "--from=a\n--prelude=0\n--core=1-2\n--coda=none\n--to=b\n--backprop-depth=4"}, false},
};

#elif defined HOOKS_INFER

static retrofit_tokenizer *tokenizers[3]; // what text is encoded by
static retrofit_tokenizer *chat_tokenizer;
static retrofit_model *small_model; // without memory
static char chat_directory[128], model_path[128];

static const char mixed_text[] =
    " ab abab  ab b<s>1</s> </s>x \xc3\xa9 A\n\n\xe2\x96\x81  12ab <|bos|> e\xcc\x81\xff";

static retrofit_tokenizer *load(const char *directory) {
    retrofit_tokenizer *loaded = retrofit_tokenizer_load(directory);
    require_test(loaded != NULL, directory);
    return loaded;
}

static void set_up(void) {
    static const char *const names[] = {"t", "m", "chat", "shards", "b", "s", "late"};
    for (size_t i = 0; i < 7; i++) mkdir(in_work(names[i]), 0777);
    copy_to_work(REPORTS "brackets_a/model/tokenizer.json", "chat/tokenizer.json");
    copy_to_work(REPORTS "chat_system_a/tokenizer_config.json", "chat/tokenizer_config.json");
    copy_to_work(REPORTS "brackets_a/model/config.json", "m/config.json");
    write_input("b/tokenizer.json", (input){byte_level_json, sizeof byte_level_json - 1});
    write_input("s/tokenizer.json", (input){sentencepiece_json, sizeof sentencepiece_json - 1});
    tokenizers[0] = load(in_work("b"));
    tokenizers[1] = load(in_work("s"));
    tokenizers[2] = load(REPORTS "brackets_a/model");
    chat_tokenizer = tokenizers[2];
    strcpy(chat_directory, in_work("chat"));
    strcpy(model_path, in_work("m"));
    retrofit_config config;
    require_test(retrofit_config_read(&config, REPORTS "brackets_a/model"), "config");
    small_model = retrofit_model_new(&config, &retrofit_cpu);
    require_test(small_model != NULL, "model");
}

static void reset_program(void) {
    reset_options();
    chat = NULL;
    memset(&task_set, 0, sizeof task_set);
    memset(&answer_regex, 0, sizeof answer_regex);
    memset(&drafts, 0, sizeof drafts);
    memset(stops, 0, sizeof stops);
    stop_count = 0;
    end_count = 0;
    tokenizer = chat_tokenizer;
    tokenizer_directory = chat_directory;
    model_directory = model_path;
    options.model = model_path;
    model = small_model;
}

static void fuzz_json(input in) {
    retrofit_json *json = retrofit_json_parse(in.bytes, in.size, "json");
    for (const retrofit_json *j = json ? json->child : NULL; j; j = j->next) {
        if (j->key) retrofit_json_get(json, j->key);
        if (j->string) retrofit_json_write_string(stdout, j->string, j->length);
        retrofit_json_value_text(j);
    }
    retrofit_json_free(json);
}

static void fuzz_safetensors(input in) {
    retrofit_map map;
    size_t infinite, zeros;
    write_input("m/model.safetensors", in);
    if (!retrofit_safetensors_open(&map, in_work("m/model.safetensors"))) return;
    retrofit_safetensors_survey(&map, false, &infinite, &zeros);
    retrofit_safetensors_metadata(&map, "step");
    for (size_t i = 0; i < map.count; i++) retrofit_safetensors_find(&map, map.tensors[i].name);
    retrofit_safetensors_close(&map);
    retrofit_free(retrofit_load(in_work("m"), &retrofit_cpu,
                                in.size % 2 ? RETROFIT_INFERENCE : RETROFIT_TRAINING));
}

static void fuzz_config(input in) {
    retrofit_config config;
    write_input("late/config.json", in);
    if (!retrofit_config_read(&config, in_work("late"))) return;
    if (config.prelude + config.core + config.coda > 64) return; // the list of parameters is long
    retrofit_model *shape = retrofit_model_new(&config, &retrofit_cpu);
    if (shape) retrofit_buffers_bytes(&config, &retrofit_cpu, 2, 64, 2, RETROFIT_KEEP_ALL);
    retrofit_free(shape);
}

static void fuzz_generation(input in) {
    retrofit_config config;
    write_input("m/generation_config.json", in);
    if (retrofit_config_read(&config, model_directory))
        retrofit_config_mend_ids(&config, tokenizer, model_directory);
    note_generation_keys("generation_config.json", true);
    unlink(in_work("m/generation_config.json"));
}

static void use_tokenizer(const retrofit_tokenizer *t, const char *text, size_t size) {
    size_t count, length = 0;
    int32_t *ids = retrofit_encode(t, text, size, true, &count);
    char *decoded = ids ? retrofit_decode(t, ids, count, true, &length) : NULL;
    require_test(ids && decoded, "encode and decode");
    require_test(retrofit_check_utf8(decoded, length, "decoded"), "decoded text");
    free(decoded);
    retrofit_stream stream = {0};
    size_t all = 0;
    for (size_t i = 1; i <= count && count < 64; i++) {
        char *next = retrofit_decode_next(t, &stream, ids, i, true, i == count, &all);
        require_test(next != NULL, "decode_next");
        free(next);
    }
    free(ids);
}

static void load_and_use(const char *directory) {
    retrofit_tokenizer *loaded = retrofit_tokenizer_load(directory);
    if (!loaded) return;
    retrofit_tokenizer_hash(loaded);
    use_tokenizer(loaded, mixed_text, sizeof mixed_text - 1);
    retrofit_tokenizer_free(loaded);
}

static void fuzz_tokenizer(input in) {
    write_input("t/tokenizer.json", in);
    load_and_use(in_work("t"));
}

static void fuzz_tokenizer_config(input in) {
    write_input("b/tokenizer_config.json", in);
    load_and_use(in_work("b"));
}

static void fuzz_special_tokens(input in) {
    write_input("s/special_tokens_map.json", in);
    load_and_use(in_work("s"));
}

static void fuzz_encode(input in) {
    for (size_t i = 0; i < 3; i++) use_tokenizer(tokenizers[i], in.bytes, in.size);
}

static void fuzz_decode(input in) {
    size_t count = in.size / sizeof(int32_t), size;
    int32_t *ids = malloc(count * sizeof *ids + 1);
    memcpy(ids, in.bytes, count * sizeof *ids);
    for (size_t i = 0; i < 3; i++) {
        char *text = retrofit_decode(tokenizers[i], ids, count, in.size % 2, &size);
        if (text) require_test(retrofit_check_utf8(text, size, "text"), "decoded text");
        free(text);
        int32_t context;
        retrofit_decode_context(tokenizers[i], ids, count, &context);
    }
    free(ids);
}

static void fuzz_template(input in) {
    static const retrofit_message messages[] = {
        {"system", "be <|brief|>", 12, NULL}, {"user", " 1+1? ", 6, NULL},
        {"assistant", "2", 1, NULL}, {"user", "\xc3\xa9", 2, NULL}};
    write_input("chat/chat_template.jinja", in);
    options.chat = true;
    read_chat_template();
    free(write_messages(messages, 4, "").bytes);
    retrofit_chat_free(chat);
}

static void fuzz_batch_file(input in) {
    size_t count;
    char path[128];
    write_input("batch.jsonl", in);
    strcpy(path, in_work("batch.jsonl"));
    copy_to_work(REPORTS "chat_system_a/tokenizer_config.json", "chat/tokenizer_config.json");
    unlink(in_work("chat/chat_template.jinja"));
    options.batch = path;
    options.chat = in.size % 4 > 0;
    if (options.chat) read_chat_template();
    struct sequence *sequences = read_batch(&count);
    for (size_t i = 0; i < count; i++) free_sequence(&sequences[i]);
    free(sequences);
    retrofit_chat_free(chat);
}

static void fuzz_tasks_file(input in) {
    char path[128];
    write_input("tasks.jsonl", in);
    strcpy(path, in_work("tasks.jsonl"));
    options.tasks = path;
    if (memmem(in.bytes, in.size, "target", 6)) options.answer_regex = "(a)";
    read_tasks();
    free_tasks();
}

static void fuzz_index(input in) {
    copy_to_work(REPORTS "brackets_a/model/model.safetensors", "shards/a.safetensors");
    copy_to_work(REPORTS "brackets_a/model/config.json", "shards/config.json");
    write_input("shards/model.safetensors.index.json", in);
    retrofit_free(retrofit_load(in_work("shards"), &retrofit_cpu, RETROFIT_INFERENCE));
}

static void fuzz_regex(input in) {
    char *text = terminated(in);
    options.answer_regex = text;
    struct translation translation = translate_regex(text);
    free(translation.posix.bytes);
    free(translation.groups.bytes);
    free(text);
}

static void fuzz_command(input in) {
    char *text = terminated(in);
    int count;
    char **list = split_arguments(text, &count);
    options.model = NULL;
    int code = retrofit_options(count, list, option_table, OPTION_COUNT, usage, NULL, NULL);
    if (code < 0) {
        const struct mode *mode = find_mode();
        check_mode(mode);
        note_idle_options(mode);
        if (isnan(options.temperature)) options.temperature = 0;
        if (options.speculative) read_drafts();
        if (options.speculative) check_drafts();
        check_cache_use();
        cache_options(1, 1);
        check_sampling();
        if (options.stop) read_stops();
        read_depths(MAX_DEPTHS, NULL);
        if (options.tokens) free(read_token_ids(&(size_t){0}));
        free(stops[0]);
    }
    free(text);
}

static void fuzz_latest(input in) {
    char path[RETROFIT_PATH];
    write_input("latest", in);
    retrofit_latest(work, path);
    retrofit_model_directory(work, path);
    unlink(in_work("latest"));
}

#define CHAT(text) "{\"messages\":[{\"role\":\"system\",\"content\":\"x\"}," text "],\"id\":7}\n"

static const target targets[] = {
    {"json", fuzz_json, {REPORTS "*/expect.json", FIXTURES "tiny/*/config.json"},
     {"[1,-0.5e-7,true,null,\"\\ud83d\\ude00\\n\\u0000\",{\"a\":[],\"b\":{}}]", "1e400", "\"x\"",
      "[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]"}, false},
    {"safetensors", fuzz_safetensors,
     {REPORTS "float8_m/*.safetensors", REPORTS "pickle_beside_m/*.safetensors",
      REPORTS "brackets_a/model/*.safetensors", REPORTS "dtypes_a/*.safetensors"}, {0}, true},
    {"config", fuzz_config,
     {REPORTS "*rope*_?/config.json", REPORTS "config_*/config.json", FIXTURES "*/*/config.json",
      REPORTS "[qo]*_m/config.json"},
     {small_config_json}, false},
    {"generation", fuzz_generation, {REPORTS "*/generation_config.json"},
     {"{\"eos_token_id\":[1,2,300,-1],\"bos_token_id\":0,\"temperature\":0.5,\"top_k\":7}"},
     false},
    {"tokenizer", fuzz_tokenizer,
     {REPORTS "metaspace_a/tokenizer.json", REPORTS "tokenizer_padding_m/tokenizer.json",
      FIXTURES "lookup/base/tokenizer.json", REPORTS "steps_gpt2_m/tokenizer.json"},
     {byte_level_json, sentencepiece_json}, false},
    {"tokenizer_config", fuzz_tokenizer_config, {REPORTS "*/tokenizer_config.json"},
     {small_tokenizer_config}, false},
    {"special_tokens", fuzz_special_tokens, {REPORTS "*/*/special_tokens_map.json"},
     {"{\"bos_token\":{\"content\":\"<s>\",\"lstrip\":true},\"eos_token\":\"</s>\","
      "\"additional_special_tokens\":[\"<|a|>\",{\"content\":\"b\"}]}"}, false},
    {"encode", fuzz_encode, {REPORTS "crlf_prompts_a/*.txt"},
     {mixed_text, "aaaaaaaaaaaaaaaaaaaaaaaaabababababab", "\xea\xb0\x80\xe1\x84\x80\xe1\x85\xa1"},
     false},
    {"decode", fuzz_decode, {REPORTS "crlf_prompts_a/*.txt"},
     {"\1\1\1\1\2\2\2\2\3\3\3\3\4\4\4\4", "\1abc\2abc"}, false},
    {"template", fuzz_template, {0},
     {"{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m.content|trim }}{% endfor %}",
      "{%- if messages[0].role == 'system' -%}{% set s = messages[0]['content'] %}{% else %}"
      "{% set s = '' %}{% endif %}{{ bos_token }}{% for m in messages[1:] %}{{ m.content }}"
      "{% if not loop.last and (m['role'] != 'user' or false) %}{{ eos_token }}{% elif 1 %} "
      "{% endif %}{% endfor %}",
      "{{ raise_exception('x') if messages|length > 9 else '' }}{% for m in messages %}"
      "{{ m.content.strip() ~ loop.index0 % 2 }}{% endfor %}{# no #}",
      "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
      "{{ [1,2,'a'] is defined }}{{ {'a': 1} }}{{ strftime_now('%d') }}"}, false},
    {"batch", fuzz_batch_file, {REPORTS "batch_settings_m/*.jsonl"},
     {CHAT("{\"role\":\"user\",\"content\":\"y <|eot|>\"}") "{\"prompt\":\"z\"}\n",
      "\xef\xbb\xbf{\"prompt\":\"four\",\"id\":\"a\",\"x\":[]}\r\n\r\n"}, false},
    {"tasks", fuzz_tasks_file, {REPORTS "*/tasks.jsonl"},
     {"{\"prompt\":\"four\",\"answer\":\" five\",\"hops\":3}\n{\"prompt\":\"\",\"answer\":\"a\"}\n",
      "{\"prompt\":\"four\",\"choices\":[\" a\",\"b\"],\"answer\":1}\n"}, false},
    {"index", fuzz_index, {REPORTS "index_*/model.safetensors.index.json"},
     {"{\"weight_map\":{\"lm_head.weight\":\"a.safetensors\",\"model.norm.weight\":"
      "\"a.safetensors\"}}"}, false},
    {"regex", fuzz_regex, {0},
     {"#### (-?[0-9.,]+)", "(a\x1b[2J*?)",
      "(?:a|b)*?(\\d{1,3})[^\\s\\w]+|(x)", "[[:alpha:]]([^]-a]|\xc3\xa9)\\b"},
     false},
    {"command", fuzz_command, {0},
     {"--model\nm\n--prompt\nx\n--recurrences\n4\n--exit=kl\n--exit-threshold=.1\n--json",
      "--model=m\n--tokens=1,2,3\n--logits=l\n--recurrences=2", "--help",
      "--model\nm\n--tasks\nt\n--answer-regex\n(a)\n--rows=2\n--chat\n--stop=a|\\n",
      "--model\nm\n--prompt=-\n--speculative\n2,4\n--temperature=.7\n--top-k\n3\n--min-p=.1",
      "--model=m\n--prompt=a\n--kv-cache\ngrouped:2\n--noise=.1\n--noise-type=chi"}, false},
    {"latest", fuzz_latest, {0}, {"step_00000002\n", "../x", "step_00000002"}, false},
};

#elif defined HOOKS_TRAIN

static char out_directory[128], checkpoint[128], prompts_path[128];
static retrofit_model *small_model;

static void reset_program(void);

static void set_up(void) {
    const char *source = REPORTS "brackets_a/model";
    mkdir(in_work("out"), 0777);
    mkdir(in_work("out/step_00000002"), 0777);
    strcpy(out_directory, in_work("out"));
    strcpy(checkpoint, in_work("out/step_00000002"));
    strcpy(prompts_path, in_work("prompts.txt"));
    retrofit_config config;
    require_test(retrofit_config_read(&config, source), source);
    config.n_embd = 8;
    config.n_heads = 1;
    config.intermediate = 8;
    small_model = retrofit_model_new(&config, &retrofit_cpu);
    require_test(small_model != NULL, source);
    require_test(retrofit_model_allocate(small_model, RETROFIT_TRAINING), "memory");
    require_test(retrofit_optimizer_init(small_model, RETROFIT_MUON), "optimizer");

    reset_program();
    size_t size;
    require_test(save_optimizer(checkpoint), "optimizer.safetensors");
    char *file = retrofit_read_file(in_work("out/step_00000002/optimizer.safetensors"), &size);
    require_test(file != NULL, "optimizer.safetensors");
    add_seed("optimizer", file, size);
    free(file);
    int32_t shard[256 + 20] = {RETROFIT_SHARD_MAGIC_16, 1, 40, 1, 1};
    add_seed("shard", shard, sizeof shard);
    write_input("y.bin", (input){(const char *)shard, sizeof shard});
    uint64_t hash = retrofit_sample_hash(shard, sizeof shard);
    int32_t labels[256 + 40] = {RETROFIT_LABELS_MAGIC, 1, 40, (int32_t)(uint32_t)hash,
                                (int32_t)(uint32_t)(hash >> 32)};
    for (size_t i = 256; i < 276; i++) labels[i] = RETROFIT_IGNORED;
    add_seed("labels", labels, sizeof labels);
    shard[0] = RETROFIT_SHARD_MAGIC_32;
    shard[1] = 7;
    shard[2] = 20;
    add_seed("shard", shard, sizeof shard);
}

static void reset_program(void) {
    reset_options();
    memset(&run, 0, sizeof run);
    memset(&progress, 0, sizeof progress);
    memset(&samples, 0, sizeof samples);
    set_defaults();
    options.out = out_directory;
    options.model = REPORTS "brackets_a/model";
    options.data = "x.bin";
    options.seq_len = 8;
    options.batch_size = 8;
    training.steps = 4;
    training.mean_recurrence = 2;
    training.backprop_depth = 2;
    run.source = options.model;
    run.ops = &retrofit_cpu;
    run.data_shards = "x.bin 1 2\n";
    run.model = small_model;
    run.config = small_model->config;
    strcpy(run.newest, checkpoint);
    strcpy(run.log_path, in_work("out/log.jsonl"));
}

static void fuzz_log(input in) {
    write_input("out/log.jsonl", in);
    progress.step = 2;
    cut_log();
}

static void fuzz_manifest(input in) {
    write_input("out/step_00000002/config.json", (input){"{}", 2});
    write_input("out/step_00000002/manifest.json", in);
    check_manifest(checkpoint);
}

static void fuzz_optimizer(input in) {
    options.resume_anyway = in.size % 2;
    write_input("out/step_00000002/optimizer.safetensors", in);
    retrofit_map file;
    read_progress();
    if (retrofit_load_optimizer(run.model, &file, run.newest)) retrofit_safetensors_close(&file);
}

static void fuzz_prompts(input in) {
    write_input("prompts.txt", in);
    options.sample_prompts = prompts_path;
    options.sample_tokens = 4;
    eval_recurrences[0] = 1;
    eval_count = 1;
    open_samples();
    close_samples();
}

static void read_data(const char *name, bool shuffle) {
    int32_t tokens[9], labels[9];
    retrofit_data *data = retrofit_data_open(in_work(name), 8, 300, shuffle, 1);
    if (!data) return;
    if (retrofit_data_check_ids(data)) {
        for (uint64_t i = 0; i < 3; i++) retrofit_data_row(data, i, tokens, labels);
    }
    retrofit_data_check(data, NULL);
    free(retrofit_data_describe(data));
    retrofit_data_close(data);
}

static void fuzz_shard(input in) {
    write_input("x.bin", in);
    read_data("x.bin", in.size % 2);
}

// Those of the first shard above.
static void fuzz_labels(input in) {
    write_input("y.bin.labels", in);
    read_data("y.bin", in.size % 2);
}

static void fuzz_command(input in) {
    char *text = terminated(in);
    int count;
    char **list = split_arguments(text, &count);
    int code = read_options(count, list);
    if (code < 0) {
        note_idle_options();
        complete_options();
        check_options();
        fill_training();
    }
    free(text);
}

#define FLAGS "--model\nm\n--data\nd\n--out\no\n--steps\n4\n"

static const target targets[] = {
    {"log", fuzz_log, {0},
     {"{\"step\":1,\"loss\":2}\n{\"step\":2,\"loss\":2}\n{\"step\":2,\"val\":[1]}\n{\"step\":3}\n",
      "{\"step\":2,\"sample\":1}\n{\"step\":2,\"sampled\":1}\n{\"step\":"}, false},
    {"manifest", fuzz_manifest, {0},
     {"{\"step\": 2,\"files\":[{\"name\":\"config.json\",\"size\":2,\"hash\":"
      "\"0123456789abcdef\"},{\"name\":\"../x\",\"size\":1,\"hash\":\"0\"}]}"}, false},
    {"optimizer", fuzz_optimizer, {0}, {0}, true},
    {"prompts", fuzz_prompts, {REPORTS "crlf_prompts_a/*.txt"}, {"four five\nsix\r\n"}, false},
    {"shard", fuzz_shard,
     {REPORTS "*/*.bin"}, {0}, false},
    {"labels", fuzz_labels, {0}, {0}, false},
    {"command", fuzz_command, {0},
     {FLAGS "--fixed-recurrences=2,3\n--seq-len\n8\n--lr=1e-3\n--warmup\n.1\n--resume",
      FLAGS "--eval-recurrences\n1,2,4\n--val\nv\n--optimizer=adamw\n--clip\n0\n--throttle",
      FLAGS "--dry-run=schedule\n--curriculum\nlinear\n--beta1\n.9\n--batch-size=16",
      "--help"}, false},
};
#endif

enum { TARGETS = sizeof targets / sizeof *targets };

// ---- One input ----------------------------------------------------------------------------------

static ssize_t keep_said(void *cookie, const char *bytes, size_t size) {
    (void)cookie;
    size_t room = sizeof said - 64 - said_size; // the end is the program's name
    size_t kept = size < room ? size : room;
    memcpy(said + said_size, bytes, kept);
    said_size += kept;
    return (ssize_t)size;
}

static ssize_t drop(void *cookie, const char *bytes, size_t size) {
    (void)cookie;
    (void)bytes;
    return (ssize_t)size;
}

// What cannot be said by check, since the program may end here and now.
__attribute__((unused)) static void say_where(void) {
    dprintf(STDOUT_FILENO, "FAILED %s: MUTANT=%s:%llu:%llu, %zu bytes\n", PROGRAM, now.target,
            now.seed, now.number, now.input.size);
    int fd = (open)("build/fuzz-crash", O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd < 0 || write(fd, now.input.bytes, now.input.size) < 0) return;
    dprintf(STDOUT_FILENO, "it is build/fuzz-crash: FILE=build/fuzz-crash TARGET=%s repeats it\n",
            now.target);
}

#if defined __SANITIZE_ADDRESS__
#define SANITIZED
#elif defined __has_feature
#if __has_feature(address_sanitizer)
#define SANITIZED
#endif
#endif

#ifdef SANITIZED
void __sanitizer_set_death_callback(void (*callback)(void));
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "detect_leaks=0"; } // the hooks find them
#endif

__attribute__((unused)) static void on_crash(int number) {
    if (number == SIGALRM) dprintf(STDOUT_FILENO, "it takes more than %d seconds\n", TIME_LIMIT);
    say_where();
    signal(number, SIG_DFL);
    raise(number);
}

// What is wrong with what an exit said; NULL if nothing is.
static const char *fault_of_message(void) {
    size_t begin = sizeof PROGRAM ": " - 1;
    if (said_size <= begin || said[said_size - 1] != '\n') return "no line on stderr";
    if (hooks.exit_code != 1 && hooks.exit_code != 2) return "an exit code that is neither 1 nor 2";
    for (size_t i = 0; i < said_size; i++) {
        unsigned char c = (unsigned char)said[i];
        if ((c < ' ' && c != '\n') || c == 127) return "control characters on stderr";
        unsigned char next = i + 1 < said_size ? (unsigned char)said[i + 1] : 0;
        if (c == 0xc2 && next >= 0x80 && next < 0xa0)
            return "U+0080 to U+009F on stderr";
    }
    return NULL;
}

// Runs a target. Returns what is wrong, or NULL.
static const char *run_input(const target *t, input in) {
    static jmp_buf back;
    const char *volatile problem = NULL;
    stdout = nowhere;
    hooks.round++;
    hooks.exit_to = &back;
    said_size = 0;
    reset_program();
    if (!setjmp(back)) {
        t->run(in);
        if (hooks_in_use()) problem = "memory, a stream or a mapping is left";
    } else {
        fflush(stderr);
        problem = fault_of_message();
    }
    hooks.exit_to = NULL;
    hooks_release();
    fflush(stderr);
    fflush(stdout);
    hooks.round--;
    stdout = console;
    return problem;
}

static void begin(void) {
    cookie_io_functions_t keep = {.write = keep_said}, nothing = {.write = drop};
    const char *memory = (access)("/dev/shm", W_OK) ? "/tmp" : "/dev/shm";
    snprintf(work, sizeof work, "%s/retrofit-fuzz-XXXXXX", memory);
    now.target = "set up";
    require_test(mkdtemp(work) != NULL, work);
    console = stdout;
    nowhere = fopencookie(NULL, "w", nothing);
    stderr = fopencookie(NULL, "w", keep);
    hooks.max_size = 1 << 28;
    set_up();
}

#ifdef FUZZER

// ---- As libFuzzer calls it ----------------------------------------------------------------------

static const target *chosen;

static void clean_up(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", work);
    if (system(command)) return;
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    const char *name = getenv("TARGET") ? getenv("TARGET") : targets[0].name;
    for (size_t i = 0; i < TARGETS; i++) {
        if (!strcmp(targets[i].name, name)) chosen = &targets[i];
    }
    FILE *messages = stderr;
    begin();
    atexit(clean_up);
    if (chosen) return 0;
    fprintf(messages, "no target %s\n", name);
    _exit(2);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    const char *problem = run_input(chosen, (input){(const char *)bytes, size});
    if (!problem) return 0;
    dprintf(STDERR_FILENO, "%s: %s: %.*s\n", chosen->name, problem, (int)said_size, said);
    abort();
}

#else

// ---- Seeds --------------------------------------------------------------------------------------

typedef struct {
    input inputs[MAX_SEEDS];
    size_t count;
} seed_list;

static void add_input(seed_list *list, const char *bytes, size_t size) {
    if (list->count < MAX_SEEDS && size <= MAX_FILE / 2)
        list->inputs[list->count++] = (input){bytes, size};
}

static void load_seeds(const target *t, seed_list *list) {
    list->count = 0;
    for (size_t i = 0; i < made_count; i++) {
        if (!strcmp(made[i].target, t->name))
            add_input(list, made[i].input.bytes, made[i].input.size);
    }
    for (size_t i = 0; i < 6 && t->texts[i]; i++) add_input(list, t->texts[i], strlen(t->texts[i]));
    for (size_t i = 0; i < 4 && t->patterns[i]; i++) {
        glob_t found;
        if ((glob)(t->patterns[i], 0, NULL, &found)) continue;
        for (size_t j = 0; j < found.gl_pathc && j < MAX_SEEDS / 3; j++) {
            size_t size;
            char *bytes = retrofit_read_file(found.gl_pathv[j], &size);
            if (bytes) add_input(list, bytes, size);
        }
        globfree(&found);
    }
    now.target = t->name;
    require_test(list->count > 0, "no seeds");
}

// ---- Mutants ------------------------------------------------------------------------------------

static char mutant[MAX_FILE];
static size_t mutant_size;
static uint64_t dice_key, dice_count;

static size_t dice(size_t n) { // 0 … n - 1
    return n ? (size_t)(retrofit_hash(dice_key, dice_count++) % n) : 0;
}

// Replaces `size` bytes at `at` by others.
static void replace(size_t at, size_t size, const char *bytes, size_t new_size) {
    if (mutant_size - size + new_size > MAX_FILE) return;
    memmove(mutant + at + new_size, mutant + at + size, mutant_size - at - size);
    memcpy(mutant + at, bytes, new_size);
    mutant_size += new_size - size;
}

// A place: mostly near the beginning, where headers are.
static size_t place(void) {
    size_t front = mutant_size < 2000 ? mutant_size : 2000;
    return dice(dice(4) ? front : mutant_size);
}

static size_t span_at(size_t at) {
    size_t length = 1 + dice(dice(4) ? 16 : 1000);
    return length < mutant_size - at ? length : mutant_size - at;
}

static void change_bytes(void) {
    size_t at = place();
    if (at == mutant_size) return;
    if (dice(2)) mutant[at] ^= (char)(1 << dice(8));
    else mutant[at] = (char)dice(256);
}

// An integer of 1, 2, 4 or 8 bytes that is near a limit, or a little more or less than it was.
static void change_integer(void) {
    static const uint64_t numbers[] = {0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff,
                                       0x7fffffff, 0x80000000, 0xffffffff, 0x100000000,
                                       INT64_MAX, 1ull << 63, UINT64_MAX, 1ull << 40};
    size_t size = (size_t)1 << dice(4), at = place();
    if (at + size > mutant_size) return;
    uint64_t number = 0;
    memcpy(&number, mutant + at, size);
    if (dice(3)) number = numbers[dice(sizeof numbers / sizeof *numbers)];
    else number += dice(9) - 4;
    memcpy(mutant + at, &number, size);
}

static void change_span(void) {
    char copy[1000];
    size_t at = place(), size = span_at(at);
    memcpy(copy, mutant + at, size);
    switch (dice(4)) {
    case 0: replace(at, size, "", 0); break;
    case 1: replace(place(), 0, copy, size); break;
    case 2: mutant_size = at; break;
    default:
        for (size_t i = dice(100); i > 0; i--) replace(at, 0, copy, size < 8 ? size : 8);
    }
}

static void splice_seed(const seed_list *seeds) {
    input other = seeds->inputs[dice(seeds->count)];
    size_t at = place(), from = dice(other.size), size = 1 + dice(dice(2) ? 32 : 2000);
    if (size > other.size - from) size = other.size - from;
    replace(at, dice(2) ? 0 : span_at(at), other.bytes + from, size);
}

// In a text: a number, a word or a sign becomes another.
static void change_token(void) {
    static const char *const numbers[] = {
        "0", "-1", "1", "4294967295", "4294967296", "18446744073709551615", "2147483648", "1e308",
        "1e-400", "-0.0", "9007199254740993", "00", "0x10", "65537", "1e999"};
    static const char *const words[] = {
        "null", "true", "[]", "{}", "\"\"", "[[", "]]", "{\"", "\"}", ",", ":", "\\u0000",
        "\\ud800",
        "\\", "\"", "\n", "\r\n", "\xff", "\xef\xbb\xbf", "\xe2\x96\x81", "{{", "}}", "{%", "%}",
        "{% for a in messages %}", "{% endfor %}", "{% if true %}", "{% endif %}", "|trim", "((",
        "]",
        "--", "=", "<s>", "</s>", "\1", " ", "a"};
    size_t at = place();
    while (at < mutant_size && !isalnum((unsigned char)mutant[at])) at++;
    size_t end = at;
    while (end < mutant_size && isalnum((unsigned char)mutant[end])) end++;
    if (at < end && isdigit((unsigned char)mutant[at]) && dice(4)) {
        const char *number = numbers[dice(sizeof numbers / sizeof *numbers)];
        replace(at, end - at, number, strlen(number));
        return;
    }
    const char *word = words[dice(sizeof words / sizeof *words)];
    if (dice(2)) at = place();
    replace(at, at < end && dice(2) ? end - at : 0, word, strlen(word));
}

// The mutant of this number. A header's length grows with the header in every second one.
static void make_mutant(const target *t, const seed_list *seeds, uint64_t seed, uint64_t number) {
    dice_key = retrofit_hash(seed, number);
    dice_count = 0;
    input from = seeds->inputs[dice(seeds->count)];
    memcpy(mutant, from.bytes, from.size);
    mutant_size = from.size;
    for (size_t changes = 1 + dice(dice(3) ? 3 : 12); changes > 0; changes--) {
        switch (dice(6)) {
        case 0: change_bytes(); break;
        case 1: change_integer(); break;
        case 2: change_span(); break;
        case 3: splice_seed(seeds); break;
        default: change_token();
        }
    }
    uint64_t length;
    if (!t->has_length || dice(2) || from.size < 8 || mutant_size < 8) return;
    memcpy(&length, from.bytes, 8);
    length += mutant_size - from.size;
    memcpy(mutant, &length, 8);
}

// ---- main ---------------------------------------------------------------------------------------

// From a block of its own size, so that what is read beyond it is found.
static const char *run_copy(const target *t, input in) {
    char *copy = (malloc)(in.size + !in.size);
    require_test(copy != NULL, "memory");
    memcpy(copy, in.bytes, in.size);
    now.input = (input){copy, in.size};
    alarm(TIME_LIMIT);
    const char *problem = run_input(t, now.input);
    (free)(copy);
    return problem;
}

static void run_mutants(const target *t, uint64_t seed, uint64_t first, uint64_t count) {
    static seed_list seeds;
    load_seeds(t, &seeds);
    size_t bad = 0;
    for (uint64_t i = 0; i < seeds.count + count && bad < 3; i++) {
        bool is_seed = i < seeds.count;
        if (is_seed && first) continue; // one mutant again
        if (!is_seed) make_mutant(t, &seeds, seed, first + i - seeds.count);
        now.number = is_seed ? 0 : first + i - seeds.count;
        now.seed = seed;
        const char *problem = run_copy(t, is_seed ? seeds.inputs[i] : (input){mutant, mutant_size});
        if (problem) bad++;
        check(!problem, "%s: MUTANT=%s:%llu:%llu%s: %s: %.*s", PROGRAM, t->name, now.seed,
              now.number, is_seed ? " (a seed)" : "", problem, (int)said_size, said);
    }
}

// Writes what libFuzzer starts from.
static void write_seeds(const char *directory, const target *t) {
    static seed_list seeds;
    char path[512];
    load_seeds(t, &seeds);
    snprintf(path, sizeof path, "%s/" PROGRAM "-%s", directory, t->name);
    (mkdir)(path, 0777);
    for (size_t i = 0; i < seeds.count; i++) {
        snprintf(path, sizeof path, "%s/" PROGRAM "-%s/seed%zu", directory, t->name, i);
        int fd = (open)(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
        require_test(fd >= 0 && write(fd, seeds.inputs[i].bytes, seeds.inputs[i].size) >= 0, path);
        (close)(fd);
    }
}

static void run_target(const target *t) {
    const char *seeds = getenv("SEEDS"), *file = getenv("FILE"), *one = getenv("MUTANT");
    const char *mutants = getenv("MUTANTS"), *seed = getenv("EMULATOR_SEED"); // of the day
    if (getenv("LIST")) printf("target %s\n", t->name);
    else if (seeds) write_seeds(seeds, t);
    else if (file) {
        input in;
        char *bytes = retrofit_read_file(file, &in.size);
        require_test(bytes != NULL, file);
        in.bytes = bytes;
        const char *problem = run_copy(t, in);
        check(!problem, "%s: %s: %.*s", t->name, problem, (int)said_size, said);
    } else if (one) {
        run_mutants(t, strtoull(strchr(one, ':') + 1, NULL, 10),
                    strtoull(strrchr(one, ':') + 1, NULL, 10), 1);
    } else {
        uint64_t count = mutants ? strtoull(mutants, NULL, 10) : 500;
        run_mutants(t, seed ? strtoull(seed, NULL, 10) : 1, 0, count);
    }
}

int main(void) {
#ifdef SANITIZED
    static const int signals[] = {SIGALRM};
    __sanitizer_set_death_callback(say_where);
#else
    static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM};
#endif
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) signal(signals[i], on_crash);
    begin();
    const char *name = getenv("TARGET");
    char chosen[64] = "";
    snprintf(chosen, sizeof chosen, "%s", name ? name : getenv("MUTANT") ? getenv("MUTANT") : "");
    chosen[strcspn(chosen, ":")] = 0;
    for (size_t i = 0; i < TARGETS; i++) {
        if (*chosen && strcmp(chosen, targets[i].name)) continue;
        run_target(&targets[i]);
    }
    alarm(0);
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", work);
    if (system(command)) return 1;
    return finish("fuzz " PROGRAM);
}
#endif

// What grows no faster than what it is made from: the time and the memory of reading files and
// texts of strangers. And that what is found fast is what a plain loop finds.
#include "run.h"
#include <sys/resource.h>

// ---- Measuring ---------------------------------------------------------------------------------

typedef void work(size_t n);

// Seconds of processors, ours and those of the commands that have ended.
static double used_seconds(void) {
    double seconds = 0;
    for (int i = 0; i < 2; i++) {
        struct rusage usage;
        getrusage(i ? RUSAGE_CHILDREN : RUSAGE_SELF, &usage);
        seconds += (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec);
        seconds += 1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
    }
    return seconds;
}

static double seconds_of(work *run, size_t n) {
    double begin = used_seconds();
    run(n);
    return fmax(used_seconds() - begin, 1e-5);
}

// Four times as much takes about four times as long; where each part of it is compared with each
// other part, sixteen times.
static void takes_time(const char *what, work *run, size_t n) {
    double ratio = INFINITY;
    for (int i = 0; i < 3 && ratio >= 8; i++) {
        double before = seconds_of(run, n);
        ratio = fmin(ratio, seconds_of(run, 4 * n) / before);
    }
    check(ratio < 8, "%s: %zu take %.1f times as long as %zu", what, 4 * n, ratio, n);
}

#if defined(__SANITIZE_ADDRESS__)
enum { SANITIZED = 1 };
#else
enum { SANITIZED = 0 };
#endif

// The most memory that a process has which does this.
static double memory_of(work *run, size_t n) {
    struct rusage usage;
    int status;
    fflush(stdout);
    pid_t process = fork();
    if (process == 0) {
        run(n);
        _exit(0);
    }
    bool ended = wait4(process, &status, 0, &usage) == process && status == 0;
    need(ended, "a process that measures memory");
    return 1024 * (double)usage.ru_maxrss;
}

// Bytes for each of n, which are `most` at most. Sanitizers need memory of their own.
static void takes_memory(const char *what, work *run, size_t n, double most) {
    if (SANITIZED) return;
    double bytes = (memory_of(run, 4 * n) - memory_of(run, n)) / (3 * (double)n);
    check(bytes < most, "%s: %.1f bytes of memory for one", what, bytes);
}

// ---- Tokenizers --------------------------------------------------------------------------------

// A tokenizer.json that has begun; its reader ends it.
static FILE *begin_tokenizer(const char *model) {
    mkdir("made", 0777);
    FILE *file = fopen("made/tokenizer.json", "wb");
    need(file != NULL, "made/tokenizer.json");
    fprintf(file, "{\"model\": {\"type\": \"BPE\", %s}", model);
    return file;
}

static retrofit_tokenizer *read_tokenizer(FILE *file, const char *directory) {
    if (file) need(fclose(file) == 0, "made/tokenizer.json");
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(directory);
    need(tokenizer != NULL, directory);
    return tokenizer;
}

#define NO_MERGES "\"vocab\": {\"x\": 0}, \"merges\": []"
static retrofit_tokenizer *made_with(const char *members) {
    FILE *file = begin_tokenizer(NO_MERGES);
    fprintf(file, ", %s}", members);
    return read_tokenizer(file, "made");
}

static retrofit_tokenizer *llama2, *llama3, *before, *behind, *composes;

static void read_tokenizers(void) {
#define SPACE(flag) "\"added_tokens\": [{\"id\": 1, \"content\": \" \", \"special\": true, " flag
    llama2 = read_tokenizer(NULL, "f/tokenizers/llama2_style");
    llama3 = read_tokenizer(NULL, "f/tokenizers/llama3_style");
    before = made_with(SPACE("\"lstrip\": true}]"));
    behind = made_with(SPACE("\"rstrip\": true}]"));
    composes = made_with("\"normalizer\": {\"type\": \"NFC\"}");
}

static void free_tokenizers(void) {
    retrofit_tokenizer *all[] = {llama2, llama3, before, behind, composes};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) retrofit_tokenizer_free(all[i]);
}

// The id of the token that is this byte, in the byte-level alphabet.
static int32_t byte_id(unsigned char byte) {
    char text[5] = {0};
    utf8_put(llama3->byte_to_char[byte], text);
    return retrofit_tokenizer_id(llama3, text);
}

// One token, then n times another, asked for one by one.
static void stream_of(const retrofit_tokenizer *tokenizer, int32_t first, int32_t id, size_t n) {
    int32_t *ids = retrofit_allocate(n + 1, sizeof *ids);
    retrofit_stream stream = {0};
    size_t all, size, sum = 0;
    need(ids && first >= 0 && id >= 0, "ids");
    ids[0] = first;
    for (size_t i = 1; i <= n; i++) ids[i] = id;
    for (size_t i = 1; i <= n + 1; i++) {
        char *text = retrofit_decode_next(tokenizer, &stream, ids, i, true, i == n + 1, &size);
        need(text != NULL, "a stream");
        sum += size;
        free(text);
    }
    free(retrofit_decode(tokenizer, ids, n + 1, true, &all));
    if (sum != all) check(false, "a stream of %zu bytes, not %zu", sum, all);
    free(ids);
}

static void stream_bytes(size_t n) {
    int32_t id = retrofit_tokenizer_id(llama2, "<0x41>");
    stream_of(llama2, id, id, n);
}

static void stream_special(size_t n) {
    int32_t id = retrofit_tokenizer_id(llama2, "<s>");
    stream_of(llama2, id, id, n);
}

static void stream_garbage(size_t n) { stream_of(llama3, byte_id(0x80), byte_id(0x80), n); }

static void stream_cut(size_t n) {
    stream_of(llama3, byte_id(0xe2), retrofit_tokenizer_id(llama3, "<|end_of_text|>"), n);
}

// n times the text, encoded.
static void encode_repeated(const retrofit_tokenizer *tokenizer, const char *text, size_t n) {
    size_t size = strlen(text), count;
    char *all = retrofit_allocate(n * size, 1);
    need(all != NULL, "a text");
    for (size_t i = 0; i < n * size; i++) all[i] = text[i % size];
    int32_t *ids = retrofit_encode(tokenizer, all, n * size, false, &count);
    need(ids != NULL, "a text's ids");
    free(ids);
    free(all);
}

static void encode_spaces_2(size_t n) { encode_repeated(llama2, " ", n); }
static void encode_spaces_3(size_t n) { encode_repeated(llama3, " ", n); }
static void encode_word(size_t n) { encode_repeated(llama3, "the", n); }
static void encode_lines(size_t n) { encode_repeated(llama3, "\n \t", n); }
static void encode_garbage(size_t n) { encode_repeated(llama3, "\x80\xe2", n); }
static void encode_marks(size_t n) { encode_repeated(composes, "\xcc\x81\xcc\xa3", n); }
static void strip_before(size_t n) { encode_repeated(before, " ", n); }
static void strip_behind(size_t n) { encode_repeated(behind, " ", n); }

// n added tokens that begin alike, in a text of n beginnings.
static void encode_added(size_t n) {
    FILE *file = begin_tokenizer(NO_MERGES);
    fprintf(file, ", \"added_tokens\": [");
    for (size_t i = 0; i < n; i++)
        fprintf(file, "%s{\"id\": %zu, \"content\": \"<|reserved_%zu|>\", \"special\": true}",
                i ? "," : "", i + 1, i);
    fprintf(file, "]}");
    retrofit_tokenizer *tokenizer = read_tokenizer(file, "made");
    encode_repeated(tokenizer, "<|reserved_", n);
    retrofit_tokenizer_free(tokenizer);
}

static void time_of_tokenizers(void) {
    takes_time("a stream of byte tokens", stream_bytes, 10000);
    takes_time("a stream of special tokens", stream_special, 20000);
    takes_time("a stream that is no UTF-8", stream_garbage, 10000);
    takes_time("a stream that stops in a character", stream_cut, 20000);
    takes_time("spaces, one word", encode_spaces_2, 20000);
    takes_time("spaces", encode_spaces_3, 20000);
    takes_time("a long word", encode_word, 20000);
    takes_time("empty lines", encode_lines, 20000);
    takes_time("a text that is no UTF-8", encode_garbage, 20000);
    takes_time("marks without letters", encode_marks, 20000);
    takes_time("tokens that take the spaces before them", strip_before, 20000);
    takes_time("tokens that take the spaces behind them", strip_behind, 20000);
    takes_time("added tokens", encode_added, 4000);
}

// ---- What plain loops find ---------------------------------------------------------------------

enum { MOST_TOKENS = 40, MOST_LENGTH = 12, TEXT = 60 };
typedef struct {
    char text[MOST_LENGTH + 1];
} short_text;

static size_t find_text(const short_text *texts, size_t count, const char *text) {
    size_t i = 0;
    while (i < count && strcmp(texts[i].text, text)) i++;
    return i;
}

static void random_text(char *out, size_t length, uint32_t letters) {
    for (size_t i = 0; i < length; i++) out[i] = (char)('a' + random_below(letters));
    out[length] = 0;
}

static void same_ids(const retrofit_tokenizer *tokenizer, const char *text, const int32_t *expected,
                     size_t expected_count) {
    size_t count;
    int32_t *ids = retrofit_encode(tokenizer, text, strlen(text), false, &count);
    bool same = ids && count == expected_count && !memcmp(ids, expected, count * sizeof *ids);
    check(same, "other ids of %s", text);
    free(ids);
}

// Of the added tokens that stand at one place the longest is taken.
static size_t plain_added(const short_text *tokens, size_t count, const char *text, int32_t *ids) {
    size_t found = 0;
    for (const char *at = text; *at;) {
        size_t longest = 0, id = 0;
        for (size_t i = 0; i < count; i++) {
            size_t length = strlen(tokens[i].text);
            if (length <= longest || strncmp(at, tokens[i].text, length)) continue;
            longest = length;
            id = i + 1;
        }
        if (longest) ids[found++] = (int32_t)id;
        at += longest ? longest : 1;
    }
    return found;
}

static void random_added(void) {
    short_text tokens[MOST_TOKENS];
    size_t count = 0, wanted = 1 + random_below(MOST_TOKENS);
    FILE *file = begin_tokenizer(NO_MERGES);
    fprintf(file, ", \"added_tokens\": [");
    for (size_t i = 0; i < wanted; i++) {
        random_text(tokens[count].text, 1 + random_below(MOST_LENGTH), 2);
        if (find_text(tokens, count, tokens[count].text) < count) continue;
        fprintf(file, "%s{\"id\": %zu, \"content\": \"%s\", \"special\": true}", count ? "," : "",
                count + 1, tokens[count].text);
        count++;
    }
    fprintf(file, "]}");
    retrofit_tokenizer *tokenizer = read_tokenizer(file, "made");
    for (int i = 0; i < 50; i++) {
        char text[TEXT + 1];
        int32_t ids[TEXT];
        random_text(text, random_below(TEXT + 1), 2 + random_below(2));
        same_ids(tokenizer, text, ids, plain_added(tokens, count, text, ids));
    }
    retrofit_tokenizer_free(tokenizer);
}

typedef struct {
    size_t left, right, both; // ids
} plain_merge;

// As long as there is a merge, the lowest is made, where it comes first.
static size_t merge_plainly(const plain_merge *merges, size_t count, int32_t *ids, size_t length) {
    for (;;) {
        size_t best = count, at = 0;
        for (size_t i = 0; i + 1 < length; i++) {
            size_t m = 0;
            while (m < best && ((size_t)ids[i] != merges[m].left ||
                                (size_t)ids[i + 1] != merges[m].right))
                m++;
            if (m < best) at = i;
            best = m;
        }
        if (best == count) return length;
        ids[at] = (int32_t)merges[best].both;
        length--;
        memmove(ids + at + 1, ids + at + 2, (length - at - 1) * sizeof *ids);
    }
}

// Merges of letters, and of what they make. Returns how many there are.
static size_t random_merges(plain_merge *merges, short_text *tokens, size_t *token_count) {
    size_t count = 0;
    for (size_t i = 0; i < MOST_TOKENS && *token_count < MOST_TOKENS; i++) {
        char text[2 * MOST_LENGTH + 1];
        plain_merge merge = {random_below((uint32_t)*token_count),
                             random_below((uint32_t)*token_count), 0};
        bool is_new = true;
        for (size_t m = 0; m < count; m++)
            is_new = is_new && (merges[m].left != merge.left || merges[m].right != merge.right);
        snprintf(text, sizeof text, "%s%s", tokens[merge.left].text, tokens[merge.right].text);
        if (!is_new || strlen(text) > MOST_LENGTH) continue;
        merge.both = find_text(tokens, *token_count, text);
        if (merge.both == *token_count) strcpy(tokens[(*token_count)++].text, text);
        merges[count++] = merge;
    }
    return count;
}

static void random_pairs(void) {
    short_text tokens[MOST_TOKENS] = {{"a"}, {"b"}, {"c"}};
    plain_merge merges[MOST_TOKENS];
    size_t token_count = 3, count = random_merges(merges, tokens, &token_count);
    char model[8192] = "\"vocab\": {";
    size_t at = strlen(model);
    for (size_t i = 0; i < token_count; i++)
        at += (size_t)sprintf(model + at, "%s\"%s\": %zu", i ? "," : "", tokens[i].text, i);
    at += (size_t)sprintf(model + at, "}, \"merges\": [");
    for (size_t i = 0; i < count; i++)
        at += (size_t)sprintf(model + at, "%s[\"%s\", \"%s\"]", i ? "," : "",
                              tokens[merges[i].left].text, tokens[merges[i].right].text);
    strcpy(model + at, "]");
    FILE *file = begin_tokenizer(model);
    fputc('}', file);
    retrofit_tokenizer *tokenizer = read_tokenizer(file, "made");
    for (int i = 0; i < 50; i++) {
        char text[TEXT + 1];
        int32_t ids[TEXT];
        size_t length = random_below(TEXT + 1);
        random_text(text, length, 1 + random_below(3));
        for (size_t j = 0; j < length; j++) ids[j] = text[j] - 'a';
        same_ids(tokenizer, text, ids, merge_plainly(merges, count, ids, length));
    }
    retrofit_tokenizer_free(tokenizer);
}

// ---- JSON --------------------------------------------------------------------------------------

static retrofit_json *parse(char *text, size_t size) {
    retrofit_json *root = retrofit_json_parse(text, size, "made");
    free(text);
    return root;
}

// n values: [0,0, … ,0]
static retrofit_json *parse_array(size_t n) {
    char *text = retrofit_allocate(2 * n + 1, 1);
    need(text != NULL, "a text");
    for (size_t i = 0; i < n; i++) memcpy(text + 2 * i, ",0", 2);
    text[0] = '[';
    text[2 * n] = ']';
    return parse(text, 2 * n + 1);
}

static void json_array(size_t n) {
    retrofit_json *root = parse_array(n);
    need(root && root->count == n, "an array");
    retrofit_json_free(root);
}

// A string of n commas, which are no values.
static void json_commas(size_t n) {
    char *text = retrofit_allocate(n + 4, 1);
    need(text != NULL, "a text");
    memset(text, ',', n + 4);
    memcpy(text, "[\"", 2);
    memcpy(text + n + 2, "\"]", 2);
    retrofit_json *root = parse(text, n + 4);
    need(root && root->child->length == n, "a string");
    retrofit_json_free(root);
}

static void json_members(size_t n) {
    retrofit_text text = {0};
    for (size_t i = 0; i < n; i++) {
        char member[64];
        int size = sprintf(member, "%c\"member %zu\":0", i ? ',' : '{', i * 7919 % n);
        retrofit_text_append(&text, member, (size_t)size);
    }
    retrofit_text_append(&text, "}", 1);
    retrofit_json *root = parse(text.bytes, text.size);
    need(root && root->count == n, "an object");
    retrofit_json_free(root);
}

static void reading_json(void) {
    takes_time("members of an object", json_members, 20000);
    takes_time("an array", json_array, 100000);
    const char *error = "more than 16777216 values";
    check(!parse_array(16777217) && strstr(retrofit_error(), error), "%s: read", error);
    char *text = strdup("[\"\\\\\", \",\\\"\", [\",\"]]");
    retrofit_json *root = parse(text, strlen(text));
    check(root && root->count == 3, "quotes within strings: %s", retrofit_error());
    retrofit_json_free(root);
}

// Before all else: what was freed before is there to be used again, and would hide what is needed.
static void memory(void) {
    takes_memory("a space of one word", encode_spaces_2, 250000, 21);
    takes_memory("a space", encode_spaces_3, 250000, 21);
    takes_memory("a value of JSON", json_array, 250000, 64);
    takes_memory("a comma in a string of JSON", json_commas, 1000000, 4);
}

// ---- Tensors -----------------------------------------------------------------------------------

// A model of n small layers. A tensor of a model has its place by its name.
static void load_layers(size_t n) {
    FILE *file = fopen("shape.json", "wb");
    need(file != NULL, "shape.json");
    fprintf(file, "{\"model_type\": \"llama\", \"hidden_size\": 2, \"num_attention_heads\": 1, "
                  "\"intermediate_size\": 1, \"vocab_size\": 8, \"num_hidden_layers\": %zu}", n);
    fclose(file);
    works("rm -rf layers && convert --random shape.json --to layers");
}

// The same for a GGUF: names, and what is of each layer.
static void put(FILE *file, uint64_t number, size_t size) { fwrite(&number, size, 1, file); }

static void put_name(FILE *file, const char *name) {
    put(file, strlen(name), 8);
    fputs(name, file);
}

static void put_key(FILE *file, const char *key, uint64_t number) {
    bool is_float = number >> 32;
    put_name(file, key);
    put(file, is_float ? 6 : 4, 4);
    put(file, (uint32_t)number, 4);
}

static uint64_t data_size; // of the tensors up to now, each in 32 or 64 bytes

static void put_tensor(FILE *file, const char *name, uint64_t cols, uint64_t rows) {
    put_name(file, name);
    put(file, rows ? 2 : 1, 4);
    put(file, cols, 8);
    if (rows) put(file, rows, 8);
    put(file, 0, 4);
    put(file, data_size, 8);
    data_size += rows > 2 ? 64 : 32;
}

static void put_layer(FILE *file, size_t number) {
    static const struct {
        const char *name;
        uint64_t cols, rows;
    } tensors[] = {{"attn_norm", 2, 0}, {"attn_q", 2, 2}, {"attn_k", 2, 2}, {"attn_v", 2, 2},
                   {"attn_output", 2, 2}, {"ffn_norm", 2, 0}, {"ffn_gate", 2, 1}, {"ffn_up", 2, 1},
                   {"ffn_down", 1, 2}};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        char name[64];
        snprintf(name, sizeof name, "blk.%zu.%s.weight", number, tensors[i].name);
        put_tensor(file, name, tensors[i].cols, tensors[i].rows);
    }
}

static void read_gguf(size_t n) {
    FILE *file = fopen("made.gguf", "wb");
    need(file != NULL, "made.gguf");
    fwrite("GGUF", 4, 1, file);
    put(file, 3, 4);
    put(file, 2 + 9 * n, 8);
    put(file, 7, 8);
    put_name(file, "general.architecture");
    put(file, 8, 4);
    put_name(file, "llama");
    put_key(file, "llama.embedding_length", 2);
    put_key(file, "llama.attention.head_count", 1);
    put_key(file, "llama.block_count", n);
    put_key(file, "llama.feed_forward_length", 1);
    put_key(file, "llama.context_length", 16);
    put_key(file, "llama.attention.layer_norm_rms_epsilon", 1ull << 32 | 0x3727c5ac); // 1e-5
    data_size = 0;
    put_tensor(file, "token_embd.weight", 2, 8);
    put_tensor(file, "output_norm.weight", 2, 0);
    for (size_t i = 0; i < n; i++) put_layer(file, i);
    while (ftell(file) % 32) fputc(0, file);
    for (size_t i = 0; i < data_size / 4; i++) put(file, 0x3f800000, 4); // 1
    fclose(file);
    works("! convert --from made.gguf --to bad 2>why && grep -q 'tokenizer.ggml.model is' why");
}

// ---- Chat templates ----------------------------------------------------------------------------

// Looking for a letter in a text of 4 MB takes the time of thousands of steps.
static void long_texts(void) {
    shell("mkdir -p chat && cp f/tokenizers/smollm_style/*.json chat");
    FILE *file = fopen("chat/chat_template.jinja", "wb");
    need(file != NULL, "chat_template.jinja");
    fputs("{% set t = 'abcd' %}", file);
    for (int i = 0; i < 20; i++) fputs("{% set t = t + t %}", file);
    for (int i = 0; i < 4; i++) fputs("{% for x in [1, 2, 3, 4, 5, 6, 7, 8] %}", file);
    fputs("{% if 'x' in t %}{% endif %}", file);
    for (int i = 0; i < 4; i++) fputs("{% endfor %}", file);
    fclose(file);
    fails(1, "too much time", "infer --tokenizer chat --print-tokens --chat --prompt a");
}

// White space behind a template's n words.
static void spaces_behind(size_t n) {
    FILE *file = fopen("chat/chat_template.jinja", "wb");
    need(file != NULL, "chat_template.jinja");
    for (size_t i = 0; i < n; i++) fputs("{{ '' }}", file);
    fputs("{% for m in messages %}{{ m.content }}{% endfor %}", file);
    for (size_t i = 0; i < 4 * n; i++) fputc(' ', file);
    fclose(file);
    works("infer --tokenizer chat --print-tokens --chat --prompt a");
}

// A template of a tokenizer names few special tokens, since each has an id.
static void template_without_ids(void) {
    FILE *file = begin_tokenizer(NO_MERGES);
    fputs(", \"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": ["
          "{\"SpecialToken\": {\"id\": \"x\"}}, {\"Sequence\": {\"id\": \"A\"}}], "
          "\"special_tokens\": {\"x\": {\"ids\": []}}}}", file);
    fclose(file);
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load("made");
    check(!tokenizer && strstr(retrofit_error(), "without an id"), "a SpecialToken without an id");
}

int main(void) {
    enter("scale");
    read_tokenizers();
    memory();
    time_of_tokenizers();
    for (int i = 0; i < 40; i++) {
        random_added();
        random_pairs();
    }
    reading_json();
    takes_time("layers of a model", load_layers, 512);
    takes_time("layers of a GGUF", read_gguf, 512);
    long_texts();
    takes_time("white space behind a chat template", spaces_behind, 2000);
    template_without_ids();
    free_tokenizers();
    return leave("scale");
}

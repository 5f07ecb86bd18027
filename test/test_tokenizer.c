// The JSON reader and the tokenizer: Hugging Face's own ids for some hundred texts, streams,
// damaged files, and what must be refused.
#include "test.h"

static bool same_ids(const int32_t *ids, size_t count, const retrofit_json *expected) {
    if (!ids || expected->count != count) return false;
    const retrofit_json *id = expected->child;
    for (size_t i = 0; i < count; i++) {
        if (ids[i] != (int32_t)id->number) return false;
        id = id->next;
    }
    return true;
}

// Streaming must give the same bytes as decoding at once, and every text must be valid UTF-8.
static void check_stream(const retrofit_tokenizer *tokenizer, const int32_t *ids, size_t count,
                         bool skip_special) {
    size_t size, at = 0, n;
    char *all = retrofit_decode(tokenizer, ids, count, skip_special, &size);
    retrofit_stream stream = {0};
    bool ok = all != NULL;
    for (size_t i = 1; ok && i <= count; i++) {
        bool last = i == count;
        char *text = retrofit_decode_next(tokenizer, &stream, ids, i, skip_special, last, &n);
        ok = text && at + n <= size && !memcmp(all + at, text, n);
        at += n;
        free(text);
    }
    check(ok && at == size, "stream: %zu of %zu bytes: %s", at, size, retrofit_error());
    free(all);
}

// One of cases.json's {text, ids, ids_with_special, decoded}.
static void run_case(const retrofit_tokenizer *tokenizer, const retrofit_json *c,
                     const char *directory) {
    const retrofit_json *text = retrofit_json_get(c, "text");
    const retrofit_json *expected = retrofit_json_get(c, "ids");
    const retrofit_json *expected_special = retrofit_json_get(c, "ids_with_special");
    const retrofit_json *decoded = retrofit_json_get(c, "decoded");
    size_t count, special_count, size;
    int32_t *ids = retrofit_encode(tokenizer, text->string, text->length, false, &count);
    check(same_ids(ids, count, expected), "%s: ids of \"%s\" (%s)", directory, text->string,
          ids ? "" : retrofit_error());
    int32_t *special = retrofit_encode(tokenizer, text->string, text->length, true, &special_count);
    check(same_ids(special, special_count, expected_special), "%s: ids_with_special of \"%s\"",
          directory, text->string);
    char *back = ids ? retrofit_decode(tokenizer, ids, count, true, &size) : NULL;
    check(back && size == decoded->length && !memcmp(back, decoded->string, size),
          "%s: \"%s\" decoded \"%s\"", directory, decoded->string, back ? back : "");
    if (ids) {
        check_stream(tokenizer, ids, count, true);
        check_stream(tokenizer, ids, count, false);
    }
    free(ids);
    free(special);
    free(back);
}

static void run_cases(const char *directory, const char *name) {
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(directory);
    check(tokenizer != NULL, "%s: %s", directory, retrofit_error());
    size_t size, failed_before = failed;
    char path[RETROFIT_PATH], *text = NULL;
    if (retrofit_path(path, directory, name)) text = retrofit_read_file(path, &size);
    retrofit_json *cases = text ? retrofit_json_parse(text, size, name) : NULL;
    check(cases != NULL, "%s: %s", name, retrofit_error());
    if (!tokenizer || !cases) return;
    for (const retrofit_json *c = cases->child; c; c = c->next) run_case(tokenizer, c, directory);
    printf("%s: %u cases, %zu failures\n", directory, cases->count, failed - failed_before);
    retrofit_json_free(cases);
    retrofit_tokenizer_free(tokenizer);
    free(text);
}

static size_t random_text(char *out, size_t characters) {
    // clang-format off
    static const char *const often[] = {
        " ", "  ", "\n", "\r\n", "'s", "'LL", "the", "a", "1", "23", "é", "\t", ".", "!", "<s>",
        "\xc2\xa0", "日", "<|im_end|>", "\xef\xbf\xbd"};
    // clang-format on
    size_t n = 0;
    for (size_t i = 0; i < characters; i++) {
        uint32_t kind = random_below(4);
        uint32_t c = random_below(kind == 0 ? 0x110000 : kind == 1 ? 0x3000 : 0x80);
        if (kind == 3) {
            const char *text = often[random_below(sizeof often / sizeof *often)];
            memcpy(out + n, text, strlen(text));
            n += strlen(text);
        } else if (c < 0xd800 || c > 0xdfff) n += utf8_put(c, out + n);
    }
    return n;
}

static void round_trips(const char *directory, int times) {
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(directory);
    for (int i = 0; tokenizer && i < times; i++) {
        char text[1024];
        size_t size = random_text(text, random_below(60)), n, m;
        int32_t *ids = retrofit_encode(tokenizer, text, size, false, &n);
        char *back = ids ? retrofit_decode(tokenizer, ids, n, false, &m) : NULL;
        check(back && m == size && !memcmp(back, text, size), "%s: round trip of \"%.*s\"",
              directory, (int)size, text);
        if (ids) check_stream(tokenizer, ids, n, true);
        free(ids);
        free(back);

        char garbage[64]; // not UTF-8
        for (size_t k = 0; k < sizeof garbage; k++) garbage[k] = (char)random_below(256);
        ids = retrofit_encode(tokenizer, garbage, random_below(sizeof garbage), true, &n);
        check(ids != NULL, "%s", retrofit_error());
        free(ids);

        int32_t some[40]; // ids in no order: parts of characters
        uint32_t tokens = (uint32_t)retrofit_tokenizer_size(tokenizer);
        for (size_t k = 0; k < 40; k++) some[k] = (int32_t)random_below(tokens);
        check_stream(tokenizer, some, 40, i & 1);
    }
    retrofit_tokenizer_free(tokenizer);
}

static void json_accepted(void) {
    // clang-format off
    static const char *const good[] = {
        "0", " -0.0e+1 ", "[]", "{}", "\"\"", "[1,2 ,\n3]", "{\"a\":{\"b\":[null,true,false]}}",
        "\"\\u0000\\ud83d\\ude00\\/\"", "1e-999", "\"\x7f\"", "{\"a\":1,\"b\":{\"a\":2}}"};
    // clang-format on
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        retrofit_json *value = retrofit_json_parse(good[i], strlen(good[i]), "good");
        check(value != NULL, "%s: %s", good[i], retrofit_error());
        retrofit_json_free(value);
    }
}

static void json_refused(void) {
    // clang-format off
    static const char *const bad[] = {
        "", " ", "01", "-", "1.", ".5", "1e", "+1", "[1,]", "[,]", "{\"a\"}", "{\"a\":}", "{a:1}",
        "{\"a\":1,}", "\"", "\"\\", "\"\\\"", "\"\\x\"", "\"\\u12\"", "\"\\ud800\"", "\"\\udc00\"",
        "\"\\ud800\\u0041\"", "\"\n\"", "\"\xff\"", "\"\xc0\x80\"", "\"\xed\xa0\x80\"",
        "\"\xf4\x90\x80\x80\"", "nul", "truex", "[1 2]", "1 2", "[}", "NaN", "1e999",
        "\xef\xbb\xbf{}", "'a'", "[1", "{\"a\":1", "\"\\ud800\\\"", "0x1", "tru", "// c\n1",
        "{\"a\":1,\"a\":2}"};
    // clang-format on
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        size_t n = strlen(bad[i]);
        char *exact = malloc(n + !n); // no NUL behind it, so that ASan sees a read past the end
        memcpy(exact, bad[i], n);
        retrofit_json *value = retrofit_json_parse(exact, n, "bad");
        check(!value, "accepted %s", bad[i]);
        retrofit_json_free(value);
        free(exact);
    }
}

static void json_depth(void) {
    char deep[131];
    memset(deep, '[', 65);
    memset(deep + 65, ']', 65);
    check(!retrofit_json_parse(deep, 130, "deep"), "65 levels");
    retrofit_json *value = retrofit_json_parse(deep + 1, 128, "deep");
    check(value != NULL, "64 levels: %s", retrofit_error());
    retrofit_json_free(value);
}

static void json_values(void) {
    const char *text = "{\"k\\u0000\":1,\"k\":[0.1,123456789012345678,\"\\ud83d\\ude00\\u0000x\"]}";
    retrofit_json *value = retrofit_json_parse(text, strlen(text), "x");
    const retrofit_json *k = retrofit_json_get(value, "k");
    check(k && k->count == 3 && k->child->number == 0.1 &&
              !strcmp(k->child->next->string, "123456789012345678"),
          "values");
    const retrofit_json *third = k ? k->child->next->next : NULL;
    check(third && third->length == 6 && !memcmp(third->string, "\xf0\x9f\x98\x80\0x", 7),
          "strings");
    check(!retrofit_json_get(NULL, "k") && !retrofit_json_get(k, "k") &&
              !retrofit_json_get(value, "q"),
          "absent");
    retrofit_json_free(value);
}

static void json_writing(void) {
    FILE *file = tmpfile();
    char all[128], read_back[2048];
    for (int i = 0; i < 128; i++) all[i] = (char)i;
    retrofit_json_write_string(file, all, 128);
    rewind(file);
    size_t n = fread(read_back, 1, sizeof read_back, file);
    retrofit_json *value = retrofit_json_parse(read_back, n, "written");
    check(value && value->length == 128 && !memcmp(value->string, all, 128), "written string");
    retrofit_json_free(value);
    fclose(file);
}

static void write_file(const char *path, const char *bytes, size_t n) {
    FILE *file = fopen(path, "wb");
    fwrite(bytes, 1, n, file);
    fclose(file);
}

static bool one_line(const char *text) {
    while (*text && (unsigned char)*text >= 32 && *text != 127) text++;
    return !*text;
}

// Loads a damaged tokenizer and uses it, if it still loads, which counts in *loaded.
static void try_load(const char *directory, size_t *loaded) {
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(directory);
    bool has_error = strlen(retrofit_error()) > 10 && one_line(retrofit_error());
    check(tokenizer || has_error, "not an error of one line: %s", retrofit_error());
    if (!tokenizer) return;
    ++*loaded;
    char text[1024];
    size_t size = random_text(text, 30), n, m;
    int32_t *ids = retrofit_encode(tokenizer, text, size, true, &n);
    char *back = ids ? retrofit_decode(tokenizer, ids, n, true, &m) : NULL;
    free(ids);
    free(back);
    retrofit_tokenizer_free(tokenizer);
}

// Half of the changes are near the beginning, where the structure is, outside of the vocabulary.
static void damage(char *text, size_t size) {
    static const char likely[] = "{}[]\",:0123456789 \\-e";
    bool anywhere = random_below(2);
    size_t at = random_below((uint32_t)(anywhere ? size : retrofit_min(size, 1800)));
    if (random_below(2)) text[at] = (char)(text[at] ^ (1 << random_below(8)));
    else text[at] = likely[random_below(sizeof likely - 1)];
}

// A file cut short at every `stride`th byte, and files with one to three characters changed.
static void hostile(const char *directory, size_t stride, int changes) {
    char work[] = "/tmp/tok_hostile_XXXXXX", path[RETROFIT_PATH], *text = NULL;
    need(mkdtemp(work) != NULL, work);
    size_t size = 0, loaded = 0, whole = 0;
    if (retrofit_path(path, directory, "tokenizer.json")) text = retrofit_read_file(path, &size);
    need(text && retrofit_path(path, work, "tokenizer.json"), directory);
    for (size_t n = 0; n < size; n += stride) {
        write_file(path, text, n);
        try_load(work, &whole);
    }
    check(whole <= 1, "truncated files were accepted"); // without a final newline it is whole
    for (int i = 0; i < changes; i++) {
        char *copy = malloc(size);
        memcpy(copy, text, size);
        for (uint32_t k = 1 + random_below(3); k > 0; k--) damage(copy, size);
        write_file(path, copy, size);
        try_load(work, &loaded);
        free(copy);
    }
    printf("%s: %d random changes, %zu still load\n", directory, changes, loaded);
    unlink(path);
    rmdir(work);
    free(text);
}

// The parts of a tokenizer that the tests below vary: those of tokenizer.json, and the members of
// tokenizer_config.json and special_tokens_map.json, which are not there without any.
enum {
    NORMALIZER,
    PRE_TOKENIZER,
    DECODER,
    POST_PROCESSOR,
    ADDED_TOKENS,
    MODEL,
    CONFIG,
    MAP,
    ADDED_JSON,
    PARTS
};

static void write_text(const char *directory, const char *name, const char *text) {
    char path[RETROFIT_PATH];
    need(retrofit_path(path, directory, name), name);
    write_file(path, text, strlen(text));
}

// OLMo-2's pattern in GPT-4's spelling, of which tokenizer_fixtures.py says that it cuts alike.
static void gpt4_spelling(void) {
    static const char olmo2[] = FIXTURES "tokenizers/olmo2_style", regex[] = "\"Regex\": \"";
    static const char gpt4[] =
        "'(?i:[sdmt]|ll|ve|re)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?+\\\\p{L}+|\\\\p{N}{1,3}"
        "| ?[^\\\\s\\\\p{L}\\\\p{N}]++[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]|\\\\s+(?!\\\\S)|\\\\s+";
    static const char *const files[] = {"tokenizer.json", "tokenizer_config.json", "cases.json"};
    char work[] = "/tmp/tok_gpt4_XXXXXX", path[RETROFIT_PATH];
    need(mkdtemp(work) != NULL, work);
    for (size_t i = 0; i < 3; i++) {
        size_t size;
        char *text = retrofit_path(path, olmo2, files[i]) ? retrofit_read_file(path, &size) : NULL;
        need(text != NULL, files[i]);
        char *pattern = i == 0 ? strstr(text, regex) : NULL, *all = text;
        need(i > 0 || pattern, "a pattern in tokenizer.json");
        if (pattern) {
            pattern += strlen(regex);
            all = malloc(size + sizeof gpt4);
            need(all != NULL, "memory");
            sprintf(all, "%.*s%s%s", (int)(pattern - text), text, gpt4, strchr(pattern, '"'));
            free(text);
        }
        write_text(work, files[i], all);
        free(all);
    }
    run_cases(work, "cases.json");
    for (size_t i = 0; i < 3; i++)
        if (retrofit_path(path, work, files[i])) unlink(path);
    rmdir(work);
}

// Appends a member of the model, unless `members` has one of this name.
static void usual_member(char *text, size_t size, const char *members, const char *key,
                         const char *value) {
    char name[40];
    snprintf(name, sizeof name, "\"%s\":", key);
    if (strstr(members, name)) return;
    size_t n = strlen(text);
    snprintf(text + n, size - n, "%s%s%s", n ? "," : "", name, value);
}

// Loads a tokenizer of these parts, each JSON or NULL for the usual one. The members in MODEL, with
// a comma behind each, take the place of the usual ones of their names.
static retrofit_tokenizer *load_parts(const char *const parts[PARTS]) {
    static const char *const files[PARTS] = {
        [CONFIG] = "tokenizer_config.json",
        [MAP] = "special_tokens_map.json",
        [ADDED_JSON] = "added_tokens.json",
    };
    char work[] = "/tmp/tok_parts_XXXXXX", path[RETROFIT_PATH], text[4096], model[2048] = "";
    need(mkdtemp(work) != NULL, work);
    const char *usual[PARTS] = {"null", "null", "null", "null", "", ""};
    for (int i = 0; i < PARTS; i++)
        if (parts[i]) usual[i] = parts[i];
    usual_member(model, sizeof model, usual[MODEL], "type", "\"BPE\"");
    usual_member(model, sizeof model, usual[MODEL], "vocab",
                 "{\"a\":0,\"b\":1,\"▁\":2,\"ab\":3,\"<s>\":4,\"c\":5,\"▁c\":6,\"Ġ\":7}");
    usual_member(model, sizeof model, usual[MODEL], "merges", "[[\"a\",\"b\"],\"▁ c\"]");
    snprintf(text, sizeof text,
             "{\"normalizer\":%s,\"pre_tokenizer\":%s,\"decoder\":%s,\"post_processor\":%s,"
             "\"added_tokens\":[%s],\"model\":{%s%s}}",
             usual[NORMALIZER], usual[PRE_TOKENIZER], usual[DECODER], usual[POST_PROCESSOR],
             usual[ADDED_TOKENS], usual[MODEL], model);
    write_text(work, "tokenizer.json", text);
    for (int i = CONFIG; i < PARTS; i++) {
        snprintf(text, sizeof text, "{%s}", parts[i] ? parts[i] : "");
        if (parts[i]) write_text(work, files[i], text);
    }
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(work);
    if (retrofit_path(path, work, "tokenizer.json")) unlink(path);
    for (int i = CONFIG; i < PARTS; i++)
        if (retrofit_path(path, work, files[i])) unlink(path);
    rmdir(work);
    return tokenizer;
}

// All usual but one.
static retrofit_tokenizer *load_part(int part, const char *json) {
    const char *parts[PARTS] = {NULL};
    parts[part] = json;
    return load_parts(parts);
}

// clang-format off
#define NFC "{\"type\":\"NFC\"}"
#define METASPACE(scheme, split) \
    "{\"type\":\"Metaspace\",\"replacement\":\"▁\",\"prepend_scheme\":\"" scheme "\"," \
    "\"split\":" split "}"
#define PREFIX_BYTES "{\"type\":\"ByteLevel\",\"add_prefix_space\":true}"
#define CLASS(name, more) "\"tokenizer_class\":\"" name "\"" more
#define RUNS "{\"type\":\"Digits\",\"individual_digits\":false}"
#define DIGITS "{\"type\":\"Digits\",\"individual_digits\":true}"
#define GPT2 \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\\\p{L}+| ?\\\\p{N}+| ?[^\\\\s\\\\p{L}\\\\p{N}]+|" \
    "\\\\s+(?!\\\\S)|\\\\s+"
#define SPLIT(pattern, behavior, invert) \
    "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" pattern "\"}," \
    "\"behavior\":\"" behavior "\",\"invert\":" invert "}"
#define SPLIT_GPT2 SPLIT(GPT2, "Isolated", "false")
#define SEQUENCE(list, steps) "{\"type\":\"Sequence\",\"" list "\":[" steps "]}"
#define PREPEND "{\"type\":\"Prepend\",\"prepend\":\"▁\"}"
#define REPLACE "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"▁\"}"
#define UNREPLACE "{\"type\":\"Replace\",\"pattern\":{\"String\":\"▁\"},\"content\":\" \"}"
#define STRIP(content, start, stop) \
    "{\"type\":\"Strip\",\"content\":\"" content "\",\"start\":" start ",\"stop\":" stop "}"
#define FUSE "{\"type\":\"Fuse\"}"
#define UNBYTES "{\"type\":\"ByteLevel\"}"
#define GPT2_BYTES "{\"type\":\"ByteLevel\",\"add_prefix_space\":false}"
#define BYTES "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}"
#define ADDED(id, content, more) "{\"id\":" id ",\"content\":\"" content "\"" more "}"
#define TEMPLATE(ids, rest) \
    "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}}" rest "]," \
    "\"special_tokens\":{\"x\":{\"ids\":[" ids "]}}}"
#define TEXT ",{\"Sequence\":{\"id\":\"A\"}}"
#define UNSUPPORTED "this step is unsupported (or its settings, or its place):"
// clang-format on

// clang-format off
static const struct {
    int part;
    const char *json, *error; // no error: this loads
} part_tries[] = {
    {NORMALIZER, "{\"type\":\"NFKC\"}", UNSUPPORTED " \"NFKC\""},
    {NORMALIZER, "[1]", "\"type\""},
    {NORMALIZER, SEQUENCE("normalizers", "[1]"), "\"type\""},
    {NORMALIZER, "{\"type\":\"NFD\"}", UNSUPPORTED " \"NFD\""},
    {NORMALIZER, "{\"type\":\"Lowercase\"}", UNSUPPORTED " \"Lowercase\""},
    {NORMALIZER, "{\"type\":\"StripAccents\"}", UNSUPPORTED " \"StripAccents\""},
    {NORMALIZER, SEQUENCE("normalizers", PREPEND "," NFC), UNSUPPORTED " \"NFC\""},
    {NORMALIZER, "{\"type\":\"NF\\u000aC\\u007f\\u0000\"}", "\"NF?C?\""},
    {NORMALIZER, SEQUENCE("normalizers", PREPEND "," REPLACE), NULL},
    {NORMALIZER, SEQUENCE("normalizers", ""), NULL},
    {NORMALIZER, SEQUENCE("normalizers", PREPEND "," PREPEND), UNSUPPORTED " \"Prepend\""},
    {NORMALIZER, SEQUENCE("normalizers", REPLACE "," PREPEND), "\"Prepend\""},
    {NORMALIZER, "{\"type\":\"Prepend\",\"prepend\":\"_\"}", "\"Prepend\""},
    {NORMALIZER, UNREPLACE, "\"Replace\""},
    {NORMALIZER, "{\"type\":\"Replace\",\"pattern\":{\"Regex\":\" \"},\"content\":\"▁\"}",
     "\"Replace\""},
    {NORMALIZER, "[]", "\"type\""},
    {NORMALIZER, "1", "\"type\""},
    {PRE_TOKENIZER, "{\"type\":\"Metaspace\",\"replacement\":\"_\"}",
     "\"Metaspace\", replacement _"},
    {PRE_TOKENIZER, METASPACE("no", "true"), "\"no\""},
    {PRE_TOKENIZER, SEQUENCE("pretokenizers", METASPACE("never", "true") "," DIGITS), "together"},
    {PRE_TOKENIZER,
     "{\"type\":\"Metaspace\",\"replacement\":\"▁\",\"add_prefix_space\":false}", "\"always\""},
    {PRE_TOKENIZER, "{\"type\":\"Whitespace\"}", UNSUPPORTED " \"Whitespace\""},
    {PRE_TOKENIZER, SEQUENCE("pretokenizers", RUNS "," DIGITS), "together"},
    {PRE_TOKENIZER, UNBYTES, "\"ByteLevel\""},
    {PRE_TOKENIZER, SPLIT_GPT2, NULL},
    {PRE_TOKENIZER, SPLIT(GPT2, "Removed", "false"), "\"Split\": \"Removed\""},
    {PRE_TOKENIZER, SPLIT(GPT2, "MergedWithNext", "false"), "\"Split\": \"MergedWithNext\""},
    {PRE_TOKENIZER, SPLIT(GPT2, "Contiguous", "false"), "\"Split\": \"Contiguous\""},
    {PRE_TOKENIZER, SPLIT(GPT2, "Isolated", "true"), NULL}, // all is matched: nothing is between
    {PRE_TOKENIZER, SPLIT(GPT2, "Removed", "true"), NULL},
    {PRE_TOKENIZER, SPLIT("x+", "Isolated", "false"),
     "\"Split\", Regex x+, behavior Isolated, invert false"},
    {PRE_TOKENIZER, SEQUENCE("pretokenizers", SPLIT_GPT2 "," DIGITS), "\"Digits\""},
    {PRE_TOKENIZER, SEQUENCE("pretokenizers", SPLIT_GPT2 "," GPT2_BYTES), "together"},
    {PRE_TOKENIZER, SEQUENCE("pretokenizers", SPLIT_GPT2 "," BYTES), NULL},
    {PRE_TOKENIZER, "{\"type\":\"Sequence\"}", "\"pretokenizers\""},
    {DECODER, "{\"type\":\"Metaspace\"}", UNSUPPORTED " \"Metaspace\""},
    {DECODER, SEQUENCE("decoders", METASPACE("first", "true") "," UNREPLACE), "together"},
    {DECODER, "{\"type\":\"WordPiece\"}", "\"WordPiece\""},
    {DECODER, UNBYTES, NULL},
    {DECODER, SEQUENCE("decoders", FUSE "," STRIP(" ", "1", "0")), NULL},
    {DECODER, SEQUENCE("decoders", STRIP(" ", "1", "0")), "together"},
    {DECODER, SEQUENCE("decoders", FUSE "," STRIP(" ", "2", "0")), "\"Strip\""},
    {DECODER, SEQUENCE("decoders", FUSE "," STRIP(" ", "1", "1")), "\"Strip\""},
    {DECODER, SEQUENCE("decoders", FUSE "," STRIP("x", "1", "0")), "\"Strip\""},
    {DECODER, SEQUENCE("decoders", FUSE "," UNBYTES), "together"},
    {DECODER, SEQUENCE("decoders", FUSE "," UNREPLACE), "\"Replace\""},
    {DECODER, REPLACE, "\"Replace\""},
    {POST_PROCESSOR, UNBYTES, NULL},
    {POST_PROCESSOR, SEQUENCE("processors", UNBYTES "," TEMPLATE("4,4", TEXT)), NULL},
    {POST_PROCESSOR, SEQUENCE("processors", TEMPLATE("4", TEXT) "," TEMPLATE("4", TEXT)),
     "\"TemplateProcessing\""},
    {POST_PROCESSOR, TEMPLATE("4", ""), "\"TemplateProcessing\""},
    {POST_PROCESSOR, TEMPLATE("4", TEXT TEXT), "\"TemplateProcessing\""},
    {POST_PROCESSOR, TEMPLATE("4", ",{\"Sequence\":{\"id\":\"B\"}}"), "\"TemplateProcessing\""},
    {POST_PROCESSOR, TEMPLATE("99", TEXT), "\"SpecialToken\""},
    {POST_PROCESSOR, TEMPLATE("-1", TEXT), "token id"},
    {POST_PROCESSOR, TEMPLATE("4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4", TEXT), "\"SpecialToken\""},
    {POST_PROCESSOR, "{\"type\":\"BertProcessing\"}", "\"BertProcessing\""},
    {ADDED_TOKENS, ADDED("4", "<s>", ",\"special\":true,\"lstrip\":false"), NULL},
    {ADDED_TOKENS, ADDED("9", "new", ",\"normalized\":true"), NULL},
    {ADDED_TOKENS, ADDED("8", "new", ",\"single_word\":1"), "\"single_word\""},
    {ADDED_TOKENS, ADDED("8", "new", ",\"layer\":1"), "\"layer\""},
    {ADDED_TOKENS, ADDED("9", "new", ",\"special\":1"), "\"special\""},
    {ADDED_TOKENS, ADDED("9", "<s>", ""), "\"<s>\""},
    {ADDED_TOKENS, ADDED("4", "new", ""), "\"new\""},
    {ADDED_TOKENS, ADDED("8", "new", "") "," ADDED("8", "new", ""), NULL},
    {ADDED_TOKENS, ADDED("8", "new", "") "," ADDED("8", "new", ",\"lstrip\":true"), "\"new\""},
    {ADDED_TOKENS, ADDED("8", "new", "") "," ADDED("8", "new", ",\"special\":true"), "\"new\""},
    {ADDED_TOKENS, ADDED("8", "new", "") "," ADDED("8", "old", ""), "\"old\""},
    {ADDED_TOKENS, ADDED("8", "new", "") "," ADDED("9", "new", ""), "\"new\""},
    {ADDED_TOKENS, ADDED("9", "", ""), "added token"},
    {ADDED_TOKENS, ADDED("4194304", "new", ""), "token id"},
    {ADDED_TOKENS, ADDED("1.5", "new", ""), "token id"},
    {MODEL, "\"dropout\":0.1,", "\"dropout\""},
    {MODEL, "\"dropout\":null,\"continuing_subword_prefix\":\"\",\"end_of_word_suffix\":null,",
     NULL},
    {MODEL, "\"continuing_subword_prefix\":\"##\",", "\"continuing_subword_prefix\""},
    {MODEL, "\"end_of_word_suffix\":\"</w>\",", "\"end_of_word_suffix\""},
    {MODEL, "\"unk_token\":\"<unk>\",", "\"<unk>\""},
    {MODEL, "\"type\":\"Unigram\",", "BPE"},
    {MODEL, "\"vocab\":{\"a\":0,\"a\":1},", "\"a\""},
    {MODEL, "\"vocab\":{\"a\":0,\"b\":0},", "\"b\""},
    {MODEL, "\"vocab\":{\"a\":\"0\"},", "token id"},
    {MODEL, "\"vocab\":{},", "\"vocab\""},
    {MODEL, "\"merges\":[[\"a\",\"q\"]],", "\"aq\""},
    {MODEL, "\"merges\":[[\"a\"]],", "merge"},
    {MODEL, "\"merges\":[[\"a\",1]],", "merge"},
    {MODEL, "\"merges\":[\"ab\"],", "merge"},
    {MODEL, "\"merges\":7,", "\"merges\""},
    {MODEL, "\"dropout\":0,\"unheard\":1,", NULL},
    {CONFIG, "\"eos_token\":1", "\"content\""},
    {CONFIG, "\"tokenizer_file\":\"other.json\"", "\"tokenizer_file\" is other.json"},
    {CONFIG, "\"tokenizer_file\":null,\"unheard\":1", NULL},
    {CONFIG, "\"from_slow\":true", "\"from_slow\""},
    {CONFIG, "\"split_special_tokens\":1", "\"split_special_tokens\""},
    {CONFIG, "\"add_prefix_space\":\"yes\"", "\"add_prefix_space\""},
    {CONFIG, CLASS("LlamaTokenizer", ",\"add_prefix_space\":true"), "\"add_prefix_space\""},
    {CONFIG, CLASS("LlamaTokenizer", ",\"bos_token\":null"), "\"bos_token\""},
    {CONFIG, CLASS("Bert", ""), NULL},
    {CONFIG, "\"added_tokens_decoder\":[]", "\"added_tokens_decoder\""},
    {CONFIG, "\"added_tokens_decoder\":{\"x\":{\"content\":\"t\"}}", "\"x\""},
    {CONFIG, "\"added_tokens_decoder\":{\"8\":{}}", "\"content\""},
    {CONFIG, "\"added_tokens_decoder\":{\"8\":\"\"}", "empty"},
    {CONFIG, "\"additional_special_tokens\":1", "\"additional_special_tokens\""},
    {MAP, "\"eos_token\":1", "\"content\""},
    {ADDED_JSON, "\"<s>\":4", NULL},
    {ADDED_JSON, "\"<t>\":8", "\"<t>\""},
    {ADDED_JSON, "\"<s>\":5", "\"<s>\""},
};
// clang-format on

static void refusals(void) {
    for (size_t i = 0; i < sizeof part_tries / sizeof *part_tries; i++) {
        const char *json = part_tries[i].json, *error = part_tries[i].error;
        retrofit_tokenizer *tokenizer = load_part(part_tries[i].part, json);
        if (error)
            check(!tokenizer && strstr(retrofit_error(), error) && one_line(retrofit_error()),
                  "%s: %s", json, tokenizer ? "accepted" : retrofit_error());
        else check(tokenizer != NULL, "%s refused: %s", json, retrofit_error());
        retrofit_tokenizer_free(tokenizer);
    }
}

// `expected`: the ids, a space behind each.
static void expect(const retrofit_tokenizer *tokenizer, const char *text, const char *expected) {
    char got[256] = "";
    size_t n = 0;
    need(tokenizer != NULL, text);
    int32_t *ids = retrofit_encode(tokenizer, text, strlen(text), true, &n);
    for (size_t i = 0; ids && i < n; i++)
        snprintf(got + strlen(got), sizeof got - strlen(got), "%d ", (int)ids[i]);
    check(ids && !strcmp(got, expected), "\"%s\" gives %s, not %s", text, got, expected);
    if (ids) check_stream(tokenizer, ids, n, false);
    free(ids);
}

// Added tokens: the longest first, and those of the text as given before those of normalized text.
static void added_tokens(void) {
    retrofit_tokenizer *tokenizer = load_parts((const char *[PARTS]){
        [NORMALIZER] = SEQUENCE("normalizers", PREPEND "," REPLACE),
        [DECODER] = SEQUENCE("decoders", UNREPLACE "," FUSE "," STRIP(" ", "1", "0")),
        [POST_PROCESSOR] = TEMPLATE("4", TEXT),
        [ADDED_TOKENS] = ADDED("4", "<s>", ",\"special\":true") ","
                         ADDED("8", "<s>>", ",\"normalized\":false"),
    });
    expect(tokenizer, "", "4 ");
    expect(tokenizer, "ab c", "4 2 3 6 "); // ▁ ab ▁c
    expect(tokenizer, "a<s>", "4 2 0 4 ");
    expect(tokenizer, "<s>>c", "4 8 6 ");
    expect(tokenizer, "<s><s>>", "4 4 8 ");
    retrofit_tokenizer_free(tokenizer);
}

// A surprise of Hugging Face's own: where it is normalized, <s> is ▁<s>, which only the beginning
// of a text or a space makes.
static void normalized_special_token(void) {
    retrofit_tokenizer *tokenizer = load_parts((const char *[PARTS]){
        [NORMALIZER] = SEQUENCE("normalizers", PREPEND "," REPLACE),
        [ADDED_TOKENS] = ADDED("4", "<s>", ",\"special\":true,\"normalized\":true"),
    });
    expect(tokenizer, "<s>a", "4 0 ");
    expect(tokenizer, "a<s>", "2 0 ");
    expect(tokenizer, "a <s>", "2 0 4 ");
    retrofit_tokenizer_free(tokenizer);
}

static void plain_tokenizer(void) {
    retrofit_tokenizer *tokenizer =
        load_part(ADDED_TOKENS, ADDED("9", "ca", ",\"normalized\":true") ","
                                ADDED("3", "ab", ",\"normalized\":false"));
    expect(tokenizer, "cab", "5 3 ");
    expect(tokenizer, "caab", "9 3 ");
    expect(tokenizer, "cca", "5 9 ");
    size_t size;
    int32_t ids[] = {77, 8, 0, 1, 9, 4194303}; // the first two and the last are no token's
    char *text = retrofit_decode(tokenizer, ids, 6, false, &size);
    check(text && !strcmp(text, "a b ca") && size == 6, "without a decoder: %s",
          text ? text : retrofit_error());
    free(text);
    check_stream(tokenizer, ids, 6, true);
    int32_t last = 0;
    check(!retrofit_decode_context(tokenizer, ids, 2, &last), "no token to begin with");
    check(retrofit_decode_context(tokenizer, ids, 6, &last) && last == 9, "the last token");
    for (int i = 0; i < 2; i++) {
        ids[2] = i ? -1 : 4194304;
        text = retrofit_decode(tokenizer, ids, 6, false, &size);
        check(!text && strstr(retrofit_error(), "no token"), "id %d accepted", (int)ids[2]);
        free(text);
    }
    check(retrofit_tokenizer_id(tokenizer, "ca") == 9 &&
              retrofit_tokenizer_id(tokenizer, "▁c") == 6 &&
              retrofit_tokenizer_id(tokenizer, "zz") == -1,
          "ids by name");
    check(retrofit_tokenizer_size(tokenizer) == 10 && retrofit_tokenizer_bos(tokenizer) == -1 &&
              retrofit_tokenizer_eos(tokenizer) == -1,
          "size, bos, eos");
    retrofit_tokenizer_free(tokenizer);
}

// clang-format off
#define TOKENS "\"a\":0,\"b\":1,\"▁\":2,\"ab\":3,\"<s>\":4,\"c\":5,\"▁c\":6"
static const struct {
    int part;
    const char *json;
} others[] = { // tokenizers that give other ids than the usual one, and than each other
    {NORMALIZER, PREPEND},
    {PRE_TOKENIZER, DIGITS},
    {POST_PROCESSOR, TEMPLATE("4", TEXT)},
    {POST_PROCESSOR, TEMPLATE("5", TEXT)},
    {POST_PROCESSOR, TEMPLATE("4", TEXT ",{\"SpecialToken\":{\"id\":\"x\"}}")},
    {ADDED_TOKENS, ADDED("8", "<t>", "")},
    {ADDED_TOKENS, ADDED("8", "<t>", ",\"normalized\":false")},
    {ADDED_TOKENS, ADDED("8", "<u>", "")},
    {ADDED_TOKENS, ADDED("4", "<s>", "")},
    {MODEL, "\"ignore_merges\":true,"},
    {MODEL, "\"unk_token\":\"c\","},
    {MODEL, "\"unk_token\":\"c\",\"fuse_unk\":true,"},
    {MODEL, "\"unk_token\":\"b\","},
    {MODEL, "\"vocab\":{" TOKENS ",\"x\":7},"},
    {MODEL, "\"vocab\":{" TOKENS ",\"x\":8},"},
    {MODEL, "\"vocab\":{" TOKENS ",\"xy\":7,\"z\":8},"},
    {MODEL, "\"vocab\":{" TOKENS ",\"x\":7,\"yz\":8},"},
    {MODEL, "\"merges\":[[\"a\",\"b\"]],"},
    {MODEL, "\"merges\":[\"▁ c\",[\"a\",\"b\"]],"},
    {MODEL, "\"merges\":[],"},
    {NORMALIZER, NFC},
    {PRE_TOKENIZER, RUNS},
    {PRE_TOKENIZER, METASPACE("always", "true")},
    {PRE_TOKENIZER, METASPACE("always", "false")},
    {PRE_TOKENIZER, METASPACE("first", "true")},
    {PRE_TOKENIZER, METASPACE("never", "true")},
    {PRE_TOKENIZER, GPT2_BYTES},
    {PRE_TOKENIZER, PREFIX_BYTES},
    {ADDED_TOKENS, ADDED("8", "<t>", ",\"single_word\":true")},
    {ADDED_TOKENS, ADDED("8", "<t>", ",\"lstrip\":true")},
    {ADDED_TOKENS, ADDED("8", "<t>", ",\"rstrip\":true")},
    {CONFIG, "\"eos_token\":\"<s>\""},
    {CONFIG, "\"pad_token\":\"<v>\""},
    {CONFIG, "\"split_special_tokens\":true"},
    {CONFIG, CLASS("LlamaTokenizer", ",\"bos_token\":\"a\",\"eos_token\":\"a\"")},
};
enum { OTHERS = sizeof others / sizeof *others };
// clang-format on

// What Hugging Face makes of some tokenizers and texts: tokenizers 0.22.2, and transformers 4.57.1
// where there is a CONFIG. Of several texts at most one is said to lead to a note.
#define USUAL "\"a\":0,\"b\":1,\"▁\":2,\"ab\":3,\"<s>\":4,\"c\":5,\"▁c\":6"
#define MARKED "\"merges\":[\"a b\",\"▁ c\",\"c ▁c\"],\"vocab\":{" USUAL ",\"Ġ\":7,\"c▁c\":8},"
#define ACCENTS \
    "\"merges\":[],\"vocab\":{\"é\":0,\"e\":1,\"\u0301\":2,\"\u0323\":3,\"\u1eb9\":4," \
    "\"\uac01\":5,\"\u1100\":6,\"\uf900\":7,\"x\":8,\"\u1abf\":9,\"\u8c48\":10,\"\u0f71\":11," \
    "\"\u0f73\":12,\"\u0f72\":13,\"\u0345\":14},"
#define S ADDED("4", "<s>", ",\"special\":true")
#define UNK_C "\"unk_token\":\"c\","
#define FAST CLASS("PreTrainedTokenizerFast", ",")
#define LLAMA \
    CLASS("LlamaTokenizer", ",\"bos_token\":\"<s>\",\"eos_token\":\"c\",\"unk_token\":\"b\"")
#define FLAGGED(content, more) "{\"content\":\"" content "\"" more "}"
// clang-format off
static const struct {
    const char *parts[PARTS], *note, *texts[13]; // text, ids, text, ids, …, NULL
} behaviors[] = {
    {{[PRE_TOKENIZER] = METASPACE("always", "true"), [MODEL] = MARKED, [ADDED_TOKENS] = S}, NULL,
     {" a c▁cab", "2 0 6 6 3 ", "ac c", "2 0 5 6 ", "a<s>c", "2 0 4 6 ", "<s>a", "4 2 0 "}},
    {{[PRE_TOKENIZER] = METASPACE("first", "false"), [MODEL] = MARKED, [ADDED_TOKENS] = S}, NULL,
     {" a c▁cab", "2 0 6 6 3 ", "ac c", "2 0 8 ", "a<s>c", "2 0 4 5 ", "<s>a", "4 0 "}},
    {{[PRE_TOKENIZER] = METASPACE("never", "true"), [MODEL] = MARKED, [ADDED_TOKENS] = S}, NULL,
     {" a c▁cab", "2 0 6 6 3 ", "ac c", "0 5 6 ", "a<s>c", "0 4 5 ", "<s>a", "4 0 "}},
    {{[NORMALIZER] = NFC, [MODEL] = ACCENTS}, NULL,
     {"e\u0301x", "0 8 ", "xe\u0301\u0323", "8 4 2 ", "\u1100\u1161\u11a8", "5 ", "\uf900", "10 ",
      "\u0f73\u0345", "11 13 14 ", "e\u1abf\u0323", "1 9 3 "}}, // U+1ABF is later than Unicode 9
    {{[NORMALIZER] = NFC, [MODEL] = ACCENTS,
      [ADDED_TOKENS] = ADDED("13", "\u0f72", "") "," ADDED("15", "xe\u0301", "")}, NULL,
     {"xe\u0301", "15 ", "x\u00e9x", "15 8 "}},
    {{[PRE_TOKENIZER] = RUNS, [MODEL] = "\"merges\":[\"1 2\",\"a 12\"],\"vocab\":{\"a\":0,\"b\":1,"
      "\"1\":3,\"2\":4,\"12\":6,\"a12\":7},"}, NULL, {"a12b1", "0 6 1 3 "}},
    {{[PRE_TOKENIZER] = PREFIX_BYTES, [ADDED_TOKENS] = S}, NULL,
     {"ab", "7 3 ", " ab", "7 3 ", "a<s>b", "7 0 4 7 1 ", "", ""}},
    {{[PRE_TOKENIZER] = SEQUENCE("pretokenizers", DIGITS "," PREFIX_BYTES), [ADDED_TOKENS] = S,
      [MODEL] = "\"merges\":[\"a b\"],\"vocab\":{\"a\":0,\"b\":1,\"1\":2,\"ab\":3,\"<s>\":4,"
      "\"Ġ\":5},"}, NULL, {"ab1ab", "5 3 5 2 5 3 ", "<s> ab", "4 5 3 "}},
    {{[ADDED_TOKENS] = ADDED("8", "new", ",\"single_word\":true"), [MODEL] = UNK_C}, NULL,
     {"a new b", "0 5 8 5 1 ", "anew", "0 5 5 5 ", "newb", "5 5 5 1 ", "new", "8 ",
      "\u0301new", "5 5 5 5 ", "newnew", "5 5 5 5 5 5 "}},
    {{[ADDED_TOKENS] = ADDED("8", "new", ",\"lstrip\":true"), [MODEL] = UNK_C}, NULL,
     {"a new b", "0 8 5 1 ", "anew b", "0 8 5 1 ", " \u2003new\u00a0a", "8 5 0 "}},
    {{[ADDED_TOKENS] = ADDED("8", "new", ",\"rstrip\":true"), [MODEL] = UNK_C}, NULL,
     {"a new b", "0 5 8 1 ", "a newb", "0 5 8 1 ", " \u2003new\u00a0a", "5 5 8 0 "}},
    {{[ADDED_TOKENS] = ADDED("8", "x", ",\"rstrip\":true") "," ADDED("9", "y", ",\"lstrip\":true"),
      [MODEL] = UNK_C}, NULL, {"a x  y b", "0 5 8 9 5 1 ", "x y", "8 9 "}},
    {{[CONFIG] = FAST "\"added_tokens_decoder\":{\"9\":" FLAGGED("<u>", "") ",\"8\":"
      FLAGGED("<t>", ",\"special\":true") ",\"4\":" FLAGGED("<s>", "") "}"}, NULL,
     {"a<t>b<s>", "0 8 1 4 ", "<u>", "9 "}},
    {{[CONFIG] = FAST "\"added_tokens_decoder\":{\"77\":" FLAGGED("<t>", "") "}"}, "8, not 77",
     {"a<t>", "0 8 "}},
    {{[CONFIG] = FAST "\"added_tokens_decoder\":{\"4\":" FLAGGED("<s>", ",\"lstrip\":true") "}",
      [ADDED_TOKENS] = S}, NULL, {"a <s>b", "0 4 1 "}},
    {{[CONFIG] = FAST "\"pad_token\":\"<p>\",\"eos_token\":\"<s>\",\"additional_special_tokens\":"
      "[\"<q>\"],\"extra_special_tokens\":{\"x_token\":\"<r>\"}"}, "pad_token",
     {"<p>", "8 ", "<q>", "9 ", "<r>", "10 ", "<s>", "4 "}},
    {{[CONFIG] = FAST "\"pad_token\":\"<p>\"", [MAP] = "\"pad_token\":" FLAGGED("<q>", "")}, "<q>",
     {"<p>", "", "<q>", "8 "}},
    {{[CONFIG] = FAST "\"pad_token\":\"<p>\",\"added_tokens_decoder\":{}",
      [MAP] = "\"pad_token\":\"<q>\""}, "<p>", {"<p>", "8 ", "<q>", ""}},
    {{[CONFIG] = FAST "\"split_special_tokens\":true",
      [ADDED_TOKENS] = S "," ADDED("8", "<t>", ""), [MODEL] = UNK_C}, NULL,
     {"a<s>b<t>", "0 5 5 5 1 8 "}},
    {{[CONFIG] = LLAMA}, "add_bos_token", {"a", "4 0 "}},
    {{[CONFIG] = LLAMA ",\"add_bos_token\":false,\"add_eos_token\":true",
      [POST_PROCESSOR] = TEMPLATE("4", TEXT)}, "add_eos_token are followed", {"a", "0 5 "}},
    {{[CONFIG] = CLASS("LlamaTokenizerFast", ",\"add_bos_token\":null")}, "\"</s>\"",
     {"<unk></s>", "9 8 "}},
    {{[CONFIG] = CLASS("GPTNeoXTokenizerFast", ",\"bos_token\":\"a\",\"eos_token\":\"a\","
                       "\"unk_token\":\"a\""), [POST_PROCESSOR] = TEMPLATE("4", TEXT)},
     "add_bos_token", {"a", "0 "}},
    {{[CONFIG] = FAST "\"bos_token\":\"<s>\",\"add_bos_token\":true"},
     "add_eos_token are not followed", {"a", "0 "}},
    {{[CONFIG] = CLASS("GPT2Tokenizer", "")}, "<|endoftext|>", {"a<|endoftext|>", "0 8 "}},
    {{[CONFIG] = FAST "\"add_prefix_space\":true", [PRE_TOKENIZER] = GPT2_BYTES},
     "add_prefix_space true is followed", {"a", "7 0 "}},
    {{[CONFIG] = FAST "\"eos_token\":null", [PRE_TOKENIZER] = PREFIX_BYTES},
     "add_prefix_space false is followed", {"a", "0 "}},
    {{[CONFIG] = FAST "\"add_prefix_space\":null", [PRE_TOKENIZER] = PREFIX_BYTES}, NULL,
     {"a", "7 0 "}},
    {{[CONFIG] = FAST "\"add_prefix_space\":true",
      [PRE_TOKENIZER] = SEQUENCE("pretokenizers", GPT2_BYTES)},
     "add_prefix_space true is not followed", {"a", "0 "}},
    {{[CONFIG] = FAST "\"clean_up_tokenization_spaces\":true"}, NULL, {"a", "0 "}},
    {{[CONFIG] = FAST "\"eos_token\":null", [ADDED_TOKENS] = ADDED("4", "<s>", "")
      "],\"truncation\":{\"max_length\":2},\"padding\":{\"pad_token\":\"<p>\"},\"unheard\":["},
     "pad_token", {"aaaa<p>", "0 0 0 0 8 "}},
};
// clang-format on

// The lines that loading a tokenizer writes to stderr.
static retrofit_tokenizer *load_noted(const char *const parts[PARTS], char *notes, size_t size) {
    FILE *file = tmpfile();
    need(file != NULL, "a temporary file");
    int old = dup(STDERR_FILENO);
    fflush(stderr);
    dup2(fileno(file), STDERR_FILENO);
    retrofit_tokenizer *tokenizer = load_parts(parts);
    fflush(stderr);
    dup2(old, STDERR_FILENO);
    close(old);
    rewind(file);
    notes[fread(notes, 1, size - 1, file)] = 0;
    fclose(file);
    return tokenizer;
}

static void behaviors_of_files(void) {
    for (size_t i = 0; i < sizeof behaviors / sizeof *behaviors; i++) {
        char notes[4096];
        retrofit_tokenizer *tokenizer = load_noted(behaviors[i].parts, notes, sizeof notes);
        need(tokenizer != NULL, retrofit_error());
        const char *note = behaviors[i].note;
        check(note ? strstr(notes, note) != NULL : !*notes, "behavior %zu: %s", i, notes);
        for (const char *const *text = behaviors[i].texts; *text; text += 2)
            expect(tokenizer, text[0], text[1]);
        retrofit_tokenizer_free(tokenizer);
    }
}

// Metaspace's decoder drops every "▁" of the first token, unless its scheme is never.
static void metaspace_decoder(void) {
    static const char *const decoders[] = {METASPACE("first", "true"), METASPACE("never", "true")};
    static const char *const texts[] = {" a c b", "  a c b"};
    for (int i = 0; i < 2; i++) {
        retrofit_tokenizer *tokenizer = load_part(DECODER, decoders[i]);
        need(tokenizer != NULL, retrofit_error());
        int32_t ids[] = {999, 2, 2, 0, 6, 2, 1}; // no token's, ▁ ▁ a ▁c ▁ b
        size_t size;
        char *text = retrofit_decode(tokenizer, ids, 7, false, &size);
        check(text && !strcmp(text, texts[i]), "%s: \"%s\"", decoders[i], text ? text : "");
        check_stream(tokenizer, ids, 7, false);
        free(text);
        retrofit_tokenizer_free(tokenizer);
    }
}

// The output of a training has its tokenizer in `latest`.
static void latest_directory(void) {
    char work[] = "/tmp/tok_latest_XXXXXX", path[RETROFIT_PATH];
    need(mkdtemp(work) && retrofit_path(path, work, "latest") && !mkdir(path, 0700), work);
    write_text(path, "config.json", "{}");
    write_text(path, "tokenizer.json",
               "\xef\xbb\xbf{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[]}}");
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(work);
    check(tokenizer && retrofit_tokenizer_size(tokenizer) == 1, "latest: %s", retrofit_error());
    retrofit_tokenizer_free(tokenizer);
    static const char *const files[] = {"latest/config.json", "latest/tokenizer.json"};
    for (int i = 0; i < 2; i++)
        if (retrofit_path(path, work, files[i])) unlink(path);
    if (retrofit_path(path, work, "latest")) rmdir(path);
    rmdir(work);
}

static uint64_t hash_of(int part, const char *json) {
    retrofit_tokenizer *tokenizer = load_part(part, json);
    need(tokenizer != NULL, json ? json : "the usual tokenizer");
    uint64_t hash = retrofit_tokenizer_hash(tokenizer);
    retrofit_tokenizer_free(tokenizer);
    return hash;
}

// The hash tells apart what gives other ids, whichever part of the file it is, and nothing else.
static void hashes(void) {
    uint64_t hash[OTHERS + 1];
    hash[OTHERS] = hash_of(MODEL, NULL);
    check(hash[OTHERS] == hash_of(MODEL, "\"vocab\":{\"Ġ\":7," TOKENS "},"),
          "the same tokenizer, laid out in another way, has another hash");
    for (size_t i = 0; i < OTHERS; i++) hash[i] = hash_of(others[i].part, others[i].json);
    for (size_t i = 0; i <= OTHERS; i++)
        for (size_t j = 0; j < i; j++)
            check(hash[i] && hash[i] != hash[j], "%s and %s have the same hash",
                  i < OTHERS ? others[i].json : "nothing", others[j].json);
}

// A text of several parts, of words, spaces and what tokenizers do special things with.
static char *make_long_text(size_t *size) {
    static const char *const words[] = {
        "the", " the", " of", "ing", " Hello", " don't", "'ll", "'", "123", " 4567", "\n", "\n\n",
        " ", "  ", "   ", "\t", "\xc3\xa9", " e\xcc\x81", "\xe2\x96\x81", "\xe2\x96\x81of",
        "a\xe2\x80\x99s", "\xf0\x9f\x98\x80", " .", "...", "A", "z", "<", "<s", " </s", "_",
        "\r\n", "\xe4\xb8\xad"};
    enum { WORDS = sizeof words / sizeof *words, SIZE = 5 * TOK_PART };
    retrofit_text text = {0};
    for (uint64_t i = 0; text.size < SIZE; i++) {
        const char *word = words[retrofit_hash(7, i) % WORDS];
        retrofit_text_append(&text, word, strlen(word));
    }
    need(!text.failed, "memory");
    *size = text.size;
    return text.bytes;
}

// Wherever a text may be cut, the ids of both sides are the ids of the whole; and there are places,
// in a text without spaces too, unless the tokenizer knows of words by nothing else.
static void every_cut(const char *directory) {
    static const char *const texts[] = {
        "The Don't'll 12a34 café, e\xcc\x81 x's... \n\n  z ▁of▁ _a\tb\r\nI'M ",
        "中文，中'ſ文。文1中"};
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(directory);
    need(tokenizer != NULL, directory);
    for (size_t i = 0; i < 2; i++) {
        tok_encoder whole = {.tokenizer = tokenizer};
        tok_normalize(tokenizer, &whole.normalized, texts[i], strlen(texts[i]));
        const char *text = whole.normalized.bytes;
        size_t size = whole.normalized.size, places = 0;
        tok_encode_part(&whole, text, size, true);
        for (size_t at = 1; at < size; at++) {
            if (!tok_can_cut(tokenizer, text, size, at)) continue;
            tok_encoder apart = {.tokenizer = tokenizer};
            tok_encode_part(&apart, text, at, true);
            tok_encode_part(&apart, text + at, size - at, false);
            bool same = apart.ids.size == whole.ids.size &&
                        !memcmp(apart.ids.bytes, whole.ids.bytes, whole.ids.size);
            check(same, "%s: text %zu cut at byte %zu has other ids", directory, i, at);
            tok_free_memory(&apart);
            places++;
        }
        check(places >= 2 || (i == 1 && !tokenizer->byte_level), "%s: text %zu can be cut at %zu "
              "places", directory, i, places);
        tok_free_memory(&whole);
    }
    retrofit_tokenizer_free(tokenizer);
}

// What is cut into parts, and what the cache knows, has the ids of a text that is encoded as one.
static void long_text(const char *directory) {
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(directory);
    need(tokenizer != NULL, directory);
    size_t size, count, parts = 0;
    char *text = make_long_text(&size);
    tok_encoder whole = {.tokenizer = tokenizer}, none = {.tokenizer = tokenizer};
    tok_normalize(tokenizer, &none.normalized, text, size);
    tok_encode_part(&whole, none.normalized.bytes, none.normalized.size, true);

    free(tok_cut_parts(tokenizer, none.normalized.bytes, none.normalized.size, &parts));
    check(parts >= 4, "%s: a long text has %zu parts", directory, parts);
    retrofit_encoder *encoder = retrofit_encoder_new(tokenizer);
    for (int pass = 0; pass < 3; pass++) {
        int32_t *ids = pass ? retrofit_encode_with(encoder, text, size, false, &count, NULL, NULL)
                            : retrofit_encode(tokenizer, text, size, false, &count);
        bool same = ids && count * sizeof *ids == whole.ids.size;
        check(same && !memcmp(ids, whole.ids.bytes, whole.ids.size),
              "%s: a long text has other ids in parts (pass %d)", directory, pass);
        free(ids);
    }
    retrofit_encoder_free(encoder);
    tok_free_memory(&whole);
    tok_free_memory(&none);
    free(text);
    retrofit_tokenizer_free(tokenizer);
}

// Progress is shown by one thread, also where several encode long texts at a time.
static void count_call(void *calls, size_t bytes) {
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_ancestor_thread_num(1);
#endif
    if (bytes > 0) ((size_t *)calls)[thread > 0]++;
}

static void progress(const char *directory) {
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(directory);
    need(tokenizer != NULL, directory);
    size_t size, calls[2] = {0};
    char *text = make_long_text(&size);
#ifdef _OPENMP
#pragma omp parallel num_threads(2)
#endif
    {
        size_t count;
        retrofit_encoder *encoder = retrofit_encoder_new(tokenizer);
        free(retrofit_encode_with(encoder, text, size, false, &count, count_call, calls));
        retrofit_encoder_free(encoder);
    }
    check(calls[0] >= 4 && calls[1] == 0, "progress by the first thread %zu times, by another %zu",
          calls[0], calls[1]);
    free(text);
    retrofit_tokenizer_free(tokenizer);
}

static void speed(const char *directory, const char *file) {
    double start = retrofit_seconds();
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(directory);
    printf("%s: load %.3f s (%s)\n", directory, retrofit_seconds() - start,
           tokenizer ? "ok" : retrofit_error());
    size_t size, n, m;
    char *text = retrofit_read_file(file, &size);
    if (!tokenizer || !text) return;

    start = retrofit_seconds();
    int32_t *ids = retrofit_encode(tokenizer, text, size, false, &n);
    double encoded = retrofit_seconds();
    char *back = ids ? retrofit_decode(tokenizer, ids, n, false, &m) : NULL;
    double decoded = retrofit_seconds(), megabytes = 1e-6 * (double)size;
    bool same = back && m == size && !memcmp(back, text, m);
    printf("  %s: %zu bytes, %zu tokens, encode %.2f MB/s, decode %.1f MB/s, round trip %s\n", file,
           size, n, megabytes / (encoded - start), megabytes / (decoded - encoded),
           same ? "ok" : "differs");
    free(ids);
    free(back);
    free(text);
    retrofit_tokenizer_free(tokenizer);
}

// Without arguments all tests; `cases DIRECTORY FILE` and `speed DIRECTORY TEXT` are for comparing
// with other tokenizers.
int main(int count, char **args) {
    if (count == 4 && !strcmp(args[1], "cases")) {
        run_cases(args[2], args[3]);
        return failed != 0;
    }
    if (count == 4 && !strcmp(args[1], "speed")) {
        speed(args[2], args[3]);
        return 0;
    }
    json_accepted();
    json_refused();
    json_depth();
    json_values();
    json_writing();
    refusals();
    added_tokens();
    normalized_special_token();
    plain_tokenizer();
    behaviors_of_files();
    metaspace_decoder();
    latest_directory();
    hashes();
    gpt4_spelling();
    static const char *const kinds[] = {"llama2_style", "qwen2_style", "llama3_style",
                                        "olmo2_style", "smollm_style"};
    for (int i = 0; i < 5; i++) {
        char directory[256];
        snprintf(directory, sizeof directory, FIXTURES "tokenizers/%s", kinds[i]);
        run_cases(directory, "cases.json");
        every_cut(directory);
        long_text(directory);
        hostile(directory, 997, 600);
        if (i > 1) round_trips(directory, 1500); // of the first two neither keeps a text as it is
    }
    progress(FIXTURES "tokenizers/llama3_style");
    hostile(FIXTURES "lookup/base", 7, 1500);
    return finish("tokenizer");
}

// convert, run as a user would: surgery against the authors' checkpoints, random models, token shards, GGUF files made here, and bad input.
#include "test.h"
#include <sys/wait.h>

static char work[64]; // a directory of this run's own; everything is made in it
static char *program;

static const char *in_work(const char *format, ...) { // good for the next 31 calls
    static char paths[32][256];
    static size_t next;
    char name[160], *path = paths[next++ % 32];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    snprintf(path, sizeof paths[0], "%s/%s", work, name);
    return path;
}

static int run_arguments(const char *format, va_list args) {
    char arguments[2048], command[3072];
    vsnprintf(arguments, sizeof arguments, format, args);
    snprintf(command, sizeof command, "%s %s >%s/out 2>%s/err", program, arguments, work, work);
    int status = system(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void works(const char *format, ...) {
    va_list args;
    va_start(args, format);
    int code = run_arguments(format, args);
    va_end(args);
    size_t size;
    char *err = retrofit_read_file(in_work("err"), &size);
    need(err != NULL, "stderr");
    check(code == 0, "%s: exit code %d: %s", format, code, err);
    free(err);
}

static bool left_behind(void) { // a temporary file or directory, or the output that must not be
    glob_t found;
    memset(&found, 0, sizeof found);
    bool any = glob(in_work("*.tmp-*"), 0, NULL, &found) == 0 || access(in_work("bad"), F_OK) == 0 || access(in_work("bad.bin"), F_OK) == 0;
    globfree(&found);
    return any;
}

// One line on stderr that says `what`, the exit code, and nothing left behind.
static void fails(int expected, const char *what, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int code = run_arguments(format, args);
    va_end(args);
    size_t size;
    char *err = retrofit_read_file(in_work("err"), &size), *end;
    need(err != NULL, "stderr");
    check(code == expected, "%s: exit code %d, not %d: %s", format, code, expected, err);
    check((end = strchr(err, '\n')) && !end[1] && strstr(err, what), "%s: not one line with '%s' on stderr: '%s'", format, what, err);
    check(!left_behind(), "%s: something was left behind", format);
    free(err);
}

static void write_text(const char *path, const void *text, size_t size) {
    FILE *f = fopen(path, "wb");
    need(f && fwrite(text, 1, size, f) == size && fclose(f) == 0, path);
}

static retrofit_model *load(const char *path) {
    retrofit_model *m = retrofit_load(path, &retrofit_cpu, RETROFIT_INFERENCE);
    need(m != NULL, path);
    return m;
}

static float *numbers(const retrofit_parameter *p) { // as fp32; to be freed
    float *x = (float *)retrofit_allocate(p->rows * p->cols, sizeof *x);
    retrofit_to_float(x, p->weight.data, p->weight.type, p->rows * p->cols);
    return x;
}

static void same_numbers(const char *name, const retrofit_parameter *a, const retrofit_parameter *b, bool rounded) {
    float *x = numbers(a), *y = numbers(b);
    bool same = a->rows == b->rows && a->cols == b->cols;
    for (size_t i = 0; rounded && i < b->rows * b->cols; i++) y[i] = retrofit_bf16_to_float(retrofit_float_to_bf16(y[i]));
    check(same && !memcmp(x, y, a->rows * a->cols * sizeof *x), "%s: %s is not the same", name, a->source[0].name);
    free(x), free(y);
}

static void same_model(const char *name, const retrofit_model *a, const retrofit_model *b, bool adapter, bool rounded) {
    check(a->parameter_count == b->parameter_count, "%s: number of parameters", name);
    for (size_t i = 0; i < a->parameter_count && i < b->parameter_count; i++)
        if (adapter || a->parameters[i]->part != RETROFIT_PART_ADAPTER) same_numbers(name, a->parameters[i], b->parameters[i], rounded);
}

static void same_config(const char *name, const retrofit_config *a, const retrofit_config *b) {
#define SAME(field) check(a->field == b->field, "%s: config: " #field, name)
    SAME(n_embd), SAME(n_heads), SAME(n_kv_heads), SAME(head_dim), SAME(intermediate), SAME(vocab), SAME(context), SAME(prelude), SAME(core), SAME(coda);
    SAME(norm_eps), SAME(rope_theta), SAME(rope_llama3), SAME(rope_factor), SAME(rope_low), SAME(rope_high), SAME(rope_original_context), SAME(state_std);
    SAME(mean_recurrence), SAME(backprop_depth), SAME(tied);
#undef SAME
}

// ---- Surgery -----------------------------------------------------------------------------------------------------------------
static void moments(const float *x, size_t n, double *mean, double *std, double *most) {
    *mean = *std = *most = 0;
    for (size_t i = 0; i < n; i++) *mean += (double)x[i] / (double)n, *most = fmax(*most, fabs((double)x[i]));
    for (size_t i = 0; i < n; i++) *std += ((double)x[i] - *mean) * ((double)x[i] - *mean) / (double)n;
    *std = sqrt(*std);
}

static void surgery(const char *name, const char *layers) {
    const char *to = in_work("%s", name), *low = in_work("%s.bf16", name), *again = in_work("%s.again", name);
    works("--from " FIXTURES "%s/base --to %s %s --mean-recurrence 8 --backprop-depth 4", name, to, layers);
    works("--from " FIXTURES "%s/base --to %s %s --dtype=bf16 --seed 2", name, low, layers);
    works("--from " FIXTURES "%s/base --to %s %s --seed 1", name, again, layers);
    char path[256];
    snprintf(path, sizeof path, FIXTURES "%s/recurrent", name);
    retrofit_model *ours = load(to), *theirs = load(path), *rounded = load(low), *repeated = load(again);
    same_config(name, &ours->config, &theirs->config);
    same_model(name, ours, theirs, false, false), same_model(name, rounded, theirs, false, true), same_model(name, ours, repeated, true, false);
    check(repeated->config.mean_recurrence == 8 && repeated->config.backprop_depth == 8, "%s: recurrence without options", name);
    check(rounded->wte.weight.type == RETROFIT_BF16 && ours->wte.weight.type == RETROFIT_F32, "%s: the type in the file", name);
    size_t d = ours->config.n_embd;
    double mean, std, most, bound = 1 / sqrt(2 * (double)d);
    float *a = numbers(&ours->adapter), *b = numbers(&rounded->adapter);
    moments(a, 2 * d * d, &mean, &std, &most);
    check(most <= bound && most > .99 * bound && fabs(mean) < 4 * bound / sqrt(6.0) / (double)d && fabs(std / (bound / sqrt(3.0)) - 1) < .04,
          "%s: adapter: largest %g of %g, mean %g, std %g", name, most, bound, mean, std);
    check(relative_error(b, a, 2 * d * d) > 1, "%s: another seed gives another adapter", name);
    free(a), free(b), retrofit_free(ours), retrofit_free(theirs), retrofit_free(rounded), retrofit_free(repeated);
}

static float *logits_of(const retrofit_model *m, const int32_t *tokens, size_t B, size_t T, size_t r) {
    float *logits = (float *)retrofit_allocate(B * T * m->config.vocab, sizeof *logits);
    retrofit_buffers *a = retrofit_buffers_new(m, B, T, 0, RETROFIT_KEEP_NOTHING, NULL);
    need(a && retrofit_forward(a, tokens, B, T, 0, 0, r, 0), "forward");
    retrofit_logits(a, 0, B * T, logits), retrofit_buffers_free(a);
    return logits;
}

// With [0 | I] and every layer kept in its place, one recurrence is the source itself.
static void identity(const char *name, const char *layers) {
    static int runs;
    const char *to = in_work("identity.%d", runs++);
    char path[256];
    retrofit_map f;
    works("--from " FIXTURES "%s/base --to %s --adapter-init identity %s", name, to, layers);
    retrofit_model *m = load(to);
    snprintf(path, sizeof path, FIXTURES "%s/forward_backward.safetensors", name);
    need(retrofit_safetensors_open(&f, path), path);
    const retrofit_tensor *tokens = fixture(&f, "tokens"), *expected = fixture(&f, "base.logits");
    float *logits = logits_of(m, (const int32_t *)tokens->data, tokens->shape[0], tokens->shape[1], 1);
    double error = relative_error(logits, (const float *)expected->data, expected->count);
    check(error < 1e-5, "%s %s: identity adapter, r = 1, against the source: %.2e", name, layers, error);
    free(logits), retrofit_free(m), retrofit_safetensors_close(&f);
}

static void sharded_source(void) { // tiny/base in two files with an index
    retrofit_map f;
    need(retrofit_safetensors_open(&f, FIXTURES "tiny/base/model.safetensors"), "tiny/base");
    mkdir(in_work("sharded"), 0777);
    size_t half = f.count / 2;
    need(retrofit_safetensors_write(in_work("sharded/a.safetensors"), &retrofit_cpu, f.tensors, half, RETROFIT_F32, NULL) &&
             retrofit_safetensors_write(in_work("sharded/b.safetensors"), &retrofit_cpu, f.tensors + half, f.count - half, RETROFIT_F32, NULL) &&
             copy_file(FIXTURES "tiny/base/config.json", in_work("sharded/config.json")), "sharded source");
    FILE *j = fopen(in_work("sharded/model.safetensors.index.json"), "wb");
    fprintf(j, "{\"weight_map\":{");
    for (size_t i = 0; i < f.count; i++) fprintf(j, "%s\"%s\":\"%c.safetensors\"", i ? "," : "", f.tensors[i].name, i < half ? 'a' : 'b');
    fprintf(j, "}}"), fclose(j), retrofit_safetensors_close(&f);
    works("--from %s --to %s --prelude 0-1 --core 3-5 --coda 6-7", in_work("sharded"), in_work("unsharded"));
    retrofit_model *ours = load(in_work("unsharded")), *theirs = load(FIXTURES "tiny/recurrent");
    same_model("sharded", ours, theirs, false, false);
    retrofit_free(ours), retrofit_free(theirs);
    fails(2, "no layer", "--from %s --to %s --prelude none --core 8 --coda none", in_work("sharded"), in_work("bad"));
    works("--from %s --to %s --prelude none --core 7,2-3 --coda none", in_work("sharded"), in_work("core"));
    ours = load(in_work("core")), theirs = load(FIXTURES "tiny/base");
    for (size_t i = 0; i < 3; i++) same_numbers("core 7,2-3", &ours->core[i].w_qkv, &theirs->coda[i ? i + 1 : 7].w_qkv, false);
    retrofit_free(ours), retrofit_free(theirs);
}

// ---- Random models -----------------------------------------------------------------------------------------------------------
static void random_model(const char *config, const char *name, bool plain) {
    works("--random %s --to %s --seed 7 --tokenizer " FIXTURES "tokenizers/llama2_style", config, in_work("%s", name));
    check(access(in_work("%s/tokenizer.json", name), F_OK) == 0, "%s: the tokenizer is carried along", name);
    retrofit_model *m = load(in_work("%s", name));
    const retrofit_config *c = &m->config;
    check(retrofit_is_plain(c) == plain && !c->tied, "%s: kind of model", name);
    double sigma = sqrt(2 / (5.0 * (double)c->n_embd)), depth = (double)(c->prelude + c->core * c->mean_recurrence + c->coda);
    for (size_t i = 0; i < m->parameter_count; i++) {
        const retrofit_parameter *p = m->parameters[i];
        const char *label = p->source[0].name;
        size_t n = p->rows * p->cols;
        bool residual = strstr(label, "attn.proj") || strstr(label, "mlp.proj") || strstr(label, "o_proj") || strstr(label, "down_proj");
        double mean, std, most, expected = residual ? sigma / sqrt(2 * depth) : sigma;
        float *x = numbers(p);
        moments(x, n, &mean, &std, &most);
        if (p->kind == RETROFIT_NORM) check(fabs(mean - 1) < 1e-12 && std < 1e-12, "%s %s: a norm is not 1", name, label);
        else // cut at 3, a normal has a standard deviation of .9866
            check(fabs(std / expected - .9866) < 4 / sqrt(2.0 * (double)n) && most <= 3 * expected * (1 + 1e-6) && fabs(mean) < 4.5 * expected / sqrt((double)n),
                  "%s %s: mean %g, std %g, largest %g; expected std %g", name, label, mean, std, most, expected);
        free(x);
    }
    retrofit_free(m);
}

// ---- Token shards ------------------------------------------------------------------------------------------------------------
typedef struct {
    int32_t *ids;
    size_t count;
} id_list;

static void append(id_list *l, const retrofit_tokenizer *t, const char *text, size_t size) { // what one document should become
    size_t n;
    int32_t *ids = retrofit_encode(t, text, size, true, &n);
    need(ids && (l->ids = (int32_t *)realloc(l->ids, (l->count + n + 1) * sizeof *ids)), "encode");
    memcpy(l->ids + l->count, ids, n * sizeof *ids), l->count += n;
    l->ids[l->count++] = retrofit_tokenizer_eos(t);
    free(ids);
}

static void same_shard(const char *name, const char *path, const id_list *expected, int width) {
    size_t size = 0;
    char *bytes = retrofit_read_file(path, &size);
    const int32_t *header = (const int32_t *)(void *)bytes;
    if (!check(bytes && size == 1024 + expected->count * (size_t)width, "%s: %zu bytes for %zu tokens", name, size, expected->count)) return free(bytes);
    check(header[0] == (width == 2 ? RETROFIT_SHARD_MAGIC_16 : RETROFIT_SHARD_MAGIC_32) && header[1] == (width == 2 ? 1 : 7) &&
              header[2] == (int32_t)expected->count && (header[3] || header[4]) && header[5] == 0, "%s: header", name);
    size_t wrong = 0;
    for (size_t i = 0; i < expected->count; i++) {
        uint32_t id = 0;
        memcpy(&id, bytes + 1024 + i * (size_t)width, (size_t)width), wrong += id != (uint32_t)expected->ids[i];
    }
    check(wrong == 0, "%s: %zu of %zu ids are wrong", name, wrong, expected->count);
    free(bytes);
}

static void tokenizing(const char *style) {
    static const char first[] = "\n \xe2\x80\x83Hello, world 12345!  It's \xc3\xa9t\xc3\xa9\xe3\x80\x80\x1f\r\n", second[] = "x\ty \\ \" </s> <|im_end|>";
    char tokenizer[256], path[256];
    snprintf(tokenizer, sizeof tokenizer, FIXTURES "tokenizers/%s", style);
    retrofit_tokenizer *t = retrofit_tokenizer_load(tokenizer);
    need(t != NULL, tokenizer);
    id_list expected = {NULL, 0};
    append(&expected, t, first + 5, sizeof first - 5 - 7);
    write_text(in_work("a.txt"), first, sizeof first - 1);
    FILE *f = fopen(in_work("b.jsonl"), "wb");
    fprintf(f, "{\"n\":1,\"text\":"), retrofit_json_write_string(f, second, sizeof second - 1), fprintf(f, "}\r\n{\"text\":\" \\n\\u00a0 \"}\n\n");
    append(&expected, t, second, sizeof second - 1);
    for (int i = 0; i < 2500; i++) { // more than a batch
        char text[64];
        snprintf(text, sizeof text, "document %d of many", i);
        fprintf(f, "{\"text\":\"%s \"}\n", text), append(&expected, t, text, strlen(text));
    }
    fprintf(f, "{\"text\":\"nul \\u0000 within, no newline behind\"}"), fclose(f);
    append(&expected, t, "nul \0 within, no newline behind", 31);
    works("--tokenize %s %s --tokenizer %s --to %s", in_work("a.txt"), in_work("b.jsonl"), tokenizer, in_work("%s.bin", style));
    same_shard(style, in_work("%s.bin", style), &expected, 2);
    size_t size;
    char *out = retrofit_read_file(in_work("out"), &size);
    check(out && strstr(out, "2503 documents") && strstr(out, "2 empty"), "%s: what it prints: %s", style, out);
    snprintf(path, sizeof path, "%s", in_work("%s.bin", style));
    retrofit_data *data = retrofit_data_open(path, 16, retrofit_tokenizer_size(t), false, 0);
    check(data && retrofit_data_rows(data) == expected.count / 17, "%s: the loader reads the shard: %s", style, retrofit_error());
    free(out), retrofit_data_close(data), free(expected.ids), retrofit_tokenizer_free(t);
}

static void tokenizing_details(void) {
    // another field; a tokenizer of more than 65536 ids; its own EOS; the end of a document from config.json
    static const char big[] = "{\"added_tokens\":[{\"id\":70000,\"content\":\"<e>\",\"special\":true}],\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":69999},\"merges\":[]},"
                              "\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"Sequence\":{\"id\":\"A\"}},{\"SpecialToken\":{\"id\":\"<e>\"}}],"
                              "\"special_tokens\":{\"<e>\":{\"ids\":[70000]}}}}";
    static const char small[] = "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"z\":2},\"merges\":[]}}";
    const char *lines = "{\"body\":\"ab\"}\n{\"body\":\"b\"}\n";
    mkdir(in_work("big"), 0777);
    write_text(in_work("big/tokenizer.json"), big, sizeof big - 1), write_text(in_work("c.jsonl"), lines, strlen(lines));
    fails(1, "names a token for the end", "--tokenize %s --tokenizer %s --to %s --field body", in_work("c.jsonl"), in_work("big"), in_work("bad.bin"));
    write_text(in_work("big/tokenizer_config.json"), "{\"eos_token\":\"<e>\"}", 19);
    works("--field body --to %s --tokenizer=%s --tokenize %s", in_work("big.bin"), in_work("big"), in_work("c.jsonl"));
    int32_t ids[] = {0, 69999, 70000, 69999, 70000};
    id_list expected = {ids, 5};
    same_shard("uint32, its own EOS", in_work("big.bin"), &expected, 4);
    mkdir(in_work("eos"), 0777);
    write_text(in_work("eos/tokenizer.json"), small, sizeof small - 1);
    need(copy_file(FIXTURES "tiny/base/config.json", in_work("eos/config.json")), "config");
    works("--tokenize %s --tokenizer %s --to %s --field body", in_work("c.jsonl"), in_work("eos"), in_work("eos.bin"));
    int32_t few[] = {0, 1, 2, 1, 2};
    expected.ids = few;
    same_shard("EOS from config.json", in_work("eos.bin"), &expected, 2);
}

// ---- GGUF --------------------------------------------------------------------------------------------------------------------
static void put_number(FILE *f, uint64_t n, size_t size) { fwrite(&n, 1, size, f); } // little endian, as this machine
static void put_string(FILE *f, const char *s, size_t n) { put_number(f, n, 8), fwrite(s, 1, n, f); }

typedef struct {
    FILE *f; // metadata
    char *bytes;
    size_t size, values;
} metadata;

static void key(metadata *m, const char *name, uint32_t type) {
    put_string(m->f, name, strlen(name)), put_number(m->f, type, 4), m->values++;
}

static void meta_u32(metadata *m, const char *name, uint32_t n) { key(m, name, 4), put_number(m->f, n, 4); }
static void meta_f32(metadata *m, const char *name, float x) { key(m, name, 6), fwrite(&x, 4, 1, m->f); }
static void meta_bool(metadata *m, const char *name, bool b) { key(m, name, 7), put_number(m->f, b, 1); }
static void meta_text(metadata *m, const char *name, const char *s) { key(m, name, 8), put_string(m->f, s, strlen(s)); }
static void meta_array(metadata *m, const char *name, uint32_t type, size_t n) { key(m, name, 9), put_number(m->f, type, 4), put_number(m->f, n, 8); }

// The metadata llama.cpp would write for a tokenizer.json.
static void meta_tokenizer(metadata *m, const char *style) {
    char path[256];
    size_t size, count;
    snprintf(path, sizeof path, FIXTURES "tokenizers/%s/tokenizer.json", style);
    char *text = retrofit_read_file(path, &size);
    retrofit_json *root = retrofit_json_parse(text, size, path);
    need(root != NULL, path);
    snprintf(path, sizeof path, FIXTURES "tokenizers/%s", style);
    retrofit_tokenizer *t = retrofit_tokenizer_load(path);
    need(t != NULL, path);
    const retrofit_json *model = retrofit_json_get(root, "model"), *vocab = retrofit_json_get(model, "vocab"), *merges = retrofit_json_get(model, "merges");
    count = retrofit_tokenizer_size(t);
    const char **tokens = (const char **)retrofit_allocate(count, sizeof *tokens);
    int32_t *types = (int32_t *)retrofit_allocate(count, sizeof *types);
    float *scores = (float *)retrofit_allocate(count, sizeof *scores);
    bool spm = !strcmp(style, "llama2_style");
    for (const retrofit_json *e = vocab->child; e; e = e->next) {
        size_t id = (size_t)e->number;
        tokens[id] = e->key, types[id] = spm && e->key_length == 6 && !strncmp(e->key, "<0x", 3) ? 6 : 1, scores[id] = -1e6f;
    }
    for (const retrofit_json *e = retrofit_json_get(root, "added_tokens")->child; e; e = e->next) {
        size_t id = (size_t)retrofit_json_get(e, "id")->number;
        tokens[id] = retrofit_json_get(e, "content")->string, types[id] = spm && id == 0 ? 2 : 3;
    }
    float rank = 0;
    for (const retrofit_json *e = merges->child; e; e = e->next, rank++) {
        char whole[512];
        snprintf(whole, sizeof whole, "%s%s", e->child->string, e->child->next->string);
        int32_t id = retrofit_tokenizer_id(t, whole);
        if (scores[id] == -1e6f) scores[id] = -rank;
    }
    meta_text(m, "tokenizer.ggml.model", spm ? "llama" : "gpt2");
    if (!spm) meta_text(m, "tokenizer.ggml.pre", !strcmp(style, "llama3_style") ? "llama-bpe" : "smollm");
    meta_array(m, "tokenizer.ggml.tokens", 8, count);
    for (size_t i = 0; i < count; i++) put_string(m->f, tokens[i], strlen(tokens[i]));
    meta_array(m, "tokenizer.ggml.token_type", 5, count), fwrite(types, 4, count, m->f);
    if (spm) meta_array(m, "tokenizer.ggml.scores", 6, count), fwrite(scores, 4, count, m->f);
    else {
        meta_array(m, "tokenizer.ggml.merges", 8, merges->count);
        for (const retrofit_json *e = merges->child; e; e = e->next) {
            char pair[512];
            int n = snprintf(pair, sizeof pair, "%s %s", e->child->string, e->child->next->string);
            put_string(m->f, pair, (size_t)n);
        }
    }
    meta_u32(m, "tokenizer.ggml.bos_token_id", (uint32_t)retrofit_tokenizer_bos(t)), meta_u32(m, "tokenizer.ggml.eos_token_id", (uint32_t)retrofit_tokenizer_eos(t));
    if (spm) meta_u32(m, "tokenizer.ggml.unknown_token_id", 0);
    meta_text(m, "tokenizer.chat_template", "{{ \"quoted\" }}\n");
    free(tokens), free(types), free(scores), free(text), retrofit_json_free(root), retrofit_tokenizer_free(t);
}

// n numbers of a type as llama.cpp stores them, with the numbers they stand for, both from random bits.
static void put_numbers(FILE *f, uint32_t type, float *expected, size_t n, uint64_t seed) {
    for (size_t i = 0; i < n;) {
        uint32_t bits = (uint32_t)retrofit_hash(seed, i);
        // an fp16 of a middling exponent: (1024 + m)·2^(e-25)
        uint32_t e = 8 + bits % 5, fraction = bits >> 8 & 1023, half = bits >> 31 << 15 | e << 10 | fraction;
        float scale = ldexpf((float)(1024 + fraction), (int)e - 25) * (bits >> 31 ? -1 : 1), low = -8 * scale;
        if (type == 0) expected[i] = (float)retrofit_hash_normal(seed, i), fwrite(&expected[i++], 4, 1, f);
        else if (type == 1) expected[i++] = scale, put_number(f, half, 2);
        else if (type == 30) bits = (0x3c00 | (bits & 0x81ff)) << 16, memcpy(&expected[i++], &bits, 4), put_number(f, bits >> 16, 2);
        else {
            put_number(f, half, 2);
            if (type == 3) put_number(f, 0xb400, 2), low = -0.25f;
            for (int j = 0; j < (type == 8 ? 32 : 16); j++) {
                uint8_t q = (uint8_t)(retrofit_hash(seed + 1, i + (size_t)j) >> 9);
                put_number(f, q, 1);
                if (type == 8) expected[i + (size_t)j] = scale * (float)(int8_t)q;
                else expected[i + (size_t)j] = scale * (float)(q % 16) + low, expected[i + 16 + (size_t)j] = scale * (float)(q / 16) + low;
            }
            i += 32;
        }
    }
}

// A Llama of d = 32, 4 heads of 8, 2 kv, F = 64, two layers: the file at path, and the numbers a reader should find, by Hugging Face's names.
enum { D = 32, HEADS = 4, KV = 2, F_ = 64, LAYERS = 2 };
enum { GOOD, BAD_TYPE, EXTRA_TENSOR, NO_TENSOR, BAD_ARCHITECTURE, BAD_OFFSET, NOT_FINITE, BAD_PRE, FEW_ROWS, BAD_ROPE, BAD_VERSION, FLAWS };
static retrofit_model *write_gguf(const char *path, uint32_t type, const char *style, bool tied, bool llama3, int flaw) {
    static const struct { const char *gguf; int rows, cols; } table[] = {
        {"attn_norm", 1, D}, {"attn_q", D, D}, {"attn_k", D / 2, D}, {"attn_v", D / 2, D}, {"attn_output", D, D},
        {"ffn_norm", 1, D}, {"ffn_gate", F_, D}, {"ffn_up", F_, D}, {"ffn_down", D, F_}};
    char *header = NULL, *data = NULL;
    size_t header_size, data_size, tensors = 0, vocab = flaw == FEW_ROWS ? 640 : 928;
    retrofit_config c = {.n_embd = D, .n_heads = HEADS, .n_kv_heads = KV, .head_dim = D / HEADS, .intermediate = F_, .vocab = vocab, .context = 512,
                         .coda = LAYERS, .norm_eps = 1e-5f, .rope_theta = llama3 ? 500000 : 10000, .rope_llama3 = llama3, .mean_recurrence = 1, .backprop_depth = 1};
    if (llama3) c.rope_factor = 32, c.rope_low = 1, c.rope_high = 4, c.rope_original_context = 8192;
    retrofit_model *m = retrofit_model_new(&c, &retrofit_cpu);
    need(m && retrofit_model_allocate(m, RETROFIT_INFERENCE), "model");
    metadata meta = {NULL, NULL, 0, 0};
    FILE *h = open_memstream(&header, &header_size), *f = open_memstream(&data, &data_size);
    meta.f = open_memstream(&meta.bytes, &meta.size);
    meta_text(&meta, "general.architecture", flaw == BAD_ARCHITECTURE ? "gemma" : "llama");
    meta_u32(&meta, "llama.embedding_length", D), meta_u32(&meta, "llama.feed_forward_length", F_), meta_u32(&meta, "llama.block_count", LAYERS);
    meta_u32(&meta, "llama.attention.head_count", HEADS), meta_u32(&meta, "llama.attention.head_count_kv", KV), meta_u32(&meta, "llama.context_length", 512);
    meta_f32(&meta, "llama.attention.layer_norm_rms_epsilon", 1e-5f), meta_u32(&meta, "llama.rope.dimension_count", D / HEADS);
    if (llama3) meta_f32(&meta, "llama.rope.freq_base", 500000);
    meta_bool(&meta, "some.flag", true), meta_array(&meta, "some.numbers", 10, 2), put_number(meta.f, 1, 8), put_number(meta.f, 2, 8);
    if (flaw == BAD_PRE) meta_text(&meta, "tokenizer.ggml.pre", "qwen2"); // the first counts
    meta_tokenizer(&meta, style);
    float *x = (float *)retrofit_allocate(vocab * D, sizeof *x);
    for (size_t i = 0; i < m->parameter_count; i++) {
        retrofit_parameter *p = m->parameters[i];
        float *to = p->master;
        if (tied && p == &m->lm_head) memcpy(to, m->wte.master, vocab * D * sizeof *to);
        for (size_t j = 0; j < p->sources && !(tied && p == &m->lm_head); to += p->source[j++].rows * p->cols) {
            size_t layer = i ? (i - 1) / 6 : 0, place[] = {0, 1, 4, 5, 6, 8}, rows = p->source[j].rows;
            char name[64];
            if (p == &m->wte || p == &m->ln_f || p == &m->lm_head) strcpy(name, p == &m->wte ? "token_embd.weight" : p == &m->ln_f ? "output_norm.weight" : "output.weight");
            else snprintf(name, sizeof name, "blk.%zu.%s.weight", layer, table[place[(i - 1) % 6] + j].gguf);
            uint32_t stored = p->kind == RETROFIT_NORM ? 0 : type; // llama.cpp never quantises norms
            if (flaw == NO_TENSOR && !strcmp(name, "blk.1.ffn_up.weight")) continue;
            while (fflush(f), data_size % 32) fputc(0, f);
            put_string(h, name, strlen(name)), put_number(h, p->kind == RETROFIT_NORM ? 1 : 2, 4), put_number(h, p->cols, 8);
            if (p->kind != RETROFIT_NORM) put_number(h, rows, 8);
            put_number(h, flaw == BAD_TYPE && i == 3 ? 12 : stored, 4), put_number(h, flaw == BAD_OFFSET && i == 4 ? 1u << 30 : data_size, 8), tensors++;
            put_numbers(f, stored, x, rows * p->cols, i * 8 + j);
            size_t head = D / HEADS;
            for (size_t r = 0; r < rows; r++) { // llama.cpp's row 2n + s of a head of q or k is row s·head/2 + n of Hugging Face's
                size_t within = r % head, at = p->sources == 3 && j < 2 ? r - within + within % 2 * (head / 2) + within / 2 : r;
                memcpy(to + at * p->cols, x + r * p->cols, p->cols * sizeof *x);
            }
        }
    }
    if (llama3 || flaw == EXTRA_TENSOR) {
        while (fflush(f), data_size % 32) fputc(0, f);
        const char *name = llama3 ? "rope_freqs.weight" : "blk.0.attn_q.bias";
        put_string(h, name, strlen(name)), put_number(h, 1, 4), put_number(h, D / HEADS / 2, 8), put_number(h, 0, 4), put_number(h, data_size, 8), tensors++;
        for (size_t i = 0; i < D / HEADS / 2; i++) {
            double wavelength = 2 * 3.14159265358979323846 * pow(500000, 2.0 * (double)i / (D / HEADS)), smooth = (8192 / wavelength - 1) / 3;
            double keep = wavelength < 2048 ? 1 : wavelength > 8192 ? 0 : smooth;
            float factor = (float)(1 / (keep + (1 - keep) / 32)) + (flaw == BAD_ROPE && i == 1);
            fwrite(&factor, 4, 1, f);
        }
    }
    fclose(h), fclose(meta.f), fclose(f);
    if (flaw == NOT_FINITE) memcpy(data, &(float){NAN}, 4); // the embedding's first number
    FILE *out = fopen(path, "wb");
    fwrite("GGUF", 1, 4, out), put_number(out, flaw == BAD_VERSION ? 1 : 3, 4), put_number(out, tensors, 8), put_number(out, meta.values, 8);
    fwrite(meta.bytes, 1, meta.size, out), fwrite(header, 1, header_size, out);
    while (ftell(out) % 32) fputc(0, out);
    fwrite(data, 1, data_size, out), fclose(out);
    free(header), free(data), free(meta.bytes), free(x);
    return m;
}

static void same_encoding(const char *made, const char *style) {
    char path[256];
    size_t size;
    snprintf(path, sizeof path, FIXTURES "tokenizers/%s/cases.json", style);
    char *text = retrofit_read_file(path, &size);
    retrofit_json *cases = retrofit_json_parse(text, size, path);
    retrofit_tokenizer *t = retrofit_tokenizer_load(made);
    need(cases && t, "tokenizer of the GGUF");
    size_t wrong = 0;
    for (const retrofit_json *e = cases->child; e; e = e->next) {
        const retrofit_json *s = retrofit_json_get(e, "text"), *expected = retrofit_json_get(e, "ids_with_special"), *decoded = retrofit_json_get(e, "decoded");
        size_t count, i = 0, length = 0;
        int32_t *ids = retrofit_encode(t, s->string, s->length, true, &count);
        bool same = ids && count == expected->count;
        for (const retrofit_json *x = expected->child; same && x; x = x->next) same = ids[i++] == (int32_t)x->number;
        free(ids);
        const retrofit_json *plain = retrofit_json_get(e, "ids");
        int32_t *them = (int32_t *)retrofit_allocate(plain->count, sizeof *them);
        i = 0;
        for (const retrofit_json *x = plain->child; x; x = x->next) them[i++] = (int32_t)x->number;
        char *back = retrofit_decode(t, them, i, true, &length);
        same = same && back && length == decoded->length && !memcmp(back, decoded->string, length);
        free(them), free(back), wrong += !same;
    }
    check(wrong == 0, "%s: the tokenizer from the GGUF gives %zu of %zu cases otherwise", style, wrong, cases->count);
    free(text), retrofit_json_free(cases), retrofit_tokenizer_free(t);
}

static void gguf_files(void) {
    static const struct { const char *name; uint32_t type; const char *style; bool tied, llama3; } files[] = {
        {"f32", 0, "llama2_style", false, false}, {"f16", 1, "llama3_style", false, true}, {"bf16", 30, "smollm_style", true, false},
        {"q8_0", 8, "llama2_style", true, false}, {"q4_0", 2, "llama3_style", true, true}, {"q4_1", 3, "smollm_style", false, false}};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        const char *file = in_work("%s.gguf", files[i].name);
        char plain[256], cut[256];
        snprintf(plain, sizeof plain, "%s", in_work("gguf.%s", files[i].name)), snprintf(cut, sizeof cut, "%s", in_work("gguf.%s.cut", files[i].name));
        retrofit_model *expected = write_gguf(file, files[i].type, files[i].style, files[i].tied, files[i].llama3, GOOD);
        works("--from %s --to %s", file, plain);
        works("--from %s --to %s --prelude none --core 0 --coda 1 --dtype bf16", file, cut);
        retrofit_model *m = load(plain), *r = load(cut);
        expected->config.state_std = m->config.state_std; // a plain model's file has none
        same_config(files[i].name, &m->config, &expected->config);
        check(m->config.bos >= 0 && m->config.eos >= 0, "%s: bos and eos", files[i].name);
        same_model(files[i].name, m, expected, true, false);
        same_numbers(files[i].name, &r->core[0].w_gate_up, &expected->coda[0].w_gate_up, true), same_numbers(files[i].name, &r->lm_head, &expected->lm_head, true);
        same_encoding(plain, files[i].style), same_encoding(cut, files[i].style);
        retrofit_free(m), retrofit_free(r), retrofit_free(expected);
    }
    static const char *const said[FLAWS] = {NULL, "type 12", "no place", "blk.1.ffn_up.weight is missing", "gemma", "past the file's end",
                                            "not finite", "qwen2", "fewer embeddings", "rope_freqs", "version 1"};
    for (int flaw = 1; flaw < FLAWS; flaw++) {
        retrofit_free(write_gguf(in_work("flaw.gguf"), 0, flaw == BAD_PRE ? "llama3_style" : "llama2_style", false, flaw == BAD_ROPE, flaw));
        fails(1, said[flaw], "--from %s --to %s", in_work("flaw.gguf"), in_work("bad"));
    }
    size_t size;
    retrofit_free(write_gguf(in_work("flaw.gguf"), 8, "smollm_style", true, false, GOOD));
    char *bytes = retrofit_read_file(in_work("flaw.gguf"), &size), *at = (char *)memmem(bytes, size, "llama.feed_forward_length", 25);
    at[29] = 32; // 64 before: the shapes no longer fit
    write_text(in_work("shape.gguf"), bytes, size);
    fails(1, "metadata ask for", "--from %s --to %s", in_work("shape.gguf"), in_work("bad"));
    static const double parts[] = {0, .00002, .0001, .001, .01, .1, .3, .5, .9, .999};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) { // cut off anywhere
        write_text(in_work("cut.gguf"), bytes, (size_t)(parts[i] * (double)size));
        fails(1, "cut.gguf", "--from %s --to %s", in_work("cut.gguf"), in_work("bad"));
    }
    free(bytes);
}

// ---- Bad input ---------------------------------------------------------------------------------------------------------------
static void bad_input(void) {
    char bad[256], bin[256];
    strcpy(bad, in_work("bad")), strcpy(bin, in_work("bad.bin"));
    char source[] = "--from " FIXTURES "tiny/base", good[] = "--prelude 0-1 --core 3-5 --coda 6-7", style[] = "--tokenizer " FIXTURES "tokenizers/smollm_style";
    // usage
    fails(2, "--help", "");
    fails(2, "did you mean --core", "%s --to %s --cote 3", source, bad);
    fails(2, "--from, --random and --tokenize", "%s --random x --to %s", source, bad);
    fails(2, "--from, --random and --tokenize", "%s --tokenize x.txt --to %s", source, bad);
    fails(2, "--to is needed", "%s %s", source, good);
    fails(2, "exclude each other", "%s --to %s %s --preset tinyllama", source, bad, good);
    fails(2, "22 layers, this one has 8", "%s --to %s --preset tinyllama", source, bad);
    fails(2, "go together", "%s --to %s --core 3-5", source, bad);
    fails(2, "goes with a choice of layers", "%s --to %s --seed 4", source, bad);
    fails(2, "does not go with --from", "%s --to %s %s %s", source, bad, good, style);
    fails(2, "not an option", "%s --to %s %s extra", source, bad, good);
    fails(2, "is one of", "%s --to %s %s --dtype f64", source, bad, good);
    fails(2, "whole number", "%s --to %s %s --seed x", source, bad, good);
    fails(2, "65536", "%s --to %s %s --mean-recurrence 0", source, bad, good);
    static const char *const lists[] = {"3-", "-3", "3,,4", "5-3", "a", "3,", "3 4", "+3", "3-4-5", "0x3", "''", "99999999999999999999"};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) fails(2, "--core", "%s --to %s --prelude 0 --core '%s' --coda 7", source, bad, lists[i]);
    fails(2, "there is no layer 8: the source has 8", "%s --to %s --prelude 0-1 --core 3-5 --coda 6-8", source, bad);
    fails(2, "layer 4 is there twice", "%s --to %s --prelude 0-1 --core 3-5,4 --coda 6-7", source, bad);
    fails(2, "layer to repeat", "%s --to %s --prelude 0-1 --core none --coda 6-7", source, bad);
    // models
    fails(1, "recurrent already", "--from " FIXTURES "tiny/recurrent --to %s %s", bad, good);
    fails(1, "No such file", "--from %s --to %s", in_work("missing"), bad);
    fails(1, "No such file", "--random %s --to %s", in_work("missing"), bad);
    write_text(in_work("file"), "text, no model\n", 15);
    fails(1, "no GGUF", "--from %s --to %s", in_work("file"), bad);
    fails(1, "Not a directory", "%s --to %s/under/it", source, in_work("file"));
    fails(1, "bad JSON", "--random %s --to %s", in_work("file"), bad);
    mkdir(in_work("there"), 0777);
    fails(1, "exists already", "%s --to %s", source, in_work("there"));
    fails(1, "exists already", "%s --to %s", source, in_work("file"));
    size_t size;
    char *bytes = retrofit_read_file(FIXTURES "tiny/base/model.safetensors", &size), *config = retrofit_read_file(FIXTURES "tiny/base/config.json", &(size_t){0});
    mkdir(in_work("broken"), 0777);
    write_text(in_work("broken/config.json"), config, strlen(config));
    fails(1, "no model.safetensors", "--from %s --to %s", in_work("broken"), bad);
    write_text(in_work("broken/model.safetensors"), bytes, size - 1000);
    fails(1, "truncated", "--from %s --to %s %s", in_work("broken"), bad, good);
    write_text(in_work("broken/model.safetensors"), bytes, size);
    char *wide = strstr(config, "\"intermediate_size\": 88");
    memcpy(wide, "\"intermediate_size\": 80", 23), write_text(in_work("broken/config.json"), config, strlen(config));
    fails(1, "shape", "--from %s --to %s %s", in_work("broken"), bad, good);
    fails(2, "plain model", "--random %s/config.json --to %s --backprop-depth 3", in_work("broken"), bad);
    free(bytes), free(config);
    // text
    write_text(in_work("empty.txt"), " \n\t", 3), write_text(in_work("x.md"), "x", 1), write_text(in_work("x.txt"), "x", 1);
    fails(1, "no text", "--tokenize %s %s --to %s", in_work("empty.txt"), style, bin);
    fails(2, ".jsonl", "--tokenize %s %s --to %s", in_work("x.md"), style, bin);
    fails(1, "No such file", "--tokenize %s %s --to %s", in_work("missing.txt"), style, bin);
    fails(2, "needs files", "--tokenize %s --to %s", style, bin);
    fails(2, "--tokenizer is needed", "--tokenize %s --to %s", in_work("x.txt"), bin);
    fails(2, ".bin", "--tokenize %s %s --to %s", in_work("x.txt"), style, in_work("y.txt"));
    fails(1, "tokenizer.json", "--tokenize %s --tokenizer %s --to %s", in_work("x.txt"), in_work("there"), bin);
    fails(1, "No such file", "--tokenize %s %s --to %s/no/where.bin", in_work("x.txt"), style, work);
    fails(1, "Not a directory", "--tokenize %s %s --to %s/x.bin", in_work("x.txt"), style, in_work("file"));
    static const char *const lines[] = {"{\"text\":\"a\"}\n{\"text\":", "{\"text\":\"a\"}\nnull\n", "{\"text\":\"a\"}\n{\"text\":3}\n", "{\"text\":\"a\"}\n{\"text\":\"\xff\"}\n"};
    for (size_t i = 0; i < 4; i++) {
        write_text(in_work("x.jsonl"), lines[i], strlen(lines[i]));
        fails(1, "x.jsonl: line 2", "--tokenize %s %s --to %s", in_work("x.jsonl"), style, bin);
    }
    mkdir(in_work("d.txt"), 0777);
    fails(1, "not a regular file", "--tokenize %s %s --to %s", in_work("d.txt"), style, bin);
    works("--help");
}

int main(void) {
    need(asprintf(&program, "%s/convert", getenv("BIN") ? getenv("BIN") : ".") > 0, "memory");
    strcpy(work, "/tmp/retrofit-convert-XXXXXX");
    need(access(program, X_OK) == 0 && mkdtemp(work), program);
    surgery("tiny", "--prelude 0-1 --core 3-5 --coda 6-7");
    surgery("llama3", "--prelude 0 --core 1,3 --coda 4");
    surgery("head64", "--prelude 0 --core 1 --coda 1");
    identity("tiny", "--prelude 0-1 --core 2-5 --coda 6-7");
    identity("tiny", "--prelude none --core 0-7 --coda none");
    identity("llama3", "--prelude 0-2 --core 3 --coda 4");
    sharded_source();
    random_model(FIXTURES "tiny/recurrent/config.json", "random", false);
    random_model(FIXTURES "llama3/base", "random.plain", true);
    tokenizing("llama2_style"), tokenizing("llama3_style"), tokenizing("smollm_style");
    tokenizing_details();
    gguf_files();
    bad_input();
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", work);
    check(system(command) == 0, "%s: cannot be removed", work);
    return finish("convert");
}

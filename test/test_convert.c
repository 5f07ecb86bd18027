// convert, run as a user would: surgery compared with the authors' checkpoints, random models,
// token shards, GGUF files made here, and bad input.
#include "test.h"
#include <sys/wait.h>

// =================================================================================================
// Running the program
// =================================================================================================

static char work[64]; // a directory of this run's own; everything is made in it
static char *program;

// The path of a file in that directory, good for the next 31 calls.
static const char *in_work(const char *format, ...) {
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

static char *read_text(const char *path) {
    size_t size;
    char *text = retrofit_read_file(path, &size);
    need(text != NULL, path);
    return text;
}

static void works(const char *format, ...) {
    va_list args;
    va_start(args, format);
    int code = run_arguments(format, args);
    va_end(args);
    char *err = read_text(in_work("err"));
    check(code == 0, "%s: exit code %d: %s", format, code, err);
    free(err);
}

// What the last run of convert said, on stdout and stderr.
static bool said(const char *what) {
    char *out = read_text(in_work("out")), *err = read_text(in_work("err"));
    bool found = strstr(out, what) || strstr(err, what);
    free(out);
    free(err);
    return found;
}

// Takes the lines of progress out, which a busy machine prints every two seconds.
static void remove_progress(char *err) {
    char *to = err;
    for (char *line = err; *line;) {
        size_t size = strcspn(line, "\n");
        if (line[size]) size++;
        char *share = strstr(line, " % of ");
        if (!share || share > line + size) {
            memmove(to, line, size);
            to += size;
        }
        line += size;
    }
    *to = 0;
}

// Works, and has nothing to say on stderr.
static void works_quietly(const char *format, ...) {
    va_list args;
    va_start(args, format);
    int code = run_arguments(format, args);
    va_end(args);
    char *err = read_text(in_work("err"));
    remove_progress(err);
    check(code == 0 && !err[0], "%s: exit code %d, on stderr: '%s'", format, code, err);
    free(err);
}

// Whether there is a temporary file or directory, or the output that must not be.
static bool left_behind(void) {
    glob_t found;
    memset(&found, 0, sizeof found);
    bool temporary = glob(in_work("*.tmp-*"), 0, NULL, &found) == 0;
    globfree(&found);
    return temporary || access(in_work("bad"), F_OK) == 0 || access(in_work("bad.bin"), F_OK) == 0;
}

// One line on stderr that says `what`, the exit code, and nothing left behind.
static void fails(int expected, const char *what, const char *format, ...) {
    va_list args;
    va_start(args, format);
    setenv("ASAN_OPTIONS", "detect_leaks=0", 1); // what is left when a program exits is no leak
    int code = run_arguments(format, args);
    unsetenv("ASAN_OPTIONS");
    va_end(args);
    char *err = read_text(in_work("err"));
    const char *end = strchr(err, '\n');
    bool one_line = end && !end[1];
    check(code == expected, "%s: exit code %d, not %d: %s", format, code, expected, err);
    check(one_line && strstr(err, what), "%s: not one line with '%s' on stderr: '%s'", format, what,
          err);
    check(!left_behind(), "%s: something was left behind", format);
    free(err);
}

static void write_text(const char *path, const void *text, size_t size) {
    FILE *f = fopen(path, "wb");
    need(f && fwrite(text, 1, size, f) == size && fclose(f) == 0, path);
}

static void write_string(const char *path, const char *text) {
    write_text(path, text, strlen(text));
}

// =================================================================================================
// Comparing models
// =================================================================================================

static retrofit_model *load(const char *path) {
    retrofit_model *model = retrofit_load(path, &retrofit_cpu, RETROFIT_INFERENCE);
    need(model != NULL, path);
    return model;
}

// As fp32; to be freed.
static float *numbers(const retrofit_parameter *p) {
    float *x = retrofit_allocate(p->rows * p->cols, sizeof *x);
    retrofit_to_float(x, p->weight.data, p->weight.type, p->rows * p->cols);
    return x;
}

// rounded: b is rounded to bf16 first.
static void same_numbers(const char *name, const retrofit_parameter *a, const retrofit_parameter *b,
                         bool rounded) {
    float *x = numbers(a), *y = numbers(b);
    bool same = a->rows == b->rows && a->cols == b->cols;
    for (size_t i = 0; rounded && i < b->rows * b->cols; i++)
        y[i] = retrofit_bf16_to_float(retrofit_float_to_bf16(y[i]));
    same = same && !memcmp(x, y, a->rows * a->cols * sizeof *x);
    check(same, "%s: %s is not the same", name, a->source[0].name);
    free(x);
    free(y);
}

static void same_model(const char *name, const retrofit_model *a, const retrofit_model *b,
                       bool adapter, bool rounded) {
    check(a->parameter_count == b->parameter_count, "%s: number of parameters", name);
    for (size_t i = 0; i < a->parameter_count && i < b->parameter_count; i++)
        if (adapter || a->parameters[i]->part != RETROFIT_PART_ADAPTER)
            same_numbers(name, a->parameters[i], b->parameters[i], rounded);
}

static void same_config(const char *name, const retrofit_config *a, const retrofit_config *b) {
#define SAME(field) check(a->field == b->field, "%s: config: " #field, name)
    SAME(n_embd);
    SAME(n_heads);
    SAME(n_kv_heads);
    SAME(head_dim);
    SAME(intermediate);
    SAME(vocab);
    SAME(context);
    SAME(prelude);
    SAME(core);
    SAME(coda);
    SAME(norm_eps);
    SAME(rope_theta);
    SAME(rope_llama3);
    SAME(rope_factor);
    SAME(rope_low);
    SAME(rope_high);
    SAME(rope_original_context);
    SAME(state_std);
    SAME(mean_recurrence);
    SAME(backprop_depth);
    SAME(trained_seq_len);
    SAME(trained_state_zero);
    SAME(tied);
    SAME(post_norm);
    SAME(qkv_bias);
    SAME(qk_norm);
#undef SAME
}

typedef struct {
    double mean, std, max; // max: of the absolute values
} moments;

static moments moments_of(const float *x, size_t n) {
    moments result = {0, 0, 0};
    for (size_t i = 0; i < n; i++) {
        result.mean += (double)x[i] / (double)n;
        result.max = fmax(result.max, fabs((double)x[i]));
    }
    for (size_t i = 0; i < n; i++) {
        double difference = (double)x[i] - result.mean;
        result.std += difference * difference / (double)n;
    }
    result.std = sqrt(result.std);
    return result;
}

// =================================================================================================
// Surgery
// =================================================================================================

// The adapter is uniform in ±1/√(2d), whose standard deviation is 1/√(2d)/√3; another seed gives
// another one.
static void check_adapter(const char *name, const retrofit_model *model,
                          const retrofit_model *other_seed) {
    size_t d = model->config.n_embd;
    double bound = 1 / sqrt(2 * (double)d);
    float *a = numbers(&model->adapter), *b = numbers(&other_seed->adapter);
    moments m = moments_of(a, 2 * d * d);
    check(m.max <= bound && m.max > .99 * bound &&
              fabs(m.mean) < 4 * bound / sqrt(6.0) / (double)d &&
              fabs(m.std / (bound / sqrt(3.0)) - 1) < .04,
          "%s: adapter: largest %g of %g, mean %g, std %g", name, m.max, bound, m.mean, m.std);
    check(relative_error(b, a, 2 * d * d) > 1, "%s: another seed gives another adapter", name);
    free(a);
    free(b);
}

// The authors' surgery on the same source is recurrent/ beside base/.
static void surgery(const char *name, const char *layers) {
    char base[256], recurrent[256];
    snprintf(base, sizeof base, FIXTURES "%s/base", name);
    snprintf(recurrent, sizeof recurrent, FIXTURES "%s/recurrent", name);
    const char *to = in_work("%s", name), *bf16 = in_work("%s.bf16", name);
    const char *again = in_work("%s.again", name);
    works("--from %s --to %s %s --mean-recurrence 8 --backprop-depth 4", base, to, layers);
    works("--from %s --to %s %s --dtype=bf16 --seed 2", base, bf16, layers);
    works("--from %s --to %s %s --seed 1", base, again, layers);

    retrofit_model *ours = load(to), *theirs = load(recurrent);
    retrofit_model *rounded = load(bf16), *repeated = load(again);
    const retrofit_config *defaults = &repeated->config;
    same_config(name, &ours->config, &theirs->config);
    same_model(name, ours, theirs, false, false);
    same_model(name, rounded, theirs, false, true);
    same_model(name, ours, repeated, true, false);
    check(defaults->mean_recurrence == 8 && defaults->backprop_depth == 8,
          "%s: recurrence without options", name);
    check(rounded->wte.weight.type == RETROFIT_BF16 && ours->wte.weight.type == RETROFIT_F32,
          "%s: the type in the file", name);
    check_adapter(name, ours, rounded);
    retrofit_free(ours);
    retrofit_free(theirs);
    retrofit_free(rounded);
    retrofit_free(repeated);
}

static float *logits_of(const retrofit_model *model, const int32_t *tokens, size_t B, size_t T,
                        size_t r) {
    float *logits = retrofit_allocate(B * T * model->config.vocab, sizeof *logits);
    retrofit_buffers *buffers = retrofit_buffers_new(model, B, T, 0, RETROFIT_KEEP_NOTHING, NULL);
    need(buffers && retrofit_forward(buffers, tokens, B, T, 0, 0, r, 0), "forward");
    retrofit_logits(buffers, 0, B * T, logits);
    retrofit_buffers_free(buffers);
    return logits;
}

// With [0 | I] and every layer kept in its place, one recurrence is the source itself.
static void identity(const char *name, const char *layers) {
    static int runs;
    const char *to = in_work("identity.%d", runs++);
    works("--from " FIXTURES "%s/base --to %s --adapter-init identity %s", name, to, layers);
    retrofit_model *model = load(to);

    char path[256];
    retrofit_map f;
    snprintf(path, sizeof path, FIXTURES "%s/forward_backward.safetensors", name);
    need(retrofit_safetensors_open(&f, path), path);
    const retrofit_tensor *tokens = fixture(&f, "tokens"), *expected = fixture(&f, "base.logits");
    float *logits = logits_of(model, tokens->data, tokens->shape[0], tokens->shape[1], 1);
    double error = relative_error(logits, expected->data, expected->count);
    check(error < 1e-5, "%s %s: identity adapter, r = 1, against the source: %.2e", name, layers,
          error);
    free(logits);
    retrofit_free(model);
    retrofit_safetensors_close(&f);
}

// tiny/base in two files with an index.
static void write_sharded_source(void) {
    retrofit_map f;
    need(retrofit_safetensors_open(&f, FIXTURES "tiny/base/model.safetensors"), "tiny/base");
    mkdir(in_work("sharded"), 0777);
    size_t half = f.count / 2;
    const char *a = in_work("sharded/a.safetensors"), *b = in_work("sharded/b.safetensors");
    need(retrofit_safetensors_write(a, &retrofit_cpu, f.tensors, half, RETROFIT_F32, NULL), a);
    need(retrofit_safetensors_write(b, &retrofit_cpu, f.tensors + half, f.count - half,
                                    RETROFIT_F32, NULL), b);
    char *config = read_text(FIXTURES "tiny/base/config.json");
    write_string(in_work("sharded/config.json"), config);
    free(config);

    FILE *index = fopen(in_work("sharded/model.safetensors.index.json"), "wb");
    fprintf(index, "{\"weight_map\":{");
    for (size_t i = 0; i < f.count; i++)
        fprintf(index, "%s\"%s\":\"%c.safetensors\"", i ? "," : "", f.tensors[i].name,
                i < half ? 'a' : 'b');
    fprintf(index, "}}");
    fclose(index);
    retrofit_safetensors_close(&f);
}

static void sharded_source(void) {
    write_sharded_source();
    const char *source = in_work("sharded"), *whole = in_work("unsharded"), *core = in_work("core");
    works("--from %s --to %s --prelude 0-1 --core 3-5 --coda 6-7", source, whole);
    retrofit_model *ours = load(whole), *theirs = load(FIXTURES "tiny/recurrent");
    same_model("sharded", ours, theirs, false, false);
    retrofit_free(ours);
    retrofit_free(theirs);

    fails(2, "no layer", "--from %s --to %s --prelude none --core 8 --coda none", source,
          in_work("bad"));
    works("--from %s --to %s --prelude none --core 7,2-3 --coda none", source, core);
    static const size_t layers[] = {7, 2, 3};
    ours = load(core);
    theirs = load(FIXTURES "tiny/base");
    for (size_t i = 0; i < 3; i++)
        same_numbers("core 7,2-3", &ours->core[i].w_qkv, &theirs->coda[layers[i]].w_qkv, false);
    retrofit_free(ours);
    retrofit_free(theirs);
}

// A number of that type, made from one of a fixture's, and in F16, which has no such numbers, from
// its bits.
static void put_as(FILE *f, const char *dtype, float x) {
    uint32_t bits;
    double wide = (double)x;
    memcpy(&bits, &x, sizeof bits);
    uint16_t upper = (uint16_t)(bits >> 16), half = (uint16_t)(bits >> 8 & 0xbfff); // finite
    if (!strcmp(dtype, "F32")) fwrite(&x, 4, 1, f);
    else if (!strcmp(dtype, "F64")) fwrite(&wide, 8, 1, f);
    else fwrite(strcmp(dtype, "F16") ? &upper : &half, 2, 1, f);
}

// A model in fp32 with its last tensor first, so that those that make up a parameter lie one above
// the other, as they never do in our files.
static void write_reversed(const char *model, const char *dtype, size_t size) {
    retrofit_map map;
    size_t offset = 0, header;
    char command[1024], *text = NULL;
    snprintf(command, sizeof command, "rm -rf %s && mkdir %s && cp %s/config.json %s",
             in_work("reversed"), in_work("reversed"), model, in_work("reversed"));
    need(system(command) == 0, command);
    snprintf(command, sizeof command, "%s/model.safetensors", model);
    need(retrofit_safetensors_open(&map, command), command);
    FILE *f = open_memstream(&text, &header);
    for (size_t i = map.count; i-- > 0;) {
        const retrofit_tensor *tensor = &map.tensors[i];
        fprintf(f, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%zu", offset ? "," : "{",
                tensor->name, dtype, tensor->shape[0]);
        if (tensor->dims == 2) fprintf(f, ",%zu", tensor->shape[1]);
        fprintf(f, "],\"data_offsets\":[%zu,%zu]}", offset, offset + tensor->count * size);
        offset += tensor->count * size;
    }
    fputc('}', f);
    fclose(f);

    f = fopen(in_work("reversed/model.safetensors"), "wb");
    fwrite(&header, 8, 1, f);
    fwrite(text, 1, header, f);
    for (size_t i = map.count; i-- > 0;) {
        const float *x = map.tensors[i].data;
        for (size_t j = 0; j < map.tensors[i].count; j++) put_as(f, dtype, x[j]);
    }
    fclose(f);
    free(text);
    retrofit_safetensors_close(&map);
}

// Numbers that are read from a file's tensors when they are written are those of a model that was
// loaded, in all types that a source may have.
static void reversed_sources(void) {
    static const struct {
        const char *family, *dtype;
        size_t size;
    } cases[] = {{"tiny", "F32", 4},  {"tiny", "BF16", 2}, {"tiny", "F16", 2},
                 {"qwen2", "F64", 8}, {"qwen3", "F16", 2}, {"olmo2", "BF16", 2}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *name = cases[i].dtype, *from = in_work("reversed");
        char base[256];
        snprintf(base, sizeof base, FIXTURES "%s/base", cases[i].family);
        write_reversed(base, name, cases[i].size);
        works_quietly("--from %s --to %s", from, in_work("reversed.%zu", i));
        works_quietly("--from %s --to %s --dtype bf16", from, in_work("rounded.%zu", i));
        works_quietly("--from %s --to %s --prelude 0 --core 1-2 --coda 3", from,
                      in_work("reversed.cut.%zu", i));
        retrofit_model *loaded = load(from), *again = load(in_work("reversed.%zu", i));
        retrofit_model *rounded = load(in_work("rounded.%zu", i));
        retrofit_model *cut = load(in_work("reversed.cut.%zu", i));
        same_model(name, again, loaded, false, false);
        same_model(name, rounded, loaded, false, true);
        same_numbers(name, &cut->prelude[0].w_qkv, &loaded->coda[0].w_qkv, false);
        same_numbers(name, &cut->core[1].w_gate_up, &loaded->coda[2].w_gate_up, false);
        same_numbers(name, &cut->coda[0].norm_2, &loaded->coda[3].norm_2, false);
        same_numbers(name, &cut->lm_head, &loaded->lm_head, false);
        if (loaded->config.qkv_bias)
            same_numbers(name, &cut->core[0].b_qkv, &loaded->coda[1].b_qkv, false);
        retrofit_free(loaded);
        retrofit_free(again);
        retrofit_free(rounded);
        retrofit_free(cut);
    }
}

// A model whose q, k, v and gate, up, 22 MB, would have to be copied if it were to run, in a
// process that may have 16 MB of its own. What a sanitizer needs for itself is more.
static void little_memory(void) {
#if !defined __SANITIZE_ADDRESS__
    static const char config[] =
        "{\"model_type\":\"llama\",\"hidden_size\":512,\"num_attention_heads\":8,"
        "\"intermediate_size\":1024,\"vocab_size\":256,\"num_hidden_layers\":3,"
        "\"max_position_embeddings\":64,\"rms_norm_eps\":1e-5}";
    char *whole = program;
    write_string(in_work("wide.json"), config);
    works("--random %s --to %s", in_work("wide.json"), in_work("wide"));
    write_reversed(in_work("wide"), "F32", 4);
    need(asprintf(&program, "ulimit -d 16000; OMP_NUM_THREADS=1 %s", whole) > 0, "memory");
    works("--from %s --to %s --prelude 0 --core 1 --coda 2", in_work("reversed"),
          in_work("wide.cut"));
    free(program);
    program = whole;
#endif
}

// =================================================================================================
// Random models
// =================================================================================================

// A normal number cut at 3 has a standard deviation of .9866.
static void check_random_parameter(const char *name, const retrofit_config *c,
                                   const retrofit_parameter *p) {
    const char *label = p->source[0].name;
    size_t n = p->rows * p->cols;
    double depth = (double)(c->prelude + c->core * c->mean_recurrence + c->coda);
    double expected = sqrt(2 / (5.0 * (double)c->n_embd));
    if (strstr(label, "attn.proj") || strstr(label, "mlp.proj") || strstr(label, "o_proj") ||
        strstr(label, "down_proj"))
        expected /= sqrt(2 * depth);

    float *x = numbers(p);
    moments m = moments_of(x, n);
    if (p->kind == RETROFIT_NORM)
        check(fabs(m.mean - 1) < 1e-12 && m.std < 1e-12, "%s %s: a norm is not 1", name, label);
    else
        check(fabs(m.std / expected - .9866) < 4 / sqrt(2.0 * (double)n) &&
                  m.max <= 3 * expected * (1 + 1e-6) &&
                  fabs(m.mean) < 4.5 * expected / sqrt((double)n),
              "%s %s: mean %g, std %g, largest %g; expected std %g", name, label, m.mean, m.std,
              m.max, expected);
    free(x);
}

static void random_model(const char *config, const char *name, bool plain) {
    works("--random %s --to %s --seed 7 --tokenizer " FIXTURES "tokenizers/llama2_style", config,
          in_work("%s", name));
    check(access(in_work("%s/tokenizer.json", name), F_OK) == 0,
          "%s: the tokenizer is carried along", name);
    retrofit_model *model = load(in_work("%s", name));
    const retrofit_config *c = &model->config;
    check(retrofit_is_plain(c) == plain, "%s: kind of model", name);
    for (size_t i = 0; i < model->parameter_count; i++)
        check_random_parameter(name, c, model->parameters[i]);
    retrofit_free(model);
}

// =================================================================================================
// Token shards
// =================================================================================================

typedef struct {
    int32_t *ids;
    size_t count;
} id_list;

// Appends what a document should become.
static void append(id_list *list, const retrofit_tokenizer *tokenizer, const char *text,
                   size_t size) {
    size_t n;
    int32_t *ids = retrofit_encode(tokenizer, text, size, true, &n);
    need(ids != NULL, "encode");
    list->ids = realloc(list->ids, (list->count + n + 1) * sizeof *ids);
    need(list->ids != NULL, "memory");
    memcpy(list->ids + list->count, ids, n * sizeof *ids);
    list->count += n;
    list->ids[list->count++] = retrofit_tokenizer_eos(tokenizer);
    free(ids);
}

// width: bytes of an id.
static void same_shard(const char *name, const char *path, const id_list *expected, size_t width) {
    size_t size = 0, wrong = 0;
    char *bytes = retrofit_read_file(path, &size);
    bool complete = bytes && size == 1024 + expected->count * width;
    check(complete, "%s: %zu bytes for %zu tokens", name, size, expected->count);
    if (!complete) {
        free(bytes);
        return;
    }
    int32_t header[6];
    memcpy(header, bytes, sizeof header);
    check(header[0] == (width == 2 ? RETROFIT_SHARD_MAGIC_16 : RETROFIT_SHARD_MAGIC_32) &&
              header[1] == (width == 2 ? 1 : 7) && header[2] == (int32_t)expected->count &&
              (header[3] || header[4]) && header[5] == 0,
          "%s: header", name);
    for (size_t i = 0; i < expected->count; i++) {
        uint32_t id = 0;
        memcpy(&id, bytes + 1024 + i * width, width);
        wrong += id != (uint32_t)expected->ids[i];
    }
    check(wrong == 0, "%s: %zu of %zu ids are wrong", name, wrong, expected->count);
    free(bytes);
}

// Writes a.txt and b.jsonl, 2503 documents and 2 empty ones, more than a batch; appends their ids.
static void write_documents(const retrofit_tokenizer *tokenizer, id_list *expected) {
    // An em space before; an ideographic space, a unit separator and a line's end behind.
    static const char before[] = "\n \xe2\x80\x83", behind[] = "\xe3\x80\x80\x1f\r\n";
    static const char first[] = "Hello, world 12345!  It's \xc3\xa9t\xc3\xa9";
    static const char second[] = "x\ty \\ \" </s> <|im_end|>";
    static const char last[] = "nul \0 within, no newline behind";

    FILE *f = fopen(in_work("a.txt"), "wb");
    fprintf(f, "%s%s%s", before, first, behind);
    fclose(f);
    append(expected, tokenizer, first, sizeof first - 1);

    f = fopen(in_work("b.jsonl"), "wb");
    fprintf(f, "{\"n\":1,\"text\":");
    retrofit_json_write_string(f, second, sizeof second - 1);
    fprintf(f, "}\r\n{\"text\":\" \\n\\u00a0 \"}\n\n");
    append(expected, tokenizer, second, sizeof second - 1);
    for (int i = 0; i < 2500; i++) {
        char text[64];
        snprintf(text, sizeof text, "document %d of many", i);
        fprintf(f, "{\"text\":\"%s \"}\n", text);
        append(expected, tokenizer, text, strlen(text));
    }
    fprintf(f, "{\"text\":\"nul \\u0000 within, no newline behind\"}");
    fclose(f);
    append(expected, tokenizer, last, sizeof last - 1);
}

static void tokenizing(const char *style) {
    char directory[256];
    snprintf(directory, sizeof directory, FIXTURES "tokenizers/%s", style);
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(directory);
    need(tokenizer != NULL, directory);
    id_list expected = {NULL, 0};
    write_documents(tokenizer, &expected);
    const char *shard = in_work("%s.bin", style);
    works("--tokenize %s %s --tokenizer %s --to %s", in_work("a.txt"), in_work("b.jsonl"),
          directory, shard);
    same_shard(style, shard, &expected, 2);

    char *out = read_text(in_work("out"));
    check(strstr(out, "2503 documents") && strstr(out, "2 empty"), "%s: what it prints: %s", style,
          out);
    size_t size = retrofit_tokenizer_size(tokenizer);
    retrofit_data *data = retrofit_data_open(shard, 16, size, false, 0);
    check(data && retrofit_data_rows(data) == expected.count / 17,
          "%s: the loader reads the shard: %s", style, retrofit_error());
    free(out);
    retrofit_data_close(data);
    free(expected.ids);
    retrofit_tokenizer_free(tokenizer);
}

// Another field than text; a tokenizer with an id above 65535, which adds its own EOS; the end of a
// document from config.json.
static void tokenizing_details(void) {
    static const char big[] =
        "{\"added_tokens\":[{\"id\":70000,\"content\":\"<e>\",\"special\":true}],"
        "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":69999,\"<e>\":70000},\"merges\":[]},"
        "\"post_processor\":{\"type\":\"TemplateProcessing\","
        "\"single\":[{\"Sequence\":{\"id\":\"A\"}},{\"SpecialToken\":{\"id\":\"<e>\"}}],"
        "\"special_tokens\":{\"<e>\":{\"ids\":[70000]}}}}";
    static const char small[] =
        "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"z\":2},\"merges\":[]}}";
    mkdir(in_work("big"), 0777);
    write_string(in_work("big/tokenizer.json"), big);
    write_string(in_work("c.jsonl"), "{\"body\":\"ab\"}\n{\"body\":\"b\"}\n");
    fails(1, "names a token for the end", "--tokenize %s --tokenizer %s --to %s --field body",
          in_work("c.jsonl"), in_work("big"), in_work("bad.bin"));
    write_string(in_work("big/tokenizer_config.json"), "{\"eos_token\":\"<e>\"}");
    works("--field body --to %s --tokenizer=%s --tokenize %s", in_work("big.bin"), in_work("big"),
          in_work("c.jsonl"));
    int32_t big_ids[] = {0, 69999, 70000, 69999, 70000};
    same_shard("uint32, its own EOS", in_work("big.bin"), &(id_list){big_ids, 5}, 4);

    mkdir(in_work("eos"), 0777);
    write_string(in_work("eos/tokenizer.json"), small);
    char *config = read_text(FIXTURES "tiny/base/config.json");
    write_string(in_work("eos/config.json"), config);
    free(config);
    works("--tokenize %s --tokenizer %s --to %s --field body", in_work("c.jsonl"), in_work("eos"),
          in_work("eos.bin"));
    int32_t small_ids[] = {0, 1, 2, 1, 2};
    same_shard("EOS from config.json", in_work("eos.bin"), &(id_list){small_ids, 5}, 2);
}

// ---- Text as people have it ---------------------------------------------------------------------

static const char smollm[] = "--tokenizer " FIXTURES "tokenizers/smollm_style";

typedef struct {
    const char *text;
    size_t size;
} bytes;
#define BYTES(literal) {literal, sizeof literal - 1}

// Tokenizes a file of this name and content with an option or none, and compares with documents.
static void same_documents(const char *name, bytes content, const char *option,
                           const bytes *documents, size_t count) {
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(FIXTURES "tokenizers/smollm_style");
    need(tokenizer != NULL, "smollm_style");
    id_list expected = {NULL, 0};
    for (size_t i = 0; i < count; i++)
        append(&expected, tokenizer, documents[i].text, documents[i].size);
    char path[256];
    strcpy(path, in_work("%s", name));
    write_text(path, content.text, content.size);
    works("--tokenize %s %s --to %s.bin %s", path, smollm, path, option);
    same_shard(name, in_work("%s.bin", name), &expected, 2);
    free(expected.ids);
    retrofit_tokenizer_free(tokenizer);
}

static void text_not_utf8(void) {
    static const bytes latin1 = BYTES("caf\xe9 na\xefve \xfc" "ber\n");
    static const bytes lines = BYTES("{\"text\":\"a\"}\n{\"text\":\"\xe9\xe8\"}\n");
    static const bytes replaced = BYTES("caf\xef\xbf\xbd na\xef\xbf\xbdve \xef\xbf\xbd" "ber");
    static const bytes replaced_lines[] = {BYTES("a"), BYTES("\xef\xbf\xbd\xef\xbf\xbd")};
    same_documents("latin1.txt", latin1, "--encoding-errors replace", &replaced, 1);
    check(said("latin1.txt: 3 stretches that are not UTF-8") && said("\n3 stretches"),
          "what was replaced is counted");
    same_documents("latin1.jsonl", lines, "--encoding-errors=replace", replaced_lines, 2);
    check(said("latin1.jsonl: 2 stretches") && said("line 2"), "the same in lines");
    char bad[256];
    strcpy(bad, in_work("bad.bin"));
    fails(1, "latin1.txt: byte 3: not UTF-8 (E9)", "--tokenize %s %s --to %s",
          in_work("latin1.txt"), smollm, bad);
    fails(1, "latin1.jsonl: line 2: byte 9: not UTF-8 (E9)", "--tokenize %s %s --to %s",
          in_work("latin1.jsonl"), smollm, bad);
    fails(2, "is one of", "--tokenize %s %s --to %s --encoding-errors ignore",
          in_work("latin1.txt"), smollm, bad);
}

// Files with text's names that are none, by how they begin.
static void files_not_text(void) {
    static const struct {
        bytes content;
        const char *what;
    } files[] = {
        {BYTES("\xff\xfet\0h\0e\0"), "UTF-16"},
        {BYTES("\xfe\xff\0t\0h\0e"), "UTF-16"},
        {BYTES("t\0h\0e\0 \0"), "UTF-16"},
        {BYTES("\xff\xfe\0\0t\0\0\0"), "UTF-32"},
        {BYTES("\x1f\x8b\x08\0\0\0\0\0"), "gzip"},
        {BYTES("\x28\xb5\x2f\xfd\x04\0"), "zstd"},
        {BYTES("PK\3\4\x14"), "zip"},
        {BYTES("PAR1\x15\x04"), "Parquet"},
        {BYTES("%PDF-1.4\n"), "PDF"},
        {BYTES("BZh91AY&SY"), "bzip2"},
        {BYTES("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"), "git lfs pull"},
    };
    static const char *const endings[] = {"txt", "jsonl"};
    for (size_t i = 0; i < 2 * sizeof files / sizeof *files; i++) {
        char path[256];
        strcpy(path, in_work("kind.%s", endings[i % 2]));
        write_text(path, files[i / 2].content.text, files[i / 2].content.size);
        fails(1, files[i / 2].what, "--tokenize %s %s --to %s --encoding-errors %s", path, smollm,
              in_work("bad.bin"), i % 4 < 2 ? "strict" : "replace");
    }
}

static void text_marks_and_lines(void) {
    static const bytes text = BYTES("\xef\xbb\xbfthe cat\r\nsat"), cat = BYTES("the cat\r\nsat");
    static const bytes lines = BYTES("\xef\xbb\xbf{\"text\":\"a\\r\\nb\"}\r\n\r\n{\"text\":\"c\"}");
    static const bytes documents[] = {BYTES("a\r\nb"), BYTES("c")};
    same_documents("mark.txt", text, "", &cat, 1);
    same_documents("mark.jsonl", lines, "", documents, 2);
    static const bytes nul = BYTES("a NUL\0 in a text"), empty = BYTES("");
    same_documents("nul.txt", nul, "", &nul, 1);
    check(said("nul.txt: 1 NUL"), "NUL characters are counted");
    write_text(in_work("empty.jsonl"), empty.text, empty.size);
    works("--tokenize %s %s %s --to %s", in_work("empty.jsonl"), in_work("nul.txt"), smollm,
          in_work("nul.bin"));
    check(said("empty.jsonl: there is no text"), "a file without text is named");
}

// What Python's json writes and datasets reads.
static void lines_of_python(void) {
    static const bytes lines = BYTES("{\"text\":\"x\\ud800y\"}\n"
                                     "{\"text\":\"\\\\ud800 \\ud83d\\ude00 \\udc00\"}\n"
                                     "{\"score\":NaN,\"a\":[-Infinity,Infinity],\"text\":\"NaN\"}\n"
                                     "{\"text\":null}\n{\"other\":1}\n{\"text\":NaN}\n"
                                     "{\"text\":\"last\"}\n");
    static const bytes documents[] = {
        BYTES("x\xef\xbf\xbdy"), BYTES("\\ud800 \xf0\x9f\x98\x80 \xef\xbf\xbd"), BYTES("NaN"),
        BYTES("last")};
    same_documents("python.jsonl", lines, "", documents, 4);
    check(said("2 halves of surrogate pairs (as \\ud800) became U+FFFD, the first in line 1"),
          "halves are counted");
    check(said("1 lines whose text is null were skipped, the first in line 4"), "null is counted");
    check(said("1 lines without the member that is the text were skipped, the first in line 5"),
          "lines without text are counted");
    check(said("\n1 empty documents"), "NaN is empty");
    static const struct {
        const char *line, *what;
    } bad[] = {
        {"{\"text\":[\"a\"]}", "x.jsonl: line 2: \"text\" is an array"},
        {"{\"text\":{\"a\":1}}", "x.jsonl: line 2: \"text\" is an object"},
        {"{\"text\":1}", "x.jsonl: line 2: \"text\" is a number"},
        {"{\"text\":true}", "x.jsonl: line 2: \"text\" is a truth value"},
        {"\"text\"", "x.jsonl: line 2: a string, not an object"},
        {"[", "x.jsonl: line 2: a JSON array"},
        {"{\"text\":\"a\",\"text\":\"b\"}", "\"text\" is there twice"},
        {"{\"text\":\"a", "x.jsonl: line 2: byte"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char text[128];
        snprintf(text, sizeof text, "{\"text\":\"a\"}\n%s\n{\"text\":\"b\"}\n", bad[i].line);
        write_string(in_work("x.jsonl"), text);
        fails(1, bad[i].what, "--tokenize %s %s --to %s", in_work("x.jsonl"), smollm,
              in_work("bad.bin"));
    }
    write_string(in_work("x.jsonl"), "\n{\"content\":\"a\"}\n{\"content\":\"b\"}\n");
    fails(1, "x.jsonl: line 2: no \"text\" in it, nor in any other up to line 3",
          "--tokenize %s %s --to %s", in_work("x.jsonl"), smollm, in_work("bad.bin"));
}

// Names, in and out.
static void text_files(void) {
    char brackets[256], shard[256], one[256];
    strcpy(brackets, in_work("a[1] b.txt"));
    strcpy(shard, in_work("names.bin"));
    strcpy(one, in_work("one.txt"));
    write_string(brackets, "text");
    write_string(one, "text");
    works_quietly("--tokenize '%s' %s --to %s", brackets, smollm, shard);
    works("--tokenize %s '%s' %s/./one.txt %s --to %s", one, brackets, work, smollm, shard);
    check(said("are the same file") && said("names.bin is there already") && said("3 documents"),
          "the same file twice, and an output that is there");
    fails(1, "the shell found none", "--tokenize '%s/*.none.txt' %s --to %s", work, smollm,
          in_work("bad.bin"));
    mkdir(in_work("directory.bin"), 0777);
    fails(1, "no file", "--tokenize %s %s --to %s", one, smollm, in_work("directory.bin"));
    need(link(one, in_work("linked.bin")) == 0, "link");
    fails(1, "this is the input", "--tokenize %s %s --to %s", one, smollm, in_work("linked.bin"));

    FILE *f = fopen(in_work("long.txt"), "wb");
    for (int i = 0; i < 20000; i++) fprintf(f, "%d ", i);
    fclose(f);
    char *whole = program;
    need(asprintf(&program, "trap '' XFSZ; ulimit -f 8; %s", whole) > 0, "memory");
    fails(1, "writing failed", "--tokenize %s %s --to %s", in_work("long.txt"), smollm,
          in_work("bad.bin"));
    free(program);
    program = whole;
}

// =================================================================================================
// GGUF
// =================================================================================================

enum { GGML_F32 = 0, GGML_F16 = 1, GGML_Q4_0 = 2, GGML_Q8_0 = 8, GGML_Q4_K = 12, GGML_BF16 = 30,
       GGML_MXFP4 = 39 };
enum { META_U16 = 2, META_U32 = 4, META_I32 = 5, META_F32 = 6, META_BOOL = 7, META_STRING = 8,
       META_ARRAY = 9, META_U64 = 10, META_F64 = 12 };

// What is wrong with a file.
enum { GOOD, BAD_TYPE, EXTRA_TENSOR, NO_TENSOR, BAD_ARCHITECTURE, BAD_OFFSET, NOT_FINITE, BAD_PRE,
       FEW_ROWS, BAD_ROPE, BAD_VERSION, TENSOR_TWICE, OVERLAP, UNALIGNED, ROPE_SIZE, PART_KEY,
       PART_COUNT, NO_BIAS, NARROW_NORM };

// A further entry of the metadata. Of an array, `text` is the only element; there is none if it is
// NULL.
typedef struct {
    const char *key;
    uint32_t type;
    double number;
    const char *text;
} gguf_entry;

typedef struct {
    const char *name;
    uint32_t type;     // of its matrices
    const char *style; // of its tokenizer
    bool tied, llama3;
    int flaw;
    uint32_t bad_type; // of one tensor, where that is the flaw
    bool wide;         // counts are u64
    const char *model; // the directory that its numbers are from; NULL: those of the fixture
    const char *architecture; // NULL: llama
    const char *pattern;      // tokenizer.ggml.pre; NULL: as in the tokenizer's own file
    struct {
        double factor, low, high, context;
    } rope;           // Llama 3's scaling; all 0: Llama 3.2's
    size_t parts;     // files; 0: one, called NAME.gguf
    size_t alignment; // 0: 32, as without metadata
    const gguf_entry *entries;
    size_t entry_count;
} gguf_case;

// A part of a file that grows in memory.
typedef struct {
    FILE *file;
    char *bytes;
    size_t size, entries;
} section;

typedef struct {
    section metadata, tensors, data;
    size_t alignment;
    int flaw;
    uint32_t bad_type;
} gguf_writer;

static void open_section(section *s) {
    memset(s, 0, sizeof *s);
    s->file = open_memstream(&s->bytes, &s->size);
}

// Little endian, as this machine.
static void put_number(FILE *f, uint64_t n, size_t size) { fwrite(&n, 1, size, f); }

static void put_string(FILE *f, const char *text) {
    put_number(f, strlen(text), 8);
    fwrite(text, 1, strlen(text), f);
}

// ---- Metadata -----------------------------------------------------------------------------------

static void put_key(section *m, const char *key, uint32_t type) {
    put_string(m->file, key);
    put_number(m->file, type, 4);
    m->entries++;
}

static void put_u32(section *m, const char *key, uint32_t n) {
    put_key(m, key, META_U32);
    put_number(m->file, n, 4);
}

static void put_f32(section *m, const char *key, float x) {
    put_key(m, key, META_F32);
    fwrite(&x, 4, 1, m->file);
}

static void put_u16(section *m, const char *key, size_t n) {
    put_key(m, key, META_U16);
    put_number(m->file, n, 2);
}

static void put_bool(section *m, const char *key, bool b) {
    put_key(m, key, META_BOOL);
    put_number(m->file, b, 1);
}

static void put_u64(section *m, const char *key, uint64_t n) {
    put_key(m, key, META_U64);
    put_number(m->file, n, 8);
}

static void put_text(section *m, const char *key, const char *text) {
    put_key(m, key, META_STRING);
    put_string(m->file, text);
}

// Its n elements follow.
static void put_array(section *m, const char *key, uint32_t type, size_t n) {
    put_key(m, key, META_ARRAY);
    put_number(m->file, type, 4);
    put_number(m->file, n, 8);
}

static void put_entry(section *m, const gguf_entry *e) {
    uint64_t whole = (uint64_t)(int64_t)e->number;
    if (e->type == META_STRING) put_text(m, e->key, e->text);
    else if (e->type == META_F32) put_f32(m, e->key, (float)e->number);
    else if (e->type == META_BOOL) put_bool(m, e->key, e->number != 0);
    else if (e->type == META_U64) put_u64(m, e->key, whole);
    else if (e->type == META_F64) {
        put_key(m, e->key, META_F64);
        fwrite(&e->number, 8, 1, m->file);
    }
    else if (e->type == META_ARRAY) {
        put_array(m, e->key, META_STRING, e->text != NULL);
        if (e->text) put_string(m->file, e->text);
    } else {
        put_key(m, e->key, e->type);
        put_number(m->file, whole, e->type == META_U16 ? 2 : 4);
    }
}

typedef struct {
    size_t count;
    const char **tokens;
    int32_t *types;
    float *scores;
} token_table;

// Tokens, types and scores as llama.cpp would have them for a tokenizer.json. The score of a token
// is the rank of its first merge, negative, or low if it has none.
static token_table list_tokens(const retrofit_json *root, const retrofit_tokenizer *tokenizer,
                               bool sentencepiece) {
    const float no_score = -1e6f;
    token_table t = {.count = retrofit_tokenizer_size(tokenizer)};
    t.tokens = retrofit_allocate(t.count, sizeof *t.tokens);
    t.types = retrofit_allocate(t.count, sizeof *t.types);
    t.scores = retrofit_allocate(t.count, sizeof *t.scores);
    const retrofit_json *model = retrofit_json_get(root, "model");
    const retrofit_json *e = retrofit_json_get(model, "vocab")->child;
    for (; e; e = e->next) {
        size_t id = (size_t)e->number;
        bool byte = sentencepiece && e->key_length == 6 && !strncmp(e->key, "<0x", 3);
        t.tokens[id] = e->key;
        t.types[id] = byte ? 6 : 1;
        t.scores[id] = no_score;
    }
    for (e = retrofit_json_get(root, "added_tokens")->child; e; e = e->next) {
        size_t id = (size_t)retrofit_json_get(e, "id")->number;
        t.tokens[id] = retrofit_json_get(e, "content")->string;
        t.types[id] = sentencepiece && id == 0 ? 2 : 3; // unknown, control
    }
    float rank = 0;
    for (e = retrofit_json_get(model, "merges")->child; e; e = e->next, rank++) {
        char whole[512];
        snprintf(whole, sizeof whole, "%s%s", e->child->string, e->child->next->string);
        int32_t id = retrofit_tokenizer_id(tokenizer, whole);
        if (t.scores[id] == no_score) t.scores[id] = -rank;
    }
    return t;
}

static bool is_among(const retrofit_tokenizer *tokenizer, size_t count, const char *token) {
    return (size_t)retrofit_tokenizer_id(tokenizer, token) < count;
}

// Those of the first `count` tokens.
static void put_merges(section *m, const retrofit_json *merges, const retrofit_tokenizer *tokenizer,
                       size_t count) {
    section pairs;
    open_section(&pairs);
    for (const retrofit_json *e = merges->child; e; e = e->next) {
        const char *left = e->child->string, *right = e->child->next->string;
        char text[512];
        snprintf(text, sizeof text, "%s%s", left, right);
        if (!is_among(tokenizer, count, text) || !is_among(tokenizer, count, left) ||
            !is_among(tokenizer, count, right))
            continue;
        snprintf(text, sizeof text, "%s %s", left, right);
        put_string(pairs.file, text);
        pairs.entries++;
    }
    fclose(pairs.file);
    put_array(m, "tokenizer.ggml.merges", META_STRING, pairs.entries);
    fwrite(pairs.bytes, 1, pairs.size, m->file);
    free(pairs.bytes);
}

// The metadata llama.cpp would write for a tokenizer.json, with so many of its tokens at most.
static void put_tokenizer(section *m, const gguf_case *file, size_t max) {
    const char *style = file->style;
    char directory[256], path[512];
    snprintf(directory, sizeof directory, FIXTURES "tokenizers/%s", style);
    snprintf(path, sizeof path, "%s/tokenizer.json", directory);
    char *text = read_text(path);
    retrofit_json *root = retrofit_json_parse(text, strlen(text), path);
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(directory);
    need(root && tokenizer, path);
    bool sentencepiece = !strcmp(style, "llama2_style");
    token_table t = list_tokens(root, tokenizer, sentencepiece);
    if (file->model && t.count > max) t.count = max;

    put_text(m, "tokenizer.ggml.model", sentencepiece ? "llama" : "gpt2");
    const char *pattern = !strcmp(style, "llama3_style") ? "llama-bpe" : "smollm";
    if (file->pattern) pattern = file->pattern;
    if (file->flaw == BAD_PRE) pattern = "qwen35";
    if (!sentencepiece) put_text(m, "tokenizer.ggml.pre", pattern);
    put_array(m, "tokenizer.ggml.tokens", META_STRING, t.count);
    for (size_t i = 0; i < t.count; i++) put_string(m->file, t.tokens[i]);
    put_array(m, "tokenizer.ggml.token_type", META_I32, t.count);
    fwrite(t.types, 4, t.count, m->file);
    if (sentencepiece) {
        put_array(m, "tokenizer.ggml.scores", META_F32, t.count);
        fwrite(t.scores, 4, t.count, m->file);
        put_u32(m, "tokenizer.ggml.unknown_token_id", 0);
    } else {
        const retrofit_json *model = retrofit_json_get(root, "model");
        put_merges(m, retrofit_json_get(model, "merges"), tokenizer, t.count);
    }
    put_u32(m, "tokenizer.ggml.bos_token_id", (uint32_t)retrofit_tokenizer_bos(tokenizer));
    put_u32(m, "tokenizer.ggml.eos_token_id", (uint32_t)retrofit_tokenizer_eos(tokenizer));
    put_text(m, "tokenizer.chat_template", "{{ \"quoted\" }}\n");
    free(t.tokens);
    free(t.types);
    free(t.scores);
    free(text);
    retrofit_json_free(root);
    retrofit_tokenizer_free(tokenizer);
}

// The key of an architecture that ends so; good for the next call alone.
static const char *own_key(const gguf_case *file, const char *end) {
    static char key[128];
    snprintf(key, sizeof key, "%s.%s", file->architecture ? file->architecture : "llama", end);
    return key;
}

static void put_metadata(section *m, const retrofit_config *c, const gguf_case *file) {
    const struct {
        const char *key;
        size_t value;
    } counts[] = {
        {"embedding_length", c->n_embd},
        {"feed_forward_length", c->intermediate},
        {"block_count", c->coda},
        {"attention.head_count", c->n_heads},
        {"attention.head_count_kv", c->n_kv_heads},
        {"context_length", c->context},
        {"vocab_size", c->vocab},
    };
    const char *architecture = file->architecture ? file->architecture : "llama";
    put_text(m, "general.architecture", file->flaw == BAD_ARCHITECTURE ? "gemma" : architecture);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        if (file->wide) put_u64(m, own_key(file, counts[i].key), counts[i].value);
        else put_u32(m, own_key(file, counts[i].key), (uint32_t)counts[i].value);
    }
    put_f32(m, own_key(file, "attention.layer_norm_rms_epsilon"), c->norm_eps);
    if (file->llama3 || file->model)
        put_f32(m, own_key(file, "rope.freq_base"), (float)c->rope_theta);
    if (file->alignment) put_u32(m, "general.alignment", (uint32_t)file->alignment);
    for (size_t i = 0; i < file->entry_count; i++) put_entry(m, &file->entries[i]);
    put_tokenizer(m, file, c->vocab);
}

// ---- Tensors ------------------------------------------------------------------------------------

// What is read, by the numbers in files.
static const char *const type_names[] = {
    [0] = "F32",   [1] = "F16",   [2] = "Q4_0",  [3] = "Q4_1",   [6] = "Q5_0",    [7] = "Q5_1",
    [8] = "Q8_0",  [10] = "Q2_K", [11] = "Q3_K", [12] = "Q4_K",  [13] = "Q5_K",   [14] = "Q6_K",
    [20] = "IQ4_NL", [23] = "IQ4_XS", [30] = "BF16", [34] = "TQ1_0", [35] = "TQ2_0",
    [39] = "MXFP4"};
enum { TYPES = sizeof type_names / sizeof *type_names };

// Blocks of each type and the numbers in them, as the Python package gguf has them: see
// test/gguf_blocks.py. Bytes are kept four to a word.
static retrofit_map blocks_file;

// Numbers in a block of the type.
static size_t block_size(uint32_t type) {
    return fixture(&blocks_file, "%s.values", type_names[type])->shape[1];
}

// n numbers of a type from the fixture's blocks, beginning anywhere, and what they are.
static void put_numbers(FILE *f, uint32_t type, float *expected, size_t n, uint64_t seed) {
    const retrofit_tensor *bytes = fixture(&blocks_file, "%s.blocks", type_names[type]);
    const retrofit_tensor *values = fixture(&blocks_file, "%s.values", type_names[type]);
    size_t count = values->shape[0], size = values->shape[1], length = 4 * bytes->count / count;
    need(n % size == 0, "rows of whole blocks");
    for (size_t i = 0; i < n / size; i++) {
        size_t block = (size_t)(retrofit_hash(seed, 0) + i) % count;
        fwrite((const char *)bytes->data + block * length, 1, length, f);
        memcpy(expected + i * size, (const float *)values->data + block * size, size * 4);
    }
}

// Describes a tensor whose data come next. rows is 0 for a vector.
static void put_tensor(gguf_writer *w, const char *name, uint32_t type, size_t rows, size_t cols) {
    while ((size_t)ftell(w->data.file) % w->alignment) fputc(0, w->data.file);
    uint64_t offset = (uint64_t)ftell(w->data.file);
    if (w->flaw == BAD_TYPE && !strcmp(name, "blk.0.attn_output.weight")) type = w->bad_type;
    if (!strcmp(name, "blk.0.ffn_norm.weight")) {
        if (w->flaw == BAD_OFFSET) offset = 1 << 30;
        if (w->flaw == UNALIGNED) offset += 8;
        if (w->flaw == OVERLAP) offset = w->alignment; // within the embedding
    }
    FILE *f = w->tensors.file;
    put_string(f, name);
    put_number(f, rows ? 2 : 1, 4);
    put_number(f, cols, 8);
    if (rows) put_number(f, rows, 8);
    put_number(f, type, 4);
    put_number(f, offset, 8);
    w->tensors.entries++;
}

// Names in a block, by their parameters' places in retrofit_layer, and those of norms that stand
// behind branches.
static const struct {
    size_t offset;
    const char *names[3], *post_norm;
} block_names[] = {
    {offsetof(retrofit_layer, norm_1), {"attn_norm"}, "post_attention_norm"},
    {offsetof(retrofit_layer, w_qkv), {"attn_q", "attn_k", "attn_v"}, NULL},
    {offsetof(retrofit_layer, b_qkv), {"attn_q", "attn_k", "attn_v"}, NULL},
    {offsetof(retrofit_layer, q_norm), {"attn_q_norm"}, NULL},
    {offsetof(retrofit_layer, k_norm), {"attn_k_norm"}, NULL},
    {offsetof(retrofit_layer, w_out), {"attn_output"}, NULL},
    {offsetof(retrofit_layer, norm_2), {"ffn_norm"}, "post_ffw_norm"},
    {offsetof(retrofit_layer, w_gate_up), {"ffn_gate", "ffn_up"}, NULL},
    {offsetof(retrofit_layer, w_down), {"ffn_down"}, NULL},
};

// Tensor j of those that make up the parameter.
static void name_tensor(char name[64], const retrofit_model *model, const retrofit_parameter *p,
                        size_t j) {
    if (p == &model->wte) strcpy(name, "token_embd.weight");
    else if (p == &model->ln_f) strcpy(name, "output_norm.weight");
    else if (p == &model->lm_head) strcpy(name, "output.weight");
    else {
        size_t offset = (size_t)((const char *)p - (const char *)model->coda), k = 0;
        while (block_names[k].offset != offset % sizeof(retrofit_layer)) k++;
        const char *in_block = block_names[k].names[j];
        if (model->config.post_norm && block_names[k].post_norm)
            in_block = block_names[k].post_norm;
        snprintf(name, 64, "blk.%zu.%s.%s", offset / sizeof(retrofit_layer), in_block,
                 p->kind == RETROFIT_BIAS ? "bias" : "weight");
    }
}

// The numbers in the file, and in `out` as Hugging Face orders them: row 2n + s of a head of q or k
// in llama.cpp's order is row s·h/2 + n in Hugging Face's. head_dim is 0 where the orders agree.
// given: the numbers are those in `out`, F32.
static void put_rows(FILE *f, uint32_t type, float *out, size_t rows, size_t cols, size_t head_dim,
                     uint64_t seed, bool given) {
    float *x = retrofit_allocate(rows * cols, sizeof *x);
    if (!given) put_numbers(f, type, x, rows * cols, seed);
    for (size_t r = 0; r < rows; r++) {
        size_t row = r;
        if (head_dim) {
            size_t within = r % head_dim;
            row = r - within + within % 2 * (head_dim / 2) + within / 2;
        }
        if (given) fwrite(out + row * cols, sizeof *out, cols, f);
        else memcpy(out + row * cols, x + r * cols, cols * sizeof *x);
    }
    free(x);
}

// Whether the file does without the tensor.
static bool is_left_out(int flaw, const char *name) {
    return (flaw == NO_TENSOR && !strcmp(name, "blk.1.ffn_up.weight")) ||
           (flaw == NO_BIAS && !strcmp(name, "blk.1.attn_k.bias"));
}

// Tensors go to the writers in turn. llama.cpp never quantises vectors, which have one row in its
// files; it moves the rows of q and k in a llama alone.
static void put_parameter(gguf_writer *writers, const retrofit_model *model, size_t i,
                          const gguf_case *file) {
    const retrofit_parameter *p = model->parameters[i];
    float *out = p->master;
    bool is_vector = p->kind == RETROFIT_NORM || p->kind == RETROFIT_BIAS;
    bool is_llama = !file->architecture || !strcmp(file->architecture, "llama");
    uint32_t type = is_vector ? GGML_F32 : file->type;
    for (size_t j = 0; j < p->sources; j++) {
        gguf_writer *w = &writers[file->parts ? (i + j) % file->parts : 0];
        char name[64];
        size_t rows = p->source[j].rows, cols = is_vector ? rows * p->cols : p->cols;
        bool permuted = is_llama && p->sources == 3 && j < 2; // q and k
        name_tensor(name, model, p, j);
        if (!is_left_out(file->flaw, name)) {
            bool narrow = file->flaw == NARROW_NORM && strstr(name, "attn_q_norm");
            put_tensor(w, name, type, is_vector ? 0 : rows, narrow ? cols / 2 : cols);
            put_rows(w->data.file, type, out, is_vector ? 1 : rows, cols,
                     permuted && !is_vector ? model->config.head_dim : 0, i * 8 + j,
                     file->model != NULL);
        }
        out += rows * p->cols;
    }
}

// Llama 3's divisors of the frequencies, by wavelengths and in floats, as llama.cpp's converter and
// Hugging Face compute them.
static void put_rope_divisors(gguf_writer *w, const gguf_case *file, const retrofit_config *c) {
    size_t n = c->head_dim / 2;
    put_tensor(w, "rope_freqs.weight", GGML_F32, 0, n + (file->flaw == ROPE_SIZE));
    for (size_t i = 0; i < n; i++) {
        float frequency = 1 / powf((float)c->rope_theta, (float)(2 * i) / (float)c->head_dim);
        float wavelength = 2 * 3.14159265f / frequency, L = (float)file->rope.context;
        float low = (float)file->rope.low, high = (float)file->rope.high;
        float factor = (float)file->rope.factor, keep = (L / wavelength - low) / (high - low);
        float divisor = 1 / ((1 - keep) / factor + keep);
        if (wavelength < L / high) divisor = 1;
        if (wavelength > L / low) divisor = factor;
        if (file->flaw == BAD_ROPE && i == 1) divisor++;
        fwrite(&divisor, 4, 1, w->data.file);
    }
    if (file->flaw == ROPE_SIZE) put_number(w->data.file, 0, 4);
}

static void put_bias(gguf_writer *w) {
    put_tensor(w, "blk.0.attn_q.bias", GGML_F32, 0, 4);
    for (int i = 0; i < 4; i++) put_number(w->data.file, 0, 4);
}

// ---- Files --------------------------------------------------------------------------------------

static void put_file(const char *path, const gguf_writer *w, uint32_t version) {
    FILE *f = fopen(path, "wb");
    need(f != NULL, path);
    fwrite("GGUF", 1, 4, f);
    put_number(f, version, 4);
    put_number(f, w->tensors.entries, 8);
    put_number(f, w->metadata.entries, 8);
    fwrite(w->metadata.bytes, 1, w->metadata.size, f);
    fwrite(w->tensors.bytes, 1, w->tensors.size, f);
    while ((size_t)ftell(f) % w->alignment) fputc(0, f);
    fwrite(w->data.bytes, 1, w->data.size, f);
    fclose(f);
}

static void open_writer(gguf_writer *w, const gguf_case *file) {
    w->alignment = file->alignment ? file->alignment : 32;
    w->flaw = file->flaw;
    w->bad_type = file->bad_type;
    open_section(&w->metadata);
    open_section(&w->tensors);
    open_section(&w->data);
}

static void close_writer(gguf_writer *w, const char *path) {
    fclose(w->metadata.file);
    fclose(w->tensors.file);
    fclose(w->data.file);
    if (w->flaw == NOT_FINITE) memset(w->data.bytes, 255, 4); // of the embedding
    put_file(path, w, w->flaw == BAD_VERSION ? 1 : 3);
    free(w->metadata.bytes);
    free(w->tensors.bytes);
    free(w->data.bytes);
}

// 2 layers, d = 32, 4 heads of 8, 2 kv, F = 64; with blocks of 256, d = 256, 4 heads of 64.
static retrofit_config gguf_config(const gguf_case *file) {
    bool wide = block_size(file->type) == 256;
    retrofit_config c = {.n_embd = wide ? 256 : 32, .n_heads = 4, .n_kv_heads = 2,
                         .head_dim = wide ? 64 : 8, .intermediate = wide ? 256 : 64,
                         .vocab = file->flaw == FEW_ROWS ? 640 : 928, .context = 512, .coda = 2,
                         .norm_eps = 1e-5f, .rope_theta = 10000, .mean_recurrence = 1,
                         .backprop_depth = 1, .tied = file->tied};
    if (file->llama3) c.rope_theta = 500000;
    if (file->llama3 && file->rope.factor > 1) {
        c.rope_llama3 = true;
        c.rope_factor = file->rope.factor;
        c.rope_low = file->rope.low;
        c.rope_high = file->rope.high;
        c.rope_original_context = file->rope.context;
    }
    if (file->model) need(retrofit_config_read(&c, file->model), file->model);
    return c;
}

// A model with memory, and numbers where the file's are those of another model.
static retrofit_model *begin_model(const retrofit_config *config, const gguf_case *file) {
    retrofit_model *model = retrofit_model_new(config, &retrofit_cpu);
    need(model && retrofit_model_allocate(model, RETROFIT_INFERENCE), "model");
    if (!file->model) return model;
    retrofit_model *given = load(file->model);
    for (size_t i = 0; i < model->parameter_count; i++) {
        float *x = numbers(given->parameters[i]);
        size_t n = model->parameters[i]->rows * model->parameters[i]->cols;
        memcpy(model->parameters[i]->master, x, n * sizeof *x);
        free(x);
    }
    retrofit_free(given);
    return model;
}

// The metadata of part `part`, from 0, that say so.
static void put_split(section *m, const gguf_case *file, size_t part, size_t tensors) {
    put_u16(m, "split.no", part);
    put_u16(m, "split.count", file->parts);
    put_key(m, "split.tensors.count", META_I32);
    put_number(m->file, tensors + (file->flaw == PART_COUNT), 4);
    if (part == 1) put_text(m, "general.architecture", "llama"); // as in the first part
    if (part == 1 && file->flaw == PART_KEY) put_u32(m, "llama.context_length", 500);
}

static const char *part_name(const char *name, size_t part, size_t parts) {
    return in_work("%s-%05zu-of-%05zu.gguf", name, part, parts);
}

// Writes a Llama and returns what a reader should make of it.
enum { MAX_PARTS = 3 };
static retrofit_model *write_gguf(const gguf_case *given) {
    gguf_case complete = *given, *file = &complete;
    if (file->rope.factor == 0) {
        file->rope.factor = 32;
        file->rope.low = 1;
        file->rope.high = 4;
        file->rope.context = 8192;
    }
    retrofit_config config = gguf_config(file);
    retrofit_model *model = begin_model(&config, file);
    gguf_writer w[MAX_PARTS];
    size_t parts = file->parts ? file->parts : 1, tensors = 0;
    for (size_t i = 0; i < parts; i++) open_writer(&w[i], file);
    put_metadata(&w[0].metadata, &config, file);
    for (size_t i = 0; i < model->parameter_count; i++) put_parameter(w, model, i, file);
    if (file->llama3) put_rope_divisors(&w[0], file, &config);
    if (file->flaw == EXTRA_TENSOR) put_bias(&w[0]);
    if (file->flaw == TENSOR_TWICE) {
        put_tensor(&w[parts - 1], "output_norm.weight", GGML_F32, 0, 32);
        for (size_t i = 0; i < 32; i++) put_number(w[parts - 1].data.file, 0, 4);
    }
    for (size_t i = 0; i < parts; i++) tensors += w[i].tensors.entries;
    for (size_t i = 0; i < parts; i++) {
        if (file->parts) put_split(&w[i].metadata, file, i, tensors);
        close_writer(&w[i], file->parts ? part_name(file->name, i + 1, parts)
                                        : in_work("%s.gguf", file->name));
    }
    return model;
}

static bool same_ids(const retrofit_json *expected, const int32_t *ids, size_t count) {
    if (!ids || count != expected->count) return false;
    for (const retrofit_json *x = expected->child; x; x = x->next)
        if (*ids++ != (int32_t)x->number) return false;
    return true;
}

// One case of cases.json: a text's ids, and the text that ids decode to.
static bool same_case(const retrofit_tokenizer *tokenizer, const retrofit_json *e) {
    const retrofit_json *text = retrofit_json_get(e, "text"), *plain = retrofit_json_get(e, "ids");
    const retrofit_json *decoded = retrofit_json_get(e, "decoded");
    size_t count, length = 0;
    int32_t *ids = retrofit_encode(tokenizer, text->string, text->length, true, &count);
    bool same = same_ids(retrofit_json_get(e, "ids_with_special"), ids, count);
    free(ids);

    ids = retrofit_allocate(plain->count, sizeof *ids);
    count = 0;
    for (const retrofit_json *x = plain->child; x; x = x->next) ids[count++] = (int32_t)x->number;
    char *back = retrofit_decode(tokenizer, ids, count, true, &length);
    same = same && back && length == decoded->length && !memcmp(back, decoded->string, length);
    free(ids);
    free(back);
    return same;
}

static void same_encoding(const char *directory, const char *style) {
    char path[256];
    snprintf(path, sizeof path, FIXTURES "tokenizers/%s/cases.json", style);
    char *text = read_text(path);
    retrofit_json *cases = retrofit_json_parse(text, strlen(text), path);
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(directory);
    need(cases && tokenizer, "tokenizer of the GGUF");
    size_t wrong = 0;
    for (const retrofit_json *e = cases->child; e; e = e->next) wrong += !same_case(tokenizer, e);
    check(wrong == 0, "%s: the tokenizer from the GGUF gives %zu of %u cases otherwise", style,
          wrong, cases->count);
    free(text);
    retrofit_json_free(cases);
    retrofit_tokenizer_free(tokenizer);
}

// What is measured of a GGUF's layers is what is measured of the directory that was made of it. The
// file's tokenizer leaves nothing behind.
static void same_report(const char *gguf, const char *directory) {
    static const char options[] = "--report --prelude none --core 0 --coda 1 --text";
    const char *temporary = in_work("temporary"), *text = in_work("measured.txt");
    write_string(text, "Once upon a time there were 2 layers. Their angles were measured.");
    mkdir(temporary, 0777);
    setenv("TMPDIR", temporary, 1);
    works("--from %s %s %s", directory, options, text);
    char *expected = read_text(in_work("out"));
    works("--from %s %s %s", gguf, options, text);
    char *measured = read_text(in_work("out")), *end = strstr(expected, "next:");
    bool same = end && !strncmp(expected, measured, (size_t)(end - expected));
    check(same && strstr(expected, "influence"), "%s: measured '%s', not '%s'", gguf, measured,
          expected);
    check(rmdir(temporary) == 0, "%s: the report leaves something in TMPDIR", gguf);
    unsetenv("TMPDIR");
    free(expected);
    free(measured);
}

static void good_gguf(const gguf_case *file) {
    const char *name = file->name;
    char path[256], plain[256], cut[256];
    strcpy(path, file->parts ? part_name(name, 1, file->parts) : in_work("%s.gguf", name));
    strcpy(plain, in_work("gguf.%s", name));
    strcpy(cut, in_work("gguf.%s.cut", name));
    retrofit_model *expected = write_gguf(file);
    works("--from %s --to %s", path, plain);
    works("--from %s --to %s --prelude none --core 0 --coda 1 --dtype bf16", path, cut);

    retrofit_model *m = load(plain), *recurrent = load(cut);
    expected->config.state_std = m->config.state_std; // a plain model's file has none
    same_config(name, &m->config, &expected->config);
    check(m->config.bos >= 0 && m->config.eos_count == 1, "%s: bos and eos", name);
    same_model(name, m, expected, true, false);
    same_numbers(name, &recurrent->core[0].w_gate_up, &expected->coda[0].w_gate_up, true);
    same_numbers(name, &recurrent->lm_head, &expected->lm_head, true);
    same_encoding(plain, file->style);
    same_encoding(cut, file->style);
    retrofit_free(m);
    retrofit_free(recurrent);
    retrofit_free(expected);
}

static void flawed_gguf(int flaw, const char *what) {
    gguf_case file = {.name = "flaw", .style = "llama2_style", .flaw = flaw,
                      .llama3 = flaw == BAD_ROPE || flaw == ROPE_SIZE};
    if (flaw == BAD_PRE) file.style = "llama3_style";
    retrofit_free(write_gguf(&file));
    fails(1, what, "--from %s --to %s", in_work("flaw.gguf"), in_work("bad"));
}

// A tensor of a type that is not read, or whose rows are no blocks, is named, and so is the type.
static void bad_types(void) {
    static const struct {
        uint32_t number;
        const char *what;
    } types[] = {
        {4, "Q4_2;"}, {5, "Q4_3;"}, {9, "Q8_1;"}, {15, "Q8_K;"}, {16, "IQ2_XXS;"}, {17, "IQ2_XS;"},
        {18, "IQ3_XXS;"}, {19, "IQ1_S;"}, {21, "IQ3_S;"}, {22, "IQ2_S;"}, {24, "I8;"}, {25, "I16;"},
        {26, "I32;"}, {27, "I64;"}, {28, "F64;"}, {29, "IQ1_M;"}, {31, "Q4_0_4_4;"},
        {32, "Q4_0_4_8;"}, {33, "Q4_0_8_8;"}, {36, "IQ4_NL_4_4;"}, {37, "IQ4_NL_4_8;"},
        {38, "IQ4_NL_8_8;"}, {40, "NVFP4;"}, {41, "Q1_0;"}, {42, "Q2_0;"}, {43, "number 43;"},
        {UINT32_MAX, "number 4294967295;"}};
    char expected[128];
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        gguf_case file = {.name = "type", .style = "llama2_style", .flaw = BAD_TYPE,
                          .bad_type = types[i].number};
        retrofit_free(write_gguf(&file));
        snprintf(expected, sizeof expected, "type.gguf: tensor blk.0.attn_output.weight is of type "
                                            "%s", types[i].what);
        fails(1, expected, "--from %s --to %s", in_work("type.gguf"), in_work("bad"));
    }
    for (uint32_t type = 0; type < TYPES; type++) {
        if (!type_names[type] || block_size(type) < 256) continue;
        gguf_case file = {.name = "rows", .style = "llama2_style", .flaw = BAD_TYPE,
                          .bad_type = type};
        retrofit_free(write_gguf(&file));
        fails(1, "rows.gguf: tensor blk.0.attn_output.weight: rows of 32 are no blocks of 256",
              "--from %s --to %s", in_work("rows.gguf"), in_work("bad"));
    }
}

// Numbers that are not finite, whose scales are not, or that are too large: the first bytes of the
// embedding are all ones. They are found when they are unpacked, with half of the output written.
static void not_finite(void) {
    static const uint32_t types[] = {GGML_F32, GGML_F16, GGML_BF16, GGML_Q4_0, GGML_Q8_0, GGML_Q4_K,
                                     GGML_MXFP4};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        gguf_case file = {.name = "infinite", .type = types[i], .style = "llama2_style",
                          .flaw = NOT_FINITE};
        retrofit_free(write_gguf(&file));
        fails(1, "infinite.gguf: tensor token_embd.weight: number 0 is not finite",
              "--from %s --to %s", in_work("infinite.gguf"), in_work("bad"));
    }
}

// A good file whose metadata ask for other shapes, and one cut off anywhere.
static void damaged_gguf(uint32_t type) {
    const gguf_case file = {.name = "damaged", .type = type, .style = "smollm_style",
                            .tied = true};
    static const double parts[] = {0, .00002, .0001, .001, .01, .1, .3, .5, .9, .999};
    static const char key[] = "llama.feed_forward_length";
    size_t size;
    retrofit_free(write_gguf(&file));
    char *bytes = retrofit_read_file(in_work("damaged.gguf"), &size);
    need(bytes != NULL, "damaged.gguf");
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        write_text(in_work("cut.gguf"), bytes, (size_t)(parts[i] * (double)size));
        fails(1, "cut.gguf", "--from %s --to %s", in_work("cut.gguf"), in_work("bad"));
    }
    write_text(in_work("cut.gguf"), bytes, size - 1);
    fails(1, "cut.gguf: tensor output_norm.weight: ", "--from %s --to %s", in_work("cut.gguf"),
          in_work("bad"));
    char *entry = memmem(bytes, size, key, strlen(key));
    need(entry != NULL, key);
    entry[strlen(key) + 5] ^= 2; // behind the type; 512 numbers more or less
    write_text(in_work("shape.gguf"), bytes, size);
    fails(1, "metadata ask for", "--from %s --to %s", in_work("shape.gguf"), in_work("bad"));
    entry[strlen(key) - 1] = 0; // what is named with a NUL is not passed over
    write_text(in_work("nul.gguf"), bytes, size);
    fails(1, "control characters", "--from %s --to %s", in_work("nul.gguf"), in_work("bad"));
    free(bytes);
}

// Entries without effect: the model is the same with them, and nobody is told.
static void neutral_metadata(void) {
    static const gguf_entry entries[] = {
        {"general.name", META_STRING, 0, "a name"},
        {"general.type", META_STRING, 0, "model"},
        {"general.quantization_version", META_U32, 2, NULL},
        {"general.file_type", META_U32, 7, NULL},
        {"general.tags", META_ARRAY, 0, "a tag"},
        {"split.no", META_U16, 0, NULL},
        {"split.count", META_U16, 1, NULL},
        {"quantize.imatrix.chunks_count", META_I32, 40, NULL},
        {"llama.attention.key_length", META_U32, 8, NULL},
        {"llama.attention.value_length", META_U32, 8, NULL},
        {"llama.attention.causal", META_BOOL, 1, NULL},
        {"llama.attention.sliding_window", META_U32, 512, NULL},
        {"llama.attention.clamp_kqv", META_F32, 0, NULL},
        {"llama.rope.dimension_count", META_U64, 8, NULL},
        {"llama.rope.scaling.type", META_STRING, 0, "none"},
        {"llama.rope.scaling.factor", META_F32, 4, NULL},
        {"llama.rope.scaling.original_context_length", META_U32, 64, NULL},
        {"llama.rope.scaling.finetuned", META_BOOL, 1, NULL},
        {"llama.rope.scaling.attn_factor", META_F32, 1, NULL},
        {"llama.expert_count", META_U32, 0, NULL},
        {"llama.use_parallel_residual", META_BOOL, 0, NULL},
        {"llama.tensor_data_layout", META_STRING, 0, "Meta AI original pth"},
        {"llama.logit_scale", META_F32, 1, NULL},
        {"tokenizer.ggml.fim_pre_token_id", META_U32, 4, NULL},
        {"tokenizer.ggml.mask_token_id", META_U32, 4, NULL},
        {"tokenizer.ggml.remove_extra_whitespaces", META_BOOL, 0, NULL},
        {"tokenizer.ggml.precompiled_charsmap", META_ARRAY, 0, NULL},
    };
    gguf_case file = {.name = "neutral", .style = "llama2_style", .wide = true, .entries = entries,
                      .entry_count = sizeof entries / sizeof *entries};
    good_gguf(&file);
    works_quietly("--from %s --to %s", in_work("neutral.gguf"), in_work("neutral"));

    static const gguf_entry unknown[] = {{"some.flag", META_BOOL, 1, NULL},
                                         {"some.numbers", META_ARRAY, 0, "1"}};
    file = (gguf_case){.name = "noted", .style = "llama2_style", .entries = unknown,
                       .entry_count = 2};
    retrofit_free(write_gguf(&file));
    works("--from %s --to %s", in_work("noted.gguf"), in_work("noted"));
    check(said("noted.gguf: not known here, and not used: some.flag, some.numbers\n"),
          "keys that are not known are named");
}

// Entries that ask for what is not done: each is refused by its name.
static void refused_metadata(void) {
    static const gguf_entry entries[] = {
        {"general.type", META_STRING, 0, "adapter"},
        {"adapter.type", META_STRING, 0, "lora"},
        {"general.quantization_version", META_U32, 1, NULL},
        {"general.alignment", META_U32, 48, NULL},
        {"general.alignment", META_U32, 0, NULL},
        {"split.no", META_U16, 3, NULL},
        {"split.count", META_U32, 100000, NULL},
        {"split.tensors.count", META_I32, 3, NULL},
        {"llama.vocab_size", META_U32, 900, NULL},
        {"llama.block_count", META_U32, 2, NULL},
        {"llama.attention.key_length", META_I32, -8, NULL},
        {"llama.attention.key_length", META_ARRAY, 0, "8"},
        {"llama.attention.value_length", META_U32, 16, NULL},
        {"llama.attention.causal", META_BOOL, 0, NULL},
        {"llama.attention.sliding_window", META_U32, 128, NULL},
        {"llama.attention.clamp_kqv", META_F32, 8, NULL},
        {"llama.attention.max_alibi_bias", META_F32, 8, NULL},
        {"llama.attention.scale", META_F32, .5, NULL},
        {"llama.attention.layer_norm_epsilon", META_F32, 1e-5, NULL},
        {"llama.attention.temperature_scale", META_F32, .1, NULL},
        {"llama.rope.dimension_count", META_U32, 4, NULL},
        {"llama.rope.dimension_sections", META_ARRAY, 0, "1"},
        {"llama.rope.freq_base", META_F64, 1e4, NULL},
        {"llama.rope.freq_base", META_F32, INFINITY, NULL},
        {"llama.rope.scale_linear", META_F32, -4, NULL},
        {"llama.rope.scaling.factor", META_F32, .5, NULL},
        {"llama.rope.scaling.type", META_STRING, 0, "yarn"},
        {"llama.rope.scaling.attn_factor", META_F32, 2, NULL},
        {"llama.rope.scaling.yarn_ext_factor", META_F32, 1, NULL},
        {"llama.rope.scale", META_F32, 2, NULL},
        {"llama.expert_count", META_U32, 8, NULL},
        {"llama.use_parallel_residual", META_BOOL, 1, NULL},
        {"llama.tensor_data_layout", META_STRING, 0, "jploski"},
        {"llama.logit_scale", META_F32, .25, NULL},
        {"llama.embedding_scale", META_F32, 12, NULL},
        {"llama.residual_scale", META_F32, .22f, NULL},
        {"llama.final_logit_softcapping", META_F32, 30, NULL},
        {"llama.swin_norm", META_BOOL, 1, NULL},
        {"llama.what_comes_next", META_U32, 1, NULL},
        {"mistral.attention.sliding_window", META_U32, 64, NULL},
        {"tokenizer.ggml.add_sep_token", META_BOOL, 1, NULL},
        {"tokenizer.ggml.remove_extra_whitespaces", META_BOOL, 1, NULL},
        {"tokenizer.ggml.precompiled_charsmap", META_ARRAY, 0, "x"},
        {"tokenizer.ggml.eot_token_id", META_U32, 5000, NULL},
        {"tokenizer.ggml.lowercase", META_BOOL, 1, NULL},
    };
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++) {
        gguf_case file = {.name = "refused", .style = "llama2_style", .entries = &entries[i],
                          .entry_count = 1};
        retrofit_free(write_gguf(&file));
        fails(1, entries[i].key, "--from %s --to %s", in_work("refused.gguf"), in_work("bad"));
    }
    static const gguf_entry linear[] = {{"llama.rope.scaling.type", META_STRING, 0, "linear"},
                                        {"llama.rope.scaling.factor", META_F32, 1, NULL},
                                        {"llama.rope.scale_linear", META_F32, 2, NULL}};
    gguf_case file = {.name = "linear", .style = "llama2_style", .entries = linear,
                      .entry_count = 3};
    good_gguf(&file); // the old name of the factor counts only without the new one
}

// Positions are divided by a factor that either key may give.
static void gguf_linear_scaling(void) {
    static const gguf_entry entries[] = {{"llama.rope.scaling.factor", META_F32, 2, NULL},
                                         {"llama.rope.scale_linear", META_F32, 4, NULL}};
    for (size_t i = 0; i < 2; i++) {
        gguf_case file = {.name = "scaled", .style = "llama2_style", .entries = &entries[i],
                          .entry_count = 1};
        retrofit_free(write_gguf(&file));
        works("--from %s --to %s", in_work("scaled.gguf"), in_work("scaled%zu", i));
        retrofit_model *model = load(in_work("scaled%zu", i));
        const retrofit_config *c = &model->config;
        check(!c->rope_llama3 && c->rope_factor == entries[i].number, "%s: a factor of %g",
              entries[i].key, c->rope_factor);
        retrofit_free(model);
    }
}

// Chat templates that have names, and what else ends a generation.
static void gguf_chat(void) {
    static const gguf_entry entries[] = {
        {"tokenizer.chat_template.tool_use", META_STRING, 0, "{{ 'tools' }}"},
        {"tokenizer.chat_templates", META_ARRAY, 0, "tool_use"},
        {"tokenizer.ggml.eot_token_id", META_U32, 7, NULL},
        {"tokenizer.ggml.eom_token_id", META_U32, 2, NULL}, // the end of the text
    };
    gguf_case file = {.name = "chat", .style = "llama2_style", .entries = entries,
                      .entry_count = 4};
    retrofit_free(write_gguf(&file));
    works_quietly("--from %s --to %s", in_work("chat.gguf"), in_work("chat"));
    char *config = read_text(in_work("chat/tokenizer_config.json"));
    static const char templates[] =
        "\"chat_template\": [\n"
        "    {\"name\": \"default\", \"template\": \"{{ \\\"quoted\\\" }}\\u000a\"},\n"
        "    {\"name\": \"tool_use\", \"template\": \"{{ 'tools' }}\"}\n  ],\n";
    check(strstr(config, templates) != NULL, "chat templates with names: %s", config);
    char *generation = read_text(in_work("chat/generation_config.json"));
    check(!strcmp(generation, "{\n  \"bos_token_id\": 1,\n  \"eos_token_id\": [2, 7]\n}\n"),
          "ends of a generation: %s", generation);
    free(config);
    free(generation);
}

// Writes the file `from` with each of the texts `pairs`, to a NULL, replaced by the one behind it.
static void edit_text(const char *from, const char *to, const char *const *pairs) {
    char *text = read_text(from);
    for (; *pairs; pairs += 2) {
        char *at = strstr(text, pairs[0]), *edited;
        need(at != NULL, pairs[0]);
        need(asprintf(&edited, "%.*s%s%s", (int)(at - text), text, pairs[1],
                      at + strlen(pairs[0])) > 0, "memory");
        free(text);
        text = edited;
    }
    write_string(to, text);
    free(text);
}

// The ids of all texts of cases.json, in both tokenizers.
static void same_ids_of_cases(const char *name, const char *directory, const char *reference) {
    static const char path[] = FIXTURES "tokenizers/llama3_style/cases.json";
    char *text = read_text(path);
    retrofit_json *cases = retrofit_json_parse(text, strlen(text), path);
    retrofit_tokenizer *a = retrofit_tokenizer_load(directory);
    retrofit_tokenizer *b = retrofit_tokenizer_load(reference);
    need(cases && a && b, name);
    size_t wrong = 0;
    for (const retrofit_json *e = cases->child; e; e = e->next) {
        const retrofit_json *content = retrofit_json_get(e, "text");
        size_t x_count, y_count;
        int32_t *x = retrofit_encode(a, content->string, content->length, true, &x_count);
        int32_t *y = retrofit_encode(b, content->string, content->length, true, &y_count);
        wrong += x_count != y_count || memcmp(x, y, x_count * sizeof *x);
        free(x);
        free(y);
    }
    check(wrong == 0, "%s: %zu of %u texts have other ids", name, wrong, cases->count);
    free(text);
    retrofit_json_free(cases);
    retrofit_tokenizer_free(a);
    retrofit_tokenizer_free(b);
}

// Patterns of words that other families have: the fixture's tokenizer with what Hugging Face's
// files of these families have in place of Llama 3's.
static void gguf_patterns(void) {
    static const struct {
        const char *name, *edits[7];
    } patterns[] = {
        {"dbrx", {"\"ignore_merges\": true", "\"ignore_merges\": false", NULL}},
        {"qwen2", {"\"ignore_merges\": true", "\"ignore_merges\": false",
                   "\\\\p{N}{1,3}", "\\\\p{N}",
                   "\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}", NULL}}};
    static const gguf_entry adds_bos = {"tokenizer.ggml.add_bos_token", META_BOOL, 1, NULL};
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        const char *name = patterns[i].name;
        char reference[256], made[256];
        const gguf_case file = {.name = name, .style = "llama3_style", .pattern = name,
                                .entries = &adds_bos, .entry_count = 1};
        strcpy(made, in_work("gguf.%s", name));
        strcpy(reference, in_work("reference.%s", name));
        need(mkdir(reference, 0777) == 0, reference);
        edit_text(FIXTURES "tokenizers/llama3_style/tokenizer.json",
                  in_work("reference.%s/tokenizer.json", name), patterns[i].edits);
        retrofit_free(write_gguf(&file));
        works_quietly("--from %s --to %s", in_work("%s.gguf", name), made);
        same_ids_of_cases(name, made, reference);
    }
}

// Settings that are found from the divisors, those of Llama 3.1 and 3.2 first, and such as are not.
static void gguf_rope(void) {
    static const struct {
        double factor, low, high, context;
        uint32_t type; // in blocks of 256 for heads of 64
        bool refused;
    } cases[] = {
        {8, 1, 4, 8192, GGML_Q4_K, false},  {32, 1, 4, 8192, GGML_Q4_K, false},
        {1, 1, 4, 8192, GGML_Q4_K, false},  {1.5, 1, 4, 8192, GGML_Q4_K, false},
        {16, 1, 4, 4096, GGML_Q4_K, false}, {8, 1, 4, 131072, GGML_Q4_K, false},
        {8, 1, 4, 8192, GGML_F32, false},   {8, 1, 4, 5000, GGML_Q4_K, true},
        {8, 1.5, 4, 8192, GGML_Q4_K, true}, {8, 1, 5, 8192, GGML_Q4_K, true},
        {.5, 1, 4, 8192, GGML_Q4_K, true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        gguf_case file = {.name = "rope", .type = cases[i].type, .style = "llama2_style",
                          .llama3 = true};
        file.rope.factor = cases[i].factor;
        file.rope.low = cases[i].low;
        file.rope.high = cases[i].high;
        file.rope.context = cases[i].context;
        retrofit_model *expected = write_gguf(&file), *model = NULL;
        const char *path = in_work("rope.gguf"), *to = in_work("rope%zu", i);
        if (cases[i].refused)
            fails(1, "rope.gguf: tensor rope_freqs.weight", "--from %s --to %s", path,
                  in_work("bad"));
        else {
            works_quietly("--from %s --to %s", path, to);
            model = load(to);
            model->config.state_std = expected->config.state_std;
            same_config("rope", &model->config, &expected->config);
        }
        retrofit_free(model);
        retrofit_free(expected);
    }
}

// The fixture with Llama 3.2's scaling, as a GGUF, becomes the fixture again.
static void gguf_fixture(void) {
    const gguf_case file = {.name = "llama3", .style = "../lookup/base", .llama3 = true,
                            .model = FIXTURES "llama3/base"};
    retrofit_free(write_gguf(&file));
    works_quietly("--from %s --to %s", in_work("llama3.gguf"), in_work("gguf.fixture"));
    retrofit_model *again = load(in_work("gguf.fixture")), *fixture = load(file.model);
    check(fixture->config.rope_llama3, "the fixture has Llama 3's scaling");
    same_config("llama3", &again->config, &fixture->config);
    same_model("llama3", again, fixture, true, false);
    retrofit_free(again);
    retrofit_free(fixture);
}

// Whether two files hold the same bytes.
static bool same_files(const char *a, const char *b) {
    size_t x_size, y_size;
    char *x = retrofit_read_file(a, &x_size), *y = retrofit_read_file(b, &y_size);
    bool same = x && y && x_size == y_size && !memcmp(x, y, x_size);
    free(x);
    free(y);
    return same;
}

// The fixtures of other families, as GGUFs, become the fixtures again; and what surgery makes of
// them is what it makes of the fixtures, to the byte.
static void other_architectures(void) {
    static const char *const names[] = {"olmo2", "qwen2", "qwen3"};
    static const char layers[] = "--prelude 0 --core 1-2 --coda 3 --mean-recurrence 4 --seed 3";
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const char *name = names[i];
        char base[256], path[256], again[256], cut[256], expected[256];
        snprintf(base, sizeof base, FIXTURES "%s/base", name);
        const gguf_case file = {.name = name, .style = "../lookup/base", .architecture = name,
                                .model = base};
        strcpy(path, in_work("%s.gguf", name));
        strcpy(again, in_work("gguf.%s.base", name));
        strcpy(cut, in_work("gguf.%s.cut", name));
        strcpy(expected, in_work("hf.%s.cut", name));
        retrofit_free(write_gguf(&file));
        works_quietly("--from %s --to %s", path, again);
        works_quietly("--from %s --to %s %s", path, cut, layers);
        works_quietly("--from %s --to %s %s", base, expected, layers);
        retrofit_model *model = load(again), *fixture = load(base);
        same_config(name, &model->config, &fixture->config);
        same_model(name, model, fixture, true, false);
        check(same_files(in_work("gguf.%s.cut/model.safetensors", name),
                         in_work("hf.%s.cut/model.safetensors", name)),
              "%s: surgery on the GGUF is surgery on the directory", name);
        retrofit_model *a = load(cut), *b = load(expected);
        same_config(name, &a->config, &b->config);
        same_report(path, again); // of numbers that mean something: blocks of random bytes overflow
        retrofit_free(a);
        retrofit_free(b);
        retrofit_free(model);
        retrofit_free(fixture);
    }
}

// A GGUF of another family with something wrong; `architecture` is what it says that it is.
static void other_flaw(const char *family, const char *architecture, int flaw,
                       const gguf_entry *entry, const char *what) {
    char base[256];
    snprintf(base, sizeof base, FIXTURES "%s/base", family);
    const gguf_case file = {.name = "other", .style = "../lookup/base", .flaw = flaw,
                            .architecture = architecture, .model = base, .entries = entry,
                            .entry_count = entry != NULL};
    retrofit_free(write_gguf(&file));
    fails(1, what, "--from %s --to %s", in_work("other.gguf"), in_work("bad"));
}

// Keys of another architecture mean nothing, as little as one that is spelt as in convert's table.
static void foreign_keys(void) {
    static const gguf_entry entries[] = {{"llama.block_count", META_U32, 1, NULL},
                                         {"ARCH.block_count", META_U32, 1, NULL}};
    const gguf_case file = {.name = "foreign", .style = "../lookup/base", .architecture = "qwen2",
                            .model = FIXTURES "qwen2/base", .entries = entries, .entry_count = 2};
    retrofit_free(write_gguf(&file));
    works("--from %s --to %s", in_work("foreign.gguf"), in_work("foreign"));
    check(said("not used: llama.block_count, ARCH.block_count\n"), "foreign keys are named");
}

static void other_architectures_flawed(void) {
    static const struct {
        const char *family;
        gguf_entry entry;
        const char *what;
    } entries[] = {
        {"qwen2", {"qwen2.rope.scaling.type", META_STRING, 0, "yarn"}, "qwen2.rope.scaling.type"},
        {"qwen2", {"qwen2.use_parallel_residual", META_BOOL, 1, NULL}, "qwen2.use_parallel"},
        {"qwen2", {"llama.attention.scale", META_F32, .5, NULL}, "llama.attention.scale"},
        {"qwen2", {"ARCH.attention.scale", META_F32, .5, NULL}, "ARCH.attention.scale"},
        {"qwen3", {"qwen3.attention.key_length", META_U32, 16, NULL},
         "qwen3.attention.value_length is 8, but heads have 16"},
        {"qwen3", {"qwen3.expert_count", META_U32, 8, NULL}, "qwen3.expert_count"},
        {"olmo2", {"olmo2.attention.sliding_window", META_U32, 64, NULL},
         "olmo2.attention.sliding_window is 64"},
        {"olmo2", {"olmo2.attention.sliding_window_pattern", META_ARRAY, 0, "true"},
         "olmo2.attention.sliding_window_pattern"},
        {"olmo2", {"olmo2.attention.clamp_kqv", META_F32, 8, NULL}, "olmo2.attention.clamp_kqv"},
    };
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++)
        other_flaw(entries[i].family, entries[i].family, GOOD, &entries[i].entry, entries[i].what);
    other_flaw("qwen2", "qwen2", NO_BIAS, NULL, "tensor blk.1.attn_k.bias is missing");
    other_flaw("qwen3", "qwen3", NARROW_NORM, NULL,
               "tensor blk.0.attn_q_norm.weight is 1 x 4, the metadata ask for 1 x 8");
    other_flaw("olmo2", "olmo2", NARROW_NORM, NULL,
               "tensor blk.0.attn_q_norm.weight is 1 x 16, the metadata ask for 1 x 32");
    other_flaw("qwen2", "llama", GOOD, NULL, "bias has no place in a llama of these metadata");
    other_flaw("qwen3", "llama", GOOD, NULL, "_norm.weight has no place in a llama");
    other_flaw("qwen3", "qwen2", GOOD, NULL, "tensor blk.0.attn_q.bias is missing");
    other_flaw("qwen2", "qwen3", GOOD, NULL, "tensor blk.0.attn_q_norm.weight is missing");
    other_flaw("olmo2", "llama", GOOD, NULL, "tensor blk.0.attn_norm.weight is missing");
    other_flaw("qwen3", "olmo2", GOOD, NULL, "tensor blk.0.post_attention_norm.weight is missing");
    other_flaw("qwen3", "qwen3moe", GOOD, NULL, "qwen3moe; llama, olmo2, qwen2 and qwen3 are read");
}

// A model in several files opens by the first of them, beside which the others lie.
static void split_gguf(void) {
    gguf_case file = {.name = "split", .type = GGML_Q8_0, .style = "llama2_style", .llama3 = true,
                      .parts = 3};
    good_gguf(&file);
    char first[256], second[256], third[256], bad[256], command[1024];
    strcpy(first, part_name("split", 1, 3));
    strcpy(second, part_name("split", 2, 3));
    strcpy(third, part_name("split", 3, 3));
    strcpy(bad, in_work("bad"));
    fails(1, "part 2 of 3: give the first, /tmp", "--from %s --to %s", second, bad);
    fails(1, "split-00001-of-00003.gguf", "--from %s --to %s", third, bad);
    snprintf(command, sizeof command, "cp %s %s && cp %s %s", first, in_work("odd.gguf"), second,
             in_work("even.gguf"));
    need(system(command) == 0, command);
    fails(1, "odd.gguf: it is the first of 3 parts, but is not called …-00001-of-00003.gguf",
          "--from %s --to %s", in_work("odd.gguf"), bad);
    fails(1, "even.gguf: it is part 2 of 3: give the first, …-00001-of-00003.gguf",
          "--from %s --to %s", in_work("even.gguf"), bad);

    size_t size;
    char *bytes = retrofit_read_file(third, &size);
    need(bytes != NULL, third);
    write_text(third, bytes, size - 1);
    fails(1, "split-00003-of-00003.gguf: tensor ", "--from %s --to %s", first, bad);
    write_text(second, bytes, size);
    fails(1, "split-00002-of-00003.gguf: it is not part 2 of 3", "--from %s --to %s", first, bad);
    retrofit_free(write_gguf(&file));
    need(unlink(third) == 0, third);
    fails(1, "part 3 of 3 is missing: /tmp", "--from %s --to %s", first, bad);
    need(mkdir(third, 0777) == 0, third);
    fails(1, "split-00003-of-00003.gguf: not a regular file", "--from %s --to %s", first, bad);
    free(bytes);

    file = (gguf_case){.name = "parts", .style = "llama2_style", .parts = 2};
    strcpy(first, part_name("parts", 1, 2));
    file.flaw = TENSOR_TWICE;
    retrofit_free(write_gguf(&file));
    fails(1, "tensor output_norm.weight is there twice, here and in /tmp", "--from %s --to %s",
          first, bad);
    file.flaw = PART_KEY;
    retrofit_free(write_gguf(&file));
    fails(1, "parts-00002-of-00002.gguf: metadata llama.context_length is not as in",
          "--from %s --to %s", first, bad);
    file.flaw = PART_COUNT;
    retrofit_free(write_gguf(&file));
    fails(1, "parts-00001-of-00002.gguf: split.tensors.count is", "--from %s --to %s", first, bad);
}

// Every type with every tokenizer, and then the files that are not good.
static void gguf_files(void) {
    static const char *const styles[] = {"llama2_style", "llama3_style", "smollm_style"};
    for (uint32_t type = 0; type < TYPES; type++) {
        if (!type_names[type]) continue;
        gguf_case file = {.name = type_names[type], .type = type, .style = styles[type % 3],
                          .tied = type % 2, .llama3 = type % 3 == 1};
        good_gguf(&file);
    }
    static const gguf_case aligned = {.name = "aligned", .type = GGML_MXFP4,
                                      .style = "llama2_style", .alignment = 256};
    good_gguf(&aligned);
    flawed_gguf(EXTRA_TENSOR, "no place");
    flawed_gguf(NO_TENSOR, "blk.1.ffn_up.weight is missing");
    flawed_gguf(BAD_ARCHITECTURE, "gemma");
    flawed_gguf(BAD_OFFSET, "tensor blk.0.ffn_norm.weight: 128 bytes at offset 1073741824 are");
    flawed_gguf(UNALIGNED, "tensor blk.0.ffn_norm.weight: 128 bytes at offset ");
    flawed_gguf(OVERLAP, "tensor blk.0.ffn_norm.weight: its data begin within those of token_embd");
    flawed_gguf(BAD_PRE, "qwen35; known: ");
    flawed_gguf(FEW_ROWS, "fewer embeddings");
    flawed_gguf(BAD_ROPE, "tensor rope_freqs.weight is not Llama 3's");
    flawed_gguf(ROPE_SIZE, "tensor rope_freqs.weight is 1 x 5, heads of 8 need 1 x 4");
    flawed_gguf(BAD_VERSION, "version 1");
    flawed_gguf(TENSOR_TWICE, "tensor output_norm.weight is there twice");
    bad_types();
    not_finite();
    neutral_metadata();
    refused_metadata();
    gguf_chat();
    gguf_patterns();
    gguf_linear_scaling();
    gguf_rope();
    gguf_fixture();
    other_architectures();
    foreign_keys();
    other_architectures_flawed();
    split_gguf();
    damaged_gguf(GGML_Q8_0);
    damaged_gguf(GGML_Q4_K);
}

// =================================================================================================
// What a training recorded
// =================================================================================================

// It is true of the same model in another type, not of one that is yet to be trained.
static void recorded_trainings(void) {
    static const char trained[] = "\"trained_seq_len\": 33, \"trained_state_init\": \"zero\"";
    static const struct {
        const char *from, *how;
        bool kept;
    } cases[] = {
        {"base", "--from", true},
        {"base", "--prelude 0-1 --core 3-5 --coda 6-7 --from", false},
        {"recurrent", "--dtype bf16 --from", true},
        {"recurrent", "--random", false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *source = in_work("trained.%zu", i), *to = in_work("made.%zu", i);
        char command[1024];
        snprintf(command, sizeof command, "cp -r " FIXTURES "tiny/%s %s && chmod -R u+w %s && "
                 "sed -i 's/.model_type.:/%s, &/' %s/config.json", cases[i].from, source, source,
                 trained, source);
        need(system(command) == 0, command);
        works("%s %s --to %s", cases[i].how, source, to);
        retrofit_model *model = load(to);
        size_t expected = cases[i].kept ? 33 : 0;
        bool recurrent = !retrofit_is_plain(&model->config);
        check(model->config.trained_seq_len == expected, "%s %s: rows of %zu tokens",
              cases[i].how, cases[i].from, model->config.trained_seq_len);
        check(model->config.trained_state_zero == (cases[i].kept && recurrent),
              "%s %s: start states", cases[i].how, cases[i].from);
        retrofit_free(model);
    }
}

// =================================================================================================
// Bad input
// =================================================================================================

static const char source[] = "--from " FIXTURES "tiny/base";
static const char layers[] = "--prelude 0-1 --core 3-5 --coda 6-7";
static const char tokenizer[] = "--tokenizer " FIXTURES "tokenizers/smollm_style";

static void bad_usage(void) {
    char bad[256];
    strcpy(bad, in_work("bad"));
    fails(2, "--help", "");
    fails(2, "did you mean --core", "%s --to %s --cote 3", source, bad);
    fails(2, "--from, --random and --tokenize", "%s --random x --to %s", source, bad);
    fails(2, "--from, --random and --tokenize", "%s --tokenize x.txt --to %s", source, bad);
    fails(2, "--to is needed", "%s %s", source, layers);
    fails(2, "exclude each other", "%s --to %s %s --preset tinyllama", source, bad, layers);
    fails(2, "22 layers, this one has 8", "%s --to %s --preset tinyllama", source, bad);
    fails(2, "go together", "%s --to %s --core 3-5", source, bad);
    fails(2, "goes with a choice of layers", "%s --to %s --seed 4", source, bad);
    fails(2, "does not go with --from", "%s --to %s %s %s", source, bad, layers, tokenizer);
    fails(2, "not an option", "%s --to %s %s extra", source, bad, layers);
    fails(2, "is one of", "%s --to %s %s --dtype f64", source, bad, layers);
    fails(2, "whole number", "%s --to %s %s --seed x", source, bad, layers);
    fails(2, "65536", "%s --to %s %s --mean-recurrence 0", source, bad, layers);
    works("--help");
}

static void bad_layers(void) {
    static const char *const lists[] = {"3-", "-3", "3,,4", "5-3",   "a",   "3,",
                                        "3 4", "+3", "3-4-5", "0x3", "''", "99999999999999999999"};
    char bad[256];
    strcpy(bad, in_work("bad"));
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++)
        fails(2, "--core", "%s --to %s --prelude 0 --core '%s' --coda 7", source, bad, lists[i]);
    fails(2, "there is no layer 8: the source has 8",
          "%s --to %s --prelude 0-1 --core 3-5 --coda 6-8", source, bad);
    fails(2, "layer 4 is there twice", "%s --to %s --prelude 0-1 --core 3-5,4 --coda 6-7", source,
          bad);
    fails(2, "layer to repeat", "%s --to %s --prelude 0-1 --core none --coda 6-7", source, bad);
}

static void bad_models(void) {
    char bad[256], text[256];
    strcpy(bad, in_work("bad"));
    strcpy(text, in_work("file"));
    fails(1, "recurrent already", "--from " FIXTURES "tiny/recurrent --to %s %s", bad, layers);
    fails(1, "No such file", "--from %s --to %s", in_work("missing"), bad);
    fails(1, "missing.gguf: No such file", "--from %s --to %s", in_work("missing.gguf"), bad);
    fails(1, "No such file", "--random %s --to %s", in_work("missing"), bad);
    write_string(text, "text, no model\n");
    fails(1, "no GGUF", "--from %s --to %s", text, bad);
    fails(1, "Not a directory", "%s --to %s/under/it", source, text);
    fails(1, "bad JSON", "--random %s --to %s", text, bad);
    mkdir(in_work("there"), 0777);
    fails(1, "exists already", "%s --to %s", source, in_work("there"));
    fails(1, "exists already", "%s --to %s", source, text);
}

// A model's directory without its weights, with a part of them, with a config for other shapes.
static void broken_models(void) {
    char bad[256], broken[256];
    strcpy(bad, in_work("bad"));
    strcpy(broken, in_work("broken"));
    size_t size;
    char *weights = retrofit_read_file(FIXTURES "tiny/base/model.safetensors", &size);
    need(weights != NULL, "model.safetensors");
    char *config = read_text(FIXTURES "tiny/base/config.json");
    mkdir(broken, 0777);
    write_string(in_work("broken/config.json"), config);
    fails(1, "no model.safetensors", "--from %s --to %s", broken, bad);
    write_text(in_work("broken/model.safetensors"), weights, size - 1000);
    fails(1, "truncated", "--from %s --to %s %s", broken, bad, layers);
    write_text(in_work("broken/model.safetensors"), weights, size);
    char *width = strstr(config, "\"intermediate_size\": 88");
    need(width != NULL, "intermediate_size");
    memcpy(width, "\"intermediate_size\": 80", 23);
    write_string(in_work("broken/config.json"), config);
    fails(1, "shape", "--from %s --to %s %s", broken, bad, layers);
    fails(2, "plain model", "--random %s/config.json --to %s --backprop-depth 3", broken, bad);
    free(weights);
    free(config);
}

static void bad_text(void) {
    char bad[256], text[256];
    strcpy(bad, in_work("bad.bin"));
    strcpy(text, in_work("x.txt"));
    write_string(in_work("empty.txt"), " \n\t");
    write_string(in_work("x.md"), "x");
    write_string(text, "x");
    fails(1, "no text", "--tokenize %s %s --to %s", in_work("empty.txt"), tokenizer, bad);
    fails(2, ".jsonl", "--tokenize %s %s --to %s", in_work("x.md"), tokenizer, bad);
    fails(1, "No such file", "--tokenize %s %s --to %s", in_work("missing.txt"), tokenizer, bad);
    fails(2, "needs files", "--tokenize %s --to %s", tokenizer, bad);
    fails(2, "--tokenizer is needed", "--tokenize %s --to %s", text, bad);
    fails(2, ".bin", "--tokenize %s %s --to %s", text, tokenizer, in_work("y.txt"));
    fails(1, "tokenizer.json", "--tokenize %s --tokenizer %s --to %s", text, in_work("there"), bad);
    fails(1, "No such file", "--tokenize %s %s --to %s/no/where.bin", text, tokenizer, work);
    fails(1, "Not a directory", "--tokenize %s %s --to %s/x.bin", text, tokenizer, in_work("file"));
    mkdir(in_work("d.txt"), 0777);
    mkdir(in_work("d"), 0777);
    fails(1, "d.txt: a directory", "--tokenize %s %s --to %s", in_work("d.txt"), tokenizer, bad);
    fails(1, "d/*.txt or ", "--tokenize %s %s --to %s", in_work("d"), tokenizer, bad);

    static const char *const second_lines[] = {"{\"text\":", "null\n", "{\"text\":3}\n",
                                               "{\"text\":\"\xff\"}\n"};
    for (size_t i = 0; i < sizeof second_lines / sizeof *second_lines; i++) {
        char lines[64];
        snprintf(lines, sizeof lines, "{\"text\":\"a\"}\n%s", second_lines[i]);
        write_string(in_work("x.jsonl"), lines);
        fails(1, "x.jsonl: line 2", "--tokenize %s %s --to %s", in_work("x.jsonl"), tokenizer, bad);
    }
}

int main(void) {
    need(asprintf(&program, "%s/convert", getenv("BIN") ? getenv("BIN") : ".") > 0, "memory");
    strcpy(work, "/tmp/retrofit-convert-XXXXXX");
    need(access(program, X_OK) == 0 && mkdtemp(work), program);
    need(retrofit_safetensors_open(&blocks_file, FIXTURES "gguf/blocks.safetensors"), "blocks");
    surgery("tiny", "--prelude 0-1 --core 3-5 --coda 6-7");
    surgery("llama3", "--prelude 0 --core 1,3 --coda 4");
    surgery("head64", "--prelude 0 --core 1 --coda 1");
    surgery("olmo2", "--prelude 0 --core 1-2 --coda 3");
    surgery("qwen2", "--prelude 0 --core 2-3 --coda 4");
    surgery("qwen3", "--prelude 0 --core 2-3 --coda 4");
    identity("tiny", "--prelude 0-1 --core 2-5 --coda 6-7");
    identity("tiny", "--prelude none --core 0-7 --coda none");
    identity("llama3", "--prelude 0-2 --core 3 --coda 4");
    sharded_source();
    reversed_sources();
    little_memory();
    random_model(FIXTURES "tiny/recurrent/config.json", "random", false);
    random_model(FIXTURES "llama3/base", "random.plain", true);
    tokenizing("llama2_style");
    tokenizing("llama3_style");
    tokenizing("smollm_style");
    tokenizing_details();
    text_not_utf8();
    files_not_text();
    text_marks_and_lines();
    lines_of_python();
    text_files();
    gguf_files();
    retrofit_safetensors_close(&blocks_file);
    recorded_trainings();
    bad_usage();
    bad_layers();
    bad_models();
    broken_models();
    bad_text();
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", work);
    check(system(command) == 0, "%s: cannot be removed", work);
    return finish("convert");
}

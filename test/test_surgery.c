// Surgery, run as a user would: what it measures of layers, against numbers from Hugging Face's
// Llama; which layers it chooses then; presets; and that [0 | I] begins as the source without the
// dropped layers.
#include "run.h"

static retrofit_model *load(const char *path) {
    retrofit_model *model = retrofit_load(path, &retrofit_cpu, RETROFIT_INFERENCE);
    need(model != NULL, path);
    return model;
}

static void same_model(const char *what, const char *a, const char *b) {
    retrofit_model *x = load(a), *y = load(b);
    bool same = x->parameter_count == y->parameter_count;
    for (size_t i = 0; same && i < x->parameter_count; i++) {
        const retrofit_parameter *p = x->parameters[i], *q = y->parameters[i];
        size_t count = p->rows * p->cols;
        same = p->rows == q->rows && p->cols == q->cols &&
               !memcmp(p->weight.data, q->weight.data, count * sizeof(float));
    }
    check(same, "%s: %s and %s differ", what, a, b);
    retrofit_free(x);
    retrofit_free(y);
}

// =================================================================================================
// What is measured
// =================================================================================================

// A fixture's model in a directory of that name, with the tokenizer of another.
static void with_tokenizer(const char *name) {
    char command[256];
    snprintf(command, sizeof command, "mkdir %s && cp f/%s/base/* f/lookup/base/token* %s", name,
             name, name);
    shell(command);
}

// A line of fixtures/influence/scores.tsv, which test/influence.py made.
typedef struct {
    char model[16], text[16], distance[16];
    size_t tokens, n, layer;
    double influence;
} expected_score;

static bool read_score(FILE *f, expected_score *s) {
    return fscanf(f, "%15s %15s %zu %zu %zu %lf %15s", s->model, s->text, &s->tokens, &s->n,
                  &s->layer, &s->influence, s->distance) == 7;
}

// The layer's line in the table that was printed last: "layer influence distance part".
static const char *line_of(size_t layer) {
    const char *line = strstr(out, "\nlayer ");
    for (size_t i = 0; line && i <= layer; i++) line = strchr(line + 1, '\n');
    return line ? line + 1 : "";
}

static void same_score(const expected_score *s) {
    double influence = NAN;
    char distance[16] = "";
    size_t layer = SIZE_MAX;
    sscanf(line_of(s->layer), "%zu %lf %15s", &layer, &influence, distance);
    check(layer == s->layer && fabs(influence - s->influence) < 1e-6,
          "%s: layer %zu: influence %.6f, expected %.6f", s->model, layer, influence, s->influence);
    bool none = !strcmp(s->distance, "-");
    bool same = none ? !strcmp(distance, "-") : fabs(atof(distance) - atof(s->distance)) < 1e-6;
    check(same, "%s: layer %zu: distance %s, expected %s", s->model, layer, distance, s->distance);
}

// As printed, in millionths.
static void scores(void) {
    expected_score s;
    char said[64];
    FILE *f = fopen("f/influence/scores.tsv", "r");
    need(f && fscanf(f, "%*[^\n]") == 0, "scores.tsv");
    size_t lines = 0;
    while (read_score(f, &s)) {
        bool in_lines = strstr(s.text, ".jsonl") != NULL;
        if (s.layer == 0)
            works("convert --from %s --report --text f/%s/%s --text-tokens %zu %s %s", s.model,
                  in_lines ? "lookup" : "influence", s.text, s.tokens,
                  in_lines ? "--field prompt" : "", s.n == 3 ? "--core auto:1" : "");
        snprintf(said, sizeof said, "measured on %zu tokens:", s.tokens);
        check(strstr(out, said) != NULL, "%s: not in '%.200s'", said, out);
        same_score(&s);
        lines++;
    }
    check(lines == 29, "lines of scores.tsv: %zu", lines);
    fclose(f);
}

// How many tokens were measured.
static void measures(size_t tokens, const char *options) {
    size_t measured = 0;
    works("convert --from tiny --report --text %s", options);
    check(sscanf(out, "measured on %zu tokens", &measured) == 1 && measured == tokens,
          "--text %s: %zu tokens, not %zu", options, measured, tokens);
}

static void texts(void) {
    shell("head -n 1 f/influence/text.txt | cut -c 1-12 >short.txt"); // BOS and three of its own
    shell("(printf a; yes é | head -n 200 | tr -d '\\n') >accents.txt");
    shell("yes '{\"text\": \"i=1 j=8\"}' | head -n 50 >lines.jsonl");
    shell("echo '{\"text\": \"\"}' >>lines.jsonl && echo >empty.txt");
    shell("printf 'a\\377' >wrong.txt && echo a | gzip >gzip.txt");
    measures(407, "f/influence/text.txt");
    measures(1, "f/influence/text.txt --text-tokens 1");
    measures(1, "accents.txt --text-tokens 1"); // what is read ends amid a character
    measures(200, "f/influence/text.txt f/lookup/tasks.jsonl --field prompt --text-tokens 200");
    measures(200, "short.txt f/influence/text.txt --text-tokens 200"); // the second fills up
    measures(2, "short.txt f/influence/text.txt lines.jsonl --text-tokens 2");
    works("convert --from tiny --report --text short.txt lines.jsonl");
    fails(1, "there is no text in empty.txt", "convert --from tiny --report --text empty.txt");
    fails(1, "no \"text\" in it", "convert --from tiny --report --text f/lookup/tasks.jsonl");
    fails(1, "not UTF-8", "convert --from tiny --report --text wrong.txt");
    works("convert --from tiny --report --text wrong.txt --encoding-errors replace");
    fails(1, "compressed with gzip", "convert --from tiny --report --text gzip.txt");
    fails(1, "none.txt: No such file", "convert --from tiny --report --text none.txt");
    fails(2, "neither in .txt nor in .jsonl", "convert --from tiny --report --text lines.md");
    fails(1, "tokenizer.json", "convert --from f/tiny/base --report --text short.txt");
}

// =================================================================================================
// What is chosen
// =================================================================================================

// A random plain model of so many layers, called l<layers>.
static void random_source(size_t layers) {
    works("sed 's/\"num_hidden_layers\": 8/\"num_hidden_layers\": %zu/' f/tiny/base/config.json "
          ">shape.json && convert --random shape.json --tokenizer f/lookup/base --to l%zu",
          layers, layers);
}

// The numbers of layers of prelude, core and coda that the report's last line names.
static void chooses(const char *options, const char *pattern) {
    works("convert --report --text f/influence/text.txt --text-tokens 300 --from %s", options);
    const char *line = strstr(out, "next: convert");
    char command[512];
    snprintf(command, sizeof command, "tail -n 1 stdout | grep -qE -- '--to DIR %s$'", pattern);
    check(line && system(command) == 0, "%s: not %s but %s", options, pattern, line ? line : out);
}

static void choices(void) {
    static const char any[] = "[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*";
    char pattern[256];
    // tiny's influence falls from layer to layer, but for 6; llama3's but for 4.
    chooses("tiny", "--prelude 0-1 --core 2-4 --coda 6-7");
    chooses("tiny --core auto:2", "--prelude 0-1 --core 2-3 --coda 6-7");
    chooses("tiny --core auto:4", "--prelude 0-1 --core 2-5 --coda 6-7");
    chooses("tiny --core auto --prelude 7 --coda none", "--prelude 7 --core 0 --coda none");
    chooses("tiny --core auto:3 --prelude 3 --coda 0-1", "--prelude 3 --core 2,4,6 --coda 0-1");
    chooses("tiny --core auto:2 --prelude none --coda none",
            "--prelude none --core 0-1 --coda none");
    chooses("tiny --core 5,3 --prelude 0 --coda 7", "--prelude 0 --core 5,3 --coda 7");
    chooses("llama3", "--prelude 0 --core 1-2 --coda 4");

    // Where nothing tells the layers apart, their number and where they come from are certain.
    random_source(16);
    random_source(22);
    random_source(32);
    snprintf(pattern, sizeof pattern, "--prelude 0-3 --core %s --coda 18-21", any);
    chooses("l22", pattern);
    chooses("l16 --prelude none --coda none --core auto:16",
            "--prelude none --core 0-15 --coda none");
    snprintf(pattern, sizeof pattern, "--prelude 0-3 --core %s --coda 28-31", any);
    chooses("l32 --preset smollm2-360m --core auto", pattern);
}

// The lengths of the three parts.
static void has_parts(const char *options, size_t prelude, size_t core, size_t coda) {
    works("convert --text f/influence/text.txt --text-tokens 32 --to parts --from %s", options);
    retrofit_model *model = load("parts");
    const retrofit_config *c = &model->config;
    check(c->prelude == prelude && c->core == core && c->coda == coda,
          "%s: %zu, %zu, %zu layers; not %zu, %zu, %zu", options, c->prelude, c->core, c->coda,
          prelude, core, coda);
    retrofit_free(model);
    shell("rm -r parts");
}

// The rule gives the paper's numbers of layers: those of TinyLlama, Llama-3.2 and its 2-4-2.
static void lengths(void) {
    has_parts("l16 --core auto", 4, 6, 4);
    has_parts("l22 --core auto", 4, 8, 4);
    has_parts("l16 --core auto --prelude 0-1 --coda 14-15", 2, 4, 2);
    has_parts("l16 --core auto --preset llama3.2", 4, 6, 4);
    has_parts("l16 --core auto:3 --preset llama3.2", 4, 3, 4);
    has_parts("l16 --core auto --preset llama3.2-2-4-2", 2, 4, 2);
    has_parts("l32 --core auto", 4, 8, 4);
    has_parts("l32 --core auto --preset smollm2-360m", 4, 14, 4);
    has_parts("llama3 --core auto", 1, 2, 1);
}

// What is chosen by measurement is what the same lists make, and both say so.
static void same_by_hand(void) {
    works("convert --from tiny --to auto --core auto --text f/influence/text.txt "
          "--text-tokens 300");
    check(strstr(line_of(5), "dropped") && strstr(line_of(4), "core") &&
              strstr(out, "core        2-4 "), "what was chosen is said: %s", out);
    works("convert --from tiny --to hand --prelude 0-1 --core 2-4 --coda 6-7");
    check(!strstr(out, "influence"), "nothing is measured without a text: %s", out);
    same_model("by hand", "auto", "hand");
    works("convert --from tiny --to known --prelude 0-1 --core 2-4 --coda 6-7 --text short.txt");
    check(strstr(out, "influence") != NULL, "lists and a text: measured too: %s", out);
    same_model("with a text", "known", "hand");
    works("convert --from tiny --report --text short.txt --prelude 0,3 --core 3 --coda 7");
    check(strstr(line_of(3), "prelude, core\n") != NULL, "a layer in two lists: %s", out);
}

static void presets(void) {
    static const struct {
        const char *name, *layers;
        size_t source;
    } table[] = {
        {"tinyllama", "--prelude 0-3 --core 10-17 --coda 18-21", 22},
        {"llama3.2", "--prelude 0-3 --core 6-11 --coda 12-15", 16},
        {"llama3.2-2-4-2", "--prelude 0-1 --core 10-13 --coda 14-15", 16},
        {"olmo2", "--prelude 0-3 --core 6-11 --coda 12-15", 16},
        {"smollm2", "--prelude 0-3 --core 20-25 --coda 26-29", 30},
        {"smollm2-360m", "--prelude 0-3 --core 14-27 --coda 28-31", 32},
    };
    random_source(30);
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        works("convert --from l%zu --to named --preset %s", table[i].source, table[i].name);
        works("convert --from l%zu --to listed %s", table[i].source, table[i].layers);
        same_model(table[i].name, "named", "listed");
        shell("rm -r named listed");
        char layers[64];
        snprintf(layers, sizeof layers, "is for a model of %zu layers, this one has 8",
                 table[i].source);
        fails(2, layers, "convert --from f/tiny/base --to bad --preset %s", table[i].name);
    }
}

static void bad_choices(void) {
    static const char *const counts[] = {"auto:0",  "auto:5",  "auto:",
                                         "auto:x",  "auto:-1", "auto:2x",
                                         "auto:99999999999999999999"};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        fails(2, "from 1 to the 4", "convert --from tiny --to bad --text short.txt --core %s",
              counts[i]);
    fails(2, "is not a list", "convert --from tiny --to bad --prelude 0 --core autos --coda 7");
    fails(2, "leave no layer", "convert --from tiny --report --text short.txt --prelude 0-5 --coda "
                               "6-7 --core auto");
    fails(2, "--core auto needs --text", "convert --from tiny --to bad --core auto");
    fails(2, "--report needs --text", "convert --from tiny --report");
    fails(2, "--text needs files", "convert --from tiny --report --text");
    fails(2, "goes with --text", "convert --from tiny --to bad --preset tinyllama --text-tokens 3");
    fails(2, "between 1 and", "convert --from tiny --report --text short.txt --text-tokens 0");
    fails(2, "between 1 and", "convert --from tiny --report --text short.txt --text-tokens "
                              "100000000");
    fails(2, "--to does not go with --report",
          "convert --from tiny --report --text short.txt --to bad");
    fails(2, "--dtype does not go with --report",
          "convert --from tiny --report --text short.txt --dtype f32");
    fails(2, "--report does not go with --random",
          "convert --random f/tiny/base --to bad --report");
    fails(2, "choice of layers", "convert --from tiny --to bad --text short.txt");
    fails(2, "exclude each other", "convert --from l16 --to bad --preset llama3.2 --core 3");
    fails(2, "exclude each other", "convert --from l16 --to bad --preset llama3.2 --prelude 0 "
                                   "--core auto --text short.txt");
    fails(2, "--field does not go with", "convert --from l16 --to bad --preset llama3.2 --field x");
    fails(1, "recurrent already", "convert --from hand --report --text short.txt");
    fails(1, "missing.gguf: No such file", "convert --from missing.gguf --to bad");
}

// =================================================================================================
// [0 | I]: the source without the dropped layers
// =================================================================================================

enum { MAX_KEPT = 16 };
typedef struct {
    const char *fixture, *prelude, *core, *coda;
    size_t kept, layers[MAX_KEPT]; // the three lists one behind the other
} identity_case;

// A plain model of the layers that are kept, in that order; it reads the source's numbers.
static retrofit_model *without_dropped(const retrofit_model *source, const identity_case *c) {
    retrofit_config config = source->config;
    config.coda = c->kept;
    config.tied = false;
    retrofit_model *model = retrofit_model_new(&config, &retrofit_cpu);
    need(model != NULL, "model");
    model->wte.weight = source->wte.weight;
    model->ln_f.weight = source->ln_f.weight;
    model->lm_head.weight = source->lm_head.weight;
    for (size_t i = 0; i < c->kept; i++) {
        const retrofit_parameter *from = &source->coda[c->layers[i]].norm_1;
        retrofit_parameter *to = &model->coda[i].norm_1;
        for (size_t j = 0; j < sizeof(retrofit_layer) / sizeof *to; j++)
            to[j].weight = from[j].weight;
    }
    return model;
}

static float *all_logits(const retrofit_model *model, const retrofit_tensor *tokens, size_t r) {
    size_t B = tokens->shape[0], T = tokens->shape[1];
    float *logits = retrofit_allocate(B * T * model->config.vocab, sizeof *logits);
    retrofit_buffers *buffers = retrofit_buffers_new(model, B, T, 0, RETROFIT_KEEP_NOTHING, NULL);
    need(logits && buffers && retrofit_forward(buffers, tokens->data, B, T, 0, 0, r, 0), "forward");
    retrofit_logits(buffers, 0, B * T, logits);
    retrofit_buffers_free(buffers);
    return logits;
}

// Equal to the bit, but for the sign of a zero: y = A_s·s + A_e·e adds zeros to 1·e, and from
// there on the layers compute the same. A_s is 0, so this holds for every r.
static void identity(const identity_case *c) {
    char path[256];
    works("convert --from f/%s/base --to identity --adapter-init identity --prelude %s --core %s "
          "--coda %s", c->fixture, c->prelude, c->core, c->coda);
    snprintf(path, sizeof path, "f/%s/base", c->fixture);
    retrofit_model *source = load(path), *recurrent = load("identity");
    retrofit_model *plain = without_dropped(source, c);
    snprintf(path, sizeof path, "f/%s/forward_backward.safetensors", c->fixture);
    retrofit_map f;
    need(retrofit_safetensors_open(&f, path), path);
    const retrofit_tensor *tokens = fixture(&f, "tokens");
    float *expected = all_logits(plain, tokens, 0), *whole = all_logits(source, tokens, 0);
    size_t count = tokens->count * source->config.vocab;
    for (size_t r = 1; r <= 3; r += 2) {
        float *logits = all_logits(recurrent, tokens, r);
        size_t wrong = 0;
        for (size_t i = 0; i < count; i++) wrong += logits[i] != expected[i];
        check(wrong == 0, "%s %s | %s | %s, r = %zu: %zu of %zu logits differ from the source's "
              "without the dropped layers", c->fixture, c->prelude, c->core, c->coda, r, wrong,
              count);
        free(logits);
    }
    bool all_kept = c->kept == source->config.coda;
    check(all_kept || relative_error(whole, expected, count) > .01,
          "%s: dropping layers changes it", c->fixture);
    free(expected);
    free(whole);
    retrofit_safetensors_close(&f);
    retrofit_free(plain);
    retrofit_free(source);
    retrofit_free(recurrent);
    shell("rm -r identity");
}

static void identities(void) {
    static const identity_case cases[] = {
        {"tiny", "0-1", "3-5", "6-7", 7, {0, 1, 3, 4, 5, 6, 7}},
        {"tiny", "0", "2", "7", 3, {0, 2, 7}},
        {"tiny", "none", "6", "none", 1, {6}},
        {"tiny", "7,0", "3,2", "1", 5, {7, 0, 3, 2, 1}},
        {"tiny", "0-2", "1,4", "2,7", 7, {0, 1, 2, 1, 4, 2, 7}},
        {"llama3", "0", "1,3", "4", 4, {0, 1, 3, 4}},
        {"llama3", "none", "4", "2", 2, {4, 2}},
        {"head64", "0", "1", "none", 2, {0, 1}},
        {"olmo2", "0", "2", "3", 3, {0, 2, 3}},
        {"qwen2", "0", "3,1", "4", 4, {0, 3, 1, 4}},
        {"qwen3", "1", "2", "4", 3, {1, 2, 4}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) identity(&cases[i]);
}

// cos(0, x) is no number, nor is that of what is not finite: neither is a layer's influence.
static void nothing_measured(void) {
    static const float values[2] = {0, 1e38f};
    for (int i = 0; i < 2; i++) {
        retrofit_model *model = load("tiny");
        retrofit_parameter *p = i ? &model->coda[1].w_down : &model->wte;
        float *numbers = retrofit_allocate(p->rows * p->cols, sizeof *numbers);
        for (size_t j = 0; j < p->rows * p->cols; j++) numbers[j] = values[i];
        p->weight.data = numbers;
        shell("mkdir spoilt && cp f/lookup/base/token* spoilt");
        need(retrofit_save(model, "spoilt", RETROFIT_F32, NULL), retrofit_error());
        fails(1, i ? "what layer 1 makes of the text" : "what layer 0 makes of the text",
              "convert --from spoilt --report --text f/influence/text.txt");
        fails(1, "is it a trained model?",
              "convert --from spoilt --to bad --core auto --text f/influence/text.txt");
        retrofit_free(model);
        free(numbers);
        shell("rm -r spoilt");
    }
    // Zeros for one token, as padding has them, leave the others: here for BOS, which is OLMo-2's
    // padding.
    with_tokenizer("olmo2");
    works("convert --from olmo2 --report --text f/influence/text.txt --text-tokens 64");
    check(!strstr(out, "nan"), "a token without a direction: %s", out);
    works("convert --from olmo2 --to begun --core auto --text f/influence/text.txt");
}

int main(void) {
    enter("surgery");
    with_tokenizer("tiny");
    with_tokenizer("llama3");
    nothing_measured();
    scores();
    texts();
    choices();
    lengths();
    same_by_hand();
    presets();
    bad_choices();
    identities();
    return leave("surgery");
}

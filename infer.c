// infer: text from a model at any number of recurrences, and what the number is worth: loss and accuracy by recurrences.
#define RETROFIT_IMPLEMENTATION
#include "retrofit.h"
#include <regex.h>

static struct {
    const char *model, *prompt, *batch, *system, *recurrences, *stop, *eval, *tasks, *answer_regex, *tokens, *logits, *tokenizer, *kv_cache,
        *speculative, *trace;
    size_t batch_size, max_tokens, top_k, seed, seq_len, rows;
    double temperature, top_p, min_p, exit_threshold, noise;
    int state_init, device, precision, exit, noise_kind;
    bool chat, interactive, json, print_tokens, kv_bf16, continuous;
} o = {.batch_size = 8, .max_tokens = 128, .seed = 1, .top_p = 1, .exit_threshold = -1};

static const retrofit_option options[] = {
    {"Generate: text on stdout, all else on stderr", RETROFIT_HEADING, NULL, NULL, NULL},
    {"model", RETROFIT_STRING, &o.model, "DIR", "recurrent or plain; a run's --out means its latest checkpoint"},
    {"prompt", RETROFIT_STRING, &o.prompt, "TEXT|-", "what to continue; - reads it from stdin"},
    {"batch", RETROFIT_STRING, &o.batch, "FILE.jsonl", "many: {prompt[, id]} a line, with --chat also {messages}; a line of JSON for each"},
    {"batch-size", RETROFIT_SIZE, &o.batch_size, "N", "so many at a time (8)"},
    {"chat", RETROFIT_FLAG, &o.chat, NULL, "the prompt is what a user says: in the template of Llama-3, ChatML or Zephyr"},
    {"system", RETROFIT_STRING, &o.system, "TEXT", "what the model is told before it (what the template says by default)"},
    {"interactive", RETROFIT_FLAG, &o.interactive, NULL, "a conversation: each line of stdin is a turn; with --chat"},
    {"recurrences", RETROFIT_STRING, &o.recurrences, "R", "how deep to think (the model's mean); a list for --eval, --tasks"},
    {"max-tokens", RETROFIT_SIZE, &o.max_tokens, "N", "stop after so many (128), or at the end of text"},
    {"stop", RETROFIT_STRING, &o.stop, "TEXT|TEXT", "end before any of these texts; \\n \\t \\\\ \\| are newline, tab, \\ and |"},
    {"json", RETROFIT_FLAG, &o.json, NULL, "a JSON object instead of text: tokens, log-probabilities, times"},
    {"temperature", RETROFIT_REAL, &o.temperature, "F", "0: always the likeliest token (0)"},
    {"top-k", RETROFIT_SIZE, &o.top_k, "N", "draw from the N likeliest; 0: from all (0)"},
    {"top-p", RETROFIT_REAL, &o.top_p, "F", "draw from the likeliest that make up this share (1)"},
    {"min-p", RETROFIT_REAL, &o.min_p, "F", "draw from those with at least this share of the likeliest's probability (0)"},
    {"seed", RETROFIT_SIZE, &o.seed, "N", "of draws and start states (1)"},
    {"state-init", RETROFIT_CHOICE, &o.state_init, "normal|zero", "the start state s_0 (normal)"},
    {"Think as long as it takes", RETROFIT_HEADING, NULL, NULL, NULL},
    {"exit", RETROFIT_CHOICE, &o.exit, "none|entropy-diff|latent-diff|kl|minp-kl|argmax-stability", "stop a token's recurrences once this changes no more (none)"},
    {"exit-threshold", RETROFIT_REAL, &o.exit_threshold, "F", "by less than F; or stays F recurrences (the authors': 1e-3, .03, 5e-4, 1e-6, 5)"},
    {"kv-cache", RETROFIT_STRING, &o.kv_cache, "full|latest|shared:M|grouped:M", "a slot for each recurrence; the last for deeper ones; slot r mod M; r div M"},
    {"kv-bf16", RETROFIT_FLAG, &o.kv_bf16, NULL, "keys and values in bf16: half the memory (a GPU keeps them in its --precision)"},
    {"speculative", RETROFIT_STRING, &o.speculative, "R,N", "draft N tokens at R recurrences, verify them together in full: same text, faster"},
    {"continuous", RETROFIT_FLAG, &o.continuous, NULL, "a token starts from the last state of the one before, not from s_0"},
    {"noise", RETROFIT_REAL, &o.noise, "F", "test-time noise on the state, times its standard deviation (0)"},
    {"noise-type", RETROFIT_CHOICE, &o.noise_kind, "fixed|geom|sqrt|line|chi", "in recurrence i: the same, over i, over its root, falling, random (fixed)"},
    {"Evaluate", RETROFIT_HEADING, NULL, NULL, NULL},
    {"eval", RETROFIT_STRING, &o.eval, "FILE.bin", "loss and perplexity on token shards, at each of --recurrences"},
    {"seq-len", RETROFIT_SIZE, &o.seq_len, "T", "tokens in a row (1024), in a conversation (4096), or the model's context"},
    {"rows", RETROFIT_SIZE, &o.rows, "N", "at most so many rows or tasks; 0: all (0)"},
    {"tasks", RETROFIT_STRING, &o.tasks, "FILE.jsonl", "{prompt, answer}, {prompt, choices, answer: 0} or {prompt, target} a line: accuracy"},
    {"answer-regex", RETROFIT_STRING, &o.answer_regex, "ERE", "generates; a target is compared with group 1 of the last match in the text"},
    {"Look inside", RETROFIT_HEADING, NULL, NULL, NULL},
    {"trace", RETROFIT_STRING, &o.trace, "OUT.jsonl", "what each recurrence makes of each token of prompt and text; a picture on stderr"},
    {"tokens", RETROFIT_STRING, &o.tokens, "1,2,3", "token ids instead of a prompt, for --logits"},
    {"logits", RETROFIT_STRING, &o.logits, "OUT.safetensors", "writes the tensor logits (T,V) for --tokens or --prompt"},
    {"print-tokens", RETROFIT_FLAG, &o.print_tokens, NULL, "prints the prompt's ids, with the special tokens encoding adds"},
    {"tokenizer", RETROFIT_STRING, &o.tokenizer, "DIR", "where tokenizer.json lies (the model's directory)"},
    {"Machine", RETROFIT_HEADING, NULL, NULL, NULL},
    {"device", RETROFIT_CHOICE, &o.device, "auto|cpu|cuda", "where to compute; auto: on a GPU if there is one (auto)"},
    {"precision", RETROFIT_CHOICE, &o.precision, "bf16|fp32", "of weights and activations on a GPU; a CPU takes weights as the file has them (bf16)"},
};

__attribute__((format(printf, 2, 3), noreturn)) static void die(int code, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("infer: ", stderr), vfprintf(stderr, format, args), fputc('\n', stderr);
    va_end(args);
    exit(code);
}

static char device[256]; // what computes

static void *need(void *p) { // what retrofit could not give
    if (!p) die(1, "%s", retrofit_error());
    return p;
}

static float sigma(const retrofit_model *m) { return o.state_init ? 0 : m->config.state_std; }

// --recurrences as a list; without it `otherwise`, or the model's mean. A plain Llama has one depth, shown as 0 recurrences.
static size_t recurrences(const retrofit_model *m, size_t *r, size_t most, const char *otherwise) {
    char mean[32];
    size_t count;
    snprintf(mean, sizeof mean, "%zu", m->config.mean_recurrence);
    if (retrofit_is_plain(&m->config)) {
        if (o.recurrences) die(2, "--recurrences: %s is a plain Llama, it has none: make it recurrent with convert", o.model);
        return r[0] = 0, 1;
    }
    if (!retrofit_sizes(o.recurrences ? o.recurrences : otherwise ? otherwise : mean, r, most, &count)) die(2, "--recurrences: %s", retrofit_error());
    for (size_t i = 1; i < count; i++)
        if (r[i] <= r[i - 1]) die(2, "--recurrences: %s does not grow from one to the next", o.recurrences);
    return count;
}

// How to think, at most r recurrences, and the cache for it.
static retrofit_recurrence_options thinking(const retrofit_model *m, size_t r) {
    return (retrofit_recurrence_options){r, sigma(m), o.seed, (retrofit_exit)o.exit, (float)o.exit_threshold, o.continuous, (float)o.noise,
                               (retrofit_noise)o.noise_kind};
}

static retrofit_kv_cache kv_cache(size_t capacity, size_t r) {
    static const char *const kinds[] = {"full", "shared:", "grouped:"}; // in the order of retrofit_cache_kind
    retrofit_kv_cache cache = {capacity, r, RETROFIT_CACHE_FULL, 0, o.kv_bf16};
    const char *text = o.kv_cache ? o.kv_cache : o.exit ? "latest" : "full";
    if (!strcmp(text, "full") && o.exit)
        die(2, "--exit leaves nothing in a full KV cache that deeper recurrences could read: --kv-cache latest, shared:M or grouped:M");
    if (!strcmp(text, "full") || !strcmp(text, "latest")) return cache;
    for (int kind = 1; kind < 3; kind++)
        if (!strncmp(text, kinds[kind], strlen(kinds[kind]))) {
            size_t count;
            if (!retrofit_sizes(text + strlen(kinds[kind]), &cache.M, 1, &count)) die(2, "--kv-cache %s: %s", text, retrofit_error());
            return cache.kind = (retrofit_cache_kind)kind, cache;
        }
    die(2, "--kv-cache is full, latest, shared:M or grouped:M, not '%s'", text);
}

static struct {
    size_t depth, ahead, drafted, kept, rounds;
    double seconds, plain;
} drafts; // of --speculative, and how it went; plain: s/token without

static void read_drafts(void) {
    size_t both[2], count;
    if (!retrofit_sizes(o.speculative, both, 2, &count) || count != 2 || both[1] > RETROFIT_LOOKAHEAD)
        die(2, "--speculative is R,N like 4,5: recurrences of a draft, and tokens, at most %d, not '%s'", RETROFIT_LOOKAHEAD,
            o.speculative);
    drafts.depth = both[0], drafts.ahead = both[1];
    bool kept = !o.kv_cache || !strcmp(o.kv_cache, "full");
    const char *with = o.exit ? "--exit" : o.continuous ? "--continuous" : o.noise > 0 ? "--noise" : !kept ? "--kv-cache" : NULL;
    if (!with) with = o.batch ? "--batch" : o.tasks ? "--tasks" : o.eval ? "--eval" : o.logits ? "--logits" : NULL;
    if (with) die(2, "--speculative does not go with %s", with);
}

// --prompt, or stdin if it is "-".
static char *prompt_text(size_t *size) {
    if (strcmp(o.prompt, "-")) return *size = strlen(o.prompt), (char *)need(strdup(o.prompt));
    size_t room = 1 << 16;
    char *text = (char *)need(malloc(room));
    for (size_t n; (n = fread(text + *size, 1, room - *size, stdin)) > 0;)
        if ((*size += n) == room) text = (char *)need(realloc(text, room *= 2));
    return text;
}

// ---- Chat: a conversation as the model's family writes it, open role close text end after -----------------------------------
static const struct { const char *open, *close, *end, *after; } families[] = {
    {"<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", ""}, {"<|im_start|>", "\n", "<|im_end|>", "\n"}, {"<|", "|>\n", "</s>", "\n"}};
enum { LLAMA3, CHATML, ZEPHYR };
static int family;
static char *chat_template;
static int32_t ends[2] = {-1, -1}; // tokens that end a text

static char *read_template(const char *directory) { // "" if there is none
    char path[RETROFIT_PATH];
    size_t size;
    if (retrofit_path(path, directory, "chat_template.jinja") && !access(path, F_OK)) return (char *)need(retrofit_read_file(path, &size));
    if (!retrofit_path(path, directory, "tokenizer_config.json") || access(path, F_OK)) return (char *)need(strdup(""));
    char *text = (char *)need(retrofit_read_file(path, &size));
    retrofit_json *j = (retrofit_json *)need(retrofit_json_parse(text, size, path));
    const retrofit_json *chat = retrofit_json_get(j, "chat_template"),
                        *named = chat && chat->type == RETROFIT_JSON_ARRAY ? chat->child : NULL;
    while (named && !retrofit_json_is(retrofit_json_get(named, "name"), "default")) named = named->next;
    if (named) chat = retrofit_json_get(named, "template");
    free(text), text = (char *)need(strdup(chat && chat->type == RETROFIT_JSON_STRING ? chat->string : ""));
    return retrofit_json_free(j), text;
}

// By the special tokens; Zephyr's markers, of TinyLlama's chat models too, are no tokens but stand in the template.
static void find_family(const retrofit_tokenizer *t, const char *directory) {
    chat_template = read_template(directory);
    for (family = LLAMA3;
         family < ZEPHYR && (retrofit_tokenizer_id(t, families[family].open) < 0 || retrofit_tokenizer_id(t, families[family].end) < 0);)
        family++;
    ends[1] = retrofit_tokenizer_id(t, families[family].end);
    if (family == ZEPHYR && (ends[1] < 0 || retrofit_tokenizer_id(t, "<|user|>") >= 0 || !strstr(chat_template, "<|user|>")))
        die(1, "%s: --chat: the tokenizer is of no family of chat models that is known here: Llama-3, ChatML, Zephyr", directory);
}

static void put(retrofit_text *x, const char *s) { retrofit_text_append(x, s, strlen(s)); }

static void put_turn(retrofit_text *x, const char *role, const char *text, size_t size) { // no text: what it is to be said behind
    put(x, families[family].open), put(x, role), put(x, families[family].close);
    if (!text) return;
    if (family == LLAMA3) retrofit_strip(&text, &size); // as its templates do, and the others do not
    retrofit_text_append(x, text, size), put(x, families[family].end), put(x, families[family].after);
}

// How a conversation begins. Templates that name a system message of their own (SmolLM2's, Qwen's) mean it where none is given; those from
// Llama-3.1 on put dates before it, and so write one always.
static void put_system(retrofit_text *x, const char *text, size_t size) {
    static const char dated[] = "Cutting Knowledge Date: December 2023", system[] = "<|im_start|>system";
    if (family == LLAMA3 && strstr(chat_template, dated)) {
        char date[32] = "26 Jul 2024"; // Llama-3.1's; Llama-3.2's is today's
        time_t now = time(NULL);
        if (strstr(chat_template, "strftime_now")) strftime(date, sizeof date, "%d %b %Y", localtime(&now));
        put_turn(x, "system", NULL, 0), put(x, dated), put(x, "\nToday Date: "), put(x, date), put(x, "\n\n");
        if (text) retrofit_strip(&text, &size), retrofit_text_append(x, text, size);
        put(x, families[family].end);
    } else if (text) put_turn(x, "system", text, size);
    else if (family == CHATML)
        for (const char *at = chat_template, *end; (at = strstr(at, system));) { // written out in full, from its newline to its end
            at += sizeof system - 1;
            size_t newline = *at == '\n' ? 1 : !strncmp(at, "\\n", 2) ? 2 : 0;
            if (newline && (end = strstr(at, "<|im_end|>")) && at + strcspn(at, "'\"{}") > end)
                return put_turn(x, "system", at + newline, (size_t)(end - at) - newline);
        }
}

static const char *role_of(const retrofit_json *message) { // NULL if it is none
    static const char *const roles[] = {"system", "user", "assistant"};
    const retrofit_json *role = retrofit_json_get(message, "role"), *content = retrofit_json_get(message, "content");
    for (int i = 0; i < 3 && content && content->type == RETROFIT_JSON_STRING; i++)
        if (retrofit_json_is(role, roles[i])) return roles[i];
    return NULL;
}

// The ids of a prompt, or with --chat of the messages, or of the one message that the prompt is. Special tokens written out in a text become
// ids, as they do when Hugging Face encodes what a template gave; BOS is what the tokenizer adds, once.
static int32_t *encode(const retrofit_tokenizer *t, const char *where, const retrofit_json *messages, const char *text, size_t size,
                       size_t *count) {
    retrofit_text x = {NULL, 0, 0, false};
    if (messages && (messages->type != RETROFIT_JSON_ARRAY || !messages->count)) die(1, "%s: \"messages\" is no list, or empty", where);
    const retrofit_json *m = messages ? messages->child : NULL, *content;
    for (; m; m = m->next) {
        if (!role_of(m)) die(1, "%s: a message needs a \"role\", system, user or assistant, and a string \"content\"", where);
        bool system = m == messages->child && !strcmp(role_of(m), "system");
        content = retrofit_json_get(m, "content");
        if (system) put_system(&x, content->string, content->length);
        else if (m == messages->child) put_system(&x, o.system, o.system ? strlen(o.system) : 0);
        if (!system) put_turn(&x, role_of(m), content->string, content->length);
    }
    if (o.chat && !messages) put_system(&x, o.system, o.system ? strlen(o.system) : 0), put_turn(&x, "user", text, size);
    if (o.chat) put_turn(&x, "assistant", NULL, 0);
    if (x.failed) die(1, "%s", retrofit_error());
    int32_t *ids = (int32_t *)need(retrofit_encode(t, o.chat ? x.bytes : text, o.chat ? x.size : size, true, count));
    return free(x.bytes), ids;
}

// A JSON Lines file, line by line. Whatever is wrong with a line, `where` says which it is.
typedef struct {
    FILE *f;
    char *line, where[RETROFIT_PATH + 32];
    const char *path;
    size_t room, number;
} lines;

static lines open_lines(const char *path) {
    lines l = {.f = fopen(path, "rb"), .path = path};
    if (!l.f) die(1, "%s: %s", path, strerror(errno));
    return l;
}

static void close_lines(lines *l) { free(l->line), fclose(l->f); }

static retrofit_json *next_line(lines *l) { // the next that is not empty; NULL at the end
    ssize_t n;
    errno = 0;
    while ((n = getline(&l->line, &l->room, l->f)) > 0 && ++l->number && n == 1) continue;
    if (n < 0 && !feof(l->f)) die(1, "%s: behind line %zu: %s", l->path, l->number, strerror(errno));
    if (n < 0) return NULL;
    snprintf(l->where, sizeof l->where, "%s: line %zu", l->path, l->number);
    return (retrofit_json *)need(retrofit_json_parse(l->line, (size_t)n, l->where));
}

static void *more(void *items, size_t count, size_t size) { // room for one more: it doubles when the count is a power of two
    return count & (count - 1) ? items : need(realloc(items, (count ? 2 * count : 1) * size));
}

// Shown every two seconds; returns when it began, with none done.
static double progress(const char *what, size_t done, size_t of) {
    static double began, shown;
    double now = retrofit_seconds();
    if (done == 0) began = shown = now;
    if (now - shown < 2 || done == of) return began;
    shown = now;
    fprintf(stderr, "%zu of %zu %s, ETA %.0f s\n", done, of, what, (now - began) * (double)(of - done) / (double)done);
    return began;
}

static int32_t *prompt_ids(const retrofit_tokenizer *t, size_t *count) {
    size_t size = 0;
    char *text = prompt_text(&size);
    int32_t *ids = encode(t, "--prompt", NULL, text, size, count);
    free(text);
    return ids;
}

// ---- Generation ---------------------------------------------------------------------------------------------------------------
enum { CHUNK = 1024 }; // a long prompt that is alone is fed in pieces: activations need not be as long as it is

// A prompt, and what the model says to it.
typedef struct {
    int32_t *ids, *said;         // what to feed; what is generated, from said[1] on
    size_t count, limit, number; // of ids; tokens to generate at most; which of all prompts this is, from 0: its draws are its own
    retrofit_json *line;         // of --batch, where it comes from one
    // What follows is generate()'s, until forget().
    size_t produced, shown;      // tokens; bytes of text that no stop string will take back
    bool alone;                  // the text is that of said[1] and on; else said[0] is a token of the prompt to decode it behind
    retrofit_stream stream;
    retrofit_text text;
    float *logprobs;             // of each token said, by the model at temperature 1
    size_t *recurrences;         // that it took
    retrofit_sampling sampling;
    const char *finish;          // "stop": end of text or a stop string; "length"; NULL while it goes on
    double seconds[2];           // for the prompt, for all that followed
} row;

static char *stops[16];
static size_t stop_count;

static void read_stops(void) {
    static const char names[] = "nt\\|", values[] = "\n\t\\|";
    char *to = stops[0] = (char *)need(strdup(o.stop));
    const char *name;
    uint32_t c;
    for (const char *p = o.stop; *p;) // else half a character of the text might be cut off
        if (p += retrofit_utf8_next(p, strlen(p), &c), c == RETROFIT_UTF8_INVALID) die(2, "--stop: not UTF-8");
    for (const char *p = o.stop;; p++) {
        if (*p && *p != '|' && *p != '\\') *to++ = *p;
        else if (*p == '\\' && p[1] && (name = strchr(names, p[1]))) *to++ = values[name - names], p++;
        else if (*p == '\\') die(2, "--stop: behind a \\ comes n, t, \\ or |");
        else {
            *to++ = 0;
            if (!*stops[stop_count++]) die(2, "--stop: an empty text would end everything");
            if (!*p) return;
            if (stop_count == sizeof stops / sizeof *stops) die(2, "--stop: more than %zu texts", stop_count);
            stops[stop_count] = to;
        }
    }
}

// How far the text can be shown: up to the first stop string, or to an end of it that could become one.
static size_t showable(const row *k, bool *stopped) {
    size_t hold = k->text.size;
    for (size_t at = k->shown; at < k->text.size; at++)
        for (size_t i = 0; i < stop_count; i++) {
            size_t size = strlen(stops[i]), here = retrofit_min(size, k->text.size - at);
            if (memcmp(k->text.bytes + at, stops[i], here)) continue;
            if (here == size) return *stopped = true, at;
            hold = retrofit_min(hold, at);
        }
    return hold;
}

// Takes the ids. past, capacity: tokens before them in the cache, and in it at most.
static row new_row(const char *where, int32_t *ids, size_t count, size_t past, size_t capacity, size_t number) {
    if (count == 0) die(*where ? 1 : 2, "%s: the prompt is empty", *where ? where : "--prompt");
    if (past + count >= capacity)
        die(1, "%s%sthe prompt has %zu tokens, the model's context %zu: shorten it", where, *where ? ": " : "", past + count, capacity);
    return (row){.ids = ids, .count = count, .limit = retrofit_min(o.max_tokens, capacity - past - count), .number = number};
}

static void forget(row *k) { // what it said
    free(k->said), free(k->logprobs), free(k->recurrences), free(k->text.bytes);
    k->said = NULL, k->logprobs = NULL, k->recurrences = NULL, k->text = (retrofit_text){NULL, 0, 0, false};
}

static void free_row(row *k) { forget(k), free(k->ids), retrofit_json_free(k->line); }

static void begin_row(row *k, const retrofit_tokenizer *t) {
    k->produced = k->shown = 0, k->stream = (retrofit_stream){0, 0}, k->finish = k->limit ? NULL : "length";
    k->sampling = (retrofit_sampling){(float)o.temperature, o.top_k, (float)o.top_p, (float)o.min_p, retrofit_hash(o.seed, 1 + k->number)};
    k->said = (int32_t *)need(retrofit_allocate(k->limit + 1, sizeof *k->said));
    k->logprobs = (float *)need(retrofit_allocate(k->limit, sizeof *k->logprobs));
    k->recurrences = (size_t *)need(retrofit_allocate(k->limit, sizeof *k->recurrences));
    k->said[0] = k->ids[k->count - 1], k->alone = true;
    k->alone = !retrofit_decode_context(t, k->ids, k->count, &k->said[0]);
    if (!k->alone) free(need(retrofit_decode_next(t, &k->stream, k->said, 1, true, true, &(size_t){0})));
}

// A token that was drawn by these logits, and its text, shown if it is to be.
static void say(row *k, const retrofit_tokenizer *t, int32_t id, const float *logits, size_t V, size_t recurrences, bool show) {
    size_t size;
    bool stopped = false;
    if (id == ends[0] || id == ends[1]) k->finish = "stop";
    else {
        retrofit_cpu.cross_entropy(&k->logprobs[k->produced], (act *)logits, &id, 1, V, 0);
        k->logprobs[k->produced] *= -1, k->recurrences[k->produced] = recurrences;
        k->said[++k->produced] = id;
        if (k->produced == k->limit) k->finish = "length";
    }
    char *text = (char *)need(retrofit_decode_next(t, &k->stream, k->said + k->alone, k->produced + !k->alone, true, k->finish, &size));
    retrofit_text_append(&k->text, text, size), retrofit_text_append(&k->text, "", 1), free(text); // a NUL behind it
    if (k->text.failed) die(1, "%s", retrofit_error());
    size_t safe = (k->text.size--, showable(k, &stopped));
    if (stopped) k->finish = "stop", k->text.size = safe, k->text.bytes[safe] = 0;
    if (k->finish) safe = k->text.size;
    if (show) fwrite(k->text.bytes + k->shown, 1, safe - k->shown, stdout), fflush(stdout);
    k->shown = safe;
}

// The logits behind each row's last token, and the recurrences they took. A row alone may come in pieces of what the activations hold.
static const float *feed(retrofit_buffers *a, const int32_t *ids, size_t b, size_t t, const int32_t *lengths,
                         const retrofit_recurrence_options *how) {
    const float *logits = NULL;
    for (size_t at = 0, n; at < t; at += n) {
        n = b > 1 ? t : retrofit_min(t - at, a->T);
        logits = (const float *)need((void *)retrofit_next_logits(a, ids + at, b, n, b > 1 ? lengths : NULL, how));
    }
    return logits;
}

// Says what drafts and the whole depth behind them make of the row. The first few tokens come plainly, to tell what drafts save.
static void say_drafted(retrofit_buffers *a, row *k, const retrofit_tokenizer *t, const retrofit_recurrence_options *how, float *scratch,
                        bool show) {
    int32_t out[RETROFIT_LOOKAHEAD];
    size_t L = retrofit_min(drafts.ahead, a->decoder->cache.capacity - (size_t)a->decoder->seen[0]), V = a->model->config.vocab;
    double began = retrofit_seconds();
    size_t count =
        retrofit_speculate(a, k->said[k->produced], drafts.depth, L, how, &k->sampling, retrofit_tokenizer_size(t), out, scratch);
    if (!count) die(1, "--speculative: %s", retrofit_error());
    drafts.seconds += retrofit_seconds() - began, drafts.drafted += L, drafts.kept += count, drafts.rounds++;
    int32_t past = a->decoder->seen[0] - (int32_t)count;
    for (size_t i = 0; i < count && !k->finish; i++) // what lies behind the end of a text is not to stay in the cache
        say(k, t, out[i], scratch + i * V, V, how->recurrences, show), a->decoder->seen[0] = past + (int32_t)i + 1;
}

static int by_count(const void *x, const void *y) {
    size_t a = (*(row *const *)x)->count, b = (*(row *const *)y)->count;
    return (a > b) - (a < b);
}

// Generates for b rows at once, behind what the cache holds. Rows that have ended are fed on with the others, unless they are the last: these
// are the longest, so that no row that goes on has less room in the cache than one that is fed in vain.
static void generate(retrofit_buffers *a, const retrofit_tokenizer *t, row *all, size_t b, size_t r, bool show) {
    row **rows = (row **)need(retrofit_allocate(b, sizeof *rows));
    for (size_t i = 0; i < b; i++) begin_row(rows[i] = &all[i], t);
    qsort(rows, b, sizeof *rows, by_count);
    size_t V = a->model->config.vocab, T = rows[b - 1]->count;
    int32_t *ids = (int32_t *)need(retrofit_allocate(b * T, sizeof *ids)), *lengths = (int32_t *)need(retrofit_allocate(b, sizeof *lengths));
    retrofit_recurrence_options how = thinking(a->model, r);
    float *scratch = (float *)need(retrofit_allocate(2 * drafts.ahead + 2, V * sizeof *scratch));
    enum { PLAIN = 4 }; // tokens before drafts begin
    double began = retrofit_seconds(), fed = began;
    for (bool first = true;; first = false) {
        while (b && rows[b - 1]->finish) b--;
        if (!b) break;
        for (size_t i = 0; i < b; i++) {
            lengths[i] = first ? (int32_t)rows[i]->count : 1;
            memcpy(ids + i * T, first ? rows[i]->ids : &rows[i]->said[rows[i]->produced], (size_t)lengths[i] * sizeof *ids);
        }
        bool drafting = drafts.ahead && rows[0]->produced >= PLAIN;
        double before = retrofit_seconds();
        const float *logits = drafting ? NULL : feed(a, ids, b, T, lengths, &how);
        if (!drafting && !first)
            drafts.plain = drafts.plain > 0 ? fmin(drafts.plain, retrofit_seconds() - before) : retrofit_seconds() - before;
        if (first) fed = retrofit_seconds(), T = 1;
        for (size_t i = 0; i < b; i++) {
            row *k = rows[i];
            if (k->finish) continue;
            if (drafting) say_drafted(a, k, t, &how, scratch, show);
            else {
                int32_t id = retrofit_sample(logits + i * V, retrofit_tokenizer_size(t), &k->sampling,
                                             scratch); // ids beyond the tokenizer's are padding
                say(k, t, id, logits + i * V, V, (size_t)a->decoder->used[i], show);
            }
            k->seconds[0] = fed - began, k->seconds[1] = retrofit_seconds() - fed;
        }
    }
    free(rows), free(ids), free(lengths), free(scratch);
}

static void print_number(double x) { isfinite(x) ? printf("%.7g", x) : fputs("null", stdout); } // JSON knows no infinity

static void print_row(const row *k, size_t past) { // past: tokens before the prompt
    const retrofit_json *id = retrofit_json_get(k->line, "id");
    fputs(id ? "{\"id\":" : "{", stdout);
    if (id && id->type == RETROFIT_JSON_STRING) retrofit_json_write_string(stdout, id->string, id->length);
    else if (id) fputs(id->string, stdout);
    if (id) putchar(',');
    printf("\"prompt_tokens\":%zu,\"text\":", past + k->count);
    retrofit_json_write_string(stdout, k->text.bytes, k->text.size);
    for (int list = 0; list < 3; list++) {
        printf(",\"%s\":[", list == 0 ? "tokens" : list == 1 ? "logprobs" : "recurrences");
        for (size_t i = 0; i < k->produced; i++) {
            if (i) putchar(',');
            if (list == 0) printf("%d", (int)k->said[i + 1]);
            else if (list == 1) print_number((double)k->logprobs[i]);
            else printf("%zu", k->recurrences[i]);
        }
        putchar(']');
    }
    printf(",\"finish_reason\":\"%s\",\"prompt_seconds\":%.4f,\"generation_seconds\":%.4f}\n", k->finish, k->seconds[0], k->seconds[1]);
}

// The activations to generate with, B rows at a time, for the longest prompt and text.
static retrofit_buffers *room_for(const retrofit_model *m, const row *rows, size_t count, size_t B, size_t r) {
    size_t T = 1, capacity = 1;
    for (const row *k = rows; k < rows + count; k++) {
        if (k->count > T) T = k->count;
        if (k->count + k->limit > capacity) capacity = k->count + k->limit;
    }
    retrofit_kv_cache cache = kv_cache(capacity, r);
    T = B > 1 ? T : retrofit_min(T, CHUNK);
    return (retrofit_buffers *)need(
        retrofit_buffers_new(m, B, T < drafts.ahead ? retrofit_min(drafts.ahead, capacity) : T, 0, RETROFIT_KEEP_NOTHING, &cache));
}

static row read_row(const retrofit_tokenizer *t, retrofit_json *line, const char *where, size_t context, size_t number) {
    const retrofit_json *prompt = retrofit_json_get(line, "prompt"), *id = retrofit_json_get(line, "id");
    const retrofit_json *messages = o.chat ? retrofit_json_get(line, "messages") : NULL;
    if (!messages && (!prompt || prompt->type != RETROFIT_JSON_STRING))
        die(1, "%s: needs a string \"prompt\"%s", where, o.chat ? " or \"messages\"" : "");
    if (id && id->type != RETROFIT_JSON_STRING && id->type != RETROFIT_JSON_NUMBER)
        die(1, "%s: \"id\" is neither a string nor a number", where);
    size_t n;
    int32_t *ids = encode(t, where, messages, messages ? NULL : prompt->string, messages ? 0 : prompt->length, &n);
    row k = new_row(where, ids, n, 0, context, number);
    return k.line = line, k;
}

static int32_t *whole_text(const row *k) { // the ids of the prompt and of what is said
    int32_t *ids = (int32_t *)need(retrofit_allocate(k->count + k->produced, sizeof *ids));
    memcpy(ids, k->ids, k->count * sizeof *ids), memcpy(ids + k->count, k->said + 1, k->produced * sizeof *ids);
    return ids;
}

// ---- What each recurrence makes of each token ---------------------------------------------------------------------------------
typedef struct {
    double entropy, change; // nats; ‖s_i - s_{i-1}‖ / ‖s_i‖
    int32_t top[3];
    float p[3];
} glimpse;

static glimpse look(const float *logits, size_t V, double change) {
    glimpse g = {0, change, {-1, -1, -1}, {0, 0, 0}};
    double top = max_element(logits, V), sum = 0;
    for (size_t v = 0; v < V; v++) sum += exp(logits[v] - top);
    for (size_t v = 0; v < V; v++) {
        double p = exp(logits[v] - top) / sum;
        g.entropy -= p > 0 ? p * log(p) : 0;
        size_t place = 3;
        while (place && (g.top[place - 1] < 0 || p > g.p[place - 1])) place--;
        for (size_t i = 2; place < 3 && i > place; i--) g.top[i] = g.top[i - 1], g.p[i] = g.p[i - 1];
        if (place < 3) g.top[place] = (int32_t)v, g.p[place] = (float)p;
    }
    return g;
}

static char *token_text(const retrofit_tokenizer *t, int32_t id, size_t *size) {
    return (char *)need(retrofit_decode(t, &id, 1, false, size));
}

// So many columns of a token's text, on one line.
static void print_column(const retrofit_tokenizer *t, int32_t id, size_t columns) {
    size_t size, used = 0;
    uint32_t c;
    char *text = token_text(t, id, &size);
    for (size_t at = 0, n; at < size && used < columns; at += n, used++) {
        n = retrofit_utf8_next(text + at, size - at, &c);
        if (c < ' ' || c == 127) fputc(c == '\n' ? '$' : '.', stderr);
        else fprintf(stderr, "%.*s", (int)n, text + at);
    }
    fprintf(stderr, "%*s", (int)(columns - used), ""), free(text);
}

// One pass over prompt and text, without cache and exits: start states are functions of the position, so the states are those of decoding.
static void trace(const retrofit_model *m, const retrofit_tokenizer *t, const row *k, size_t r) {
    size_t T = k->count + k->produced, V = m->config.vocab, known = retrofit_min(V, retrofit_tokenizer_size(t)), d = m->config.n_embd, size;
    enum { ROWS = 64 };
    retrofit_buffers *a = (retrofit_buffers *)need(retrofit_buffers_new(m, 1, T, 0, RETROFIT_KEEP_NOTHING, NULL));
    retrofit_recurrence_options how = thinking(m, r);
    int32_t *ids = whole_text(k);
    float *logits = (float *)need(retrofit_allocate(ROWS * V, sizeof *logits)), *states = (float *)need(retrofit_allocate(2 * T * d, sizeof *states));
    glimpse *seen = (glimpse *)need(retrofit_allocate(T * r, sizeof *seen)); // (T,r)
    if (!retrofit_prelude(a, ids, 1, T)) die(1, "%s", retrofit_error());
    retrofit_init_state(a, sigma(m), o.seed), m->ops->download(states, a->state, T * d * sizeof *states);
    for (size_t i = 0; i < r; i++) {
        float *before = states + i % 2 * T * d, *now = states + (i + 1) % 2 * T * d;
        retrofit_recur_noisy(a, &how, 1), m->ops->download(now, a->state, T * d * sizeof *states), retrofit_coda(a);
        for (size_t at = 0; at < T; at++) {
            if (at % ROWS == 0) retrofit_logits(a, at, retrofit_min(ROWS, T - at), logits);
            seen[at * r + i] = look(logits + at % ROWS * V, known, retrofit_relative_change(now + at * d, before + at * d, d));
        }
    }
    FILE *f = fopen(o.trace, "wb");
    if (!f) die(1, "%s: %s", o.trace, strerror(errno));
    fprintf(
        stderr,
        "how much each recurrence changes a token's state:  █ as much as it is  ▓ 30 %%  ▒ 10 %%  ░ 3 %%  · less\n%-16s  %-*s  entropy  next, since r\n",
        "token", r < 11 ? 11 : (int)r, "r from 1 on");
    for (size_t at = 0; at < T; at++) {
        const glimpse *g = seen + at * r;
        size_t since = r;
        char *text = token_text(t, ids[at], &size);
        fprintf(f, "{\"position\":%zu,\"token\":%d,\"text\":", at, (int)ids[at]), retrofit_json_write_string(f, text, size),
            fputs(",\"recurrences\":[", f), free(text);
        for (size_t i = 0; i < r; i++) {
            fprintf(f, "%s{\"r\":%zu,\"entropy\":%.6g,\"change\":%.6g,\"top\":[", i ? "," : "", i + 1, g[i].entropy, g[i].change);
            for (size_t j = 0; j < 3 && g[i].top[j] >= 0; j++) {
                text = token_text(t, g[i].top[j], &size);
                fprintf(f, "%s{\"token\":%d,\"text\":", j ? "," : "", (int)g[i].top[j]), retrofit_json_write_string(f, text, size),
                    fprintf(f, ",\"p\":%.6g}", (double)g[i].p[j]), free(text);
            }
            fputs("]}", f);
        }
        fputs("]}\n", f);
        while (since > 1 && g[since - 2].top[0] == g[r - 1].top[0]) since--;
        print_column(t, ids[at], 16), fputs("  ", stderr);
        for (size_t i = 0; i < r; i++)
            fputs(g[i].change >= 1 ? "█" : g[i].change >= 0.3 ? "▓" : g[i].change >= 0.1 ? "▒" : g[i].change >= 0.03 ? "░" : "·", stderr);
        fprintf(stderr, "%*s  %7.3f  ", r < 11 ? (int)(11 - r) : 0, "", g[r - 1].entropy), print_column(t, g[r - 1].top[0], 16),
            fprintf(stderr, "  %zu\n", since);
    }
    if (!retrofit_finish_file(f, o.trace, true)) die(1, "%s", retrofit_error());
    free(ids), free(logits), free(states), free(seen), retrofit_buffers_free(a);
}

// How many recurrences tokens took, and how many of them plain decoding at full depth would have chosen too, each read behind the same text.
static struct { size_t *of, tokens, sum, most, greedy, same; } depths; // of: [most + 1] tokens by recurrences

static void note_depths(const retrofit_model *m, const retrofit_tokenizer *t, const row *k, size_t r) {
    if (!depths.of) depths.of = (size_t *)need(retrofit_allocate(r + 1, sizeof *depths.of)), depths.most = r;
    for (size_t i = 0; i < k->produced; i++) depths.of[k->recurrences[i]]++, depths.tokens++, depths.sum += k->recurrences[i];
    size_t T = k->count + k->produced - 1;
    if (o.temperature > 0 || !k->produced || o.continuous) return;
    retrofit_buffers *a = (retrofit_buffers *)need(retrofit_buffers_new(m, 1, T, 0, RETROFIT_KEEP_NOTHING, NULL));
    int32_t *ids = whole_text(k);
    float *logits = (float *)need(retrofit_allocate(m->config.vocab, sizeof *logits));
    if (!retrofit_forward(a, ids, 1, T, sigma(m), o.seed, r, 0)) die(1, "%s", retrofit_error());
    for (size_t i = 0; i < k->produced; i++)
        retrofit_logits(a, k->count - 1 + i, 1, logits), depths.greedy++,
            depths.same += retrofit_argmax(logits, retrofit_tokenizer_size(t)) == k->said[i + 1];
    free(ids), free(logits), retrofit_buffers_free(a);
}

static void print_depths(void) {
    fprintf(stderr,
            "recurrences per token: %.2f on average of at most %zu:", depths.tokens ? (double)depths.sum / (double)depths.tokens : 0,
            depths.most);
    for (size_t i = 1; i <= depths.most; i++)
        if (depths.of[i]) fprintf(stderr, "  %zu: %zu", i, depths.of[i]);
    if (depths.greedy) fprintf(stderr, "; %zu of %zu tokens are those of full depth", depths.same, depths.greedy);
    fputc('\n', stderr), free(depths.of);
}

static void answer(const retrofit_model *m, const retrofit_tokenizer *t) {
    size_t n, r[2], count = 0, produced = 0, tokens = 0, B;
    row *rows = NULL;
    retrofit_json *line;
    if (recurrences(m, r, 2, NULL) != 1) die(2, "--recurrences: one number for generation");
    if (o.batch) {
        lines l = open_lines(o.batch);
        for (; (line = next_line(&l)); count++)
            rows = (row *)more(rows, count, sizeof *rows), rows[count] = read_row(t, line, l.where, m->config.context, count);
        close_lines(&l);
        if (count == 0) die(1, "%s: no prompts in it", o.batch);
    } else {
        int32_t *ids = prompt_ids(t, &n);
        rows = (row *)more(NULL, 0, sizeof *rows), rows[count++] = new_row("", ids, n, 0, m->config.context, 0);
    }
    B = retrofit_min(o.batch_size, count);
    retrofit_buffers *a = room_for(m, rows, count, B, r[0]);
    double began = progress("prompts", 0, count), seconds[2] = {0};
    for (size_t at = 0, b; at < count; at += b) {
        b = retrofit_min(B, count - at), retrofit_clear_cache(a);
        generate(a, t, rows + at, b, r[0], !o.batch && !o.json);
        for (row *k = rows + at; k < rows + at + b; k++) {
            if (o.batch || o.json) print_row(k, 0);
            else putchar('\n');
            tokens += k->count, produced += k->produced, seconds[0] = k->seconds[0], seconds[1] = k->seconds[1];
            if (o.exit) note_depths(m, t, k, r[0]);
            if (o.trace) fflush(stdout), trace(m, t, k, r[0]);
            free_row(k);
        }
        fflush(stdout), progress("prompts", at + b, count);
    }
    if (o.batch) {
        double all = retrofit_seconds() - began;
        fprintf(stderr, "%zu prompts, %zu tokens, and %zu more in %.2f s (%.1f tok/s)", count, tokens, produced, all,
                (double)produced / all);
    } else
        fprintf(stderr, "prompt %zu tokens %.2f s, %zu tokens %.2f s (%.1f tok/s)", tokens, seconds[0], produced, seconds[1],
                produced > 1 ? (double)(produced - 1) / seconds[1] : 0);
    if (r[0]) fprintf(stderr, o.exit ? ", at most %zu recurrences" : ", %zu recurrences", r[0]);
    fprintf(stderr, ", KV cache %.1f KiB per token, on %s\n", (double)retrofit_cache_bytes(a) / 1024, device);
    if (o.exit) print_depths();
    if (drafts.rounds)
        fprintf(stderr, "drafts at %zu recurrences: %.2f of %.2f tokens a round; %.2f times as fast as without\n", drafts.depth,
                (double)drafts.kept / (double)drafts.rounds, (double)drafts.drafted / (double)drafts.rounds,
                drafts.plain * (double)drafts.kept / drafts.seconds);
    free(rows), retrofit_buffers_free(a);
}

// A conversation: the cache keeps what has been said, only what is new is fed.
static void converse(const retrofit_model *m, const retrofit_tokenizer *t) {
    size_t r[2], capacity = o.seq_len ? o.seq_len : retrofit_min(4096, m->config.context), total = 0, turns = 0, room = 0;
    if (recurrences(m, r, 2, NULL) != 1) die(2, "--recurrences: one number for generation");
    if (capacity > m->config.context) die(2, "--seq-len %zu is more than the model's context of %zu", capacity, m->config.context);
    retrofit_kv_cache cache = kv_cache(capacity, r[0]);
    retrofit_buffers *a =
        (retrofit_buffers *)need(retrofit_buffers_new(m, 1, retrofit_min(capacity, CHUNK), 0, RETROFIT_KEEP_NOTHING, &cache));
    row k = {.ids = NULL};
    char *line = NULL;
    bool asks = isatty(0);
    for (ssize_t n;;) {
        if (asks) fputs("> ", stderr);
        if ((n = getline(&line, &room, stdin)) <= 0) break;
        if (line[n - 1] == '\n' && --n == 0) continue;
        retrofit_text x = {NULL, 0, 0, false};
        if (total) put(&x, families[family].end), put(&x, families[family].after);
        else put_system(&x, o.system, o.system ? strlen(o.system) : 0);
        put_turn(&x, "user", line, (size_t)n), put_turn(&x, "assistant", NULL, 0);
        if (x.failed) die(1, "%s", retrofit_error());
        // It begins with a special token, at which the tokenizer cuts: the ids are those of the whole conversation's text.
        size_t count, past = (size_t)a->decoder->seen[0], late = total > past; // the last token said may not have been fed
        int32_t *ids = (int32_t *)need(retrofit_encode(t, x.bytes, x.size, !total, &count));
        if (total + count >= capacity)
            die(1, "the conversation would have %zu tokens, there is room for %zu: begin a new one", total + count, capacity);
        ids = (int32_t *)need(realloc(ids, (count + late) * sizeof *ids));
        memmove(ids + late, ids, count * sizeof *ids);
        if (late) ids[0] = k.said[k.produced];
        free(x.bytes), free_row(&k);
        k = new_row("", ids, late + count, past, capacity, turns++);
        generate(a, t, &k, 1, r[0], !o.json);
        if (o.json) print_row(&k, past);
        else putchar('\n');
        fflush(stdout);
        total = past + k.count + k.produced;
    }
    if (ferror(stdin)) die(1, "reading stdin failed: %s", strerror(errno));
    free(line), free_row(&k), retrofit_buffers_free(a);
}

// ---- Loss by recurrences ------------------------------------------------------------------------------------------------------
static retrofit_data *open_rows(const retrofit_model *m, size_t *T, size_t *rows) { // of --eval: tokens in a row, rows to judge by
    *T = o.seq_len ? o.seq_len : retrofit_min(1024, m->config.context);
    if (*T > m->config.context) die(2, "--seq-len %zu is more than the model's context of %zu", *T, m->config.context);
    retrofit_data *data = (retrofit_data *)need(retrofit_data_open(o.eval, *T, m->config.vocab, false, 0));
    return *rows = o.rows ? retrofit_min(o.rows, retrofit_data_rows(data)) : retrofit_data_rows(data), data;
}

// Token by token through the KV cache, with the exits and policies that it is to be judged with, beside the full pass on the same rows.
static void evaluate_decoding(const retrofit_model *m) {
    size_t r[64], count = recurrences(m, r, 64, "1,2,4,8,16,32"), V = m->config.vocab, T, rows;
    retrofit_data *data = open_rows(m, &T, &rows);
    bool alone = o.exit && kv_cache(T, 1).kind != RETROFIT_CACHE_FULL; // slots that are written twice: one row at a time
    size_t B = alone ? 1 : retrofit_min(rows, o.batch_size);
    retrofit_buffers *whole = (retrofit_buffers *)need(retrofit_buffers_new(m, 1, T, 0, RETROFIT_KEEP_NOTHING, NULL));
    int32_t *tokens = (int32_t *)need(retrofit_allocate(B * T, sizeof *tokens)), *labels = (int32_t *)need(retrofit_allocate(B * T, sizeof *labels));
    int32_t *next = (int32_t *)need(retrofit_allocate(B, sizeof *next));
    printf("%11s %10s %12s %12s %12s %14s %9s   (%zu rows of %zu tokens)\n", "recurrences", "loss", "perplexity", "by full pass",
           "recurrences", "KV bytes/token", "seconds", rows, T);
    progress("rows", 0, count * rows);
    for (size_t i = 0; i < count; i++) {
        retrofit_kv_cache cache = kv_cache(T, r[i]);
        retrofit_buffers *a = (retrofit_buffers *)need(retrofit_buffers_new(m, B, 1, 0, RETROFIT_KEEP_NOTHING, &cache));
        retrofit_recurrence_options how = thinking(m, r[i]);
        double loss = 0, full = 0, used = 0, begin = retrofit_seconds(), apart = 0;
        for (size_t at = 0, b; at < rows; at += b) {
            b = retrofit_min(B, rows - at), retrofit_clear_cache(a);
            for (size_t j = 0; j < b; j++)
                if (!retrofit_data_row(data, at + j, tokens + j * T, labels + j * T)) die(1, "%s", retrofit_error());
            for (size_t p = 0; p < T; p++) {
                for (size_t j = 0; j < b; j++) next[j] = tokens[j * T + p];
                const float *logits = (const float *)need((void *)retrofit_next_logits(a, next, b, 1, NULL, &how));
                for (size_t j = 0; j < b; j++) {
                    float l;
                    retrofit_cpu.cross_entropy(&l, (act *)(logits + j * V), &labels[j * T + p], 1, V, 0);
                    loss += l, used += a->decoder->used[j];
                }
            }
            double before = retrofit_seconds();
            for (size_t j = 0; j < b; j++) {
                if (!retrofit_forward(whole, tokens + j * T, 1, T, how.sigma, how.seed, r[i], 0)) die(1, "%s", retrofit_error());
                full += retrofit_loss(whole, labels + j * T, 0) * (double)T;
            }
            apart += retrofit_seconds() - before;
            progress("rows", i * rows + at + b, count * rows);
        }
        double n = (double)(rows * T);
        printf("%11zu %10.4f %12.3f %12.4f %12.2f %14zu %9.2f\n", r[i], loss / n, exp(loss / n), full / n, used / n,
               retrofit_cache_bytes(a), retrofit_seconds() - begin - apart);
        fflush(stdout), retrofit_buffers_free(a);
    }
    free(tokens), free(labels), free(next), retrofit_buffers_free(whole), retrofit_data_close(data);
}

// One way of states, read off at each r.
static void evaluate(const retrofit_model *m) {
    size_t r[64], count = recurrences(m, r, 64, "1,2,4,8,16,32"), T, rows;
    retrofit_data *data = open_rows(m, &T, &rows);
    size_t B = retrofit_min(rows, 1 + 1024 / T);
    retrofit_buffers *a = (retrofit_buffers *)need(retrofit_buffers_new(m, B, T, 0, RETROFIT_KEEP_NOTHING, NULL));
    int32_t *tokens = (int32_t *)need(malloc(B * T * sizeof *tokens)), *labels = (int32_t *)need(malloc(B * T * sizeof *labels));
    double loss[64] = {0}, seconds[64] = {0};
    retrofit_recurrence_options how = thinking(m, r[count - 1]);
    progress("rows", 0, rows);
    for (size_t at = 0; at < rows; at += B) {
        size_t b = retrofit_min(B, rows - at);
        for (size_t i = 0; i < b; i++)
            if (!retrofit_data_row(data, at + i, tokens + i * T, labels + i * T)) die(1, "%s", retrofit_error());
        double begin = retrofit_seconds(), coda = 0;
        if (!retrofit_prelude(a, tokens, b, T)) die(1, "%s", retrofit_error());
        if (r[0]) retrofit_init_state(a, sigma(m), retrofit_hash(o.seed, at));
        for (size_t i = 0; i < count; i++) {
            retrofit_recur_noisy(a, &how, r[i] - (i ? r[i - 1] : 0));
            double before = retrofit_seconds();
            retrofit_coda(a);
            loss[i] += retrofit_loss(a, labels, 0) * (double)b;
            seconds[i] += retrofit_seconds() - begin - coda; // what a pass at this r alone costs
            coda += retrofit_seconds() - before;
        }
        progress("rows", at + b, rows);
    }
    printf("%11s %10s %12s %9s   (%zu rows of %zu tokens)\n", "recurrences", "loss", "perplexity", "seconds", rows, T);
    for (size_t i = 0; i < count; i++) printf("%11zu %10.4f %12.3f %9.2f\n", r[i], loss[i] / (double)rows, exp(loss[i] / (double)rows), seconds[i]);
    free(tokens), free(labels), retrofit_buffers_free(a), retrofit_data_close(data);
}

// ---- Tasks: one a line, all of one kind -------------------------------------------------------------------------------------------
//   {"prompt", "answer"[, "hops"]}       does greedy decoding give the answer exactly?
//   {"prompt", "choices", "answer": 1}   is this choice the likeliest of all, as it is (acc) and per byte (acc_norm)?
//   {"prompt", "target"}                 does generated text have the target where --answer-regex says?
enum { EXACT, CHOICE, TARGET };

typedef struct { // a prompt and what may follow it
    int32_t *ids;
    size_t count, prompt, bytes; // prompt: ids before the first of what follows; bytes of that, without a space between the two
} continuation;

typedef struct {
    size_t first, choices, answer, hops; // among the continuations; hops: a group of the table, 0 if the line names none
} task;

static struct {
    int kind;
    size_t count, continuations, of[16], most; // tasks of so many hops; the most hops
    task *task;
    continuation *continuation;
    row *row; // of tasks with a target
} tasks;

typedef struct {
    double loss;
    size_t right, per_byte, hops[16];
} score;

static continuation read_continuation(const retrofit_tokenizer *t, const char *where, const retrofit_json *p, const retrofit_json *answer,
                                      size_t context) {
    continuation k = {NULL, 0, 0, answer->length - (answer->string[0] == ' ')};
    size_t count;
    char *text = (char *)need(retrofit_allocate(p->length + answer->length, 1));
    memcpy(text, p->string, p->length), memcpy(text + p->length, answer->string, answer->length);
    int32_t *alone = (int32_t *)need(retrofit_encode(t, text, p->length, true, &count));
    k.ids = (int32_t *)need(retrofit_encode(t, text, p->length + answer->length, true, &k.count));
    while (k.prompt < count && k.prompt < k.count && k.ids[k.prompt] == alone[k.prompt]) k.prompt++; // the answer may begin inside a token
    if (k.prompt == 0 || k.prompt == k.count) die(1, "%s: no token of the answer follows one of the prompt", where);
    if (k.count > context) die(1, "%s: a task of %zu tokens, the model's context is %zu", where, k.count, context);
    return free(text), free(alone), k;
}

static bool filled(const retrofit_json *j) { return j && j->type == RETROFIT_JSON_STRING && j->length > 0; }

// Takes the line.
static void read_task(const retrofit_tokenizer *t, retrofit_json *line, const char *where, size_t context) {
    const retrofit_json *p = retrofit_json_get(line, "prompt"), *answer = retrofit_json_get(line, "answer"),
                        *choices = retrofit_json_get(line, "choices");
    const retrofit_json *hops = retrofit_json_get(line, "hops");
    int kind = choices ? CHOICE : retrofit_json_get(line, "target") ? TARGET : EXACT;
    task k = {tasks.continuations, 1, 0, 0};
    if (tasks.count && kind != tasks.kind) die(1, "%s: another kind of task than in the lines before: a file has one", where);
    tasks.kind = kind;
    if (kind == TARGET) {
        if (!filled(retrofit_json_get(line, "target"))) die(1, "%s: \"target\" is no string, or empty", where);
        tasks.row = (row *)more(tasks.row, tasks.count, sizeof *tasks.row);
        tasks.row[tasks.count] = read_row(t, line, where, context, tasks.count), tasks.count++;
        return;
    }
    if (!p || p->type != RETROFIT_JSON_STRING || (kind == EXACT && !filled(answer)))
        die(1, "%s: needs a string \"prompt\" and a string \"answer\" that is not empty, \"choices\" or a \"target\"", where);
    if (kind == CHOICE) {
        k.choices = choices->type == RETROFIT_JSON_ARRAY ? choices->count : 0;
        if (k.choices < 2 || !retrofit_json_size(answer, &k.answer) || k.answer >= k.choices)
            die(1, "%s: needs at least two \"choices\", and in \"answer\" which of them, from 0, is right", where);
    }
    if (hops && (!retrofit_json_size(hops, &k.hops) || k.hops > 15)) die(1, "%s: \"hops\" is not a number from 0 to 15", where);
    for (const retrofit_json *c = kind == CHOICE ? choices->child : answer; c; c = kind == CHOICE ? c->next : NULL) {
        if (!filled(c) || (kind == CHOICE && c->length == 1 && *c->string == ' ')) die(1, "%s: a choice is no string, or empty", where);
        tasks.continuation = (continuation *)more(tasks.continuation, tasks.continuations, sizeof *tasks.continuation);
        tasks.continuation[tasks.continuations++] = read_continuation(t, where, p, c, context);
    }
    tasks.task = (task *)more(tasks.task, tasks.count, sizeof *tasks.task);
    tasks.task[tasks.count++] = k, tasks.of[k.hops]++;
    if (k.hops > tasks.most) tasks.most = k.hops;
    retrofit_json_free(line);
}

// Greedy decoding gives an answer exactly when the likeliest token is the answer's at every place, each read behind the answer so far: one
// pass over prompt and answer decides it, and for every r at once. So it does for the likelihoods of choices.
static void score_continuations(const retrofit_model *m, const size_t *r, size_t depths, score *scores) {
    size_t n = tasks.continuations, T = 0, V = m->config.vocab;
    for (size_t i = 0; i < n; i++) T = tasks.continuation[i].count > T ? tasks.continuation[i].count : T;
    size_t B = retrofit_min(n, 1 + 4096 / T);
    retrofit_buffers *a = (retrofit_buffers *)need(retrofit_buffers_new(m, B, T, 0, RETROFIT_KEEP_NOTHING, NULL));
    int32_t *tokens = (int32_t *)need(retrofit_allocate(B * T, sizeof *tokens));
    float *logits = (float *)need(retrofit_allocate(T * V, sizeof *logits)), loss;
    double *losses = (double *)need(retrofit_allocate(n * depths, sizeof *losses)); // (depths,n) sums over the tokens behind the prompt
    bool *exact = (bool *)need(retrofit_allocate(n * depths, sizeof *exact));
    retrofit_recurrence_options how = thinking(m, r[depths - 1]);
    progress("texts", 0, n);
    for (size_t at = 0, b; at < n; at += b) {
        const continuation *all = tasks.continuation + at;
        size_t columns = 0;
        b = retrofit_min(B, n - at);
        for (size_t i = 0; i < b; i++) columns = all[i].count > columns ? all[i].count : columns;
        memset(tokens, 0, B * T * sizeof *tokens); // padding on the right: no earlier token sees it
        for (size_t i = 0; i < b; i++) memcpy(tokens + i * columns, all[i].ids, all[i].count * sizeof *tokens);
        if (!retrofit_prelude(a, tokens, b, columns)) die(1, "%s", retrofit_error());
        if (r[0]) retrofit_init_state(a, sigma(m), o.seed);
        for (size_t j = 0; j < depths; j++) {
            retrofit_recur_noisy(a, &how, r[j] - (j ? r[j - 1] : 0));
            retrofit_coda(a);
            for (size_t i = 0; i < b; i++) {
                const continuation *k = &all[i];
                size_t count = k->count - k->prompt, to = j * n + at + i;
                retrofit_logits(a, i * columns + k->prompt - 1, count, logits);
                exact[to] = true;
                for (size_t p = 0; p < count; p++) {
                    exact[to] = exact[to] && retrofit_argmax(logits + p * V, V) == k->ids[k->prompt + p];
                    retrofit_cpu.cross_entropy(&loss, logits + p * V, &k->ids[k->prompt + p], 1, V, 0), losses[to] += loss;
                }
            }
        }
        progress("texts", at + b, n);
    }
    for (size_t j = 0; j < depths; j++)
        for (const task *k = tasks.task; k < tasks.task + tasks.count; k++) {
            const continuation *c = tasks.continuation + k->first;
            const double *l = losses + j * n + k->first;
            size_t best = 0, best_per_byte = 0;
            for (size_t i = 1; i < k->choices; i++) { // the first of equals
                if (l[i] < l[best]) best = i;
                if (l[i] / (double)c[i].bytes < l[best_per_byte] / (double)c[best_per_byte].bytes) best_per_byte = i;
            }
            bool right = tasks.kind == CHOICE ? best == k->answer : exact[j * n + k->first];
            scores[j].right += right, scores[j].hops[k->hops] += right, scores[j].per_byte += best_per_byte == k->answer;
            scores[j].loss += l[k->answer] / (double)(c[k->answer].count - c[k->answer].prompt) / (double)tasks.count;
        }
    free(tokens), free(logits), free(losses), free(exact), retrofit_buffers_free(a);
}

// As GSM8K's answers are compared: without commas, and without a dot at the end.
static char *bare(const char *s, size_t n) {
    char *to = (char *)need(retrofit_allocate(n + 1, 1)), *end = to;
    for (size_t i = 0; i < n; i++)
        if (s[i] != ',') *end++ = s[i];
    if (end > to && end[-1] == '.') end[-1] = 0;
    return to;
}

// Whether the last match's group 1 is the target. (A NUL ends the text here, should one have been generated.)
static bool found(const regex_t *e, const char *text, const retrofit_json *target) {
    char *said = NULL, *wanted = bare(target->string, target->length);
    regmatch_t g[2];
    for (const char *p = text; !regexec(e, p, 2, g, p > text ? REG_NOTBOL : 0); p += g[0].rm_eo + (g[0].rm_eo == g[0].rm_so)) {
        if (g[1].rm_so >= 0) free(said), said = bare(p + g[1].rm_so, (size_t)(g[1].rm_eo - g[1].rm_so));
        if (!p[g[0].rm_eo]) break;
    }
    bool right = said && !strcmp(said, wanted);
    return free(said), free(wanted), right;
}

static void score_targets(const retrofit_model *m, const retrofit_tokenizer *t, const size_t *r, size_t depths, score *scores,
                          const regex_t *e) {
    size_t B = retrofit_min(o.batch_size, tasks.count);
    retrofit_buffers *a = room_for(m, tasks.row, tasks.count, B, r[depths - 1]);
    progress("answers", 0, depths * tasks.count);
    for (size_t j = 0; j < depths; j++)
        for (size_t at = 0, b; at < tasks.count; at += b) {
            b = retrofit_min(B, tasks.count - at), retrofit_clear_cache(a);
            generate(a, t, tasks.row + at, b, r[j], false);
            for (row *k = tasks.row + at; k < tasks.row + at + b; k++)
                scores[j].right += k->text.bytes && found(e, k->text.bytes, retrofit_json_get(k->line, "target")), forget(k);
            progress("answers", j * tasks.count + at + b, depths * tasks.count);
        }
    retrofit_buffers_free(a);
}

static double share(size_t right, double *error) { // of all tasks, with its standard error
    double p = (double)right / (double)tasks.count;
    return *error = sqrt(p * (1 - p) / (double)tasks.count), p;
}

static void print_table(const size_t *r, size_t depths, const score *scores) {
    double p, error, per_byte;
    printf(tasks.kind == TARGET ? "%11s %16s" : "%11s %7s %16s", "recurrences", tasks.kind == TARGET ? "accuracy" : "loss", "accuracy");
    if (tasks.kind == CHOICE) printf(" %14s", "acc_norm");
    for (size_t h = 0; tasks.most && h <= tasks.most; h++) printf(h ? " %4zu" : "   hops %zu", h);
    printf("\n");
    for (size_t j = 0; j < depths; j++) {
        const score *s = &scores[j];
        printf("%11zu", r[j]);
        if (tasks.kind != TARGET) printf(" %7.4f", s->loss);
        p = share(s->right, &error), printf("  %.3f ± %.3f", p, error);
        if (tasks.kind == CHOICE) per_byte = share(s->per_byte, &error), printf("  %.3f ± %.3f", per_byte, error);
        printf("  ");
        for (size_t h = 0; tasks.most && h <= tasks.most; h++)
            printf(tasks.of[h] ? h ? " %4.2f" : "   %4.2f" : "    -", (double)s->hops[h] / (double)tasks.of[h]);
        printf("  ");
        for (int bar = 0; bar < (int)(p * 30 + 0.5); bar++) printf("█");
        printf("\n");
    }
}

static void print_scores(const size_t *r, size_t depths, const score *scores) {
    double p, error;
    printf("{\"tasks\":"), retrofit_json_write_string(stdout, o.tasks, strlen(o.tasks)), printf(",\"count\":%zu,\"results\":[", tasks.count);
    for (size_t j = 0; j < depths; j++) {
        const score *s = &scores[j];
        printf("%s{\"recurrences\":%zu", j ? "," : "", r[j]);
        if (tasks.kind != TARGET) printf(",\"loss\":"), print_number(s->loss);
        p = share(s->right, &error), printf(",\"acc\":%.7g,\"acc_stderr\":%.7g", p, error);
        if (tasks.kind == CHOICE) p = share(s->per_byte, &error), printf(",\"acc_norm\":%.7g,\"acc_norm_stderr\":%.7g", p, error);
        for (size_t h = 0; tasks.most && h <= tasks.most; h++)
            printf(h ? "," : ",\"hops\":["), print_number((double)s->hops[h] / (double)tasks.of[h]);
        printf(tasks.most ? "]}" : "}");
    }
    printf("]}\n");
}

static void solve(const retrofit_model *m, const retrofit_tokenizer *t) {
    size_t r[64], depths = recurrences(m, r, 64, "1,2,4,8,16");
    score scores[64] = {{0, 0, 0, {0}}};
    regex_t e;
    int bad = o.answer_regex ? regcomp(&e, o.answer_regex, REG_EXTENDED) : 0;
    char why[256];
    if (bad) regerror(bad, &e, why, sizeof why), die(2, "--answer-regex: %s", why);
    if (o.answer_regex && e.re_nsub < 1) die(2, "--answer-regex: put what is the answer into parentheses");
    lines l = open_lines(o.tasks);
    for (retrofit_json *line; (!o.rows || tasks.count < o.rows) && (line = next_line(&l));) read_task(t, line, l.where, m->config.context);
    close_lines(&l);
    if (tasks.count == 0) die(1, "%s: no tasks in it", o.tasks);
    if ((tasks.kind == TARGET) != (o.answer_regex != NULL))
        die(2, tasks.kind == TARGET ? "%s: a \"target\" is looked for with --answer-regex" : "%s: --answer-regex goes with a \"target\"",
            o.tasks);
    if (o.chat && tasks.kind != TARGET) die(2, "%s: --chat goes with a \"target\", not with these tasks", o.tasks);
    if (tasks.kind == TARGET) score_targets(m, t, r, depths, scores, &e), regfree(&e);
    else score_continuations(m, r, depths, scores);
    (o.json ? print_scores : print_table)(r, depths, scores);
    for (size_t i = 0; i < tasks.continuations; i++) free(tasks.continuation[i].ids);
    for (size_t i = 0; tasks.kind == TARGET && i < tasks.count; i++) free_row(&tasks.row[i]);
    free(tasks.task), free(tasks.continuation), free(tasks.row);
}

// ---- Logits of a sequence -----------------------------------------------------------------------------------------------------
static void write_logits(const retrofit_model *m, const retrofit_tokenizer *t) {
    size_t n = 0, r[2], V = m->config.vocab;
    int32_t *ids;
    if (recurrences(m, r, 2, NULL) != 1) die(2, "--recurrences: one number for --logits");
    if (o.tokens) {
        ids = (int32_t *)need(malloc(strlen(o.tokens) * sizeof *ids));
        for (const char *p = o.tokens;; p++) {
            char *end;
            unsigned long id = strtoul(p, &end, 10);
            if (*p < '0' || *p > '9' || id > INT32_MAX) die(2, "--tokens: '%s' is not a list of token ids like 1,2,3", p);
            ids[n++] = (int32_t)id;
            if (*(p = end) == 0) break;
            if (*p != ',') die(2, "--tokens: '%s' is not a list of token ids like 1,2,3", p);
        }
    } else ids = prompt_ids(t, &n);
    if (n == 0) die(2, "--logits: the prompt is empty");
    retrofit_buffers *a = (retrofit_buffers *)need(retrofit_buffers_new(m, 1, n, 0, RETROFIT_KEEP_NOTHING, NULL));
    float *logits = (float *)need(retrofit_allocate(n * V, sizeof *logits));
    if (!retrofit_forward(a, ids, 1, n, sigma(m), o.seed, r[0], 0)) die(1, "%s", retrofit_error());
    retrofit_logits(a, 0, n, logits);
    retrofit_tensor out = {"logits", RETROFIT_F32, 2, {n, V, 0, 0}, n * V, logits};
    if (!retrofit_safetensors_write(o.logits, &retrofit_cpu, &out, 1, RETROFIT_F32, NULL)) die(1, "%s", retrofit_error());
    free(ids), free(logits), retrofit_buffers_free(a);
}

int main(int argc, char **argv) {
    int code = retrofit_options(argc, argv, options, sizeof options / sizeof *options,
                                "infer --model DIR --prompt TEXT|- [--recurrences R] [options]\n"
                                "infer --model DIR --batch FILE.jsonl [--recurrences R] [options]\n"
                                "infer --model DIR --chat --interactive [--recurrences R] [options]\n"
                                "infer --model DIR --eval FILE.bin | --tasks FILE.jsonl [--recurrences 1,2,4,8]\n"
                                "infer --tokenizer DIR --prompt TEXT --print-tokens\n", NULL, NULL);
    if (code >= 0) return code;
    int modes = !!o.batch + o.interactive + !!o.eval + !!o.tasks + !!o.logits + o.print_tokens;
    if (o.tokens && !o.logits) die(2, "--tokens goes with --logits");
    if (modes > 1) die(2, "one of --batch, --interactive, --eval, --tasks, --logits, --print-tokens at a time");
    if (!o.model && !(o.print_tokens && o.tokenizer)) die(2, "--model is needed (see --help)");
    if ((o.system || o.interactive) && !o.chat) die(2, "%s goes with --chat", o.system ? "--system" : "--interactive");
    if (o.interactive && o.max_tokens == 0) die(2, "--interactive needs --max-tokens of at least 1");
    if (o.answer_regex && !o.tasks) die(2, "--answer-regex goes with --tasks");
    if (o.json && (o.eval || o.logits || o.print_tokens))
        die(2, "--json does not go with --%s", o.eval ? "eval" : o.logits ? "logits" : "print-tokens");
    if (o.chat && (o.eval || o.tokens)) die(2, "--chat does not go with %s", o.eval ? "--eval" : "--tokens");
    if (!o.prompt && !o.batch && !o.interactive && !o.eval && !o.tasks && !(o.logits && o.tokens))
        die(2, "--prompt is needed (see --help)");
    if (o.batch_size == 0) die(2, "--batch-size 0: at least one");
    if (o.prompt && (o.batch || o.interactive || o.eval || o.tasks))
        die(2, "--prompt does not go with --batch, --interactive, --eval or --tasks");
    if (o.exit_threshold != -1 && !o.exit) die(2, "--exit-threshold goes with --exit");
    if (o.noise < 0 || o.noise > 1e6) die(2, "--noise %g: at least 0", o.noise);
    if (o.trace && !o.prompt) die(2, "--trace goes with --prompt");
    if (o.speculative) read_drafts();
    if (o.exit || o.kv_cache || o.kv_bf16 || o.continuous) { // what is scored or written in one pass has no cache
        const char *what = o.exit ? "--exit" : o.kv_cache ? "--kv-cache" : o.kv_bf16 ? "--kv-bf16" : "--continuous";
        if (o.logits || (o.tasks && !o.answer_regex)) die(2, "%s does not go with --%s", what, o.logits ? "logits" : "tasks, but for a \"target\"");
    }
    kv_cache(1, 1); // says what is wrong with --kv-cache before a model is read
    if (o.temperature < 0 || o.top_p <= 0 || o.top_p > 1 || o.min_p < 0 || o.min_p > 1)
        die(2, "--temperature is at least 0, --top-p between 0 and 1, --min-p from 0 to 1");
    char path[RETROFIT_PATH];
    const char *directory = o.tokenizer ? o.tokenizer : retrofit_model_directory(o.model, path);
    retrofit_tokenizer *t = o.eval || o.tokens ? NULL : (retrofit_tokenizer *)need(retrofit_tokenizer_load(directory));
    const retrofit_ops *ops = o.print_tokens ? &retrofit_cpu : (const retrofit_ops *)need((void *)retrofit_device((retrofit_place)o.device, o.precision, device));
    retrofit_model *m = o.print_tokens ? NULL : (retrofit_model *)need(retrofit_load(o.model, ops, RETROFIT_INFERENCE));
    if (m && t && retrofit_tokenizer_size(t) > m->config.vocab)
        die(1, "the tokenizer of %s has ids up to %zu, the model's vocabulary %zu: another model's?", directory, retrofit_tokenizer_size(t) - 1, m->config.vocab);
    if (t) ends[0] = retrofit_tokenizer_eos(t) < 0 && m ? m->config.eos : retrofit_tokenizer_eos(t);
    const char *deep = o.exit ? "--exit" : o.kv_cache ? "--kv-cache" : o.continuous ? "--continuous" : o.noise > 0 ? "--noise" : NULL;
    if (!deep) deep = o.speculative ? "--speculative" : o.trace ? "--trace" : NULL;
    if (m && deep && retrofit_is_plain(&m->config))
        die(2, "%s: %s is a plain Llama, it has no recurrence: make it recurrent with convert", deep, o.model);
    if (o.stop) read_stops();
    if (o.chat) find_family(t, directory);
    if (o.eval) (o.kv_cache || o.kv_bf16 || o.exit || o.continuous ? evaluate_decoding : evaluate)(m);
    else if (o.tasks) solve(m, t);
    else if (o.interactive) converse(m, t);
    else if (o.logits) write_logits(m, t);
    else if (o.print_tokens) {
        size_t n;
        int32_t *ids = prompt_ids(t, &n);
        for (size_t i = 0; i < n; i++) printf(i ? " %d" : "%d", (int)ids[i]);
        printf("\n");
        free(ids);
    } else answer(m, t);
    retrofit_tokenizer_free(t), retrofit_free(m), free(stops[0]), free(chat_template);
    if (fflush(stdout) || ferror(stdout)) die(1, "writing to stdout failed: %s", strerror(errno));
    return 0;
}

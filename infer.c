// infer: text from a model at any number of recurrences, and what that number is worth: loss and
// accuracy by recurrences.
// In order: command line; recurrences and KV cache; chats; reading prompts; sequences and
// stop strings; generation; --exit; --trace; then the modes: a prompt, many, a conversation, loss,
// tasks, logits, token ids; and which options go together.
#define RETROFIT_IMPLEMENTATION
#include "retrofit.h"
#include <ctype.h>
#include <regex.h>

// ---- Command line ------------------------------------------------------------------------------

enum { NOT_GIVEN = -1 }; // a choice that the command line leaves open

static struct {
    const char *model, *prompt, *batch, *system, *recurrences, *stop, *eval, *tasks, *answer_regex;
    const char *tokens, *logits, *tokenizer, *kv_cache, *speculative, *trace;
    size_t batch_size, max_tokens, top_k, seed, seq_len, rows;
    double temperature, top_p, min_p, exit_threshold, noise;
    int state_init, device, precision, exit, noise_kind;
    bool chat, interactive, json, print_tokens, kv_bf16, continuous;
} options = {.batch_size = 8, .max_tokens = 128, .seed = 1, .top_p = 1, .exit_threshold = NAN,
             .state_init = NOT_GIVEN, .precision = NOT_GIVEN, .noise_kind = NOT_GIVEN,
             .temperature = NAN};

static const retrofit_option option_table[] = {
    {"Generate: text on stdout, all else on stderr", RETROFIT_HEADING, NULL, NULL, NULL},
    {"model", RETROFIT_STRING, &options.model, "DIR",
     "recurrent or plain; a run's --out means its latest checkpoint"},
    {"prompt", RETROFIT_STRING, &options.prompt, "TEXT|-",
     "what to continue; - reads it from stdin"},
    {"batch", RETROFIT_STRING, &options.batch, "FILE.jsonl",
     "many: {prompt[, id]} a line, with --chat also {messages}; a line of JSON for each"},
    {"batch-size", RETROFIT_SIZE, &options.batch_size, "N", "so many at a time (8)"},
    {"chat", RETROFIT_FLAG, &options.chat, NULL,
     "the prompt is what a user says: in the model's own chat template"},
    {"system", RETROFIT_STRING, &options.system, "TEXT",
     "what the model is told before it (what the template says by default)"},
    {"interactive", RETROFIT_FLAG, &options.interactive, NULL,
     "a conversation: each line of stdin is a turn; with --chat"},
    {"recurrences", RETROFIT_STRING, &options.recurrences, "R",
     "how deep to think (the model's mean); a list for --eval, --tasks"},
    {"max-tokens", RETROFIT_SIZE, &options.max_tokens, "N",
     "stop after so many (128), or at the end of text"},
    {"stop", RETROFIT_STRING, &options.stop, "TEXT|TEXT",
     "end before any of these texts; \\n \\t \\\\ \\| are newline, tab, \\ and |"},
    {"json", RETROFIT_FLAG, &options.json, NULL,
     "a JSON object instead of text: tokens, log-probabilities, times"},
    {"temperature", RETROFIT_REAL, &options.temperature, "F", "0: always the likeliest token (0)"},
    {"top-k", RETROFIT_SIZE, &options.top_k, "N", "draw from the N likeliest; 0: from all (0)"},
    {"top-p", RETROFIT_REAL, &options.top_p, "F",
     "draw from the likeliest that make up this share (1)"},
    {"min-p", RETROFIT_REAL, &options.min_p, "F",
     "draw from those with at least this share of the likeliest's probability (0)"},
    {"seed", RETROFIT_SIZE, &options.seed, "N", "of draws and start states (1)"},
    {"state-init", RETROFIT_CHOICE, &options.state_init, "normal|zero",
     "the start state s_0 (as the model was trained; normal)"},

    {"Think as long as it takes", RETROFIT_HEADING, NULL, NULL, NULL},
    {"exit", RETROFIT_CHOICE, &options.exit,
     "none|entropy-diff|latent-diff|kl|minp-kl|argmax-stability",
     "stop a token's recurrences once this changes no more (none)"},
    {"exit-threshold", RETROFIT_REAL, &options.exit_threshold, "F",
     "by less than F; or stays F recurrences (the authors': 1e-3, .03, 5e-4, 1e-6, 5)"},
    {"kv-cache", RETROFIT_STRING, &options.kv_cache, "full|latest|shared:M|grouped:M",
     "a slot for each recurrence; the last for deeper ones; slot r mod M; r div M"},
    {"kv-bf16", RETROFIT_FLAG, &options.kv_bf16, NULL,
     "keys and values in bf16: half the memory (a GPU keeps them in its --precision)"},
    {"speculative", RETROFIT_MAYBE, &options.speculative, "auto|D1[,D2]",
     "a token begins once the one before is D1 recurrences deep: same text, faster (auto)"},
    {"continuous", RETROFIT_FLAG, &options.continuous, NULL,
     "a token starts from the last state of the one before, not from s_0"},
    {"noise", RETROFIT_REAL, &options.noise, "F",
     "test-time noise on the state, times its standard deviation (0)"},
    {"noise-type", RETROFIT_CHOICE, &options.noise_kind, "fixed|geom|sqrt|line|chi",
     "in recurrence i: the same, over i, over its root, falling, random (fixed)"},

    {"Evaluate", RETROFIT_HEADING, NULL, NULL, NULL},
    {"eval", RETROFIT_STRING, &options.eval, "FILE.bin",
     "loss and perplexity on token shards, at each of --recurrences"},
    {"seq-len", RETROFIT_SIZE, &options.seq_len, "T",
     "tokens in a row (as trained; 1024), in a conversation (4096), at most the context"},
    {"rows", RETROFIT_SIZE, &options.rows, "N", "at most so many rows or tasks; 0: all (0)"},
    {"tasks", RETROFIT_STRING, &options.tasks, "FILE.jsonl",
     "{prompt, answer}, {prompt, choices, answer: 0} or {prompt, target} a line: accuracy"},
    {"answer-regex", RETROFIT_STRING, &options.answer_regex, "ERE",
     "generates; a target is compared with the group that matched last in the text"},

    {"Look inside", RETROFIT_HEADING, NULL, NULL, NULL},
    {"trace", RETROFIT_STRING, &options.trace, "OUT.jsonl",
     "what each recurrence makes of each token of prompt and text; a picture on stderr"},
    {"tokens", RETROFIT_STRING, &options.tokens, "1,2,3",
     "token ids instead of a prompt, for --logits"},
    {"logits", RETROFIT_STRING, &options.logits, "OUT.safetensors",
     "writes the tensor logits (T,V) for --tokens or --prompt"},
    {"print-tokens", RETROFIT_FLAG, &options.print_tokens, NULL,
     "prints the prompt's ids, with the special tokens encoding adds"},
    {"tokenizer", RETROFIT_STRING, &options.tokenizer, "DIR",
     "where tokenizer.json lies (the model's directory)"},

    {"Machine", RETROFIT_HEADING, NULL, NULL, NULL},
    {"device", RETROFIT_CHOICE, &options.device, "auto|cpu|cuda",
     "where to compute; auto: on a GPU if there is one (auto)"},
    {"precision", RETROFIT_CHOICE, &options.precision, "bf16|fp32",
     "of weights and activations on a GPU; a CPU takes weights as the file has them (bf16)"},
};

static const char *model_directory;     // NULL without --model
static const char *tokenizer_directory; // the same, unless --tokenizer names another
static retrofit_model *model;           // NULL for --print-tokens
static retrofit_tokenizer *tokenizer;   // NULL for --eval and --tokens
static char device_name[256];           // what computes
static bool sampling_given;             // whether the command line says how to sample
static int32_t end_tokens[16];          // [end_count] the ids that end a text
static size_t end_count;

// ---- Small helpers -----------------------------------------------------------------------------

// Exit code 1: something failed; 2: the command line asks for what cannot be. A file that is half
// written is removed.
__attribute__((format(printf, 2, 3), noreturn)) static void die(int code, const char *format, ...) {
    char text[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    retrofit_say("infer", text);
    retrofit_abandon();
    exit(code);
}

// The library's functions return false or NULL where they fail; these end the program then.
static void require(bool ok) {
    if (!ok) die(1, "%s", retrofit_error());
}

static void *require_pointer(void *pointer) {
    require(pointer != NULL);
    return pointer;
}

static void *new_array(size_t count, size_t size) {
    return require_pointer(retrofit_allocate(count, size));
}

// Memory for one more item behind `count` of them: it doubles when count is a power of two.
static void *grow_array(void *items, size_t count, size_t size) {
    if (count & (count - 1)) return items;
    return require_pointer(retrofit_reallocate(items, count ? 2 * count : 1, size));
}

// Buffers for B rows of T tokens; cache: NULL unless they are for decoding.
static retrofit_buffers *new_buffers(size_t B, size_t T, const retrofit_kv_cache *cache) {
    return require_pointer(retrofit_buffers_new(model, B, T, 0, RETROFIT_KEEP_NOTHING, cache));
}

static void append_string(retrofit_text *text, const char *string) {
    retrofit_text_append(text, string, strlen(string));
}

// How far work is of which the parts are done one after another.
static struct {
    const char *parts; // what they are
    size_t done, total;
    double began; // seconds
} progress;

static void begin_progress(const char *parts, size_t total) {
    progress.parts = parts;
    progress.done = 0;
    progress.total = total;
    progress.began = retrofit_seconds();
    retrofit_live_line_due(); // the first line comes a while after the first begin
}

// more: how many parts are done beyond progress.done, of those at work. Nothing if nobody counts.
static void show_progress(double more) {
    if (progress.done == progress.total || !retrofit_live_line_due()) return;
    char text[128], eta[48] = "";
    double done = (double)progress.done + more, left = (double)progress.total - done;
    double seconds = retrofit_seconds() - progress.began;
    if (done > 0) snprintf(eta, sizeof eta, ", ETA %.0f s", seconds * left / done);
    snprintf(text, sizeof text, "%.0f of %zu %s%s", floor(done), progress.total, progress.parts,
             eta);
    retrofit_live_line(text);
}

static void advance_progress(size_t parts) {
    progress.done += parts;
    if (progress.done < progress.total) show_progress(0);
    else retrofit_live_line(NULL);
}

// Text that was printed goes out; in vain, if it went nowhere.
static void flush_output(void) {
    require(retrofit_flush_stdout());
}

// JSON has no infinity and no NaN.
static void print_json_number(double x) {
    if (isfinite(x)) printf("%.7g", x);
    else fputs("null", stdout);
}

static bool ends_text(int32_t id) {
    for (size_t i = 0; i < end_count; i++) {
        if (end_tokens[i] == id) return true;
    }
    return false;
}

// An id that no token has, -1 too, ends nothing.
static void add_end_token(int32_t id) {
    bool room = end_count < sizeof end_tokens / sizeof *end_tokens;
    if (id >= 0 && room && !ends_text(id)) end_tokens[end_count++] = id;
}

// Ends the program if a number that the model computed is infinite or no number.
static void check_computed(const float *x, size_t count) {
    size_t i = 0;
    while (i < count && isfinite(x[i])) i++;
    if (i == count) return;
    die(1, "%s: the model's logits are not finite, though its weights are: did its training fail?",
        options.model);
}

// The cross-entropy of a token under logits (V), in nats: -log p(id).
static float token_loss(const float *logits, int32_t id) {
    float loss;
    retrofit_cpu.cross_entropy(&loss, (act *)logits, &id, 1, model->config.vocab, 0);
    return loss;
}

// ---- Recurrences and KV cache ------------------------------------------------------------------

// The standard deviation of s_0; --state-init zero is choice 1.
static float start_sigma(void) { return options.state_init == 1 ? 0 : model->config.state_std; }

enum { MAX_DEPTHS = 64 };
struct depth_list {
    size_t count, r[MAX_DEPTHS]; // recurrences, growing
};

// The numbers of --recurrences, at most `max`; without the option those of `standard` or, if that
// is NULL, the model's mean. A plain Llama has one depth, shown as 0 recurrences.
static struct depth_list read_depths(size_t max, const char *standard) {
    struct depth_list depths = {1, {0}};
    const char *list = options.recurrences;
    if (retrofit_is_plain(&model->config)) {
        if (!list) return depths;
        die(2, "--recurrences: %s is a plain model, it has none: make it recurrent with convert",
            options.model);
    }

    char mean[32];
    snprintf(mean, sizeof mean, "%zu", model->config.mean_recurrence);
    if (!list) list = standard ? standard : mean;
    bool ok = retrofit_sizes(list, depths.r, max, &depths.count);
    if (!ok) die(2, "--recurrences: %s", retrofit_error());
    for (size_t i = 1; i < depths.count; i++) {
        if (depths.r[i] <= depths.r[i - 1])
            die(2, "--recurrences: %s does not grow from one to the next", options.recurrences);
    }
    return depths;
}

// For modes that take one number.
static size_t read_depth(const char *mode) {
    struct depth_list depths = read_depths(2, NULL);
    if (depths.count != 1) die(2, "--recurrences: one number for %s", mode);
    return depths.r[0];
}

// Options for r recurrences or, with --exit, at most r.
static retrofit_recurrence_options recurrence_options(size_t r) {
    return (retrofit_recurrence_options){
        .recurrences = r,
        .sigma = start_sigma(),
        .seed = options.seed,
        .exit = (retrofit_exit)options.exit,
        .threshold = isnan(options.exit_threshold) ? -1 : (float)options.exit_threshold,
        .continuous = options.continuous,
        .noise = (float)options.noise,
        .noise_kind = (retrofit_noise)(options.noise_kind == NOT_GIVEN ? 0 : options.noise_kind),
    };
}

// --speculative: where tokens are read on their way, and what that brought in all texts.
static struct {
    size_t depths[2];         // D1, D2 or 0; D1 0: without --speculative
    retrofit_tuning *tuning;  // of `auto`
    retrofit_front_counts counts, last; // `last`: of the last text, or texts that came together
} drafts;

static void read_drafts(void) {
    static retrofit_tuning tuning;
    const char *text = options.speculative;
    size_t count;
    if (!*text || !strcmp(text, "auto")) {
        drafts.depths[0] = 2;
        drafts.depths[1] = 4;
        drafts.tuning = &tuning;
        return;
    }
    bool ok = retrofit_sizes(text, drafts.depths, 2, &count);
    if (!ok || (count == 2 && drafts.depths[1] <= drafts.depths[0]))
        die(2, "--speculative is auto, D1 or D1,D2 like 2,4: recurrences after which a token is "
               "read, the second more than the first, not '%s'", text);
}

// The cache of --kv-cache. `full` and `latest` both have a slot for each recurrence. With --exit a
// token that stops early leaves slots empty that deeper recurrences of later tokens read: `latest`
// says that the keys and values of its last recurrence fill them, so `full` is refused there.
static retrofit_kv_cache cache_options(size_t capacity, size_t r) {
    retrofit_kv_cache cache = {.capacity = capacity, .recurrences = r, .bf16 = options.kv_bf16};
    const char *text = options.kv_cache;
    if (!text) text = options.exit ? "latest" : "full";
    bool full = !strcmp(text, "full");
    if (full && options.exit)
        die(2, "--exit leaves nothing in a full KV cache that deeper recurrences could read: "
               "--kv-cache latest, shared:M or grouped:M");
    cache.kind = RETROFIT_CACHE_FULL;
    if (full || !strcmp(text, "latest")) return cache;

    if (!strncmp(text, "shared:", 7)) cache.kind = RETROFIT_CACHE_SHARED;
    else if (!strncmp(text, "grouped:", 8)) cache.kind = RETROFIT_CACHE_GROUPED;
    else die(2, "--kv-cache is full, latest, shared:M or grouped:M, not '%s'", text);
    size_t count;
    if (!retrofit_sizes(strchr(text, ':') + 1, &cache.M, 1, &count))
        die(2, "--kv-cache %s: %s", text, retrofit_error());
    return cache;
}

// ---- Chats -------------------------------------------------------------------------------------

static retrofit_chat *chat; // the model's template

// Whether text begins with a special token, which is then *id: tokenizers cut there, so that what
// follows has the same ids whatever is before it.
static bool begins_with_special(const int32_t *ids, size_t count, const char *text, size_t size) {
    size_t shown, skipped;
    if (count == 0) return false;
    char *token = require_pointer(retrofit_decode(tokenizer, ids, 1, false, &shown));
    free(require_pointer(retrofit_decode(tokenizer, ids, 1, true, &skipped)));
    bool special = skipped == 0 && shown > 0 && shown <= size && !memcmp(token, text, shown);
    free(token);
    return special;
}

// Stands for what the model says where only the text around it matters.
static const retrofit_message answer = {.role = "assistant", .content = "\1answer\1", .size = 8};

// The special token that the template writes behind what the model says.
static void find_end_of_turn(void) {
    const retrofit_message user = {.role = "user", .content = "1", .size = 1};
    const retrofit_message messages[] = {user, answer, user};
    retrofit_text text;
    bool rendered = retrofit_chat_render(chat, messages, 3, true, &text, NULL);
    const char *at = rendered ? memmem(text.bytes, text.size, answer.content, answer.size) : NULL;
    if (at) {
        const char *end = text.bytes + text.size;
        at += answer.size;
        at += retrofit_spaces_at(at, (size_t)(end - at));
        size_t size = (size_t)(end - at), count;
        int32_t *ids = require_pointer(retrofit_encode(tokenizer, at, size, false, &count));
        if (begins_with_special(ids, count, at, size)) add_end_token(*ids);
        free(ids);
    }
    free(text.bytes);
}

static void read_chat_template(void) {
    chat = retrofit_chat_load(tokenizer_directory, tokenizer);
    if (!chat) die(1, "%s; without --chat a prompt is taken as it is", retrofit_error());
    find_end_of_turn();
}

// The text of a conversation up to where the model answers. where: of the messages in a file, for
// errors; "" for --prompt.
static retrofit_text write_messages(const retrofit_message *messages, size_t count,
                                    const char *where) {
    retrofit_text text;
    if (!retrofit_chat_write(chat, messages, count, true, &text, NULL))
        die(1, "%s%s%s; without --chat a prompt is taken as it is", where, *where ? ": " : "",
            retrofit_error());
    return text;
}

// ---- Reading prompts ---------------------------------------------------------------------------

// All that stdin has.
static char *read_stdin(size_t *size) {
    size_t capacity = 1 << 16;
    char *text = new_array(capacity, 1);
    *size = 0;
    for (;;) {
        size_t n = fread(text + *size, 1, capacity - *size, stdin);
        if (n == 0) break;
        *size += n;
        if (*size < capacity) continue;
        capacity *= 2;
        text = require_pointer(retrofit_reallocate(text, capacity, 1));
    }
    if (ferror(stdin)) die(1, "--prompt -: reading stdin failed: %s", strerror(errno));
    return text;
}

// The ids of a text from a template, which has BOS where it wants one; frees the text. Special
// tokens that are written out in a message become ids, as they do with Hugging Face.
static int32_t *encode_conversation(retrofit_text *text, size_t *count) {
    int32_t *ids = retrofit_encode(tokenizer, text->bytes, text->size, false, count);
    free(text->bytes);
    return require_pointer(ids);
}

static void add_message(retrofit_message **messages, size_t *count, retrofit_message message) {
    *messages = grow_array(*messages, *count, sizeof **messages);
    (*messages)[(*count)++] = message;
}

// --system's message, if there is one.
static void add_system_option(retrofit_message **messages, size_t *count) {
    const char *content = options.system;
    if (!content) return;
    retrofit_message system = {.role = "system", .content = content, .size = strlen(content)};
    add_message(messages, count, system);
}

// The ids of a prompt; with --chat it is what a user says.
static int32_t *encode_prompt(const char *prompt, size_t size, size_t *count) {
    if (!options.chat)
        return require_pointer(retrofit_encode(tokenizer, prompt, size, true, count));
    retrofit_message *messages = NULL;
    size_t said = 0;
    add_system_option(&messages, &said);
    retrofit_message user = {.role = "user", .content = prompt, .size = size};
    add_message(&messages, &said, user);
    retrofit_text text = write_messages(messages, said, "");
    free(messages);
    return encode_conversation(&text, count);
}

// A message's role; NULL if it has none, or no content.
static const char *message_role(const retrofit_json *message) {
    const retrofit_json *role = retrofit_json_get(message, "role");
    const retrofit_json *content = retrofit_json_get(message, "content");
    if (!content || content->type != RETROFIT_JSON_STRING) return NULL;
    bool known = role && role->type == RETROFIT_JSON_STRING && strlen(role->string) == role->length;
    return known ? role->string : NULL;
}

// The ids of a list of messages. A system message that comes first replaces --system.
static int32_t *encode_messages(const retrofit_json *list, const char *where, size_t *count) {
    retrofit_message *messages = NULL;
    size_t said = 0;
    if (list->type != RETROFIT_JSON_ARRAY || list->count == 0)
        die(1, "%s: \"messages\" is no list, or empty", where);

    for (const retrofit_json *json = list->child; json; json = json->next) {
        const char *role = message_role(json);
        if (!role) die(1, "%s: a message needs a string \"role\" and a string \"content\"", where);
        if (json == list->child && strcmp(role, "system") != 0) add_system_option(&messages, &said);
        const retrofit_json *content = retrofit_json_get(json, "content");
        retrofit_message message = {role, content->string, content->length, json};
        add_message(&messages, &said, message);
    }
    retrofit_text text = write_messages(messages, said, where);
    free(messages);
    return encode_conversation(&text, count);
}

// The ids of --prompt, or of stdin if it is "-".
static int32_t *read_prompt(size_t *count) {
    bool from_stdin = !strcmp(options.prompt, "-");
    size_t size = strlen(options.prompt);
    char *text = from_stdin ? read_stdin(&size)
                            : require_pointer(retrofit_copy_string(options.prompt));
    const char *begin = text;
    if (from_stdin) retrofit_skip_mark(&begin, &size);
    if (from_stdin && size > 0 && begin[size - 1] == '\n')
        retrofit_note("--prompt -: the text ends in a newline, which is part of the prompt (printf "
                      "%%s adds none)");
    if (!retrofit_check_utf8(begin, size, "--prompt")) die(2, "%s", retrofit_error());
    int32_t *ids = encode_prompt(begin, size, count);
    free(text);
    return ids;
}

// A JSON Lines file that is read line by line.
struct json_lines {
    FILE *file;
    const char *path;
    char *line;
    size_t capacity, number;        // of line; of lines read
    char where[RETROFIT_PATH + 32]; // "path: line 7", for errors about that line
};

static struct json_lines open_lines(const char *path) {
    struct json_lines lines = {.file = fopen(path, "rb"), .path = path};
    if (!lines.file) die(1, "%s: %s", path, strerror(errno));
    return lines;
}

static void close_lines(struct json_lines *lines) {
    free(lines->line);
    fclose(lines->file);
}

// The next line that has more than white space; NULL at the end. Lines may end in CR LF, and a byte
// order mark may stand before the first.
static retrofit_json *next_line(struct json_lines *lines) {
    const char *text;
    size_t size, filled;
    do {
        errno = 0;
        ssize_t got = getline(&lines->line, &lines->capacity, lines->file);
        if (got < 0 && feof(lines->file)) return NULL;
        if (got < 0)
            die(1, "%s: behind line %zu: %s", lines->path, lines->number, strerror(errno));
        text = lines->line;
        size = (size_t)got;
        if (lines->number++ == 0) retrofit_skip_mark(&text, &size);
        filled = size;
        retrofit_strip(&(const char *){text}, &filled);
    } while (filled == 0);
    snprintf(lines->where, sizeof lines->where, "%s: line %zu", lines->path, lines->number);
    return require_pointer(retrofit_json_parse(text, size, lines->where));
}

// Says, once for each name, which members of a file's lines are not read. names: those that are, up
// to a NULL.
static void note_unread(const retrofit_json *line, const char *path, const char *const *names) {
    const retrofit_json *member = line->type == RETROFIT_JSON_OBJECT ? line->child : NULL;
    for (; member; member = member->next) {
        const char *const *name = names;
        while (*name && strcmp(*name, member->key)) name++;
        if (!*name) retrofit_note("%s: \"%.60s\" in a line is not read here", path, member->key);
    }
}

// The same for a line that a prompt comes from; more: what else is read of it, or NULL.
static void note_unread_of_prompt(const retrofit_json *line, const char *path, const char *more) {
    bool conversation = options.chat && retrofit_json_get(line, "messages");
    note_unread(line, path,
                (const char *[]){conversation ? "messages" : "prompt", "id", more, NULL});
}

// ---- Sequences: a prompt and its text ----------------------------------------------------------

struct sequence {
    int32_t *ids;        // [count] the prompt; in a conversation what is new in it
    size_t count;
    size_t limit;        // tokens to generate at most
    size_t number;       // which of the run's prompts this is, from 0: it seeds the draws
    retrofit_json *line; // of --batch or --tasks that the prompt comes from; else NULL

    // What generate() adds:
    int32_t *generated;  // [1 + limit] a token of the prompt, then those that follow
    size_t produced;     // tokens so far: generated[1 … produced]
    size_t decode_from;  // 0: they are decoded behind generated[0], which adds no text; 1: alone
    float *logprobs;     // [produced] of each token at temperature 1
    size_t *recurrences; // [produced] that each token took
    retrofit_text text;
    size_t shown;        // bytes of text that no stop string can take back
    const char *finish;  // "stop": end of text or a stop string; "length"; NULL: it goes on
    retrofit_stream stream;
    retrofit_sampling sampling;
    double prompt_seconds, generation_seconds;
};

// Takes the ids. past: tokens that lie before them in the cache, which holds `capacity`. where: of
// the prompt in a file, for errors; "" for --prompt.
static struct sequence new_sequence(const char *where, int32_t *ids, size_t count, size_t past,
                                    size_t capacity, size_t number) {
    bool in_file = *where;
    if (count == 0) die(in_file ? 1 : 2, "%s: the prompt is empty", in_file ? where : "--prompt");
    if (past + count >= capacity)
        die(1, "%s%sthe prompt has %zu tokens, the model's context %zu: shorten it", where,
            in_file ? ": " : "", past + count, capacity);
    size_t limit = retrofit_min(options.max_tokens, capacity - past - count);
    if (limit < options.max_tokens)
        retrofit_note("the model's context of %zu has room for %zu tokens behind %zu, not for "
                      "--max-tokens %zu", capacity, limit, past + count, options.max_tokens);
    return (struct sequence){.ids = ids, .count = count, .limit = limit, .number = number};
}

// A line {"prompt"[, "id"]} or, with --chat, {"messages"[, "id"]}; takes it.
static struct sequence read_sequence(retrofit_json *line, const char *where, size_t number) {
    const retrofit_json *prompt = retrofit_json_get(line, "prompt");
    const retrofit_json *id = retrofit_json_get(line, "id");
    const retrofit_json *messages = options.chat ? retrofit_json_get(line, "messages") : NULL;
    if (!messages && (!prompt || prompt->type != RETROFIT_JSON_STRING))
        die(1, "%s: needs a string \"prompt\"%s", where, options.chat ? " or \"messages\"" : "");
    if (id && id->type != RETROFIT_JSON_STRING && id->type != RETROFIT_JSON_NUMBER)
        die(1, "%s: \"id\" is neither a string nor a number", where);

    size_t count;
    int32_t *ids = messages ? encode_messages(messages, where, &count)
                            : encode_prompt(prompt->string, prompt->length, &count);
    struct sequence sequence = new_sequence(where, ids, count, 0, model->config.context, number);
    sequence.line = line;
    return sequence;
}

static void begin_text(struct sequence *sequence) {
    size_t limit = sequence->limit;
    sequence->generated = new_array(limit + 1, sizeof *sequence->generated);
    sequence->logprobs = new_array(limit, sizeof *sequence->logprobs);
    sequence->recurrences = new_array(limit, sizeof *sequence->recurrences);
    sequence->finish = limit ? NULL : "length";
    sequence->sampling = (retrofit_sampling){
        .temperature = (float)options.temperature,
        .top_k = options.top_k,
        .top_p = (float)options.top_p,
        .min_p = (float)options.min_p,
        .seed = retrofit_hash(options.seed, 1 + sequence->number),
    };

    // Where a tokenizer decodes the first token of a text differently, ours is decoded behind a
    // token of the prompt. That token's own text is asked for here, and dropped.
    sequence->generated[0] = sequence->ids[sequence->count - 1];
    bool behind = retrofit_decode_context(tokenizer, sequence->ids, sequence->count,
                                          &sequence->generated[0]);
    sequence->decode_from = behind ? 0 : 1;
    if (!behind) return;
    size_t size;
    char *text = retrofit_decode_next(tokenizer, &sequence->stream, sequence->generated, 1, true,
                                      true, &size);
    free(require_pointer(text));
}

// Leaves the prompt, for which a text can be generated again.
static void free_text(struct sequence *sequence) {
    free(sequence->generated);
    free(sequence->logprobs);
    free(sequence->recurrences);
    free(sequence->text.bytes);
    *sequence = (struct sequence){.ids = sequence->ids,
                                  .count = sequence->count,
                                  .limit = sequence->limit,
                                  .number = sequence->number,
                                  .line = sequence->line};
}

static void free_sequence(struct sequence *sequence) {
    free_text(sequence);
    free(sequence->ids);
    retrofit_json_free(sequence->line);
}

// The ids of the prompt and of its text.
static int32_t *all_ids(const struct sequence *sequence) {
    size_t count = sequence->count, produced = sequence->produced;
    int32_t *ids = new_array(count + produced, sizeof *ids);
    memcpy(ids, sequence->ids, count * sizeof *ids);
    memcpy(ids + count, sequence->generated + 1, produced * sizeof *ids);
    return ids;
}

// ---- Stop strings ------------------------------------------------------------------------------

static char *stops[16]; // stops[0] is the memory of all of them
static size_t stop_count;

// --stop's texts with a | between them; a backslash stands before n, t, itself and |.
static void read_stops(void) {
    static const char names[] = "nt\\|", values[] = "\n\t\\|";
    if (!retrofit_check_utf8(options.stop, strlen(options.stop), "--stop"))
        die(2, "%s", retrofit_error());
    char *to = require_pointer(retrofit_copy_string(options.stop));
    stops[0] = to;
    for (const char *from = options.stop;; from++) {
        bool last = *from == 0;
        if (*from == '\\') {
            from++;
            const char *name = *from ? strchr(names, *from) : NULL;
            if (!name) die(2, "--stop: behind a \\ comes n, t, \\ or |");
            *to++ = values[name - names];
        } else if (*from == '|' || last) {
            *to++ = 0;
            if (!*stops[stop_count]) die(2, "--stop: an empty text would end everything");
            stop_count++;
            if (last) return;
            if (stop_count == sizeof stops / sizeof *stops)
                die(2, "--stop: more than %zu texts", stop_count);
            stops[stop_count] = to;
        } else {
            *to++ = *from;
        }
    }
}

// The bytes of text that are final: up to the first stop string, then *stopped is set, or up to an
// end of the text that could still become one.
static size_t final_size(const struct sequence *sequence, bool *stopped) {
    const retrofit_text *text = &sequence->text;
    size_t final = text->size;
    for (size_t at = sequence->shown; at < text->size; at++) {
        for (size_t i = 0; i < stop_count; i++) {
            size_t size = strlen(stops[i]);
            size_t there = retrofit_min(size, text->size - at);
            if (memcmp(text->bytes + at, stops[i], there)) continue;
            *stopped = there == size;
            if (*stopped) return at;
            final = retrofit_min(final, at);
        }
    }
    return final;
}

// ---- Generation --------------------------------------------------------------------------------

// A prompt that is alone in its batch is fed in chunks of this many tokens: the buffers need not be
// as long as the prompt.
enum { PROMPT_CHUNK = 1024 };

// Sequences that are generated together, one in each row of the KV cache.
struct batch {
    retrofit_buffers *buffers;
    retrofit_recurrence_options recurrence;
    struct sequence **sequences; // [count] the shortest prompt first
    size_t count;                // rows that are fed
    int32_t *ids;                // [count] what a step feeds
    void *scratch;               // of sampling
    retrofit_front *front;       // with --speculative
    double began, prompts_fed;   // seconds
    bool show;                   // write text to stdout as it comes
};

static int compare_counts(const void *x, const void *y) {
    size_t a = (*(struct sequence *const *)x)->count;
    size_t b = (*(struct sequence *const *)y)->count;
    return (a > b) - (a < b);
}

static struct batch begin_batch(retrofit_buffers *buffers, struct sequence *sequences, size_t count,
                                size_t r, bool show) {
    struct batch batch = {.buffers = buffers, .count = count, .show = show};
    batch.recurrence = recurrence_options(r);
    batch.sequences = new_array(count, sizeof *batch.sequences);
    batch.ids = new_array(count, sizeof *batch.ids);
    batch.scratch = new_array(model->config.vocab, 2 * sizeof(float));
    for (size_t i = 0; i < count; i++) {
        begin_text(&sequences[i]);
        batch.sequences[i] = &sequences[i];
    }
    qsort(batch.sequences, count, sizeof *batch.sequences, compare_counts);
    batch.began = retrofit_seconds();
    return batch;
}

// Drops the last rows as far as their sequences have ended; false if none is left. Ended sequences
// in front of others are fed on, in vain. They have the shorter prompts, so their rows do not fill
// the cache before a row that goes on does.
static bool drop_ended_rows(struct batch *batch) {
    while (batch->count > 0 && batch->sequences[batch->count - 1]->finish) batch->count--;
    return batch->count > 0;
}

// Decodes the newest token.
static void append_text(struct sequence *sequence) {
    retrofit_text *text = &sequence->text;
    size_t size, from = sequence->decode_from;
    char *added = retrofit_decode_next(tokenizer, &sequence->stream, sequence->generated + from,
                                       sequence->produced + 1 - from, true,
                                       sequence->finish != NULL, &size);
    require(added != NULL);
    retrofit_text_append(text, added, size);
    retrofit_text_append(text, "", 1); // a NUL that the text's size leaves out
    require(!text->failed);
    text->size--;
    free(added);
}

// Adds a token that was drawn by these logits (V), or ends the sequence where it ends a text; shows
// the text as far as it is final.
static void append_token(struct batch *batch, struct sequence *sequence, int32_t id,
                         const float *logits, size_t recurrences) {
    if (ends_text(id)) {
        sequence->finish = "stop";
    } else {
        size_t n = sequence->produced++;
        sequence->generated[n + 1] = id;
        sequence->logprobs[n] = -token_loss(logits, id);
        sequence->recurrences[n] = recurrences;
        if (sequence->produced == sequence->limit) sequence->finish = "length";
    }

    append_text(sequence);
    retrofit_text *text = &sequence->text;
    bool stopped = false;
    size_t final = final_size(sequence, &stopped);
    if (stopped) {
        sequence->finish = "stop";
        text->size = final;
        text->bytes[final] = 0;
    }
    if (sequence->finish) final = text->size;
    if (batch->show) {
        fwrite(text->bytes + sequence->shown, 1, final - sequence->shown, stdout);
        flush_output();
    }
    sequence->shown = final;
    sequence->prompt_seconds = batch->prompts_fed - batch->began;
    sequence->generation_seconds = retrofit_seconds() - batch->prompts_fed;
}

// Ids that tokenizer and model have both: those beyond the tokenizer's are padding of the
// vocabulary, those beyond the model's were added to the tokenizer alone.
static size_t known_ids(void) {
    return retrofit_min(retrofit_tokenizer_size(tokenizer), model->config.vocab);
}

// Draws a token for each sequence from its row of logits (count,V).
static void sample_tokens(struct batch *batch, const float *logits) {
    size_t known = known_ids();
    for (size_t i = 0; i < batch->count; i++) {
        struct sequence *sequence = batch->sequences[i];
        const float *row = logits + i * model->config.vocab;
        if (sequence->finish) continue;
        check_computed(row, known);
        int32_t id = retrofit_sample(row, known, &sequence->sampling, batch->scratch);
        append_token(batch, sequence, id, row, (size_t)batch->buffers->decoder->used[i]);
    }
}

// Feeds n tokens to each of b rows; returns the logits (b,V) behind them.
static const float *feed(struct batch *batch, const int32_t *ids, size_t b, size_t n,
                         const int32_t *lengths) {
    const float *logits =
        retrofit_next_logits(batch->buffers, ids, b, n, lengths, &batch->recurrence);
    require(logits != NULL);
    return logits;
}

// The prompt of a sequence that is alone, chunk by chunk.
static const float *feed_prompt(struct batch *batch) {
    const struct sequence *sequence = batch->sequences[0];
    const float *logits = NULL;
    size_t n;
    if (batch->show) begin_progress("tokens of the prompt", sequence->count);
    for (size_t at = 0; at < sequence->count; at += n) {
        n = retrofit_min(sequence->count - at, batch->buffers->T);
        logits = feed(batch, sequence->ids + at, 1, n, NULL);
        if (batch->show) advance_progress(n);
    }
    return logits;
}

// All prompts at once, padded on the right to the longest one's T tokens: what the padding leaves
// in the cache lies behind the prompt's end, where no query looks before it is overwritten.
static const float *feed_prompts(struct batch *batch) {
    size_t B = batch->count, T = batch->sequences[B - 1]->count;
    int32_t *ids = new_array(B * T, sizeof *ids), *lengths = new_array(B, sizeof *lengths);
    for (size_t i = 0; i < B; i++) {
        const struct sequence *sequence = batch->sequences[i];
        lengths[i] = (int32_t)sequence->count;
        memcpy(ids + i * T, sequence->ids, sequence->count * sizeof *ids);
    }
    const float *logits = feed(batch, ids, B, T, lengths);
    free(ids);
    free(lengths);
    return logits;
}

// One token for each sequence, behind its last one.
static void decode_token(struct batch *batch) {
    for (size_t i = 0; i < batch->count; i++) {
        const struct sequence *sequence = batch->sequences[i];
        batch->ids[i] = sequence->generated[sequence->produced];
    }
    sample_tokens(batch, feed(batch, batch->ids, batch->count, 1, NULL));
}

// Behind each prompt its first token begins. The last one of a text is not fed.
static void begin_front(struct batch *batch) {
    retrofit_buffers *buffers = batch->buffers;
    size_t known = known_ids();
    batch->front = require_pointer(
        retrofit_front_new(buffers, &batch->recurrence, drafts.depths[0], drafts.depths[1], known,
                           drafts.tuning));
    for (size_t i = 0; i < batch->count; i++) {
        struct sequence *sequence = batch->sequences[i];
        int32_t end = buffers->decoder->seen[i] + (int32_t)sequence->limit - 1;
        if (sequence->finish) continue;
        require(retrofit_front_begin(batch->front, i, sequence->generated[sequence->produced], end,
                                     &sequence->sampling));
    }
}

// One recurrence of all tokens under way, and what that answers.
static void advance_front(struct batch *batch) {
    retrofit_front *front = batch->front;
    retrofit_front_advance(front);
    for (size_t i = 0; i < batch->count; i++) {
        const retrofit_front_row *row = &front->rows[i];
        struct sequence *sequence = batch->sequences[i];
        if (row->answer < 0) continue;
        check_computed(row->logits, front->vocab);
        append_token(batch, sequence, row->answer, row->logits, batch->recurrence.recurrences);
        if (sequence->finish) retrofit_front_end(front, i);
    }
}

// Adds up what fronts did. There is none if every text ended with its first token.
static void end_front(struct batch *batch) {
    drafts.last = (retrofit_front_counts){0};
    if (!batch->front) return;
    const retrofit_front_counts *counts = &batch->front->counts;
    drafts.last = *counts;
    drafts.counts.passes += counts->passes;
    drafts.counts.rows += counts->rows;
    drafts.counts.most = retrofit_max(drafts.counts.most, counts->most);
    drafts.counts.readings += counts->readings;
    drafts.counts.answers += counts->answers;
    drafts.counts.proposed += counts->proposed;
    drafts.counts.kept_second += counts->kept_second;
    drafts.counts.kept += counts->kept;
    drafts.counts.restarts += counts->restarts;
    retrofit_front_free(batch->front);
}

// Generates the texts of `count` sequences together, behind what the cache holds.
static void generate(retrofit_buffers *buffers, struct sequence *sequences, size_t count, size_t r,
                     bool show) {
    struct batch batch = begin_batch(buffers, sequences, count, r, show);
    if (drop_ended_rows(&batch)) { // none is left if --max-tokens is 0
        const float *logits = batch.count > 1 ? feed_prompts(&batch) : feed_prompt(&batch);
        batch.prompts_fed = retrofit_seconds();
        sample_tokens(&batch, logits);
    }
    if (drafts.depths[0] && drop_ended_rows(&batch)) begin_front(&batch);
    while (drop_ended_rows(&batch)) {
        if (batch.front) advance_front(&batch);
        else decode_token(&batch);
        const struct sequence *last = batch.sequences[0];
        if (!show) show_progress((double)(count * last->produced) / (double)last->limit);
    }
    end_front(&batch);
    free(batch.sequences);
    free(batch.ids);
    free(batch.scratch);
}

// A front's tokens are rows of a batch.
static size_t with_room_for_drafts(size_t B, size_t T) {
    size_t least = (RETROFIT_UNDER_WAY + B - 1) / B;
    return drafts.depths[0] ? retrofit_max(T, least) : T;
}

// Buffers to generate with, B sequences at a time, for the longest prompt and the longest text.
static retrofit_buffers *buffers_for(const struct sequence *sequences, size_t count, size_t B,
                                     size_t r) {
    size_t T = 1, capacity = 1;
    for (size_t i = 0; i < count; i++) {
        T = retrofit_max(T, sequences[i].count);
        capacity = retrofit_max(capacity, sequences[i].count + sequences[i].limit);
    }
    if (B == 1) T = retrofit_min(T, PROMPT_CHUNK);
    retrofit_kv_cache cache = cache_options(capacity, r);
    return new_buffers(B, with_room_for_drafts(B, T), &cache);
}

// What the front did for this text, and for those that were in a batch with it.
static void print_drafts_json(void) {
    const retrofit_front_counts *last = &drafts.last;
    printf(",\"drafts\":{\"tokens\":%zu,\"passes\":%zu,\"rows\":%zu,\"most\":%zu,"
           "\"readings\":%zu", last->answers, last->passes, last->rows, last->most, last->readings);
    printf(",\"proposed\":%zu,\"kept_second\":%zu,\"kept\":%zu,\"restarts\":%zu}",
           last->proposed, last->kept_second, last->kept, last->restarts);
}

// A text as JSON; past: tokens before the prompt.
static void print_json(const struct sequence *sequence, size_t past) {
    const retrofit_json *id = retrofit_json_get(sequence->line, "id");
    putchar('{');
    if (id) {
        fputs("\"id\":", stdout);
        if (id->type == RETROFIT_JSON_NUMBER) fputs(id->string, stdout);
        else retrofit_json_write_string(stdout, id->string, id->length);
        putchar(',');
    }
    printf("\"prompt_tokens\":%zu,\"text\":", past + sequence->count);
    retrofit_json_write_string(stdout, sequence->text.bytes, sequence->text.size);
    printf(",\"tokens\":[");
    for (size_t i = 0; i < sequence->produced; i++)
        printf(i ? ",%d" : "%d", (int)sequence->generated[i + 1]);
    printf("],\"logprobs\":[");
    for (size_t i = 0; i < sequence->produced; i++) {
        if (i) putchar(',');
        print_json_number((double)sequence->logprobs[i]);
    }
    printf("],\"recurrences\":[");
    for (size_t i = 0; i < sequence->produced; i++)
        printf(i ? ",%zu" : "%zu", sequence->recurrences[i]);
    printf("],\"finish_reason\":\"%s\",\"prompt_seconds\":%.4f,\"generation_seconds\":%.4f",
           sequence->finish, sequence->prompt_seconds, sequence->generation_seconds);
    if (drafts.depths[0]) print_drafts_json();
    printf("}\n");
}

// ---- Where tokens stopped: --exit --------------------------------------------------------------

// Of all tokens generated; r is the most recurrences that one may take.
static struct {
    size_t r;
    size_t *histogram;             // [r + 1] tokens by recurrences
    size_t tokens, sum;            // their number; all their recurrences
    size_t compared, same_as_full; // greedy tokens compared with those of full depth; equal ones
} exits;

// Would plain decoding at r recurrences have chosen the same tokens, each behind the same text? One
// pass over prompt and text tells.
static void compare_with_full_depth(const struct sequence *sequence, size_t r) {
    size_t T = sequence->count + sequence->produced - 1;
    retrofit_buffers *buffers = new_buffers(1, T, NULL);
    int32_t *ids = all_ids(sequence);
    float *logits = new_array(model->config.vocab, sizeof *logits);
    require(retrofit_forward(buffers, ids, 1, T, start_sigma(), options.seed, r, 0));
    for (size_t i = 0; i < sequence->produced; i++) {
        retrofit_logits(buffers, sequence->count - 1 + i, 1, logits);
        int32_t full = retrofit_argmax(logits, known_ids());
        exits.same_as_full += full == sequence->generated[i + 1];
    }
    exits.compared += sequence->produced;
    free(ids);
    free(logits);
    retrofit_buffers_free(buffers);
}

static void count_exits(const struct sequence *sequence, size_t r) {
    if (!exits.histogram) exits.histogram = new_array(r + 1, sizeof *exits.histogram);
    exits.r = r;
    for (size_t i = 0; i < sequence->produced; i++) {
        exits.histogram[sequence->recurrences[i]]++;
        exits.sum += sequence->recurrences[i];
    }
    exits.tokens += sequence->produced;
    bool drawn = options.temperature > 0;
    if (!drawn && !options.continuous && sequence->produced > 0)
        compare_with_full_depth(sequence, r);
}

static void print_exits(void) {
    double mean = exits.tokens ? (double)exits.sum / (double)exits.tokens : 0;
    fprintf(stderr, "recurrences per token: %.2f on average of at most %zu:", mean, exits.r);
    for (size_t i = 1; i <= exits.r; i++) {
        if (exits.histogram[i]) fprintf(stderr, "  %zu: %zu", i, exits.histogram[i]);
    }
    if (exits.compared)
        fprintf(stderr, "; %zu of %zu tokens are those of full depth", exits.same_as_full,
                exits.compared);
    fputc('\n', stderr);
    free(exits.histogram);
}

// ---- What each recurrence makes of each token: --trace -----------------------------------------

enum { LIKELIEST = 3 };

// One token after one recurrence.
struct trace_entry {
    double entropy;         // of the next token's distribution, in nats
    double change;          // ‖s_i - s_{i-1}‖ / ‖s_i‖
    int32_t ids[LIKELIEST]; // the likeliest next tokens, -1 where there are fewer
    float p[LIKELIEST];     // their probabilities
};

// Keeps the likeliest tokens in order; of equals the first comes first.
static void insert_token(struct trace_entry *entry, int32_t id, double p) {
    size_t place = LIKELIEST;
    while (place > 0 && (entry->ids[place - 1] < 0 || p > entry->p[place - 1])) place--;
    if (place == LIKELIEST) return;
    for (size_t i = LIKELIEST - 1; i > place; i--) {
        entry->ids[i] = entry->ids[i - 1];
        entry->p[i] = entry->p[i - 1];
    }
    entry->ids[place] = id;
    entry->p[place] = (float)p;
}

// p = softmax(logits);  entropy = -Σ p·log p
static struct trace_entry new_trace_entry(const float *logits, size_t V, double change) {
    struct trace_entry entry = {0, change, {-1, -1, -1}, {0, 0, 0}};
    double max = logits[retrofit_argmax(logits, V)], sum = 0;
    for (size_t v = 0; v < V; v++) sum += exp(logits[v] - max);
    for (size_t v = 0; v < V; v++) {
        double p = exp(logits[v] - max) / sum;
        entry.entropy -= p > 0 ? p * log(p) : 0;
        insert_token(&entry, (int32_t)v, p);
    }
    return entry;
}

// Entries (T,r) of T tokens, to be freed. One pass, without cache and exits: start states are
// functions of the position, so the states are those of decoding.
static struct trace_entry *trace_tokens(const int32_t *ids, size_t T, size_t r) {
    enum { ROWS = 64 }; // of logits at a time
    size_t V = model->config.vocab, d = model->config.n_embd, bytes = T * d * sizeof(float);
    size_t known = known_ids();
    retrofit_buffers *buffers = new_buffers(1, T, NULL);
    retrofit_recurrence_options recurrence = recurrence_options(r);
    float *logits = new_array(ROWS * V, sizeof *logits);
    float *states = new_array(2 * T * d, sizeof *states); // (2,T,d)
    struct trace_entry *entries = new_array(T * r, sizeof *entries);

    require(retrofit_prelude(buffers, ids, 1, T));
    retrofit_init_state(buffers, start_sigma(), options.seed);
    model->ops->download(states, buffers->state, bytes);
    begin_progress("recurrences traced", r);
    for (size_t i = 0; i < r; i++) {
        const float *before = states + i % 2 * T * d;
        float *now = states + (i + 1) % 2 * T * d;
        retrofit_recur_noisy(buffers, &recurrence, 1);
        model->ops->download(now, buffers->state, bytes);
        retrofit_coda(buffers);
        for (size_t at = 0; at < T; at++) {
            if (at % ROWS == 0) retrofit_logits(buffers, at, retrofit_min(ROWS, T - at), logits);
            double change = retrofit_relative_change(now + at * d, before + at * d, d);
            entries[at * r + i] = new_trace_entry(logits + at % ROWS * V, known, change);
        }
        advance_progress(1);
    }
    free(logits);
    free(states);
    retrofit_buffers_free(buffers);
    return entries;
}

// The members "token" and "text" of a JSON object.
static void write_token(FILE *file, int32_t id) {
    size_t size;
    char *text = require_pointer(retrofit_decode(tokenizer, &id, 1, false, &size));
    fprintf(file, "\"token\":%d,\"text\":", (int)id);
    retrofit_json_write_string(file, text, size);
    free(text);
}

// A line of the file: a token and its entries (r).
static void write_trace(FILE *file, size_t position, int32_t id, const struct trace_entry *entries,
                        size_t r) {
    fprintf(file, "{\"position\":%zu,", position);
    write_token(file, id);
    fputs(",\"recurrences\":[", file);
    for (size_t i = 0; i < r; i++) {
        const struct trace_entry *entry = &entries[i];
        fprintf(file, "%s{\"r\":%zu,\"entropy\":%.6g,\"change\":%.6g,\"top\":[", i ? "," : "",
                i + 1, entry->entropy, entry->change);
        for (size_t j = 0; j < LIKELIEST && entry->ids[j] >= 0; j++) {
            fputs(j ? ",{" : "{", file);
            write_token(file, entry->ids[j]);
            fprintf(file, ",\"p\":%.6g}", (double)entry->p[j]);
        }
        fputs("]}", file);
    }
    fputs("]}\n", file);
}

// 16 columns of a token's text, on one line.
static void append_column(retrofit_text *line, int32_t id) {
    enum { COLUMNS = 16 };
    size_t size, n, used = 0;
    char *text = require_pointer(retrofit_decode(tokenizer, &id, 1, false, &size));
    for (size_t at = 0; at < size && used < COLUMNS; at += n) {
        uint32_t character;
        n = retrofit_utf8_next(text + at, size - at, &character);
        if (character == '\n') append_string(line, "$");
        else if (character < ' ' || character == 127) append_string(line, ".");
        else retrofit_text_append(line, text + at, n);
        used++;
    }
    for (; used < COLUMNS; used++) append_string(line, " ");
    free(text);
}

static const char *shade(double change) {
    if (change >= 1) return "█";
    if (change >= 0.3) return "▓";
    if (change >= 0.1) return "▒";
    if (change >= 0.03) return "░";
    return "·";
}

// A line of the picture: the token, a character for each recurrence (`width` columns), then the
// likeliest next token and the recurrence since which it has been that.
static void print_picture_line(int32_t id, const struct trace_entry *entries, size_t r, int width) {
    const struct trace_entry *last = &entries[r - 1];
    retrofit_text line = {0}; // whole before it is shown: what fails has a line of its own
    char entropy[32];
    size_t since = r;
    while (since > 1 && entries[since - 2].ids[0] == last->ids[0]) since--;
    append_column(&line, id);
    append_string(&line, "  ");
    for (size_t i = 0; i < r; i++) append_string(&line, shade(entries[i].change));
    for (int i = (int)r; i < width; i++) append_string(&line, " ");
    snprintf(entropy, sizeof entropy, "  %7.3f  ", last->entropy);
    append_string(&line, entropy);
    append_column(&line, last->ids[0]);
    retrofit_text_append(&line, "", 1);
    require(!line.failed);
    fprintf(stderr, "%s  %zu\n", line.bytes, since);
    free(line.bytes);
}

// All tokens of prompt and text: to the file of --trace, and as a picture to stderr.
static void trace_sequence(const struct sequence *sequence, size_t r) {
    static const char title[] = "r from 1 on";
    int width = (int)retrofit_max(r, strlen(title));
    size_t T = sequence->count + sequence->produced;
    int32_t *ids = all_ids(sequence);
    struct trace_entry *entries = trace_tokens(ids, T, r);
    char *path = require_pointer(retrofit_file_begin(options.trace));
    FILE *file = fopen(path, "wb");
    if (!file) die(1, "%s: %s", path, strerror(errno));
    fprintf(stderr, "how much each recurrence changes a token's state:  █ as much as it is  "
                    "▓ 30 %%  ▒ 10 %%  ░ 3 %%  · less\n");
    fprintf(stderr, "%-16s  %-*s  entropy  next, since r\n", "token", width, title);
    for (size_t at = 0; at < T; at++) {
        write_trace(file, at, ids[at], entries + at * r, r);
        print_picture_line(ids[at], entries + at * r, r, width);
    }
    require(retrofit_finish_file(file, path, true));
    require(retrofit_file_commit(path, options.trace));
    free(path);
    free(ids);
    free(entries);
}

// ---- Modes: one prompt, many -------------------------------------------------------------------

// Shows what belongs to a sequence that has its text.
static void show_sequence(const struct sequence *sequence, size_t r) {
    if (options.batch || options.json) print_json(sequence, 0);
    else putchar('\n');
    if (options.exit) count_exits(sequence, r);
    if (options.trace) {
        flush_output();
        trace_sequence(sequence, r);
    }
}

static void print_drafts(void) {
    const retrofit_front_counts *counts = &drafts.counts;
    double passes = (double)counts->passes, answers = (double)counts->answers;
    fprintf(stderr, "drafts: %.2f readings of the core per token, ", passes / answers);
    fprintf(stderr, "%.1f tokens under way, at most %zu; ", (double)counts->rows / passes,
            counts->most);
    fprintf(stderr, "%zu proposed, %zu right at the second reading, %zu in the end, ",
            counts->proposed, counts->kept_second, counts->kept);
    fprintf(stderr, "%zu begun anew\n", counts->restarts);
}

// The rest of the line that begins with how many tokens took how long; then exits and drafts.
static void print_summary(const retrofit_buffers *buffers, size_t r) {
    double kilobytes = (double)retrofit_cache_bytes(buffers) / 1024;
    if (r) fprintf(stderr, options.exit ? ", at most %zu recurrences" : ", %zu recurrences", r);
    fprintf(stderr, ", KV cache %.1f KiB per token, on %s\n", kilobytes, device_name);
    if (options.exit) print_exits();
    if (drafts.counts.passes) print_drafts();
}

static void run_prompt(void) {
    size_t r = read_depth("generation"), count;
    int32_t *ids = read_prompt(&count);
    struct sequence sequence = new_sequence("", ids, count, 0, model->config.context, 0);
    retrofit_buffers *buffers = buffers_for(&sequence, 1, 1, r);
    generate(buffers, &sequence, 1, r, !options.json);
    show_sequence(&sequence, r);
    flush_output();

    size_t produced = sequence.produced;
    double seconds = sequence.generation_seconds, speed = 0;
    if (produced > 1) speed = (double)(produced - 1) / seconds; // the first comes with the prompt
    fprintf(stderr, "prompt %zu tokens %.2f s, %zu tokens %.2f s (%.1f tok/s)", count,
            sequence.prompt_seconds, produced, seconds, speed);
    print_summary(buffers, r);
    free_sequence(&sequence);
    retrofit_buffers_free(buffers);
}

// The prompts of --batch.
static struct sequence *read_batch(size_t *count) {
    struct sequence *sequences = NULL;
    struct json_lines lines = open_lines(options.batch);
    *count = 0;
    for (;;) {
        retrofit_json *line = next_line(&lines);
        if (!line) break;
        note_unread_of_prompt(line, options.batch, NULL);
        sequences = grow_array(sequences, *count, sizeof *sequences);
        sequences[*count] = read_sequence(line, lines.where, *count);
        ++*count;
    }
    close_lines(&lines);
    if (*count == 0) die(1, "%s: no prompts in it", options.batch);
    return sequences;
}

static void run_batch(void) {
    size_t r = read_depth("generation"), count, tokens = 0, produced = 0, b;
    struct sequence *sequences = read_batch(&count);
    size_t B = retrofit_min(options.batch_size, count);
    retrofit_buffers *buffers = buffers_for(sequences, count, B, r);
    begin_progress("prompts", count);
    for (size_t at = 0; at < count; at += b) {
        b = retrofit_min(B, count - at);
        retrofit_clear_cache(buffers);
        generate(buffers, sequences + at, b, r, false);
        retrofit_live_line(NULL); // stdout may lead to the same terminal
        for (size_t i = at; i < at + b; i++) {
            show_sequence(&sequences[i], r);
            tokens += sequences[i].count;
            produced += sequences[i].produced;
            free_sequence(&sequences[i]);
        }
        flush_output();
        advance_progress(b);
    }
    double seconds = retrofit_seconds() - progress.began;
    fprintf(stderr, "%zu prompts, %zu tokens, and %zu more in %.2f s (%.1f tok/s)", count, tokens,
            produced, seconds, (double)produced / seconds);
    print_summary(buffers, r);
    free(sequences);
    retrofit_buffers_free(buffers);
}

// ---- Mode: a conversation ----------------------------------------------------------------------

struct conversation {
    retrofit_buffers *buffers;
    size_t r, capacity;   // of the cache
    size_t total, turns;  // tokens so far; turns of the model
    struct sequence last; // its last turn
};

// What is new in a conversation, since the cache keeps all that has been said: the end of the
// model's last turn, the user's turn and the beginning of the model's. The template writes the
// whole conversation, so that it must begin as it did one turn before.
static int32_t *encode_turn(bool first, const char *line, size_t size, size_t *count) {
    static retrofit_message *messages;
    static size_t said;
    static retrofit_text before;
    if (first) add_system_option(&messages, &said);
    else add_message(&messages, &said, answer);
    char *content = new_array(size + 1, 1);
    memcpy(content, line, size);
    retrofit_message user = {.role = "user", .content = content, .size = size};
    add_message(&messages, &said, user);
    retrofit_text text = write_messages(messages, said, ""), added = text;

    size_t at = before.size; // where the new text begins
    bool same = at <= text.size && (first || !memcmp(text.bytes, before.bytes, at));
    if (!first && same) {
        at += retrofit_spaces_at(text.bytes + at, text.size - at); // with which the model begins
        same = text.size - at > answer.size;
        same = same && !memcmp(text.bytes + at, answer.content, answer.size);
        at += answer.size;
    }
    if (!same)
        die(1, "%s: chat template: it writes earlier turns in another way when there are more; "
               "--interactive cannot follow that", retrofit_chat_where(chat));
    added.size = text.size - at;
    added.bytes = new_array(added.size, 1);
    memcpy(added.bytes, text.bytes + at, added.size);
    free(before.bytes);
    before = text;

    int32_t *ids = retrofit_encode(tokenizer, added.bytes, added.size, false, count);
    require(ids != NULL);
    if (!first && !begins_with_special(ids, *count, added.bytes, added.size))
        die(1, "%s: chat template: no special token comes right behind what the model says, so "
               "that a token may reach across; --interactive cannot follow that",
            retrofit_chat_where(chat));
    free(added.bytes);
    return ids;
}

static void answer_turn(struct conversation *conversation, const char *line, size_t size) {
    struct sequence *last = &conversation->last;
    size_t total = conversation->total, capacity = conversation->capacity, count;
    size_t past = (size_t)conversation->buffers->decoder->seen[0];
    int32_t *ids = encode_turn(total == 0, line, size, &count);
    if (total + count >= capacity)
        die(1, "the conversation would have %zu tokens, there is room for %zu: begin a new one",
            total + count, capacity);

    // The last token of a turn that --max-tokens or a stop string ended has not been fed.
    if (total > past) {
        ids = require_pointer(retrofit_reallocate(ids, count + 1, sizeof *ids));
        memmove(ids + 1, ids, count * sizeof *ids);
        ids[0] = last->generated[last->produced];
        count++;
    }
    free_sequence(last);
    *last = new_sequence("", ids, count, past, capacity, conversation->turns++);
    generate(conversation->buffers, last, 1, conversation->r, !options.json);
    if (options.json) print_json(last, past);
    else putchar('\n');
    flush_output();
    conversation->total = past + last->count + last->produced;
}

// --seq-len; without it `standard` or, if that is less, the model's context.
static size_t read_seq_len(size_t standard) {
    size_t context = model->config.context;
    if (options.seq_len > context)
        die(2, "--seq-len %zu is more than the model's context of %zu", options.seq_len, context);
    return options.seq_len ? options.seq_len : retrofit_min(standard, context);
}

static void run_interactive(void) {
    struct conversation conversation = {.r = read_depth("generation")};
    size_t line_capacity = 0, capacity = read_seq_len(4096);
    retrofit_kv_cache cache = cache_options(capacity, conversation.r);
    conversation.capacity = capacity;
    size_t T = with_room_for_drafts(1, retrofit_min(capacity, PROMPT_CHUNK));
    conversation.buffers = new_buffers(1, T, &cache);
    char *line = NULL;
    bool terminal = isatty(0);
    for (;;) {
        if (terminal) fputs("> ", stderr);
        ssize_t size = getline(&line, &line_capacity, stdin);
        if (size < 0 && !feof(stdin)) die(1, "reading stdin failed: %s", strerror(errno));
        if (size <= 0) break;
        if (line[size - 1] == '\n') size--;
        if (size > 0 && line[size - 1] == '\r') size--;
        require(retrofit_check_utf8(line, (size_t)size, "stdin"));
        if (size > 0) answer_turn(&conversation, line, (size_t)size);
    }
    free(line);
    free_sequence(&conversation.last);
    retrofit_buffers_free(conversation.buffers);
}

// ---- Mode: loss by recurrences -----------------------------------------------------------------

// Rows of --eval.
struct evaluation {
    retrofit_data *data;
    size_t T, rows;           // tokens in a row; rows that are read
    int32_t *tokens, *labels; // (B,T)
};

// Loss on shards that another tokenizer made means nothing: they are refused, as train does.
static void check_shards(const retrofit_data *data) {
    retrofit_tokenizer *shards_tokenizer = retrofit_tokenizer_load(tokenizer_directory);
    require(retrofit_data_check(data, shards_tokenizer));
    require(retrofit_data_check_ids(data));
    retrofit_tokenizer_free(shards_tokenizer);
}

static struct evaluation open_evaluation(void) {
    size_t T = read_seq_len(1024);
    retrofit_data *data = retrofit_data_open(options.eval, T, model->config.vocab, false, 0);
    require(data != NULL);
    check_shards(data);
    size_t rows = retrofit_data_rows(data);
    if (options.rows) rows = retrofit_min(options.rows, rows);
    require(retrofit_data_check_counted(data, rows));
    return (struct evaluation){.data = data, .T = T, .rows = rows};
}

static void allocate_rows(struct evaluation *evaluation, size_t B) {
    evaluation->tokens = new_array(B * evaluation->T, sizeof *evaluation->tokens);
    evaluation->labels = new_array(B * evaluation->T, sizeof *evaluation->labels);
}

static void read_rows(struct evaluation *evaluation, size_t first, size_t count) {
    for (size_t i = 0; i < count; i++) {
        int32_t *tokens = evaluation->tokens + i * evaluation->T;
        int32_t *labels = evaluation->labels + i * evaluation->T;
        require(retrofit_data_row(evaluation->data, first + i, tokens, labels));
    }
}

static void close_evaluation(struct evaluation *evaluation) {
    free(evaluation->tokens);
    free(evaluation->labels);
    retrofit_data_close(evaluation->data);
}

// Sums over all tokens at one r.
struct decoding {
    double loss, full_loss;      // token by token through the cache; by a full pass over each row
    double recurrences, seconds; // that tokens took; of decoding alone
    size_t labels;               // that count in the losses
};

// b rows token by token.
static void decode_rows(const struct evaluation *evaluation, retrofit_buffers *buffers, size_t b,
                        size_t r, struct decoding *sums) {
    size_t T = evaluation->T;
    retrofit_recurrence_options recurrence = recurrence_options(r);
    int32_t *next = new_array(b, sizeof *next);
    double began = retrofit_seconds();
    retrofit_clear_cache(buffers);
    for (size_t t = 0; t < T; t++) {
        show_progress((double)(b * t) / (double)T);
        for (size_t i = 0; i < b; i++) next[i] = evaluation->tokens[i * T + t];
        const float *logits = retrofit_next_logits(buffers, next, b, 1, NULL, &recurrence);
        require(logits != NULL);
        for (size_t i = 0; i < b; i++) {
            int32_t label = evaluation->labels[i * T + t];
            bool counts = label != RETROFIT_IGNORED;
            if (counts) sums->loss += token_loss(logits + i * model->config.vocab, label);
            sums->labels += counts;
            sums->recurrences += buffers->decoder->used[i];
        }
    }
    sums->seconds += retrofit_seconds() - began;
    free(next);
}

// The same rows by a full pass over each.
static void full_pass_rows(const struct evaluation *evaluation, retrofit_buffers *buffers, size_t b,
                           size_t r, struct decoding *sums) {
    size_t T = evaluation->T;
    for (size_t i = 0; i < b; i++) {
        const int32_t *tokens = evaluation->tokens + i * T, *labels = evaluation->labels + i * T;
        require(retrofit_forward(buffers, tokens, 1, T, start_sigma(), options.seed, r, 0));
        double counted = (double)retrofit_count_labels(labels, T);
        sums->full_loss += retrofit_loss(buffers, labels, 0) * counted;
    }
}

// Token by token through the KV cache, with the exits and the cache that are to be judged.
// How the numbers of --eval begin and end as JSON, and what each of --recurrences has in any case.
static void print_eval_begin(size_t rows, size_t T) {
    printf("{\"eval\":");
    retrofit_json_write_string(stdout, options.eval, strlen(options.eval));
    printf(",\"rows\":%zu,\"tokens\":%zu,\"results\":[", rows, T);
}

static void print_eval_loss(size_t r, double loss, double seconds, bool first) {
    printf("%s{\"recurrences\":%zu,\"loss\":", first ? "" : ",", r);
    print_json_number(loss);
    printf(",\"perplexity\":");
    print_json_number(exp(loss));
    printf(",\"seconds\":%.3f", seconds);
}

// Sums over n tokens.
static void print_decoding(size_t r, const struct decoding *sums, double n, size_t cache_bytes,
                           bool first) {
    double labels = (double)sums->labels, mean = sums->recurrences / n;
    double loss = sums->loss / labels, full_loss = sums->full_loss / labels;
    if (!options.json) {
        printf("%11zu %10.4f %12.3f %12.4f %12.2f %14zu %9.2f\n", r, loss, exp(loss), full_loss,
               mean, cache_bytes, sums->seconds);
        return;
    }
    print_eval_loss(r, loss, sums->seconds, first);
    printf(",\"full_pass_loss\":");
    print_json_number(full_loss);
    printf(",\"mean_recurrences\":%.4f,\"cache_bytes_per_token\":%zu}", mean, cache_bytes);
}

static void evaluate_decoding(void) {
    struct depth_list depths = read_depths(MAX_DEPTHS, "1,2,4,8,16,32");
    struct evaluation evaluation = open_evaluation();
    size_t T = evaluation.T, rows = evaluation.rows, total = depths.count * rows, b;
    // Recurrences that share slots overwrite what a row that stopped early wrote: row by row then.
    bool alone = options.exit && cache_options(T, 1).kind != RETROFIT_CACHE_FULL;
    size_t B = alone ? 1 : retrofit_min(rows, options.batch_size);
    retrofit_buffers *whole = new_buffers(1, T, NULL);
    allocate_rows(&evaluation, B);
    if (options.json) print_eval_begin(rows, T);
    else
        printf("%11s %10s %12s %12s %12s %14s %9s   (%zu rows of %zu tokens)\n", "recurrences",
               "loss", "perplexity", "by full pass", "recurrences", "KV bytes/token", "seconds",
               rows, T);
    begin_progress("rows", total);
    for (size_t i = 0; i < depths.count; i++) {
        size_t r = depths.r[i];
        retrofit_kv_cache cache = cache_options(T, r);
        retrofit_buffers *buffers = new_buffers(B, 1, &cache);
        struct decoding sums = {0};
        for (size_t at = 0; at < rows; at += b) {
            b = retrofit_min(B, rows - at);
            read_rows(&evaluation, at, b);
            decode_rows(&evaluation, buffers, b, r, &sums);
            full_pass_rows(&evaluation, whole, b, r, &sums);
            advance_progress(b);
        }
        double n = (double)(rows * T);
        retrofit_live_line(NULL);
        print_decoding(r, &sums, n, retrofit_cache_bytes(buffers), i == 0);
        flush_output();
        retrofit_buffers_free(buffers);
    }
    if (options.json) printf("]}\n");
    close_evaluation(&evaluation);
    retrofit_buffers_free(whole);
}

// b rows at every r of the list: one pass of states, of which the coda reads s_r at each r. Adds
// the sum of the losses, and the seconds that a pass at this r alone would take.
static void evaluate_rows(const struct evaluation *evaluation, retrofit_buffers *buffers, size_t b,
                          uint64_t seed, const struct depth_list *depths, double *loss,
                          double *seconds) {
    const size_t *r = depths->r;
    retrofit_recurrence_options recurrence = recurrence_options(r[depths->count - 1]);
    double counted = (double)retrofit_count_labels(evaluation->labels, b * evaluation->T);
    double began = retrofit_seconds(), coda = 0;
    require(retrofit_prelude(buffers, evaluation->tokens, b, evaluation->T));
    if (r[0] > 0) retrofit_init_state(buffers, start_sigma(), seed);
    for (size_t i = 0; i < depths->count; i++) {
        retrofit_recur_noisy(buffers, &recurrence, r[i] - (i ? r[i - 1] : 0));
        double before = retrofit_seconds();
        retrofit_coda(buffers);
        loss[i] += retrofit_loss(buffers, evaluation->labels, 0) * counted;
        seconds[i] += retrofit_seconds() - began - coda;
        show_progress((double)b * (double)(i + 1) / (double)(depths->count + 1));
        coda += retrofit_seconds() - before;
    }
}

static void evaluate_full_pass(void) {
    struct depth_list depths = read_depths(MAX_DEPTHS, "1,2,4,8,16,32");
    struct evaluation evaluation = open_evaluation();
    size_t T = evaluation.T, rows = evaluation.rows, B = retrofit_min(rows, 1 + 1024 / T), b;
    size_t labels = 0; // that count
    retrofit_buffers *buffers = new_buffers(B, T, NULL);
    allocate_rows(&evaluation, B);
    double loss[MAX_DEPTHS] = {0}, seconds[MAX_DEPTHS] = {0};
    begin_progress("rows", rows);
    for (size_t at = 0; at < rows; at += b) {
        b = retrofit_min(B, rows - at);
        uint64_t seed = retrofit_hash(options.seed, at);
        read_rows(&evaluation, at, b);
        evaluate_rows(&evaluation, buffers, b, seed, &depths, loss, seconds);
        labels += retrofit_count_labels(evaluation.labels, b * T);
        advance_progress(b);
    }
    if (options.json) print_eval_begin(rows, T);
    else
        printf("%11s %10s %12s %9s   (%zu rows of %zu tokens)\n", "recurrences", "loss",
               "perplexity", "seconds", rows, T);
    for (size_t i = 0; i < depths.count; i++) {
        double mean = loss[i] / (double)labels;
        if (options.json) print_eval_loss(depths.r[i], mean, seconds[i], i == 0);
        if (options.json) putchar('}');
        else printf("%11zu %10.4f %12.3f %9.2f\n", depths.r[i], mean, exp(mean), seconds[i]);
    }
    if (options.json) printf("]}\n");
    close_evaluation(&evaluation);
    retrofit_buffers_free(buffers);
}

static void run_eval(void) {
    bool decoding = options.kv_cache || options.kv_bf16 || options.exit || options.continuous;
    if (decoding) evaluate_decoding();
    else evaluate_full_pass();
}

// ---- Mode: tasks -------------------------------------------------------------------------------
// As lm-evaluation-harness 0.4.13 does them; doc/inference.md says which format is which of its
// tasks, and what differs.

// One a line, all of one kind:
//   {"prompt", "answer"[, "hops"]}       does greedy decoding give the answer exactly?
//   {"prompt", "choices", "answer": 1}   is this choice the likeliest of all, as it is (acc) and
//                                        per character (acc_norm)?
//   {"prompt", "target"}                 is the target where --answer-regex finds an answer?
enum task_kind { EXACT, CHOICE, TARGET };
enum { MAX_HOPS = 15 };

// A prompt and what may follow it: the answer, or one of the choices.
struct continuation {
    int32_t *ids;         // [count] of both
    size_t count, prompt; // prompt: ids before the first one of what follows
    size_t characters;    // of what follows, without a space between the two
    size_t measured;      // which of the likelihoods is its own: equal ones share theirs
};

struct task {
    size_t first, choices; // its continuations; their number
    size_t answer;         // which of them is right
    size_t hops;           // a column of the table; 0 if the line names none
};

static struct {
    enum task_kind kind;
    size_t count;
    struct task *tasks;                 // [count], but where they have targets:
    struct sequence *targets;           // [count]
    struct continuation *continuations; // [continuation_count] of all tasks
    size_t continuation_count;
    size_t merged;                // of them those that begin inside a token of the prompt
    size_t by_hops[MAX_HOPS + 1]; // tasks of so many hops
    size_t max_hops;
} task_set;

// Sums over all tasks at one r.
struct score {
    double loss;                  // per token of the right answers, over the number of tasks
    size_t right, right_per_character;
    size_t hops[MAX_HOPS + 1];    // right ones of so many hops
    size_t cut;                   // generated texts that --max-tokens or the context cut off
};

static bool is_filled(const retrofit_json *json) {
    return json && json->type == RETROFIT_JSON_STRING && json->length > 0;
}

// The token that an empty prompt stands for; -1 if there is none.
static int32_t first_token(void) {
    int32_t bos = retrofit_tokenizer_bos(tokenizer);
    if (bos >= 0) return bos;
    return end_count ? end_tokens[0] : -1;
}

// Whether text begins with that token, written out: then the tokenizer is not to add it again.
static bool has_first_token(const char *text, size_t size) {
    size_t length;
    int32_t id = first_token();
    if (id < 0) return false;
    char *token = require_pointer(retrofit_decode(tokenizer, &id, 1, false, &length));
    bool found = length > 0 && length <= size && !memcmp(text, token, length);
    free(token);
    return found;
}

// The ids of a text that others may follow: without an end of text.
static int32_t *encode_open_text(const char *text, size_t size, bool with_special, size_t *count) {
    int32_t *ids = require_pointer(retrofit_encode(tokenizer, text, size, with_special, count));
    bool ended = with_special && *count > 0 &&
                 retrofit_tokenizer_adds_at_end(tokenizer, ids[*count - 1]);
    if (!ended) return ids;
    retrofit_note("%s: the end of text that the tokenizer puts behind every text is left out",
                  options.tasks);
    --*count;
    return ids;
}

static size_t count_characters(const char *text, size_t size) {
    size_t count = 0;
    uint32_t character;
    for (size_t at = 0; at < size; at += retrofit_utf8_next(text + at, size - at, &character))
        count++;
    return count;
}

// Puts the token of an empty prompt before the ids, if it is not there.
static void begin_with_first_token(struct continuation *both, const char *where) {
    int32_t id = first_token();
    both->prompt = 1;
    if (both->count > 0 && both->ids[0] == id) return;
    if (id < 0)
        die(1, "%s: the prompt is empty, and the tokenizer names no token that begins or ends a "
               "text and could stand for it", where);
    int32_t *ids = new_array(both->count + 1, sizeof *ids);
    ids[0] = id;
    memcpy(ids + 1, both->ids, both->count * sizeof *ids);
    free(both->ids);
    both->ids = ids;
    both->count++;
}

// Prompt and answer are encoded together, and what is behind as many ids as the prompt alone has is
// the answer's. White space at the prompt's end is the answer's too: a tokenizer puts a space and
// the word behind it into one token.
static void read_continuation(const retrofit_json *prompt, const retrofit_json *answer,
                              const char *where) {
    size_t size = prompt->length + answer->length, context = model->config.context;
    char *text = new_array(size, 1);
    memcpy(text, prompt->string, prompt->length);
    memcpy(text + prompt->length, answer->string, answer->length);
    bool space = answer->string[0] == ' ', special = !has_first_token(text, size);
    struct continuation both = {0};
    both.characters = count_characters(answer->string + space, answer->length - space);
    both.ids = encode_open_text(text, size, special, &both.count);

    size_t prompt_size = retrofit_size_without_spaces(text, prompt->length);
    int32_t *alone = encode_open_text(text, prompt_size, special, &both.prompt);
    size_t common = retrofit_min(both.prompt, both.count);
    task_set.merged += memcmp(alone, both.ids, common * sizeof *alone) != 0;
    if (both.prompt == 0) begin_with_first_token(&both, where);
    free(alone);
    free(text);
    if (both.prompt >= both.count)
        die(1, "%s: no token of the answer follows those of the prompt: it becomes part of the "
               "prompt's last token; begin it with a space, or end the prompt with one", where);
    if (both.count - 1 > context) // the last token is not fed
        die(1, "%s: a task of %zu tokens, the model's context is %zu: shorten the prompt", where,
            both.count, context);

    size_t n = task_set.continuation_count++;
    task_set.continuations = grow_array(task_set.continuations, n, sizeof both);
    task_set.continuations[n] = both;
}

static void read_choices(const retrofit_json *line, const char *where, struct task *task) {
    const retrofit_json *prompt = retrofit_json_get(line, "prompt");
    const retrofit_json *choices = retrofit_json_get(line, "choices");
    for (const retrofit_json *choice = choices->child; choice; choice = choice->next) {
        bool space = is_filled(choice) && choice->length == 1 && *choice->string == ' ';
        if (!is_filled(choice) || space) die(1, "%s: a choice is no string, or empty", where);
        read_continuation(prompt, choice, where);
        task->choices++;
    }
}

// A task with an answer or choices; `kind` says which.
static void read_answer(const retrofit_json *line, const char *where, enum task_kind kind) {
    const retrofit_json *prompt = retrofit_json_get(line, "prompt");
    const retrofit_json *answer = retrofit_json_get(line, "answer");
    const retrofit_json *choices = retrofit_json_get(line, "choices");
    const retrofit_json *hops = retrofit_json_get(line, "hops");
    struct task task = {.first = task_set.continuation_count};
    bool has_prompt = prompt && prompt->type == RETROFIT_JSON_STRING;
    if (!has_prompt || (kind == EXACT && !is_filled(answer)))
        die(1, "%s: needs a string \"prompt\" and a string \"answer\" that is not empty, "
               "\"choices\" or a \"target\"", where);
    if (kind == CHOICE) {
        size_t count = choices->type == RETROFIT_JSON_ARRAY ? choices->count : 0;
        bool ok = count >= 2 && retrofit_json_size(answer, &task.answer) && task.answer < count;
        if (!ok)
            die(1, "%s: needs at least two \"choices\", and in \"answer\" which of them, from 0, "
                   "is right", where);
    }
    if (hops && (!retrofit_json_size(hops, &task.hops) || task.hops > MAX_HOPS))
        die(1, "%s: \"hops\" is not a number from 0 to %d", where, MAX_HOPS);
    if (kind == CHOICE) read_choices(line, where, &task);
    else read_continuation(prompt, answer, where);
    if (kind == EXACT) task.choices = 1;

    size_t n = task_set.count++;
    task_set.tasks = grow_array(task_set.tasks, n, sizeof task);
    task_set.tasks[n] = task;
    task_set.by_hops[task.hops]++;
    task_set.max_hops = retrofit_max(task_set.max_hops, task.hops);
}

// What the harness' gsm8k compares: without white space around it, without commas and dollars, with
// nothing up to the last "#### ", without a dot at the end, in small letters.
static retrofit_text normalize_answer(const char *text, size_t size) {
    retrofit_text answer = {0};
    retrofit_strip(&text, &size);
    for (size_t i = 0; i < size; i++) {
        char c = (char)tolower((unsigned char)text[i]);
        if (c != ',' && c != '$') retrofit_text_append(&answer, &c, 1);
        bool marked = answer.size >= 5 && !memcmp(answer.bytes + answer.size - 5, "#### ", 5);
        if (marked) answer.size = 0;
    }
    if (answer.size > 0 && answer.bytes[answer.size - 1] == '.') answer.size--;
    require(!answer.failed);
    return answer;
}

// A task with a target; takes the line.
static void read_target(retrofit_json *line, const char *where) {
    const retrofit_json *target = retrofit_json_get(line, "target");
    if (!is_filled(target)) die(1, "%s: \"target\" is no string, or empty", where);
    retrofit_text normal = normalize_answer(target->string, target->length);
    if (normal.size == 0)
        die(1, "%s: nothing is left of \"target\" to compare answers with", where);
    free(normal.bytes);
    size_t n = task_set.count++;
    task_set.targets = grow_array(task_set.targets, n, sizeof *task_set.targets);
    task_set.targets[n] = read_sequence(line, where, n);
    const struct sequence *sequence = &task_set.targets[n];
    bool twice = sequence->count > 1 && sequence->ids[0] == sequence->ids[1] &&
                 sequence->ids[0] == retrofit_tokenizer_bos(tokenizer);
    if (twice)
        retrofit_note("%s: prompts begin with the token that begins a text, which the tokenizer "
                      "adds once more: leave it out", options.tasks);
}

// Takes the line.
static void read_task(retrofit_json *line, const char *where) {
    enum task_kind kind = EXACT;
    const retrofit_json *list = retrofit_json_get(line, "choices");
    bool target = retrofit_json_get(line, "target");
    bool choices = list && list->type != RETROFIT_JSON_NULL;
    if (target) kind = TARGET;
    if (choices) kind = CHOICE;
    if (target && choices)
        die(1, "%s: \"choices\" or a \"target\", not both: a task is of one kind", where);
    if (task_set.count > 0 && kind != task_set.kind)
        die(1, "%s: another kind of task than in the lines before: a file has one", where);
    task_set.kind = kind;
    if (kind == TARGET) {
        note_unread_of_prompt(line, options.tasks, "target");
        read_target(line, where);
        return;
    }
    note_unread(line, options.tasks,
                (const char *[]){"prompt", "answer", "hops", "id", choices ? "choices" : NULL,
                                 NULL});
    read_answer(line, where, kind);
    retrofit_json_free(line);
}

// What belongs to generated text does nothing for tasks in which none is generated.
static void check_task_options(void) {
    bool target = task_set.kind == TARGET;
    bool drawn = options.temperature > 0 || options.top_k > 0 || options.top_p < 1 ||
                 options.min_p > 0;
    if (target && !options.answer_regex)
        die(2, "%s: a \"target\" is looked for with --answer-regex", options.tasks);
    if (!target && options.answer_regex)
        die(2, "%s: --answer-regex goes with a \"target\"", options.tasks);
    if (!target && options.chat)
        die(2, "%s: --chat goes with a \"target\", not with these tasks", options.tasks);
    if (!target && options.stop)
        die(2, "%s: --stop goes with a \"target\", not with these tasks", options.tasks);
    if (!target && drawn)
        die(2, "%s: --temperature, --top-k, --top-p and --min-p go with a \"target\", not with "
               "these tasks", options.tasks);
}

static void read_tasks(void) {
    struct json_lines lines = open_lines(options.tasks);
    while (options.rows == 0 || task_set.count < options.rows) {
        retrofit_json *line = next_line(&lines);
        if (!line) break;
        read_task(line, lines.where);
    }
    close_lines(&lines);
    if (task_set.count == 0) die(1, "%s: no tasks in it", options.tasks);
    check_task_options();
    if (task_set.merged)
        retrofit_note("%s: %zu of %zu answers or choices begin inside a token of the prompt, of "
                      "which the likelihood says nothing: begin them with a space, or end the "
                      "prompt with one", options.tasks, task_set.merged,
                      task_set.continuation_count);
}

static void free_tasks(void) {
    for (size_t i = 0; i < task_set.continuation_count; i++) free(task_set.continuations[i].ids);
    for (size_t i = 0; task_set.targets && i < task_set.count; i++)
        free_sequence(&task_set.targets[i]);
    free(task_set.tasks);
    free(task_set.targets);
    free(task_set.continuations);
}

// ---- Tasks with answers and choices ------------------------------------------------------------

// Greedy decoding gives an answer exactly when each of its tokens is the likeliest behind the ones
// before it: one pass over prompt and answer decides that, and for every r at once. So it does for
// the likelihoods of choices. What that pass says of a continuation at one r:
struct likelihood {
    double loss;    // summed over the tokens behind the prompt
    bool likeliest; // is each of these tokens the likeliest?
};

// row: of the continuation in a batch of `columns` tokens a row; logits: scratch (T,V).
static struct likelihood measure_likelihood(retrofit_buffers *buffers,
                                            const struct continuation *continuation, size_t row,
                                            size_t columns, float *logits) {
    size_t V = model->config.vocab, first = continuation->prompt;
    size_t count = continuation->count - first;
    struct likelihood result = {0, true};
    retrofit_logits(buffers, row * columns + first - 1, count, logits);
    for (size_t i = 0; i < count; i++) {
        int32_t id = continuation->ids[first + i];
        if (retrofit_argmax(logits + i * V, V) != id) result.likeliest = false;
        result.loss += token_loss(logits + i * V, id);
    }
    check_computed(&(float){(float)result.loss}, 1);
    return result;
}

// The longest first, and equal ones side by side.
static int compare_continuations(const void *x, const void *y) {
    const struct continuation *a = *(struct continuation *const *)x;
    const struct continuation *b = *(struct continuation *const *)y;
    if (a->count != b->count) return a->count < b->count ? 1 : -1;
    if (a->prompt != b->prompt) return a->prompt < b->prompt ? -1 : 1;
    return memcmp(a->ids, b->ids, a->count * sizeof *a->ids);
}

// Different continuations (*count), to be freed, in an order that is not that of the file. Sums
// round differently in batches of other shapes, and equal choices must be equally likely to the
// last bit wherever they stand: so they are measured once.
static struct continuation **different_continuations(size_t *count) {
    size_t n = task_set.continuation_count;
    struct continuation **order = new_array(n, sizeof *order);
    for (size_t i = 0; i < n; i++) order[i] = &task_set.continuations[i];
    qsort(order, n, sizeof *order, compare_continuations);
    *count = 0;
    for (size_t i = 0; i < n; i++) {
        bool again = *count > 0 && !compare_continuations(&order[*count - 1], &order[i]);
        struct continuation *continuation = order[i];
        if (!again) order[(*count)++] = continuation;
        continuation->measured = *count - 1;
    }
    return order;
}

// Rows of a batch: all tokens but each one's last, which nothing follows. What is behind a row's
// end is padding, and no earlier token sees it.
static void fill_rows(int32_t *tokens, struct continuation *const *batch, size_t b,
                      size_t columns) {
    memset(tokens, 0, b * columns * sizeof *tokens);
    for (size_t i = 0; i < b; i++)
        memcpy(tokens + i * columns, batch[i]->ids, (batch[i]->count - 1) * sizeof *tokens);
}

// The likelihoods (depths,n) of the n different continuations, to be freed. All rows begin from the
// same states: others for each row would favour some choices by chance.
static struct likelihood *measure_all(const struct depth_list *depths, size_t *count) {
    struct continuation **different = different_continuations(count);
    size_t n = *count, T = different[0]->count - 1, B = retrofit_min(n, 1 + 4096 / T), b;
    const size_t *r = depths->r;
    retrofit_buffers *buffers = new_buffers(B, T, NULL);
    buffers->alike = true;
    retrofit_recurrence_options recurrence = recurrence_options(r[depths->count - 1]);
    int32_t *tokens = new_array(B * T, sizeof *tokens);
    float *logits = new_array(T * model->config.vocab, sizeof *logits);
    struct likelihood *likelihoods = new_array(depths->count * n, sizeof *likelihoods);

    begin_progress("texts", n);
    for (size_t at = 0; at < n; at += b) {
        struct continuation *const *batch = different + at;
        b = retrofit_min(B, n - at);
        size_t columns = batch[0]->count - 1; // the longest is the first
        fill_rows(tokens, batch, b, columns);
        require(retrofit_prelude(buffers, tokens, b, columns));
        if (r[0] > 0) retrofit_init_state(buffers, start_sigma(), options.seed);
        for (size_t j = 0; j < depths->count; j++) {
            struct likelihood *to = likelihoods + j * n + at;
            retrofit_recur_noisy(buffers, &recurrence, r[j] - (j ? r[j - 1] : 0));
            retrofit_coda(buffers);
            for (size_t i = 0; i < b; i++)
                to[i] = measure_likelihood(buffers, batch[i], i, columns, logits);
            show_progress((double)b * (double)(j + 1) / (double)(depths->count + 1));
        }
        advance_progress(b);
    }
    free(different);
    free(tokens);
    free(logits);
    retrofit_buffers_free(buffers);
    return likelihoods;
}

// Which choice has the least loss, in all or per character; the first of equals. likelihoods: at
// one r.
static size_t best_choice(const struct task *task, const struct likelihood *likelihoods,
                          bool per_character) {
    const struct continuation *choices = task_set.continuations + task->first;
    size_t best = 0;
    double min = INFINITY;
    for (size_t i = 0; i < task->choices; i++) {
        double loss = likelihoods[choices[i].measured].loss;
        if (per_character) loss /= (double)choices[i].characters;
        if (!(loss < min)) continue;
        best = i;
        min = loss;
    }
    return best;
}

// Adds a task; likelihoods: at one r.
static void score_task(const struct task *task, const struct likelihood *likelihoods,
                       struct score *score) {
    const struct continuation *answer = &task_set.continuations[task->first + task->answer];
    const struct likelihood *likelihood = &likelihoods[answer->measured];
    double tokens = (double)(answer->count - answer->prompt);
    bool right = likelihood->likeliest;
    if (task_set.kind == CHOICE) right = best_choice(task, likelihoods, false) == task->answer;
    score->right += right;
    score->hops[task->hops] += right;
    score->right_per_character += best_choice(task, likelihoods, true) == task->answer;
    score->loss += likelihood->loss / tokens / (double)task_set.count;
}

// Of equal choices the first counts, so that a right one behind another like it cannot win.
static void note_equal_choices(void) {
    size_t hopeless = 0;
    for (size_t i = 0; i < task_set.count; i++) {
        const struct task *task = &task_set.tasks[i];
        const struct continuation *choices = task_set.continuations + task->first;
        size_t first = 0;
        while (choices[first].measured != choices[task->answer].measured) first++;
        hopeless += first < task->answer;
    }
    if (hopeless)
        retrofit_note("%s: in %zu of %zu tasks the right choice equals one before it, which "
                      "counts instead", options.tasks, hopeless, task_set.count);
}

static void score_answers(const struct depth_list *depths, struct score *scores) {
    size_t different;
    struct likelihood *likelihoods = measure_all(depths, &different);
    note_equal_choices();
    for (size_t j = 0; j < depths->count; j++) {
        for (size_t i = 0; i < task_set.count; i++)
            score_task(&task_set.tasks[i], likelihoods + j * different, &scores[j]);
    }
    free(likelihoods);
}

// ---- Regular expressions: --answer-regex -------------------------------------------------------
// The harness' are Python's, ours are done by POSIX: what both have is translated so that it means
// what it means there, what POSIX has not is refused. POSIX functions compare bytes, so a character
// beyond ASCII becomes a group. One difference stays: of alternatives that match at one place
// POSIX takes the longest, Python the first.

struct translation {
    const char *at;       // what is left to translate
    retrofit_text posix;  // what it is for regcomp
    retrofit_text groups; // for each group of posix whether it is one of the user's
    size_t depth;         // groups that are open
    bool quantifiable;    // whether a quantifier may follow
};

// Characters of which one matches.
struct character_set {
    bool ascii[128];
    bool others;         // all beyond ASCII
    retrofit_text words; // those of them that are named, each behind a |
};

static struct {
    regex_t regex;
    retrofit_text groups; // as in a translation
    regmatch_t *match;    // the whole match, and each group
} answer_regex;

__attribute__((noreturn)) static void refuse_regex(const struct translation *translation,
                                                   const char *what) {
    die(2, "--answer-regex: %s: '%.32s'", what, translation->at);
}

static void append_group(struct translation *translation, bool users) {
    append_string(&translation->posix, "(");
    retrofit_text_append(&translation->groups, users ? "\1" : "\0", 1);
}

// [...] of bytes. A ] must come first in it, a - first or last, a ^ not first.
static void append_bytes(retrofit_text *text, const bool bytes[256]) {
    size_t count = 0;
    for (size_t i = 0; i < 256; i++) count += bytes[i];
    if (count == 1 && bytes['^']) {
        append_string(text, "\\^");
        return;
    }
    append_string(text, "[");
    if (bytes[']']) append_string(text, "]");
    else if (bytes['-']) append_string(text, "-");
    for (size_t i = 1; i < 256; i++) {
        bool special = i == ']' || i == '-' || i == '^' || i == '[';
        if (bytes[i] && !special) retrofit_text_append(text, &(char){(char)i}, 1);
    }
    if (bytes['[']) append_string(text, "[");
    if (bytes['^']) append_string(text, "^");
    if (bytes[']'] && bytes['-']) append_string(text, "-");
    append_string(text, "]");
}

// What matches one character of the set. UTF-8 has a character beyond ASCII as a byte from c2 to f4
// with others from 80 to bf behind it; of these all are taken, since nothing else begins with one.
static void append_set(struct translation *translation, const struct character_set *set) {
    retrofit_text *posix = &translation->posix;
    bool ascii[256] = {false}, leading[256] = {false}, following[256] = {false}, any = false;
    for (size_t i = 1; i < 128; i++) {
        ascii[i] = set->ascii[i];
        any = any || ascii[i];
    }
    for (size_t i = 0x80; i < 0x100; i++) {
        leading[i] = i >= 0xc2 && i <= 0xf4;
        following[i] = i < 0xc0;
    }
    bool group = set->others || set->words.size;
    if (!any && !group) refuse_regex(translation, "a set with no character in it before");
    if (group) append_group(translation, false);
    if (any) append_bytes(posix, ascii);
    if (any && set->others) append_string(posix, "|");
    if (set->others) {
        append_bytes(posix, leading);
        append_bytes(posix, following);
        append_string(posix, "+");
    } else if (group) {
        size_t skip = !any; // the first |
        retrofit_text_append(posix, set->words.bytes + skip, set->words.size - skip);
    }
    if (group) append_string(posix, ")");
}

// Characters of ASCII for which `is` holds, or with `not` all for which it does not.
static void add_class(struct character_set *set, int (*is)(int), bool not) {
    for (int i = 1; i < 128; i++) {
        if (!is(i) == not) set->ascii[i] = true;
    }
    set->others = set->others || not;
}

static int is_word_character(int c) { return isalnum(c) || c == '_'; }

// Takes \d \D \s \S \w or \W; false if something else comes.
static bool add_escaped_class(struct translation *translation, struct character_set *set) {
    if (translation->at[0] != '\\') return false;
    char name = translation->at[1];
    if (name == 'd' || name == 'D') add_class(set, isdigit, name == 'D');
    else if (name == 's' || name == 'S') add_class(set, isspace, name == 'S');
    else if (name == 'w' || name == 'W') add_class(set, is_word_character, name == 'W');
    else return false;
    translation->at += 2;
    return true;
}

// Takes a class of POSIX like [:digit:], inside brackets; false if something else comes.
static bool add_named_class(struct translation *translation, struct character_set *set) {
    static const struct {
        const char *name;
        int (*is)(int);
    } classes[] = {
        {"[:alnum:]", isalnum}, {"[:alpha:]", isalpha}, {"[:blank:]", isblank},
        {"[:cntrl:]", iscntrl}, {"[:digit:]", isdigit}, {"[:graph:]", isgraph},
        {"[:lower:]", islower}, {"[:print:]", isprint}, {"[:punct:]", ispunct},
        {"[:space:]", isspace}, {"[:upper:]", isupper}, {"[:xdigit:]", isxdigit},
    };
    for (size_t i = 0; i < sizeof classes / sizeof *classes; i++) {
        size_t length = strlen(classes[i].name);
        if (strncmp(translation->at, classes[i].name, length)) continue;
        translation->at += length;
        add_class(set, classes[i].is, false);
        return true;
    }
    return false;
}

// Takes a character, be it escaped or not.
static uint32_t read_character(struct translation *translation) {
    static const char names[] = "ntrfva", values[] = "\n\t\r\f\v\a";
    const char *at = translation->at;
    uint32_t character;
    if (*at != '\\') {
        size_t length = retrofit_utf8_next(at, strlen(at), &character);
        if (character == RETROFIT_UTF8_INVALID) refuse_regex(translation, "not UTF-8");
        translation->at += length;
        return character;
    }
    unsigned char escaped = (unsigned char)at[1];
    const char *name = escaped ? strchr(names, escaped) : NULL;
    if (isdigit(escaped)) refuse_regex(translation, "references to groups are not supported");
    if (!name && !ispunct(escaped) && escaped != ' ')
        refuse_regex(translation, "not supported behind a \\");
    translation->at += 2;
    return (unsigned char)(name ? values[name - names] : escaped);
}

// Takes what stands in brackets for one or more characters.
static void add_members(struct translation *translation, struct character_set *set) {
    if (add_escaped_class(translation, set) || add_named_class(translation, set)) return;
    const char *begin = translation->at;
    uint32_t from = read_character(translation), to = from;
    size_t length = (size_t)(translation->at - begin);
    if (from >= 128) {
        append_string(&set->words, "|");
        retrofit_text_append(&set->words, begin, length);
    }
    bool range = translation->at[0] == '-' && translation->at[1] && translation->at[1] != ']';
    if (range) {
        translation->at++;
        to = read_character(translation);
        if (from >= 128 || to >= 128 || from > to) {
            translation->at = begin;
            refuse_regex(translation, "a range that falls or leaves ASCII");
        }
    }
    for (uint32_t i = from; i <= to && i < 128; i++) set->ascii[i] = true;
}

// [...] or [^...]
static void translate_brackets(struct translation *translation) {
    struct character_set set = {0};
    const char *begin = translation->at++;
    bool negated = *translation->at == '^';
    translation->at += negated;
    const char *first = translation->at;
    while (translation->at == first || *translation->at != ']') {
        if (*translation->at) {
            add_members(translation, &set);
            continue;
        }
        translation->at = begin;
        refuse_regex(translation, "a [ without its ]");
    }
    translation->at++;
    if (negated && set.words.size) {
        translation->at = begin;
        refuse_regex(translation, "[^...] with characters beyond ASCII is not supported");
    }
    for (size_t i = 1; negated && i < 128; i++) set.ascii[i] = !set.ascii[i];
    if (negated) set.others = !set.others;
    append_set(translation, &set);
    free(set.words.bytes);
}

// ( or (?:
static void translate_group(struct translation *translation) {
    bool counts = translation->at[1] != '?';
    if (!counts && translation->at[2] != ':')
        refuse_regex(translation, "of the groups with a ? only (?:...) is supported");
    append_group(translation, counts);
    translation->at += counts ? 1 : 3;
    translation->depth++;
}

// How many bytes a quantifier has: *, +, ?, {m}, {m,}, {,n}, {m,n}; 0 if it is none.
static size_t quantifier_size(const char *at) {
    static const char digits[] = "0123456789";
    if (*at == '*' || *at == '+' || *at == '?') return 1;
    if (*at != '{' || at[1] == '}') return 0;
    size_t size = 1 + strspn(at + 1, digits);
    if (at[size] == ',') size += 1 + strspn(at + size + 1, digits);
    return at[size] == '}' ? size + 1 : 0;
}

static void translate_quantifier(struct translation *translation, size_t size) {
    const char *at = translation->at;
    if (!translation->quantifiable) refuse_regex(translation, "nothing to repeat before");
    if (quantifier_size(at + size)) {
        bool lazy = at[size] == '?', possessive = at[size] == '+';
        if (lazy) refuse_regex(translation, "no lazy quantifiers: for (.*?)x say ([^x]*)x");
        refuse_regex(translation, possessive ? "no possessive quantifiers" : "two quantifiers");
    }
    bool from_zero = at[0] == '{' && at[1] == ',';
    if (from_zero) append_string(&translation->posix, "{0");
    retrofit_text_append(&translation->posix, at + from_zero, size - from_zero);
    translation->at += size;
    translation->quantifiable = false;
}

// What stands for itself.
static void translate_character(struct translation *translation) {
    const char *begin = translation->at;
    uint32_t character = read_character(translation);
    if (character >= 128) {
        append_group(translation, false);
        retrofit_text_append(&translation->posix, begin, (size_t)(translation->at - begin));
        append_string(&translation->posix, ")");
        return;
    }
    char byte = (char)character;
    if (strchr(".[\\()*+?{|^$", byte)) append_string(&translation->posix, "\\");
    retrofit_text_append(&translation->posix, &byte, 1);
}

// Takes one part of the expression.
static void translate_part(struct translation *translation) {
    struct character_set set = {0};
    char c = *translation->at;
    size_t size = quantifier_size(translation->at);
    if (size) {
        translate_quantifier(translation, size);
        return;
    }
    translation->quantifiable = !strchr("(|^$", c);
    if (c == '[') {
        translate_brackets(translation);
    } else if (c == '(') {
        translate_group(translation);
    } else if (add_escaped_class(translation, &set)) {
        append_set(translation, &set);
    } else if (c == '.') { // no newline
        add_class(&set, iscntrl, false);
        add_class(&set, iscntrl, true);
        set.ascii['\n'] = false;
        append_set(translation, &set);
        translation->at++;
    } else if (c == ')' || c == '|' || c == '^' || c == '$') {
        if (c == ')' && translation->depth-- == 0) refuse_regex(translation, "a ) without its (");
        if (c == '$') append_string(&translation->posix, "\n?"); // a newline may end the text
        retrofit_text_append(&translation->posix, &c, 1);
        translation->at++;
    } else {
        translate_character(translation);
    }
}

static struct translation translate_regex(const char *regex) {
    struct translation translation = {.at = regex};
    while (*translation.at) translate_part(&translation);
    if (translation.depth) {
        translation.at = regex;
        refuse_regex(&translation, "a ( without its )");
    }
    retrofit_text_append(&translation.posix, "", 1);
    require(!translation.posix.failed && !translation.groups.failed);
    return translation;
}

static void compile_answer_regex(void) {
    char why[256];
    struct translation translation = translate_regex(options.answer_regex);
    regex_t *regex = &answer_regex.regex;
    int error = regcomp(regex, translation.posix.bytes, REG_EXTENDED);
    if (error) {
        regerror(error, regex, why, sizeof why);
        die(2, "--answer-regex: %s", why);
    }
    size_t groups = 0;
    for (size_t i = 0; i < translation.groups.size; i++) groups += translation.groups.bytes[i] != 0;
    if (groups == 0) die(2, "--answer-regex: put what is the answer into parentheses");
    if (!regexec(regex, "", 0, NULL, REG_NOTBOL))
        die(2, "--answer-regex: it matches an empty text, so that is its last match in every text");
    answer_regex.groups = translation.groups;
    answer_regex.match = new_array(translation.groups.size + 1, sizeof *answer_regex.match);
    free(translation.posix.bytes);
}

static void free_answer_regex(void) {
    regfree(&answer_regex.regex);
    free(answer_regex.groups.bytes);
    free(answer_regex.match);
}

// ---- Tasks with a target in generated text -----------------------------------------------------

// The first group of a match that is not empty; if there is none, it is.
static regmatch_t matched_group(void) {
    for (size_t i = 0; i < answer_regex.groups.size; i++) {
        regmatch_t group = answer_regex.match[i + 1];
        bool filled = group.rm_so >= 0 && group.rm_eo > group.rm_so;
        if (answer_regex.groups.bytes[i] && filled) return group;
    }
    return (regmatch_t){0};
}

// The answer in a text: of the last match. Its size is 0 if there is none.
static retrofit_text find_answer(const char *text) {
    const char *at = text, *answer = text;
    size_t size = 0, groups = answer_regex.groups.size + 1;
    for (;;) {
        int error = regexec(&answer_regex.regex, at, groups, answer_regex.match,
                            at > text ? REG_NOTBOL : 0);
        if (error == REG_NOMATCH) break;
        if (error) die(1, "--answer-regex: out of memory");
        regmatch_t whole = answer_regex.match[0], group = matched_group();
        answer = at + group.rm_so;
        size = (size_t)(group.rm_eo - group.rm_so);
        bool empty = whole.rm_eo == whole.rm_so;
        at += whole.rm_eo;
        uint32_t character;
        if (empty && !*at) break;
        if (empty) at += retrofit_utf8_next(at, strlen(at), &character);
    }
    return normalize_answer(answer, size);
}

static bool has_target(struct sequence *sequence) {
    const retrofit_json *target = retrofit_json_get(sequence->line, "target");
    char *text = sequence->text.bytes;
    if (!text) return false;
    for (size_t i = 0; i < sequence->text.size; i++) {
        if (text[i] == 0) text[i] = 1; // for regexec a NUL would end the text
    }
    retrofit_text expected = normalize_answer(target->string, target->length);
    retrofit_text answer = find_answer(text);
    bool right = answer.size == expected.size && !memcmp(answer.bytes, expected.bytes, answer.size);
    free(expected.bytes);
    free(answer.bytes);
    return right;
}

static void score_target(struct sequence *sequence, struct score *score) {
    score->right += has_target(sequence);
    score->cut += !strcmp(sequence->finish, "length");
}

static void note_cut_answers(size_t r, size_t cut) {
    if (cut)
        retrofit_note("%s: %zu of %zu answers at %zu recurrences were cut off by --max-tokens %zu "
                      "or the model's context, and are judged as they stand", options.tasks, cut,
                      task_set.count, r, options.max_tokens);
}

static void score_targets(const struct depth_list *depths, struct score *scores) {
    struct sequence *targets = task_set.targets;
    size_t count = task_set.count, total = depths->count * count, b;
    size_t B = retrofit_min(options.batch_size, count);
    retrofit_buffers *buffers = buffers_for(targets, count, B, depths->r[depths->count - 1]);
    begin_progress("answers", total);
    for (size_t j = 0; j < depths->count; j++) {
        for (size_t at = 0; at < count; at += b) {
            b = retrofit_min(B, count - at);
            retrofit_clear_cache(buffers);
            generate(buffers, targets + at, b, depths->r[j], false);
            for (size_t i = at; i < at + b; i++) {
                score_target(&targets[i], &scores[j]);
                free_text(&targets[i]);
            }
            advance_progress(b);
        }
        note_cut_answers(depths->r[j], scores[j].cut);
    }
    retrofit_buffers_free(buffers);
}

// ---- What tasks show ---------------------------------------------------------------------------

// A share of all tasks, p = right/n.
static double share(size_t right) { return (double)right / (double)task_set.count; }

// Its standard error, of a mean whose variance is estimated from the sample: √(p·(1 - p)/(n - 1)).
// One task has none.
static double share_error(size_t right) {
    double p = share(right);
    if (task_set.count < 2) return NAN;
    return sqrt(p * (1 - p) / (double)(task_set.count - 1));
}

static void print_table_head(void) {
    printf("%11s", "recurrences");
    if (task_set.kind != TARGET) printf(" %7s", "loss");
    printf(" %16s", "accuracy");
    if (task_set.kind == CHOICE) printf(" %14s", "acc_norm");
    if (task_set.max_hops > 0) printf("   hops 0");
    for (size_t hops = 1; hops <= task_set.max_hops; hops++) printf(" %4zu", hops);
    printf("\n");
}

static void print_share(size_t right) {
    if (task_set.count > 1) printf("  %.3f ± %.3f", share(right), share_error(right));
    else printf("  %.3f ± N/A  ", share(right));
}

static void print_table_line(size_t r, const struct score *score) {
    printf("%11zu", r);
    if (task_set.kind != TARGET) printf(" %7.4f", score->loss);
    print_share(score->right);
    if (task_set.kind == CHOICE) print_share(score->right_per_character);
    printf("  ");
    for (size_t hops = 0; task_set.max_hops > 0 && hops <= task_set.max_hops; hops++) {
        double count = (double)task_set.by_hops[hops];
        if (count == 0) printf("    -");
        else printf(hops ? " %4.2f" : "   %4.2f", (double)score->hops[hops] / count);
    }
    printf("  ");
    int bars = (int)(share(score->right) * 30 + 0.5);
    for (int i = 0; i < bars; i++) printf("█");
    printf("\n");
}

static void print_share_json(const char *name, size_t right) {
    printf(",\"%s\":%.7g,\"%s_stderr\":", name, share(right), name);
    print_json_number(share_error(right));
}

static void print_score_json(size_t r, const struct score *score) {
    printf("{\"recurrences\":%zu", r);
    if (task_set.kind != TARGET) {
        printf(",\"loss\":");
        print_json_number(score->loss);
    }
    print_share_json("acc", score->right);
    if (task_set.kind == CHOICE) print_share_json("acc_norm", score->right_per_character);
    if (task_set.kind == TARGET) printf(",\"cut\":%zu", score->cut);
    for (size_t hops = 0; task_set.max_hops > 0 && hops <= task_set.max_hops; hops++) {
        printf(hops ? "," : ",\"hops\":[");
        print_json_number((double)score->hops[hops] / (double)task_set.by_hops[hops]);
    }
    printf(task_set.max_hops > 0 ? "]}" : "}");
}

static void print_scores(const struct depth_list *depths, const struct score *scores) {
    if (!options.json) {
        print_table_head();
        for (size_t j = 0; j < depths->count; j++) print_table_line(depths->r[j], &scores[j]);
        return;
    }
    printf("{\"tasks\":");
    retrofit_json_write_string(stdout, options.tasks, strlen(options.tasks));
    printf(",\"count\":%zu,\"results\":[", task_set.count);
    for (size_t j = 0; j < depths->count; j++) {
        if (j) putchar(',');
        print_score_json(depths->r[j], &scores[j]);
    }
    printf("]}\n");
}

static void run_tasks(void) {
    struct depth_list depths = read_depths(MAX_DEPTHS, "1,2,4,8,16");
    struct score scores[MAX_DEPTHS] = {{0}};
    if (options.answer_regex) compile_answer_regex();
    read_tasks();
    if (task_set.kind == TARGET) score_targets(&depths, scores);
    else score_answers(&depths, scores);
    print_scores(&depths, scores);
    if (options.answer_regex) free_answer_regex();
    free_tasks();
}

// ---- Modes: logits and token ids ---------------------------------------------------------------

// The ids of --tokens.
static int32_t *read_token_ids(size_t *count) {
    int32_t *ids = new_array(strlen(options.tokens) + 1, sizeof *ids);
    const char *text = options.tokens;
    *count = 0;
    for (;;) {
        char *end;
        unsigned long id = strtoul(text, &end, 10);
        bool digit = *text >= '0' && *text <= '9';
        if (!digit || id > INT32_MAX) break;
        ids[*count] = (int32_t)id;
        ++*count;
        text = end;
        if (*text == 0) return ids;
        if (*text != ',') break;
        text++;
    }
    die(2, "--tokens: '%s' is not a list of token ids like 1,2,3", text);
}

static void run_logits(void) {
    size_t r = read_depth("--logits"), T, V = model->config.vocab;
    int32_t *ids = options.tokens ? read_token_ids(&T) : read_prompt(&T);
    if (T == 0) die(2, "--logits: the prompt is empty");
    retrofit_buffers *buffers = new_buffers(1, T, NULL);
    float *logits = new_array(T * V, sizeof *logits);
    require(retrofit_forward(buffers, ids, 1, T, start_sigma(), options.seed, r, 0));
    retrofit_logits(buffers, 0, T, logits);
    check_computed(logits, T * V);
    retrofit_tensor tensor = {"logits", RETROFIT_F32, 2, {T, V, 0, 0}, T * V, logits};
    char *path = require_pointer(retrofit_file_begin(options.logits));
    require(retrofit_safetensors_write(path, &retrofit_cpu, &tensor, 1, RETROFIT_F32, NULL));
    require(retrofit_file_commit(path, options.logits));
    free(path);
    free(ids);
    free(logits);
    retrofit_buffers_free(buffers);
}

static void run_print_tokens(void) {
    size_t count;
    int32_t *ids = read_prompt(&count);
    for (size_t i = 0; i < count; i++) printf(i ? " %d" : "%d", (int)ids[i]);
    printf("\n");
    free(ids);
}

// ---- The command's mode, and which options go together -----------------------------------------

enum { PROMPT, BATCH, INTERACTIVE, EVAL, TASKS, LOGITS, PRINT_TOKENS, MODES };

// With --tokens no mode needs a tokenizer or a prompt.
static const struct mode {
    void (*run)(void);
    bool needs_model, needs_tokenizer, needs_prompt, generates;
} modes[MODES] = {
    [PROMPT] = {run_prompt, true, true, true, true},
    [BATCH] = {run_batch, true, true, false, true},
    [INTERACTIVE] = {run_interactive, true, true, false, true},
    [EVAL] = {run_eval, true, false, false, false},
    [TASKS] = {run_tasks, true, true, false, true},
    [LOGITS] = {run_logits, true, true, true, false},
    [PRINT_TOKENS] = {run_print_tokens, false, true, true, false},
};

static const struct mode *find_mode(void) {
    if (options.batch) return &modes[BATCH];
    if (options.interactive) return &modes[INTERACTIVE];
    if (options.eval) return &modes[EVAL];
    if (options.tasks) return &modes[TASKS];
    if (options.logits) return &modes[LOGITS];
    if (options.print_tokens) return &modes[PRINT_TOKENS];
    return &modes[PROMPT];
}

// Something that a command line must not have, and what is said of it.
struct rule {
    bool broken;
    const char *message;
};

// The first rule that is broken ends the program. The last one's message is NULL.
static void check_rules(const struct rule *rule) {
    for (; rule->message; rule++) {
        if (rule->broken) die(2, "%s", rule->message);
    }
}

// Rules about modes, and then values that no mode takes.
static void check_mode(const struct mode *mode) {
    int given = options.interactive + options.print_tokens;
    given += options.batch != NULL;
    given += options.eval != NULL;
    given += options.tasks != NULL;
    given += options.logits != NULL;
    bool no_prompt = options.batch || options.interactive || options.eval || options.tasks;
    bool draws = options.top_k != 0 || options.top_p != 1 || options.min_p != 0;
    char noise[64];
    snprintf(noise, sizeof noise, "--noise %g: from 0 to 1e6", options.noise);
    if (options.noise_kind != NOT_GIVEN && options.noise == 0)
        retrofit_note("--noise-type has no effect without --noise");
    check_rules((struct rule[]){
        {options.tokens && !options.logits, "--tokens goes with --logits"},
        {given > 1, "one of --batch, --interactive, --eval, --tasks, --logits, --print-tokens "
                    "at a time"},
        {!options.model && !(options.print_tokens && options.tokenizer),
         "--model is needed (see --help)"},
        {options.system && !options.chat, "--system goes with --chat"},
        {options.interactive && !options.chat, "--interactive goes with --chat"},
        {options.interactive && options.max_tokens == 0,
         "--interactive needs --max-tokens of at least 1"},
        {options.answer_regex && !options.tasks, "--answer-regex goes with --tasks"},
        {options.json && options.logits, "--json does not go with --logits"},
        {options.json && options.print_tokens, "--json does not go with --print-tokens"},
        {options.chat && options.eval, "--chat does not go with --eval"},
        {options.chat && options.tokens, "--chat does not go with --tokens"},
        {mode->needs_prompt && !options.prompt && !options.tokens,
         "--prompt is needed (see --help)"},
        {options.batch_size == 0, "--batch-size 0: at least one"},
        {options.prompt && no_prompt,
         "--prompt does not go with --batch, --interactive, --eval or --tasks"},
        {!isnan(options.exit_threshold) && !options.exit, "--exit-threshold goes with --exit"},
        {options.exit_threshold < 0, "--exit-threshold is at least 0"},
        {options.exit == RETROFIT_EXIT_ARGMAX_STABILITY && !isnan(options.exit_threshold) &&
             options.exit_threshold != floor(options.exit_threshold),
         "--exit-threshold: a whole number of recurrences for argmax-stability"},
        {options.noise < 0 || options.noise > 1e6, noise},
        {draws && !(options.temperature > 0),
         "--top-k, --top-p and --min-p go with --temperature: without it the likeliest token is "
         "taken"},
        {options.trace && !options.prompt, "--trace goes with --prompt"},
        {false, NULL},
    });
}

// Tasks may be scored without a text.
static bool only_scores(void) { return options.tasks && !options.answer_regex; }

static void check_drafts(void) {
    bool full_cache = !options.kv_cache || !strcmp(options.kv_cache, "full");
    check_rules((struct rule[]){
        {options.exit, "--speculative does not go with --exit"},
        {options.continuous, "--speculative does not go with --continuous"},
        {options.noise > 0, "--speculative does not go with --noise"},
        {!full_cache, "--speculative does not go with --kv-cache"},
        {only_scores(), "--speculative does not go with --tasks, but for a \"target\""},
        {options.eval, "--speculative does not go with --eval"},
        {options.logits, "--speculative does not go with --logits"},
        {false, NULL},
    });
}

// What is scored or written in one pass uses no KV cache.
static void check_cache_use(void) {
    bool logits = options.logits, scored = only_scores();
    check_rules((struct rule[]){
        {logits && options.exit, "--exit does not go with --logits"},
        {logits && options.kv_cache, "--kv-cache does not go with --logits"},
        {logits && options.kv_bf16, "--kv-bf16 does not go with --logits"},
        {logits && options.continuous, "--continuous does not go with --logits"},
        {scored && options.exit, "--exit does not go with --tasks, but for a \"target\""},
        {scored && options.kv_cache, "--kv-cache does not go with --tasks, but for a \"target\""},
        {scored && options.kv_bf16, "--kv-bf16 does not go with --tasks, but for a \"target\""},
        {scored && options.continuous,
         "--continuous does not go with --tasks, but for a \"target\""},
        {false, NULL},
    });
}

static bool generates_text(const struct mode *mode) { return mode->generates && !only_scores(); }

// Options of other modes, which have no effect in this one.
static void note_idle_options(const struct mode *mode) {
    bool generates = generates_text(mode);
    bool rows = mode == &modes[EVAL] || mode == &modes[TASKS];
    bool batches = rows || mode == &modes[BATCH];
    bool lengths = mode == &modes[EVAL] || mode == &modes[INTERACTIVE];
    const struct {
        bool idle;
        const char *option, *why;
    } cases[] = {
        {options.max_tokens != 128 && !generates, "max-tokens", "where no text is generated"},
        {options.temperature > 0 && !generates, "temperature", "where no text is generated"},
        {options.stop && !generates, "stop", "where no text is generated"},
        {options.rows && !rows, "rows", "but with --eval and --tasks"},
        {options.batch_size != 8 && !batches, "batch-size", "but with --batch, --tasks and --eval"},
        {options.seq_len && !lengths, "seq-len", "but with --eval and --interactive"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (cases[i].idle) retrofit_note("--%s has no effect %s", cases[i].option, cases[i].why);
    }
}

static void check_sampling(void) {
    bool bad_temperature = options.temperature < 0;
    bool bad_top_p = options.top_p <= 0 || options.top_p > 1;
    bool bad_min_p = options.min_p < 0 || options.min_p > 1;
    if (bad_temperature || bad_top_p || bad_min_p)
        die(2, "--temperature is at least 0, --top-p between 0 and 1, --min-p from 0 to 1");
}

// What is written must not be what is read: no file that lies in a model's or a tokenizer's
// directory, nor one of the model's that lies elsewhere.
static void protect_inputs(const char *option, const char *path) {
    char parent[RETROFIT_PATH];
    struct stat status;
    if (!path || stat(path, &status)) return;
    snprintf(parent, sizeof parent, "%s", path);
    retrofit_parent_directory(parent);
    bool input = retrofit_same_file(parent, model_directory) ||
                 retrofit_same_file(parent, tokenizer_directory);
    for (size_t i = 0; i < model->map_count; i++)
        input = input || retrofit_same_file(path, model->maps[i].path);
    if (input) die(2, "%s %s: is a file of the model's: write elsewhere", option, path);
    if (S_ISREG(status.st_mode)) retrofit_note("%s is there already and is replaced", path);
}

// Options that speak of recurrences need a model that has some.
static void check_recurrent(void) {
    const char *option = NULL;
    if (options.trace) option = "--trace";
    if (options.speculative) option = "--speculative";
    if (options.noise > 0) option = "--noise";
    if (options.continuous) option = "--continuous";
    if (options.kv_cache) option = "--kv-cache";
    if (options.exit) option = "--exit";
    if (option && retrofit_is_plain(&model->config))
        die(2, "%s: %s is a plain model, it has no recurrence: make it recurrent with convert",
            option, options.model);
    if (!options.speculative || drafts.tuning) return;
    struct depth_list depths = read_depths(MAX_DEPTHS, NULL);
    if (retrofit_max(drafts.depths[0], drafts.depths[1]) >= depths.r[depths.count - 1])
        die(2, "--speculative %s: a reading as deep as the text itself: give it fewer than "
               "--recurrences", options.speculative);
}

static void load_model(void) {
    const retrofit_ops *ops =
        retrofit_device((retrofit_place)options.device, options.precision == 1, device_name);
    require(ops != NULL);
    if (options.precision != NOT_GIVEN && ops == &retrofit_cpu)
        retrofit_note("--precision has no effect on a CPU, which computes in fp32");
    model = require_pointer(retrofit_load(options.model, ops, RETROFIT_INFERENCE));
}

// What the command line leaves open is as it was in the model's training, if config.json says that.
// A model that was trained from s_0 = 0 in rows of 81 tokens has another loss in other rows, from
// other states.
static void follow_training(const struct mode *mode) {
    const retrofit_config *c = &model->config;
    size_t T = mode == &modes[EVAL] && options.seq_len == 0 ? c->trained_seq_len : 0;
    bool fits = T > 0 && T <= c->context;
    bool zero = options.state_init == NOT_GIVEN && c->trained_state_zero && c->core > 0;
    if (options.state_init == NOT_GIVEN) options.state_init = zero;
    if (fits) options.seq_len = T;
    char text[64] = "";
    if (fits) snprintf(text, sizeof text, "%s--seq-len %zu", zero ? ", " : "", T);
    if (zero || fits)
        retrofit_note("%s%s: as the model was trained", zero ? "--state-init zero" : "", text);
}

static void load_tokenizer(void) {
    tokenizer = require_pointer(retrofit_tokenizer_load(tokenizer_directory));
}

// What ends a text: the ids of generation_config.json or config.json, as in transformers; where
// they have none, the tokenizer's end of text.
static void find_end_tokens(void) {
    const retrofit_config *config = &model->config;
    int32_t own = retrofit_tokenizer_eos(tokenizer);
    for (size_t i = 0; i < config->eos_count; i++) add_end_token(config->eos[i]);
    if (retrofit_tokenizer_cleans_up(tokenizer))
        retrofit_note("%s/tokenizer_config.json: clean_up_tokenization_spaces is not followed: "
                      "decoded text keeps its spaces", tokenizer_directory);
    if (own >= 0 && !ends_text(own))
        retrofit_note("%s: text ends at eos_token_id (%d), which is not the tokenizer's eos_token "
                      "(%d); transformers does the same", model_directory, (int)end_tokens[0],
                      (int)own);
    if (end_count == 0)
        retrofit_note("%s: neither config.json nor the tokenizer names an end of text: text goes "
                      "on up to --max-tokens", model_directory);
}

// How generation_config.json, or an older config.json, would have transformers generate. Values
// that change nothing are the defaults of transformers.
static const retrofit_key generation_keys[] = {
    {"bos_token_id eos_token_id pad_token_id", NULL, "what ends a text"},
    {"temperature", "1", "--temperature"},
    {"top_k", "0|50", "--top-k"},
    {"top_p", "1", "--top-p"},
    {"min_p", "0", "--min-p"},
    {"do_sample", "false", "--temperature, --top-k, --top-p, --min-p"},
    {"max_length max_new_tokens", "*", "--max-tokens"},
    {"stop_strings", "null", "--stop"},
    {"typical_p repetition_penalty encoder_repetition_penalty length_penalty num_beams "
     "num_beam_groups num_return_sequences", "1", "said in a note"},
    {"min_length min_new_tokens no_repeat_ngram_size epsilon_cutoff eta_cutoff "
     "encoder_no_repeat_ngram_size diversity_penalty", "0", "said in a note"},
    {"transformers_version _from_model_config use_cache cache_* return_* output_* low_memory "
     "disable_compile max_time is_assistant assistant_* num_assistant_tokens* target_lookbehind "
     "prompt_lookup_num_tokens max_matching_ngram_size prefill_chunk_size chat_format "
     "_commit_hash", "*", "of Python's interface"},
};

// Those of them that options about sampling stand for.
static const retrofit_key sampling_keys = {"do_sample temperature top_k top_p min_p typical_p",
                                           NULL, "--temperature"};

// Options say how we generate; what a file says beside them is told, not followed.
// Where the command line says how to sample, nobody expects the file's way.
static void note_generation_keys(const char *name, bool all_keys) {
    char path[RETROFIT_PATH];
    size_t count = sizeof generation_keys / sizeof *generation_keys;
    require(retrofit_path(path, model_directory, name));
    if (!retrofit_is_there(path)) return;
    retrofit_json *json = require_pointer(retrofit_json_read(path, NULL));
    retrofit_text found = {0};
    for (const retrofit_json *member = json->child; member; member = member->next) {
        bool known = true;
        bool has_row = retrofit_key_find(member->key, generation_keys, count) != NULL;
        if (!all_keys && !has_row) continue;
        bool samples = retrofit_key_find(member->key, &sampling_keys, 1) != NULL;
        if (samples && sampling_given) continue;
        bool neutral = retrofit_key_check(member->key, retrofit_json_value_text(member),
                                          generation_keys, count, path, &known);
        if (neutral && known) continue;
        retrofit_text_append_item(&found, member->key);
        append_string(&found, " ");
        append_string(&found, retrofit_json_value_text(member));
    }
    retrofit_text_append(&found, "", 1);
    require(!found.failed);
    if (found.size > 1)
        retrofit_note("%s: generation follows the options of infer, not: %s", path, found.bytes);
    free(found.bytes);
    retrofit_json_free(json);
}

// A tokenizer may have a few tokens more than the model has embeddings: a [PAD], say, that was
// added for a training. A prompt that has such an id is refused when it is fed.
static void check_vocabulary(void) {
    const char *directory = tokenizer_directory;
    size_t size = retrofit_tokenizer_size(tokenizer), V = model->config.vocab;
    size_t excess = size > V ? size - V : 0;
    if (excess > V / 64 + 16)
        die(1, "the tokenizer of %s has ids up to %zu, the model's vocabulary %zu: "
               "another model's?", directory, size - 1, V);
    if (excess)
        retrofit_note("the tokenizer of %s has %zu more ids than the model's vocabulary of %zu: a "
                      "text that needs one of them is refused", directory, excess, V);
}

static const char usage[] =
    "infer --model DIR --prompt TEXT|- [--recurrences R] [options]\n"
    "infer --model DIR --batch FILE.jsonl [--recurrences R] [options]\n"
    "infer --model DIR --chat --interactive [--recurrences R] [options]\n"
    "infer --model DIR --eval FILE.bin | --tasks FILE.jsonl [--recurrences 1,2,4,8]\n"
    "infer --tokenizer DIR --prompt TEXT --print-tokens\n";

int main(int argc, char **argv) {
    retrofit_share_processors(argv);
    size_t option_count = sizeof option_table / sizeof *option_table;
    int code = retrofit_options(argc, argv, option_table, option_count, usage, NULL, NULL);
    if (code >= 0) return code;
    const struct mode *mode = find_mode();
    check_mode(mode);
    note_idle_options(mode);
    sampling_given = !isnan(options.temperature);
    if (!sampling_given) options.temperature = 0;
    if (options.speculative) {
        read_drafts();
        check_drafts();
    }
    check_cache_use();
    cache_options(1, 1); // ends the program where --kv-cache is wrong, before a model is read
    check_sampling();
    if (options.trace) require(retrofit_check_writable(options.trace));
    if (options.logits) require(retrofit_check_writable(options.logits));
    if (options.stop) read_stops();
    retrofit_abandon_on_signals("infer");
    retrofit_shows_shares = true;

    char path[RETROFIT_PATH], other[RETROFIT_PATH];
    if (options.model) model_directory = retrofit_model_directory(options.model, path);
    tokenizer_directory = model_directory;
    if (options.tokenizer) tokenizer_directory = retrofit_model_directory(options.tokenizer, other);
    if (mode->needs_tokenizer && !options.tokens) load_tokenizer();
    if (mode->needs_model) load_model();
    if (model) follow_training(mode);
    if (model && tokenizer) check_vocabulary();
    if (model && tokenizer) retrofit_config_mend_ids(&model->config, tokenizer, model_directory);
    if (mode->generates && tokenizer) find_end_tokens();
    if (generates_text(mode)) note_generation_keys("generation_config.json", true);
    if (generates_text(mode)) note_generation_keys("config.json", false);
    if (model) check_recurrent();
    if (model) protect_inputs("--logits", options.logits);
    if (model) protect_inputs("--trace", options.trace);
    if (options.chat) read_chat_template();

    mode->run();

    retrofit_tokenizer_free(tokenizer);
    retrofit_free(model);
    free(stops[0]);
    retrofit_chat_free(chat);
    flush_output();
    return 0;
}

// infer's ways to generate and evaluate, run as a user would: JSON, stop strings, batches,
// conversations, tasks, exits. Each is compared with what --logits, the tokenizer and a prompt
// alone say.
#include "run.h"
#include <ctype.h>

// A random recurrent model of 1,000 tokens, and the three kinds of tokenizers that fit it.
enum { V = 1000 };
static const char *const styles[] = {"llama2_style", "llama3_style", "smollm_style"};
#define RANDOM "infer --model random --state-init zero --recurrences 3 "
#define BASE "infer --model f/lookup/base "

// ---- JSON that infer wrote --------------------------------------------------------------------

static retrofit_json *parsed; // what the last call of parse_json() read

static const retrofit_json *parse_json(const char *text, size_t size, const char *what) {
    retrofit_json_free(parsed);
    parsed = retrofit_json_parse(text, size, what);
    need(parsed != NULL, text);
    return parsed;
}

static double get_number(const retrofit_json *json, const char *key) {
    const retrofit_json *number = retrofit_json_get(json, key);
    bool ok = number && number->type == RETROFIT_JSON_NUMBER;
    check(ok, "JSON: no number %s", key);
    return ok ? number->number : NAN;
}

static const retrofit_json *get_string(const retrofit_json *json, const char *key) {
    const retrofit_json *string = retrofit_json_get(json, key);
    need(string && string->type == RETROFIT_JSON_STRING, key);
    return string;
}

// Copies a list of at most `max` numbers; returns how many there are.
static size_t get_numbers(const retrofit_json *json, const char *key, double *numbers, size_t max) {
    const retrofit_json *list = retrofit_json_get(json, key);
    need(list && list->type == RETROFIT_JSON_ARRAY && list->count <= max, key);
    const retrofit_json *item = list->child;
    for (; item; item = item->next) *numbers++ = item->number;
    return list->count;
}

static bool is_text(const retrofit_json *string, const char *text, size_t size) {
    return string->length == size && !memcmp(string->string, text, size);
}

static bool finish_reason_is(const retrofit_json *json, const char *reason) {
    return !strcmp(get_string(json, "finish_reason")->string, reason);
}

// log softmax(logits)[id]
static double log_probability(const float *logits, size_t id) {
    double sum = 0;
    for (size_t i = 0; i < V; i++) sum += exp((double)logits[i] - (double)logits[id]);
    return -log(sum);
}

// ---- One prompt -------------------------------------------------------------------------------

// Each token's log-probability is that of --logits for the prompt and the tokens before it.
static void check_logprobs(const retrofit_json *json, const char *style, const int32_t *ids,
                           size_t prompt) {
    double tokens[64], logprobs[64], recurrences[64];
    int32_t all[128];
    size_t n = get_numbers(json, "tokens", tokens, 64);
    size_t n_logprobs = get_numbers(json, "logprobs", logprobs, 64);
    size_t n_recurrences = get_numbers(json, "recurrences", recurrences, 64);
    check(n_logprobs == n && n_recurrences == n, "--json: lists of unequal length: %s", out);
    check(finish_reason_is(json, n == 40 ? "length" : "stop"),
          "--json: %zu tokens, finish_reason %s", n, get_string(json, "finish_reason")->string);

    for (size_t i = 0; i < prompt; i++) all[i] = ids[i];
    for (size_t i = 0; i < n; i++) all[prompt + i] = (int32_t)tokens[i];
    float *logits = logits_of("random", all, prompt + n, V, "--recurrences 3 --state-init zero");
    for (size_t i = 0; i < n; i++) {
        double expected = log_probability(logits + (prompt + i - 1) * V, (size_t)tokens[i]);
        check(fabs(logprobs[i] - expected) < 1e-4 && recurrences[i] == 3,
              "%s: token %zu: logprob %g, not %g, or %g recurrences", style, i, logprobs[i],
              expected, recurrences[i]);
    }
    free(logits);
}

// What random tokens make, control characters and halves of characters too, is JSON, and the text
// that comes without --json.
static void json_of_a_prompt(const char *style) {
    static const char prompt_text[] = "Once \"upon\"\n";
    char path[128], options[256];
    snprintf(path, sizeof path, "f/tokenizers/%s", style);
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load(path);
    for (int seed = 1; seed <= 2; seed++) {
        snprintf(options, sizeof options,
                 "--tokenizer %s --prompt '%s' --max-tokens 40 --temperature 1.2 --seed %d", path,
                 prompt_text, seed);
        works(RANDOM "%s", options);
        char *text = strdup(out);
        works(RANDOM "%s --json", options);
        const retrofit_json *json = parse_json(out, out_size, "--json");
        size_t prompt = 0;
        int32_t *ids = retrofit_encode(tokenizer, prompt_text, strlen(prompt_text), true, &prompt);
        double prompt_tokens = get_number(json, "prompt_tokens");
        check(prompt_tokens == (double)prompt, "--json: %g tokens of prompt, not %zu",
              prompt_tokens, prompt);
        bool times = get_number(json, "prompt_seconds") >= 0;
        times = get_number(json, "generation_seconds") >= 0 && times;
        check(times, "--json: no times: %s", out);
        check(is_text(get_string(json, "text"), text, strlen(text) - 1),
              "%s: --json's text is not '%s' but %s", style, text, out);
        check_logprobs(json, style, ids, prompt);
        free(text);
        free(ids);
    }
    retrofit_tokenizer_free(tokenizer);
}

// A prompt's newline, a byte token where the tokenizer is of SentencePiece's kind, is no part of
// the text behind it; a first space is.
static void text_behind_a_newline(void) {
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load("f/tokenizers/llama2_style");
    for (int seed = 1; seed < 6; seed++) {
        double tokens[8];
        size_t size;
        works(RANDOM "--tokenizer f/tokenizers/llama2_style --prompt 'Once\n' --max-tokens 6 "
                     "--temperature 1 --json --seed %d", seed);
        const retrofit_json *json = parse_json(out, out_size, "--json");
        int32_t ids[8] = {retrofit_tokenizer_id(tokenizer, "\xe2\x96\x81the")};
        size_t n = get_numbers(json, "tokens", tokens, 7);
        for (size_t i = 0; i < n; i++) ids[i + 1] = (int32_t)tokens[i];
        char *text = retrofit_decode(tokenizer, ids, n + 1, true, &size);
        need(text && size >= 3, "decoded");
        const char *behind = text + strlen("the");
        check(is_text(get_string(json, "text"), behind, size - 3), "behind a newline: %s, not '%s'",
              out, behind);
        free(text);
    }
    retrofit_tokenizer_free(tokenizer);
}

// ---- Stop strings -----------------------------------------------------------------------------

// Copies about n bytes of text from about `at`, whole characters; returns how many.
static size_t copy_characters(const char *text, size_t at, size_t n, char *to) {
    while ((text[at] & 0xc0) == 0x80) at++;
    while ((text[at + n] & 0xc0) == 0x80) n++;
    memcpy(to, text + at, n);
    to[n] = 0;
    return n;
}

// text as --stop takes it in single quotes.
static void escape_stop(char *to, const char *text) {
    for (; *text; text++) {
        if (*text == '\'') to += sprintf(to, "'\\''");
        else if (*text == '\n') to += sprintf(to, "\\n");
        else if (*text == '\t') to += sprintf(to, "\\t");
        else if (*text == '\\' || *text == '|') to += sprintf(to, "\\%c", *text);
        else to += sprintf(to, "%c", *text);
    }
    *to = 0;
}

// The text ends before the first of the stop strings in it, wherever tokens begin and end, and
// whatever only begins like one is shown.
static void stop_strings(void) {
    static const char command[] = RANDOM "--tokenizer f/tokenizers/llama3_style --prompt 'a b' "
                                         "--max-tokens 60 --temperature 1 --seed 5";
    works("%s", command);
    char *text = strdup(out), a[64], b[64], never[64];
    size_t size = strlen(text) - 1;
    need(size > 100, "text to stop");
    for (size_t i = 0; i < 8; i++) {
        char first[16] = {0}, second[16] = {0};
        size_t at = i * size / 9;
        size_t begins = copy_characters(text, at / 2, 4, never);
        strcpy(never + begins, "\1"); // begins like something in the text, and goes on otherwise
        copy_characters(text, at, 1 + i % 7, first);
        copy_characters(text, size / 2 + i, 5, second);
        escape_stop(a, first);
        escape_stop(b, second);
        size_t end = retrofit_min((size_t)(strstr(text, first) - text),
                                  (size_t)(strstr(text, second) - text));
        works("%s --stop '%s|%s|%s'", command, never, b, a);
        check(out_size == end + 1 && !memcmp(out, text, end) && out[end] == '\n',
              "--stop '%s|%s|%s': '%s' of '%s'", never, b, a, out, text);
        works("%s --stop '%s|%s|%s' --json", command, never, b, a);
        const retrofit_json *json = parse_json(out, out_size, "--stop");
        check(is_text(get_string(json, "text"), text, end) && finish_reason_is(json, "stop"),
              "--stop with --json: %s", out);
    }
    works("%s --stop '%s'", command, never);
    check(!strcmp(out, text), "a stop string that does not come changes the text: '%s', not '%s'",
          out, text);
    free(text);
}

static void stop_strings_of_base(void) {
    works(BASE "--prompt 'a=1 b=a | b' --max-tokens 9 --stop '1='");
    check(!strcmp(out, "=\n"), "--stop over two tokens: '%s'", out);
    works(BASE "--prompt 'a=1 b=a | b' --max-tokens 2 --stop '=1=1=2'");
    check(!strcmp(out, "=1=1\n"), "half a stop string at the end of the text: '%s'", out);
    works(BASE "--prompt 'q=2 h=q' --max-tokens 40 --stop ' \\| |\\\\'");
    check(out_size > 1 && !strchr(out, '|'), "--stop at a bar: '%s'", out);
    fails(2, "--stop", BASE "--prompt a --stop ''");
    fails(2, "--stop", BASE "--prompt a --stop 'a|'");
    fails(2, "--stop", BASE "--prompt a --stop 'a\\x'");
    fails(2, "--stop", BASE "--prompt a --stop 'a\\'");
    fails(2, "UTF-8", BASE "--prompt a --stop '\xe2\x96'");
    fails(2, "--stop", BASE "--prompt a --stop '%s'", "a|a|a|a|a|a|a|a|a|a|a|a|a|a|a|a|a");
}

// ---- Many prompts -----------------------------------------------------------------------------

#define BATCH RANDOM "--tokenizer f/tokenizers/smollm_style --stop 'ans|Source' "
enum { PROMPTS = 11 };
static const char *const batch_ids[] = {"", "\"id\":-1.50,", "\"id\":\"\\u000a\\\"x\","};

// Writes batch.jsonl, prompts of many lengths; texts: what each gets alone.
static void write_batch(char *texts[PROMPTS]) {
    FILE *file = fopen("batch.jsonl", "w");
    need(file != NULL, "batch.jsonl");
    for (size_t i = 0; i < PROMPTS; i++) {
        char prompt[1024] = "";
        for (size_t j = 0; j < 1 + i * 37 % 120; j++) strcat(prompt, j % 3 ? " of" : " a");
        works(BATCH "--prompt '%s'", prompt);
        texts[i] = strdup(out);
        texts[i][out_size - 1] = 0;
        fprintf(file, "%s{%s\"prompt\":\"%s\"}\n", i % 2 ? "\n" : "", batch_ids[i % 3], prompt);
    }
    fclose(file);
}

// Prompts, some of which fill the context of 128 or end at a stop string: in a batch of any size
// each gets the text that it gets alone, in the order of the file, with its id. Draws are a
// prompt's own too. Drafts change none of it.
static void batches(void) {
    static const size_t sizes[] = {1, 3, 8, 100, 3, 100};
    static const char *const drafts[] = {"", "", "", "", "--speculative 1,2", "--speculative 2"};
    char *texts[PROMPTS], *drawn = NULL, *end;
    size_t stopped = 0, full = 0;
    write_batch(texts);
    for (size_t b = 0; b < sizeof sizes / sizeof *sizes; b++) {
        works(BATCH "--batch batch.jsonl --batch-size %zu %s", sizes[b], drafts[b]);
        char *line = out;
        for (size_t i = 0; i < PROMPTS && (end = strchr(line, '\n')); i++) {
            const retrofit_json *json = parse_json(line, (size_t)(end - line), "--batch");
            const char *id = batch_ids[i % 3];
            check(is_text(get_string(json, "text"), texts[i], strlen(texts[i])),
                  "--batch-size %zu: %.*s, not '%s'", sizes[b], (int)(end - line), line, texts[i]);
            bool has_id = retrofit_json_get(json, "id");
            bool begins = !strncmp(line + 1, id, strlen(id));
            check(begins && has_id == (i % 3 != 0), "--batch: no id %s: %.30s", id, line);
            double tokens = get_number(json, "prompt_tokens");
            tokens += (double)retrofit_json_get(json, "tokens")->count;
            bool stop = finish_reason_is(json, "stop");
            stopped += stop;
            full += !stop && tokens == 128;
            line = end + 1;
        }
        check(line == out + out_size, "--batch-size %zu: more than %d lines: %s", sizes[b], PROMPTS,
              line);
        works(BATCH "--batch batch.jsonl --batch-size %zu --temperature 1 --max-tokens 9 %s | "
                    "sed 's/\"logprobs.*//'", sizes[b], drafts[b]);
        if (b == 0) drawn = strdup(out);
        check(!strcmp(drawn, out), "--batch-size %zu draws '%s', not '%s'", sizes[b], out, drawn);
    }
    need(stopped >= 4 && full >= 4, "prompts that stop, and that fill the context");
    for (size_t i = 0; i < PROMPTS; i++) free(texts[i]);
    free(drawn);
}

static void bad_batches(void) {
    static const struct {
        const char *what, *line;
    } bad[] = {
        {"line 2", "{\"prompt\":1}"},
        {"line 2", "{\"prompt\":\"\"}"},
        {"line 2", "{\"prompt\":\"a\",\"id\":null}"},
        {"line 2: byte 2", "{"},
        {"line 2", "[]"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        works("printf '%%s\\n' '{\"prompt\":\"a\"}' '%s' >lines", bad[i].line);
        fails(1, bad[i].what, BATCH "--batch lines");
    }
    works("(echo; printf '{\"prompt\":\"'; seq -s ' ' 100; echo '\"}') | tr -d '\\n' | "
          "sed 's/}/}\\n/' >lines");
    fails(1, "line 1: the prompt has", BATCH "--batch lines");
    fails(1, "no prompts", BATCH "--batch /dev/null");
    fails(1, "No such file", BATCH "--batch missing");
    fails(1, "Is a directory", BATCH "--batch .");
    fails(2, "--batch-size", BATCH "--batch lines --batch-size 0");
    fails(2, "--prompt", BATCH "--batch lines --prompt a");
}

// ---- Chat -------------------------------------------------------------------------------------

// The parts of what the chat templates below write: before the first message, before a role, behind
// it, behind a text. test_chat.c is about templates; here they are used.
typedef struct {
    const char *style, *begin, *open, *close, *end;
    const char *stop; // ends a turn
    bool trims;       // texts lose white space at both ends
} chat;
static const chat chats[] = {
    {"llama3", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>",
     "<|eot_id|>", true},
    {"smollm", "", "<|im_start|>", "\n", "<|im_end|>\n", "<|im_end|>", false},
    {"llama2", "", "<|", "|>\n", "</s>\n", "</s>", false},
};
#define TALK "infer --model talk --state-init zero --recurrences 3 --tokenizer chat/%s "

static void write_text(const char *path, const char *text) {
    write_bytes(path, text, strlen(text));
}

// Tokenizers with a chat template in chat/, and `talk`, a model for long conversations.
static void chat_tokenizers(void) {
    shell("mkdir chat && cp -rL f/tokenizers chat/f && cd chat && "
          "mv f/llama3_style llama3 && mv f/llama2_style llama2 && mv f/smollm_style smollm");
    shell("sed -i 's/\"added_tokens\": \\[/&"
          "{\"id\":800,\"content\":\"<|start_header_id|>\",\"special\":true},"
          "{\"id\":801,\"content\":\"<|end_header_id|>\",\"special\":true},"
          "{\"id\":802,\"content\":\"<|eot_id|>\",\"special\":true},/' chat/llama3/tokenizer.json");
    write_text("chat/llama3/chat_template.jinja",
               "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}"
               "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
               "<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}");
    write_text("chat/smollm/chat_template.jinja",
               "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
               "<|im_end|>\n{% endfor %}<|im_start|>assistant{{ '\\n' }}");
    write_text("chat/llama2/chat_template.jinja",
               "{% for m in messages %}\n{{ '<|' + m.role + '|>\\n' + m.content + eos_token }}\n"
               "{% endfor %}\n<|assistant|>{{ '\\n' }}");

    // What the model said is written in another way later; and a turn ends with no special token.
    shell("cd chat && cp -r smollm forgets && cp -r smollm plain");
    write_text("chat/forgets/chat_template.jinja",
               "{% for m in messages %}{% if m.role == 'assistant' %}({{ m.content }}){% endif %}"
               "{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}<|im_start|>");
    write_text("chat/plain/chat_template.jinja",
               "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
               "assistant:");
    shell("sed 's/131/1000/;s/128/1300/' f/tiny/recurrent/config.json >talk.json && "
          "convert --random talk.json --to talk --seed 5 >ls");
}

// Three ways to give the same system message, and messages that the template does not take.
static void lists_of_messages(void) {
    write_text("system.jsonl", "{\"messages\":[{\"role\":\"system\",\"content\":\"a\"},"
                               "{\"role\":\"user\",\"content\":\"hi\"}]}\n"
                               "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}\n"
                               "{\"prompt\":\"hi\"}\n");
    works(TALK "--chat --batch system.jsonl --max-tokens 0 --system a", "smollm");
    double first = 0;
    char *line = out, *end;
    while ((end = strchr(line, '\n'))) {
        const retrofit_json *json = parse_json(line, (size_t)(end - line), "--batch");
        double count = get_number(json, "prompt_tokens");
        check(count > 10 && (first == 0 || count == first), "a system message in --batch: %s", out);
        first = count;
        line = end + 1;
    }

    write_text("roles.jsonl", "{\"prompt\":\"hi\"}\n"
                              "{\"messages\":[{\"role\":\"tool\",\"content\":\"hi\"}]}\n");
    works(TALK "--chat --batch roles.jsonl --max-tokens 0", "smollm");
    fails(1, "roles.jsonl: line 2: chat/forgets/chat_template.jinja: chat template: it writes "
             "nothing of a message of the role \"tool\"",
          TALK "--chat --batch roles.jsonl --max-tokens 0", "forgets");
    write_text("roles.jsonl", "{\"messages\":[{\"role\":\"user\",\"content\":null}]}\n");
    fails(1, "roles.jsonl: line 1: a message needs", TALK "--chat --batch roles.jsonl", "smollm");
    write_text("roles.jsonl", "{\"messages\":[{\"role\":\"a\\u0000b\",\"content\":\"\"}]}\n");
    fails(1, "roles.jsonl: line 1: a message needs", TALK "--chat --batch roles.jsonl", "smollm");
}

// A conversation goes on only where all that was said before stays as it was.
static void bad_conversations(void) {
    write_text("users", "a\nb\n");
    shell("printf a >user");
    for (int plain = 0; plain < 2; plain++) {
        const char *name = plain ? "plain" : "forgets";
        const char *what = plain ? "no special token" : "in another way";
        works(TALK "--chat --interactive --max-tokens 1 <user", name);
        works(TALK "--chat --interactive --max-tokens 1 <users 2>bad; "
                   "test $? = 1 && grep -q '%s' bad", name, what);
        shell("rm bad");
    }
    fails(1, "writing to stdout failed: No space left on device",
          TALK "--chat --interactive --max-tokens 1 <users >/dev/full", "smollm");
    fails(1, "reading stdin failed: Is a directory", TALK "--chat --interactive <talk", "smollm");
}

// A turn ends where the template says, not only at the end of text.
static void ends_of_turns(void) {
    for (int seed = 1; seed < 6; seed++) {
        double tokens[1300];
        works(TALK "--chat --prompt hi --temperature 40 --max-tokens 1200 --seed %d --json",
              "llama3", seed);
        const retrofit_json *json = parse_json(out, out_size, "--json");
        size_t n = get_numbers(json, "tokens", tokens, 1300);
        for (size_t i = 0; i < n; i++)
            check(tokens[i] != 802, "the text goes on behind <|eot_id|>");
    }
}

static void bad_chats(void) {
    fails(1, "no chat template", BASE "--chat --prompt a");
    fails(2, "--chat", BASE "--system a --prompt a");
    fails(2, "--chat", BASE "--interactive");
    fails(2, "--prompt", BASE "--chat --interactive --prompt a");
    fails(2, "at a time", BASE "--chat --interactive --batch a");
    fails(2, "--eval", BASE "--chat --eval f");
    fails(2, "--max-tokens", TALK "--chat --interactive --max-tokens 0 </dev/null", "llama3");
    fails(2, "context of 1300", TALK "--chat --interactive --seq-len 1301", "llama3");
    shell("tr '\\n' ' ' <talk.json >long");
    fails(1, "room for 20", TALK "--chat --interactive --seq-len 20 <long", "smollm");
}

// The prompt that the JSON is about has these ids: by their number, and by what --logits says of
// the first token generated behind them.
static void check_answer(const retrofit_json *json, const int32_t *ids, size_t n,
                         const char *what) {
    double tokens[600], logprobs[600], prompt_tokens = get_number(json, "prompt_tokens");
    check(prompt_tokens == (double)n, "%s: %g tokens before it, not %zu", what, prompt_tokens, n);
    if (get_numbers(json, "tokens", tokens, 600) == 0) return;
    get_numbers(json, "logprobs", logprobs, 600);
    float *logits = logits_of("talk", ids, n, V, "--recurrences 3 --state-init zero");
    double expected = log_probability(logits + (n - 1) * V, (size_t)tokens[0]);
    check(fabs(logprobs[0] - expected) < 1e-4, "%s: logprob %g, of the whole text's ids %g", what,
          logprobs[0], expected);
    free(logits);
}

// ---- Conversations ----------------------------------------------------------------------------

// A conversation of three turns, as it should be.
typedef struct {
    const chat *chat;
    retrofit_tokenizer *tokenizer;
    int32_t ids[1024];     // so far: the templates' text and the tokens that were generated
    size_t n;
    char beginning[256];   // BOS and the system message
    char text[16384];      // so far
    bool canonical;        // ids are those of text
    char messages[16384];  // of --batch, but for the closing brackets
    size_t messages_size;
    size_t equal_to_batch; // turns that --batch repeated
} conversation;

static const char *const users[] = {" One  two ", "the \"fox\"", "of 12"};
static const char *const users_json[] = {" One  two ", "the \\\"fox\\\"", "of 12"};

static void begin_conversation(conversation *c, int system) {
    c->n = 0;
    c->canonical = true;
    snprintf(c->beginning, sizeof c->beginning, "%s%ssystem%s%d%s", c->chat->begin, c->chat->open,
             c->chat->close, system, c->chat->end);
    strcpy(c->text, c->beginning);
    c->messages_size =
        (size_t)snprintf(c->messages, sizeof c->messages,
                         "{\"messages\":[{\"role\":\"system\",\"content\":\"%d\"}", system);
}

// Adds the ids and the text of what the user says in a turn.
static void add_user(conversation *c, size_t turn) {
    const chat *chat = c->chat;
    const char *beginning = turn ? chat->end : c->beginning, *user = users[turn];
    char text[1024];
    size_t length = strlen(user), count;
    if (chat->trims && turn == 0) { // its spaces
        user++;
        length -= 2;
    }
    snprintf(text, sizeof text, "%s%suser%s%.*s%s%sassistant%s", beginning, chat->open, chat->close,
             (int)length, user, chat->end, chat->open, chat->close);
    int32_t *ids = retrofit_encode(c->tokenizer, text, strlen(text), false, &count);
    memcpy(c->ids + c->n, ids, count * sizeof *ids);
    c->n += count;
    free(ids);

    strcat(c->text, turn ? text : text + strlen(beginning));
    ids = retrofit_encode(c->tokenizer, c->text, strlen(c->text), false, &count);
    if (count != c->n || memcmp(ids, c->ids, count * sizeof *ids)) c->canonical = false;
    free(ids);
    c->messages_size +=
        (size_t)sprintf(c->messages + c->messages_size,
                        ",{\"role\":\"user\",\"content\":\"%s\"}", users_json[turn]);
}

// Where the ids are those of the conversation's text, --batch with its messages answers the same.
static void check_messages(conversation *c) {
    retrofit_json *kept = parsed;
    FILE *file = fopen("talk.jsonl", "w");
    need(file && fprintf(file, "%s]}\n", c->messages) > 0 && fclose(file) == 0, "talk.jsonl");
    works(TALK "--chat --batch talk.jsonl --max-tokens 1", c->chat->style);
    parsed = NULL;
    check_answer(parse_json(out, out_size, "--batch"), c->ids, c->n, "--batch with messages");
    retrofit_json_free(parsed);
    parsed = kept;
    c->equal_to_batch++;
}

// Adds what the model answered; returns the number of its tokens.
static size_t add_answer(conversation *c, const retrofit_json *json, int32_t stop) {
    double tokens[600];
    size_t count = get_numbers(json, "tokens", tokens, 600);
    for (size_t i = 0; i < count; i++) {
        c->ids[c->n++] = (int32_t)tokens[i];
        check(c->ids[c->n - 1] != stop, "%s: goes on behind %s", c->chat->style, c->chat->stop);
    }
    const retrofit_json *text = get_string(json, "text");
    if (memchr(text->string, 0, text->length) || strpbrk(text->string, "\"\\\n\t"))
        c->canonical = false;
    if (text->length >= 1000) c->canonical = false;
    strncat(c->text, text->string, 1000);
    c->messages_size +=
        (size_t)snprintf(c->messages + c->messages_size, 1100,
                         ",{\"role\":\"assistant\",\"content\":\"%.1000s\"}", text->string);
    return count;
}

// Each turn is answered as if all before had been encoded at once: the templates' text, and the
// tokens that were generated; and where those are the tokens of their text, the text of the whole
// conversation, by --batch with its messages too.
static void conversations(const chat *chat) {
    static const char *const options[] = {"--max-tokens 1", "--temperature 40 --max-tokens 120",
                                          "--max-tokens 40 --temperature 1 --stop 'e|a'"};
    static conversation c;
    static size_t ended;
    char directory[64], *line, *end;
    c.chat = chat;
    c.equal_to_batch = 0;
    snprintf(directory, sizeof directory, "chat/%s", chat->style);
    c.tokenizer = retrofit_tokenizer_load(directory);
    int32_t stop = c.tokenizer ? retrofit_tokenizer_id(c.tokenizer, chat->stop) : -1;
    need(stop >= 0, directory);
    write_text("users", " One  two \n\nthe \"fox\"\nof 12");
    for (int k = 0; k < 6; k++) {
        works(TALK "--chat --interactive --json %s --system %d --seed %d <users", chat->style,
              options[k % 3], k, k + 1);
        char *transcript = strdup(out);
        size_t turns = 0;
        begin_conversation(&c, k);
        for (line = transcript; (end = strchr(line, '\n')) && turns < 3; line = end + 1) {
            add_user(&c, turns);
            const retrofit_json *json = parse_json(line, (size_t)(end - line), "--interactive");
            check_answer(json, c.ids, c.n, chat->style);
            if (c.canonical && turns > 0) check_messages(&c);
            size_t count = add_answer(&c, json, stop);
            if (k % 3 != 0) c.canonical = false; // a stop string cuts text off, not tokens
            ended += k % 3 == 1 && count < 120;
            turns++;
        }
        check(turns == 3 && *line == 0, "%s: %zu turns of 3: %s", chat->style, turns, transcript);
        free(transcript);
    }
    works(TALK "--chat --interactive %s --system 0 <users && "
               "! grep -v 'steps are followed, as in transformers 4' stderr",
          chat->style, options[0]);
    check(c.equal_to_batch > 0, "%s: no conversation whose tokens are those of its text",
          chat->style);
    check(chat < &chats[2] || ended > 0, "no turn ended by itself");
    retrofit_tokenizer_free(c.tokenizer);
}

// ---- Tasks ------------------------------------------------------------------------------------

#define TASKS "infer --model random --tokenizer f/tokenizers/llama3_style --state-init zero "

// A member of --json's result at r recurrences.
static double get_result(const retrofit_json *all, double r, const char *key) {
    const retrofit_json *result = retrofit_json_get(all, "results")->child;
    for (; result; result = result->next) {
        if (get_number(result, "recurrences") == r) return get_number(result, key);
    }
    check(false, "no result at %g recurrences", r);
    return NAN;
}

enum { CHOICE_TASKS = 14 };
static const char *const choice_prompts[] = {"The fox", "One, two", "Once upon a time there was",
                                             "1 + 1 ="};

static const char *get_choice(int i, int j) {
    static const char *const texts[] = {
        " jumps", " three four five six", " 2", " \xc3\xa9\xc3\xa9", "ox and the dog", " lazy", ".",
        " over the lazy dog. And then",
    };
    static const char *const short_texts[] = {".",  "?",  ",",  "1",  "e",  "s",
                                              " b", " c", " s", " t", " w", " p"};
    return i < 8 ? texts[(i + 3 * j) % 8] : short_texts[(i + j) % 6 + j / 2 * 6];
}

static int right_choice(int i) { return i * i % 3; }

static size_t count_characters(const char *text) {
    size_t count = 0;
    for (; *text; text++) count += (*text & 0xc0) != 0x80;
    return count;
}

static void write_choices(void) {
    FILE *file = fopen("choices.jsonl", "w");
    need(file != NULL, "choices.jsonl");
    for (int i = 0; i < CHOICE_TASKS; i++) {
        fprintf(file, "{\"prompt\":\"%s\",\"choices\":[\"%s\",\"%s\",\"%s\"],",
                choice_prompts[i % 4], get_choice(i, 0), get_choice(i, 1), get_choice(i, 2));
        fprintf(file, "\"answer\":%d,\"hops\":%d}\n", right_choice(i), i % 2);
    }
    fclose(file);
}

// The log-likelihood of choice j behind prompt i, by --logits of both; *count: its tokens.
static double choice_likelihood(const retrofit_tokenizer *tokenizer, int i, int j, int r,
                                size_t *count) {
    char text[256], options[64];
    const char *prompt = choice_prompts[i % 4];
    size_t n, begin;
    snprintf(text, sizeof text, "%s%s", prompt, get_choice(i, j));
    snprintf(options, sizeof options, "--state-init zero --recurrences %d", r);
    int32_t *alone = retrofit_encode(tokenizer, prompt, strlen(prompt), true, &begin);
    int32_t *ids = retrofit_encode(tokenizer, text, strlen(text), true, &n);
    float *logits = logits_of("random", ids, n, V, options);
    double sum = 0;
    for (size_t p = begin; p < n; p++)
        sum += log_probability(logits + (p - 1) * V, (size_t)ids[p]);
    *count = n - begin;
    free(alone);
    free(ids);
    free(logits);
    return sum;
}

static int index_of_max(const double x[3]) {
    int best = 0;
    for (int j = 1; j < 3; j++) {
        if (x[j] > x[best]) best = j;
    }
    return best;
}

// What choices give at one r; apart and spaces: cases that tell the ways to compare apart.
typedef struct {
    double accuracy, accuracy_per_character, loss;
    size_t apart, spaces;
} choice_result;

static choice_result expect_choices(const retrofit_tokenizer *tokenizer, int r) {
    enum { N = CHOICE_TASKS };
    double right = 0, per_character = 0;
    choice_result result = {0};
    for (int i = 0; i < N; i++) {
        double sum[3], by_characters[3], with_space[3];
        for (int j = 0; j < 3; j++) {
            size_t count, size = count_characters(get_choice(i, j));
            sum[j] = choice_likelihood(tokenizer, i, j, r, &count);
            by_characters[j] = sum[j] / (double)(size - (*get_choice(i, j) == ' '));
            with_space[j] = sum[j] / (double)size;
            if (j == right_choice(i)) result.loss -= sum[j] / (double)count / N;
        }
        int best = index_of_max(sum), best_per_character = index_of_max(by_characters);
        bool is_right = best_per_character == right_choice(i);
        right += best == right_choice(i);
        per_character += is_right;
        result.apart += best != best_per_character;
        result.spaces += (index_of_max(with_space) == right_choice(i)) != is_right;
    }
    result.accuracy = right / N;
    result.accuracy_per_character = per_character / N;
    return result;
}

// The likelihood of each choice, from --logits of prompt and choice.
static void choices(void) {
    enum { N = CHOICE_TASKS };
    write_choices();
    works(TASKS "--tasks choices.jsonl --recurrences 1,3 --json");
    retrofit_json *all = retrofit_json_parse(out, out_size, "--tasks --json");
    works(TASKS "--tasks choices.jsonl --recurrences 1,3");
    char *table = strdup(out), row[128];
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load("f/tokenizers/llama3_style");
    size_t apart = 0, spaces = 0;
    for (int r = 1; r <= 3; r += 2) {
        choice_result expected = expect_choices(tokenizer, r);
        double p = expected.accuracy, q = expected.accuracy_per_character, loss = expected.loss;
        double p_error = sqrt(p * (1 - p) / (N - 1)), q_error = sqrt(q * (1 - q) / (N - 1));
        double acc = get_result(all, r, "acc"), acc_norm = get_result(all, r, "acc_norm");
        double got_loss = get_result(all, r, "loss");
        check(fabs(acc - p) < 1e-6 && fabs(acc_norm - q) < 1e-6 && fabs(got_loss - loss) < 1e-4,
              "choices, r=%d: acc %g, acc_norm %g, loss %g, not %g, %g, %g", r, acc, acc_norm,
              got_loss, p, q, loss);
        check(fabs(get_result(all, r, "acc_stderr") - p_error) < 1e-6 &&
                  fabs(get_result(all, r, "acc_norm_stderr") - q_error) < 1e-6,
              "choices, r=%d: standard errors", r);
        snprintf(row, sizeof row, "%.3f ± %.3f  %.3f ± %.3f ", p, p_error, q, q_error);
        check(strstr(table, row) != NULL, "choices, r=%d: no %s in %s", r, row, table);
        apart += expected.apart;
        spaces += expected.spaces;
    }
    check(apart > 0 && spaces > 0,
          "no choice the likeliest, and another per character: %zu; or per character with a space "
          "before it: %zu", apart, spaces);
    retrofit_json_free(all);
    retrofit_tokenizer_free(tokenizer);
    free(table);
}

// Group 1 of the last match of ([a-m])[n-z] in text, found by hand.
static void find_letter(const char *text, size_t n, char answer[64]) {
    *answer = 0;
    for (size_t i = 0; i + 1 < n; i++) {
        bool match = text[i] >= 'a' && text[i] <= 'm' && text[i + 1] >= 'n' && text[i + 1] <= 'z';
        if (!match) continue;
        answer[0] = text[i];
        answer[1] = 0;
    }
}

// The same for ([0-9a-z,]*[,.]), without commas and dots.
static void find_word(const char *text, size_t end, char answer[64]) {
    size_t count = 0;
    while (end && text[end - 1] != ',' && text[end - 1] != '.') end--;
    size_t begin = end ? end - 1 : 0;
    for (; begin; begin--) {
        unsigned char before = (unsigned char)text[begin - 1];
        if (isupper(before) || (before != ',' && !isalnum(before))) break;
    }
    for (size_t i = begin; i < end && count < 63; i++) {
        if (text[i] != ',' && text[i] != '.') answer[count++] = text[i];
    }
    answer[count] = 0;
}

enum { TARGETS = 50 };
#define TARGET_OPTIONS "--temperature 1 --max-tokens 50 --stop 'ing|th'"

static const char *target_prompt(int i) { return i % 3 ? "one " : "The fox jumps over the "; }

// The answers in what --batch generates for all prompts at r recurrences; returns how many have
// one.
static size_t find_answers(int r, bool words, char answers[TARGETS][64]) {
    size_t found = 0;
    works(TASKS "--batch prompts.jsonl --batch-size 7 --recurrences %d " TARGET_OPTIONS, r);
    char *line = out, *end;
    for (int i = 0; i < TARGETS && (end = strchr(line, '\n')); i++) {
        const retrofit_json *json = parse_json(line, (size_t)(end - line), "--batch");
        const retrofit_json *text = get_string(json, "text");
        if (words) find_word(text->string, text->length, answers[i]);
        else find_letter(text->string, text->length, answers[i]);
        found += *answers[i] != 0;
        line = end + 1;
    }
    need(line == out + out_size, "lines of --batch");
    return found;
}

// Answers in generated text: --batch generates the same, at one r.
static void targets(bool words) {
    const char *regex = words ? "([0-9a-z,]*[,.])" : "([a-m])[n-z]";
    char answers[2][TARGETS][64];
    size_t found = 0, expected[2] = {0, 0};
    FILE *file = fopen("prompts.jsonl", "w");
    for (int i = 0; i < TARGETS; i++)
        fprintf(file, "{\"prompt\":\"%s%d\"}\n", target_prompt(i), i);
    need(fclose(file) == 0, "prompts.jsonl");
    for (int j = 0; j < 2; j++) found += find_answers(1 + 2 * j, words, answers[j]);
    need(found >= 8, "texts with an answer");

    file = fopen("targets.jsonl", "w");
    for (int i = 0; i < TARGETS; i++) {
        const char *answer = answers[i % 3 == 1][i], *target = *answer ? answer : "none";
        for (int j = 0; j < 2; j++) expected[j] += !strcmp(answers[j][i], target);
        fprintf(file, "{\"prompt\":\"%s%d\",\"target\":\",%s%s\"}\n", target_prompt(i), i, target,
                i % 4 ? "." : "");
    }
    need(fclose(file) == 0, "targets.jsonl");
    check(expected[0] != expected[1] && expected[0] > 0 && expected[1] > 0,
          "targets: %zu and %zu right tell little", expected[0], expected[1]);
    for (int b = 1; b <= 9; b += 4) {
        works(TASKS "--tasks targets.jsonl --answer-regex '%s' --recurrences 1,3 --batch-size %d "
                    "--json " TARGET_OPTIONS, regex, b);
        const retrofit_json *json = parse_json(out, out_size, "--tasks --json");
        for (int j = 0; j < 2; j++) {
            double acc = get_result(json, 1 + 2 * j, "acc");
            check(fabs(acc - (double)expected[j] / TARGETS) < 1e-6,
                  "targets, %s, r=%d: %g, not %zu of %d", regex, 1 + 2 * j, acc, expected[j],
                  TARGETS);
        }
    }
}

// Files of two lines; without a second line the first stands twice.
static void bad_tasks(void) {
    static const struct {
        int code;
        const char *what, *first, *second, *options;
    } bad[] = {
        {1, "line 2: another kind", "\"answer\":\" b\"",
         "\"choices\":[\" a\",\" b\"],\"answer\":1", ""},
        {1, "line 2: another kind", "\"target\":\"b\"", "\"answer\":\" b\"",
         "--answer-regex '(b)'"},
        {1, "line 1: needs at least two", "\"choices\":[\" a\"],\"answer\":0", "", ""},
        {1, "line 1: needs at least two", "\"choices\":\" a\",\"answer\":0", "", ""},
        {1, "line 1: needs at least two", "\"choices\":[\" a\",\" b\"],\"answer\":2", "", ""},
        {1, "line 1: needs at least two", "\"choices\":[\" a\",\" b\"],\"answer\":-1", "", ""},
        {1, "line 1: needs at least two", "\"choices\":[\" a\",\" b\"],\"answer\":\" a\"", "", ""},
        {1, "line 1: a choice", "\"choices\":[\" a\",\"\"],\"answer\":0", "", ""},
        {1, "line 1: a choice", "\"choices\":[\" a\",\" \"],\"answer\":0", "", ""},
        {1, "line 1: a choice", "\"choices\":[\" a\",7],\"answer\":0", "", ""},
        {1, "line 1: \"target\"", "\"target\":\"\"", "", ""},
        {1, "line 1: \"target\"", "\"target\":7", "", ""},
        {2, "--answer-regex", "\"target\":\"b\"", "", ""},
        {2, "--answer-regex", "\"answer\":\" b\"", "", "--answer-regex '(b)'"},
        {2, "parentheses", "\"target\":\"b\"", "", "--answer-regex b"},
        {2, "--answer-regex", "\"target\":\"b\"", "", "--answer-regex '(b'"},
        {2, "--chat", "\"answer\":\" b\"", "", "--chat --tokenizer chat/smollm"},
        {2, "--stop", "\"answer\":\" b\"", "", "--stop b"},
        {2, "--temperature", "\"answer\":\" b\"", "", "--top-k 3"},
        {1, "line 1: \"choices\" or", "\"choices\":[\" a\",\" b\"],\"target\":\"b\"", "",
         ""},
        {1, "line 1: nothing is left", "\"target\":\" $.\"", "", "--answer-regex '(b)'"},
        {1, "line 1: \"hops\"", "\"answer\":\" b\",\"hops\":16", "", ""},
        {1, "line 1: needs", "\"answer\":\"\"", "", ""},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const char *first = bad[i].first, *second = *bad[i].second ? bad[i].second : first;
        works("printf '%%s\\n' '{\"prompt\":\"a\",%s}' '{\"prompt\":\"a\",%s}' >lines", first,
              second);
        fails(bad[i].code, bad[i].what, TASKS "--tasks lines %s", bad[i].options);
    }
    fails(2, "--answer-regex", TASKS "--prompt a --answer-regex '(b)'");
    fails(2, "--json", TASKS "--prompt a --print-tokens --json");
}

static void tasks_of_base(void) {
    works(TASKS "--tasks lines --rows 1 --recurrences 1 --json 2>ls || "
          BASE "--tasks f/lookup/tasks.jsonl --json --rows 512");
    check(get_number(parse_json(out, out_size, "--rows"), "count") == 512, "--rows 512: %s", out);
    works(BASE "--tasks f/lookup/tasks.jsonl --json");
    const retrofit_json *json = parse_json(out, out_size, "--json");
    const retrofit_json *result = retrofit_json_get(json, "results")->child;
    bool right = fabs(get_result(json, 0, "acc") - .608398) < 1e-4;
    check(right && retrofit_json_get(result, "hops")->count == 8, "--tasks --json: %s", out);
}

// ---- Tasks as the harness does them -----------------------------------------------------------

// The results of choices behind a prompt; answer: the right one.
static char *run_choices(const char *options, const char *prompt, const char *choices, int answer) {
    FILE *file = fopen("lines", "w");
    fprintf(file, "{\"prompt\":\"%s\",\"choices\":[%s],\"answer\":%d}\n", prompt, choices, answer);
    need(fclose(file) == 0, "lines");
    works("infer --model random --recurrences 1,3 --tasks lines --json %s", options);
    return strdup(out);
}

static void same_choices(const char *style, const char *prompt, const char *choices,
                         const char *other_prompt, const char *other_choices) {
    char options[64];
    snprintf(options, sizeof options, "--tokenizer f/tokenizers/%s", style);
    char *one = run_choices(options, prompt, choices, 1);
    char *other = run_choices(options, other_prompt, other_choices, 1);
    check(!strcmp(one, other), "'%s' and %s: %s, but '%s' and %s: %s", prompt, choices, one,
          other_prompt, other_choices, other);
    free(one);
    free(other);
}

// White space at a prompt's end, an empty prompt, a BOS that is written out.
static void ends_and_beginnings_of_prompts(void) {
    for (size_t i = 0; i < 3; i++) {
        const char *style = styles[i];
        same_choices(style, "The fox ", "\"jumps\",\"2\",\"lazy\"", "The fox",
                     "\" jumps\",\" 2\",\" lazy\"");
        same_choices(style, "Q:\\n\\t", "\"ab\",\"bc\"", "Q:",
                     "\"\\n\\tab\",\"\\n\\tbc\"");
    }
    same_choices("llama3_style", "", "\" a\",\" bc\"", "<|begin_of_text|>", "\" a\",\" bc\"");
    same_choices("llama3_style", "A b", "\" a\",\" bc\"", "<|begin_of_text|>A b",
                 "\" a\",\" bc\"");
    same_choices("smollm_style", "", "\" a\",\" bc\"", "<|im_start|>", "\" a\",\" bc\"");
    shell("rm -rf nameless && cp -r random nameless && sed -i '/[be]os_token/d' "
          "nameless/config.json && cp f/tokenizers/smollm_style/tokenizer.json nameless && "
          "printf '{\"prompt\":\"\",\"answer\":\"a\"}' >lines");
    fails(1, "names no token that begins or ends a text",
          "infer --model nameless --recurrences 1 --tasks lines");
}

// Equal choices are equally likely wherever they stand, beside whatever, from random start states;
// and the order of a file and of its choices changes nothing.
static void equal_choices(void) {
    static const char *const texts[] = {" jumps", " over the lazy dog and more", " a"};
    double acc[3];
    char results[2][512];
    for (int order = 0; order < 2; order++) {
        FILE *file = fopen("equal.jsonl", "w");
        FILE *both = fopen("pairs.jsonl", "w");
        for (int k = 0; k < 60; k++) {
            int i = order ? 59 - k : k;
            const char *a = texts[i % 3], *b = texts[(i + 1) % 3];
            const char *prompt = choice_prompts[i % 4];
            fprintf(file, "{\"prompt\":\"%s %d\",\"choices\":[\"%s\",\"%s\"],", prompt, i, a, a);
            fprintf(file, "\"answer\":0}\n");
            fprintf(both, "{\"prompt\":\"%s %d\",\"choices\":[\"%s\",\"%s\"],\"answer\":%d}\n",
                    prompt, i, order ? a : b, order ? b : a, order);
        }
        need(fclose(file) == 0 && fclose(both) == 0, "equal.jsonl");
        works("infer --model random --tokenizer f/tokenizers/llama3_style --tasks equal.jsonl "
              "--recurrences 1,2,4 --json");
        const retrofit_json *json = parse_json(out, out_size, "equal choices");
        for (int j = 0; j < 3; j++) acc[j] = get_result(json, 1 << j, "acc");
        check(acc[0] == 1 && acc[1] == 1 && acc[2] == 1, "equal choices: %s", out);
        works("infer --model random --tokenizer f/tokenizers/llama3_style --tasks pairs.jsonl "
              "--recurrences 1,2,4 --json --noise .1");
        snprintf(results[order], sizeof results[order], "%s", out);
    }
    check(!strcmp(results[0], results[1]), "the order of tasks and choices: %s and %s", results[0],
          results[1]);
    char *last = run_choices("--tokenizer f/tokenizers/llama3_style", "a", "\" b\",\" b\"", 1);
    check(strstr(err, "note: lines: in 1 of 1 tasks the right choice equals one before it") &&
              get_result(parse_json(last, strlen(last), "one"), 1, "acc") == 0,
          "the second of equal choices: %s%s", err, last);
    check(strstr(last, "\"acc_stderr\":null") != NULL, "the standard error of one task: %s", last);
    free(last);
}

// What a row begins from does not depend on the rows beside it: the loss of two tasks is the mean
// of what each has alone.
static void same_start_states(void) {
    static const char *const lines[] = {
        "{\"prompt\":\"The fox jumps over\",\"answer\":\" the lazy dog\"}",
        "{\"prompt\":\"One, two\",\"answer\":\" three\"}",
    };
    double loss[3];
    for (int i = 0; i < 3; i++) {
        works("printf '%%s\\n' '%s' '%s' | head -n %d | tail -n %d >lines", lines[0], lines[1],
              i == 1 ? 2 : 1 + i / 2, 1 + i / 2);
        works("infer --model random --tokenizer f/tokenizers/llama3_style --tasks lines "
              "--recurrences 1 --json");
        loss[i] = get_result(parse_json(out, out_size, "a task"), 1, "loss");
    }
    check(fabs(loss[2] - (loss[0] + loss[1]) / 2) < 1e-5, "tasks alone: %g and %g, together: %g",
          loss[0], loss[1], loss[2]);
}

// Lines as editors write them, members that nothing reads, answers that begin inside a token.
static void lines_of_tasks(void) {
    works("printf '\\357\\273\\277{\"prompt\":\"a\",\"answer\":\" b\",\"label\":1}\\r\\n\\r\\n \\n"
          "{\"prompt\":\"a\",\"answer\":\" c\",\"label\":2,\"id\":7}\\r\\n' >lines");
    works(TASKS "--tasks lines --recurrences 1 --json");
    check(get_number(parse_json(out, out_size, "CR LF"), "count") == 2, "CR LF: %s", out);
    check(!strcmp(err, "note: lines: \"label\" in a line is not read here\n"), "unread: %s", err);
    works("printf '\\357\\273\\277{\"prompt\":\"a\",\"stop\":\"b\"}\\r\\n\\r\\n"
          "{\"prompt\":\"b\"}\\r\\n' >lines");
    works(TASKS "--batch lines --recurrences 1 --max-tokens 1");
    check(strstr(err, "note: lines: \"stop\" in a line is not read here\n") != NULL, "unread: %s",
          err);
    works("echo '{\"prompt\":\"The f\",\"answer\":\"ox and the\"}' >lines");
    works(TASKS "--tasks lines --recurrences 1");
    check(strstr(err, "note: lines: 1 of 1 answers or choices begin inside a token") != NULL,
          "inside a token: '%s'", err);
    works("echo '{\"prompt\":\"The fo\",\"answer\":\"x\"}' >lines");
    fails(1, "line 1: no token of the answer", TASKS "--tasks lines --recurrences 1");
    works("printf '{\"prompt\":\"a\",\"answer\":\"%%s\"}\n' \"$(seq -s ' ' 100)\" >lines");
    fails(1, "line 1: a task of", TASKS "--tasks lines --recurrences 1");
}

enum { SAYINGS = 6 };
static const char *const sayings[SAYINGS] = {
    " She has $1,250 and 3 more. The answer is $1,253.",
    "\\n#### 18",
    " The answer is 7.\\nSo 9 it is not",
    " It is (B), I think",
    " caf\xc3\xa9 7\xe2\x82\xac",
    " I do not know.",
};

// A model that says the i-th saying, a token, behind a prompt that is the i-th letter, and then
// ends. Embeddings and head are unit vectors, and the layers add nothing. loud: its logits are
// infinite.
static void make_speaker(const char *directory, bool loud) {
    retrofit_model *model = retrofit_load("f/lookup/base", &retrofit_cpu, RETROFIT_TRAINING);
    need(model != NULL, "a model");
    size_t d = model->config.n_embd, eos = (size_t)model->config.eos[0], first = 30;
    float *wte = model->wte.master, *lm_head = model->lm_head.master;
    for (size_t i = 0; i < model->config.coda; i++) {
        retrofit_layer *layer = &model->coda[i];
        memset(layer->w_out.master, 0, layer->w_out.rows * layer->w_out.cols * sizeof(float));
        memset(layer->w_down.master, 0, layer->w_down.rows * layer->w_down.cols * sizeof(float));
    }
    memset(wte, 0, model->wte.rows * d * sizeof *wte);
    memset(lm_head, 0, model->wte.rows * d * sizeof *lm_head);
    for (size_t i = 0; i < d; i++) model->ln_f.master[i] = 1;
    for (size_t i = 0; i < SAYINGS; i++) {
        wte[i * d + i] = 1;
        lm_head[(first + i) * d + i] = loud ? 3e38f : 1;
        wte[(first + i) * d + d - 1] = 1;
    }
    lm_head[eos * d + d - 1] = 1;
    need(mkdir(directory, 0777) == 0, directory);
    need(retrofit_save(model, directory, RETROFIT_F32, NULL), directory);
    retrofit_free(model);

    char path[64];
    snprintf(path, sizeof path, "%s/tokenizer.json", directory);
    FILE *file = fopen(path, "w");
    fputs("{\"added_tokens\":[{\"id\":65,\"content\":\"</s>\",\"special\":true}", file);
    for (size_t i = 0; i < SAYINGS; i++)
        fprintf(file, ",{\"id\":%zu,\"content\":\"%s\",\"special\":false}", first + i, sayings[i]);
    fputs("],\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false},"
          "\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"merges\":[],"
          "\"vocab\":{", file);
    for (int i = 0; i < SAYINGS; i++) fprintf(file, i ? ",\"%c\":%d" : "\"%c\":%d", 'A' + i, i);
    fputs("}}}\n", file);
    need(fclose(file) == 0, path);
}

// What a regular expression finds in each saying, normalized; NULL: nothing.
static const struct {
    const char *regex, *answers[SAYINGS];
} answer_cases[] = {
    {"#### (-?[0-9.,]+)", {[1] = "18"}},
    {"#### (\\-?[0-9\\.\\,]+)", {[1] = "18"}},
    {"(-?[$0-9.,]{2,})|(-?[0-9]+)", {"1253", "18", "9", NULL, "7"}},
    {"[Tt]he answer is ([^ ]+)", {"1253", [2] = "7.\\nso"}},
    {"answer is \\$?(\\d+)", {"1", [2] = "7"}},
    {"answer is (.*)", {"1253", [2] = "7"}},
    {"([0-9]+)[^0-9]*$", {"253", "18", "9", NULL, "7"}},
    {"\\(([A-D])\\)", {[3] = "b"}},
    {"caf(.) (\\d)", {[4] = "\xc3\xa9"}},
    {"\\d([^\\d\\s])", {[4] = "\xe2\x82\xac"}},
    {"(\xc3\xa9?\\s\\d[\xe2\x82\xac\xc3\xa9])", {[4] = "\xc3\xa9 7\xe2\x82\xac"}},
    {"[\xc3\xa9\xe2\x82\xac](?: (\\d))?", {NULL}}, // the last match has no group
    {"(?:not|is) ([a-z0-9$,]+)", {"1253", [2] = "not", [5] = "know"}},
    {"I ([[:alpha:]\\ ]+)", {[3] = "think", [5] = "do not know"}},
    {"([\\d,]*\\d)\\.", {"1253", [2] = "7"}},
    {"^\\s?([A-Z]\\w*)", {"She", [2] = "the", [3] = "IT", [5] = "I"}},
    {"([0-9]{2}$|\\W[0-9]{,1}) ?(so|m)?", {NULL, "18"}},
};

static void answer_regexes(void) {
    make_speaker("speaker", false);
    for (size_t i = 0; i < sizeof answer_cases / sizeof *answer_cases; i++) {
        const char *const *answers = answer_cases[i].answers;
        size_t found = 0;
        FILE *file = fopen("lines", "w");
        for (int j = 0; j < SAYINGS; j++) {
            found += answers[j] != NULL;
            fprintf(file, "{\"prompt\":\"%c\",\"target\":\"%s\"}\n", 'A' + j,
                    answers[j] ? answers[j] : "none");
        }
        need(fclose(file) == 0, "lines");
        works("infer --model speaker --tasks lines --json --max-tokens 4 --answer-regex '%s'",
              answer_cases[i].regex);
        double acc = get_result(parse_json(out, out_size, "answers"), 0, "acc");
        check(fabs(acc - (double)found / SAYINGS) < 1e-6, "/%s/: %g, not %zu of %d",
              answer_cases[i].regex, acc, found, SAYINGS);
    }
}

// What Python has and POSIX has not, or nobody has.
static void bad_answer_regexes(void) {
    static const char *const bad[] = {
        "is (.*?)x", "(a+?)",  "(a{1,2}?)",      "(a)\\1",         "(?=a)(b)", "(?i)(a)",
        "(?P<x>a)",  "\\b(a)", "(a\\Z)",         "([a-)",          "(a))",     "((a)",
        "*(a)",      "(a**)",  "(a++)",          "([\xc3\xa0-z])", "([z-a])",  "(a*)",
        "(?:a)",     "(\\x41)", "([^\xc3\xa9])", "(\xff)",         "(a)|$",    "([^\\w\\W])",
    };
    works("echo '{\"prompt\":\"A\",\"target\":\"7\"}' >lines");
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        fails(2, "--answer-regex: ", "infer --model speaker --tasks lines --answer-regex '%s'",
              bad[i]);
}

static void cut_answers(void) {
    static const char command[] = "infer --model speaker --tasks lines --answer-regex '([0-9]+)' ";
    works("printf '{\"prompt\":\"%%s\",\"target\":\"7\"}\\n' E C >lines");
    works("%s--max-tokens 1 --json", command);
    const retrofit_json *json = parse_json(out, out_size, "cut answers");
    check(get_result(json, 0, "cut") == 2 && get_result(json, 0, "acc") == .5, "cut: %s", out);
    check(strstr(err, "note: lines: 2 of 2 answers at 0 recurrences were cut off") != NULL,
          "cut: %s", err);
    works("%s--max-tokens 2 --json", command);
    json = parse_json(out, out_size, "answers that end");
    check(get_result(json, 0, "cut") == 0 && !strstr(err, "cut off"), "not cut: %s%s", out, err);
    // Of two tasks one is right: the standard error of a mean of 0 and 1 is sqrt(1/2)/sqrt(2).
    check(get_result(json, 0, "acc_stderr") == .5, "a standard error: %s", out);
}

static void infinite_logits(void) {
    make_speaker("loud", true);
    fails(1, "not finite", "infer --model loud --tasks lines --answer-regex '([0-9]+)'");
    works("echo '{\"prompt\":\"A\",\"choices\":[\"B\",\"C\"],\"answer\":0}' >lines");
    fails(1, "not finite", "infer --model loud --tasks lines");
}

// A prompt that is fed in chunks.
static void long_prompt(void) {
    size_t n = 0, size;
    FILE *file = fopen("prompt", "w");
    for (size_t i = 0; i < 1050; i++) fputs(i % 7 ? " a" : " of", file);
    need(fclose(file) == 0, "prompt");
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load("chat/smollm");
    char *text = slurp("prompt", &size);
    int32_t *ids = retrofit_encode(tokenizer, text, size, true, &n);
    need(n > 1024 && n <= 1100, "a long prompt");
    works(TALK "--prompt - --max-tokens 2 --json <prompt", "smollm");
    check_answer(parse_json(out, out_size, "--json"), ids, n, "a long prompt");
    free(ids);
    free(text);
    retrofit_tokenizer_free(tokenizer);
}

// ---- Exits, caches, drafts, noise -------------------------------------------------------------

#define PLAIN "infer --model random --tokenizer f/tokenizers/smollm_style --recurrences 5 "
#define DEEP PLAIN "--prompt 'Once upon' --max-tokens 24 "

// Options that leave the text as it is, and what is told of recurrences and drafts.
static void same_text(const double tokens[24], const double logprobs[24]) {
    static const char *const same[] = {
        "--exit kl --exit-threshold 0",
        "--exit minp-kl --exit-threshold 0 --kv-cache latest",
        "--exit argmax-stability --exit-threshold 1e9",
        "--exit latent-diff --exit-threshold 0 --kv-cache shared:5",
        "--kv-cache full",
        "--kv-cache shared:7",
        "--kv-cache grouped:1",
        "--speculative 2,4",
        "--speculative 1",
        "--speculative 1,3",
        "--speculative=auto",
        "--speculative",
        "--noise 0 --noise-type line",
    };
    static const char full_depth[] = "recurrences per token: 5.00 on average of at most 5:  5: 24; "
                                     "24 of 24 tokens are those of full depth";
    double other[32], recurrences[32];
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        works(DEEP "--json %s", same[i]);
        const retrofit_json *json = parse_json(out, out_size, "--json");
        size_t n = get_numbers(json, "tokens", other, 32);
        check(n == 24 && !memcmp(tokens, other, 24 * sizeof *tokens), "%s: other tokens: %s",
              same[i], out);
        size_t n_recurrences = get_numbers(json, "recurrences", recurrences, 32);
        size_t n_logprobs = get_numbers(json, "logprobs", other, 32);
        check(n_recurrences == 24 && n_logprobs == 24, "%s: lists of unequal length", same[i]);
        for (size_t j = 0; j < 24; j++)
            check(recurrences[j] == 5 && fabs(other[j] - logprobs[j]) < 1e-4,
                  "%s: token %zu took %g recurrences, logprob %g, plainly %g", same[i], j,
                  recurrences[j], other[j], logprobs[j]);
        bool exit = strstr(same[i], "--exit"), told = strstr(err, full_depth);
        check(exit == told, "%s: %s", same[i], err);
        bool drafts = strstr(same[i], "--spec"), counted = strstr(err, "tokens under way");
        check(drafts == counted && drafts == (retrofit_json_get(json, "drafts") != NULL), "%s: %s",
              same[i], err);
    }
}

// What changes the text, does; and its seed repeats it.
static void other_text(const double tokens[24]) {
    static const char *const other[] = {
        "--continuous",
        "--noise 3000",
        "--noise 3000 --noise-type chi",
        "--kv-cache shared:1 --state-init zero --continuous",
    };
    double once[32], again[32];
    for (size_t i = 0; i < sizeof other / sizeof *other; i++) {
        works(DEEP "--json %s", other[i]);
        get_numbers(parse_json(out, out_size, "--json"), "tokens", once, 32);
        check(memcmp(tokens, once, 24 * sizeof *tokens) != 0, "%s: the same text", other[i]);
        works(DEEP "--json %s", other[i]);
        get_numbers(parse_json(out, out_size, "--json"), "tokens", again, 32);
        check(!memcmp(again, once, 24 * sizeof *tokens), "%s: another text the second time",
              other[i]);
    }
}

static void exits_and_caches(void) {
    double tokens[32], logprobs[32], recurrences[32];
    works(DEEP "--json");
    const retrofit_json *json = parse_json(out, out_size, "--json");
    size_t n = get_numbers(json, "tokens", tokens, 32);
    size_t n_logprobs = get_numbers(json, "logprobs", logprobs, 32);
    check(n == 24 && n_logprobs == 24, "%zu tokens of 24", n);
    same_text(tokens, logprobs);
    other_text(tokens);

    // The first token follows the prompt, which takes all recurrences; the others stop at once.
    works(DEEP "--json --exit entropy-diff --exit-threshold 1e9");
    n = get_numbers(parse_json(out, out_size, "--json"), "recurrences", recurrences, 32);
    for (size_t i = 0; i < n; i++)
        check(recurrences[i] == (i ? 1 : 5),
              "an exit that always fires: token %zu took %g recurrences", i, recurrences[i]);
    check(strstr(err, "1.17 on average of at most 5:  1: 23  5: 1;") != NULL,
          "an exit that always fires: %s", err);

    works(DEEP "--kv-cache shared:2 --temperature 1");
    check(strstr(err, "KV cache ") != NULL, "no size of the KV cache: %s", err);
    works(DEEP "--temperature 1.3 --top-k 40 --seed 3 && "
          DEEP "--speculative 2,4 --temperature 1.3 --top-k 40 --seed 3");
    check(out_size % 2 == 0 && !memcmp(out, out + out_size / 2, out_size / 2),
          "drawn text is another one with drafts: %s", out);
}

// Drafts in a conversation: a turn that ends amid them leaves nothing behind its end in the cache.
static void drafted_conversation(void) {
#define TURNS TALK "--chat --interactive --recurrences 30 --max-tokens %d --stop 'e|a' <users "
    shell("printf 'Once\\nupon\\na time\\nthere\\nwas\\n' >users");
    for (int limit = 6; limit < 16; limit++)
        works(TURNS ">plain && " TURNS ">drafted --speculative %s && cmp plain drafted", "smollm",
              limit, "smollm", limit, limit % 2 ? "3,9" : "auto");
}

#define SMALL "infer --model small --prompt 'a=1 b=a | b' --recurrences 4 --max-tokens 20 "

// A tokenizer of more ids than the model has: none of them is drawn, or read beyond the logits.
static void larger_tokenizer(void) {
    shell("cp -r f/olmo2/recurrent small && cp f/lookup/base/token* small");
    works(SMALL ">plain && " SMALL "--exit kl --exit-threshold 0 >exits && cmp plain exits");
    check(strstr(err, "vocabulary of 97"), "more ids: %s", err);
    check(strstr(err, "20 of 20 tokens are those of full depth"), "--exit: %s", err);
    works(SMALL ">plain && " SMALL "--speculative 1,3 >drafted && cmp plain drafted");
    works(SMALL "--trace trace.tsv");
}

// A line of --eval's table for decoding.
typedef struct {
    size_t r, bytes;
    double loss, full_loss, recurrences;
} decoding;

#define LOSSES \
    "infer --model random --eval numbers.bin --seq-len 20 --rows 5 --batch-size 2 --recurrences 4 "

static decoding eval_decoding(const char *options) {
    decoding d;
    works(LOSSES "%s", options);
    int fields = sscanf(out, "%*[^\n] %zu %lf %*f %lf %lf %zu", &d.r, &d.loss, &d.full_loss,
                        &d.recurrences, &d.bytes);
    check(fields == 5 && d.r == 4, "%s: no table: %s", options, out);
    return d;
}

// Noise without a KV cache: its strength may be drawn, for which a cache's positions are no help.
static void noisy_losses(void) {
    static const char *const kinds[] = {"fixed", "geom", "sqrt", "line", "chi"};
    double quiet, noisy;
    works(LOSSES);
    check(sscanf(out, "%*[^\n] %*u %lf", &quiet) == 1, "no table: %s", out);
    for (int i = 0; i < 5; i++) {
        works(LOSSES "--noise 3 --noise-type %s", kinds[i]);
        check(sscanf(out, "%*[^\n] %*u %lf", &noisy) == 1, "%s: no table: %s", kinds[i], out);
        check(noisy != quiet && isfinite(noisy), "%s noise: loss %g, without %g", kinds[i], noisy,
              quiet);
    }
}

static void cached_losses(void) {
    static const char *const options[] = {
        "--kv-cache shared:1",
        "--exit latent-diff --exit-threshold 1e9",
        "--kv-bf16",
        "--exit kl --exit-threshold 1e9 --kv-cache grouped:2",
    };
    double plain_loss = 0;
    shell("printf '{\"text\":\"%s\"}\\n' \"$(seq 1 90 | tr '\\n' ' ')\" >numbers.jsonl && "
          "convert --tokenize numbers.jsonl --tokenizer f/tokenizers/smollm_style --to numbers.bin "
          ">ls");
    works(LOSSES);
    sscanf(out, "%*[^\n] 4 %lf", &plain_loss);
    decoding plain = eval_decoding("--kv-cache full"), d[4];
    check(plain.recurrences == 4, "--kv-cache full: %g recurrences on average", plain.recurrences);
    check(fabs(plain.loss - plain.full_loss) < 1.01e-4, "decoding's loss %g, the full pass's %g",
          plain.loss, plain.full_loss);
    check(fabs(plain.full_loss - plain_loss) < 2e-3, "by full pass %g, --eval alone says %g",
          plain.full_loss, plain_loss); // whose rows have other start states
    for (size_t i = 0; i < 4; i++) {
        d[i] = eval_decoding(options[i]);
        check(fabs(d[i].full_loss - plain_loss) < 2e-3, "%s: by full pass %g, --eval alone says %g",
              options[i], d[i].full_loss, plain_loss);
        bool early = strstr(options[i], "--exit");
        double mean = (4 + 19) / 20.0; // the first token of a row never stops early
        check(early ? fabs(d[i].recurrences - mean) < 0.006 : d[i].recurrences == 4,
              "%s: %g recurrences on average", options[i], d[i].recurrences);
        if (i < 2)
            check(d[i].loss != d[i].full_loss, "%s: the loss is the full pass's", options[i]);
        if (i == 0 || i == 3)
            check(d[i].bytes < plain.bytes, "%s: %zu bytes per token, full %zu", options[i],
                  d[i].bytes, plain.bytes);
    }
    check(d[2].bytes * 2 == plain.bytes, "--kv-bf16: %zu bytes per token, not half of %zu",
          d[2].bytes, plain.bytes);
}

// ---- --trace ----------------------------------------------------------------------------------

// One token after recurrence r: entropy and the likeliest token are those of its logits.
static void check_trace_entry(const retrofit_json *entry, const float *logits, size_t known,
                              size_t position, size_t r) {
    double entropy = 0, total = 0;
    for (size_t v = 0; v < known; v++) total += exp((double)logits[v]);
    for (size_t v = 0; v < known; v++) {
        double p = exp((double)logits[v]) / total;
        entropy -= p * log(p);
    }
    double found = get_number(entry, "entropy");
    check(get_number(entry, "r") == (double)r && fabs(found - entropy) < 1e-4 * entropy,
          "trace: token %zu, r %zu: entropy %g, not %g", position, r, found, entropy);

    const retrofit_json *top = retrofit_json_get(entry, "top");
    int32_t best = retrofit_argmax(logits, known);
    bool ok = get_number(entry, "change") > 0 && top && top->count == 3;
    ok = ok && get_number(top->child, "token") == best;
    ok = ok && fabs(get_number(top->child, "p") - exp((double)logits[best]) / total) < 1e-4;
    ok = ok && get_number(top->child->next, "p") <= get_number(top->child, "p");
    check(ok, "trace: token %zu, r %zu: another likeliest token, or no change", position, r);
}

// Entropies and likeliest tokens are those of --logits at every r; the picture has a line a token.
static void traces(void) {
    size_t size, position = 0, lines = 0, shown = 0;
    int32_t ids[64];
    float *logits[4];
    works("infer --model random --tokenizer f/tokenizers/smollm_style --prompt 'Once upon\na' "
          "--recurrences 4 --max-tokens 5 --state-init zero --trace trace.jsonl");
    char *text = slurp("trace.jsonl", &size), *picture = strdup(err), *end;
    for (char *line = text; (end = strchr(line, '\n')); line = end + 1) {
        const retrofit_json *json = parse_json(line, (size_t)(end - line), "trace");
        ids[lines++] = (int32_t)get_number(json, "token");
    }
    for (int i = 0; i < 4; i++) {
        char options[64];
        snprintf(options, sizeof options, "--recurrences %d --state-init zero", i + 1);
        logits[i] = logits_of("random", ids, lines, V, options);
    }

    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load("f/tokenizers/smollm_style");
    size_t known = retrofit_tokenizer_size(tokenizer);
    for (char *line = text; (end = strchr(line, '\n')); line = end + 1) {
        const retrofit_json *json = parse_json(line, (size_t)(end - line), "trace");
        const retrofit_json *list = retrofit_json_get(json, "recurrences");
        const retrofit_json *entry = list ? list->child : NULL;
        check(get_number(json, "position") == (double)position && list && list->count == 4,
              "trace: %.*s", (int)(end - line), line);
        for (size_t i = 0; entry && i < 4; i++) {
            check_trace_entry(entry, logits[i] + position * V, known, position, i + 1);
            entry = entry->next;
        }
        position++;
    }
    for (char *p = strchr(picture, '\n'); p; p = strchr(p + 1, '\n')) shown++;
    check(shown == lines + 3, // its two lines of head, and how long it took
          "the picture has %zu lines of %zu tokens: %s", shown, lines, picture);
    for (int i = 0; i < 4; i++) free(logits[i]);
    free(text);
    free(picture);
    retrofit_tokenizer_free(tokenizer);
}

static void bad_recurrences(void) {
    static const struct {
        const char *what, *options;
    } bad[] = {
        {"latest, shared:M or grouped:M", "--exit kl --kv-cache full"},
        {"--kv-cache is full, latest", "--kv-cache half"},
        {"positive numbers", "--kv-cache shared:0"},
        {"positive numbers", "--kv-cache grouped:x"},
        {"goes with --exit", "--exit-threshold 1"},
        {"none|entropy-diff", "--exit never"},
        {"D1,D2 like 2,4", "--speculative 4,4"},
        {"D1,D2 like 2,4", "--speculative 1,2,3"},
        {"D1,D2 like 2,4", "--speculative often"},
        {"does not go with --exit", "--speculative 2,3 --exit kl"},
        {"does not go with --continuous", "--speculative 2,3 --continuous"},
        {"does not go with --noise", "--speculative 2,3 --noise 1"},
        {"does not go with --kv-cache", "--speculative 2,3 --kv-cache shared:2"},
        {"--noise", "--noise=-1"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        fails(2, bad[i].what, DEEP "%s", bad[i].options);
    fails(2, "plain model", BASE "--prompt 'Once upon' --exit kl");
    fails(2, "plain model", BASE "--prompt 'Once upon' --trace bad");
    fails(2, "--exit does not go with --logits",
          "infer --model random --tokens 1,2 --logits bad --exit kl");
    fails(2, "--speculative does not go with --eval",
          "infer --model random --eval numbers.bin --speculative 2,3");
    fails(2, "but for a \"target\"", BASE "--tasks f/lookup/tasks.jsonl --kv-cache shared:2");
    fails(2, "--trace goes with --prompt", "infer --model random --eval numbers.bin --trace bad");
    works("! " DEEP "--speculative 5 2>said && grep '^infer: --speculative 5: a reading as' said");
    works("! " DEEP "--speculative 2,5 2>said && grep '^infer: --speculative 2,5: a read' said");
    fails(2, "but for a \"target\"", "infer --model random --tasks f/lookup/tasks.jsonl "
                                     "--speculative 2,3");
    works("! " DEEP "--trace no/where 2>said && grep '^infer: no/where: No such file' said");
}

// Rows that stop at different times get in a batch what they get alone, from random start states
// too.
static void exits_in_batches(void) {
#define WITHOUT_TIMES "sed 's/\"prompt_sec.*//; s/\"logprobs.*\"recur/\"recur/'"
#define EARLY PLAIN "--batch two.jsonl --exit kl --exit-threshold .02 --max-tokens 20 "
    shell("printf '{\"prompt\":\"Once\"}\\n{\"prompt\":\"upon a time\"}\\n' >two.jsonl");
    fails(1, "full KV cache", PLAIN "--batch two.jsonl --exit kl --kv-cache shared:2");
    works(EARLY "| " WITHOUT_TIMES " >together && "
          EARLY "--batch-size 1 | " WITHOUT_TIMES " >alone && cmp together alone && "
          "grep -v '\"recurrences\":\\[5[5,]*\\]' alone");
}

// What the model's generation_config.json says is the model's, wherever the tokenizer lies.
static void settings_beside_the_model(void) {
    shell("rm -rf settled other && cp -r random settled && "
          "cp -r f/tokenizers/llama3_style other && "
          "printf '{\"do_sample\":true}' >settled/generation_config.json && "
          "printf '{\"top_p\":0.5}' >other/generation_config.json");
    works("infer --model settled --tokenizer other --prompt a --recurrences 1 --max-tokens 1");
    check(strstr(err, "note: settled/generation_config.json: ") && strstr(err, "do_sample true"),
          "the model's settings: %s", err);
    check(!strstr(err, "top_p"), "the tokenizer's settings: %s", err);
}

// A model whose config.json says how it was trained is read in such rows, from such states, unless
// the command line says otherwise; what was taken over is told in one line.
static void as_trained(void) {
    static const char rows[] = "--eval numbers.bin --rows 5 --json | sed 's/,.seconds[^}]*//g'";
    static const char both[] = "note: --state-init zero, --seq-len 20: as the model was trained\n";
    static const char text[] = "--recurrences 3 --prompt 'Once' --max-tokens 9 --tokenizer "
                               "f/tokenizers/smollm_style";
    shell("cp -r random trained && sed 's/\"head_dim\"/\"trained_seq_len\": 20, "
          "\"trained_state_init\": \"zero\", &/' random/config.json >trained/config.json");
    works("infer --model random --seq-len 20 --state-init zero %s >typed", rows);
    works("infer --model trained %s >taken && cmp typed taken", rows);
    check(!strncmp(err, both, strlen(both)) && !strstr(err + strlen(both), "trained\n"),
          "--eval of a trained model: %s", err);
    works("infer --model random --seq-len 30 --state-init normal %s >typed", rows);
    works("infer --model trained --seq-len 30 --state-init normal %s >taken && cmp typed taken",
          rows);
    check(!strstr(err, "as the model was trained"), "--eval as typed: %s", err);

    works("infer --model random --state-init zero %s >typed", text);
    works("infer --model trained %s >taken && cmp typed taken", text);
    check(strstr(err, "note: --state-init zero: as the model was trained\n") != NULL,
          "--prompt of a trained model: %s", err);
    works("infer --model random %s >typed", text);
    works("infer --model trained --state-init normal %s >taken && cmp typed taken", text);
    check(!strstr(err, "as the model was trained"), "--prompt as typed: %s", err);

    // A row that the context has no room for is not taken; a plain Llama has rows alone.
    shell("sed -i 's/\"trained_seq_len\": 20/\"trained_seq_len\": 129/; s/zero/normal/' "
          "trained/config.json");
    works("infer --model random %s >typed", rows);
    works("infer --model trained %s >taken && cmp typed taken", rows);
    check(!strstr(err, "as the model was trained"), "rows beyond the context: %s", err);
    shell("sed 's/131/1000/;s/\"head_dim\"/\"trained_seq_len\": 20, \"trained_state_init\": "
          "\"zero\", &/' f/tiny/base/config.json >llama.json && convert --random llama.json --to "
          "llama >ls && ! grep trained llama/config.json && cp -r llama again && "
          "sed 's/\"head_dim\"/\"trained_seq_len\": 20, &/' llama/config.json "
          ">again/config.json");
    works("infer --model llama --seq-len 20 %s >typed", rows);
    works("infer --model again %s >taken && cmp typed taken", rows);
    check(strstr(err, "note: --seq-len 20: as the model was trained\n") != NULL,
          "--eval of a plain Llama: %s", err);
}

int main(void) {
    enter("infer");
    shell("sed 's/131/1000/' f/tiny/recurrent/config.json >random.json && "
          "convert --random random.json --to random >ls");
    for (size_t i = 0; i < 3; i++) json_of_a_prompt(styles[i]);
    text_behind_a_newline();
    stop_strings();
    stop_strings_of_base();
    batches();
    bad_batches();
    settings_beside_the_model();

    chat_tokenizers();
    lists_of_messages();
    ends_of_turns();
    bad_chats();
    bad_conversations();
    for (size_t i = 0; i < 3; i++) conversations(&chats[i]);

    exits_and_caches();
    drafted_conversation();
    larger_tokenizer();
    cached_losses();
    noisy_losses();
    as_trained();
    traces();
    bad_recurrences();
    exits_in_batches();

    long_prompt();
    choices();
    targets(false);
    targets(true);
    bad_tasks();
    tasks_of_base();
    ends_and_beginnings_of_prompts();
    equal_choices();
    same_start_states();
    lines_of_tasks();
    answer_regexes();
    bad_answer_regexes();
    cut_answers();
    infinite_logits();
    retrofit_json_free(parsed);
    return leave("infer");
}

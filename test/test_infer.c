// infer's ways to generate and evaluate, run as a user would: JSON, stop strings, batches, conversations, tasks; each against what
// --logits, the tokenizer and a prompt alone say.
#include "run.h"
#include <ctype.h>

// A random recurrent model of 1,000 tokens, and the three kinds of tokenizers that fit it.
enum { V = 1000 };
static const char *const styles[] = {"llama2_style", "llama3_style", "smollm_style"};
#define RANDOM "infer --model random --state-init zero --recurrences 3 "
#define BASE "infer --model f/lookup/base "

static retrofit_json *parsed; // what the last call of json() read
static const retrofit_json *json(const char *text, size_t size, const char *what) {
    retrofit_json_free(parsed);
    return parsed = retrofit_json_parse(text, size, what), need(parsed != NULL, text), parsed;
}
static double number_of(const retrofit_json *j, const char *key) {
    const retrofit_json *n = retrofit_json_get(j, key);
    return check(n && n->type == RETROFIT_JSON_NUMBER, "JSON: no number %s", key) ? n->number : NAN;
}
static const retrofit_json *string(const retrofit_json *j, const char *key) {
    const retrofit_json *s = retrofit_json_get(j, key);
    return need(s && s->type == RETROFIT_JSON_STRING, key), s;
}
static size_t numbers(const retrofit_json *j, const char *key, double *to, size_t most) {
    const retrofit_json *l = retrofit_json_get(j, key);
    need(l && l->type == RETROFIT_JSON_ARRAY && l->count <= most, key);
    for (l = l->child; l; l = l->next) *to++ = l->number;
    return retrofit_json_get(j, key)->count;
}

static double log_probability(const float *logits, size_t v, size_t id) {
    double sum = 0;
    for (size_t i = 0; i < v; i++) sum += exp((double)logits[i] - (double)logits[id]);
    return -log(sum);
}

// What is said of each token is what --logits says of it; and what random tokens make, control characters and halves of characters
// too, is JSON, and the text that comes without --json.
static void json_of_a_prompt(const char *style) {
    double tokens[64], logprobs[64], recurrences[64];
    char path[128], options[256];
    snprintf(path, sizeof path, "f/tokenizers/%s", style);
    retrofit_tokenizer *t = retrofit_tokenizer_load(path);
    for (int seed = 1; seed <= 2; seed++) {
        snprintf(options, sizeof options, "--tokenizer %s --prompt 'Once \"upon\"\n' --max-tokens 40 --temperature 1.2 --seed %d", path,
                 seed);
        works(RANDOM "%s", options);
        char *text = strdup(out);
        works(RANDOM "%s --json", options);
        const retrofit_json *j = json(out, out_size, "--json");
        size_t n = numbers(j, "tokens", tokens, 64), prompt = 0, size = string(j, "text")->length;
        int32_t *ids = retrofit_encode(t, "Once \"upon\"\n", 12, true, &prompt), all[128];
        check(numbers(j, "logprobs", logprobs, 64) == n && numbers(j, "recurrences", recurrences, 64) == n,
              "--json: lists of unequal length: %s", out);
        check(number_of(j, "prompt_tokens") == (double)prompt, "--json: %g tokens of prompt, not %zu", number_of(j, "prompt_tokens"),
              prompt);
        check(number_of(j, "prompt_seconds") >= 0 && number_of(j, "generation_seconds") >= 0, "--json: no times: %s", out);
        check(!strcmp(string(j, "finish_reason")->string, n == 40 ? "length" : "stop"), "--json: %zu tokens, finish_reason %s", n,
              string(j, "finish_reason")->string);
        check(size + 1 == strlen(text) && !memcmp(string(j, "text")->string, text, size), "%s: --json's text is not '%s' but %s", style,
              text, out);
        for (size_t i = 0; i < prompt + n; i++) all[i] = i < prompt ? ids[i] : (int32_t)tokens[i - prompt];
        float *x = logits_of("random", all, prompt + n, V, "--recurrences 3 --state-init zero");
        for (size_t i = 0; i < n; i++) {
            double expected = log_probability(x + (prompt + i - 1) * V, V, (size_t)tokens[i]);
            check(fabs(logprobs[i] - expected) < 1e-4 && recurrences[i] == 3, "%s: token %zu: logprob %g, not %g, or %g recurrences", style,
                  i, logprobs[i], expected, recurrences[i]);
        }
        free(text), free(x), free(ids);
    }
    retrofit_tokenizer_free(t);
}

// A prompt's newline, a byte token where the tokenizer is of SentencePiece's kind, is no part of the text behind it; a first space is.
static void text_behind_a_newline(void) {
    for (int seed = 1; seed < 6; seed++) {
        double tokens[8];
        size_t size, n;
        works(RANDOM "--tokenizer f/tokenizers/llama2_style --prompt 'Once\n' --max-tokens 6 --temperature 1 --json --seed %d", seed);
        const retrofit_json *j = json(out, out_size, "--json");
        retrofit_tokenizer *t = retrofit_tokenizer_load("f/tokenizers/llama2_style");
        int32_t ids[8] = {retrofit_tokenizer_id(t, "\xe2\x96\x81the")};
        n = numbers(j, "tokens", tokens, 7);
        for (size_t i = 0; i < n; i++) ids[i + 1] = (int32_t)tokens[i];
        char *text = retrofit_decode(t, ids, n + 1, true, &size);
        need(text && size >= 3, "decoded");
        check(string(j, "text")->length == size - 3 && !memcmp(string(j, "text")->string, text + 3, size - 3),
              "behind a newline: %s, not '%s'", out, text + 3);
        free(text), retrofit_tokenizer_free(t);
    }
}

// About n bytes of text from about `at`, whole characters; returns how many.
static size_t characters(const char *text, size_t at, size_t n, char *to) {
    while ((text[at] & 0xc0) == 0x80) at++;
    while ((text[at + n] & 0xc0) == 0x80) n++;
    return memcpy(to, text + at, n), to[n] = 0, n;
}

static void escaped(char *to, const char *text, size_t size) { // as --stop in single quotes
    for (size_t i = 0; i < size; i++)
        if (text[i] == '\'') to += sprintf(to, "'\\''");
        else
            to += sprintf(to,
                          text[i] == '\n'                     ? "\\n"
                          : text[i] == '\t'                   ? "\\t"
                          : text[i] == '\\' || text[i] == '|' ? "\\%c"
                                                              : "%c",
                          text[i]);
    *to = 0;
}

// The text ends before the first of the stop strings in it, wherever tokens begin and end, and whatever only begins like one is shown.
static void stop_strings(void) {
    static const char command[] = RANDOM "--tokenizer f/tokenizers/llama3_style --prompt 'a b' --max-tokens 60 --temperature 1 --seed 5";
    works("%s", command);
    char *text = strdup(out), a[64], b[64], never[64];
    size_t size = strlen(text) - 1;
    need(size > 100, "text to stop");
    for (size_t i = 0; i < 8; i++) {
        size_t at = i * size / 9, n = 1 + i % 7, other = size / 2 + i;
        char first[16] = {0}, second[16] = {0};
        size_t like = characters(text, at / 2, 4, never); // begins like something in the text
        never[like] = 1, never[like + 1] = 0;
        escaped(a, first, characters(text, at, n, first)), escaped(b, second, characters(text, other, 5, second));
        size_t end = (size_t)(strstr(text, first) - text), end2 = (size_t)(strstr(text, second) - text);
        if (end2 < end) end = end2;
        works("%s --stop '%s|%s|%s'", command, never, b, a);
        check(out_size == end + 1 && !memcmp(out, text, end) && out[end] == '\n', "--stop '%s|%s|%s': '%s' of '%s'", never, b, a, out,
              text);
        works("%s --stop '%s|%s|%s' --json", command, never, b, a);
        const retrofit_json *j = json(out, out_size, "--stop"), *s = string(j, "text");
        check(s->length == end && !memcmp(s->string, text, end) && !strcmp(string(j, "finish_reason")->string, "stop"),
              "--stop with --json: %s", out);
    }
    works("%s --stop '%s'", command, never);
    check(!strcmp(out, text), "a stop string that does not come changes the text: '%s', not '%s'", out, text), free(text);
    works(BASE "--prompt 'a=1 b=a | b' --max-tokens 9 --stop '1='");
    check(!strcmp(out, "=\n"), "--stop over two tokens: '%s'", out);
    works(BASE "--prompt 'a=1 b=a | b' --max-tokens 2 --stop '=1=1=2'");
    check(!strcmp(out, "=1=1\n"), "half a stop string at the end of the text: '%s'", out);
    works(BASE "--prompt 'q=2 h=q' --max-tokens 40 --stop ' \\| |\\\\'");
    check(out_size > 1 && !strchr(out, '|'), "--stop at a bar: '%s'", out);
    fails(2, "--stop", BASE "--prompt a --stop ''"), fails(2, "--stop", BASE "--prompt a --stop 'a|'"),
        fails(2, "--stop", BASE "--prompt a --stop 'a\\x'");
    fails(2, "--stop", BASE "--prompt a --stop 'a\\'"), fails(2, "UTF-8", BASE "--prompt a --stop '\xe2\x96'"),
        fails(2, "--stop", BASE "--prompt a --stop '%s'", "a|a|a|a|a|a|a|a|a|a|a|a|a|a|a|a|a");
}

// Prompts of many lengths, some of which fill the context of 128 or end at a stop string: in a batch of any size each gets the text that it
// gets alone, in the order of the file, with its id. Draws are a prompt's own too.
#define BATCH RANDOM "--tokenizer f/tokenizers/smollm_style --stop 'ans|Source' "
static void batches(void) {
    enum { N = 11 };
    static const char *const ids[] = {"", "\"id\":-1.50,", "\"id\":\"\\u000a\\\"x\","};
    char *texts[N], *drawn = NULL, prompt[1024], *end;
    size_t stopped = 0, full = 0, sizes[] = {1, 3, 8, 100};
    FILE *f = fopen("batch.jsonl", "w");
    need(f != NULL, "batch.jsonl");
    for (size_t i = 0; i < N; i++) {
        *prompt = 0;
        for (size_t j = 0; j < 1 + i * 37 % 120; j++) strcat(prompt, j % 3 ? " of" : " a");
        works(BATCH "--prompt '%s'", prompt);
        texts[i] = strdup(out), out[out_size - 1] = 0;
        fprintf(f, "%s{%s\"prompt\":\"%s\"}\n", i % 2 ? "\n" : "", ids[i % 3], prompt);
    }
    fclose(f);
    for (size_t b = 0; b < 4; b++) {
        works(BATCH "--batch batch.jsonl --batch-size %zu", sizes[b]);
        char *line = out;
        for (size_t i = 0; i < N && (end = strchr(line, '\n')); i++, line = end + 1) {
            const retrofit_json *j = json(line, (size_t)(end - line), "--batch"), *s = string(j, "text");
            check(s->length + 1 == strlen(texts[i]) && !memcmp(s->string, texts[i], s->length), "--batch-size %zu: %.*s, not '%s'",
                  sizes[b], (int)(end - line), line, texts[i]);
            check(strncmp(line + 1, ids[i % 3], strlen(ids[i % 3])) == 0 && !retrofit_json_get(j, "id") == (i % 3 == 0),
                  "--batch: no id %s: %.30s", ids[i % 3], line);
            bool stop = !strcmp(string(j, "finish_reason")->string, "stop");
            stopped += stop, full += !stop && number_of(j, "prompt_tokens") + (double)retrofit_json_get(j, "tokens")->count == 128;
        }
        check(line == out + out_size, "--batch-size %zu: more than %d lines: %s", sizes[b], N, line);
        works(BATCH "--batch batch.jsonl --batch-size %zu --temperature 1 --max-tokens 9 | sed 's/\"logprobs.*//'", sizes[b]);
        if (b == 0) drawn = strdup(out);
        check(!strcmp(drawn, out), "--batch-size %zu draws '%s', not '%s'", sizes[b], out, drawn);
    }
    need(stopped >= 4 && full >= 4, "prompts that stop, and that fill the context");
    for (size_t i = 0; i < N; i++) free(texts[i]);
    free(drawn);
    static const struct { const char *what, *line; } bad[] = {
        {"line 2", "{\"prompt\":1}"}, {"line 2", "{\"prompt\":\"\"}"}, {"line 2", "{\"prompt\":\"a\",\"id\":null}"}, {"line 2: byte 2", "{"}, {"line 2", "[]"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        works("printf '%%s\\n' '{\"prompt\":\"a\"}' '%s' >lines", bad[i].line);
        fails(1, bad[i].what, BATCH "--batch lines");
    }
    works("(echo; printf '{\"prompt\":\"'; seq -s ' ' 100; echo '\"}') | tr -d '\\n' | sed 's/}/}\\n/' >lines");
    fails(1, "line 1: the prompt has", BATCH "--batch lines");
    fails(1, "no prompts", BATCH "--batch /dev/null"), fails(1, "No such file", BATCH "--batch missing"),
        fails(1, "Is a directory", BATCH "--batch .");
    fails(2, "--batch-size", BATCH "--batch lines --batch-size 0"), fails(2, "--prompt", BATCH "--batch lines --prompt a");
}

// ---- Chat --------------------------------------------------------------------------------------------------------------------
// What Hugging Face's apply_chat_template made (Jinja2, trim_blocks, lstrip_blocks) of the templates of Llama-3-8B-Instruct,
// SmolLM2-135M-Instruct and TinyLlama-1.1B-Chat, in parts: BOS, before a role, behind it, behind a text.
static const struct { const char *style, *begin, *open, *close, *end, *stop; bool trims; } chats[] = {
    {"llama3", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>", true},
    {"smollm", "", "<|im_start|>", "\n", "<|im_end|>\n", "<|im_end|>", false},
    {"llama2", "<s>", "<|", "|>\n", "</s>\n", "</s>", false}};
#define TALK "infer --model talk --state-init zero --recurrences 3 --tokenizer chat/%s "

static void text_file(const char *path, const char *text) { write_bytes(path, text, strlen(text)); }

static void chat_tokenizers(void) {
    shell(
        "mkdir chat && cp -rL f/tokenizers chat/f && cd chat && mv f/llama3_style llama3 && mv f/llama2_style llama2 && mv f/smollm_style smollm && "
        "sed -i 's/\"added_tokens\": \\[/&{\"id\":800,\"content\":\"<|start_header_id|>\",\"special\":true},{\"id\":801,\"content\":\"<|end_header_id|>\","
        "\"special\":true},{\"id\":802,\"content\":\"<|eot_id|>\",\"special\":true},/' llama3/tokenizer.json && "
        "sed -i 's/{/{\"chat_template\":\"{% if 1 %}<|user|>{% endif %}\",/' llama2/tokenizer_config.json && "
        "cp -r llama3 dated && cp -r llama3 today && cp -r smollm named && cp -r smollm qwen");
    // What matters of the templates of Llama-3.1, Llama-3.2, SmolLM2 (its newlines are newlines) and Qwen2.5 (its are \n, and more comes before)
    text_file("chat/dated/chat_template.jinja",
              "{{- \"Cutting Knowledge Date: December 2023\\n\" }}{{- \"Today Date: \" + date_string + \"\\n\\n\" }}");
    text_file("chat/today/chat_template.jinja",
              "{%- set date_string = strftime_now(\"%d %b %Y\") %}{{- \"Cutting Knowledge Date: December 2023\\n\" }}");
    text_file("chat/named/tokenizer_config.json", "{\"chat_template\": \"{{ '<|im_start|>system\\nBe nice.<|im_end|>\\n' }}\"}");
    text_file(
        "chat/qwen/tokenizer_config.json",
        "{\"chat_template\": [{\"name\": \"tools\", \"template\": \"\"}, {\"name\": \"default\", \"template\": "
        "\"{{- '<|im_start|>system\\\\n' }}{{- '<|im_start|>system\\\\n' + x + '<|im_end|>\\\\n' }}{{- '<|im_start|>system\\\\nBe nice.<|im_end|>\\\\n' }}\"}]}");
    shell("sed 's/131/1000/;s/128/1300/' f/tiny/recurrent/config.json >talk.json && convert --random talk.json --to talk --seed 5 >ls");
}

static void same_ids(const char *what, const char *tokenizer, const char *text) { // those printed, and text's
    char directory[64], expected[8192] = {0};
    size_t n = 0, at = 0;
    snprintf(directory, sizeof directory, "chat/%s", tokenizer);
    retrofit_tokenizer *t = retrofit_tokenizer_load(directory);
    need(t != NULL, directory);
    int32_t *ids = retrofit_encode(t, text, strlen(text), false, &n); // BOS is in the text
    for (size_t i = 0; i < n; i++) at += (size_t)sprintf(expected + at, i + 1 < n ? "%d " : "%d\n", (int)ids[i]);
    check(!strcmp(out, expected), "%s: %s is '%s', not '%s'", tokenizer, what, out, expected);
    free(ids), retrofit_tokenizer_free(t);
}

static void templates(void) {
    char text[1024], date[64];
    for (size_t i = 0; i < 3; i++) {
        const char *begin = chats[i].begin, *open = chats[i].open, *close = chats[i].close, *end = chats[i].end,
                   *said = chats[i].trims ? "hi <unk>" : " hi <unk>\n";
        works("infer --tokenizer chat/%s --print-tokens --chat --prompt ' hi <unk>\n'", chats[i].style);
        snprintf(text, sizeof text, "%s%suser%s%s%s%sassistant%s", begin, open, close, said, end, open, close);
        same_ids("a prompt", chats[i].style, text);
        works("printf ' hi <unk>\\n' | infer --tokenizer chat/%s --print-tokens --chat --prompt - --system 'Be <|im_end|> kind.'",
              chats[i].style);
        snprintf(text, sizeof text, "%s%ssystem%sBe <|im_end|> kind.%s%suser%s%s%s%sassistant%s", begin, open, close, end, open, close,
                 said, end, open, close);
        same_ids("a prompt and a system message", chats[i].style, text);
    }
    works("LC_ALL=C date '+%%d %%b %%Y'");
    snprintf(date, sizeof date, "%.20s", strtok(out, "\n"));
    for (int today = 0; today < 2; today++)
        for (int system = 0; system < 2; system++) {
            works("infer --tokenizer chat/%s --print-tokens --chat --prompt hi%s", today ? "today" : "dated",
                  system ? " --system 'Be brief. '" : "");
            snprintf(
                text, sizeof text,
                "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: %s\n\n%s<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
                today ? date : "26 Jul 2024", system ? "Be brief." : "");
            same_ids("Llama-3.1's and Llama-3.2's beginning", today ? "today" : "dated", text);
        }
    for (int qwen = 0; qwen < 2; qwen++) {
        works("infer --tokenizer chat/%s --print-tokens --chat --prompt hi", qwen ? "qwen" : "named");
        same_ids("the template's own system message", qwen ? "qwen" : "named",
                 "<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
    }
    text_file(
        "dated.jsonl",
        "{\"messages\":[{\"role\":\"system\",\"content\":\"a\"},{\"role\":\"user\",\"content\":\"hi\"}]}\n{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}\n"
        "{\"prompt\":\"hi\"}\n");
    works(TALK "--chat --batch dated.jsonl --max-tokens 0 --system a", "dated");
    char *line = out, *after;
    for (double first = 0; (after = strchr(line, '\n')); line = after + 1) { // three ways to say the same
        double count = number_of(json(line, (size_t)(after - line), "--batch"), "prompt_tokens");
        check(count > 40 && (first == 0 || count == first), "a system message in --batch: %s", out), first = count;
    }
    // A turn ends where the family says, not only at the end of text.
    for (int seed = 1; seed < 6; seed++) {
        works(TALK "--chat --prompt hi --temperature 40 --max-tokens 1200 --seed %d --json", "llama3", seed);
        double tokens[1300];
        for (size_t n = numbers(json(out, out_size, "--json"), "tokens", tokens, 1300); n--;)
            check(tokens[n] != 802, "the text goes on behind <|eot_id|>");
    }
    works("infer --tokenizer chat/named --print-tokens --chat --prompt hi --system a");
    same_ids("another system message", "named", "<|im_start|>system\na<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
    fails(1, "Llama-3, ChatML, Zephyr", BASE "--chat --prompt a");
    fails(2, "--chat", BASE "--system a --prompt a"), fails(2, "--chat", BASE "--interactive"),
        fails(2, "--prompt", BASE "--chat --interactive --prompt a");
    fails(2, "at a time", BASE "--chat --interactive --batch a"), fails(2, "--eval", BASE "--chat --eval f");
    fails(2, "--max-tokens", TALK "--chat --interactive --max-tokens 0 </dev/null", "llama3"),
        fails(2, "context of 1300", TALK "--chat --interactive --seq-len 1301", "llama3");
    shell("tr '\\n' ' ' <talk.json >long");
    fails(1, "room for 20", TALK "--chat --interactive --seq-len 20 <long", "smollm");
}

// The prompt that the JSON is about has these ids: by their number, and by what --logits says of the first token said behind them.
static void answers(const retrofit_json *j, const int32_t *ids, size_t n, const char *what) {
    double tokens[600], logprobs[600];
    check(number_of(j, "prompt_tokens") == (double)n, "%s: %g tokens before it, not %zu", what, number_of(j, "prompt_tokens"), n);
    if (numbers(j, "tokens", tokens, 600) == 0) return;
    float *x = logits_of("talk", ids, n, V, "--recurrences 3 --state-init zero");
    double expected = log_probability(x + (n - 1) * V, V, (size_t)tokens[0]);
    numbers(j, "logprobs", logprobs, 600);
    check(fabs(logprobs[0] - expected) < 1e-4, "%s: logprob %g, of the whole text's ids %g", what, logprobs[0], expected), free(x);
}

// Three turns. Each is answered as if all before had been encoded at once: the templates' text, and the tokens that were said; and where
// those are the tokens of their text, the text of the whole conversation, by --batch with its messages too.
static void conversations(size_t which) {
    static const char *const users[] = {" One  two ", "the \"fox\"", "of 12"}, *const options[] = {
                                                                                   "--max-tokens 1", "--temperature 40 --max-tokens 120",
                                                                                   "--max-tokens 40 --temperature 1 --stop 'e|a'"};
    const char *begin = chats[which].begin, *open = chats[which].open, *close = chats[which].close, *end = chats[which].end,
               *style = chats[which].style;
    char directory[64], begun[256], turn[1024], whole[16384], messages[16384], *line, *after;
    static size_t ended;
    size_t alike = 0;
    snprintf(directory, sizeof directory, "chat/%s", style);
    retrofit_tokenizer *t = retrofit_tokenizer_load(directory);
    int32_t stop = t ? retrofit_tokenizer_id(t, chats[which].stop) : -1;
    need(stop >= 0, directory);
    text_file("users", " One  two \n\nthe \"fox\"\nof 12");
    for (int k = 0; k < 6; k++) {
        works(TALK "--chat --interactive --json %s --system %d --seed %d <users", style, options[k % 3], k, k + 1);
        int32_t ids[1024];
        size_t n = 0, count, turns = 0;
        bool canonical = true;
        snprintf(begun, sizeof begun, "%s%ssystem%s%d%s", begin, open, close, k, end), strcpy(whole, begun);
        size_t at = (size_t)snprintf(messages, sizeof messages, "{\"messages\":[{\"role\":\"system\",\"content\":\"%d\"}", k);
        char *transcript = strdup(out);
        for (line = transcript; (after = strchr(line, '\n')) && turns < 3; line = after + 1, turns++) {
            const char *user = users[turns];
            size_t length = strlen(user) - (chats[which].trims && turns == 0 ? 2 : 0);
            snprintf(turn, sizeof turn, "%s%suser%s%.*s%s%sassistant%s", turns ? end : begun, open, close, (int)length,
                     user + (length < strlen(user)), end, open, close);
            int32_t *new = retrofit_encode(t, turn, strlen(turn), false, &count);
            memcpy(ids + n, new, count * sizeof *new), n += count, free(new);
            strcat(whole, turns ? turn : turn + strlen(begun));
            int32_t *all = retrofit_encode(t, whole, strlen(whole), false, &count);
            canonical = canonical && count == n && !memcmp(all, ids, n * sizeof *ids), free(all);
            const retrofit_json *j = json(line, (size_t)(after - line), "--interactive"), *text = string(j, "text");
            answers(j, ids, n, style);
            double tokens[600];
            size_t said = numbers(j, "tokens", tokens, 600);
            at += (size_t)sprintf(messages + at, ",{\"role\":\"user\",\"content\":\"%s\"}", turns == 1 ? "the \\\"fox\\\"" : user);
            if (canonical && turns) {
                FILE *f = fopen("talk.jsonl", "w");
                need(f && fprintf(f, "%s]}\n", messages) > 0 && fclose(f) == 0, "talk.jsonl");
                works(TALK "--chat --batch talk.jsonl --max-tokens 1", style);
                parsed = NULL; // keeps j
                answers(json(out, out_size, "--batch"), ids, n, "--batch with messages");
                retrofit_json_free(parsed), parsed = (retrofit_json *)(uintptr_t)j, alike++;
            }
            for (size_t i = 0; i < said; i++) {
                ids[n++] = (int32_t)tokens[i];
                check(ids[n - 1] != stop, "%s: goes on behind %s", style, chats[which].stop);
            }
            ended += k % 3 == 1 && said < 120;
            canonical = canonical && !memchr(text->string, 0, text->length) && text->length < 1000 && !strpbrk(text->string, "\"\\\n\t") &&
                        k % 3 == 0;
            strncat(whole, text->string, 1000);
            at += (size_t)snprintf(messages + at, 1100, ",{\"role\":\"assistant\",\"content\":\"%.1000s\"}", text->string);
        }
        check(turns == 3 && *line == 0, "%s: %zu turns of 3: %s", style, turns, transcript), free(transcript);
        if (k) continue;
        works(TALK "--chat --interactive %s --system 0 <users && ! grep . stderr", style, options[0]);
    }
    check(alike > 0, "%s: no conversation whose tokens are those of its text", style);
    check(which < 2 || ended > 0, "no turn ended by itself");
    retrofit_tokenizer_free(t);
}

// ---- Tasks -------------------------------------------------------------------------------------------------------------------
#define TASKS "infer --model random --tokenizer f/tokenizers/llama3_style --state-init zero "

// The results of --json: the one at r, a member of it.
static double result(const retrofit_json *all, double r, const char *key) {
    for (const retrofit_json *j = retrofit_json_get(all, "results")->child; j; j = j->next)
        if (number_of(j, "recurrences") == r) return number_of(j, key);
    return check(false, "no result at %g recurrences", r), NAN;
}

// The likelihood of each choice, from --logits of prompt and choice.
static void choices(void) {
    enum { N = 14 };
    static const char *const prompts[] = {"The fox", "One, two", "Once upon a time there was", "1 + 1 ="};
    static const char *const texts[] = {" jumps", " three four five six",        " 2", " a", "ox and the dog", " lazy",
                                        ".",      " over the lazy dog. And then"},
                             *c[N][3], *const short_ones[] = {".", "?", ",", "1", "e", "s", " b", " c", " s", " t", " w", " p"};
    FILE *f = fopen("choices.jsonl", "w");
    need(f != NULL, "choices.jsonl");
    for (int i = 0; i < N; i++) {
        for (int j = 0; j < 3; j++) c[i][j] = i < 8 ? texts[(i + 3 * j) % 8] : short_ones[(i + j) % 6 + j / 2 * 6];
        fprintf(f, "{\"prompt\":\"%s\",\"choices\":[\"%s\",\"%s\",\"%s\"],\"answer\":%d,\"hops\":%d}\n", prompts[i % 4], c[i][0], c[i][1],
                c[i][2], i * i % 3, i % 2);
    }
    fclose(f);
    works(TASKS "--tasks choices.jsonl --recurrences 1,3 --json");
    retrofit_json *all = retrofit_json_parse(out, out_size, "--tasks --json");
    works(TASKS "--tasks choices.jsonl --recurrences 1,3");
    char *table = strdup(out), row[128], options[64];
    retrofit_tokenizer *t = retrofit_tokenizer_load("f/tokenizers/llama3_style");
    size_t apart = 0, spaces = 0;
    for (int r = 1; r <= 3; r += 2) {
        double right = 0, per_byte = 0, loss = 0;
        for (int i = 0; i < N; i++) {
            double sum[3], norm[3], raw[3];
            int best = 0, best_norm = 0, best_raw = 0;
            for (int j = 0; j < 3; j++) {
                char text[256];
                size_t n, begin, bytes = strlen(c[i][j]) - (*c[i][j] == ' ');
                snprintf(text, sizeof text, "%s%s", prompts[i % 4], c[i][j]),
                    snprintf(options, sizeof options, "--state-init zero --recurrences %d", r);
                int32_t *alone = retrofit_encode(t, prompts[i % 4], strlen(prompts[i % 4]), true, &begin),
                        *ids = retrofit_encode(t, text, strlen(text), true, &n);
                float *x = logits_of("random", ids, n, V, options);
                for (size_t p = 0; p < begin; p++) // a choice may change the prompt's last tokens: "One, two" and "ox"
                    if (ids[p] != alone[p]) begin = p;
                sum[j] = 0, free(alone);
                for (size_t p = begin; p < n; p++) sum[j] += log_probability(x + (p - 1) * V, V, (size_t)ids[p]);
                norm[j] = sum[j] / (double)bytes, raw[j] = sum[j] / (double)strlen(c[i][j]);
                if (raw[j] > raw[best_raw]) best_raw = j;
                if (sum[j] > sum[best]) best = j;
                if (norm[j] > norm[best_norm]) best_norm = j;
                if (j == i * i % 3) loss -= sum[j] / (double)(n - begin) / N;
                free(ids), free(x);
            }
            right += best == i * i % 3, per_byte += best_norm == i * i % 3, apart += best != best_norm,
                spaces += (best_raw == i * i % 3) != (best_norm == i * i % 3);
        }
        double p = right / N, q = per_byte / N;
        check(fabs(result(all, r, "acc") - p) < 1e-6 && fabs(result(all, r, "acc_norm") - q) < 1e-6 &&
                  fabs(result(all, r, "loss") - loss) < 1e-4,
              "choices, r=%d: acc %g, acc_norm %g, loss %g, not %g, %g, %g", r, result(all, r, "acc"), result(all, r, "acc_norm"),
              result(all, r, "loss"), p, q, loss);
        check(fabs(result(all, r, "acc_stderr") - sqrt(p * (1 - p) / N)) < 1e-6 &&
                  fabs(result(all, r, "acc_norm_stderr") - sqrt(q * (1 - q) / N)) < 1e-6,
              "choices, r=%d: standard errors", r);
        snprintf(row, sizeof row, "%.3f ± %.3f  %.3f ± %.3f ", p, sqrt(p * (1 - p) / N), q, sqrt(q * (1 - q) / N));
        check(strstr(table, row) != NULL, "choices, r=%d: no %s in %s", r, row, table);
    }
    check(apart > 0 && spaces > 0, "no choice the likeliest, and another per byte: %zu; or per byte with a space before it: %zu", apart,
          spaces);
    retrofit_json_free(all), retrofit_tokenizer_free(t), free(table);
}

// What follows from the last place in text where an expression matches: by hand, for two expressions.
static void last_match(const char *text, bool numbers_too, char answer[64]) {
    size_t n = strlen(text), begin, count = 0;
    *answer = 0;
    if (!numbers_too) { // ([a-m])[n-z]
        for (size_t i = 0; i + 1 < n; i++)
            if (text[i] >= 'a' && text[i] <= 'm' && text[i + 1] >= 'n' && text[i + 1] <= 'z') answer[0] = text[i], answer[1] = 0;
        return;
    }
    while (n && text[n - 1] != ',' && text[n - 1] != '.') n--; // ([0-9a-z,]*[,.])
    for (begin = n ? n - 1 : 0;
         begin && (text[begin - 1] == ',' || isalnum((unsigned char)text[begin - 1])) && !isupper((unsigned char)text[begin - 1]);)
        begin--;
    for (size_t i = begin; i < n && count < 63; i++)
        if (text[i] != ',' && text[i] != '.') answer[count++] = text[i];
    answer[count] = 0;
}

// Answers in generated text: --batch generates the same, at one r.
static void targets(bool numbers_too) {
    enum { N = 50 };
    const char *e = numbers_too ? "([0-9a-z,]*[,.])" : "([a-m])[n-z]", *options = "--temperature 1 --max-tokens 50 --stop 'ing|th'";
    char said[2][N][64], *end;
    size_t matched = 0, expected[2] = {0, 0};
    FILE *f = fopen("prompts.jsonl", "w");
    for (int i = 0; i < N; i++) fprintf(f, "{\"prompt\":\"%s%d\"}\n", i % 3 ? "one " : "The fox jumps over the ", i);
    need(fclose(f) == 0, "prompts.jsonl");
    for (int r = 0; r < 2; r++) {
        works(TASKS "--batch prompts.jsonl --batch-size 7 --recurrences %d %s", 1 + 2 * r, options);
        char *line = out;
        for (int i = 0; i < N && (end = strchr(line, '\n')); i++, line = end + 1) {
            const retrofit_json *j = json(line, (size_t)(end - line), "--batch"), *text = string(j, "text");
            last_match(text->string, numbers_too, said[r][i]), matched += *said[r][i] != 0;
        }
        need(line == out + out_size, "lines of --batch");
    }
    need(matched >= 8, "texts with an answer");
    f = fopen("targets.jsonl", "w");
    for (int i = 0; i < N; i++) {
        const char *target = *said[i % 2][i] ? said[i % 2][i] : "none";
        for (int r = 0; r < 2; r++) expected[r] += !strcmp(said[r][i], target);
        fprintf(f, "{\"prompt\":\"%s%d\",\"target\":\",%s%s\"}\n", i % 3 ? "one " : "The fox jumps over the ", i, target, i % 4 ? "." : "");
    }
    need(fclose(f) == 0, "targets.jsonl");
    check(expected[0] != expected[1] && expected[0] > 0 && expected[1] > 0, "targets: %zu and %zu right tell little", expected[0],
          expected[1]);
    for (int b = 1; b <= 9; b += 4) {
        works(TASKS "--tasks targets.jsonl --answer-regex '%s' --recurrences 1,3 --batch-size %d --json %s", e, b, options);
        const retrofit_json *j = json(out, out_size, "--tasks --json");
        for (int r = 0; r < 2; r++)
            check(fabs(result(j, 1 + 2 * r, "acc") - (double)expected[r] / N) < 1e-6, "targets, %s, r=%d: %g, not %zu of %d", e, 1 + 2 * r,
                  result(j, 1 + 2 * r, "acc"), expected[r], N);
    }
}

static void bad_tasks(void) {
    static const struct { int code; const char *what, *first, *second, *options;
    } bad[] = {{1, "line 2: another kind", "\"answer\":\" b\"", "\"choices\":[\" a\",\" b\"],\"answer\":1", ""},
               {1, "line 2: another kind", "\"target\":\"b\"", "\"answer\":\" b\"", "--answer-regex '(b)'"},
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
               {1, "line 1: \"hops\"", "\"answer\":\" b\",\"hops\":16", "", ""},
               {1, "line 1: needs", "\"answer\":\"\"", "", ""}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        works("printf '%%s\\n' '{\"prompt\":\"a\",%s}' '{\"prompt\":\"a\",%s}' >lines", bad[i].first,
              *bad[i].second ? bad[i].second : bad[i].first);
        fails(bad[i].code, bad[i].what, TASKS "--tasks lines %s", bad[i].options);
    }
    fails(2, "--answer-regex", TASKS "--prompt a --answer-regex '(b)'"), fails(2, "--json", TASKS "--prompt a --print-tokens --json");
    works(
        TASKS
        "--tasks lines --rows 1 --recurrences 1 --json 2>ls || infer --model f/lookup/base --tasks f/lookup/tasks.jsonl --json --rows 512");
    check(number_of(json(out, out_size, "--rows"), "count") == 512, "--rows 512: %s", out);
    works(BASE "--tasks f/lookup/tasks.jsonl --json");
    const retrofit_json *j = json(out, out_size, "--json");
    check(fabs(result(j, 0, "acc") - .608398) < 1e-4 && retrofit_json_get(retrofit_json_get(j, "results")->child, "hops")->count == 8,
          "--tasks --json: %s", out);
}

// A prompt that is fed in pieces.
static void long_prompt(void) {
    int32_t ids[1100];
    size_t n = 0;
    FILE *f = fopen("prompt", "w");
    for (size_t i = 0; i < 1050; i++) fputs(i % 7 ? " a" : " of", f);
    need(fclose(f) == 0, "prompt");
    retrofit_tokenizer *t = retrofit_tokenizer_load("chat/smollm");
    size_t size;
    char *text = slurp("prompt", &size);
    int32_t *encoded = retrofit_encode(t, text, size, true, &n);
    need(n > 1024 && n <= 1100, "a long prompt");
    memcpy(ids, encoded, n * sizeof *ids), free(encoded), free(text), retrofit_tokenizer_free(t);
    works(TALK "--prompt - --max-tokens 2 --json <prompt", "smollm");
    answers(json(out, out_size, "--json"), ids, n, "a long prompt");
}

// ---- Thinking: what changes no text changes none, what is told of recurrences, and what each of them makes of a token -------------------
#define DEEP "infer --model random --tokenizer f/tokenizers/smollm_style --prompt 'Once upon' --recurrences 5 --max-tokens 24 "
static void same_text(void) {
    static const char *const same[] = {"--exit kl --exit-threshold 0",
                                       "--exit minp-kl --exit-threshold 0 --kv-cache latest",
                                       "--exit argmax-stability --exit-threshold 1e9",
                                       "--exit latent-diff --exit-threshold 0 --kv-cache shared:5",
                                       "--kv-cache full",
                                       "--kv-cache shared:7",
                                       "--kv-cache grouped:1",
                                       "--speculative 2,4",
                                       "--speculative 4,8",
                                       "--speculative 1,1",
                                       "--noise 0 --noise-type line"};
    double tokens[32], logprobs[32], other[32], recurrences[32];
    works(DEEP "--json");
    const retrofit_json *j = json(out, out_size, "--json");
    size_t n = numbers(j, "tokens", tokens, 32);
    check(n == 24 && numbers(j, "logprobs", logprobs, 32) == n, "%zu tokens of 24", n);
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        works(DEEP "--json %s", same[i]);
        j = json(out, out_size, "--json");
        check(numbers(j, "tokens", other, 32) == n && !memcmp(tokens, other, n * sizeof *tokens), "%s: other tokens: %s", same[i], out);
        check(numbers(j, "recurrences", recurrences, 32) == n && numbers(j, "logprobs", other, 32) == n, "%s: lists of unequal length",
              same[i]);
        for (size_t k = 0; k < n; k++)
            check(recurrences[k] == 5 && fabs(other[k] - logprobs[k]) < 1e-4, "%s: token %zu took %g recurrences, logprob %g, plainly %g",
                  same[i], k, recurrences[k], other[k], logprobs[k]);
        bool exit = strstr(same[i], "--exit"), drafts = strstr(same[i], "--spec");
        check(!exit == !strstr(err, "recurrences per token: 5.00 on average of at most 5:  5: 24; 24 of 24 tokens are those of full depth"),
              "%s: %s", same[i], err);
        check(!drafts == !strstr(err, "tokens a round; "), "%s: %s", same[i], err);
    }
    // The first token follows the prompt, which thinks as deep as it may; the others stop at once.
    works(DEEP "--json --exit entropy-diff --exit-threshold 1e9");
    n = numbers(json(out, out_size, "--json"), "recurrences", recurrences, 32);
    for (size_t k = 0; k < n; k++)
        check(recurrences[k] == (k ? 1 : 5), "an exit that always fires: token %zu took %g recurrences", k, recurrences[k]);
    check(strstr(err, "1.17 on average of at most 5:  1: 23  5: 1;") != NULL, "an exit that always fires: %s", err);
    // What changes the text, does; and its seed repeats it.
    static const char *const other_text[] = {"--continuous", "--noise 3000", "--noise 3000 --noise-type chi",
                                             "--kv-cache shared:1 --state-init zero --continuous"};
    for (size_t i = 0; i < sizeof other_text / sizeof *other_text; i++) {
        works(DEEP "--json %s", other_text[i]);
        numbers(json(out, out_size, "--json"), "tokens", other, 32);
        check(memcmp(tokens, other, 24 * sizeof *tokens) != 0, "%s: the same text", other_text[i]);
        works(DEEP "--json %s", other_text[i]);
        numbers(json(out, out_size, "--json"), "tokens", recurrences, 32);
        check(!memcmp(recurrences, other, 24 * sizeof *tokens), "%s: another text the second time", other_text[i]);
    }
    works(
        DEEP
        "--kv-cache shared:2 --temperature 1"); // slots of 5 layers of prelude and coda and 3·2 of the core, 2 kv heads of 8, keys and values of 4 bytes
    check(strstr(err, "KV cache ") != NULL, "no size of the KV cache: %s", err);
    works(DEEP "--speculative 2,4 --temperature 1.3 --top-k 40 --seed 3 && " DEEP
               "--speculative 2,4 --temperature 1.3 --top-k 40 --seed 3");
    check(out_size % 2 == 0 && !memcmp(out, out + out_size / 2, out_size / 2), "drawn drafts of one seed: two texts: %s", out);
}

// Drafts in a conversation: a turn that ends amid them leaves nothing behind its end in the cache.
static void drafted_conversation(void) {
    shell("printf 'Once\\nupon\\na time\\nthere\\nwas\\n' >users");
    for (int limit = 6; limit < 16; limit++) {
        works(TALK "--chat --interactive --recurrences 30 --max-tokens %d --stop 'e|a' <users >plain && " TALK
                   "--chat --interactive --recurrences 30 --max-tokens %d --stop 'e|a' --speculative 29,6 "
                   "<users >drafted && cmp plain drafted",
              "smollm", limit, "smollm", limit);
    }
}

static void cached_losses(void) {
    double loss[3], full[3], used[3];
    size_t r, bytes, plain_bytes = 0;
    shell(
        "printf '{\"text\":\"%s\"}\\n' \"$(seq 1 90 | tr '\\n' ' ')\" >numbers.jsonl && convert --tokenize numbers.jsonl --tokenizer f/tokenizers/smollm_style --to numbers.bin >ls");
#define LOSSES "infer --model random --eval numbers.bin --seq-len 20 --rows 5 --batch-size 2 --recurrences 4 "
    works(LOSSES);
    sscanf(out, "%*[^\n] 4 %lf", &loss[0]);
    static const char *const options[] = {"--kv-cache full", "--kv-cache shared:1", "--exit latent-diff --exit-threshold 1e9", "--kv-bf16",
                                          "--exit kl --exit-threshold 1e9 --kv-cache grouped:2"};
    for (size_t i = 0; i < 5; i++) {
        works(LOSSES "%s", options[i]);
        check(sscanf(out, "%*[^\n] %zu %lf %*f %lf %lf %zu", &r, &loss[1], &full[1], &used[1], &bytes) == 5 && r == 4, "%s: no table: %s",
              options[i], out);
        check(fabs(full[1] - loss[0]) < 2e-3, "%s: by full pass %g, --eval alone says %g", options[i], full[1],
              loss[0]); // start states of other rows
        bool early = strstr(options[i], "--exit");
        check(early ? fabs(used[1] - (4 + 19) / 20.0) < 0.006 : used[1] == 4, "%s: %g recurrences on average", options[i], used[1]);
        if (i == 0)
            plain_bytes = bytes, check(fabs(loss[1] - full[1]) < 1.01e-4, "decoding's loss %g, the full pass's %g", loss[1], full[1]);
        else if (i < 3) check(loss[1] != full[1], "%s: the loss is the full pass's", options[i]);
        if (i == 3) check(bytes * 2 == plain_bytes, "--kv-bf16: %zu bytes per token, not half of %zu", bytes, plain_bytes);
        if (i == 1 || i == 4) check(bytes < plain_bytes, "%s: %zu bytes per token, full %zu", options[i], bytes, plain_bytes);
    }
}

// Entropies and likeliest tokens are those of --logits at every r, the picture has a line a token.
static void traces(void) {
    size_t size, position = 0, lines = 0;
    works(
        "infer --model random --tokenizer f/tokenizers/smollm_style --prompt 'Once upon\na' --recurrences 4 --max-tokens 5 --state-init zero --trace trace.jsonl");
    char *text = slurp("trace.jsonl", &size), *end, *picture = strdup(err);
    int32_t ids[64];
    for (char *line = text; (end = strchr(line, '\n')); line = end + 1)
        ids[lines++] = (int32_t)number_of(json(line, (size_t)(end - line), "trace"), "token");
    float *logits[4];
    for (int r = 0; r < 4; r++) {
        char options[64];
        snprintf(options, sizeof options, "--recurrences %d --state-init zero", r + 1);
        logits[r] = logits_of("random", ids, lines, V, options);
    }
    retrofit_tokenizer *t = retrofit_tokenizer_load("f/tokenizers/smollm_style");
    size_t known = retrofit_tokenizer_size(t);
    for (char *line = text; (end = strchr(line, '\n')); line = end + 1, position++) {
        const retrofit_json *j = json(line, (size_t)(end - line), "trace"), *list = retrofit_json_get(j, "recurrences"),
                            *e = list ? list->child : NULL;
        check(number_of(j, "position") == (double)position && list && list->count == 4, "trace: %.*s", (int)(end - line), line);
        for (size_t r = 0; e && r < 4; r++, e = e->next) {
            const float *z = logits[r] + position * V;
            double entropy = 0, total = 0;
            for (size_t v = 0; v < known; v++) total += exp((double)z[v]);
            for (size_t v = 0; v < known; v++) entropy -= exp((double)z[v]) / total * log(exp((double)z[v]) / total);
            const retrofit_json *top = retrofit_json_get(e, "top");
            check(number_of(e, "r") == (double)(r + 1) && fabs(number_of(e, "entropy") - entropy) < 1e-4 * entropy,
                  "trace: token %zu, r %zu: entropy %g, not %g", position, r + 1, number_of(e, "entropy"), entropy);
            check(number_of(e, "change") > 0 && top && top->count == 3 && number_of(top->child, "token") == retrofit_argmax(z, known) &&
                      fabs(number_of(top->child, "p") - exp((double)z[retrofit_argmax(z, known)]) / total) < 1e-4 &&
                      number_of(top->child->next, "p") <= number_of(top->child, "p"),
                  "trace: token %zu, r %zu: %.*s", position, r + 1, (int)(end - line), line);
        }
    }
    size_t shown = 0;
    for (char *p = picture; (p = strchr(p, '\n')); p++) shown++;
    check(shown == lines + 3, "the picture has %zu lines of %zu tokens: %s", shown, lines,
          picture); // its two lines of head, and how long it took
    for (int r = 0; r < 4; r++) free(logits[r]);
    free(text), free(picture), retrofit_tokenizer_free(t);
}

static void bad_thinking(void) {
    static const struct { const char *what, *options; } bad[] = {
        {"latest, shared:M or grouped:M", "--exit kl --kv-cache full"}, {"--kv-cache is full, latest", "--kv-cache half"}, {"positive numbers", "--kv-cache shared:0"},
        {"positive numbers", "--kv-cache grouped:x"}, {"goes with --exit", "--exit-threshold 1"}, {"none|entropy-diff", "--exit never"}, {"R,N like 4,5", "--speculative 4"},
        {"R,N like 4,5", "--speculative 4,99"}, {"does not go with --exit", "--speculative 2,3 --exit kl"}, {"does not go with --continuous", "--speculative 2,3 --continuous"},
        {"does not go with --noise", "--speculative 2,3 --noise 1"}, {"does not go with --kv-cache", "--speculative 2,3 --kv-cache shared:2"}, {"--noise", "--noise=-1"},
        {"plain Llama", "--model f/lookup/base --tokenizer f/lookup/base --exit kl"}, {"plain Llama", "--model f/lookup/base --tokenizer f/lookup/base --trace bad"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        fails(2, bad[i].what, "infer --model random --tokenizer f/tokenizers/smollm_style --prompt 'Once upon' --max-tokens 24 %s %s",
              strstr(bad[i].options, "--model") ? "" : "--recurrences 5", bad[i].options);
    fails(2, "--exit does not go with --logits", "infer --model random --tokens 1,2 --logits bad --exit kl");
    fails(2, "--speculative does not go with --eval", "infer --model random --eval numbers.bin --speculative 2,3");
    fails(2, "but for a \"target\"", "infer --model f/lookup/base --tasks f/lookup/tasks.jsonl --kv-cache shared:2");
    fails(2, "--trace goes with --prompt", "infer --model random --eval numbers.bin --trace bad");
    works("! " DEEP "--speculative 5,3 2>said && grep '^infer: --speculative: a draft of 5' said");
    works("! " DEEP "--trace no/where 2>said && grep '^infer: no/where: No such file' said");
    shell("printf '{\"prompt\":\"Once\"}\\n{\"prompt\":\"upon a time\"}\\n' >two.jsonl");
    fails(1, "full KV cache",
          "infer --model random --tokenizer f/tokenizers/smollm_style --recurrences 5 --batch two.jsonl --exit kl --kv-cache shared:2");
    // Rows that stop at different times say in a batch what they say alone, from random start states too.
    works(
        "infer --model random --tokenizer f/tokenizers/smollm_style --recurrences 5 --batch two.jsonl --exit kl --exit-threshold .02 --max-tokens 20 | sed 's/\"prompt_sec.*//; s/\"logprobs.*\"recur/\"recur/' >together && "
        "infer --model random --tokenizer f/tokenizers/smollm_style --recurrences 5 --batch two.jsonl --batch-size 1 --exit kl --exit-threshold .02 --max-tokens 20 | sed 's/\"prompt_sec.*//; s/\"logprobs.*\"recur/\"recur/' "
        ">alone && cmp together alone && grep -v '\"recurrences\":\\[5[5,]*\\]' alone");
}

int main(void) {
    enter("infer");
    shell("sed 's/131/1000/' f/tiny/recurrent/config.json >random.json && convert --random random.json --to random >ls");
    for (size_t i = 0; i < 3; i++) json_of_a_prompt(styles[i]);
    text_behind_a_newline(), stop_strings(), batches();
    chat_tokenizers(), templates();
    for (size_t i = 0; i < 3; i++) conversations(i);
    same_text(), drafted_conversation(), cached_losses(), traces(), bad_thinking();
    long_prompt(), choices(), targets(false), targets(true), bad_tasks();
    retrofit_json_free(parsed);
    return leave("infer");
}

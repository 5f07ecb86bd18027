// Conversations as data: what convert makes of messages, which of their tokens count, and that
// train and infer --eval read the labels of a shard, or refuse what are not its own.
#include "run.h"

// Turns that end with EOS, and white space behind it.
#define TURNS \
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content + eos_token }}\n{% endfor %}" PROMPT
#define PROMPT "{% if add_generation_prompt %}[assistant]\n{% endif %}"
// The same, and marked as transformers wants it.
#define MARKED \
    "{% for m in messages %}[{{ m.role }}]\n{% if m.role == 'assistant' %}{% generation %}" \
    "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}" \
    "{% endif %}{{ '\n' }}{% endfor %}" PROMPT
// No token ends a turn.
#define PLAIN \
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}" \
    "{% if add_generation_prompt %}assistant: {% endif %}"
// How a turn is written depends on what follows it.
#define LAST \
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{% if loop.last %}!{% endif %}" \
    "{{ eos_token }}\n{% endfor %}" PROMPT

#define CHAT \
    "{\"messages\": [{\"role\": \"system\", \"content\": \"be brief\"}, " \
    "{\"role\": \"user\", \"content\": \" 1+1? \"}, " \
    "{\"role\": \"assistant\", \"content\": \"It is 2.\\nYes\"}, " \
    "{\"role\": \"user\", \"content\": \"so 2?\"}, " \
    "{\"role\": \"assistant\", \"content\": \"yes\"}], \"id\": 7}\n"
#define UNSAID \
    "{\"messages\": [{\"role\": \"user\", \"content\": \"only a question, no answer\"}]}\n"

#define CONVERT "convert --tokenize chat.jsonl --tokenizer chat --to "
enum { HEADER = 256 };

static void write_text(const char *path, const char *text) {
    write_bytes(path, text, strlen(text));
}

static void use_tokenizer(const char *from) {
    char command[512];
    snprintf(command, sizeof command, "rm -rf chat && cp -rL f/%s chat && chmod -R u+w chat", from);
    shell(command);
}

static void use(const char *template, const char *lines) {
    write_text("chat/chat_template.jinja", template);
    write_text("chat.jsonl", lines);
}

// The ids and labels of a shard of 16 bits; both to be freed.
static size_t read_shard(const char *name, int32_t **ids, int32_t **labels) {
    char path[64];
    size_t size, label_size;
    char *shard = slurp(name, &size);
    snprintf(path, sizeof path, "%s.labels", name);
    char *label_file = slurp(path, &label_size);
    size_t count = (size - 4 * HEADER) / sizeof(uint16_t);
    need(label_size == 4 * HEADER + 4 * count, "the size of labels");
    *ids = retrofit_allocate(count, sizeof **ids);
    *labels = retrofit_allocate(count, sizeof **labels);
    memcpy(*labels, label_file + 4 * HEADER, 4 * count);
    for (size_t i = 0; i < count; i++) {
        uint16_t id;
        memcpy(&id, shard + 4 * HEADER + i * sizeof id, sizeof id);
        (*ids)[i] = id;
    }
    free(shard);
    free(label_file);
    return count;
}

// $ stands for the tokenizer's EOS. To be freed.
static char *fill(const char *text, const char *eos) {
    retrofit_text filled = {0};
    for (const char *c = text; *c; c++)
        retrofit_text_append(&filled, *c == '$' ? eos : c, *c == '$' ? strlen(eos) : 1);
    retrofit_text_append(&filled, "", 1);
    return filled.bytes;
}

// The shard has the ids of these documents, and the labels that count spell `said`.
static void check_shard(const char *what, const char *said, const char *const documents[2],
                        const char *eos) {
    int32_t *ids, *labels;
    size_t at = 0, kept = 0, size, n;
    works(CONVERT "chat.bin");
    size_t count = read_shard("chat.bin", &ids, &labels);
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load("chat");
    need(tokenizer != NULL, "chat");
    for (int i = 0; i < 2 && documents[i]; i++) {
        char *text = fill(documents[i], eos);
        int32_t *own = retrofit_encode(tokenizer, text, strlen(text), false, &n);
        bool same = at + n <= count && !memcmp(ids + at, own, n * sizeof *own);
        check(same, "%s: document %d has other ids than '%s'", what, i, text);
        at += n;
        free(text);
        free(own);
    }
    check(at == count, "%s: %zu ids, not %zu", what, count, at);
    for (size_t i = 0; i < count; i++) {
        check(labels[i] == -100 || labels[i] == ids[i], "%s: label %zu is %d", what, i, labels[i]);
        if (labels[i] != -100) ids[kept++] = ids[i];
    }
    char *got = retrofit_decode(tokenizer, ids, kept, false, &size), *expected = fill(said, eos);
    check(got && !strcmp(got, expected), "%s: '%s' counts, not '%s'", what, got, expected);
    free(got);
    free(expected);
    free(ids);
    free(labels);
    retrofit_tokenizer_free(tokenizer);
}

static void said(const char *style, const char *eos) {
    static const char *const documents[2] = {
        "[system]\nbe brief$\n[user]\n 1+1? $\n[assistant]\nIt is 2.\nYes$\n[user]\nso 2?$\n"
        "[assistant]\nyes$",
        "[user]\nonly a question, no answer$"};
    char from[128];
    snprintf(from, sizeof from, "tokenizers/%s", style);
    use_tokenizer(from);
    use(TURNS, CHAT UNSAID);
    check_shard(style, "It is 2.\nYes$yes$", documents, eos);
    check(strstr(out, "2 documents") && strstr(err, "the first in line 2"), "%s: %s%s", style, out,
          err);

    // Marks give the same labels; a shard of text has none, and leaves none.
    shell("cp chat.bin first.bin && cp chat.bin.labels first.bin.labels");
    use(MARKED, CHAT UNSAID);
    works(CONVERT "chat.bin && cmp chat.bin first.bin && cmp chat.bin.labels first.bin.labels");
    write_text("chat.jsonl", "{\"text\": \"a\"}\n");
    works(CONVERT "chat.bin");
    check(strstr(err, "removed") && access("chat.bin.labels", F_OK), "%s: labels stay: %s", style,
          err);
}

static void templates(void) {
    use_tokenizer("tokenizers/smollm_style");
    static const char *const documents[2] = {
        "system: be brief\n\nuser:  1+1? \n\nassistant: It is 2.\nYes\n\nuser: so 2?\n\n"
        "assistant: yes$"};
    use(PLAIN, CHAT);
    check_shard("no token ends a turn", " It is 2.\nYes\n\nyes$", documents, "<|im_end|>");
    use(LAST, CHAT);
    fails(1, "chat.jsonl: line 1: chat/chat_template.jinja: chat template: what it writes of the "
             "first 2 messages, up to the assistant's answer, is not how it begins all 5",
          CONVERT "bad.bin");
    use("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        CHAT);
    fails(1, "it writes nothing of a message of the role \"system\"", CONVERT "bad.bin");
    use("{{ raise_exception('no') }}", CHAT);
    fails(1, "line 1: chat/chat_template.jinja: chat template: line 1: it does not take this",
          CONVERT "bad.bin");
    use("{% raw %}", CHAT);
    fails(1, "a conversation, but chat/chat_template.jinja: 'raw'", CONVERT "bad.bin");
    unlink("chat/chat_template.jinja");
    fails(1, "chat.jsonl: line 1: a conversation, but chat: no chat template", CONVERT "bad.bin");
}

#define USER "{\"role\": \"user\", \"content\": \"a\"}"
// A conversation whose answer has another member.
#define SAYS(name, value) \
    "{\"messages\": [" USER ", {\"role\": \"assistant\", \"content\": \"b\", \"" name "\": " value \
    "}]}"
static void hostile_lines(void) {
    static const struct {
        const char *line, *what, *options;
    } bad[] = {
        {"{\"messages\": \"hi\"}", "\"messages\" is a string, not an array", ""},
        {"{\"messages\": {\"role\": \"user\"}}", "\"messages\" is an object, not an array", ""},
        {"{\"messages\": []}", "a conversation without messages", ""},
        {"{\"messages\": [" USER ", \"hi\"]}", "message 2 is a string, not an object", ""},
        {"{\"messages\": [" USER ", null]}", "message 2 is null", ""},
        {"{\"messages\": [{\"content\": \"a\"}]}", "message 1 has no \"role\"", ""},
        {"{\"messages\": [{\"from\": \"human\", \"value\": \"a\"}]}", "has no \"role\"", ""},
        {"{\"messages\": [{\"role\": 1, \"content\": \"a\"}]}", "\"role\" of message 1 is a number",
         ""},
        {"{\"messages\": [{\"role\": \"a\\u0000\", \"content\": \"a\"}]}", "a NUL in the role", ""},
        {"{\"messages\": [{\"role\": \"user\"}]}", "message 1 has no \"content\"", ""},
        {"{\"messages\": [" USER ", {\"role\": \"assistant\", \"content\": null}]}",
         "\"content\" of message 2 is null, not a string", ""},
        {"{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"text\"}]}]}",
         "\"content\" of message 1 is an array, not a string", ""},
        {"{\"messages\": [" USER "], \"text\": \"b\"}", "both \"text\" and \"messages\"", ""},
        {"{\"messages\": [" USER "], \"tools\": [{}]}", "\"tools\" is not followed", ""},
        {"{\"messages\": [" USER "]}\n{\"text\": \"b\"}", "a text, behind conversations", ""},
        {"{\"text\": \"b\"}\n{\"messages\": [" USER "]}", "a conversation, behind texts", ""},
        {"{\"a\": 1}", "no \"text\" in it, nor in any other up to line 1, and no \"messages\"", ""},
        {"{\"a\": [1]}", "message 1 is a number", "--field a"},
        {"{\"text\": [" USER "]}", "\"text\" is an array, not a string", ""},
        {SAYS("tool_calls", "[{\"type\": 1}]"), "\"tool_calls\" of message 2 is not", ""},
        {SAYS("function_call", "{\"name\": \"f\"}"), "\"function_call\" of message 2 is not", ""},
        {SAYS("reasoning_content", "\"hm\""), "\"reasoning_content\" of message 2 is not", ""},
        {SAYS("thinking", "\"hm\""), "\"thinking\" of message 2 is not", ""},
        {SAYS("weight", "0"), "\"weight\" of message 2 is 0", ""},
        {SAYS("weight", "\"1\""), "\"weight\" of message 2 is 1", ""},
    };
    static const char *const good[] = {
        SAYS("tool_calls", "[]"), SAYS("tool_calls", "null"), SAYS("function_call", "null"),
        SAYS("reasoning_content", "\"\""), SAYS("weight", "1"), SAYS("weight", "null"),
        SAYS("id", "\"m7\""),
    };
    use_tokenizer("tokenizers/smollm_style");
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        use(TURNS, bad[i].line);
        fails(1, bad[i].what, CONVERT "bad.bin %s", bad[i].options);
    }
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        use(TURNS, good[i]);
        works(CONVERT "chat.bin");
    }
    use(TURNS, "{\"talk\": [" USER "], \"text\": \"b\"}\n{\"talk\": null}\n");
    works(CONVERT "chat.bin --field talk");
    check(strstr(out, "1 documents") && strstr(out, "null were skipped"), "--field talk: %s", out);
    shell("mkdir taken.bin.labels");
    fails(1, "taken.bin.labels is there already, and no file", CONVERT "taken.bin");
    shell("rmdir taken.bin.labels");
    use(TURNS, "{\"messages\": [" USER "], \"text\": null, \"tools\": [], \"documents\": null}\n");
    works(CONVERT "chat.bin");
}

// A tokenizer may have no token for anything in a conversation, which leaves EOS.
static void no_tokens(void) {
    int32_t *ids, *labels;
    use_tokenizer("tokenizers/smollm_style");
    size_t size;
    char *file = slurp("chat/tokenizer.json", &size), *letter = strstr(file, "\"~\":");
    need(letter != NULL, "smollm_style has no ~");
    letter[1] = ' '; // is none of the byte-level alphabet
    write_bytes("chat/tokenizer.json", file, size);
    use("{% for m in messages %}{{ m.content }}{% endfor %}",
        "{\"messages\": [{\"role\": \"assistant\", \"content\": \"~~\"}]}\n");
    works(CONVERT "none.bin");
    size_t count = read_shard("none.bin", &ids, &labels);
    check(count == 1 && labels[0] == -100, "%zu tokens of what has none", count);
    free(file);
    free(ids);
    free(labels);
}

// ---- What train and infer make of it -----------------------------------------------------------

#define DEEP "infer --model deep --eval rows.bin --seq-len 16 --json --state-init zero "
#define TRAIN_BAD TRAIN_ON("rows.bin") "--out bad --steps 1"
#define TRAIN_ON(data) "train --model chat --data " data " --micro-batch-size 1 --seq-len 16 "

// A model with a template, and a shard of several rows; row 0 has labels that count.
static void make_data(void) {
    retrofit_text lines = {0};
    use_tokenizer("lookup/base");
    for (int i = 0; i < 6; i++) retrofit_text_append(&lines, CHAT, strlen(CHAT));
    retrofit_text_append(&lines, "", 1);
    use(TURNS, lines.bytes);
    works(CONVERT "rows.bin");
    write_text("chat.jsonl", CHAT);
    works(CONVERT "short.bin");
    write_text("chat.jsonl", UNSAID);
    works(CONVERT "unsaid.bin");
    works("convert --from chat --to deep --prelude 0 --core 1 --coda 2");
    free(lines.bytes);
}

// The first number behind a word in a text.
static double number_behind(const char *text, const char *word) {
    const char *at = strstr(text, word);
    return at ? strtod(at + strlen(word), NULL) : (double)NAN;
}

// The mean of -log p over the labels of a row that count.
static double loss_of_row(const float *logits, const int32_t *labels, size_t T, size_t V) {
    double sum = 0, counted = 0;
    for (size_t t = 0; t < T; t++) {
        double total = 0;
        if (labels[t] == -100) continue;
        for (size_t i = 0; i < V; i++) total += exp((double)logits[t * V + i]);
        sum += log(total) - (double)logits[t * V + (size_t)labels[t]];
        counted++;
    }
    return sum / counted;
}

static void losses(void) {
    enum { T = 16, V = 112 };
    int32_t *ids, *labels;
    size_t count = read_shard("rows.bin", &ids, &labels), row = 0;
    while (retrofit_count_labels(labels + row * (T + 1) + 1, T) < 4) row++;
    check(row > 0 && (row + 1) * (T + 1) <= count, "row %zu is the first with labels", row);
    float *logits = logits_of("chat", ids + row * (T + 1), T, V, "");
    double expected = loss_of_row(logits, labels + row * (T + 1) + 1, T, V);

    // Rows before it have none: the mean over labels is that of this row.
    works("infer --model chat --eval rows.bin --seq-len 16 --rows %zu --json", row + 1);
    double loss = number_behind(out, "\"loss\":");
    check(fabs(loss - expected) < 1e-4, "--eval: %.6f, not %.6f: %s", loss, expected, out);
    check(strstr(err, "1 of 1 shards have labels: by them"), "--eval says of labels: %s", err);
    works(DEEP "--recurrences 2 --kv-cache full");
    loss = number_behind(out, "\"loss\":");
    double whole = number_behind(out, "\"full_pass_loss\":");
    works(DEEP "--recurrences 2");
    double passed = number_behind(out, "\"loss\":");
    check(fabs(loss - whole) < 1e-4 && fabs(loss - passed) < 1e-4,
          "--kv-cache: %.6f, %.6f by a full pass, %.6f by rows together", loss, whole, passed);

    // A step of this row alone, and one of a row without labels, which trains nothing.
    works(TRAIN_ON("rows.bin") "--out steps --steps %zu --lr 0 --muon-lr 0 --warmup 0", row + 1);
    char *log = slurp("steps/log.jsonl", &(size_t){0}), *last = log;
    check(number_behind(log, "\"loss\":") == 0, "the loss of a row without labels: %s", log);
    check(number_behind(log, "\"grad_norm\":") == 0, "its gradient: %s", log);
    for (size_t i = 0; i < row; i++) last = strchr(last, '\n') + 1;
    loss = number_behind(last, "\"loss\":");
    check(fabs(loss - expected) < 1e-4, "train: %.6f, not %.6f: %s", loss, expected, last);
    free(log);

    // Means over nothing are no numbers, and nothing can be learned of it.
    fails(1, "unsaid.bin: by the labels nothing counts in the first 1 rows of 16 tokens",
          TRAIN_ON("rows.bin") "--out bad --steps 1 --val unsaid.bin");
    fails(1, "rows.bin: by the labels nothing counts in the first 1 rows of 16 tokens",
          "train --model chat --data short.bin --val rows.bin --eval-rows 1 --micro-batch-size 1 "
          "--seq-len 16 --out bad --steps 1");
    fails(1, "unsaid.bin: by the labels nothing counts",
          TRAIN_ON("unsaid.bin") "--out bad --steps 1");
    fails(1, "nothing counts in the first 1 rows",
          "infer --model chat --eval rows.bin --seq-len 16 --rows 1");
    works(TRAIN_ON("'[ru]*.bin'") "--out both --steps 1");
    free(logits);
    free(ids);
    free(labels);
}

static void stale_labels(void) {
    works(TRAIN_ON("rows.bin") "--out run --steps 4 --save-every 2 --keep 9");
    works(TRAIN_ON("rows.bin") "--out dry --steps 4 --dry-run");
    check(strstr(err, "have labels"), "--dry-run says nothing of labels: %s", err);

    // Another label that fits is another run; one that does not is damage.
    int32_t *ids, *labels;
    size_t count = read_shard("rows.bin", &ids, &labels), at = 0, size;
    while (labels[at] == -100) at++;
    char *file = slurp("rows.bin.labels", &size), *wrong = slurp("rows.bin.labels", &size);
    memcpy(file + 4 * (HEADER + at), &(int32_t){-100}, 4);
    memcpy(wrong + 4 * (HEADER + at), &(int32_t){labels[at] + 1}, 4);
    shell("mv rows.bin.labels kept");
    fails(1, "rows.bin.labels: not there, but rows.bin was made with labels",
          TRAIN_BAD);
    write_bytes("rows.bin.labels", file, size);
    fails(1, "the first shard that differs: rows.bin",
          TRAIN_ON("rows.bin") "--out run --steps 4 --resume");
    write_bytes("rows.bin.labels", wrong, size);
    char what[64];
    snprintf(what, sizeof what, "rows.bin.labels: label %zu is %d", at, labels[at] + 1);
    fails(1, what, TRAIN_BAD);
    fails(1, what, "infer --model chat --eval rows.bin --seq-len 16");
    write_bytes("rows.bin.labels", file, size - 4);
    fails(1, "rows.bin.labels: not the labels of rows.bin", TRAIN_BAD);
    write_bytes("rows.bin.labels", file, 100);
    fails(1, "rows.bin.labels: no labels", TRAIN_BAD);
    write_bytes("rows.bin.labels", "", 0);
    fails(1, "rows.bin.labels", TRAIN_BAD);
    fails(1, "kept: labels, which are read with their token shard",
          TRAIN_ON("kept") "--out bad --steps 1");
    shell("cp unsaid.bin.labels rows.bin.labels");
    fails(1, "rows.bin.labels: not the labels of rows.bin", TRAIN_BAD);
    shell("mv kept rows.bin.labels");
    works(TRAIN_ON("rows.bin") "--out run --steps 4 --resume");
    check(count > 0, "no tokens");
    free(file);
    free(wrong);
    free(ids);
    free(labels);
}

int main(void) {
    enter("conversations");
    said("llama2_style", "</s>");
    said("llama3_style", "<|end_of_text|>");
    said("smollm_style", "<|im_end|>");
    templates();
    hostile_lines();
    no_tokens();
    make_data();
    losses();
    stale_labels();
    return leave("conversations");
}

// What infer --chat makes of a model's chat template: the texts of templates that are followed, and
// how others are refused.
#include "run.h"

// What transformers 4.57.1 (apply_chat_template, add_generation_prompt) makes of a template, maybe
// of a system message, and of a user who says " hi ". The tokens are then those of that text alone.
typedef struct {
    const char *tokenizer;
    const char *template; // NULL: the one before
    const char *system, *text;
} rendering;

static const rendering renderings[] = {
    // ChatML; the second time its content is trimmed, and a filter binds more than a +.
    {"smollm_style",
     "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
     "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}"
     "{{ '<|im_start|>assistant\\n' }}{% endif %}",
     "be kind ",
     "<|im_start|>system\nbe kind <|im_end|>\n<|im_start|>user\n hi <|im_end|>\n"
     "<|im_start|>assistant\n"},
    {"smollm_style",
     "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
     "message['content'] | trim + '<|im_end|>' + '\\n' }}{% endfor %}"
     "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
     "be kind ",
     "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
     "<|im_start|>assistant\n"},
    // A system message that the template gives, as SmolLM2's does, or sets, or both with tools.
    {"smollm_style",
     "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
     "{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}"
     "<|im_start|>{{ message['role'] + '\\n' + message.content ~ '<|im_end|>\n' }}{% endfor %}"
     "{{ '<|im_start|>assistant\\n' }}",
     NULL,
     "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n hi <|im_end|>\n"
     "<|im_start|>assistant\n"},
    {"smollm_style",
     NULL,
     "a",
     "<|im_start|>system\na<|im_end|>\n<|im_start|>user\n hi <|im_end|>\n<|im_start|>assistant\n"},
    {"smollm_style",
     "{% set system = 'Be brief.' %}\n{% if messages[0]['role'] == 'system' %}\n"
     "  {% set system = messages[0]['content'] %}\n  {% set messages = messages[1:] %}\n"
     "{% endif %}\n<|im_start|>{{ system }}\n{% for m in messages %}\n  {{ m.content }}\n"
     "{% endfor %}\n",
     NULL,
     "<|im_start|>Be brief.\n   hi \n"},
    {"smollm_style",
     NULL,
     "a",
     "<|im_start|>a\n   hi \n"},
    {"smollm_style",
     "{%- if tools %}\n    {{- \"Tools:\" }}\n    {%- for tool in tools %}"
     "{{ tool | tojson(indent=4) }}{%- endfor %}\n    {%- macro never() %}{% if x %}{% endif %}"
     "{% endmacro %}\n{%- elif messages[0].role == 'system' %}\n"
     "    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n{%- else %}\n"
     "    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}\n{%- endif %}\n"
     "{%- for message in messages %}\n"
     "    {%- if (message.role == \"user\") or (message.role == \"system\" and not loop.first) "
     "or (message.role == \"assistant\" and not message.tool_calls) %}\n"
     "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' "
     "}}\n    {%- elif message.role == \"tool\" and messages[loop.index0 + 1].role != \"tool\" %}"
     "\n        {{- message.content }}\n    {%- endif %}\n{%- endfor %}\n",
     NULL,
     "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n hi <|im_end|>\n"},
    {"smollm_style",
     NULL,
     "a",
     "<|im_start|>system\na<|im_end|>\n<|im_start|>user\n hi <|im_end|>\n"},
    // Llama-3, which writes BOS.
    {"llama3_style",
     "{% set loop_messages = messages %}{% for message in loop_messages %}"
     "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
     "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
     "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}",
     "a ",
     "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
     "a<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"},
    // Llama-3.1.
    {"llama3_style",
     "{{- bos_token }}\n{%- if not date_string is defined %}\n"
     "    {%- set date_string = \"26 Jul 2024\" %}\n{%- endif %}\n{%- if not tools is defined %}"
     "\n    {%- set tools = none %}\n{%- endif %}\n\n{#- The system message goes elsewhere. #}\n"
     "{%- if messages[0]['role'] == 'system' %}\n"
     "    {%- set system_message = messages[0]['content']|trim %}\n"
     "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = \"\" %}\n"
     "{%- endif %}\n{%- if tools is not none and not x %}\n    {{- \"Environment: ipython\\n\" }}"
     "\n{%- endif %}\n{{- \"Today: \" + date_string + \"\\n\\n\" }}\n{{- system_message }}\n"
     "{%- for message in messages %}\n"
     "    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}\n"
     "        {{- message['content'] | trim + '<|eot_id|>' }}\n"
     "    {%- elif message.content is iterable %}\n    {%- endif %}\n{%- endfor %}\n",
     NULL,
     "<|begin_of_text|>Today: 26 Jul 2024\n\nhi<|eot_id|>"},
    {"llama3_style",
     NULL,
     "a ",
     "<|begin_of_text|>Today: 26 Jul 2024\n\nahi<|eot_id|>"},
    // Zephyr: newlines behind {{ }} stay, those behind {% %} do not.
    {"llama2_style",
     "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
     "{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
     "{% elif message['role'] == 'system' %}\n"
     "{{ '<|system|>\\n' + message['content'] + eos_token }}\n{% endif %}\n"
     "{% if loop.last and add_generation_prompt %}{# <|end|> #}\n{{ '<|assistant|>' }}\n"
     "{% endif %}\n{% endfor %}",
     "a",
     "<|system|>\na</s>\n<|user|>\n hi </s>\n<|assistant|>\n"},
    // [INST], with and without <<SYS>>.
    {"llama2_style",
     "{{ bos_token }}{% for message in messages %}"
     "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}"
     "{% endif %}{% if message['role'] == 'user' %}"
     "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
     "{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
     NULL,
     "<s>[INST]  hi  [/INST]"},
    {"llama2_style",
     "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
     "{% set system = messages[0]['content'] %}"
     "{% elif x == true and not '<<SYS>>' in messages[0]['content'] %}{% else %}"
     "{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
     "{% if loop.index0 == 0 and system != false %}"
     "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
     "{% else %}{% set content = message['content'] %}{% endif %}"
     "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% endfor %}",
     "a",
     "<s>[INST] <<SYS>>\na\n<</SYS>>\n\n hi [/INST]"},
    // White space around tags.
    {"smollm_style",
     "  {% if true %}  \n {{ messages[0].content }} {%+ if true %}\n  {%- endif %}  y\n"
     "\t{%+ if false %}no{% endif +%}\n {{- 'q' -}}  \n\n {% endif -%}  \n z\r\n"
     "w\rv {#- c -#}  b\n  {# d #}\n  {#+ e +#}\nf{#g#}\n\n",
     NULL,
     "  \n  hi    y\n\tqz\nw\nvb\n  \nf"},
    // What is set in a loop is gone behind it and in its next turn, but not behind an if.
    {"smollm_style",
     "{% set x = 'a' %}{% for m in messages %}{{ x }}{% set x = x + m.content %}{{ x }}"
     "{% if loop.first %}{% set y = 'Y' %}{% endif %}{{ y }}{% for n in messages[:1] %}"
     "{% set x = 'z' %}{{ x }}{% endfor %}{{ x }}{% if loop.last %}.{% endif %}{% endfor %}"
     "{{ x }}{{ y }}{{ m }}",
     "s",
     "aasYzasaa hi za hi .a"},
    // Expressions.
    {"smollm_style",
     "{{ messages[-1].content.lstrip() ~ messages[0].content.rstrip() }}"
     "{% if 1 + 3 % 2 == 2 and -1 % 3 == 2 and 3 - 1 - 1 == 1 %}a{% endif %}"
     "{% if messages|length - 1 >= 0 and 1 < 2 and not 2 <= 1 and 2 > 1 %}b{% endif %}"
     "{% if messages[0].role in ['user', 'tool',] and 'x' not in ('y',) %}c{% endif %}"
     "{{ messages[0].zzz or 'd' }}{{ nope and nope.x }}{{ messages[9] }}"
     "{% if (messages[0].role == 'user') == true and true == 1 and not '1' == 1 %}e{% endif %}"
     "{% if none is none and tools is none and x is undefined and not x == none %}f{% endif %}"
     "{{ 'g' ' ' 'h' }}{% for m in messages[-5:-1] %}no{% endfor %}{% for m in x %}no{% endfor %}"
     "{{ ( '%}' ) + ('}}') }}",
     NULL,
     "hi  hiabcdefg h%}}}"},
    // What TRL marks for training.
    {"smollm_style",
     "{% set x = 'a' %}{% for m in messages %}{% if loop.first %}{% generation %}"
     "{% set x = m.content %}{{ x }}{% if loop.last %}.{% endif %}{% endgeneration %}{{ x }}"
     "{% endif %}{% endfor %}",
     NULL,
     " hi .a"},
    // Strings.
    {"smollm_style",
     "{{ 'a\\tb\\\\c\\'d\\\"e\\n' + \"it's\" }}{{ messages[0].content }}",
     NULL,
     "a\tb\\c'd\"e\nit's hi "},
};

static void write_text(const char *path, const char *text) {
    write_bytes(path, text, strlen(text));
}

#define CHAT "infer --tokenizer chat --print-tokens --chat --prompt ' hi ' "

// --print-tokens printed the ids of this text, to which the tokenizer adds nothing.
static void check_text(const char *text, const char *template) {
    char expected[8192] = {0};
    size_t n = 0, at = 0;
    retrofit_tokenizer *tokenizer = retrofit_tokenizer_load("chat");
    need(tokenizer != NULL, "chat");
    int32_t *ids = retrofit_encode(tokenizer, text, strlen(text), false, &n);
    for (size_t i = 0; i < n; i++)
        at += (size_t)sprintf(expected + at, i + 1 < n ? "%d " : "%d\n", (int)ids[i]);
    check(!strcmp(out, expected), "%s: '%s', not '%s'", template, out, expected);
    free(ids);
    retrofit_tokenizer_free(tokenizer);
}

static void use_tokenizer(const char *style) {
    char command[256];
    snprintf(command, sizeof command, "rm -rf chat && cp -rL f/tokenizers/%s chat", style);
    shell(command);
}

static void templates(void) {
    const char *template = NULL;
    for (size_t i = 0; i < sizeof renderings / sizeof *renderings; i++) {
        const rendering *r = &renderings[i];
        if (r->template) template = r->template;
        use_tokenizer(r->tokenizer);
        write_text("chat/chat_template.jinja", template);
        if (r->system) works(CHAT "--system '%s'", r->system);
        else works(CHAT);
        check_text(r->text, template);
    }
}

// What is not followed is refused by its name, and only where it would be run.
static void refusals(void) {
    static const struct {
        const char *template, *options, *what;
    } bad[] = {
        {"{{ messages | tojson }}", "", "line 1: 'tojson' is not followed"},
        {"\n\n{{ messages[0].content | upper }}", "", "line 3: 'upper'"},
        {"{{ messages[0].content.split('x')[0] }}", "", "'split'"},
        {"{{ 'a' if x else 'b' }}", "", "'if'"},
        {"{% macro f() %}{% endmacro %}{{ messages[0].content }}", "", "'macro'"},
        {"{% set x %}a{% endset %}{{ messages[0].content }}", "", "'%}'"},
        {"{% set x = namespace() %}{{ messages[0].content }}", "", "'namespace'"},
        {"{% for m in messages if true %}{{ m.content }}{% endfor %}", "", "'if'"},
        {"{% for m in [] %}{% else %}{{ messages[0].content }}{% endfor %}", "", "'else'"},
        {"{% if 1 < 2 == true %}{{ messages[0].content }}{% endif %}", "", "'=='"},
        {"{{ messages[0].content }}{{ messages[0] }}", "", "only text"},
        {"{{ messages[0].content }}{{ 1 }}", "", "only text"},
        {"{{ messages[0].content + 1 }}", "", "'+' of these"},
        {"{{ messages[0].content }}{{ x.y }}", "", "'y'"},
        {"{{ messages[0].content }}{{ unk_token }}", "", "'unk_token'"},
        {"{{ messages[0].content }}{{ '\\x41' }}", "", "escape \\x"},
        {"{{ messages[0].content }}{{ 1.5 }}", "", "'5'"},
        {"{{ messages[0].content }}{{ strftime_now('%f') }}", "", "strftime_now"},
        {"{{ messages[0].content }}{{ {} }}", "", "'{'"},
        {"{% raw %}{{ messages }}{% endraw %}", "", "'raw'"},
        {"{{ messages[0].content }}{% if true %}", "", "ends within a block"},
        {"{{ messages[0].content }}{% for m in messages %}", "", "ends within a block"},
        {"{{ messages[0].content }}{% endif %}", "", "'endif'"},
        {"{{ messages[0].content }}{% if true %}{% endfor %}", "", "'endfor'"},
        {"{{ messages[0].content }}{{ 'a' ", "", "'{{' of the chat template has no end"},
        {"{{ messages[0].content }}{{ 'a }}", "", "'{{' of the chat template has no end"},
        {"{{ messages[0].content }}{% if ", "", "'{%' of the chat template has no end"},
        {"{{ messages[0].content }}{#", "", "'{#' of the chat template has no end"},

        // What is asked does not go with the template.
        {"{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem') }}{% endif %}"
         "{{ messages[0].content }}", "--system a", "line 2: it does not take this conversation: "
         "no system"},
        {"{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
         "--system a", "writes nothing of a message of the role \"system\""},
        {"", "", "writes nothing of a message of the role \"user\""},
    };
    use_tokenizer("smollm_style");
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_text("chat/chat_template.jinja", bad[i].template);
        fails(1, bad[i].what, CHAT "%s", bad[i].options);
        if (*bad[i].options) works(CHAT);
    }
}

// Templates that would take forever, or all memory, or the stack.
static void limits(void) {
    static const struct {
        const char *begin, *repeated, *end, *closing, *what;
        size_t count;
    } bad[] = {
        {"{{ ", "(", "", "", "'{{' of the chat template has no end", 100000},
        {"{{ ", "(", "x", ")", "too much nesting", 100000},
        {"", "{% if true %}", "", "", "too much nesting", 100000},
        {"{{ ", "not ", "x }}", "", "too much nesting", 100000},
        {"{% set x = 'abc' %}", "{% set x = x + x %}", "", "", "too much memory", 40},
        {"{% set l = [1, 2] %}", "{% for m in l %}", "x", "{% endfor %}", "too much time", 30},
        {"{% set x = 9 %}", "{% set x = x + x %}", "", "", "number of this size", 40},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        FILE *file = fopen("chat/chat_template.jinja", "w");
        need(file != NULL, "a template");
        fputs(bad[i].begin, file);
        for (size_t k = 0; k < bad[i].count; k++) fputs(bad[i].repeated, file);
        fputs(bad[i].end, file);
        for (size_t k = 0; k < bad[i].count; k++) fputs(bad[i].closing, file);
        if (*bad[i].repeated == '(') fputs(" }}", file);
        need(fclose(file) == 0, "a template");
        fails(1, bad[i].what, CHAT);
    }
}

// Where the template lies, in the order of transformers.
static void places(void) {
#define ALL "{{ messages[0].content }}"
    use_tokenizer("smollm_style");
    fails(1, "chat: no chat template", CHAT);
    write_text("chat/tokenizer_config.json", "{\"chat_template\": null}");
    fails(1, "chat: no chat template", CHAT);
    write_text("chat/tokenizer_config.json", "{\"chat_template\": 7}");
    fails(1, "chat_template is no text", CHAT);
    write_text("chat/tokenizer_config.json", "{\"chat_template\": []}");
    fails(1, "named \"default\"", CHAT);
    write_text("chat/tokenizer_config.json",
               "{\"chat_template\": [{\"name\": \"tool_use\", \"template\": \"a" ALL "\"}]}");
    fails(1, "named \"default\"", CHAT);
    write_text("chat/tokenizer_config.json",
               "{\"chat_template\": [{\"name\": \"default\", \"template\": \"b" ALL "\"}, "
               "{\"name\": \"rag\", \"template\": \"c" ALL "\"}]}");
    works(CHAT);
    check_text("b hi ", "default of a list");
    write_text("chat/tokenizer_config.json", "{\"chat_template\": \"d" ALL "{{ eos_token }}\"}");
    fails(1, "eos_token, which no file names", CHAT);
    write_text("chat/tokenizer_config.json",
               "{\"chat_template\": \"d" ALL "{{ bos_token }}\", "
               "\"tokenizer_class\": \"PreTrainedTokenizerFast\"}");
    works(CHAT);
    check_text("d hi ", "tokenizer_config.json");

    shell("mkdir chat/additional_chat_templates");
    fails(1, "without a chat_template.jinja", CHAT);
    write_text("chat/chat_template.jinja", "e" ALL "\r\n");
    works(CHAT);
    check_text("e hi ", "chat_template.jinja");
    write_text("chat/additional_chat_templates/default.jinja", "f" ALL);
    works(CHAT);
    check_text("f hi ", "additional_chat_templates");
    write_text("chat/additional_chat_templates/default.jinja", ALL "\xc3");
    fails(1, "is not UTF-8", CHAT);
}

// Special tokens that are written out in a message become ids.
static void special_tokens(void) {
    use_tokenizer("llama3_style");
    write_text("chat/chat_template.jinja", "{% for m in messages %}{{ m.content }}.{% endfor %}");
    works("printf ' <|end_of_text|>\n' | infer --tokenizer chat --print-tokens --chat --prompt - "
          "--system '<|end_of_text|> a'");
    check_text("<|end_of_text|> a. <|end_of_text|>\n.", "special tokens");
}

// Some templates write the day.
static void dates(void) {
    char text[128];
    use_tokenizer("smollm_style");
    works("LC_ALL=C date '+%%d %%b %%Y'");
    snprintf(text, sizeof text, "Today: %.20s hi ", strtok(out, "\n"));
    write_text("chat/chat_template.jinja",
               "{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}"
               "{% endif %}{{ 'Today: ' + date + messages[0].content }}");
    works(CHAT);
    check_text(text, "strftime_now");
}

int main(void) {
    enter("chat");
    templates();
    refusals();
    limits();
    places();
    dates();
    special_tokens();
    return leave("chat");
}

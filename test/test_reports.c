// Files and settings as users have them: each directory of test/fixtures/reports is a case with an
// expect.json, which says what is right, and its README says in which form. The programs are tried
// on every case, or on those that are named as arguments.
#include "run.h"
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <glob.h>
#include <regex.h>

// A program that takes more seconds hangs. Bytes of a pattern, and of a shard's header; a step's
// arguments at most. How many cases there are: one that is lost would not be missed else.
enum { TIME_LIMIT = 120, PATTERN = 512, HEADER = 1024, ARGUMENTS = 64, CASES = 170 };

// The case that is judged, its directory, and its expect.json.
static const char *case_name;
static char *case_path;
static const retrofit_json *expected;
// A directory that is fresh and empty for every case.
#define FRESH "w"

// ---- Text ---------------------------------------------------------------------------------------

__attribute__((format(printf, 1, 2))) static char *text_of(const char *format, ...) {
    va_list args;
    char *text = NULL;
    va_start(args, format);
    need(vasprintf(&text, format, args) >= 0, "memory");
    va_end(args);
    return text;
}

__attribute__((format(printf, 2, 3))) static void append(char **text, const char *format, ...) {
    va_list args;
    char *more = NULL;
    va_start(args, format);
    need(vasprintf(&more, format, args) >= 0, "memory");
    va_end(args);
    char *longer = text_of("%s%s", *text, more);
    free(more);
    free(*text);
    *text = longer;
}

// A check of the case. `why` says what is wrong and is freed; NULL if nothing is.
static bool judge(char *why) {
    for (char *p = why; p && *p; p++) {
        if (*p == '\n') *p = ' '; // a line for each check
    }
    bool ok = check(why == NULL, "%s: %s", case_name, why ? why : "");
    free(why);
    return ok;
}

// An array of numbers, or a number, as one that a program printed is written, so that two can be
// compared and shown.
static char *numbers_text(const retrofit_json *value) {
    bool is_array = value && value->type == RETROFIT_JSON_ARRAY;
    if (!is_array) return text_of("%.12g", value ? value->number : (double)NAN);
    char *text = text_of("[");
    for (const retrofit_json *item = value->child; item; item = item->next)
        append(&text, "%.12g%s", item->number, item->next ? "," : "");
    append(&text, "]");
    return text;
}

// A string of a case, in which {d} is the case's directory and {w} the fresh one.
static char *filled(const char *text) {
    char *result = text_of("%s", text);
    for (char *at; (at = strstr(result, "{d}")) || (at = strstr(result, "{w}"));) {
        const char *path = at[1] == 'd' ? case_path : FRESH;
        char *longer = text_of("%.*s%s%s", (int)(at - result), result, path, at + 3);
        free(result);
        result = longer;
    }
    return result;
}

static const char *string_of(const retrofit_json *object, const char *key) {
    const retrofit_json *value = retrofit_json_get(object, key);
    return value && value->type == RETROFIT_JSON_STRING ? value->string : NULL;
}

static retrofit_json *parse_file(const char *path) {
    size_t size;
    char *text = retrofit_read_file(path, &size);
    retrofit_json *json = text ? retrofit_json_parse(text, size, path) : NULL;
    free(text);
    return json;
}

static bool exists(const char *path) { return access(path, F_OK) == 0; }

// ---- Python's regular expressions ---------------------------------------------------------------

// Writes what begins with a backslash. Returns false where it has no counterpart.
static bool translate_escape(char escaped, FILE *posix) {
    if (escaped == 'd') return fputs("[0-9]", posix) >= 0;
    if (escaped == '\0' || (isalnum((unsigned char)escaped) && !strchr("bBwWsS", escaped)))
        return false;
    return fprintf(posix, "\\%c", escaped) > 0;
}

// Copies a set like [0-9a-f], whose text after the bracket is p. Returns what follows it, or NULL:
// in Python [^…] matches a newline, and in a set a backslash escapes; not so in POSIX.
static const char *translate_set(const char *p, FILE *posix) {
    size_t length = strcspn(p, "]\\[");
    if (length == 0 || *p == '^' || p[length] != ']') return NULL;
    fprintf(posix, "[%.*s]", (int)length, p);
    return p + length + 1;
}

// Writes one construct of a pattern. Returns what follows it, or NULL where it has no counterpart:
// (?…), quantifiers that are lazy, and anchors, which with REG_NEWLINE stand for other places.
static const char *translate_next(const char *p, FILE *posix) {
    if (*p == '\\') return translate_escape(p[1], posix) ? p + 2 : NULL;
    if (*p == '[') return translate_set(p + 1, posix);
    if (*p == '^' || *p == '$' || *p == '{') return NULL;
    if (*p == '(' && p[1] == '?') return NULL;
    if (strchr("*+?", *p) && p[1] && strchr("*+?", p[1])) return NULL;
    fputc(*p, posix);
    return p + 1;
}

// Compiles a regular expression of Python, as re.search takes it, to the same one of POSIX. In both
// a dot matches no newline (REG_NEWLINE). false where it is none, or has no counterpart.
static bool compile_pattern(regex_t *regex, const char *python) {
    char posix[PATTERN] = {0};
    int flags = REG_EXTENDED | REG_NOSUB | REG_NEWLINE;
    const char *p = python;
    if (!strncmp(p, "(?i)", 4)) {
        flags |= REG_ICASE;
        p += 4;
    }
    if (!*p) return false;
    FILE *f = fmemopen(posix, sizeof posix, "w");
    need(f != NULL, "fmemopen");
    while (p && *p) p = translate_next(p, f);
    bool whole = ftell(f) < PATTERN - 1;
    whole = fclose(f) == 0 && whole && p != NULL;
    return whole && regcomp(regex, posix, flags) == 0;
}

// Whether a pattern is found in a text. One that cannot be compiled is a check that fails.
static bool search(const char *pattern, const char *text) {
    regex_t regex;
    bool compiled = compile_pattern(&regex, pattern);
    if (!compiled)
        return check(false, "%s: /%s/ is none that this test can read", case_name, pattern);
    bool found = regexec(&regex, text, 0, NULL, 0) == 0;
    regfree(&regex);
    return found;
}

static void test_patterns(void) {
    enum { ABSENT, FOUND, REFUSED };
    static const struct {
        const char *pattern, *text;
        int result;
    } table[] = {
        {"small", "a small one", FOUND},
        {"small", "a SMALL one", ABSENT},
        {"(?i)small", "a SMALL one", FOUND},
        {"(?i)\\b(un)?tied\\b", "it is Untied.", FOUND},
        {"(?i)\\b(un)?tied\\b", "it is untiedly", ABSENT},
        {"(?i)\\b(un)?tied\\b", "it is emptied", ABSENT},
        {"step \\d+/", "train: step 12/400", FOUND},
        {"step \\d+/", "train: step d/400", ABSENT},
        {"step \\d+/", "train: step /400", ABSENT},
        {"rope\\.scal", "llama.rope.scaling", FOUND},
        {"rope\\.scal", "llama.rope_scaling", ABSENT},
        {"rope.scal", "llama.rope_scaling", FOUND},
        {"a.b", "a\nb", ABSENT},
        {"(also|as well).*(data|val)", "also\nin data", ABSENT},
        {"(also|as well).*(data|val)", "also in val", FOUND},
        {"small[0-9]|short", "small7", FOUND},
        {"small[0-9]|short", "small", ABSENT},
        {"without \"model", "names without \"model.\"", FOUND},
        {"(?i)--model", "train: --model is not used", FOUND},
        {"utf-?8", "not utf8", FOUND},
        {"a\\+b", "a+b", FOUND},
        {"a\\+b", "aab", ABSENT},
        {"a.*?b", "ab", REFUSED},
        {"(?:a)", "a", REFUSED},
        {"a(?=b)", "ab", REFUSED},
        {"^a", "a", REFUSED},
        {"a$", "a", REFUSED},
        {"[^a]", "b", REFUSED},
        {"[\\d]", "1", REFUSED},
        {"\\Aa", "a", REFUSED},
        {"a{2}", "aa", REFUSED},
        {"(a", "a", REFUSED},
        {"a\\", "a", REFUSED},
        {"", "a", REFUSED},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        regex_t regex;
        int result = REFUSED;
        if (compile_pattern(&regex, table[i].pattern)) {
            result = regexec(&regex, table[i].text, 0, NULL, 0) == 0 ? FOUND : ABSENT;
            regfree(&regex);
        }
        check(result == table[i].result, "/%s/ in '%s': got %d, wanted %d", table[i].pattern,
              table[i].text, result, table[i].result);
    }
}

// ---- Programs -----------------------------------------------------------------------------------

// What the last program ended with: its exit code, or minus the signal that ended it.
static int code;

static void replace_descriptor(int fd, const char *path, int flags) {
    int file = open(path, flags, 0666);
    if (file < 0 || dup2(file, fd) < 0) _exit(127);
    close(file);
}

// Runs a program, without a shell since a case may hold any character. What it writes is left in
// out and err. preload: a library whose functions come before all others, or NULL.
static void launch(const char *const *arguments, const char *preload) {
    fflush(stdout);
    pid_t child = fork();
    need(child >= 0, "fork");
    if (child == 0) {
        replace_descriptor(0, "/dev/null", O_RDONLY);
        replace_descriptor(1, "stdout", O_WRONLY | O_CREAT | O_TRUNC);
        replace_descriptor(2, "stderr", O_WRONLY | O_CREAT | O_TRUNC);
        if (preload) setenv("LD_PRELOAD", preload, 1);
        alarm(TIME_LIMIT); // the alarm stays set in the program that takes this process over
        execvp(arguments[0], (char *const *)arguments);
        _exit(127);
    }
    int status;
    need(waitpid(child, &status, 0) == child, "waitpid");
    code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    free(out);
    free(err);
    out = slurp("stdout", &out_size);
    err = slurp("stderr", &(size_t){0});
}

#define RUN(...) launch((const char *const[]){__VA_ARGS__, NULL}, NULL)

// The last line of what the program said on stderr, or else on stdout.
static const char *last_said(void) {
    static char line[300];
    const char *text = err[strspn(err, " \r\n")] ? err : out;
    size_t end = strlen(text);
    while (end > 0 && isspace((unsigned char)text[end - 1])) end--;
    size_t begin = end;
    while (begin > 0 && text[begin - 1] != '\n' && text[begin - 1] != '\r') begin--;
    snprintf(line, sizeof line, "%.*s", (int)(end - begin), text + begin);
    return line;
}

// All that the program wrote. Text that a model makes may hold a NUL.
static char *all_said(void) {
    for (size_t i = 0; i < out_size; i++) {
        if (out[i] == '\0') out[i] = ' ';
    }
    return text_of("%s%s", out, err);
}

static bool failed_by_itself(void) { return code == 1 || code == 2; }

static char *exit_text(void) { return text_of("exit %d: %s", code, last_said()); }

// NULL if the last program succeeded, else why not.
static char *why_no_success(const char *program) {
    return code == 0 ? NULL : text_of("%s: exit %d: %s", program, code, last_said());
}

// Where a case allows it: an error that names what is not supported.
static bool is_refused(const char *text) {
    const char *pattern = string_of(expected, "refusal_says");
    return pattern && failed_by_itself() && search(pattern, text);
}

// What the program printed as JSON, and in it the accuracies at each of --recurrences.
static retrofit_json *printed_json(void) { return retrofit_json_parse(out, out_size, "stdout"); }

static char *printed_accuracies(void) {
    retrofit_json *json = printed_json();
    const retrofit_json *results = retrofit_json_get(json, "results");
    char *text = text_of("[");
    for (const retrofit_json *r = results ? results->child : NULL; r; r = r->next) {
        const retrofit_json *accuracy = retrofit_json_get(r, "acc");
        append(&text, "%.12g%s", accuracy ? accuracy->number : (double)NAN, r->next ? "," : "");
    }
    append(&text, "]");
    retrofit_json_free(json);
    return text;
}

// The first of them; not a number if there is none.
static double printed_accuracy(void) {
    char *text = printed_accuracies(), *end;
    double accuracy = strtod(text + 1, &end);
    if (end == text + 1) accuracy = NAN;
    free(text);
    return accuracy;
}

// convert, as most cases cut their model of three layers.
static void convert_case(void) {
    RUN("convert", "--from", case_path, "--to", FRESH "/m", "--prelude", "0", "--core", "1",
        "--coda", "2");
}

// ---- Steps: what must be true of a program that has run -----------------------------------------
// Each function gets the value of a member of a step, and returns NULL or why it is not so.

static char *why_other_exit(const retrofit_json *wanted) {
    bool should_fail = retrofit_json_is(wanted, "fails");
    if (should_fail && !failed_by_itself())
        return text_of("exit %d, should fail: %s", code, last_said());
    if (!should_fail && code != (int)wanted->number) return exit_text();
    return NULL;
}

static char *why_not_said(const retrofit_json *wanted) {
    char *said = all_said();
    bool found = search(wanted->string, said);
    free(said);
    return found ? NULL : text_of("says nothing of /%s/: %s", wanted->string, last_said());
}

static char *why_said(const retrofit_json *wanted) {
    char *said = all_said();
    bool found = search(wanted->string, said);
    free(said);
    return found ? text_of("came to \"%s\": %s", wanted->string, last_said()) : NULL;
}

static char *why_missing(const retrofit_json *wanted) {
    char *pattern = filled(wanted->string);
    glob_t found = {0};
    bool there = glob(pattern, 0, NULL, &found) == 0 && found.gl_pathc > 0;
    globfree(&found);
    free(pattern);
    return there ? NULL : text_of("no %s: %s", wanted->string, last_said());
}

// [path, ids]: the tokens of a shard.
static char *why_other_shard(const retrofit_json *wanted) {
    size_t size = 0;
    char *path = filled(wanted->child->string), *shard = retrofit_read_file(path, &size);
    free(path);
    if (size < HEADER) {
        free(shard);
        return text_of("no shard %s: %s", wanted->child->string, last_said());
    }
    int32_t version;
    memcpy(&version, shard + 4, sizeof version);
    size_t width = version == 1 ? 2 : 4;
    char *got = text_of("[");
    for (size_t at = HEADER; at + width <= size; at += width) {
        uint32_t id = 0;
        memcpy(&id, shard + at, width); // little-endian
        append(&got, "%s%u", at > HEADER ? "," : "", id);
    }
    free(shard);
    append(&got, "]");
    char *right = numbers_text(wanted->child->next);
    char *why = strcmp(got, right) ? text_of("got tokens %s, wanted %s", got, right) : NULL;
    free(got);
    free(right);
    return why;
}

// {path, says}: what a log holds.
static char *why_other_log(const retrofit_json *wanted) {
    const char *pattern = string_of(wanted, "says");
    char *path = filled(string_of(wanted, "path"));
    char *text = retrofit_read_file(path, &(size_t){0});
    bool found = text && search(pattern, text);
    free(text);
    free(path);
    return found ? NULL : text_of("log.jsonl has no %s: %s", pattern, last_said());
}

// The first losses of a log, at most `count`. Returns how many there are.
static size_t read_losses(const char *path, double *losses, size_t count) {
    size_t n = 0;
    char *text = retrofit_read_file(path, &(size_t){0});
    for (char *line = text; line && *line && n < count; line += strcspn(line, "\n") + 1) {
        retrofit_json *json = retrofit_json_parse(line, strcspn(line, "\n"), path);
        const retrofit_json *loss = retrofit_json_get(json, "loss");
        if (loss) losses[n++] = loss->type == RETROFIT_JSON_NUMBER ? loss->number : NAN;
        retrofit_json_free(json);
        if (!strchr(line, '\n')) break;
    }
    free(text);
    return n;
}

// [path, losses, tolerance]: of the first steps in a log.jsonl.
static char *why_other_losses(const retrofit_json *wanted) {
    const retrofit_json *right = wanted->child->next, *next = right->child;
    double got[ARGUMENTS], tolerance = right->next->number;
    need(right->count <= ARGUMENTS, "losses of a case");
    char *path = filled(wanted->child->string);
    size_t n = read_losses(path, got, right->count);
    free(path);
    bool same = n == right->count;
    char *list = text_of("[");
    for (size_t i = 0; i < n; i++, next = next->next) {
        same = same && fabs(got[i] - next->number) <= tolerance;
        append(&list, i > 0 ? ",%.7g" : "%.7g", got[i]);
    }
    char *numbers = numbers_text(right), *why = NULL;
    if (!same) why = text_of("got losses %s], wanted %s: %s", list, numbers, last_said());
    free(list);
    free(numbers);
    return why;
}

// At each of --recurrences, from --json.
static char *why_other_accuracies(const retrofit_json *wanted) {
    char *got = printed_accuracies(), *right = numbers_text(wanted);
    bool same = code == 0 && !strcmp(got, right);
    char *why = same ? NULL : text_of("got acc %s, wanted %s: %s", got, right, last_said());
    free(got);
    free(right);
    return why;
}

// Of what a step must be, the first that it is not; NULL if it is everything.
static char *why_not(const retrofit_json *wanted) {
    static const struct {
        const char *key;
        char *(*why)(const retrofit_json *wanted);
    } table[] = {
        {"exit", why_other_exit},
        {"says", why_not_said},
        {"not", why_said},
        {"exists", why_missing},
        {"shard", why_other_shard},
        {"log", why_other_log},
        {"losses", why_other_losses},
        {"accuracies", why_other_accuracies},
    };
    char *why = NULL;
    for (const retrofit_json *member = wanted->child; member && !why; member = member->next) {
        if (!strcmp(member->key, "run") || !strcmp(member->key, "preload")) continue;
        size_t i = 0, count = sizeof table / sizeof *table;
        while (i < count && strcmp(member->key, table[i].key)) i++;
        why = i < count ? table[i].why(member) : text_of("this test has no '%s'", member->key);
    }
    return why;
}

// ---- Steps --------------------------------------------------------------------------------------

// NULL if one of several things is as wanted, else why none is.
static char *why_none(const retrofit_json *any) {
    char *reasons = text_of("%s", "");
    for (const retrofit_json *one = any->child; one; one = one->next) {
        char *why = why_not(one);
        if (!why) {
            free(reasons);
            return NULL;
        }
        append(&reasons, "%s%s", *reasons ? " / " : "", why);
        free(why);
    }
    return reasons;
}

// A program with arguments, and what must be true of it, or one of several such things.
static char *why_run_is_wrong(const retrofit_json *step) {
    const retrofit_json *run = retrofit_json_get(step, "run");
    const retrofit_json *any = retrofit_json_get(step, "any");
    char *arguments[ARGUMENTS] = {0}, *preload = NULL;
    need(run && run->count > 0 && run->count < ARGUMENTS, "arguments of a case");
    size_t count = 0;
    for (const retrofit_json *a = run->child; a; a = a->next)
        arguments[count++] = filled(a->string);
    if (string_of(step, "preload"))
        preload = text_of("%s/" FRESH "/%s.so", directory, string_of(step, "preload"));
    launch((const char *const *)arguments, preload);
    free(preload);

    char *why = any ? why_none(any) : why_not(step);
    char *named = why ? text_of("%s: %s", arguments[0], why) : NULL;
    free(why);
    for (size_t i = 0; i < count; i++) free(arguments[i]);
    return named;
}

// A C file of the case, as a library that replaces functions of libc.
static char *why_not_compiled(const char *file) {
    const char *compiler = getenv("CC") && *getenv("CC") ? getenv("CC") : "cc"; // may be words
    char *command =
        text_of("%s -shared -fPIC '%s/%s' -o '" FRESH "/%s.so'", compiler, case_path, file, file);
    RUN("sh", "-c", command);
    free(command);
    return why_no_success("the C compiler");
}

static char *why_not_made(const char *path) {
    char *copy = filled(path);
    bool made = retrofit_make_directories(copy, true);
    free(copy);
    return made ? NULL : text_of("%s", retrofit_error());
}

// Follows links, as cp -rL does.
static char *why_not_copied(const retrofit_json *pair) {
    char *from = filled(pair->child->string), *to = filled(pair->child->next->string);
    RUN("cp", "-RL", from, to);
    free(from);
    free(to);
    return why_no_success("cp");
}

static void judge_steps(const retrofit_json *steps) {
    for (const retrofit_json *step = steps->child; step; step = step->next) {
        const retrofit_json *pair = retrofit_json_get(step, "copy");
        const char *made = string_of(step, "mkdir"), *file = string_of(step, "compile");
        char *why;
        if (made) why = why_not_made(made);
        else if (pair) why = why_not_copied(pair);
        else if (file) why = why_not_compiled(file);
        else why = why_run_is_wrong(step);
        if (!judge(why)) return; // the next ones need what this one makes
    }
}

// ---- What a case may ask for --------------------------------------------------------------------

// The ids that infer --print-tokens printed, or how it failed.
static char *printed_ids(void) {
    if (code != 0) return exit_text();
    char *text = text_of("["), *words = text_of("%s", out), *rest = NULL;
    for (char *w = strtok_r(words, ", \t\r\n", &rest); w; w = strtok_r(NULL, ", \t\r\n", &rest)) {
        if (w[strspn(w, "0123456789")]) continue;
        append(&text, "%s%s", text[1] ? "," : "", w);
    }
    append(&text, "]");
    free(words);
    return text;
}

static void judge_printed_ids(const char *text, const retrofit_json *wanted, bool may_refuse) {
    char *got = printed_ids(), *right = numbers_text(wanted), *why = NULL;
    if (strcmp(got, right) && !may_refuse)
        why = text_of("'%s': got %s, wanted %s", text, got, right);
    judge(why);
    free(got);
    free(right);
}

// [text, its ids] each.
static void judge_ids(const retrofit_json *ids) {
    for (const retrofit_json *pair = ids->child; pair; pair = pair->next) {
        const char *text = pair->child->string;
        RUN("infer", "--tokenizer", case_path, "--prompt", text, "--print-tokens");
        judge_printed_ids(text, pair->child->next, code != 0 && is_refused(last_said()));
    }
}

// [what the user says, what the system says or null, the ids of transformers' apply_chat_template].
static void judge_chat(const retrofit_json *chat) {
    bool refusal_is_fine = retrofit_json_get(expected, "refusal_is_fine") != NULL;
    for (const retrofit_json *turn = chat->child; turn; turn = turn->next) {
        const char *text = turn->child->string, *system = turn->child->next->string;
        bool has_system = turn->child->next->type == RETROFIT_JSON_STRING;
        RUN("infer", "--tokenizer", case_path, "--prompt", text, "--print-tokens", "--chat",
            has_system ? "--system" : NULL, system);
        bool may_refuse = refusal_is_fine && failed_by_itself() && strstr(last_said(), "template");
        judge_printed_ids(text, turn->child->next->next, may_refuse);
    }
}

// How far the logits that a program wrote are from those of transformers.
static char *why_other_logits(void) {
    retrofit_map got, right;
    char *path = text_of("%s/expected_logits.safetensors", case_path);
    need(retrofit_safetensors_open(&right, path), path);
    free(path);
    char *why = NULL;
    if (!retrofit_safetensors_open(&got, FRESH "/l.safetensors"))
        why = text_of("%s", retrofit_error());
    else {
        const retrofit_tensor *a = retrofit_safetensors_find(&got, "logits");
        const retrofit_tensor *b = fixture(&right, "logits");
        bool alike = a && a->type == RETROFIT_F32 && a->count == b->count;
        double error = alike ? relative_error(a->data, b->data, b->count) : (double)NAN;
        double most = retrofit_json_get(expected, "rel")->number;
        if (!(error < most)) why = text_of("logits differ by %.1e, wanted %.0e", error, most);
        retrofit_safetensors_close(&got);
    }
    retrofit_safetensors_close(&right);
    return why;
}

// The logits of tokens, of a directory or of a GGUF file that is converted.
static void judge_logits(const retrofit_json *tokens) {
    const char *gguf = string_of(expected, "gguf"), *model = case_path;
    if (gguf) {
        char *path = text_of("%s/%s", case_path, gguf);
        RUN("convert", "--from", path, "--to", FRESH "/m");
        free(path);
        bool stop = code != 0 && is_refused(err);
        if (!judge(stop ? NULL : why_no_success("convert")) || stop) return;
        model = FRESH "/m";
    }
    char *list = numbers_text(tokens);
    list[strlen(list) - 1] = '\0';
    RUN("infer", "--model", model, "--tokens", list + 1, "--logits", FRESH "/l.safetensors",
        "--device", "cpu");
    free(list);
    if (code != 0) judge(is_refused(err) ? NULL : exit_text());
    else judge(why_other_logits());
}

// The tokens that are generated greedily behind the prompt.
static void judge_generates(const retrofit_json *generates) {
    char *count = text_of("%u", generates->count), *why = NULL;
    RUN("infer", "--model", case_path, "--prompt", string_of(expected, "prompt"), "--max-tokens",
        count, "--json", "--device", "cpu");
    free(count);
    retrofit_json *json = code == 0 ? printed_json() : NULL;
    char *got = numbers_text(retrofit_json_get(json, "tokens")), *right = numbers_text(generates);
    if (code != 0) why = exit_text();
    else if (strcmp(got, right))
        why = text_of("generates %s, wanted %s: %s", got, right, last_said());
    judge(why);
    free(got);
    free(right);
    retrofit_json_free(json);
}

// [regular expression, accuracy on tasks.jsonl, whether it may be refused instead] each.
static void judge_answers(const retrofit_json *answers) {
    char *tasks = text_of("%s/tasks.jsonl", case_path);
    for (const retrofit_json *a = answers->child; a; a = a->next) {
        const char *regex = a->child->string;
        const retrofit_json *wanted = a->child->next;
        bool may_refuse = wanted->next->number != 0;
        RUN("infer", "--model", case_path, "--tasks", tasks, "--answer-regex", regex,
            "--max-tokens", "20", "--json", "--device", "cpu");
        double got = code == 0 ? printed_accuracy() : (double)NAN;
        bool right = fabs(got - wanted->number) <= 1e-6 || (code == 2 && may_refuse);
        judge(right
                  ? NULL
                  : text_of("/%s/: got %g of the answers, wanted %.3f%s: exit %d: %s", regex, got,
                            wanted->number, may_refuse ? " or a refusal" : "", code, last_said()));
    }
    free(tasks);
}

// The accuracy on a file of tasks.
static void judge_tasks(const retrofit_json *file) {
    char *tasks = text_of("%s/%s", case_path, file->string);
    RUN("infer", "--model", case_path, "--tasks", tasks, "--json", "--device", "cpu");
    free(tasks);
    double got = code == 0 ? printed_accuracy() : (double)NAN;
    double wanted = retrofit_json_get(expected, "acc")->number;
    judge(got == wanted
              ? NULL
              : text_of("got acc %g, wanted %g: exit %d: %s", got, wanted, code, last_said()));
}

// The end-of-sequence ids that config.json and generation_config.json of a directory name, into
// ids[ARGUMENTS]. Returns how many.
static size_t read_eos(const char *model, double *ids) {
    static const char *const names[] = {"config.json", "generation_config.json"};
    size_t count = 0;
    for (size_t i = 0; i < 2; i++) {
        char *path = text_of("%s/%s", model, names[i]);
        retrofit_json *json = exists(path) ? parse_file(path) : NULL;
        const retrofit_json *eos = retrofit_json_get(json, "eos_token_id");
        bool is_array = eos && eos->type == RETROFIT_JSON_ARRAY;
        const retrofit_json *one = is_array ? eos->child : eos;
        for (; one && count < ARGUMENTS; one = is_array ? one->next : NULL)
            if (one->type == RETROFIT_JSON_NUMBER) ids[count++] = one->number;
        retrofit_json_free(json);
        free(path);
    }
    return count;
}

// Generation ends with an id that ends a text, and convert keeps all of them.
static void judge_stop(const retrofit_json *id) {
    size_t wanted = retrofit_json_get(expected, "generated")->count;
    RUN("infer", "--model", case_path, "--prompt", string_of(expected, "prompt"), "--max-tokens",
        "12", "--temperature", "0", "--json", "--device", "cpu");
    if (!judge(why_no_success("infer"))) return;
    retrofit_json *json = printed_json();
    const retrofit_json *tokens = retrofit_json_get(json, "tokens");
    size_t got = tokens ? tokens->count : 0;
    bool right = tokens && (got == wanted || got + 1 == wanted);
    char *ids = numbers_text(tokens);
    judge(right ? NULL
                : text_of("got %zu tokens, wanted %zu, of which the last is %g: %s", got, wanted,
                          id->number, ids));
    free(ids);
    retrofit_json_free(json);

    convert_case();
    if (!judge(why_no_success("convert"))) return;
    double ours[ARGUMENTS], theirs[ARGUMENTS];
    size_t count = read_eos(case_path, theirs), kept = read_eos(FRESH "/m", ours);
    for (size_t i = 0; i < count; i++) {
        bool found = false;
        for (size_t k = 0; k < kept; k++) found = found || ours[k] == theirs[i];
        judge(found ? NULL : text_of("convert loses the end-of-sequence id %g", theirs[i]));
    }
}

// A weight that is no number is named by convert, and infer does not generate from it.
static void judge_not_finite(const retrofit_json *tensor) {
    convert_case();
    bool named = code != 0 && strstr(err, tensor->string);
    judge(named ? NULL
                : text_of("convert: exit %d: wanted %s named, got %s", code, tensor->string,
                          last_said()));
    RUN("infer", "--model", case_path, "--prompt", "the cat", "--max-tokens", "3", "--device",
        "cpu");
    judge(failed_by_itself() ? NULL
                             : text_of("infer: exit %d: generates from it: %.60s", code, out));
}

static void judge_converts(const retrofit_json *unused) {
    (void)unused;
    convert_case();
    judge(why_no_success("convert"));
}

// Ids that no token has are not generated, even at a temperature at which every id is.
static void judge_id_holes(const retrofit_json *unused) {
    (void)unused;
    for (int seed = 0; seed < 12; seed++) {
        char *number = text_of("%d", seed);
        RUN("infer", "--model", case_path, "--prompt", "the cat", "--max-tokens", "50",
            "--temperature", "9", "--seed", number, "--device", "cpu");
        free(number);
        judge(why_no_success("generation"));
    }
}

// Tokenizes a file of the case. Returns its tokens, or NULL and what failed in *why.
static char *tokenize(const char *file, size_t *size, char **why) {
    char *from = text_of("%s/%s", case_path, file), *to = text_of(FRESH "/%s.bin", file);
    RUN("convert", "--tokenize", from, "--tokenizer", case_path, "--to", to);
    *size = 0;
    char *shard = code == 0 ? retrofit_read_file(to, size) : NULL;
    *why = shard && *size >= HEADER ? NULL : text_of("%s: exit %d: %s", file, code, last_said());
    free(from);
    free(to);
    return shard;
}

// Text as editors and other programs write it: a byte order mark, CR LF, empty lines, null for a
// text, half of a surrogate pair.
static void judge_jsonl(const retrofit_json *unused) {
    (void)unused;
    static const char *const files[] = {"crlf.jsonl",      "blank.jsonl", "bom.jsonl",
                                        "surrogate.jsonl", "null.jsonl",  "bom.txt"};
    enum { CRLF, BLANK, BOM_TEXT = 5, FILES };
    char *shards[FILES], *why;
    size_t sizes[FILES];
    for (size_t i = 0; i < FILES; i++) {
        shards[i] = tokenize(files[i], &sizes[i], &why);
        judge(why);
    }
    if (sizes[CRLF] && sizes[BLANK]) {
        bool same = sizes[CRLF] == sizes[BLANK] &&
                    !memcmp(shards[CRLF] + HEADER, shards[BLANK] + HEADER, sizes[CRLF] - HEADER);
        judge(same ? NULL : text_of("CR LF changes the tokens"));
    }
    if (sizes[BOM_TEXT] > HEADER + 40) judge(text_of("bom.txt: the mark became tokens"));
    for (size_t i = 0; i < FILES; i++) free(shards[i]);
}

// ---- Cases --------------------------------------------------------------------------------------

// What judges a member of expect.json, or a case whose name begins so; NULL for a member that
// another one uses or that is for the reader.
static const struct {
    const char *member, *prefix;
    void (*judge)(const retrofit_json *value);
} judges[] = {
    {"ids", NULL, judge_ids},
    {"chat", NULL, judge_chat},
    {"tokens", NULL, judge_logits},
    {"generates", NULL, judge_generates},
    {"answer_regex", NULL, judge_answers},
    {"tasks", NULL, judge_tasks},
    {"steps", NULL, judge_steps},
    {"stops_at", NULL, judge_stop},
    {"tensor", NULL, judge_not_finite},
    {"converts", NULL, judge_converts},
    {NULL, "id_holes", judge_id_holes},
    {NULL, "jsonl", judge_jsonl},
    {"what", NULL, NULL},
    {"source", NULL, NULL},
    {"note", NULL, NULL},
    {"rel", NULL, NULL},
    {"gguf", NULL, NULL},
    {"acc", NULL, NULL},
    {"prompt", NULL, NULL},
    {"prompt_ids", NULL, NULL},
    {"generated", NULL, NULL},
    {"index", NULL, NULL},
    {"refusal_says", NULL, NULL},
    {"refusal_is_fine", NULL, NULL},
};
enum { JUDGES = sizeof judges / sizeof *judges };

// Every member of expect.json is known: a word that is misspelt would judge nothing.
static void check_members(void) {
    for (const retrofit_json *m = expected ? expected->child : NULL; m; m = m->next) {
        size_t i = 0;
        while (i < JUDGES && (!judges[i].member || strcmp(judges[i].member, m->key))) i++;
        if (i == JUDGES) judge(text_of("expect.json: this test has no '%s'", m->key));
    }
}

static void judge_case(const char *name) {
    shell("rm -rf " FRESH " && mkdir " FRESH);
    case_name = name;
    case_path = text_of("f/reports/%s", name);
    char *path = text_of("%s/expect.json", case_path);
    retrofit_json *json = exists(path) ? parse_file(path) : NULL;
    if (exists(path) && !json) judge(text_of("%s", retrofit_error()));
    expected = json;
    check_members();

    size_t before = passed + failed;
    for (size_t i = 0; i < JUDGES; i++) {
        const char *prefix = judges[i].prefix, *member = judges[i].member;
        const retrofit_json *value = member ? retrofit_json_get(expected, member) : NULL;
        if (!value && !(prefix && !strncmp(name, prefix, strlen(prefix)))) continue;
        if (judges[i].judge) judges[i].judge(value);
    }
    if (passed + failed == before) judge(text_of("nothing was judged"));
    retrofit_json_free(json);
    free(path);
    free(case_path);
}

static int is_directory(const struct dirent *entry) {
    char *path = text_of("f/reports/%s", entry->d_name);
    struct stat status;
    bool is = entry->d_name[0] != '.' && stat(path, &status) == 0 && S_ISDIR(status.st_mode);
    free(path);
    return is;
}

// Also where a test cannot go on.
static void remove_directory(void) {
    char *command = text_of("rm -rf %s", directory);
    if (chdir("/") != 0 || system(command) != 0) puts("a temporary directory stays");
    free(command);
}

static bool is_named(const char *name, int count, char **names) {
    bool named = count == 0;
    for (int i = 0; i < count; i++) named = named || !strcmp(name, names[i]);
    return named;
}

int main(int argc, char **argv) {
    enter("reports");
    atexit(remove_directory);
    // What the sanitizers find is no refusal: it has an exit code of its own. A library may come
    // before theirs, and what a program that fails leaves in memory is no leak.
    setenv("ASAN_OPTIONS", "verify_asan_link_order=0:detect_leaks=0:exitcode=99", 1);
    setenv("UBSAN_OPTIONS", "exitcode=99", 1);
    case_name = "patterns";
    test_patterns();

    struct dirent **cases;
    int count = scandir("f/reports", &cases, is_directory, alphasort), judged = 0;
    need(count >= 0, "f/reports");
    for (int i = 0; i < count; i++) {
        if (is_named(cases[i]->d_name, argc - 1, argv + 1)) {
            judge_case(cases[i]->d_name);
            judged++;
        }
        free(cases[i]);
    }
    free(cases);
    int wanted = argc > 1 ? argc - 1 : CASES;
    check(judged >= wanted, "got %d cases, wanted %d", judged, wanted);
    return leave("reports of users");
}

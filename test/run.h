// What the tests of whole programs share: commands as a user types them, in a directory of their
// own, and what is to be said of each.
#ifndef RUN_H
#define RUN_H
#include "test.h"
#include <sys/wait.h>

// What the last command wrote. Everything happens in a directory of this run's own, where f is the
// fixtures; PATH begins with BIN, so that commands read as typed.
static char *out, *err;
static size_t out_size;

static char *slurp(const char *path, size_t *size) {
    char *text = retrofit_read_file(path, size);
    need(text != NULL, path);
    return text;
}

static void write_bytes(const char *path, const void *bytes, size_t size) {
    FILE *f = fopen(path, "wb");
    need(f && fwrite(bytes, 1, size, f) == size && fclose(f) == 0, path);
}

static void shell(const char *command) {
    need(system(command) == 0, command);
}

// The exit code of a command, whose text is left in `command`.
enum { COMMAND = 16384 };
static int run(char command[COMMAND], const char *format, va_list args) {
    char line[COMMAND + 64];
    vsnprintf(command, COMMAND, format, args);
    // The braces are for several commands too.
    snprintf(line, sizeof line, "{ %s\n} >stdout 2>stderr", command);
    free(out);
    free(err);
    int status = system(line);
    out = slurp("stdout", &out_size);
    err = slurp("stderr", &(size_t){0});
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

__attribute__((format(printf, 1, 2))) static void works(const char *format, ...) {
    char command[COMMAND];
    va_list args;
    va_start(args, format);
    int code = run(command, format, args);
    va_end(args);
    check(code == 0, "%s: exit code %d, not 0: %s", command, code, err);
}

// A failing command writes one line to stderr, but for notes, the program's name before and `what`
// in it, nothing to stdout, and leaves nothing behind: what it would make is always called bad.
__attribute__((format(printf, 3, 4))) static void fails(int expected, const char *what,
                                                        const char *format, ...) {
    char command[COMMAND], name[16] = {0};
    va_list args;
    va_start(args, format);
    setenv("ASAN_OPTIONS", "detect_leaks=0", 1); // what is left when a program exits is no leak
    int code = run(command, format, args);
    unsetenv("ASAN_OPTIONS");
    va_end(args);

    const char *line = err;
    while (!strncmp(line, "note: ", 6) && strchr(line, '\n')) line = strchr(line, '\n') + 1;
    const char *end = strchr(line, '\n');
    snprintf(name, sizeof name, "%.*s: ", (int)strcspn(command, " "), command);
    check(code == expected, "%.300s: exit code %d, not %d: %s", command, code, expected, err);
    bool one = end && !end[1] && !strncmp(line, name, strlen(name)) && strstr(line, what);
    check(one, "%.300s: not one line '%s… %s …' on stderr: '%s'", command, name, what, err);
    check(out_size == 0, "%.300s: writes to stdout: '%s'", command, out);
    check(system("! ls -d bad* >ls 2>&1") == 0, "%.300s: leaves something behind", command);
    shell("rm -rf bad*");
}

// The tensor that infer --logits wrote for n tokens: n rows of V, to be freed.
static float *logits_of(const char *model, const int32_t *tokens, size_t n, size_t V,
                        const char *options) {
    char list[8192] = {0};
    size_t at = 0;
    for (size_t i = 0; i < n; i++)
        at += (size_t)snprintf(list + at, sizeof list - at, i ? ",%d" : "%d", (int)tokens[i]);
    works("infer --model %s --tokens %s --logits logits.safetensors %s", model, list, options);
    check(out_size == 0, "infer --logits writes to stdout: %s", out);

    retrofit_map f;
    need(retrofit_safetensors_open(&f, "logits.safetensors"), "logits.safetensors");
    const retrofit_tensor *t = fixture(&f, "logits");
    bool shape = t->dims == 2 && t->shape[0] == n && t->shape[1] == V && t->type == RETROFIT_F32;
    need(shape, "the shape of logits");
    float *logits = retrofit_allocate(n * V, sizeof *logits);
    memcpy(logits, t->data, n * V * sizeof *logits);
    retrofit_safetensors_close(&f);
    unlink("logits.safetensors");
    return logits;
}

// Into a new directory of that name and more: what a test of programs begins with.
static char directory[64];
static void enter(const char *name) {
    char bin[4096], fixtures[4096], path[8192];
    const char *old = getenv("PATH") ? getenv("PATH") : "/usr/bin:/bin";
    snprintf(directory, sizeof directory, "/tmp/retrofit-%s-XXXXXX", name);
    need(realpath(getenv("BIN") ? getenv("BIN") : ".", bin) != NULL, "BIN");
    need(realpath("test/fixtures", fixtures) != NULL, "test/fixtures");
    snprintf(path, sizeof path, "%s:%s", bin, old);
    need(setenv("PATH", path, 1) == 0, "setenv");
    // On models as small as these two threads mostly wait for each other: for long, if they spin
    // and others compute too.
    need(setenv("OMP_NUM_THREADS", "1", 1) == 0, "setenv");
    need(setenv("OMP_WAIT_POLICY", "passive", 1) == 0, "setenv");
    need(mkdtemp(directory) && chdir(directory) == 0 && symlink(fixtures, "f") == 0, directory);
    shell("command -v train >ls && command -v infer >ls");
}

// What it ends with.
static int leave(const char *name) {
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", directory);
    free(out);
    free(err);
    shell(command);
    return finish(name);
}
#endif

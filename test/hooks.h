// Stands between a program's source, included behind this header, and the C library: test/fuzz.c
// and test/faults.c are programs with hooks. Every block of memory, stream, descriptor and mapping
// of the program is known, so that what it leaves can be found and given back; exit() can lead back
// to the test; and any call can be made to fail. Calls that the C library or the compiler's runtime
// make on their own are not seen.
#ifndef HOOKS_H
#define HOOKS_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <glob.h>
#include <math.h>
#include <regex.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum { HOOK_MEMORY = 1, HOOK_SYSTEM = 2 }; // kinds of calls
enum { HOOK_STREAMS = 64, HOOK_MAPS = 64 };

// A block of memory, before its bytes.
typedef struct hook_block hook_block;
struct hook_block {
    hook_block *next, *before;
    size_t size;
    size_t round; // in which it was allocated
};

static struct {
    // Calls that fail: those of these kinds are counted.
    int kinds;
    size_t *calls, fail_at; // counted from 1; 0: none
    bool keeps_failing;    // all calls behind it too
    bool cookies;          // streams read and write by calls that are counted
    // What exit() does.
    jmp_buf *exit_to; // NULL: it ends the process
    int exit_code;
    // What is in use.
    size_t round;        // what was allocated in an earlier one stays
    size_t max_size;     // a larger block is refused, as if memory were out; 0: none is
    hook_block blocks;   // a ring
    struct {
        FILE *file;
        int fd;
        size_t round;
    } streams[HOOK_STREAMS];
    struct {
        void *base;
        size_t size, round;
    } maps[HOOK_MAPS];
    size_t descriptors; // open ones
    double seconds;     // the clock; it goes on by 10 ms whenever it is read
} hooks = {.blocks = {&hooks.blocks, &hooks.blocks, 0, 0}};

// Counts a call; whether it fails, which sets errno.
static bool hook_fails(int kind, int error) {
    if (!(hooks.kinds & kind)) return false;
    ++*hooks.calls;
    bool later = hooks.keeps_failing && hooks.fail_at && *hooks.calls > hooks.fail_at;
    if (*hooks.calls != hooks.fail_at && !later) return false;
    errno = error;
    return true;
}

__attribute__((noreturn)) static void hook_exit(int code) {
    if (!hooks.exit_to) exit(code);
    hooks.exit_code = code;
    longjmp(*hooks.exit_to, 1);
}

// ---- Memory ------------------------------------------------------------------------------------

static void *hook_enter_block(hook_block *block, size_t size) {
    if (!block) return NULL;
    *block = (hook_block){&hooks.blocks, hooks.blocks.before, size, hooks.round};
    block->before->next = block;
    block->next->before = block;
    return block + 1;
}

static bool hook_refuses(size_t size) {
    bool too_large = size > SIZE_MAX / 2 || (hooks.max_size && size > hooks.max_size);
    if (too_large) errno = ENOMEM;
    return too_large || hook_fails(HOOK_MEMORY, ENOMEM);
}

static void *hook_malloc(size_t size) {
    if (hook_refuses(size)) return NULL;
    return hook_enter_block(malloc(sizeof(hook_block) + size), size);
}

static void *hook_calloc(size_t count, size_t size) {
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) bytes = SIZE_MAX;
    if (hook_refuses(bytes)) return NULL;
    return hook_enter_block(calloc(1, sizeof(hook_block) + bytes), bytes);
}

static void hook_free(void *memory) {
    if (!memory) return;
    hook_block *block = (hook_block *)memory - 1;
    block->before->next = block->next;
    block->next->before = block->before;
    free(block);
}

// A larger block always lies elsewhere, so that what still points to the old one is found.
static void *hook_realloc(void *memory, size_t size) {
    void *larger = hook_malloc(size);
    if (!memory || !larger) return larger;
    size_t old = ((hook_block *)memory - 1)->size;
    memcpy(larger, memory, old < size ? old : size);
    hook_free(memory);
    return larger;
}

static char *hook_strdup(const char *text) {
    char *copy = hook_malloc(strlen(text) + 1);
    return copy ? strcpy(copy, text) : NULL;
}

// ---- Streams -----------------------------------------------------------------------------------

static ssize_t hook_stream_read(void *cookie, char *bytes, size_t size) {
    if (hook_fails(HOOK_SYSTEM, EIO)) return -1;
    return read(hooks.streams[(size_t)cookie].fd, bytes, size);
}

// 0 says that it failed.
static ssize_t hook_stream_write(void *cookie, const char *bytes, size_t size) {
    if (hook_fails(HOOK_SYSTEM, ENOSPC)) return 0;
    ssize_t written = write(hooks.streams[(size_t)cookie].fd, bytes, size);
    return written > 0 ? written : 0;
}

static int hook_stream_seek(void *cookie, off64_t *offset, int whence) {
    if (hook_fails(HOOK_SYSTEM, EIO)) return -1;
    off64_t position = lseek64(hooks.streams[(size_t)cookie].fd, *offset, whence);
    if (position < 0) return -1;
    *offset = position;
    return 0;
}

static int hook_stream_close(void *cookie) {
    bool fails = hook_fails(HOOK_SYSTEM, EIO);
    close(hooks.streams[(size_t)cookie].fd);
    if (fails) errno = EIO;
    return fails ? -1 : 0;
}

static size_t hook_stream_of(const FILE *file) {
    size_t i = 0;
    while (i < HOOK_STREAMS && hooks.streams[i].file != file) i++;
    return i;
}

// A stream over a descriptor, whose calls are counted.
static FILE *hook_stream(int fd, const char *mode) {
    size_t i = hook_stream_of(NULL);
    if (i == HOOK_STREAMS) abort();
    hooks.streams[i].fd = fd;
    hooks.streams[i].round = hooks.round;
    cookie_io_functions_t functions = {hook_stream_read, hook_stream_write, hook_stream_seek,
                                       hook_stream_close};
    FILE *file = hooks.cookies ? fopencookie((void *)i, mode, functions) : fdopen(fd, mode);
    hooks.streams[i].file = file;
    return file;
}

static FILE *hook_fopen(const char *path, const char *mode) {
    static char memory[] = "MemAvailable: 8388608 kB\n"; // else results depend on the machine
    if (strcmp(path, "/proc/meminfo") && hook_fails(HOOK_SYSTEM, EMFILE)) return NULL;
    if (!strcmp(path, "/proc/meminfo")) return fmemopen(memory, sizeof memory - 1, "r");
    int flags = *mode == 'r' ? O_RDONLY : O_WRONLY | O_CREAT | (*mode == 'a' ? O_APPEND : O_TRUNC);
    int fd = open(path, flags | O_CLOEXEC, 0666);
    return fd < 0 ? NULL : hook_stream(fd, mode);
}

static int hook_fclose(FILE *file) {
    size_t i = hook_stream_of(file);
    int code = fclose(file);
    if (i < HOOK_STREAMS) hooks.streams[i].file = NULL;
    return code;
}

static int hook_fileno(FILE *file) {
    size_t i = hook_stream_of(file);
    return i < HOOK_STREAMS ? hooks.streams[i].fd : fileno(file);
}

static ssize_t hook_getline(char **line, size_t *capacity, FILE *file) {
    size_t size = 0;
    for (;;) {
        if (!*line || size + 1 >= *capacity) {
            size_t larger = 2 * *capacity + 120;
            char *memory = hook_realloc(*line, larger);
            if (!memory) return -1;
            *line = memory;
            *capacity = larger;
        }
        int c = getc(file);
        if (c == EOF) break;
        (*line)[size++] = (char)c;
        if (c == '\n') break;
    }
    (*line)[size] = 0;
    return size && !ferror(file) ? (ssize_t)size : -1;
}

// ---- Files -------------------------------------------------------------------------------------

static int hook_open(const char *path, int flags, ...) {
    if (hook_fails(HOOK_SYSTEM, EMFILE)) return -1;
    int fd = open(path, flags, 0666);
    if (fd >= 0) hooks.descriptors++;
    return fd;
}

static int hook_close(int fd) {
    hooks.descriptors--;
    return close(fd);
}

static void *hook_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset) {
    if (hook_fails(HOOK_SYSTEM, ENOMEM)) return MAP_FAILED;
    void *base = mmap(at, size, protection, flags, fd, offset);
    for (size_t i = 0; base != MAP_FAILED && i < HOOK_MAPS; i++) {
        if (hooks.maps[i].base) continue;
        hooks.maps[i].base = base;
        hooks.maps[i].size = size;
        hooks.maps[i].round = hooks.round;
        break;
    }
    return base;
}

static int hook_munmap(void *base, size_t size) {
    for (size_t i = 0; i < HOOK_MAPS; i++) {
        if (hooks.maps[i].base == base) hooks.maps[i].base = NULL;
    }
    return munmap(base, size);
}

static int hook_scandir(const char *path, struct dirent ***entries,
                        int (*filter)(const struct dirent *),
                        int (*compare)(const struct dirent **, const struct dirent **)) {
    struct dirent **found;
    if (hook_fails(HOOK_SYSTEM, EMFILE)) return -1;
    if (hook_fails(HOOK_MEMORY, ENOMEM)) return -1;
    int count = scandir(path, &found, filter, compare);
    if (count < 0) return count;
    int kinds = hooks.kinds;
    hooks.kinds = 0;
    *entries = hook_malloc(((size_t)count + 1) * sizeof **entries);
    for (int i = 0; i < count; i++) {
        (*entries)[i] = hook_malloc(sizeof ***entries);
        memcpy((*entries)[i], found[i], found[i]->d_reclen);
        free(found[i]);
    }
    hooks.kinds = kinds;
    free(found);
    return count;
}

static int hook_glob(const char *pattern, int flags, int (*on_error)(const char *, int),
                     glob_t *found) {
    if (hook_fails(HOOK_MEMORY, ENOMEM)) return GLOB_NOSPACE;
    return glob(pattern, flags, on_error, found);
}

static int hook_fcntl(int fd, int command, ...) {
    va_list args;
    va_start(args, command);
    void *argument = va_arg(args, void *);
    va_end(args);
    return hook_fails(HOOK_SYSTEM, ENOLCK) ? -1 : fcntl(fd, command, argument);
}

static int hook_statvfs(const char *path, struct statvfs *disk) {
    if (hook_fails(HOOK_SYSTEM, EIO)) return -1;
    int code = statvfs(path, disk);
    disk->f_frsize = 1 << 20;
    disk->f_bavail = 1 << 20;
    return code;
}

static int hook_clock_gettime(clockid_t clock, struct timespec *time) {
    (void)clock;
    hooks.seconds += 1e-2;
    time->tv_sec = (time_t)hooks.seconds;
    time->tv_nsec = (long)(1e9 * (hooks.seconds - floor(hooks.seconds)));
    return 0;
}

// Of a name that is not there nothing else is said: to open it would say so too.
static int hook_access(const char *path, int mode) {
    int code = access(path, mode);
    return code == 0 && hook_fails(HOOK_SYSTEM, EIO) ? -1 : code;
}

static int hook_lstat(const char *path, struct stat *status) {
    int code = lstat(path, status);
    return code == 0 && hook_fails(HOOK_SYSTEM, EIO) ? -1 : code;
}

static int hook_stat(const char *path, struct stat *status) {
    int code = stat(path, status);
    return code == 0 && hook_fails(HOOK_SYSTEM, EIO) ? -1 : code;
}

// A call that only may fail.
#define HOOK(type, name, error, parameters, ...) \
    static type hook_##name parameters { \
        return hook_fails(HOOK_SYSTEM, error) ? -1 : name(__VA_ARGS__); \
    }
HOOK(int, fstat, EIO, (int fd, struct stat *status), fd, status)
HOOK(int, fsync, EIO, (int fd), fd)
HOOK(int, rename, EIO, (const char *from, const char *to), from, to)
HOOK(int, mkdir, ENOSPC, (const char *path, mode_t mode), path, mode)
HOOK(int, symlink, ENOSPC, (const char *to, const char *path), to, path)
HOOK(int, truncate, EIO, (const char *path, off_t size), path, size)
HOOK(ssize_t, readlink, EIO, (const char *path, char *text, size_t size), path, text, size)
#undef HOOK

// ---- Rounds ------------------------------------------------------------------------------------

// How many things that were made in this round are still in use.
static size_t hooks_in_use(void) {
    size_t count = 0;
    for (hook_block *b = hooks.blocks.next; b != &hooks.blocks; b = b->next)
        count += b->round == hooks.round;
    for (size_t i = 0; i < HOOK_STREAMS; i++)
        count += hooks.streams[i].file && hooks.streams[i].round == hooks.round;
    for (size_t i = 0; i < HOOK_MAPS; i++)
        count += hooks.maps[i].base && hooks.maps[i].round == hooks.round;
    return count;
}

// Gives them back.
static void hooks_release(void) {
    for (hook_block *next, *b = hooks.blocks.next; b != &hooks.blocks; b = next) {
        next = b->next;
        if (b->round == hooks.round) hook_free(b + 1);
    }
    for (size_t i = 0; i < HOOK_STREAMS; i++) {
        if (hooks.streams[i].file && hooks.streams[i].round == hooks.round)
            hook_fclose(hooks.streams[i].file);
    }
    for (size_t i = 0; i < HOOK_MAPS; i++) {
        if (hooks.maps[i].base && hooks.maps[i].round == hooks.round)
            hook_munmap(hooks.maps[i].base, hooks.maps[i].size);
    }
}

// What the program's source calls instead. Some are names of structs too, and of members.
#define malloc hook_malloc
#define calloc hook_calloc
#define realloc hook_realloc
#define free hook_free
#undef strdup
#define strdup hook_strdup
#define exit(code) hook_exit(code)
#define fopen(...) hook_fopen(__VA_ARGS__)
#define fclose(...) hook_fclose(__VA_ARGS__)
#define fileno(...) hook_fileno(__VA_ARGS__)
#define getline(...) hook_getline(__VA_ARGS__)
#define open(...) hook_open(__VA_ARGS__)
#define close(...) hook_close(__VA_ARGS__)
#define mmap(...) hook_mmap(__VA_ARGS__)
#define munmap(...) hook_munmap(__VA_ARGS__)
#define scandir(...) hook_scandir(__VA_ARGS__)
#define glob(...) hook_glob(__VA_ARGS__)
#define fcntl(...) hook_fcntl(__VA_ARGS__)
#define statvfs(...) hook_statvfs(__VA_ARGS__)
#define clock_gettime(...) hook_clock_gettime(__VA_ARGS__)
#define stat(...) hook_stat(__VA_ARGS__)
#define lstat(...) hook_lstat(__VA_ARGS__)
#define fstat(...) hook_fstat(__VA_ARGS__)
#define access(...) hook_access(__VA_ARGS__)
#define fsync(...) hook_fsync(__VA_ARGS__)
#define rename(...) hook_rename(__VA_ARGS__)
#define mkdir(...) hook_mkdir(__VA_ARGS__)
#define symlink(...) hook_symlink(__VA_ARGS__)
#define truncate(...) hook_truncate(__VA_ARGS__)
#define readlink(...) hook_readlink(__VA_ARGS__)
#define main program_main

// The program itself.
#if defined HOOKS_CONVERT
#include "../convert.c"
#define PROGRAM "convert"
#elif defined HOOKS_INFER
#include "../infer.c"
#define PROGRAM "infer"
#elif defined HOOKS_TRAIN
#include "../train.c"
#define PROGRAM "train"
#endif

#undef main
#undef exit
#endif

// Loaded before train by LD_PRELOAD: counts the calls by which a program changes files, and makes
// one of them go wrong. These are counted: a write of a stream, fsync, rename, symlink, mkdir,
// unlink, rmdir, truncate. The environment says what happens:
//     SHIM_AT=N         at call number N, counted from 1,
//     SHIM_DO=kill      the process is killed in the middle of the call,
//             signal    it gets a SIGTERM,
//             short     a write writes half, and from then on the disk is full,
//             ENOSPC    the call fails with this errno; EIO and EPERM likewise.
//     SHIM_COUNT=FILE   gets the number of calls when the program ends.
//     SHIM_FREE=BYTES   is what statvfs says is free.
// The C library's streams write by calls of its own that nothing can step before. So fopen gives
// out cookies here, whose functions write to a descriptor.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum { MAX_STREAMS = 64 };

// The streams that are open for writing.
static struct {
    FILE *file;
    int fd;
} streams[MAX_STREAMS];

static unsigned long calls;
static int disk_full; // after a short write

// A number from the environment, 0 without one.
static unsigned long number(const char *name) {
    const char *text = getenv(name);
    return text ? strtoul(text, NULL, 10) : 0;
}

static int action_is(const char *name) {
    const char *action = getenv("SHIM_DO");
    return action && !strcmp(action, name);
}

// Nothing depends on calls that tidy up: they never fail here, and count only where the process is
// killed or gets a signal.
static int counts_all_calls(void) {
    return action_is("kill") || action_is("signal");
}

// Counts a call. Returns 0, or the errno that it fails with.
static int fault(void) {
    calls++;
    if (calls != number("SHIM_AT")) return 0;
    if (action_is("kill")) raise(SIGKILL);
    if (action_is("signal")) raise(SIGTERM);
    if (action_is("ENOSPC")) return ENOSPC;
    if (action_is("EIO")) return EIO;
    if (action_is("EPERM")) return EPERM;
    return 0;
}

__attribute__((destructor)) static void write_count(void) {
    const char *path = getenv("SHIM_COUNT");
    if (!path) return;
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd < 0) return;
    dprintf(fd, "%lu\n", calls);
    close(fd);
}

// Writes all bytes. Returns whether it could.
static int write_all(int fd, const char *bytes, size_t size) {
    while (size > 0) {
        ssize_t n = write(fd, bytes, size);
        if (n <= 0) return 0;
        bytes += n;
        size -= (size_t)n;
    }
    return 1;
}

// The cookie's write. It returns 0 where it fails.
static ssize_t stream_write(void *cookie, const char *bytes, size_t size) {
    int fd = streams[(size_t)cookie].fd;
    int strikes = calls + 1 == number("SHIM_AT");
    if (strikes && (action_is("kill") || action_is("short"))) {
        if (write(fd, bytes, size / 2) < 0) return 0; // half a write is what is left
        if (action_is("short")) disk_full = 1;
    }
    int error = fault();
    if (!error && disk_full) error = ENOSPC;
    if (error) {
        errno = error;
        return 0;
    }
    return write_all(fd, bytes, size) ? (ssize_t)size : 0;
}

static int stream_seek(void *cookie, off64_t *offset, int whence) {
    off64_t position = lseek64(streams[(size_t)cookie].fd, *offset, whence);
    if (position < 0) return -1;
    *offset = position;
    return 0;
}

static int stream_close(void *cookie) {
    streams[(size_t)cookie].file = NULL;
    return close(streams[(size_t)cookie].fd);
}

// The function of this name that this file stands before.
#define NEXT(name, ...) (((__typeof__(name) *)dlsym(RTLD_NEXT, #name))(__VA_ARGS__))

FILE *fopen(const char *path, const char *mode) {
    if (*mode == 'r') return NEXT(fopen, path, mode);
    size_t i = 0;
    while (streams[i].file) i++; // train has two at a time
    int flags = O_WRONLY | O_CREAT | O_CLOEXEC | (*mode == 'a' ? O_APPEND : O_TRUNC);
    streams[i].fd = open(path, flags, 0666);
    if (streams[i].fd < 0) return NULL;
    cookie_io_functions_t functions = {NULL, stream_write, stream_seek, stream_close};
    streams[i].file = fopencookie((void *)i, mode, functions);
    return streams[i].file;
}

int fileno(FILE *f) {
    for (size_t i = 0; i < MAX_STREAMS; i++) {
        if (streams[i].file == f) return streams[i].fd;
    }
    return NEXT(fileno, f);
}

// A call that fails where it is counted and struck; "short" is about writes alone.
#define FAULTY(name, is_counted, parameters, ...) \
    int name parameters { \
        int error = 0; \
        if ((is_counted) && !action_is("short")) error = fault(); \
        if (!error) return NEXT(name, __VA_ARGS__); \
        errno = error; \
        return -1; \
    }
FAULTY(fsync, 1, (int fd), fd)
FAULTY(rename, 1, (const char *from, const char *to), from, to)
FAULTY(symlink, 1, (const char *to, const char *path), to, path)
FAULTY(mkdir, 1, (const char *path, mode_t mode), path, mode)
FAULTY(truncate, 1, (const char *path, off_t size), path, size)
FAULTY(unlink, counts_all_calls(), (const char *path), path)
FAULTY(rmdir, counts_all_calls(), (const char *path), path)

int statvfs(const char *path, struct statvfs *disk) {
    int code = NEXT(statvfs, path, disk);
    if (getenv("SHIM_FREE")) {
        disk->f_frsize = 1;
        disk->f_bavail = number("SHIM_FREE");
    }
    return code;
}

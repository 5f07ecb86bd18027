// Loaded before train by LD_PRELOAD: counts what a program does to files (a write of its streams, fsync, rename, symlink, mkdir, unlink, rmdir,
// truncate) and at the call SHIM_AT does what SHIM_DO says: "kill" (the process dies in the middle of it), "short" (half is written, then the
// disk is full), "signal" (it gets a SIGTERM), or an errno's name: the call fails. SHIM_COUNT=FILE gets the number of calls. SHIM_FREE: bytes that
// statvfs says are free. The C library's streams write by a call of its own that none can step before: here they are cookies over a descriptor.
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

enum { STREAMS = 64 };
static struct { FILE *file; int fd; } streams[STREAMS]; // those that are open for writing
static unsigned long calls;
static int full; // the disk, after a short write

static const char *what(void) { return getenv("SHIM_DO") ? getenv("SHIM_DO") : ""; }

// Nothing depends on calls that tidy up: they count where a process may be killed or get a signal, but do not fail.
static int everything(void) { return !strcmp(what(), "kill") || !strcmp(what(), "signal"); }

static int fault(void) { // counts a call; 0, or the errno it fails with
    if (++calls != (getenv("SHIM_AT") ? strtoul(getenv("SHIM_AT"), NULL, 10) : 0)) return 0;
    if (!strcmp(what(), "kill")) raise(SIGKILL);
    if (!strcmp(what(), "signal")) raise(SIGTERM);
    return !strcmp(what(), "ENOSPC") ? ENOSPC : !strcmp(what(), "EIO") ? EIO : 0;
}

__attribute__((destructor)) static void tell(void) {
    int fd = getenv("SHIM_COUNT") ? open(getenv("SHIM_COUNT"), O_WRONLY | O_CREAT | O_TRUNC, 0666) : -1;
    if (fd >= 0) dprintf(fd, "%lu\n", calls), close(fd);
}

static ssize_t put(void *cookie, const char *bytes, size_t size) {
    int fd = streams[(size_t)cookie].fd, here = calls + 1 == (getenv("SHIM_AT") ? strtoul(getenv("SHIM_AT"), NULL, 10) : 0);
    if (here && !strcmp(what(), "kill") && write(fd, bytes, size / 2) < 0) return 0; // half a write, as a kill may leave it
    if (here && !strcmp(what(), "short")) full = 1, size = write(fd, bytes, size / 2) < 0 ? 0 : size;
    int why = fault();
    if (!why && full) why = ENOSPC;
    if (why) return errno = why, 0; // 0: how a cookie says that writing failed
    for (size_t done = 0; done < size;) {
        ssize_t n = write(fd, bytes + done, size - done);
        if (n <= 0) return 0;
        done += (size_t)n;
    }
    return (ssize_t)size;
}

static int seek(void *cookie, off64_t *offset, int whence) {
    off64_t to = lseek64(streams[(size_t)cookie].fd, *offset, whence);
    return to < 0 ? -1 : (*offset = to, 0);
}

static int shut(void *cookie) { return streams[(size_t)cookie].file = NULL, close(streams[(size_t)cookie].fd); }

#define NEXT(name, ...) (((__typeof__(name) *)dlsym(RTLD_NEXT, #name))(__VA_ARGS__))

FILE *fopen(const char *path, const char *mode) {
    if (*mode == 'r') return NEXT(fopen, path, mode);
    size_t i = 0;
    while (streams[i].file) i++; // train has two at a time
    streams[i].fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC | (*mode == 'a' ? O_APPEND : O_TRUNC), 0666);
    if (streams[i].fd < 0) return NULL;
    return streams[i].file = fopencookie((void *)i, mode, (cookie_io_functions_t){NULL, put, seek, shut});
}

int fileno(FILE *f) {
    for (size_t i = 0; i < STREAMS; i++)
        if (streams[i].file == f) return streams[i].fd;
    return NEXT(fileno, f);
}

#define FAULTY(name, counts, parameters, ...) \
    int name parameters { \
        int why = (counts) && strcmp(what(), "short") ? fault() : 0; \
        return why ? errno = why, -1 : NEXT(name, __VA_ARGS__); \
    }
FAULTY(fsync, 1, (int fd), fd)
FAULTY(rename, 1, (const char *from, const char *to), from, to)
FAULTY(symlink, 1, (const char *to, const char *path), to, path)
FAULTY(mkdir, 1, (const char *path, mode_t mode), path, mode)
FAULTY(unlink, everything(), (const char *path), path)
FAULTY(rmdir, everything(), (const char *path), path)
FAULTY(truncate, 1, (const char *path, off_t size), path, size)

int statvfs(const char *path, struct statvfs *s) {
    int code = NEXT(statvfs, path, s);
    if (getenv("SHIM_FREE")) s->f_frsize = 1, s->f_bavail = strtoul(getenv("SHIM_FREE"), NULL, 10);
    return code;
}

// A stand-in for libnccl.so.2 where there is no GPU (test/ranks.sh): the few functions that
// retrofit_cuda.cu calls, for processes on one machine whose GPUs are emulated. They add up in a
// file that all of them map, from the last rank to the first, as retrofit_mpi.c does: so what
// several of them compute can be compared to the bit.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { SLOT = 1 << 16, RANKS = 16 }; // numbers of a rank at a time
enum { SUCCESS = 0, SYSTEM_ERROR = 2 };

typedef struct {
    char path[128];
} unique_id;

typedef struct {
    atomic_uint arrived, round;
    float slots[RANKS][SLOT];
} shared;

typedef struct {
    shared *with;
    int rank, count;
} communicator;

// What is done when its turn in the stream comes.
typedef struct {
    communicator *in;
    const float *from;
    float *to;
    size_t n;
    int root; // -1: all are added
} exchange;

int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data); // the emulator's

// A rank that does not come within STAND_IN_PATIENCE seconds has failed, as one whose connection
// NCCL finds broken.
static int failure;

static void barrier(communicator *c) {
    const struct timespec pause = {.tv_nsec = 10000};
    const char *patience = getenv("STAND_IN_PATIENCE");
    time_t end = time(NULL) + (patience ? atoi(patience) : 100);
    unsigned round = atomic_load(&c->with->round);
    if (atomic_fetch_add(&c->with->arrived, 1) + 1 == (unsigned)c->count) {
        atomic_store(&c->with->arrived, 0);
        atomic_fetch_add(&c->with->round, 1);
    }
    while (atomic_load(&c->with->round) == round && !failure) {
        nanosleep(&pause, NULL);
        if (time(NULL) > end) failure = SYSTEM_ERROR;
    }
}

static void do_exchange(void *data) {
    exchange *e = data;
    communicator *c = e->in;
    for (size_t at = 0; at < e->n; at += SLOT) {
        size_t n = e->n - at < SLOT ? e->n - at : SLOT;
        memcpy(c->with->slots[c->rank], e->from + at, n * sizeof(float));
        barrier(c);
        int first = e->root < 0 ? c->count - 1 : e->root;
        memcpy(e->to + at, c->with->slots[first], n * sizeof(float));
        for (int r = first; e->root < 0 && r-- > 0;)
            for (size_t i = 0; i < n; i++) e->to[at + i] += c->with->slots[r][i];
        barrier(c);
    }
    free(e);
}

static int begin(exchange wanted, int type, void *stream) {
    exchange *e = malloc(sizeof *e);
    if (!e || type != 7) return SYSTEM_ERROR;
    *e = wanted;
    return cudaLaunchHostFunc(stream, do_exchange, e) ? SYSTEM_ERROR : SUCCESS;
}

int ncclGetUniqueId(unique_id *id) {
    snprintf(id->path, sizeof id->path, "/tmp/nccl_stand_in.XXXXXX");
    int fd = mkstemp(id->path);
    if (fd < 0 || ftruncate(fd, sizeof(shared)) != 0) return SYSTEM_ERROR;
    close(fd);
    return SUCCESS;
}

int ncclCommInitRank(communicator **comm, int count, unique_id id, int rank) {
    communicator *c = malloc(sizeof *c);
    int fd = open(id.path, O_RDWR);
    if (!c || fd < 0 || count > RANKS) return SYSTEM_ERROR;
    c->rank = rank;
    c->count = count;
    c->with = mmap(NULL, sizeof(shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (c->with == MAP_FAILED) return SYSTEM_ERROR;
    barrier(c);
    if (rank == 0) unlink(id.path);
    *comm = c;
    return SUCCESS;
}

int ncclCommGetAsyncError(communicator *comm, int *error) {
    (void)comm;
    *error = failure;
    return SUCCESS;
}

const char *ncclGetErrorString(int error) { return error ? "the stand-in failed" : "no error"; }

int ncclAllReduce(const void *from, void *to, size_t n, int type, int operation, communicator *comm,
                  void *stream) {
    if (operation != 0) return SYSTEM_ERROR;
    return begin((exchange){comm, from, to, n, -1}, type, stream);
}

int ncclBroadcast(const void *from, void *to, size_t n, int type, int root, communicator *comm,
                  void *stream) {
    return begin((exchange){comm, from, to, n, root}, type, stream);
}

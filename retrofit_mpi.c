// retrofit_mpi.c - the processes of a training on CPUs exchange gradients and weights by MPI; those
// on GPUs, which do it by NCCL (retrofit_cuda.cu), find each other by it. Built by make MPI=1. What
// is exchanged, and when, stands in retrofit.h, section 8.
#include "retrofit.h"
#include <mpi.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PIECE = 1 << 20 };     // numbers that are exchanged at a time
static MPI_Request *requests; // [2·count] what is received from each rank, then what is sent to it
static float *parts;          // [PIECE + count] what the ranks have of this rank's share of a piece

// A rank with which something is still to be exchanged, or `count`.
static size_t missing_rank(size_t count) {
    size_t missing = count;
    for (size_t i = 2 * count; i-- > 0;) {
        int done;
        MPI_Test(&requests[i], &done, MPI_STATUS_IGNORE);
        if (!done) missing = i % count;
    }
    return missing;
}

// Waits for all requests. Ranks give up one after the other, so that one alone says who is missing:
// it ends the others by that. false or error.
static bool wait_for_ranks(const retrofit_ranks *ranks) {
    const struct timespec pause = {.tv_nsec = 20000};
    double begin = retrofit_seconds(), end = begin + ranks->patience + 0.5 * (double)ranks->rank;
    for (;;) {
        size_t missing = missing_rank(ranks->count);
        double now = retrofit_seconds();
        if (missing == ranks->count) return true;
        if (now > end)
            return retrofit_fail("no answer from rank %zu for %.3g s (--patience): the newest "
                                 "checkpoint is whole, --resume goes on", missing, now - begin);
        if (now > begin + 0.001) nanosleep(&pause, NULL); // it may need this processor
    }
}

// A piece is cut into a share for each rank.
typedef struct {
    float *x;
    size_t length, size; // of the piece; of a share, of which the last ones may lack some
} piece_shares;

static float *share_of(piece_shares piece, size_t rank, int *count) {
    size_t first = retrofit_min(rank * piece.size, piece.length);
    *count = (int)(retrofit_min(first + piece.size, piece.length) - first);
    return piece.x + first;
}

static void receive(float *x, int count, size_t from) {
    MPI_Irecv(x, count, MPI_FLOAT, (int)from, 0, MPI_COMM_WORLD, &requests[from]);
}

static void send(const retrofit_ranks *ranks, const float *x, int count, size_t to) {
    MPI_Isend(x, count, MPI_FLOAT, (int)to, 0, MPI_COMM_WORLD, &requests[ranks->count + to]);
}

// Each rank adds up its share, from the last rank's to the first's, and sends the sum to all: as
// many bytes as any way to do it takes, and an order of sums that no library chooses.
static bool add_piece(retrofit_ranks *ranks, piece_shares piece) {
    size_t W = ranks->count;
    int count, own_count;
    float *own = share_of(piece, ranks->rank, &own_count);
    for (size_t r = 0; r < W; r++) {
        if (r == ranks->rank) continue;
        receive(parts + r * piece.size, own_count, r);
        float *other = share_of(piece, r, &count);
        send(ranks, other, count, r);
    }
    if (!wait_for_ranks(ranks)) return false;

    size_t bytes = (size_t)own_count * sizeof *own;
    memcpy(parts + ranks->rank * piece.size, own, bytes);
    memcpy(own, parts + (W - 1) * piece.size, bytes);
    for (size_t r = W - 1; r-- > 0;)
        retrofit_cpu.add(own, parts + r * piece.size, (size_t)own_count, 1);

    for (size_t r = 0; r < W; r++) {
        if (r == ranks->rank) continue;
        float *other = share_of(piece, r, &count);
        receive(other, count, r);
        send(ranks, own, own_count, r);
    }
    return wait_for_ranks(ranks);
}

static bool mpi_all_reduce(retrofit_ranks *ranks, float *x, size_t n) {
    for (size_t at = 0; at < n; at += PIECE) {
        size_t length = retrofit_min(n - at, PIECE);
        piece_shares piece = {x + at, length, (length + ranks->count - 1) / ranks->count};
        if (!add_piece(ranks, piece)) return false;
    }
    return true;
}

static bool mpi_broadcast(retrofit_ranks *ranks, float *x, size_t n, size_t root) {
    for (size_t at = 0; at < n; at += PIECE) {
        int count = (int)retrofit_min(n - at, PIECE);
        MPI_Ibcast(x + at, count, MPI_FLOAT, (int)root, MPI_COMM_WORLD, &requests[root]);
        if (!wait_for_ranks(ranks)) return false;
    }
    return true;
}

static void mpi_share(void *bytes, size_t size) {
    MPI_Bcast(bytes, (int)size, MPI_BYTE, 0, MPI_COMM_WORLD);
}

static void mpi_end(int code) {
    if (code) MPI_Abort(MPI_COMM_WORLD, code);
    MPI_Finalize();
}

bool retrofit_mpi_start(retrofit_ranks *ranks) {
    int rank = 0, count = 0;
    MPI_Init(NULL, NULL);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &count);
    ranks->end = mpi_end;
    if ((size_t)rank != ranks->rank || (size_t)count != ranks->count)
        return retrofit_fail("rank %zu of %zu by the environment, %d of %d by MPI: start it with "
                             "the mpirun of the MPI that it was built with", ranks->rank,
                             ranks->count, rank, count);
    requests = malloc(2 * ranks->count * sizeof(MPI_Request));
    parts = malloc((PIECE + ranks->count) * sizeof *parts);
    if (!requests || !parts) return retrofit_fail("out of memory");
    for (size_t i = 0; i < 2 * ranks->count; i++) requests[i] = MPI_REQUEST_NULL;
    ranks->all_reduce = mpi_all_reduce;
    ranks->broadcast = mpi_broadcast;
    ranks->share = mpi_share;
    return true;
}

// retrofit_mpi.c - the processes of a training on CPUs exchange gradients and weights by MPI; those
// on GPUs, which do it by NCCL (retrofit_cuda.cu), find each other by it. Built by make MPI=1. What
// is exchanged, and when, stands in retrofit.h, section 8.
#define _GNU_SOURCE // nanosleep
#include "retrofit.h"
#include <mpi.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PIECE = 1 << 20 };     // numbers that are exchanged at a time
static MPI_Request *requests; // [2·count] what is received from each rank, then what is sent to it
static float *parts;          // [PIECE + count] what the ranks have of this rank's share of a piece

// What waits answers whoever asks whether it is there.
enum { DATA, ASK, ANSWER }; // tags

static bool has_come(int tag, size_t from) {
    int there;
    MPI_Iprobe((int)from, tag, MPI_COMM_WORLD, &there, MPI_STATUS_IGNORE);
    if (there) MPI_Recv(NULL, 0, MPI_BYTE, (int)from, tag, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    return there;
}

static void send_note(int tag, size_t to) {
    MPI_Request request; // no bytes: nobody waits for it
    MPI_Isend(NULL, 0, MPI_BYTE, (int)to, tag, MPI_COMM_WORLD, &request);
    MPI_Request_free(&request);
}

static void mpi_answer(const retrofit_ranks *ranks) {
    for (size_t r = 0; r < ranks->count; r++)
        if (has_come(ASK, r)) send_note(ANSWER, r);
}

static bool all_done(const retrofit_ranks *ranks) {
    bool all = true;
    for (size_t i = 0; i < 2 * ranks->count; i++) {
        int done;
        MPI_Test(&requests[i], &done, MPI_STATUS_IGNORE);
        all = all && done;
    }
    return all;
}

// The first rank that is asked and does not answer for a second, or `count`. A rank whose part is
// missing may itself wait for another one: it answers.
static size_t mpi_silent_rank(const retrofit_ranks *ranks) {
    bool answered[ranks->count];
    double begin = retrofit_seconds();
    for (size_t r = 0; r < ranks->count; r++) {
        answered[r] = r == ranks->rank;
        if (!answered[r]) send_note(ASK, r);
    }
    while (retrofit_seconds() < begin + 1) {
        mpi_answer(ranks);
        for (size_t r = 0; r < ranks->count; r++) answered[r] = answered[r] || has_come(ANSWER, r);
    }
    size_t silent = 0;
    while (silent < ranks->count && answered[silent]) silent++;
    return silent;
}

// Waits for all requests. Ranks give up one after the other, so that one alone says who is missing:
// it ends the others by that. false or error.
static bool wait_for_ranks(const retrofit_ranks *ranks) {
    const struct timespec pause = {.tv_nsec = 20000};
    double begin = retrofit_seconds(), end = begin + ranks->patience + 3 * (double)ranks->rank;
    while (!all_done(ranks)) {
        double now = retrofit_seconds();
        if (now > begin + 0.1) mpi_answer(ranks);
        if (now > begin + 0.001) nanosleep(&pause, NULL); // it may need this processor
        if (now < end) continue;
        size_t silent = mpi_silent_rank(ranks);
        if (silent == ranks->count)
            return retrofit_fail("an exchange with all other ranks there takes more than %.3g s "
                                 "(--patience)", now - begin);
        return retrofit_fail("no answer from rank %zu for %.3g s (--patience): the newest "
                             "checkpoint is whole, --resume goes on", silent, now - begin);
    }
    return true;
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
    MPI_Irecv(x, count, MPI_FLOAT, (int)from, DATA, MPI_COMM_WORLD, &requests[from]);
}

static void send(const retrofit_ranks *ranks, const float *x, int count, size_t to) {
    MPI_Isend(x, count, MPI_FLOAT, (int)to, DATA, MPI_COMM_WORLD, &requests[ranks->count + to]);
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
    ranks->answer = mpi_answer;
    ranks->silent = mpi_silent_rank;
    ranks->share = mpi_share;
    return true;
}

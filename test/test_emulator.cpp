// The emulator of CUDA against what CUDA says: layouts of fragments, numbers, warp operations, the
// runtime API, small kernels in every order of threads; and errors put into those kernels on
// purpose, each of which must be found, and by the build that claims to.
#include "emulator.h"
#include "check.h"
#include <algorithm>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined __SANITIZE_THREAD__ || __has_feature(thread_sanitizer)
enum { RACE = 1, ADDRESS = 0 };
#elif defined __SANITIZE_ADDRESS__ || __has_feature(address_sanitizer)
enum { RACE = 0, ADDRESS = 1 };
#else
enum { RACE = 0, ADDRESS = 0 };
#endif
enum { ORDERS = 3, SEEDS = 6 }; // order 0 needs no seed

typedef __nv_bfloat16 bf16;

static float load(float x) { return x; }
static float load(bf16 x) { return __bfloat162float(x); }
static void store(float *to, float x) { *to = x; }
static void store(bf16 *to, float x) { *to = __float2bfloat16(x); }
template <typename T> static void store(T *to, float) { *to = 0; } // counters begin at 0

// In [-1, 1), of so few bits that bf16 holds it.
static float random_number(void) {
    static uint32_t state = 1;
    state = state * 1664525 + 1013904223;
    return (float)((int)(state >> 24) - 128) / 128;
}

// Random numbers, the same on the host and on the device.
template <typename T> struct buffer {
    std::vector<T> host;
    T *device;

    buffer(size_t n) : host(n) {
        for (T &x : host) store(&x, random_number());
        cudaMalloc(&device, n * sizeof(T));
        cudaMemcpy(device, host.data(), n * sizeof(T), cudaMemcpyHostToDevice);
    }
    ~buffer() { cudaFree(device); }

    const std::vector<T> &fetch(void) {
        cudaDeviceSynchronize();
        cudaMemcpy(host.data(), device, host.size() * sizeof(T), cudaMemcpyDeviceToHost);
        return host;
    }
};

static bool launched(void) { return cudaGetLastError() == cudaSuccess; }

// Errors that can be put into a kernel. NONE: as it should be.
enum bug {
    NONE,
    NO_BARRIER,
    NO_SECOND_BARRIER,
    DIVERGENT,
    EARLY_RETURN,
    WRONG_MASK,
    NOT_IN_MASK,
    LANE_MISSING,
    OTHER_OPERATION,
    OUTSIDE_MASK,
    BEYOND,
    FAR_BEYOND,
    UNWRITTEN,
    NO_SYNCWARP,
    PARTIAL_SYNCWARP,
    UNALIGNED,
    NOT_SHARED,
    HALF_A_WARP,
    NOT_WAITED,
    TOO_FEW_STAGES,
    IN_FLIGHT,
    UNALIGNED_SOURCE,
    TOO_MANY_BYTES,
    BEYOND_GLOBAL,
    BETWEEN_THREADS,
    BETWEEN_BLOCKS,
    READ_BETWEEN_BLOCKS,
    HOST_MEMORY,
    NEVER_WAITS,
    EARLY_READ,
    EARLY_WRITE,
    PREFETCH_BEYOND
};

// ---- Sums: shuffles, and the parts of warps through shared memory ------------------------------
template <int BUG> __global__ void sums_kernel(float *out, const float *x, int n) {
    SMEM(float, parts, 3);
    float *part = parts; // a pointer has no bound, so only the address shows what is beyond
    int beyond = BUG == BEYOND ? 1 : BUG == FAR_BEYOND ? n / 2 : 0;
    int end = BUG == BEYOND_GLOBAL ? n + 1 : n;
    unsigned t = threadIdx.x, mask = 0xffffffff;
    float sum = 0;
    if (BUG == EARLY_RETURN && t == 95) return;
    for (int i = (int)t; i < end; i += (int)blockDim.x) sum += x[(int)blockIdx.x * n + i];
    if (BUG == WRONG_MASK && t == 5) mask = 0x7fffffff;
    if (BUG == NOT_IN_MASK && t == 5) mask = 0xffffffdf;
    if (BUG == OUTSIDE_MASK) mask = t % 32 < 16 ? 0x0000ffff : 0xffff0000;
    for (int other = 16; other; other /= 2) {
        if (BUG == LANE_MISSING && t == 40) continue;
        if (BUG == OTHER_OPERATION && t == 40) sum += __shfl_down_sync(mask, sum, (unsigned)other);
        else sum += __shfl_xor_sync(mask, sum, other);
    }
    if (t % 32 == 0) part[(int)t / 32 + beyond] = sum;
    if (BUG == DIVERGENT && t < 32) __syncthreads();
    else if (BUG != NO_BARRIER) __syncthreads();
    if (t == 0) out[blockIdx.x] = part[0] + part[1] + part[2];
}

template <int BUG> static bool sums(void) {
    int n = 201;
    buffer<float> x(n * 3);
    buffer<float> out(3);
    emulator_launch(sums_kernel<BUG>, 3, 96, 0, 0, out.device, x.device, n);
    bool ok = launched();
    out.fetch();
    for (int b = 0; b < 3; b++) {
        double sum = 0;
        for (int i = 0; i < n; i++) sum += x.host[b * n + i];
        ok = ok && fabs(out.host[b] - sum) < 1e-4;
    }
    return ok;
}

// ---- c (M,N) = a (M,K) · b (K,N) in tiles of 16x16 ---------------------------------------------
template <int BUG>
__global__ void tiles_kernel(float *c, const float *a, const float *b, int M, int N, int K) {
    SMEM(float, a_tile, 256);
    DYN_SMEM(float, b_tile);
    int x = (int)threadIdx.x, y = (int)threadIdx.y;
    int row = (int)blockIdx.y * 16 + y, column = (int)blockIdx.x * 16 + x;
    float sum = 0;
    for (int k = 0; k < K; k += 16) {
        bool in_a = row < M && k + x < K, in_b = column < N && k + y < K;
        if (BUG != UNWRITTEN || in_a) a_tile[y * 16 + x] = in_a ? a[row * K + k + x] : 0;
        if (BUG != UNWRITTEN || in_b) b_tile[y * 16 + x] = in_b ? b[(k + y) * N + column] : 0;
        if (BUG != NO_BARRIER) __syncthreads();
        for (int i = 0; i < 16; i++) sum = fmaf(a_tile[y * 16 + i], b_tile[i * 16 + x], sum);
        if (BUG != NO_SECOND_BARRIER) __syncthreads();
    }
    if (row < M && column < N) c[row * N + column] = sum;
}

// In every bit.
template <typename T>
static bool is_product(buffer<float> &c, const buffer<T> &a, const buffer<T> &b, int M, int N,
                       int K) {
    c.fetch();
    for (int i = 0; i < M * N; i++) {
        int row = i / N, column = i % N;
        float sum = 0;
        for (int k = 0; k < K; k++)
            sum = fmaf(load(a.host[row * K + k]), load(b.host[k * N + column]), sum);
        if (!(sum == c.host[i])) return false;
    }
    return true;
}

template <int BUG> static bool tiles(void) {
    int M = 37, N = 19, K = 41;
    buffer<float> a(M * K);
    buffer<float> b(K * N);
    buffer<float> c(M * N);
    emulator_launch(tiles_kernel<BUG>, dim3(2, 3), dim3(16, 16), 1024, 0, c.device, a.device,
                    b.device, M, N, K);
    return launched() && is_product(c, a, b, M, N, K);
}

// ---- The same with ldmatrix and mma: each warp a block of 16x16 --------------------------------
enum { STRIDE = 24 }; // of a tile's rows

template <int BUG>
__device__ void load_fragments(uint32_t a[4], uint32_t b[4], const bf16 *a_tile, const bf16 *b_tile,
                               int lane) {
    bf16 local[8] = {};
    int row = lane % 8 + lane / 8 % 2 * 8, column = lane / 16 * 8;
    const bf16 *a_row = a_tile + row * STRIDE + column + (BUG == UNALIGNED);
    ldmatrix(a, BUG == NOT_SHARED ? local : a_row);
    ldmatrix_transposed(b, b_tile + row * STRIDE + column);
}

template <int BUG>
__device__ void load_fragments(float a[8], float b[8], const float *a_tile, const float *b_tile,
                               int lane) {
    int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 8; i++) {
        int half = i / 2 % 2 * 8, odd = i % 2, last = i / 4 * 8;
        a[i] = a_tile[(group + half) * STRIDE + pair + odd + last];
        b[i] = b_tile[(pair + odd + half) * STRIDE + group + last];
    }
}

template <int BUG, typename T>
__global__ void mma_kernel(float *out, const T *a, const T *b, int M, int N, int K) {
    typedef typename std::conditional<sizeof(T) == 2, uint32_t, float>::type element;
    SMEM(T, tile, 2 * 2 * 16 * STRIDE);
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    int row = (int)blockIdx.y * 32 + warp * 16, column = (int)blockIdx.x * 16;
    T *a_tile = tile + warp * 2 * 16 * STRIDE;
    T *b_tile = a_tile + 16 * STRIDE;
    T zero;
    store(&zero, 0);
    float c[2][4] = {};
    element a_fragment[8], b_fragments[8]; // two of b, behind each other
    const int b_size = sizeof(T) == 2 ? 2 : 4;
    for (int k = 0; k < K; k += 16) {
        for (int i = lane; i < 256; i += 32) {
            int y = i / 16, x = i % 16;
            bool in_a = row + y < M && k + x < K, in_b = k + y < K && column + x < N;
            a_tile[y * STRIDE + x] = in_a ? a[(row + y) * K + k + x] : zero;
            b_tile[y * STRIDE + x] = in_b ? b[(k + y) * N + column + x] : zero;
        }
        if (BUG == PARTIAL_SYNCWARP) __syncwarp(lane < 16 ? 0x0000ffff : 0xffff0000);
        else if (BUG != NO_SYNCWARP) __syncwarp();
        if (BUG == HALF_A_WARP && lane < 16) return;
        load_fragments<BUG>(a_fragment, b_fragments, a_tile, b_tile, lane);
        mma(c[0], a_fragment, b_fragments);
        mma(c[1], a_fragment, b_fragments + b_size);
        __syncwarp();
    }
    for (int i = 0; i < 8; i++) {
        int y = row + lane / 4 + i / 2 % 2 * 8, x = column + lane % 4 * 2 + i % 2 + i / 4 * 8;
        if (y < M && x < N) out[y * N + x] = c[i / 4][i % 4];
    }
}

template <int BUG, typename T> static bool product(void) {
    int M = 45, N = 27, K = 53;
    buffer<T> a(M * K);
    buffer<T> b(K * N);
    buffer<float> c(M * N);
    emulator_launch(mma_kernel<BUG, T>, dim3(2, 2), 64, 0, 0, c.device, a.device, b.device, M, N,
                    K);
    return launched() && is_product(c, a, b, M, N, K);
}

// ---- Three stages of cp.async: out[t] = Σ over tiles of 256 numbers, some of other threads -----
template <int BUG> __device__ void fetch_tile(float *stage, const float *x, int n, int tile) {
    int i = tile * 256 + (int)threadIdx.x * 4;
    int bytes = 4 * std::min(std::max(n - i, 0), 4); // none behind the end
    if (BUG == TOO_MANY_BYTES) bytes = 17;
    const float *from = bytes ? x + i + (BUG == UNALIGNED_SOURCE) : x;
    cp_async(stage + threadIdx.x * 4 + (BUG == UNALIGNED), from, bytes);
}

// The place of the j-th number that thread t reads of a tile.
static int place_in_tile(int t, int j) { return (t * 5 + j * 64) % 256; }

template <int BUG> __global__ void pipeline_kernel(float *out, const float *x, int n) {
    enum { STAGES = 3, BUFFERS = BUG == TOO_FEW_STAGES ? STAGES - 1 : STAGES };
    SMEM(float, stages, BUFFERS * 256);
    int tiles = (n + 255) / 256, t = (int)threadIdx.x;
    float sum = 0;
    for (int i = 0; i < STAGES - 1; i++) {
        fetch_tile<BUG>(stages + i % BUFFERS * 256, x, n, i);
        cp_async_commit();
    }
    for (int i = 0; i < tiles; i++) {
        cp_async_wait<BUG == NOT_WAITED ? STAGES - 1 : STAGES - 2>();
        if (BUG != NO_BARRIER) __syncthreads();
        for (int j = 0; j < 4; j++) sum += stages[i % BUFFERS * 256 + place_in_tile(t, j)];
        int next = i + STAGES - 1;
        if (next < tiles || BUG == IN_FLIGHT)
            fetch_tile<BUG>(stages + next % BUFFERS * 256, x, n, next);
        cp_async_commit();
    }
    if (BUG == NOT_WAITED) cp_async_wait<0>(); // too late
    out[t] = sum;
}

template <int BUG> static bool pipeline(void) {
    int n = 256 * 5 + 131;
    buffer<float> x(n);
    buffer<float> out(64);
    emulator_launch(pipeline_kernel<BUG>, 1, 64, 0, 0, out.device, x.device, n);
    bool ok = launched();
    out.fetch();
    for (int t = 0; t < 64; t++) {
        float sum = 0;
        for (int i = 0; i < 6 * 4; i++) {
            int at = i / 4 * 256 + place_in_tile(t, i % 4);
            sum += at < n ? x.host[at] : 0;
        }
        ok = ok && out.host[t] == sum;
    }
    return ok;
}

// ---- Global memory: each thread moves its neighbour's number, in place -------------------------
template <int BUG> __global__ void shift_kernel(float *x, const float *from, unsigned *count) {
    unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
    unsigned neighbour = i - t + (t + 1) % blockDim.x;
    if (BUG == READ_BETWEEN_BLOCKS && t == 63 && blockIdx.x < 2) neighbour = i + 1;
    float next = from[neighbour];
    if (BUG != BETWEEN_THREADS) __syncthreads();
    x[i] = next;
    if (BUG == BETWEEN_BLOCKS) x[0] = 1;
    atomicAdd(count, t);
}

template <int BUG> static bool shift(void) {
    buffer<float> x(3 * 64);
    buffer<uint32_t> count(1);
    const float *from = BUG == HOST_MEMORY ? x.host.data() : x.device;
    emulator_launch(shift_kernel<BUG>, 3, 64, 0, 0, x.device, from, count.device);
    bool ok = launched();
    std::vector<float> before = x.host;
    x.fetch();
    for (size_t i = 0; i < x.host.size(); i++)
        ok = ok && x.host[i] == before[i / 64 * 64 + (i + 1) % 64];
    return ok && count.fetch()[0] == 3 * 63 * 64 / 2;
}

// ---- Warp operations one by one ----------------------------------------------------------------
template <typename T> __global__ void shuffles_kernel(T *out, int by, int width) {
    T mine = (T)threadIdx.x;
    out[threadIdx.x * 4] = __shfl_sync(~0u, mine, by, width);
    out[threadIdx.x * 4 + 1] = __shfl_up_sync(~0u, mine, (unsigned)by, width);
    out[threadIdx.x * 4 + 2] = __shfl_down_sync(~0u, mine, (unsigned)by, width);
    out[threadIdx.x * 4 + 3] = __shfl_xor_sync(~0u, mine, by, width);
}

// The lane that a lane reads from: the CUDA C++ programming guide, warp shuffle functions. The
// kinds are numbered as above.
static int source_lane(int kind, int lane, int by, int width) {
    int first = lane / width * width;
    const int sources[] = {first + by % width, lane - by, lane + by, lane ^ by};
    bool inside = sources[kind] >= first && sources[kind] < first + width;
    return inside ? sources[kind] : lane;
}

template <typename T> static void test_shuffle(int by, int width) {
    buffer<T> out(32 * 4);
    emulator_launch(shuffles_kernel<T>, 1, 32, 0, 0, out.device, by, width);
    out.fetch();
    bool ok = true;
    for (int lane = 0; lane < 32; lane++)
        for (int kind = 0; kind < 4; kind++)
            ok = ok && out.host[lane * 4 + kind] == (T)source_lane(kind, lane, by, width);
    check(ok, "shuffles by %d in width %d, of %zu bytes", by, width, sizeof(T));
}

template <typename T> static void test_shuffles(void) {
    for (int width = 2; width <= 32; width *= 4)
        for (int by = 0; by < width; by += 3) test_shuffle<T>(by, width);
}

__global__ void votes_kernel(int *out) {
    unsigned t = threadIdx.x, mask = t % 32 < 8 ? 0x000000ff : 0xffffff00; // two parts vote apart
    int odd = t % 2, last = t == 69;
    out += t * 9;
    out[0] = (int)__ballot_sync(mask, odd);
    out[1] = __any_sync(mask, t % 32 == 9);
    out[2] = __all_sync(mask, t % 32 > 8);
    out[3] = __syncthreads_or(last);
    out[4] = __syncthreads_and(!last);
    out[5] = __syncthreads_count(odd);
    out[6] = __syncthreads_or(0);
    out[7] = __syncthreads_and(1);
    out[8] = __all_sync(mask, t < 96);
}

static void test_votes(void) {
    buffer<int> out(70 * 9); // the last warp has 6 lanes
    emulator_launch(votes_kernel, 1, 70, 0, 0, out.device);
    out.fetch();
    bool ok = true;
    for (int t = 0; t < 70; t++) {
        bool low = t % 32 < 8;
        uint32_t lanes = t >= 64 ? 0x3f : low ? 0xff : 0xffffff00;
        const int expected[] = {(int)(lanes & 0xaaaaaaaa), !low, 0, 1, 0, 35, 0, 1, 1};
        for (int i = 0; i < 9; i++) ok = ok && out.host[t * 9 + i] == expected[i];
    }
    check(ok, "votes");
}

// Lanes told apart by masks: lane 2 learns from lane 1 what lane 0 did, so nothing races.
template <int BUG> __global__ void relay_kernel(float *out) {
    SMEM(float, x, 32);
    unsigned lane = threadIdx.x;
    x[lane] = (float)lane + 1;
    if (lane < 2 && BUG != NO_SYNCWARP) __syncwarp(3);
    if (lane == 1 || lane == 2) __syncwarp(6);
    if (lane == 2) out[0] = x[0] + x[1] + x[2];
}

template <int BUG> static bool relay(void) {
    buffer<float> out(1);
    emulator_launch(relay_kernel<BUG>, 1, 32, 0, 0, out.device);
    return out.fetch()[0] == 6;
}

// The last thread writes what the others have read.
template <int BUG> __global__ void late_kernel(float *out) {
    SMEM(float, x, 1);
    if (threadIdx.x == 0) x[0] = 1;
    __syncthreads();
    out[threadIdx.x] = x[0];
    if (BUG != NO_BARRIER) __syncthreads();
    if (threadIdx.x == 63) x[0] = 2;
}

template <int BUG> static bool late(void) {
    buffer<float> out(64);
    emulator_launch(late_kernel<BUG>, 1, 64, 0, 0, out.device);
    for (float x : out.fetch())
        if (x != 1) return false;
    return true;
}

// Two launches of which the second may begin early.
template <int BUG> __global__ void chained_kernel(float *x) {
    float *mine = x + threadIdx.x, early = 0;
    prefetch(BUG == PREFETCH_BEYOND ? mine + 64 : mine);
    if (BUG == EARLY_READ) early = *mine;
    if (BUG == EARLY_WRITE) *mine = 0;
    if (BUG == NEVER_WAITS && threadIdx.x == 5) return;
    wait_for_previous();
    *mine += 1 + 0 * early;
}

template <int BUG> static bool chained(void) {
    buffer<float> x(64);
    const std::vector<float> before = x.host;
    emulator_launch(chained_kernel<NONE>, 1, 64, 0, 0, x.device);
    emulator_chain();
    emulator_launch(chained_kernel<BUG>, 1, 64, 0, 0, x.device);
    x.fetch();
    for (size_t i = 0; i < 64; i++)
        if (x.host[i] != before[i] + 1 + 1) return false;
    return true;
}

// The block that comes last adds what all have written: it knows by an atomic that they have.
__global__ void last_block_kernel(float *parts, unsigned *count, float *sum) {
    SMEM(bool, last, 1);
    parts[blockIdx.x * 32 + threadIdx.x] = 1;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last[0] = atomicAdd(count, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!last[0] || threadIdx.x) return;
    *sum = 0;
    for (unsigned i = 0; i < gridDim.x * 32; i++) *sum += parts[i];
}

static bool last_block(void) {
    buffer<float> parts(5 * 32);
    buffer<float> sum(1);
    buffer<uint32_t> count(1);
    emulator_launch(last_block_kernel, 5, 32, 0, 0, parts.device, count.device, sum.device);
    return sum.fetch()[0] == 160;
}

// What may not be read yet is NaN: shared memory, in every block, and where a cp.async goes.
__global__ void early_kernel(float *out, const float *x) {
    SMEM(float, to, 4);
    out += blockIdx.x * 3;
    out[0] = to[0];
    to[0] = 5;
    cp_async(to, x, 16);
    cp_async_commit();
    out[1] = to[0];
    cp_async_wait<0>();
    out[2] = to[0];
}

static void test_early(void) {
    buffer<float> out(6);
    buffer<float> x(4);
    emulator_launch(early_kernel, 2, 1, 0, 0, out.device, x.device);
    out.fetch();
    for (int b = 0; b < 6; b += 3) {
        bool nan = isnan(out.host[b]) && isnan(out.host[b + 1]);
        check(nan && out.host[b + 2] == x.host[0], "what may not be read is NaN");
    }
}

// ---- Layouts -----------------------------------------------------------------------------------
// The PTX ISA, sections "ldmatrix" and "Matrix Fragments for mma.m16n8k16 with floating point
// type".
__global__ void ldmatrix_kernel(uint16_t *out) {
    SMEM(uint16_t, rows, 32 * 8);
    unsigned lane = threadIdx.x;
    uint32_t plain[4], transposed[4];
    for (unsigned i = 0; i < 8; i++) // matrix · 64 + row · 8 + column
        rows[lane * 8 + i] = (uint16_t)(lane * 8 + i);
    __syncwarp();
    ldmatrix(plain, rows + lane * 8);
    ldmatrix_transposed(transposed, rows + lane * 8);
    memcpy(out + lane * 16, plain, 16);
    memcpy(out + lane * 16 + 8, transposed, 16);
}

static void test_ldmatrix(void) {
    buffer<uint16_t> out(32 * 16);
    emulator_launch(ldmatrix_kernel, 1, 32, 0, 0, out.device);
    out.fetch();
    bool plain = true, transposed = true;
    for (int i = 0; i < 32 * 8; i++) {
        // Row 0 goes to threads 0..3, two elements each; row 1 to threads 4..7; …
        int lane = i / 8, matrix = i % 8 / 2, row = lane / 4, column = lane % 4 * 2 + i % 2;
        plain = plain && out.host[lane * 16 + i % 8] == matrix * 64 + row * 8 + column;
        transposed =
            transposed && out.host[lane * 16 + 8 + i % 8] == matrix * 64 + column * 8 + row;
    }
    check(plain, "ldmatrix");
    check(transposed, "ldmatrix.trans");
}

static void multiply(float *c, const float *a, const float *b) { mma(c, a, b); }

static void multiply(float *c, const bf16 *a, const bf16 *b) {
    uint32_t a_pairs[4], b_pairs[2];
    memcpy(a_pairs, a, sizeof a_pairs);
    memcpy(b_pairs, b, sizeof b_pairs);
    mma(c, a_pairs, b_pairs);
}

// a, b and c as the lanes hold them.
template <typename T> __global__ void fragments_kernel(float *c, const T *a, const T *b) {
    unsigned lane = threadIdx.x;
    T a_fragment[8];
    T b_fragment[4];
    float c_fragment[4];
    for (unsigned i = 0; i < 8; i++) a_fragment[i] = a[lane * 8 + i];
    for (unsigned i = 0; i < 4; i++) b_fragment[i] = b[lane * 4 + i];
    for (unsigned i = 0; i < 4; i++) c_fragment[i] = c[lane * 4 + i];
    multiply(c_fragment, a_fragment, b_fragment);
    for (unsigned i = 0; i < 4; i++) c[lane * 4 + i] = c_fragment[i];
}

template <typename T> static void test_fragments(const char *type) {
    buffer<T> a(32 * 8);
    buffer<T> b(32 * 4);
    buffer<float> c(32 * 4);
    float A[16][16], B[16][8], C[16][8];
    for (int lane = 0; lane < 32; lane++) { // the names and formulas are NVIDIA's
        int groupID = lane >> 2, threadID_in_group = lane % 4;
        for (int i = 0; i < 8; i++) {
            int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? groupID : groupID + 8;
            int col = threadID_in_group * 2 + (i & 0x1) + (i < 4 ? 0 : 8);
            A[row][col] = load(a.host[lane * 8 + i]);
        }
        for (int i = 0; i < 4; i++) {
            int row = threadID_in_group * 2 + (i & 0x1) + (i < 2 ? 0 : 8);
            B[row][groupID] = load(b.host[lane * 4 + i]);
            row = i < 2 ? groupID : groupID + 8;
            C[row][threadID_in_group * 2 + (i & 0x1)] = c.host[lane * 4 + i];
        }
    }
    emulator_launch(fragments_kernel<T>, 1, 32, 0, 0, c.device, a.device, b.device);
    c.fetch();
    bool ok = true;
    for (int i = 0; i < 32 * 4; i++) {
        int lane = i / 4, row = lane / 4 + i % 4 / 2 * 8, col = lane % 4 * 2 + i % 2;
        float sum = C[row][col];
        for (int k = 0; k < 16; k++) sum = fmaf(A[row][k], B[k][col], sum);
        ok = ok && c.host[i] == sum;
    }
    check(ok, "mma.m16n8k16 of %s: the fragments' layouts, and every bit of the sums", type);
}

// ---- Numbers -----------------------------------------------------------------------------------
// Whether a number is rounded to the nearer one of the two bf16 numbers around it, whose bits are
// `high` and `high` + 1, and from the middle to the even one.
static bool rounds_to_nearest(uint32_t high, uint32_t low) {
    float x = __uint_as_float(high << 16 | low), y = __bfloat162float(__float2bfloat16(x));
    float down = __uint_as_float(high << 16), up = __uint_as_float((high + 1) << 16);
    if (isnan(x)) return isnan(y);
    // From half way to 2^128 on it becomes infinite.
    if (isinf(x) || isinf(up)) return y == (low >= 0x8000 ? up : down);
    double to_down = fabs((double)x - down), to_up = fabs((double)up - x);
    bool is_down = to_down < to_up || (to_down == to_up && high % 2 == 0);
    return y == (is_down ? down : up) && signbit(y) == signbit(x);
}

static void test_numbers(void) {
    const uint32_t lows[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
    size_t wrong = 0;
    for (uint32_t high = 0; high < 0x10000; high++)
        for (uint32_t low : lows) wrong += !rounds_to_nearest(high, low);
    check(!wrong, "rounding to bf16: %zu wrong", wrong);

    __nv_bfloat162 two = __floats2bfloat162_rn(1, -2);
    bool pairs = two.x.bits == 0x3f80 && two.y.bits == 0xc000;
    check(pairs && __bfloat1622float2(two).y == -2, "pairs of bf16");
    bool counted = __popc(0xf0f00000) == 8 && __ffs(0) == 0 && __ffs(8) == 4;
    check(counted && __clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0, "bits");
    bool divided = __fdividef(6, 3) == 2 && __fdividef(1, 0x1p127f) == 0;
    check(divided && rsqrtf(4) == .5f && __expf(0) == 1 && __logf(1) == 0, "fast functions");
    bool same = __float_as_uint(1) == 0x3f800000 && __int_as_float(__float_as_int(-3)) == -3;
    check(same, "bits of numbers");
}

// ---- Orders ------------------------------------------------------------------------------------
__global__ void ticket_kernel(uint32_t *place, unsigned *count) {
    place[atomicAdd(count, 1u)] = blockIdx.x * blockDim.x + threadIdx.x;
}

// The threads in the order in which they ran.
static std::vector<uint32_t> tickets(void) {
    buffer<uint32_t> place(4 * 96);
    buffer<uint32_t> count(1);
    emulator_launch(ticket_kernel, 4, 96, 0, 0, place.device, count.device);
    return place.fetch();
}

static void test_order(int kind) {
    emulator_order(kind, 7);
    std::vector<uint32_t> first = tickets();
    std::vector<uint32_t> second = tickets();
    emulator_order(kind, 7);
    check(tickets() == first && tickets() == second, "order %d repeats with its seed", kind);
    const char *expected = kind ? "differ" : "are alike";
    check((first == second) == (kind == 0), "order %d: launches %s", kind, expected);
    emulator_order(kind, 8);
    check((tickets() == first) == (kind == 0), "order %d: seeds %s", kind, expected);

    bool whole = true; // a warp's threads follow each other
    for (size_t i = 0; i < first.size(); i++)
        whole = whole && first[i] / 32 == first[i / 32 * 32] / 32;
    check(whole == (kind != 1), "order %d: %s warp after another", kind,
          kind == 1 ? "not one" : "one");
}

// ---- Runtime API -------------------------------------------------------------------------------
__global__ void add_kernel(float *x, float y) { x[threadIdx.x] += y; }

static void test_capture(cudaStream_t stream, buffer<float> &x, buffer<float> &y,
                         buffer<float> &z) {
    std::vector<float> host = x.host;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    bool ok = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
    emulator_launch(add_kernel, 1, 32, 0, stream, x.device, 1.f);
    cudaMemcpyAsync(y.device, x.device, 128, cudaMemcpyDeviceToDevice, stream);
    cudaMemsetAsync(z.device, 0, 128, stream);
    emulator_launch(add_kernel, 1, 32, 0, stream, z.device, 2.f);
    ok = ok && cudaStreamEndCapture(stream, &graph) == cudaSuccess;
    ok = ok && cudaGraphInstantiate(&exec, graph) == cudaSuccess;
    check(ok, "capture");
    check(x.fetch() == host && y.fetch() != host, "what is captured does not run");

    for (int i = 0; i < 3; i++) cudaGraphLaunch(exec, stream);
    cudaStreamSynchronize(stream);
    x.fetch();
    y.fetch();
    z.fetch();
    for (int i = 0; i < 32; i++)
        ok = ok && x.host[i] == host[i] + 3 && y.host[i] == x.host[i] && z.host[i] == 2;
    check(ok, "a graph, launched three times");
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
}

static cudaError_t not_allowed_in_a_capture(int what, cudaStream_t stream, float *x, float *y) {
    void *p;
    switch (what) {
    case 0: return cudaMalloc(&p, 4);
    case 1: return cudaFree(x);
    case 2: return cudaMemcpy(y, x, 4, cudaMemcpyDeviceToDevice);
    case 3: return cudaStreamSynchronize(stream);
    default: return cudaDeviceSynchronize();
    }
}

static void test_broken_captures(cudaStream_t stream, float *x, float *y) {
    cudaGraph_t graph;
    for (int what = 0; what < 5; what++) {
        cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
        cudaError_t error = not_allowed_in_a_capture(what, stream, x, y);
        check(error == cudaErrorStreamCaptureUnsupported, "not allowed in a capture: %d", what);
        error = cudaStreamEndCapture(stream, &graph);
        check(error == cudaErrorStreamCaptureInvalidated && !graph, "a broken capture: %d", what);
    }
    bool told = cudaGetLastError() == cudaErrorStreamCaptureInvalidated;
    check(told && cudaGetLastError() == cudaSuccess, "the last error is told once");
}

// What a host forgets to wait for has not happened, except in order 0. z holds 2.
static void test_lazy_stream(cudaStream_t stream, float *z) {
    float *pinned;
    cudaMallocHost(&pinned, 4);
    for (int kind = 0; kind < ORDERS; kind++) {
        emulator_order(kind, 1);
        *pinned = -1;
        emulator_launch(add_kernel, 1, 32, 0, stream, z, 1.f);
        cudaMemcpyAsync(pinned, z, 4, cudaMemcpyDeviceToHost, stream);
        check((*pinned == -1) == (kind > 0), "order %d: work of a stream that nobody waited for",
              kind);
        cudaStreamSynchronize(stream);
        check(*pinned == 3.f + (float)kind, "order %d: work of a stream", kind);
    }
    cudaFreeHost(pinned);
}

static void note(void *text) { strcat((char *)text, "host"); }

// What another stream waits for has happened when that one is waited for. z holds 5.
static void test_events(cudaStream_t stream, float *z) {
    float *pinned;
    cudaStream_t other;
    cudaEvent_t added, copied;
    cudaMallocHost(&pinned, 4);
    cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking);
    cudaEventCreate(&added);
    cudaEventCreate(&copied);
    for (int kind = 0; kind < ORDERS; kind++) {
        char text[8] = "";
        emulator_order(kind, 1);
        emulator_launch(add_kernel, 1, 32, 0, stream, z, 1.f);
        cudaEventRecord(added, stream);
        cudaStreamWaitEvent(other, added, 0);
        cudaMemcpyAsync(pinned, z, 4, cudaMemcpyDeviceToHost, other);
        cudaLaunchHostFunc(other, note, text);
        cudaEventRecord(copied, other);
        cudaStreamWaitEvent(stream, copied, 0);
        emulator_launch(add_kernel, 1, 32, 0, stream, z, 1.f);
        check((*text == 0) == (kind > 0), "order %d: a stream that waits for another", kind);
        cudaError_t first = cudaEventQuery(copied), second = cudaEventQuery(copied);
        check(first == (kind ? cudaErrorNotReady : cudaSuccess) && second == cudaSuccess,
              "order %d: asking for an event", kind);
        check(!strcmp(text, "host"), "order %d: a function of the host", kind);
        cudaStreamSynchronize(stream);
        check(*pinned == 6.f + 2 * (float)kind, "order %d: what was waited for", kind);
    }
    cudaEventDestroy(added);
    cudaEventDestroy(copied);
    cudaStreamDestroy(other);
    cudaFreeHost(pinned);
}

static void test_streams(void) {
    buffer<float> x(32);
    buffer<float> y(32);
    buffer<float> z(32);
    cudaStream_t stream;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    test_capture(stream, x, y, z);
    test_broken_captures(stream, x.device, y.device);
    test_lazy_stream(stream, z.device);
    test_events(stream, z.device);
    cudaStreamDestroy(stream);
}

__global__ void dynamic_kernel(float *out, int n) {
    DYN_SMEM(float, x);
    x[n - 1] = 3;
    *out = x[n - 1];
}

static cudaError_t allow_dynamic(int bytes) {
    return cudaFuncSetAttribute(dynamic_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

static void test_launches(buffer<float> &out) {
    const struct {
        dim3 grid, block;
        size_t shared;
        cudaError_t expected;
    } launches[] = {
        {1, 1024, 0, cudaSuccess},
        {1, 1025, 0, cudaErrorInvalidConfiguration},
        {1, dim3(32, 33), 0, cudaErrorInvalidConfiguration},
        {0, 32, 0, cudaErrorInvalidConfiguration},
        {1, 0, 0, cudaErrorInvalidConfiguration},
        {1, dim3(1, 1, 65), 0, cudaErrorInvalidConfiguration},
        {dim3(1, 65536), 1, 0, cudaErrorInvalidConfiguration},
        {1, 32, 48 * 1024, cudaSuccess},
        {1, 32, 48 * 1024 + 1, cudaErrorInvalidValue},
    };
    for (auto &l : launches) {
        emulator_launch(add_kernel, l.grid, l.block, l.shared, 0, out.device, 1.f);
        check(cudaGetLastError() == l.expected,
              "launch of %u,%u blocks of %u,%u,%u threads, %zu bytes", l.grid.x, l.grid.y,
              l.block.x, l.block.y, l.block.z, l.shared);
    }
    bool refused = allow_dynamic(227 * 1024 + 1) == cudaErrorInvalidValue;
    check(refused && allow_dynamic(227 * 1024) == cudaSuccess, "227 KB");
    emulator_launch(dynamic_kernel, 1, 1, 227 * 1024, 0, out.device, 227 * 256);
    cudaGetLastError();
    check(out.fetch()[0] == 3, "all shared memory there is");
}

// The only buffer that lives meanwhile takes 4096 bytes.
static void test_memory(void) {
    size_t free, total;
    void *all, *more;
    setenv("EMULATOR_MEMORY", "100000", 1);
    cudaMemGetInfo(&free, &total);
    bool counted = total == 100000 && free == 100000 - 4096;
    bool refused = cudaMalloc(&more, free + 1) == cudaErrorMemoryAllocation && !more;
    check(counted && refused, "out of memory");
    bool given = cudaMalloc(&all, free) == cudaSuccess && (uintptr_t)all % 256 == 0;
    check(given && cudaMalloc(&more, 1) == cudaErrorMemoryAllocation, "all memory");
    cudaMemGetInfo(&free, &total);
    bool none_left = free == 0;
    cudaFree(all);
    cudaMemGetInfo(&free, &total);
    check(none_left && free == 100000 - 4096, "memory given back");
    unsetenv("EMULATOR_MEMORY");
}

static void test_addresses(const buffer<float> &out) {
    float x[4];
    cudaError_t error = cudaMemcpy(x, x + 1, 4, cudaMemcpyHostToDevice);
    check(error == cudaErrorInvalidValue, "a copy to what is no device memory");
    error = cudaMemcpy(out.device + 1, out.device, 4096, cudaMemcpyDeviceToDevice);
    check(error == cudaErrorInvalidValue, "a copy beyond the end");
    error = cudaMemset(x, 0, 4);
    check(error == cudaErrorInvalidValue && cudaFree(x) == cudaErrorInvalidValue,
          "what is no device memory");
    void *p;
    cudaMalloc(&p, 4);
    cudaMemcpy(x, p, 4, cudaMemcpyDeviceToHost);
    cudaFree(p);
    check(isnan(x[0]), "new memory holds NaN");
}

static void test_devices(void) {
    int count = -1;
    void *p;
    bool one = cudaGetDeviceCount(&count) == cudaSuccess && count == 1;
    check(one && cudaSetDevice(1) == cudaErrorInvalidDevice, "one device");
    setenv("EMULATOR_DEVICES", "0", 1);
    bool none = cudaGetDeviceCount(&count) == cudaErrorNoDevice && !count;
    check(none && cudaMalloc(&p, 4) == cudaErrorNoDevice, "no device");
    unsetenv("EMULATOR_DEVICES");
    cudaGetLastError();
    cudaDeviceProp properties;
    bool found = !cudaGetDeviceProperties(&properties, 0);
    check(found && properties.major == 9 && !strcmp(properties.name, "emulator"), "properties");
    const char *name = cudaGetErrorName(cudaErrorMemoryAllocation);
    check(!strcmp(name, "cudaErrorMemoryAllocation"), "an error's name");
}

static void test_limits(void) {
    buffer<float> out(1024);
    test_launches(out);
    test_memory();
    test_addresses(out);
    test_devices();
}

// ---- Errors on purpose -------------------------------------------------------------------------
__global__ void too_much_kernel(float *out) {
    SMEM(float, x, 49 * 256 + 1);
    x[threadIdx.x] = 1;
    out[threadIdx.x] = x[threadIdx.x];
}

static bool too_much(void) {
    buffer<float> out(32);
    emulator_launch(too_much_kernel, 1, 32, 0, 0, out.device);
    return out.fetch()[0] == 1;
}

// What must be found, in a child process: "" is a wrong result, other texts are words of the
// diagnosis. `found` with some of a few seeds; in order 0 what `race` says by the build that finds
// races, and what `address` says by AddressSanitizer. Where these are NULL `found` holds for them
// too; where `found` is NULL the other builds do not see the error.
struct seeded_bug {
    const char *name;
    bool (*run)(void);
    const char *found, *race, *address;
};

// clang-format off
static const seeded_bug seeded_bugs[] = {
    {"no barrier before parts are added", sums<NO_BARRIER>, "", "nobody has written", ""},
    {"no barrier after a tile is stored", tiles<NO_BARRIER>, "", "nobody has written", ""},
    {"no barrier after a tile is used", tiles<NO_SECOND_BARRIER>, "", "race: ", NULL},
    {"no barrier after cp.async has arrived", pipeline<NO_BARRIER>, "", "of stages", NULL},
    {"barriers in two branches", sums<DIVERGENT>, "waits in __syncthreads at line", NULL, NULL},
    {"return before a barrier", sums<EARLY_RETURN>, "__syncthreads", NULL, NULL},
    {"another mask in one lane", sums<WRONG_MASK>, "mask 0x", NULL, NULL},
    {"lane not in its mask", sums<NOT_IN_MASK>, "is not in the mask", NULL, NULL},
    {"lane missing from a shuffle", sums<LANE_MISSING>, "waits for thread (40,0,0)", NULL, NULL},
    {"two kinds of shuffles", sums<OTHER_OPERATION>, "__shfl_down_sync", NULL, NULL},
    {"shuffle from outside of the mask", sums<OUTSIDE_MASK>, "", NULL, NULL},
    {"write behind a shared array", sums<BEYOND>,
     "wrote behind the end of parts", "in no array", "AddressSanitizer"},
    {"write far behind a shared array", sums<FAR_BEYOND>,
     "wrote behind the end of parts", "in no array", "AddressSanitizer"},
    {"read beyond global memory", sums<BEYOND_GLOBAL>,
     NULL, "no memory of the GPU", "AddressSanitizer"},
    {"shared memory read before it is written", tiles<UNWRITTEN>, "", "nobody has written", NULL},
    {"no __syncwarp before ldmatrix", product<NO_SYNCWARP, bf16>, NULL, "race: ", NULL},
    {"no __syncwarp before reading", product<NO_SYNCWARP, float>, "", "nobody has written", NULL},
    {"__syncwarp of two halves", product<PARTIAL_SYNCWARP, bf16>, NULL, "race: ", NULL},
    {"ldmatrix from an odd place", product<UNALIGNED, bf16>, "no multiple of 16", NULL, NULL},
    {"ldmatrix from elsewhere", product<NOT_SHARED, bf16>, "not an address in shared", NULL, NULL},
    {"ldmatrix of half a warp", product<HALF_A_WARP, bf16>, "needs all 32 lanes", NULL, NULL},
    {"cp.async not waited for", pipeline<NOT_WAITED>, "", "still fills", NULL},
    {"one stage too few", pipeline<TOO_FEW_STAGES>, "", "race: ", NULL},
    {"cp.async in flight at the end", pipeline<IN_FLIGHT>, "in flight", NULL, NULL},
    {"cp.async to an odd place", pipeline<UNALIGNED>, "no multiple of 16", NULL, NULL},
    {"cp.async from an odd place", pipeline<UNALIGNED_SOURCE>, "16 bytes from", NULL, NULL},
    {"a chained thread that never waits", chained<NEVER_WAITS>,
     "without wait_for_previous", NULL, NULL},
    {"a chained thread that reads early", chained<EARLY_READ>,
     NULL, "before wait_for_previous", NULL},
    {"a chained thread that writes early", chained<EARLY_WRITE>,
     "", "before wait_for_previous", NULL},
    {"a prefetch beyond global memory", chained<PREFETCH_BEYOND>, "of no memory", NULL, NULL},
    {"cp.async of 17 bytes", pipeline<TOO_MANY_BYTES>, "17 bytes", NULL, NULL},
    {"threads race for global memory", shift<BETWEEN_THREADS>, "", "race: ", NULL},
    {"blocks write the same number", shift<BETWEEN_BLOCKS>, "", "race: ", NULL},
    {"a block reads what another writes", shift<READ_BETWEEN_BLOCKS>,
     NULL, "by another block", NULL},
    {"a lane that took no part in a relay", relay<NO_SYNCWARP>, NULL, "race: ", NULL},
    {"a write after other warps have read", late<NO_BARRIER>, "", "race: ", NULL},
    {"host memory in a kernel", shift<HOST_MEMORY>, NULL, "no memory of the GPU", NULL},
    {"too much static shared memory", too_much, "too much shared memory", NULL, NULL},
};
// clang-format on

// Runs the kernel in a child process; true if that finds `text`.
static bool finds(const seeded_bug &bug, const char *text, int kind, uint64_t seed) {
    int ends[2], state;
    fflush(stdout);
    if (pipe(ends)) return false;
    pid_t child = fork();
    if (child == 0) {
        alarm(20);
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        emulator_order(kind, seed);
        _exit(bug.run() ? 0 : 1);
    }
    close(ends[1]);
    char errors[8192];
    size_t n = 0;
    ssize_t got = 1;
    while (got > 0 && n + 1 < sizeof errors) {
        got = read(ends[0], errors + n, sizeof errors - 1 - n);
        if (got > 0) n += (size_t)got;
    }
    errors[n] = 0;
    close(ends[0]);
    waitpid(child, &state, 0);
    if (getenv("VERBOSE") && n) printf("%s: %s", bug.name, errors);
    if (!WIFEXITED(state)) return false;
    if (!*text) return WEXITSTATUS(state) == 1;
    return WEXITSTATUS(state) != 0 && strstr(errors, text);
}

static bool finds_with_some_seed(const seeded_bug &bug, const char *text) {
    for (uint64_t seed = 0; seed < SEEDS; seed++)
        for (int kind = 1; kind < ORDERS; kind++)
            if (finds(bug, text, kind, seed)) return true;
    return false;
}

static void test_bug(const seeded_bug &bug) {
    const char *special = RACE ? bug.race : ADDRESS ? bug.address : NULL;
    if (special) check(finds(bug, special, 0, 0), "not found: %s", bug.name);
    else if (bug.found) check(finds_with_some_seed(bug, bug.found), "not found: %s", bug.name);
}

// ---- All of them -------------------------------------------------------------------------------
static void test_kernels(int kind, uint64_t seed) {
    static const struct {
        const char *name;
        bool (*run)(void);
    } kernels[] = {
        {"sums", sums<NONE>},
        {"tiles", tiles<NONE>},
        {"mma, bf16", product<NONE, bf16>},
        {"mma, fp32", product<NONE, float>},
        {"cp.async", pipeline<NONE>},
        {"global memory", shift<NONE>},
        {"a relay", relay<NONE>},
        {"a late write", late<NONE>},
        {"a chained launch", chained<NONE>},
        {"the last block", last_block},
    };
    emulator_order(kind, seed);
    for (auto &kernel : kernels)
        check(kernel.run(), "%s in order %d, seed %d", kernel.name, kind, (int)seed);
    test_shuffles<int>();
    test_shuffles<unsigned>();
    test_shuffles<float>();
    test_shuffles<double>();
    test_votes();
    test_fragments<bf16>("bf16");
    test_fragments<float>("fp32");
    test_ldmatrix();
    if (!RACE) test_early(); // the build that finds races ends the process instead
}

int main(void) {
    test_kernels(0, 0);
    for (int kind = 1; kind < ORDERS; kind++)
        for (uint64_t seed = 0; seed < SEEDS; seed++) test_kernels(kind, seed);
    test_numbers();
    for (int kind = 0; kind < ORDERS; kind++) test_order(kind);
    test_streams();
    test_limits();
    for (const seeded_bug &bug : seeded_bugs) test_bug(bug);
    return finish("emulator");
}

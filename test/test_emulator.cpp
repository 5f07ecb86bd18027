// The emulator of CUDA against what CUDA says: layouts of fragments, numbers, warp operations, the runtime API, small kernels in every
// order of threads; and errors put into those kernels on purpose, each of which must be found, and by the build that claims to.
#include "emulator.h"
#include "check.h"
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
enum { SEEDS = 6 };

typedef __nv_bfloat16 bf16;
template <typename T> static void store(T *to, float x) { *to = std::is_integral<T>::value ? T() : (T)x; }
static void store(bf16 *to, float x) { *to = __float2bfloat16(x); }
static float load(float x) { return x; }
static float load(bf16 x) { return __bfloat162float(x); }
static float any(void) { // in (-1, 1), of few bits, so that bf16 holds it
    static uint32_t state = 1;
    state = state * 1664525 + 1013904223;
    return (float)((int)(state >> 24) - 128) / 128;
}

template <typename T> struct buffer { // the same on the host and on the device
    std::vector<T> host;
    T *device;
    buffer(size_t n) : host(n) {
        for (T &x : host) store(&x, any());
        cudaMalloc(&device, n * sizeof(T));
        cudaMemcpy(device, host.data(), n * sizeof(T), cudaMemcpyHostToDevice);
    }
    ~buffer() { cudaFree(device); }
    const std::vector<T> &fetch(void) {
        cudaDeviceSynchronize(), cudaMemcpy(host.data(), device, host.size() * sizeof(T), cudaMemcpyDeviceToHost);
        return host;
    }
};

// Errors that can be put into a kernel. NONE: as it should be.
enum bug {
    NONE, NO_BARRIER, NO_SECOND_BARRIER, DIVERGENT, EARLY_RETURN, WRONG_MASK, NOT_IN_MASK, LANE_MISSING, OTHER_OPERATION, OUTSIDE_MASK,
    BEYOND, FAR_BEYOND, UNWRITTEN, NO_SYNCWARP, PARTIAL_SYNCWARP, UNALIGNED, NOT_SHARED, HALF_A_WARP, NOT_WAITED, TOO_FEW_STAGES, IN_FLIGHT,
    UNALIGNED_SOURCE, TOO_MANY_BYTES, BEYOND_GLOBAL, BETWEEN_THREADS, BETWEEN_BLOCKS, READ_BETWEEN_BLOCKS, HOST_MEMORY
};

// ---- Sums: shuffles, and the parts of warps through shared memory ---------------------------------------------------------
template <int BUG> __global__ void sums_kernel(float *out, const float *x, int n) {
    SMEM(float, parts, 3);
    float *part = parts; // a bound that only addresses show
    unsigned t = threadIdx.x, mask = 0xffffffff;
    float sum = 0;
    if (BUG == EARLY_RETURN && t == 95) return;
    for (int i = (int)t; i < n + (BUG == BEYOND_GLOBAL); i += (int)blockDim.x) sum += x[(int)blockIdx.x * n + i];
    if (BUG == WRONG_MASK && t == 5) mask = 0x7fffffff;
    if (BUG == NOT_IN_MASK && t == 5) mask = 0xffffffdf;
    if (BUG == OUTSIDE_MASK) mask = t % 32 < 16 ? 0x0000ffff : 0xffff0000;
    for (int other = 16; other; other /= 2) {
        if (BUG == LANE_MISSING && t == 40) continue;
        if (BUG == OTHER_OPERATION && t == 40) sum += __shfl_down_sync(mask, sum, (unsigned)other);
        else sum += __shfl_xor_sync(mask, sum, other);
    }
    if (t % 32 == 0) part[t / 32 + (BUG == BEYOND ? 1 : BUG == FAR_BEYOND ? n / 2 : 0)] = sum;
    if (BUG == DIVERGENT && t < 32) __syncthreads();
    else if (BUG != NO_BARRIER) __syncthreads();
    if (t == 0) out[blockIdx.x] = part[0] + part[1] + part[2];
}

template <int BUG> static bool sums(void) {
    int n = 201;
    buffer<float> x((size_t)n * 3), out(3);
    emulator_launch(sums_kernel<BUG>, 3, 96, 0, 0, out.device, x.device, n);
    bool ok = cudaGetLastError() == cudaSuccess;
    out.fetch();
    for (int b = 0; b < 3; b++) {
        double sum = 0;
        for (int i = 0; i < n; i++) sum += x.host[(size_t)(b * n + i)];
        ok = ok && fabs(out.host[(size_t)b] - sum) < 1e-4;
    }
    return ok;
}

// ---- c (M,N) = a (M,K) · b (K,N) in tiles of 16x16 ------------------------------------------------------------------------
template <int BUG> __global__ void tiles_kernel(float *c, const float *a, const float *b, int M, int N, int K) {
    SMEM(float, at, 256);
    DYN_SMEM(float, bt);
    int x = (int)threadIdx.x, y = (int)threadIdx.y, row = (int)blockIdx.y * 16 + y, column = (int)blockIdx.x * 16 + x;
    float sum = 0;
    for (int k = 0; k < K; k += 16) {
        if (BUG != UNWRITTEN || (row < M && k + x < K)) at[y * 16 + x] = row < M && k + x < K ? a[row * K + k + x] : 0;
        if (BUG != UNWRITTEN || (column < N && k + y < K)) bt[y * 16 + x] = column < N && k + y < K ? b[(k + y) * N + column] : 0;
        if (BUG != NO_BARRIER) __syncthreads();
        for (int i = 0; i < 16; i++) sum = fmaf(at[y * 16 + i], bt[i * 16 + x], sum);
        if (BUG != NO_SECOND_BARRIER) __syncthreads();
    }
    if (row < M && column < N) c[row * N + column] = sum;
}

template <typename T> static bool is_product(buffer<float> &c, const buffer<T> &a, const buffer<T> &b, int M, int N, int K) { // every bit
    c.fetch();
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            float sum = 0;
            for (int k = 0; k < K; k++) sum = fmaf(load(a.host[(size_t)(i * K + k)]), load(b.host[(size_t)(k * N + j)]), sum);
            if (!(sum == c.host[(size_t)(i * N + j)])) return false;
        }
    return true;
}

template <int BUG> static bool tiles(void) {
    int M = 37, N = 19, K = 41;
    buffer<float> a((size_t)(M * K)), b((size_t)(K * N)), c((size_t)(M * N));
    emulator_launch(tiles_kernel<BUG>, dim3(2, 3), dim3(16, 16), 1024, 0, c.device, a.device, b.device, M, N, K);
    return cudaGetLastError() == cudaSuccess && is_product(c, a, b, M, N, K);
}

// ---- The same with ldmatrix and mma: each warp a block of 16x16 ---------------------------------------------------------------
enum { STRIDE = 24 };
template <int BUG> __device__ void load_fragments(uint32_t a[4], uint32_t b[4], const bf16 *at, const bf16 *bt, int lane) {
    bf16 local[8] = {};
    int row = lane % 8 + lane / 8 % 2 * 8, column = lane / 16 * 8 + (BUG == UNALIGNED);
    ldmatrix(a, BUG == NOT_SHARED ? local : at + row * STRIDE + column);
    ldmatrix_transposed(b, bt + row * STRIDE + lane / 16 * 8);
}
template <int BUG> __device__ void load_fragments(float a[8], float b[8], const float *at, const float *bt, int lane) {
    int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 8; i++) {
        a[i] = at[(g + (i / 2 % 2) * 8) * STRIDE + t + i % 2 + i / 4 * 8];
        b[i] = bt[(t + i % 2 + i / 2 % 2 * 8) * STRIDE + g + i / 4 * 8];
    }
}
template <int BUG, typename T> __global__ void mma_kernel(float *out, const T *a, const T *b, int M, int N, int K) {
    SMEM(T, tile, 2 * 2 * 16 * STRIDE);
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    int row = (int)blockIdx.y * 32 + warp * 16, column = (int)blockIdx.x * 16;
    T *at = tile + warp * 2 * 16 * STRIDE, *bt = at + 16 * STRIDE;
    float c[2][4] = {};
    typename std::conditional<sizeof(T) == 2, uint32_t, float>::type af[16 / sizeof(T) * sizeof(T) / 2], bf[8];
    const int half = sizeof(T) == 2 ? 2 : 4;
    for (int k = 0; k < K; k += 16) {
        for (int i = lane; i < 256; i += 32) {
            int y = i / 16, x = i % 16;
            T zero;
            store(&zero, 0);
            at[y * STRIDE + x] = row + y < M && k + x < K ? a[(row + y) * K + k + x] : zero;
            bt[y * STRIDE + x] = k + y < K && column + x < N ? b[(k + y) * N + column + x] : zero;
        }
        if (BUG == PARTIAL_SYNCWARP) __syncwarp(lane < 16 ? 0x0000ffff : 0xffff0000);
        else if (BUG != NO_SYNCWARP) __syncwarp();
        if (BUG == HALF_A_WARP && lane < 16) return;
        load_fragments<BUG>(af, bf, at, bt, lane);
        mma(c[0], af, bf), mma(c[1], af, bf + half);
        __syncwarp();
    }
    for (int i = 0; i < 8; i++) {
        int y = row + lane / 4 + i / 2 % 2 * 8, x = column + lane % 4 * 2 + i % 2 + i / 4 * 8;
        if (y < M && x < N) out[y * N + x] = c[i / 4][i % 4];
    }
}

template <int BUG, typename T> static bool product(void) {
    int M = 45, N = 27, K = 53;
    buffer<T> a((size_t)(M * K)), b((size_t)(K * N));
    buffer<float> c((size_t)(M * N));
    emulator_launch(mma_kernel<BUG, T>, dim3(2, 2), 64, 0, 0, c.device, a.device, b.device, M, N, K);
    return cudaGetLastError() == cudaSuccess && is_product(c, a, b, M, N, K);
}

// ---- Three stages of cp.async: out[t] = Σ over tiles of 256 numbers, some of them other threads' --------------------------------
template <int BUG> __device__ void fetch_tile(float *stage, const float *x, int n, int tile) {
    int i = tile * 256 + (int)threadIdx.x * 4, bytes = n - i >= 4 ? 16 : n > i ? (n - i) * 4 : 0;
    if (BUG == TOO_MANY_BYTES) bytes = 17;
    cp_async(stage + threadIdx.x * 4 + (BUG == UNALIGNED), bytes ? x + i + (BUG == UNALIGNED_SOURCE) : x, bytes);
}
template <int BUG> __global__ void pipeline_kernel(float *out, const float *x, int n) {
    enum { STAGES = 3, BUFFERS = BUG == TOO_FEW_STAGES ? STAGES - 1 : STAGES };
    SMEM(float, stages, BUFFERS * 256);
    int tiles = (n + 255) / 256, t = (int)threadIdx.x;
    float sum = 0;
    for (int i = 0; i < STAGES - 1; i++) fetch_tile<BUG>(stages + i % BUFFERS * 256, x, n, i), cp_async_commit();
    for (int i = 0; i < tiles; i++) {
        cp_async_wait<BUG == NOT_WAITED ? STAGES - 1 : STAGES - 2>();
        if (BUG != NO_BARRIER) __syncthreads();
        for (int j = 0; j < 4; j++) sum += stages[i % BUFFERS * 256 + (t * 5 + j * 64) % 256];
        int next = i + STAGES - 1;
        if (next < tiles || BUG == IN_FLIGHT) fetch_tile<BUG>(stages + next % BUFFERS * 256, x, n, next);
        cp_async_commit();
    }
    if (BUG == NOT_WAITED) cp_async_wait<0>(); // too late
    out[t] = sum;
}
template <int BUG> static bool pipeline(void) {
    int n = 256 * 5 + 131;
    buffer<float> x((size_t)n), out(64);
    emulator_launch(pipeline_kernel<BUG>, 1, 64, 0, 0, out.device, x.device, n);
    bool ok = cudaGetLastError() == cudaSuccess;
    out.fetch();
    for (int t = 0; t < 64; t++) {
        float sum = 0;
        for (int i = 0; i < 6 * 256; i += 256)
            for (int j = 0; j < 4; j++) sum += i + (t * 5 + j * 64) % 256 < n ? x.host[(size_t)(i + (t * 5 + j * 64) % 256)] : 0;
        ok = ok && out.host[(size_t)t] == sum;
    }
    return ok;
}

// ---- Global memory: each moves its neighbour's number, in place -----------------------------------------------------------------
template <int BUG> __global__ void shift_kernel(float *x, const float *from, unsigned *count) {
    unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
    float next = from[BUG == READ_BETWEEN_BLOCKS && t == 63 && blockIdx.x < 2 ? i + 1 : i - t + (t + 1) % blockDim.x];
    if (BUG != BETWEEN_THREADS) __syncthreads();
    x[i] = next;
    if (BUG == BETWEEN_BLOCKS) x[0] = 1;
    atomicAdd(count, t);
}
template <int BUG> static bool shift(void) {
    buffer<float> x(3 * 64);
    buffer<uint32_t> count(1);
    float *host = x.host.data();
    emulator_launch(shift_kernel<BUG>, 3, 64, 0, 0, x.device, BUG == HOST_MEMORY ? host : x.device, count.device);
    bool ok = cudaGetLastError() == cudaSuccess;
    std::vector<float> before = x.host;
    x.fetch();
    for (size_t i = 0; i < x.host.size(); i++) ok = ok && x.host[i] == before[i / 64 * 64 + (i + 1) % 64];
    return ok && count.fetch()[0] == 3 * 63 * 64 / 2;
}

// ---- Warp operations one by one -----------------------------------------------------------------------------------------------
template <typename T> __global__ void shuffles_kernel(T *out, int by, int width) {
    T mine = (T)threadIdx.x;
    out[threadIdx.x * 4] = __shfl_sync(~0u, mine, by, width);
    out[threadIdx.x * 4 + 1] = __shfl_up_sync(~0u, mine, (unsigned)by, width);
    out[threadIdx.x * 4 + 2] = __shfl_down_sync(~0u, mine, (unsigned)by, width);
    out[threadIdx.x * 4 + 3] = __shfl_xor_sync(~0u, mine, by, width);
}
template <typename T> static void test_shuffles(void) {
    for (int width = 2; width <= 32; width *= 4)
        for (int by = 0; by < width; by += 3) {
            buffer<T> out(32 * 4);
            emulator_launch(shuffles_kernel<T>, 1, 32, 0, 0, out.device, by, width);
            out.fetch();
            bool ok = true;
            for (int lane = 0; lane < 32; lane++) { // the CUDA C++ programming guide, warp shuffle functions
                int first = lane / width * width, up = lane - by, down = lane + by, other = lane ^ by;
                int expected[4] = {first + by % width, up < first ? lane : up, down >= first + width ? lane : down,
                                   other >= first + width ? lane : other};
                for (int i = 0; i < 4; i++) ok = ok && out.host[(size_t)(lane * 4 + i)] == (T)expected[i];
            }
            check(ok, "shuffles by %d in width %d, of %zu bytes", by, width, sizeof(T));
        }
}

__global__ void votes_kernel(uint32_t *out) {
    unsigned t = threadIdx.x, high = t % 32 < 8 ? 0x000000ff : 0xffffff00; // the two parts vote apart
    int odd = t % 2, last = t == 69;
    uint32_t found[] = {__ballot_sync(high, odd),         (uint32_t)__any_sync(high, t % 32 == 9),   (uint32_t)__all_sync(high, t % 32 > 8),
                        (uint32_t)__syncthreads_or(last), (uint32_t)__syncthreads_and(!last),         (uint32_t)__syncthreads_count(odd),
                        (uint32_t)__syncthreads_or(0),    (uint32_t)__syncthreads_and(1),             (uint32_t)__all_sync(high, t < 96)};
    for (int i = 0; i < 9; i++) out[t * 9 + (unsigned)i] = found[i];
}
static void test_votes(void) {
    buffer<uint32_t> out(70 * 9); // the last warp has 6 lanes
    emulator_launch(votes_kernel, 1, 70, 0, 0, out.device);
    out.fetch();
    bool ok = true;
    for (uint32_t t = 0; t < 70; t++) {
        bool low = t % 32 < 8;
        uint32_t lanes = t >= 64 ? 0x3f : low ? 0xff : 0xffffff00;
        uint32_t expected[] = {lanes & 0xaaaaaaaa, !low, 0, 1, 0, 35, 0, 1, 1};
        for (uint32_t i = 0; i < 9; i++) ok = ok && out.host[t * 9 + i] == expected[i];
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
// The block that comes last adds what all have written: it knows by an atomic that they have.
__global__ void last_block_kernel(float *parts, unsigned *count, float *sum) {
    SMEM(bool, last, 1);
    parts[blockIdx.x * 32 + threadIdx.x] = 1;
    __threadfence(), __syncthreads();
    if (threadIdx.x == 0) last[0] = atomicAdd(count, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!last[0] || threadIdx.x) return;
    *sum = 0;
    for (unsigned i = 0; i < gridDim.x * 32; i++) *sum += parts[i];
}
static bool last_block(void) {
    buffer<float> parts(5 * 32), sum(1);
    buffer<uint32_t> count(1);
    emulator_launch(last_block_kernel, 5, 32, 0, 0, parts.device, count.device, sum.device);
    return sum.fetch()[0] == 160;
}
// What may not be read yet is NaN: shared memory, in every block, and where a cp.async goes.
__global__ void early_kernel(float *out, const float *x) {
    SMEM(float, to, 4);
    out += blockIdx.x * 3;
    out[0] = to[0], to[0] = 5;
    cp_async(to, x, 16), cp_async_commit();
    out[1] = to[0];
    cp_async_wait<0>();
    out[2] = to[0];
}
static void test_early(void) { // the race build ends the process instead
    buffer<float> out(6), x(4);
    emulator_launch(early_kernel, 2, 1, 0, 0, out.device, x.device);
    out.fetch();
    for (size_t b = 0; b < 6; b += 3)
        check(isnan(out.host[b]) && isnan(out.host[b + 1]) && out.host[b + 2] == x.host[0], "what may not be read is NaN");
}

// ---- Layouts: the PTX ISA, sections "Matrix Fragments for mma.m16n8k16 with floating point type" and "ldmatrix" -------------------
__global__ void ldmatrix_kernel(uint16_t *out) {
    SMEM(uint16_t, rows, 32 * 8);
    unsigned lane = threadIdx.x;
    uint32_t r[4], transposed[4];
    for (unsigned i = 0; i < 8; i++) rows[lane * 8 + i] = (uint16_t)(lane * 8 + i); // matrix · 64 + row · 8 + column
    __syncwarp();
    ldmatrix(r, rows + lane * 8);
    ldmatrix_transposed(transposed, rows + lane * 8);
    memcpy(out + lane * 16, r, 16), memcpy(out + lane * 16 + 8, transposed, 16);
}
template <typename P> __global__ void fragments_kernel(float *c, const P *a, const P *b) { // a and b as the lanes hold them
    const int n = sizeof(P) == 2 ? 2 : 1;
    P al[8], bl[4];
    float cl[4];
    uint32_t ar[4], br[2];
    for (unsigned i = 0; i < 8; i++) al[i] = a[threadIdx.x * 8 + i];
    for (unsigned i = 0; i < 4; i++) bl[i] = b[threadIdx.x * 4 + i], cl[i] = c[threadIdx.x * 4 + i];
    if constexpr (n == 2) memcpy(ar, al, 16), memcpy(br, bl, 8), mma(cl, ar, br);
    else mma(cl, al, bl);
    for (unsigned i = 0; i < 4; i++) c[threadIdx.x * 4 + i] = cl[i];
}
template <typename P> static void test_fragments(const char *type) {
    buffer<P> a(32 * 8), b(32 * 4);
    buffer<float> c(32 * 4);
    float A[16][16], B[16][8], C[16][8];
    for (int lane = 0; lane < 32; lane++) {
        int groupID = lane >> 2, threadID_in_group = lane % 4;
        for (int i = 0; i < 8; i++) {
            int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? groupID : groupID + 8;
            int col = i < 4 ? threadID_in_group * 2 + (i & 0x1) : threadID_in_group * 2 + (i & 0x1) + 8;
            A[row][col] = load(a.host[(size_t)(lane * 8 + i)]);
        }
        for (int i = 0; i < 4; i++) {
            int row = i < 2 ? threadID_in_group * 2 + (i & 0x1) : threadID_in_group * 2 + (i & 0x1) + 8;
            B[row][groupID] = load(b.host[(size_t)(lane * 4 + i)]);
            C[i < 2 ? groupID : groupID + 8][threadID_in_group * 2 + (i & 0x1)] = c.host[(size_t)(lane * 4 + i)];
        }
    }
    emulator_launch(fragments_kernel<P>, 1, 32, 0, 0, c.device, a.device, b.device);
    c.fetch();
    bool ok = true;
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, col = lane % 4 * 2 + (i & 0x1);
            float sum = C[row][col];
            for (int k = 0; k < 16; k++) sum = fmaf(A[row][k], B[k][col], sum);
            ok = ok && c.host[(size_t)(lane * 4 + i)] == sum;
        }
    check(ok, "mma.m16n8k16 of %s: the fragments' layouts, and every bit of the sums", type);
}
static void test_ldmatrix(void) {
    buffer<uint16_t> out(32 * 16);
    emulator_launch(ldmatrix_kernel, 1, 32, 0, 0, out.device);
    out.fetch();
    bool plain = true, transposed = true;
    for (int lane = 0; lane < 32; lane++)
        for (int matrix = 0; matrix < 4; matrix++)
            for (int j = 0; j < 2; j++) { // row 0 goes to threads 0..3, two elements each; row 1 to threads 4..7; …
                int row = lane / 4, col = lane % 4 * 2 + j;
                plain = plain && out.host[(size_t)(lane * 16 + matrix * 2 + j)] == matrix * 64 + row * 8 + col;
                transposed = transposed && out.host[(size_t)(lane * 16 + 8 + matrix * 2 + j)] == matrix * 64 + col * 8 + row;
            }
    check(plain, "ldmatrix"), check(transposed, "ldmatrix.trans");
}

static void test_numbers(void) {
    size_t wrong = 0;
    for (uint32_t high = 0; high < 0x10000; high++)
        for (uint32_t low : std::vector<uint32_t>{0, 1, 0x7fff, 0x8000, 0x8001, 0xffff}) {
            float x = __uint_as_float(high << 16 | low), y = __bfloat162float(__float2bfloat16(x));
            float down = __uint_as_float(high << 16), up = __uint_as_float((high + 1) << 16); // the two bf16 numbers around x
            if (isnan(x)) wrong += !isnan(y);
            else if (isinf(x) || isinf(up)) wrong += !(y == (low >= 0x8000 ? up : down)); // from half way to 2^128 on: infinite
            else {
                double to_down = fabs((double)x - down), to_up = fabs((double)up - x);
                wrong += !(y == (to_down < to_up || (to_down == to_up && high % 2 == 0) ? down : up)) || signbit(y) != signbit(x);
            }
        }
    check(!wrong, "rounding to bf16: %zu wrong", wrong);
    __nv_bfloat162 two = __floats2bfloat162_rn(1, -2);
    check(two.x.bits == 0x3f80 && two.y.bits == 0xc000 && __bfloat1622float2(two).y == -2, "pairs of bf16");
    check(__popc(0xf0f00000) == 8 && __ffs(0) == 0 && __ffs(8) == 4 && __clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0, "bits");
    check(__fdividef(6, 3) == 2 && __fdividef(1, 0x1p127f) == 0 && rsqrtf(4) == .5f && __expf(0) == 1 && __logf(1) == 0, "fast functions");
    check(__float_as_uint(1) == 0x3f800000 && __int_as_float(__float_as_int(-3)) == -3, "bits of numbers");
}

// ---- Orders -----------------------------------------------------------------------------------------------------------------------
__global__ void ticket_kernel(uint32_t *place, unsigned *count) { place[atomicAdd(count, 1u)] = blockIdx.x * blockDim.x + threadIdx.x; }
static std::vector<uint32_t> tickets(void) {
    buffer<uint32_t> place(4 * 96), count(1);
    emulator_launch(ticket_kernel, 4, 96, 0, 0, place.device, count.device);
    return place.fetch();
}
static void test_orders(void) {
    for (int kind = 0; kind < 3; kind++) {
        emulator_order(kind, 7);
        std::vector<uint32_t> first = tickets(), second = tickets();
        emulator_order(kind, 7);
        check(tickets() == first && tickets() == second, "order %d repeats with its seed", kind);
        check((first == second) == (kind == 0), "order %d: launches %s", kind, kind ? "differ" : "are alike");
        emulator_order(kind, 8);
        check((tickets() == first) == (kind == 0), "order %d: seeds %s", kind, kind ? "differ" : "are alike");
        bool whole = true; // a warp's threads follow each other
        for (size_t i = 0; i < first.size(); i += 32)
            for (size_t j = i; j < i + 32; j++) whole = whole && first[j] / 32 == first[i] / 32;
        check(whole == (kind != 1), "order %d: %s warp after another", kind, kind == 1 ? "not one" : "one");
    }
}

// ---- Runtime API ------------------------------------------------------------------------------------------------------------------
__global__ void add_kernel(float *x, float y) { x[threadIdx.x] += y; }
__global__ void too_much_kernel(float *out) {
    SMEM(float, x, 49 * 256 + 1);
    x[threadIdx.x] = 1;
    out[threadIdx.x] = x[threadIdx.x];
}
__global__ void dynamic_kernel(float *out, int n) {
    DYN_SMEM(float, x);
    x[n - 1] = 3, *out = x[n - 1];
}

static void test_graph(void) {
    buffer<float> x(32), y(32), z(32);
    std::vector<float> host = x.host;
    cudaStream_t s;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking);
    bool ok = cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
    emulator_launch(add_kernel, 1, 32, 0, s, x.device, 1.f);
    cudaMemcpyAsync(y.device, x.device, 128, cudaMemcpyDeviceToDevice, s), cudaMemsetAsync(z.device, 0, 128, s);
    emulator_launch(add_kernel, 1, 32, 0, s, z.device, 2.f);
    check(ok && cudaStreamEndCapture(s, &graph) == cudaSuccess && cudaGraphInstantiate(&exec, graph) == cudaSuccess, "capture");
    check(x.fetch() == host && y.fetch() != host, "what is captured does not run");
    for (int i = 0; i < 3; i++) cudaGraphLaunch(exec, s);
    cudaStreamSynchronize(s);
    x.fetch(), y.fetch(), z.fetch();
    for (size_t i = 0; i < 32; i++) ok = ok && x.host[i] == host[i] + 3 && y.host[i] == x.host[i] && z.host[i] == 2;
    check(ok, "a graph, launched three times");
    cudaGraphExecDestroy(exec), cudaGraphDestroy(graph);

    void *p;
    for (int what = 0; what < 5; what++) {
        cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal);
        cudaError_t e = what == 0   ? cudaMalloc(&p, 4)
                        : what == 1 ? cudaFree(x.device)
                        : what == 2 ? cudaMemcpy(y.device, x.device, 4, cudaMemcpyDeviceToDevice)
                        : what == 3 ? cudaStreamSynchronize(s)
                                    : cudaDeviceSynchronize();
        check(e == cudaErrorStreamCaptureUnsupported, "not allowed in a capture: %d", what);
        check(cudaStreamEndCapture(s, &graph) == cudaErrorStreamCaptureInvalidated && !graph, "a broken capture: %d", what);
    }
    check(cudaGetLastError() == cudaErrorStreamCaptureInvalidated && cudaGetLastError() == cudaSuccess, "the last error is told once");

    // What a host forgets to wait for has not happened, except in order 0.
    float *pinned;
    cudaMallocHost(&pinned, 4);
    for (int kind = 0; kind < 3; kind++) {
        emulator_order(kind, 1), *pinned = -1;
        emulator_launch(add_kernel, 1, 32, 0, s, z.device, 1.f);
        cudaMemcpyAsync(pinned, z.device, 4, cudaMemcpyDeviceToHost, s);
        check((*pinned == -1) == (kind > 0), "order %d: work of a stream that nobody waited for", kind);
        cudaStreamSynchronize(s);
        check(*pinned == 3.f + (float)kind, "order %d: work of a stream", kind);
    }
    cudaFreeHost(pinned), cudaStreamDestroy(s);
}

static void test_limits(void) {
    buffer<float> out(1024);
    struct { dim3 grid, block; size_t shared; cudaError_t expected; } launches[] = {
        {1, 1024, 0, cudaSuccess},  {1, 1025, 0, cudaErrorInvalidConfiguration},  {1, dim3(32, 33), 0, cudaErrorInvalidConfiguration},
        {0, 32, 0, cudaErrorInvalidConfiguration},  {1, 0, 0, cudaErrorInvalidConfiguration},
        {1, dim3(1, 1, 65), 0, cudaErrorInvalidConfiguration},  {dim3(1, 65536), 1, 0, cudaErrorInvalidConfiguration},
        {1, 32, 48 * 1024, cudaSuccess},  {1, 32, 48 * 1024 + 1, cudaErrorInvalidValue}};
    for (auto &l : launches) {
        emulator_launch(add_kernel, l.grid, l.block, l.shared, 0, out.device, 1.f);
        check(cudaGetLastError() == l.expected, "launch of %u,%u blocks of %u,%u,%u threads, %zu bytes", l.grid.x, l.grid.y, l.block.x,
              l.block.y, l.block.z, l.shared);
    }
    check(cudaFuncSetAttribute(dynamic_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024 + 1) == cudaErrorInvalidValue &&
              cudaFuncSetAttribute(dynamic_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024) == cudaSuccess, "227 KB");
    emulator_launch(dynamic_kernel, 1, 1, 227 * 1024, 0, out.device, 227 * 256);
    cudaGetLastError();
    check(out.fetch()[0] == 3, "all shared memory there is");

    size_t room, all, less;
    void *p, *q;
    setenv("EMULATOR_MEMORY", "100000", 1);
    cudaMemGetInfo(&room, &all);
    check(all == 100000 && room == 100000 - 4096 && cudaMalloc(&p, room + 1) == cudaErrorMemoryAllocation && !p, "out of memory");
    check(cudaMalloc(&p, room) == cudaSuccess && (uintptr_t)p % 256 == 0 && cudaMalloc(&q, 1) == cudaErrorMemoryAllocation, "all memory");
    cudaMemGetInfo(&less, &all), cudaFree(p), cudaMemGetInfo(&room, &all);
    check(less == 0 && room == 100000 - 4096, "memory given back");
    unsetenv("EMULATOR_MEMORY");
    float x[4];
    check(cudaMemcpy(x, x + 1, 4, cudaMemcpyHostToDevice) == cudaErrorInvalidValue, "a copy to what is no device memory");
    check(cudaMemcpy(out.device + 1, out.device, 4096, cudaMemcpyDeviceToDevice) == cudaErrorInvalidValue, "a copy beyond the end");
    check(cudaMemset(x, 0, 4) == cudaErrorInvalidValue && cudaFree(x) == cudaErrorInvalidValue, "what is no device memory");
    cudaMalloc(&p, 4), cudaMemcpy(x, p, 4, cudaMemcpyDeviceToHost), cudaFree(p);
    check(isnan(x[0]), "new memory holds NaN");
    int count = -1;
    check(cudaGetDeviceCount(&count) == cudaSuccess && count == 1 && cudaSetDevice(1) == cudaErrorInvalidDevice, "one device");
    setenv("EMULATOR_DEVICES", "0", 1);
    check(cudaGetDeviceCount(&count) == cudaErrorNoDevice && !count && cudaMalloc(&p, 4) == cudaErrorNoDevice, "no device");
    unsetenv("EMULATOR_DEVICES"), cudaGetLastError();
    cudaDeviceProp properties;
    check(!cudaGetDeviceProperties(&properties, 0) && properties.major == 9 && !strcmp(properties.name, "emulator"), "properties");
    check(!strcmp(cudaGetErrorName(cudaErrorMemoryAllocation), "cudaErrorMemoryAllocation"), "an error's name");
}
static bool too_much(void) {
    buffer<float> out(32);
    emulator_launch(too_much_kernel, 1, 32, 0, 0, out.device);
    return out.fetch()[0] == 1;
}

// ---- Errors on purpose ------------------------------------------------------------------------------------------------------------
// What must be found in some of a few seeds, in a child process: "" a wrong result; else words of the diagnosis. NULL: nothing, that build
// does not see it. The race build finds in order 0 what the column `race` says; AddressSanitizer likewise.
struct seeded { const char *name; bool (*run)(void); const char *found, *race, *address; };
static const seeded seeded_bugs[] = {
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
    {"write behind a shared array", sums<BEYOND>, "wrote behind the end of parts", "in no array", "AddressSanitizer"},
    {"write far behind a shared array", sums<FAR_BEYOND>, "wrote behind the end of parts", "in no array", "AddressSanitizer"},
    {"read beyond global memory", sums<BEYOND_GLOBAL>, NULL, "no memory of the GPU", "AddressSanitizer"},
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
    {"cp.async of 17 bytes", pipeline<TOO_MANY_BYTES>, "17 bytes", NULL, NULL},
    {"threads race for global memory", shift<BETWEEN_THREADS>, "", "race: ", NULL},
    {"blocks write the same number", shift<BETWEEN_BLOCKS>, "", "race: ", NULL},
    {"a block reads what another writes", shift<READ_BETWEEN_BLOCKS>, NULL, "by another block", NULL},
    {"a lane that took no part in a relay", relay<NO_SYNCWARP>, NULL, "race: ", NULL},
    {"a write after other warps have read", late<NO_BARRIER>, "", "race: ", NULL},
    {"host memory in a kernel", shift<HOST_MEMORY>, NULL, "no memory of the GPU", NULL},
    {"too much static shared memory", too_much, "too much shared memory", NULL, NULL},
};

static bool find(const seeded &bug, const char *text, int kind, uint64_t seed) {
    int ends[2], state;
    char said[8192];
    size_t n = 0;
    fflush(stdout);
    if (pipe(ends)) return false;
    pid_t child = fork();
    if (!child) {
        alarm(20), dup2(ends[1], 2), close(ends[0]);
        emulator_order(kind, seed);
        _exit(bug.run() ? 0 : 1);
    }
    close(ends[1]);
    for (ssize_t got; n + 1 < sizeof said && (got = read(ends[0], said + n, sizeof said - 1 - n)) > 0;) n += (size_t)got;
    said[n] = 0, close(ends[0]), waitpid(child, &state, 0);
    if (getenv("VERBOSE") && n) printf("%s: %s", bug.name, said);
    return WIFEXITED(state) && (*text ? WEXITSTATUS(state) && strstr(said, text) : WEXITSTATUS(state) == 1);
}

int main(void) {
    for (int kind = 0; kind < 3; kind++)
        for (uint64_t seed = 0; seed < (kind ? SEEDS : 1); seed++) {
            emulator_order(kind, seed);
            const char *names[] = {"sums",          "tiles",   "mma, bf16",    "mma, fp32",     "cp.async",
                                   "global memory", "a relay", "a late write", "the last block"};
            bool (*runs[])(void) = {sums<NONE>, tiles<NONE>, product<NONE, bf16>, product<NONE, float>, pipeline<NONE>, shift<NONE>,
                                     relay<NONE>, late<NONE>, last_block};
            for (int i = 0; i < 9; i++) check(runs[i](), "%s in order %d, seed %d", names[i], kind, (int)seed);
            test_shuffles<int>(), test_shuffles<unsigned>(), test_shuffles<float>(), test_shuffles<double>(), test_votes();
            test_fragments<bf16>("bf16"), test_fragments<float>("fp32"), test_ldmatrix();
            if (!RACE) test_early();
        }
    test_numbers(), test_orders(), test_graph(), test_limits();

    for (const seeded &bug : seeded_bugs) {
        const char *special = RACE ? bug.race : ADDRESS ? bug.address : NULL, *text = special ? special : bug.found;
        bool found = !text;
        if (special) found = find(bug, text, 0, 0);
        for (uint64_t seed = 0; !found && !special && seed < SEEDS; seed++)
            for (int kind = 1; kind < 3; kind++) found = found || find(bug, text, kind, seed);
        if (text) check(found, "not found: %s", bug.name);
    }
    return finish("emulator");
}

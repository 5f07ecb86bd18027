/* retrofit_cuda.cu - the operations of retrofit.h on an NVIDIA GPU (compute capability 8.0 and later), in the same order, under the same
   names.

   What an operation computes, its shapes and its contract are told in retrofit.h, above the CPU's operation of the same name. Here stands
   how a GPU does it. Two tables are made of one set of templates: in `retrofit_cuda` the element E of branch activations and matrices is
   bf16, in `retrofit_cuda_fp32` it is float and everything else is the same, so that the algorithms can be checked to fp32's precision.

   How the kernels are made:
     - What only moves memory reads and writes eight elements per thread (load8, store8), 16 bytes at a time where addresses allow it.
     - What multiplies matrices (matmul, attention) copies tiles to shared memory with cp.async, one or more tiles ahead, and multiplies
       16x16 blocks of them with the tensor cores: load_a, load_b, multiply. In fp32 the same blocks are multiplied with plain
   multiply-adds.
     - Every sum has a fixed order: there are no atomics, so the same inputs give the same bits.
     - All work goes to one stream. Nothing allocates: scratch is the workspace, 32 MB, set aside when the device is started.

   Contents
     1  the machine: shared memory, tensor cores, asynchronous copies; tiles and blocks made of them
     2  the device: start, errors, memory, launches, recording
     3  the operations
     4  the tables

   Without nvcc this file compiles as C++ against test/emulator.h, which runs each kernel's threads on the CPU: so it is tested anywhere. */
#include "retrofit.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifndef RETROFIT_NO_CUBLAS
#include <cublasLt.h>
#include <dlfcn.h>
#define WITH_CUBLAS 1
#endif
#else
#include "test/emulator.h"
#define EACH(i, n) for (int i = 0; i < (n); i++)
#define __noinline__
#endif

typedef __nv_bfloat16 bf16;

// =====================================================================================================================
// 1  The machine
// =====================================================================================================================

#ifdef __CUDACC__
#define EACH(i, n)       _Pragma("unroll") for (int i = 0; i < (n); i++) // unrolled: what lies in registers has no index
#define SMEM(E, name, N) __shared__ E name[N]
#define DYN_SMEM(E, name)                                                   \
    extern __shared__ __align__(128) unsigned char dynamic_shared_memory[]; \
    E *name = reinterpret_cast<E *>(dynamic_shared_memory)

static __device__ __forceinline__ unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

// Four 8x8 matrices of 16-bit elements. Lane l says where row l % 8 of matrix l / 8 lies, 16 bytes; r[i] gets elements (g, 2t), (g, 2t + 1)
// of matrix i, where g = lane / 4 and t = lane % 4 here and below. Transposed: elements (2t, g), (2t + 1, g).
static __device__ __forceinline__ void ldmatrix(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
static __device__ __forceinline__ void ldmatrix_transposed(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c (16x8) += a (16x16) · b (16x8), b held by columns. A lane has of c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1); of a, in pairs
// (2t, 2t + 1) of columns: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); of b, in pairs of rows: (2t, g), (2t + 8, g).
static __device__ __forceinline__ void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes from global to shared memory, of which the first `bytes` are copied and the rest become 0, while the thread goes on. A group of
// copies ends with a commit; wait<N> waits for all groups but the latest N.
static __device__ __forceinline__ void cp_async(void *shared, const void *global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)),
                 "r"(bytes)
                 : "memory");
}
static __device__ __forceinline__ void cp_async_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> static __device__ __forceinline__ void cp_async_wait(void) { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
#endif

#if defined __CUDACC__ || defined EMULATOR_NO_MMA_F32
// The same product in fp32, of the very same elements in the same places: each lane gets from the others what its four sums need. Not
// inlined: a kernel has hundreds of them.
static __device__ __noinline__ float4 mma_by_shuffles(float4 c, float4 a_low, float4 a_high, float4 b) {
    float a[8] = {a_low.x, a_low.y, a_low.z, a_low.w, a_high.x, a_high.y, a_high.z, a_high.w}, bs[4] = {b.x, b.y, b.z, b.w};
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    EACH (k, 16) {
        int high = k / 8, owner = k % 8 / 2, odd = k % 2;
        float a0 = __shfl_sync(~0u, a[4 * high + odd], 4 * g + owner), a1 = __shfl_sync(~0u, a[4 * high + 2 + odd], 4 * g + owner);
        float b0 = __shfl_sync(~0u, bs[2 * high + odd], 8 * t + owner), b1 = __shfl_sync(~0u, bs[2 * high + odd], 8 * t + 4 + owner);
        c.x = fmaf(a0, b0, c.x), c.y = fmaf(a0, b1, c.y), c.z = fmaf(a1, b0, c.z), c.w = fmaf(a1, b1, c.w);
    }
    return c;
}
static __device__ __forceinline__ void mma(float c[4], const float a[8], const float b[4]) {
    float4 sum = mma_by_shuffles(make_float4(c[0], c[1], c[2], c[3]), make_float4(a[0], a[1], a[2], a[3]),
                                 make_float4(a[4], a[5], a[6], a[7]), make_float4(b[0], b[1], b[2], b[3]));
    c[0] = sum.x, c[1] = sum.y, c[2] = sum.z, c[3] = sum.w;
}
#endif

// ---- Numbers ----------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float &to, float x) { to = x; }
__device__ __forceinline__ void from_float(bf16 &to, float x) { to = __float2bfloat16(x); }

__device__ __forceinline__ unsigned pack(float x, float y) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    unsigned bits;
    memcpy(&bits, &pair, 4);
    return bits;
}
// ---- Blocks of 16x16, held by a warp ------------------------------------------------------------------------------------------
// A lane's share: four pairs of elements. As a left factor (m, k): pair i is (g + i % 2 · 8, 2t + i / 2 · 8) and the next column. As a
// right factor (k, n): pair i is (2t + i % 2 · 8, g + i / 2 · 8) and the next row: two 16x8 factors of mma side by side.
template <typename E> struct fragment;
template <> struct fragment<bf16> { uint32_t x[4]; };
template <> struct fragment<float> { float x[8]; };

// From a tile in shared memory whose rows are `stride` elements apart, at its element (0, 0). Pair i lies in the 8x8 matrix in row i % 2
// and column i / 2 of the block as it is stored, or the other way round if ACROSS. TRANSPOSED: pairs run down the stored columns.
template <bool TRANSPOSED, bool ACROSS> __device__ __forceinline__ void load_block(fragment<bf16> &f, const bf16 *tile, int stride) {
    int lane = threadIdx.x % 32, i = lane / 8, row = (ACROSS ? i / 2 : i % 2) * 8 + lane % 8, column = (ACROSS ? i % 2 : i / 2) * 8;
    if (TRANSPOSED) ldmatrix_transposed(f.x, tile + row * stride + column);
    else ldmatrix(f.x, tile + row * stride + column);
}
template <bool TRANSPOSED, bool ACROSS> __device__ __forceinline__ void load_block(fragment<float> &f, const float *tile, int stride) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    EACH (i, 4)
        EACH (j, 2) {
            int row = (ACROSS ? i / 2 : i % 2) * 8 + (TRANSPOSED ? 2 * t + j : g);
            int column = (ACROSS ? i % 2 : i / 2) * 8 + (TRANSPOSED ? g : 2 * t + j);
            f.x[2 * i + j] = tile[row * stride + column];
        }
}
// A left factor (m, k), stored so or as (k, m); a right factor (k, n), stored so or as (n, k).
template <bool STORED_K_FIRST, typename E> __device__ __forceinline__ void load_a(fragment<E> &f, const E *tile, int stride) {
    load_block<STORED_K_FIRST, STORED_K_FIRST>(f, tile, stride);
}
template <bool STORED_K_FIRST, typename E> __device__ __forceinline__ void load_b(fragment<E> &f, const E *tile, int stride) {
    load_block<STORED_K_FIRST, !STORED_K_FIRST>(f, tile, stride);
}

// c[0] | c[1] (16x16, as mma lays it out) += a · b
template <typename E> __device__ __forceinline__ void multiply(float (*c)[4], const fragment<E> &a, const fragment<E> &b) {
    mma(c[0], a.x, b.x);
    mma(c[1], a.x, b.x + sizeof b.x / sizeof *b.x / 2);
}

// A product's result as the next product's left factor: the places agree, only the type changes.
__device__ __forceinline__ void as_factor(fragment<float> &f, const float (*c)[4]) {
    EACH (i, 8) f.x[i] = c[i / 4][i % 4];
}
__device__ __forceinline__ void as_factor(fragment<bf16> &f, const float (*c)[4]) {
    EACH (i, 4) f.x[i] = pack(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
}

// ---- Tiles in shared memory -----------------------------------------------------------------------------------------------------
// Their rows are 16 bytes longer than needed: the eight rows that ldmatrix reads then lie in different banks.
template <typename E> __host__ __device__ constexpr int tile_stride(int columns) { return columns + 16 / (int)sizeof(E); }

// Starts to copy a tile. row(r) says where row r lies, NULL: it is all zeros; only its first `width` elements exist, the others are 0.
// aligned: all those addresses are multiples of 16 bytes.
template <int ROWS, int COLUMNS, int BLOCK, typename E, typename F>
__device__ __forceinline__ void load_tile(E *tile, F row, size_t width, bool aligned) {
    constexpr int W = 16 / (int)sizeof(E), CHUNKS = COLUMNS / W;
    static_assert(ROWS * CHUNKS % BLOCK == 0, "every thread copies as much");
    auto exist = [=](const E *from, int c) { return from && (size_t)c < width ? (int)(width - c < W ? width - c : W) : 0; };
    if (aligned) {
#pragma unroll 4
        for (int i = threadIdx.x; i < ROWS * CHUNKS; i += BLOCK) {
            int r = i / CHUNKS, c = i % CHUNKS * W;
            const E *from = row(r);
            int n = exist(from, c);
            cp_async(tile + r * tile_stride<E>(COLUMNS) + c, n ? from + c : (const E *)nullptr, n * (int)sizeof(E));
        }
    } else
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * COLUMNS; i += BLOCK) {
            int r = i / COLUMNS, c = i % COLUMNS;
            const E *from = row(r);
            E *to = tile + r * tile_stride<E>(COLUMNS) + c;
            if (exist(from, c)) *to = from[c];
            else from_float(*to, 0.0f);
        }
}

// ---- Eight numbers at a time ------------------------------------------------------------------------------------------------------
// As they lie in memory, in vectors of 16 bytes.
template <typename E> struct eight;
template <> struct eight<float> { float4 low, high; };
template <> struct eight<bf16> { uint4 pairs; };

__device__ __forceinline__ eight<float> load_eight(const float *p) {
    return {*reinterpret_cast<const float4 *>(p), *reinterpret_cast<const float4 *>(p + 4)};
}
__device__ __forceinline__ eight<bf16> load_eight(const bf16 *p) { return {*reinterpret_cast<const uint4 *>(p)}; }

__device__ __forceinline__ void unpack(float *out, const eight<float> &v) {
    out[0] = v.low.x, out[1] = v.low.y, out[2] = v.low.z, out[3] = v.low.w;
    out[4] = v.high.x, out[5] = v.high.y, out[6] = v.high.z, out[7] = v.high.w;
}
__device__ __forceinline__ void unpack(float *out, const eight<bf16> &v) { // bf16 is the upper half of an fp32
    unsigned pairs[4] = {v.pairs.x, v.pairs.y, v.pairs.z, v.pairs.w};
    EACH (i, 4) out[2 * i] = __uint_as_float(pairs[i] << 16), out[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
}

__device__ __forceinline__ void store_eight(float *p, const float *x) {
    __stwb(reinterpret_cast<float4 *>(p), make_float4(x[0], x[1], x[2], x[3])); // an assignment is sometimes taken apart
    __stwb(reinterpret_cast<float4 *>(p + 4), make_float4(x[4], x[5], x[6], x[7]));
}
__device__ __forceinline__ void store_eight(bf16 *p, const float *x) {
    __stwb(reinterpret_cast<uint4 *>(p), make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])));
}

// out[i] = p[i] as fp32, 0 from `left` on.
template <typename E> __device__ __forceinline__ void load8(float *out, const E *p, size_t left) {
    if (left >= 8 && (uintptr_t)p % 16 == 0) unpack(out, load_eight(p));
    else
        EACH (i, 8) out[i] = (size_t)i < left ? to_float(p[i]) : 0.0f;
}
template <typename E> __device__ __forceinline__ void store8(E *p, const float *x, size_t left) {
    if (left >= 8 && (uintptr_t)p % 16 == 0) store_eight(p, x);
    else
        EACH (i, 8)
            if ((size_t)i < left) from_float(p[i], x[i]);
}
__device__ __forceinline__ int int_min(int a, int b) { return a < b ? a : b; }

// Two neighbours, at an even place.
__device__ __forceinline__ void store2(float *p, float x, float y) { *reinterpret_cast<float2 *>(p) = make_float2(x, y); }
__device__ __forceinline__ void store2(bf16 *p, float x, float y) { *reinterpret_cast<__nv_bfloat162 *>(p) = __floats2bfloat162_rn(x, y); }

// i / n and what remains; a division of 64 bits takes ten times as long as one of 32.
__device__ __forceinline__ size_t divide(size_t i, size_t n, size_t &rest) {
    size_t quotient = i <= 0xffffffffu && n <= 0xffffffffu ? (unsigned)i / (unsigned)n : i / n;
    rest = i - quotient * n;
    return quotient;
}

// The sum of all threads' x, in every thread; all of a block's threads must call it.
template <typename V> __device__ __forceinline__ V block_sum(V x) {
    SMEM(V, parts, 32);
    for (int other = 16; other; other /= 2) x += __shfl_xor_sync(~0u, x, other);
    __syncthreads(); // parts of an earlier call may still be read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    V sum = parts[0];
    for (unsigned i = 1; i < blockDim.x / 32; i++) sum += parts[i];
    return sum;
}
__device__ __forceinline__ float block_largest(float x) {
    SMEM(float, parts, 32);
    for (int other = 16; other; other /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, other));
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float top = parts[0];
    for (unsigned i = 1; i < blockDim.x / 32; i++) top = fmaxf(top, parts[i]);
    return top;
}
// Over the four lanes that share rows of a product's result.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float quad_largest(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// =====================================================================================================================
// 2  The device
// =====================================================================================================================

enum { THREADS = 256, WORKSPACE = 32 << 20 }; // of most kernels' blocks; bytes
static cudaStream_t stream;
static char *workspace;
static cudaDeviceProp device;

// What fails on a GPU once memory is had is a fault of this file or of the machine; it often shows late, so nothing can be saved by going
// on.
static void ensure(cudaError_t e, const char *what) {
    if (e == cudaSuccess) return;
    fprintf(stderr, "retrofit: %s failed on %s: %s\n", what, device.name, cudaGetErrorString(e));
    exit(1);
}

template <typename E> struct same { typedef E type; };
// A kernel's arguments convert to its parameters' types as they would in a call.
template <typename... P>
static void launch(const char *name, void (*kernel)(P...), size_t blocks, unsigned threads, size_t shared,
                   typename same<P>::type... arguments) {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff) ensure(cudaErrorInvalidValue, name);
#ifdef __CUDACC__
    kernel<<<(unsigned)blocks, threads, shared, stream>>>(arguments...);
#else
    emulator_launch(kernel, dim3((unsigned)blocks), dim3(threads), shared, stream, arguments...);
#endif
    ensure(cudaGetLastError(), name);
}
#define LAUNCH(kernel, ...) launch(#kernel, kernel, __VA_ARGS__)

static size_t ceil_of(size_t a, size_t b) { return (a + b - 1) / b; }
static size_t least_of(size_t a, size_t b) { return a < b ? a : b; }
static size_t blocks_of8(size_t n) { return ceil_of(ceil_of(n, 8), THREADS); } // each thread takes eight of n
// The first of the eight elements of n that this thread takes.
__device__ __forceinline__ size_t first_of8(void) { return 8 * ((size_t)blockIdx.x * THREADS + threadIdx.x); }

// Larger shared memory than 48 KB must be asked for, once for every kernel.
template <typename K> static void allow_shared(K *kernel, size_t bytes) {
    ensure(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes), "setting shared memory");
}

__global__ void probe_kernel(void) {}

static bool start(char text[256]) {
    static bool ready;
    if (ready) return snprintf(text, 256, "%s", device.name), true;
    int count = 0;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (e == cudaSuccess && count == 0) e = cudaErrorNoDevice;
    if (e == cudaSuccess) e = cudaGetDeviceProperties(&device, 0);
    if (e == cudaSuccess && device.major < 8)
        return snprintf(text, 256, "%.100s has compute capability %d.%d, 8.0 is needed", device.name, device.major, device.minor), false;
    if (e == cudaSuccess) e = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (e == cudaSuccess) e = cudaMalloc((void **)&workspace, WORKSPACE);
#ifdef __CUDACC__
    if (e == cudaSuccess) probe_kernel<<<1, 1, 0, stream>>>(), e = cudaGetLastError(); // fails if built for other GPUs only
#endif
    if (e == cudaSuccess) return ready = true, snprintf(text, 256, "%s", device.name), true;
    cudaGetLastError();
    snprintf(text, 256, "%.100s%s", cudaGetErrorString(e),
             e == cudaErrorInsufficientDriver       ? ", or there is none"
             : e == cudaErrorNoKernelImageForDevice ? ": make clean, then make on this machine"
                                                    : "");
    return false;
}

static double peak_fp32(void) { return 0; } // of no use: nothing here comes near it

// Multiply-adds of dense bf16 matrices with fp32 sums that a multiprocessor does per clock, times two. The H100's data sheet counts with
// 1.83 GHz, less than the clock the driver tells.
static double peak_bf16(void) {
    int clock = 0, kilohertz = 0, version = device.major * 10 + device.minor;
    if (cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, 0) == cudaSuccess) clock = kilohertz;
    if (version == 90 && clock > 1830000) clock = 1830000;
    double per_clock = version == 80 ? 2048 : version == 90 ? 4096 : version == 100 || version == 103 ? 8192 : 512;
    return per_clock * device.multiProcessorCount * clock * 1e3;
}

static size_t room(void) {
    size_t free_bytes = 0, all;
    ensure(cudaMemGetInfo(&free_bytes, &all), "asking for free memory");
    return free_bytes;
}

static void cuda_zero(void *p, size_t bytes) { ensure(cudaMemsetAsync(p, 0, bytes, stream), "clearing memory"); }

static void *cuda_alloc(size_t bytes) {
    char text[256];
    void *p = NULL;
    if (!start(text)) return retrofit_fail("%s", text), (void *)NULL;
    if (cudaMalloc(&p, bytes ? bytes : 1) != cudaSuccess) {
        cudaGetLastError();
        snprintf(text, sizeof text,
                 "out of memory on %.100s: %.2f GB asked for, %.2f of %.2f GB are free: try fewer tokens at a time, or --device cpu",
                 device.name, (double)bytes / 1e9, (double)room() / 1e9, (double)device.totalGlobalMem / 1e9);
        return retrofit_fail("%s", text), (void *)NULL;
    }
    cuda_zero(p, bytes);
    return p;
}
static void cuda_free(void *p) { ensure(cudaFree(p), "freeing memory"); }
static void cuda_upload(void *to, const void *host, size_t bytes) { // pageable memory is copied aside before the call returns
    ensure(cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, stream), "copying to the GPU");
}
static void cuda_download(void *host, const void *from, size_t bytes) {
    ensure(cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, stream), "copying from the GPU");
    ensure(cudaStreamSynchronize(stream), "an operation before a copy");
}
static void cuda_copy(void *to, const void *from, size_t bytes) {
    ensure(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream), "copying on the GPU");
}

// ---- Recording: a CUDA graph --------------------------------------------------------------------------------------------------------
static void cuda_record(void) { ensure(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording"); }
static void *cuda_recorded(void) {
    cudaGraph_t graph;
    cudaGraphExec_t list;
    ensure(cudaStreamEndCapture(stream, &graph), "recording");
    ensure(cudaGraphInstantiate(&list, graph, 0), "preparing a recording");
    ensure(cudaGraphDestroy(graph), "freeing a recording");
    return list;
}
static void cuda_replay(void *list) { ensure(cudaGraphLaunch((cudaGraphExec_t)list, stream), "replaying"); }
static void cuda_forget(void *list) { ensure(cudaGraphExecDestroy((cudaGraphExec_t)list), "freeing a recording"); }

// =====================================================================================================================
// 3  The operations
// =====================================================================================================================

// ---- Embedding --------------------------------------------------------------------------------------------------------------------
template <typename W> __global__ void embedding_forward_kernel(float *x, const int32_t *tokens, const W *wte, size_t stride, size_t d) {
    const W *row = wte + (size_t)tokens[blockIdx.x] * stride;
    for (size_t c = 8 * threadIdx.x; c < d; c += 8 * THREADS) {
        float v[8];
        load8(v, row + c, d - c);
        store8(x + blockIdx.x * d + c, v, d - c);
    }
}

template <typename E> static void embedding_forward(float *x, const int32_t *tokens, retrofit_weight wte, size_t N, size_t d) {
    if (wte.type == RETROFIT_F32) LAUNCH(embedding_forward_kernel<float>, N, THREADS, 0, x, tokens, (const float *)wte.data, wte.stride, d);
    else LAUNCH(embedding_forward_kernel<bf16>, N, THREADS, 0, x, tokens, (const bf16 *)wte.data, wte.stride, d);
}

// A block for every place; that of a token's first place adds up all its places, in order, and the others have nothing to do.
__global__ void embedding_backward_kernel(float *dwte, const int32_t *tokens, const float *dx, size_t N, size_t d) {
    SMEM(unsigned, places, THREADS / 32); // of the next 256 places, those that hold the token
    int32_t token = tokens[blockIdx.x];
    int earlier = 0;
    for (size_t n = threadIdx.x; n < blockIdx.x; n += THREADS) earlier |= tokens[n] == token;
    if (__syncthreads_or(earlier)) return;
    for (size_t n = blockIdx.x; n < N; n += THREADS) {
        unsigned here = __ballot_sync(~0u, n + threadIdx.x < N && tokens[n + threadIdx.x] == token);
        if (threadIdx.x % 32 == 0) places[threadIdx.x / 32] = here;
        __syncthreads();
        for (int w = 0; w < THREADS / 32; w++)
            for (unsigned left = places[w]; left; left &= left - 1) {
                const float *row = dx + (n + 32 * w + __ffs((int)left) - 1) * d;
                for (size_t c = threadIdx.x; c < d; c += THREADS) dwte[(size_t)token * d + c] += row[c];
            }
        __syncthreads();
    }
}

template <typename E> static void embedding_backward(float *dwte, const int32_t *tokens, const float *dx, size_t N, size_t d) {
    LAUNCH(embedding_backward_kernel, N, THREADS, 0, dwte, tokens, dx, N, d);
}

// ---- RMSNorm: a block for every row ---------------------------------------------------------------------------------------------
template <typename E>
__global__ void rmsnorm_forward_kernel(E *out, float *rstd, const float *x, const float *weight, size_t d, float eps) {
    float squares = 0;
    x += blockIdx.x * d, out += blockIdx.x * d;
    for (size_t c = 8 * threadIdx.x; c < d; c += 8 * THREADS) {
        float v[8];
        load8(v, x + c, d - c);
        for (int i = 0; i < 8; i++) squares += v[i] * v[i];
    }
    float scale = 1.0f / sqrtf(block_sum(squares) / (float)d + eps);
    for (size_t c = 8 * threadIdx.x; c < d; c += 8 * THREADS) {
        float v[8], w[8];
        load8(v, x + c, d - c), load8(w, weight + c, d - c);
        for (int i = 0; i < 8; i++) v[i] *= scale * w[i];
        store8(out + c, v, d - c);
    }
    if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
}

template <typename E>
static void rmsnorm_forward(act *out, float *rstd, const float *x, const float *weight, size_t N, size_t d, float eps) {
    LAUNCH(rmsnorm_forward_kernel<E>, N, THREADS, 0, (E *)out, rstd, x, weight, d, eps);
}

// A block takes every gridDim-th row and adds up its share of dweight, which add_rows_kernel then adds to that of the others.
template <typename E>
__global__ void rmsnorm_backward_kernel(float *dx, float *shares, const E *dout, const float *x, const float *rstd, const float *weight,
                                        size_t N, size_t d) {
    float *share = shares + blockIdx.x * d;
    for (size_t n = blockIdx.x; n < N; n += gridDim.x) {
        float dy[8], v[8], w[8], sum[8], along = 0, r = rstd[n];
        for (size_t c = 8 * threadIdx.x; c < d; c += 8 * THREADS) {
            load8(dy, dout + n * d + c, d - c), load8(v, x + n * d + c, d - c), load8(w, weight + c, d - c);
            for (int i = 0; i < 8; i++) along += dy[i] * w[i] * v[i];
        }
        along = block_sum(along) * r * r / (float)d;
        for (size_t c = 8 * threadIdx.x; c < d; c += 8 * THREADS) {
            load8(dy, dout + n * d + c, d - c), load8(v, x + n * d + c, d - c), load8(w, weight + c, d - c);
            load8(sum, share + c, n < gridDim.x ? 0 : d - c);
            for (int i = 0; i < 8; i++) sum[i] += dy[i] * v[i] * r;
            store8(share + c, sum, d - c);
            load8(sum, dx + n * d + c, d - c);
            for (int i = 0; i < 8; i++) sum[i] += r * (dy[i] * w[i] - v[i] * along);
            store8(dx + n * d + c, sum, d - c);
        }
    }
}

// out (d) += Σ_r rows[r], r in an order of its own but always the same: 32 columns a block, eight threads each.
__global__ void add_rows_kernel(float *out, const float *rows, size_t count, size_t d) {
    SMEM(float, parts, THREADS);
    size_t c = 32 * (size_t)blockIdx.x + threadIdx.x % 32;
    float sum = 0;
    for (size_t r = threadIdx.x / 32; r < count && c < d; r += THREADS / 32) sum += rows[r * d + c];
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= 32 || c >= d) return;
    for (int i = 1; i < THREADS / 32; i++) sum += parts[32 * i + threadIdx.x];
    out[c] += sum;
}

template <typename E>
static void rmsnorm_backward(float *dx, float *dweight, const act *dout, const float *x, const float *rstd, const float *weight, size_t N,
                             size_t d) {
    size_t blocks = least_of(least_of(N, 1024), WORKSPACE / sizeof(float) / d);
    LAUNCH(rmsnorm_backward_kernel<E>, blocks, THREADS, 0, dx, (float *)workspace, (const E *)dout, x, rstd, weight, N, d);
    if (dweight) LAUNCH(add_rows_kernel, ceil_of(d, 32), THREADS, 0, dweight, (const float *)workspace, blocks, d);
}

// ---- Matrix products: c (M,N) = residual + a (M,K) · b (K,N) --------------------------------------------------------------------
// A matrix as it lies in memory: its rows are `row` elements apart. Of a factor either row runs along k: a is (M,K) or (K,M), b is (N,K) or
// (K,N). The three products of a linear layer are the three ways in which that can be.
#ifdef WITH_CUBLAS
// cuBLASLt is half a gigabyte: it is opened when first needed, so that a program on a machine without a GPU, or without it, starts as if it
// were not there.
#define CUBLAS_FUNCTIONS(X)                 \
    X(cublasLtCreate)                       \
    X(cublasLtMatmulDescCreate)             \
    X(cublasLtMatmulDescSetAttribute)       \
    X(cublasLtMatrixLayoutCreate)           \
    X(cublasLtMatmulPreferenceCreate)       \
    X(cublasLtMatmulPreferenceSetAttribute) \
    X(cublasLtMatmulPreferenceDestroy) X(cublasLtMatmulAlgoGetHeuristic) X(cublasLtMatmul) X(cublasLtGetStatusString)
static struct {
    bool tried;
    cublasLtHandle_t handle;
#define X(function) decltype(&::function) function;
    CUBLAS_FUNCTIONS(X)
#undef X
} cublas;

static bool open_cublas(void) {
    if (cublas.tried) return cublas.handle != NULL;
    cublas.tried = true;
    char name[32];
    snprintf(name, sizeof name, "libcublasLt.so.%d", CUDART_VERSION / 1000);
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    bool ok = library != NULL;
#define X(f) ok = ok && (cublas.f = reinterpret_cast<decltype(cublas.f)>(dlsym(library, #f)));
    CUBLAS_FUNCTIONS(X)
#undef X
    if (!ok || cublas.cublasLtCreate(&cublas.handle) != CUBLAS_STATUS_SUCCESS) {
        cublas.handle = NULL;
        fprintf(stderr, "retrofit: %s could not be opened: matrix products by our own kernels, which are slower\n", name);
    }
    return cublas.handle != NULL;
}

// By cuBLASLt, with the algorithm its heuristic names for the shape; both are kept. False if it has none.
static bool by_cublas(bool a_k_first, bool b_k_first, cudaDataType_t type, cudaDataType_t out_type, void *c, size_t c_row,
                      const float *residual, const void *a, size_t a_row, const void *b, size_t b_row, size_t M, size_t N, size_t K) {
    typedef struct {
        size_t M, N, K, a_row, b_row, c_row;
        int form; // of the factors, types and residual
    } shape;
    static struct plan {
        shape of;
        bool usable;
        cublasLtMatmulDesc_t product;
        cublasLtMatrixLayout_t a, b, c;
        cublasLtMatmulAlgo_t algorithm;
    } plans[512];
    static size_t count;
    size_t size = type == CUDA_R_32F ? 4 : 2;
    if (!open_cublas()) return false;
    if ((uintptr_t)a % 16 || (uintptr_t)b % 16 || (uintptr_t)c % 16 || (uintptr_t)residual % 16 || a_row * size % 16 || b_row * size % 16 ||
        c_row % 8)
        return false;
    shape of;
    memset(&of, 0, sizeof of);
    of.M = M, of.N = N, of.K = K, of.a_row = a_row, of.b_row = b_row, of.c_row = c_row;
    of.form = a_k_first | b_k_first << 1 | (type == CUDA_R_32F) << 2 | (out_type == CUDA_R_32F) << 3 | (residual != NULL) << 4;
    struct plan *p = plans;
    while (p < plans + count && memcmp(&p->of, &of, sizeof of)) p++;
    if (p == plans + count) {
        if (count == sizeof plans / sizeof *plans) return false;
        count++, p->of = of;
        cublasLtMatmulPreference_t preference;
        cublasLtMatmulHeuristicResult_t found;
        // cuBLAS counts by columns: to it the row-major c is its transpose (N,M) = bᵀ (N,K) · aᵀ (K,M).
        cublasOperation_t of_b = b_k_first ? CUBLAS_OP_N : CUBLAS_OP_T, of_a = a_k_first ? CUBLAS_OP_T : CUBLAS_OP_N;
        size_t workspace_size = WORKSPACE;
        uint32_t alignment = 16, reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; // parts of a sum are added in fp32, in order
        int results = 0;
        bool ok = !cublas.cublasLtMatmulDescCreate(&p->product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
        ok = ok && !cublas.cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSA, &of_b, sizeof of_b);
        ok = ok && !cublas.cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_TRANSB, &of_a, sizeof of_a);
        ok = ok && !cublas.cublasLtMatrixLayoutCreate(&p->b, type, b_k_first ? N : K, b_k_first ? K : N, (int64_t)b_row);
        ok = ok && !cublas.cublasLtMatrixLayoutCreate(&p->a, type, a_k_first ? M : K, a_k_first ? K : M, (int64_t)a_row);
        ok = ok && !cublas.cublasLtMatrixLayoutCreate(&p->c, out_type, N, M, (int64_t)c_row);
        ok = ok && !cublas.cublasLtMatmulPreferenceCreate(&preference);
        static const cublasLtMatmulPreferenceAttributes_t alignments[] = {
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
        for (int i = 0; ok && i < 4; i++)
            ok = !cublas.cublasLtMatmulPreferenceSetAttribute(preference, alignments[i], &alignment, sizeof alignment);
        ok = ok && !cublas.cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_size,
                                                                sizeof workspace_size);
        ok = ok && !cublas.cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction,
                                                                sizeof reduction);
        if (!ok) ensure(cudaErrorUnknown, "preparing cuBLASLt");
        p->usable =
            !cublas.cublasLtMatmulAlgoGetHeuristic(cublas.handle, p->product, p->b, p->a, p->c, p->c, preference, 1, &found, &results) &&
            results == 1;
        p->algorithm = found.algo;
        cublas.cublasLtMatmulPreferenceDestroy(preference);
    }
    if (!p->usable) return false;
    float one = 1, beta = residual ? 1 : 0;
    cublasStatus_t status =
        cublas.cublasLtMatmul(cublas.handle, p->product, &one, b, p->b, a, p->a, &beta, residual ? (const void *)residual : c, p->c, c,
                              p->c, &p->algorithm, workspace, WORKSPACE, stream);
    if (status != CUBLAS_STATUS_SUCCESS)
        fprintf(stderr, "retrofit: cuBLASLt: %s\n", cublas.cublasLtGetStatusString(status)), ensure(cudaErrorUnknown, "a matrix product");
    return true;
}
template <typename E> struct cuda_type;
template <> struct cuda_type<float> { static const cudaDataType_t value = CUDA_R_32F; };
template <> struct cuda_type<bf16> { static const cudaDataType_t value = CUDA_R_16BF; };
#endif

// Our own. A block of 8 warps makes 128x128 of c, each warp 64x32, going along k by 64 bytes; GEMM_STAGES such tiles of a and b are in
// shared memory, one being multiplied while the others arrive.
enum { GEMM_SIDE = 128, GEMM_STAGES = 4, GEMM_BAND = 8 };
template <typename E> __host__ __device__ constexpr int gemm_depth(void) { return 64 / (int)sizeof(E); }
template <typename E, bool K_FIRST> __host__ __device__ constexpr int gemm_tile_rows(void) {
    return K_FIRST ? gemm_depth<E>() : (int)GEMM_SIDE;
}
template <typename E, bool K_FIRST> __host__ __device__ constexpr int gemm_tile_columns(void) {
    return K_FIRST ? (int)GEMM_SIDE : gemm_depth<E>();
}
template <typename E, bool K_FIRST> __host__ __device__ constexpr int gemm_tile_size(void) {
    return gemm_tile_rows<E, K_FIRST>() * tile_stride<E>(gemm_tile_columns<E, K_FIRST>());
}

// The tile of a factor that holds k from k0 on, and m (or n) from m0 on.
template <bool K_FIRST, typename E>
__device__ __forceinline__ void gemm_load(E *tile, const E *factor, size_t row, size_t m0, size_t M, size_t k0, size_t K, bool aligned) {
    constexpr int ROWS = gemm_tile_rows<E, K_FIRST>(), COLUMNS = gemm_tile_columns<E, K_FIRST>();
    size_t r0 = K_FIRST ? k0 : m0, rows = K_FIRST ? K : M, c0 = K_FIRST ? m0 : k0, columns = K_FIRST ? M : K;
    const E *from = factor + r0 * row + c0;
    load_tile<ROWS, COLUMNS, THREADS>(
        tile, [=](int r) { return r0 + r < rows && c0 < columns ? from + r * row : (const E *)nullptr; }, columns - c0, aligned);
}

template <typename E, bool A_K_FIRST, bool B_K_FIRST, typename OUT>
__global__ void __launch_bounds__(THREADS, 2) gemm_kernel(OUT *c, size_t c_row, const float *residual, const E *a, size_t a_row, const E *b,
                                                          size_t b_row, size_t M, size_t N, size_t K, bool aligned) {
    constexpr int DEPTH = gemm_depth<E>(), A_SIZE = gemm_tile_size<E, A_K_FIRST>(), SIZE = A_SIZE + gemm_tile_size<E, B_K_FIRST>();
    constexpr int A_STRIDE = tile_stride<E>(gemm_tile_columns<E, A_K_FIRST>()),
                  B_STRIDE = tile_stride<E>(gemm_tile_columns<E, B_K_FIRST>());
    DYN_SMEM(E, tiles);
    // (1) which part of c: tiles next to each other in time share rows and columns of a and b, which the second-level cache then holds
    size_t across = (N + GEMM_SIDE - 1) / GEMM_SIDE, down = (M + GEMM_SIDE - 1) / GEMM_SIDE,
           band = blockIdx.x / (GEMM_BAND * across) * GEMM_BAND;
    size_t high = down - band < GEMM_BAND ? down - band : (size_t)GEMM_BAND, in_band = blockIdx.x % (GEMM_BAND * across);
    size_t m0 = (band + in_band % high) * GEMM_SIDE, n0 = in_band / high * GEMM_SIDE, steps = (K + DEPTH - 1) / DEPTH;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m_warp = warp / 4 * 64, n_warp = warp % 4 * 32;

    auto load = [&](size_t step) {
        if (step < steps) {
            E *tile = tiles + step % GEMM_STAGES * SIZE;
            gemm_load<A_K_FIRST>(tile, a, a_row, m0, M, step * DEPTH, K, aligned);
            gemm_load<B_K_FIRST>(tile + A_SIZE, b, b_row, n0, N, step * DEPTH, K, aligned);
        }
        cp_async_commit();
    };
    // (2) along k
    float sum[4][4][4] = {};
    for (size_t step = 0; step + 1 < GEMM_STAGES; step++) load(step);
    for (size_t step = 0; step < steps; step++) {
        cp_async_wait<GEMM_STAGES - 2>();
        __syncthreads(); // this step's tile is there, and nobody reads the last one's, which makes room for the next to load
        load(step + GEMM_STAGES - 1);
        const E *a_tile = tiles + step % GEMM_STAGES * SIZE, *b_tile = a_tile + A_SIZE;
        EACH (piece, DEPTH / 16) {
            int k = 16 * piece;
            fragment<E> fa[4], fb[2];
            EACH (i, 4)
                load_a<A_K_FIRST>(fa[i], a_tile + (A_K_FIRST ? k * A_STRIDE + m_warp + 16 * i : (m_warp + 16 * i) * A_STRIDE + k),
                                  A_STRIDE);
            EACH (j, 2)
                load_b<B_K_FIRST>(fb[j], b_tile + (B_K_FIRST ? k * B_STRIDE + n_warp + 16 * j : (n_warp + 16 * j) * B_STRIDE + k),
                                  B_STRIDE);
            EACH (i, 4)
                EACH (j, 2) multiply(&sum[i][2 * j], fa[i], fb[j]);
        }
    }
    cp_async_wait<0>();
    // (3) to memory
    EACH (i, 4)
        EACH (half, 2)
            EACH (j, 4) {
                size_t m = m0 + m_warp + 16 * i + lane / 4 + 8 * half, n = n0 + n_warp + 8 * j + lane % 4 * 2, at = m * c_row + n;
                if (m >= M || n >= N) continue;
                float x = sum[i][j][2 * half], y = sum[i][j][2 * half + 1];
                bool both = n + 1 < N;
                if (residual) x += residual[at], y += both ? residual[at + 1] : 0;
                if (both && c_row % 2 == 0) store2(c + at, x, y);
                else {
                    from_float(c[at], x);
                    if (both) from_float(c[at + 1], y);
                }
            }
}

// A product with up to ROWS rows of a, decoding: every element of b (N,K) is needed but once for each, so reading b is all the cost. A warp
// for each of its rows. vectors: rows begin at multiples of 16 bytes and have a multiple of 8 elements.
template <typename E, typename OUT, int ROWS>
__global__ void few_rows_kernel(OUT *c, size_t c_row, const float *residual, const E *a, size_t a_row, const E *b, size_t b_row, size_t M,
                                size_t N, size_t K, bool vectors) {
    size_t n = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum[ROWS] = {};
    if (n >= N) return;
    const E *w = b + n * b_row;
    if (vectors) {
        constexpr int AHEAD = ROWS > 4 ? 2 : 4; // loads of b under way at a time
        for (size_t k0 = 8 * lane; k0 < K; k0 += 256 * AHEAD) {
            eight<E> wk[AHEAD];
            EACH (j, AHEAD) wk[j] = load_eight(w + (k0 + 256 * j < K ? k0 + 256 * j : k0));
            EACH (j, AHEAD) {
                float y[8], x[8];
                unpack(y, wk[j]);
                if (k0 + 256 * j < K)
                    EACH (m, ROWS) {
                        unpack(x, load_eight(a + (m < (int)M ? m : 0) * a_row + k0 + 256 * j));
                        EACH (i, 8) sum[m] += y[i] * x[i];
                    }
            }
        }
    } else
        for (size_t k = lane; k < K; k += 32)
            for (int m = 0; m < ROWS && m < (int)M; m++) sum[m] += to_float(w[k]) * to_float(a[m * a_row + k]);
    EACH (m, ROWS) {
        for (int other = 16; other; other /= 2) sum[m] += __shfl_xor_sync(~0u, sum[m], other);
        if (lane == 0 && m < (int)M) from_float(c[m * c_row + n], sum[m] + (residual ? residual[m * c_row + n] : 0));
    }
}

template <typename E, bool A_K_FIRST, bool B_K_FIRST, typename OUT>
static void gemm(OUT *c, size_t c_row, const float *residual, const E *a, size_t a_row, const E *b, size_t b_row, size_t M, size_t N,
                 size_t K) {
    bool aligned = (uintptr_t)a % 16 == 0 && (uintptr_t)b % 16 == 0 && a_row * sizeof(E) % 16 == 0 && b_row * sizeof(E) % 16 == 0;
    if constexpr (!A_K_FIRST && !B_K_FIRST)
        if (M <= 8) {
            size_t blocks = ceil_of(N, THREADS / 32);
            bool vectors = aligned && K % 8 == 0;
            if (M == 1) LAUNCH((few_rows_kernel<E, OUT, 1>), blocks, THREADS, 0, c, c_row, residual, a, a_row, b, b_row, M, N, K, vectors);
            else if (M <= 4)
                LAUNCH((few_rows_kernel<E, OUT, 4>), blocks, THREADS, 0, c, c_row, residual, a, a_row, b, b_row, M, N, K, vectors);
            else LAUNCH((few_rows_kernel<E, OUT, 8>), blocks, THREADS, 0, c, c_row, residual, a, a_row, b, b_row, M, N, K, vectors);
            return;
        }
#ifdef WITH_CUBLAS
    if (by_cublas(A_K_FIRST, B_K_FIRST, cuda_type<E>::value, cuda_type<OUT>::value, c, c_row, residual, a, a_row, b, b_row, M, N, K))
        return;
#endif
    constexpr size_t bytes = GEMM_STAGES * (gemm_tile_size<E, A_K_FIRST>() + gemm_tile_size<E, B_K_FIRST>()) * sizeof(E);
    static bool allowed;
    if (!allowed) allow_shared(gemm_kernel<E, A_K_FIRST, B_K_FIRST, OUT>, bytes), allowed = true;
    LAUNCH((gemm_kernel<E, A_K_FIRST, B_K_FIRST, OUT>), ceil_of(M, GEMM_SIDE) * ceil_of(N, GEMM_SIDE), THREADS, bytes, c, c_row, residual,
           a, a_row, b, b_row, M, N, K, aligned);
}

template <typename E> static void matmul_forward(act *out, const act *inp, retrofit_weight w, size_t N, size_t I, size_t O) {
    gemm<E, false, false>((E *)out, O, NULL, (const E *)inp, I, (const E *)w.data, w.stride, N, O, I);
}

template <typename E>
static void matmul_residual_forward(float *out, const float *residual, const act *inp, retrofit_weight w, size_t N, size_t I, size_t O) {
    gemm<E, false, false>(out, O, residual, (const E *)inp, I, (const E *)w.data, w.stride, N, O, I);
}

template <typename E> static void matmul_backward_input(act *dinp, const act *dout, retrofit_weight w, size_t N, size_t I, size_t O) {
    gemm<E, false, true>((E *)dinp, I, NULL, (const E *)dout, O, (const E *)w.data, w.stride, N, I, O);
}

template <typename E>
static void matmul_residual_backward_input(float *dinp, const act *dout, retrofit_weight w, size_t N, size_t I, size_t O) {
    gemm<E, false, true>(dinp, I, NULL, (const E *)dout, O, (const E *)w.data, w.stride, N, I, O);
}

template <typename E>
static void matmul_backward_weight(float *dw, size_t stride, const act *dout, const act *inp, size_t N, size_t I, size_t O) {
    gemm<E, true, true>(dw, stride, dw, (const E *)dout, O, (const E *)inp, I, O, I, N);
}

// ---- RoPE: a thread turns eight pairs -------------------------------------------------------------------------------------------
template <typename E>
__global__ void rotate_kernel(E *qkv, const float *table, const int32_t *past, size_t B, size_t T, size_t H, size_t G, size_t h,
                              float sign) {
    size_t half = h / 2, i = (size_t)blockIdx.x * THREADS + threadIdx.x, t, head, p;
    if (i >= B * T * (H + G) * ((half + 7) / 8)) return;
    size_t n = divide(divide(i, (half + 7) / 8, p), H + G, head), b = divide(n, T, t), left = half - (p *= 8);
    size_t position = (past ? (size_t)past[b] : 0) + t;
    E *lo = qkv + n * (H + 2 * G) * h + head * h + p, *hi = lo + half;
    float low[8], high[8], angles[16];
    load8(low, lo, left), load8(high, hi, left);
    load8(angles, table + position * h + 2 * p, 2 * left),
        load8(angles + 8, table + position * h + 2 * p + 8, 2 * left > 8 ? 2 * left - 8 : 0);
    for (int j = 0; j < 8; j++) {
        float x = low[j], y = high[j], c = angles[2 * j], s = sign * angles[2 * j + 1];
        low[j] = x * c - y * s, high[j] = y * c + x * s;
    }
    store8(lo, low, left), store8(hi, high, left);
}

template <typename E>
static void rope_forward(act *qkv, const float *table, const int32_t *past, size_t B, size_t T, size_t H, size_t G, size_t h) {
    LAUNCH(rotate_kernel<E>, ceil_of(B * T * (H + G) * ceil_of(h / 2, 8), THREADS), THREADS, 0, (E *)qkv, table, past, B, T, H, G, h, 1.0f);
}

template <typename E> static void rope_backward(act *dqkv, const float *table, size_t B, size_t T, size_t H, size_t G, size_t h) {
    LAUNCH(rotate_kernel<E>, ceil_of(B * T * (H + G) * ceil_of(h / 2, 8), THREADS), THREADS, 0, (E *)dqkv, table, NULL, B, T, H, G, h,
           -1.0f);
}

// ---- Attention: FlashAttention-2 (Dao 2023) on tensor cores ---------------------------------------------------------------------
// The H/G query heads that read the same keys and values are treated together: row r of a tile is token r / group, head g·group + r % group
// (group = H/G), so that a tile of keys is read once for all of them and the diagonal cuts off few scores. A warp owns 16 rows of a
// product's result, so softmax needs the four lanes of a row only. D: the head size rounded up to 32, 64 or 128; what is beyond h is 0.
constexpr float LOG2E = 1.44269504f; // exponentials are taken to base 2
// The rows of one (b,g). Row r's token, counted from the sequence's first, is found by a multiplication: exact as long as r·group < 2^32.
struct packed_rows {
    int group, count;
    size_t first, head0, H; // the sequence's first token, the group's first head
    uint64_t inverse;
    __device__ packed_rows(size_t b, size_t g, size_t T, size_t H, size_t G)
        : group((int)(H / G)), count((int)T * group), first(b * T), head0(g * (H / G)), H(H), inverse(((uint64_t)1 << 32) / (H / G) + 1) {}
    __device__ int token(int r) const { return (int)((uint64_t)r * inverse >> 32); }
    __device__ size_t head(int r) const { return head0 + (r - token(r) * group); }
    __device__ size_t at(int r) const { return (first + token(r)) * H + head(r); } // in (N,H)
    // Where its h numbers lie in qkv (N,Q) and in (N,d); NULL behind the last row.
    template <typename E> __device__ const E *query(const E *qkv, int r, size_t Q, size_t h) const {
        return r < count ? qkv + (first + token(r)) * Q + head(r) * h : (const E *)nullptr;
    }
    template <typename E> __device__ const E *output(const E *out, int r, size_t h) const {
        return r < count ? out + at(r) * h : (const E *)nullptr;
    }
};
template <typename E> __host__ __device__ constexpr int key_tile(void) { return sizeof(E) == 2 ? 64 : 32; }

// Scores to probabilities: row i of a warp's block of scores s (16 x 8·TILES) as mma lays it out, i = 0: row g, 1: row g + 8; what the row
// has seen before, of which the largest score and the sum of exponentials are kept, is to be scaled by the factor returned.
template <int TILES> __device__ __forceinline__ float softmax_row(float (*s)[4], int i, float scale, float &largest, float &sum) {
    float top = largest;
    EACH (j, TILES) top = fmaxf(top, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
    top = quad_largest(top);
    float base = top == -INFINITY ? 0 : top * scale, shrink = exp2f(largest * scale - base),
          more = 0; // no key seen yet: -inf - -inf is no number
    EACH (j, TILES) {
        s[j][2 * i] = exp2f(s[j][2 * i] * scale - base), s[j][2 * i + 1] = exp2f(s[j][2 * i + 1] * scale - base);
        more += s[j][2 * i] + s[j][2 * i + 1];
    }
    sum = sum * shrink + more, largest = top;
    return shrink;
}

// Queries `seen` (past[b], or 0) positions behind the first key, against keys and values kv_row apart, kv_batch from one sequence to the
// next. A block takes 16·M·WARPS rows of one (b,g) against one of `splits` parts of the keys; if there are several, it leaves its share of
// the output and what softmax needs to join the shares, h + 2 numbers a row.
template <typename E, int D, int WARPS, int M>
__global__ void __launch_bounds__(32 * WARPS)
    attention_kernel(E *out, float *lse, float *shares, const E *q, const E *k, const E *v, size_t kv_row, size_t kv_batch,
                     const int32_t *past, size_t B, size_t T, size_t H, size_t G, size_t h, unsigned splits, bool aligned) {
    constexpr int ROWS = 16 * M * WARPS, KEYS = key_tile<E>(), STRIDE = tile_stride<E>(D);
    DYN_SMEM(E, q_tile);
    E *kv_tiles = q_tile + ROWS * STRIDE; // [2][keys, values]
    unsigned split = blockIdx.x % splits, pair = blockIdx.x / splits % (unsigned)(B * G), tiles = gridDim.x / (splits * (unsigned)(B * G));
    size_t b = pair / G, g = pair % G, Q = (H + 2 * G) * h;
    packed_rows packed(b, g, T, H, G);
    int rows = packed.count, seen = past ? past[b] : 0;
    int row0 = (int)(tiles - 1 - blockIdx.x / splits / (unsigned)(B * G)) * ROWS; // the longest first
    int end = seen + packed.token(int_min(row0 + ROWS, rows) - 1) + 1;            // behind the last key any of the rows sees
    int part = (end + KEYS * (int)splits - 1) / (KEYS * (int)splits) * KEYS, from = int_min(part * (int)split, end),
        to = int_min(from + part, end);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = row0 + 16 * M * warp; // the warp's first row
    k += b * kv_batch + g * h, v += b * kv_batch + g * h;

    auto load_kv = [&](int u0, int stage) {
        E *tile = kv_tiles + stage * 2 * KEYS * STRIDE;
        auto at = [=](const E *x) { return [=](int r) { return u0 + r < to ? x + (u0 + r) * kv_row : (const E *)nullptr; }; };
        load_tile<KEYS, D, 32 * WARPS>(tile, at(k), h, aligned);
        load_tile<KEYS, D, 32 * WARPS>(tile + KEYS * STRIDE, at(v), h, aligned);
    };
    load_tile<ROWS, D, 32 * WARPS>(
        q_tile, [=](int r) { return packed.query(q, row0 + r, Q, h); }, h, aligned);
    load_kv(from, 0);
    cp_async_commit();

    fragment<E> fq[M][D / 16];
    float o[M][D / 8][4] = {}, largest[M][2], sum[M][2] = {}, scale = LOG2E / sqrtf((float)h);
    int sees[M][2]; // the last key a row sees
    EACH (m, M)
        for (int i = 0; i < 2; i++) largest[m][i] = -INFINITY, sees[m][i] = seen + packed.token(first + 16 * m + lane / 4 + 8 * i);
    for (int u0 = from, stage = 0; u0 < to; u0 += KEYS, stage ^= 1) {
        if (u0 + KEYS < to) load_kv(u0 + KEYS, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const E *k_tile = kv_tiles + stage * 2 * KEYS * STRIDE, *v_tile = k_tile + KEYS * STRIDE;
        if (u0 == from)
            EACH (m, M)
                EACH (c, D / 16) load_a<false>(fq[m][c], q_tile + (16 * (M * warp + m)) * STRIDE + 16 * c, STRIDE);
        // (1) scores of the tile
        float s[M][KEYS / 8][4] = {};
        EACH (c, D / 16)
            EACH (j, KEYS / 16) {
                fragment<E> fk;
                load_b<false>(fk, k_tile + 16 * j * STRIDE + 16 * c, STRIDE);
                EACH (m, M) multiply(&s[m][2 * j], fq[m][c], fk);
            }
        // (2) what a row may not see, where the tile reaches the diagonal
        if (u0 + KEYS > seen + packed.token(first) + 1)
            EACH (m, M)
                EACH (j, KEYS / 8)
                    EACH (e, 4)
                        if (u0 + 8 * j + lane % 4 * 2 + e % 2 > sees[m][e / 2]) s[m][j][e] = -INFINITY;
        // (3) probabilities; what was summed up under a smaller maximum is scaled down
        EACH (m, M)
            EACH (i, 2) {
                float shrink = softmax_row<KEYS / 8>(s[m], i, scale, largest[m][i], sum[m][i]);
                EACH (c, D / 8) o[m][c][2 * i] *= shrink, o[m][c][2 * i + 1] *= shrink;
            }
        // (4) the tile's share of the output
        EACH (j, KEYS / 16) {
            fragment<E> fp[M], fv;
            EACH (m, M) as_factor(fp[m], &s[m][2 * j]);
            EACH (c, D / 16) {
                load_b<true>(fv, v_tile + 16 * j * STRIDE + 16 * c, STRIDE);
                EACH (m, M) multiply(&o[m][2 * c], fp[m], fv);
            }
        }
        __syncthreads(); // the tile after the next may come
    }
    cp_async_wait<0>();
    EACH (m, M)
        EACH (i, 2) {
            int r = first + 16 * m + lane / 4 + 8 * i;
            float total = quad_sum(sum[m][i]);
            if (r >= rows) continue;
            size_t at = packed.at(r);
            float *mine = shares + ((size_t)split * B * G * rows + (size_t)pair * rows + r) * (h + 2);
            EACH (c, D / 8) {
                size_t column = 8 * c + lane % 4 * 2;
                if (column >= h) continue;
                if (splits > 1) store2(mine + column, o[m][c][2 * i], o[m][c][2 * i + 1]);
                else store2(out + at * h + column, o[m][c][2 * i] / total, o[m][c][2 * i + 1] / total);
            }
            if (lane % 4 == 0 && splits > 1) store2(mine + h, largest[m][i] * scale, total);
            if (lane % 4 == 0 && lse) lse[at] = (largest[m][i] * scale) / LOG2E + logf(total);
        }
}

// Joins the shares of a row: a warp for each.
template <typename E>
__global__ void attention_join_kernel(E *out, const float *shares, size_t B, size_t T, size_t H, size_t G, size_t h, unsigned splits) {
    size_t row = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32, all = B * T * H, group = H / G, rows = T * group;
    if (row >= all) return;
    size_t pair = row / rows, r = row % rows, at = ((pair / G * T + r / group) * H + pair % G * group + r % group) * h;
    float top = -INFINITY, total = 0;
    for (unsigned i = 0; i < splits; i++) top = fmaxf(top, shares[(i * all + row) * (h + 2) + h]);
    if (top == -INFINITY) top = 0;
    for (unsigned i = 0; i < splits; i++)
        total += exp2f(shares[(i * all + row) * (h + 2) + h] - top) * shares[(i * all + row) * (h + 2) + h + 1];
    for (size_t c = threadIdx.x % 32; c < h; c += 32) {
        float sum = 0;
        for (unsigned i = 0; i < splits; i++)
            sum += exp2f(shares[(i * all + row) * (h + 2) + h] - top) * shares[(i * all + row) * (h + 2) + c];
        from_float(out[at + c], sum / total);
    }
}

template <typename E, int D, int WARPS, int M>
static void attend_with(E *out, float *lse, const E *q, const E *k, const E *v, size_t kv_row, size_t kv_batch, const int32_t *past,
                        size_t B, size_t T, size_t H, size_t G, size_t h, unsigned splits) {
    constexpr size_t ROWS = 16 * M * WARPS, bytes = (ROWS + 4 * key_tile<E>()) * tile_stride<E>(D) * sizeof(E);
    static bool allowed;
    if (!allowed) allow_shared(attention_kernel<E, D, WARPS, M>, bytes), allowed = true;
    bool aligned = ((uintptr_t)q | (uintptr_t)k | (uintptr_t)v | h * sizeof(E)) % 16 == 0;
    LAUNCH((attention_kernel<E, D, WARPS, M>), ceil_of(T * (H / G), ROWS) * B * G * splits, 32 * WARPS, bytes, out, lse, (float *)workspace,
           q, k, v, kv_row, kv_batch, past, B, T, H, G, h, splits, aligned);
    if (splits > 1)
        LAUNCH(attention_join_kernel<E>, ceil_of(B * T * H, THREADS / 32), THREADS, 0, out, (const float *)workspace, B, T, H, G, h,
               splits);
}

// keys: the most that any query may see.
template <typename E, int D>
static void attend(E *out, float *lse, const E *q, const E *k, const E *v, size_t kv_row, size_t kv_batch, const int32_t *past, size_t keys,
                   size_t B, size_t T, size_t H, size_t G, size_t h) {
    constexpr int M = sizeof(E) == 2 && D <= 64 ? 2 : 1;
    if (T * (H / G) > 16) return attend_with<E, D, 4, M>(out, lse, q, k, v, kv_row, kv_batch, past, B, T, H, G, h, 1);
    // Decoding: few rows, so the keys are divided until there is work for the whole GPU.
    size_t splits = least_of(ceil_of(keys, key_tile<E>()), ceil_of(4 * (size_t)device.multiProcessorCount, B * G));
    splits = least_of(splits, WORKSPACE / sizeof(float) / (B * T * H * (h + 2)));
    attend_with<E, D, 1, 1>(out, lse, q, k, v, kv_row, kv_batch, past, B, T, H, G, h, lse || splits == 0 ? 1 : (unsigned)splits);
}

#define BY_HEAD_SIZE(h, call, ...)                    \
    do {                                              \
        if ((h) <= 32) call<E, 32>(__VA_ARGS__);      \
        else if ((h) <= 64) call<E, 64>(__VA_ARGS__); \
        else call<E, 128>(__VA_ARGS__);               \
    } while (0)

template <typename E>
static void attention_forward(act *out, float *lse, const act *qkv, size_t B, size_t T, size_t H, size_t G, size_t h) {
    const E *q = (const E *)qkv, *k = q + H * h;
    size_t Q = (H + 2 * G) * h;
    BY_HEAD_SIZE(h, attend, (E *)out, lse, q, k, k + G * h, Q, T * Q, NULL, T, B, T, H, G, h);
}

// delta (N,H) = Σ_c dout·out: a warp for each.
template <typename E> __global__ void attention_delta_kernel(float *delta, const E *dout, const E *out, size_t count, size_t h) {
    size_t i = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (i >= count) return;
    float sum = 0;
    for (size_t c = threadIdx.x % 32; c < h; c += 32) sum += to_float(dout[i * h + c]) * to_float(out[i * h + c]);
    for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
    if (threadIdx.x % 32 == 0) delta[i] = sum;
}

// dK = dSᵀ·Q, dV = Pᵀ·dO: a block for 64 keys, a warp for 16 of them, going over the rows of queries that see them. Everything is turned by
// a quarter, scores are k·qᵀ, so that Pᵀ and dSᵀ come out where the next products want their left factors; k and v stay in registers.
template <typename E, int D>
__global__ void __launch_bounds__(128)
    attention_backward_kv_kernel(E *dqkv, const E *dout, const E *qkv, const float *lse, const float *delta, size_t B, size_t T, size_t H,
                                 size_t G, size_t h, bool aligned) {
    constexpr int KEYS = 64, ROWS = sizeof(E) == 2 && D <= 64 ? 64 : 32, STRIDE = tile_stride<E>(D);
    DYN_SMEM(E, tiles);               // [2][queries, dout], at first keys and values
    SMEM(float, stats, 2 * 2 * ROWS); // [2][lse, delta] of their rows
    unsigned pair = blockIdx.x % (unsigned)(B * G);
    size_t b = pair / G, g = pair % G, Q = (H + 2 * G) * h;
    packed_rows packed(b, g, T, H, G);
    int rows = packed.count, u0 = (int)(blockIdx.x / (unsigned)(B * G)) * KEYS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const E *k = qkv + b * T * Q + (H + g) * h;

    auto key_row = [=](const E *x) { return [=](int r) { return u0 + r < (int)T ? x + (u0 + r) * Q : (const E *)nullptr; }; };
    load_tile<KEYS, D, 128>(tiles, key_row(k), h, aligned);
    load_tile<KEYS, D, 128>(tiles + KEYS * STRIDE, key_row(k + G * h), h, aligned);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    fragment<E> fk[D / 16], fv[D / 16];
    EACH (c, D / 16) {
        load_a<false>(fk[c], tiles + 16 * warp * STRIDE + 16 * c, STRIDE);
        load_a<false>(fv[c], tiles + (KEYS + 16 * warp) * STRIDE + 16 * c, STRIDE);
    }
    __syncthreads();

    auto load_rows = [&](int r0, int stage) {
        E *tile = tiles + stage * 2 * ROWS * STRIDE;
        load_tile<ROWS, D, 128>(
            tile, [=](int r) { return packed.query(qkv, r0 + r, Q, h); }, h, aligned);
        load_tile<ROWS, D, 128>(
            tile + ROWS * STRIDE, [=](int r) { return packed.output(dout, r0 + r, h); }, h, aligned);
        for (int r = threadIdx.x; r < ROWS; r += 128) {
            size_t at = packed.at(r0 + r < rows ? r0 + r : 0);
            stats[(2 * stage) * ROWS + r] = lse[at] * LOG2E, stats[(2 * stage + 1) * ROWS + r] = delta[at];
        }
    };
    float dk[D / 8][4] = {}, dv[D / 8][4] = {}, root = 1.0f / sqrtf((float)h), scale = LOG2E * root;
    int key = u0 + 16 * warp + lane / 4, from = u0 * packed.group / ROWS * ROWS;
    load_rows(from, 0);
    cp_async_commit();
    for (int r0 = from, stage = 0; r0 < rows; r0 += ROWS, stage ^= 1) {
        if (r0 + ROWS < rows) load_rows(r0 + ROWS, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const E *q_tile = tiles + stage * 2 * ROWS * STRIDE, *do_tile = q_tile + ROWS * STRIDE;
        const float *lse_row = stats + 2 * stage * ROWS, *delta_row = lse_row + ROWS;
        // (1) scores and dP, both turned: (keys, rows)
        float p[ROWS / 8][4] = {}, ds[ROWS / 8][4] = {};
        EACH (c, D / 16)
            EACH (j, ROWS / 16) {
                fragment<E> fq, fo;
                load_b<false>(fq, q_tile + 16 * j * STRIDE + 16 * c, STRIDE);
                load_b<false>(fo, do_tile + 16 * j * STRIDE + 16 * c, STRIDE);
                multiply(&p[2 * j], fk[c], fq);
                multiply(&ds[2 * j], fv[c], fo);
            }
        // (2) P again, from the log-sum-exp; dS. A key is seen by a row if key <= row / group.
        bool edge = (u0 + KEYS - 1) * packed.group > r0 || r0 + ROWS > rows;
        EACH (j, ROWS / 8)
            EACH (e, 4) {
                int r = 8 * j + lane % 4 * 2 + e % 2;
                bool seen = !edge || ((key + e / 2 * 8) * packed.group <= r0 + r && r0 + r < rows);
                float x = exp2f(p[j][e] * scale - lse_row[r]);
                p[j][e] = seen ? x : 0.0f;
                ds[j][e] = seen ? x * (ds[j][e] - delta_row[r]) * root : 0.0f;
            }
        // (3) the tile's share of dV and dK
        EACH (j, ROWS / 16) {
            fragment<E> fp, fds, fq, fo;
            as_factor(fp, &p[2 * j]), as_factor(fds, &ds[2 * j]);
            EACH (c, D / 16) {
                load_b<true>(fo, do_tile + 16 * j * STRIDE + 16 * c, STRIDE);
                load_b<true>(fq, q_tile + 16 * j * STRIDE + 16 * c, STRIDE);
                multiply(&dv[2 * c], fp, fo);
                multiply(&dk[2 * c], fds, fq);
            }
        }
        __syncthreads();
    }
    cp_async_wait<0>();
    EACH (i, 2)
        EACH (c, D / 8) {
            size_t column = 8 * c + lane % 4 * 2;
            if (key + 8 * i >= (int)T || column >= h) continue;
            E *to = dqkv + (b * T + key + 8 * i) * Q + (H + g) * h + column;
            store2(to, dk[c][2 * i], dk[c][2 * i + 1]), store2(to + G * h, dv[c][2 * i], dv[c][2 * i + 1]);
        }
}

// dQ = dS·K: a block for 64 rows of queries, going over the keys they see. It makes P and dS a second time: the price of sums without
// atomics.
template <typename E, int D>
__global__ void __launch_bounds__(128)
    attention_backward_q_kernel(E *dqkv, const E *dout, const E *qkv, const float *lse, const float *delta, size_t B, size_t T, size_t H,
                                size_t G, size_t h, bool aligned) {
    constexpr int ROWS = 64, KEYS = key_tile<E>(), STRIDE = tile_stride<E>(D);
    DYN_SMEM(E, tiles); // [2][keys, values], at first queries and dout
    unsigned pair = blockIdx.x % (unsigned)(B * G), count = gridDim.x / (unsigned)(B * G);
    size_t b = pair / G, g = pair % G, Q = (H + 2 * G) * h;
    packed_rows packed(b, g, T, H, G);
    int rows = packed.count, row0 = (int)(count - 1 - blockIdx.x / (unsigned)(B * G)) * ROWS, lane = threadIdx.x % 32,
        warp = threadIdx.x / 32;
    int end = packed.token(int_min(row0 + ROWS, rows) - 1) + 1;
    const E *k = qkv + b * T * Q + (H + g) * h, *v = k + G * h;

    load_tile<ROWS, D, 128>(
        tiles, [=](int r) { return packed.query(qkv, row0 + r, Q, h); }, h, aligned);
    load_tile<ROWS, D, 128>(
        tiles + ROWS * STRIDE, [=](int r) { return packed.output(dout, row0 + r, h); }, h, aligned);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    fragment<E> fq[D / 16], fo[D / 16];
    EACH (c, D / 16) {
        load_a<false>(fq[c], tiles + 16 * warp * STRIDE + 16 * c, STRIDE);
        load_a<false>(fo[c], tiles + (ROWS + 16 * warp) * STRIDE + 16 * c, STRIDE);
    }
    __syncthreads();

    auto load_kv = [&](int u0, int stage) {
        E *tile = tiles + stage * 2 * KEYS * STRIDE;
        auto at = [=](const E *x) { return [=](int r) { return u0 + r < end ? x + (u0 + r) * Q : (const E *)nullptr; }; };
        load_tile<KEYS, D, 128>(tile, at(k), h, aligned);
        load_tile<KEYS, D, 128>(tile + KEYS * STRIDE, at(v), h, aligned);
    };
    float dq[D / 8][4] = {}, base[2], mean[2], root = 1.0f / sqrtf((float)h), scale = LOG2E * root;
    int sees[2], first = row0 + 16 * warp + lane / 4; // the lane's first row
    EACH (i, 2) {
        int r = int_min(first + 8 * i, rows - 1);
        size_t at = packed.at(r);
        base[i] = lse[at] * LOG2E, mean[i] = delta[at], sees[i] = packed.token(r);
    }
    load_kv(0, 0);
    cp_async_commit();
    for (int u0 = 0, stage = 0; u0 < end; u0 += KEYS, stage ^= 1) {
        if (u0 + KEYS < end) load_kv(u0 + KEYS, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const E *k_tile = tiles + stage * 2 * KEYS * STRIDE, *v_tile = k_tile + KEYS * STRIDE;
        // (1) scores and dP
        float p[KEYS / 8][4] = {}, ds[KEYS / 8][4] = {};
        EACH (c, D / 16)
            EACH (j, KEYS / 16) {
                fragment<E> fk, fv;
                load_b<false>(fk, k_tile + 16 * j * STRIDE + 16 * c, STRIDE);
                load_b<false>(fv, v_tile + 16 * j * STRIDE + 16 * c, STRIDE);
                multiply(&p[2 * j], fq[c], fk);
                multiply(&ds[2 * j], fo[c], fv);
            }
        // (2) dS
        EACH (j, KEYS / 8)
            EACH (e, 4) {
                bool seen = u0 + 8 * j + lane % 4 * 2 + e % 2 <= sees[e / 2];
                ds[j][e] = seen ? exp2f(p[j][e] * scale - base[e / 2]) * (ds[j][e] - mean[e / 2]) * root : 0.0f;
            }
        // (3) the tile's share of dQ
        EACH (j, KEYS / 16) {
            fragment<E> fds, fk;
            as_factor(fds, &ds[2 * j]);
            EACH (c, D / 16) {
                load_b<true>(fk, k_tile + 16 * j * STRIDE + 16 * c, STRIDE);
                multiply(&dq[2 * c], fds, fk);
            }
        }
        __syncthreads();
    }
    cp_async_wait<0>();
    EACH (i, 2)
        EACH (c, D / 8) {
            int r = first + 8 * i;
            size_t column = 8 * c + lane % 4 * 2;
            if (r < rows && column < h) store2(const_cast<E *>(packed.query(dqkv, r, Q, h)) + column, dq[c][2 * i], dq[c][2 * i + 1]);
        }
}

template <typename E, int D>
static void attend_backward(E *dqkv, float *delta, const E *dout, const E *qkv, const E *out, const float *lse, size_t B, size_t T,
                            size_t H, size_t G, size_t h) {
    constexpr size_t row = tile_stride<E>(D) * sizeof(E), kv_bytes = 4 * (sizeof(E) == 2 && D <= 64 ? 64 : 32) * row;
    constexpr size_t q_bytes = 4 * (size_t)key_tile<E>() * row;
    static bool allowed;
    if (!allowed)
        allow_shared(attention_backward_kv_kernel<E, D>, kv_bytes), allow_shared(attention_backward_q_kernel<E, D>, q_bytes),
            allowed = true;
    bool aligned = ((uintptr_t)qkv | (uintptr_t)dout | h * sizeof(E)) % 16 == 0;
    LAUNCH(attention_delta_kernel<E>, ceil_of(B * T * H, THREADS / 32), THREADS, 0, delta, dout, out, B * T * H, h);
    LAUNCH((attention_backward_kv_kernel<E, D>), ceil_of(T, 64) * B * G, 128, kv_bytes, dqkv, dout, qkv, lse, delta, B, T, H, G, h,
           aligned);
    LAUNCH((attention_backward_q_kernel<E, D>), ceil_of(T * (H / G), 64) * B * G, 128, q_bytes, dqkv, dout, qkv, lse, delta, B, T, H, G, h,
           aligned);
}

template <typename E>
static void attention_backward(act *dqkv, float *delta, const act *dout, const act *qkv, const act *out, const float *lse, size_t B,
                               size_t T, size_t H, size_t G, size_t h) {
    BY_HEAD_SIZE(h, attend_backward, (E *)dqkv, delta, (const E *)dout, (const E *)qkv, (const E *)out, lse, B, T, H, G, h);
}

// ---- SwiGLU -------------------------------------------------------------------------------------------------------------------------
template <typename E> __global__ void swiglu_forward_kernel(E *out, const E *gate_up, size_t N, size_t F) {
    size_t c, n = divide((size_t)blockIdx.x * THREADS + threadIdx.x, (F + 7) / 8, c);
    if (n >= N) return;
    c *= 8;
    float gate[8], up[8];
    load8(gate, gate_up + n * 2 * F + c, F - c), load8(up, gate_up + n * 2 * F + F + c, F - c);
    for (int j = 0; j < 8; j++) up[j] *= gate[j] / (1.0f + expf(-gate[j]));
    store8(out + n * F + c, up, F - c);
}

template <typename E> static void swiglu_forward(act *out, const act *gate_up, size_t N, size_t F) {
    LAUNCH(swiglu_forward_kernel<E>, ceil_of(N * ceil_of(F, 8), THREADS), THREADS, 0, (E *)out, (const E *)gate_up, N, F);
}

template <typename E> __global__ void swiglu_backward_kernel(E *dgate_up, E *out, const E *dout, const E *gate_up, size_t N, size_t F) {
    size_t c, n = divide((size_t)blockIdx.x * THREADS + threadIdx.x, (F + 7) / 8, c);
    if (n >= N) return;
    c *= 8;
    float gate[8], up[8], dy[8], dgate[8], dup[8];
    load8(gate, gate_up + n * 2 * F + c, F - c), load8(up, gate_up + n * 2 * F + F + c, F - c), load8(dy, dout + n * F + c, F - c);
    for (int j = 0; j < 8; j++) {
        float sigma = 1.0f / (1.0f + expf(-gate[j]));
        dgate[j] = dy[j] * up[j] * sigma * (1.0f + gate[j] * (1.0f - sigma));
        dup[j] = dy[j] * gate[j] * sigma;
        up[j] *= gate[j] * sigma;
    }
    store8(dgate_up + n * 2 * F + c, dgate, F - c), store8(dgate_up + n * 2 * F + F + c, dup, F - c), store8(out + n * F + c, up, F - c);
}

template <typename E> static void swiglu_backward(act *dgate_up, act *out, const act *dout, const act *gate_up, size_t N, size_t F) {
    LAUNCH(swiglu_backward_kernel<E>, ceil_of(N * ceil_of(F, 8), THREADS), THREADS, 0, (E *)dgate_up, (E *)out, (const E *)dout, (const E *)gate_up,
           N, F);
}

// ---- Cross-entropy: a block for every row, which it reads once for maximum and sum together and once for the gradient --------------
template <typename E> __global__ void cross_entropy_kernel(float *losses, E *logits, const int32_t *labels, size_t V, float scale) {
    E *row = logits + blockIdx.x * V;
    int32_t label = labels[blockIdx.x];
    float z[8], largest = -INFINITY, sum = 0, target = label >= 0 ? to_float(row[label]) : 0.0f;
    for (size_t v = 8 * threadIdx.x; v < V && label >= 0; v += 8 * THREADS) {
        load8(z, row + v, V - v);
        float top = largest, more = 0;
        for (int i = 0; i < 8; i++) top = v + i < V ? fmaxf(top, z[i]) : top;
        for (int i = 0; i < 8; i++) more += v + i < V ? expf(z[i] - top) : 0.0f;
        sum = (largest == -INFINITY ? 0.0f : sum * expf(largest - top)) + more, largest = top;
    }
    float top = block_largest(largest);
    sum = block_sum(largest == -INFINITY && sum == 0 ? 0.0f : sum * expf(largest - top));
    if (threadIdx.x == 0) losses[blockIdx.x] = label >= 0 ? logf(sum) + top - target : 0.0f;
    if (scale == 0) return;
    for (size_t v = 8 * threadIdx.x; v < V; v += 8 * THREADS) {
        load8(z, row + v, V - v);
        for (int i = 0; i < 8; i++) z[i] = label < 0 ? 0.0f : scale / sum * expf(z[i] - top) - (v + i == (size_t)label ? scale : 0.0f);
        store8(row + v, z, V - v);
    }
}

template <typename E> static void cross_entropy(float *losses, act *logits, const int32_t *labels, size_t N, size_t V, float scale) {
    LAUNCH(cross_entropy_kernel<E>, N, THREADS, 0, losses, (E *)logits, labels, V, scale);
}

// ---- Elementwise --------------------------------------------------------------------------------------------------------------------
template <typename E> __global__ void cast_kernel(E *out, const float *x, size_t n) {
    size_t i = first_of8();
    if (i >= n) return;
    float v[8];
    load8(v, x + i, n - i);
    store8(out + i, v, n - i);
}

template <typename E> static void cast(act *out, const float *x, size_t n) {
    LAUNCH(cast_kernel<E>, blocks_of8(n), THREADS, 0, (E *)out, x, n);
}

__global__ void add_kernel(float *x, const float *y, size_t n, float keep) {
    size_t i = first_of8();
    if (i >= n) return;
    float a[8], b[8];
    load8(a, x + i, n - i), load8(b, y + i, n - i);
    for (int j = 0; j < 8; j++) a[j] = keep * a[j] + b[j];
    store8(x + i, a, n - i);
}

template <typename E> static void add(float *x, const float *y, size_t n, float keep) {
    LAUNCH(add_kernel, blocks_of8(n), THREADS, 0, x, y, n, keep);
}

__global__ void state_init_kernel(float *s, const int32_t *past, size_t B, size_t T, size_t d, float sigma, uint64_t seed) {
    size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x, c, t, n = divide(i, d, c), b = divide(n, T, t);
    if (n >= B * T) return;
    uint64_t key = retrofit_hash(retrofit_hash(seed, b), (past ? (uint64_t)past[b] : 0) + t);
    s[i] = sigma == 0 ? 0.0f : sigma * retrofit_hash_normal(key, c);
}

template <typename E> static void state_init(float *s, const int32_t *past, size_t B, size_t T, size_t d, float sigma, uint64_t seed) {
    LAUNCH(state_init_kernel, ceil_of(B * T * d, THREADS), THREADS, 0, s, past, B, T, d, sigma, seed);
}

// ---- KV cache -----------------------------------------------------------------------------------------------------------------------
template <typename E>
__global__ void kv_store_kernel(E *keys, E *values, const E *qkv, const int32_t *past, size_t B, size_t T, size_t capacity, size_t H,
                                size_t G, size_t h) {
    size_t width = G * h, c, t, n = divide((size_t)blockIdx.x * THREADS + threadIdx.x, (width + 7) / 8, c), b = divide(n, T, t);
    if (n >= B * T) return;
    const E *k = qkv + n * (H + 2 * G) * h + H * h + (c *= 8);
    size_t at = (b * capacity + (size_t)past[b] + t) * width + c;
    float x[8];
    load8(x, k, width - c), store8(keys + at, x, width - c);
    load8(x, k + width, width - c), store8(values + at, x, width - c);
}

template <typename E>
static void kv_store(act *keys, act *values, const act *qkv, const int32_t *past, size_t B, size_t T, size_t capacity, size_t H, size_t G,
                     size_t h, retrofit_type) {
    LAUNCH(kv_store_kernel<E>, ceil_of(B * T * ceil_of(G * h, 8), THREADS), THREADS, 0, (E *)keys, (E *)values, (const E *)qkv, past, B, T,
           capacity, H, G, h);
}

template <typename E>
static void attention_cached(act *out, const act *qkv, const act *keys, const act *values, const int32_t *past, size_t B, size_t T,
                             size_t capacity, size_t H, size_t G, size_t h, retrofit_type) {
    BY_HEAD_SIZE(h, attend, (E *)out, NULL, (const E *)qkv, (const E *)keys, (const E *)values, G * h, capacity * G * h, past, capacity, B,
                 T, H, G, h);
}

template <typename E>
__global__ void kv_lend_kernel(E *keys, E *values, const int32_t *past, const int32_t *used, size_t S, size_t C, size_t stride, size_t B,
                               size_t capacity, size_t width) {
    size_t c, j, n = divide((size_t)blockIdx.x * THREADS + threadIdx.x, (width + 7) / 8, c), b = divide(n, C, j);
    if (b >= B) return;
    size_t slot = (size_t)used[b], in_layer = (b * capacity + (size_t)past[b]) * width + (c *= 8);
    float k[8], v[8];
    load8(k, keys + ((slot - 1) * C + j) * stride + in_layer, width - c),
        load8(v, values + ((slot - 1) * C + j) * stride + in_layer, width - c);
    for (; slot < S; slot++)
        store8(keys + (slot * C + j) * stride + in_layer, k, width - c), store8(values + (slot * C + j) * stride + in_layer, v, width - c);
}

template <typename E>
static void kv_backfill(act *keys, act *values, const int32_t *past, const int32_t *used, size_t S, size_t C, size_t stride, size_t B,
                    size_t capacity, size_t G, size_t h, retrofit_type) {
    LAUNCH(kv_lend_kernel<E>, ceil_of(B * C * ceil_of(G * h, 8), THREADS), THREADS, 0, (E *)keys, (E *)values, past, used, S, C, stride, B,
           capacity, G * h);
}

// ---- Optimizers ---------------------------------------------------------------------------------------------------------------------
__global__ void sum_squares_kernel(double *sums, const float *x, size_t n) {
    double sum = 0;
    for (size_t i = first_of8(); i < n; i += 8 * THREADS * (size_t)gridDim.x) {
        float v[8], squares = 0;
        load8(v, x + i, n - i);
        for (int j = 0; j < 8; j++) squares += v[j] * v[j];
        sum += (double)squares;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void add_sums_kernel(double *sum, const double *sums, unsigned count) {
    double x = 0;
    for (unsigned i = threadIdx.x; i < count; i += THREADS) x += sums[i];
    x = block_sum(x);
    if (threadIdx.x == 0) *sum += x;
}

template <typename E> static void sum_squares(double *sum, const float *x, size_t n) {
    size_t blocks = least_of(blocks_of8(n), 2048);
    LAUNCH(sum_squares_kernel, blocks, THREADS, 0, (double *)workspace, x, n);
    LAUNCH(add_sums_kernel, blocks > 0, THREADS, 0, sum, (const double *)workspace, (unsigned)blocks);
}

__global__ void adamw_kernel(float *w, float *m, float *v, const float *g, size_t n, float scale, float step, float keep, float beta1,
                             float beta2, float root, float eps) {
    size_t i = first_of8();
    if (i >= n) return;
    float wi[8], mi[8], vi[8], gi[8];
    load8(wi, w + i, n - i), load8(mi, m + i, n - i), load8(vi, v + i, n - i), load8(gi, g + i, n - i);
    for (int j = 0; j < 8; j++) {
        float x = gi[j] * scale;
        mi[j] += (1.0f - beta1) * (x - mi[j]);
        vi[j] = beta2 * vi[j] + (1.0f - beta2) * x * x;
        wi[j] = wi[j] * keep - step * mi[j] / (sqrtf(vi[j]) / root + eps);
    }
    store8(w + i, wi, n - i), store8(m + i, mi, n - i), store8(v + i, vi, n - i);
}

template <typename E>
static void adamw_update(float *w, float *m, float *v, const float *g, size_t n, float scale, float lr, float beta1, float beta2,
                         double bias1, double bias2, float eps, float decay) {
    LAUNCH(adamw_kernel, blocks_of8(n), THREADS, 0, w, m, v, g, n, scale, (float)(lr / bias1), 1.0f - lr * decay, beta1, beta2,
           (float)sqrt(bias2), eps);
}

__global__ void ellisadam_moments_kernel(float *m, float *v, double *sums, const float *g, size_t n, float scale, float beta1, float beta2,
                                         float eps) {
    double sum = 0;
    for (size_t i = first_of8(); i < n; i += 8 * THREADS * (size_t)gridDim.x) {
        float mi[8], vi[8], gi[8], ratio = 0;
        load8(mi, m + i, n - i), load8(vi, v + i, n - i), load8(gi, g + i, n - i);
        for (int j = 0; j < 8; j++) {
            float x = gi[j] * scale;
            mi[j] += (1.0f - beta1) * (x - mi[j]);
            vi[j] = beta2 * vi[j] + (1.0f - beta2) * x * x;
            if (vi[j] < eps * eps) vi[j] = eps * eps;
            ratio += x * x / vi[j];
        }
        store8(m + i, mi, n - i), store8(v + i, vi, n - i);
        sum += (double)ratio;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <typename E>
static void ellisadam_moments(float *m, float *v, double *sum, const float *g, size_t n, float scale, float beta1, float beta2, float eps) {
    size_t blocks = least_of(blocks_of8(n), 2048);
    LAUNCH(ellisadam_moments_kernel, blocks, THREADS, 0, m, v, (double *)workspace, g, n, scale, beta1, beta2, eps);
    LAUNCH(add_sums_kernel, blocks > 0, THREADS, 0, sum, (const double *)workspace, (unsigned)blocks);
}

__global__ void ellisadam_update_kernel(float *w, const float *m, const float *v, const double *sum, size_t n, float lr, double bias1,
                                        float root, float keep) {
    size_t i = first_of8();
    if (i >= n) return;
    float wi[8], mi[8], vi[8], step = (float)(lr / bias1 / fmax(1.0, sqrt(*sum / (double)n)));
    load8(wi, w + i, n - i), load8(mi, m + i, n - i), load8(vi, v + i, n - i);
    for (int j = 0; j < 8; j++) wi[j] = wi[j] * keep - step * atan2f(mi[j], sqrtf(vi[j]) / root);
    store8(w + i, wi, n - i);
}

template <typename E>
static void ellisadam_update(float *w, const float *m, const float *v, const double *sum, size_t n, float lr, double bias1, double bias2,
                             float decay) {
    LAUNCH(ellisadam_update_kernel, blocks_of8(n), THREADS, 0, w, m, v, sum, n, lr, bias1, (float)sqrt(bias2), 1.0f - decay);
}

__global__ void muon_momentum_kernel(float *u, float *m, const float *g, size_t n, float scale, float momentum) {
    size_t i = first_of8();
    if (i >= n) return;
    float mi[8], gi[8];
    load8(mi, m + i, n - i), load8(gi, g + i, n - i);
    for (int j = 0; j < 8; j++) {
        float x = gi[j] * scale;
        mi[j] += (1.0f - momentum) * (x - mi[j]);
        gi[j] = x + momentum * (mi[j] - x);
    }
    store8(m + i, mi, n - i), store8(u + i, gi, n - i);
}

template <typename E> static void muon_momentum(float *u, float *m, const float *g, size_t n, float scale, float momentum) {
    LAUNCH(muon_momentum_kernel, blocks_of8(n), THREADS, 0, u, m, g, n, scale, momentum);
}

// A block for 32x32 of u, which pass through shared memory so that rows are read and, transposed or not, rows are written.
template <typename E> __global__ void muon_load_kernel(E *x, const float *u, const double *squares, size_t rows, size_t cols) {
    SMEM(float, tile, 32 * 33);
    size_t across = (cols + 31) / 32, r0 = blockIdx.x / across * 32, c0 = blockIdx.x % across * 32, i = threadIdx.x % 32;
    float scale = (float)(1 / (sqrt(*squares) + 1e-7));
    for (size_t j = threadIdx.x / 32; j < 32; j += THREADS / 32)
        if (r0 + j < rows && c0 + i < cols) {
            float y = u[(r0 + j) * cols + c0 + i] * scale;
            tile[j * 33 + i] = y;
            if (rows <= cols) from_float(x[(r0 + j) * cols + c0 + i], y);
        }
    __syncthreads();
    for (size_t j = threadIdx.x / 32; j < 32 && rows > cols; j += THREADS / 32)
        if (r0 + i < rows && c0 + j < cols) from_float(x[(c0 + j) * rows + r0 + i], tile[i * 33 + j]);
}

template <typename E> static void muon_load(act *x, const float *u, const double *squares, size_t rows, size_t cols) {
    LAUNCH(muon_load_kernel<E>, ceil_of(rows, 32) * ceil_of(cols, 32), THREADS, 0, (E *)x, u, squares, rows, cols);
}

template <typename E> __global__ void axpby_kernel(E *y, const E *x, size_t n, float a, float b) {
    size_t i = first_of8();
    if (i >= n) return;
    float xi[8], yi[8];
    load8(xi, x + i, n - i), load8(yi, y + i, n - i);
    for (int j = 0; j < 8; j++) yi[j] = a * xi[j] + b * yi[j];
    store8(y + i, yi, n - i);
}

template <typename E> static void axpby(act *y, const act *x, size_t n, float a, float b) {
    LAUNCH(axpby_kernel<E>, blocks_of8(n), THREADS, 0, (E *)y, (const E *)x, n, a, b);
}

template <typename E> __global__ void muon_update_kernel(float *w, const E *x, size_t rows, size_t cols, float keep, float step) {
    SMEM(float, tile, 32 * 33);
    size_t across = (cols + 31) / 32, r0 = blockIdx.x / across * 32, c0 = blockIdx.x % across * 32, i = threadIdx.x % 32;
    for (size_t j = threadIdx.x / 32; j < 32 && rows > cols; j += THREADS / 32)
        if (r0 + i < rows && c0 + j < cols) tile[i * 33 + j] = to_float(x[(c0 + j) * rows + r0 + i]);
    __syncthreads();
    for (size_t j = threadIdx.x / 32; j < 32; j += THREADS / 32)
        if (r0 + j < rows && c0 + i < cols) {
            size_t at = (r0 + j) * cols + c0 + i;
            w[at] = w[at] * keep - step * (rows > cols ? tile[j * 33 + i] : to_float(x[at]));
        }
}

template <typename E> static void muon_update(float *w, const act *x, size_t rows, size_t cols, float lr, float scale, float decay) {
    LAUNCH(muon_update_kernel<E>, ceil_of(rows, 32) * ceil_of(cols, 32), THREADS, 0, w, (const E *)x, rows, cols, 1.0f - lr * decay,
           lr * scale);
}

// =====================================================================================================================
// 4  The tables
// =====================================================================================================================

const retrofit_ops retrofit_cuda = {"cuda",         RETROFIT_BF16, 128,         start,         peak_bf16, room,
                                    cuda_alloc,     cuda_free,     cuda_upload, cuda_download, cuda_copy, cuda_zero,
                                    cuda_record,    cuda_recorded, cuda_replay, cuda_forget,
#define X(name, parameters) name<bf16>,
                                    RETROFIT_OPS(X)
#undef X
};
const retrofit_ops retrofit_cuda_fp32 = {"cuda-fp32",    RETROFIT_F32,  128,         start,         peak_fp32, room,
                                         cuda_alloc,     cuda_free,     cuda_upload, cuda_download, cuda_copy, cuda_zero,
                                         cuda_record,    cuda_recorded, cuda_replay, cuda_forget,
#define X(name, parameters) name<float>,
                                         RETROFIT_OPS(X)
#undef X
};

/* retrofit_cuda.cu - the operations of retrofit.h on NVIDIA GPUs of compute capability 8.0 or more.

   The operations stand in the order of RETROFIT_OPS (retrofit.h, section 1), under the same names.
   What each one computes is told there and above the CPU's operation of the same name (section 6).
   Here stands how a GPU does it: which blocks and threads take which part of the work, then the
   kernel, then the function that launches it.

   Two tables are made of one set of templates. In `retrofit_cuda` the type E of branch activations
   and matrices is bf16. In `retrofit_cuda_fp32` it is float and everything else is the same, so
   that the algorithms can be checked against the CPU to the precision of fp32.

   What holds for all kernels:
     - Kernels that only move memory read and write eight elements per thread (load8, store8), in
       vectors of 16 bytes where addresses allow it.
     - Kernels that multiply matrices (matmul, attention) copy tiles to shared memory with cp.async
       while they multiply earlier tiles. The tensor cores multiply blocks of 16x16: load_a, load_b,
       multiply. In fp32 ordinary multiply-adds multiply the same blocks.
     - Every sum has a fixed order. There are no atomics: the same inputs give the same bits.
     - All work goes to one stream. Nothing allocates: scratch memory is the workspace of 32 MB,
       which is set aside when the device is started.

   Contents
     1  the machine: PTX, blocks of 16x16, tiles, eight numbers at a time, sums
     2  the device: start, errors, memory, launches, recording, several GPUs
     3  matrix products: few rows, cuBLASLt, our own
     4  the operations
     5  the tables

   Without nvcc this file compiles as C++ over test/emulator.h, which runs the threads of each
   kernel on the CPU. That is how it is tested on machines without a GPU. */
#include "retrofit.h"
#include <dlfcn.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifndef RETROFIT_NO_CUBLAS
#include <cublasLt.h>
#define WITH_CUBLAS 1
#endif
#else
#include "test/emulator.h"
#define __noinline__
#endif

typedef __nv_bfloat16 bf16;

// A function that kernels call.
#define DEVICE __device__ __forceinline__

// A loop over values that should stay in registers. It must be unrolled, because registers cannot
// be indexed.
#ifdef __CUDACC__
#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)
#else
#define EACH(i, n) for (int i = 0; i < (n); i++)
#endif

// =================================================================================================
// 1  The machine
// =================================================================================================

// ---- PTX ---------------------------------------------------------------------------------------
// test/emulator.h has its own version of everything up to the #endif below.
//
// Tensor cores spread a matrix over the 32 lanes of a warp. In all of this file
//     g = lane / 4     0 … 7
//     t = lane % 4     0 … 3
// so that four lanes share row g of an 8x8 matrix and lane t of them has its columns 2t and 2t + 1:
//
//                  columns  0   1   2   3   4   5   6   7
//             row 0         lane 0  lane 1  lane 2  lane 3
//             row 1         lane 4  lane 5  lane 6  lane 7
//              …
//             row 7         lane 28 lane 29 lane 30 lane 31
#ifdef __CUDACC__
#define SMEM(E, name, N) __shared__ __align__(16) E name[N]
#define DYN_SMEM(E, name)                                                   \
    extern __shared__ __align__(128) unsigned char dynamic_shared_memory[]; \
    E *name = reinterpret_cast<E *>(dynamic_shared_memory)

DEVICE unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

// ldmatrix.x4 reads four 8x8 matrices of 16-bit elements from shared memory.
// Lane l passes the address of row l % 8 of matrix l / 8: 16 bytes, at a multiple of 16.
// It gets in r[i], of matrix i, (g, 2t) in the lower half and (g, 2t + 1) in the upper half.
DEVICE void ldmatrix(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// ldmatrix.x4.trans: the same, but a lane gets the elements (2t, g) and (2t + 1, g).
DEVICE void ldmatrix_transposed(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// mma.m16n8k16: c (16x8, fp32) += a (16x16, bf16) · b (16x8, bf16). A lane holds
//     of c: c[0] (g, 2t)   c[1] (g, 2t + 1)   c[2] (g + 8, 2t)   c[3] (g + 8, 2t + 1)
//     of a, pairs of columns:  a[0] (g, 2t …)       a[1] (g + 8, 2t …)
//                              a[2] (g, 2t + 8 …)   a[3] (g + 8, 2t + 8 …)
//     of b, pairs of rows:     b[0] (2t …, g)       b[1] (2t + 8 …, g)
DEVICE void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// cp.async.cg copies 16 bytes from global to shared memory while the thread goes on. Only the first
// `bytes` of them are read; the rest become 0.
DEVICE void cp_async(void *shared, const void *global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(bytes)
                 : "memory");
}

// The kernel waits until those before it in the stream have ended, and lets the next one begin: see
// LAUNCH_CHAINED.
DEVICE void wait_for_previous(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Asks for the 128 bytes around p to be brought to the L2 cache.
DEVICE void prefetch(const void *p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

// ex2.approx.ftz: 2^x with an error of two units in the last place; 0 where that is denormal, for
// which exp2f takes three instructions more.
DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// cp.async.commit_group: the thread's copies since the last commit become a group.
DEVICE void cp_async_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group N: waits until all of the thread's groups but the latest N have arrived.
template <int N> DEVICE void cp_async_wait(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif

// ---- The product of mma in fp32 ----------------------------------------------------------------
// No tensor core multiplies in fp32 without rounding the factors. Here the lanes hold the same
// elements as for mma, unpacked, and fetch by shuffles what their four sums need:
//     c[0] = Σ_k a(g, k)·b(k, 2t)         c[1] = Σ_k a(g, k)·b(k, 2t + 1)
//     c[2] = Σ_k a(g + 8, k)·b(k, 2t)     c[3] = Σ_k a(g + 8, k)·b(k, 2t + 1)
// (row, k) of a is held by lane 4·row + k % 8 / 2, (k, column) of b by lane 4·column + k % 8 / 2.
#if defined __CUDACC__ || defined EMULATOR_NO_MMA_F32
// Not inlined, because a kernel multiplies hundreds of blocks.
static __device__ __noinline__ float4 mma_by_shuffles(float4 c, float4 a_low, float4 a_high,
                                                      float4 b) {
    float a[8] = {a_low.x, a_low.y, a_low.z, a_low.w, a_high.x, a_high.y, a_high.z, a_high.w};
    float bs[4] = {b.x, b.y, b.z, b.w};
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    EACH (k, 16) {
        int high = k / 8, holder = k % 8 / 2, odd = k % 2;
        float a0 = __shfl_sync(~0u, a[4 * high + odd], 4 * g + holder);
        float a1 = __shfl_sync(~0u, a[4 * high + 2 + odd], 4 * g + holder);
        float b0 = __shfl_sync(~0u, bs[2 * high + odd], 8 * t + holder);
        float b1 = __shfl_sync(~0u, bs[2 * high + odd], 8 * t + 4 + holder);
        c.x = fmaf(a0, b0, c.x);
        c.y = fmaf(a0, b1, c.y);
        c.z = fmaf(a1, b0, c.z);
        c.w = fmaf(a1, b1, c.w);
    }
    return c;
}

DEVICE void mma(float c[4], const float a[8], const float b[4]) {
    float4 sum =
        mma_by_shuffles(make_float4(c[0], c[1], c[2], c[3]), make_float4(a[0], a[1], a[2], a[3]),
                        make_float4(a[4], a[5], a[6], a[7]), make_float4(b[0], b[1], b[2], b[3]));
    c[0] = sum.x;
    c[1] = sum.y;
    c[2] = sum.z;
    c[3] = sum.w;
}
#endif

// ---- Numbers of either type --------------------------------------------------------------------
DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
DEVICE void from_float(float &to, float x) { to = x; }
DEVICE void from_float(bf16 &to, float x) { to = __float2bfloat16(x); }

// Two numbers as bf16, x in the lower half.
DEVICE unsigned pack(float x, float y) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    unsigned bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

DEVICE int int_min(int a, int b) { return a < b ? a : b; }

// i / n, and the remainder. A division of 64 bits takes ten times as long as one of 32.
DEVICE size_t divide(size_t i, size_t n, size_t &remainder) {
    bool narrow = i <= 0xffffffffu && n <= 0xffffffffu;
    size_t quotient = narrow ? (unsigned)i / (unsigned)n : i / n;
    remainder = i - quotient * n;
    return quotient;
}

// ---- Blocks of 16x16, held by a warp -----------------------------------------------------------
// A block is four 8x8 matrices, of each of which a lane holds one pair of elements. Pair i of the
// factors of a product lies in matrix i of
//                         ┌───┬───┐
//                         │ 0 │ 2 │        left factor  (m, k): elements (g, 2t), (g, 2t + 1)
//                         ├───┼───┤        right factor (k, n): elements (2t, g), (2t + 1, g)
//                         │ 1 │ 3 │
//                         └───┴───┘
// which is what mma wants of its a, and of two of its b side by side (pairs 0, 1 and 2, 3).
template <typename E> struct fragment;
template <> struct fragment<bf16> { uint32_t x[4]; }; // a pair each
template <> struct fragment<float> { float x[8]; };

// Reads a block that begins at tile[0] in shared memory and whose rows are `stride` elements apart.
// ACROSS: the matrices are numbered across the block as it is stored (0 1 / 2 3), not down it.
// TRANSPOSED: pairs run down the stored columns, not along the stored rows.
template <bool TRANSPOSED, bool ACROSS>
DEVICE void load_block(fragment<bf16> &f, const bf16 *tile, int stride) {
    int lane = threadIdx.x % 32, i = lane / 8; // the matrix whose row this lane points to
    int row = (ACROSS ? i / 2 : i % 2) * 8 + lane % 8;
    int column = (ACROSS ? i % 2 : i / 2) * 8;
    if (TRANSPOSED) ldmatrix_transposed(f.x, tile + row * stride + column);
    else ldmatrix(f.x, tile + row * stride + column);
}

template <bool TRANSPOSED, bool ACROSS>
DEVICE void load_block(fragment<float> &f, const float *tile, int stride) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    EACH (i, 4)
        EACH (j, 2) {
            int row = (ACROSS ? i / 2 : i % 2) * 8 + (TRANSPOSED ? 2 * t + j : g);
            int column = (ACROSS ? i % 2 : i / 2) * 8 + (TRANSPOSED ? g : 2 * t + j);
            f.x[2 * i + j] = tile[row * stride + column];
        }
}

// A left factor (m, k), stored as (m, k) or, K_FIRST, as (k, m).
template <bool K_FIRST, typename E> DEVICE void load_a(fragment<E> &f, const E *tile, int stride) {
    load_block<K_FIRST, K_FIRST>(f, tile, stride);
}

// A right factor (k, n), stored as (n, k) or, K_FIRST, as (k, n).
template <bool K_FIRST, typename E> DEVICE void load_b(fragment<E> &f, const E *tile, int stride) {
    load_block<K_FIRST, !K_FIRST>(f, tile, stride);
}

// c (16x16) += a · b. c[0] is the left half of c and c[1] the right half, each as mma lays it out.
template <typename E>
DEVICE void multiply(float (*c)[4], const fragment<E> &a, const fragment<E> &b) {
    constexpr size_t HALF = sizeof b.x / sizeof *b.x / 2;
    mma(c[0], a.x, b.x);
    mma(c[1], a.x, b.x + HALF);
}

// The result of a product as the left factor of the next one. Each element is already where mma
// wants it; only the type changes.
DEVICE void as_factor(fragment<float> &f, const float (*c)[4]) {
    EACH (i, 8) f.x[i] = c[i / 4][i % 4];
}

DEVICE void as_factor(fragment<bf16> &f, const float (*c)[4]) {
    EACH (i, 4) f.x[i] = pack(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
}

// ---- Tiles in shared memory --------------------------------------------------------------------
// A tile's rows are 16 bytes longer than needed, so that the eight rows that ldmatrix reads at once
// lie in different banks.
template <typename E> __host__ __device__ constexpr int tile_stride(int columns) {
    return columns + 16 / (int)sizeof(E);
}

// What one of a block's BLOCK threads copies of a tile of ROWS x COLUMNS, and of those that follow:
// 16 bytes of every row that is a multiple of APART behind its first. With four times 16 bytes to a
// row, and eight threads:
//
//                 row 0   thread 0   thread 1   thread 2   thread 3
//                     1   thread 4   thread 5   thread 6   thread 7
//                     2   thread 0   thread 1   thread 2   thread 3              APART = 2
//
// Where a thread's part lies is computed once, so that in a loop over tiles each copy costs an
// addition and no more. ALIGNED: all addresses are multiples of 16 bytes. Such copies end with
// cp_async_wait, others are done on return.
template <int ROWS, int COLUMNS, int BLOCK, bool ALIGNED, typename E> struct tile_copies {
    static constexpr int WIDTH = 16 / (int)sizeof(E), ACROSS = COLUMNS / WIDTH;
    static constexpr int APART = BLOCK / ACROSS, COUNT = ROWS / APART;
    static constexpr int STRIDE = tile_stride<E>(COLUMNS), SIZE = ROWS * STRIDE;
    static_assert(BLOCK % ACROSS == 0 && ROWS % APART == 0, "every thread copies as much");
    const E *from; // the first of the tile that is next, in global memory
    size_t apart;  // from one to the next, in elements
    int row, column;
    int bytes[COUNT]; // of each that are there; the others become 0

    // The first tile begins at `matrix`, whose rows are `stride` elements apart.
    DEVICE tile_copies(const E *matrix, size_t stride)
        : apart(APART * stride), row(threadIdx.x / ACROSS), column(threadIdx.x % ACROSS * WIDTH) {
        from = matrix + row * stride + column;
    }

    // Of the tiles that are copied from now on, so many rows and columns are there.
    template <typename SIZE> DEVICE void limit(SIZE rows, SIZE columns) {
        SIZE left = columns > (SIZE)column ? columns - (SIZE)column : 0;
        int full = (left < WIDTH ? (int)left : WIDTH) * (int)sizeof(E);
        EACH (i, COUNT) bytes[i] = (SIZE)(row + i * APART) < rows ? full : 0;
    }

    DEVICE void copy(E *tile) const {
        EACH (i, COUNT) copy_part(tile, i, from + i * apart);
    }

    // The same of rows that do not lie at equal distances: row r of the tile at row_at(r).
    template <typename F> DEVICE void gather(E *tile, F row_at) const {
        EACH (i, COUNT) copy_part(tile, i, row_at(row + i * APART) + column);
    }

    DEVICE void copy_part(E *tile, int i, const E *part) const {
        E *to = tile + (row + i * APART) * STRIDE + column;
        if constexpr (ALIGNED) cp_async(to, part, bytes[i]);
        else
            EACH (j, WIDTH) {
                if (j * (int)sizeof(E) < bytes[i]) to[j] = part[j];
                else from_float(to[j], 0.0f);
            }
    }
};

// ---- Eight numbers at a time -------------------------------------------------------------------
// Eight numbers as they lie in memory, in vectors of 16 bytes.
template <typename E> struct eight;
template <> struct eight<float> { float4 low, high; };
template <> struct eight<bf16> { uint4 pairs; };

DEVICE eight<float> load_eight(const float *p) {
    return {*reinterpret_cast<const float4 *>(p), *reinterpret_cast<const float4 *>(p + 4)};
}

DEVICE eight<bf16> load_eight(const bf16 *p) { return {*reinterpret_cast<const uint4 *>(p)}; }

DEVICE void unpack(float *out, const eight<float> &v) {
    float x[8] = {v.low.x, v.low.y, v.low.z, v.low.w, v.high.x, v.high.y, v.high.z, v.high.w};
    EACH (i, 8) out[i] = x[i];
}

// A bf16 number is the upper half of an fp32 number.
DEVICE void unpack(float *out, const eight<bf16> &v) {
    unsigned pairs[4] = {v.pairs.x, v.pairs.y, v.pairs.z, v.pairs.w};
    EACH (i, 4) {
        out[2 * i] = __uint_as_float(pairs[i] << 16);
        out[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
}

// __stwb stores a vector in one instruction; the compiler may split an assignment.
DEVICE void store_eight(float *p, const float *x) {
    __stwb(reinterpret_cast<float4 *>(p), make_float4(x[0], x[1], x[2], x[3]));
    __stwb(reinterpret_cast<float4 *>(p + 4), make_float4(x[4], x[5], x[6], x[7]));
}

DEVICE void store_eight(bf16 *p, const float *x) {
    __stwb(reinterpret_cast<uint4 *>(p),
           make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])));
}

// out[i] = p[i] for i = 0 … 7, but 0 for i >= left: `left` elements are left in the array.
template <typename E> DEVICE void load8(float *out, const E *p, size_t left) {
    if (left >= 8 && (uintptr_t)p % 16 == 0) unpack(out, load_eight(p));
    else
        EACH (i, 8) out[i] = (size_t)i < left ? to_float(p[i]) : 0.0f;
}

// p[i] = x[i] for i = 0 … 7, but only where i < left.
template <typename E> DEVICE void store8(E *p, const float *x, size_t left) {
    if (left >= 8 && (uintptr_t)p % 16 == 0) store_eight(p, x);
    else
        EACH (i, 8)
            if ((size_t)i < left) from_float(p[i], x[i]);
}

// p[0] = x and p[1] = y, where p is a multiple of two elements.
DEVICE void store2(float *p, float x, float y) {
    *reinterpret_cast<float2 *>(p) = make_float2(x, y);
}

DEVICE void store2(bf16 *p, float x, float y) {
    *reinterpret_cast<__nv_bfloat162 *>(p) = __floats2bfloat162_rn(x, y);
}

// ---- Sums and maxima over threads --------------------------------------------------------------
struct addition {
    template <typename V> __device__ V operator()(V x, V y) const { return x + y; }
};
struct maximum {
    __device__ float operator()(float x, float y) const { return fmaxf(x, y); }
};

// Over a warp, in every lane. Lanes 16 apart are combined first, then 8 apart, …
template <typename V, typename F> DEVICE V warp_reduce(V x, F combine) {
    for (int other = 16; other; other /= 2) x = combine(x, __shfl_xor_sync(~0u, x, other));
    return x;
}

// Over a block, in every thread; all threads of the block must call it. The warps' results are
// combined in the order of the warps.
template <typename V, typename F> DEVICE V block_reduce(V x, F combine) {
    SMEM(V, parts, 32);
    x = warp_reduce(x, combine);
    __syncthreads(); // the parts of an earlier call may still be read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    V result = parts[0];
    for (unsigned i = 1; i < blockDim.x / 32; i++) result = combine(result, parts[i]);
    return result;
}

DEVICE float warp_sum(float x) { return warp_reduce(x, addition()); }
DEVICE float block_max(float x) { return block_reduce(x, maximum()); }
template <typename V> DEVICE V block_sum(V x) { return block_reduce(x, addition()); }

// Over the four lanes that share a row of a product's result.
DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// =================================================================================================
// 2  The device
// =================================================================================================

enum {
    THREADS = 256,        // of a block, unless a kernel says otherwise
    WORKSPACE = 32 << 20, // bytes
};
static cudaStream_t stream;
static char *workspace;
static cudaDeviceProp device;
#ifdef __CUDACC__
static bool can_chain; // see LAUNCH_CHAINED
#endif

// Ends the program if a call failed. Once memory is allocated, a failure is a bug of this file or a
// fault of the machine. It often shows only later, so nothing can be saved by going on.
static void check_cuda(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "retrofit: %s failed on %s: %s\n", what, device.name,
            cudaGetErrorString(error));
    exit(1);
}

// ---- Launches ----------------------------------------------------------------------------------
// The arguments' types are not deduced: they convert to the kernel's parameters as in any call.
template <typename E> struct same { typedef E type; };

// Kernel launches so far. A recording counts once, when it is made.
extern "C" {
size_t retrofit_cuda_launches;
}

// Runs a kernel on `blocks` blocks of `threads` threads with `shared` bytes of dynamic memory.
template <typename... P>
static void launch(const char *name, bool chained, void (*kernel)(P...), size_t blocks,
                   unsigned threads, size_t shared, typename same<P>::type... arguments) {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff) check_cuda(cudaErrorInvalidValue, name);
    retrofit_cuda_launches++;
#ifdef __CUDACC__
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = chained && can_chain;
    check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), name);
#else
    dim3 grid((unsigned)blocks), block(threads);
    if (chained) emulator_chain();
    emulator_launch(kernel, grid, block, shared, stream, arguments...);
#endif
    check_cuda(cudaGetLastError(), name);
}
#define LAUNCH(kernel, ...) launch(#kernel, false, kernel, __VA_ARGS__)

// A token is decoded by hundreds of kernels of some microseconds each. Between two of them the GPU
// would stand still while the last blocks of the one end and the first of the next begin. A chained
// kernel begins before that (programmatic dependent launch, from compute capability 9.0 on). All
// its threads must call wait_for_previous() before they touch what an earlier kernel reads or
// writes. What they can do before is to bring weights to the cache, as those of few_rows_kernel do.
#define LAUNCH_CHAINED(kernel, ...) launch(#kernel, true, kernel, __VA_ARGS__)

static size_t ceil_of(size_t a, size_t b) { return (a + b - 1) / b; } // a / b, rounded up

// Elementwise kernels: each thread takes eight of n elements, from first_of8() on.
static size_t blocks_of8(size_t n) { return ceil_of(ceil_of(n, 8), THREADS); }
DEVICE size_t first_of8(void) { return 8 * ((size_t)blockIdx.x * THREADS + threadIdx.x); }

// Kernels that need more than 48 KB of shared memory must ask for it before their first launch.
template <size_t BYTES, typename K> static void allow_shared_memory(K *kernel) {
    static_assert(BYTES <= 99 << 10, "what a block has on compute capability 8.6, 8.9 and 12.0");
    cudaFuncAttribute attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check_cuda(cudaFuncSetAttribute(kernel, attribute, (int)BYTES), "setting shared memory");
}

// ---- Start -------------------------------------------------------------------------------------
// Does nothing. Its launch fails if this file was compiled for other GPUs only.
__global__ void probe_kernel(void) {}

// The first one, or that of this process among several on this machine. Its name, in messages,
// names the process too.
static cudaError_t find_device(void) {
    retrofit_ranks ranks;
    int count = 0, driver = 0; // driver 0: there is none
    cudaError_t error = cudaGetDeviceCount(&count);
    if (!cudaDriverGetVersion(&driver) && driver == 0) error = cudaErrorNoDevice;
    retrofit_ranks_find(&ranks);
    int own = error == cudaSuccess ? (int)(ranks.local % (size_t)count) : 0;
    if (error == cudaSuccess) error = cudaSetDevice(own);
    if (error == cudaSuccess) error = cudaGetDeviceProperties(&device, own);
    size_t used = strlen(device.name);
    if (error == cudaSuccess && ranks.count > 1)
        snprintf(device.name + used, sizeof device.name - used, " (GPU %d, rank %zu)", own,
                 ranks.rank);
    return error;
}

static cudaError_t prepare_device(void) {
    cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaMalloc((void **)&workspace, WORKSPACE);
    if (error != cudaSuccess) return error;
#ifdef __CUDACC__
    int driver = 0; // both it and the toolkit must be able to record such launches
    cudaDriverGetVersion(&driver);
    can_chain = device.major >= 9 && driver >= 12030 && CUDART_VERSION >= 12030;
    probe_kernel<<<1, 1, 0, stream>>>();
#endif
    return cudaGetLastError();
}

static const char *start_problem(cudaError_t error) {
    if (error == cudaErrorNoDevice) return "none found";
    if (error != cudaErrorNoKernelImageForDevice) return cudaGetErrorString(error);
    return "built for other GPUs: make clean, then make on this machine";
}

static bool cuda_start(char text[256]) {
    static bool ready;
    cudaError_t error = ready ? cudaSuccess : find_device();
    if (error == cudaSuccess && device.major < 8) {
        snprintf(text, 256, "%.100s has compute capability %d.%d, 8.0 is needed", device.name,
                 device.major, device.minor);
        return false;
    }
    if (error == cudaSuccess && !ready) error = prepare_device();
    if (error != cudaSuccess) {
        cudaGetLastError(); // the error is told here, not at the next launch
        snprintf(text, 256, "%.200s", start_problem(error));
        return false;
    }
    ready = true;
    snprintf(text, 256, "%s", device.name);
    return true;
}

// Without tensor cores the fp32 table is far from any data sheet.
static double cuda_peak_fp32(void) { return 0; }

// FLOPs of dense bf16 matrices with fp32 sums that a multiprocessor does per clock.
static double bf16_flops_per_clock(int version) {
    switch (version) {
    case 80: return 2048;  // A100
    case 90: return 4096;  // H100
    case 100: return 8192; // B200
    case 103: return 8192; // B300
    default: return 512;
    }
}

static double cuda_peak_bf16(void) {
    int kilohertz = 0, version = device.major * 10 + device.minor;
    cudaError_t error = cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, 0);
    if (error != cudaSuccess) kilohertz = 0;
    // The H100's data sheet counts with 1.83 GHz, less than the clock that the driver tells.
    if (version == 90 && kilohertz > 1830000) kilohertz = 1830000;
    return bf16_flops_per_clock(version) * device.multiProcessorCount * kilohertz * 1e3;
}

// ---- Memory ------------------------------------------------------------------------------------
static size_t cuda_free_memory(void) {
    size_t free_bytes = 0, all;
    check_cuda(cudaMemGetInfo(&free_bytes, &all), "asking for free memory");
    return free_bytes;
}

static void cuda_zero(void *p, size_t bytes) {
    check_cuda(cudaMemsetAsync(p, 0, bytes, stream), "clearing memory");
}

static void *cuda_alloc(size_t bytes) {
    char text[256];
    void *p = NULL;
    if (!cuda_start(text)) {
        retrofit_fail("%s", text);
        return NULL;
    }
    if (cudaMalloc(&p, bytes ? bytes : 1) != cudaSuccess) {
        cudaGetLastError();
        retrofit_fail("out of memory on %.100s: %.2f GB asked for, %.2f of %.2f GB are free: "
                      "try fewer tokens at a time, or --device cpu",
                      device.name, (double)bytes / 1e9, (double)cuda_free_memory() / 1e9,
                      (double)device.totalGlobalMem / 1e9);
        return NULL;
    }
    cuda_zero(p, bytes);
    return p;
}

static void cuda_free(void *p) { check_cuda(cudaFree(p), "freeing memory"); }

// The host's memory is pageable: CUDA has copied it aside when the call returns.
static void cuda_upload(void *to, const void *host, size_t bytes) {
    cudaError_t error = cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, stream);
    check_cuda(error, "copying to the GPU");
}

static void cuda_download(void *host, const void *from, size_t bytes) {
    cudaError_t error = cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, stream);
    check_cuda(error, "copying from the GPU");
    check_cuda(cudaStreamSynchronize(stream), "an operation before a copy");
}

static void cuda_copy(void *to, const void *from, size_t bytes) {
    cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
    check_cuda(error, "copying on the GPU");
}

// ---- Recording: a CUDA graph -------------------------------------------------------------------
static void cuda_record_begin(void) {
    cudaError_t error = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
    check_cuda(error, "recording");
}

static void *cuda_record_end(void) {
    cudaGraph_t graph;
    cudaGraphExec_t recording;
    check_cuda(cudaStreamEndCapture(stream, &graph), "recording");
    check_cuda(cudaGraphInstantiate(&recording, graph, 0), "preparing a recording");
    check_cuda(cudaGraphDestroy(graph), "freeing a recording");
    return recording;
}

static void cuda_replay(void *recording) {
    check_cuda(cudaGraphLaunch((cudaGraphExec_t)recording, stream), "replaying");
}

static void cuda_record_free(void *recording) {
    check_cuda(cudaGraphExecDestroy((cudaGraphExec_t)recording), "freeing a recording");
}

// ---- Several GPUs: NCCL ------------------------------------------------------------------------
// NCCL is opened when several processes train (retrofit_ranks.h), each with a GPU of its own. Its
// sums go to a stream of their own: they wait for what was asked of `stream` before them, and what
// `stream` does after nccl_finish waits for them. In between both work side by side.
//
// What of nccl.h is needed, as it is in NCCL 2.
typedef struct ncclComm *ncclComm_t;
struct ncclUniqueId { char internal[128]; };
enum { NCCL_SUCCESS = 0, NCCL_IN_PROGRESS = 7, NCCL_FLOAT = 7, NCCL_SUM = 0 };
#define NCCL_FUNCTIONS(X)                                                                          \
    X(ncclGetUniqueId, int, (ncclUniqueId *id))                                                    \
    X(ncclCommInitRank, int, (ncclComm_t *comm, int count, ncclUniqueId id, int rank))             \
    X(ncclCommGetAsyncError, int, (ncclComm_t comm, int *error))                                   \
    X(ncclGetErrorString, const char *, (int error))                                               \
    X(ncclAllReduce, int, (const void *from, void *to, size_t n, int type, int operation,          \
                           ncclComm_t comm, cudaStream_t on))                                      \
    X(ncclBroadcast, int, (const void *from, void *to, size_t n, int type, int root,               \
                           ncclComm_t comm, cudaStream_t on))
static struct {
    ncclComm_t comm;
    cudaStream_t on;
    cudaEvent_t asked, done; // what a sum waits for, and what waits for the sums
#define X(function, type, parameters) type (*function) parameters;
    NCCL_FUNCTIONS(X)
#undef X
} nccl;

static bool open_nccl(void) {
    void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return retrofit_fail("%s: several GPUs need NCCL (pip: nvidia-nccl-cu13), in a folder of "
                             "LD_LIBRARY_PATH", dlerror());
#define X(f, type, parameters)                                       \
    nccl.f = reinterpret_cast<decltype(nccl.f)>(dlsym(library, #f)); \
    if (!nccl.f) return retrofit_fail("libnccl.so.2 lacks %s", #f);
    NCCL_FUNCTIONS(X)
#undef X
    return true;
}

// false or error.
static bool nccl_ok(int error, const char *what) {
    return error == NCCL_SUCCESS ||
           retrofit_fail("NCCL: %s: %s", what, nccl.ncclGetErrorString(error));
}

static void follow_stream(void) {
    check_cuda(cudaEventRecord(nccl.asked, stream), "exchanging");
    check_cuda(cudaStreamWaitEvent(nccl.on, nccl.asked, 0), "exchanging");
}

static bool nccl_all_reduce(retrofit_ranks *, float *x, size_t n) {
    follow_stream();
    return nccl_ok(nccl.ncclAllReduce(x, x, n, NCCL_FLOAT, NCCL_SUM, nccl.comm, nccl.on),
                   "adding gradients");
}

static bool nccl_broadcast(retrofit_ranks *, float *x, size_t n, size_t root) {
    follow_stream();
    return nccl_ok(nccl.ncclBroadcast(x, x, n, NCCL_FLOAT, (int)root, nccl.comm, nccl.on),
                   "gathering weights");
}

static bool give_up(retrofit_ranks *ranks, double seconds) {
    size_t silent = ranks->silent ? ranks->silent(ranks) : ranks->count;
    if (silent < ranks->count)
        return retrofit_fail("no answer from rank %zu for %.3g s (--patience): the newest "
                             "checkpoint is whole, --resume goes on", silent, seconds);
    return retrofit_fail("an exchange takes more than %.3g s (--patience): does another rank hang? "
                         "The newest checkpoint is whole, --resume goes on", seconds);
}

// Waits on the host, so that a rank that is missing is noticed.
static bool nccl_finish(retrofit_ranks *ranks) {
    double begin = retrofit_seconds(), patience = ranks->patience + 3 * (double)ranks->rank;
    check_cuda(cudaEventRecord(nccl.done, nccl.on), "exchanging");
    check_cuda(cudaStreamWaitEvent(stream, nccl.done, 0), "exchanging");
    for (;;) {
        int error = NCCL_SUCCESS;
        cudaError_t event = cudaEventQuery(nccl.done);
        if (event == cudaSuccess) return true;
        if (event != cudaErrorNotReady) check_cuda(event, "exchanging");
        if (!nccl_ok(nccl.ncclCommGetAsyncError(nccl.comm, &error), "asking for errors"))
            return false;
        if (error != NCCL_IN_PROGRESS && !nccl_ok(error, "an exchange")) return false;
        double seconds = retrofit_seconds() - begin;
        if (seconds > 0.1 && ranks->answer) ranks->answer(ranks);
        if (seconds > patience) return give_up(ranks, seconds);
    }
}

// Where there is no MPI, rank 0 leaves the number by which NCCL's processes find each other in a
// file. One that a run left that was stopped just then is older than this process.
static bool write_meeting(const char *path, const ncclUniqueId *id) {
    char temporary[RETROFIT_PATH];
    snprintf(temporary, sizeof temporary, "%.*s.new", RETROFIT_PATH - 8, path);
    FILE *file = fopen(temporary, "wb");
    bool ok = file && fwrite(id, sizeof *id, 1, file) == 1;
    if (file && fclose(file) != 0) ok = false;
    if (ok && rename(temporary, path) == 0) return true;
    retrofit_fail("%s: %s", path, strerror(errno));
    remove(temporary);
    return false;
}

static bool read_meeting(const char *path, time_t begin, ncclUniqueId *id) {
    struct stat status;
    enum { APART = 60 }; // seconds between the starts of two processes, and between their clocks
    if (stat(path, &status) || status.st_mtime < begin - APART) return false;
    FILE *file = fopen(path, "rb");
    bool ok = file && fread(id, sizeof *id, 1, file) == 1;
    if (file) fclose(file);
    return ok;
}

static bool meet(retrofit_ranks *ranks, const char *path, ncclUniqueId *id) {
    time_t begin = time(NULL);
    if (ranks->rank == 0) remove(path);
    if (ranks->rank == 0 && !nccl_ok(nccl.ncclGetUniqueId(id), "beginning")) return false;
    if (ranks->share) {
        ranks->share(id, sizeof *id);
        return true;
    }
    if (ranks->rank == 0) return write_meeting(path, id);
    while (!read_meeting(path, begin, id)) {
        struct timespec pause = {0, 50000000};
        nanosleep(&pause, NULL);
        if (difftime(time(NULL), begin) > ranks->patience)
            return retrofit_fail("%s: rank 0 did not leave it within %.3g s", path,
                                 ranks->patience);
    }
    return true;
}

bool retrofit_nccl_start(retrofit_ranks *ranks, const char *meeting) {
    ncclUniqueId id;
    if (!open_nccl() || !meet(ranks, meeting, &id)) return false;
    check_cuda(cudaStreamCreateWithFlags(&nccl.on, cudaStreamNonBlocking), "exchanging");
    check_cuda(cudaEventCreateWithFlags(&nccl.asked, cudaEventDisableTiming), "exchanging");
    check_cuda(cudaEventCreateWithFlags(&nccl.done, cudaEventDisableTiming), "exchanging");
    int error = nccl.ncclCommInitRank(&nccl.comm, (int)ranks->count, id, (int)ranks->rank);
    if (!ranks->share && ranks->rank == 0) remove(meeting);
    ranks->all_reduce = nccl_all_reduce;
    ranks->broadcast = nccl_broadcast;
    ranks->finish = nccl_finish;
    return nccl_ok(error, "connecting");
}

// =================================================================================================
// 3  Matrix products
// =================================================================================================

// c (M,N) = residual + a (M,K) · b (K,N); residual has the shape of c, or is NULL for zero.
// Each matrix lies in memory row by row, and `…_row` elements lie between the beginnings of rows.
// The factors may be stored either way: a as (M,K) or, A_K_FIRST, as (K,M); b as (N,K) or,
// B_K_FIRST, as (K,N). The three products of a linear layer are three of these four cases.
template <typename E, typename OUT> struct product {
    OUT *c;
    const float *residual;
    const E *a, *b;
    size_t c_row, a_row, b_row, M, N, K;
    bool symmetric = false; // c(m, n) = c(n, m): each is computed once. There is no residual then
};

// ---- Few rows ----------------------------------------------------------------------------------
// Decoding multiplies one row or a few, up to ROWS. Then all the cost is to read b (N,K), of which
// every element is needed once for each row of a. A warp makes one column of c: its lanes share the
// sums over k = 0 … K - 1 of one row of b and all rows of a.

// sum[m] += the lane's part of Σ_k a(m, k)·b(k), where rows begin at multiples of 16 bytes and K is
// a multiple of 8: lane l takes the elements 8l … 8l + 7 of every 256.
template <int ROWS, typename E, typename OUT>
DEVICE void dot_by_vectors(float (&sum)[ROWS], const product<E, OUT> &p, const E *b, size_t lane) {
    constexpr int AHEAD = ROWS > 4 ? 2 : 4; // vectors of b that are on their way at a time
    for (size_t k0 = 8 * lane; k0 < p.K; k0 += 256 * AHEAD) {
        eight<E> next[AHEAD];
        EACH (j, AHEAD) next[j] = load_eight(b + (k0 + 256 * j < p.K ? k0 + 256 * j : k0));
        EACH (j, AHEAD) {
            float x[8], y[8];
            unpack(y, next[j]);
            if (k0 + 256 * j >= p.K) continue;
            EACH (m, ROWS) {
                size_t row = m < (int)p.M ? m : 0; // the sum of a row that isn't there is not used
                unpack(x, load_eight(p.a + row * p.a_row + k0 + 256 * j));
                EACH (i, 8) sum[m] += y[i] * x[i];
            }
        }
    }
}

// The same without these conditions: lane l takes the elements l, l + 32, …
template <int ROWS, typename E, typename OUT>
DEVICE void dot_by_elements(float (&sum)[ROWS], const product<E, OUT> &p, const E *b, size_t lane) {
    for (size_t k = lane; k < p.K; k += 32)
        for (int m = 0; m < ROWS && m < (int)p.M; m++)
            sum[m] += to_float(b[k]) * to_float(p.a[m * p.a_row + k]);
}

template <int ROWS, typename E, typename OUT>
__global__ void few_rows_kernel(product<E, OUT> p, bool vectors) {
    size_t n = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum[ROWS] = {};
    const E *b = p.b + n * p.b_row;
    // This is no reading yet: what an earlier kernel still writes there will be seen.
    for (size_t k = 128 / sizeof(E) * lane; n < p.N && k < p.K; k += 4096 / sizeof(E))
        prefetch(b + k);
    wait_for_previous();
    if (n >= p.N) return;
    if (vectors) dot_by_vectors(sum, p, b, lane);
    else dot_by_elements(sum, p, b, lane);
    EACH (m, ROWS) {
        float total = warp_sum(sum[m]);
        if (lane != 0 || m >= (int)p.M) continue;
        size_t at = m * p.c_row + n;
        from_float(p.c[at], total + (p.residual ? p.residual[at] : 0));
    }
}

template <int ROWS, typename E, typename OUT>
static void few_rows(const product<E, OUT> &p, bool aligned) {
    bool vectors = aligned && p.K % 8 == 0;
    LAUNCH_CHAINED((few_rows_kernel<ROWS, E, OUT>), ceil_of(p.N, THREADS / 32), THREADS, 0, p,
                   vectors);
}

#ifdef WITH_CUBLAS
// ---- cuBLASLt ----------------------------------------------------------------------------------
// cuBLASLt is half a gigabyte. It is opened when the first product is computed, so that a program
// that runs on the CPU starts as fast as without it.
#define CUBLAS_FUNCTIONS(X)                 \
    X(cublasLtCreate)                       \
    X(cublasLtMatmulDescCreate)             \
    X(cublasLtMatmulDescDestroy)            \
    X(cublasLtMatmulDescSetAttribute)       \
    X(cublasLtMatrixLayoutCreate)           \
    X(cublasLtMatrixLayoutDestroy)          \
    X(cublasLtMatmulPreferenceCreate)       \
    X(cublasLtMatmulPreferenceSetAttribute) \
    X(cublasLtMatmulPreferenceDestroy)      \
    X(cublasLtMatmulAlgoGetHeuristic)       \
    X(cublasLtMatmul)                       \
    X(cublasLtGetStatusString)
static struct {
    cublasLtHandle_t handle; // NULL if the library can't be used
#define X(function) decltype(&::function) function;
    CUBLAS_FUNCTIONS(X)
#undef X
} cublas;

static bool find_cublas_functions(const char *name) {
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library) return false;
#define X(f)                                                             \
    cublas.f = reinterpret_cast<decltype(cublas.f)>(dlsym(library, #f)); \
    if (!cublas.f) return false;
    CUBLAS_FUNCTIONS(X)
#undef X
    return true;
}

static bool open_cublas(void) {
    static bool tried;
    if (tried) return cublas.handle != NULL;
    tried = true;
    char name[32];
    snprintf(name, sizeof name, "libcublasLt.so.%d", CUDART_VERSION / 1000);
    if (find_cublas_functions(name) &&
        cublas.cublasLtCreate(&cublas.handle) == CUBLAS_STATUS_SUCCESS)
        return true;
    cublas.handle = NULL;
    fprintf(stderr, "retrofit: %s could not be opened: ", name);
    fprintf(stderr, "matrix products by our own kernels, which are slower\n");
    return false;
}

static void check_cublas(cublasStatus_t status, const char *what) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    fprintf(stderr, "retrofit: cuBLASLt: %s\n", cublas.cublasLtGetStatusString(status));
    check_cuda(cudaErrorUnknown, what);
}

// What an algorithm is chosen for.
struct cublas_shape {
    size_t M, N, K, a_row, b_row, c_row;
    cudaDataType_t type, out_type; // of the factors; of c and the residual
    int a_k_first, b_k_first, has_residual;
    int zero; // in place of padding: shapes are compared as bytes
};

// How cuBLASLt computes a product of one shape.
struct cublas_plan {
    cublas_shape shape;
    bool usable; // cuBLASLt has an algorithm for it
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
};

// A matrix of `rows` rows of `columns` elements each, their beginnings `row` elements apart.
static cublasLtMatrixLayout_t cublas_layout(cudaDataType_t type, size_t rows, size_t columns,
                                            size_t row) {
    cublasLtMatrixLayout_t layout;
    check_cublas(cublas.cublasLtMatrixLayoutCreate(&layout, type, columns, rows, (int64_t)row),
                 "describing a matrix to cuBLASLt");
    return layout;
}

static void set_cublas_operation(cublasLtMatmulDesc_t product,
                                 cublasLtMatmulDescAttributes_t factor, bool transposed) {
    cublasOperation_t operation = transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    check_cublas(
        cublas.cublasLtMatmulDescSetAttribute(product, factor, &operation, sizeof operation),
        "describing a product to cuBLASLt");
}

// cuBLASLt counts by columns. What we store as c (M,N) it sees as cᵀ (N,M) = bᵀ (N,K) · aᵀ (K,M):
// to it b is the first factor and a the second.
static void make_cublas_descriptors(cublas_plan *plan) {
    const cublas_shape *s = &plan->shape;
    check_cublas(cublas.cublasLtMatmulDescCreate(&plan->product, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                 "describing a product to cuBLASLt");
    set_cublas_operation(plan->product, CUBLASLT_MATMUL_DESC_TRANSA, !s->b_k_first);
    set_cublas_operation(plan->product, CUBLASLT_MATMUL_DESC_TRANSB, s->a_k_first);
    plan->b = s->b_k_first ? cublas_layout(s->type, s->K, s->N, s->b_row)
                           : cublas_layout(s->type, s->N, s->K, s->b_row);
    plan->a = s->a_k_first ? cublas_layout(s->type, s->K, s->M, s->a_row)
                           : cublas_layout(s->type, s->M, s->K, s->a_row);
    plan->c = cublas_layout(s->out_type, s->M, s->N, s->c_row);
}

template <typename V>
static void set_cublas_preference(cublasLtMatmulPreference_t preference,
                                  cublasLtMatmulPreferenceAttributes_t attribute, V value) {
    check_cublas(cublas.cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value,
                                                             sizeof value),
                 "telling cuBLASLt what to prefer");
}

// Takes the algorithm that cuBLASLt's heuristic names first.
static void choose_cublas_algorithm(cublas_plan *plan) {
    const cublasLtMatmulPreferenceAttributes_t alignments[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    // Where a sum over k is split, its parts are added in fp32 and in a fixed order.
    uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    cublasLtMatmulPreference_t preference;
    check_cublas(cublas.cublasLtMatmulPreferenceCreate(&preference), "preparing cuBLASLt");
    for (int i = 0; i < 4; i++) set_cublas_preference(preference, alignments[i], (uint32_t)16);
    set_cublas_preference(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (size_t)WORKSPACE);
    set_cublas_preference(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction);

    cublasLtMatmulHeuristicResult_t found;
    int results = 0;
    cublasStatus_t status = cublas.cublasLtMatmulAlgoGetHeuristic(
        cublas.handle, plan->product, plan->b, plan->a, plan->c, plan->c, preference, 1, &found,
        &results);
    plan->usable = status == CUBLAS_STATUS_SUCCESS && results == 1;
    if (plan->usable) plan->algorithm = found.algo;
    cublas.cublasLtMatmulPreferenceDestroy(preference);
}

static void free_cublas_plan(cublas_plan *plan) {
    if (!plan->product) return;
    cublas.cublasLtMatrixLayoutDestroy(plan->a);
    cublas.cublasLtMatrixLayoutDestroy(plan->b);
    cublas.cublasLtMatrixLayoutDestroy(plan->c);
    cublas.cublasLtMatmulDescDestroy(plan->product);
    memset(plan, 0, sizeof *plan);
}

// The plan for a shape, made when the shape is first seen. It stands in one of NEAR places behind
// the one that the shape's hash names; if all are taken, the first of them is given up.
static cublas_plan *find_cublas_plan(const cublas_shape *shape) {
    enum { PLANS = 1024, NEAR = 8 };
    static cublas_plan plans[PLANS];
    size_t home = retrofit_sample_hash(shape, sizeof *shape) % PLANS;
    cublas_plan *free_place = NULL;
    for (size_t i = 0; i < NEAR; i++) {
        cublas_plan *plan = &plans[(home + i) % PLANS];
        if (plan->product && memcmp(&plan->shape, shape, sizeof *shape) == 0) return plan;
        if (!plan->product && !free_place) free_place = plan;
    }
    cublas_plan *plan = free_place ? free_place : &plans[home];
    free_cublas_plan(plan);
    plan->shape = *shape;
    make_cublas_descriptors(plan);
    choose_cublas_algorithm(plan);
    return plan;
}

template <typename E> struct cuda_type;
template <> struct cuda_type<float> { static const cudaDataType_t value = CUDA_R_32F; };
template <> struct cuda_type<bf16> { static const cudaDataType_t value = CUDA_R_16BF; };

// Computes a product by cuBLASLt. false: it can't, or not as fast as it should.
template <bool A_K_FIRST, bool B_K_FIRST, typename E, typename OUT>
static bool by_cublas(const product<E, OUT> &p, bool aligned) {
    aligned = aligned && (uintptr_t)p.c % 16 == 0 && (uintptr_t)p.residual % 16 == 0;
    if (!open_cublas() || !aligned || p.c_row % 8 != 0) return false;

    cublas_shape shape = {p.M, p.N, p.K, p.a_row, p.b_row, p.c_row,
                          cuda_type<E>::value, cuda_type<OUT>::value,
                          A_K_FIRST, B_K_FIRST, p.residual != NULL, 0};
    const cublas_plan *plan = find_cublas_plan(&shape);
    if (!plan->usable) return false;

    float alpha = 1, beta = p.residual ? 1 : 0;
    const void *added = p.residual ? (const void *)p.residual : p.c; // not read if beta is 0
    cublasStatus_t status = cublas.cublasLtMatmul(
        cublas.handle, plan->product, &alpha, p.b, plan->b, p.a, plan->a, &beta, added, plan->c,
        p.c, plan->c, &plan->algorithm, workspace, WORKSPACE, stream);
    check_cublas(status, "a matrix product");
    return true;
}
#endif

// ---- Our own kernel ----------------------------------------------------------------------------
// A block makes a tile of 128x128 of c, each of its warps 64x64 of it, as 4x4 blocks of 16x16:
//
//                         n0                  n0 + 128
//                     m0  ┌─────────┬─────────┐               a warp's part:
//                         │ warp 0  │ warp 1  │               ┌───┬───┬───┬───┐
//                         │         │         │ 64 rows       ├───┼───┼───┼───┤ 64 rows,
//                         ├─────────┼─────────┤               ├───┼───┼───┼───┤ 64 columns
//                         │ warp 2  │ warp 3  │               ├───┼───┼───┼───┤
//                         │         │         │               └───┴───┴───┴───┘
//               m0 + 128  └─────────┴─────────┘
//
// (In fp32, whose products take more registers, eight warps make 64x32 each.) It goes along k in
// steps of 64 bytes. Shared memory holds GEMM_STAGES steps, each a tile of a and a tile of b: one
// is multiplied while cp.async fills the others.
//
//               step     0      1      2      3      4      5   …
//               stage    0      1      2      3      0      1
//                        │      └──────┬──────┘      └ takes the place of step 0, once all
//                        │             on their way    warps have multiplied that
//                        └ multiplied
enum { GEMM_SIDE = 128, GEMM_STAGES = 4, GEMM_BAND = 8 };

// How the work on one product is divided. The tiles of the factors lie in shared memory as the
// factors lie in global memory.
template <bool A_K_FIRST, bool B_K_FIRST, typename E> struct gemm_layout {
    static constexpr int DEPTH = 64 / (int)sizeof(E);             // of a step, in elements
    static constexpr int WARP_COLUMNS = sizeof(E) == 2 ? 64 : 32; // of c; 64 rows
    static constexpr int WARPS_ACROSS = GEMM_SIDE / WARP_COLUMNS;
    static constexpr int BLOCK = 32 * 2 * WARPS_ACROSS;           // threads
    static constexpr int BLOCKS = sizeof(E) == 2 ? 2 : 1;         // at a time on a multiprocessor
    template <bool K_FIRST, bool ALIGNED>
    using copies = tile_copies<K_FIRST ? DEPTH : (int)GEMM_SIDE, K_FIRST ? (int)GEMM_SIDE : DEPTH,
                               BLOCK, ALIGNED, E>;
    static constexpr int A_STRIDE = copies<A_K_FIRST, true>::STRIDE;
    static constexpr int B_STRIDE = copies<B_K_FIRST, true>::STRIDE;
    static constexpr int A_SIZE = copies<A_K_FIRST, true>::SIZE;
    static constexpr int STAGE_SIZE = A_SIZE + copies<B_K_FIRST, true>::SIZE;
    static constexpr size_t BYTES = GEMM_STAGES * STAGE_SIZE * sizeof(E);

    // Where the element of row m of a, or of column n of b, and of k is in its tile.
    static DEVICE int a_at(int m, int k) { return A_K_FIRST ? k * A_STRIDE + m : m * A_STRIDE + k; }
    static DEVICE int b_at(int n, int k) { return B_K_FIRST ? k * B_STRIDE + n : n * B_STRIDE + k; }
};

// Which tile of c a block makes. Blocks that run at the same time should share rows of a and
// columns of b, which the second-level cache then holds. So c is cut into bands, GEMM_BAND tiles
// high, and the blocks' numbers go down the columns of a band, from left to right:
//
//                 band 0    0   8  16  …          band 1   the same, behind all of band 0
//                           1   9  17
//                           …
//                           7  15  23
//
// Of a symmetric c only the tiles on and under the diagonal are made, in the order of rows: row i
// begins with tile i·(i + 1)/2.
struct tile_place { size_t m0, n0; };

DEVICE tile_place gemm_place(size_t M, size_t N) {
    size_t across = (N + GEMM_SIDE - 1) / GEMM_SIDE, down = (M + GEMM_SIDE - 1) / GEMM_SIDE;
    size_t band = blockIdx.x / (GEMM_BAND * across) * GEMM_BAND; // its first row of tiles
    size_t height = down - band < GEMM_BAND ? down - band : (size_t)GEMM_BAND;
    size_t in_band = blockIdx.x % (GEMM_BAND * across);
    return {(band + in_band % height) * GEMM_SIDE, in_band / height * GEMM_SIDE};
}

DEVICE tile_place symmetric_place(void) {
    unsigned tile = blockIdx.x, row = (unsigned)((sqrtf(8.0f * tile + 1) - 1) / 2);
    while (row * (row + 1) / 2 > tile) row--; // where the root was rounded
    while ((row + 1) * (row + 2) / 2 <= tile) row++;
    return {(size_t)row * GEMM_SIDE, (size_t)(tile - row * (row + 1) / 2) * GEMM_SIDE};
}

// sum += the warp's rows of a's tile · its columns of b's tile. sum[i][j] is the 16x8 at
// (16·i, 8·j) of the warp's part, as mma lays it out.
template <typename L, bool A_K_FIRST, bool B_K_FIRST, int COLUMNS, typename E>
DEVICE void gemm_multiply(float (&sum)[4][COLUMNS / 8][4], const E *a_tile, const E *b_tile) {
    EACH (step, L::DEPTH / 16) {
        int k = 16 * step;
        fragment<E> a[4], b;
        EACH (i, 4) load_a<A_K_FIRST>(a[i], a_tile + L::a_at(16 * i, k), L::A_STRIDE);
        EACH (j, COLUMNS / 16) {
            load_b<B_K_FIRST>(b, b_tile + L::b_at(16 * j, k), L::B_STRIDE);
            EACH (i, 4) multiply(&sum[i][2 * j], a[i], b);
        }
    }
}

// c(m, n) and c(n, m) = x, if this is on or under the diagonal: above it others compute the same.
template <typename E, typename OUT>
DEVICE void gemm_store_twice(const product<E, OUT> &p, size_t m, size_t n, float x) {
    if (n > m || m >= p.M) return;
    from_float(p.c[m * p.c_row + n], x);
    from_float(p.c[n * p.c_row + m], x);
}

// c(m, n) = x and c(m, n + 1) = y, each plus the residual, where they are inside of c. n is even.
template <typename E, typename OUT>
DEVICE void gemm_store(const product<E, OUT> &p, size_t m, size_t n, float x, float y) {
    size_t at = m * p.c_row + n;
    if (p.symmetric) {
        gemm_store_twice(p, m, n, x);
        gemm_store_twice(p, m, n + 1, y);
        return;
    }
    if (m >= p.M || n >= p.N) return;
    bool both = n + 1 < p.N;
    if (p.residual) {
        x += p.residual[at];
        y += both ? p.residual[at + 1] : 0;
    }
    if (both && p.c_row % 2 == 0) {
        store2(p.c + at, x, y);
        return;
    }
    from_float(p.c[at], x);
    if (both) from_float(p.c[at + 1], y);
}

template <bool A_K_FIRST, bool B_K_FIRST, bool ALIGNED, typename E, typename OUT>
__global__ void __launch_bounds__((gemm_layout<A_K_FIRST, B_K_FIRST, E>::BLOCK),
                                  (gemm_layout<A_K_FIRST, B_K_FIRST, E>::BLOCKS))
gemm_kernel(product<E, OUT> p) {
    typedef gemm_layout<A_K_FIRST, B_K_FIRST, E> L;
    DYN_SMEM(E, tiles); // [GEMM_STAGES] of a tile of a, then a tile of b
    tile_place place = p.symmetric ? symmetric_place() : gemm_place(p.M, p.N);
    int steps = (int)((p.K + L::DEPTH - 1) / L::DEPTH);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int m_warp = warp / L::WARPS_ACROSS * 64, n_warp = warp % L::WARPS_ACROSS * L::WARP_COLUMNS;
    size_t M = p.M - place.m0, N = p.N - place.n0; // that are left of a's rows and b's columns
    typename L::template copies<A_K_FIRST, ALIGNED> a(
        p.a + (A_K_FIRST ? place.m0 : place.m0 * p.a_row), p.a_row);
    typename L::template copies<B_K_FIRST, ALIGNED> b(
        p.b + (B_K_FIRST ? place.n0 : place.n0 * p.b_row), p.b_row);
    size_t a_step = A_K_FIRST ? L::DEPTH * p.a_row : L::DEPTH;
    size_t b_step = B_K_FIRST ? L::DEPTH * p.b_row : L::DEPTH;
    auto limit = [&](size_t K) {
        a.limit(A_K_FIRST ? K : M, A_K_FIRST ? M : K);
        b.limit(B_K_FIRST ? K : N, B_K_FIRST ? N : K);
    };

    // A step behind the last copies nothing but still commits, so that groups are counted right.
    auto load = [&](int step) {
        if (step < steps) {
            if (step == steps - 1) limit(p.K - (size_t)step * L::DEPTH);
            E *tile = tiles + step % GEMM_STAGES * L::STAGE_SIZE;
            a.copy(tile);
            b.copy(tile + L::A_SIZE);
            a.from += a_step;
            b.from += b_step;
        }
        cp_async_commit();
    };

    // (1) The first GEMM_STAGES - 1 steps are on their way.
    float sum[4][L::WARP_COLUMNS / 8][4] = {};
    limit(p.K);
    for (int step = 0; step + 1 < GEMM_STAGES; step++) load(step);
    for (int step = 0; step < steps; step++) {
        // (2) This thread's copies of this step have arrived; behind the barrier, those of all
        // threads. Behind the barrier nobody reads the tiles of the step before either.
        cp_async_wait<GEMM_STAGES - 2>();
        __syncthreads();
        // (3) The step that takes their place.
        load(step + GEMM_STAGES - 1);
        // (4) Multiply.
        const E *tile = tiles + step % GEMM_STAGES * L::STAGE_SIZE;
        gemm_multiply<L, A_K_FIRST, B_K_FIRST, L::WARP_COLUMNS>(
            sum, tile + L::a_at(m_warp, 0), tile + L::A_SIZE + L::b_at(n_warp, 0));
    }
    cp_async_wait<0>();
    // (5) The epilogue: of each 8 columns of a row, a lane holds two neighbours.
    EACH (i, 4)
        EACH (half, 2)
            EACH (j, L::WARP_COLUMNS / 8) {
                size_t m = place.m0 + m_warp + 16 * i + lane / 4 + 8 * half;
                size_t n = place.n0 + n_warp + 8 * j + lane % 4 * 2;
                gemm_store(p, m, n, sum[i][j][2 * half], sum[i][j][2 * half + 1]);
            }
}

// ---- Which of the three ------------------------------------------------------------------------
template <bool A_K_FIRST, bool B_K_FIRST, bool ALIGNED, typename E, typename OUT>
static void gemm_by_tiles(const product<E, OUT> &p) {
    typedef gemm_layout<A_K_FIRST, B_K_FIRST, E> layout;
    auto kernel = gemm_kernel<A_K_FIRST, B_K_FIRST, ALIGNED, E, OUT>;
    static bool allowed;
    if (!allowed) allow_shared_memory<layout::BYTES>(kernel);
    allowed = true;
    size_t down = ceil_of(p.M, GEMM_SIDE), across = ceil_of(p.N, GEMM_SIDE);
    size_t tiles = p.symmetric ? down * (down + 1) / 2 : down * across;
    launch("gemm_kernel", false, kernel, tiles, layout::BLOCK, layout::BYTES, p);
}

template <bool A_K_FIRST, bool B_K_FIRST, typename E, typename OUT>
static void gemm(const product<E, OUT> &p) {
    bool aligned = (uintptr_t)p.a % 16 == 0 && (uintptr_t)p.b % 16 == 0 &&
                   p.a_row * sizeof(E) % 16 == 0 && p.b_row * sizeof(E) % 16 == 0;
    if constexpr (!A_K_FIRST && !B_K_FIRST) {
        if (p.M == 1) return few_rows<1>(p, aligned);
        if (p.M <= 4) return few_rows<4>(p, aligned);
        if (p.M <= 8) return few_rows<8>(p, aligned);
    }
#ifdef WITH_CUBLAS
    if (!p.symmetric && by_cublas<A_K_FIRST, B_K_FIRST>(p, aligned)) return;
#endif
    if (aligned) gemm_by_tiles<A_K_FIRST, B_K_FIRST, true>(p);
    else gemm_by_tiles<A_K_FIRST, B_K_FIRST, false>(p);
}

// =================================================================================================
// 4  The operations
// =================================================================================================

// ---- Embedding: x_n = wte[token_n] -------------------------------------------------------------
// One block per token.
template <typename WEIGHT>
__global__ void embedding_forward_kernel(float *x, const int32_t *tokens, const WEIGHT *wte,
                                         size_t stride, size_t d) {
    const WEIGHT *row = wte + (size_t)tokens[blockIdx.x] * stride;
    for (size_t c = 8 * threadIdx.x; c < d; c += 8 * THREADS) {
        float v[8];
        load8(v, row + c, d - c);
        store8(x + blockIdx.x * d + c, v, d - c);
    }
}

template <typename E>
static void embedding_forward(float *x, const int32_t *tokens, retrofit_weight wte, size_t N,
                              size_t d) {
    const float *as_float = (const float *)wte.data;
    const bf16 *as_bf16 = (const bf16 *)wte.data;
    if (wte.type == RETROFIT_F32)
        LAUNCH(embedding_forward_kernel<float>, N, THREADS, 0, x, tokens, as_float, wte.stride, d);
    else LAUNCH(embedding_forward_kernel<bf16>, N, THREADS, 0, x, tokens, as_bf16, wte.stride, d);
}

// Backward: dwte[v] += Σ_n dx_n over the n whose token is v.
// One block per n. The block at the first n of a token adds up all n of that token, in order; the
// others return at once. It finds them 256 at a time: 32 by each warp, as the bits of a ballot.

// dw (d) += Σ rows[i] over the bits i of mask, the lowest first.
DEVICE void add_rows_of(float *dw, const float *rows, unsigned mask, size_t d) {
    for (unsigned left = mask; left; left &= left - 1) {
        const float *row = rows + (__ffs((int)left) - 1) * d;
        for (size_t c = threadIdx.x; c < d; c += THREADS) dw[c] += row[c];
    }
}

__global__ void embedding_backward_kernel(float *dwte, const int32_t *tokens, const float *dx,
                                          size_t N, size_t d) {
    SMEM(unsigned, masks, THREADS / 32); // which of the next 256 n have the token
    int32_t token = tokens[blockIdx.x];
    int earlier = 0;
    for (size_t n = threadIdx.x; n < blockIdx.x; n += THREADS) earlier |= tokens[n] == token;
    if (__syncthreads_or(earlier)) return;
    for (size_t n = blockIdx.x; n < N; n += THREADS) {
        bool here = n + threadIdx.x < N && tokens[n + threadIdx.x] == token;
        unsigned mask = __ballot_sync(~0u, here);
        if (threadIdx.x % 32 == 0) masks[threadIdx.x / 32] = mask;
        __syncthreads();
        for (int w = 0; w < THREADS / 32; w++)
            add_rows_of(dwte + (size_t)token * d, dx + (n + 32 * w) * d, masks[w], d);
        __syncthreads();
    }
}

template <typename E>
static void embedding_backward(float *dwte, const int32_t *tokens, const float *dx, size_t N,
                               size_t d) {
    LAUNCH(embedding_backward_kernel, N, THREADS, 0, dwte, tokens, dx, N, d);
}

// ---- RMSNorm: y = x·ρ·w, ρ = 1/√(mean(x²) + eps) -----------------------------------------------
// One block per row. Of rmsnorm_residual, whose out is fp32, y is added to residual; else residual
// is NULL.
template <typename E>
__global__ void rmsnorm_forward_kernel(E *out, float *rstd, const float *residual, const float *x,
                                       const float *weight, size_t d, float eps) {
    wait_for_previous();
    float squares = 0;
    x += blockIdx.x * d;
    out += blockIdx.x * d;
    if (residual) residual += blockIdx.x * d;
    for (size_t c = 8 * threadIdx.x; c < d; c += 8 * THREADS) {
        float v[8];
        load8(v, x + c, d - c);
        for (int i = 0; i < 8; i++) squares += v[i] * v[i];
    }
    float scale = 1.0f / sqrtf(block_sum(squares) / (float)d + eps); // ρ
    for (size_t c = 8 * threadIdx.x; c < d; c += 8 * THREADS) {
        float v[8], w[8], base[8] = {0};
        load8(v, x + c, d - c);
        load8(w, weight + c, d - c);
        if (residual) load8(base, residual + c, d - c);
        for (int i = 0; i < 8; i++) v[i] = base[i] + v[i] * (scale * w[i]);
        store8(out + c, v, d - c);
    }
    if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
}

template <typename E>
static void rmsnorm_forward(act *out, float *rstd, const float *x, const float *weight, size_t N,
                            size_t d, float eps) {
    const float *none = NULL;
    LAUNCH_CHAINED(rmsnorm_forward_kernel<E>, N, THREADS, 0, (E *)out, rstd, none, x, weight, d,
                   eps);
}

template <typename E>
static void rmsnorm_residual_forward(float *out, float *rstd, const float *residual, const float *x,
                                     const float *weight, size_t N, size_t d, float eps) {
    LAUNCH_CHAINED(rmsnorm_forward_kernel<float>, N, THREADS, 0, out, rstd, residual, x, weight, d,
                   eps);
}

// Backward, with g = dy·w:   dx += ρ·(g - x·ρ²·mean(g·x))      dw += Σ_n dy·x·ρ
// At most 1024 blocks. Block i takes the rows i, i + blocks, … and adds up dw over them in its own
// row of the workspace (blocks,d); add_rows_kernel then adds the rows to dw. Of rmsnorm_residual,
// whose dy is fp32, dx has the type of activations and is set; else it is fp32 and added to.

// along = ρ²·mean(g·x), in every thread
template <typename E>
DEVICE float rmsnorm_along(const E *dout, const float *x, const float *weight, float r, size_t d) {
    float dy[8], v[8], w[8], along = 0;
    for (size_t c = 8 * threadIdx.x; c < d; c += 8 * THREADS) {
        load8(dy, dout + c, d - c);
        load8(v, x + c, d - c);
        load8(w, weight + c, d - c);
        for (int i = 0; i < 8; i++) along += dy[i] * w[i] * v[i];
    }
    return block_sum(along) * r * r / (float)d;
}

template <bool ADD, typename D, typename E>
__global__ void rmsnorm_backward_kernel(D *dx, float *dw_rows, const E *dout, const float *x,
                                        const float *rstd, const float *weight, size_t N,
                                        size_t d) {
    float *dw_row = dw_rows + blockIdx.x * d;
    for (size_t n = blockIdx.x; n < N; n += gridDim.x) {
        float dy[8], v[8], w[8], sum[8], r = rstd[n];
        float along = rmsnorm_along(dout + n * d, x + n * d, weight, r, d);
        for (size_t c = 8 * threadIdx.x; c < d; c += 8 * THREADS) {
            load8(dy, dout + n * d + c, d - c);
            load8(v, x + n * d + c, d - c);
            load8(w, weight + c, d - c);
            load8(sum, dw_row + c, n < gridDim.x ? 0 : d - c); // at the first row: zeros
            for (int i = 0; i < 8; i++) sum[i] += dy[i] * v[i] * r;
            store8(dw_row + c, sum, d - c);
            load8(sum, dx + n * d + c, ADD ? d - c : 0);
            for (int i = 0; i < 8; i++) sum[i] += r * (dy[i] * w[i] - v[i] * along);
            store8(dx + n * d + c, sum, d - c);
        }
    }
}

// out (d) += Σ_r rows[r]. One block per 32 columns, eight threads for each: thread j of a column
// adds up the rows j, j + 8, …, and the first thread adds up what the eight have.
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

// How many blocks take turns with N rows, each with a row of d sums in the workspace.
static size_t blocks_with_sums(size_t N, size_t d) {
    return retrofit_min(retrofit_min(N, 1024), WORKSPACE / sizeof(float) / d);
}

template <typename E>
static void rmsnorm_backward(float *dx, float *dweight, const act *dout, const float *x,
                             const float *rstd, const float *weight, size_t N, size_t d) {
    float *rows = (float *)workspace;
    size_t blocks = blocks_with_sums(N, d);
    auto kernel = rmsnorm_backward_kernel<true, float, E>;
    LAUNCH(kernel, blocks, THREADS, 0, dx, rows, (const E *)dout, x, rstd, weight, N, d);
    if (dweight) LAUNCH(add_rows_kernel, ceil_of(d, 32), THREADS, 0, dweight, rows, blocks, d);
}

template <typename E>
static void rmsnorm_residual_backward(act *dinp, float *dweight, const float *dout, const float *x,
                                      const float *rstd, const float *weight, size_t N, size_t d) {
    float *rows = (float *)workspace;
    size_t blocks = blocks_with_sums(N, d);
    auto kernel = rmsnorm_backward_kernel<false, E, float>;
    LAUNCH(kernel, blocks, THREADS, 0, (E *)dinp, rows, dout, x, rstd, weight, N, d);
    if (dweight) LAUNCH(add_rows_kernel, ceil_of(d, 32), THREADS, 0, dweight, rows, blocks, d);
}

// ---- Biases: y += b, db += Σ_n dy_n -------------------------------------------------------------
// One thread per eight elements.
template <typename E>
__global__ void bias_forward_kernel(E *y, const float *bias, size_t N, size_t O) {
    wait_for_previous();
    size_t o, n = divide((size_t)blockIdx.x * THREADS + threadIdx.x, (O + 7) / 8, o);
    if (n >= N) return;
    o *= 8;
    float v[8], b[8];
    load8(v, y + n * O + o, O - o);
    load8(b, bias + o, O - o);
    for (int i = 0; i < 8; i++) v[i] += b[i];
    store8(y + n * O + o, v, O - o);
}

template <typename E> static void bias_forward(act *y, const float *bias, size_t N, size_t O) {
    LAUNCH_CHAINED(bias_forward_kernel<E>, ceil_of(N * ceil_of(O, 8), THREADS), THREADS, 0, (E *)y,
                   bias, N, O);
}

// Block i adds up the rows i, i + blocks, … in its own row of the workspace (blocks,O).
template <typename E>
__global__ void bias_backward_kernel(float *sums, const E *dy, size_t N, size_t O) {
    for (size_t o = 8 * threadIdx.x; o < O; o += 8 * THREADS) {
        float sum[8] = {0}, v[8];
        for (size_t n = blockIdx.x; n < N; n += gridDim.x) {
            load8(v, dy + n * O + o, O - o);
            for (int i = 0; i < 8; i++) sum[i] += v[i];
        }
        store8(sums + blockIdx.x * O + o, sum, O - o);
    }
}

template <typename E> static void bias_backward(float *dbias, const act *dy, size_t N, size_t O) {
    float *rows = (float *)workspace;
    size_t blocks = blocks_with_sums(N, O);
    LAUNCH(bias_backward_kernel<E>, blocks, THREADS, 0, rows, (const E *)dy, N, O);
    LAUNCH(add_rows_kernel, ceil_of(O, 32), THREADS, 0, dbias, rows, blocks, O);
}

// ---- Norms of q and k, in place: of each head, or one of q and one of k -------------------------
struct qk_norms {
    size_t N, H, G, h;
    bool per_head;
    __host__ __device__ size_t Q() const { return (H + 2 * G) * h; }
    __host__ __device__ size_t both() const { return (H + G) * h; } // numbers of q and k
    __host__ __device__ size_t count() const { return per_head ? H + G : 2; } // norms of a token
    __host__ __device__ size_t q_width() const { return per_head ? h : H * h; }
    __host__ __device__ size_t k_width() const { return per_head ? h : G * h; }
};

// One warp per norm: its number among the token's, and where its numbers are.
struct qk_norm_at {
    size_t n, i, first, width, lane;
    bool of_q;
    DEVICE qk_norm_at(const qk_norms &s) {
        size_t thread = (size_t)blockIdx.x * THREADS + threadIdx.x;
        n = divide(thread / 32, s.count(), i);
        lane = thread % 32;
        of_q = s.per_head ? i < s.H : i == 0;
        width = of_q ? s.q_width() : s.k_width();
        first = s.per_head ? i * s.h : i * s.H * s.h;
    }
};

template <typename E>
__global__ void qk_norm_forward_kernel(E *qkv, E *qk, float *rstd, const float *q_norm,
                                       const float *k_norm, qk_norms s, float eps) {
    wait_for_previous();
    qk_norm_at at(s);
    if (at.n >= s.N) return;
    E *x = qkv + at.n * s.Q() + at.first, *kept = qk ? qk + at.n * s.both() + at.first : NULL;
    const float *weight = at.of_q ? q_norm : k_norm;
    float v[8], w[8], squares = 0;
    for (size_t c = 8 * at.lane; c < at.width; c += 8 * 32) {
        load8(v, x + c, at.width - c);
        if (kept) store8(kept + c, v, at.width - c);
        for (int i = 0; i < 8; i++) squares += v[i] * v[i];
    }
    float scale = 1.0f / sqrtf(warp_sum(squares) / (float)at.width + eps); // ρ
    for (size_t c = 8 * at.lane; c < at.width; c += 8 * 32) {
        load8(v, x + c, at.width - c);
        load8(w, weight + c, at.width - c);
        for (int i = 0; i < 8; i++) v[i] *= scale * w[i];
        store8(x + c, v, at.width - c);
    }
    if (rstd && at.lane == 0) rstd[at.n * s.count() + at.i] = scale;
}

template <typename E>
static void qk_norm_forward(act *qkv, act *qk, float *rstd, const float *q_norm,
                            const float *k_norm, size_t N, size_t H, size_t G, size_t h,
                            bool per_head, float eps) {
    qk_norms s = {N, H, G, h, per_head};
    LAUNCH_CHAINED(qk_norm_forward_kernel<E>, ceil_of(32 * N * s.count(), THREADS), THREADS, 0,
                   (E *)qkv, (E *)qk, rstd, q_norm, k_norm, s, eps);
}

// dx = ρ·(g - x·ρ²·mean(g·x)), g = dy·w. Warps as above.
template <typename E>
__global__ void qk_norm_backward_kernel(E *dqkv, const E *qk, const float *rstd,
                                        const float *q_norm, const float *k_norm, qk_norms s) {
    qk_norm_at at(s);
    if (at.n >= s.N) return;
    E *dy = dqkv + at.n * s.Q() + at.first;
    const E *x = qk + at.n * s.both() + at.first;
    const float *weight = at.of_q ? q_norm : k_norm;
    float g[8], v[8], w[8], along = 0, scale = rstd[at.n * s.count() + at.i];
    for (size_t c = 8 * at.lane; c < at.width; c += 8 * 32) {
        load8(g, dy + c, at.width - c);
        load8(v, x + c, at.width - c);
        load8(w, weight + c, at.width - c);
        for (int i = 0; i < 8; i++) along += g[i] * w[i] * v[i];
    }
    along = warp_sum(along) * scale * scale / (float)at.width;
    for (size_t c = 8 * at.lane; c < at.width; c += 8 * 32) {
        load8(g, dy + c, at.width - c);
        load8(v, x + c, at.width - c);
        load8(w, weight + c, at.width - c);
        for (int i = 0; i < 8; i++) g[i] = scale * (g[i] * w[i] - v[i] * along);
        store8(dy + c, g, at.width - c);
    }
}

// dw = Σ dy·x·ρ over the tokens, and over the heads that share it: block i adds up the tokens i,
// i + blocks, … in its own rows of the workspace, (blocks,q_width) and (blocks,k_width). One thread
// per column.
template <typename E>
__global__ void qk_weight_kernel(float *q_rows, float *k_rows, const E *dqkv, const E *qk,
                                 const float *rstd, qk_norms s) {
    size_t wq = s.q_width(), wk = s.k_width();
    for (size_t c = threadIdx.x; c < wq + wk; c += THREADS) {
        bool of_q = c < wq;
        size_t first = of_q ? c : s.H * s.h + c - wq, norm = of_q ? 0 : s.per_head ? s.H : 1;
        size_t heads = s.per_head ? (of_q ? s.H : s.G) : 1;
        float sum = 0;
        for (size_t n = blockIdx.x; n < s.N; n += gridDim.x) {
            for (size_t j = 0; j < heads; j++) {
                float dy = to_float(dqkv[n * s.Q() + first + j * s.h]);
                float x = to_float(qk[n * s.both() + first + j * s.h]);
                sum += dy * x * rstd[n * s.count() + norm + j];
            }
        }
        if (of_q) q_rows[blockIdx.x * wq + c] = sum;
        else k_rows[blockIdx.x * wk + c - wq] = sum;
    }
}

template <typename E>
static void qk_norm_backward(act *dqkv, float *dq_norm, float *dk_norm, const act *qk,
                             const float *rstd, const float *q_norm, const float *k_norm, size_t N,
                             size_t H, size_t G, size_t h, bool per_head) {
    qk_norms s = {N, H, G, h, per_head};
    size_t wq = s.q_width(), wk = s.k_width(), blocks = blocks_with_sums(N, wq + wk);
    float *q_rows = (float *)workspace, *k_rows = q_rows + blocks * wq;
    if (dq_norm) {
        LAUNCH(qk_weight_kernel<E>, blocks, THREADS, 0, q_rows, k_rows, (const E *)dqkv,
               (const E *)qk, rstd, s);
        LAUNCH(add_rows_kernel, ceil_of(wq, 32), THREADS, 0, dq_norm, q_rows, blocks, wq);
        LAUNCH(add_rows_kernel, ceil_of(wk, 32), THREADS, 0, dk_norm, k_rows, blocks, wk);
    }
    LAUNCH(qk_norm_backward_kernel<E>, ceil_of(32 * N * s.count(), THREADS), THREADS, 0, (E *)dqkv,
           (const E *)qk, rstd, q_norm, k_norm, s);
}

// ---- Linear layers: out = inp·wᵀ, dinp = dout·w, dw += doutᵀ·inp -------------------------------
// By section 3. The braces hold {c, residual, a, b, c_row, a_row, b_row, M, N, K} of the product.
template <typename E>
static void matmul_forward(act *out, const act *inp, retrofit_weight w, size_t N, size_t I,
                           size_t O) {
    const E *a = (const E *)inp, *b = (const E *)w.data; // (N,I) and (O,I)
    product<E, E> p = {(E *)out, NULL, a, b, O, I, w.stride, N, O, I};
    gemm<false, false>(p);
}

template <typename E>
static void matmul_residual_forward(float *out, const float *residual, const act *inp,
                                    retrofit_weight w, size_t N, size_t I, size_t O) {
    const E *a = (const E *)inp, *b = (const E *)w.data; // (N,I) and (O,I)
    product<E, float> p = {out, residual, a, b, O, I, w.stride, N, O, I};
    gemm<false, false>(p);
}

template <typename E>
static void matmul_backward_input(act *dinp, const act *dout, retrofit_weight w, size_t N, size_t I,
                                  size_t O) {
    const E *a = (const E *)dout, *b = (const E *)w.data; // (N,O) and (O,I): k first
    product<E, E> p = {(E *)dinp, NULL, a, b, I, O, w.stride, N, I, O};
    gemm<false, true>(p);
}

template <typename E>
static void matmul_residual_backward_input(float *dinp, const act *dout, retrofit_weight w,
                                           size_t N, size_t I, size_t O) {
    const E *a = (const E *)dout, *b = (const E *)w.data; // (N,O) and (O,I): k first
    product<E, float> p = {dinp, NULL, a, b, I, O, w.stride, N, I, O};
    gemm<false, true>(p);
}

template <typename E>
static void matmul_backward_weight(float *dw, size_t stride, const act *dout, const act *inp,
                                   size_t N, size_t I, size_t O) {
    const E *a = (const E *)dout, *b = (const E *)inp; // (N,O) and (N,I): k first in both
    product<E, float> p = {dw, dw, a, b, stride, O, I, O, I, N};
    gemm<true, true>(p);
}

template <typename E>
static void matmul_symmetric(act *out, const act *inp, size_t N, size_t I) {
    const E *a = (const E *)inp; // (N,I)
    product<E, E> p = {(E *)out, NULL, a, a, N, I, I, N, N, I, true};
    gemm<false, false>(p);
}

// ---- RoPE: (x, y) = elements i and i + h/2 of a head turn by the angle φ = position·θ_i --------
//     x ← x·cos φ - y·sin φ      y ← y·cos φ + x·sin φ         backward: by -φ
// One thread per eight pairs of a head; the heads are the H of the queries and the G of the keys.
struct attention_shape {
    size_t B, T, H, G, h;
    __host__ __device__ size_t Q() const { return (H + 2 * G) * h; } // the width of qkv
};

template <typename E>
__global__ void rotate_kernel(E *qkv, const float *table, const int32_t *past, attention_shape s,
                              float sign) {
    wait_for_previous();
    size_t half = s.h / 2, i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= s.B * s.T * (s.H + s.G) * ((half + 7) / 8)) return;
    size_t t, head, p;
    i = divide(i, (half + 7) / 8, p);
    size_t n = divide(i, s.H + s.G, head), b = divide(n, s.T, t);
    p *= 8; // the first of the eight pairs
    size_t position = (past ? (size_t)past[b] : 0) + t, left = half - p;
    E *x_row = qkv + n * (s.H + 2 * s.G) * s.h + head * s.h + p, *y_row = x_row + half;
    const float *angle_row = table + position * s.h + 2 * p;
    float x[8], y[8], angles[16]; // angles: cos and sin in turn
    load8(x, x_row, left);
    load8(y, y_row, left);
    load8(angles, angle_row, 2 * left);
    load8(angles + 8, angle_row + 8, 2 * left > 8 ? 2 * left - 8 : 0);
    for (int j = 0; j < 8; j++) {
        float xj = x[j], yj = y[j], cosine = angles[2 * j], sine = sign * angles[2 * j + 1];
        x[j] = xj * cosine - yj * sine;
        y[j] = yj * cosine + xj * sine;
    }
    store8(x_row, x, left);
    store8(y_row, y, left);
}

template <typename E>
static void rotate(act *qkv, const float *table, const int32_t *past, attention_shape s,
                   float sign) {
    size_t threads = s.B * s.T * (s.H + s.G) * ceil_of(s.h / 2, 8);
    LAUNCH_CHAINED(rotate_kernel<E>, ceil_of(threads, THREADS), THREADS, 0, (E *)qkv, table, past,
                   s, sign);
}

template <typename E>
static void rope_forward(act *qkv, const float *table, const int32_t *past, size_t B, size_t T,
                         size_t H, size_t G, size_t h) {
    rotate<E>(qkv, table, past, {B, T, H, G, h}, 1.0f);
}

template <typename E>
static void rope_backward(act *dqkv, const float *table, size_t B, size_t T, size_t H, size_t G,
                          size_t h) {
    rotate<E>(dqkv, table, NULL, {B, T, H, G, h}, -1.0f);
}

// ---- Attention: FlashAttention-2 (Dao 2023) on tensor cores ------------------------------------
//     o_t = Σ_u p_tu·v_u     p_tu = softmax_{u ≤ t}(q_t·k_u/√h)     lse_t = log Σ_u e^(q_t·k_u/√h)
//
// Packed rows. The `group` = H/G query heads that read the same keys and values are treated as rows
// of one matrix, so that a tile of keys is read once for all of them. For sequence b and key/value
// head g, row r is the query of token r / group and of head g·group + r % group:
//
//           row     0    1    2    3    4    5    6  …          (group = 3)
//           token   0    0    0    1    1    1    2  …
//           head    3g  3g+1 3g+2  3g  3g+1 3g+2  3g …
//
// Row r sees the keys up to its token, as many as `past` more where there is a cache.
//
// A warp owns 16 rows of each product's result, or ROW_BLOCKS times 16. Of each 16 a lane has parts
// of two rows, g (i = 0 below) and g + 8 (i = 1): of every eight columns, 2t and 2t + 1. So a row's
// maximum and sum need the four lanes that share it, and no more (quad_max, quad_sum).
//
// HEAD is the head size h rounded up to 32, 64 or 128; columns from h on are zeros.

constexpr float LOG2E = 1.44269504f; // exponentials are taken to base 2: e^x = 2^(x·LOG2E)

struct packed_rows {
    int group, count; // heads that share keys; rows
    // The sequence's first token, the group's first head. No GPU has memory for 2^32 tokens, and
    // with size_t attention at heads of 64 would spill.
    unsigned first, head;
    size_t H, h, Q;
    uint64_t inverse; // of group, times 2^32: r / group is exact as long as r·group < 2^32
    __device__ packed_rows(size_t b, size_t g, const attention_shape &s)
        : group((int)(s.H / s.G)), count((int)s.T * group), first((unsigned)(b * s.T)),
          head((unsigned)(g * (s.H / s.G))), H(s.H), h(s.h), Q(s.Q()),
          inverse(((uint64_t)1 << 32) / (s.H / s.G) + 1) {}
    __device__ int token(int r) const { return (int)((uint64_t)r * inverse >> 32); }
    __device__ size_t token_of(int r) const { return first + (unsigned)token(r); } // of the batch
    __device__ size_t head_of(int r) const { return head + (unsigned)(r - token(r) * group); }
    // Where row r is in lse and delta (N,H).
    __device__ size_t index(int r) const { return token_of(r) * H + head_of(r); }
    // Where its h numbers are in qkv (N,Q), and in an output (N,d).
    template <typename P> __device__ P query(P qkv, int r) const {
        return qkv + token_of(r) * Q + head_of(r) * h;
    }
    template <typename P> __device__ P output(P out, int r) const { return out + index(r) * h; }
};

// Keys in a tile.
template <typename E> constexpr int KEY_TILE = sizeof(E) == 2 ? 64 : 32;

// Start to copy ROWS packed rows from row r0 on: queries in qkv, or an output. Behind the last row
// the tile has that one again.
template <int ROWS, int HEAD, int BLOCK, bool ALIGNED, typename E>
DEVICE void load_queries(E *tile, const packed_rows &rows, const E *qkv, int r0) {
    tile_copies<ROWS, HEAD, BLOCK, ALIGNED, E> copies(qkv, 0);
    copies.limit(ROWS, (int)rows.h);
    copies.gather(tile, [=](int r) { return rows.query(qkv, int_min(r0 + r, rows.count - 1)); });
}

template <int ROWS, int HEAD, int BLOCK, bool ALIGNED, typename E>
DEVICE void load_outputs(E *tile, const packed_rows &rows, const E *out, int r0) {
    tile_copies<ROWS, HEAD, BLOCK, ALIGNED, E> copies(out, 0);
    copies.limit(ROWS, (int)rows.h);
    copies.gather(tile, [=](int r) { return rows.output(out, int_min(r0 + r, rows.count - 1)); });
}

// Copies of two matrices with rows of h elements, tile by tile: keys and values, or queries and
// gradients of outputs. Rows behind the last become 0.
template <int ROWS, int HEAD, int BLOCK, bool ALIGNED, typename E> struct pair_copies {
    tile_copies<ROWS, HEAD, BLOCK, ALIGNED, E> x, y;
    static constexpr int TILE = ROWS * tile_stride<E>(HEAD), PAIR = 2 * TILE;

    DEVICE pair_copies(const E *x_matrix, size_t x_stride, const E *y_matrix, size_t y_stride)
        : x(x_matrix, x_stride), y(y_matrix, y_stride) {}

    // Starts to copy the next ROWS rows of each into the two tiles, of which `rows` are there.
    DEVICE void copy(E *tiles, int rows, int h) {
        x.limit(rows, h);
        y.limit(rows, h);
        x.copy(tiles);
        y.copy(tiles + TILE);
        x.from += ROWS / x.APART * x.apart;
        y.from += ROWS / y.APART * y.apart;
    }
};

// Sixteen rows of a tile, as left factors.
template <int HEAD, typename E> DEVICE void load_rows(fragment<E> (&f)[HEAD / 16], const E *tile) {
    constexpr int STRIDE = tile_stride<E>(HEAD);
    EACH (c, HEAD / 16) load_a<false>(f[c], tile + 16 * c, STRIDE);
}

// s (16,KEYS) += q (16,HEAD) · kᵀ, for each of the warp's blocks of rows
template <int KEYS, int HEAD, int ROW_BLOCKS, typename E>
DEVICE void multiply_by_keys(float (&s)[ROW_BLOCKS][KEYS / 8][4],
                             const fragment<E> (&q)[ROW_BLOCKS][HEAD / 16], const E *k_tile) {
    constexpr int STRIDE = tile_stride<E>(HEAD);
    EACH (c, HEAD / 16)
        EACH (j, KEYS / 16) {
            fragment<E> k;
            load_b<false>(k, k_tile + 16 * j * STRIDE + 16 * c, STRIDE);
            EACH (m, ROW_BLOCKS) multiply(&s[m][2 * j], q[m][c], k);
        }
}

// o (16,HEAD) += p (16,KEYS) · v (KEYS,HEAD), the same
template <int KEYS, int HEAD, int ROW_BLOCKS, typename E>
DEVICE void multiply_by_values(float (&o)[ROW_BLOCKS][HEAD / 8][4],
                               const float (&p)[ROW_BLOCKS][KEYS / 8][4], const E *v_tile) {
    constexpr int STRIDE = tile_stride<E>(HEAD);
    EACH (j, KEYS / 16) {
        fragment<E> factor[ROW_BLOCKS], v;
        EACH (m, ROW_BLOCKS) as_factor(factor[m], &p[m][2 * j]);
        EACH (c, HEAD / 16) {
            load_b<true>(v, v_tile + 16 * j * STRIDE + 16 * c, STRIDE);
            EACH (m, ROW_BLOCKS) multiply(&o[m][2 * c], factor[m], v);
        }
    }
}

// Forward. One block per (ROWS = 16·ROW_BLOCKS·WARPS rows, split of the keys, key/value head,
// sequence). It goes over the keys from … to - 1 of its split in tiles of KEYS:
//
//             keys  0         from                       to          end
//                   ├ split 0 ┼ split 1 ─────────────────┼ split 2 ──┤
//        row0       ┌─────────┬────────┬────────┬────────┬───────────┐
//           warp 0  │         │        │        │        │ ╲         │   the diagonal: a row sees
//                   │         │ tile   │ tile   │ tile   │   ╲       │   the keys up to its own
//           warp 1  │         │        │        │        │     ╲     │   token, and before it
//            …      │         │        │        │        │       ╲   │   those in the cache
//        row0+ROWS  └─────────┴────────┴────────┴────────┴───────────┘
//
// `end` is behind the last key that any of its rows sees. With one split, from = 0 and to = end.
// Decoding has few rows, so the keys are split until the whole GPU has work. Each split then leaves
// its partial result in the workspace, and attention_join_kernel joins them.
//
// Each tile passes through the stages of FlashAttention-2:
//     (1)  S = Q·Kᵀ
//     (2)  what a row may not see becomes -∞
//     (3)  m' = max(m, max S/√h)    P = e^(S/√h - m')    l ← l·e^(m - m') + Σ P    o ← o·e^(m - m')
//     (4)  o ← o + P·V
// where m, l and o are the maximum, the sum and the output of a row so far. Behind the last tile
//     (5)  o/l    lse = m + log l
template <typename E> struct attention_problem {
    E *out;                  // (N,d)
    float *lse;              // (N,H), or NULL
    float *partials;         // (splits, B·G, rows, h + 2), if there are several splits
    const E *q, *k, *v;      // q: in qkv (N,Q)
    size_t kv_row, kv_batch; // elements from one key to the next, from one sequence to the next
    const int32_t *past;     // (B) keys before the first query, or NULL for none
    const int32_t *lane;     // (B) whose keys and values a row reads, or NULL for its own
    attention_shape shape;
    unsigned splits;
};

// What a block of attention_kernel takes.
template <int ROWS, int KEYS> struct attention_task {
    unsigned split, pair; // pair: b·G + g
    size_t b, g;
    packed_rows rows;
    int past, row0, from, to;
    template <typename E>
    __device__ attention_task(const attention_problem<E> &p, unsigned pairs)
        : split(blockIdx.x % p.splits), pair(blockIdx.x / p.splits % pairs), b(pair / p.shape.G),
          g(pair % p.shape.G), rows(b, g, p.shape), past(p.past ? p.past[b] : 0) {
        unsigned row_tiles = gridDim.x / (p.splits * pairs);
        // The last rows see the most keys and take longest: they begin first.
        row0 = (int)(row_tiles - 1 - blockIdx.x / p.splits / pairs) * ROWS;
        int last = int_min(row0 + ROWS, rows.count) - 1, end = past + rows.token(last) + 1;
        int per_round = KEYS * (int)p.splits, width = (end + per_round - 1) / per_round * KEYS;
        from = int_min(width * (int)split, end);
        to = int_min(from + width, end);
    }
};

// (2) Scores of the keys from u0 on that lie behind the last one a row sees become -∞. r: the first
// of the lane's rows.
template <int KEYS, int ROW_BLOCKS>
DEVICE void mask_scores(float (&s)[ROW_BLOCKS][KEYS / 8][4], int u0, int past,
                        const packed_rows &rows, int r) {
    int column = threadIdx.x % 4 * 2;
    EACH (m, ROW_BLOCKS)
        EACH (i, 2) {
            int last_key = past + rows.token(r + 16 * m + 8 * i);
            EACH (j, KEYS / 8)
                EACH (e, 2)
                    if (u0 + 8 * j + column + e > last_key) s[m][j][2 * i + e] = -INFINITY;
        }
}

// (3) for row i of a block of scores (16, 8·TILES). `scale` is LOG2E/√h. Returns e^(m - m').
template <int TILES>
DEVICE float softmax_row(float (*s)[4], int i, float scale, float &row_max, float &row_sum) {
    float new_max = row_max, sum = 0;
    EACH (j, TILES) new_max = fmaxf(new_max, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
    new_max = quad_max(new_max);
    // Where no key has been seen yet, both maxima are -∞ and their difference is not a number.
    float base = new_max == -INFINITY ? 0 : new_max * scale;
    float correction = power_of_two(row_max * scale - base);
    EACH (j, TILES) {
        s[j][2 * i] = power_of_two(s[j][2 * i] * scale - base);
        s[j][2 * i + 1] = power_of_two(s[j][2 * i + 1] * scale - base);
        sum += s[j][2 * i] + s[j][2 * i + 1];
    }
    row_sum = row_sum * correction + sum; // over this lane's columns only
    row_max = new_max;
    return correction;
}

// (3) for all rows of the tile. Mostly no row's maximum changes, and o keeps its scale.
template <int KEYS, int HEAD, int ROW_BLOCKS>
DEVICE void softmax_tile(float (&s)[ROW_BLOCKS][KEYS / 8][4], float (&o)[ROW_BLOCKS][HEAD / 8][4],
                         float scale, float (&row_max)[ROW_BLOCKS][2],
                         float (&row_sum)[ROW_BLOCKS][2]) {
    float correction[ROW_BLOCKS][2];
    bool changes = false;
    EACH (m, ROW_BLOCKS)
        EACH (i, 2) {
            correction[m][i] = softmax_row<KEYS / 8>(s[m], i, scale, row_max[m][i], row_sum[m][i]);
            changes = changes || correction[m][i] != 1;
        }
    if (!__ballot_sync(~0u, changes)) return;
    EACH (m, ROW_BLOCKS)
        EACH (c, HEAD / 8)
            EACH (e, 4) o[m][c][e] *= correction[m][e / 2];
}

// (5) for row r, of which this lane has of every 8 columns two: o[c][2i], o[c][2i + 1].
template <int HEAD, typename E, typename TASK>
DEVICE void store_output(const attention_problem<E> &p, const TASK &task, const float (*o)[4],
                         int i, int r, float max, float sum) {
    if (r >= task.rows.count) return;
    size_t first = threadIdx.x % 4 * 2, h = p.shape.h, index = task.rows.index(r);
    size_t pair = (size_t)task.split * p.shape.B * p.shape.G + task.pair;
    float *partial = p.partials + (pair * task.rows.count + r) * (h + 2);
    EACH (c, HEAD / 8) {
        size_t column = 8 * c + first;
        if (column >= h) continue;
        float x = o[c][2 * i], y = o[c][2 * i + 1];
        if (p.splits > 1) store2(partial + column, x, y);
        else store2(p.out + index * h + column, x / sum, y / sum);
    }
    if (first == 0 && p.splits > 1) store2(partial + h, max, sum);
    if (first == 0 && p.lse) p.lse[index] = max / LOG2E + logf(sum);
}

template <typename E, int HEAD, int WARPS, int ROW_BLOCKS, bool ALIGNED>
__global__ void __launch_bounds__(32 * WARPS) attention_kernel(attention_problem<E> p) {
    wait_for_previous();
    constexpr int ROWS = 16 * ROW_BLOCKS * WARPS, KEYS = KEY_TILE<E>, BLOCK = 32 * WARPS;
    constexpr int STRIDE = tile_stride<E>(HEAD);
    typedef pair_copies<KEYS, HEAD, BLOCK, ALIGNED, E> key_copies;
    DYN_SMEM(E, q_tile);
    E *kv_tiles = q_tile + ROWS * STRIDE; // [2] of a tile of keys, then a tile of values
    attention_task<ROWS, KEYS> task(p, (unsigned)(p.shape.B * p.shape.G));
    const packed_rows &rows = task.rows;
    const size_t h = p.shape.h;
    size_t key0 = task.from * p.kv_row + task.g * h;
    key0 += (p.lane ? (size_t)p.lane[task.b] : task.b) * p.kv_batch;
    int lane = threadIdx.x % 32;
    int first = task.row0 + (int)(threadIdx.x / 32) * 16 * ROW_BLOCKS; // the warp's first row

    load_queries<ROWS, HEAD, BLOCK, ALIGNED>(q_tile, rows, p.q, task.row0);
    cp_async_commit();
    key_copies keys(p.k + key0, p.kv_row, p.v + key0, p.kv_row);
    keys.copy(kv_tiles, task.to - task.from, (int)h);
    cp_async_commit();

    fragment<E> q[ROW_BLOCKS][HEAD / 16];
    float o[ROW_BLOCKS][HEAD / 8][4] = {}, row_max[ROW_BLOCKS][2], row_sum[ROW_BLOCKS][2] = {};
    const float scale = LOG2E / sqrtf((float)h);
    EACH (m, ROW_BLOCKS)
        EACH (i, 2) row_max[m][i] = -INFINITY;
    cp_async_wait<1>(); // for the queries
    __syncthreads();
    EACH (m, ROW_BLOCKS) load_rows<HEAD>(q[m], q_tile + (first - task.row0 + 16 * m) * STRIDE);

    // The tile of keys from u0 on. (0) The next one is on its way while this one is used.
    auto add_tile = [&](int u0, int stage, bool masked) {
        int next = u0 + KEYS;
        if (next < task.to)
            keys.copy(kv_tiles + (stage ^ 1) * key_copies::PAIR, task.to - next, (int)h);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const E *k_tile = kv_tiles + stage * key_copies::PAIR;
        float s[ROW_BLOCKS][KEYS / 8][4] = {};
        multiply_by_keys<KEYS, HEAD>(s, q, k_tile);                              // (1)
        if (masked) mask_scores<KEYS>(s, u0, task.past, rows, first + lane / 4); // (2)
        softmax_tile<KEYS, HEAD>(s, o, scale, row_max, row_sum);                 // (3)
        multiply_by_values<KEYS, HEAD>(o, s, k_tile + key_copies::TILE);         // (4)
        __syncthreads(); // the tile after the next may take this one's place
    };
    // Only the tiles at the diagonal need the mask: all rows see the keys before `seen_by_all`.
    int u0 = task.from, stage = 0, seen_by_all = task.past + rows.token(task.row0) + 1;
    for (; u0 + KEYS <= int_min(seen_by_all, task.to); u0 += KEYS, stage ^= 1)
        add_tile(u0, stage, false);
    for (; u0 < task.to; u0 += KEYS, stage ^= 1) add_tile(u0, stage, true);
    cp_async_wait<0>();
    EACH (m, ROW_BLOCKS)
        EACH (i, 2) {
            int r = first + 16 * m + lane / 4 + 8 * i;
            store_output<HEAD>(p, task, o[m], i, r, row_max[m][i] * scale, quad_sum(row_sum[m][i]));
        }
}

// Joins the partial results of the splits, with the maximum m_i and sum l_i of each, m = max m_i:
//     o = Σ_i e^(m_i - m)·o_i / Σ_i e^(m_i - m)·l_i
// One warp per row of a pair (b, g).
template <typename E>
__global__ void attention_join_kernel(E *out, const float *partials, attention_shape s,
                                      unsigned splits) {
    wait_for_previous();
    size_t row = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32, all = s.B * s.T * s.H;
    if (row >= all) return;
    size_t group = s.H / s.G, rows = s.T * group, pair = row / rows, r = row % rows;
    size_t token = pair / s.G * s.T + r / group, head = pair % s.G * group + r % group;
    auto partial = [=](unsigned i) { return partials + (i * all + row) * (s.h + 2); };

    float max = -INFINITY, total = 0;
    for (unsigned i = 0; i < splits; i++) max = fmaxf(max, partial(i)[s.h]);
    if (max == -INFINITY) max = 0;
    for (unsigned i = 0; i < splits; i++)
        total += exp2f(partial(i)[s.h] - max) * partial(i)[s.h + 1];
    for (size_t c = threadIdx.x % 32; c < s.h; c += 32) {
        float sum = 0;
        for (unsigned i = 0; i < splits; i++) sum += exp2f(partial(i)[s.h] - max) * partial(i)[c];
        from_float(out[(token * s.H + head) * s.h + c], sum / total);
    }
}

template <int HEAD, int WARPS, int ROW_BLOCKS, bool ALIGNED, typename E>
static void launch_attention(attention_problem<E> p, size_t splits) {
    const attention_shape s = p.shape;
    auto kernel = attention_kernel<E, HEAD, WARPS, ROW_BLOCKS, ALIGNED>;
    constexpr size_t ROWS = 16 * ROW_BLOCKS * WARPS;
    constexpr size_t BYTES = (ROWS + 4 * KEY_TILE<E>) * tile_stride<E>(HEAD) * sizeof(E);
    static bool allowed;
    if (!allowed) allow_shared_memory<BYTES>(kernel);
    allowed = true;
    p.splits = (unsigned)splits;
    p.partials = (float *)workspace;
    size_t blocks = ceil_of(s.T * (s.H / s.G), ROWS) * s.B * s.G * splits;
    launch("attention_kernel", true, kernel, blocks, 32 * WARPS, BYTES, p);
    if (splits > 1)
        LAUNCH_CHAINED(attention_join_kernel<E>, ceil_of(s.B * s.T * s.H, THREADS / 32), THREADS, 0,
                       p.out, p.partials, s, p.splits);
}

// How many splits decoding makes of `keys`, the most keys that a query may see.
template <typename E> static size_t attention_splits(const attention_problem<E> &p, size_t keys) {
    const attention_shape &s = p.shape;
    if (p.lse) return 1;
    size_t enough = ceil_of(4 * (size_t)device.multiProcessorCount, s.B * s.G); // work for the GPU
    size_t possible = WORKSPACE / sizeof(float) / (s.B * s.T * s.H * (s.h + 2));
    size_t splits = retrofit_min(retrofit_min(ceil_of(keys, KEY_TILE<E>), enough), possible);
    return retrofit_max(splits, 1);
}

template <int HEAD, bool ALIGNED, typename E>
static void attend(const attention_problem<E> &p, size_t keys) {
    constexpr int ROW_BLOCKS = sizeof(E) == 2 && HEAD <= 64 ? 2 : 1; // as registers allow
    bool few = p.shape.T * (p.shape.H / p.shape.G) <= 16;
    if (few) launch_attention<HEAD, 1, 1, ALIGNED>(p, attention_splits(p, keys));
    else launch_attention<HEAD, 4, ROW_BLOCKS, ALIGNED>(p, 1);
}

// Rows that do not begin at multiples of 16 bytes are those of heads that no model has.
template <typename E> static void attend_by_head_size(const attention_problem<E> &p, size_t keys) {
    uintptr_t all = (uintptr_t)p.q | (uintptr_t)p.k | (uintptr_t)p.v | p.shape.h * sizeof(E);
    if (all % 16 != 0) attend<128, false>(p, keys);
    else if (p.shape.h <= 32) attend<32, true>(p, keys);
    else if (p.shape.h <= 64) attend<64, true>(p, keys);
    else attend<128, true>(p, keys);
}

template <typename E>
static void attention_forward(act *out, float *lse, const act *qkv, size_t B, size_t T, size_t H,
                              size_t G, size_t h) {
    attention_problem<E> p = {};
    p.shape = {B, T, H, G, h};
    p.out = (E *)out;
    p.lse = lse;
    p.q = (const E *)qkv;
    p.k = p.q + H * h;
    p.v = p.k + G * h;
    p.kv_row = p.shape.Q();
    p.kv_batch = T * p.kv_row;
    attend_by_head_size(p, T);
}

// Backward. With δ_t = do_t·o_t, and P made again from the log-sum-exp, P = e^(q·k/√h - lse):
//     dP = dO·Vᵀ      dS = P∘(dP - δ)/√h      dV = Pᵀ·dO      dK = dSᵀ·Q      dQ = dS·K
// attention_delta_kernel makes δ, attention_backward_kv_kernel dK and dV, and
// attention_backward_q_kernel dQ. The last two both make P and dS: the price of having no atomics.
template <typename E> struct attention_gradient {
    E *dqkv;
    const E *dout, *qkv;
    const float *lse, *delta;
    attention_shape shape;
};

// delta (N,H). One warp per number.
template <typename E>
__global__ void attention_delta_kernel(float *delta, const E *dout, const E *out, size_t count,
                                       size_t h) {
    size_t i = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (i >= count) return;
    float sum = 0;
    for (size_t c = threadIdx.x % 32; c < h; c += 32)
        sum += to_float(dout[i * h + c]) * to_float(out[i * h + c]);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) delta[i] = sum;
}

// s (16,N) += a·xᵀ and ds (16,N) += b·yᵀ: the warp's rows a, b (16,HEAD), and tiles x, y (N,HEAD).
template <int N, int HEAD, typename E>
DEVICE void multiply_two(float (&s)[N / 8][4], float (&ds)[N / 8][4],
                         const fragment<E> (&a)[HEAD / 16], const fragment<E> (&b)[HEAD / 16],
                         const E *x_tile, const E *y_tile) {
    constexpr int STRIDE = tile_stride<E>(HEAD);
    EACH (c, HEAD / 16)
        EACH (j, N / 16) {
            fragment<E> x, y;
            load_b<false>(x, x_tile + 16 * j * STRIDE + 16 * c, STRIDE);
            load_b<false>(y, y_tile + 16 * j * STRIDE + 16 * c, STRIDE);
            multiply(&s[2 * j], a[c], x);
            multiply(&ds[2 * j], b[c], y);
        }
}

// Row i of the lane's two rows of a result (16,HEAD), times `factor`.
template <int HEAD, typename E>
DEVICE void store_gradient(E *to, const float (&x)[HEAD / 8][4], int i, size_t h, float factor) {
    EACH (c, HEAD / 8) {
        size_t column = 8 * c + threadIdx.x % 4 * 2;
        if (column < h) store2(to + column, x[c][2 * i] * factor, x[c][2 * i + 1] * factor);
    }
}

// dK and dV. One block per (64 keys, key/value head, sequence). Each of its four warps has 16 of
// the keys. For each query head that reads them it goes over the tokens that see them, in tiles of
// ROWS:
//
//                 tokens     0           u0                             T
//                            ┌───────────┬───────┬───────┬───────┬─────┐
//      warp 0  keys u0 …     │           │       │       │       │     │  a warp sums up dK and
//      warp 1  keys u0 + 16  │ see none  │ ╲     │ tile  │ tile  │  …  │  dV of its 16 keys, in
//      warp 2  keys u0 + 32  │ of these  │   ╲   │       │       │     │  registers
//      warp 3  keys u0 + 48  │ keys      │     ╲ │       │       │     │
//                            └───────────┴───────┴───────┴───────┴─────┘
//
// Everything is transposed: scores are (keys, tokens) = k·qᵀ. So Pᵀ and dSᵀ come out as the left
// factors of dV = Pᵀ·dO and dK = dSᵀ·Q. k and v stay in registers. The factor 1/√h of dS waits
// until the sums are stored.
template <typename E, int HEAD>
constexpr int BACKWARD_ROW_TILE = sizeof(E) == 2 && HEAD <= 64 ? 64 : 32;

// (2) P from the scores, and dS·√h from dP, in place. lse·LOG2E and delta: of the tile's rows.
template <int ROWS>
DEVICE void transposed_gradient(float (&p)[ROWS / 8][4], float (&ds)[ROWS / 8][4], float scale,
                                const float *lse, const float *delta) {
    int column = threadIdx.x % 4 * 2;
    EACH (j, ROWS / 8) {
        float2 base = *reinterpret_cast<const float2 *>(lse + 8 * j + column);
        float2 less = *reinterpret_cast<const float2 *>(delta + 8 * j + column);
        EACH (e, 4) {
            float x = power_of_two(p[j][e] * scale - (e % 2 ? base.y : base.x));
            ds[j][e] = x * (ds[j][e] - (e % 2 ? less.y : less.x));
            p[j][e] = x;
        }
    }
}

// Both are 0 where a token from t0 on does not see one of the lane's two keys, or is none.
template <int ROWS>
DEVICE void mask_gradient(float (&p)[ROWS / 8][4], float (&ds)[ROWS / 8][4], int key, int t0,
                          int T) {
    int column = threadIdx.x % 4 * 2;
    EACH (j, ROWS / 8)
        EACH (e, 4) {
            int token = t0 + 8 * j + column + e % 2;
            if (key + e / 2 * 8 <= token && token < T) continue;
            p[j][e] = 0;
            ds[j][e] = 0;
        }
}

// (3) dK += dSᵀ·Q and dV += Pᵀ·dO: the tile's part of the sums.
template <int ROWS, int HEAD, typename E>
DEVICE void add_to_keys_and_values(float (&dk)[HEAD / 8][4], float (&dv)[HEAD / 8][4],
                                   const float (&p)[ROWS / 8][4], const float (&ds)[ROWS / 8][4],
                                   const E *q_tile, const E *do_tile) {
    constexpr int STRIDE = tile_stride<E>(HEAD);
    EACH (j, ROWS / 16) {
        fragment<E> fp, fds, fq, fo;
        as_factor(fp, &p[2 * j]);
        as_factor(fds, &ds[2 * j]);
        EACH (c, HEAD / 16) {
            load_b<true>(fo, do_tile + 16 * j * STRIDE + 16 * c, STRIDE);
            load_b<true>(fq, q_tile + 16 * j * STRIDE + 16 * c, STRIDE);
            multiply(&dv[2 * c], fp, fo);
            multiply(&dk[2 * c], fds, fq);
        }
    }
}

// The tiles of dK's and dV's loop, in their order: copies the next one of each.
template <typename E, int HEAD, bool ALIGNED> struct query_tiles {
    static constexpr int ROWS = BACKWARD_ROW_TILE<E, HEAD>;
    typedef pair_copies<ROWS, HEAD, 128, ALIGNED, E> row_copies;
    int T, h, H;
    int heads;    // that are left
    int from, t0; // the first token of each head's tiles, and of the next tile
    row_copies copies;
    const float *lse, *delta; // this thread's of the next tile: a number for each row
    size_t q_back, do_back, stats_back; // from a head's last tile to the next head's first

    DEVICE query_tiles(const attention_gradient<E> &p, size_t b, size_t g, int u0)
        : T((int)p.shape.T), h((int)p.shape.h), H((int)p.shape.H), heads(H / (int)p.shape.G),
          from(u0 / ROWS * ROWS), t0(from),
          copies(p.qkv + (b * T + from) * p.shape.Q() + g * heads * h, p.shape.Q(),
                 p.dout + ((b * T + from) * H + g * heads) * h, (size_t)H * h) {
        size_t number = (b * T + from + threadIdx.x % ROWS) * H + g * heads;
        size_t tokens = (size_t)(T - from + ROWS - 1) / ROWS * ROWS;
        lse = p.lse + number;
        delta = p.delta + number;
        q_back = tokens * p.shape.Q() - h;
        do_back = tokens * H * h - h;
        stats_back = tokens * H - 1;
    }

    // Starts to copy queries and gradients of outputs; stats: lse·LOG2E, then delta of each row.
    DEVICE void copy(E *tiles, float *stats) {
        copies.copy(tiles, T - t0, h);
        int r = (int)threadIdx.x;
        if (r < ROWS) {
            stats[r] = t0 + r < T ? *lse * LOG2E : 0;
            stats[ROWS + r] = t0 + r < T ? *delta : 0;
        }
        t0 += ROWS;
        lse += ROWS * H;
        delta += ROWS * H;
        if (t0 < T) return;
        heads--;
        t0 = from;
        copies.x.from -= q_back;
        copies.y.from -= do_back;
        lse -= stats_back;
        delta -= stats_back;
    }
};

template <typename E, int HEAD, bool ALIGNED>
__global__ void __launch_bounds__(128) attention_backward_kv_kernel(attention_gradient<E> p) {
    typedef query_tiles<E, HEAD, ALIGNED> query_tiles;
    constexpr int KEYS = 64, ROWS = query_tiles::ROWS, STRIDE = tile_stride<E>(HEAD);
    constexpr int TILE = query_tiles::row_copies::TILE;
    constexpr int PAIR = query_tiles::row_copies::PAIR;
    DYN_SMEM(E, tiles);               // [2] of a tile of q, then one of dout; at first k and v
    SMEM(float, stats, 2 * 2 * ROWS); // [2] of the rows' lse·LOG2E, then their delta
    const attention_shape &shape = p.shape;
    unsigned pairs = (unsigned)(shape.B * shape.G), pair = blockIdx.x % pairs;
    size_t b = pair / shape.G, g = pair % shape.G, h = shape.h, Q = shape.Q();
    int u0 = (int)(blockIdx.x / pairs) * KEYS, T = (int)shape.T;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, key = u0 + 16 * warp + lane / 4;
    const E *k = p.qkv + (b * shape.T + u0) * Q + (shape.H + g) * h;

    pair_copies<KEYS, HEAD, 128, ALIGNED, E>(k, Q, k + shape.G * h, Q).copy(tiles, T - u0, (int)h);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    fragment<E> fk[HEAD / 16], fv[HEAD / 16];
    load_rows<HEAD>(fk, tiles + 16 * warp * STRIDE);
    load_rows<HEAD>(fv, tiles + (KEYS + 16 * warp) * STRIDE);
    __syncthreads();

    float dk[HEAD / 8][4] = {}, dv[HEAD / 8][4] = {}, inverse_root = 1.0f / sqrtf((float)h);
    query_tiles next(p, b, g, u0);
    next.copy(tiles, stats);
    cp_async_commit();
    int t0 = next.from;
    for (int stage = 0, more = 1; more; stage ^= 1) {
        int after = next.t0;
        more = next.heads > 0;
        if (more) next.copy(tiles + (stage ^ 1) * PAIR, stats + (stage ^ 1) * 2 * ROWS);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const E *q_tile = tiles + stage * PAIR, *do_tile = q_tile + TILE;
        const float *lse = stats + stage * 2 * ROWS;
        float s[ROWS / 8][4] = {}, ds[ROWS / 8][4] = {};
        multiply_two<ROWS, HEAD>(s, ds, fk, fv, q_tile, do_tile); // (1) S and dP, transposed
        transposed_gradient<ROWS>(s, ds, LOG2E * inverse_root, lse, lse + ROWS); // (2)
        if (u0 + KEYS - 1 > t0 || t0 + ROWS > T) mask_gradient<ROWS>(s, ds, key, t0, T);
        add_to_keys_and_values<ROWS, HEAD>(dk, dv, s, ds, q_tile, do_tile); // (3)
        t0 = after;
        __syncthreads();
    }
    cp_async_wait<0>();
    EACH (i, 2)
        if (key + 8 * i < T) {
            E *to = p.dqkv + (b * shape.T + key + 8 * i) * Q + (shape.H + g) * h;
            store_gradient<HEAD>(to, dk, i, h, inverse_root);
            store_gradient<HEAD>(to + shape.G * h, dv, i, h, 1);
        }
}

// dQ. One block per (64 packed rows, key/value head, sequence). Each of its four warps has 16 of
// the rows. As forward does, it goes over the keys in tiles; q and dout stay in registers.

// (2) dS·√h from scores and dP, in ds. base and delta: lse·LOG2E and δ of the lane's two rows.
template <int KEYS>
DEVICE void score_gradient(float (&ds)[KEYS / 8][4], const float (&s)[KEYS / 8][4], float scale,
                           const float (&base)[2], const float (&delta)[2]) {
    EACH (j, KEYS / 8)
        EACH (e, 4) {
            float p = power_of_two(s[j][e] * scale - base[e / 2]);
            ds[j][e] = p * (ds[j][e] - delta[e / 2]);
        }
}

// It is 0 for the keys from u0 on that lie behind the last one that a row sees.
template <int KEYS>
DEVICE void mask_score_gradient(float (&ds)[KEYS / 8][4], int u0, const int (&last_key)[2]) {
    int column = threadIdx.x % 4 * 2;
    EACH (j, KEYS / 8)
        EACH (e, 4)
            if (u0 + 8 * j + column + e % 2 > last_key[e / 2]) ds[j][e] = 0;
}

template <typename E, int HEAD, bool ALIGNED>
__global__ void __launch_bounds__(128) attention_backward_q_kernel(attention_gradient<E> p) {
    constexpr int ROWS = 64, KEYS = KEY_TILE<E>, STRIDE = tile_stride<E>(HEAD);
    typedef pair_copies<KEYS, HEAD, 128, ALIGNED, E> key_copies;
    DYN_SMEM(E, tiles); // [2] of a tile of k, then one of v; at first q and dout
    const attention_shape &shape = p.shape;
    unsigned pairs = (unsigned)(shape.B * shape.G), pair = blockIdx.x % pairs;
    unsigned row_tiles = gridDim.x / pairs;
    size_t b = pair / shape.G, g = pair % shape.G, h = shape.h, Q = shape.Q();
    packed_rows rows(b, g, shape);
    int row0 = (int)(row_tiles - 1 - blockIdx.x / pairs) * ROWS; // the longest first
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int end = rows.token(int_min(row0 + ROWS, rows.count) - 1) + 1;
    const E *k = p.qkv + b * shape.T * Q + (shape.H + g) * h;

    load_queries<ROWS, HEAD, 128, ALIGNED>(tiles, rows, p.qkv, row0);
    load_outputs<ROWS, HEAD, 128, ALIGNED>(tiles + ROWS * STRIDE, rows, p.dout, row0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    fragment<E> fq[HEAD / 16], fo[HEAD / 16];
    load_rows<HEAD>(fq, tiles + 16 * warp * STRIDE);
    load_rows<HEAD>(fo, tiles + (ROWS + 16 * warp) * STRIDE);
    __syncthreads();

    float dq[1][HEAD / 8][4] = {}, base[2], delta[2], inverse_root = 1.0f / sqrtf((float)h);
    int last_key[2], first = row0 + 16 * warp + lane / 4; // the first of the lane's two rows
    EACH (i, 2) {
        int r = int_min(first + 8 * i, rows.count - 1);
        base[i] = p.lse[rows.index(r)] * LOG2E;
        delta[i] = p.delta[rows.index(r)];
        last_key[i] = rows.token(r);
    }
    key_copies keys(k, Q, k + shape.G * h, Q);
    keys.copy(tiles, end, (int)h);
    cp_async_commit();
    auto add_tile = [&](int u0, int stage, bool masked) {
        int next = u0 + KEYS;
        if (next < end) keys.copy(tiles + (stage ^ 1) * key_copies::PAIR, end - next, (int)h);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const E *k_tile = tiles + stage * key_copies::PAIR, *v_tile = k_tile + key_copies::TILE;
        float s[KEYS / 8][4] = {}, ds[1][KEYS / 8][4] = {};
        multiply_two<KEYS, HEAD>(s, ds[0], fq, fo, k_tile, v_tile);        // (1) S and dP
        score_gradient<KEYS>(ds[0], s, LOG2E * inverse_root, base, delta); // (2)
        if (masked) mask_score_gradient<KEYS>(ds[0], u0, last_key);
        multiply_by_values<KEYS, HEAD>(dq, ds, k_tile); // (3) dQ += dS·K
        __syncthreads();
    };
    int u0 = 0, stage = 0, seen_by_all = rows.token(row0) + 1;
    for (; u0 + KEYS <= seen_by_all; u0 += KEYS, stage ^= 1) add_tile(u0, stage, false);
    for (; u0 < end; u0 += KEYS, stage ^= 1) add_tile(u0, stage, true);
    cp_async_wait<0>();
    EACH (i, 2)
        if (first + 8 * i < rows.count)
            store_gradient<HEAD>(rows.query(p.dqkv, first + 8 * i), dq[0], i, h, inverse_root);
}

template <int HEAD, bool ALIGNED, typename E>
static void attend_backward(attention_gradient<E> p, float *delta, const E *out) {
    const attention_shape s = p.shape;
    auto kv_kernel = attention_backward_kv_kernel<E, HEAD, ALIGNED>;
    auto q_kernel = attention_backward_q_kernel<E, HEAD, ALIGNED>;
    constexpr size_t ROW_BYTES = tile_stride<E>(HEAD) * sizeof(E);
    constexpr size_t KV_BYTES = 4 * BACKWARD_ROW_TILE<E, HEAD> * ROW_BYTES;
    constexpr size_t Q_BYTES = 4 * KEY_TILE<E> * ROW_BYTES;
    static bool allowed;
    if (!allowed) {
        allow_shared_memory<KV_BYTES>(kv_kernel);
        allow_shared_memory<Q_BYTES>(q_kernel);
    }
    allowed = true;
    p.delta = delta;
    size_t count = s.B * s.T * s.H, rows = s.T * (s.H / s.G);
    LAUNCH(attention_delta_kernel<E>, ceil_of(count, THREADS / 32), THREADS, 0, delta, p.dout, out,
           count, s.h);
    launch("attention_backward_kv_kernel", false, kv_kernel, ceil_of(s.T, 64) * s.B * s.G, 128,
           KV_BYTES, p);
    launch("attention_backward_q_kernel", false, q_kernel, ceil_of(rows, 64) * s.B * s.G, 128,
           Q_BYTES, p);
}

template <typename E>
static void attention_backward(act *dqkv, float *delta, const act *dout, const act *qkv,
                               const act *out, const float *lse, size_t B, size_t T, size_t H,
                               size_t G, size_t h) {
    attention_gradient<E> p = {};
    p.dqkv = (E *)dqkv;
    p.dout = (const E *)dout;
    p.qkv = (const E *)qkv;
    p.lse = lse;
    p.shape = {B, T, H, G, h};
    uintptr_t all = (uintptr_t)p.qkv | (uintptr_t)p.dout | h * sizeof(E);
    if (all % 16 != 0) attend_backward<128, false>(p, delta, (const E *)out);
    else if (h <= 32) attend_backward<32, true>(p, delta, (const E *)out);
    else if (h <= 64) attend_backward<64, true>(p, delta, (const E *)out);
    else attend_backward<128, true>(p, delta, (const E *)out);
}

// ---- SwiGLU: y = silu(g)·u, silu(g) = g·σ(g), σ(g) = 1/(1 + e^-g) ------------------------------
// One thread per eight columns of a row.
template <typename E>
__global__ void swiglu_forward_kernel(E *out, const E *gate_up, size_t N, size_t F) {
    wait_for_previous();
    size_t c;
    size_t n = divide((size_t)blockIdx.x * THREADS + threadIdx.x, (F + 7) / 8, c);
    if (n >= N) return;
    c *= 8;
    float gate[8], up[8];
    load8(gate, gate_up + n * 2 * F + c, F - c);
    load8(up, gate_up + n * 2 * F + F + c, F - c);
    for (int j = 0; j < 8; j++) up[j] *= gate[j] / (1.0f + expf(-gate[j]));
    store8(out + n * F + c, up, F - c);
}

template <typename E> static void swiglu_forward(act *out, const act *gate_up, size_t N, size_t F) {
    LAUNCH_CHAINED(swiglu_forward_kernel<E>, ceil_of(N * ceil_of(F, 8), THREADS), THREADS, 0,
                   (E *)out, (const E *)gate_up, N, F);
}

// Backward: dg = dy·u·σ(g)·(1 + g·(1 - σ(g))), du = dy·silu(g), and y again. Threads as above.
template <typename E>
__global__ void swiglu_backward_kernel(E *dgate_up, E *out, const E *dout, const E *gate_up,
                                       size_t N, size_t F) {
    size_t c;
    size_t n = divide((size_t)blockIdx.x * THREADS + threadIdx.x, (F + 7) / 8, c);
    if (n >= N) return;
    c *= 8;
    float gate[8], up[8], dy[8], dgate[8], dup[8];
    load8(gate, gate_up + n * 2 * F + c, F - c);
    load8(up, gate_up + n * 2 * F + F + c, F - c);
    load8(dy, dout + n * F + c, F - c);
    for (int j = 0; j < 8; j++) {
        float sigma = 1.0f / (1.0f + expf(-gate[j]));
        dgate[j] = dy[j] * up[j] * sigma * (1.0f + gate[j] * (1.0f - sigma));
        dup[j] = dy[j] * gate[j] * sigma;
        up[j] *= gate[j] * sigma;
    }
    store8(dgate_up + n * 2 * F + c, dgate, F - c);
    store8(dgate_up + n * 2 * F + F + c, dup, F - c);
    store8(out + n * F + c, up, F - c);
}

template <typename E>
static void swiglu_backward(act *dgate_up, act *out, const act *dout, const act *gate_up, size_t N,
                            size_t F) {
    LAUNCH(swiglu_backward_kernel<E>, ceil_of(N * ceil_of(F, 8), THREADS), THREADS, 0,
           (E *)dgate_up, (E *)out, (const E *)dout, (const E *)gate_up, N, F);
}

// ---- Cross-entropy: loss = log Σ_v e^(z_v) - z_label, dz = scale·(softmax(z) - onehot) ---------
// One block per row. It reads the row once for the maximum and the sum, and once for the gradient.
// Each thread keeps a maximum m and a sum of e^(z - m), as attention does.

// Adds eight logits to a thread's maximum and sum.
DEVICE void add_logits(const float *z, size_t left, float &max, float &sum) {
    float new_max = max, more = 0;
    for (int i = 0; i < 8; i++) new_max = (size_t)i < left ? fmaxf(new_max, z[i]) : new_max;
    for (int i = 0; i < 8; i++) more += (size_t)i < left ? expf(z[i] - new_max) : 0.0f;
    sum = (max == -INFINITY ? 0.0f : sum * expf(max - new_max)) + more;
    max = new_max;
}

template <typename E>
__global__ void cross_entropy_kernel(float *losses, E *logits, const int32_t *labels, size_t V,
                                     float scale) {
    E *row = logits + blockIdx.x * V;
    int32_t label = labels[blockIdx.x]; // negative: nothing to predict
    float z[8], own_max = -INFINITY, own_sum = 0;
    float target = label >= 0 ? to_float(row[label]) : 0.0f;
    for (size_t v = 8 * threadIdx.x; v < V && label >= 0; v += 8 * THREADS) {
        load8(z, row + v, V - v);
        add_logits(z, V - v, own_max, own_sum);
    }
    float max = block_max(own_max);
    bool none = own_max == -INFINITY && own_sum == 0; // this thread had no logits
    float sum = block_sum(none ? 0.0f : own_sum * expf(own_max - max));
    if (threadIdx.x == 0) losses[blockIdx.x] = label >= 0 ? logf(sum) + max - target : 0.0f;
    if (scale == 0) return;
    for (size_t v = 8 * threadIdx.x; v < V; v += 8 * THREADS) {
        load8(z, row + v, V - v);
        for (int i = 0; i < 8; i++) {
            float onehot = v + i == (size_t)label ? scale : 0.0f;
            z[i] = label < 0 ? 0.0f : scale / sum * expf(z[i] - max) - onehot;
        }
        store8(row + v, z, V - v);
    }
}

template <typename E>
static void cross_entropy(float *losses, act *logits, const int32_t *labels, size_t N, size_t V,
                          float scale) {
    LAUNCH(cross_entropy_kernel<E>, N, THREADS, 0, losses, (E *)logits, labels, V, scale);
}

// ---- Elementwise -------------------------------------------------------------------------------
// cast: out = (act) x. One thread per eight elements.
template <typename E> __global__ void cast_kernel(E *out, const float *x, size_t n) {
    wait_for_previous();
    size_t i = first_of8();
    if (i >= n) return;
    float v[8];
    load8(v, x + i, n - i);
    store8(out + i, v, n - i);
}

template <typename E> static void cast(act *out, const float *x, size_t n) {
    LAUNCH_CHAINED(cast_kernel<E>, blocks_of8(n), THREADS, 0, (E *)out, x, n);
}

// add: x = keep·x + y. One thread per eight elements.
__global__ void add_kernel(float *x, const float *y, size_t n, float keep) {
    wait_for_previous();
    size_t i = first_of8();
    if (i >= n) return;
    float a[8], b[8];
    load8(a, x + i, n - i);
    load8(b, y + i, n - i);
    for (int j = 0; j < 8; j++) a[j] = keep * a[j] + b[j];
    store8(x + i, a, n - i);
}

template <typename E> static void add(float *x, const float *y, size_t n, float keep) {
    LAUNCH_CHAINED(add_kernel, blocks_of8(n), THREADS, 0, x, y, n, keep);
}

// state_init: s = σ·normal(hash(seed, b, past[b] + t), column). One thread per element.
__global__ void state_init_kernel(float *s, const int32_t *past, size_t B, size_t T, size_t d,
                                  float sigma, uint64_t seed) {
    size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x, c, t;
    size_t n = divide(i, d, c), b = divide(n, T, t);
    if (n >= B * T) return;
    uint64_t position = (past ? (uint64_t)past[b] : 0) + t;
    uint64_t key = retrofit_hash(retrofit_hash(seed, b), position);
    s[i] = sigma == 0 ? 0.0f : sigma * retrofit_hash_normal(key, c);
}

template <typename E>
static void state_init(float *s, const int32_t *past, size_t B, size_t T, size_t d, float sigma,
                       uint64_t seed) {
    LAUNCH(state_init_kernel, ceil_of(B * T * d, THREADS), THREADS, 0, s, past, B, T, d, sigma,
           seed);
}

// ---- KV cache ----------------------------------------------------------------------------------
// kv_store: keys, values (lanes,capacity,G·h) at past[b] + t of lane[b] become k and v of row
// b·T + t of qkv.
// One thread per eight columns of a row.
template <typename E>
__global__ void kv_store_kernel(E *keys, E *values, const E *qkv, const int32_t *past,
                                const int32_t *lane, attention_shape s, size_t capacity) {
    wait_for_previous();
    size_t width = s.G * s.h, c, t;
    size_t n = divide((size_t)blockIdx.x * THREADS + threadIdx.x, (width + 7) / 8, c);
    size_t b = divide(n, s.T, t);
    if (n >= s.B * s.T) return;
    c *= 8;
    const E *k = qkv + n * s.Q() + s.H * s.h + c;
    size_t place = lane ? (size_t)lane[b] : b;
    size_t at = (place * capacity + (size_t)past[b] + t) * width + c;
    float x[8];
    load8(x, k, width - c);
    store8(keys + at, x, width - c);
    load8(x, k + width, width - c);
    store8(values + at, x, width - c);
}

template <typename E>
static void kv_store(act *keys, act *values, const act *qkv, const int32_t *past,
                     const int32_t *lane, size_t B, size_t T, size_t capacity, size_t H, size_t G,
                     size_t h, retrofit_type) {
    attention_shape s = {B, T, H, G, h};
    LAUNCH_CHAINED(kv_store_kernel<E>, ceil_of(B * T * ceil_of(G * h, 8), THREADS), THREADS, 0,
                   (E *)keys, (E *)values, (const E *)qkv, past, lane, s, capacity);
}

// attention_cached: as attention_forward, over the keys of a cache.
template <typename E>
static void attention_cached(act *out, const act *qkv, const act *keys, const act *values,
                             const int32_t *past, const int32_t *lane, size_t B, size_t T,
                             size_t capacity, size_t H, size_t G, size_t h, retrofit_type) {
    attention_problem<E> p = {};
    p.shape = {B, T, H, G, h};
    p.out = (E *)out;
    p.q = (const E *)qkv;
    p.k = (const E *)keys;
    p.v = (const E *)values;
    p.kv_row = G * h;
    p.kv_batch = capacity * G * h;
    p.past = past;
    p.lane = lane;
    attend_by_head_size(p, capacity);
}

// kv_backfill: a token that stopped after used[b] recurrences copies what the last of them stored,
// in slot used[b] - 1, to the slots used[b] … S - 1. Slot i, layer j is layer i·C + j of the cache.
// One thread per eight columns of a layer of a sequence.
struct cache_shape {
    size_t S, C, stride, B, capacity, width; // stride: elements of a layer; width: G·h
};

template <typename E>
__global__ void kv_backfill_kernel(E *keys, E *values, const int32_t *past, const int32_t *used,
                                   cache_shape s) {
    size_t c, j;
    size_t n = divide((size_t)blockIdx.x * THREADS + threadIdx.x, (s.width + 7) / 8, c);
    size_t b = divide(n, s.C, j);
    if (b >= s.B) return;
    c *= 8;
    size_t slot = (size_t)used[b], in_layer = (b * s.capacity + (size_t)past[b]) * s.width + c;
    size_t from = ((slot - 1) * s.C + j) * s.stride + in_layer;
    float k[8], v[8];
    load8(k, keys + from, s.width - c);
    load8(v, values + from, s.width - c);
    for (; slot < s.S; slot++) {
        size_t to = (slot * s.C + j) * s.stride + in_layer;
        store8(keys + to, k, s.width - c);
        store8(values + to, v, s.width - c);
    }
}

template <typename E>
static void kv_backfill(act *keys, act *values, const int32_t *past, const int32_t *used, size_t S,
                        size_t C, size_t stride, size_t B, size_t capacity, size_t G, size_t h,
                        retrofit_type) {
    cache_shape s = {S, C, stride, B, capacity, G * h};
    LAUNCH(kv_backfill_kernel<E>, ceil_of(B * C * ceil_of(G * h, 8), THREADS), THREADS, 0,
           (E *)keys, (E *)values, past, used, s);
}

// ---- Optimizers --------------------------------------------------------------------------------
// The formulas of retrofit.h, section 5. One thread per eight elements, unless said otherwise.

// sum_squares: *sum += Σ x². At most 2048 blocks, each of which leaves its sum in the workspace;
// one more block adds these up. Eight squares are added in fp32, all else in fp64.
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

static size_t sum_blocks(size_t n) { return retrofit_min(blocks_of8(n), 2048); }
static void add_sums(double *sum, const double *sums, size_t count) {
    if (count > 0) LAUNCH(add_sums_kernel, 1, THREADS, 0, sum, sums, (unsigned)count);
}

template <typename E> static void sum_squares(double *sum, const float *x, size_t n) {
    double *sums = (double *)workspace;
    LAUNCH(sum_squares_kernel, sum_blocks(n), THREADS, 0, sums, x, n);
    add_sums(sum, sums, sum_blocks(n));
}

// AdamW:   m += (1 - β1)·(x - m)   v = β2·v + (1 - β2)·x²   with x = scale·g
//          w = keep·w - step·m/(√v/root + eps)
// with step = lr/bias1, root = √bias2, keep = 1 - lr·decay.
struct adamw_numbers { float scale, step, keep, beta1, beta2, root, eps; };

DEVICE void update_moments(float &m, float &v, float x, float beta1, float beta2) {
    m += (1.0f - beta1) * (x - m);
    v = beta2 * v + (1.0f - beta2) * x * x;
}

__global__ void adamw_kernel(float *w, float *m, float *v, const float *g, size_t n,
                             adamw_numbers a) {
    size_t i = first_of8();
    if (i >= n) return;
    float wi[8], mi[8], vi[8], gi[8];
    load8(wi, w + i, n - i);
    load8(mi, m + i, n - i);
    load8(vi, v + i, n - i);
    load8(gi, g + i, n - i);
    for (int j = 0; j < 8; j++) {
        update_moments(mi[j], vi[j], gi[j] * a.scale, a.beta1, a.beta2);
        wi[j] = wi[j] * a.keep - a.step * mi[j] / (sqrtf(vi[j]) / a.root + a.eps);
    }
    store8(w + i, wi, n - i);
    store8(m + i, mi, n - i);
    store8(v + i, vi, n - i);
}

template <typename E>
static void adamw_update(float *w, float *m, float *v, const float *g, size_t n, float scale,
                         float lr, float beta1, float beta2, double bias1, double bias2, float eps,
                         float decay) {
    float step = (float)(lr / bias1), keep = 1.0f - lr * decay, root = (float)sqrt(bias2);
    adamw_numbers a = {scale, step, keep, beta1, beta2, root, eps};
    LAUNCH(adamw_kernel, blocks_of8(n), THREADS, 0, w, m, v, g, n, a);
}

// AdamW*, the moments: as above, but v is never below eps²; also *sum += Σ x²/v, as in sum_squares.
struct ellisadam_numbers { float scale, beta1, beta2, eps; };

__global__ void ellisadam_moments_kernel(float *m, float *v, double *sums, const float *g, size_t n,
                                         ellisadam_numbers a) {
    double sum = 0;
    for (size_t i = first_of8(); i < n; i += 8 * THREADS * (size_t)gridDim.x) {
        float mi[8], vi[8], gi[8], ratio = 0;
        load8(mi, m + i, n - i);
        load8(vi, v + i, n - i);
        load8(gi, g + i, n - i);
        for (int j = 0; j < 8; j++) {
            float x = gi[j] * a.scale;
            update_moments(mi[j], vi[j], x, a.beta1, a.beta2);
            if (vi[j] < a.eps * a.eps) vi[j] = a.eps * a.eps;
            ratio += x * x / vi[j];
        }
        store8(m + i, mi, n - i);
        store8(v + i, vi, n - i);
        sum += (double)ratio;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <typename E>
static void ellisadam_moments(float *m, float *v, double *sum, const float *g, size_t n,
                              float scale, float beta1, float beta2, float eps) {
    double *sums = (double *)workspace;
    ellisadam_numbers a = {scale, beta1, beta2, eps};
    LAUNCH(ellisadam_moments_kernel, sum_blocks(n), THREADS, 0, m, v, sums, g, n, a);
    add_sums(sum, sums, sum_blocks(n));
}

// AdamW*, the step: w = keep·w - step·atan2(m, √v/root), step = lr/bias1/max(1, √(sum/n)),
// root = √bias2, keep = 1 - decay.
struct ellisadam_step {
    double bias1;
    float lr, root, keep;
};

__global__ void ellisadam_update_kernel(float *w, const float *m, const float *v, const double *sum,
                                        size_t n, ellisadam_step a) {
    size_t i = first_of8();
    if (i >= n) return;
    float step = (float)(a.lr / a.bias1 / fmax(1.0, sqrt(*sum / (double)n)));
    float wi[8], mi[8], vi[8];
    load8(wi, w + i, n - i);
    load8(mi, m + i, n - i);
    load8(vi, v + i, n - i);
    for (int j = 0; j < 8; j++)
        wi[j] = wi[j] * a.keep - step * atan2f(mi[j], sqrtf(vi[j]) / a.root);
    store8(w + i, wi, n - i);
}

template <typename E>
static void ellisadam_update(float *w, const float *m, const float *v, const double *sum, size_t n,
                             float lr, double bias1, double bias2, float decay) {
    ellisadam_step a = {bias1, lr, (float)sqrt(bias2), 1.0f - decay};
    LAUNCH(ellisadam_update_kernel, blocks_of8(n), THREADS, 0, w, m, v, sum, n, a);
}

// Muon, the momentum: m += (1 - μ)·(x - m), u = x + μ·(m - x), with x = scale·g.
__global__ void muon_momentum_kernel(float *u, float *m, const float *g, size_t n, float scale,
                                     float momentum) {
    size_t i = first_of8();
    if (i >= n) return;
    float mi[8], gi[8];
    load8(mi, m + i, n - i);
    load8(gi, g + i, n - i);
    for (int j = 0; j < 8; j++) {
        float x = gi[j] * scale;
        mi[j] += (1.0f - momentum) * (x - mi[j]);
        gi[j] = x + momentum * (mi[j] - x);
    }
    store8(m + i, mi, n - i);
    store8(u + i, gi, n - i);
}

template <typename E>
static void muon_momentum(float *u, float *m, const float *g, size_t n, float scale,
                          float momentum) {
    LAUNCH(muon_momentum_kernel, blocks_of8(n), THREADS, 0, u, m, g, n, scale, momentum);
}

// muon_load and muon_update: x (rows,cols), or x (cols,rows) if rows > cols: then it is transposed.
// One block per square of 32x32 of u or w. A transposed square passes through shared memory, so
// that neighbouring threads read neighbours of one matrix and write neighbours of the other.
struct square {
    size_t r0, c0; // its first row and column
    __device__ square(size_t cols) {
        size_t across = (cols + 31) / 32;
        r0 = blockIdx.x / across * 32;
        c0 = blockIdx.x % across * 32;
    }
};
enum { SQUARE_STRIDE = 33 }; // rows and columns both lie in 32 different banks

// muon_load: x = u/(‖u‖ + 1e-7), *squares = ‖u‖²
template <typename E>
__global__ void muon_load_kernel(E *x, const float *u, const double *squares, size_t rows,
                                 size_t cols) {
    SMEM(float, tile, 32 * SQUARE_STRIDE);
    square at(cols);
    size_t i = threadIdx.x % 32, first = threadIdx.x / 32;
    float scale = (float)(1 / (sqrt(*squares) + 1e-7));
    for (size_t j = first; j < 32; j += THREADS / 32) {
        size_t r = at.r0 + j, c = at.c0 + i;
        if (r >= rows || c >= cols) continue;
        float y = u[r * cols + c] * scale;
        tile[j * SQUARE_STRIDE + i] = y;
        if (rows <= cols) from_float(x[r * cols + c], y);
    }
    __syncthreads();
    for (size_t j = first; j < 32 && rows > cols; j += THREADS / 32) {
        size_t r = at.r0 + i, c = at.c0 + j;
        if (r < rows && c < cols) from_float(x[c * rows + r], tile[i * SQUARE_STRIDE + j]);
    }
}

template <typename E>
static void muon_load(act *x, const float *u, const double *squares, size_t rows, size_t cols) {
    LAUNCH(muon_load_kernel<E>, ceil_of(rows, 32) * ceil_of(cols, 32), THREADS, 0, (E *)x, u,
           squares, rows, cols);
}

// axpby: y = a·x + b·y
template <typename E> __global__ void axpby_kernel(E *y, const E *x, size_t n, float a, float b) {
    size_t i = first_of8();
    if (i >= n) return;
    float xi[8], yi[8];
    load8(xi, x + i, n - i);
    load8(yi, y + i, n - i);
    for (int j = 0; j < 8; j++) yi[j] = a * xi[j] + b * yi[j];
    store8(y + i, yi, n - i);
}

template <typename E> static void axpby(act *y, const act *x, size_t n, float a, float b) {
    LAUNCH(axpby_kernel<E>, blocks_of8(n), THREADS, 0, (E *)y, (const E *)x, n, a, b);
}

// muon_update: w = keep·w - step·x, with keep = 1 - lr·decay, step = lr·scale
template <typename E>
__global__ void muon_update_kernel(float *w, const E *x, size_t rows, size_t cols, float keep,
                                   float step) {
    SMEM(float, tile, 32 * SQUARE_STRIDE);
    square at(cols);
    size_t i = threadIdx.x % 32, first = threadIdx.x / 32;
    for (size_t j = first; j < 32 && rows > cols; j += THREADS / 32) {
        size_t r = at.r0 + i, c = at.c0 + j;
        if (r < rows && c < cols) tile[i * SQUARE_STRIDE + j] = to_float(x[c * rows + r]);
    }
    __syncthreads();
    for (size_t j = first; j < 32; j += THREADS / 32) {
        size_t r = at.r0 + j, c = at.c0 + i, k = r * cols + c;
        if (r >= rows || c >= cols) continue;
        w[k] = w[k] * keep - step * (rows > cols ? tile[j * SQUARE_STRIDE + i] : to_float(x[k]));
    }
}

template <typename E>
static void muon_update(float *w, const act *x, size_t rows, size_t cols, float lr, float scale,
                        float decay) {
    LAUNCH(muon_update_kernel<E>, ceil_of(rows, 32) * ceil_of(cols, 32), THREADS, 0, w,
           (const E *)x, rows, cols, 1.0f - lr * decay, lr * scale);
}

// =================================================================================================
// 5  The tables
// =================================================================================================

// The entries that both tables share, in the order of retrofit_ops.
#define CUDA_DEVICE(peak_flops) \
    128, cuda_start, peak_flops, cuda_free_memory, cuda_alloc, cuda_free, cuda_upload, \
    cuda_download, cuda_copy, cuda_zero, cuda_record_begin, cuda_record_end, cuda_replay, \
    cuda_record_free

const retrofit_ops retrofit_cuda = {
    "cuda", RETROFIT_BF16, CUDA_DEVICE(cuda_peak_bf16),
#define X(name, parameters) name<bf16>,
    RETROFIT_OPS(X)
#undef X
};

const retrofit_ops retrofit_cuda_fp32 = {
    "cuda-fp32", RETROFIT_F32, CUDA_DEVICE(cuda_peak_fp32),
#define X(name, parameters) name<float>,
    RETROFIT_OPS(X)
#undef X
};

/* emulator.h - CUDA on a CPU. retrofit_cuda.cu includes it where nvcc does not compile it, so that
   it can be tested without a GPU.

   The threads of a block are fibers, which run one at a time in an order drawn from a seed
   (emulator.cpp). Names and meanings are CUDA's. What CUDA leaves undefined ends the process here,
   with a line on stderr. Three builds find three kinds of errors:
       -O2                           wrong results, divergence, deadlock, limits, and missing
                                     barriers that show in some order of the threads
       -fsanitize=address,undefined  reads and writes outside of arrays, in global and shared memory
       -fsanitize=thread             of the .cu file alone (not of emulator.cpp, and not when
                                     linking): the emulator takes libtsan's place and names every
                                     race, every read of shared memory that nobody has written, and
                                     every access to memory that is not the GPU's
   Environment:
       EMULATOR_ORDER    of threads: 0 in order, 1 random, 2 bursts of one warp
       EMULATOR_SEED     of that order
       EMULATOR_MEMORY   of the GPU, in bytes
       EMULATOR_DEVICES  the number of GPUs
   In orders 1 and 2 streams are lazy: their work is done only when the host waits for it. So it
   shows where the host forgets to wait.

   No build can find a wrong belief about PTX that the kernels and the emulator share, the rounding
   of a tensor core, what depends on time, or a lack of speed. */
#ifndef EMULATOR_H
#define EMULATOR_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// The last parameter of every function that may wait or fail, so that an error names the line that
// called it.
#define EMULATOR_LINE int line = __builtin_LINE()

// ---- Vectors and coordinates -------------------------------------------------------------------
struct alignas(8) float2 { float x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) double2 { double x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct uint3 { unsigned x, y, z; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline double2 make_double2(double x, double y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs.
struct emulator_coordinates {
    uint3 thread, block;
    dim3 block_dim, grid_dim;
};
extern emulator_coordinates emulator_at;
#define threadIdx emulator_at.thread
#define blockIdx emulator_at.block
#define blockDim emulator_at.block_dim
#define gridDim emulator_at.grid_dim
enum { warpSize = 32 };

// ---- Numbers -----------------------------------------------------------------------------------
// The same bits as another type.
template <typename To, typename From> static inline To emulator_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline unsigned __float_as_uint(float x) { return emulator_cast<unsigned>(x); }
static inline int __float_as_int(float x) { return emulator_cast<int>(x); }
static inline float __uint_as_float(unsigned x) { return emulator_cast<float>(x); }
static inline float __int_as_float(int x) { return emulator_cast<float>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
#define __expf(x) expf(x) // macros, since glibc declares functions of these names
#define __logf(x) logf(x)
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
static inline float __fdividef(float x, float y) { // 0 for large y, as in CUDA
    return fabsf(y) > 0x1p126f ? x * 0 : x / y;
}

// Nothing converts to or from bf16 by itself. CUDA's implicit conversions would only hide mistakes.
struct alignas(2) __nv_bfloat16 { uint16_t bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };

// Rounds to nearest even.
static inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t u = __float_as_uint(x);
    if ((u & 0x7fffffff) > 0x7f800000) return {0x7fff}; // NaN
    return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
static inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
static inline float __bfloat162float(__nv_bfloat16 x) {
    return __uint_as_float((uint32_t)x.bits << 16);
}
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
static inline float2 __bfloat1622float2(__nv_bfloat162 v) {
    return {__bfloat162float(v.x), __bfloat162float(v.y)};
}

// ---- Memory ------------------------------------------------------------------------------------
template <typename T> static inline T __ldg(const T *p) { return *p; }
template <typename T> static inline T __ldcs(const T *p) { return *p; }
template <typename T> static inline void __stcs(T *p, T x) { *p = x; }
template <typename T> static inline void __stwb(T *p, T x) { *p = x; }
int atomicAdd(int *p, int x);
unsigned atomicAdd(unsigned *p, unsigned x);
static inline void __threadfence(void) {}

// Shared memory: what in CUDA is __shared__ T name[N], and the extern array. Arrays are of exact
// size and 128-byte aligned. When a block begins all their bits are set, which is NaN in floats.
struct emulator_array {
    const char *name;
    size_t bytes;
    unsigned launch; // in which it got its place
    void *at;
};
void *emulator_shared(emulator_array *array);
void *emulator_dynamic(void);
#define SMEM(T, name, N)                                                       \
    static emulator_array name##_array = {#name, sizeof(T) * (N), 0, nullptr}; \
    T(&name)[N] = *(T(*)[N])emulator_shared(&name##_array)
#define DYN_SMEM(T, name) T *name = (T *)emulator_dynamic()

// ---- Blocks and warps --------------------------------------------------------------------------
void __syncthreads(EMULATOR_LINE);
int __syncthreads_or(int predicate, EMULATOR_LINE);
int __syncthreads_and(int predicate, EMULATOR_LINE);
int __syncthreads_count(int predicate, EMULATOR_LINE);
void __syncwarp(unsigned mask = 0xffffffff, EMULATOR_LINE);
unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_LINE);
int __any_sync(unsigned mask, int predicate, EMULATOR_LINE);
int __all_sync(unsigned mask, int predicate, EMULATOR_LINE);

enum emulator_shuffle { EMULATOR_IDX, EMULATOR_UP, EMULATOR_DOWN, EMULATOR_XOR };
uint64_t emulator_shfl(emulator_shuffle kind, unsigned mask, uint64_t bits, int by, int width,
                       int line);
template <typename T>
static inline T emulator_shuffle_number(emulator_shuffle kind, unsigned mask, T x, int by,
                                        int width, int line) {
    static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                  "shuffles move numbers of 4 or 8 bytes");
    typedef typename std::conditional<sizeof(T) == 4, uint32_t, uint64_t>::type bits;
    uint64_t result = emulator_shfl(kind, mask, emulator_cast<bits>(x), by, width, line);
    return emulator_cast<T>((bits)result);
}
#define EMULATOR_SHUFFLE(name, kind, by_type)                                             \
    template <typename T>                                                                 \
    static inline T name(unsigned mask, T x, by_type by, int width = 32, EMULATOR_LINE) { \
        return emulator_shuffle_number(kind, mask, x, (int)by, width, line);              \
    }
EMULATOR_SHUFFLE(__shfl_sync, EMULATOR_IDX, int)
EMULATOR_SHUFFLE(__shfl_up_sync, EMULATOR_UP, unsigned)
EMULATOR_SHUFFLE(__shfl_down_sync, EMULATOR_DOWN, unsigned)
EMULATOR_SHUFFLE(__shfl_xor_sync, EMULATOR_XOR, int)

// ---- The PTX that retrofit_cuda.cu wraps -------------------------------------------------------
// ldmatrix.sync.aligned.m8n8.x4.shared.b16, and the same with .trans.
void ldmatrix(uint32_t r[4], const void *row, EMULATOR_LINE);
void ldmatrix_transposed(uint32_t r[4], const void *row, EMULATOR_LINE);
// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32, and the same in fp32, where a and b have
// numbers instead of pairs.
void mma(float c[4], const uint32_t a[4], const uint32_t b[2], EMULATOR_LINE);
#ifndef EMULATOR_NO_MMA_F32
void mma(float c[4], const float a[8], const float b[4], EMULATOR_LINE);
#endif
// griddepcontrol.wait and .launch_dependents
void wait_for_previous(void);
// prefetch.global.L2: the address must be one of the GPU's memory
void prefetch(const void *p, EMULATOR_LINE);
// ex2.approx.ftz.f32
static inline float power_of_two(float x) {
    float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}
// cp.async.cg.shared.global of 16 bytes: the first `bytes` are copied, the rest become 0.
void cp_async(void *shared, const void *global, int bytes, EMULATOR_LINE);
// cp.async.commit_group
void cp_async_commit(void);
// cp.async.wait_group: waits for all groups but the latest.
void emulator_cp_async_wait(int latest);
template <int N> static inline void cp_async_wait(void) { emulator_cp_async_wait(N); }

// ---- The runtime's API -------------------------------------------------------------------------
// X(name, number)
#define EMULATOR_ERRORS(X)                    \
    X(cudaSuccess, 0)                         \
    X(cudaErrorInvalidValue, 1)               \
    X(cudaErrorMemoryAllocation, 2)           \
    X(cudaErrorInvalidConfiguration, 9)       \
    X(cudaErrorInsufficientDriver, 35)        \
    X(cudaErrorNoDevice, 100)                 \
    X(cudaErrorInvalidDevice, 101)            \
    X(cudaErrorNoKernelImageForDevice, 209)   \
    X(cudaErrorIllegalState, 401)             \
    X(cudaErrorNotReady, 600)                 \
    X(cudaErrorStreamCaptureUnsupported, 900) \
    X(cudaErrorStreamCaptureInvalidated, 901)
// X(name, number, value)
#define EMULATOR_ATTRIBUTES(X)                         \
    X(cudaDevAttrMaxThreadsPerBlock, 1, 1024)          \
    X(cudaDevAttrMaxSharedMemoryPerBlock, 8, 48 << 10) \
    X(cudaDevAttrWarpSize, 10, 32)                     \
    X(cudaDevAttrClockRate, 13, 1000000)               \
    X(cudaDevAttrMultiProcessorCount, 16, 4)           \
    X(cudaDevAttrComputeCapabilityMajor, 75, 9)        \
    X(cudaDevAttrComputeCapabilityMinor, 76, 0)        \
    X(cudaDevAttrMaxSharedMemoryPerBlockOptin, 97, 227 << 10)
#define EMULATOR_CONSTANT(name, number, ...) name = number,
enum cudaError_t { EMULATOR_ERRORS(EMULATOR_CONSTANT) };
enum cudaDeviceAttr { EMULATOR_ATTRIBUTES(EMULATOR_CONSTANT) };
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventDisableTiming = 2 };
typedef struct emulator_stream *cudaStream_t;
typedef struct emulator_graph *cudaGraph_t, *cudaGraphExec_t;
typedef struct emulator_event *cudaEvent_t;
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock;
};

extern "C" {
// Sets what EMULATOR_ORDER and EMULATOR_SEED set at the start.
void emulator_order(int kind, uint64_t seed);
// Bytes of the GPU's memory that kernels have read and written so far: each once a launch, as if a
// cache held all that a launch touches. Counted where races are looked for.
extern size_t emulator_bytes_read, emulator_bytes_written;
}

const char *cudaGetErrorName(cudaError_t error);
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError(void);
cudaError_t cudaPeekAtLastError(void);
cudaError_t cudaDeviceSynchronize(void);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemGetInfo(size_t *free, size_t *total);

cudaError_t emulator_malloc(void **p, size_t bytes, bool on_device);
template <typename T> cudaError_t cudaMalloc(T **p, size_t bytes) {
    return emulator_malloc((void **)p, bytes, true);
}
template <typename T> cudaError_t cudaMallocHost(T **p, size_t bytes) {
    return emulator_malloc((void **)p, bytes, false);
}
cudaError_t cudaFree(void *p);
cudaError_t cudaFreeHost(void *p);
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemset(void *to, int byte, size_t bytes);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemsetAsync(void *to, int byte, size_t bytes, cudaStream_t stream = nullptr);

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamCreate(cudaStream_t *stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph,
                                 unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaEventCreate(cudaEvent_t *event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
// As CUDA has it: a function of the host in its turn in a stream. For test/nccl_stand_in.c.
extern "C" cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*function)(void *),
                                          void *data);
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end);
cudaError_t cudaEventDestroy(cudaEvent_t event);

cudaError_t emulator_set_attribute(const void *kernel, cudaFuncAttribute attribute, int value);
template <typename F>
cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute attribute, int value) {
    return emulator_set_attribute((const void *)kernel, attribute, value);
}

// ---- Launches: kernel<<<grid, block, shared, stream>>>(arguments...) ---------------------------
struct emulator_launch_shape {
    dim3 grid, block;
    size_t shared;
    bool chained; // set by emulator_chain
};
// run(call) runs one thread of the kernel. `call`: its arguments, of that many bytes, to be copied.
void emulator_submit(void (*run)(void *), const void *call, size_t bytes, const void *kernel,
                     emulator_launch_shape shape, cudaStream_t stream);
// The next launch may begin before the ones before it have ended: all its threads must call
// wait_for_previous, before they touch memory of the GPU.
void emulator_chain(void);
template <typename T> struct emulator_identity { typedef T type; };
template <typename... P>
void emulator_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                     cudaStream_t stream, typename emulator_identity<P>::type... arguments) {
    auto call = [=] { kernel(arguments...); };
    static_assert(std::is_trivially_copyable<decltype(call)>::value, "kernels take plain data");
    auto run = [](void *c) { (*(decltype(call) *)c)(); };
    emulator_submit(run, &call, sizeof call, (const void *)kernel, {grid, block, shared, false},
                    stream);
}
#endif

// The instructions of a warp's tensor cores, and what brings tiles to them; cards from compute capability 8.0 on.
//
// The tests compile what is built on these for the CPU: CUDA_EMULATION names a header that has the same functions.
#pragma once
#ifdef CUDA_EMULATION
#include CUDA_EMULATION
#else

#include <atomic>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define ON_TENSOR_CORES(...) __trap()  // never launched there, but the library is to compile
#else
#define ON_TENSOR_CORES(...) __VA_ARGS__
#endif

using Bf16 = __nv_bfloat16;
using Fp16 = __half;
using Address = unsigned;  // in shared memory

// 16x16 values of 16 bits. A thread holds two neighbours, columns 2(lane%4) and the next, of four 8x8 parts: row lane/4
// of x[0], the part at the top left, x[1] at the bottom left, x[2] at the top right and x[3] at the bottom right.
struct Block {
    unsigned x[4];
};

__device__ inline char *shared_memory() {
    extern __shared__ __align__(1024) char memory[];
    return memory;
}
__device__ inline Address shared_address(const void *at) { return (unsigned)__cvta_generic_to_shared(at); }

// A block, row lane%16 of which lies at a lane's `row`, the left half for lanes 0 to 15, the right for the others.
__device__ inline Block load_block(Address row) {
    Block b = {};
    ON_TENSOR_CORES(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                                 : "=r"(b.x[0]), "=r"(b.x[1]), "=r"(b.x[2]), "=r"(b.x[3]) : "r"(row)));
    return b;
}

// The same with each of its four parts transposed in place.
__device__ inline Block load_turned(Address row) {
    Block b = {};
    ON_TENSOR_CORES(asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                                 : "=r"(b.x[0]), "=r"(b.x[1]), "=r"(b.x[2]), "=r"(b.x[3]) : "r"(row)));
    return b;
}

// c (16,8) += a (16,16) times the 16x8 values whose transpose the 8x8 parts b0 (its left half) and b1 hold.
template <typename T> __device__ void multiply(float (&c)[4], const Block &a, unsigned b0, unsigned b1);
template <> __device__ inline void multiply<Bf16>(float (&c)[4], const Block &a, unsigned b0, unsigned b1) {
    ON_TENSOR_CORES(asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1)));
}
template <> __device__ inline void multiply<Fp16>(float (&c)[4], const Block &a, unsigned b0, unsigned b1) {
    ON_TENSOR_CORES(asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1)));
}

// Two values of 16 bits in one register, the first in the lower half.
template <typename T> __device__ unsigned pack(float first, float second);
template <> __device__ inline unsigned pack<Bf16>(float first, float second) {
    unsigned both = 0;
    ON_TENSOR_CORES(asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first)));
    return both;
}
template <> __device__ inline unsigned pack<Fp16>(float first, float second) {
    const __half2 both = __floats2half2_rn(first, second);
    return *(const unsigned *)&both;
}
template <typename T> __device__ float2 unpack(unsigned both);
template <> __device__ inline float2 unpack<Bf16>(unsigned both) {
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}
template <> __device__ inline float2 unpack<Fp16>(unsigned both) { return __half22float2(*(const __half2 *)&both); }

__device__ inline float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline void put32(Address at, unsigned x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
__device__ inline void put16(Address at, unsigned short x) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"(x) : "memory");
}
__device__ inline uint4 get128(Address at) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at));
    return x;
}

// 16 bytes to global memory, and 8, in one store: the compiler may split those of a uint4 and of a float2.
__device__ inline void store128(void *to, uint4 x) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ inline void store64(float *to, float first, float second) {
    asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(first), "f"(second) : "memory");
}

// 16 bytes from global memory, or zeros, on their way; `wait` until all groups but the last `left` have come.
__device__ inline void copy16(Address to, const void *from, bool inside) {
    ON_TENSOR_CORES(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                                 "r"(inside ? 16 : 0) : "memory"));
}
__device__ inline void close_group() { ON_TENSOR_CORES(asm volatile("cp.async.commit_group;" ::: "memory")); }
template <int left> __device__ inline void wait() {
    ON_TENSOR_CORES(asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory"));
}

__device__ inline float from_above(float x, int lanes) { return __shfl_up_sync(~0u, x, lanes); }
__device__ inline float from_below(float x, int lanes) { return __shfl_down_sync(~0u, x, lanes); }
__device__ inline float from_lane(float x, int lane) { return __shfl_sync(~0u, x, lane); }
__device__ inline float from_other(float x, int bits) { return __shfl_xor_sync(~0u, x, bits); }

// Blocks of `threads` with `shared` bytes; returns a cudaError_t. `most` is the most shared memory that this kernel is
// ever given, which is asked for only once on each of the first 64 devices.
template <auto kernel, typename Call>
inline int launch(const Call &call, unsigned blocks, int threads, int shared, int most, cudaStream_t stream) {
    static std::atomic<unsigned long long> known{0};
    if (blocks == 0) return cudaSuccess;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    const unsigned long long bit = device < 64 ? 1ull << device : 0;
    if (!error && !(known & bit)) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
        if (!error) error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
        if (!error) known |= bit;
    }
    if (error != cudaSuccess) return error;
    kernel<<<blocks, threads, shared, stream>>>(call);
    return cudaGetLastError();
}

#endif

// The functions of ops/cuda/tensor.cuh on a CPU, so that the kernels built on them can be tested without a GPU.
//
// The threads of a block are fibers that run one after the other, each until it has to wait for others of its warp or
// block. What a function exchanges within a warp is as the PTX manual describes it. Shared memory begins as NaN;
// EMULATION_ORDER (0 to 3) is the order in which threads and warps run, to find barriers that are missing.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <setjmp.h>
#include <ucontext.h>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float __uint_as_float(unsigned bits) {
    float x;
    return memcpy(&x, &bits, 4), x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    return memcpy(&bits, &x, 4), bits;
}
struct Index { unsigned x; };
inline Index threadIdx, blockIdx, blockDim;
using cudaStream_t = void *;
constexpr int cudaSuccess = 0;

struct Bf16 { unsigned short bits; };
using Fp16 = _Float16;
using Address = unsigned;
struct Block { unsigned x[4]; };

namespace emulation {

constexpr int ROOM = 1 << 18, STACK = 1 << 18;
alignas(1024) inline char shared[ROOM];
inline int used;

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool begun, done;
    std::vector<char> stack;
};
struct Barrier { unsigned come = 0, round = 0; };
inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline ucontext_t main_context;
inline int current;
inline Barrier warps[32], block;
inline std::function<void()> body;

inline void pause() {
    if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}
inline void arrive(Barrier &b, unsigned threads) {
    const unsigned round = b.round;
    if (++b.come == threads) b.come = 0, b.round++;
    while (b.round == round) pause();
}

// What each lane of a warp hands over; two of them, so that the next exchange can begin before all have read this one.
struct Exchange {
    unsigned x[32][12];
};
inline Exchange exchanges[32][2];
inline Exchange &exchange(const void *mine, int bytes) {
    const int warp = current / 32;
    Exchange &e = exchanges[warp][warps[warp].round % 2];
    memcpy(e.x[current % 32], mine, bytes);
    arrive(warps[warp], 32);
    return e;
}

inline void check(Address at, int bytes) {
    if (at + bytes > (unsigned)used || at % bytes) {
        fprintf(stderr, "access of %d bytes at %u of %d in shared memory\n", bytes, at, used);
        abort();
    }
}

inline void enter() {
    body();
    fibers[current].done = true;
    _longjmp(scheduler, 1);
}

inline void run_block(int threads, int order) {
    for (int i = 0; i < ROOM; i += 4) *(unsigned *)(shared + i) = 0x7fc07fc0;
    for (Fiber &f : fibers) f.begun = f.done = false;
    for (int left = threads; left;)
        for (int i = 0; i < threads; i++) {
            const int lane = order % 2 ? 31 - i % 32 : i % 32, warp = order / 2 ? (threads - 1 - i) / 32 : i / 32;
            Fiber &f = fibers[current = warp * 32 + lane];
            if (f.done) continue;
            threadIdx.x = current;
            if (!_setjmp(scheduler)) {
                if (f.begun) _longjmp(f.at, 1);
                f.begun = true;
                getcontext(&f.start);
                f.stack.resize(STACK);
                f.start.uc_stack.ss_sp = f.stack.data(), f.start.uc_stack.ss_size = STACK, f.start.uc_link = nullptr;
                makecontext(&f.start, enter, 0);
                setcontext(&f.start);
            }
            left -= fibers[current].done;
        }
    for (int i = used; i < ROOM; i += 4)
        if (*(unsigned *)(shared + i) != 0x7fc07fc0) fprintf(stderr, "written past shared memory\n"), abort();
}

inline float bf16(unsigned short bits) {
    const unsigned wide = (unsigned)bits << 16;
    float x;
    return memcpy(&x, &wide, 4), x;
}
inline float fp16(unsigned short bits) {
    _Float16 x;
    return memcpy(&x, &bits, 2), (float)x;
}
template <typename T> float wide(unsigned short bits);
template <> inline float wide<Bf16>(unsigned short bits) { return bf16(bits); }
template <> inline float wide<Fp16>(unsigned short bits) { return fp16(bits); }

}  // namespace emulation

inline void __syncwarp() { emulation::arrive(emulation::warps[emulation::current / 32], 32); }
inline void __syncthreads() { emulation::arrive(emulation::block, blockDim.x); }

inline char *shared_memory() { return emulation::shared; }
inline Address shared_address(const void *at) { return (Address)((const char *)at - emulation::shared); }

inline Block load_parts(Address row, bool turned) {
    const int lane = emulation::current % 32;
    emulation::check(row, 16);
    const auto &rows = emulation::exchange(emulation::shared + row, 16).x;  // lane 8p + i: row i of part p
    Block b;
    for (int p = 0; p < 4; p++) {
        unsigned short two[2];
        for (int e = 0; e < 2; e++) {
            const int i = turned ? lane % 4 * 2 + e : lane / 4, j = turned ? lane / 4 : lane % 4 * 2 + e;
            two[e] = ((const unsigned short *)rows[8 * p + i])[j];
        }
        memcpy(&b.x[p], two, 4);
    }
    return b;
}
inline Block load_block(Address row) { return load_parts(row, false); }
inline Block load_turned(Address row) { return load_parts(row, true); }

template <typename T> void multiply(float (&c)[4], const Block &a, unsigned b0, unsigned b1) {
    const unsigned mine[6] = {a.x[0], a.x[1], a.x[2], a.x[3], b0, b1};
    const auto &all = emulation::exchange(mine, sizeof mine).x;
    const int lane = emulation::current % 32;
    for (int e = 0; e < 4; e++) {
        const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        float sum = 0;
        for (int k = 0; k < 16; k++) {
            const unsigned *left = &all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            const unsigned *right = &all[column * 4 + k % 8 / 2][4 + k / 8];
            sum += emulation::wide<T>(((const unsigned short *)left)[k % 2]) *
                   emulation::wide<T>(((const unsigned short *)right)[k % 2]);
        }
        c[e] += sum;
    }
}

template <typename T> unsigned pack(float first, float second);
template <> inline unsigned pack<Bf16>(float first, float second) {
    unsigned bits[2];
    memcpy(&bits[0], &first, 4), memcpy(&bits[1], &second, 4);
    for (unsigned &x : bits) x = (x & 0x7fffffff) > 0x7f800000 ? 0x7fff : (x + 0x7fff + (x >> 16 & 1)) >> 16;
    return bits[0] | bits[1] << 16;
}
template <> inline unsigned pack<Fp16>(float first, float second) {
    const _Float16 two[2] = {(_Float16)first, (_Float16)second};
    unsigned both;
    return memcpy(&both, two, 4), both;
}
template <typename T> float2 unpack(unsigned both) {
    return {emulation::wide<T>((unsigned short)both), emulation::wide<T>((unsigned short)(both >> 16))};
}

inline float exp2_of(float x) { return exp2f(x); }

inline void put32(Address at, unsigned x) { emulation::check(at, 4), memcpy(emulation::shared + at, &x, 4); }
inline void put16(Address at, unsigned short x) { emulation::check(at, 2), memcpy(emulation::shared + at, &x, 2); }
inline uint4 get128(Address at) {
    uint4 x;
    return emulation::check(at, 16), memcpy(&x, emulation::shared + at, 16), x;
}

inline void store128(void *to, uint4 x) {
    if ((uintptr_t)to % 16) fprintf(stderr, "a store to an address that is not a multiple of 16\n"), abort();
    memcpy(to, &x, 16);
}
inline void store64(float *to, float first, float second) { to[0] = first, to[1] = second; }

// Copies come when they are waited for.
struct Copy {
    Address to;
    const void *from;
    bool inside;
};
inline std::vector<std::vector<std::vector<Copy>>> copies;  // of each thread: its groups, the last one open
inline void copy16(Address to, const void *from, bool inside) {
    emulation::check(to, 16);
    if ((uintptr_t)from % 16) fprintf(stderr, "a copy from an address that is not a multiple of 16\n"), abort();
    copies[emulation::current].back().push_back({to, from, inside});
}
inline void close_group() { copies[emulation::current].emplace_back(); }
template <int left> void wait() {
    auto &groups = copies[emulation::current];
    while (groups.size() > left + 1u) {
        for (const Copy &c : groups.front())
            if (c.inside) memcpy(emulation::shared + c.to, c.from, 16);
            else memset(emulation::shared + c.to, 0, 16);
        groups.erase(groups.begin());
    }
}

inline float from_lane(float x, int lane) {
    float y;
    return memcpy(&y, emulation::exchange(&x, 4).x[lane % 32], 4), y;
}
inline float from_above(float x, int lanes) {
    const int lane = emulation::current % 32;
    return from_lane(x, lane < lanes ? lane : lane - lanes);
}
inline float from_below(float x, int lanes) {
    const int lane = emulation::current % 32;
    return from_lane(x, lane + lanes > 31 ? lane : lane + lanes);
}
inline float from_other(float x, int bits) { return from_lane(x, emulation::current % 32 ^ bits); }

template <typename Call>
int launch(void (*kernel)(Call), const Call &call, unsigned blocks, int threads, int shared, cudaStream_t) {
    const char *order = getenv("EMULATION_ORDER");
    if (shared > emulation::ROOM) return 1;
    emulation::used = shared, blockDim.x = threads;
    emulation::body = [&] { kernel(call); };
    emulation::fibers.resize(threads);
    for (unsigned i = 0; i < blocks; i++) {
        blockIdx.x = i;
        copies.assign(threads, std::vector<std::vector<Copy>>(1));
        for (auto &b : emulation::warps) b = {};
        emulation::block = {};
        emulation::run_block(threads, order ? atoi(order) : 0);
    }
    return cudaSuccess;
}
template <auto kernel, typename Call>
int launch(const Call &call, unsigned blocks, int threads, int shared, int most, cudaStream_t stream) {
    return shared > most ? 1 : launch(kernel, call, blocks, threads, shared, stream);
}

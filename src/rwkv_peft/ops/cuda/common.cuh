// What the operators of every version share: how a block holds its part of a state, loads tokens and adds up.
//
// A block has one document, one head and `rows` rows of its state (row = value, column = key). A thread holds 4 rows of
// 4 neighbouring columns, the N/4 threads beside one another the same rows. All maths is in float32.
// Axes: B rows, T tokens, H heads, N head size, S documents.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

constexpr int SEGMENT = 32;  // tokens from one kept state to the next
constexpr int GROUP = 4;     // tokens whose states the backward holds in registers
constexpr int TILE = 4;      // rows and columns of a thread
constexpr int STAGED = 1024;  // values of one tensor that a stage brings into shared memory

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct Array {
    void *data;
    int dtype;
};

// Arguments of every kernel; what a version or a direction does not have stays null. `library.py` mirrors it.
struct Call {
    Array r, w, k, v, kk, iclr, y;            // (B,T,H,N); version 5: w (H,N)
    Array dy, dr, dw, dk, dv, dkk, diclr;     // dr dw dk dkk diclr: (parts,B,T,H,N); version 5: dw (parts,S,H,N)
    float *u, *du;                            // (H,N), (parts,S,H,N)
    float *initial, *final_state;             // (S,H,N,N)
    float *d_initial, *d_final;               // (S,H,N,N)
    float *kept;                              // (B·T/32 + S,H,N,N): the states at the start of every segment
    float *removed;                           // (B,T,H,N): S kk of every token (version 7)
    const int *offsets;                       // (S+1) of the documents of one row, or null: each row is a document
    int tokens, heads, documents, parts, one_decay;  // T, H, S, blocks that share a head, whether w is (H,N)
};

// Which part of the work a block has.
template <int N> struct Place {
    int document, head, part, row0;  // row0: first row of the block
    long first;                      // its document's first token, counted over all rows of the batch
    int count;                       // tokens of the document
    int row, lane;                   // the thread's first row; which four columns of it

    __device__ explicit Place(const Call &c) {
        constexpr int LANES = N / TILE;
        part = blockIdx.x % c.parts;
        head = blockIdx.x / c.parts % c.heads;
        document = blockIdx.x / c.parts / c.heads;
        first = c.offsets ? c.offsets[document] : (long)document * c.tokens;
        count = c.offsets ? c.offsets[document + 1] - (int)first : c.tokens;
        row0 = part * (N / c.parts);
        row = row0 + threadIdx.x / LANES * TILE;
        lane = threadIdx.x % LANES;
    }
    // Index of value `j` of the document's token `t` in a (B,T,H,N) tensor.
    __device__ long at(const Call &c, int t, int j) const { return ((first + t) * c.heads + head) * N + j; }
    // Index of the thread's columns in row `i` of its four rows, in a (S,H,N,N) tensor.
    __device__ long state(const Call &c, int i) const {
        return (((long)document * c.heads + head) * N + row + i) * N + lane * TILE;
    }
    // The same in the states kept; a document of n tokens has ⌈n/32⌉, so that no two documents meet.
    __device__ long kept(const Call &c, int segment, int i) const {
        return (((first / SEGMENT + document + segment) * c.heads + head) * N + row + i) * N + lane * TILE;
    }
};

using Tile = float[TILE][TILE];
using Row = float[TILE];

__device__ inline float unpack_bf16(unsigned bits) { return __uint_as_float(bits << 16); }

__device__ inline float load(const Array &a, long i) {
    if (a.dtype == FLOAT32) return ((const float *)a.data)[i];
    if (a.dtype == BFLOAT16) return unpack_bf16(((const unsigned short *)a.data)[i]);
    return __half2float(((const __half *)a.data)[i]);
}

// Four values from `i` on, a multiple of four.
__device__ inline float4 load4(const Array &a, long i) {
    if (a.dtype == FLOAT32) return *(const float4 *)((const float *)a.data + i);
    const uint2 bits = *(const uint2 *)((const unsigned short *)a.data + i);
    const unsigned x = bits.x & 0xffff, y = bits.x >> 16, z = bits.y & 0xffff, w = bits.y >> 16;
    if (a.dtype == BFLOAT16) return make_float4(unpack_bf16(x), unpack_bf16(y), unpack_bf16(z), unpack_bf16(w));
    const auto half = [](unsigned bits) { return __half2float(__ushort_as_half((unsigned short)bits)); };
    return make_float4(half(x), half(y), half(z), half(w));
}

__device__ inline void store(const Array &a, long i, float x) {
    if (a.dtype == FLOAT32) ((float *)a.data)[i] = x;
    else if (a.dtype == BFLOAT16) ((__nv_bfloat16 *)a.data)[i] = __float2bfloat16(x);
    else ((__half *)a.data)[i] = __float2half(x);
}

// exp(w), bounded as in reference.py: from 20 on the decay is 0, in float64 too.
__device__ inline float rate(float w) { return expf(fminf(w, 20.0f)); }
__device__ inline float decay(float w) { return expf(-rate(w)); }
__device__ inline float4 decay(float4 w) { return make_float4(decay(w.x), decay(w.y), decay(w.z), decay(w.w)); }
__device__ inline float4 operator*(float4 a, float4 b) {
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}

__device__ inline void get(Row &x, const float *from) {
    const float4 f = *(const float4 *)from;
    x[0] = f.x, x[1] = f.y, x[2] = f.z, x[3] = f.w;
}
__device__ inline void put(float *to, float4 x) { *(float4 *)to = x; }
__device__ inline void put(float *to, const Row &x) { put(to, make_float4(x[0], x[1], x[2], x[3])); }

// Sums over columns: `x[i]` is the thread's share of row i, the result in lane l the sum of row l % 4.
template <int N> __device__ inline float sum_rows(const Row &x, int lane) {
    const bool odd = lane & 1, high = lane & 2;
    const float a = (odd ? x[1] : x[0]) + __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
    const float b = (odd ? x[3] : x[2]) + __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
    float sum = (high ? b : a) + __shfl_xor_sync(~0u, high ? a : b, 2);
#pragma unroll
    for (int step = 4; step < N / TILE; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sum;
}

// The four sums of `sum_rows`, in every lane.
template <int N> __device__ inline void spread_rows(Row &x, float sum) {
#pragma unroll
    for (int i = 0; i < TILE; i++) x[i] = __shfl_sync(~0u, sum, i, N / TILE);
}

// Sums over the rows of a warp, written to `to` (N): `x[j]` is the thread's share of its column j.
template <int N> __device__ inline void put_columns(float *to, const Row &x, int lane) {
    if (N / TILE == 32) {
        put(to + lane * TILE, x);
        return;
    }
    const bool upper = threadIdx.x & 16;  // N = 64: two groups of four rows a warp; each adds up two columns
    const float a = (upper ? x[2] : x[0]) + __shfl_xor_sync(~0u, upper ? x[0] : x[2], 16);
    const float b = (upper ? x[3] : x[1]) + __shfl_xor_sync(~0u, upper ? x[1] : x[3], 16);
    *(float2 *)(to + lane * TILE + (upper ? 2 : 0)) = make_float2(a, b);
}

// S = S·diag(decay) + v kᵀ
__device__ inline void update(Tile &S, const Row &d, const Row &v, const Row &k) {
#pragma unroll
    for (int i = 0; i < TILE; i++)
#pragma unroll
        for (int j = 0; j < TILE; j++) S[i][j] = S[i][j] * d[j] + v[i] * k[j];
}

// S = S·diag(decay) - removed bᵀ + v kᵀ
__device__ inline void update(Tile &S, const Row &d, const Row &removed, const Row &b, const Row &v, const Row &k) {
#pragma unroll
    for (int i = 0; i < TILE; i++)
#pragma unroll
        for (int j = 0; j < TILE; j++) S[i][j] = S[i][j] * d[j] - removed[i] * b[j] + v[i] * k[j];
}

// x[i] = Σ_j S_ij c_j, the thread's share of a sum over columns
__device__ inline void times_columns(Row &x, const Tile &S, const Row &c) {
#pragma unroll
    for (int i = 0; i < TILE; i++) {
        x[i] = S[i][0] * c[0];
#pragma unroll
        for (int j = 1; j < TILE; j++) x[i] += S[i][j] * c[j];
    }
}

// x[j] = Σ_i S_ij r_i, the thread's share of a sum over rows
__device__ inline void times_rows(Row &x, const Tile &S, const Row &r) {
#pragma unroll
    for (int j = 0; j < TILE; j++) {
        x[j] = S[0][j] * r[0];
#pragma unroll
        for (int i = 1; i < TILE; i++) x[j] += S[i][j] * r[i];
    }
}

// x[j] = Σ_i G_ij S_ij
__device__ inline void times_state(Row &x, const Tile &G, const Tile &S) {
#pragma unroll
    for (int j = 0; j < TILE; j++) {
        x[j] = G[0][j] * S[0][j];
#pragma unroll
        for (int i = 1; i < TILE; i++) x[j] += G[i][j] * S[i][j];
    }
}

__device__ inline void copy(Tile &to, const Tile &from) {
#pragma unroll
    for (int i = 0; i < TILE; i++)
#pragma unroll
        for (int j = 0; j < TILE; j++) to[i][j] = from[i][j];
}

// A state's part of the thread from `from`, zeros if that is null.
template <int N> __device__ inline void load_state(Tile &S, const float *from, const Place<N> &place, const Call &c) {
#pragma unroll
    for (int i = 0; i < TILE; i++)
        if (from) get(S[i], from + place.state(c, i));
        else S[i][0] = S[i][1] = S[i][2] = S[i][3] = 0.0f;
}

template <int N> __device__ inline void store_state(float *to, const Tile &S, const Place<N> &place, const Call &c) {
#pragma unroll
    for (int i = 0; i < TILE; i++) put(to + place.state(c, i), S[i]);
}

template <int N> __device__ inline void keep_state(const Tile &S, int segment, const Place<N> &place, const Call &c) {
#pragma unroll
    for (int i = 0; i < TILE; i++) put(c.kept + place.kept(c, segment, i), S[i]);
}

template <int N> __device__ inline void kept_state(Tile &S, int segment, const Place<N> &place, const Call &c) {
#pragma unroll
    for (int i = 0; i < TILE; i++) get(S[i], c.kept + place.kept(c, segment, i));
}

// Values `rows` of the staged tokens from `t0` on to a (B,T,H,N) tensor; the block's own rows only.
template <int N>
__device__ inline void store_rows(const Array &to, const float (*from)[N], int t0, const Place<N> &place, const Call &c) {
    const int rows = N / c.parts, tokens = min(STAGED / N, place.count - t0);
    for (int i = threadIdx.x; i < tokens * rows; i += blockDim.x) {
        const int t = i / rows, j = place.row0 + i % rows;
        store(to, place.at(c, t0 + t, j), from[t][j]);
    }
}

// Sums over a block's rows, of four tokens and `KINDS` gradients: each warp adds up its own rows, `total` the warps.
template <int N, int KINDS> struct RowSums {
    float (*sums)[N];  // (GROUP, KINDS, warps, N)
    int warps;

    __device__ explicit RowSums(void *memory) : sums((float(*)[N])memory), warps(blockDim.x / 32) {}
    __device__ void put(int token, int kind, const Row &x, int lane) const {
        put_columns<N>(sums[(token * KINDS + kind) * warps + threadIdx.x / 32], x, lane);
    }
    __device__ float total(int token, int kind, int j) const {
        float sum = 0.0f;
        for (int w = 0; w < warps; w++) sum += sums[(token * KINDS + kind) * warps + w][j];
        return sum;
    }
    static int bytes(int rows) { return GROUP * KINDS * (rows * N / (TILE * TILE * 32)) * N * sizeof(float); }
};

// --- launching

inline int attribute(cudaDeviceAttr name) {
    int device = 0, value = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, name, device);
    return value;
}

template <typename Kernel> inline int launch(Kernel kernel, const Call &c, int N, int shared, cudaStream_t stream) {
    if (c.documents == 0) return cudaSuccess;
    if (shared > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (error != cudaSuccess) return error;
    }
    const unsigned blocks = (unsigned)c.documents * c.heads * c.parts, threads = N / c.parts * (N / TILE) / TILE;
    kernel<<<blocks, threads, shared, stream>>>(c);
    return cudaGetLastError();
}

// Blocks that share a head in the forward: enough for 1.5 on each multiprocessor, each with at least 8 rows.
inline int forward_parts(const Call &c, int N) {
    const long wanted = 3L * attribute(cudaDevAttrMultiProcessorCount) / 2;
    int parts = N == 64 ? 1 : 4;
    while (N / parts > 8 && (long)c.documents * c.heads * parts < wanted) parts *= 2;
    return parts;
}

// Blocks that share a head in the backward: as many as shared memory asks for (`shared` of the rows of a block), more if
// the card would not be filled and the gradients, which the parts have one by one, stay small.
template <typename Shared> inline int backward_parts(const Call &c, int N, int least_rows, Shared shared) {
    const int limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const long blocks = (long)c.documents * c.heads, wanted = attribute(cudaDevAttrMultiProcessorCount);
    const long values = (long)(c.offsets ? 1 : c.documents) * c.tokens * c.heads * N;
    int parts = N / 64;
    while (N / parts > least_rows && shared(N / parts) > limit) parts *= 2;
    while (N / parts > 16 && blocks * parts < wanted && values * parts <= (1L << 23)) parts *= 2;
    return parts;
}

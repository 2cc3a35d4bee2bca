// RWKV-7 in chunks of 64 tokens on tensor cores, heads of 64, inputs of 16 bits. The algebra is that of ops/chunked7.py
// and ops/triton/wkv7.py. With P_t the product of a chunk's decays up to token t, q_a = -kk·P_before and q_r = r·P read
// the state, g_b = kk·iclr/P and g_k = k/P are what is written to it; A are their products where the reader comes after
// the writer, X = (I - A_ab)^-1, W = X q_a. A chunk is two linear functions of the state S before it:
//
//     S' = (S + S·transfer + injected)·diag(end)        y = reader Sᵀ + own
//
// `local7` makes these for every chunk at once, `scan7` goes from chunk to chunk. Backward, `scan_back7` hands the
// gradient of S back through them, and `gradients7` does everything else, again for every chunk at once.
//
// Every product is summed in float32. Products of pairs of tokens are made where they are needed, in either orientation,
// so that they go on as a left factor in registers. Where tokens are alike, X times the pairs is small and what X and the
// pairs make of v or dy one by one is large: X and the pairs are multiplied first, and in fp16, as both are near 1.
// Axes: B rows, T tokens, H heads, N head size, S documents, G chunks.
#pragma once
#include "tiles.cuh"

// `chunked7.py` mirrors it. A tile (G,H,N,N) is bf16 where nothing else is said.
struct Chunked7 {
    const void *r, *w, *k, *v, *kk, *iclr, *dy;      // (B,T,H,N)
    void *y, *dr, *dw, *dk, *dv, *dkk, *diclr;       // (B,T,H,N)
    void *inverse, *transfer, *reader;               // tiles: X less the identity in fp16, and as above
    void *states, *dstates;                          // tiles: `injected`, then the state before each chunk; diag(end)
                                                     // times the gradient of the one after it
    float *end;                                      // (G,H,N)
    const float *initial, *d_final;                  // (S,H,N,N) or null
    float *final_state, *d_initial;                  // (S,H,N,N)
    const int *start, *length, *first, *counts;      // the chunks' `Table`
    int heads, chunks, documents;
    int parts;    // warps that share a head in a scan: 1, 2 or 4 in a block, 16 values each
    int in_place; // whether tiles lie where the chunk's tokens are in a (B,T,H,N) tensor: row i at token i
    int add;      // whether dr, dk, dv come added to what is there
    int keep;     // whether a backward is to come
    int fp16;     // the dtype of what is (B,T,H,N); else bf16
    int w_fp16;   // that of w

    __device__ Place tokens(int start, int head) const { return {((long)start * heads + head) * N, (long)heads * N}; }
    __device__ Place tile(int chunk, int start, int head) const {
        return in_place ? tokens(start, head) : Place{((long)chunk * heads + head) * N * N, N};
    }
};

namespace {

constexpr int STAGES = 3;  // chunks that a scan has in shared memory
constexpr int SHARED_PART = 2 * TILE + N * (int)sizeof(float), WARP_PART = 2 * 2048;  // bytes of a stage

// --- what both kernels of a chunk begin with

// The logarithm of each decay, base 2; tokens outside decay nothing.
template <typename T> __device__ inline void log_decays(Rows &x, int tile, int length, const Warp &w, bool fp16) {
    if (fp16)
        get_rows<Fp16>(x, tile, w);
    else
        get_rows<T>(x, tile, w);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float rate = exp2_of(x[n][e] * LOG2E + 0.5287663729448977f);  // e^w log2(e)
            x[n][e] = w.row(e / 2) < length ? -rate : 0.0f;
        }
}

// In the tiles of kk, iclr, k and r: q_a, g_b, g_k and q_r. log_p: the logarithm of P.
template <typename T>
__device__ inline void factors(
    const Rows &log_p, const Rows &log_decay, int kk_tile, int iclr_tile, int k_tile, int r_tile, const Warp &w
) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        Block kk = w.block(kk_tile, w.own, j), iclr = w.block(iclr_tile, w.own, j);
        Block k = w.block(k_tile, w.own, j), r = w.block(r_tile, w.own, j);
#pragma unroll
        for (int p = 0; p < 4; p++) {
            const float *sum = &log_p[2 * j + p / 2][p % 2 * 2], *decay = &log_decay[2 * j + p / 2][p % 2 * 2];
            const float2 kk_ = unpack<T>(kk.x[p]), iclr_ = unpack<T>(iclr.x[p]);
            const float2 k_ = unpack<T>(k.x[p]), r_ = unpack<T>(r.x[p]);
            const float over0 = exp2_of(-sum[0]), over1 = exp2_of(-sum[1]);
            r.x[p] = pack<Bf16>(r_.x * exp2_of(sum[0]), r_.y * exp2_of(sum[1]));
            k.x[p] = pack<Bf16>(k_.x * over0, k_.y * over1);
            iclr.x[p] = pack<Bf16>(kk_.x * iclr_.x * over0, kk_.y * iclr_.y * over1);
            kk.x[p] = pack<Bf16>(-kk_.x * exp2_of(sum[0] - decay[0]), -kk_.y * exp2_of(sum[1] - decay[1]));
        }
        put_block(kk_tile, j, kk, w), put_block(iclr_tile, j, iclr, w);
        put_block(k_tile, j, k, w), put_block(r_tile, j, r, w);
    }
}

// As a left factor, the columns of block row i of a tile that the warp's rows of its transpose have.
__device__ inline Block transposed(int tile, int i, const Warp &w) {
    const Block b = w.turned(tile, i, w.own);
    return {{b.x[0], b.x[2], b.x[1], b.x[3]}};
}

// --- the inverse of I - A_ab

// x += X · pairs · values, or with `later` Xᵀ · pairs · values: the pairs, a tile in fp16, are then of tokens with later
// ones. inverse: the warp's rows of X or Xᵀ less the identity, in fp16. The blocks on the other side of the diagonal are
// nowhere looked at. The product of X and the pairs goes on in two bf16 of 8 digits each.
template <bool later>
__device__ inline void add_solved(Rows &x, const Operand &inverse, int pairs, int values, const Warp &w) {
    const auto inside = [&](int block) { return later ? block >= w.own : block <= w.own; };
    Rows solved;
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (inside(j)) unpack_block<Fp16>(solved, j, w.block(pairs, w.own, j));
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (inside(i))
#pragma unroll
            for (int j = later ? i : 0; j <= (later ? 3 : i); j++) {
                const Block b = w.turned(pairs, i, j);
                multiply<Fp16>(solved[2 * j], inverse[i], b.x[0], b.x[1]);
                multiply<Fp16>(solved[2 * j + 1], inverse[i], b.x[2], b.x[3]);
            }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (!inside(j)) continue;
        float(&left)[4] = solved[2 * j], (&right)[4] = solved[2 * j + 1];
        const Block high = pack_block<Bf16>(left, right);
        float high_left[4], high_right[4];
        unpack_block<Bf16>(high_left, high_right, high);
#pragma unroll
        for (int e = 0; e < 4; e++) left[e] -= high_left[e], right[e] -= high_right[e];
        add_products(x, x, high, pack_block<Bf16>(left, right), values, j, w);
    }
}

// --- the scans

// What a scan brings to shared memory of one chunk: `transfer`, `reader` and `end`, and for each warp 16 value rows of
// `injected` and 16 value columns of a (B,T,H,N) tensor, the strip, whose rows are 32 bytes.
struct Stage {
    int transfer, reader, end, rows, strip;

    __device__ Stage(int step, int warps, int warp) {
        transfer = step % STAGES * (SHARED_PART + warps * WARP_PART);
        reader = transfer + TILE;
        end = reader + TILE;
        rows = transfer + SHARED_PART;
        strip = rows + warps * 2048 + warp * 2048;
    }
};
// Of 8 values in row `row` of a strip.
__device__ inline int strip_piece(int row, int half) { return row * 32 + ((half ^ row / 4 % 2) << 4); }

// A scan's block has a document, a head and 16 value rows of the state for each of its warps.
struct Sequence {
    int warps, warp, head, document, value, first, count, start, last;  // last: tokens of the last chunk
    long home;  // of the warp's rows in an (S,H,N,N) tensor

    __device__ explicit Sequence(const Chunked7 &c) : warps(blockDim.x / 32), warp(threadIdx.x / 32) {
        const int blocks = 4 / warps;
        head = blockIdx.x / blocks % c.heads, document = blockIdx.x / blocks / c.heads;
        value = (blockIdx.x % blocks * warps + warp) * 16;
        first = c.first[document], count = c.counts[document];
        start = count ? c.start[first] : 0, last = count ? c.length[first + count - 1] : 0;
        home = (((long)document * c.heads + head) * N + value) * N;
    }
    __device__ int length(int chunk) const { return chunk == count - 1 ? last : N; }
    __device__ Place tokens(const Chunked7 &c, int chunk) const {  // the warp's values of them
        const Place all = c.tokens(start + chunk * N, head);
        return {all.at + value, all.stride};
    }
    __device__ Place tile(const Chunked7 &c, int chunk) const { return c.tile(first + chunk, start + chunk * N, head); }
    __device__ Place rows(const Chunked7 &c, int chunk) const {  // such that row `Warp::own` * 16 is the warp's first
        const Place all = tile(c, chunk);
        return {all.at + (value - warp * 16) * all.stride, all.stride};
    }

    __device__ void load(Rows &state, const float *from, const Warp &w) const {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float2 pair = make_float2(0.0f, 0.0f);
                if (from) pair = *(const float2 *)(from + home + (w.g + 8 * half) * N + w.column(n));
                state[n][2 * half] = pair.x, state[n][2 * half + 1] = pair.y;
            }
    }
    __device__ void store(float *to, const Rows &state, const Warp &w) const {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *(float2 *)(to + home + (w.g + 8 * half) * N + w.column(n)) =
                    make_float2(state[n][2 * half], state[n][2 * half + 1]);
    }
    // Begins to bring in what all warps share and the warp's strip of `columns`.
    __device__ void fetch(const Stage &s, const void *columns, int chunk, const Chunked7 &c, const Warp &w) const {
        const Address base = shared_address(shared_memory());
        const Place matrix = tile(c, chunk), strip = tokens(c, chunk);
        long from = matrix.at + threadIdx.x / 8 * matrix.stride + threadIdx.x % 8 * 8;
        for (int row = threadIdx.x / 8; row < N; row += blockDim.x / 8, from += blockDim.x / 8 * matrix.stride) {
            const int to = row * 128 + ((threadIdx.x % 8 ^ row % 8) << 4);
            copy16(base + s.transfer + to, (const unsigned short *)c.transfer + from, true);
            copy16(base + s.reader + to, (const unsigned short *)c.reader + from, true);
        }
        if (threadIdx.x < N / 4) {
            const long from = ((long)(first + chunk) * c.heads + head) * N + threadIdx.x * 4;
            copy16(base + s.end + threadIdx.x * 16, c.end + from, true);
        }
        const int tokens = length(chunk);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = i * 16 + w.lane / 2;
            const long from = strip.at + (row < tokens ? row : 0) * strip.stride + w.lane % 2 * 8;
            copy16(base + s.strip + strip_piece(row, w.lane % 2), (const unsigned short *)columns + from, row < tokens);
        }
    }
};

// The state, or its gradient, times the chunk's decay.
__device__ inline void decay(Rows &state, const Stage &s, const Warp &w) {
    const float *end = (const float *)(shared_memory() + s.end);
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float2 by = *(const float2 *)&end[w.column(n)];
#pragma unroll
        for (int e = 0; e < 4; e++) state[n][e] *= e % 2 ? by.y : by.x;
    }
}

enum Kernel { LOCAL = 1, SCAN = 2, SCAN_BACK = 4, GRADIENTS = 8 };

// Of the launches: blocks, and a scan's threads and bytes of shared memory.
struct Grid {
    unsigned chunks, scans;
    int threads, shared;

    explicit Grid(const Chunked7 &c)
        : chunks((unsigned)c.chunks * c.heads), scans((unsigned)c.documents * c.heads * (4 / c.parts)),
          threads(32 * c.parts), shared(STAGES * (SHARED_PART + c.parts * WARP_PART)) {}
};
constexpr int SCAN_BYTES = STAGES * (SHARED_PART + WARPS * WARP_PART);

}  // namespace

// RWKV-6 and RWKV-5 in chunks of 64 tokens on tensor cores, heads of 64, inputs of 16 bits.
//
// `scan6` carries the state from chunk to chunk, S' = S·diag(decay of the chunk) + vᵀ (k decayed to the end of it), and
// keeps the S that each chunk finds; `output6` makes y of it for every chunk at once. Backward is the same scan from
// the end, of the gradient of S, and `gradients6` makes everything else, again for every chunk at once.
//
// No decay is bounded, so nothing is divided by one: every factor is a product of decays. A warp has a block of 16
// tokens. A reader of an earlier block is r decayed since the start of its own block, then by the whole blocks between,
// a writer k decayed to the end of its block. Within a block pairs meet by a tree of halves: of 2, 4, 8, 16 tokens the
// right half reads the left, r decayed since the boundary and k up to it. Both halves together are z, and z zᵀ has all
// pairs of a level. The gradient of a decay's logarithm is gathered by the same tree: only pairs that the token lies
// between add to it, so that it is right by its own size, however small.
//
// Axes: B rows, T tokens, H heads, N head size, S documents, G chunks.
#pragma once
#include "tiles.cuh"

// `chunked6.py` mirrors it. A tile (G,H,N,N) is bf16, a state's with a row for each key.
struct Chunked6 {
    const void *r, *k, *v, *dy;                      // (B,T,H,N)
    const void *w;                                   // the same; RWKV-5: (H,N) in float32
    void *y, *dr, *dk, *dv;                          // (B,T,H,N)
    void *dw;                                        // like w; RWKV-5: a chunk's share, (G,H,N) in float32
    const float *u;                                  // (H,N)
    float *du;                                       // a chunk's share, (G,H,N)
    void *states, *dstates;                          // tiles: the state before each chunk; its gradient after it
    const float *initial, *d_final;                  // (S,H,N,N) or null
    float *final_state, *d_initial;                  // (S,H,N,N)
    const int *start, *length, *first, *counts;      // the chunks' `Table`
    int heads, chunks, documents;
    int parts;      // warps that share a head in a scan's block: 1, 2 or 4, 16 keys each
    int in_place;   // whether tiles lie where the chunk's tokens are in a (B,T,H,N) tensor: row i at token i
    int fp16;       // the dtype of what is (B,T,H,N); else bf16
    int w_dtype;    // that of w: 0 float32, 1 bf16, 2 fp16
    int one_decay;  // whether w is (H,N)

    __device__ Place tokens(int start, int head) const { return {((long)start * heads + head) * N, (long)heads * N}; }
    __device__ Place decays(int start, int head) const {
        return one_decay ? Place{(long)head * N, 0} : tokens(start, head);
    }
    __device__ Place tile(int chunk, int start, int head) const {
        return in_place ? tokens(start, head) : Place{((long)chunk * heads + head) * N * N, N};
    }
};

namespace {

enum Kernel { SCAN = 1, OUTPUT = 2, SCAN_BACK = 4, GRADIENTS = 8 };
constexpr int LEVELS = 4;  // of halves in a block of 16 tokens: of 1, 2, 4 and 8

using Part = float[2][4];  // 16 columns of `Rows`

// --- decays

// e^w log2(e); from 20 on the decay is 0, as in reference.py.
__device__ inline float rate_of(float w) { return exp2_of(fminf(w, 20.0f) * LOG2E + 0.5287663729448977f); }

// w of the warp's own tokens in block column j, as it is in memory; of tokens outside the first one's.
struct Raw {
    float2 x[2][2];

    __device__ Raw(const Chunked6 &c, Place decays, int length, int j, const Warp &w) {
        int at[2];  // from `decays` on
#pragma unroll
        for (int half = 0; half < 2; half++)
            at[half] = (w.row(half) < length ? w.row(half) : 0) * (int)decays.stride + w.column(2 * j);
        if (c.w_dtype == 0) {
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    x[n][half] = *(const float2 *)((const float *)c.w + decays.at + at[half] + 8 * n);
        } else {
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    x[n][half].x = __uint_as_float(
                        *(const unsigned *)((const unsigned short *)c.w + decays.at + at[half] + 8 * n));
        }
    }
};

// The rates of the warp's own tokens; tokens outside decay nothing.
__device__ inline void rates(Part &rate, const Raw &raw, const Chunked6 &c, int length, const Warp &w) {
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float2 pair = raw.x[n][half];
            const unsigned both = __float_as_uint(pair.x);
            if (c.w_dtype) pair = c.w_dtype == 1 ? unpack<Bf16>(both) : unpack<Fp16>(both);
            const bool inside = w.row(half) < length;
            rate[n][2 * half] = inside ? rate_of(pair.x) : 0.0f;
            rate[n][2 * half + 1] = inside ? rate_of(pair.y) : 0.0f;
        }
}

// Whether a row stands in the right half of its level; e as in `Rows`.
__device__ inline bool in_right(int level, int e, const Warp &w) {
    return level == LEVELS - 1 ? e / 2 : w.g >> level & 1;
}

// The products of decays that a block of 16 tokens needs; each is one over tokens that follow one another.
struct Tree {
    Part between[LEVELS];  // the boundary of the level's two halves and the token
    Part beside[LEVELS];   // over the half that the token is not in
    Part since, until;     // from the block's start to the token, from the token to the end; without the token
    float total[2][2];     // over the block

    __device__ Tree(const Part &rate, const Warp &w) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float half_total[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float over = exp2_of(-rate[n][e]), before = 1.0f, after = 1.0f;
#pragma unroll
                for (int level = 0; level < LEVELS - 1; level++) {
                    const bool right = in_right(level, e, w);
                    const float other = from_other(over, 4 << level);
                    between[level][n][e] = right ? before : after;
                    beside[level][n][e] = other;
                    before *= right ? other : 1.0f;
                    after *= right ? 1.0f : other;
                    over *= other;
                }
                half_total[e] = over, since[n][e] = before, until[n][e] = after;
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                between[LEVELS - 1][n][e] = until[n][e], between[LEVELS - 1][n][2 + e] = since[n][2 + e];
                beside[LEVELS - 1][n][e] = half_total[2 + e], beside[LEVELS - 1][n][2 + e] = half_total[e];
                until[n][e] *= half_total[2 + e], since[n][2 + e] *= half_total[e];
                total[n][e] = half_total[e] * half_total[2 + e];
            }
        }
    }
};

// --- parts

__device__ inline Block packed_product(const Part &x, const Part &y) {
    Part z;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) z[n][e] = x[n][e] * y[n][e];
    return pack_block<Bf16>(z[0], z[1]);
}
// z of a level: r of the right half and k of the left, decayed up to the boundary.
__device__ inline void meeting(Part &z, const Part &r, const Part &k, const Tree &tree, int level, const Warp &w) {
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) z[n][e] = (in_right(level, e, w) ? r[n][e] : k[n][e]) * tree.between[level][n][e];
}

__device__ inline void scale_columns(Rows &x, const float *by, const Warp &w) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float2 factor = *(const float2 *)&by[w.column(n)];
#pragma unroll
        for (int e = 0; e < 4; e++) x[n][e] *= e % 2 ? factor.y : factor.x;
    }
}

// --- what both kernels of a chunk begin with

// What the warp's own tokens read from one another and, by the bonus, from themselves; or, `later`, who reads them.
// Waits for all but the last group first. To the tiles: r decayed since the block's start and k up to its end; to
// `totals` (4,N): the decay over the block.
template <typename T, bool later>
__device__ inline Block meet(
    const Chunked6 &c, Place decays, int length, int head, int r_tile, int k_tile, int readers, int writers,
    float (*totals)[N], const Warp &w
) {
    float far[4] = {}, near[LEVELS - 1][2][4] = {}, bonus[2] = {};
    Raw next(c, decays, length, 0, w);
    wait<1>();
    __syncwarp();
#pragma unroll 1
    for (int j = 0; j < 4; j++) {
        Part rate, r, k, z;
        const float *u_at = &c.u[head * N + w.column(2 * j)];
        const float2 u[2] = {*(const float2 *)u_at, *(const float2 *)(u_at + 8)};
        rates(rate, next, c, length, w);
        if (j < 3) next = Raw(c, decays, length, j + 1, w);
        unpack_block<T>(r[0], r[1], w.block(r_tile, w.own, j));
        unpack_block<T>(k[0], k[1], w.block(k_tile, w.own, j));
        const Tree tree(rate, w);
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) bonus[e / 2] += r[n][e] * k[n][e] * (e % 2 ? u[n].y : u[n].x);
            if (w.g == 0)
                *(float2 *)&totals[w.own][w.column(2 * j + n)] = make_float2(tree.total[n][0], tree.total[n][1]);
        }
#pragma unroll
        for (int level = 0; level < LEVELS; level++) {
            meeting(z, r, k, tree, level, w);
            const Block a = pack_block<Bf16>(z[0], z[1]);
            if (level < LEVELS - 1) {
                multiply<Bf16>(near[level][0], a, a.x[0], a.x[2]);
                multiply<Bf16>(near[level][1], a, a.x[1], a.x[3]);
            } else {
                multiply<Bf16>(far, a, a.x[later ? 1 : 0], a.x[later ? 3 : 2]);
            }
        }
        put_block(readers, j, packed_product(r, tree.since), w);
        put_block(writers, j, packed_product(k, tree.until), w);
    }
    float x[2][2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        bonus[half] += from_other(bonus[half], 1);
        bonus[half] += from_other(bonus[half], 2);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int column = 2 * w.t + e, apart = w.g ^ column, i = 2 * half + e;
            const float met = apart >= 4 ? near[2][half][i] : apart >= 2 ? near[1][half][i] : near[0][half][i];
            x[half][e] = apart == 0 ? bonus[half] : (column < w.g) != later ? met : 0.0f;
        }
    }
    return {{pack<Bf16>(x[0][0], x[0][1]), later ? 0 : pack<Bf16>(far[2], far[3]),
             later ? pack<Bf16>(far[0], far[1]) : 0, pack<Bf16>(x[1][0], x[1][1])}};
}

}  // namespace

// RWKV-6's and RWKV-5's backward pass.
#include "chunked6_scan.cuh"

namespace {

constexpr int GRADIENT_BYTES = 8 * TILE + 22 * N * (int)sizeof(float);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int GRADIENT_BLOCKS = 2;  // that shared memory has room for
#else
constexpr int GRADIENT_BLOCKS = 3;
#endif

// To a tensor of any dtype: block column j of the warp's own tokens.
__device__ inline void store_part(void *to, const Part &x, int dtype, Place place, int length, int j, const Warp &w) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const long at = place.at + (w.row(half) * (int)place.stride + w.column(2 * j));
        if (w.row(half) >= length) continue;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const float first = x[n][2 * half], second = x[n][2 * half + 1];
            if (dtype == 0)
                store64((float *)to + at + 8 * n, first, second);
            else
                *(unsigned *)((unsigned short *)to + at + 8 * n) =
                    dtype == 1 ? pack<Bf16>(first, second) : pack<Fp16>(first, second);
        }
    }
}

// Of a part whose rows g and g + 8 are already added, `sums` at 2n + e: the sum over all rows in the column that
// `summed_column` gives to a lane and the one beside it.
__device__ inline float column_sum(const float (&sums)[4], const Warp &w) {
    const bool high = w.lane & 16, odd = w.lane & 8;
    const float a = (high ? sums[2] : sums[0]) + from_other(high ? sums[0] : sums[2], 16);
    const float b = (high ? sums[3] : sums[1]) + from_other(high ? sums[1] : sums[3], 16);
    const float sum = (odd ? b : a) + from_other(odd ? a : b, 8);
    return sum + from_other(sum, 4);
}
__device__ inline int summed_column(const Warp &w) { return w.lane / 16 * 8 + 2 * w.t + w.lane / 8 % 2; }
__device__ inline void put_column_sum(float *to, float sum, const Warp &w) {
    if (!(w.lane & 4)) to[summed_column(w)] = sum;
}
__device__ inline float column_sum(const Part &x, const Part &y, const Warp &w) {
    float sums[4];
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) sums[2 * n + e] = x[n][e] * y[n][e] + x[n][2 + e] * y[n][2 + e];
    return column_sum(sums, w);
}

// Of the symmetric gradients of a block's pairs those of one level.
__device__ inline Block of_level(const Block &x, int level, const Warp &w) {
    if (level == LEVELS - 1) return {{0, x.x[1], x.x[2], 0}};
    const unsigned ones = level == 0 ? (w.g / 2 == w.t ? (w.g % 2 ? 0xffffu : 0xffff0000u) : 0)
                                     : ((w.g ^ 2 * w.t) >> level == 1 ? ~0u : 0);
    return {{x.x[0] & ones, 0, 0, x.x[3] & ones}};
}

__device__ inline void scale_columns(Part &x, const float *by, const Warp &w) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const float2 factor = *(const float2 *)&by[w.column(n)];
#pragma unroll
        for (int e = 0; e < 4; e++) x[n][e] *= e % 2 ? factor.y : factor.x;
    }
}
__device__ inline void add_product(Part &x, const Block &a, const Block &turned) {
    multiply<Bf16>(x[0], a, turned.x[0], turned.x[1]);
    multiply<Bf16>(x[1], a, turned.x[2], turned.x[3]);
}

// Goes down the tree: from the gradients of r decayed since the block's start and of k up to its end to those of r and
// k. `change`: the gradient of the logarithm of each token's decay, as far as the block's own tokens go. `z`: of every
// level what meets there, which also lies in block column j of the tiles.
__device__ inline void down_tree(
    Part &dreader, Part &dwriter, Part &change, const Part (&beside)[LEVELS], const Block (&z)[LEVELS],
    const Block &dpairs, int j, const int (&tiles)[LEVELS], const Warp &w
) {
    Part far;  // what a token of the other half of the block adds to `change`
#pragma unroll
    for (int level = LEVELS - 1; level >= 0; level--) {
        Part dz, met;
        unpack_block<Bf16>(met[0], met[1], z[level]);
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                dz[n][e] = (in_right(level, e, w) ? dreader[n][e] : dwriter[n][e]) * beside[level][n][e];
                met[n][e] *= dz[n][e];
            }
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {  // the sum over the half beside the token's own; `far` goes along
                if (level == LEVELS - 1) {
                    far[n][e] = change[n][e] = met[n][e ^ 2];
                } else {
                    float sum = far[n][e] + met[n][e];
#pragma unroll
                    for (int lanes = 4; lanes < 4 << level; lanes *= 2) sum += from_other(sum, lanes);
                    change[n][e] += from_other(sum, 4 << level);
                }
            }
        add_product(dz, of_level(dpairs, level, w), w.turned(tiles[level], w.own, j));
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const bool right = in_right(level, e, w);
                dreader[n][e] = right ? dz[n][e] : dreader[n][e];
                dwriter[n][e] = right ? dwriter[n][e] : dz[n][e];
            }
    }
}

// What a chunk has of the gradients of u and of RWKV-5's w, a thread for each key.
__device__ inline void put_share(const Chunked6 &c, float du, float dw) {
    const long at = (long)blockIdx.x * N + threadIdx.x;
    c.du[at] = du;
    if (c.one_decay) ((float *)c.dw)[at] = dw;
}

// A block has one chunk of one head.
template <typename T> __global__ void __launch_bounds__(THREADS, GRADIENT_BLOCKS) gradients6(const Chunked6 c) {
    enum {
        R = 0, K = TILE, READERS = 2 * TILE, WRITERS = 3 * TILE, V = 4 * TILE, DY = 5 * TILE, D = 6 * TILE,
        S = 7 * TILE,
    };
    float(*totals)[N] = (float(*)[N])(shared_memory() + 8 * TILE), *ends = totals[4];
    float *bonus = totals[5];  // the gradient of each token's
    float(*du)[N] = totals + 6, (*dw)[N] = totals + 10;  // as far as a warp's tokens go
    const int chunk = blockIdx.x / c.heads, head = blockIdx.x % c.heads;
    const int start = c.start[chunk], length = c.length[chunk];
    if (length == 0) {
        if (threadIdx.x < N) put_share(c, 0.0f, 0.0f);
        return;
    }
    const Warp w((threadIdx.x / 32 + blockIdx.x) % WARPS);
    const Place tokens = c.tokens(start, head), decays = c.decays(start, head), tile = c.tile(chunk, start, head);
    fetch_rows(R, c.r, tokens, length, w);
    fetch_rows(K, c.k, tokens, length, w);
    close_group();
    fetch_rows(V, c.v, tokens, length, w);
    fetch_rows(DY, c.dy, tokens, length, w);
    fetch_rows(D, c.dstates, tile, N, w);
    close_group();
    const Block own = meet<T, true>(c, decays, length, head, R, K, READERS, WRITERS, totals, w);
    wait<0>();
    __syncwarp();
    to_bf16<T>(V, w);
    to_bf16<T>(DY, w);
    __syncthreads();

    {
        Rows x, writer;
        Operand a;
        clear(x);
        add_product(x, own, DY, w.own, w);
        get_rows<Bf16>(writer, WRITERS, w);
        get_rows(a, WRITERS, w);
#pragma unroll 1
        for (int i = w.own + 1; i < 4; i++) {
            add_product(x, pairs<FROM>(a, READERS, i, w), DY, i, w);
            scale_columns(writer, totals[i], w);
            pack_rows<Bf16>(a, writer);
        }
        add_product(x, a, D, w);
        pack_rows<T>(a, x);
        put_rows(S, a, w);
        send_rows(c.dv, S, tokens, length, w);
    }
    fetch_rows(S, c.states, tile, N, w);
    close_group();

    Block dpairs[3], dmet;  // the gradients of pairs: with the tokens of each other block, and within the own
    {
        Operand dy, v;
        get_rows(dy, DY, w);
        get_rows(v, V, w);
#pragma unroll
        for (int i = 0; i < 3; i++) dpairs[i] = i < w.own ? pairs<UP_TO>(dy, V, i, w) : pairs<FROM>(v, DY, i + 1, w);
        float x[2][4] = {}, turned[2][4] = {};
        add_pairs(x[0], x[1], dy, V, w.own, w);
        add_pairs(turned[0], turned[1], v, DY, w.own, w);
        const int lane = w.g * 4 + w.g / 2;  // has the diagonal
        const float upper[2] = {from_lane(x[0][0], lane), from_lane(x[0][1], lane)};
        const float lower[2] = {from_lane(x[1][2], lane), from_lane(x[1][3], lane)};
        bonus[w.row(0)] = w.g % 2 ? upper[1] : upper[0], bonus[w.row(1)] = w.g % 2 ? lower[1] : lower[0];
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int row = w.g + e / 2 * 8, column = n * 8 + 2 * w.t + e % 2;
                x[n][e] = row > column ? x[n][e] : turned[n][e];
            }
        dmet = pack_block<Bf16>(x[0], x[1]);
    }
    wait<0>();
    __syncwarp();
    {
        Rows before, after;
        get_rows<Bf16>(before, S, w);
        get_rows<Bf16>(after, D, w);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < 8; n++)
                sum += before[n][2 * half] * after[n][2 * half] + before[n][2 * half + 1] * after[n][2 * half + 1];
            sum += from_other(sum, 1);
            sum += from_other(sum, 2);
            const int key = w.row(half);
            if (w.t == 0) ends[key] = sum * totals[0][key] * totals[1][key] * totals[2][key] * totals[3][key];
        }
    }
    __syncthreads();

#pragma unroll 1
    for (int j = 0; j < 4; j++) {
        // (4,4,16), to be added to the gradient of the logarithm of a block's decay: at (i,j), i > j, for block j by what
        // block i reads from before it; at (i,i), for every later block by what block i leaves to later chunks
        float *spans = totals[14 + j % 2 * 4];
        Part dreader = {}, dwriter = {}, r, k;
        {
            Operand a;
            get_rows(a, DY, w);
            add_pairs(dreader[0], dreader[1], a, S, j, w);
            get_rows(a, V, w);
            add_pairs(dwriter[0], dwriter[1], a, D, j, w);
        }
        const Raw raw(c, decays, length, j, w);
        unpack_block<Bf16>(r[0], r[1], w.block(READERS, w.own, j));
        unpack_block<Bf16>(k[0], k[1], w.block(WRITERS, w.own, j));
        const int summed = 16 * j + summed_column(w);
        float left = column_sum(dwriter, k, w);
#pragma unroll
        for (int i = 3; i > 0; i--)
            if (i > w.own) {
                left *= totals[i][summed];
                scale_columns(dwriter, &totals[i][16 * j], w);
                add_product(dwriter, dpairs[i - 1], w.turned(READERS, i, j));
            }
        put_column_sum(spans + w.own * 5 * 16, left, w);
#pragma unroll
        for (int i = 0; i < 3; i++)
            if (i < w.own) {
                scale_columns(dreader, &totals[i][16 * j], w);
                float read = column_sum(dreader, r, w);
#pragma unroll
                for (int between = i + 1; between < 3; between++)
                    if (between < w.own) read *= totals[between][summed];
                put_column_sum(spans + (w.own * 4 + i) * 16, read, w);
                add_product(dreader, dpairs[i], w.turned(WRITERS, i, j));
            }
        __syncthreads();  // from here on nobody else needs what is in column j of READERS and WRITERS

        Part rate, change;
        Block met[LEVELS];
        const int scratch[LEVELS] = {READERS, WRITERS, R, K};
        rates(rate, raw, c, length, w);
        const Tree tree(rate, w);
        const Block packed_r = w.block(R, w.own, j), packed_k = w.block(K, w.own, j);
        unpack_block<T>(r[0], r[1], packed_r);
        unpack_block<T>(k[0], k[1], packed_k);
#pragma unroll
        for (int level = 0; level < LEVELS; level++) {
            Part z;
            meeting(z, r, k, tree, level, w);
            met[level] = pack_block<Bf16>(z[0], z[1]);
            put_block(scratch[level], j, met[level], w);
        }
        __syncwarp();
        down_tree(dreader, dwriter, change, tree.beside, met, dmet, j, scratch, w);
        unpack_block<T>(r[0], r[1], packed_r);
        unpack_block<T>(k[0], k[1], packed_k);
        const float self[2] = {bonus[w.row(0)], bonus[w.row(1)]};
        float du_sums[4], dw_sums[4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int column = w.column(2 * j + n);
            float2 whole = *(const float2 *)&ends[column];
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (i != w.own) {
                    const float2 more = *(const float2 *)&spans[(i * 4 + (i < w.own ? i : w.own)) * 16 + w.column(n)];
                    whole.x += more.x, whole.y += more.y;
                }
            const float2 u = *(const float2 *)&c.u[head * N + column];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float to_bonus = self[e / 2] * (e % 2 ? u.y : u.x);
                dreader[n][e] += to_bonus * k[n][e];
                dwriter[n][e] += to_bonus * r[n][e];
                change[n][e] = -LN2 * rate[n][e] * (change[n][e] + (e % 2 ? whole.y : whole.x));
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                du_sums[2 * n + e] = self[0] * r[n][e] * k[n][e] + self[1] * r[n][2 + e] * k[n][2 + e];
                dw_sums[2 * n + e] = change[n][e] + change[n][2 + e];
            }
        }
        if (!c.one_decay) store_part(c.dw, change, c.w_dtype, decays, length, j, w);
        put_column_sum(&du[w.own][16 * j], column_sum(du_sums, w), w);
        if (c.one_decay) put_column_sum(&dw[w.own][16 * j], column_sum(dw_sums, w), w);
        put_block(R, j, pack_block<T>(dreader[0], dreader[1]), w);
        put_block(K, j, pack_block<T>(dwriter[0], dwriter[1]), w);
    }
    send_rows(c.dr, R, tokens, length, w);
    send_rows(c.dk, K, tokens, length, w);
    __syncthreads();
    if (threadIdx.x < N) {
        const int i = threadIdx.x;
        put_share(c, du[0][i] + du[1][i] + du[2][i] + du[3][i], dw[0][i] + dw[1][i] + dw[2][i] + dw[3][i]);
    }
}

template <typename T> int run(const Chunked6 &c, int kernels, cudaStream_t stream) {
    int error = cudaSuccess;
    if (kernels & SCAN_BACK) error = run_scan<T, true>(c, stream);
    if (kernels & GRADIENTS && !error)
        error = launch<gradients6<T>>(c, c.chunks * c.heads, THREADS, GRADIENT_BYTES, GRADIENT_BYTES, stream);
    return error;
}

}  // namespace

// Launches those of the kernels that are asked for, by bits of `Kernel`; returns a cudaError_t.
extern "C" int chunked6_backward(const Chunked6 *call, int kernels, cudaStream_t stream) {
    return call->fp16 ? run<Fp16>(*call, kernels, stream) : run<Bf16>(*call, kernels, stream);
}

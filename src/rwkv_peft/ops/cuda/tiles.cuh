// Tiles of 64x64 16-bit values in shared memory, and what the four warps of a block do with them.
//
// A tile has rows of 128 bytes; the 16-byte pieces of row i lie in the order that xor with i % 8 gives them, so that no
// access has conflicts. A warp owns 16 rows, `Warp::own` of the four such blocks: it alone writes them and computes those
// rows of every product, in registers: `Rows`, which as `Operand` is the left factor of the next product.
#pragma once
#include "tensor.cuh"

constexpr int N = 64;             // of a tile: its rows (tokens, values or keys) and its columns
constexpr int TILE = N * N * 2;   // bytes; functions take a tile as the bytes before it in shared memory
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// 16 rows and 64 columns in float32: x[n] has columns 8n + 2 t and the next, of row g and then of row g + 8.
using Rows = float[8][4];
using Operand = Block[4];  // the same in 16 bits; each block has 16 columns

// Where in global memory a tile is: row i begins `stride` values after row i - 1.
struct Place {
    long at, stride;
};

struct Warp {
    int lane, g, t, own;
    Address read, write, piece;  // in the first tile: where `load_block`, `put_rows` and `fetch_rows` begin

    __device__ explicit Warp(int own_rows) : lane(threadIdx.x % 32), g(lane / 4), t(lane % 4), own(own_rows) {
        const Address base = shared_address(shared_memory());
        read = base + lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4);
        write = base + own * 2048 + g * 128 + (g << 4) + t * 4;
        piece = base + own * 2048 + lane / 8 * 128 + ((lane % 8 ^ lane / 8) << 4);
    }
    // Of a tile's 16x16 blocks, the one in block row i and block column j.
    __device__ Block block(int tile, int i, int j) const { return load_block((read ^ j << 5) + tile + i * 2048); }
    __device__ Block turned(int tile, int i, int j) const {
        return load_turned((read ^ j << 5) + tile + i * 2048);
    }
    __device__ int column(int n) const { return 8 * n + 2 * t; }                     // of x[n][0] and x[n][2]
    __device__ int row(int half) const { return own * 16 + g + 8 * half; }           // of x[n][2 half]
};

__device__ inline void clear(Rows &x) {
#pragma unroll
    for (int n = 0; n < 8; n++) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0.0f;
}

// --- between registers and tiles

template <typename T> __device__ inline void pack_rows(Operand &to, const Rows &x) {
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int p = 0; p < 4; p++) to[j].x[p] = pack<T>(x[2 * j + p / 2][p % 2 * 2], x[2 * j + p / 2][p % 2 * 2 + 1]);
}

template <typename T> __device__ inline void unpack_block(Rows &x, int j, const Block &from) {
#pragma unroll
    for (int p = 0; p < 4; p++) {
        const float2 pair = unpack<T>(from.x[p]);
        x[2 * j + p / 2][p % 2 * 2] = pair.x, x[2 * j + p / 2][p % 2 * 2 + 1] = pair.y;
    }
}

// The same of 16 columns.
template <typename T> __device__ inline Block pack_block(const float (&left)[4], const float (&right)[4]) {
    return {{pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
             pack<T>(right[2], right[3])}};
}
template <typename T> __device__ inline void unpack_block(float (&left)[4], float (&right)[4], const Block &from) {
#pragma unroll
    for (int p = 0; p < 4; p++) {
        const float2 pair = unpack<T>(from.x[p]);
        float(&part)[4] = p / 2 ? right : left;
        part[p % 2 * 2] = pair.x, part[p % 2 * 2 + 1] = pair.y;
    }
}

__device__ inline void put_block(int tile, int j, const Block &x, const Warp &w) {
#pragma unroll
    for (int p = 0; p < 4; p++) put32((w.write ^ (2 * j + p / 2) << 4) + tile + p % 2 * 1024, x.x[p]);
}

// The warp's own rows.
__device__ inline void get_rows(Operand &x, int tile, const Warp &w) {
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = w.block(tile, w.own, j);
}
template <typename T> __device__ inline void get_rows(Rows &x, int tile, const Warp &w) {
#pragma unroll
    for (int j = 0; j < 4; j++) unpack_block<T>(x, j, w.block(tile, w.own, j));
}
__device__ inline void put_rows(int tile, const Operand &x, const Warp &w) {
#pragma unroll
    for (int j = 0; j < 4; j++) put_block(tile, j, x[j], w);
}

template <typename T> __device__ inline unsigned as_bf16(unsigned both) {
    const float2 pair = unpack<T>(both);
    return pack<Bf16>(pair.x, pair.y);
}
template <> __device__ inline unsigned as_bf16<Bf16>(unsigned both) { return both; }

template <typename T> __device__ inline Block as_bf16(const Block &x) {
    return {{as_bf16<T>(x.x[0]), as_bf16<T>(x.x[1]), as_bf16<T>(x.x[2]), as_bf16<T>(x.x[3])}};
}

// The warp's own rows of a tile that came as T, in bf16.
template <typename T> __device__ inline void to_bf16(int tile, const Warp &w) {
    Rows x;
    Operand packed;
    get_rows<T>(x, tile, w);
    pack_rows<Bf16>(packed, x);
    put_rows(tile, packed, w);
}
template <> __device__ inline void to_bf16<Bf16>(int, const Warp &) {}

// --- between tiles and global memory: the warp's own rows, as far as the tile has `rows`

// `pieces`: of 8 values each, all that a row has beside zeros.
__device__ inline void
fetch_rows(int tile, const void *from, Place place, int rows, const Warp &w, int pieces = 8) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = w.own * 16 + i * 4 + w.lane / 8;
        const bool inside = row < rows && w.lane % 8 < pieces;
        const long at = place.at + (inside ? row : 0) * place.stride + w.lane % 8 * 8;
        copy16((w.piece ^ (i % 2) << 6) + tile + i * 512, (const unsigned short *)from + at, inside);
    }
}

// What is in the warp's own rows of a tile.
__device__ inline void send_rows(void *to, int tile, Place place, int rows, const Warp &w, int pieces = 8) {
    const int first = w.own * 16 + w.lane / 8;
    unsigned short *at = (unsigned short *)to + place.at + first * place.stride + w.lane % 8 * 8;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++, at += 4 * place.stride) {
        const uint4 piece = get128((w.piece ^ (i % 2) << 6) + tile + i * 512);
        if (first + 4 * i < rows && w.lane % 8 < pieces) store128(at, piece);
    }
    __syncwarp();
}

// Through the warp's own rows of the tile `stage`, which nobody else may use.
__device__ inline void
store_rows(void *to, const Operand &x, int stage, Place place, int rows, const Warp &w, int pieces = 8) {
    put_rows(stage, x, w);
    send_rows(to, stage, place, rows, w, pieces);
}
template <typename T>
__device__ inline void store_rows(void *to, const Rows &x, int stage, Place place, int rows, const Warp &w) {
    Operand packed;
    pack_rows<T>(packed, x);
    store_rows(to, packed, stage, place, rows, w);
}

// --- products, in bf16

// x += a · the rows of block row i of a tile
__device__ inline void add_product(Rows &x, const Block &a, int tile, int i, const Warp &w) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const Block b = w.turned(tile, i, j);
        multiply<Bf16>(x[2 * j], a, b.x[0], b.x[1]);
        multiply<Bf16>(x[2 * j + 1], a, b.x[2], b.x[3]);
    }
}
// The same, and z += b · these rows; x and z may be the same.
__device__ inline void
add_products(Rows &x, Rows &z, const Block &a, const Block &b, int tile, int i, const Warp &w) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const Block c = w.turned(tile, i, j);
        multiply<Bf16>(x[2 * j], a, c.x[0], c.x[1]);
        multiply<Bf16>(x[2 * j + 1], a, c.x[2], c.x[3]);
        multiply<Bf16>(z[2 * j], b, c.x[0], c.x[1]);
        multiply<Bf16>(z[2 * j + 1], b, c.x[2], c.x[3]);
    }
}
// x += a · tile
__device__ inline void add_product(Rows &x, const Operand &a, int tile, const Warp &w) {
#pragma unroll
    for (int i = 0; i < 4; i++) add_product(x, a[i], tile, i, w);
}
// x += a · tileᵀ, 16 of its columns: those of block row i of the tile
__device__ inline void add_pairs(float (&left)[4], float (&right)[4], const Operand &a, int tile, int i, const Warp &w) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const Block b = w.block(tile, i, j);
        multiply<Bf16>(left, a[j], b.x[0], b.x[2]);
        multiply<Bf16>(right, a[j], b.x[1], b.x[3]);
    }
}
// x += a · tileᵀ
__device__ inline void add_pairs(Rows &x, const Operand &a, int tile, const Warp &w) {
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {  // inside, as each of these is added to other values: none waits for another
            const Block b = w.block(tile, i, j);
            multiply<Bf16>(x[2 * i], a[j], b.x[0], b.x[2]);
            multiply<Bf16>(x[2 * i + 1], a[j], b.x[1], b.x[3]);
        }
}

enum Mask { BEFORE, UP_TO, AFTER, FROM };  // which columns of a row stay: those before it, ...

// Of a block on the diagonal, zeros in the columns that a mask leaves out.
template <Mask mask> __device__ inline void apply(float (&left)[4], float (&right)[4], const Warp &w) {
#pragma unroll
    for (int e = 0; e < 4; e++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = w.g + e / 2 * 8, column = half * 8 + 2 * w.t + e % 2;
            const bool stays = mask == BEFORE ? column < row
                             : mask == UP_TO ? column <= row
                             : mask == AFTER ? column > row
                                             : column >= row;
            float &x = half ? right[e] : left[e];
            x = stays ? x : 0.0f;
        }
}

// The block of masked a · tileᵀ in the warp's rows and the columns of block row i, as T.
template <Mask mask, typename T = Bf16>
__device__ inline Block pairs(const Operand &a, int tile, int i, const Warp &w) {
    float left[4] = {}, right[4] = {};
    add_pairs(left, right, a, tile, i, w);
    if (i == w.own) apply<mask>(left, right, w);
    return pack_block<T>(left, right);
}

// The same of two tiles at once: half of the waiting.
template <Mask mask1, Mask mask2>
__device__ inline void
pairs(Block &first, Block &second, const Operand &a, int tile1, int tile2, int i, const Warp &w) {
    float x[4][4] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const Block b = w.block(tile1, i, j), c = w.block(tile2, i, j);
        multiply<Bf16>(x[0], a[j], b.x[0], b.x[2]);
        multiply<Bf16>(x[1], a[j], b.x[1], b.x[3]);
        multiply<Bf16>(x[2], a[j], c.x[0], c.x[2]);
        multiply<Bf16>(x[3], a[j], c.x[1], c.x[3]);
    }
    if (i == w.own) apply<mask1>(x[0], x[1], w), apply<mask2>(x[2], x[3], w);
    first = pack_block<Bf16>(x[0], x[1]), second = pack_block<Bf16>(x[2], x[3]);
}

// --- sums over rows

// x becomes the sum over the warp's own rows up to each; totals (4,N): over all of them.
__device__ inline void sum_downwards(Rows &x, float (*totals)[N], const Warp &w) {
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float &upper = x[n][e], &lower = x[n][2 + e];
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) {
                const float a = from_above(upper, lanes), b = from_above(lower, lanes);
                if (w.lane >= lanes) upper += a, lower += b;
            }
            lower += from_lane(upper, 28 + w.t);
            if (w.g == 7) totals[w.own][w.column(n) + e] = lower;
        }
}
// x becomes the sum over the warp's own rows from each on.
__device__ inline void sum_upwards(Rows &x, float (*totals)[N], const Warp &w) {
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float &upper = x[n][e], &lower = x[n][2 + e];
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) {
                const float a = from_below(upper, lanes), b = from_below(lower, lanes);
                if (w.lane + lanes < 32) upper += a, lower += b;
            }
            upper += from_lane(lower, w.t);
            if (w.g == 0) totals[w.own][w.column(n) + e] = upper;
        }
}
// x += the totals of the blocks of rows from `first` to `last`, in their columns.
__device__ inline void add_totals(Rows &x, float (*totals)[N], int first, int last, const Warp &w) {
    for (int i = first; i <= last; i++)
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const float2 more = *(const float2 *)&totals[i][w.column(n)];
            x[n][0] += more.x, x[n][1] += more.y, x[n][2] += more.x, x[n][3] += more.y;
        }
}

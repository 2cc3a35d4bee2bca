// RWKV-7 in chunks of 64 tokens on tensor cores, heads of 64, inputs of 16 bits. The algebra is that of ops/chunked7.py
// and ops/triton/wkv7.py. With P_t the product of a chunk's decays up to token t, q_a = -kk·P_before and q_r = r·P read
// the state, g_b = kk·iclr/P and g_k = k/P are what is written to it; A are their products where the reader comes after
// the writer, X = (I - A_ab)^-1, W = X q_a. A chunk is two linear functions of the state S before it:
//
//     S' = S·diag(end) + S·transfer + injected        y = reader Sᵀ + own
//
// `local7` makes these for every chunk at once, `scan7` goes from chunk to chunk. Backward, `scan_back7` hands the
// gradient of S back through them, and `gradients7` does everything else, again for every chunk at once.
//
// Every product is summed in float32. Products of pairs of tokens are made where they are needed, in either orientation,
// so that they go on as a left factor in registers. Axes: B rows, T tokens, H heads, N head size, S documents, G chunks.
#include "tiles.cuh"

// `chunked7.py` mirrors it. A tile (G,H,N,N) is bf16.
struct Chunked7 {
    const void *r, *w, *k, *v, *kk, *iclr, *dy;      // (B,T,H,N)
    void *y, *dr, *dw, *dk, *dv, *dkk, *diclr;       // (B,T,H,N)
    void *inverse, *transfer, *reader;               // tiles: X less the identity, and as above
    void *states, *dstates;                          // tiles: `injected`, then the state before each chunk; its gradient
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

constexpr int LOCAL_TILES = 6, LOCAL_BYTES = LOCAL_TILES * TILE + (5 * N + WARPS * 16 * 20) * (int)sizeof(float);
constexpr int GRADIENT_TILES = 11, GRADIENT_BYTES = GRADIENT_TILES * TILE + 2 * WARPS * N * (int)sizeof(float);
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

// --- the inverse of I - A, A strictly lower triangular: blocks of 16 tokens

// Of the diagonal block that a warp has, in float32, by substitution; what comes is x, column `lane % 16` of it.
__device__ inline void invert(float (&x)[16], const float (*a)[20], int lane) {
#pragma unroll
    for (int t = 0; t < 16; t++) {
        float even = lane % 16 == t ? 1.0f : 0.0f, odd = 0.0f;
#pragma unroll
        for (int s = 0; s < t; s += 4) {
            const float4 row = *(const float4 *)&a[t][s];
            even += row.x * x[s];
            if (s + 1 < t) odd += row.y * x[s + 1];
            if (s + 2 < t) even += row.z * x[s + 2];
            if (s + 3 < t) odd += row.w * x[s + 3];
        }
        x[t] = even + odd;
    }
}

// In fp16, which has more digits than bf16 and the range for it: the warp's rows of A left of the diagonal to the tile,
// and on the diagonal the inverse.
__device__ inline void put_inverse(int tile, Rows &a, float (*scratch)[20], const Warp &w) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float(&left)[4] = a[2 * j], (&right)[4] = a[2 * j + 1];
        if (j < w.own) {
            put_block(tile, j, {{pack<Fp16>(left[0], left[1]), pack<Fp16>(left[2], left[3]),
                                 pack<Fp16>(right[0], right[1]), pack<Fp16>(right[2], right[3])}}, w);
        } else if (j == w.own) {
            apply<BEFORE>(left, right, w);
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const float(&part)[4] = p / 2 ? right : left;
                const int row = w.g + p % 2 * 8, column = p / 2 * 8 + 2 * w.t;
                *(float2 *)&scratch[row][column] = make_float2(part[p % 2 * 2], part[p % 2 * 2 + 1]);
            }
        }
    }
    __syncwarp();
    float x[16];
    invert(x, scratch, w.lane);
    const int column = w.lane % 16, lower = w.lane / 16 * 8;
    const Address at = shared_address(shared_memory()) + tile + w.own * 2048 + lower * 128 + column % 8 * 2;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const unsigned value = pack<Fp16>(lower ? x[i + 8] : x[i], 0.0f);
        put16(at + i * 128 + ((2 * w.own + column / 8 ^ i) << 4), (unsigned short)value);
    }
}

// The warp's rows of X less the identity, in bf16, from what all warps have put to the tile: of X (I - A) = I.
__device__ inline void inverse_rows(Operand &x, int tile, const Warp &w) {
#pragma unroll
    for (int j = 3; j >= 0; j--) {
        if (j > w.own) x[j] = {{0, 0, 0, 0}};
        if (j == w.own) x[j] = w.block(tile, j, j);
        if (j >= w.own) continue;
        float left[4] = {}, right[4] = {};
#pragma unroll
        for (int i = j + 1; i < 4; i++)
            if (i <= w.own) {
                const Block b = w.turned(tile, i, j);
                multiply<Fp16>(left, x[i], b.x[0], b.x[1]);
                multiply<Fp16>(right, x[i], b.x[2], b.x[3]);
            }
        const Block sum = {{pack<Fp16>(left[0], left[1]), pack<Fp16>(left[2], left[3]), pack<Fp16>(right[0], right[1]),
                            pack<Fp16>(right[2], right[3])}};
        const Block b = w.turned(tile, j, j);
#pragma unroll
        for (int e = 0; e < 4; e++) left[e] = right[e] = 0.0f;
        multiply<Fp16>(left, sum, b.x[0], b.x[1]);
        multiply<Fp16>(right, sum, b.x[2], b.x[3]);
        x[j] = {{pack<Fp16>(left[0], left[1]), pack<Fp16>(left[2], left[3]), pack<Fp16>(right[0], right[1]),
                 pack<Fp16>(right[2], right[3])}};
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int p = 0; p < 4; p++) {
            float2 pair = unpack<Fp16>(x[j].x[p]);
            if (j == w.own && (p == 0 || p == 3)) {
                if (w.g == 2 * w.t) pair.x -= 1.0f;
                if (w.g == 2 * w.t + 1) pair.y -= 1.0f;
            }
            x[j].x[p] = pack<Bf16>(pair.x, pair.y);
        }
}

// --- the kernels

// A block has one chunk of one head.
template <typename T> __global__ void __launch_bounds__(THREADS, 4) local7(const Chunked7 c) {
    // M: w, then A with the inverse on its diagonal, then the stage
    enum { M = 0, QA = TILE, GB = 2 * TILE, GK = 3 * TILE, V = 4 * TILE, QR = 5 * TILE, W = QA, U = QR };
    static_assert(LOCAL_TILES * TILE == QR + TILE, "");
    float(*totals)[N] = (float(*)[N])(shared_memory() + LOCAL_TILES * TILE);
    float *end = totals[4];
    float(*scratch)[20] = (float(*)[20])(totals[5]) + threadIdx.x / 32 * 16;
    const int chunk = blockIdx.x / c.heads, head = blockIdx.x % c.heads;
    const int start = c.start[chunk], length = c.length[chunk];
    if (length == 0) return;
    const Warp w((threadIdx.x / 32 + blockIdx.x) % WARPS);  // rows cost more the lower they are: other warps elsewhere
    const Place tokens = c.tokens(start, head), tile = c.tile(chunk, start, head);
    fetch_rows(M, c.w, tokens, length, w);
    close_group();
    fetch_rows(QA, c.kk, tokens, length, w);
    fetch_rows(GB, c.iclr, tokens, length, w);
    fetch_rows(GK, c.k, tokens, length, w);
    fetch_rows(QR, c.r, tokens, length, w);
    fetch_rows(V, c.v, tokens, length, w);
    close_group();

    wait<1>();
    __syncwarp();
    {
        Rows log_decay, log_p;
        log_decays<T>(log_decay, M, length, w, c.w_fp16);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) log_p[n][e] = log_decay[n][e];
        sum_downwards(log_p, totals, w);
        __syncthreads();
        add_totals(log_p, totals, 0, w.own - 1, w);
        if (threadIdx.x < N) {
            const int i = threadIdx.x;
            end[i] = exp2_of(totals[0][i] + totals[1][i] + totals[2][i] + totals[3][i]);
            c.end[((long)chunk * c.heads + head) * N + i] = end[i];
        }
        wait<0>();
        __syncwarp();
        factors<T>(log_p, log_decay, QA, GB, GK, QR, w);
        to_bf16<T>(V, w);
    }
    __syncthreads();

    Rows u;
    clear(u);
    Operand a;
    get_rows(a, QA, w);
    {
        Rows x;
        clear(x);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i <= w.own) add_pairs(x[2 * i], x[2 * i + 1], a, GB, i, w);
        put_inverse(M, x, scratch, w);
    }
#pragma unroll 1
    for (int i = 0; i <= w.own; i++) add_product(u, pairs<BEFORE>(a, GK, i, w), V, i, w);
    Operand reads;
    get_rows(reads, QR, w);
    pack_rows<Bf16>(a, u);
    __syncwarp();
    put_rows(U, a, w);
    __syncthreads();

    Operand inverse;
    inverse_rows(inverse, M, w);
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i <= w.own) add_product(u, inverse[i], U, i, w);
    pack_rows<Bf16>(a, u);
    get_rows<Bf16>(u, QA, w);
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i <= w.own) add_product(u, inverse[i], QA, i, w);
    __syncthreads();
    put_rows(U, a, w);
    pack_rows<Bf16>(a, u);
    put_rows(W, a, w);
    if (c.keep) store_rows(c.inverse, inverse, M, tile, N, w);
    __syncthreads();

    Rows x;
    clear(x);
#pragma unroll
    for (int i = 0; i < 4; i++) {  // Wᵀ g_b
        const Block b = w.turned(W, i, w.own);
        add_product(x, {{b.x[0], b.x[2], b.x[1], b.x[3]}}, GB, i, w);
    }
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) x[n][e] *= end[w.column(n) + e % 2];
    store_rows<Bf16>(c.transfer, x, M, tile, N, w);
    clear(x);
#pragma unroll
    for (int i = 0; i < 4; i++) {  // Uᵀ g_b + vᵀ g_k
        const Block b = w.turned(U, i, w.own), v = w.turned(V, i, w.own);
        add_product(x, {{b.x[0], b.x[2], b.x[1], b.x[3]}}, GB, i, w);
        add_product(x, {{v.x[0], v.x[2], v.x[1], v.x[3]}}, GK, i, w);
    }
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) x[n][e] *= end[w.column(n) + e % 2];
    store_rows<Bf16>(c.states, x, M, tile, N, w);

#pragma unroll
    for (int j = 0; j < 4; j++) unpack_block<Bf16>(x, j, reads[j]);
    clear(u);
#pragma unroll 1
    for (int i = 0; i <= w.own; i++) {
        Block pair = pairs<UP_TO>(reads, GB, i, w);
        add_product(x, pair, W, i, w);
        add_product(u, pair, U, i, w);
        add_product(u, pairs<UP_TO>(reads, GK, i, w), V, i, w);
    }
    store_rows<Bf16>(c.reader, x, M, tile, N, w);
    store_rows<T>(c.y, u, M, tokens, length, w);
}

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
        for (int row = threadIdx.x / 8; row < N; row += blockDim.x / 8) {
            const int i = threadIdx.x % 8, to = row * 128 + ((i ^ row % 8) << 4);
            const long from = matrix.at + row * matrix.stride + i * 8;
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

template <typename T> __global__ void __launch_bounds__(THREADS) scan7(const Chunked7 c) {
    const Sequence q(c);
    const Warp w(q.warp);
    const Address base = shared_address(shared_memory());
    const auto fetch = [&](int chunk) {
        const Stage s(chunk, q.warps, q.warp);
        if (chunk < q.count) {
            q.fetch(s, c.y, chunk, c, w);
            fetch_rows(s.rows, c.states, q.rows(c, chunk), N, w);
        }
        close_group();
    };
    Rows state;
    q.load(state, c.initial, w);
    for (int chunk = 0; chunk < STAGES - 1; chunk++) fetch(chunk);
    for (int chunk = 0; chunk < q.count; chunk++) {
        wait<STAGES - 2>();
        __syncthreads();
        fetch(chunk + STAGES - 1);
        const Stage s(chunk, q.warps, q.warp);
        Operand before;
        pack_rows<Bf16>(before, state);
#pragma unroll
        for (int i = 0; i < 4; i++) {  // own + reader Sᵀ: the left factor of one product is the right one of another
            const Address at = base + s.strip;
            const Block own = load_block(at + strip_piece(i * 16 + w.lane % 16, w.lane / 16));
            float y[2][4];
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const float2 pair = unpack<T>(own.x[p]);
                y[p / 2][p % 2 * 2] = pair.x, y[p / 2][p % 2 * 2 + 1] = pair.y;
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const Block reader = w.block(s.reader, i, j);
                multiply<Bf16>(y[0], reader, before[j].x[0], before[j].x[2]);
                multiply<Bf16>(y[1], reader, before[j].x[1], before[j].x[3]);
            }
#pragma unroll
            for (int p = 0; p < 4; p++)
                put32(at + strip_piece(i * 16 + p % 2 * 8 + w.g, p / 2) + w.t * 4,
                      pack<T>(y[p / 2][p % 2 * 2], y[p / 2][p % 2 * 2 + 1]));
        }
        Rows injected;
        get_rows<Bf16>(injected, s.rows, w);
        const float *end = (const float *)(shared_memory() + s.end);
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const float2 decay = *(const float2 *)&end[w.column(n)];
#pragma unroll
            for (int e = 0; e < 4; e++) state[n][e] = state[n][e] * (e % 2 ? decay.y : decay.x) + injected[n][e];
        }
        add_product(state, before, s.transfer, w);
        if (c.keep) store_rows(c.states, before, s.rows, q.rows(c, chunk), N, w);
        __syncwarp();
        const Place out = q.tokens(c, chunk);
        const int tokens = q.length(chunk);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = i * 16 + w.lane / 2;
            const uint4 piece = get128(base + s.strip + strip_piece(row, w.lane % 2));
            if (row < tokens) *(uint4 *)((unsigned short *)c.y + out.at + row * out.stride + w.lane % 2 * 8) = piece;
        }
    }
    q.store(c.final_state, state, w);
}

template <typename T> __global__ void __launch_bounds__(THREADS) scan_back7(const Chunked7 c) {
    const Sequence q(c);
    const Warp w(q.warp);
    const Address base = shared_address(shared_memory());
    const auto fetch = [&](int step) {
        if (step < q.count) q.fetch(Stage(step, q.warps, q.warp), c.dy, q.count - 1 - step, c, w);
        close_group();
    };
    Rows dstate;
    q.load(dstate, c.d_final, w);
    for (int step = 0; step < STAGES - 1; step++) fetch(step);
    for (int step = 0; step < q.count; step++) {
        wait<STAGES - 2>();
        __syncthreads();
        fetch(step + STAGES - 1);
        const Stage s(step, q.warps, q.warp);
        Operand after;
        pack_rows<Bf16>(after, dstate);
        const float *end = (const float *)(shared_memory() + s.end);
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const float2 decay = *(const float2 *)&end[w.column(n)];
#pragma unroll
            for (int e = 0; e < 4; e++) dstate[n][e] *= e % 2 ? decay.y : decay.x;
        }
        add_pairs(dstate, after, s.transfer, w);
#pragma unroll
        for (int i = 0; i < 4; i++) {  // dyᵀ reader
            const Block dy = load_turned(base + s.strip + strip_piece(i * 16 + w.lane % 16, w.lane / 16));
            add_product(dstate, {{as_bf16<T>(dy.x[0]), as_bf16<T>(dy.x[2]), as_bf16<T>(dy.x[1]), as_bf16<T>(dy.x[3])}},
                        s.reader, i, w);
        }
        store_rows(c.dstates, after, s.rows, q.rows(c, q.count - 1 - step), N, w);
    }
    q.store(c.d_initial, dstate, w);
}

// x *= 2^±log_p, + what is on the stage
template <typename T> __device__ inline void add_staged(Rows &x, int stage, const Warp &w) {
    Rows more;
    wait<0>();
    __syncwarp();
    get_rows<T>(more, stage, w);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) x[n][e] += more[n][e];
}

// x += Σ of pairs of tokens: masked (a · keys1ᵀ) · values1 + masked (a · keys2ᵀ) · values2
template <Mask mask1, Mask mask2>
__device__ inline void add_attention(
    Rows &x, const Operand &a, int keys1, int values1, int keys2, int values2, const Warp &w
) {
    constexpr bool later = mask1 == AFTER || mask1 == FROM;
#pragma unroll 1
    for (int i = later ? w.own : 0; i <= (later ? 3 : w.own); i++) {
        const Block first = pairs<mask1>(a, keys1, i, w), second = pairs<mask2>(a, keys2, i, w);
        add_product(x, first, values1, i, w);
        add_product(x, second, values2, i, w);
    }
}

// sums (own column pairs) += sign · the columns' sums of x times a tile's values
__device__ inline void add_column_sums(float (&sums)[8][2], const Rows &x, int tile, const Warp &w) {
    Rows factor;
    get_rows<Bf16>(factor, tile, w);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) sums[n][e] += x[n][e] * factor[n][e] + x[n][2 + e] * factor[n][2 + e];
}

// change += sign · x times a tile's values
__device__ inline void add_change(Rows &change, float sign, const Rows &x, int tile, const Warp &w) {
    Rows factor;
    get_rows<Bf16>(factor, tile, w);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) change[n][e] += sign * x[n][e] * factor[n][e];
}

// x · 2^(sign · log_p)
__device__ inline void scale(Rows &x, float sign, const Rows &log_p) {
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) x[n][e] *= exp2_of(sign * log_p[n][e]);
}

// A block has one chunk of one head. Z is the gradient of what goes through X.
template <typename T> __global__ void __launch_bounds__(THREADS, 2) gradients7(const Chunked7 c) {
    enum {
        X = 0, S = TILE, D = 2 * TILE, V = 3 * TILE, DY = 4 * TILE, QA = 5 * TILE, GB = 6 * TILE, GK = 7 * TILE,
        QR = 8 * TILE, U = 9 * TILE, Z = 10 * TILE, STAGE = X,
    };  // fmt
    float(*totals)[N] = (float(*)[N])(shared_memory() + GRADIENT_TILES * TILE), (*ends)[N] = totals + WARPS;
    const int chunk = blockIdx.x / c.heads, head = blockIdx.x % c.heads;
    const int start = c.start[chunk], length = c.length[chunk];
    if (length == 0) return;
    const Warp w((threadIdx.x / 32 + blockIdx.x) % WARPS);
    const Place tokens = c.tokens(start, head), tile = c.tile(chunk, start, head);
    fetch_rows(U, c.w, tokens, length, w);
    close_group();
    fetch_rows(QA, c.kk, tokens, length, w);
    fetch_rows(GB, c.iclr, tokens, length, w);
    fetch_rows(GK, c.k, tokens, length, w);
    fetch_rows(QR, c.r, tokens, length, w);
    close_group();
    fetch_rows(D, c.dstates, tile, N, w);
    fetch_rows(S, c.states, tile, N, w);
    fetch_rows(V, c.v, tokens, length, w);
    fetch_rows(DY, c.dy, tokens, length, w);
    fetch_rows(X, c.inverse, tile, N, w);
    close_group();

    Rows log_p, change, x, z;
    float dend[8][2];  // the gradient of the logarithm of the chunk's decay
    Operand a;
    wait<2>();
    __syncwarp();
    log_decays<T>(x, U, length, w, c.w_fp16);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) log_p[n][e] = x[n][e];
    sum_downwards(log_p, totals, w);
    __syncthreads();
    add_totals(log_p, totals, 0, w.own - 1, w);
    wait<1>();
    __syncwarp();
    factors<T>(log_p, x, QA, GB, GK, QR, w);
    wait<0>();
    __syncwarp();
    to_bf16<T>(V, w);
    to_bf16<T>(DY, w);
    get_rows<Bf16>(x, D, w);
    const float *end = c.end + ((long)chunk * c.heads + head) * N;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float2 decay = *(const float2 *)&end[w.column(n)];
        dend[n][0] = dend[n][1] = 0.0f;
#pragma unroll
        for (int e = 0; e < 4; e++) x[n][e] *= e % 2 ? decay.y : decay.x;
    }
    add_column_sums(dend, x, S, w);
    pack_rows<Bf16>(a, x);
    put_rows(D, a, w);
    __syncthreads();

    // U = X (q_a Sᵀ + A_ak v); Z = Xᵀ (A_rbᵀ dy + g_b Dᵀ)
    clear(x);
    get_rows(a, QA, w);
    add_pairs(x, a, S, w);
#pragma unroll 1
    for (int i = 0; i <= w.own; i++) add_product(x, pairs<BEFORE>(a, GK, i, w), V, i, w);
    clear(z);
    get_rows(a, GB, w);
    add_pairs(z, a, D, w);
#pragma unroll 1
    for (int i = w.own; i < 4; i++) add_product(z, pairs<FROM>(a, QR, i, w), DY, i, w);
    pack_rows<Bf16>(a, x);
    put_rows(U, a, w);
    pack_rows<Bf16>(a, z);
    put_rows(Z, a, w);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i <= w.own; i++) add_product(x, w.block(X, w.own, i), U, i, w);
#pragma unroll 1
    for (int i = w.own; i < 4; i++) {
        const Block b = w.turned(X, i, w.own);
        add_product(z, {{b.x[0], b.x[2], b.x[1], b.x[3]}}, Z, i, w);
    }
    __syncthreads();
    pack_rows<Bf16>(a, x);
    put_rows(U, a, w);
    pack_rows<Bf16>(a, z);
    put_rows(Z, a, w);
    __syncthreads();

    const auto stage = [&](const void *given) {  // what a gradient is to be added to
        if (c.add) fetch_rows(STAGE, given, tokens, length, w);
        close_group();
    };
    const auto store = [&](void *to, Rows &gradient) {
        if (c.add) add_staged<T>(gradient, STAGE, w);
        store_rows<T>(to, gradient, STAGE, tokens, length, w);
    };
    stage(c.dv);
    clear(x);
    get_rows(a, GK, w);
    add_pairs(x, a, D, w);
    add_attention<AFTER, FROM>(x, a, QA, Z, QR, DY, w);
    store(c.dv, x);

    // Of readers and writers. What a pair of tokens adds to `change`, the gradient of the logarithm of P, cancels outside
    // of the span between the two, as both have the same rounded factors.
    stage(c.dr);
    clear(x);
    get_rows(a, DY, w);
    add_product(x, a, S, w);
    add_attention<UP_TO, UP_TO>(x, a, U, GB, V, GK, w);
    clear(change);
    add_change(change, 1.0f, x, QR, w);
    scale(x, 1.0f, log_p);
    store(c.dr, x);

    stage(c.dk);
    clear(x);
    get_rows(a, V, w);
    add_product(x, a, D, w);
    add_column_sums(dend, x, GK, w);
    add_attention<AFTER, FROM>(x, a, Z, QA, DY, QR, w);
    add_change(change, -1.0f, x, GK, w);
    scale(x, -1.0f, log_p);
    store(c.dk, x);

    clear(z);
    get_rows(a, Z, w);
    add_product(z, a, S, w);
    add_attention<BEFORE, BEFORE>(z, a, U, GB, V, GK, w);
    add_change(change, 1.0f, z, QA, w);

    clear(x);
    get_rows(a, U, w);
    add_product(x, a, D, w);
    add_column_sums(dend, x, GB, w);
    add_attention<AFTER, FROM>(x, a, Z, QA, DY, QR, w);
    add_change(change, -1.0f, x, GB, w);
    scale(x, -1.0f, log_p);

    // dw: the sum of `change` from each token on, less what the token itself reads before it decays
    sum_upwards(change, totals, w);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) dend[n][e] += from_other(dend[n][e], lanes);
            if (w.g == 0) ends[w.own][w.column(n) + e] = dend[n][e];
        }
    __syncthreads();
    fetch_rows(U, c.w, tokens, length, w);
    fetch_rows(GB, c.iclr, tokens, length, w);
    fetch_rows(GK, c.kk, tokens, length, w);
    close_group();
    add_totals(change, totals, w.own + 1, 3, w);
    add_totals(change, ends, 0, 3, w);
    add_change(change, -1.0f, z, QA, w);
    wait<0>();
    __syncwarp();
    {
        Rows log_decay;
        log_decays<T>(log_decay, U, length, w, c.w_fp16);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                change[n][e] *= LN2 * log_decay[n][e];
                z[n][e] *= exp2_of(log_p[n][e] - log_decay[n][e]);
            }
    }
    store_rows<T>(c.dw, change, STAGE, tokens, length, w);
    Rows raw;
    get_rows<T>(raw, GB, w);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) z[n][e] = x[n][e] * raw[n][e] - z[n][e];
    store_rows<T>(c.dkk, z, STAGE, tokens, length, w);
    get_rows<T>(raw, GK, w);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) x[n][e] *= raw[n][e];
    store_rows<T>(c.diclr, x, STAGE, tokens, length, w);
}

enum Kernel { LOCAL = 1, SCAN = 2, SCAN_BACK = 4, GRADIENTS = 8 };

template <typename T> int run(const Chunked7 &c, int kernels, cudaStream_t stream) {
    const unsigned chunks = (unsigned)c.chunks * c.heads, scans = (unsigned)c.documents * c.heads * (4 / c.parts);
    const int threads = 32 * c.parts, shared = STAGES * (SHARED_PART + c.parts * WARP_PART);
    int error = cudaSuccess;
    if (kernels & LOCAL) error = launch(local7<T>, c, chunks, THREADS, LOCAL_BYTES, stream);
    if (kernels & SCAN && !error) error = launch(scan7<T>, c, scans, threads, shared, stream);
    if (kernels & SCAN_BACK && !error) error = launch(scan_back7<T>, c, scans, threads, shared, stream);
    if (kernels & GRADIENTS && !error) error = launch(gradients7<T>, c, chunks, THREADS, GRADIENT_BYTES, stream);
    return error;
}

}  // namespace

extern "C" int chunked7_size() { return sizeof(Chunked7); }

// Launches those of the kernels that are asked for, by bits of `Kernel`; returns a cudaError_t.
extern "C" int chunked7(const Chunked7 *call, int kernels, cudaStream_t stream) {
    return call->fp16 ? run<Fp16>(*call, kernels, stream) : run<Bf16>(*call, kernels, stream);
}

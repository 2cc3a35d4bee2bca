// RWKV-7's forward kernels; chunked7.cuh tells what they compute.
#include "chunked7.cuh"

namespace {

constexpr int LOCAL_TILES = 6, LOCAL_BYTES = LOCAL_TILES * TILE + (4 * N + WARPS * 16 * 20) * (int)sizeof(float);

// --- the inverse of I - A, A = A_ab strictly lower triangular: blocks of 16 tokens

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
            put_block(tile, j, pack_block<Fp16>(left, right), w);
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

// The warp's rows of X less the identity, in fp16, from what all warps have put to the tile: of X (I - A) = I.
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
        const Block sum = pack_block<Fp16>(left, right);
        const Block b = w.turned(tile, j, j);
#pragma unroll
        for (int e = 0; e < 4; e++) left[e] = right[e] = 0.0f;
        multiply<Fp16>(left, sum, b.x[0], b.x[1]);
        multiply<Fp16>(right, sum, b.x[2], b.x[3]);
        x[j] = pack_block<Fp16>(left, right);
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (j == w.own)
#pragma unroll
            for (int p = 0; p < 4; p += 3) {
                const float2 pair = unpack<Fp16>(x[j].x[p]);
                x[j].x[p] = pack<Fp16>(w.g == 2 * w.t ? 0.0f : pair.x, w.g == 2 * w.t + 1 ? 0.0f : pair.y);
            }
}

// --- the kernels

// A block has one chunk of one head.
template <typename T> __global__ void __launch_bounds__(THREADS, 4) local7(const Chunked7 c) {
    // M: w, then A with the inverse on its diagonal, then the stage
    enum { M = 0, QA = TILE, GB = 2 * TILE, GK = 3 * TILE, V = 4 * TILE, QR = 5 * TILE, PAIRS = QR, W = QA, U = QR };
    static_assert(LOCAL_TILES * TILE == QR + TILE, "");
    float(*totals)[N] = (float(*)[N])(shared_memory() + LOCAL_TILES * TILE);
    float(*scratch)[20] = (float(*)[20])(totals[4]) + threadIdx.x / 32 * 16;
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
            c.end[((long)chunk * c.heads + head) * N + i] =
                exp2_of(totals[0][i] + totals[1][i] + totals[2][i] + totals[3][i]);
        }
        wait<0>();
        __syncwarp();
        factors<T>(log_p, log_decay, QA, GB, GK, QR, w);
        to_bf16<T>(V, w);
    }
    __syncthreads();

    Rows x, u;
    Operand a;
    Operand reads;
    get_rows(a, QA, w);
    get_rows(reads, QR, w);
    __syncwarp();
    clear(x);
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i <= w.own) {
            add_pairs(x[2 * i], x[2 * i + 1], a, GB, i, w);
            put_block(PAIRS, i, pairs<BEFORE, Fp16>(a, GK, i, w), w);
        }
    put_inverse(M, x, scratch, w);
    __syncthreads();

    // U is what X makes of it all where the state is 0
    Operand inverse;
    inverse_rows(inverse, M, w);
    clear(u);
    add_solved<false>(u, inverse, PAIRS, V, w);
    pack_rows<Bf16>(a, u);
    get_rows<Bf16>(x, QA, w);
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i <= w.own) add_product(x, as_bf16<Fp16>(inverse[i]), QA, i, w);
    __syncthreads();
    put_rows(U, a, w);
    pack_rows<Bf16>(a, x);
    put_rows(W, a, w);
    if (c.keep) store_rows(c.inverse, inverse, M, tile, N, w, 2 * w.own + 2);
    __syncthreads();

    clear(x), clear(u);
#pragma unroll
    for (int i = 0; i < 4; i++) {  // Wᵀ g_b; Uᵀ g_b + vᵀ g_k
        add_products(x, u, transposed(W, i, w), transposed(U, i, w), GB, i, w);
        add_product(u, transposed(V, i, w), GK, i, w);
    }
    store_rows<Bf16>(c.transfer, x, M, tile, N, w);
    store_rows<Bf16>(c.states, u, M, tile, N, w);

#pragma unroll
    for (int j = 0; j < 4; j++) unpack_block<Bf16>(x, j, reads[j]);
    clear(u);
#pragma unroll 1
    for (int i = 0; i <= w.own; i++) {
        Block first, second;
        pairs<UP_TO, UP_TO>(first, second, reads, GB, GK, i, w);
        add_product(x, first, W, i, w);
        add_product(u, first, U, i, w);
        add_product(u, second, V, i, w);
    }
    store_rows<Bf16>(c.reader, x, M, tile, N, w);
    store_rows<T>(c.y, u, M, tokens, length, w);
}

template <typename T> __global__ void __launch_bounds__(THREADS, 2) scan7(const Chunked7 c) {
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
        const Stage s(chunk, q.warps, q.warp);
        const Address strip = base + s.strip;
        Operand before;
        pack_rows<Bf16>(before, state);
        Rows injected;
        get_rows<Bf16>(injected, s.rows, w);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) state[n][e] += injected[n][e];
        add_product(state, before, s.transfer, w);
        float y[4][2][4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            unpack_block<T>(y[i][0], y[i][1], load_block(strip + strip_piece(i * 16 + w.lane % 16, w.lane / 16)));
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {  // own + reader Sᵀ: the left factor of one product is the right one of another
                const Block reader = w.block(s.reader, i, j);
                multiply<Bf16>(y[i][0], reader, before[j].x[0], before[j].x[2]);
                multiply<Bf16>(y[i][1], reader, before[j].x[1], before[j].x[3]);
            }
        fetch(chunk + STAGES - 1);
        decay(state, s, w);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Block packed = pack_block<T>(y[i][0], y[i][1]);
#pragma unroll
            for (int p = 0; p < 4; p++)
                put32(strip + strip_piece(i * 16 + p % 2 * 8 + w.g, p / 2) + w.t * 4, packed.x[p]);
        }
        if (c.keep) store_rows(c.states, before, s.rows, q.rows(c, chunk), N, w);
        __syncwarp();
        const Place out = q.tokens(c, chunk);
        const int tokens = q.length(chunk);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = i * 16 + w.lane / 2;
            const uint4 piece = get128(strip + strip_piece(row, w.lane % 2));
            if (row < tokens) store128((unsigned short *)c.y + out.at + row * out.stride + w.lane % 2 * 8, piece);
        }
    }
    q.store(c.final_state, state, w);
}

template <typename T> int run(const Chunked7 &c, int kernels, cudaStream_t stream) {
    const Grid g(c);
    int error = cudaSuccess;
    if (kernels & LOCAL) error = launch<local7<T>>(c, g.chunks, THREADS, LOCAL_BYTES, LOCAL_BYTES, stream);
    if (kernels & SCAN && !error)
        error = launch<scan7<T>>(c, g.scans, g.threads, g.shared, SCAN_BYTES, stream);
    return error;
}

}  // namespace

extern "C" int chunked7_size() { return sizeof(Chunked7); }

// Launches those of the kernels that are asked for, by bits of `Kernel`; returns a cudaError_t.
extern "C" int chunked7_forward(const Chunked7 *call, int kernels, cudaStream_t stream) {
    return call->fp16 ? run<Fp16>(*call, kernels, stream) : run<Bf16>(*call, kernels, stream);
}

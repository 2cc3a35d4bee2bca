// RWKV-7's backward kernels; chunked7.cuh tells what they compute.
#include "chunked7.cuh"

namespace {

constexpr int GRADIENT_TILES = 13, GRADIENT_BYTES = GRADIENT_TILES * TILE + 2 * WARPS * N * (int)sizeof(float);

template <typename T> __global__ void __launch_bounds__(THREADS, 2) scan_back7(const Chunked7 c) {
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
        const Stage s(step, q.warps, q.warp);
        Operand after;
        decay(dstate, s, w);
        pack_rows<Bf16>(after, dstate);
        add_pairs(dstate, after, s.transfer, w);
#pragma unroll
        for (int i = 0; i < 4; i++) {  // dyᵀ reader
            const Block dy = load_turned(base + s.strip + strip_piece(i * 16 + w.lane % 16, w.lane / 16));
            add_product(dstate, {{as_bf16<T>(dy.x[0]), as_bf16<T>(dy.x[2]), as_bf16<T>(dy.x[1]), as_bf16<T>(dy.x[3])}},
                        s.reader, i, w);
        }
        fetch(step + STAGES - 1);
        store_rows(c.dstates, after, s.rows, q.rows(c, q.count - 1 - step), N, w);
    }
    q.store(c.d_initial, dstate, w);
}

// x += what is on the stage
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
        Block first, second;
        pairs<mask1, mask2>(first, second, a, keys1, keys2, i, w);
        add_product(x, first, values1, i, w);
        add_product(x, second, values2, i, w);
    }
}

// x += a · tile, z += b · tile
__device__ inline void
add_products(Rows &x, Rows &z, const Operand &a, const Operand &b, int tile, const Warp &w) {
#pragma unroll
    for (int i = 0; i < 4; i++) add_products(x, z, a[i], b[i], tile, i, w);
}

// x += masked (a · keysᵀ) · values, z += masked (b · keysᵀ) · values, for the keys and values of block row i
template <Mask mask_a, Mask mask_b>
__device__ inline void add_attention(
    Rows &x, Rows &z, const Operand &a, const Operand &b, int keys, int values, int i, const Warp &w
) {
    float p[4][4] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const Block key = w.block(keys, i, j);
        multiply<Bf16>(p[0], a[j], key.x[0], key.x[2]);
        multiply<Bf16>(p[1], a[j], key.x[1], key.x[3]);
        multiply<Bf16>(p[2], b[j], key.x[0], key.x[2]);
        multiply<Bf16>(p[3], b[j], key.x[1], key.x[3]);
    }
    if (i == w.own) apply<mask_a>(p[0], p[1], w), apply<mask_b>(p[2], p[3], w);
    add_products(x, z, pack_block<Bf16>(p[0], p[1]), pack_block<Bf16>(p[2], p[3]), values, i, w);
}

// sums, of the lane's own columns, += the sums over its rows of x times a tile's values
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

// What a lane has of x, in float32, to and from the warp's rows of two tiles.
__device__ inline void put_aside(int tile, const Rows &x, const Warp &w) {
#pragma unroll
    for (int n = 0; n < 8; n++)
        *((float4 *)(shared_memory() + tile + n / 4 * TILE + w.own * 2048 + n % 4 * 512) + w.lane) =
            {x[n][0], x[n][1], x[n][2], x[n][3]};
}
__device__ inline void get_aside(Rows &x, int tile, const Warp &w) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float4 four =
            *((const float4 *)(shared_memory() + tile + n / 4 * TILE + w.own * 2048 + n % 4 * 512) + w.lane);
        x[n][0] = four.x, x[n][1] = four.y, x[n][2] = four.z, x[n][3] = four.w;
    }
}

// A block has one chunk of one head. Z is the gradient of what goes through X.
template <typename T> __global__ void __launch_bounds__(THREADS, 2) gradients7(const Chunked7 c) {
    enum {
        X = 0, S = TILE, D = 2 * TILE, V = 3 * TILE, DY = 4 * TILE, QA = 5 * TILE, GB = 6 * TILE, GK = 7 * TILE,
        QR = 8 * TILE, U = 9 * TILE, Z = 10 * TILE, AK = 11 * TILE, RB = 12 * TILE, STAGE = X, LOG_P = AK,
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
    fetch_rows(S, c.states, tile, N, w);
    fetch_rows(V, c.v, tokens, length, w);
    fetch_rows(DY, c.dy, tokens, length, w);
    fetch_rows(X, c.inverse, tile, N, w, 2 * w.own + 2);  // what is right of the diagonal is 0
    close_group();

    Rows log_p, change, x, z;
    float dend[8][2];  // the gradient of the logarithm of the chunk's decay
    Operand a, b;
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
    fetch_rows(D, c.dstates, tile, N, w);
    close_group();
    wait<2>();
    __syncwarp();
    factors<T>(log_p, x, QA, GB, GK, QR, w);
    wait<0>();
    __syncwarp();
    to_bf16<T>(V, w);
    to_bf16<T>(DY, w);
    get_rows<Bf16>(x, D, w);
#pragma unroll
    for (int n = 0; n < 8; n++) dend[n][0] = dend[n][1] = 0.0f;
    add_column_sums(dend, x, S, w);
    __syncthreads();

    // U = X (q_a Sᵀ + A_ak v); Z = Xᵀ (g_b Dᵀ + A_rbᵀ dy)
    clear(x);
    get_rows(a, QA, w);
    add_pairs(x, a, S, w);
#pragma unroll 1
    for (int i = 0; i <= w.own; i++) put_block(AK, i, pairs<BEFORE, Fp16>(a, GK, i, w), w);
    clear(z);
    get_rows(a, GB, w);
    add_pairs(z, a, D, w);
#pragma unroll 1
    for (int i = w.own; i < 4; i++) put_block(RB, i, pairs<FROM, Fp16>(a, QR, i, w), w);
    pack_rows<Bf16>(a, x);
    put_rows(U, a, w);
    pack_rows<Bf16>(a, z);
    put_rows(Z, a, w);
    __syncthreads();
    get_rows(a, X, w);
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i <= w.own) add_product(x, as_bf16<Fp16>(a[i]), U, i, w);
    add_solved<false>(x, a, AK, V, w);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        a[i] = transposed(X, i, w);
        if (i >= w.own) add_product(z, as_bf16<Fp16>(a[i]), Z, i, w);
    }
    add_solved<true>(z, a, RB, DY, w);
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
    put_aside(LOG_P, log_p, w);
    stage(c.dv);
    clear(x);
    get_rows(a, GK, w);
    add_pairs(x, a, D, w);
    add_attention<AFTER, FROM>(x, a, QA, Z, QR, DY, w);
    store(c.dv, x);

    // Of readers and writers, two at once as they have the same right factors. What a pair of tokens adds to `change`, the
    // gradient of the logarithm of P, cancels outside of the span between the two: both have the same rounded factors.
    stage(c.dr);
    clear(x), clear(z), clear(change);
    get_rows(a, DY, w), get_rows(b, Z, w);
    add_products(x, z, a, b, S, w);
#pragma unroll 1
    for (int i = 0; i <= w.own; i++) {
        add_attention<UP_TO, BEFORE>(x, z, a, b, U, GB, i, w);
        add_attention<UP_TO, BEFORE>(x, z, a, b, V, GK, i, w);
    }
    add_change(change, 1.0f, x, QR, w);
    add_change(change, 1.0f, z, QA, w);
    get_aside(log_p, LOG_P, w);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) x[n][e] *= exp2_of(log_p[n][e]);
    store(c.dr, x);

    stage(c.dk);
    Rows u;
    clear(x), clear(u);
    get_rows(a, V, w), get_rows(b, U, w);
    add_products(x, u, a, b, D, w);
    add_column_sums(dend, x, GK, w);
    add_column_sums(dend, u, GB, w);
#pragma unroll 1
    for (int i = w.own; i < 4; i++) {
        add_attention<AFTER, AFTER>(x, u, a, b, Z, QA, i, w);
        add_attention<FROM, FROM>(x, u, a, b, DY, QR, i, w);
    }
    add_change(change, -1.0f, x, GK, w);
    add_change(change, -1.0f, u, GB, w);
    get_aside(log_p, LOG_P, w);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float over = exp2_of(-log_p[n][e]);
            x[n][e] *= over, u[n][e] *= over;
        }
    store(c.dk, x);

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
        get_aside(log_p, LOG_P, w);
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
        for (int e = 0; e < 4; e++) z[n][e] = u[n][e] * raw[n][e] - z[n][e];
    store_rows<T>(c.dkk, z, STAGE, tokens, length, w);
    get_rows<T>(raw, GK, w);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) u[n][e] *= raw[n][e];
    store_rows<T>(c.diclr, u, STAGE, tokens, length, w);
}

template <typename T> int run(const Chunked7 &c, int kernels, cudaStream_t stream) {
    const Grid g(c);
    int error = cudaSuccess;
    if (kernels & SCAN_BACK) error = launch<scan_back7<T>>(c, g.scans, g.threads, g.shared, SCAN_BYTES, stream);
    if (kernels & GRADIENTS && !error)
        error = launch<gradients7<T>>(c, g.chunks, THREADS, GRADIENT_BYTES, GRADIENT_BYTES, stream);
    return error;
}

}  // namespace

// Launches those of the kernels that are asked for, by bits of `Kernel`; returns a cudaError_t.
extern "C" int chunked7_backward(const Chunked7 *call, int kernels, cudaStream_t stream) {
    return call->fp16 ? run<Fp16>(*call, kernels, stream) : run<Bf16>(*call, kernels, stream);
}

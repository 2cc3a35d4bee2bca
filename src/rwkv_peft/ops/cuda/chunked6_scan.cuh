// From chunk to chunk: the state, or backward its gradient. A warp has 16 keys and all values: neither needs another.
#pragma once
#include "chunked6.cuh"

namespace {

constexpr int STAGES = 3;  // chunks that a scan has in shared memory
constexpr int SCAN_BYTES = STAGES * (TILE + WARPS * (2048 + 4096));  // at most

// Bytes that a warp has of a stage: strips of 16 columns of k or r, and of w.
__host__ __device__ inline int strip_bytes(const Chunked6 &c) {
    return 2048 + (c.one_decay ? 0 : c.w_dtype ? 2048 : 4096);
}
// Of 8 values in row `row` of a strip whose rows are 32 bytes, and of 4 where they are 64.
__device__ inline int strip_piece(int row, int half) { return row * 32 + ((half ^ row / 4 % 2) << 4); }
__device__ inline int wide_piece(int row, int piece) {
    return row / 2 * 128 + ((row % 2 * 4 + piece ^ row / 2 % 4 * 2) << 4);
}
// In a scan tokens stand in such an order that a lane has 16 that follow one another: those from 16 t on.
__device__ inline int token_of(int row) { return row % 8 / 2 * 16 + row / 16 * 4 + row / 8 % 2 * 2 + row % 2; }

// The decays of keys g and g + 8 over the lane's tokens, from its strip; RWKV-5: from w itself, `key` on.
__device__ inline void
lane_decays(float (&x)[2][16], const Chunked6 &c, int strip, int key, int length, const Warp &w) {
    const char *from = shared_memory() + strip;
    const auto each = [&](auto value) {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < 16; i++) x[half][i] = value(i / 4 * 16 + i / 2 % 2 * 8 + 2 * w.t + i % 2, half);
    };
    const auto bits = [&](int row, int half) {
        return (unsigned)*(const unsigned short *)(from + strip_piece(row, half) + w.g * 2);
    };
    if (c.one_decay)
        each([&](int, int half) { return ((const float *)c.w)[key + w.g + 8 * half]; });
    else if (c.w_dtype == 0)
        each([&](int row, int half) {
            return *(const float *)(from + wide_piece(row, w.g / 4 + 2 * half) + w.g % 4 * 4);
        });
    else if (c.w_dtype == 1)
        each([&](int row, int half) { return unpack<Bf16>(bits(row, half)).x; });
    else
        each([&](int row, int half) { return unpack<Fp16>(bits(row, half)).x; });
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 16; i++) x[half][i] = w.t * 16 + i < length ? exp2_of(-rate_of(x[half][i])) : 1.0f;
}

// decays become their products from each token to the chunk's end, or `back` from its start to each, without the
// token; returns the product of all.
template <bool back> __device__ inline float run_through(float (&decays)[16], const Warp &w) {
    float own = 1.0f;
#pragma unroll
    for (int i = 0; i < 16; i++) own *= decays[i];
    const float near = from_other(own, 1), far = from_other(own * near, 2);
    float run = ((w.t % 2 == 1) == back ? near : 1.0f) * ((w.t >= 2) == back ? far : 1.0f);
#pragma unroll
    for (int step = 0; step < 16; step++) {
        const int i = back ? step : 15 - step;
        const float next = run * decays[i];
        decays[i] = run, run = next;
    }
    return own * near * far;
}

// A scan's block has a document, a head and 16 keys for each of its warps: that many rows of the transposed state.
template <typename T, bool back> __global__ void __launch_bounds__(THREADS) scan6(const Chunked6 c) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, blocks = 4 / warps;
    const int key = (blockIdx.x % blocks * warps + warp) * 16;
    const int head = blockIdx.x / blocks % c.heads, document = blockIdx.x / blocks / c.heads;
    const int first = c.first[document], count = c.counts[document];
    const int begin = count ? c.start[first] : 0, in_last = count ? c.length[first + count - 1] : 0;
    const void *values = back ? c.dy : c.v, *keys = back ? c.r : c.k;
    void *kept = back ? c.dstates : c.states;
    const Warp w(warp);
    const Address base = shared_address(shared_memory());
    const int strips = strip_bytes(c), stage_bytes = TILE + warps * strips;
    const auto chunk_of = [&](int step) { return back ? count - 1 - step : step; };
    const auto length_of = [&](int chunk) { return chunk == count - 1 ? in_last : N; };
    const auto fetch = [&](int step) {
        if (step < count) {
            const int chunk = chunk_of(step), length = length_of(chunk), stage = step % STAGES * stage_bytes;
            const int keys_strip = stage + TILE + warp * strips, w_strip = keys_strip + 2048;
            const Place tokens = c.tokens(begin + chunk * N, head);
            for (int row = threadIdx.x / 8; row < N; row += blockDim.x / 8) {
                const int i = threadIdx.x % 8, token = token_of(row);
                const long from = tokens.at + (token < length ? token : 0) * tokens.stride + i * 8;
                copy16(base + stage + row * 128 + ((i ^ row % 8) << 4), (const unsigned short *)values + from,
                       token < length);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = i * 16 + w.lane / 2, token = token_of(row), half = w.lane % 2;
                const long from = tokens.at + (token < length ? token : 0) * tokens.stride + key + half * 8;
                copy16(base + keys_strip + strip_piece(row, half), (const unsigned short *)keys + from, token < length);
                if (!c.one_decay && c.w_dtype)
                    copy16(base + w_strip + strip_piece(row, half), (const unsigned short *)c.w + from, token < length);
            }
            if (!c.one_decay && !c.w_dtype)
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int row = i * 8 + w.lane / 4, token = token_of(row), piece = w.lane % 4;
                    const long from = tokens.at + (token < length ? token : 0) * tokens.stride + key + piece * 4;
                    copy16(base + w_strip + wide_piece(row, piece), (const float *)c.w + from, token < length);
                }
        }
        close_group();
    };
    const float *initial = back ? c.d_final : c.initial;
    const long home = ((long)document * c.heads + head) * N * N + key;
    Rows state;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            state[n][e] = initial ? initial[home + (w.column(n) + e % 2) * N + w.g + e / 2 * 8] : 0.0f;
    for (int step = 0; step < STAGES - 1; step++) fetch(step);
    for (int step = 0; step < count; step++) {
        wait<STAGES - 2>();
        __syncthreads();
        fetch(step + STAGES - 1);
        const int chunk = chunk_of(step), length = length_of(chunk), stage = step % STAGES * stage_bytes;
        const int keys_strip = stage + TILE + warp * strips;
        Operand found;
        pack_rows<Bf16>(found, state);
        float decays[2][16];
        lane_decays(decays, c, keys_strip + 2048, c.one_decay ? head * N + key : 0, length, w);
        const float total[2] = {run_through<back>(decays[0], w), run_through<back>(decays[1], w)};
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) state[n][e] *= total[e / 2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Block z = load_turned(base + keys_strip + strip_piece(i * 16 + w.lane % 16, w.lane / 16));
            Block a;
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const float2 pair = unpack<T>(z.x[p % 2 * 2 + p / 2]);
                const float *decay = &decays[p % 2][4 * i + p / 2 * 2];
                a.x[p] = pack<Bf16>(pair.x * decay[0], pair.y * decay[1]);
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const Block b = w.turned(stage, i, j);
                multiply<Bf16>(state[2 * j], a, as_bf16<T>(b.x[0]), as_bf16<T>(b.x[1]));
                multiply<Bf16>(state[2 * j + 1], a, as_bf16<T>(b.x[2]), as_bf16<T>(b.x[3]));
            }
        }
        const Place tile = c.tile(first + chunk, begin + chunk * N, head);
        const Place rows = {tile.at + (key - warp * 16) * tile.stride, tile.stride};  // the warp's first is its `own`
        __syncwarp();
        put_rows(keys_strip - warp * 2048, found, w);
        send_rows(kept, keys_strip - warp * 2048, rows, N, w);
    }
    float *last = back ? c.d_initial : c.final_state;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) last[home + (w.column(n) + e % 2) * N + w.g + e / 2 * 8] = state[n][e];
}

template <typename T, bool back> int run_scan(const Chunked6 &c, cudaStream_t stream) {
    const unsigned blocks = (unsigned)c.documents * c.heads * (4 / c.parts);
    const int shared = STAGES * (TILE + c.parts * strip_bytes(c));
    return launch<scan6<T, back>>(c, blocks, 32 * c.parts, shared, SCAN_BYTES, stream);
}

}  // namespace

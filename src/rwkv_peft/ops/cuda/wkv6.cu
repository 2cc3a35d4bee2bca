// RWKV-6: y = (S + v (u·k)ᵀ) r; S = S·diag(decay) + v kᵀ. RWKV-5: the same with one decay for all tokens (`one_decay`).
// See `reference.wkv6` for the definition, common.cuh for how a block holds its rows of S.
//
// The forward keeps S at the start of every segment of 32 tokens. The backward goes through the segments from the last
// to the first: it runs each forward again, keeping S before every fourth token, then takes four tokens at a time, their
// states in registers, and carries G, the gradient of S, back through them. No decay is ever divided by, as it may be 0.
#include "common.cuh"

namespace {

// Where w of the document's token `t` lies.
template <int N> __device__ long at_w(const Call &c, const Place<N> &place, int t, int j) {
    return c.one_decay ? place.head * N + j : place.at(c, t, j);
}

// Tokens from t0 on as the recurrence uses them; past the document's end, tokens that change nothing.
template <int N> struct Stage {
    static constexpr int TOKENS = STAGED / N;
    float r[TOKENS][N], d[TOKENS][N], k[TOKENS][N], v[TOKENS][N];

    __device__ void load(const Call &c, const Place<N> &place, int t0) {
        for (int i = threadIdx.x; i < STAGED / 4; i += blockDim.x) {
            const int t = i / (N / 4), j = i % (N / 4) * 4;
            float4 r_ = {}, d_ = {1, 1, 1, 1}, k_ = {}, v_ = {};
            if (t0 + t < place.count) {
                const long at = place.at(c, t0 + t, j);
                r_ = load4(c.r, at), d_ = decay(load4(c.w, at_w(c, place, t0 + t, j)));
                k_ = load4(c.k, at), v_ = load4(c.v, at);
            }
            put(&r[t][j], r_), put(&d[t][j], d_), put(&k[t][j], k_), put(&v[t][j], v_);
        }
    }
};

// Σ_j u_j k_j r_j over the thread's columns
__device__ float bonus(const Row &u, const Row &k, const Row &r) {
    return u[0] * k[0] * r[0] + u[1] * k[1] * r[1] + u[2] * k[2] * r[2] + u[3] * k[3] * r[3];
}

template <int N> __global__ void __launch_bounds__(256) forward6(const Call c) {
    __shared__ Stage<N> stage;
    __shared__ float y[Stage<N>::TOKENS][N];
    const Place<N> place(c);
    const int column = place.lane * TILE;
    Tile S;
    Row u;
    load_state(S, c.initial, place, c);
    get(u, c.u + place.head * N + column);
    for (int t0 = 0; t0 < place.count; t0 += Stage<N>::TOKENS) {
        if (c.kept && t0 % SEGMENT == 0) keep_state(S, t0 / SEGMENT, place, c);
        stage.load(c, place, t0);
        __syncthreads();
        const int tokens = min(Stage<N>::TOKENS, place.count - t0);
#pragma unroll 2
        for (int t = 0; t < tokens; t++) {
            Row r, d, k, v, out;
            get(d, &stage.d[t][column]), get(k, &stage.k[t][column]), get(r, &stage.r[t][column]);
            get(v, &stage.v[t][place.row]);
            times_columns(out, S, r);
            const float extra = bonus(u, k, r);
#pragma unroll
            for (int i = 0; i < TILE; i++) out[i] += v[i] * extra;
            update(S, d, v, k);
            const float y_of_row = sum_rows<N>(out, place.lane);
            if (place.lane < TILE) y[t][place.row + place.lane] = y_of_row;
        }
        __syncthreads();
        store_rows<N>(c.y, y, t0, place, c);
    }
    store_state(c.final_state, S, place, c);
}

enum Kind { DR, DK, DD, KINDS };  // the gradients that are sums over rows

// What the backward has in shared memory, before its `RowSums`.
template <int N> struct alignas(16) Shared {
    Stage<N> stage;
    float dy[Stage<N>::TOKENS][N], dv[GROUP][N], dy_v[GROUP];  // dy_v: Σ_i dy_i v_i over the block's rows

    __device__ void load(const Call &c, const Place<N> &place, int t0) {
        stage.load(c, place, t0);
        for (int i = threadIdx.x; i < STAGED / 4; i += blockDim.x) {
            const int t = i / (N / 4), j = i % (N / 4) * 4;
            put(&dy[t][j], t0 + t < place.count ? load4(c.dy, place.at(c, t0 + t, j)) : float4{});
        }
    }
    __device__ void multiply_dy_v(const Call &c, const Place<N> &place, int first) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
        for (int m = warp; m < GROUP; m += warps) {
            float sum = 0.0f;
            for (int i = place.row0 + lane; i < place.row0 + N / c.parts; i += 32)
                sum += dy[first + m][i] * stage.v[first + m][i];
#pragma unroll
            for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
            if (lane == 0) dy_v[m] = sum;
        }
    }
    static int bytes(int rows) { return sizeof(Shared<N>) + RowSums<N, KINDS>::bytes(rows); }
};

// What a thread adds up over the tokens that it finishes, all of column threadIdx.x % N.
struct OverTokens {
    float du = 0.0f, dw = 0.0f;
};

// Writes the gradients of the tokens t0 to t0 + 3, which are the staged ones from `staged` on.
template <int N>
__device__ void finish(
    OverTokens &over, const Shared<N> &s, const RowSums<N, KINDS> &sums, const Call &c, const Place<N> &place, float u,
    int t0, int staged
) {
    const long plane = place.part * (long)(c.offsets ? 1 : c.documents) * c.tokens * c.heads * N;
    for (int i = threadIdx.x; i < GROUP * N; i += blockDim.x) {
        const int m = i / N, j = i % N;
        if (t0 + m >= place.count) break;
        const long at = place.at(c, t0 + m, j);
        const float r = s.stage.r[staged + m][j], k = s.stage.k[staged + m][j], dy_v = s.dy_v[m];
        const float dw = -sums.total(m, DD, j) * s.stage.d[staged + m][j] * rate(load(c.w, at_w(c, place, t0 + m, j)));
        over.du += k * r * dy_v;
        over.dw += dw;
        store(c.dr, plane + at, sums.total(m, DR, j) + u * k * dy_v);
        store(c.dk, plane + at, sums.total(m, DK, j) + u * r * dy_v);
        if (!c.one_decay) store(c.dw, plane + at, dw);
        if (place.row0 <= j && j < place.row0 + N / c.parts) store(c.dv, at, s.dv[m][j]);
    }
}

// Adds up `x` over the threads of a column and writes it to `to` (parts,S,H,N).
template <int N> __device__ void store_sum(float *to, float x, Shared<N> &s, const Call &c, const Place<N> &place) {
    float *all = s.stage.r[0];  // STAGED values, more than a block has threads
    __syncthreads();
    all[threadIdx.x] = x;
    __syncthreads();
    if (threadIdx.x >= N) return;
    for (int i = threadIdx.x + N; i < blockDim.x; i += N) x += all[i];
    to[((place.part * (long)c.documents + place.document) * c.heads + place.head) * N + threadIdx.x] = x;
}

template <int N>
__global__ void __launch_bounds__(N == 64 ? 256 : 512, N == 64 ? 2 : 1) backward6(const Call c) {
    constexpr int TOKENS = Stage<N>::TOKENS, GROUPS = TOKENS / GROUP;
    extern __shared__ __align__(16) char memory[];
    Shared<N> &s = *(Shared<N> *)memory;
    const RowSums<N, KINDS> sums(memory + sizeof(Shared<N>));
    const Place<N> place(c);
    const int column = place.lane * TILE;
    Tile G, before[SEGMENT / GROUP];  // before: S before every fourth token of the segment
    Row u;
    OverTokens over;
    load_state(G, c.d_final, place, c);
    get(u, c.u + place.head * N + column);
    const float u_of_column = c.u[place.head * N + threadIdx.x % N];

    for (int segment = (place.count - 1) / SEGMENT; segment >= 0 && place.count > 0; segment--) {
        const int start = segment * SEGMENT, stages = (min(SEGMENT, place.count - start) + TOKENS - 1) / TOKENS;
        Tile S;
        kept_state(S, segment, place, c);
        for (int stage = 0; stage < stages; stage++) {
            __syncthreads();
            s.load(c, place, start + stage * TOKENS);
            __syncthreads();
#pragma unroll 1
            for (int group = 0; group < GROUPS; group++) {
                copy(before[stage * GROUPS + group], S);
#pragma unroll
                for (int m = 0; m < GROUP; m++) {
                    const int t = group * GROUP + m;
                    Row d, k, v;
                    get(d, &s.stage.d[t][column]), get(k, &s.stage.k[t][column]), get(v, &s.stage.v[t][place.row]);
                    update(S, d, v, k);
                }
            }
        }
        for (int stage = stages - 1; stage >= 0; stage--) {
            if (stage < stages - 1) {
                __syncthreads();
                s.load(c, place, start + stage * TOKENS);
                __syncthreads();
            }
#pragma unroll 1
            for (int group = GROUPS - 1; group >= 0; group--) {
                Tile states[GROUP];  // before each token of the group
                copy(S, before[stage * GROUPS + group]);
                s.multiply_dy_v(c, place, group * GROUP);
#pragma unroll
                for (int m = 0; m < GROUP; m++) {
                    const int t = group * GROUP + m;
                    Row d, k, v, dy, sum;
                    copy(states[m], S);
                    get(d, &s.stage.d[t][column]), get(k, &s.stage.k[t][column]), get(v, &s.stage.v[t][place.row]);
                    get(dy, &s.dy[t][place.row]);
                    times_rows(sum, S, dy);
                    sums.put(m, DR, sum, place.lane);
                    if (m < GROUP - 1) update(S, d, v, k);
                }
#pragma unroll
                for (int m = GROUP - 1; m >= 0; m--) {
                    const int t = group * GROUP + m;
                    Row r, k, d, v, dy, sum;
                    get(r, &s.stage.r[t][column]), get(k, &s.stage.k[t][column]), get(d, &s.stage.d[t][column]);
                    get(v, &s.stage.v[t][place.row]), get(dy, &s.dy[t][place.row]);
                    times_columns(sum, G, k);
                    const float extra = bonus(u, k, r);
#pragma unroll
                    for (int i = 0; i < TILE; i++) sum[i] += dy[i] * extra;
                    const float dv = sum_rows<N>(sum, place.lane);
                    if (place.lane < TILE) s.dv[m][place.row + place.lane] = dv;
                    times_rows(sum, G, v);
                    sums.put(m, DK, sum, place.lane);
                    times_state(sum, G, states[m]);
                    sums.put(m, DD, sum, place.lane);
                    update(G, d, dy, r);
                }
                __syncthreads();
                finish(over, s, sums, c, place, u_of_column, start + stage * TOKENS + group * GROUP, group * GROUP);
                __syncthreads();
            }
        }
    }
    if (c.d_initial) store_state(c.d_initial, G, place, c);
    store_sum(c.du, over.du, s, c, place);
    if (c.one_decay) store_sum((float *)c.dw.data, over.dw, s, c, place);
}

}  // namespace

// `call->parts` is set; N is 64 or 128. All return a cudaError_t.
extern "C" int wkv6_forward(Call *call, int N, cudaStream_t stream) {
    call->parts = forward_parts(*call, N);
    return N == 64 ? launch(forward6<64>, *call, N, 0, stream) : launch(forward6<128>, *call, N, 0, stream);
}

// A block has at least as many threads as columns, so that each thread finishes only one column.
extern "C" int wkv6_backward_parts(const Call *call, int N) {
    return N == 64 ? backward_parts(*call, N, 16, Shared<64>::bytes) : backward_parts(*call, N, 16, Shared<128>::bytes);
}

extern "C" int wkv6_backward(const Call *call, int N, cudaStream_t stream) {
    const int rows = N / call->parts;
    return N == 64 ? launch(backward6<64>, *call, N, Shared<64>::bytes(rows), stream)
                   : launch(backward6<128>, *call, N, Shared<128>::bytes(rows), stream);
}

extern "C" int call_size() { return sizeof(Call); }

extern "C" const char *cuda_error(int code) { return cudaGetErrorString((cudaError_t)code); }

// RWKV-7: S = S·diag(decay) - (S kk)(kk·iclr)ᵀ + v kᵀ; y = S r. See `reference.wkv7` for the definition, common.cuh for
// how a block holds its rows of S.
//
// The forward keeps S at the start of every segment of 32 tokens. The backward goes through the segments from the last
// to the first: it runs each forward again, keeping S before every fourth token, then takes four tokens at a time, their
// states in registers, and carries G, the gradient of S, back through them. No decay is ever divided by.
#include "common.cuh"

namespace {

// Tokens from t0 on as the recurrence uses them; past the document's end, tokens that change nothing.
template <int N> struct Stage {
    static constexpr int TOKENS = STAGED / N;
    float r[TOKENS][N], d[TOKENS][N], k[TOKENS][N], v[TOKENS][N], kk[TOKENS][N], b[TOKENS][N];

    __device__ void load(const Call &c, const Place<N> &place, int t0) {
        for (int i = threadIdx.x; i < STAGED / 4; i += blockDim.x) {
            const int t = i / (N / 4), j = i % (N / 4) * 4;
            float4 r_ = {}, d_ = {1, 1, 1, 1}, k_ = {}, v_ = {}, kk_ = {}, iclr = {};
            if (t0 + t < place.count) {
                const long at = place.at(c, t0 + t, j);
                r_ = load4(c.r, at), d_ = decay(load4(c.w, at)), k_ = load4(c.k, at), v_ = load4(c.v, at);
                kk_ = load4(c.kk, at), iclr = load4(c.iclr, at);
            }
            put(&r[t][j], r_), put(&d[t][j], d_), put(&k[t][j], k_), put(&v[t][j], v_);
            put(&kk[t][j], kk_), put(&b[t][j], kk_ * iclr);
        }
    }
};

template <int N> __global__ void __launch_bounds__(256) forward7(const Call c) {
    __shared__ Stage<N> stage;
    __shared__ float y[Stage<N>::TOKENS][N], removed[Stage<N>::TOKENS][N];
    const Place<N> place(c);
    const int column = place.lane * TILE;
    Tile S;
    load_state(S, c.initial, place, c);
    for (int t0 = 0; t0 < place.count; t0 += Stage<N>::TOKENS) {
        if (c.kept && t0 % SEGMENT == 0) keep_state(S, t0 / SEGMENT, place, c);
        stage.load(c, place, t0);
        __syncthreads();
        const int tokens = min(Stage<N>::TOKENS, place.count - t0);
#pragma unroll 2
        for (int t = 0; t < tokens; t++) {
            Row r, d, k, v, kk, b, gone, out;
            get(kk, &stage.kk[t][column]), get(b, &stage.b[t][column]), get(d, &stage.d[t][column]);
            get(k, &stage.k[t][column]), get(r, &stage.r[t][column]), get(v, &stage.v[t][place.row]);
            times_columns(gone, S, kk);
            const float gone_of_row = sum_rows<N>(gone, place.lane);
            spread_rows<N>(gone, gone_of_row);
            update(S, d, gone, b, v, k);
            times_columns(out, S, r);
            const float y_of_row = sum_rows<N>(out, place.lane);
            if (place.lane < TILE) {
                y[t][place.row + place.lane] = y_of_row;
                removed[t][place.row + place.lane] = gone_of_row;
            }
        }
        __syncthreads();
        store_rows<N>(c.y, y, t0, place, c);
        if (c.removed) store_rows<N>(Array{c.removed, FLOAT32}, removed, t0, place, c);
    }
    store_state(c.final_state, S, place, c);
}

enum Kind { DR, DK, DB, DD, DKK, KINDS };  // the gradients that are sums over rows

// What the backward has in shared memory, before its `RowSums`.
template <int N> struct alignas(16) Shared {
    Stage<N> stage;
    float dy[Stage<N>::TOKENS][N], removed[Stage<N>::TOKENS][N], dv[GROUP][N];

    __device__ void load(const Call &c, const Place<N> &place, int t0) {
        stage.load(c, place, t0);
        for (int i = threadIdx.x; i < STAGED / 4; i += blockDim.x) {
            const int t = i / (N / 4), j = i % (N / 4) * 4;
            const bool inside = t0 + t < place.count;
            const long at = place.at(c, t0 + t, j);
            put(&dy[t][j], inside ? load4(c.dy, at) : float4{});
            put(&removed[t][j], inside ? load4(Array{c.removed, FLOAT32}, at) : float4{});
        }
    }
    static int bytes(int rows) { return sizeof(Shared<N>) + RowSums<N, KINDS>::bytes(rows); }
};

// Writes the gradients of the tokens t0 to t0 + 3, which are the staged ones from `staged` on.
template <int N>
__device__ void finish(
    const Shared<N> &s, const RowSums<N, KINDS> &sums, const Call &c, const Place<N> &place, int t0, int staged
) {
    const long plane = place.part * (long)(c.offsets ? 1 : c.documents) * c.tokens * c.heads * N;
    for (int i = threadIdx.x; i < GROUP * N; i += blockDim.x) {
        const int m = i / N, j = i % N;
        if (t0 + m >= place.count) break;
        const long at = place.at(c, t0 + m, j);
        const float db = sums.total(m, DB, j);
        store(c.dr, plane + at, sums.total(m, DR, j));
        store(c.dk, plane + at, sums.total(m, DK, j));
        store(c.dkk, plane + at, sums.total(m, DKK, j) + db * load(c.iclr, at));
        store(c.diclr, plane + at, db * s.stage.kk[staged + m][j]);
        store(c.dw, plane + at, -sums.total(m, DD, j) * s.stage.d[staged + m][j] * rate(load(c.w, at)));
        if (place.row0 <= j && j < place.row0 + N / c.parts) store(c.dv, at, s.dv[m][j]);
    }
}

template <int N> __global__ void __launch_bounds__(N == 64 ? 256 : 512, N == 64 ? 2 : 1) backward7(const Call c) {
    constexpr int TOKENS = Stage<N>::TOKENS, GROUPS = TOKENS / GROUP;
    extern __shared__ __align__(16) char memory[];
    Shared<N> &s = *(Shared<N> *)memory;
    const RowSums<N, KINDS> sums(memory + sizeof(Shared<N>));
    const Place<N> place(c);
    const int column = place.lane * TILE;
    Tile G, before[SEGMENT / GROUP];  // before: S before every fourth token of the segment
    load_state(G, c.d_final, place, c);

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
                    Row d, k, v, b, gone;
                    get(d, &s.stage.d[t][column]), get(k, &s.stage.k[t][column]), get(b, &s.stage.b[t][column]);
                    get(v, &s.stage.v[t][place.row]), get(gone, &s.removed[t][place.row]);
                    update(S, d, gone, b, v, k);
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
#pragma unroll
                for (int m = 0; m < GROUP; m++) {
                    const int t = group * GROUP + m;
                    Row d, k, v, b, gone, dy, sum;
                    copy(states[m], S);
                    get(d, &s.stage.d[t][column]), get(k, &s.stage.k[t][column]), get(b, &s.stage.b[t][column]);
                    get(v, &s.stage.v[t][place.row]), get(gone, &s.removed[t][place.row]);
                    get(dy, &s.dy[t][place.row]);
                    update(S, d, gone, b, v, k);
                    times_rows(sum, S, dy);
                    sums.put(m, DR, sum, place.lane);
                }
#pragma unroll
                for (int m = GROUP - 1; m >= 0; m--) {
                    const int t = group * GROUP + m;
                    Row x, y, sum, d_gone;  // x: along the columns, y: along the rows
                    get(x, &s.stage.r[t][column]), get(y, &s.dy[t][place.row]);
#pragma unroll
                    for (int i = 0; i < TILE; i++)
#pragma unroll
                        for (int j = 0; j < TILE; j++) G[i][j] += y[i] * x[j];  // dy rᵀ
                    get(x, &s.stage.b[t][column]);
                    times_columns(d_gone, G, x);  // its negative
                    spread_rows<N>(d_gone, sum_rows<N>(d_gone, place.lane));
                    get(x, &s.stage.k[t][column]);
                    times_columns(sum, G, x);
                    const float dv = sum_rows<N>(sum, place.lane);
                    if (place.lane < TILE) s.dv[m][place.row + place.lane] = dv;
                    get(y, &s.stage.v[t][place.row]);
                    times_rows(sum, G, y);
                    sums.put(m, DK, sum, place.lane);
                    get(y, &s.removed[t][place.row]);
                    times_rows(sum, G, y);
#pragma unroll
                    for (int j = 0; j < TILE; j++) sum[j] = -sum[j];
                    sums.put(m, DB, sum, place.lane);
                    times_state(sum, G, states[m]);
                    sums.put(m, DD, sum, place.lane);
#pragma unroll
                    for (int i = 0; i < TILE; i++) d_gone[i] = -d_gone[i];
                    times_rows(sum, states[m], d_gone);
                    sums.put(m, DKK, sum, place.lane);
                    get(x, &s.stage.d[t][column]), get(y, &s.stage.kk[t][column]);
                    update(G, x, d_gone, y);
                }
                __syncthreads();
                finish(s, sums, c, place, start + stage * TOKENS + group * GROUP, group * GROUP);
                __syncthreads();
            }
        }
    }
    if (c.d_initial) store_state(c.d_initial, G, place, c);
}

}  // namespace

// `call->parts` is set; N is 64 or 128. All return a cudaError_t.
extern "C" int wkv7_forward(Call *call, int N, cudaStream_t stream) {
    call->parts = forward_parts(*call, N);
    return N == 64 ? launch(forward7<64>, *call, N, 0, stream) : launch(forward7<128>, *call, N, 0, stream);
}

extern "C" int wkv7_backward_parts(const Call *call, int N) {
    return N == 64 ? backward_parts(*call, N, 8, Shared<64>::bytes) : backward_parts(*call, N, 4, Shared<128>::bytes);
}

extern "C" int wkv7_backward(const Call *call, int N, cudaStream_t stream) {
    const int rows = N / call->parts;
    return N == 64 ? launch(backward7<64>, *call, N, Shared<64>::bytes(rows), stream)
                   : launch(backward7<128>, *call, N, Shared<128>::bytes(rows), stream);
}

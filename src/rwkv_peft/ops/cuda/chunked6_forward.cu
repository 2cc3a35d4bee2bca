// RWKV-6's and RWKV-5's forward pass.
#include "chunked6_scan.cuh"

namespace {

constexpr int OUTPUT_BYTES = 4 * TILE + WARPS * N * (int)sizeof(float);

// A block has one chunk of one head.
template <typename T> __global__ void __launch_bounds__(THREADS, 4) output6(const Chunked6 c) {
    enum { R = 0, K = TILE, V = 2 * TILE, S = 3 * TILE };
    float(*totals)[N] = (float(*)[N])(shared_memory() + 4 * TILE);
    const int chunk = blockIdx.x / c.heads, head = blockIdx.x % c.heads;
    const int start = c.start[chunk], length = c.length[chunk];
    if (length == 0) return;
    const Warp w((threadIdx.x / 32 + blockIdx.x) % WARPS);  // rows cost more the lower they are: other warps elsewhere
    const Place tokens = c.tokens(start, head);
    fetch_rows(R, c.r, tokens, length, w);
    fetch_rows(K, c.k, tokens, length, w);
    close_group();
    fetch_rows(V, c.v, tokens, length, w);
    fetch_rows(S, c.states, c.tile(chunk, start, head), N, w);
    close_group();
    const Block own = meet<T, false>(c, c.decays(start, head), length, head, R, K, R, K, totals, w);
    wait<0>();
    __syncwarp();
    to_bf16<T>(V, w);
    __syncthreads();

    Rows y, reader;
    Operand a;
    clear(y);
    add_product(y, own, V, w.own, w);
    get_rows<Bf16>(reader, R, w);
    get_rows(a, R, w);
#pragma unroll 1
    for (int i = w.own - 1; i >= 0; i--) {
        add_product(y, pairs<UP_TO>(a, K, i, w), V, i, w);
        scale_columns(reader, totals[i], w);
        pack_rows<Bf16>(a, reader);
    }
    add_product(y, a, S, w);
    pack_rows<T>(a, y);
    put_rows(R, a, w);
    send_rows(c.y, R, tokens, length, w);
}

template <typename T> int run(const Chunked6 &c, int kernels, cudaStream_t stream) {
    int error = cudaSuccess;
    if (kernels & SCAN) error = run_scan<T, false>(c, stream);
    if (kernels & OUTPUT && !error)
        error = launch<output6<T>>(c, c.chunks * c.heads, THREADS, OUTPUT_BYTES, OUTPUT_BYTES, stream);
    return error;
}

}  // namespace

extern "C" int chunked6_size() { return sizeof(Chunked6); }

// Launches those of the kernels that are asked for, by bits of `Kernel`; returns a cudaError_t.
extern "C" int chunked6_forward(const Chunked6 *call, int kernels, cudaStream_t stream) {
    return call->fp16 ? run<Fp16>(*call, kernels, stream) : run<Bf16>(*call, kernels, stream);
}

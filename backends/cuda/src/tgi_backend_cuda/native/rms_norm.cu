// RMS norm (Zhang and Sennrich 2019) of each row, for products of more rows than can keep theirs in shared memory.
// A kernel of its own so that the next product can fill its ring meanwhile, which a kernel of others would not let it.
#include "arithmetic.cuh"

#define THREADS (WARPS * 32)

// Grid [rows]. x, out [rows, columns], columns a multiple of 8 and at most THREADS * 8 * PIECES; all aligned to 16 bytes.
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const u16 *x, const u16 *weight, float eps, u16 *out, u32 columns) {
    float *const partial = (float *)shared;  // [WARPS]
    const u64 row = (u64)blockIdx.x * columns;
    grid_launch_next();
    uint4 v[PIECES], w[PIECES];
#pragma unroll
    for (u32 i = 0; i < PIECES; i++) {
        const u32 at = (i * THREADS + threadIdx.x) * 8;
        w[i] = make_uint4(0, 0, 0, 0);
        if (at < columns) w[i] = *(const uint4 *)(weight + at);
    }
    grid_wait();
    float square = 0;
#pragma unroll
    for (u32 i = 0; i < PIECES; i++) {
        const u32 at = (i * THREADS + threadIdx.x) * 8;
        v[i] = make_uint4(0, 0, 0, 0);
        if (at < columns) v[i] = load_fresh16(x + row + at);
    }
#pragma unroll
    for (u32 i = 0; i < PIECES; i++) {
        const u32 words[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
        for (u32 k = 0; k < 4; k++) {
            const float low = widen((u16)words[k]), high = widen((u16)(words[k] >> 16));
            square += low * low + high * high;
        }
    }
    square = warp_sum(square);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = square;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (u32 i = 0; i < WARPS; i++) total += partial[i];
    const float scale = inverse_root(total / (float)columns + eps);
#pragma unroll
    for (u32 i = 0; i < PIECES; i++) {
        const u32 at = (i * THREADS + threadIdx.x) * 8;
        if (at < columns)
            *(uint4 *)(out + row + at) = make_uint4(scaled(v[i].x, w[i].x, scale), scaled(v[i].y, w[i].y, scale),
                                                    scaled(v[i].z, w[i].z, scale), scaled(v[i].w, w[i].w, scale));
    }
}

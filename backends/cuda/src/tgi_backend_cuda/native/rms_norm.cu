// RMS norm (Zhang and Sennrich 2019) of each row of x by a block of its own, each of whose threads holds PIECES times 8
// numbers of it; rounded once before the norm's weight and once after it.
#include "arithmetic.cuh"

#define THREADS (WARPS * 32)

DEVICE float square_sum(u32 pair) {
    const float low = widen((u16)pair), high = widen((u16)(pair >> 16));
    return low * low + high * high;
}

// Grid: one block a row. x, out [rows, columns], weight [columns]; columns a multiple of 8, at most PIECES * THREADS * 8.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(const u16 *x, const u16 *weight, float eps, u16 *out, u32 columns) {
    float *const partial = (float *)shared;  // [WARPS]
    uint4 v[PIECES], w[PIECES];
    grid_launch_next();
#pragma unroll
    for (u32 i = 0; i < PIECES; i++) {
        const u32 piece = threadIdx.x + i * THREADS;
        w[i] = v[i] = make_uint4(0, 0, 0, 0);
        if (piece < columns / 8) w[i] = ((const uint4 *)weight)[piece];
    }
    grid_wait();
    float square = 0;
#pragma unroll
    for (u32 i = 0; i < PIECES; i++) {
        const u32 piece = threadIdx.x + i * THREADS;
        if (piece < columns / 8) v[i] = load_fresh16(x + (u64)blockIdx.x * columns + piece * 8);
    }
#pragma unroll
    for (u32 i = 0; i < PIECES; i++) square += square_sum(v[i].x) + square_sum(v[i].y) + square_sum(v[i].z) + square_sum(v[i].w);
    square = warp_sum(square);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = square;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (u32 i = 0; i < WARPS; i++) total += partial[i];
    const float scale = inverse_root(total / (float)columns + eps);
#pragma unroll
    for (u32 i = 0; i < PIECES; i++) {
        const u32 piece = threadIdx.x + i * THREADS;
        if (piece >= columns / 8) continue;
        *(uint4 *)(out + (u64)blockIdx.x * columns + piece * 8) =
            make_uint4(scaled(v[i].x, w[i].x, scale), scaled(v[i].y, w[i].y, scale), scaled(v[i].z, w[i].z, scale),
                       scaled(v[i].w, w[i].w, scale));
    }
}

// What products with few rows of x share. The weight is the left operand of the matrix units, 16 of its rows by 64 of its
// columns a step and tile, and x the right one; both come through shared memory by asynchronous copies.
//
//   TOKENS       rows of x                            WARPS, STAGES, TILES   a group has 16 * TILES weight rows
//   EPILOGUE     see below                            EVICT_FIRST            whether weights leave L2 first
#include "arithmetic.cuh"

#define STORE 0        // out[TOKENS, rows], 16 bits
#define STORE_FLOAT 1  // out[TOKENS, rows], float
#define ADD 2          // out[TOKENS, rows] += , 16 bits
#define GATED 3        // out[TOKENS, rows] = silu(weight[0, rows]) * weight[rows, 2 rows]

#define THREADS (WARPS * 32)
#define CHUNK 64  // columns of a step: 128 bytes, one line of a cache
#define CHUNK_BYTES 128
#define WEIGHT_ROWS (16 * TILES)
#define GROUP (EPILOGUE == GATED ? 8 * TILES : 16 * TILES)  // outputs of a group
#define WEIGHT_BYTES (WEIGHT_ROWS * CHUNK_BYTES)
#define EIGHTS ((TOKENS + 7) / 8)  // columns of the right operand, by 8
#define PER_THREAD ((GROUP * TOKENS + THREADS - 1) / THREADS)

// Byte of piece `piece` (8 numbers) of row `row` in a tile of 128-byte rows: neither copying nor reading meets a bank twice.
DEVICE u32 place(u32 row, u32 piece) { return row * CHUNK_BYTES + ((piece ^ (row & 7)) << 4); }

// The row of the weight behind tile row `r` of the group that begins at output `first`. Behind the last, the last again.
DEVICE u32 weight_row(u32 first, u32 r, u32 rows) {
    if (EPILOGUE == GATED) return min(first + r / 16 * 8 + r % 8, rows - 1) + (r & 8 ? rows : 0);
    return min(first + r, rows - 1);
}

DEVICE void copy_weight(u8 *stage, const u16 *weight, u32 first, u32 chunk, u32 columns, u32 rows, u64 policy) {
    const u32 lane = threadIdx.x % 32, piece = lane % 8, column = chunk * CHUNK + piece * 8;
    const bool inside = column < columns;
#pragma unroll
    for (u32 i = 0; i < 4 * TILES; i++) {
        const u32 r = i * 4 + lane / 8;
        const u64 at = (u64)weight_row(first, r, rows) * columns + (inside ? column : 0);
        copy_stream(stage + place(r, piece), weight + at, inside, policy);
    }
}

DEVICE void copy_input(u8 *stage, const u16 *x, u32 chunk, u32 columns) {
    const u32 lane = threadIdx.x % 32, piece = lane % 8, column = chunk * CHUNK + piece * 8;
    const bool inside = column < columns;
#pragma unroll
    for (u32 row = lane / 8; row < TOKENS; row += 4)
        copy_async(stage + place(row, piece), x + (u64)row * columns + (inside ? column : 0), inside);
}

DEVICE void multiply(float (&sums)[TILES][EIGHTS][4], const u8 *weight, const u8 *input) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (u32 j = 0; j < 2; j++) {
        // Lane q has columns 16 q to 16 q + 15 of both operands: any order of a sum will do, if it is the same.
        uint4 b[EIGHTS];
#pragma unroll
        for (u32 n = 0; n < EIGHTS; n++) {
            b[n] = make_uint4(0, 0, 0, 0);
            if (n * 8 + g < TOKENS) b[n] = *(const uint4 *)(input + place(n * 8 + g, 2 * q + j));
        }
#pragma unroll
        for (u32 tile = 0; tile < TILES; tile++) {
            const uint4 low = *(const uint4 *)(weight + place(tile * 16 + g, 2 * q + j));
            const uint4 high = *(const uint4 *)(weight + place(tile * 16 + g + 8, 2 * q + j));
#pragma unroll
            for (u32 n = 0; n < EIGHTS; n++) {
                mma(sums[tile][n], low.x, high.x, low.y, high.y, b[n].x, b[n].y);
                mma(sums[tile][n], low.z, high.z, low.w, high.w, b[n].z, b[n].w);
            }
        }
    }
}

// What the sums of output `at` of token `t` are added to, as it lies in memory.
struct Added {
    u16 bias, up_bias, residual;
};
DEVICE Added added_to(const u16 *bias, const void *out, u32 t, u32 at, u32 rows) {
    Added added = {0, 0, 0};
    if (t < TOKENS && at < rows) {
        if (bias) added.bias = bias[at];
        if (bias && EPILOGUE == GATED) added.up_bias = bias[rows + at];
        if (EPILOGUE == ADD) added.residual = load_fresh((const u16 *)out + (u64)t * rows + at);
    }
    return added;
}

DEVICE void finish(void *out, float sum, float up, Added added, u64 at) {
    sum += widen(added.bias) + widen(added.residual);
    if (EPILOGUE == GATED) sum = sum / (1.0f + power_of_2(-1.4426950408889634f * sum)) * (up + widen(added.up_bias));
    if (EPILOGUE == STORE_FLOAT)
        ((float *)out)[at] = sum;
    else
        ((u16 *)out)[at] = narrow(sum);
}

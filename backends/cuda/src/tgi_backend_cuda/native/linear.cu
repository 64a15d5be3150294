// out = weight . x for up to 8 rows of x: every weight is read once, at the speed of memory, and everything else hides in it.
//
// Each warp has a ring of STAGES steps in shared memory that is filled ahead of it; the warps of a block take turns at
// the chunks of 64 columns of the same rows and add up at the end of a group of rows. The ring runs on from one group to
// the next, and is filled before the kernel waits for its input.
//
//   NORM         x is normalized first (RMS)
//   PREFETCH     bytes of each row of a block's first group that go to L2 before the wait, behind the ring
#include "linear.cuh"

#define STAGE_BYTES (WEIGHT_BYTES + (NORM ? 0 : TOKENS * CHUNK_BYTES))
#define SUMS (WARPS * WEIGHT_ROWS * TOKENS)
#define AT_ONCE (TOKENS > 4 ? 1 : TOKENS > 2 ? 2 : 4)

// x normalized (Zhang and Sennrich 2019) into `input`, as chunks of TOKENS rows each, zeros behind the last column.
DEVICE void normalize(u8 *input, float *partial, const u16 *x, const u8 *norm_weight, float eps, u32 columns) {
    const u32 pieces = columns / 8, all = (columns + CHUNK - 1) / CHUNK * 8;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float square[TOKENS];
#pragma unroll
    for (u32 t = 0; t < TOKENS; t++) square[t] = 0;
    // Several loads under way at once: their latency is all that the block waits for here.
    for (u32 begin = threadIdx.x; begin < all; begin += AT_ONCE * THREADS) {
        uint4 v[AT_ONCE][TOKENS];
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++)
#pragma unroll
            for (u32 t = 0; t < TOKENS; t++) {
                const u32 piece = begin + k * THREADS;
                v[k][t] = make_uint4(0, 0, 0, 0);
                if (piece < pieces) v[k][t] = load_fresh16(x + (u64)t * columns + piece * 8);
            }
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++) {
            const u32 piece = begin + k * THREADS;
            if (piece >= all) break;
            u8 *chunk = input + piece / 8 * (TOKENS * CHUNK_BYTES);
#pragma unroll
            for (u32 t = 0; t < TOKENS; t++) {
                const u32 words[4] = {v[k][t].x, v[k][t].y, v[k][t].z, v[k][t].w};
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const float low = widen((u16)words[i]), high = widen((u16)(words[i] >> 16));
                    square[t] += low * low + high * high;
                }
                *(uint4 *)(chunk + place(t, piece % 8)) = v[k][t];
            }
        }
    }
#pragma unroll
    for (u32 t = 0; t < TOKENS; t++) {
        square[t] = warp_sum(square[t]);
        if (lane == 0) partial[t * WARPS + warp] = square[t];
    }
    __syncthreads();
#pragma unroll
    for (u32 t = 0; t < TOKENS; t++) {
        float total = 0;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) total += partial[t * WARPS + w];
        const float scale = inverse_root(total / (float)columns + eps);
        // Each thread takes what it has written itself, and the piece of the norm's weight that it has copied.
        for (u32 piece = threadIdx.x; piece < pieces; piece += THREADS) {
            uint4 *at = (uint4 *)(input + piece / 8 * (TOKENS * CHUNK_BYTES) + place(t, piece % 8));
            const uint4 v = *at, n = *(const uint4 *)(norm_weight + piece * 16);
            *at = make_uint4(scaled(v.x, n.x, scale), scaled(v.y, n.y, scale), scaled(v.z, n.z, scale), scaled(v.w, n.w, scale));
        }
    }
    __syncthreads();
}

// Grid: any number of blocks, which share the groups. x [TOKENS, columns], weight [rows or 2 rows, columns], bias [rows or
// 2 rows] or null, out [TOKENS, rows]; columns a multiple of 8, pointers aligned to 16 bytes. Dynamic shared memory:
// ring [WARPS][STAGES][STAGE_BYTES], sums float [2][SUMS], and with NORM: input [chunks][TOKENS][CHUNK_BYTES],
// norm_weight [chunks][CHUNK_BYTES], partial float [TOKENS * WARPS].
extern "C" __global__ void __launch_bounds__(THREADS)
    linear(const u16 *x, const u16 *norm_weight, float eps, const u16 *weight, const u16 *bias, void *out, u32 columns,
           u32 rows) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const u32 chunks = (columns + CHUNK - 1) / CHUNK, groups = (rows + GROUP - 1) / GROUP;
    u8 *const ring = shared + warp * (STAGES * STAGE_BYTES);
    float *const all_sums = (float *)(shared + WARPS * STAGES * STAGE_BYTES);
    u8 *const input = (u8 *)(all_sums + 2 * SUMS);
    u8 *const norm = input + chunks * (TOKENS * CHUNK_BYTES);
    const u64 policy = streaming_policy();

    const u32 block_groups = blockIdx.x < groups ? (groups - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
    const u32 warp_chunks = warp < chunks ? (chunks - warp + WARPS - 1) / WARPS : 0;
    const u32 steps = block_groups * warp_chunks;
    // The next step to copy, and where it goes.
    u32 copied = 0, copy_first = blockIdx.x * GROUP, copy_chunk = warp, copy_stage = 0;

    auto advance_copy = [&] {
        copied++;
        copy_stage = copy_stage + 1 == STAGES ? 0 : copy_stage + 1;
        copy_chunk += WARPS;
        if (copy_chunk >= chunks) {
            copy_chunk = warp;
            copy_first += gridDim.x * GROUP;
        }
    };

    grid_launch_next();
    if (NORM) {
        for (u32 piece = threadIdx.x; piece < columns / 8; piece += THREADS)
            copy_async(norm + piece * 16, norm_weight + piece * 8, true);
        copy_commit();
    }
#pragma unroll 1
    for (u32 i = 0; i < STAGES - 1; i++) {
        if (copied < steps) {
            copy_weight(ring + copy_stage * STAGE_BYTES, weight, copy_first, copy_chunk, columns, rows, policy);
            advance_copy();
        }
        if (NORM) copy_commit();
    }
    if (PREFETCH && threadIdx.x < WEIGHT_ROWS && block_groups) {
        const u32 begin = (STAGES - 1) * WARPS * CHUNK, end = min(columns, begin + PREFETCH / 2);
        if (begin < end)
            prefetch_l2(weight + (u64)weight_row(blockIdx.x * GROUP, threadIdx.x, rows) * columns + begin, (end - begin) * 2);
    }
    grid_wait();
    if (NORM) {
        copy_wait<STAGES - 1>();
        normalize(input, (float *)(norm + chunks * CHUNK_BYTES), x, norm, eps, columns);
    } else {
#pragma unroll 1
        for (u32 i = 0, chunk = warp; i < STAGES - 1; i++) {
            if (i < copied) copy_input(ring + i * STAGE_BYTES + WEIGHT_BYTES, x, chunk, columns);
            copy_commit();
            chunk = chunk + WARPS >= chunks ? warp : chunk + WARPS;
        }
    }

    u32 stage = 0;
    for (u32 group = 0, first = blockIdx.x * GROUP; group < block_groups; group++, first += gridDim.x * GROUP) {
        // Loaded now, and looked at when the sums are there.
        Added added[PER_THREAD];
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) {
            const u32 n = threadIdx.x + i * THREADS;
            added[i] = added_to(bias, out, n / GROUP, first + n % GROUP, rows);
        }
        float sums[TILES][1][4];
#pragma unroll
        for (u32 tile = 0; tile < TILES; tile++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) sums[tile][0][i] = 0;

#pragma unroll 2
        for (u32 chunk = warp; chunk < chunks; chunk += WARPS) {
            copy_wait<STAGES - 2>();
            __syncwarp();  // the whole warp's copies are there, and the stage before this one is read
            if (copied < steps) {
                u8 *to = ring + copy_stage * STAGE_BYTES;
                copy_weight(to, weight, copy_first, copy_chunk, columns, rows, policy);
                if (!NORM) copy_input(to + WEIGHT_BYTES, x, copy_chunk, columns);
                advance_copy();
            }
            copy_commit();
            const u8 *from = ring + stage * STAGE_BYTES;
            multiply(sums, from, NORM ? input + chunk * (TOKENS * CHUNK_BYTES) : from + WEIGHT_BYTES);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }

        // Two buffers in turn: whoever is ahead writes where everyone has read, one barrier ago.
        float *const buffer = all_sums + (group & 1) * SUMS;
        float *const mine = buffer + warp * (WEIGHT_ROWS * TOKENS);
#pragma unroll
        for (u32 tile = 0; tile < TILES; tile++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const u32 t = 2 * q + i % 2;
                if (t < TOKENS) mine[t * WEIGHT_ROWS + tile * 16 + g + i / 2 * 8] = sums[tile][0][i];
            }
        __syncthreads();
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; i++) {
            const u32 n = threadIdx.x + i * THREADS, output = n % GROUP, t = n / GROUP;
            if (t >= TOKENS || first + output >= rows) continue;
            const u32 r = EPILOGUE == GATED ? output / 8 * 16 + output % 8 : output;
            float total = 0, up = 0;
#pragma unroll
            for (u32 w = 0; w < WARPS; w++) {
                const float *sum = buffer + (w * TOKENS + t) * WEIGHT_ROWS + r;
                total += sum[0];
                if (EPILOGUE == GATED) up += sum[8];
            }
            finish(out, total, up, added[i], (u64)t * rows + first + output);
        }
    }
}

// out = weight . x for up to 8 rows of x: every weight is read once, at the speed of memory, and everything else hides in it.
//
// The weight is the left operand of the matrix units, 16 of its rows by 64 of its columns a step and tile, and x the
// right one. Each warp has a ring of STAGES steps in shared memory that asynchronous copies fill ahead of it; the warps
// of a block take turns at the chunks of 64 columns of the same rows and add up at the end of a group of rows. The ring
// runs on from one group to the next, and is filled before the kernel waits for its input.
//
//   TOKENS       rows of x, 1 to 8                    WARPS, STAGES, TILES   a group has 16 * TILES weight rows
//   NORM         x is normalized first (RMS)          EPILOGUE               see below
//   PREFETCH     bytes of each row of a block's first group that go to L2 before the wait, behind the ring
//   EVICT_FIRST  whether weights leave L2 first
//   WORLD        with SEND: ranks that the sums are sent to; with NORM, if not 1: ranks that sent what is to be added to x
//                before all else
#include "arithmetic.cuh"

#define STORE 0        // out[TOKENS, rows], 16 bits
#define STORE_FLOAT 1  // out[TOKENS, rows], float
#define ADD 2          // out[TOKENS, rows] += , 16 bits
#define GATED 3        // out[TOKENS, rows] = silu(weight[0, rows]) * weight[rows, 2 rows]
#define SEND 4         // [TOKENS, rows], 16 bits, to all ranks
#define RECEIVE (NORM && WORLD > 1)

#define THREADS (WARPS * 32)
#define CHUNK 64  // columns of a step: 128 bytes, one line of a cache
#define CHUNK_BYTES 128
#define WEIGHT_ROWS (16 * TILES)
#define GROUP (EPILOGUE == GATED ? 8 * TILES : 16 * TILES)  // outputs of a group
#define WEIGHT_BYTES (WEIGHT_ROWS * CHUNK_BYTES)
#define PER_THREAD ((GROUP * TOKENS + THREADS - 1) / THREADS)
#define STAGE_BYTES (WEIGHT_BYTES + (NORM ? 0 : TOKENS * CHUNK_BYTES))
#define SUMS (WARPS * WEIGHT_ROWS * TOKENS)
#define AT_ONCE (RECEIVE || TOKENS > 4 ? 1 : TOKENS > 2 ? 2 : 4)

#include "inboxes.cuh"

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

DEVICE void multiply(float (&sums)[TILES][4], const u8 *weight, const u8 *input) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (u32 j = 0; j < 2; j++) {
        // Lane q has columns 16 q to 16 q + 15 of both operands: any order of a sum will do, if it is the same.
        uint4 b = make_uint4(0, 0, 0, 0);
        if (g < TOKENS) b = *(const uint4 *)(input + place(g, 2 * q + j));
#pragma unroll
        for (u32 tile = 0; tile < TILES; tile++) {
            const uint4 low = *(const uint4 *)(weight + place(tile * 16 + g, 2 * q + j));
            const uint4 high = *(const uint4 *)(weight + place(tile * 16 + g + 8, 2 * q + j));
            mma(sums[tile], low.x, high.x, low.y, high.y, b.x, b.y);
            mma(sums[tile], low.z, high.z, low.w, high.w, b.z, b.w);
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

DEVICE void finish(void *out, float sum, float up, Added added, u64 at, const Inboxes &inboxes, u32 turn) {
    sum += widen(added.bias) + widen(added.residual);
    if (EPILOGUE == GATED) sum = sum / (1.0f + power_of_2(-1.4426950408889634f * sum)) * (up + widen(added.up_bias));
    if (EPILOGUE == SEND)
        send(inboxes, turn, sum, at);
    else if (EPILOGUE == STORE_FLOAT)
        ((float *)out)[at] = sum;
    else
        ((u16 *)out)[at] = narrow(sum);
}

// x normalized (Zhang and Sennrich 2019) into `input`, as chunks of TOKENS rows each, zeros behind the last column.
DEVICE void normalize(u8 *input, float *partial, const u16 *x, const u8 *norm_weight, float eps, u32 columns,
                      const Inboxes &inboxes, u32 turn) {
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
                if (!RECEIVE && piece < pieces) v[k][t] = load_fresh16(x + (u64)t * columns + piece * 8);
            }
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++) {
            const u32 piece = begin + k * THREADS;
            if (piece >= all) break;
            if (RECEIVE && piece < pieces) receive(v[k], x, inboxes, turn, piece, columns);
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
// norm_weight [chunks][CHUNK_BYTES], partial float [TOKENS * WARPS]. To send and to receive there are no more blocks than
// groups, and rows that are sent are a multiple of 8.
extern "C" __global__ void __launch_bounds__(THREADS)
    linear(const u16 *x, const u16 *norm_weight, float eps, const u16 *weight, const u16 *bias, void *out, u32 columns,
           u32 rows, const Inboxes inboxes) {
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

    if (EPILOGUE != SEND) grid_launch_next();
    u32 turn = RECEIVE ? load_fresh(inboxes.state) : 0, sent_before = 0;
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
    if (EPILOGUE == SEND) {
        grid_launch_next();
        turn = load_fresh(inboxes.state);
        sent_before = load_fresh(inboxes.state + 1);
    }
    if (NORM) {
        copy_wait<STAGES - 1>();
        normalize(input, (float *)(norm + chunks * CHUNK_BYTES), x, norm, eps, columns, inboxes, turn);
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
        float sums[TILES][4];
#pragma unroll
        for (u32 tile = 0; tile < TILES; tile++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) sums[tile][i] = 0;

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

        if (RECEIVE && group == 0 && threadIdx.x == 0) received(inboxes, turn, columns);
        // Two buffers in turn: whoever is ahead writes where everyone has read, one barrier ago.
        float *const buffer = all_sums + (group & 1) * SUMS;
        float *const mine = buffer + warp * (WEIGHT_ROWS * TOKENS);
#pragma unroll
        for (u32 tile = 0; tile < TILES; tile++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const u32 t = 2 * q + i % 2;
                if (t < TOKENS) mine[t * WEIGHT_ROWS + tile * 16 + g + i / 2 * 8] = sums[tile][i];
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
            finish(out, total, up, added[i], (u64)t * rows + first + output, inboxes, turn);
        }
    }
    if (EPILOGUE == SEND) empty(inboxes, (turn + 2) % 3, sent_before);
}

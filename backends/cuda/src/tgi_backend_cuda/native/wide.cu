// out = weight . x for more rows of x than `linear.cu` takes, still at the speed of memory: larger groups, so that x, which
// is read anew for each, is a fraction of what is read.
//
// Blocks share pieces of work: a group of rows, or one of some parts of its columns, which the last block to end with
// one of them adds up. Each warp has a ring of STAGES steps in shared memory that is filled ahead of it; the warps of a
// block take turns at the chunks of 64 columns and add up at the end of a piece. The ring runs on from one piece to the
// next, and is filled with weights before the kernel waits for its input.
#include "linear.cuh"

#define STAGE_BYTES (WEIGHT_BYTES + TOKENS * CHUNK_BYTES)
#define SUM_STRIDE (WEIGHT_ROWS + 4)  // of the sums of one token: no two lanes meet at a bank

// Grid: any number of blocks. x [TOKENS, columns], weight [rows or 2 rows, columns], bias [rows or 2 rows] or null, out
// [TOKENS, rows]; columns a multiple of 8, pointers aligned to 16 bytes. With more than one split, parts float [groups]
// [splits][TOKENS][WEIGHT_ROWS] and arrived [groups], zero before and after. Dynamic shared memory: ring [WARPS][STAGES]
// [STAGE_BYTES], sums float [WARPS][TOKENS][SUM_STRIDE].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    wide(const u16 *x, const u16 *weight, const u16 *bias, void *out, u32 columns, u32 rows,
         u32 splits, float *parts, u32 *arrived) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const u32 chunks = (columns + CHUNK - 1) / CHUNK, pieces = (rows + GROUP - 1) / GROUP * splits;
    const u32 split_chunks = (chunks + splits - 1) / splits;
    u8 *const ring = shared + warp * (STAGES * STAGE_BYTES);
    float *const buffer = (float *)(shared + WARPS * STAGES * STAGE_BYTES);
    const u64 policy = streaming_policy();

    // A warp's way through its chunks: this block's pieces, and of each every WARPS-th chunk.
    struct Cursor {
        u32 piece, chunk, end;
    };
    auto enter = [&](Cursor &at) {
        while (at.piece < pieces) {
            const u32 begin = at.piece % splits * split_chunks;
            at.chunk = begin + warp;
            at.end = min(begin + split_chunks, chunks);
            if (at.chunk < at.end) return;
            at.piece += gridDim.x;
        }
    };
    auto advance = [&](Cursor &at) {
        at.chunk += WARPS;
        if (at.chunk >= at.end) {
            at.piece += gridDim.x;
            enter(at);
        }
    };

    grid_launch_next();
    Cursor copied = {blockIdx.x, 0, 0};
    enter(copied);
    Cursor unread = copied;  // whose input is not yet on its way
#pragma unroll 1
    for (u32 i = 0; i < STAGES - 1; i++) {
        if (copied.piece < pieces) {
            copy_weight(ring + i * STAGE_BYTES, weight, copied.piece / splits * GROUP, copied.chunk, columns, rows, policy);
            advance(copied);
        }
    }
    grid_wait();
#pragma unroll 1
    for (u32 i = 0; i < STAGES - 1; i++) {
        if (unread.piece < pieces) {
            copy_input(ring + i * STAGE_BYTES + WEIGHT_BYTES, x, unread.chunk, columns);
            advance(unread);
        }
        copy_commit();
    }

    u32 stage = 0;
    for (u32 piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
        const u32 group = piece / splits, split = piece % splits, first = group * GROUP;
        float sums[TILES][EIGHTS][4];
#pragma unroll
        for (u32 tile = 0; tile < TILES; tile++)
#pragma unroll
            for (u32 n = 0; n < EIGHTS; n++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) sums[tile][n][i] = 0;

        const u32 end = min((split + 1) * split_chunks, chunks);
#pragma unroll 1
        for (u32 chunk = split * split_chunks + warp; chunk < end; chunk += WARPS) {
            copy_wait<STAGES - 2>();
            __syncwarp();  // the whole warp's copies are there, and the stage before this one is read
            if (copied.piece < pieces) {
                u8 *to = ring + (stage == 0 ? STAGES - 1 : stage - 1) * STAGE_BYTES;
                copy_weight(to, weight, copied.piece / splits * GROUP, copied.chunk, columns, rows, policy);
                copy_input(to + WEIGHT_BYTES, x, copied.chunk, columns);
                advance(copied);
            }
            copy_commit();
            const u8 *from = ring + stage * STAGE_BYTES;
            multiply(sums, from, from + WEIGHT_BYTES);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }

        float *const mine = buffer + warp * (SUM_STRIDE * TOKENS);
#pragma unroll
        for (u32 tile = 0; tile < TILES; tile++)
#pragma unroll
            for (u32 n = 0; n < EIGHTS; n++)
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const u32 t = n * 8 + 2 * q + i % 2;
                    if (t < TOKENS) mine[t * SUM_STRIDE + tile * 16 + g + i / 2 * 8] = sums[tile][n][i];
                }
        __syncthreads();
        auto block_sum = [&](u32 t, u32 r) {
            float sum = 0;
#pragma unroll
            for (u32 w = 0; w < WARPS; w++) sum += buffer[(w * TOKENS + t) * SUM_STRIDE + r];
            return sum;
        };
        bool is_last = true;
        float *const group_parts = parts + (u64)group * splits * (TOKENS * WEIGHT_ROWS);
        if (splits > 1) {
            for (u32 n = threadIdx.x; n < TOKENS * WEIGHT_ROWS; n += THREADS)
                group_parts[split * (TOKENS * WEIGHT_ROWS) + n] = block_sum(n / WEIGHT_ROWS, n % WEIGHT_ROWS);
            __threadfence();  // a part is there before it is counted
            __syncthreads();
            u32 *const last = (u32 *)buffer;
            if (threadIdx.x == 0) {
                *last = atomicAdd(arrived + group, 1u) == splits - 1;
                if (*last) arrived[group] = 0;
            }
            __syncthreads();
            is_last = *last;
            __threadfence();
        }
        auto total = [&](u32 t, u32 r) {
            if (splits == 1) return block_sum(t, r);
            float sum = 0;
#pragma unroll 4
            for (u32 part = 0; part < splits; part++)
                sum += load_fresh(group_parts + (part * TOKENS + t) * WEIGHT_ROWS + r);
            return sum;
        };
        if (is_last) {
#pragma unroll
            for (u32 i = 0; i < PER_THREAD; i++) {
                const u32 n = threadIdx.x + i * THREADS, output = n % GROUP, t = n / GROUP, at = first + output;
                if (t >= TOKENS || at >= rows) continue;
                const Added added = added_to(bias, out, t, at, rows);
                const u32 r = EPILOGUE == GATED ? output / 8 * 16 + output % 8 : output;
                finish(out, total(t, r), EPILOGUE == GATED ? total(t, r + 8) : 0.0f, added, (u64)t * rows + at);
            }
        }
        __syncthreads();  // before the next sums overwrite these
    }
}

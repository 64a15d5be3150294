// out = weight . x for 9 to 64 rows of x on Hopper: every weight is read once, at the speed of memory.
//
// A tile of TILE weight rows is the left operand of the matrix units and all of x the right one, 64 columns a unit. One
// warp has the copying engine bring units of both into a ring of STAGES; the others multiply. Where there are few tiles,
// the blocks of a cluster share one, each with a part of the columns; then each adds up a part of the tile's rows, in
// the order of columns. The ring is filled with weights before the kernel waits for its input.
//
//   N         rows of x, rounded up to 16, 24, 32, 48 or 64
//   GROUPS    groups of four warps that multiply, with 64 weight rows of a tile each: TILE is 64 * GROUPS
//   STAGES    units in the ring, which fills a multiprocessor: two blocks of a kernel on one would hold up all others
//   EPILOGUE  as in `linear.cu`; a gated tile has 8 rows of the gate, the 8 of up that belong to them, and so on
//   ROTATE    chunks of columns by which each cluster begins behind the one before it
#include "arithmetic.cuh"

#define STORE 0
#define STORE_FLOAT 1
#define ADD 2
#define GATED 3

#define TILE (64 * GROUPS)
#define BLOCK (EPILOGUE == GATED ? 8 : 16)   // outputs of a warp's 16 weight rows, for each token
#define OUTPUTS (TILE / 16 * BLOCK)          // of a tile
#define CHUNK 64                             // columns of a unit
#define CHUNK_BYTES 128
#define WEIGHT_BYTES (TILE * CHUNK_BYTES)
#define STAGE_BYTES (WEIGHT_BYTES + N * CHUNK_BYTES)
#define WARPS (4 * GROUPS)                   // that multiply
#define THREADS (32 * WARPS + 32)
#define PIECES (N / 8)                       // of a warp's sums: 16 weight rows by 8 tokens, a float4 of each lane

struct Ring {
    u8 *units;
    u64 *full, *empty;
    u32 stage, parity;
};
DEVICE u8 *weight_of(const Ring &ring) { return ring.units + ring.stage * STAGE_BYTES; }
DEVICE u8 *input_of(const Ring &ring) { return weight_of(ring) + WEIGHT_BYTES; }
DEVICE void advance(Ring &ring) {
    ring.stage = ring.stage + 1 == STAGES ? 0 : ring.stage + 1;
    ring.parity ^= ring.stage == 0;
}

// What a block does: chunks `first` to `first + chunks - 1` of tiles `tile`, `tile + step` and so on.
struct Work {
    u32 tile, step, tiles, first, chunks, rotation;
};
// The next of its units.
struct Position {
    u32 tile, number, chunk;
};
DEVICE Position begin(const Work &work) { return {work.tile, 0, work.rotation}; }
DEVICE u32 column(const Work &work, const Position &at) { return (work.first + at.chunk) * CHUNK; }
DEVICE void advance(Position &at, const Work &work) {
    at.chunk = at.chunk + 1 == work.chunks ? 0 : at.chunk + 1;
    if (++at.number == work.chunks) {
        at.number = 0;
        at.chunk = work.rotation;
        at.tile += work.step;
    }
}

DEVICE void copy_weight(const Ring &ring, const TensorMap &weight, u32 tile, u32 column, u64 policy) {
    u64 *const full = ring.full + ring.stage;
    barrier_expect(full, STAGE_BYTES);
#if EPILOGUE == GATED
    copy_box(weight_of(ring), weight, column, 0, 0, tile * (TILE / 16), full, policy);
#else
    copy_box(weight_of(ring), weight, column, tile * TILE, full, policy);
#endif
}
// One thread brings all units of its block.
DEVICE void bring(Ring ring, const TensorMap &weight, const TensorMap &input, const Work &work) {
    const u64 once = policy_once(), often = policy_often();
    Position next = begin(work);
    Ring free = ring;
    u32 filled = 0;
    for (; filled < STAGES && next.tile < work.tiles; filled++, advance(free), advance(next, work))
        copy_weight(free, weight, next.tile, column(work, next), once);
    grid_wait();
    Position at = begin(work);
    for (u32 i = 0; i < filled; i++, advance(ring), advance(at, work))
        copy_box(input_of(ring), input, column(work, at), 0, ring.full + ring.stage, often);
    for (; at.tile < work.tiles; advance(ring), advance(at, work)) {
        barrier_wait(ring.empty + ring.stage, ring.parity ^ 1);
        copy_weight(ring, weight, at.tile, column(work, at), once);
        copy_box(input_of(ring), input, column(work, at), 0, ring.full + ring.stage, often);
    }
}

// A piece of results: outputs `output` and, where not gated, `output + 8` of `token` and `token + 1`, of this lane.
struct Piece {
    u32 token, output;
};
// The one of 16 weight rows, block `block` of `tile`, and 8 tokens.
DEVICE Piece piece_of(u32 tile, u32 block, u32 column) {
    const u32 lane = threadIdx.x % 32;
    return {column * 8 + lane % 4 * 2, tile * OUTPUTS + block * BLOCK + lane / 4};
}
// The place of number `i` of 4, as a float4 of sums has them, in out [tokens, rows]; false behind its end.
DEVICE bool place_of(u32 &at, const Piece &piece, u32 i, u32 tokens, u32 rows) {
    const u32 token = piece.token + i % 2, output = piece.output + i / 2 * 8;
    at = token * rows + output;
    return token < tokens && output < rows && (EPILOGUE != GATED || i < 2);
}

struct Residual {
    u16 of[4];
};
DEVICE Residual residual_of(const void *out, const Piece &piece, u32 tokens, u32 rows) {
    Residual residual = {{0, 0, 0, 0}};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 at;
        if (EPILOGUE == ADD && place_of(at, piece, i, tokens, rows)) residual.of[i] = load_fresh((const u16 *)out + at);
    }
    return residual;
}

DEVICE void finish(void *out, float4 sums, Residual residual, const u16 *bias, const Piece &piece, u32 tokens, u32 rows) {
    const float all[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        u32 at;
        if (!place_of(at, piece, i, tokens, rows)) continue;
        const u32 output = piece.output + i / 2 * 8;
        float sum = all[i];
        if (bias) sum += widen(bias[output]);
        if (EPILOGUE == ADD) sum += widen(residual.of[i]);
        if (EPILOGUE == GATED) {
            const float up = all[(i + 2) % 4] + (bias ? widen(bias[rows + output]) : 0.0f);
            sum = sum / (1.0f + power_of_2(-1.4426950408889634f * sum)) * up;
        }
        if (EPILOGUE == STORE_FLOAT)
            ((float *)out)[at] = sum;
        else
            ((u16 *)out)[at] = narrow(sum);
    }
}

// Grid: clusters of 1, 2, 4 or 8 blocks, at most WARPS; a cluster of several has one tile. Maps: x [tokens, columns], boxes
// of N rows; weight [rows, columns], boxes of TILE rows, or [rows / 8, 2, 8, columns], boxes of TILE / 16, where gated; 64
// columns each, 128-byte swizzle. bias [rows or 2 rows] or null; out [tokens, rows]. Dynamic shared memory: units
// [STAGES][STAGE_BYTES], in a cluster of several parts float4 [WARPS][PIECES][32], full [STAGES], empty [STAGES].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    wide(TENSOR_MAP weight, TENSOR_MAP input, const u16 *bias, void *out, u32 tokens, u32 columns, u32 rows) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = cluster_rank(), split = cluster_blocks();
    const u32 cluster = blockIdx.x / split, chunks = (columns + CHUNK - 1) / CHUNK, first = chunks * rank / split;
    Work work = {cluster, gridDim.x / split, (rows + OUTPUTS - 1) / OUTPUTS, first, chunks * (rank + 1) / split - first, 0};
    if (ROTATE && work.chunks) work.rotation = cluster * ROTATE % work.chunks;
    float4 *const parts = (float4 *)(shared + STAGES * STAGE_BYTES);
    u64 *const barriers = (u64 *)(parts + (split > 1 ? WARPS * PIECES * 32 : 0));
    Ring ring = {shared, barriers, barriers + STAGES, 0, 0};

    grid_launch_next();
    if (threadIdx.x == 0) {
        fetch_map(weight);
        fetch_map(input);
        for (u32 i = 0; i < STAGES; i++) {
            barrier_init(ring.full + i, 1);
            barrier_init(ring.empty + i, WARPS);
        }
        barriers_made();
    }
    if (split > 1) cluster_arrive();
    __syncthreads();
    if (warp == WARPS) {
        if (lane == 0) bring(ring, weight, input, work);
        __syncwarp();
        if (split > 1) {
            cluster_wait();
            cluster_arrive();
            cluster_wait();
        }
        return;
    }
    grid_wait();

    for (u32 tile = work.tile; tile < work.tiles; tile += work.step) {
        float sums[N / 2];
#pragma unroll
        for (u32 i = 0; i < N / 2; i++) sums[i] = 0;
        pin(sums);
        u64 *used = nullptr;  // where the unit before this one is given back
        for (u32 chunk = 0; chunk < work.chunks; chunk++, advance(ring)) {
            barrier_wait(ring.full + ring.stage, ring.parity);
            const u64 left = operand(weight_of(ring) + warp / 4 * (64 * CHUNK_BYTES)), right = operand(input_of(ring));
            products_begin();
#pragma unroll
            for (u32 k = 0; k < CHUNK / 16; k++) multiply(sums, left + 2 * k, right + 2 * k);
            products_commit();
            products_wait<1>();
            if (used && lane == 0) barrier_arrive(used);
            used = ring.empty + ring.stage;
        }
        products_wait<0>();
        if (lane == 0) barrier_arrive(used);
        pin(sums);
        float4 pieces[PIECES];
#pragma unroll
        for (u32 i = 0; i < PIECES; i++)
            pieces[i] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
        if (split == 1) {
#pragma unroll
            for (u32 i = 0; i < PIECES; i++) {
                const Piece piece = piece_of(tile, warp, i);
                finish(out, pieces[i], residual_of(out, piece, tokens, rows), bias, piece, tokens, rows);
            }
            continue;
        }
        // Each rank has `blocks` of the tile's blocks; its warps take turns at their pieces.
        const u32 blocks = WARPS / split, all = blocks * PIECES;
        Residual residual[(PIECES + 1) / 2];
#pragma unroll
        for (u32 i = 0; i < (PIECES + 1) / 2; i++) {
            const u32 number = warp + i * WARPS;
            if (number < all)
                residual[i] = residual_of(out, piece_of(tile, rank * blocks + number / PIECES, number % PIECES), tokens, rows);
        }
        cluster_wait();  // all have begun
#pragma unroll
        for (u32 i = 0; i < PIECES; i++)
            store_in(warp / blocks, parts + ((rank * blocks + warp % blocks) * PIECES + i) * 32 + lane, pieces[i]);
        cluster_arrive();
        cluster_wait();
#pragma unroll
        for (u32 i = 0; i < (PIECES + 1) / 2; i++) {
            const u32 number = warp + i * WARPS;
            if (number >= all) break;
            float4 total = parts[number * 32 + lane];
            for (u32 from = 1; from < split; from++) {
                const float4 part = parts[(from * all + number) * 32 + lane];
                total = make_float4(total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w);
            }
            const Piece piece = piece_of(tile, rank * blocks + number / PIECES, number % PIECES);
            finish(out, total, residual[i], bias, piece, tokens, rows);
        }
    }
}

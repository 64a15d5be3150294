// Everything between the QKV projection and the output projection, for one new token in each row: norms of the heads,
// rotation, writing the new key and value to their page, and attention over the pages.
//
// Flash-decoding (Dao et al. 2023): the keys of a row are divided among blocks, those of a block among its warps, 16 keys
// at a time; the last block of a row and KV head to end puts the parts together. All query heads of a KV head, up to 8,
// are rows of one tile of the matrix units. Keys and values of earlier tokens are on their way before the kernel waits
// for its input; the new token's come from shared memory.
//
//   HEAD_DIM     64 or 128                            GROUP         query heads of a KV head, 1 to 8
//   PAGE         tokens of a page                     NORM          heads of q and k are normalized first (RMS)
//   WARPS, STAGES, LEAST  tiles of 16 keys that a block has at least, if there are so many
#include "arithmetic.cuh"

#define THREADS (WARPS * 32)
#define KEYS 16
#define ROW_BYTES (HEAD_DIM * 2)
#define TILE_BYTES (KEYS * ROW_BYTES)
#define STAGE_BYTES (2 * TILE_BYTES)  // keys, then values
#define PIECES (HEAD_DIM / 8)
#define RING_BYTES (WARPS * STAGES * STAGE_BYTES)
#define HEAD_WORDS (GROUP * HEAD_DIM)  // of one part: all heads of a KV head

// Byte of piece `piece` (8 numbers) of row `row`: neither copies nor matrix loads meet a bank twice.
DEVICE u32 place(u32 row, u32 piece) { return row * ROW_BYTES + ((piece ^ (row & 7)) << 4); }

// One head of 16-bit numbers, normalized and rotated by one warp, into `into`. `work` is HEAD_DIM floats of the warp's.
DEVICE void turn_head(u16 *into, float *work, const u16 *head, const u16 *norm_weight, float eps, const float *cos,
                      const float *sin, u32 half) {
    const u32 lane = threadIdx.x % 32;
    float value[HEAD_DIM / 32];
#pragma unroll
    for (u32 i = 0; i < HEAD_DIM / 32; i++) value[i] = widen(load_fresh(head + i * 32 + lane));
#if NORM
    float square = 0;
#pragma unroll
    for (u32 i = 0; i < HEAD_DIM / 32; i++) square += value[i] * value[i];
    const float scale = inverse_root(warp_sum(square) / HEAD_DIM + eps);
#pragma unroll
    for (u32 i = 0; i < HEAD_DIM / 32; i++)
        value[i] = widen(narrow(widen(narrow(value[i] * scale)) * widen(norm_weight[i * 32 + lane])));
#endif
    __syncwarp();  // `work` may still be read for the head before
#pragma unroll
    for (u32 i = 0; i < HEAD_DIM / 32; i++) work[i * 32 + lane] = value[i];
    __syncwarp();
#pragma unroll
    for (u32 i = 0; i < HEAD_DIM / 32; i++) {
        const u32 at = i * 32 + lane;
        float turned = value[i];
        if (at < half)
            turned = value[i] * cos[at] - work[at + half] * sin[at];
        else if (at < 2 * half)
            turned = value[i] * cos[at - half] + work[at - half] * sin[at - half];
        into[at] = narrow(turned);
    }
}

// Grid [splits, KV heads, rows]. qkv [rows, (KV heads * (GROUP + 2)) * HEAD_DIM]: heads of q, of k, of v; cos, sin float
// [rows, half]; pools of strides in numbers, whose rows are contiguous; page_table int [rows, table_columns]; kv_lens int
// [rows], with the new token, 0 for a row that is not there, which gets zeros; cache_slots int [rows]: page * PAGE +
// offset of the new token; out [rows, KV heads * GROUP * HEAD_DIM]. `scale` is in units of log2; window 0 means none.
// parts float [rows * KV heads][splits][HEAD_WORDS], part_sums float [rows * KV heads][splits][GROUP][2], arrived
// [rows * KV heads], zero before and after. Page tables, lengths, and pages of earlier tokens are read before the wait.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention(const u16 *qkv, const float *cos, const float *sin, const u16 *q_norm, const u16 *k_norm, float eps,
              u16 *k_pool, u16 *v_pool, u64 pool_page, u64 pool_slot, u64 pool_head, const int *page_table,
              u32 table_columns, const int *kv_lens, const int *cache_slots, u16 *out, float *parts, float *part_sums,
              u32 *arrived, float scale, u32 window, u32 half) {
    // Shared memory: the ring [WARPS][STAGES][STAGE_BYTES], which later has each warp's sums; then
    u16 *const query = (u16 *)(shared + RING_BYTES);       // [GROUP][HEAD_DIM]
    u16 *const new_key = query + HEAD_WORDS;               // [HEAD_DIM]
    u16 *const new_value = new_key + HEAD_DIM;             // [HEAD_DIM]
    float *const work = (float *)(new_value + HEAD_DIM);   // [WARPS][HEAD_DIM]
    float *const warp_sums = work + WARPS * HEAD_DIM;      // [WARPS][GROUP][2]: largest score, sum of weights
    float *const weights = warp_sums + WARPS * GROUP * 2;  // [max(WARPS, splits)][GROUP]
    u32 *const last = (u32 *)(weights + (gridDim.x > WARPS ? gridDim.x : WARPS) * GROUP);

    const u32 split = blockIdx.x, splits = gridDim.x, kv_head = blockIdx.y, kv_heads = gridDim.y, row = blockIdx.z;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const u32 pair = row * kv_heads + kv_head;
    u16 *const row_out = out + (u64)pair * HEAD_WORDS;
    u8 *const ring = shared + warp * (STAGES * STAGE_BYTES);

    grid_launch_next();
    const u32 kv_len = (u32)kv_lens[row];
    const u32 first_key = window && kv_len > window ? kv_len - window : 0;
    const u32 first_tile = first_key / KEYS, tiles = (kv_len + KEYS - 1) / KEYS - first_tile;
    u32 share = (tiles + splits - 1) / splits;
    if (share < LEAST) share = LEAST;
    const u32 active = (tiles + share - 1) / share;
    if (split >= active) {
        if (split == 0) {
            // Only a row that is not there comes here. Every launch has a block that waits.
            grid_wait();
            for (u32 i = threadIdx.x; i < HEAD_WORDS; i += THREADS) row_out[i] = 0;
        }
        return;
    }
    const u32 begin = first_tile + split * share, end = min(begin + share, first_tile + tiles);
    const bool has_new = end == first_tile + tiles;  // the new token's key is the last one
    const u32 warp_tiles = begin + warp < end ? (end - begin - warp + WARPS - 1) / WARPS : 0;

    auto copy_tile = [&](u32 i) {
        const u32 key = (begin + warp + i * WARPS) * KEYS;
        u8 *const keys = ring + i % STAGES * STAGE_BYTES;
        const int *const pages = page_table + (u64)row * table_columns;
        const u32 page_of_tile = PAGE % KEYS == 0 ? pages[key / PAGE] : 0;
#pragma unroll 4
        for (u32 k = 0; k < KEYS * PIECES / 32; k++) {
            const u32 r = (k * 32 + lane) / PIECES, piece = lane % PIECES, at = key + r;
            if (at + 1 == kv_len) continue;  // the new token
            const bool known = at < kv_len;
            const u32 page = PAGE % KEYS == 0 ? page_of_tile : pages[(known ? at : key) / PAGE];
            u64 from = (u64)page * pool_page + at % PAGE * pool_slot + kv_head * pool_head + piece * 8;
            if (!known) from = 0;
            copy_async(keys + place(r, piece), k_pool + from, known);
            copy_async(keys + TILE_BYTES + place(r, piece), v_pool + from, known);
        }
    };
#pragma unroll 1
    for (u32 i = 0; i < STAGES - 1; i++) {
        if (i < warp_tiles) copy_tile(i);
        copy_commit();
    }
    grid_wait();

    {
        const u16 *const heads = qkv + (u64)row * (kv_heads * (GROUP + 2) * HEAD_DIM);
        const float *const row_cos = cos + (u64)row * half, *const row_sin = sin + (u64)row * half;
        float *const own = work + warp * HEAD_DIM;
        for (u32 h = warp; h < GROUP; h += WARPS)
            turn_head(query + h * HEAD_DIM, own, heads + (kv_head * GROUP + h) * HEAD_DIM, q_norm, eps, row_cos, row_sin, half);
        if (has_new && warp == GROUP % WARPS) {
            const u16 *const k = heads + (kv_heads * GROUP + kv_head) * HEAD_DIM, *const v = k + kv_heads * HEAD_DIM;
            const u32 slot = (u32)cache_slots[row];
            const u64 to = slot / PAGE * pool_page + slot % PAGE * pool_slot + kv_head * pool_head;
            turn_head(new_key, own, k, k_norm, eps, row_cos, row_sin, half);
            __syncwarp();
            for (u32 piece = lane; piece < PIECES; piece += 32) {
                const uint4 value = load_fresh16(v + piece * 8);
                ((uint4 *)new_value)[piece] = value;
                *(uint4 *)(v_pool + to + piece * 8) = value;
                *(uint4 *)(k_pool + to + piece * 8) = ((const uint4 *)new_key)[piece];
            }
        }
        __syncthreads();
    }

    // Piece p(j) of a lane: any order of a sum over the dimensions will do, if q and k have the same.
    uint4 q_pieces[PIECES / 4];
#pragma unroll
    for (u32 j = 0; j < PIECES / 4; j++) {
        q_pieces[j] = make_uint4(0, 0, 0, 0);
        if (g < GROUP) q_pieces[j] = ((const uint4 *)(query + g * HEAD_DIM))[j % 2 + 2 * q + j / 2 * 8];
    }
    float sums[PIECES][2], largest = minus_infinity(), total = 0;  // of head g; total: of this lane's keys
#pragma unroll
    for (u32 n = 0; n < PIECES; n++) sums[n][0] = sums[n][1] = 0;

#pragma unroll 1
    for (u32 i = 0; i < warp_tiles; i++) {
        copy_wait<STAGES - 2>();
        __syncwarp();  // the whole warp's copies are there, and the stage before this one is read
        if (i + STAGES - 1 < warp_tiles) copy_tile(i + STAGES - 1);
        copy_commit();
        u8 *const keys = ring + i % STAGES * STAGE_BYTES, *const values = keys + TILE_BYTES;
        const u32 key = (begin + warp + i * WARPS) * KEYS;
        if (kv_len - key <= KEYS) {
            const u32 r = kv_len - 1 - key;
            for (u32 piece = lane; piece < PIECES; piece += 32) {
                *(uint4 *)(keys + place(r, piece)) = ((const uint4 *)new_key)[piece];
                *(uint4 *)(values + place(r, piece)) = ((const uint4 *)new_value)[piece];
            }
            __syncwarp();
        }

        float scores[2][2] = {{0, 0}, {0, 0}};  // head g, keys n * 8 + 2 q and the next
#pragma unroll
        for (u32 j = 0; j < PIECES / 4; j++)
#pragma unroll
            for (u32 n = 0; n < 2; n++) {
                const uint4 k = *(const uint4 *)(keys + place(n * 8 + g, j % 2 + 2 * q + j / 2 * 8));
                mma_upper(scores[n][0], scores[n][1], q_pieces[j].x, q_pieces[j].y, k.x, k.y);
                mma_upper(scores[n][0], scores[n][1], q_pieces[j].z, q_pieces[j].w, k.z, k.w);
            }
        float tile_largest = minus_infinity();
#pragma unroll
        for (u32 n = 0; n < 2; n++)
#pragma unroll
            for (u32 e = 0; e < 2; e++) {
                const u32 at = key + n * 8 + 2 * q + e;
                scores[n][e] = at >= first_key && at < kv_len ? scores[n][e] * scale : minus_infinity();
                tile_largest = fmaxf(tile_largest, scores[n][e]);
            }
        tile_largest = fmaxf(tile_largest, __shfl_xor_sync(0xffffffffu, tile_largest, 1));
        tile_largest = fmaxf(tile_largest, __shfl_xor_sync(0xffffffffu, tile_largest, 2));
        // Every tile has a key that is seen, so this is finite.
        const float new_largest = fmaxf(largest, tile_largest), fade = power_of_2(largest - new_largest);
        largest = new_largest;
        total *= fade;
#pragma unroll
        for (u32 n = 0; n < 2; n++)
#pragma unroll
            for (u32 e = 0; e < 2; e++) {
                scores[n][e] = power_of_2(scores[n][e] - largest);
                total += scores[n][e];
            }
        const u32 low = narrow2(scores[0][0], scores[0][1]), high = narrow2(scores[1][0], scores[1][1]);
#pragma unroll
        for (u32 n = 0; n < PIECES; n += 2) {
            const uint4 v = load_transposed(values + place(lane % 16, n + lane / 16));
            sums[n][0] *= fade;
            sums[n][1] *= fade;
            sums[n + 1][0] *= fade;
            sums[n + 1][1] *= fade;
            mma_upper(sums[n][0], sums[n][1], low, high, v.x, v.y);
            mma_upper(sums[n + 1][0], sums[n + 1][1], low, high, v.z, v.w);
        }
    }
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);

    copy_wait<0>();
    __syncthreads();  // the ring is free
    float *const all_sums = (float *)shared;  // [WARPS][GROUP][HEAD_DIM]
    if (g < GROUP) {
#pragma unroll
        for (u32 n = 0; n < PIECES; n++) {
            float *const to = all_sums + (warp * GROUP + g) * HEAD_DIM + n * 8 + 2 * q;
            to[0] = sums[n][0];
            to[1] = sums[n][1];
        }
        if (q == 0) {
            warp_sums[(warp * GROUP + g) * 2] = largest;
            warp_sums[(warp * GROUP + g) * 2 + 1] = total;
        }
    }
    __syncthreads();

    // The warps' parts together; of a split, the sums as they are, with their largest score and total weight.
    for (u32 n = threadIdx.x; n < HEAD_WORDS; n += THREADS) {
        const u32 head = n / HEAD_DIM;
        float most = minus_infinity(), all = 0, sum = 0;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) most = fmaxf(most, warp_sums[(w * GROUP + head) * 2]);
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) {
            const float weight = power_of_2(warp_sums[(w * GROUP + head) * 2] - most);
            all += weight * warp_sums[(w * GROUP + head) * 2 + 1];
            sum += weight * all_sums[w * HEAD_WORDS + n];
        }
        if (active == 1) {
            row_out[n] = narrow(sum / all);
        } else {
            parts[((u64)pair * splits + split) * HEAD_WORDS + n] = sum;
            if (n % HEAD_DIM == 0) {
                float *const to = part_sums + (((u64)pair * splits + split) * GROUP + head) * 2;
                to[0] = most;
                to[1] = all;
            }
        }
    }
    if (active == 1) return;

    __threadfence();  // a part is there before its block is counted
    __syncthreads();
    if (threadIdx.x == 0) {
        *last = atomicAdd(arrived + pair, 1u) == active - 1;
        if (*last) arrived[pair] = 0;
    }
    __syncthreads();
    if (!*last) return;
    __threadfence();
    const float *const row_sums = part_sums + (u64)pair * splits * GROUP * 2;
    for (u32 head = warp; head < GROUP; head += WARPS) {
        float most = minus_infinity(), all = 0;
        for (u32 s = lane; s < active; s += 32) most = fmaxf(most, load_fresh(row_sums + (s * GROUP + head) * 2));
        most = warp_max(most);
        for (u32 s = lane; s < active; s += 32) {
            const float weight = power_of_2(load_fresh(row_sums + (s * GROUP + head) * 2) - most);
            weights[s * GROUP + head] = weight;
            all += weight * load_fresh(row_sums + (s * GROUP + head) * 2 + 1);
        }
        all = warp_sum(all);
        for (u32 s = lane; s < active; s += 32) weights[s * GROUP + head] /= all;
    }
    __syncthreads();
    const float *const row_parts = parts + (u64)pair * splits * HEAD_WORDS;
    for (u32 n = threadIdx.x; n < HEAD_WORDS; n += THREADS) {
        float sum = 0;
#pragma unroll 8
        for (u32 s = 0; s < active; s++) sum += weights[s * GROUP + n / HEAD_DIM] * load_fresh(row_parts + s * HEAD_WORDS + n);
        row_out[n] = narrow(sum);
    }
}

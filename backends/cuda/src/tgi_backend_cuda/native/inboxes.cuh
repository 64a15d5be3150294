// Sums that one product sends and the next one adds up: part of `linear.cu`, with its TOKENS, THREADS and WORLD.
//
// Every rank sends its part of a sum, 16-bit numbers [TOKENS, columns], into the inboxes of all, and every block of the next
// kernel adds up for itself. Minus zero is never sent: what is anything else has arrived.
//
// A sender waits for the kernels before it, and only then lets the next one start. So when that one starts, all but the
// sender is complete: without waiting it may read the state, which the receiver before has left. It waits before it polls:
// that costs nothing, and polls of what is still on its way within the chip would be in the way.
//
// Sums take turns at three inboxes. The sender of sum n empties the one of sum n - 1, whose receiver is complete. Whoever
// sends sum n + 2 into that one has received sum n + 1 from all ranks, each of which sent it after its receiver of sum n
// was complete, and with it the sender that emptied the inbox.
struct Inboxes {
    u16 *ranks[8];    // one for each: [3][WORLD][capacity]
    u16 *own;         // this rank's
    u32 *state;       // which of the three is next, numbers of each rank in the sum before, blocks that have received
    const u32 *stop;  // if set, nobody waits any more, and what is received is worthless
    u16 *sum;         // where the receiver leaves x with all that was added; not x, which other blocks read
    u32 capacity, rank;
};
#define NOTHING_SENT 0x8000u

DEVICE u32 part_of(const Inboxes &inboxes, u32 turn, u32 sender) { return (turn * WORLD + sender) * inboxes.capacity; }

// What the sum before has left behind.
DEVICE void empty(const Inboxes &inboxes, u32 turn, u32 numbers) {
    const u32 twice = NOTHING_SENT << 16 | NOTHING_SENT;
    for (u32 i = threadIdx.x * gridDim.x + blockIdx.x; i < numbers / 8; i += gridDim.x * THREADS)
#pragma unroll
        for (u32 r = 0; r < WORLD; r++)
            *(uint4 *)(inboxes.own + part_of(inboxes, turn, r) + i * 8) = make_uint4(twice, twice, twice, twice);
}

DEVICE void send(const Inboxes &inboxes, u32 turn, float value, u64 at) {
    const u16 rounded = narrow(value), sent = rounded == NOTHING_SENT ? 0 : rounded;
#pragma unroll
    for (u32 r = 0; r < WORLD; r++) send_number(inboxes.ranks[r] + part_of(inboxes, turn, inboxes.rank) + at, sent);
}

DEVICE bool lacks(u32 pair) {
    const u32 other = pair ^ (NOTHING_SENT << 16 | NOTHING_SENT);  // has a half of zeros
    return ((other - 0x00010001u) & ~other & 0x80008000u) != 0;
}
DEVICE bool lacks(const uint4 &v) { return lacks(v.x) || lacks(v.y) || lacks(v.z) || lacks(v.w); }

DEVICE void add_pair(float &low, float &high, u32 pair) {
    low += widen((u16)pair);
    high += widen((u16)(pair >> 16));
}

// A piece of each row of x and of the sum, added up in order of rank and rounded once: the same bits on all ranks.
DEVICE void receive(uint4 (&v)[TOKENS], const u16 *x, const Inboxes &inboxes, u32 turn, u32 piece, u32 columns) {
    const u16 *const from = inboxes.own + part_of(inboxes, turn, 0) + piece * 8;
    uint4 parts[TOKENS][WORLD];
#pragma unroll
    for (u32 t = 0; t < TOKENS; t++) {
#pragma unroll
        for (u32 r = 0; r < WORLD; r++) parts[t][r] = load_arriving(from + r * inboxes.capacity + t * columns);
        v[t] = load_fresh16(x + (u64)t * columns + piece * 8);
    }
    while (true) {
        bool missing = false;
#pragma unroll
        for (u32 t = 0; t < TOKENS; t++)
#pragma unroll
            for (u32 r = 0; r < WORLD; r++)
                if (lacks(parts[t][r])) {
                    missing = true;
                    parts[t][r] = load_arriving(from + r * inboxes.capacity + t * columns);
                }
        if (!missing || load_flag(inboxes.stop)) break;
    }
#pragma unroll
    for (u32 t = 0; t < TOKENS; t++) {
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
        for (u32 r = 0; r <= WORLD; r++) {
            const uint4 part = r < WORLD ? parts[t][r] : v[t];
            add_pair(sum[0], sum[1], part.x);
            add_pair(sum[2], sum[3], part.y);
            add_pair(sum[4], sum[5], part.z);
            add_pair(sum[6], sum[7], part.w);
        }
        v[t] = make_uint4(narrow2(sum[0], sum[1]), narrow2(sum[2], sum[3]), narrow2(sum[4], sum[5]), narrow2(sum[6], sum[7]));
    }
    // The last blocks, which may have a group less to do, write for all.
    if (blockIdx.x == gridDim.x - 1 - piece / THREADS % gridDim.x)
#pragma unroll
        for (u32 t = 0; t < TOKENS; t++) *(uint4 *)(inboxes.sum + (u64)t * columns + piece * 8) = v[t];
}

// By one thread of each block, when all threads have read the state.
DEVICE void received(const Inboxes &inboxes, u32 turn, u32 columns) {
    if (atomicAdd(inboxes.state + 2, 1) != gridDim.x - 1) return;
    inboxes.state[0] = (turn + 1) % 3;
    inboxes.state[1] = TOKENS * columns;
    inboxes.state[2] = 0;
}

// `hopper.cuh`: boxes land one by one, in any order, while somebody waits.
struct alignas(64) TensorMap {
    u64 address, rank, sizes[4], strides[3];
    u32 box[4];
    u8 rest[128 - 88];
};
#define TENSOR_MAP TensorMap

namespace emulator {
struct Barrier { u32 arrivals, left, bytes, phase; };
struct Flight { u8 *to; TensorMap map; u64 at[4]; u64 *barrier; };
static std::map<u64 *, Barrier> barriers;
static std::vector<Flight> flights;
static u32 idle;
static void settle(Barrier &barrier) {
    idle = 0;
    if (barrier.left || barrier.bytes) return;
    barrier.phase ^= 1;
    barrier.left = barrier.arrivals;
}
static void start_cluster() {
    if (!flights.empty()) fail("a copy that nobody waited for");
    barriers.clear();
}
static void land_box(const Flight &flight) {
    const TensorMap &map = flight.map;
    u64 row = 0, index[4] = {0, 0, 0, 0};
    for (;; row++) {
        for (u64 column = 0; column < map.box[0]; column++) {
            bool inside = flight.at[0] + column < map.sizes[0];
            const u8 *from = (const u8 *)map.address + 2 * (flight.at[0] + column);
            for (u64 d = 1; d < map.rank; d++) {
                inside = inside && flight.at[d] + index[d] < map.sizes[d];
                from += (flight.at[d] + index[d]) * map.strides[d - 1];
            }
            *(u16 *)(flight.to + row * 128 + ((2 * column) ^ (row % 8 << 4))) = inside ? *(const u16 *)from : 0;
        }
        u64 d = 1;
        for (; d < map.rank && ++index[d] == map.box[d]; d++) index[d] = 0;
        if (d == map.rank) break;
    }
    Barrier &barrier = barriers.at(flight.barrier);
    barrier.bytes -= (u32)(row + 1) * 128;
    settle(barrier);
}
}  // namespace emulator

DEVICE void barrier_init(u64 *at, u32 arrivals) { emulator::barriers[at] = {arrivals, arrivals, 0, 0}; }
DEVICE void barriers_made() {}
DEVICE void barrier_expect(u64 *at, u32 bytes) {
    emulator::Barrier &barrier = emulator::barriers.at(at);
    if (!barrier.left--) emulator::fail("a barrier that too many arrive at");
    barrier.bytes += bytes;
    emulator::settle(barrier);
}
DEVICE void barrier_arrive(u64 *at) { barrier_expect(at, 0); }
DEVICE void barrier_wait(u64 *at, u32 parity) {
    using namespace emulator;
    while (barriers.at(at).phase == parity) {
        if (!flights.empty() && chance() % 4 == 0) {
            std::swap(flights[chance() % flights.size()], flights.back());
            const Flight flight = flights.back();
            flights.pop_back();
            land_box(flight);
        } else if (++idle > 10000000) {
            fail("a barrier that waits for ever");
        }
        swapcontext(&current->context, &scheduler);
    }
}
DEVICE u32 cluster_rank() { return emulator::current->block->rank; }
DEVICE u32 cluster_blocks() { return (u32)emulator::cluster.size(); }
DEVICE void cluster_arrive() {
    using namespace emulator;
    current->cluster_round = cluster_meeting.round;
    if (++cluster_meeting.arrived < fibers.size()) return;
    cluster_meeting.arrived = 0;
    cluster_meeting.round++;
}
DEVICE void cluster_wait() {
    using namespace emulator;
    current->at = &cluster_meeting;
    current->round = current->cluster_round;
    swapcontext(&current->context, &scheduler);
}
DEVICE void store_in(u32 rank, float4 *at, float4 v) { *(float4 *)(emulator::cluster[rank].shared + ((u8 *)at - shared)) = v; }
DEVICE u64 policy_once() { return 0; }
DEVICE u64 policy_often() { return 0; }
DEVICE void fetch_map(const TensorMap &) {}
DEVICE void copy_box(void *to, const TensorMap &map, u32 column, u32 row, u64 *barrier, u64) {
    if (((u8 *)to - shared) % 1024) emulator::fail("a box is not aligned");
    emulator::flights.push_back({(u8 *)to, map, {column, row, 0, 0}, barrier});
}
DEVICE void copy_box(void *to, const TensorMap &map, u32 column, u32 row, u32 half, u32 group, u64 *barrier, u64) {
    if (((u8 *)to - shared) % 1024) emulator::fail("a box is not aligned");
    emulator::flights.push_back({(u8 *)to, map, {column, row, half, group}, barrier});
}
DEVICE u64 operand(const void *at) { return (u64)((const u8 *)at - shared) >> 4; }
DEVICE void products_begin() { emulator::sync_warp(); }
DEVICE void products_commit() {}
template <int PENDING> DEVICE void products_wait() { emulator::sync_warp(); }
template <int COUNT> DEVICE void pin(float (&)[COUNT]) {}
DEVICE float operand_at(u64 operand, u32 row, u32 column) {
    const u64 at = (operand << 4) + row * 128 + column * 2;
    return widen(*(const u16 *)(shared + (at ^ (at >> 7 & 7) << 4)));
}
DEVICE void multiply(float (&c)[N / 2], u64 weight, u64 input) {
    const u32 g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    for (u32 i = 0; i < N / 2; i++)
        for (u32 k = 0; k < 16; k++)
            c[i] += operand_at(weight, threadIdx.x % 128 / 32 * 16 + g + i % 4 / 2 * 8, k) * operand_at(input, i / 4 * 8 + 2 * q + i % 2, k);
}

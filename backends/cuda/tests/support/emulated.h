// `ptx.cuh` for a CPU: the threads of a block are fibers that take turns, in random order, at every point of
// synchronization. Asynchronous copies land as late or as early as they may. Blocks run one after another, those of a
// cluster together.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <sys/mman.h>
#include <ucontext.h>
#include <utility>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
struct uint4 { u32 x, y, z, w; } __attribute__((aligned(16)));
struct float4 { float x, y, z, w; } __attribute__((aligned(16)));
struct Index { u32 x, y, z; };

#define DEVICE static __attribute__((noinline))
#define __global__
#define __launch_bounds__(...)

static Index threadIdx, blockIdx, gridDim;
static u8 *shared;
static std::mt19937 chance;

namespace emulator {
struct Copy { void *to; const void *from; bool valid; };
struct Meeting { u32 round = 0, arrived = 0; };
struct Fiber {
    ucontext_t context;
    std::vector<u8> stack;
    u32 thread = 0;
    bool done = false, waited = false;
    Meeting *at = nullptr;  // where it waits, and the round that must end
    u32 round = 0, cluster_round = 0;
    struct Block *block = nullptr;
    std::deque<std::vector<Copy>> groups;
    std::vector<Copy> open;
};
struct Warp {
    Meeting meeting;
    u32 words[32][8];
};
struct Block {
    Index index;
    u32 rank, threads;
    u8 *shared;
    std::vector<Warp> warps;
    Meeting meeting;
};
static ucontext_t scheduler;
static std::vector<std::unique_ptr<Fiber>> fibers;
static std::vector<Block> cluster;
static Meeting cluster_meeting;
static Fiber *current;
static bool somebody_waited;

[[noreturn]] static void fail(const char *what) {
    fprintf(stderr, "emulated kernel, block %u %u %u, thread %u: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, what);
    abort();
}
static void meet(Meeting &meeting, u32 members) {
    if (++meeting.arrived == members) {
        meeting.arrived = 0;
        meeting.round++;
        return;
    }
    current->at = &meeting;
    current->round = meeting.round;
    swapcontext(&current->context, &scheduler);
}
static void land(std::vector<Copy> &copies) {
    for (const Copy &copy : copies)
        if (copy.valid) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
    copies.clear();
}
static void sync_warp() { meet(current->block->warps[threadIdx.x / 32].meeting, 32); }
// Every lane gives up to 8 words and then sees those of all lanes.
template <typename Result> static auto exchange(std::initializer_list<u32> words, Result result) {
    Warp &warp = current->block->warps[threadIdx.x / 32];
    std::copy(words.begin(), words.end(), warp.words[threadIdx.x % 32]);
    sync_warp();
    auto value = result(warp.words);
    sync_warp();
    return value;
}
}  // namespace emulator

static inline u32 min(u32 a, u32 b) { return a < b ? a : b; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float as_float(u32 bits) { float v; memcpy(&v, &bits, 4); return v; }
static inline u32 as_bits(float v) { u32 bits; memcpy(&bits, &v, 4); return bits; }
static inline void __syncwarp() { emulator::sync_warp(); }
static inline void __syncthreads() { emulator::meet(emulator::current->block->meeting, emulator::current->block->threads); }
static inline void __threadfence() {}
static inline float __shfl_xor_sync(u32, float v, int mask) {
    return emulator::exchange({as_bits(v)}, [&](u32 (*all)[8]) { return as_float(all[threadIdx.x % 32 ^ mask][0]); });
}
static inline u32 atomicAdd(u32 *at, u32 v) { u32 old = *at; *at += v; return old; }

DEVICE void grid_wait() { emulator::current->waited = emulator::somebody_waited = true; }
DEVICE void grid_launch_next() {}
DEVICE u64 streaming_policy() { return 0; }
DEVICE void copy_async(void *to, const void *from, bool valid) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16) emulator::fail("a copy of 16 bytes is not aligned");
    std::vector<emulator::Copy> one = {{to, from, valid}};
    if (chance() % 2) emulator::land(one);  // and again when it is waited for: it was under way all the time
    emulator::current->open.push_back({to, from, valid});
}
DEVICE void copy_stream(void *to, const void *from, bool valid, u64) { copy_async(to, from, valid); }
DEVICE void copy_commit() {
    emulator::current->groups.push_back(std::move(emulator::current->open));
    emulator::current->open.clear();
}
template <int PENDING> DEVICE void copy_wait() {
    auto &groups = emulator::current->groups;
    while (groups.size() > PENDING) {
        emulator::land(groups.front());
        groups.pop_front();
    }
}
DEVICE void prefetch_l2(const void *at, u32 bytes) {
    if ((uintptr_t)at % 16 || bytes % 16 || !bytes) emulator::fail("a prefetch is not aligned");
    for (u32 i = 0; i < bytes; i++) (void)((const volatile u8 *)at)[i];
}
DEVICE uint4 load_fresh16(const void *at) { return *(const uint4 *)at; }
DEVICE u16 load_fresh(const u16 *at) { return *at; }
DEVICE u32 load_fresh(const u32 *at) { return *at; }
DEVICE float load_fresh(const float *at) { return *at; }

// Another rank's kernel may run in another thread at the same time.
DEVICE void send_number(u16 *to, u16 v) {
    if (!emulator::current->waited) emulator::fail("a number is sent while kernels before may run");
    __atomic_store_n(to, v, __ATOMIC_RELAXED);
}
DEVICE uint4 load_arriving(const void *at) {
    u64 words[2];
    for (int i = 0; i < 2; i++) words[i] = __atomic_load_n((const u64 *)at + i, __ATOMIC_RELAXED);
    return make_uint4((u32)words[0], (u32)(words[0] >> 32), (u32)words[1], (u32)(words[1] >> 32));
}
DEVICE u32 load_flag(const u32 *at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }

#if BF16
DEVICE float widen(u16 v) { return as_float((u32)v << 16); }
DEVICE u16 narrow(float v) {
    const u32 bits = as_bits(v);
    if (v != v) return 0x7fff;
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#else
DEVICE float widen(u16 v) { _Float16 h; memcpy(&h, &v, 2); return (float)h; }
DEVICE u16 narrow(float v) { _Float16 h = (_Float16)v; u16 bits; memcpy(&bits, &h, 2); return bits; }
#endif
DEVICE u32 narrow2(float low, float high) { return narrow(low) | (u32)narrow(high) << 16; }

DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    emulator::exchange({a0, a1, a2, a3, b0, b1}, [&](u32 (*all)[8]) {
        const u32 g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
        for (u32 i = 0; i < 4; i++) {
            const u32 column = 2 * q + i % 2;
            for (u32 k = 0; k < 16; k++) {
                const u32 holder = k % 8 / 2, shift = k % 2 * 16;
                const u32 a = all[g * 4 + holder][k / 8 * 2 + i / 2], b = all[column * 4 + holder][4 + k / 8];
                c[i] += widen((u16)(a >> shift)) * widen((u16)(b >> shift));
            }
        }
        return 0;
    });
}
DEVICE void mma_upper(float &c0, float &c1, u32 a0, u32 a2, u32 b0, u32 b1) {
    float c[4] = {c0, c1, 0, 0};
    mma(c, a0, 0, a2, 0, b0, b1);
    c0 = c[0];
    c1 = c[1];
}
DEVICE uint4 load_transposed(const void *row) {
    if ((uintptr_t)row % 16) emulator::fail("a row of a matrix is not aligned");
    const u64 address = (u64)row;
    return emulator::exchange({(u32)address, (u32)(address >> 32)}, [&](u32 (*all)[8]) {
        const u32 g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
        u32 words[4];
        for (u32 i = 0; i < 4; i++) {
            auto at = [&](u32 r) { return ((const u16 *)(all[i * 8 + r][0] | (u64)all[i * 8 + r][1] << 32))[g]; };
            words[i] = at(2 * q) | (u32)at(2 * q + 1) << 16;
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    });
}
DEVICE float power_of_2(float v) { return exp2f(v); }
DEVICE float minus_infinity() { return as_float(0xff800000u); }
DEVICE float inverse_root(float v) { return 1.0f / sqrtf(v); }

#if HOPPER
#include "emulated_hopper.h"
#endif

namespace emulator {
template <typename... A, size_t... I> void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*(A *)arguments[I]...);
}
template <typename... A> void start(void (*kernel)(A...), void **arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>());
}
static void (*body)();
static void fiber_main() {
    body();
    current->done = true;
    swapcontext(&current->context, &scheduler);
}
// Memory of `bytes`, multiple of 16, whose end no access may cross.
extern "C" u8 *guarded(u64 bytes) {
    const u64 page = 4096, size = (bytes + page - 1) / page * page;
    u8 *at = (u8 *)mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED || mprotect(at + size, page, PROT_NONE)) fail("no memory");
    return at + size - bytes;
}
static void run_cluster() {
    cluster_meeting = Meeting();
#if HOPPER
    start_cluster();
#endif
    const u32 threads = cluster[0].threads, all = threads * (u32)cluster.size();
    fibers.resize(all);
    std::vector<Fiber *> order;
    for (u32 i = 0; i < all; i++) {
        if (!fibers[i]) fibers[i] = std::make_unique<Fiber>();
        Fiber &fiber = *fibers[i];
        fiber.stack.resize(1 << 16);
        fiber.thread = i % threads;
        fiber.block = &cluster[i / threads];
        fiber.done = fiber.waited = false;
        fiber.at = nullptr;
        fiber.groups.clear();
        fiber.open.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, fiber_main, 0);
        order.push_back(&fiber);
    }
    std::shuffle(order.begin(), order.end(), chance);
    for (u32 open = all; open;) {
        bool moved = false;
        for (Fiber *fiber : order) {
            if (fiber->done || (fiber->at && fiber->at->round == fiber->round)) continue;
            moved = true;
            current = fiber;
            fiber->at = nullptr;
            threadIdx = {fiber->thread, 0, 0};
            blockIdx = fiber->block->index;
            shared = fiber->block->shared;
            swapcontext(&scheduler, &fiber->context);
            open -= fiber->done;
        }
        if (!moved) fail("a barrier that not all threads reach");
        if (chance() % 4 == 0) std::shuffle(order.begin(), order.end(), chance);
    }
}
static void launch(u32 grid_x, u32 grid_y, u32 grid_z, u32 threads, u32 shared_bytes, u32 together, u32 seed) {
    chance.seed(seed);
    somebody_waited = false;
    gridDim = {grid_x, grid_y, grid_z};
    std::vector<u32> order(grid_x * grid_y * grid_z / together);
    for (u32 i = 0; i < order.size(); i++) order[i] = i;
    std::shuffle(order.begin(), order.end(), chance);
    std::vector<u8 *> memory(together);
    for (u8 *&at : memory) at = guarded(shared_bytes);
    for (u32 first : order) {
        cluster.clear();
        for (u32 rank = 0; rank < together; rank++) {
            const u32 i = first * together + rank;
            memset(memory[rank], 0xff, shared_bytes);
            cluster.push_back({{i % grid_x, i / grid_x % grid_y, i / grid_x / grid_y}, rank, threads, memory[rank], std::vector<Warp>(threads / 32), Meeting()});
        }
        run_cluster();
    }
    if (!somebody_waited) fail("it ends while kernels before it may run");
}
}  // namespace emulator

// As the driver has it: `arguments` point to the values.
#define EMULATE(kernel)                                                                                              \
    static void **kernel##_arguments;                                                                               \
    extern "C" void launch_##kernel(u32 x, u32 y, u32 z, u32 threads, u32 shared_bytes, u32 together, u32 seed, \
                                    void **arguments) {                                                             \
        kernel##_arguments = arguments;                                                                             \
        emulator::body = [] { emulator::start(&kernel, kernel##_arguments); };                                      \
        emulator::launch(x, y, z, threads, shared_bytes, together, seed);                                                     \
    }

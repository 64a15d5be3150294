// What only sm_90a has, as PTX: tiles copied by the tensor memory accelerator, barriers that count bytes, and products of
// four warps at once (wgmma). `emulated.h` of the tests has the same functions for a CPU.
//
// N is the rows of the right operand of a product: 16, 24, 32, 48 or 64.

struct __align__(64) TensorMap { u8 bytes[128]; };
#define TENSOR_MAP const __grid_constant__ TensorMap

DEVICE u32 shared_offset(const void *at) { return (u32)__cvta_generic_to_shared(at); }

DEVICE void barrier_init(u64 *barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_offset(barrier)), "r"(arrivals) : "memory");
}
// Barriers just made are seen by the copying engine, too.
DEVICE void barriers_made() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void barrier_arrive(u64 *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_offset(barrier)) : "memory");
}
// Arrives, and announces bytes that copies will bring before the phase can end.
DEVICE void barrier_expect(u64 *barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_offset(barrier)), "r"(bytes) : "memory");
}
// Until the phase of this parity has ended.
DEVICE void barrier_wait(u64 *barrier, u32 parity) {
    u32 ended;
    do
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(ended)
                     : "r"(shared_offset(barrier)), "r"(parity)
                     : "memory");
    while (!ended);
}

// Blocks that run at the same time and reach each other's shared memory.
DEVICE u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE u32 cluster_blocks() {
    u32 blocks;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return blocks;
}
// What threads did before they arrived is seen by those that have waited; every warp of the cluster does both, in turn.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// Into shared memory of block `rank`, where this block has `at`.
DEVICE void store_in(u32 rank, float4 *at, float4 v) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_offset(at)), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// Read once: the first to leave L2. Read by all blocks: the last.
DEVICE u64 policy_once() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
DEVICE u64 policy_often() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
DEVICE void fetch_map(const TensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"((u64)&map) : "memory");
}
// A box of the map's size, zeros outside of the tensor, to `to`, aligned to 1024 bytes; its bytes count at `barrier`.
DEVICE void copy_box(void *to, const TensorMap &map, u32 column, u32 row, u64 *barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], "
                 "[%4], %5;" ::"r"(shared_offset(to)),
                 "l"((u64)&map), "r"(column), "r"(row), "r"(shared_offset(barrier)), "l"(policy)
                 : "memory");
}
DEVICE void copy_box(void *to, const TensorMap &map, u32 column, u32 row, u32 half, u32 group, u64 *barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
                 "[%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(shared_offset(to)),
                 "l"((u64)&map), "r"(column), "r"(row), "r"(half), "r"(group), "r"(shared_offset(barrier)), "l"(policy)
                 : "memory");
}
// Where an operand of 64 columns lies in shared memory: rows of 128 bytes, 16-byte pieces swizzled within 8 rows (PTX ISA,
// matrix descriptor). 16 columns further on are 2 units.
DEVICE u64 operand(const void *at) {
    return (u64)(shared_offset(at) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// The compiler may not move what it does with `sums` across this.
template <int COUNT> DEVICE void pin(float (&sums)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

#if BF16
#define WGMMA_TYPES "f32.bf16.bf16"
#else
#define WGMMA_TYPES "f32.f16.f16"
#endif
#define SUMS4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SUMS8(i) SUMS4(i), SUMS4(i + 4)
#define WGMMA(n, registers, a, b, accumulate, ...)                                                                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\n"                                             \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16." WGMMA_TYPES " {" registers "}, " a ", " b ", p, 1, 1, 0, 0;\n}" \
                 : __VA_ARGS__                                                                                       \
                 : "l"(weight), "l"(input), "r"(1))
#define R0_7 "%0, %1, %2, %3, %4, %5, %6, %7"
#define R8_11 "%8, %9, %10, %11"
#define R12_15 "%12, %13, %14, %15"
#define R16_23 "%16, %17, %18, %19, %20, %21, %22, %23"
#define R24_31 "%24, %25, %26, %27, %28, %29, %30, %31"

// c[64, N] += weight[64, 16] input[N, 16]^T, of which warp w of the four has rows 16 w to 16 w + 15 as `mma` has them, and
// c[4 j] to c[4 j + 3] are columns 8 j to 8 j + 7.
DEVICE void multiply(float (&c)[N / 2], u64 weight, u64 input) {
#if N == 16
    WGMMA("16", R0_7, "%8", "%9", "%10", SUMS8(0));
#elif N == 24
    WGMMA("24", R0_7 ", " R8_11, "%12", "%13", "%14", SUMS8(0), SUMS4(8));
#elif N == 32
    WGMMA("32", R0_7 ", " R8_11 ", " R12_15, "%16", "%17", "%18", SUMS8(0), SUMS8(8));
#elif N == 48
    WGMMA("48", R0_7 ", " R8_11 ", " R12_15 ", " R16_23, "%24", "%25", "%26", SUMS8(0), SUMS8(8), SUMS8(16));
#elif N == 64
    WGMMA("64", R0_7 ", " R8_11 ", " R12_15 ", " R16_23 ", " R24_31, "%32", "%33", "%34", SUMS8(0), SUMS8(8), SUMS8(16), SUMS8(24));
#endif
}

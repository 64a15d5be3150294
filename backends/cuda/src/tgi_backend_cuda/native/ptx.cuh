// What CUDA C++ has no word for without its headers, as PTX. `emulated.h` of the tests has the same functions for a CPU.
//
// BF16 is 1 for bfloat16 and 0 for float16: 16-bit numbers are u16 here.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

extern __shared__ __align__(1024) u8 shared[];
#define DEVICE static __device__ __forceinline__

// Programmatic dependent launch (PTX ISA, griddepcontrol). Before it, a kernel reads nothing that the kernel before it
// in the stream writes, and writes nothing at all. Everything earlier is complete too, because every kernel here waits.
DEVICE void grid_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may start as soon as every block has said so or ended.
DEVICE void grid_launch_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ptxas 13.0 gives an asynchronous copy whose shared address has a uniform part a broken descriptor ("illegal instruction"
// when it runs). The bit that no lane's mask has keeps addresses in ordinary registers.
DEVICE u32 shared_address(const void *at) {
    u32 lanes_below;
    asm("mov.u32 %0, %%lanemask_lt;" : "=r"(lanes_below));
    return ((u32)__cvta_generic_to_shared(shared) ^ lanes_below >> 31) + (u32)((const u8 *)at - shared);
}

#if EVICT_FIRST
DEVICE u64 streaming_policy() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
// 16 bytes past L1 into shared memory; zeros where not `valid`. Read once: they are the first to leave L2.
DEVICE void copy_stream(void *to, const void *from, bool valid, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid ? 16 : 0), "l"(policy)
                 : "memory");
}
#else
DEVICE u64 streaming_policy() { return 0; }
DEVICE void copy_stream(void *to, const void *from, bool valid, u64) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
#endif
DEVICE void copy_async(void *to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `PENDING` of this thread's groups are under way.
template <int PENDING> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// Into L2 only; `bytes` is a multiple of 16, `at` aligned to 16.
DEVICE void prefetch_l2(const void *at, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(bytes) : "memory");
#else
    for (u32 done = 0; done < bytes; done += 128) asm volatile("prefetch.global.L2 [%0];" ::"l"((const u8 *)at + done));
#endif
}

// Loads of what another kernel or block has just written: from L2, since L1 may hold the past.
DEVICE uint4 load_fresh16(const void *at) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
}
DEVICE u16 load_fresh(const u16 *at) {
    u16 v;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(at) : "memory");
    return v;
}
DEVICE u32 load_fresh(const u32 *at) {
    u32 v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}
DEVICE float load_fresh(const float *at) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(at) : "memory");
    return v;
}

// To another GPU, and 16 bytes that others may be writing: past all that might keep a copy.
DEVICE void send_number(u16 *to, u16 v) { asm volatile("st.relaxed.sys.global.u16 [%0], %1;" ::"l"(to), "h"(v) : "memory"); }
DEVICE uint4 load_arriving(const void *at) {
    u64 low, high;
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(low), "=l"(high) : "l"(at) : "memory");
    return make_uint4((u32)low, (u32)(low >> 32), (u32)high, (u32)(high >> 32));
}
// What the host or another GPU may change at any time.
DEVICE u32 load_flag(const u32 *at) {
    u32 v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}

#if BF16
#define MMA_TYPES "f32.bf16.bf16.f32"
DEVICE float widen(u16 v) { return __uint_as_float((u32)v << 16); }
DEVICE u16 narrow(float v) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}
DEVICE u32 narrow2(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
#else
#define MMA_TYPES "f32.f16.f16.f32"
DEVICE float widen(u16 v) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
    return r;
}
DEVICE u16 narrow(float v) {
    u16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}
DEVICE u32 narrow2(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
#endif

// c[16, 8] += a[16, 16] b[16, 8] (PTX ISA, mma.m16n8k16). With g = lane / 4 and q = lane % 4 a lane holds, as pairs of
// 16-bit numbers, a0 [g, 2q], a1 [g + 8, 2q], a2 [g, 2q + 8], a3 [g + 8, 2q + 8], b0 [2q, g], b1 [2q + 8, g], and
// as floats c0, c1 [g, 2q] and c2, c3 [g + 8, 2q].
DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col." MMA_TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The same where rows 8 to 15 of a are zero: c0 and c1 only.
DEVICE void mma_upper(float &c0, float &c1, u32 a0, u32 a2, u32 b0, u32 b1) {
    float nothing2, nothing3;
    asm volatile("mma.sync.aligned.m16n8k16.row.col." MMA_TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %12};"
                 : "=f"(c0), "=f"(c1), "=f"(nothing2), "=f"(nothing3)
                 : "r"(a0), "r"(0), "r"(a2), "r"(0), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(0.0f));
}
// Four 8 x 8 matrices of 16-bit numbers, transposed; lane i gives the address of row i % 8 of matrix i / 8 and gets of
// each matrix its [2q, g] and [2q + 1, g].
DEVICE uint4 load_transposed(const void *row) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(shared_address(row))
                 : "memory");
    return v;
}
DEVICE float power_of_2(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }
DEVICE float inverse_root(float v) { return 1.0f / sqrtf(v); }

#if HOPPER
#include "hopper.cuh"
#endif

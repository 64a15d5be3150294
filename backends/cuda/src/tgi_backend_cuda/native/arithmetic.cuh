// Arithmetic that needs no PTX: after `ptx.cuh`, or what stands in for it.

DEVICE float warp_sum(float v) {
#pragma unroll
    for (int step = 16; step; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}
DEVICE float warp_max(float v) {
#pragma unroll
    for (int step = 16; step; step /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, step));
    return v;
}
// Two 16-bit numbers of a row, normalized: rounded once before the norm's weight and once after it.
DEVICE u32 scaled(u32 pair, u32 weight, float scale) {
    const float low = widen(narrow(widen((u16)pair) * scale)), high = widen(narrow(widen((u16)(pair >> 16)) * scale));
    return narrow2(low * widen((u16)weight), high * widen((u16)(weight >> 16)));
}

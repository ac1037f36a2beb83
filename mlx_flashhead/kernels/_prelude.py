"""Text that the kernels share: names for either language, and common functions."""

# Elements of 16 bits are read as integers: vector loads of theirs are then plain
# integer vectors, and the address space of the source does not matter.
_LOADS = """
#define FLASHHEAD_LOAD(SPACE)                                              \\
    METAL_FUNC float load(const SPACE float* p, size_t i) {                \\
        return p[i];                                                       \\
    }                                                                      \\
    METAL_FUNC float load(const SPACE half* p, size_t i) {                 \\
        return float(as_type<half>(((const SPACE ushort*)p)[i]));          \\
    }                                                                      \\
    METAL_FUNC float load(const SPACE bfloat16_t* p, size_t i) {           \\
        return as_type<float>(uint(((const SPACE ushort*)p)[i]) << 16);    \\
    }
"""

METAL = (
    _LOADS
    + """
FLASHHEAD_LOAD(device)
FLASHHEAD_LOAD(constant)  // where MLX puts inputs of fewer than 8 elements
#undef FLASHHEAD_LOAD
"""
)

CUDA = (
    """
#define device
#define constant
#define threadgroup
#define thread
#define METAL_FUNC __device__ __forceinline__
using uint = unsigned int;
using ushort = unsigned short;
using ulong = unsigned long long;
using half = __half;
using bfloat16_t = __nv_bfloat16;
using atomic_uint = unsigned int;

#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define thread_index_in_simdgroup (threadIdx.x & 31)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)
#define threadgroup_barrier(flags) __syncthreads()
#define memory_order_relaxed 0
#define atomic_load_explicit(p, order) (*(p))
#define atomic_store_explicit(p, v, order) (*(p) = (v))
#define atomic_fetch_add_explicit(p, v, order) atomicAdd(p, v)
#define atomic_fetch_or_explicit(p, v, order) atomicOr(p, v)

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

template <typename T, typename U>
METAL_FUNC T as_type(U u) {
    static_assert(sizeof(T) == sizeof(U), "sizes differ");
    T t;
    memcpy(&t, &u, sizeof(T));
    return t;
}

// What Metal calls precise, CUDA is without being asked.
namespace precise {
METAL_FUNC float exp(float x) { return expf(x); }
METAL_FUNC float log(float x) { return logf(x); }
METAL_FUNC float tanh(float x) { return tanhf(x); }
}

METAL_FUNC uint popcount(uint v) { return __popc(v); }
METAL_FUNC uint mulhi(uint a, uint b) { return __umulhi(a, b); }

template <typename T>
METAL_FUNC T simd_shuffle_up(T v, ushort d) { return __shfl_up_sync(~0u, v, d); }
template <typename T>
METAL_FUNC T simd_shuffle_xor(T v, ushort m) { return __shfl_xor_sync(~0u, v, m); }

METAL_FUNC uint simd_sum(uint v) { return __reduce_add_sync(~0u, v); }
METAL_FUNC uint simd_min(uint v) { return __reduce_min_sync(~0u, v); }
METAL_FUNC float simd_sum(float v) {
    for (int m = 16; m; m /= 2) v += __shfl_xor_sync(~0u, v, m);
    return v;
}
METAL_FUNC float simd_max(float v) {
    for (int m = 16; m; m /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, m));
    return v;
}
METAL_FUNC uint simd_prefix_inclusive_sum(uint v) {
    for (int d = 1; d < 32; d *= 2) {
        uint up = __shfl_up_sync(~0u, v, d);
        v += (threadIdx.x & 31) >= d ? up : 0;
    }
    return v;
}
METAL_FUNC uint simd_prefix_exclusive_sum(uint v) {
    return simd_prefix_inclusive_sum(v) - v;
}
"""
    + _LOADS
    + "FLASHHEAD_LOAD()\n#undef FLASHHEAD_LOAD\n"
)

# Threads of a group that handles a long row, and of one for a short row.
LARGE_GROUP = 1024
SMALL_GROUP = 256

# One digit of a radix search: the bin in which a running count reaches a target.
BINS = """
constexpr constant int BINS = 2048;

template <int THREADS>
METAL_FUNC void clear_bins(threadgroup atomic_uint* bins, uint at) {
    for (int bin = at; bin < BINS; bin += THREADS) {
        atomic_store_explicit(&bins[bin], 0u, memory_order_relaxed);
    }
}

// The first bin at which the sum of the bins so far reaches target, which is at
// least 1. bin_at becomes {bin, sum of the bins before it, whether it was reached};
// if it is not, {last bin, 0, 0}. Every thread calls it, and it holds the barriers
// between filling the bins and clearing them again. sums has a word per simdgroup.
template <int THREADS>
METAL_FUNC void find_bin(
    threadgroup atomic_uint* bins, threadgroup uint* sums, threadgroup uint* bin_at,
    uint target, uint at, uint simd_lid, uint simd_gid) {
    static_assert(BINS % THREADS == 0, "every thread sums the same number of bins");
    static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole simdgroups, at most 32");
    constexpr int PER = BINS / THREADS;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint here = 0;
    for (int i = 0; i < PER; i++) {
        here += atomic_load_explicit(&bins[at * PER + i], memory_order_relaxed);
    }
    uint upto = simd_prefix_inclusive_sum(here);
    if (simd_lid == 31) {
        sums[simd_gid] = upto;
    }
    if (at == 0) {
        bin_at[0] = BINS - 1;
        bin_at[1] = 0;
        bin_at[2] = 0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint before = simd_sum(simd_lid < simd_gid ? sums[simd_lid] : 0u) + upto - here;
    if (before < target && target - before <= here) {
        int bin = at * PER;
        for (; bin < BINS - 1; bin++) {
            uint count = atomic_load_explicit(&bins[bin], memory_order_relaxed);
            if (target - before <= count) {
                break;
            }
            before += count;
        }
        bin_at[0] = bin;
        bin_at[1] = before;
        bin_at[2] = 1;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}
"""

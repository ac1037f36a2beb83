// Apple's dialect of C++, as far as the kernels use it, for a host compiler.
//
// Compiled twice. With METAL_ADDRESS_SPACES, nothing runs: address spaces are real and
// mixing them is an error, as on a Mac. Without, they vanish, so that the sanitizers see
// every access (all but constant: functions may be overloaded for it), and the text runs
// on the emulator (emulator.cpp), one fiber per thread.
#pragma once

// No header of C++'s library, which need not be there.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef METAL_ADDRESS_SPACES
#define device __attribute__((address_space(1)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define threadgroup
#endif
#define constant __attribute__((address_space(2)))
#define thread __attribute__((annotate("thread")))  // a keyword: no use as a name
#define METAL_FUNC inline __attribute__((always_inline))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef uint64_t ulong;
typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef uint uint4 __attribute__((ext_vector_type(4)));

// ---- the emulator's side -----------------------------------------------------------

// Deposits size bytes at this thread's place and waits for the rest of the simdgroup,
// all of which must come to the same line. Returns what the 32 lanes deposited, in
// slots of 8 bytes.
extern "C" const void* emu_exchange(const void* value, size_t size, unsigned line)
    __attribute__((convergent));
extern "C" void emu_barrier(unsigned flags, unsigned line) __attribute__((convergent));
extern "C" void emu_simdgroup_barrier(unsigned line) __attribute__((convergent));
extern "C" unsigned emu_lane();
extern "C" void* emu_shared(size_t size, unsigned slot);
extern "C" uintptr_t emu_buffer(unsigned index);
extern "C" uint emu_position(unsigned what, unsigned axis);
enum { EMU_LOAD, EMU_STORE, EMU_ADD, EMU_OR };
extern "C" uint emu_atomic(uint* p, uint value, unsigned operation);

namespace emu {
template <typename T>
struct Lanes {
  const uint64_t* slots;
  T operator[](unsigned lane) const {
    T value;
    memcpy(&value, slots + lane, sizeof(T));
    return value;
  }
};

template <typename T>
inline Lanes<T> exchange(T value, unsigned line) {
  static_assert(sizeof(T) <= 8, "a lane's slot has 8 bytes");
  return {(const uint64_t*)emu_exchange(&value, sizeof(T), line)};
}

template <typename T>
inline T& shared(unsigned slot) {
  return *(T*)emu_shared(sizeof(T), slot);
}

inline uint3 position(unsigned what) {
  return uint3{emu_position(what, 0), emu_position(what, 1), emu_position(what, 2)};
}
}  // namespace emu

// ---- Metal's side ------------------------------------------------------------------

namespace metal {

template <typename T, typename U>
inline T as_type(U u) {
  static_assert(sizeof(T) == sizeof(U), "as_type needs equal sizes");
  T t;
  memcpy(&t, &u, sizeof(T));
  return t;
}

// Values of 16 bits. Their methods cannot be called on objects in an address space,
// which is stricter than Metal.
struct half {
  uint16_t bits;
  operator float() const {
    uint sign = uint(bits & 0x8000) << 16;
    uint magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) {
      return as_type<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    }
    // Its subnormal numbers are none in 32 bits.
    float value = magnitude < 0x400 ? float(magnitude) * 0x1p-24f
                                    : as_type<float>((magnitude << 13) + (112u << 23));
    return sign ? -value : value;
  }
};
struct bfloat {
  uint16_t bits;
  operator float() const { return as_type<float>(uint(bits) << 16); }
};

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
enum memory_order { memory_order_relaxed };

inline void threadgroup_barrier(mem_flags flags, unsigned line = __builtin_LINE()) {
  emu_barrier(unsigned(flags), line);
}
inline void simdgroup_barrier(mem_flags, unsigned line = __builtin_LINE()) {
  emu_simdgroup_barrier(line);
}

enum atomic_uint : uint {};  // not a class, which no address space could hold
inline uint atomic_load_explicit(const threadgroup atomic_uint* p, memory_order) {
  return emu_atomic((uint*)p, 0, EMU_LOAD);
}
inline void atomic_store_explicit(threadgroup atomic_uint* p, uint v, memory_order) {
  emu_atomic((uint*)p, v, EMU_STORE);
}
inline uint atomic_fetch_add_explicit(threadgroup atomic_uint* p, uint v, memory_order) {
  return emu_atomic((uint*)p, v, EMU_ADD);
}
inline uint atomic_fetch_or_explicit(threadgroup atomic_uint* p, uint v, memory_order) {
  return emu_atomic((uint*)p, v, EMU_OR);
}

template <typename T>
inline T min(T a, T b) { return b < a ? b : a; }
template <typename T>
inline T max(T a, T b) { return a < b ? b : a; }

// Safe math leaves these to Apple's compiler, which may take approximations, so a
// kernel has to say precise::exp. The last bits differ between back-ends all the same.
#define EMU_PRECISE(NAME)                                             \
  template <typename T>                                               \
  T NAME(T) = delete;                                                 \
  namespace precise {                                                 \
  inline float NAME(float x) { return __builtin_##NAME##f(x); }       \
  }
EMU_PRECISE(exp)
EMU_PRECISE(exp2)
EMU_PRECISE(log)
EMU_PRECISE(log2)
EMU_PRECISE(tanh)
EMU_PRECISE(sqrt)
#undef EMU_PRECISE

inline uint popcount(uint x) { return __builtin_popcount(x); }
inline uint mulhi(uint a, uint b) { return uint(uint64_t(a) * b >> 32); }

#define EMU_REDUCE(NAME, EXPRESSION)                           \
  template <typename T>                                        \
  inline T NAME(T v, unsigned line = __builtin_LINE()) {       \
    auto lanes = emu::exchange(v, line);                       \
    T values[32];                                              \
    for (int i = 0; i < 32; i++) values[i] = lanes[i];         \
    for (int n = 16; n; n /= 2) {                              \
      for (int i = 0; i < n; i++) {                            \
        T a = values[i], b = values[i + n];                    \
        values[i] = EXPRESSION;                                \
      }                                                        \
    }                                                          \
    return values[0];                                          \
  }
EMU_REDUCE(simd_sum, a + b)
EMU_REDUCE(simd_min, b < a ? b : a)
EMU_REDUCE(simd_max, a < b ? b : a)
#undef EMU_REDUCE

template <typename T>
inline T simd_prefix_inclusive_sum(T v, unsigned line = __builtin_LINE()) {
  auto lanes = emu::exchange(v, line);
  T sum = 0;
  for (unsigned i = 0; i <= emu_lane(); i++) sum += lanes[i];
  return sum;
}
template <typename T>
inline T simd_prefix_exclusive_sum(T v, unsigned line = __builtin_LINE()) {
  auto lanes = emu::exchange(v, line);
  T sum = 0;
  for (unsigned i = 0; i < emu_lane(); i++) sum += lanes[i];
  return sum;
}
template <typename T>
inline T simd_shuffle_xor(T v, ushort mask, unsigned line = __builtin_LINE()) {
  return emu::exchange(v, line)[(emu_lane() ^ mask) & 31];
}
template <typename T>
inline T simd_shuffle_up(T v, ushort delta, unsigned line = __builtin_LINE()) {
  auto lanes = emu::exchange(v, line);
  // Undefined in Metal where there is no such lane: make it show.
  T nothing;
  memset(&nothing, 0xa5, sizeof(T));
  return emu_lane() >= delta ? lanes[emu_lane() - delta] : nothing;
}

}  // namespace metal

using namespace metal;
typedef bfloat bfloat16_t;
typedef half float16_t;

// What kernels call of ARM's instructions, as its manual has them, for processors that lack them.
#pragma once

#include <cstdint>

using float32x4_t = float __attribute__((vector_size(16)));
using int32x4_t = std::int32_t __attribute__((vector_size(16)));
using int8x16_t = std::int8_t __attribute__((vector_size(16)));
using uint8x16_t = std::uint8_t __attribute__((vector_size(16)));

inline int8x16_t vreinterpretq_s8_s32(int32x4_t value) { return int8x16_t(value); }
inline uint8x16_t vreinterpretq_u8_s32(int32x4_t value) { return uint8x16_t(value); }
template <class A>
inline int32x4_t emulated_dots(int32x4_t sums, A a, int8x16_t b) {
    for (int i = 0; i < 16; ++i) sums[i / 4] += a[i] * b[i];
    return sums;
}
inline int32x4_t vdotq_s32(int32x4_t sums, int8x16_t a, int8x16_t b) { return emulated_dots(sums, a, b); }
inline int32x4_t vusdotq_s32(int32x4_t sums, uint8x16_t a, int8x16_t b) { return emulated_dots(sums, a, b); }

// What recurrent kernels do with numbers in memory: bfloat16 and float32, whole vectors and the last few of a row.
#pragma once

#include <cstring>
#include <type_traits>

#include "_vector.hpp"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define MASKED 1
#else
#define MASKED 0
#endif

namespace perfkit {

struct Bf16 {
    std::uint16_t bits;
};
// float32 in memory, read as the bfloat16 nearest to it.
struct Rounded {
    float value;
};

using Unsigned = std::uint32_t __attribute__((vector_size(4 * L)));
using Halves = std::uint16_t __attribute__((vector_size(2 * L)));

INLINE Floats widened(Halves half) { return bits<Floats>(__builtin_convertvector(half, Unsigned) << 16); }

// To the nearest, ties to even; NaN stays one.
INLINE Halves narrowed(Floats x) {
#if defined(__AVX512BF16__)
    return bits<Halves>(_mm512_cvtneps_pbh(__m512(x)));
#else
    const Unsigned all_bits = bits<Unsigned>(x);
    const Unsigned rounded = (all_bits + 0x7fff + ((all_bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : (all_bits >> 16) | 0x40, Halves);
#endif
}

// Two vectors as the words of one.
INLINE Floats narrowed(Floats first, Floats second) {
#if defined(__AVX512BF16__)
    const __m512i low = _mm512_castsi256_si512(bits<__m256i>(narrowed(first)));
    return bits<Floats>(_mm512_inserti64x4(low, bits<__m256i>(narrowed(second)), 1));
#else
    const Halves both[] = {narrowed(first), narrowed(second)};
    return load<Floats>(both);
#endif
}

// L numbers as float32.
INLINE Floats get(const float* from) { return load<Floats>(from); }
INLINE Floats get(const Bf16* from) { return widened(load<Halves>(from)); }
INLINE Floats get(const Rounded* from) { return widened(narrowed(load<Floats>(from))); }
INLINE void put(float* to, Floats value) { store(to, value); }
INLINE void put(Bf16* to, Floats value) { store(to, narrowed(value)); }

// The first `count` of them, or L if there are more: what lies behind is not touched, and read as zero.
INLINE Floats get(const float* from, i64 count) {
    if (count >= L) return get(from);
#if MASKED
    return Floats(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from));
#else
    Floats value{};
    std::memcpy(&value, from, count * sizeof(float));
    return value;
#endif
}
INLINE Floats get(const Bf16* from, i64 count) {
    if (count >= L) return get(from);
#if MASKED
    return widened(bits<Halves>(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from)));
#else
    Halves value{};
    std::memcpy(&value, from, count * sizeof(Bf16));
    return widened(value);
#endif
}
INLINE Floats get(const Rounded* from, i64 count) { return widened(narrowed(get(&from->value, count))); }
INLINE void put(float* to, Floats value, i64 count) {
    if (count >= L) return put(to, value);
#if MASKED
    _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), __m512(value));
#else
    std::memcpy(to, &value, count * sizeof(float));
#endif
}
INLINE void put(Bf16* to, Floats value, i64 count) {
    if (count >= L) return put(to, value);
    const Halves half = narrowed(value);
#if MASKED
    _mm256_mask_storeu_epi16(to, __mmask16((1u << count) - 1), bits<__m256i>(half));
#else
    std::memcpy(to, &half, count * sizeof(Bf16));
#endif
}

// `count` numbers in the lanes from `first` on, the others as they are in `value`; and such lanes of it.
template <class T>
INLINE Floats get_lanes(Floats value, const T* from, i64 first, i64 count) {
#if MASKED
    const __mmask16 lanes = __mmask16(((1u << count) - 1) << first);
    if constexpr (sizeof(T) == 4) return Floats(_mm512_mask_loadu_ps(__m512(value), lanes, from - first));
    const Floats found = widened(bits<Halves>(_mm256_maskz_loadu_epi16(lanes, from - first)));
    return Floats(_mm512_mask_mov_ps(__m512(value), lanes, __m512(found)));
#else
    const Floats found = get(from, count);
    std::memcpy(reinterpret_cast<float*>(&value) + first, &found, count * sizeof(float));
    return value;
#endif
}
template <class T>
INLINE void put_lanes(T* to, Floats value, i64 first, i64 count) {
#if MASKED
    const __mmask16 lanes = __mmask16(((1u << count) - 1) << first);
    if constexpr (sizeof(T) == 4)
        _mm512_mask_storeu_ps(to - first, lanes, __m512(value));
    else
        _mm256_mask_storeu_epi16(to - first, lanes, bits<__m256i>(narrowed(value)));
#else
    Floats moved{};
    std::memcpy(&moved, reinterpret_cast<const float*>(&value) + first, count * sizeof(float));
    put(to, moved, count);
#endif
}

// One row of `count` numbers to another, converted; zeros up to `padded`.
template <class To, class From>
INLINE void copy_row(To* to, const From* from, i64 count, i64 padded) {
    // By vectors: a call takes longer for a short row. bfloat16 as it is: its NaNs and smallest numbers would change.
    if constexpr (std::is_same<To, From>::value && sizeof(To) == 2)
        std::memcpy(to, from, count * sizeof(To));
    else
        for (i64 k = 0; k < count; k += L) put(to + k, get(from + k, count - k), count - k);
    if (padded > count) std::memset(to + count, 0, (padded - count) * sizeof(To));
}

// A view of rows that lie `step` numbers apart from time to time and `row` from row to row.
template <class T>
struct Rows {
    T* data;
    i64 step, row;
    T* at(i64 t, i64 place) const { return data + t * step + place * row; }
};

}  // namespace perfkit

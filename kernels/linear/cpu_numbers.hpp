// Numbers as they lie in memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "_vector.hpp"
#include "cpu_problem.hpp"

#if defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define PERFKIT_BFLOAT16 1  // instructions that multiply such numbers
#else
#define PERFKIT_BFLOAT16 0
#endif

namespace {

using namespace perfkit;

#if defined(__AVX512F__)
// Which lanes of a vector are there, where `count` numbers are left.
INLINE __mmask16 lanes(i64 count) { return __mmask16((1u << std::clamp<i64>(count, 0, L)) - 1); }
#endif

// use(std::integral_constant<int, count>()), for 1 <= count <= MOST; of more, MOST.
template <int MOST, class Use>
INLINE void counted(i64 count, Use use) {
    if constexpr (MOST > 1)
        if (count < MOST) return counted<MOST - 1>(count, use);
    use(std::integral_constant<int, MOST>());
}

using Halves = std::uint16_t __attribute__((vector_size(2 * L)));

// Vectors of numbers as they lie in memory, and sum += a b, lane by lane or pair by pair.
struct Float32 {
    using Number = float;
    using Vector = Floats;
    static constexpr i64 STEP = L;
    static Vector take(const Number* at) { return load<Vector>(at); }
    static Vector take_part(const Number* at, i64 count) {
#if defined(__AVX512F__)
        return Vector(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), at));
#else
        Vector value{};
        for (i64 lane = 0; lane < count; ++lane) value[lane] = at[lane];
        return value;
#endif
    }
    static INLINE Vector held_of(Vector x) { return held(x); }
    static INLINE Floats add(Floats sum, Vector a, Vector b) { return sum + a * b; }
    static float wide(Number x) { return x; }
    static Number narrow(float x) { return x; }
    static INLINE void put(Number* at, Floats x) { store(at, x); }
};

float widened(std::uint16_t half) { return bits<float>(std::uint32_t(half) << 16); }
std::uint16_t rounded(float x) {  // to the nearest, ties to even; a NaN stays one
    const std::uint32_t whole = bits<std::uint32_t>(x);
    return x != x ? 0x7fc0 : std::uint16_t((whole + 0x7fff + (whole >> 16 & 1)) >> 16);
}

INLINE Halves rounded(Floats x) {
    const Ints whole = bits<Ints>(x), half = (whole + 0x7fff + (whole >> 16 & 1)) >> 16;
    return __builtin_convertvector((x != x ? Ints{} + 0x7fc0 : half) & 0xffff, Halves);
}

#if PERFKIT_BFLOAT16
// `count` lanes, as 16 bits in the lower half of each; zero beyond.
INLINE Ints halves_at(const std::uint16_t* at, i64 count) {
    return Ints(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(count), at)));
}
INLINE Ints halves_at(const float* at, i64 count) {
    const Halves half = rounded(Floats(_mm512_maskz_loadu_ps(lanes(count), at)));
    return Ints(_mm512_cvtepu16_epi32(__m256i(half)));
}

struct Bfloat16 {
    using Number = std::uint16_t;
    using Vector = Ints;
    static constexpr i64 STEP = 2 * L;
    static INLINE Vector take(const Number* at) { return load<Vector>(at); }
    static Vector take_part(const Number* at, i64 count) {
        return Vector(_mm512_maskz_loadu_epi16(__mmask32((std::uint64_t(1) << count) - 1), at));
    }
    static INLINE Vector held_of(Vector x) { return x; }
    static INLINE Floats add(Floats sum, Vector a, Vector b) {
        return Floats(_mm512_dpbf16_ps(__m512(sum), bits<__m512bh>(a), bits<__m512bh>(b)));
    }
    static float wide(Number x) { return widened(x); }
    static Number narrow(float x) { return rounded(x); }
    static INLINE void put(Number* at, Floats x) { store(at, rounded(x)); }
};
#else
struct Bfloat16 {
    using Number = std::uint16_t;
    using Vector = Floats;
    static constexpr i64 STEP = L;
    static INLINE Vector take(const Number* at) {
        return bits<Floats>(__builtin_convertvector(load<Halves>(at), Ints) << 16);
    }
    static Vector take_part(const Number* at, i64 count) {
        Halves value{};
        for (i64 lane = 0; lane < count; ++lane) value[lane] = at[lane];
        return bits<Floats>(__builtin_convertvector(value, Ints) << 16);
    }
    static INLINE Vector held_of(Vector x) { return x; }
    static INLINE Floats add(Floats sum, Vector a, Vector b) { return sum + a * b; }
    static float wide(Number x) { return widened(x); }
    static Number narrow(float x) { return rounded(x); }
    static INLINE void put(Number* at, Floats x) { store(at, rounded(x)); }
};
#endif

}  // namespace

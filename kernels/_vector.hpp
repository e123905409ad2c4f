// Vectors of PERFKIT_LANES 32-bit numbers, a register of them unless whoever includes this says how many, and what
// recurrent cells do with them.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// On ARM a register holds four numbers, and GCC keeps a vector of more in memory, all sums of products included.
#if !defined(PERFKIT_LANES) && defined(__AVX512F__)
#define PERFKIT_LANES 16
#elif !defined(PERFKIT_LANES) && defined(__ARM_NEON)
#define PERFKIT_LANES 4
#elif !defined(PERFKIT_LANES)
#define PERFKIT_LANES 8
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace perfkit {

using i64 = std::int64_t;

constexpr int L = PERFKIT_LANES;

using Ints = std::int32_t __attribute__((vector_size(4 * L)));
using Floats = float __attribute__((vector_size(4 * L)));

template <class V, class T>
INLINE V load(const T* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <class V, class T>
INLINE void store(T* to, V value) {
    std::memcpy(to, &value, sizeof value);
}
template <class To, class From>
INLINE To bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    return load<To>(&value);
}

// body(0) to body(N - 1), of constants: unlike what a loop indexes, what they index stays in registers.
template <class Body, int... I>
INLINE void each_of(std::integer_sequence<int, I...>, Body body) {
    (body(std::integral_constant<int, I>{}), ...);
}
template <int N, class Body>
INLINE void each(Body body) {
    each_of(std::make_integer_sequence<int, N>{}, body);
}

// use(std::integral_constant<int, count>()), for 1 <= count <= MOST; of more, MOST.
template <int MOST, class Use>
INLINE void counted(i64 count, Use use) {
    if constexpr (MOST > 1)
        if (count < MOST) return counted<MOST - 1>(count, use);
    use(std::integral_constant<int, MOST>());
}

INLINE Floats all(float value) { return Floats{} + value; }

// In a register: compilers read a number anew for each product, and there are fewer loads than products at a time.
template <class V>
INLINE V held(V value) {
#if defined(__AVX__)
    asm("" : "+v"(value));
#endif
    return value;
}

// NaN stays NaN: each comparison with it is false.
#if PERFKIT_LANES == 16 && defined(__AVX512F__)
INLINE Floats at_least(Floats low, Floats x) { return Floats(_mm512_max_ps(__m512(low), __m512(x))); }
INLINE Floats at_most(Floats high, Floats x) { return Floats(_mm512_min_ps(__m512(high), __m512(x))); }
#else
INLINE Floats at_least(Floats low, Floats x) { return x < low ? low : x; }
INLINE Floats at_most(Floats high, Floats x) { return x > high ? high : x; }
#endif

// a * b + c, rounded once on every processor. Where none has an instruction for it: the product is exact in float64, and
// of its sum with c, the last bit tells whether something was cut off, so that rounding it again goes the right way.
INLINE Floats fused(Floats a, Floats b, Floats c) {
#if PERFKIT_LANES == 16 && defined(__AVX512F__)
    return Floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif PERFKIT_LANES == 8 && defined(__AVX2__) && defined(__FMA__)
    return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif PERFKIT_LANES == 4 && defined(__ARM_FEATURE_FMA)
    return Floats(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
    Floats result;
    for (int lane = 0; lane < L; ++lane) {
#if defined(__FP_FAST_FMAF)
        result[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
#else
        const double product = double(a[lane]) * double(b[lane]), sum = product + double(c[lane]);
        const double part = sum - product, cut = (product - (sum - part)) + (double(c[lane]) - part);
        i64 found = bits<i64>(sum);
        if (cut != 0 && sum - sum == 0 && found % 2 == 0) found += (cut > 0) == (sum > 0) ? 1 : -1;
        result[lane] = float(bits<double>(found));
#endif
    }
    return result;
#endif
}

constexpr float ROUNDER = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
constexpr float LOG2_E = 1.44269504f;
constexpr float STEEPEST = 30.0f;

// 2^y for y clamped to [-30, 30]: 2^n (1 + r q(r)), n the nearest integer, r in [-1/2, 1/2], q fitted for the smallest
// relative error (9.4e-8 in exact arithmetic; 3e-7 with its roundings). Where the clamp acts, a sigmoid or tanh of it
// is within 1e-9 of its limit, and products of three such terms do not overflow.
INLINE Floats exp2(Floats y) {
    y = at_most(all(STEEPEST), at_least(all(-STEEPEST), y));
    const Floats shifted = y + ROUNDER;
    const Floats r = y - (shifted - ROUNDER);
    Floats p = r * 0.00132695190f + 0.00967129134f;
    p = p * r + 0.0555071086f;
    p = p * r + 0.240222469f;
    p = p * r + 0.693147004f;
    p = p * r + 1.0f;
    return bits<Floats>(bits<Ints>(p) + (bits<Ints>(shifted) << 23));
}

// sigmoid(x) = 1 / (1 + decay(x)) and tanh(x) = (1 - decay(2x)) / (1 + decay(2x)), decay(x) = e^-x.
INLINE Floats decay(Floats x) { return exp2(x * -LOG2_E); }
INLINE Floats decay_twice(Floats x) { return exp2(x * (-2 * LOG2_E)); }

constexpr i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

// Where to cut the batch for slices of about equal numbers of row-steps.
inline std::vector<i64> cut(const i64* batch_sizes, i64 steps, i64 batch, i64 slices) {
    std::vector<i64> cumulated(batch + 1);  // row-steps of the rows before b
    for (i64 t = 0; t < steps; ++t) ++cumulated[batch_sizes[t]];
    i64 length = 0;
    for (i64 b = batch; b > 0; --b) length += cumulated[b], cumulated[b] = length;  // of row b - 1
    cumulated[0] = 0;
    for (i64 b = 0; b < batch; ++b) cumulated[b + 1] += cumulated[b];
    if (slices > batch) slices = batch;
    std::vector<i64> found{0};
    for (i64 s = 1, b = 0; s < slices; ++s) {
        while (cumulated[b] * slices < cumulated[batch] * s) ++b;
        if (b > found.back() && b < batch) found.push_back(b);
    }
    found.push_back(batch);
    return found;
}

// Two slices at most per thread so that one which is held up can be helped, but none much smaller than what makes good
// use of each load of the weights.
inline std::vector<i64> cuts(const i64* batch_sizes, i64 steps, i64 batch, i64 threads) {
    constexpr i64 FEWEST = 16;
    return cut(batch_sizes, steps, batch, batch >= 2 * FEWEST * threads ? 2 * threads : threads);
}

}  // namespace perfkit

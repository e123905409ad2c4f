// Integer products of int8 weights, and how activations are quantized for them. Letters as in cpu_kernel.cpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

// FOURS: an instruction adds four products of bytes. BIASED: one of them unsigned.
#if defined(__AVX2__) && defined(__AVX512VNNI__)
#define FOURS 1
#define BIASED 1
#define PERFKIT_LANES 16
#define ROWS 4
#elif defined(__AVX2__) && defined(__AVXVNNI__)
#define FOURS 1
#define BIASED 1
#define PERFKIT_LANES 8
#define ROWS 2
#elif defined(__AVX2__)
#define FOURS 0
#define BIASED 0
#define PERFKIT_LANES 8
#define ROWS 4
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define FOURS 1
#define BIASED 0
#define PERFKIT_LANES 4
#define ROWS 4
#else
#define FOURS 0
#define BIASED 0
#if defined(__ARM_NEON)
#define PERFKIT_LANES 4
#else
#define PERFKIT_LANES 8
#endif
#define ROWS 1
#endif

#include "_dots.hpp"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace {

using namespace perfkit;

// Packed weights: for each panel of 16 units (the last may be narrower), for each gate, for each 4 columns, for each
// unit: 4 bytes. A vector load thus takes 4 columns of L units of one gate, and the next load of that gate the bytes that
// follow. Reads past a narrow panel find the next weights, or the 64 bytes of slack behind the matrix; those lanes are
// never used.

constexpr i64 PANEL = 16;

// How a quantized activation q in [-127, 127] is held. VNNI multiplies unsigned by signed bytes: it is given q + 128,
// and 128 times the sum of the channel's weights is taken off again. AVX2 multiplies pairs of 16-bit numbers, at the
// speed of its byte products without their saturation.
#if BIASED
using Activation = std::uint8_t;
constexpr int BIAS = 128;
#elif defined(__AVX2__)
using Activation = std::int16_t;
constexpr int BIAS = 0;
#else
using Activation = std::int8_t;
constexpr int BIAS = 0;
#endif

using Activations = Activation __attribute__((vector_size(sizeof(Activation) * L)));

// The lowest bits of each number, by instructions: compilers take them one by one.
INLINE Activations narrowed(Ints numbers) {
#if PERFKIT_LANES == 16
    return bits<Activations>(_mm512_cvtepi32_epi8(__m512i(numbers)));
#elif BIASED
    const __m256i low = __m256i(numbers & 0xff), pairs = _mm256_packus_epi32(low, low);  // of 0-3 twice, of 4-7 twice
    const __m128i words = _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0b1000));
    return bits<Activations>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
#elif defined(__AVX2__)
    const __m256i words = __m256i(numbers << 16 >> 16), pairs = _mm256_packs_epi32(words, words);
    return bits<Activations>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0b1000)));
#else
    return __builtin_convertvector(numbers, Activations);
#endif
}

#if FOURS
// sums + the products of four bytes with four signed ones, in each lane. On x86 as an instruction, not as what
// compilers know by name: that they compute into a copy of the sums, which leaves them too few registers.
#if PERFKIT_DOTS
INLINE void multiply(Ints& sums, Ints bytes, Ints weights) { sums = add_signed(sums, bytes, weights); }
#elif defined(PERFKIT_DPBUSD)
INLINE void multiply(Ints& sums, Ints bytes, Ints weights) { sums = PERFKIT_DPBUSD(sums, bytes, weights); }
#elif PERFKIT_LANES == 16
INLINE void multiply(Ints& sums, Ints bytes, Ints weights) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(weights));
}
#else
INLINE void multiply(Ints& sums, Ints bytes, Ints weights) {
    asm("{vex} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(bytes), "x"(weights));
}
#endif
#elif defined(__AVX2__)
// As an instruction for the same reason.
INLINE void add(__m256i& sums, __m256i numbers) { asm("vpaddd %1, %0, %0" : "+x"(sums) : "x"(numbers)); }
#endif

// sums[r][g] += the products of row r with L channels of gate g, summed over K4 groups of four columns.
//   x: R rows `stride` activations apart; w: the first of the channels; width: units in its panel; meanwhile: what is
//   called twice, where half of the products are under way and where all are.
template <int R, int G, class Meanwhile>
INLINE void dot(const Activation* x, i64 stride, const std::int8_t* w, i64 width, i64 K4, Ints (&sums)[R][G],
                Meanwhile meanwhile) {
    const i64 group = 4 * width, gate = K4 * group;
#if !FOURS && !defined(__AVX2__)
    for (int r = 0; r < R; ++r)
        for (int g = 0; g < G; ++g) {
            Ints sum = sums[r][g];
            for (i64 k = 0; k < K4; ++k)
                for (int lane = 0; lane < L; ++lane)
                    for (int j = 0; j < 4; ++j)
                        sum[lane] += std::int32_t(x[r * stride + 4 * k + j]) * w[k * group + g * gate + 4 * lane + j];
            sums[r][g] = sum;
        }
    meanwhile(), meanwhile();
#elif FOURS
    // In two sums each where there are so few that every instruction would wait for the last one's result.
    constexpr int CHAINS = R * G < 8 ? 2 : 1;
    Ints found[CHAINS][R][G] = {};
    each<R>([&](auto r) INLINE_LAMBDA { each<G>([&](auto g) INLINE_LAMBDA { found[0][r][g] = sums[r][g]; }); });
    const auto add = [&](auto chain, i64 k) INLINE_LAMBDA {
        Ints weights[G];
        each<G>([&](auto g) INLINE_LAMBDA { weights[g] = load<Ints>(w + k * group + g * gate); });
        each<R>([&](auto r) INLINE_LAMBDA {
            const Ints four = Ints{} + load<std::int32_t>(x + r * stride + 4 * k);  // columns, the same in all lanes
            each<G>([&](auto g) INLINE_LAMBDA { multiply(found[chain][r][g], four, weights[g]); });
        });
    };
    i64 k = 0;
    const auto add_to = [&](i64 end) INLINE_LAMBDA {
        for (; k + CHAINS <= end; k += CHAINS) each<CHAINS>([&](auto chain) INLINE_LAMBDA { add(chain, k + chain); });
    };
    add_to(K4 / 2);
    meanwhile();
    add_to(K4);
    if (k < K4) add(std::integral_constant<int, 0>{}, k);
    meanwhile();
    each<R>([&](auto r) INLINE_LAMBDA {
        each<G>([&](auto g) INLINE_LAMBDA {
            sums[r][g] = CHAINS == 2 ? found[0][r][g] + found[CHAINS - 1][r][g] : found[0][r][g];
        });
    });
#else
    // Each 32-bit lane of `low` (units 0 to 3) and `high` (4 to 7) holds the sum of two of the four columns. As many
    // gates at a time as leave sixteen registers room for them.
    constexpr int GATES = R == 1 ? G : R == 2 && G % 2 == 0 ? 2 : 1;
    each<G / GATES>([&](auto group_of_gates) INLINE_LAMBDA {
        constexpr int g0 = decltype(group_of_gates)::value * GATES;
        __m256i low[R][GATES] = {}, high[R][GATES] = {};
        const std::int8_t* at = w + g0 * gate;
        for (i64 k = 0; k < K4; ++k, at += group) {
            __m256i first[GATES], second[GATES];
            each<GATES>([&](auto g) INLINE_LAMBDA {
                first[g] = _mm256_cvtepi8_epi16(load<__m128i>(at + g * gate));
                second[g] = _mm256_cvtepi8_epi16(load<__m128i>(at + g * gate + 16));
            });
            each<R>([&](auto r) INLINE_LAMBDA {
                const __m256i four = _mm256_set1_epi64x(load<long long>(x + r * stride + 4 * k));
                each<GATES>([&](auto g) INLINE_LAMBDA {
                    add(low[r][g], _mm256_madd_epi16(four, first[g]));
                    add(high[r][g], _mm256_madd_epi16(four, second[g]));
                });
            });
        }
        each<R>([&](auto r) INLINE_LAMBDA {
            each<GATES>([&](auto g) INLINE_LAMBDA {
                const __m256i pairs = _mm256_hadd_epi32(low[r][g], high[r][g]);  // units 0 1 4 5 2 3 6 7
                sums[r][g0 + g] += Ints(_mm256_permute4x64_epi64(pairs, 0b11011000));
            });
        });
    });
    meanwhile(), meanwhile();
#endif
}

// Quantizes K numbers: scale = max(floor, largest magnitude) / 127, or `fixed` if that is positive; q = the nearest
// integer to x / scale, clamped to [-127, 127]. Returns the scale: NaN if any of the numbers is infinite or NaN, so
// that what they would turn into shows in the result. Writes whole vectors: q's stride is a multiple of L.
INLINE float quantize(const float* x, i64 K, float floor, float fixed, Activation* q) {
    const i64 whole = K - K % L;
    Floats rest{};
    if (K > whole) std::memcpy(&rest, x + whole, (K - whole) * sizeof(float));
    // Magnitudes compare as the integers that their bits are, infinity above all numbers and NaN above that.
    const auto magnitude = [](Floats value) INLINE_LAMBDA { return bits<Ints>(value) & 0x7fffffff; };
    Ints largest = magnitude(rest);
    for (i64 k = 0; k < whole; k += L) {
        const Ints next = magnitude(load<Floats>(x + k));
        largest = next > largest ? next : largest;
    }
    std::int32_t most_bits = 0;
    for (int lane = 0; lane < L; ++lane) most_bits = largest[lane] > most_bits ? largest[lane] : most_bits;
    const bool finite = most_bits < 0x7f800000;
    const float magnitude_of_most = bits<float>(most_bits), most = magnitude_of_most > floor ? magnitude_of_most : floor;
    const float scale = fixed > 0.0f ? fixed : most > 1e-30f ? most / 127.0f : 0.0f;
    const float inverse = fixed > 0.0f ? 1.0f / fixed : most > 1e-30f ? 127.0f / most : 0.0f;
    auto put = [&](Floats value, i64 k) INLINE_LAMBDA {
        const Floats clamped = at_most(all(127.0f), at_least(all(-127.0f), value * inverse));
        const Ints integer = bits<Ints>(clamped + ROUNDER) - bits<Ints>(all(ROUNDER)) + BIAS;
        store(q + k, narrowed(integer));
    };
    for (i64 k = 0; k < whole; k += L) put(load<Floats>(x + k), k);
    if (K > whole) put(rest, whole);
    return finite ? scale : std::numeric_limits<float>::quiet_NaN();
}

// What no quantized number is: it stands for NaN.
constexpr Activation NOT_A_NUMBER = Activation(BIAS - 128);

// Numbers in [-1, 1] at the scale 1/127, which is `quantize`'s of them with the floor 1.
INLINE Activations quantized(Floats x) {
    constexpr float ZERO = ROUNDER + BIAS;  // its lowest bits are those of BIAS
    const Floats shifted = x * 127.0f + ZERO, least = all(ZERO - 128);
#if PERFKIT_LANES == 16
    const Floats found = Floats(_mm512_max_ps(__m512(shifted), __m512(least)));  // the second one where there is a NaN
#else
    const Floats found = shifted > least ? shifted : least;
#endif
    return narrowed(bits<Ints>(found));
}

// Any numbers, at the scale of which this is the inverse, as `quantize` has it.
INLINE Activations quantized(Floats x, float inverse) {
    const Floats clamped = at_most(all(127.0f), at_least(all(-127.0f), x * inverse));
    const Ints found = bits<Ints>(clamped + ROUNDER) - bits<Ints>(all(ROUNDER)) + BIAS;
    return narrowed(x == x ? found : Ints{} + std::int32_t(NOT_A_NUMBER));
}

INLINE bool any_is_not_a_number(const Activation* q, i64 count) {
    Activations found{};
    i64 k = 0;
    for (; k + L <= count; k += L) found |= bits<Activations>(load<Activations>(q + k) == NOT_A_NUMBER);
    const Activations none{};
    bool any = std::memcmp(&found, &none, sizeof found) != 0;
    for (; k < count; ++k) any |= q[k] == NOT_A_NUMBER;
    return any;
}

// The first `count` of a vector, or all if that is more. On the way between other products no function may be called:
// none keeps their sums.
INLINE void store_some(float* to, Floats value, i64 count) {
    if (count >= L) return store(to, value);
#if PERFKIT_LANES == 16
    _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), __m512(value));
#else
    std::memcpy(to, &value, count * sizeof(float));
#endif
}

}  // namespace

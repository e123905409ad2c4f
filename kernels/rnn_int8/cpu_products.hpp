// Integer products of int8 weights, and how activations are quantized for them. Letters as in cpu_kernel.cpp.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__AVX512VNNI__)
#define BIASED 1
#define PERFKIT_LANES 16
#define ROWS 4
#elif defined(__AVX2__) && defined(__AVXVNNI__)
#define BIASED 1
#define PERFKIT_LANES 8
#define ROWS 2
#elif defined(__AVX2__)
#define BIASED 0
#define PERFKIT_LANES 8
#define ROWS 4
#else
#define BIASED 0
#define PERFKIT_LANES 8
#define ROWS 1
#endif

#include "_vector.hpp"

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

// sums[r][g] = the products of row r with L channels of gate g, summed over K4 groups of four columns.
//   x: R rows `stride` activations apart; w: the first of the channels; width: units in its panel.
template <int R, int G>
INLINE void dot(const Activation* x, i64 stride, const std::int8_t* w, i64 width, i64 K4, Ints (&sums)[R][G]) {
    const i64 group = 4 * width, gate = K4 * group;
#if !defined(__AVX2__)
    for (int r = 0; r < R; ++r)
        for (int g = 0; g < G; ++g) {
            Ints sum{};
            for (i64 k = 0; k < K4; ++k)
                for (int lane = 0; lane < L; ++lane)
                    for (int j = 0; j < 4; ++j)
                        sum[lane] += std::int32_t(x[r * stride + 4 * k + j]) * w[k * group + g * gate + 4 * lane + j];
            sums[r][g] = sum;
        }
#elif BIASED
    // In registers: the weights might, for all the compiler knows, lie where `sums` does. And in two sums each where
    // there are so few that every instruction would wait for the last one's result.
    constexpr int CHAINS = R * G < 8 ? 2 : 1;
    Ints found[CHAINS][R][G] = {};
    const auto add = [&](Ints (&to)[R][G], i64 k) INLINE_LAMBDA {
        Ints four[R];  // columns of each row, the same in all lanes
        for (int r = 0; r < R; ++r) four[r] = Ints{} + load<std::int32_t>(x + r * stride + 4 * k);
        for (int g = 0; g < G; ++g) {
            const Ints weights = load<Ints>(w + k * group + g * gate);
            for (int r = 0; r < R; ++r)
#if defined(__AVX512VNNI__)
                to[r][g] = Ints(_mm512_dpbusd_epi32(__m512i(to[r][g]), __m512i(four[r]), __m512i(weights)));
#else
                to[r][g] = Ints(_mm256_dpbusd_avx_epi32(__m256i(to[r][g]), __m256i(four[r]), __m256i(weights)));
#endif
        }
    };
    i64 k = 0;
    for (; k + CHAINS <= K4; k += CHAINS)
        for (int chain = 0; chain < CHAINS; ++chain) add(found[chain], k + chain);
    if (k < K4) add(found[0], k);
    for (int r = 0; r < R; ++r)
        for (int g = 0; g < G; ++g) sums[r][g] = CHAINS == 2 ? found[0][r][g] + found[CHAINS - 1][r][g] : found[0][r][g];
#else
    // Each 32-bit lane of `low` (units 0 to 3) and `high` (4 to 7) holds the sum of two of the four columns. As many
    // gates at a time as leave sixteen registers room for them.
    constexpr int GATES = R == 1 ? G : R == 2 && G % 2 == 0 ? 2 : 1;
    for (int g0 = 0; g0 < G; g0 += GATES) {
        __m256i low[R][GATES] = {}, high[R][GATES] = {};
        const std::int8_t* at = w + g0 * gate;
        for (i64 k = 0; k < K4; ++k, at += group) {
            __m256i four[R];
            for (int r = 0; r < R; ++r) four[r] = _mm256_set1_epi64x(load<long long>(x + r * stride + 4 * k));
            for (int g = 0; g < GATES; ++g) {
                const __m256i first = _mm256_cvtepi8_epi16(load<__m128i>(at + g * gate));
                const __m256i second = _mm256_cvtepi8_epi16(load<__m128i>(at + g * gate + 16));
                for (int r = 0; r < R; ++r) {
                    low[r][g] = _mm256_add_epi32(low[r][g], _mm256_madd_epi16(four[r], first));
                    high[r][g] = _mm256_add_epi32(high[r][g], _mm256_madd_epi16(four[r], second));
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int g = 0; g < GATES; ++g) {
                const __m256i pairs = _mm256_hadd_epi32(low[r][g], high[r][g]);  // units 0 1 4 5 2 3 6 7
                sums[r][g0 + g] = Ints(_mm256_permute4x64_epi64(pairs, 0b11011000));
            }
    }
#endif
}

// Quantizes K numbers: scale = max(floor, largest magnitude) / 127, or `fixed` if that is positive; q = the nearest
// integer to x / scale, clamped to [-127, 127]. Returns the scale: NaN if any of the numbers is infinite or NaN, so
// that what they would turn into shows in the result. Writes whole vectors: q's stride is a multiple of L.
INLINE float quantize(const float* x, i64 K, float floor, float fixed, Activation* q) {
    Floats largest{}, spoilt{};
    const i64 whole = K - K % L;
    Floats rest{};
    if (K > whole) std::memcpy(&rest, x + whole, (K - whole) * sizeof(float));
    auto look = [&](Floats value) {
        const Floats magnitude = bits<Floats>(bits<Ints>(value) & 0x7fffffff);
        largest = magnitude > largest ? magnitude : largest;
        spoilt += value * 0.0f;
    };
    for (i64 k = 0; k < whole; k += L) look(load<Floats>(x + k));
    look(rest);
    float most = floor, spoil = 0.0f;
    for (int lane = 0; lane < L; ++lane) {
        most = largest[lane] > most ? largest[lane] : most;
        spoil += spoilt[lane];
    }
    const float scale = fixed > 0.0f ? fixed : most > 1e-30f ? most / 127.0f : 0.0f;
    const float inverse = fixed > 0.0f ? 1.0f / fixed : most > 1e-30f ? 127.0f / most : 0.0f;
    auto put = [&](Floats value, i64 k) {
        const Floats clamped = at_most(all(127.0f), at_least(all(-127.0f), value * inverse));
        const Ints integer = bits<Ints>(clamped + ROUNDER) - bits<Ints>(all(ROUNDER)) + BIAS;
        store(q + k, __builtin_convertvector(integer, Activations));
    };
    for (i64 k = 0; k < whole; k += L) put(load<Floats>(x + k), k);
    if (K > whole) put(rest, whole);
    return scale + spoil;
}

}  // namespace

// Vectors of numbers in float32, and numbers in memory that are float32 or bfloat16.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "_thread_pool.hpp"
#include "_transpose.hpp"

namespace {

using namespace perfkit;

using Bytes = std::uint8_t __attribute__((vector_size(L)));
using Halves = std::uint16_t __attribute__((vector_size(2 * L)));

constexpr int DEAD = 255;
constexpr bool WIDE = L == 16;          // AVX-512, which has 32 registers; else there are 16
constexpr int STREAMS = 4;              // vectors of outputs, or windows of one, that are summed at once,
constexpr int CHANNELS = WIDE ? 4 : 2;  // of so many output channels
constexpr int PAIRS = 5;                // of 3x3 taps, the last one of a tap and zero
constexpr int TAPS = 9;                 // whose gradients are summed at once,
constexpr int PAIRED = WIDE ? 2 : 1;    // of so many output channels
constexpr i64 CACHED = 1 << 16;         // floats of planes made at a time: they stay in the second-level cache
constexpr i64 WORTH = 1 << 20;          // multiply-adds that are worth waking a thread for
constexpr i64 SLICES = 16;              // partial sums of the weights' gradients: as many whatever the threads,
constexpr i64 PARTIAL = 1 << 22;        // and so many floats at most

// Subtracting zero changes no number, adding it would change -0: so this is a broadcast and no more.
INLINE Floats same(float value) { return value - Floats{}; }

// NaN where either is.
INLINE Floats largest(Floats a, Floats b) {
#if defined(__AVX512F__)
    const __m512 most = _mm512_max_ps(__m512(a), __m512(b));
    const __mmask16 spoilt = _mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_UNORD_Q);
    return Floats(_mm512_mask_add_ps(most, spoilt, __m512(a), __m512(b)));
#else
    return (b > a) | (b != b) ? b : a;
#endif
}

// The same of four.
INLINE Floats largest(Floats a, Floats b, Floats c, Floats d) {
#if defined(__AVX512F__)
    const __m512 most = _mm512_max_ps(_mm512_max_ps(__m512(a), __m512(b)), _mm512_max_ps(__m512(c), __m512(d)));
    const __mmask16 spoilt = _mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_UNORD_Q) |
                             _mm512_cmp_ps_mask(__m512(c), __m512(d), _CMP_UNORD_Q);
    return Floats(_mm512_mask_mov_ps(most, spoilt, _mm512_set1_ps(__builtin_nanf(""))));
#else
    return largest(largest(a, b), largest(c, d));
#endif
}

// To the nearest, ties to even; a NaN stays one. (The instruction takes numbers below 2^-126 for zero.)
INLINE Halves halved(Floats x) {
#if defined(__AVX512F__) && defined(__AVX512BF16__)
    return bits<Halves>(_mm512_cvtneps_pbh(__m512(x)));
#else
    const Ints whole = bits<Ints>(x);
    const Ints rounded = (whole + 0x7fff + ((whole >> 16) & 1)) >> 16;
    return __builtin_convertvector((x != x ? Ints{} + 0x7fc0 : rounded) & 0xffff, Halves);
#endif
}

// Pairs of bfloat16 numbers in 32 bits: what they are made of, in float32, and sum + a_low b_low + a_high b_high.
INLINE Floats paired(Floats low, Floats high) {
    return bits<Floats>((bits<Ints>(low) >> 16 & 0xffff) | (bits<Ints>(high) & ~0xffff));
}
#if defined(__AVX512F__) && defined(__AVX512BF16__)
constexpr bool MULTIPLIES_PAIRS = true;
INLINE Floats add_pairs(Floats sum, Ints a, Ints b) {
    return Floats(_mm512_dpbf16_ps(__m512(sum), bits<__m512bh>(a), bits<__m512bh>(b)));
}
#else
constexpr bool MULTIPLIES_PAIRS = false;
INLINE Floats add_pairs(Floats sum, Ints, Ints) { return sum; }
#endif

INLINE float widened(std::uint16_t half) { return bits<float>(std::uint32_t(half) << 16); }

// The first `count` lanes, fewer than all; the others are zero, or left as they were.
INLINE Floats load_part(const float* from, i64 count) {
#if defined(__AVX512F__)
    return Floats(_mm512_maskz_loadu_ps(__mmask16((1 << count) - 1), from));
#else
    Floats value{};
    for (int lane = 0; lane < count; ++lane) value[lane] = from[lane];
    return value;
#endif
}
INLINE Halves load_part(const std::uint16_t* from, i64 count) {
#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512BW__)
    return Halves(_mm256_maskz_loadu_epi16(__mmask16((1 << count) - 1), from));
#else
    Halves value{};
    for (int lane = 0; lane < count; ++lane) value[lane] = from[lane];
    return value;
#endif
}
INLINE void store_part(std::uint16_t* to, Halves value, i64 count) {
#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512BW__)
    _mm256_mask_storeu_epi16(to, __mmask16((1 << count) - 1), __m256i(value));
#else
    for (int lane = 0; lane < count; ++lane) to[lane] = value[lane];
#endif
}
INLINE void store_part(float* to, Floats value, i64 count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, __mmask16((1 << count) - 1), __m512(value));
#else
    for (int lane = 0; lane < count; ++lane) to[lane] = value[lane];
#endif
}

// Numbers of either dtype.
struct Numbers {
    void* at;
    bool bfloat16;

    float* floats() const { return static_cast<float*>(at); }
    std::uint16_t* halves() const { return static_cast<std::uint16_t*>(at); }

    float operator[](i64 i) const { return bfloat16 ? widened(halves()[i]) : floats()[i]; }
    void set(i64 i, float value) const {
        if (bfloat16)
            halves()[i] = halved(same(value))[0];
        else
            floats()[i] = value;
    }
    // The first `count` lanes, or all if there are more than those.
    INLINE void put(i64 i, Floats value, i64 count) const {
        if (bfloat16) {
            const Halves rounded = halved(value);
            if (count >= L) return store(halves() + i, rounded);
            store_part(halves() + i, rounded, count);
        } else if (count >= L) {
            store(floats() + i, value);
        } else {
            store_part(floats() + i, value, count);
        }
    }
    INLINE Floats take(i64 i, i64 count) const {  // zeros beyond
        if (!bfloat16) return count >= L ? load<Floats>(floats() + i) : load_part(floats() + i, count);
        const Halves taken = count >= L ? load<Halves>(halves() + i) : load_part(halves() + i, count);
        return bits<Floats>(__builtin_convertvector(taken, Ints) << 16);
    }
};

// task(index) for each, on as many threads as the work is worth.
template <class Task>
void parallel(i64 tasks, Threads threads, i64 work, Task task) {
    ThreadPool::run(
        tasks, {std::min(threads.count, work / WORTH + 1), threads.parallel},
        [](void* context, long index) { (*static_cast<Task*>(context))(index); }, &task);
}

}  // namespace

// Products of unsigned bytes, which are activations on a grid, with signed ones, which are weights; and what comes
// before and after them: rounding, scales, bias, ReLU, the next layer's grid.
//
// L lanes of 32-bit numbers; N outputs; K products summed for one; PANEL outputs whose weights lie together.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__AVX2__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define PERFKIT_BYTES 512
#define PERFKIT_LANES 16
#elif defined(__AVX2__) && defined(__AVXVNNI__)
#define PERFKIT_BYTES 256
#define PERFKIT_LANES 8
#elif defined(__AVX2__)
#define PERFKIT_BYTES 2
#define PERFKIT_LANES 8
#elif defined(__ARM_NEON)
#define PERFKIT_BYTES 0
#define PERFKIT_LANES 4
#else
#define PERFKIT_BYTES 0
#define PERFKIT_LANES 8
#endif

#include "_dots.hpp"
#include "_thread_pool.hpp"
#include "_transpose.hpp"

#if PERFKIT_BYTES
#include <immintrin.h>
#endif

namespace {

using namespace perfkit;
using u8 = std::uint8_t;
using i8 = std::int8_t;

using Bytes = u8 __attribute__((vector_size(L)));
using Halves = std::uint16_t __attribute__((vector_size(2 * L)));

constexpr i64 PANEL = 16;
constexpr i64 BLOCK = 4 * PANEL;  // bytes of a panel's weights for four of K
constexpr bool WIDE = L == 16;

// sum + the products of the four bytes of each lane. Without VNNI two products are added in 16 bits: no byte of `a` may
// be above 127 then.
INLINE Ints add_products(Ints sum, Ints a, Ints w) {
#if PERFKIT_BYTES == 512
    return Ints(_mm512_dpbusd_epi32(__m512i(sum), __m512i(a), __m512i(w)));
#elif PERFKIT_BYTES == 256
    return Ints(_mm256_dpbusd_avx_epi32(__m256i(sum), __m256i(a), __m256i(w)));
#elif PERFKIT_BYTES == 2
    const __m256i pairs = _mm256_maddubs_epi16(__m256i(a), __m256i(w));
    return sum + Ints(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif PERFKIT_DOTS
    return add_unsigned(sum, a, w);
#else
    for (int j = 0; j < 4; ++j) sum += ((a >> 8 * j) & 255) * ((w << (24 - 8 * j)) >> 24);
    return sum;
#endif
}

INLINE Ints largest(Ints a, Ints b) { return a > b ? a : b; }

// The first `count` lanes, fewer than all; the others are zero, or left as they were.
INLINE Floats load_part(const float* from, i64 count) {
#if PERFKIT_BYTES == 512
    return Floats(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from));
#else
    Floats value{};
    std::memcpy(&value, from, count * sizeof *from);
    return value;
#endif
}
template <class V, class T>
INLINE void store_part(T* to, V value, i64 count) {
#if PERFKIT_BYTES == 512
    const __mmask16 lanes = __mmask16((1u << count) - 1);
    if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(to, lanes, bits<__m512>(value));
    if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(to, lanes, bits<__m256i>(value));
    if constexpr (sizeof(T) == 1) return _mm_mask_storeu_epi8(to, lanes, bits<__m128i>(value));
#endif
    std::memcpy(to, &value, count * sizeof *to);
}
template <class V, class T>
INLINE void store_lanes(T* to, V value, i64 count) {
    count >= L ? store(to, value) : store_part(to, value, count);
}

// q = round(x / scale) + zero, ties to even, within 0...top; x is near scale (q - zero). Divisions are products with the
// inverse of the scale, as in torch and in XLA. NaN becomes 0, as in torch, or `in_jax` the zero.
struct Grid {
    float inverse, low, high;
    std::int32_t zero, top;
    bool in_jax;

    Grid(double scale, i64 zero, i64 top, bool in_jax)
        : inverse(float(1.0 / scale)), low(float(-zero)), high(float(top - zero)), zero(std::int32_t(zero)),
          top(std::int32_t(top)), in_jax(in_jax) {}

    // Clamped before it is rounded, as the bounds are integers; AVX-512 takes off last what is above them.
    INLINE Bytes bytes(Floats x) const {
        x = x * inverse;
        if (in_jax) x = x == x ? x : Floats{};
#if PERFKIT_BYTES == 512
        const Ints rounded = Ints(_mm512_cvtps_epi32(_mm512_max_ps(__m512(x), _mm512_set1_ps(low)))) + zero;
        return Bytes(_mm_min_epu8(_mm512_cvtusepi32_epi8(__m512i(rounded)), _mm_set1_epi8(char(top))));
#else
        x = x > low ? x : all(low);
        x = x < high ? x : all(high);
        return __builtin_convertvector(bits<Ints>(x + ROUNDER) - bits<Ints>(all(ROUNDER)) + zero, Bytes);
#endif
    }

    // The same of a grid whose numbers are all that a byte can be, where AVX-512's conversions do the rest.
    bool is_whole() const { return zero == 0 && top == 255; }
    INLINE Bytes whole_bytes(Floats x) const {
#if PERFKIT_BYTES == 512
        const __m512 positive = _mm512_max_ps(__m512(x * inverse), _mm512_setzero_ps());  // zero where there is a NaN
        return Bytes(_mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(positive)));
#else
        return bytes(x);
#endif
    }

    // `count` numbers, and as many more as fill the last vector.
    void row(const float* from, i64 count, u8* to) const {
        const Grid grid = *this;  // of its own: what is written might be it, for all compilers know
        i64 k = 0;
        for (; k + L <= count; k += L) store(to + k, grid.bytes(load<Floats>(from + k)));
        if (k < count) store(to + k, grid.bytes(load_part(from + k, count - k)));
    }
};

constexpr i64 FLOAT32 = 0, UINT8 = 1, BFLOAT16 = 2;  // what x and y are made of
constexpr i64 SIZES[] = {4, 1, 2};

// To the nearest, ties to even; a NaN stays one.
INLINE Halves halved(Floats x) {
    const Ints whole = bits<Ints>(x), half = (whole + 0x7fff + ((whole >> 16) & 1)) >> 16;
    return __builtin_convertvector((x != x ? Ints{} + 0x7fc0 : half) & 0xffff, Halves);
}

// What becomes of sums: y = float(sum - zero * weights) * scale of x * scale of the output + bias, each operation
// rounded once; then ReLU, and the next layer's grid where y is of bytes. In JAX the scale of the output holds that of x.
struct Finish {
    float x_scale, low;
    const float *scales, *biases;       // (N,), in whole panels
    const std::int32_t* begin;          // what sums begin with: zero times the sum of the output's weights is taken off
    i64 kind;
    Grid grid;
    void* y;

    INLINE Floats relu(Floats value) const { return at_least(all(low), value); }
    // Lanes are outputs from n on.
    INLINE Floats across(Ints sum, i64 n) const {
        const Floats value = __builtin_convertvector(sum, Floats) * x_scale;
        return relu(value * load<Floats>(scales + n) + load<Floats>(biases + n));
    }
    // Lanes are places of output n.
    INLINE Floats scaled(Ints sum, i64 n) const {
        return __builtin_convertvector(sum, Floats) * x_scale * scales[n] + biases[n];
    }
    INLINE Floats along(Ints sum, i64 n) const { return relu(scaled(sum, n)); }
    INLINE void put(i64 at, Floats value, i64 count) const {
        if (kind == UINT8)
            store_lanes(static_cast<u8*>(y) + at, grid.bytes(value), count);
        else if (kind == FLOAT32)
            store_lanes(static_cast<float*>(y) + at, value, count);
        else
            store_lanes(static_cast<std::uint16_t*>(y) + at, halved(value), count);
    }
};

// Whole cache lines.
struct Release {
    void operator()(void* at) const { ::operator delete(at, std::align_val_t{64}); }
};
template <class T>
using Lines = std::unique_ptr<T[], Release>;
template <class T>
Lines<T> lines(i64 count) {
    return Lines<T>(static_cast<T*>(::operator new(sizeof(T) * (count + 64), std::align_val_t{64})));
}

// Weights as kernels read them, and what else of a layer depends on nothing but them.
struct Packed {
    i64 N, bytes;  // of the weights, whole cache lines
    char* at;

    static i64 size(i64 outputs, i64 bytes) { return bytes + 8 * round_up(outputs, PANEL) + BLOCK; }
    Packed(i64 outputs, i64 bytes, void* at) : N(round_up(outputs, PANEL)), bytes(bytes), at(static_cast<char*>(at)) {}

    i8* weights() const { return reinterpret_cast<i8*>(at); }
    std::int32_t* totals() const { return reinterpret_cast<std::int32_t*>(at + bytes); }  // of each output's weights
    float* scales() const { return reinterpret_cast<float*>(at + bytes + 4 * N); }

    // Returns whether all scales are positive and finite: what is larger before it is scaled is so after it.
    template <class Weight>
    bool tell(i64 outputs, i64 K, const float* scale, Weight weight) const {
        bool fine = true;
        std::memset(at + bytes, 0, 8 * N);
        for (i64 n = 0; n < outputs; ++n) {
            for (i64 k = 0; k < K; ++k) totals()[n] += weight(n, k);
            scales()[n] = scale[n];
            fine &= scale[n] > 0 && scale[n] <= std::numeric_limits<float>::max();
        }
        return fine;
    }
};

// The numbers of a call that are one for each output: its bias, and what its sums begin with.
struct PerOutput {
    Lines<float> biases;
    Lines<std::int32_t> begin;

    PerOutput(const Packed& packed, i64 outputs, const float* bias, i64 zero)
        : biases(lines<float>(packed.N)), begin(lines<std::int32_t>(packed.N)) {
        std::memset(biases.get(), 0, 4 * packed.N);
        if (bias) std::memcpy(biases.get(), bias, 4 * outputs);
        for (i64 n = 0; n < packed.N; ++n) begin[n] = -std::int32_t(zero) * packed.totals()[n];
    }
};

// task(index) for each, on as many threads as are useful.
template <class Task>
void parallel(i64 tasks, Threads threads, i64 useful, Task task) {
    ThreadPool::run(
        tasks, {std::min(threads.count, useful), threads.parallel},
        [](void* context, long index) { (*static_cast<Task*>(context))(index); }, &task);
}

// ---- Lanes are outputs, rows are of bytes that lie one after the other -----------------------------------------------

constexpr int ROWS = WIDE ? 6 : 4;       // whose sums
constexpr int VECTORS = L == 8 ? 2 : 4;  // with so many vectors of outputs are in registers, whole panels of them,
constexpr int MANY = WIDE ? 8 : 4;       // or with so many, of a single row

// Where vector g of the outputs from a panel's first one begins; a panel is K4 blocks.
INLINE i64 vector_at(i64 g, i64 K4) { return g * L / PANEL * K4 * BLOCK + g * L % PANEL * 4; }

// What the sums of G vectors of outputs begin with.
template <int R, int G>
INLINE void begin(const std::int32_t* from, Ints (&sums)[R][G]) {
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
        const Ints first = load<Ints>(from + g * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r][g] = first;
    }
}

// sums[r][g] += the products of K4 groups of four bytes from x[r] with G vectors of outputs; all_K4: of a whole panel.
template <int R, int G>
INLINE void add_dots(const u8* const (&x)[R], const i8* w, i64 K4, i64 all_K4, Ints (&sums)[R][G]) {
    for (i64 k = 0; k < K4; ++k, w += BLOCK) {
        Ints of[G];
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) of[g] = load<Ints>(w + vector_at(g, all_K4));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Ints here = Ints{} + load<std::int32_t>(x[r] + 4 * k);
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g) sums[r][g] = add_products(sums[r][g], here, of[g]);
        }
    }
}

// The instructions that the products were built for.
inline const char* instructions() {
#if PERFKIT_BYTES
    return PERFKIT_BYTES == 512 ? "AVX512-VNNI" : PERFKIT_BYTES == 256 ? "AVX-VNNI" : "AVX2";
#else
    return PERFKIT_DOTS == 2 ? "NEON-I8MM" : PERFKIT_DOTS ? "NEON-DOTPROD" : "plain C++";
#endif
}

}  // namespace

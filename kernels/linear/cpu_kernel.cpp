// act(x wᵀ + bias): products of rows, summed in float32 along the inputs.
//
// Letters: M rows of x, N outputs, K inputs, L lanes of a vector.
//
// Both x and w lie with K innermost, so both are read as whole vectors as they are: lanes are inputs, and a sum's lanes
// are added up once it is complete. So nothing is ever packed, copied or kept of the weights: what they are when a call
// comes is what it uses. ROWS x OUTPUTS sums are in registers; K is cut so that what they read stays in the cache.
#include "cpu_across.hpp"
#include "cpu_tiles.hpp"

namespace {

constexpr bool WIDE = L == 16;        // AVX-512, which has 32 registers; else there are 16
constexpr int ROWS = WIDE ? 6 : 2;    // of x, whose sums
constexpr int OUTPUTS = 4;            // with so many of w are in registers;
constexpr int FEW = 2;                // of so few rows
constexpr int MANY = WIDE ? 8 : 4;    // with more of w;
constexpr int MOST = WIDE ? 16 : 4;   // and of a single row, which is read anew for each of those, with still more
constexpr i64 WORTH = 1 << 17;        // multiply-adds that are worth waking a thread for
constexpr i64 ALL = 64;               // rows that each thread may read all of
constexpr i64 NEAR = 5 << 12;         // bytes of x that stay in the first-level cache,
constexpr i64 FAR = 1 << 19;          // and of w in the second-level cache

// to[n] += the sum of the lanes of sums[n], for n < N, of at most four.
template <int N>
INLINE void add_lanes(const Floats* sums, float* to) {
#if defined(__AVX512F__)
    constexpr int LAST = N - 1;
    const auto halves = [&](int n) INLINE_LAMBDA {
        const __m512 a(sums[n]), b(sums[n + 1 < N ? n + 1 : LAST]);
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const __m512 a = halves(0), b = halves(2 < N ? 2 : 0);
    __m512 found = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    found = _mm512_add_ps(found, _mm512_permute_ps(found, 0x4e));  // each quarter of it is of one of the sums
    found = _mm512_add_ps(found, _mm512_permute_ps(found, 0xb1));
    const __m512i first = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
    const __m128 four = _mm512_castps512_ps128(_mm512_permutexvar_ps(first, found));
    if constexpr (N == 4)
        _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), four));
    else
        for (int n = 0; n < N; ++n) to[n] += four[n];
#else
    for (int n = 0; n < N; ++n) {
        float sum = 0;
        for (int lane = 0; lane < L; ++lane) sum += sums[n][lane];
        to[n] += sum;
    }
#endif
}

// sums[m][n] = the products of inputs 0 to K - 1 of R rows of x with N of w.
template <class T, int R, int N>
INLINE void multiply(const typename T::Number* x, const typename T::Number* w, i64 step, i64 K, float* sums, i64 row) {
    Floats found[R][N] = {};
    const auto go = [&](auto take, i64 k) INLINE_LAMBDA {
        typename T::Vector of[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) of[n] = take(w + n * step + k);
#pragma GCC unroll 16
        for (int m = 0; m < R; ++m) {
            const typename T::Vector here = T::held_of(take(x + m * step + k));
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) found[m][n] = T::add(found[m][n], here, of[n]);
        }
    };
    i64 k = 0;
    for (; k + T::STEP <= K; k += T::STEP)
        go([](const typename T::Number* at) INLINE_LAMBDA { return T::take(at); }, k);
    if (k < K)
        go([left = K - k](const typename T::Number* at) INLINE_LAMBDA { return T::take_part(at, left); }, k);
#pragma GCC unroll 16
    for (int m = 0; m < R; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; n += 4)
            n + 4 <= N ? add_lanes<(N < 4 ? 1 : 4)>(&found[m][n], &sums[m * row + n])
                       : add_lanes<(N % 4 ? N % 4 : 1)>(&found[m][n], &sums[m * row + n]);
}

template <class T>
struct Pass {
    using Number = typename T::Number;
    const PerfkitLinear& p;
    const Number *x, *w, *bias;
    Number* y;

    template <int R, int N>
    void tiles(i64 first, i64 last, i64 from, i64 to, i64 k, i64 length, float* sums, i64 row) const {
        for (i64 m = first; m < last; m += R)
            counted<R>(last - m, [&](auto rows) INLINE_LAMBDA {
                for (i64 n = from; n < to; n += N)
                    counted<N>(to - n, [&](auto outputs) INLINE_LAMBDA {
                        multiply<T, decltype(rows)::value, decltype(outputs)::value>(
                            x + m * p.inputs + k, w + n * p.inputs + k, p.inputs, length, sums + m * row + n, row);
                    });
            });
    }

    // Rows `first` to `last` of x with outputs `from` to `to`; `sums` is for as many.
    void run(i64 first, i64 last, i64 from, i64 to, float* sums) const {
        const i64 row = to - from, K = p.inputs;
        for (i64 m = 0; m < last - first; ++m)
            for (i64 n = 0; n < row; ++n) sums[m * row + n] = bias ? T::wide(bias[from + n]) : 0.0f;
        const i64 size = sizeof(Number);
        const bool few = last - first <= FEW;
        const i64 pieces = few ? 1 : (K * ROWS * size + NEAR - 1) / NEAR;
        const i64 piece = round_up((K + pieces - 1) / pieces, T::STEP);
        const i64 near = few ? row : std::max<i64>(OUTPUTS, FAR / size / piece / OUTPUTS * OUTPUTS);
        float* const origin = sums - first * row - from;
        i64 begin = from;
        for (; last - first == 1 && begin + MOST <= to; begin += MOST)
            multiply<T, 1, MOST>(x + first * K, w + begin * K, K, K, origin + first * row + begin, row);
        for (; begin < to; begin += near)
            for (i64 k = 0; k < K; k += piece) {
                const i64 end = std::min(begin + near, to), length = std::min(piece, K - k);
                few ? tiles<FEW, MANY>(first, last, begin, end, k, length, origin, row)
                    : tiles<ROWS, OUTPUTS>(first, last, begin, end, k, length, origin, row);
            }
        const Floats low = p.relu ? Floats{} : all(-__builtin_inff());
        for (i64 m = first; m < last; ++m) {
            const float* const of = sums + (m - first) * row;
            Number* const to_y = y + m * p.outputs + from;
            i64 n = 0;
            for (; n + L <= row; n += L) T::put(to_y + n, at_least(low, load<Floats>(of + n)));
            for (; n < row; ++n) to_y[n] = T::narrow(p.relu && of[n] < 0 ? 0.0f : of[n]);
        }
    }
};

template <class T>
void linear(const PerfkitLinear& p, const Pass<T>& pass, Threads threads) {
    const i64 work = p.rows * p.outputs * p.inputs, useful = std::min(threads.count, work / WORTH + 1);
    // by outputs where there are few rows, and fewer than those, so that each thread reads a part of the weights only
    const bool wide = p.rows <= std::max<i64>(2 * ROWS, std::min(p.outputs, ALL));
    const i64 across = wide ? std::min(useful, (p.outputs + MANY - 1) / MANY) : 1;
    const i64 down = across > 1 ? 1 : std::min(useful > 1 ? 2 * useful : 1, (p.rows + ROWS - 1) / ROWS);
    const i64 columns = (p.outputs + across * MANY - 1) / (across * MANY) * MANY;
    const i64 rows = (p.rows + down * ROWS - 1) / (down * ROWS) * ROWS;
    const std::unique_ptr<float[]> sums(new float[across * down * columns * rows]);
    const auto task = [&](i64 s) {
        const i64 first = s / across * rows, from = s % across * columns;
        if (first < p.rows && from < p.outputs)
            pass.run(first, std::min(first + rows, p.rows), from, std::min(from + columns, p.outputs),
                     &sums[s * columns * rows]);
    };
    ThreadPool::run(
        across * down, {useful, threads.parallel},
        [](void* context, long index) { (*static_cast<decltype(task)*>(context))(index); },
        const_cast<void*>(static_cast<const void*>(&task)));
}

}  // namespace

extern "C" int perfkit_linear(const PerfkitLinear* p, void* x, void* w, void* bias, void* y,
                              perfkit::Threads threads) try {
    const auto run = [&](auto type) {
        using T = decltype(type);
        using Number = typename T::Number;
        const auto at = [](void* given) { return static_cast<Number*>(given); };
#if PERFKIT_TILES
        if (by_tiles(*p)) {
            std::vector<float> biases(p->outputs + L);
            for (i64 n = 0; bias && n < p->outputs; ++n) biases[n] = T::wide(at(bias)[n]);
            return linear_by_tiles(*p, x, w, biases.data(), y, threads);
        }
#endif
        linear<T>(*p, {*p, at(x), at(w), at(bias), at(y)}, threads);
    };
    p->bfloat16 ? run(Bfloat16()) : run(Float32());
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

extern "C" int perfkit_linear_has_across(std::int64_t bfloat16) {
#if defined(__AVX512F__)
    return !bfloat16 || PERFKIT_BFLOAT16;
#else
    return 0;
#endif
}

extern "C" int perfkit_linear_across(const PerfkitLinear* p, void* x, void* w, const float* bias, void* y,
                                     perfkit::Threads threads) try {
#if PERFKIT_TILES
    if (by_tiles(*p)) {
        std::vector<float> biases(p->outputs + L);
        std::copy(bias, bias + p->outputs, biases.begin());
        linear_by_tiles(*p, x, w, biases.data(), y, threads);
        return 0;
    }
#endif
#if defined(__AVX512F__)
    const auto run = [&](auto type) {
        using T = decltype(type);
        const AcrossPass<T> pass{*p, static_cast<const typename T::Number*>(x),
                                 static_cast<const typename T::Weight*>(w), bias, y};
        linear_across(pass, threads);
        return 0;
    };
    if (!p->bfloat16) return run(Singles());
#if PERFKIT_BFLOAT16
    return p->wide_weight ? run(Pairs<float>()) : run(Pairs<std::uint16_t>());
#endif
#endif
    return 2;
} catch (const std::bad_alloc&) {
    return 1;
}

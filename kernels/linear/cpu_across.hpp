// act(x w + bias) with w as JAX has it, (K, N): lanes are outputs.
//
// One number of x times a vector of weights, or in bfloat16 two neighbours of x times two rows of weights, interleaved
// on the way. Few rows read each weight once, as it lies, and threads share the inputs; of many rows a block of weights
// is made ready once for all of them. Nothing is kept of the weights from call to call.
#pragma once

#include "cpu_numbers.hpp"

#if defined(__AVX512F__)

namespace {

constexpr int FEWEST = 4;            // rows that share a vector of weights as it is read
constexpr int HIGH = 6, ACROSS = 4;  // rows and vectors of outputs whose sums are in registers
constexpr i64 DEEP_BYTES = 1 << 15;  // of weights made ready: they stay in the first-level cache
constexpr i64 NEAR_ROWS = 32;        // of weights that are read side by side, where they are long
constexpr i64 WORTH_A_THREAD = 1 << 17;  // multiply-adds

// How numbers of x and of w are multiplied: STEP inputs at a time.
struct Singles {
    using Number = float;
    using Weight = float;
    using Vector = Floats;
    static constexpr i64 STEP = 1;
    static INLINE Vector spread(const Number* x) { return all(*x); }
    static INLINE Vector spread_last(const Number* x) { return all(*x); }
    static INLINE Vector take(const Weight* w, i64, i64 count) { return Vector(_mm512_maskz_loadu_ps(lanes(count), w)); }
    static INLINE Vector take_last(const Weight* w, i64 count) { return take(w, 0, count); }
    static INLINE Floats add(Floats sum, Vector a, Vector b) { return sum + a * b; }
};

#if PERFKIT_BFLOAT16
template <class Weight_>
struct Pairs {
    using Number = std::uint16_t;
    using Weight = Weight_;
    using Vector = Ints;
    static constexpr i64 STEP = 2;
    static INLINE Vector spread(const Number* x) { return Vector{} + load<std::int32_t>(x); }
    static INLINE Vector spread_last(const Number* x) { return Vector{} + std::int32_t(*x); }
    static INLINE Vector take(const Weight* w, i64 row, i64 count) {
        return halves_at(w, count) | halves_at(w + row, count) << 16;
    }
    static INLINE Vector take_last(const Weight* w, i64 count) { return halves_at(w, count); }
    static INLINE Floats add(Floats sum, Vector a, Vector b) { return Bfloat16::add(sum, a, b); }
};
#endif

template <class T>
struct AcrossPass {
    using Number = typename T::Number;
    using Vector = typename T::Vector;

    const PerfkitLinear& p;
    const Number* x;
    const typename T::Weight* w;
    const float* bias;
    void* y;

    static constexpr i64 DEEP = DEEP_BYTES / sizeof(Vector) / ACROSS * T::STEP;

    // Rows `first` to `last` with outputs `from` to `to`, ACROSS vectors of them at most. `sums` is for as many.
    void many(i64 first, i64 last, i64 from, i64 to, float* sums) const {
        const i64 vectors = to - from > L ? ACROSS : 1, row = vectors * L;
        alignas(64) Vector ready[DEEP / T::STEP * ACROSS];
        for (i64 m = 0; m < last - first; ++m)
            for (i64 n = 0; n < row; ++n) sums[m * row + n] = from + n < to ? bias[from + n] : 0.0f;
        for (i64 k = 0; k < p.inputs; k += DEEP) {
            const i64 length = std::min(DEEP, p.inputs - k);
            for (i64 i = 0; i < length; i += T::STEP)
                for (i64 v = 0; v < vectors; ++v)
                    ready[i / T::STEP * vectors + v] = weights(k + i, from + v * L, k + length, to);
            const auto take = [&](i64 i, i64 v) INLINE_LAMBDA { return ready[i / T::STEP * vectors + v]; };
            for (i64 m = first; m < last; m += HIGH)
                counted<HIGH>(last - m, [&](auto rows) INLINE_LAMBDA {
                    constexpr int R = decltype(rows)::value;
                    const Number* const of = x + m * p.inputs + k;
                    float* const to_sums = sums + (m - first) * row;
                    vectors == 1 ? multiply<R, 1>(of, length, take, to_sums, row)
                                 : multiply<R, ACROSS>(of, length, take, to_sums, row);
                });
        }
        for (i64 m = first; m < last; ++m)
            for (i64 n = from; n < to; n += L)
                put(load<Floats>(sums + (m - first) * row + n - from), m * p.outputs + n, to - n);
    }

    // All rows, FEWEST at most, with inputs `begin` to `end`, added to `sums`: rows of `row` numbers.
    void few(i64 begin, i64 end, float* sums, i64 row) const {
        counted<FEWEST>(p.rows, [&](auto rows) INLINE_LAMBDA {
            constexpr int R = decltype(rows)::value, V = R > 2 ? ACROSS : 2 * ACROSS;
            const i64 piece = p.outputs > V * L ? NEAR_ROWS : end - begin;
            for (i64 k = begin; k < end; k += piece)
                for (i64 n = 0; n < p.outputs; n += V * L) {
                    const i64 stop = std::min(k + piece, end);
                    const auto take = [&](i64 i, i64 v) INLINE_LAMBDA { return weights(k + i, n + v * L, stop, p.outputs); };
                    p.outputs - n > L ? multiply<R, V>(x + k, stop - k, take, sums + n, row)
                                      : multiply<R, 1>(x + k, stop - k, take, sums + n, row);
                }
        });
    }

    // ReLU, and up to a vector of a row into y, from place `at` on.
    INLINE void put(Floats sum, i64 at, i64 count) const {
        const Floats value = at_least(p.relu ? Floats{} : all(-__builtin_inff()), sum);
        const __mmask16 mask = lanes(count);
        if (!p.bfloat16 || p.wide_y) return _mm512_mask_storeu_ps(static_cast<float*>(y) + at, mask, __m512(value));
#if PERFKIT_BFLOAT16
        _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(y) + at, mask, __m256i(rounded(value)));
#endif
    }

  private:
    // Of the STEP inputs from k on, those before `end`, and outputs from n on, those before `to`.
    INLINE Vector weights(i64 k, i64 n, i64 end, i64 to) const {
        const auto at = w + k * p.outputs + n;
        return k + T::STEP <= end ? T::take(at, p.outputs, to - n) : T::take_last(at, to - n);
    }

    // sums += the products of `length` inputs of R rows of x with V vectors of weights.
    template <int R, int V, class Take>
    INLINE void multiply(const Number* of, i64 length, Take take, float* sums, i64 row) const {
        Floats found[R][V];
        for (int m = 0; m < R; ++m)
            for (int v = 0; v < V; ++v) found[m][v] = load<Floats>(sums + m * row + v * L);
        const auto go = [&](auto spread, i64 k) INLINE_LAMBDA {
            Vector here[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) here[v] = take(k, v);
#pragma GCC unroll 8
            for (int m = 0; m < R; ++m) {
                const Vector number = spread(of + m * p.inputs + k);
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) found[m][v] = T::add(found[m][v], number, here[v]);
            }
        };
        const i64 whole = length / T::STEP * T::STEP;
        for (i64 k = 0; k < whole; k += T::STEP) go([](const Number* at) INLINE_LAMBDA { return T::spread(at); }, k);
        if (whole < length) go([](const Number* at) INLINE_LAMBDA { return T::spread_last(at); }, whole);
        for (int m = 0; m < R; ++m)
            for (int v = 0; v < V; ++v) store(sums + m * row + v * L, found[m][v]);
    }
};

template <class Task>
void each_across(i64 tasks, Threads threads, Task task) {
    ThreadPool::run(
        tasks, threads, [](void* context, long index) { (*static_cast<Task*>(context))(index); }, &task);
}

template <class T>
void linear_across(const AcrossPass<T>& pass, Threads threads) {
    const PerfkitLinear& p = pass.p;
    const i64 useful = std::min(threads.count, p.rows * p.outputs * p.inputs / WORTH_A_THREAD + 1);
    const i64 block = ACROSS * L;
    if (p.rows <= FEWEST) {
        const i64 row = round_up(p.outputs, 2 * block), slice = round_up((p.inputs + useful - 1) / useful, 2);
        const std::unique_ptr<float[]> sums(new float[useful * p.rows * row]());
        each_across(useful, {useful, threads.parallel}, [&](i64 s) {
            if (s * slice < p.inputs)
                pass.few(s * slice, std::min((s + 1) * slice, p.inputs), &sums[s * p.rows * row], row);
        });
        for (i64 m = 0; m < p.rows; ++m)
            for (i64 n = 0; n < p.outputs; n += L) {
                Floats sum = Floats(_mm512_maskz_loadu_ps(lanes(p.outputs - n), pass.bias + n));
                for (i64 s = 0; s < useful; ++s) sum += load<Floats>(&sums[(s * p.rows + m) * row + n]);
                pass.put(sum, m * p.outputs + n, p.outputs - n);
            }
        return;
    }
    const i64 across = (p.outputs + block - 1) / block;
    const i64 down = across % useful ? std::min(2 * useful, (p.rows + HIGH - 1) / HIGH) : 1;
    const i64 rows = round_up((p.rows + down - 1) / down, HIGH);
    const std::unique_ptr<float[]> sums(new float[across * down * rows * block]);
    each_across(across * down, {useful, threads.parallel}, [&](i64 task) {
        const i64 first = task / across * rows, from = task % across * block;
        if (first < p.rows)
            pass.many(first, std::min(first + rows, p.rows), from, std::min(from + block, p.outputs),
                      &sums[task * rows * block]);
    });
}

}  // namespace

#endif

// The forward pass over NHWC: lanes are output channels, which stand next to each other in y.
//
// A vector of weights times one number of x, for the windows of some outputs at a time, whose sums are in registers.
// Nothing is transposed, and x needs no copy but one with its padding around it. The numbers that a row of taps sees lie
// side by side: in bfloat16 two of them are multiplied and added to a sum in one instruction.
#pragma once

#include "cpu_forward.hpp"

#if defined(__AVX512F__)

namespace {

constexpr i64 MOST_CHANNELS = 4;  // vectors of output channels that are summed at once

// Where it is taken: enough registers, and few lanes that no channel fills.
INLINE bool by_channels(const Shape& p) {
    return p.channels_last && p.x_c == 1 && 4 * p.O >= 3 * round_up(p.O, L);
}

// What is multiplied at a time: one tap, or two that are neighbours in x, as those of a row of the kernel are.
struct Steps {
    struct Taps {
        i64 offset;          // of the first one's number, from an output's
        i64 weight, second;  // where their weights lie, of the first output channel; -1 where there is no second
    };
    std::vector<Taps> all;
    std::vector<i64> offsets;
    i64 pairs = 0;  // of two taps; they come first

    Steps(const Shape& p, i64 pitch, bool paired) {
        const bool whole = p.dilation_w == 1 || p.kernel_width == 1;
        const i64 runs = whole ? 1 : p.kernel_width, length = p.kernel_width / runs * p.I;
        for (int single = !paired; single < 2; ++single) {
            for (i64 h = 0; h < p.kernel_height; ++h)
                for (i64 w = 0; w < runs; ++w)
                    for (i64 i = 0; i < length; i += 1 + paired) {
                        const bool second = paired && i + 1 < length;
                        if (second == bool(single)) continue;
                        const auto weight = [&](i64 i) { return h * p.w_h + (w + i / p.I) * p.w_w + i % p.I * p.w_i; };
                        const i64 offset = h * p.dilation_h * pitch + w * p.dilation_w * p.I + i;
                        all.push_back({offset, weight(i), second ? weight(i + 1) : -1});
                    }
            if (!single) pairs = all.size();
        }
        for (const Taps& taps : all) offsets.push_back(taps.offset);
    }
};

// Weights as they are read: for each block of channels and step, vectors of float32, or of pairs of bfloat16.
struct Weights {
    const i64 vectors, steps;  // of a group's channels; of each block
    const Lines own;

    Weights(const Shape& p, const Steps& all, const Numbers& from, bool paired)
        : vectors(Shape::parts(p.O, L)), steps(all.all.size()), own(lines(p.groups * vectors * steps * L)) {
        float* to = own.get();
        for (i64 group = 0; group < p.groups; ++group)
            for (i64 v = 0; v < vectors; v += wide(v))
                for (const Steps::Taps& taps : all.all)
                    for (i64 k = v; k < v + wide(v); ++k, to += L) {
                        const Ints first = bits<Ints>(channels(p, from, taps.weight, group, k));
                        if (!paired)
                            store(to, first);
                        else if (taps.second < 0)
                            store(to, Ints((first >> 16) & 0xffff));
                        else
                            store(to, Ints(((first >> 16) & 0xffff) |
                                           bits<Ints>(channels(p, from, taps.second, group, k))));
                    }
    }

    // Vectors in the block that begins with v: 4, 2 or 1.
    i64 wide(i64 v) const {
        const i64 left = vectors - v;
        return left >= MOST_CHANNELS ? MOST_CHANNELS : left >= 2 ? 2 : 1;
    }

    const float* block(i64 group, i64 v) const { return &own[(group * vectors + v) * steps * L]; }

  private:
    static Floats channels(const Shape& p, const Numbers& from, i64 at, i64 group, i64 vector) {
        const i64 first = group * p.O + vector * L, count = std::min<i64>(L, p.O - vector * L);
        if (p.w_o == 1) return from.take(at + first, count);
        Floats found{};
        for (i64 lane = 0; lane < count; ++lane) found[lane] = from[at + (first + lane) * p.w_o];
        return found;
    }
};

// sums[n][v] += the products of what lies at at[n] with `weights`. Intrinsics, since compilers that see vectors of their
// own here move them to and fro between registers and memory.
template <int N, int V>
INLINE void multiply_steps(const Steps& steps, const float* const (&at)[N], const float* weights,
                           __m512 (&sums)[N][V]) {
    for (const i64 *offset = steps.offsets.data(), *const end = offset + steps.all.size(); offset < end; ++offset) {
        __m512 here[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) here[v] = held(_mm512_load_ps(weights + v * L));
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            const __m512 x = held(_mm512_set1_ps(at[n][*offset]));
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[n][v] = _mm512_fmadd_ps(x, here[v], sums[n][v]);
        }
        weights += V * L;
    }
}

#if defined(__AVX512BF16__)
template <bool PAIR, int N, int V>
INLINE void multiply_step(i64 offset, const std::uint16_t* const (&at)[N], const float* weights,
                          __m512 (&sums)[N][V]) {
    __m512i here[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) here[v] = held(_mm512_load_si512(weights + v * L));
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
        std::int32_t pair = at[n][offset];  // what lies beside it is no tap's of this row: it may be no number
        if (PAIR) std::memcpy(&pair, at[n] + offset, sizeof pair);
        const __m512i x = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[n][v] = _mm512_dpbf16_ps(sums[n][v], __m512bh(x), __m512bh(here[v]));
    }
}

template <int N, int V>
INLINE void multiply_steps(const Steps& steps, const std::uint16_t* const (&at)[N], const float* weights,
                           __m512 (&sums)[N][V]) {
    const i64 *offset = steps.offsets.data(), *const odd = offset + steps.pairs, *const end = offset + steps.all.size();
    for (; offset < odd; ++offset, weights += V * L) multiply_step<true>(*offset, at, weights, sums);
    for (; offset < end; ++offset, weights += V * L) multiply_step<false>(*offset, at, weights, sums);
}
#endif

template <class Number>
struct ByChannels {
    const Shape& p;
    const Numbers x, y;
    const float* bias;  // (O) of all groups, and a vector of slack
    std::uint8_t* argmax;
    const i64 rows, high, pitch;  // outputs of the largest chunk; the height and the width, in numbers, of what it sees
    const Steps steps;
    const Weights weights;
    std::vector<i64> places, starts;  // of an output's windows, and of the outputs, in what a chunk sees

    static constexpr bool PAIRED = sizeof(Number) == 2;

    // Chunks of as many rows as fit into the cache, and at least `least` of them altogether if there are so many rows.
    ByChannels(const Shape& shape, Numbers x_, Numbers weight, const float* bias_, Numbers y_, std::uint8_t* argmax_,
               i64 least)
        : p(shape), x(x_), y(y_), bias(bias_), argmax(argmax_),
          rows(chunk_rows(p, Shape::parts(least, p.batch))), high((rows - 1) * p.step_h + p.downs.back() + 1),
          pitch(((p.out_width - 1) * p.step_w + p.rights.back() + 1) * p.I), steps(p, pitch, PAIRED),
          weights(p, steps, weight, PAIRED) {
        for (i64 w = 0; w < p.W; ++w)
            places.push_back(w / p.pool * p.stride_h * pitch + w % p.pool * p.stride_w * p.I);
        for (i64 r = 0; r < rows; ++r)
            for (i64 c = 0; c < p.out_width; ++c) starts.push_back(r * p.step_h * pitch + c * p.step_w * p.I);
    }

    static i64 chunk_rows(const Shape& p, i64 parts) {
        const i64 row = ((p.out_width - 1) * p.step_w + p.rights.back() + 1) * p.I * p.step_h;
        return std::max<i64>(1, std::min(Shape::parts(p.out_height, parts), CACHED / row));
    }

    i64 chunks() const { return p.batch * Shape::parts(p.out_height, rows); }
    i64 space() const { return high * pitch; }

    template <bool SAVE>
    void run(i64 index, Number* seen) const {
        const i64 parts = Shape::parts(p.out_height, rows), image = index / parts, row = index % parts * rows;
        const i64 count = std::min(rows, p.out_height - row);
        for (i64 group = 0; group < p.groups; ++group) {
            see(group, image, row, count, seen);
            for (i64 v = 0; v < weights.vectors; v += weights.wide(v)) {
                const i64 place = image * p.area() + row * p.out_width, all = count * p.out_width;
                switch (weights.wide(v)) {
                    case 4: block<SAVE, 4>(group, v, seen, place, all); break;
                    case 2: block<SAVE, 2>(group, v, seen, place, all); break;
                    default: block<SAVE, 1>(group, v, seen, place, all);
                }
            }
        }
    }

  private:
    // What the chunk sees of a group's channels, with its padding.
    void see(i64 group, i64 image, i64 row, i64 count, Number* seen) const {
        const i64 tall = (count - 1) * p.step_h + p.downs.back() + 1, wide = pitch / p.I, first = row * p.step_h - p.top;
        const i64 from = std::min(p.left, wide), to = std::max(from, std::min(wide, p.width + p.left));
        for (i64 r = 0; r < tall; ++r, seen += pitch) {
            const i64 h = first + r;
            if (h < 0 || h >= p.height) {
                std::fill(seen, seen + pitch, Number{});
                continue;
            }
            std::fill(seen, seen + from * p.I, Number{});
            std::fill(seen + to * p.I, seen + pitch, Number{});
            const i64 at = image * p.x_n + group * p.I + h * p.x_h, runs = p.x_w == p.I ? 1 : to - from;
            for (i64 i = 0; i < runs; ++i)
                copy(at + i * p.x_w, seen + (from + i) * p.I, (to - from) / std::max<i64>(runs, 1) * p.I);
        }
    }

    INLINE void copy(i64 at, Number* to, i64 count) const {
        if constexpr (PAIRED)
            std::memcpy(to, x.halves() + at, count * sizeof(Number));
        else if (!x.bfloat16)
            std::memcpy(to, x.floats() + at, count * sizeof(Number));
        else
            for (i64 i = 0; i < count; ++i) to[i] = x[at + i];
    }

    // `all` outputs, the first of them number `place` of y, in V vectors of channels: some at a time, then one by one.
    template <bool SAVE, int V>
    void block(i64 group, i64 v, const Number* seen, i64 place, i64 all) const {
        constexpr int MOST = V == 4 ? 4 : 8;  // sums for each vector
        const i64 channels = std::min<i64>(V * L, p.O - v * L), first = group * p.O + v * L;
        const float* from = weights.block(group, v);
        const auto several = [&](auto outputs, i64& done) INLINE_LAMBDA {
            constexpr int Q = decltype(outputs)::value;
            for (; done + Q <= all; done += Q) some<SAVE, V, Q>(seen, from, place, done, first, channels);
        };
        i64 done = 0;
        if (p.W == 1)
            several(std::integral_constant<int, MOST>(), done);
        else if (p.W % 4 == 0)
            several(std::integral_constant<int, MOST / 4>(), done);
        several(std::integral_constant<int, 1>(), done);
    }

    template <bool SAVE, int V, int Q>
    INLINE void some(const Number* seen, const float* from, i64 place, i64 done, i64 first, i64 channels) const {
        const Number* at[Q];
        for (int q = 0; q < Q; ++q) at[q] = seen + starts[done + q];
        Floats values[Q][V];
        Ints windows[Q][V];
        i64 w = 0;
        if constexpr (Q < 4)
            for (; w + 4 <= p.W; w += 4) sum<SAVE, V, Q, 4>(at, from, first, w, values, windows);
        if (w < p.W) sum<SAVE, V, Q, 1>(at, from, first, w, values, windows);
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v)
                if (v * L < channels)
                    put<SAVE>(values[q][v], windows[q][v], (place + done + q) * p.outputs + first + v * L,
                              channels - v * L);
    }

    // Sums of W windows from w on, and the largest of them and of what there was before. A function of its own, in which
    // all registers are the sums'.
    template <bool SAVE, int V, int Q, int W>
    __attribute__((noinline)) void sum(const Number* const (&at)[Q], const float* from, i64 first, i64 w,
                                       Floats (&values)[Q][V], Ints (&windows)[Q][V]) const {
        const Number* seen[Q * W];
        __m512 sums[Q * W][V];
#pragma GCC unroll 8
        for (int n = 0; n < Q * W; ++n) {
            seen[n] = at[n / W] + places[w + n % W];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[n][v] = _mm512_loadu_ps(bias + first + v * L);
        }
        multiply_steps(steps, seen, from, sums);
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                Floats of[W];
#pragma GCC unroll 4
                for (int k = 0; k < W; ++k) of[k] = Floats(sums[q * W + k][v]);
                reduce<SAVE>(of, w, values[q][v], windows[q][v]);
            }
    }

    // ReLU, and into y.
    template <bool SAVE>
    INLINE void put(Floats value, Ints window, i64 at, i64 count) const {
        y.put(at, at_least(same(p.relu ? 0.0f : -__builtin_inff()), value), count);
        if (!SAVE) return;
        const Ints cut = Ints{} - std::int32_t(p.relu);
        const Bytes bytes = __builtin_convertvector((value <= 0.0f) & cut ? Ints{} + DEAD : window, Bytes);
        if (count >= L)
            store(argmax + at, bytes);
        else
            for (int lane = 0; lane < count; ++lane) argmax[at + lane] = bytes[lane];
    }
};

template <class Number>
void forward_of(const Shape& p, Numbers x, Numbers weight, const float* bias, Numbers y, std::uint8_t* argmax,
                Threads threads) {
    const i64 useful = std::min(threads.count, p.work() / WORTH + 1), least = useful > 1 ? 4 * useful : 1;
    const ByChannels<Number> pass(p, x, weight, bias, y, argmax, least);
    const i64 chunks = pass.chunks(), slices = std::min(chunks, least);
    std::vector<std::unique_ptr<Number[]>> seen;
    for (i64 s = 0; s < slices; ++s) seen.emplace_back(new Number[pass.space()]);
    parallel(slices, threads, p.work(), [&](i64 s) {
        for (i64 i = chunks * s / slices; i < chunks * (s + 1) / slices; ++i)
            argmax ? pass.template run<true>(i, seen[s].get()) : pass.template run<false>(i, seen[s].get());
    });
}

// `bias` holds (O) of all groups and a vector of slack. Numbers are read as bfloat16 where pairs of them are multiplied.
inline void forward_by_channels(const Shape& p, Numbers x, Numbers weight, const float* bias, Numbers y,
                                std::uint8_t* argmax, Threads threads) {
#if defined(__AVX512BF16__)
    if (x.bfloat16) return forward_of<std::uint16_t>(p, x, weight, bias, y, argmax, threads);
#endif
    forward_of<float>(p, x, weight, bias, y, argmax, threads);
}

}  // namespace

#endif

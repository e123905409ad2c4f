// The forward pass: sums of products over pooled outputs, the largest of each window, ReLU.
#pragma once

#include "cpu_planes.hpp"

namespace {

// Up to L channels of a vector of outputs each, or of several where there is no pool, before ReLU.
struct Tile {
    Floats values[STREAMS][L];
    Ints windows[STREAMS][L];  // that the values come from
};

// sums[c][n] += the products of stream n, a vector of outputs in one window, with the taps of channel c.
template <int C, int N>
INLINE void multiply(const Shape& p, const float* x, const i64* offsets, const float* weights, Floats (&sums)[C][N]) {
    for (i64 t = 0; t < p.T; ++t, offsets += p.streams) {
        Floats here[N];
        for (int n = 0; n < N; ++n) here[n] = load<Floats>(x + offsets[n]);
        for (int c = 0; c < C; ++c) {
            const Floats weight = same(weights[c * p.T + t]);
            for (int n = 0; n < N; ++n) sums[c][n] += here[n] * weight;
        }
    }
}

// The same for 3x3 taps in 2x2 windows of one input channel, whose sixteen planes are in registers.
template <int C>
INLINE void multiply_near(const Floats (&seen)[16], const float* weights, i64 T, Floats (&sums)[C][4]) {
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t)
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) {
            const Floats weight = same(weights[c * T + t]);
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) sums[c][n] += seen[4 * (n / 2 + t / 3) + n % 2 + t % 3] * weight;
        }
}

// The largest of the sums of windows w, w + 1, ..., and of what was the largest before those: the first one of equals.
template <bool SAVE, int N>
INLINE void reduce(const Floats (&sums)[N], i64 w, Floats& value, Ints& window) {
    if (!SAVE) {
        Floats most = sums[0];
        if constexpr (N == 4)
            most = largest(sums[0], sums[1], sums[2], sums[3]);
        else
            for (int n = 1; n < N; ++n) most = largest(most, sums[n]);
        value = w == 0 ? most : largest(value, most);
        return;
    }
    if (w == 0) value = sums[0], window = Ints{};
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
        if (w + n == 0) continue;
        const Ints better = (sums[n] > value) | (sums[n] != sums[n]);
        window = better ? Ints{} + std::int32_t(w + n) : window;
        value = better ? sums[n] : value;
    }
}

// The same in bfloat16, two taps at once: the weights of `PAIRS` pairs, in the order of `Planes::pair`.
template <int C>
INLINE void multiply_pairs(const Floats (&seen)[16], const float* weights, i64 T, Floats (&sums)[C][4]) {
#pragma GCC unroll 5
    for (int t = 0; t < PAIRS; ++t)
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) {
            const Ints weight = Ints{} + load<std::int32_t>(weights + c * T + t);
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) {
                const int across = 2 * (n / 2 + t) + n % 2, rest = 4 * (t - 1) + n;
                sums[c][n] = add_pairs(sums[c][n], bits<Ints>(seen[t < 3 ? across : rest]), weight);
            }
        }
}

// `count` channels of a vector of outputs, where `near`; PAIRED: planes and weights are pairs.
template <bool SAVE, bool PAIRED>
void convolve_near(const Shape& p, const float* x, const float* weights, const float* bias, i64 count, Tile& tile) {
    constexpr i64 TAPS_SEEN = PAIRED ? PAIRS : 9;
    const i64 T = p.I * TAPS_SEEN;
    const auto sum = [&](const Floats(&seen)[16], const float* of, i64 step, auto& sums) INLINE_LAMBDA {
        constexpr int C = std::extent<std::remove_reference_t<decltype(sums)>>();
        if constexpr (PAIRED)
            multiply_pairs<C>(seen, of, step, sums);
        else
            multiply_near<C>(seen, of, step, sums);
    };
    Floats seen[16];
    see(x, p.plane, seen);
    for (i64 o = 0; p.I == 1 && o < count; ++o) {
        Floats sums[1][4];
        for (int n = 0; n < 4; ++n) sums[0][n] = same(bias[o]);
        sum(seen, weights + o * T, T, sums);
        reduce<SAVE>(sums[0], 0, tile.values[0][o], tile.windows[0][o]);
    }
    for (i64 o = 0; p.I > 1 && o < count; o += 2) {
        Floats sums[2][4];
        const i64 second = o + 1 < count;  // the last one stands in for a channel that is not there
        for (int n = 0; n < 4; ++n) sums[0][n] = same(bias[o]), sums[1][n] = same(bias[o + second]);
        const float* of = weights + o * T;
        for (i64 i = 0; i < p.I; ++i) {
            see(x + i * 16 * p.plane, p.plane, seen);
            sum(seen, of + i * TAPS_SEEN, second * T, sums);
        }
        reduce<SAVE>(sums[0], 0, tile.values[0][o], tile.windows[0][o]);
        reduce<SAVE>(sums[1], 0, tile.values[0][o + second], tile.windows[0][o + second]);
    }
}

// `count` channels of `vectors` of outputs; there is one vector unless there is no pool.
template <bool SAVE>
void convolve(const Shape& p, const float* x, i64 vectors, const float* weights, const float* bias, i64 count,
              Tile& tile) {
    if (p.paired) return convolve_near<SAVE, true>(p, x, weights, bias, count, tile);
    if (WIDE && p.near) return convolve_near<SAVE, false>(p, x, weights, bias, count, tile);
    for (i64 o = 0; o < count; o += CHANNELS)
        counted<CHANNELS>(std::min<i64>(CHANNELS, count - o), [&](auto channels) INLINE_LAMBDA {
            constexpr int C = decltype(channels)::value;
            for (i64 w = 0; w < p.W; w += STREAMS)
                counted<STREAMS>(p.W == 1 ? vectors : std::min<i64>(STREAMS, p.W - w), [&](auto streams) INLINE_LAMBDA {
                    constexpr int N = decltype(streams)::value;
                    Floats sums[C][N];
                    for (int c = 0; c < C; ++c)
                        for (int n = 0; n < N; ++n) sums[c][n] = same(bias[o + c]);
                    multiply<C, N>(p, x, p.offsets.data() + w, weights + o * p.T, sums);
#pragma GCC unroll 4
                    for (int c = 0; c < C; ++c) {
                        if (p.W > 1) {
                            reduce<SAVE>(sums[c], w, tile.values[0][o + c], tile.windows[0][o + c]);
                            continue;
                        }
                        for (int n = 0; n < N; ++n) tile.values[n][o + c] = sums[c][n], tile.windows[n][o + c] = Ints{};
                    }
                });
        });
}

struct Forward {
    const Shape& p;
    Numbers x, y;
    const float *weights, *bias;  // (O, T), or (O, I * PAIRS) where `paired`, and (O) of all groups
    std::uint8_t* argmax;

    template <bool SAVE>
    void run(const Chunk& chunk, Planes& planes) const {
        const i64 done = chunk.row * p.out_width + chunk.column, outputs = chunk.rows * chunk.columns;
        Tile tile;
        for (i64 group = 0; group < p.groups; ++group) {
            const i64 all = planes.fill(x, group, chunk), most = p.W == 1 ? STREAMS : 1;
            const i64 numbers = p.paired ? p.I * PAIRS : p.T;
            if (p.paired) planes.pair(all);
            for (i64 v = 0; v < all; v += most)
                for (i64 o = 0; o < p.O; o += L) {
                    const i64 first = group * p.O + o, count = std::min<i64>(L, p.O - o);
                    const i64 vectors = std::min(most, all - v);
                    convolve<SAVE>(p, &planes.planes[v * L], vectors, weights + first * numbers, bias + first, count,
                                   tile);
                    for (i64 n = 0; n < vectors; ++n)
                        put<SAVE>(tile.values[n], tile.windows[n], chunk.image, first, count, done + (v + n) * L,
                                  std::min<i64>(L, outputs - (v + n) * L));
                }
        }
    }

    // Into y: `count` channels of `many` outputs, the first of them number `place` of the image.
    template <bool SAVE>
    INLINE void put(Floats (&values)[L], Ints (&windows)[L], i64 image, i64 first, i64 count, i64 place,
                    i64 many) const {
        if (!p.channels_last) {
            const i64 at = (image * p.outputs + first) * p.area() + place;
            return rows<SAVE>(values, windows, at, p.area(), count, many);
        }
        transpose(values);
        if (SAVE) transpose(windows);
        rows<SAVE>(values, windows, (image * p.area() + place) * p.outputs + first, p.outputs, many, count);
    }

  private:
    // ReLU, and `count` rows of `many` numbers.
    template <bool SAVE>
    INLINE void rows(const Floats (&values)[L], const Ints (&windows)[L], i64 at, i64 step, i64 count, i64 many) const {
        const Floats low = same(p.relu ? 0.0f : -__builtin_inff());
        const Ints cut = Ints{} - std::int32_t(p.relu);
        for (i64 i = 0; i < count; ++i, at += step) {
            y.put(at, at_least(low, values[i]), many);
            if (!SAVE) continue;
            const Bytes bytes = __builtin_convertvector((values[i] <= 0.0f) & cut ? Ints{} + DEAD : windows[i], Bytes);
            if (many == L)
                store(argmax + at, bytes);
            else
                for (int lane = 0; lane < many; ++lane) argmax[at + lane] = bytes[lane];
        }
    }
};

}  // namespace

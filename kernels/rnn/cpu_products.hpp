// Matrix products of recurrent kernels: sums of a few rows with a few vectors of columns.
#pragma once

#include "cpu_packing.hpp"
#include "cpu_tile_products.hpp"

namespace perfkit {

// As many rows as leave the registers room for a vector of weights and a word of each row.
template <int N>
constexpr int MOST_ROWS = (REGISTERS - 1) / (N + 1) < 8 ? (REGISTERS - 1) / (N + 1) : 8;

// Sums are rows of N vectors; row r becomes that of `starts` plus the products of row r of each x with its panel. They
// may lie where the starts are. Not inlined: what the code around it keeps in registers would leave too few for sums.
template <int R, int N, class Operand>
__attribute__((noinline)) void dot(const Factors<Operand>* from, const Factors<Operand>* to, const float* starts,
                                   i64 starts_stride, float* sums, i64 sums_stride) {
    // Few sums are made of several chains each: every product would wait for the last one's result.
    constexpr int CHAINS = R * N >= 8 ? 1 : R * N >= 3 ? 2 : 8 / (R * N);
    constexpr int P = PAIR<Operand>;
    Floats found[CHAINS][R][N] = {};
    each<R>([&](auto r) INLINE_LAMBDA {
        each<N>([&](auto n) INLINE_LAMBDA { found[0][r][n] = load<Floats>(starts + r * starts_stride + n * L); });
    });
    for (; from < to; ++from) {
        const auto [x, stride, w, columns] = *from;
        const auto add = [&, x = x, stride = stride, w = w](auto chain, i64 k) INLINE_LAMBDA {
            Floats number[R];
            each<R>([&](auto r) INLINE_LAMBDA { number[r] = spread(x + r * stride + k); });
            each<N>([&](auto n) INLINE_LAMBDA {
                const Floats weights = load<Floats>(w + (k * N + n * P) * L);
                each<R>([&](auto r) INLINE_LAMBDA {
                    found[chain][r][n] = added(Operand{}, found[chain][r][n], number[r], weights);
                });
            });
        };
        i64 k = 0;
        for (; k + CHAINS * P <= columns; k += CHAINS * P)
            each<CHAINS>([&](auto chain) INLINE_LAMBDA { add(chain, k + chain * P); });
        for (; k < columns; k += P) add(std::integral_constant<int, 0>{}, k);
    }
    each<R>([&](auto r) INLINE_LAMBDA {
        each<N>([&](auto n) INLINE_LAMBDA {
            each<CHAINS - 1>([&](auto chain) INLINE_LAMBDA { found[0][r][n] += found[chain + 1][r][n]; });
            store(sums + r * sums_stride + n * L, found[0][r][n]);
        });
    });
}

// The same for any number of rows. With `tiles` each x has rows to the next multiple of 16; what is in those that are
// not `rows` is not used.
template <int N, int F, class Operand>
void product(Factors<Operand> (&&factors)[F], i64 rows, bool tiles, const float* starts, i64 starts_stride, float* sums,
             i64 sums_stride) {
    const auto next = [&](auto run, i64 count) INLINE_LAMBDA {
        run(factors, factors + F, starts, starts_stride, sums, sums_stride);
        for (auto& factor : factors) factor.x += count * factor.stride;
        starts += count * starts_stride, sums += count * sums_stride, rows -= count;
    };
#if PERFKIT_TILES
    if constexpr (PAIR<Operand> == 2) {
        while (tiles && rows >= 2 * TILE) next(dot_tiles<2, N>, 2 * TILE);
        while (tiles && rows >= TILE) next(dot_tiles<1, N>, TILE);
        if (tiles && rows >= TILE / 2) next([&](auto... rest) { dot_in_tile<N>(rows, rest...); }, rows);
    }
#endif
    (void)tiles;
    constexpr int MOST = MOST_ROWS<N>;
    while (rows >= MOST) next(dot<MOST, N, Operand>, MOST);
    while (rows >= 4) next(dot<4, N, Operand>, 4);
    while (rows >= 2) next(dot<2, N, Operand>, 2);
    if (rows) next(dot<1, N, Operand>, 1);
}

// Calls body(vectors, block) for each panel of V blocks in [first, last), `vectors` a constant: G times its blocks, or
// the fewer of a last block of few units of the H.
template <int G, int V, class Body>
INLINE void each_panel(i64 H, i64 first, i64 last, Body body) {
    i64 block = first;
    const i64 whole = G > 1 ? std::min(last, H / L) : last;
    for (; block + V <= whole; block += V) body(std::integral_constant<int, G * V>{}, block);
    if (block == last) return;
    const i64 rest = G > 1 ? vectors_of<G>(units_of(H, block)) : last - block;
    if constexpr (G * V > 3)
        if (rest == 4) return body(std::integral_constant<int, 4>{}, block);
    if constexpr (G * V > 2)
        if (rest == 3) return body(std::integral_constant<int, 3>{}, block);
    if constexpr (G * V > 1)
        if (rest == 2) return body(std::integral_constant<int, 2>{}, block);
    body(std::integral_constant<int, 1>{}, block);
}

}  // namespace perfkit

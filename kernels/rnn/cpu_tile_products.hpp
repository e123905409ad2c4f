// Products of bfloat16 in AMX's tiles: 16 rows of 64 bytes, and eight of them.
#pragma once

#include "cpu_packing.hpp"

namespace perfkit {

// Rows of x, and the packed panel that they are multiplied with.
template <class Operand>
struct Factors {
    const Operand* x;
    i64 stride;
    const Operand* w;
    i64 columns;
};

#if PERFKIT_TILES
// Of R tiles of rows, the sums of vectors FIRST and FIRST + 1 of a panel of N: `starts` plus the products of
// all factors. The processor multiplies tiles beside its other work: `meanwhile` is called after each 32 columns.
template <int R, int N, int FIRST, class Meanwhile>
INLINE void tile_sums(const Factors<Bf16>* from, const Factors<Bf16>* to, const float* starts, i64 starts_stride,
                      float* sums, i64 sums_stride, Meanwhile meanwhile) {
    static_assert(R <= 2 && L == TILE);
    constexpr bool TWO = FIRST + 1 < N;
    const i64 start_bytes = starts_stride * sizeof(float), sum_bytes = sums_stride * sizeof(float);
    starts += FIRST * L, sums += FIRST * L;
    settle();
    _tile_loadd(0, starts, start_bytes);
    if constexpr (TWO) _tile_loadd(1, starts + L, start_bytes);
    if constexpr (R == 2) _tile_loadd(2, starts + TILE * starts_stride, start_bytes);
    if constexpr (R == 2 && TWO) _tile_loadd(3, starts + TILE * starts_stride + L, start_bytes);
    for (; from < to; ++from) {
        const i64 x_bytes = from->stride * sizeof(Bf16);
        const Bf16 *x = from->x, *w = from->w + 2 * FIRST * L;
        for (const Bf16* last = x + from->columns; x < last; x += 32, w += 32 * N * L) {
            _tile_loadd(4, x, x_bytes);
            _tile_loadd(6, w, N * 64);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (TWO) {
                _tile_loadd(7, w + 2 * L, N * 64);
                _tile_dpbf16ps(1, 4, 7);
            }
            if constexpr (R == 2) {
                _tile_loadd(5, x + TILE * from->stride, x_bytes);
                _tile_dpbf16ps(2, 5, 6);
                if constexpr (TWO) _tile_dpbf16ps(3, 5, 7);
            }
            meanwhile();
        }
    }
    _tile_stored(0, sums, sum_bytes);
    if constexpr (TWO) _tile_stored(1, sums + L, sum_bytes);
    if constexpr (R == 2) _tile_stored(2, sums + TILE * sums_stride, sum_bytes);
    if constexpr (R == 2 && TWO) _tile_stored(3, sums + TILE * sums_stride + L, sum_bytes);
}

// The same of all N vectors.
template <int R, int N, class Meanwhile>
INLINE void tile_sums(const Factors<Bf16>* from, const Factors<Bf16>* to, const float* starts, i64 starts_stride,
                      float* sums, i64 sums_stride, Meanwhile meanwhile) {
    static_assert(N <= 4);
    tile_sums<R, N, 0>(from, to, starts, starts_stride, sums, sums_stride, meanwhile);
    if constexpr (N > 2) tile_sums<R, N, 2>(from, to, starts, starts_stride, sums, sums_stride, meanwhile);
}

// Row r of `sums` becomes that of `starts`, which may be the same, plus the products of row r of each x with its panel;
// of 16 rows, or 32.
template <int R, int N>
__attribute__((noinline)) void dot_tiles(const Factors<Bf16>* from, const Factors<Bf16>* to, const float* starts,
                                         i64 starts_stride, float* sums, i64 sums_stride) {
    tile_sums<R, N>(from, to, starts, starts_stride, sums, sums_stride, [] {});
}

// The same of 16 rows, of which `rows` are wanted and have sums.
template <int N>
void dot_in_tile(i64 rows, const Factors<Bf16>* from, const Factors<Bf16>* to, const float* starts, i64 starts_stride,
                 float* sums, i64 sums_stride) {
    constexpr float NOTHING[N * L] = {};
    alignas(64) float found[TILE][N * L];
    dot_tiles<1, N>(from, to, NOTHING, 0, found[0], N * L);
    for (i64 r = 0; r < rows; ++r)
        for (int n = 0; n < N; ++n)
            store(sums + r * sums_stride + n * L,
                  load<Floats>(&found[r][n * L]) + load<Floats>(starts + r * starts_stride + n * L));
}
#endif

}  // namespace perfkit

// Matrix products of recurrent kernels: weights packed for them, and sums of a few rows with a few vectors of columns.
//
// An operand is float32, or bfloat16 where the processor multiplies that. Its products are taken in words of 32 bits:
// one float32, or two bfloat16 of neighbouring columns, whose products `vdpbf16ps` and AMX's tiles add up in float32.
#pragma once

#include "cpu_numbers.hpp"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define TILES 1
#else
#define TILES 0
#endif

#if defined(__AVX512F__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif

namespace perfkit {

#if defined(__AVX512BF16__)
using Low = Bf16;  // the operand for bfloat16 tensors
#else
using Low = float;
#endif

template <class Operand>
constexpr int PAIR = 4 / sizeof(Operand);

// What the number of columns is rounded up to: rows of tiles hold 64 bytes.
template <class Operand>
constexpr i64 GRAIN = PAIR<Operand> == 1 ? 1 : TILES ? 32 : 2;

constexpr i64 blocks_of(i64 units) { return (units + L - 1) / L; }

// Where words are multiplied L at a time: the word at `from` in all lanes (as an integer: adding 0.0f would not be for
// nothing, -0.0f being a number of its own), and the sum with its products.
template <class Operand>
INLINE Floats spread(const Operand* from) {
    return bits<Floats>(Ints{} + load<std::int32_t>(from));
}
INLINE Floats added(float, Floats sum, Floats a, Floats b) { return sum + a * b; }
#if defined(__AVX512BF16__)
INLINE Floats added(Bf16, Floats sum, Floats a, Floats b) {
    return Floats(_mm512_dpbf16_ps(__m512(sum), bits<__m512bh>(a), bits<__m512bh>(b)));
}
#endif

// ---- Packing --------------------------------------------------------------------------------------------------------
//
// A matrix of G gates times H units (rows) and K columns, as panels of V blocks of L units, the last perhaps of fewer:
// for each word of columns, for each block, for each gate: the words of its units. The gates of a last block of fewer
// units lie side by side, in as few vectors as hold them: of 50 units, 2 are in one vector and not in four. Zeros
// beyond G H and K.

// The units of a block, and the vectors that hold their gates.
constexpr i64 units_of(i64 H, i64 block) { return std::min<i64>(L, H - block * L); }
template <int G>
constexpr i64 vectors_of(i64 units) {
    return (G * units + L - 1) / L;
}

template <class Operand, int G, int V>
struct Matrix {
    i64 units = 0, columns = 0;  // columns rounded up to GRAIN
    Array<Operand> values;

    void allocate(i64 H, i64 K) {
        units = H, columns = K;
        values.allocate(blocks_of(H) * G * L * K);
    }
    Operand* panel(i64 block) const { return values.data() + block * G * L * columns; }  // block a multiple of V
};

// Lanes 0 to L - 1 of a, L to 2 L - 1 of b, as one stage of a transposition wants them.
template <int S, bool HIGH>
constexpr int lane(int j) {
    return HIGH ? ((j & S) ? L + j : j + S) : ((j & S) ? L + j - S : j);
}
template <int S, bool HIGH, int... J>
INLINE Floats mixed(Floats a, Floats b, std::integer_sequence<int, J...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, lane<S, HIGH>(J)...);
#else
    return __builtin_shuffle(a, b, Ints{lane<S, HIGH>(J)...});
#endif
}
template <int S>
INLINE void transpose(Floats (&rows)[L]) {
    if constexpr (S > 0) {
        constexpr auto lanes = std::make_integer_sequence<int, L>{};
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
            if (!(i & S)) {
                const Floats a = rows[i], b = rows[i + S];
                rows[i] = mixed<S, false>(a, b, lanes), rows[i + S] = mixed<S, true>(a, b, lanes);
            }
        transpose<S / 2>(rows);
    }
}

// L words of a row, of which `count` numbers are there.
template <class Operand, class Data>
INLINE Floats words(const Data* from, i64 count) {
    if constexpr (PAIR<Operand> == 1) {
        return count > 0 ? get(from, count) : Floats{};
    } else {
        if (count >= 2 * L) return load<Floats>(from);
        if (count <= 0) return Floats{};
#if MASKED
        return bits<Floats>(_mm512_maskz_loadu_epi16(__mmask32((1u << count) - 1), from));
#else
        Floats value{};
        std::memcpy(&value, from, count * sizeof(Data));
        return value;
#endif
    }
}

// The panel that begins at `block` of w (G H, K).
template <class Operand, int G, int V, class Data>
void pack(const Matrix<Operand, G, V>& to, i64 block, const Data* w, i64 K) {
    static_assert(G == 1 || V == 1);
    const i64 H = to.units, blocks = std::min<i64>(V, blocks_of(H) - block);
    const i64 N = (blocks - 1) * G + vectors_of<G>(units_of(H, block + blocks - 1));
    const i64 all_words = to.columns / PAIR<Operand>;
    float* at = reinterpret_cast<float*>(to.panel(block));
    for (i64 v = 0; v < blocks; ++v) {
        const i64 first = (block + v) * L, units = units_of(H, block + v);
        i64 gate = 0, unit = 0;
        for (i64 n = vectors_of<G>(units); n > 0; --n, at += L) {
            const Data* from[L];
            for (int u = 0; u < L; ++u) {
                from[u] = gate < G ? w + (gate * H + first + unit) * K : nullptr;
                if (++unit == units) ++gate, unit = 0;
            }
            for (i64 word = 0; word < all_words; word += L) {
                const i64 k = word * PAIR<Operand>, wide = std::min<i64>(L, all_words - word);
                Floats rows[L];
                for (int u = 0; u < L; ++u) rows[u] = from[u] ? words<Operand>(from[u] + k, K - k) : Floats{};
                transpose<L / 2>(rows);
                for (i64 j = 0; j < wide; ++j) store(at + (word + j) * N * L, rows[j]);
            }
        }
    }
}

// The panel that begins at `block` of a matrix of `columns` columns, units: row(k) is where column k's units are, null
// for zeros.
template <class Operand, int V, class Row>
INLINE void pack_columns(Operand* panel, i64 block, i64 units, i64 columns, Row row) {
    const i64 N = std::min<i64>(V, blocks_of(units) - block);
    float* at = reinterpret_cast<float*>(panel);
    for (i64 k = 0; k < columns; k += PAIR<Operand>) {
        const auto *even = row(k), *odd = PAIR<Operand> == 2 ? row(k + 1) : nullptr;
        for (i64 v = 0; v < N; ++v, at += L) {
            const i64 unit = (block + v) * L;
            const Floats one = even ? get(even + unit, units - unit) : Floats{};
            if constexpr (PAIR<Operand> == 1) {
                store(at, one);
            } else {
                const Floats other = odd ? get(odd + unit, units - unit) : Floats{};
                store(at, bits<Unsigned>(other) | (bits<Unsigned>(one) >> 16));
            }
        }
    }
}

// The same of the transpose of w (G H, units): column s * HS + h of the packed matrix is row h of gate (s + first_gate)
// % G.
template <class Operand, int V, class Data>
void pack_transpose(const Matrix<Operand, 1, V>& to, i64 block, const Data* w, i64 H, i64 HS, int G, int first_gate) {
    pack_columns<Operand, V>(to.panel(block), block, to.units, to.columns, [&](i64 k) -> const Data* {
        const i64 h = k % HS;
        return k < G * HS && h < H ? w + ((k / HS + first_gate) % G * H + h) * to.units : nullptr;
    });
}

// The transpose of `rows` rows, as `columns` rows of round_up(rows, L * PAIR), zeros beyond `rows`. What follows the
// last row must be readable for L numbers.
template <class Operand>
void transpose_rows(const Operand* from, i64 stride, i64 rows, i64 columns, Operand* to, i64 to_stride) {
    constexpr int P = PAIR<Operand>;
    for (i64 u = 0; u < columns; u += L)
        for (i64 k = 0; k < rows; k += L * P) {
            Floats words[L];
            for (int j = 0; j < L; ++j) {
                const i64 row = k + j * P;
                const Operand* at = from + row * stride + u;
                if constexpr (P == 1) {
                    words[j] = row < rows ? get(at) : Floats{};
                } else {
                    const Floats odd = row + 1 < rows ? get(at + stride) : Floats{};
                    const Floats even = row < rows ? get(at) : Floats{};
                    words[j] = bits<Floats>(bits<Unsigned>(odd) | (bits<Unsigned>(even) >> 16));
                }
            }
            transpose<L / 2>(words);
            for (i64 i = 0; i < L && u + i < columns; ++i) store(to + (u + i) * to_stride + k, words[i]);
        }
}

// ---- Sums of products -----------------------------------------------------------------------------------------------

// As many rows as leave the registers room for a vector of weights and a word of each row.
template <int N>
constexpr int MOST_ROWS = (REGISTERS - 1) / (N + 1) < 8 ? (REGISTERS - 1) / (N + 1) : 8;

// Sums are rows of N vectors; row r becomes that of `starts` plus the product of row r of x with the panel w. They may
// lie where the starts are. Not inlined: what the code around it keeps in registers would leave too few for the sums.
template <int R, int N, class Operand>
__attribute__((noinline)) void dot(const Operand* x, i64 stride, const Operand* w, i64 columns, const float* starts,
                                   i64 starts_stride, float* sums, i64 sums_stride) {
    // Few sums are made of several chains each: every product would wait for the last one's result.
    constexpr int CHAINS = R * N >= 8 ? 1 : R * N >= 3 ? 2 : 8 / (R * N);
    constexpr int P = PAIR<Operand>;
    Floats found[CHAINS][R][N] = {};
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) found[0][r][n] = load<Floats>(starts + r * starts_stride + n * L);
    const auto add = [&](Floats(&to)[R][N], i64 k) INLINE_LAMBDA {
        Floats number[R];
        for (int r = 0; r < R; ++r) number[r] = spread(x + r * stride + k);
        for (int n = 0; n < N; ++n) {
            const Floats weights = load<Floats>(w + (k * N + n * P) * L);
            for (int r = 0; r < R; ++r) to[r][n] = added(Operand{}, to[r][n], number[r], weights);
        }
    };
    i64 k = 0;
    for (; k + CHAINS * P <= columns; k += CHAINS * P)
        for (int chain = 0; chain < CHAINS; ++chain) add(found[chain], k + chain * P);
    for (; k < columns; k += P) add(found[0], k);
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
            for (int chain = 1; chain < CHAINS; ++chain) found[0][r][n] += found[chain][r][n];
            store(sums + r * sums_stride + n * L, found[0][r][n]);
        }
}

constexpr int TILE = 16;

#if TILES
// How the tiles are shaped on this thread while this lives: all eight of them 16 rows of 64 bytes. What the framework's
// kernels had shaped on its thread is put back, as they may not look again.
class TileShape {
  public:
    explicit TileShape(bool used) : used_(used) {
        if (!used) return;
        _tile_storeconfig(before_);
        struct alignas(64) {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            std::uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
        } shape;
        _tile_loadconfig(&shape);
    }
    ~TileShape() {
        if (!used_) return;
        if (before_[0] == 0)  // the palette: nothing was shaped
            _tile_release();
        else
            _tile_loadconfig(before_);
    }
    TileShape(const TileShape&) = delete;

  private:
    const bool used_;
    alignas(64) std::uint8_t before_[64];
};

// The same for 16 rows, of which `rows` are wanted.
template <int N>
__attribute__((noinline)) void dot_tiles(i64 rows, const Bf16* x, i64 stride, const Bf16* w, i64 columns,
                                         const float* starts, i64 starts_stride, float* sums, i64 sums_stride) {
    static_assert(N <= 4 && L == TILE);
    alignas(64) float found[TILE][N][L];
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (N > 2) _tile_zero(2);
    if constexpr (N > 3) _tile_zero(3);
    for (i64 k = 0; k < columns; k += 32) {
        const Bf16* weights = w + k * N * L;
        _tile_loadd(4, x + k, stride * sizeof(Bf16));
        _tile_loadd(5, weights, N * 64);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (N > 1) {
            _tile_loadd(6, weights + 2 * L, N * 64);
            _tile_dpbf16ps(1, 4, 6);
        }
        if constexpr (N > 2) {
            _tile_loadd(7, weights + 4 * L, N * 64);
            _tile_dpbf16ps(2, 4, 7);
        }
        if constexpr (N > 3) {
            _tile_loadd(5, weights + 6 * L, N * 64);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, &found[0][0], N * 64);
    if constexpr (N > 1) _tile_stored(1, &found[0][1], N * 64);
    if constexpr (N > 2) _tile_stored(2, &found[0][2], N * 64);
    if constexpr (N > 3) _tile_stored(3, &found[0][3], N * 64);
    for (i64 r = 0; r < rows; ++r)
        for (int n = 0; n < N; ++n)
            store(sums + r * sums_stride + n * L,
                  load<Floats>(found[r][n]) + load<Floats>(starts + r * starts_stride + n * L));
}
#else
struct TileShape {
    explicit TileShape(bool) {}
};
#endif

// The same for any number of rows. With `tiles` x has rows to the next multiple of 16; what is in those that are not
// `rows` is not used.
template <int N, class Operand>
void product(const Operand* w, i64 columns, const Operand* x, i64 stride, i64 rows, bool tiles, const float* starts,
             i64 starts_stride, float* sums, i64 sums_stride) {
    const auto next = [&](auto run, i64 count) INLINE_LAMBDA {
        run(x, stride, w, columns, starts, starts_stride, sums, sums_stride);
        x += count * stride, starts += count * starts_stride, sums += count * sums_stride, rows -= count;
    };
#if TILES
    if constexpr (PAIR<Operand> == 2)
        while (tiles && rows >= TILE / 2) {
            const i64 count = std::min<i64>(rows, TILE);
            next([&](auto... rest) { dot_tiles<N>(count, rest...); }, count);
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

// Weights of recurrent kernels, packed for their products.
//
// An operand is float32, or bfloat16 where the processor multiplies that. Its products are taken in words of 32 bits:
// one float32, or two bfloat16 of neighbouring columns, whose products `vdpbf16ps` and AMX's tiles add up in float32.
#pragma once

#include "_tiles.hpp"
#include "_memory.hpp"
#include "cpu_numbers.hpp"

#if PERFKIT_LANES != 8  // AVX-512 and ARM
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
constexpr i64 GRAIN = PAIR<Operand> == 1 ? 1 : PERFKIT_TILES ? 32 : 2;

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
    } else if constexpr (std::is_same<Data, Rounded>::value) {
        const auto half = [&](i64 at) INLINE_LAMBDA {
            return count > at ? get(&from[at].value, count - at) : Floats{};
        };
        return narrowed(half(0), half(L));
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
            // Some words, `count` numbers of each row at most. In float32, which has most, all is unrolled: a block is
            // transposed in registers.
            const auto columns = [&](i64 word, auto whole, i64 count) INLINE_LAMBDA {
                Floats rows[L];
                const auto read = [&](int u) INLINE_LAMBDA {
                    rows[u] = from[u] ? words<Operand>(from[u] + word * PAIR<Operand>, count) : Floats{};
                };
                const auto write = [&](i64 j) INLINE_LAMBDA { store(at + (word + j) * N * L, rows[j]); };
                if constexpr (PAIR<Operand> == 1)
                    each<L>(read);
                else
                    for (int u = 0; u < L; ++u) read(u);
                transpose<L / 2>(rows);
                if constexpr (whole)
                    each<L>(write);
                else
                    for (i64 j = 0; j < std::min<i64>(L, all_words - word); ++j) write(j);
            };
            i64 word = 0;
            if constexpr (PAIR<Operand> == 1)
                for (; word + L <= K; word += L) columns(word, std::true_type(), L);
            for (; word < all_words; word += L)
                columns(word, std::false_type(), PAIR<Operand> == 1 ? std::min<i64>(K - word, L - 1) : K - word * 2);
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

}  // namespace perfkit

// act(x wᵀ + bias) of bfloat16 numbers on AMX's tiles.
//
// A tile of sums is made of 16 rows of one operand, read as they lie, and of 16 rows of the other, packed: words of two
// inputs, those of 16 rows beside each other. Packed is what has fewer rows, at each call: one short pass, and nothing
// of the weights is kept that could be stale. Where it is x, the sums' tiles are transposed in the end.
#pragma once

#include "cpu_numbers.hpp"

#include "_tiles.hpp"
#include "_transpose.hpp"

#if PERFKIT_TILES

namespace {

constexpr i64 STEP = 2 * TILE;       // inputs of a tile
constexpr i64 BLOCK = 2 * TILE;      // rows of both operands whose sums are in four tiles
constexpr i64 WORDS = TILE * TILE;   // of a tile
constexpr i64 AT_LEAST = 1 << 20;    // multiply-adds that are worth waking a thread for
constexpr i64 MOST_STEPS = 32;       // of inputs that are multiplied before others: of 32 rows they are 64 KiB
constexpr i64 MOST_HIGH = 256;       // rows, and
constexpr i64 MOST_WIDE = 16;        // panels of a task

struct Release {
    void operator()(void* at) const { ::operator delete(at, std::align_val_t{64}); }
};
template <class Word>
using Aligned = std::unique_ptr<Word[], Release>;
template <class Word>
Aligned<Word> aligned(i64 count) {
    return Aligned<Word>(static_cast<Word*>(::operator new(sizeof(Word) * count, std::align_val_t{64})));
}

constexpr i64 parts(i64 length, i64 each) { return (length + each - 1) / each; }

// The operand that is packed: for each 16 rows, for each 32 inputs, a tile.
struct Packed {
    const i64 rows, K, steps, panels;
    const Aligned<std::int32_t> words;

    Packed(i64 rows_, i64 K_)
        : rows(rows_), K(K_), steps(parts(K, STEP)), panels(parts(rows, TILE)),
          words(aligned<std::int32_t>(panels * steps * WORDS)) {}

    std::int32_t* tile(i64 panel, i64 step) const { return &words[(panel * steps + step) * WORDS]; }

    // Of rows that lie one after the other.
    void pack(const std::uint16_t* from, i64 panel, i64 step) const {
        const i64 count = std::min<i64>(TILE, rows - panel * TILE), inputs = std::min(STEP, K - step * STEP);
        const std::uint16_t* at = from + panel * TILE * K + step * STEP;
        const __mmask32 mask = __mmask32((std::uint64_t(1) << inputs) - 1);
        Ints found[L];
#pragma GCC unroll 16
        for (int r = 0; r < TILE; ++r) found[r] = Ints(_mm512_maskz_loadu_epi16(r < count ? mask : 0, at + r * K));
        transpose(found);
#pragma GCC unroll 16
        for (int k = 0; k < TILE; ++k) store(tile(panel, step) + k * TILE, found[k]);
    }

    // Of columns: each input's numbers of all rows beside each other.
    template <class Number>
    void pack_across(const Number* from, i64 panel, i64 step) const {
        const i64 count = std::min<i64>(TILE, rows - panel * TILE), inputs = std::min(STEP, K - step * STEP);
        const Number* at = from + step * STEP * rows + panel * TILE;
        for (i64 k = 0; k < STEP; k += 2) {
            const Ints even = k < inputs ? halves_at(at + k * rows, count) : Ints{};
            const Ints odd = k + 1 < inputs ? halves_at(at + (k + 1) * rows, count) : Ints{};
            store(tile(panel, step) + k / 2 * TILE, even | odd << 16);
        }
    }
};

// Where 16 rows of an operand that lies lie, twice; and what is read soon.
struct Rows {
    const std::uint16_t *at[2], *rest;  // rest: the inputs that fill no whole tile, if there are any; 32 of each row
    const std::uint16_t* soon;          // `soon_rows` rows of which 32 inputs are prefetched with each tile
    i64 soon_rows;
};

// sums[2 i + j] += the products of A times 16 rows with B packed panels, in `steps` whole tiles of inputs and the rest.
template <int A, int B>
__attribute__((noinline)) void add_tiles(const Rows& rows, i64 stride, i64 steps, const std::int32_t* packed, i64 panel,
                                         bool fresh, float* const (&sums)[4]) {
    settle();
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums[0], 64);
        if constexpr (B > 1) _tile_loadd(1, sums[1], 64);
        if constexpr (A > 1) _tile_loadd(2, sums[2], 64);
        if constexpr (A > 1 && B > 1) _tile_loadd(3, sums[3], 64);
    }
    const auto add = [&](const std::uint16_t* first, const std::uint16_t* second, i64 bytes) INLINE_LAMBDA {
        _tile_loadd(4, first, bytes);
        _tile_loadd(6, packed, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (B > 1) _tile_loadd(7, packed + panel, 64);
        if constexpr (B > 1) _tile_dpbf16ps(1, 4, 7);
        if constexpr (A > 1) _tile_loadd(5, second, bytes);
        if constexpr (A > 1) _tile_dpbf16ps(2, 5, 6);
        if constexpr (A > 1 && B > 1) _tile_dpbf16ps(3, 5, 7);
        packed += WORDS;
    };
    for (i64 s = 0; s < steps; ++s) {
        for (i64 r = 0; r < rows.soon_rows; ++r) __builtin_prefetch(rows.soon + r * stride + s * STEP, 0, 2);
        add(rows.at[0] + s * STEP, rows.at[1] + s * STEP, 2 * stride);
    }
    if (rows.rest) add(rows.rest, rows.rest + TILE * STEP, 2 * STEP);
    _tile_stored(0, sums[0], 64);
    if constexpr (B > 1) _tile_stored(1, sums[1], 64);
    if constexpr (A > 1) _tile_stored(2, sums[2], 64);
    if constexpr (A > 1 && B > 1) _tile_stored(3, sums[3], 64);
    settle();
}

// Some rows of what lies, with some panels of what is packed.
struct Share {
    i64 first, last, from, to;
};

struct TilePass {
    const PerfkitLinear& p;
    const std::uint16_t* rows;  // as they lie, `count` of them: 16 at least
    const i64 count, wanted;    // of which so many are wanted
    const Packed& packed;
    const bool flipped;  // the packed ones are x's
    const float* bias;   // (N), and a vector of slack
    void* y;

    // `sums` holds a tile for each 16 rows and panel. Inputs are cut so that what is multiplied stays in the caches.
    void run(const Share& share, float* sums) const {
        const i64 pieces = parts(packed.steps, MOST_STEPS);
        for (i64 piece = 0; piece < pieces; ++piece) {
            const i64 begin = packed.steps * piece / pieces, end = packed.steps * (piece + 1) / pieces;
            for (i64 first = share.first; first < share.last; first += BLOCK)
                add(share, first, begin, end, sums);
        }
        for (i64 first = share.first; first < share.last; first += TILE)
            for (i64 q = share.from; q < share.to; ++q)
                put(tile(share, first, q, sums), std::min(first, count - TILE), first, q * TILE);
    }

  private:
    static float* tile(const Share& share, i64 first, i64 q, float* sums) {
        return sums + ((first - share.first) / TILE * (share.to - share.from) + q - share.from) * WORDS;
    }

    // The products of 32 rows with all panels of the share, of some steps.
    void add(const Share& share, i64 first, i64 begin, i64 end, float* sums) const {
        const bool two = first + TILE < share.last, ends = end * STEP > p.inputs;
        const i64 whole = end - begin - ends, left = p.inputs % STEP, next = first + BLOCK;
        Rows here{};
        alignas(64) std::uint16_t rest[BLOCK][STEP];
        for (int i = 0; i <= two; ++i)
            here.at[i] = rows + std::min(first + i * TILE, count - TILE) * p.inputs + begin * STEP;
        for (i64 r = 0; ends && r < (1 + two) * TILE; ++r)
            _mm512_store_si512(rest[r], _mm512_maskz_loadu_epi16((std::uint64_t(1) << left) - 1,
                                                                 here.at[r / TILE] + r % TILE * p.inputs + whole * STEP));
        here.rest = ends ? rest[0] : nullptr;
        const i64 pairs = parts(share.to - share.from, 2), soon = std::max<i64>(0, std::min(BLOCK, share.last - next));
        for (i64 q = share.from; q < share.to; q += 2) {
            const bool both = q + 1 < share.to;
            const i64 pair = (q - share.from) / 2, from = soon * pair / pairs;
            here.soon = rows + (next + from) * p.inputs + begin * STEP;
            here.soon_rows = soon * (pair + 1) / pairs - from;
            const auto sum = two ? both ? add_tiles<2, 2> : add_tiles<2, 1> : both ? add_tiles<1, 2> : add_tiles<1, 1>;
            float* const to[4] = {tile(share, first, q, sums), tile(share, first, q + 1, sums),
                                  tile(share, first + TILE, q, sums), tile(share, first + TILE, q + 1, sums)};
            sum(here, p.inputs, whole, packed.tile(q, begin), packed.steps * WORDS, begin == 0, to);
        }
    }

    // Sums of 16 rows from `start` on, of which those before `from` are others' to put, with 16 packed ones, into y.
    void put(const float* sums, i64 start, i64 from, i64 packed_row) const {
        const i64 skip = from - start, there = std::min<i64>(TILE, packed.rows - packed_row);
        Floats tile[L];
        for (int r = 0; r < TILE; ++r) tile[r] = load<Floats>(sums + r * TILE);
        if (flipped) {
            transpose(tile);
            const Floats own = load<Floats>(bias + start);
            for (i64 r = 0; r < there; ++r) put(tile[r] + own, (packed_row + r) * p.outputs + start, 0xffff << skip);
        } else {
            const Floats own = load<Floats>(bias + packed_row);
            for (i64 r = skip; r < std::min<i64>(TILE, wanted - start); ++r)
                put(tile[r] + own, (start + r) * p.outputs + packed_row, (1u << there) - 1);
        }
    }

    INLINE void put(Floats sum, i64 at, std::uint32_t lanes) const {
        const Floats value = at_least(p.relu ? Floats{} : all(-__builtin_inff()), sum);
        if (p.wide_y)
            _mm512_mask_storeu_ps(static_cast<float*>(y) + at, __mmask16(lanes), __m512(value));
        else
            _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(y) + at, __mmask16(lanes), __m256i(rounded(value)));
    }
};

template <class Task>
void each(i64 tasks, i64 work, Threads threads, Task task) {
    ThreadPool::run(
        tasks, {std::min(threads.count, work / AT_LEAST + 1), threads.parallel},
        [](void* context, long index) { (*static_cast<Task*>(context))(index); }, &task);
}

// Of fewer rows, reading the weights is most of the work.
bool by_tiles(const PerfkitLinear& p) { return p.bfloat16 && p.rows >= TILE && have_tiles(); }

void linear_by_tiles(const PerfkitLinear& p, void* x, void* w, const float* bias, void* y, Threads threads) {
    const auto halves = [](void* at) { return static_cast<const std::uint16_t*>(at); };
    const bool flipped = !p.across && p.outputs > p.rows;
    const Packed packed(flipped ? p.rows : p.outputs, p.inputs);
    const i64 wanted = flipped ? p.outputs : p.rows, count = std::max<i64>(wanted, TILE);
    const std::uint16_t* rows = halves(flipped ? w : x);
    std::vector<std::uint16_t> filled;
    if (wanted < TILE) {
        filled.resize(TILE * p.inputs);
        std::copy(rows, rows + wanted * p.inputs, filled.begin());
        rows = filled.data();
    }
    const i64 work = p.rows * p.outputs * p.inputs;
    const i64 pieces = std::min(packed.steps, parts(2 * threads.count, packed.panels));
    each(packed.panels * pieces, TILE * packed.rows * p.inputs, threads, [&](i64 task) {
        const i64 panel = task / pieces, piece = task % pieces;
        for (i64 s = packed.steps * piece / pieces; s < packed.steps * (piece + 1) / pieces; ++s)
            if (!p.across)
                packed.pack(halves(flipped ? x : w), panel, s);
            else if (p.wide_weight)
                packed.pack_across(static_cast<const float*>(w), panel, s);
            else
                packed.pack_across(halves(w), panel, s);
    });
    const TilePass pass{p, rows, count, wanted, packed, flipped, bias, y};
    const i64 useful = std::min(threads.count, work / AT_LEAST + 1);
    const i64 height = std::min(MOST_HIGH, round_up(parts(count, useful), BLOCK)), down = parts(count, height);
    const i64 across = std::min(parts(packed.panels, 2), std::max(parts(packed.panels, MOST_WIDE), parts(useful, down)));
    const i64 width = 2 * parts(parts(packed.panels, 2), across), space = height / TILE * width * WORDS;
    const auto sums = aligned<float>(down * across * space);
    each(down * across, work, threads, [&](i64 task) {
        const i64 first = task / across * height, from = task % across * width;
        const TileShape shape;
        pass.run({first, std::min(first + height, count), from, std::min(from + width, packed.panels)},
                 &sums[task * space]);
    });
}

}  // namespace

#endif

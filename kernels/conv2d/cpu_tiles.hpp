// The forward pass on AMX's tiles: bfloat16, 2 x 2 windows.
//
// An output sees (height + 1) x (width + 1) numbers of each input channel, whichever of its window's four places is
// looked at: each place has the same numbers, in words of two neighbours, and weights of its own, with zeros where it
// does not look. So a tile of sums is 16 channels' weights times the words that 16 outputs see, which lie in planes as
// in `cpu_planes.hpp`, and a plane is x itself with a step of two numbers.
#pragma once

#include "_tiles.hpp"
#include "cpu_forward.hpp"

#if PERFKIT_TILES

namespace {

constexpr i64 TILE_NUMBERS = 2 * TILE * TILE;
constexpr i64 PLACES = 4;  // in a window

// Where they are taken. Of an even width the last word would be half beyond what an output sees.
inline bool by_tiles(const PerfkitConv2d& p) {
    const bool dense = p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1;
    return p.bfloat16 && p.pool == 2 && dense && p.kernel_width % 2 && (p.x_w == 1 || !p.channels_last) && have_tiles();
}

// Words of two numbers that an output sees of each input channel, and tiles of weights that they take.
inline i64 words_seen(const Shape& p) { return (p.kernel_height + 1) * ((p.kernel_width + 1) / 2); }
inline i64 tile_steps(const Shape& p) { return Shape::parts(p.I * words_seen(p), TILE); }

// Weights as tiles: for each 16 channels of a group, each 16 words, each place in a window.
struct TileWeights {
    const i64 steps, blocks;  // of words; of a group's channels
    const Lines own;

    TileWeights(const Shape& p, const Numbers& from)
        : steps(tile_steps(p)), blocks(Shape::parts(p.O, TILE)),
          own(lines(p.groups * blocks * steps * PLACES * TILE_NUMBERS / 2)) {
        std::fill(own.get(), own.get() + p.groups * blocks * steps * PLACES * TILE_NUMBERS / 2, 0.0f);
        const i64 columns = (p.kernel_width + 1) / 2 * 2, rows = p.kernel_height + 1;
        const i64 taps = p.kernel_height * p.kernel_width;
        for (i64 t = 0; t < p.T; ++t)
            for (i64 n = 0; n < PLACES; ++n) {
                const i64 h = t % taps / p.kernel_width + n / 2, w = t % p.kernel_width + n % 2;
                const i64 number = (t / taps * rows + h) * columns + w, place = p.weight_place(t);
                for (i64 block = 0; block < p.groups * blocks; ++block) {
                    const i64 first = block / blocks * p.O + block % blocks * TILE;
                    const i64 count = std::min<i64>(TILE, p.O - block % blocks * TILE);
                    const std::uint16_t* taken = from.halves() + first * p.w_o + place;
                    std::uint16_t* to = at(block, number / (2 * TILE)) + n * TILE_NUMBERS + number % (2 * TILE);
                    for (i64 o = 0; o < count; ++o) to[o * 2 * TILE] = taken[o * p.w_o];
                }
            }
    }

    std::uint16_t* at(i64 block, i64 step) const {
        return reinterpret_cast<std::uint16_t*>(own.get()) + (block * steps + step) * PLACES * TILE_NUMBERS;
    }
};

// What a chunk sees of one group's input channels, in words of two numbers.
struct PairPlanes {
    const Shape& p;
    const i64 row, words;  // from one row of `seen` to the next, with slack; planes
    const std::unique_ptr<std::uint16_t[]> seen;
    const Lines planes;

    explicit PairPlanes(const Shape& shape)
        : p(shape), row(round_up(shape.wide + 4 * L, 2 * L)), words(tile_steps(shape) * TILE),
          seen(new std::uint16_t[shape.I * shape.high * row]()), planes(lines(words * shape.plane + L)) {
        std::fill(planes.get(), planes.get() + words * p.plane + L, 0.0f);
    }

    // False where a number is none, or infinite: zeros must not be multiplied with those.
    bool fill(const Numbers& x, i64 group, const Chunk& chunk) const {
        if (!copy(x, group, chunk)) return false;
        float* to = planes.get();
        for (i64 i = 0; i < p.I; ++i)
            for (i64 down = 0; down <= p.kernel_height; ++down)
                for (i64 right = 0; right <= p.kernel_width; right += 2, to += p.plane) {
                    const std::uint16_t* from = &seen[(i * p.high + down) * row + right];
                    for (i64 r = 0; r < chunk.rows; ++r, from += 2 * row)
                        for (i64 c = 0; c < chunk.columns; c += L)  // what is too much, the next row overwrites
                            store(to + r * chunk.columns + c, load<Ints>(from + 2 * c));
                    store(to + chunk.rows * chunk.columns, Floats{});
                }
        return true;
    }

  private:
    bool copy(const Numbers& x, i64 group, const Chunk& chunk) const {
        const i64 first_h = 2 * chunk.row - p.top, first_w = 2 * chunk.column - p.left;
        const i64 rows = 2 * chunk.rows + p.kernel_height - 1, columns = 2 * chunk.columns + p.kernel_width - 1;
        const i64 from = std::min(std::max<i64>(0, -first_w), columns);
        const i64 to = std::max(from, std::min(columns, p.width - first_w));
        const __m512i infinite = _mm512_set1_epi16(0x7f80);
        __mmask32 found = 0;
        for (i64 i = 0; i < p.I; ++i)
            for (i64 r = 0; r < rows; ++r) {
                std::uint16_t* at = &seen[(i * p.high + r) * row];
                const i64 h = first_h + r;
                if (h < 0 || h >= p.height) {
                    std::fill(at, at + columns, 0);
                    continue;
                }
                const std::uint16_t* here = x.halves() + chunk.image * p.x_n + (group * p.I + i) * p.x_c + h * p.x_h +
                                            (first_w + from) * p.x_w;
                for (i64 c = 0; c < from; ++c) at[c] = 0;
                for (i64 c = from; c < to; c += 2 * L) {  // whole vectors: what is beyond is overwritten
                    const i64 count = std::min<i64>(2 * L, to - c);
                    const __mmask32 mask = __mmask32((std::uint64_t(1) << count) - 1);
                    alignas(64) std::uint16_t apart[2 * L];
                    for (i64 k = 0; p.x_w != 1 && k < count; ++k) apart[k] = here[(c - from + k) * p.x_w];
                    const __m512i taken = _mm512_maskz_loadu_epi16(mask, p.x_w == 1 ? here + c - from : apart);
                    found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(taken, infinite), infinite);
                    _mm512_storeu_si512(at + c, taken);
                }
                for (i64 c = to; c < columns; ++c) at[c] = 0;
            }
        return !found;
    }
};

// The outputs of chunks, 16 channels of a vector of outputs at a time: while the tiles are at one, the vectors are at
// the one before.
struct TiledForward {
    const Shape& p;
    const Numbers x;
    const TileWeights& weights;
    const Forward& pass;

    // False as `PairPlanes::fill` has it.
    template <bool SAVE>
    bool run(const Chunk& chunk, const PairPlanes& planes) const {
        alignas(64) float sums[2][PLACES][TILE][TILE];
        const i64 count = Shape::parts(chunk.rows * chunk.columns, L) * weights.blocks;
        for (i64 group = 0; group < p.groups; ++group) {
            if (!planes.fill(x, group, chunk)) return false;
            for (i64 i = 0; i <= count; ++i) {
                const i64 v = i / weights.blocks * L, block = group * weights.blocks + i % weights.blocks;
                settle();
                if (i < count) multiply(&planes.planes[v], weights.at(block, 0));
                if (i > 0) put<SAVE>(sums[(i - 1) % 2], chunk, group, i - 1);
                if (i < count) store(sums[i % 2]);
            }
        }
        return true;
    }

  private:
    INLINE void multiply(const float* seen, const std::uint16_t* from) const {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (i64 s = 0; s < weights.steps; ++s, seen += TILE * p.plane, from += PLACES * TILE_NUMBERS) {
            _tile_loadd(4, seen, sizeof(float) * p.plane);
            _tile_loadd(5, from, 64);
            _tile_dpbf16ps(0, 5, 4);
            _tile_loadd(6, from + TILE_NUMBERS, 64);
            _tile_dpbf16ps(1, 6, 4);
            _tile_loadd(7, from + 2 * TILE_NUMBERS, 64);
            _tile_dpbf16ps(2, 7, 4);
            _tile_loadd(5, from + 3 * TILE_NUMBERS, 64);
            _tile_dpbf16ps(3, 5, 4);
        }
    }

    INLINE void store(float (&sums)[PLACES][TILE][TILE]) const {
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }

    // Outputs number `index` of a chunk: the largest of each window, with its bias, and what is to be done with it.
    template <bool SAVE>
    INLINE void put(const float (&sums)[PLACES][TILE][TILE], const Chunk& chunk, i64 group, i64 index) const {
        const i64 v = index / weights.blocks * L, o = index % weights.blocks * TILE, first = group * p.O + o;
        const i64 count = std::min<i64>(TILE, p.O - o), many = std::min<i64>(L, chunk.rows * chunk.columns - v);
        const i64 place = chunk.row * p.out_width + chunk.column + v;
        const auto found = [&](i64 o, Floats& value, Ints& window) INLINE_LAMBDA {
            Floats of[PLACES];
#pragma GCC unroll 4
            for (int n = 0; n < PLACES; ++n) of[n] = load<Floats>(sums[n][o]);
            reduce<SAVE>(of, 0, value, window);
            value += same(pass.bias[first + o]);
        };
        if (!SAVE && !p.channels_last) {
            const Floats low = same(p.relu ? 0.0f : -__builtin_inff());
            for (i64 o = 0, at = (chunk.image * p.outputs + first) * p.area() + place; o < count; ++o, at += p.area()) {
                Floats value;
                Ints window;
                found(o, value, window);
                pass.y.put(at, at_least(low, value), many);
            }
            return;
        }
        Tile tile;
        for (i64 o = 0; o < count; ++o) found(o, tile.values[0][o], tile.windows[0][o]);
        pass.put<SAVE>(tile.values[0], tile.windows[0], chunk.image, first, count, place, many);
    }
};

// False where x holds what is no number, and nothing is done that counts.
inline bool forward_by_tiles(const Shape& p, Numbers x, Numbers weight, const float* bias, Numbers y,
                             std::uint8_t* argmax, Threads threads) {
    const TileWeights weights(p, weight);
    const Forward pass{p, x, y, nullptr, bias, argmax};
    const i64 chunks = p.batch * p.chunks, useful = std::min(threads.count, p.work() / WORTH + 1);
    const i64 slices = std::min(chunks, useful > 1 ? 4 * useful : 1);
    std::vector<std::unique_ptr<PairPlanes>> planes;
    for (i64 s = 0; s < slices; ++s) planes.emplace_back(new PairPlanes(p));
    std::atomic<bool> finite{true};
    const TiledForward tiled{p, x, weights, pass};
    parallel(slices, threads, p.work(), [&](i64 s) {
        const TileShape shape;
        for (i64 i = chunks * s / slices; i < chunks * (s + 1) / slices && finite; ++i)
            if (!(argmax ? tiled.run<true>(p.chunk(i), *planes[s]) : tiled.run<false>(p.chunk(i), *planes[s])))
                finite = false;
    });
    return finite;
}

}  // namespace

#endif

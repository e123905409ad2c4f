// Few input channels: lanes are pooled outputs.
//
// Letters: I input channels, P the pool's side, W its P * P places ("windows"), T terms: a term is a product of four
// bytes, of numbers that lie side by side in a row of x.
//
// The windows of a row see overlapping numbers: the same four bytes serve all of them, with the taps moved along and
// zeros beside them. So 3x3 taps in 2x2 windows read four vectors for each channel, not 36 numbers.
#pragma once

#include "cpu_call.hpp"

namespace {

constexpr i64 CACHED = 1 << 15;         // lanes of planes made at a time: they stay in the second-level cache
constexpr int CHANNELS = WIDE ? 4 : 2;  // of so many output channels,
constexpr int STREAMS = 4;              // so many windows, or vectors of outputs, are summed at once

INLINE i64 parts(i64 length, i64 each) { return (length + each - 1) / each; }

struct PlanesShape {
    const PerfkitConv2dInt8& p;
    const i64 P, W, step_h, step_w;  // from one output to the next, in x
    const i64 reach;                 // of a row's taps
    const i64 quads;                 // fours of numbers that a row's windows see, from an output's first number on
    const i64 each;                  // of them for each window
    const i64 T;
    const i64 high;                     // rows that an output's windows see
    const i64 streams;

    explicit PlanesShape(const PerfkitConv2dInt8& p)
        : p(p), P(p.pool), W(P * P), step_h(P * p.stride_h), step_w(P * p.stride_w),
          reach((p.kernel_width - 1) * p.dilation_w), quads(((P - 1) * p.stride_w + reach) / 4 + 1), each(most_each()),
          T(p.inputs * p.kernel_height * each), high((P - 1) * p.stride_h + (p.kernel_height - 1) * p.dilation_h + 1),
          streams(W == 1 ? STREAMS : W) {}

    i64 most_each() const {
        i64 most = 0;
        for (i64 b = 0; b < P; ++b) most = std::max(most, (b * p.stride_w + reach) / 4 - b * p.stride_w / 4 + 1);
        return most;
    }
    i64 first(i64 b) const { return std::min(b * p.stride_w / 4, quads - each); }  // four of window column b
    i64 packed() const { return round_up(4 * round_up(p.outputs, CHANNELS) * T * P, 64); }

    // (O, T, P) of four bytes.
    void pack(const i8* weight, i8* to) const {
        const i64 taps = p.kernel_height * p.kernel_width;
        std::memset(to, 0, packed());
        for (i64 o = 0; o < p.outputs; ++o)
            for (i64 t = 0; t < p.inputs * p.kernel_height; ++t)
                for (i64 b = 0; b < P; ++b)
                    for (i64 k = 0; k < p.kernel_width; ++k) {
                        const i64 right = b * p.stride_w + k * p.dilation_w - 4 * first(b);
                        to[4 * ((o * T + t * each + right / 4) * P + b) + right % 4] =
                            weight[o * p.inputs * taps + t * p.kernel_width + k];
                    }
    }
};

// What a chunk of rows of outputs sees, and its sums.
class PlanesPass {
  public:
    PlanesPass(const PlanesShape& s, const Call& call, i64 useful)
        : s(s), p(s.p), call(call), chunk(chunk_rows(p, CACHED / (p.inputs * s.high * s.quads) / p.out_width, useful)),
          seen_high((chunk - 1) * s.step_h + s.high), seen_wide((p.out_width - 1) * s.step_w + 4 * s.quads),
          row(round_up((round_up(p.out_width, L) - 1) * s.step_w + 4 * s.quads + L, 64)),
          plane(round_up(chunk * p.out_width + L, 32) + 16), seen(lines<u8>(p.inputs * seen_high * row)),
          planes(lines<std::int32_t>(p.inputs * s.high * s.quads * plane + STREAMS * L)),
          offsets(lines<i64>(s.T * s.streams)) {
        for (i64 t = 0; t < s.T; ++t)
            for (i64 w = 0; w < s.streams; ++w) {
                const i64 a = s.W == 1 ? 0 : w / s.P, b = s.W == 1 ? 0 : w % s.P, taps = t / s.each;
                const i64 down = a * p.stride_h + taps % p.kernel_height * p.dilation_h;
                const i64 number = (taps / p.kernel_height * s.high + down) * s.quads + s.first(b) + t % s.each;
                offsets[t * s.streams + w] = number * plane + (s.W == 1 ? w * L : 0);
            }
        std::memset(seen.get(), 0, p.inputs * seen_high * row);
    }

    i64 chunks() const { return parts(p.out_height, chunk); }  // of an image

    void run(i64 index) {
        const i64 image = index / chunks(), first = index % chunks() * chunk;
        const i64 rows = std::min(chunk, p.out_height - first), done = first * p.out_width, count = rows * p.out_width;
        fill(image, first, rows);
        const i64 most = s.W == 1 ? STREAMS * L : L;
        for (i64 at = 0; at < count; at += most) {
            // The last vector is a whole one, of which some may be there already.
            const i64 v = s.W > 1 && count >= L ? std::min(at, count - L) : at;
            if (s.W == 1)
                each_channel<1>(image, v, done, count, parts(std::min(most, count - v), L));
            else if (s.P == 2 && s.quads == s.each)  // both windows of a row read the same
                each_channel<2>(image, v, done, count, 1, count - v < L ? 0 : bytes_of_squares(image, v, done));
            else
                each_channel<0>(image, v, done, count, 1);
        }
    }

  private:
    const PlanesShape& s;
    const PerfkitConv2dInt8& p;
    const Call& call;
    const i64 chunk, seen_high, seen_wide, row, plane;
    Lines<u8> seen;
    Lines<std::int32_t> planes;
    Lines<i64> offsets;

    void fill(i64 image, i64 first, i64 rows) {
        const i64 first_h = first * s.step_h - p.top_pad, first_w = -p.left_pad;
        const i64 wanted = (rows - 1) * s.step_h + s.high;
        const i64 from = std::clamp<i64>(-first_w, 0, seen_wide), to = std::clamp<i64>(p.width - first_w, from, seen_wide);
        for (i64 i = 0; i < p.inputs; ++i)
            for (i64 r = 0; r < wanted; ++r) {
                u8* const at = &seen[(i * seen_high + r) * row];
                const i64 h = first_h + r;
                if (h < 0 || h >= p.height || from == to) {
                    std::memset(at, int(p.zero), seen_wide);
                    continue;
                }
                if (from) std::memset(at, int(p.zero), from);
                call.take(image, i, h, first_w + from, to - from, at + from);
                if (to < seen_wide) std::memset(at + to, int(p.zero), seen_wide - to);
            }
        if (s.step_w == 1)
            spread(rows, [](const u8* at, i64 c) INLINE_LAMBDA { return fours<1>(at + c); });
        else if (s.step_w == 2)
            spread(rows, [](const u8* at, i64 c) INLINE_LAMBDA { return fours<2>(at + 2 * c); });
        else
            spread(rows, [step = s.step_w](const u8* at, i64 c) {
                Ints found;
                for (int lane = 0; lane < L; ++lane) found[lane] = load<std::int32_t>(at + (c + lane) * step);
                return found;
            });
    }

    // The four bytes from each STEP-th byte on; 64 may be read.
    template <int STEP>
    static INLINE Ints fours(const u8* at) {
#if PERFKIT_BYTES == 512
        // Each 128 bits get the words that theirs begin with, then the bytes go to their places.
        constexpr Ints words = {0, 1, 0, 0, 1, 2, 0, 0, 2, 3, 0, 0, 3, 4, 0, 0};
        constexpr Ints pairs = {0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9};
        const __m512i near = _mm512_permutexvar_epi32(__m512i(STEP == 2 ? pairs : words), load<__m512i>(at));
        constexpr int S = STEP, T = 2 * STEP, U = 3 * STEP;
        const __m128i places = _mm_setr_epi8(0, 1, 2, 3, S, S + 1, S + 2, S + 3, T, T + 1, T + 2, T + 3, U, U + 1, U + 2, U + 3);
        return Ints(_mm512_shuffle_epi8(near, _mm512_broadcast_i32x4(places)));
#else
        Ints found{};
        for (int j = 0; j < 4; ++j)
            if (STEP == 1)
                found |= __builtin_convertvector(load<Bytes>(at + j), Ints) << 8 * j;
            else if (j % 2 == 0)
                found |= __builtin_convertvector(load<Halves>(at + j), Ints) << 8 * j;
        return found;
#endif
    }

    // Fours of numbers into planes, by vectors: what one writes too much, the next row overwrites.
    template <class Take>
    void spread(i64 rows, Take take) {
        std::int32_t* to = planes.get();
        for (i64 i = 0; i < p.inputs; ++i)
            for (i64 down = 0; down < s.high; ++down)
                for (i64 q = 0; q < s.quads; ++q, to += plane) {
                    const u8* from = &seen[(i * seen_high + down) * row + 4 * q];
                    for (i64 r = 0; r < rows; ++r, from += s.step_h * row)
                        for (i64 c = 0; c < p.out_width; c += L) store(to + r * p.out_width + c, take(from, c));
                }
    }

    // The largest of 2 x 2 windows that read the same fours, of a whole vector of outputs, as bytes that lie by channels:
    // in registers from the products to the bytes. Returns of how many channels.
    i64 bytes_of_squares(i64 image, i64 v, i64 done) const {
        if (call.finish.kind != UINT8 || p.y_last) return 0;
        const i64 at = image * p.outputs * call.area() + done + v;
        return s.T == 3 ? bytes_of_squares<3>(&planes[v], at) : bytes_of_squares<0>(&planes[v], at);
    }
    // TERMS: T, where x's vectors are to stay in registers, too.
    template <int TERMS>
    __attribute__((noinline)) i64 bytes_of_squares(const std::int32_t* x, i64 at) const {
        constexpr int C = CHANNELS;
        const Finish finish = call.finish;  // of its own: what is written might be it, for all compilers know
        const bool bounded = finish.low == 0 && finish.grid.zero > 0;  // by ReLU: else the grid has nothing below it
        const bool whole = finish.grid.is_whole();
        const i64 T = TERMS ? TERMS : s.T, area = call.area(), end = p.outputs / C * C, *const from = offsets.get();
        const i8* weights = call.weights;
        u8* to = static_cast<u8*>(finish.y) + at;
        Ints kept[TERMS + 1][2];
        each<TERMS>([&](auto t) INLINE_LAMBDA {
            for (int a = 0; a < 2; ++a) kept[t][a] = held(load<Ints>(x + from[4 * t + 2 * a]));
        });
        for (i64 o = 0; o < end; o += C, weights += 8 * C * T) {
            Ints sums[C][4];
            each<C>([&](auto c) INLINE_LAMBDA {
                const Ints first = Ints{} + finish.begin[o + c];
                for (auto& sum : sums[c]) sum = first;
            });
            const auto add = [&](i64 t, Ints above, Ints below) INLINE_LAMBDA {
                each<C>([&](auto c) INLINE_LAMBDA {
                    const i8* w = weights + 8 * (c * T + t);
                    const Ints left = held(Ints{} + load<std::int32_t>(w)), right = held(Ints{} + load<std::int32_t>(w + 4));
                    sums[c][0] = add_products(sums[c][0], above, left), sums[c][1] = add_products(sums[c][1], above, right);
                    sums[c][2] = add_products(sums[c][2], below, left), sums[c][3] = add_products(sums[c][3], below, right);
                });
            };
            each<TERMS>([&](auto t) INLINE_LAMBDA { add(t, kept[t][0], kept[t][1]); });
            for (i64 t = TERMS; t < T; ++t) add(t, load<Ints>(x + from[4 * t]), load<Ints>(x + from[4 * t + 2]));
            each<C>([&](auto c) INLINE_LAMBDA {
                const Ints most = largest(largest(sums[c][0], sums[c][1]), largest(sums[c][2], sums[c][3]));
                const Floats value = finish.scaled(most, o + c);
                const Floats least = bounded ? at_least(Floats{}, value) : value;
                store(to, whole ? finish.grid.whole_bytes(value) : finish.grid.bytes(least)), to += area;
            });
        }
        return end;
    }

    // Channels from `from` on. SIDE: P where it is 1, or 2 and both windows of a row read the same; else 0.
    template <int SIDE>
    void each_channel(i64 image, i64 v, i64 done, i64 count, i64 vectors, i64 from = 0) {
        for (i64 o = from; o < p.outputs; o += PANEL) {
            const i64 last = std::min(o + PANEL, p.outputs);
            Ints sums[STREAMS][PANEL];
            for (i64 c = o; c < last; c += CHANNELS)
                convolve<SIDE>(&planes[v], call.weights + 4 * c * s.T * s.P, c, vectors, &sums[0][c - o]);
            for (i64 n = 0; n < vectors; ++n)
                put(sums[n], image, o, last - o, done + v + n * L, std::min<i64>(L, count - v - n * L));
        }
    }

    // The largest sums of CHANNELS channels, the last of which may be of nothing, of so many vectors.
    template <int SIDE>
    INLINE void convolve(const std::int32_t* x, const i8* weights, i64 o, i64 vectors, Ints* to) const {
        const i64 P = SIDE ? SIDE : s.P, T = s.T;
        for (i64 w = 0; w < s.W; w += STREAMS)
            counted<STREAMS>(SIDE == 1 ? vectors : SIDE == 2 ? 4 : s.W - w, [&](auto streams) INLINE_LAMBDA {
                constexpr int N = decltype(streams)::value;
                Ints sums[CHANNELS][N];
#pragma GCC unroll 4
                for (int c = 0; c < CHANNELS; ++c) {
                    const Ints first = Ints{} + call.finish.begin[o + c];
#pragma GCC unroll 4
                    for (int n = 0; n < N; ++n) sums[c][n] = first;
                }
                const i64* at = offsets.get() + w;
                const i8* of = weights;
                for (i64 t = 0; t < T; ++t, at += s.streams, of += 4 * P) {
                    Ints here[N];
                    for (int n = 0; n < N; ++n) here[n] = SIDE == 2 && n % 2 ? here[n - 1] : load<Ints>(x + at[n]);
#pragma GCC unroll 4
                    for (int c = 0; c < CHANNELS; ++c)
#pragma GCC unroll 4
                        for (int n = 0; n < N; ++n) {
                            const i64 b = SIDE == 1 ? 0 : SIDE == 2 ? n % 2 : (w + n) % P;
                            const Ints weight = Ints{} + load<std::int32_t>(of + 4 * (c * T * P + b));
                            sums[c][n] = add_products(sums[c][n], here[n], weight);
                        }
                }
#pragma GCC unroll 4
                for (int c = 0; c < CHANNELS; ++c) {
                    if (SIDE == 1) {
                        for (int n = 0; n < N; ++n) to[n * PANEL + c] = sums[c][n];
                        continue;
                    }
                    Ints most = sums[c][0];
                    for (int n = 1; n < N; ++n) most = largest(most, sums[c][n]);
                    to[c] = w == 0 ? most : largest(to[c], most);
                }
            });
    }

    // `channels` of `many` places, the first of them number `place` of the image.
    INLINE void put(const Ints* sums, i64 image, i64 o, i64 channels, i64 place, i64 many) const {
        const Finish finish = call.finish;  // of its own: what bytes are written to might be it, for all compilers know
        if (!p.y_last) {
            const i64 area = call.area();
            i64 at = (image * p.outputs + o) * area + place;
            for (i64 c = 0; c < channels; ++c, at += area) finish.put(at, finish.along(sums[c], o + c), many);
            return;
        }
        for (i64 c = 0; c < channels; c += L) {
            Floats tile[L];
            for (i64 lane = 0; lane < L; ++lane)
                tile[lane] = finish.along(sums[std::min(c + lane, channels - 1)], o + std::min(c + lane, channels - 1));
            transpose(tile);
            for (i64 i = 0; i < many; ++i)
                finish.put((image * call.area() + place + i) * p.outputs + o + c, tile[i], channels - c);
        }
    }
};

}  // namespace

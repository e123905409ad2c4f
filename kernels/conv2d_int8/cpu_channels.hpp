// Many input channels: lanes are output channels, and what a row of taps reads lies in one piece.
//
// Letters: C input channels, in whole fours; O output channels; P the pool's side; K4 fours of products of an output.
#pragma once

#include "cpu_call.hpp"

namespace {

constexpr i64 SEEN = 1 << 18;    // bytes of x,
constexpr i64 PLACES = 1 << 10;  // and places of sums, made at a time: they stay in the second-level cache

struct ChannelsShape {
    const PerfkitConv2dInt8& p;
    const i64 C, K4;

    explicit ChannelsShape(const PerfkitConv2dInt8& p)
        : p(p), C(round_up(p.inputs, 4)), K4(p.kernel_height * p.kernel_width * C / 4) {}

    i64 packed() const { return round_up(p.outputs, PANEL) * 4 * K4; }

    // Panels of (kernel's height, width, C) by outputs.
    void pack(const i8* weight, i8* to) const {
        const i64 taps = p.kernel_height * p.kernel_width;
        std::memset(to, 0, packed());
        for (i64 o = 0; o < p.outputs; ++o)
            for (i64 c = 0; c < p.inputs; ++c)
                for (i64 t = 0; t < taps; ++t)
                    to[(o / PANEL * K4 + (t * C + c) / 4) * BLOCK + o % PANEL * 4 + c % 4] =
                        weight[(o * p.inputs + c) * taps + t];
    }
};

// What a chunk of rows of outputs sees, and its sums.
class ChannelsPass {
  public:
    ChannelsPass(const ChannelsShape& s, const Call& call, i64 useful)
        : s(s), p(s.p), call(call), direct(p.y_last && p.pool == 1), wide(p.out_width * p.pool),
          seen_wide((wide - 1) * p.stride_w + (p.kernel_width - 1) * p.dilation_w + 1), row(seen_wide * s.C),
          chunk(chunk_rows(p, std::min(SEEN / (p.stride_h * p.pool * row), PLACES / (p.pool * wide)), useful)),
          seen_high((chunk * p.pool - 1) * p.stride_h + (p.kernel_height - 1) * p.dilation_h + 1),
          seen(lines<u8>(seen_high * row)), four(lines<u8>(s.C * round_up(p.width, 64))),
          sums(lines<std::int32_t>((chunk * p.pool * wide + ROWS) * VECTORS * L)) {}

    i64 chunks() const { return (p.out_height + chunk - 1) / chunk; }  // of an image

    void run(i64 index) {
        const i64 image = index / chunks(), first = index % chunks() * chunk, rows = std::min(chunk, p.out_height - first);
        fill(image, first, rows);
        for (i64 o = 0; o < p.outputs; o += VECTORS * L)
            counted<VECTORS>((p.outputs - o + L - 1) / L, [&](auto vectors) {
                constexpr int G = decltype(vectors)::value;
                const i64 count = rows * p.pool * wide;
                for (i64 at = 0; at < count; at += ROWS)
                    counted<ROWS>(count - at, [&](auto places) {
                        tile<decltype(places)::value, G>(at, o, (image * call.area() + first * p.out_width) * p.outputs);
                    });
                for (i64 g = 0; g < G && !direct; ++g) put(image, first, rows, o + g * L, g, G);
            });
    }

  private:
    const ChannelsShape& s;
    const PerfkitConv2dInt8& p;
    const Call& call;
    const bool direct;  // nothing has to be put together of several places
    const i64 wide, seen_wide, row, chunk, seen_high;
    Lines<u8> seen, four;  // four: a row before it is put together
    Lines<std::int32_t> sums;

    void fill(i64 image, i64 first, i64 rows) {
        const i64 first_h = first * p.pool * p.stride_h - p.top_pad;
        const i64 wanted = (rows * p.pool - 1) * p.stride_h + (p.kernel_height - 1) * p.dilation_h + 1;
        const i64 from = std::clamp<i64>(p.left_pad, 0, seen_wide);
        const i64 to = std::clamp<i64>(p.width + p.left_pad, from, seen_wide), there = to - from;
        for (i64 r = 0; r < wanted; ++r) {
            u8* const at = &seen[r * row];
            const i64 h = first_h + r;
            if (h < 0 || h >= p.height || !there) {
                std::memset(at, int(p.zero), row);
                continue;
            }
            std::memset(at, int(p.zero), from * s.C);
            const i64 left = from - p.left_pad;
            p.x_last ? take(image, h, left, there, at + from * s.C) : turn(image, h, left, there, at + from * s.C);
            std::memset(at + to * s.C, int(p.zero), (seen_wide - to) * s.C);
        }
    }

    // Places of an image that lies as it is read.
    void take(i64 image, i64 h, i64 left, i64 there, u8* to) {
        const i64 from = ((image * p.height + h) * p.width + left) * p.inputs;
        const bool whole = s.C == p.inputs;
        const u8* bytes = static_cast<const u8*>(call.x) + from;
        if (p.x_kind == FLOAT32) {
            u8* const rounded = whole ? to : four.get();
            call.grid.row(static_cast<const float*>(call.x) + from, there * p.inputs, rounded), bytes = rounded;
        } else if (whole)
            std::memcpy(to, bytes, there * s.C);
        if (!whole && s.C == 4 && bytes == four.get())  // at once: what is beyond meets weights of zero
            for (i64 i = 0; i < there; ++i) store(to + 4 * i, load<std::int32_t>(bytes + i * p.inputs));
        else if (!whole)
            for (i64 i = 0; i < there; ++i) std::memcpy(to + i * s.C, bytes + i * p.inputs, p.inputs);
    }

    // Of one whose channels lie apart.
    void turn(i64 image, i64 h, i64 left, i64 there, u8* to) {
        const i64 each = round_up(p.width, 64);
        for (i64 c = 0; c < s.C; c += 4) {
            for (i64 j = 0; j < 4 && c + j < p.inputs; ++j) call.take(image, c + j, h, left, there, &four[j * each]);
            for (i64 i = 0; i < there; i += L) {
                Ints together{};
                for (int j = 0; j < 4; ++j)
                    together |= __builtin_convertvector(load<Bytes>(&four[j * each + i]), Ints) << 8 * j;
                for (i64 lane = 0; lane < std::min<i64>(L, there - i); ++lane)
                    store(to + (i + lane) * s.C + c, std::int32_t(together[lane]));
            }
        }
    }

    // The sums of R places, from `at` on, with G vectors of outputs from o on; `direct`: into y, where the chunk begins.
    template <int R, int G>
    void tile(i64 at, i64 o, i64 begin) {
        Ints found[R][G];
        ::begin(call.finish.begin + o, found);
        const u8* x[R];
        for (int r = 0; r < R; ++r)
            x[r] = &seen[(at + r) / wide * p.stride_h * row + (at + r) % wide * p.stride_w * s.C];
        const i64 pieces = p.dilation_w == 1 ? 1 : p.kernel_width, K4 = s.K4 / p.kernel_height / pieces;
        const i8* w = call.weights + o / PANEL * s.K4 * BLOCK;
        for (i64 down = 0; down < p.kernel_height; ++down)
            for (i64 piece = 0; piece < pieces; ++piece, w += K4 * BLOCK) {
                const u8* here[R];
                for (int r = 0; r < R; ++r)
                    here[r] = x[r] + down * p.dilation_h * row + piece * p.dilation_w * s.C;
                add_dots<R, G>(here, w, K4, s.K4, found);
            }
        const Finish finish = call.finish;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g) {
                const i64 n = o + g * L;
                if (direct)
                    finish.put(begin + (at + r) * p.outputs + n, finish.across(found[r][g], n), p.outputs - n);
                else
                    store(&sums[((at + r) * G + g) * L], found[r][g]);
            }
    }

    // A vector of outputs of all places.
    void put(i64 image, i64 first, i64 rows, i64 o, i64 g, i64 G) const {
        const i64 count = rows * p.out_width, done = first * p.out_width, left = p.outputs - o;
        const Finish finish = call.finish;  // of its own: what is written might be it, for all compilers know
        const auto value = [&](i64 i) INLINE_LAMBDA {
            const std::int32_t* at = &sums[((i / p.out_width * wide + i % p.out_width) * p.pool * G + g) * L];
            Ints most = load<Ints>(at);
            for (i64 w = 1; w < p.pool * p.pool; ++w)
                most = largest(most, load<Ints>(at + (w / p.pool * wide + w % p.pool) * G * L));
            return finish.across(most, o);
        };
        if (p.y_last) {
            for (i64 i = 0; i < count; ++i) finish.put((image * call.area() + done + i) * p.outputs + o, value(i), left);
            return;
        }
        for (i64 i = 0; i < count; i += L) {
            Floats turned[L];
            for (i64 lane = 0; lane < L; ++lane) turned[lane] = value(std::min(i + lane, count - 1));
            transpose(turned);
            for (i64 c = 0; c < std::min<i64>(L, left); ++c)
                finish.put((image * p.outputs + o + c) * call.area() + done + i, turned[c], count - i);
        }
    }
};

}  // namespace

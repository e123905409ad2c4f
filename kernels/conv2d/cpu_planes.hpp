// x as the kernel reads it.
#pragma once

#include "cpu_numbers.hpp"
#include "cpu_problem.hpp"

namespace {

// Some outputs of one image: whole rows, or a part of one.
struct Chunk {
    i64 image, row, rows, column, columns;
};

struct Shape : PerfkitConv2d {
    i64 I, O, T, W;                  // I and O of one group
    i64 step_h, step_w;              // from one output to the next, in x
    std::vector<i64> downs, rights;  // where in x, from an output's first number, there is something to see
    i64 places, Q;                   // how many of them, and planes: one for each place and input channel
    i64 streams;
    std::vector<i64> offsets;        // of tap t's plane in window w, in floats: [t * streams + w]; of one: in vector w
    bool near;                       // 3x3 taps in 2x2 windows: sixteen places
    bool paired;                     // the same in bfloat16, multiplied two taps at once
    bool tiled;                      // planes are of pairs, for `cpu_tiles.hpp`
    i64 chunk_rows, chunk_columns, chunks;  // the largest chunk, and how many of them an image has
    i64 high, wide;                         // what it sees of x
    i64 most;                               // its outputs, in whole vectors
    i64 plane;  // from one plane to the next: an odd number of cache lines, so that they do not crowd out each other

    explicit Shape(const PerfkitConv2d& p, bool tiled_ = false)
        : PerfkitConv2d(p), I(inputs / groups), O(outputs / groups), T(I * kernel_height * kernel_width),
          W(pool * pool), step_h(pool * stride_h), step_w(pool * stride_w),
          downs(seen(kernel_height, stride_h, dilation_h)),
          rights(seen(kernel_width, stride_w, dilation_w)), places(downs.size() * rights.size()), Q(I * places),
          streams(W == 1 ? STREAMS : W), offsets(T * streams),
          near(kernel_height == 3 && kernel_width == 3 && pool == 2 && downs.back() == 3 && rights.back() == 3),
          paired(MULTIPLIES_PAIRS && near && bfloat16), tiled(tiled_) {
        if (tiled) Q = round_up(I * (kernel_height + 1) * ((kernel_width + 1) / 2), L);
        chunk_columns = std::min(out_width, std::max<i64>(L, CACHED / Q / L * L));
        chunk_rows = chunk_columns < out_width ? 1 : std::min(out_height, std::max<i64>(1, CACHED / Q / out_width));
        chunks = parts(out_height, chunk_rows) * parts(out_width, chunk_columns);
        high = (chunk_rows - 1) * step_h + downs.back() + 1;
        wide = (chunk_columns - 1) * step_w + rights.back() + 1;
        most = round_up(chunk_rows * chunk_columns, L);
        plane = (most + 16) / 32 * 32 + 16;
        const i64 taps = kernel_height * kernel_width;
        for (i64 t = 0; t < T; ++t)
            for (i64 w = 0; w < streams; ++w)
                offsets[t * streams + w] =
                    (t / taps * places + place(t % taps, W == 1 ? 0 : w)) * plane + (W == 1 ? w * L : 0);
    }

    static i64 parts(i64 length, i64 each) { return (length + each - 1) / each; }

    std::vector<i64> seen(i64 kernel, i64 stride, i64 dilation) const {
        std::vector<i64> found;
        for (i64 p = 0; p < pool; ++p)
            for (i64 k = 0; k < kernel; ++k) found.push_back(p * stride + k * dilation);
        std::sort(found.begin(), found.end());
        found.erase(std::unique(found.begin(), found.end()), found.end());
        return found;
    }

    // Which of the places tap k, of one input channel, looks at in window w.
    i64 place(i64 k, i64 w) const {
        const i64 down = w / pool * stride_h + k / kernel_width * dilation_h;
        const i64 right = w % pool * stride_w + k % kernel_width * dilation_w;
        return (std::lower_bound(downs.begin(), downs.end(), down) - downs.begin()) * i64(rights.size()) +
               (std::lower_bound(rights.begin(), rights.end(), right) - rights.begin());
    }

    Chunk chunk(i64 index) const {
        const i64 across = parts(out_width, chunk_columns), part = index % chunks;
        const i64 row = part / across * chunk_rows, column = part % across * chunk_columns;
        return {index / chunks, row, std::min(chunk_rows, out_height - row), column,
                std::min(chunk_columns, out_width - column)};
    }

    i64 area() const { return out_height * out_width; }
    i64 work() const { return batch * outputs * area() * W * T; }  // multiply-adds of a pass

    // The weights in float32, (O, T); `own` holds them where they have to be converted.
    const float* weights(const Numbers& from, std::vector<float>& own) const {
        const i64 taps = kernel_height * kernel_width;
        if (!from.bfloat16 && w_w == 1 && w_h == kernel_width && w_i == taps && w_o == T)
            return static_cast<const float*>(from.at);
        own.resize(outputs * T);
        for (i64 o = 0; o < outputs; ++o)
            for (i64 t = 0; t < T; ++t) own[o * T + t] = from[o * w_o + weight_place(t)];
        return own.data();
    }

    // Of bfloat16 weights where `paired`: (O, I, PAIRS), each two numbers in the order of `Planes::pair`.
    std::vector<float> pairs(const Numbers& from) const {
        static constexpr int FIRST[] = {0, 3, 6, 2, 8}, SECOND[] = {1, 4, 7, 5, -1};
        std::vector<float> found(outputs * I * PAIRS);
        float* to = found.data();
        for (i64 o = 0; o < outputs; ++o)
            for (i64 i = 0; i < I; ++i) {
                const auto half = [&, of = from.halves() + o * w_o + i * w_i](int tap) {
                    return tap < 0 ? 0u : unsigned(of[tap / 3 * w_h + tap % 3 * w_w]);
                };
#pragma GCC unroll 5
                for (int k = 0; k < PAIRS; ++k) *to++ = bits<float>(half(FIRST[k]) | half(SECOND[k]) << 16);
            }
        return found;
    }

    i64 weight_place(i64 t) const {
        const i64 taps = kernel_height * kernel_width;
        return t / taps * w_i + t % taps / kernel_width * w_h + t % kernel_width * w_w;
    }

};

// Whole cache lines of floats.
struct Release {
    void operator()(float* at) const { ::operator delete(at, std::align_val_t{64}); }
};
using Lines = std::unique_ptr<float[], Release>;

Lines lines(i64 floats) {
    return Lines(static_cast<float*>(::operator new(sizeof(float) * floats, std::align_val_t{64})));
}

// A vector of each of the sixteen planes that 3x3 taps in 2x2 windows see of an input channel.
INLINE void see(const float* x, i64 plane, Floats (&seen)[16]) {
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) seen[k] = load<Floats>(x + k * plane);
}

// What a chunk sees of one group's input channels.
struct Planes {
    const Shape& p;
    const i64 row;  // from one row of `seen` to the next, with slack: whole vectors are read
    Lines seen, planes;

    explicit Planes(const Shape& shape)
        : p(shape), row(round_up(shape.wide + 2 * L, L)), seen(lines(shape.I * shape.high * row)),
          planes(lines(shape.Q * shape.plane + L)) {
        std::fill(seen.get(), seen.get() + p.I * p.high * row, 0.0f);
    }

    // Lanes beyond the chunk's outputs are zero. Returns how many vectors of outputs there are.
    i64 fill(const Numbers& x, i64 group, const Chunk& chunk) {
        copy(x, group, chunk);
        if (p.step_w == 1)
            thin(chunk, [](const float* from, i64 c) INLINE_LAMBDA { return load<Floats>(from + c); });
        else if (p.step_w == 2)
            thin(chunk, [](const float* from, i64 c) INLINE_LAMBDA {
                return shuffled(load<Floats>(from + 2 * c), load<Floats>(from + 2 * c + L), EVEN);
            });
        else
            thin(chunk, [step = p.step_w, end = seen.get() + p.I * p.high * row](const float* from, i64 c) {
                Floats found{};
                for (i64 lane = 0; lane < L && from + (c + lane) * step < end; ++lane)
                    found[lane] = from[(c + lane) * step];
                return found;
            });
        return Shape::parts(chunk.rows * chunk.columns, L);
    }

    // The sixteen places of each input channel, bfloat16 numbers, become sixteen pairs of them: beside each other in
    // row r from column c (2 r + c: r < 4, c < 2), below each other in column 2 + c from row r (8 + 2 r + c: r, c < 2),
    // and alone, in row 2 + r and column 2 + c. So three pairs of rows, one of the third column and its last make nine.
    void pair(i64 vectors) {
        for (i64 i = 0; i < p.I; ++i)
            for (i64 v = 0; v < vectors; ++v) {
                float* at = &planes[i * 16 * p.plane + v * L];
                Floats seen[16];
                see(at, p.plane, seen);
#pragma GCC unroll 16
                for (int k = 0; k < 16; ++k) {
                    const int r = k / 2 % 4, c = k % 2, low = k < 8 ? 4 * r + c : 4 * (r % 2) + 2 + c;
                    const Floats pair = k < 12 ? paired(seen[low], seen[k < 8 ? low + 1 : low + 4])
                                               : paired(seen[low + 8], Floats{});
                    store(at + k * p.plane, pair);
                }
            }
    }

  private:
    // Every step_w-th number of `seen`, by vectors: what one writes too much, the next row overwrites.
    template <class Take>
    void thin(const Chunk& chunk, Take take) {
        float* to = planes.get();
        for (i64 i = 0; i < p.I; ++i)
            for (i64 down : p.downs)
                for (i64 right : p.rights) {
                    const float* from = &seen[(i * p.high + down) * row + right];
                    for (i64 r = 0; r < chunk.rows; ++r, from += p.step_h * row)
                        for (i64 c = 0; c < chunk.columns; c += L) store(to + r * chunk.columns + c, take(from, c));
                    store(to + chunk.rows * chunk.columns, Floats{});
                    to += p.plane;
                }
    }

    // x into `seen`, zeros where it is padded.
    void copy(const Numbers& x, i64 group, const Chunk& chunk) {
        const i64 first_h = chunk.row * p.step_h - p.top, first_w = chunk.column * p.step_w - p.left;
        const i64 rows = (chunk.rows - 1) * p.step_h + p.downs.back() + 1;
        const i64 columns = (chunk.columns - 1) * p.step_w + p.rights.back() + 1;
        const i64 from = std::min(std::max<i64>(0, -first_w), columns);
        const i64 to = std::max(from, std::min(columns, p.width - first_w));
        for (i64 i = 0; i < p.I; ++i)
            for (i64 r = 0; r < rows; ++r) {
                float* at = &seen[(i * p.high + r) * row];
                const i64 h = first_h + r;
                if (h < 0 || h >= p.height) {
                    std::fill(at, at + columns, 0.0f);
                    continue;
                }
                std::fill(at, at + from, 0.0f);
                const i64 place =
                    chunk.image * p.x_n + (group * p.I + i) * p.x_c + h * p.x_h + (first_w + from) * p.x_w;
                if (p.x_w == 1)  // whole vectors: what is beyond is overwritten by what follows
                    for (i64 c = from; c < to; c += L) store(at + c, x.take(place + c - from, to - c));
                else
                    for (i64 c = from; c < to; ++c) at[c] = x[place + (c - from) * p.x_w];
                std::fill(at + to, at + columns, 0.0f);
            }
    }
};

}  // namespace

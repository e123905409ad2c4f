// The gradients of weights, bias and x, from those of pooled outputs and the windows that they came from.
#pragma once

#include "cpu_planes.hpp"

namespace {

// What comes back for a chunk and a group: of each channel, vectors of gradients and of the windows they belong to.
struct Returned {
    const Shape& p;
    Numbers d_y;
    const std::uint8_t* argmax;
    std::unique_ptr<float[]> gradients;      // (O, most), zeros beyond the chunk
    std::unique_ptr<std::uint8_t[]> windows;  // (O, most)

    Returned(const Shape& shape, const Numbers& d_y_, const std::uint8_t* argmax_)
        : p(shape), d_y(d_y_), argmax(argmax_), gradients(new float[p.O * p.most]),
          windows(new std::uint8_t[p.O * p.most]()) {}

    void fill(i64 group, const Chunk& chunk) {
        const i64 outputs = chunk.rows * chunk.columns, done = chunk.row * p.out_width + chunk.column;
        for (i64 v = 0; v < outputs; v += L) {
            const i64 count = std::min<i64>(L, outputs - v);
            if (!p.channels_last) {
                for (i64 o = 0; o < p.O; ++o) {
                    const i64 at = (chunk.image * p.outputs + group * p.O + o) * p.area() + done + v;
                    store(&gradients[o * p.most + v], d_y.take(at, count));
                    if (argmax) std::memcpy(&windows[o * p.most + v], argmax + at, count);
                }
                continue;
            }
            for (i64 o = 0; o < p.O; o += L) turn(chunk, done, group, v, count, o, std::min<i64>(L, p.O - o));
        }
    }

    INLINE Floats gradient(i64 o, i64 v) const { return load<Floats>(&gradients[o * p.most + v * L]); }
    INLINE Ints window(i64 o, i64 v) const {
        return __builtin_convertvector(load<Bytes>(&windows[o * p.most + v * L]), Ints);
    }

  private:
    void turn(const Chunk& chunk, i64 done, i64 group, i64 v, i64 count, i64 o, i64 channels) {
        Floats values[L];
        Ints codes[L];
        for (i64 i = 0; i < L; ++i) {
            values[i] = Floats{}, codes[i] = Ints{};
            if (i >= count) continue;
            const i64 at = (chunk.image * p.area() + done + v + i) * p.outputs + group * p.O + o;
            values[i] = d_y.take(at, channels);
            Bytes bytes{};
            if (argmax && channels == L)
                bytes = load<Bytes>(argmax + at);
            else if (argmax)
                std::memcpy(&bytes, argmax + at, channels);
            codes[i] = __builtin_convertvector(bytes, Ints);
        }
        transpose(values), transpose(codes);
        for (i64 c = 0; c < channels; ++c) {
            store(&gradients[(o + c) * p.most + v], values[c]);
            store(&windows[(o + c) * p.most + v], __builtin_convertvector(codes[c], Bytes));
        }
    }
};

// Partial sums of the gradients of weights and bias, a vector for each: lanes are added up at the end.
struct Partial {
    Planes planes;
    Returned returned;
    std::vector<float> weights, bias;  // (O, T, L), (O, L) of all groups

    Partial(const Shape& p, const Numbers& d_y, const std::uint8_t* argmax)
        : planes(p), returned(p, d_y, argmax), weights(p.outputs * p.T * L), bias(p.outputs * L) {}

    void add(const Shape& p, const Numbers& x, const Chunk& chunk) {
        for (i64 group = 0; group < p.groups; ++group) {
            const i64 vectors = planes.fill(x, group, chunk);
            returned.fill(group, chunk);
            for (i64 o = 0; o < p.O; ++o) {
                Floats sum = load<Floats>(&bias[(group * p.O + o) * L]);
                for (i64 v = 0; v < vectors; ++v)
                    sum += returned.window(o, v) == DEAD ? Floats{} : returned.gradient(o, v);
                store(&bias[(group * p.O + o) * L], sum);
            }
            if (WIDE && p.near) {
                for (i64 o = 0; o < p.O; ++o)
                    for (i64 i = 0; i < p.I; ++i)
                        correlate_near(p, vectors, o, i, &weights[((group * p.O + o) * p.T + 9 * i) * L]);
                continue;
            }
            for (i64 o = 0; o < p.O; o += PAIRED)
                for (i64 t = 0; t < p.T; t += TAPS)
                    counted<PAIRED>(std::min<i64>(PAIRED, p.O - o), [&](auto channels) INLINE_LAMBDA {
                        counted<TAPS>(std::min<i64>(TAPS, p.T - t), [&](auto taps) INLINE_LAMBDA {
                            correlate<decltype(channels)::value, decltype(taps)::value>(
                                p, vectors, o, &p.offsets[t * p.streams], &weights[((group * p.O + o) * p.T + t) * L]);
                        });
                    });
        }
    }

  private:
    // sums[c][k] += the gradients of channel o + c times what tap k saw of x in the windows that they belong to.
    template <int C, int K>
    void correlate(const Shape& p, i64 vectors, i64 o, const i64* offsets, float* sums) const {
        Floats found[C][K];
        for (int c = 0; c < C; ++c)
            for (int k = 0; k < K; ++k) found[c][k] = load<Floats>(sums + (c * p.T + k) * L);
        const float* x = planes.planes.get();
        for (i64 v = 0; v < vectors; ++v, x += L)
            for (i64 w = 0; w < p.W; ++w) {
                Floats back[C];
                for (int c = 0; c < C; ++c)
                    back[c] = returned.window(o + c, v) == std::int32_t(w) ? returned.gradient(o + c, v) : Floats{};
                for (int k = 0; k < K; ++k) {
                    const Floats here = load<Floats>(x + offsets[k * p.streams + w]);
                    for (int c = 0; c < C; ++c) found[c][k] += back[c] * here;
                }
            }
        for (int c = 0; c < C; ++c)
            for (int k = 0; k < K; ++k) store(sums + (c * p.T + k) * L, found[c][k]);
    }

    // The same for 3x3 taps in 2x2 windows of input channel i.
    void correlate_near(const Shape& p, i64 vectors, i64 o, i64 i, float* sums) const {
        Floats found[9];
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) found[t] = load<Floats>(sums + t * L);
        for (i64 v = 0; v < vectors; ++v) {
            const Floats gradient = returned.gradient(o, v);
            const Ints window = returned.window(o, v);
            Floats seen[16];
            see(&planes.planes[i * 16 * p.plane + v * L], p.plane, seen);
#pragma GCC unroll 4
            for (int w = 0; w < 4; ++w) {
                const Floats back = window == w ? gradient : Floats{};
#pragma GCC unroll 9
                for (int t = 0; t < 9; ++t) found[t] += back * seen[4 * (w / 2 + t / 3) + w % 2 + t % 3];
            }
        }
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) store(sums + t * L, found[t]);
    }
};

void weight_gradients(const Shape& p, const Numbers& x, const std::uint8_t* argmax, const Numbers& d_y, float* d_weight,
                      float* d_bias, Threads threads) {
    const i64 chunks = p.batch * p.chunks, fit = std::max<i64>(1, PARTIAL / (p.outputs * p.T * L));
    const i64 slices = std::min({chunks, SLICES, fit, 2 * p.work() / WORTH + 1});
    std::vector<std::unique_ptr<Partial>> partial;
    for (i64 s = 0; s < slices; ++s) partial.push_back(std::make_unique<Partial>(p, d_y, argmax));
    parallel(slices, threads, p.work(), [&](i64 s) {
        for (i64 i = chunks * s / slices; i < chunks * (s + 1) / slices; ++i) partial[s]->add(p, x, p.chunk(i));
    });
    const auto total = [&](std::vector<float> Partial::*of, i64 at) {
        Floats sum = load<Floats>(&((*partial[0]).*of)[at * L]);
        for (i64 s = 1; s < slices; ++s) sum += load<Floats>(&((*partial[s]).*of)[at * L]);
        float found = 0.0f;
        for (int lane = 0; lane < L; ++lane) found += sum[lane];
        return found;
    };
    for (i64 o = 0; o < p.outputs; ++o) {
        for (i64 t = 0; d_weight && t < p.T; ++t)
            d_weight[o * p.w_o + p.weight_place(t)] = total(&Partial::weights, o * p.T + t);
        if (d_bias) d_bias[o] = total(&Partial::bias, o);
    }
}

// The gradients of up to STREAMS input channels of one image: of planes first, which are added up where they overlap.
struct ImageGradient {
    static constexpr int VECTORS = 2;  // of outputs, at once

    const Shape& p;
    const i64 high, wide;  // of all that an image's outputs see
    Returned returned;
    std::unique_ptr<float[]> image, planes, back;

    ImageGradient(const Shape& shape, const Numbers& d_y, const std::uint8_t* argmax)
        : p(shape), high((p.out_height - 1) * p.step_h + p.downs.back() + 1),
          wide((p.out_width - 1) * p.step_w + p.rights.back() + 1), returned(p, d_y, argmax),
          image(new float[STREAMS * high * wide]), planes(new float[STREAMS * p.places * p.most]),
          back(new float[p.W * p.O * VECTORS * L]) {}

    // weights: (I, kernel, O) of the group; pairs: of each place, the taps and windows that look at it.
    void run(i64 n, i64 group, i64 first, i64 channels, const float* weights,
             const std::vector<std::vector<std::pair<i64, i64>>>& pairs, const Numbers& d_x) {
        std::fill(image.get(), image.get() + channels * high * wide, 0.0f);
        for (i64 index = n * p.chunks; index < (n + 1) * p.chunks; ++index) {
            const Chunk chunk = p.chunk(index);
            const i64 vectors = Shape::parts(chunk.rows * chunk.columns, L);
            returned.fill(group, chunk);
            for (i64 v = 0; v < vectors; v += VECTORS)
                counted<VECTORS>(std::min<i64>(VECTORS, vectors - v), [&](auto many) INLINE_LAMBDA {
                    constexpr int N = decltype(many)::value;
                    for (i64 w = 0; w < p.W; ++w)
                        for (i64 o = 0; o < p.O; ++o)
                            for (int i = 0; i < N; ++i)
                                store(&back[((w * p.O + o) * N + i) * L],
                                      returned.window(o, v + i) == std::int32_t(w) ? returned.gradient(o, v + i)
                                                                                   : Floats{});
                    counted<STREAMS>(channels, [&](auto of) INLINE_LAMBDA {
                        for (i64 place = 0; place < p.places; ++place)
                            gather<N, decltype(of)::value>(v, place, weights, pairs[place]);
                    });
                });
            scatter(chunk, channels);
        }
        for (i64 c = 0; c < channels; ++c)
            for (i64 h = 0; h < p.height; ++h) {
                const i64 at = n * p.x_n + (group * p.I + first + c) * p.x_c + h * p.x_h;
                const float* row = h + p.top < high ? &image[(c * high + h + p.top) * wide] : nullptr;
                for (i64 w = 0; w < p.width; ++w)
                    d_x.set(at + w * p.x_w, row && w + p.left < wide ? row[w + p.left] : 0.0f);
            }
    }

  private:
    template <int N, int C>
    void gather(i64 v, i64 place, const float* weights, const std::vector<std::pair<i64, i64>>& pairs) {
        const i64 taps = p.kernel_height * p.kernel_width;
        Floats sums[N][C] = {};
        for (const auto& [k, w] : pairs) {
            const float *from = &back[w * p.O * N * L], *of = weights + k * p.O;
            for (i64 o = 0; o < p.O; ++o)
                for (int i = 0; i < N; ++i) {
                    const Floats gradient = load<Floats>(from + (o * N + i) * L);
                    for (int c = 0; c < C; ++c) sums[i][c] += gradient * same(of[c * taps * p.O + o]);
                }
        }
        for (int c = 0; c < C; ++c)
            for (int i = 0; i < N; ++i) store(&planes[(c * p.places + place) * p.most + (v + i) * L], sums[i][c]);
    }

    void scatter(const Chunk& chunk, i64 channels) {
        const float* from = planes.get();
        for (i64 c = 0; c < channels; ++c)
            for (i64 down : p.downs)
                for (i64 right : p.rights) {
                    for (i64 r = 0; r < chunk.rows; ++r) {
                        float* to = &image[(c * high + (chunk.row + r) * p.step_h + down) * wide] +
                                    chunk.column * p.step_w + right;
                        for (i64 j = 0; j < chunk.columns; ++j) to[j * p.step_w] += from[r * chunk.columns + j];
                    }
                    from += p.most;
                }
    }
};

void image_gradients(const Shape& p, const float* weights, const std::uint8_t* argmax, const Numbers& d_y,
                     const Numbers& d_x, Threads threads) {
    const i64 taps = p.kernel_height * p.kernel_width, blocks = Shape::parts(p.I, STREAMS);
    std::vector<float> turned(p.outputs * p.T);  // (groups, I, kernel, O)
    for (i64 o = 0; o < p.outputs; ++o)
        for (i64 t = 0; t < p.T; ++t)
            turned[(o / p.O * p.T + t) * p.O + o % p.O] = weights[o * p.T + t];
    std::vector<std::vector<std::pair<i64, i64>>> pairs(p.places);
    for (i64 k = 0; k < taps; ++k)
        for (i64 w = 0; w < p.W; ++w) pairs[p.place(k, w)].emplace_back(k, w);
    const i64 tasks = p.batch * p.groups * blocks, slices = std::min(tasks, 4 * threads.count);
    std::vector<std::unique_ptr<ImageGradient>> workers;
    for (i64 s = 0; s < slices; ++s) workers.push_back(std::make_unique<ImageGradient>(p, d_y, argmax));
    parallel(slices, threads, p.work(), [&](i64 s) {
        for (i64 i = tasks * s / slices; i < tasks * (s + 1) / slices; ++i) {
            const i64 first = i % blocks * STREAMS, group = i / blocks % p.groups;
            workers[s]->run(i / blocks / p.groups, group, first, std::min<i64>(STREAMS, p.I - first),
                            &turned[(group * p.T + first * taps) * p.O], pairs, d_x);
        }
    });
}

}  // namespace

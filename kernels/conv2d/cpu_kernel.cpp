// Convolution, bias, ReLU and max-pool in one loop over pooled outputs, and its gradients, in float32 sums.
//
// Letters: N images, I input channels of a group, O output channels, T taps (I times the kernel's size), P the pool's side,
// W its P * P places ("windows"), L lanes of a vector, Q planes.
//
// Lanes are pooled outputs. What tap t in window w needs of L neighbouring outputs lies in x with a step of P * stride
// between them; it is copied once into a plane of its own, which all output channels then read as whole vectors. Taps and
// windows that look at the same place share a plane: 3x3 taps in 2x2 windows have 16 planes, not 36. Padding, strides,
// dilation, layout and dtype are all dealt with by that copy.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
#define PERFKIT_LANES 16
#define CHANNELS 4
#define PAIRED 2
#define NEAR 1  // registers for sixteen planes
#else
#define PERFKIT_LANES 8
#define CHANNELS 2
#define PAIRED 1
#define NEAR 0
#endif

#include "_thread_pool.hpp"
#include "_vector.hpp"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// x[n][c][h][w] lies at x + n * x_n + c * x_c + h * x_h + w * x_w, weights likewise. y, argmax and d_y are dense, NCHW or
// NHWC; their height and width are those after the pool. d_x lies as x, d_weight as weight.
extern "C" struct PerfkitConv2d {
    std::int64_t batch, inputs, height, width, outputs, kernel_height, kernel_width;
    std::int64_t stride_h, stride_w, top, left, dilation_h, dilation_w, groups, pool;
    std::int64_t out_height, out_width;
    std::int64_t relu, bfloat16, channels_last;
    std::int64_t x_n, x_c, x_h, x_w, w_o, w_i, w_h, w_w;
};

namespace {

using namespace perfkit;

using Bytes = std::uint8_t __attribute__((vector_size(L)));
using Halves = std::uint16_t __attribute__((vector_size(2 * L)));

constexpr int DEAD = 255;
constexpr int STREAMS = 4;         // vectors of outputs, or windows of one, that are summed at once
constexpr int TAPS = 9;            // whose gradients are summed at once
constexpr i64 CACHED = 1 << 16;    // floats of planes that are made at a time: they stay in the second-level cache
constexpr i64 WORTH = 1 << 20;     // multiply-adds that are worth waking a thread for
constexpr i64 SLICES = 16;         // partial sums of the weights' gradients: as many whatever the number of threads,
constexpr i64 PARTIAL = 1 << 22;   // and so many floats at most

// Subtracting zero changes no number, adding it would change -0: so this is a broadcast and no more.
INLINE Floats same(float value) { return value - Floats{}; }

// NaN where either is.
INLINE Floats largest(Floats a, Floats b) {
#if defined(__AVX512F__)
    const __m512 most = _mm512_max_ps(__m512(a), __m512(b));
    return Floats(_mm512_mask_add_ps(most, _mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_UNORD_Q), __m512(a), __m512(b)));
#else
    return (b > a) | (b != b) ? b : a;
#endif
}

template <class V>
INLINE V shuffled(V a, V b, Ints from) {
#if defined(__clang__)
    V found;
    for (int lane = 0; lane < L; ++lane) found[lane] = from[lane] < L ? a[from[lane]] : b[from[lane] - L];
    return found;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

#if PERFKIT_LANES == 16
constexpr Ints EVEN = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
constexpr Ints LOW = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#else
constexpr Ints EVEN = {0, 2, 4, 6, 8, 10, 12, 14};
constexpr Ints LOW = {0, 8, 1, 9, 2, 10, 3, 11};
#endif

// Rows become columns: each of log2(L) passes interleaves the first half of the rows with the second.
template <class V>
INLINE void transpose(V (&rows)[L]) {
    for (int pass = 1; pass < L; pass *= 2) {
        V next[L];
        for (int i = 0; i < L / 2; ++i) {
            next[2 * i] = shuffled(rows[i], rows[i + L / 2], LOW);
            next[2 * i + 1] = shuffled(rows[i], rows[i + L / 2], LOW + L / 2);
        }
        for (int i = 0; i < L; ++i) rows[i] = next[i];
    }
}

// To the nearest, ties to even; a NaN stays one.
INLINE Halves halved(Floats x) {
    const Ints whole = bits<Ints>(x);
    const Ints rounded = (whole + 0x7fff + ((whole >> 16) & 1)) >> 16;
    return __builtin_convertvector((x != x ? Ints{} + 0x7fc0 : rounded) & 0xffff, Halves);
}

INLINE float widened(std::uint16_t half) { return bits<float>(std::uint32_t(half) << 16); }

// The first `count` lanes, fewer than all; the others are zero, or left as they were.
INLINE Floats load_part(const float* from, i64 count) {
#if defined(__AVX512F__)
    return Floats(_mm512_maskz_loadu_ps(__mmask16((1 << count) - 1), from));
#else
    Floats value{};
    for (int lane = 0; lane < count; ++lane) value[lane] = from[lane];
    return value;
#endif
}
INLINE void store_part(float* to, Floats value, i64 count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, __mmask16((1 << count) - 1), __m512(value));
#else
    for (int lane = 0; lane < count; ++lane) to[lane] = value[lane];
#endif
}

// Numbers of either dtype.
struct Numbers {
    void* at;
    bool bfloat16;

    float* floats() const { return static_cast<float*>(at); }
    std::uint16_t* halves() const { return static_cast<std::uint16_t*>(at); }

    float operator[](i64 i) const { return bfloat16 ? widened(halves()[i]) : floats()[i]; }
    void set(i64 i, float value) const {
        if (bfloat16)
            halves()[i] = halved(same(value))[0];
        else
            floats()[i] = value;
    }
    // The first `count` lanes, or all if there are more than those.
    INLINE void put(i64 i, Floats value, i64 count) const {
        if (bfloat16) {
            const Halves rounded = halved(value);
            if (count >= L) return store(halves() + i, rounded);
            for (int lane = 0; lane < count; ++lane) halves()[i + lane] = rounded[lane];
        } else if (count >= L) {
            store(floats() + i, value);
        } else {
            store_part(floats() + i, value, count);
        }
    }
    INLINE Floats take(i64 i, i64 count) const {  // zeros beyond
        if (!bfloat16) return count >= L ? load<Floats>(floats() + i) : load_part(floats() + i, count);
        Halves taken{};
        if (count >= L)
            taken = load<Halves>(halves() + i);
        else
            for (int lane = 0; lane < count; ++lane) taken[lane] = halves()[i + lane];
        return bits<Floats>(__builtin_convertvector(taken, Ints) << 16);
    }
};

// use(std::integral_constant<int, count>()), for 1 <= count <= MOST.
template <int MOST, class Use>
INLINE void counted(i64 count, Use use) {
    if constexpr (MOST > 1)
        if (count < MOST) return counted<MOST - 1>(count, use);
    use(std::integral_constant<int, MOST>());
}

// task(index) for each, on as many threads as the work is worth.
template <class Task>
void parallel(i64 tasks, i64 threads, i64 work, Task task) {
    ThreadPool::instance().run(
        tasks, int(std::min(threads, work / WORTH + 1)),
        [](void* context, long index) { (*static_cast<Task*>(context))(index); }, &task);
}

// ---- Planes ----------------------------------------------------------------------------------------------------------

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
    std::vector<i64> offsets;        // of tap t's plane in window w, in floats: [t * streams + w]. One window: in vector w
    bool near;                       // 3x3 taps in 2x2 windows: sixteen places
    i64 chunk_rows, chunk_columns, chunks;  // the largest chunk, and how many of them an image has
    i64 high, wide;                         // what it sees of x
    i64 most;                               // its outputs, in whole vectors
    i64 plane;  // from one plane to the next: an odd number of cache lines, so that they do not crowd out each other

    explicit Shape(const PerfkitConv2d& p)
        : PerfkitConv2d(p), I(inputs / groups), O(outputs / groups), T(I * kernel_height * kernel_width), W(pool * pool),
          step_h(pool * stride_h), step_w(pool * stride_w), downs(seen(kernel_height, stride_h, dilation_h)),
          rights(seen(kernel_width, stride_w, dilation_w)), places(downs.size() * rights.size()), Q(I * places),
          streams(W == 1 ? STREAMS : W), offsets(T * streams),
          near(kernel_height == 3 && kernel_width == 3 && pool == 2 && downs.back() == 3 && rights.back() == 3) {
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
                for (i64 lane = 0; lane < L && from + (c + lane) * step < end; ++lane) found[lane] = from[(c + lane) * step];
                return found;
            });
        return Shape::parts(chunk.rows * chunk.columns, L);
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

// ---- Forward ---------------------------------------------------------------------------------------------------------

// Up to L channels of a vector of outputs each, or of several where there is no pool, before ReLU.
struct Tile {
    Floats values[STREAMS][L];
    Ints windows[STREAMS][L];  // that the values come from
};

// sums[c][n] += the products of stream n, a vector of outputs in one window, with the taps of channel c.
template <int C, int N>
INLINE void multiply(const Shape& p, const float* x, const i64* offsets, const float* weights, Floats (&sums)[C][N]) {
    for (i64 t = 0; t < p.T; ++t, offsets += p.streams) {
        Floats here[N];
        for (int n = 0; n < N; ++n) here[n] = load<Floats>(x + offsets[n]);
        for (int c = 0; c < C; ++c) {
            const Floats weight = same(weights[c * p.T + t]);
            for (int n = 0; n < N; ++n) sums[c][n] += here[n] * weight;
        }
    }
}

// The same for 3x3 taps in 2x2 windows of one input channel, whose sixteen planes are in registers.
template <int C>
INLINE void multiply_near(const Floats (&seen)[16], const float* weights, i64 T, Floats (&sums)[C][4]) {
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t)
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) {
            const Floats weight = same(weights[c * T + t]);
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) sums[c][n] += seen[4 * (n / 2 + t / 3) + n % 2 + t % 3] * weight;
        }
}

INLINE void see(const float* x, i64 plane, Floats (&seen)[16]) {
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) seen[k] = load<Floats>(x + k * plane);
}

// The largest of the sums of windows w, w + 1, ..., and of what was the largest before those: the first one of equals.
template <bool SAVE, int N>
INLINE void reduce(const Floats (&sums)[N], i64 w, Floats& value, Ints& window) {
    if (!SAVE) {
        Floats most = sums[0];
        if constexpr (N == 4)
            most = largest(largest(sums[0], sums[1]), largest(sums[2], sums[3]));
        else
            for (int n = 1; n < N; ++n) most = largest(most, sums[n]);
        value = w == 0 ? most : largest(value, most);
        return;
    }
    if (w == 0) value = sums[0], window = Ints{};
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
        if (w + n == 0) continue;
        const Ints better = (sums[n] > value) | (sums[n] != sums[n]);
        window = better ? Ints{} + std::int32_t(w + n) : window;
        value = better ? sums[n] : value;
    }
}

// `count` channels of `vectors` of outputs; there is one vector unless there is no pool.
template <bool SAVE>
void convolve(const Shape& p, const float* x, i64 vectors, const float* weights, const float* bias, i64 count, Tile& tile) {
    if (NEAR && p.near) {
        Floats seen[16];
        see(x, p.plane, seen);
        for (i64 o = 0; p.I == 1 && o < count; ++o) {
            Floats sums[1][4];
            for (int n = 0; n < 4; ++n) sums[0][n] = same(bias[o]);
            multiply_near<1>(seen, weights + o * p.T, p.T, sums);
            reduce<SAVE>(sums[0], 0, tile.values[0][o], tile.windows[0][o]);
        }
        for (i64 o = 0; p.I > 1 && o < count; o += 2) {
            Floats sums[2][4];
            const i64 second = o + 1 < count;  // the last one stands in for a channel that is not there
            for (int n = 0; n < 4; ++n) sums[0][n] = same(bias[o]), sums[1][n] = same(bias[o + second]);
            const float* of = weights + o * p.T;
            for (i64 i = 0; i < p.I; ++i) {
                see(x + i * 16 * p.plane, p.plane, seen);
                multiply_near<2>(seen, of + i * 9, second * p.T, sums);
            }
            reduce<SAVE>(sums[0], 0, tile.values[0][o], tile.windows[0][o]);
            reduce<SAVE>(sums[1], 0, tile.values[0][o + second], tile.windows[0][o + second]);
        }
        return;
    }
    for (i64 o = 0; o < count; o += CHANNELS)
        counted<CHANNELS>(std::min<i64>(CHANNELS, count - o), [&](auto channels) INLINE_LAMBDA {
            constexpr int C = decltype(channels)::value;
            for (i64 w = 0; w < p.W; w += STREAMS)
                counted<STREAMS>(p.W == 1 ? vectors : std::min<i64>(STREAMS, p.W - w), [&](auto streams) INLINE_LAMBDA {
                    constexpr int N = decltype(streams)::value;
                    Floats sums[C][N];
                    for (int c = 0; c < C; ++c)
                        for (int n = 0; n < N; ++n) sums[c][n] = same(bias[o + c]);
                    multiply<C, N>(p, x, p.offsets.data() + w, weights + o * p.T, sums);
#pragma GCC unroll 4
                    for (int c = 0; c < C; ++c) {
                        if (p.W > 1) {
                            reduce<SAVE>(sums[c], w, tile.values[0][o + c], tile.windows[0][o + c]);
                            continue;
                        }
                        for (int n = 0; n < N; ++n) tile.values[n][o + c] = sums[c][n], tile.windows[n][o + c] = Ints{};
                    }
                });
        });
}

struct Forward {
    const Shape& p;
    Numbers x, y;
    const float *weights, *bias;  // (O, T) and (O) of all groups
    std::uint8_t* argmax;

    template <bool SAVE>
    void run(const Chunk& chunk, Planes& planes) const {
        const i64 done = chunk.row * p.out_width + chunk.column, outputs = chunk.rows * chunk.columns;
        Tile tile;
        for (i64 group = 0; group < p.groups; ++group) {
            const i64 all = planes.fill(x, group, chunk), most = p.W == 1 ? STREAMS : 1;
            for (i64 v = 0; v < all; v += most)
                for (i64 o = 0; o < p.O; o += L) {
                    const i64 first = group * p.O + o, count = std::min<i64>(L, p.O - o);
                    const i64 vectors = std::min(most, all - v);
                    convolve<SAVE>(p, &planes.planes[v * L], vectors, weights + first * p.T, bias + first, count, tile);
                    for (i64 n = 0; n < vectors; ++n)
                        put<SAVE>(tile.values[n], tile.windows[n], chunk.image, first, count, done + (v + n) * L,
                                  std::min<i64>(L, outputs - (v + n) * L));
                }
        }
    }

  private:
    // Into y: `count` channels of `many` outputs, the first of them number `place` of the image.
    template <bool SAVE>
    INLINE void put(Floats (&values)[L], Ints (&windows)[L], i64 image, i64 first, i64 count, i64 place, i64 many) const {
        if (!p.channels_last) return rows<SAVE>(values, windows, (image * p.outputs + first) * p.area() + place,
                                                p.area(), count, many);
        transpose(values);
        if (SAVE) transpose(windows);
        rows<SAVE>(values, windows, (image * p.area() + place) * p.outputs + first, p.outputs, many, count);
    }

    // ReLU, and `count` rows of `many` numbers.
    template <bool SAVE>
    INLINE void rows(const Floats (&values)[L], const Ints (&windows)[L], i64 at, i64 step, i64 count, i64 many) const {
        const Floats low = same(p.relu ? 0.0f : -__builtin_inff());
        const Ints cut = Ints{} - std::int32_t(p.relu);
        for (i64 i = 0; i < count; ++i, at += step) {
            y.put(at, at_least(low, values[i]), many);
            if (!SAVE) continue;
            const Bytes bytes = __builtin_convertvector((values[i] <= 0.0f) & cut ? Ints{} + DEAD : windows[i], Bytes);
            if (many == L)
                store(argmax + at, bytes);
            else
                for (int lane = 0; lane < many; ++lane) argmax[at + lane] = bytes[lane];
        }
    }
};

// ---- Backward --------------------------------------------------------------------------------------------------------

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
            if (NEAR && p.near) {
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
                      float* d_bias, i64 threads) {
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

// The gradients of up to STREAMS input channels of one image: of planes first, which are then added up where they overlap.
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
                for (i64 w = 0; w < p.width; ++w) d_x.set(at + w * p.x_w, row && w + p.left < wide ? row[w + p.left] : 0);
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
                     const Numbers& d_x, i64 threads) {
    const i64 taps = p.kernel_height * p.kernel_width, blocks = Shape::parts(p.I, STREAMS);
    std::vector<float> turned(p.outputs * p.T);  // (groups, I, kernel, O)
    for (i64 o = 0; o < p.outputs; ++o)
        for (i64 t = 0; t < p.T; ++t)
            turned[(o / p.O * p.T + t) * p.O + o % p.O] = weights[o * p.T + t];
    std::vector<std::vector<std::pair<i64, i64>>> pairs(p.places);
    for (i64 k = 0; k < taps; ++k)
        for (i64 w = 0; w < p.W; ++w) pairs[p.place(k, w)].emplace_back(k, w);
    const i64 tasks = p.batch * p.groups * blocks, slices = std::min(tasks, 4 * threads);
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

// bias may be null. argmax is null, or is filled for the backward pass. Returns 1 where memory is short, else 0.
extern "C" int perfkit_conv2d_forward(const PerfkitConv2d* problem, void* x, void* weight, void* bias, void* y,
                                      std::uint8_t* argmax, std::int64_t threads) try {
    const Shape p(*problem);
    const bool half = p.bfloat16;
    std::vector<float> own, biases(p.outputs);
    for (i64 o = 0; bias && o < p.outputs; ++o) biases[o] = Numbers{bias, half}[o];
    const Forward pass{p, {x, half}, {y, half}, p.weights({weight, half}, own), biases.data(), argmax};
    const i64 chunks = p.batch * p.chunks, useful = std::min(threads, p.work() / WORTH + 1);
    const i64 slices = std::min(chunks, useful > 1 ? 4 * useful : 1);
    std::vector<Planes> planes;
    for (i64 s = 0; s < slices; ++s) planes.emplace_back(p);
    parallel(slices, threads, p.work(), [&](i64 s) {
        for (i64 i = chunks * s / slices; i < chunks * (s + 1) / slices; ++i)
            argmax ? pass.run<true>(p.chunk(i), planes[s]) : pass.run<false>(p.chunk(i), planes[s]);
    });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// argmax is null where the forward pass had neither pool nor ReLU; d_x, d_weight and d_bias where they are not wanted.
// d_weight and d_bias are float32; all are written whole.
extern "C" int perfkit_conv2d_backward(const PerfkitConv2d* problem, void* x, void* weight, const std::uint8_t* argmax,
                                       void* d_y, void* d_x, float* d_weight, float* d_bias,
                                       std::int64_t threads) try {
    const Shape p(*problem);
    const bool half = p.bfloat16;
    const Numbers returned{d_y, half};
    if (d_weight || d_bias) weight_gradients(p, {x, half}, argmax, returned, d_weight, d_bias, threads);
    std::vector<float> own;
    if (d_x) image_gradients(p, p.weights({weight, half}, own), argmax, returned, {d_x, half}, threads);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

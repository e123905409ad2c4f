// Convolution, bias, ReLU and max-pool in one loop over pooled outputs, and its gradients, in float32 sums.
//
// Letters: N images, I input channels of a group, O output channels, T taps (I times the kernel's size), P the pool's side,
// W its P * P places ("windows"), L lanes of a vector, Q planes.
//
// Lanes are pooled outputs. What tap t in window w needs of L neighbouring outputs lies in x with a step of P * stride
// between them; it is copied once into a plane of its own, which all output channels then read as whole vectors. Taps and
// windows that look at the same place share a plane: 3x3 taps in 2x2 windows have 16 planes, not 36. Padding, strides,
// dilation, layout and dtype are all dealt with by that copy. Planes lie group after group: L outputs of each of the Q
// planes, so that one vector of outputs needs contiguous memory.
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
#else
#define PERFKIT_LANES 8
#define CHANNELS 2
#define PAIRED 1
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

INLINE Floats rectified(Floats x) { return x < 0.0f ? Floats{} : x; }

INLINE Floats shuffled(Floats a, Floats b, Ints from) {
#if defined(__clang__)
    Floats found;
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
INLINE void transpose(Floats (&rows)[L]) {
    for (int pass = 1; pass < L; pass *= 2) {
        Floats next[L];
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

// Numbers of either dtype.
struct Numbers {
    void* at;
    bool bfloat16;

    float operator[](i64 i) const {
        return bfloat16 ? widened(static_cast<const std::uint16_t*>(at)[i]) : static_cast<const float*>(at)[i];
    }
    void set(i64 i, float value) const {
        if (bfloat16)
            static_cast<std::uint16_t*>(at)[i] = halved(same(value))[0];
        else
            static_cast<float*>(at)[i] = value;
    }
    INLINE void put(i64 i, Floats value, i64 count) const {
        if (bfloat16) {
            const Halves halves = halved(value);
            std::memcpy(static_cast<std::uint16_t*>(at) + i, &halves, count < L ? 2 * count : sizeof halves);
        } else if (count < L) {
            std::memcpy(static_cast<float*>(at) + i, &value, 4 * count);
        } else {
            store(static_cast<float*>(at) + i, value);
        }
    }
    INLINE Floats take(i64 i, i64 count) const {  // zeros beyond
        if (!bfloat16) {
            if (count >= L) return load<Floats>(static_cast<const float*>(at) + i);
            Floats value{};
            std::memcpy(&value, static_cast<const float*>(at) + i, 4 * count);
            return value;
        }
        Halves halves{};
        std::memcpy(&halves, static_cast<const std::uint16_t*>(at) + i, count < L ? 2 * count : sizeof halves);
        return bits<Floats>(__builtin_convertvector(halves, Ints) << 16);
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
    i64 chunk_rows, chunk_columns, chunks;  // the largest chunk, and how many of them an image has
    i64 high, wide;                         // what it sees of x
    i64 most;                               // its outputs, in whole vectors

    explicit Shape(const PerfkitConv2d& p)
        : PerfkitConv2d(p), I(inputs / groups), O(outputs / groups), T(I * kernel_height * kernel_width), W(pool * pool),
          step_h(pool * stride_h), step_w(pool * stride_w), downs(seen(kernel_height, stride_h, dilation_h)),
          rights(seen(kernel_width, stride_w, dilation_w)), places(downs.size() * rights.size()), Q(I * places),
          streams(W == 1 ? STREAMS : W), offsets(T * streams) {
        const i64 taps = kernel_height * kernel_width;
        for (i64 t = 0; t < T; ++t)
            for (i64 w = 0; w < streams; ++w)
                offsets[t * streams + w] =
                    (t / taps * places + (W == 1 ? place(t % taps, 0) + w * Q : place(t % taps, w))) * L;
        chunk_columns = std::min(out_width, std::max<i64>(L, CACHED / Q / L * L));
        chunk_rows = chunk_columns < out_width ? 1 : std::min(out_height, std::max<i64>(1, CACHED / Q / out_width));
        chunks = parts(out_height, chunk_rows) * parts(out_width, chunk_columns);
        high = (chunk_rows - 1) * step_h + downs.back() + 1;
        wide = (chunk_columns - 1) * step_w + rights.back() + 1;
        most = round_up(chunk_rows * chunk_columns, L);
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

// What a chunk sees of one group's input channels.
struct Planes {
    const Shape& p;
    const i64 row;  // from one row of `seen` to the next, with slack: whole vectors are read
    std::unique_ptr<float[]> seen, line, planes;

    explicit Planes(const Shape& shape)
        : p(shape), row(shape.wide + 2 * L), seen(new float[shape.I * shape.high * row]()),
          line(new float[shape.most + 2 * L]), planes(new float[shape.most * shape.Q]) {}

    // Lanes beyond the chunk's outputs are zero. Returns how many vectors of outputs there are.
    i64 fill(const Numbers& x, i64 group, const Chunk& chunk) {
        copy(x, group, chunk);
        const i64 outputs = chunk.rows * chunk.columns, vectors = Shape::parts(outputs, L);
        float* to = planes.get();
        for (i64 i = 0; i < p.I; ++i)
            for (i64 down : p.downs)
                for (i64 right : p.rights) {
                    for (i64 r = 0; r < chunk.rows; ++r)
                        thin(&seen[(i * p.high + r * p.step_h + down) * row + right], &line[r * chunk.columns],
                             chunk.columns);
                    store(&line[outputs], Floats{});
                    for (i64 v = 0; v < vectors; ++v) store(to + v * p.Q * L, load<Floats>(&line[v * L]));
                    to += L;
                }
        return vectors;
    }

  private:
    // Every step_w-th number; writes whole vectors.
    INLINE void thin(const float* from, float* to, i64 count) const {
        if (p.step_w == 1) {
            for (i64 c = 0; c < count; c += L) store(to + c, load<Floats>(from + c));
        } else if (p.step_w == 2) {
            for (i64 c = 0; c < count; c += L)
                store(to + c, shuffled(load<Floats>(from + 2 * c), load<Floats>(from + 2 * c + L), EVEN));
        } else {
            for (i64 c = 0; c < count; ++c) to[c] = from[c * p.step_w];
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

// sums[n][c] += the products of stream n, a vector of outputs in one window, with the taps of channel c.
template <int N, int C>
INLINE void multiply(const Shape& p, const float* x, const i64* offsets, const float* const (&weights)[C],
                     Floats (&sums)[N][C]) {
    Floats found[N][C];  // in registers: the weights might, for all the compiler knows, lie where `sums` does
    for (int n = 0; n < N; ++n)
        for (int c = 0; c < C; ++c) found[n][c] = sums[n][c];
    for (i64 t = 0; t < p.T; ++t, offsets += p.streams) {
        Floats here[N];
        for (int n = 0; n < N; ++n) here[n] = load<Floats>(x + offsets[n]);
        for (int c = 0; c < C; ++c) {
            const Floats weight = same(weights[c][t]);
            for (int n = 0; n < N; ++n) found[n][c] += here[n] * weight;
        }
    }
    for (int n = 0; n < N; ++n)
        for (int c = 0; c < C; ++c) sums[n][c] = found[n][c];
}

// emit(vector, channel, value, code) for each of `vectors` of outputs (one, unless there is no pool) and of C channels.
template <bool SAVE, int C, class Emit>
INLINE void outputs(const Shape& p, const float* x, const float* const (&weights)[C], const float (&bias)[C],
                    i64 vectors, Emit emit) {
    const auto finish = [&](int n, int c, Floats value, Ints code) INLINE_LAMBDA {
        if (SAVE && p.relu) code = value <= 0.0f ? Ints{} + DEAD : code;
        emit(n, c, p.relu ? rectified(value) : value, code);
    };
    const auto start = [&](auto& sums) INLINE_LAMBDA {
        for (auto& of_channels : sums)
            for (int c = 0; c < C; ++c) of_channels[c] = same(bias[c]);
    };
    if (p.W == 1)
        return counted<STREAMS>(vectors, [&](auto count) INLINE_LAMBDA {
            constexpr int N = decltype(count)::value;
            Floats sums[N][C];
            start(sums);
            multiply<N, C>(p, x, p.offsets.data(), weights, sums);
            for (int n = 0; n < N; ++n)
                for (int c = 0; c < C; ++c) finish(n, c, sums[n][c], Ints{});
        });
    Floats best[C];
    Ints code[C];
    for (int c = 0; c < C; ++c) best[c] = same(-__builtin_inff()), code[c] = Ints{};
    for (i64 w = 0; w < p.W; w += STREAMS)
        counted<STREAMS>(std::min<i64>(STREAMS, p.W - w), [&](auto count) INLINE_LAMBDA {
            constexpr int N = decltype(count)::value;
            Floats sums[N][C];
            start(sums);
            multiply<N, C>(p, x, p.offsets.data() + w, weights, sums);
            for (int n = 0; n < N; ++n)
                for (int c = 0; c < C; ++c) {
                    if (SAVE) {
                        const Ints better = (sums[n][c] > best[c]) | (sums[n][c] != sums[n][c]);
                        code[c] = better ? Ints{} + std::int32_t(w + n) : code[c];
                        best[c] = better ? sums[n][c] : best[c];
                    } else {
                        best[c] = largest(best[c], sums[n][c]);
                    }
                }
        });
    for (int c = 0; c < C; ++c) finish(0, c, best[c], code[c]);
}

struct Forward {
    const Shape& p;
    Numbers x, y;
    const float* weights;
    Numbers bias;
    std::uint8_t* argmax;

    template <bool SAVE>
    void run(const Chunk& chunk, Planes& planes) const {
        for (i64 group = 0; group < p.groups; ++group) {
            const i64 vectors = planes.fill(x, group, chunk), block = p.W == 1 ? STREAMS : 1;
            for (i64 v = 0; v < vectors; v += block)
                for (i64 o = 0; o < p.O; o += L)
                    channels<SAVE>(chunk, &planes.planes[v * p.Q * L], v, std::min(block, vectors - v),
                                   group * p.O + o, std::min<i64>(L, p.O - o));
        }
    }

  private:
    // Up to L channels of `vectors` of outputs, the first of which is number v of the chunk.
    template <bool SAVE>
    void channels(const Chunk& chunk, const float* x_, i64 v, i64 vectors, i64 first, i64 count) const {
        const i64 done = chunk.row * p.out_width + chunk.column + v * L;  // outputs of the image before
        const i64 left = chunk.rows * chunk.columns - v * L;
        Floats values[STREAMS][L];
        Ints codes[STREAMS][L];
        for (i64 o = 0; o < count; o += CHANNELS)
            counted<CHANNELS>(std::min<i64>(CHANNELS, count - o), [&](auto many) INLINE_LAMBDA {
                constexpr int C = decltype(many)::value;
                const float* of[C];
                float start[C];
                for (int c = 0; c < C; ++c)
                    of[c] = weights + (first + o + c) * p.T, start[c] = bias.at ? bias[first + o + c] : 0.0f;
                outputs<SAVE, C>(p, x_, of, start, vectors, [&](int n, int c, Floats value, Ints code) INLINE_LAMBDA {
                    if (p.channels_last) {
                        values[n][o + c] = value;
                        if (SAVE) codes[n][o + c] = code;
                        return;
                    }
                    const i64 at = (chunk.image * p.outputs + first + o + c) * p.area() + done + n * L;
                    y.put(at, value, left - n * L);
                    if (SAVE) keep(at, code, left - n * L);
                });
            });
        if (!p.channels_last) return;
        for (i64 n = 0; n < vectors; ++n) {
            const i64 at = (chunk.image * p.area() + done + n * L) * p.outputs + first;
            transpose(values[n]);
            for (i64 i = 0; i < std::min<i64>(L, left - n * L); ++i) y.put(at + i * p.outputs, values[n][i], count);
            if (!SAVE) continue;
            Floats turned[L];
            for (int c = 0; c < L; ++c) turned[c] = bits<Floats>(codes[n][c]);
            transpose(turned);
            for (i64 i = 0; i < std::min<i64>(L, left - n * L); ++i)
                keep(at + i * p.outputs, bits<Ints>(turned[i]), count);
        }
    }

    INLINE void keep(i64 at, Ints code, i64 count) const {
        const Bytes bytes = __builtin_convertvector(code, Bytes);
        std::memcpy(argmax + at, &bytes, count < L ? count : L);
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

    // Gradients of vector v of channel o that belong to window w.
    INLINE Floats of(i64 o, i64 v, i64 w) const {
        const i64 at = o * p.most + v * L;
        const Ints window = __builtin_convertvector(load<Bytes>(&windows[at]), Ints);
        return window == std::int32_t(w) ? load<Floats>(&gradients[at]) : Floats{};
    }

  private:
    void turn(const Chunk& chunk, i64 done, i64 group, i64 v, i64 count, i64 o, i64 channels) {
        Floats values[L], codes[L];
        for (i64 i = 0; i < L; ++i) {
            values[i] = codes[i] = Floats{};
            if (i >= count) continue;
            const i64 at = (chunk.image * p.area() + done + v + i) * p.outputs + group * p.O + o;
            values[i] = d_y.take(at, channels);
            Bytes bytes{};
            if (argmax) std::memcpy(&bytes, argmax + at, channels);
            codes[i] = bits<Floats>(__builtin_convertvector(bytes, Ints));
        }
        transpose(values), transpose(codes);
        for (i64 c = 0; c < channels; ++c) {
            store(&gradients[(o + c) * p.most + v], values[c]);
            store(&windows[(o + c) * p.most + v], __builtin_convertvector(bits<Ints>(codes[c]), Bytes));
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
                    for (i64 w = 0; w < p.W; ++w) sum += returned.of(o, v, w);
                store(&bias[(group * p.O + o) * L], sum);
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
        for (i64 v = 0; v < vectors; ++v, x += p.Q * L)
            for (i64 w = 0; w < p.W; ++w) {
                Floats back[C];
                for (int c = 0; c < C; ++c) back[c] = returned.of(o + c, v, w);
                for (int k = 0; k < K; ++k) {
                    const Floats here = load<Floats>(x + offsets[k * p.streams + w]);
                    for (int c = 0; c < C; ++c) found[c][k] += back[c] * here;
                }
            }
        for (int c = 0; c < C; ++c)
            for (int k = 0; k < K; ++k) store(sums + (c * p.T + k) * L, found[c][k]);
    }
};

void weight_gradients(const Shape& p, const Numbers& x, const std::uint8_t* argmax, const Numbers& d_y, float* d_weight,
                      float* d_bias, i64 threads) {
    const i64 chunks = p.batch * p.chunks, fit = std::max<i64>(1, PARTIAL / (p.outputs * p.T * L));
    const i64 slices = std::min({chunks, SLICES, fit});
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
                                store(&back[((w * p.O + o) * N + i) * L], returned.of(o, v + i, w));
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
    std::vector<float> own;
    const Forward pass{p, {x, half}, {y, half}, p.weights({weight, half}, own), {bias, half}, argmax};
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

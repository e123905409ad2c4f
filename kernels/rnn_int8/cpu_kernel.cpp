// One direction of one recurrent layer on int8 weights. The equations are in __init__.py, the same roundings in plain
// torch operations in reference.py; results are equal to it bit for bit on every processor, as the products are
// integers and the gates use only operations that IEEE 754 rounds once.
//
// Letters: T time steps, B batch rows, I input features, H hidden units, G gates, K columns of a weight matrix (I or H),
// L lanes of a vector of 32-bit numbers. Units are those of the hidden state; a channel is one unit of one gate.
//
// Batch rows are independent of each other: a thread carries a slice of them through the whole sequence, no barriers.
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#include "_thread_pool.hpp"
#include "cpu_products.hpp"

namespace {

// ---- Cells -----------------------------------------------------------------------------------------------------------
//
// step: one time step of L units. x[g * H_] is gate g's input part with its bias; h_[g] its hidden part; h and c the
// units' states, updated. Fractions are brought to one denominator: a division costs as much as ten other operations.

struct Lstm {
    static constexpr int G = 4;
    static INLINE void step(const float* x, i64 H_, const Floats* h_, const float*, float* h, float* c) {
        const Floats i = decay(load<Floats>(x) + h_[0]), f = decay(load<Floats>(x + H_) + h_[1]);
        const Floats g = decay_twice(load<Floats>(x + 2 * H_) + h_[2]), o = decay(load<Floats>(x + 3 * H_) + h_[3]);
        const Floats input = (1.0f + i) * (1.0f + g), keep = 1.0f + f;
        const Floats cell = (load<Floats>(c) * input + (1.0f - g) * keep) / (keep * input);
        const Floats e = decay_twice(cell);
        store(c, cell);
        store(h, (1.0f - e) / ((1.0f + o) * (1.0f + e)));
    }
};

struct Gru {
    static constexpr int G = 3;
    static INLINE void step(const float* x, i64 H_, const Floats* h_, const float* bias_hn, float* h, float*) {
        const Floats r = 1.0f / (1.0f + decay(load<Floats>(x) + h_[0]));
        const Floats z = decay(load<Floats>(x + H_) + h_[1]);
        const Floats n = decay_twice(load<Floats>(x + 2 * H_) + r * (h_[2] + load<Floats>(bias_hn)));
        store(h, (z * (1.0f - n) + load<Floats>(h) * (1.0f + n)) / ((1.0f + n) * (1.0f + z)));
    }
};

struct RnnTanh {
    static constexpr int G = 1;
    static INLINE void step(const float* x, i64, const Floats* h_, const float*, float* h, float*) {
        const Floats e = decay_twice(load<Floats>(x) + h_[0]);
        store(h, (1.0f - e) / (1.0f + e));
    }
};

struct RnnRelu {
    static constexpr int G = 1;
    static INLINE void step(const float* x, i64, const Floats* h_, const float*, float* h, float*) {
        store(h, at_least(Floats{}, load<Floats>(x) + h_[0]));
    }
};

// ---- The layer -------------------------------------------------------------------------------------------------------

}  // namespace

extern "C" struct PerfkitRnnLayer {
    i64 cell;  // 0 LSTM, 1 GRU, 2 RNN tanh, 3 RNN relu
    i64 steps, batch, inputs, hidden;
    const i64* batch_sizes;  // (T,), never rising: at step t the rows [0, batch_sizes[t]) are there
    const i64* starts;       // (T,) the place of step t's first row in x and out, in units of row strides
    i64 reverse;
    const float* x;
    i64 x_step, x_row;  // strides in floats; features are contiguous. The row b of step t lies at
    float* out;         // x + t * x_step + (starts[t] + b) * x_row
    i64 out_step, out_row;
    float x_floor, x_fixed, h_floor;  // see quantize
    const std::int8_t *w_ih, *w_hh;   // packed
    const float *scale_ih, *scale_hh, *bias;  // (G, H)
    const float* bias_hn;                     // (H,), GRU only
    float *h, *c;                             // (B, H), the initial states, replaced by the final ones; c for LSTM only
    perfkit::Threads threads;
};

namespace {

// What all slices share: per-channel numbers with H rounded up to whole vectors, the sums that BIAS adds.
template <int G>
struct Channels {
    i64 H, H_, K4_x, K4_h;
    std::vector<float> scale_ih, scale_hh, bias, bias_hn;
    std::vector<std::int32_t> excess_x, excess_h;

    explicit Channels(const PerfkitRnnLayer& p)
        : H(p.hidden), H_(round_up(H, PANEL)), K4_x((p.inputs + 3) / 4), K4_h((H + 3) / 4),
          scale_ih(padded(p.scale_ih, G)), scale_hh(padded(p.scale_hh, G)), bias(padded(p.bias, G)),
          bias_hn(p.bias_hn ? padded(p.bias_hn, 1) : std::vector<float>()),
          excess_x(excess(p.w_ih, K4_x)), excess_h(excess(p.w_hh, K4_h)) {}

    std::vector<float> padded(const float* from, int gates) const {
        std::vector<float> to(gates * H_);
        for (int g = 0; g < gates; ++g) std::memcpy(&to[g * H_], from + g * H, H * sizeof(float));
        return to;
    }

    std::vector<std::int32_t> excess(const std::int8_t* w, i64 K4) const {
        std::vector<std::int32_t> sums(BIAS ? G * H_ : 0);
        if (BIAS == 0) return sums;
        const std::vector<Activation> bias(4 * K4, Activation(BIAS));
        for (i64 u = 0; u < H; u += L) {
            Ints sum[1][G];
            dot<1, G>(bias.data(), 0, at(w, u, K4), width(u), K4, sum);
            for (int g = 0; g < G; ++g) store(&sums[g * H_ + u], sum[0][g]);
        }
        return sums;
    }

    i64 width(i64 unit) const { return H - unit / PANEL * PANEL < PANEL ? H % PANEL : PANEL; }

    // Where the weights of `unit` begin.
    const std::int8_t* at(const std::int8_t* w, i64 unit, i64 K4) const {
        return w + unit / PANEL * PANEL * G * 4 * K4 + unit % PANEL * 4;
    }
};

// Calls use(row, parts) for each of `rows`: parts[g] = the product of that row with the L units of gate g that begin
// at `unit`, times both scales.
template <int G, class Use>
INLINE void product(const Channels<G>& channels, i64 unit, const std::int8_t* w, i64 K4, const float* channel_scales,
                    const std::int32_t* excess, const Activation* q, i64 stride, const float* row_scales, i64 rows,
                    Use use) {
    const std::int8_t* from = channels.at(w, unit, K4);
    const i64 width = channels.width(unit);
    auto block = [&](auto count, i64 row) INLINE_LAMBDA {
        constexpr int R = decltype(count)::value;
        Ints sums[R][G];
        dot<R, G>(q + row * stride, stride, from, width, K4, sums);
        for (int r = 0; r < R; ++r) {
            Floats parts[G];
            for (int g = 0; g < G; ++g) {
                if (BIAS) sums[r][g] -= load<Ints>(excess + g * channels.H_ + unit);
                const Floats scales = load<Floats>(channel_scales + g * channels.H_ + unit) * row_scales[row + r];
                parts[g] = __builtin_convertvector(sums[r][g], Floats) * scales;
            }
            use(row + r, parts);
        }
    };
    i64 row = 0;
    for (; row + ROWS <= rows; row += ROWS) block(std::integral_constant<int, ROWS>{}, row);
    if (ROWS > 2 && row + 2 <= rows) block(std::integral_constant<int, 2>{}, row), row += 2;
    if (ROWS > 1 && row < rows) block(std::integral_constant<int, 1>{}, row);
}

// The rows [first, last) of the batch through the whole sequence.
template <class Cell>
void run_slice(const PerfkitRnnLayer& p, const Channels<Cell::G>& channels, i64 first, i64 last) {
    constexpr int G = Cell::G;
    // So many rows of input parts at a time: enough to reuse each weight, few enough to stay in the second-level cache.
    constexpr i64 CHUNK = 64;
    const i64 H = p.hidden, H_ = channels.H_, slice = last - first;
    const i64 x_stride = round_up(p.inputs, PANEL), h_stride = H_;
    const i64 chunk = slice > CHUNK ? slice : CHUNK;
    std::vector<Activation> x_q(chunk * x_stride, Activation(BIAS)), h_q(slice * h_stride, Activation(BIAS));
    std::vector<float> x_scales(chunk), h_scales(slice), x_parts(chunk * G * H_);
    std::vector<float> h(slice * H_), c(p.c ? slice * H_ : 0);
    for (i64 b = 0; b < slice; ++b) {
        std::memcpy(&h[b * H_], p.h + (first + b) * H, H * sizeof(float));
        if (p.c) std::memcpy(&c[b * H_], p.c + (first + b) * H, H * sizeof(float));
        h_scales[b] = quantize(&h[b * H_], H, p.h_floor, 0.0f, &h_q[b * h_stride]);
    }
    const auto time = [&](i64 step) { return p.reverse ? p.steps - 1 - step : step; };
    const auto rows_at = [&](i64 step) {
        const i64 there = p.batch_sizes[time(step)] - first;
        return there < 0 ? 0 : there < slice ? there : slice;
    };
    const auto input_parts = [&](i64 step) {  // of as many steps from `step` on as fit; returns the step after them
        i64 rows = 0;
        for (; step < p.steps && rows + rows_at(step) <= chunk; ++step) {
            const i64 t = time(step), there = rows_at(step);
            const float* x = p.x + t * p.x_step + (p.starts[t] + first) * p.x_row;
            for (i64 b = 0; b < there; ++b, ++rows)
                x_scales[rows] = quantize(x + b * p.x_row, p.inputs, p.x_floor, p.x_fixed, &x_q[rows * x_stride]);
        }
        for (i64 u = 0; u < H; u += L)
            product<G>(channels, u, p.w_ih, channels.K4_x, channels.scale_ih.data(), channels.excess_x.data(), x_q.data(),
                       x_stride, x_scales.data(), rows, [&](i64 row, const Floats* parts) INLINE_LAMBDA {
                           for (int g = 0; g < G; ++g)
                               store(&x_parts[(row * G + g) * H_ + u], parts[g] + load<Floats>(&channels.bias[g * H_ + u]));
                       });
        return step;
    };
    i64 ready = 0, row = 0;  // input parts are there up to step `ready`; those of the present step begin at `row`
    for (i64 step = 0; step < p.steps; ++step) {
        if (step == ready) ready = input_parts(step), row = 0;
        const i64 there = rows_at(step), t = time(step);
        for (i64 u = 0; u < H; u += L)
            product<G>(channels, u, p.w_hh, channels.K4_h, channels.scale_hh.data(), channels.excess_h.data(), h_q.data(),
                       h_stride, h_scales.data(), there, [&](i64 b, const Floats* parts) INLINE_LAMBDA {
                           Cell::step(&x_parts[(row + b) * G * H_ + u], H_, parts, channels.bias_hn.data() + u,
                                      &h[b * H_ + u], c.data() + b * H_ + u);
                       });
        float* out = p.out + t * p.out_step + (p.starts[t] + first) * p.out_row;
        for (i64 b = 0; b < there; ++b) {
            std::memcpy(out + b * p.out_row, &h[b * H_], H * sizeof(float));
            h_scales[b] = quantize(&h[b * H_], H, p.h_floor, 0.0f, &h_q[b * h_stride]);
        }
        row += there;
    }
    for (i64 b = 0; b < slice; ++b) {
        std::memcpy(p.h + (first + b) * H, &h[b * H_], H * sizeof(float));
        if (p.c) std::memcpy(p.c + (first + b) * H, &c[b * H_], H * sizeof(float));
    }
}

template <class Cell>
void run_layer(const PerfkitRnnLayer& p) {
    struct Work {
        const PerfkitRnnLayer& p;
        const Channels<Cell::G> channels;
        const std::vector<i64> cuts;
        std::atomic<bool> failed{false};
    } work{p, Channels<Cell::G>(p), cuts(p.batch_sizes, p.steps, p.batch, p.threads.count)};
    const auto task = [](void* context, long i) {
        Work& work = *static_cast<Work*>(context);
        try {
            run_slice<Cell>(work.p, work.channels, work.cuts[i], work.cuts[i + 1]);
        } catch (const std::bad_alloc&) {
            work.failed = true;
        }
    };
    perfkit::ThreadPool::run(long(work.cuts.size()) - 1, p.threads, task, &work);
    if (work.failed) throw std::bad_alloc();
}

}  // namespace

// Returns 0; 1 if memory ran out, and 2 for a cell that is not known.
extern "C" int perfkit_rnn_int8_layer(const PerfkitRnnLayer* layer) {
    try {
        switch (layer->cell) {
            case 0: run_layer<Lstm>(*layer); return 0;
            case 1: run_layer<Gru>(*layer); return 0;
            case 2: run_layer<RnnTanh>(*layer); return 0;
            case 3: run_layer<RnnRelu>(*layer); return 0;
        }
        return 2;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// The instructions that the integer products were built for.
extern "C" const char* perfkit_rnn_int8_instructions() {
#if BIASED && defined(__AVX512VNNI__)
    return "AVX512-VNNI";
#elif BIASED
    return "AVX-VNNI";
#elif defined(__AVX2__)
    return "AVX2";
#else
    return "plain C++";
#endif
}

// One direction of one recurrent layer in float32, forward and backward. The equations are in __init__.py.
//
// Letters: T time steps, B batch rows, I input features, H hidden units, G gates, S values saved of each unit and step for
// the backward pass, K columns of a weight matrix, L lanes of a vector. H_ is H rounded up to whole vectors.
//
// Batch rows are independent of each other: a thread carries a slice of them through the whole sequence, no barriers. The
// hidden state's product and the gates are one loop, so the gates are computed on sums that are still in registers.
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#define PERFKIT_LANES 16
#define REGISTERS 32
#else
#define PERFKIT_LANES 8
#define REGISTERS 16
#endif

#include "_thread_pool.hpp"
#include "_vector.hpp"

namespace {
using perfkit::i64;
}

// The rows are sorted by length, longest first: at step t the sorted rows [0, batch_sizes[t]) are there, and the sorted
// row b is row rows[b] of the states. The place of a row of step t in x is x + t * x_step + (starts[t] + rows[b]) * x_row,
// in out likewise; in what is saved for the backward pass it is number t * saved_step + starts[t] + rows[b], at F floats
// a row without gaps, F = S * H in `gates`, H in `cells` and `previous`.
extern "C" struct PerfkitRnn {
    i64 cell;  // 0 LSTM, 1 GRU, 2 RNN tanh, 3 RNN relu
    i64 steps, batch, inputs, hidden;
    const i64 *batch_sizes, *starts, *rows;  // (T,) never rising, (T,), (B,)
    i64 reverse;
    i64 saved_step;
    const float* x;
    i64 x_step, x_row;  // strides in floats; features are contiguous
    float* out;
    i64 out_step, out_row;
    const float *w_ih, *w_hh, *bias;  // (G H, I), (G H, H), (G H): contiguous; both biases summed, but for GRU's n
    const float* bias_hn;             // (H,), GRU only: added to the hidden part of n before r multiplies that
    float *h, *c;                     // (B, H), the initial states, replaced by the final ones; c for LSTM only
    float *gates, *cells;             // saved where not null: LSTM i f g o, and its cells; GRU r z n and n's hidden part
    i64 threads;
};

// The same direction backwards.
extern "C" struct PerfkitRnnBackward {
    i64 cell;
    i64 steps, batch, hidden;
    const i64 *batch_sizes, *starts, *rows;
    i64 reverse;
    i64 saved_step;
    const float *out, *d_out;
    i64 out_step, out_row, d_out_step, d_out_row;
    const float* w_hh;
    const float *h0, *c0;         // (B, H)
    const float *gates, *cells;   // as saved; RNN: not used, its gate is its output
    float *d_h, *d_c;             // (B, H), in: gradients of the final states; out: of the initial ones
    float* d_gates;               // saved rows of S * H: of the gates before their functions; GRU r z n, n's hidden part
    float* previous;              // saved rows of H: the hidden state that each step began with
    i64 threads;
};

namespace {

using namespace perfkit;

// ---- Products --------------------------------------------------------------------------------------------------------
//
// Packed weights: for each block of L units, for each column, for each gate: the weights of the L units; zeros beyond H.

struct Packed {
    i64 columns, block;
    std::vector<float> values;

    const float* of(i64 unit) const { return values.data() + unit / L * block; }
};

// Packs w (G H, columns).
Packed packed(const float* w, i64 G, i64 H, i64 columns) {
    Packed to{columns, columns * G * L, std::vector<float>((H + L - 1) / L * columns * G * L)};
    for (i64 u = 0; u < H; ++u)
        for (i64 g = 0; g < G; ++g) {
            const float* from = w + (g * H + u) * columns;
            float* at = to.values.data() + u / L * to.block + g * L + u % L;
            for (i64 k = 0; k < columns; ++k) at[k * G * L] = from[k];
        }
    return to;
}

// Packs the transpose of w (rows, columns), as one gate of `columns` units with `rows` columns.
Packed packed_transpose(const float* w, i64 rows, i64 columns) {
    Packed to{rows, rows * L, std::vector<float>((columns + L - 1) / L * rows * L)};
    for (i64 u = 0; u < columns; u += L) {
        const i64 width = columns - u < L ? columns - u : L;
        for (i64 k = 0; k < rows; ++k)
            std::memcpy(to.values.data() + u / L * to.block + k * L, w + k * columns + u, width * sizeof(float));
    }
    return to;
}

// As many rows as leave the registers room for the weights of one gate and a broadcast number of each row.
template <int G>
constexpr int ROWS = (REGISTERS - 2) / (G + 1) < 8 ? (REGISTERS - 2) / (G + 1) : 8;

// sums[r][g] += row r of x times the weights of L units of gate g.
template <int R, int G>
INLINE void dot(const float* x, i64 stride, const float* w, i64 columns, Floats (&sums)[R][G]) {
    // Few sums are made of several chains each: every product would wait for the last one's result.
    constexpr int CHAINS = R * G >= 8 ? 1 : R * G >= 3 ? 2 : 8 / (R * G);
    Floats found[CHAINS][R][G] = {};
    const auto add = [&](Floats (&to)[R][G], i64 k) INLINE_LAMBDA {
        Floats number[R];
        for (int r = 0; r < R; ++r) number[r] = all(x[r * stride + k]);
        for (int g = 0; g < G; ++g) {
            const Floats weights = load<Floats>(w + (k * G + g) * L);
            for (int r = 0; r < R; ++r) to[r][g] += number[r] * weights;
        }
    };
    i64 k = 0;
    for (; k + CHAINS <= columns; k += CHAINS)
        for (int chain = 0; chain < CHAINS; ++chain) add(found[chain], k + chain);
    for (; k < columns; ++k) add(found[0], k);
    for (int r = 0; r < R; ++r)
        for (int g = 0; g < G; ++g)
            for (int chain = 0; chain < CHAINS; ++chain) sums[r][g] += found[chain][r][g];
}

// Calls use(row, sums) for each of `rows`: sums[g] = the product of that row of x with the L units of gate g at `unit`.
template <int G, class Use>
INLINE void product(const Packed& w, i64 unit, const float* x, i64 stride, i64 rows, Use use) {
    const float* from = w.of(unit);
    const auto block = [&](auto count, i64 row) INLINE_LAMBDA {
        constexpr int R = decltype(count)::value;
        Floats sums[R][G] = {};
        dot<R, G>(x + row * stride, stride, from, w.columns, sums);
        for (int r = 0; r < R; ++r) use(row + r, sums[r]);
    };
    i64 row = 0;
    for (; row + ROWS<G> <= rows; row += ROWS<G>) block(std::integral_constant<int, ROWS<G>>{}, row);
    if constexpr (ROWS<G> > 4)
        for (; row + 4 <= rows; row += 4) block(std::integral_constant<int, 4>{}, row);
    for (; row + 2 <= rows; row += 2) block(std::integral_constant<int, 2>{}, row);
    if (row < rows) block(std::integral_constant<int, 1>{}, row);
}

// ---- Cells -----------------------------------------------------------------------------------------------------------
//
// step: L units of one time step. a[g * stride] is gate g's input part with its bias, u[g] its hidden part; h and c the
// units' states, updated. With SAVE, saved[s * H_] gets what the backward pass needs. Without it fractions are brought to
// one denominator: a division costs as much as ten other operations.
//
// back: dh and dc are gradients of the units' states after the step; dc and `through`, the part of dh that reaches the
// state before it past the weights, are set. saved[s * H] as above, `h` the state after the step (RNN), `before` that
// before it (GRU), c_before and c the cells (LSTM). d[s] become the gradients of the gates.

INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + decay(x)); }
INLINE Floats tanh(Floats x) {
    const Floats e = decay_twice(x);
    return (1.0f - e) / (1.0f + e);
}

// L numbers, or the last few of a row: what lies behind them is not touched.
INLINE Floats load_part(const float* from, i64 count) {
    if (count >= L) return load<Floats>(from);
    Floats value{};
    std::memcpy(&value, from, count * sizeof(float));
    return value;
}
INLINE void store_part(float* to, Floats value, i64 count) {
    if (count >= L) return store(to, value);
    std::memcpy(to, &value, count * sizeof(float));
}

struct Lstm {
    static constexpr int G = 4, S = 4;
    static constexpr bool CELLS = true;

    template <bool SAVE>
    static INLINE void step(const float* a, i64 stride, const Floats* u, const float*, float* h, float* c, Floats* saved) {
        const Floats x_i = load<Floats>(a) + u[0], x_f = load<Floats>(a + stride) + u[1];
        const Floats x_g = load<Floats>(a + 2 * stride) + u[2], x_o = load<Floats>(a + 3 * stride) + u[3];
        if constexpr (SAVE) {
            saved[0] = sigmoid(x_i), saved[1] = sigmoid(x_f), saved[2] = tanh(x_g), saved[3] = sigmoid(x_o);
            const Floats cell = saved[1] * load<Floats>(c) + saved[0] * saved[2];
            store(c, cell);
            store(h, saved[3] * tanh(cell));
        } else {
            const Floats i = decay(x_i), f = decay(x_f), g = decay_twice(x_g), o = decay(x_o);
            const Floats input = (1.0f + i) * (1.0f + g), keep = 1.0f + f;
            const Floats cell = (load<Floats>(c) * input + (1.0f - g) * keep) / (keep * input);
            const Floats e = decay_twice(cell);
            store(c, cell);
            store(h, (1.0f - e) / ((1.0f + o) * (1.0f + e)));
        }
    }
    static INLINE Floats back(const Floats* saved, Floats, Floats, Floats c_before, Floats c, Floats dh, Floats& dc, Floats* d) {
        const Floats i = saved[0], f = saved[1], g = saved[2], o = saved[3], t = tanh(c);
        const Floats cell = dc + dh * o * (1.0f - t * t);
        d[0] = cell * g * i * (1.0f - i);
        d[1] = cell * c_before * f * (1.0f - f);
        d[2] = cell * i * (1.0f - g * g);
        d[3] = dh * t * o * (1.0f - o);
        dc = cell * f;
        return Floats{};
    }
};

struct Gru {
    static constexpr int G = 3, S = 4;
    static constexpr bool CELLS = false;

    template <bool SAVE>
    static INLINE void step(const float* a, i64 stride, const Floats* u, const float* bias_hn, float* h, float*, Floats* saved) {
        const Floats x_r = load<Floats>(a) + u[0], x_z = load<Floats>(a + stride) + u[1];
        const Floats x_n = load<Floats>(a + 2 * stride), hidden = u[2] + load<Floats>(bias_hn);
        const Floats r = sigmoid(x_r);
        if constexpr (SAVE) {
            const Floats z = sigmoid(x_z), n = tanh(x_n + r * hidden);
            saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = hidden;
            store(h, n + z * (load<Floats>(h) - n));
        } else {
            const Floats z = decay(x_z), n = decay_twice(x_n + r * hidden);
            store(h, (z * (1.0f - n) + load<Floats>(h) * (1.0f + n)) / ((1.0f + n) * (1.0f + z)));
        }
    }
    static INLINE Floats back(const Floats* saved, Floats, Floats before, Floats, Floats, Floats dh, Floats&, Floats* d) {
        const Floats r = saved[0], z = saved[1], n = saved[2], hidden = saved[3];
        d[2] = dh * (1.0f - z) * (1.0f - n * n);
        d[3] = d[2] * r;
        d[0] = d[2] * hidden * r * (1.0f - r);
        d[1] = dh * (before - n) * z * (1.0f - z);
        return dh * z;
    }
};

template <bool RELU>
struct Rnn {
    static constexpr int G = 1, S = 1;
    static constexpr bool CELLS = false;

    template <bool SAVE>
    static INLINE void step(const float* a, i64, const Floats* u, const float*, float* h, float*, Floats* saved) {
        const Floats x = load<Floats>(a) + u[0];
        const Floats value = RELU ? at_least(Floats{}, x) : tanh(x);
        if constexpr (SAVE) saved[0] = value;
        store(h, value);
    }
    static INLINE Floats back(const Floats*, Floats h, Floats, Floats, Floats, Floats dh, Floats&, Floats* d) {
        d[0] = RELU ? (h > 0.0f ? dh : Floats{}) : dh * (1.0f - h * h);
        return Floats{};
    }
};

// ---- Forward ---------------------------------------------------------------------------------------------------------

template <class P>
INLINE i64 time_of(const P& p, i64 step) {
    return p.reverse ? p.steps - 1 - step : step;
}

// How many of the sorted rows [first, last) are there at time t.
template <class P>
INLINE i64 rows_at(const P& p, i64 t, i64 first, i64 last) {
    const i64 there = p.batch_sizes[t] - first;
    return there < 0 ? 0 : there < last - first ? there : last - first;
}

template <class P>
INLINE i64 place(const P& p, i64 t, i64 b) {
    return p.starts[t] + p.rows[b];
}

struct Weights {
    Packed ih, hh;
    std::vector<float> bias, bias_hn;  // H_ a gate

    Weights(const PerfkitRnn& p, int G)
        : ih(packed(p.w_ih, G, p.hidden, p.inputs)), hh(packed(p.w_hh, G, p.hidden, p.hidden)),
          bias(padded(p.bias, G, p.hidden)), bias_hn(p.bias_hn ? padded(p.bias_hn, 1, p.hidden) : std::vector<float>()) {}

    static std::vector<float> padded(const float* from, int gates, i64 H) {
        std::vector<float> to(gates * round_up(H, L));
        for (int g = 0; g < gates; ++g) std::memcpy(&to[g * round_up(H, L)], from + g * H, H * sizeof(float));
        return to;
    }
};

// The sorted rows [first, last) through the whole sequence.
template <class Cell, bool SAVE>
void forward_slice(const PerfkitRnn& p, const Weights& weights, i64 first, i64 last) {
    constexpr int G = Cell::G, S = Cell::S;
    // So many rows of input parts at a time: enough to reuse each weight, few enough to stay in the second-level cache.
    constexpr i64 CHUNK = 64;
    const i64 H = p.hidden, H_ = round_up(H, L), I = p.inputs, slice = last - first;
    const i64 chunk = slice > CHUNK ? slice : CHUNK;
    std::vector<float> x(chunk * I), parts(chunk * G * H_);
    std::vector<float> h(slice * H_), next(slice * H_), c(Cell::CELLS ? slice * H_ : 0);
    for (i64 b = 0; b < slice; ++b) {
        std::memcpy(&h[b * H_], p.h + p.rows[first + b] * H, H * sizeof(float));
        if (Cell::CELLS) std::memcpy(&c[b * H_], p.c + p.rows[first + b] * H, H * sizeof(float));
    }
    const auto input_parts = [&](i64 step) {  // of as many steps from `step` on as fit; returns the step after them
        i64 rows = 0;
        for (; step < p.steps; ++step) {
            const i64 t = time_of(p, step), there = rows_at(p, t, first, last);
            if (rows + there > chunk) break;
            for (i64 b = 0; b < there; ++b, ++rows)
                std::memcpy(&x[rows * I], p.x + t * p.x_step + place(p, t, first + b) * p.x_row, I * sizeof(float));
        }
        for (i64 u = 0; u < H; u += L)
            product<G>(weights.ih, u, x.data(), I, rows, [&](i64 row, const Floats* sums) INLINE_LAMBDA {
                for (int g = 0; g < G; ++g)
                    store(&parts[(row * G + g) * H_ + u], sums[g] + load<Floats>(&weights.bias[g * H_ + u]));
            });
        return step;
    };
    i64 ready = 0, row = 0;  // input parts are there up to step `ready`; those of the present step begin at `row`
    for (i64 step = 0; step < p.steps; ++step) {
        if (step == ready) ready = input_parts(step), row = 0;
        const i64 t = time_of(p, step), there = rows_at(p, t, first, last);
        std::memcpy(next.data(), h.data(), there * H_ * sizeof(float));  // GRU: a step needs the unit's old state
        for (i64 u = 0; u < H; u += L)
            product<G>(weights.hh, u, h.data(), H_, there, [&](i64 b, const Floats* sums) INLINE_LAMBDA {
                Floats saved[S];
                Cell::template step<SAVE>(&parts[(row + b) * G * H_ + u], H_, sums, weights.bias_hn.data() + u,
                                          &next[b * H_ + u], c.data() + b * H_ + u, saved);
                if constexpr (SAVE && S > 1) {
                    const i64 at = t * p.saved_step + place(p, t, first + b);
                    for (int s = 0; s < S; ++s) store_part(p.gates + (at * S + s) * H + u, saved[s], H - u);
                    if (Cell::CELLS) store_part(p.cells + at * H + u, load<Floats>(&c[b * H_ + u]), H - u);
                }
            });
        std::memcpy(h.data(), next.data(), there * H_ * sizeof(float));
        for (i64 b = 0; b < there; ++b)
            std::memcpy(p.out + t * p.out_step + place(p, t, first + b) * p.out_row, &h[b * H_], H * sizeof(float));
        row += there;
    }
    for (i64 b = 0; b < slice; ++b) {
        std::memcpy(p.h + p.rows[first + b] * H, &h[b * H_], H * sizeof(float));
        if (Cell::CELLS) std::memcpy(p.c + p.rows[first + b] * H, &c[b * H_], H * sizeof(float));
    }
}

// ---- Backward --------------------------------------------------------------------------------------------------------

// Where the hidden state before time t of the sorted row b is.
INLINE const float* before(const PerfkitRnnBackward& p, const float* initial, const float* rows, i64 step, i64 row_size,
                           i64 t, i64 b) {
    const i64 earlier = p.reverse ? t + 1 : t - 1;
    if (earlier < 0 || earlier >= p.steps || b >= p.batch_sizes[earlier]) return initial + p.rows[b] * p.hidden;
    return rows + earlier * step + place(p, earlier, b) * row_size;
}

template <class Cell>
void backward_slice(const PerfkitRnnBackward& p, const Packed& w_hh, i64 first, i64 last) {
    constexpr int S = Cell::S;
    constexpr bool GRU = std::is_same<Cell, Gru>::value;
    constexpr int G = Cell::G;
    const i64 H = p.hidden, H_ = round_up(H, L), slice = last - first;
    std::vector<float> d_h(slice * H_), d_c(slice * H_), through(slice * H_), d_hidden(slice * G * H);
    for (i64 b = 0; b < slice; ++b) {
        std::memcpy(&d_h[b * H_], p.d_h + p.rows[first + b] * H, H * sizeof(float));
        if (Cell::CELLS) std::memcpy(&d_c[b * H_], p.d_c + p.rows[first + b] * H, H * sizeof(float));
    }
    for (i64 step = p.steps - 1; step >= 0; --step) {
        const i64 t = time_of(p, step), there = rows_at(p, t, first, last);
        for (i64 b = 0; b < there; ++b) {
            const i64 at = t * p.saved_step + place(p, t, first + b);
            const float* d_out = p.d_out + t * p.d_out_step + place(p, t, first + b) * p.d_out_row;
            const float* out = p.out + t * p.out_step + place(p, t, first + b) * p.out_row;
            const float* h = before(p, p.h0, p.out, p.out_step, p.out_row, t, first + b);
            const float* c = Cell::CELLS ? before(p, p.c0, p.cells, p.saved_step * H, H, t, first + b) : h;
            std::memcpy(p.previous + at * H, h, H * sizeof(float));
            for (i64 u = 0; u < H; u += L) {
                const i64 width = H - u;
                Floats saved[S], d[S];
                for (int s = 0; S > 1 && s < S; ++s) saved[s] = load_part(p.gates + (at * S + s) * H + u, width);
                const Floats dh = load<Floats>(&d_h[b * H_ + u]) + load_part(d_out + u, width);
                const Floats cell = Cell::CELLS ? load_part(p.cells + at * H + u, width) : Floats{};
                Floats dc = load<Floats>(&d_c[b * H_ + u]);
                store(&through[b * H_ + u], Cell::back(saved, load_part(out + u, width), load_part(h + u, width),
                                                       load_part(c + u, width), cell, dh, dc, d));
                store(&d_c[b * H_ + u], dc);
                for (int s = 0; s < S; ++s) store_part(p.d_gates + (at * S + s) * H + u, d[s], width);
                for (int g = 0; g < G; ++g)
                    store_part(&d_hidden[(b * G + g) * H + u], d[GRU && g == 2 ? 3 : g], width);
            }
        }
        for (i64 u = 0; u < H; u += L)
            product<1>(w_hh, u, d_hidden.data(), G * H, there, [&](i64 b, const Floats* sums) INLINE_LAMBDA {
                store(&d_h[b * H_ + u], sums[0] + load<Floats>(&through[b * H_ + u]));
            });
    }
    for (i64 b = 0; b < slice; ++b) {
        std::memcpy(p.d_h + p.rows[first + b] * H, &d_h[b * H_], H * sizeof(float));
        if (Cell::CELLS) std::memcpy(p.d_c + p.rows[first + b] * H, &d_c[b * H_], H * sizeof(float));
    }
}

// ---- Slices on threads -----------------------------------------------------------------------------------------------

// Calls run(p, shared, first, last) for slices of the sorted rows.
template <class P, class Shared>
void each_slice(const P& p, const Shared& shared, void (*run)(const P&, const Shared&, i64, i64)) {
    struct Work {
        const P& p;
        const Shared& shared;
        void (*run)(const P&, const Shared&, i64, i64);
        const std::vector<i64> cuts;
        std::atomic<bool> failed{false};
    } work{p, shared, run, cuts(p.batch_sizes, p.steps, p.batch, p.threads)};
    const auto task = [](void* context, long i) {
        Work& work = *static_cast<Work*>(context);
        try {
            work.run(work.p, work.shared, work.cuts[i], work.cuts[i + 1]);
        } catch (const std::bad_alloc&) {
            work.failed = true;
        }
    };
    ThreadPool::instance().run(long(work.cuts.size()) - 1, int(p.threads), task, &work);
    if (work.failed) throw std::bad_alloc();
}

template <class Cell>
void run(const PerfkitRnn& p) {
    const Weights weights(p, Cell::G);
    each_slice(p, weights, p.gates ? forward_slice<Cell, true> : forward_slice<Cell, false>);
}

template <class Cell>
void run(const PerfkitRnnBackward& p) {
    each_slice(p, packed_transpose(p.w_hh, Cell::G * p.hidden, p.hidden), backward_slice<Cell>);
}

// 0; 1 if memory ran out, and 2 for a cell that is not known.
template <class P>
int run_cell(const P& p) {
    try {
        switch (p.cell) {
            case 0: run<Lstm>(p); return 0;
            case 1: run<Gru>(p); return 0;
            case 2: run<Rnn<false>>(p); return 0;
            case 3: run<Rnn<true>>(p); return 0;
        }
        return 2;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

extern "C" int perfkit_rnn_forward(const PerfkitRnn* p) { return run_cell(*p); }

extern "C" int perfkit_rnn_backward(const PerfkitRnnBackward* p) { return run_cell(*p); }

// The steps of one direction of one layer, for some of the rows.
#pragma once

#include <algorithm>

#include "cpu_inputs.hpp"

namespace {

template <class Cell>
class Line {
  public:
    const i64 number, layer, way, first, last;  // its direction, and the rows [first, last) of the batch
    std::atomic<i64> done{0};                   // steps, in the order in which they are computed

    Line(Stack<Cell>& stack, i64 number, i64 first, i64 last)
        : number(number), layer(number / stack.p.directions), way(number % stack.p.directions), first(first),
          last(last), stack_(stack), p_(stack.p), of_(stack.directions[number]), inputs_(stack, layer, first) {}

    // `below`: the lines of the same rows that it reads the outputs of; `beside`: they may run at the same time.
    void run(const Line* const* below, bool beside) {
        allocate(beside);
        const i64 T = p_.steps;
        for (i64 step = 0; step < T;) {
            i64 end = step + 1;
            if (!at_once_)
                for (i64 rows = there(step); end < T && (rows += there(end)) <= chunk_;) ++end;
            for (i64 i = 0; layer && i < p_.directions; ++i) {
                const i64 from = std::min(time(step), time(end - 1)), to = std::max(time(step), time(end - 1));
                const i64 steps = i ? T - from : to + 1;
                wait(stack_.failed, [&] { return below[i]->done.load(std::memory_order_acquire) >= steps; });
            }
            take_inputs(step, end);
            for (row_ = 0; step < end; done.store(++step, std::memory_order_release)) {
                one_step(step, there(step));
                row_ += at_once_ ? 0 : there(step);
            }
        }
    }

  private:
    static constexpr int G = Cell::G;
    static constexpr i64 VECTORS = G > 1 || L < PANEL ? 1 : 4;  // of units at a time: as many products as four gates have
    // Of a single row: there is more to compute at the same time, and the gates of two are no longer than those of one.
    static constexpr i64 OF_ONE_ROW = G > 1 && L == PANEL ? 2 : VECTORS;
    static constexpr i64 KEPT = Cell::GRU ? 4 : G * VECTORS, WIDTH = KEPT * L;
    // So many rows of input parts at a time: enough to reuse each weight, few enough to stay in the second-level cache.
    static constexpr i64 CHUNK = 64;
    static constexpr i64 FEW = 8;  // rows gain more from weights that are loaded for the input parts of several steps

    i64 time(i64 step) const { return way ? p_.steps - 1 - step : step; }
    i64 there(i64 step) const { return std::clamp<i64>(p_.batch_sizes[time(step)] - first, 0, last - first); }

    void allocate(bool beside) {
        rows_ = last - first, at_once_ = L == PANEL && rows_ >= FEW;
        const bool waits = beside && p_.layers > 1;
        chunk_ = rows_ * std::max<i64>(1, std::min(CHUNK / rows_, waits ? few_steps(p_.steps) : p_.steps));
        if (at_once_) chunk_ = rows_;
        h_stride_ = stack_.H_;
        inputs_.allocate(chunk_, of_.K, at_once_);
        h_scales_.allocate(rows_);
        const i64 several = VECTORS > 1 ? stack_.H / (VECTORS * PANEL) : 0, groups = several + vectors() - several * VECTORS;
        apart_ = G > 1 ? chunk_ * WIDTH : L;
        sums_.allocate(at_once_ ? 2 * ROWS * WIDTH : groups * chunk_ * WIDTH);
        for (auto& h : h_) h.allocate_zeros(rows_ * h_stride_);
        scratch_.allocate_zeros(rows_ * stack_.H_);
        if (Cell::CELLS) c_.allocate_zeros(stack_.H_ * rows_);
        if (Cell::GRU) state_.allocate_zeros(stack_.H_ * rows_);
        for (i64 b = 0; b < rows_; ++b) {
            const float* h = state(p_.h, b);
            if (Cell::CELLS) spread(c_, b, state(p_.c, b));
            if (Cell::GRU) spread(state_, b, h);
            h_scales_[b] = quantize(h, stack_.H, floor(), p_.h_fixed, &h_[0][b * h_stride_]);
            // Rows of a direction that runs backwards come when others are some steps on.
            std::memcpy(&h_[1][b * h_stride_], &h_[0][b * h_stride_], h_stride_ * sizeof(Activation));
        }
    }
    static constexpr float floor() { return Cell::BOUNDED ? 1.0f : 0.0f; }
    float* state(float* states, i64 b) const { return states + (number * p_.batch + first + b) * stack_.H; }

    // States lie by L units, (H_ / L, rows, L).
    float* own(const Array<float>& states, i64 u, i64 b) const { return &states[u * rows_ + b * L]; }
    void spread(const Array<float>& to, i64 b, const float* from) const {
        for (i64 u = 0; u < stack_.H; u += L)
            std::memcpy(own(to, u, b), from + u, std::min<i64>(L, stack_.H - u) * sizeof(float));
    }

    // The quantized inputs of steps [from, to), and their products unless each step computes its own.
    void take_inputs(i64 from, i64 to) {
        inputs_.begin();
        for (i64 step = from; step < to; ++step) {
            const bool more = step + 1 < p_.steps && there(step + 1) >= there(step);
            inputs_.take(time(step), there(step), !layer && more ? time(step + 1) : -1);
        }
        if (at_once_) return;
        each_group<VECTORS>(false, [&](auto vectors, i64 u, i64 group) INLINE_LAMBDA {
            constexpr int N = decltype(vectors)::value;
            in_blocks(inputs_.taken(), [&](auto count, i64 b) INLINE_LAMBDA {
                constexpr int R = decltype(count)::value;
                input_parts<R, N>(u, b, &sums_[(group * chunk_ + b) * WIDTH], [] {});
            });
        });
    }

    i64 vectors() const { return (stack_.H + L - 1) / L; }  // of units

    // Calls body(N, u, group), N a constant, for each group of units of all gates: MOST times PANEL, or L where these are
    // not left. `group`: where its sums are.
    template <int MOST, class Body>
    INLINE void each_group(bool backwards, Body body) {
        const i64 several = MOST > 1 ? stack_.H / (MOST * PANEL) : 0, groups = several + vectors() - several * MOST;
        for (i64 i = 0; i < groups; ++i) {
            const i64 number = backwards ? groups - 1 - i : i;
            if (MOST > 1 && number < several) {
                const i64 u = number * MOST * PANEL;
                body(std::integral_constant<int, G * MOST>{}, u, G > 1 ? u / L : number);
            } else {
                const i64 u = several * MOST * PANEL + (number - several) * L;
                body(std::integral_constant<int, G>{}, u, G > 1 ? u / L : number);
            }
        }
    }
    template <class Body>
    static INLINE void in_blocks(i64 rows, Body body) {
        i64 b = 0;
        for (; b + ROWS <= rows; b += ROWS) body(std::integral_constant<int, ROWS>{}, b);
        if constexpr (ROWS > 2)
            if (b + 2 <= rows) body(std::integral_constant<int, 2>{}, b), b += 2;
        if constexpr (ROWS > 1)
            if (b < rows) body(std::integral_constant<int, 1>{}, b);
    }

    i64 panel_width(i64 u) const { return stack_.H - u / PANEL * PANEL < PANEL ? stack_.H % PANEL : PANEL; }
    static const std::int8_t* weights_at(const std::int8_t* w, i64 u, i64 K4) {
        return w + u / PANEL * PANEL * G * 4 * K4 + u % PANEL * 4;
    }
    // Where the numbers of the n-th vector of a group begin.
    i64 channel(int n, i64 u) const { return u + n / G * PANEL + n % G * stack_.H_; }

    // Sums times their scales, plus what `begin` has for them, to `to`: of R rows from b on.
    template <int R, int N, class Begin, class Meanwhile>
    INLINE void parts(const Activation* q, i64 stride, const std::int8_t* w, i64 K4, const Array<std::int32_t>& start,
                      const Array<float>& scale, const Array<float>& common, const float* row_scales, bool all_alike,
                      i64 u, i64 b, float* to, Begin begin, Meanwhile meanwhile) {
        Ints sums[R][N];
        each<N>([&](auto n) INLINE_LAMBDA {
            const Ints first_sum = load<Ints>(&start[channel(n, u)]);
            each<R>([&](auto r) INLINE_LAMBDA { sums[r][n] = first_sum; });
        });
        dot<R, N>(q + b * stride, stride, weights_at(w, u, K4), panel_width(u), K4, sums, meanwhile);
        const auto scaled_by = [&](const Array<float>& scales, auto scale_of_row) INLINE_LAMBDA {
            each<N>([&](auto n) INLINE_LAMBDA {
                const Floats of_channels = load<Floats>(&scales[channel(n, u)]);
                each<R>([&](auto r) INLINE_LAMBDA {
                    const auto [place, addend] = begin(n, to + r * WIDTH);
                    store(place, fused(__builtin_convertvector(sums[r][n], Floats), scale_of_row(of_channels, r), addend));
                });
            });
        };
        if (all_alike)
            scaled_by(common, [](Floats scales, auto) INLINE_LAMBDA { return scales; });
        else
            scaled_by(scale, [&](Floats scales, auto r) INLINE_LAMBDA { return scales * row_scales[b + r]; });
    }
    struct Begun {
        float* place;
        Floats addend;
    };
    template <int R, int N, class Meanwhile>
    INLINE void input_parts(i64 u, i64 b, float* to, Meanwhile meanwhile) {
        const auto begin = [&](auto n, float* row) INLINE_LAMBDA {
            return Begun{row + (Cell::GRU && n == 2 ? 3 : int(n)) * L, load<Floats>(&of_.bias[channel(n, u)])};
        };
        parts<R, N>(inputs_.rows, inputs_.stride, of_.w_ih, of_.K4_x, of_.start_x, of_.scale_x, of_.common_x,
                    inputs_.scales.data(), inputs_.common, u, b, to, begin, meanwhile);
    }
    template <int R, int N, class Meanwhile>
    INLINE void hidden_parts(i64 u, i64 b, float* to, Meanwhile meanwhile) {
        const auto begin = [&](auto n, float* row) INLINE_LAMBDA {
            float* place = row + n / G * apart_ + n % G * L;
            return Begun{place, load<Floats>(Cell::GRU && n % G == 2 ? &of_.bias_hn[u + n / G * PANEL] : place)};
        };
        parts<R, N>(before_, h_stride_, of_.w_hh, of_.K4_h, of_.start_h, of_.scale_h, of_.common_h, h_scales_.data(),
                    common_h_, u, b, to, begin, meanwhile);
    }

    // Sums whose gates are still to be computed: meanwhile other products are, for which there are other instructions.
    struct Ready {
        const float* sums;  // of the next row
        i64 u, b, vectors;  // units, row, vectors of units of each row
        i64 left, at_a_time, v = 0;
    };
    INLINE void finish(i64 count) {
        for (; count > 0 && ready_.left > 0; --count, --ready_.left) {
            const i64 b = ready_.b, u = ready_.u + ready_.v * PANEL;
            const float* from = ready_.sums + ready_.v * apart_;
            if (++ready_.v == ready_.vectors) ready_.v = 0, ++ready_.b, ready_.sums += WIDTH;
            Floats a[Cell::GRU ? 4 : G], c{}, h{};
            for (int g = 0; g < (Cell::GRU ? 4 : G); ++g) a[g] = load<Floats>(from + g * L);
            if constexpr (Cell::CELLS) c = load<Floats>(own(c_, u, b));
            if constexpr (Cell::GRU) h = load<Floats>(own(state_, u, b));
            h = Cell::step(a, h, c);
            if constexpr (Cell::CELLS) store(own(c_, u, b), c);
            if constexpr (Cell::GRU) store(own(state_, u, b), h);
            store_some(out_ + b * out_row_ + u, h, stack_.H - u);
            if constexpr (Cell::BOUNDED)
                store(after_ + b * h_stride_ + u, h_inverse_ > 0 ? quantized(h, h_inverse_) : quantized(h));
        }
    }

    template <int R, int N>
    __attribute__((noinline)) void block(i64 u, i64 b, float* sums) {
        constexpr bool SIDE_BY_SIDE = L == PANEL;  // elsewhere registers have no room for it
        const auto meanwhile = [&]() INLINE_LAMBDA {
            if constexpr (SIDE_BY_SIDE) finish(ready_.at_a_time);
        };
        if (at_once_) input_parts<R, N>(u, b, sums, meanwhile);
        hidden_parts<R, N>(u, b, sums, meanwhile);
        if constexpr (SIDE_BY_SIDE) finish(ready_.left);
        constexpr i64 vectors = R * N / G;
        ready_ = {sums, u, b, N / G, vectors, (vectors + (at_once_ ? 3 : 1)) / (at_once_ ? 4 : 2)};
        if constexpr (!SIDE_BY_SIDE) finish(vectors);
    }

    void one_step(i64 step, i64 rows) {
        const i64 t = time(step), next = step + 1 < p_.steps ? there(step + 1) : 0, staying = std::min(next, rows);
        common_h_ = stack_.bounded;  // but for initial states
        for (i64 b = 0; b < rows; ++b) common_h_ = common_h_ && h_scales_[b] == of_.h_scale(p_);
        before_ = h_[step % 2].data(), after_ = h_[1 - step % 2].data();
        // Outputs in float32, where someone wants them: what all rows write over each other is not read.
        const bool top = layer == p_.layers - 1, read = !stack_.bounded || staying < rows;
        out_ = scratch_.data(), out_row_ = read ? stack_.H : 0;
        if (top) {
            out_ = p_.out + t * p_.out_step + (p_.starts[t] + first) * p_.out_row + way * stack_.H;
            out_row_ = p_.out_row;
        } else if (!stack_.bounded) {
            out_ = &stack_.between[layer % 2][(stack_.offsets[t] + first) * stack_.width + way * stack_.H];
            out_row_ = stack_.width;
        }
        i64 turn = 0;
        ready_ = {};
        // Weights that the first-level cache does not hold are read to and fro: what a step ended with is still in it.
        const auto sums_of = [&](i64 group, i64 b) {
            return &sums_[at_once_ ? turn++ % 2 * ROWS * WIDTH : (group * chunk_ + row_ + b) * WIDTH];
        };
        const bool backwards = !at_once_ && step % 2;
        if (OF_ONE_ROW > VECTORS && rows == 1 && !at_once_)
            each_group<OF_ONE_ROW>(backwards, [&](auto vectors, i64 u, i64 group) INLINE_LAMBDA {
                block<1, decltype(vectors)::value>(u, 0, sums_of(group, 0));
            });
        else
            each_group<VECTORS>(backwards, [&](auto vectors, i64 u, i64 group) INLINE_LAMBDA {
                in_blocks(rows, [&](auto count, i64 b) INLINE_LAMBDA {
                    block<decltype(count)::value, decltype(vectors)::value>(u, b, sums_of(group, b));
                });
            });
        finish(ready_.left);
        keep(t, rows, staying);
    }

    // What a step has left, for the next one, the layer above and the caller.
    void keep(i64 t, i64 rows, i64 staying) {
        for (i64 b = 0; b < rows; ++b) {
            Activation* q = after_ + b * h_stride_;
            if (stack_.bounded)
                scaled(q, stack_.H, h_scales_[b], of_.h_scale(p_));
            else
                h_scales_[b] = quantize(out_ + b * out_row_, stack_.H, floor(), p_.h_fixed, q);
            if (stack_.bounded && layer < p_.layers - 1)
                std::memcpy(&stack_.q_between[layer % 2][(stack_.offsets[t] + first + b) * stack_.q_stride + way * stack_.H],
                            q, stack_.H * sizeof(Activation));
        }
        for (i64 b = staying; b < rows; ++b) {
            std::memcpy(state(p_.h, b), out_ + b * out_row_, stack_.H * sizeof(float));
            for (i64 u = 0; Cell::CELLS && u < stack_.H; u += L)
                std::memcpy(state(p_.c, b) + u, own(c_, u, b), std::min<i64>(L, stack_.H - u) * sizeof(float));
        }
    }

    Stack<Cell>& stack_;
    const PerfkitRnnInt8& p_;
    const Direction<Cell>& of_;
    const float h_inverse_ = p_.h_fixed > 0 ? 1.0f / p_.h_fixed : 0.0f;
    Inputs<Cell> inputs_;
    i64 rows_, chunk_, h_stride_, row_;
    i64 apart_;                      // sums of two vectors of units of a group
    bool at_once_;                   // a step's input parts are computed with its hidden parts, else those of a chunk
    Array<Activation> h_[2];         // (rows, h_stride) before and after a step, by turns
    Array<float> h_scales_, sums_, scratch_, c_, state_;
    bool common_h_;                  // all rows have the scale that Direction's common scales have in them
    const Activation* before_;
    Activation* after_;
    float* out_;
    i64 out_row_;
    Ready ready_;
};

}  // namespace

// A stack of recurrent layers, backward through time; the weights' gradients but for the biases' are left to the binding.
#pragma once

#include "cpu_stack.hpp"

namespace perfkit {

template <class Cell, class Data, class Operand>
class Backward {
    static constexpr int G = Cell::G, S = Cell::S, V = 4;
    static constexpr bool E = EXACT<Data>;
    // So many rows of gate gradients are kept for the input's gradient, which reuses each weight on all of them.
    static constexpr i64 CHUNK = 64;

    // One direction of one layer.
    struct Direction {
        Matrix<Operand, 1, V> ih, hh;  // transposed
        i64 inputs;
        Rows<Data> d_x;  // data is null where nobody wants it
        Array<Data> own;  // what d_x is in where it is between layers, or where two directions are to be added
    };

  public:
    Backward(const PerfkitRnnBackward& call, bool tiles)
        : call_(call), p_(call.stack), order_(p_), H_(p_.hidden), HS_(round_up(H_, GRAIN<Operand>)),
          padded_(round_up(H_, L)), W_(p_.layers * p_.directions), tiles_(tiles && sizeof(Operand) < 4),
          plan_(p_, order_, G, false, 1), slices_(i64(plan_.cuts.size()) - 1), ways_(W_), lines_(W_ * slices_),
          bias_(W_ * slices_ * S * padded_) {
        for (i64 W = 0; W < W_; ++W) {
            Direction& way = ways_[W];
            const bool bottom = W < p_.directions;
            way.inputs = bottom ? p_.inputs : H_ * p_.directions;
            if (bottom && p_.directions == 1) {
                way.d_x = {static_cast<Data*>(call.d_x), call.d_x_step, call.d_x_row};
            } else if (!bottom || call.d_x) {
                way.own.allocate(order_.stored * way.inputs);
                way.d_x = {way.own.data(), order_.step * way.inputs, way.inputs};
            }
            way.hh.allocate(H_, G * HS_);
            if (way.d_x.data) way.ih.allocate(way.inputs, G * HS_);
        }
        // Lines of a layer before those of the layer below it, whose output's gradient they make.
        for (i64 i = 0; i < i64(lines_.size()); ++i) {
            const i64 W = W_ - 1 - i / slices_, slice = i % slices_;
            lines_[i].layer = W / p_.directions, lines_[i].way = W % p_.directions;
            lines_[i].first = plan_.cuts[slice], lines_[i].last = plan_.cuts[slice + 1];
        }
    }

    void run() {
        std::vector<std::pair<i64, i64>> panels;  // of which direction: those of hh, then those of ih
        for (i64 W = W_ - 1; W >= 0; --W)
            for (i64 i = 0; i < panels_of(H_) + (ways_[W].d_x.data ? panels_of(ways_[W].inputs) : 0); ++i)
                panels.emplace_back(W, i);
        const i64 packing = i64(panels.size()), tasks = packing + i64(lines_.size());
        const i64 adding = p_.directions == 2 && call_.d_x ? slices_ : 0;
        in_order(tasks + adding, plan_.threads, failed_, [&](i64 i) {
            if (i < packing) {
                pack_panel(panels[i].first, panels[i].second);
                packed_.fetch_add(1, std::memory_order_release);
            } else if (i < tasks) {
                wait(failed_, [&] { return packed_.load(std::memory_order_acquire) == packing; });
                const TileShape shape(tiles_);
                sequence(lines_[i - packing], i - packing);
            } else {
                add_directions(i - tasks);
            }
        });
        for (i64 i = 0; i < W_; ++i) {
            float* to = call_.d_bias + (W_ - 1 - i) * S * H_;
            for (i64 s = 0; s < S; ++s)
                for (i64 u = 0; u < H_; ++u) {
                    float sum = 0;
                    for (i64 slice = 0; slice < slices_; ++slice) sum += bias_of(i * slices_ + slice)[s * padded_ + u];
                    to[s * H_ + u] = sum;
                }
        }
    }

  private:
    static i64 panels_of(i64 units) { return (blocks_of(units) + V - 1) / V; }
    float* bias_of(i64 line) const { return &bias_[line * S * padded_]; }

    void pack_panel(i64 W, i64 i) {
        Direction& way = ways_[W];
        const void* const* w = p_.weights + 4 * W;
        if (i < panels_of(H_))
            pack_transpose(way.hh, i * V, static_cast<const Data*>(w[1]), H_, HS_, G, 0);
        else
            pack_transpose(way.ih, (i - panels_of(H_)) * V, static_cast<const Data*>(w[0]), H_, HS_, G, Cell::GRU ? 2 : 0);
    }

    // The gradient of an output: of y, or what the directions of the layer above have found.
    INLINE Floats d_out(const Line& line, i64 t, i64 place, i64 unit, i64 width) const {
        const i64 column = line.way * H_ + unit;
        if (line.layer == p_.layers - 1)
            return get(static_cast<const Data*>(call_.d_y) + t * call_.d_y_step + place * call_.d_y_row + column, width);
        const Direction* above = &ways_[(line.layer + 1) * p_.directions];
        Floats found = get(above[0].d_x.at(t, place) + column, width);
        if (p_.directions == 2) found += get(above[1].d_x.at(t, place) + column, width);
        return found;
    }

    void wait_above(const Line& line, i64 slice, i64 t) const {
        if (line.layer == p_.layers - 1) return;
        for (i64 way = 0; way < p_.directions; ++way) {
            const Line& above = lines_[(W_ - 1 - (line.layer + 1) * p_.directions - way) * slices_ + slice];
            const i64 steps = way ? t + 1 : p_.steps - t;
            wait(failed_, [&] { return above.done.load(std::memory_order_acquire) >= steps; });
        }
    }

    // Where the hidden state (of `rows`) before time t of the sorted row b is.
    template <class T>
    const T* before(const Line& line, const T* initial, const Rows<const T>& rows, i64 t, i64 b) const {
        const i64 earlier = line.way ? t + 1 : t - 1;
        if (earlier >= 0 && earlier < p_.steps && b < order_.sizes[earlier]) return rows.at(earlier, order_.place(earlier, b));
        if (!initial) return nullptr;
        return initial + ((line.layer * p_.directions + line.way) * p_.batch + order_.order[b]) * H_;
    }

    void sequence(Line& line, i64 index) {
        const i64 W = line.layer * p_.directions + line.way, T = p_.steps, rows = line.last - line.first;
        const Direction& way = ways_[W];
        const i64 width = H_ * p_.directions, chunk = std::max(round_up(rows, TILE), CHUNK), stride = S * HS_;
        const Rows<const Data> out =
            line.layer == p_.layers - 1
                ? Rows<const Data>{static_cast<const Data*>(p_.y) + line.way * H_, p_.y_step, p_.y_row}
                : Rows<const Data>{static_cast<const Data*>(p_.inner) + line.layer * order_.stored * width + line.way * H_,
                                   order_.step * width, width};
        const Rows<const float> cells{p_.cells + W * order_.stored * H_, order_.step * H_, H_};
        Array<float> d_h(rows * padded_), d_c(Cell::CELLS ? rows * padded_ : 0), c_before(padded_), bias(S * padded_);
        Array<Operand> gates;  // their gradients, (chunk, S, HS)
        gates.allocate_zeros(chunk * stride + L);
        std::memset(bias.data(), 0, S * padded_ * sizeof(float));
        const auto initial = [&](const Array<float>& to, const void* from) {
            for (i64 b = 0; b < rows; ++b)
                for (i64 u = 0; u < padded_; u += L) {
                    const auto* row = static_cast<const Data*>(from) + (W * p_.batch + order_.order[line.first + b]) * H_;
                    store(&to[b * padded_ + u], from && u < H_ ? get(row + u, H_ - u) : Floats{});
                }
        };
        initial(d_h, call_.d_hn);
        if (Cell::CELLS) initial(d_c, call_.d_cn);
        if (p_.ragged == 1) clear(line, W);
        std::vector<Data*> targets(chunk);
        i64 filled = 0;
        for (i64 step = 0; step < T; ++step) {
            const i64 t = line.way ? step : T - 1 - step, there = order_.there(t, line.first, line.last);
            wait_above(line, index % slices_, t);
            if (filled + there > chunk) flush(line, way, gates, stride, targets, filled, step);
            Operand* of_step = &gates[filled * stride];
            for (i64 b = 0; b < there; ++b) {
                const i64 place = order_.place(t, line.first + b), at = W * order_.stored + t * order_.step + place;
                if (way.d_x.data) targets[filled + b] = way.d_x.at(t, place);
                one_row(line, t, line.first + b, place, at, out, cells, &d_h[b * padded_],
                        Cell::CELLS ? &d_c[b * padded_] : nullptr, of_step + b * stride, bias.data());
            }
            // GRU: the hidden part takes the last three.
            const Operand* hidden = of_step + (Cell::GRU ? HS_ : 0);
            each_panel<1, V>(0, blocks_of(H_), [&](auto vectors, i64 block) INLINE_LAMBDA {
                constexpr int N = decltype(vectors)::value;
                float* to = &d_h[block * L];
                product<N>(way.hh.panel(block), way.hh.columns, hidden, stride, there, tiles_, to, padded_, to, padded_);
            });
            filled += there;
        }
        flush(line, way, gates, stride, targets, filled, T);
        const auto final = [&](void* to, const Array<float>& from) {
            for (i64 b = 0; b < rows; ++b)
                for (i64 u = 0; u < H_; u += L)
                    put(static_cast<Data*>(to) + (W * p_.batch + order_.order[line.first + b]) * H_ + u,
                        load<Floats>(&from[b * padded_ + u]), H_ - u);
        };
        final(call_.d_h0, d_h);
        if (Cell::CELLS) final(call_.d_c0, d_c);
        std::memcpy(bias_of(index), bias.data(), S * padded_ * sizeof(float));
    }

    // The gates' gradients of one row and step. d_h becomes the part of its gradient that goes past the weights.
    INLINE void one_row(const Line& line, i64 t, i64 b, i64 place, i64 at, const Rows<const Data>& out,
                        const Rows<const float>& cells, float* d_h, float* d_c, Operand* gates, float* bias) {
        const i64 W = line.layer * p_.directions + line.way;
        const Data* h_after = out.at(t, place);
        const Data* h_before = before(line, static_cast<const Data*>(p_.h0), out, t, b);
        const float* c_before = nullptr;
        const Data* c_initial = nullptr;
        if constexpr (Cell::CELLS) {
            c_before = before<float>(line, nullptr, cells, t, b);
            if (!c_before && p_.c0) c_initial = static_cast<const Data*>(p_.c0) + (W * p_.batch + order_.order[b]) * H_;
        }
        Data* previous = static_cast<Data*>(call_.previous) + at * H_;
        if (h_before)
            std::memcpy(static_cast<void*>(previous), h_before, H_ * sizeof(Data));
        else
            std::memset(static_cast<void*>(previous), 0, H_ * sizeof(Data));
        const Data* kept = static_cast<const Data*>(p_.gates) + at * S * H_;
        Data* d_gates = static_cast<Data*>(call_.d_gates) + at * S * H_;
        for (i64 u = 0; u < H_; u += L) {
            const i64 width = H_ - u;
            Floats saved[S], d[S], after{}, earlier{}, c{}, c_earlier{}, dc{};
            if constexpr (S > 1)
                for (int s = 0; s < S; ++s) saved[s] = get(kept + s * H_ + u, width);
            else
                after = get(h_after + u, width);
            if constexpr (Cell::GRU) earlier = get(previous + u, width);
            if constexpr (Cell::CELLS) {
                c = get(p_.cells + at * H_ + u, width), dc = load<Floats>(d_c + u);
                c_earlier = c_before ? get(c_before + u, width) : c_initial ? get(c_initial + u, width) : Floats{};
            }
            const Floats dh = load<Floats>(d_h + u) + d_out(line, t, place, u, width);
            store(d_h + u, Cell::template back<E>(saved, after, earlier, c_earlier, c, dh, dc, d));
            if constexpr (Cell::CELLS) store(d_c + u, dc);
            for (int s = 0; s < S; ++s) {
                put(gates + s * HS_ + u, d[s], width);
                put(d_gates + s * H_ + u, d[s], width);
                store(bias + s * padded_ + u, load<Floats>(bias + s * padded_ + u) + d[s]);
            }
        }
    }

    // The input's gradient of the rows that have gathered; `steps` are done then.
    void flush(Line& line, const Direction& way, const Array<Operand>& gates, i64 stride, const std::vector<Data*>& targets,
               i64& filled, i64 steps) {
        const float nothing[V * L] = {};
        const Array<float> found(filled * V * L);
        if (way.d_x.data)
            each_panel<1, V>(0, blocks_of(way.inputs), [&](auto vectors, i64 block) INLINE_LAMBDA {
                constexpr int N = decltype(vectors)::value;
                product<N>(way.ih.panel(block), way.ih.columns, gates.data(), stride, filled, tiles_, nothing, 0, found.data(),
                           N * L);
                for (i64 row = 0; row < filled; ++row)
                    for (int n = 0; n < N; ++n) {
                        const i64 unit = (block + n) * L;
                        put(targets[row] + unit, load<Floats>(&found[(row * N + n) * L]), way.inputs - unit);
                    }
            });
        filled = 0;
        line.done.store(steps, std::memory_order_release);
    }

    void clear(const Line& line, i64 W) {
        for (i64 t = 0; t < p_.steps; ++t)
            for (i64 b = std::max(order_.sizes[t], line.first); b < line.last; ++b) {
                const i64 place = order_.place(t, b), at = W * order_.stored + t * order_.step + place;
                std::memset(static_cast<void*>(static_cast<Data*>(call_.d_gates) + at * S * H_), 0, S * H_ * sizeof(Data));
                std::memset(static_cast<void*>(static_cast<Data*>(call_.previous) + at * H_), 0, H_ * sizeof(Data));
                Data* d_x = ways_[W].d_x.data ? ways_[W].d_x.at(t, place) : nullptr;
                if (d_x) std::memset(static_cast<void*>(d_x), 0, ways_[W].inputs * sizeof(Data));
            }
    }

    // Both directions' gradients of x, of the rows of a slice.
    void add_directions(i64 slice) {
        for (i64 way = 0; way < 2; ++way)
            wait(failed_, [&] { return lines_[(W_ - 1 - way) * slices_ + slice].done.load() >= p_.steps; });
        const i64 I = p_.inputs;
        const Rows<Data> d_x{static_cast<Data*>(call_.d_x), call_.d_x_step, call_.d_x_row};
        for (i64 t = 0; t < p_.steps; ++t)
            for (i64 b = plan_.cuts[slice]; b < plan_.cuts[slice + 1]; ++b) {
                if (p_.ragged == 2 && b >= order_.sizes[t]) break;
                const i64 place = order_.place(t, b);
                const Data *one = ways_[0].d_x.at(t, place), *two = ways_[1].d_x.at(t, place);
                for (i64 k = 0; k < I; k += L) put(d_x.at(t, place) + k, get(one + k, I - k) + get(two + k, I - k), I - k);
            }
    }

    const PerfkitRnnBackward& call_;
    const PerfkitRnn& p_;
    const Order order_;
    const i64 H_, HS_, padded_, W_;
    const bool tiles_;
    const Plan plan_;
    const i64 slices_;
    std::vector<Direction> ways_;
    std::vector<Line> lines_;
    Array<float> bias_;
    std::atomic<i64> packed_{0};
    std::atomic<bool> failed_{false};
};

}  // namespace perfkit

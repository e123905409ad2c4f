// A stack of recurrent layers, backward through time.
#pragma once

#include "cpu_stack.hpp"

namespace perfkit {

template <class Cell, class Data, class Operand>
class Backward {
    static constexpr int G = Cell::G, S = Cell::S, V = 4;
    static constexpr bool E = EXACT<Data>;
    // So many rows of gate gradients are gathered for the gradients of the input and of the weights, whose sums are
    // read and written once for all of them; more of them where those sums are larger than the second-level cache.
    static constexpr i64 CHUNK = 64, LARGE_CHUNK = 256, LARGE = 1 << 18;

    // One direction of one layer.
    struct Direction {
        Matrix<Operand, 1, V> ih, hh;  // transposed
        i64 inputs;
        Rows<Data> d_x;   // data is null where nobody wants it
        Array<Data> own;  // what d_x is in where it is between layers, or where two directions are to be added
    };

  public:
    Backward(const PerfkitRnnBackward& call, bool tiles)
        : call_(call), p_(call.stack), order_(p_), H_(p_.hidden), HS_(round_up(H_, GRAIN<Operand>)), stride_(S * HS_),
          padded_(round_up(H_, L)), W_(p_.layers * p_.directions), tiles_(tiles && sizeof(Operand) < 4),
          plan_(p_, order_, G, false, 1, TILE), slices_(i64(plan_.cuts.size()) - 1), ways_(W_), lines_(W_ * slices_),
          added_(W_) {
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
    }

  private:
    // The rows of some steps of a line: the gates' gradients, what they were made of and where the input's gradients
    // go; and the sums of all such rows.
    struct Gathered {
        i64 rows = 0, most, columns;
        std::vector<const Data*> x, h;  // null for zeros
        std::vector<Data*> d_x;
        Array<Operand> gates, transposed;  // (most, S, HS) and (S, HS, columns)
        Array<Operand> panel;              // of x or h: (columns, V, L)
        Array<float> found;                // gradients of x: (most, V, L)
        Array<float> ih, hh, bias;         // the weights' gradients: see `weights`; (S, padded)

        Gathered(const Backward& b, const Direction& way, i64 most_rows)
            : most(most_rows), columns(round_up(most, L * PAIR<Operand>)), x(most), h(most), d_x(most) {
            gates.allocate_zeros((most + TILE) * b.stride_ + L);  // a tile that begins in the last rows ends behind
            transposed.allocate_zeros((b.stride_ + TILE) * columns);
            panel.allocate(columns * V * L);
            found.allocate(most * V * L);
            ih.allocate_zeros(blocks_of(way.inputs) * L * G * b.HS_);
            hh.allocate_zeros(blocks_of(b.H_) * L * G * b.HS_);
            bias.allocate_zeros(S * b.padded_);
        }
    };

    static i64 panels_of(i64 units) { return (blocks_of(units) + V - 1) / V; }

    // The outputs of a layer, x below the first.
    Rows<const Data> output(i64 layer) const {
        const i64 width = H_ * p_.directions;
        if (layer < 0) return {static_cast<const Data*>(p_.x), p_.x_step, p_.x_row};
        if (layer == p_.layers - 1) return {static_cast<const Data*>(p_.y), p_.y_step, p_.y_row};
        return {static_cast<const Data*>(p_.inner) + layer * order_.stored * width, order_.step * width, width};
    }

    void pack_panel(i64 W, i64 i) {
        Direction& way = ways_[W];
        const void* const* w = p_.weights + 4 * W;
        if (i < panels_of(H_))
            pack_transpose(way.hh, i * V, static_cast<const Data*>(w[1]), H_, HS_, G, 0);
        else
            pack_transpose(way.ih, (i - panels_of(H_)) * V, static_cast<const Data*>(w[0]), H_, HS_, G,
                           Cell::GRU ? 2 : 0);
    }

    // The gradient of an output: of y, or what the directions of the layer above have found.
    INLINE Floats d_out(const Line& line, i64 t, i64 place, i64 unit, i64 width) const {
        const i64 column = line.way * H_ + unit;
        if (line.layer == p_.layers - 1) {
            const Rows<const Data> d_y{static_cast<const Data*>(call_.d_y), call_.d_y_step, call_.d_y_row};
            return get(d_y.at(t, place) + column, width);
        }
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
        if (earlier >= 0 && earlier < p_.steps && b < order_.sizes[earlier])
            return rows.at(earlier, order_.place(earlier, b));
        if (!initial) return nullptr;
        return initial + ((line.layer * p_.directions + line.way) * p_.batch + order_.order[b]) * H_;
    }

    void sequence(Line& line, i64 index) {
        const i64 W = line.layer * p_.directions + line.way, T = p_.steps, rows = line.last - line.first;
        const Direction& way = ways_[W];
        const Rows<const Data> below = output(line.layer - 1), of_layer = output(line.layer);
        const Rows<const Data> out{of_layer.data + line.way * H_, of_layer.step, of_layer.row};
        const Rows<const float> cells{p_.cells + W * order_.stored * H_, order_.step * H_, H_};
        Array<float> d_h(rows * padded_), d_c(Cell::CELLS ? rows * padded_ : 0);
        const i64 chunk = way.inputs * G * H_ > LARGE ? LARGE_CHUNK : CHUNK;
        Gathered gathered(*this, way, std::max(round_up(rows, TILE), chunk));
        const auto initial = [&](const Array<float>& to, const void* from) {
            for (i64 b = 0; b < rows; ++b)
                for (i64 u = 0; u < padded_; u += L) {
                    const i64 at = (W * p_.batch + order_.order[line.first + b]) * H_ + u;
                    store(&to[b * padded_ + u], from ? get(static_cast<const Data*>(from) + at, H_ - u) : Floats{});
                }
        };
        initial(d_h, call_.d_hn);
        if (Cell::CELLS) initial(d_c, call_.d_cn);
        if (p_.ragged == 1 && way.d_x.data) clear(line, W);
        for (i64 step = 0; step < T; ++step) {
            const i64 t = line.way ? step : T - 1 - step, there = order_.there(t, line.first, line.last);
            wait_above(line, index % slices_, t);
            if (gathered.rows + there > gathered.most) flush(line, way, gathered, step);
            Operand* of_step = &gathered.gates[gathered.rows * stride_];
            for (i64 b = 0; b < there; ++b) {
                const i64 place = order_.place(t, line.first + b), row = gathered.rows + b;
                gathered.d_x[row] = way.d_x.data ? way.d_x.at(t, place) : nullptr;
                gathered.x[row] = below.at(t, place);
                gathered.h[row] = before(line, static_cast<const Data*>(p_.h0), out, t, line.first + b);
                one_row(line, t, line.first + b, place, out, cells, gathered.h[row], &d_h[b * padded_],
                        Cell::CELLS ? &d_c[b * padded_] : nullptr, of_step + b * stride_, gathered.bias.data());
            }
            // GRU: the hidden part takes the last three.
            const Operand* hidden = of_step + (Cell::GRU ? HS_ : 0);
            each_panel<1, V>(H_, 0, blocks_of(H_), [&](auto vectors, i64 block) INLINE_LAMBDA {
                constexpr int N = decltype(vectors)::value;
                float* to = &d_h[block * L];
                product<N>({Factors<Operand>{hidden, stride_, way.hh.panel(block), way.hh.columns}}, there, tiles_, to,
                           padded_, to, padded_);
            });
            gathered.rows += there;
        }
        flush(line, way, gathered, T);
        const auto final = [&](void* to, const Array<float>& from) {
            for (i64 b = 0; b < rows; ++b)
                for (i64 u = 0; u < H_; u += L)
                    put(static_cast<Data*>(to) + (W * p_.batch + order_.order[line.first + b]) * H_ + u,
                        load<Floats>(&from[b * padded_ + u]), H_ - u);
        };
        final(call_.d_h0, d_h);
        if (Cell::CELLS) final(call_.d_c0, d_c);
        wait(failed_, [&] { return added_[W].load(std::memory_order_acquire) == index % slices_; });
        add_weights(W, way, gathered, index % slices_ == 0);
        added_[W].fetch_add(1, std::memory_order_release);
    }

    // The gates' gradients of one row and step. d_h becomes the part of its gradient that goes past the weights.
    INLINE void one_row(const Line& line, i64 t, i64 b, i64 place, const Rows<const Data>& out,
                        const Rows<const float>& cells, const Data* h_before, float* d_h, float* d_c, Operand* gates,
                        float* bias) {
        const i64 W = line.layer * p_.directions + line.way, at = W * order_.stored + t * order_.step + place;
        const Data* h_after = out.at(t, place);
        const float* c_before = nullptr;
        const Data* c_initial = nullptr;
        if constexpr (Cell::CELLS) {
            c_before = before<float>(line, nullptr, cells, t, b);
            if (!c_before && p_.c0) c_initial = static_cast<const Data*>(p_.c0) + (W * p_.batch + order_.order[b]) * H_;
        }
        const Data* kept = static_cast<const Data*>(p_.gates) + at * S * H_;
        for (i64 u = 0; u < H_; u += L) {
            const i64 width = H_ - u;
            Floats saved[S], d[S], after{}, earlier{}, c{}, c_earlier{}, dc{};
            if constexpr (S > 1)
                for (int s = 0; s < S; ++s) saved[s] = get(kept + s * H_ + u, width);
            else
                after = get(h_after + u, width);
            if constexpr (Cell::GRU) earlier = h_before ? get(h_before + u, width) : Floats{};
            if constexpr (Cell::CELLS) {
                c = get(p_.cells + at * H_ + u, width), dc = load<Floats>(d_c + u);
                c_earlier = c_before ? get(c_before + u, width) : c_initial ? get(c_initial + u, width) : Floats{};
            }
            const Floats dh = load<Floats>(d_h + u) + d_out(line, t, place, u, width);
            store(d_h + u, Cell::template back<E>(saved, after, earlier, c_earlier, c, dh, dc, d));
            if constexpr (Cell::CELLS) store(d_c + u, dc);
            for (int s = 0; s < S; ++s) {
                put(gates + s * HS_ + u, d[s], width);
                store(bias + s * padded_ + u, load<Floats>(bias + s * padded_ + u) + d[s]);
            }
        }
    }

    // The gradients of the input and the weights that follow from the rows that have gathered; `steps` are done then.
    void flush(Line& line, const Direction& way, Gathered& gathered, i64 steps) {
        if (way.d_x.data) {
            const float nothing[V * L] = {};
            each_panel<1, V>(way.inputs, 0, blocks_of(way.inputs), [&](auto vectors, i64 block) INLINE_LAMBDA {
                constexpr int N = decltype(vectors)::value;
                product<N>({Factors<Operand>{gathered.gates.data(), stride_, way.ih.panel(block), way.ih.columns}},
                           gathered.rows, tiles_, nothing, 0, gathered.found.data(), N * L);
                for (i64 row = 0; row < gathered.rows; ++row)
                    for (int n = 0; n < N; ++n) {
                        const i64 unit = (block + n) * L;
                        const Floats found = load<Floats>(&gathered.found[(row * N + n) * L]);
                        put(gathered.d_x[row] + unit, found, way.inputs - unit);
                    }
            });
            line.done.store(steps, std::memory_order_release);
        }
        transpose_rows(gathered.gates.data(), stride_, gathered.rows, S * HS_, gathered.transposed.data(),
                       gathered.columns);
        weights(gathered, gathered.x, way.inputs, 0, gathered.ih);
        weights(gathered, gathered.h, H_, Cell::GRU ? 1 : 0, gathered.hh);
        gathered.rows = 0;
    }

    // sums (panels, G, HS, V, L) += the gates' gradients, from `slot` on, times the rows that they were made of.
    void weights(const Gathered& gathered, const std::vector<const Data*>& rows, i64 units, i64 slot,
                 const Array<float>& sums) {
        const i64 columns = round_up(gathered.rows, L * PAIR<Operand>);
        each_panel<1, V>(units, 0, blocks_of(units), [&](auto vectors, i64 block) INLINE_LAMBDA {
            constexpr int N = decltype(vectors)::value;
            pack_columns<Operand, V>(gathered.panel.data(), block, units, columns,
                                     [&](i64 k) { return k < gathered.rows ? rows[k] : nullptr; });
            float* to = &sums[block * L * G * HS_];
            const Operand* gates = &gathered.transposed[slot * HS_ * gathered.columns];
            product<N>({Factors<Operand>{gates, gathered.columns, gathered.panel.data(), columns}}, G * HS_, tiles_, to,
                       N * L, to, N * L);
        });
    }

    // Adds a line's sums to the weights' gradients; the first of the lines writes them.
    void add_weights(i64 W, const Direction& way, const Gathered& gathered, bool write) {
        float* const* to = call_.d_weights + 4 * W;
        const auto add = [&](float* at, Floats value, i64 width) INLINE_LAMBDA {
            put(at, write ? value : value + get(at, width), width);
        };
        const auto matrix = [&](float* matrix, const Array<float>& sums, i64 units, int first_gate) {
            for (i64 block = 0; block < blocks_of(units); ++block) {
                const i64 panel = block / V * V, N = std::min<i64>(V, blocks_of(units) - panel), unit = block * L;
                for (int s = 0; s < G; ++s)
                    for (i64 h = 0; h < H_; ++h) {
                        const float* sum = &sums[(panel * G * HS_ + (s * HS_ + h) * N + block - panel) * L];
                        add(matrix + ((s + first_gate) % G * H_ + h) * units + unit, load<Floats>(sum), units - unit);
                    }
            }
        };
        matrix(to[0], gathered.ih, way.inputs, Cell::GRU ? 2 : 0);
        matrix(to[1], gathered.hh, H_, 0);
        for (int which = 2; which < 4; ++which)
            for (int s = 0; to[which] && s < G; ++s)
                for (i64 u = 0; u < H_; u += L) {
                    const i64 gate = Cell::GRU && which == 2 ? (s + 2) % G : s;
                    const i64 slot = Cell::GRU && which == 3 ? s + 1 : s;
                    add(to[which] + gate * H_ + u, load<Floats>(&gathered.bias[slot * padded_ + u]), H_ - u);
                }
    }

    void clear(const Line& line, i64 W) {
        for (i64 t = 0; t < p_.steps; ++t)
            for (i64 b = std::max(order_.sizes[t], line.first); b < line.last; ++b) {
                const i64 place = order_.place(t, b);
                std::memset(static_cast<void*>(ways_[W].d_x.at(t, place)), 0, ways_[W].inputs * sizeof(Data));
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
                for (i64 k = 0; k < I; k += L)
                    put(d_x.at(t, place) + k, get(one + k, I - k) + get(two + k, I - k), I - k);
            }
    }

    const PerfkitRnnBackward& call_;
    const PerfkitRnn& p_;
    const Order order_;
    const i64 H_, HS_, stride_, padded_, W_;
    const bool tiles_;
    const Plan plan_;
    const i64 slices_;
    std::vector<Direction> ways_;
    std::vector<Line> lines_;
    std::vector<std::atomic<i64>> added_;  // of each direction: the lines whose sums are in its weights' gradients
    std::atomic<i64> packed_{0};
    std::atomic<bool> failed_{false};
};

}  // namespace perfkit

// The steps of a layer, forward: sums of products, and the gates that are computed from them.
#pragma once

#include "cpu_stack.hpp"

namespace perfkit {

// One direction of one layer: its packed weights, and where it reads and writes.
template <class Cell, class Data, class Operand>
struct ForwardDirection {
    Matrix<Operand, Cell::G, Cell::PANEL> ih, hh;
    Array<float> bias;  // (blocks, KEPT, L), see Forward
    i64 inputs;
    Rows<const Data> x;
    Rows<Data> out;
};

template <class Cell, class Data, class Operand>
class ForwardSteps {
  protected:
    static constexpr int G = Cell::G, S = Cell::S, V = Cell::PANEL;
    static constexpr bool E = EXACT<Data>;
    // What a step adds to the gates' hidden parts, in vectors: G input parts with their biases; but GRU's n has its
    // hidden part's bias in the third place, and its input part in a fourth.
    static constexpr int KEPT = Cell::GRU ? 4 : G, WIDTH = V * KEPT * L;
    // Where the g-th of them begins in a block of so many units: those with weights as in a packed matrix.
    static constexpr i64 kept_at(int g, i64 units) { return g < G ? g * units : g * L; }
    // GRU needs its state in float32 too.
    static constexpr bool STATE = Cell::GRU && sizeof(Operand) < 4;
    // In tiles, whose sums take no more time than the gates that are computed meanwhile, both parts are one sum; GRU's
    // lie apart. So many rows at a time, and so many numbers of sums for each.
    static constexpr i64 AT_A_TIME = 2 * TILE, SUMS = Cell::GRU ? 2 * G * L : G * V * L;

    ForwardSteps(const PerfkitRnnForward& call, bool tiles)
        : call_(call), p_(call.stack), order_(p_), H_(p_.hidden), blocks_(blocks_of(H_)),
          panels_((blocks_ + V - 1) / V), tiles_(tiles && sizeof(Operand) < 4),
          plan_(p_, order_, G, true, panels_, tiles_ ? AT_A_TIME : TILE) {}

    // What a line works on.
    struct Space {
        i64 chunk, x_stride, h_stride;
        bool in_tiles;                  // all of its products
        bool at_once;                   // both parts of a step are one sum, without tiles
        std::vector<Array<Operand>> x;  // of each part: (chunk, x_stride)
        Array<float> sums;              // (panels, chunk, V, KEPT, L); in tiles, of each part: (2, AT_A_TIME, SUMS)
        Array<Operand> h[2];            // before and after a step, by turns: (rows, h_stride)
        Array<float> state, c;          // (blocks, rows, L)

        Space() = default;
        Space(const ForwardSteps& f, const Line& line, i64 parts, i64 rows_of_x) {
            allocate(f, line, parts, rows_of_x);
        }
        void allocate(const ForwardSteps& f, const Line& line, i64 parts, i64 rows_of_x) {
            const PerfkitRnn& p = f.p_;
            const i64 rows = line.last - line.first;
            in_tiles = f.tiles_ && rows >= TILE / 2;
            // Few rows gain more from weights that are loaded for the input parts of several steps.
            at_once = !Cell::GRU && !in_tiles && rows >= TILE;
            const i64 padded = round_up(rows, in_tiles ? AT_A_TIME : TILE);
            const i64 W = line.layer * p.directions + line.way;
            chunk = std::max(round_up(rows_of_x, TILE), padded);
            x_stride = f.ways_[W].ih.columns, h_stride = round_up(f.H_, std::max<i64>(L, GRAIN<Operand>));
            x.resize(parts);
            for (auto& of_part : x) of_part.allocate_zeros((chunk + in_tiles * AT_A_TIME) * x_stride);
            sums.allocate(in_tiles ? parts * 2 * AT_A_TIME * SUMS : f.panels_ * chunk * WIDTH);
            for (auto& states : h) states.allocate_zeros(padded * h_stride);
            if (STATE) state.allocate_zeros(f.blocks_ * rows * L);
            if (Cell::CELLS) c.allocate_zeros(f.blocks_ * rows * L);
            for (i64 b = 0; b < rows; ++b) {
                const i64 from = (W * p.batch + f.order_.order[line.first + b]) * f.H_;
                if (p.h0) {
                    const Data* h0 = static_cast<const Data*>(p.h0) + from;
                    for (auto& states : h) copy_row(&states[b * h_stride], h0, f.H_, f.H_);
                    if (STATE) f.spread_row(state, b, rows, h0);
                }
                if (Cell::CELLS && p.c0) f.spread_row(c, b, rows, static_cast<const Data*>(p.c0) + from);
            }
        }
    };

    void spread_row(const Array<float>& to, i64 b, i64 rows, const Data* from) const {
        for (i64 u = 0; u < H_; u += L) store(&to[(u / L * rows + b) * L], get(from + u, H_ - u));
    }

    std::pair<i64, i64> blocks_of_part(i64 part) const {
        const i64 parts = plan_.parts;
        return {panels_ * part / parts * V, std::min(blocks_, panels_ * (part + 1) / parts * V)};
    }

    // What the input's parts begin with.
    template <int N>
    void input_bias(const float* bias, i64 block, float* to) const {
        const i64 units = units_of(H_, block);
        std::memcpy(to, bias, N * L * sizeof(float));
        if constexpr (Cell::GRU) std::memcpy(to + kept_at(2, units), bias + 3 * L, units * sizeof(float));
    }

    // The input's parts of the gates of steps [first, last); only what they are made of where a step adds them up.
    void input_parts(const Line& line, const Space& space, i64 part, i64 first, i64 last) {
        const auto& way = ways_[line.layer * p_.directions + line.way];
        const Array<Operand>& x = space.x[part];
        i64 rows = 0;
        for (i64 step = first; step < last; ++step) {
            const i64 t = line.way ? p_.steps - 1 - step : step, there = order_.there(t, line.first, line.last);
            for (i64 b = 0; b < there; ++b, ++rows)
                copy_row(&x[rows * space.x_stride], way.x.at(t, order_.place(t, line.first + b)), way.inputs,
                         space.x_stride);
        }
        const auto [from, to] = blocks_of_part(part);
        if (space.in_tiles || space.at_once) return;
        each_panel<G, V>(H_, from, to, [&](auto vectors, i64 block) INLINE_LAMBDA {
            constexpr int N = decltype(vectors)::value;
            float* sums = &space.sums[block / V * space.chunk * WIDTH];
            const float* bias = &way.bias[block * KEPT * L];
            const i64 n = kept_at(2, units_of(H_, block));
            float of_input[N * L];
            input_bias<N>(bias, block, of_input);
            product<N>({Factors<Operand>{x.data(), space.x_stride, way.ih.panel(block), way.ih.columns}}, rows, tiles_,
                       of_input, 0, sums, WIDTH);
            if constexpr (Cell::GRU)
                for (float* row = sums; row < sums + rows * WIDTH; row += WIDTH)
                    store(row + 3 * L, load<Floats>(row + n)), store(row + n, load<Floats>(bias + n));
        });
    }

    // One block of units of row b: their states after the step, from `a`, what was added up for the gates.
    template <bool SAVE>
    INLINE void gates(const Line& line, const Space& space, i64 turn, i64 t, i64 staying, i64 block, i64 b,
                      const Floats* a) const {
        const i64 W = line.layer * p_.directions + line.way, rows = line.last - line.first;
        const i64 place = order_.place(t, line.first + b), at = W * order_.stored + t * order_.step + place;
        const i64 unit = block * L, width = H_ - unit, own = (block * rows + b) * L;
        const Array<Operand>&before = space.h[turn], &after = space.h[1 - turn];
        Floats c{}, h_before{}, saved[S];
        if constexpr (Cell::CELLS) c = load<Floats>(&space.c[own]);
        if constexpr (Cell::GRU)
            h_before = STATE ? load<Floats>(&space.state[own]) : get(&before[b * space.h_stride + unit]);
        const Floats h = Cell::template step<SAVE, E>(a, h_before, c, saved);
        if constexpr (Cell::CELLS) store(&space.c[own], c);
        if constexpr (STATE) store(&space.state[own], h);
        put(&after[b * space.h_stride + unit], h);
        if (ways_[W].out.data) put(ways_[W].out.at(t, place) + unit, h, width);
        if constexpr (SAVE && S > 1) {
            Data* gates = static_cast<Data*>(p_.gates) + at * S * H_ + unit;
            for (int s = 0; s < S; ++s) put(gates + s * H_, saved[s], width);
            if (Cell::CELLS) put(p_.cells + at * H_ + unit, c, width);
        }
        if (b >= staying) {
            const i64 state = (W * p_.batch + order_.order[line.first + b]) * H_ + unit;
            put(static_cast<Data*>(call_.hn) + state, h, width);
            if (Cell::CELLS && call_.cn) put(static_cast<Data*>(call_.cn) + state, c, width);
        }
    }

    // The rows [0, there) of the line at time t; `row` is where their input parts begin. The states of those from
    // `staying` on are final.
    template <bool SAVE>
    void one_step(const Line& line, const Space& space, i64 part, i64 turn, i64 t, i64 row, i64 there, i64 staying) {
        const auto& way = ways_[line.layer * p_.directions + line.way];
        const Array<Operand>& before = space.h[turn];
        const auto sums_of = [&](i64 panel) { return &space.sums[(panel / V * space.chunk + row) * WIDTH]; };
        const auto multiply = [&](auto vectors, i64 panel) INLINE_LAMBDA {
            constexpr int N = decltype(vectors)::value;
            float* sums = sums_of(panel);
            const Factors<Operand> hidden{before.data(), space.h_stride, way.hh.panel(panel), way.hh.columns};
            const Factors<Operand> input{&space.x[part][row * space.x_stride], space.x_stride, way.ih.panel(panel),
                                         way.ih.columns};
            if (space.at_once)
                product<N>({input, hidden}, there, tiles_, &way.bias[panel * KEPT * L], 0, sums, WIDTH);
            else
                product<N>({hidden}, there, tiles_, sums, WIDTH, sums, WIDTH);
        };
        const auto finish = [&](i64 block, i64 b) INLINE_LAMBDA {
            const i64 width = H_ - block * L;
            const float* from = sums_of(block) + b * WIDTH + block % V * KEPT * L;
            Floats a[KEPT];
            for (int g = 0; g < KEPT; ++g) a[g] = get(from + kept_at(g, std::min<i64>(L, width)), width);
            gates<SAVE>(line, space, turn, t, staying, block, b, a);
        };
        // Gates are long chains of operations: the processor needs some at a time to have something to do meanwhile.
        // With few rows those of all units come after all products.
        const auto [first, last] = blocks_of_part(part);
        const i64 group = there < 8 ? last - first : V;
        for (i64 from = first; from < last; from += group) {
            const i64 to = std::min(from + group, last);
            each_panel<G, V>(H_, from, to, multiply);
            for (i64 block = from; block < to; ++block)
                for (i64 b = 0; b < there; ++b) finish(block, b);
        }
    }

#if PERFKIT_TILES
    // The same in tiles: the sums of a panel with some rows, and meanwhile the gates of the sums before.
    template <bool SAVE>
    void step_in_tiles(const Line& line, const Space& space, i64 part, i64 turn, i64 t, i64 row, i64 there,
                       i64 staying) {
        const auto& way = ways_[line.layer * p_.directions + line.way];
        struct {
            const float* sums;
            i64 block, blocks, first, count, done;  // the blocks' units of rows from `first` on, and how many are done
        } ready{};
        const auto finish = [&](i64 count) __attribute__((noinline)) {
            for (const i64 to = std::min(ready.count, ready.done + count); ready.done < to; ++ready.done) {
                const i64 v = V > 1 ? ready.done % ready.blocks : 0, b = V > 1 ? ready.done / ready.blocks : ready.done;
                const i64 block = ready.block + v, width = H_ - block * L, units = std::min<i64>(L, width);
                const float* from = ready.sums + b * SUMS + v * L;
                Floats a[KEPT];
                for (int g = 0; g < G; ++g) a[g] = get(from + kept_at(g, units), width);
                if constexpr (Cell::GRU) {
                    const float* hidden = from + G * L;
                    a[0] += get(hidden, width), a[1] += get(hidden + kept_at(1, units), width);
                    a[3] = a[2], a[2] = get(hidden + kept_at(2, units), width);
                }
                gates<SAVE>(line, space, turn, t, staying, block, ready.first + b, a);
            }
        };
        float* sums = &space.sums[part * 2 * AT_A_TIME * SUMS];
        float* other = sums + AT_A_TIME * SUMS;
        const auto [first, last] = blocks_of_part(part);
        each_panel<G, V>(H_, first, last, [&](auto vectors, i64 block) INLINE_LAMBDA {
            constexpr int N = decltype(vectors)::value;
            const i64 steps = (way.ih.columns + way.hh.columns) / GRAIN<Operand> * (N > 2 ? 2 : 1);
            for (i64 b = 0; b < there; b += AT_A_TIME, std::swap(sums, other)) {
                const i64 rows = std::min(there - b, AT_A_TIME), each = (ready.count + steps - 1) / steps;
                const Factors<Operand> factors[2] = {
                    {&space.x[part][(row + b) * space.x_stride], space.x_stride, way.ih.panel(block), way.ih.columns},
                    {&space.h[turn][b * space.h_stride], space.h_stride, way.hh.panel(block), way.hh.columns}};
                const auto meanwhile = [&] { finish(each); };
                if (rows > TILE)
                    panel_sums<2, N>(way, block, factors, sums, meanwhile);
                else
                    panel_sums<1, N>(way, block, factors, sums, meanwhile);
                finish(ready.count);
                ready = {sums, block, V > 1 ? N : 1, b, rows * (V > 1 ? N : 1), 0};
            }
        });
        finish(ready.count);
    }

    // Of R tiles of rows: both parts and their biases; GRU's side by side, without the sum.
    template <int R, int N, class Way, class Meanwhile>
    INLINE void panel_sums(const Way& way, i64 block, const Factors<Operand> (&factors)[2], float* sums,
                           Meanwhile meanwhile) const {
        const float* bias = &way.bias[block * KEPT * L];
        if constexpr (Cell::GRU) {
            const i64 units = units_of(H_, block), n = kept_at(2, units);
            float of_input[N * L], of_hidden[N * L] = {};
            input_bias<N>(bias, block, of_input);
            std::memcpy(of_hidden + n, bias + n, units * sizeof(float));
            tile_sums<R, N>(factors, factors + 1, of_input, 0, sums, SUMS, meanwhile);
            tile_sums<R, N>(factors + 1, factors + 2, of_hidden, 0, sums + G * L, SUMS, meanwhile);
        } else {
            tile_sums<R, N>(factors, factors + 2, bias, 0, sums, SUMS, meanwhile);
        }
    }
#endif

    using Step = void (ForwardSteps::*)(const Line&, const Space&, i64, i64, i64, i64, i64, i64);
    Step step_of(const Space& space) const {
#if PERFKIT_TILES
        if constexpr (sizeof(Operand) < 4)
            if (space.in_tiles)
                return p_.gates ? &ForwardSteps::step_in_tiles<true> : &ForwardSteps::step_in_tiles<false>;
#endif
        return p_.gates ? &ForwardSteps::one_step<true> : &ForwardSteps::one_step<false>;
    }

    const PerfkitRnnForward& call_;
    const PerfkitRnn& p_;
    const Order order_;
    const i64 H_, blocks_, panels_;
    const bool tiles_;
    const Plan plan_;
    std::vector<ForwardDirection<Cell, Data, Operand>> ways_;
};

}  // namespace perfkit

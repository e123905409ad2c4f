// The gates of a layer's steps, forward: what a step works on, what it makes of the sums, and where that is written.
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
class ForwardGates {
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

    ForwardGates(const PerfkitRnnForward& call, bool tiles)
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
        i64 together;                   // rows that a vector of gates of the last block is of
        Array<float> state, c;          // (blocks, rows, L); of a last block of several rows together (rows, units)

        Space() = default;
        Space(const ForwardGates& f, const Line& line, i64 parts, i64 rows_of_x) {
            allocate(f, line, parts, rows_of_x);
        }
        void allocate(const ForwardGates& f, const Line& line, i64 parts, i64 rows_of_x) {
            const PerfkitRnn& p = f.p_;
            const i64 rows = line.last - line.first;
            in_tiles = f.tiles_ && rows >= TILE / 2;
            // Few rows gain more from weights that are loaded for the input parts of several steps.
            at_once = !Cell::GRU && !in_tiles && rows >= TILE;
            // A single row's vector is written whole, which the next step's products can read sooner.
            together = in_tiles || rows == 1 ? 1 : L / units_of(f.H_, f.blocks_ - 1);
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
                    if (STATE) f.spread_row(*this, state, b, rows, h0);
                }
                if (Cell::CELLS && p.c0) f.spread_row(*this, c, b, rows, static_cast<const Data*>(p.c0) + from);
            }
        }
    };

    void spread_row(const Space& space, const Array<float>& to, i64 b, i64 rows, const Data* from) const {
        for (i64 block = 0; block < blocks_; ++block) {
            const i64 units = units_of(H_, block);
            put(&to[own(space, block, b, rows)], get(from + block * L, units), units);
        }
    }

    // Where the states of row b's units begin.
    i64 own(const Space& space, i64 block, i64 b, i64 rows) const {
        return block * rows * L + b * (space.together > 1 ? units_of(H_, block) : L);
    }

    std::pair<i64, i64> blocks_of_part(i64 part) const {
        const i64 parts = plan_.parts;
        if (parts == 1) return {0, blocks_};  // each step asks, and a division takes longer than a short row's product
        return {panels_ * part / parts * V, std::min(blocks_, panels_ * (part + 1) / parts * V)};
    }

    // The states after the step of a block of units of N rows from b on, from `a`, what was added up for their gates;
    // the units are L, or the last ones of one row.
    template <bool SAVE, int N>
    INLINE void gates(const Line& line, const Space& space, i64 turn, i64 t, i64 block, i64 b,
                      const Several<N>* a) const {
        const i64 at = own(space, block, b, line.last - line.first), stride = space.h_stride;
        const Operand* before = &space.h[turn][b * stride + block * L];
        Operand* after = &space.h[1 - turn][b * stride + block * L];
        Several<N> c{}, h_before{}, saved[S];
        each<N>([&](auto n) INLINE_LAMBDA {
            if constexpr (Cell::CELLS) c.of[n] = load<Floats>(&space.c[at + n * L]);
            if constexpr (Cell::GRU)
                h_before.of[n] = STATE ? load<Floats>(&space.state[at + n * L]) : get(before + n * stride);
        });
        const Several<N> h = Cell::template step<SAVE, E>(a, h_before, c, saved);
        each<N>([&](auto n) INLINE_LAMBDA {
            if constexpr (Cell::CELLS) store(&space.c[at + n * L], c.of[n]);
            if constexpr (STATE) store(&space.state[at + n * L], h.of[n]);
            put(after + n * stride, h.of[n]);
            if constexpr (SAVE && S > 1) {
                const i64 row = stored(line, t, b + n);
                const i64 width = N > 1 ? L : H_ - block * L;
                Data* kept = static_cast<Data*>(p_.gates) + row * S * H_ + block * L;
                for (int s = 0; s < S; ++s) put(kept + s * H_, saved[s].of[n], width);
                if (Cell::CELLS) put(p_.cells + row * H_ + block * L, c.of[n], width);
            }
        });
    }

    // The same of a last block of few units, of which several rows, `count`, are one vector.
    template <bool SAVE>
    INLINE void gates_of_rest(const Line& line, const Space& space, i64 turn, i64 t, i64 block, i64 b, i64 count,
                              const Several<1>* a) const {
        const i64 units = H_ - block * L, lanes = count * units, at = own(space, block, b, line.last - line.first);
        const i64 stride = space.h_stride, first = b * stride + block * L;
        Several<1> c{}, h_before{}, saved[S];
        if constexpr (Cell::CELLS) c.of[0] = get(&space.c[at], lanes);
        if constexpr (STATE) h_before.of[0] = get(&space.state[at], lanes);
        if constexpr (Cell::GRU && !STATE)
            for (i64 row = 0; row < count; ++row)
                h_before.of[0] = get_lanes(h_before.of[0], &space.h[turn][first + row * stride], row * units, units);
        const Several<1> h = Cell::template step<SAVE, E>(a, h_before, c, saved);
        if constexpr (Cell::CELLS) put(&space.c[at], c.of[0], lanes);
        if constexpr (STATE) put(&space.state[at], h.of[0], lanes);
        for (i64 row = 0; row < count; ++row) {
            put_lanes(&space.h[1 - turn][first + row * stride], h.of[0], row * units, units);
            if constexpr (SAVE && S > 1) {
                const i64 place = stored(line, t, b + row);
                Data* kept = static_cast<Data*>(p_.gates) + place * S * H_ + block * L;
                for (int s = 0; s < S; ++s) put_lanes(kept + s * H_, saved[s].of[0], row * units, units);
                if (Cell::CELLS) put_lanes(p_.cells + place * H_ + block * L, c.of[0], row * units, units);
            }
        }
    }

    // Where what is kept of row b at time t is.
    i64 stored(const Line& line, i64 t, i64 b) const {
        const i64 W = line.layer * p_.directions + line.way;
        return W * order_.stored + t * order_.step + order_.place(t, line.first + b);
    }

    // The units of some blocks go where their readers look for them: outputs, and states of rows from `staying` on.
    void write(const Line& line, const Space& space, i64 turn, i64 t, i64 there, i64 staying, i64 first,
               i64 last) const {
        const i64 W = line.layer * p_.directions + line.way, rows = line.last - line.first;
        const i64 from = first * L, units = std::min(last * L, H_) - from;
        const auto& out = ways_[W].out;
        const Operand* h = &space.h[1 - turn][from];
        for (i64 b = 0; out.data && b < there; ++b)
            copy_row(out.at(t, order_.place(t, line.first + b)) + from, h + b * space.h_stride, units, units);
        for (i64 b = staying; b < there; ++b) {
            const i64 state = (W * p_.batch + order_.order[line.first + b]) * H_;
            copy_row(static_cast<Data*>(call_.hn) + state + from, h + b * space.h_stride, units, units);
            for (i64 block = first; Cell::CELLS && call_.cn && block < last; ++block) {
                const i64 width = units_of(H_, block);
                const Floats c = get(&space.c[own(space, block, b, rows)], width);
                put(static_cast<Data*>(call_.cn) + state + block * L, c, width);
            }
        }
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

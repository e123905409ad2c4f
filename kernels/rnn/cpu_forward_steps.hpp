// The steps of a layer, forward: sums of products, and the gates that are computed from them.
#pragma once

#include "cpu_forward_gates.hpp"

namespace perfkit {

template <class Cell, class Data, class Operand>
class ForwardSteps : protected ForwardGates<Cell, Data, Operand> {
  protected:
    using Base = ForwardGates<Cell, Data, Operand>;
    using typename Base::Space;
    using Base::G, Base::V, Base::KEPT, Base::WIDTH, Base::kept_at, Base::AT_A_TIME, Base::SUMS;
    using Base::p_, Base::order_, Base::H_, Base::blocks_, Base::tiles_, Base::ways_;
    using Base::blocks_of_part, Base::write;
    using Base::Base;
    static constexpr i64 FIRST_LEVEL = 32 << 10;  // bytes of that cache
    // So many vectors of gates are computed side by side: as the registers have room for.
    static constexpr int SIDE_BY_SIDE = REGISTERS / 8;

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
        const auto take = [&](auto from) {
            for (i64 step = first; step < last; ++step) {
                const i64 t = line.way ? p_.steps - 1 - step : step, there = order_.there(t, line.first, line.last);
                for (i64 b = 0; b < there; ++b, ++rows)
                    copy_row(&x[rows * space.x_stride], from.at(t, order_.place(t, line.first + b)), way.inputs,
                             space.x_stride);
            }
        };
        if (!line.layer && p_.dtype == 3)
            take(Rows<const Rounded>{static_cast<const Rounded*>(p_.x), p_.x_step, p_.x_row});
        else
            take(way.x);
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

    // The rows [0, there) of the line at time t; `row` is where their input parts begin. The states of those from
    // `staying` on are final.
    template <bool SAVE>
    void one_step(const Line& line, const Space& space, i64 part, i64 turn, i64 t, i64 row, i64 there, i64 staying) {
        const auto& way = ways_[line.layer * p_.directions + line.way];
        const Array<Operand>& before = space.h[turn];
        // Of both parts at once no other panel's sums are kept.
        const auto sums_of = [&](i64 block) {
            return &space.sums[(space.at_once ? part * space.chunk : block / V * space.chunk + row) * WIDTH];
        };
        const Operand* x = &space.x[part][row * space.x_stride];
        const auto multiply = [&](auto vectors, i64 panel) INLINE_LAMBDA {
            constexpr int N = decltype(vectors)::value;
            float* sums = sums_of(panel);
            using F = Factors<Operand>;
            const auto hidden = [&] { return F{before.data(), space.h_stride, way.hh.panel(panel), way.hh.columns}; };
            if (space.at_once)
                product<N>({F{x, space.x_stride, way.ih.panel(panel), way.ih.columns}, hidden()}, there, tiles_,
                           &way.bias[panel * KEPT * L], 0, sums, WIDTH);
            else
                product<N>({hidden()}, there, tiles_, sums, WIDTH, sums, WIDTH);
        };
        const auto finish = [&](auto side_by_side, i64 block, i64 b) INLINE_LAMBDA {
            constexpr int N = decltype(side_by_side)::value;
            const float* from = sums_of(block) + b * WIDTH + block % V * KEPT * L;
            const i64 width = N > 1 ? L : H_ - block * L, units = std::min<i64>(L, width);
            Several<N> a[KEPT];
            each<N>([&](auto n) INLINE_LAMBDA {
                for (int g = 0; g < KEPT; ++g) a[g].of[n] = get(from + n * WIDTH + kept_at(g, units), width);
            });
            this->template gates<SAVE, N>(line, space, turn, t, block, b, a);
        };
        const auto finish_rest = [&](i64 block, i64 b, i64 units, i64 count) INLINE_LAMBDA {
            const float* from = sums_of(block) + b * WIDTH + block % V * KEPT * L;
            Several<1> a[KEPT] = {};
            for (i64 row = 0; row < count; ++row)
                for (int g = 0; g < KEPT; ++g)
                    a[g].of[0] = get_lanes(a[g].of[0], from + row * WIDTH + kept_at(g, units), row * units, units);
            this->template gates_of_rest<SAVE>(line, space, turn, t, block, b, count, a);
        };
        // With few rows the gates of all units come after all products, for there to be some to compute meanwhile.
        const auto [first, last] = blocks_of_part(part);
        // Weights that the first-level cache does not hold are read to and fro: what a step ended with is still in it.
        const bool backwards = turn && blocks_ * G * L * way.hh.columns * i64(sizeof(Operand)) > FIRST_LEVEL;
        const bool all = there < 8 && !space.at_once;
        const i64 groups = all ? 1 : (last - first + V - 1) / V;
        for (i64 done = 0; done < groups; ++done) {
            const i64 from = first + (backwards ? groups - 1 - done : done) * V;
            const i64 to = all ? last : std::min(from + V, last);
            if (!backwards) each_panel<G, V>(H_, from, to, multiply);
            for (i64 end = to, panel; backwards && end > from; end = panel) {
                panel = from + (end - from - 1) / V * V;
                each_panel<G, V>(H_, panel, end, multiply);
            }
            for (i64 i = from; i < to; ++i) {
                const i64 block = backwards ? to - 1 - (i - from) : i, units = units_of(H_, block);
                i64 b = 0;
                for (; space.together > 1 && units < L && b < there; b += space.together)
                    finish_rest(block, b, units, std::min(space.together, there - b));
                for (; units == L && b + SIDE_BY_SIDE <= there; b += SIDE_BY_SIDE)
                    finish(std::integral_constant<int, SIDE_BY_SIDE>{}, block, b);
                for (; b < there; ++b) finish(std::integral_constant<int, 1>{}, block, b);
            }
        }
        write(line, space, turn, t, there, staying, first, last);
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
                Several<1> a[KEPT];
                for (int g = 0; g < G; ++g) a[g].of[0] = get(from + kept_at(g, units), width);
                if constexpr (Cell::GRU) {
                    const float* hidden = from + G * L;
                    const auto part = [&](int g) { return Several<1>{{get(hidden + kept_at(g, units), width)}}; };
                    a[0] = a[0] + part(0), a[1] = a[1] + part(1), a[3] = a[2], a[2] = part(2);
                }
                this->template gates<SAVE, 1>(line, space, turn, t, block, ready.first + b, a);
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
        write(line, space, turn, t, there, staying, first, last);
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
};

}  // namespace perfkit

// A stack of recurrent layers, forward.
#pragma once

#include "cpu_forward_steps.hpp"

namespace perfkit {

template <class Cell, class Data, class Operand>
class Forward : ForwardSteps<Cell, Data, Operand> {
    using Base = ForwardSteps<Cell, Data, Operand>;
    using typename Base::Space;
    using Base::G, Base::S, Base::V, Base::KEPT, Base::kept_at;
    using Base::call_, Base::p_, Base::order_, Base::H_, Base::blocks_, Base::panels_, Base::tiles_, Base::plan_;
    using Base::ways_;
    // So many rows of input parts at a time: enough to reuse each weight, few enough to stay in the second-level cache.
    static constexpr i64 CHUNK = 64;

  public:
    Forward(const PerfkitRnnForward& call, bool tiles)
        : Base(call, tiles), lines_of_slice_(p_.layers * p_.directions) {
        ways_.resize(lines_of_slice_);
        const i64 width = H_ * p_.directions;
        if (!p_.inner && p_.layers > 1 && (p_.directions == 2 || !p_.y)) between_.allocate(order_.stored * width);
        for (i64 i = 0; i < lines_of_slice_; ++i) {
            auto& way = ways_[i];
            const i64 layer = i / p_.directions;
            way.inputs = layer ? width : p_.inputs;
            const Rows<Data> below = output(layer - 1);
            way.x = layer ? Rows<const Data>{below.data, below.step, below.row}
                          : Rows<const Data>{static_cast<const Data*>(p_.x), p_.x_step, p_.x_row};
            way.out = output(layer);
            if (way.out.data) way.out.data += i % p_.directions * H_;
            way.ih.allocate(H_, round_up(way.inputs, GRAIN<Operand>));
            way.hh.allocate(H_, round_up(H_, GRAIN<Operand>));
            way.bias.allocate_zeros(blocks_ * KEPT * L);
        }
        // Lines of a layer before those of the next: what a line waits for has been begun before it.
        const i64 slices = i64(plan_.cuts.size()) - 1;
        lines_ = std::vector<Shared>(lines_of_slice_ * slices);
        for (i64 i = 0; i < i64(lines_.size()); ++i) {
            const i64 way = i / slices, slice = i % slices;
            lines_[i].layer = way / p_.directions, lines_[i].way = way % p_.directions;
            lines_[i].first = plan_.cuts[slice], lines_[i].last = plan_.cuts[slice + 1];
            if (plan_.parts > 1) lines_[i].prepare(*this, plan_.parts);
        }
    }

    void run() {
        if (p_.gates) {
            ask_for_large_pages(p_.gates, lines_of_slice_ * order_.stored * S * H_ * i64(sizeof(Data)));
            ask_for_large_pages(p_.cells, Cell::CELLS ? lines_of_slice_ * order_.stored * H_ * i64(sizeof(float)) : 0);
        }
        const i64 packing = 2 * lines_of_slice_ * panels_, tasks = i64(lines_.size()) * plan_.parts;
        in_order(packing + tasks, plan_.threads, failed_, [&](i64 i) {
            if (i < packing) {
                pack_panel(i);
                packed_.fetch_add(1, std::memory_order_release);
                return;
            }
            wait(failed_, [&] { return packed_.load(std::memory_order_acquire) == packing; });
            const TileShape shape(tiles_);
            Shared& line = lines_[(i - packing) / plan_.parts];
            if (plan_.parts > 1) return sequence(line, line.space, (i - packing) % plan_.parts);
            Space space(*this, line, 1, chunk_of(line));
            sequence(line, space, 0);
        });
    }

  private:
    // A line whose units several threads share. Each has its part of them, in every phase: the input parts of some
    // steps, or one step; it takes those of others too if they were not seen the last time, or are late.
    struct Shared : Line {
        Space space;
        i64 parts = 1;
        std::unique_ptr<std::atomic<i64>[]> claimed, taker;  // of each part: the phases claimed; who did the last
        std::atomic<i64> finished{0};                        // parts of all phases

        void prepare(const Forward& f, i64 count) {
            parts = count, space.allocate(f, *this, count, f.chunk_of(*this));
            claimed = std::make_unique<std::atomic<i64>[]>(count);
            taker = std::make_unique<std::atomic<i64>[]>(count);
            for (i64 part = 0; part < count; ++part) claimed[part] = 0, taker[part] = part;
        }
        template <class Work>
        void phase(i64 number, i64 mine, const std::atomic<bool>& failed, Work work) {
            if (parts == 1) return work(0);
            const auto take = [&](i64 part) {
                i64 expected = number;
                if (!claimed[part].compare_exchange_strong(expected, number + 1)) return;
                taker[part].store(mine, std::memory_order_relaxed);
                work(part);
                finished.fetch_add(1, std::memory_order_release);
            };
            take(mine);
            for (i64 part = 0; part < parts; ++part)
                if (part != mine && taker[part].load(std::memory_order_relaxed) != part) take(part);
            int looks = 0;
            wait(failed, [&] {
                if (finished.load(std::memory_order_acquire) >= (number + 1) * parts) return true;
                if (++looks % 2000 == 0)
                    for (i64 part = 0; part < parts; ++part) take(part);
                return false;
            });
        }
    };

    // Where a layer's outputs go. If nobody wants those between layers they are in y for a while: a layer reads what
    // the one below has left of some steps before it writes over them. With two directions it does not: layers take
    // turns.
    Rows<Data> output(i64 layer) const {
        const i64 width = H_ * p_.directions;
        const Rows<Data> y{static_cast<Data*>(p_.y), p_.y_step, p_.y_row};
        if (layer == p_.layers - 1) return y;
        if (p_.inner)
            return {static_cast<Data*>(p_.inner) + layer * order_.stored * width, order_.step * width, width};
        if (y.data && (p_.directions == 1 || (p_.layers - layer) % 2)) return y;
        return {between_.data(), order_.step * width, width};
    }
    i64 chunk_of(const Line& line) const {
        const i64 rows = line.last - line.first;
        const bool waits = plan_.beside && p_.layers > 1;
        return std::max(rows, std::min(CHUNK, rows * (waits ? few_steps(p_.steps) : p_.steps)));
    }
    void pack_panel(i64 i) {
        const i64 W = i / (2 * panels_), block = i % panels_ * V, last = std::min(block + V, blocks_);
        if constexpr (sizeof(Data) < sizeof(float))
            if (p_.dtype > 1) return pack_panel<Rounded>(W, block, last, i / panels_ % 2);
        pack_panel<Data>(W, block, last, i / panels_ % 2);
    }
    template <class Weight>
    void pack_panel(i64 W, i64 block, i64 last, bool hidden) {
        auto& way = ways_[W];
        const void* const* w = p_.weights + 4 * W;
        if (hidden) return pack(way.hh, block, static_cast<const Weight*>(w[1]), H_);
        pack(way.ih, block, static_cast<const Weight*>(w[0]), way.inputs);
        if (!w[2]) return;
        for (i64 at = block; at < last; ++at)
            for (int g = 0; g < G; ++g) {
                const auto bias = [&](int which) {
                    return get(static_cast<const Weight*>(w[which]) + g * H_ + at * L, H_ - at * L);
                };
                float* to = &way.bias[at * KEPT * L + kept_at(g, units_of(H_, at))];
                if (Cell::GRU && g == 2)
                    store(to, bias(3)), store(&way.bias[(at * KEPT + 3) * L], bias(2));
                else
                    store(to, bias(2) + bias(3));
            }
    }

    // A line through all steps; `mine` is this thread's part of it.
    void sequence(Shared& line, Space& space, i64 mine) {
        const i64 T = p_.steps, W = line.layer * p_.directions + line.way, chunk = chunk_of(line);
        if (mine == 0 && p_.ragged == 1 && ways_[W].out.data) clear(line, ways_[W].out);
        i64 phase = 0;
        const auto time = [&](i64 step) { return line.way ? T - 1 - step : step; };
        for (i64 step = 0; step < T;) {
            i64 end = step, rows = 0;
            for (; end < T; ++end) {
                const i64 there = order_.there(time(end), line.first, line.last);
                if (rows + there > space.chunk) break;
                if (plan_.beside && rows >= chunk) break;
                rows += there;
            }
            if (line.layer) wait_below(line, std::min(time(step), time(end - 1)), std::max(time(step), time(end - 1)));
            line.phase(phase++, mine, failed_, [&](i64 part) { this->input_parts(line, space, part, step, end); });
            for (i64 row = 0; step < end; ++step) {
                const i64 t = time(step), there = order_.there(t, line.first, line.last);
                const i64 staying = step + 1 < T ? order_.there(time(step + 1), line.first, line.last) : 0;
                const auto one_step = this->step_of(space);
                line.phase(phase++, mine, failed_, [&](i64 part) {
                    (this->*one_step)(line, space, part, step % 2, t, row, there, std::min(staying, there));
                });
                row += there;
                advance(line, step + 1);
            }
        }
    }

    // Others may be a step ahead already.
    void advance(Line& line, i64 steps) {
        for (i64 done = line.done.load(); done < steps && !line.done.compare_exchange_weak(done, steps);) {
        }
    }

    // Until the layer below has its outputs of times [first, last].
    void wait_below(const Shared& line, i64 first, i64 last) {
        const i64 slices = i64(lines_.size()) / lines_of_slice_, slice = (&line - lines_.data()) % slices;
        for (i64 way = 0; way < p_.directions; ++way) {
            const Line& below = lines_[((line.layer - 1) * p_.directions + way) * slices + slice];
            const i64 steps = way ? p_.steps - first : last + 1;
            wait(failed_, [&] { return below.done.load(std::memory_order_acquire) >= steps; });
        }
    }

    void clear(const Line& line, const Rows<Data>& out) {
        for (i64 t = 0; t < p_.steps; ++t)
            for (i64 b = std::max(order_.sizes[t], line.first); b < line.last; ++b)
                std::memset(static_cast<void*>(out.at(t, order_.place(t, b))), 0, H_ * sizeof(Data));
    }

    const i64 lines_of_slice_;
    std::vector<Shared> lines_;
    Array<Data> between_;
    std::atomic<i64> packed_{0};
    std::atomic<bool> failed_{false};
};

}  // namespace perfkit

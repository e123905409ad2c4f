// act(x_scale w_scale (q_x - zero) q_wᵀ + bias) of x on a known grid, to which it is rounded here unless it is on it.
//
// Letters: M rows of x, N outputs, K inputs; see _bytes.hpp.
#include "cpu_problem.hpp"

#include "_bytes.hpp"

namespace {

constexpr i64 WORTH = 1 << 20;  // multiply-adds that are worth waking a thread for
constexpr i64 ALL = 64;         // rows that each thread may read all of
constexpr i64 MOST = 96;        // rows that are taken through all outputs at a time

struct Pass {
    const PerfkitLinearInt8Static& p;
    const i64 K4;
    const i8* weights;
    const Finish& shared;

    // Rows `first` to `last`, which lie from x on, with outputs `from` to `to`; `from` begins a panel.
    void run(const u8* x, i64 stride, i64 first, i64 last, i64 from, i64 to) const {
        for (i64 n = from; n < to;) {
            const i64 left = (to - n + L - 1) / L;
            if (last - first == 1) {
                counted<MANY>(left, [&](auto vectors) { tile<1, decltype(vectors)::value>(x, stride, first, n, to); });
                n += std::min<i64>(left, MANY) * L;
                continue;
            }
            for (i64 m = first; m < last; m += ROWS)
                counted<VECTORS>(left, [&](auto vectors) {
                    counted<ROWS>(last - m, [&](auto rows) {
                        tile<decltype(rows)::value, decltype(vectors)::value>(x + (m - first) * stride, stride, m, n, to);
                    });
                });
            n += std::min<i64>(left, VECTORS) * L;
        }
    }

  private:
    template <int R, int G>
    void tile(const u8* x, i64 stride, i64 row, i64 n, i64 to) const {
        Ints sums[R][G];
        begin(shared.begin + n, sums);
        const u8* rows[R];
        for (int r = 0; r < R; ++r) rows[r] = x + r * stride;
        add_dots<R, G>(rows, weights + n / PANEL * K4 * BLOCK, K4, K4, sums);
        const Finish finish = shared;  // of its own: what is written might be it, for all compilers know
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g)
                finish.put((row + r) * p.outputs + n + g * L, finish.across(sums[r][g], n + g * L), to - n - g * L);
    }
};

// The grid from the least number of x, or 0, to its largest, or 0, as torch's `choose_qparams` has it, into `p`. False
// where x holds what is no number, or none that is finite.
bool read_grid(PerfkitLinearInt8Static& p, const float* x, Threads threads) {
    constexpr i64 EACH = 1 << 16;
    const i64 count = p.rows * p.inputs, pieces = (count + EACH - 1) / EACH;
    const std::unique_ptr<float[]> found(new float[3 * pieces]);
    parallel(pieces, threads, threads.count, [&](i64 piece) {
        Floats low{}, high{}, spoilt{};
        const auto look = [&](Floats value) INLINE_LAMBDA {
            low = at_most(low, value), high = at_least(high, value), spoilt += value * 0.0f;
        };
        i64 i = piece * EACH;
        const i64 end = std::min(i + EACH, count);
        for (; i + L <= end; i += L) look(load<Floats>(x + i));
        if (i < end) look(load_part(x + i, end - i));
        float* const to = &found[3 * piece];
        to[0] = low[0], to[1] = high[0], to[2] = spoilt[0];
        for (int lane = 1; lane < L; ++lane)
            to[0] = std::min(to[0], low[lane]), to[1] = std::max(to[1], high[lane]), to[2] += spoilt[lane];
    });
    float low = 0, high = 0, spoilt = 0;
    for (i64 i = 0; i < pieces; ++i)
        low = std::min(low, found[3 * i]), high = std::max(high, found[3 * i + 1]), spoilt += found[3 * i + 2];
    if (!(spoilt == 0)) return false;
    const float scale = std::max((high - low) / float(p.top), std::numeric_limits<float>::epsilon());
    if (!(scale <= std::numeric_limits<float>::max())) return false;
    p.scale = scale, p.zero = std::clamp<i64>(-i64(std::nearbyint(low / scale)), 0, p.top);
    return true;
}

Packed packed(i64 outputs, i64 inputs, void* at) {
    return {outputs, round_up(outputs, PANEL) * round_up(inputs, 4), at};
}

}  // namespace

extern "C" std::int64_t perfkit_linear_int8_static_packed_bytes(std::int64_t outputs, std::int64_t inputs) {
    return Packed::size(outputs, packed(outputs, inputs, nullptr).bytes);
}

// weight: (N, K), scale: (N,), dense. Returns whether all scales are positive and finite.
extern "C" int perfkit_linear_int8_static_pack(std::int64_t outputs, std::int64_t inputs, const std::int8_t* weight,
                                        const float* scale, void* to) {
    const Packed found = packed(outputs, inputs, to);
    std::memset(found.weights(), 0, found.bytes);
    const i64 K4 = (inputs + 3) / 4;
    for (i64 n = 0; n < outputs; ++n) {
        i8* at = found.weights() + n / PANEL * K4 * BLOCK + n % PANEL * 4;
        for (i64 k = 0; k < inputs; ++k) at[k / 4 * BLOCK + k % 4] = weight[n * inputs + k];
    }
    return found.tell(outputs, inputs, scale, [&](i64 n, i64 k) { return weight[n * inputs + k]; });
}

// bias may be null. Returns 1 where memory is short, 2 where x has no range to read, else 0.
extern "C" int perfkit_linear_int8_static(const PerfkitLinearInt8Static* told, const void* x, void* weight, const float* bias, void* y,
                                   perfkit::Threads threads) try {
    PerfkitLinearInt8Static own_problem = *told;
    const PerfkitLinearInt8Static* const p = &own_problem;
    if (p->scale == 0 && !p->in_jax && !read_grid(own_problem, static_cast<const float*>(x), threads)) return 2;
    const Packed given = packed(p->outputs, p->inputs, weight);
    const PerOutput numbers(given, p->outputs, bias, p->zero);
    const bool in_jax = p->in_jax;
    const Grid grid(p->scale, p->zero, p->top, in_jax), y_grid(p->y_scale, p->y_zero, p->y_top, in_jax);
    const Finish finish{
        in_jax ? 1.0f : float(p->scale), p->relu ? 0.0f : -std::numeric_limits<float>::infinity(), given.scales(),
        numbers.biases.get(), numbers.begin.get(), p->y_kind, y_grid, y};
    const i64 M = p->rows, K = p->inputs, K4 = (K + 3) / 4;
    const Pass pass{*p, K4, given.weights(), finish};
    const bool ready = p->x_kind == UINT8 && K % 4 == 0;
    const i64 stride = ready ? K : round_up(4 * K4, 64);
    const auto rounded = [&](i64 first, i64 last, u8* to) {  // where the rows lie as they are read
        if (ready) return static_cast<const u8*>(x) + first * K;
        for (i64 m = first; m < last; ++m, to += stride) {
            to[4 * K4 - 1] = to[4 * K4 - 2] = to[4 * K4 - 3] = 0;
            if (p->x_kind == UINT8)
                std::memcpy(to, static_cast<const u8*>(x) + m * K, K);
            else
                grid.row(static_cast<const float*>(x) + m * K, K, to);
        }
        return static_cast<const u8*>(to - (last - first) * stride);
    };
    const i64 useful = std::min(threads.count, M * p->outputs * K / WORTH + 1), panels = given.N / PANEL;
    // by outputs where there are few rows, and fewer than those, so that each thread reads a part of the weights only
    if (M <= std::max<i64>(2 * ROWS, std::min(p->outputs, ALL))) {
        const i64 across = std::min(useful, panels);
        const Lines<u8> own = lines<u8>(ready ? 0 : M * stride);
        const u8* const from = rounded(0, M, own.get());
        parallel(across, threads, useful, [&](i64 s) {
            const i64 begin = panels * s / across * PANEL, end = panels * (s + 1) / across * PANEL;
            pass.run(from, stride, 0, M, begin, std::min(end, p->outputs));
        });
        return 0;
    }
    const i64 down = std::max(useful > 1 ? 2 * useful : 1, (M + MOST - 1) / MOST);
    const i64 each = round_up((M + down - 1) / down, ROWS);
    const Lines<u8> own = lines<u8>(ready ? 0 : round_up(M, each) * stride);
    parallel((M + each - 1) / each, threads, useful, [&](i64 s) {
        const i64 first = s * each, last = std::min(first + each, M);
        pass.run(rounded(first, last, own.get() + (ready ? 0 : first * stride)), stride, first, last, 0, p->outputs);
    });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

extern "C" const char* perfkit_linear_int8_static_instructions() { return instructions(); }

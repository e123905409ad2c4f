// The kernel of cpu_kernel.cpp as a custom call of XLA's: one direction of one layer, its scales numbers of the program.
#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>
#include <vector>

#include "cpu_problem.hpp"

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;
using Lengths = ffi::Buffer<ffi::S32>;

decltype(&perfkit_rnn_int8) run;

const float* floats(const In& buffer) { return static_cast<const float*>(buffer.untyped_data()); }
float* floats(Out& buffer) { return static_cast<float*>(buffer->untyped_data()); }

// The rows of a call sorted by their lengths, longest first, one step after the other and nothing between.
class Packed {
  public:
    Packed(PerfkitRnnInt8& call, const Lengths& lengths) : call_(call), order_(call.batch), sizes_(call.steps) {
        const std::int32_t* length = lengths.typed_data();
        std::iota(order_.begin(), order_.end(), 0);
        std::stable_sort(order_.begin(), order_.end(), [&](auto a, auto b) { return length[a] > length[b]; });
        std::int64_t rows = call.batch, all = 0;
        for (std::int64_t t = 0; t < call.steps; ++t) {
            while (rows > 0 && length[order_[rows - 1]] <= t) --rows;
            sizes_[t] = rows, starts_.push_back(all), all += rows;
        }
        x_.resize(all * call.inputs), out_.resize(all * call.hidden);
        for_each([&](std::int64_t t, std::int64_t b, std::int64_t at) {
            const float* from = call_.x + t * call_.x_step + b * call_.x_row;
            std::copy(from, from + call_.inputs, &x_[at * call_.inputs]);
        });
    }
    // The same call on them.
    PerfkitRnnInt8 call() const {
        PerfkitRnnInt8 packed = call_;
        packed.batch_sizes = sizes_.data(), packed.starts = starts_.data();
        packed.x = x_.data(), packed.x_step = 0, packed.x_row = call_.inputs;
        packed.out = const_cast<float*>(out_.data()), packed.out_step = 0, packed.out_row = call_.hidden;
        return packed;
    }
    // States, (B, width), sorted or, `back`, as they were.
    void sort(float* states, std::int64_t width, bool back) const {
        const std::vector<float> were(states, states + call_.batch * width);
        for (std::int64_t b = 0; b < call_.batch; ++b) {
            const std::int64_t from = back ? b : order_[b], to = back ? order_[b] : b;
            std::copy_n(&were[from * width], width, states + to * width);
        }
    }
    // The outputs where they belong, and zeros behind them.
    void spread() const {
        std::fill_n(call_.out, call_.steps * call_.out_step, 0.0f);
        for_each([&](std::int64_t t, std::int64_t b, std::int64_t at) {
            std::copy_n(&out_[at * call_.hidden], call_.hidden, call_.out + t * call_.out_step + b * call_.out_row);
        });
    }

  private:
    template <class Body>
    void for_each(Body body) const {
        for (std::int64_t t = 0; t < call_.steps; ++t)
            for (std::int64_t b = 0; b < sizes_[t]; ++b) body(t, order_[b], starts_[t] + b);
    }

    const PerfkitRnnInt8& call_;
    std::vector<std::int64_t> order_, sizes_, starts_;
    std::vector<float> x_, out_;
};

ffi::Error told(int failed) {
    if (failed == 1) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the int8 recurrent kernel");
    if (failed) return ffi::Error::InvalidArgument("a recurrent cell that the int8 kernel does not know");
    return ffi::Error::Success();
}

// x: (T, B, I); h0: (B, H); c0: the same of an LSTM, else of any width; lengths: (B,), or nothing where all rows have T
// steps; scales: of x and h; y: (T, B, H).
ffi::Error layer(std::int64_t cell, std::int64_t threads, In x, In h0, In c0, Lengths lengths, In w_ih, In scale_ih,
                 In w_hh, In scale_hh, In bias, In bias_hn, In scales, Out y, Out hn, Out cn) {
    const auto sizes = x.dimensions();
    const std::vector<std::int64_t> rows(sizes[0], sizes[1]);
    std::vector<std::int64_t> starts(sizes[0]);
    const void* const weights[] = {w_ih.untyped_data(),     scale_ih.untyped_data(), w_hh.untyped_data(),
                                   scale_hh.untyped_data(), bias.untyped_data(),     bias_hn.untyped_data()};
    PerfkitRnnInt8 p{};
    p.cell = cell, p.steps = sizes[0], p.batch = sizes[1], p.inputs = sizes[2], p.hidden = h0.dimensions()[1];
    p.layers = p.directions = 1;
    p.batch_sizes = rows.data(), p.starts = starts.data();
    p.x = floats(x), p.x_row = p.inputs, p.x_step = p.batch * p.inputs;
    p.out = floats(y), p.out_row = p.hidden, p.out_step = p.batch * p.hidden;
    p.x_fixed = floats(scales)[0], p.h_fixed = floats(scales)[1];
    p.weights = weights;
    p.h = floats(hn), p.c = floats(cn);
    p.threads = {threads};
    std::memcpy(p.h, h0.untyped_data(), h0.size_bytes());
    std::memcpy(p.c, c0.untyped_data(), c0.size_bytes());
    if (!lengths.element_count()) return told(run(&p));
    const auto within = [&](std::int32_t length) { return 1 <= length && length <= p.steps; };
    if (!std::all_of(lengths.typed_data(), lengths.typed_data() + lengths.element_count(), within))
        return ffi::Error::InvalidArgument("lengths of recurrent rows: expected 1 to T, the number of steps");
    try {
        const Packed packed(p, lengths);
        const PerfkitRnnInt8 call = packed.call();
        packed.sort(p.h, p.hidden, false), packed.sort(p.c, c0.dimensions()[1], false);
        const int failed = run(&call);
        packed.sort(p.h, p.hidden, true), packed.sort(p.c, c0.dimensions()[1], true);
        packed.spread();
        return told(failed);
    } catch (const std::bad_alloc&) {
        return told(1);
    }
}

}  // namespace

extern "C" void perfkit_use(void* kernel) { run = reinterpret_cast<decltype(run)>(kernel); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(perfkit_rnn_int8_xla, layer,
                              ffi::Ffi::Bind()
                                  .Attr<std::int64_t>("cell")
                                  .Attr<std::int64_t>("threads")
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<Lengths>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

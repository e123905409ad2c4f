// Stacks of recurrent layers as custom calls of XLA's. What is not there is a buffer without elements.
//
// This takes no more than types from the core.
#include "cpu_core.hpp"

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;
using Lengths = ffi::Buffer<ffi::S32>;

constexpr int OUTSIDE = 3;  // beside the kernel's results: 0; 1 if memory ran out, 2 for a cell that is not known

int (*run_forward)(const PerfkitRnnForward*);
int (*run_backward)(const PerfkitRnnBackward*);

void* at(const In& buffer) { return buffer.element_count() ? buffer.untyped_data() : nullptr; }
void* at(Out& buffer) { return at(*buffer); }

// The part of a call that both passes share; it points into itself.
struct Call {
    PerfkitRnn stack{};
    std::vector<i64> rows;
    std::vector<const void*> weights;

    // `like_x`: x, or its gradient; the others are arguments of both passes.
    Call(i64 cell, i64 directions, bool batch_first, i64 threads, const In& like_x, const In& h0, const In& c0,
         const Lengths& lengths, ffi::RemainingArgs groups)
        : rows(lengths.typed_data(), lengths.typed_data() + lengths.element_count()) {
        const auto sizes = like_x.dimensions(), states = h0.dimensions();
        stack.cell = cell, stack.dtype = like_x.element_type() == ffi::BF16, stack.threads = {threads};
        stack.steps = sizes[batch_first ? 1 : 0], stack.batch = sizes[batch_first ? 0 : 1], stack.inputs = sizes[2];
        stack.hidden = states[2], stack.layers = states[0] / directions, stack.directions = directions;
        stack.ragged = !rows.empty(), stack.rows = rows.data();
        for (std::size_t i = 0; i < groups.size(); ++i) weights.push_back(at(*groups.get<In>(i)));
        stack.weights = weights.data();
        stack.h0 = at(h0), stack.c0 = at(c0);
    }
    Call(const Call&) = delete;
};

// From step to step and from row to row of an array (T, B, width), or (B, T, width).
void strides(const In& x, bool batch_first, i64& step, i64& row) {
    const i64 width = x.dimensions()[2], far = x.dimensions()[1] * width;
    step = batch_first ? width : far, row = batch_first ? far : width;
}

// Lengths are numbers that only a running program has.
bool outside(const Call& call) {
    const auto within = [&](i64 length) { return 1 <= length && length <= call.stack.steps; };
    return !std::all_of(call.rows.begin(), call.rows.end(), within);
}

ffi::Error told(int result) {
    if (result == OUTSIDE)
        return ffi::Error::InvalidArgument("lengths of recurrent rows: expected 1 to T, the number of steps");
    if (result == 0) return ffi::Error::Success();
    if (result == 1)
        return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the recurrent kernel's working space");
    return ffi::Error::InvalidArgument("a recurrent cell or dtype that the kernel does not know");
}

ffi::Error forward(i64 cell, i64 directions, bool batch_first, i64 threads, In x, In h0, In c0, Lengths lengths,
                   ffi::RemainingArgs weights, Out y, Out hn, Out cn, Out gates, Out cells, Out inner) {
    Call call(cell, directions, batch_first, threads, x, h0, c0, lengths, weights);
    PerfkitRnn& stack = call.stack;
    stack.x = at(x), stack.y = at(y);
    strides(x, batch_first, stack.x_step, stack.x_row);
    strides(*y, batch_first, stack.y_step, stack.y_row);
    stack.gates = at(gates), stack.cells = static_cast<float*>(at(cells)), stack.inner = at(inner);
    const PerfkitRnnForward all{stack, at(hn), at(cn)};
    return told(outside(call) ? OUTSIDE : run_forward(&all));
}

ffi::Error backward(i64 cell, i64 directions, bool batch_first, i64 threads, In x, In y, In h0, In c0, Lengths lengths,
                    In gates, In cells, In inner, In d_y, In d_hn, In d_cn, ffi::RemainingArgs weights, Out d_x,
                    Out d_h0, Out d_c0, ffi::RemainingRets d_weights) {
    Call call(cell, directions, batch_first, threads, x, h0, c0, lengths, weights);
    PerfkitRnn& stack = call.stack;
    stack.x = at(x), stack.y = at(y);
    strides(x, batch_first, stack.x_step, stack.x_row);
    strides(y, batch_first, stack.y_step, stack.y_row);
    stack.gates = at(gates), stack.cells = static_cast<float*>(at(cells)), stack.inner = at(inner);
    std::vector<float*> targets;
    for (std::size_t i = 0; i < d_weights.size(); ++i)
        targets.push_back(static_cast<float*>((*d_weights.get<ffi::AnyBuffer>(i))->untyped_data()));
    PerfkitRnnBackward back{};
    back.stack = stack;
    back.d_y = at(d_y), back.d_hn = at(d_hn), back.d_cn = at(d_cn), back.d_x = at(d_x);
    strides(d_y, batch_first, back.d_y_step, back.d_y_row);
    strides(*d_x, batch_first, back.d_x_step, back.d_x_row);
    back.d_h0 = at(d_h0), back.d_c0 = at(d_c0), back.d_weights = targets.data();
    return told(outside(call) ? OUTSIDE : run_backward(&back));
}

auto bound() {
    return ffi::Ffi::Bind().Attr<i64>("cell").Attr<i64>("directions").Attr<bool>("batch_first").Attr<i64>("threads");
}

}  // namespace

extern "C" void perfkit_use(void* forward, void* backward) {
    run_forward = reinterpret_cast<decltype(run_forward)>(forward);
    run_backward = reinterpret_cast<decltype(run_backward)>(backward);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(perfkit_rnn_xla_forward, forward,
                              bound()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<Lengths>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(perfkit_rnn_xla_backward, backward,
                              bound()
                                  .Arg<In>()
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
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets());

// The rows that the steps of a line are given, quantized, with the scales that they were quantized at.
#pragma once

#include "cpu_directions.hpp"

namespace {

// Of a row that is quantized as all such rows are, those in [-1, 1] by default: whether its scale is that of all such rows.
inline bool scaled(const Activation* q, i64 count, float& scale, float all_rows = 1.0f / 127.0f) {
    const bool spoilt = any_is_not_a_number(q, count);
    scale = spoilt ? std::numeric_limits<float>::quiet_NaN() : all_rows;
    return !spoilt;
}

template <class Cell>
class Inputs {
  public:
    const Activation* rows;  // `stride` apart
    i64 stride;
    Array<float> scales;
    bool common;  // all rows have the scale that Direction's common scales have in them

    // Room for so many rows of K numbers. `at_once`: those of one step are taken at a time, and read where they lie.
    Inputs(const Stack<Cell>& stack, i64 layer, i64 first)
        : stack_(stack), p_(stack.p), layer_(layer), first_(first),
          below_(layer && stack.bounded ? stack.q_between[(layer - 1) % 2].data() : nullptr) {}
    void allocate(i64 most, i64 K, bool at_once) {
        K_ = K, at_once_ = at_once, own_stride_ = round_up(K, PANEL);
        own_.allocate_zeros(most * own_stride_);
        scales.allocate(most);
    }

    void begin() {
        taken_ = 0, common = below_ || (!layer_ && p_.x_fixed > 0);
        rows = own_.data(), stride = own_stride_;
    }
    // `count` rows of step t, of which as many are asked for at step `next` soon: -1 for no step.
    void take(i64 t, i64 count, i64 next) {
        if (below_)
            take_quantized(below_ + (stack_.offsets[t] + first_) * stack_.q_stride, count);
        else
            take_floats(t, count, next);
        taken_ += count;
    }
    i64 taken() const { return taken_; }

  private:
    const float* row_of(i64 t, i64 b) const {
        if (layer_) return &stack_.between[(layer_ - 1) % 2][(stack_.offsets[t] + first_ + b) * stack_.width];
        return p_.x + t * p_.x_step + (p_.starts[t] + first_ + b) * p_.x_row;
    }
    void take_floats(i64 t, i64 count, i64 next) {
        const i64 K = K_;  // of their own, as what is written might be any number, for all compilers know
        const float floor = layer_ && Cell::BOUNDED ? 1.0f : 0.0f, fixed = layer_ ? 0.0f : p_.x_fixed;
        for (i64 b = 0; b < count; ++b) {
            // Rows lie far from each other: what reads ahead by itself does not see them coming.
            if (next >= 0) {
                const float* const row = row_of(next, b);
                for (i64 k = 0; k < K; k += 16) __builtin_prefetch(row + k);
            }
            const float scale = quantize(row_of(t, b), K, floor, fixed, &own_[(taken_ + b) * own_stride_]);
            scales[taken_ + b] = scale, common = common && scale == scale;
        }
    }
    void take_quantized(const Activation* q, i64 count) {
        for (i64 b = 0; b < count; ++b) common = scaled(q + b * stack_.q_stride, K_, scales[taken_ + b]) && common;
        if (at_once_)
            rows = q, stride = stack_.q_stride;
        else
            std::copy(q, q + count * stack_.q_stride, &own_[taken_ * own_stride_]);
    }

    const Stack<Cell>& stack_;
    const PerfkitRnnInt8& p_;
    const i64 layer_, first_;
    const Activation* const below_;  // the layer below's outputs, where they are quantized
    i64 K_, own_stride_, taken_ = 0;
    bool at_once_;
    Array<Activation> own_;
};

}  // namespace

// The cells of recurrent layers on int8 weights, L units at a time.
#pragma once

#include "cpu_products.hpp"

namespace {

// 2^y for y clamped to [-30, 30], to a relative error of 1.1e-4, where rounding a hidden state to int8 moves it by up to
// 4e-3: 2^n (1 + r q(r)), n the nearest integer, r in [-1/2, 1/2]. NaN stays NaN.
INLINE Floats power_of_2(Floats y) {
    y = at_most(all(STEEPEST), at_least(all(-STEEPEST), y));
    const Floats shifted = y + ROUNDER, r = y - (shifted - ROUNDER);
    Floats p = fused(r, all(0.05500893f), all(0.24221097f));
    p = fused(p, r, all(0.6932829f));
    p = fused(p, r, all(1.0f));
    return bits<Floats>(bits<Ints>(p) + (bits<Ints>(shifted) << 23));
}

// tanh(x) from e^-2x.
INLINE Floats tanh_from(Floats e) { return (1.0f - e) / (1.0f + e); }

// A cell has G gates. FACTORS are what the gates are multiplied by, in their scales and biases, so that what a step is
// given are exponents of 2: sigmoid(v) = 1 / (1 + e^-v), tanh(v) = (1 - e^-2v) / (1 + e^-2v).
//
// step: one time step of L units. a[g] is what was added up for gate g; but for GRU's n, of which a[2] is the hidden part
// and a[3] the input part. h is the units' state before (GRU alone), c their cells, updated. Returns the new state: of
// all but ReLU in [-1, 1] if it was so before. Fractions are brought to one denominator: a division costs as much as
// six other operations.

struct Lstm {
    static constexpr int G = 4;
    static constexpr bool CELLS = true, GRU = false, BOUNDED = true;
    static constexpr float FACTORS[G] = {-LOG2_E, -LOG2_E, -2 * LOG2_E, -LOG2_E};

    static INLINE Floats step(const Floats* a, Floats, Floats& c) {
        const Floats i = power_of_2(a[0]), f = power_of_2(a[1]), g = power_of_2(a[2]), o = power_of_2(a[3]);
        const Floats above = 1.0f - g, below = 1.0f + g, input = fused(i, below, below);
        c = fused(c, input, fused(f, above, above)) / fused(f, input, input);
        const Floats e = power_of_2(c * FACTORS[2]), under = 1.0f + e;
        return (1.0f - e) / fused(o, under, under);
    }
};

struct Gru {
    static constexpr int G = 3;
    static constexpr bool CELLS = false, GRU = true, BOUNDED = true;
    static constexpr float FACTORS[G] = {-LOG2_E, -LOG2_E, -2 * LOG2_E};

    static INLINE Floats step(const Floats* a, Floats h, Floats&) {
        const Floats r = 1.0f / (1.0f + power_of_2(a[0])), z = 1.0f / (1.0f + power_of_2(a[1]));
        const Floats n = tanh_from(power_of_2(fused(r, a[2], a[3])));
        return fused(z, h - n, n);  // n, h and z in their intervals keep it in [-1, 1], roundings included
    }
};

struct RnnTanh {
    static constexpr int G = 1;
    static constexpr bool CELLS = false, GRU = false, BOUNDED = true;
    static constexpr float FACTORS[G] = {-2 * LOG2_E};

    static INLINE Floats step(const Floats* a, Floats, Floats&) { return tanh_from(power_of_2(a[0])); }
};

struct RnnRelu {
    static constexpr int G = 1;
    static constexpr bool CELLS = false, GRU = false, BOUNDED = false;
    static constexpr float FACTORS[G] = {1.0f};

    static INLINE Floats step(const Floats* a, Floats, Floats&) { return at_least(Floats{}, a[0]); }
};

}  // namespace

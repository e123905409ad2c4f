// The equations of the cells, L units at a time. They are in words in __init__.py.
#pragma once

#include "cpu_numbers.hpp"

namespace perfkit {

// How exact the gates are: relative errors of e^x below 3e-7, or below 1.1e-4 and 6.2e-5 of a quotient, where bfloat16
// rounds the result by 2e-3.
template <class Data>
constexpr bool EXACT = sizeof(Data) == 4;

// e^-(times x), with the exponent of 2 clamped to [-30, 30]; NaN stays NaN.
template <bool EXACT_, int TIMES = 1>
INLINE Floats decayed(Floats x) {
#if defined(__AVX512F__)
    Floats y = x * (-LOG2_E * TIMES);
    y = at_most(all(STEEPEST), at_least(all(-STEEPEST), y));
    const __m512 whole = _mm512_roundscale_ps(__m512(y), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Floats r = y - Floats(whole);
    Floats p;
    if constexpr (EXACT_) {
        p = r * 0.00132695190f + 0.00967129134f;
        p = p * r + 0.0555071086f;
        p = p * r + 0.240222469f;
        p = p * r + 0.693147004f;
    } else {
        p = r * 0.05500893f + 0.24221097f;
        p = p * r + 0.6932829f;
    }
    p = p * r + 1.0f;
    return Floats(_mm512_scalef_ps(__m512(p), whole));
#else
    return exp2(x * (-LOG2_E * TIMES));
#endif
}

// 1 / x, x in [1, 2^61] or NaN.
template <bool EXACT_>
INLINE Floats inverse(Floats x) {
#if defined(__AVX512F__)
    const Floats guess = Floats(_mm512_rcp14_ps(__m512(x)));
    if constexpr (!EXACT_) return guess;
    return guess + guess * (1.0f - x * guess);
#else
    return 1.0f / x;
#endif
}

template <bool E>
INLINE Floats sigmoid(Floats x) {
    return inverse<E>(1.0f + decayed<E>(x));
}
template <bool E>
INLINE Floats tanh(Floats x) {
    const Floats e = decayed<E, 2>(x);
    return (1.0f - e) * inverse<E>(1.0f + e);
}

// A cell has G gates and keeps S numbers of a unit and step for the backward pass.
//
// step: a[g] is the g-th gate before its function, both parts and their biases; but for GRU's n, of which a[2] is the
// hidden part and a[3] the input part. h is the unit's state before (GRU alone), c its cell, updated. Returns its new
// state. With SAVE, saved[s] gets what the backward pass needs.
//
// back: dh and dc are gradients of the unit's states after the step; dc and `through`, the part of dh that reaches the
// state before it past the weights, are set. saved as above, `h` the state after the step (RNN), `before` that before
// it (GRU), c_before and c the cells (LSTM). d[s] become gradients of the gates before their functions: LSTM i f g o;
// GRU n r z and n's hidden part, so that both w_ih and w_hh have three in a row.

struct Lstm {
    static constexpr int G = 4, S = 4, PANEL = 1;
    static constexpr bool CELLS = true, GRU = false;

    template <bool SAVE, bool E>
    static INLINE Floats step(const Floats* a, Floats, Floats& c, Floats* saved) {
        if constexpr (SAVE) {
            saved[0] = sigmoid<E>(a[0]), saved[1] = sigmoid<E>(a[1]);
            saved[2] = tanh<E>(a[2]), saved[3] = sigmoid<E>(a[3]);
            c = saved[1] * c + saved[0] * saved[2];
            return saved[3] * tanh<E>(c);
        } else {
            const Floats i = decayed<E>(a[0]), f = decayed<E>(a[1]), g = decayed<E, 2>(a[2]), o = decayed<E>(a[3]);
            c = c * inverse<E>(1.0f + f) + (1.0f - g) * inverse<E>((1.0f + i) * (1.0f + g));
            const Floats e = decayed<E, 2>(c);
            return (1.0f - e) * inverse<E>((1.0f + o) * (1.0f + e));
        }
    }
    template <bool E>
    static INLINE Floats back(const Floats* saved, Floats, Floats, Floats c_before, Floats c, Floats dh, Floats& dc,
                              Floats* d) {
        const Floats i = saved[0], f = saved[1], g = saved[2], o = saved[3], t = tanh<E>(c);
        const Floats cell = dc + dh * o * (1.0f - t * t);
        d[0] = cell * g * i * (1.0f - i);
        d[1] = cell * c_before * f * (1.0f - f);
        d[2] = cell * i * (1.0f - g * g);
        d[3] = dh * t * o * (1.0f - o);
        dc = cell * f;
        return Floats{};
    }
};

struct Gru {
    static constexpr int G = 3, S = 4, PANEL = 1;
    static constexpr bool CELLS = false, GRU = true;

    template <bool SAVE, bool E>
    static INLINE Floats step(const Floats* a, Floats h, Floats&, Floats* saved) {
        const Floats r = sigmoid<E>(a[0]), z = sigmoid<E>(a[1]), n = tanh<E>(a[3] + r * a[2]);
        if constexpr (SAVE) saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = a[2];
        return n + z * (h - n);
    }
    template <bool E>
    static INLINE Floats back(const Floats* saved, Floats, Floats before, Floats, Floats, Floats dh, Floats&,
                              Floats* d) {
        const Floats r = saved[0], z = saved[1], n = saved[2], hidden = saved[3];
        d[0] = dh * (1.0f - z) * (1.0f - n * n);
        d[1] = d[0] * hidden * r * (1.0f - r);
        d[2] = dh * (before - n) * z * (1.0f - z);
        d[3] = d[0] * r;
        return dh * z;
    }
};

template <bool RELU>
struct Rnn {
    static constexpr int G = 1, S = 1, PANEL = 4;
    static constexpr bool CELLS = false, GRU = false;

    template <bool SAVE, bool E>
    static INLINE Floats step(const Floats* a, Floats, Floats&, Floats*) {
        return RELU ? at_least(Floats{}, a[0]) : tanh<E>(a[0]);
    }
    template <bool E>
    static INLINE Floats back(const Floats*, Floats h, Floats, Floats, Floats, Floats dh, Floats&, Floats* d) {
        d[0] = RELU ? (h > 0.0f ? dh : Floats{}) : dh * (1.0f - h * h);
        return Floats{};
    }
};

}  // namespace perfkit

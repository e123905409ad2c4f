// The equations of the cells, L units at a time. They are in words in __init__.py.
#pragma once

#include "cpu_numbers.hpp"

namespace perfkit {

// How exact the gates are: relative errors of e^x below 3e-7, or below 1.1e-4 and 6.2e-5 of a quotient, where bfloat16
// rounds the result by 2e-3.
template <class Data>
constexpr bool EXACT = sizeof(Data) == 4;

// N vectors side by side. The gates are one long chain of operations, of which a processor sees too few at a time to
// find the next row's among them.
template <int N>
struct Several {
    Floats of[N];
};

template <class Body, int N, class... Rest>
INLINE Several<N> mapped(Body body, Several<N> first, Rest... rest) {
    Several<N> found;
    each<N>([&](auto n) INLINE_LAMBDA { found.of[n] = body(first.of[n], rest.of[n]...); });
    return found;
}
#define OPERATOR(o)                                                                                                   \
    template <int N>                                                                                                  \
    INLINE Several<N> operator o(Several<N> a, Several<N> b) {                                                        \
        return mapped([](Floats x, Floats y) INLINE_LAMBDA { return x o y; }, a, b);                                  \
    }                                                                                                                 \
    template <int N>                                                                                                  \
    INLINE Several<N> operator o(Several<N> a, float b) {                                                             \
        return mapped([b](Floats x) INLINE_LAMBDA { return x o b; }, a);                                              \
    }                                                                                                                 \
    template <int N>                                                                                                  \
    INLINE Several<N> operator o(float a, Several<N> b) {                                                             \
        return mapped([a](Floats x) INLINE_LAMBDA { return a o x; }, b);                                              \
    }
OPERATOR(+)
OPERATOR(-)
OPERATOR(*)
#undef OPERATOR

INLINE Floats positive(Floats x) { return at_least(Floats{}, x); }
INLINE Floats clamped(Floats y) { return at_most(all(STEEPEST), at_least(all(-STEEPEST), y)); }
#if defined(__AVX512F__)
INLINE Floats nearest(Floats x) {
    return Floats(_mm512_roundscale_ps(__m512(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE Floats scaled(Floats x, Floats exponent) { return Floats(_mm512_scalef_ps(__m512(x), __m512(exponent))); }
INLINE Floats about_inverse(Floats x) { return Floats(_mm512_rcp14_ps(__m512(x))); }
#else
INLINE Floats quotient(Floats x) { return 1.0f / x; }
#endif
#define EACH_OF_SEVERAL(function)                                                                                     \
    template <int N, class... Rest>                                                                                   \
    INLINE Several<N> function(Several<N> first, Rest... rest) {                                                      \
        return mapped([](auto... x) INLINE_LAMBDA { return function(x...); }, first, rest...);                        \
    }
EACH_OF_SEVERAL(positive)
#if defined(__AVX512F__)
EACH_OF_SEVERAL(clamped)
EACH_OF_SEVERAL(nearest)
EACH_OF_SEVERAL(scaled)
EACH_OF_SEVERAL(about_inverse)
#else
EACH_OF_SEVERAL(exp2)
EACH_OF_SEVERAL(quotient)
#endif
#undef EACH_OF_SEVERAL

// Below, V is Floats or Several.

// e^-(times x), with the exponent of 2 clamped to [-30, 30]; NaN stays NaN.
template <bool EXACT_, int TIMES = 1, class V>
INLINE V decayed(V x) {
#if defined(__AVX512F__)
    const V y = clamped(x * (-LOG2_E * TIMES)), whole = nearest(y), r = y - whole;
    V p;
    if constexpr (EXACT_) {
        p = r * 0.00132695190f + 0.00967129134f;
        p = p * r + 0.0555071086f;
        p = p * r + 0.240222469f;
        p = p * r + 0.693147004f;
    } else {
        p = r * 0.05500893f + 0.24221097f;
        p = p * r + 0.6932829f;
    }
    return scaled(p * r + 1.0f, whole);
#else
    return exp2(x * (-LOG2_E * TIMES));
#endif
}

// 1 / x, x in [1, 2^61] or NaN.
template <bool EXACT_, class V>
INLINE V inverse(V x) {
#if defined(__AVX512F__)
    const V guess = about_inverse(x);
    if constexpr (!EXACT_) return guess;
    return guess + guess * (1.0f - x * guess);
#else
    return quotient(x);
#endif
}

template <bool E, class V>
INLINE V sigmoid(V x) {
    return inverse<E>(1.0f + decayed<E>(x));
}
template <bool E, class V>
INLINE V tanh(V x) {
    const V e = decayed<E, 2>(x);
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

    template <bool SAVE, bool E, class V>
    static INLINE V step(const V* a, V, V& c, V* saved) {
        if constexpr (SAVE) {
            saved[0] = sigmoid<E>(a[0]), saved[1] = sigmoid<E>(a[1]);
            saved[2] = tanh<E>(a[2]), saved[3] = sigmoid<E>(a[3]);
            c = saved[1] * c + saved[0] * saved[2];
            return saved[3] * tanh<E>(c);
        } else {
            const V i = decayed<E>(a[0]), f = decayed<E>(a[1]), g = decayed<E, 2>(a[2]), o = decayed<E>(a[3]);
            c = c * inverse<E>(1.0f + f) + (1.0f - g) * inverse<E>((1.0f + i) * (1.0f + g));
            const V e = decayed<E, 2>(c);
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

    template <bool SAVE, bool E, class V>
    static INLINE V step(const V* a, V h, V&, V* saved) {
        const V r = sigmoid<E>(a[0]), z = sigmoid<E>(a[1]), n = tanh<E>(a[3] + r * a[2]);
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

    template <bool SAVE, bool E, class V>
    static INLINE V step(const V* a, V, V&, V*) {
        if constexpr (RELU) return positive(a[0]);
        return tanh<E>(a[0]);
    }
    template <bool E>
    static INLINE Floats back(const Floats*, Floats h, Floats, Floats, Floats, Floats dh, Floats&, Floats* d) {
        d[0] = RELU ? (h > 0.0f ? dh : Floats{}) : dh * (1.0f - h * h);
        return Floats{};
    }
};

}  // namespace perfkit

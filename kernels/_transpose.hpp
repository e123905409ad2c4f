// Rows of vectors become columns.
#pragma once

#include "_vector.hpp"

namespace perfkit {

template <class V>
INLINE V shuffled(V a, V b, Ints from) {
#if defined(__clang__)
    V found;
    for (int lane = 0; lane < L; ++lane) found[lane] = from[lane] < L ? a[from[lane]] : b[from[lane] - L];
    return found;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

#if PERFKIT_LANES == 16
constexpr Ints EVEN = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
constexpr Ints LOW = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
#elif PERFKIT_LANES == 8
constexpr Ints EVEN = {0, 2, 4, 6, 8, 10, 12, 14};
constexpr Ints LOW = {0, 8, 1, 9, 2, 10, 3, 11};
#else
constexpr Ints EVEN = {0, 2, 4, 6};
constexpr Ints LOW = {0, 4, 1, 5};
#endif

// Each of log2(L) passes interleaves the first half of the rows with the second.
template <class V>
INLINE void transpose(V (&rows)[L]) {
    for (int pass = 1; pass < L; pass *= 2) {
        V next[L];
        for (int i = 0; i < L / 2; ++i) {
            next[2 * i] = shuffled(rows[i], rows[i + L / 2], LOW);
            next[2 * i + 1] = shuffled(rows[i], rows[i + L / 2], LOW + L / 2);
        }
        for (int i = 0; i < L; ++i) rows[i] = next[i];
    }
}

}  // namespace perfkit

// Whether AMX's tiles are used, and the names of the instructions.
#pragma once

#include "cpu_products.hpp"

namespace perfkit {

#if PERFKIT_TILES
// Whether a small product is what `vdpbf16ps` makes of it. The numbers are small integers, so that the order of sums
// changes no bit.
inline bool tiles_are_right() {
    constexpr int N = 4, K = 64;
    alignas(64) Bf16 x[TILE * K], w[K * N * L];
    const auto fill = [](Bf16* to, int count, unsigned seed) {
        for (int i = 0; i < count; ++i) {
            seed = seed * 1664525u + 1013904223u;
            const float value = float(int(seed >> 28) - 8);
            std::uint32_t word;
            std::memcpy(&word, &value, 4);
            to[i].bits = std::uint16_t(word >> 16);
        }
    };
    fill(x, TILE * K, 1), fill(w, K * N * L, 2);
    alignas(64) float expected[TILE][N * L], found[TILE][N * L];
    const float nothing[N * L] = {};
    for (int row = 0; row < TILE; ++row) dot<1, N>(x + row * K, K, w, K, nothing, 0, expected[row], N * L);
    const TileShape shape(true);
    dot_tiles<1, N>(x, K, w, K, nothing, 0, found[0], N * L);
    return std::memcmp(expected, found, sizeof found) == 0;
}
#endif

// Asked for once in a process.
inline bool use_tiles() {
#if PERFKIT_TILES
    static const bool use = have_tiles() && tiles_are_right();
    return use;
#else
    return false;
#endif
}

// What the products of bfloat16 run on; those of float32 on the vectors of the last name.
inline const char* instructions() {
#if defined(__AVX512BF16__)
    return use_tiles() ? "AMX-BF16, AVX512-BF16, AVX-512" : "AVX512-BF16, AVX-512";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__) && defined(__FMA__)
    return "AVX2";
#elif defined(__ARM_NEON)
    return "NEON";
#else
    return "plain C++";
#endif
}

}  // namespace perfkit

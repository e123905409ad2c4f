// AVX512-BF16's and AMX's instructions as their manual has them, for processors that lack them. Included before a kernel.
#pragma once

#include <immintrin.h>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#undef __AVX512BF16__
#define __AVX512BF16__ 1
// Not written out at each use, of which kernels have hundreds: that takes compilers long.
#define SLOW inline __attribute__((noinline))
inline float widened_alone(std::uint16_t half) {
    const std::uint32_t word = std::uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}
SLOW __m512 emulated_dpbf16(__m512 sums, __m512bh a, __m512bh b) {
    float sum[16];
    std::uint16_t x[32], y[32];
    std::memcpy(sum, &sums, 64), std::memcpy(x, &a, 64), std::memcpy(y, &b, 64);
    for (int i = 31; i >= 0; --i) sum[i / 2] += widened_alone(x[i]) * widened_alone(y[i]);
    std::memcpy(&sums, sum, 64);
    return sums;
}
SLOW __m256bh emulated_cvtneps(__m512 x) {
    std::uint32_t word[16];
    std::uint16_t half[16];
    std::memcpy(word, &x, 64);
    for (int i = 0; i < 16; ++i)
        half[i] = (word[i] & 0x7fffffff) > 0x7f800000 ? (word[i] >> 16) | 0x40
                                                      : (word[i] + 0x7fff + ((word[i] >> 16) & 1)) >> 16;
    __m256bh result;
    std::memcpy(&result, half, 32);
    return result;
}
#define _mm512_dpbf16_ps emulated_dpbf16
#define _mm512_cvtneps_pbh emulated_cvtneps

#undef __AMX_TILE__
#undef __AMX_BF16__
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define PERFKIT_TILES_EMULATED
struct Tiles {
    std::uint8_t shape[64] = {1};  // others' shape: tiles without rows
    std::uint8_t of[8][16][64];
};
inline thread_local Tiles tiles_of_thread;
inline Tiles& shaped_tiles() {
    if (tiles_of_thread.shape[48] != 16) std::abort();  // real ones would be an illegal instruction
    return tiles_of_thread;
}
SLOW void emulated_loadconfig(const void* config) {
    const auto* bytes = static_cast<const std::uint8_t*>(config);
    const bool others = bytes[48] == 0;
    for (int tile = 0; tile < 8 && !others; ++tile)
        if (bytes[0] != 1 || bytes[1] != 0 || bytes[16 + 2 * tile] != 64 || bytes[48 + tile] != 16) std::abort();
    std::memcpy(tiles_of_thread.shape, config, 64);
}
SLOW void emulated_storeconfig(void* to) {
    if (tiles_of_thread.shape[48] != 0) std::abort();  // what others had shaped was not put back
    std::memcpy(to, tiles_of_thread.shape, 64);
}
SLOW void emulated_loadd(int tile, const void* base, long stride) {
    for (int row = 0; row < 16; ++row)
        std::memcpy(shaped_tiles().of[tile][row], static_cast<const char*>(base) + row * stride, 64);
}
SLOW void emulated_stored(int tile, void* base, long stride) {
    for (int row = 0; row < 16; ++row)
        std::memcpy(static_cast<char*>(base) + row * stride, shaped_tiles().of[tile][row], 64);
}
SLOW void emulated_dpbf16ps(int c, int a, int b) {
    static const bool wrong = std::getenv("PERFKIT_TEST_WRONG_TILES") != nullptr;
    Tiles& tiles = shaped_tiles();
    for (int m = 0; m < 16; ++m) {
        float sum[16];
        std::uint16_t x[32], y[32];
        std::memcpy(sum, tiles.of[c][m], 64), std::memcpy(x, tiles.of[a][m], 64);
        for (int k = 0; k < 16; ++k) {
            std::memcpy(y, tiles.of[b][k], 64);
            for (int n = 0; n < 16; ++n)
                for (int i = 0; i < 2; ++i) sum[n] += widened_alone(x[2 * k + i]) * widened_alone(y[2 * n + i]);
        }
        if (wrong) sum[3] += 1;
        std::memcpy(tiles.of[c][m], sum, 64);
    }
}
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_loadconfig
#define _tile_storeconfig emulated_storeconfig
#define _tile_release() (void)std::memset(tiles_of_thread.shape, 0, 64)
#define _tile_zero(tile) (void)std::memset(shaped_tiles().of[tile], 0, 1024)
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbf16ps emulated_dpbf16ps

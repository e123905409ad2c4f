// AMX: eight tiles of 16 rows of 64 bytes, in which bfloat16 numbers are multiplied 32 at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__AVX512BF16__)
#define PERFKIT_TILES 1
#include <immintrin.h>
#if !defined(PERFKIT_TILES_EMULATED)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#else
#define PERFKIT_TILES 0
#endif

namespace perfkit {

constexpr int TILE = 16;  // rows, and words of 32 bits in each

#if PERFKIT_TILES
// The system lends the tiles' registers to a process that asks for them; asked for once.
inline bool tiles_are_lent() {
#if defined(PERFKIT_TILES_EMULATED)
    return true;
#else
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return granted;
#endif
}

// What was written is in memory from here on: compilers are not told all that instructions on tiles read.
inline void settle() { asm volatile("" ::: "memory"); }

// How the tiles are shaped on this thread while this lives: all of them 16 rows of 64 bytes. What the framework's
// kernels had shaped on its thread is put back, as they may not look again.
class TileShape {
  public:
    explicit TileShape(bool used = true) : used_(used) {
        if (!used) return;
        _tile_storeconfig(before_);
        settle();
        struct alignas(64) {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            std::uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
        } shape;
        settle();
        _tile_loadconfig(&shape);
    }
    ~TileShape() {
        if (!used_) return;
        if (before_[0] == 0)  // the palette: nothing was shaped
            _tile_release();
        else
            _tile_loadconfig(before_);
    }
    TileShape(const TileShape&) = delete;

  private:
    const bool used_;
    alignas(64) std::uint8_t before_[64];
};

// Whether they multiply as the manual says. The numbers are small integers, so that the order of sums changes no bit.
inline bool tiles_are_right() {
    alignas(64) std::uint16_t x[TILE][2 * TILE], w[TILE][2 * TILE];
    unsigned seed = 1;
    const auto next = [&seed] {
        seed = seed * 1664525u + 1013904223u;
        const float value = float(int(seed >> 28) - 8);
        std::uint32_t word;
        std::memcpy(&word, &value, 4);
        return std::uint16_t(word >> 16);
    };
    for (auto* tile : {&x, &w})
        for (auto& row : *tile)
            for (auto& number : row) number = next();
    const auto wide = [](std::uint16_t half) {
        const std::uint32_t word = std::uint32_t(half) << 16;
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    };
    alignas(64) float found[TILE][TILE];
    const TileShape shape;
    settle();
    _tile_zero(0);
    _tile_loadd(1, x, 64);
    _tile_loadd(2, w, 64);
    _tile_dpbf16ps(0, 1, 2);
    _tile_stored(0, found, 64);
    settle();
    for (int m = 0; m < TILE; ++m)
        for (int n = 0; n < TILE; ++n) {
            float sum = 0;
            for (int k = 0; k < 2 * TILE; ++k) sum += wide(x[m][k]) * wide(w[k / 2][2 * n + k % 2]);
            if (found[m][n] != sum) return false;
        }
    return true;
}

// Asked for once in a process.
inline bool have_tiles() {
    static const bool have = tiles_are_lent() && tiles_are_right();
    return have;
}
#else
inline bool have_tiles() { return false; }
struct TileShape {
    explicit TileShape(bool = true) {}
};
#endif

}  // namespace perfkit

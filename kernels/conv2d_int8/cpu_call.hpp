// What passes over a convolution share.
#pragma once

#include "cpu_problem.hpp"

#include "_bytes.hpp"

namespace {

constexpr i64 FEW = 4;          // input channels up to which lanes are places, else outputs, as of images that lie NHWC
constexpr i64 WORTH = 1 << 20;  // multiply-adds that are worth waking a thread for

inline bool few(const PerfkitConv2dInt8& p) { return p.inputs <= FEW && !(p.x_last && p.y_last); }

// Rows of outputs at a time, of so many that caches have room for: fewer where threads would have none.
inline i64 chunk_rows(const PerfkitConv2dInt8& p, i64 most, i64 useful) {
    const i64 parts = (2 * useful + p.batch - 1) / p.batch;
    return std::clamp<i64>(useful > 1 ? std::min(most, (p.out_height + parts - 1) / parts) : most, 1, p.out_height);
}

struct Call {
    const PerfkitConv2dInt8& p;
    const void* x;
    const i8* weights;
    const Grid& grid;
    const Finish& finish;

    i64 area() const { return p.out_height * p.out_width; }

    // Places `c` on of row h of a channel of an image, rounded.
    void take(i64 image, i64 channel, i64 h, i64 c, i64 count, u8* to) const {
        const i64 row = image * p.inputs * p.height * p.width;
        if (!p.x_last) {
            const i64 at = row + (channel * p.height + h) * p.width + c;
            if (p.x_kind == UINT8)
                std::memcpy(to, static_cast<const u8*>(x) + at, count);
            else
                grid.row(static_cast<const float*>(x) + at, count, to);
            return;
        }
        const i64 at = row + (h * p.width + c) * p.inputs + channel;
        if (p.x_kind == UINT8) {
            for (i64 i = 0; i < count; ++i) to[i] = static_cast<const u8*>(x)[at + i * p.inputs];
            return;
        }
        for (i64 i = 0; i < count; i += L) {
            Floats value{};
            for (i64 lane = 0; lane < std::min<i64>(L, count - i); ++lane)
                value[lane] = static_cast<const float*>(x)[at + (i + lane) * p.inputs];
            store_lanes(to + i, grid.bytes(value), count - i);
        }
    }
};

}  // namespace

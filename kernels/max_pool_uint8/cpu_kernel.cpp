// Max-pool of 8-bit integers over P x P squares.
//
// Letters: N images, C channels, H x W numbers each, P the side of a square, I x J squares.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "_thread_pool.hpp"

namespace {

using i64 = std::int64_t;
using u8 = std::uint8_t;

constexpr int L = 16;
using Bytes = u8 __attribute__((vector_size(L)));
using Bytes32 = u8 __attribute__((vector_size(32)));
using Bytes64 = u8 __attribute__((vector_size(64)));

inline Bytes load(const u8* from) {
    Bytes value;
    std::memcpy(&value, from, L);
    return value;
}
inline void store(u8* to, Bytes value) { std::memcpy(to, &value, L); }

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bytes{__VA_ARGS__})
#endif
inline Bytes lows(Bytes a, Bytes b) {
    return SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Bytes highs(Bytes a, Bytes b) {
    return SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

inline void interleave(const Bytes* rows, Bytes* to) {
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
        to[2 * i] = lows(rows[i], rows[i + L / 2]);
        to[2 * i + 1] = highs(rows[i], rows[i + L / 2]);
    }
}

// 16 rows of 16 bytes become columns: four rounds, each of which interleaves row i with row i + 8.
inline void transpose_tile(const u8* from, i64 from_row, u8* to, i64 to_row) {
    Bytes one[L], other[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) one[i] = load(from + i * from_row);
    interleave(one, other);
    interleave(other, one);
    interleave(one, other);
    interleave(other, one);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store(to + i * to_row, one[i]);
}

// from: rows x columns, dense; to: columns x rows, dense.
void transpose(const u8* from, i64 rows, i64 columns, u8* to) {
    const i64 whole_rows = rows / L * L, whole_columns = columns / L * L;
    for (i64 r = 0; r < whole_rows; r += L)
        for (i64 c = 0; c < whole_columns; c += L) transpose_tile(from + r * columns + c, columns, to + c * rows + r, rows);
    for (i64 r = 0; r < rows; ++r)
        for (i64 c = r < whole_rows ? whole_columns : 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
}

// Of one square, the largest of a vector's width of channels at once; returns how far it came. SIDE: P where it is known
// to the compiler, else 0.
template <class Vector, int SIDE>
inline i64 pool_channels(const u8* square, i64 row, i64 C, i64 side, i64 c, u8* y) {
    constexpr i64 W = sizeof(Vector);
    const i64 P = SIDE ? SIDE : side;
    for (; c + W <= C; c += W) {
        Vector most;
        std::memcpy(&most, square + c, W);
        for (i64 a = 0; a < P; ++a)
            for (i64 b = 0; b < P; ++b) {
                Vector place;
                std::memcpy(&place, square + a * row + b * C + c, W);
                most = most > place ? most : place;
            }
        std::memcpy(y + c, &most, W);
    }
    return c;
}

// A row of squares, all channels. x: P rows of `row` bytes; y: J places of C channels.
template <int SIDE>
void pool_places(const u8* x, i64 row, i64 C, i64 side, i64 J, u8* y) {
    const i64 P = SIDE ? SIDE : side;
    for (i64 j = 0; j < J; ++j, x += P * C, y += C) {
        i64 c = pool_channels<Bytes64, SIDE>(x, row, C, P, 0, y);
        c = pool_channels<Bytes32, SIDE>(x, row, C, P, c, y);
        c = pool_channels<Bytes, SIDE>(x, row, C, P, c, y);
        for (; c < C; ++c) {
            u8 most = 0;
            for (i64 a = 0; a < P; ++a)
                for (i64 b = 0; b < P; ++b) most = std::max(most, x[a * row + b * C + c]);
            y[c] = most;
        }
    }
}

// The same of one channel, whose places lie side by side. `tallest`: room for W numbers.
void pool_plane_row(const u8* x, i64 W, i64 P, i64 J, u8* y, u8* tallest) {
    std::memcpy(tallest, x, W);
    for (i64 a = 1; a < P; ++a)
        for (i64 w = 0; w < W; ++w) tallest[w] = std::max(tallest[w], x[a * W + w]);
    for (i64 j = 0; j < J; ++j) {
        u8 most = tallest[j * P];
        for (i64 b = 1; b < P; ++b) most = std::max(most, tallest[j * P + b]);
        y[j] = most;
    }
}

}  // namespace

extern "C" struct PerfkitMaxPool {
    std::int64_t batch, channels, height, width, size, channels_last, flat;
};

// x is dense, NHWC (channels_last) or NCHW; y likewise, or NCHW where `flat`. Returns 1 where memory is short, else 0.
extern "C" int perfkit_max_pool_uint8(const PerfkitMaxPool* p, const u8* x, u8* y, perfkit::Threads threads) try {
    const i64 N = p->batch, C = p->channels, H = p->height, W = p->width, P = p->size, I = H / P, J = W / P;
    const i64 tasks = std::min(N, threads.count > 1 ? 4 * threads.count : 1);
    std::vector<u8> room(tasks * std::max(I * J * C, W));
    struct Call {
        const PerfkitMaxPool* p;
        const u8* x;
        u8 *y, *room;
        i64 tasks, I, J;
    } call{p, x, y, room.data(), tasks, I, J};
    perfkit::ThreadPool::run(tasks, threads, [](void* context, long task) {
        const Call& call = *static_cast<Call*>(context);
        const i64 N = call.p->batch, C = call.p->channels, H = call.p->height, W = call.p->width, P = call.p->size;
        const i64 I = call.I, J = call.J;
        u8* own = call.room + task * std::max(I * J * C, W);
        for (i64 n = N * task / call.tasks; n < N * (task + 1) / call.tasks; ++n) {
            const u8* image = call.x + n * C * H * W;
            u8* out = call.y + n * C * I * J;
            if (!call.p->channels_last) {
                for (i64 c = 0; c < C; ++c)
                    for (i64 i = 0; i < I; ++i)
                        pool_plane_row(image + (c * H + i * P) * W, W, P, J, out + (c * I + i) * J, own);
                continue;
            }
            u8* places = call.p->flat ? own : out;
            const auto pool_row = P == 2 ? pool_places<2> : P == 3 ? pool_places<3> : pool_places<0>;
            for (i64 i = 0; i < I; ++i) pool_row(image + i * P * W * C, W * C, C, P, J, places + i * J * C);
            if (call.p->flat) transpose(places, I * J, C, out);
        }
    }, &call);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// float32 to bfloat16: to the nearest, ties to even.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "_thread_pool.hpp"

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr std::int64_t PART = 1 << 16;  // numbers that are worth a task

std::uint16_t rounded(float x) {
    std::uint32_t whole;
    std::memcpy(&whole, &x, sizeof whole);
    const std::uint32_t near = (whole + 0x7fff + (whole >> 16 & 1)) >> 16;
    return std::uint16_t(x != x ? whole >> 16 | 0x40 : near);  // a NaN stays one
}

ffi::Error round_all(std::int64_t threads, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::BF16> y) {
    const float* const from = x.typed_data();
    std::uint16_t* const to = static_cast<std::uint16_t*>(y->untyped_data());
    const std::int64_t count = x.element_count();
    const auto part = [&](long i) {
        const std::int64_t end = std::min(count, (i + 1) * PART);
        for (std::int64_t at = i * PART; at < end; ++at) to[at] = rounded(from[at]);
    };
    perfkit::ThreadPool::run(
        (count + PART - 1) / PART, {threads},
        [](void* context, long i) { (*static_cast<decltype(part)*>(context))(i); },
        const_cast<void*>(static_cast<const void*>(&part)));
    return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    perfkit_rounding_xla, round_all,
    ffi::Ffi::Bind().Attr<std::int64_t>("threads").Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::BF16>>());

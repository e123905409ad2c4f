// Sums of four products of bytes, as ARM's processors have them in one instruction.
//
// PERFKIT_DOTS: 0 without them, 1 with those of signed bytes (since ARMv8.4, and most of v8.2), 2 where one may be
// unsigned.
#pragma once

#include "_vector.hpp"

#if PERFKIT_LANES != 4 || !defined(__ARM_FEATURE_DOTPROD)
#define PERFKIT_DOTS 0
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#define PERFKIT_DOTS 2
#else
#define PERFKIT_DOTS 1
#endif

#if PERFKIT_DOTS

namespace perfkit {

// sum + the products of the four signed bytes of each lane.
INLINE Ints add_signed(Ints sum, Ints a, Ints b) {
    return Ints(vdotq_s32(int32x4_t(sum), vreinterpretq_s8_s32(int32x4_t(a)), vreinterpretq_s8_s32(int32x4_t(b))));
}

// The same where those of `a` are unsigned.
INLINE Ints add_unsigned(Ints sum, Ints a, Ints b) {
#if PERFKIT_DOTS == 2
    return Ints(vusdotq_s32(int32x4_t(sum), vreinterpretq_u8_s32(int32x4_t(a)), vreinterpretq_s8_s32(int32x4_t(b))));
#else
    // Read as signed, with the highest bit turned over, each is 128 less.
    const Ints highest = Ints{} + std::int32_t(0x80808080);
    return add_signed(sum, a ^ highest, b) - add_signed(Ints{}, highest, b);
#endif
}

}  // namespace perfkit

#endif

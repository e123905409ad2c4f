// The names of the instructions.
#pragma once

#include "cpu_products.hpp"

namespace perfkit {

// What the products of bfloat16 run on; those of float32 on the vectors of the last name.
inline const char* instructions() {
#if defined(__AVX512BF16__)
    return have_tiles() ? "AMX-BF16, AVX512-BF16, AVX-512" : "AVX512-BF16, AVX-512";
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

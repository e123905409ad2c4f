"""What comes before kernels that multiply bytes, for each instruction path: VNNI's one instruction is emulated, and
ARM's are."""

from pathlib import Path

DPBUSD = """
#include <cstdint>
#include <cstring>
template <class V> V emulated(V sums, V bytes, V signed_bytes) {
    std::int32_t sum[sizeof(V) / 4];
    std::uint8_t a[sizeof(V)];
    std::int8_t b[sizeof(V)];
    std::memcpy(sum, &sums, sizeof(V)), std::memcpy(a, &bytes, sizeof(V)), std::memcpy(b, &signed_bytes, sizeof(V));
    for (unsigned i = 0; i < sizeof(V); ++i) sum[i / 4] += a[i] * b[i];
    std::memcpy(&sums, sum, sizeof(V));
    return sums;
}
#define PERFKIT_DPBUSD emulated
#define _mm512_dpbusd_epi32 emulated
#define _mm256_dpbusd_avx_epi32 emulated
"""
PLAIN = "#undef __AVX2__\n#undef __AVX512VNNI__\n#undef __FMA__\n#undef __FP_FAST_FMAF\n"
DOTPROD = PLAIN + "#define __ARM_NEON 1\n#define __ARM_FEATURE_DOTPROD 1\n"
VARIANTS = {
    "AVX512-VNNI": "#include <immintrin.h>\n#undef __AVX512VNNI__\n#define __AVX512VNNI__ 1\n" + DPBUSD,
    "AVX-VNNI": "#include <immintrin.h>\n#undef __AVX512VNNI__\n#undef __AVXVNNI__\n#define __AVXVNNI__ 1\n" + DPBUSD,
    "AVX2": "#undef __AVX512VNNI__\n#undef __AVXVNNI__\n",
    "NEON-DOTPROD": DOTPROD,
    "NEON-I8MM": DOTPROD + "#define __ARM_FEATURE_MATMUL_INT8 1\n",
    "plain C++": PLAIN,
}
HEADERS = f"-I{Path(__file__).with_name('emulated_neon')}"
"""Where those for ARM find what they include."""

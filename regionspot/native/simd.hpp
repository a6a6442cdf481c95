// A function marked so is compiled for several instruction sets; the best that the processor has is taken when the
// library is loaded. Its results must not depend on which: contraction into fused operations is off (CMakeLists.txt).
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)  // its resolvers run before the sanitizer is ready
#define REGIONSPOT_SIMD_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define REGIONSPOT_SIMD_CLONES
#endif

#if defined(__GNUC__)
#define REGIONSPOT_INLINE inline __attribute__((always_inline))
#else
#define REGIONSPOT_INLINE inline
#endif

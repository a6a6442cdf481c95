// A function marked so is compiled for several instruction sets; the best that the processor has is taken when the
// library is loaded. Its results must not depend on which: contraction into fused operations is off (CMakeLists.txt).
#pragma once

#include <cstddef>  // as any standard header it says whether this is glibc: others have no such functions

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)  // they are chosen before a sanitizer is ready
#define REGIONSPOT_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(memory_sanitizer) || __has_feature(thread_sanitizer)
#define REGIONSPOT_SANITIZED 1
#endif
#endif

#if defined(__clang__)  // earlier ones do not know the names
#define REGIONSPOT_KNOWS_LEVELS (__clang_major__ >= 18)
#elif defined(__GNUC__)
#define REGIONSPOT_KNOWS_LEVELS (__GNUC__ >= 12)
#else
#define REGIONSPOT_KNOWS_LEVELS 0
#endif

#if defined(__x86_64__) && defined(__GLIBC__) && REGIONSPOT_KNOWS_LEVELS && !defined(REGIONSPOT_SANITIZED)
#define REGIONSPOT_SIMD_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define REGIONSPOT_SIMD_CLONES
#endif

#if defined(__GNUC__)
#define REGIONSPOT_INLINE inline __attribute__((always_inline))
#else
#define REGIONSPOT_INLINE inline
#endif

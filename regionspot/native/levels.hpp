// Includes the file that REGIONSPOT_KERNELS names once for each level of an instruction set, in a namespace of its own,
// with REGIONSPOT_LANES and what else depends on the level. REGIONSPOT_BEST(function) is that of the best level which the
// processor has. GCC and Clang only.
//
// Kernels written in vectors need this: a template would be lowered to the baseline's vectors before `target_clones` or
// inlining into a function of a higher level could help. Additions are fused with products where the level can
// (CMakeLists.txt), so that results differ between levels by rounding, as those of any BLAS do.
#include "level.hpp"

#ifndef REGIONSPOT_BEST
#if REGIONSPOT_HAS_LEVELS
#define REGIONSPOT_BEST(function)                                           \
    (::regionspot::best_level() == 4   ? ::regionspot::level_4::function    \
     : ::regionspot::best_level() == 3 ? ::regionspot::level_3::function    \
                                       : ::regionspot::level_1::function)
#else
#define REGIONSPOT_BEST(function) (::regionspot::level_1::function)
#endif
#endif

// Lanes of a vector, and vectors in a row of a tile of accumulators.
#define REGIONSPOT_LANES 4
#define REGIONSPOT_VECTORS 2
namespace regionspot {
namespace {
namespace level_1 {
#include REGIONSPOT_KERNELS
}
}
}
#undef REGIONSPOT_LANES

#if REGIONSPOT_HAS_LEVELS
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#endif
#define REGIONSPOT_LANES 8
namespace regionspot {
namespace {
namespace level_3 {
#include REGIONSPOT_KERNELS
}
}
}
#undef REGIONSPOT_LANES
#undef REGIONSPOT_VECTORS
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#endif
#define REGIONSPOT_LANES 16
#define REGIONSPOT_VECTORS 4
namespace regionspot {
namespace {
namespace level_4 {
#include REGIONSPOT_KERNELS
}
}
}
#undef REGIONSPOT_LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#undef REGIONSPOT_VECTORS
#undef REGIONSPOT_KERNELS

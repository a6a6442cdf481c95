// The instruction set that the kernels of levels.hpp run with: one of x86-64's levels, of which 4 has AVX-512, 3 AVX2 and
// 1 SSE2. Where the compiler knows no levels (simd.hpp), and on other processors, there is level 1 alone, the baseline.
//
// $REGIONSPOT_MAX_LEVEL, such as 3 or v3, keeps to that level and those below it: to test them, or to rule them out.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "simd.hpp"

#if defined(__x86_64__) && REGIONSPOT_KNOWS_LEVELS
#define REGIONSPOT_HAS_LEVELS 1
#else
#define REGIONSPOT_HAS_LEVELS 0
#endif

namespace regionspot {

inline constexpr int kHighestLevel = REGIONSPOT_HAS_LEVELS ? 4 : 1;

// From "3", "v3" or "x86-64-v3"; 0 for anything else.
constexpr int parse_level(std::string_view text) {
    constexpr std::string_view prefix = "x86-64-";
    if (text.substr(0, prefix.size()) == prefix) text.remove_prefix(prefix.size());
    if (!text.empty() && (text[0] == 'v' || text[0] == 'V')) text.remove_prefix(1);
    return text.size() == 1 && text[0] >= '1' && text[0] <= '4' ? text[0] - '0' : 0;
}

// The level that is asked for at most. What cannot be read is ignored, and said so.
inline int most_allowed_level() {
    const char* const asked = std::getenv("REGIONSPOT_MAX_LEVEL");
    if (asked == nullptr || *asked == 0) return kHighestLevel;
    const int level = parse_level(asked);
    if (level == 0) std::fprintf(stderr, "regionspot: REGIONSPOT_MAX_LEVEL=%s is ignored: use 1, 2, 3 or 4\n", asked);
    return level == 0 ? kHighestLevel : level;
}

// The level of this process, chosen when it is first asked for.
inline int best_level() {
#if REGIONSPOT_HAS_LEVELS
    static const int level = [] {
        const int most = most_allowed_level();
        return most >= 4 && __builtin_cpu_supports("x86-64-v4") ? 4 : most >= 3 && __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
    }();
    return level;
#else
    return 1;
#endif
}

}  // namespace regionspot

// Which instruction set $REGIONSPOT_MAX_LEVEL leaves: a value that cannot be read must not silently mean the slowest.
#include "level.hpp"

#include "check.hpp"

#include <cstdlib>

namespace {

void test_values() {
    for (const char* text : {"3", "v3", "V3", "x86-64-v3"}) CHECK(regionspot::parse_level(text) == 3);
    for (const char* text : {"", "v", "0", "5", "33", "avx2", "3 ", "-1", "x86-64-"}) CHECK(regionspot::parse_level(text) == 0);
}

void test_the_environment() {
    ::setenv("REGIONSPOT_MAX_LEVEL", "v1", 1);
    CHECK(regionspot::most_allowed_level() == 1);
    for (const char* unknown : {"", "avx512", "7"}) {
        ::setenv("REGIONSPOT_MAX_LEVEL", unknown, 1);
        CHECK(regionspot::most_allowed_level() == regionspot::kHighestLevel);
    }
    ::setenv("REGIONSPOT_MAX_LEVEL", "v1", 1);
    CHECK(regionspot::best_level() == 1);
}

}  // namespace

int main() {
    test_values();
    test_the_environment();
    return 0;
}

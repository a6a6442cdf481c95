// CHECK(expression): says where an expression does not hold, and ends the test.
#pragma once

#include <cstdio>
#include <cstdlib>

inline void check(bool holds, const char* what, const char* file, int line) {
    if (holds) return;
    std::fprintf(stderr, "%s:%d: %s does not hold\n", file, line, what);
    std::exit(1);
}
#define CHECK(expression) check((expression), #expression, __FILE__, __LINE__)

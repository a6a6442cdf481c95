// A loop on several threads, whose memory runs out at each place in turn: an exception or the work, never an abort.
#include "parallel.hpp"

#include "check.hpp"

#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>

namespace {

std::atomic<int> allocations_left{1 << 30};

}  // namespace

void* operator new(std::size_t size) {
    if (allocations_left.fetch_sub(1) <= 0) throw std::bad_alloc();
    if (void* const memory = std::malloc(size)) return memory;
    throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

void test_memory_runs_out() {
    for (int allowed = 0; allowed < 12; ++allowed) {
        std::atomic<int> done{0};
        bool refused = false;
        allocations_left = allowed;
        try {
            regionspot::parallel_for(100, 8, [&](std::size_t, std::size_t) { ++done; });
        } catch (const std::bad_alloc&) {
            refused = true;
        }
        allocations_left = 1 << 30;
        CHECK(refused ? done == 0 : done == 100);
    }
}

void test_the_first_exception_is_thrown_on() {
    bool caught = false;
    try {
        regionspot::parallel_for(100, 4, [](std::size_t index, std::size_t) {
            if (index == 50) throw std::runtime_error("50");
        });
    } catch (const std::runtime_error&) {
        caught = true;
    }
    CHECK(caught);
}

}  // namespace

int main() {
    test_memory_runs_out();
    test_the_first_exception_is_thrown_on();
    return 0;
}

// A loop over independent pieces of work, on several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace regionspot {

// Calls work(index, thread) for each index in [0, count); `thread` is below `threads` and no two calls at a time share
// one, so that each may have its own buffers. The first exception is thrown on, once all threads have ended.
template <typename Work>
void parallel_for(std::size_t count, std::size_t threads, const Work& work) {
    threads = std::max<std::size_t>(1, std::min(threads, count));
    std::atomic<std::size_t> next{0};
    std::exception_ptr failure;
    std::mutex mutex;
    const auto run = [&](std::size_t thread) {
        try {
            for (std::size_t index; (index = next.fetch_add(1)) < count;) work(index, thread);
        } catch (...) {
            next = count;
            const std::lock_guard lock(mutex);
            if (!failure) failure = std::current_exception();
        }
    };
    std::vector<std::thread> others;
    others.reserve(threads - 1);  // growing could fail once there are threads, which must be joined
    try {
        for (std::size_t thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
    } catch (const std::exception&) {  // no more threads, or no memory for one: those there are do the work
    }
    run(0);
    for (std::thread& other : others) other.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace regionspot

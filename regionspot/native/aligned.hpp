// Memory that begins where a cache line does, so that no vector of a kernel lies in two.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <vector>

namespace regionspot {

constexpr std::size_t kCacheLine = 64;  // bytes
constexpr std::align_val_t kLineAlignment{kCacheLine};

template <typename Value>
struct AlignedAllocator {
    using value_type = Value;

    AlignedAllocator() = default;
    template <typename Other>
    AlignedAllocator(const AlignedAllocator<Other>&) {}  // NOLINT: containers convert them

    Value* allocate(std::size_t count) { return static_cast<Value*>(::operator new(count * sizeof(Value), kLineAlignment)); }
    void deallocate(Value* values, std::size_t) { ::operator delete(values, kLineAlignment); }
    bool operator==(const AlignedAllocator&) const { return true; }
};

using AlignedVector = std::vector<float, AlignedAllocator<float>>;

// Values that are not set to zero: each thread touches first what it fills.
class AlignedFloats {
public:
    explicit AlignedFloats(std::size_t count)
        : values_(static_cast<float*>(::operator new(count * sizeof(float), kLineAlignment))) {}

    [[nodiscard]] float* get() const { return values_.get(); }

private:
    struct Release {
        void operator()(float* values) const { ::operator delete(values, kLineAlignment); }
    };
    std::unique_ptr<float, Release> values_;
};

}  // namespace regionspot

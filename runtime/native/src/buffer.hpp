// Memory for numbers: aligned to a cache line, zero at first.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tarflow::native {

// How many numbers an array of these sizes has. Throws std::bad_alloc where that cannot be counted.
inline std::int64_t product(std::initializer_list<std::int64_t> sizes) {
  std::int64_t count = 1;
  for (const std::int64_t size : sizes)
    if (__builtin_mul_overflow(count, size, &count)) throw std::bad_alloc();
  return count;
}

template <class T>
class Buffer {
 public:
  Buffer() = default;
  // Throws std::bad_alloc.
  explicit Buffer(std::int64_t count) : count_(count) {
    constexpr std::size_t kHuge = std::size_t{2} << 20;
    if (count < 0 || count > std::int64_t{1} << 48) throw std::bad_alloc();
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + 127) / 64 * 64;
    const bool large = bytes >= kHuge;
    void* memory = nullptr;
    if (posix_memalign(&memory, large ? kHuge : 64, bytes) != 0) throw std::bad_alloc();
#if defined(__linux__)
    if (large) madvise(memory, bytes, MADV_HUGEPAGE);  // fewer pages to look up; where there are none, as before
#endif
    std::memset(memory, 0, bytes);
    memory_.reset(static_cast<T*>(memory));
  }

  T* data() { return memory_.get(); }
  const T* data() const { return memory_.get(); }
  std::int64_t count() const { return count_; }
  T* operator+(std::int64_t at) { return memory_.get() + at; }
  const T* operator+(std::int64_t at) const { return memory_.get() + at; }
  T& operator[](std::int64_t at) { return memory_.get()[at]; }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
  std::int64_t count_ = 0;
};

}  // namespace tarflow::native

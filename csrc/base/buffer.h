#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace stmae {

// Uninitialised memory for `count` values, aligned to a cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    if (count < 0 || count > INT64_MAX / 2 / static_cast<int64_t>(sizeof(T))) throw std::bad_alloc();
    memory_.reset(std::aligned_alloc(64, (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64));
    if (!memory_) throw std::bad_alloc();
  }
  T* data() { return static_cast<T*>(memory_.get()); }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
};

}  // namespace stmae

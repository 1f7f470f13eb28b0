#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace stmae {

// Uninitialised memory on a cache line's boundary.
template <typename U>
class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(std::aligned_alloc(64, (std::max<int64_t>(count, 1) * sizeof(U) + 63) / 64 * 64)) {
    if (!memory_) throw std::bad_alloc();
  }
  U* data() { return static_cast<U*>(memory_.get()); }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
};

}  // namespace stmae

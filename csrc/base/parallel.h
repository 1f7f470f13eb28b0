// Parallel loops over torch's threads with memory for each thread. What a body throws, the loop throws.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include <torch/csrc/stable/ops.h>

namespace stmae {

// The first exception of the bodies, which must not leave a thread of the pool: it would end the process.
class FirstException {
 public:
  template <typename Body>
  void guard(const Body& body) noexcept {
    try {
      body();
    } catch (...) {
      if (!taken_.test_and_set()) exception_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (exception_) std::rethrow_exception(exception_);
  }

 private:
  std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
  std::exception_ptr exception_;
};

// body(begin, end) for parts of [0, count) of at least `grain` items.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  FirstException exception;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { exception.guard([&] { body(begin, end); }); });
  exception.rethrow();
}

// How many threads work on `count` items: all, but no more than `grain` items each keep busy.
inline int64_t num_workers(int64_t count, int64_t grain) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>((count + grain - 1) / grain, 1, threads);
}

// Static scheduling: body(worker, begin, end) for `workers` equal parts of [0, count).
template <typename Body>
void parallel_for_static(int64_t count, int64_t workers, const Body& body) {
  parallel_for(workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) body(worker, count * worker / workers, count * (worker + 1) / workers);
  });
}

// Whether [0, count) has enough chunks for dynamic scheduling to even out.
inline bool schedules_dynamically(int64_t count, int64_t chunk, int64_t grain) {
  return (count + chunk - 1) / chunk >= 4 * num_workers(count, grain);
}

// Dynamic scheduling: body(worker, begin, end), worker < num_workers(count, grain), for chunks of [0, count) that a thread takes
// when it is ready, so that one that the system has held up does less. Where there are too few chunks for that, static scheduling.
template <typename Body>
void parallel_for_dynamic(int64_t count, int64_t chunk, int64_t grain, const Body& body) {
  if (count == 0) return;
  const int64_t chunks = (count + chunk - 1) / chunk, workers = num_workers(count, grain);
  if (!schedules_dynamically(count, chunk, grain)) return parallel_for_static(count, workers, body);
  std::atomic<int64_t> next{0};
  parallel_for(workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
      body(worker, i * chunk, std::min(count, (i + 1) * chunk));
  });
}

// Tasks of unlike size, the largest first: body(task), each taken when a thread is ready.
template <typename Body>
void parallel_for_tasks(int64_t count, int64_t workers, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min(count, workers), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
  });
}

}  // namespace stmae

// Splitting work over torch's threads with memory for each piece. A body must not throw: the pool would end the process.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace stmae {

// How many pieces `count` items are split into: one per thread, but no more than `grain` items each ask for.
inline int64_t pieces(int64_t count, int64_t grain) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>((count + grain - 1) / grain, 1, threads);
}

// body(piece, begin, end) for each of `parts` equal pieces of [0, count), in parallel.
template <typename Body>
void for_pieces(int64_t count, int64_t parts, const Body& body) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) body(piece, count * piece / parts, count * (piece + 1) / parts);
  });
}

// Whether there are enough pieces of [0, count) that threads take one after the other as they get ready.
inline bool in_turn(int64_t count, int64_t piece, int64_t grain) {
  return (count + piece - 1) / piece >= 4 * pieces(count, grain);
}

// body(thread, begin, end), thread < pieces(count, grain), for pieces of [0, count) that threads take one after the other as they get
// ready: one that the system has held up does less, and nobody waits for it. Where there are too few pieces for that, each thread
// gets an equal part.
template <typename Body>
void for_pieces_in_turn(int64_t count, int64_t piece, int64_t grain, const Body& body) {
  if (count == 0) return;
  const int64_t turns = (count + piece - 1) / piece, threads = pieces(count, grain);
  if (!in_turn(count, piece, grain)) return for_pieces(count, threads, body);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    for (int64_t turn; (turn = next.fetch_add(1, std::memory_order_relaxed)) < turns;)
      body(thread, turn * piece, std::min(count, (turn + 1) * piece));
  });
}

}  // namespace stmae

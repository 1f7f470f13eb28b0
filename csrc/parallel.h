// Splitting work over torch's threads with memory for each piece. A body must not throw: the pool would end the process.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace stmae {

// How many pieces `count` items are split into: one per thread, none with fewer than `grain` items.
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

}  // namespace stmae

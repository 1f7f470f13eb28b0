// Reductions over rows whose result does not depend on the number of threads: the rows are cut into blocks of a fixed
// size, each block is summed by itself, and the blocks are added in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/check.h"
#include "base/parallel.h"

namespace stmae {

constexpr int64_t kBlockRows = 64;

// body(first_row, end_row, partial) adds its rows into partial[width], which starts at zero; out[width] gets the sum.
template <typename Body>
void sum_over_rows(int64_t rows, int64_t width, float* out, const Body& body) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  std::vector<float> partial(checked_product("sum_over_rows", {blocks, width}), 0.f);
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      body(block * kBlockRows, std::min(rows, (block + 1) * kBlockRows), partial.data() + block * width);
  });
  std::fill(out, out + width, 0.f);
  constexpr int64_t kColumns = 256;
  parallel_for((width + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(width, end * kColumns);
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t i = begin * kColumns; i < last; ++i) out[i] += partial[block * width + i];
  });
}

}  // namespace stmae

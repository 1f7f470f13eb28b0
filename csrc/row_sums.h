// Reductions over rows whose result does not depend on the number of threads: the rows are cut into pieces of a fixed
// size, each piece is summed by itself, and the pieces are added in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>

namespace stmae {

constexpr int64_t kRowsPerPiece = 64;

// body(first_row, end_row, partial) adds its rows into partial[width], which starts at zero; out[width] gets the sum.
template <typename Body>
void sum_over_rows(int64_t rows, int64_t width, float* out, const Body& body) {
  const int64_t pieces = (rows + kRowsPerPiece - 1) / kRowsPerPiece;
  std::vector<float> partial(pieces * width, 0.f);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece)
      body(piece * kRowsPerPiece, std::min(rows, (piece + 1) * kRowsPerPiece), partial.data() + piece * width);
  });
  std::fill(out, out + width, 0.f);
  constexpr int64_t kColumns = 256;
  torch::stable::parallel_for(0, (width + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(width, end * kColumns);
    for (int64_t piece = 0; piece < pieces; ++piece)
      for (int64_t i = begin * kColumns; i < last; ++i) out[i] += partial[piece * width + i];
  });
}

}  // namespace stmae

// Sequences that lie one after another: sequence s is the rows [offset[s], offset[s + 1]) of what holds all of them.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "base/check.h"

namespace stmae {

// The offsets in cu_seqlens [S + 1] int32 or int64: from 0, ascending (an empty sequence repeats one), up to the `total` rows.
inline std::vector<int64_t> sequence_offsets(const char* op, const char* name, const torch::stable::Tensor& cu_seqlens,
                                             int64_t total, const char* rows) {
  check_tensor(op, name, cu_seqlens, {kAny}, {ScalarType::Int, ScalarType::Long});
  const int64_t count = cu_seqlens.size(0), stride = cu_seqlens.stride(0);
  STMAE_CHECK(count > 0, op, ": expected ", name, " [S + 1], got [0]");
  std::vector<int64_t> offsets(count);
  if (cu_seqlens.scalar_type() == ScalarType::Int) {
    for (int64_t i = 0; i < count; ++i) offsets[i] = cu_seqlens.const_data_ptr<int32_t>()[i * stride];
  } else {
    for (int64_t i = 0; i < count; ++i) offsets[i] = cu_seqlens.const_data_ptr<int64_t>()[i * stride];
  }
  STMAE_CHECK(offsets[0] == 0, op, ": expected ", name, " to start at 0, got ", offsets[0]);
  for (int64_t i = 1; i < count; ++i)
    STMAE_CHECK(offsets[i] >= offsets[i - 1], op, ": expected ", name, " ascending, got ", offsets[i], " after ", offsets[i - 1],
                " at [", i, "]");
  STMAE_CHECK(offsets.back() == total, op, ": expected ", name, " to end at the ", total, " rows of ", rows, ", got ",
              offsets.back());
  return offsets;
}

// Of each row the sequence that it belongs to.
inline std::vector<int32_t> sequence_of_rows(const std::vector<int64_t>& offsets) {
  std::vector<int32_t> sequence(offsets.back());
  for (size_t s = 0; s + 1 < offsets.size(); ++s)
    for (int64_t row = offsets[s]; row < offsets[s + 1]; ++row) sequence[row] = static_cast<int32_t>(s);
  return sequence;
}

// Token ids are numbered through all sequences; those of a sequence must be tokens of its own.
inline void check_own_tokens(const char* op, const char* name, const int64_t* ids, int64_t stride,
                             const std::vector<int64_t>& offsets, const std::vector<int64_t>& first_tokens) {
  for (size_t s = 0; s + 1 < offsets.size(); ++s)
    for (int64_t i = offsets[s]; i < offsets[s + 1]; ++i) {
      const int64_t id = ids[i * stride];
      STMAE_CHECK(id >= first_tokens[s] && id < first_tokens[s + 1], op, ": expected ", name, " of sequence ", s, " in [",
                  first_tokens[s], ", ", first_tokens[s + 1], "), got ", id, " at [", i, "]");
    }
}

}  // namespace stmae

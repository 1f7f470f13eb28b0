// Token ids: checked on the way in, and turned around for kernels that walk over all tokens.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>

#include <torch/csrc/stable/tensor.h>

#include "base/buffer.h"
#include "base/check.h"
#include "base/parallel.h"

namespace stmae {

// Checks ids [batch, any number] int64. inverse[b * num_tokens + n] is the i with ids[b, i] == n, or -1 where there is none. Throws at an id out of range or repeated.
inline Buffer<int32_t> inverse_ids(const char* op, const char* name, const torch::stable::Tensor& ids, int64_t batch,
                                   int64_t num_tokens) {
  check_tensor(op, name, ids, {batch, kAny}, ScalarType::Long);
  const int64_t rows = ids.size(0), count = ids.size(1), row_stride = ids.stride(0), stride = ids.stride(1);
  STMAE_CHECK(num_tokens >= 0 && num_tokens <= std::numeric_limits<int32_t>::max(), op, ": expected fewer than 2^31 tokens, got ",
              num_tokens);
  const int64_t* data = ids.const_data_ptr<int64_t>();
  Buffer<int32_t> inverse(checked_product(op, {rows, num_tokens}));
  const int64_t none = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_bad{none};  // flat position of the first id that is wrong, whichever thread finds it
  parallel_for(rows, std::max<int64_t>(1, 65536 / (num_tokens + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int32_t* index = inverse.data() + row * num_tokens;
      std::fill_n(index, num_tokens, -1);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t id = data[row * row_stride + i * stride];
        if (static_cast<uint64_t>(id) < static_cast<uint64_t>(num_tokens) && index[id] < 0) {
          index[id] = static_cast<int32_t>(i);
          continue;
        }
        int64_t seen = first_bad.load();
        while (row * count + i < seen && !first_bad.compare_exchange_weak(seen, row * count + i)) {
        }
        break;
      }
    }
  });
  const int64_t bad = first_bad.load();
  if (bad != none) [[unlikely]] {
    const int64_t row = bad / count, column = bad % count, id = data[row * row_stride + column * stride];
    STMAE_CHECK(id >= 0 && id < num_tokens, op, ": expected ", name, " in [0, ", num_tokens, "), got ", id, " at [", row, ", ",
                column, "]");
    fail(op, ": expected ", name, " without repeats in a row, got ", id, " at [", row, ", ", column, "] and before it");
  }
  return inverse;
}

}  // namespace stmae

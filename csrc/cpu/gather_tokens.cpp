// Copies of rows. The backward writes every row once, gradient or zero.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>

#include "base/token_ids.h"

namespace stmae {
namespace {

using torch::stable::Tensor;

constexpr int64_t kGrainBytes = 1 << 16;  // copied by a thread at least

Tensor gather_tokens(const Tensor& x, const Tensor& ids) {  // x [B, N, D], ids [B, M] -> [B, M, D]
  const char* op = "gather_tokens";
  check_tensor(op, "x", x, {kAny, kAny, kAny}, floating());
  check_dense_rows(op, "x", x);
  check_tensor(op, "ids", ids, {x.size(0), kAny}, ScalarType::Long);
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2), M = ids.size(1);
  Tensor out = torch::stable::new_empty(x, {B, M, D});
  inverse_ids(op, "ids", ids, B, N);
  if (out.numel() == 0) return out;
  const int64_t item = static_cast<int64_t>(x.element_size()), row = D * item;
  const int64_t batch_stride = x.stride(0) * item, token_stride = x.stride(1) * item;
  const int64_t id_batch_stride = ids.stride(0), id_stride = ids.stride(1);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  const int64_t* id = ids.const_data_ptr<int64_t>();
  char* to = static_cast<char*>(out.mutable_data_ptr());
  parallel_for(B * M, std::max<int64_t>(1, kGrainBytes / (row + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / M;
      std::memcpy(to + i * row, from + b * batch_stride + id[b * id_batch_stride + i % M * id_stride] * token_stride, row);
    }
  });
  return out;
}

Tensor gather_tokens_backward(const Tensor& grad_out, const Tensor& ids, int64_t num_tokens) {  // [B, M, D] -> [B, N, D]
  const char* op = "gather_tokens_backward";
  check_tensor(op, "grad_out", grad_out, {kAny, kAny, kAny}, floating());
  check_dense_rows(op, "grad_out", grad_out);
  check_tensor(op, "ids", ids, {grad_out.size(0), grad_out.size(1)}, ScalarType::Long);
  STMAE_CHECK(num_tokens >= 0, op, ": expected num_tokens of at least 0, got ", num_tokens);
  const int64_t B = grad_out.size(0), N = num_tokens, D = grad_out.size(2);
  Tensor grad_x = torch::stable::new_empty(grad_out, {B, N, D});
  auto inverse = inverse_ids(op, "ids", ids, B, N);
  if (grad_x.numel() == 0) return grad_x;
  const int32_t* index = inverse.data();
  const int64_t item = static_cast<int64_t>(grad_out.element_size()), row = D * item;
  const int64_t batch_stride = grad_out.stride(0) * item, token_stride = grad_out.stride(1) * item;
  const char* from = static_cast<const char*>(grad_out.const_data_ptr());
  char* to = static_cast<char*>(grad_x.mutable_data_ptr());
  parallel_for(B * N, std::max<int64_t>(1, kGrainBytes / (row + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (index[i] < 0) {
        std::memset(to + i * row, 0, row);
      } else {
        std::memcpy(to + i * row, from + i / N * batch_stride + index[i] * token_stride, row);
      }
    }
  });
  return grad_x;
}

STABLE_TORCH_LIBRARY_IMPL(stmae, CPU, m) {
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens));
  m.impl("gather_tokens_backward", TORCH_BOX(&gather_tokens_backward));
}

}  // namespace
}  // namespace stmae

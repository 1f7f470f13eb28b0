// One pass over the decoder's tokens. A token's row of positions is read once and serves the full batch; in the backward,
// one read of the gradient gives all three gradients.
#ifdef STMAE_ISA

namespace stmae::STMAE_ISA {

template <typename T, typename O>
static void restore(const Restore& r, int64_t begin, int64_t end) {
  const T* tokens = static_cast<const T*>(r.tokens);
  const O* mask_token = static_cast<const O*>(r.mask_token);
  const int64_t D = r.D, full = D / kLanes * kLanes;
  const int tail = static_cast<int>(D - full);
  for (int64_t n = begin; n < end; ++n) {
    const O* position = static_cast<const O*>(r.position) + n * D;
    for (int64_t b = 0; b < r.B; ++b) {
      O* out = static_cast<O*>(r.out) + (b * r.N + n) * D;
      const int32_t index = r.inverse[b * r.N + n];
      if (index < 0) {
        for (int64_t d = 0; d < full; d += kLanes) store(out + d, load(mask_token + d) + load(position + d));
        if (tail) store(out + full, load(mask_token + full, tail) + load(position + full, tail), tail);
      } else {
        const T* token = tokens + b * r.batch_stride + index * r.token_stride;
        for (int64_t d = 0; d < full; d += kLanes) store(out + d, load(token + d) + load(position + d));
        if (tail) store(out + full, load(token + full, tail) + load(position + full, tail), tail);
      }
    }
  }
}

static void restore_rows(const Restore& r, int64_t begin, int64_t end) {
  if (r.out_float) {
    r.tokens_float ? restore<float, float>(r, begin, end) : restore<bf16, float>(r, begin, end);
  } else {
    restore<bf16, bf16>(r, begin, end);
  }
}

// Tokens [begin, end): their gradient of position, and their part of the mask token's, in mask_part [D].
template <typename O, typename T>
static void restore_backward(const RestoreBackward& r, float* mask_part, int64_t begin, int64_t end) {
  constexpr int kVectors = 4;  // columns taken at a time, so that a row is read in long runs
  const int64_t D = r.D;
  const O* grad_out = static_cast<const O*>(r.grad_out);
  for (int64_t d = 0; d < D; ++d) mask_part[d] = 0.f;
  for (int64_t n = begin; n < end; ++n) {
    O* grad_position = static_cast<O*>(r.grad_position) + n * D;
    int64_t d = 0;
    for (; d + kVectors * kLanes <= D; d += kVectors * kLanes) {
      vec all[kVectors], masked[kVectors];
      for (int j = 0; j < kVectors; ++j) all[j] = masked[j] = zero();
      for (int64_t b = 0; b < r.B; ++b) {
        const O* grad = grad_out + b * r.batch_stride + n * r.token_stride + d;
        const int32_t index = r.inverse[b * r.N + n];
        if (index < 0) {
          for (int j = 0; j < kVectors; ++j) {
            const vec g = load(grad + j * kLanes);
            all[j] = all[j] + g;
            masked[j] = masked[j] + g;
          }
        } else {
          T* grad_token = static_cast<T*>(r.grad_tokens) + (b * r.K + index) * D + d;
          for (int j = 0; j < kVectors; ++j) {
            const vec g = load(grad + j * kLanes);
            all[j] = all[j] + g;
            store(grad_token + j * kLanes, g);
          }
        }
      }
      for (int j = 0; j < kVectors; ++j) {
        store(grad_position + d + j * kLanes, all[j]);
        store(mask_part + d + j * kLanes, load(mask_part + d + j * kLanes) + masked[j]);
      }
    }
    for (; d < D; d += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, D - d));
      vec all = zero(), masked = zero();
      for (int64_t b = 0; b < r.B; ++b) {
        const vec g = load(grad_out + b * r.batch_stride + n * r.token_stride + d, lanes);
        const int32_t index = r.inverse[b * r.N + n];
        all = all + g;
        if (index < 0) {
          masked = masked + g;
        } else {
          store(static_cast<T*>(r.grad_tokens) + (b * r.K + index) * D + d, g, lanes);
        }
      }
      store(grad_position + d, all, lanes);
      store(mask_part + d, load(mask_part + d, lanes) + masked, lanes);
    }
  }
}

static void restore_backward_rows(const RestoreBackward& r, float* mask_part, int64_t begin, int64_t end) {
  if (r.out_float) {
    r.tokens_float ? restore_backward<float, float>(r, mask_part, begin, end)
                   : restore_backward<float, bf16>(r, mask_part, begin, end);
  } else {
    r.tokens_float ? restore_backward<bf16, float>(r, mask_part, begin, end)
                   : restore_backward<bf16, bf16>(r, mask_part, begin, end);
  }
}

}  // namespace stmae::STMAE_ISA

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "base/token_ids.h"

namespace stmae {

struct Restore {
  const void *tokens, *mask_token, *position;  // [B, K, D], [D], [N, D]
  const int32_t* inverse;                      // [B, N]
  void* out;                                   // [B, N, D]
  int64_t B, N, D, batch_stride, token_stride;
  bool tokens_float, out_float;
};

struct RestoreBackward {
  const void* grad_out;               // [B, N, D]
  const int32_t* inverse;             // [B, N]
  void *grad_tokens, *grad_position;  // [B, K, D], [N, D]
  int64_t B, N, K, D, batch_stride, token_stride;
  bool tokens_float, out_float;
};

}  // namespace stmae

#define STMAE_KERNEL_FILE "cpu/restore_tokens.cpp"
#include "base/for_each_isa.h"

namespace stmae {
namespace {

using torch::stable::Tensor;

Tensor restore_tokens(const Tensor& tokens, const Tensor& keep, const Tensor& mask_token, const Tensor& position) {
  const char* op = "restore_tokens";
  check_contiguous_tensor(op, "position", position, {kAny, kAny}, floating());
  check_tensor(op, "tokens", tokens, {kAny, kAny, position.size(1)}, floating());
  check_dense_rows(op, "tokens", tokens);
  check_tensor(op, "keep", keep, {tokens.size(0), tokens.size(1)}, ScalarType::Long);
  check_contiguous_tensor(op, "mask_token", mask_token, {position.size(1)}, position.scalar_type());
  STMAE_CHECK(tokens.scalar_type() == ScalarType::BFloat16 || position.scalar_type() == ScalarType::Float, op,
              ": expected position float32 for tokens float32, got ", dtype_name(position.scalar_type()));
  const int64_t B = tokens.size(0), N = position.size(0), D = position.size(1);
  Tensor out = torch::stable::new_empty(position, {B, N, D});
  auto inverse = inverse_ids(op, "keep", keep, B, N);
  if (out.numel() == 0) return out;
  const Restore r{tokens.const_data_ptr(),
                  mask_token.const_data_ptr(),
                  position.const_data_ptr(),
                  inverse.data(),
                  out.mutable_data_ptr(),
                  B,
                  N,
                  D,
                  tokens.stride(0),
                  tokens.stride(1),
                  tokens.scalar_type() == ScalarType::Float,
                  out.scalar_type() == ScalarType::Float};
  const int64_t grain = std::max<int64_t>(1, 16384 / (B * D + 1));
  parallel_for(N, grain, [&](int64_t begin, int64_t end) { STMAE_DISPATCH(restore_rows, r, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> restore_tokens_backward(const Tensor& grad_out, const Tensor& keep, ScalarType tokens_dtype) {
  const char* op = "restore_tokens_backward";
  check_tensor(op, "grad_out", grad_out, {kAny, kAny, kAny}, floating());
  check_dense_rows(op, "grad_out", grad_out);
  check_tensor(op, "keep", keep, {grad_out.size(0), kAny}, ScalarType::Long);
  const bool tokens_float = is_float32(op, tokens_dtype);
  const int64_t B = grad_out.size(0), N = grad_out.size(1), D = grad_out.size(2), K = keep.size(1);
  Tensor grad_tokens = torch::stable::new_empty(grad_out, {B, K, D}, tokens_dtype);
  Tensor grad_mask_token = torch::stable::new_empty(grad_out, {D});
  Tensor grad_position = torch::stable::new_empty(grad_out, {N, D});
  auto inverse = inverse_ids(op, "keep", keep, B, N);
  if (B == 0 || D == 0 || N == 0) {
    torch::stable::zero_(grad_mask_token);
    torch::stable::zero_(grad_position);
    return {grad_tokens, grad_mask_token, grad_position};
  }
  const RestoreBackward r{grad_out.const_data_ptr(),
                          inverse.data(),
                          grad_tokens.mutable_data_ptr(),
                          grad_position.mutable_data_ptr(),
                          B,
                          N,
                          K,
                          D,
                          grad_out.stride(0),
                          grad_out.stride(1),
                          tokens_float,
                          grad_out.scalar_type() == ScalarType::Float};
  // The mask token's gradient sums over nearly all tokens: over the batch, over the tokens of a block, over blocks. Blocks
  // depend on the shape alone, so the result is the same at any number of threads.
  const int64_t block = 32, blocks = (N + block - 1) / block;
  Buffer<float> parts(checked_product(op, {blocks, D}));
  const int64_t grain = std::max<int64_t>(1, 16384 / (block * B * D + 1));
  parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      STMAE_DISPATCH(restore_backward_rows, r, parts.data() + i * D, i * block, std::min(N, (i + 1) * block));
  });
  std::vector<double> sum(D, 0.);
  for (int64_t i = 0; i < blocks; ++i)
    for (int64_t d = 0; d < D; ++d) sum[d] += parts.data()[i * D + d];
  for (int64_t d = 0; d < D; ++d) {
    if (r.out_float) {
      grad_mask_token.mutable_data_ptr<float>()[d] = static_cast<float>(sum[d]);
    } else {
      grad_mask_token.mutable_data_ptr<c10::BFloat16>()[d] = static_cast<float>(sum[d]);
    }
  }
  return {grad_tokens, grad_mask_token, grad_position};
}

STABLE_TORCH_LIBRARY_IMPL(stmae, CPU, m) {
  m.impl("restore_tokens", TORCH_BOX(&restore_tokens));
  m.impl("restore_tokens_backward", TORCH_BOX(&restore_tokens_backward));
}

}  // namespace
}  // namespace stmae

#endif

// The target is read from the video one patch at a time, into the first-level cache, and compared there with the prediction:
// what moves through memory is the prediction once and the video's bytes once, in the forward and again in the backward.
#ifdef STMAE_ISA

#include "simd/vector_loop.h"
#include "simd/read_patch.h"

namespace stmae::STMAE_ISA {

// The patch's pixels as floats, normalised if they are bytes. Returns their sum.
template <typename T>
static float read_target(const PatchLoss& l, int64_t index, float* target) {
  const int64_t b = index / l.M, token = l.token(index);
  T* raw = reinterpret_cast<T*>(target + (std::is_same_v<T, float> ? 0 : l.P));
  read_channels_last(l.patches, b, token, raw);
  if (index + 1 < l.count) prefetch_patch<T>(l.patches, (index + 1) / l.M, l.token(index + 1));
  Accumulators sums = zero_accumulators();
  each_vector_unrolled(l.P, [&](int64_t i, auto lanes, int accumulator) STMAE_INLINE_BODY {
    vec x = load(raw + i, lanes);
    if constexpr (std::is_same_v<T, uint8_t>) x = keep_first(fma(x, load(l.scale + i, lanes), load(l.shift + i, lanes)), lanes);
    if constexpr (!std::is_same_v<T, float>) store(target + i, x, lanes);
    sums.v[accumulator] = sums.v[accumulator] + x;
  });
  return sum(sums);
}

template <typename T, typename Pred>
static void loss_range(const PatchLoss& l, float* target, int64_t begin, int64_t end) {
  const int64_t P = l.P;
  for (int64_t i = begin; i < end; ++i) {
    const Pred* pred = static_cast<const Pred*>(l.pred) + i / l.M * l.pred_batch + i % l.M * l.pred_token;
    float mean = read_target<T>(l, i, target) / P, rstd = 1.f;
    if (l.normalize) {
      // Deviations from a mean that is off by its rounding: what they sum to corrects the mean, and the variance.
      Accumulators off = zero_accumulators(), squares = zero_accumulators();
      each_vector_unrolled(P, [&](int64_t d, auto lanes, int accumulator) STMAE_INLINE_BODY {
        const vec x = keep_first(load(target + d, lanes) - set(mean), lanes);
        off.v[accumulator] = off.v[accumulator] + x;
        squares.v[accumulator] = fma(x, x, squares.v[accumulator]);
      });
      const float rest = sum(off);
      mean += rest / P;
      rstd = 1.f / std::sqrt(std::max(0.f, sum(squares) - rest * rest / P) / (P - 1) + 1e-6f);
    } else {
      mean = 0.f;
    }
    Accumulators error = zero_accumulators();
    each_vector_unrolled(P, [&](int64_t d, auto lanes, int accumulator) STMAE_INLINE_BODY {
      const vec x = (load(target + d, lanes) - set(mean)) * set(rstd);
      const vec e = keep_first(load(pred + d, lanes) - x, lanes);
      error.v[accumulator] = fma(e, e, error.v[accumulator]);
    });
    l.loss[i] = sum(error) / P;
    l.patch_mean[i] = mean;
    l.patch_rstd[i] = rstd;
  }
}

template <typename T, typename Pred>
static void loss_backward_range(const PatchLoss& l, float* target, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / l.M, m = i % l.M;
    const Pred* pred = static_cast<const Pred*>(l.pred) + b * l.pred_batch + m * l.pred_token;
    Pred* grad_pred = static_cast<Pred*>(l.grad_pred) + i * l.P;
    read_target<T>(l, i, target);
    const vec mean = set(l.patch_mean[i]), rstd = set(l.patch_rstd[i]);
    const vec factor = set(2.f / l.P * l.grad_loss[b * l.grad_batch + m * l.grad_token]);
    each_vector(l.P, [&](int64_t d, auto lanes) STMAE_INLINE_BODY {
      const vec x = (load(target + d, lanes) - mean) * rstd;
      store(grad_pred + d, (load(pred + d, lanes) - x) * factor, lanes);
    });
  }
}

template <typename T>
static void patch_loss_of(const PatchLoss& l, float* target, int64_t begin, int64_t end) {
  if (l.grad_pred) {
    l.pred_float ? loss_backward_range<T, float>(l, target, begin, end) : loss_backward_range<T, bf16>(l, target, begin, end);
  } else {
    l.pred_float ? loss_range<T, float>(l, target, begin, end) : loss_range<T, bf16>(l, target, begin, end);
  }
}

static void patch_loss_range(const PatchLoss& l, float* target, int64_t begin, int64_t end) {
  switch (l.patches.pixel) {
    case Pixel::uint8: return patch_loss_of<uint8_t>(l, target, begin, end);
    case Pixel::bfloat16: return patch_loss_of<bf16>(l, target, begin, end);
    case Pixel::float32: return patch_loss_of<float>(l, target, begin, end);
  }
}

}  // namespace stmae::STMAE_ISA

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>
#include <type_traits>

#include "base/buffer.h"
#include "base/check.h"
#include "base/parallel.h"
#include "base/token_ids.h"
#include "base/patches.h"

namespace stmae {

struct PatchLoss {
  const void* pred;       // [B, M, P]
  const int64_t* masked;  // [B, M]
  int64_t count, M, P, pred_batch, pred_token, masked_batch, masked_token;
  bool pred_float, normalize;
  Patches patches;
  const float *scale, *shift;             // [P], each channel's repeated
  float *loss, *patch_mean, *patch_rstd;  // [B, M]; the backward only reads the last two
  const float* grad_loss;                 // [B, M], null in the forward
  int64_t grad_batch, grad_token;
  void* grad_pred;  // [B, M, P], null in the forward

  int64_t token(int64_t index) const { return masked[index / M * masked_batch + index % M * masked_token]; }
};

}  // namespace stmae

#define STMAE_KERNEL_FILE "cpu/patch_loss.cpp"
#include "base/for_each_isa.h"

namespace stmae {
namespace {

using torch::stable::Tensor;

struct Values {  // scale and shift for each of the P values of a patch, channels last
  std::vector<float> scale, shift;
  Values() = default;
  Values(const Normalization& channel, int64_t P) : scale(P), shift(P) {
    for (int64_t i = 0; i < P; ++i) {
      scale[i] = channel.scale[i % channel.scale.size()];
      shift[i] = channel.shift[i % channel.shift.size()];
    }
  }
};

// Checks what both passes read. The result points into `values`, which is filled.
PatchLoss describe(const char* op, const Tensor& pred, const Tensor& video, const Tensor& masked,
                   const std::vector<int64_t>& patch_size, const std::vector<int64_t>& frames, const std::vector<double>& mean,
                   const std::vector<double>& std, Values& values) {
  check_tensor(op, "pred", pred, {kAny, kAny, kAny}, floating());
  check_dense_rows(op, "pred", pred);
  check_tensor(op, "masked", masked, {pred.size(0), pred.size(1)}, ScalarType::Long);
  PatchLoss l{};
  l.patches = patches(op, video, pred.size(0), patch_size, &frames);
  STMAE_CHECK(pred.size(2) == l.patches.values(), op, ": expected pred [B, M, ", l.patches.values(), "], got ", shape(pred));
  values = Values(Normalization(op, mean, std, l.patches.C), l.patches.values());
  l.pred = pred.const_data_ptr();
  l.masked = masked.const_data_ptr<int64_t>();
  l.count = masked.numel();
  l.M = pred.size(1);
  l.P = pred.size(2);
  l.pred_batch = pred.stride(0);
  l.pred_token = pred.stride(1);
  l.masked_batch = masked.stride(0);
  l.masked_token = masked.stride(1);
  l.pred_float = pred.scalar_type() == ScalarType::Float;
  l.scale = values.scale.data();
  l.shift = values.shift.data();
  inverse_ids(op, "masked", masked, pred.size(0), l.patches.tokens());
  return l;
}

void run(const PatchLoss& l) {
  if (l.count == 0) return;
  const int64_t workers = num_workers(l.count, std::max<int64_t>(1, 16384 / l.P));
  const int64_t scratch = (2 * l.P + 31) / 16 * 16;  // the target, and the same as the video stores it
  Buffer<float> target(workers * scratch);
  parallel_for_static(l.count, workers, [&](int64_t worker, int64_t begin, int64_t end) {
    STMAE_DISPATCH(patch_loss_range, l, target.data() + worker * scratch, begin, end);
  });
}

std::tuple<Tensor, Tensor, Tensor> patch_loss(const Tensor& pred, const Tensor& video, const Tensor& masked,
                                              std::vector<int64_t> patch_size, std::vector<int64_t> frames, bool normalize,
                                              std::vector<double> mean, std::vector<double> std) {
  const char* op = "patch_loss";
  Values values;
  PatchLoss l = describe(op, pred, video, masked, patch_size, frames, mean, std, values);
  STMAE_CHECK(!normalize || l.P > 1, op, ": expected at least 2 values in a patch to normalise, got ", l.P);
  Tensor loss = torch::stable::new_empty(pred, masked.sizes(), ScalarType::Float);
  Tensor patch_mean = torch::stable::new_empty(pred, masked.sizes(), ScalarType::Float);
  Tensor patch_rstd = torch::stable::new_empty(pred, masked.sizes(), ScalarType::Float);
  l.normalize = normalize;
  l.loss = loss.mutable_data_ptr<float>();
  l.patch_mean = patch_mean.mutable_data_ptr<float>();
  l.patch_rstd = patch_rstd.mutable_data_ptr<float>();
  run(l);
  return {loss, patch_mean, patch_rstd};
}

Tensor patch_loss_backward(const Tensor& grad_loss, const Tensor& pred, const Tensor& video, const Tensor& masked,
                           const Tensor& patch_mean, const Tensor& patch_rstd, std::vector<int64_t> patch_size,
                           std::vector<int64_t> frames, std::vector<double> mean, std::vector<double> std) {
  const char* op = "patch_loss_backward";
  Values values;
  PatchLoss l = describe(op, pred, video, masked, patch_size, frames, mean, std, values);
  check_tensor(op, "grad_loss", grad_loss, sizes_of(masked), ScalarType::Float);
  check_contiguous_tensor(op, "patch_mean", patch_mean, sizes_of(masked), ScalarType::Float);
  check_contiguous_tensor(op, "patch_rstd", patch_rstd, sizes_of(masked), ScalarType::Float);
  Tensor grad_pred = torch::stable::new_empty(pred, pred.sizes());
  l.patch_mean = const_cast<float*>(patch_mean.const_data_ptr<float>());
  l.patch_rstd = const_cast<float*>(patch_rstd.const_data_ptr<float>());
  l.grad_loss = grad_loss.const_data_ptr<float>();
  l.grad_batch = grad_loss.stride(0);
  l.grad_token = grad_loss.stride(1);
  l.grad_pred = grad_pred.mutable_data_ptr();
  run(l);
  return grad_pred;
}

STABLE_TORCH_LIBRARY_IMPL(stmae, CPU, m) {
  m.impl("patch_loss", TORCH_BOX(&patch_loss));
  m.impl("patch_loss_backward", TORCH_BOX(&patch_loss_backward));
}

}  // namespace
}  // namespace stmae

#endif

// Residual sum and LayerNorm in one pass: sum = x + branch, out = (sum - mean) * rstd * weight + bias, per row.
#ifdef STMAE_ISA

namespace stmae::STMAE_ISA {
namespace {

// One row of `width`; a row fits the first-level cache, so the three passes read memory once.
template <typename TX, typename TB, typename TO>
void add_layer_norm_row(const TX* x, const TB* branch, const float* weight, const float* bias, float eps, int64_t width,
                        TX* sum_out, TO* out, float* mean_out, float* rstd_out) {
  const int64_t full = width - width % kLanes;
  const int rest = static_cast<int>(width - full);
  vec total = zero();
  for (int64_t i = 0; i < full; i += kLanes) {
    store(sum_out + i, load(x + i) + load(branch + i));
    total = total + load(sum_out + i);  // as stored: in bfloat16, the statistics are those of the rounded sum
  }
  if (rest) {
    store(sum_out + full, load(x + full, rest) + load(branch + full, rest), rest);
    total = total + load(sum_out + full, rest);
  }
  float mean = sum(total) / width;
  vec rest_of_mean = zero();  // what the rounding of the first sum left; counts for rows far from zero
  for (int64_t i = 0; i < full; i += kLanes) rest_of_mean = rest_of_mean + (load(sum_out + i) - set(mean));
  float left = sum(rest_of_mean);
  for (int64_t i = full; i < width; ++i) left += static_cast<float>(sum_out[i]) - mean;
  mean += left / width;
  vec squares = zero();
  for (int64_t i = 0; i < full; i += kLanes) {
    const vec d = load(sum_out + i) - set(mean);
    squares = fma(d, d, squares);
  }
  float variance = sum(squares);
  for (int64_t i = full; i < width; ++i) {
    const float d = static_cast<float>(sum_out[i]) - mean;
    variance += d * d;
  }
  const float rstd = 1.f / std::sqrt(variance / width + eps);
  // The mean is subtracted before the scaling: folded into one rounded shift, it would leave mean * rstd * 2^-24 behind.
  const vec scale = set(rstd), centre = set(mean);
  for (int64_t i = 0; i < full; i += kLanes)
    store(out + i, fma((load(sum_out + i) - centre) * scale, load(weight + i), load(bias + i)));
  if (rest) {
    const vec normal = (load(sum_out + full, rest) - centre) * scale;
    store(out + full, fma(normal, load(weight + full, rest), load(bias + full, rest)), rest);
  }
  *mean_out = mean;
  *rstd_out = rstd;
}

// grad = grad_sum + rstd * (g - mean(g) - normal * mean(g * normal)), g = grad_out * weight. Adds to grad_weight and grad_bias.
template <typename TX, typename TB, typename TO>
void add_layer_norm_backward_row(const TX* grad_sum, const TO* grad_out, const TX* x, const float* weight, float mean, float rstd,
                                 int64_t width, TX* grad_x, TB* grad_branch, float* grad_weight, float* grad_bias) {
  const vec scale = set(rstd), centre = set(mean);
  vec total = zero(), dot = zero();
  auto gather = [&](int64_t i, int n) {
    const vec upstream = load(grad_out + i, n), normal = (load(x + i, n) - centre) * scale, g = upstream * load(weight + i, n);
    total = total + g;
    dot = fma(g, normal, dot);
    store(grad_weight + i, fma(upstream, normal, load(grad_weight + i, n)), n);
    store(grad_bias + i, upstream + load(grad_bias + i, n), n);
  };
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) gather(i, kLanes);
  if (i < width) gather(i, static_cast<int>(width - i));
  const vec c1 = set(sum(total) / width), c2 = set(sum(dot) / width);
  auto scatter = [&](int64_t i, int n) {
    const vec normal = (load(x + i, n) - centre) * scale, g = load(grad_out + i, n) * load(weight + i, n);
    vec grad = (g - c1 - normal * c2) * scale;
    if (grad_sum) grad = grad + load(grad_sum + i, n);
    store(grad_x + i, grad, n);
    if (grad_branch) store(grad_branch + i, grad, n);
  };
  for (i = 0; i + kLanes <= width; i += kLanes) scatter(i, kLanes);
  if (i < width) scatter(i, static_cast<int>(width - i));
}

}  // namespace

template <typename TX, typename TB, typename TO>
void add_layer_norm(int64_t begin, int64_t end, const TX* x, const TB* branch, const float* weight, const float* bias, float eps,
                    int64_t width, TX* sum_out, TO* out, float* mean, float* rstd) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = r * width;
    add_layer_norm_row(x + at, branch + at, weight, bias, eps, width, sum_out + at, out + at, mean + r, rstd + r);
  }
}

template <typename TX, typename TB, typename TO>
void add_layer_norm_backward(int64_t begin, int64_t end, const TX* grad_sum, const TO* grad_out, const TX* x, const float* weight,
                             const float* mean, const float* rstd, int64_t width, TX* grad_x, TB* grad_branch, float* partial) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = r * width;
    add_layer_norm_backward_row(grad_sum ? grad_sum + at : nullptr, grad_out + at, x + at, weight, mean[r], rstd[r], width,
                                grad_x + at, grad_branch ? grad_branch + at : nullptr, partial, partial + width);
  }
}

}  // namespace stmae::STMAE_ISA

#else

#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "base/check.h"
#include "base/sum_over_rows.h"

#define STMAE_KERNEL_FILE "cpu/add_layer_norm.cpp"
#include "base/for_each_isa.h"

namespace stmae {
namespace {

using torch::stable::Tensor;

// Calls action(TX*, TB*, TO*) with null pointers of the three element types.
template <typename Action>
void with_types(ScalarType x, ScalarType branch, ScalarType out, const Action& action) {
  auto pick = [](ScalarType type, const auto& next) {
    if (is_float32("add_layer_norm", type))
      next(static_cast<float*>(nullptr));
    else
      next(static_cast<c10::BFloat16*>(nullptr));
  };
  pick(x, [&](auto* tx) { pick(branch, [&](auto* tb) { pick(out, [&](auto* to) { action(tx, tb, to); }); }); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& branch, const Tensor& weight,
                                                          const Tensor& bias, double eps, ScalarType dtype) {
  const char* op = "add_layer_norm";
  STMAE_CHECK(x.dim() > 0, op, ": expected x [..., D], got a scalar");
  check_contiguous_tensor(op, "x", x, sizes_of(x), floating());
  check_contiguous_tensor(op, "branch", branch, sizes_of(x), floating());
  check_contiguous_tensor(op, "weight", weight, {x.size(x.dim() - 1)}, ScalarType::Float);
  check_contiguous_tensor(op, "bias", bias, {x.size(x.dim() - 1)}, ScalarType::Float);
  is_float32(op, dtype);
  const int64_t width = x.size(x.dim() - 1), rows = width ? x.numel() / width : 0;
  Tensor sum = torch::stable::empty_like(x);
  Tensor out = torch::stable::new_empty(x, x.sizes(), dtype);
  Tensor mean = torch::stable::new_empty(x, {rows}, ScalarType::Float),
         rstd = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  with_types(x.scalar_type(), branch.scalar_type(), dtype, [&](auto* tx, auto* tb, auto* to) {
    using TX = std::remove_pointer_t<decltype(tx)>;
    using TB = std::remove_pointer_t<decltype(tb)>;
    using TO = std::remove_pointer_t<decltype(to)>;
    parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
      STMAE_DISPATCH(add_layer_norm, begin, end, static_cast<const TX*>(x.const_data_ptr()),
                     static_cast<const TB*>(branch.const_data_ptr()), static_cast<const float*>(weight.const_data_ptr()),
                     static_cast<const float*>(bias.const_data_ptr()), static_cast<float>(eps), width,
                     static_cast<TX*>(sum.mutable_data_ptr()), static_cast<TO*>(out.mutable_data_ptr()),
                     static_cast<float*>(mean.mutable_data_ptr()), static_cast<float*>(rstd.mutable_data_ptr()));
    });
  });
  return {sum, out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(const std::optional<Tensor>& grad_sum, const Tensor& grad_out,
                                                                   const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                                                                   const Tensor& weight, ScalarType branch_dtype) {
  const char* op = "add_layer_norm_backward";
  STMAE_CHECK(sum.dim() > 0, op, ": expected sum [..., D], got a scalar");
  check_contiguous_tensor(op, "sum", sum, sizes_of(sum), floating());
  check_contiguous_tensor(op, "grad_out", grad_out, sizes_of(sum), floating());
  if (grad_sum) check_contiguous_tensor(op, "grad_sum", *grad_sum, sizes_of(sum), sum.scalar_type());
  is_float32(op, branch_dtype);
  const int64_t width = sum.size(sum.dim() - 1), rows = width ? sum.numel() / width : 0;
  check_contiguous_tensor(op, "mean", mean, {rows}, ScalarType::Float);
  check_contiguous_tensor(op, "rstd", rstd, {rows}, ScalarType::Float);
  check_contiguous_tensor(op, "weight", weight, {width}, ScalarType::Float);
  const bool separate = branch_dtype != sum.scalar_type();
  Tensor grad_x = torch::stable::empty_like(sum);
  Tensor grad_branch = separate ? torch::stable::new_empty(sum, sum.sizes(), branch_dtype) : torch::stable::new_empty(sum, {0});
  Tensor grad_weight = torch::stable::empty_like(weight), grad_bias = torch::stable::empty_like(weight);
  std::vector<float> both(checked_product(op, {2, width}));
  with_types(sum.scalar_type(), branch_dtype, grad_out.scalar_type(), [&](auto* tx, auto* tb, auto* to) {
    using TX = std::remove_pointer_t<decltype(tx)>;
    using TB = std::remove_pointer_t<decltype(tb)>;
    using TO = std::remove_pointer_t<decltype(to)>;
    sum_over_rows(rows, 2 * width, both.data(), [&](int64_t begin, int64_t end, float* partial) {
      STMAE_DISPATCH(add_layer_norm_backward, begin, end,
                     grad_sum ? static_cast<const TX*>(grad_sum->const_data_ptr()) : static_cast<const TX*>(nullptr),
                     static_cast<const TO*>(grad_out.const_data_ptr()), static_cast<const TX*>(sum.const_data_ptr()),
                     static_cast<const float*>(weight.const_data_ptr()), static_cast<const float*>(mean.const_data_ptr()),
                     static_cast<const float*>(rstd.const_data_ptr()), width, static_cast<TX*>(grad_x.mutable_data_ptr()),
                     separate ? static_cast<TB*>(grad_branch.mutable_data_ptr()) : static_cast<TB*>(nullptr), partial);
    });
  });
  std::copy(both.begin(), both.begin() + width, static_cast<float*>(grad_weight.mutable_data_ptr()));
  std::copy(both.begin() + width, both.end(), static_cast<float*>(grad_bias.mutable_data_ptr()));
  return {grad_x, grad_branch, grad_weight, grad_bias};
}

}  // namespace
}  // namespace stmae

STABLE_TORCH_LIBRARY_IMPL(stmae, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&stmae::add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&stmae::add_layer_norm_backward));
}

#endif

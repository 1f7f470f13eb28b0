// The element-wise half of the MLP: exact GELU, and its backward fused with the recomputed activation and the bias gradient.
#ifdef STMAE_ISA

namespace stmae::STMAE_ISA {
namespace {

struct Gelu {
  vec cdf, density;  // Phi(x) and phi(x), of the standard normal distribution
};

// Phi(x) = 1 - (a1 t + ... + a5 t^5) exp(-x^2 / 2) / 2 for x >= 0, t = 1 / (1 + p x / sqrt 2), absolute error 7.5e-8
// (Abramowitz and Stegun 7.1.26). The one exponential serves Phi and phi. T: what the results are rounded to.
template <typename T>
STMAE_INLINE Gelu gelu_parts(vec x) {
  const vec magnitude = max(x, -x);
  const vec divisor = fma(magnitude, set(0.3275911f * 0.70710678f), set(1.f));
  vec t, e;
#if STMAE_ISA_LEVEL >= 2
  if constexpr (std::is_same_v<T, bf16>) {
    t = reciprocal_for_bfloat16(divisor);
    e = exp2_for_bfloat16(x * x * set(-0.5f * 1.44269504f));
  } else
#endif
  {
    t = set(1.f) / divisor;
    e = exp(x * x * set(-0.5f));
  }
  vec poly = fma(t, set(1.061405429f), set(-1.453152027f));
  poly = fma(poly, t, set(1.421413741f));
  poly = fma(poly, t, set(-0.284496736f));
  poly = fma(poly, t, set(0.254829592f)) * t;
  const vec tail = poly * e * set(0.5f);  // Phi(-|x|)
  return {select_negative(x, tail, set(1.f) - tail), e * set(0.39894228f)};
}

}  // namespace

template <typename T>
void gelu(const T* hidden, T* out, int64_t count) {
  auto body = [&](int64_t i, int n) {
    const vec x = load(hidden + i, n);
    store(out + i, x * gelu_parts<T>(x).cdf, n);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, kLanes);
  if (i < count) body(i, static_cast<int>(count - i));
}

// Rows [begin, end) of [*, width]: activation, gradient of hidden, and the gradient's column sums added to `columns`.
template <typename T>
void gelu_backward(int64_t begin, int64_t end, int64_t width, const T* hidden, const T* grad, T* activation, T* grad_hidden,
                   float* columns) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = r * width;
    auto body = [&](int64_t i, int n) {
      const vec x = load(hidden + at + i, n);
      const Gelu g = gelu_parts<T>(x);
      store(activation + at + i, x * g.cdf, n);
      store(grad_hidden + at + i, load(grad + at + i, n) * fma(x, g.density, g.cdf), n);
      store(columns + i, load(columns + i, n) + load(grad_hidden + at + i, n), n);
    };
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) body(i, kLanes);
    if (i < width) body(i, static_cast<int>(width - i));
  }
}

template <typename T>
void column_sum(int64_t begin, int64_t end, int64_t width, const T* x, float* columns) {
  for (int64_t r = begin; r < end; ++r) {
    const T* row = x + r * width;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(columns + i, load(columns + i) + load(row + i));
    if (i < width) {
      const int n = static_cast<int>(width - i);
      store(columns + i, load(columns + i, n) + load(row + i, n), n);
    }
  }
}

}  // namespace stmae::STMAE_ISA

#else

#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "base/check.h"
#include "base/sum_over_rows.h"

#define STMAE_KERNEL_FILE "cpu/mlp.cpp"
#include "base/for_each_isa.h"

namespace stmae {
namespace {

using torch::stable::Tensor;

template <typename Action>
void with_type(const Tensor& x, const Action& action) {
  if (x.scalar_type() == ScalarType::BFloat16)
    action(static_cast<c10::BFloat16*>(nullptr));
  else
    action(static_cast<float*>(nullptr));
}

Tensor gelu(const Tensor& hidden) {
  check_contiguous_tensor("gelu", "hidden", hidden, sizes_of(hidden), floating());
  Tensor out = torch::stable::empty_like(hidden);
  with_type(hidden, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kChunk = 4096;  // a multiple of every vector length: results do not depend on the threads
    const int64_t count = hidden.numel();
    parallel_for((count + kChunk - 1) / kChunk, 4, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kChunk;
      STMAE_DISPATCH(gelu<T>, static_cast<const T*>(hidden.const_data_ptr()) + first,
                     static_cast<T*>(out.mutable_data_ptr()) + first, std::min(count, end * kChunk) - first);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gelu_backward(const Tensor& hidden, const Tensor& grad) {
  const char* op = "gelu_backward";
  check_contiguous_tensor(op, "hidden", hidden, {kAny, kAny}, floating());
  check_contiguous_tensor(op, "grad", grad, sizes_of(hidden), hidden.scalar_type());
  const int64_t rows = hidden.size(0), width = hidden.size(1);
  Tensor activation = torch::stable::empty_like(hidden), grad_hidden = torch::stable::empty_like(hidden);
  Tensor columns = torch::stable::new_empty(hidden, {width}, ScalarType::Float);
  with_type(hidden, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    sum_over_rows(rows, width, static_cast<float*>(columns.mutable_data_ptr()), [&](int64_t begin, int64_t end, float* partial) {
      STMAE_DISPATCH(gelu_backward<T>, begin, end, width, static_cast<const T*>(hidden.const_data_ptr()),
                     static_cast<const T*>(grad.const_data_ptr()), static_cast<T*>(activation.mutable_data_ptr()),
                     static_cast<T*>(grad_hidden.mutable_data_ptr()), partial);
    });
  });
  return {activation, grad_hidden, columns};
}

Tensor column_sum(const Tensor& x) {
  check_contiguous_tensor("column_sum", "x", x, {kAny, kAny}, floating());
  const int64_t rows = x.size(0), width = x.size(1);
  Tensor columns = torch::stable::new_empty(x, {width}, ScalarType::Float);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    sum_over_rows(rows, width, static_cast<float*>(columns.mutable_data_ptr()), [&](int64_t begin, int64_t end, float* partial) {
      STMAE_DISPATCH(column_sum<T>, begin, end, width, static_cast<const T*>(x.const_data_ptr()), partial);
    });
  });
  return columns;
}

}  // namespace
}  // namespace stmae

STABLE_TORCH_LIBRARY_IMPL(stmae, CPU, m) {
  m.impl("gelu", TORCH_BOX(&stmae::gelu));
  m.impl("gelu_backward", TORCH_BOX(&stmae::gelu_backward));
  m.impl("column_sum", TORCH_BOX(&stmae::column_sum));
}

#endif

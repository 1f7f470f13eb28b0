// Exact softmax attention and its gradient with no N x N matrix in memory (Dao et al. 2022, algorithm 1; Dao 2023).
// Read params.h, packing.h, softmax.h, forward.h and backward.h in this order.
#ifdef STMAE_ISA

#include "simd/vector_loop.h"
#include "simd/gemm.h"
#include "cpu/attention/packing.h"
#include "cpu/attention/softmax.h"
#include "cpu/attention/forward.h"
#include "cpu/attention/backward.h"

#else  // compiled once: checks and registration

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <initializer_list>
#include <memory>
#include <new>
#include <tuple>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

#include "base/buffer.h"
#include "base/check.h"
#include "base/parallel.h"
#include "cpu/attention/params.h"

#define STMAE_KERNEL_FILE "cpu/attention/attention.cpp"
#include "base/for_each_isa.h"

namespace stmae {
namespace {

using torch::stable::Tensor;

// A backward pass over fewer heads than this divides each by keys. The number of threads has no influence on it, so that the
// sums keep their order whatever that is.
constexpr int64_t kMinItems = 32;

template <typename T>
Heads<T> heads(const Tensor& x, int64_t offset = 0) {
  return {static_cast<T*>(x.data_ptr()) + offset, x.stride(0), x.stride(1), x.stride(x.dim() - 2)};
}

// The i-th of the three in a packed [B, N, 3, H, D].
template <typename T>
Heads<T> packed_heads(const Tensor& x, int i) {
  return heads<T>(x, i * x.stride(2));
}

// x has these sizes and dtypes, and dense rows.
void check_rows(const char* op, const char* name, const Tensor& x, const std::vector<int64_t>& sizes, const DTypes& dtypes) {
  check_tensor(op, name, x, sizes, dtypes);
  check_dense_rows(op, name, x);
}

void check_sizes(const char* op, int64_t queries, int64_t keys, int64_t D, double scale) {
  STMAE_CHECK(D >= 8 && D <= 128 && D % 8 == 0, op, ": expected a head dim that is a multiple of 8 and at most 128, got ", D);
  STMAE_CHECK(std::max(queries, keys) < int64_t{1} << 31, op, ": expected fewer than 2^31 tokens, got ", std::max(queries, keys));
  STMAE_CHECK(keys > 0 || queries == 0, op, ": expected at least one key, got none");
  STMAE_CHECK(std::isfinite(scale), op, ": expected scale finite, got ", scale);
}

// How many items make a parallel task worth its start: about 10^5 multiply-adds.
int64_t grain(int64_t queries, int64_t keys, int64_t D) {
  return std::max<int64_t>(1, 100000 / std::max<int64_t>(1, queries * keys * D));
}

template <typename T>
void run_forward(Forward<T> a, int64_t B) {
  const int64_t tiles = (a.Nq + kQueryBlock - 1) / kQueryBlock;
  const int64_t count = B * a.H * tiles, min_items = grain(kQueryBlock, a.Nk, a.D);
  a.heads = B * a.H;
  a.head_stride = schedules_dynamically(count, tiles, min_items) ? num_workers(count, min_items) : 1;
  parallel_for_dynamic(count, tiles, min_items,
                       [&](int64_t, int64_t first, int64_t last) { STMAE_DISPATCH(attention_forward<T>, a, first, last); });
}

template <typename T>
void run_backward(Backward<T> a, int64_t B) {
  const int64_t all = B * a.H;
  const int64_t blocks = (a.Nk + kGradKeyBlock - 1) / kGradKeyBlock;
  if (all == 0 || a.Nk == 0) return;
  a.splits = std::clamp<int64_t>((kMinItems + all - 1) / all, 1, blocks);
  a.partial_stride = ((a.Nq + kMaxRowTile - 1) / kMaxRowTile * kMaxRowTile) * ((a.D + kMaxLanes - 1) / kMaxLanes * kMaxLanes);
  Buffer<float> partial(a.splits > 1 ? all * a.splits * a.partial_stride : 0);
  if (a.splits > 1) a.partial = partial.data();
  const int64_t count = all * a.splits, min_items = grain(a.Nq, std::min<int64_t>(a.Nk, kGradKeyBlock), a.D);
  a.heads = all;
  a.head_stride = schedules_dynamically(count, 1, min_items) ? num_workers(count, min_items) : 1;
  parallel_for_dynamic(count, 1, min_items,
                       [&](int64_t, int64_t first, int64_t last) { STMAE_DISPATCH(attention_backward<T>, a, first, last); });
  if (a.partial)
    parallel_for(all * a.Nq, grain(1, a.splits, a.D),
                 [&](int64_t first, int64_t last) { STMAE_DISPATCH(attention_sum<T>, a, first, last); });
}

template <typename T>
void forward_as(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, double scale) {
  run_forward<T>({heads<const T>(q), heads<const T>(k), heads<const T>(v), heads<T>(out), static_cast<float*>(lse.data_ptr()),
                  q.size(2), q.size(1), k.size(1), static_cast<int>(q.size(3)), scale},
                 q.size(0));
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  const char* op = "attention";
  check_rows(op, "q", q, {kAny, kAny, kAny, kAny}, floating());
  const int64_t B = q.size(0), N = q.size(1), H = q.size(2), D = q.size(3);
  check_rows(op, "k", k, {B, kAny, H, D}, q.scalar_type());
  check_rows(op, "v", v, {B, k.size(1), H, D}, q.scalar_type());
  check_sizes(op, B * H == 0 ? 0 : N, k.size(1), D, scale);
  Tensor out = torch::stable::new_empty(q, {B, N, H, D});
  Tensor lse = torch::stable::new_empty(q, {B, H, N}, ScalarType::Float);
  if (q.numel() == 0) return {out, lse};
  if (q.scalar_type() == ScalarType::Float)
    forward_as<float>(q, k, v, out, lse, scale);
  else
    forward_as<c10::BFloat16>(q, k, v, out, lse, scale);
  return {out, lse};
}

template <typename T>
void packed_forward_as(const Tensor& qkv, const Tensor& out, const Tensor& lse, double scale) {
  run_forward<T>(
      {packed_heads<const T>(qkv, 0), packed_heads<const T>(qkv, 1), packed_heads<const T>(qkv, 2), heads<T>(out),
       static_cast<float*>(lse.data_ptr()), qkv.size(3), qkv.size(1), qkv.size(1), static_cast<int>(qkv.size(4)), scale},
      qkv.size(0));
}

std::tuple<Tensor, Tensor> packed_attention(const Tensor& qkv, double scale) {
  const char* op = "packed_attention";
  check_rows(op, "qkv", qkv, {kAny, kAny, 3, kAny, kAny}, floating());
  const int64_t B = qkv.size(0), N = qkv.size(1), H = qkv.size(3), D = qkv.size(4);
  check_sizes(op, N, N, D, scale);
  Tensor out = torch::stable::new_empty(qkv, {B, N, H, D});
  Tensor lse = torch::stable::new_empty(qkv, {B, H, N}, ScalarType::Float);
  if (qkv.numel() == 0) return {out, lse};
  if (qkv.scalar_type() == ScalarType::Float)
    packed_forward_as<float>(qkv, out, lse, scale);
  else
    packed_forward_as<c10::BFloat16>(qkv, out, lse, scale);
  return {out, lse};
}

template <typename T>
void backward_as(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                 const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v, double scale) {
  run_backward<T>({heads<const T>(grad_out), heads<const T>(q), heads<const T>(k), heads<const T>(v), heads<const T>(out),
                   static_cast<const float*>(lse.data_ptr()), heads<T>(grad_q), heads<T>(grad_k), heads<T>(grad_v), q.size(2),
                   q.size(1), k.size(1), static_cast<int>(q.size(3)), scale},
                  q.size(0));
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                                      const Tensor& out, const Tensor& lse, double scale) {
  const char* op = "attention_backward";
  check_rows(op, "q", q, {kAny, kAny, kAny, kAny}, floating());
  const int64_t B = q.size(0), N = q.size(1), H = q.size(2), D = q.size(3);
  check_rows(op, "grad_out", grad_out, {B, N, H, D}, q.scalar_type());
  check_rows(op, "k", k, {B, kAny, H, D}, q.scalar_type());
  check_rows(op, "v", v, {B, k.size(1), H, D}, q.scalar_type());
  check_rows(op, "out", out, {B, N, H, D}, q.scalar_type());
  check_contiguous_tensor(op, "lse", lse, {B, H, N}, ScalarType::Float);
  check_sizes(op, B * H == 0 ? 0 : N, k.size(1), D, scale);
  Tensor grad_q = torch::stable::new_empty(q, {B, N, H, D});
  Tensor grad_k = torch::stable::new_empty(k, {B, k.size(1), H, D});
  Tensor grad_v = torch::stable::new_empty(v, {B, k.size(1), H, D});
  if (q.scalar_type() == ScalarType::Float)
    backward_as<float>(grad_out, q, k, v, out, lse, grad_q, grad_k, grad_v, scale);
  else
    backward_as<c10::BFloat16>(grad_out, q, k, v, out, lse, grad_q, grad_k, grad_v, scale);
  return {grad_q, grad_k, grad_v};
}

template <typename T>
void packed_backward_as(const Tensor& grad_out, const Tensor& qkv, const Tensor& out, const Tensor& lse, const Tensor& grad_qkv,
                        double scale) {
  run_backward<T>(
      {heads<const T>(grad_out), packed_heads<const T>(qkv, 0), packed_heads<const T>(qkv, 1), packed_heads<const T>(qkv, 2),
       heads<const T>(out), static_cast<const float*>(lse.data_ptr()), packed_heads<T>(grad_qkv, 0), packed_heads<T>(grad_qkv, 1),
       packed_heads<T>(grad_qkv, 2), qkv.size(3), qkv.size(1), qkv.size(1), static_cast<int>(qkv.size(4)), scale},
      qkv.size(0));
}

Tensor packed_attention_backward(const Tensor& grad_out, const Tensor& qkv, const Tensor& out, const Tensor& lse, double scale) {
  const char* op = "packed_attention_backward";
  check_rows(op, "qkv", qkv, {kAny, kAny, 3, kAny, kAny}, floating());
  const int64_t B = qkv.size(0), N = qkv.size(1), H = qkv.size(3), D = qkv.size(4);
  check_rows(op, "grad_out", grad_out, {B, N, H, D}, qkv.scalar_type());
  check_rows(op, "out", out, {B, N, H, D}, qkv.scalar_type());
  check_contiguous_tensor(op, "lse", lse, {B, H, N}, ScalarType::Float);
  check_sizes(op, N, N, D, scale);
  Tensor grad_qkv = torch::stable::new_empty(qkv, {B, N, 3, H, D});
  if (qkv.scalar_type() == ScalarType::Float)
    packed_backward_as<float>(grad_out, qkv, out, lse, grad_qkv, scale);
  else
    packed_backward_as<c10::BFloat16>(grad_out, qkv, out, lse, grad_qkv, scale);
  return grad_qkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(stmae, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("packed_attention", TORCH_BOX(&packed_attention));
  m.impl("packed_attention_backward", TORCH_BOX(&packed_attention_backward));
}

}  // namespace stmae

#endif

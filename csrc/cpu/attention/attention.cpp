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
#include "base/sequences.h"
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

// Of sequences that lie one after another: [total, H, D], or the i-th of the three in [total, 3, H, D].
template <typename T>
Heads<T> varlen_heads(const Tensor& x, int i = 0) {
  const int64_t offset = x.dim() == 4 ? i * x.stride(1) : 0;
  return {static_cast<T*>(x.data_ptr()) + offset, 0, x.stride(0), x.stride(x.dim() - 2)};
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
                  q.size(1), q.size(2), q.size(1), k.size(1), static_cast<int>(q.size(3)), scale},
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
  run_forward<T>({packed_heads<const T>(qkv, 0), packed_heads<const T>(qkv, 1), packed_heads<const T>(qkv, 2), heads<T>(out),
                  static_cast<float*>(lse.data_ptr()), qkv.size(1), qkv.size(3), qkv.size(1), qkv.size(1),
                  static_cast<int>(qkv.size(4)), scale},
                 qkv.size(0));
}

std::tuple<Tensor, Tensor> attention_qkvpacked(const Tensor& qkv, double scale) {
  const char* op = "attention_qkvpacked";
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
                   static_cast<const float*>(lse.data_ptr()), q.size(1), heads<T>(grad_q), heads<T>(grad_k), heads<T>(grad_v),
                   q.size(2), q.size(1), k.size(1), static_cast<int>(q.size(3)), scale},
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
  run_backward<T>({heads<const T>(grad_out), packed_heads<const T>(qkv, 0), packed_heads<const T>(qkv, 1),
                   packed_heads<const T>(qkv, 2), heads<const T>(out), static_cast<const float*>(lse.data_ptr()), qkv.size(1),
                   packed_heads<T>(grad_qkv, 0), packed_heads<T>(grad_qkv, 1), packed_heads<T>(grad_qkv, 2), qkv.size(3),
                   qkv.size(1), qkv.size(1), static_cast<int>(qkv.size(4)), scale},
                  qkv.size(0));
}

Tensor attention_qkvpacked_backward(const Tensor& grad_out, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                                    double scale) {
  const char* op = "attention_qkvpacked_backward";
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

// Attention of sequences that lie one after another. The heads of all sequences are one pool of tasks, the most expensive first. Cost is
// counted in scores. A head that would be more than one kMinItems-th of the whole is cut, by queries in the forward and by keys in the
// backward, as above; heads that are hardly worth a task are taken together. How it is cut depends on the sequences alone, not on threads.

struct Sequences {
  std::vector<int64_t> first_query, first_key;  // [S + 1]
  double scores = 0;                            // of one head, in all sequences
  Sequences(const char* op, const Tensor& cu_seqlens_q, int64_t queries, const Tensor& cu_seqlens_k, int64_t keys,
            const char* q = "q", const char* cu_q = "cu_seqlens_q") {
    first_query = sequence_offsets(op, cu_q, cu_seqlens_q, queries, q);
    if (cu_seqlens_q.get() == cu_seqlens_k.get() && queries == keys) {
      first_key = first_query;
    } else {
      STMAE_CHECK(cu_seqlens_k.dim() != 1 || cu_seqlens_k.size(0) == cu_seqlens_q.size(0), op, ": expected cu_seqlens_k [",
                  cu_seqlens_q.size(0), "], as cu_seqlens_q, got ", shape(cu_seqlens_k));
      first_key = sequence_offsets(op, "cu_seqlens_k", cu_seqlens_k, keys, "k");
    }
    for (int64_t s = 0; s < size(); ++s) {
      STMAE_CHECK(Nk(s) > 0 || Nq(s) == 0, op, ": expected at least one key in each sequence with queries, got none in sequence ",
                  s);
      scores += cost(s);
    }
  }
  int64_t size() const { return static_cast<int64_t>(first_query.size()) - 1; }
  int64_t Nq(int64_t s) const { return first_query[s + 1] - first_query[s]; }
  int64_t Nk(int64_t s) const { return first_key[s + 1] - first_key[s]; }
  double cost(int64_t s) const { return static_cast<double>(std::max<int64_t>(Nq(s), 1)) * std::max<int64_t>(Nk(s), 1); }
  // Into how many parts a head is cut that has `pieces` of them. With sequences of one length as many as in a batch of them.
  int64_t parts(int64_t s, int64_t H, int64_t pieces) const {
    return std::clamp<int64_t>(static_cast<int64_t>(std::ceil(kMinItems * cost(s) / (H * scores) - 1e-9)), 1, pieces);
  }
};

struct Task {  // items [first, last) of a sequence
  int64_t sequence, first, last;
  double cost;
};

// pieces(s): into how many items the kernel divides a head; parts(s): how many tasks they make.
template <typename Pieces, typename Parts>
std::vector<Task> make_tasks(const Sequences& sequences, int64_t H, int64_t D, const Pieces& pieces, const Parts& parts) {
  std::vector<Task> tasks;
  for (int64_t s = 0; s < sequences.size(); ++s) {
    const int64_t items = pieces(s), cuts = parts(s);
    if (items == 0) continue;
    const double cost = sequences.cost(s);
    const int64_t together = cuts > 1 ? 1 : std::clamp<int64_t>(static_cast<int64_t>(100000 / (cost * D)), 1, H);
    for (int64_t h = 0; h < H; h += together) {
      const int64_t heads = std::min(together, H - h);
      for (int64_t cut = 0; cut < cuts; ++cut)
        tasks.push_back(
            {s, h * items + heads * items * cut / cuts, h * items + heads * items * (cut + 1) / cuts, cost * heads / cuts});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  return tasks;
}

int64_t sequence_workers(const Sequences& sequences, int64_t H, int64_t D) {
  return num_workers(static_cast<int64_t>(std::min(sequences.scores * H * D / 100000, 1e6)) + 1, 1);
}

template <typename T>
void run_forward_varlen(Forward<T> a, const Sequences& sequences) {
  const auto tiles = [&](int64_t s) { return (sequences.Nq(s) + kQueryBlock - 1) / kQueryBlock; };
  const auto tasks =
      make_tasks(sequences, a.H, a.D, tiles, [&](int64_t s) { return sequences.parts(s, a.H, std::max<int64_t>(tiles(s), 1)); });
  const int64_t workers = sequence_workers(sequences, a.H, a.D);
  parallel_for_tasks(tasks.size(), workers, [&](int64_t i) {
    const Task& task = tasks[i];
    const int64_t s = task.sequence, query = sequences.first_query[s], key = sequences.first_key[s];
    const Forward<T> one{a.q.from(query), a.k.from(key),   a.v.from(key), a.out.from(query), a.lse + query, a.lse_head, a.H,
                         sequences.Nq(s), sequences.Nk(s), a.D,           a.scale,           a.H,           workers};
    STMAE_DISPATCH(attention_forward<T>, one, task.first, task.last);
  });
}

template <typename T>
void run_backward_varlen(const Backward<T>& a, const Sequences& sequences) {
  const int64_t S = sequences.size();
  if (a.H == 0) return;
  std::vector<Backward<T>> each(S, a);
  int64_t floats = 0;
  for (int64_t s = 0; s < S; ++s) {
    Backward<T>& one = each[s];
    const int64_t query = sequences.first_query[s], key = sequences.first_key[s];
    one.grad_out = a.grad_out.from(query), one.q = a.q.from(query), one.out = a.out.from(query),
    one.grad_q = a.grad_q.from(query);
    one.k = a.k.from(key), one.v = a.v.from(key), one.grad_k = a.grad_k.from(key), one.grad_v = a.grad_v.from(key);
    one.lse = a.lse + query;
    one.Nq = sequences.Nq(s), one.Nk = sequences.Nk(s);
    const int64_t blocks = std::max<int64_t>((one.Nk + kGradKeyBlock - 1) / kGradKeyBlock, 1);
    one.splits = sequences.parts(s, a.H, blocks);
    one.partial_stride =
        ((one.Nq + kMaxRowTile - 1) / kMaxRowTile * kMaxRowTile) * ((a.D + kMaxLanes - 1) / kMaxLanes * kMaxLanes);
    if (one.splits > 1) floats += a.H * one.splits * one.partial_stride;
  }
  Buffer<float> partial(floats);
  floats = 0;
  const int64_t workers = sequence_workers(sequences, a.H, a.D);
  for (Backward<T>& one : each) {
    one.heads = one.splits == 1 ? a.H : 0;
    one.head_stride = workers;
    if (one.splits == 1) continue;
    one.partial = partial.data() + floats;
    floats += a.H * one.splits * one.partial_stride;
  }
  const auto splits = [&](int64_t s) { return each[s].Nk > 0 ? each[s].splits : 0; };
  const auto tasks = make_tasks(sequences, a.H, a.D, splits, [&](int64_t s) { return each[s].splits; });
  parallel_for_tasks(tasks.size(), workers, [&](int64_t i) {
    STMAE_DISPATCH(attention_backward<T>, each[tasks[i].sequence], tasks[i].first, tasks[i].last);
  });
  for (const Backward<T>& one : each) {
    if (one.partial)
      parallel_for(a.H * one.Nq, grain(1, one.splits, a.D),
                   [&](int64_t first, int64_t last) { STMAE_DISPATCH(attention_sum<T>, one, first, last); });
  }
}

template <typename T>
void varlen_forward_as(const Tensor& q, const Tensor& k, const Tensor& v, int packed, const Tensor& out, const Tensor& lse,
                       double scale, const Sequences& sequences) {
  run_forward_varlen<T>(
      {varlen_heads<const T>(q), varlen_heads<const T>(k, packed), varlen_heads<const T>(v, 2 * packed), varlen_heads<T>(out),
       static_cast<float*>(lse.data_ptr()), out.size(0), out.size(1), 0, 0, static_cast<int>(out.size(2)), scale},
      sequences);
}

template <typename T>
void varlen_backward_as(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, int packed, const Tensor& out,
                        const Tensor& lse, const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v, double scale,
                        const Sequences& sequences) {
  run_backward_varlen<T>(
      {varlen_heads<const T>(grad_out), varlen_heads<const T>(q), varlen_heads<const T>(k, packed),
       varlen_heads<const T>(v, 2 * packed), varlen_heads<const T>(out), static_cast<const float*>(lse.data_ptr()), out.size(0),
       varlen_heads<T>(grad_q), varlen_heads<T>(grad_k, packed), varlen_heads<T>(grad_v, 2 * packed), out.size(1), 0, 0,
       static_cast<int>(out.size(2)), scale},
      sequences);
}

void check_varlen(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  check_rows(op, "q", q, {kAny, kAny, kAny}, floating());
  check_rows(op, "k", k, {kAny, q.size(1), q.size(2)}, q.scalar_type());
  check_rows(op, "v", v, {k.size(0), q.size(1), q.size(2)}, q.scalar_type());
  check_sizes(op, 0, std::max(q.size(0), k.size(0)), q.size(2), scale);
}

std::tuple<Tensor, Tensor> attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                            const Tensor& cu_seqlens_k, double scale) {
  const char* op = "attention_varlen";
  check_varlen(op, q, k, v, scale);
  const Sequences sequences(op, cu_seqlens_q, q.size(0), cu_seqlens_k, k.size(0));
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, {q.size(1), q.size(0)}, ScalarType::Float);
  if (q.numel() == 0) return {out, lse};
  if (q.scalar_type() == ScalarType::Float)
    varlen_forward_as<float>(q, k, v, 0, out, lse, scale, sequences);
  else
    varlen_forward_as<c10::BFloat16>(q, k, v, 0, out, lse, scale, sequences);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                             const Tensor& v, const Tensor& out, const Tensor& lse,
                                                             const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                             double scale) {
  const char* op = "attention_varlen_backward";
  check_varlen(op, q, k, v, scale);
  const std::vector<int64_t> sizes = sizes_of(q);
  check_rows(op, "grad_out", grad_out, sizes, q.scalar_type());
  check_rows(op, "out", out, sizes, q.scalar_type());
  check_contiguous_tensor(op, "lse", lse, {q.size(1), q.size(0)}, ScalarType::Float);
  const Sequences sequences(op, cu_seqlens_q, q.size(0), cu_seqlens_k, k.size(0));
  Tensor grad_q = torch::stable::new_empty(q, q.sizes());
  Tensor grad_k = torch::stable::new_empty(k, k.sizes());
  Tensor grad_v = torch::stable::new_empty(v, v.sizes());
  if (q.scalar_type() == ScalarType::Float)
    varlen_backward_as<float>(grad_out, q, k, v, 0, out, lse, grad_q, grad_k, grad_v, scale, sequences);
  else
    varlen_backward_as<c10::BFloat16>(grad_out, q, k, v, 0, out, lse, grad_q, grad_k, grad_v, scale, sequences);
  return {grad_q, grad_k, grad_v};
}

std::tuple<Tensor, Tensor> attention_varlen_qkvpacked(const Tensor& qkv, const Tensor& cu_seqlens, double scale) {
  const char* op = "attention_varlen_qkvpacked";
  check_rows(op, "qkv", qkv, {kAny, 3, kAny, kAny}, floating());
  const int64_t total = qkv.size(0), H = qkv.size(2), D = qkv.size(3);
  check_sizes(op, 0, total, D, scale);
  const Sequences sequences(op, cu_seqlens, total, cu_seqlens, total, "qkv", "cu_seqlens");
  Tensor out = torch::stable::new_empty(qkv, {total, H, D});
  Tensor lse = torch::stable::new_empty(qkv, {H, total}, ScalarType::Float);
  if (qkv.numel() == 0) return {out, lse};
  if (qkv.scalar_type() == ScalarType::Float)
    varlen_forward_as<float>(qkv, qkv, qkv, 1, out, lse, scale, sequences);
  else
    varlen_forward_as<c10::BFloat16>(qkv, qkv, qkv, 1, out, lse, scale, sequences);
  return {out, lse};
}

Tensor attention_varlen_qkvpacked_backward(const Tensor& grad_out, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                                           const Tensor& cu_seqlens, double scale) {
  const char* op = "attention_varlen_qkvpacked_backward";
  check_rows(op, "qkv", qkv, {kAny, 3, kAny, kAny}, floating());
  const int64_t total = qkv.size(0), H = qkv.size(2), D = qkv.size(3);
  check_rows(op, "grad_out", grad_out, {total, H, D}, qkv.scalar_type());
  check_rows(op, "out", out, {total, H, D}, qkv.scalar_type());
  check_contiguous_tensor(op, "lse", lse, {H, total}, ScalarType::Float);
  check_sizes(op, 0, total, D, scale);
  const Sequences sequences(op, cu_seqlens, total, cu_seqlens, total, "qkv", "cu_seqlens");
  Tensor grad = torch::stable::new_empty(qkv, {total, 3, H, D});
  if (qkv.scalar_type() == ScalarType::Float)
    varlen_backward_as<float>(grad_out, qkv, qkv, qkv, 1, out, lse, grad, grad, grad, scale, sequences);
  else
    varlen_backward_as<c10::BFloat16>(grad_out, qkv, qkv, qkv, 1, out, lse, grad, grad, grad, scale, sequences);
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(stmae, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_qkvpacked", TORCH_BOX(&attention_qkvpacked));
  m.impl("attention_qkvpacked_backward", TORCH_BOX(&attention_qkvpacked_backward));
  m.impl("attention_varlen", TORCH_BOX(&attention_varlen));
  m.impl("attention_varlen_backward", TORCH_BOX(&attention_varlen_backward));
  m.impl("attention_varlen_qkvpacked", TORCH_BOX(&attention_varlen_qkvpacked));
  m.impl("attention_varlen_qkvpacked_backward", TORCH_BOX(&attention_varlen_qkvpacked_backward));
}

}  // namespace stmae

#endif

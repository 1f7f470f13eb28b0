// The K smallest of each row by selection: the K-th smallest value is found bit by bit, counting what lies below, and one
// pass over the tokens then writes both lists in ascending order.
#ifdef STMAE_ISA

namespace stmae::STMAE_ISA {

// Unsigned integers in the order of the floats, -0 equal to 0. Returns the column of the first NaN, or -1.
static int64_t ordered_keys(const float* noise, int64_t stride, int64_t count, uint32_t* keys) {
  uint32_t nans = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float x = noise[i * stride] + 0.f;  // -0 + 0 is 0
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    nans += x != x;
    keys[i] = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  }
  if (nans == 0) return -1;
  int64_t i = 0;
  while (noise[i * stride] == noise[i * stride]) ++i;
  return i;
}

static int64_t count_below(const uint32_t* keys, int64_t count, uint32_t limit) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < count; begin += 1 << 20) {  // so that 32-bit counters serve
    const int64_t end = std::min(count, begin + (1 << 20));
    uint32_t part = 0;
    for (int64_t i = begin; i < end; ++i) part += keys[i] < limit;
    total += part;
  }
  return total;
}

// Ids are numbered from `token` on.
static void masking_row(const float* noise, int64_t stride, int64_t N, int64_t K, int64_t token, uint32_t* keys, int64_t* keep,
                        int64_t* masked, int64_t* nan) {
  *nan = ordered_keys(noise, stride, N, keys);
  if (*nan >= 0) return;
  uint32_t kth = 0;  // the largest key with fewer than K keys below it: the K-th smallest
  int64_t below = 0;
  for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    const int64_t smaller = count_below(keys, N, kth | bit);
    if (smaller < K) {
      kth |= bit;
      below = smaller;
    }
  }
  int64_t ties = K - below;  // how many of those equal to the K-th are kept, from the lowest index on
  const int64_t M = N - K;
  int64_t i = 0, k = 0, m = 0;
  for (; k < K && m < M; ++i) {  // both writes are within bounds, and one of them stays
    const bool tie = keys[i] == kth;
    const bool kept = keys[i] < kth || (tie && ties > 0);
    ties -= tie;
    keep[k] = token + i;
    masked[m] = token + i;
    k += kept;
    m += !kept;
  }
  while (k < K) keep[k++] = token + i++;
  while (m < M) masked[m++] = token + i++;
}

}  // namespace stmae::STMAE_ISA

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "base/buffer.h"
#include "base/check.h"
#include "base/parallel.h"
#include "base/sequences.h"

#define STMAE_KERNEL_FILE "cpu/random_masking.cpp"
#include "base/for_each_isa.h"

namespace stmae {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> random_masking(const Tensor& noise, int64_t num_keep) {
  const char* op = "random_masking";
  check_tensor(op, "noise", noise, {kAny, kAny}, ScalarType::Float);
  STMAE_CHECK(num_keep > 0 && num_keep < noise.size(1), op, ": expected num_keep in [1, ", noise.size(1) - 1, "], got ",
              num_keep);
  const int64_t B = noise.size(0), N = noise.size(1), K = num_keep, M = N - K;
  Tensor keep = torch::stable::new_empty(noise, {B, K}, ScalarType::Long);
  Tensor masked = torch::stable::new_empty(noise, {B, M}, ScalarType::Long);
  const float* in = noise.const_data_ptr<float>();
  int64_t* kept = keep.mutable_data_ptr<int64_t>();
  int64_t* rest = masked.mutable_data_ptr<int64_t>();
  const int64_t row_stride = noise.stride(0), stride = noise.stride(1);
  const int64_t workers = num_workers(B, std::max<int64_t>(1, 8192 / N));
  Buffer<uint32_t> keys(checked_product(op, {workers, N}));
  Buffer<int64_t> nan(B);
  parallel_for_static(B, workers, [&](int64_t worker, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      STMAE_DISPATCH(masking_row, in + b * row_stride, stride, N, K, int64_t{0}, keys.data() + worker * N, kept + b * K,
                     rest + b * M, nan.data() + b);
  });
  for (int64_t b = 0; b < B; ++b)
    STMAE_CHECK(nan.data()[b] < 0, op, ": expected noise without NaN, got NaN at [", b, ", ", nan.data()[b], "]");
  return {keep, masked};
}

// cu_keep: the offsets of the sequences' kept ids.
std::tuple<Tensor, Tensor> random_masking_varlen(const Tensor& noise, const Tensor& cu_seqlens, const Tensor& cu_keep,
                                                 int64_t total_keep) {
  const char* op = "random_masking_varlen";
  check_tensor(op, "noise", noise, {kAny}, ScalarType::Float);
  const int64_t total = noise.size(0), stride = noise.stride(0);
  STMAE_CHECK(total_keep >= 0 && total_keep <= total, op, ": expected to keep 0 to ", total, " tokens, got ", total_keep);
  const auto first = sequence_offsets(op, "cu_seqlens", cu_seqlens, total, "noise");
  const auto kept = sequence_offsets(op, "cu_keep", cu_keep, total_keep, "keep");
  STMAE_CHECK(first.size() == kept.size(), op, ": expected num_keep of ", first.size() - 1, " sequences, got ", kept.size() - 1);
  const int64_t S = static_cast<int64_t>(first.size()) - 1;
  int64_t longest = 0;
  for (int64_t s = 0; s < S; ++s) {
    const int64_t N = first[s + 1] - first[s], K = kept[s + 1] - kept[s];
    STMAE_CHECK(N == 0 ? K == 0 : K > 0 && K < N, op, ": expected num_keep in [1, ", N - 1, "] for the ", N,
                " tokens of sequence ", s, ", got ", K);
    longest = std::max(longest, N);
  }
  Tensor keep = torch::stable::new_empty(noise, {total_keep}, ScalarType::Long);
  Tensor masked = torch::stable::new_empty(noise, {total - total_keep}, ScalarType::Long);
  const float* in = noise.const_data_ptr<float>();
  int64_t* keep_out = keep.mutable_data_ptr<int64_t>();
  int64_t* masked_out = masked.mutable_data_ptr<int64_t>();
  const int64_t workers = num_workers(total, 8192);
  Buffer<uint32_t> keys(checked_product(op, {workers, longest}));
  Buffer<int64_t> nan(S);
  // A worker takes the sequences that begin in its part of the tokens.
  parallel_for_static(total, workers, [&](int64_t worker, int64_t begin, int64_t end) {
    for (int64_t s = std::lower_bound(first.begin(), first.end(), begin) - first.begin(); s < S && first[s] < end; ++s)
      STMAE_DISPATCH(masking_row, in + first[s] * stride, stride, first[s + 1] - first[s], kept[s + 1] - kept[s], first[s],
                     keys.data() + worker * longest, keep_out + kept[s], masked_out + first[s] - kept[s], nan.data() + s);
  });
  for (int64_t s = 0; s < S; ++s)
    STMAE_CHECK(first[s] == total || nan.data()[s] < 0, op, ": expected noise without NaN, got NaN at [",
                first[s] + nan.data()[s], "] in sequence ", s);
  return {keep, masked};
}

STABLE_TORCH_LIBRARY_IMPL(stmae, CPU, m) {
  m.impl("random_masking", TORCH_BOX(&random_masking));
  m.impl("random_masking_varlen", TORCH_BOX(&random_masking_varlen));
}

}  // namespace
}  // namespace stmae

#endif

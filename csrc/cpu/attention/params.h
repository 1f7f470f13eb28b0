// What the kernels are called with, and the sizes of their tiles that the host shares.
#pragma once

#include <cstdint>

namespace stmae {

constexpr int kQueryBlock = 12;                 // forward: queries at a time, an item of parallel work
constexpr int kGradKeyBlock = 192;              // backward: keys at a time, whose gradients stay in cache meanwhile
constexpr int64_t kMaxPrefetchBytes = 1 << 18;  // of a head fetched ahead: a quarter of a usual second-level cache
constexpr int64_t kMaxRowTile = 12;             // the multiple to which any instruction set pads rows of queries
constexpr int64_t kMaxLanes = 16;               // and a head's columns

// [B, N, H, D] with any strides, in elements, but a dense last dimension.
template <typename T>
struct Heads {
  T* data;
  int64_t batch, token, head;
  T* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
  Heads from(int64_t first_token) const { return {data + first_token * token, batch, token, head}; }
};

template <typename T>
struct Forward {
  Heads<const T> q, k, v;  // [B, Nq, H, D], [B, Nk, H, D] twice
  Heads<T> out;            // [B, Nq, H, D]
  float* lse;              // [B, H, Nq], the log-sum-exp of each query's scaled scores
  int64_t lse_head;        // from head to head of it
  int64_t H, Nq, Nk;
  int D;
  double scale;
  int64_t heads = 0;        // in the batch
  int64_t head_stride = 0;  // from a head that a thread works on to the one it is likely to take next
};

template <typename T>
struct Backward {
  Heads<const T> grad_out, q, k, v, out;
  const float* lse;
  int64_t lse_head;
  Heads<T> grad_q, grad_k, grad_v;
  int64_t H, Nq, Nk;
  int D;
  double scale;
  int64_t splits = 1;                  // into how many ranges of keys a head is divided
  float* partial = nullptr;            // grad_q of each range, [B * H, splits, partial_stride], or null when there is but one
  int64_t partial_stride = 0;          // floats of a range: [Nq padded][D padded]
  int64_t heads = 0, head_stride = 0;  // as in Forward
};

}  // namespace stmae

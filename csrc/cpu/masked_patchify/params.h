// What the kernels are called with, and the sizes of their tiles that the host shares.
#pragma once

#include <cstdint>

#include "base/patches.h"

namespace stmae {

constexpr int64_t kPanel = 48;  // lanes of a panel, three of the widest vectors
constexpr int64_t kRows = 16;   // rows that a task multiplies with a panel
constexpr int64_t kGroup = 16;  // patches that are transposed into a panel together, the lanes of the widest vector
constexpr int64_t kPart = 960;  // patches that are gathered before they are multiplied, so that they take some megabytes

struct Patchify {
  Patches patches;                 // of a list of videos, the first's
  const Patches* videos;           // of a list of videos (then B is 1, and tokens are numbered through all), else null
  const int64_t* first_tokens;     // of each of them
  const int32_t* video_of_row;     // [K]
  const float *scale, *shift;      // of each channel
  const int64_t* keep;             // [B, K]
  int64_t keep_batch, keep_token;  // its strides
  int64_t B, K, N, D, P;
  bool weight_float, out_float;
  const void *weight, *bias, *position;  // [D, P] with weight_row from row to row, [D] or null, [N, D] or null
  int64_t weight_row;
  void* out;                    // [B, K, D]
  int64_t total, first, count;  // patches of the batch, and the part that is gathered now
  float* panels;
  // Only the backward's:
  const void* grad_out;             // [B, K, D]
  const int32_t* inverse;           // [B, N]
  float *packed_grad, *weight_sum;  // weight_sum [D, P]: grad_weight itself if that is float32
  void *grad_weight, *grad_bias, *grad_position;
};

}  // namespace stmae

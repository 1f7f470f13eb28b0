// A video tensor of any strides, seen as patches.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "base/check.h"

namespace stmae {

enum class Pixel { uint8, bfloat16, float32 };

struct Patches {  // of a video [B, C, T, H, W]; strides in elements
  const void* data;
  Pixel pixel;
  int64_t C;
  int64_t batch, channel, frame, row, column;  // strides
  int64_t u, p, q;                             // frames, rows and columns of a patch
  int64_t h, w;                                // the grid is t x h x w; token (it*h + ih)*w + iw
  const int64_t* frames;                       // the clip's frames in the video [t*u], or null for all

  int64_t values() const { return u * p * q * C; }
};

inline Patches patches(const torch::stable::Tensor& video, int64_t u, int64_t p, int64_t q, const int64_t* frames) {
  using torch::headeronly::ScalarType;
  const ScalarType type = video.scalar_type();
  const Pixel pixel = type == ScalarType::Byte ? Pixel::uint8 : is_float32("video", type) ? Pixel::float32 : Pixel::bfloat16;
  return {video.const_data_ptr(),
          pixel,
          video.size(1),
          video.stride(0),
          video.stride(1),
          video.stride(2),
          video.stride(3),
          video.stride(4),
          u,
          p,
          q,
          video.size(3) / p,
          video.size(4) / q,
          frames};
}

// (x / 255 - mean) / std as x * scale + shift, for each channel.
struct Normalization {
  std::vector<float> scale, shift;
  Normalization(const std::vector<double>& mean, const std::vector<double>& std) {
    for (size_t c = 0; c < mean.size(); ++c) {
      scale.push_back(static_cast<float>(1 / (255 * std[c])));
      shift.push_back(static_cast<float>(-mean[c] / std[c]));
    }
  }
};

}  // namespace stmae

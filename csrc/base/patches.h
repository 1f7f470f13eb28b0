// A video tensor of any strides, seen as patches.
#pragma once

#include <cmath>
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
  int64_t t, h, w;                             // the grid; token (it*h + ih)*w + iw
  const int64_t* frames;                       // the clip's frames in the video [t*u], or null for all

  int64_t values() const { return u * p * q * C; }
  int64_t tokens() const { return t * h * w; }
};

// Checks video [batch, C, T, H, W] and that the clip, some of its frames or all, is a grid of patches [u, p, q].
inline Patches patches(const char* op, const torch::stable::Tensor& video, int64_t batch, const std::vector<int64_t>& patch_size,
                       const std::vector<int64_t>* frames) {
  check_tensor(op, "video", video, {batch, kAny, kAny, kAny, kAny}, {ScalarType::Byte, ScalarType::Float, ScalarType::BFloat16});
  const int64_t C = video.size(1), H = video.size(3), W = video.size(4);
  const int64_t T = frames ? static_cast<int64_t>(frames->size()) : video.size(2);
  STMAE_CHECK(patch_size.size() == 3, op, ": expected a patch of 3 sizes, got ", patch_size.size());
  const int64_t u = patch_size[0], p = patch_size[1], q = patch_size[2];
  STMAE_CHECK(C > 0 && T > 0 && H > 0 && W > 0, op, ": expected a video with channels and pixels, got ", shape(video));
  STMAE_CHECK(u > 0 && p > 0 && q > 0 && T % u == 0 && H % p == 0 && W % q == 0, op,
              ": expected frames, height and width that are multiples of the patch [", u, ", ", p, ", ", q, "], got [", T, ", ",
              H, ", ", W, "]");
  STMAE_CHECK(checked_product(op, {u, p, q, C}) < int64_t{1} << 31, op, ": expected fewer than 2^31 values in a patch");
  if (frames) {
    for (int64_t frame : *frames)
      STMAE_CHECK(frame >= 0 && frame < video.size(2), op, ": expected frames in [0, ", video.size(2), "), got ", frame);
  }
  const ScalarType type = video.scalar_type();
  Patches patches{};
  patches.data = video.const_data_ptr();
  patches.pixel = type == ScalarType::Byte ? Pixel::uint8 : type == ScalarType::Float ? Pixel::float32 : Pixel::bfloat16;
  patches.C = C;
  patches.batch = video.stride(0), patches.channel = video.stride(1), patches.frame = video.stride(2);
  patches.row = video.stride(3), patches.column = video.stride(4);
  patches.u = u, patches.p = p, patches.q = q;
  patches.t = T / u, patches.h = H / p, patches.w = W / q;
  patches.frames = frames ? frames->data() : nullptr;
  checked_product(op, {patches.t, patches.h, patches.w});
  return patches;
}

// (x / 255 - mean) / std as x * scale + shift, for each channel.
struct Normalization {
  std::vector<float> scale, shift;
  Normalization(const char* op, const std::vector<double>& mean, const std::vector<double>& std, int64_t channels) {
    check(op, "mean", mean, channels);
    check(op, "std", std, channels);
    for (double x : std) STMAE_CHECK(x > 0, op, ": expected std above 0, got ", x);
    for (size_t c = 0; c < mean.size(); ++c) {
      scale.push_back(static_cast<float>(1 / (255 * std[c])));
      shift.push_back(static_cast<float>(-mean[c] / std[c]));
    }
  }

 private:
  static void check(const char* op, const char* name, const std::vector<double>& values, int64_t channels) {
    STMAE_CHECK(static_cast<int64_t>(values.size()) == channels, op, ": expected ", name, " of ", channels, " channels, got ",
                values.size());
    for (double x : values) STMAE_CHECK(std::isfinite(x), op, ": expected ", name, " finite, got ", x);
  }
};

}  // namespace stmae

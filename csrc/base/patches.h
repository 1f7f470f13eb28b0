// A video tensor of any strides, seen as patches.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
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

// Checks that a clip of `video` [C, T, H, W], or [B, C, T, H, W], some of its frames or all (a count below 0), is a grid of patches
// [u, p, q].
inline Patches grid_of_patches(const char* op, const torch::stable::Tensor& video, const std::vector<int64_t>& patch_size,
                               const int64_t* frames, int64_t frame_count) {
  const int64_t at = video.dim() - 4;  // of the channels
  const int64_t C = video.size(at), H = video.size(at + 2), W = video.size(at + 3);
  const int64_t T = frame_count < 0 ? video.size(at + 1) : frame_count;
  STMAE_CHECK(patch_size.size() == 3, op, ": expected a patch of 3 sizes, got ", patch_size.size());
  const int64_t u = patch_size[0], p = patch_size[1], q = patch_size[2];
  STMAE_CHECK(C > 0 && T > 0 && H > 0 && W > 0, op, ": expected a video with channels and pixels, got ", shape(video));
  STMAE_CHECK(u > 0 && p > 0 && q > 0 && T % u == 0 && H % p == 0 && W % q == 0, op,
              ": expected frames, height and width that are multiples of the patch [", u, ", ", p, ", ", q, "], got [", T, ", ",
              H, ", ", W, "]");
  STMAE_CHECK(checked_product(op, {u, p, q, C}) < int64_t{1} << 31, op, ": expected fewer than 2^31 values in a patch");
  for (int64_t i = 0; i < frame_count; ++i)
    STMAE_CHECK(frames[i] >= 0 && frames[i] < video.size(at + 1), op, ": expected frames in [0, ", video.size(at + 1), "), got ",
                frames[i]);
  const ScalarType type = video.scalar_type();
  Patches patches{};
  patches.data = video.const_data_ptr();
  patches.pixel = type == ScalarType::Byte ? Pixel::uint8 : type == ScalarType::Float ? Pixel::float32 : Pixel::bfloat16;
  patches.C = C;
  patches.batch = at ? video.stride(0) : 0, patches.channel = video.stride(at), patches.frame = video.stride(at + 1);
  patches.row = video.stride(at + 2), patches.column = video.stride(at + 3);
  patches.u = u, patches.p = p, patches.q = q;
  patches.t = T / u, patches.h = H / p, patches.w = W / q;
  patches.frames = frames;
  checked_product(op, {patches.t, patches.h, patches.w});
  return patches;
}

inline const DTypes& pixel_types() {
  static const DTypes types{ScalarType::Byte, ScalarType::Float, ScalarType::BFloat16};
  return types;
}

// video [batch, C, T, H, W]; frames: which are the clip's, or null for all.
inline Patches patches(const char* op, const torch::stable::Tensor& video, int64_t batch, const std::vector<int64_t>& patch_size,
                       const std::vector<int64_t>* frames) {
  check_tensor(op, "video", video, {batch, kAny, kAny, kAny, kAny}, pixel_types());
  return grid_of_patches(op, video, patch_size, frames ? frames->data() : nullptr,
                         frames ? static_cast<int64_t>(frames->size()) : -1);
}

// Videos [C, T, H, W] of any sizes and strides, one dtype. Tokens are numbered through all of them.
struct PatchesOfVideos {
  std::vector<Patches> videos;
  std::vector<int64_t> first_tokens{0};  // [S + 1]

  // frames: of all videos, one after another, frame_counts[s] of video s; no counts: all frames of each.
  PatchesOfVideos(const char* op, const std::vector<torch::stable::Tensor>& tensors, int64_t C,
                  const std::vector<int64_t>& patch_size, const std::vector<int64_t>& frames = {},
                  const std::vector<int64_t>& frame_counts = {}) {
    STMAE_CHECK(frame_counts.empty() || frame_counts.size() == tensors.size(), op, ": expected frames of ", tensors.size(),
                " videos, got those of ", frame_counts.size());
    int64_t at = 0;
    for (size_t s = 0; s < tensors.size(); ++s) {
      const torch::stable::Tensor& video = tensors[s];
      const std::string name = "videos[" + std::to_string(s) + "]";
      check_tensor(op, name.c_str(), video, {C, kAny, kAny, kAny}, s ? DTypes(tensors[0].scalar_type()) : pixel_types());
      const bool some = !frame_counts.empty();
      if (some)
        STMAE_CHECK(frame_counts[s] >= 0 && frame_counts[s] <= static_cast<int64_t>(frames.size()) - at, op, ": expected ",
                    frame_counts[s], " frames for ", name, ", got ", static_cast<int64_t>(frames.size()) - at);
      videos.push_back(grid_of_patches(op, video, patch_size, some ? frames.data() + at : nullptr, some ? frame_counts[s] : -1));
      if (some) at += frame_counts[s];
      int64_t next = 0;
      STMAE_CHECK(!__builtin_add_overflow(first_tokens.back(), videos.back().tokens(), &next), op, ": sizes are too large");
      first_tokens.push_back(next);
    }
    STMAE_CHECK(at == static_cast<int64_t>(frames.size()), op, ": expected ", at, " frames in all, got ", frames.size());
  }
};

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

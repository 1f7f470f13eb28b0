// From a decoder's planes to a clip's frame: colour, crop, antialiased resize and flip at once.
//
// All of them are linear, so they are one separable filter for each plane, followed by a 3x3 matrix: no whole picture in RGB is
// ever made, and nothing is rounded but the result. Luma is resized as torch's antialiased bilinear interpolation does it. The
// filter of a chroma plane is that filter after linear interpolation of the plane to luma's grid, from where its samples lie.
#pragma once

#include <cstdint>
#include <vector>

namespace stmae::video {

// output[i] = sum over k in [begin[i], begin[i + 1]) of weight[k] * input[first[i] + k - begin[i]]
struct Filter {
  std::vector<int32_t> first, begin;
  std::vector<float> weight;
  int32_t low = 0, high = 0;  // the inputs that are read: [low, high)
};

struct Plane {
  const uint8_t* data = nullptr;
  int64_t stride = 0;  // bytes from one row to the next, positive
};

struct Geometry {
  int32_t height = 0, width = 0;  // of luma
  int32_t top = 0, left = 0, box_height = 0, box_width = 0;
  int32_t out_height = 0, out_width = 0;
  bool mirror_y = false, mirror_x = false;
  int32_t chroma_shift_y = 0, chroma_shift_x = 0;  // 1: half as many rows or columns
  double chroma_y = 0, chroma_x = 0;               // where the first sample lies, in luma rows and columns from the first of them
};

// value = scale * sample + ..., in levels of 0 to 255
struct Colour {
  float luma = 1, offset[3] = {0, 0, 0};  // of R, G and B
  float red_v = 0, green_u = 0, green_v = 0, blue_u = 0;
};

struct CropResize {
  Geometry geometry;
  Colour colour;
  bool grey = false;
  bool wide = false;           // samples are uint16 and not uint8
  Filter rows[2], columns[2];  // of luma, of chroma
};

// Checks everything; throws std::invalid_argument. kr, kb: the weights of red and blue in luma; depth: bits of a sample.
CropResize make_crop_resize(const Geometry& geometry, double kr, double kb, bool full_range, int32_t depth, bool grey);

// out: [out_height][out_width][3], its rows out_stride bytes apart.
void crop_resize(const CropResize& plan, const Plane (&planes)[3], uint8_t* out, int64_t out_stride);

}  // namespace stmae::video

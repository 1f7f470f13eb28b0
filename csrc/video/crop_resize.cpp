// Kernels of crop_resize.h. kLanes output rows at a time: each is a weighted sum of the plane's rows, read as vectors along the
// row; a transpose in registers turns the sums into columns, so that the filter along a row reads vectors too, one lane for each
// output row, and its weights are broadcast. What is kept between the two, kLanes rows as wide as the box, stays in the cache.
#ifdef STMAE_ISA

namespace stmae::STMAE_ISA {

using video::CropResize;
using video::Filter;
using video::Plane;

#if STMAE_ISA_LEVEL >= 2
STMAE_INLINE vec load(const uint16_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))))};
}
STMAE_INLINE vec load(const uint16_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)))};
}
// The first n lanes, each a whole number r + 256 g + 65536 b, as bytes r, g, b.
STMAE_INLINE void store_rgb(uint8_t* p, vec packed, int n) {
  const __m512i drop = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
  const __m512i join = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(join, _mm512_shuffle_epi8(_mm512_cvtps_epi32(packed.v), drop));
  _mm512_mask_storeu_epi8(p, (uint64_t{1} << (3 * n)) - 1, bytes);
}
#elif STMAE_ISA_LEVEL == 1
STMAE_INLINE vec load(const uint16_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
STMAE_INLINE vec load(const uint16_t* p, int n) {
  alignas(16) uint16_t part[8] = {};
  std::memcpy(part, p, 2 * n);
  return load(part);
}
STMAE_INLINE void store_rgb(uint8_t* p, vec packed, int n) {
  const __m256i drop = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
  const __m256i join = _mm256_setr_epi32(0, 1, 2, 4, 5, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(_mm256_cvtps_epi32(packed.v), drop), join);
  alignas(32) uint8_t part[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(part), bytes);
  std::memcpy(p, part, 3 * n);
}
#elif STMAE_ISA_NEON
STMAE_INLINE vec load(const uint16_t* p) { return {vcvtq_f32_u32(vmovl_u16(vld1_u16(p)))}; }
STMAE_INLINE vec load(const uint16_t* p, int n) {
  uint16_t part[kLanes] = {};
  std::memcpy(part, p, 2 * n);
  return load(part);
}
STMAE_INLINE void store_rgb(uint8_t* p, vec packed, int n) {
  const uint8x16_t drop = {0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 255, 255, 255, 255};
  uint8_t part[16];
  vst1q_u8(part, vqtbl1q_u8(vreinterpretq_u8_u32(vcvtq_u32_f32(packed.v)), drop));
  std::memcpy(p, part, 3 * n);
}
#else
STMAE_INLINE vec load(const uint16_t* p) { return load(p, kLanes); }
STMAE_INLINE void store_rgb(uint8_t* p, vec packed, int n) {
  for (int i = 0; i < n; ++i) {
    const uint32_t value = static_cast<uint32_t>(packed.v[i]);
    for (int c = 0; c < 3; ++c) p[3 * i + c] = static_cast<uint8_t>(value >> (8 * c));
  }
}
#endif

}  // namespace stmae::STMAE_ISA

#include "simd/vector_loop.h"

namespace stmae::STMAE_ISA {

// Rows [row, row + kLanes) of a plane's filtered rows, as columns: out[(x - low) * kLanes + i] is column x of row + i. Rows beyond
// the last repeat it.
template <typename T>
STMAE_INLINE void filter_rows(const Plane& plane, const Filter& rows, int32_t row, int32_t last, int32_t low, int32_t high,
                              float* out) {
  const T* sources[kLanes];
  const float* weights[kLanes];
  int32_t counts[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const int32_t r = std::min(row + i, last);
    sources[i] = reinterpret_cast<const T*>(plane.data + rows.first[r] * plane.stride);
    weights[i] = rows.weight.data() + rows.begin[r];
    counts[i] = rows.begin[r + 1] - rows.begin[r];
  }
  const auto block = [&](int32_t x, auto lanes) STMAE_INLINE_BODY {
    vec sums[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const T* source = sources[i] + x;
      vec sum = set(weights[i][0]) * load(source, lanes);
      for (int32_t k = 1; k < counts[i]; ++k) {
        source = reinterpret_cast<const T*>(reinterpret_cast<const uint8_t*>(source) + plane.stride);
        sum = fma(set(weights[i][k]), load(source, lanes), sum);
      }
      sums[i] = sum;
    }
    transpose(sums);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(out + (x - low + i) * kLanes, sums[i]);
  };
  int32_t x = low;
  for (; x + kLanes <= high; x += kLanes) block(x, AllLanes());
  if (x < high) block(x, static_cast<int>(high - x));
}

STMAE_INLINE vec filter_columns(const float* columns, const Filter& filter, int32_t i) {
  const float* weight = filter.weight.data() + filter.begin[i];
  const float* column = columns + static_cast<int64_t>(filter.first[i] - filter.low) * kLanes;
  vec sum = set(weight[0]) * load(column);
  const int32_t count = filter.begin[i + 1] - filter.begin[i];
  for (int32_t k = 1; k < count; ++k) sum = fma(set(weight[k]), load(column + k * kLanes), sum);
  return sum;
}

template <typename T, bool kGrey>
void crop_resize_rows(const CropResize& plan, const Plane* planes, uint8_t* out, int64_t out_stride) {
  const int32_t height = plan.geometry.out_height, width = plan.geometry.out_width;
  const video::Colour& colour = plan.colour;
  const auto room = [](const Filter& f) { return (f.high - f.low + kLanes) / kLanes * int64_t{kLanes} * kLanes; };
  Buffer<float> luma(room(plan.columns[0])), u(kGrey ? 0 : room(plan.columns[1])), v(kGrey ? 0 : room(plan.columns[1]));
  const vec low = zero(), high = set(255.f);
  for (int32_t row = 0; row < height; row += kLanes) {
    filter_rows<T>(planes[0], plan.rows[0], row, height - 1, plan.columns[0].low, plan.columns[0].high, luma.data());
    if (!kGrey) {
      filter_rows<T>(planes[1], plan.rows[1], row, height - 1, plan.columns[1].low, plan.columns[1].high, u.data());
      filter_rows<T>(planes[2], plan.rows[1], row, height - 1, plan.columns[1].low, plan.columns[1].high, v.data());
    }
    const int valid = std::min<int32_t>(kLanes, height - row);
    for (int32_t x = 0; x < width; x += kLanes) {
      const int n = std::min<int32_t>(kLanes, width - x);
      vec packed[kLanes];
      for (int i = 0; i < n; ++i) {
        const vec y = set(colour.luma) * filter_columns(luma.data(), plan.columns[0], x + i);
        vec r = y + set(colour.offset[0]), g = r, b = r;
        if (!kGrey) {
          const vec cb = filter_columns(u.data(), plan.columns[1], x + i);
          const vec cr = filter_columns(v.data(), plan.columns[1], x + i);
          r = fma(set(colour.red_v), cr, r);
          g = fma(set(colour.green_v), cr, fma(set(colour.green_u), cb, y + set(colour.offset[1])));
          b = fma(set(colour.blue_u), cb, y + set(colour.offset[2]));
        }
        r = round(min(max(r, low), high));
        g = round(min(max(g, low), high));
        b = round(min(max(b, low), high));
        packed[i] = fma(b, set(65536.f), fma(g, set(256.f), r));  // below 2^24: exact
      }
      for (int i = n; i < kLanes; ++i) packed[i] = zero();
      transpose(packed);
      for (int i = 0; i < valid; ++i) store_rgb(out + (row + i) * out_stride + int64_t{3} * x, packed[i], n);
    }
  }
}

void crop_resize_any(const CropResize& plan, const Plane* planes, uint8_t* out, int64_t out_stride) {
  if (plan.wide)
    plan.grey ? crop_resize_rows<uint16_t, true>(plan, planes, out, out_stride)
              : crop_resize_rows<uint16_t, false>(plan, planes, out, out_stride);
  else
    plan.grey ? crop_resize_rows<uint8_t, true>(plan, planes, out, out_stride)
              : crop_resize_rows<uint8_t, false>(plan, planes, out, out_stride);
}

}  // namespace stmae::STMAE_ISA

#else

#include "video/crop_resize.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "base/buffer.h"
#include "base/isa.h"

#define STMAE_KERNEL_FILE "video/crop_resize.cpp"
#include "base/for_each_isa.h"

namespace stmae::video {
namespace {

constexpr int32_t kLongest = 1 << 16;  // rows or columns

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  ((message << "crop_resize: ") << ... << parts);
  throw std::invalid_argument(message.str());
}

void require(bool condition, const char* name, const char* expected, int64_t value) {
  if (!condition) fail("expected ", name, " ", expected, ", got ", value);
}

struct Tap {
  int32_t input;
  double weight;
};
using Taps = std::vector<std::vector<Tap>>;  // of each output

// Antialiased bilinear interpolation of inputs [start, start + length) to `count` outputs: triangles as wide as an output where
// there are more inputs than outputs, as wide as an input else, cut off at the ends and normalised.
// The centres of inputs and outputs lie at halves.
Taps triangles(int32_t start, int32_t length, int32_t count, bool mirror) {
  const double scale = static_cast<double>(length) / count, reach = std::max(scale, 1.0);
  Taps taps(count);
  for (int32_t i = 0; i < count; ++i) {
    const double centre = scale * (i + 0.5);
    const int32_t from = std::max(static_cast<int32_t>(centre - reach + 0.5), 0);
    const int32_t to = std::min(static_cast<int32_t>(centre + reach + 0.5), length);
    std::vector<Tap>& output = taps[mirror ? count - 1 - i : i];
    double sum = 0;
    for (int32_t k = from; k < to; ++k) {
      const double weight = std::max(0.0, 1 - std::abs(k + 0.5 - centre) / reach);
      output.push_back({start + k, weight});
      sum += weight;
    }
    for (Tap& tap : output) tap.weight /= sum;
  }
  return taps;
}

// The same outputs from samples half as dense, the first of which lies at `place`, and which are interpolated linearly: input i
// lies between two of them. Beyond the first and the last of `samples` the plane goes on as it ends.
Taps from_half(const Taps& taps, int32_t samples, double place) {
  Taps result(taps.size());
  for (size_t i = 0; i < taps.size(); ++i) {
    std::map<int32_t, double> weights;
    for (const Tap& tap : taps[i]) {
      const double position = (tap.input - place) / 2, below = std::floor(position), part = position - below;
      const auto sample = [&](double k) { return static_cast<int32_t>(std::clamp(k, 0.0, samples - 1.0)); };
      weights[sample(below)] += tap.weight * (1 - part);
      if (part > 0) weights[sample(below + 1)] += tap.weight * part;
    }
    for (const auto& [input, weight] : weights) result[i].push_back({input, weight});
  }
  return result;
}

Filter pack(const Taps& taps) {
  Filter filter;
  filter.low = taps[0][0].input;
  filter.begin.push_back(0);
  for (const std::vector<Tap>& output : taps) {
    filter.first.push_back(output.front().input);
    for (const Tap& tap : output) filter.weight.push_back(static_cast<float>(tap.weight));
    filter.begin.push_back(static_cast<int32_t>(filter.weight.size()));
    filter.low = std::min(filter.low, output.front().input);
    filter.high = std::max(filter.high, output.back().input + 1);
  }
  return filter;
}

}  // namespace

CropResize make_crop_resize(const Geometry& g, double kr, double kb, bool full_range, int32_t depth, bool grey) {
  require(g.height > 0 && g.height <= kLongest, "height", "in [1, 65536]", g.height);
  require(g.width > 0 && g.width <= kLongest, "width", "in [1, 65536]", g.width);
  require(g.out_height > 0 && g.out_height <= kLongest, "the clip's height", "in [1, 65536]", g.out_height);
  require(g.out_width > 0 && g.out_width <= kLongest, "the clip's width", "in [1, 65536]", g.out_width);
  require(g.top >= 0 && g.top < g.height, "the box's top", "within the picture", g.top);
  require(g.left >= 0 && g.left < g.width, "the box's left", "within the picture", g.left);
  require(g.box_height > 0 && g.box_height <= g.height - g.top, "the box's height", "within the picture", g.box_height);
  require(g.box_width > 0 && g.box_width <= g.width - g.left, "the box's width", "within the picture", g.box_width);
  require(g.chroma_shift_y == 0 || g.chroma_shift_y == 1, "chroma_shift_y", "0 or 1", g.chroma_shift_y);
  require(g.chroma_shift_x == 0 || g.chroma_shift_x == 1, "chroma_shift_x", "0 or 1", g.chroma_shift_x);
  require(depth >= 8 && depth <= 16, "depth", "in [8, 16]", depth);
  if (!(g.chroma_y >= 0 && g.chroma_y <= 1 && g.chroma_x >= 0 && g.chroma_x <= 1))
    fail("expected the place of the first chroma sample in [0, 1], got (", g.chroma_y, ", ", g.chroma_x, ")");
  if (!(kr > 0 && kb > 0 && kr + kb < 1)) fail("expected luma's weights of red and blue above 0, their sum below 1");

  CropResize plan;
  plan.geometry = g;
  plan.grey = grey;
  plan.wide = depth > 8;
  const Taps rows = triangles(g.top, g.box_height, g.out_height, g.mirror_y);
  const Taps columns = triangles(g.left, g.box_width, g.out_width, g.mirror_x);
  plan.rows[0] = pack(rows);
  plan.columns[0] = pack(columns);
  if (!grey) {
    plan.rows[1] = g.chroma_shift_y ? pack(from_half(rows, (g.height + 1) / 2, g.chroma_y)) : plan.rows[0];
    plan.columns[1] = g.chroma_shift_x ? pack(from_half(columns, (g.width + 1) / 2, g.chroma_x)) : plan.columns[0];
  }
  // Rec. ITU-T H.273: Y = kr R + (1 - kr - kb) G + kb B; Cb = (B - Y) / (2 (1 - kb)); Cr = (R - Y) / (2 (1 - kr)).
  const double step = std::ldexp(1.0, depth - 8), kg = 1 - kr - kb, full = std::ldexp(1.0, depth) - 1;
  const double luma = full_range ? 255 / full : 255 / (219 * step), black = full_range ? 0 : 16 * step;
  const double chroma = full_range ? 255 / full : 255 / (224 * step), centre = 128 * step;
  const double red_v = 2 * (1 - kr) * chroma, blue_u = 2 * (1 - kb) * chroma;
  const double green_v = -red_v * kr / kg, green_u = -blue_u * kb / kg, shift = -black * luma;
  plan.colour.luma = static_cast<float>(luma);
  plan.colour.red_v = static_cast<float>(red_v);
  plan.colour.green_u = static_cast<float>(green_u);
  plan.colour.green_v = static_cast<float>(green_v);
  plan.colour.blue_u = static_cast<float>(blue_u);
  plan.colour.offset[0] = static_cast<float>(grey ? shift : shift - centre * red_v);
  plan.colour.offset[1] = static_cast<float>(grey ? shift : shift - centre * (green_u + green_v));
  plan.colour.offset[2] = static_cast<float>(grey ? shift : shift - centre * blue_u);
  return plan;
}

void crop_resize(const CropResize& plan, const Plane (&planes)[3], uint8_t* out, int64_t out_stride) {
  STMAE_DISPATCH(crop_resize_any, plan, planes, out, out_stride);
}

}  // namespace stmae::video

#endif

// The visible patches are gathered from the video and normalised, some megabytes at a time, into panels of kPanel patches. A
// tile of the product, kRows outputs x kPanel patches, stays in registers while the weight's elements, as they lie in memory,
// are broadcast and the panel's rows are read as vectors. The backward gathers again, into panels of kPanel pixels of
// all patches, and sums over patches. Nothing has the size of the video.
#ifdef STMAE_ISA

#include "../each_vector.h"
#include "../pixels.h"
#include "../product.h"

namespace stmae::STMAE_ISA {

template <typename Product, int kStep, typename Element>
static void multiply_tile(const Element* const* rows, const float* panel, int64_t steps, int64_t lanes, float* tile) {
  constexpr int kTileRows = STMAE_ISA_LEVEL >= 2 ? 8 : 4;  // with three vectors, what 32 or 16 registers hold
  static_assert(kRows % kTileRows == 0 && kPanel % (3 * kLanes) == 0);
  for (int64_t lane = 0; lane < lanes; lane += 3 * kLanes) {
    for (int r = 0; r < kRows; r += kTileRows) {
      const int64_t left = lanes - lane;
      const auto run = left > 2 * kLanes ? multiply<Product, Element, kStep, kTileRows, 3, kPanel>
                       : left > kLanes   ? multiply<Product, Element, kStep, kTileRows, 2, kPanel>
                                         : multiply<Product, Element, kStep, kTileRows, 1, kPanel>;
      run(rows + r, panel + lane, steps, tile + r * kPanel + lane);
    }
  }
}

STMAE_INLINE int64_t token_of(const Patchify& p, int64_t index) {
  return p.keep[index / p.K * p.keep_batch + index % p.K * p.keep_token];
}

// Patch `index` of the batch as normalised floats [P]; `row` has room for two patches.
template <typename T>
static void read_patch(const Patchify& p, int64_t index, float* row) {
  const int64_t b = index / p.K, token = token_of(p, index);
  if constexpr (std::is_same_v<T, float>) {
    read_colour_first(p.patches, b, token, row);
  } else {
    T* raw = reinterpret_cast<T*>(row + p.P);
    read_colour_first(p.patches, b, token, raw);
    const int64_t plane = p.P / p.patches.C;
    for (int64_t c = 0; c < p.patches.C; ++c) {
      const vec scale = set(p.scale[c]), shift = set(p.shift[c]);
      each_vector(plane, [&](int64_t i, auto lanes) STMAE_INLINE_BODY {
        vec x = load(raw + c * plane + i, lanes);
        if constexpr (std::is_same_v<T, uint8_t>) x = fma(x, scale, shift);
        store(row + c * plane + i, x, lanes);
      });
    }
  }
}

static void read_pixels(const Patchify& p, int64_t index, float* row) {
  switch (p.patches.pixel) {
    case Pixel::uint8: return read_patch<uint8_t>(p, index, row);
    case Pixel::bfloat16: return read_patch<bf16>(p, index, row);
    case Pixel::float32: return read_patch<float>(p, index, row);
  }
}

// ----------------------------------------------------------------------------------------------------------- forward

// Groups [begin, end) of kGroup patches each, into panels [panel][step][kPanel].
template <typename Product>
static void pack_columns(const Patchify& p, float* scratch, int64_t begin, int64_t end) {
  const int64_t P = p.P, steps = (P + Product::kPack - 1) / Product::kPack;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kGroup, count = std::min<int64_t>(kGroup, p.count - first);
    float* panel = p.panels + first / kPanel * steps * kPanel + first % kPanel;
    for (int64_t i = 0; i < kGroup; ++i) {
      float* row = scratch + i * P;
      if (i < count) {
        read_pixels(p, p.first + first + i, row);
        Product::units(row, P);
      } else {
        std::memset(row, 0, P * sizeof(float));
      }
    }
    for (int64_t lane = 0; lane < kGroup; lane += kLanes) {
      for (int64_t s = 0; s < steps; s += kLanes) {
        const int many = static_cast<int>(std::min<int64_t>(kLanes, steps - s));
        vec rows[kLanes];
        for (int l = 0; l < kLanes; ++l) rows[l] = load(scratch + (lane + l) * P + s, many);
        transpose(rows);
        for (int i = 0; i < many; ++i) store(panel + (s + i) * kPanel + lane, rows[i]);
      }
    }
  }
}

static void patchify_pack(const Patchify& p, float* scratch, int64_t begin, int64_t end) {
  p.weight_float ? pack_columns<Float32>(p, scratch, begin, end) : pack_columns<Bfloat16>(p, scratch, begin, end);
}

// Tasks [begin, end): kRows outputs of a panel's patches each.
template <typename Product, typename Out>
static void forward_tiles(const Patchify& p, int64_t begin, int64_t end) {
  using element = typename Product::element;
  const int64_t steps = (p.P + Product::kPack - 1) / Product::kPack, D = p.D, blocks = (D + kRows - 1) / kRows;
  const element *weight = static_cast<const element*>(p.weight), *bias = static_cast<const element*>(p.bias);
  const Out* position = static_cast<const Out*>(p.position);
  float tile[kRows * kPanel];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t panel = task / blocks, d = task % blocks * kRows, outputs = std::min<int64_t>(kRows, D - d);
    const int64_t first = panel * kPanel, count = std::min<int64_t>(kPanel, p.count - first);
    const element* rows[kRows];  // past the last one, the last again: computed and dropped
    for (int64_t r = 0; r < kRows; ++r) rows[r] = weight + std::min(d + r, D - 1) * p.weight_row;
    multiply_tile<Product, Product::kPack>(rows, p.panels + panel * steps * kPanel, steps, count, tile);
    int64_t tokens[kPanel];
    for (int64_t lane = 0; lane < count; ++lane) tokens[lane] = token_of(p, p.first + first + lane);
    for (int64_t lane = 0; lane < count; lane += kLanes) {
      for (int64_t r = 0; r < outputs; r += kLanes) {
        vec columns[kLanes];
        for (int i = 0; i < kLanes; ++i) columns[i] = load(tile + (r + i) * kPanel + lane);
        transpose(columns);
        each_vector(std::min<int64_t>(kLanes, outputs - r), [&](int64_t, auto lanes) STMAE_INLINE_BODY {
          const vec shift = bias ? load(bias + d + r, lanes) : zero();
          for (int i = 0; i < std::min<int64_t>(kLanes, count - lane); ++i) {
            vec x = columns[i] + shift;
            if (position) x = x + load(position + tokens[lane + i] * D + d + r, lanes);
            store(static_cast<Out*>(p.out) + (p.first + first + lane + i) * D + d + r, x, lanes);
          }
        });
      }
    }
  }
}

static void patchify_tiles(const Patchify& p, int64_t begin, int64_t end) {
  if (p.weight_float) {
    forward_tiles<Float32, float>(p, begin, end);
  } else {
    p.out_float ? forward_tiles<Bfloat16, float>(p, begin, end) : forward_tiles<Bfloat16, bf16>(p, begin, end);
  }
}

// ---------------------------------------------------------------------------------------------------------- backward

// Cuts a row of units into blocks of kWidth, zero beyond: block i goes to `to` + i * stride.
template <int kWidth>
static void cut(const float* units, int64_t n, float* to, int64_t stride) {
  for (int64_t i = 0; i < n; i += kWidth, to += stride) {
    if (i + kWidth <= n) {
      std::memcpy(to, units + i, kWidth * sizeof(float));
    } else {
      std::memcpy(to, units + i, (n - i) * sizeof(float));
      std::memset(to + n - i, 0, (kWidth - (n - i)) * sizeof(float));
    }
  }
}

// Steps [begin, end), kPack patches each: their pixels into panels [panel][step][kPanel], their gradient into
// blocks [block][step][kRows].
template <typename Product, typename Out>
static void pack_steps(const Patchify& p, float* scratch, int64_t begin, int64_t end) {
  const int64_t P = p.P, D = p.D, steps = (p.count + Product::kPack - 1) / Product::kPack;
  float *even = scratch, *odd = scratch + 2 * P;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t first = p.first + s * Product::kPack;
    const bool second = Product::kPack == 2 && s * 2 + 1 < p.count;
    read_pixels(p, first, even);
    if (second) read_pixels(p, first + 1, odd);
    each_vector(P, [&](int64_t i, auto lanes) STMAE_INLINE_BODY {
      store(even + i, Product::unit(load(even + i, lanes), second ? load(odd + i, lanes) : zero()), lanes);
    });
    cut<kPanel>(even, P, p.panels + s * kPanel, steps * kPanel);
    const Out* grad = static_cast<const Out*>(p.grad_out) + first * D;
    each_vector(D, [&](int64_t i, auto lanes) STMAE_INLINE_BODY {
      store(scratch + i, Product::unit(load(grad + i, lanes), second ? load(grad + D + i, lanes) : zero()), lanes);
    });
    cut<kRows>(scratch, D, p.packed_grad + s * kRows, steps * kRows);
  }
}

static void patchify_backward_pack(const Patchify& p, float* scratch, int64_t begin, int64_t end) {
  if (p.weight_float) {
    pack_steps<Float32, float>(p, scratch, begin, end);
  } else {
    p.out_float ? pack_steps<Bfloat16, float>(p, scratch, begin, end) : pack_steps<Bfloat16, bf16>(p, scratch, begin, end);
  }
}

static void patchify_units(const Patchify& p, int64_t* elements) {  // how many elements a unit holds
  *elements = p.weight_float ? Float32::kPack : Bfloat16::kPack;
}

// Tasks [begin, end): kRows outputs x kPanel pixels of the weight's gradient each.
template <typename Product>
static void backward_tiles(const Patchify& p, int64_t begin, int64_t end) {
  // Both operands are packed here. Where a bfloat16 unit is a widened float, the gradient is one, too.
  using element = std::conditional_t<Product::kPack == 1, float, typename Product::element>;
  const int64_t P = p.P, D = p.D, steps = (p.count + Product::kPack - 1) / Product::kPack, blocks = (D + kRows - 1) / kRows;
  float tile[kRows * kPanel];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t panel = task / blocks, block = task % blocks, pixel = panel * kPanel,
                  pixels = std::min<int64_t>(kPanel, P - pixel);
    const element* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = reinterpret_cast<const element*>(p.packed_grad + block * steps * kRows + r);
    multiply_tile<Product, kRows * Product::kPack>(rows, p.panels + panel * steps * kPanel, steps, pixels, tile);
    for (int64_t r = 0; r < std::min<int64_t>(kRows, D - block * kRows); ++r) {
      const int64_t at = (block * kRows + r) * P + pixel;
      each_vector(pixels, [&](int64_t i, auto lanes) STMAE_INLINE_BODY {
        vec x = load(tile + r * kPanel + i, lanes);
        if (p.first > 0) x = x + load(p.weight_sum + at + i, lanes);
        if (p.weight_float || p.first + p.count < p.total) {
          store(p.weight_sum + at + i, x, lanes);
        } else {
          store(static_cast<bf16*>(p.grad_weight) + at + i, x, lanes);
        }
      });
    }
  }
}

static void patchify_backward_tiles(const Patchify& p, int64_t begin, int64_t end) {
  p.weight_float ? backward_tiles<Float32>(p, begin, end) : backward_tiles<Bfloat16>(p, begin, end);
}

// Outputs [begin, end) of the bias's gradient: sums over runs of patches, then over runs.
template <typename Out>
static void bias_columns(const Patchify& p, int64_t begin, int64_t end) {
  constexpr int64_t kRun = 64;
  const Out* grad = static_cast<const Out*>(p.grad_out);
  each_vector(end - begin, [&](int64_t i, auto lanes) STMAE_INLINE_BODY {
    vec total = zero();
    for (int64_t run = 0; run < p.total; run += kRun) {
      vec part = zero();
      for (int64_t k = run; k < std::min(p.total, run + kRun); ++k) part = part + load(grad + k * p.D + begin + i, lanes);
      total = total + part;
    }
    if (p.weight_float) {
      store(static_cast<float*>(p.grad_bias) + begin + i, total, lanes);
    } else {
      store(static_cast<bf16*>(p.grad_bias) + begin + i, total, lanes);
    }
  });
}

static void patchify_grad_bias(const Patchify& p, int64_t begin, int64_t end) {
  p.out_float ? bias_columns<float>(p, begin, end) : bias_columns<bf16>(p, begin, end);
}

// Tokens [begin, end) of the position's gradient; `rows` has room for a pointer to each clip's.
template <typename Out>
static void position_rows(const Patchify& p, const void** rows, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    int64_t count = 0;
    for (int64_t b = 0; b < p.B; ++b) {
      const int32_t slot = p.slots[b * p.N + n];
      if (slot >= 0) rows[count++] = static_cast<const Out*>(p.grad_out) + (b * p.K + slot) * p.D;
    }
    each_vector(p.D, [&](int64_t d, auto lanes) STMAE_INLINE_BODY {
      vec total = zero();
      for (int64_t i = 0; i < count; ++i) total = total + load(static_cast<const Out*>(rows[i]) + d, lanes);
      store(static_cast<Out*>(p.grad_position) + n * p.D + d, total, lanes);
    });
  }
}

static void patchify_grad_position(const Patchify& p, const void** rows, int64_t begin, int64_t end) {
  p.out_float ? position_rows<float>(p, rows, begin, end) : position_rows<bf16>(p, rows, begin, end);
}

}  // namespace stmae::STMAE_ISA

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <type_traits>

#include "../parallel.h"
#include "../token_ids.h"
#include "../video.h"

namespace stmae {

constexpr int64_t kPanel = 48;  // lanes of a panel, three of the widest vectors
constexpr int64_t kRows = 16;   // rows that a task multiplies with a panel
constexpr int64_t kGroup = 16;  // patches that are transposed into a panel together, the lanes of the widest vector
constexpr int64_t kPart = 960;  // patches that are gathered before they are multiplied, so that they take some megabytes

struct Patchify {
  Patches patches;
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
  const int32_t* slots;             // [B, N]
  float *packed_grad, *weight_sum;  // weight_sum [D, P]: grad_weight itself if that is float32
  void *grad_weight, *grad_bias, *grad_position;
};

}  // namespace stmae

#define STMAE_KERNEL_FILE "cpu/masked_patchify.cpp"
#include "../for_each_isa.h"

namespace stmae {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

Patchify describe(const Tensor& video, const Tensor& keep, const Tensor& weight, const Normalization& normalization) {
  Patchify p{};
  p.patches = patches(video, weight.size(2), weight.size(3), weight.size(4), nullptr);
  p.scale = normalization.scale.data();
  p.shift = normalization.shift.data();
  p.keep = keep.const_data_ptr<int64_t>();
  p.keep_batch = keep.stride(0);
  p.keep_token = keep.stride(1);
  p.B = keep.size(0);
  p.K = keep.size(1);
  p.N = video.size(2) / p.patches.u * p.patches.h * p.patches.w;
  p.D = weight.size(0);
  p.P = p.patches.values();
  p.weight_float = is_float32("masked_patchify", weight.scalar_type());
  p.total = p.B * p.K;
  return p;
}

Tensor masked_patchify(const Tensor& video, const Tensor& keep, const Tensor& weight, std::optional<Tensor> bias,
                       std::optional<Tensor> position, std::vector<double> mean, std::vector<double> std) {
  const Normalization normalization(mean, std);
  Patchify p = describe(video, keep, weight, normalization);
  token_slots("masked_patchify", "keep", keep, p.N);
  Tensor out = torch::stable::new_empty(position ? *position : weight, {p.B, p.K, p.D});
  p.out_float = is_float32("masked_patchify", out.scalar_type());
  p.out = out.mutable_data_ptr();
  p.weight = weight.const_data_ptr();
  p.weight_row = p.P;
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.position = position ? position->const_data_ptr() : nullptr;
  std::vector<c10::BFloat16> padded;
  if (!p.weight_float && p.P % 2) {  // bfloat16 is read in pairs, and a row's last one must not reach into the next row
    p.weight_row = p.P + 1;
    padded.resize(p.D * p.weight_row);
    for (int64_t d = 0; d < p.D; ++d)
      std::copy_n(weight.const_data_ptr<c10::BFloat16>() + d * p.P, p.P, padded.data() + d * p.weight_row);
    p.weight = padded.data();
  }
  if (out.numel() == 0) return out;
  const int64_t groups = (std::min(p.total, kPart) + kGroup - 1) / kGroup, parts = pieces(groups, 1);
  const int64_t scratch = (kGroup + 1) * p.P + kGroup;
  std::unique_ptr<float[]> patch_rows(new float[parts * scratch]);
  std::unique_ptr<float[]> panels(new float[round_up(std::min(p.total, kPart), kPanel) * p.P]);
  p.panels = panels.get();
  for (p.first = 0; p.first < p.total; p.first += kPart) {
    p.count = std::min(kPart, p.total - p.first);
    for_pieces((p.count + kGroup - 1) / kGroup, parts, [&](int64_t part, int64_t begin, int64_t end) {
      STMAE_DISPATCH(patchify_pack, p, patch_rows.get() + part * scratch, begin, end);
    });
    const int64_t tasks = (p.count + kPanel - 1) / kPanel * ((p.D + kRows - 1) / kRows);
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { STMAE_DISPATCH(patchify_tiles, p, begin, end); });
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> masked_patchify_backward(const Tensor& grad_out, const Tensor& video, const Tensor& keep,
                                                            const Tensor& weight, std::optional<Tensor> bias,
                                                            std::optional<Tensor> position, std::vector<double> mean,
                                                            std::vector<double> std) {
  const Normalization normalization(mean, std);
  Patchify p = describe(video, keep, weight, normalization);
  const auto slots = token_slots("masked_patchify", "keep", keep, p.N);
  Tensor grad_weight = torch::stable::new_empty(weight, weight.sizes());
  Tensor grad_bias = torch::stable::new_empty(weight, {bias ? p.D : 0});
  Tensor grad_position = position ? torch::stable::new_empty(*position, {p.N, p.D}) : torch::stable::new_empty(weight, {0});
  p.out_float = is_float32("masked_patchify", grad_out.scalar_type());
  p.grad_out = grad_out.const_data_ptr();
  p.slots = slots.get();
  p.grad_weight = grad_weight.mutable_data_ptr();
  p.grad_bias = grad_bias.mutable_data_ptr();
  p.grad_position = grad_position.mutable_data_ptr();
  if (p.total == 0) {
    torch::stable::zero_(grad_weight);
    if (bias) torch::stable::zero_(grad_bias);
    if (position) torch::stable::zero_(grad_position);
    return {grad_weight, grad_bias, grad_position};
  }
  const int64_t most = std::min(p.total, kPart), parts = pieces(most, 8), scratch = std::max(4 * p.P, p.D) + kGroup;
  std::unique_ptr<float[]> patch_rows(new float[parts * scratch]);
  std::unique_ptr<float[]> panels(new float[most * round_up(p.P, kPanel)]);
  std::unique_ptr<float[]> packed_grad(new float[most * round_up(p.D, kRows)]);
  std::unique_ptr<float[]> sum;
  if (!p.weight_float && p.total > kPart) sum.reset(new float[p.D * p.P]);
  p.panels = panels.get();
  p.packed_grad = packed_grad.get();
  std::unique_ptr<const void*[]> clips(new const void*[parts * p.B]);
  p.weight_sum = p.weight_float ? grad_weight.mutable_data_ptr<float>() : sum.get();
  int64_t elements = 1;
  STMAE_DISPATCH(patchify_units, p, &elements);
  for (p.first = 0; p.first < p.total; p.first += kPart) {
    p.count = std::min(kPart, p.total - p.first);
    for_pieces((p.count + elements - 1) / elements, parts, [&](int64_t part, int64_t begin, int64_t end) {
      STMAE_DISPATCH(patchify_backward_pack, p, patch_rows.get() + part * scratch, begin, end);
      if (p.first > 0) return;  // the other two gradients need no panels: here, they cost no threads of their own
      const auto share = [&](int64_t count) { return count * part / parts; };
      const auto next_share = [&](int64_t count) { return count * (part + 1) / parts; };
      if (bias) STMAE_DISPATCH(patchify_grad_bias, p, share(p.D), next_share(p.D));
      if (position) STMAE_DISPATCH(patchify_grad_position, p, clips.get() + part * p.B, share(p.N), next_share(p.N));
    });
    const int64_t tasks = (p.P + kPanel - 1) / kPanel * ((p.D + kRows - 1) / kRows);
    torch::stable::parallel_for(0, tasks, 1,
                                [&](int64_t begin, int64_t end) { STMAE_DISPATCH(patchify_backward_tiles, p, begin, end); });
  }
  return {grad_weight, grad_bias, grad_position};
}

STABLE_TORCH_LIBRARY_IMPL(stmae, CPU, m) {
  m.impl("masked_patchify", TORCH_BOX(&masked_patchify));
  m.impl("masked_patchify_backward", TORCH_BOX(&masked_patchify_backward));
}

}  // namespace
}  // namespace stmae

#endif

// The three products of a linear layer. The right operand is packed into panels of kWidth lanes and converted as it is, so that
// float32 weights serve a bfloat16 product without a copy of them. Each tile of kTileRows rows then passes over a group of panels: the
// rows stay in the first cache, and the panels stream past them in the order in which they lie in memory.
#ifdef STMAE_ISA

#include "simd/vector_loop.h"
#include "simd/gemm.h"

namespace stmae::STMAE_ISA {

// Panels [begin, end): the source's rows become lanes.
template <typename E, typename T>
static void pack_rows(const Packing& p, int64_t begin, int64_t end) {
  const T* source = static_cast<const T*>(p.source);
  for (int64_t panel = begin; panel < end; ++panel) {
    float* to = p.panels + panel * p.steps * kWidth;
    for (int64_t lane = 0; lane < kWidth; lane += kLanes) {
      const int64_t first = panel * kWidth + lane;
      each_vector(p.steps, [&](int64_t s, auto lanes) {
        vec rows[kLanes];
        for (int i = 0; i < kLanes; ++i)
          rows[i] = first + i < p.lanes ? E::read(source + (first + i) * p.stride + s * E::kPack, lanes) : zero();
        transpose(rows);
        for (int i = 0; i < std::min<int64_t>(kLanes, p.steps - s); ++i) store(to + (s + i) * kWidth + lane, rows[i]);
      });
    }
  }
}

// body(i, packed) for the columns [begin, end) of the source at step s, a vector of lanes from column begin + i on.
template <typename E, typename T, typename Body>
STMAE_INLINE void each_packed(const Packing& p, int64_t s, int64_t begin, int64_t end, const Body& body) {
  const T* even = static_cast<const T*>(p.source) + s * E::kPack * p.stride;
  const T* odd = (s + 1) * E::kPack <= p.depth ? even + p.stride : nullptr;
  prefetch(even, end, end - begin);  // what comes next: rows lie pages apart
  if (E::kPack == 2 && odd) prefetch(odd, end, end - begin);
  each_vector(end - begin, [&](int64_t i, auto lanes)
                               STMAE_INLINE_BODY { body(i, E::read(even + begin + i, odd ? odd + begin + i : nullptr, lanes)); });
}

// Blocks of kStepBlock steps, [begin, end): the source's columns become lanes, or, in blocks, the rows of tiles.
template <typename E, typename T>
static void pack_columns(const Packing& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t last = std::min(p.steps, (block + 1) * kStepBlock);
    for (int64_t lane = 0; lane < p.lanes; lane += kWidth) {
      for (int64_t s = block * kStepBlock; s < last; ++s) {
        float* to = p.panels + lane * p.steps + s * kWidth;
        const int64_t lanes = std::min(kWidth, p.lanes - lane);
        each_packed<E, T>(p, s, lane, lane + lanes, [&](int64_t i, vec packed) STMAE_INLINE_BODY { store(to + i, packed); });
        if (lanes < kWidth) {
          const int64_t written = (lanes + kLanes - 1) / kLanes * kLanes;
          std::memset(to + written, 0, (kWidth - written) * sizeof(float));
        }
      }
    }
  }
}

template <typename E, typename T>
static void pack_blocks(const Packing& p, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = 32 * kTileRows;  // full lines of the source, which may lie pages apart
  static_assert(kColumns % kLanes == 0);
  alignas(64) float packed_row[kColumns] = {};
  for (int64_t block = begin; block < end; ++block) {
    const int64_t last = std::min(p.steps, (block + 1) * kStepBlock);
    for (int64_t column = 0; column < p.lanes; column += kColumns) {
      const int64_t columns = std::min(kColumns, p.lanes - column);
      for (int64_t s = block * kStepBlock; s < last; ++s) {
        each_packed<E, T>(p, s, column, column + columns,
                          [&](int64_t i, vec packed) STMAE_INLINE_BODY { store(packed_row + i, packed); });
        for (int64_t i = 0; i < columns; i += kTileRows)
          std::memcpy(p.panels + (column + i) * p.block_steps + s * kTileRows, packed_row + i, kTileRows * sizeof(float));
      }
    }
  }
}

template <typename E, typename T>
STMAE_INLINE void pack(const Packing& p, int64_t begin, int64_t end) {
  switch (p.order) {
    case Order::rows: return pack_rows<E, T>(p, begin, end);
    case Order::columns: return pack_columns<E, T>(p, begin, end);
    case Order::blocks: return pack_blocks<E, T>(p, begin, end);
  }
}

static void linear_pack(const Packing& p, int64_t begin, int64_t end) {
  if (!p.bfloat16) {
    pack<Float32, float>(p, begin, end);
  } else {
    p.source_float ? pack<Bfloat16, float>(p, begin, end) : pack<Bfloat16, bf16>(p, begin, end);
  }
}

static void linear_pack_size(bool bfloat16, int64_t* elements) {  // how many elements of a sum a lane holds
  *elements = bfloat16 ? Bfloat16::kPack : Float32::kPack;
}

// Tasks [begin, end): kTileRows rows and a group of panels each.
template <typename E, typename Element, int kStep, typename Out>
static void tiles(const Tiles& p, int64_t begin, int64_t end) {
  constexpr int kVectors = kRegisters == 32 ? 4 : 2;  // with kTileRows rows, what 32 or 16 registers hold
  const int64_t blocks = (p.rows + kTileRows - 1) / kTileRows, panels = (p.columns + kWidth - 1) / kWidth;
  alignas(64) float tile[kTileRows * kWidth];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / blocks, row = task % blocks * kTileRows, rows = std::min<int64_t>(kTileRows, p.rows - row);
    ScatteredRows<Element, kStep, kTileRows> left;  // past the last row, the last again: computed and dropped
    for (int64_t r = 0; r < kTileRows; ++r)
      left.row[r] = static_cast<const Element*>(p.left) +
                    (kStep > E::kPack ? row * p.left_stride + r * E::kPack : std::min(row + r, p.rows - 1) * p.left_stride);
    for (int64_t panel = panels * group / p.groups; panel < panels * (group + 1) / p.groups; ++panel) {
      const float* right = p.panels + panel * p.steps * kWidth;
      const int64_t column = panel * kWidth, columns = std::min(kWidth, p.columns - column);
      for (int64_t lane = 0; lane < columns; lane += kVectors * kLanes)
        gemm_tile_in_blocks<E, kTileRows, kVectors>(left, right + lane, Fixed<kWidth>(), p.steps, tile + lane, Fixed<kWidth>());
      for (int64_t r = 0; r < rows; ++r) {
        Out* out = static_cast<Out*>(p.out) + (row + r) * p.out_stride + column;
        each_vector(columns, [&](int64_t i, auto lanes) STMAE_INLINE_BODY {
          vec x = load(tile + r * kWidth + i);
          if (p.bias) x = x + load(p.bias + column + i, lanes);
          if (p.add) x = x + load(out + i, lanes);
          store(out + i, x, lanes);
        });
      }
    }
  }
}

template <typename E, typename Element, int kStep>
STMAE_INLINE void tiles_to(const Tiles& p, int64_t begin, int64_t end) {
  p.out_float ? tiles<E, Element, kStep, float>(p, begin, end) : tiles<E, Element, kStep, bf16>(p, begin, end);
}

static void linear_tiles(const Tiles& p, int64_t begin, int64_t end) {
  if (!p.bfloat16) {
    p.left_packed ? tiles_to<Float32, float, kTileRows>(p, begin, end) : tiles_to<Float32, float, 1>(p, begin, end);
  } else if (p.left_packed) {
    // Where a bfloat16 lane is a widened float, so is the packed operand.
    using element = std::conditional_t<Bfloat16::kPack == 1, float, bf16>;
    tiles_to<Bfloat16, element, kTileRows * Bfloat16::kPack>(p, begin, end);
  } else {
    tiles_to<Bfloat16, bf16, Bfloat16::kPack>(p, begin, end);
  }
}

}  // namespace stmae::STMAE_ISA

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <type_traits>

#include "base/check.h"
#include "base/parallel.h"
#include "base/buffer.h"

namespace stmae {

constexpr int64_t kWidth = 64;      // lanes of a panel, four of the widest vectors
constexpr int kTileRows = 6;        // rows of a tile
constexpr int64_t kMaxRows = 2048;  // of which a gradient sums at a time: they are packed into some megabytes
constexpr int64_t kFewRows = 1024;  // up to here they stay in cache while panel after panel is packed and multiplied
constexpr int64_t kStepBlock = 16;  // steps that are packed together, so that every panel gets some cache lines at a time

enum class Order { rows, columns, blocks };

struct Packing {
  Order order;
  bool bfloat16, source_float;  // of the product, of the source
  const void* source;           // a matrix with `stride` elements from row to row
  int64_t stride, lanes, depth, steps;
  float* panels;  // [ceil(lanes / kWidth)][steps][kWidth]; blocks: [ceil(lanes / kTileRows)][block_steps][kTileRows]
  int64_t block_steps;
};

struct Tiles {
  bool bfloat16, left_packed, out_float, add;
  int64_t rows, columns, steps, groups;
  const void* left;  // rows with left_stride elements from one to the next, or blocks of kTileRows
  int64_t left_stride;
  const float *panels, *bias;  // bias [columns] or null
  void* out;                   // [rows, columns], out_stride elements from row to row
  int64_t out_stride;
};

}  // namespace stmae

#define STMAE_KERNEL_FILE "cpu/linear.cpp"
#include "base/for_each_isa.h"

namespace stmae {
namespace {

using torch::stable::Tensor;

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Panels of `lanes` lanes and `steps` steps, in floats.
int64_t panel_floats(int64_t lanes, int64_t width, int64_t steps) {
  return checked_product("linear", {divide_up(lanes, width), width, steps});
}

int64_t elements_in_lane(bool bfloat16) {
  int64_t elements = 1;
  STMAE_DISPATCH(linear_pack_size, bfloat16, &elements);
  return elements;
}

int64_t packing_tasks(const Packing& p) {
  return p.order == Order::rows ? divide_up(p.lanes, kWidth) : divide_up(p.steps, kStepBlock);
}

void pack(const Packing& p) {
  parallel_for_dynamic(packing_tasks(p), 1, 1,
                       [&](int64_t, int64_t begin, int64_t end) { STMAE_DISPATCH(linear_pack, p, begin, end); });
}

void multiply(Tiles& p) {
  const int64_t blocks = divide_up(p.rows, kTileRows), panels = divide_up(p.columns, kWidth);
  p.groups = std::clamp<int64_t>(divide_up(8 * torch::stable::get_num_threads(), blocks), 1, panels);
  parallel_for_dynamic(blocks * p.groups, 1, 1,
                       [&](int64_t, int64_t begin, int64_t end) { STMAE_DISPATCH(linear_tiles, p, begin, end); });
}

// Packs a panel and multiplies it right away, so that it never leaves the thread's cache.
void pack_and_multiply(const Packing& all_lanes, const Tiles& all_columns, int64_t source_size, int64_t out_size) {
  const int64_t count = divide_up(all_lanes.lanes, kWidth), size = kWidth * all_lanes.steps;
  Buffer<float> memory(num_workers(count, 1) * size);
  parallel_for_dynamic(count, 1, 1, [&](int64_t thread, int64_t begin, int64_t end) {
    float* panel = memory.data() + thread * size;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kWidth;
      Packing p = all_lanes;
      p.source = static_cast<const char*>(p.source) + first * (p.order == Order::rows ? p.stride : 1) * source_size;
      p.lanes = std::min(kWidth, p.lanes - first);
      p.panels = panel;
      STMAE_DISPATCH(linear_pack, p, 0, packing_tasks(p));
      Tiles t = all_columns;
      t.columns = p.lanes;
      t.panels = panel;
      if (t.bias) t.bias += first;
      t.out = static_cast<char*>(t.out) + first * out_size;
      STMAE_DISPATCH(linear_tiles, t, 0, divide_up(t.rows, kTileRows));
    }
  });
}

// out [M, N] = x [M, K] times weight [N, K] transposed, or [K, N] if `transposed`, plus bias [N].
void linear_product(Tensor out, const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, bool transposed) {
  const char* op = "linear_product";
  check_contiguous_tensor(op, "x", x, {kAny, kAny}, floating());
  const int64_t M = x.size(0), K = x.size(1);
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  check_contiguous_tensor(op, "weight", weight, {transposed ? K : kAny, transposed ? kAny : K},
                          bfloat16 ? floating() : DTypes(ScalarType::Float));
  const int64_t N = weight.size(transposed ? 1 : 0);
  const bool weight_float = weight.scalar_type() == ScalarType::Float;
  check_contiguous_tensor(op, "out", out, {M, N}, x.scalar_type());
  if (bias) check_contiguous_tensor(op, "bias", *bias, {N}, ScalarType::Float);
  STMAE_CHECK(K > 0 && (!bfloat16 || K % 2 == 0), op, ": expected a positive depth, in bfloat16 an even one, got ", K);
  check_no_overlap(op, "out", out, "x", x);
  check_no_overlap(op, "out", out, "weight", weight);
  if (bias) check_no_overlap(op, "out", out, "bias", *bias);
  if (M == 0 || N == 0) return;
  const int64_t steps = divide_up(K, elements_in_lane(bfloat16));
  Packing packing{transposed ? Order::columns : Order::rows,
                  bfloat16,
                  weight_float,
                  weight.const_data_ptr(),
                  weight.size(1),
                  N,
                  K,
                  steps,
                  nullptr,
                  0};
  Tiles tiles{bfloat16,
              false,
              !bfloat16,
              false,
              M,
              N,
              steps,
              1,
              x.const_data_ptr(),
              K,
              nullptr,
              bias ? bias->const_data_ptr<float>() : nullptr,
              out.mutable_data_ptr(),
              N};
  if (M <= kFewRows && divide_up(N, kWidth) >= 4 * torch::stable::get_num_threads())
    return pack_and_multiply(packing, tiles, weight_float ? 4 : 2, bfloat16 ? 2 : 4);
  Buffer<float> panels(panel_floats(N, kWidth, steps));
  packing.panels = panels.data();
  tiles.panels = panels.data();
  pack(packing);
  multiply(tiles);
}

// out [N, K] float32 = grad [M, N] transposed times x [M, K], added to what is there if `add`.
void linear_weight_gradient(Tensor out, const Tensor& grad, const Tensor& x, bool add) {
  const char* op = "linear_weight_gradient";
  check_contiguous_tensor(op, "grad", grad, {kAny, kAny}, floating());
  const int64_t M = grad.size(0), N = grad.size(1);
  check_contiguous_tensor(op, "x", x, {M, kAny}, grad.scalar_type());
  const int64_t K = x.size(1);
  check_contiguous_tensor(op, "out", out, {N, K}, ScalarType::Float);
  check_no_overlap(op, "out", out, "grad", grad);
  check_no_overlap(op, "out", out, "x", x);
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  if (M == 0 && !add) torch::stable::zero_(out);
  if (M == 0 || N == 0 || K == 0) return;
  const int64_t parts = divide_up(M, kMaxRows), max_depth = divide_up(divide_up(M, parts), 2) * 2;
  const int64_t elements = elements_in_lane(bfloat16), max_steps = divide_up(max_depth, elements);
  // Blocks a multiple of 4096 bytes apart would fall on the same lines of the cache when a block of steps is written to all of them.
  const int64_t block_steps = divide_up(max_steps, 128) * 128 + kStepBlock;
  Buffer<float> panels(panel_floats(K, kWidth, max_steps)), blocks(panel_floats(N, kTileRows, block_steps));
  const int64_t size = bfloat16 ? 2 : 4;
  for (int64_t first = 0; first < M; first += max_depth) {
    const int64_t depth = std::min(max_depth, M - first), steps = divide_up(depth, elements);
    const auto rows_of = [&](const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()) + first * t.size(1) * size; };
    pack({Order::blocks, bfloat16, !bfloat16, rows_of(grad), N, N, depth, steps, blocks.data(), block_steps});
    pack({Order::columns, bfloat16, !bfloat16, rows_of(x), K, K, depth, steps, panels.data(), 0});
    Tiles tiles{bfloat16,
                true,
                true,
                add || first > 0,
                N,
                K,
                steps,
                1,
                blocks.data(),
                block_steps * elements,
                panels.data(),
                nullptr,
                out.mutable_data_ptr(),
                K};
    multiply(tiles);
  }
}

// For operands of products that a library multiplies.
void check_matrix(const Tensor& x, std::string op, std::string name) {
  check_tensor(op.c_str(), name.c_str(), x, sizes_of(x), floating());
}

}  // namespace
}  // namespace stmae

STABLE_TORCH_LIBRARY_IMPL(stmae, CPU, m) {
  m.impl("linear_product", TORCH_BOX(&stmae::linear_product));
  m.impl("linear_weight_gradient", TORCH_BOX(&stmae::linear_weight_gradient));
  m.impl("_check_matrix", TORCH_BOX(&stmae::check_matrix));
}

#endif

// Patches packed into panels, times the weight as it lies in memory. Included once per instruction set, after simd/gemm.h and simd/read_patch.h.

namespace stmae::STMAE_ISA {

template <typename E, int kStep, int kVectors, int kTileRows, typename Element>
static void multiply_rows(const Element* const* rows, const float* panel, int64_t steps, float* tile) {
  ScatteredRows<Element, kStep, kTileRows> a;
  std::copy_n(rows, kTileRows, a.row);
  gemm_tile_in_blocks<E, kTileRows, kVectors>(a, panel, Fixed<kPanel>(), steps, tile, Fixed<kPanel>());
}

// tile[kRows][kPanel] = rows times the first `lanes` lanes of a panel [steps][kPanel].
template <typename E, int kStep, typename Element>
static void multiply_tile(const Element* const* rows, const float* panel, int64_t steps, int64_t lanes, float* tile) {
  constexpr int kTileRows = kRegisters == 32 ? 8 : 4;  // with three vectors, what 32 or 16 registers hold
  static_assert(kRows % kTileRows == 0 && kPanel % (3 * kLanes) == 0);
  for (int64_t lane = 0; lane < lanes; lane += 3 * kLanes) {
    for (int r = 0; r < kRows; r += kTileRows) {
      const int64_t left = lanes - lane;
      const auto multiply = left > 2 * kLanes ? multiply_rows<E, kStep, 3, kTileRows, Element>
                            : left > kLanes   ? multiply_rows<E, kStep, 2, kTileRows, Element>
                                              : multiply_rows<E, kStep, 1, kTileRows, Element>;
      multiply(rows + r, panel + lane, steps, tile + r * kPanel + lane);
    }
  }
}

STMAE_INLINE int64_t token_of(const Patchify& p, int64_t index) {
  return p.keep[index / p.K * p.keep_batch + index % p.K * p.keep_token];
}

// Patch `index` of the batch as normalised floats [P]; `row` has the size of two patches.
template <typename T>
static void read_patch(const Patchify& p, int64_t index, float* row) {
  int64_t b = index / p.K, token = token_of(p, index);
  const Patches* patches = &p.patches;
  if (p.videos) {
    const int32_t video = p.video_of_row[index];
    patches = p.videos + video;
    token -= p.first_tokens[video];
    b = 0;
  }
  if constexpr (std::is_same_v<T, float>) {
    read_channels_first(*patches, b, token, row);
  } else {
    T* raw = reinterpret_cast<T*>(row + p.P);
    read_channels_first(*patches, b, token, raw);
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

// Groups [begin, end) of kGroup patches each, into panels [panel][step][kPanel].
template <typename E>
static void pack_columns(const Patchify& p, float* scratch, int64_t begin, int64_t end) {
  const int64_t P = p.P, steps = (P + E::kPack - 1) / E::kPack;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kGroup, count = std::min<int64_t>(kGroup, p.count - first);
    float* panel = p.panels + first / kPanel * steps * kPanel + first % kPanel;
    for (int64_t i = 0; i < kGroup; ++i) {
      float* row = scratch + i * P;
      if (i < count) {
        read_pixels(p, p.first + first + i, row);
        E::pack_row(row, P);
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
template <typename E, typename Out>
static void forward_tiles(const Patchify& p, int64_t begin, int64_t end) {
  using element = typename E::element;
  const int64_t steps = (p.P + E::kPack - 1) / E::kPack, D = p.D, blocks = (D + kRows - 1) / kRows;
  const element *weight = static_cast<const element*>(p.weight), *bias = static_cast<const element*>(p.bias);
  const Out* position = static_cast<const Out*>(p.position);
  float tile[kRows * kPanel];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t panel = task / blocks, d = task % blocks * kRows, outputs = std::min<int64_t>(kRows, D - d);
    const int64_t first = panel * kPanel, count = std::min<int64_t>(kPanel, p.count - first);
    const element* rows[kRows];  // past the last one, the last again: computed and dropped
    for (int64_t r = 0; r < kRows; ++r) rows[r] = weight + std::min(d + r, D - 1) * p.weight_row;
    multiply_tile<E, E::kPack>(rows, p.panels + panel * steps * kPanel, steps, count, tile);
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

}  // namespace stmae::STMAE_ISA

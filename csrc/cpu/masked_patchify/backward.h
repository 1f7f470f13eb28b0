// The gradients of weight, bias and position. Included once per instruction set, after forward.h.

namespace stmae::STMAE_ISA {

// Cuts a row of lanes into blocks of kWidth, zero beyond: block i goes to `to` + i * stride.
template <int kWidth>
static void cut(const float* lanes, int64_t n, float* to, int64_t stride) {
  for (int64_t i = 0; i < n; i += kWidth, to += stride) {
    if (i + kWidth <= n) {
      std::memcpy(to, lanes + i, kWidth * sizeof(float));
    } else {
      std::memcpy(to, lanes + i, (n - i) * sizeof(float));
      std::memset(to + n - i, 0, (kWidth - (n - i)) * sizeof(float));
    }
  }
}

// Steps [begin, end), kPack patches each: their pixels into panels [panel][step][kPanel], their gradient into
// blocks [block][step][kRows].
template <typename E, typename Out>
static void pack_steps(const Patchify& p, float* scratch, int64_t begin, int64_t end) {
  const int64_t P = p.P, D = p.D, steps = (p.count + E::kPack - 1) / E::kPack;
  float *even = scratch, *odd = scratch + 2 * P;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t first = p.first + s * E::kPack;
    const bool second = E::kPack == 2 && s * 2 + 1 < p.count;
    read_pixels(p, first, even);
    if (second) read_pixels(p, first + 1, odd);
    each_vector(P, [&](int64_t i, auto lanes) STMAE_INLINE_BODY {
      store(even + i, E::pack(load(even + i, lanes), second ? load(odd + i, lanes) : zero()), lanes);
    });
    cut<kPanel>(even, P, p.panels + s * kPanel, steps * kPanel);
    const Out* grad = static_cast<const Out*>(p.grad_out) + first * D;
    each_vector(D, [&](int64_t i, auto lanes) STMAE_INLINE_BODY {
      store(scratch + i, E::pack(load(grad + i, lanes), second ? load(grad + D + i, lanes) : zero()), lanes);
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

static void patchify_pack_size(const Patchify& p, int64_t* elements) {  // how many elements a lane holds
  *elements = p.weight_float ? Float32::kPack : Bfloat16::kPack;
}

// Tasks [begin, end): kRows outputs x kPanel pixels of the weight's gradient each.
template <typename E>
static void backward_tiles(const Patchify& p, int64_t begin, int64_t end) {
  // Both operands are packed here. Where a bfloat16 lane is a widened float, the gradient is one, too.
  using element = std::conditional_t<E::kPack == 1, float, typename E::element>;
  const int64_t P = p.P, D = p.D, steps = (p.count + E::kPack - 1) / E::kPack, blocks = (D + kRows - 1) / kRows;
  float tile[kRows * kPanel];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t panel = task / blocks, block = task % blocks, pixel = panel * kPanel,
                  pixels = std::min<int64_t>(kPanel, P - pixel);
    const element* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = reinterpret_cast<const element*>(p.packed_grad + block * steps * kRows + r);
    multiply_tile<E, kRows * E::kPack>(rows, p.panels + panel * steps * kPanel, steps, pixels, tile);
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

// Outputs [begin, end) of the bias's gradient: sums over blocks of patches, then over blocks.
template <typename Out>
static void bias_columns(const Patchify& p, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 64;
  const Out* grad = static_cast<const Out*>(p.grad_out);
  each_vector(end - begin, [&](int64_t i, auto lanes) STMAE_INLINE_BODY {
    vec total = zero();
    for (int64_t block = 0; block < p.total; block += kBlock) {
      vec part = zero();
      for (int64_t k = block; k < std::min(p.total, block + kBlock); ++k) part = part + load(grad + k * p.D + begin + i, lanes);
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

// Tokens [begin, end) of the position's gradient; `rows` holds up to a pointer for each clip.
template <typename Out>
static void position_rows(const Patchify& p, const void** rows, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    int64_t count = 0;
    for (int64_t b = 0; b < p.B; ++b) {
      const int32_t index = p.inverse[b * p.N + n];
      if (index >= 0) rows[count++] = static_cast<const Out*>(p.grad_out) + (b * p.K + index) * p.D;
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

// The inner loop of the matrix products: a tile of results stays in registers while units of one operand are broadcast and rows of
// the other's panel are read as vectors. Included once per instruction set, after simd.h and each_vector.h.

namespace stmae::STMAE_ISA {

constexpr int64_t kRun = 128;  // steps that are summed in a register

// How operands multiply. A unit, the 32 bits of a lane, holds kPack elements that are neighbours along the sum.
struct Float32 {
  using element = float;
  static constexpr int kPack = 1;
  STMAE_INLINE vec broadcast(const float* unit) { return set(*unit); }
  STMAE_INLINE vec multiply_add(vec a, vec b, vec c) { return fma(a, b, c); }
  STMAE_INLINE vec unit(vec a, vec) { return a; }
  STMAE_INLINE void units(float*, int64_t) {}
  template <typename T, typename Lanes>
  STMAE_INLINE vec read(const T* p, Lanes lanes) {
    return load(p, lanes);
  }  // a vector of units that lie side by side
  template <typename T, typename Lanes>
  STMAE_INLINE vec read(const T* p, const T*, Lanes lanes) {
    return load(p, lanes);
  }  // of units from rows of one step
};

#if STMAE_ISA_LEVEL >= 3
struct Bfloat16 {
  using element = bf16;
  static constexpr int kPack = 2;
  STMAE_INLINE vec broadcast(const bf16* unit) {
    int32_t pair;
    std::memcpy(&pair, unit, sizeof(pair));
    return {_mm512_castsi512_ps(_mm512_set1_epi32(pair))};
  }
  STMAE_INLINE vec multiply_add(vec a, vec b, vec c) {
    return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }
  STMAE_INLINE vec unit(vec a, vec b) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow(a)), high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(b)), 16);
    return {_mm512_castsi512_ps(_mm512_or_si512(low, high))};
  }
  STMAE_INLINE void units(float* row, int64_t n) {
    bf16* to = reinterpret_cast<bf16*>(row);
    each_vector(n, [&](int64_t i, auto lanes) STMAE_INLINE_BODY { store(to + i, load(row + i, lanes), lanes); });
    if (n % 2) to[n] = 0.f;
  }
  template <typename Lanes>
  STMAE_INLINE vec read(const float* p, Lanes lanes) {
    constexpr bool whole = std::is_same_v<Lanes, Whole>;
    vec low, high;
    if constexpr (whole) {
      low = load(p), high = load(p + kLanes);
    } else {
      low = load(p, std::min(2 * lanes, kLanes)), high = load(p + kLanes, std::max(2 * lanes - kLanes, 0));
    }
    return {reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(high.v, low.v))};
  }
  STMAE_INLINE vec read(const bf16* p, Whole) { return load(reinterpret_cast<const float*>(p)); }
  STMAE_INLINE vec read(const bf16* p, int lanes) { return load(reinterpret_cast<const float*>(p), lanes); }
  template <typename T, typename Lanes>
  STMAE_INLINE vec read(const T* even, const T* odd, Lanes lanes) {  // odd: null where the sum has no such element
    return unit(load(even, lanes), odd ? load(odd, lanes) : zero());
  }
};
#else
struct Bfloat16 {  // without instructions for it: units are floats that were rounded to bfloat16
  using element = bf16;
  static constexpr int kPack = 1;
  STMAE_INLINE vec broadcast(const bf16* unit) { return set(static_cast<float>(*unit)); }
  STMAE_INLINE vec broadcast(const float* unit) { return set(*unit); }
  STMAE_INLINE vec multiply_add(vec a, vec b, vec c) { return fma(a, b, c); }
  STMAE_INLINE vec unit(vec a, vec) {
    bf16 lanes[kLanes];
    store(lanes, a);
    return load(lanes);
  }
  STMAE_INLINE void units(float* row, int64_t n) {
    each_vector(n, [&](int64_t i, auto lanes) STMAE_INLINE_BODY { store(row + i, unit(load(row + i, lanes), zero()), lanes); });
  }
  template <typename T, typename Lanes>
  STMAE_INLINE vec read(const T* p, Lanes lanes) {
    if constexpr (std::is_same_v<T, float>)
      return unit(load(p, lanes), zero());
    else
      return load(p, lanes);
  }
  template <typename T, typename Lanes>
  STMAE_INLINE vec read(const T* p, const T*, Lanes lanes) {
    return read(p, lanes);
  }
};
#endif

// tile[r][lane] = sum over steps s of a[r][s] * panel[s][lane]; a's row r begins at rows[r], and its next unit lies kStep on; rows of
// the panel and of the tile are kPanel long.
// Sums run over kRun steps, then over runs: a long sum in one float32 would err more than plain PyTorch's blocked one.
template <typename Product, typename Element, int kStep, int kTileRows, int kVectors, int64_t kPanel>
static void multiply(const Element* const* rows, const float* panel, int64_t steps, float* tile) {
  const Element* row[kTileRows];
  for (int r = 0; r < kTileRows; ++r) row[r] = rows[r];
  for (int64_t run = 0; run < steps; run += kRun) {
    vec sums[kTileRows][kVectors];
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] = zero();
    for (int64_t s = run; s < std::min(steps, run + kRun); ++s) {
      vec b[kVectors];
      for (int v = 0; v < kVectors; ++v) b[v] = load(panel + s * kPanel + v * kLanes);
      for (int r = 0; r < kTileRows; ++r) {
        const vec a = Product::broadcast(row[r] + s * kStep);
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Product::multiply_add(a, b[v], sums[r][v]);
      }
    }
    for (int r = 0; r < kTileRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        float* to = tile + r * kPanel + v * kLanes;
        store(to, run == 0 ? sums[r][v] : load(to) + sums[r][v]);
      }
    }
  }
}

}  // namespace stmae::STMAE_ISA

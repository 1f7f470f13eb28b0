// The matrix product: one micro-kernel, C[R, V vectors] (+)= A[R, steps] B[steps, V vectors], for every op that multiplies. A tile of C stays
// in registers while elements of A are broadcast and rows of B are read as vectors. What differs from op to op is how A is addressed, how B is
// packed and which tile fits: the template arguments. Included once per instruction set, after vec.h and vector_loop.h.
//
// B is packed into lanes of 32 bits, stored as floats. A lane holds kPack elements that are neighbours along the sum.

namespace stmae::STMAE_ISA {

// How operands multiply.
struct Float32 {
  using element = float;
  static constexpr int kPack = 1;
  STMAE_INLINE vec broadcast(const float* a) { return set(*a); }
  STMAE_INLINE vec multiply_add(vec a, vec b, vec c) { return fma(a, b, c); }
  STMAE_INLINE vec pack(vec a, vec) { return a; }  // two steps of one column each -> lanes
  STMAE_INLINE void pack_row(float*, int64_t) {}   // floats -> lanes, in place
  // A vector of lanes, from elements that lie side by side along the sum; T may be bfloat16, which is widened.
  template <typename T, typename Lanes>
  STMAE_INLINE vec read(const T* p, Lanes lanes) {
    return load(p, lanes);
  }
  // The same from the rows of kPack steps.
  template <typename T, typename Lanes>
  STMAE_INLINE vec read(const T* p, const T*, Lanes lanes) {
    return load(p, lanes);
  }
};

#if STMAE_ISA_LEVEL >= 3
struct Bfloat16 {
  using element = bf16;
  static constexpr int kPack = 2;
  STMAE_INLINE vec broadcast(const bf16* a) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof(pair));
    return {_mm512_castsi512_ps(_mm512_set1_epi32(pair))};
  }
  STMAE_INLINE vec multiply_add(vec a, vec b, vec c) {
    return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }
  STMAE_INLINE vec zip(__m256i even, __m256i odd) {
    return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)))};
  }
  STMAE_INLINE vec pack(vec even, vec odd) { return zip(narrow(even), narrow(odd)); }
  STMAE_INLINE void pack_row(float* row, int64_t n) {
    bf16* to = reinterpret_cast<bf16*>(row);
    each_vector(n, [&](int64_t i, auto lanes) STMAE_INLINE_BODY { store(to + i, load(row + i, lanes), lanes); });
    if (n % 2) to[n] = 0.f;
  }
  template <typename Lanes>
  STMAE_INLINE vec read(const float* p, Lanes lanes) {
    vec low, high;
    if constexpr (std::is_same_v<Lanes, AllLanes>) {
      low = load(p), high = load(p + kLanes);
    } else {
      low = load(p, std::min(2 * lanes, kLanes)), high = load(p + kLanes, std::max(2 * lanes - kLanes, 0));
    }
    return {reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(high.v, low.v))};
  }
  STMAE_INLINE vec read(const bf16* p, AllLanes) { return {_mm512_loadu_ps(p)}; }
  STMAE_INLINE vec read(const bf16* p, int lanes) { return {_mm512_maskz_loadu_ps(first(lanes), p)}; }
  template <typename Lanes>
  STMAE_INLINE vec read(const float* even, const float* odd, Lanes lanes) {  // odd: null where the sum has no such element
    return pack(load(even, lanes), odd ? load(odd, lanes) : zero());
  }
  template <typename Lanes>
  STMAE_INLINE vec read(const bf16* even, const bf16* odd, Lanes lanes) {
    return zip(load_bits(even, lanes), odd ? load_bits(odd, lanes) : _mm256_setzero_si256());
  }

 private:
  STMAE_INLINE __m256i load_bits(const bf16* p, AllLanes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  STMAE_INLINE __m256i load_bits(const bf16* p, int lanes) { return _mm256_maskz_loadu_epi16(first(lanes), p); }
};
#else
struct Bfloat16 {  // without instructions for it: lanes are floats that were rounded to bfloat16
  using element = bf16;
  static constexpr int kPack = 1;
  STMAE_INLINE vec broadcast(const bf16* a) { return set(static_cast<float>(*a)); }
  STMAE_INLINE vec broadcast(const float* a) { return set(*a); }
  STMAE_INLINE vec multiply_add(vec a, vec b, vec c) { return fma(a, b, c); }
  STMAE_INLINE vec pack(vec a, vec) {
    bf16 rounded[kLanes];
    store(rounded, a);
    return load(rounded);
  }
  STMAE_INLINE void pack_row(float* row, int64_t n) {
    each_vector(n, [&](int64_t i, auto lanes) STMAE_INLINE_BODY { store(row + i, pack(load(row + i, lanes), zero()), lanes); });
  }
  template <typename T, typename Lanes>
  STMAE_INLINE vec read(const T* p, Lanes lanes) {
    if constexpr (std::is_same_v<T, float>)
      return pack(load(p, lanes), zero());
    else
      return load(p, lanes);
  }
  template <typename T, typename Lanes>
  STMAE_INLINE vec read(const T* p, const T*, Lanes lanes) {
    return read(p, lanes);
  }
};
#endif

// A vector of the first `lanes` of kLanes lanes.
template <typename E, typename T>
STMAE_INLINE vec read_lanes(const T* p, int lanes) {
  return lanes == kLanes ? E::read(p, AllLanes()) : E::read(p, lanes);
}

// A stride that is known when compiling: addresses become displacements, and no register holds it.
template <int64_t kValue>
using Fixed = std::integral_constant<int64_t, kValue>;

// A's row r begins `stride` elements after row r - 1; from one step to the next there are kStep elements.
template <typename Element, int kStep, typename Stride>
struct StridedRows {
  const Element* a;
  Stride stride;
  STMAE_MEMBER const Element* at(int r) const { return a + r * stride; }
  STMAE_MEMBER void next_step() { a += kStep; }
  STMAE_MEMBER StridedRows from_step(int64_t step) const { return {a + step * kStep, stride}; }
};

// A's rows lie anywhere.
template <typename Element, int kStep, int kRows>
struct ScatteredRows {
  const Element* row[kRows];
  int64_t offset = 0;
  STMAE_MEMBER const Element* at(int r) const { return row[r] + offset; }
  STMAE_MEMBER void next_step() { offset += kStep; }
  STMAE_MEMBER ScatteredRows from_step(int64_t step) const {
    ScatteredRows rows = *this;
    rows.offset += step * kStep;
    return rows;
  }
};

// C[R, V vectors] = A B, or C + A B. With `accumulate`, C is added after the loop: short chains of additions keep rounding errors small.
template <typename E, int R, int V, typename Rows, typename StrideB, typename StrideC>
STMAE_INLINE void gemm_tile(Rows a, const float* b, StrideB b_stride, int64_t steps, float* c, StrideC c_stride,
                            bool accumulate) {
  vec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = zero();
  }
#pragma GCC unroll 1
  for (int64_t s = 0; s < steps; ++s) {
    vec columns[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vec element = E::broadcast(a.at(r));
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = E::multiply_add(element, columns[v], sum[r][v]);
    }
    a.next_step();
    b += b_stride;
  }
  if (accumulate) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = load(c + r * c_stride + v * kLanes) + sum[r][v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + r * c_stride + v * kLanes, sum[r][v]);
  }
}

// C = A B over any number of steps: sums over kStepsInRegister steps, then over those sums. A long sum in one float32 would err more than
// plain PyTorch's blocked one.
constexpr int64_t kStepsInRegister = 128;

template <typename E, int R, int V, typename Rows, typename StrideB, typename StrideC>
STMAE_INLINE void gemm_tile_in_blocks(const Rows& a, const float* b, StrideB b_stride, int64_t steps, float* c,
                                      StrideC c_stride) {
  for (int64_t s = 0; s < steps; s += kStepsInRegister)
    gemm_tile<E, R, V>(a.from_step(s), b + s * b_stride, b_stride, std::min(kStepsInRegister, steps - s), c, c_stride, s > 0);
}

}  // namespace stmae::STMAE_ISA

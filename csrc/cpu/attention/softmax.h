// The online softmax of the forward (Milakov and Gimelshein 2018), and the weights of the backward. Included once per instruction set,
// after packing.h.

namespace stmae::STMAE_ISA {

// 2^x as exact as a weight of type E is stored.
template <typename E>
STMAE_INLINE vec exp2_for(vec x) {
#if STMAE_ISA_LEVEL >= 3
  if constexpr (E::kPack == 2) return exp2_for_bfloat16(x);
#endif
  return exp2(x);
}

STMAE_INLINE void store_two(float* p, vec a, vec b) {
  store(p, a);
  store(p + kLanes, b);
}
#if STMAE_ISA_LEVEL >= 3
STMAE_INLINE void store_two(bf16* p, vec a, vec b) {
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
}
#endif

// What a tile of queries has accumulated over the keys so far.
struct Softmax {
  float max[kQueryBlock];           // of q.k, with the sign of the scale: scores are subtracted before they are scaled, since a
                                    // rounded product, at 1e10, is off by thousands
  float sum[kQueryBlock * kLanes];  // of the weights, per lane

  void reset() {
    for (float& x : max) x = -std::numeric_limits<float>::infinity();
    for (int r = 0; r < kQueryBlock; ++r) store(sum + r * kLanes, zero());
  }
};

template <bool kMinimum>
STMAE_INLINE float row_extreme(const float* row, int keys) {
  const auto combine = [](vec x, vec y) { return kMinimum ? min(x, y) : max(x, y); };
  vec a = set(row[0]), b = a;
  int j = 0;
  for (; j + 2 * kLanes <= keys; j += 2 * kLanes) {
    a = combine(a, load(row + j));
    b = combine(b, load(row + j + kLanes));
  }
  for (; j < keys; j += kLanes) a = combine(a, select_first(std::min(kLanes, keys - j), load(row + j), b));
  return kMinimum ? -max(-min(a, b)) : max(max(a, b));
}

// One step: raw scores [rows][kScoreStride] in, unnormalised weights out, in the same memory. What was summed over earlier keys, here and in
// `sums` [rows][sum_stride] (null at the first step), is rescaled to the new maximum.
template <typename E>
void softmax_step(float* scores, int rows, int keys, float to_log2, Softmax& softmax, float* sums, int sum_stride) {
  const int full = keys / kLanes * kLanes;
  float base[kQueryBlock], rescale[kQueryBlock + kLanes] = {};
  for (int r = 0; r < rows; ++r) {
    const float* row = scores + r * kScoreStride;
    const float before = softmax.max[r];
    const float now = std::max(before, to_log2 < 0 ? -row_extreme<true>(row, keys) : row_extreme<false>(row, keys));
    softmax.max[r] = now;
    // With nothing but -inf so far, any finite base gives the weights 0.
    const float finite = now == -std::numeric_limits<float>::infinity() ? 0.f : now;
    base[r] = to_log2 < 0 ? -finite : finite;
    rescale[r] = before == -std::numeric_limits<float>::infinity() ? before : (before - finite) * std::abs(to_log2);
  }
  for (int r = 0; r < rows; r += kLanes) store(rescale + r, exp2(load(rescale + r)));
  const vec slope = set(to_log2);
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kScoreStride;
    auto* weights = reinterpret_cast<typename E::element*>(row);  // no wider than a score, so never ahead of the reads
    const vec highest = set(base[r]);
    const auto weight_at = [&](int j) STMAE_INLINE_BODY { return exp2_for<E>((load(row + j) - highest) * slope); };
    vec sum = zero();
    int j = 0;
    for (; j + kLanes < full; j += 2 * kLanes) {
      const vec weight = weight_at(j), next = weight_at(j + kLanes);
      sum = sum + (weight + next);
      store_two(weights + j, weight, next);
    }
    if (j < full) {
      const vec weight = weight_at(j);
      sum = sum + weight;
      store(weights + j, weight);
    }
    if (full < keys) {
      const vec weight = select_first(keys - full, weight_at(full), zero());
      sum = sum + weight;
      store(weights + full, weight);
    }
    float* total = softmax.sum + r * kLanes;
    store(total, fma(load(total), set(rescale[r]), sum));
  }
  if (!sums) return;
  for (int r = 0; r < rows; ++r) {
    if (rescale[r] == 1.f) continue;
    for (int d = 0; d < sum_stride; d += kLanes)
      store(sums + r * sum_stride + d, load(sums + r * sum_stride + d) * set(rescale[r]));
  }
}

// One tile of scores s = q.k and of w = grad_out.v, both [kRows][kKeyTile], to what the products of the gradients read:
// P = exp(scale s - lse), lse in units of s (Softmax says why), and dS = P (w - delta). "Down" is packed along the queries,
// [query / kPack][kGradStride] lanes, "along" along the keys, [query][kGradStride] elements.
template <typename E>
void grad_tile(const float* s, const float* w, const float* lse, const float* delta, float to_log2, int columns, float* p_down,
               float* ds_down, typename E::element* ds_along) {
  for (int r = 0; r < kRows; r += E::kPack) {
    for (int j = 0; j < columns; j += kLanes) {
      vec p[E::kPack], ds[E::kPack];
      for (int i = 0; i < E::kPack; ++i) {
        p[i] = exp2_for<E>((load(s + (r + i) * kKeyTile + j) - set(lse[r + i])) * set(to_log2));
        ds[i] = p[i] * (load(w + (r + i) * kKeyTile + j) - set(delta[r + i]));
      }
      if constexpr (E::kPack == 1) {  // along and down are the same
        store(p_down + r * kGradStride + j, p[0]);
        store(ds_down + r * kGradStride + j, ds[0]);
      }
#if STMAE_ISA_LEVEL >= 3
      if constexpr (E::kPack == 2) {
        const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                             20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512i both_p = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(p[1].v, p[0].v));
        const __m512i both_ds = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(ds[1].v, ds[0].v));
        _mm512_storeu_si512(p_down + r / 2 * kGradStride + j, _mm512_permutexvar_epi16(zip, both_p));
        _mm512_storeu_si512(ds_down + r / 2 * kGradStride + j, _mm512_permutexvar_epi16(zip, both_ds));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_along + r * kGradStride + j), _mm512_castsi512_si256(both_ds));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_along + (r + 1) * kGradStride + j),
                            _mm512_extracti64x4_epi64(both_ds, 1));
      }
#endif
    }
  }
}

}  // namespace stmae::STMAE_ISA

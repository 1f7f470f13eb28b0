// The vector type that the CPU kernels are written with: `vec`, a register of kLanes floats, and the operations on it.
// Included once per instruction set by for_each_isa.h (no include guard): the same names, in that set's namespace.
// Memory may hold float, bfloat16 or uint8; arithmetic is float32.

namespace stmae::STMAE_ISA {

using bf16 = c10::BFloat16;

#define STMAE_INLINE static inline __attribute__((always_inline))

#if STMAE_ISA_LEVEL >= 2  // ------------------------------------------------------------------------------ AVX-512

struct vec {
  __m512 v;
};
constexpr int kLanes = 16;

STMAE_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }  // n in [0, 16]
STMAE_INLINE vec zero() { return {_mm512_setzero_ps()}; }
STMAE_INLINE vec set(float x) { return {_mm512_set1_ps(x)}; }
STMAE_INLINE vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
STMAE_INLINE vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
STMAE_INLINE vec widen(__m256i bits) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))}; }
STMAE_INLINE vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
STMAE_INLINE vec load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
STMAE_INLINE vec load(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))}; }
STMAE_INLINE vec load(const uint8_t* p, int n) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)))}; }
STMAE_INLINE void store(float* p, vec a) { _mm512_storeu_ps(p, a.v); }
STMAE_INLINE void store(float* p, vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
STMAE_INLINE __m256i narrow(vec a) {  // to bfloat16, nearest even, NaN stays NaN
#if STMAE_ISA_LEVEL >= 3
  // vcvtneps2bf16 flushes float32 subnormals to zero; torch does not, but the difference is below 1.2e-38.
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
#endif
}
STMAE_INLINE void store(bf16* p, vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
STMAE_INLINE void store(bf16* p, vec a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(a)); }
STMAE_INLINE vec operator+(vec a, vec b) { return {_mm512_add_ps(a.v, b.v)}; }
STMAE_INLINE vec operator-(vec a, vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
STMAE_INLINE vec operator*(vec a, vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
STMAE_INLINE vec operator/(vec a, vec b) { return {_mm512_div_ps(a.v, b.v)}; }
STMAE_INLINE vec fma(vec a, vec b, vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
STMAE_INLINE vec max(vec a, vec b) { return {_mm512_max_ps(a.v, b.v)}; }
STMAE_INLINE vec min(vec a, vec b) { return {_mm512_min_ps(a.v, b.v)}; }
STMAE_INLINE float sum(vec a) { return _mm512_reduce_add_ps(a.v); }
STMAE_INLINE float max(vec a) { return _mm512_reduce_max_ps(a.v); }
STMAE_INLINE vec round(vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

#elif STMAE_ISA_LEVEL == 1  // -------------------------------------------------------------------------------- AVX2

struct vec {
  __m256 v;
};
constexpr int kLanes = 8;

STMAE_INLINE __m256i first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
STMAE_INLINE vec zero() { return {_mm256_setzero_ps()}; }
STMAE_INLINE vec set(float x) { return {_mm256_set1_ps(x)}; }
STMAE_INLINE vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
STMAE_INLINE vec load(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
STMAE_INLINE vec widen(__m128i bits) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))}; }
STMAE_INLINE vec load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
STMAE_INLINE vec load(const bf16* p, int n) {
  alignas(16) uint16_t part[8] = {};
  std::memcpy(part, p, 2 * n);
  return widen(_mm_load_si128(reinterpret_cast<const __m128i*>(part)));
}
STMAE_INLINE vec load(const uint8_t* p) { return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))}; }
STMAE_INLINE vec load(const uint8_t* p, int n) {
  alignas(8) uint8_t part[8] = {};
  std::memcpy(part, p, n);
  return load(part);
}
STMAE_INLINE void store(float* p, vec a) { _mm256_storeu_ps(p, a.v); }
STMAE_INLINE void store(float* p, vec a, int n) { _mm256_maskstore_ps(p, first(n), a.v); }
STMAE_INLINE __m128i narrow(vec a) {  // to bfloat16, nearest even, NaN stays NaN
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
STMAE_INLINE void store(bf16* p, vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
STMAE_INLINE void store(bf16* p, vec a, int n) {
  alignas(16) uint16_t part[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(part), narrow(a));
  std::memcpy(static_cast<void*>(p), part, 2 * n);
}
STMAE_INLINE vec operator+(vec a, vec b) { return {_mm256_add_ps(a.v, b.v)}; }
STMAE_INLINE vec operator-(vec a, vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
STMAE_INLINE vec operator*(vec a, vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
STMAE_INLINE vec operator/(vec a, vec b) { return {_mm256_div_ps(a.v, b.v)}; }
STMAE_INLINE vec fma(vec a, vec b, vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
STMAE_INLINE vec max(vec a, vec b) { return {_mm256_max_ps(a.v, b.v)}; }
STMAE_INLINE vec min(vec a, vec b) { return {_mm256_min_ps(a.v, b.v)}; }
STMAE_INLINE vec round(vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
STMAE_INLINE float sum(vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
STMAE_INLINE float max(vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

#else  // ------------------------------------------------------------------- portable: the compiler's own vectors

struct vec {
  typedef float type __attribute__((vector_size(16)));
  type v;
};
constexpr int kLanes = 4;

STMAE_INLINE vec set(float x) { return {vec::type{x, x, x, x}}; }
STMAE_INLINE vec zero() { return set(0.f); }
STMAE_INLINE vec load(const float* p) {
  vec a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
template <typename T>
STMAE_INLINE vec load(const T* p, int n) {  // the first n of kLanes, zero beyond
  vec a = zero();
  for (int i = 0; i < n; ++i) a.v[i] = static_cast<float>(p[i]);
  return a;
}
STMAE_INLINE vec load(const bf16* p) { return load(p, kLanes); }
STMAE_INLINE vec load(const uint8_t* p) { return load(p, kLanes); }
STMAE_INLINE void store(float* p, vec a) { std::memcpy(p, &a.v, sizeof(a.v)); }
template <typename T>
STMAE_INLINE void store(T* p, vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
STMAE_INLINE void store(bf16* p, vec a) { store(p, a, kLanes); }
STMAE_INLINE vec operator+(vec a, vec b) { return {a.v + b.v}; }
STMAE_INLINE vec operator-(vec a, vec b) { return {a.v - b.v}; }
STMAE_INLINE vec operator*(vec a, vec b) { return {a.v * b.v}; }
STMAE_INLINE vec operator/(vec a, vec b) { return {a.v / b.v}; }
STMAE_INLINE vec fma(vec a, vec b, vec c) { return {a.v * b.v + c.v}; }
STMAE_INLINE vec max(vec a, vec b) { return {a.v > b.v ? a.v : b.v}; }
STMAE_INLINE vec min(vec a, vec b) { return {a.v < b.v ? a.v : b.v}; }
STMAE_INLINE vec round(vec a) { return {vec::type{std::nearbyint(a.v[0]), std::nearbyint(a.v[1]), std::nearbyint(a.v[2]), std::nearbyint(a.v[3])}}; }
STMAE_INLINE float sum(vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
STMAE_INLINE float max(vec a) { return std::max(std::max(a.v[0], a.v[2]), std::max(a.v[1], a.v[3])); }

#endif

STMAE_INLINE vec operator-(vec a) { return zero() - a; }

}  // namespace stmae::STMAE_ISA

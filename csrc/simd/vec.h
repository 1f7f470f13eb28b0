// The vector type that the CPU kernels are written with: `vec`, one of kRegisters registers of kLanes floats, and the operations on it.
// Included once per instruction set by for_each_isa.h (no include guard): the same names, in that set's namespace.
// Memory may hold float, bfloat16 or uint8; arithmetic is float32.

namespace stmae::STMAE_ISA {

using bf16 = c10::BFloat16;

#define STMAE_INLINE static inline __attribute__((always_inline))
#define STMAE_MEMBER inline __attribute__((always_inline))  // of a struct

#if STMAE_ISA_LEVEL >= 2  // ------------------------------------------------------------------------------ AVX-512

struct vec {
  __m512 v;
};
constexpr int kLanes = 16;
constexpr int kRegisters = 32;

STMAE_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }  // n in [0, 16]
STMAE_INLINE vec zero() { return {_mm512_setzero_ps()}; }
STMAE_INLINE vec set(float x) { return {_mm512_set1_ps(x)}; }
STMAE_INLINE vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
STMAE_INLINE vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
STMAE_INLINE vec widen(__m256i bits) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))}; }
STMAE_INLINE vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
STMAE_INLINE vec load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
STMAE_INLINE vec load(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
STMAE_INLINE vec load(const uint8_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
}
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
STMAE_INLINE vec scale_by_power(vec a, vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n, n an integer
STMAE_INLINE vec select_first(int n, vec yes, vec no) { return {_mm512_mask_blend_ps(first(n), no.v, yes.v)}; }  // n lanes of yes
STMAE_INLINE vec select_negative(vec x, vec yes, vec no) {  // per lane: x < 0 ? yes : no
  return {_mm512_mask_mov_ps(no.v, _mm512_movepi32_mask(_mm512_castps_si512(x.v)), yes.v)};
}
STMAE_INLINE vec times_power_of_two(vec a, vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^floor(n)
STMAE_INLINE void interleave(vec& a, vec& b) {  // a0 b0 a1 b1 ... across both: the first half in a, the second in b
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const __m512 first_half = _mm512_permutex2var_ps(a.v, low, b.v);
  b.v = _mm512_permutex2var_ps(a.v, high, b.v);
  a.v = first_half;
}
constexpr float kLowestExponent = -160.f;  // 2^-160 rounds to zero

#elif STMAE_ISA_LEVEL == 1  // -------------------------------------------------------------------------------- AVX2

struct vec {
  __m256 v;
};
constexpr int kLanes = 8;
constexpr int kRegisters = 16;

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
STMAE_INLINE vec load(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
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
STMAE_INLINE vec scale_by_power(vec a, vec n) {  // a * 2^n, n an integer; in two steps, so that subnormal results are right
  const __m256i integer = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(integer, 1), bias = _mm256_set1_epi32(127);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(integer, half), bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, first), second)};
}
STMAE_INLINE vec select_first(int n, vec yes, vec no) {  // n lanes of yes
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(first(n)))};
}
STMAE_INLINE vec select_negative(vec x, vec yes, vec no) { return {_mm256_blendv_ps(no.v, yes.v, x.v)}; }  // x < 0 ? yes : no
STMAE_INLINE vec times_power_of_two(vec a, vec n) {  // a * 2^n, n an integer and in [-126, 127]
  return {_mm256_mul_ps(
      a.v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23)))};
}
STMAE_INLINE void interleave(vec& a, vec& b) {  // a0 b0 a1 b1 ... across both: the first half in a, the second in b
  const __m256 even = _mm256_unpacklo_ps(a.v, b.v), odd = _mm256_unpackhi_ps(a.v, b.v);
  a.v = _mm256_permute2f128_ps(even, odd, 0x20);
  b.v = _mm256_permute2f128_ps(even, odd, 0x31);
}
constexpr float kLowestExponent = -126.f;
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

#elif STMAE_ISA_NEON  // ------------------------------------------------------------------------------------ NEON

struct vec {
  float32x4_t v;
};
constexpr int kLanes = 4;
constexpr int kRegisters = 32;

STMAE_INLINE uint32x4_t first(int n) { return vcgtq_s32(vdupq_n_s32(n), int32x4_t{0, 1, 2, 3}); }
STMAE_INLINE vec zero() { return {vdupq_n_f32(0.f)}; }
STMAE_INLINE vec set(float x) { return {vdupq_n_f32(x)}; }
STMAE_INLINE vec load(const float* p) { return {vld1q_f32(p)}; }
STMAE_INLINE vec load(const bf16* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
}
STMAE_INLINE vec load(const uint8_t* p) {
  uint32_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes)))))};
}
template <typename T>
STMAE_INLINE vec load(const T* p, int n) {  // the first n of kLanes, zero beyond
  if (n == kLanes) return load(p);
  T part[kLanes] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
STMAE_INLINE void store(float* p, vec a) { vst1q_f32(p, a.v); }
STMAE_INLINE uint16x4_t narrow(vec a) {  // to bfloat16, nearest even, NaN stays NaN
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
  const uint32x4_t with_odd = vsraq_n_u32(bits, vshlq_n_u32(bits, 15), 31);
  return vaddhn_u32(vbslq_u32(vceqq_f32(a.v, a.v), with_odd, vdupq_n_u32(0x7fc00000)), vdupq_n_u32(0x7fff));
}
STMAE_INLINE void store(bf16* p, vec a) { vst1_u16(reinterpret_cast<uint16_t*>(p), narrow(a)); }
template <typename T>
STMAE_INLINE void store(T* p, vec a, int n) {
  if (n == kLanes) return store(p, a);
  T part[kLanes];
  store(part, a);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}
STMAE_INLINE vec operator+(vec a, vec b) { return {vaddq_f32(a.v, b.v)}; }
STMAE_INLINE vec operator-(vec a, vec b) { return {vsubq_f32(a.v, b.v)}; }
STMAE_INLINE vec operator*(vec a, vec b) { return {vmulq_f32(a.v, b.v)}; }
STMAE_INLINE vec operator/(vec a, vec b) { return {vdivq_f32(a.v, b.v)}; }
STMAE_INLINE vec fma(vec a, vec b, vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
STMAE_INLINE vec max(vec a, vec b) { return {vmaxq_f32(a.v, b.v)}; }  // of a number and NaN, NaN in either order
STMAE_INLINE vec min(vec a, vec b) { return {vminq_f32(a.v, b.v)}; }
STMAE_INLINE float sum(vec a) { return vaddvq_f32(a.v); }
STMAE_INLINE float max(vec a) { return vmaxvq_f32(a.v); }
STMAE_INLINE vec round(vec a) { return {vrndnq_f32(a.v)}; }
STMAE_INLINE float32x4_t power_of_two(int32x4_t n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
STMAE_INLINE vec scale_by_power(vec a, vec n) {  // a * 2^n, n an integer; in two steps, so that subnormal results are right
  const int32x4_t integer = vcvtq_s32_f32(n.v), half = vshrq_n_s32(integer, 1);
  return {vmulq_f32(vmulq_f32(a.v, power_of_two(half)), power_of_two(vsubq_s32(integer, half)))};
}
STMAE_INLINE vec select_first(int n, vec yes, vec no) { return {vbslq_f32(first(n), yes.v, no.v)}; }  // n lanes of yes
STMAE_INLINE vec select_negative(vec x, vec yes, vec no) {  // per lane: x < 0 ? yes : no
  return {vbslq_f32(vcltzq_f32(x.v), yes.v, no.v)};
}
STMAE_INLINE vec times_power_of_two(vec a, vec n) {  // a * 2^n, n an integer and in [-126, 127]
  return {vmulq_f32(a.v, power_of_two(vcvtq_s32_f32(n.v)))};
}
STMAE_INLINE void interleave(vec& a, vec& b) {  // a0 b0 a1 b1 ... across both: the first half in a, the second in b
  const float32x4_t first_half = vzip1q_f32(a.v, b.v);
  b.v = vzip2q_f32(a.v, b.v);
  a.v = first_half;
}
constexpr float kLowestExponent = -126.f;

#else  // ------------------------------------------------------------------- portable: the compiler's own vectors

struct vec {
  typedef float type __attribute__((vector_size(16)));
  type v;
};
constexpr int kLanes = 4;
constexpr int kRegisters = 16;

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
STMAE_INLINE vec round(vec a) {  // adding 1.5 * 2^23 drops the fraction; from 2^22 on there is none worth dropping
  const vec::type shift = set(12582912.f).v;
  const vec::type size = a.v < 0 ? -a.v : a.v;
  return {size < 4194304.f ? (a.v + shift) - shift : a.v};
}
STMAE_INLINE vec times_power_of_two(vec a, vec n) {  // a * 2^n, n an integer and in [-126, 127]
  typedef uint32_t bits __attribute__((vector_size(16)));
  const vec::type shifted = n.v + 12582912.f;  // n is now in the low bits
  return {a.v * reinterpret_cast<vec::type>((reinterpret_cast<bits>(shifted) + 127u) << 23)};
}
STMAE_INLINE void interleave(vec& a, vec& b) {  // a0 b0 a1 b1 ... across both: the first half in a, the second in b
  const vec::type x = a.v, y = b.v;
  a.v = vec::type{x[0], y[0], x[1], y[1]};
  b.v = vec::type{x[2], y[2], x[3], y[3]};
}
constexpr float kLowestExponent = -126.f;
STMAE_INLINE vec scale_by_power(vec a, vec n) {  // a * 2^n, n an integer; in two steps, so that subnormal results are right
  typedef int32_t int_type __attribute__((vector_size(16)));
  const int_type integer = __builtin_convertvector(n.v, int_type), half = integer >> 1;
  const int_type first = (half + 127) << 23, second = (integer - half + 127) << 23;
  vec::type x, y;
  std::memcpy(&x, &first, sizeof(x));
  std::memcpy(&y, &second, sizeof(y));
  return {a.v * x * y};
}
STMAE_INLINE vec select_first(int n, vec yes, vec no) {  // n lanes of yes
  for (int i = 0; i < n; ++i) no.v[i] = yes.v[i];
  return no;
}
STMAE_INLINE vec select_negative(vec x, vec yes, vec no) { return {x.v < 0 ? yes.v : no.v}; }  // per lane
STMAE_INLINE float sum(vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
STMAE_INLINE float max(vec a) { return std::max(std::max(a.v[0], a.v[2]), std::max(a.v[1], a.v[3])); }

#endif

STMAE_INLINE vec operator-(vec a) { return zero() - a; }

// Prefetches `count` elements from p + offset on into the cache of level 1 or 2. Rows of a strided tensor lie pages apart, where no
// hardware prefetcher follows. The address may lie beyond the tensor: it is never read, nor made as a pointer into it.
template <int kLevel = 1, typename T>
STMAE_INLINE void prefetch(const T* p, int64_t offset, int64_t count) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(offset) * sizeof(T);
  for (uintptr_t i = 0; i < count * sizeof(T); i += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(address + i), 0, 4 - kLevel);
}

// Rows to columns: afterwards rows[i] holds what was in lane i of each row, in order. (Interleaving row i with row
// i + kLanes / 2, log2(kLanes) times over, moves each element's row number from its register to its lane.)
STMAE_INLINE void transpose(vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = rows[i];
      next[2 * i + 1] = rows[i + kLanes / 2];
      interleave(next[2 * i], next[2 * i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// 2^x for x <= 127; below kLowestExponent it is 2^kLowestExponent. The minimax polynomial on [-1/2, 1/2]: relative error 2e-9,
// so that the rounding of float32 dominates. NaN stays NaN.
STMAE_INLINE vec exp2(vec x) {
  x = max(set(kLowestExponent), x);  // in this order: of a number and NaN, the second is returned
  const vec integer = round(x), f = x - integer;
  vec p = fma(set(1.5345812e-4f), f, set(1.3399931e-3f));
  p = fma(p, f, set(9.6184890e-3f));
  p = fma(p, f, set(5.5503288e-2f));
  p = fma(p, f, set(2.4022647e-1f));
  p = fma(p, f, set(6.9314721e-1f));
  p = fma(p, f, set(1.f));
  return times_power_of_two(p, integer);
}

#if STMAE_ISA_LEVEL >= 2
// 2^x with relative error 8e-5, for what is rounded to bfloat16 (2e-3) right after. The minimax polynomial of degree 3 on
// [0, 1]; vreduceps takes the fraction and vscalefps the floor of x, -inf included, so nothing is rounded or clamped first.
STMAE_INLINE vec exp2_for_bfloat16(vec x) {
  const vec f = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  vec p = fma(set(0.078024523f), f, set(0.22606716f));
  p = fma(p, f, set(0.69583354f));
  p = fma(p, f, set(0.99992807f));
  return times_power_of_two(p, x);
}
// 1 / x with relative error 6e-5, for the same.
STMAE_INLINE vec reciprocal_for_bfloat16(vec x) { return {_mm512_rcp14_ps(x.v)}; }
#endif

// e^x to 1 unit in the last place: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial in r, times 2^n. NaN stays NaN.
STMAE_INLINE vec exp(vec x) {
  x = max(set(-104.f), min(set(89.f), x));  // 0 below, infinity above; the second operand is the one that a NaN comes through
  const vec n = round(x * set(1.44269504f));
  vec r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  vec p = fma(r, set(1.9875691500e-4f), set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  return scale_by_power(fma(p, r * r, r) + set(1.f), n);
}

}  // namespace stmae::STMAE_ISA

// Exact softmax attention and its gradient with no N x N matrix in memory (Dao et al. 2022, algorithm 1; Dao 2023).
//
// Everything is a product C[rows, columns] += A[rows, steps] B[steps, columns], done by one micro-kernel (`product`) that
// holds a tile of C in registers, broadcasts A's elements and reads B's rows as vectors. So B is packed once per head:
//   by columns  [key tile][D][kKeyTile]   K for the scores Q K^T, V for grad_out V^T
//   by rows     [keys][D padded]          V for P V, K for grad_q, Q and grad_out for grad_k and grad_v
// With bfloat16 dot products an element is a pair: two neighbours along the steps, in the 32 bits of one lane.

#ifdef STMAE_ISA
namespace stmae::STMAE_ISA {

// ------------------------------------------------------------------------------------- what the products are made of

struct Float32 {  // bfloat16 inputs are widened while packing
  using element = float;
  using unit = float;
  using operand = vec;
  static constexpr int kPack = 1;    // elements in a unit
  static constexpr int kDegree = 6;  // of the polynomial in exp2
  STMAE_INLINE operand read(const unit* b) { return load(b); }
  STMAE_INLINE operand broadcast(const unit* a) { return set(*a); }
  STMAE_INLINE vec multiply_add(operand a, operand b, vec c) { return fma(a, b, c); }
  template <typename T>
  STMAE_INLINE vec along(const T* row, int units) {  // the first units of a row
    return units >= kLanes ? load(row) : load(row, units);
  }
  template <typename T>
  STMAE_INLINE vec across(const T* row, const T*, int units) {  // a unit is one element of one row
    return along(row, units);
  }
};

template <typename T>
struct Multiply {
  using type = Float32;
};

#if STMAE_ISA_LEVEL >= 3
struct Bfloat16Pairs {
  using element = bf16;
  using unit = uint32_t;
  using operand = __m512i;
  static constexpr int kPack = 2;
  static constexpr int kDegree = 4;
  STMAE_INLINE operand read(const unit* b) { return _mm512_loadu_si512(b); }
  STMAE_INLINE operand broadcast(const unit* a) {
    int bits;
    std::memcpy(&bits, a, sizeof(bits));
    return _mm512_set1_epi32(bits);
  }
  STMAE_INLINE vec multiply_add(operand a, operand b, vec c) {
    return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b))};
  }
  STMAE_INLINE vec along(const bf16* row, int units) {
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi32(units >= kLanes ? 0xffff : first(units), row))};
  }
  STMAE_INLINE vec across(const bf16* row, const bf16* next, int units) {  // unit d is (row[d], next[d])
    const __mmask16 mask = units >= kLanes ? 0xffff : first(units);
    __m512i both = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
    if (next) both = _mm512_or_si512(both, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, next)), 16));
    return {_mm512_castsi512_ps(both)};
  }
};

template <>
struct Multiply<bf16> {
  using type = Bfloat16Pairs;
};
#endif

// A tile of scores is kRows queries by kKeyTile keys: all of the register file but what B's row and A's element need.
constexpr int kRows = 6;
constexpr int kVectors = STMAE_ISA_LEVEL >= 2 ? 4 : 2;
constexpr int kKeyTile = kVectors * kLanes;
constexpr int kRowTile = 2 * kRows;                                // what every kernel's rows divide
constexpr int kQueryBlock = kRowTile;                              // forward: queries at a time
constexpr int kKeyBlock = 384;                                     // forward: keys per step of the online softmax
constexpr int kScoreStride = kKeyBlock + 16;                       // not a power of two: rows in different cache sets
constexpr int kGradKeyBlock = 192;                                 // backward: keys whose gradients stay in cache
constexpr int kGradStride = kGradKeyBlock + 32;
static_assert(kKeyBlock % kKeyTile == 0 && kGradKeyBlock % kKeyTile == 0 && kGradKeyBlock % kRowTile == 0);

template <typename Integer>
STMAE_INLINE Integer round_up(Integer x, int multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// C[R, V vectors] (+)= A[R, steps] B[steps, V vectors]. A's element (r, s) is at a[r * row + s * step].
template <typename E, int R, int V, int kRow, int kStep>
void product(const typename E::unit* a, int64_t row, const typename E::unit* b, int64_t b_stride, int steps, float* c,
             int64_t c_stride, bool accumulate) {
  if (kRow) row = kRow;
  vec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = zero();
  }
  if (accumulate) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = load(c + r * c_stride + v * kLanes);
    }
  }
#pragma GCC unroll 1
  for (int s = 0; s < steps; ++s) {
    typename E::operand columns[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) columns[v] = E::read(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename E::operand element = E::broadcast(a + r * row);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = E::multiply_add(element, columns[v], sum[r][v]);
    }
    a += kStep;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + r * c_stride + v * kLanes, sum[r][v]);
  }
}

template <typename E, int R, int V, int kRow, int kStep>
void product_rows(int rows, const typename E::unit* a, const typename E::unit* b, int64_t b_stride, int steps, float* c,
                  int64_t c_stride, bool accumulate) {
  for (int r = 0; r < rows; r += R) product<E, R, V, kRow, kStep>(a + r * kRow, kRow, b, b_stride, steps, c + r * c_stride, c_stride, accumulate);
}

// C[rows, vectors] (+)= A B for any number of rows and vectors; C's rows up to the next multiple of kRowTile are written, too.
template <typename E, int kRow, int kStep>
void products(int rows, int vectors, const typename E::unit* a, const typename E::unit* b, int64_t stride, int steps, float* c,
              bool accumulate) {
#if STMAE_ISA_LEVEL >= 2
  switch (vectors) {
    case 1: return product_rows<E, 12, 1, kRow, kStep>(rows, a, b, stride, steps, c, stride, accumulate);
    case 2: return product_rows<E, 12, 2, kRow, kStep>(rows, a, b, stride, steps, c, stride, accumulate);
    case 3: return product_rows<E, 6, 3, kRow, kStep>(rows, a, b, stride, steps, c, stride, accumulate);
    case 4: return product_rows<E, 6, 4, kRow, kStep>(rows, a, b, stride, steps, c, stride, accumulate);
    case 5: return product_rows<E, 4, 5, kRow, kStep>(rows, a, b, stride, steps, c, stride, accumulate);
    case 6: return product_rows<E, 4, 6, kRow, kStep>(rows, a, b, stride, steps, c, stride, accumulate);
    default:
      product_rows<E, 6, 4, kRow, kStep>(rows, a, b, stride, steps, c, stride, accumulate);
      return products<E, kRow, kStep>(rows, vectors - 4, a, b + 4 * kLanes, stride, steps, c + 4 * kLanes, accumulate);
  }
#else
  int v = 0;
  for (; v + 2 <= vectors; v += 2) product_rows<E, 6, 2, kRow, kStep>(rows, a, b + v * kLanes, stride, steps, c + v * kLanes, stride, accumulate);
  if (v < vectors) product_rows<E, 6, 1, kRow, kStep>(rows, a, b + v * kLanes, stride, steps, c + v * kLanes, stride, accumulate);
#endif
}

// C[kRows, columns] = A[kRows, D] B[D, columns] for one key tile, B packed by columns; columns up to the vector's end.
template <typename E>
void score_tile(const typename E::unit* a, int64_t row, const typename E::unit* b, int steps, int columns, float* c, int64_t c_stride) {
  switch ((columns + kLanes - 1) / kLanes) {
    case 1: return product<E, kRows, 1, 0, 1>(a, row, b, kKeyTile, steps, c, c_stride, false);
    case 2: return product<E, kRows, 2, 0, 1>(a, row, b, kKeyTile, steps, c, c_stride, false);
#if STMAE_ISA_LEVEL >= 2
    case 3: return product<E, kRows, 3, 0, 1>(a, row, b, kKeyTile, steps, c, c_stride, false);
    default: return product<E, kRows, 4, 0, 1>(a, row, b, kKeyTile, steps, c, c_stride, false);
#endif
  }
}

// ------------------------------------------------------------------------------------------------------------ packing

// [rows, D] of T -> [rows / kPack][round_up(D, kLanes)] units, a unit down the rows; an odd last row is paired with zeros.
template <typename E, typename T>
void pack_rows(const T* source, int64_t stride, int64_t rows, int D, typename E::unit* packed) {
  const int padded = round_up(D, kLanes);
  for (int64_t r = 0; r < rows; r += E::kPack) {
    const T* row = source + r * stride;
    const T* next = r + 1 < rows ? row + stride : nullptr;
    for (int d = 0; d < D; d += kLanes) store(reinterpret_cast<float*>(packed + d), E::across(row + d, next ? next + d : nullptr, D - d));
    packed += padded;
  }
}

// [rows, D] of T -> [row tile][D / kPack][kKeyTile] units, a unit along D; rows up to the last vector's end are zero.
template <typename E, typename T>
void pack_columns(const T* source, int64_t stride, int64_t rows, int D, typename E::unit* packed) {
  const int units = D / E::kPack;
  for (int64_t r = 0; r < rows; r += kLanes) {
    typename E::unit* column = packed + r / kKeyTile * kKeyTile * units + r % kKeyTile;
    for (int u = 0; u < units; u += kLanes) {
      vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = r + i < rows ? E::along(source + (r + i) * stride + u * E::kPack, units - u) : zero();
      transpose(block);
      const int count = std::min(kLanes, units - u);
      for (int i = 0; i < count; ++i) store(reinterpret_cast<float*>(column + (u + i) * kKeyTile), block[i]);
    }
  }
}

// [rows, D] of T -> [padded_rows][D / kPack] units, zero beyond rows: the A of the products along D.
template <typename E, typename T>
void copy_rows(const T* source, int64_t stride, int64_t rows, int64_t padded_rows, int D, typename E::unit* copy) {
  const int units = D / E::kPack;
  for (int64_t r = 0; r < padded_rows; ++r) {
    for (int u = 0; u < units; u += kLanes) {
      const int count = std::min(kLanes, units - u);
      const vec part = r < rows ? E::along(source + r * stride + u * E::kPack, count) : zero();
      store(reinterpret_cast<float*>(copy + r * units + u), part, count);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ forward

// What one tile of queries has gathered from the keys seen so far.
struct Softmax {
  float highest[kRowTile];         // of log2(e) scale q.k
  float total[kRowTile * kLanes];  // of 2^(log2(e) scale q.k - highest), a partial sum per lane
};

// One row: raw scores in, unnormalised weights out, in the same memory. Returns what earlier sums must be multiplied by.
template <typename E>
float soften(float* scores, int keys, float to_log2, float& highest, float* total) {
  const int padded = round_up(keys, kLanes);
  for (int j = keys; j < padded; ++j) scores[j] = to_log2 < 0 ? std::numeric_limits<float>::infinity() : -std::numeric_limits<float>::infinity();
  vec extreme = load(scores);
  if (to_log2 < 0) {
    for (int j = kLanes; j < padded; j += kLanes) extreme = min(extreme, load(scores + j));
    extreme = -extreme;
  } else {
    for (int j = kLanes; j < padded; j += kLanes) extreme = max(extreme, load(scores + j));
  }
  const float before = highest;
  highest = std::max(before, std::abs(to_log2) * max(extreme));
  // With nothing but -inf so far, any finite base gives the weights 0.
  const float base = highest == -std::numeric_limits<float>::infinity() ? 0.f : highest;
  const vec slope = set(to_log2), minus_base = set(-base);
  vec sum = zero();
  auto* weights = reinterpret_cast<typename E::element*>(scores);  // no wider than a score, so never ahead of the reads
  for (int j = 0; j < padded; j += kLanes) {
    const vec weight = exp2<E::kDegree>(fma(load(scores + j), slope, minus_base));
    sum = sum + weight;
    store(weights + j, weight);
  }
  float rescale = 1.f;
  if (before != highest) {
    float lanes[kLanes];
    store(lanes, exp2<6>(set(before - base)));
    rescale = lanes[0];
  }
  store(total, fma(load(total), set(rescale), sum));
  return rescale;
}

// Queries [first, last) of row tiles, numbered through all heads of the batch.
template <typename T>
void attention_forward(const Forward<T>& a, int64_t first_tile, int64_t last_tile) {
  using E = typename Multiply<T>::type;
  using unit = typename E::unit;
  const int D = a.D, units = D / E::kPack, padded = round_up(D, kLanes), vectors = padded / kLanes;
  const int64_t tiles = (a.Nq + kQueryBlock - 1) / kQueryBlock;
  const float to_log2 = static_cast<float>(a.scale * 1.4426950408889634);
  Scratch<unit> keys(round_up(a.Nk, kKeyTile) * units), values((a.Nk + E::kPack - 1) / E::kPack * padded), queries(kRowTile * units);
  Scratch<float> scores(kRowTile * kScoreStride), sums(kRowTile * padded);
  int64_t packed_head = -1;
  for (int64_t item = first_tile; item < last_tile; ++item) {
    const int64_t head = item / tiles, b = head / a.H, h = head % a.H;
    if (head != packed_head) {
      pack_columns<E>(a.k.at(b, h), a.k.token, a.Nk, D, keys.data());
      pack_rows<E>(a.v.at(b, h), a.v.token, a.Nk, D, values.data());
      packed_head = head;
    }
    const int64_t first_query = item % tiles * kQueryBlock;
    const int rows = static_cast<int>(std::min<int64_t>(kQueryBlock, a.Nq - first_query));
    copy_rows<E>(a.q.at(b, h) + first_query * a.q.token, a.q.token, rows, kRowTile, D, queries.data());
    Softmax softmax;
    for (float& x : softmax.highest) x = -std::numeric_limits<float>::infinity();
    for (float& x : softmax.total) x = 0.f;
    for (int64_t key = 0; key < a.Nk; key += kKeyBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kKeyBlock, a.Nk - key));
      for (int j = 0; j < count; j += kKeyTile) {
        for (int r = 0; r < rows; r += kRows)
          score_tile<E>(queries.data() + r * units, units, keys.data() + (key + j) * units, units, std::min(kKeyTile, count - j),
                        scores.data() + r * kScoreStride + j, kScoreStride);
      }
      for (int r = 0; r < rows; ++r) {
        const float rescale = soften<E>(scores.data() + r * kScoreStride, count, to_log2, softmax.highest[r], softmax.total + r * kLanes);
        if (key == 0 || rescale == 1.f) continue;
        float* sum = sums.data() + r * padded;
        for (int d = 0; d < padded; d += kLanes) store(sum + d, load(sum + d) * set(rescale));
      }
      products<E, kScoreStride, 1>(rows, vectors, reinterpret_cast<const unit*>(scores.data()), values.data() + key / E::kPack * padded,
                                   padded, (count + E::kPack - 1) / E::kPack, sums.data(), key > 0);
    }
    for (int r = 0; r < rows; ++r) {
      const float total = sum(load(softmax.total + r * kLanes)), highest = softmax.highest[r];
      // All scores -inf: 0 / 0, as the formula says.
      const float inverse = highest == -std::numeric_limits<float>::infinity() ? std::numeric_limits<float>::quiet_NaN() : 1.f / total;
      T* out = a.out.at(b, h) + (first_query + r) * a.out.token;
      for (int d = 0; d < D; d += kLanes) {
        const vec result = load(sums.data() + r * padded + d) * set(inverse);
        D - d >= kLanes ? store(out + d, result) : store(out + d, result, D - d);
      }
      a.lse[head * a.Nq + first_query + r] = static_cast<float>(highest * 0.6931471805599453 + std::log(total));
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- backward

// One tile of scores s = q.k and of w = grad_out.v, both [kRows][kKeyTile], to what the products of the gradients read:
// P = exp(scale s - lse) and dS = P (w - delta), each with units down the queries, and dS with units along the keys.
template <typename E>
void grad_tile(const float* s, const float* w, const float* lse, const float* delta, float to_log2, int columns, typename E::unit* p_down,
               typename E::unit* ds_down, typename E::element* ds_along) {
  for (int r = 0; r < kRows; r += E::kPack) {
    for (int j = 0; j < columns; j += kLanes) {
      vec p[E::kPack], ds[E::kPack];
      for (int i = 0; i < E::kPack; ++i) {
        p[i] = exp2<E::kDegree>(fma(load(s + (r + i) * kKeyTile + j), set(to_log2), set(-lse[r + i])));
        ds[i] = p[i] * (load(w + (r + i) * kKeyTile + j) - set(delta[r + i]));
      }
      if constexpr (E::kPack == 1) {
        store(p_down + r * kGradStride + j, p[0]);
        store(ds_down + r * kGradStride + j, ds[0]);
      }
#if STMAE_ISA_LEVEL >= 3
      if constexpr (E::kPack == 2) {
        const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2,
                                             17, 1, 16, 0);
        const __m512i both_p = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(p[1].v, p[0].v));
        const __m512i both_ds = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(ds[1].v, ds[0].v));
        _mm512_storeu_si512(p_down + r / 2 * kGradStride + j, _mm512_permutexvar_epi16(zip, both_p));
        _mm512_storeu_si512(ds_down + r / 2 * kGradStride + j, _mm512_permutexvar_epi16(zip, both_ds));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_along + r * kGradStride + j), _mm512_castsi512_si256(both_ds));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_along + (r + 1) * kGradStride + j), _mm512_extracti64x4_epi64(both_ds, 1));
      }
#endif
    }
  }
}

template <typename T>
void store_rows(const float* source, int padded, int64_t rows, int D, float scale, T* target, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int d = 0; d < D; d += kLanes) {
      const vec x = load(source + r * padded + d) * set(scale);
      D - d >= kLanes ? store(target + r * stride + d, x) : store(target + r * stride + d, x, D - d);
    }
  }
}

// Items [first, last): an item is one head, or one of `splits` ranges of its keys; grad_q is then summed by attention_sum.
template <typename T>
void attention_backward(const Backward<T>& a, int64_t first_item, int64_t last_item) {
  using E = typename Multiply<T>::type;
  using unit = typename E::unit;
  constexpr int kBlock = 4 * kRowTile * E::kPack;  // queries at a time
  const int D = a.D, units = D / E::kPack, padded = round_up(D, kLanes), vectors = padded / kLanes;
  const int64_t padded_queries = round_up(a.Nq, kRowTile), query_steps = padded_queries / E::kPack;
  const int64_t key_blocks = (a.Nk + kGradKeyBlock - 1) / kGradKeyBlock;
  const float to_log2 = static_cast<float>(a.scale * 1.4426950408889634);
  Scratch<unit> q_along(padded_queries * units), q_down(query_steps * padded), g_along(padded_queries * units), g_down(query_steps * padded);
  Scratch<float> lse(padded_queries), delta(padded_queries), grad_q(padded_queries * padded);
  Scratch<unit> k_columns(kGradKeyBlock * units), v_columns(kGradKeyBlock * units), k_down(kGradKeyBlock / E::kPack * padded);
  Scratch<float> grad_k(kGradKeyBlock * padded), grad_v(kGradKeyBlock * padded);
  Scratch<float> s(kRows * kKeyTile), w(kRows * kKeyTile);
  Scratch<unit> p_down(kBlock / E::kPack * kGradStride), ds_down(kBlock / E::kPack * kGradStride), ds_pairs(kBlock / E::kPack * kGradStride);
  unit* ds_along = E::kPack == 1 ? ds_down.data() : ds_pairs.data();
  int64_t packed_head = -1;
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t head = item / a.splits, split = item % a.splits, b = head / a.H, h = head % a.H;
    if (head != packed_head) {
      const T* grad_out = a.grad_out.at(b, h);
      copy_rows<E>(a.q.at(b, h), a.q.token, a.Nq, padded_queries, D, q_along.data());
      copy_rows<E>(grad_out, a.grad_out.token, a.Nq, padded_queries, D, g_along.data());
      pack_rows<E>(a.q.at(b, h), a.q.token, a.Nq, D, q_down.data());
      pack_rows<E>(grad_out, a.grad_out.token, a.Nq, D, g_down.data());
      for (int64_t i = 0; i < a.Nq; ++i) {
        lse.data()[i] = a.lse[head * a.Nq + i] * 1.44269504f;
        const T* out = a.out.at(b, h) + i * a.out.token;
        vec dot = zero();
        for (int d = 0; d < D; d += kLanes) {
          const int n = std::min(kLanes, D - d);
          dot = fma(Float32::along(grad_out + i * a.grad_out.token + d, n), Float32::along(out + d, n), dot);
        }
        delta.data()[i] = sum(dot);
      }
      for (int64_t i = a.Nq; i < padded_queries; ++i) {  // queries that are not there weigh nothing
        lse.data()[i] = std::numeric_limits<float>::infinity();
        delta.data()[i] = 0.f;
      }
      packed_head = head;
    }
    float* dq = a.partial ? a.partial + item * a.Nq * padded : grad_q.data();
    bool first_block = true;
    for (int64_t block = key_blocks * split / a.splits; block < key_blocks * (split + 1) / a.splits; ++block) {
      const int64_t key = block * kGradKeyBlock;
      const int count = static_cast<int>(std::min<int64_t>(kGradKeyBlock, a.Nk - key));
      pack_columns<E>(a.k.at(b, h) + key * a.k.token, a.k.token, count, D, k_columns.data());
      pack_columns<E>(a.v.at(b, h) + key * a.v.token, a.v.token, count, D, v_columns.data());
      pack_rows<E>(a.k.at(b, h) + key * a.k.token, a.k.token, count, D, k_down.data());
      std::memset(grad_k.data(), 0, sizeof(float) * kGradKeyBlock * padded);
      std::memset(grad_v.data(), 0, sizeof(float) * kGradKeyBlock * padded);
      for (int64_t query = 0; query < a.Nq; query += kBlock) {
        const int rows = static_cast<int>(std::min<int64_t>(kBlock, a.Nq - query));
        for (int j = 0; j < count; j += kKeyTile) {
          const int columns = std::min(kKeyTile, count - j);
          for (int r = 0; r < rows; r += kRows) {
            score_tile<E>(q_along.data() + (query + r) * units, units, k_columns.data() + j * units, units, columns, s.data(), kKeyTile);
            score_tile<E>(g_along.data() + (query + r) * units, units, v_columns.data() + j * units, units, columns, w.data(), kKeyTile);
            for (int i = columns; i % kLanes; ++i) {  // keys that are not there
              for (int n = 0; n < kRows; ++n) s.data()[n * kKeyTile + i] = -std::numeric_limits<float>::infinity();
            }
            grad_tile<E>(s.data(), w.data(), lse.data() + query + r, delta.data() + query + r, to_log2, columns,
                         p_down.data() + r / E::kPack * kGradStride + j, ds_down.data() + r / E::kPack * kGradStride + j,
                         reinterpret_cast<typename E::element*>(ds_along) + r * kGradStride + j);
          }
        }
        const int steps = (rows + E::kPack - 1) / E::kPack;
        products<E, 1, kGradStride>(count, vectors, p_down.data(), g_down.data() + query / E::kPack * padded, padded, steps, grad_v.data(), true);
        products<E, 1, kGradStride>(count, vectors, ds_down.data(), q_down.data() + query / E::kPack * padded, padded, steps, grad_k.data(), true);
        products<E, kGradStride / E::kPack, 1>(rows, vectors, ds_along, k_down.data(), padded, (count + E::kPack - 1) / E::kPack,
                                               dq + query * padded, !first_block);
      }
      first_block = false;
      store_rows(grad_k.data(), padded, count, D, a.scale, a.grad_k.at(b, h) + key * a.grad_k.token, a.grad_k.token);
      store_rows(grad_v.data(), padded, count, D, 1.f, a.grad_v.at(b, h) + key * a.grad_v.token, a.grad_v.token);
    }
    if (!a.partial) store_rows(dq, padded, a.Nq, D, a.scale, a.grad_q.at(b, h), a.grad_q.token);
  }
}

}  // namespace stmae::STMAE_ISA

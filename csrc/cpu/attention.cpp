// Exact softmax attention and its gradient with no N x N matrix in memory (Dao et al. 2022, algorithm 1; Dao 2023).
//
// Everything is a product C[rows, columns] += A[rows, steps] B[steps, columns], done by one micro-kernel (`product`)
// that holds a tile of C in registers, broadcasts A's elements and reads B's rows as vectors. So B is packed once per
// head:
//   by columns  [key tile][D][kKeyTile]   K for the scores Q K^T, V for grad_out V^T
//   by rows     [keys][D padded]          V for P V, K for grad_q, Q and grad_out for grad_k and grad_v
// With bfloat16 dot products an element is a pair: two neighbours along the steps, in the 32 bits of one lane.

#ifdef STMAE_ISA
namespace stmae::STMAE_ISA {

struct Float32 {  // bfloat16 inputs are widened while packing
  using element = float;
  using unit = float;
  using operand = vec;
  static constexpr int kPack = 1;  // elements in a unit
  STMAE_INLINE operand read(const unit* b) { return load(b); }
  STMAE_INLINE operand broadcast(const unit* a) { return set(*a); }
  STMAE_INLINE vec multiply_add(operand a, operand b, vec c) { return fma(a, b, c); }
  STMAE_INLINE vec power_of_two(vec x) { return exp2(x); }  // as exact as an element holds
  STMAE_INLINE void store_two(float* p, vec a, vec b) {
    store(p, a);
    store(p + kLanes, b);
  }
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
  STMAE_INLINE operand read(const unit* b) { return _mm512_loadu_si512(b); }
  STMAE_INLINE operand broadcast(const unit* a) {
    int bits;
    std::memcpy(&bits, a, sizeof(bits));
    return _mm512_set1_epi32(bits);
  }
  STMAE_INLINE vec multiply_add(operand a, operand b, vec c) {
    return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b))};
  }
  STMAE_INLINE vec power_of_two(vec x) { return exp2_for_bfloat16(x); }
  STMAE_INLINE void store_two(bf16* p, vec a, vec b) {
    _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
  }
  STMAE_INLINE vec along(const bf16* row, int units) {
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi32(units >= kLanes ? 0xffff : first(units), row))};
  }
  STMAE_INLINE vec across(const bf16* row, const bf16* next, int units) {  // unit d is (row[d], next[d])
    const __mmask16 mask = units >= kLanes ? 0xffff : first(units);
    __m512i both = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
    if (next)
      both = _mm512_or_si512(both, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, next)), 16));
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
constexpr int kRowTile = 2 * kRows;           // what every kernel's rows divide
constexpr int kKeyBlock = 384;                // forward: keys per step of the online softmax
constexpr int kScoreStride = kKeyBlock + 16;  // not a power of two: rows in different cache sets
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
  if (accumulate) {  // after the loop: short chains of additions keep rounding errors small
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = sum[r][v] + load(c + r * c_stride + v * kLanes);
    }
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
  for (int r = 0; r < rows; r += R)
    product<E, R, V, kRow, kStep>(a + r * kRow, kRow, b, b_stride, steps, c + r * c_stride, c_stride, accumulate);
}

// C[rows, vectors] (+)= A B for any number of rows and vectors; C's rows up to the next multiple of kRowTile are
// written, too.
template <typename E, int kRow, int kStep>
void products(int rows, int vectors, const typename E::unit* a, const typename E::unit* b, int64_t stride, int steps,
              float* c, bool accumulate) {
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
  for (; v + 2 <= vectors; v += 2)
    product_rows<E, 6, 2, kRow, kStep>(rows, a, b + v * kLanes, stride, steps, c + v * kLanes, stride, accumulate);
  if (v < vectors)
    product_rows<E, 6, 1, kRow, kStep>(rows, a, b + v * kLanes, stride, steps, c + v * kLanes, stride, accumulate);
#endif
}

// C[kRows, columns] = A[kRows, D] B[D, columns] for one key tile, B packed by columns; columns up to the vector's end.
template <typename E>
void score_tile(const typename E::unit* a, int64_t row, const typename E::unit* b, int steps, int columns, float* c,
                int64_t c_stride) {
  switch ((columns + kLanes - 1) / kLanes) {
    case 1: return product<E, kRows, 1, 0, 1>(a, row, b, kKeyTile, steps, c, c_stride, false);
    case 2: return product<E, kRows, 2, 0, 1>(a, row, b, kKeyTile, steps, c, c_stride, false);
#if STMAE_ISA_LEVEL >= 2
    case 3: return product<E, kRows, 3, 0, 1>(a, row, b, kKeyTile, steps, c, c_stride, false);
    default: return product<E, kRows, 4, 0, 1>(a, row, b, kKeyTile, steps, c, c_stride, false);
#endif
  }
}

constexpr int kAhead = 16;  // rows between the one read and the one prefetched

// [rows, D] of T -> [rows / kPack][round_up(D, kLanes)] units, a unit down the rows; an odd last row is paired with
// zeros.
template <typename E, typename T>
void pack_rows(const T* source, int64_t stride, int64_t rows, int D, typename E::unit* packed) {
  const int padded = round_up(D, kLanes);
  for (int64_t r = 0; r < rows; r += E::kPack) {
    const T* row = source + r * stride;
    const T* next = r + 1 < rows ? row + stride : nullptr;
    for (int i = 0; i < E::kPack; ++i) prefetch(row + (kAhead + i) * stride, D * sizeof(T));
    for (int d = 0; d < D; d += kLanes)
      store(reinterpret_cast<float*>(packed + d), E::across(row + d, next ? next + d : nullptr, D - d));
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
      if (u == 0) {
        for (int i = 0; i < kLanes; ++i) prefetch(source + (r + i + kLanes) * stride, D * sizeof(T));
      }
      for (int i = 0; i < kLanes; ++i)
        block[i] = r + i < rows ? E::along(source + (r + i) * stride + u * E::kPack, units - u) : zero();
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
    prefetch(source + (r + kAhead) * stride, D * sizeof(T));
    for (int u = 0; u < units; u += kLanes) {
      const int count = std::min(kLanes, units - u);
      const vec part = r < rows ? E::along(source + r * stride + u * E::kPack, count) : zero();
      store(reinterpret_cast<float*>(copy + r * units + u), part, count);
    }
  }
}

// What one tile of queries has gathered from the keys seen so far.
struct Softmax {
  float highest[kQueryBlock];         // of q.k, with the sign of the scale: scores are subtracted before they are scaled,
  float total[kQueryBlock * kLanes];  // since a rounded product, at 1e10, is off by thousands; sum of weights per lane
};

template <bool kLowest>
STMAE_INLINE float extreme(const float* row, int keys) {
  const auto further = [](vec x, vec y) { return kLowest ? min(x, y) : max(x, y); };
  vec a = set(row[0]), b = a;
  int j = 0;
  for (; j + 2 * kLanes <= keys; j += 2 * kLanes) {
    a = further(a, load(row + j));
    b = further(b, load(row + j + kLanes));
  }
  for (; j < keys; j += kLanes) a = further(a, select_first(std::min(kLanes, keys - j), load(row + j), b));
  return kLowest ? -max(-min(a, b)) : max(max(a, b));
}

// Raw scores [rows][kScoreStride] in, unnormalised weights out, in the same memory; earlier sums are rescaled to match.
template <typename E>
void soften(float* scores, int rows, int keys, float to_log2, Softmax& softmax, float* sums, int sum_stride) {
  const int whole = keys / kLanes * kLanes;
  float base[kQueryBlock], rescale[kQueryBlock + kLanes];
  for (int r = 0; r < rows; ++r) {
    const float* row = scores + r * kScoreStride;
    const float before = softmax.highest[r];
    const float highest = std::max(before, to_log2 < 0 ? -extreme<true>(row, keys) : extreme<false>(row, keys));
    softmax.highest[r] = highest;
    // With nothing but -inf so far, any finite base gives the weights 0.
    const float finite = highest == -std::numeric_limits<float>::infinity() ? 0.f : highest;
    base[r] = to_log2 < 0 ? -finite : finite;
    rescale[r] = before == -std::numeric_limits<float>::infinity() ? before : (before - finite) * std::abs(to_log2);
  }
  for (int r = 0; r < rows; r += kLanes) store(rescale + r, exp2(load(rescale + r)));
  const vec slope = set(to_log2);
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kScoreStride;
    auto* weights = reinterpret_cast<typename E::element*>(row);  // no wider than a score, so never ahead of the reads
    const vec highest = set(base[r]);
    vec sum = zero();
    int j = 0;
    for (; j + kLanes < whole; j += 2 * kLanes) {
      const vec weight = E::power_of_two((load(row + j) - highest) * slope);
      const vec next = E::power_of_two((load(row + j + kLanes) - highest) * slope);
      sum = sum + (weight + next);
      E::store_two(weights + j, weight, next);
    }
    if (j < whole) {
      const vec weight = E::power_of_two((load(row + j) - highest) * slope);
      sum = sum + weight;
      store(weights + j, weight);
    }
    if (whole < keys) {
      const vec weight = select_first(keys - whole, E::power_of_two((load(row + whole) - highest) * slope), zero());
      sum = sum + weight;
      store(weights + whole, weight);
    }
    float* total = softmax.total + r * kLanes;
    store(total, fma(load(total), set(rescale[r]), sum));
  }
  if (!sums) return;
  for (int r = 0; r < rows; ++r) {
    if (rescale[r] == 1.f) continue;
    for (int d = 0; d < sum_stride; d += kLanes)
      store(sums + r * sum_stride + d, load(sums + r * sum_stride + d) * set(rescale[r]));
  }
}

// The head that this thread takes next, brought into the second-level cache a few rows at a time between the products of the
// one before it: packing it then does not wait for memory, which saves a short head 5 %. A guess (other threads may take it).
template <typename T>
class NextHead {
 public:
  NextHead() = default;
  template <typename Arguments>
  NextHead(const Arguments& a, int64_t head, std::initializer_list<Heads<const T>> tensors) {
    const int64_t next = head + a.turn, rows = std::min(a.Nq, a.Nk), bytes = a.D * sizeof(T);
    if (next >= a.heads || rows == 0 || static_cast<int64_t>(tensors.size()) * rows * bytes > kMostBrought) return;
    for (const Heads<const T>& tensor : tensors) {
      first_[count_] = tensor.at(next / a.H, next % a.H);
      stride_[count_++] = tensor.token;
    }
    const int64_t moments = (a.Nq + kRows - 1) / kRows * ((a.Nk + kKeyTile - 1) / kKeyTile);  // tiles of scores
    some_ = (rows + moments - 1) / moments;
    rows_ = rows;
    bytes_ = bytes;
  }

  void bring_some() {
    for (const int64_t end = std::min(row_ + some_, rows_); row_ < end; ++row_) {
      for (int i = 0; i < count_; ++i) prefetch<2>(first_[i] + row_ * stride_[i], bytes_);
    }
  }

 private:
  const T* first_[5];
  int64_t stride_[5], row_ = 0, rows_ = 0, some_ = 0, bytes_ = 0;
  int count_ = 0;
};

// Queries [first, last) of row tiles, numbered through all heads of the batch.
template <typename T>
void attention_forward(const Forward<T>& a, int64_t first_tile, int64_t last_tile) {
  using E = typename Multiply<T>::type;
  using unit = typename E::unit;
  const int D = a.D, units = D / E::kPack, padded = round_up(D, kLanes), vectors = padded / kLanes;
  const int64_t tiles = (a.Nq + kQueryBlock - 1) / kQueryBlock;
  const float to_log2 = static_cast<float>(a.scale * 1.4426950408889634);
  Scratch<unit> keys(round_up(a.Nk, kKeyTile) * units), values((a.Nk + E::kPack - 1) / E::kPack * padded),
      queries(kQueryBlock * units);
  Scratch<float> scores(kQueryBlock * kScoreStride), sums(kQueryBlock * padded);
  const bool in_place = std::is_same_v<T, typename E::element> && a.q.token % E::kPack == 0;
  int64_t packed_head = -1;
  NextHead<T> next;
  for (int64_t item = first_tile; item < last_tile; ++item) {
    const int64_t head = item / tiles, b = head / a.H, h = head % a.H;
    if (head != packed_head) {
      pack_columns<E>(a.k.at(b, h), a.k.token, a.Nk, D, keys.data());
      pack_rows<E>(a.v.at(b, h), a.v.token, a.Nk, D, values.data());
      packed_head = head;
      next = NextHead<T>(a, head, {a.k, a.v});
    }
    const int64_t first_query = item % tiles * kQueryBlock;
    const int rows = static_cast<int>(std::min<int64_t>(kQueryBlock, a.Nq - first_query));
    const T* query = a.q.at(b, h) + first_query * a.q.token;
    const unit* query_units = queries.data();
    int64_t query_stride = units;
    if (in_place && rows % kRows == 0) {
      query_units = reinterpret_cast<const unit*>(query);
      query_stride = a.q.token / E::kPack;
    } else {
      copy_rows<E>(query, a.q.token, rows, round_up(rows, kRows), D, queries.data());
    }
    if (item + 1 < last_tile && first_query + kQueryBlock < a.Nq) {
      for (int r = 0; r < kQueryBlock; ++r) prefetch(query + (kQueryBlock + r) * a.q.token, D * sizeof(T));
    }
    Softmax softmax;
    for (float& x : softmax.highest) x = -std::numeric_limits<float>::infinity();
    for (int r = 0; r < kQueryBlock; ++r) store(softmax.total + r * kLanes, zero());
    for (int64_t key = 0; key < a.Nk; key += kKeyBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kKeyBlock, a.Nk - key));
      for (int j = 0; j < count; j += kKeyTile) {
        for (int r = 0; r < rows; r += kRows) {
          next.bring_some();
          score_tile<E>(query_units + r * query_stride, query_stride, keys.data() + (key + j) * units, units,
                        std::min(kKeyTile, count - j), scores.data() + r * kScoreStride + j, kScoreStride);
        }
      }
      soften<E>(scores.data(), rows, count, to_log2, softmax, key ? sums.data() : nullptr, padded);
      products<E, kScoreStride, 1>(rows, vectors, reinterpret_cast<const unit*>(scores.data()),
                                   values.data() + key / E::kPack * padded, padded, (count + E::kPack - 1) / E::kPack,
                                   sums.data(), key > 0);
    }
    for (int r = 0; r < rows; ++r) {
      const float total = sum(load(softmax.total + r * kLanes)), highest = softmax.highest[r];
      // All scores -inf: 0 / 0, as the formula says.
      const float inverse =
          highest == -std::numeric_limits<float>::infinity() ? std::numeric_limits<float>::quiet_NaN() : 1.f / total;
      T* out = a.out.at(b, h) + (first_query + r) * a.out.token;
      for (int d = 0; d < D; d += kLanes) {
        const vec result = load(sums.data() + r * padded + d) * set(inverse);
        D - d >= kLanes ? store(out + d, result) : store(out + d, result, D - d);
      }
      a.lse[head * a.Nq + first_query + r] =
          static_cast<float>(static_cast<double>(highest) * std::abs(to_log2) * 0.6931471805599453 + std::log(total));
    }
  }
}

// One tile of scores s = q.k and of w = grad_out.v, both [kRows][kKeyTile], to what the products of the gradients read:
// P = exp(scale s - lse), lse in units of s (Softmax says why), and dS = P (w - delta), each with units down the queries,
// and dS with units along the keys.
template <typename E>
void grad_tile(const float* s, const float* w, const float* lse, const float* delta, float to_log2, int columns,
               typename E::unit* p_down, typename E::unit* ds_down, typename E::element* ds_along) {
  for (int r = 0; r < kRows; r += E::kPack) {
    for (int j = 0; j < columns; j += kLanes) {
      vec p[E::kPack], ds[E::kPack];
      for (int i = 0; i < E::kPack; ++i) {
        p[i] = E::power_of_two((load(s + (r + i) * kKeyTile + j) - set(lse[r + i])) * set(to_log2));
        ds[i] = p[i] * (load(w + (r + i) * kKeyTile + j) - set(delta[r + i]));
      }
      if constexpr (E::kPack == 1) {
        store(p_down + r * kGradStride + j, p[0]);
        store(ds_down + r * kGradStride + j, ds[0]);
      }
#if STMAE_ISA_LEVEL >= 3
      if constexpr (E::kPack == 2) {
        const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                             21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512i both_p = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(p[1].v, p[0].v));
        const __m512i both_ds = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(ds[1].v, ds[0].v));
        _mm512_storeu_si512(p_down + r / 2 * kGradStride + j, _mm512_permutexvar_epi16(zip, both_p));
        _mm512_storeu_si512(ds_down + r / 2 * kGradStride + j, _mm512_permutexvar_epi16(zip, both_ds));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_along + r * kGradStride + j),
                            _mm512_castsi512_si256(both_ds));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_along + (r + 1) * kGradStride + j),
                            _mm512_extracti64x4_epi64(both_ds, 1));
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

// Items [first, last): an item is one head, or one of `splits` ranges of its keys; grad_q is then summed by
// attention_sum.
template <typename T>
void attention_backward(const Backward<T>& a, int64_t first_item, int64_t last_item) {
  using E = typename Multiply<T>::type;
  using unit = typename E::unit;
  constexpr int kBlock = 4 * kRowTile * E::kPack;  // queries at a time
  const int D = a.D, units = D / E::kPack, padded = round_up(D, kLanes), vectors = padded / kLanes;
  const int64_t padded_queries = round_up(a.Nq, kRowTile), query_steps = padded_queries / E::kPack;
  const int64_t key_blocks = (a.Nk + kGradKeyBlock - 1) / kGradKeyBlock;
  // A scale of 0 as a very small one: the log-sum-exp is divided by it.
  const float to_log2 = a.scale == 0 ? 1e-30f : static_cast<float>(a.scale * 1.4426950408889634);
  const bool same = E::kPack == 1 && units == padded;  // along a row and down the rows
  Scratch<unit> q_along(padded_queries * units), q_pairs(same ? 0 : query_steps * padded), g_along(padded_queries * units),
      g_pairs(same ? 0 : query_steps * padded);
  unit *q_down = same ? q_along.data() : q_pairs.data(), *g_down = same ? g_along.data() : g_pairs.data();
  Scratch<float> lse(padded_queries), delta(padded_queries), grad_q(padded_queries * padded);
  Scratch<unit> k_columns(kGradKeyBlock * units), v_columns(kGradKeyBlock * units),
      k_down(kGradKeyBlock / E::kPack * padded);
  Scratch<float> grad_k(kGradKeyBlock * padded), grad_v(kGradKeyBlock * padded);
  Scratch<float> s(kRows * kKeyTile), w(kRows * kKeyTile);
  Scratch<unit> p_down(kBlock / E::kPack * kGradStride), ds_down(kBlock / E::kPack * kGradStride),
      ds_pairs(kBlock / E::kPack * kGradStride);
  unit* ds_along = E::kPack == 1 ? ds_down.data() : ds_pairs.data();
  int64_t packed_head = -1;
  NextHead<T> next;
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t head = item / a.splits, split = item % a.splits, b = head / a.H, h = head % a.H;
    if (head != packed_head) {
      const T* grad_out = a.grad_out.at(b, h);
      copy_rows<E>(a.q.at(b, h), a.q.token, a.Nq, padded_queries, D, q_along.data());
      copy_rows<E>(grad_out, a.grad_out.token, a.Nq, padded_queries, D, g_along.data());
      if (!same) {
        pack_rows<E>(a.q.at(b, h), a.q.token, a.Nq, D, q_down);
        pack_rows<E>(grad_out, a.grad_out.token, a.Nq, D, g_down);
      }
      for (int64_t i = 0; i < a.Nq; ++i) {
        lse.data()[i] = static_cast<float>(a.lse[head * a.Nq + i] * 1.4426950408889634 / to_log2);
        const T* out = a.out.at(b, h) + i * a.out.token;
        prefetch(out + kAhead * a.out.token, D * sizeof(T));
        vec dot = zero();
        for (int d = 0; d < D; d += kLanes) {
          const int n = std::min(kLanes, D - d);
          dot = fma(Float32::along(grad_out + i * a.grad_out.token + d, n), Float32::along(out + d, n), dot);
        }
        delta.data()[i] = sum(dot);
      }
      for (int64_t i = a.Nq; i < padded_queries; ++i) {  // queries that are not there weigh nothing
        lse.data()[i] = std::copysign(std::numeric_limits<float>::infinity(), to_log2);
        delta.data()[i] = 0.f;
      }
      packed_head = head;
      if (a.splits == 1) next = NextHead<T>(a, head, {a.q, a.k, a.v, a.grad_out, a.out});
    }
    float* dq = a.partial ? a.partial + item * a.partial_stride : grad_q.data();
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
            next.bring_some();
            score_tile<E>(q_along.data() + (query + r) * units, units, k_columns.data() + j * units, units, columns,
                          s.data(), kKeyTile);
            score_tile<E>(g_along.data() + (query + r) * units, units, v_columns.data() + j * units, units, columns,
                          w.data(), kKeyTile);
            // Keys that are not there: their rows of K are 0, so that any finite weight does no harm.
            for (int i = columns; i % kLanes; ++i) {
              for (int n = 0; n < kRows; ++n) s.data()[n * kKeyTile + i] = s.data()[n * kKeyTile];
            }
            grad_tile<E>(s.data(), w.data(), lse.data() + query + r, delta.data() + query + r, to_log2, columns,
                         p_down.data() + r / E::kPack * kGradStride + j,
                         ds_down.data() + r / E::kPack * kGradStride + j,
                         reinterpret_cast<typename E::element*>(ds_along) + r * kGradStride + j);
          }
        }
        const int steps = (rows + E::kPack - 1) / E::kPack;
        products<E, 1, kGradStride>(count, vectors, p_down.data(), g_down + query / E::kPack * padded, padded,
                                    steps, grad_v.data(), true);
        products<E, 1, kGradStride>(count, vectors, ds_down.data(), q_down + query / E::kPack * padded, padded,
                                    steps, grad_k.data(), true);
        products<E, kGradStride / E::kPack, 1>(rows, vectors, ds_along, k_down.data(), padded,
                                               (count + E::kPack - 1) / E::kPack, dq + query * padded, !first_block);
      }
      first_block = false;
      store_rows(grad_k.data(), padded, count, D, a.scale, a.grad_k.at(b, h) + key * a.grad_k.token, a.grad_k.token);
      store_rows(grad_v.data(), padded, count, D, 1.f, a.grad_v.at(b, h) + key * a.grad_v.token, a.grad_v.token);
    }
    if (!a.partial) store_rows(dq, padded, a.Nq, D, a.scale, a.grad_q.at(b, h), a.grad_q.token);
  }
}

// Queries [first, last), numbered through all heads of the batch: grad_q from its parts, always in the same order.
template <typename T>
void attention_sum(const Backward<T>& a, int64_t first_query, int64_t last_query) {
  const int padded = round_up(a.D, kLanes);
  Scratch<float> total(padded);
  for (int64_t item = first_query; item < last_query; ++item) {
    const int64_t head = item / a.Nq, query = item % a.Nq, b = head / a.H, h = head % a.H;
    const float* part = a.partial + head * a.splits * a.partial_stride + query * padded;
    for (int d = 0; d < padded; d += kLanes) {
      vec sum = load(part + d);
      for (int64_t split = 1; split < a.splits; ++split) sum = sum + load(part + split * a.partial_stride + d);
      store(total.data() + d, sum);
    }
    store_rows(total.data(), padded, 1, a.D, a.scale, a.grad_q.at(b, h) + query * a.grad_q.token, a.grad_q.token);
  }
}

}  // namespace stmae::STMAE_ISA

#else  // compiled once: checks and registration

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

#include "../check.h"
#include "../parallel.h"
#include "../scratch.h"

namespace stmae {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostBrought = 1 << 18;  // bytes of a head fetched ahead: a quarter of a usual second-level cache
constexpr int kQueryBlock = 12;            // forward: queries at a time, an item of parallel work
constexpr int kGradKeyBlock = 192;         // backward: keys at a time, whose gradients stay in cache meanwhile

// [B, N, H, D] with any strides, in elements, but a dense last dimension.
template <typename T>
struct Heads {
  T* data;
  int64_t batch, token, head;
  T* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

template <typename T>
struct Forward {
  Heads<const T> q, k, v;
  Heads<T> out;
  float* lse;  // [B, H, Nq]
  int64_t H, Nq, Nk;
  int D;
  double scale;
  int64_t heads = 0, turn = 0;  // in the batch; from one that a thread takes to its next
};

template <typename T>
struct Backward {
  Heads<const T> grad_out, q, k, v, out;
  const float* lse;
  Heads<T> grad_q, grad_k, grad_v;
  int64_t H, Nq, Nk;
  int D;
  double scale;
  int64_t splits = 1;            // into how many ranges of keys a head is divided
  float* partial = nullptr;      // grad_q of each range, or null when there is but one
  int64_t partial_stride = 0;    // of a range
  int64_t heads = 0, turn = 0;   // as in Forward
};

}  // namespace
}  // namespace stmae

#define STMAE_KERNEL_FILE "cpu/attention.cpp"
#include "../for_each_isa.h"

namespace stmae {
namespace {

constexpr int64_t kMostRows = 12;   // the multiple to which any instruction set pads rows of queries
constexpr int64_t kMostLanes = 16;  // and a head's columns
// A backward pass over fewer heads than this divides each by keys. The number of threads has no say in it, so that the
// sums keep their order whatever that is.
constexpr int64_t kEnoughItems = 32;

template <typename T>
Heads<T> heads(const Tensor& x, int64_t offset = 0) {
  return {static_cast<T*>(x.data_ptr()) + offset, x.stride(0), x.stride(1), x.stride(x.dim() - 2)};
}

// The i-th of the three in a packed [B, N, 3, H, D].
template <typename T>
Heads<T> packed_heads(const Tensor& x, int i) {
  return heads<T>(x, i * x.stride(2));
}

void check_rows(const char* op, const char* name, const Tensor& x, int64_t dim, ScalarType dtype) {
  STMAE_CHECK(x.dim() == dim, op, ": expected ", name, " with ", dim, " dimensions, got ", shape(x));
  STMAE_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": expected ", name,
              " float32 or bfloat16");
  STMAE_CHECK(x.scalar_type() == dtype, op, ": expected ", name, " of the same dtype as the first input");
  STMAE_CHECK(x.numel() == 0 || x.stride(dim - 1) == 1 || x.size(dim - 1) == 1, op, ": expected ", name,
              " with a contiguous last dimension, got stride ", x.stride(dim - 1));
}

void check_head_dim(const char* op, int64_t D) {
  STMAE_CHECK(D >= 8 && D <= 128 && D % 8 == 0, op,
              ": expected a head dim that is a multiple of 8 and at most 128, got ", D);
}

void check_shape(const char* op, const char* name, const Tensor& x, std::initializer_list<int64_t> expected) {
  bool same = x.dim() == static_cast<int64_t>(expected.size());
  std::ostringstream wanted;
  int64_t i = 0;
  for (int64_t size : expected) {
    same = same && x.size(i) == size;
    wanted << (i++ ? ", " : "") << size;
  }
  STMAE_CHECK(same, op, ": expected ", name, " [", wanted.str(), "], got ", shape(x));
}

void check_lse(const char* op, const Tensor& lse, int64_t B, int64_t H, int64_t N) {
  check_shape(op, "lse", lse, {B, H, N});
  STMAE_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous(), op, ": expected lse contiguous float32");
}

// How many items make a parallel task worth its start: about 10^5 multiply-adds.
int64_t grain(int64_t queries, int64_t keys, int64_t D) {
  return std::max<int64_t>(1, 100000 / std::max<int64_t>(1, queries * keys * D));
}

template <typename T>
void run_forward(Forward<T> a, int64_t B) {
  const int64_t tiles = (a.Nq + kQueryBlock - 1) / kQueryBlock;
  const int64_t count = B * a.H * tiles, least = grain(kQueryBlock, a.Nk, a.D);
  a.heads = B * a.H;
  a.turn = in_turn(count, tiles, least) ? pieces(count, least) : 1;
  for_pieces_in_turn(count, tiles, least, [&](int64_t, int64_t first, int64_t last) {
    STMAE_DISPATCH(attention_forward<T>, a, first, last);
  });
}

template <typename T>
void run_backward(Backward<T> a, int64_t B) {
  const int64_t all = B * a.H;
  const int64_t blocks = (a.Nk + kGradKeyBlock - 1) / kGradKeyBlock;
  if (all == 0 || a.Nk == 0) return;
  a.splits = std::clamp<int64_t>((kEnoughItems + all - 1) / all, 1, blocks);
  a.partial_stride =
      ((a.Nq + kMostRows - 1) / kMostRows * kMostRows) * ((a.D + kMostLanes - 1) / kMostLanes * kMostLanes);
  Scratch<float> partial(a.splits > 1 ? all * a.splits * a.partial_stride : 0);
  if (a.splits > 1) a.partial = partial.data();
  const int64_t count = all * a.splits, least = grain(a.Nq, std::min<int64_t>(a.Nk, kGradKeyBlock), a.D);
  a.heads = all;
  a.turn = in_turn(count, 1, least) ? pieces(count, least) : 1;
  for_pieces_in_turn(count, 1, least, [&](int64_t, int64_t first, int64_t last) {
    STMAE_DISPATCH(attention_backward<T>, a, first, last);
  });
  if (a.partial)
    torch::stable::parallel_for(0, all * a.Nq, grain(1, a.splits, a.D),
                                [&](int64_t first, int64_t last) { STMAE_DISPATCH(attention_sum<T>, a, first, last); });
}

template <typename T>
void forward_as(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, double scale) {
  run_forward<T>(
      {heads<const T>(q), heads<const T>(k), heads<const T>(v), heads<T>(out), static_cast<float*>(lse.data_ptr()),
       q.size(2), q.size(1), k.size(1), static_cast<int>(q.size(3)), scale},
      q.size(0));
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  const char* op = "attention";
  check_rows(op, "q", q, 4, q.scalar_type());
  check_rows(op, "k", k, 4, q.scalar_type());
  check_rows(op, "v", v, 4, q.scalar_type());
  const int64_t B = q.size(0), N = q.size(1), H = q.size(2), D = q.size(3);
  check_head_dim(op, D);
  check_shape(op, "k", k, {B, k.size(1), H, D});
  check_shape(op, "v", v, {B, k.size(1), H, D});
  STMAE_CHECK(k.size(1) > 0 || q.numel() == 0, op, ": expected at least one key, got k ", shape(k));
  Tensor out = torch::stable::new_empty(q, {B, N, H, D});
  Tensor lse = torch::stable::new_empty(q, {B, H, N}, ScalarType::Float);
  if (q.numel() == 0) return {out, lse};
  if (q.scalar_type() == ScalarType::Float)
    forward_as<float>(q, k, v, out, lse, scale);
  else
    forward_as<c10::BFloat16>(q, k, v, out, lse, scale);
  return {out, lse};
}

template <typename T>
void packed_forward_as(const Tensor& qkv, const Tensor& out, const Tensor& lse, double scale) {
  run_forward<T>({packed_heads<const T>(qkv, 0), packed_heads<const T>(qkv, 1), packed_heads<const T>(qkv, 2),
                  heads<T>(out), static_cast<float*>(lse.data_ptr()), qkv.size(3), qkv.size(1), qkv.size(1),
                  static_cast<int>(qkv.size(4)), scale},
                 qkv.size(0));
}

std::tuple<Tensor, Tensor> packed_attention(const Tensor& qkv, double scale) {
  const char* op = "packed_attention";
  check_rows(op, "qkv", qkv, 5, qkv.scalar_type());
  const int64_t B = qkv.size(0), N = qkv.size(1), H = qkv.size(3), D = qkv.size(4);
  check_head_dim(op, D);
  check_shape(op, "qkv", qkv, {B, N, 3, H, D});
  Tensor out = torch::stable::new_empty(qkv, {B, N, H, D});
  Tensor lse = torch::stable::new_empty(qkv, {B, H, N}, ScalarType::Float);
  if (qkv.numel() == 0) return {out, lse};
  if (qkv.scalar_type() == ScalarType::Float)
    packed_forward_as<float>(qkv, out, lse, scale);
  else
    packed_forward_as<c10::BFloat16>(qkv, out, lse, scale);
  return {out, lse};
}

template <typename T>
void backward_as(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                 const Tensor& lse, const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v, double scale) {
  run_backward<T>(
      {heads<const T>(grad_out), heads<const T>(q), heads<const T>(k), heads<const T>(v), heads<const T>(out),
       static_cast<const float*>(lse.data_ptr()), heads<T>(grad_q), heads<T>(grad_k), heads<T>(grad_v), q.size(2),
       q.size(1), k.size(1), static_cast<int>(q.size(3)), scale},
      q.size(0));
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      double scale) {
  const char* op = "attention_backward";
  check_rows(op, "grad_out", grad_out, 4, q.scalar_type());
  check_rows(op, "q", q, 4, q.scalar_type());
  check_rows(op, "k", k, 4, q.scalar_type());
  check_rows(op, "v", v, 4, q.scalar_type());
  check_rows(op, "out", out, 4, q.scalar_type());
  const int64_t B = q.size(0), N = q.size(1), H = q.size(2), D = q.size(3);
  check_head_dim(op, D);
  check_shape(op, "grad_out", grad_out, {B, N, H, D});
  check_shape(op, "out", out, {B, N, H, D});
  check_shape(op, "k", k, {B, k.size(1), H, D});
  check_shape(op, "v", v, {B, k.size(1), H, D});
  check_lse(op, lse, B, H, N);
  Tensor grad_q = torch::stable::new_empty(q, {B, N, H, D});
  Tensor grad_k = torch::stable::new_empty(k, {B, k.size(1), H, D});
  Tensor grad_v = torch::stable::new_empty(v, {B, k.size(1), H, D});
  if (q.scalar_type() == ScalarType::Float)
    backward_as<float>(grad_out, q, k, v, out, lse, grad_q, grad_k, grad_v, scale);
  else
    backward_as<c10::BFloat16>(grad_out, q, k, v, out, lse, grad_q, grad_k, grad_v, scale);
  return {grad_q, grad_k, grad_v};
}

template <typename T>
void packed_backward_as(const Tensor& grad_out, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                        const Tensor& grad_qkv, double scale) {
  run_backward<T>({heads<const T>(grad_out), packed_heads<const T>(qkv, 0), packed_heads<const T>(qkv, 1),
                   packed_heads<const T>(qkv, 2), heads<const T>(out), static_cast<const float*>(lse.data_ptr()),
                   packed_heads<T>(grad_qkv, 0), packed_heads<T>(grad_qkv, 1), packed_heads<T>(grad_qkv, 2),
                   qkv.size(3), qkv.size(1), qkv.size(1), static_cast<int>(qkv.size(4)), scale},
                  qkv.size(0));
}

Tensor packed_attention_backward(const Tensor& grad_out, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                                 double scale) {
  const char* op = "packed_attention_backward";
  check_rows(op, "grad_out", grad_out, 4, qkv.scalar_type());
  check_rows(op, "qkv", qkv, 5, qkv.scalar_type());
  check_rows(op, "out", out, 4, qkv.scalar_type());
  const int64_t B = qkv.size(0), N = qkv.size(1), H = qkv.size(3), D = qkv.size(4);
  check_head_dim(op, D);
  check_shape(op, "qkv", qkv, {B, N, 3, H, D});
  check_shape(op, "grad_out", grad_out, {B, N, H, D});
  check_shape(op, "out", out, {B, N, H, D});
  check_lse(op, lse, B, H, N);
  Tensor grad_qkv = torch::stable::new_empty(qkv, {B, N, 3, H, D});
  if (qkv.scalar_type() == ScalarType::Float)
    packed_backward_as<float>(grad_out, qkv, out, lse, grad_qkv, scale);
  else
    packed_backward_as<c10::BFloat16>(grad_out, qkv, out, lse, grad_qkv, scale);
  return grad_qkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(stmae, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("packed_attention", TORCH_BOX(&packed_attention));
  m.impl("packed_attention_backward", TORCH_BOX(&packed_attention_backward));
}

}  // namespace stmae

#endif

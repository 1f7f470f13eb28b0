// Tiles, the products over them, and how a head is packed for them. Included once per instruction set, after simd/gemm.h.
//
// Everything is a product C[rows, columns] += A[rows, steps] B[steps, columns] of gemm.h. B is packed once per head:
//   by columns  [key tile][D / kPack][kKeyTile]    K for the scores Q K^T, V for grad_out V^T: sums along D
//   by rows     [keys / kPack][D padded]           V for P V, K for grad_q, Q and grad_out for grad_k and grad_v: sums along tokens
// in lanes of 32 bits: a float, or with bfloat16 dot products two neighbours along the sum.

namespace stmae::STMAE_ISA {

template <typename T>
struct Arithmetic {
  using type = Float32;  // bfloat16 inputs are widened while packing
};
#if STMAE_ISA_LEVEL >= 3
template <>
struct Arithmetic<bf16> {
  using type = Bfloat16;
};
#endif

// A tile of scores is kRows queries by kKeyTile keys: all of the register file but what B's row and A's element need.
constexpr int kRows = 6;
constexpr int kVectors = kRegisters == 32 ? 4 : 2;
constexpr int kKeyTile = kVectors * kLanes;
constexpr int kRowTile = 2 * kRows;           // what every kernel's rows divide
constexpr int kKeyBlock = 384;                // forward: keys per step of the online softmax
constexpr int kScoreStride = kKeyBlock + 16;  // not a power of two: rows in different cache sets
constexpr int kGradStride = kGradKeyBlock + 32;
static_assert(kKeyBlock % kKeyTile == 0 && kGradKeyBlock % kKeyTile == 0 && kGradKeyBlock % kRowTile == 0);
static_assert(kRowTile <= kMaxRowTile && kLanes <= kMaxLanes);

template <typename Integer>
STMAE_INLINE Integer round_up(Integer x, int multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// C[kRows, columns] = A[kRows, D] B[D, columns] for one key tile, B packed by columns; columns up to the vector's end.
template <typename E, typename StrideC>
void score_tile(const typename E::element* a, int64_t row_stride, const float* b, int steps, int columns, float* c,
                StrideC c_stride) {
  const StridedRows<typename E::element, E::kPack, int64_t> rows{a, row_stride};
  const Fixed<kKeyTile> b_stride;
  const int vectors = (columns + kLanes - 1) / kLanes;
  if (vectors == 1) return gemm_tile<E, kRows, 1>(rows, b, b_stride, steps, c, c_stride, false);
  if (vectors == 2) return gemm_tile<E, kRows, 2>(rows, b, b_stride, steps, c, c_stride, false);
  if constexpr (kVectors == 4) {
    if (vectors == 3) return gemm_tile<E, kRows, 3>(rows, b, b_stride, steps, c, c_stride, false);
    gemm_tile<E, kRows, 4>(rows, b, b_stride, steps, c, c_stride, false);
  }
}

template <typename E, int R, int V, int kRow, int kStep>
void product_rows(int rows, const typename E::element* a, const float* b, int64_t stride, int steps, float* c, bool accumulate) {
  for (int r = 0; r < rows; r += R) {
    const StridedRows<typename E::element, kStep, Fixed<kRow>> tile{a + r * kRow, {}};
    gemm_tile<E, R, V>(tile, b, stride, steps, c + r * stride, stride, accumulate);
  }
}

// C[rows, vectors] (+)= A B for any number of rows and vectors, B packed by rows and C with `stride` floats from row to row, A's element
// (r, s) at a[r * kRow + s * kStep]. C's rows up to the next multiple of kRowTile are written, too.
template <typename E, int kRow, int kStep>
void product(int rows, int vectors, const typename E::element* a, const float* b, int64_t stride, int steps, float* c,
             bool accumulate) {
  if constexpr (kRegisters == 32) {
    switch (vectors) {
      case 1: return product_rows<E, 12, 1, kRow, kStep>(rows, a, b, stride, steps, c, accumulate);
      case 2: return product_rows<E, 12, 2, kRow, kStep>(rows, a, b, stride, steps, c, accumulate);
      case 3: return product_rows<E, 6, 3, kRow, kStep>(rows, a, b, stride, steps, c, accumulate);
      case 4: return product_rows<E, 6, 4, kRow, kStep>(rows, a, b, stride, steps, c, accumulate);
      case 5: return product_rows<E, 4, 5, kRow, kStep>(rows, a, b, stride, steps, c, accumulate);
      case 6: return product_rows<E, 4, 6, kRow, kStep>(rows, a, b, stride, steps, c, accumulate);
      default:
        product_rows<E, 6, 4, kRow, kStep>(rows, a, b, stride, steps, c, accumulate);
        return product<E, kRow, kStep>(rows, vectors - 4, a, b + 4 * kLanes, stride, steps, c + 4 * kLanes, accumulate);
    }
  } else {
    int v = 0;
    for (; v + 2 <= vectors; v += 2)
      product_rows<E, 6, 2, kRow, kStep>(rows, a, b + v * kLanes, stride, steps, c + v * kLanes, accumulate);
    if (v < vectors) product_rows<E, 6, 1, kRow, kStep>(rows, a, b + v * kLanes, stride, steps, c + v * kLanes, accumulate);
  }
}

constexpr int kPrefetchRows = 16;  // rows between the one read and the one prefetched

// [rows, D] of T -> [rows / kPack][round_up(D, kLanes)] lanes, packed down the rows; an odd last row is paired with zeros.
template <typename E, typename T>
void pack_rows(const T* source, int64_t stride, int64_t rows, int D, float* packed) {
  for (int64_t r = 0; r < rows; r += E::kPack) {
    const T* row = source + r * stride;
    const T* next = r + 1 < rows ? row + stride : nullptr;
    for (int i = 0; i < E::kPack; ++i) prefetch(row, (kPrefetchRows + i) * stride, D);
    each_vector(D, [&](int64_t d, auto lanes)
                       STMAE_INLINE_BODY { store(packed + d, E::read(row + d, next ? next + d : nullptr, lanes)); });
    packed += round_up(D, kLanes);
  }
}

// [rows, D] of T -> [row tile][D / kPack][kKeyTile] lanes, packed along D; rows up to the last vector's end are zero.
template <typename E, typename T>
void pack_columns(const T* source, int64_t stride, int64_t rows, int D, float* packed) {
  const int lanes_per_row = D / E::kPack;
  for (int64_t r = 0; r < rows; r += kLanes) {
    float* column = packed + r / kKeyTile * kKeyTile * lanes_per_row + r % kKeyTile;
    for (int u = 0; u < lanes_per_row; u += kLanes) {
      vec block[kLanes];
      if (u == 0) {
        for (int i = 0; i < kLanes; ++i) prefetch(source, (r + i + kLanes) * stride, D);
      }
      const int count = std::min(kLanes, lanes_per_row - u);
      for (int i = 0; i < kLanes; ++i)
        block[i] = r + i < rows ? read_lanes<E>(source + (r + i) * stride + u * E::kPack, count) : zero();
      transpose(block);
      for (int i = 0; i < count; ++i) store(column + (u + i) * kKeyTile, block[i]);
    }
  }
}

// [rows, D] of T -> [padded_rows][D / kPack] lanes, zero beyond rows: the A of the products along D.
template <typename E, typename T>
void copy_rows(const T* source, int64_t stride, int64_t rows, int64_t padded_rows, int D, float* copy) {
  const int lanes_per_row = D / E::kPack;
  for (int64_t r = 0; r < padded_rows; ++r) {
    prefetch(source, (r + kPrefetchRows) * stride, D);
    for (int u = 0; u < lanes_per_row; u += kLanes) {
      const int count = std::min(kLanes, lanes_per_row - u);
      store(copy + r * lanes_per_row + u, r < rows ? read_lanes<E>(source + r * stride + u * E::kPack, count) : zero(), count);
    }
  }
}

// sums[rows][padded] * scale -> [rows, D] of T.
template <typename T>
void store_rows(const float* sums, int padded, int64_t rows, int D, float scale, T* target, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    each_vector(D, [&](int64_t d, auto lanes)
                       STMAE_INLINE_BODY { store(target + r * stride + d, load(sums + r * padded + d) * set(scale), lanes); });
  }
}

// The head that this thread takes next, prefetched into the second-level cache a few rows at a time between the products of the current
// one: packing it then does not wait for memory, which saves a short head 5 %. A guess (other threads may take it).
template <typename T>
class NextHead {
 public:
  NextHead() = default;
  template <typename Arguments>
  NextHead(const Arguments& a, int64_t head, std::initializer_list<Heads<const T>> tensors) {
    const int64_t next = head + a.head_stride, rows = std::min(a.Nq, a.Nk);
    if (next >= a.heads || rows == 0) return;
    if (static_cast<int64_t>(tensors.size() * rows * a.D * sizeof(T)) > kMaxPrefetchBytes) return;
    for (const Heads<const T>& tensor : tensors) {
      first_[count_] = tensor.at(next / a.H, next % a.H);
      stride_[count_++] = tensor.token;
    }
    const int64_t score_tiles = (a.Nq + kRows - 1) / kRows * ((a.Nk + kKeyTile - 1) / kKeyTile);
    rows_per_tile_ = (rows + score_tiles - 1) / score_tiles;
    rows_ = rows;
    D_ = a.D;
  }

  void prefetch_rows() {  // called once per tile of scores
    for (const int64_t end = std::min(row_ + rows_per_tile_, rows_); row_ < end; ++row_) {
      for (int i = 0; i < count_; ++i) prefetch<2>(first_[i], row_ * stride_[i], D_);
    }
  }

 private:
  const T* first_[5] = {};
  int64_t stride_[5] = {}, row_ = 0, rows_ = 0, rows_per_tile_ = 0;
  int D_ = 0, count_ = 0;
};

}  // namespace stmae::STMAE_ISA

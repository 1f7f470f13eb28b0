// out = softmax(scale q k^T) v, and the log-sum-exp for the backward. Included once per instruction set, after softmax.h.

namespace stmae::STMAE_ISA {

// Items [first, last): tiles of kQueryBlock queries, numbered through all heads of the batch.
template <typename T>
void attention_forward(const Forward<T>& a, int64_t first, int64_t last) {
  using E = typename Arithmetic<T>::type;
  using element = typename E::element;
  const int D = a.D, lanes_per_row = D / E::kPack, padded = round_up(D, kLanes), vectors = padded / kLanes;
  const int64_t tiles = (a.Nq + kQueryBlock - 1) / kQueryBlock;
  const float to_log2 = static_cast<float>(a.scale * 1.4426950408889634);
  Buffer<float> keys(round_up(a.Nk, kKeyTile) * lanes_per_row), values((a.Nk + E::kPack - 1) / E::kPack * padded),
      queries(kQueryBlock * lanes_per_row);
  Buffer<float> scores(kQueryBlock * kScoreStride), sums(kQueryBlock * padded);
  int64_t packed_head = -1;
  NextHead<T> next;
  for (int64_t item = first; item < last; ++item) {
    const int64_t head = item / tiles, b = head / a.H, h = head % a.H;
    if (head != packed_head) {
      pack_columns<E>(a.k.at(b, h), a.k.token, a.Nk, D, keys.data());
      pack_rows<E>(a.v.at(b, h), a.v.token, a.Nk, D, values.data());
      packed_head = head;
      next = NextHead<T>(a, head, {a.k, a.v});
    }
    const int64_t first_query = item % tiles * kQueryBlock;
    const int rows = static_cast<int>(std::min<int64_t>(kQueryBlock, a.Nq - first_query));
    const T* source = a.q.at(b, h) + first_query * a.q.token;
    const element* query = reinterpret_cast<const element*>(queries.data());
    int64_t query_stride = D;
    if (std::is_same_v<T, element> && rows % kRows == 0) {  // read in place
      query = reinterpret_cast<const element*>(source);
      query_stride = a.q.token;
    } else {
      copy_rows<E>(source, a.q.token, rows, round_up(rows, kRows), D, queries.data());
    }
    if (item + 1 < last && first_query + kQueryBlock < a.Nq) {
      for (int r = 0; r < kQueryBlock; ++r) prefetch(source, (kQueryBlock + r) * a.q.token, D);
    }
    Softmax softmax;
    softmax.reset();
    for (int64_t key = 0; key < a.Nk; key += kKeyBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kKeyBlock, a.Nk - key));
      for (int j = 0; j < count; j += kKeyTile) {
        for (int r = 0; r < rows; r += kRows) {
          next.prefetch_rows();
          score_tile<E>(query + r * query_stride, query_stride, keys.data() + (key + j) * lanes_per_row, lanes_per_row,
                        std::min(kKeyTile, count - j), scores.data() + r * kScoreStride + j, Fixed<kScoreStride>());
        }
      }
      softmax_step<E>(scores.data(), rows, count, to_log2, softmax, key ? sums.data() : nullptr, padded);
      product<E, kScoreStride * E::kPack, E::kPack>(rows, vectors, reinterpret_cast<const element*>(scores.data()),
                                                    values.data() + key / E::kPack * padded, padded,
                                                    (count + E::kPack - 1) / E::kPack, sums.data(), key > 0);
    }
    for (int r = 0; r < rows; ++r) {
      const float total = sum(load(softmax.sum + r * kLanes)), highest = softmax.max[r];
      // All scores -inf: 0 / 0, as the formula says.
      const float inverse =
          highest == -std::numeric_limits<float>::infinity() ? std::numeric_limits<float>::quiet_NaN() : 1.f / total;
      store_rows(sums.data() + r * padded, padded, 1, D, inverse, a.out.at(b, h) + (first_query + r) * a.out.token, 0);
      a.lse[head * a.lse_head + first_query + r] =
          static_cast<float>(static_cast<double>(highest) * std::abs(to_log2) * 0.6931471805599453 + std::log(total));
    }
  }
}

}  // namespace stmae::STMAE_ISA

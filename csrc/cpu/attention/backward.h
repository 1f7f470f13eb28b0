// The gradients of q, k and v. The scores are recomputed from the saved log-sum-exp; grad_k and grad_v of a block of keys stay in cache
// while all queries pass by. Included once per instruction set, after softmax.h.
//   P = exp(scale s - lse), w = grad_out v^T, delta = rowsum(grad_out * out), dS = P * (w - delta)
//   grad_v = P^T grad_out, grad_k = scale dS^T q, grad_q = scale dS k

namespace stmae::STMAE_ISA {

// Queries and their output gradients of one head, packed both ways, with what each query's row of scores needs.
template <typename T>
struct PackedQueries {
  using E = typename Arithmetic<T>::type;
  const int D, lanes_per_row, padded;
  const int64_t rows, padded_rows;
  const bool same;  // along a row and down the rows
  Buffer<float> q_along{padded_rows * lanes_per_row}, g_along{padded_rows * lanes_per_row};
  Buffer<float> q_rows{same ? 0 : padded_rows / E::kPack * padded}, g_rows{same ? 0 : padded_rows / E::kPack * padded};
  Buffer<float> lse{padded_rows}, delta{padded_rows};
  float* const q_down = same ? q_along.data() : q_rows.data();
  float* const g_down = same ? g_along.data() : g_rows.data();

  PackedQueries(int64_t rows, int D)
      : D(D),
        lanes_per_row(D / E::kPack),
        padded(round_up(D, kLanes)),
        rows(rows),
        padded_rows(round_up(rows, kRowTile)),
        same(E::kPack == 1 && D == padded) {}

  void pack(const Backward<T>& a, int64_t head, float to_log2) {
    const int64_t b = head / a.H, h = head % a.H;
    const T *q = a.q.at(b, h), *grad_out = a.grad_out.at(b, h), *out = a.out.at(b, h);
    copy_rows<E>(q, a.q.token, rows, padded_rows, D, q_along.data());
    copy_rows<E>(grad_out, a.grad_out.token, rows, padded_rows, D, g_along.data());
    if (!same) {
      pack_rows<E>(q, a.q.token, rows, D, q_down);
      pack_rows<E>(grad_out, a.grad_out.token, rows, D, g_down);
    }
    for (int64_t i = 0; i < rows; ++i) {
      lse.data()[i] = static_cast<float>(a.lse[head * a.lse_head + i] * 1.4426950408889634 / to_log2);
      prefetch(out, (i + kPrefetchRows) * a.out.token, D);
      vec dot = zero();
      each_vector(D, [&](int64_t d, auto lanes) STMAE_INLINE_BODY {
        dot = fma(load(grad_out + i * a.grad_out.token + d, lanes), load(out + i * a.out.token + d, lanes), dot);
      });
      delta.data()[i] = sum(dot);
    }
    for (int64_t i = rows; i < padded_rows; ++i) {  // the padding weighs nothing
      lse.data()[i] = std::copysign(std::numeric_limits<float>::infinity(), to_log2);
      delta.data()[i] = 0.f;
    }
  }
};

// Items [first, last): an item is one head, or one of `splits` ranges of its keys; grad_q is then summed by attention_sum.
template <typename T>
void attention_backward(const Backward<T>& a, int64_t first, int64_t last) {
  using E = typename Arithmetic<T>::type;
  using element = typename E::element;
  constexpr int kBlock = 4 * kRowTile * E::kPack;  // queries at a time
  const int D = a.D, lanes_per_row = D / E::kPack, padded = round_up(D, kLanes), vectors = padded / kLanes;
  const int64_t key_blocks = (a.Nk + kGradKeyBlock - 1) / kGradKeyBlock;
  // A scale of 0 as a very small one: the log-sum-exp is divided by it.
  const float to_log2 = a.scale == 0 ? 1e-30f : static_cast<float>(a.scale * 1.4426950408889634);
  PackedQueries<T> queries(a.Nq, D);
  Buffer<float> grad_q(queries.padded_rows * padded);
  Buffer<float> k_columns(kGradKeyBlock * lanes_per_row), v_columns(kGradKeyBlock * lanes_per_row),
      k_down(kGradKeyBlock / E::kPack * padded);
  Buffer<float> grad_k(kGradKeyBlock * padded), grad_v(kGradKeyBlock * padded);
  Buffer<float> s(kRows * kKeyTile), w(kRows * kKeyTile);
  Buffer<float> p_down(kBlock / E::kPack * kGradStride), ds_down(kBlock / E::kPack * kGradStride),
      ds_pairs(E::kPack == 1 ? 0 : kBlock / E::kPack * kGradStride);
  element* const ds_along = reinterpret_cast<element*>(E::kPack == 1 ? ds_down.data() : ds_pairs.data());
  const auto as_elements = [](const float* lanes) { return reinterpret_cast<const element*>(lanes); };
  int64_t packed_head = -1;
  NextHead<T> next;
  for (int64_t item = first; item < last; ++item) {
    const int64_t head = item / a.splits, split = item % a.splits, b = head / a.H, h = head % a.H;
    if (head != packed_head) {
      queries.pack(a, head, to_log2);
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
            next.prefetch_rows();
            const int64_t at = (query + r) * lanes_per_row;
            score_tile<E>(as_elements(queries.q_along.data() + at), D, k_columns.data() + j * lanes_per_row, lanes_per_row,
                          columns, s.data(), Fixed<kKeyTile>());
            score_tile<E>(as_elements(queries.g_along.data() + at), D, v_columns.data() + j * lanes_per_row, lanes_per_row,
                          columns, w.data(), Fixed<kKeyTile>());
            // The padding after the last key: its rows of K are 0, so that any finite weight does no harm.
            for (int i = columns; i % kLanes; ++i) {
              for (int n = 0; n < kRows; ++n) s.data()[n * kKeyTile + i] = s.data()[n * kKeyTile];
            }
            grad_tile<E>(s.data(), w.data(), queries.lse.data() + query + r, queries.delta.data() + query + r, to_log2, columns,
                         p_down.data() + r / E::kPack * kGradStride + j, ds_down.data() + r / E::kPack * kGradStride + j,
                         ds_along + r * kGradStride + j);
          }
        }
        const int steps = (rows + E::kPack - 1) / E::kPack;
        const int64_t at = query / E::kPack * padded;
        product<E, E::kPack, kGradStride * E::kPack>(count, vectors, as_elements(p_down.data()), queries.g_down + at, padded,
                                                     steps, grad_v.data(), true);
        product<E, E::kPack, kGradStride * E::kPack>(count, vectors, as_elements(ds_down.data()), queries.q_down + at, padded,
                                                     steps, grad_k.data(), true);
        product<E, kGradStride, E::kPack>(rows, vectors, ds_along, k_down.data(), padded, (count + E::kPack - 1) / E::kPack,
                                          dq + query * padded, !first_block);
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
void attention_sum(const Backward<T>& a, int64_t first, int64_t last) {
  const int padded = round_up(a.D, kLanes);
  Buffer<float> total(padded);
  for (int64_t item = first; item < last; ++item) {
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

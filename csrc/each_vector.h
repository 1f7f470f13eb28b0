// A loop over any number of values as vectors, the last one partial. Included once per instruction set, after simd.h.

namespace stmae::STMAE_ISA {

struct Whole {};  // stands for kLanes where the compiler should see that no lane is masked

template <typename T>
STMAE_INLINE vec load(const T* p, Whole) {
  return load(p);
}
template <typename T>
STMAE_INLINE void store(T* p, vec a, Whole) {
  store(p, a);
}
STMAE_INLINE vec take(vec a, Whole) { return a; }
STMAE_INLINE vec take(vec a, int n) {  // the first n lanes, zero beyond
  float lanes[kLanes];
  store(lanes, a);
  return load(lanes, n);
}

// body(i, lanes) for i = 0, kLanes, ... below n.
template <typename Body>
STMAE_INLINE void each_vector(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Whole());
  if (i < n) body(i, static_cast<int>(n - i));
}

// The same with body(i, lanes, chain): four sums that take turns, as one would wait for itself.
template <typename Body>
STMAE_INLINE void each_vector_of_chains(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    body(i, Whole(), 0);
    body(i + kLanes, Whole(), 1);
    body(i + 2 * kLanes, Whole(), 2);
    body(i + 3 * kLanes, Whole(), 3);
  }
  for (; i + kLanes <= n; i += kLanes) body(i, Whole(), 0);
  if (i < n) body(i, static_cast<int>(n - i), 1);
}

struct Chains {
  vec chain[4];
};
STMAE_INLINE Chains empty_chains() { return {{zero(), zero(), zero(), zero()}}; }
STMAE_INLINE float sum(const Chains& x) { return sum((x.chain[0] + x.chain[1]) + (x.chain[2] + x.chain[3])); }

#define STMAE_INLINE_BODY __attribute__((always_inline))

}  // namespace stmae::STMAE_ISA

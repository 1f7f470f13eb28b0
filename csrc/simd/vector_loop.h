// A loop over any number of values as vectors, the last one partial. Included once per instruction set, after vec.h.

#define STMAE_INLINE_BODY __attribute__((always_inline))

namespace stmae::STMAE_ISA {

struct AllLanes {};  // stands for kLanes where the compiler should see that no lane is masked

template <typename T>
STMAE_INLINE vec load(const T* p, AllLanes) {
  return load(p);
}
template <typename T>
STMAE_INLINE void store(T* p, vec a, AllLanes) {
  store(p, a);
}
STMAE_INLINE vec keep_first(vec a, AllLanes) { return a; }
STMAE_INLINE vec keep_first(vec a, int n) { return select_first(n, a, zero()); }  // the first n lanes, zero beyond

// body(i, lanes) for i = 0, kLanes, ... below n.
template <typename Body>
STMAE_INLINE void each_vector(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, AllLanes());
  if (i < n) body(i, static_cast<int>(n - i));
}

// The same with body(i, lanes, accumulator), accumulator in [0, 4): consecutive additions to one sum would wait for each other.
template <typename Body>
STMAE_INLINE void each_vector_unrolled(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    body(i, AllLanes(), 0);
    body(i + kLanes, AllLanes(), 1);
    body(i + 2 * kLanes, AllLanes(), 2);
    body(i + 3 * kLanes, AllLanes(), 3);
  }
  for (; i + kLanes <= n; i += kLanes) body(i, AllLanes(), 0);
  if (i < n) body(i, static_cast<int>(n - i), 1);
}

struct Accumulators {
  vec v[4];
};
STMAE_INLINE Accumulators zero_accumulators() { return {{zero(), zero(), zero(), zero()}}; }
STMAE_INLINE float sum(const Accumulators& x) { return sum((x.v[0] + x.v[1]) + (x.v[2] + x.v[3])); }

}  // namespace stmae::STMAE_ISA

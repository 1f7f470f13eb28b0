// A loop over any number of values as vectors, the last one partial. Included once per instruction set, after simd.h.

namespace stmae::STMAE_ISA {

struct Whole {};  // stands for kLanes where the compiler should see that no lane is masked

template <typename T>
STMAE_INLINE vec load(const T* p, Whole) { return load(p); }
template <typename T>
STMAE_INLINE void store(T* p, vec a, Whole) { store(p, a); }
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

#define STMAE_INLINE_BODY __attribute__((always_inline))

}  // namespace stmae::STMAE_ISA

#include "base/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace stmae {
namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

Isa detect() {
#if STMAE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa parse(const std::string& name) {
  for (Isa candidate : kAll) {
    if (name != isa_name(candidate)) continue;
    if (candidate > best_isa())
      throw std::runtime_error("cpu capability '" + name + "' is not offered by this processor; best is '" +
                               isa_name(best_isa()) + "'");
    return candidate;
  }
  throw std::runtime_error("cpu capability: expected one of portable, avx2, avx512, avx512_bf16, got '" + name + "'");
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value = [] {
    const char* wanted = std::getenv("STMAE_CPU_CAPABILITY");
    return wanted && *wanted ? parse(wanted) : best_isa();
  }();
  return value;
}

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa isa() { return current().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) { current().store(parse(name)); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

}  // namespace stmae

#include "base/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace stmae {
namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon};

// The best comes last.
std::vector<Isa> detect() {
  std::vector<Isa> offered = {Isa::portable};
#if STMAE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) offered.push_back(Isa::avx2);
  if (avx512) offered.push_back(Isa::avx512);
  if (avx512 && __builtin_cpu_supports("avx512bf16")) offered.push_back(Isa::avx512_bf16);
#elif STMAE_ARM64
  offered.push_back(Isa::neon);  // every processor of this kind has it
#endif
  return offered;
}

const std::vector<Isa>& offered() {
  static const std::vector<Isa> found = detect();
  return found;
}

Isa parse(const std::string& name) {
  for (Isa candidate : kAll) {
    if (name != isa_name(candidate)) continue;
    if (std::find(offered().begin(), offered().end(), candidate) == offered().end())
      throw std::runtime_error("cpu capability '" + name + "' is not offered by this processor; best is '" +
                               isa_name(best_isa()) + "'");
    return candidate;
  }
  throw std::runtime_error("cpu capability: expected one of portable, avx2, avx512, avx512_bf16, neon, got '" + name + "'");
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value = [] {
    const char* wanted = std::getenv("STMAE_CPU_CAPABILITY");
    return wanted && *wanted ? parse(wanted) : best_isa();
  }();
  return value;
}

}  // namespace

Isa best_isa() { return offered().back(); }

Isa isa() { return current().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) { current().store(parse(name)); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::neon: return "neon";
    default: return "portable";
  }
}

}  // namespace stmae

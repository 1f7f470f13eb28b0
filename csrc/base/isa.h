// Which instruction set the kernels use. Chosen once from what the processor has (never from what the compiler targets), so
// that a binary built on one machine runs on an older one. STMAE_CPU_CAPABILITY in the environment, or set_isa(), lowers it.
#pragma once

#include <string>

namespace stmae {

enum class Isa { portable, avx2, avx512, avx512_bf16, neon };

Isa isa();                              // the one in use
Isa best_isa();                         // the most that this processor and this build offer
const char* isa_name(Isa isa);          // "avx512_bf16", ...
void set_isa(const std::string& name);  // throws std::runtime_error when unknown or not offered here

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define STMAE_X86 1
#else
#define STMAE_X86 0
#endif
#if defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define STMAE_ARM64 1
#else
#define STMAE_ARM64 0
#endif

// Calls FUNCTION of the instruction set in use: STMAE_DISPATCH(attention_forward, arguments...).
#if STMAE_X86
#define STMAE_DISPATCH(FUNCTION, ...)                                            \
  do {                                                                           \
    switch (::stmae::isa()) {                                                    \
      case ::stmae::Isa::avx512_bf16: avx512_bf16::FUNCTION(__VA_ARGS__); break; \
      case ::stmae::Isa::avx512: avx512::FUNCTION(__VA_ARGS__); break;           \
      case ::stmae::Isa::avx2: avx2::FUNCTION(__VA_ARGS__); break;               \
      default: portable::FUNCTION(__VA_ARGS__);                                  \
    }                                                                            \
  } while (0)
#elif STMAE_ARM64
#define STMAE_DISPATCH(FUNCTION, ...)                              \
  do {                                                             \
    switch (::stmae::isa()) {                                      \
      case ::stmae::Isa::neon: neon::FUNCTION(__VA_ARGS__); break; \
      default: portable::FUNCTION(__VA_ARGS__);                    \
    }                                                              \
  } while (0)
#else
#define STMAE_DISPATCH(FUNCTION, ...) portable::FUNCTION(__VA_ARGS__)
#endif

}  // namespace stmae

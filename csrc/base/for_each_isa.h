// Compiles a kernel file once per instruction set. A kernel file (cpu/<op>.cpp) has this form:
//
//   #ifdef STMAE_ISA              // compiled once for each instruction set, inside its target region
//   namespace stmae::STMAE_ISA {  // STMAE_ISA is avx512_bf16, avx512, avx2 (STMAE_ISA_LEVEL 3, 2, 1), neon or portable (0)
//   ...kernels, written with the types of simd/vec.h...
//   }
//   #else                         // compiled once: includes, checks, dispatch, registration
//   #include <...every standard header the kernels use...>
//   #define STMAE_KERNEL_FILE "cpu/<op>.cpp"
//   #include "base/for_each_isa.h"
//   ...STMAE_DISPATCH(kernel, arguments...)...
//   #endif
//
// Standard headers must come before this one: an inline function of theirs first compiled inside a target region could be
// the copy that the linker keeps, and would then run on processors that lack the instructions.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>

#include "base/isa.h"

#if STMAE_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics' deliberately undefined operands
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#define STMAE_PRAGMA(TEXT) _Pragma(#TEXT)
#define STMAE_TARGET(FEATURES) STMAE_PRAGMA(clang attribute push(__attribute__((target(FEATURES))), apply_to = function))
#define STMAE_TARGET_END STMAE_PRAGMA(clang attribute pop)
#else
#define STMAE_PRAGMA(TEXT) _Pragma(#TEXT)
#define STMAE_TARGET(FEATURES) \
  STMAE_PRAGMA(GCC push_options) STMAE_PRAGMA(GCC target(FEATURES, "prefer-vector-width=512"))  // Clang has no such feature
#define STMAE_TARGET_END STMAE_PRAGMA(GCC pop_options)
#endif

#define STMAE_ISA avx512_bf16
#define STMAE_ISA_LEVEL 3
STMAE_TARGET("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#include "simd/vec.h"
#include STMAE_KERNEL_FILE
STMAE_TARGET_END
#undef STMAE_ISA
#undef STMAE_ISA_LEVEL

#define STMAE_ISA avx512
#define STMAE_ISA_LEVEL 2
STMAE_TARGET("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#include "simd/vec.h"
#include STMAE_KERNEL_FILE
STMAE_TARGET_END
#undef STMAE_ISA
#undef STMAE_ISA_LEVEL

#define STMAE_ISA avx2
#define STMAE_ISA_LEVEL 1
STMAE_TARGET("avx2,fma,f16c,bmi2")
#include "simd/vec.h"
#include STMAE_KERNEL_FILE
STMAE_TARGET_END
#undef STMAE_ISA
#undef STMAE_ISA_LEVEL
#endif  // STMAE_X86

#if STMAE_ARM64
#include <arm_neon.h>

#define STMAE_ISA neon
#define STMAE_ISA_LEVEL 0
#define STMAE_ISA_NEON 1
#include "simd/vec.h"
#include STMAE_KERNEL_FILE
#undef STMAE_ISA
#undef STMAE_ISA_LEVEL
#undef STMAE_ISA_NEON
#endif  // STMAE_ARM64

#define STMAE_ISA portable
#define STMAE_ISA_LEVEL 0
#include "simd/vec.h"
#include STMAE_KERNEL_FILE
#undef STMAE_ISA
#undef STMAE_ISA_LEVEL

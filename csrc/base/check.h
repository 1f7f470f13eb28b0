// Error messages of the C++ kernels. A failed check becomes a RuntimeError in Python: "op: what was expected, what came".
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace stmae {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// STMAE_CHECK(condition, "attention: expected ..., got ", value): nothing is formatted unless the check fails.
#define STMAE_CHECK(condition, ...) \
  do {                              \
    if (!(condition)) [[unlikely]]  \
      ::stmae::fail(__VA_ARGS__);   \
  } while (0)

// "[2, 3, 4]"
inline std::string shape(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

// Whether a kernel reads float32 (true) or bfloat16 (false); anything else is refused.
inline bool is_float32(const char* op, torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  STMAE_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op, ": expected float32 or bfloat16, got another dtype");
  return type == ScalarType::Float;
}

}  // namespace stmae

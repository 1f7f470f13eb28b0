// What an op requires of its operands, and the errors where that does not hold. Every op checks all that it is given, since
// torch.ops.stmae.* can be called directly. A failed check becomes a RuntimeError in Python: "op: what was expected, what came".
#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace stmae {

using torch::headeronly::ScalarType;

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

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

// "[2, 3, 4]"
inline std::string shape(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

// The product of sizes, none negative; an error where it does not fit 62 bits.
inline int64_t checked_product(const char* op, std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (int64_t size : sizes)
    STMAE_CHECK(!__builtin_mul_overflow(product, size, &product) && product < int64_t{1} << 62, op, ": sizes are too large");
  return product;
}

// Whether a kernel reads float32 (true) or bfloat16 (false); anything else is refused.
inline bool is_float32(const char* op, ScalarType type) {
  STMAE_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op, ": expected float32 or bfloat16, got ",
              dtype_name(type));
  return type == ScalarType::Float;
}

// The tensor lies in memory of this process, its elements on their boundaries, and within its storage, which someone may have
// resized.
inline void check_memory(const char* op, const char* name, const torch::stable::Tensor& x) {
  STMAE_CHECK(x.is_cpu(), op, ": expected ", name, " on cpu, got another device");
  if (x.numel() == 0) return;
  int64_t last = x.storage_offset(), bytes = 0;  // the element at the highest address
  const auto sizes = x.sizes(), strides = x.strides();
  bool overflow = false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    int64_t step = 0;
    overflow = overflow || __builtin_mul_overflow(sizes[i] - 1, strides[i], &step) || __builtin_add_overflow(last, step, &last);
  }
  const int64_t item = static_cast<int64_t>(x.element_size());
  STMAE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes) == 0, op, ": expected ", name, " with a storage");
  STMAE_CHECK(!overflow && last < bytes / item, op, ": expected ", name, " within its storage, got ", shape(x),
              " in a storage of ", bytes, " bytes");
  STMAE_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % item == 0, op, ": expected ", name, " aligned to its ", item,
              "-byte elements; call ", name, ".clone()");
}

constexpr int64_t kAny = -1;

struct DTypes {  // any of these
  std::vector<ScalarType> types;
  DTypes(ScalarType type) : types{type} {}
  DTypes(std::initializer_list<ScalarType> types) : types(types) {}
};

inline const DTypes& floating() {
  static const DTypes types{ScalarType::Float, ScalarType::BFloat16};
  return types;
}

// A tensor of these sizes (kAny: any) and one of these dtypes, with any strides.
inline void check_tensor(const char* op, const char* name, const torch::stable::Tensor& x, const std::vector<int64_t>& sizes,
                         const DTypes& dtypes) {
  bool fits = x.dim() == static_cast<int64_t>(sizes.size()), allowed = false;
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = sizes[i] == kAny || x.size(i) == sizes[i];
  const ScalarType type = x.scalar_type();
  for (ScalarType dtype : dtypes.types) allowed = allowed || type == dtype;
  if (!fits || !allowed) [[unlikely]] {
    std::ostringstream expected;
    for (size_t i = 0; i < sizes.size(); ++i) expected << (i ? ", " : "") << (sizes[i] == kAny ? "*" : std::to_string(sizes[i]));
    expected << "] ";
    for (size_t i = 0; i < dtypes.types.size(); ++i) expected << (i ? " or " : "") << dtype_name(dtypes.types[i]);
    fail(op, ": expected ", name, " [", expected.str(), ", got ", shape(x), " ", dtype_name(type));
  }
  check_memory(op, name, x);
}

// The last dimension lies densely in memory; the others may have any stride.
inline void check_dense_rows(const char* op, const char* name, const torch::stable::Tensor& x) {
  const int64_t last = x.dim() - 1;
  STMAE_CHECK(x.numel() == 0 || x.size(last) == 1 || x.stride(last) == 1, op, ": expected ", name,
              " with a contiguous last dimension, got stride ", x.stride(last));
}

inline void check_contiguous(const char* op, const char* name, const torch::stable::Tensor& x) {
  STMAE_CHECK(x.is_contiguous(), op, ": expected ", name, " contiguous");
}

// check_tensor and check_contiguous.
inline void check_contiguous_tensor(const char* op, const char* name, const torch::stable::Tensor& x,
                                    const std::vector<int64_t>& sizes, const DTypes& dtypes) {
  check_tensor(op, name, x, sizes, dtypes);
  check_contiguous(op, name, x);
}

// What is written must not be read: both contiguous.
inline void check_no_overlap(const char* op, const char* name, const torch::stable::Tensor& out, const char* other,
                             const torch::stable::Tensor& x) {
  const auto begin = [](const torch::stable::Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()); };
  const auto end = [&](const torch::stable::Tensor& t) { return begin(t) + t.numel() * t.element_size(); };
  STMAE_CHECK(out.numel() == 0 || x.numel() == 0 || end(out) <= begin(x) || end(x) <= begin(out), op, ": expected ", name,
              " that does not overlap ", other);
}

inline std::vector<int64_t> sizes_of(const torch::stable::Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end()};
}

}  // namespace stmae

// Checks of an op's arguments on the host: one error that names the argument, its value and what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <string>
#include <vector>

namespace bert_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string text(const std::vector<int64_t>& shape) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  out << (shape.size() == 1 ? ",)" : ")");
  return out.str();
}

inline std::vector<int64_t> shape_of(const Tensor& x) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < x.dim(); ++i) shape.push_back(x.size(i));
  return shape;
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

// Dense, of this shape and dtype, on the same device as `like`, at a multiple of `alignment` bytes.
inline void check(const char* op, const char* name, const Tensor& x, const std::vector<int64_t>& shape, ScalarType type,
                  const Tensor& like, int alignment) {
  const std::vector<int64_t> found = shape_of(x);
  const bool same_device = x.get_device() == like.get_device() && x.is_cuda() == like.is_cuda();
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % alignment == 0;
  STD_TORCH_CHECK(found == shape && x.scalar_type() == type && x.is_contiguous() && same_device && aligned, op, ": ",
                  name, " is ", text(found), " ", name_of(x.scalar_type()), x.is_contiguous() ? "" : ", not contiguous",
                  same_device ? "" : ", on another device than x", aligned ? "" : ", unaligned", ", expected ",
                  text(shape), " ", name_of(type), " at a multiple of ", alignment, " bytes");
}

}  // namespace bert_fast

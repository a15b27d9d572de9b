// Checks of invariants: they keep a direct call of an operator from reading or writing outside of its tensors.
// beit_fast/ops/validation.py lists every error of a bad call.
#pragma once

#include <initializer_list>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace beit_fast {

using Tensor = torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const Tensor* pointer_to(const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; }

// Throws std::invalid_argument, ValueError in Python: "beit_fast::<operator_name>: expected <expected>".
void require(bool condition, const char* operator_name, const char* expected);

// float16, bfloat16, float32 or float64.
bool is_float(torch::headeronly::ScalarType dtype);

bool has_shape(const Tensor& tensor, const std::vector<int64_t>& shape);

// Null pointers stand for optional tensors that were not passed.
bool on_one_device(std::initializer_list<const Tensor*> tensors);

}  // namespace beit_fast

#pragma once

#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace beit_fast {

using Tensor = torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An argument by its name in the schema; nullptr where an optional one was not given.
using Argument = std::pair<const char*, const Tensor*>;

inline const Tensor* pointer_to(const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; }

// Whether the native kernels take numbers of this dtype as floating point.
bool is_float(torch::headeronly::ScalarType dtype);

// What Python prints for a dtype, a shape and a device: "float32", "[2, 3]", "cuda:0".
std::string dtype_name(torch::headeronly::ScalarType dtype);
std::string shape_text(torch::headeronly::IntHeaderOnlyArrayRef sizes);
std::string device_name(const torch::stable::Device& device);

// Throws std::invalid_argument, ValueError in Python, with the words of `raise_problems` in beit_fast/validation.py:
//
//     std::vector<std::string> problems;
//     if (q.dim() != 4) problems.push_back("q must be [B, N, H, D]");
//     if (!problems.empty()) {
//         raise_problems("rel_pos_attention", problems, {{"q", &q}, {"table", pointer_to(table)}});
//     }
[[noreturn]] void raise_problems(const char* operator_name, const std::vector<std::string>& problems,
                                 std::initializer_list<Argument> arguments);

}  // namespace beit_fast

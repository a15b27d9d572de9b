#include "errors.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace beit_fast {

void require(bool condition, const char* operator_name, const char* expected) {
    if (!condition) throw std::invalid_argument("beit_fast::" + std::string(operator_name) + ": expected " + expected);
}

bool is_float(torch::headeronly::ScalarType dtype) {
    using torch::headeronly::ScalarType;
    return dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float ||
           dtype == ScalarType::Double;
}

bool has_shape(const Tensor& tensor, const std::vector<int64_t>& shape) { return tensor.sizes().equals(shape); }

bool on_one_device(std::initializer_list<const Tensor*> tensors) {
    const Tensor& first = **tensors.begin();
    return std::all_of(tensors.begin(), tensors.end(), [&](const Tensor* tensor) {
        return tensor == nullptr || tensor->device() == first.device();
    });
}

}  // namespace beit_fast

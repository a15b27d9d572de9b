#include "errors.h"

#include <array>
#include <cctype>
#include <cstdint>
#include <stdexcept>

namespace beit_fast {

namespace {

std::string lower_case(std::string text) {
    for (char& letter : text) letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
    return text;
}

std::string join(const std::vector<std::string>& parts, const char* separator) {
    std::string text;
    for (size_t place = 0; place < parts.size(); ++place) text += (place == 0 ? "" : separator) + parts[place];
    return text;
}

std::string description(const char* name, const Tensor& tensor) {
    return std::string(name) + " " + dtype_name(tensor.scalar_type()) + shape_text(tensor.sizes()) + " on " +
           device_name(tensor.device());
}

}  // namespace

bool is_float(torch::headeronly::ScalarType dtype) {
    using torch::headeronly::ScalarType;
    return dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float ||
           dtype == ScalarType::Double;
}

std::string dtype_name(torch::headeronly::ScalarType dtype) {
    using torch::headeronly::ScalarType;
    switch (dtype) {
        case ScalarType::Byte: return "uint8";
        case ScalarType::Char: return "int8";
        case ScalarType::Short: return "int16";
        case ScalarType::Int: return "int32";
        case ScalarType::Long: return "int64";
        case ScalarType::Half: return "float16";
        case ScalarType::Float: return "float32";
        case ScalarType::Double: return "float64";
        case ScalarType::ComplexHalf: return "complex32";
        case ScalarType::ComplexFloat: return "complex64";
        case ScalarType::ComplexDouble: return "complex128";
        default: return lower_case(torch::headeronly::toString(dtype));
    }
}

std::string shape_text(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    std::vector<std::string> numbers;
    for (int64_t size : sizes) numbers.push_back(std::to_string(size));
    std::string text = "[";
    text += join(numbers, ", ");
    return text += "]";
}

std::string device_name(const torch::stable::Device& device) {
    static constexpr std::array names = {"cpu",    "cuda",  "mkldnn", "opengl", "opencl", "ideep", "hip",
                                         "fpga",   "maia",  "xla",    "vulkan", "metal",  "xpu",   "mps",
                                         "meta",   "hpu",   "ve",     "lazy",   "ipu",    "mtia",
                                         "privateuseone"};
    const auto type = static_cast<size_t>(device.type());
    const std::string name = type < names.size() ? names[type] : "device type " + std::to_string(type);
    return device.has_index() ? name + ":" + std::to_string(device.index()) : name;
}

void raise_problems(const char* operator_name, const std::vector<std::string>& problems,
                    std::initializer_list<Argument> arguments) {
    std::vector<std::string> given;
    for (const auto& [name, tensor] : arguments) {
        if (tensor != nullptr) given.push_back(description(name, *tensor));
    }
    throw std::invalid_argument("beit_fast::" + std::string(operator_name) + " cannot serve " + join(given, ", ") +
                                ": " + join(problems, "; "));
}

}  // namespace beit_fast

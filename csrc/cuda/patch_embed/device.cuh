#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace beit_fast::cuda {

// Sets the current device for its lifetime, in torch's runtime and in this library's own, which launches.
class OnDevice {
  public:
    explicit OnDevice(int32_t device) : guard_(device) { STD_CUDA_CHECK(cudaSetDevice(device)); }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
};

inline int count_sms(int32_t device) {
    int count = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

inline cudaStream_t current_stream(int32_t device) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return static_cast<cudaStream_t>(stream);
}

}  // namespace beit_fast::cuda

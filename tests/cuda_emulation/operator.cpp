#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

// The unchanged operator, registered for CPU tensors.
#define CUDA CPU
#include "../../csrc/cuda/patch_embed/operator.cu"

"""The operators in plain PyTorch, for CPUs without the native library."""

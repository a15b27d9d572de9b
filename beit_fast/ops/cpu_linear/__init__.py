"""GEMM of fp32 linear layers on CPUs, and the choice among BLAS, oneDNN and split bf16."""

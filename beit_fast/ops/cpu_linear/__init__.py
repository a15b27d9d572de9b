"""GEMMs for fp32 linear layers on CPU. `choice` selects BLAS, oneDNN or split bf16."""

"""The training loop of all recipes, on torch's DDP and FSDP2."""

"""Fine-tuning with few labels, from BEiT pre-training and from scratch: `python -m benchmarks.few_labels`."""

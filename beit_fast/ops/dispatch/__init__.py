"""Which kernel serves an operator on a device, and why another one does not."""

"""Choice of kernels by device, and the reasons against the other kernels."""

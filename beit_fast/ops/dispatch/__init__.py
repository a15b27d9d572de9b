"""Choice of kernels by device, with the reasons why others cannot serve."""

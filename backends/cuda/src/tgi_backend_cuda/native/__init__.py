"""Kernels in CUDA C++ for decoding few rows, where reading the weights is all the time there is."""

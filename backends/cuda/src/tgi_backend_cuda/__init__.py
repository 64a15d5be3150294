"""The CUDA backend: NVIDIA GPUs."""

"""The contract of backends and devices, as tests to inherit."""

"""The CPU backend: reference and default."""

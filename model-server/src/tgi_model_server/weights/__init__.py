"""Loading: safetensors to parameters."""

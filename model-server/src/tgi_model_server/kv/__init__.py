"""KV cache: pages, their pool of tensors, and the prefix tree over them."""

"""Device-neutral PyTorch engine: one Backend for everything that runs torch."""

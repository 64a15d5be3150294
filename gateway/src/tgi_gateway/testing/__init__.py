"""The smallest correct backends, for tests and measurements without a model."""

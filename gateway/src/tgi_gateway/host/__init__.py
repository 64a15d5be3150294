"""The engine host: queue, admission and dispatch around a Backend."""

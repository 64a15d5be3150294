"""Processes: start, readiness, logs, drain."""

"""One gateway, pluggable engines."""

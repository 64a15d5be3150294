"""Real small implementations for tests: devices, models and a runner. Nothing here runs in a server."""

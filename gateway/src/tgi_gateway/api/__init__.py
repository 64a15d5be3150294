"""HTTP: routes, wire models and their answers."""

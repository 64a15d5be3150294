"""A Backend over gRPC: the protocol between HTTP workers and the engine host."""

"""A chip that does not exist, as an example for authors."""

"""The llama.cpp backend of tgi-gateway."""

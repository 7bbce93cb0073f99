"""Tensors in files, before their names mean anything: each container is read lazily and strictly, and written whole."""

"""A tiny Stable Diffusion from scratch: the drawn world it learns, and a checker of what it samples."""

"""The formulas of diffusion models, without state."""

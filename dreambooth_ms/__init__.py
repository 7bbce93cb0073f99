"""dreambooth_ms teaches Stable Diffusion a new subject from a few photographs, natively on MindSpore."""

__version__ = "0.1.0"

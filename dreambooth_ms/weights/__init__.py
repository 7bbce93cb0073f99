"""A base model from disk or hub as a bundle of networks, and back."""

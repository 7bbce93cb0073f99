"""The networks as cells with the public module trees, and their families as data."""

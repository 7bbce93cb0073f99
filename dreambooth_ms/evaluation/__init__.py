"""How well a subject was learnt, and what the class lost by it."""

"""From any format to any other: convert, merge, inspect; models and adapters alike."""

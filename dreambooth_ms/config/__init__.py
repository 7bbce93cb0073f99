"""The typed configuration: what can be set (schema), what else users call it (spellings), and how it is read (load)."""

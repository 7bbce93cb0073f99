"""The typed configuration: what can be set (a schema for each command), what else users call it (spellings), what is
not here (refusals), load."""

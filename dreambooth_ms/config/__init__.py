"""The typed configuration: what can be set (a schema per command), its spellings, refusals, and how it is loaded."""

"""Small trained changes to a frozen network: inject, list the trainables, merge."""

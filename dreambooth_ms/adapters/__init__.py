"""Small trained changes of a frozen model: as values, in files of any format, on networks."""

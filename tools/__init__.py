"""Tools of the developers; none of this is installed with the package."""

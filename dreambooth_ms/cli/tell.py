"""What commands say while they work."""

import sys


def tell(line: str) -> None:
    """Print a line about what goes on to stderr, which leaves stdout to results."""
    print(line, file=sys.stderr)

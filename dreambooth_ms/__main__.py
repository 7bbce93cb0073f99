"""`python -m dreambooth_ms COMMAND`: the command line, for launchers that start Python."""

import sys

from dreambooth_ms.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m dreambooth_ms COMMAND`: the command line, for launchers that start Python."""

from dreambooth_ms.cli.main import program

if __name__ == "__main__":
    program()

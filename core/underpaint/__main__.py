"""Lets launchers start the command line as a module: ``torchrun … -m underpaint train …``."""

from underpaint.cli.main import run

if __name__ == "__main__":
    run()

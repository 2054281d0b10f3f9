"""Runs checks of Triton kernels in Triton's interpreter, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def check_in_interpreter(checks: Path) -> None:
    """Run the file `checks` by pytest, in a process whose kernels are interpreted."""
    # Triton chooses its interpreter when it is imported, and once for a process.
    pytest.importorskip("triton", reason="Triton is not there; on Linux, torch comes with it")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(checks)]
    # Options meant for the whole suite, such as its number of workers, are not for this one.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

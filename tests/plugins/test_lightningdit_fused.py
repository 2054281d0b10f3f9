"""The kernels that go backward through LightningDiT's block."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from underpaint_lightningdit.kernels import fused_available


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    # Triton chooses its interpreter when it is imported, and once for a process.
    pytest.importorskip("triton", reason="Triton is not there; on Linux, torch comes with it")
    checks = Path(__file__).with_name("lightningdit_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(checks)]
    # Options meant for the whole suite, such as its number of workers, are not for this one.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_processor_computes_the_plain_formulas() -> None:
    assert not fused_available(torch.zeros(2, 3, 4))

"""The kernels that go backward through LightningDiT's block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.triton_interpreter import check_in_interpreter

from underpaint_lightningdit.kernels import fused_available


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    check_in_interpreter(Path(__file__).with_name("lightningdit_kernels.py"))


def test_a_processor_computes_the_plain_formulas() -> None:
    assert not fused_available(torch.zeros(2, 3, 4))

"""AdamW, average and rounding in one pass: the kernel against torch's AdamW, and in the engine on a GPU."""

from __future__ import annotations

import math
from pathlib import Path

import engine_cases as cases
import pytest
import torch
from tests.triton_interpreter import check_in_interpreter

from underpaint.training import masters
from underpaint.training.ranks import Ranks


def test_the_kernel_in_the_interpreter() -> None:
    check_in_interpreter(Path(__file__).with_name("one_pass_kernel.py"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gpus_engine_does_what_torchs_adamw_does(
    precision: str, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for one_pass in (True, False):
        with monkeypatch.context() as patch, Ranks("cuda") as ranks:
            if not one_pass:
                patch.setattr(masters, "one_pass_available", lambda device: False)
            engine = cases.make_engine(ranks, precision=precision, accumulation=accumulation, device="cuda")
            for micro in range(cases.STEPS * accumulation):
                x, y = (t.to(ranks.device)[: cases.BATCH // accumulation] for t in cases.batch(micro))
                engine.backward(cases.loss_of(engine(x), y))
                spoilt = micro == 7 * accumulation - 1
                if spoilt:
                    engine._masters._gradients[0][0] = math.nan
                assert engine.step().skipped == spoilt
            for name, param in engine.module.named_parameters():
                if param.requires_grad:
                    assert torch.equal(param.detach(), engine._masters.full(name).to(param.dtype))
            found[one_pass] = engine.state("raw"), engine.state("ema"), engine.train_state
            engine.close()
    (raw, ema, steps), (other_raw, other_ema, other_steps) = found[True], found[False]
    assert steps == other_steps == cases.STEPS - 1
    tolerance = {"fp32": 1e-5, "bf16": 1e-3}[precision]
    for name, tensor in raw.items():
        torch.testing.assert_close(tensor, other_raw[name], rtol=0, atol=tolerance)
        torch.testing.assert_close(ema[name], other_ema[name], rtol=0, atol=tolerance)

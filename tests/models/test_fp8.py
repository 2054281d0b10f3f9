"""Matrix products in 8 bits."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from underpaint import ConfigError
from underpaint.models.fp8 import use_fp8


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(64, 96)
        self.narrow = nn.Linear(96, 24)
        self.back = nn.Linear(24, 64)
        self.modulation = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.back(self.narrow(torch.relu(self.wide(x)))) * self.modulation(x.mean(1, keepdim=True))
        return y


def kinds(module: nn.Module) -> dict[str, str]:
    return {name: type(child).__name__ for name, child in module.named_children()}


def test_layers_that_fit_are_converted_and_keep_their_names() -> None:
    network = Network()
    before = network.state_dict()
    assert use_fp8([network], lambda: network(torch.zeros(1, 32, 64)), emulate=True) == 1
    # 24 is no multiple of 16, and the modulation sees one row of a sample.
    assert kinds(network) == {"wide": "Float8Linear", "narrow": "Linear", "back": "Linear", "modulation": "Linear"}
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_products_have_the_error_of_four_significant_bits() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(256, 64, bias=False))
    x = torch.randn(64, 256)
    exact = x.double() @ network[0].weight.detach().double().T
    use_fp8([network], lambda: network(x), emulate=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        error = (network(x).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    # Rounding to four bits: relative errors spread evenly up to 1/16 or 1/32 depending on the number, about 0.026 in
    # the root mean square; two factors have sqrt(2) times that, and errors of products add up like the products do.
    assert 0.026 < float(error) < 0.052


def test_gradients_reach_inputs_and_weights() -> None:
    network = nn.Sequential(nn.Linear(32, 32))
    x = torch.randn(16, 32, requires_grad=True)
    use_fp8([network], lambda: network(x), emulate=True)
    with torch.autocast("cpu", torch.bfloat16):
        network(x).sum().backward()
    assert x.grad is not None
    # The gradient of a sum of outputs is the sum of a row of the transposed weights.
    torch.testing.assert_close(x.grad, network[0].weight.detach().sum(0).expand(16, -1), rtol=0.1, atol=0.1)


def test_the_cpu_has_no_such_products() -> None:
    network = Network()
    with pytest.raises(ConfigError, match="the CPU has no matrix products in 8 bits; use bf16"):
        use_fp8([network], lambda: network(torch.zeros(1, 32, 64)))


def test_nothing_that_fits_is_said() -> None:
    network = nn.Sequential(nn.Linear(10, 10))
    with pytest.raises(ConfigError, match="none of the 1 linear layers fits"):
        use_fp8([network], lambda: network(torch.zeros(1, 32, 10)), emulate=True)


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    network = Network()
    with pytest.raises(ConfigError, match=r"pip install 'underpaint\[fp8\]'"):
        use_fp8([network], lambda: network(torch.zeros(1, 32, 64)), emulate=True)

"""Which layers multiply in 8 bits, in training and in sampling."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from tests.plugins.backbones import TINY, disturbed, inputs, make
from underpaint import ConfigError
from underpaint.models.e4m3 import Fp8Linear
from underpaint.models.fp8 import check_fp8, find_fp8, freeze_fp8, train_fp8
from underpaint_lightningdit.block import Block
from underpaint_lightningdit.positions import grid_rotations


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


def found(network: Network, rows: int = 32, **how: bool) -> set[nn.Linear]:
    return find_fp8([network], lambda: network(torch.zeros(1, rows, 64)), **how)


def test_layers_that_fit_are_found() -> None:
    network = Network()
    # 24 is no multiple of 16, and the modulation sees one row of a sample.
    assert found(network) == {network.wide}
    assert found(network, train=True) == {network.wide}
    assert found(network, 33) == {network.wide}


def test_nothing_that_fits_is_said() -> None:
    network = nn.Sequential(nn.Linear(10, 10))
    with pytest.raises(ConfigError, match="none of the 1 linear layers fits: channels have to be multiples of 16"):
        find_fp8([network], lambda: network(torch.zeros(1, 32, 10)))
    with pytest.raises(ConfigError, match="none of the 4 linear layers fits: channels and tokens have to be"):
        found(Network(), 33, train=True)


def test_the_cpu_has_no_such_products() -> None:
    with pytest.raises(ConfigError, match="the CPU has no matrix products in 8 bits; use bf16"):
        check_fp8(torch.device("cpu"))


# --------------------------------------------------------------------------------------------------- sampling


def test_frozen_layers_take_the_places_of_those_that_fit() -> None:
    network = Network()
    freeze_fp8([network], found(network))
    assert kinds(network) == {"wide": "Fp8Linear", "narrow": "Linear", "back": "Linear", "modulation": "Linear"}


def test_a_layer_in_two_places_stays_one() -> None:
    layer = nn.Linear(16, 16)
    network = nn.Sequential(layer, nn.ReLU(), layer)
    freeze_fp8([network], find_fp8([network], lambda: network(torch.zeros(16, 16))))
    assert type(network[0]).__name__ == "Fp8Linear"
    assert network[0] is network[2]


# REG's layers are SiT's, and it is given more.
@pytest.mark.parametrize("name", sorted(set(TINY) - {"reg/S-2"}))
def test_every_backbone_computes_with_frozen_layers(name: str) -> None:
    text = {"pooled": 32, "tokens": 10} if name.startswith(("mmdit", "flux")) else {}
    backbone = disturbed(make(name, grid=(8, 8), **text, **TINY[name])).eval()
    given = inputs(grid=(8, 8), **text)
    with torch.no_grad():
        expected = backbone(*given).velocity
        layers = find_fp8(backbone.blocks(), lambda: backbone(*given))
        backbone.to(torch.bfloat16)
        freeze_fp8(backbone.blocks(), layers)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = backbone(*given).velocity
    # The two sides of attention at least, in each block.
    assert len(layers) >= 2 * len(backbone.blocks())
    error = torch.linalg.vector_norm(rounded - expected) / torch.linalg.vector_norm(expected)
    # Four significant bits, through two blocks of layers.
    assert 1e-3 < float(error) < 0.2


def test_gated_units_are_rounded_while_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    block = disturbed(Block(48, 4, 4.0, qk_norm=False)).eval()
    given = torch.randn(2, 6, 48), torch.randn(2, 1, 48), grid_rotations(2, 3, 12).float()
    sizes = []
    of_gated = Fp8Linear.of_gated
    monkeypatch.setattr(Fp8Linear, "of_gated", lambda layer, h: sizes.append(h.shape) or of_gated(layer, h))
    with torch.no_grad():
        expected = block(*given)
        freeze_fp8([block], find_fp8([block], lambda: block(*given)))
        rounded = block(*given)
    # Two thirds of four times the width, twice.
    assert sizes == [(2, 6, 256)]
    assert 1e-3 < float(torch.linalg.vector_norm(rounded - expected) / torch.linalg.vector_norm(expected)) < 0.2


# --------------------------------------------------------------------------------------------------- training


def test_layers_that_train_keep_their_names_and_weights() -> None:
    network = Network()
    before = network.state_dict()
    train_fp8([network], found(network), emulate=True)
    assert kinds(network) == {"wide": "Float8Linear", "narrow": "Linear", "back": "Linear", "modulation": "Linear"}
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_products_have_the_error_of_four_significant_bits() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(256, 64, bias=False))
    x = torch.randn(64, 256)
    exact = x.double() @ network[0].weight.detach().double().T
    train_fp8([network], set(network), emulate=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        error = (network(x).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    # See test_e4m3.
    assert 0.026 < float(error) < 0.052


def test_gradients_reach_inputs_and_weights() -> None:
    network = nn.Sequential(nn.Linear(32, 32))
    x = torch.randn(16, 32, requires_grad=True)
    train_fp8([network], set(network), emulate=True)
    with torch.autocast("cpu", torch.bfloat16):
        network(x).sum().backward()
    assert x.grad is not None
    # The gradient of a sum of outputs is the sum of a row of the transposed weights.
    torch.testing.assert_close(x.grad, network[0].weight.detach().sum(0).expand(16, -1), rtol=0.1, atol=0.1)


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    network = Network()
    with pytest.raises(ConfigError, match=r"pip install 'underpaint\[fp8\]'"):
        train_fp8([network], found(network))

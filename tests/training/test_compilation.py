"""What of an encoder and of a decoder is compiled, and how often."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import underpaint
from underpaint import Reconstruction, StepTensors
from underpaint.training.compilation import compile_modules, units_of

DECODERS = {
    "ldm/decoder": {"base": 16},
    "vfmvae/decoder": {"width": 64, "base": 16, "heads": 2},
    "rae/vit-b": {"width": 32, "depth": 2, "heads": 2, "hidden": 64},
}


@pytest.mark.parametrize("name", DECODERS)
def test_units_are_apart_from_the_last_layer_and_from_each_other(name: str) -> None:
    decoder = underpaint.create("decoder", name, latent_channels=4, stride=16, **DECODERS[name])
    layer = decoder.last_layer()
    assert layer is not None
    units = units_of(decoder, layer)
    held = [{id(p) for p in unit.parameters()} for unit in units]
    assert all(id(layer) not in own for own in held)
    assert all(not (a & b) for a, b in combinations(held, 2))
    compiled = sum(p.numel() for unit in units for p in unit.parameters())
    assert compiled > 0.9 * sum(p.numel() for p in decoder.parameters() if p is not layer)


def test_units_are_called_as_modules_so_that_their_compilation_has_an_effect() -> None:
    decoder = underpaint.create("decoder", "ldm/decoder", latent_channels=4, stride=4, base=16)
    called: set[int] = set()
    for unit in units_of(decoder, decoder.last_layer()):
        unit.register_forward_hook(lambda module, _, __: called.add(id(module)))
    decoder(torch.zeros(1, 4, 4, 4))
    assert called == {id(unit) for unit in units_of(decoder, decoder.last_layer())}


def test_a_part_without_blocks_that_are_alike_is_one_unit() -> None:
    part = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert units_of(part) == [part]
    decoder = underpaint.create("decoder", "ldm/decoder", latent_channels=4, stride=4, base=16)
    assert units_of(decoder) == [decoder]


def test_no_unit_holds_what_is_to_stay_apart() -> None:
    part = nn.Conv2d(2, 2, 1)
    assert units_of(part) == [part]
    assert units_of(part, part.weight) == []
    rows = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.GELU()) for _ in range(3)))
    assert units_of(rows) == list(rows)
    assert units_of(rows, rows.get_parameter("2.0.weight")) == list(rows)[:2]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
def test_one_graph_serves_all_blocks_that_are_alike() -> None:
    decoder = underpaint.create(
        "decoder", "rae/vit-b", latent_channels=4, stride=16, width=32, depth=5, heads=2, hidden=64
    )
    units = units_of(decoder)
    assert len(units) == 5
    latents = torch.randn(1, 4, 2, 2)
    expected = decoder(latents).image
    made = CompileCounter()
    for unit in units:
        unit.compile(backend=made, dynamic=False)
    torch.testing.assert_close(decoder(latents).image, expected)
    assert made.frame_count == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
@pytest.mark.parametrize(("name", "options"), [("lpips", {"weights": "random"}), ("ssim", {})])
def test_one_graph_serves_a_loss_at_every_step(name: str, options: dict[str, str]) -> None:
    loss = underpaint.create("loss", name, **options).requires_grad_(False)
    made = CompileCounter()
    for unit in loss.units():
        unit.compile(backend=made, dynamic=False)
    images = torch.rand(2, 3, 32, 32)
    for index in range(3):
        decoded = Reconstruction(torch.rand(2, 3, 32, 32).requires_grad_() * 1.0)
        loss(StepTensors(step=index, images=images, reconstruction=decoded))
    assert made.frame_count == 1


@pytest.mark.parametrize(
    ("blocks", "alike"),
    [
        ([nn.Sequential(nn.Linear(2, 2)) for _ in range(3)], True),
        ([nn.Sequential(nn.Linear(2, 2)) for _ in range(2)], False),
        ([nn.Sequential(nn.Linear(2, n)) for n in (2, 2, 3)], False),
        ([nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)), nn.ModuleList([nn.Linear(2, 2)])], False),
        ([nn.Linear(2, 2) for _ in range(3)], False),
    ],
    ids=["alike", "two", "of other shapes", "of other classes", "one operation each"],
)
def test_which_blocks_are_units_of_their_own(blocks: list[nn.Module], alike: bool) -> None:
    part = nn.Sequential(nn.Linear(2, 2), nn.Sequential(*blocks))
    assert units_of(part) == (blocks if alike else [part])


class Products(TorchDispatchMode):
    """Notes which gradients convolutions are asked for: of input, weight, bias."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(args[-1])
        return func(*args, **(kwargs or {}))


def gradients(decoder: nn.Module, latents: torch.Tensor, mode: Products) -> tuple[list[torch.Tensor], list[list[bool]]]:
    image = decoder(latents).image
    with mode:
        (at_latents,) = torch.autograd.grad(image.square().mean(), latents)
    return [at_latents, image.detach()], mode.masks


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
def test_a_gradient_that_passes_through_makes_none_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_plainly = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_plainly(self, backend="aot_eager", **how))
    decoder = underpaint.create("decoder", "ldm/decoder", latent_channels=4, stride=4, base=16).double()
    names = list(decoder.state_dict())
    count = sum(isinstance(layer, nn.Conv2d) for layer in decoder.modules())
    latents = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    expected, _ = gradients(decoder, latents, Products())
    compile_modules(units_of(decoder), differentiated_again=True, passed=[decoder])
    found, masks = gradients(decoder, latents, Products())
    torch.testing.assert_close(found, expected)
    assert masks == count * [[True, False, False]]
    assert list(decoder.state_dict()) == names
    # A graph that holds them makes all.
    inside = underpaint.create("decoder", "ldm/decoder", latent_channels=4, stride=4, base=16).double()
    compile_modules(units_of(inside), differentiated_again=True)
    assert gradients(inside, latents, Products())[1] == count * [[True, True, True]]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
def test_blocks_that_are_alike_share_their_graphs_without_the_products_too() -> None:
    options = {"latent_channels": 4, "stride": 16, "width": 32, "heads": 2, "hidden": 64}
    counts = []
    for depth in (3, 6):
        torch._dynamo.reset()
        decoder = underpaint.create("decoder", "rae/vit-b", depth=depth, **options)
        compile_modules([], differentiated_again=False, passed=[decoder])
        made = CompileCounter()
        for unit in units_of(decoder):
            unit.compile(backend=made, dynamic=False)
        decoder(torch.randn(1, 4, 2, 2))
        counts.append(made.frame_count)
    assert counts[0] == counts[1] > 1

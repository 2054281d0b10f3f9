"""What of a decoder is compiled beside an adaptive weight."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

import underpaint
from underpaint.training.compilation import units_around

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
    units = units_around(decoder, layer)
    held = [{id(p) for p in unit.parameters()} for unit in units]
    assert all(id(layer) not in own for own in held)
    assert all(not (a & b) for a, b in combinations(held, 2))
    compiled = sum(p.numel() for unit in units for p in unit.parameters())
    assert compiled > 0.9 * sum(p.numel() for p in decoder.parameters() if p is not layer)


def test_units_are_called_as_modules_so_that_their_compilation_has_an_effect() -> None:
    decoder = underpaint.create("decoder", "ldm/decoder", latent_channels=4, stride=4, base=16)
    called: set[int] = set()
    for unit in units_around(decoder, decoder.last_layer()):
        unit.register_forward_hook(lambda module, _, __: called.add(id(module)))
    decoder(torch.zeros(1, 4, 4, 4))
    assert called == {id(unit) for unit in units_around(decoder, decoder.last_layer())}


def test_a_part_without_a_layer_to_spare_is_one_unit() -> None:
    part = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert units_around(part, None) == [part]

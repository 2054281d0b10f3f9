"""REG: the companion vector as a token, and refusals. Its outputs: test_sit_import. Its size: test_backbones."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tests.plugins import backbones
from tests.plugins.backbones import disturbed

from underpaint import DataError, Prediction

make = partial(backbones.make, "reg/S-2", grid=(4, 6), **backbones.TINY["reg/S-2"])


def inputs() -> Any:
    return backbones.inputs(grid=(4, 6)), torch.randn(2, 24, generator=torch.Generator().manual_seed(3))


def test_both_velocities_and_the_token_among_the_hidden() -> None:
    model = disturbed(make())
    given, companion = inputs()
    prediction = model(*given, layers=[0, 1], companion=companion)
    assert isinstance(prediction, Prediction)
    assert prediction.velocity.shape == (2, 4, 4, 6)
    assert prediction.companion.shape == (2, 24)
    assert [tuple(h.shape) for h in prediction.hidden.values()] == [(2, 7, 32)] * 2
    assert (model.companion, model.patch, model.width, len(model.blocks())) == (24, 2, 32, 2)


def test_each_output_depends_on_both_inputs() -> None:
    model = disturbed(make())
    (x, t, condition), companion = inputs()
    first = model(x, t, condition, companion=companion)
    for other in (
        model(x + 1, t, condition, companion=companion),
        model(x, t, condition, companion=companion.flip(1)),
        model(x, 1 - t, condition, companion=companion),
    ):
        assert not torch.allclose(other.velocity, first.velocity)
        assert not torch.allclose(other.companion, first.companion)


def test_the_scale_of_the_token_is_normalised_away() -> None:
    model = disturbed(make())
    with torch.no_grad():
        model.companion_embed.bias.zero_()
    given, companion = inputs()
    first, second = (model(*given, companion=c).velocity for c in (companion, 100 * companion))
    torch.testing.assert_close(first, second)
    assert model.companion_norm.eps == 1e-6


def test_every_parameter_learns() -> None:
    model = disturbed(make(qk_norm=True))
    given, companion = inputs()
    prediction = model(*given, companion=companion)
    (prediction.velocity.square().sum() + prediction.companion.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_without_a_vector_it_is_a_sit() -> None:
    model = disturbed(make())
    sit = backbones.make("sit/S-2", grid=(4, 6), **backbones.TINY["sit/S-2"])
    sit.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("companion")})
    given, _ = inputs()
    prediction = model(*given, layers=[1])
    assert prediction.companion is None
    assert prediction.hidden[1].shape == (2, 6, 32)
    assert torch.equal(prediction.velocity, sit(*given).velocity)


@pytest.mark.parametrize("shape", [(2, 23), (1, 24), (2, 24, 1)])
def test_other_vectors_are_refused(shape: tuple[int, ...]) -> None:
    given, _ = inputs()
    with pytest.raises(DataError, match=r"companion vectors of shape .*; 2 latents go with \[2, 24\]"):
        make()(*given, companion=torch.zeros(shape))

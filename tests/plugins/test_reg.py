"""REG: the companion vector as a token, published counts, refusals. Its outputs are compared in test_sit_import."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import underpaint
from underpaint import Condition, DataError, Prediction

TINY: dict[str, Any] = {"depth": 2, "width": 32, "heads": 4, "companion": 24}
CONTEXT: dict[str, Any] = {"latent_channels": 4, "grid": (4, 6), "pooled_dim": 32, "token_dim": 0}


def make(name: str = "reg/S-2", **options: Any) -> Any:
    torch.manual_seed(0)
    return underpaint.create("backbone", name, **{**CONTEXT, **TINY, **options})


def disturbed(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return model


def inputs(b: int = 2) -> Any:
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(b, 4, 4, 6, generator=generator), torch.rand(b, generator=generator)
    condition = Condition(pooled=torch.randn(b, 32, generator=generator))
    return (x, t, condition), torch.randn(b, 24, generator=generator)


def large(name: str, width: int, grid: int) -> Any:
    with torch.device("meta"):
        return underpaint.create("backbone", name, latent_channels=4, grid=(grid, grid), pooled_dim=width, token_dim=0)


def test_published_parameters() -> None:
    model = large("reg/B-2", 768, 32)
    own = sum(p.numel() for p in model.parameters())
    projector = (768 * 2048 + 2048) + (2048 * 2048 + 2048) + (2048 * 768 + 768)
    # The published file also holds the label table, the positions of 257 tokens, and REPA's projector.
    assert own + 1001 * 768 + 257 * 768 + projector == 139_028_496


def test_xl_1_of_vfm_vae() -> None:
    # "685 M with REG parts" on 16×16 latents of 32 channels; QK-norm adds 28·4·72.
    with torch.device("meta"):
        context = {"latent_channels": 32, "grid": (16, 16), "pooled_dim": 1152, "token_dim": 0}
        model = underpaint.create("backbone", "reg/XL-1", **context, qk_norm=True, qk_norm_type="layer")
    own = sum(p.numel() for p in model.parameters())
    projector = (1152 * 2048 + 2048) + (2048 * 2048 + 2048) + (2048 * 768 + 768)
    assert round((own + 1001 * 1152 + 257 * 1152 + projector) / 1e6) == 685


def test_published_flops() -> None:
    model = large("reg/B-2", 768, 32)
    x, t = torch.empty(1, 4, 32, 32, device="meta"), torch.empty(1, device="meta")
    pooled, token = torch.empty(1, 768, device="meta"), torch.empty(1, 768, device="meta")
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(x, t, Condition(pooled=pooled), companion=token)
    projector = 2 * 257 * (768 * 2048 + 2048 * 2048 + 2048 * 768)
    assert round((counter.get_total_flops() + projector) / 1e9, 2) == 49.97


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


def test_starts_at_zero() -> None:
    given, companion = inputs()
    prediction = make()(*given, companion=companion)
    assert not prediction.velocity.any()
    assert not prediction.companion.any()


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
    sit = underpaint.create("backbone", "sit/S-2", **CONTEXT, depth=2, width=32, heads=4)
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

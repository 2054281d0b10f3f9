"""The DiT^DH backbone: published counts, the time embedding, the head, conditions, grids.

Its arithmetic as a whole is held against RAE's own code in test_lightningdit_import.py.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import underpaint
from underpaint import Backbone, Condition, ConfigError, DataError
from underpaint_lightningdit.ditdh import FourierTimes

WIDTHS = {"S": 384, "B": 768, "L": 1024, "XL": 1152}
TINY: dict[str, Any] = {"depth": 2, "width": 32, "heads": 4, "head_width": 48, "head_heads": 2}


def make(name: str = "ditdh/S", *, d: int = 6, grid: tuple[int, int] = (4, 4), **options: Any) -> Any:
    torch.manual_seed(0)
    pooled = options.pop("pooled", 32)
    context = {"latent_channels": d, "grid": grid, "pooled_dim": pooled, "token_dim": 0}
    return underpaint.create("backbone", name, **context, **options)


def disturbed(model: Backbone) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return model


def inputs(b: int = 2, d: int = 6, grid: tuple[int, int] = (4, 4), pooled: int = 32) -> Any:
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(b, d, *grid, generator=generator), torch.rand(b, generator=generator)
    return x, t, Condition(pooled=torch.randn(b, pooled, generator=generator)) if pooled else Condition()


# ---------------------------------------------------------------------------------------- published numbers


def count(size: str) -> int:
    with torch.device("meta"):
        model = make(f"ditdh/{size}", d=768, grid=(16, 16), pooled=WIDTHS[size])
    return sum(p.numel() for p in model.parameters())


def test_parameters_of_the_published_models() -> None:
    # Counted on RAE's code for latents of 768×16×16 and 1000 classes: S has 196,455,764 parameters. They include the
    # label table, which is our conditioner's, 256×384 fixed positions and the 256 fixed frequencies.
    assert count("S") + 1001 * 384 + 256 * 384 + 256 == 196_455_764
    # The paper's table of sizes, in millions.
    counts = {size: (count(size) + 1001 * width) // 10**6 for size, width in WIDTHS.items()}
    assert counts == {"S": 196, "B": 294, "L": 621, "XL": 838}


def test_flops_of_the_published_model() -> None:
    # Counted with torch's FlopCounterMode on RAE's code for DiT^DH-S on 768×16×16: 96.94 GFLOP.
    with torch.device("meta"):
        model = make("ditdh/S", d=768, grid=(16, 16), pooled=384)
        x, t, pooled = torch.empty(1, 768, 16, 16), torch.empty(1), torch.empty(1, 384)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(x, t, Condition(pooled=pooled))
    assert round(counter.get_total_flops() / 1e9, 2) == 96.94


# ------------------------------------------------------------------------------------------------------ time


def test_times_are_fourier_features_of_drawn_frequencies() -> None:
    torch.manual_seed(0)
    times = FourierTimes(256)
    w = times.frequencies.double().numpy()
    # 256 draws of a standard normal variable: mean within 5/16, deviation within 5/sqrt(512).
    assert abs(w.mean()) < 5 / 16
    assert abs(w.std() - 1) < 5 / 512**0.5
    t = np.array([0.0, 0.3, 1.0])
    angles = 2 * np.pi * np.outer(t, w)
    expected = np.concatenate((np.cos(angles), np.sin(angles)), axis=1)
    np.testing.assert_allclose(times(torch.from_numpy(t).float()).numpy(), expected, atol=2e-6)


def test_frequencies_are_saved_not_trained_and_never_rounded() -> None:
    model = make(**TINY)
    exact = model.times.frequencies.clone()
    assert "times.frequencies" in model.state_dict()
    assert "times.frequencies" not in dict(model.named_parameters())
    half = copy.deepcopy(model).bfloat16()
    assert half.embed.weight.dtype == torch.bfloat16
    assert torch.equal(half.times.frequencies, exact)
    other = make(**TINY)
    other.times.frequencies.zero_()
    other.load_state_dict(half.state_dict())
    assert torch.equal(other.times.frequencies, exact)
    with torch.device("meta"):
        empty = make(**TINY)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty.times.frequencies, exact)


# ---------------------------------------------------------------------------------------------- as a backbone


def test_starts_as_the_identity_and_predicts_zero() -> None:
    model = make(**TINY)
    prediction = model(*inputs(), layers=range(2))
    assert float(prediction.velocity.detach().abs().max()) == 0.0
    assert torch.equal(prediction.hidden[0], prediction.hidden[1])


@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (6, 3)])
def test_other_grids_and_hidden_states(grid: tuple[int, int]) -> None:
    model = disturbed(make(**TINY))
    prediction = model(*inputs(grid=grid), layers=[0, 1])
    assert prediction.velocity.shape == (2, 6, *grid)
    assert [h.shape for h in prediction.hidden.values()] == [(2, grid[0] * grid[1], 32)] * 2
    assert model(*inputs(grid=grid)).hidden == {}


def test_states_of_the_head_can_be_had_where_it_is_as_wide() -> None:
    with pytest.raises(DataError, match="after 2 blocks; layers are 0 to 1"):
        make(**TINY)(*inputs(), layers=[2])
    model = disturbed(make(**{**TINY, "head_width": 32}))
    hidden = model(*inputs(), layers=range(4)).hidden
    assert [h.shape for h in hidden.values()] == [(2, 16, 32)] * 4
    assert len(model.blocks()) == 4
    assert not any(name.startswith("widen") for name, _ in model.named_parameters())


def test_the_head_is_conditioned_token_by_token() -> None:
    """What the transformer says of one token reaches the head's modulation of that token only."""
    model = disturbed(make(**{**TINY, "head_depth": 1}))
    x, t, condition = inputs()
    seen = []
    hook = model.head_layers[0].modulation.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    model(x, t, condition)
    with torch.no_grad():
        pushed = model.layers[-1].register_forward_hook(
            lambda _, __, out: out.index_add(1, torch.tensor([5]), torch.ones(2, 1, 32))
        )
        model(x, t, condition)
    hook.remove()
    pushed.remove()
    changed = (seen[0] - seen[1]).abs().amax(dim=(0, 2)) > 0
    assert changed.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("pooled", [0, 12, 32])
def test_condition_of_any_width(pooled: int) -> None:
    model = disturbed(make(**TINY, pooled=pooled))
    x, t, condition = inputs(pooled=pooled)
    first = model(x, t, condition).velocity
    assert not torch.equal(first, model(x, 1 - t, condition).velocity)
    if pooled:
        other = Condition(pooled=condition.pooled.flip(0))
        assert not torch.equal(first, model(x, t, other).velocity)


def test_recomputation_changes_memory_only() -> None:
    plain = disturbed(make(**TINY)).train()
    again = make(**TINY, recompute=True).train()
    again.load_state_dict(plain.state_dict())
    for model in (plain, again):
        model(*inputs()).velocity.square().sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_trains_after_inference_mode() -> None:
    model = make(**TINY)
    with torch.inference_mode():
        model(*inputs())
    model(*inputs()).velocity.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 40}, "DiT\\^DH of width 40 .* multiple of 16"),
        ({"head_width": 44}, "head of width 44 .* multiple of 8"),
        ({"head_depth": 0}, "head_depth"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**{**TINY, **arguments})


def test_condition_of_tokens_only_is_refused() -> None:
    context = {"latent_channels": 6, "grid": (4, 4), "pooled_dim": 0, "token_dim": 8}
    with pytest.raises(ConfigError, match="tokens only"):
        underpaint.create("backbone", "ditdh/S", **context, **TINY)


def test_learns_a_constant_velocity() -> None:
    """A sanity check of the gradient path as a whole: the loss of one batch falls by half."""
    model = make(**TINY)
    x, t, condition = inputs(b=4)
    target = torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(model(x, t, condition).velocity, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

"""The DiT^DH backbone: the time embedding, the head. What all backbones do: test_backbones.

Its arithmetic as a whole is held against RAE's own code in test_lightningdit_import.py.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tests.plugins import backbones
from tests.plugins.backbones import disturbed, inputs

from underpaint import ConfigError, DataError
from underpaint_lightningdit.ditdh import FourierTimes

TINY = backbones.TINY["ditdh/S"]
make = partial(backbones.make, "ditdh/S")


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

"""What the two importers share: which keys a file must have, and into which parameters they go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

import underpaint
from underpaint import Backbone, DataError, Denoiser, load_weights
from underpaint_lightningdit.positions import grid_rotations

__all__ = ["NAMES", "TABLE", "Source", "block_names"]

NAMES: Mapping[str, str] = {
    "time.0.weight": "t_embedder.mlp.0.weight",
    "time.0.bias": "t_embedder.mlp.0.bias",
    "time.2.weight": "t_embedder.mlp.2.weight",
    "time.2.bias": "t_embedder.mlp.2.bias",
    "norm.weight": "final_layer.norm_final.weight",
    "modulation.weight": "final_layer.adaLN_modulation.1.weight",
    "modulation.bias": "final_layer.adaLN_modulation.1.bias",
    "head.weight": "final_layer.linear.weight",
    "head.bias": "final_layer.linear.bias",
}
"""Keys outside the blocks that both formats have, by our names."""
TABLE = "y_embedder.embedding_table.weight"
"""Key of the label table."""

# Key fragments that tell other layouts, most telling first.
_SIGNS = (
    ("s_embedder.", "a DiT^DH of RAE; use the format 'rae-dit'"),
    ("joint_blocks.", "an MMDiT of Stable Diffusion 3"),
    ("double_blocks.", "a FLUX transformer"),
    ("feat_rope.", "a LightningDiT; use the format 'lightningdit'"),
    ("projectors.", "a SiT of REPA or REG"),
    (".mlp.fc1.", "a DiT, a SiT or a vision transformer"),
    ("decoder.", "an autoencoder"),
)


class Source:
    """The tensors of one file, and the sentence that refuses it.

    Args:
        format: Name of the importer.
        location: File or fsspec URL. Of a training file the averaged weights are taken.

    Raises:
        DataError: The file cannot be read.
    """

    def __init__(self, format: str, location: str) -> None:
        self._format = format
        self._location = location
        state = load_weights(location, nested=("ema", "model", "state_dict"))
        if state and all(key.startswith("module.") for key in state):
            state = {key.removeprefix("module."): value for key, value in state.items()}
        self.tensors = state

    def refuse(self, why: str) -> DataError:
        """Return the error that says why the file is not of the format, and what it looks like instead."""
        looks = next((what for sign, what in _SIGNS if any(sign in key for key in self.tensors)), None)
        known = looks is not None and f"'{self._format}'" not in looks
        hint = f"it looks like {looks}" if known else "check the file or the format"
        return DataError(f"'{self._location}' is no checkpoint of the format '{self._format}': {why}; {hint}.")

    def require(self, *keys: str, dims: Mapping[str, int] | None = None) -> None:
        """Refuse the file when one of the keys is missing or has not that many dimensions.

        Raises:
            DataError: It does not fit.
        """
        missing = [key for key in keys if key not in self.tensors]
        if missing:
            raise self.refuse(f"it lacks {_some(missing)}")
        for key, count in (dims or {}).items():
            if self.tensors[key].ndim != count:
                raise self.refuse(f"'{key}' has the shape {tuple(self.tensors[key].shape)}, not {count} dimensions")

    def depth(self) -> int:
        """Return the number of blocks, from the highest index of ``blocks.``."""
        indices = [key.split(".")[1] for key in self.tensors if key.startswith("blocks.")]
        last: int = max((int(index) for index in indices if index.isdecimal()), default=-1)
        return last + 1

    def side(self, cells: int) -> int:
        """Return the side of a square grid of so many cells.

        Raises:
            DataError: The grid is not square, as it always is in these formats.
        """
        side = math.isqrt(cells)
        if side * side != cells:
            raise self.refuse(f"its {cells} positions are no square grid")
        return side

    def check_keys(self, wanted: Sequence[str]) -> None:
        """Refuse the file unless it has exactly these keys.

        Raises:
            DataError: A key is missing, or there is one more.
        """
        missing = [key for key in wanted if key not in self.tensors]
        more = sorted(self.tensors.keys() - set(wanted))
        if missing or more:
            parts = [f"it lacks {_some(missing)}"] * bool(missing) + [f"it has {_some(more)} besides"] * bool(more)
            raise self.refuse(" and ".join(parts))

    def check_fixed(self, key: str, expected: Tensor) -> None:
        """Refuse the file unless it holds the fixed table that the model computes by itself.

        Raises:
            DataError: The tables differ.
        """
        given = self.tensors[key].double()
        # bf16 and fp16 files hold rounded tables; another layout of positions differs by more than rounding.
        if given.shape != expected.shape or float((given - expected).abs().max()) > 1e-2:
            raise self.refuse(f"'{key}' holds other positions than those of the paper")

    def heads(self, rope: str, side: int, width: int) -> int:
        """Return the number of heads of blocks of that width, from the fixed rotary positions, which are checked.

        Raises:
            DataError: They do not divide the width, or are others than those of the paper.
        """
        channels = self.tensors[f"{rope}.freqs_cos"].shape[1]
        if channels % 4 or width % channels:
            raise self.refuse(f"rotary positions of {channels} channels do not divide the width of {width}")
        cosines, sines = grid_rotations(side, side, channels)[:, :, 0]
        self.check_fixed(f"{rope}.freqs_cos", cosines)
        self.check_fixed(f"{rope}.freqs_sin", sines[:, 1::2].repeat_interleave(2, dim=1))
        return int(width // channels)

    def with_labels(self, backbone: Backbone, guided_channels: int | None = None) -> Denoiser:
        """Return the backbone with the class table of the file, in evaluation mode.

        Args:
            backbone: Filled already.
            guided_channels: Channels that its authors guide; None for all.
        """
        classes = len(self.tensors[TABLE]) - 1
        conditioner = underpaint.create("conditioner", "labels", width=backbone.width, classes=classes)
        self.fill(conditioner, {"table.weight": TABLE}, {})
        return Denoiser(backbone, conditioner, guided_channels=guided_channels).eval()

    def fill(
        self, module: nn.Module, names: Mapping[str, str], changes: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> None:
        """Copy the tensors into a module.

        Args:
            module: Module whose whole state is filled.
            names: Keys of the file by names in the module's state.
            changes: Conversions by names in the module's state; they get float64.

        Raises:
            DataError: A tensor has another shape than the module's.
        """
        state = module.state_dict()
        assert set(names) == set(state), set(names) ^ set(state)
        for name, key in names.items():
            value = self.tensors[key].double()
            value = changes.get(name, _same)(value)
            if value.shape != state[name].shape:
                raise self.refuse(
                    f"'{key}' has the shape {tuple(self.tensors[key].shape)}, which does not fit the other tensors"
                )
            with torch.no_grad():
                state[name].copy_(value)


def block_names(ours: str, theirs: str, *, qk_norm: bool) -> dict[str, str]:
    """Return the keys of a LightningDiT block by our names, each with its prefix."""
    pairs = [
        ("norm1.weight", "norm1.weight"),
        ("norm2.weight", "norm2.weight"),
        ("out.linear.weight", "attn.proj.weight"),
        ("out.bias", "attn.proj.bias"),
        ("down.linear.weight", "mlp.w3.weight"),
        ("down.bias", "mlp.w3.bias"),
        *_linear("qkv", "attn.qkv"),
        *_linear("up", "mlp.w12"),
        *_linear("modulation", "adaLN_modulation.1"),
    ]
    if qk_norm:
        pairs += [("norm_q.weight", "attn.q_norm.weight"), ("norm_k.weight", "attn.k_norm.weight")]
    return {ours + name: theirs + key for name, key in pairs}


def _linear(ours: str, theirs: str) -> Iterable[tuple[str, str]]:
    return ((f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias"))


def _some(keys: list[str]) -> str:
    named = ", ".join(f"'{key}'" for key in keys[:3])
    return named if len(keys) <= 3 else f"{named} and {len(keys) - 3} more"


def _same(value: Tensor) -> Tensor:
    return value

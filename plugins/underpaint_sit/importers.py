"""Published weights of DiT, SiT, REPA and REG, whose files share one layout."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

import underpaint
from underpaint import ConfigError, DataError, Denoiser, Importer, load_weights
from underpaint_sit import SIZES
from underpaint_sit.config import ImportConfig
from underpaint_sit.positions import MAX_PERIOD, grid_positions

__all__ = ["DiTImporter", "REGImporter", "RepaImporter", "SiTImporter"]

_ONCE = {
    "t_embedder.mlp.0": "time.0",
    "t_embedder.mlp.2": "time.2",
    "final_layer.adaLN_modulation.1": "modulation",
}
_BLOCK = {
    "attn.qkv": "qkv",
    "attn.q_norm": "norm_q",
    "attn.k_norm": "norm_k",
    "attn.proj": "out",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "adaLN_modulation.1": "modulation",
}
_COMPANION = {
    "cls_projectors2": "companion_embed",
    "wg_norm": "companion_norm",
    "final_layer.linear_cls": "companion_head",
}
_TABLE = "y_embedder.embedding_table.weight"
_FIXED = "pos_embed"
_SPECIAL = {
    "x_embedder.proj.weight",
    "x_embedder.proj.bias",
    "final_layer.linear.weight",
    "final_layer.linear.bias",
    _TABLE,
    _FIXED,
}


@attrs.frozen(kw_only=True)
class _Shape:
    """Sizes that the tensors of a file tell."""

    depth: int
    width: int
    patch: int
    channels: int
    side: int
    classes: int
    mlp_ratio: float
    qk_norm: bool


class SiTImporter(Importer):
    """SiT's files to ``sit/*`` and ``labels``.

    SiT has data at t = 1 and predicts data − noise, so v(x, t) = −v_SiT(x, 1 − t). The sign goes into the head. The
    mirrored time goes into the first layer of the time MLP, exactly: cos((1 − t)f) and sin((1 − t)f) are a rotation
    of cos(tf) and sin(tf).

    Left out: the fixed positions, which are computed (and must be those of the file), and the channels of the variance
    that SiT inherits from DiT and never reads.

    SiT's and DiT's files have the same keys and shapes: the format that the user names decides. The latents are those
    of Stable Diffusion's VAE times 0.18215, and SiT's published numbers guide channels 0 to 2 only.

    Args:
        config: Options.
    """

    peer: ClassVar[str] = "SiT"
    family: ClassVar[str] = "sit"
    # Maps of d channels in the file's head, as far as the format fixes them.
    maps: ClassVar[tuple[int, ...]] = (1, 2)
    once: ClassVar[Mapping[str, str]] = _ONCE
    left_out: ClassVar[tuple[str, ...]] = ()
    mirrored: ClassVar[bool] = True
    guided_channels: ClassVar[int | None] = 3
    prefix: ClassVar[str] = ""

    def __init__(self, config: ImportConfig) -> None:
        self._heads = config.heads

    def read(self, source: str) -> Denoiser:
        """Return the backbone with its class table, in evaluation mode on the CPU, in float32.

        Args:
            source: The file. EMA weights are taken where it holds several.

        Raises:
            DataError: The file is not of this format; the message names the first keys that do not fit.
            ConfigError: The number of heads is neither published for this width nor given.
        """
        found = load_weights(source, nested=("ema", "model", "state_dict"))
        state = _joined({key.removeprefix("module."): value for key, value in found.items()})
        self._check_keys(source, state)
        shape = self._shape(source, state)
        self._check_positions(source, state[_FIXED], shape)
        backbone = underpaint.create(
            "backbone",
            self._name(shape),
            latent_channels=shape.channels,
            grid=(shape.side * shape.patch,) * 2,
            pooled_dim=shape.width,
            token_dim=0,
            **self._options(shape, state),
        )
        conditioner = underpaint.create("conditioner", "labels", width=shape.width, classes=shape.classes)
        self._fill(source, backbone, self._mapped(state, shape))
        if self.mirrored:
            _mirror_time(backbone.get_parameter("time.0.weight"))
        self._fill(source, conditioner, {"table.weight": state[_TABLE]})
        return Denoiser(backbone, conditioner, guided_channels=self.guided_channels).eval()

    # -- what the file is

    def _check_keys(self, source: str, state: Mapping[str, Tensor]) -> None:
        depth = _depth(state)
        wanted = {f"{name}.{part}" for name in self.once for part in ("weight", "bias")} | _SPECIAL
        for index in range(max(depth, 1)):
            names = [name for name in _BLOCK if not name.endswith("_norm")]
            wanted |= {f"blocks.{index}.{name}.{part}" for name in names for part in ("weight", "bias")}
            if f"blocks.{index}.attn.q_norm.weight" in state:
                norms = ("attn.q_norm", "attn.k_norm")
                wanted |= {f"blocks.{index}.{name}.{part}" for name in norms for part in ("weight", "bias")}
        missing = sorted(wanted - set(state))
        extra = sorted(key for key in set(state) - wanted if not key.startswith(self.left_out))
        if missing or extra:
            parts = [f"lacks {_few(missing)}"] * bool(missing) + [f"has {_few(extra)} beside"] * bool(extra)
            raise DataError(f"'{source}' is no file of {self.peer}: it {' and '.join(parts)}. {_guess(state)}")

    def _shape(self, source: str, state: Mapping[str, Tensor]) -> _Shape:
        embed = state["x_embedder.proj.weight"]
        ranks = {"x_embedder.proj.weight": 4, _FIXED: 3, _TABLE: 2, "final_layer.linear.weight": 2}
        for key, rank in ranks.items():
            if state[key].ndim != rank:
                raise DataError(
                    f"'{source}' is no file of {self.peer}: '{key}' has {state[key].ndim} dimensions, not {rank}."
                )
        width, channels, patch = embed.shape[:3]
        cells = patch * patch * channels
        rows = [len(state[f"final_layer.linear.{part}"]) for part in ("weight", "bias")]
        fitting = [maps for maps in self.maps if rows == [maps * cells] * 2]
        if not fitting:
            raise DataError(
                f"'{source}' is no file of {self.peer}: its head writes {' and '.join(map(str, rows))} numbers for a "
                f"patch, and {self.peer} writes {' or '.join(str(m * cells) for m in self.maps)}. {_guess(state)}"
            )
        return _Shape(
            depth=_depth(state),
            width=width,
            patch=patch,
            channels=channels,
            side=math.isqrt(state[_FIXED].shape[1]),
            classes=len(state[_TABLE]) - 1,
            mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / width,
            qk_norm="blocks.0.attn.q_norm.weight" in state,
        )

    def _check_positions(self, source: str, table: Tensor, shape: _Shape) -> None:
        expected = self._positions(shape)
        if table.shape != (1, *expected.shape) or not torch.allclose(table[0].float(), expected, atol=2e-3):
            raise DataError(
                f"'{source}' has other positions than the fixed sines and cosines of {self.peer}, "
                f"for a square grid of {shape.side}×{shape.side} tokens; such a model has no counterpart here."
            )

    def _positions(self, shape: _Shape) -> Tensor:
        return grid_positions(shape.side, shape.side, shape.width)

    # -- what is made of it

    def _name(self, shape: _Shape) -> str:
        size = next((s for s, (depth, width, _) in SIZES.items() if (depth, width) == (shape.depth, shape.width)), "S")
        name = f"{self.family}/{size}-{shape.patch}"
        known = any(item.name == name for item in underpaint.registry().registrations("backbone"))
        return name if known else f"{self.family}/{size}-2"

    def _options(self, shape: _Shape, state: Mapping[str, Tensor]) -> dict[str, Any]:
        published = {width: heads for _, width, heads in SIZES.values()}
        heads = self._heads or published.get(shape.width)
        if heads is None:
            raise ConfigError(
                f"The file holds a {self.peer} of width {shape.width}, which is none of the published "
                f"{', '.join(map(str, published))}, and does not tell its attention heads; give the option 'heads'."
            )
        options: dict[str, Any] = {"depth": shape.depth, "width": shape.width, "heads": heads, "patch": shape.patch}
        norm = {"qk_norm": True, "qk_norm_type": "layer"} if shape.qk_norm else {}
        return {**options, "mlp_ratio": shape.mlp_ratio, **norm}

    def _mapped(self, state: Mapping[str, Tensor], shape: _Shape) -> dict[str, Tensor]:
        result = {
            "embed.weight": state["x_embedder.proj.weight"].flatten(1),
            "embed.bias": state["x_embedder.proj.bias"],
            "head.weight": self._head(state["final_layer.linear.weight"], shape),
            "head.bias": self._head(state["final_layer.linear.bias"], shape),
        }
        names = dict(self.once)
        for index in range(shape.depth):
            names |= {f"blocks.{index}.{theirs}": f"layers.{index}.{ours}" for theirs, ours in _BLOCK.items()}
        for theirs, ours in names.items():
            for part in ("weight", "bias"):
                if f"{theirs}.{part}" in state:
                    result[f"{ours}.{part}"] = state[f"{theirs}.{part}"]
        return {self.prefix + name: tensor for name, tensor in result.items()}

    def _head(self, rows: Tensor, shape: _Shape) -> Tensor:
        # Rows run over the cells of a patch, and within a cell over the maps, each of d channels.
        first = rows.view(shape.patch**2, -1, *rows.shape[1:])[:, : shape.channels].flatten(0, 1)
        return -first if self.mirrored else first

    def _fill(self, source: str, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        wanted = module.state_dict()
        assert set(wanted) == set(state), set(wanted) ^ set(state)
        wrong = [f"{name} is {list(t.shape)}" for name, t in state.items() if t.shape != wanted[name].shape]
        if wrong:
            raise DataError(
                f"'{source}' is no whole file of {self.peer}: {len(wrong)} tensors have shapes that do not go together "
                f"({', '.join(wrong[:3])}); download it again."
            )
        module.load_state_dict({name: tensor.float() for name, tensor in state.items()})


class DiTImporter(SiTImporter):
    """DiT's files to ``dit/*`` and ``labels``; noise and variance are kept, and ``dit/*`` converts to a velocity.

    Left out: the fixed positions, as for SiT. DiT's published numbers guide channels 0 to 2 only, and are
    sampled with ``ddpm`` at ``steps: 250``, ``schedule: discrete``, ``variance: learned``.
    """

    peer = "DiT"
    family = "dit"
    maps = (2,)
    mirrored = False
    prefix = "network."

    def _head(self, rows: Tensor, shape: _Shape) -> Tensor:
        return rows


class RepaImporter(SiTImporter):
    """REPA's files to ``sit/*`` and ``labels``; time and sign are ours already.

    Left out: ``projectors.*``, which serve the alignment in training only, and the fixed positions. Files of the time
    when later blocks were called ``decoder_blocks.*`` are read too. REPA's sampler guides all channels.
    """

    peer = "REPA"
    maps = (1,)
    left_out = ("projectors.",)
    mirrored = False
    guided_channels = None


class REGImporter(RepaImporter):
    """REG's files to ``reg/*`` and ``labels``.

    Left out: as for REPA. The companion vector is the class token of the encoder, DINOv2-B, as the encoder gives it.
    REG's sampler guides all channels and the vector.
    """

    peer = "REG"
    family = "reg"
    once = {**_ONCE, **_COMPANION}  # noqa: RUF012 - a constant of the class, annotated in the base

    def _shape(self, source: str, state: Mapping[str, Tensor]) -> _Shape:
        shape = super()._shape(source, state)
        return attrs.evolve(shape, side=math.isqrt(max(state[_FIXED].shape[1] - 1, 0)))

    def _positions(self, shape: _Shape) -> Tensor:
        return torch.cat((torch.zeros(1, shape.width), super()._positions(shape)))

    def _options(self, shape: _Shape, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**super()._options(shape, state), "companion": state["cls_projectors2.weight"].shape[-1]}


def _depth(state: Mapping[str, Tensor]) -> int:
    indices = [int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))]
    return max(indices, default=-1) + 1


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with legacy ``decoder_blocks.*`` as the blocks that follow ``blocks.*``."""
    depth = _depth(state)

    def rename(key: str) -> str:
        match = re.fullmatch(r"decoder_blocks\.(\d+)\.(.+)", key)
        return f"blocks.{depth + int(match[1])}.{match[2]}" if match else key

    return {rename(key): value for key, value in state.items()}


@torch.no_grad()
def _mirror_time(weight: Tensor) -> None:
    """Make of a layer that reads [cos, sin] of (1 − t)·f the one that reads those of t·f, in place."""
    half = weight.shape[1] // 2
    f = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(MAX_PERIOD) / half))
    c, s = weight.double().chunk(2, dim=1)
    weight.copy_(torch.cat((c * f.cos() + s * f.sin(), c * f.sin() - s * f.cos()), dim=1))


def _few(keys: list[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _guess(state: Mapping[str, Tensor]) -> str:
    """Say what a file looks like."""
    if "final_layer.linear_cls.weight" in state:
        return "It looks like REG; import it as 'reg'."
    if "blocks.0.mlp.w12.weight" in state:
        return "It looks like LightningDiT; import it as 'lightningdit'."
    if any(key.startswith("projectors.") for key in state):
        return "It looks like REPA; import it as 'repa'."
    if "blocks.0.attn.qkv.weight" in state and "x_embedder.proj.weight" in state:
        return "It looks like DiT or SiT, whose files are alike; import it as 'dit' or 'sit'."
    return "It looks like none of DiT, SiT, REPA and REG, whose keys begin with 'x_embedder', 'blocks' and others."

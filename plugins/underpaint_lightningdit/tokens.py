"""What both backbones do around their blocks: cells to tokens and back, checks of what they are given."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from underpaint import Condition, ConfigError, DataError

__all__ = ["check_context", "check_given", "image", "patches", "run_block"]


def patches(x: Tensor, patch: int) -> Tensor:
    """Return B×N×(d·patch²) tokens of a B×d×h×w latent, row by row; a patch is read channel by channel."""
    b, d, h, w = x.shape
    x = x.reshape(b, d, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (h // patch) * (w // patch), d * patch**2)


def image(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """Return the B×d×h×w latent of rows·columns tokens; a patch is written cell by cell, as in DiT."""
    b = tokens.shape[0]
    x = tokens.reshape(b, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(b, -1, rows * patch, columns * patch)


def run_block(block: nn.Module, recompute: bool, *inputs: Tensor) -> Tensor:
    """Return the block's output, its activations kept or not."""
    result: Tensor = (
        checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False) if recompute else block(*inputs)
    )
    return result


def check_context(family: str, patch: int, grid: tuple[int, int], pooled_dim: int, token_dim: int) -> None:
    """Refuse a grid or a condition that the backbones of `family` cannot be made for.

    Raises:
        ConfigError: The patch does not divide the grid, or the condition has tokens only.
    """
    if token_dim and not pooled_dim:
        raise ConfigError(
            f"The backbones '{family}/*' read a pooled condition, and the conditioner gives tokens only; "
            "choose a conditioner with a pooled output, such as 'labels'."
        )
    if grid[0] % patch or grid[1] % patch:
        raise ConfigError(
            f"A latent of {grid[0]}×{grid[1]} cells does not divide into patches of {patch}×{patch}; "
            f"choose a backbone of a smaller patch, such as '{family}/S-1'."
        )


def check_given(
    x_t: Tensor, patch: int, condition: Condition, pooled: bool, layers: Collection[int], depth: int
) -> None:
    """Refuse inputs of `forward` that do not fit.

    Raises:
        DataError: The patch does not divide the latent, the condition is not the one the backbone was made for, or a
            layer is asked for that it cannot give.
    """
    rows, columns = x_t.shape[2:]
    if rows % patch or columns % patch:
        raise DataError(
            f"A latent of {rows}×{columns} cells does not divide into patches of {patch}×{patch}; "
            f"give sides that are multiples of {patch}."
        )
    if (condition.pooled is not None) != pooled:
        made, given = ("with", "without") if pooled else ("without", "with")
        raise DataError(
            f"This backbone was made {made} a pooled condition and was given one {given} it; "
            "use the conditioner that it was made for."
        )
    for layer in layers:
        if not 0 <= layer < depth:
            raise DataError(
                f"Layer {layer} was asked for, and the backbone has hidden states of its width after {depth} blocks; "
                f"layers are 0 to {depth - 1}."
            )

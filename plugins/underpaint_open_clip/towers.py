"""The two kinds of image tower in open_clip, for any image size, without the text tower."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import open_clip
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

__all__ = ["NativeTower", "Tower", "TrunkTower", "make_tower"]


class Tower(nn.Module, ABC):
    """An image tower.

    Attributes:
        visual: open_clip's own module; its parameters have the names that checkpoints give them.
        depth: Number of blocks.
        width: Channels of a token.
        patch: Pixels of a patch, per side.
    """

    depth: int
    width: int
    patch: int

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual: Any = visual

    @abstractmethod
    def final_norm(self) -> nn.Module:
        """Return the last norm over tokens, or an identity where the tower has none."""

    @abstractmethod
    def forward(self, pixels: Tensor, layers: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor] | None, Tensor]:
        """Return B×N×C patch tokens after each of `layers`, the B×C class tokens there, and the tower's B×E output.

        Layer −1, which comes first, is what the first block is given. A tower without class token gives None in place
        of class tokens.
        """


class NativeTower(Tower):
    """open_clip's own vision transformer."""

    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        self.depth = int(visual.transformer.layers)
        self.width = int(visual.transformer.width)
        self.patch = int(visual.patch_size[0])

    def final_norm(self) -> nn.Module:
        """Return ``ln_post``, unless it follows an attention pool (CoCa)."""
        norm: nn.Module = self.visual.ln_post
        return norm if self.visual.attn_pool is None else nn.Identity()

    def forward(self, pixels: Tensor, layers: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor] | None, Tensor]:
        """Return patch and class tokens, and the last one projected, with positions interpolated to the grid."""
        visual = self.visual
        patches = visual.conv1(pixels)
        grid = patches.shape[-2:]
        patches = patches.flatten(2).transpose(1, 2)
        token = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        positions = resample_abs_pos_embed(
            visual.positional_embedding[None], new_size=list(grid), old_size=list(visual.grid_size)
        )
        embedded = visual.ln_pre(torch.cat([token, patches], dim=1) + positions.to(patches.dtype))
        x, blocks = visual.transformer.forward_intermediates(embedded, indices=[n for n in layers if n >= 0])
        blocks = [embedded, *blocks] if -1 in layers else blocks
        pooled = visual._pool(x)[0]
        pooled = pooled if visual.proj is None else pooled @ visual.proj
        return [block[:, 1:] for block in blocks], [block[:, 0] for block in blocks], pooled


class TrunkTower(Tower):
    """A vision transformer of timm with open_clip's head."""

    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        self.depth = len(visual.trunk.blocks)
        self.width = int(visual.trunk.embed_dim)
        self.patch = int(visual.trunk.patch_embed.patch_size[0])

    def final_norm(self) -> nn.Module:
        """Return the norm over tokens, or the one after pooling where timm puts it there."""
        norm: nn.Module = self.visual.trunk.norm
        after: nn.Module = self.visual.trunk.fc_norm
        return after if isinstance(norm, nn.Identity) else norm

    def forward(self, pixels: Tensor, layers: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor] | None, Tensor]:
        """Return patch and class tokens and the output of open_clip's head."""
        trunk = self.visual.trunk
        has_class = trunk.cls_token is not None
        tokens, found = trunk.forward_intermediates(
            pixels, indices=[n for n in layers if n >= 0], output_fmt="NLC", return_prefix_tokens=has_class
        )
        blocks = [patches for patches, _ in found] if has_class else found
        classes = [prefix[:, 0] for _, prefix in found] if has_class else None
        if -1 in layers:
            # Computed twice: forward_intermediates does not give it, and it is a thousandth of the network's work.
            embedded = trunk._pos_embed(trunk.patch_embed(pixels))
            x = trunk.norm_pre(embedded[0] if isinstance(embedded, tuple) else embedded)
            blocks = [x[:, trunk.num_prefix_tokens :], *blocks]
            classes = None if classes is None else [x[:, 0], *classes]
        return blocks, classes, self.visual.head(trunk.forward_head(tokens))


def make_tower(model: str, quick_gelu: bool) -> Tower:
    """Build the image tower of a model, with random weights.

    Args:
        model: Name in open_clip.
        quick_gelu: Whether the weights were trained with x·sigmoid(1.702x) for GELU; timm's trunks never were.
    """
    cfg = open_clip.get_model_config(model)
    still = {"patch_dropout": 0.0, "timm_drop": 0.0, "timm_drop_path": 0.0, "timm_model_pretrained": False}
    vision = {**cfg["vision_cfg"], **still}
    name = vision.get("timm_model_name")
    if not name:
        return NativeTower(open_clip.model._build_vision_tower(cfg["embed_dim"], vision, quick_gelu))
    # open_clip makes the trunk for one image size; ours replaces it and is the only one that takes memory.
    with torch.device("meta"):
        visual = open_clip.model._build_vision_tower(cfg["embed_dim"], vision, quick_gelu)
    trunk = timm.create_model(
        name, num_classes=visual.trunk.num_classes, global_pool=visual.trunk.global_pool, dynamic_img_size=True
    )
    assert trunk.state_dict().keys() == visual.trunk.state_dict().keys()
    visual.trunk = trunk
    visual.head.to_empty(device=torch.get_default_device())
    for part in visual.head.modules():
        if isinstance(part, nn.Linear):
            part.reset_parameters()
    return TrunkTower(visual)

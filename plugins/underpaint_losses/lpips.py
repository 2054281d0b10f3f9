"""LPIPS on VGG-16."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import lpips
from torchvision.models import VGG16_Weights, vgg16

from underpaint import DataError, Loss, StepTensors, load_weights
from underpaint_losses.config import LpipsConfig

__all__ = ["Lpips"]

# The last rectified convolution before each pooling: its index in torchvision's `features`, and its channels.
_LAYERS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}
# Images in [-1, 1] to the input of an ImageNet network: the constants of the published LPIPS.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)

_NAMES = [f"lin{i}.model.1.weight" for i in range(len(_LAYERS))]
_HOW = (
    "set 'download: true' to let torchvision fetch it, or 'weights' to the path of that file; the loss 'features' "
    "needs no files"
)


class Lpips(Loss):
    """The learned perceptual distance of Zhang et al. 2018 (eq. 1), VGG variant, version 0.1.

    For five layers: features are scaled to unit length per cell, squared differences are weighted per channel by the
    layer's head, and averaged over cells; the layers are summed, and samples averaged. Everything is frozen, and the
    gradient flows through the reconstruction only.

    Raises:
        DataError: There are no weights, or the files are not what they should be.
    """

    needs = frozenset({"images", "reconstruction"})

    def __init__(self, config: LpipsConfig) -> None:
        super().__init__()
        # On the meta device first: the classifier, nine tenths of the network, is never allocated.
        with torch.device("meta"):
            trunk = vgg16(weights=None, init_weights=False).features[: max(_LAYERS) + 1]
        self.trunk: nn.Sequential = trunk.to_empty(device="cpu")
        for module in self.trunk:
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
            elif isinstance(module, nn.ReLU):
                module.inplace = False
        self.heads = nn.ParameterList(torch.rand(channels) / channels for channels in _LAYERS.values())
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        if config.weights != "random":
            self._load(config.weights or str(_hub_file(config.download)), config.heads)
        self.requires_grad_(False)
        self.eval()

    def _load(self, weights: str, heads: str | None) -> None:
        state = load_weights(weights)
        trunk = {name: state.get(f"features.{name}") for name in self.trunk.state_dict()}
        _fill(dict(self.trunk.state_dict()), trunk, weights, "features.")
        if heads is None and any(name in state for name in _NAMES):
            heads, linear = weights, state
        else:
            heads = heads or str(Path(inspect.getfile(lpips)).with_name("lpips_models") / "vgg.pth")
            linear = load_weights(heads)
        found = {name: linear[name].reshape(-1) if name in linear else None for name in _NAMES}
        _fill(dict(zip(_NAMES, self.heads, strict=True)), found, heads, "")

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: this is a measure, not a part that learns."""
        return super().train(False)

    def units(self) -> Sequence[nn.Module]:
        """Return the loss: its norms and differences are passes over maps larger than the images."""
        return (self,)

    def forward(self, step: StepTensors) -> dict[str, Tensor]:
        """Return ``lpips``."""
        assert step.images is not None
        assert step.reconstruction is not None
        with torch.no_grad():
            wanted = self._features(step.images)
        got = self._features(step.reconstruction.image)
        distance = [
            ((a - b).square() * head.view(1, -1, 1, 1)).sum(1).mean()
            for a, b, head in zip(got, wanted, self.heads, strict=True)
        ]
        return {"lpips": torch.stack(distance).sum()}

    def _features(self, images: Tensor) -> list[Tensor]:
        x = (images.to(self.shift.dtype) - self.shift) / self.scale
        if x.device.type == "cuda":
            # As the tensor cores take it: no layer has to turn its input round. On a CPU it is slower.
            x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for index, module in enumerate(self.trunk):
            x = module(x)
            if index in _LAYERS:
                maps.append(F.normalize(x.float(), dim=1, eps=1e-8))
        return maps


def _hub_file(download: bool) -> Path:
    url = VGG16_Weights.IMAGENET1K_V1.url
    path = Path(str(torch.hub.get_dir()), "checkpoints", str(url).rpartition("/")[2])
    if path.is_file():
        return path
    if not download:
        raise DataError(f"The loss 'lpips' needs torchvision's VGG-16, which is not at '{path}'; {_HOW}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # The name ends with the first digits of the hash, which torch checks before the file gets that name.
        torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2], progress=False)
    except (OSError, RuntimeError) as error:
        raise DataError(f"torchvision's VGG-16 cannot be downloaded to '{path}' ({error}); {_HOW}.") from error
    return path


def _fill(targets: Mapping[str, Tensor], found: Mapping[str, Tensor | None], place: str, prefix: str) -> None:
    for name, target in targets.items():
        tensor = found[name]
        if tensor is None or tensor.shape != target.shape:
            state = "lacks" if tensor is None else "has another shape of"
            raise DataError(
                f"The file '{place}' {state} '{prefix}{name}', which LPIPS needs; give torchvision's VGG-16 as "
                "'weights' and the heads of LPIPS as 'heads'."
            )
        with torch.no_grad():
            target.copy_(tensor)

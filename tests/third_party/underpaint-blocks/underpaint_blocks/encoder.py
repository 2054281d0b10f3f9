"""The encoder."""

from torch import Tensor, nn

from underpaint import Encoder, EncoderInfo, Features
from underpaint_blocks.config import ConvConfig


class Conv(Encoder):
    """One convolution whose stride is its kernel."""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        self.info = EncoderInfo(
            channels=(config.width,),
            stride=config.block,
            patch=config.block,
            native_size=(64, 64),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            layers=(0,),
            licence="CC0-1.0",
            source="random initialisation",
        )
        self.blocks = nn.Conv2d(3, config.width, config.block, config.block)

    def forward(self, images: Tensor) -> Features:
        """Encode B×3×H×W images; the range [-1, 1] is what mean and std of one half make of [0, 1]."""
        self.grid(*images.shape[-2:])
        cells = self.blocks(images)
        return Features(maps=(cells,), pooled=cells.mean((2, 3)))

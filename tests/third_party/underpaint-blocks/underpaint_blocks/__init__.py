"""An encoder that averages blocks of pixels, and the mean absolute error."""

from typing import Any

from underpaint import hookimpl

underpaint_api = ">=1,<2"


@hookimpl
def register_encoders(register: Any) -> None:
    """Register ``blocks/conv``."""
    register(
        "blocks/conv",
        "underpaint_blocks.encoder:Conv",
        config="underpaint_blocks.config:ConvConfig",
        tiny={"width": 16, "block": 4},
        summary="Random projections of blocks of pixels",
    )


@hookimpl
def register_metrics(register: Any) -> None:
    """Register ``mae``."""
    register("mae", "underpaint_blocks.metric:Mae", summary="Mean absolute error of the pixels")

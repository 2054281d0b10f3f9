"""Class labels as a condition."""

from __future__ import annotations

from typing import Any

from underpaint import hookimpl


@hookimpl
def register_conditioners(register: Any) -> None:
    """Register ``labels``."""
    register(
        "labels",
        "underpaint_labels.labels:Labels",
        summary="One learned vector for each class, and one for no class",
    )

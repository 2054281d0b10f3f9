"""Options of the trackers."""

from __future__ import annotations

from typing import Literal

import attrs

__all__ = ["WandbConfig"]


@attrs.frozen(kw_only=True)
class WandbConfig:
    """Options of ``wandb``.

    Attributes:
        project: Project that the run appears in.
        entity: User or team; None takes the account's own.
        mode: ``offline`` writes into the run folder only, to be sent with ``wandb sync``; None leaves it to wandb and
            its environment variables.
    """

    project: str = "underpaint"
    entity: str | None = None
    mode: Literal["online", "offline"] | None = None

"""What every stage of a run shares."""

from __future__ import annotations

import attrs

from underpaint.config.schema import Recipe
from underpaint.run.data import RunData
from underpaint.run.folder import RunFolder
from underpaint.training.ranks import Ranks

__all__ = ["Session"]


@attrs.frozen(eq=False, kw_only=True)
class Session:
    """What every stage of a run shares.

    Attributes:
        recipe: The recipe.
        folder: The run folder.
        data: The images.
        ranks: The processes.
        config_hash: Hash of the recipe, written into every checkpoint.
        plugins: Distribution of each plugin by name, written into every checkpoint.
    """

    recipe: Recipe
    folder: RunFolder
    data: RunData
    ranks: Ranks
    config_hash: str
    plugins: dict[str, str]

    def stage_seed(self, index: int) -> int:
        """Return the seed of a stage; that of diffusion has the index after the last."""
        return (self.recipe.seed + 1) * 1_000_003 + index * 10_007

"""The table of class embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from underpaint import Condition, Conditioner, DataError

__all__ = ["Labels"]


class Labels(Conditioner):
    """A learned vector of the backbone's width for each class, and a last one for no class.

    The condition is `Condition.pooled`, B×width. Without classes, every input gets the null condition.
    Entries start as normal variables of standard deviation 0.02 (DiT).
    """

    accepts = "label"

    def __init__(self, *, width: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.pooled_dim = width
        self.token_dim = 0
        self.table = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, inputs: Tensor | Sequence[str], drop: Tensor | None = None) -> Condition:
        """Look up labels.

        Labels on the CPU are checked before they move to the table's device: hand them over there. Labels that are
        on an accelerator already are not checked, because reading them would make the host wait for it.

        Args:
            inputs: B integers in [0, classes).
            drop: B booleans; True gives the null condition.

        Raises:
            DataError: The inputs are not labels, or one is out of range.
        """
        if not isinstance(inputs, Tensor):
            raise DataError("The conditioner 'labels' was given texts; use it with a data set that has class labels.")
        device = self.table.weight.device
        if self.classes == 0:
            return self.null(inputs.shape[0], device)
        if inputs.device.type == "cpu":
            self._check(inputs)
        index = inputs.to(device, torch.long, non_blocking=True)
        if drop is not None:
            index = index.masked_fill(drop.to(device, non_blocking=True), self.classes)
        return Condition(pooled=self.table(index))

    def null(self, batch: int, device: torch.device) -> Condition:
        """Return the vector for no class, B times, on `device`."""
        # Through the module, not its weight: ZeRO-3 gathers a parameter when its module is called.
        index = torch.full((batch,), self.classes, device=self.table.weight.device)
        return Condition(pooled=self.table(index).to(device))

    def _check(self, labels: Tensor) -> None:
        wrong = labels[(labels < 0) | (labels >= self.classes)]
        if wrong.numel():
            raise DataError(
                f"The label {int(wrong[0])} was given to a model of {self.classes} classes; "
                f"labels are 0 to {self.classes - 1}."
            )

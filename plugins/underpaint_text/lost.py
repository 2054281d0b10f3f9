"""Says how many tokens of texts were lost because the texts were too long: each text, or a few of a training."""

from __future__ import annotations

import atexit
import logging
from collections import Counter

__all__ = ["Losses", "losses"]

_log = logging.getLogger("underpaint")

_FEW = 3
"""Texts of a stage that are told one by one, for each encoder."""
_MANY = 100
"""Texts that are told one by one outside of a training: all that anyone types, and not all captions of a data set."""


class Losses:
    """Tells the first texts that an encoder cuts one by one, and of the others how many they were."""

    def __init__(self) -> None:
        self._training = False
        self._told: Counter[str] = Counter()
        # Texts, tokens in all, and the most of one text: a data set may have millions.
        self._untold: dict[str, tuple[int, int, int]] = {}

    def add(self, encoder: str, text: str, tokens: int) -> None:
        """Take note of a text that lost its last `tokens` tokens in `encoder`."""
        limit = _FEW if self._training else _MANY
        if self._told[encoder] >= limit:
            count, total, most = self._untold.get(encoder, (0, 0, 0))
            self._untold[encoder] = count + 1, total + tokens, max(most, tokens)
            return
        self._told[encoder] += 1
        _log.warning(
            "A text is too long for %s, and its last %d tokens are lost; it starts with '%s'.%s",
            encoder,
            tokens,
            text[:60],
            " Further ones are counted." if self._told[encoder] == limit else "",
        )

    def sum_up(self, where: str = "") -> None:
        """Say how many texts were not told one by one, and begin anew."""
        for encoder, (count, total, most) in self._untold.items():
            _log.warning(
                "%sTexts too long for %s that were counted: %d, which lost %d tokens in all, and %d at most.",
                where,
                encoder,
                count,
                total,
                most,
            )
        self._told.clear()
        self._untold.clear()

    def train(self, training: bool) -> None:
        """Sum up, and be brief from now on, or no longer."""
        self.sum_up()
        self._training = training


losses = Losses()
atexit.register(losses.sum_up)

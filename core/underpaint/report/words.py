"""Facts of a run as sentences and short texts, for the page and the Markdown alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from underpaint.report.facts import RunFacts, Speed, StageFacts

__all__ = ["MFU_CONVENTION", "duration", "figure", "protocol_lines", "speed_cells", "summary"]

MFU_CONVENTION = (
    "img/s: median over the log lines, warm-up left out. MFU: share of the peak FLOP/s of the machine, where that is "
    "known, with FLOP = 2 MAC, forward and backward = 3 forward, recomputation not counted. Data wait: share of the "
    "time spent waiting for data. Memory: the most that one rank used."
)
_NONE = "–"


def summary(facts: RunFacts) -> list[str]:
    """Return plain sentences: the run's own notes, then what was trained on what."""
    sentences = list(facts.notes)
    config = facts.config
    if not config:
        return sentences
    data = _mapping(config.get("data"))
    if data.get("train"):
        size = data.get("size")
        sides = f"{size[0]}×{size[1]}" if isinstance(size, list) and len(size) == 2 else f"{size}×{size}"
        sentences.append(f"Images: {_component(data['train'])}, cropped to {sides} pixels.")
    tokenizer = _mapping(config.get("tokenizer"))
    if tokenizer.get("load"):
        sentences.append(f"Tokenizer: loaded from {tokenizer['load']}.")
    elif tokenizer.get("encoder"):
        parts = ", ".join(f"{kind} {_component(tokenizer.get(kind))}" for kind in ("encoder", "adapter", "decoder"))
        sentences.append(f"Tokenizer: {parts}, {tokenizer.get('latent_channels')} latent channels.")
    return sentences + [_trained(stage) for stage in facts.stages]


def _trained(stage: StageFacts) -> str:
    done, planned, batch = stage.steps[-1], stage.plan.get("steps"), stage.plan.get("batch")
    what = f"the {_list(stage.plan['trains'])}" if isinstance(stage.plan.get("trains"), list) else ""
    if stage.plan.get("backbone"):
        what = f"{_component(stage.plan['backbone'])} with conditioner {_component(stage.plan.get('conditioner'))}"
    steps = f"{done:,.0f} steps" if planned in (None, done) else f"{done:,.0f} of {planned:,} steps"
    images = f" of {batch:,} images" if isinstance(batch, int) else ""
    return f"Stage {stage.name} trained {what} for {steps}{images}." if what else f"Stage {stage.name} ran {steps}."


def speed_cells(speed: Speed) -> list[str]:
    """Return img/s, MFU, data wait, memory and time as texts."""
    return [
        _NONE if speed.images_per_second is None else f"{speed.images_per_second:,.4g}",
        _NONE if speed.mfu is None else f"{100 * speed.mfu:.1f} %",
        _NONE if speed.data_wait is None else f"{100 * speed.data_wait:.1f} %",
        _NONE if speed.memory_gib is None else f"{speed.memory_gib:.2f} GiB",
        _NONE if speed.seconds is None else duration(speed.seconds),
    ]


def figure(value: float, std: float | None) -> str:
    """Return a measured value with at least four significant digits, and its deviation with two."""
    return _digits(value, 4) if std is None else f"{_digits(value, 4)} ± {_digits(std, 2)}"


def protocol_lines(protocol: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return the leaves of a protocol as key and text, keys dotted."""
    lines: list[tuple[str, str]] = []
    for key, value in protocol.items():
        if isinstance(value, Mapping) and value:
            lines += protocol_lines(value, f"{prefix}{key}.")
        else:
            text = {None: "none", True: "yes", False: "no"}.get(value) if isinstance(value, bool | None) else None
            lines.append(
                (f"{prefix}{key}", text or (", ".join(map(str, value)) if isinstance(value, list) else str(value)))
            )
    return lines


def _digits(value: float, count: int) -> str:
    whole = len(str(int(abs(value)))) if math.isfinite(value) and abs(value) >= 1 else 0
    return f"{value:,.{max(0, count - whole)}f}" if whole else f"{value:#.{count}g}" if value else "0"


def duration(seconds: float) -> str:
    """Return a time with its unit."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


def _component(value: Any) -> str:
    return str(value.get("name")) if isinstance(value, Mapping) else str(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(items: list[Any]) -> str:
    names = [str(item) for item in items]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

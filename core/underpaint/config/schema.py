"""The schema of a recipe: its sections, and what must hold between them."""

from __future__ import annotations

import re

import attrs

from underpaint.config.component import ComponentConfig
from underpaint.config.data import DataConfig, LatentsConfig
from underpaint.config.diffusion import DiffusionConfig
from underpaint.config.engine import EngineConfig
from underpaint.config.evaluation import EvaluationConfig
from underpaint.config.joint import check_joint
from underpaint.config.losses import check_windows
from underpaint.config.stages import StageConfig
from underpaint.config.tokenizer import TokenizerConfig
from underpaint.errors import ConfigError, suggest

__all__ = ["Recipe"]

_STAGE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
RESERVED_STAGES = ("start", "latents", "diffusion", "samples", "report")


@attrs.frozen(kw_only=True)
class Recipe:
    """Everything that a run is made from.

    Attributes:
        name: Name of the run's folder and report.
        about: What it is, for listings and the report.
        seed: Seed of initialisation, data order, noise.
        plugins: Plugins that it needs: names of installed ones, ``.py`` files or dotted modules.
        data: Images.
        tokenizer: Encoder, adapter, decoder.
        stages: Tokenizer training, in order.
        latents: Latent cache.
        diffusion: Diffusion training; None ends with the tokenizer.
        evaluation: What is measured.
        engine: How training runs.
        trackers: Where scalars go beside ``metrics.jsonl``.
    """

    name: str
    about: str = ""
    seed: int = 0
    plugins: tuple[str, ...] = ()
    data: DataConfig
    tokenizer: TokenizerConfig
    stages: tuple[StageConfig, ...] = ()
    latents: LatentsConfig = attrs.field(factory=LatentsConfig)
    diffusion: DiffusionConfig | None = None
    evaluation: EvaluationConfig = attrs.field(factory=EvaluationConfig)
    engine: EngineConfig = attrs.field(factory=EngineConfig)
    trackers: tuple[ComponentConfig, ...] = ()

    def __attrs_post_init__(self) -> None:
        if not self.stages and self.diffusion is None and self.tokenizer.load is None:
            raise ConfigError(
                f"The recipe '{self.name}' trains nothing: stages is empty and diffusion is null; add one of them, or "
                "measure a finished tokenizer that tokenizer.load names."
            )
        seen: list[str] = []
        for index, stage in enumerate(self.stages):
            path = f"stages[{index}]"
            if not _STAGE_NAME.fullmatch(stage.name) or stage.name in RESERVED_STAGES:
                raise ConfigError(
                    f"{path}.name is '{stage.name}'; use lower-case letters, digits, '-' and '_', and none of "
                    f"{', '.join(RESERVED_STAGES)}."
                )
            if stage.name in seen:
                raise ConfigError(f"{path}.name '{stage.name}' is used twice; rename one.")
            if stage.teacher == "start" and self.tokenizer.load is None:
                raise ConfigError(
                    f"{path}.teacher is 'start', the tokenizer that the recipe loads, but tokenizer.load is not set; "
                    "set it, or name an earlier stage."
                )
            references = {"teacher": stage.teacher if stage.teacher != "start" else None}
            for number, loss in enumerate(stage.losses):
                if loss.critic is not None:
                    references[f"losses[{number}].critic.carry"] = loss.critic.carry
            for key, name in references.items():
                if name is not None and name not in seen:
                    raise ConfigError(
                        f"{path}.{key} is '{name}', which is not an earlier stage; "
                        f"earlier stages: {', '.join(seen) or 'none'}."
                    )
            parts = ("encoder", "adapter", "decoder")
            if not stage.trains:
                raise ConfigError(f"{path}.trains is empty; name at least one of encoder, adapter, decoder.")
            for part in stage.trains:
                if part.partition(".")[0] not in parts:
                    raise ConfigError(f"{path}.trains names '{part}'. {suggest(part, parts)}")
            if stage.lora is not None:
                stage.lora.check(stage.trains, path)
            if stage.ema_ramp is not None and stage.ema is None:
                raise ConfigError(f"{path}.ema_ramp is set, but ema is null; set ema to the decay it leads to.")
            if stage.denoiser is not None:
                check_joint(stage, path, self.engine)
                check_windows(stage.denoiser.losses, stage.steps, f"{path}.denoiser.losses")
            check_windows(stage.losses, stage.steps, f"{path}.losses", self._carried(stage.name))
            seen.append(stage.name)
        if self.diffusion is not None:
            check_windows(self.diffusion.losses, self.diffusion.steps, "diffusion.losses")
        joint = [stage.name for stage in self.stages if stage.denoiser is not None]
        start = None if self.diffusion is None else self.diffusion.start
        if start is not None and start not in joint:
            raise ConfigError(
                f"diffusion.start is '{start}', which is no stage that trains a denoiser; those that do: "
                f"{', '.join(joint) or 'none'}."
            )
        if self.diffusion is None and self.engine.precision == "fp8":
            raise ConfigError(
                "engine.precision is 'fp8', which is for the blocks of a diffusion backbone, and diffusion is null; "
                "set it to 'bf16'."
            )
        guidance = self.evaluation.guidance
        if self.diffusion is not None and self.diffusion.dropout == 0.0 and guidance.scale != 1.0 and not guidance.weak:
            raise ConfigError(
                f"evaluation.guidance.scale is {guidance.scale}, and diffusion.dropout is 0, so the null condition "
                "that it needs is never trained; set dropout to 0.1, or the scale to 1."
            )

    def _carried(self, stage: str) -> list[str]:
        """Return the losses whose critics are handed on by a stage."""
        losses = [loss for other in self.stages for loss in other.losses]
        return [loss.name for loss in losses if loss.critic is not None and loss.critic.carry == stage]

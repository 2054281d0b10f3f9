"""Built-in solvers of the flow."""

from __future__ import annotations

from typing import Any

from underpaint import hookimpl


@hookimpl
def register_samplers(register: Any) -> None:
    """Register ``euler``."""
    register(
        "euler",
        "underpaint_samplers.euler:Euler",
        config="underpaint_samplers.config:EulerConfig",
        tiny={"steps": 4},
        summary="Euler steps of the probability-flow ODE, on a uniform or shifted grid",
    )

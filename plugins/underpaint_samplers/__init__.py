"""Built-in solvers of the flow."""

from __future__ import annotations

from typing import Any

from underpaint import hookimpl

_RANDOM = {
    "constant_flow_is_exact": "It adds noise on the way, which no velocity takes out again.",
    "linear_flow_converges": "It adds noise on the way, which no velocity takes out again.",
}


@hookimpl
def register_samplers(register: Any) -> None:
    """Register ODE solvers of first, second and adaptive order, and two stochastic ones."""
    register(
        "euler",
        "underpaint_samplers.euler:Euler",
        config="underpaint_samplers.config:StepsConfig",
        tiny={"steps": 4},
        summary="Euler steps of the probability-flow ODE, on a uniform or shifted grid",
    )
    register(
        "heun",
        "underpaint_samplers.heun:Heun",
        config="underpaint_samplers.config:StepsConfig",
        tiny={"steps": 4},
        summary="Heun's second-order method, two evaluations a step",
    )
    register(
        "ab2",
        "underpaint_samplers.multistep:AdamsBashforth",
        config="underpaint_samplers.config:StepsConfig",
        tiny={"steps": 4},
        summary="Second-order Adams–Bashforth, one evaluation a step: for few steps",
    )
    register(
        "adaptive",
        "underpaint_samplers.adaptive:Adaptive",
        config="underpaint_samplers.config:AdaptiveConfig",
        summary="Dormand–Prince with error control (torchdiffeq), as many evaluations as the tolerance takes",
    )
    register(
        "euler-maruyama",
        "underpaint_samplers.maruyama:EulerMaruyama",
        config="underpaint_samplers.config:EulerMaruyamaConfig",
        tiny={"steps": 4},
        summary="Euler–Maruyama steps of the reverse SDE with diffusion 2t, the last one without noise (REPA, REG)",
        expected_failures=_RANDOM,
    )
    register(
        "ddim",
        "underpaint_samplers.ddim:DDIM",
        config="underpaint_samplers.config:DDIMConfig",
        tiny={"steps": 8},
        summary="DDIM over the variance-preserving path of the same flow, any number of steps or of DDPM's timesteps",
    )
    register(
        "ddpm",
        "underpaint_samplers.ddim:DDIM",
        config="underpaint_samplers.config:DDIMConfig",
        options={"eta": 1.0},
        tiny={"steps": 8},
        summary="Ancestral sampling of DDPM over the same path and steps, also with the variance that DiT learned",
        expected_failures=_RANDOM,
    )

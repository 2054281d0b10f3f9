"""Every check passes on a good component, and fails on one that breaks its promise."""

import pytest

from tests.testing.mutants import MUTANTS
from underpaint.registration.manager import PluginManager
from underpaint.registration.names import KINDS
from underpaint.testing import check_component, checks

GOOD = {
    "encoder": "conv",
    "adapter": "linear",
    "decoder": "conv",
    "backbone": "conv",
    "conditioner": "table",
    "loss": "charbonnier",
    "metric": "mae",
    "dataset": "gradients",
    "sampler": "midpoint",
    "tracker": "csv",
    "importer": "flat",
}
# What a skeleton may leave out: metrics of one side, and losses that train, have a critic or something to compile.
OPTIONAL = {
    "sides_in_any_order",
    "trains_as_declared",
    "compiles_as_declared",
    "critic_learns",
    "model_spares_critic",
    "critic_spares_model",
}
# Failures of these are shown by other means: a wrong plugin, not a wrong class.
ELSEWHERE = {"declares_what_exists", "imports_lazily", "config_round_trip", "refuses_unknown_options"}


@pytest.mark.parametrize("kind", KINDS)
def test_skeleton_passes(demo: PluginManager, kind: str) -> None:
    results = check_component(kind, f"demo-{kind}/{GOOD[kind]}")
    assert [(r.check, r.message) for r in results if r.status in ("failed", "expected")] == []
    assert len(results) == len(checks(kind))
    skipped = {r.check for r in results if r.status == "skipped"}
    assert skipped <= OPTIONAL


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in MUTANTS.items() for name in names])
def test_mutant_is_caught(demo: PluginManager, kind: str, name: str) -> None:
    results = check_component(kind, f"mutant/{name}")
    failed = {r.check: r.message for r in results if r.status == "failed"}
    assert MUTANTS[kind][name] <= set(failed), failed
    assert len(failed) < 0.6 * len(results), "so much fails that something else is wrong"
    assert all(failed.values())


def test_every_check_has_a_mutant() -> None:
    # A check common to several kinds needs one mutant in all.
    caught = {check for names in MUTANTS.values() for failing in names.values() for check in failing}
    known = {check.name for kind in KINDS for check in checks(kind)}
    assert known - caught - ELSEWHERE == set()
    assert caught <= known

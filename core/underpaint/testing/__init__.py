"""The conformance kit: what every component of a kind must do, as a public, versioned list of checks.

In the tests of a plugin:

    from underpaint import testing

    @testing.parametrize(plugin="blocks")
    def test_conformance(case: testing.Case) -> None:
        case()

Each test is one check of one component and is called, for example,
``encoder:tiny/vit@random:batch_independent``. The command ``underpaint plugins check NAME`` runs the same
checks. A component that fails a check by nature declares it, with the reason, where it is registered:
``expected_failures={"batch_independent": "it normalises over the batch"}``. A declared failure that passes is
a failure, so declarations cannot rot. The check ``"*"`` stands for everything that one machine may lack: with
it, any check may fail, and may pass.

Names that make equal components, as sizes of one network do that are equally small here, share the checks of the
component: a check runs for the first of them, and its outcome is reported, and judged by what it declares, for each.
What is registered is checked for every name.

What the kit needs to know comes from the registration as well: ``examples`` (names that stand for a family),
``tiny`` (options that make a component small) and ``context`` (context keywords in place of the kit's own; the
key ``size`` sets height and width of the kit's images). Where a data set needs files, an option in ``tiny`` says
``"{images}"``, ``"{parquet}"`` or ``"{tar}"`` and receives a folder of PNG files in one folder per class, of
Parquet files as Hugging Face writes them, or of WebDataset tars.
"""

from __future__ import annotations

from underpaint.testing.kit import (
    KIT_VERSION,
    Case,
    Check,
    CheckResult,
    NotApplicable,
    Subject,
    cases,
    check_component,
    checks,
    expect,
    parametrize,
)

__all__ = [
    "KIT_VERSION",
    "Case",
    "Check",
    "CheckResult",
    "NotApplicable",
    "Subject",
    "cases",
    "check_component",
    "checks",
    "expect",
    "parametrize",
]

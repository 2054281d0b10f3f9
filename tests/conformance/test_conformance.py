"""The conformance kit on every component that the installed plugins register."""

from underpaint import testing


@testing.parametrize()
def test_conformance(case: testing.Case) -> None:
    case()

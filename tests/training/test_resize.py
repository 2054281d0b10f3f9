"""A training over 4, 2, 1 and again 4 ranks is the one over one rank."""

from __future__ import annotations

import pytest
from processes import report_of


@pytest.mark.slow
def test_resuming_over_other_numbers_of_ranks_changes_nothing(tmp_path):
    report = report_of("resize_trials.py", str(tmp_path))
    assert sorted(report["whole"]) == ["1", "2", "3"]
    for zero, (losses, samples) in report["whole"].items():
        got_losses, got_samples = report["pieces"][zero]
        assert len(losses) == 20
        assert got_samples == samples
        assert got_losses == pytest.approx(losses, rel=1e-4)
        # The bound says something only where losses change by more than that.
        assert max(losses) > 1.1 * min(losses)

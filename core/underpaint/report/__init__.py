"""The report: one page from what a run has left in its folder."""

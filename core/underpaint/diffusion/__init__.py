"""The flow between data and noise: times, paths, targets and guidance. Knows no network and no solver."""

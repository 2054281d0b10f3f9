"""Training: the processes, the engine, its checkpoints, and what a run does when it is interrupted."""

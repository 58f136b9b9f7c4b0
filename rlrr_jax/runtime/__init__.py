"""What a run stands on: mesh, processes, memory, checkpoints, time, and the wish to stop."""

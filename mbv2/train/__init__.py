"""Training: options, the loop, its schedule, optimizer and averages, checkpoints and logs."""

"""Training: checked options, state, step, loop, optimizer, evaluation, checkpoints, results."""

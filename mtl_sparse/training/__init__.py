"""Training: checked options, state, step, loop, optimizer, evaluation, checkpoints, results."""

from mtl_sparse.runtime import installed

installed.check("input_pipeline")

"""`--job=train`: train, evaluate the best checkpoint, write the report."""

import contextlib
import json
import pathlib
import time
from typing import Any

import jax

from mtl_sparse.report import records
from mtl_sparse.runtime import logs, processes, progress, text
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.training import folder, groups, loop, pruning, results
from mtl_sparse.training.checkpoints import Checkpoints
from mtl_sparse.training.evaluation import Evaluator
from mtl_sparse.training.setup import Run, setup


def train(config: Any, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Train, evaluate the best checkpoint on the test split, and write the report.

    Resumes from the latest checkpoint in `workdir` if there is one; the result is that of an uninterrupted run. All
    processes of a run call it, and the first one writes; `workdir` need not exist for the others, but the data must.

    Args:
      config: a config with the options of configs/nyu.py.
      workdir: the run's folder.

    Returns:
      The contents of results.json.

    Raises:
      UserError: an option or data that cannot work; RUN_DIFFERS or DATA_CHANGED for a workdir with another config or
        other data; FOLDER_IN_USE; NO_BEST_CHECKPOINT, or an error of `loop.fit`, if training diverges.
      Stopped: SIGTERM or Ctrl-C asked to stop; the step is saved.
    """
    start = time.monotonic()
    with progress.phase("opening the data"):
        run = setup(config)
    _check_alike(run)
    workdir = pathlib.Path(workdir).expanduser()
    with contextlib.ExitStack() as stack:
        processes.on_first(lambda: stack.enter_context(folder.held(workdir)))
        is_new = not processes.on_first(lambda: any((workdir / "checkpoints" / "latest").glob("*")))
        if is_new:  # a run that resumes needs its source no more
            pruning.check_source(run)
        processes.on_first(lambda: folder.claim(workdir, config, run.data))
        processes.on_first(lambda: stack.enter_context(logs.to_file(workdir / "log.txt")))
        if is_new:
            processes.on_first(lambda: groups.warn_of_target(config))
        saved = stack.enter_context(contextlib.closing(Checkpoints(workdir, owned=True)))
        evaluator = Evaluator(run)
        loop.fit(run, evaluator, workdir, saved)
        if saved.step("best") is None:
            raise UserError(
                "NO_BEST_CHECKPOINT",
                "validation was never finite, so there is no best checkpoint; keep sparsity.fixed_norm=True, or lower "
                "sparsity.lambda_ or optimizer.learning_rate, in another --workdir",
            )
        best = results.Best.load(run, saved)
        found = results.write(run, evaluator, workdir, best)
        processes.on_first(lambda: print(best.summary()))
        processes.on_first(lambda: _print_end(workdir, time.monotonic() - start, best))
        return found


def run_job(config, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Train; this is `train` under the name that every job has."""
    return train(config, workdir)


def _print_end(workdir: pathlib.Path, seconds: float, best: results.Best) -> None:
    print(f"\ndone in {text.duration(seconds)}\n{folder.to_open(workdir)}")
    if not best.is_dead:
        print(f"To remove the zero channels: --config=configs/run.py:{workdir} --job=compact")


def _check_alike(run: Run) -> None:
    """Raise UserError if another process of this run has other options or data than the first one."""
    ours = records.settings(json.loads(run.config.to_json())) | {
        "run.skip_not_finite": run.config.run.skip_not_finite,
        "the data": run.data.fingerprint,
    }
    theirs = processes.on_first(lambda: ours)

    def check():
        differing = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
        if json.loads(json.dumps(ours)) != theirs:
            raise UserError(
                "PROCESSES_DIFFER",
                f"expected the options and data of process 0, got others in process {jax.process_index()} "
                f"({', '.join(sorted(differing)[:3])}); start all processes with the same command",
            )

    processes.in_turn(check)

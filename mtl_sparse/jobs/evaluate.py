"""`--job=evaluate`: a run's best checkpoint on the test split, and its report again."""

import contextlib
import pathlib
from typing import Any

from mtl_sparse.runtime import processes
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.training import folder, results
from mtl_sparse.training.checkpoints import Checkpoints
from mtl_sparse.training.evaluation import Evaluator
from mtl_sparse.training.setup import setup


def run_job(config, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Evaluate the best checkpoint of a run on the test split and write its report again.

    Returns:
      The contents of results.json.

    Raises:
      UserError: RUN_NOT_FINISHED (results.json would mark it as finished), or as `folder.check`.
    """
    run = setup(config)
    workdir = pathlib.Path(workdir).expanduser()
    with contextlib.ExitStack() as stack:
        processes.on_first(lambda: folder.check(workdir, config, run.data))
        processes.on_first(lambda: stack.enter_context(folder.held(workdir)))
        saved = stack.enter_context(contextlib.closing(Checkpoints(workdir)))
        if saved.step("latest") is not None and not processes.on_first((workdir / "results.json").exists):
            processes.on_first(lambda: _check_ended(run, workdir, saved))
        found = results.write(run, Evaluator(run), workdir, results.Best.load(run, saved))
        processes.on_first(lambda: print(f"\n{folder.to_open(workdir)}"))
        return found


def _check_ended(run, workdir, saved) -> None:
    _, progress, checkpoint = saved.read("latest")
    if int(checkpoint.name) < run.total_steps and not progress.get("stopped"):
        raise UserError(
            "RUN_NOT_FINISHED",
            f"the run in {workdir} is at step {checkpoint.name} of {run.total_steps}; run its command again, which "
            "resumes and then evaluates it (metrics.jsonl has its validation so far)",
        )

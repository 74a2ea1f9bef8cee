"""`--job=report`: the report of a run from its records, or of several runs."""

import pathlib
from collections.abc import Sequence

from mtl_sparse import tasks as tasks_lib
from mtl_sparse.report import page, plots, records, run_page, tables
from mtl_sparse.report.schema import Results
from mtl_sparse.training import results


def run_job(config, workdir: str | pathlib.Path, folders: Sequence[str | pathlib.Path] = ()) -> None:
    """Write the report of a run, of a sweep, or of several runs and sweeps.

    For a run that has not finished, only the page is written.

    Args:
      config: the run's config; its tasks are used if the run has not finished.
      workdir: folder of the run or the sweep, where the report is written.
      folders: folders of runs and sweeps to report instead of `workdir`.

    Raises:
      UserError: there is no finished run.
    """
    workdir = pathlib.Path(workdir).expanduser()
    if folders or (workdir / "sweep.json").exists():
        page.write(folders or [workdir], workdir / "report")
        return
    if (workdir / "metrics.jsonl").exists() and not records.is_finished(workdir):
        print(run_page.write(workdir, results.headlines(tasks_lib.resolve(config))))
        return
    print(tables.run_table(Results.read(workdir / "results.json")))
    for path in (*plots.draw(workdir), run_page.write(workdir)):
        print(path)

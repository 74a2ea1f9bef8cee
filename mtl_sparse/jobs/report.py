"""`--job=report`: the report of a run from its records, or of several runs."""

import pathlib
from collections.abc import Sequence

from mtl_sparse.report import page, plots, tables
from mtl_sparse.report.schema import Results


def run_job(config, workdir: str | pathlib.Path, folders: Sequence[str | pathlib.Path] = ()) -> None:
    """Write the report of a run, of a sweep, or of several of both.

    Args:
      config: not used.
      workdir: of the run or the sweep; gets the report.
      folders: of runs and sweeps to report instead of `workdir`.

    Raises:
      UserError: there is no finished run.
    """
    del config
    workdir = pathlib.Path(workdir).expanduser()
    if folders or (workdir / "sweep.json").exists():
        page.write(folders or [workdir], workdir / "report")
        return
    print(tables.run_table(Results.read(workdir / "results.json")))
    for path in plots.draw(workdir):
        print(path)

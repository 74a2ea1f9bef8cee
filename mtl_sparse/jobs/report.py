"""`--job=report`: the report of a run from its records, or of several runs."""

import pathlib
from collections.abc import Sequence

from mtl_sparse.report import page, plots, tables
from mtl_sparse.runtime import files


def run_job(config, workdir: str | pathlib.Path, folders: Sequence[str | pathlib.Path] = ()) -> None:
    """Write the report of `folders`, or of the sweep or the run in `workdir`.

    Raises:
      UserError: there is no finished run.
    """
    del config
    workdir = pathlib.Path(workdir).expanduser()
    if folders or (workdir / "sweep.json").exists():
        page.write(folders or [workdir], workdir / "report")
        return
    print(tables.run_table(files.read_json(workdir / "results.json")))
    for path in plots.draw(workdir):
        print(path)

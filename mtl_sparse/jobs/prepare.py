"""`--job=prepare`: prepare the data and nothing else."""

import pathlib

from input_pipeline import datasets


def run_job(config, workdir: str | pathlib.Path) -> None:
    """Prepare the data of config.data for training, also on machines that cannot prepare data.

    Args:
      config: a config with the options of configs/nyu.py.
      workdir: not used.

    Raises:
      UserError: as `datasets.load`.
    """
    del workdir
    data = datasets.load(config.data)
    print(", ".join(f"{split}: {len(names)} images" for split, names in (data.names or {}).items()))

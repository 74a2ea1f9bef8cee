"""`--job=prepare`: prepare the data and nothing else."""

import pathlib

from input_pipeline import datasets


def run_job(config, workdir: str | pathlib.Path) -> None:
    """Prepare the data of config.data, so that machines that cannot prepare data can train on it."""
    del workdir
    data = datasets.load(config.data)
    print(", ".join(f"{split}: {len(names)} images" for split, names in data.names.items()))

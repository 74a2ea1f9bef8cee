"""The settings of a run that exists, by its folder, which is also the default --workdir:

python launch.py --config=configs/run.py:runs/demo --job=evaluate
"""

import json
import pathlib

from ml_collections import ConfigDict

from configs import nyu
from mtl_sparse.report import records
from mtl_sparse.runtime.errors import UserError


def get_config(folder: str = ""):
    path = pathlib.Path(folder).expanduser() / "config.json"
    if not folder or not path.is_file():
        raise UserError(f"{path} does not exist: name a run's folder, --config=configs/run.py:FOLDER")
    config = nyu.get_config()
    config.update_from_flattened_dict(records.EARLIER)
    _update(config, json.loads(path.read_text()))
    return config


def _update(config, values):
    """Takes over the values; what the run does not know keeps its default, and what says nothing is left out."""
    for name, value in values.items():
        if value in ("", []) and name not in config:  # a setting that is gone, and that the run did not use
            continue
        if name not in config or isinstance(value, dict) != isinstance(config[name], ConfigDict):
            raise UserError(
                f"config.json of that run has the setting {name!r} of another version of mtl-sparse: use that one"
            )
        if isinstance(value, dict):
            _update(config[name], value)
        else:
            config[name] = _tuples(value)


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

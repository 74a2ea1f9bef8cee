"""The config of an existing run, named by its folder, which is also the default --workdir.

python launch.py --config=configs/run.py:runs/demo --job=evaluate
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import nyu
from mtl_sparse.report import schema
from mtl_sparse.runtime import files
from mtl_sparse.runtime.errors import UserError


def get_config(folder: str = "") -> ConfigDict:
    """Return the config of a run.

    Args:
      folder: the run's folder.

    Raises:
      UserError: the folder has no config.json, or one with an option that this version does not have.
    """
    path = pathlib.Path(folder).expanduser() / "config.json"
    if not folder or not path.is_file():
        raise UserError("FILE_MISSING", f"{path} does not exist: name a run's folder, --config=configs/run.py:FOLDER")
    config = nyu.get_config()
    _update(config, schema.migrate("config", files.read_json(path)))
    return config


def _update(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Set the values of a run. Missing options keep their default; unknown options without a value are ignored."""
    for name, value in values.items():
        if value in ("", []) and name not in config:  # an option that was removed, and that the run did not use
            continue
        if name not in config or isinstance(value, dict) != isinstance(config[name], ConfigDict):
            raise UserError(
                "OPTION_UNKNOWN",
                f"config.json of that run has the option {name!r} of another version of mtl-sparse; use that version",
            )
        if isinstance(value, dict):
            _update(config[name], value)
        else:
            config[name] = _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

"""Where this project is installed: beside the package mtl_sparse are launch.py, configs/ and input_pipeline/."""

import importlib.util
import pathlib

from mtl_sparse.runtime.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]  # a clone of the repository, or site-packages


def check(*packages: str) -> None:
    """Check that Python finds these packages in `ROOT`, and no others of the same names. Imports none of them.

    Args:
      packages: "configs" or "input_pipeline", names that other projects have as well.

    Raises:
      UserError: Python finds another package of that name, or none.
    """
    for name in packages:
        spec = importlib.util.find_spec(name)
        folders = [pathlib.Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
        if [folder.resolve() for folder in folders] != [(ROOT / name).resolve()]:
            found = ", ".join(map(str, folders)) or (spec and spec.origin) or "nothing"
            raise UserError(
                "PACKAGE_SHADOWED",
                f"expected the package {name} of mtl-sparse in {ROOT}, got {found}; rename your package, or keep its "
                "folder out of sys.path, which begins with the folder of your script and PYTHONPATH",
            )

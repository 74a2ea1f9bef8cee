"""The command `mtl-sparse`: launch.py of the installed project, from any folder."""

import runpy
import sys

from mtl_sparse.runtime import installed
from mtl_sparse.runtime.errors import UserError


def main() -> None:
    """Run launch.py with the arguments of this process."""
    try:
        installed.check("configs", "input_pipeline")
    except UserError as error:
        print(f"error: {error} [{error.code}]", file=sys.stderr)
        sys.exit(2)
    runpy.run_path(str(installed.ROOT / "launch.py"), run_name="__main__")


if __name__ == "__main__":
    main()

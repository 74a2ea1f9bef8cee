"""Orbax checkpoints of a run: the latest ones, to go on from, and the best one by validation."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import traverse_util

from mtl_sparse.errors import UserError
from mtl_sparse.sparsity.groups import path_name

KINDS = ("latest", "best")


class Checkpoints:
    """`checkpoints/latest/<step>` and `checkpoints/best/<step>` below a run's folder.

    A checkpoint is a tree of arrays and a JSON dictionary. Saves are asynchronous and atomic; a save removes
    older ones only after it is complete.
    """

    def __init__(self, workdir: str | pathlib.Path):
        self.folder = pathlib.Path(workdir).expanduser().absolute() / "checkpoints"
        self._managers = {}

    def _manager(self, kind):
        if kind not in self._managers:
            self._managers[kind] = ocp.CheckpointManager(
                self.folder / kind,
                options=ocp.CheckpointManagerOptions(max_to_keep=2 if kind == "latest" else 1),
                # named so that a manager that has saved nothing yet can read what is there
                item_handlers={"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()},
            )
        return self._managers[kind]

    def step(self, kind: str) -> int | None:
        """Step of the newest checkpoint of a kind, None where there is none."""
        if not (self.folder / kind).is_dir():
            return None
        return self._manager(kind).latest_step()

    def save(self, kind: str, step: int, state: Any, progress: dict) -> None:
        """Starts saving `state` (a tree of host arrays) and `progress` (JSON values) as the one of `step`."""
        manager = self._manager(kind)
        if manager.latest_step() != step:
            tree = traverse_util.unflatten_dict(_flatten(state), sep="/")
            manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(tree), progress=ocp.args.JsonSave(progress)),
            )

    def restore(self, kind: str, like: Any) -> tuple[Any, dict]:
        """Newest checkpoint of a kind as (state, progress).

        Args:
          like: tree of arrays or jax.ShapeDtypeStruct: the state that the model of this config has.

        Raises:
          UserError: there is none, or it is of another model (with the first differing names).
        """
        step = self.step(kind)
        if step is None:
            raise UserError(f"no {kind} checkpoint in {self.folder}; train first with this --workdir")
        manager = self._manager(kind)
        like_leaves = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in _flatten(like).items()}
        saved = traverse_util.flatten_dict(manager.item_metadata(step)["state"].tree, sep="/")
        _check_same_model(self.folder / kind / str(step), saved, like_leaves)
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(traverse_util.unflatten_dict(like_leaves, sep="/")),
                progress=ocp.args.JsonRestore(),
            ),
        )
        leaves = traverse_util.flatten_dict(restored["state"], sep="/")
        state = jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], like)
        return state, restored["progress"]

    def read(self, kind: str, step: int) -> dict:
        """A checkpoint's state as it was saved: nested dictionaries of NumPy arrays."""
        manager = self._manager(kind)
        saved = traverse_util.flatten_dict(manager.item_metadata(step)["state"].tree, sep="/")
        like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in saved.items()}
        tree = traverse_util.unflatten_dict(like, sep="/")
        args = ocp.args.Composite(state=ocp.args.StandardRestore(tree))
        return jax.device_get(manager.restore(step, args=args)["state"])

    def wait(self) -> None:
        """Returns when every save has reached the disk."""
        for manager in self._managers.values():
            manager.wait_until_finished()

    def close(self) -> None:
        for manager in self._managers.values():
            manager.close()
        self._managers = {}


def read_variables(workdir: str | pathlib.Path, like) -> dict:
    """{"params", "batch_stats"} of a run's best checkpoint, as NumPy arrays, whatever its optimizer.

    Args:
      like: the variables that the model has, arrays or jax.ShapeDtypeStruct.

    Raises:
      UserError: there is none, or it is of another model.
    """
    saved = Checkpoints(workdir)
    try:
        step = saved.step("best")
        if step is None:
            raise UserError(f"no best checkpoint in {saved.folder}; train first with this --workdir")
        state = saved.read("best", step)
    finally:
        saved.close()
    found = {"params": state["params"]["model"], "batch_stats": state.get("batch_stats", {})}
    leaves = {f"params/{path}": leaf for path, leaf in _flatten(found["params"]).items()}
    leaves |= {f"batch_stats/{path}": leaf for path, leaf in _flatten(found["batch_stats"]).items()}
    _check_same_model(saved.folder / "best" / str(step), leaves, _flatten(like))
    return found


def _flatten(tree) -> dict[str, Any]:
    """Leaves of any tree by "/"-joined path: plain dictionaries are what a checkpoint outlives its classes with."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _check_same_model(folder, saved, like):
    saved = {name: tuple(leaf.shape) for name, leaf in saved.items()}
    like = {name: tuple(leaf.shape) for name, leaf in like.items()}
    if saved == like:
        return
    differing = [
        f"{name}: {saved.get(name, 'absent')} there, {like.get(name, 'absent')} here"
        for name in sorted(saved.keys() | like.keys())
        if saved.get(name) != like.get(name)
    ]
    shown = "; ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
    raise UserError(
        f"checkpoint {folder} is of another model than this config's ({shown}); "
        "use the config it was trained with, or another --workdir"
    )

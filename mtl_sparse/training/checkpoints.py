"""Orbax checkpoints of a run: the latest ones, to resume from, and the best one by validation."""

import errno
import json
import pathlib
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util

from mtl_sparse.runtime import processes
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.sparsity.groups import path_name

KINDS = ("latest", "best")
# Read errors that do not mean a damaged file: too many open files, no permission, an unmounted file system.
_OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ESTALE, errno.EIO, errno.ENOMEM)


class Checkpoints:
    """The checkpoints of a run, in `checkpoints/latest/<step>` and `checkpoints/best/<step>` of its folder.

    A checkpoint is a tree of arrays and a JSON dictionary, with a checksum of both; arrays of size 0 are not stored.
    Saves are asynchronous and atomic; a save removes older ones only after it is complete. Of several processes, the
    first one writes and reads, and sends what it reads to the others.
    """

    def __init__(self, workdir: str | pathlib.Path, *, owned: bool = False) -> None:
        """Open the checkpoints of a run; nothing is read or written yet.

        Args:
          workdir: the run's folder.
          owned: whether no other process writes here; then the remains of interrupted saves are removed.
        """
        self.folder = pathlib.Path(workdir).expanduser().absolute() / "checkpoints"
        self._owned = owned
        self._managers: dict[str, ocp.CheckpointManager] = {}

    def _manager(self, kind: str) -> ocp.CheckpointManager:
        if kind not in self._managers:
            (self.folder / kind).mkdir(parents=True, exist_ok=True)
            alone: dict[str, Any] = {"create": False}
            if jax.process_count() > 1:  # managers of different processes do not wait for each other
                me = jax.process_index()
                alone["multiprocessing_options"] = ocp.options.MultiprocessingOptions(me, {me}, f"{kind}{me}")
            self._managers[kind] = ocp.CheckpointManager(
                self.folder / kind,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=2 if kind == "latest" else 1,
                    cleanup_tmp_directories=self._owned,
                    # If a thread fails to create the folders, other threads wait for it forever. The long limit: orbax
                    # reads the wall clock, and a clock set forward during a save would end the run.
                    async_options=ocp.AsyncOptions(timeout_secs=10 * 86400, create_directories_asynchronously=False),
                    **alone,
                ),
                # Named, so that a manager that has saved nothing yet can read existing checkpoints.
                item_handlers={"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()},
            )
        return self._managers[kind]

    def step(self, kind: str) -> int | None:
        """Return the step of the newest checkpoint, None if there is none.

        Args:
          kind: "latest" or "best".
        """
        return processes.on_first(lambda: self._step(kind))

    def _step(self, kind):
        return next(iter(self._steps(kind)), None)

    def save(self, kind: str, step: int, state: Any, progress: dict) -> None:
        """Start saving a checkpoint. Does nothing if the newest one is of this step already.

        Args:
          kind: "latest" or "best".
          step: the step the checkpoint is of.
          state: tree of host arrays.
          progress: JSON values.

        Raises:
          OSError: this save or the one before could not be written.
          ValueError: the same, as orbax or tensorstore report it, see `errors.as_os_error`.
        """
        if not processes.is_first():
            return
        manager = self._manager(kind)
        if manager.latest_step() != step:
            leaves = {name: leaf for name, leaf in _flatten(state).items() if leaf.size}  # orbax refuses empty arrays
            tree = traverse_util.unflatten_dict(leaves, sep="/")
            progress = {**progress, "checksum": _checksum(leaves, progress)}
            manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(tree), progress=ocp.args.JsonSave(progress)),
            )

    def restore(self, kind: str, like: Any) -> tuple[Any, dict]:
        """Read the newest checkpoint as a state of this config's model.

        If it is damaged and there is an older one, moves it to `checkpoints/damaged` and reads the older one.

        Args:
          kind: "latest" or "best".
          like: tree of arrays or jax.ShapeDtypeStruct: the state of this config's model.

        Returns:
          (state, progress) as they were saved.

        Raises:
          UserError: CHECKPOINT_MISSING; CHECKPOINT_DAMAGED, if all are; CHECKPOINT_DIFFERS, if it is of another model,
            with the first differing names.
        """
        state = None

        def read():
            nonlocal state
            leaves, progress, folder = self.read(kind)
            wanted = _flatten(like)
            empty = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in wanted.items() if not leaf.size}
            leaves = {**empty, **leaves}
            _check_same_model(folder, _shapes(leaves), _shapes(wanted))
            state = jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], like)
            return progress

        progress = processes.on_first(read)
        if state is None:  # the first process has it
            state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        return processes.from_first(state), progress

    def read(self, kind: str) -> tuple[dict[str, np.ndarray], dict, pathlib.Path]:
        """Read the newest checkpoint of any model, in this process; see `restore` for a damaged one.

        Args:
          kind: "latest" or "best".

        Returns:
          (leaves by "/"-joined path, progress, folder of the checkpoint).

        Raises:
          UserError: CHECKPOINT_MISSING; CHECKPOINT_DAMAGED, if all are.
        """
        if not self._steps(kind):
            raise UserError(
                "CHECKPOINT_MISSING", f"there is no {kind} checkpoint in {self.folder}; train first with this --workdir"
            )
        damaged: dict[pathlib.Path, str] = {}
        for step in self._steps(kind):
            folder = self.folder / kind / str(step)
            try:
                found = *self._leaves(kind, step), folder
            except MemoryError:
                raise
            except Exception as error:  # orbax and tensorstore raise many types for damaged files
                if getattr(error, "errno", None) in _OF_THE_MACHINE:
                    raise
                damaged[folder] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            for other, reason in damaged.items():
                logging.warning("Checkpoint %s is damaged (%s): moved to %s", other, reason, self._put_aside(other))
            return found
        names = " and ".join(map(str, damaged))
        raise UserError(
            "CHECKPOINT_DAMAGED",
            f"checkpoint {names} is damaged ({next(iter(damaged.values()))}) and there is no other; restore a copy of "
            "it, or train in another --workdir",
        )

    def _steps(self, kind: str) -> list[int]:
        """Return the steps of the checkpoints of a kind, the newest first."""
        if not (self.folder / kind).is_dir():
            return []
        return sorted(self._manager(kind).all_steps(), reverse=True)

    def _leaves(self, kind: str, step: int) -> tuple[dict[str, np.ndarray], dict]:
        """Read one checkpoint: (leaves by their current paths, progress)."""
        manager = self._manager(kind)
        saved = traverse_util.flatten_dict(manager.item_metadata(step)["state"].tree, sep="/")
        like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in saved.items()}
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(traverse_util.unflatten_dict(like, sep="/")),
                progress=ocp.args.JsonRestore(),
            ),
        )
        leaves, progress = jax.device_get(traverse_util.flatten_dict(restored["state"], sep="/")), restored["progress"]
        if progress.pop("checksum", None) not in (
            None,
            _checksum(leaves, progress),
        ):  # None: written by an older version
            raise ValueError("its checksum differs")
        return _migrate(leaves), progress

    def _put_aside(self, folder: pathlib.Path) -> pathlib.Path:
        """Move a damaged checkpoint to `checkpoints/damaged`, and return its new path."""
        name = f"{folder.parent.name}_{folder.name}"
        (self.folder / "damaged").mkdir(exist_ok=True)
        others = len(list((self.folder / "damaged").glob(f"{name}*")))
        if folder.parent.name in self._managers:
            self._managers.pop(folder.parent.name).close()
        return folder.rename(self.folder / "damaged" / (f"{name}_{others}" if others else name))

    def wait(self) -> None:
        """Wait until every save is on the disk.

        Raises:
          OSError: a save could not be written.
          ValueError: a save could not be written, see `save`.
        """
        for manager in self._managers.values():
            manager.wait_until_finished()

    def close(self) -> None:
        """Finish pending saves and release everything. A save that failed is only logged here; `wait` raises it."""
        for manager in self._managers.values():
            try:
                manager.close()
            except Exception as error:
                logging.warning("The last save of %s failed: %s", manager.directory, error)
        self._managers = {}


def read_variables(workdir: str | pathlib.Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Read the model's variables from a run's best checkpoint, whatever its optimizer.

    Args:
      workdir: the run's folder.
      shapes: path -> shape of the model's variables, see `multitask.shapes`.

    Returns:
      {"params", "batch_stats"} as NumPy arrays.

    Raises:
      UserError: CHECKPOINT_MISSING, CHECKPOINT_DAMAGED or CHECKPOINT_DIFFERS, as `Checkpoints.restore`.
    """
    saved = Checkpoints(workdir)
    try:
        leaves, _, folder = saved.read("best")
    finally:
        saved.close()
    parts = {"params": "params/model/", "batch_stats": "batch_stats/"}
    found = {
        f"{part}/{name.removeprefix(prefix)}": leaf
        for part, prefix in parts.items()
        for name, leaf in leaves.items()
        if name.startswith(prefix)
    }
    _check_same_model(folder, _shapes(found), shapes)
    return {"batch_stats": {}, **traverse_util.unflatten_dict(found, sep="/")}


def _flatten(tree: Any) -> dict[str, Any]:
    """Return the leaves of any tree by "/"-joined path: plain dictionaries do not depend on the classes of the tree."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _migrate(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the leaves of an older optimizer state under the names of today's; leave others as they are."""
    old, new = "opt_state/inner_state/", {}
    if not any(name.startswith(f"{old}adam/") for name in leaves):
        return leaves
    norms = {}
    for name, leaf in leaves.items():
        if name.startswith(f"{old}kernel_norms/"):
            norms[name.removeprefix(f"{old}kernel_norms/")] = leaf
        else:
            renamed = name.replace(f"{old}adam/", f"{old}inner/", 1).replace("/peak_rate", "/peak_learning_rate")
            new[renamed] = leaf
    if norms:  # in the order of the parameters
        new[f"{old}norms"] = np.stack(jax.tree.leaves(traverse_util.unflatten_dict(norms, sep="/")))
    return new


def _shapes(leaves: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def _check_same_model(folder: pathlib.Path, saved: dict[str, tuple], like: dict[str, tuple]) -> None:
    if saved == like:
        return
    differing = [
        f"{name}: {saved.get(name, 'absent')} there, {like.get(name, 'absent')} in this config's model"
        for name in sorted(saved.keys() | like.keys())
        if saved.get(name) != like.get(name)
    ]
    shown = "; ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
    raise UserError(
        "CHECKPOINT_DIFFERS",
        f"expected a checkpoint of this config's model, got {folder} of another model ({shown}); use the config it was "
        "trained with, or another --workdir",
    )


def _checksum(leaves: dict[str, Any], progress: dict) -> int:
    """Return the CRC-32 of the JSON values, followed by the arrays in the order of their names."""
    value = zlib.crc32(json.dumps(progress, sort_keys=True).encode())
    for name in sorted(leaves):
        value = zlib.crc32(np.ascontiguousarray(leaves[name]).reshape(-1).view(np.uint8).data, value)
    return value

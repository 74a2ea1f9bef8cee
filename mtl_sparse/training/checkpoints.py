"""Orbax checkpoints of a run: the latest ones, to go on from, and the best one by validation."""

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
# Errors of reading that say nothing of the file: too many open ones, no permission, a file system that is away.
_OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ESTALE, errno.EIO, errno.ENOMEM)


class Checkpoints:
    """`checkpoints/latest/<step>` and `checkpoints/best/<step>` below a run's folder.

    A checkpoint is a tree of arrays and a JSON dictionary, with a checksum of both. Saves are asynchronous and
    atomic; a save removes older ones only after it is complete. Of several processes the first one writes and reads,
    and tells the others.
    """

    def __init__(self, workdir: str | pathlib.Path, *, owned: bool = False):
        """Args: workdir; owned, whether no other process writes here: then what killed saves have left is removed."""
        self.folder = pathlib.Path(workdir).expanduser().absolute() / "checkpoints"
        self._owned = owned
        self._managers = {}

    def _manager(self, kind):
        if kind not in self._managers:
            (self.folder / kind).mkdir(parents=True, exist_ok=True)
            alone = {"create": False}
            if jax.process_count() > 1:  # each process for itself
                me = jax.process_index()
                alone["multiprocessing_options"] = ocp.options.MultiprocessingOptions(me, {me}, f"{kind}{me}")
            self._managers[kind] = ocp.CheckpointManager(
                self.folder / kind,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=2 if kind == "latest" else 1,
                    cleanup_tmp_directories=self._owned,
                    # Made in a thread, folders that cannot be made leave other threads waiting for them. Time is taken
                    # from the clock: with a short limit, one that is set forward during a save would end the run.
                    async_options=ocp.AsyncOptions(timeout_secs=10 * 86400, create_directories_asynchronously=False),
                    **alone,
                ),
                # named so that a manager that has saved nothing yet can read what is there
                item_handlers={"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()},
            )
        return self._managers[kind]

    def step(self, kind: str) -> int | None:
        """Step of the newest checkpoint of a kind, None where there is none."""
        return processes.on_first(lambda: self._step(kind))

    def _step(self, kind):
        return next(iter(self._steps(kind)), None)

    def save(self, kind: str, step: int, state: Any, progress: dict) -> None:
        """Starts saving `state` (a tree of host arrays) and `progress` (JSON values) as the one of `step`.

        Raises:
          ValueError or OSError: of the library, where this save, or the one before, could not be written.
        """
        if not processes.is_first():
            return
        manager = self._manager(kind)
        if manager.latest_step() != step:
            leaves = _flatten(state)
            tree = traverse_util.unflatten_dict(leaves, sep="/")
            progress = {**progress, "checksum": _checksum(leaves, progress)}
            manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(tree), progress=ocp.args.JsonSave(progress)),
            )

    def restore(self, kind: str, like: Any) -> tuple[Any, dict]:
        """Newest checkpoint of a kind as (state, progress).

        One that is damaged is put aside, into `checkpoints/damaged`, where there is another, which is taken.

        Args:
          like: tree of arrays or jax.ShapeDtypeStruct: the state that the model of this config has.

        Raises:
          UserError: there is none, it is of another model (with the first differing names), or none is whole.
        """
        state = None

        def read():
            nonlocal state
            leaves, progress, folder = self.read(kind)
            _check_same_model(folder, _shapes(leaves), _shapes(_flatten(like)))
            state = jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], like)
            return progress

        progress = processes.on_first(read)
        if state is None:  # another process has it
            state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        return processes.from_first(state), progress

    def read(self, kind: str) -> tuple[dict[str, np.ndarray], dict, pathlib.Path]:
        """Newest checkpoint of a kind as it was saved, see `restore`: (leaves by path, progress, its folder)."""
        if not self._steps(kind):
            raise UserError(f"no {kind} checkpoint in {self.folder}; train first with this --workdir")
        damaged = {}
        for step in self._steps(kind):
            folder = self.folder / kind / str(step)
            try:
                found = *self._leaves(kind, step), folder
            except MemoryError:
                raise
            except Exception as error:  # whatever a library says of damaged files
                if getattr(error, "errno", None) in _OF_THE_MACHINE:
                    raise
                damaged[folder] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            for other, reason in damaged.items():
                logging.warning("Checkpoint %s is damaged (%s): it is now %s", other, reason, self._put_aside(other))
            return found
        names = " and ".join(map(str, damaged))
        raise UserError(
            f"checkpoint {names} is damaged ({next(iter(damaged.values()))}) and there is no other; put a copy of it "
            "back, or train in another --workdir"
        )

    def _steps(self, kind):
        """Steps of the checkpoints of a kind, the newest first."""
        if not (self.folder / kind).is_dir():
            return []
        return sorted(self._manager(kind).all_steps(), reverse=True)

    def _leaves(self, kind, step):
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
        if progress.pop("checksum", None) not in (None, _checksum(leaves, progress)):  # None: of an older version
            raise ValueError("its checksum differs")
        return _migrate(leaves), progress

    def _put_aside(self, folder):
        """Moves a damaged checkpoint out of the way of those to come; returns where it is."""
        name = f"{folder.parent.name}_{folder.name}"
        (self.folder / "damaged").mkdir(exist_ok=True)
        others = len(list((self.folder / "damaged").glob(f"{name}*")))
        if folder.parent.name in self._managers:
            self._managers.pop(folder.parent.name).close()
        return folder.rename(self.folder / "damaged" / (f"{name}_{others}" if others else name))

    def wait(self) -> None:
        """Returns when every save has reached the disk; raises as `save` does where one has not."""
        for manager in self._managers.values():
            manager.wait_until_finished()

    def close(self) -> None:
        """Ends what is under way. It raises nothing: `wait` is what tells of a save that failed."""
        for manager in self._managers.values():
            try:
                manager.close()
            except Exception as error:
                logging.warning("The last save of %s failed: %s", manager.directory, error)
        self._managers = {}


def read_variables(workdir: str | pathlib.Path, shapes: dict[str, tuple[int, ...]]) -> dict:
    """{"params", "batch_stats"} of a run's best checkpoint, as NumPy arrays, whatever its optimizer.

    Args:
      shapes: of the variables that the model has, by path, as `multitask.shapes` gives them.

    Raises:
      UserError: there is none, it is damaged, or it is of another model.
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


def _flatten(tree) -> dict[str, Any]:
    """Leaves of any tree by "/"-joined path: plain dictionaries are what a checkpoint outlives its classes with."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _migrate(leaves):
    """Return leaves by path under the names of today's optimizer state; those of today as they are."""
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
    in_order = jax.tree.leaves(traverse_util.unflatten_dict(norms, sep="/"))  # the order of the parameters
    new[f"{old}norms"] = np.stack(in_order) if in_order else np.zeros([0], np.float32)
    return new


def _shapes(leaves):
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def _check_same_model(folder, saved, like):
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


def _checksum(leaves, progress) -> int:
    """CRC-32 of the JSON values, and of the arrays one after the other by name."""
    value = zlib.crc32(json.dumps(progress, sort_keys=True).encode())
    for name in sorted(leaves):
        value = zlib.crc32(np.ascontiguousarray(leaves[name]).reshape(-1).view(np.uint8), value)
    return value

"""Exact compaction of a multi-task model: removal of everything that zero groups make useless.

A group is an input channel of one convolution. A channel that no layer reads is removed together with the filter and
the BatchNorm entry that produce it. The channels of the residual stream are ordered so that those that are needed
longest come first: every block carries a prefix of them, and the channels that one layer needs lie in few ranges, which
it gathers by slices. The output of a convolution without non-zero inputs is a constant, which is folded into what
follows. In evaluation mode the outputs stay the same up to rounding.

Compaction has three steps: `tracing` finds what is needed, `ordering` orders the residual streams, and `building`
writes the new model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from mtl_sparse.compaction import building, liveness, ordering, tracing
from mtl_sparse.compaction.weights import Weights
from mtl_sparse.models import multitask, resnet
from mtl_sparse.models import widths as widths_lib
from mtl_sparse.runtime import text
from mtl_sparse.runtime.errors import UserError


def compact(
    model: multitask.MultiTaskModel,
    variables: Mapping[str, Any],
    *,
    tasks: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    multiple: int = 1,
    costs: liveness.Costs | None = None,
) -> tuple[multitask.MultiTaskModel, dict[str, Any]]:
    """Return the physically smaller model with the same outputs, and its variables.

    With `tasks`, the other heads are removed, together with everything that only they read.

    Args:
      model: dense or compact already. Heads of a kind that is not the project's stay as they are.
      variables: {"params", "batch_stats"} of the model.
      tasks: names of the tasks whose heads remain, in the order of the model; None is all.
      size: (height, width) of the images. If given, the atrous taps that would meet only padding at this size (and at
        any smaller one) are removed, too.
      multiple: widths are filled up to a multiple of it with channels that are not needed.
      costs: costs that decide where gathering channels pays; by default as measured on a CPU.

    Returns:
      (model, variables): the model with its `widths` set, and NumPy arrays of the dtype they had.

    Raises:
      UserError: the model is not a MultiTaskModel, the variables belong to another model, the multiple is below 1, or
        as `choose_tasks`.
    """
    if not isinstance(model, multitask.MultiTaskModel):
        raise UserError("MODEL_UNSUPPORTED", f"expected a MultiTaskModel to compact, got {type(model).__name__}")
    if multiple < 1:
        raise UserError("OPTION_OUT_OF_RANGE", f"expected compact.multiple >= 1, got compact.multiple={multiple}")
    _check_fits(model, variables)
    if tasks is not None:
        model, variables = with_tasks(model, variables, tasks)
    feature_size = None
    if size is not None:
        height, width = size
        feature_size = -(-height // resnet.OUTPUT_STRIDE), -(-width // resnet.OUTPUT_STRIDE)
    options = building.Options(multiple, costs or liveness.Costs(), feature_size)
    small, weights = _compact(model, Weights.from_variables(variables), options)
    return small, weights.to_variables()


def _compact(
    model: multitask.MultiTaskModel, weights: Weights, options: building.Options
) -> tuple[multitask.MultiTaskModel, Weights]:
    traced = tracing.trace(model, weights)
    streams = ordering.order_streams(traced, options.multiple)
    widths, written = _build(model, weights, options, traced, streams)
    small = model.clone(widths=widths)
    # A constant folded into a convolution can be zero there: then the heads that read its raw output need less of it.
    if widths != model.widths and any(np.any(tracing.zero_features(written, point)) for point in set(model.points())):
        return _compact(small, written, options)
    return small, written


def choose_tasks(tasks: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Return the tasks whose heads remain, in the order of `known`.

    Args:
      tasks: their names, in any order.
      known: the tasks of the model.

    Raises:
      UserError: a name is unknown or repeated, there is none, or `tasks` is a string.
    """
    names = ", ".join(known)
    if isinstance(tasks, str):
        raise UserError("OPTION_TYPE", f"expected tasks to be a sequence of names, got {tasks!r}; pass ({tasks!r},)")
    if not tasks:
        raise UserError(
            "OPTION_MISSING", f"expected at least one task in compact.tasks, got none; name some of {names}"
        )
    for task in tasks:
        if task not in known:
            near = ", ".join(text.nearest(task, known))
            raise UserError(
                "TASK_UNKNOWN",
                f"expected compact.tasks to name tasks of the model ({names}), got {task!r}; "
                + (f"nearest: {near}" if near else "name some of these"),
            )
        if list(tasks).count(task) > 1:
            raise UserError(
                "TASK_REPEATED", f"expected each task once in compact.tasks, got {task!r} more than once; name it once"
            )
    return tuple(task for task in known if task in tasks)


def with_tasks(
    model: multitask.MultiTaskModel, variables: Mapping[str, Any], tasks: Sequence[str]
) -> tuple[multitask.MultiTaskModel, dict[str, Any]]:
    """Return the model without the heads of other tasks and without the blocks after its last attachment point.

    Args:
      model: a model with any backbone; a compact one only with a ResNet.
      variables: {"params", "batch_stats"} of the model.
      tasks: names of the tasks whose heads remain.

    Returns:
      (model, variables).

    Raises:
      UserError: as `choose_tasks`, or the model is a compact one of another backbone.
    """
    if not isinstance(model, multitask.MultiTaskModel):
        raise UserError(
            "MODEL_UNSUPPORTED",
            "expected a dense model to drop tasks from, got a compact one; name compact.tasks for the original run",
        )
    kept = choose_tasks(tasks, [task for task, *_ in model.heads])
    chosen = [i for i, (task, *_) in enumerate(model.heads) if task in kept]
    attach = tuple(model.attach[i] for i in chosen) if model.attach else ()
    fewer = model.clone(heads=tuple(model.heads[i] for i in chosen), attach=attach, widths=None)
    if model.widths is not None:
        blocks = model.widths.blocks[: len(fewer.layers().blocks)]
        heads = tuple(model.widths.heads[i] for i in chosen)
        fewer = fewer.clone(widths=widths_lib.Widths(model.widths.stem, blocks, heads, attach))
    flat = traverse_util.flatten_dict(dict(variables), sep="/")
    return fewer, traverse_util.unflatten_dict({path: flat[path] for path in multitask.shapes(fewer)}, sep="/")


def _build(
    model: multitask.MultiTaskModel,
    weights: Weights,
    options: building.Options,
    traced: tracing.Traced,
    streams: tuple[ordering.Kept, ...],
) -> tuple[widths_lib.Widths, Weights]:
    """Return the widths and the weights of the compact model."""
    builder, layers = building.Builder(weights, options), model.layers()
    stem = builder.stem(layers.stem, traced.stem, streams[0].channels)
    kept_at, blocks = dict(zip(traced.points, streams, strict=True)), []
    for i, old in enumerate(layers.blocks):
        block, inner = builder.block(traced.points[i + 1], old, traced.blocks[i], streams[i].channels, streams[i + 1])
        blocks.append(block)
        kept_at |= inner
    nothing = ordering.Kept(np.arange(0), 0)
    heads = tuple(
        builder.head(task, old, part, kept_at.get(point, nothing))
        for (task, *_), old, part, point in zip(model.heads, layers.heads, traced.heads, model.points(), strict=True)
    )
    return widths_lib.Widths(stem, tuple(blocks), heads, model.attach), builder.written


def _check_fits(model: multitask.MultiTaskModel, variables: Mapping[str, Any]) -> None:
    expected = multitask.shapes(model)
    given = {"/".join(path): np.shape(leaf) for path, leaf in traverse_util.flatten_dict(dict(variables)).items()}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise UserError(
                "MODEL_DIFFERS",
                f"expected the variables of this model, with {name} of shape {expected.get(name, 'absent')}, got "
                f"{given.get(name, 'absent')}; pass the variables together with their own model",
            )

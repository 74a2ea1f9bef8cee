"""Exact compaction of a multi-task model: removal of everything that zero groups make useless.

A group is an input channel of one convolution. A channel that no layer reads is removed together with the filter and
the BatchNorm entry that produce it. The channels of the residual stream are ordered so that those that are needed
longest come first: every block carries a prefix of them, and the channels that one layer needs lie in few ranges, which
it gathers by slices. The output of a convolution without live inputs is a constant, which is folded into what follows.
In evaluation mode the outputs stay the same up to rounding.

Compaction has three steps: `tracing` finds what is needed, `ordering` orders the residual streams, and `building`
writes the new model.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from mtl_sparse.compaction import building, liveness, ordering, tracing
from mtl_sparse.compaction.weights import Weights
from mtl_sparse.models import multitask, resnet
from mtl_sparse.models import widths as widths_lib
from mtl_sparse.runtime.errors import UserError


def compact(
    model: multitask.MultiTaskModel,
    variables: Mapping[str, Any],
    *,
    size: tuple[int, int] | None = None,
    multiple: int = 1,
    costs: liveness.Costs | None = None,
) -> tuple[multitask.MultiTaskModel, dict[str, Any]]:
    """Return the physically smaller model with the same outputs, and its variables.

    Args:
      model: dense or compact already. Heads of a kind that is not the project's stay as they are.
      variables: {"params", "batch_stats"} of the model.
      size: (height, width) of the images. If given, the atrous taps that would meet only padding at this size (and at
        any smaller one) are removed, too.
      multiple: widths are filled up to a multiple of it with channels that are not needed.
      costs: costs that decide where gathering channels pays; by default as measured on a CPU.

    Returns:
      (model, variables): the model with its `widths` set, and NumPy arrays of the dtype they had.

    Raises:
      UserError: the model is not a MultiTaskModel, the variables belong to another model, or the multiple is below 1.
    """
    if not isinstance(model, multitask.MultiTaskModel):
        raise UserError("MODEL_UNSUPPORTED", f"expected a MultiTaskModel to compact, got {type(model).__name__}")
    if multiple < 1:
        raise UserError("OPTION_OUT_OF_RANGE", f"expected compact.multiple >= 1, got compact.multiple={multiple}")
    _check_fits(model, variables)
    weights = Weights.from_variables(variables)
    feature_size = None
    if size is not None:
        height, width = size
        feature_size = -(-height // resnet.OUTPUT_STRIDE), -(-width // resnet.OUTPUT_STRIDE)
    options = building.Options(multiple, costs or liveness.Costs(), feature_size)

    traced = tracing.trace(model, weights)
    streams = ordering.order_streams(traced, multiple)
    widths, written = _build(model, weights, options, traced, streams)
    return model.clone(widths=widths), written.to_variables()


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

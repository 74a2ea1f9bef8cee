"""What compaction removed from each layer, and why."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_sparse.compaction import channels, groups
from mtl_sparse.compaction.rewritten import Model
from mtl_sparse.models import atrous, backbones, costs, deeplab, multitask, resnet
from mtl_sparse.models import widths as widths_lib
from mtl_sparse.sparsity import stats
from mtl_sparse.sparsity.groups import by_path


def explain(
    model: Model,
    variables: Mapping[str, Any],
    small: Model,
    small_variables: Mapping[str, Any],
    size: tuple[int, int],
) -> list[dict[str, Any]]:
    """Explain what compaction did to each layer.

    Args:
      model: the model before compaction.
      variables: its variables.
      small: the compact model. It may have fewer tasks.
      small_variables: its variables.
      size: (height, width) of the images.

    Returns:
      For each layer of `model`: "layer" (path), "groups" and how many of them are "zero", "groups_after", "zero_after",
      "parameters" and "parameters_after" of the kernel, "macs" and "macs_after" for one image, and "why": what was
      removed, or why zero channels remain.
    """
    before, after = costs.layers(model, size), costs.layers(small, size)
    is_resnet = isinstance(small, multitask.MultiTaskModel) and small.backbone == backbones.RESNET
    axes = {} if is_resnet else _axes(model, size)
    zeros, zeros_after = _zero_groups(variables, axes), _zero_groups(small_variables, axes)
    reads, constants = _reads(small) if is_resnet else ({}, set())
    kept = {task for task, *_ in small.heads}
    dropped = tuple(f"head_{task}/" for task, *_ in model.heads if task not in kept)
    rows = []
    for layer, old in before.items():
        new = after.get(layer)
        axis = axes.get(layer, -2)
        row = {
            "layer": layer,
            "groups": old.kernel[axis],
            "zero": zeros.get(layer, 0),
            "groups_after": new.kernel[axis] if new else 0,
            "zero_after": zeros_after.get(layer, 0),
            "parameters": old.parameters,
            "parameters_after": new.parameters if new else 0,
            "macs": old.macs,
            "macs_after": new.macs if new else 0,
        }
        why = "removed: its task was dropped" if layer.startswith(dropped) else _why(row, old, new, reads, constants)
        rows.append(row | {"why": why})
    return rows


def _axes(model: Any, size: tuple[int, int]) -> dict[str, int]:
    """Return the axis of the groups of each layer's kernel, by the layer's path."""
    images = jnp.zeros((1, *size, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images))

    def apply(variables: Any, images: Any) -> Any:
        return model.apply(variables, images)

    with atrous.plain_convolutions():
        found = groups.axes(channels.of(apply, variables, images))
    return {path.removeprefix("params/").removesuffix("/kernel"): axis for path, axis in found.items()}


def _zero_groups(variables: Mapping[str, Any], axes: Mapping[str, int]) -> dict[str, int]:
    """Return the number of zero groups of each convolution, by its path."""
    kernels = [path for path, leaf in by_path(variables["params"]).items() if leaf.ndim == 4]
    if not kernels:
        return {}
    rules = {re.escape(path): axes.get(path.removesuffix("/kernel"), -2) for path in kernels}
    found = stats.sparsity(variables["params"], "all", rules)
    return {entry.path.removesuffix("/kernel"): entry.zero_groups for entry in found.layers}


def _reads(model: multitask.MultiTaskModel) -> tuple[dict[str, widths_lib.Ranges | None], set[str]]:
    """Return (the ranges that each layer reads of the stream or the image, None for all; layers that read a constant).

    Layers inside a block or a head, which read everything in front of them, are not in the ranges.
    """
    layers = model.layers()
    reads: dict[str, widths_lib.Ranges | None] = {"backbone/stem_conv1": layers.stem.reads}
    constants = {f"backbone/stem_conv{layers.stem.dead + 1}"} if layers.stem.dead else set()
    for place, block in zip(resnet.places(model.depth), layers.blocks, strict=False):
        reads[f"backbone/{place.name}/conv1"] = block.reads
        reads[f"backbone/{place.name}/downsample_conv"] = block.shortcut_reads
        if block.dead or block.reads == ():
            constants.add(f"backbone/{place.name}/conv{block.dead + 1}")
    for (task, *_), head in zip(model.heads, layers.heads, strict=True):
        if head is not None:
            names: tuple[str, ...] = ("conv",) if isinstance(head, widths_lib.Classifier) else deeplab.BRANCHES
            reads |= {f"head_{task}/{name}": ranges for name, ranges in zip(names, head.reads, strict=True)}
            if head.dead:
                constants.add(f"head_{task}/conv")
    return reads, constants


def _why(
    row: Mapping[str, Any],
    old: costs.LayerCost,
    new: costs.LayerCost | None,
    reads: Mapping[str, widths_lib.Ranges | None],
    constants: set[str],
) -> str:
    """Return the "why" of a row of `explain`."""
    layer, parts = row["layer"], []
    if new is None:
        return (
            "removed: all inputs zero"
            if row["zero"] == row["groups"]
            else "removed: its output is constant or not read"
        )
    if layer in constants:
        return "reads a constant: the layers before it are dead"
    if new.kernel[:2] != old.kernel[:2]:
        parts.append(f"taps {'x'.join(map(str, new.kernel[:2]))} of {'x'.join(map(str, old.kernel[:2]))}")
    ranges = reads.get(layer)
    if ranges is not None:
        parts.append(f"gathers {len(ranges)} range{'s' if len(ranges) > 1 else ''}: other layers read more")
    if row["zero_after"]:
        in_place = layer in reads and ranges is None
        reason = "a gather would cost more" if in_place else "they fill gaps or a multiple"
        if not reads:  # not a ResNet
            reason = "other layers read them, or they fill a multiple"
        parts.append(f"{row['zero_after']} zero stay: {reason}")
    return "; ".join(parts)


def compare_sentence(
    rows: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], small_variables: Mapping[str, Any]
) -> str:
    """Return a sentence with the parameters and MACs before and after compaction.

    Args:
      rows: the result of `explain`.
      variables: the model's variables before compaction.
      small_variables: the compact model's variables.

    Returns:
      The sentence.
    """
    before, after = costs.parameter_count(variables), costs.parameter_count(small_variables)

    def macs(part: str) -> str:
        both = [sum(row[key] for row in rows if row["layer"].startswith(part)) / 1e6 for key in ("macs", "macs_after")]
        fewer = f" ({both[0] / both[1]:.1f}x fewer)" if both[1] else ""
        return f"{both[0]:,.1f} M MACs became {both[1]:,.1f} M{fewer}"

    return f"{before:,} parameters became {after:,}, {macs('')}, in the backbone {macs('backbone/')}"

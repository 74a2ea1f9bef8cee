"""What compaction removed from each layer, and why."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mtl_sparse.models import costs, deeplab, multitask, resnet
from mtl_sparse.models import widths as widths_lib
from mtl_sparse.sparsity import stats


def explain(
    model: multitask.MultiTaskModel,
    variables: Mapping[str, Any],
    small: multitask.MultiTaskModel,
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
    zeros, zeros_after = _zero_groups(variables), _zero_groups(small_variables)
    reads, constants = _reads(small)
    kept = {task for task, *_ in small.heads}
    dropped = tuple(f"head_{task}/" for task, *_ in model.heads if task not in kept)
    rows = []
    for layer, old in before.items():
        new = after.get(layer)
        row = {
            "layer": layer,
            "groups": old.kernel[-2],
            "zero": zeros.get(layer, 0),
            "groups_after": new.kernel[-2] if new else 0,
            "zero_after": zeros_after.get(layer, 0),
            "parameters": old.parameters,
            "parameters_after": new.parameters if new else 0,
            "macs": old.macs,
            "macs_after": new.macs if new else 0,
        }
        why = "removed: its task was dropped" if layer.startswith(dropped) else _why(row, old, new, reads, constants)
        rows.append(row | {"why": why})
    return rows


def _zero_groups(variables: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of zero input channels of each convolution, by its path."""
    if not any(leaf.ndim == 4 for leaf in jax.tree.leaves(variables["params"])):
        return {}
    found = stats.sparsity(variables["params"], "all")
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
        parts.append(f"{row['zero_after']} zero stay: {reason}")
    return "; ".join(parts)


def compare_sentence(
    rows: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], small_variables: Mapping[str, Any]
) -> str:
    """Return a sentence with the parameters and MACs before and after compaction.

    Args:
      rows: from `explain`.
      variables: of the model before compaction.
      small_variables: of the compact model.

    Returns:
      The sentence.
    """
    before, after = costs.parameter_count(variables), costs.parameter_count(small_variables)

    def macs(part: str) -> str:
        both = [sum(row[key] for row in rows if row["layer"].startswith(part)) / 1e6 for key in ("macs", "macs_after")]
        fewer = f" ({both[0] / both[1]:.1f}x fewer)" if both[1] else ""
        return f"{both[0]:,.1f} M MACs became {both[1]:,.1f} M{fewer}"

    return f"{before:,} parameters became {after:,}, {macs('')}, in the backbone {macs('backbone/')}"

"""Tables of one run as Markdown that reads as text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mtl_sparse.models import layers as layer_names
from mtl_sparse.report.schema import SIZE_TARGETS, CompactLayer, Results, RunSparsity, TimingRow


def run_table(results: Results) -> str:
    """Return each test metric beside that of the constant baseline, and a sentence on sparsity."""
    headline = {entry.metric for entry in results.headlines.values()}
    head, *lines = metric_rows(results)
    shown = [(task, f"**{name}**" if f"{task}/{name}" in headline else name, *cells) for task, name, *cells in lines]
    return f"{markdown([head, *shown])}\n\n{run_sentence(results)}"


def metric_rows(results: Results) -> list[tuple[str, ...]]:
    """Return a head, and each test metric beside that of the constant baseline."""
    rows: list[tuple[str, ...]] = [("task", "metric", "test", "constant baseline")]
    for name, value in results.test.items():
        task, metric = name.split("/", 1)
        if metric != "loss":
            rows.append((task, metric, f"{value:.4f}", f"{results.constant[name]:.4f}"))
    return rows


def run_sentence(results: Results) -> str:
    """Return what is zero, what compaction leaves, and the step of the best checkpoint."""
    sentence = sparsity_sentences(results.sparsity) + _size_sentence(results)
    return f"{sentence}; best validation at step {results.step}"


def _size_sentence(results: Results) -> str:
    """Return what compaction leaves, for a run whose target is about it."""
    targets, text = results.config.get("sparsity", {}), ""
    for option, key, what in SIZE_TARGETS:
        if targets.get(option, 0) > 0 and results.size is not None:
            left = getattr(results.size.compact, key) / getattr(results.size.trained, key)
            text += f"; {100 * left:.1f} % of the {what} left after compaction (target {100 * targets[option]:.1f} %)"
    return text


def sparsity_sentences(sparsity: RunSparsity) -> str:
    """Return what is zero, the target, and the layers and blocks without a non-zero group."""
    target = f" (target {100 * sparsity.target:.1f} %)" if sparsity.target else ""
    text = f"{100 * sparsity.group:.1f} % of groups zero"
    if sparsity.penalty == "l1" and sparsity.weight is not None:
        text = f"{100 * sparsity.weight:.1f} % of weights zero{target}; {text}"
    else:
        text += target
    text += (
        f", {100 * sparsity.parameter:.1f} % of the penalized weights in them, lambda {sparsity.lambda_:.2g}; "
        f"{len(sparsity.layers)} conv layers"
    )
    if sparsity.coupled:
        text += f", {len(sparsity.coupled)} sets of coupled groups"
    for name, dead in (("layers", sparsity.dead_layers), ("blocks", sparsity.dead_blocks)):
        if dead:
            text += f", dead {name}: {', '.join(map(layer_names.short, dead))}"
    return text


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first of them the head, as a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def speed_table(rows: Iterable[TimingRow | Mapping[str, Any]]) -> str:
    """Return timings as a Markdown table; for `rows`, see `speed_rows`."""
    return markdown(speed_rows(rows))


def speed_rows(rows: Iterable[TimingRow | Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return a head and timings.

    Args:
      rows: rows of a `Timing`, or as `compaction.speed.compare` returns them. Speed-up and MAC ratio are relative to
        the first model of the same part and batch size.
    """
    head = ("part", "batch", "model", "median ms", "p90 ms", "speed-up", "images/s", "MACs", "MAC ratio", "GMAC/s")
    lines: list[tuple[str, ...]] = [(*head, "parameters", "memory MiB")]
    first: dict[tuple[str, int], TimingRow] = {}
    for row in (TimingRow.from_json(row) if isinstance(row, Mapping) else row for row in rows):
        dense = first.setdefault((row.part, row.batch), row)
        lines.append(
            (
                row.part,
                str(row.batch),
                row.model,
                f"{row.median_ms:.2f}",
                f"{row.p90_ms:.2f}",
                f"{row.speedup:.2f}x",
                f"{row.images_per_second:.1f}",
                f"{row.macs / 1e6:,.1f} M",
                f"{dense.macs / max(row.macs, 1):.2f}x",
                f"{row.gmacs_per_second:.1f}",
                f"{row.parameters:,}",
                f"{row.memory_mib:.1f}",
            )
        )
    return lines


def compact_table(rows: Iterable[CompactLayer | Mapping[str, Any]]) -> str:
    """Return what compaction did to each layer as a Markdown table with a total; for `rows`, see `compact_rows`."""
    return markdown(compact_rows(rows))


def compact_rows(rows: Iterable[CompactLayer | Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return a head, what compaction did to each layer, and a total.

    Args:
      rows: rows of compact.json, or as `compaction.explain.explain` returns them.
    """
    layers = [CompactLayer.from_json(row) if isinstance(row, Mapping) else row for row in rows]
    names = ("groups", "zero", "groups_after", "zero_after", "parameters", "parameters_after", "macs", "macs_after")
    total = CompactLayer(layer="all", why="", **{name: sum(getattr(row, name) for row in layers) for name in names})
    head = ("layer", "groups", "zero", "left", "of them zero", "parameters", "left", "MACs (M)", "left", "change")
    lines: list[tuple[str, ...]] = [head]
    for row in [*layers, total]:
        counts = (row.groups, row.zero, row.groups_after, row.zero_after, row.parameters, row.parameters_after)
        millions = (row.macs / 1e6, row.macs_after / 1e6)
        lines.append((row.layer, *(f"{n:,}" for n in counts), *(f"{macs:,.2f}" for macs in millions), row.why))
    return lines

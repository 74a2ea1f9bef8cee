"""The records of benchmarks/gpu.py as tables, and docs/gpu.md."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtl_sparse.report.tables import markdown

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "gpu.md"
HEAD = """# On a GPU

{devices}, JAX {versions}, {dates}. Times are medians of alternating rounds; ratios are taken within a round, with their
10 to 90 % range.

```bash
python -m benchmarks.gpu             # continues where it stopped; --parts NAME ..., --seconds 540
python -m benchmarks.gpu --render    # writes this page from docs/benchmarks/gpu/*.json
```

**Does the demo train?** On 2026-11-27, with JAX 0.11.2 on an H200, at first it did not: XLA aborted when it compiled
the evaluation (`triton_tiling_propagation.cc: Check failed: subdim_size_accumulator == dim_size`,
[openxla/xla issue 47381](https://github.com/openxla/xla/issues/47381)). With
`XLA_FLAGS=--xla_gpu_enable_triton_gemm=false` it trained: 198 of 550 steps, 61.6 % of the groups zero, validation mIoU
0.36. The run was stopped there (log: docs/benchmarks/gpu/demo.txt). `launch.py` and these benchmarks now set this flag;
in a notebook, call `mtl_sparse.runtime.environment.tune()` before JAX starts. The flag's cost in speed has not been
measured; the tables below were made without it. setup.cfg now excludes JAX 0.11.2, so pip does not install the version
that was measured here. The versions that pip does install have not been run on a GPU.

In the table of losses, the difference grows after the first update. The likely cause, which was not checked in float64,
is that Adam's first updates divide each gradient by its size, so that rounding in small gradients changes these
updates.
"""
TITLES = {
    "parity": "Are losses and outputs those of the CPU?",
    "equality": "Are compact models equal on a GPU?",
    "demo": "Does the demo train?",
    "step": "How long does a training step take? (float32, TF32 products)",
    "step_bfloat16": "How long does a training step take in bfloat16?",
    "step_bfloat16_64": "How long does a training step take in bfloat16 at batch 64?",
    "inference": "How long does inference take? (float32, TF32 products)",
    "inference_bfloat16": "How long does inference take in bfloat16?",
    "convolutions": "Are sums over taps faster than cuDNN's dilated convolutions?",
    "proximal": "How long does the proximal operator take?",
    "latency": "How much faster is a compact backbone?",
    "memory": "How much memory does a training step take?",
}


def _parity(record):
    lines = [("run", "device", "first loss", "last loss", "largest difference of a loss", "of the outputs")]
    for row in record["rows"]:
        losses = f"{row['losses'][0]:.5f}", f"{row['losses'][-1]:.5f}"
        differences = f"{max(row['loss_difference']):.1e}", f"{row['output_difference']:.1e}"
        lines.append((row["run"], row["device"], *losses, *differences))
    note = f"{len(record['rows'][0]['losses'])} steps, batch {record['batch']}, {record['size']}x{record['size']}."
    return note, lines


def _equality(record):
    lines = [("compaction", "matmul precision", "largest difference")]
    lines += [(row["compaction"], row["precision"], f"{row['difference']:.1e}") for row in record["rows"]]
    return f"{100 * record['zero_groups']:.0f} % of the groups zero, {record['size']}x{record['size']}.", lines


def _demo(record):
    results = record["results"]
    names = [headline["metric"] for headline in results["headlines"].values()]
    lines = [("", "value"), *((name, f"{results['test'][name]:.4f}") for name in names)]
    lines.append(("zero groups", f"{100 * results['sparsity']['group']:.1f} %"))
    lines += [(f"parameters, {name}", f"{size['parameters']:,}") for name, size in results["size"].items()]
    return f"{record['seconds']:.0f} s for the README's first command, without installing.", lines


def _ratio(values, of):
    ratio = np.array(of) / np.array(values)
    low, high = np.quantile(ratio, [0.1, 0.9])
    return f"{np.median(ratio):.2f} ({low:.2f} .. {high:.2f})"


def _sides(record):
    """Return the table of a step or an inference: each side against ours, with or without the penalty."""
    seconds = record["seconds"]
    lines = [("side", "ms", "ours / side", "images/s", "TMAC/s")]
    for name, values in seconds.items():
        penalty = ", with penalty"
        base = "ours" + penalty * name.endswith(penalty)
        median = float(np.median(values))
        rates = f"{record['batch'] / median:.0f}", f"{record['batch'] * record['macs'] / median / 1e12:.1f}"
        lines.append((name, f"{1e3 * median:.1f}", _ratio(values, seconds[base]), *rates))
    return f"Batch {record['batch']}, {record['size']}x{record['size']}, three tasks.", lines


def _convolutions(record):
    lines = [("map, channels", "rate", "products that meet pixels", "dtype", "taps ms", "XLA ms", "taps / XLA")]
    for row in record["rows"]:
        layer = f"{row['side']}x{row['side']}, {row['inputs']} to {row['outputs']}"
        times = f"{1e3 * row['ours']:.3f}", f"{1e3 * row['XLA']:.3f}", f"{row['ratio']:.2f}"
        lines.append((layer, str(row["rate"]), f"{100 * row['share']:.0f} %", row["dtype"], *times))
    return f"Batch {record['batch']}, forward and both gradients.", lines


def _proximal(record):
    seconds = record["seconds"]
    copy = seconds["copy of the three arrays"]
    lines = [("operator", "ms", "operator / copy of its memory")]
    lines += [(name, f"{1e3 * np.median(values):.2f}", _ratio(copy, values)) for name, values in seconds.items()]
    return "All kernels of the backbone.", lines


def _latency(record):
    lines = [("model", "batch", "ms", "speed-up", "MAC ratio", "speed-up / MAC ratio", "memory MiB")]
    dense = {row["batch"]: row["macs"] for row in record["rows"] if row["model"] == "dense"}
    for row in record["rows"]:
        ratio = dense[row["batch"]] / row["macs"]
        numbers = f"{row['speedup']:.2f}x", f"{ratio:.2f}x", f"{row['speedup'] / ratio:.2f}", f"{row['memory_mib']:.0f}"
        lines.append((row["model"], str(row["batch"]), f"{row['median_ms']:.2f}", *numbers))
    zeros, side = 100 * record["zero_groups"], record["size"]
    return f"The backbone, {zeros:.0f} % of the groups zero at random, {side}x{side}, float32.", lines


def _memory(record):
    lines = [("side", "dtype", "GiB")]
    for row in record["rows"]:
        peak = "not known" if row["bytes"] is None else f"{row['bytes'] / 2**30:.1f}"
        lines.append((row["side"], row["dtype"], peak))
    return f"Peak of the allocated memory, batch {record['batch']}, {record['size']}x{record['size']}.", lines


_TABLES = {
    "parity": _parity,
    "equality": _equality,
    "demo": _demo,
    "convolutions": _convolutions,
    "proximal": _proximal,
    "latency": _latency,
    "memory": _memory,
}


def part(record: dict[str, Any]) -> str:
    """Return a part's section of the page."""
    note, lines = _TABLES.get(record["part"], _sides)(record)
    note += f" `python -m benchmarks.gpu --parts {record['part']}`"
    return f"## {TITLES[record['part']]}\n\n{note}\n\n{markdown(lines)}\n"


def write(folder: pathlib.Path, names: Sequence[str]) -> None:
    """Write docs/gpu.md from the records of a folder; parts without a record are named."""
    records = [json.loads(path.read_text()) for name in names if (path := folder / f"{name}.json").exists()]
    both = {key: ", ".join(sorted({record[key] for record in records})) for key in ("device", "jax", "date")}
    head = HEAD.format(devices=both["device"], versions=both["jax"], dates=both["date"])
    missing = [name for name in names if name not in {record["part"] for record in records}]
    end = f"\nNo record yet: {', '.join(missing)}.\n" if missing else ""
    PAGE.write_text(head + "\n" + "\n".join(map(part, records)) + end)

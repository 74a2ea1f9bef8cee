"""A run's model made physically smaller: the compact run, the table that explains it, and one sentence."""

import contextlib
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mtl_sparse import benchmark, checkpoints, cost, results
from mtl_sparse import run as run_lib
from mtl_sparse.errors import UserError
from mtl_sparse.models import resnet
from mtl_sparse.models import widths as widths_lib
from mtl_sparse.report import plots, records, tables
from mtl_sparse.sparsity import stats


def run_job(config, workdir: str | pathlib.Path) -> pathlib.Path:
    """`--job=compact`: writes the compact model of a run as a run of its own, in `<workdir>/compact`.

    Evaluates it on the test split, and explains in a table, compact.json and plots/compact.png what went.

    Returns:
      The compact run's folder.

    Raises:
      UserError: no finished run, one with other settings, or test metrics that differ from the run's own.
    """
    run = run_lib.setup(config)
    workdir = pathlib.Path(workdir).expanduser()
    records.check(workdir, config, run.data)
    expected = records.read_json(workdir / "results.json")
    saved = checkpoints.Checkpoints(workdir)
    try:
        state, progress = saved.restore("best", run.state_shapes())
    finally:
        saved.close()
    size = tuple(config.data.size)
    model, variables = run_lib.compact(config, run.model, state.variables)
    rows = explain(run.model, state.variables, model, variables, size)
    if not any(row["zero"] for row in rows):
        logging.warning("This run has no zero groups: its compact model has the same channels")

    folder = workdir / "compact"
    with _replacing(folder):
        small_config = config.copy_and_resolve_references()
        small_config.model.widths = model.widths.to_json()
        small = run_lib.setup(small_config)
        records.claim(folder, small_config, small.data)
        params = {**state.params, "model": variables["params"]}
        opt_state = jax.device_get(small.tx.init(jax.tree.map(jnp.asarray, params)))
        inner = opt_state.inner_state._replace(control=state.opt_state.inner_state.control)
        small_state = state.replace(
            params=params, batch_stats=variables["batch_stats"], opt_state=opt_state._replace(inner_state=inner)
        )
        small_saved = checkpoints.Checkpoints(folder)
        try:
            small_saved.save("best", int(state.step), small_state, progress)
            small_saved.wait()
            shutil.copy(workdir / "metrics.jsonl", folder / "metrics.jsonl")
            found = results.write(small, folder, small_saved)
        finally:
            small_saved.close()
        records.write_json(folder / "compact.json", rows)
        plots.save(plots.compact_layers(rows), folder / "plots" / "compact.png")
        difference = max(abs(found["test"][name] - value) for name, value in expected["test"].items())
        if not difference < 1e-3:
            raise UserError(
                f"the compact model's test metrics differ by {difference:.1e} from those in "
                f"{workdir / 'results.json'}; write those anew on this machine with --job=evaluate, then compact again"
            )
    print("\n" + table(rows))
    print(
        f"\n{compare_sentence(rows, state.variables, variables)}; test metrics differ by at most {difference:.1e} from "
        f"the run's own\nthe compact model is the run {folder}: --config=configs/run.py:{folder}"
    )
    return folder


@contextlib.contextmanager
def _replacing(folder: pathlib.Path):
    """Within it `folder` is written anew; what it held is kept until that is done, and comes back if it fails."""
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def explain(model, variables, small, small_variables, size) -> list[dict]:
    """What became of every conv layer.

    Returns:
      For each layer of `model`: "layer" (path), "groups" and "zero" of them, "groups_after", "zero_after",
      "parameters" and "parameters_after" of the kernel, "macs" and "macs_after" an image, and "why": what was removed,
      or why zero channels stay.
    """
    before, after = cost.layers(model, size), cost.layers(small, size)
    zeros, zeros_after = _zero_groups(variables), _zero_groups(small_variables)
    reads = _reads(small)
    rows = []
    for layer, old in before.items():
        new = after.get(layer)
        row = {
            "layer": layer,
            "groups": old.kernel[-2],
            "zero": zeros[layer],
            "groups_after": new.kernel[-2] if new else 0,
            "zero_after": zeros_after[layer] if new else 0,
            "parameters": old.parameters,
            "parameters_after": new.parameters if new else 0,
            "macs": old.macs,
            "macs_after": new.macs if new else 0,
        }
        rows.append(row | {"why": _why(row, old, new, reads.get(layer), layer in reads)})
    return rows


def _zero_groups(variables):
    """Zero input channels of every kernel, by its layer's path."""
    found = stats.sparsity(variables["params"], "all") if variables["params"] else None
    return {entry.path.removesuffix("/kernel"): entry.zero_groups for entry in found.layers} if found else {}


def _reads(model) -> dict[str, widths_lib.Ranges | None]:
    """Ranges that each layer behind the residual stream takes of it, None for all."""
    layers = model.layers()
    reads = {}
    for place, block in zip(resnet.places(model.depth), layers.blocks, strict=True):
        reads[f"backbone/{place.name}/conv1"] = block.reads
        reads[f"backbone/{place.name}/downsample_conv"] = block.shortcut_reads
    for (task, *_), head in zip(model.heads, layers.heads, strict=True):
        if head is not None:
            names = [*(f"aspp{i}" for i in range(len(head.branches) - 1)), "pool"]
            reads |= {f"head_{task}/{name}": ranges for name, ranges in zip(names, head.reads, strict=True)}
    return reads


def _why(row, old, new, ranges, on_stream):
    if new is None:
        return "gone: no live input, a constant" if row["zero"] == row["groups"] else "gone: nobody reads it"
    parts = []
    if new.kernel[:2] != old.kernel[:2]:
        parts.append(f"taps {'x'.join(map(str, new.kernel[:2]))} of {'x'.join(map(str, old.kernel[:2]))}")
    if ranges is not None:
        parts.append(f"gathers {len(ranges)} range{'s' if len(ranges) > 1 else ''}: other layers read more")
    if row["groups"] > 1 and new.kernel[-2] == 1 and row["groups_after"] < row["groups"] - row["zero"]:
        parts.append("reads a constant")
    if row["zero_after"]:
        reason = "a gather would cost more" if on_stream and ranges is None else "they fill gaps or a multiple"
        parts.append(f"{row['zero_after']} zero stay: {reason}")
    return "; ".join(parts)


def table(rows: list[dict]) -> str:
    """`explain`'s rows as a Markdown table with a total."""
    head = ("layer", "groups", "zero", "left", "of them zero", "parameters", "left", "MACs (M)", "left", "what and why")
    keys = ("groups", "zero", "groups_after", "zero_after", "parameters", "parameters_after", "macs", "macs_after")
    total = {key: sum(row[key] for row in rows) for key in keys} | {"layer": "all", "why": ""}
    lines = [head]
    for row in [*rows, total]:
        counts = [f"{row[key]:,}" for key in keys[:6]]
        lines.append((row["layer"], *counts, *(f"{row[key] / 1e6:,.2f}" for key in keys[6:]), row["why"]))
    return tables.markdown(lines)


def compare_sentence(rows, variables, small_variables) -> str:
    """Parameters and MACs before and after."""
    before, after = cost.parameter_count(variables), cost.parameter_count(small_variables)

    def macs(part):
        both = [sum(row[key] for row in rows if row["layer"].startswith(part)) / 1e6 for key in ("macs", "macs_after")]
        return f"{both[0]:,.1f} M MACs {both[1]:,.1f} M ({both[0] / max(both[1], 1e-6):.1f}x fewer)"

    return f"{before:,} parameters became {after:,}, {macs('')}, in the backbone {macs('backbone/')}"


def summary(run: run_lib.Run, variables) -> str:
    """One sentence on what compaction brings for this model; measured here at batch 1 in run.summary_rounds rounds."""
    size, rounds = tuple(run.config.data.size), run.config.run.summary_rounds
    model, small_variables = run_lib.compact(run.config, run.model, variables)
    rows = explain(run.model, variables, model, small_variables, size)
    zero = stats.sparsity(variables["params"], run.config.sparsity.scope).group
    text = (
        f"compact (--job=compact): {100 * zero:.1f} % of groups zero; "
        f"{compare_sentence(rows, variables, small_variables)}"
    )
    if rounds == 0:
        return text
    timed = benchmark.compare({"dense": (run.model, variables), "compact": (model, small_variables)}, size, 1, rounds)
    speed = {row["part"]: row["speedup"] for row in timed if row["model"] == "compact"}
    error = largest_difference((run.model, variables), (model, small_variables), size)
    return (
        f"{text}; here, at batch 1, the backbone is {speed['backbone']:.1f}x faster, the whole model "
        f"{speed['model']:.1f}x; outputs equal to {error:.0e} of the largest"
    )


def largest_difference(one, other, size) -> float:
    """Largest difference between the outputs of two (model, variables), over the largest value of each output."""
    images = np.random.default_rng(0).normal(size=(1, *size, 3)).astype(np.float32)
    expected, actual = (jax.device_get(jax.jit(model.apply)(variables, images)) for model, variables in (one, other))
    return max(
        float(np.max(np.abs(actual[task] - raw)) / max(np.max(np.abs(raw)), 1e-30)) for task, raw in expected.items()
    )

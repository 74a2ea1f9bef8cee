"""A run's model made physically smaller: the compact run, the table that explains it, and one sentence."""

import contextlib
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mtl_sparse import benchmark, checkpoints, cost, evaluate, results
from mtl_sparse import run as run_lib
from mtl_sparse.errors import UserError
from mtl_sparse.models import deeplab, resnet
from mtl_sparse.models import widths as widths_lib
from mtl_sparse.report import plots, records, tables
from mtl_sparse.sparsity import stats


def run_job(config, workdir: str | pathlib.Path) -> pathlib.Path:
    """`--job=compact`: writes the compact model of a run as a run of its own, in `<workdir>/compact`.

    Evaluates it on the test split, and explains in a table, compact.json and plots/compact.png what went.

    Returns:
      The compact run's folder.

    Raises:
      UserError: no finished run, one with other settings, a dead backbone, or outputs that differ.
    """
    run = run_lib.setup(config)
    workdir = pathlib.Path(workdir).expanduser()
    records.check(workdir, config, run.data)
    with records.held(workdir):
        return _compact(run, config, workdir)


def _compact(run, config, workdir):
    expected = records.read_json(workdir / "results.json")
    saved = checkpoints.Checkpoints(workdir)
    try:
        state, progress = saved.restore("best", run.state_shapes)
    finally:
        saved.close()
    size = tuple(config.data.size)
    model, variables = run_lib.compact(config, run.model, state.variables)
    rows = explain(run.model, state.variables, model, variables, size)
    if not any(row["zero"] for row in rows):
        logging.warning("This run has no zero groups: its compact model has the same channels")
    if not any(row["groups_after"] for row in rows if row["layer"].startswith("backbone/")):
        raise UserError(f"the backbone of {workdir} is dead: no layer of it is left to evaluate or train on")
    error = difference(run.model, state.variables, model, variables, size)
    if not error < 1e-4:
        raise UserError(f"the compact model's outputs differ by {error:.1e} of the largest: nothing was written")

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
            for kind in checkpoints.KINDS:  # a run that has ended: --job=train evaluates it, and trains nothing
                small_saved.save(kind, int(state.step), small_state, {**progress, "stopped": True})
            small_saved.wait()
            if (workdir / "metrics.jsonl").exists():  # not of an imported run
                shutil.copy(workdir / "metrics.jsonl", folder / "metrics.jsonl")
            found = results.write(small, folder, small_saved)
        finally:
            small_saved.close()
        records.write_json(folder / "compact.json", rows)
        plots.save(plots.compact_layers(rows), folder / "plots" / "compact.png")
    print("\n" + table(rows))
    change = np.nanmax([abs(found["test"][name] - value) for name, value in expected["test"].items()])
    sentence = compare_sentence(rows, state.variables, variables)
    print(f"\n{sentence}; outputs equal to {error:.0e} of the largest, test metrics to {change:.0e}")
    print(f"the compact model is a run of its own: --config=configs/run.py:{folder} --job=evaluate")
    return folder


@contextlib.contextmanager
def _replacing(folder: pathlib.Path):
    """Within it `folder` is written anew; what it held is kept until that is done, and comes back if it fails."""
    old, removed = (folder.with_name(folder.name + end) for end in (".old", ".removed"))
    shutil.rmtree(removed, ignore_errors=True)
    if old.exists():  # an earlier call was killed in here
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.rename(old)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if old.exists():
            old.rename(folder)
        raise
    if old.exists():
        old.rename(removed)  # or a call that is killed while it deletes would leave what looks like the one above
        shutil.rmtree(removed, ignore_errors=True)


def explain(model, variables, small, small_variables, size) -> list[dict]:
    """What became of every conv layer.

    Returns:
      For each layer of `model`: "layer" (path), "groups" and "zero" of them, "groups_after", "zero_after",
      "parameters" and "parameters_after" of the kernel, "macs" and "macs_after" an image, and "why": what was removed,
      or why zero channels stay.
    """
    before, after = cost.layers(model, size), cost.layers(small, size)
    zeros, zeros_after = _zero_groups(variables), _zero_groups(small_variables)
    reads, constants = _reads(small)
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
        rows.append(row | {"why": _why(row, old, new, reads, constants)})
    return rows


def _zero_groups(variables):
    """Zero input channels of every conv kernel, by its layer's path."""
    if not any(leaf.ndim == 4 for leaf in jax.tree.leaves(variables["params"])):
        return {}
    found = stats.sparsity(variables["params"], "all")
    return {entry.path.removesuffix("/kernel"): entry.zero_groups for entry in found.layers}


def _reads(model):
    """(ranges that each layer takes of the residual stream or the image, None for all; layers that read a constant)."""
    layers = model.layers()
    reads = {"backbone/stem_conv1": layers.stem.reads}
    constants = {f"backbone/stem_conv{layers.stem.dead + 1}"} if layers.stem.dead else set()
    for place, block in zip(resnet.places(model.depth), layers.blocks, strict=False):
        reads[f"backbone/{place.name}/conv1"] = block.reads
        reads[f"backbone/{place.name}/downsample_conv"] = block.shortcut_reads
        if block.dead or block.reads == ():
            constants.add(f"backbone/{place.name}/conv{block.dead + 1}")
    for (task, *_), head in zip(model.heads, layers.heads, strict=True):
        if head is not None:
            names = ("conv",) if isinstance(head, widths_lib.Classifier) else deeplab.BRANCHES
            reads |= {f"head_{task}/{name}": ranges for name, ranges in zip(names, head.reads, strict=True)}
            if head.dead:
                constants.add(f"head_{task}/conv")
    return reads, constants


def _why(row, old, new, reads, constants):
    layer, parts = row["layer"], []
    if new is None:
        return "gone: all inputs zero" if row["zero"] == row["groups"] else "gone: its output is constant or not read"
    if layer in constants:
        return "reads a constant: what is before it is dead"
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
        fewer = f" ({both[0] / both[1]:.1f}x fewer)" if both[1] else ""
        return f"{both[0]:,.1f} M MACs became {both[1]:,.1f} M{fewer}"

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
    error = difference(run.model, variables, model, small_variables, size)
    return (
        f"{text}; here, at batch 1, the backbone runs at {speed['backbone']:.1f} times the dense speed, the whole "
        f"model at {speed['model']:.1f}; outputs equal to {error:.0e} of the largest"
    )


def difference(model, variables, small, small_variables, size) -> float:
    """`evaluate.largest_difference` of the two models' outputs on noise of (height, width) `size`, both in float32."""
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    with jax.default_matmul_precision("float32"):
        expected, actual = (
            jax.device_get(jax.jit(one.clone(dtype=jnp.float32).apply)(values, images))
            for one, values in ((model, variables), (small, small_variables))
        )
    return evaluate.largest_difference(expected, actual)

"""Ablation of fixed-norm kernels and annealed regrowth, over three values of lambda.

    python -m benchmarks.fixed_norm --workdir=runs/fixed_norm [--folder=/data/NYUD_MT]

Trains the demo at half its resolution and without a target sparsity, on rendered rooms and, if --folder is given, on
the real images in it. Each run writes <workdir>/<data>_<lambda>_<variant>.json; a run whose file exists and has the
same options is skipped. Prints a table and draws fixed_norm.png.
"""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from matplotlib.figure import Figure

from configs import demo
from input_pipeline import loader
from mtl_sparse.runtime import files, text
from mtl_sparse.sparsity import groups, stats
from mtl_sparse.training import evaluation, loop
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib
from mtl_sparse.training import step as step_lib

_WORKDIR = flags.DEFINE_string("workdir", "runs/fixed_norm", "Folder of the results.")
_FOLDER = flags.DEFINE_string("folder", "", "NYUD_MT folder of real images; without it, only rooms are used.")
_LAMBDAS = flags.DEFINE_multi_float("lambda", [1e-4, 3e-4, 1e-3], "Values of lambda.")
_STEPS = flags.DEFINE_integer("steps", 400, "Approximate number of steps of a run, rounded to epochs.")
_EVERY = 10  # steps between two records
# name -> sparsity options, color
VARIANTS = {
    "default": ({"fixed_norm": True, "anneal_revival": True}, "#20639b"),
    "free_regrowth": ({"fixed_norm": True, "anneal_revival": False}, "#3caea3"),
    "free_norm_and_regrowth": ({"fixed_norm": False, "anneal_revival": False}, "#d35400"),
}


def make_probe(run):
    """Return a function (state, initial norms or None) -> {name: value} that computes the plotted quantities.

    Args:
      run: the result of `setup.setup`.
    """
    kernels = groups.find(state_lib.shapes(run).params["model"], run.config.sparsity.scope)

    @jax.jit
    def probe(state, initial_norms):
        params = groups.by_path(state.params["model"])
        proximal = state.opt_state.inner_state
        momentum = groups.by_path(optax.tree.get(proximal.inner, "mu")["model"])
        correction = 1 - run.config.optimizer.b1 ** proximal.count.astype(jnp.float32)
        zero, gradient, norms = [], [], []
        for kernel in kernels:
            zero.append(stats.zero_groups(params[kernel.path], kernel.axis))
            m = momentum[kernel.path] / correction
            gradient.append(jnp.sqrt(jnp.mean(jnp.square(m), (0, 1, 3))))
            norms.append(jnp.linalg.norm(params[kernel.path]))
        variances = [leaf for path, leaf in groups.by_path(state.batch_stats).items() if path.endswith("var")]
        norms = jnp.stack(norms)
        return {
            "zero": jnp.mean(jnp.concatenate(zero)),
            "norm": jnp.quantile(
                norms / (norms if initial_norms is None else initial_norms), jnp.array([0.1, 0.5, 0.9])
            ),
            "norms": norms,
            "variance": jnp.quantile(jnp.concatenate(variances), jnp.array([0.1, 0.5, 0.9])),
            "gradient": jnp.quantile(jnp.concatenate(gradient), jnp.array([0.1, 0.5, 0.9])),
        }

    return probe


def measure(config) -> dict:
    """Train a run and record the plotted quantities.

    Args:
      config: the run's config.

    Returns:
      {"rows": records over the steps, "score": final validation score, "finite": whether it is finite, "config"}.
    """
    run = setup_lib.setup(config)
    state = state_lib.initial(run)
    probe = make_probe(run)
    initial = probe(state, None)["norms"]
    state, step_fn = loader.replicate(state), step_lib.make_train_step(run)
    batches = loader.prefetch_to_device(run.batches.train(0))
    rows, eta = [], text.Eta(run.total_steps)
    for step in range(1, run.total_steps + 1):
        state, _ = step_fn(state, next(batches))
        if step % _EVERY == 0 or step == run.total_steps:
            row = jax.device_get(probe(state, initial))
            row = {name: np.asarray(value).tolist() for name, value in row.items() if name != "norms"}
            rows.append({"step": step, **row})
            if step % (10 * _EVERY) == 0:
                zero, left = 100 * row["zero"], eta.left(step)
                logging.info("step %d/%d, %.1f %% zero, %s left", step, run.total_steps, zero, left)
    evaluator = evaluation.Evaluator(run).evaluate
    values = evaluator(state.variables, run.batches.evaluation("validation"))
    score = loop.validation_score(values, run.tasks)
    return {"rows": rows, "score": score, "finite": math.isfinite(score), "config": json.loads(config.to_json())}


def run_config(folder: str, lambda_: float, variant: str):
    """Return the config of a run.

    Args:
      folder: NYUD_MT folder of real images, "" for rendered rooms.
      lambda_: strength of the penalty.
      variant: a key of `VARIANTS`.
    """
    config = demo.get_config()
    if folder:
        config.data.embedded.frames = 0
        config.data.folder = folder
    config.data.size = (32, 48)
    config.sparsity.update(lambda_=lambda_, target=0.0, **VARIANTS[variant][0])
    steps_per_epoch = setup_lib.setup(config).steps_per_epoch
    config.train.epochs = max(1, round(_STEPS.value / steps_per_epoch))
    return config


def draw(results: dict) -> Figure:
    """Draw one column for each pair of data and lambda, and one color for each variant.

    Args:
      results: (data, lambda, variant) -> result of `measure`.
    """
    columns = sorted({key[:2] for key in results}, key=lambda pair: (pair[0] != "rooms", pair[1]))
    rows = {
        "zero": "% groups zero",
        "norm": "kernel norm / initial",
        "variance": "BatchNorm running variance",
        "gradient": "gradient of a group, |m|/√n",
    }
    figure = Figure((2.9 * len(columns), 9.5), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey="row")
    for j, (data, lambda_) in enumerate(columns):
        for variant, (_, color) in VARIANTS.items():
            found = results[data, lambda_, variant]
            steps = [row["step"] for row in found["rows"]]
            label = variant.replace("_", " ") + ("" if found["finite"] else ": not finite")
            for i, name in enumerate(rows):
                values = np.array([row[name] for row in found["rows"]])
                if name == "zero":
                    axes[i, j].plot(steps, 100 * values, color=color, label=label)
                else:
                    axes[i, j].plot(steps, values[:, 1], color=color)
                    axes[i, j].fill_between(steps, values[:, 0], values[:, 2], color=color, alpha=0.15, linewidth=0)
        axes[3, j].axhline(lambda_, color="black", linestyle=":", linewidth=1)
        axes[3, j].text(steps[0], lambda_, "λ", va="bottom")
        axes[0, j].set_title(f"{data}, λ = {lambda_:.0e}")
        axes[0, j].set_ylim(-2, 102)
        axes[-1, j].set_ylim(1e-6, 1e-2)  # groups of a dead branch have no gradient
        axes[-1, j].set_xlabel("step")
    for i, (name, title) in enumerate(rows.items()):
        axes[i, 0].set_ylabel(title)
        if name != "zero":
            axes[i, 0].set_yscale("log")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _is_done(path, config):
    """Return whether the file at `path` is the result of this config."""
    return path.exists() and json.loads(path.read_text())["config"] == json.loads(config.to_json())


def main(_) -> None:
    """Run what is missing, then print the table and draw the figure."""
    workdir = pathlib.Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    results = {}
    for data, folder in (("rooms", ""), ("real images", _FOLDER.value)):
        if data != "rooms" and not folder:
            continue
        for lambda_ in _LAMBDAS.value:
            for variant in VARIANTS:
                path = workdir / f"{data.replace(' ', '_')}_{lambda_:g}_{variant}.json"
                config = run_config(folder, lambda_, variant)
                if not _is_done(path, config):
                    logging.info("%s", path.stem)
                    files.write_text(path, json.dumps(measure(config)))
                results[data, lambda_, variant] = json.loads(path.read_text())
    draw(results).savefig(workdir / "fixed_norm.png", dpi=80)
    print("| data | lambda | variant | % zero, highest | % zero, end | kernel norm / initial | validation score |")
    print("|---|---|---|---|---|---|---|")
    for (data, lambda_, variant), found in results.items():
        zero = [100 * row["zero"] for row in found["rows"]]
        print(
            f"| {data} | {lambda_:.0e} | {variant.replace('_', ' ')} | {max(zero):.1f} | {zero[-1]:.1f} | "
            f"{found['rows'][-1]['norm'][1]:.3f} | {found['score']:.4f} |"
        )


if __name__ == "__main__":
    app.run(main)

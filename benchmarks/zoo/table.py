"""The records of the zoo as a table in docs/zoo.md."""

import ast
import collections
import datetime
import hashlib
import importlib.metadata
import json
import math
import pathlib
import platform
import re

TOLERANCES = {"float32": 1e-5, "float64": 1e-10}
LOOSEST = 1e-4  # in float64: a model whose own rounding is larger, or not finite, cannot be compared
PATH = pathlib.Path(__file__).parents[2] / "docs" / "zoo.md"
PACKAGES = "jax flax keras jax-resnet dm-haiku equinox equimo jaxnn torch torchvision torchax numpy".split()
HEAD = """# Compaction on other packages' models

`compaction.compact(fn, params, images)` on models of seven packages, without a line of code specific to any of them:
**{equal}**.

- Weights are random: kernels normal with He's variance, or up to 4.5 times as large where the output would otherwise
  not depend on the images; scales of normalization layers uniform in 0.5 .. 1.5; biases and running means normal with
  standard deviation 0.1; running variances uniform in 0.5 .. 1.5. Inference mode, 10 classes, images of 32x32 to
  128x128.
- Patterns of zeros: each kernel loses a random 50 % or 70 % of its input channels, independently of the others;
  "layers": 50 %, and about 15 % of the kernels are wholly zero, fewer where the output would no longer depend on the
  image. Depthwise kernels, tables and kernels that read the image's channels are left as they are.
- A difference is the largest of |compact - full| over two batches of 2 images, divided by the signal: the largest
  difference between the full model's outputs for these batches. Equal means at most {f64:g} in float64 (weights, images
  and the model), or four times what moving each weight by one unit in the last place does to the full model, but at
  most {loosest:g}: beyond that, a model is too sensitive to be compared, and counts as failed. In float32, at batches 2
  and 3, it means at most {f32:g} or four times the difference between the full model in float32 and in float64, or with
  weights that are moved in the same way. float32 is checked only at 50 %; each precision has its own compaction.
- In float64, convolutions of the full and of the compact model are computed as sums of matrix products, one for each
  position in the kernel, because XLA has only a slow loop for them on a CPU (which the models checked before 2026-11-28
  used).
- Seconds are those of `compact`, in float64, from weights as NumPy arrays.
- Besides failures, the last column names the equations that keep channels which the next weights do not read, with
  the number of such weights.

{date}; the latest checks ran on {machine}, Python {python},
{versions}. Hashes of the engine's files in mtl_sparse/compaction, with the number of models
that were checked at each: {engines}. The present files have {current}; other hashes are of earlier
versions; the models checked with those were not checked again.

```bash
python3.11 -m venv .venv-zoo && .venv-zoo/bin/pip install -e '.[test]' {install}
.venv-zoo/bin/python -m benchmarks.zoo           # resumes; --only TEXT, --again, --retry, --render
```

| package | model | parameters | zeros | parameters after | float32 | float64 | seconds | failed, kept |
|---|---|---|---|---|---|---|---|---|
"""


# modules of mtl_sparse/compaction that `compaction.compact` does not use
_NOT_THE_ENGINE = (
    *("building", "exactness", "explain", "multitask", "ordering", "rewritten", "speed"),  # of our own models
    *("tracing", "weights"),
    *("channels", "cost", "groups", "operands"),  # of training
)


def engine_state():
    """Return a hash of the engine's code without docstrings and comments, which tells records of an earlier one."""
    files = sorted(pathlib.Path(__file__).parents[2].glob("mtl_sparse/compaction/*.py"))
    engine = [code(path.read_text()) for path in files if path.stem not in _NOT_THE_ENGINE]
    return hashlib.sha256("".join(engine).encode()).hexdigest()[:12]


def code(text):
    """Return a module's code in one form, without docstrings and comments."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def problem(record, pattern):
    """Return one line that says why a pattern's check failed, or ""."""
    entry = record["patterns"].get(pattern)
    if entry is None:
        return record.get("error", "not run")
    if "skipped" in entry:
        return ""
    for dtype, tolerance in TOLERANCES.items():
        part = entry.get(dtype)
        if part is None and dtype == "float32" and "float64" in entry:
            continue  # a pattern that is compared in float64 only
        part = part or {}
        if "error" in part:
            return f"{dtype}: {part['error']}"
        if "against signal" not in part:
            return f"{dtype}: {record.get('error', 'not run')}"
        if part["output"] != dtype:
            return f"{dtype}: the model's output is {part['output']}"
        own = part.get("own rounding", 0)  # how near the full model is to itself
        if dtype == "float32":
            own = max(own, entry.get("float64", {}).get("rounding", 0))
        tolerance = max(tolerance, 4 * own if dtype == "float32" else min(4 * own, LOOSEST))
        worst = max(part["against signal"], part.get("batch 3", 0))
        if not worst <= tolerance:
            return f"{dtype}: differs by {worst:.1g}" + (f" (the full model's own rounding: {own:.1g})" if own else "")
    return ""


def outcome(record):
    """Return one line about a record for the log."""
    parts = []
    for pattern, entry in record["patterns"].items():
        wrong = problem(record, pattern)
        after = entry.get("float64", {}).get("after", math.nan) / record.get("parameters", math.nan)
        parts.append(f"{pattern}: {wrong or entry.get('skipped') or f'equal, {after:.0%} left'}")
    return "; ".join(parts) or record.get("error", "no record")


def kept(part):
    """Return in short why channels stayed: primitives without a rule, and the equations that read removed inputs."""
    reasons = [f"{reason.split(':')[0]} ({count})" for reason, count in part.get("reasons", {}).items()]
    barriers = [f"no rule for {', '.join(part['barriers'])}"] if part.get("barriers") else []
    more = [f"{len(reasons) - 3} more"] if len(reasons) > 3 else []
    return "; ".join(barriers + reasons[:3] + more)


def rows(record):
    """Yield a record's lines of the table."""
    for pattern in record["patterns"] or {"": None}:
        entry = record["patterns"].get(pattern) or {}
        first, second = entry.get("float32", {}), entry.get("float64", {})
        number = lambda part: f"{part['against signal']:.0e}" if "against signal" in part else ""  # noqa: E731
        parameters = record.get("parameters")
        after = f"{second['after']:,} ({second['after'] / parameters:.0%})" if "after" in second else ""
        note = problem(record, pattern) or entry.get("skipped") or kept(second)
        yield (
            record["package"],
            record["model"],
            f"{parameters:,}" if parameters else "",
            pattern,
            after,
            number(first),
            number(second),
            f"{second['seconds']:.1f}" if "seconds" in second else "",
            re.sub(r"\s+", " ", note).replace("|", "\\|")[:200],
        )


def counts(records):
    """Return the summary's numbers as a sentence."""
    problems = [[problem(record, pattern) for pattern in record["patterns"]] for record in records]
    whole = sum(bool(record.get("done")) and not any(found) for record, found in zip(records, problems, strict=True))
    parts = []
    for dtype, tolerance in TOLERANCES.items():
        checks = [entry[dtype] for record in records for entry in record["patterns"].values() if dtype in entry]
        good = sum(max(part.get("against signal", math.inf), part.get("batch 3", 0)) <= tolerance for part in checks)
        parts.append(f"{good} of {len(checks)} checks in {dtype} within {tolerance:g}")
    return f"{whole} of {len(records)} models equal under every pattern; {', '.join(parts)}"


def machine():
    """Return the processor's name and how many cores there are."""
    import os

    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if pathlib.Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} CPU cores ({(names or [platform.processor()])[0]})"


def version(package):
    """Return a package's installed version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write(cases, paths):
    """Write docs/zoo.md from the records that exist."""
    records = [json.loads(path.read_text()) for path in paths if path.exists()]
    records = [record for record in records if not record.get("stub")]
    if not records:
        return
    missing = len(cases) - len(records)
    equal = counts(records) + (f"; {missing} models not run" if missing else "")
    engines = collections.Counter(record.get("engine") for record in records)
    text = HEAD.format(
        equal=equal,
        current=engine_state(),
        engines=", ".join(f"{name} ({count})" for name, count in engines.most_common()),
        f32=TOLERANCES["float32"],
        f64=TOLERANCES["float64"],
        loosest=LOOSEST,
        date=datetime.date.today().isoformat(),
        machine=machine(),
        python=platform.python_version(),
        versions=", ".join(f"{package} {version(package)}" for package in PACKAGES),
        install=" ".join(f"{package}=={version(package).split('+')[0]}" for package in PACKAGES[2:-1]),
    )
    records.sort(key=lambda record: (record["package"], record["model"].lower()))
    lines = ["| " + " | ".join(row) + " |" for record in records for row in rows(record)]
    PATH.write_text(text + "\n".join(lines) + "\n")
    print(f"{PATH}: {equal}")

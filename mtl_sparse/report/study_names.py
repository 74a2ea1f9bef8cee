"""Names of a study's rows: by what they are, or by their options."""

import json
from collections import Counter
from collections.abc import Collection
from typing import Any

from mtl_sparse.report import schema
from mtl_sparse.report import study as study_lib

_MOST_PHRASES = 3
_LAMBDA, _TARGET = "sparsity.lambda_", "sparsity.target"
_TARGETS = {_TARGET: "", "sparsity.target_macs": " of MACs", "sparsity.target_params": " of parameters"}
# Options whose published values together have a name, see configs/sweeps.py; those of the start follow from them.
_PUBLISHED = ("bias_correction", "fixed_norm", "anneal_revival", "warmup", "warmup_steps")
_STARTS = ("start_at", "start_step")
_PENALTIES = {"group_lasso": "", "group_l0": "group ℓ0", "group_mcp": "MCP", "l1": "ℓ1"}


def names(study: study_lib.Study) -> list[str]:
    """Return a short name for each row, such as "dense", "target 0.7" or "published form, λ 1e-05"; all differ."""
    short_names = [name(study, row) for row in study.rows]
    found = [
        one if short_names.count(one) == 1 else name(study, row, most=len(row.settings))
        for one, row in zip(short_names, study.rows, strict=True)
    ]
    for i, one in enumerate(found):
        if found.count(one) > 1:
            found[i] = f"{one} (row {i + 1})"
    return found


def name(study: study_lib.Study, row: study_lib.Row, without: Collection[str] = (), most: int = _MOST_PHRASES) -> str:
    """Return the tasks of a row unless all rows have them, its form of sparsity, and what else is unusual about it.

    Args:
      study: the study that has the row.
      row: the row to name; options that have no effect in it are left out.
      without: options to leave out.
      most: number of unusual options to name; the others are counted.
    """
    parts = [text for text in (_tasks(study, row), form(row, without)) if text]
    others = _others(study, row, without)
    parts += [*others[:most], *([f"{len(others) - most} more"] if len(others) > most else [])]
    return ", ".join(parts) or row.config["sparsity"]["penalty"].replace("_", " ")


def _tasks(study, row):
    if set(row.tasks) == set(study.tasks):
        return ""
    return f"{show(row.tasks)}{' alone' if len(row.tasks) == 1 else ''}"


def form(row: study_lib.Row, without: Collection[str] = ()) -> str:
    """Return how a row is made sparse; for `without`, see `name`."""
    options = row.config["sparsity"]
    if row.is_dense:
        return "" if _LAMBDA in without else "dense"
    prune = options.get("prune")
    if prune and prune not in schema.IMPORTANCES:
        return f"zeros of {row.settings.get('sparsity.prune', prune)}"
    words = [_PENALTIES.get(options["penalty"], options["penalty"])]
    words.append("published form" if _is_published(options) else "")
    words.append(f"pruned at once by {prune}" if prune else "")
    targets = {key: options.get(key.rpartition(".")[2], 0) for key in _TARGETS}
    if any(targets.values()):
        words += [f"target {value:g}{_TARGETS[key]}" for key, value in targets.items() if value and key not in without]
    elif _LAMBDA not in without:
        words.append(f"λ {options['lambda_']:g}")
    return ", ".join(filter(None, words))


def _is_published(options):
    return "bias_correction" in options and not any(options.get(one) for one in _PUBLISHED)


def _others(study, row, without=()):
    """Return a phrase for each option of a row that is not part of its form and has an unusual value."""
    said = {"tasks", "sparsity.penalty", "sparsity.prune", _LAMBDA, *_TARGETS, *without}
    if _is_published(row.config["sparsity"]):
        said |= {f"sparsity.{one}" for one in (*_PUBLISHED, *_STARTS)}
    phrases = []
    for option in sorted(row.settings):
        value = row.settings[option]
        if option in said or (row.is_dense and study_lib.is_idle(option)):
            continue
        values = Counter(json.dumps(one.settings[option]) for one in study.rows)
        usual = values.most_common(1)[0][0] == json.dumps(value)
        if not usual or len(values) > 2 or (isinstance(value, str) and value):
            phrases.append(_phrase(option, value))
    return phrases


def _phrase(option: str, value: Any) -> str:
    words = short(option).replace("_", " ")
    if option == "loss.weighting":
        return str(value)
    if option == "sparsity.groups":
        return f"{value} groups"
    if option == "sparsity.group_weights":
        known = {"sqrt_size": "weighted by √size", "macs": "weighted by MACs", "none": "weighted alike"}
        return known.get(str(value), f"weighted by {value}")
    if option == "sparsity.debias_at":
        return "debiased" if value else "not debiased"
    if option == "model.attach":
        return f"heads at {show(value)}" if value else "heads at the end"
    if value is None or isinstance(value, bool):
        return words if value else f"no {words}"
    return f"{words} {show(value)}"


def settings_names(study: study_lib.Study) -> list[str]:
    """Return "tasks" and the options that differ between rows; in an ablation, "tasks" and "changes"."""
    if study.is_ablation:
        return ["tasks", "changes"]
    return ["tasks", *sorted(study.rows[0].settings.keys() - {"tasks"})]


def setting(row: study_lib.Row, name: str) -> str:
    """Return the text of a row's option in tables."""
    if name == "changes":
        changes = {key: value for key, value in row.changes.items() if key != "tasks"}
        return ", ".join(f"{short(key)} {show(value)}" for key, value in changes.items()) or "(the first row)"
    if row.is_dense and study_lib.is_idle(name):
        return ""
    return show(row.tasks if name == "tasks" else row.settings[name])


def short(name: str) -> str:
    """Return the last part of an option's dotted path."""
    return name.rpartition(".")[2].rstrip("_")


def show(value: Any) -> str:
    """Return the text of an option's value in tables."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " + ".join(str(part).removeprefix("attribute:") for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)

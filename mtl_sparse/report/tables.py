"""Tables from results.json."""


def run_table(results: dict) -> str:
    """One run: every test metric beside the constant predictor's, then the sparsity. Markdown that reads as text."""
    headline = {entry["metric"] for entry in results["headlines"].values()}
    rows = [("task", "metric", "test", "constant guess")]
    for name, value in results["test"].items():
        task, metric = name.split("/", 1)
        if metric == "loss":
            continue
        constant = results["constant"][name]
        shown = f"**{metric}**" if name in headline else metric
        rows.append((task, shown, f"{value:.4f}", f"{constant:.4f}"))
    return (
        markdown(rows)
        + "\n\n"
        + sparsity_sentences(results["sparsity"])
        + f"; best validation at step {results['step']}"
    )


def sparsity_sentences(sparsity: dict) -> str:
    """What is zero, what that was asked to be, and what died of it."""
    asked = f" (target {100 * sparsity['target']:.1f} %)" if sparsity["target"] else ""
    text = f"{100 * sparsity['group']:.1f} % of groups zero"
    if sparsity["penalty"] == "l1":
        text = f"{100 * sparsity['weight']:.1f} % of weights zero{asked}; {text}"
    else:
        text += asked
    text += (
        f", {100 * sparsity['parameter']:.1f} % of the penalised weights in them, lambda {sparsity['lambda']:.2g}; "
        f"{len(sparsity['layers'])} conv layers"
    )
    for name, dead in (("layers", sparsity["dead_layers"]), ("blocks", sparsity["dead_blocks"])):
        if dead:
            short = [path.removeprefix("backbone/").removesuffix("/kernel") for path in dead]
            text += f", dead {name}: {', '.join(short)}"
    return text


def markdown(rows: list[tuple[str, ...]]) -> str:
    """Rows, the first of them the head, as a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def speed_table(rows: list[dict]) -> str:
    """`compare`'s rows as a Markdown table; speed-up and MAC ratio are against the first model of the same part."""
    head = ("part", "batch", "model", "median ms", "p90 ms", "speed-up", "images/s", "MACs", "MAC ratio", "GMAC/s")
    lines = [(*head, "parameters", "memory MiB")]
    first = {}
    for row in rows:
        dense = first.setdefault((row["part"], row["batch"]), row)
        lines.append(
            (
                row["part"],
                str(row["batch"]),
                row["model"],
                f"{row['median_ms']:.2f}",
                f"{row['p90_ms']:.2f}",
                f"{row['speedup']:.2f}x",
                f"{row['images_per_second']:.1f}",
                f"{row['macs'] / 1e6:,.1f} M",
                f"{dense['macs'] / max(row['macs'], 1):.2f}x",
                f"{row['gmacs_per_second']:.1f}",
                f"{row['parameters']:,}",
                f"{row['memory_mib']:.1f}",
            )
        )
    return markdown(lines)


def compact_table(rows: list[dict]) -> str:
    """`explain`'s rows as a Markdown table with a total."""
    head = ("layer", "groups", "zero", "left", "of them zero", "parameters", "left", "MACs (M)", "left", "what and why")
    keys = ("groups", "zero", "groups_after", "zero_after", "parameters", "parameters_after", "macs", "macs_after")
    total = {key: sum(row[key] for row in rows) for key in keys} | {"layer": "all", "why": ""}
    lines = [head]
    for row in [*rows, total]:
        counts = [f"{row[key]:,}" for key in keys[:6]]
        lines.append((row["layer"], *counts, *(f"{row[key] / 1e6:,.2f}" for key in keys[6:]), row["why"]))
    return markdown(lines)

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
    sparsity = results["sparsity"]
    return (
        markdown(rows)
        + f"\n\n{100 * sparsity['group']:.1f} % of groups zero, {100 * sparsity['parameter']:.1f} % of parameters in "
        f"them ({len(sparsity['layers'])} conv layers); best validation at step {results['step']}"
    )


def markdown(rows: list[tuple[str, ...]]) -> str:
    """Rows, the first of them the head, as a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)

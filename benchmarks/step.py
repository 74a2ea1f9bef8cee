"""Training step against the same step in PyTorch (torch_peer.py): ResNet-50, three tasks.

    python -m benchmarks.step [--sizes 128 256] [--batch 4] [--rounds 5] [--device cuda --dtype bfloat16]

Each pair is timed in alternation, each side in its own process. A ratio below 1 means that this package is faster. Both
sides apply the proximal step in the comparison with the reference implementation's scheme ("PyTorch, released scheme"),
and neither does in the others.
"""

import argparse

import numpy as np
from absl import logging

from benchmarks import ours, peers, torch_peer
from mtl_sparse.report.tables import markdown


def table(function: str, sizes, *, batch: int, rounds: int, variants=tuple(torch_peer.VARIANTS), device="cpu",
          **model) -> str:  # fmt: skip
    """Time this package against each variant in PyTorch.

    Args:
      function: "training_step" or "inference".
      sizes: sides of the images in pixels.
      batch: images in a call.
      rounds: timed calls of each side.
      variants: keys of `torch_peer.VARIANTS`. One that fails is logged as a warning and has no row.
      device: PyTorch's device.
      **model: options that both models take.

    Returns:
      A Markdown table.
    """
    lines = [("size", "against", "ours ms", "theirs ms", "ratio", "10 to 90 %", "our GMAC/s")]
    training = function == "training_step"
    for size in sizes:
        work = (3 if training else 1) * batch * ours.macs(size, **model) / 1e9  # forward, and both gradients
        for variant in variants:
            shape = {"size": size, "batch": batch, **model}
            if training:
                shape["penalty"] = variant == torch_peer.RELEASED
            theirs = {**shape, "variant": variant, "device": device}
            pair = {
                "ours": ("benchmarks.ours", function, shape),
                "theirs": ("benchmarks.torch_peer", function, theirs),
            }
            try:
                seconds = peers.alternate(pair, rounds)
            except RuntimeError as error:
                logging.warning("skipped: %s, %s", variant, error)
                continue
            ratio = seconds["ours"] / seconds["theirs"]
            low, high = np.quantile(ratio, [0.1, 0.9])
            medians = {name: float(np.median(values)) for name, values in seconds.items()}
            cells = [f"{1e3 * medians[name]:.0f}" for name in pair]
            cells += [f"{np.median(ratio):.2f}", f"{low:.2f} .. {high:.2f}", f"{work / medians['ours']:.0f}"]
            lines.append((str(size), variant, *cells))
            logging.info("%s: %s ms for %s ms, ratio %s (%s)", variant, *cells[:4])
    return markdown(lines)


def main(function: str, rounds: int) -> None:
    """Print the table of `function`; `rounds` is the default of --rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256], help="sides of the images")
    parser.add_argument("--batch", type=int, default=4, help="images in a call")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed calls of each side")
    parser.add_argument("--device", default="cpu", help="PyTorch's device; JAX uses its default")
    parser.add_argument("--dtype", default="float32", help="computation dtype; bfloat16 is autocast in PyTorch")
    variants = list(torch_peer.VARIANTS)
    parser.add_argument("--variants", nargs="+", default=variants, choices=variants, help="variants in PyTorch")
    logging.set_verbosity(logging.INFO)
    print(table(function, **vars(parser.parse_args())))


if __name__ == "__main__":
    main("training_step", rounds=5)

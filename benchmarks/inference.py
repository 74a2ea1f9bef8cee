"""Inference of the whole dense model against the same in PyTorch (torch_peer.py): ResNet-50, three tasks.

    python -m benchmarks.inference [the options of benchmarks/step.py]

What a compact model gains on top is in `--job=benchmark` and benchmarks/compact.py.
"""

from benchmarks import step

if __name__ == "__main__":
    step.main("inference", rounds=9)

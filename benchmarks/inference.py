"""Inference of the dense model against the same model in PyTorch (torch_peer.py): ResNet-50, three tasks.

    python -m benchmarks.inference [options of benchmarks/step.py]

`--job=benchmark` and benchmarks/compact.py measure the speed-up by compaction.
"""

from benchmarks import step

if __name__ == "__main__":
    step.main("inference", rounds=9)

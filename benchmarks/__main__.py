"""Run every speed benchmark of docs/benchmarks.md, one after the other.

Usage: python -m benchmarks
"""

import subprocess
import sys

COMMANDS = ("step", "inference", "prox", "compact", "loader", "compile", "scaling", "options")

if __name__ == "__main__":
    for name in COMMANDS:
        print(f"\npython -m benchmarks.{name}\n", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)

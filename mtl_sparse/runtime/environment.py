"""What tells glibc and XLA to be fast on a CPU; to be set before JAX starts (docs/benchmarks.md)."""

import os
import sys

HUGE_PAGES = "glibc.malloc.hugetlb=1"
_LIBRARY = "--xla_cpu_experimental_ynn_fusion_type"


def tune() -> bool:
    """Sets GLIBC_TUNABLES and XLA_FLAGS on Linux, unless the user has; returns whether the process is to start again.

    glibc: the memory that XLA takes anew in each call comes in huge pages; glibc reads it when a process starts.
    XLA: convolutions without YNNPACK, its choice where there is AVX-512, which takes one core where channels are few
    and several times as long for a kernel's gradient.
    """
    if sys.platform != "linux":
        return False
    flags = os.environ.get("XLA_FLAGS", "")
    if _LIBRARY not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_LIBRARY}=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION".strip()
    if "GLIBC_TUNABLES" in os.environ:
        return False
    os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
    return True


def restart_tuned() -> None:
    """`tune`, and where that asks for it starts this process again, with the arguments that it had."""
    if tune():
        os.execv(sys.executable, sys.orig_argv)

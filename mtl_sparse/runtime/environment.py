"""Options of glibc and XLA for speed on a CPU, to be set before JAX starts (docs/benchmarks.md)."""

import os
import sys

HUGE_PAGES = "glibc.malloc.hugetlb=1"
_LIBRARY = "--xla_cpu_experimental_ynn_fusion_type"


def tune() -> bool:
    """Set GLIBC_TUNABLES and XLA_FLAGS on Linux, unless the user has set them.

    glibc: huge pages for the memory that XLA allocates in each call. glibc reads this when a process starts.
    XLA: no convolutions by YNNPACK, its default with AVX-512. YNNPACK uses one core if there are few channels, and
    takes several times as long for the gradient of a kernel.

    Returns:
      Whether the process must be restarted for the options to take effect.
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
    """Call `tune`, and restart this process with the same arguments if that is necessary."""
    if tune():
        os.execv(sys.executable, sys.orig_argv)

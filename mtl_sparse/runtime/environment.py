"""Options of glibc and XLA for speed on a CPU, to be set before JAX starts (docs/benchmarks.md)."""

import importlib.metadata
import os
import re
import sys

HUGE_PAGES = "glibc.malloc.hugetlb=1"
FUSION_EMITTERS = "--xla_cpu_use_fusion_emitters"
_TRITON = "--xla_gpu_enable_triton_gemm"
LIBRARY = "--xla_cpu_experimental_ynn_fusion_type"

# XLA ends a process whose XLA_FLAGS has an unknown flag. Each flag was tried with all jaxlib releases of its range:
# (first release, first release outside). Raise the end after a try with a newer one.
_JAXLIB = {
    FUSION_EMITTERS: ((0, 10, 0), (0, 11, 1)),
    LIBRARY: ((0, 10, 0), (0, 13, 0)),
    _TRITON: ((0, 10, 0), (0, 13, 0)),
}


def knows(flag: str) -> bool:
    """Return whether the installed jaxlib is a release that has this XLA flag."""
    first, end = _JAXLIB[flag]
    numbers = re.findall(r"\d+", importlib.metadata.version("jaxlib"))
    return first <= tuple(map(int, numbers[:3])) < end


def tune() -> bool:
    """Set GLIBC_TUNABLES and XLA_FLAGS on Linux, unless the user has set them.

    glibc: huge pages for the memory that XLA allocates in each call. glibc reads this when a process starts.
    XLA: no convolutions by YNNPACK, its default with AVX-512. YNNPACK uses one core if there are few channels, and
    takes several times as long for the gradient of a kernel. On a GPU, no matrix products by Triton: XLA
    aborted when it compiled the evaluation of a model (openxla/xla issue 47381; jaxlib 0.11.2, H200). A flag is not set
    for a jaxlib that may lack it.

    Returns:
      Whether the process must be restarted for the options to take effect.
    """
    if sys.platform != "linux":
        return False
    flags = os.environ.get("XLA_FLAGS", "")
    for flag, value in ((LIBRARY, "-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"), (_TRITON, "false")):
        if flag not in flags and knows(flag):
            flags = f"{flags} {flag}={value}".strip()
    os.environ["XLA_FLAGS"] = flags
    if "GLIBC_TUNABLES" in os.environ:
        return False
    os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
    return True


def restart_tuned() -> None:
    """Call `tune`, and restart this process with the same arguments if that is necessary."""
    if tune():
        os.execv(sys.executable, sys.orig_argv)

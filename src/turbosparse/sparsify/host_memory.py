"""Make glibc keep freed memory instead of returning it to the kernel after every large tensor.

Training on a CPU allocates and frees tensors of hundreds of megabytes per step; by default each is a fresh
mapping whose pages fault in one by one. Keeping them made the logit distillation loss 4 times faster (1,024
tokens, vocabulary 49,152, one Zen 4 core: 2.2 s to 0.54 s).
"""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 256 << 20
_MAX_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell the C library to serve large blocks from its heap and never to shrink it.

    Returns
    -------
    bool
        Whether the C library took it; False where it is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MAX_INT), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(library.mallopt(parameter, value) == 1 for parameter, value in settings)

"""How fast this machine reads memory: what decoding, which reads every needed weight once, is measured by."""

from dataclasses import dataclass

from turbosparse import _native

__all__ = ["ONE_IN", "Roofline", "measure_roofline", "stream_bandwidth"]

ONE_IN = 10
"""Of rows, every tenth is read: as of a FFN that is 90 % sparse."""
_ROW_BYTES = (2048, 4096, 8192)  # 4,096 columns take 2,304 bytes in Q4_0, 4,352 in Q8_0 and 8,192 in F16
_BUFFER_BYTES = 512 << 20  # far beyond any cache


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Read bandwidth of a number of threads."""

    threads: int
    stream_gb_per_s: float
    """Every thread reads its part of a buffer from one end to the other."""
    rows_gb_per_s: dict[int, float]
    """By bytes of a row: rows in ascending order, at random one of every `ONE_IN` neighbours, each fetched
    ahead of its use. Only their own bytes count, not what the hardware fetches besides."""


def measure_roofline(threads: int) -> Roofline:
    """Measure read bandwidth; takes a few seconds.

    Parameters
    ----------
    threads : int
        How many threads read at once; 0 for physical cores, at most 8.

    Returns
    -------
    Roofline
        Bandwidths in GB/s, 10^9 bytes per second.
    """
    threads = _native.thread_count(threads)
    return Roofline(
        threads=threads,
        stream_gb_per_s=stream_bandwidth(threads) / 1e9,
        rows_gb_per_s={
            size: _native.read_bandwidth(threads, _BUFFER_BYTES, row_bytes=size, one_in=ONE_IN) / 1e9
            for size in _ROW_BYTES
        },
    )


def stream_bandwidth(threads: int) -> float:
    """Measure how fast streams are read.

    Parameters
    ----------
    threads : int
        How many threads read at once.

    Returns
    -------
    float
        Bytes per second.
    """
    return _native.read_bandwidth(threads, _BUFFER_BYTES)

"""File formats and quantisation: the native code against the gguf package, which follows ggml."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from numpy.typing import NDArray

from turbosparse import _native
from turbosparse.errors import ConfigError

READABLE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
READABLE += ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]
COLS = 512
# Where the fp16 scales lie in a block: random bits there would give NaN and Inf.
SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
}


def random_blocks(name: str, rows: int) -> NDArray[np.uint8]:
    """Random bytes with moderate scales: every integer pattern a file may hold."""
    rng = np.random.default_rng(7)
    block, size = gguf.GGML_QUANT_SIZES[GgmlType[name]]
    if block == 1:
        values = rng.standard_normal((rows, COLS), dtype=np.float32)
        return (
            np.ascontiguousarray(gguf.quants.quantize(values, GgmlType[name]))
            .view(np.uint8)
            .reshape(rows, -1)
        )
    data = rng.integers(0, 256, (rows * COLS // block, size), dtype=np.uint8)
    for at in SCALES.get(name, (0,)):
        scales = rng.uniform(-2, 2, (len(data), 1)).astype(np.float16)
        data[:, at : at + 2] = scales.view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("name", READABLE)
def test_dequantize_equals_gguf(name: str) -> None:
    data = random_blocks(name, rows=5)
    expected = gguf.quants.dequantize(data, GgmlType[name])
    got = _native.dequantize(int(GgmlType[name]), data.reshape(-1), COLS)
    # Orders of multiplication differ: two roundings of a term, relative to the largest weight.
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=4 * np.finfo(np.float32).eps * np.abs(expected).max()
    )


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("cols", [32, 96, 576])
def test_requantize_equals_gguf(isa: str, name: str, cols: int) -> None:
    values = np.random.default_rng(8).standard_normal((7, cols), dtype=np.float32)
    values[0] = 0.0
    kind = GgmlType[name]
    expected = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    np.testing.assert_array_equal(_native.requantize(values, name, isa), expected.reshape(values.shape))


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_nan_does_not_become_zero(isa: str, name: str) -> None:
    values = np.ones((1, 64), np.float32)
    values[0, 40] = np.nan
    stored = _native.requantize(values, name, isa)
    assert np.all(np.isfinite(stored[0, :32]))
    assert np.all(np.isnan(stored[0, 32:]))


def test_dequantize_refuses_what_is_no_row() -> None:
    with pytest.raises(ConfigError, match="whole blocks"):
        _native.dequantize(0, np.zeros(128, np.uint8), 2**62 + 8)
    with pytest.raises(ConfigError, match="whole blocks, got type 99"):
        _native.dequantize(99, np.zeros(34, np.uint8), 32)
    with pytest.raises(ConfigError, match="got type 8 and 33 columns"):
        _native.dequantize(8, np.zeros(34, np.uint8), 33)
    with pytest.raises(ConfigError, match="rows of 34 bytes, got 33 bytes"):
        _native.dequantize(8, np.zeros(33, np.uint8), 32)


def test_requantize_refuses_unknown_types_and_partial_blocks() -> None:
    with pytest.raises(ConfigError, match="got Q3_K"):
        _native.requantize(np.zeros((1, 32), np.float32), "Q3_K")
    with pytest.raises(ConfigError, match="multiple of 32 columns for Q4_0, got 40"):
        _native.requantize(np.zeros((1, 40), np.float32), "Q4_0")
    with pytest.raises(ConfigError, match=r"\[isa\] expected one of .*scalar, got 'neon9'"):
        _native.requantize(np.zeros((1, 32), np.float32), "F32", "neon9")

"""The tensors of a synthetic model: random weights that reach a stated sparsity by computing.

No mask is handed to anybody: gate and up are computed, and come out negative as often as stated.

- The first 32 values of every embedding are one constant, and nothing that layers add to the residual touches
  them. Through RMSNorm they stay a known constant, and the first block of gate and up turns it into a shift.
- The next values, half the predictor's rank, carry the score of `gate_statistics`: gate and up have the same
  weights there. All other columns are the noise between them.
- The predictor is exactly that part in low rank: b relu(a x) with a = [P; -P], P picking the values, and
  b = [G, -G], G the weights of gate there. relu(x) - relu(-x) = x, so the scores are G P x.
- With a hot share above a quarter, the first quarter of an FFN's neurons has smaller shifts than the others,
  so that it is active that much more often. Their scores are scaled so that one threshold serves both. Which
  neurons of either kind a token needs is independent of the token before.
- Where there are experts, each is such an FFN with weights of its own, and a random router sends every token
  to some of them by its embedding: all experts are equally likely, and neighbouring tokens have as many in
  common as chance gives.
- Attention and FFN add to the residual what their weights compute, scaled so that a layer adds a thousandth
  of the residual's variance; the norm's growth is known, and the weights of each layer allow for it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from turbosparse.bench.gate_statistics import solve_gate_statistics
from turbosparse.bench.shapes import SyntheticModel
from turbosparse.runtime.model_file_writer import TensorSource

__all__ = ["plain_tensors", "predictor_thresholds", "sparse_tensors"]

_BLOCK = 32
_CONSTANT = 4.0  # the first values of every embedding; the others have unit variance
_FFN_VARIANCE = 1e-3  # what a layer's FFN adds to the residual's variance
_ATTENTION_VARIANCE = 1e-4  # at most: an average over positions is smaller


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Columns of a matrix, a multiple of 32: random with a standard deviation, or all one value."""

    width: int
    sd: float = 0.0
    value: float = 0.0
    seed: tuple[int, ...] = ()
    """Of the random integers: the same seed and width give the same ones, whatever the scale."""


def _seed(e: int, group: int) -> tuple[int, ...]:
    """What goes before the seeds of an expert's integers; nothing for the first, as without experts."""
    return (*((group, 11) if group else ()), *((e, 10) if e else ()))


def _random(width: int, sd: float, *seed: int) -> _Columns:
    return _Columns(width=width, sd=sd, seed=seed)


def _constant(value: float) -> _Columns:
    return _Columns(width=_BLOCK, value=value)


def _bytes_of(weight_type: str, rows: int, columns: list[_Columns]) -> NDArray[np.uint8]:
    """Make a matrix as it lies in a file, [rows, bytes of a row]."""
    encode = {"Q4_0": _q4_0, "Q8_0": _q8_0, "F16": _f16}[weight_type]
    return np.concatenate([encode(rows, part) for part in columns], axis=1)


def _draw(rows: int, count: int, seed: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (rows, count), np.uint8)


def _levels() -> NDArray[np.float64]:
    """Values of the 256 bytes as int8, symmetric around zero."""
    levels = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float64)
    levels[128] = 0.0
    return levels


def _scaled(scale: float, integers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Rows of blocks, each a fp16 scale and its integers; `integers` is [rows, blocks, bytes of a block]."""
    rows, blocks, size = integers.shape
    out = np.empty((rows, blocks, 2 + size), np.uint8)
    out[:, :, :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    out[:, :, 2:] = integers
    return out.reshape(rows, blocks * (2 + size))


def _q4_0(rows: int, part: _Columns) -> NDArray[np.uint8]:
    blocks = part.width // _BLOCK
    if not part.seed:
        return _scaled(part.value / -8, np.zeros((rows, blocks, 16), np.uint8))
    nibbles = np.arange(16)
    nibbles[0] = 8  # -8 has no counterpart: it becomes 0
    pairs = (nibbles[:, None] * 16 + nibbles).astype(np.uint8).reshape(256)
    integers = pairs[_draw(rows, blocks * 16, part.seed)]
    deviation = math.sqrt(float(np.mean((nibbles - 8.0) ** 2)))
    return _scaled(part.sd / deviation, integers.reshape(rows, blocks, 16))


def _q8_0(rows: int, part: _Columns) -> NDArray[np.uint8]:
    blocks = part.width // _BLOCK
    if not part.seed:
        return _scaled(part.value / 127, np.full((rows, blocks, _BLOCK), 127, np.uint8))
    levels = _levels()
    integers = levels.astype(np.int8).view(np.uint8)[_draw(rows, part.width, part.seed)]
    return _scaled(part.sd / float(levels.std()), integers.reshape(rows, blocks, _BLOCK))


def _f16(rows: int, part: _Columns) -> NDArray[np.uint8]:
    if not part.seed:
        return np.full((rows, part.width), part.value, np.float16).view(np.uint8)
    levels = _levels()
    table = (levels * (part.sd / levels.std())).astype(np.float16)
    values: NDArray[np.float16] = table[_draw(rows, part.width, part.seed)]
    return values.view(np.uint8)


class _Tensors:
    """Tensor sources of one model."""

    def __init__(self, model: SyntheticModel) -> None:
        self.model = model
        self.shape = model.shape

    def matrix(self, name: str, rows: int, columns: list[_Columns], zero_rows: int = 0) -> TensorSource:
        """A matrix whose first `zero_rows` rows are zero."""

        def read() -> NDArray[np.uint8]:
            data = _bytes_of(self.model.weight_type, rows, columns)
            data[:zero_rows] = 0
            return data

        cols = sum(part.width for part in columns)
        return TensorSource(name=name, type_name=self.model.weight_type, shape=(rows, cols), read=read)

    def ffn_matrix(
        self,
        name: str,
        rows: Sequence[int],
        columns: Callable[[int, int], list[_Columns]],
        zero_rows: int = 0,
    ) -> TensorSource:
        """A matrix of an FFN, or of each expert, of so many rows per group of neurons.

        `columns` gives those of expert e and a group. `zero_rows` rows of it are zero.
        """
        E, weight_type = self.shape.num_experts, self.model.weight_type

        def expert(e: int) -> NDArray[np.uint8]:
            parts = [_bytes_of(weight_type, n, columns(e, group)) for group, n in enumerate(rows)]
            data = parts[0] if len(parts) == 1 else np.concatenate(parts)
            data[:zero_rows] = 0
            return data

        size = (sum(rows), sum(part.width for part in columns(0, 0)))
        if not E:
            return TensorSource(
                name=f"{name}.weight", type_name=weight_type, shape=size, read=lambda: expert(0)
            )

        def read() -> NDArray[np.uint8]:
            return np.stack([expert(e) for e in range(E)])

        return TensorSource(name=f"{name}_exps.weight", type_name=weight_type, shape=(E, *size), read=read)

    def router(self, layer: int) -> Iterator[TensorSource]:
        """Logits of unit variance from a token's own values: every expert is as likely as the others."""
        E, D = self.shape.num_experts, self.shape.hidden_size
        if E:
            weights = np.random.default_rng((layer, 9)).standard_normal((E, D), np.float32) / math.sqrt(D)
            weights[:, :_BLOCK] = 0
            yield TensorSource.of_array(f"blk.{layer}.ffn_gate_inp.weight", weights)

    def ones(self, name: str) -> TensorSource:
        return TensorSource.of_array(name, np.ones(self.shape.hidden_size, np.float32))

    def around_layers(self) -> Iterator[TensorSource]:
        """Embedding and output."""
        D, V = self.shape.hidden_size, self.shape.vocab_size
        yield self.matrix("token_embd.weight", V, [_constant(_CONSTANT), _random(D - _BLOCK, 1.0, 0)])
        yield self.ones("output_norm.weight")
        if not self.shape.tied:
            yield self.matrix("output.weight", V, [_random(D, 1 / math.sqrt(D), 1)])

    def attention(self, layer: int) -> Iterator[TensorSource]:
        """Queries, keys and values of unit variance, and an output that adds next to nothing."""
        shape, block = self.shape, f"blk.{layer}."
        D, width = shape.hidden_size, shape.num_attention_heads * shape.head_dim
        kv_width = shape.num_key_value_heads * shape.head_dim
        yield self.ones(block + "attn_norm.weight")
        for part, (name, rows) in enumerate((("q", width), ("k", kv_width), ("v", kv_width))):
            columns = [_constant(0.0), _random(D - _BLOCK, 1 / math.sqrt(D), layer, part, 2)]
            yield self.matrix(f"{block}attn_{name}.weight", rows, columns)
        sd = math.sqrt(_ATTENTION_VARIANCE / width)
        yield self.matrix(f"{block}attn_output.weight", D, [_random(width, sd, layer, 3)], zero_rows=_BLOCK)
        yield self.ones(block + "ffn_norm.weight")

    def sparse_ffn(self, layer: int, groups: "_Groups") -> Iterator[TensorSource]:
        shape, block = self.shape, f"blk.{layer}."
        D = shape.hidden_size
        rows, statistics = groups.rows, groups.statistics
        variance = 1 + layer * _FFN_VARIANCE  # of the residual's values, the constant ones aside
        rms = math.sqrt((_BLOCK * _CONSTANT**2 + (D - _BLOCK) * variance) / D)
        scored = max(self.model.rank // 2, _BLOCK)
        noise = D - _BLOCK - scored
        score_sd = rms / math.sqrt(scored * variance)  # gives scores of unit variance
        noise_sd = rms / math.sqrt(noise * variance)
        yield from self.router(layer)

        def projection(part: int, e: int, group: int) -> list[_Columns]:
            own = statistics[group]
            shift = own.up_shift if part else own.gate_shift
            apart = math.sqrt(1 - own.correlation**2)
            return [
                _constant(-shift * rms / (_BLOCK * _CONSTANT)),
                _random(scored, own.correlation * score_sd, *_seed(e, group), layer, 4),
                _random(noise, apart * noise_sd, *_seed(e, group), layer, part, 5),
            ]

        for part, name in enumerate(("gate", "up")):
            yield self.ffn_matrix(f"{block}ffn_{name}", rows, partial(projection, part))
        sd = math.sqrt(_FFN_VARIANCE / groups.square_sum)
        yield self.ffn_matrix(
            block + "ffn_down_t",
            rows,
            lambda e, group: [_constant(0.0), _random(D - _BLOCK, sd, *_seed(e, group), layer, 6)],
        )
        if self.model.rank:
            a = np.zeros((2 * scored, D), np.float32)
            picked = np.arange(scored)
            a[picked, _BLOCK + picked] = 1.0
            a[scored + picked, _BLOCK + picked] = -1.0
            name = block + "ffn_pred_a.weight"
            if shape.num_experts:
                name, a = block + "ffn_pred_a_exps.weight", np.broadcast_to(a, (shape.num_experts, *a.shape))
            yield TensorSource.of_array(name, a, self.model.weight_type)
            yield self.ffn_matrix(
                block + "ffn_pred_b",
                rows,
                lambda e, group: [
                    _random(scored, sign * score_sd * groups.scale(group), *_seed(e, group), layer, 4)
                    for sign in (1, -1)
                ],
            )

    def plain_ffn(self, layer: int) -> Iterator[TensorSource]:
        D, F, block = self.shape.hidden_size, self.shape.intermediate_size, f"blk.{layer}."
        yield from self.router(layer)

        def projection(part: int, e: int, group: int) -> list[_Columns]:
            return [_random(D, 1 / math.sqrt(D), *_seed(e, group), layer, part, 7)]

        for part, name in enumerate(("gate", "up")):
            yield self.ffn_matrix(f"{block}ffn_{name}", [F], partial(projection, part))
        sd = math.sqrt(_FFN_VARIANCE / F)
        yield self.ffn_matrix(
            block + "ffn_down", [D], lambda e, group: [_random(F, sd, *_seed(e, group), layer, 8)], _BLOCK
        )


class _Groups:
    """Hot and cold neurons of an FFN; of every expert the same."""

    def __init__(self, model: SyntheticModel) -> None:
        self.rows = [rows for rows, _ in model.groups()]
        self.statistics = [
            solve_gate_statistics(sparsity=sparsity, recall=model.recall, precision=model.precision)
            for _, sparsity in model.groups()
        ]

    @property
    def square_sum(self) -> float:
        """Of the coefficients of all neurons, in expectation."""
        return sum(n * own.mean_square for n, own in zip(self.rows, self.statistics, strict=True))

    def scale(self, group: int) -> float:
        """What scores of a group are multiplied by, so that the last group's threshold fits."""
        return self.statistics[-1].threshold / self.statistics[group].threshold


def sparse_tensors(model: SyntheticModel) -> list[TensorSource]:
    """List the tensors of the dReLU model.

    Parameters
    ----------
    model : SyntheticModel
        What it is to be like.

    Returns
    -------
    list of TensorSource
        Generated when they are written, one at a time; the same bytes every time.
    """
    groups, tensors = _Groups(model), _Tensors(model)
    sources = list(tensors.around_layers())
    for layer in range(model.num_hidden_layers):
        sources += [*tensors.attention(layer), *tensors.sparse_ffn(layer, groups)]
    return sources


def plain_tensors(model: SyntheticModel) -> list[TensorSource]:
    """List the tensors of the SwiGLU model of the same sizes and type, for other engines.

    Parameters
    ----------
    model : SyntheticModel
        Its sizes.

    Returns
    -------
    list of TensorSource
        As of `sparse_tensors`.
    """
    tensors = _Tensors(model)
    sources = list(tensors.around_layers())
    for layer in range(model.num_hidden_layers):
        sources += [*tensors.attention(layer), *tensors.plain_ffn(layer)]
    return sources


def predictor_thresholds(model: SyntheticModel) -> list[float]:
    """Give the score from which on a neuron is a candidate.

    Parameters
    ----------
    model : SyntheticModel
        What it is to be like.

    Returns
    -------
    list of float
        One per layer or expert, all the same: scores have unit variance.
    """
    ffns = model.num_hidden_layers * max(model.shape.num_experts, 1)
    return [_Groups(model).statistics[-1].threshold] * ffns

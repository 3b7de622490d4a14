"""Types of the native module; see native/bindings/."""

import os
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Mode = Literal["dense", "exact", "threshold", "predicted"]
Choose = Callable[[int, NDArray[np.float32], NDArray[np.float32]], NDArray[np.bool_]]

class GgufTensor:
    """One tensor of a model file: where it lies and what it is."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> int:
        """ggml's numeric type code."""
    @property
    def type_name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]:
        """Slowest dimension first: (rows, cols)."""
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class GgufFile:
    """A memory-mapped, fully checked GGUF file (versions 2 and 3). Raises ModelFileError."""

    def __init__(self, path: str | os.PathLike[str]) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def file_bytes(self) -> int: ...
    @property
    def metadata(self) -> dict[str, Any]:
        """Keys to int, float, bool, str or list of those, in file order. Built anew at each access."""
    @property
    def metadata_kinds(self) -> dict[str, str]:
        """Keys to the kind stored: "uint8" ... "float64", "bool", "string"; arrays as "uint32[]"."""
    @property
    def tensors(self) -> list[GgufTensor]: ...
    def tensor(self, name: str) -> GgufTensor:
        """Raises KeyError where absent."""
    def tensor_bytes(self, name: str) -> NDArray[np.uint8]:
        """Read-only view of the tensor's bytes in the mapping; keeps the file alive."""

class ModelInfo:
    """Shape of a loaded model."""

    @property
    def architecture(self) -> str: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def shared_intermediate_size(self) -> int:
        """Neurons of the expert that all tokens share; 0: there is none."""
    @property
    def num_experts(self) -> int: ...
    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def layer_neurons(self) -> int: ...
    @property
    def token_neurons(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int:
        """Positions the model was trained for."""
    @property
    def activation(self) -> str: ...
    @property
    def modes(self) -> list[Mode]:
        """Modes this file can run in; "dense" is always among them."""
    @property
    def neuron_major_down(self) -> bool:
        """Whether the file holds ffn_down_t (one row per neuron) instead of ffn_down."""
    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights the engine holds or maps."""
    @property
    def memory(self) -> dict[str, Any] | None:
        """Where not all neurons are in memory: pinned_neurons and cached_neurons that have room, neuron_bytes
        of each in memory, read_bytes of a read, io, and io_note, why it is not a better one. Else None.
        """
    @property
    def transcoded(self) -> dict[str, str]:
        """Per file type without a native kernel, what it became, e.g. {"Q4_1": "Q8_0"}."""
    @property
    def ffn_types(self) -> list[str]:
        """Weight type of the FFN matrices after loading, for the `quant` column."""

class Model:
    """Weights of a model, ready to run, and the threads that run them.

    Raises ModelFileError for a file that cannot run, ConfigError for settings out of range.
    """

    def __init__(
        self,
        path: str,
        *,
        threads: int = 0,
        isa: str = "",
        transcode: Literal["F32", "F16", "BF16", "Q8_0", "Q4_0"] = "Q8_0",
        memory_budget: int = 0,
        context: int = 0,
        io: str = "",
        kv_cache: str = "",
    ) -> None:
        """`threads` 0 means physical cores, at most 8. `memory_budget`: bytes that weights, neurons and
        sessions may take, a session of `context` positions among them; 0 means no limit. `io` is "io_uring",
        "pread" or "mmap", "" the best that works. `kv_cache`, what sessions keep of keys and values, is
        "f32", "f16" or "q8_0", "" f32 for a model whose weights are F32, else f16.
        """
    @property
    def info(self) -> ModelInfo: ...
    @property
    def threads(self) -> int: ...
    def pin_threads(self) -> None:
        """From now on keep each thread on a CPU of its own, one per core first, the caller's while it
        computes. Models that are pinned share the same CPUs.
        """
    @property
    def isa(self) -> str: ...
    @property
    def kv_cache(self) -> Literal["f32", "f16", "q8_0"]:
        """What sessions keep keys and values as."""
    def session(self, context: int) -> Session:
        """A new empty KV cache with room for `context` positions."""

class Session:
    """One sequence: its KV cache, scratch memory and counters. Not for use by two threads at once."""

    @property
    def context(self) -> int: ...
    @property
    def position(self) -> int:
        """Tokens in the cache."""
    def truncate(self, position: int) -> None:
        """Forgets everything from `position` on."""
    def forward(
        self,
        ids: NDArray[np.int32],
        *,
        mode: Mode = "dense",
        logits: Literal["none", "last", "all"] = "last",
        should_stop: Callable[[], bool] | None = None,
        candidates: NDArray[np.bool_] | None = None,
        choose: Choose | None = None,
    ) -> NDArray[np.float32]:
        """Appends tokens and returns logits, shape (0 | 1 | len(ids), vocab_size).

        Releases the GIL. Python signals are checked between layers (so Ctrl-C raises KeyboardInterrupt, with
        the cache rolled back), and `should_stop` between chunks. A mode defines the function that is
        computed, one token or many at a time: thresholds and predictors apply in prefill too. In mode
        predicted, `candidates`, shape (layers, len(ids), F), takes the predictor's place, which the file
        need not have then; or `choose` does, which is given a layer, f(gate) and g(up), each [T, F], as they
        are with what was left out of the layers before, and returns which neurons are computed, bool [T, F].
        Every layer is computed twice for it.
        Raises ContextLengthError, ConfigError (unknown mode, id out of range), ModelFileError (mode that the
        file cannot run), EngineError (NaN or Inf in the logits, named by layer where it began).
        """
    def capture(
        self, ids: NDArray[np.int32], layers: list[int]
    ) -> list[
        tuple[
            NDArray[np.float32],
            NDArray[np.float32],
            NDArray[np.float32],
            NDArray[np.float32],
            NDArray[np.int32],
        ]
    ]:
        """Runs ids densely from the current position and returns, per asked layer, FFN arrays.

        Each entry is (gate, up, out, residual, experts): f(gate) after the activation [T, F], g(up) [T, F],
        FFN output [T, D], residual stream before the FFN's norm [T, D], and the experts of each token,
        ascending [T, k]. Without a gate: f(up), ones, and the rest. With experts the neurons of all of them
        lie side by side, the shared one last, zeros where a token has others; without, k is 0.
        """
    @property
    def profiling(self) -> bool:
        """Whether the counters have times; off at first, and free of cost then. May be set."""
    @profiling.setter
    def profiling(self, on: bool) -> None: ...
    @property
    def skipping(self) -> bool:
        """Whether tokens that come together compute their candidates alone in predicted mode, where these are
        at most a quarter of the neurons; off at first. What the predictor missed is not known then, and not
        counted as wanted. May be set.
        """
    @skipping.setter
    def skipping(self, on: bool) -> None: ...
    @property
    def counters(self) -> dict[str, Any]:
        """Since the last reset: tokens, decode_tokens (those that came alone), bytes_read (weights and KV
        cache of those), and per layer, list[int], neurons summed over tokens: candidates (whose gate row was
        needed), gate_passed (whose up row was needed), active (used by down). In mode predicted, for tokens
        that came together, also wanted (kept by the mode's thresholds, candidates or not) and found (those
        of them that were candidates). While profiling: decode_ns and batch_ns, time by part of the layers
        (dict[str, int], nanoseconds, mean of the threads), of tokens that came alone and together."""
    def reset_counters(self) -> None: ...

def available_isas() -> list[str]:
    """Instruction sets that this build and this CPU both have, best first."""

def thread_count(requested: int) -> int:
    """Threads a model would have: as many as asked for, or for 0 the physical cores, at most 8."""

def plan_memory(
    path: str,
    *,
    threads: int = 0,
    transcode: Literal["F32", "F16", "BF16", "Q8_0", "Q4_0"] = "Q8_0",
    memory_budget: int,
    context: int,
    kv_cache: str = "",
) -> dict[str, int]:
    """What a budget would hold of a file, from its header, in bytes: what stays by kind (dense, gates,
    predictors, per_neuron, cache, scratch), all_neurons in bundles, and where these do not fit buffers and
    fewest_neurons; kept_clusters that have room and pinned_clusters of these; the least budget, and the one
    that holds everything. Raises ModelFileError; a budget that is too small keeps no clusters.
    """

def time_read_bursts(
    path: str, *, io: str = "", read_bytes: int, begin: int, end: int, reads: int, seconds: float = 0.5
) -> tuple[float, str]:
    """Seconds until `reads` reads at random places from `begin` to `end`, asked for at once, are there (mean
    of three bursts or more), and the reader. Raises ConfigError, EngineError where a read fails.
    """

def read_bandwidth(
    threads: int, buffer_bytes: int, *, row_bytes: int = 0, one_in: int = 1, seconds: float = 0.5
) -> float:
    """Measured read bandwidth in bytes per second, counting the bytes asked for.

    With `row_bytes` 0 each thread reads a stream; else rows of that size in ascending order, at random one of
    every `one_in` neighbours. Raises ConfigError.
    """

def dequantize(ggml_type: int, data: NDArray[np.uint8], cols: int) -> NDArray[np.float32]:
    """Rows of `cols` weights of a ggml file format as floats, shape (rows, cols). Raises ConfigError."""

def packed_row_bytes(weight_type: str, cols: int) -> int:
    """Bytes of a row as kernels read it. Raises ConfigError."""

def pack_rows(ggml_type: int, data: NDArray[np.uint8], cols: int) -> NDArray[np.uint8]:
    """Rows of a native type as kernels read them, shape (rows, packed_row_bytes). Raises ConfigError."""

def requantize(values: NDArray[np.float32], weight_type: str, isa: str = "") -> NDArray[np.float32]:
    """What values, shape (rows, cols), are once kept as `weight_type`. Raises ConfigError."""

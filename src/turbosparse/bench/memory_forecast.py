"""What a memory budget would hold of a model file, and how fast the file would run in it.

The parts come from the engine's own arithmetic on the file's header. Speed is a prediction from three things
that are measured here: how fast memory is read in one piece, how fast in rows, and how fast the disk answers
as many reads of this file as a layer of a token would miss. Hits follow from the hotness in the file: the
hottest neurons that have room are there, which is what the engine's cache begins with and tends to.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbosparse import _native
from turbosparse.bench.roofline import ONE_IN, stream_bandwidth
from turbosparse.errors import ConfigError
from turbosparse.runtime.engine import preferred_mode
from turbosparse.runtime.ffns import FFN, ffn_groups, ffns_of
from turbosparse.runtime.model_file import KEY_BUNDLE, KEY_PREDICTOR, ModelFile

__all__ = ["Demand", "Forecast", "MemoryPlan", "Speeds", "demand_of", "forecast", "plan_memory"]

COMPUTE_SHARE = 0.75
"""Of the bandwidth measured: what decoding reaches where everything is in memory (README, "Measured")."""
_ASSUMED_ACTIVE = 0.1  # share of neurons that a token needs, where the file does not say
_ROW_BUFFER_BYTES = 256 << 20
_PROBE_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a budget holds, in bytes, for one conversation."""

    budget: int
    context: int
    """Tokens."""
    parts: Mapping[str, int]
    """Bytes by what they are, of everything but neurons in bundles."""
    least: int
    """The smallest budget that works."""
    everything: int
    """The budget from which on nothing is read from disk."""
    neurons: int
    """Neurons in bundles; 0 where the file has none."""
    pinned: int
    """Of these, those that stay in memory."""
    kept: int
    """Those that have room, the pinned ones among them; all where everything fits, 0 where nothing does."""
    neuron_bytes: int
    """All of them in memory."""

    @property
    def fits(self) -> bool:
        """Whether the budget is enough."""
        return self.budget >= self.least

    @property
    def on_disk(self) -> bool:
        """Whether neurons would be read from disk."""
        return self.fits and self.kept < self.neurons


@dataclass(frozen=True, kw_only=True)
class Demand:
    """How often tokens need the neurons of a file."""

    clusters: NDArray[np.float64]
    """Per cluster of neurons, what is read at a time: share of tokens that need it."""
    token_shares: NDArray[np.float64]
    """Per cluster, the share of tokens that come to its FFN: 1 but for experts."""
    neurons_per_token: float
    """Neurons that a token asks for, of all layers."""
    assumption: str
    """Where this is from, for people."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What was measured."""

    stream_gb_per_s: float
    rows_gb_per_s: float
    """Of rows as long as one of the file's FFNs, every tenth read."""
    burst_s: float
    """From asking for the clusters that a layer misses until all are there; 0 where none are."""
    reads_per_burst: int
    io: str
    """By which reader, empty where there is nothing to read."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """How fast the file would run, by the assumptions of the module."""

    mode: str
    hit_ratio: float
    """Share of what tokens ask for that the hottest neurons carry, as many as have room."""
    disk_bytes_per_token: float
    memory_s: float
    """Per token, to read weights in memory."""
    disk_s: float
    """Per token, to read from disk what is missed."""
    tok_per_s: float
    """One after the other: nothing of the reads is hidden under computing."""
    tok_per_s_hidden: float
    """With all of the shorter one hidden under the longer."""
    speeds: Speeds
    assumption: str


def plan_memory(
    file: ModelFile, *, budget: int, context: int, threads: int = 0, kv_cache: str = ""
) -> MemoryPlan:
    """Find out what a budget would hold.

    Parameters
    ----------
    file : ModelFile
        Only its header is read.
    budget : int
        Bytes.
    context : int
        Tokens that a prompt and its answer may have together.
    threads : int
        Threads that compute, whose scratch memory counts; 0 means physical cores, at most 8.
    kv_cache : str
        Type of keys and values; empty for the engine's choice.

    Returns
    -------
    MemoryPlan
        Also for a budget that is too small.

    Raises
    ------
    ModelFileError
        When the file cannot run.
    ConfigError
        When the context is beyond what the model was trained for.
    """
    trained = file.integer(f"{file.architecture}.context_length")
    if not 1 <= context <= trained:
        raise ConfigError(
            f"[context] expected 1 to {trained} tokens, as the model was trained, got {context}"
        )
    found = _native.plan_memory(
        file.path, threads=threads, memory_budget=budget, context=context, kv_cache=kv_cache
    )
    cluster = _integer(file, "cluster") if file.has_bundles else 0
    neurons = sum(ffn.neurons for ffn in ffns_of(file)) if file.has_bundles else 0
    on_disk = found["least"] <= budget < found["everything"]
    parts = {
        "attention, norms, routers, output" if neurons else "weights": found["dense"],
        "gate of all neurons": found["gates"],
        "predictors": found["predictors"],
        "thresholds, hotness": found["per_neuron"],
        f"KV cache of {context} tokens": found["cache"],
        "scratch memory": found["scratch"],
        "reads on their way, list of neurons": found["buffers"] if budget < found["everything"] else 0,
    }
    return MemoryPlan(
        budget=budget,
        context=context,
        parts={name: size for name, size in parts.items() if size},
        least=found["least"],
        everything=found["everything"],
        neurons=neurons,
        pinned=found["pinned_clusters"] * cluster if on_disk else 0,
        kept=found["kept_clusters"] * cluster if on_disk else neurons * (budget >= found["everything"]),
        neuron_bytes=found["all_neurons"],
    )


def demand_of(file: ModelFile) -> Demand:
    """Say how often tokens need the neurons of a file with bundles.

    Parameters
    ----------
    file : ModelFile
        With hotness, or without; then all neurons count as needed equally often.

    Returns
    -------
    Demand
        In the mode that runs where none is asked for.
    """
    mode, cluster = preferred_mode(file.modes), _integer(file, "cluster")
    gate_apart = "gate" not in file.metadata[f"{KEY_BUNDLE}parts"] and file.gated
    groups = ffn_groups(ffns_of(file))
    nominal = np.concatenate([np.full(_size(group), group[0].token_share) for group in groups])
    token_shares = nominal
    if mode == "dense" or (mode != "predicted" and not gate_apart):
        shares = nominal
        apart = "" if mode == "dense" else " with gate in the bundles (export --gate-apart leaves it out)"
        assumption = f"mode {mode}{apart} reads all neurons"
    elif all(_hotness_name(group[0]) in file.tensors for group in groups):
        factor, more = _candidates_per_active(file) if mode == "predicted" else (1.0, "")
        stored = [file.dequantised(_hotness_name(group[0])) for group in groups]
        shares = np.minimum(factor * np.concatenate([values.reshape(-1) for values in stored]), 1.0)
        # An expert has at least the tokens that need its hottest neuron.
        hottest = [np.broadcast_to(values.max(axis=-1, keepdims=True), values.shape) for values in stored]
        token_shares = np.maximum(nominal, np.concatenate([values.reshape(-1) for values in hottest]))
        token_shares = np.maximum(token_shares, shares)
        assumption = f"neurons are needed as often as the hotness in the file says{more}"
    else:
        active, source = _active_ratio(file, mode)
        shares = active * nominal
        assumption = (
            f"no hotness in the file: all neurons needed equally often, {active:.0%} of them ({source})"
        )
    not_needed = (1 - shares / token_shares).reshape(-1, cluster)  # by tokens that come to the FFN
    token_shares = token_shares[::cluster]
    return Demand(
        clusters=token_shares * (1 - not_needed.prod(axis=1)),
        token_shares=token_shares,
        neurons_per_token=float(shares.sum()),
        assumption=assumption,
    )


def forecast(file: ModelFile, plan: MemoryPlan, *, threads: int = 0, io: str = "") -> Forecast:
    """Measure memory and disk for some three seconds, and predict hits and speed.

    Parameters
    ----------
    file : ModelFile
        With bundles.
    plan : MemoryPlan
        Of a budget that is enough for it.
    threads : int
        Threads that compute; 0 means physical cores, at most 8.
    io : str
        Reader of the disk; empty for the best that works here.

    Returns
    -------
    Forecast
        For the first tokens of a conversation.
    """
    demand, cluster = demand_of(file), _integer(file, "cluster")
    wanted = demand.clusters
    missed = wanted.copy()  # share of tokens that miss a cluster
    missed[np.argsort(-wanted, kind="stable")[: plan.kept // cluster]] = 0.0
    reads = _reads(missed, demand.token_shares)
    ffns = ffns_of(file)
    passed = sum(ffn.neurons * ffn.token_share for ffn in ffns) / sum(ffn.neurons for ffn in ffns)
    predictors = passed * plan.parts.get("predictors", 0)
    absent = 1 - plan.kept / plan.neurons
    streamed = plan.parts["attention, norms, routers, output"] + predictors * (1 + absent)
    streamed += passed * plan.parts.get("gate of all neurons", 0)
    rows = demand.neurons_per_token * plan.neuron_bytes / plan.neurons
    per_read = max(round(float(missed.sum()) / reads), 1) if reads else 0
    speeds = _measure(file, round(reads / file.num_hidden_layers), per_read, threads, io)
    memory_s = (streamed / speeds.stream_gb_per_s + rows / speeds.rows_gb_per_s) / 1e9 / COMPUTE_SHARE
    disk_s = file.num_hidden_layers * speeds.burst_s
    return Forecast(
        mode=preferred_mode(file.modes),
        hit_ratio=float(1 - missed.sum() / wanted.sum()),
        disk_bytes_per_token=float(missed.sum()) * cluster * _integer(file, "bytes"),
        memory_s=memory_s,
        disk_s=disk_s,
        tok_per_s=1 / (memory_s + disk_s),
        tok_per_s_hidden=1 / max(memory_s, disk_s),
        speeds=speeds,
        assumption=demand.assumption,
    )


def _reads(missed: NDArray[np.float64], token_shares: NDArray[np.float64]) -> float:
    """Reads per token: clusters that lie side by side are one, and only what is asked of an FFN is."""
    among_asked = missed / token_shares
    return float((missed * (1 - np.concatenate([[0.0], among_asked[:-1]]))).sum())


def _measure(file: ModelFile, reads: int, clusters: int, threads: int, io: str) -> Speeds:
    threads = _native.thread_count(threads)
    row = _native.packed_row_bytes(file.metadata[f"{KEY_BUNDLE}types"][-1], file.hidden_size)
    by_row = _native.read_bandwidth(threads, _ROW_BUFFER_BYTES, row_bytes=row, one_in=ONE_IN)
    burst_s, reader = 0.0, ""
    if reads:
        read_bytes = clusters * _integer(file, "cluster") * _integer(file, "bytes")
        parts = [tensor for name, tensor in file.tensors.items() if ".ffn_bundles" in name]
        burst_s, reader = _native.time_read_bursts(
            file.path,
            io=io,
            read_bytes=read_bytes,
            begin=min(part.offset for part in parts),
            end=max(part.offset + part.nbytes for part in parts),
            reads=reads,
            seconds=_PROBE_SECONDS,
        )
    return Speeds(
        stream_gb_per_s=stream_bandwidth(threads) / 1e9,
        rows_gb_per_s=by_row / 1e9,
        burst_s=burst_s,
        reads_per_burst=reads,
        io=reader,
    )


def _integer(file: ModelFile, key: str) -> int:
    return file.integer(f"{KEY_BUNDLE}{key}")


def _size(group: list[FFN]) -> int:
    return sum(ffn.neurons for ffn in group)


def _hotness_name(ffn: FFN) -> str:
    return f"blk.{ffn.layer}.ffn_hotness{ffn.suffix}"


def _candidates_per_active(file: ModelFile) -> tuple[float, str]:
    """How many more neurons the predictor names than are needed, where the file says."""
    ratios = [_mean(file.metadata.get(f"{KEY_PREDICTOR}{name}_ratio")) for name in ("candidate", "active")]
    if not all(ratios):
        return 1.0, ", and the predictor names no others"
    factor = max(float(ratios[0] or 1) / float(ratios[1] or 1), 1.0)
    return factor, f", times {factor:.2f}, which the predictor names for each that is needed"


def _active_ratio(file: ModelFile, mode: str) -> tuple[float, str]:
    """Share of the neurons of its FFNs that a token asks for."""
    for key, value in _stated_ratios(file, mode):
        if mean := _mean(value):
            return mean, f"{key} in the file"
    return _ASSUMED_ACTIVE, "assumed: the file does not say"


def _stated_ratios(file: ModelFile, mode: str) -> Iterator[tuple[str, Any]]:
    if mode == "predicted":
        yield "candidate_ratio", file.metadata.get(f"{KEY_PREDICTOR}candidate_ratio")
    else:
        yield "gate_passed", file.calibration().get("gate_passed")


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if isinstance(values, list) and values else None

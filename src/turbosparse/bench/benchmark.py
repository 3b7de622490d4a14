"""The benchmark: one model file, every mode and thread count asked for, next to llama.cpp if wanted.

Prompts are real text (a book nobody calibrated on), since random ids distort activation sparsity. Decoding is
forced through the text's own ids, so that every side evaluates the same tokens; sampling is not timed.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from turbosparse import _native
from turbosparse.bench.filled_sessions import FilledSessions
from turbosparse.bench.memory_hog import MemoryHog
from turbosparse.bench.memory_limit import LimitKind, LimitRecord, MemoryLimit, drop_cached_pages
from turbosparse.bench.roofline import stream_bandwidth
from turbosparse.bench.rounds import Case, Timing, alternate, median_ratio
from turbosparse.bench.runners import EngineRunner, LlamaCppRunner, Runner, Usage
from turbosparse.bench.shapes import SYNTHETIC
from turbosparse.bench.text_cases import cases_of, longest
from turbosparse.errors import ConfigError
from turbosparse.runtime.cpus import available_cpus
from turbosparse.runtime.engine import preferred_mode
from turbosparse.runtime.memory import forget_peak, peak_resident_bytes
from turbosparse.runtime.model_file import ModelFile

if TYPE_CHECKING:
    from turbosparse._native import Mode

__all__ = [
    "BenchConfig",
    "Row",
    "baseline_path",
    "bench_baseline",
    "bench_model",
    "cases_of",
    "default_modes",
    "load_for",
    "runs_per_model",
]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to time."""

    modes: "tuple[Mode, ...]" = ()
    """Modes of our engine; empty means all that the file can run."""
    threads: tuple[int, ...] = (0,)
    """Thread counts, each at most the CPUs of this process; 0 means physical cores, at most 8."""
    prompt_tokens: int = 256
    """Tokens of the prompt test, 0 to leave it out."""
    generated_tokens: int = 64
    """Tokens of the decode test, 0 to leave it out."""
    depths: tuple[int, ...] = (0,)
    """Tokens in the cache before the tests, each at least 0."""
    rounds: int = 5
    """Timed runs of everything, at least 1."""
    against_llama_cpp: bool = False
    """Time llama.cpp in turn with ours."""
    baseline_model: Path | None = None
    """The file llama.cpp reads; by default the same one."""
    pin: bool = False
    """Keep each of our threads on a CPU of its own."""
    isa: str = ""
    """Instruction set of our kernels; empty means the best there is."""
    memory_budget: int = 0
    """Bytes that our engine may hold, 0 for no limit. With one, a file's default mode alone is timed."""
    memory_limit: int = 0
    """Bytes that each side may have, pages of files among them; 0 for no limit."""
    limited_by: LimitKind = "cgroup"
    """A cgroup for each side, or a process that holds the other memory: then each side is timed alone."""
    io: str = ""
    """How neurons beyond the budget are read; empty means the best that works."""
    kv_cache: str = ""
    """What both engines keep keys and values as; empty means f16, or in ours f32 where weights are F32."""

    def __post_init__(self) -> None:
        _check("rounds", self.rounds, 1, 1000)
        for depth in self.depths:
            _check("depth", depth, 0, 1 << 20)
        if len(set(self.depths)) != len(self.depths) or not self.depths:
            raise ConfigError(f"[bench depth] expected different numbers, got {self.depths}")
        if self.memory_budget and len(self.depths) > 1:
            raise ConfigError(f"[bench depth] expected one within a memory budget, got {len(self.depths)}")
        _check("prompt tokens", self.prompt_tokens, 0, 1 << 20)
        _check("generated tokens", self.generated_tokens, 0, 1 << 20)
        for count in self.threads:
            _check("threads", count, 0, available_cpus())
        if not self.threads:
            raise ConfigError("[bench threads] expected at least one thread count, got none")
        if self.prompt_tokens == self.generated_tokens == 0:
            raise ConfigError("[bench] expected prompt or generated tokens above 0, got none")
        if self.baseline_model is not None and not self.against_llama_cpp:
            raise ConfigError("[bench] expected --against llama.cpp together with --baseline-model")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. None where a number was not measured."""

    model: str
    size_bytes: int
    """Bytes of the file's tensors."""
    params: int
    backend: str
    threads: int
    test: str
    mode: str
    quant: str
    """Weight types of the FFN as they are computed with."""
    kv_cache: str
    """What keys and values are kept as."""
    tok_per_s: float
    """Median over rounds."""
    tok_per_s_sd: float
    ratio_to_dense: float | None
    """Median ratio of pairs to the dense mode of the same build and file."""
    ratio_to_baseline: float | None
    """Median ratio of pairs to llama.cpp."""
    ratio_to_first_depth: float | None
    """Median ratio of pairs to the same test at the first of several depths."""
    byte_ratio_to_first_depth: float | None
    """What the bytes per token at both depths would make of that ratio at equal bandwidth: its ceiling."""
    active_ratio: float | None
    """Share of FFN neurons computed, 0 to 1."""
    recall: float | None
    """Share of the neurons wanted that the predictor found, in the untimed prompt test of the same mode."""
    precision: float | None
    """Share of the predictor's candidates that were wanted, in the same test."""
    predictor_bytes: int | None
    """Bytes of the predictor's tensors in the file; of a mode that reads them."""
    bytes_per_token: float | None
    """Weights and KV cache read per decoded token."""
    bandwidth_gb_per_s: float | None
    """bytes_per_token * tok_per_s."""
    bandwidth_share: float | None
    """bandwidth_gb_per_s relative to the read bandwidth measured with as many threads."""
    read_bandwidth_gb_per_s: float
    """Of a stream; the larger of two measurements, before and after the rounds."""
    hit_ratio: float | None
    """Share of the neurons asked for that were in memory, 0 to 1; None where all are."""
    foreseen_ratio: float | None
    """Share of the others whose read had begun before they were asked for."""
    disk_bytes_per_token: float | None
    """Read from disk."""
    disk_wait_ratio: float | None
    """Share of the time that threads waited for the disk."""
    peak_resident_bytes: int | None
    """Of the process while it was timed, Python included; None without a budget."""
    synthetic: bool
    """Random weights: the speed is measured, and nothing else means anything."""
    isa: str
    rounds_tok_per_s: list[float]
    memory_limit: LimitRecord | None = None
    """How the side's memory was limited; None where it was not."""


def runs_per_model(config: BenchConfig, path: Path) -> int:
    """Count runs, untimed ones included, for a progress bar.

    Parameters
    ----------
    config : BenchConfig
        What to time.
    path : Path
        Model file.

    Returns
    -------
    int
        How often :func:`bench_model` calls ``progress``.
    """
    modes = len(config.modes or default_modes(path, config))
    tests = ((config.prompt_tokens > 0) + (config.generated_tokens > 0)) * len(config.depths)
    return (modes + config.against_llama_cpp) * tests * (config.rounds + 1) * len(config.threads)


def bench_model(path: Path, config: BenchConfig, *, progress: Callable[[], None]) -> Iterator[Row]:
    """Time one model file.

    Parameters
    ----------
    path : Path
        Model file.
    config : BenchConfig
        What to time.
    progress : callable
        Called after every run.

    Yields
    ------
    Row
        Per thread count, test, and side.

    Raises
    ------
    ConfigError
        When a mode is not in the file, the tests do not fit the text or the model's context, or llama.cpp is
        asked for and missing, or cannot read the file, or runs beside ours where memory is held.
    """
    if config.against_llama_cpp and config.memory_limit and config.limited_by == "hog":
        raise ConfigError("[bench] expected one side at a time where memory is held, got two that take turns")
    for threads in config.threads:
        bandwidth = stream_bandwidth(_native.thread_count(threads))  # takes more than a limit might allow
        with contextlib.ExitStack() as stack:
            limit = _limit(stack, "turbosparse", path, config)
            if limit is not None:
                limit.join()
            rows = list(_bench_threads(path, config, threads, bandwidth, progress))
            used = limit.record() if limit is not None else None
        yield from (replace(row, memory_limit=used) for row in rows)


def bench_baseline(path: Path, config: BenchConfig, *, progress: Callable[[], None]) -> Iterator[Row]:
    """Time llama.cpp alone.

    Parameters
    ----------
    path : Path
        A file that it can read.
    config : BenchConfig
        What to time.
    progress : callable
        Called after every run.

    Yields
    ------
    Row
        Per thread count and test.
    """
    file = ModelFile(path)
    cases = cases_of(path, config, file.integer(f"{file.architecture}.context_length"))
    config = replace(config, baseline_model=path, against_llama_cpp=True)
    for requested in config.threads:
        threads = _native.thread_count(requested)
        with contextlib.ExitStack() as stack:
            runner, limit = _limited_baseline(stack, path, config, threads, longest(cases))
            timings = alternate([runner], cases, config.rounds, progress=progress)
            used = limit.record() if limit is not None else None
        rows = _rows(path, config, threads, None, timings, stream_bandwidth(threads), None)
        yield from (replace(row, memory_limit=used) for row in rows)


def _limit(
    stack: contextlib.ExitStack, name: str, path: Path, config: BenchConfig
) -> MemoryLimit | MemoryHog | None:
    """The limit of a side that reads a file; it ends with the stack."""
    if not config.memory_limit:
        return None
    drop_cached_pages(path)  # they would count for whoever read them first
    if config.limited_by == "hog":
        return stack.enter_context(MemoryHog(name, config.memory_limit))
    return stack.enter_context(MemoryLimit(name, config.memory_limit))


def _limited_baseline(
    stack: contextlib.ExitStack, path: Path, config: BenchConfig, threads: int, context: int
) -> tuple[LlamaCppRunner, MemoryLimit | MemoryHog | None]:
    """llama.cpp, and the limit of its process; both end with the stack."""
    limit = _limit(stack, "llama.cpp", path, config)
    runner = LlamaCppRunner(path, threads, context, limit, kv_cache=config.kv_cache)
    return stack.enter_context(runner), limit


def _bench_threads(
    path: Path, config: BenchConfig, threads: int, bandwidth: float, progress: Callable[[], None]
) -> Iterator[Row]:
    model, cases = load_for(path, config, threads)
    context = longest(cases)
    unknown = [mode for mode in config.modes if mode not in model.info.modes]
    if unknown:
        have = ", ".join(model.info.modes)
        raise ConfigError(f"[bench mode] expected one that {path.name} can run ({have}), got {unknown[0]}")
    modes = config.modes or default_modes(path, config)
    sessions = FilledSessions(model, modes[0], cases)
    runners: list[Runner] = [EngineRunner(model, mode, sessions) for mode in modes]
    forget_peak()  # that of measuring the bandwidth
    with contextlib.ExitStack() as stack:
        if config.against_llama_cpp:
            baseline = baseline_path(path, config)
            runners.append(_limited_baseline(stack, baseline, config, model.threads, context)[0])
        timings = alternate(runners, cases, config.rounds, progress=progress)
        peak = peak_resident_bytes() if config.memory_budget else None
        if not config.memory_limit:
            bandwidth = max(bandwidth, stream_bandwidth(model.threads))
    yield from _rows(path, config, model.threads, model, timings, bandwidth, peak)


def _rows(
    path: Path,
    config: BenchConfig,
    threads: int,
    model: _native.Model | None,
    timings: Sequence[Timing],
    bandwidth: float,
    peak: int | None,
) -> Iterator[Row]:
    for timing in timings:
        peers = [other for other in timings if other.case is timing.case]
        ours = isinstance(timing.runner, EngineRunner)
        file = path if ours else config.baseline_model or path
        tensors = _native.GgufFile(str(file)).tensors
        usage, prompts = _usage(timing), _usage(timing, stepwise=False)
        first = next(t for t in timings if _same_test(t, timing))
        first_bytes = _bytes_per_token(first)
        predictor = sum(tensor.nbytes for tensor in tensors if ".ffn_pred_" in tensor.name)
        bytes_per_token = _bytes_per_token(timing)
        rate = bytes_per_token * timing.median if bytes_per_token else None
        yield Row(
            model=file.stem,
            size_bytes=sum(tensor.nbytes for tensor in tensors),
            params=sum(
                math.prod(tensor.shape)
                for tensor in tensors
                if "threshold" not in tensor.name and not tensor.name.endswith("_rest.weight")
            ),
            backend=timing.runner.backend,
            threads=threads,
            test=timing.case.name,
            mode=timing.runner.mode,
            quant="+".join(model.info.ffn_types if ours and model else _file_ffn_types(tensors)),
            kv_cache=model.kv_cache if ours and model else config.kv_cache or "f16",
            tok_per_s=timing.median,
            tok_per_s_sd=timing.deviation,
            ratio_to_dense=median_ratio(timing, _find(peers, "turbosparse", "dense")) if ours else None,
            ratio_to_baseline=median_ratio(timing, _find(peers, "llama.cpp", "dense")) if ours else None,
            ratio_to_first_depth=None if first is timing else median_ratio(timing, first),
            byte_ratio_to_first_depth=(
                None
                if first is timing or first_bytes is None or bytes_per_token is None
                else first_bytes / bytes_per_token
            ),
            active_ratio=usage.active_ratio if usage else None,
            recall=prompts.recall if prompts else None,
            precision=prompts.precision if prompts else None,
            predictor_bytes=predictor if timing.runner.mode == "predicted" else None,
            bytes_per_token=bytes_per_token,
            bandwidth_gb_per_s=rate and rate / 1e9,
            bandwidth_share=rate and rate / bandwidth,
            read_bandwidth_gb_per_s=bandwidth / 1e9,
            hit_ratio=usage.hit_ratio if usage else None,
            foreseen_ratio=usage.foreseen_ratio if usage else None,
            disk_bytes_per_token=usage.disk_bytes_per_token if usage else None,
            disk_wait_ratio=usage.disk_wait_ratio if usage else None,
            peak_resident_bytes=peak if ours else None,
            synthetic=file.name.startswith(SYNTHETIC),
            isa=model.isa if ours and model else "",
            rounds_tok_per_s=timing.tok_per_s,
        )


def _same_test(one: Timing, other: Timing) -> bool:
    """Whether two timings differ in the depth at most."""
    return (one.runner, one.case.stepwise) == (other.runner, other.case.stepwise)


def _usage(timing: Timing, *, stepwise: bool | None = None) -> Usage | None:
    """What our engine read in a test, or in the other test at the same depth."""
    if not isinstance(timing.runner, EngineRunner):
        return None
    wanted = timing.case.stepwise if stepwise is None else stepwise
    return timing.runner.usage.get((len(timing.case.warm), wanted))


def _bytes_per_token(timing: Timing) -> float | None:
    usage = _usage(timing)
    return usage.bytes_per_token if usage else None


def load_for(path: Path, config: BenchConfig, threads: int) -> tuple[_native.Model, list[Case]]:
    """Load a model so that the tests fit.

    Parameters
    ----------
    path : Path
        Model file.
    config : BenchConfig
        What to time.
    threads : int
        Of the engine.

    Returns
    -------
    _native.Model
        Within the budget, if there is one.
    list of Case
        The tests.
    """
    file = ModelFile(path)
    cases = cases_of(path, config, file.integer(f"{file.architecture}.context_length"))
    model = _native.Model(
        str(path),
        threads=threads,
        isa=config.isa,
        memory_budget=config.memory_budget,
        context=longest(cases),
        io=config.io,
        kv_cache=config.kv_cache,
    )
    if config.pin:
        model.pin_threads()
    return model, cases


def default_modes(path: Path, config: BenchConfig) -> "Sequence[Mode]":
    """Choose what to time where no mode is asked for.

    Parameters
    ----------
    path : Path
        Model file.
    config : BenchConfig
        With a memory budget or without.

    Returns
    -------
    sequence of {"dense", "exact", "threshold", "predicted"}
        All modes; within a budget the one that would run, since sessions share it.
    """
    modes = ModelFile(path).modes
    return [preferred_mode(modes)] if config.memory_budget else modes


def _find(timings: Sequence[Timing], backend: str, mode: str) -> Timing | None:
    for timing in timings:
        if timing.runner.backend == backend and timing.runner.mode == mode:
            return timing
    return None


def baseline_path(path: Path, config: BenchConfig) -> Path:
    """Say which file llama.cpp reads.

    Parameters
    ----------
    path : Path
        Our model file.
    config : BenchConfig
        With another one, or without.

    Returns
    -------
    Path
        The other one, or ours where llama.cpp can read it.

    Raises
    ------
    ConfigError
        Where it cannot.
    """
    if config.baseline_model is not None:
        return config.baseline_model
    file = ModelFile(path)
    if file.neuron_major_down or file.architecture.startswith("turbosparse"):
        raise ConfigError(
            f"[bench] expected --baseline-model FILE, the plain file that {path.name} was made from: "
            "llama.cpp cannot read a file whose neurons can be skipped"
        )
    return path


def _file_ffn_types(tensors: Sequence[_native.GgufTensor]) -> list[str]:
    return sorted(
        {
            tensor.type_name
            for tensor in tensors
            if ".ffn_" in tensor.name and len(tensor.shape) > 1 and "_gate_inp" not in tensor.name
        }
    )


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"[bench {name}] expected {low} to {high}, got {value}")

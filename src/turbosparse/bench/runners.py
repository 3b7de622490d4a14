"""What a benchmark times: our engine in one mode, or llama.cpp in a process of its own."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from turbosparse import _native
from turbosparse.bench.filled_sessions import FilledSessions
from turbosparse.bench.memory_hog import MemoryHog
from turbosparse.bench.memory_limit import MemoryLimit
from turbosparse.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from turbosparse._native import Mode

__all__ = ["EngineRunner", "LlamaCppRunner", "Runner", "Usage", "require_llama_cpp"]

WORKER = Path(__file__).with_name("llama_cpp_worker.py")


class Runner(Protocol):
    """Evaluates token ids and says how long that took."""

    @property
    def backend(self) -> str:
        """Name of the engine."""

    @property
    def mode(self) -> str:
        """How it skips neurons."""

    def evaluate(self, warm: list[int], timed: list[int], *, stepwise: bool) -> float:
        """Time an evaluation.

        Parameters
        ----------
        warm : list of int
            Tokens that are in the cache before, untimed; a runner computes them once.
        timed : list of int
            Tokens that are timed.
        stepwise : bool
            Token by token, as in generation, instead of in one batch.

        Returns
        -------
        float
            Seconds.
        """


class Usage:
    """What the engine read and computed, summed over runs.

    Parameters
    ----------
    neurons_per_token : int
        FFN neurons of all layers.
    """

    def __init__(self, neurons_per_token: int) -> None:
        self._neurons = neurons_per_token
        self._tokens = self._decoded = self._bytes = self._active = 0
        self._candidates = self._wanted = self._found = 0
        self._cached = self._missed = self._foreseen = self._disk_bytes = 0
        self._wait_seconds = self._seconds = 0.0

    def add(self, counters: dict[str, Any], seconds: float) -> None:
        """Add a run.

        Parameters
        ----------
        counters : dict
            The session's counters over the timed part alone.
        seconds : float
            How long that took.
        """
        self._seconds += seconds
        self._cached += sum(counters["cached"])
        self._missed += sum(counters["missed"])
        self._foreseen += sum(counters["foreseen"])
        self._disk_bytes += sum(counters["disk_bytes"])
        self._wait_seconds += sum(counters["disk_wait_ns"]) / 1e9
        self._tokens += counters["tokens"]
        self._decoded += counters["decode_tokens"]
        self._bytes += counters["bytes_read"]
        self._active += sum(counters["active"])
        if any(counters["wanted"]):  # all neurons were computed, so that one can tell
            self._candidates += sum(counters["candidates"])
        self._wanted += sum(counters["wanted"])
        self._found += sum(counters["found"])

    @property
    def bytes_per_token(self) -> float | None:
        """Average the bytes of weights and KV cache per decoded token.

        Returns
        -------
        float or None
            Bytes; None where nothing was decoded.
        """
        return self._bytes / self._decoded if self._decoded else None

    @property
    def active_ratio(self) -> float | None:
        """Average the share of neurons computed.

        Returns
        -------
        float or None
            0 to 1; None before the first run.
        """
        return self._active / (self._tokens * self._neurons) if self._tokens else None

    @property
    def hit_ratio(self) -> float | None:
        """Average the share of the neurons asked for that were in memory.

        Returns
        -------
        float or None
            0 to 1; None where all always are, and for tokens that came together, which read whole layers.
        """
        asked = self._cached + self._missed
        return self._cached / asked if asked else None

    @property
    def foreseen_ratio(self) -> float | None:
        """Average the share of the neurons missed that were on their way before they were asked for.

        Returns
        -------
        float or None
            0 to 1; None where none was missed.
        """
        return self._foreseen / self._missed if self._missed else None

    @property
    def disk_bytes_per_token(self) -> float | None:
        """Average the bytes read from disk per token.

        Returns
        -------
        float or None
            Bytes; None where none were read.
        """
        return self._disk_bytes / self._tokens if self._disk_bytes else None

    @property
    def disk_wait_ratio(self) -> float | None:
        """Average the share of the time that threads waited for the disk.

        Returns
        -------
        float or None
            0 to 1; None where nothing was read.
        """
        return self._wait_seconds / self._seconds if self._disk_bytes else None

    @property
    def recall(self) -> float | None:
        """Average the share of the neurons wanted that the predictor found.

        Returns
        -------
        float or None
            0 to 1; None where no tokens came together in a mode with a predictor.
        """
        return self._found / self._wanted if self._wanted else None

    @property
    def precision(self) -> float | None:
        """Average the share of the candidates that were wanted.

        Returns
        -------
        float or None
            0 to 1; None where no tokens came together in a mode with a predictor.
        """
        return self._found / self._candidates if self._wanted else None


class EngineRunner:
    """Our engine in one mode.

    Parameters
    ----------
    model : _native.Model
        Weights and threads, shared by the modes that are compared.
    mode : {"dense", "exact", "threshold"}
        How neurons are skipped.
    sessions : FilledSessions
        With the tokens before the tests, shared too.
    """

    backend = "turbosparse"

    def __init__(self, model: _native.Model, mode: "Mode", sessions: FilledSessions) -> None:
        self.mode: Mode = mode
        self._sessions = sessions
        self._neurons = model.info.num_hidden_layers * model.info.token_neurons
        self.usage: dict[tuple[int, bool], Usage] = {}
        """By tokens in the cache before the test, and whether tokens came one by one."""

    def evaluate(self, warm: list[int], timed: list[int], *, stepwise: bool) -> float:
        session = self._sessions.after(warm)
        ids = np.array(timed, np.int32)
        pieces = np.split(ids, len(ids)) if stepwise else [ids]
        warmed_up = (len(warm), stepwise) in self.usage
        session.skipping = warmed_up  # before that, the untimed round shows the predictor's recall
        session.reset_counters()
        begin = time.perf_counter()
        for piece in pieces:
            session.forward(piece, mode=self.mode, logits="last")
        seconds = time.perf_counter() - begin
        usage = self.usage.setdefault((len(warm), stepwise), Usage(self._neurons))
        usage.add(session.counters, seconds)
        return seconds


class LlamaCppRunner:
    """llama.cpp through llama-cpp-python's low-level API, in a process of its own; use it as a context.

    Parameters
    ----------
    path : Path
        Model file, without turbosparse's own tensors.
    threads : int
        Threads for prompts and single tokens.
    context : int
        Positions of the KV cache.
    limit : MemoryLimit or MemoryHog, optional
        What its process may hold, cached pages of the file among it.
    kv_cache : {"", "f32", "f16", "q8_0"}
        What keys and values are kept as; empty means f16.
    """

    backend = "llama.cpp"
    mode = "dense"

    def __init__(
        self,
        path: Path,
        threads: int,
        context: int,
        limit: MemoryLimit | MemoryHog | None = None,
        *,
        kv_cache: str = "",
    ) -> None:
        require_llama_cpp()
        group = [] if limit is None else [str(limit.processes or "")]
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(path), str(threads), str(context), kv_cache or "f16", *group],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def evaluate(self, warm: list[int], timed: list[int], *, stepwise: bool) -> float:
        assert self._process.stdin is not None
        request = {"warm": warm, "timed": timed, "stepwise": stepwise}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return float(self._read()["seconds"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> "LlamaCppRunner":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        message: dict[str, Any] = json.loads(line) if line else {"error": "its process ended"}
        if "error" in message:
            raise EngineError(
                f"[llama.cpp] expected a plain model file and a running engine, got: {message['error']}"
            )
        return message


def require_llama_cpp() -> str:
    """Version of llama-cpp-python.

    Returns
    -------
    str
        The installed version.

    Raises
    ------
    ConfigError
        When it is not installed, with the command that installs it.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise ConfigError(
            "[bench] expected llama-cpp-python for --against llama.cpp, got none; "
            "install it (about 15 CPU minutes): pip install 'turbosparse[baseline]'"
        )
    return importlib.metadata.version("llama-cpp-python")

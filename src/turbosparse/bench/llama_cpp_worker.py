"""Times llama.cpp in a process of its own; started by :mod:`turbosparse.bench.runners`, as a file.

A process of its own, because the threads of two engines in one process would disturb each other: llama.cpp's
OpenMP threads spin for a while after each evaluation. Here they do so while nobody else computes. Nothing of
turbosparse is imported. One JSON object per line in and out:

    {"warm": [ids], "timed": [ids], "stepwise": bool}  ->  {"seconds": float}

``warm`` is in the cache before, computed once for each that comes; ``timed`` is evaluated at once, or token
by token. Only evaluation is timed.
"""

import ctypes
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api

__all__ = ["main"]

KV_TYPES = {"f32": api.GGML_TYPE_F32, "f16": api.GGML_TYPE_F16, "q8_0": api.GGML_TYPE_Q8_0}


def main(path: str, threads: int, context: int, kv_cache: str, *, mapped: bool) -> None:
    """Load the model, then answer requests until the input ends.

    Parameters
    ----------
    path : str
        Model file.
    threads : int
        Threads for prompts and for single tokens.
    context : int
        Positions of the KV cache.
    kv_cache : {"f32", "f16", "q8_0"}
        What keys and values are kept as.
    mapped : bool
        Leave the weights in the mapped file, where copies in another order would not fit into memory.
    """
    silence = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(silence, ctypes.c_void_p())
    api.llama_backend_init()
    model_params = api.llama_model_default_params()
    model_params.n_gpu_layers = 0
    if mapped:
        model_params.use_extra_bufts = False
    model = api.llama_model_load_from_file(path.encode(), model_params)
    if not model:
        _answer({"error": "llama.cpp cannot read this file"})
        return
    params = api.llama_context_default_params()
    params.n_ctx = context
    params.n_batch = context
    params.n_threads = threads
    params.n_threads_batch = threads
    params.type_k = params.type_v = KV_TYPES[kv_cache]
    contexts: dict[tuple[int, ...], Any] = {}  # by what is in the cache
    _answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        warm = tuple(request["warm"])
        if warm not in contexts:
            contexts[warm] = api.llama_init_from_model(model, params)
            if warm:
                _decode(contexts[warm], warm)
        runner = contexts[warm]
        api.llama_memory_seq_rm(api.llama_get_memory(runner), 0, len(warm), -1)
        size = 1 if request["stepwise"] else len(request["timed"])
        pieces = [request["timed"][i : i + size] for i in range(0, len(request["timed"]), size)]
        begin = time.perf_counter()
        for piece in pieces:
            _decode(runner, piece)
        _answer({"seconds": time.perf_counter() - begin})


def _decode(runner: Any, ids: Sequence[int]) -> None:
    tokens = (api.llama_token * len(ids))(*ids)
    status = api.llama_decode(runner, api.llama_batch_get_one(tokens, len(ids)))
    if status != 0:
        raise RuntimeError(f"llama_decode expected status 0, got {status}")
    api.llama_synchronize(runner)


def _answer(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[5:] and sys.argv[5]:  # a cgroup that limits memory; joined before the model is opened
        Path(sys.argv[5]).write_text("0", encoding="ascii")
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], mapped=len(sys.argv) > 5)

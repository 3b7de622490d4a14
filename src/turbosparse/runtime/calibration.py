"""Calibration on the engine: run a text, find the thresholds that meet a target, write a sparse file.

The target is a CETT (error of each FFN's output, the same in all layers), or a perplexity budget: the largest
CETT whose perplexity on the calibration text is at most p % above the dense model's, as in CETT-PPL-p% of
arXiv:2402.03804, but with less of it for layers whose errors matter more (`sensitivity`). Tokens that follow
take no part in either; they show what the thresholds cost on text they were not found on.
"""

import hashlib
import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from turbosparse import _native
from turbosparse.errors import CalibrationError, TextError
from turbosparse.runtime.calibration_report import (
    FEWEST_TOKENS,
    CalibrationConfig,
    CalibrationReport,
    Perplexities,
)
from turbosparse.runtime.captures import Captures, default_memory_bytes
from turbosparse.runtime.ffns import FFN, FFNTokens, down_t, ffns_of
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.model_file_copy import copy_with
from turbosparse.runtime.model_file_writer import check_output
from turbosparse.runtime.perplexity import perplexity
from turbosparse.runtime.sensitivity import layer_divergences, relative_targets
from turbosparse.runtime.sparse_file import SparseDraft, row_bytes
from turbosparse.sparsity.budget import largest_cett_within
from turbosparse.sparsity.thresholds import ONE_STAGE, TWO_STAGES, LayerThresholds, find_layer_thresholds
from turbosparse.tokenizer import Tokenizer

if TYPE_CHECKING:
    from turbosparse._native import Mode

__all__ = ["Progress", "calibrate"]

logger = logging.getLogger(__name__)

_FEWEST_OF_AN_EXPERT = 16  # tokens; F norms of each tell where one bound for all of them lies
_WEIGHED_AT = 0.15  # CETT at which layers are compared
_LARGEST_CETT = 0.9  # of a layer, whatever its share of the target

Progress = Callable[[str], AbstractContextManager[Callable[[float], None]]]
"""Given a label, opens a bar of length 1 that the yielded function advances."""


def calibrate(
    model_path: str | PathLike[str],
    text: str,
    out: str | PathLike[str],
    config: CalibrationConfig,
    *,
    overwrite: bool = False,
    progress: Progress = lambda label: nullcontext(lambda amount: None),
) -> CalibrationReport:
    """Find thresholds on a text and write a model file that can skip neurons.

    Parameters
    ----------
    model_path : str or path
        GGUF file of a supported architecture.
    text : str
        What to calibrate on; as the model will be used, at best.
    out : str or path
        The new file: the same weights with ``ffn_down`` transposed, thresholds, and how they were found.
    config : CalibrationConfig
        What to calibrate for.
    overwrite : bool
        Whether a file at ``out`` may be replaced.
    progress : callable, optional
        Opens a progress bar per stage of the work.

    Returns
    -------
    CalibrationReport
        Thresholds, errors and active ratios per layer; perplexities before and after.

    Raises
    ------
    ModelFileError
        When a file is broken, cannot be calibrated, or ``out`` cannot be written. No partial file stays.
    TextError
        When the text is empty or has fewer than 192 tokens.
    CalibrationError
        When an FFN's activations are zero or not finite, or the perplexity budget cannot be met.

    Notes
    -----
    Every expert of a mixture is an FFN of its own, and meets the target on the tokens that are sent to it.
    One that fewer than 16 tokens reach keeps all of its neurons: its thresholds are 0.

    Costs a dense pass over the tokens per group of layers that fits the memory budget, about 20 products of
    the tokens with each down projection, and three perplexities. A perplexity budget repeats the last two
    about six times. Needs the size of the new file twice on disk while it runs.
    """
    out = Path(out)
    check_output(out, overwrite=overwrite)
    source = ModelFile(model_path)
    source.require_no_bundles()
    if config.refine is not None:
        source.require_no_experts("calibrate, weights in two parts")
    engine = _native.Model(str(model_path), threads=config.threads)
    windows = _Windows(source, text, config, engine.info.context_length)
    with progress("perplexity of the dense model") as advance:
        dense = windows.perplexities(engine, "dense", advance)
    with tempfile.TemporaryDirectory(prefix=".turbosparse-", dir=out.parent) as folder:
        with progress("transposing the down projections") as advance:
            draft = SparseDraft(
                source, Path(folder) / "draft.gguf", config.down_type, advance, refine=config.refine
            )
        search = _Search(source, engine, windows, draft.down_type, config, progress)
        if config.cett is not None:
            target, ffns = config.cett, search.thresholds(config.cett)
            draft.set_thresholds(ffns)
        else:
            search.weigh_layers(draft.load(config.threads))
            target, ffns = _meet_budget(search, draft, windows, dense[0], config)
        sparse_engine = draft.load(config.threads)
        with progress("perplexity of the sparse model") as advance:
            same_weights = windows.perplexities(sparse_engine, "dense", lambda amount: advance(amount / 2))
            sparse = windows.perplexities(sparse_engine, "threshold", lambda amount: advance(amount / 2))
        of_text, of_held_out = (
            Perplexities(source=a, dense=b, threshold=c)
            for a, b, c in zip(dense, same_weights, sparse, strict=True)
        )
        report = CalibrationReport(
            cett_target=target,
            ffns=ffns,
            ffn_tokens=search.ffn_tokens,
            tokens=len(windows.ids),
            held_out_tokens=len(windows.held_out),
            text_sha256=hashlib.sha256(text.encode()).hexdigest(),
            down_type=draft.down_type,
            ppl=of_text,
            held_out_ppl=of_held_out,
        )
        copy_with(
            draft.file,
            out,
            metadata=draft.file.stored_metadata() | report.as_metadata(config),
            overwrite=overwrite,
        )
    return report


class _Windows:
    """The tokens of the text: those that thresholds are found on, and those held out."""

    def __init__(self, source: ModelFile, text: str, config: CalibrationConfig, context_length: int) -> None:
        if not text.strip():
            raise TextError("[calibration text] expected text, got nothing but white space")
        tokenizer = Tokenizer.from_metadata(source.metadata)
        ids = tokenizer.encode(text)[: config.tokens * 3 // 2]
        if len(ids) < FEWEST_TOKENS * 3 // 2:
            raise TextError(
                f"[calibration text] expected at least {FEWEST_TOKENS * 3 // 2} tokens, got {len(ids)}"
            )
        if len(ids) < config.tokens * 3 // 2:
            logger.warning(
                "the text has %d tokens, fewer than the %d asked for", len(ids), config.tokens * 3 // 2
            )
        held_out = len(ids) // 3
        self.ids, self.held_out = ids[:-held_out], ids[-held_out:]
        self._context = min(config.window, context_length)
        self._bos_id = tokenizer.bos_id if tokenizer.add_bos else None

    def arrays(self) -> list[NDArray[np.int32]]:
        """Windows of the calibration tokens, as perplexity cuts them, the incomplete one included."""
        arrays = []
        for begin in range(0, len(self.ids), self._context):
            window = np.array(self.ids[begin : begin + self._context], np.int32)
            if self._bos_id is not None:
                window[0] = self._bos_id
            arrays.append(window)
        return arrays

    def perplexities(
        self, engine: _native.Model, mode: "Mode", advance: Callable[[float], None]
    ) -> tuple[float, float]:
        """Of the calibration tokens and of those held out."""
        return self.perplexity(engine, mode, advance), self._perplexity(engine, mode, self.held_out, advance)

    def perplexity(
        self,
        engine: _native.Model,
        mode: "Mode",
        advance: Callable[[float], None] = lambda amount: None,
    ) -> float:
        """Of the calibration tokens."""
        return self._perplexity(engine, mode, self.ids, advance)

    def _perplexity(
        self,
        engine: _native.Model,
        mode: "Mode",
        ids: Sequence[int],
        advance: Callable[[float], None],
    ) -> float:
        total = len(self.ids) + len(self.held_out)
        result = perplexity(
            engine,
            ids,
            mode=mode,
            context=min(self._context, len(ids)),
            bos_id=self._bos_id,
            advance=lambda tokens: advance(tokens / total),
        )
        return result.perplexity


class _Search:
    """Thresholds of every FFN at a target. Splits are chosen at the first one and kept."""

    def __init__(
        self,
        source: ModelFile,
        engine: _native.Model,
        windows: _Windows,
        down_type: str,
        config: CalibrationConfig,
        progress: Progress,
    ) -> None:
        self._source = source
        self._ffns = ffns_of(source)
        up_type = source.tensor(self._ffns[0].tensor("up")).type_name
        self._row_bytes = (
            row_bytes(up_type, source.hidden_size),
            row_bytes(down_type, source.hidden_size),
        )
        self._layers = engine.info.num_hidden_layers
        self._splits: dict[FFN, Sequence[float]] = {}
        self._all_splits = TWO_STAGES if config.stages == 2 else ONE_STAGE
        memory = default_memory_bytes() if config.memory_bytes is None else config.memory_bytes
        self._windows = windows.arrays()
        self._captures = Captures(engine, self._windows, memory_bytes=memory)
        self._progress = progress
        self._relative_targets = np.ones(self._layers)
        self.ffn_tokens: list[int] = []

    def weigh_layers(self, engine: _native.Model) -> None:
        """From here on, layers get shares of the target by what their errors do to the predictions."""
        tried = self.thresholds(_WEIGHED_AT)
        with self._progress("what each layer's error costs") as advance:
            divergences = layer_divergences(engine, self._windows[0], self._captures, tried, advance)
        layers = np.array([ffn.layer for ffn in self._ffns])
        totals = np.bincount(layers, [t * ffn.cett for t, ffn in zip(self.ffn_tokens, tried, strict=True)])
        errors = totals / np.bincount(layers, self.ffn_tokens)
        self._relative_targets = relative_targets(divergences, errors)
        for layer, relative in enumerate(self._relative_targets):
            logger.info("blk.%d: KL %.5f, %.2f of the CETT target", layer, divergences[layer], relative)

    def thresholds(self, target: float) -> list[LayerThresholds]:
        """Of every FFN; afterwards `ffn_tokens` says on how many tokens each was found."""
        found = []
        self.ffn_tokens = []
        with self._progress(f"thresholds for CETT {target:.3g}") as advance:
            for layer, ffns in enumerate(self._captures.layers(lambda share: advance(share / 2))):
                own_target = min(target * float(self._relative_targets[layer]), _LARGEST_CETT)
                for captured in ffns:
                    found.append(self._of_ffn(captured, own_target))
                    self.ffn_tokens.append(len(captured.tokens))
                advance(0.5 / self._layers)
        return found

    def _of_ffn(self, captured: FFNTokens, target: float) -> LayerThresholds:
        ffn, tokens, gate, up = captured
        if len(tokens) < _FEWEST_OF_AN_EXPERT and ffn.expert is not None:
            if ffn not in self._splits:
                logger.warning("%s: %d tokens reached it, so it keeps all neurons", ffn.name, len(tokens))
                self._splits[ffn] = ONE_STAGE
            return _all_kept(ffn.neurons)
        try:
            found = find_layer_thresholds(
                gate,
                up,
                down_t(self._source, ffn),
                target,
                splits=self._splits.get(ffn, self._all_splits),
                row_bytes=self._row_bytes,
            )
        except CalibrationError as error:
            raise CalibrationError(f"[calibration {ffn.name}] {error}") from error
        self._splits[ffn] = (found.split,)
        logger.info(
            "%s: CETT %.4f, gate passed %.3f, active %.3f",
            ffn.name,
            found.cett,
            found.gate_passed,
            found.active,
        )
        return found


def _all_kept(neurons: int) -> LayerThresholds:
    """Of an expert that the text says too little about."""
    none = np.zeros(neurons, np.float32)
    return LayerThresholds(
        gate_threshold=none, threshold=none, cett=0.0, split=0.0, gate_passed=1.0, active=1.0, zeros=0.0
    )


def _meet_budget(
    search: _Search, draft: SparseDraft, windows: _Windows, dense: float, config: CalibrationConfig
) -> tuple[float, list[LayerThresholds]]:
    """The largest CETT target that keeps to the budget; the draft then has its thresholds."""
    assert config.ppl_budget is not None
    tried: dict[float, list[LayerThresholds]] = {}

    def rise(target: float) -> float:
        tried[target] = search.thresholds(target)
        draft.set_thresholds(tried[target])
        value = windows.perplexity(draft.load(config.threads), "threshold") / dense - 1
        logger.info("CETT %.4f: perplexity rises by %.2f %%", target, 100 * value)
        return value

    target = largest_cett_within(rise, config.ppl_budget)
    ffns = tried[target]
    draft.set_thresholds(ffns)
    return target, ffns

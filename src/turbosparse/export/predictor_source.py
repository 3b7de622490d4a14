"""A model file, seen by a predictor fit: run by the engine, without torch in the forward pass."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from turbosparse import _native
from turbosparse.errors import ConfigError, ModelFileError, TextError
from turbosparse.models.activations import Activation
from turbosparse.predict.allocation import ALL_NEURONS
from turbosparse.predict.capture import CapturedInputs
from turbosparse.predict.config import PredictorConfig
from turbosparse.predict.end_to_end import Evaluation, PlacedPredictor
from turbosparse.predict.layers import FFNLayer, RowBytes
from turbosparse.predict.predictors import LowRankPredictor, SignBitPredictor
from turbosparse.predict.source import TextPart
from turbosparse.runtime.ffns import FFN, down_t, ffns_of
from turbosparse.runtime.model_file import KEY_ACTIVATION_PARAM, ModelFile
from turbosparse.runtime.perplexity import compare_modes, perplexity
from turbosparse.runtime.predictors import LayerPredictor, Predictors, add_predictors
from turbosparse.runtime.sparse_file import default_down_type, row_bytes
from turbosparse.tokenizer import Tokenizer

__all__ = ["ModelFileFFNs", "ModelFileSource"]

_INPUTS = ("ffn_norm", "residual")
_RIVALS = ("sign_bits",)
_EVALUATED_WINDOWS = 48
_PROBED_WINDOWS = 4
_LARGEST_SHARE = 0.9  # of a text that is captured, where it has to do for the evaluation too
_SMALLEST_RANK = 32  # that every weight type can hold


class ModelFileFFNs:
    """The FFNs of a GGUF file, and what they read on a text.

    Parameters
    ----------
    file : ModelFile
        The file.
    windows : sequence of sequences of int
        Tokens that are run together, at least one window.
    threads : int
        Of the engine; 0 means physical cores, at most 8.

    Attributes
    ----------
    layers : mapping of str to FFNLayer
        In order of depth, by their names in the Hugging Face model that such a file is made from.

    Raises
    ------
    ModelFileError
        If the file's FFNs are not gated ones with a known activation, or lie in bundles.
    """

    def __init__(
        self, file: ModelFile, windows: Sequence[Sequence[int] | NDArray[np.int32]], *, threads: int = 0
    ) -> None:
        file.require_no_bundles()
        if file.activation is None or not file.gated:
            raise ModelFileError(f"[{file.path}] expected gated FFNs with a known activation, got others")
        self._file = file
        self._captured = windows
        self._threads = threads
        self._ffns = {_name(ffn): ffn for ffn in ffns_of(file)}
        self.layers: Mapping[str, FFNLayer] = _Layers(file, self._ffns)

    def capture(self, directory: Path, inputs: Sequence[str]) -> Mapping[str, CapturedInputs]:
        """Write what FFNs and their predictors read; see `turbosparse.predict.capture.CapturedFFNs`.

        Parameters
        ----------
        directory : Path
            Where the files go.
        inputs : sequence of str
            What predictors read; both that the engine gives are written.

        Returns
        -------
        mapping of str to CapturedInputs
            For each of `layers`.
        """
        del inputs
        directory.mkdir(parents=True, exist_ok=True)
        files = {name: {kind: directory / f"{name}.{kind}.f16" for kind in _INPUTS} for name in self.layers}
        for paths in files.values():
            for path in paths.values():
                path.write_bytes(b"")  # and it stays empty where no token reaches an expert
        for name, x, residual in self._states():
            for kind, rows in (("ffn_norm", x), ("residual", residual)):
                with files[name][kind].open("ab") as file:
                    rows.astype(np.float16).tofile(file)
        size, tokens = self._file.hidden_size, sum(map(len, self._captured))
        return {
            name: CapturedInputs(files=paths, hidden_size=size, tokens_seen=tokens)
            for name, paths in files.items()
        }

    def _states(self) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
        """Name of an FFN, its input and the residual before the norm, each [n, D]; window by window."""
        file = self._file
        eps = float(file.metadata[f"{file.architecture}.attention.layer_norm_rms_epsilon"])
        norms = [file.dequantised(f"blk.{layer}.ffn_norm.weight") for layer in range(file.num_hidden_layers)]
        session = _native.Model(file.path, threads=self._threads).session(max(map(len, self._captured)))
        for window in self._captured:
            session.truncate(0)
            captured = session.capture(np.array(window, np.int32), list(range(len(norms))))
            inputs = []
            for layer, (_, _, _, residual, _) in enumerate(captured):
                scale = 1 / np.sqrt(np.square(residual).mean(axis=1, keepdims=True) + eps)
                inputs.append(residual * scale * norms[layer])
            for name, ffn in self._ffns.items():
                _, _, _, residual, chosen = captured[ffn.layer]
                every = ffn.expert is None
                reached = slice(None) if every else (chosen == ffn.expert).any(axis=1)
                yield name, inputs[ffn.layer][reached], residual[reached]


class ModelFileSource(ModelFileFFNs):
    """A GGUF file to fit predictors for.

    Parameters
    ----------
    path : Path
        The file; thresholds in it stay in force beside predictors.
    texts : sequence of str
        To capture on, as much of each, from all over it.
    held_out : sequence of str
        To evaluate on; if empty, windows of `texts` that are not captured.
    config : PredictorConfig
        The fit that will be made: a model file cannot hold every kind of predictor and input.
    tokens : int
        Tokens to capture.
    window : int
        Tokens that are run together.
    threads : int
        Of the engine; 0 means physical cores, at most 8.

    Raises
    ------
    ConfigError
        If the fit needs what a model file cannot hold.
    ModelFileError
        If the file's FFNs are not gated ones with a known activation.
    TextError
        If there is too little text.
    """

    def __init__(
        self,
        path: Path,
        texts: Sequence[str],
        held_out: Sequence[str],
        config: PredictorConfig,
        *,
        tokens: int,
        window: int,
        threads: int = 0,
    ) -> None:
        _check(config)
        if window < 8:  # as for training data
            raise ConfigError(f"[sequence_length] expected at least 8, got {window}")
        file = ModelFile(path)
        file.require_no_bundles()
        self._window = window
        self._config = config
        tokenizer = Tokenizer.from_metadata(file.metadata)
        self._bos_id = tokenizer.bos_id if tokenizer.add_bos else None
        captured: list[tuple[float, list[int]]] = []  # with the share of its text before it
        rest: list[list[list[int]]] = []
        for text in texts:
            windows = _windows(tokenizer.encode(text), window)
            most = len(windows) if held_out else int(_LARGEST_SHARE * len(windows))
            chosen = _spread(len(windows), min(tokens // window // len(texts) or 1, most))
            captured += [(number / len(chosen), windows[at]) for number, at in enumerate(chosen)]
            rest.append([ids for at, ids in enumerate(windows) if at not in set(chosen)])
        if held_out:
            rest = [_windows(tokenizer.encode(text), window) for text in held_out]
        # All texts in turn: the last of what is captured is what predictors are scored on.
        in_turn = [ids for _, ids in sorted(captured, key=lambda pair: pair[0])]
        each = -(-_EVALUATED_WINDOWS // len(rest))
        self._held_out = [windows[at] for windows in rest for at in _spread(len(windows), each)]
        if not in_turn or len(self._held_out) < 2:
            raise TextError(
                f"[fit-predictor] expected text for a window of {window} tokens to capture and two held out, "
                f"got {len(in_turn)} and {len(self._held_out)}: give more text, or --held-out"
            )
        super().__init__(file, in_turn, threads=threads)

    def evaluate(
        self, configurations: Sequence[Mapping[str, PlacedPredictor]], part: TextPart
    ) -> list[Evaluation]:
        """Measure predicted mode; see `turbosparse.predict.source.PredictorSource`."""
        windows = self._held_out[part == "report" :: 2]
        if part == "probe":
            windows = [windows[at] for at in _spread(len(windows), _PROBED_WINDOWS)]
        ids = [token for window in windows for token in window]
        return [self._evaluate(placed, ids) for placed in configurations]

    def _evaluate(self, placed: Mapping[str, PlacedPredictor], ids: Sequence[int]) -> Evaluation:
        has_thresholds = next(iter(self._ffns.values())).thresholds(self._file) is not None
        against: _native.Mode = "threshold" if has_thresholds else "dense"
        if not placed:
            model = _native.Model(self._file.path, threads=self._threads)
            found = perplexity(model, ids, mode=against, context=self._window, bos_id=self._bos_id)
            return Evaluation(perplexity=found.perplexity, kl_divergence=0.0, same_top1=1.0)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "predicted.gguf"
            predictors = self._stored(placed)
            add_predictors(self._file, path, predictors, type_name=self._config.predictor_type)
            model = _native.Model(str(path), threads=self._threads)
            compared = compare_modes(
                model, ids, mode="predicted", against=against, context=self._window, bos_id=self._bos_id
            )
        return Evaluation(
            perplexity=compared.result.perplexity,
            kl_divergence=compared.mean_kl,
            same_top1=compared.same_top_1,
        )

    def _stored(self, placed: Mapping[str, PlacedPredictor]) -> Predictors:
        """As the file has it: an FFN without a predictor has one that is never asked."""
        sign = any(isinstance(each.predictor, SignBitPredictor) for each in placed.values())
        ranks: dict[tuple[int, str], int] = {}  # experts of a layer have one
        for name, each in placed.items():
            if isinstance(each.predictor, LowRankPredictor):
                group = self._ffns[name].layer, self._ffns[name].suffix
                ranks[group] = max(ranks.get(group, 0), each.predictor.a.weight.shape[0])
        layers = []
        for name, ffn in self._ffns.items():
            own = placed.get(name)
            rank = ranks.get((ffn.layer, ffn.suffix), _SMALLEST_RANK)
            a = np.zeros((rank, self._file.hidden_size), np.float32)
            b = np.zeros((ffn.neurons, rank), np.float32)
            if own is not None and isinstance(own.predictor, LowRankPredictor):
                fitted = own.predictor.a.weight.numpy(), own.predictor.b.weight.numpy()
                a[: len(fitted[0])], b[:, : len(fitted[0])] = fitted
            threshold = ALL_NEURONS if own is None else own.threshold
            layers.append(LayerPredictor(threshold=threshold, a=None if sign else a, b=None if sign else b))
        reads = next(iter(placed.values())).input
        return Predictors(
            kind="sign" if sign else "low_rank",
            reads="residual" if reads == "residual" else "ffn_norm",
            layers=layers,
        )

    def finetune(
        self, placed: Mapping[str, PlacedPredictor], price: float, output: Path, config: PredictorConfig
    ) -> None:
        """Refused when the source is made: the engine computes no gradients."""
        raise ConfigError("[fit-predictor] expected no fine-tuning of a model file, got some")


class _Layers(Mapping[str, FFNLayer]):
    """The FFNs of a file, in order of depth; weights become floats when an FFN is asked for."""

    def __init__(self, file: ModelFile, ffns: Mapping[str, FFN]) -> None:
        self._file, self._ffns = file, ffns

    def __len__(self) -> int:
        return len(self._ffns)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ffns)

    def __getitem__(self, name: str) -> FFNLayer:
        file, ffn = self._file, self._ffns[name]
        gate, up, down = (ffn.tensor(part) for part in ("gate", "up", "down_t"))
        types = [file.tensor(gate).type_name, file.tensor(up).type_name]
        types.append(file.tensor(down).type_name if file.neuron_major_down else default_down_type(file))
        thresholds = ffn.thresholds(file)
        return FFNLayer(
            gate=torch.tensor(ffn.values(file, gate)),
            up=torch.tensor(ffn.values(file, up)),
            down=torch.tensor(down_t(file, ffn)).T,
            activation=Activation(
                name=str(file.activation), threshold=float(file.metadata.get(KEY_ACTIVATION_PARAM, 0.0))
            ),
            row_bytes=RowBytes(*(row_bytes(name, file.hidden_size) for name in types)),
            thresholds=thresholds and (torch.tensor(thresholds[0]), torch.tensor(thresholds[1])),
        )


def _windows(ids: Sequence[int], size: int) -> list[list[int]]:
    return [list(ids[start : start + size]) for start in range(0, len(ids) - size + 1, size)]


def _spread(length: int, count: int) -> list[int]:
    """At most so many of the indices, evenly over all."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def _name(ffn: FFN) -> str:
    """Name of the FFN in the Hugging Face model that such a file is made from."""
    shared = ".shared_expert" if ffn.suffix == "_shexp" else ""
    expert = shared if ffn.expert is None else f".experts.{ffn.expert}"
    return f"model.layers.{ffn.layer}.mlp{expert}"


def _check(config: PredictorConfig) -> None:
    for field, allowed, got in (("inputs", _INPUTS, config.inputs), ("rivals", _RIVALS, config.rivals)):
        if not set(got) <= set(allowed):
            known = " and ".join(allowed)
            raise ConfigError(f"[predictor.{field}] expected {known} for a model file, got {', '.join(got)}")
    if config.finetune_steps:
        raise ConfigError(
            "[predictor.finetune_steps] expected 0 for a model file, since the engine computes no gradients, "
            f"got {config.finetune_steps}"
        )

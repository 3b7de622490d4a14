"""Export: what a model file is made of, put together, written, and checked before it gets its name."""

import dataclasses
import importlib.util
import logging
import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbosparse.errors import ConfigError
from turbosparse.export.check import (
    KL_LIMITS,
    CheckResult,
    compare_logits,
    engine_logits,
    text_windows,
    torch_logits,
)
from turbosparse.export.draft import TypeChoice, draft_of_model_file
from turbosparse.export.hf_config import HFConfig
from turbosparse.export.hf_draft import draft_of_directory
from turbosparse.export.predictor_files import with_predictors
from turbosparse.export.thresholds import with_thresholds
from turbosparse.runtime.bundles import bundled
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.model_file_writer import (
    TensorSource,
    check_output,
    model_file_bytes,
    write_model_file,
)
from turbosparse.runtime.neuron_hotness import Hotness, neuron_hotness
from turbosparse.runtime.texts import CALIBRATION, read_text
from turbosparse.tokenizer import Tokenizer

__all__ = ["Bundles", "ExportConfig", "ExportPlan", "ExportReport", "export_model", "plan_export"]

logger = logging.getLogger(__name__)

Progress = Callable[[str], AbstractContextManager[Callable[[float], None]]]
_CHECK_CONTEXT = 256  # tokens per window
# general.file_type of llama.cpp, by the type of most weights.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}


@dataclass(frozen=True, kw_only=True)
class Bundles:
    """How neurons are laid out for a model larger than memory."""

    gate_apart: bool = False
    """Whether gate stays a tensor of its own, for modes that compute it for every neuron."""
    hotness_tokens: int = 2048
    """Tokens of the text that ships with turbosparse to sort neurons by; 0 keeps their order."""

    def __post_init__(self) -> None:
        if self.hotness_tokens < 0:
            raise ConfigError(f"[hotness tokens] expected 0 or more, got {self.hotness_tokens}")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to put into a model file."""

    types: TypeChoice = field(default_factory=TypeChoice)
    """Weight types; a Hugging Face directory becomes Q8_0 where none is chosen."""
    predictors: Path | None = None
    """Directory that ``fit-predictor`` left."""
    thresholds: Path | None = None
    """Calibrated model file of the same model."""
    name: str | None = None
    """Name of the model, for people."""
    allow_untrained: bool = False
    """Whether a model may be exported whose activation was swapped and that was not trained since."""
    check: bool = True
    """Whether the file's logits are compared with those of what it was made from."""
    check_tokens: int = 1024
    """Tokens of the text that are compared."""
    bundles: Bundles | None = None
    """How the rows of each neuron are put side by side; None leaves tensors as they are."""
    threads: int = 0
    """Threads of the check; 0: physical cores, at most 8."""


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """Everything that will be in the file."""

    source: Path
    metadata: Mapping[str, Any]
    tensors: list[TensorSource]
    type_name: str  # of most weights

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def file_bytes(self) -> int:
        """Work out the size of the whole file.

        Returns
        -------
        int
            Bytes.
        """
        return model_file_bytes(self.metadata, self.tensors)


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written."""

    output: Path
    """Where the file is; with a name of its own where the check failed."""
    check: CheckResult | None
    """None where there was no check."""


def plan_export(source: Path, config: ExportConfig) -> ExportPlan:
    """Find out what the file will hold, and refuse what cannot be exported.

    Parameters
    ----------
    source : Path
        Hugging Face directory, or a model file.
    config : ExportConfig
        What to put in.

    Returns
    -------
    ExportPlan
        Tensors are read when the file is written.

    Raises
    ------
    ModelFileError
        When the model, its predictors or its thresholds are broken, incomplete or of an unknown kind.
    ConfigError
        When the model was swapped and never trained, or predictors and thresholds belong to another one.
    TokenizerError
        When a directory has no tokenizer, or one that a model file cannot hold.
    """
    types = config.types
    if source.is_dir():
        if HFConfig(source).untrained and not config.allow_untrained:
            raise ConfigError(
                f"[{source}] expected a model that was trained after its activation was swapped, got one "
                "without a record of training: it would write nonsense (--allow-untrained exports it anyway)"
            )
        types = dataclasses.replace(types, weights=types.weights or "Q8_0")
        draft = draft_of_directory(source, name=config.name)
    else:
        file = ModelFile(source)
        if types.weights or types.down:
            file.require_no_bundles()  # whose types stay as they are
        draft = draft_of_model_file(file, name=config.name)
    if config.predictors is not None:
        draft = with_predictors(draft.neuron_major(), config.predictors)
    if config.thresholds is not None:
        draft = with_thresholds(draft.neuron_major(), ModelFile(config.thresholds))
    tensors = [weight.source(types) for weight in draft.weights]
    type_name = _main_type(tensors)
    metadata = dict(draft.metadata)
    if type_name in _FILE_TYPES:
        metadata["general.file_type"] = _FILE_TYPES[type_name]
    if config.bundles is not None:
        metadata, tensors = bundled(
            metadata,
            tensors,
            gate_apart=config.bundles.gate_apart,
            hotness=_hotness(source, config.bundles, config.threads),
        )
    return ExportPlan(source=source, metadata=metadata, tensors=tensors, type_name=type_name)


def export_model(
    plan: ExportPlan,
    output: Path,
    text: str,
    config: ExportConfig,
    *,
    overwrite: bool = False,
    progress: Progress = lambda label: nullcontext(_ignore),
) -> ExportReport:
    """Write a model file and check it.

    Parameters
    ----------
    plan : ExportPlan
        What to write.
    output : Path
        The new file. It appears there when it is complete and has passed the check.
    text : str
        What to check with.
    config : ExportConfig
        Whether and how to check.
    overwrite : bool
        Whether a file at ``output`` may be replaced.
    progress : callable, optional
        Opens a progress bar per stage of the work.

    Returns
    -------
    ExportReport
        Where the file is, and the result of the check. A file that fails it is kept beside ``output`` as
        ``NAME.failed.gguf``.

    Raises
    ------
    ModelFileError
        When ``output`` cannot be written. No partial file stays.
    ConfigError
        When the check needs torch and there is none.
    """
    check_output(output, overwrite=overwrite)
    if config.check and plan.source.is_dir() and importlib.util.find_spec("torch") is None:
        raise ConfigError(
            "[check] expected torch, to compare with (pip install 'turbosparse[train]'), got none; "
            "--no-check exports without"
        )
    with tempfile.TemporaryDirectory(prefix=".turbosparse-", dir=output.parent) as folder:
        draft = Path(folder) / "draft.gguf"
        with progress("writing") as advance:
            write_model_file(
                draft, plan.metadata, plan.tensors, progress=lambda count: advance(count / plan.nbytes)
            )
        check = None
        if config.check:
            with progress("comparing logits") as advance:
                check = _check(plan, draft, text, config, advance)
        target = output if check is None or check.passed else output.with_suffix(".failed.gguf")
        check_output(target, overwrite=overwrite or target != output)
        draft.replace(target)
    return ExportReport(output=target, check=check)


def _hotness(source: Path, bundles: Bundles, threads: int) -> Hotness | None:
    """How hot the neurons are, where the source can tell."""
    if bundles.hotness_tokens == 0:
        return None
    if source.is_dir() or ModelFile(source).modes == ["dense"]:
        logger.warning(
            "neurons keep their order: only a model file that can skip neurons tells which are hot; "
            "export one first, then put it into bundles"
        )
        return None
    return neuron_hotness(
        ModelFile(source),
        read_text(CALIBRATION),
        tokens=bundles.hotness_tokens,
        gate_apart=bundles.gate_apart,
        threads=threads,
    )


def _ignore(share: float) -> None:
    """Show nothing."""


def _check(
    plan: ExportPlan, draft: Path, text: str, config: ExportConfig, advance: Callable[[float], None]
) -> CheckResult:
    file = ModelFile(draft)
    context = min(_CHECK_CONTEXT, file.integer(f"{file.architecture}.context_length"))
    tokenizer = Tokenizer.from_metadata(file.metadata)
    windows = text_windows(tokenizer, text, tokens=config.check_tokens, context=context)
    reference = torch_logits if plan.source.is_dir() else engine_logits
    types = {tensor.type_name for tensor in plan.tensors if len(tensor.shape) == 2}
    return compare_logits(
        reference(plan.source, threads=config.threads),
        engine_logits(draft, threads=config.threads),
        windows,
        limit=max(KL_LIMITS.get(name, KL_LIMITS["Q8_0"]) for name in types),
        advance=advance,
    )


def _main_type(tensors: list[TensorSource]) -> str:
    """The type that most values have."""
    values: dict[str, int] = {}
    for tensor in tensors:
        values[tensor.type_name] = values.get(tensor.type_name, 0) + math.prod(tensor.shape)
    return max(values, key=lambda name: values[name])

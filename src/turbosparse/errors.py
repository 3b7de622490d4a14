"""Every error that turbosparse raises on purpose.

One small tree: each child also inherits the built-in a caller would expect, so ``except ValueError`` keeps
working for people who never heard of this module. Messages read ``[place] expected ..., got ...``. The
command line prints the message alone and leaves with status 2.
"""

__all__ = [
    "CalibrationError",
    "ConfigError",
    "ContextLengthError",
    "DataError",
    "EngineError",
    "ModelFileError",
    "TextError",
    "TokenizerError",
    "TrainingError",
    "TurboSparseError",
]


class TurboSparseError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(TurboSparseError, ValueError):
    """A setting is out of its range, or two settings contradict each other."""


class ModelFileError(TurboSparseError, ValueError):
    """A model file is broken, or holds something that this version cannot run."""


class TokenizerError(TurboSparseError, ValueError):
    """A tokenizer is missing from a model file, or of an unknown kind."""


class TextError(TurboSparseError, ValueError):
    """An input text is empty, too short, or not UTF-8."""


class ContextLengthError(TurboSparseError, ValueError):
    """A prompt does not fit the context window."""


class EngineError(TurboSparseError, RuntimeError):
    """The engine cannot do what was asked in the state it is in."""


class CalibrationError(TurboSparseError, RuntimeError):
    """A calibration target cannot be met."""


class DataError(TurboSparseError, ValueError):
    """A training or evaluation source is missing, empty or corrupt."""


class TrainingError(TurboSparseError, RuntimeError):
    """A training run cannot start, resume or go on."""

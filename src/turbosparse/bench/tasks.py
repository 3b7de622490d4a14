"""Tasks of EleutherAI's lm-evaluation-harness on any of its models, ours among them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval
import lm_eval.evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from turbosparse.errors import ConfigError

__all__ = ["OPEN_LLM_TASKS", "TaskScore", "TaskSettings", "evaluate"]

OPEN_LLM_TASKS: Mapping[str, int] = {
    "arc_challenge": 25,
    "hellaswag": 10,
    "mmlu": 5,
    "truthfulqa_mc2": 0,
    "winogrande": 5,
    "gsm8k": 5,
}
"""The Open LLM Leaderboard's first set, with the examples shown per question, as in arXiv 2406.05955."""

# In the messages of the harness's samplers, which are asked before the model is.
_TOO_FEW_EXAMPLES = ("larger than population", "fewshot samples", "no documents available for sampling")


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What is asked, and how much of it."""

    tasks: Sequence[str]
    """Names of tasks, groups or tags."""
    include_path: Path | None = None
    """Folder with further tasks (YAML)."""
    shots: int | None = None
    """Examples shown before each question; the task's own number if not given."""
    limit: int | None = None
    """Only the first questions of each task, 1 or more."""
    chat: bool = False
    """Ask through the model's chat template."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError("[tasks] expected at least one task, got none")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"[limit] expected 1 or more, got {self.limit}")
        if self.shots is not None and self.shots < 0:
            raise ConfigError(f"[shots] expected 0 or more, got {self.shots}")


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    standard_error: float | None = None
    questions: int = 0
    shots: int = 0
    higher_is_better: bool = True


def evaluate(model: LM, settings: TaskSettings) -> list[TaskScore]:
    """Ask a model.

    Parameters
    ----------
    model : lm_eval.api.model.LM
        `EngineHarnessModel`, or any other model of the harness.
    settings : TaskSettings
        What to ask.

    Returns
    -------
    list of TaskScore
        In the order of the tasks.

    Raises
    ------
    ConfigError
        If the harness does not know a task, or a task has too few examples to show.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    include = str(settings.include_path) if settings.include_path else None
    manager = _task_manager(include)
    unknown = [name for name in settings.tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"[tasks] expected tasks that lm-evaluation-harness knows, got {', '.join(unknown)}; "
            "`lm_eval ls tasks` lists them, --include adds a folder of your own"
        )
    try:
        # The harness asks git which commit it is, whose complaint would be printed amid the progress.
        with patch.object(lm_eval.evaluator, "get_git_commit_hash", lambda: None, create=True):
            answers = lm_eval.simple_evaluate(
                model=model,
                tasks=list(settings.tasks),
                num_fewshot=settings.shots,
                limit=settings.limit,
                apply_chat_template=settings.chat,
                fewshot_as_multiturn=settings.chat,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=0 if settings.limit == 1 else 1000,
            )
    except (ValueError, AssertionError) as error:
        if not any(text in str(error) for text in _TOO_FEW_EXAMPLES):
            raise
        wanted = "its own number of" if settings.shots is None else settings.shots
        among = "" if len(settings.tasks) == 1 else "one of "
        raise ConfigError(
            f"[shots] expected a task with {wanted} examples to show before a question, "
            f"got fewer in {among}{', '.join(settings.tasks)}"
        ) from error
    return _scores(answers)


@lru_cache(maxsize=4)
def _task_manager(include: str | None) -> TaskManager:
    """Read what tasks there are, which takes seconds; a study asks at each of its points."""
    return TaskManager(include_path=include)


def _scores(answers: Mapping[str, Any]) -> list[TaskScore]:
    scores = []
    for task, results in answers["results"].items():
        for key, value in results.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = results.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            scores.append(
                TaskScore(
                    task=task,
                    metric=name,
                    value=float(value),
                    standard_error=float(error) if isinstance(error, int | float) else None,
                    questions=int(answers["n-samples"].get(task, {}).get("effective", 0)),
                    shots=int(answers["n-shot"].get(task, 0) or 0),
                    higher_is_better=bool(answers["higher_is_better"].get(task, {}).get(metric, True)),
                )
            )
    return scores

"""What ``turbosparse demo`` runs: every mode on the same prompt in turn, and on the same held-out text."""

from typing import TYPE_CHECKING

from turbosparse.cli.console import progress

if TYPE_CHECKING:
    from turbosparse._native import Mode
    from turbosparse.runtime.engine import Model
    from turbosparse.runtime.generation import GenerationStats
    from turbosparse.runtime.perplexity import ModeComparison

__all__ = ["answer", "judge"]

ROUNDS = 3
JUDGED_TOKENS = 2048
REPETITION_PENALTY = 1.2  # a small model without chats in its training goes round in circles otherwise


def judge(model: "Model") -> "dict[Mode, ModeComparison]":
    """Judge every mode that skips neurons against dense, on text that no threshold was found on.

    Parameters
    ----------
    model : Model
        With at least one such mode.

    Returns
    -------
    dict of str to ModeComparison
        By mode.
    """
    from turbosparse.runtime.perplexity import compare_modes
    from turbosparse.runtime.texts import HELD_OUT, read_text

    ids = model.text_ids(read_text(HELD_OUT))[:JUDGED_TOKENS]
    sparse = [mode for mode in model.info.modes if mode != "dense"]
    with progress(len(sparse) * len(ids), "perplexity on held-out text") as advance:
        return {
            mode: compare_modes(
                model.engine,
                ids,
                mode=mode,
                context=min(512, model.context),
                bos_id=model.window_bos_id,
                advance=advance,
            )
            for mode in sparse
        }


def answer(model: "Model", prompt: str, max_tokens: int) -> "dict[Mode, list[tuple[str, GenerationStats]]]":
    """Answer in every mode, in turn; the first round warms up and is dropped.

    Parameters
    ----------
    model : Model
        What answers.
    prompt : str
        What is asked, or gone on with.
    max_tokens : int
        Length of the answers.

    Returns
    -------
    dict of str to list of (str, GenerationStats)
        Text and statistics of each round, by mode.
    """
    from turbosparse.runtime.sampling import SamplingConfig

    modes, chat = model.info.modes, model.has_chat_template
    sampling = SamplingConfig() if chat else SamplingConfig(repetition_penalty=REPETITION_PENALTY)
    found: dict[Mode, list[tuple[str, GenerationStats]]] = {mode: [] for mode in modes}
    with progress((ROUNDS + 1) * len(modes), "generating") as advance:
        for _ in range(ROUNDS + 1):
            for mode in modes:
                answer = model.generate(
                    prompt,
                    max_tokens=max_tokens,
                    mode=mode,
                    chat=chat,
                    sampling=sampling,
                    cache=model.new_cache(),
                )
                found[mode].append((answer.read(), answer.stats))
                advance(1)
    return {mode: rounds[1:] for mode, rounds in found.items()}

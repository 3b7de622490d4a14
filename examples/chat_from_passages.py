"""Turn passages of the form ``Title -- text`` into chats, one JSON line each: a question and its answer.

    python examples/chat_from_passages.py corpora/wikipedia_passages.txt corpora/wikipedia_chat.jsonl

Passages that a run holds out of training (2 %, by hash) are left out, so that they do not come back as
answers.
"""

import argparse
import json
from pathlib import Path

from turbosparse.data.config import SourceConfig
from turbosparse.data.held_out import HeldOutSplit
from turbosparse.data.readers import open_reader

QUESTIONS = ("What can you tell me about {}?", "Tell me about {}.", "Write a short paragraph about {}.", "{}")
HELD_OUT_PERCENT = 2.0


def main(source: str, target: str) -> None:
    """Convert one file."""
    split = HeldOutSplit(HELD_OUT_PERCENT)
    reader = open_reader(SourceConfig(path=source))
    with Path(target).open("w", encoding="utf-8") as file:
        for number, passage in enumerate(reader):
            title, separator, text = str(passage).partition(" -- ")
            if not separator or split.is_held_out(str(passage)):
                continue
            question = QUESTIONS[number % len(QUESTIONS)].format(title)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Turn passages into chats.")
    parser.add_argument("passages", help="text of passages TITLE -- TEXT")
    parser.add_argument("target", help="JSON lines to write")
    options = parser.parse_args()
    main(options.passages, options.target)

"""Ask a model many short questions and write its answers as chats, one JSON line each.

    python examples/chat_from_model.py model.gguf corpora/wikipedia_passages.txt corpora/model_chat.jsonl

A model that is made sparse by distillation learns most about its own way of answering from its own answers.
Every question has its own seed, and a file that is there already goes on behind its last line.
"""

import argparse
import json
from pathlib import Path

import turbosparse
from turbosparse.data.config import SourceConfig
from turbosparse.data.readers import open_reader

CHATS = 4000
MAX_TOKENS = 160
QUESTIONS = (
    "What is {}?",
    "Tell me about {} in two or three sentences.",
    "Explain {} to a child.",
    "Why is {} important?",
    "List three facts about {}.",
    "Write a short story about {}.",
    "Write a poem about {}.",
    "What would you ask an expert on {}?",
    "Give me a short summary of what people know about {}.",
    "How would you describe {} to someone who has never heard of it?",
    "Who would be interested in {}, and why?",
    "What are the advantages and disadvantages of {}?",
    "Write a friendly email to a colleague about {}.",
    "Name a common mistake about {} and correct it.",
    "Write a title and an opening paragraph of an article about {}.",
    "How can I learn more about {}?",
)
TASKS = (
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Give me three tips for sleeping better.",
    "What is the capital of France?",
    "Write a Python function that reverses a string.",
    "Write a Python function that checks whether a number is prime.",
    "How do plants make food from sunlight?",
    "What is the difference between a list and a tuple in Python?",
    "Suggest a weekend plan for a family with two children.",
    "Explain how a computer's memory works.",
    "How does a bicycle stay upright?",
    "What should I pack for a week in the mountains?",
    "Write a haiku about autumn.",
    "How do I make a good cup of tea?",
    "What causes the seasons?",
    "How can I stay focused while studying?",
    "Explain what a database is.",
    "What does the command `ls -l` show?",
    "How do vaccines work?",
    "Summarise the story of Romeo and Juliet.",
)


def main(model_file: str, passages: str, target: str) -> None:
    """Ask and write."""
    titles: dict[str, None] = {}
    for passage in open_reader(SourceConfig(path=passages)):
        title, separator, _ = str(passage).partition(" -- ")
        if separator:
            titles[title] = None
    topics = sorted(titles)
    questions = [*TASKS]
    for number in range(CHATS - len(TASKS)):
        topic = topics[number * 7919 % len(topics)]
        questions.append(QUESTIONS[number % len(QUESTIONS)].format(topic))
    path = Path(target)
    done = len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0
    model = turbosparse.load(model_file, threads=1, context=512)
    with path.open("a", encoding="utf-8") as file:
        for number in range(done, CHATS):
            sampling = turbosparse.SamplingConfig(temperature=0.8, top_p=0.95, seed=number)
            question = questions[number]
            answer = "".join(model.generate(question, chat=True, max_tokens=MAX_TOKENS, sampling=sampling))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
            file.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a model's own answers as chats.")
    parser.add_argument("model", help="GGUF file with a chat template")
    parser.add_argument("passages", help="text of passages TITLE -- TEXT, whose titles are asked about")
    parser.add_argument("target", help="JSON lines to write")
    options = parser.parse_args()
    main(options.model, options.passages, options.target)

"""The engine against transformers on a real model: same F32 weights, same logits, same greedy tokens."""

from pathlib import Path

import numpy as np
import pytest

from tests.real_models import SMOLLM2, real_model
from turbosparse import load
from turbosparse.runtime.model_file import ModelFile
from turbosparse.runtime.model_file_copy import copy_with
from turbosparse.runtime.model_file_writer import TensorSource
from turbosparse.runtime.texts import HELD_OUT, read_text

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
LENGTH, PROMPT, GENERATED = 256, 32, 128


@pytest.fixture(scope="module")
def path() -> Path:
    return real_model(SMOLLM2)


@pytest.fixture(scope="module")
def in_floats(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as F32: nothing is quantised on the way, neither weights nor inputs."""
    out = tmp_path_factory.mktemp("f32") / "model.gguf"
    source = ModelFile(path)
    tensors = [TensorSource.of_array(name, source.dequantised(name)) for name in source.tensors]
    copy_with(source, out, tensors=tensors)
    return out


def test_logits_and_greedy_tokens(path: Path, in_floats: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    ours = load(in_floats)
    ids = np.array(ours.text_ids(read_text(HELD_OUT))[:LENGTH], np.int32)
    with torch.no_grad():
        prompt = torch.tensor(ids[None], dtype=torch.long)
        expected = theirs(prompt).logits[0].numpy()
        tokens = theirs.generate(
            prompt[:, :PROMPT],
            attention_mask=torch.ones(1, PROMPT, dtype=torch.long),
            max_new_tokens=GENERATED,
            min_new_tokens=GENERATED,
            do_sample=False,
            eos_token_id=None,
        )[0, PROMPT:].tolist()

    got = ours.logits(ids.tolist(), mode="dense")
    assert np.linalg.norm(got - expected) < 1e-4 * np.linalg.norm(expected)

    session = ours.engine.session(LENGTH)
    logits = session.forward(ids[:PROMPT])
    greedy = []
    for _ in range(GENERATED):
        greedy.append(int(logits[0].argmax()))
        logits = session.forward(np.array(greedy[-1:], np.int32))
    assert greedy == tokens

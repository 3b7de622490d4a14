"""Engine and torch on a real model: the same thresholds, and the sparsity that is known of it."""

from pathlib import Path

import pytest

from tests.real_models import QWEN, SMOLLM2, real_model
from turbosparse.measure.config import MeasureConfig
from turbosparse.measure.hugging_face import HuggingFaceModel
from turbosparse.measure.measurement import measure
from turbosparse.runtime.measured_file import MeasuredFile
from turbosparse.runtime.texts import HELD_OUT, read_text

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.filterwarnings("default")]

CONFIG = MeasureConfig(
    tokens=2048, context=512, cett_targets=(0.1, 0.2), ppl_budgets=(), top_k=(), quality_tokens=0
)


@pytest.mark.parametrize(("name", "known"), [(SMOLLM2, [0.47, 0.64]), (QWEN, [0.47, 0.65])])
def test_thresholds_and_sparsity(name: str, known: list[float], tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path = real_model(name)
    text = read_text(HELD_OUT)
    file = MeasuredFile(path, scratch=tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    source = HuggingFaceModel(model, tokenizer, name=path.stem)
    assert source.text_ids(text)[:2048] == file.text_ids(text)[:2048]
    ours, theirs = (measure(each, text, CONFIG) for each in (file, source))
    for record in (ours, theirs):
        sparsity = record["overall"]["cett_sparsity"]["value"]
        assert sparsity == pytest.approx(known, abs=0.05)
    for got, expected in zip(ours["units"], theirs["units"], strict=True):
        for found, theirs_found in zip(got["thresholds"], expected["thresholds"], strict=True):
            assert found["eps"] == pytest.approx(theirs_found["eps"], rel=0.01)

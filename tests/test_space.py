"""The Space's page: what it shows is the model's, and what it can't take is said on it."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest

gradio = pytest.importorskip("gradio", reason="gradio is in space/requirements.txt")
import gradio_client
import torch
from transformers import AutoModel, AutoProcessor

from helpers import ROOT

sys.path.append(str(ROOT / "space"))
import app

TEXTS = ["a red thing", "cold $5 and $x", "how do I renew my card, which is much too long for a label"]
INSTRUCTION = "Retrieve semantically similar text."


@pytest.fixture(scope="module")
def loaded(exported):
    load = {"trust_remote_code": True}
    return AutoModel.from_pretrained(exported, **load), AutoProcessor.from_pretrained(exported, **load)


def test_the_page_shows_what_the_model_gives(loaded):
    model, processor = loaded
    similarities, over_steps, tokens = app.embedder(model, processor)("\n".join(TEXTS), INSTRUCTION, 3)
    inputs = processor(TEXTS, instruction=INSTRUCTION)
    steps = model.generate_embedding(**inputs, k=20, return_steps=True)
    cosines = steps[:, 2] @ steps[:, 2].T
    [axes] = similarities.axes
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {(j, i): f"{cosines[i, j]:.2f}" for i in range(3) for j in range(i + 1)}
    similarities.savefig(io.BytesIO())  # dollar signs are no formulas
    [axes] = over_steps.axes
    lines = [torch.tensor(line.get_ydata()) for line in axes.lines[:2]]
    torch.testing.assert_close(torch.stack(lines), (steps[1:] * steps[:1]).sum(-1))
    described = model.describe_steps(**inputs, k=3, top_k=1, tokenizer=processor.tokenizer)
    assert list(tokens["step"]) == [1, 2, 3] and len(tokens.columns) == 4
    first = described[0][0][0][0].strip()
    assert tokens["sentence 1"][0].startswith(first or repr(described[0][0][0][0]))


def test_a_text_leaves_room_for_the_most_steps(loaded, monkeypatch):
    """Where the processor alone would let it have all positions of the backbone."""
    model, processor = loaded
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", 60)
    app.embedder(model, processor)("red " * 100 + "\ncold", INSTRUCTION, 3)
    with pytest.raises(gradio.Error, match="leaves none for a text"):
        app.embedder(model, processor)("red\ncold", "long " * 100, 3)


@pytest.mark.slow
def test_the_page_answers_a_client(loaded):
    page = app.page(*loaded)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = gradio_client.Client(url, verbose=False)
        _, _, tokens = client.predict("\n".join(TEXTS), "", 2, api_name="/embed")
        assert [row[0] for row in tokens["data"]] == [1, 2]
        with pytest.raises(Exception, match="1 sentences: give 2 to 8, one a line"):
            client.predict("one\n\n", INSTRUCTION, 2, api_name="/embed")
    finally:
        page.close()


def test_a_model_that_generates_nothing_is_refused(gircse, make_model):
    with pytest.raises(ValueError, match="step_token='none': this page is for models that generate tokens"):
        app.page(make_model("qwen2", step_token="none", pooling="last"), None)


def test_the_browsers_page_finds_what_it_asks_for():
    text = (ROOT / "space/browser/index.html").read_text(encoding="utf-8")
    assert set(re.findall(r"field\('(\w+)'\)", text)) == set(re.findall(r'id="(\w+)"', text))
    prompts = json.loads((ROOT / "config_sentence_transformers.json").read_text(encoding="utf-8"))["prompts"]
    assert {name for name in re.findall(r"prompts\.([A-Z]\w*)", text)} == {"STS"} <= set(prompts)

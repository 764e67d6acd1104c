"""The handler of Inference Endpoints: the vectors of `generate_embedding`, batches under a budget, limits, errors, and
what its server does with it."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import InferenceClient
from transformers import AutoModel, AutoProcessor

from gircse.training.card import REMOTE_CODE
from helpers import ROOT, make_handler, requirements

TEXTS = ["a red fox", "", "how do I renew the card that was stolen from me last week?", "rain", "Füchse 狐 🦊 \x00"]
STS = "Retrieve semantically similar text."


@pytest.fixture(scope="module")
def served(exported):
    return make_handler(exported)


@pytest.fixture
def handler(served):
    return served[0]


def cosine(answer: list, expected: torch.Tensor) -> float:
    answer = torch.tensor(answer)
    assert answer.shape == expected.shape
    return F.cosine_similarity(answer, expected, dim=-1).min().item()


# The same vectors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [{}, {"k": 1}, {"k": 7}, {"k": None, "normalize": None}])
@pytest.mark.parametrize("instruction", [None, STS])
def test_vectors_are_those_of_generate_embedding(handler, embed, parameters, instruction):
    answer = handler({"inputs": TEXTS, "parameters": {**parameters, "instruction": instruction}})
    assert cosine(answer, embed(TEXTS, instruction, k=parameters.get("k"))) > 0.9999
    torch.testing.assert_close(torch.tensor(answer).norm(dim=-1), torch.ones(5), rtol=1e-5, atol=1e-5)
    # The text, k and the instruction matter, or the line above says nothing.
    assert cosine(answer, embed(TEXTS, instruction, k=5)) < 0.9999
    assert cosine(answer, embed(TEXTS, "another", k=parameters.get("k"))) < 0.9999
    assert cosine(answer, embed(TEXTS[::-1], instruction, k=parameters.get("k"))) < 0.9999


def test_prompt_by_name(handler, embed):
    answer = handler({"inputs": TEXTS, "parameters": {"prompt_name": "STS12"}})
    assert cosine(answer, embed(TEXTS, STS)) > 0.9999
    assert cosine(handler({"inputs": TEXTS, "parameters": {"prompt_name": "document"}}), embed(TEXTS)) > 0.9999


def test_steps_truncation_and_norm(handler, embed):
    raw, steps = embed(TEXTS, normalize=False, k=4), embed(TEXTS, return_steps=True, k=4)
    answer = handler({"inputs": TEXTS, "parameters": {"k": 4, "normalize": False}})
    torch.testing.assert_close(torch.tensor(answer), raw, rtol=1e-4, atol=1e-4)
    assert (raw.norm(dim=-1) - 1).abs().min() > 0.01
    assert cosine(handler({"inputs": TEXTS, "parameters": {"k": 4, "return_steps": True}}), steps) > 0.9999
    short = handler({"inputs": TEXTS, "parameters": {"k": 4, "truncate_dim": 8}})
    torch.testing.assert_close(torch.tensor(short), F.normalize(raw[:, :8], dim=-1), rtol=1e-4, atol=1e-4)
    short = handler({"inputs": TEXTS, "parameters": {"k": 4, "truncate_dim": 8, "normalize": False}})
    torch.testing.assert_close(torch.tensor(short), raw[:, :8], rtol=1e-4, atol=1e-4)
    short = handler({"inputs": TEXTS, "parameters": {"k": 4, "truncate_dim": 8, "return_steps": True}})
    assert cosine(short, steps[..., :8]) > 0.9999


def test_one_text_and_none(handler, embed):
    for text in ("rain", ""):
        assert cosine([handler({"inputs": text})], embed([text])) > 0.9999
    assert torch.tensor(handler({"inputs": "rain", "parameters": {"return_steps": True}})).shape == (3, 32)
    assert handler({"inputs": []}) == []
    assert len(handler({"inputs": ["rain"]})) == 1


def test_parameters_may_stand_beside_the_inputs(handler, embed):
    """Where `InferenceClient.feature_extraction` puts them; null is none."""
    data = {"inputs": TEXTS, "k": None, "options": {}, "parameters": {"k": 2, "prompt_name": None, "options": {"a": 1}}}
    assert cosine(handler({**data, "prompt_name": "STS12"}), embed(TEXTS, STS, k=2)) > 0.9999
    assert cosine(handler({"inputs": TEXTS, "k": 2, "prompt_name": "STS12"}), embed(TEXTS, STS, k=2)) > 0.9999


@pytest.mark.parametrize(
    "sent",
    [
        {"options": {}},  # Weaviate's text2vec-huggingface
        {"options": {"wait_for_model": True, "use_cache": True}},  # LangChain
        {"truncate": True, "normalize": True},  # Haystack
        {"encoding_format": "float"},  # InferenceClient
        {"truncate": None, "truncation_direction": "Right", "dimensions": None},  # InferenceClient
    ],
)
def test_what_clients_send_by_themselves_changes_nothing(handler, embed, sent):
    assert cosine(handler({"inputs": TEXTS, **sent}), embed(TEXTS)) > 0.9999


def test_dimensions_are_another_name(handler):
    assert handler({"inputs": TEXTS, "dimensions": 8}) == handler({"inputs": TEXTS, "truncate_dim": 8})


def test_the_root_model_answers():
    handler, _ = make_handler(ROOT)
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True, torch_dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    answer = handler({"inputs": TEXTS, "parameters": {"instruction": STS, "k": 5}})
    if not torch.cuda.is_available():
        assert handler.model.dtype == torch.float32
    assert cosine(answer, model.generate_embedding(**processor(TEXTS, instruction=STS), k=5)) > 0.999


# Batches ------------------------------------------------------------------------------------------------------------


def test_a_long_list_runs_in_batches_within_the_budget(served, monkeypatch):
    handler, module = served
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", 120)
    monkeypatch.setattr(module, "TEXTS_PER_BATCH", 6)
    texts = [f"{index} " + "rain " * (index * 7 % 23) for index in range(40)]
    shapes = []
    hook = handler.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append((*args, *kwargs.values())[0].shape), with_kwargs=True
    )
    answer = handler({"inputs": texts, "parameters": {"k": 4}})
    hook.remove()
    alone = [handler({"inputs": text, "parameters": {"k": 4}}) for text in texts]
    assert cosine(answer, torch.tensor(alone)) > 0.99999  # in the order of the request
    assert len(shapes) > 5 and sum(rows for rows, _ in shapes) == 40
    assert all(rows * (length + 4) <= 120 and rows <= 6 for rows, length in shapes)
    assert max(rows for rows, _ in shapes) == 6


def test_batches(served, monkeypatch):
    module = served[1]
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", 30)
    monkeypatch.setattr(module, "TEXTS_PER_BATCH", 3)
    # The longest first; a text over the budget runs by itself.
    assert list(module.batches([1, 50, 5, 1, 1, 10, 1], 5)) == [[1], [5, 2], [0, 3, 4], [6]]
    assert list(module.batches([], 5)) == []


def test_no_gradients_are_kept(handler, monkeypatch):
    """The server calls from a thread in which they are on."""
    kept = []
    original = handler.model.generate_embedding
    monkeypatch.setattr(
        handler.model, "generate_embedding", lambda *ids, **k: kept.append(original(*ids, **k)) or kept[-1]
    )
    with torch.enable_grad():
        handler({"inputs": TEXTS})
    assert kept and not any(tensor.requires_grad for tensor in kept)


def test_on_a_gpu_it_runs_in_bfloat16(served, exported, monkeypatch):
    asked = []
    model = SimpleNamespace(to=asked.append)
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda path, **options: asked.append(options["dtype"]) or model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    type(served[0])(str(exported))
    assert asked == [torch.bfloat16, "cuda"]


# Limits and errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, said",
    [
        ({}, "the request has no inputs"),
        (None, "the request has no inputs"),
        ({"inputs": "a", "k": 2, "parameters": {"k": 3}}, "k is given beside parameters and, as another value, in it"),
        ({"inputs": None}, "inputs=None must be a text or a list of texts"),
        ({"inputs": 3}, "inputs=3 must be a text"),
        ({"inputs": {"text": "a"}}, "inputs={'text': 'a'} must be a text"),
        ({"inputs": ["a", None]}, "inputs[1]=None must be a text"),
        ({"inputs": [["a", "b"]]}, "inputs[0]=['a', 'b'] must be a text"),
        ({"inputs": "a", "parameters": [3]}, "parameters=[3] must be an object"),
        ({"inputs": "a", "parameters": {"K": 3}}, "K: no such parameter; there are k, instruction, prompt_name"),
        ({"inputs": "a", "use_cache": True}, "use_cache: no such parameter"),
        ({"inputs": "a", "truncate": False}, "truncate=False is not done: only True is, which may be left out"),
        ({"inputs": "a", "encoding_format": "base64"}, "encoding_format='base64' is not done: only 'float' is"),
        ({"inputs": "a", "truncate_dim": 4, "dimensions": 8}, "truncate_dim=4 and dimensions=8 are one: leave one out"),
        ({"inputs": "a", "truncation_direction": "left"}, "truncation_direction='left' is not done: only 'right' is"),
        ({"inputs": "a", "dimensions": 33}, "dimensions=33 must be a whole number from 1 to 32"),
        ({"inputs": "a", "k": 0}, "k=0 must be a whole number from 1 to 64"),
        ({"inputs": [], "k": 0}, "k=0 must be a whole number"),
        ({"inputs": "a", "k": 65}, "k=65 must be a whole number from 1 to 64"),
        ({"inputs": "a", "k": "3"}, "k='3' must be a whole number"),
        ({"inputs": "a", "k": 2.0}, "k=2.0 must be a whole number"),
        ({"inputs": "a", "k": True}, "k=True must be a whole number"),
        ({"inputs": "a", "truncate_dim": 33}, "truncate_dim=33 must be a whole number from 1 to 32"),
        ({"inputs": "a", "truncate_dim": 0}, "truncate_dim=0 must be"),
        ({"inputs": "a", "normalize": 1}, "normalize=1 must be true or false"),
        ({"inputs": "a", "return_steps": "yes"}, "return_steps='yes' must be true or false"),
        ({"inputs": "a", "instruction": ["b"]}, "instruction=['b'] must be a string"),
        ({"inputs": "a", "prompt_name": ["b"]}, "prompt_name=['b'] must be a string"),
        ({"inputs": "a", "prompt_name": "STS99"}, "prompt_name='STS99' is not in config_sentence_transformers.json"),
        ({"inputs": "a", "prompt_name": "STS12", "instruction": "b"}, "instruction and prompt_name are both given"),
    ],
)
def test_wrong_requests_are_refused(handler, data, said):
    with pytest.raises(ValueError, match="^" + re.escape(said)) as error:
        handler(data)
    assert len(str(error.value)) < 200


def test_limits(served, monkeypatch):
    handler, module = served
    monkeypatch.setattr(module, "MAX_TEXTS", 3)
    monkeypatch.setattr(module, "MAX_CHARACTERS", 100)
    monkeypatch.setattr(module, "MAX_NUMBERS", 3 * 2 * 32)
    prompt = len(f"Instruct: {STS}\nQuery: ")
    assert len(handler({"inputs": ["a"] * 3})) == 3
    with pytest.raises(ValueError, match="inputs has 4 texts, more than 3"):
        handler({"inputs": ["a"] * 4})
    handler({"inputs": ["a" * (100 - prompt)], "parameters": {"instruction": STS}})
    with pytest.raises(ValueError, match=r"inputs\[1\] has 101 characters, prompt included, more than 100"):
        handler({"inputs": ["a", "a" * (101 - prompt)], "parameters": {"instruction": STS}})
    handler({"inputs": ["a"] * 3, "parameters": {"return_steps": True, "k": 2}})
    with pytest.raises(ValueError, match="return_steps gives at most 192, not 3 texts of 3 x 32 numbers"):
        handler({"inputs": ["a"] * 3, "parameters": {"return_steps": True}})
    handler({"inputs": ["a"] * 3, "parameters": {"return_steps": True, "truncate_dim": 8}})
    monkeypatch.setattr(handler.model.config, "step_token", "none")  # which generates nothing
    assert torch.tensor(handler({"inputs": ["a"] * 3, "parameters": {"return_steps": True}})).shape == (3, 1, 32)


def test_more_steps_leave_less_room_for_the_text(handler, monkeypatch):
    model, processor, text = handler.model, handler.processor, "fox " * 500
    positions = model.config.text_config.max_position_embeddings
    monkeypatch.setattr(processor, "max_length", positions)
    answer = handler({"inputs": [text], "parameters": {"k": 60}})
    assert cosine(answer, model.generate_embedding(**processor(text, max_length=positions - 60), k=60)) > 0.99999


def test_an_adapter_without_its_backbone_is_refused(served, exported, tmp_path):
    _, module = served
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"adapter": "adapter"}))
    with pytest.raises(ValueError, match="holds an adapter.*without --save_adapter.*merge_adapter"):
        module.EndpointHandler(str(tmp_path))
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")  # as the method of all models of transformers saves one
    with pytest.raises(ValueError, match="holds an adapter"):
        module.EndpointHandler(str(tmp_path))


@pytest.mark.parametrize("config, found", [(None, "is not there"), ({"model_type": "bert"}, "is of type 'bert'")])
def test_a_folder_of_another_kind_is_refused(served, tmp_path, config, found):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"is no GIRCSE model, as its config.json {found}: serve a trained folder"):
        served[1].EndpointHandler(str(tmp_path))


def test_a_request_is_left_as_it_was(handler):
    data = {"inputs": ["a"], "parameters": {"k": 2}}
    handler(data)
    assert data == {"inputs": ["a"], "parameters": {"k": 2}}


# The server ---------------------------------------------------------------------------------------------------------


def test_orjson_takes_the_answer(handler):
    orjson = pytest.importorskip("orjson")
    answer = handler({"inputs": TEXTS, "parameters": {"return_steps": True}})
    assert orjson.loads(orjson.dumps(answer)) == answer == json.loads(json.dumps(answer))


def test_inference_client(handler, embed, monkeypatch):
    """The client that `InferenceEndpoint.client` is, over a server on this machine."""

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.dumps(handler(body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_) -> None:
            pass

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()  # before 1.0 a session stays offline
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        client = InferenceClient(f"http://127.0.0.1:{server.server_port}")
        found = client.feature_extraction(TEXTS, prompt_name="STS12", normalize=True)
    finally:
        server.shutdown()
        server.server_close()
    assert cosine(found.tolist(), embed(TEXTS, STS)) > 0.9999


@pytest.mark.parametrize("settings", [None, "{}"])
def test_a_folder_without_prompts_is_served(exported, tmp_path, settings):
    for file in exported.iterdir():
        if file.name != "config_sentence_transformers.json":
            (shutil.copytree if file.is_dir() else shutil.copy)(file, tmp_path / file.name)
    if settings:
        (tmp_path / "config_sentence_transformers.json").write_text(settings)
    handler, _ = make_handler(tmp_path)
    assert len(handler({"inputs": "rain"})) == 32
    with pytest.raises(ValueError, match="prompt_name='STS12' is not in"):
        handler({"inputs": "rain", "parameters": {"prompt_name": "STS12"}})


def test_only_a_folder_is_loaded(served):
    with pytest.raises(ValueError, match="path='me/gircse' is not a folder"):
        served[1].EndpointHandler("me/gircse")


def problems_of_trust(source: str) -> list[int]:
    """The lines where `trust_remote_code` is named other than for `path`, from this machine alone."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            own = [ast.unparse(argument) for argument in node.args] == ["path"]
            if "trust_remote_code" in settings and not (own and settings.get("local_files_only") == "True"):
                found.append(node.lineno)
        elif (
            isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in ("path", "trust_remote_code")
        ):
            found.append(node.lineno)
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append(node.lineno)
    return found


def test_only_the_own_folder_is_trusted():
    source = (ROOT / "handler.py").read_text(encoding="utf-8")
    assert source.count("trust_remote_code=True") == 2
    assert problems_of_trust(source) == []
    for wrong in (
        source.replace("from_pretrained(path, ", "from_pretrained('me/gircse', ", 1),
        source.replace("local_files_only=True", "local_files_only=False", 1),
        source.replace("        on_gpu =", "        path = 'me/gircse'\n        on_gpu ="),
        source.replace("dtype=dtype)", "**{'trust_remote_code': True})"),
    ):
        assert wrong != source and problems_of_trust(wrong)


def test_requirements_keep_the_container_as_it_is():
    """The pins of the Inference Endpoints toolkit: an upgrade of transformers would keep it from starting."""
    needed = requirements("requirements.txt")
    for name, version in {"torch": "2.5.1", "transformers": "4.51.3", "huggingface_hub": "0.30.2"}.items():
        assert version in needed[name].specifier, name
    assert set(needed) == {"torch", "transformers", "accelerate", "huggingface_hub", "safetensors"}
    assert not set(needed) & set(requirements("requirements-train.txt"))
    assert (ROOT / "requirements-train.txt").read_text(encoding="utf-8").startswith("-r requirements.txt\n")


@pytest.mark.parametrize("file", [file for file in REMOTE_CODE if file != "sentence_gircse.py"])
def test_requirements_have_all_that_serving_imports(file):
    allowed = {*requirements("requirements.txt"), *sys.stdlib_module_names}
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:  # peft merges adapters, for those who have it
            assert name.partition(".")[0] in allowed | {"peft"}, name

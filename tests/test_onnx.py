"""ONNX files give PyTorch's vectors: in onnxruntime and in transformers.js, for any padding, batch and text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoTokenizer

from helpers import ROOT, WORDS, make_processor, text_config

pytest.importorskip("onnxscript", reason="what the export needs is in requirements-onnx.txt")
onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
from tokenizers import Tokenizer

from export_gircse import main, parse
from gircse.onnx import folder as folder_module
from gircse.onnx import formats
from gircse.onnx.folder import check_folder, embed, export_onnx
from gircse.onnx.graph import StepGraph, complete, trace

K, SUFFIX = 2, " In short:"
PROMPT = "Instruct: Retrieve semantically similar text.\nQuery: "
# Of trained models soft tokens are less peaked than those of the tests' weights, which make rounding errors large.
CALM = {"initializer_range": 0.05}
# In int8 the rounding errors of a few dimensions would not average out.
WIDE = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "query_pre_attn_scalar": 64}
ODD = ["", " ", "naïve café 😀 — ¿qué? 漢字\t x\n\n  y<|endoftext|>z 12345", "it's 'quoted'", "long " * 100]


def texts(count: int = 64) -> list[str]:
    """Half of them with an instruction, of unlike lengths, one too long."""
    made = [" ".join(WORDS[(i * j + i) % 20] for j in range(1 + i % 11)) for i in range(count - len(ODD))] + ODD
    return [(PROMPT if i % 2 else "") + text for i, text in enumerate(made)]


def tiny(gircse, backbone: str, changes: dict | None = None, **axes):
    torch.manual_seed(0)
    size = 49_152  # of the root's tokenizer
    text = text_config(backbone, **{"vocab_size": size, "num_hidden_layers": 2, **CALM, **(changes or {})})
    model = gircse.GircseModel(gircse.GircseConfig(text_config=text, num_steps=K, **axes)).eval()
    model.language_model.set_attn_implementation("eager")
    return model


def graph_session(model, folder: Path, k: int = K, suffix: tuple = (), opset: int = 20):
    graph = StepGraph(model, k, [*suffix], 2)
    formats.save(complete(graph, trace(graph, opset)[0]), folder / "model.onnx")
    return onnxruntime.InferenceSession(folder / "model.onnx")


def lowest_cosine(found, expected) -> float:
    return float(F.cosine_similarity(torch.as_tensor(np.asarray(found)), expected).min())


def run(session, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    found = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    assert found.dtype == np.float32 and found.shape[1] == 1
    return found[:, 0]


def padded(rows: list[list[int]], left: bool, more: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows)) + more
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return ids, mask


AXES = [
    ("llama", {}),
    ("qwen2", {"step_token": "hard"}),
    ("qwen2-tied", {"pooling": "mean_with_prompt"}),
    ("gemma3_text", {}),  # windows shorter than the texts, a scaled embedding, a tied head
    ("mistral", {"pooling": "last"}),
    ("gpt2", {}),
    ("qwen2", {"step_token": "none", "pooling": "last"}),
    ("mistral", {"step_token": "none", "attention": "bidirectional"}),  # whose window PyTorch's mask has no part of
    ("qwen3", {"step_token": "learned"}),
]
NAMES = [f"{name}-{'-'.join(axes.values()) or 'soft'}" for name, axes in AXES]


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "axes"), AXES, ids=NAMES)
def test_any_padding_and_batch_give_the_models_vectors(backbone, axes, gircse, tmp_path):
    model = tiny(gircse, backbone, **axes)
    session = graph_session(model, tmp_path)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 99, (1 + 5 * i,), generator=generator).tolist() for i in range(5)]
    expected = torch.cat([model.generate_embedding(torch.tensor([row])) for row in rows])
    for left, more in ((True, 0), (False, 0), (False, 3)):
        found = run(session, *padded(rows, left, more))
        assert lowest_cosine(found, expected) > 0.99999
        assert np.abs(np.linalg.norm(found, axis=-1) - 1).max() < 1e-5
    alone = [run(session, *padded([row], True))[0] for row in rows]
    assert lowest_cosine(alone, expected) > 0.99999


@pytest.fixture(scope="module", params=[("qwen2-tied", SUFFIX), ("llama", ""), ("gemma3_text", SUFFIX)], ids=str)
def exported(request, gircse, tmp_path_factory):
    """Model, processor, folder, and the cosines that the export reports."""
    backbone, suffix = request.param
    model, processor = tiny(gircse, backbone, WIDE), make_processor(suffix=suffix)
    path = tmp_path_factory.mktemp("onnx") / "out"
    return model, processor, path, export_onnx(model, processor, path)


@pytest.mark.slow
def test_files_give_the_vectors_of_texts(exported):
    model, processor, path, reported = exported
    expected = torch.cat([model.generate_embedding(**processor(text)) for text in texts()])
    for name, lowest in (("model.onnx", 0.99999), ("model_fp16.onnx", 0.999), ("model_quantized.onnx", 0.99)):
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        session = onnxruntime.InferenceSession(path / "onnx" / name)
        found = np.concatenate([embed(session, tokenizer, texts()[start : start + 16]) for start in range(0, 64, 16)])
        assert lowest_cosine(found, expected) > lowest, name
        assert reported[name] > lowest


@pytest.mark.slow
def test_the_tokenizer_gives_the_processors_ids_but_for_the_suffix(exported):
    model, processor, path, _ = exported
    AutoConfig.register("gircse", type(model.config), exist_ok=True)  # as in a process that has loaded a model
    suffix = processor.tokenizer(processor.suffix)["input_ids"]
    bare, fast = Tokenizer.from_file(str(path / "tokenizer.json")), AutoTokenizer.from_pretrained(path)
    for text in texts():
        expected = processor(text)["input_ids"][0].tolist()
        expected = [] if text + processor.suffix == "" else expected  # the graph adds the eos
        assert bare.encode(text).ids + suffix == expected
        assert fast(text, truncation=True)["input_ids"] + suffix == expected
    assert len(bare.encode(ODD[-1]).ids) == processor.max_length - len(suffix)  # it was cut


@pytest.mark.slow
def test_each_weight_is_stored_once(exported):
    model, _, path, _ = exported
    stored = {weight.data_ptr(): weight.numel() for weight in model.parameters() if weight.dim() == 2}
    weights = sum(stored.values())
    for name, width in (("model.onnx", 4), ("model_fp16.onnx", 2), ("model_quantized.onnx", 1)):
        file = path / "onnx" / name
        held = sum(np.prod(tensor.dims) for tensor in onnx.load(file).graph.initializer if len(tensor.dims) == 2)
        assert weights <= held < 1.01 * weights  # the layers have more than that
        assert file.stat().st_size < 1.01 * width * weights + 600_000  # and the nodes


@pytest.mark.slow
def test_no_file_tells_of_this_machine(exported):
    for file in exported[2].rglob("*.*"):
        assert str(ROOT).encode() not in file.read_bytes(), file.name


@pytest.mark.slow
def test_int8_keeps_the_few_large_values_inside_an_mlp(gircse, tmp_path):
    model = tiny(gircse, "llama", WIDE)
    with torch.no_grad():
        for layer in model.language_model.model.layers:  # the same function: one unit is 30 times as large
            layer.mlp.up_proj.weight[5] *= 30
            layer.mlp.down_proj.weight[:, 5] /= 30
    processor = make_processor()
    export_onnx(model, processor, tmp_path / "out", k=K)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / "model_quantized.onnx")
    found = embed(session, Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")), texts()[:16])
    expected = torch.cat([model.generate_embedding(**processor(text)) for text in texts()[:16]])
    assert lowest_cosine(found, expected) > 0.99


@pytest.mark.slow
def test_int8_keeps_learned_positions_in_float32(gircse, tmp_path):
    model = tiny(gircse, "gpt2", {"n_layer": 2, "n_embd": 256, "n_positions": 300})  # as tall as narrowing weights
    processor = make_processor()
    found = export_onnx(model, processor, tmp_path / "out", k=K)
    assert found["model_quantized.onnx"] > 0.99
    stored = onnx.load(tmp_path / "out" / "onnx" / "model_quantized.onnx").graph.initializer
    positions = [tensor for tensor in stored if tensor.name.endswith("wpe.weight")]
    assert [tensor.data_type for tensor in positions] == [onnx.TensorProto.FLOAT]


@pytest.mark.slow
def test_a_file_does_not_grow_with_k(gircse, tmp_path):
    sizes = []
    for k in (1, 20):
        graph_session(tiny(gircse, "llama"), tmp_path, k=k)
        sizes.append((tmp_path / "model.onnx").stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 0.001 * sizes[0]


@pytest.mark.slow
def test_an_empty_text_without_a_suffix_is_one_eos(gircse, tmp_path):
    model = tiny(gircse, "llama")
    session = graph_session(model, tmp_path, k=1)
    eos = model.generate_embedding(torch.tensor([[2]]), k=1)
    assert lowest_cosine(run(session, *padded([[], [5, 6]], False))[:1], eos) > 0.99999
    none = torch.zeros(1, 0, dtype=torch.long)
    assert lowest_cosine(run(session, none, none), eos) > 0.99999


@pytest.mark.slow
def test_weights_of_more_than_a_protobuf_holds_are_beside_it(gircse, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MOST_IN_ONE_FILE", 1000)
    found = export_onnx(tiny(gircse, "llama"), make_processor(), tmp_path / "out", k=1)
    assert min(found.values()) > 0.99
    for name in found:
        assert (tmp_path / "out" / "onnx" / f"{name}_data").stat().st_size > 100_000
        assert (tmp_path / "out" / "onnx" / name).stat().st_size < 1_000_000
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == dict.fromkeys(found, True)


@pytest.mark.slow
def test_the_command_exports_a_folder(gircse, tmp_path, capsys):
    tiny(gircse, "qwen2").save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    prompts = {"query": "ask: ", "document": "<user>", "STS": ""}
    (tmp_path / "model" / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    argv = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--k", "1", "--opset", "18"]
    (tmp_path / "out" / "onnx" / ".parts").mkdir(parents=True)  # as a killed export leaves it
    (tmp_path / "out" / "onnx" / ".parts" / "model.onnx").touch()
    main(argv)
    assert json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())["prompts"] == prompts
    assert {path.name for path in (tmp_path / "out" / "onnx").iterdir()} == set(folder_module.FILES)
    printed = capsys.readouterr().out
    assert all(f"onnx/{name}" in printed for name in folder_module.FILES)
    written = onnx.load(tmp_path / "out" / "onnx" / "model.onnx")
    assert written.opset_import[0].version == 18 and written.metadata_props[0].value == "1"
    main(argv)  # over the earlier export


SCRIPT = """
import { pipeline, env } from '@huggingface/transformers';
env.allowRemoteModels = false;
const [folder, dtype, texts] = process.argv.slice(2);
const embed = await pipeline('feature-extraction', folder, { dtype });
console.log(JSON.stringify((await embed(JSON.parse(texts), { pooling: 'cls' })).tolist()));
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "lowest"), [("fp32", 0.99999), ("fp16", 0.999), ("q8", 0.99)])
def test_transformers_js_gives_the_same_vectors(dtype, lowest, exported, tmp_path):
    modules = Path(os.environ.get("NODE_MODULES", ROOT / "node_modules"))
    if shutil.which("node") is None or not (modules / "@huggingface" / "transformers").exists():
        pytest.skip("needs node, and `npm install @huggingface/transformers` (NODE_MODULES: the folder it made)")
    model, processor, path, _ = exported
    (tmp_path / "node_modules").symlink_to(modules.resolve())
    (tmp_path / "embed.mjs").write_text(SCRIPT)
    command = ["node", "embed.mjs", str(path), dtype, json.dumps(texts())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = torch.cat([model.generate_embedding(**processor(text)) for text in texts()])
    assert lowest_cosine(json.loads(done.stdout.splitlines()[-1]), expected) > lowest


def test_bad_arguments_are_refused(gircse, tmp_path):
    model, processor = tiny(gircse, "qwen2"), make_processor()
    for opset in (17, 99, "20", True):
        with pytest.raises(ValueError, match=f"opset={opset!r} must be an int from 18 to"):
            export_onnx(model, processor, tmp_path / "out", opset=opset)
    with pytest.raises(ValueError, match="k=0 must be an int >= 1"):
        export_onnx(model, processor, tmp_path / "out", k=0)
    with pytest.raises(ValueError, match="choose k below 128"):
        export_onnx(model, processor, tmp_path / "out", k=128)
    with pytest.raises(ValueError, match="leave no position for a text: choose a smaller k"):
        export_onnx(model, make_processor(suffix=SUFFIX), tmp_path / "out", k=127)
    with pytest.raises(ValueError, match=r"model is in torch.bfloat16 on cpu: load it in float32 on the CPU"):
        export_onnx(tiny(gircse, "qwen2").to(torch.bfloat16), processor, tmp_path / "out")
    plain = tiny(gircse, "qwen2", step_token="none")
    with pytest.raises(ValueError, match="k=3 has no meaning with step_token='none'"):
        export_onnx(plain, processor, tmp_path / "out", k=3)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["onnx"]
    with pytest.raises(SystemExit):
        parse(["--k", "many", "--output_dir", "x"])


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds 'model.safetensors', which is not of an export; choose another"):
        check_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(ValueError, match="can't be written to"):
        check_folder(tmp_path / "model.safetensors" / "out")


def test_a_clone_of_a_hub_repo_may_be_written_to(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").touch()
    check_folder(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {".git", "README.md", "onnx"}

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(Path, "touch", refuse)  # of a folder that exists, only writing tells
    with pytest.raises(ValueError, match="can't be written to"):
        check_folder(tmp_path)


def test_backbones_are_refused_by_name(gircse):
    model = tiny(gircse, "gpt2", {"n_layer": 2})
    model._ways["eager"] = model._find_way(torch.device("cpu"))._replace(cache=None)
    with pytest.raises(ValueError, match="GPT2LMHeadModel can't be exported to ONNX: it has no KV cache"):
        StepGraph(model, 1, [], 2)
    model = tiny(gircse, "qwen2")
    model.language_model.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match="Qwen2ForCausalLM can't be exported .* of the kind chunked_attention"):
        StepGraph(model, 1, [], 2)


def test_what_the_exporter_raises_is_told_with_the_backbones_name(gircse, monkeypatch):
    def depends_on_values(graph, input_ids, attention_mask):
        return input_ids if input_ids.sum() > 3 else attention_mask

    graph = StepGraph(tiny(gircse, "llama"), 1, [], 2)
    monkeypatch.setattr(StepGraph, "forward", depends_on_values)
    with pytest.raises(ValueError, match="LlamaForCausalLM can't be exported to ONNX: .*PyTorch, or another backbone"):
        trace(graph)


def test_a_tokenizer_without_a_file_for_other_clients_is_refused(tmp_path):
    processor = make_processor()
    monkey = processor.tokenizer.save_pretrained
    processor.tokenizer.save_pretrained = lambda folder: (monkey(folder), (Path(folder) / "tokenizer.json").unlink())
    with pytest.raises(ValueError, match="has no tokenizer.json, which other clients read"):
        folder_module.write_tokenizer(processor, tmp_path, 9)


def test_a_file_that_overflows_is_left_out(gircse, tmp_path, monkeypatch):
    processor, model = make_processor(), tiny(gircse, "qwen2", {"max_position_embeddings": 40})
    (tmp_path / "onnx").mkdir()
    for name in folder_module.FILES:
        (tmp_path / "onnx" / name).touch()

    def vectors(file: Path, tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
        found = torch.cat([model.generate_embedding(**processor(text, max_length=39), k=1) for text in texts]).numpy()
        return np.full_like(found, np.nan) if "fp16" in file.name else found

    monkeypatch.setattr(folder_module, "embed", vectors)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path: path)
    folder_module.write_tokenizer(processor, tmp_path, 39)
    found = folder_module.compare(model, processor, tmp_path, 1, 39)
    assert np.isnan(found.pop("model_fp16.onnx")) and min(found.values()) > 0.9999
    assert {file.name for file in (tmp_path / "onnx").iterdir()} == {*found}


def test_vectors_that_differ_are_refused(gircse, tmp_path, monkeypatch):
    ones = np.ones((99, 32), np.float32)
    monkeypatch.setattr(folder_module, "embed", lambda session, tokenizer, texts: ones[: len(texts)])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path: None)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").touch()
    processor = make_processor()
    model = tiny(gircse, "qwen2", {"max_position_embeddings": 40})  # fewer than the processor's max_length
    folder_module.write_tokenizer(processor, tmp_path, 39)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM can't be exported to ONNX: its vectors have cosines"):
        folder_module.compare(model, processor, tmp_path, 1, 39)
    assert not (tmp_path / "onnx" / "model.onnx").exists()

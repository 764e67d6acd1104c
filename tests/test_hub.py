"""Publishing: what is pushed to a Hub loads from there with a cold cache, by its id, pinned, and offline afterwards.
The Hub is `loopback_hub.LoopbackHub`; processes that push and load are new ones, as a user's are."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from gircse.loading import card_of
from gircse.training import card as card_module
from gircse.training.arguments import GircseTrainingArguments
from gircse.training.card import REMOTE_CODE, model_card
from helpers import ROOT, make_rows, make_tokenizer, tiny_text_config
from loopback_hub import LoopbackHub, run, settings

# The Hub on this machine speaks of xet as huggingface_hub 1 and later ones do.
HAS_XET = importlib.util.find_spec("hf_xet") is not None and int(huggingface_hub.__version__.split(".")[0]) >= 1

# Trains a LoRA on a backbone from the Hub and pushes it by all ways there are.
PUSH = """
import shutil, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
folder = Path(sys.argv[2])
import train_gircse
from transformers import AutoModelForCausalLM, AutoTokenizer

AutoModelForCausalLM.from_pretrained(folder / "plain").push_to_hub("me/base")
AutoTokenizer.from_pretrained(folder / "plain").push_to_hub("me/base")
made = []
class Watched(train_gircse.GircseTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        made.append(self)
argv = f"--model_name_or_path me/base --train_data {folder / 'pairs.jsonl'} --output_dir {folder / 'out'} "
argv += "--push_to_hub --hub_model_id me/tiny --lora_r 2 --max_steps 2 --learning_rate 0.05 --warmup_steps 1 --k 2 "
argv += "--num_steps 3 --per_device_train_batch_size 4 --held_out 4 --save_strategy steps --save_steps 1 "
argv += "--report_to none --use_cpu True --disable_tqdm True --dataloader_pin_memory False"
try:
    refused = argv.replace(str(folder / "out"), str(folder / "refused")).replace("me/tiny", "me/refused")
    train_gircse.main([*refused.split(), "--hub_token", "hf_of_another"], Watched)
except Exception as error:
    result = {"refused": repr(error)}
made.clear()
train_gircse.main(argv.split(), Watched)

def embed(model):
    inputs = trainer.processing_class(["a red thing", "cold"], instruction="find the answer")
    return model.eval().generate_embedding(**inputs)
trainer = made[0]
model_class = type(trainer.model.get_base_model())
result |= {"first": embed(model_class.from_pretrained(folder / "out"))}
shutil.copyfile(folder / "out" / "model.safetensors", folder / "first.safetensors")
for name, weight in trainer.model.named_parameters():
    if "lora_B" in name:
        weight.data *= 3
result["commit"] = trainer.push_to_hub("Three times as much").oid
shutil.copyfile(folder / "out" / "model.safetensors", folder / "second.safetensors")
second = model_class.from_pretrained(folder / "out")
result["second"] = embed(second)
second.push_to_hub("me/by-hand")
trainer.processing_class.push_to_hub("me/by-hand")
argv = argv.replace(str(folder / "out"), str(folder / "adapter")).replace("me/tiny", "me/adapter")
train_gircse.main([*argv.split(), "--save_adapter"], Watched)
result["adapter"] = embed(model_class.from_pretrained(folder / "adapter"))
torch.save(result, folder / "pushed.pt")
"""

# Loads repos at revisions, through AutoModel and, for the first, Sentence Transformers.
LOAD = """
import importlib.util, json, sys
import torch
from transformers import AutoModel, AutoProcessor
jobs, result = json.loads(sys.argv[1]), {}
for name, (repo, revision) in jobs.items():
    model = AutoModel.from_pretrained(repo, revision=revision, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repo, revision=revision, trust_remote_code=True)
    inputs = processor(["a red thing", "cold"], instruction="find the answer")
    result[name] = model.generate_embedding(**inputs)
if importlib.util.find_spec("sentence_transformers"):
    from sentence_transformers import SentenceTransformer
    repo, revision = next(iter(jobs.values()))
    model = SentenceTransformer(repo, revision=revision, trust_remote_code=True, device="cpu")
    prompt = "Instruct: find the answer\\nQuery: "
    result["sentence"] = model.encode(["a red thing", "cold"], prompt=prompt, convert_to_tensor=True)
torch.save(result, sys.argv[2])
"""

LOAD_HERE = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from gircse.loading import commit_of, is_gircse, load
assert is_gircse("me/tiny", sys.argv[2])
model, processor = load("me/tiny", revision=sys.argv[2])
inputs = processor(["a red thing", "cold"], instruction="find the answer")
result = {"commit": commit_of("me/tiny", sys.argv[2]), "embeddings": model.eval().generate_embedding(**inputs)}
torch.save(result, sys.argv[3])
"""


def xet_hashes(files: list[Path]) -> dict[str, str]:
    """What the real Hub learns of an upload by xet: the xet hash of each file's SHA-256."""
    import hf_xet

    found = hf_xet.hash_files([str(file) for file in files])
    return {sha256(file.read_bytes()): info.hash for file, info in zip(files, found, strict=True)}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def made_once(tmp_path_factory) -> Path:
    """A plain causal LM and training pairs."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config(tie_word_embeddings=True)).save_pretrained(folder / "plain")
    make_tokenizer().save_pretrained(folder / "plain")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(12)))
    return folder


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("lfs", marks=pytest.mark.slow),
        pytest.param(
            "xet", marks=[pytest.mark.slow, pytest.mark.skipif(not HAS_XET, reason="no hf_xet, or an old one")]
        ),
    ],
)
def pushed(request, made_once, tmp_path_factory):
    """The Hub after all pushes, with the folder that they came from and what its models give."""
    folder = tmp_path_factory.mktemp(request.param)
    for path in made_once.iterdir():
        (folder / path.name).symlink_to(path)
    with LoopbackHub(folder / "store" if request.param == "xet" else None) as hub:
        (folder / "home").mkdir()
        if hub.store:
            hub.xet_hashes = xet_hashes([folder / "plain" / "model.safetensors"])
        run(PUSH, ROOT, folder, **settings(hub, folder / "home"))
        if hub.store:
            names = ("first", "second", "adapter/adapter/adapter_model")
            hub.xet_hashes |= xet_hashes([folder / f"{name}.safetensors" for name in names])
        yield SimpleNamespace(hub=hub, folder=folder, out=folder / "out", **torch.load(folder / "pushed.pt"))


def first_commit(hub: LoopbackHub) -> str:
    repo = hub.repos["me/tiny"]
    return repo.commits[repo.messages.index("GIRCSE weights and code")][0]


@pytest.fixture(scope="module")
def loaded(pushed):
    """What a new user gets with a cold cache, how much it downloaded, and what the same user gets offline."""
    hub, folder = pushed.hub, pushed.folder
    home = folder / "loaded"
    home.mkdir()
    jobs = {"pinned": ["me/tiny", first_commit(hub)], "newest": ["me/tiny", "main"], "hand": ["me/by-hand", "main"]}
    jobs["adapter"] = ["me/adapter", "main"]
    before = len(hub.requests)
    run(LOAD, json.dumps(jobs), folder / "online.pt", **settings(hub, home, HF_TOKEN=""))
    asked = hub.requests[before:]
    found = SimpleNamespace(asked=asked, modules=home, results=[torch.load(folder / "online.pt")])
    if hub.store is None:  # the cache does not tell how its files came
        run(LOAD, json.dumps(jobs), folder / "offline.pt", **settings(hub, home, HF_HUB_OFFLINE="1"))
        found.results.append(torch.load(folder / "offline.pt"))
        assert len(hub.requests) == before + len(asked)
    return found


def test_loads_by_id_pinned_and_offline(pushed, loaded):
    expected = {"pinned": "first", "newest": "second", "hand": "second", "sentence": "first", "adapter": "adapter"}
    for result in loaded.results:
        for name, embeddings in result.items():
            torch.testing.assert_close(embeddings, getattr(pushed, expected[name]), rtol=0, atol=1e-6)
        assert {"pinned", "newest", "hand", "adapter"} <= result.keys()
    assert float((pushed.first - pushed.second).abs().max()) > 1e-3  # the pin matters
    assert any(path.endswith("/model.safetensors") for _, path in loaded.asked)


def test_this_repos_commands_load_a_commit(pushed):
    """The same one, whatever is pushed later."""
    home = pushed.folder / "commands"
    home.mkdir()
    run(LOAD_HERE, ROOT, first_commit(pushed.hub), home / "found.pt", **settings(pushed.hub, home, HF_TOKEN=""))
    found = torch.load(home / "found.pt")
    assert found["commit"] == first_commit(pushed.hub)
    torch.testing.assert_close(found["embeddings"], pushed.first, rtol=0, atol=1e-6)


def test_large_files_went_the_chosen_way(pushed, loaded):
    hub = pushed.hub
    if hub.store is None:
        assert hub.asked("PUT /lfs/") and hub.asked("GET /lfs/") and not hub.asked("xet")
    else:
        assert hub.asked("xet-write-token") and hub.asked("xet-read-token")
        assert not hub.asked("(PUT|GET) /lfs/|POST .*/info/lfs") and not hub.storage


def content(hub: LoopbackHub, repo_id: str, path: str, revision: str = "main") -> str:
    return hub.repos[repo_id].at(revision)[1][path].content.decode()


def test_one_commit_holds_all_that_loading_training_and_serving_need(pushed):
    hub, repo = pushed.hub, pushed.hub.repos["me/tiny"]
    files = set(repo.at(first_commit(hub))[1])
    wanted = {path.name for path in ROOT.glob("*.py")} | {"model.safetensors", "config.json", "tokenizer.json"}
    wanted |= {"tokenizer_config.json", "processor_config.json", "modules.json", "config_sentence_transformers.json"}
    wanted |= {"requirements.txt", "LICENSE", "README.md", "sample_pairs.jsonl"}
    assert not wanted - files
    assert not [path for path in files if path.startswith(("checkpoint", "runs", "adapter/"))]
    assert repo.messages[1:] == [
        "GIRCSE weights and code",
        "The card shows the pinned load",
        "Three times as much",
        "The card shows the pinned load",
    ]
    for (_, before), (_, after) in zip(repo.commits[1::2], repo.commits[2::2], strict=True):
        assert [path for path in after if before.get(path) != after[path]] == ["README.md"]
    for name in json.loads(content(hub, "me/tiny", "config.json"))["auto_map"].values():
        assert "--" not in name  # the code is this repo's own
    assert str(pushed.folder) not in "".join(
        entry.content.decode() for entry in repo.at("main")[1].values() if entry.content
    )


def test_adapter_only_repo_has_no_weights_and_pins_its_backbone(pushed):
    files = pushed.hub.repos["me/adapter"].at("main")[1]
    assert [path for path in files if path.endswith(".safetensors")] == ["adapter/adapter_model.safetensors"]
    config = json.loads(content(pushed.hub, "me/adapter", "adapter/adapter_config.json"))
    assert config["base_model_name_or_path"] == "me/base"
    assert config["revision"] == pushed.hub.repos["me/base"].commits[-1][0]


def test_card_is_filled_from_the_run(pushed):
    card = content(pushed.hub, "me/tiny", "README.md")
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["base_model"] == "me/base" and metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "feature-extraction" and "gircse" in metadata["tags"]
    assert "datasets" not in metadata  # the pairs were a file
    (model,) = metadata["model-index"]
    assert model["name"] == "tiny"
    measured = {
        metric["name"]: metric["value"]
        for result in model["results"]
        for metric in result["metrics"]
        if metric["type"] == "accuracy"
    }
    assert list(measured) == [f"accuracy at k = {k}" for k in (1, 2, 3, 5, 10, 20)]
    log = [json.loads(line) for line in (pushed.out / "training_log.jsonl").read_text().splitlines()]
    assert list(measured.values()) == pytest.approx(
        [log[-1][f"eval_accuracy_k{k}"] for k in (1, 2, 3, 5, 10, 20)], abs=1e-5
    )


def test_card_pins_the_commit_and_hashes_what_is_run(pushed, loaded):
    """The listed files are those that the remote loader copies, with their content at the pinned commit."""
    card = content(pushed.hub, "me/tiny", "README.md")
    assert f'"me/tiny", revision="{pushed.commit}", trust_remote_code=True' in card
    files = pushed.hub.repos["me/tiny"].at(pushed.commit)[1]
    listed = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| `(\w{64})` \|$", card, re.MULTILINE))
    assert listed == {name: sha256(files[name].content) for name in REMOTE_CODE if (ROOT / name).exists()}
    copied = {path.name for path in loaded.modules.rglob("*_gircse.py")}
    assert {"configuration_gircse.py", "modeling_gircse.py", "processing_gircse.py"} <= copied <= set(listed)


def test_card_names_hub_data_and_no_local_path(tmp_path, monkeypatch):
    other = {"license": "other", "license_name": "own", "license_link": "LICENSE.md"}
    monkeypatch.setattr(card_module, "card_of", lambda name: other if name == "some/base" else card_of(name))
    (tmp_path / "config.json").write_text('{"step_token": "soft", "adapter": null}')
    settings = {"use_cpu": True, "report_to": "none", "learning_rate": 1e-4}
    arguments = GircseTrainingArguments(output_dir=str(tmp_path), **settings)
    card = model_card(tmp_path, arguments, ["some/base", "some/adapter"], "cfli/bge-full-data", {5: (0.25, 0.5)})
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["datasets"] == ["cfli/bge-full-data"] and metadata["base_model"] == ["some/base", "some/adapter"]
    assert metadata["base_model_relation"] == "finetune"  # and no merge of two models
    link = "https://huggingface.co/some/base/blob/main/LICENSE.md"
    assert {name: metadata[name] for name in other} == other | {"license_link": link}
    assert metadata["model-index"][0]["results"][0]["dataset"]["type"] == "cfli/bge-full-data"
    assert 'AutoModel.from_pretrained(".", trust_remote_code=True)' in card and "| 5 | 0.250 | 0.500 |" in card
    (tmp_path / "base").mkdir()
    local = [[str(tmp_path / "base")], str(tmp_path / "acme.jsonl"), {5: (0.25, 0.5)}]
    card = model_card(tmp_path, arguments, *local)
    assert not [word for word in ("base_model", "license:", "datasets", str(tmp_path), "acme") if word in card]
    (tmp_path / "config.json").write_text('{"step_token": "soft", "adapter": "adapter"}')
    (tmp_path / "base/README.md").write_text("---\nlicense: llama3.2\nbase_model: some/llama\n---\n")
    metadata = yaml.safe_load(model_card(tmp_path, arguments, *local).split("---\n")[1])
    assert metadata["license"] == "llama3.2" and metadata["base_model"] == "some/llama"
    assert metadata["base_model_relation"] == "adapter"
    (tmp_path / "base/README.md").write_text("---\nlicense: [\n---\n")  # which must not cost a training its card
    assert "license:" not in model_card(tmp_path, arguments, *local)
    arguments.hub_model_id = "you/tiny"  # to be uploaded later
    assert 'AutoModel.from_pretrained("you/tiny", trust' in model_card(tmp_path, arguments)


def test_missing_permission_shows_before_training(pushed):
    assert "401" in pushed.refused
    assert not list((pushed.folder / "refused").iterdir()) and "me/refused" not in pushed.hub.repos


def test_checkpoints_are_not_uploaded_while_training(tmp_path):
    with pytest.raises(ValueError, match="hub_strategy='every_save'"):
        GircseTrainingArguments(output_dir=str(tmp_path), hub_strategy="every_save", use_cpu=True)

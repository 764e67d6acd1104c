"""README.md and docs/: Python blocks run as they are written, links lead somewhere, and the card is short.

The blocks of a page run one after the other in one process, in a copy of the repo and offline. Those of a page that
names repos on the Hub run against `loopback_hub.LoopbackHub`, which has small ones of these names; those that ask a
server run against one, with the root model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import train_gircse
from helpers import ROOT, loads_beside_others, make_rows, make_tokenizer, tiny_text_config
from loopback_hub import LoopbackHub, run, settings

PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
WITH_SPACES = [*PAGES, "space/README.md", "space/browser/README.md"]
# Where files of the copy would be in the way, or large.
NOT_COPIED = shutil.ignore_patterns(".git", "runs", "gircse-*", "__pycache__")

SERVER = "http://localhost:8000"

# The backbone, the trained adapter and somebody's own one that docs/training.md loads.
STAND_INS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
folder = Path(sys.argv[2])
import torch
import train_gircse
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

plain = AutoModelForCausalLM.from_pretrained(folder / "plain")
plain.push_to_hub("Qwen/Qwen2.5-0.5B")
AutoTokenizer.from_pretrained(folder / "plain").push_to_hub("Qwen/Qwen2.5-0.5B")
argv = f"--model_name_or_path Qwen/Qwen2.5-0.5B --train_data {folder / 'pairs.jsonl'} --output_dir {folder / 'out'} "
argv += "--dtype bfloat16 --save_dtype bfloat16 --save_adapter --push_to_hub --hub_model_id you/gircse-lora --lora_r 2 "
argv += "--max_steps 2 --learning_rate 0.05 --k 2 --per_device_train_batch_size 4 --held_out 0 --report_to none "
argv += "--use_cpu True --disable_tqdm True --dataloader_pin_memory False"
train_gircse.main(argv.split())

lora = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
for name, weight in lora.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(weight, std=0.1)
lora.push_to_hub("someone/lora-a")
"""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def names_the_hub(code: list[str]) -> bool:
    return any(re.search(r'"(you|someone|Qwen)/', block) for block in code)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "repo", ignore=NOT_COPIED))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config(tie_word_embeddings=True)).save_pretrained(folder / "plain")
    make_tokenizer().save_pretrained(folder / "plain")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(12)))
    with LoopbackHub() as hub:
        run(STAND_INS, ROOT, folder, **settings(hub, folder / "home"))
        yield hub


@pytest.fixture(scope="module")
def server(copy, tmp_path_factory) -> Iterator[str]:
    from serve_helpers import running

    with running(copy, tmp_path_factory.mktemp("server"), "--name", "gircse", "--k", "1") as found:
        yield found.url


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(text_of(page))])
def test_python_blocks_run(page, copy, tmp_path, request):
    code = blocks(text_of(page))
    if any("torchao" in block for block in code):
        pytest.importorskip("torchao")
    if any("onnxruntime" in block for block in code):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")  # the page's first block exports
    if names_the_hub(code):
        variables = settings(request.getfixturevalue("hub"), tmp_path / "home", HF_TOKEN="")
        if not loads_beside_others():  # with this transformers and peft
            code = [block for block in code if "load_adapter(" not in block]
    else:
        variables = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    if any(SERVER in block for block in code):
        if all(importlib.util.find_spec(package) for package in ("openai", "ray", "uvicorn")):
            url = request.getfixturevalue("server")
            code = [block.replace(SERVER, url) for block in code]
        else:
            code = [block for block in code if SERVER not in block]
    script = copy / f"{Path(page).stem}_blocks.py"
    script.write_text("\n".join(code), encoding="utf-8")  # later ones use what earlier ones made
    environment = {**os.environ, "PYTHONPATH": "", **variables}
    result = subprocess.run([sys.executable, script], cwd=copy, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def shell_lines(text: str, pattern: str) -> list[list[str]]:
    """The words of those lines of a page's bash blocks in which the pattern is found."""
    code = "\n".join(re.findall(r"^ *```bash\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in code.splitlines() if re.search(pattern, line)]


def commands(text: str) -> list[list[str]]:
    """Those of a page's bash blocks that run a program of this repo, as its name and its arguments."""
    words = shell_lines(text, r"python \w+_(gircse|autoregembed)\.py")
    found = [line[line.index("python") + 1 :] for line in words]
    return [[name.removesuffix(".py"), *arguments] for name, *arguments in found if "..." not in arguments]


@pytest.mark.parametrize("command", [c for page in WITH_SPACES for c in commands(text_of(page))], ids=" ".join)
def test_commands_of_the_pages_are_understood(command, monkeypatch):
    name, *arguments = command
    try:
        program = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")
    monkeypatch.chdir(ROOT)
    if name == "train_autoregembed":
        monkeypatch.setattr(program, "is_gircse", lambda _: False)  # would ask the Hub
        _, arguments = program.parse(arguments)
        program = train_gircse
    program.parse(arguments)


@pytest.mark.parametrize(
    "words", [w for page in WITH_SPACES for w in shell_lines(text_of(page), r"^hf ")], ids=" ".join
)
def test_the_hub_program_understands_the_pages(words, tmp_path):
    program = shutil.which("hf", path=Path(sys.executable).parent)
    if program is None:
        pytest.skip("this huggingface_hub has no hf")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [program, *words[1:]], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert result.returncode != 2, result.stderr  # 1: it has no connection


@pytest.mark.slow
def test_training_without_arguments(tmp_path, capsys):
    """One step of it, and eight pairs held out."""
    less = ["--max_steps", "1", "--held_out", "8", "--output_dir", str(tmp_path / "out")]
    train_gircse.main([*train_gircse.SAMPLE_RUN, *less])
    assert "Held-out retrieval accuracy (8 pairs)" in capsys.readouterr().out
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_broken_block_would_be_seen():
    text = "```python\na = 1\n```\n\n```bash\nls\n```\n```python\nb\n```\n"
    assert blocks(text) == ["a = 1\n", "b\n"]
    with pytest.raises(NameError):
        exec("".join(blocks(text)))
    page = (
        "```bash\npython a_gircse.py --b 'c d' \\\n    --e  # f\nX=1 python g_gircse.py\npython h_gircse.py ...\n```\n"
    )
    assert commands(page) == [["a_gircse", "--b", "c d", "--e"], ["g_gircse"]]


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub and the Hub make them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            found.append(link)
    return found


def test_relative_links_lead_somewhere():
    assert {page: broken_links(ROOT / page) for page in WITH_SPACES} == {page: [] for page in WITH_SPACES}


def test_a_broken_link_would_be_seen(tmp_path):
    (tmp_path / "other.md").write_text("# The `one`, and more\n```bash\n# not a heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md) [b](other.md#the-one-and-more) ![c](no.png) [d](other.md#not-a-heading) [e](#here)")
    assert broken_links(page) == ["no.png", "other.md#not-a-heading", "#here"]


def test_the_card_is_short_and_leads_to_every_page():
    text = text_of("README.md")
    assert len(text.encode()) < 10_000
    assert [page for page in PAGES[1:] if f"]({page})" not in text] == []

"""What `GircseProcessor` promises: exact token ids, the suffix kept, bad input named, and a folder that loads again."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy

ROOT = Path(__file__).resolve().parents[1]
GircseProcessor = get_class_from_dynamic_module("processing_gircse.GircseProcessor", str(ROOT))

CHARS = sorted(set("Instruct: {}\nQuery: abcdefghijklmnopqrstuvwxyz.!"))
TOKENS = ["<pad>", "</s>", "<mark>", *CHARS]
MERGES = [("c", "a"), ("ca", "t"), (" ", "d")]  # "cat" is one token; " d" merges a space with what follows it
IDS = {token: i for i, token in enumerate([*TOKENS, *(a + b for a, b in MERGES)])}


def make_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab=IDS, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "additional_special_tokens": ["<mark>"], **kwargs}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=16,
        **{key: value for key, value in special.items() if value is not None},
    )


def ids(*tokens: str) -> list[int]:
    return [IDS[token] for token in tokens]


@pytest.fixture
def processor():
    return GircseProcessor(make_tokenizer())


def test_golden_document(processor):
    batch = processor("cat.")
    assert list(batch) == ["input_ids", "attention_mask"] == processor.model_input_names
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["input_ids"].tolist() == [ids("cat", ".")]
    assert batch["attention_mask"].tolist() == [[1, 1]]


def test_golden_query(processor):
    # "Query: " + "dog": one string, hence the merged token " d"
    expected = ids(*"Instruct: ", *"go", "\n", *"Query:", " d", *"og")
    assert processor.prompt_for("go") == "Instruct: go\nQuery: "
    assert processor("dog", instruction="go", return_tensors=None)["input_ids"] == [expected]


def test_no_special_tokens_are_added():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", IDS["</s>"])]
    )
    assert tokenizer("cat")["input_ids"] == ids("cat", "</s>")
    assert GircseProcessor(tokenizer, suffix="!")("cat")["input_ids"].tolist() == [ids("cat", "!")]


def test_prompt_equals_instruction(processor):
    by_instruction = processor(["dog", "cat"], instruction="go")
    by_prompt = processor(["dog", "cat"], prompt="Instruct: go\nQuery: ")
    assert torch.equal(by_instruction["input_ids"], by_prompt["input_ids"])
    assert torch.equal(by_instruction["attention_mask"], by_prompt["attention_mask"])


def test_one_instruction_per_text(processor):
    rows = processor(["dog"] * 4, instruction=["go", None, "", "{x}"], padding=False, return_tensors=None)["input_ids"]
    assert rows[0] == processor("dog", instruction="go")["input_ids"][0].tolist()
    assert rows[1] == rows[2] == ids(*"dog")
    assert rows[3][:13] == ids(*"Instruct: {x}")


def test_braces_are_literal():
    processor = GircseProcessor(make_tokenizer(), prompt_template='{"task": {instruction}} {}')
    assert processor.prompt_for("{x}") == '{"task": {x}} {}'
    assert processor.prompt_for("") == processor.prompt_for(None) == ""


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad_token, pad_id", [("<pad>", 0), (None, 1)])
def test_padding(side, pad_token, pad_id):
    tokenizer = make_tokenizer(padding_side=side, pad_token=pad_token)
    batch = GircseProcessor(tokenizer)(["cat.", "cat", "dogs"])
    pad = [pad_id]
    if side == "right":
        expected = [ids("cat", ".") + pad * 2, ids("cat") + pad * 3, ids(*"dogs")]
        mask = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    else:
        expected = [pad * 2 + ids("cat", "."), pad * 3 + ids("cat"), ids(*"dogs")]
        mask = [[0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    assert batch["input_ids"].tolist() == expected
    assert batch["attention_mask"].tolist() == mask
    assert tokenizer.pad_token == pad_token, "the user's tokenizer was changed"


def test_no_padding_gives_ragged_lists(processor):
    batch = processor(["cat.", "cat"], padding=False, return_tensors=None)
    assert batch["input_ids"] == [ids("cat", "."), ids("cat")]
    assert batch["attention_mask"] == [[1, 1], [1]]


def test_padding_to_max_length(processor):
    batch = processor(["cat.", "cat"], padding="max_length", max_length=np.int64(4), truncation=True)
    assert batch["input_ids"].tolist() == [[*ids("cat", "."), 0, 0], [*ids("cat"), 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert processor([], padding="max_length")["input_ids"].shape == (0, 0)


def test_rows_of_several_lengths_are_no_tensor(processor):
    with pytest.raises(ValueError, match="return_tensors='pt' needs rows of one length: give return_tensors=None"):
        processor(["cat.", "cat"], padding="do_not_pad")
    with pytest.raises(ValueError, match="return_tensors='np' needs .* truncation=True with padding='max_length'"):
        processor(["cat.", "dogs"], padding="max_length", max_length=3, truncation=False, return_tensors="np")
    assert processor(["cat", "cat"], padding=False)["input_ids"].tolist() == [ids("cat")] * 2


def test_without_truncation_a_text_stays_whole(caplog):
    processor = GircseProcessor(make_tokenizer(), suffix="!", max_length=6)
    for truncation in (False, "do_not_truncate"):
        assert processor("x" * 9, truncation=truncation)["input_ids"].tolist() == [ids(*"xxxxxxxxx!")]
    assert not caplog.records


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": True, "truncation": True, "return_tensors": "pt"},
        {"padding": "longest", "truncation": "longest_first"},
        {"padding": PaddingStrategy.LONGEST, "truncation": TruncationStrategy.LONGEST_FIRST},
        {"padding": None, "truncation": None, "max_length": None, "text_pair": None, "images": None},
        {"add_special_tokens": False, "return_attention_mask": True, "return_token_type_ids": False, "stride": 0},
    ],
)
def test_arguments_of_tokenizers_may_ask_for_what_is_done_anyway(processor, arguments):
    batch = processor(["dog", "cat"], instruction="go", **arguments)
    assert list(batch) == ["input_ids", "attention_mask"]
    assert batch["input_ids"].tolist() == processor(["dog", "cat"], instruction="go")["input_ids"].tolist()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            {"padding": "left"},
            "padding='left' is unknown. Choose True, False or one of longest, max_length",
        ),
        ({"truncation": "only_second"}, "truncation='only_second' is unknown. Choose .* longest_first"),
        ({"add_special_tokens": True}, "add_special_tokens=True is not supported .*write them into prompt or suffix"),
        ({"return_attention_mask": False}, "return_attention_mask=False is not supported .*drop it from the result"),
        ({"return_token_type_ids": True}, "return_token_type_ids=True is not supported"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of=8 is not supported .*padding='max_length'"),
        ({"text_pair": ["cat"]}, r"text_pair=\['cat'\] is not supported .*join the two, or embed each"),
        ({"text_target": "cat"}, "text_target='cat' is not supported"),
        ({"images": np.zeros((2, 2))}, "(?s)images=.* is not supported .*texts alone"),
        ({"truncation_side": "left"}, "truncation_side='left' is not supported .*cut at their end"),
    ],
)
def test_other_arguments_are_refused_by_name(processor, arguments, said):
    with pytest.raises(ValueError, match=said):
        processor(["dog"], **arguments)


def test_a_second_text_and_a_wrong_name_are_refused(processor):
    with pytest.raises(ValueError, match=r"text_pair=\['cat'\] is not supported"):
        processor(["dog"], ["cat"])
    with pytest.raises(TypeError, match="instrction='go', an argument that it does not know. It takes text, instruct"):
        processor("dog", instrction="go")


@pytest.mark.parametrize("kind", [tuple, np.array, iter, lambda texts: np.array(texts, dtype=object)])
def test_ordered_collections_are_lists(processor, kind):
    expected = processor(["dog", "cat"], instruction=["go", ""])["input_ids"].tolist()
    assert processor(kind(["dog", "cat"]), instruction=kind(["go", ""]))["input_ids"].tolist() == expected


@pytest.mark.parametrize("texts", [{"dog", "cat"}, {"dog": 1}, b"dog"])
def test_what_has_no_order_is_no_list(processor, texts):
    with pytest.raises(TypeError, match=rf"text\[0\] is .* of type {type(texts).__name__}, but must be a str"):
        processor(texts)


def test_a_chat_template_writes_texts(processor):
    processor.chat_template = processor.tokenizer.chat_template = "{{ messages[0].content[0].text }}."
    messages = [{"role": "user", "content": [{"type": "text", "text": "cat"}]}]
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [ids("cat", ".")]


def test_truncation_keeps_suffix_and_warns_once(caplog):
    processor = GircseProcessor(make_tokenizer(), suffix="!.", max_length=6)
    assert processor("dogs")["input_ids"].tolist() == [ids(*"dogs!.")], "exactly max_length is not over-long"
    assert not caplog.records
    batch = processor(["dogs and more", "cat", "x" * 40], return_tensors=None)
    assert batch["input_ids"] == [ids(*"dogs!."), ids("cat", "!", ".") + [0] * 3, ids(*"xxxx!.")]
    processor("x" * 40)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "2 of 3 texts" in messages[0] and "max_length=6" in messages[0]


def test_truncation_shortens_the_text_not_the_prompt(processor):
    row = processor("x" * 99, instruction="go", max_length=22)["input_ids"][0].tolist()
    assert row == ids(*"Instruct: go\nQuery: xx")


@pytest.mark.parametrize("argument", ["instruction", "prompt"])
def test_a_prompt_that_leaves_nothing_of_the_texts_is_refused(argument):
    processor = GircseProcessor(make_tokenizer(), prompt_template="{instruction}", suffix="!.", max_length=6)
    assert processor(["dogs", "x"], **{argument: "..."})["input_ids"][0].tolist() == ids(*"...d!.")
    with pytest.raises(ValueError, match=rf"^{argument}: the prompt '\.{{4}}' has 4 tokens .* suffix 2.*max_length=6"):
        processor(["dogs", "x"], **{argument: "...."})
    assert processor("dogs", truncation=False, **{argument: "...."})["input_ids"][0].tolist() == ids(*"....dogs!.")
    assert processor("", **{argument: "...."})["input_ids"][0].tolist() == ids(*"....!."), "nothing is cut"


def test_one_instruction_of_several_that_leaves_nothing_is_refused():
    processor = GircseProcessor(make_tokenizer(), prompt_template="{instruction}", max_length=4)
    with pytest.raises(ValueError, match=r"instruction: the prompt '!{4}'"):
        processor(["dogs", "dogs", "x"], instruction=[".", None, "!!!!"])


def test_tokenizer_length_warning_is_silent(processor, caplog):
    assert processor("x" * 40)["input_ids"].shape == (1, 40)  # the tokenizer's model_max_length is 16
    assert not caplog.records


@pytest.mark.parametrize("max_length", [0, 2, 2.5, "8"])
def test_bad_max_length(max_length):
    with pytest.raises(ValueError, match="max_length must be an int greater than the suffix's 2 tokens"):
        GircseProcessor(make_tokenizer(), suffix="!.", max_length=max_length)
    with pytest.raises(ValueError, match="max_length"):
        GircseProcessor(make_tokenizer(), suffix="!.")("cat", max_length=max_length)


def test_true_is_not_a_length():
    with pytest.raises(ValueError, match="max_length .* got True"):
        GircseProcessor(make_tokenizer(), max_length=True)


@pytest.mark.parametrize("name", ["max_length", "model_max_length"])
def test_a_wrong_length_is_refused_when_it_is_set(processor, name):
    for wrong in (None, 0, -1, 20.0, np.float64(20), "20", True):
        with pytest.raises(ValueError, match=rf"max_length must be an int >= 1, got {re.escape(repr(wrong))}"):
            setattr(processor, name, wrong)
    assert processor.max_length == processor.model_max_length == 512


def test_lengths_of_numpy_are_ints(tmp_path):
    processor = GircseProcessor(make_tokenizer(), max_length=np.int64(7))
    assert type(processor.max_length) is int and processor("x" * 9)["input_ids"].shape == (1, 7)
    processor.model_max_length = np.int32(5)
    assert type(processor.max_length) is int and processor("x" * 9)["input_ids"].shape == (1, 5)
    assert processor("x" * 9, max_length=torch.tensor(3))["input_ids"].shape == (1, 3)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))["max_length"] == 5
    for name in ("max_length", "model_max_length"):
        loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True, **{name: np.int64(4)})
        assert loaded.max_length == 4 and loaded("x" * 9)["input_ids"].shape == (1, 4)


@pytest.mark.parametrize("template", ["Query: ", "", "{}", None])
def test_bad_template(template):
    with pytest.raises(ValueError, match="prompt_template must contain '{instruction}'"):
        GircseProcessor(make_tokenizer(), prompt_template=template)


def test_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="max_len"):
        GircseProcessor(make_tokenizer(), max_len=8)


@pytest.mark.parametrize("eos, pad, expected", [("</s>", "<pad>", "</s>"), (None, "<pad>", "<pad>")])
def test_empty_text(eos, pad, expected):
    processor = GircseProcessor(make_tokenizer(eos_token=eos, pad_token=pad))
    batch = processor(["", "cat."])
    assert batch["input_ids"].tolist() == [ids(expected, "<pad>"), ids("cat", ".")]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert processor("", instruction="go")["input_ids"].tolist() == [ids(*"Instruct: go\nQuery: ")]


def test_empty_text_without_any_special_token():
    processor = GircseProcessor(make_tokenizer(eos_token=None, pad_token=None, additional_special_tokens=None))
    assert processor(["cat.", "cat"])["attention_mask"].tolist() == [[1, 1], [1, 0]]
    with pytest.raises(ValueError, match="eos, bos or pad"):
        processor(["cat", ""])


@pytest.mark.parametrize("instruction", [None, "go", []])
def test_empty_list(processor, instruction):
    batch = processor([], instruction=instruction)
    for name in ("input_ids", "attention_mask"):
        assert batch[name].shape == (0, 0) and batch[name].dtype == torch.int64
    assert dict(processor([], return_tensors=None)) == {"input_ids": [], "attention_mask": []}


@pytest.mark.parametrize("text, index, kind", [(None, 0, "NoneType"), (["a", None], 1, "NoneType"), ([3], 0, "int")])
def test_text_of_wrong_type(processor, text, index, kind):
    with pytest.raises(TypeError, match=rf"text\[{index}\].*type {kind},.*Pass a str"):
        processor(text)


def test_half_a_character_is_named(processor):
    with pytest.raises(ValueError, match=r"text\[1\] is 'b\\ud83d' and holds half a character"):
        processor(["a", "b\ud83d"])
    with pytest.raises(ValueError, match=r"instruction\[0\] is .* half a character"):
        processor("a", instruction="\ud83d")


def test_instruction_and_prompt_errors(processor):
    with pytest.raises(ValueError, match="are both given"):
        processor("cat", instruction="go", prompt="x: ")
    with pytest.raises(ValueError, match="2 entries for 1 texts"):
        processor("cat", instruction=["go", "do"])
    with pytest.raises(TypeError, match=r"instruction\[1\].*int"):
        processor(["cat", "dog"], instruction=["go", 1])
    with pytest.raises(TypeError, match=r"prompt\[0\]"):
        processor("cat", prompt=["x: "])


def test_decode_is_forwarded(processor):
    assert processor.decode(ids("cat", ".")).replace(" ", "") == "cat."
    assert [row.replace(" ", "") for row in processor.batch_decode([ids("cat"), ids(*"dog")])] == ["cat", "dog"]


SETTINGS = {"prompt_template": "Do {instruction}: ", "suffix": "!", "max_length": 9}
RELOAD = """
import json, sys
from transformers import AutoProcessor, AutoTokenizer
first = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
first.save_pretrained(sys.argv[2])
second = AutoProcessor.from_pretrained(sys.argv[2], trust_remote_code=True)
plain = AutoTokenizer.from_pretrained(sys.argv[2])
out = [dict(p(["cat in the garden", ""], instruction=["go", None], return_tensors=None)) for p in (first, second)]
kept = [[p.prompt_template, p.suffix, p.max_length, p.tokenizer.all_special_tokens] for p in (first, second)]
print(json.dumps([out, kept, plain("cat")["input_ids"], type(second).__name__]))
"""


def saved_state(folder: Path) -> str:
    """The folder must carry the code, and an auto_map that does not point to another repository."""
    assert (folder / "processing_gircse.py").read_bytes() == (ROOT / "processing_gircse.py").read_bytes()
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    assert settings["auto_map"] == config["auto_map"] == {"AutoProcessor": "processing_gircse.GircseProcessor"}
    assert config["tokenizer_class"] in ("PreTrainedTokenizer", "PreTrainedTokenizerFast")  # names that 4.x knows
    assert not isinstance(config.get("extra_special_tokens"), list)  # 4.x fails on a list
    return (folder / "processor_config.json").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("chat_template", [None, "{{ messages }}"])
def test_save_load_save_load_in_fresh_process(tmp_path, chat_template):
    processor = GircseProcessor(make_tokenizer(chat_template=chat_template), **SETTINGS)
    processor.save_pretrained(tmp_path / "a")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "a"), str(tmp_path / "b")]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    out, kept, plain, name = json.loads(run.stdout)
    expected = dict(processor(["cat in the garden", ""], instruction=["go", None], return_tensors=None))
    assert out == [expected, expected]
    assert kept == [[*SETTINGS.values(), processor.tokenizer.all_special_tokens]] * 2
    assert "<mark>" in kept[0][3] and plain == ids("cat") and name == "GircseProcessor"
    assert saved_state(tmp_path / "a") == saved_state(tmp_path / "b")


class GPT2Tokenizer(PreTrainedTokenizerFast):
    """A tokenizer of another make than the class of its name, as Hub repos have them: transformers 5 would make that
    anew from the vocabulary."""


def test_the_tokenizer_that_was_saved_is_loaded(tmp_path):
    backend = make_tokenizer().backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Split("a", "isolated")  # which keeps "cat" apart
    tokenizer = GPT2Tokenizer(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", local_files_only=True)
    processor = GircseProcessor(tokenizer)
    assert processor("cat dog")["input_ids"].tolist() == [ids(*"cat", " d", *"og")]
    processor.save_pretrained(tmp_path)
    saved_state(tmp_path)
    assert "local_files_only" not in json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    for loaded in (GircseProcessor.from_pretrained(tmp_path).tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded("cat dog", add_special_tokens=False)["input_ids"] == ids(*"cat", " d", *"og")


def test_padding_is_the_tokenizers(processor):
    assert (processor.pad_token_id, processor.padding_side) == (0, "right")
    processor.padding_side = "left"
    assert processor.tokenizer.padding_side == "left"
    assert processor(["cat", "cat."])["input_ids"].tolist() == [[0, *ids("cat")], ids("cat", ".")]
    assert GircseProcessor(make_tokenizer(pad_token=None)).pad_token_id == IDS["</s>"]


def test_load_with_overrides(tmp_path):
    GircseProcessor(make_tokenizer(), **SETTINGS).save_pretrained(tmp_path)
    overrides = {"suffix": "!.", "max_length": 5, "padding_side": "left"}
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True, **overrides)
    assert loaded(["dogsdogs", "cat"])["input_ids"].tolist() == [ids(*"dog!."), [0, 0, *ids("cat", "!", ".")]]


def test_needs_trust_but_the_tokenizer_does_not(tmp_path):
    GircseProcessor(make_tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoProcessor.from_pretrained(tmp_path, trust_remote_code=False)
    assert AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)("cat")["input_ids"] == ids("cat")


def test_push_uploads_what_older_versions_load(tmp_path, monkeypatch, processor):
    pushed = []
    monkeypatch.setattr(type(processor), "push_to_hub", lambda self, repo_id, **kw: pushed.append((repo_id, kw)))
    processor.save_pretrained(tmp_path / "name", push_to_hub=True, private=True)
    processor.save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="me/repo")
    assert pushed == [("name", {"private": True}), ("me/repo", {})]
    saved_state(tmp_path / "name")

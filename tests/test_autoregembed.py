"""AutoRegEmbed: the losses of its stages, and training them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import train_autoregembed
from gircse.loading import load
from gircse.rows import kept_lines
from gircse.training import autoregembed
from gircse.training.autoregembed import TargetCollator
from gircse.training.conditional import alignment_loss, compression_loss, token_log_probabilities
from helpers import make_rows, make_tokenizer

SETTINGS = "--tuning full --held_out 4 --logging_steps 1 --save_steps 2 --report_to none --use_cpu True "
SETTINGS += "--disable_tqdm True --dataloader_pin_memory False --per_device_train_batch_size 8"


# Losses -------------------------------------------------------------------------------------------------------------


def test_a_decoder_goes_on_from_states_as_from_embeddings(make_plain):
    """The log-probabilities of a text after tokens, in a batch of unlike lengths."""
    decoder, _ = make_plain("qwen2")
    start = torch.tensor([[5, 17, 40], [9, 3, 61]])
    targets, mask = torch.tensor([[7, 30, 2, 2], [8, 44, 12, 2]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    found = token_log_probabilities(decoder, decoder.get_input_embeddings()(start), targets, mask)
    states = decoder.get_input_embeddings()(start[:, :1])
    for suffix in (start[0, 1:], start[1, 1:]):  # of a prompt, the same for all rows
        behind = token_log_probabilities(decoder, states, targets, mask, suffix)
        whole = decoder.get_input_embeddings()(torch.cat([start[:, :1], suffix.expand(2, -1)], dim=1))
        torch.testing.assert_close(behind, token_log_probabilities(decoder, whole, targets, mask))
    for row, length in enumerate((3, 4)):
        whole = torch.cat([start[row], targets[row, :length]])
        expected = decoder(whole[None]).logits[0, 2:-1].log_softmax(-1)[range(length), targets[row, :length]]
        torch.testing.assert_close(found[row, :length], expected, atol=1e-5, rtol=1e-5)
    assert found[0, 3] == 0
    assert compression_loss(found, mask).item() == pytest.approx(-found.sum().item() / 7)


@pytest.mark.parametrize(("sign", "apart"), [(1, 2.0), (-1, 1.0)])
def test_the_alignment_by_hand(sign, apart):
    """beta = 0.5, tau = 0.2: s_1 = sigmoid(0.5 x 1), s_2 = sigmoid(0.5 x (3 +- 1))."""
    scores = [torch.tensor([value]) for value in (-2.0, -5.0, -1.0, -3.0, -4.0)]
    near, far = (1 / (1 + math.exp(-x)) for x in (0.5, apart))
    kept, lost = math.exp(-near / 0.2), math.exp(-far / 0.2)
    found = alignment_loss(*scores, beta=0.5, temperature=0.2, reference_sign=sign)
    assert found.item() == pytest.approx(-math.log(kept / (kept + lost)), abs=1e-6)
    assert found.item() == pytest.approx({1: 0.242794, -1: 0.458060}[sign], abs=1e-5)


def test_compression_of_two_processes_is_that_of_all_their_tokens():
    said, mask = -torch.arange(12.0).view(4, 3), torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]])
    said = said * mask
    parts = [(said[:3], mask[:3]), (said[3:], mask[3:])]
    tokens = sum(part.sum() for _, part in parts) / len(parts)  # as processes agree on it
    mean = sum(compression_loss(*part, tokens) for part in parts) / len(parts)
    assert compression_loss(said, mask) == mean == (0 + 1 + 2 + 3 + 6 + 7 + 9) / 7


def test_the_alignment_wants_the_positives_score_and_none_of_the_negatives():
    """S(q -> d+) may lie on either side of S(d+ -> d+); defaults are the paper's 0.1 and 0.1; the batch's mean."""
    positive, negative = (torch.tensor([-2.0, -1.0], requires_grad=True) for _ in range(2))
    itself, zero = torch.tensor([-1.0, -2.0]), torch.zeros(2)
    loss = alignment_loss(positive, negative, itself, zero, zero)
    near, apart = 1 / (1 + math.exp(-0.1)), 0.5
    assert loss.item() == pytest.approx(math.log1p(math.exp((near - apart) / 0.1)), abs=1e-6)
    loss.backward()
    assert positive.grad[0] < 0 < negative.grad.min() and positive.grad[0] < positive.grad[1]


# Batches ------------------------------------------------------------------------------------------------------------


def test_targets_are_the_bare_documents_with_their_end_unless_they_were_cut(processor):
    collator = TargetCollator(processor, 64, target_length=9)
    rows = [
        {"query": "q", "positive": "a longer thing than nine tokens are", "negatives": ["red"], "instruction": "find"},
        {"query": "r", "positive": "red", "negatives": [], "instruction": ""},
    ]
    same = {"symmetric": False, "source": "s", "label": None}
    rows = [{**row, **same, "all_positives": [row["positive"]]} for row in rows]
    batch = collator(rows)
    ids, mask = batch["targets"]["input_ids"], batch["targets"]["attention_mask"]
    red = [*processor.tokenizer("red", add_special_tokens=False)["input_ids"], processor.tokenizer.eos_token_id]
    assert ids.shape == (3, 9) and mask.sum(1).tolist() == [9, len(red), len(red)]
    assert ids[1, : len(red)].tolist() == ids[2, : len(red)].tolist() == red and red[-1] not in ids[0]
    assert "references" not in batch and "positive" not in batch

    scores = {("find", "q", rows[0]["positive"]): -9.0, ("find", "q", "red"): -7.5, ("", "r", "red"): -2.0}
    collator.references = scores
    batch = collator(rows)
    assert batch["references"].tolist() == [-9, -2, -7.5]  # the positives, then the negatives
    expected = processor([row["positive"] for row in rows], instruction=["find", None])
    assert batch["positive"]["input_ids"].tolist() == expected["input_ids"].tolist()
    assert batch["document"]["input_ids"].shape[1] < batch["positive"]["input_ids"].shape[1]  # bare, as a search has it
    collator.references = {key: score for key, score in scores.items() if key[0]}
    assert collator(rows)["references"].isnan().tolist() == [False, True, False]  # no score is taken for one


# Training -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(make_plain, tmp_path, training_cache):
    _, folder = make_plain("qwen2", vocab_size=400)
    make_tokenizer().save_pretrained(folder)
    with (tmp_path / "pairs.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_rows(28, lambda i: 1 + i % 2))

    def train(stage: str, model: str, output: str, *options: str) -> list[dict]:
        where = ["--model_name_or_path", model, "--train_data", str(tmp_path / "pairs.jsonl")]
        where += ["--output_dir", str(tmp_path / output), *SETTINGS.split(), *options]
        train_autoregembed.main(["--stage", stage, *where])
        lines = (tmp_path / output / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
        return [line for line in map(json.loads, lines) if "loss" in line]

    train.folder, train.plain = tmp_path, folder
    return train


def test_both_stages_one_after_the_other(place):
    more = ("--learning_rate", "3e-3", "--num_train_epochs", "12")
    losses = [line["loss"] for line in place("compression", place.plain, "one", *more)]
    assert losses[0] > 5 and losses[-1] < 0.8 * losses[0]  # log 400 = 6
    model = AutoModel.from_pretrained(place.folder / "one", trust_remote_code=True)
    assert (model.config.step_token, model.config.num_steps) == ("learned", 5)
    assert "Trained with information compression" in (place.folder / "one/README.md").read_text(encoding="utf-8")

    log = place("alignment", str(place.folder / "one"), "two", "--decoder", place.plain, "--max_steps", "4")
    kept = kept_lines(place.folder / "two/reference_scores-0.jsonl")
    rows = make_rows(28, lambda i: 1 + i % 2)
    assert 24 * 2 < len(kept) < sum(1 + len(row["neg"]) for row in rows) and all(row["score"] < 0 for row in kept)
    assert len(log) == 4
    card = (place.folder / "two/README.md").read_text(encoding="utf-8")
    assert "second stage): K = 5, beta 0.1, tau 0.1, sign of the reference term 1, learning rate 5e-06" in card


def test_references_are_the_scores_of_the_model_that_training_starts_from(place, monkeypatch):
    """So that they are those of the first batch, whose texts are scored alone here, unpadded."""
    seen = []

    def told(*scores, **settings):
        assert settings == {"beta": 0.5, "temperature": 0.2, "reference_sign": -1}
        seen.append([score.detach().clone() for score in scores])
        return alignment_loss(*scores, **settings)

    monkeypatch.setattr(autoregembed, "alignment_loss", told)
    prompt = "--prompt_template", "{instruction} ", "--suffix", " so"
    place("compression", place.plain, "one", "--max_steps", "1", *prompt)
    options = "--decoder", place.plain, "--max_steps", "2", "--beta", "0.5", "--tau", "0.2", "--reference_sign", "-1"
    place("alignment", str(place.folder / "one"), "two", *options)
    to_positive, to_negative, itself, reference_to_positive, reference_to_negative = seen[0]
    torch.testing.assert_close(reference_to_positive, to_positive, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reference_to_negative, to_negative, rtol=1e-4, atol=1e-4)
    scores = {round(row["score"], 3) for row in kept_lines(place.folder / "two/reference_scores-0.jsonl")}
    model, processor = load(str(place.folder / "one"))
    decoder, found, of_themselves = AutoModelForCausalLM.from_pretrained(place.plain), set(), []
    suffix = torch.tensor(processor.tokenizer(" so", add_special_tokens=False)["input_ids"])
    assert len(suffix)  # which the decoder reads behind the states

    def score(inputs: dict, document: str) -> float:
        target = TargetCollator(processor, None, 128).targets([document])
        states = model(**inputs, k=5).step_states
        return token_log_probabilities(decoder, states, *target.values(), suffix).sum().item()

    for row in make_rows(28, lambda i: 1 + i % 2):
        query = processor([row["query"]], instruction=row["instruction"] or None)
        found.add(round(score(query, row["neg"][0]), 3))
        positive = processor(row["pos"][:1], instruction=row["instruction"] or None)
        of_themselves.append(score(positive, row["pos"][0]))
    assert len(found & scores) > 0.8 * len(found)  # all but those held out, and what rounds otherwise
    distances = (itself[:, None] - torch.tensor(of_themselves)).abs().min(1).values
    assert distances.max() < 1e-3


def test_references_of_another_model_are_not_taken(place):
    for output in ("one", "other"):
        steps = {"one": "1", "other": "2"}[output]
        place("compression", place.plain, output, "--max_steps", steps, "--learning_rate", "1e-2")
    arguments = ("--decoder", place.plain, "--max_steps", "1", "--save_strategy", "no")
    file, counts = place.folder / "two/reference_scores-0.jsonl", []
    others = (("--target_length", "9"), ("--max_length", "30"))
    for model, more in (("one", ()), ("one", ()), ("other", ()), *(("one", other) for other in others)):
        place("alignment", str(place.folder / model), "two", *arguments, *more)
        (place.folder / "two/config.json").unlink()  # a model is not overwritten
        counts.append(len(kept_lines(file)))
    assert counts == [counts[0], counts[0], *(times * counts[0] for times in (2, 3, 4))]


def test_references_of_more_processes_are_read_by_fewer(place):
    place("compression", place.plain, "one", "--max_steps", "1")
    arguments = ("--decoder", place.plain, "--max_steps", "1", "--save_strategy", "no")
    place("alignment", str(place.folder / "one"), "two", *arguments)
    files = [place.folder / f"two/reference_scores-{process}.jsonl" for process in range(2)]
    lines = files[0].read_text(encoding="utf-8").splitlines(keepends=True)
    for file, part in zip(files, (lines[:9], lines[9:]), strict=True):
        file.write_text("".join(part), encoding="utf-8")
    (place.folder / "two/config.json").unlink()  # a model is not overwritten
    place("alignment", str(place.folder / "one"), "two", *arguments)
    assert [len(kept_lines(file)) for file in files] == [9, len(lines) - 9]


def test_a_resumed_run_has_the_references_of_its_start(place):
    """Also those that were not written before it ended."""
    place("compression", place.plain, "one", "--max_steps", "1")
    arguments = ("--decoder", place.plain, "--learning_rate", "1e-2", "--max_steps", "4")
    straight = place("alignment", str(place.folder / "one"), "two", *arguments)
    file = place.folder / "two/reference_scores-0.jsonl"
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole[: len(whole) // 2], encoding="utf-8")
    for path in (place.folder / "two/checkpoint-4").iterdir():
        path.unlink()
    (place.folder / "two/checkpoint-4").rmdir()
    resumed = place("alignment", str(place.folder / "one"), "two", *arguments, "--resume_from_checkpoint", "last")
    assert resumed[-1]["loss"] == pytest.approx(straight[-1]["loss"], rel=1e-4)
    again = {row["key"]: row["score"] for row in kept_lines(file)}
    first = {row["key"]: row["score"] for row in map(json.loads, whole.splitlines())}
    assert again == pytest.approx(first, rel=1e-4)


def test_a_lora_of_either_stage_is_merged_and_learned_tokens_are_trained(place):
    place(
        "compression",
        place.plain,
        "one",
        "--tuning",
        "lora",
        "--lora_r",
        "2",
        "--max_steps",
        "2",
        "--learning_rate",
        "1e-2",
    )
    place(
        *("alignment", str(place.folder / "one"), "two", "--decoder", place.plain, "--max_steps", "2"),
        *("--tuning", "lora", "--lora_r", "2", "--learning_rate", "1e-2"),
    )
    one, two = (load(str(place.folder / name))[0].state_dict() for name in ("one", "two"))
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    assert "learned_tokens.weight" in changed and any("q_proj" in name for name in changed)


def test_compression_warms_a_model_with_steps_up(place):
    log = place("compression", place.plain, "one", "--step_token", "soft", "--max_steps", "2", "--k", "3")
    config = load(str(place.folder / "one"))[0].config
    assert len(log) == 2 and (config.step_token, config.num_steps) == ("soft", 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--stage alignment --model_name_or_path {one}", "--decoder must be the causal LM that"),
        ("--stage compression --model_name_or_path x --target_length 1", "--target_length 1 must be at least 2"),
        ("--stage compression --model_name_or_path x --tau 1 --beta 2", "--beta, --tau without effect"),
        ("--stage compression --model_name_or_path x --gguf_file=y", "--gguf_file needs --decoder too"),
        ("--stage compression --model_name_or_path x --step_token none", "invalid choice: 'none'"),
    ],
)
def test_arguments_that_do_not_go_together(options, message, exported, capsys):
    with pytest.raises(SystemExit):
        train_autoregembed.parse(options.format(one=exported).split())
    assert message in capsys.readouterr().err


def test_a_folder_of_one_gguf_file_needs_a_decoder(tmp_path, capsys):
    (tmp_path / "m.gguf").touch()
    with pytest.raises(SystemExit):
        train_autoregembed.parse(["--stage", "compression", "--model_name_or_path", str(tmp_path)])
    assert "--gguf_file needs --decoder too" in capsys.readouterr().err


def test_what_training_does_not_take_is_refused(place, tmp_path):
    with pytest.raises(ValueError, match="num_negatives=2 must be 1"):
        place("alignment", place.plain, "two", "--num_negatives", "2")
    for argument, value in (("sub_batch_size", "2"), ("temperature", "0.1"), ("reduction", "mean")):
        with pytest.raises(ValueError, match=rf"{argument}=.?{value}.? has no effect here, since it is of ICR"):
            place("compression", place.plain, "two", f"--{argument}", value)
    with (tmp_path / "pairs.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_rows(28))
    with pytest.raises(ValueError, match=r"of 24 pairs have no hard negative"):
        place("alignment", place.plain, "two")


@pytest.mark.parametrize(("option", "message"), [("--tau 0", "tau=0.0 must"), ("--beta -1", "beta=-1.0 must")])
def test_numbers_that_train_nothing_are_refused(place, option, message):
    with pytest.raises(ValueError, match=f"{message} be > 0, and finite"):
        place("alignment", place.plain, "three", *option.split())


def test_documents_longer_than_the_decoders_positions_are_cut(place):
    rows = [{"query": f"q {i}", "pos": ["red " * 300], "neg": ["cold"]} for i in range(28)]
    (place.folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("--train_data", str(place.folder / "long.jsonl"), "--max_steps", "1")
    assert len(place("compression", place.plain, "long", "--target_length", "500", *data)) == 1


def test_another_models_decoder_is_refused(place, make_plain):
    _, other = make_plain("llama", vocab_size=401)
    with pytest.raises(
        ValueError, match="embeds 401 tokens of 32 dimensions, the model 400 tokens of 32 dimensions: give the LM"
    ):
        place("compression", place.plain, "one", "--decoder", other)

"""AutoRegEmbed: the losses of its stages, and training them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModel

import train_autoregembed
from gircse.loading import load
from gircse.rows import kept_lines
from gircse.training.autoregembed import REFERENCE, TargetCollator, reference_key
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


def test_targets_are_the_bare_documents_with_their_end(processor):
    collator = TargetCollator(processor, 64, target_length=9)
    rows = [
        {"query": "q", "positive": "a longer thing than nine tokens are", "negatives": ["red"], "instruction": "find"},
        {"query": "r", "positive": "red", "negatives": [], "instruction": ""},
    ]
    rows = [
        {**row, "symmetric": True, "source": "s", "label": None, "all_positives": [row["positive"]]} for row in rows
    ]
    collator.references = {reference_key("find", "q", "red"): -7.5, reference_key("", "r", "red"): -2.0}
    batch = collator(rows)
    ids, mask = batch["targets"]["input_ids"], batch["targets"]["attention_mask"]
    assert ids.shape == (3, 9) and mask.sum(1).tolist() == [9, mask[1].sum(), mask[1].sum()]
    red = [*processor.tokenizer("red", add_special_tokens=False)["input_ids"], processor.tokenizer.eos_token_id]
    assert ids[1, : len(red)].tolist() == ids[2, : len(red)].tolist() == red and ids[0, -1] == red[-1]
    assert batch["references"].tolist() == [0, -2, -7.5]  # the positives, then the negatives


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

    # Before training S = R, so that a margin counts twice.
    log = place("alignment", str(place.folder / "one"), "two", "--decoder", place.plain, "--max_steps", "4")
    kept = kept_lines(place.folder / "two" / REFERENCE)
    rows = make_rows(28, lambda i: 1 + i % 2)
    assert 24 * 2 < len(kept) < sum(1 + len(row["neg"]) for row in rows) and all(row["score"] < 0 for row in kept)
    assert len(log) == 4 and 0 < log[0]["loss"] < 2
    assert "Trained with conditional distribution alignment" in (place.folder / "two/README.md").read_text("utf-8")


def test_a_reference_is_the_score_of_the_model_that_training_starts_from(place):
    place("compression", place.plain, "one", "--max_steps", "1")
    place("alignment", str(place.folder / "one"), "two", "--decoder", place.plain, "--max_steps", "1")
    scores = {row["key"]: row["score"] for row in kept_lines(place.folder / "two" / REFERENCE)}
    model, processor = load(str(place.folder / "one"))
    decoder = train_autoregembed.AutoModelForCausalLM.from_pretrained(place.plain)
    for row in make_rows(28, lambda i: 1 + i % 2):
        if (key := reference_key(row["instruction"], row["query"], row["neg"][0])) in scores:
            states = model(**processor([row["query"]], instruction=row["instruction"] or None), k=5).step_states
            target = TargetCollator(processor, None, 128).targets([row["neg"][0]])
            expected = token_log_probabilities(decoder, states, target["input_ids"], target["attention_mask"]).sum()
            assert scores[key] == pytest.approx(expected.item(), rel=1e-4)


def test_a_resumed_run_has_the_references_of_its_start(place):
    """Also those that were not written before it ended."""
    place("compression", place.plain, "one", "--max_steps", "1")
    arguments = ("--decoder", place.plain, "--learning_rate", "1e-2", "--max_steps", "4")
    straight = place("alignment", str(place.folder / "one"), "two", *arguments)
    file = place.folder / "two" / REFERENCE
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
    assert len(log) == 2 and load(str(place.folder / "one"))[0].config.step_token == "soft"


def test_what_does_not_go_together_is_refused(place, tmp_path, capsys, processor):
    place("compression", place.plain, "one", "--max_steps", "1")
    with pytest.raises(SystemExit):
        place("alignment", str(place.folder / "one"), "two")
    assert "--decoder must be the causal LM that" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        place("compression", place.plain, "two", "--target_length", "1")
    assert "--target_length 1 must be at least 2" in capsys.readouterr().err
    with pytest.raises(ValueError, match="num_negatives=2 must be 1"):
        place("alignment", place.plain, "two", "--num_negatives", "2")
    with pytest.raises(ValueError, match="sub_batch_size=2 is for ICR"):
        place("compression", place.plain, "two", "--sub_batch_size", "2")
    with (tmp_path / "pairs.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_rows(28))
    with pytest.raises(ValueError, match=r"of 24 pairs have no hard negative"):
        place("alignment", place.plain, "two")


def test_another_models_decoder_is_refused(place, make_plain):
    _, other = make_plain("llama", vocab_size=401)
    with pytest.raises(ValueError, match="has vocab_size 401, the model 400: give the LM"):
        place("compression", place.plain, "one", "--decoder", other)

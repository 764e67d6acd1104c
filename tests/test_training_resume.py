"""A killed run goes on as if nothing had happened; an output that can't be used is refused before training."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from gircse.training.callbacks import Split
from gircse.training.trainer import GircseTrainer
from helpers import ROOT, environment
from train_gircse import SAMPLE_FOLDER, SAMPLE_RUN, check_output, main, parse
from training_helpers import assert_same_run

pytestmark = pytest.mark.usefixtures("training_cache")


def test_training_moves_the_weights(workplace, straight):
    before = load_file(workplace.folder / "model" / "model.safetensors")
    after = load_file(straight.folder / "model.safetensors")
    assert max(float((after[name] - weight).abs().max()) for name, weight in before.items()) > 1e-3


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_end(workplace, straight):
    output = workplace.folder / "killed"
    argv = [*workplace.argv, "--output_dir", str(output)]
    with (workplace.folder / "killed.txt").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train_gircse.py"), *argv],
            env=environment(workplace.folder),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    deadline, log = time.monotonic() + 400, output / "training_log.jsonl"
    # Two steps beyond the first checkpoint, so that their lines of the log come again.
    while not log.exists() or log.read_text().count('"loss"') < 5:
        assert process.poll() is None and time.monotonic() < deadline, (workplace.folder / "killed.txt").read_text()
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert (output / "checkpoint-3").is_dir() and not (output / "model.safetensors").exists()
    assert "Do you wish to run" not in (workplace.folder / "killed.txt").read_text()  # it needs nobody at the keyboard
    # A checkpoint that was being written when the run died is passed over.
    (output / "checkpoint-13").mkdir()
    (output / "checkpoint-13" / "config.json").write_text("{}")
    (output / "checkpoint-14").mkdir()
    (output / "checkpoint-14" / "trainer_state.json").write_text('{"epoch": 2')
    main([*argv, "--resume_from_checkpoint", "last"])
    assert_same_run(output, straight.folder, steps=14)


@pytest.fixture
def steps_taken(monkeypatch) -> list[int]:
    """The steps that a test trains, by which going on is told from starting again."""
    steps, step = [], GircseTrainer.training_step

    def counted(self, *args, **kwargs):
        steps.append(self.state.global_step + 1)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(GircseTrainer, "training_step", counted)
    return steps


def test_resume_in_the_second_epoch(workplace, straight, steps_taken):
    """Step 9 is the second of epoch 2: order and drawn negatives are that epoch's, also after a resume."""
    output = workplace.folder / "later"
    shutil.copytree(straight.folder / "checkpoint-9", output / "checkpoint-9")
    main([*workplace.argv, "--output_dir", str(output), "--resume_from_checkpoint", "last"])
    assert_same_run(output, straight.folder, steps=14)
    assert steps_taken == [10, 11, 12, 13, 14]


def test_used_output_is_refused(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr("train_gircse.load_model", lambda *_: pytest.fail("loaded before the check"))
    complete = tmp_path / "checkpoint-3"
    complete.mkdir()
    (complete / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="checkpoint-3.*--resume_from_checkpoint last"):
        main([*workplace.argv, "--output_dir", str(tmp_path)])


def test_a_finished_model_is_not_overwritten(workplace, tmp_path, monkeypatch):
    """A run shorter than --save_steps leaves no checkpoint, by which it could be told. The sample's may be repeated."""
    monkeypatch.setattr("train_gircse.load_model", lambda *_: pytest.fail("loaded before the check"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a model, which would be overwritten: choose another folder"):
        main([*workplace.argv, "--output_dir", str(tmp_path)])
    elsewhere = tmp_path / "other" / "checkpoint-3"
    elsewhere.mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a model, which would be overwritten: choose another folder"):
        main([*workplace.argv, "--output_dir", str(tmp_path), "--resume_from_checkpoint", str(elsewhere)])
    monkeypatch.chdir(tmp_path)
    (tmp_path / SAMPLE_FOLDER).mkdir()
    (tmp_path / SAMPLE_FOLDER / "config.json").write_text("{}")
    assert check_output(parse(SAMPLE_RUN)[2]) is None


def test_unwritable_output_is_refused(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr("train_gircse.load_model", lambda *_: pytest.fail("loaded before the check"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be written"):
        main([*workplace.argv, "--output_dir", str(tmp_path / "file" / "below")])


def test_resume_without_checkpoint_is_refused(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr("train_gircse.load_model", lambda *_: pytest.fail("loaded before the check"))
    with pytest.raises(ValueError, match="holds no.* checkpoint"):
        main([*workplace.argv, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "last"])
    with pytest.raises(ValueError, match="resume_from_checkpoint='nowhere' is no folder"):
        main([*workplace.argv, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "nowhere"])


def test_a_checkpoint_without_optimizer_is_not_gone_on_from(workplace, tmp_path):
    argv = [*workplace.argv, "--output_dir", str(tmp_path), "--max_steps", "3", "--save_only_model"]
    main(argv)
    with pytest.raises(ValueError, match="checkpoint-3 holds no optimizer's state, as --save_only_model leaves it"):
        main([*argv, "--resume_from_checkpoint", "last"])


def test_the_model_of_a_checkpoint_is_written_without_training(workplace, straight, steps_taken, capsys):
    output, checkpoint = workplace.folder / "at-9", straight.folder / "checkpoint-9"
    argv = [*workplace.argv, "--output_dir", str(output), "--resume_from_checkpoint", str(checkpoint)]
    with pytest.raises(ValueError, match="checkpoint-9' is beyond max_steps=8"):
        main([*argv, "--max_steps", "8"])
    main([*argv, "--max_steps", "9", "--save_dtype", "float32", "--lr_scheduler_type", "polynomial"])
    assert steps_taken == [] and capsys.readouterr().out.count("Held-out accuracy before training") == 1
    assert "eval_accuracy" in (output / "training_log.jsonl").read_text().splitlines()[-1]
    found, expected = (load_file(folder / "model.safetensors") for folder in (output, checkpoint))
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)
    assert (output / "modules.json").exists() and "learning rate 0.001" in (output / "README.md").read_text()


def test_a_run_that_goes_on_for_longer_holds_out_the_pairs_that_it_did(workplace, tmp_path, monkeypatch, capsys):
    """By default their number hangs on the length of the run."""
    monkeypatch.setattr("train_gircse.FEWEST_HELD_OUT", 1)
    argv = [part for part in workplace.argv if part != "--held_out"]
    argv.remove("3")  # of --held_out; --save_steps has one too
    argv = [*argv[: argv.index("--save_steps")], *argv[argv.index("--save_steps") + 2 :], "--output_dir", str(tmp_path)]
    again = [*argv, "--resume_from_checkpoint", "last"]
    main([*argv, "--max_steps", "2", "--save_steps", "2", "--per_device_train_batch_size", "2"])
    first = re.findall(r"before training \((\d+) pairs\)", capsys.readouterr().out)
    assert first == ["1"]
    main([*again, "--max_steps", "4", "--per_device_train_batch_size", "30"])
    assert re.findall(r"before training \((\d+) pairs\)", capsys.readouterr().out) == first
    message = f"held_out=5, but the run of this checkpoint held out {first[0]} pairs and trained on the others: leave"
    with pytest.raises(ValueError, match=message):
        main([*again, "--max_steps", "5", "--held_out", "5"])
    with pytest.raises(ValueError, match=r"seed=7 would hold pairs out that the run of this checkpoint has trained on"):
        main([*again, "--max_steps", "5", "--seed", "7"])
    with pytest.raises(ValueError, match=r"has 30 pairs, and the run of this checkpoint read 60: give it the same"):
        main([*again, "--max_steps", "5", "--limit", "30"])


def test_a_checkpoint_of_an_earlier_version_knows_no_split(workplace, straight, tmp_path):
    copy = shutil.copytree(straight.folder / "checkpoint-9", tmp_path / "out/checkpoint-9")
    state = json.loads((copy / "trainer_state.json").read_text())
    assert (
        state["stateful_callbacks"].pop("Split")["args"]
        == {"pairs": 60, "held_out": 3, "seed": 42}
        == Split.of(straight.folder / "checkpoint-9")
    )
    (copy / "trainer_state.json").write_text(json.dumps(state))
    assert Split.of(copy) == {}
    main([*workplace.argv, "--output_dir", str(copy.parent), "--resume_from_checkpoint", "last", "--save_steps", "1"])
    assert Split.of(copy.parent / "checkpoint-14") == {"pairs": 60, "held_out": 3, "seed": 42}


def test_a_run_that_ended_before_it_was_saved_saves_its_best_model(workplace, tmp_path, monkeypatch):
    """Also where `max_steps` says that no step is left; one that is asked for by its name is what is saved."""
    accuracies = itertools.cycle([0.2, 0.9, 0.1])
    monkeypatch.setattr(
        "gircse.training.trainer.retrieval_accuracy", lambda *args: dict.fromkeys(args[4], next(accuracies))
    )
    argv = [*workplace.argv, "--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    argv += ["--load_best_model_at_end", "--output_dir", str(tmp_path)]
    main(argv)
    first, last = (load_file(tmp_path / f"checkpoint-{n}/model.safetensors") for n in (1, 2))
    for wanted, expected in (("last", first), (str(tmp_path / "checkpoint-2"), last)):
        main([*argv, "--resume_from_checkpoint", wanted])
        found = load_file(tmp_path / "model.safetensors")
        assert all(found[name].equal(expected[name]) for name in found), wanted


def test_a_finished_run_takes_no_further_step(workplace, tmp_path, steps_taken):
    """Also of half an epoch, whose end Trainer would pass by."""
    argv = [*workplace.argv, "--num_train_epochs", "0.4", "--lr_scheduler_type", "constant", "--save_steps", "1"]
    main([*argv, "--output_dir", str(tmp_path)])
    before, taken = load_file(tmp_path / "model.safetensors"), list(steps_taken)
    assert taken == [1, 2, 3]  # of 7 an epoch
    main([*argv, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "last"])
    after = load_file(tmp_path / "model.safetensors")
    assert steps_taken == taken and all(after[name].equal(before[name]) for name in before)


def test_lora_run_resumes(lora, workplace, steps_taken):
    output = workplace.folder / "lora-later"
    shutil.copytree(lora.folder / "checkpoint-2", output / "checkpoint-2")
    main([*lora.argv, "--output_dir", str(output), "--resume_from_checkpoint", "last"])
    assert_same_run(output, lora.folder, steps=4)
    assert steps_taken == [3, 4]

"""Gradient caching gives the gradients of the plain joint batch: with dropout, under autocast, with any size of
sub-batch, and with one that memory running out has chosen."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState

from gircse.training.gradient_cache import RandomState
from gircse.training.losses import candidate_mask, icr_loss
from helpers import make_rows
from training_helpers import (
    assert_same_gradients,
    gradients_of,
    joint_loss,
    make_trainer,
    one_batch,
    step,
    tiny_model,
    train_and_watch,
    watch_passes,
)

pytestmark = pytest.mark.usefixtures("training_cache")

# Gradient caching


@pytest.mark.parametrize("axes", [{}, {"step_token": "none", "pooling": "last"}])
def test_queries_and_documents_in_one_pass_change_nothing(processor, tmp_path, axes):
    rows = make_rows(5)
    model = tiny_model(dtype=torch.float64, **axes)
    trainer = make_trainer(model, processor, tmp_path, rows)
    inputs, passes = one_batch(processor, rows), watch_passes(model)
    loss, actual = step(trainer, inputs)
    documents = len(inputs["document_ids"])
    assert [len(made) for _, made in passes] == ([5, documents] if axes else [5 + documents])
    model.zero_grad(set_to_none=True)
    k = None if axes else trainer.args.k
    apart = (model(**inputs[side], k=k).step_embeddings for side in ("query", "document"))
    expected_loss = joint_loss(trainer.args, *apart, inputs)
    expected_loss.backward()
    assert loss == pytest.approx(expected_loss.item(), rel=1e-7)
    assert_same_gradients(actual, gradients_of(model), 1e-6)


@pytest.mark.parametrize("sub_batch_size", [1, 3, 100])
def test_cached_gradients_are_the_plain_ones(processor, tmp_path, sub_batch_size):
    rows = make_rows(5)
    model = tiny_model(dtype=torch.float64)
    trainer = make_trainer(model, processor, tmp_path, rows)
    inputs = one_batch(processor, rows)
    loss, expected = step(trainer, inputs)
    trainer.args.sub_batch_size = sub_batch_size
    passes = watch_passes(model)
    cached_loss, actual = step(trainer, inputs)
    calls = {kind: [len(made) for _, made in passes if made.requires_grad == kind] for kind in (True, False)}
    assert sum(calls[True]) == sum(calls[False]) == 5 + len(inputs["document_ids"])
    assert max(calls[True]) <= sub_batch_size and max(calls[False]) <= 4 * sub_batch_size
    assert cached_loss == pytest.approx(loss, rel=1e-10)
    assert_same_gradients(actual, expected)


def test_cached_passes_drop_the_same(processor, tmp_path):
    """With dropout the second pass must draw what the first drew, or the gradients are of another function."""
    rows = make_rows(4)
    model = tiny_model(dtype=torch.float64, text_changes={"attention_dropout": 0.1})
    trainer = make_trainer(model, processor, tmp_path, rows, sub_batch_size=3)
    inputs = one_batch(processor, rows)
    torch.manual_seed(5)
    step(trainer, inputs)  # sees that there is dropout, and is as if it had known
    known, passes = torch.get_rng_state(), watch_passes(model)
    torch.manual_seed(5)
    loss, actual = step(trainer, inputs)
    seen = list(passes)
    state = torch.get_rng_state()
    assert torch.equal(state, known)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for (side, before), (again, after) in zip(first, second, strict=True):
        assert torch.equal(side["input_ids"], again["input_ids"]) and torch.equal(before, after)
        assert not before.requires_grad and after.requires_grad
    with torch.no_grad():
        assert not torch.allclose(model(**first[0][0]).step_embeddings, first[0][1])  # drawn anew, it is different

    # The same chunks in the same order from the same seed, in one graph.
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    chunks = [model(**side).step_embeddings for side, _ in first]
    assert torch.equal(torch.get_rng_state(), state)  # and the replay leaves the state as a plain step does
    count = len(rows)
    rows_of = [side["input_ids"] for side, _ in first]
    split = next(i for i in range(len(rows_of) + 1) if sum(map(len, rows_of[:i])) == count)
    sides = []
    for name, part in (("query", chunks[:split]), ("document", chunks[split:])):
        order = inputs[name]["attention_mask"].sum(1).argsort(stable=True)
        sides.append(torch.cat(part)[order.argsort()])
    expected_loss = joint_loss(trainer.args, *sides, inputs)
    expected_loss.backward()
    assert loss == pytest.approx(expected_loss.item(), rel=1e-10)
    assert_same_gradients(actual, gradients_of(model))


def test_random_state_of_any_accelerator(monkeypatch):
    """MPS stands for those that aren't CUDA; its generator is one of the CPU here."""
    generator = torch.Generator().manual_seed(3)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: generator.get_state())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state, device: generator.set_state(state))
    state = RandomState(torch.device("mps"))
    first = torch.rand(3, generator=generator)
    after = generator.get_state()
    with state.replay():
        assert torch.equal(torch.rand(3, generator=generator), first)
    assert torch.equal(generator.get_state(), after)


@pytest.fixture
def own_precision(monkeypatch):
    """transformers 4 and Accelerate keep the precision of a trainer for those that come after it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_cached_gradients_under_autocast(processor, tmp_path, own_precision):
    """Autocast keeps cast weights; those cast without a graph in the first pass must not serve the second.

    Compared as one vector: that of a key's bias is next to nothing, since softmax takes no notice of what all scores
    have in common, so that in bfloat16 rounding makes most of it.
    """
    rows = make_rows(4)
    trainer = make_trainer(tiny_model(), processor, tmp_path, rows, bf16=True, temperature=0.2)
    inputs = one_batch(processor, rows)
    _, expected = step(trainer, inputs)
    trainer.args.sub_batch_size = 3
    _, actual = step(trainer, inputs)
    assert actual.keys() == expected.keys() and all(gradient.any() for gradient in actual.values())
    found, plain = (torch.cat([x[name].flatten() for name in expected]) for x in (actual, expected))
    assert torch.cosine_similarity(found, plain, dim=0) > 0.99


def test_the_loss_of_bfloat16_states_is_in_float32(processor, tmp_path, own_precision):
    """And so is what is logged of them."""
    rows = make_rows(4)
    trainer = make_trainer(tiny_model(), processor, tmp_path, rows, bf16=True)
    inputs, seen = one_batch(processor, rows), watch_passes(trainer.model)
    loss, _ = step(trainer, inputs)
    embeddings = torch.cat([found for _, found in seen])
    assert embeddings.dtype == torch.float32
    expected = joint_loss(trainer.args, embeddings[:4], embeddings[4:], inputs)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    final = embeddings[:4, -1]
    cosines = (final @ final.T)[~torch.eye(4, dtype=torch.bool)]
    assert trainer._metrics[0]["mean_cosine"].item() == pytest.approx(cosines.mean().item(), rel=1e-5)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_memory_that_runs_out_makes_sub_batches_and_keeps_the_batch(processor, tmp_path, steps_before):
    """A "GPU" that takes five texts at once, perhaps from some step on only: the same losses and gradients as with room
    for all of them from the start."""
    settings = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 1}
    rows = make_rows(16)
    plain = train_and_watch(tiny_model(dtype=torch.float64), processor, tmp_path / "plain", rows, **settings)
    model, sizes = tiny_model(dtype=torch.float64), []

    def small(module, args, kwargs):
        if module.training and torch.is_grad_enabled():
            sizes.append(len(kwargs["input_ids"]))
            if sizes[-1] > 5 and len(sizes) > steps_before:  # a pass is a step
                raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(small, with_kwargs=True)
    found = train_and_watch(model, processor, tmp_path / "small", rows, auto_find_batch_size=True, **settings)
    assert sum(size > 5 for size in sizes[:steps_before]) == steps_before
    assert max(size for size in sizes if size <= 5) >= 4  # no smaller than need be: accelerate tries 4 or 5
    assert found.losses[-4:] == pytest.approx(plain.losses) and found.documents[-4:] == plain.documents
    for mine, theirs in zip(found.gradients[-4:-2], plain.gradients[:2], strict=True):  # later ones add up rounding
        assert_same_gradients(mine, theirs, 1e-6)


@pytest.mark.parametrize("sub_batch_size", [None, 3])
def test_objective_settings_reach_the_loss(processor, tmp_path, sub_batch_size):
    rows = make_rows(4)
    chosen = {"reduction": "mean", "matryoshka_dims": [8], "temperature": 0.3, "refinement_weight": 0.5}
    model = tiny_model(dtype=torch.float64)
    trainer = make_trainer(model, processor, tmp_path, rows, sub_batch_size=sub_batch_size, **chosen)
    inputs = one_batch(processor, rows)
    queries, documents = (model(**inputs[side], k=trainer.args.k).step_embeddings for side in ("query", "document"))
    mask = candidate_mask(inputs)
    expected = {"reduction": "mean", "dims": (8,), "temperature": 0.3, "refinement_weight": 0.5}
    loss = step(trainer, inputs)[0]
    assert loss == pytest.approx(icr_loss(queries, documents, mask, **expected).total.item(), rel=1e-10)
    others = ({"reduction": "sum"}, {"dims": ()}, {"temperature": 0.02}, {"refinement_weight": 1.0})
    for other in others:  # each of them makes a difference here
        assert abs(loss - icr_loss(queries, documents, mask, **{**expected, **other}).total.item()) > 1e-4, other


@pytest.mark.parametrize("sub_batch_size", [None, 2])
def test_no_training_step_takes_cudnns_attention(processor, tmp_path, monkeypatch, sub_batch_size):
    """Which makes NaN of gradients on some GPUs; the way back takes the kernels of the way there."""
    model, found = tiny_model(), []
    forward = type(model).forward

    def seen(self, *args, **kwargs):
        found.append((torch.is_grad_enabled(), torch.backends.cuda.cudnn_sdp_enabled()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", seen)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    make_trainer(model, processor, tmp_path, make_rows(8), max_steps=2, sub_batch_size=sub_batch_size).train()
    assert (True, False) in found and (True, True) not in found and before
    assert torch.backends.cuda.cudnn_sdp_enabled()

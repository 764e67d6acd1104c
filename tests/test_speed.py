"""What makes it fast, pinned by counting calls, shapes and memory, never by timing."""

from __future__ import annotations

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache

from helpers import BACKBONES, attention_for, decoder_calls, dtype_for, gradients, relative, room

# Cost ----------------------------------------------------------------------------------------------------------------


def test_head_sees_one_position_a_row_and_decoder_one_new_position(make_model, batch):
    model = make_model()
    head, decoder = [], []
    model.get_output_embeddings().register_forward_pre_hook(lambda m, args: head.append(tuple(args[0].shape)))
    model.language_model.model.register_forward_pre_hook(
        lambda m, args, kwargs: decoder.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model.generate_embedding(*batch, k=5)
    assert head == [(4, 32)] * 5  # s_1..s_5; nothing after the last step
    assert decoder == [11, 1, 1, 1, 1, 1]


def mix_in_chunks(model, monkeypatch, size):
    monkeypatch.setattr(room(model, "soft_tokens_gircse"), "SMALLEST_CHUNKED_VOCABULARY", 0)
    monkeypatch.setattr(room(model, "soft_tokens_gircse"), "CHUNK_ON_CPU", size)


def training_step(model, batch, k=3):
    model.zero_grad()
    embeddings = model(*batch, k=k).step_embeddings
    (embeddings @ torch.linspace(-1, 1, 32).to(embeddings)).sum().backward()
    return embeddings.detach(), gradients(model)


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_mixing_chunk_by_chunk_gives_the_values_and_gradients_of_one_product(make_model, batch, monkeypatch, backbone):
    model = make_model(backbone, dtype=dtype_for(backbone), logit_temperature=0.7, **attention_for(backbone))
    plain = training_step(model, batch)
    mix_in_chunks(model, monkeypatch, 40)  # 99 tokens in chunks of 40, 40 and 19
    chunked = training_step(model, batch)
    tolerance = {"gpt2": 1e-9, "gemma2": 1e-4, "mpt": 1e-4}.get(backbone, 1e-5)  # most compute their norms in float32
    assert relative(chunked[0], plain[0]) < tolerance
    assert set(chunked[1]) == set(plain[1])
    for name, gradient in plain[1].items():  # those of key biases are 0 but for rounding
        assert (chunked[1][name] - gradient).norm() < tolerance * max(float(gradient.norm()), 1e-3), name


def test_mixing_handles_a_head_with_a_bias_frozen_tables_and_large_scores(make_model, monkeypatch):
    model = make_model()
    soft_embedding = room(model, "soft_tokens_gircse").SoftEmbedding
    monkeypatch.setattr(room(model, "soft_tokens_gircse"), "CHUNK_ON_CPU", 7)
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape, grad=True):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)

    for bias in (leaf(30), None):
        for frozen in (False, True):
            state, weight, table = leaf(4, 8), leaf(30, 8, grad=not frozen), leaf(30, 8, grad=not frozen)
            inputs = [t for t in (state, weight, bias, table) if t is not None and t.requires_grad]
            direction = leaf(4, 8, grad=False)
            ours = soft_embedding.apply(state, weight, bias, table, lambda logits: 30 * torch.tanh(logits))
            plain = torch.softmax(30 * torch.tanh(F.linear(state, weight, bias)), dim=-1) @ table
            torch.testing.assert_close(ours, plain)
            found, wanted = (torch.autograd.grad((x * direction).sum(), inputs) for x in (ours, plain))
            torch.testing.assert_close(found, wanted)
    huge = soft_embedding.apply(1e4 * state, weight, None, table, lambda logits: logits)
    assert huge.isfinite().all()


@pytest.mark.parametrize("size, chunked", [(1999, False), (32768, True)])
def test_training_keeps_nothing_as_large_as_a_large_vocabulary_for_backward(make_model, batch, size, chunked):
    model = make_model(text_changes={"vocab_size": size})
    weights = {p.data_ptr() for p in model.parameters()}
    kept = []

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*batch, k=3)
    assert kept and chunked is not any(size in shape for shape in kept)


@pytest.mark.parametrize("chunked", [False, True])
def test_mixing_under_autocast_is_in_half_precision_and_close(make_model, batch, monkeypatch, chunked):
    model = make_model()
    if chunked:
        mix_in_chunks(model, monkeypatch, 40)
    exact = training_step(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = training_step(model, batch)
    assert half[1]["language_model.lm_head.weight"].dtype == torch.float32
    assert F.cosine_similarity(half[0], exact[0], dim=-1).min() > 0.99
    for name in ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"):
        assert F.cosine_similarity(half[1][name].flatten(), exact[1][name].flatten(), dim=0) > 0.97, name


def test_steps_take_no_mask_without_padding_and_slices_of_one_with_it(make_model, batch):
    model = make_model()
    if model.language_model.config._attn_implementation != "sdpa":
        pytest.fail("the default attention is expected to be sdpa")
    masks = decoder_calls(model, "attention_mask")
    model.generate_embedding(batch[0][:1], k=3)
    assert masks[0].shape == (1, 11) and masks[1:] == [None, None, None]
    masks.clear()
    model.generate_embedding(*batch, k=3)
    assert [tuple(mask.shape) for mask in masks] == [(4, 11), (4, 1, 1, 12), (4, 1, 1, 13), (4, 1, 1, 14)]
    assert len({mask.data_ptr() for mask in masks[1:]}) == 1


@pytest.mark.parametrize("padded", [True, False])
def test_steps_read_no_value_back(make_model, batch, padded):
    """Reading a value makes Python wait for a GPU. Between the prefill and the last step there is none."""

    class Reads(TorchDispatchMode):
        seen: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
                self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    model = make_model()
    ids, mask = batch if padded else (batch[0][:1].repeat(2, 1), torch.ones(2, 11, dtype=torch.long))
    seen_at = []  # from the head's first call, with which the first step begins, to the last step's end
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: seen_at.append(len(Reads.seen)))
    room(model, "backbone_gircse").decoder_of(model.language_model).register_forward_hook(
        lambda *_: seen_at.append(len(Reads.seen)) if seen_at else None
    )
    with torch.no_grad(), Reads():
        model(ids, mask, k=5)
        assert len(seen_at) == 10 and len(set(seen_at)) == 1
        count = len(Reads.seen)
        assert bool(mask.any()) and len(Reads.seen) == count + 1  # the counter does count


def test_cache_grows_by_one_position_a_step(make_model, batch):
    model = make_model()
    seen = []

    def after(module, args, kwargs, output):
        (cache,) = (value for value in kwargs.values() if isinstance(value, Cache))
        seen.append((cache, cache.get_seq_length()))

    room(model, "backbone_gircse").decoder_of(model.language_model).register_forward_hook(after, with_kwargs=True)
    model.generate_embedding(*batch, k=4)
    assert [length for _, length in seen] == [11, 12, 13, 14, 15]
    assert all(cache is seen[0][0] for cache, _ in seen)


def test_five_hundred_calls_leave_nothing_behind(make_model):
    model = make_model(text_changes={"num_hidden_layers": 1})

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    counts = []
    for call in range(501):
        length = 9 + call % 5
        ids = torch.arange(2 * length).reshape(2, length)
        model.generate_embedding(ids, k=2 + call % 3)
        if call % 250 == 0:
            counts.append(tensors())
    assert counts[0] == counts[1] == counts[2]


def test_texts_that_have_settled_run_no_further_steps(make_model, batch):
    model = make_model()
    embeds = decoder_calls(model, "inputs_embeds")
    _, steps = model.generate_embedding(*batch, k=12, tolerance=3e-2)
    rows = [len(x) for x in embeds[1:]]
    assert len(set(steps.tolist())) > 1
    assert rows == [int((steps >= step).sum()) for step in range(1, int(steps.max()) + 1)]


# Static cache


@pytest.fixture
def static(gircse):
    """Skips where transformers has no static cache that counts its own tokens."""
    if not room(gircse.GircseModel, "static_steps_gircse").static_caches_count():
        assert Version(transformers.__version__) < Version("5.23")
        pytest.skip("this transformers is too old for static steps")


@pytest.fixture
def uncompiled(static):
    """The static step as it is, without the seconds that compiling takes."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "backbone", ["qwen2", "qwen2-tied", "llama", "gpt2", "phi3", "cohere", "granite", "opt", "mistral"]
)
def test_static_steps_equal_dynamic_ones(make_model, batch, uncompiled, backbone, attn_implementation):
    changes = {"sliding_window": 64} if backbone == "mistral" else {}
    model = make_model(backbone, attn_implementation=attn_implementation, text_changes=changes)
    expected = model.generate_embedding(*batch, k=4, return_steps=True)
    found = model.generate_embedding(*batch, k=4, return_steps=True, cache_implementation="static")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_static_steps_equal_dynamic_ones_and_compile_once_a_shape(make_model, batch, static):
    from torch._dynamo.testing import CompileCounter  # which takes a second to import

    model = make_model()
    torch._dynamo.reset()
    counted = CompileCounter()
    for ids, mask, k in ((*batch, 5), (batch[0][:, :7], batch[1][:, :7], 9)):  # one shape, to the cache and the step
        expected = model.generate_embedding(ids, mask, k=k)
        found = model.generate_embedding(ids, mask, k=k, cache_implementation="static")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    module = room(model, "static_steps_gircse")
    torch._dynamo.reset()
    step = torch.compile(module.one_step, backend=counted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compiled_step", lambda device: step)
        for _ in range(3):
            model.generate_embedding(*batch, k=5, cache_implementation="static")
    assert counted.frame_count == 1


def test_static_cache_is_kept_for_its_shape_and_not_with_the_weights(make_model, batch, uncompiled):
    model = make_model()
    kept = room(model, "static_steps_gircse").kept_caches()
    first = model.generate_embedding(*batch, k=4, cache_implementation="static")
    cache = kept[model][1]
    model.generate_embedding(batch[0].flip(0), batch[1].flip(0), k=6, cache_implementation="static")
    assert kept[model][1] is cache  # 64 positions hold both
    again = model.generate_embedding(*batch, k=4, cache_implementation="static")
    torch.testing.assert_close(again, first)  # nothing is left of the call between
    model.generate_embedding(batch[0][:2], batch[1][:2], k=4, cache_implementation="static")
    assert kept[model][1] is not cache
    assert copy.deepcopy(model) not in kept and pickle.dumps(model)
    count = len(kept)
    del model
    gc.collect()
    assert len(kept) == count - 1


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="its static cache has one dtype")
def test_static_cache_fits_one_dtype_of_keys_and_values(make_model, batch, uncompiled):
    model = make_model()
    first = model.generate_embedding(*batch, k=4, cache_implementation="static")
    with torch.autocast("cpu", torch.bfloat16):  # values are not of the weights' dtype
        half = model.generate_embedding(*batch, k=4, cache_implementation="static")
    torch.testing.assert_close(half, first, rtol=0.1, atol=0.02)


def test_static_steps_of_several_threads_are_their_own(make_model, batch, uncompiled):
    model = make_model()
    calls = [(batch[0].roll(shift, 1), batch[1]) for shift in range(12)]
    expected = [model.generate_embedding(*call, k=4) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda call: model.generate_embedding(*call, k=4, cache_implementation="static"), calls))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_static_cache_of_inference_mode_is_not_written_to_outside_of_it(make_model, batch, uncompiled):
    model = make_model()
    with torch.inference_mode():
        first = model.generate_embedding(*batch, k=4, cache_implementation="static")
    second = model.generate_embedding(*batch, k=4, cache_implementation="static")
    torch.testing.assert_close(second, first)


def test_static_steps_are_refused_where_they_cannot_be(make_model, gircse, batch):
    with pytest.raises(ValueError, match="cache_implementation='paged' is unknown"):
        make_model().generate_embedding(*batch, k=2, cache_implementation="paged")
    with pytest.raises(ValueError, match="tolerance=0.1"):
        make_model().generate_embedding(*batch, k=2, tolerance=0.1, cache_implementation="static")
    with pytest.raises(ValueError, match="step_token='learned' has no loop"):
        make_model(step_token="learned").generate_embedding(*batch, k=2, cache_implementation="static")
    for backbone, window in (("mistral", "sliding_window"), ("gpt_neo", "window_size")):
        model = make_model(backbone, text_changes={window: 63})
        supported = room(model, "static_steps_gircse").static_caches_count()
        remedy = "sliding window" if supported else "update transformers"
        with pytest.raises(ValueError, match=remedy):
            model.generate_embedding(*batch, k=2, cache_implementation="static")  # 64 positions hold 11 + 2 tokens
    empty = torch.zeros(0, 5, dtype=torch.long)
    assert make_model().generate_embedding(empty, k=2, cache_implementation="static").shape == (0, 32)

"""Each value of the loss against numbers worked out by hand or by the plain formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gircse.training.losses import candidate_mask, icr_loss, refinement_penalty, stepwise_info_nce

# Two queries, their two positives and one hard negative, one step, all of unit length: cosines can be read off.
QUERIES = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
DOCUMENTS = torch.tensor([[[1.0, 0.0]], [[0.0, -1.0]], [[0.6, 0.8]]])


def test_info_nce_by_hand():
    # Query 1: cosines 1, 0, 0.6 with the first the positive; query 2: 0, -1, 0.8 with the second; tau = 1.
    first = -math.log(math.exp(1) / (math.exp(1) + math.exp(0) + math.exp(0.6)))
    second = -math.log(math.exp(-1) / (math.exp(0) + math.exp(-1) + math.exp(0.8)))
    loss = stepwise_info_nce(QUERIES, DOCUMENTS, None, temperature=1.0)
    assert loss.tolist() == pytest.approx([(first + second) / 2])
    # Norms don't matter: it is the cosine.
    torch.testing.assert_close(stepwise_info_nce(3 * QUERIES, 0.1 * DOCUMENTS, None, 1.0), loss)


def test_temperature_divides_the_cosine():
    sharp = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + 1 + math.exp(0.6 / 0.5)))
    loss = stepwise_info_nce(QUERIES[:1], DOCUMENTS, None, temperature=0.5)
    assert loss.tolist() == pytest.approx([sharp])


def test_each_step_has_its_own_loss():
    torch.manual_seed(0)
    queries, documents = torch.randn(4, 3, 8), torch.randn(9, 3, 8)
    together = stepwise_info_nce(queries, documents, None, 0.1)
    for k in range(3):
        alone = stepwise_info_nce(queries[:, k : k + 1], documents[:, k : k + 1], None, 0.1)
        torch.testing.assert_close(together[k : k + 1], alone)


def test_a_masked_document_is_no_candidate():
    candidates = torch.tensor([[True, True, False], [True, True, True]])
    masked = stepwise_info_nce(QUERIES, DOCUMENTS, candidates, 1.0)
    first = -math.log(math.exp(1) / (math.exp(1) + math.exp(0)))
    second = -math.log(math.exp(-1) / (math.exp(0) + math.exp(-1) + math.exp(0.8)))
    assert masked.tolist() == pytest.approx([(first + second) / 2])


def candidates(document_ids: Tensor, positive_ids: Tensor, **others: Tensor) -> list[list[bool]]:
    """The mask of a batch without labels, each row a query of its own, unless said."""
    unlabelled = {"document_labels": document_ids, "prompted_ids": document_ids, "query_labels": positive_ids[:, 0]}
    batch = {name: torch.full_like(like, -1) for name, like in unlabelled.items()}
    batch |= {"document_ids": document_ids, "positive_ids": positive_ids, "query_ids": torch.arange(len(positive_ids))}
    return candidate_mask(batch | others).tolist()


def test_candidate_mask():
    # Texts 10, 11, 12 are the positives; documents 3..5 are hard negatives: the text of query 0's positive again, a
    # second right answer of query 1, and a real negative.
    documents = torch.tensor([10, 11, 12, 10, 21, 30])
    positives = torch.tensor([[10, -1], [11, 21], [12, -1]])
    assert candidates(documents, positives) == [
        [True, True, True, False, True, True],
        [True, True, True, True, False, True],
        [True, True, True, True, True, True],
    ]


def test_candidate_mask_by_label():
    documents, positives = torch.arange(5), torch.arange(3)[:, None]
    query_labels = torch.tensor([7, 8, 7])
    document_labels = torch.tensor([7, 8, 7, -1, 8])
    assert candidates(documents, positives, document_labels=document_labels, query_labels=query_labels) == [
        [True, True, False, True, True],
        [True, True, True, True, False],
        [False, True, True, True, True],
    ]
    assert candidates(documents, positives) == [[True] * 5] * 3


def test_two_queries_with_the_same_positive_do_not_repel_each_other():
    assert candidates(torch.tensor([10, 10]), torch.tensor([[10], [10]])) == [[True, False], [False, True]]


def test_a_positive_in_one_row_is_no_negative_in_another_row_of_the_same_query():
    # Rows 0 and 2 are one query with two answers; the last document is a hard negative with the text of the second.
    documents, positives, queries = torch.tensor([10, 11, 12, 12]), torch.tensor([[10], [11], [12]]), [5, 6, 5]
    assert candidates(documents, positives, query_ids=torch.tensor(queries)) == [
        [True, True, False, False],
        [True, True, True, True],
        [False, True, True, False],
    ]


def test_a_document_that_is_the_query_itself_is_no_candidate():
    # Queries 7 and 8 under their prompts; document 0 is query 8, document 1, the positive of query 8, is that query
    # too, and the hard negatives are query 7, neither, and, in another process' padding, nothing.
    prompted, queries = torch.tensor([8, 8, 7, 9, -1]), torch.tensor([7, 8])
    documents, positives = torch.tensor([10, 11, 12, 13, -1]), torch.tensor([[10], [11]])
    assert candidates(documents, positives, query_ids=queries, prompted_ids=prompted) == [
        [True, True, False, True, True],
        [False, True, True, True, True],
    ]


def test_padding_ids_match_nothing():
    assert candidates(torch.tensor([10, -1]), torch.tensor([[10, -1]])) == [[True, True]]


def test_refinement_penalty_by_hand():
    # Steps 1 -> 2 worsens by log 2, 2 -> 3 improves, 3 -> 4 worsens by log 3; mean over K - 1 = 3.
    steps = torch.tensor([0.5, 1.0, 0.2, 0.6])
    assert refinement_penalty(steps).item() == pytest.approx((math.log(2) + math.log(3)) / 3)
    assert refinement_penalty(torch.tensor([3.0, 2.0, 1.0])).item() == 0
    assert refinement_penalty(torch.tensor([3.0])).item() == 0


def test_refinement_penalty_is_finite_at_zero_loss():
    steps = torch.tensor([0.0, 0.0, 1e-3], requires_grad=True)
    penalty = refinement_penalty(steps)
    penalty.backward()
    assert torch.isfinite(penalty) and torch.isfinite(steps.grad).all()


@pytest.mark.parametrize("reduction, weight", [("sum", 1.0), ("mean", 1.0), ("sum", 0.25), ("mean", 0.0)])
def test_total(reduction, weight):
    torch.manual_seed(3)
    queries, documents = torch.randn(4, 3, 8), torch.randn(9, 3, 8)
    loss = icr_loss(queries, documents, temperature=0.3, refinement_weight=weight, reduction=reduction)
    steps = [float(x) for x in stepwise_info_nce(queries, documents, None, 0.3)]
    contrastive = sum(steps) / (1 if reduction == "sum" else 3)
    penalty = sum(max(math.log(b / a), 0) for a, b in zip(steps, steps[1:], strict=False)) / 2
    assert penalty > 0
    assert loss.steps.tolist() == pytest.approx(steps)
    assert loss.contrastive.item() == pytest.approx(contrastive)
    assert loss.refinement.item() == pytest.approx(penalty)
    assert loss.total.item() == pytest.approx(contrastive + weight * penalty, rel=1e-5)


def test_matryoshka_adds_the_loss_of_the_leading_dimensions():
    torch.manual_seed(2)
    queries, documents = torch.randn(4, 2, 8), torch.randn(9, 2, 8)
    full = icr_loss(queries, documents)
    part = icr_loss(queries[..., :3], documents[..., :3])
    both = icr_loss(queries, documents, dims=(3,))
    torch.testing.assert_close(both.total, full.total + part.total)
    torch.testing.assert_close(both.steps, full.steps)


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(3)
    queries, documents = torch.randn(2, 2, 8).bfloat16(), torch.randn(2, 2, 8).bfloat16()
    losses = stepwise_info_nce(queries, documents, None, 0.02)
    torch.testing.assert_close(losses, stepwise_info_nce(queries.float(), documents.float(), None, 0.02))
    assert stepwise_info_nce(queries.double(), documents.double(), None, 0.02).dtype == torch.float64


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"M >= B"):
        stepwise_info_nce(QUERIES, DOCUMENTS[:1], None, 1.0)
    with pytest.raises(ValueError, match="temperature=0"):
        stepwise_info_nce(QUERIES, DOCUMENTS, None, 0)
    with pytest.raises(ValueError, match="reduction='max' is unknown; choose one of 'sum', 'mean'"):
        icr_loss(QUERIES, DOCUMENTS, reduction="max")
    with pytest.raises(ValueError, match=r"dims=\(2,\)"):
        icr_loss(QUERIES, DOCUMENTS, dims=(2,))

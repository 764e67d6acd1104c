"""Which columns are the pair: those of published data sets, those that are named, and what is said of the others."""

from __future__ import annotations

import datasets
import pytest

from gircse.training.pairs import describe, load_pairs, parse_columns
from helpers import write_rows
from training_helpers import PAIR

pytestmark = pytest.mark.usefixtures("own_cache")

PUBLISHED = [  # of sentence-transformers/...
    ("anchor", "positive"),  # all-nli (pair, triplet), quora-duplicates, specter
    ("query", "positive"),  # msmarco-...
    ("question", "answer"),  # gooaq, squad, eli5
    ("query", "answer"),  # natural-questions, trivia-qa, amazon-qa, paq
    ("title", "answer"),  # yahoo-answers, each pair of three columns
    ("title", "question"),
    ("title", "abstract"),  # s2orc
    ("title", "citation"),
    ("abstract", "citation"),
    ("title", "body"),  # npr
    ("title", "article"),  # ccnews
    ("title", "description"),  # agnews
    ("title", "review"),  # amazon-reviews
    ("text", "simplified"),  # altlex, simple-wiki, sentence-compression
    ("text", "summary"),  # wikihow
    ("article", "summary"),  # xsum
    ("comment", "code"),  # codesearchnet
    ("english", "non_english"),  # parallel-sentences-...
    ("caption1", "caption2"),  # coco-captions, flickr30k-captions
    ("title1", "title2"),  # stackexchange-duplicates
    ("body1", "body2"),
    ("post1", "post2"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
]


@pytest.mark.parametrize("query, positive", PUBLISHED)
def test_columns_of_published_data_sets(tmp_path, query, positive):
    """Alone, with negatives as `mine_hard_negatives` adds them, and in the order of the pair, not of the columns."""
    rows = [
        {query: "q", positive: "p", "id": 7},
        {positive: ["p1", "p2"], query: "q", "negative": "n"},
        {query: "q", positive: "p", "negative_1": "n1", "negative_2": "n2"},
        {query: "q", positive: "p", "negatives": ["n1", "n2"]},
    ]
    pairs = load_pairs(write_rows(tmp_path / "x.jsonl", rows))
    assert set(pairs["query"]) == {"q"} and pairs["pos"][:] == [["p"], ["p1", "p2"], ["p"], ["p"]]
    assert pairs["neg"][:] == [[], ["n"], ["n1", "n2"], ["n1", "n2"]]


def test_columns_that_are_null_are_not_there(tmp_path):
    """As in a Parquet file or a Hub data set that was put together from several."""
    rows = [{"anchor": "a", "positive": "p"}, {"question": "q", "answer": "p"}, {"query": "x", "pos": ["p"]}]
    datasets.Dataset.from_list([dict.fromkeys(r for row in rows for r in row) | row for row in rows]).to_parquet(
        tmp_path / "x.parquet"
    )
    assert load_pairs(str(tmp_path / "x.parquet"))["query"][:] == ["a", "q", "x"]


@pytest.mark.parametrize("judgement", ["label", "labels", "score", "is_duplicate", "similarity_score", "gold_label"])
@pytest.mark.parametrize("query, positive", [("sentence1", "sentence2"), ("question", "answer")])
def test_rows_that_a_label_may_make_a_non_pair_are_refused(tmp_path, query, positive, judgement):
    path = write_rows(tmp_path / "x.jsonl", [{query: "q", positive: "p", judgement: 0}])
    remedy = (
        f"'{judgement}' may say that '{positive}' is no positive of '{query}': keep only .* by --columns query={query}"
    )
    with pytest.raises(ValueError, match=rf"x\.jsonl:1: {remedy} pos={positive}$"):
        load_pairs(path)
    pairs = load_pairs(path, columns={"query": query, "pos": positive})
    assert (pairs["query"][0], pairs["pos"][0], pairs["label"][0]) == ("q", ["p"], None)  # 0 is no class of texts
    null = write_rows(tmp_path / "null.jsonl", [{query: "q", positive: "p", judgement: None}])
    assert load_pairs(null)["query"][:] == ["q"]


def test_one_label_for_all_leaves_no_negatives(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i}", "label": 1} for i in range(3)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    with pytest.raises(ValueError, match="label is '1' in all 3 rows, and there are no hard negatives"):
        load_pairs(path)
    assert load_pairs(path, columns=parse_columns(["query=query", "pos=positive"]))["label"][:] == [None] * 3
    path = write_rows(tmp_path / "y.jsonl", [{**row, "negative": "n"} for row in rows])
    assert load_pairs(path)["label"][:] == ["1"] * 3


def test_whole_numbers_are_labels_and_sources_also_as_pandas_writes_them(tmp_path):
    rows = [{"anchor": f"q{i}", "positive": f"p{i}", "label": 2.0 + i, "source": i} for i in range(2)]
    pairs = load_pairs(write_rows(tmp_path / "a.jsonl", rows))
    assert (pairs["label"][:], pairs["source"][:]) == (["2", "3"], ["0", "1"])
    with pytest.raises(ValueError, match="field 'label' must be text, not 2.5"):
        load_pairs(write_rows(tmp_path / "b.jsonl", [{"anchor": "q", "positive": "p", "label": 2.5}]))


def test_a_positive_that_is_its_query_is_warned_of(tmp_path, caplog):
    path = write_rows(tmp_path / "a.jsonl", [{"query": f"q{i}", "pos": "yes"} for i in range(3)])
    load_pairs(path)
    assert "is its query" not in caplog.text
    load_pairs(path, columns={"query": "query", "pos": "query"})
    assert "the positive of each of the first 3 rows is its query" in caplog.text


@pytest.mark.parametrize(("labels", "warns"), [((0, 1, 1), True), ((0, 1, 2), False), (("no", "yes", "no"), False)])
def test_labels_that_may_say_whether_a_pair_is_one_are_warned_of(tmp_path, caplog, labels, warns):
    rows = [{"anchor": f"q{i}", "positive": f"p{i}", "label": label} for i, label in enumerate(labels)]
    assert load_pairs(write_rows(tmp_path / "a.jsonl", rows))["label"][:] == [str(label) for label in labels]
    assert ("label is 0 or 1, and taken for the class of a query: all rows are pairs" in caplog.text) == warns


def test_columns_with_several_pairs_are_refused(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"title": "t", "question": "q", "answer": "a"}])
    with pytest.raises(
        ValueError, match=r"x\.jsonl:1: several .* --columns query=question pos=answer, or --columns query=t"
    ):
        load_pairs(path)
    pairs = load_pairs(path, columns={"query": "title", "pos": "answer"})
    assert (pairs["query"][0], pairs["pos"][0]) == ("t", ["a"])


def test_columns_are_named_by_an_argument(tmp_path):
    row = {
        "prompt": "q",
        "good": "p1",
        "better": ["p2"],
        "hard_1": "n1",
        "hard_2": None,
        "neg": "not this",
        "task": "do",
    }
    row |= {"kind": "c", "from": "s", "both": True, "query": "nor this", "label": "nor this"}
    words = "query=prompt pos=good,better neg=hard_1,hard_2 instruction=task source=from symmetric=both".split()
    path = write_rows(tmp_path / "x.jsonl", [row])
    expected = {
        "query": "q",
        "pos": ["p1", "p2"],
        "neg": ["n1"],
        "instruction": "do",
        "source": "s",
        "symmetric": True,
        "label": None,
    }
    assert list(load_pairs(path, columns=parse_columns(words))) == [expected]
    assert list(load_pairs(path, columns=parse_columns([*words, "label=kind"]))) == [expected | {"label": "c"}]
    without_task = load_pairs(path, columns={"query": "prompt", "pos": "good", "neg": ["hard_1"]})
    assert without_task["instruction"][0] == ""  # a column that has been given another meaning has lost its own


def test_columns_may_name_a_part(tmp_path):
    rows = [{"question": "q", "positive": "p", "task": "do", "label": "c"}]
    pairs = load_pairs(write_rows(tmp_path / "x.jsonl", rows), columns={"query": "question"})
    assert (pairs["query"][0], pairs["pos"][0], pairs["instruction"][0]) == ("q", ["p"], "")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: field 'pos' is missing or empty"):  # not the usual pair then
        load_pairs(
            write_rows(tmp_path / "x.jsonl", [{"title": "t", "question": "q", "body": "b"}]), columns={"query": "title"}
        )
    rows = [{**PAIR, "task": "do", "label": "c"}]
    pairs = load_pairs(write_rows(tmp_path / "x.jsonl", rows), columns={"instruction": "task"})
    assert (pairs["query"][0], pairs["instruction"][0], pairs["label"][0]) == ("q", "do", "c")


def test_wrong_columns(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"question": "q", "answer": "p"}])
    for columns, error in (
        (
            {"question": "query"},
            "columns: 'question' is none of query, pos, neg, .*; give ours=theirs, as query=question",
        ),
        (
            {"query": ["question", "answer"]},
            r"columns: 'query' is one column, not \['question', 'answer'\]; only pos and",
        ),
        ({"neg": []}, r"columns: 'neg' is one column, not \[\]"),
        ({"query": "qestion"}, r"x.jsonl:1: field 'qestion' is missing .*this one has 'question', 'answer'"),
        ({"instruction": "task"}, r"columns: no row of .*x.jsonl has \['task'\]; there are \['answer', 'question'\]"),
    ):
        with pytest.raises(ValueError, match=error):
            load_pairs(path, columns=columns)
    for words, wrong in (
        (["query"], "query"),
        (["query="], "query="),
        (["neg=a,,b"], ""),
        (["query=a", "query=b"], "query=b"),
        (["qery=a,pos=b"], "qery=a"),
        (["query=a", "positive=b"], "positive=b"),
    ):
        with pytest.raises(ValueError, match=f"columns: '{wrong}' must be ours=theirs, with each of ours once"):
            parse_columns(words)
    assert parse_columns(["query=question,pos=answer"]) == {"query": ["question"], "pos": ["answer"]}
    assert parse_columns(["query=a b", "pos=c=d", "neg=e,f"]) == {"query": ["a b"], "pos": ["c=d"], "neg": ["e", "f"]}


NAMES = "neg negs negatives negative_1 negative1 neg_2 hard_neg hard_negatives hard_negative_1".split()


@pytest.mark.parametrize("name", NAMES)
def test_negatives_under_any_usual_name(tmp_path, caplog, name):
    pairs = load_pairs(write_rows(tmp_path / "x.jsonl", [{"query": "q", "pos": "p", name: ["n1", "n2"]}]))
    assert pairs["neg"][:] == [["n1", "n2"]] and not caplog.records


@pytest.mark.parametrize("max_bad_share", [None, 0.5])
def test_columns_that_are_not_used_are_named(tmp_path, caplog, max_bad_share):
    """Each once, also when the rows come from the cache; not those that hold nothing."""
    rows = [
        {"query": "q", "pos": "p", "neg_scores": [0.5], "empty": None, "prompt": ""},
        {"query": "q2", "pos": "p2", "neg_scores": [0.5], "task": "Find it.", "none": []},
    ]
    path = write_rows(tmp_path / "x.jsonl", rows)
    for _ in range(2):
        caplog.clear()
        load_pairs(path, max_bad_share=max_bad_share)
        (record,) = caplog.records
        assert "x.jsonl: not used: 'neg_scores', 'task'; what belongs to a pair" in record.getMessage()
    caplog.clear()
    load_pairs(path, columns={"instruction": "task"})
    assert "not used: 'neg_scores';" in caplog.text
    caplog.clear()
    load_pairs(path, columns={"query": "task", "pos": "query"}, max_bad_share=0.5)
    assert "left out 1 of 2 rows" in caplog.text and "not used: 'neg_scores', 'pos';" in caplog.text


def test_what_was_read_in_one_line(tmp_path):
    rows = [{**PAIR, "neg": ["a", "b", "c"], "instruction": "do", "source": "s"}, PAIR, {"query": "no positive"}]
    path = write_rows(tmp_path / "x.jsonl", rows)
    pairs = load_pairs(path, max_bad_share=0.5)
    assert describe(pairs) == "2 pairs from 2 sources: 50% have an instruction; 1.5 hard negatives a pair"
    expected = "1 pairs from 1 source: 0% have an instruction; 0.0 hard negatives a pair"
    assert describe(pairs.select([1])) == expected

"""Several datasets: how they are named and weighted, and what share of a sample each has."""

import json
from collections import Counter

import pytest

from gaudi_calib.data.mixture import count_in_proportion, parse_datasets, take_turns
from gaudi_calib.data.prompts import prepare_prompts
from gaudi_calib.errors import DataError, UsageError


@pytest.fixture
def prepare(tmp_path):
    """Return a call that prepares datasets `a`, `b`, ... of the given sizes; all ids of one are its number."""
    (tmp_path / "model").mkdir()

    def call(sizes, weights=None, **options):
        names = []
        for number, size in enumerate(sizes):
            path = tmp_path / f"{'abcd'[number]}.jsonl"
            ids = [[number, row] for row in range(size)]
            path.write_text("".join(json.dumps({"prompt_token_ids": each}) + "\n" for each in ids))
            names.append(f"{path}={weights[number]}" if weights else str(path))
        return prepare_prompts(str(tmp_path / "model"), names, **options)

    return call


def shares(prompts) -> list[int]:
    """How many prompts each dataset gave, in order."""
    counts = Counter(ids[0] for ids in prompts.token_ids)
    return [counts[number] for number in range(len(prompts.parts))]


def test_all_rows_of_both(prepare):
    """Without a limit and without weights, every row of the first and then every row of the second."""
    prompts = prepare([2, 3])
    assert prompts.token_ids == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]
    assert prompts.rows == 5


@pytest.mark.parametrize(
    ("sizes", "weights", "limit", "expected"),
    [
        ([90, 10], None, 10, [9, 1]),
        ([90, 10], None, 50, [45, 5]),
        ([10, 10, 20], None, 8, [2, 2, 4]),
        ([3, 3], None, 100, [3, 3]),
        ([50, 50], [3, 1], 8, [6, 2]),
        ([50, 50], ["0.5", "1.5"], 8, [2, 6]),
        ([100, 2], [3, 1], None, [6, 2]),
        ([10, 100], [3, 1], None, [10, 3]),
        ([100, 2], [3, 1], 50, [6, 2]),
        ([9, 9], [1, 1], None, [9, 9]),
        ([3, 3], [1, 2], None, [1, 3]),
    ],
    ids=str,
)
def test_shares(prepare, sizes, weights, limit, expected):
    """A sample takes of each in proportion to its rows or its weight; weights keep theirs as far as rows last."""
    assert shares(prepare(sizes, weights, limit=limit)) == expected


def test_a_smaller_sample_is_the_head_of_a_larger_one(prepare):
    """Of several datasets as of one: the order depends on the seed alone."""
    for weights in (None, [2, 5]):
        large = prepare([40, 30], weights, limit=40, seed=7)
        assert prepare([40, 30], weights, limit=11, seed=7).token_ids == large.token_ids[:11]
        assert prepare([40, 30], weights, limit=40, seed=7).sha256 == large.sha256
        assert prepare([40, 30], weights, limit=40, seed=8).sha256 != large.sha256


def test_the_sample_of_one_does_not_depend_on_the_others(prepare):
    """Each dataset is shuffled by itself."""
    alone = prepare([40], limit=10).token_ids
    beside = [ids for ids in prepare([40, 40], limit=20).token_ids if ids[0] == 0]
    assert beside == alone


def test_the_summary_says_what_each_gave(prepare):
    """Totals are those of all, and each dataset has its own counts and weight; one alone has the totals only."""
    summary = prepare([4, 6], [1, 3], max_tokens=1, limit=4).summary()
    assert (summary["prompts"], summary["tokens"], summary["truncated"]) == (4, 4, 4)
    assert [(part["dataset"][-9:], part["rows"], part["prompts"]) for part in summary["parts"]] == [
        ("a.jsonl=1", 4, 1),
        ("b.jsonl=3", 6, 3),
    ]
    assert "parts" not in prepare([4]).summary()


def test_a_dataset_that_gives_nothing_is_warned_of(prepare, caplog):
    """A sample too small for all datasets says which is not in it."""
    assert shares(prepare([4, 4], limit=1)) == [1, 0]
    assert "b.jsonl: none of the 1 prompts is of this dataset" in caplog.text


def test_too_short_prompts_end_a_weighted_sample(prepare):
    """Where no qualifying row is left, weights end the sample, and sizes let the others go on."""
    with pytest.raises(DataError, match="no prompt is left") as caught:
        prepare([5, 5], [1, 1], min_tokens=3)
    assert "a.jsonl=1, " in caught.value.where and caught.value.where.endswith("b.jsonl=1")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("builtin", ["builtin"]),
        (["builtin=2"], ["builtin"]),
        (["a.jsonl=3", "b.jsonl=0.25"], ["a.jsonl=3", "b.jsonl=0.25"]),
        (["ORG/NAME:en=2", "x=y.jsonl=1"], ["ORG/NAME:en=2", "x=y.jsonl=1"]),
        (["x=y/z.jsonl", "b"], ["x=y/z.jsonl", "b"]),
    ],
    ids=str,
)
def test_names_and_weights(given, expected):
    """What follows the last = is a weight, unless a path goes on there; one dataset alone has none."""
    assert [str(dataset) for dataset in parse_datasets(given)] == expected


def test_a_path_that_exists_is_a_path(tmp_path, monkeypatch):
    """A name with = in it is the file of that name, where there is one, also below the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl=3", "lr=0.1"):
        (tmp_path / name).mkdir()
    assert [str(each) for each in parse_datasets(["a.jsonl=3", "~/lr=0.1"])] == ["a.jsonl=3", "~/lr=0.1"]
    assert [str(each) for each in parse_datasets(["a.jsonl=3=2", "lr=0.1=5"])] == ["a.jsonl=3=2", "lr=0.1=5"]
    assert [each.weight for each in parse_datasets(["a.jsonl=3=2", "lr=0.1=5"])] == [2, 5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no dataset is given"),
        (["a=1", "b"], "dataset b has no weight"),
        (["a=0", "b=1"], "the weight of dataset a is '0'"),
        (["a=1", "b=-2"], "the weight of dataset b is '-2'"),
        (["a=nan", "b=1"], "the weight of dataset a is 'nan'"),
        (["a=1e400", "b=1"], "the weight of dataset a is '1e400'"),
        (["a=", "b=1"], "dataset a= has no weight"),
        (["a=99999999999999999999", "b=1"], "the weight of dataset a is"),
    ],
    ids=str,
)
def test_weights_that_are_none(given, message):
    """A weight is a number above 0, and all datasets have one or none has; the dataset is named."""
    with pytest.raises(UsageError) as caught:
        parse_datasets(given)
    assert message in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 1), (0.1, 0.7, 5), (1000, 1)], ids=str)
def test_every_head_is_in_proportion(weights):
    """After any number of turns each has its share, to within one for every other."""
    numbers = [iter([number] * 500) for number in range(len(weights))]
    order = list(take_turns(numbers, weights, keeps_proportion=True))
    for length in (1, 7, 50, len(order)):
        for number, weight in enumerate(weights):
            exact = length * weight / sum(weights)
            assert abs(order[:length].count(number) - exact) < len(weights)


def test_count_in_proportion():
    """One dataset gives all it has, the others what belongs to it."""
    assert count_in_proportion([5, 5], [1, 1]) == 10
    assert count_in_proportion([1, 1000], [1, 2.5]) == 3

"""How the processes of one launch share work, agree, and end together."""

import pytest

from stages.core.ranks import Ranks


@pytest.fixture(autouse=True)
def not_launched(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize(("num_ranks", "tensor_parallel"), [(1, 1), (3, 1), (4, 2), (8, 4), (6, 3)])
@pytest.mark.parametrize("num_items", [0, 1, 5, 64])
def test_engines_share_everything_evenly_and_one_rank_of_each_keeps_it(num_ranks, tensor_parallel, num_items):
    ranks = [Ranks(tensor_parallel, rank, num_ranks) for rank in range(num_ranks)]
    kept = [rank.share(range(num_items)) for rank in ranks if rank.keeps]
    assert sorted(item for share in kept for item in share) == list(range(num_items))
    assert len(kept) == ranks[0].num_engines == num_ranks // tensor_parallel
    assert max(map(len, kept)) - min(map(len, kept)) <= 1
    for rank in ranks:  # what is drawn by one engine is asked of all its ranks
        assert rank.share(range(num_items)) == kept[rank.engine]
    assert [rank.is_first for rank in ranks] == [True] + [False] * (num_ranks - 1)


def test_a_process_that_no_launcher_started_is_alone_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # a cluster's own variable, as in a pod
    monkeypatch.setenv("RANK", "3")
    ranks = Ranks()
    assert ranks.is_alone and ranks.is_first
    assert ranks.gather("mine") == ["mine"]
    assert ranks.together(lambda: 7) == ranks.on_first(lambda: 7) == 7
    ranks.refuse_differences({"a": "b"})


def test_a_launched_process_knows_its_place(monkeypatch):
    for name, value in {"LOCAL_RANK": "1", "RANK": "5", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    ranks = Ranks(tensor_parallel=2)
    assert (ranks.rank, ranks.num_ranks, ranks.engine, ranks.num_engines, ranks.keeps) == (5, 8, 2, 4, False)

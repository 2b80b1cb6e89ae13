"""What rl's requests draw their noise from: an engine core that records seeds, below the real engine and explorer."""

from pathlib import Path
from threading import Barrier, Thread, local
from types import SimpleNamespace

import pytest

from stages.core.drawing.engine import Sampling, VllmEngine
from stages.core.drawing.rollouts import Prompt
from stages.core.grading.verifier import Verifier
from stages.core.provenance import Identity, Inputs
from stages.core.ranks import Ranks
from stages.rl import Settings
from stages.rl.explorer import Explorer, StartPolicy
from stages.rl.rundir import RunDir
from stages.rl.trainer import UpdateStats

GROUP, NUM_PROBLEMS, PER_STEP = 3, 5, 4


class RecordingCore:
    """vLLM's engine below `VllmEngine`: every sample is "7", and (problem, sample, seed) of each is kept."""

    def __init__(self):
        self.prompted = []
        self.waiting = []

    def add_request(self, name, prompt, params):
        samples = range(params.n)
        self.prompted += [(prompt["prompt_token_ids"][0], sample, params.seed + sample) for sample in samples]
        outputs = [SimpleNamespace(index=i, token_ids=[7], logprobs=None, finish_reason="stop") for i in samples]
        self.waiting.append(SimpleNamespace(request_id=name, finished=True, outputs=outputs))

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def get_num_unfinished_requests(self):
        return len(self.waiting)

    def step(self):
        return [self.waiting.pop()]

    def abort_request(self, names):
        assert not names


class IdleTrainer:
    """Learns nothing."""

    token_budget = 0

    def weights(self):
        return ()

    def update(self, rollouts, lr, entropy_weight):
        return UpdateStats()

    def release(self):
        pass

    def load_state(self, path):
        assert path.is_dir()

    def save_state(self, path):
        path.mkdir(parents=True, exist_ok=True)

    save_checkpoint = save_state


class Meeting:
    """What accelerate does between the ranks of a run, here its threads."""

    def __init__(self, num_ranks):
        self.num_ranks = num_ranks
        self.barrier = Barrier(num_ranks, timeout=60)
        self.here = local()
        self.given = {}

    def exchange(self, value):
        """What every rank gave, in their order."""
        self.given[self.here.rank] = value
        self.barrier.wait()
        parts = [self.given[other] for other in range(self.num_ranks)]
        self.barrier.wait()
        return parts


class Follower(VllmEngine):
    """The engine on a rank that shares it with the one before, which keeps what is drawn."""

    keeps = False


def engine(keeps=True):
    kind = VllmEngine if keeps else Follower
    made = kind.__new__(kind)
    made._asleep = made.sleeps = False
    made._vocabulary = made._num_known = 9
    made._under_way = made.num_preemptions = None
    made.max_sequences = 2
    made.tokenizer = SimpleNamespace(batch_decode=lambda ids, **_: ["\\boxed{7}"] * len(ids))
    made.load = lambda weights: None
    made._llm = SimpleNamespace(llm_engine=RecordingCore(), reset_prefix_cache=lambda: True)
    return made


@pytest.fixture
def explore(tmp_path, monkeypatch):
    """Run `steps` steps on so many ranks; the (problem, sample, seed) that each rank drew."""

    def run(out="rl", num_ranks=1, steps=2, done=0, seed=0, origin="start", shared=1):
        meeting = Meeting(num_ranks)
        directory = RunDir(tmp_path / out)
        if not done:
            directory.begin(Identity("rl", {}, Inputs({}, {}), {}), False)
        monkeypatch.setattr(Ranks, "gather", lambda self, mine: meeting.exchange(mine))
        settings = Settings(steps=steps, problems_per_step=PER_STEP, group_size=GROUP, max_tokens=8, overlong_buffer=0,
                      max_rounds=1, save_every=1, seed=seed, tensor_parallel=shared)  # fmt: skip
        problems = [{"id": f"p{i}", "problem": "", "answer": "7", "source": ""} for i in range(NUM_PROBLEMS)]
        prompts = [Prompt(problem, "", [number]) for number, problem in enumerate(problems)]
        engines = [engine(keeps=rank % shared == 0) for rank in range(num_ranks)]

        def work(rank):
            meeting.here.rank = rank
            accelerator = SimpleNamespace(mixed_precision="no", log=lambda row, step: None)
            with Verifier() as verifier:
                explorer = Explorer(settings, Ranks(shared, rank, num_ranks), accelerator, engines[rank], verifier,
                                    IdleTrainer(), prompts, Sampling(GROUP, 8, log_probs=False),
                                    StartPolicy("start", Path(), origin))  # fmt: skip
                explorer.run(directory, done)

        threads = [Thread(target=work, args=(rank,)) for rank in range(num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [made._llm.llm_engine.prompted for made in engines]

    return run


def seeds(drawn):
    return {seed for _, _, seed in drawn}


@pytest.mark.slow
def test_every_sample_of_a_run_has_a_seed_of_its_own_though_a_problem_comes_again(explore):
    (drawn,) = explore()
    assert len({problem for problem, _, _ in drawn}) == NUM_PROBLEMS < 2 * PER_STEP
    assert len(drawn) == len(seeds(drawn)) == 2 * PER_STEP * GROUP


@pytest.mark.slow
def test_two_ranks_draw_what_one_draws_each_its_share(explore):
    (alone,) = explore("alone")
    first, second = explore("both", num_ranks=2)
    assert first and second and not seeds(first) & seeds(second)
    assert sorted(first + second) == sorted(alone)


def test_four_ranks_with_two_engines_draw_what_one_draws_each_pair_the_same(explore, tmp_path):
    (alone,) = explore("alone")
    first, second, third, fourth = explore("pairs", num_ranks=4, shared=2)
    assert first == second != third == fourth
    assert sorted(first + third) == sorted(alone)
    files = sorted((tmp_path / "pairs/rollouts").iterdir())
    assert [file.read_bytes() for file in files] == [
        (tmp_path / "alone/rollouts" / file.name).read_bytes() for file in files
    ]


def test_another_seed_and_another_start_policy_draw_other_noise(explore):
    runs = [explore("a"), explore("b", seed=1), explore("c", origin="the policy of the second iteration")]
    assert len(set().union(*(seeds(drawn) for (drawn,) in runs))) == 3 * 2 * PER_STEP * GROUP


def test_a_resumed_run_draws_the_noise_of_an_uninterrupted_one(explore):
    (whole,) = explore("whole")
    (before,) = explore("parts", steps=1)
    (after,) = explore("parts", done=1)
    assert before and after and before + after == whole

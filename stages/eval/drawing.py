"""What eval draws: the samples of each set at each temperature, and its greedy completions, group by group."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.drawing import sampling
from stages.core.drawing.engine import Engine
from stages.core.drawing.request import Request
from stages.core.drawing.rollouts import Group, Prompt
from stages.core.drawing.sampling import Engines, Meter, StartEngine
from stages.core.grading.scores import Grader
from stages.eval import partial
from stages.eval.partial import Groups, Keeper, Stems


class Drawing(NamedTuple):
    """What is drawn of every set by one `request`: the stems of its partial files, and what marks its rollouts.

    Of the first `num_scored` samples of each group the token ids are kept besides.
    """

    request: Request
    stems: Stems
    marks: dict[str, Any]
    num_scored: int = 0

    @property
    def temperature(self) -> float:
        return self.request.sampling.temperature


def samples(
    request: Request, digests: Mapping[str, str], temperatures: Sequence[float], num_scored: int
) -> list[Drawing]:
    """A Drawing for each temperature; `digests` are those of policies and problems, by path."""
    return [_at(request, digests, temperature, num_scored=num_scored) for temperature in temperatures]


def greedy(request: Request, digests: Mapping[str, str]) -> Drawing:
    """A completion at temperature 0 for each problem."""
    once = replace(request, sampling=replace(request.sampling, num_samples=1))
    return _at(once, digests, 0.0, "greedy-", {"greedy": True})


def _at(
    request: Request,
    digests: Mapping[str, str],
    temperature: float,
    prefix: str = "",
    marks: Mapping[str, Any] | None = None,
    num_scored: int = 0,
) -> Drawing:
    """Two names of one checkpoint share the stems of their files."""
    stems = {
        (name, policy): f"{prefix}t{temperature:g}-{digests[str(file)][:16]}-{digests[str(path)][:16]}"
        for name, file in request.files.items()
        for policy, path in request.policies.items()
    }
    at = replace(request, sampling=replace(request.sampling, temperature=temperature))
    return Drawing(at, stems, dict(marks or {}), num_scored)


def draw_missing(drawings: Sequence[Drawing], directory: Path, start_engine: StartEngine, bare: bool) -> None:
    """Draw what is not in `directory`, policy by policy; a policy that lacks nothing is not loaded."""
    request = drawings[0].request
    wanted = {stem: drawing.num_scored for drawing in drawings for stem in drawing.stems.values()}
    kept = request.ranks.on_first(lambda: {stem: partial.kept(directory, stem, num) for stem, num in wanted.items()})
    engines = Engines(request, start_engine)
    num_groups = len(request.prompts) * len(request.policies) * len(drawings)
    grading = request.rewards.grader(bare, has_scored=any(kept.values()))
    with grading as grader, Meter(num_groups, request.ranks) as meter:
        for name, path in request.policies.items():
            missing = [partial.missing(request, name, drawing.stems, kept) for drawing in drawings]
            if any(missing):
                engine = engines.holding(path)  # on every rank, whose share of a few may be nothing
            for drawing, own in zip(drawings, missing, strict=True):
                meter.start(name, len(own), len(request.prompts) - len(own))
                if own:
                    _draw(drawing, name, directory, request.ranks.share(own), engine, grader, meter)
    if any(wanted.values()):
        engines.close()  # two policies need its memory now


def _draw(
    drawing: Drawing,
    name: str,
    directory: Path,
    share: Sequence[tuple[str, Prompt]],
    engine: Engine,
    grader: Grader,
    meter: Meter,
) -> None:
    """Draw groups of one policy; each is kept as soon as it is scored."""
    request = drawing.request
    with ExitStack() as stack:
        keepers = {
            stem: stack.enter_context(Keeper(directory, stem, request.ranks.engine, drawing.num_scored))
            for stem in (dict(share) if request.ranks.keeps else ())
        }
        for part in sampling.parts(request, share):
            _draw_part(request, name, part, keepers, engine, grader, meter)


def _draw_part(
    request: Request,
    name: str,
    part: Sequence[tuple[str, Prompt]],
    keepers: Mapping[str, Keeper],
    engine: Engine,
    grader: Grader,
    meter: Meter,
) -> None:
    def keep(number: int, group: Group) -> None:
        if keepers:
            keepers[part[number][0]].add(group, name)

    prompts = [prompt for _, prompt in part]
    with request.ranks.raise_once():
        sampling.draw_scored(engine, grader, prompts, request.seeded(prompts), meter, keep)


def stored(drawing: Drawing, set_name: str, directory: Path) -> Iterator[Any]:
    """A set's rollouts, or Divergences, by policy, problem and sample, in the order of the request."""
    for name in drawing.request.policies:
        with Groups(directory, drawing.stems[set_name, name]) as groups:
            for prompt in drawing.request.sets[set_name]:
                for rollout in groups.get(prompt.problem["id"]):
                    own: Any = {**rollout, "policy": name}  # it may have been drawn under another name
                    yield own | drawing.marks

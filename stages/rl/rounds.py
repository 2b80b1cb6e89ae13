"""How many groups each round of dynamic sampling draws.

Only groups whose rewards differ, the informative ones, are trained on. A round lasts as long as its longest completion,
so a step that draws just what is missing, round after round, waits most of its time. With m groups missing and a share
a of them informative,

    m / a + MARGIN sqrt(m (1 - a)) / a

groups at once nearly always fill the batch: the number of informative ones among n has the variance n a (1 - a), which
is m (1 - a) at n = m / a. No engine here; `benchmarks/rounds.py` runs it over a model of time.
"""

import math
from dataclasses import dataclass, field

MARGIN = 2.5  # standard deviations
MEMORY = 256  # groups that all former steps count for: some six steps of 16 groups, hardly more than one of 512
MIN_SHARE = 0.01  # the least that is reckoned with: steps without any informative group would make it 0


@dataclass(frozen=True)
class Acceptance:
    """The running share of informative groups, from counts that fade; at first as if half of eight were informative.

    What large batches have told long ago is no better than noise beside what the last one tells.
    """

    num_informative: float = 4.0
    num_drawn: float = 8.0

    @property
    def share(self) -> float:
        return self.num_informative / self.num_drawn

    def faded(self) -> "Acceptance":
        """What counts of it in the next step: the same share, of at most MEMORY groups."""
        weight = min(1.0, MEMORY / self.num_drawn)
        return Acceptance(weight * self.num_informative, weight * self.num_drawn)

    def after(self, num_informative: int, num_drawn: int) -> "Acceptance":
        """With another round counted."""
        return Acceptance(self.num_informative + num_informative, self.num_drawn + num_drawn)


@dataclass
class Rounds:
    """The rounds of one step, to fill a batch of `batch_size` informative groups.

    All together draw at most `max_rounds` full batches: a set that teaches nothing costs no more than that.
    """

    batch_size: int
    max_rounds: int
    acceptance: Acceptance = field(default_factory=Acceptance)
    num_rounds: int = 0
    num_informative: int = 0
    num_drawn: int = 0

    @property
    def num_missing(self) -> int:
        """Informative groups that the batch still lacks."""
        return max(0, self.batch_size - self.num_informative)

    @property
    def num_wanted(self) -> int:
        """Groups that the next round draws; 0 if the batch is full, or the bound is reached."""
        if self.num_rounds == self.max_rounds:
            return 0
        share = max(MIN_SHARE, self.acceptance.share)
        spread = math.sqrt(self.num_missing * (1 - share))
        ahead = math.ceil((self.num_missing + MARGIN * spread) / share)
        return min(ahead, self.max_rounds * self.batch_size - self.num_drawn)

    def count(self, num_informative: int, num_drawn: int) -> None:
        """Count a round that was drawn."""
        self.num_rounds += 1
        self.num_informative += num_informative
        self.num_drawn += num_drawn
        self.acceptance = self.acceptance.after(num_informative, num_drawn)

"""What is no fault, and still makes results mean something else than they seem to."""

from collections.abc import Iterator, Sequence

from rloop_cli.check.calls import Call


def notes(calls: Sequence[Call]) -> Iterator[str]:
    """A line for prompts that differ between training and test, and for a baseline of more or fewer steps."""
    asking = [call for call in calls if call.stage in ("rl", "sample", "eval")]
    by_template = {call.options.template: call.stage for call in reversed(asking)}  # the first of each
    if len(by_template) > 1:
        used = ", ".join(f"{stage} uses {template}" for template, stage in reversed(by_template.items()))
        yield f"templates differ: {used}; a policy is tested by prompts that it was not trained on"
    runs = [call for call in calls if call.stage == "rl"]
    baseline = [call.options.steps for call in runs if call.name == "vanilla"]
    together = sum(call.options.steps for call in runs if call.name.startswith("rl@"))
    if baseline and together not in (0, baseline[0]):
        yield f"vanilla has {baseline[0]:,} steps, the iterations together {together:,}: no comparison at equal steps"

"""examples/loop.sh: the commands that it runs are those that the command line takes, each once, the start policy's."""

import os
import shlex
import subprocess
from pathlib import Path

from rloop_cli.check import graph

LOOP = Path(__file__).parents[1] / "examples/loop.sh"
STUB = """#!/usr/bin/env bash
printf '%s\\n' "${*@Q}" >> "$LOG"
while (($#)); do
  if [[ $1 == --out ]]; then mkdir -p "$(dirname "$2")" && echo made > "$2.made" && cp -r "$2.made" "$2"; fi
  shift
done
"""


def run(directory, *arguments, **options):
    """The commands of a run of the loop, words by words, with an `rloop` that only makes its output."""
    (directory / "rloop").write_text(STUB)
    (directory / "rloop").chmod(0o755)
    log = directory / "log"
    log.write_text("")
    environment = os.environ | {"PATH": f"{directory}:{os.environ['PATH']}", "LOG": str(log)} | options
    called = subprocess.run(
        ["bash", LOOP, *arguments], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    return called, [shlex.split(line) for line in log.read_text().splitlines()]


def test_the_loop_in_the_shell_fine_tunes_what_each_exploration_started_from_and_goes_on(tmp_path):
    called, calls = run(tmp_path, "base", "train.jsonl", "valid.jsonl", "my runs", "2")
    assert called.returncode == 0
    stages = [stage for stage, *_ in calls]
    assert stages == ["eval", *["rl", "filter", "rft", "eval"] * 2, "report"]
    read = []
    for stage, *words in calls:
        values, faults = graph.parse(stage, words)
        assert not faults, f"rloop {shlex.join([stage, *words])}"
        read.append(values)
    starts = [values.policy for stage, values in zip(stages, read, strict=True) if stage in ("rl", "rft")]
    assert starts == ["base", "base", "my runs/1/policy", "my runs/1/policy"]
    assert read[-2].policy == ["my runs/2/rl/checkpoints", "my runs/2/policy"]
    assert read[1].template == read[0].template == "boxed"

    _, again = run(tmp_path, "base", "train.jsonl", "valid.jsonl", "my runs", "3", RL="--steps 5")
    assert [stage for stage, *_ in again].count("rft") == 1, "what is there is not made again"
    assert graph.parse("rl", again[1][1:])[0].steps == 5


def test_the_loop_in_the_shell_ends_with_the_command_that_fails_and_says_what_it_takes(tmp_path):
    called, calls = run(tmp_path, "base", "train.jsonl", "valid.jsonl", "out", LAUNCH="false")
    assert (called.returncode, calls) == (1, [])
    called, calls = run(tmp_path, "base")
    assert (called.returncode, called.stderr) == (2, f"usage: bash {LOOP} POLICY TRAIN VALID OUT [ITERATIONS]\n")

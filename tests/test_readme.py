"""The README's commands do what it says."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages import STAGES, load
from stages.core.options import declared

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_smallest_run_of_ones_own_runs_as_it_is_printed(tmp_path, toy):
    commands = README.read_text().partition("The smallest run of your own")[2].split("```sh\n")[1].partition("```")[0]
    shutil.copytree(toy / "policy", tmp_path / "loop/0/policy")
    rloop = f'rloop() {{ {sys.executable} -m rloop_cli "$@"; }}\n'
    called = subprocess.run(["bash", "-ec", rloop + commands], cwd=tmp_path, capture_output=True, text=True)
    assert called.returncode == 0, called.stderr[-3000:]
    policies = json.loads((tmp_path / "mine/eval/metrics.json").read_text())["policies"]
    assert list(policies) == ["loop/0/policy", "mine/rl/checkpoints/step_000010"]
    assert {policy["num_problems"] for policy in policies.values()} == {5}


@pytest.mark.parametrize("page", [README, *sorted(README.parent.glob("docs/*.md"))], ids=lambda page: page.name)
def test_a_command_that_a_page_shows_has_the_options_that_it_gives(page):
    calls = re.findall(rf"\brloop ({'|'.join(STAGES)})\b((?:\\\n|[^`\n#])*)", page.read_text())
    for stage, words in calls:
        known = {option.flag for option in declared(load(stage).Options).values()}
        given = {word.partition("=")[0].replace("--no-", "--") for word in re.findall(r"(?<!\S)--[a-z][\w-]*", words)}
        assert given <= known | {"--debug", "--help"}, f"rloop {stage}{words}"

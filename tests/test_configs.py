"""Every key of every params file is an option of its stage, with a value that the option takes; the Slurm scripts."""

import math
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import typer
import yaml

from rloop_cli.app import app

ROOT = Path(__file__).parents[1]
PARAMS = [ROOT / "params.yaml", *sorted((ROOT / "configs").glob("*.yaml"))]
SECTIONS = {"rl": "rl", "vanilla": "rl", "filter": "filter", "rft": "rft", "merge": "merge", "eval": "eval",
            "valid": "eval", "tests": "eval", "analyze": "analyze", "report": "report"}  # fmt: skip
MAPS = {"toy": "toy", "prepare": "prepare", "prepare_train": "prepare"}
NO_STAGE = {"launch", "fetch", "iterations", "tuned", "merged"}


def held_against_options(stage, section):
    """Parse the section as the command line would, flags made of it as DVC makes them."""
    command = typer.main.get_command(app).commands[stage]
    arguments = []
    for key, value in section.items():
        for item in value if isinstance(value, list) else [value]:
            arguments += [f"--{'' if item else 'no-'}{key}"] if isinstance(item, bool) else [f"--{key}", str(item)]
    given = {argument.replace("_", "-") for argument in arguments if argument.startswith("--")}
    missing = [option for option in command.params if option.required and not given & set(option.opts)]
    for option in missing:
        arguments += [option.opts[0], "somewhere"]
    normalize = app.info.context_settings["token_normalize_func"]
    context = command.make_context(stage, arguments, token_normalize_func=normalize)
    for key, value in section.items():
        found = context.params.get(key, context.params.get(f"{key}_"))
        assert str(found) == str(value) if isinstance(value, str | bool) else found == value or isinstance(value, list)


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.name)
def test_every_key_is_an_option_of_its_stage(path):
    params = yaml.safe_load(path.read_text())
    assert set(params) == NO_STAGE | set(SECTIONS) | set(MAPS)
    for section, stage in SECTIONS.items():
        held_against_options(stage, params[section])
    for section, stage in MAPS.items():
        for item in params[section].values():
            held_against_options(stage, item)


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.name)
def test_the_iterations_are_chained_and_vanilla_has_as_many_steps(path):
    params = yaml.safe_load(path.read_text())
    starts = [params["iterations"][str(i + 1)]["start"] for i in range(len(params["iterations"]))]
    assert starts == [f"runs/{i}/policy" for i in range(len(starts))]
    assert params["tuned"] | params["merged"] == params["iterations"]
    assert params["vanilla"]["steps"] == params["rl"]["steps"] * len(starts)


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.name)
def test_rl_and_eval_ask_with_the_same_template_and_the_options_hold_together(path):
    from stages.rl import Options

    params = yaml.safe_load(path.read_text())
    Options(**params["rl"])
    assert params["rl"]["template"] == params["eval"]["template"]
    assert max(params["eval"]["k"]) <= params["eval"]["num_samples"]
    [problems] = params["valid"]["problems"]
    assert {params["analyze"]["set"], params["report"]["valid"], Path(problems).stem} == {Path(problems).stem}
    assert params["valid"]["select"] == f"pass@{max(params['eval']['k'])}", "as the report chooses checkpoints"


def test_the_paper_s_numbers_stand_in_the_paper_s_config():
    params = yaml.safe_load((ROOT / "configs/qwen2.5-math-7b.yaml").read_text())
    assert params["fetch"] == {"0": "Qwen/Qwen2.5-Math-7B"}
    assert (params["rl"]["group_size"], params["rl"]["max_tokens"], params["rl"]["steps"]) == (16, 2048, 200)
    assert len(params["iterations"]) == 3
    assert params["filter"]["max_pass_rate"] == 0.1
    assert params["eval"]["num_samples"] == 32
    assert {item["source"] for item in params["prepare"].values()} == {
        "aime-2024", "minerva-math", "omni-math", "math-500",
    }  # fmt: skip
    assert params["prepare_train"]["train"]["source"] == "dapo-17k"


SLURM = {  # Slurm's commands, and what its scripts start, as far as they are needed; `calls` holds what was asked
    "scontrol": '[ "$1" = show ] && printf "node-a\\nnode-b\\n" || echo "scontrol $*" >> calls',
    "scancel": 'echo "scancel $*" >> calls; kill -TERM "$(cat dvc.pid)"',
    "srun": 'echo "srun $1 $2" >> calls; while [ "$1" != bash ]; do shift; done\n'
    'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
    "accelerate": 'for word in "$@"; do echo "$word"; done > "accelerate.$SLURM_NODEID"',
    "dvc": 'trap "exit 255" TERM; echo $$ > dvc.pid; [ ! -e fails ] || exit 255\n'
    "while [ ! -e done ]; do sleep 0.02; done",
}


@pytest.fixture
def slurm(tmp_path):
    """A directory with the commands of SLURM in bin/, and the environment of a job of two nodes that uses them."""
    (tmp_path / "bin").mkdir()
    for name, script in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return tmp_path, os.environ | job | {"SLURM_SUBMIT_DIR": str(tmp_path), "PATH": path, "SLURM_GPUS_ON_NODE": "4"}


def test_under_slurm_each_node_gets_one_launcher_with_its_rank_and_the_stage_s_own_words(slurm):
    directory, environment = slurm
    words = ["rl", "--policy", "a b", "--steps", "2"]
    subprocess.run(["bash", ROOT / "configs/slurm/launch.sh", *words], check=True, cwd=directory, env=environment)
    assert (directory / "calls").read_text() == "srun --ntasks=2 --ntasks-per-node=1\n"
    (directory / "out-of-time").touch()
    late = subprocess.run(
        ["bash", ROOT / "configs/slurm/launch.sh", *words],
        cwd=directory,
        env=environment | {"OUT_OF_TIME": "out-of-time"},
    )
    assert late.returncode == 143
    for rank in "01":
        given = (directory / f"accelerate.{rank}").read_text().splitlines()
        assert given[-len(words) - 2 :] == ["-m", "rloop_cli", *words]
        options = dict(zip(given[1:-7:2], given[2:-7:2], strict=True))
        assert options["--machine_rank"] == rank
        assert (options["--num_machines"], options["--num_processes"]) == ("2", "8")
        assert options["--main_process_ip"] == "node-a"
        assert (ROOT / options["--config_file"]).is_file()


@pytest.mark.parametrize(
    ("ending", "code", "is_back"), [("time", 255, True), ("failure", 255, False), ("done", 0, False)]
)
def test_a_slurm_job_goes_back_into_the_queue_if_its_time_is_up_and_for_nothing_else(slurm, ending, code, is_back):
    directory, environment = slurm
    if ending == "failure":
        (directory / "fails").touch()
    job = subprocess.Popen(["bash", ROOT / "configs/slurm/loop.sbatch"], cwd="/", env=environment)
    while not (directory / "dvc.pid").exists() and job.poll() is None:
        time.sleep(0.02)
    if ending == "done":
        (directory / "done").touch()
    if ending == "time":
        job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == code
    calls = (directory / "calls").read_text() if (directory / "calls").exists() else ""
    assert calls == ("scancel --signal=TERM 7\nscontrol requeue 7\n" if is_back else "")


def asked(params, tested):
    """(policies x sets, problems asked of them) if so many policies are asked the test sets."""
    sizes = {"aime": 30, "minerva": 272, "omni": 4428, "math": 500}
    [valid], tests = ([sizes[Path(file).stem] for file in params[part]["problems"]] for part in ("valid", "tests"))
    return num_policies(params) + tested * len(tests), num_policies(params) * valid + tested * sum(tests)


def num_policies(params):
    """The base, each iteration's checkpoints and the policy it ends with, the baseline's checkpoints."""
    every = params["rl"]["checkpoint_every"]
    of_run, of_vanilla = (math.ceil(params[part]["steps"] / every) for part in ("rl", "vanilla"))
    return 1 + len(params["iterations"]) * (of_run + 1) + of_vanilla


def test_the_cost_of_the_paper_s_evaluations_is_as_the_documentation_has_it():
    params = yaml.safe_load((ROOT / "configs/qwen2.5-math-7b.yaml").read_text())
    num_iterations = len(params["iterations"])
    fewest = 1 + 2 * num_iterations + 1  # base; end and policy of each iteration; end of the baseline
    rows = {
        "every policy, every set": num_policies(params),
        "what counts, at least": fewest,
        "what counts, at most": fewest + num_iterations + 1,  # and another checkpoint of each run, selected
    }
    text = (ROOT / "docs/long-runs.md").read_text()
    for name, tested in rows.items():
        pairs, num_problems = asked(params, tested)
        hours = 1.5 * num_problems / 5230
        rollouts = num_problems * params["eval"]["num_samples"]
        assert f"| {name} | {pairs} | {rollouts:,} | {hours:.1f} | {hours / 8:.1f} |" in text

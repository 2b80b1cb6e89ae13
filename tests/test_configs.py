"""Every params file passes `rloop check`; what the docs say of the configurations; the Slurm scripts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rloop_cli.app import app
from rloop_cli.check import counts, graph
from stages.core import jsonl

ROOT = Path(__file__).parents[1]
PARAMS = [ROOT / "params.yaml", *sorted((ROOT / "configs").glob("*.yaml"))]


PROBLEM = {"id": "p/1", "problem": "1+1=", "answer": "2", "source": "p"}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory with the graph and what configurations name of the repository."""
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for name in ("configs", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)


def checked(path):
    run = CliRunner().invoke(app, ["check", "--params", str(path)])
    assert run.exit_code in (0, 2), run.output
    return run.stderr.splitlines()


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.name)
def test_it_passes_the_check_once_the_files_are_there_that_no_stage_makes(path, elsewhere, tiny_policy):
    faults = checked(path)
    for fault in faults:
        file = Path(re.search(r": (\S+)(: no such file$| is not there, and no stage makes it)", fault)[1])
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix:
            jsonl.write(file, [PROBLEM])
        else:
            shutil.copytree(tiny_policy, file)
            config = json.loads((file / "config.json").read_text())
            (file / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2**15}))
    assert not (faults and checked(path))


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.name)
def test_it_has_the_sections_that_the_graph_uses_and_no_others(path):
    used = set(re.findall(r"\$\{(?!item|key)(\w+)", (ROOT / "dvc.yaml").read_text()))
    assert set(yaml.safe_load(path.read_text())) == {*used, "launch"}


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.name)
def test_the_iterations_are_chained_and_vanilla_has_as_many_steps(path):
    params = yaml.safe_load(path.read_text())
    starts = [params["iterations"][str(i + 1)]["start"] for i in range(len(params["iterations"]))]
    assert starts == [f"runs/{i}/policy" for i in range(len(starts))]
    assert params["tuned"] | params["merged"] == params["iterations"]
    assert params["vanilla"]["steps"] == params["rl"]["steps"] * len(starts)


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.name)
def test_rl_and_eval_ask_with_the_same_template_and_the_sections_name_the_same_set(path):
    params = yaml.safe_load(path.read_text())
    assert params["rl"]["template"] == params["eval"]["template"]
    [problems] = params["valid"]["problems"]
    assert {params["analyze"]["set"], params["report"]["valid"], Path(problems).stem} == {Path(problems).stem}
    assert params["valid"]["select"] == f"avg@{params['eval']['num_samples']}", "as the report chooses checkpoints"


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


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.13"])
@pytest.mark.parametrize("file", sorted(ROOT.glob("constraints-gpu*.txt")), ids=lambda path: path.name)
def test_the_versions_for_gpus_belong_together_by_their_own_metadata(file, python):
    pinned = [line for line in file.read_text().splitlines() if re.match(r"(vllm|torch|transformers)==", line)]
    command = [Path(sys.executable).with_name("uv"), "pip", "compile", "-q", "--extra", "gpu", "-c", file]
    where = ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
    done = subprocess.run(
        [*command, *where, "pyproject.toml"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    if "error sending request" in done.stderr or "Failed to fetch" in done.stderr:
        pytest.skip("no package index here")
    assert done.returncode == 0, done.stderr
    assert {*pinned} <= {*done.stdout.splitlines()} and len(pinned) == 3


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


def evaluated(tmp_path, **tests):
    """Policies x sets and rollouts, at least and at most, of the paper's configuration with changes to `tests`."""
    params = yaml.safe_load((ROOT / "configs/qwen2.5-math-7b.yaml").read_text())
    params["tests"] |= tests
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    calls, faults = graph.read(tmp_path / "params.yaml")
    assert not faults
    evaluations = counts.evaluations(calls)
    sizes = {"aime": 30, "minerva": 272, "omni": 4428, "math": 500}
    sizes = {f"runs/0/sets/{name}.jsonl": size for name, size in sizes.items()}
    return counts.pairs(evaluations), counts.rollouts(evaluations, sizes)


def test_the_cost_of_the_paper_s_evaluations_is_as_the_documentation_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    pairs, rollouts = evaluated(tmp_path)
    all_pairs, all_rollouts = evaluated(tmp_path, all_checkpoints=True)
    assert all_pairs.fewest == all_pairs.most
    rows = {
        "every policy, every set": (all_pairs.most, all_rollouts.most),
        "what counts, at least": (pairs.fewest, rollouts.fewest),
        "what counts, at most": (pairs.most, rollouts.most),
    }
    text = (ROOT / "docs/long-runs.md").read_text()
    for name, (num_pairs, number) in rows.items():
        hours = 1.5 * number / 32 / 5230
        assert f"| {name} | {num_pairs} | {number:,} | {hours:.1f} | {hours / 8:.1f} |" in text

"""rloop check: what it names, each fault in a line, what it shows, and that it reads commands as they would be read."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rloop_cli import check
from rloop_cli.app import app
from rloop_cli.check import graph
from stages.core import jsonl, outputs, tabular

ROOT = Path(__file__).parents[1]
PROBLEM = {"id": "p/1", "problem": "1+1=", "answer": "2", "source": "p"}
SETS = ("train", "valid", "prec", "paren", "long")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The working directory: the graph, and the toy's params.yaml as a dictionary, to be changed and written."""
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    params = json.loads(json.dumps(yaml.safe_load((ROOT / "params.yaml").read_text())))  # no section is another's alias
    params["rl"] |= {"steps": 30, "checkpoint_every": 30}
    params["vanilla"]["steps"] = 90
    return params


@pytest.fixture
def made(project, tiny_policy):
    """The same after its toy was made: a policy with a context of 128, and problems of a few tokens."""
    Path("runs/0").mkdir(parents=True)
    Path("runs/0/policy").symlink_to(tiny_policy)
    for name in SETS:
        jsonl.write(f"runs/0/{name}.jsonl", [PROBLEM, PROBLEM | {"id": "p/2", "problem": "1+1+1="}])
    return project


def checked(params, *options):
    """The lines of a check of `params`, faults without what begins each of them, and its exit code."""
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    run = CliRunner().invoke(app, ["check", *options])
    assert run.exception is None or isinstance(run.exception, SystemExit)
    if run.exit_code:
        assert run.exit_code == 2 and not run.stdout
        assert all(line.startswith("rloop: ") for line in run.stderr.splitlines())
        return [line.removeprefix("rloop: ") for line in run.stderr.splitlines()]
    assert not run.stderr and all(len(line) <= 100 for line in run.stdout.splitlines())
    return run.stdout


def sections(summary):
    """The summary by its labels, wrapped lines joined."""
    by_label, label = {}, ""
    for line in summary.splitlines():
        label = line[:12].strip() or label
        by_label[label] = f"{by_label.get(label, '')} {line[12:]}".strip()
    return by_label


def test_the_toy_passes_before_anything_is_made_and_what_waits_is_named(project):
    said = sections(checked(project))
    assert said["rl"] == "4 runs, 180 steps, 46,080 to 138,240 rollouts"
    assert said["eval"].startswith("9 calls, 34 to 37 policies x sets, ")
    assert "dvc repro toy@0, which makes runs/0/policy" in said["not yet"]
    assert "runs/0/train.jsonl, runs/0/valid.jsonl" in said["not yet"]
    assert not {"prompt", "tokens", "memory"} & said.keys()


def test_prompts_and_steps_that_make_a_comparison_unequal_are_noted(project):
    assert "note" not in sections(checked(project))
    project["eval"]["template"] = "qwen-math"
    project["vanilla"]["steps"] = 60
    noted = sections(checked(project))["note"]
    assert noted.startswith("templates differ: rl uses none, eval uses qwen-math; a policy is tested")
    assert noted.endswith("vanilla has 60 steps, the iterations together 90: no comparison at equal steps")


def test_a_run_that_was_moved_aside_is_named_with_the_disk_it_takes(project):
    aside = outputs.aside(Path("runs/1/rl"))
    aside.mkdir(parents=True)
    (aside / "weights").write_bytes(bytes(3 * 2**20))
    noted = sections(checked(project))["note"]
    assert noted == f"{aside} takes 3.0 MiB: an earlier run that was moved aside; remove it when it is not wanted"


def test_every_fault_of_the_options_is_named_by_section_and_key(project):
    project["toy"]["0"]["sed"] = 1
    project["rl"] |= {"stepz": 1, "group_size": 1, "beta2": -0.5, "minibatches": "two"}
    project["filter"]["max_pass_rate"] = 30
    project["eval"]["max_tokens"] = 0
    project["merge"]["weight"] = [0.5, 0.6]
    project["merged"] = {"1": project["tuned"].pop("1")}
    lines = checked(project)
    wanted = {
        "params.yaml: toy.0.sed: No such option: --sed (Possible options: --seed)": 1,
        "params.yaml: rl.stepz: No such option: --stepz (Possible options: --": 1,
        "params.yaml: rl.minibatches: Invalid value for '--minibatches'": 1,
        "params.yaml: rl.group_size: --group-size 1: must be at least 2": 1,
        "params.yaml: rl.beta2: --beta2 -0.5: must be at least 0": 1,
        "params.yaml: filter.max_pass_rate: --max-pass-rate 30.0: must be at most 1": 1,
        "params.yaml: eval.max_tokens: --max-tokens 0: must be at least 1": 1,
        "params.yaml: merge.weight: --weight: the weights must sum to 1": 1,
    }
    assert {begin: sum(line.startswith(begin) for line in lines) for begin in wanted} == wanted
    assert len(lines) == len(wanted), lines


def test_a_fault_is_worded_as_the_command_itself_words_it(project):
    project["rl"]["no_such"] = 3
    project["rft"]["lr"] = "fast"
    project["filter"]["max_pass_rate"] = 10
    project["eval"]["k"] = [8, 64]
    faults = dict(re.findall(r"^params.yaml: (\w+)\.\w+: (.+)$", "\n".join(checked(project)), re.M))
    nodes = {node.name: node.words for node in graph.resolve(Path("params.yaml"))[0]}
    for section, name in (("rl", "rl@1"), ("rft", "rft@1"), ("filter", "filter@1"), ("eval", "eval_base")):
        refused = CliRunner().invoke(app, nodes[name][nodes[name].index("rloop") + 1 :])
        assert refused.exit_code == 2
        assert refused.stderr.startswith(f"rloop: {faults[section]}")


def test_a_section_that_is_missing_or_has_numbers_for_keys_is_named_once(project):
    project["rll"] = project.pop("rl")
    project["itertions"] = project.pop("iterations")
    project["tuned"] = {1: {"start": "runs/0/policy"}}
    assert checked(project) == [
        'params.yaml: tuned.1: the key must be a text: write "1"',
        "params.yaml: iterations is missing, which dvc.yaml asks for in rl, eval, test, analyze, report (there is "
        "itertions)",
        "params.yaml: rl is missing, which dvc.yaml asks for in vanilla (there is rll)",
    ]


def test_a_command_that_no_shell_could_read_is_named(project):
    project["report"] = "it's"
    (line,) = checked(project)
    assert line.startswith("dvc.yaml: report: a quotation is not closed in rloop report --runs runs ")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("rl: {steps: 1\n", "params.yaml:2: not valid YAML: "),
        ("rl:\n  lr: 1\n  lr: 2\n", "params.yaml:3: not valid YAML: found duplicate key"),
        ("- 1\n", "params.yaml: expected sections, found list"),
        (None, "params.yaml: no such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(project, text, fault):
    if text is not None:
        Path("params.yaml").write_text(text)
    run = CliRunner().invoke(app, ["check"])
    assert (run.exit_code, run.output.count("\n")) == (2, 1)
    assert run.output.startswith(f"rloop: {fault}")


def test_what_no_stage_makes_and_is_not_there_is_named_once_each(project):
    project["toy"] = {}
    project["fetch"] = {"0": "nobody/nothing"}
    sources = {"valid": "gsm8k-train", "mine": "mine.csv", "math": "mat-500"}
    project["prepare"] = {name: {"source": source} for name, source in sources.items()}
    project["prepare_train"] = {"train": {"source": "dapo-17k", "decontaminate": ["runs/0/sets/vald.jsonl"]}}
    project["iterations"]["3"]["start"] = "runs/4/policy"
    project["valid"]["problems"] = ["runs/0/sets/valid.jsonl"]
    project["tests"]["problems"] = ["runs/0/sets/mine.jsonl"]
    project["rl"]["valid"] = "held_out.jsonl"
    project["rl"]["reward"] = ["math-verify", "lost.py:reward"]
    project["eval"]["template"] = "lost.txt"
    project["launch"] = "accelerate launch --config_file configs/lost.yaml -m rloop_cli"
    lines = checked(project)
    wanted = [
        "params.yaml: prepare.mine.source: mine.csv: no such file",
        "params.yaml: prepare.math.source: --source mat-500: neither a preset",
        "params.yaml: prepare_train.train.decontaminate: runs/0/sets/vald.jsonl is not there, and no stage makes it "
        "(the nearest that one makes is runs/0/sets/valid.jsonl)",
        "params.yaml: iterations.3.start: runs/4/policy is not there, and no stage makes it",
        "params.yaml: rl.valid: held_out.jsonl is not there, and no stage makes it",
        "params.yaml: rl.reward: --reward lost.py:reward: there is no file lost.py",
        "params.yaml: eval.template: template lost.txt: neither one of",
        "params.yaml: launch: configs/lost.yaml: no such file",
    ]
    assert [sum(line.startswith(begin) for line in lines) for begin in wanted] == [1] * len(wanted)
    assert len(lines) == len(wanted), lines


@pytest.mark.slow
def test_what_another_params_file_has_made_is_not_held_against_this_one(made):
    assert sections(checked(made))["prompt"] == '"1+1="'
    command = " ".join(["rloop toy --out runs/0", *(f"--{name} {value}" for name, value in made["toy"]["0"].items())])
    lock = {"schema": "2.0", "stages": {"toy@0": {"cmd": command, "outs": [{"path": "runs/0"}]}}}
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    assert sections(checked(made))["prompt"] == '"1+1="', "it is what this graph's own command has made"
    made["toy"], made["fetch"] = {}, {"0": "nobody/nothing"}
    made["prepare_train"] = {"train": {"source": "gsm8k-train"}}
    made["rl"]["max_tokens"] = 2048
    said = sections(checked(made))
    assert not {"prompt", "tokens", "memory"} & said.keys()
    assert "dvc repro fetch@0, which makes runs/0/policy" in said["not yet"]
    assert said["time"] == "not known: what lies in runs is of another base policy"


@pytest.mark.slow
def test_once_they_are_made_prompts_are_shown_and_counted_and_runs_say_how_long_it_takes(made):
    run = Path("old/1/rl")
    run.mkdir(parents=True)
    parameters = {"problems_per_step": 32, "group_size": 16, "max_tokens": 72}
    (run / "manifest.json").write_text(json.dumps({"stage": "rl", "parameters": parameters}))
    tabular.write_tsv(run / "log.tsv", [{"step": step, "seconds": 40.0, "rollout_tokens": 800} for step in (1, 2)])
    for name, counts in (("", {}), ("a/", {"rollouts": 60}), ("b/", {"rollouts": 40})):
        file = Path(f"old/eval/0/{name}manifest.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"stage": "eval", "counts": counts, "seconds": 50, "parameters": {"max_tokens": 9}}))
    said = sections(checked(made, "--runs", "old"))
    assert said["prompt"] == '"1+1="'
    assert said["tokens"] == (
        "rl: a prompt of 6 and max_tokens 72, context 128 eval: a prompt of 6 and max_tokens 72, context 128"
    )
    assert said["eval"] == "9 calls, 34 to 37 policies x sets, 2,176 to 2,368 rollouts"  # 2 problems, 32 samples
    assert said["time"] == (  # 180 steps of 256 rollouts, where 512 took 40 s; 0.5 s a rollout
        "rl: 60 min, by old/1/rl: 2 steps, 40 s for 512 rollouts, 20 tokens/s "
        "eval: 18 min to 20 min, by old/eval/0: 100 rollouts in 50 s, start included (of --max-tokens 9)"
    )
    assert "not yet" not in said


@pytest.mark.slow
def test_prompts_that_do_not_fit_are_a_fault_of_eval_and_a_note_of_rl(made):
    long = PROBLEM | {"id": "p/3", "problem": "1+" * 40 + "1="}
    for name in ("train", "prec"):
        jsonl.write(f"runs/0/{name}.jsonl", [PROBLEM, long])
    (line,) = checked(made)
    assert line.startswith("params.yaml: eval.max_tokens: runs/0/prec.jsonl: 1 problems (p/3) leave no room")
    jsonl.write("runs/0/prec.jsonl", [PROBLEM])
    assert "(p/3) leave no room" in sections(checked(made))["note"]
    made["rl"]["max_tokens"] = made["eval"]["max_tokens"] = 128
    full = "--max-tokens 128 does not fit the policy's context of 128 tokens: lower it"
    faults = [f"params.yaml: {section}.max_tokens: {full}" for section in ("rl", "eval")]
    assert checked(made) == checked(made, "--gpu-memory", "22") == faults


@pytest.mark.slow
def test_broken_problems_and_policies_are_named(made, tiny_policy):
    Path("runs/0/valid.jsonl").write_text('{"id": "1"}\n')
    (line,) = checked(made)
    assert line.startswith("params.yaml: valid.problems: runs/0/valid.jsonl:1: ")
    jsonl.write("runs/0/valid.jsonl", [PROBLEM])
    Path("runs/0/policy").unlink()
    shutil.copytree(tiny_policy, "runs/0/policy")
    Path("runs/0/policy/model.safetensors").write_bytes(b"cut")
    (line,) = checked(made)
    assert line.startswith("params.yaml: iterations.1.start: runs/0/policy/model.safetensors: not a safetensors")


@pytest.mark.slow
def test_a_policy_without_the_layers_for_adapters_or_the_heads_for_ranks_is_named(made):
    made["rl"] |= {"lora_rank": 4, "lora_targets": "w_pack", "tensor_parallel": 3}
    made["launch"] = "torchrun --nproc_per_node=2 -m rloop_cli"
    made["rft"]["batch_size"] = 3
    lines = checked(made)
    assert any(line.startswith("params.yaml: rl.lora_targets: --lora-targets w_pack") for line in lines)
    assert "params.yaml: rl.tensor_parallel: --tensor-parallel 3: must divide the number of processes, 2" in lines
    assert "params.yaml: rft.batch_size: --batch-size 3 does not divide among 2 processes" in lines


@pytest.mark.slow
def test_memory_is_held_against_what_a_gpu_offers(made):
    fits = sections(checked(made, "--gpu-memory", "22"))["memory"]
    assert fits.startswith("rl: updates in 1.8, draws in 12.5 of 22 GiB a GPU, cache of ")
    assert "rft: updates in " in fits and "eval: draws in 21.8 of 22 GiB a GPU" in fits
    made["rl"]["tokens_per_microbatch"] = 2**20
    lines = checked(made, "--gpu-memory", "3")
    begin = "params.yaml: rl.tokens_per_microbatch: rl: an update takes "
    assert [line.startswith(begin) and line.endswith(" fits") for line in lines].count(True) == 1
    assert any(line.startswith("dvc.yaml: eval_base: eval: drawing takes 4.7 GiB by the plan") for line in lines)
    made["launch"] = "accelerate launch --config_file configs/accelerate/gpu8-fsdp2.yaml -m rloop_cli"
    made["rl"]["tokens_per_microbatch"] = 1024
    said = sections(checked(made))["memory"]
    assert "rft: updates in " in said and "not planned: " not in said
    made["rl"]["dtype"] = "float32"
    assert sections(checked(made))["memory"] != said


@pytest.mark.slow
def test_its_help_ends_with_an_example_that_runs(made):
    last = check.run.__doc__.strip().split("\n\n")[-1]
    program, *words = shlex.split(last.partition("Example:")[2])
    Path("params.yaml").write_text(yaml.safe_dump(made, sort_keys=False))
    assert (program, CliRunner().invoke(app, words).exit_code) == ("rloop", 0)
    assert "\n  check " in CliRunner().invoke(app, ["--help"]).output

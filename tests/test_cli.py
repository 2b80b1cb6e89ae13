import errno
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rloop_cli.app import app
from rloop_cli.commands import ending_in_one_line
from stages import STAGES, load
from stages.core import jsonl, lifetime, outputs
from tests import warm

ROLLOUT = {
    "problem_id": "p/1",
    "sample": 0,
    "step": 1,
    "policy": "toy/policy",
    "prompt": "1+1=",
    "completion": "\\boxed{2}",
    "answer": "2",
    "reward": 1.0,
    "verdict": "correct",
    "num_tokens": 3,
    "finish_reason": "stop",
}
BARE = "import typer; app = typer.Typer(); app.command('a')(lambda: None); app.command('b')(lambda: None); app()"


def rloop(*arguments, **options):
    """A run of the real command line in a process of its own."""
    command = [sys.executable, "-m", "rloop_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def parse(*arguments):
    """The parameters that the command line makes of `arguments`, without running the command."""
    stage, *options = arguments
    group = typer.main.get_command(app)
    above = group.make_context("rloop", [stage])
    return group.commands[stage].make_context(stage, options, parent=above).params


@pytest.fixture
def rollouts(tmp_path):
    """A file of one success and three failures of one problem."""
    path = tmp_path / "rollouts.jsonl"
    failure = {"completion": "\\boxed{3}", "reward": 0.0, "verdict": "wrong"}
    lines = [ROLLOUT, *(ROLLOUT | failure | {"sample": sample} for sample in (1, 2, 3))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_begins_with_an_imperative_and_ends_with_an_example_that_parses(stage):
    first, *_, last = load(stage).run.__doc__.strip().split("\n\n")
    verb = first.split()[0]
    assert verb[0].isupper() and not verb.endswith(("s", "ing", "ed"))
    assert last.split()[:3] == ["Example:", "rloop", stage]
    for part in last.removesuffix("\n").partition("Example:")[2].split("|"):
        program, *arguments = shlex.split(part)
        assert program == "rloop"
        parse(*arguments)
    help_text = CliRunner().invoke(app, [stage, "--help"], terminal_width=80).output
    shown = help_text.partition("Example:\n")[2].partition("\n\n")[0]
    assert max(map(len, shown.splitlines())) < 80
    words = subprocess.run(["bash", "-c", f"rloop() {{ echo rloop $*; }}\n{shown}"], capture_output=True, text=True)
    assert words.stdout.split() == last.split()[1:], "the shell reads something else than the docstring says"


@pytest.mark.slow
def test_the_examples_run_one_after_the_other_as_they_are_printed_and_are_done_the_second_time(tmp_path):
    log = tmp_path / "log"

    def run_example(stage):
        """Run it, and return what it said."""
        shown = CliRunner().invoke(app, [stage, "--help"]).output.partition("Example:\n")[2].partition("\n\n")[0]
        program, *arguments = shlex.split(shown.replace("\\\n", ""))
        assert program == "rloop"
        log.write_text("")
        process = warm.start(arguments, tmp_path, log)
        process.join()
        assert process.exitcode == 0, f"{stage}: {log.read_text()[-3000:]}"
        return log.read_text()

    drawn_or_trained = ("toy", "prepare", "rl", "sample", "filter", "rft", "eval")
    for stage in (*drawn_or_trained, "analyze", "report"):
        run_example(stage)
    for stage in drawn_or_trained:
        assert re.search("is done|is already done|already holds this run, finished", run_example(stage)), stage
    results = (tmp_path / "loop/results.md").read_text()
    assert "Base" in results and "RLoop" in results
    assert "similarity_RLoop" in " ".join(file.name for file in (tmp_path / "loop/analysis").iterdir())


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_has_a_help_text_and_shows_its_default(stage):
    for option in typer.main.get_command(app).commands[stage].params:
        if option.name != "help":
            assert option.help, f"{option.opts[0]} of {stage} has no help text"
            assert option.required or option.show_default, f"{option.opts[0]} of {stage} does not show its default"


def test_an_underscore_is_a_dash_in_an_option(rollouts):
    dashes = parse("filter", "--rollouts", str(rollouts), "--max-pass-rate", "0.5", "--no-dry-run")
    assert dashes == parse("filter", "--rollouts", str(rollouts), "--max_pass_rate", "0.5", "--no_dry_run")
    assert dashes["max_pass_rate"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--rollouts", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--rollouts", "empty.jsonl"], "empty.jsonl is empty"),
        (["--rollouts", "cut.jsonl"], "cut.jsonl:2: not valid JSON"),
        (["--rollouts", "rollouts.jsonl", "--max-pass-rate", "10"], "--max-pass-rate 10.0: must be at most 1"),
        (["--rollouts", "rollouts.jsonl", "--max-pass-rate", "1", "--out", "empty.jsonl/new"], "empty.jsonl"),
    ],
)
def test_a_mistake_gets_one_line_and_code_2(rollouts, arguments, fault):
    folder = rollouts.parent
    (folder / "empty.jsonl").touch()
    (folder / "cut.jsonl").write_text(rollouts.read_text()[:-400])
    (folder / "cut.jsonl").write_text(json.dumps(ROLLOUT) + '\n{"problem_id"')
    before = sorted(path.name for path in folder.iterdir())
    run = rloop("filter", "--out", "out.jsonl", *arguments, cwd=folder)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("rloop: ") and run.stderr.count("\n") == 1
    assert fault in run.stderr
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["filter", "--rolouts", "x"], "No such option: --rolouts"),
        (
            ["rl", "--policy", "p", "--problems", "q", "--out", "o", "--lerning_rate", "1"],
            "No such option: --lerning-rate",
        ),
        (["filter", "--rollouts", "x", "--seed", "one"], "Invalid value for '--seed'"),
        (["filter", "--rollouts", "x", "--out"], "Option '--out' requires an argument"),
        (["filter"], "Missing option '--rollouts'"),
        (["explore"], "No such command 'explore'"),
        (["--explore"], "No such option: --explore"),
        (["filter", "--rollouts", "x", "--seed", str(2**63)], f"--seed {2**63}: must be a number of at most 64 bits"),
        (["eval", "--out", "o", "--k", "8", "--k", str(10**30)], f"--k {10**30}: must be a number of at most 64 bits"),
        (["filter", "--rollouts", "x", "--max-pass-rate", "nan"], "--max-pass-rate nan: must be a finite number"),
    ],
)
def test_what_the_command_line_does_not_know_is_named_in_one_line_with_code_2(arguments, fault):
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 2
    assert run.output.startswith(f"rloop: {fault}")
    assert run.output.count("\n") == 1


def test_rloop_alone_shows_the_commands():
    run = rloop()
    assert run.returncode == 0
    assert all(f"\n  {stage} " in run.stdout for stage in STAGES)


def test_a_option_out_of_bounds_is_one_line_too():
    run = CliRunner().invoke(app, ["rft", "--policy", "p", "--examples", "e", "--out", "o", "--epochs", "0"])
    assert (run.exit_code, run.output) == (2, "rloop: --epochs 0: must be at least 1\n")


@pytest.fixture
def ready(rollouts, tiny_policy, monkeypatch):
    """A working directory with all that every stage but rl needs, and a link to a policy."""
    monkeypatch.chdir(rollouts.parent)
    Path("policy").symlink_to(tiny_policy)
    problems = [{"id": "p/1", "problem": "1+1=", "answer": "2", "source": "p"}]
    jsonl.write("problems.jsonl", problems)
    jsonl.write("examples.jsonl", [{"problem_id": "p/1", "prompt": "1+1=", "completion": "2", "pass_rate": 0.1}])
    results = {"problem_id": "p/1", "num_samples": 1, "num_correct": 1, "num_truncated": 0}
    steps = [f"runs/vanilla/rl/checkpoints/step_00000{step}" for step in (1, 2)]
    jsonl.write("runs/eval/valid/results.jsonl", [results | {"policy": step} for step in steps])


WITHOUT_ENGINE = {
    "prepare": "--source problems.jsonl",
    "toy": "--pretrain-steps 1",
    "sample": "--policy policy --problems problems.jsonl --template none --max-tokens 8",
    "filter": "--rollouts rollouts.jsonl --max-pass-rate 1",
    "rft": "--policy policy --examples examples.jsonl",
    "eval": "--policy policy --problems problems.jsonl --template none --max-tokens 8",
    "regrade": "--rollouts rollouts.jsonl",
    "analyze": "--evals runs/eval",
    "report": "--runs runs",
}


@pytest.mark.parametrize("stage", WITHOUT_ENGINE)
def test_an_output_that_another_process_writes_is_refused(ready, stage):
    with outputs.locked("out"):
        run = CliRunner().invoke(app, [stage, *WITHOUT_ENGINE[stage].split(), "--out", "out"])
        assert (run.exit_code, run.exception.__class__) == (2, SystemExit)
        assert "rloop: out is being written by another process" in run.output
    assert not Path("out").exists() and not list(Path().glob(".out*"))


@pytest.mark.parametrize("stage", [name for name in WITHOUT_ENGINE if name not in ("report", "prepare")])
def test_what_cannot_be_written_is_said_before_anything_is_read(tmp_path, monkeypatch, stage):
    monkeypatch.chdir(tmp_path)  # nothing of what the options name is there
    run = CliRunner().invoke(app, [stage, *WITHOUT_ENGINE[stage].split(), "--out", "/proc/out"])
    assert run.exit_code == 2
    assert run.output.startswith("rloop: /proc/out cannot be written: ") and run.output.count("\n") == 1


@pytest.mark.parametrize("stage", ["rl", "rft", "sample", "eval"])
def test_a_policy_of_weights_that_are_not_finite_is_refused_by_all_that_load_one(ready, tiny_policy, stage):
    from safetensors.torch import load_file, save_file

    Path("policy").unlink()
    shutil.copytree(tiny_policy, "policy")
    weights = load_file("policy/model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, "policy/model.safetensors")
    options = WITHOUT_ENGINE | {"rl": f"{WITHOUT_ENGINE['sample']} --overlong-buffer 0"}
    run = CliRunner().invoke(app, [stage, *options[stage].split(), "--out", "out"])
    assert run.exit_code == 2
    assert "rloop: policy/model.safetensors: weight model.norm.weight is not finite" in run.output
    assert not Path("out").exists()


def test_debug_shows_where_a_mistake_was_found():
    run = CliRunner().invoke(app, ["filter", "--rollouts", "nowhere.jsonl", "--out", "out.jsonl", "--debug"])
    assert run.exit_code == 2
    assert "Traceback" in run.output
    assert run.output.endswith("rloop: nowhere.jsonl: no such file\n")


def test_our_own_mistake_is_a_whole_traceback(monkeypatch, rollouts):
    monkeypatch.setattr("stages.filter.yield_table", lambda *_: 1 / 0)
    run = CliRunner().invoke(app, ["filter", "--rollouts", str(rollouts), "--dry-run"])
    assert isinstance(run.exception, ZeroDivisionError)


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC])
def test_what_the_disk_refuses_is_one_line_and_code_2(monkeypatch, rollouts, code):
    def refuse(*_):
        raise OSError(code, "the disk says no", "place/file")

    monkeypatch.setattr("stages.filter.yield_table", refuse)
    run = CliRunner().invoke(app, ["filter", "--rollouts", str(rollouts), "--dry-run"])
    assert (run.exit_code, run.output) == (2, "rloop: place/file: the disk says no\n")


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


@pytest.mark.parametrize("error", [OutOfMemoryError("CUDA out of memory.\nTried 2 GiB"), MemoryError()])
def test_out_of_memory_is_one_line_with_the_options_of_the_stage_that_lower_it(monkeypatch, tmp_path, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("stages.sample.draw", fail)
    options = ("--policy", "p", "--problems", "p.jsonl", "--out", str(tmp_path / "out"))
    run = CliRunner().invoke(app, ["sample", *options])
    assert run.exit_code == 2
    (line,) = run.output.splitlines()
    assert line.startswith("rloop: out of memory (") and line.endswith("lower --memory-fraction, --max-sequences")


def test_a_run_gone_wrong_is_one_line_and_code_1(monkeypatch, rollouts):
    from stages.core.errors import CollapseError

    def collapse(*_):
        raise CollapseError("step 3: the loss is nan: lower --lr")

    monkeypatch.setattr("stages.filter.yield_table", collapse)
    run = CliRunner().invoke(app, ["filter", "--rollouts", str(rollouts), "--dry-run"])
    assert (run.exit_code, run.output) == (1, "rloop: step 3: the loss is nan: lower --lr\n")


def test_a_stage_works_in_a_pipe_and_a_reader_that_goes_away_ends_it_quietly(rollouts):
    command = [sys.executable, "-m", "rloop_cli", "filter", "--rollouts", "-", "--out", "-", "--max-pass-rate", "1"]
    run = subprocess.run(command, input=rollouts.read_text(), capture_output=True, text=True, check=True)
    assert [json.loads(line)["pass_rate"] for line in run.stdout.splitlines()] == [0.25]
    many = [ROLLOUT | {"problem_id": f"p/{number}", "completion": "x" * 999} for number in range(999)]
    text = "".join(json.dumps(line) + "\n" for line in many)
    command[5:6] = [str(rollouts.parent / "many.jsonl")]
    (rollouts.parent / "many.jsonl").write_text(text)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        run.stdout.readline()
        run.stdout.close()
        assert "Traceback" not in run.stderr.read()


@pytest.mark.parametrize(
    ("said", "line"),
    [("", "nothing is written before the end"), ("the same command goes on after step 3",) * 2],
)
def test_ctrl_c_ends_in_one_line_that_says_what_is_kept_from_the_first_rank_alone(said, line, capsys, monkeypatch):
    def run():
        with lifetime.going_on(lambda: said):
            raise KeyboardInterrupt

    for rank, shown in (("0", f"rloop: interrupted; {line}\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(typer.Exit) as ended:
            ending_in_one_line(run, [], "")()
        assert ended.value.exit_code == 130
        assert capsys.readouterr().err == shown


@pytest.mark.slow
def test_help_answers_within_three_times_a_bare_typer_app():
    def seconds(*command):
        started = time.perf_counter()
        subprocess.run([sys.executable, *command, "--help"], capture_output=True, check=True)
        return time.perf_counter() - started

    def quotient():
        pairs = [(seconds("-m", "rloop_cli"), seconds("-c", BARE)) for _ in range(5)]
        return min(ours for ours, _ in pairs) / min(bare for _, bare in pairs)

    assert quotient() < 3 or quotient() < 3  # once more, for a machine that was busy


@pytest.mark.parametrize(
    ("words", "choices"),
    [
        ("rloop fil", ["filter"]),
        ("rloop rl --dtype b", ["bfloat16"]),
        ("rloop eval --tem", ["--temperature", "--template"]),
    ],
)
def test_the_shell_completes_commands_options_and_choices(words, choices):
    completing = {"_RLOOP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    assert rloop(env={**os.environ, **completing}).stdout.split() == choices


def test_the_version_is_that_of_the_package():
    assert CliRunner().invoke(app, ["--version"]).output == f"rloop {importlib.metadata.version('rloop')}\n"

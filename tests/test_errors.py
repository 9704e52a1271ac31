"""Who shortens errors: a command does, a library user's program keeps every traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lm_eval_lora_ensemble import errors
from lm_eval_lora_ensemble.errors import EnsembleError, OneLineHook, one_line


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_a_notebooks_excepthook_is_the_same_object_before_and_after(ensemble):
    """Importing the model and building one changes nothing of somebody else's process; 0.1.0 did on import."""
    code = (
        "import sys; before = sys.excepthook\n"
        "from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM\n"
        "assert sys.excepthook is before\n"
        "LoraEnsembleLM(adapters=sys.argv[1], device='cpu')\n"
        "assert sys.excepthook is before\n"
    )
    done = python(code, str(ensemble))
    assert done.returncode == 0, done.stderr


def test_a_library_users_wrong_shape_gives_a_traceback(ensemble):
    code = (
        "import sys\n"
        "from lm_eval_lora_ensemble.harness.model import LoraEnsembleLM\n"
        "LoraEnsembleLM(adapters=sys.argv[1], device='cpu')\n"
        "from lm_eval_lora_ensemble.metrics.information import mutual_information\n"
        "mutual_information([0.5, 0.5])\n"
    )
    done = python(code, str(ensemble))
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr and "<string>" in done.stderr
    assert "p has shape (2,)" in done.stderr


@pytest.mark.parametrize("module", ["lm_eval", "lm_eval_lora_ensemble"])
def test_lm_evals_own_command_shows_one_line(module, tmp_path):
    command = [sys.executable, "-m", module, "run", "--model", "lora-ensemble"]
    command += ["--model_args", "adapters=nowhere", "--tasks", "arc_easy"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("lora-ensemble: error: no adapter folder 'nowhere' here")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("spec", "file", "is_command"),
    [
        ("lm_eval.__main__", None, True),
        ("lm_eval_lora_ensemble.__main__", None, True),
        ("ipykernel_launcher", None, False),
        ("pytest.__main__", None, False),
        (None, "/usr/bin/lm_eval", True),
        (None, "/usr/bin/lm-eval", True),
        (None, "C:/env/Scripts/lora-ensemble.exe", True),
        (None, "/home/me/analysis.py", False),
        (None, None, False),
    ],
)
def test_what_is_a_command(monkeypatch, spec, file, is_command):
    main = type(sys)("__main__")
    main.__spec__ = spec and type("Spec", (), {"name": spec})
    main.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert errors._is_command() == is_command


def test_the_hook_passes_on_what_is_not_ours(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(errors, "_is_command", lambda: True)
    monkeypatch.setattr(sys, "excepthook", lambda *caught: seen.append(caught))
    errors.shorten_errors_of_command(lambda: "first")
    errors.shorten_errors_of_command(lambda: "second")
    hook = sys.excepthook
    assert isinstance(hook, OneLineHook) and not isinstance(hook.previous, OneLineHook)
    hook(ValueError, ValueError("theirs"), None)
    assert [str(caught[1]) for caught in seen] == ["theirs"] and not capsys.readouterr().err
    hook(EnsembleError, EnsembleError("two\nlines"), None)
    hook(KeyboardInterrupt, KeyboardInterrupt(), None)
    hook(KeyboardInterrupt, errors.Interrupted("epochs are kept"), None)
    assert capsys.readouterr().err.splitlines() == [
        "lora-ensemble: error: two lines",
        "lora-ensemble: stopped; second",
        "lora-ensemble: stopped; epochs are kept",
    ]


def test_names_from_strangers_are_escaped():
    assert one_line("a\x1b[31mb\nc") == "a\\x1b[31mb c"

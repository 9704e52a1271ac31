"""What the documentation supposes a reader to have, made small: a base model, benchmarks, an ensemble, adapters.

A page's commands run here word for word. `smollm2` is a tiny random Llama in the cache folder where the real one would
be; the benchmarks are folders of the Hub's names with invented rows, which ``datasets`` reads before it asks the Hub.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import PROJECT

from lm_eval_lora_ensemble import cli
from lm_eval_lora_ensemble.disk import write_json
from lm_eval_lora_ensemble.ensemble import base_model

# a cross-fitted scale wants 80 documents outside each of five folds
_SPLITS = {"train": 400, "validation": 150, "test": 150}
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")


def make_place(folder: Path, tiny_base: Path) -> Path:
    """Make the folder that pages start from, and return it.

    Args:
        folder: empty.
        tiny_base: a random causal model with its tokenizer.
    """
    cache = folder / "cache_of_models" / base_model.NAME
    shutil.copytree(tiny_base, cache)
    write_json(cache / "source.json", {"made_by": base_model._made_by(), "source": "", "sizes": {}})
    shutil.copytree(tiny_base, folder / "base")
    _programs(folder / "bin")
    _benchmarks(folder)
    return folder


def _programs(folder: Path) -> None:
    """Write the programs that pages name, run by this very Python."""
    folder.mkdir()
    modules = {
        "lm_eval": "lm_eval_lora_ensemble",
        "lora-ensemble": "lm_eval_lora_ensemble.cli",
        "accelerate": "accelerate.commands.accelerate_cli",
        "torchrun": "torch.distributed.run",
    }
    for name, module in modules.items():
        # accelerate starts scripts by their path (--no_python), so a program has to be one
        text = f"#!{sys.executable}\nimport runpy\nrunpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "python").symlink_to(sys.executable)


def _benchmarks(folder: Path) -> None:
    for config in ("ARC-Easy", "ARC-Challenge"):
        _data_set(folder / "allenai" / "ai2_arc", config, _arc_rows, test_split="test")
    _data_set(folder / "Rowan" / "hellaswag", "default", _hellaswag_rows, test_split=None)


def _data_set(folder: Path, config: str, rows: Callable[[str, int], Any], test_split: str | None) -> None:
    """Add a configuration to a data set as the Hub lays it out: parquet files, and README.md that names the splits."""
    card = folder / "README.md"
    before = card.read_text().removesuffix("---\n") if card.exists() else "---\nconfigs:\n"
    lines = [f"- config_name: {config}", "  data_files:"]
    for split, count in _SPLITS.items():
        if split == "test" and test_split is None:
            continue
        path = folder / config / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list([rows(split, n) for n in range(count)]).to_parquet(path)
        lines += [f"  - split: {split}", f"    path: {config}/{path.name}"]
    card.write_text(before + "\n".join(lines) + "\n---\n")


def _sum(split: str, n: int) -> tuple[str, str, int, list[str]]:
    """Return two numbers in words, the place of their sum among four answers, and the answers."""
    n += 1000 * list(_SPLITS).index(split)
    a, b = n % 8, (n // 8 + 3 * n) % 8
    right = (5 * n) % 4
    return _NUMBERS[a], _NUMBERS[b], right, [f"it is {a + b + 4 + 3 * (c - right)}" for c in range(4)]


def _arc_rows(split: str, n: int) -> dict[str, Any]:
    a, b, right, answers = _sum(split, n)
    return {
        "id": f"{split}_{n}",
        "question": f"What is {a} and {b} together? ({n})",
        "choices": {"text": answers, "label": list("ABCD")},
        "answerKey": "ABCD"[right],
    }


def _hellaswag_rows(split: str, n: int) -> dict[str, Any]:
    a, b, right, answers = _sum(split, n)
    return {
        "ind": n,
        "activity_label": "Adding",
        "ctx_a": f"Somebody adds {a} and {b}.",
        "ctx_b": "the answer",
        "ctx": f"Somebody adds {a} and {b}. the answer",
        "endings": [f"on the board says that {answer} and a little more." for answer in answers],
        "source_id": f"{split}~{n}",
        "split": split,
        "split_type": "indomain",
        "label": str(right),
    }


class Reader:
    """Runs a page's blocks in a folder as its reader would, in this process where it can.

    Args:
        folder: made by :func:`make_place`.
        monkeypatch: sets the working folder and the environment.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "__page__"}
        self._patch = monkeypatch
        monkeypatch.chdir(folder)
        monkeypatch.setenv(base_model.CACHE_VARIABLE, str(folder / "cache_of_models"))
        monkeypatch.setenv("HF_HOME", str(folder / "hf_home"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "hf_home" / "datasets"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)

    def python(self, text: str, place: str) -> str:
        """Run Python in the page's one namespace; return what it prints."""
        with _captured() as printed:
            exec(compile(text, place, "exec"), self.names)
        return printed.getvalue()

    def commands(self, words: list[list[str]], script: str) -> str:
        """Run a block's commands, in this process if all of them are ours; return what they print.

        Args:
            words: its commands.
            script: its text, for a shell.

        Raises:
            AssertionError: a command ended with another status than 0.
        """
        simple = not any(character in script for character in "$|><&;`")
        if simple and all(one[0] in ("lora-ensemble", "lm_eval") for one in words):
            return "".join(self._in_process(one) for one in words)
        return in_shell(script, self.folder, OMP_NUM_THREADS="1", PYTHONPATH=str(PROJECT / "tests"))

    def _in_process(self, words: list[str]) -> str:
        with _captured() as printed, contextlib.redirect_stderr(printed):
            status = cli.main(words[1:]) if words[0] == "lora-ensemble" else self._lm_eval(words[1:])
        assert status == 0, f"{shlex.join(words)}\n{printed.getvalue()[-3000:]}"
        return printed.getvalue()

    def _lm_eval(self, words: list[str]) -> int:
        from lm_eval_lora_ensemble.__main__ import main

        with self._patch.context() as patch:
            patch.setattr(sys, "argv", ["lm_eval", *words])
            main()
        return 0


def in_shell(script: str, folder: Path, **environment: str) -> str:
    """Run a page's commands in a shell and return what they print.

    Raises:
        AssertionError: one ended with another status than 0.
    """
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        yield printed

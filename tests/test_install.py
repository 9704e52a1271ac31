"""The plugin as a stranger gets it: a built wheel and an editable install in fresh virtual environments.

A fresh environment borrows torch and lm-eval from the environment that runs the tests; the package itself is
really installed by pip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import PROJECT
from harness_tasks import write_tasks

OURS = ("quickstart_countries", "arc_easy_uq", "mmlu_uq", "paper_commonsense_qa")
OFF = {"LM_EVAL_LORA_ENSEMBLE_AUTOLOAD": "0"}


@dataclass
class Environment:
    root: Path

    @property
    def python(self) -> str:
        return str(self.root / "bin" / "python")

    @property
    def site_packages(self) -> Path:
        return next(self.root.glob("lib/python*/site-packages"))

    def run(self, *arguments: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.python, *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=self.root,
            env={**os.environ, **env},
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    def code(self, source: str, **env: str) -> str:
        return self.run("-c", source, **env).stdout.strip()

    def pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    def files(self) -> set[str]:
        found = (path.relative_to(self.site_packages).as_posix() for path in self.site_packages.rglob("*"))
        return {name for name in found if "__pycache__" not in name}


def fresh(root: Path) -> Environment:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True)
    environment = Environment(root)
    (environment.site_packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return environment


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the project, so that building leaves nothing in the real one."""
    target = tmp_path_factory.mktemp("checkout") / "project"
    unwanted = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "quickstart_run", ".*_cache"
    )
    shutil.copytree(PROJECT, target, ignore=unwanted)
    return target


@pytest.fixture(scope="module")
def built(checkout: Path) -> Path:
    """The folder with the wheel and the sdist."""
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(checkout / "dist"),
        str(checkout),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return checkout / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel_installed(wheel: Path, tmp_path_factory) -> Environment:
    environment = fresh(tmp_path_factory.mktemp("wheel") / "venv")
    environment.pip("install", "--no-deps", "--no-index", "--ignore-installed", str(wheel))
    return environment


@pytest.fixture(scope="module")
def editable_installed(checkout: Path, tmp_path_factory) -> Environment:
    environment = fresh(tmp_path_factory.mktemp("editable") / "venv")
    options = ("--no-deps", "--no-index", "--ignore-installed", "--no-build-isolation")
    environment.pip("install", *options, "--editable", str(checkout))
    return environment


@pytest.fixture(params=["wheel", "editable"])
def installed(request) -> Environment:
    return request.getfixturevalue(f"{request.param}_installed")


def test_wheel_and_sdist_carry_everything(built: Path, wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    for wanted in ("tasks/__init__.py", "train/__init__.py", "py.typed"):
        assert f"lm_eval_lora_ensemble/{wanted}" in names
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        packed = {name.split("/", 1)[-1] for name in archive.getnames()}
    for folder, pattern in (("tasks", "**/*.yaml"), ("train", "recipes/*.yaml"), ("train", "*.json")):
        files = [path.relative_to(PROJECT).as_posix() for path in (PROJECT / folder).glob(pattern)]
        assert files
        assert {f"lm_eval_lora_ensemble/{file}" for file in files} <= names
        assert set(files) <= packed
    assert "startup/lm_eval_lora_ensemble.pth" in packed


def test_the_wheel_is_the_checkout_nothing_missing_and_nothing_extra(checkout: Path, wheel: Path):
    package = "lm_eval_lora_ensemble"
    expected = {
        (path if top == package else Path(package, path)).as_posix()
        for top in (package, "tasks", "train")
        for path in (file.relative_to(checkout) for file in (checkout / top).rglob("*") if file.is_file())
        if "__pycache__" not in path.parts
    }
    assert {f"{package}/train/recipe.py", f"{package}/tasks/paper/paper_data.py"} <= expected
    assert {f"{package}/report/templates/report.js", f"{package}/py.typed"} <= expected
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    assert {name for name in names if name.startswith(f"{package}/")} == expected


# Python executes the first file's line at every start, so a change to it has to be made here as well, and seen.
START_UP = {
    "lm_eval_lora_ensemble.pth": (
        b'import os, sys; exec("try:\\n    import lm_eval_lora_ensemble._autoload as a; a.install()\\n'
        b'except Exception: pass") if os.environ.get("LM_EVAL_LORA_ENSEMBLE_AUTOLOAD") != "0" else None\n'
    ),
    "lm_eval_lora_ensemble.start": b"lm_eval_lora_ensemble._autoload:install\n",
}


def test_start_up_files_are_exactly_these_bytes(installed: Environment):
    assert {path.name: path.read_bytes() for path in (PROJECT / "startup").iterdir()} == START_UP
    for name, content in START_UP.items():
        assert (installed.site_packages / name).read_bytes() == content


def test_the_wheel_puts_nothing_else_beside_the_package(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    outside = {name for name in archive.namelist() if not name.startswith("lm_eval_lora_ensemble/")}
    name = "-".join(wheel.name.split("-")[:2])
    data = {member for member in outside if not member.startswith(f"{name}.dist-info/")}
    assert {Path(member).name: archive.read(member) for member in data} == START_UP
    assert all(member.startswith(f"{name}.data/") for member in data)


def test_python_3_15_start_entry_resolves(installed: Environment):
    found = installed.code(
        "import pkgutil; install = pkgutil.resolve_name('lm_eval_lora_ensemble._autoload:install'); install();"
        "import lm_eval.models; from lm_eval.api.registry import model_registry as r; print('lora-ensemble' in r)",
    )
    assert found == "True"


def test_interpreter_start_imports_nothing_heavy_and_costs_little(installed: Environment):
    assert (
        installed.code("import sys; print([m for m in ('torch', 'lm_eval', 'numpy') if m in sys.modules])")
        == "[]"
    )
    timed = (
        "import sys, time\n"
        "line = open(next(p + '/lm_eval_lora_ensemble.pth' for p in sys.path if p.endswith('site-packages'))).read()\n"
        "for name in [m for m in sys.modules if m.startswith('lm_eval_lora')]: del sys.modules[name]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != '_Finder']\n"
        "start = time.perf_counter(); exec(line); spent = time.perf_counter() - start\n"
        "assert any(type(f).__name__ == '_Finder' for f in sys.meta_path); print(spent)"
    )
    assert min(float(installed.code(timed)) for _ in range(5)) < 0.005


def test_import_of_the_package_leaves_torch_alone(installed: Environment):
    code = (
        "import sys, lm_eval_lora_ensemble as package, lm_eval_lora_ensemble.cli\n"
        "print(package.__version__, 'torch' in sys.modules)"
    )
    version, torch_loaded = installed.code(code).split()
    assert version[0].isdigit() and torch_loaded == "False"


REGISTERED = "import lm_eval.models; from lm_eval.api.registry import model_registry as r; print(*sorted(r))"


def test_built_in_models_stay_and_opt_out_works(installed: Environment):
    with_plugin, without = (set(installed.code(REGISTERED, **env).split()) for env in ({}, OFF))
    assert with_plugin - without == {"lora-ensemble"} and without < with_plugin and "hf" in without


def test_tasks_are_found_with_no_flag_and_a_users_folder_wins(installed: Environment, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(
        "task: arc_easy_uq\ndataset_path: mine\noutput_type: multiple_choice\n"
    )
    code = (
        "from lm_eval.tasks import TaskManager\n"
        f"manager = TaskManager(include_path={str(tmp_path)!r})\n"
        f"print(*[name for name in {OURS!r} if name in manager.task_index])\n"
        "print('arc_easy' in manager.task_index, len(manager.all_tasks))\n"
        "print(manager.task_index['arc_easy_uq'].yaml_path)\n"
        "print('arc_easy_uq' in TaskManager(include_defaults=False).task_index)\n"
    )
    ours, stock, mine, alone = installed.code(code).splitlines()
    assert tuple(ours.split()) == OURS
    assert stock.startswith("True") and mine == str(tmp_path / "mine.yaml") and alone == "False"


RUN = ("--tasks", "quickstart_countries", "--limit", "3", "--device", "cpu")


def test_the_command_runs_from_any_folder(installed: Environment, ensemble: Path):
    arguments = ("--model", "lora-ensemble", "--model_args", f"adapters={ensemble}", *RUN)
    table = installed.run("-m", "lm_eval", *arguments).stdout
    for metric in ("acc", "nll", "brier_score", "ece", "rms_ce", "mutual_information", "members"):
        assert f"|{metric}" in table.replace(" ", "")


def test_without_the_start_up_file_python_m_does_the_same(wheel_installed: Environment, ensemble: Path):
    arguments = ("--model", "lora-ensemble", "--model_args", f"adapters={ensemble}", *RUN)
    assert (
        "|mutual_information" in wheel_installed.run("-m", "lm_eval_lora_ensemble", *arguments, **OFF).stdout
    )


def test_hf_runs_as_if_the_plugin_were_not_there(wheel_installed: Environment, llama: Path, tmp_path: Path):
    arguments = ("--model", "hf", "--model_args", f"pretrained={llama}", "--device", "cpu")
    tasks = ("--include_path", str(write_tasks(tmp_path)), "--tasks", "both")
    table = wheel_installed.run("-m", "lm_eval", *arguments, *tasks).stdout
    assert "acc" in table and "mutual_information" not in table and "nll" not in table


def test_an_error_is_one_line_and_a_non_zero_exit(wheel_installed: Environment, tmp_path: Path):
    done = wheel_installed.run(
        "-m", "lm_eval", "--model", "lora-ensemble", "--model_args", f"adapters={tmp_path}", *RUN, check=False
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("lora-ensemble: error: no adapters in") and "Traceback" not in done.stderr


def test_a_broken_plugin_leaves_python_and_lm_eval_usable(wheel: Path, tmp_path: Path):
    environment = fresh(tmp_path / "venv")
    environment.pip("install", "--no-deps", "--no-index", "--ignore-installed", str(wheel))
    package = environment.site_packages / "lm_eval_lora_ensemble"
    (package / "harness" / "plugin.py").write_text("this is not Python\n")
    broken = environment.run("-c", REGISTERED)
    assert "hf" in broken.stdout and "lm-eval-lora-ensemble could not load" in broken.stderr
    (package / "_autoload.py").write_text("raise RuntimeError('broken')\n")
    assert environment.run("-c", REGISTERED).stderr == ""
    shutil.rmtree(package)
    assert environment.run("-c", REGISTERED).stderr == ""


def test_uninstall_leaves_nothing_behind(wheel: Path, tmp_path: Path):
    environment = fresh(tmp_path / "venv")
    before = environment.files()
    environment.pip("install", "--no-deps", "--no-index", "--ignore-installed", str(wheel))
    assert environment.files() - before
    environment.pip("uninstall", "--yes", "lm-eval-lora-ensemble")
    assert environment.files() == before
    assert "lora-ensemble" not in environment.code(REGISTERED)

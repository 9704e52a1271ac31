"""Every block of README.md, CONTRIBUTING.md and docs/ is run, here or by `make test-long`, or marked with a reason."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import test_extend
import yaml
from conftest import PROJECT, tiny_model
from documented_blocks import INDENTED, LANGUAGES, Block, blocks, commands, pages
from documented_commands import WrongCommandError, check
from documented_place import Reader, make_place
from lm_eval.tasks._index import TaskIndex

from lm_eval_lora_ensemble import cli

ELSEWHERE = {"docs/extend.md": "tests/test_extend.py"}
"""Pages all of whose blocks another test runs."""

PAGES = pages()


def own_files(page: list[Block]) -> set[str]:
    return {block.file for block in page if block.file}


def is_script(block: Block) -> bool:
    """Whether a block has commands."""
    return block.language == "bash"


def runs(block: Block, *, long: bool) -> bool:
    """Whether the default suite, or the long one, runs a block."""
    return block.language in ("bash", "python") and block.mark == ("long" if long else "")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language(page):
    for block in blocks(page):
        assert block.language != INDENTED, f"{block.place}: a test sees fenced blocks only; fence it"
        assert block.language in LANGUAGES, f"{block.place}: say ```bash, ```python, … or ```text"


@pytest.mark.parametrize("page", PAGES)
def test_every_mark_has_a_reason(page):
    text = (PROJECT / page).read_text(encoding="utf-8")
    marked = [block for block in blocks(page) if block.mark]
    assert len(marked) == len(re.findall(r"^\s*<!--\s*(?:not run|long)\b", text, re.MULTILINE)), (
        "a mark that no block follows"
    )
    assert all(len(block.reason.split()) >= 2 for block in marked)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_what_their_programs_take(page):
    found = blocks(page)
    for block in found:
        if not is_script(block):
            continue
        done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block.place}: {done.stderr}"
        for words in commands(block.text):
            try:
                check(words, own_files(found))
            except WrongCommandError as wrong:  # noqa: PERF203 - which block is what the reader wants to know
                pytest.fail(f"{block.place}: {' '.join(words)}: {wrong}")


@pytest.mark.parametrize("page", PAGES)
def test_files_are_well_formed(page):
    for block in blocks(page):
        if block.language == "yaml" and "!function" not in block.text:
            yaml.safe_load(block.text)
        if block.language == "json":
            for line in block.text.splitlines() if block.file.endswith("l") else [block.text]:
                json.loads(line)
        if block.language == "python":
            compile(block.text, block.place, "exec")


@pytest.fixture(scope="module", autouse=True)
def one_index():
    """Every command reads lm-eval's thousands of YAML files, which takes seconds: here once for each set of folders."""
    known, build = {}, TaskIndex.build

    def build_once(paths, **options):
        key = tuple(map(str, paths))
        if key not in known:
            known[key] = build(paths, **options)
        return dict(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(build_once))
        yield


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """What a reader has before any page: benchmarks, an ensemble with epochs and snapshots, an adapter, two runs."""
    home = tmp_path_factory.mktemp("docs")
    folder = home / "place"
    folder.mkdir()
    make_place(folder, tiny_model(home / "tiny-llama", "llama"))
    with pytest.MonkeyPatch.context() as patch:
        Reader(folder, patch)
        small = "base_model=base members=3 epochs=2 max_steps=null train_limit=48 learning_rate=0.02"
        kept = "swa_start=0.5 keep_snapshots=2 output=ensemble"
        assert cli.main(["train", "smollm2_arc_easy", *small.split(), *kept.split()]) == 0
    ensemble = folder / "ensemble"
    shutil.copytree(ensemble, folder / "my_run")
    for number in range(3):
        name = f"member_{number:02d}"
        (folder / "my_adapters" / name).mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(ensemble / name / file, folder / "my_adapters" / name / file)
    shutil.copytree(folder / "my_adapters" / "member_00", folder / "my_adapter")
    with pytest.MonkeyPatch.context() as patch:
        reader = Reader(folder, patch)
        for adapters in ("ensemble", "my_adapter"):
            command = (
                f"lm_eval --model lora-ensemble --model_args adapters={adapters} --tasks arc_easy,hellaswag"
            )
            reader.commands(commands(f"{command} --limit 100 --log_samples --output_path results"), command)
    return folder


def walk(page: str, template: Path, folder: Path, patch: pytest.MonkeyPatch, *, long: bool) -> dict[str, str]:
    """Run a page's blocks in order, the long ones too if ``long``; return what each printed, by its place."""
    shutil.copytree(template, folder, symlinks=True)
    todo = [block for block in blocks(page) if runs(block, long=False) or (long and runs(block, long=True))]
    if any("--output_path results\n" in block.text for block in todo):
        shutil.rmtree(folder / "results")  # the page makes its own
    reader, printed = Reader(folder, patch), {}
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
        elif block in todo:
            if block.language == "python":
                printed[block.place] = reader.python(block.text, block.place)
            else:
                printed[block.place] = reader.commands(commands(block.text), block.text)
    return printed


RUN = [page for page in PAGES if page not in ELSEWHERE and any(runs(b, long=False) for b in blocks(page))]
QUICK = ("README.md", "docs/draw.md", "docs/reference/api.md", "docs/reference/functions.md")
"""Pages that the default suite walks; the others take a minute or two each on a busy machine."""

WALKED = [page if page in QUICK else pytest.param(page, marks=pytest.mark.long) for page in RUN]
LONG = [page for page in PAGES if page not in ELSEWHERE and any(runs(b, long=True) for b in blocks(page))]


@pytest.mark.parametrize("page", WALKED)
def test_blocks_run(page, template, tmp_path, monkeypatch):
    printed = walk(page, template, tmp_path / "place", monkeypatch, long=False)
    assert printed


@pytest.mark.long
@pytest.mark.parametrize("page", LONG)
def test_long_blocks_run_where_the_page_has_them(page, template, tmp_path, monkeypatch):
    printed = walk(page, template, tmp_path / "place", monkeypatch, long=True)
    assert all(block.place in printed for block in blocks(page) if runs(block, long=True))


def test_another_test_runs_all_blocks_of_extend():
    found = blocks("docs/extend.md")
    files = {block.file: block.text for block in found if block.file}
    scripts = [line for block in found if block.language == "bash" for line in block.text.splitlines()]
    assert files == dict(test_extend.FILES)
    assert scripts == test_extend.COMMANDS
    assert len(found) == len(files) + sum(block.language == "bash" for block in found)


PAGE = """
Text, and a command of it:

<!-- not run: needs a GPU -->

```bash
lora-ensemble train smollm2_arc_easy members=2
```

`mine.py`:

```python
print(1)
```

* in a list

  ```text
  output
  ```

and

    indented
"""


def test_blocks_are_read_with_mark_language_file_and_line(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    first, second, third, last = blocks("page.md", tmp_path)
    assert (first.mark, first.reason, first.language, first.line) == ("not run", "needs a GPU", "bash", 7)
    assert (second.mark, second.file, second.language) == ("", "mine.py", "python")
    assert (third.language, third.text) == ("text", "output\n")
    assert last.language == INDENTED


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("lora-ensemble trian recipe.yaml", "no verb"),
        ("lora-ensemble train smollm2_arc_easy memmbers=2", "memmbers"),
        ("lora-ensemble train smollm2_arc_easy members=none", "members"),
        ("lora-ensemble train smollm2_arc", "no bundled recipe"),
        ("lora-ensemble draw dropout my_adapter q=0.1", "'q'"),
        ("lora-ensemble draw swgg my_adapter", "no method"),
        ("lora-ensemble draw tfb my_adapter task=arc_eazy", "arc_eazy"),
        ("lora-ensemble analyse results --odd hellaswag", "unrecognized"),
        ("lora-ensemble report results --ood helaswag", "helaswag"),
        ("lora-ensemble calibrate ensemble arc_easy --model_args dtpye=float32", "dtpye"),
        ("lm_eval --model lora-ensemble --tasks arc_eazy", "arc_eazy"),
        ("lm_eval --model lora-ensemble --model_args adaptors=x --tasks arc_easy", "adaptors"),
        ("lm_eval --model lora_ensemble --tasks arc_easy", "lora_ensemble"),
        ("lm_eval --model lora-ensemble --log_sample x --tasks arc_easy --nothing", "unrecognized"),
        ("accelerate launch --num_procs 2 -m lm_eval run --model hf --tasks arc_easy", ""),
        ("accelerate launch --no_python lora-ensemble train smollm2_arc_easy mebers=2", "mebers"),
        ("srun --ntasks=1 lora-ensemble chekc ensemble", "no verb"),
        ("make quikstart", "quikstart"),
        ("python docs/no_such_script.py", "no such file"),
        ("lora-ensembel train smollm2_arc_easy", "no check knows"),
    ],
)
def test_a_wrong_command_is_seen(command, said):
    with pytest.raises(WrongCommandError, match=re.escape(said)):
        check(*commands(command))


def test_commands_of_a_script():
    script = """
    # a comment
    A=1 lm_eval run > out && cd x      # another
    for task in a b; do
      lm_eval run \\
        --tasks "$task"
    done
    NAMES=(a b c)
    """
    assert commands(script) == [["lm_eval", "run"], ["cd", "x"], ["lm_eval", "run", "--tasks", "$task"]]

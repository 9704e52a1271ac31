"""Shared fixtures: tiny models with a real tokenizer and real adapters, all made here, no download."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import peft
import tokenizers
import torch
import transformers

# how long an example takes says how busy the machine is, not whether the code is right
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")

# a shell lets what it starts in the background ignore Ctrl-C, and the children whose answer is tested would too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

PROJECT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).parent / "data"

HUB_VARIABLE = "LORA_ENSEMBLE_HUB"
HUB = Path(os.environ[HUB_VARIABLE]) if os.environ.get(HUB_VARIABLE) else None
if HUB is not None and not HUB.is_dir():
    raise pytest.UsageError(f"{HUB_VARIABLE}={HUB} is no folder; CONTRIBUTING.md says how to fill one")

needs_hub = pytest.mark.skipif(
    HUB is None,
    reason=f"needs real benchmark rows: set {HUB_VARIABLE} to a folder with them (CONTRIBUTING.md says how)",
)


def tiny_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE tokenizer of 600 tokens on a fixed text."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train([str(DATA / "prose.txt")], vocab_size=600, special_tokens=["<|endoftext|>"])
    assert bpe.get_vocab_size() == 600
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)


def tiny_model(folder: Path, architecture: str, **overrides: object) -> Path:
    """Save a random causal model of a few thousand parameters with the tokenizer above."""
    settings: dict[str, object] = {
        "vocab_size": 600,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        **overrides,
    }
    config = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[architecture](
        **settings
    )
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # wider than the default initialisation: peaked, well separated distributions
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def random_adapters(base: Path, folder: Path, n_members: int, *, spread: float = 0.3, **lora: object) -> Path:
    """Save ``n_members`` LoRA adapters with random, non-zero A and B."""
    settings: dict[str, object] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **lora}
    for member in range(n_members):
        torch.manual_seed(100 + member)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=spread)
        adapted.save_pretrained(folder / f"member_{member:02d}")
    return folder


@pytest.fixture
def docs_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of docs/, whose scripts are no package that anybody installs."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(PROJECT / "docs")
        return importlib.import_module(name)

    return load


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "tiny-mistral", "mistral", sliding_window=None)


@pytest.fixture(scope="session")
def ensemble(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three adapters on the tiny Llama."""
    return random_adapters(llama, tmp_path_factory.mktemp("ensemble") / "three", 3)


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Change keys of a JSON file in place."""

    def edit(path: Path, **changes: object) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def n_stored(database: Path) -> int:
    """Return how many rows a cache has, of which one is its owner."""
    if not database.is_file():
        return 0
    with contextlib.closing(sqlite3.connect(database)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master").fetchall()
        return connection.execute("SELECT COUNT(*) FROM unnamed").fetchone()[0] if tables else 0

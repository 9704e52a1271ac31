"""A tokenizer saved beside an adapter must be the base model's, or the adapter learnt other token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval_lora_ensemble.disk import read_json
from lm_eval_lora_ensemble.ensemble.members import Member
from lm_eval_lora_ensemble.errors import EnsembleError

CONFIG = "tokenizer_config.json"
MAX_CONFIG_BYTES = 8 << 20
"""Eight MiB: a configuration lists its added tokens, at most some ten thousand."""
# any of these makes a tokenizer; the configuration alone does not
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

# Equal vocabularies can still split text differently: merges, normalisation, digits, white space, bytes.
PROBES = (
    "Question: What is the capital of France?\nAnswer:",
    " A",
    "A",
    "The members of an ensemble disagree; the adapter's rank doesn't.",
    "  two spaces,\ta tab\n\nand an empty line \n",
    "1234567890 + 3.14159 = 1,234,567,893.14",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n",
    "naïve café, Ångström, ﬁne, ½, Straße, İstanbul",
    "東京は晴れ。 Привет, мир! مرحبا 🙂👩‍🔬",
    "<s></s><unk><pad><|endoftext|>[INST]<|im_start|>",
)


def check_tokenizers(members: Sequence[Member], base: Any) -> None:
    """Compare every tokenizer that lies in an adapter's folder with the one that prompts are encoded with.

    Args:
        members: the ensemble's members; most have no tokenizer of their own.
        base: the base model's tokenizer.

    Raises:
        EnsembleError: one differs, adds tokens, or cannot be read.
    """
    for member in members:
        difference = _difference(member, base)
        if difference:
            raise EnsembleError(
                f"the tokenizer in {member.folder} ({member.name}) differs from the base model's: {difference}; the "
                "adapter was trained on other token ids. Train it with the base's tokenizer, or, if it was, remove the "
                "tokenizer files from that folder"
            )


def _difference(member: Member, base: Any) -> str | None:
    """Say how a member's tokenizer differs, or None if it has none or an equal one."""
    if any((member.folder / name).is_file() for name in VOCABULARIES):
        other = _read(member, base)
        return _other_vocabulary(base.get_vocab(), other.get_vocab()) or _other_ids(base, other)
    if (member.folder / CONFIG).is_file():
        return _other_added_tokens(member, base)
    return None


def _read(member: Member, base: Any) -> Any:
    """Read a member's tokenizer with the base tokenizer's own class.

    The class or code that a stranger's configuration asks for is never looked at, and equal files give equal
    tokenizers whatever that class changes on the way.
    """
    try:
        return type(base).from_pretrained(str(member.folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust reader raises no other kind
        raise EnsembleError(
            f"the tokenizer in {member.folder} ({member.name}) cannot be read ({type(error).__name__}: {error}); "
            "if it is the base model's, remove the tokenizer files from that folder"
        ) from error


def _other_vocabulary(ours: dict[str, int], theirs: dict[str, int]) -> str | None:
    differing = {token for token, _ in ours.items() ^ theirs.items()}
    if not differing:
        return None
    example = min(differing, key=lambda token: (theirs.get(token, ours.get(token)), token))
    there, here = (str(ids.get(example, "absent")) for ids in (theirs, ours))
    return f"{len(differing)} tokens, such as {example!r}, which is {there} there and {here} in the base"


def _other_ids(base: Any, other: Any) -> str | None:
    """Compare without the tokens that a tokenizer may put around a text: lm-eval decides about those."""
    for probe in PROBES:
        here, there = (tokenizer.encode(probe, add_special_tokens=False) for tokenizer in (base, other))
        if here != there:
            return f"{probe!r} is {there} there and {here} in the base"
    return None


def _other_added_tokens(member: Member, base: Any) -> str | None:
    """Compare the added tokens that a configuration without a vocabulary lists."""
    path = member.folder / CONFIG
    try:
        listed = read_json(path, MAX_CONFIG_BYTES).get("added_tokens_decoder", {})
        added = {str(token["content"]): int(number) for number, token in listed.items()}
    except (EnsembleError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EnsembleError(
            f"{path} ({member.name}) is not a readable tokenizer configuration ({type(error).__name__}: {error}); "
            "if it is the base model's, remove it"
        ) from error
    ours = base.get_vocab()
    for token, number in added.items():
        if ours.get(token) != number:
            return f"token {token!r} is {number} there and {ours.get(token, 'absent')} in the base"
    return None

"""Adapters and ensembles by their Hub id: found, and downloaded as far as they will be read.

A repository holds one adapter at its top, or an ensemble: ensemble.json at the top and the members as sub-folders, as
`hf upload` leaves an ensemble folder. ensemble.json is fetched first and names the rest, which then comes from the same
commit. Nothing that is fetched is trusted for that: it passes the checks that a local folder passes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from glob import escape
from pathlib import Path, PurePosixPath

from lm_eval_lora_ensemble.ensemble.adapters.folder import CONFIG, POSTERIOR, WEIGHTS
from lm_eval_lora_ensemble.ensemble.manifest import FILE_NAME, Manifest, MemberEntry
from lm_eval_lora_ensemble.errors import EnsembleError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_WITH_REVISION = re.compile(rf"(?P<repository>{HUB_ID.pattern})(?:@(?P<revision>\w[\w./-]*))?")
_TOKENIZER = "tokenizer*.json"


def at_hand(
    adapters: str | Path | Sequence[str | Path] | None, *, epoch: int | None = None, everything: bool = False
) -> str | Path | Sequence[str | Path] | None:
    """Return the local folder of what a Hub id names; anything else, lists of Hub ids included, as it is.

    Args:
        adapters: as in :func:`.members.find_ensemble`.
        epoch: whose adapters are wanted of an ensemble; None for the members' final ones.
        everything: whatever ensemble.json lists is wanted.

    Raises:
        EnsembleError: as :func:`fetch`.
    """
    single = isinstance(adapters, Path) or (isinstance(adapters, str) and ";" not in adapters)
    if not single or Path(str(adapters)).expanduser().is_dir():
        return adapters
    return fetch(str(adapters), epoch=epoch, everything=everything)


def fetch(name: str, *, epoch: int | None = None, everything: bool = False) -> Path:
    """Return the local folder of an adapter or ensemble on the Hub, downloading what is not in the cache yet.

    Args:
        name: ``organisation/name``, or ``organisation/name@revision`` for a branch, tag or commit.
        epoch: as in :func:`at_hand`.
        everything: as in :func:`at_hand`.

    Returns:
        The snapshot in the Hub's cache.

    Raises:
        EnsembleError: the name is a path or no Hub id, the Hub has no such thing or cannot be reached, or the
            repository holds neither an adapter nor an ensemble.
    """
    refuse_missing_folder(name, "adapter folder")
    found = _WITH_REVISION.fullmatch(name)
    if not found:
        raise EnsembleError(f"no adapter folder {name!r} here ({Path.cwd()}); check the path")
    repository, revision = found["repository"], found["revision"]
    top = [FILE_NAME, CONFIG, WEIGHTS, POSTERIOR, "README.md", _TOKENIZER]
    folder = _download(name, repository, revision, top)
    if not (folder / FILE_NAME).is_file():
        if not (folder / CONFIG).is_file():
            raise EnsembleError(
                f"{name} on the Hugging Face Hub has neither {FILE_NAME} nor {CONFIG} at its top, so it is no ensemble "
                "and no adapter; name one of its adapters' own repositories, or `hf download` it and name the folder"
            )
        return folder
    entries = Manifest.read(folder).members
    wanted = [place for entry in entries for place in _places(entry, epoch, everything)]
    listed = [file for entry in entries for file in entry.files] if everything else []
    # by the commit of the first download: the branch may have moved on meanwhile
    folder = _download(name, repository, folder.name, [*top, *_patterns(wanted), *map(escape, listed)])
    _refuse_missing(name, folder, wanted)
    return folder


def _places(entry: MemberEntry, epoch: int | None, everything: bool) -> Iterator[str]:
    """Yield the adapter folders of a member that are wanted, as its manifest has them."""
    yield entry.folder
    if everything:
        yield from (*entry.epochs.values(), *entry.steps.values())
    elif epoch in entry.epochs:
        yield entry.epochs[epoch]


def _patterns(places: Iterable[str]) -> Iterator[str]:
    for place in places:
        for file in (escape(CONFIG), escape(WEIGHTS), _TOKENIZER):
            yield (PurePosixPath(escape(place)) / file).as_posix()


def _download(name: str, repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Return the snapshot with the files that the patterns match."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns))).resolve()
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise EnsembleError(
            f"{name!r} is no local folder and could not be had from the Hugging Face Hub "
            f"({type(error).__name__}); {_way_out(error, repository)}"
        ) from error


def _way_out(error: Exception, repository: str) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"accept its terms at huggingface.co/{repository} and log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such branch, tag or commit: check what follows the @"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "check the name; if the repository is private, log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        if constants.HF_HUB_OFFLINE:
            return (
                f"it is not whole in the cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE forbids to ask: unset "
                f"that, or run `hf download {repository}` where there is a network"
            )
        return "it is not whole in the cache and the Hub cannot be reached: check the network"
    return "check the name, the network or HF_TOKEN"


def _refuse_missing(name: str, folder: Path, places: Sequence[str]) -> None:
    """Refuse a snapshot without an adapter that ensemble.json lists; weights in another format are named later."""
    from huggingface_hub import constants

    for place in places:
        if not (folder / place / CONFIG).is_file():
            offline = " (HF_HUB_OFFLINE is set, so only the cache was looked at)"
            raise EnsembleError(
                f"{FILE_NAME} of {name} lists {place}, and there is no {place}/{CONFIG}"
                f"{offline if constants.HF_HUB_OFFLINE else ''}; upload the whole ensemble folder, or download again"
            )


def refuse_missing_folder(text: str, what: str) -> None:
    """Refuse a name that looks like a path and is no folder, which would otherwise be asked of the Hub.

    Args:
        text: a Hub id, or a path.
        what: what it is the name of, for the message.

    Raises:
        EnsembleError: ``text`` begins like a path, holds a backslash, or begins with something that is here.
    """
    begins_here = Path(text.split("/", maxsplit=1)[0]).exists()
    if (text.startswith((".", "/", "~")) or "\\" in text or begins_here) and not Path(text).is_dir():
        raise EnsembleError(f"no {what} {text!r} here ({Path.cwd()}); check the path")

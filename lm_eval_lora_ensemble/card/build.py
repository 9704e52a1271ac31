"""From an ensemble and its results to README.md files, and a manifest that stays true beside them.

A card is text for readers. Where training had listed a member's README.md among the files to compare, it is taken off
that list first, so that ``lora-ensemble check`` finds the folder sound at every instant. Each file appears whole; after
a kill between two of them the same command writes the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_lora_ensemble.analysis.distribution import Distribution
from lm_eval_lora_ensemble.analysis.result import Settings
from lm_eval_lora_ensemble.card import readme
from lm_eval_lora_ensemble.card.metadata import card_data, member_data
from lm_eval_lora_ensemble.card.results import RunResults, evaluate_results, read_results
from lm_eval_lora_ensemble.card.subject import Subject, base_arguments, hub_name, label_of, trained_on
from lm_eval_lora_ensemble.card.text import ensemble_text, member_text
from lm_eval_lora_ensemble.disk import read_json, write_json
from lm_eval_lora_ensemble.ensemble.adapters.folder import check_config
from lm_eval_lora_ensemble.ensemble.listing import manifest_of, require_listable
from lm_eval_lora_ensemble.ensemble.manifest import FILE_NAME, MAX_BYTES, Manifest, MemberEntry, entry_of
from lm_eval_lora_ensemble.ensemble.members import Ensemble, find_ensemble, find_sources
from lm_eval_lora_ensemble.ensemble.writer import MEMBER
from lm_eval_lora_ensemble.errors import EnsembleError

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData


@dataclass(frozen=True)
class Options:
    """What nobody but the user can know, and how the results are judged.

    Attributes:
        name: of the ensemble; None takes the repository's or the folder's.
        repository: Hub id that it has or will have.
        base_model: Hub id of the base, where the adapters name a folder.
        datasets: Hub ids of what it was trained on, besides those that the results files tell.
        license: the Hub's identifier of it.
        settings: bins, resamples, seed, level.
        distribution: which distribution over the choices is judged; None as a report chooses it.
    """

    name: str | None = None
    repository: str | None = None
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    license: str | None = None
    settings: Settings = field(default_factory=Settings)
    distribution: Distribution | None = None


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        card: the ensemble's.
        members: how many cards of members.
        notes: what the user should know, a line each.
    """

    card: Path
    members: int
    notes: list[str]


def write_cards(
    folder: Path, places: Sequence[Path], output: Path, options: Options, *, force: bool = False
) -> Written:
    """Write the cards of an ensemble and of its members.

    Args:
        folder: the ensemble's, or a folder of adapters, which gets an ensemble.json.
        places: lm-eval's output folders or files.
        output: where the cards go: ``folder`` itself, or another that gets them and ensemble.json alone.
        options: the rest.
        force: replace a README.md that a person wrote, too.

    Raises:
        EnsembleError: no ensemble, results of another one, a README.md that is a person's, or an ``output`` that is
            another ensemble's; nothing was written then. Or a file that cannot be written.
    """
    require_listable(folder)
    ensemble = _find(folder, options)
    listed = manifest_of(folder, ensemble)
    cards = [output / entry.folder / readme.FILE_NAME for entry in listed.members]
    in_place = output.resolve() == folder.resolve()
    if not in_place:
        _refuse_other(output, listed)
    if not force:
        known = _listed_cards(output, listed) if in_place else {}
        readme.refuse_foreign([output / readme.FILE_NAME, *cards], known)
    runs, notes = read_results(places, ensemble, listed)
    results = evaluate_results(runs, options.distribution, options.settings)
    subject = _subject(folder, ensemble, listed, results, options)
    texts = [_card(member_data(subject), member_text(subject, i)) for i in range(len(cards))]
    whole = _card(card_data(subject), ensemble_text(subject))
    try:
        _write_manifest(output, listed, in_place)
        for path, text in zip(cards, texts, strict=True):
            readme.write_card(path, text)
        readme.write_card(output / readme.FILE_NAME, whole)
        if in_place:
            _write_entries(folder, listed)
    except OSError as error:
        raise EnsembleError(
            f"cannot write in {output}: {error.strerror or error}; make room there or name another --output, and run "
            "again"
        ) from error
    if subject.base_model is None:
        notes.append(
            f"note: the adapters name their base model by a folder ({subject.base_label}), which the Hub cannot link; "
            "give --base-model ORGANISATION/NAME"
        )
    return Written(output / readme.FILE_NAME, len(cards), notes)


def _refuse_other(output: Path, listed: Manifest) -> None:
    """Keep the manifest of another ensemble from being replaced."""
    if not (output / FILE_NAME).is_file():
        return
    there = [_without_card(entry) for entry in Manifest.read(output).members]
    if there != [_without_card(entry) for entry in listed.members]:
        raise EnsembleError(
            f"{output} has the {FILE_NAME} of another ensemble; name another folder with --output"
        )


def _find(folder: Path, options: Options) -> Ensemble:
    """Find the ensemble; a base that the adapters do not name is the one that the user names."""
    sources, _ = find_sources(folder)
    nameless = any(check_config(source.folder, source.root).base_model is None for source in sources)
    return find_ensemble(folder, pretrained=options.base_model if nameless else None)


def _subject(
    folder: Path, ensemble: Ensemble, listed: Manifest, results: Sequence[RunResults], options: Options
) -> Subject:
    base = options.base_model or hub_name(ensemble.base_model)
    name = options.name or (options.repository or "").rpartition("/")[2] or folder.resolve().name
    return Subject(
        name=name,
        repository=options.repository,
        base_model=base,
        base_label=base or label_of(ensemble.base_model),
        base_arguments=base_arguments(ensemble.base_model, base),
        manifest=listed,
        results=results,
        level=options.settings.level,
        datasets=list(dict.fromkeys([*options.datasets, *trained_on(listed, results)])),
        license=options.license,
    )


def _card(data: ModelCardData, text: str) -> str:
    """Return a README.md, as huggingface_hub's own class reads it."""
    from huggingface_hub import ModelCard

    return readme.sealed(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")))


def _card_of(entry: MemberEntry) -> str:
    return f"{entry.folder}/{readme.FILE_NAME}"


def _without_card(entry: MemberEntry) -> MemberEntry:
    own = _card_of(entry)
    return replace(entry, files={name: digest for name, digest in entry.files.items() if name != own})


def _own_entry(folder: Path, entry: MemberEntry) -> MemberEntry | None:
    """Return what a member's own member.json says; None without one that can be read."""
    path = folder / entry.folder / MEMBER
    try:
        return entry_of(read_json(path, MAX_BYTES)) if path.is_file() else None
    except (EnsembleError, TypeError, ValueError, KeyError, AttributeError):
        return None


def _listed_cards(folder: Path, listed: Manifest) -> dict[Path, str]:
    """Return the checksums of the members' README.md as training listed them.

    member.json is asked last of all to forget its own, so that a command that was stopped finds it there.
    """
    found = {}
    for entry in listed.members:
        for said in (_own_entry(folder, entry), entry):
            if said and (digest := said.files.get(_card_of(entry))):
                found[folder / _card_of(entry)] = digest
    return found


def _write_manifest(output: Path, listed: Manifest, in_place: bool) -> None:
    """Take members' cards off the lists of files to compare, and write the manifest where that changed it."""
    entries = [_without_card(entry) for entry in listed.members]
    if not in_place or entries != listed.members or not (output / FILE_NAME).is_file():
        output.mkdir(parents=True, exist_ok=True)
        replace(listed, members=entries).write(output)


def _write_entries(folder: Path, listed: Manifest) -> None:
    """Take them off the members' own lists, where no manifest has the checksum of such a list."""
    for entry in listed.members:
        own = _own_entry(folder, entry)
        if own and _card_of(entry) in own.files and f"{entry.folder}/{MEMBER}" not in entry.files:
            write_json(folder / entry.folder / MEMBER, _without_card(own).as_mapping())

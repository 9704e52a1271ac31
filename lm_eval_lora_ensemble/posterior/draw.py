"""Draw members from a posterior and write them as an ensemble.

    draw.json            what was asked for, and of which adapters; a run that asks for something else is refused
    ensemble.json        the manifest, written last
    member_00/           a draw: a plain PEFT adapter
    .drawing/            scratch space, the lock, and what was fitted; removed when all is done

Draw n of source s is member n · S + s of S sources: the first members of a folder are draws from all of them. Draws are
written one by one, so that never more than one is in memory, and each is the same whichever others there are. A run
that was killed goes on: finished draws are compared with their checksums and kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from lm_eval_lora_ensemble.disk import read_json, refuse_file, sha256, write_json, writing
from lm_eval_lora_ensemble.ensemble import manifest
from lm_eval_lora_ensemble.ensemble.adapters.folder import CONFIG, WEIGHTS, check_adapter
from lm_eval_lora_ensemble.ensemble.manifest import Manifest, MemberEntry, Provenance
from lm_eval_lora_ensemble.ensemble.members import DRAWING
from lm_eval_lora_ensemble.ensemble.writer import EnsembleWriter, member_name
from lm_eval_lora_ensemble.errors import EnsembleError, Interrupted
from lm_eval_lora_ensemble.harness.arguments import parse_model_args
from lm_eval_lora_ensemble.harness.provenance import versions
from lm_eval_lora_ensemble.posterior.contract import AdapterState, ListedPosterior, Posterior, Source
from lm_eval_lora_ensemble.posterior.generators import generator_of
from lm_eval_lora_ensemble.posterior.plan import DRAWS, Settings, draws_each
from lm_eval_lora_ensemble.posterior.registry import METHODS, Method
from lm_eval_lora_ensemble.posterior.sources import find_source, read_sources

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.posterior.data import TaskData

SCRATCH = ".drawing"
_MAX_BYTES = 16 << 20


def draw(method: str, adapters: str | Path, **settings: Any) -> Path:
    """Draw members and write them as an ensemble folder; docs/draw.md has the methods and what each takes.

    Args:
        method: its name.
        adapters: the source: an ensemble folder, one adapter folder, a Hub id, or a training run with kept snapshots.
        **settings: ``draws``, ``seed``, ``output`` (default ``drawn``), ``member`` …, and the method's own options.

    Returns:
        The folder. What is finished in it already is kept.

    Raises:
        EnsembleError: no such method or option, a source that it cannot draw from, or a folder of something else.
        Interrupted: Ctrl-C; finished draws are kept.

    Example:
        >>> from lm_eval_lora_ensemble import draw
        >>> folder = draw("dropout", "ensemble", p=0.1, draws_per_member=2, output="drawn")
        >>> sorted(path.name for path in folder.glob("member_*"))
        ['member_00', 'member_01', 'member_02', 'member_03']
    """
    chosen = METHODS.find(method)
    asked = Settings.of(chosen, settings)
    found = find_source(
        str(adapters), asked.command["member"], everything=chosen.needs in ("snapshots", "state")
    )
    each = draws_each(chosen, len(found.places), asked, str(adapters))
    sources = read_sources(
        found, chosen, kept=asked.command.get("kept"), pretrained=asked.command["pretrained"]
    )
    _refuse_inside(Path(asked.command["output"]).expanduser(), Path(adapters).expanduser())
    recipe = found.listed.recipe if found.listed else {}
    return Drawing(chosen, asked, each, sources, recipe).run()


def _refuse_inside(output: Path, source: Path) -> None:
    """Refuse to draw into the folder that is drawn from: it would no longer be what it is."""
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise EnsembleError(
            f"output={output} lies in {source}, which is drawn from; give a folder outside it"
        )


@dataclass(frozen=True)
class Fitted:
    """What is known of a source whose posterior has been fitted.

    Attributes:
        draws: how many it gives.
        settings: the posterior's, as JSON.
    """

    draws: int
    settings: dict[str, Any]


class Drawing:
    """One run of ``draw``.

    Args:
        method: what draws.
        settings: what was asked for.
        each: draws from each source; None if the method decides it.
        sources: all checked.
        recipe: what the sources were trained by, where that is known.
    """

    def __init__(
        self,
        method: Method,
        settings: Settings,
        each: int | None,
        sources: Sequence[Source],
        recipe: Mapping[str, Any],
    ) -> None:
        self.method = method
        self.settings = settings
        self.each = each
        self.sources = sources
        self.recipe = recipe
        self.seed: int = settings.command["seed"]
        self.writer = EnsembleWriter(
            Path(settings.command["output"]).expanduser().absolute(), SCRATCH, "drawing"
        )
        self.path = self.writer.path

    @property
    def asked(self) -> dict[str, Any]:
        """What decides every byte of the draws: the content of draw.json."""
        return {
            "method": self.method.name,
            "seed": self.seed,
            "draws": self.each,
            "base_model": self.sources[0].base_model,
            "options": self.settings.of_the_fit,
            "sources": [{"name": source.name, "sha256": source.sha256} for source in self.sources],
        }

    def run(self) -> Path:
        """Draw what is not there yet, and write the manifest."""
        self._refuse_another()
        if self.writer.complete:
            for name in [entry.name for entry in Manifest.read(self.path).members]:
                self._verify(name)
            return self.path
        with self._claimed():
            self._draw_all()
        return self.path

    def _draw_all(self) -> None:
        if self.writer.complete:  # by another process, meanwhile
            return
        fitted = [self._draw_from(index) for index in range(len(self.sources))]
        names = [member_name(i) for i in range(fitted[0].draws * len(self.sources))]
        self.writer.finish(self._manifest(names, fitted))

    def _refuse_another(self) -> None:
        """Refuse a folder that something else fills, or that other settings have begun."""
        path = self.path / DRAWING
        if not path.is_file():
            others = (
                sorted(p.name for p in self.path.iterdir() if p.name != SCRATCH and not _is_half_written(p))
                if self.path.is_dir()
                else []
            )
            refuse_file(self.path, f"output={self.path}")
            if others:
                raise EnsembleError(
                    f"{self.path} holds {others[0]} but no {DRAWING}, so nothing was drawn into it; give another "
                    "output="
                )
            return
        was, now = read_json(path, _MAX_BYTES), _as_json(self.asked)
        changed = _changes(was, now)
        if changed:
            raise EnsembleError(
                f"{self.path} was drawn with other settings ({', '.join(changed)}); give the same to go on, or another "
                "output="
            )

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """Keep other processes off the folder; after an error before the first draw, leave nothing behind."""
        created = not self.path.exists()
        with writing(self.path):
            self.writer.scratch.mkdir(parents=True, exist_ok=True)
        with self.writer.lock("members"):
            self._refuse_another()  # another process may have begun since
            for half in filter(_is_half_written, list(self.path.iterdir())):
                half.unlink(missing_ok=True)
            try:
                yield
            except EnsembleError:
                if not any(self.path.glob("member_*")):
                    (self.path / DRAWING).unlink(missing_ok=True)
                    shutil.rmtree(self.path if created else self.writer.scratch, ignore_errors=True)
                raise
            except KeyboardInterrupt:
                raise Interrupted(
                    f"finished draws are kept in {self.path}; the same command goes on from there"
                ) from None

    def _draw_from(self, index: int) -> Fitted:
        """Write the draws from one source that are not there yet."""
        known = self._known(index)
        if known and all(self.writer.finished(self._name(index, number)) for number in range(known.draws)):
            for number in range(known.draws):
                self._verify(self._name(index, number))
            return known
        source = self.sources[index]
        posterior = self.method.fit(source, self._data(source), **self.settings.options)
        fitted = Fitted(self._n_draws(posterior), _as_json(posterior.settings))
        self._remember(index, fitted, known)
        for number in tqdm(range(fitted.draws), desc=f"{self.method.name} of {source.name}", unit="draw"):
            name = self._name(index, number)
            if self.writer.finished(name):
                self._verify(name)
            else:
                self._write(name, index, number, posterior)
        return fitted

    def _name(self, index: int, number: int) -> str:
        return member_name(number * len(self.sources) + index)

    def _data(self, source: Source) -> TaskData | None:
        """Return the task's documents, for methods that fit on some; the one place that makes them."""
        if not self.method.task:
            return None
        from lm_eval_lora_ensemble.posterior.data import TaskData

        command = self.settings.command
        return TaskData(
            source,
            command["task"],
            split=command["split"],
            limit=command["limit"],
            num_fewshot=command["num_fewshot"],
            model_args=parse_model_args(command["model_args"]),
            include_path=command["include_path"],
        )

    def _n_draws(self, posterior: Posterior) -> int:
        if not isinstance(posterior, ListedPosterior):
            return DRAWS if self.each is None else self.each
        if self.each is None:
            return min(DRAWS, len(posterior))
        if self.each > len(posterior):
            raise EnsembleError(
                f"{self.method.name} has {len(posterior)} members to give here, not {self.each}; ask for fewer draws"
            )
        return self.each

    def _known(self, index: int) -> Fitted | None:
        """Return what an earlier run has fitted to a source."""
        path = self.writer.scratch / f"fitted_{index}.json"
        return Fitted(**read_json(path, _MAX_BYTES)) if path.is_file() else None

    def _remember(self, index: int, fitted: Fitted, known: Fitted | None) -> None:
        """Keep what was fitted, so that no draws of two fits stand side by side."""
        if known is not None and known != fitted:
            differing = ", ".join(_changes(known.settings, fitted.settings)) or "draws"
            raise EnsembleError(
                f"{self.method.name} has found another posterior of {self.sources[index].name} than the run that began "
                f"{self.path} ({differing}); the machine or a package has changed: give another output="
            )
        with writing(self.path):
            if not (self.path / DRAWING).is_file():
                write_json(self.path / DRAWING, self.asked)
            write_json(
                self.writer.scratch / f"fitted_{index}.json",
                {"draws": fitted.draws, "settings": fitted.settings},
            )

    def _write(self, name: str, index: int, number: int, posterior: Posterior) -> None:
        source = self.sources[index]
        origin = None
        if isinstance(posterior, ListedPosterior):
            state, origin = posterior.take(number), posterior.origin(number)
        else:
            state = posterior.draw(generator_of(self.seed, self.method.name, source.sha256, number))
        of = origin or source
        entry = MemberEntry(
            name=name,
            folder=name,
            draw=number,
            provenance=Provenance(of.name, str(of.folder), of.sha256),
        )
        config = dict(posterior.config)
        config["base_model_name_or_path"] = config.get("base_model_name_or_path") or source.base_model

        def fill(folder: Path) -> None:
            self._refuse_unsound(state, number)
            write_json(folder / CONFIG, config)
            tensors = {key: tensor.contiguous() for key, tensor in state.items()}
            save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
            check_adapter(folder, folder.resolve())
            self.writer.write_entry(entry, folder)

        self.writer.write_adapter(name, fill)

    def _refuse_unsound(self, state: AdapterState, number: int) -> None:
        for key, tensor in state.items():
            if not bool(torch.isfinite(tensor).all()):
                raise EnsembleError(
                    f"draw {number} of {self.method.name} has a value in {key} that is not finite; ask for less spread"
                )

    def _verify(self, name: str) -> None:
        """Compare a finished draw with its checksums.

        Raises:
            EnsembleError: it is not what was drawn.
        """
        for relative, expected in self.writer.entry(name).files.items():
            path = self.path / relative
            if not path.is_file() or sha256(path) != expected:
                raise EnsembleError(
                    f"{path} is not what was drawn; remove {self.path / name} and {self.path / manifest.FILE_NAME}, "
                    "and run the same command again"
                )

    def _manifest(self, names: Sequence[str], fitted: Sequence[Fitted]) -> Manifest:
        return Manifest(
            base_model=self.sources[0].base_model,
            revision=self.sources[0].revision,
            members=self.writer.entries(names),
            recipe=dict(self.recipe),
            versions=versions(),
            method=manifest.Method(
                name=self.method.name,
                settings=_merged({s.name: f.settings for s, f in zip(self.sources, fitted, strict=True)}),
                options=_as_json(self.settings.of_the_fit),
                seed=self.seed,
            ),
        )


def _is_half_written(path: Path) -> bool:
    """Whether a file is what a kill left of the first writing of draw.json."""
    return path.name.startswith(f".{DRAWING}.") and path.suffix == ".tmp"


def _as_json(value: Any) -> Any:
    """Return what JSON makes of a value: what a file will say, for comparisons with one.

    Raises:
        ValueError, TypeError: JSON has no such value; a method's slip.
    """
    return json.loads(json.dumps(value, allow_nan=False))


def _changes(was: Any, now: Mapping[str, Any]) -> list[str]:
    """Return ``key: old → new`` of every entry that differs, one level down in ``options``."""
    if not isinstance(was, dict):
        return ["draw.json"]
    said = []
    for key in {**was, **now}:
        old, new = was.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            said += _changes(old, new)
        elif isinstance(old, (list, dict)) or isinstance(new, (list, dict)):
            said.append(f"{key} changed")
        else:
            said.append(f"{key}: {old} → {new}")
    return said


def _merged(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings of all sources' posteriors in one: by source's name where they differ."""
    first = next(iter(settings.values()))
    merged: dict[str, Any] = {}
    for key in first:
        values = {name: one.get(key) for name, one in settings.items()}
        same = all(value == first[key] for value in values.values())
        merged[key] = first[key] if same else values
    return merged

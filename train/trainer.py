"""The training loop: epochs, steps, and what is written when."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval_lora_ensemble.train import adapters, base, examples
from lm_eval_lora_ensemble.train.card import model_card
from lm_eval_lora_ensemble.train.folder import (
    METRICS,
    EnsembleFolder,
    epoch_name,
    write_text,
    writing,
)
from lm_eval_lora_ensemble.train.joint import JointEngine
from lm_eval_lora_ensemble.train.layout import Layout, tree_saves
from lm_eval_lora_ensemble.train.order import Order
from lm_eval_lora_ensemble.train.plain import PlainEngine
from lm_eval_lora_ensemble.train.validation import Validation
from tqdm import tqdm

from lm_eval_lora_ensemble.errors import EnsembleError

if TYPE_CHECKING:
    from lm_eval_lora_ensemble.train.engine import Engine
    from lm_eval_lora_ensemble.train.recipe import Recipe

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where one member stands, besides its optimiser.

    Attributes:
        loss_sum: sum of the data losses of the current epoch's steps.
        records: one line an epoch: step, mean training loss, validation measures.
        best_epoch: the epoch of the lowest validation NLL, None before the first.
        stopped: the epoch after which early stopping ended it, None while it trains.
    """

    loss_sum: float = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    stopped: int | None = None


class Trainer:
    """Trains some members of a recipe to their end.

    Args:
        recipe: the run's recipe.
        folder: the ensemble's folder.
        members: seed of each member to train by name.
    """

    def __init__(self, recipe: Recipe, folder: EnsembleFolder, members: dict[str, int]) -> None:
        self.recipe = recipe
        self.folder = folder
        self.members = members
        self.base = base.load(recipe, base.pick_device(recipe.device))
        data = examples.load(recipe, self.base)
        use_tree = takes_tree_rows(self.base.model)
        self.layout = Layout(
            data.training,
            gold_only=recipe.objective == "answer",
            use_tree=use_tree and tree_saves(data.training) > 1,
        )
        self.order = Order(
            self.layout.lengths(),
            recipe.batch_size,
            recipe.gradient_accumulation,
            seed=recipe.seed,
            shuffle=recipe.shuffle,
            length_groups=recipe.length_groups,
        )
        self.validation = (
            Validation(data.validation, recipe.batch_size, use_tree=use_tree) if data.validation else None
        )
        steps = self.order.steps_per_epoch * recipe.epochs
        self.total_steps = min(steps, recipe.max_steps or steps)
        self.progress = {name: Progress() for name in members}
        self.step = 0
        self.engine = self._engine()

    def _engine(self) -> Engine:
        model = adapters.attach(self.base, self.recipe, self.members)
        self.config = model.peft_config
        for name, folder in zip(self.members, adapters.initial_folders(self.recipe), strict=False):
            adapters.load_initial(model, name, folder)
        obstacle = adapters.stacking_obstacle(model, self.recipe)
        if self.recipe.engine == "joint" and obstacle:
            raise EnsembleError(f"engine=joint: {obstacle}; use engine=auto")
        if self.recipe.engine == "plain" or obstacle:
            log.info("Members train one after another (%s)", obstacle or "engine=plain")
            return PlainEngine(model, self.members, self.recipe, self.layout, self.total_steps)
        return JointEngine(model, self.members, self.recipe, self.layout, self.total_steps)

    @property
    def active(self) -> list[str]:
        """The members that still train."""
        return [name for name, progress in self.progress.items() if progress.stopped is None]

    def run(self) -> None:
        """Train to the end and write every member's files."""
        self.folder.claim()
        if self.step == 0:
            self._validate(0)
        per_epoch = self.order.steps_per_epoch
        with self._bar() as bar:
            while self.step < self.total_steps and self.active:
                epoch = self.step // per_epoch + 1
                for batches in self.order.epoch(epoch, list(self.members.values()))[self.step % per_epoch :]:
                    losses = self.engine.step(batches, self.step, self.active)
                    self._record(losses, bar)
                    if self.step == self.total_steps:
                        break
                self._end_epoch(epoch)
        for name, progress in self.progress.items():
            epochs = len(progress.records) - 1
            final = progress.best_epoch if self.recipe.early_stopping and progress.best_epoch else epochs
            self.folder.finish_member(name, self.members[name], epochs, final)

    def _bar(self) -> tqdm[Any]:
        return tqdm(
            total=self.total_steps, initial=self.step, desc="training", unit="step", dynamic_ncols=True
        )

    def _record(self, losses: dict[str, float], bar: tqdm[Any]) -> None:
        self.step += 1
        for name, loss in losses.items():
            self.progress[name].loss_sum += loss
        bar.set_postfix_str("loss " + " ".join(f"{loss:.3f}" for loss in losses.values()), refresh=False)
        bar.update()

    def _end_epoch(self, epoch: int) -> None:
        """Write the epoch's adapters, then its measures."""
        for name in self.active:
            card = model_card(
                self.recipe, self.base.name, name, seed=self.members[name], epochs=epoch, steps=self.step
            )
            self.folder.write_epoch(
                name,
                epoch,
                lambda path, name=name, card=card: adapters.save(  # type: ignore[misc]
                    path, self.engine.weights(name), self.config[name], card, self.recipe.as_yaml()
                ),
            )
        self._validate(epoch)

    def _validate(self, epoch: int) -> None:
        """Measure the active members and write their validation loglikelihoods and records."""
        active = self.active
        lls = self.validation.loglikelihoods(self.engine, active) if self.validation else None
        for i, name in enumerate(active):
            progress = self.progress[name]
            record: dict[str, Any] = {"epoch": epoch, "step": self.step}
            if epoch:
                steps = self.step - (epoch - 1) * self.order.steps_per_epoch
                record["loss"] = progress.loss_sum / steps
            if self.validation and lls is not None:
                record |= self.validation.measures(lls[i])
                self._write_validation(name, epoch, lls[i])
            progress.loss_sum = 0.0
            progress.records.append(record)
            self._stop_early(name, epoch)
        self._write_metrics(epoch)

    def _write_validation(self, name: str, epoch: int, lls: np.ndarray) -> None:
        folder = self.folder.member(name) / "validation"
        with writing(self.folder.path):
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{epoch_name(epoch)}.npy", lls)

    def _stop_early(self, name: str, epoch: int) -> None:
        """Stop a member whose validation NLL has not improved for ``early_stopping`` epochs."""
        progress = self.progress[name]
        if not epoch or "nll" not in progress.records[-1]:
            return
        best = progress.best_epoch
        if best is None or progress.records[epoch]["nll"] < progress.records[best]["nll"]:
            progress.best_epoch = epoch
        elif self.recipe.early_stopping and epoch - best >= self.recipe.early_stopping:
            progress.stopped = epoch

    def _write_metrics(self, epoch: int) -> None:
        """Append the epoch's line to metrics.jsonl."""
        members = {name: progress.records[-1] for name, progress in self.progress.items()}
        ensemble = None
        if self.validation:
            latest = [
                np.load(self.folder.member(name) / "validation" / f"{epoch_name(record['epoch'])}.npy")
                for name, record in members.items()
            ]
            ensemble = self.validation.ensemble_measures(np.stack(latest))
        path = self.folder.path / METRICS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:epoch] if path.is_file() else []
        lines.append(
            json.dumps({"epoch": epoch, "step": self.step, "members": members, "ensemble": ensemble}) + "\n"
        )
        with writing(self.folder.path):
            write_text(path, "".join(lines))


def takes_tree_rows(model: Any) -> bool:
    """Whether the model's attention takes an arbitrary mask over a whole row."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return config._attn_implementation in ("sdpa", "eager") and (not window or window >= 4096)


def train_members(recipe: Recipe) -> Path:
    """Train the members of a recipe and return the ensemble's folder.

    Raises:
        EnsembleError: for anything the user can mend: see the message.
    """
    folder = EnsembleFolder(recipe)
    folder.check_recipe()
    if folder.complete:
        log.info("%s is complete; nothing to do", folder.path)
        return folder.path
    trainer = Trainer(recipe, folder, adapters.names_of(recipe, range(recipe.members)))
    trainer.run()
    folder.finish(trainer.base.name)
    return folder.path

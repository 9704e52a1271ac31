"""The training loop: epochs, steps, and what is written when."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from lm_eval_lora_ensemble.disk import writing
from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.train import adapters, base, examples
from lm_eval_lora_ensemble.train.card import model_card
from lm_eval_lora_ensemble.train.checkpoint import Checkpoints
from lm_eval_lora_ensemble.train.joint import JointEngine
from lm_eval_lora_ensemble.train.layout import Layout
from lm_eval_lora_ensemble.train.optimiser import learning_rate
from lm_eval_lora_ensemble.train.order import Order
from lm_eval_lora_ensemble.train.plain import PlainEngine
from lm_eval_lora_ensemble.train.scale import ChoiceScale
from lm_eval_lora_ensemble.train.snapshots import is_due, refuse_late_start
from lm_eval_lora_ensemble.train.temperatures import describe, final_epoch
from lm_eval_lora_ensemble.train.trackers import Trackers
from lm_eval_lora_ensemble.train.tree import failed_trial, why_no_tree_rows
from lm_eval_lora_ensemble.train.validation import Validation, assemble_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from lm_eval_lora_ensemble.train.engine import Engine
    from lm_eval_lora_ensemble.train.folder import EnsembleFolder
    from lm_eval_lora_ensemble.train.order import MicroBatch
    from lm_eval_lora_ensemble.train.recipe import Recipe

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where one member stands, besides its optimiser.

    Attributes:
        loss_sum: sum of the data losses of the current epoch's steps.
        records: one line an epoch: step, mean training loss, validation measures.
        best_epoch: the epoch of the lowest validation NLL, None before the first.
        stopped: whether early stopping has ended it.
    """

    loss_sum: float = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    stopped: bool = False


class Trainer:
    """Trains some members of a recipe to their end.

    Args:
        recipe: the run's recipe.
        folder: the ensemble's folder.
        members: seed of each member to train by name.
        device: where.
    """

    def __init__(
        self, recipe: Recipe, folder: EnsembleFolder, members: dict[str, int], device: torch.device
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.members = members
        self.base = base.load(recipe, device)
        data = examples.load(recipe, self.base)
        scale = ChoiceScale.of(recipe)
        self.layout = Layout(
            data.training,
            gold_only=recipe.objective == "answer",
            use_tree=recipe.objective == "choices" and self._use_tree(data.training),
            dtype=self.base.model.dtype,
            scale=scale,
        )
        self.order = Order(
            self.layout.lengths(),
            recipe.batch_size,
            recipe.gradient_accumulation,
            seed=recipe.seed,
            shuffle=recipe.shuffle,
            length_groups=recipe.length_groups,
        )
        self.validation, self.documents = None, None
        if data.validation:
            self.documents = describe(data)
            self.validation = Validation(
                data.validation,
                recipe.batch_size,
                use_tree=self._use_tree(data.validation),
                dtype=self.base.model.dtype,
                scale=scale,
            )
        steps = self.order.steps_per_epoch * recipe.epochs
        self.total_steps = min(steps, recipe.max_steps or steps)
        refuse_late_start(recipe, self.total_steps)
        self.progress = {name: Progress() for name in members}
        self.step = 0
        self.tokens = 0  # input tokens of this process, for the progress bar
        self.engine = self._engine()
        self.checkpoints = Checkpoints(folder.scratch, recipe.keep_checkpoints)

    def _use_tree(self, documents: Sequence[examples.Example]) -> bool:
        reason = why_no_tree_rows(self.base, documents) or self._failed_trial
        if reason:
            log.info("Training and measuring on one row a choice: %s", reason)
        return reason is None

    @cached_property
    def _failed_trial(self) -> str | None:
        return failed_trial(self.base)

    def _engine(self) -> Engine:
        """Attach the members' adapters, and choose how they are trained."""
        model = adapters.attach(self.base, self.recipe, self.members)
        self.config = model.peft_config
        initial = adapters.initial_folders(self.recipe, self.base.name)
        if initial:
            for name in self.members:
                adapters.load_initial(model, name, initial[self.folder.names.index(name)])
        obstacle = adapters.stacking_obstacle(model, self.recipe)
        if self.recipe.engine == "joint" and obstacle:
            raise EnsembleError(f"engine=joint cannot train this recipe: {obstacle}; use engine=auto")
        if self.recipe.engine == "plain" or obstacle:
            log.info("Training the members one after another: %s", obstacle or "engine=plain")
            return PlainEngine(model, self.members, self.recipe, self.layout, self.total_steps)
        return JointEngine(model, self.members, self.recipe, self.layout, self.total_steps)

    @property
    def active(self) -> list[str]:
        """The members that still train."""
        return [name for name, progress in self.progress.items() if not progress.stopped]

    def run(self) -> None:
        """Go on from the newest checkpoint, train to the end and write every member's files."""
        self.folder.begin()
        if self.documents:
            for name in self.members:
                self.folder.write_documents(name, self.documents)
        self._resume()
        if self.step == 0:
            self._measure(0)
        with Trackers(self.recipe, self.folder) as trackers, self._bar() as bar:
            while self.step < self.total_steps and self.active:
                self._run_epoch(trackers, bar)
                self._save()
        for name, progress in self.progress.items():
            epochs = progress.records[-1]["epoch"]
            final = final_epoch(progress.records, best=self.recipe.early_stopping is not None)
            self.folder.finish_member(name, self.members[name], epochs, final)

    def _run_epoch(self, trackers: Trackers, bar: tqdm[Any]) -> None:
        """Take the steps left of the present epoch, then write its adapters and measures."""
        per_epoch, active = self.order.steps_per_epoch, self.active
        epoch, done = self.step // per_epoch + 1, self.step % per_epoch
        steps = self.order.epoch(epoch, list(self.members.values()))
        end = min(self.total_steps, epoch * per_epoch)
        for batches in steps[done : end - (epoch - 1) * per_epoch]:
            losses = self.engine.step(batches, self.step, active)
            rate = learning_rate(self.recipe, self.step, self.total_steps)
            self._record(losses, batches, bar)
            trackers.losses(losses, rate, self.step)
            if is_due(self.recipe, self.step, self.total_steps):
                for name in active:
                    self.folder.write_snapshot(name, self.step, self._adapter_files(name, epoch))
            every = self.recipe.checkpoint_steps
            if every and self.step % every == 0 and self.step != end:
                self._save()
        self._end_epoch(epoch)
        trackers.measures({name: self.progress[name].records[-1] for name in active}, self.step)

    def _resume(self) -> None:
        """Take up the newest checkpoint that all members of this process have."""
        names = list(self.members)
        step = self.checkpoints.newest(names)
        if step is None:
            self.checkpoints.refuse_apart(names)
            return
        for name in names:
            tensors, progress = self.checkpoints.load(name, step)
            self.engine.optimiser(name).load_state(tensors)
            self.progress[name] = Progress(**progress)
            self.folder.write_records(name, self.progress[name].records)
        self.step = step
        log.info("Going on from step %d of %d", step, self.total_steps)

    def _save(self) -> None:
        """Write a checkpoint of every member."""
        states = {
            name: (self.engine.optimiser(name).state(), asdict(self.progress[name])) for name in self.members
        }
        with writing(self.folder.path):
            self.checkpoints.save(self.step, states)

    def _bar(self) -> tqdm[Any]:
        return tqdm(
            total=self.total_steps, initial=self.step, desc="training", unit="step", dynamic_ncols=True
        )

    def _record(self, losses: dict[str, float], batches: list[MicroBatch], bar: tqdm[Any]) -> None:
        """Count a step, and show every member's loss and the input tokens per second."""
        self.step += 1
        for name, loss in losses.items():
            self.progress[name].loss_sum += loss
        rows = self.layout.rows_per_document * len(losses)
        self.tokens += sum(len(part.documents[0]) * rows * part.length for part in batches)
        speed = self.tokens / max(bar.format_dict["elapsed"], 1e-9)
        shown = " ".join(f"{loss:.3f}" for loss in losses.values())
        bar.set_postfix_str(f"{speed:.0f} tokens/s, loss {shown}", refresh=False)
        bar.update()

    def _end_epoch(self, epoch: int) -> None:
        """Write the epoch's adapters, then its measures."""
        for name in self.active:
            self.folder.write_epoch(name, epoch, self._adapter_files(name, epoch))
        self._measure(epoch)

    def _adapter_files(self, name: str, epoch: int) -> Callable[[Path], None]:
        """Return what writes a member's adapter as it is now, in the course of an epoch, into an empty folder."""
        card = model_card(
            self.recipe, self.base.name, name, seed=self.members[name], epochs=epoch, steps=self.step
        )
        return partial(
            adapters.save,
            weights=self.engine.weights(name),
            config=self.config[name],
            card=card,
            recipe_yaml=self.recipe.as_yaml(operational=False),
            posterior=self.engine.optimiser(name).posterior(),
        )

    def _measure(self, epoch: int) -> None:
        """Measure the active members on the validation set and write their records."""
        active = self.active
        lls = None
        if self.validation:
            # Before the first step all members are the base model, unless they start from adapters.
            equal = epoch == 0 and not self.recipe.initial_adapters
            lls = self.validation.loglikelihoods(self.engine, active[:1] if equal else active)
            lls = np.repeat(lls, len(active), axis=0) if equal else lls
        for i, name in enumerate(active):
            progress = self.progress[name]
            record: dict[str, Any] = {"epoch": epoch, "step": self.step}
            if epoch:
                record["loss"] = progress.loss_sum / (self.step - (epoch - 1) * self.order.steps_per_epoch)
            if self.validation and lls is not None:
                record |= self.validation.measures(lls[i])
                self._write_validation(name, epoch, lls[i])
            progress.loss_sum = 0.0
            progress.records.append(record)
            self._stop_early(progress, epoch)
            self.folder.write_records(name, progress.records)
        assemble_metrics(self.folder, self.validation)

    def _write_validation(self, name: str, epoch: int, lls: np.ndarray) -> None:
        path = self.folder.validation_file(name, epoch)
        with writing(self.folder.path):
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = self.folder.scratch / f"{name}.{path.name}"
            np.save(scratch, lls)
            scratch.replace(path)

    def _stop_early(self, progress: Progress, epoch: int) -> None:
        """Stop a member whose validation NLL has not improved for ``early_stopping`` epochs."""
        record = progress.records[-1]
        if not epoch or "nll" not in record:
            return
        best = progress.best_epoch
        if best is None or record["nll"] < progress.records[best]["nll"]:
            progress.best_epoch = epoch
        elif self.recipe.early_stopping and epoch - best >= self.recipe.early_stopping:
            progress.stopped = record["stopped"] = True

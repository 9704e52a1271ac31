"""Every step of the study, in order: a pure function of the sizes that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from stepwise.running import Step

from lm_eval_lora_ensemble.errors import EnsembleError

IN_DOMAIN, VALIDATION = "arc_easy", "arc_easy_validation"
PENALTIES = ("0", "1")
"""λ of the paper's λ‖BA‖²: without, and the value that it uses."""

EPOCHS = (1, 3, 6)
PRIOR = 0
SEEDS, MEMBERS = 3, 5
TRAINED_ON, VALIDATED_ON = 100, 160

LAST = {IN_DOMAIN: 1000, "arc_challenge": 500, "hellaswag": 500}
EARLIER = {IN_DOMAIN: 300, "arc_challenge": 100, "hellaswag": 100}
LETTERS = "commonsense_qa"
FOREIGN = {
    LETTERS: 200,
    "mmlu_astronomy_continuation": 100,
    "mmlu_conceptual_physics_continuation": 100,
    "mmlu_high_school_geography_continuation": 100,
    "mmlu_sociology_continuation": 100,
}
"""Out of domain at the last epoch only; with ARC-Challenge and HellaSwag seven tasks."""

APART = 1000
"""Between the seeds of replicates, so that no member of one is a member of another."""

_TASKS = "{study}/overfitting_study/tasks"
_STARTING, _A_STEP = 12.0, 1.25
_A_DOCUMENT = {"hellaswag": 0.17, "arc_challenge": 0.1, "commonsense_qa": 0.06}
"""Seconds of a member's step or document on two cores with AVX2 in float32, until some have been measured."""


@dataclass(frozen=True)
class Sizes:
    """What is asked for.

    Attributes:
        seeds: replicates of the whole.
        members: of each ensemble.
        trained_on: training documents, the first so many.
        validated_on: documents of the validation split that each epoch's temperature is fitted on.
        last: documents of each task at the last epoch and of the prior; the first is the in-domain one.
        earlier: of the same tasks, at the other epochs.
        foreign: further tasks at the last epoch and of the prior.
        dtype: of the base model.
    """

    seeds: int = SEEDS
    members: int = MEMBERS
    trained_on: int = TRAINED_ON
    validated_on: int = VALIDATED_ON
    last: Mapping[str, int] = field(default_factory=lambda: dict(LAST))
    earlier: Mapping[str, int] = field(default_factory=lambda: dict(EARLIER))
    foreign: Mapping[str, int] = field(default_factory=lambda: dict(FOREIGN))
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.members < 2 or self.trained_on < 4:
            raise EnsembleError("give at least one seed, two members and four training documents")
        if min([self.validated_on, *self.last.values(), *self.earlier.values(), *self.foreign.values()]) < 1:
            raise EnsembleError("give at least one document of each task")

    @classmethod
    def of_share(cls, seeds: int, share: float, dtype: str) -> Sizes:
        """Return a share of every number of documents, at least one; 1 is the study itself.

        Raises:
            EnsembleError: a share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise EnsembleError(f"--share {share:g}: give more than 0 and no more than 1")

        def part(documents: Mapping[str, int]) -> dict[str, int]:
            return {task: max(1, round(share * number)) for task, number in documents.items()}

        return cls(
            seeds,
            trained_on=max(4, round(share * TRAINED_ON)),
            validated_on=max(1, round(share * VALIDATED_ON)),
            last=part(LAST),
            earlier=part(EARLIER),
            foreign=part(FOREIGN),
            dtype=dtype,
        )

    @property
    def is_trial(self) -> bool:
        """Whether something is smaller than in the study itself, so that its numbers say nothing."""
        whole = Sizes()
        return self.trained_on < TRAINED_ON or any(
            number < getattr(whole, name)[task]
            for name in ("last", "earlier", "foreign")
            for task, number in getattr(self, name).items()
        )

    def documents(self, epoch: int) -> dict[str, int]:
        """Return how many documents of which task an epoch is evaluated on, those of its temperature included."""
        own = {**self.last, **self.foreign} if epoch in (PRIOR, EPOCHS[-1]) else dict(self.earlier)
        return {VALIDATION: self.validated_on, **own}


def steps(sizes: Sizes) -> list[Step]:
    """Return all steps, each once: the first replicate of both λ comes first, and with it the prior."""
    found = []
    for seed in range(sizes.seeds):
        for penalty in PENALTIES:
            found += list(_of_ensemble(penalty, seed, sizes))
    return found


def training_of(penalty: str, seed: int) -> str:
    """Return the name of a training: its folder's and its record's."""
    return f"train/lambda_{penalty}/seed_{seed}"


def evaluation_of(penalty: str, seed: int, epoch: int, task: str, documents: int) -> str:
    """Return the name of an evaluation: its folder's and its record's; the prior is one, whatever was trained."""
    place = "prior" if epoch == PRIOR else f"lambda_{penalty}/seed_{seed}/epoch_{epoch}"
    return f"results/{place}/{task}_{documents}"


def _of_ensemble(penalty: str, seed: int, sizes: Sizes) -> Iterator[Step]:
    name = training_of(penalty, seed)
    words = {
        "output": f"{{output}}/{name}",
        "members": sizes.members,
        "seed": APART * seed,
        "lora_l2": penalty,
        "epochs": EPOCHS[-1],
        "max_steps": "null",
        "train_limit": sizes.trained_on,
        "schedule": "constant",
        "validation_limit": 0,  # every epoch has its temperature later, from a task of its own
        "dtype": sizes.dtype,
    }
    train = ["-m", "lm_eval_lora_ensemble.cli", "train", "smollm2_arc_easy"]
    train += [f"{key}={value}" for key, value in words.items()]
    batches = EPOCHS[-1] * sizes.trained_on / 4
    yield Step(name, "train", tuple(train), _STARTING + sizes.members * batches * _A_STEP)
    is_first = penalty == PENALTIES[0] and seed == 0
    for epoch in [*([PRIOR] if is_first else []), *EPOCHS]:
        for task, documents in sizes.documents(epoch).items():
            yield _evaluation(penalty, seed, epoch, task, documents, sizes)


def _evaluation(penalty: str, seed: int, epoch: int, task: str, documents: int, sizes: Sizes) -> Step:
    name = evaluation_of(penalty, seed, epoch, task, documents)
    chosen = f"adapters={{output}}/{training_of(penalty, seed)},epoch={epoch},dtype={sizes.dtype}"
    command = ["-m", "lm_eval_lora_ensemble", "--model", "lora-ensemble", "--model_args", chosen]
    command += [
        "--tasks",
        task,
        "--limit",
        str(documents),
        "--log_samples",
        "--output_path",
        f"{{output}}/{name}",
    ]
    if task == VALIDATION:
        command += ["--include_path", _TASKS]
    scored = documents * (1 if epoch == PRIOR else sizes.members)
    kind = f"evaluate {task}" + (", prior" if epoch == PRIOR else "")
    return Step(
        name,
        kind,
        tuple(command),
        _STARTING + scored * _A_DOCUMENT.get(task, 0.085),
        name,
        (training_of(penalty, seed),),
    )

"""Every step of the study, in order: a pure function of the sizes that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from stepwise.running import Step

from lm_eval_lora_ensemble.errors import EnsembleError, nearest
from posterior_study.methods import DEEP, IN_DOMAIN, METHODS, POINT, Method

DOCUMENTS = {IN_DOMAIN: 300, "arc_challenge": 200, "hellaswag": 150}
SEEDS, MEMBERS, TRAINING_STEPS, VALIDATION = 3, (5, 10), 100, 160

FEWEST_STEPS = 20
"""Half of them at a constant rate leaves a snapshot for each of ten draws."""

APART = 1000
"""Between the seeds of replicates, so that no member of one is a member of another."""

_LAB = ["-m", "lm_eval_lora_ensemble.cli"]
_STARTING, _A_STEP = 12.0, 1.25
_A_DOCUMENT = {IN_DOMAIN: 0.085, "arc_challenge": 0.1, "hellaswag": 0.17}
"""Seconds of a member's step or document on two cores with AVX2 in float32, until some have been measured."""


@dataclass(frozen=True)
class Sizes:
    """What is asked for.

    Attributes:
        documents: of each task that is evaluated; the first is the in-domain one.
        seeds: training seeds, replicates of the whole.
        members: numbers of members; all seeds have the first, the first seed alone has the others.
        methods: names, in the order of :data:`.METHODS`.
        training_steps: of every adapter, batches of four documents.
        validation: documents that each method's temperature is fitted on.
        dtype: of the base model.
    """

    documents: Mapping[str, int] = field(default_factory=lambda: dict(DOCUMENTS))
    seeds: int = SEEDS
    members: tuple[int, ...] = MEMBERS
    methods: tuple[str, ...] = tuple(METHODS)
    training_steps: int = TRAINING_STEPS
    validation: int = VALIDATION
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                hint = nearest(name, METHODS) or ", ".join(METHODS)
                raise EnsembleError(f"--methods {name}: there is no such method here; did you mean {hint}?")
        if POINT not in self.methods:
            raise EnsembleError(f"--methods: {POINT} must be among them, every other is held against it")
        if next(iter(self.documents), None) != IN_DOMAIN:
            raise EnsembleError(f"--documents: {IN_DOMAIN}=D must come first, the members are trained on it")
        if min([self.seeds, self.validation, *self.documents.values()]) < 1 or min(self.members) < 2:
            raise EnsembleError("give at least one seed, one document of each task, and two members")
        least = max(FEWEST_STEPS, 2 * max(self.members))
        if self.training_steps < least:
            raise EnsembleError(
                f"--steps {self.training_steps}: give at least {least}, for a snapshot a draw"
            )

    @property
    def is_trial(self) -> bool:
        """Whether something is smaller than in the study itself, so that its numbers say nothing."""
        short = any(self.documents.get(task, 0) < least for task, least in DOCUMENTS.items())
        return short or self.training_steps < TRAINING_STEPS or self.validation < VALIDATION

    def columns(self) -> list[tuple[int, int]]:
        """Return (number of members, seed) of everything, in the order it is run."""
        first, *more = self.members
        return [(first, seed) for seed in range(self.seeds)] + [(n, 0) for n in more]


def steps(sizes: Sizes) -> list[Step]:
    """Return all steps, each once; those of the first seed and the first number of members come first."""
    found: dict[str, Step] = {}
    for members, seed in sizes.columns():
        for method in (METHODS[name] for name in METHODS if name in sizes.methods):
            for step in _of_method(method, members, seed, sizes):
                found.setdefault(step.name, step)
    return [replace(step, needs=tuple(n for n in step.needs if n in found)) for step in found.values()]


def source_of(method: Method, members: int, seed: int) -> str:
    """Return the training run that a method starts from; its name is its folder's and its record's."""
    return f"train/seed_{seed}/{method.source}" + (f"_{members}" if method.source == DEEP else "")


def place_of(method: Method, members: int, seed: int) -> str:
    """Return what tells a method's own steps from others: one adapter is the same whatever N."""
    return f"seed_{seed}/members_{1 if method.name == POINT else members}/{method.name}"


def evaluation_of(method: Method, members: int, seed: int, task: str, documents: int) -> str:
    """Return the name of an evaluation: its folder's and its record's."""
    return f"results/{place_of(method, members, seed)}/{task}_{documents}"


def calibration_of(method: Method, members: int, seed: int) -> str:
    """Return the name of a calibration: its record's; the temperature is in the folder of the adapters."""
    return f"calibrated/{place_of(method, members, seed)}"


def drawing_of(method: Method, members: int, seed: int) -> str:
    """Return the name of a drawing: its folder's and its record's."""
    return f"drawn/{place_of(method, members, seed)}"


def _of_method(method: Method, members: int, seed: int, sizes: Sizes) -> Iterator[Step]:
    source = source_of(method, members, seed)
    yield _training(method.source, source, members, seed, sizes)
    adapters = source
    if method.is_drawn:
        adapters = drawing_of(method, members, seed)
        words = [f"{key}={value}" for key, value in method.options]
        if method.name == "snapshot":  # spread over the constant half, not the last few alone
            words.append(f"every={_snapshots(sizes) // members}")
        if method.loads_the_base:
            words.append(f"model_args=dtype={sizes.dtype}")
        words += [f"draws={members}", f"seed={seed}", f"output={{output}}/{adapters}"]
        command = [*_LAB, "draw", method.name, f"{{output}}/{source}", *words]
        # the source's own row is calibrated first, for that writes into the folder that is read here
        needs = [source]
        if method.source in (POINT, DEEP):
            needs.append(calibration_of(METHODS[method.source], members, seed))
        yield Step(adapters, f"draw {method.name}", tuple(command), method.seconds, needs=tuple(needs))
    size = 1 if method.name == POINT else members
    calibrate = [*_LAB, "calibrate", f"{{output}}/{adapters}", IN_DOMAIN, "--limit", str(sizes.validation)]
    calibrate += ["--model_args", f"dtype={sizes.dtype}"]
    calibrated = calibration_of(method, members, seed)
    yield _scoring(calibrated, "calibrate", calibrate, IN_DOMAIN, size * sizes.validation, needs=adapters)
    for task, documents in sizes.documents.items():
        name = evaluation_of(method, members, seed, task, documents)
        evaluate = ["-m", "lm_eval_lora_ensemble", "--model", "lora-ensemble", "--tasks", task]
        evaluate += ["--model_args", f"adapters={{output}}/{adapters},dtype={sizes.dtype}"]
        evaluate += ["--limit", str(documents), "--log_samples", "--output_path", f"{{output}}/{name}"]
        yield _scoring(name, "evaluate", evaluate, task, size * documents, needs=calibrated, writes=name)


def _scoring(
    name: str, kind: str, command: Sequence[str], of: str, work: int, *, needs: str, writes: str = ""
) -> Step:
    # every scoring command starts Python, lm-eval and the model first
    guess = _STARTING + work * _A_DOCUMENT.get(of, 0.1)
    return Step(name, f"{kind} {of}", tuple(command), guess, writes, (needs,))


def _snapshots(sizes: Sizes) -> int:
    """Return how many snapshots a run keeps at least: one for each draw."""
    return max(FEWEST_STEPS // 2, *sizes.members)


def _training(kind: str, name: str, members: int, seed: int, sizes: Sizes) -> Step:
    """One recipe for all: its second half at a constant rate, with ten snapshots or more."""
    start = sizes.training_steps // 2
    size = members if kind == DEEP else 1
    words = {
        "output": f"{{output}}/{name}",
        "members": size,
        "seed": APART * seed,
        "max_steps": sizes.training_steps,
        "swa_start": start,
        "swa_learning_rate": 2.5e-4,  # where the linear course stands then
        "keep_snapshots": (sizes.training_steps - start) // _snapshots(sizes),
        "validation_limit": 0,  # every method is calibrated alike, later
        "dtype": sizes.dtype,
    }
    if kind == "ivon":
        # its largest move of a weight in a step, rate times clip radius 1e-3, is about AdamW's
        words |= {"optimizer": "ivon", "learning_rate": 0.5, "swa_learning_rate": 0.25}
    if kind == "blob":
        words["posterior"] = "blob"
    command = [*_LAB, "train", "smollm2_arc_easy", *(f"{key}={value}" for key, value in words.items())]
    guess = _STARTING + size * sizes.training_steps * _A_STEP
    return Step(name, f"train {'jointly' if size > 1 else kind}", tuple(command), guess)

"""The methods that the study compares: what each is drawn from, and with which settings."""

from __future__ import annotations

from dataclasses import dataclass

POINT, DEEP = "map", "ensemble"
"""What is trained and not drawn: one adapter, and several."""

IN_DOMAIN = "arc_easy"
"""The task that is trained on, that methods fit on, and whose validation split gives each method its temperature."""

_ON_THE_TASK = {"task": IN_DOMAIN, "choice_scores": "chars", "choice_temperature": "0.2"}


@dataclass(frozen=True)
class Method:
    """One row of every table.

    Attributes:
        name: of the row; of what is drawn, the name that ``lora-ensemble draw`` knows.
        title: in words, with what differs from the method's defaults.
        source: the training run that it is drawn from, or that it is.
        options: of ``lora-ensemble draw``; ignored for what is not drawn.
        loads_the_base: whether drawing runs the model, which then takes ``model_args``.
        seconds: that drawing takes on two cores with AVX2 in float32; only the first estimate uses it.
    """

    name: str
    title: str
    source: str
    options: tuple[tuple[str, str], ...] = ()
    loads_the_base: bool = False
    seconds: float = 15.0

    @property
    def is_drawn(self) -> bool:
        """Whether there is anything to draw."""
        return self.name not in (POINT, DEEP)


METHODS = {
    method.name: method
    for method in (
        Method(POINT, "one adapter", POINT),
        Method("snapshot", "its last snapshots", POINT),
        Method("swag", "SWAG of its snapshots, scale 0.5, K 5", POINT),
        Method("dropout", "a dropout mask a draw, p = 0.1", POINT, (("p", "0.1"),)),
        Method(DEEP, "deep ensemble: adapters of other seeds", DEEP),
        Method("multiswag", "SWAG of each of the ensemble's members, one draw of each", DEEP),
        Method(
            "tfb",
            "TFB on 64 documents, own labels",
            POINT,
            tuple(_ON_THE_TASK.items()),
            loads_the_base=True,
            seconds=240,
        ),
        Method(
            "laplace",
            "Laplace: Kronecker-factored Fisher of 64 documents, prior from 32 others",
            POINT,
            (*_ON_THE_TASK.items(), ("documents", "64"), ("prior_documents", "32")),
            loads_the_base=True,
            seconds=400,
        ),
        Method("ivon", "trained by IVON, as many steps", "ivon"),
        Method("blob", "trained by BLoB, as many steps", "blob"),
    )
}
"""The cheapest first: in this order they are run."""

"""What lm-eval's generation arguments ask for, and what of it is done to the mixture's next-token distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers.generation import logits_process as processors

from lm_eval_lora_ensemble.errors import EnsembleError, nearest
from lm_eval_lora_ensemble.precision import widest_float

# settings of a model's generation_config.json that would change what `hf` generates, and that have no counterpart here
_NOT_HERE = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "num_beams",
    "num_return_sequences",
    "penalty_alpha",
    "sequence_bias",
    "top_h",
    "watermarking_config",
)
_NEUTRAL = (None, False, 0, 1)


@dataclass(frozen=True)
class Settings:
    """How the next token is chosen; names and defaults are those of transformers' ``generate``.

    Attributes:
        do_sample: draw it, rather than take the most likely one.
        temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff: of a draw.
        repetition_penalty, no_repeat_ngram_size, min_new_tokens, suppress_tokens: of either.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    suppress_tokens: Sequence[int] | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any], defaults: Any) -> Settings:
        """Read generation arguments; what they leave out is as the model's own configuration has it.

        Args:
            arguments: lm-eval's ``generation_kwargs`` without the lengths and stop strings.
            defaults: the model's ``generation_config``.

        Raises:
            EnsembleError: an argument that is unknown, cannot be followed, or out of its range.
        """
        _refuse_beams(arguments.get("num_beams"))
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(arguments) - known - {"num_beams"})
        if unknown:
            near = nearest(unknown[0], known)
            hint = f"; did you mean {near}?" if near else f"; it takes {', '.join(sorted(known))}"
            raise EnsembleError(f"generation_kwargs: lora-ensemble cannot follow {unknown[0]}{hint}")
        for name in _NOT_HERE:
            if getattr(defaults, name, None) not in _NEUTRAL:
                raise EnsembleError(
                    f"the base model's generation_config.json sets {name}, which lora-ensemble cannot follow; "
                    "take it out of a copy of the model's folder"
                )
        # lm-eval's `hf` hands over a temperature of 0 where a task asks to sample and names none
        given = {"temperature": 0.0, **arguments} if arguments.get("do_sample") else dict(arguments)
        values = {
            name: given[name] if name in given else getattr(defaults, name, None)
            for name in known
            if name != "do_sample"
        }
        chosen = {name: value for name, value in values.items() if value is not None}
        settings = cls(do_sample=bool(arguments.get("do_sample")), **chosen)
        try:
            settings.of_distribution(), settings.of_text()
        except (TypeError, ValueError) as error:
            raise EnsembleError(f"generation_kwargs: {error}") from error
        return settings

    def of_text(self) -> list[Any]:
        """Return transformers' processors that look at the text before the token."""
        found: list[Any] = []
        if self.repetition_penalty != 1.0:
            found.append(processors.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.no_repeat_ngram_size:
            found.append(processors.NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        return found

    def of_distribution(self) -> list[Any]:
        """Return transformers' processors of a draw, in its order."""
        if not self.do_sample:
            return []
        found: list[Any] = []
        if self.temperature != 1.0:
            found.append(processors.TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            found.append(processors.TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            found.append(processors.TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            found.append(processors.MinPLogitsWarper(self.min_p))
        if self.typical_p < 1.0:
            found.append(processors.TypicalLogitsWarper(mass=self.typical_p))
        if self.epsilon_cutoff:
            found.append(processors.EpsilonLogitsWarper(self.epsilon_cutoff))
        if self.eta_cutoff:
            found.append(processors.EtaLogitsWarper(self.eta_cutoff))
        return found


class NextToken:
    """Chooses the next token of every row from the mixture's log-probabilities.

    Args:
        settings: how.
        end_tokens: token ids that end a text.
    """

    def __init__(self, settings: Settings, end_tokens: Sequence[int]) -> None:
        self._sample = settings.do_sample
        self._of_text, self._of_distribution = settings.of_text(), settings.of_distribution()
        self._min_new_tokens = settings.min_new_tokens
        self._end_tokens = list(end_tokens)
        self._suppressed = list(settings.suppress_tokens or ())

    def choose(
        self, log_probs: torch.Tensor, texts: Sequence[Sequence[int]], generated: int, draws: Sequence[float]
    ) -> torch.Tensor:
        """Return a token for each row, int64 [B].

        Args:
            log_probs: float32 [B, V], the mixture's; left as it is.
            texts: each row's tokens, prompt and what was generated.
            generated: so many tokens of each row were generated.
            draws: for each row a number in [0, 1) that decides a draw; unused where none is made.
        """
        scores = log_probs
        for process in self._of_text:
            rows = [
                process(torch.tensor([text], device=scores.device), scores[i : i + 1].clone())
                for i, text in enumerate(texts)
            ]
            scores = torch.cat(rows)
        banned = self._suppressed + (self._end_tokens if generated < self._min_new_tokens else [])
        if banned:
            scores = scores.clone()
            scores[:, banned] = -torch.inf
        if not self._sample:
            return scores.argmax(dim=-1)
        for process in self._of_distribution:
            scores = process(None, scores)
        # the inverse of the cumulative distribution: what a row draws depends on nothing but the row
        up_to = torch.softmax(scores, dim=-1, dtype=widest_float(scores.device)).cumsum(dim=-1)
        wanted = torch.tensor(draws, dtype=up_to.dtype, device=scores.device)[:, None] * up_to[:, -1:]
        return torch.searchsorted(up_to, wanted, right=True)[:, 0].clamp(max=scores.shape[-1] - 1)


def _refuse_beams(beams: Any) -> None:
    if beams not in (None, 1):
        raise EnsembleError(
            f"generation_kwargs: num_beams={beams}: lora-ensemble decodes one text at a time; leave num_beams out"
        )

"""``generate_until`` of an ensemble: lm-eval's requests in, texts that carry how sure the ensemble is out.

What is not decoding is as in lm-eval's ``hf``, by its own functions: lengths, stop strings, left truncation, thoughts.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs
from tqdm import tqdm

from lm_eval_lora_ensemble.errors import EnsembleError
from lm_eval_lora_ensemble.generation.answer import EnsembleText, Trace
from lm_eval_lora_ensemble.generation.decode import Decoder, NonFiniteLogitsError, Prompt
from lm_eval_lora_ensemble.generation.plan import Batch, plan
from lm_eval_lora_ensemble.generation.prompts import PromptReader
from lm_eval_lora_ensemble.generation.settings import NextToken, Settings
from lm_eval_lora_ensemble.generation.sides import TRIAL_TOKENS, Way, find_way, sides_of
from lm_eval_lora_ensemble.generation.stopping import StopStrings, kept_part
from lm_eval_lora_ensemble.scoring.finite import NonFiniteScoreError, refuse_nonfinite_score

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger(__name__)


class Arguments(NamedTuple):
    """What a request's generation arguments ask for.

    Attributes:
        settings: how tokens are chosen.
        until: stop strings, the end token's text included.
        max_gen_toks: at most so many new tokens.
        max_length: at most so many tokens with the prompt; None for no such limit.
    """

    settings: Settings
    until: list[str]
    max_gen_toks: int
    max_length: int | None


class TextGenerator:
    """Answers one call of ``generate_until``.

    Args:
        lm: the ensemble, a ``LoraEnsembleLM``; that module imports this one.
    """

    def __init__(self, lm: Any) -> None:
        self._lm = lm
        self._names = lm._adapter_names
        self._causal = lm.model.get_base_model() if self._names else lm.model
        self._end_tokens = _ids(self._causal.generation_config.eos_token_id)

    def generate(self, requests: Sequence[Instance], *, disable_tqdm: bool) -> list[str]:
        """Return a text for each request; each reaches ``--use_cache`` as soon as it is there.

        Raises:
            EnsembleError: generation arguments that cannot be followed.
            NonFiniteScoreError: a member's logits are NaN or infinite.
        """
        lm = self._lm
        if not requests:
            return []
        with lm._autocast(), torch.inference_mode():
            draws = _draws(requests)
            texts: list[EnsembleText | None] = [None] * len(requests)
            bar = tqdm(
                total=len(requests),
                disable=disable_tqdm or lm.rank != 0,
                desc=f"Running generate_until requests × {lm.n_members} members",
            )
            groups = Collator(
                [(*request.args, i) for i, request in enumerate(requests)],
                sort_fn=lambda request: request[2],
                group_by="gen_kwargs",
                group_fn=lambda request: request[1],
            )
            with bar:
                for group in groups.get_batched(n=0):
                    indices = [i for *_, i in group]
                    for i, text in self._group([requests[i] for i in indices], [draws[i] for i in indices]):
                        texts[indices[i]] = text
                        bar.update()
        return [text for text in texts if text is not None]

    def _group(self, requests: Sequence[Instance], draws: Sequence[Callable[[], float]]) -> Any:
        """Yield (index, text) of requests that share their generation arguments."""
        lm = self._lm
        arguments = self._arguments(requests[0].args[1])
        prompts = [
            self._prompt(request, arguments, draw) for request, draw in zip(requests, draws, strict=True)
        ]
        choose = NextToken(arguments.settings, self._end_tokens)
        stops = StopStrings(
            arguments.until,
            lambda text: lm.tokenizer.encode(text, add_special_tokens=False),
            lm.tokenizer.decode,
        )
        longest = max(len(prompt.tokens) + prompt.max_new_tokens for prompt in prompts)
        way = self._way()
        reader = self._reader(longest) if way.share else None
        decoder = self._decoder(way, reader)
        for batch in plan(
            [prompt.tokens for prompt in prompts], self._batch_size(), share=reader is not None
        ):
            yield from self._batch(decoder, requests, prompts, batch, arguments, choose, stops)

    def _batch(
        self,
        decoder: Decoder,
        requests: Sequence[Instance],
        prompts: Sequence[Prompt],
        batch: Batch,
        arguments: Arguments,
        choose: NextToken,
        stops: StopStrings,
    ) -> Any:
        lm = self._lm
        chosen = [prompts[i] for i in batch.prompts]
        try:
            for place, trace in decoder.decode(chosen, batch.shared, choose, stops.reached):
                request = requests[batch.prompts[place]]
                text = self._text(trace, arguments.until)
                lm.cache_hook.add_partial("generate_until", request.args, text)
                yield batch.prompts[place], text
        except NonFiniteLogitsError as error:
            self._refuse(error, requests[batch.prompts[error.prompt]])

    def _text(self, trace: Trace, until: Sequence[str]) -> EnsembleText:
        lm = self._lm
        tokens = trace.tokens.tolist()
        kept = kept_part(tokens, lm.tok_decode, until, lm.think_end_token)
        part = trace.part(kept.start, kept.stop)
        if kept.cut:
            part = part.ended_by("stop_string")
        pieces = [lm.tok_decode([token], skip_special_tokens=False) for token in part.tokens.tolist()]
        return EnsembleText(kept.text, part, pieces, skipped=kept.start)

    def _arguments(self, given: Mapping[str, Any]) -> Arguments:
        lm = self._lm
        if not isinstance(given, dict):
            raise EnsembleError(f"generation_kwargs: a mapping is needed, not {type(given).__name__}")
        kwargs = dict(normalize_gen_kwargs(given, lm.max_gen_toks))
        eos = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(kwargs.pop("until"), eos=eos)
        max_gen_toks = kwargs.pop("max_gen_toks")
        if not 0 < max_gen_toks < lm.max_length:
            raise EnsembleError(
                f"generation_kwargs: max_gen_toks={max_gen_toks}: with max_length={lm.max_length} from 1 to "
                f"{lm.max_length - 1} new tokens can follow a prompt"
            )
        max_length = kwargs.pop("max_length", None)
        if max_length is not None:
            logger.warning(
                "max_length in generation_kwargs counts the prompt's tokens too; max_gen_toks does not"
            )
        settings = Settings.of(kwargs, self._causal.generation_config)
        return Arguments(settings, until, max_gen_toks, max_length)

    def _prompt(self, request: Instance, arguments: Arguments, draw: Callable[[], float]) -> Prompt:
        lm = self._lm
        # one by one: whether a text begins with its own start token must not depend on the company
        ids, _ = lm.tok_batch_encode(
            [request.args[0]],
            left_truncate_len=lm.max_length - arguments.max_gen_toks,
            truncation=lm.truncation,
        )
        tokens = ids[0].tolist() or [lm.prefix_token_id]
        new = arguments.max_gen_toks
        if arguments.max_length is not None:
            new = max(1, arguments.max_length - len(tokens))
        return Prompt(tokens, new, draw)

    def _batch_size(self) -> int:
        """Return the prompts of a batch: ``batch_size``, or as many as fit with a row for every member."""
        lm = self._lm
        if lm.batch_size != "auto":
            return int(lm.batch_size)
        if not hasattr(self, "_detected"):
            self._detected = max(1, lm._detect_batch_size() // lm.n_members)
        return self._detected

    def _decoder(self, way: Way, reader: PromptReader | None) -> Decoder:
        lm = self._lm
        return Decoder(
            lm.model,
            sides_of(lm.model, self._names, lm._activate, way),
            average=lm.generation_average,
            pad_token=lm.tokenizer.pad_token_id or 0,
            end_tokens=self._end_tokens,
            reader=reader,
        )

    def _reader(self, longest: int) -> PromptReader | None:
        """Return what reads prompts of texts of up to ``longest`` tokens; None where the scoring engine cannot."""
        lm = self._lm
        packed = lm._packed_models.choose(longest)
        if isinstance(packed, str):
            return None
        return PromptReader(packed, lm._activate, n_members=lm.n_members, token_budget=packed.token_budget())

    def _way(self) -> Way:
        """Return how these members run, tried once for an ensemble."""
        lm = self._lm
        key = lm.ensemble.fingerprint
        known: tuple[str, Way] | None = getattr(lm, "_generation_way", None)
        if known is None or known[0] != key:
            reader = self._reader(TRIAL_TOKENS)
            way = find_way(
                lm.model,
                self._names,
                lm._activate,
                lambda way: self._decoder(way, reader if way.share else None),
                self._causal.get_input_embeddings().num_embeddings,
                share=reader is not None,
            )
            if lm.n_members > 1 and not way.stacked:
                logger.warning("members generate one after another, which is slower: %s", way.reason)
            known = lm._generation_way = (key, way)
        return known[1]

    def _refuse(self, error: NonFiniteLogitsError, request: Instance) -> None:
        lm = self._lm
        scores = np.zeros(lm.n_members)
        scores[error.member] = np.nan
        names = [member.name for member in lm.ensemble.members] or ["the base model"]
        try:
            refuse_nonfinite_score(0, scores, names, lm.model.dtype)
        except NonFiniteScoreError as refusal:
            raise refusal.of(request) from None


def _draws(requests: Sequence[Instance]) -> list[Callable[[], float]]:
    """Return each request's own random numbers: of lm-eval's seed, of what is asked, and of how often it was before.

    lm-eval seeds torch before it loads a model; repeats of a request follow one another.
    """
    seen: Counter[str] = Counter()
    found: list[Callable[[], float]] = []
    for request in requests:
        asked = "\0".join(map(str, (request.task_name, request.doc_id, request.idx, *request.args)))
        digest = hashlib.sha256(asked.encode("utf-8", "replace")).digest()
        found.append(_Draws((torch.initial_seed(), int.from_bytes(digest[:16], "big"), seen[asked])))
        seen[asked] += 1
    return found


class _Draws:
    """Random numbers in [0, 1) from a seed, made when the first is asked for."""

    def __init__(self, seed: Sequence[int]) -> None:
        self._seed = seed
        self._generator: np.random.Generator | None = None

    def __call__(self) -> float:
        if self._generator is None:
            self._generator = np.random.default_rng([*self._seed])
        return float(self._generator.random())


def _ids(token: int | Sequence[int] | None) -> list[int]:
    if token is None:
        return []
    return [token] if isinstance(token, int) else list(token)

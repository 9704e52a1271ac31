"""The lm-eval model ``lora-ensemble``: one base model, N LoRA adapters, one averaged likelihood."""

# ruff: noqa: E402 - the guard comes before the imports that it guards
from __future__ import annotations

from lm_eval_lora_ensemble.harness.compatibility import require_lm_eval

require_lm_eval()

import functools
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lm_eval_lora_ensemble.ensemble.hub import at_hand, refuse_missing_folder
from lm_eval_lora_ensemble.ensemble.loading import attach_members, twins
from lm_eval_lora_ensemble.ensemble.members import DEFAULT_FOLDER, Ensemble, find_ensemble
from lm_eval_lora_ensemble.ensemble.quantization import quantization_config, take_arguments
from lm_eval_lora_ensemble.ensemble.tokenizer import check_tokenizers
from lm_eval_lora_ensemble.errors import EnsembleError, shorten_errors_of_command
from lm_eval_lora_ensemble.generation.mixture import GenerationAverage
from lm_eval_lora_ensemble.harness.cache import (
    AFFECTING,
    claim_cache,
    identity_of,
    read_older_scores,
    saved_scores,
)
from lm_eval_lora_ensemble.harness.generation import TextGenerator
from lm_eval_lora_ensemble.harness.model_arguments import check_arguments
from lm_eval_lora_ensemble.harness.provenance import (
    calibration_in_use,
    in_results,
    manifest_at,
    method_of,
    recipe_of,
    scale_in_use,
)
from lm_eval_lora_ensemble.harness.saving import save_runs_whole
from lm_eval_lora_ensemble.harness.tasks import extend_tasks
from lm_eval_lora_ensemble.precision import has_fast_bfloat16
from lm_eval_lora_ensemble.scoring.choice import PackedModels
from lm_eval_lora_ensemble.scoring.finite import NonFiniteScoreError, refuse_nonfinite_score
from lm_eval_lora_ensemble.scoring.forward import PackedModel
from lm_eval_lora_ensemble.scoring.loglikelihood import Average, EnsembleLoglikelihood, Score
from lm_eval_lora_ensemble.scoring.packed import PackedScorer, Work
from lm_eval_lora_ensemble.scoring.plain import Batch, score_plain
from lm_eval_lora_ensemble.tree.requests import TokenRequest, truncate

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

# what TemplateLM hands over: ((context, continuation) or None, context tokens, continuation tokens)
EncodedRequest = tuple[tuple[str, str] | None, list[int], list[int]]

# tokens of one forward pass: enough to keep a matrix product busy, little beside the logits of `hf`
MIN_TOKENS = 1024

# whose lengths are remembered: choices of one document come one after another
_CONTEXTS = 4

_ONE_AT_A_TIME = threading.RLock()

logger = logging.getLogger(__name__)


class LoraEnsembleLM(HFLM):
    """An ensemble of LoRA adapters on one base model, as one lm-eval model.

    Args:
        pretrained: the base model; left out, it is read from the adapters.
        adapters: an ensemble folder, a folder of adapters, one adapter, a Hub id of an ensemble or an adapter
            (``org/name``, ``org/name@revision``), or a list of adapters (a string may separate them by ``;``).
            Default ``./ensemble``.
        members: use only the first N members.
        epoch: take this epoch's adapter of every member; 0 is the base model alone, the prior.
        average: ``probability`` (log-mean-exp of the members' sequence loglikelihoods: the Bayesian model
            average) or ``loglikelihood`` (their arithmetic mean: a log-opinion pool).
        generation_average: how members are weighted in the next token of a generated text: ``posterior``, by the
            probability of the text so far (the Bayesian model average), or ``equal``.
        uncertainty_metrics: report the uncertainty metrics on every task of multiple choice, whole strings or
            generated texts.
        temperature: T of the length-normalised metrics (``ece_norm`` …): ``crossfit``, on each task's own other
            folds, or ``validation``, as the manifest has it from training or from ``lora-ensemble calibrate``.
        allow_base_mismatch: accept adapters that name another base model than ``pretrained``.
        **kwargs: everything lm-eval's ``hf`` takes, except ``peft`` and ``delta``.

    Raises:
        EnsembleError: the members cannot be found or do not fit together, or an argument is wrong.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        adapters: str | Sequence[str] | None = None,
        members: int | None = None,
        epoch: int | None = None,
        average: Average = "probability",
        generation_average: GenerationAverage = "posterior",
        uncertainty_metrics: bool = True,
        temperature: str = "crossfit",
        allow_base_mismatch: bool = False,
        **kwargs: Any,
    ) -> None:
        shorten_errors_of_command(self._saved)
        own = {
            "members": members,
            "epoch": epoch,
            "average": average,
            "generation_average": generation_average,
            "uncertainty_metrics": uncertainty_metrics,
            "temperature": temperature,
            "allow_base_mismatch": allow_base_mismatch,
        }
        check_arguments(own, kwargs)
        # once: what is read of the manifest below has to be of the commit that the members are of
        place = at_hand(adapters, epoch=epoch)
        self.ensemble: Ensemble = find_ensemble(
            place,
            pretrained=pretrained,
            members=members,
            epoch=epoch,
            allow_base_mismatch=allow_base_mismatch,
        )
        self._model: Any = None  # lm-eval's name for the model; HFLM sets it
        self.average: Average = average
        self.generation_average: GenerationAverage = generation_average
        listed = manifest_at(DEFAULT_FOLDER if place is None else place)
        self.recipe, self.method = recipe_of(listed), method_of(listed)
        self.calibration = listed.calibration if listed else None
        self._uncertainty_metrics = uncertainty_metrics
        self._scale = scale_in_use(temperature, calibration_in_use(self.calibration, self.ensemble))
        self.work = Work()
        self._context_lengths: dict[str, int] = {}
        self.encoding = {name: str(kwargs[name]) for name in AFFECTING if kwargs.get(name) is not None}
        self._used: PackedModel | None = None
        if "revision" not in kwargs and self.ensemble.revision:
            kwargs["revision"] = self.ensemble.revision
        refuse_missing_folder(self.ensemble.base_model, "base model folder")
        super().__init__(pretrained=self.ensemble.base_model, **kwargs)
        self._share_documents(alike=bool(kwargs.get("tp_plan")))
        if self.rank == 0:
            if self.model.dtype == torch.bfloat16 and not has_fast_bfloat16(self.device):
                logger.warning(
                    "%s emulates bfloat16, many times slower than float32; add dtype=float32 to --model_args",
                    self.device,
                )
            for name, original in twins(self.ensemble.members).items():
                logger.warning(
                    "%s is the same adapter as %s: it adds nothing but weight to that one", name, original
                )
        self._judge()
        save_runs_whole()

    def _judge(self) -> None:
        """Let tasks judge results as this model asks: another one may have answered since."""
        extend_tasks(enabled=self._uncertainty_metrics, scale=self._scale)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Answer alone: which adapter is active, and attention's segments, are the process's state, not a call's."""
        with _ONE_AT_A_TIME:
            self._judge()
            yield

    def _share_documents(self, *, alike: bool) -> None:
        """Take this process's number among all, which lm-eval takes among its node's, and on a CPU not at all."""
        launched = getattr(self, "accelerator", None)
        if launched is not None and not alike:
            self._rank, self._world_size = launched.process_index, launched.num_processes

    @property
    def n_members(self) -> int:
        """Number of members that answer; the base model alone counts as one."""
        return max(1, len(self.ensemble.members))

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the base model as ``hf`` does, and on it, once they are known to fit, every adapter.

        Raises:
            EnsembleError: bitsandbytes' arguments cannot be followed.
        """
        self.quantization = take_arguments(kwargs)
        kwargs["quantization_config"] = quantization_config(
            self.quantization, kwargs.get("quantization_config")
        )
        super()._create_model(*args, **kwargs)
        self._attach_members()

    def _attach_members(self) -> None:
        """Put the ensemble's adapters on the base model; without any, it stays as it is.

        Raises:
            EnsembleError: a member cannot be loaded whole, or was trained with another tokenizer.
        """
        members = self.ensemble.members
        self._adapter_names: list[str] = []
        if members:
            check_tokenizers(members, self.tokenizer)
            self._fit_vocabulary()
            self._model, self._adapter_names = attach_members(self._model, self.ensemble.base_model, members)

    def change_members(self, ensemble: Ensemble) -> None:
        """Answer as another ensemble on the same base model, which stays loaded.

        Raises:
            EnsembleError: the ensemble is on another base model, a member cannot be loaded whole, or was
                trained with another tokenizer.
        """
        mine = self.ensemble
        if (ensemble.base_model, ensemble.revision) != (mine.base_model, mine.revision):
            raise EnsembleError(
                f"{mine.base_model} is loaded and the new members are on {ensemble.base_model}; "
                "start a new run for another base model"
            )
        if mine.members:
            self._model = self._model.unload()
        self.ensemble = ensemble
        self._attach_members()
        self._model.eval()
        self.__dict__.pop("_packed_models", None)

    def _fit_vocabulary(self) -> None:
        """Resize the embeddings to the tokenizer, as ``hf`` with ``peft=`` does before it loads an adapter."""
        config = self._model.config
        if getattr(config, "text_config", config).vocab_size != len(self.tokenizer):
            self._model.resize_token_embeddings(len(self.tokenizer))

    def _activate(self, member: int) -> None:
        """Let the model answer as ``member``."""
        if len(self._adapter_names) > 1:
            self._model.set_adapter(self._adapter_names[member])

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take lm-eval's cache, having made sure that it is this ensemble's.

        lm-eval keys its cache on the request's text alone, so another model's scores would be read as ours.

        Raises:
            EnsembleError: the cache holds scores of another model; it is left as it is.
        """
        self._judge()  # a run whose answers are all in the cache asks for no other
        if cache_hook.dbdict is not None:
            read_older_scores(cache_hook.dbdict)
            claim_cache(cache_hook.dbdict, identity_of(self))
        super().set_cache_hook(cache_hook)

    def _saved(self) -> str:
        """Say what of the run is saved, should it be stopped now."""
        hook = getattr(self, "cache_hook", None)
        return saved_scores(getattr(hook, "dbdict", None))

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[EnsembleLoglikelihood, bool]]:
        """Score every member on each (context, continuation).

        Returns:
            Per request the ensemble's loglikelihood, which carries the members', and whether the
            continuation is the mixture's greedy choice.

        Raises:
            NonFiniteScoreError: a member's score is NaN or infinite.
        """
        try:
            with self._answering():
                return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        except NonFiniteScoreError as error:
            # lm-eval encodes the requests in their order, one to one
            raise error.of(requests[error.index]) from None

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[EnsembleLoglikelihood]:
        """Score whole strings: each member's windows are summed first, then the members averaged.

        Windows are ``hf``'s own. Averaging last makes the result the loglikelihood of the whole string
        under the mixture, not a product of per-window mixtures.

        Raises:
            NonFiniteScoreError: a member's score is NaN or infinite.
        """
        windows: list[EncodedRequest] = []
        counts = []
        for (string,) in (request.args for request in requests):
            mine = [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(string),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows.extend(mine)
            counts.append(len(mine))
        try:
            with self._answering():
                scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        except NonFiniteScoreError as error:
            owners = [request for request, count in zip(requests, counts, strict=True) for _ in range(count)]
            raise error.of(owners[error.index]) from None
        results = []
        for request, count in zip(requests, counts, strict=True):
            parts = [next(scores)[0] for _ in range(count)]
            total = sum((part.members for part in parts), np.zeros(self.n_members))
            tokens = sum(part.tokens or 0 for part in parts)
            result = EnsembleLoglikelihood.average(total, self.average, tokens=tokens)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
            results.append(result)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate texts from the mixture of the members' next-token distributions.

        Returns:
            Per request a text that carries how sure the ensemble is of it
            (:class:`~lm_eval_lora_ensemble.generation.answer.EnsembleText`).

        Raises:
            EnsembleError: generation arguments that cannot be followed, or several members on an encoder–decoder.
            NonFiniteScoreError: a member's logits are NaN or infinite.
        """
        if self.backend == "causal":
            with self._answering():
                return TextGenerator(self).generate(requests, disable_tqdm=disable_tqdm)
        if self.n_members > 1:
            raise EnsembleError(
                f"{self.ensemble.base_model} is an encoder–decoder, from which one member alone can generate; "
                "add members=1 to --model_args"
            )
        texts: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return texts

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode as lm-eval does, each distinct context once rather than once a choice."""
        if self.backend != "causal":
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair
        kept = context.rstrip()
        if kept not in self._context_lengths:
            if len(self._context_lengths) >= _CONTEXTS:
                self._context_lengths.clear()
            self._context_lengths[kept] = len(self.tok_encode(kept))
        length = self._context_lengths[kept]
        whole = self.tok_encode(context + continuation)
        return whole[:length], whole[length:]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[EncodedRequest],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[EnsembleLoglikelihood, bool]]:
        """Score encoded requests; each result reaches ``--use_cache`` as soon as it is there.

        Raises:
            NonFiniteScoreError: a member's score is NaN or infinite; it does not reach the cache.
        """
        names = [member.name for member in self.ensemble.members] or ["the base model"]
        results: list[tuple[EnsembleLoglikelihood, bool] | None] = [None] * len(requests)
        bar = tqdm(
            total=len(requests),
            disable=disable_tqdm or self.rank != 0,
            desc=f"Running loglikelihood requests × {self.n_members} members",
        )
        with bar, torch.inference_mode():
            for i, score in self._scores(requests, override_bs):
                refuse_nonfinite_score(i, score.loglikelihoods, names, self.model.dtype)
                # an encoder–decoder's continuation is cut to max_length, a causal model's is never longer
                tokens = min(len(requests[i][2]), self.max_length)
                value = EnsembleLoglikelihood.average(score.loglikelihoods, self.average, tokens=tokens)
                results[i] = (value, score.is_greedy)
                texts = requests[i][0]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, results[i])
                bar.update()
        missing = results.count(None)
        if missing:
            raise RuntimeError(f"{missing} of {len(requests)} requests were not scored")
        return [result for result in results if result is not None]

    def _scores(
        self, requests: Sequence[EncodedRequest], override_bs: int | None
    ) -> Iterator[tuple[int, Score]]:
        """Score by the packed path where it is exact for this model and these requests, else by the plain one."""
        tokens = [self._token_request(context, continuation) for _, context, continuation in requests]
        if not tokens:
            return
        longest = max(len(request.tokens) for request in tokens)
        packed = self._packed_models.choose(longest)
        self._used = None if isinstance(packed, str) else packed
        if not isinstance(packed, str):
            scorer = PackedScorer(
                packed,
                self._activate,
                n_members=self.n_members,
                token_budget=self._token_budget(packed, longest, override_bs),
            )
            with self._autocast():
                yield from scorer.score(tokens)
            self.work = scorer.work
            return
        logger.warning("scoring request by request, which is slower: %s", packed)
        batch_size = self.batch_size if self.batch_size != "auto" else override_bs
        yield from score_plain(
            tokens,
            self._forward_plain,
            n_members=self.n_members,
            batch_size=batch_size or self._detect_batch_size(),
            device=self.device,
            encoder_decoder=self.backend == "seq2seq",
        )

    @functools.cached_property
    def _packed_models(self) -> PackedModels:
        """What can run passes; trials are made with the last member."""
        last = self.n_members - 1
        return PackedModels(
            self.model,
            device=self._device_of_model(),
            activate=lambda: self._activate(last),
            whole_logits=self._whole_logits,
            autocast=self._autocast,
            dtype=self.mixed_precision_dtype,
        )

    def _engine(self) -> dict[str, Any] | None:
        """Say how requests were scored last, for the results file; None before any, or request by request."""
        if self._used is None:
            return None
        return {"attention": self._used.attention, **self._used.tuning.as_mapping()}

    def _device_of_model(self) -> torch.device:
        """Return where the computing is done; a base with offloaded layers names no device of its own."""
        return self.device if self.model.device.type == "meta" else self.model.device

    def _whole_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model_call(tokens.to(self.device))
        return logits

    def _autocast(self) -> torch.autocast:
        """Autocast as ``hf`` does in its own forward."""
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    def _token_budget(self, packed: PackedModel, longest: int, override_bs: int | None) -> int:
        """Return the tokens of one forward pass.

        ``batch_size=auto``: a fixed budget, halved when memory runs out. A number b: as many tokens as b of
        the longest sequences have, which is what ``hf`` computes at most with that batch size.
        """
        batch_size = override_bs if self.batch_size == "auto" else self.batch_size
        return packed.token_budget(max(MIN_TOKENS, int(batch_size) * longest) if batch_size else None)

    def _token_request(self, context: list[int], continuation: list[int]) -> TokenRequest:
        if self.backend == "causal":
            return truncate(context, continuation, self.max_length)
        return TokenRequest(tuple(context[-self.max_length :]), tuple(continuation[-self.max_length :]))

    def _forward_plain(self, member: int, batch: Batch) -> torch.Tensor:
        self._activate(member)
        logits: torch.Tensor = self._model_call(batch.inputs, batch.encoder_mask, batch.labels)
        return logits

    def get_model_info(self) -> dict[str, Any]:
        """Add what made the scores to what lm-eval writes into its results file."""
        info: dict[str, Any] = super().get_model_info()
        info.pop("peft_sha", None)  # of the first member only, and asked of the Hub
        info["lora_ensemble"] = in_results(self, self._engine())
        return info

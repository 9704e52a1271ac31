"""The benchmark scripts: another checkout's engine, the interval, the peak, the machine's name."""

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import PROJECT, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from lm_eval_lora_ensemble.precision import has_fast_bfloat16

BENCHMARKS = PROJECT / "benchmarks"
SCORING = ["--shape", "tiny", "--random-weights", "--synthetic", "hellaswag:4", "--dtype", "float32"]
TRAINING = ["--shape", "tiny", "--documents", "2", "--length", "16", "--objective", "choices"]
TRAINING += ["--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def benchmarks(monkeypatch):
    """The scripts' own modules can be imported, as they are where a script runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="module")
def other_checkout(tmp_path_factory):
    """This checkout as 0.1.0 laid it out, with every score half a nat off and every training loss one nat."""
    root = tmp_path_factory.mktemp("other")
    for folder in ("lm_eval_lora_ensemble", "train", "tasks"):
        shutil.copytree(PROJECT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    model = root / "lm_eval_lora_ensemble" / "harness" / "model.py"
    model.rename(root / "lm_eval_lora_ensemble" / "backend.py")
    with (root / "lm_eval_lora_ensemble" / "backend.py").open("a", encoding="utf-8") as source:
        source.write("""
def _half_a_nat_more(self, *args, _true=LoraEnsembleLM._loglikelihood_tokens, **kwargs):
    scores = _true(self, *args, **kwargs)
    return [(EnsembleLoglikelihood.average(score.members + 0.5, self.average), greedy) for score, greedy in scores]
LoraEnsembleLM._loglikelihood_tokens = _half_a_nat_more
""")
    with (root / "train" / "joint.py").open("a", encoding="utf-8") as source:
        source.write("""
def _one_nat_more(self, *args, _true=JointEngine.step):
    return {name: loss + 1 for name, loss in _true(self, *args).items()}
JointEngine.step = _one_nat_more
""")
    return root


def compare(script, checkout, arguments, tmp_path):
    """Run a benchmark against a checkout and return its table's cells by column, and its JSON."""
    result = tmp_path / "result.json"
    words = [sys.executable, str(BENCHMARKS / script), *arguments, "--members", "2"]
    words += ["--against", str(checkout), "--pairs", "2", "--json", str(result)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    header, rule, *rows = [line.strip("|").split("|") for line in done.stdout.splitlines() if line[:1] == "|"]
    assert len(header) == len(rule)
    (row,) = rows
    return dict(zip(header, row, strict=True)), json.loads(result.read_text())


def scoring_arguments(tmp_path):
    tiny_tokenizer(tmp_path / "tokenizer")
    return [*SCORING, "--tokenizer", str(tmp_path / "tokenizer")]


def test_scoring_against_itself_differs_in_nothing(tmp_path):
    cells, result = compare("scoring.py", PROJECT, scoring_arguments(tmp_path), tmp_path)
    assert list(cells)[:6] == ["work", "pairs", "this, s", "other, s", "this ÷ other", "95 %"]
    assert (cells["work"], cells["pairs"]) == ("synthetic hellaswag:4, 16 requests", "2")
    assert cells["largest difference of scores, nats"] == "0.0e+00"
    (row,) = result["rows"]
    assert row["differences"] == {"scores, nats": 0.0}
    assert min(row["this_seconds"] + row["other_seconds"]) > 0
    pairs = zip(row["this_seconds"], row["other_seconds"], strict=True)
    assert row["ratios"] == [this / other for this, other in pairs]
    low, high = row["interval_95"]
    assert low < math.sqrt(math.prod(row["ratios"])) < high
    assert result["this"]["versions"] == result["other"]["versions"]
    assert re.match(r"GEMM peak: [\d.]+ TFLOP/s, float32 products of 1024 tokens", result["peak"])


def test_scoring_runs_the_other_checkouts_engine(tmp_path, other_checkout):
    cells, result = compare("scoring.py", other_checkout, scoring_arguments(tmp_path), tmp_path)
    assert result["rows"][0]["differences"]["scores, nats"] == pytest.approx(0.5, abs=1e-9)
    assert cells["largest difference of scores, nats"] == "5.0e-01"


def test_training_runs_the_other_checkouts_step(tmp_path, other_checkout):
    cells, result = compare("training.py", other_checkout, TRAINING, tmp_path)
    assert cells["work"] == "choices, 2 documents of 16 tokens a member"
    differences = result["rows"][0]["differences"]
    assert differences["losses, nats"] == pytest.approx(1, abs=1e-9)
    assert differences["weights"] == 0  # what the loss is called changes no gradient


def test_the_interval_is_students_for_the_mean_log_ratio(benchmarks):
    from against import PairedTimes

    times = PairedTimes("", this_seconds=[2.0, 2.2, 2.42], other_seconds=[2.0, 2.0, 2.0])
    # mean and standard deviation of the logarithms are both ln 1.1; t for two degrees of freedom is 4.302653
    half = 4.302653 * math.log(1.1) / math.sqrt(3)
    assert times.interval == pytest.approx((1.1 * math.exp(-half), 1.1 * math.exp(half)), rel=1e-6)
    assert times.as_dict()["median_ratio"] == pytest.approx(1.1)


def test_each_engine_is_first_in_every_other_pair(benchmarks):
    from against import PairedTimes, alternate

    class Clock:
        def __init__(self, name, seconds):
            self.name, self.seconds = name, seconds

        def timed(self, method):
            turns.append(self.name)
            return self.seconds, self.name

    turns, times, returned = [], PairedTimes(""), []
    alternate(times, (Clock("A", 3.0), Clock("B", 2.0)), 4, lambda *values: returned.append(values))
    assert "".join(turns) == "BA" + "ABBAABBA"
    assert times.ratios == [1.5] * 4
    assert returned == [("A", "B")] * 5


@pytest.mark.parametrize("pairs", ["1", "0", "-2", "two"])
def test_too_few_pairs_are_refused(benchmarks, pairs):
    from against import several

    with pytest.raises(argparse.ArgumentTypeError, match="at least 2"):
        several(pairs)


def test_a_folder_that_is_no_checkout_is_refused(benchmarks, tmp_path):
    from against import checkout_folder

    with pytest.raises(argparse.ArgumentTypeError, match="name the root of a checkout"):
        checkout_folder(str(tmp_path))


def test_an_engine_that_ends_is_told(benchmarks, tmp_path, capfd):
    from against import Engine

    package = tmp_path / "lm_eval_lora_ensemble"
    package.mkdir()
    (package / "__init__.py").touch()
    with pytest.raises(SystemExit, match=f"{re.escape(str(tmp_path))} ended with exit status 1"):
        Engine(tmp_path, "scoring", {})
    assert "has none of harness.model, backend" in capfd.readouterr().err


def test_the_peak_is_that_of_the_base_models_linear_layers(benchmarks):
    from peak import gemm_peak, linear_shapes, meta_model, weights

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = meta_model(config)
    shapes = linear_shapes(model)
    # q and o · k and v · gate and up · down; the head, 64 → 512, is none of them
    assert shapes == {(64, 64): 6, (64, 32): 6, (64, 160): 6, (160, 64): 3}
    assert weights(shapes) == 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    assert linear_shapes(get_peft_model(model, lora)) == shapes
    assert 1e8 < gemm_peak(shapes, torch.float32, "cpu") < 1e15


@pytest.mark.skipif(
    "model name" not in Path("/proc/cpuinfo").read_text(errors="replace")
    if Path("/proc/cpuinfo").is_file()
    else True,
    reason="this system does not tell its processor's name in /proc/cpuinfo",
)
def test_the_processor_has_the_name_that_linux_tells(benchmarks):
    from machine import processor

    line = next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    )
    assert processor() == line.partition(":")[2].strip()


def test_where_the_time_goes_is_shares_that_add_up():
    words = [sys.executable, str(BENCHMARKS / "scoring.py"), *SCORING, "--members", "2"]
    done = subprocess.run(
        [*words, "--repeats", "1", "--no-memory", "--breakdown"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shares = [int(share) for share in re.findall(r"^\| [a-z].* s, (\d+)% \|$", done.stdout, re.MULTILINE)]
    assert len(shares) == 7 and 95 < sum(shares) < 105
    assert "| matrix products | " in done.stdout


@pytest.mark.long
def test_what_half_precision_costs_is_a_distance_that_is_not_nought(tmp_path):
    result = tmp_path / "result.json"
    words = [sys.executable, str(BENCHMARKS / "scoring.py"), *SCORING, "--members", "2"]
    words[words.index("float32")] = "bfloat16"
    done = subprocess.run(
        [*words, "--rounding", "--json", str(result)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(result.read_text())
    assert found["requests"] == 16 and 0 < found["ours_mean"] < 2 * found["hf_mean"]


def why_not_at_mistrals_size() -> str:
    """Return what this machine lacks for seven billion weights; empty if nothing."""
    free = psutil.virtual_memory().available / 2**30
    if free < 16:
        return f"needs 16 GiB of free memory for Mistral-7B's shape in bfloat16, not {free:.0f}"
    return (
        "" if has_fast_bfloat16("cpu") else "needs a processor that multiplies bfloat16 (AMX or AVX512-BF16)"
    )


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_three_members_of_mistrals_size_need_the_memory_of_one(tmp_path):
    """Random weights in Mistral-7B's shape: the engine at the size it is made for, adapters and all."""
    if why := why_not_at_mistrals_size():
        pytest.skip(why)
    tiny_tokenizer(tmp_path / "tokenizer")
    words = [sys.executable, str(BENCHMARKS / "scoring.py"), "--shape", "mistral-7b", "--random-weights"]
    words += ["--synthetic", "hellaswag:2", "--dtype", "bfloat16", "--members", "3"]
    words += ["--tokenizer", str(tmp_path / "tokenizer")]
    peaks = {}
    for engine in ("hf", "ours"):
        done = subprocess.run([*words, "--only", engine], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        peaks[engine] = float(done.stdout.split()[-1])
    assert peaks["hf"] > 13 and peaks["ours"] < 1.1 * peaks["hf"]

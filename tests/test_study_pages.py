"""The published pages of both studies against the numbers that lie beside them."""

from __future__ import annotations

import re

import pytest
from study_modules import study_modules

from lm_eval_lora_ensemble.analysis.result import Settings


@pytest.mark.long
@pytest.mark.parametrize("package", ["posterior_study", "overfitting_study"])
def test_a_page_says_what_the_numbers_beside_it_give(package, tmp_path):
    study = study_modules(package, "page", "plan", "results")
    page = study.page.PAGE.read_text(encoding="utf-8")
    run = re.search(r": run -->\n(.*?)<!-- end -->", page, re.DOTALL)[1]
    sizes = study.plan.Sizes(dtype=re.search(r"bfloat16|float16|float32", run)[0])
    study.archive.unpack(study.archive.beside(study.page.PAGE), tmp_path)
    records = study.running.read_records(study.plan.steps(sizes), tmp_path)
    assert records
    made = study.results.Study(sizes, tmp_path, records, Settings())
    assert study.page.filled(page, made) == page

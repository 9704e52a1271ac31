"""What is replaced in lm-eval: once, whoever else wraps it, and without a trace for other models' runs."""

from __future__ import annotations

import subprocess
import sys

from lm_eval.tasks import TaskManager

from lm_eval_lora_ensemble.harness import patches, plugin

OTHER_LIBRARY = """
import functools
from lm_eval.tasks.manager import TaskManager

stock = TaskManager.__init__

@functools.wraps(stock)
def traced(self, *args, **kwargs):
    stock(self, *args, **kwargs)

TaskManager.__init__ = traced
"""
OURS = "from lm_eval_lora_ensemble.harness.plugin import add_tasks_folder; add_tasks_folder()\n"
ASK = "from lm_eval.tasks import TaskManager; assert 'arc_easy_uq' in TaskManager().all_tasks\n"


def test_another_librarys_decorator_does_not_hide_our_tasks(tmp_path):
    """0.1.0 took any ``__wrapped__`` for its own: a tracer that came first made every task of ours vanish."""
    environment = {"LM_EVAL_LORA_ENSEMBLE_AUTOLOAD": "0"}
    for code in (OTHER_LIBRARY + OURS + ASK, OURS + OTHER_LIBRARY + OURS + ASK):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_a_method_is_replaced_once_whoever_wraps_it_meanwhile():
    calls = []

    class Owner:
        def method(self):
            calls.append("stock")

    def replace():
        def make(stock):
            def ours(self):
                calls.append("ours")
                stock(self)

            return ours

        patches._replace(Owner, "method", make)

    replace()
    inner = Owner.method
    # another library wraps ours, without functools.wraps and so without any mark on the function
    Owner.method = lambda self: (calls.append("other"), inner(self))
    replace()
    replace()
    Owner().method()
    assert calls == ["other", "ours", "stock"]


def test_a_users_folder_stays_what_the_manager_says_it_was_given(tmp_path):
    plugin.add_tasks_folder()
    assert TaskManager(include_path=str(tmp_path)).include_path == str(tmp_path)
    assert TaskManager(include_path=None, include_defaults=False).include_path is None

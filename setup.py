"""Everything is in pyproject.toml but two things that it cannot say.

The packages come from two trees: the package itself, and ``tasks/`` and ``train/``, which are its sub-packages once
installed. And an editable install carries the start-up files too: setuptools installs data files into an editable
wheel only if the distribution answers ``has_data``, a method it does not define.
"""

from setuptools import Distribution, find_packages, setup

PACKAGE = "lm_eval_lora_ensemble"


class _Distribution(Distribution):
    def has_data(self) -> bool:
        return bool(self.data_files)


setup(
    distclass=_Distribution,
    packages=[
        *find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
        *(f"{PACKAGE}.{name}" for name in find_packages(include=["tasks", "tasks.*", "train", "train.*"])),
    ],
)

"""Everything is in pyproject.toml but this: an editable install carries the start-up files too.

setuptools installs data files into an editable wheel only if the distribution answers ``has_data``,
a method it does not define.
"""

from setuptools import Distribution, setup


class _Distribution(Distribution):
    def has_data(self) -> bool:
        return bool(self.data_files)


setup(distclass=_Distribution)

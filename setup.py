"""Only what pyproject.toml cannot say: nothing yet (the optional native CPU library will be built here)."""

from setuptools import setup

setup()

"""The test suite. ``conftest.py`` decides where kernels run; ``docs/testing.md`` explains the rest."""

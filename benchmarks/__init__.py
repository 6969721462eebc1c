"""The instruments. ``suite`` times operators and whole models (``fastvit bench``; ``gpu`` for `make gpu`), ``tables`` puts the
results into the documentation, ``compatibility`` measures every family that is served, ``static`` inspects machine code.

Installed as ``fastvit.benchmarks``.
"""

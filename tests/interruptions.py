"""What a failure at any stage must leave as it was: contents of a model, stages that break off."""

import pytest
from torch import nn


def contents(model: nn.Module) -> list:
    """All that acceleration could change, by identity."""
    return [(m, type(m), {key: id(value) for key, value in m.__dict__.items()}, m.training) for m in model.modules()]


INTERRUPTIONS = pytest.mark.parametrize("interruption", [RuntimeError("no more"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])


def break_at(monkeypatch, stage, interruption):
    """The stage's function raises at its n-th call, once it has done its work."""
    module, name, number = stage
    real, calls = getattr(module, name), []

    def broken(*arguments, **keywords):
        calls.append(1)
        result = real(*arguments, **keywords)
        if len(calls) == number:
            raise interruption
        return result

    monkeypatch.setattr(module, name, broken)

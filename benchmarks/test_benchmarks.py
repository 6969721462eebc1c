"""The table of cases under pytest-benchmark: on a GPU at full size, elsewhere the torch backend on small ones.

pytest benchmarks/test_benchmarks.py --benchmark-compare
"""

import pytest
import torch

import fastvit
from benchmarks import cases, operators, peers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("case", "direction"),
    [(case, direction) for group in cases.ALL.values() for case in group for direction in case.directions],
    ids=lambda value: value if isinstance(value, str) else f"{value.op} {value.name}",
)
def test_case(benchmark, case, direction):
    case = case if DEVICE == "cuda" else case.small()
    ours, _, _ = peers.contestants(case)
    inputs = case.inputs(torch.bfloat16, DEVICE, requires_grad=direction == "backward")
    with fastvit.use_backend("auto"):
        upstream = tuple(torch.randn_like(out) for out in operators.outputs(ours(**inputs)))
        (call,) = operators.calls(ours, [inputs], upstream, direction)

        def run():
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark(run)

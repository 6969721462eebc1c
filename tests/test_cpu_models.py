"""Whole models on a CPU: who is held to whom, what a row says of those who could not run, and the large cases in small."""

import pytest
import torch

from benchmarks import accuracy, cpu_cases, cpu_models, measure, results, suite, training
from benchmarks.settings import Settings

DRY = Settings("cpu", {"gemm_tflop_s": 0.1, "copy_gb_s": 10.0}, dry=True)


def _measured(**results_of):
    """The row of a case whose contestants give these results, or raise them."""

    def build(result):
        if isinstance(result, Exception):
            raise result
        return lambda: result

    def contestants(row, folder):
        return {name: lambda result=result: build(result) for name, result in results_of.items()}

    case = cpu_cases.Case("x", [2, 3], 1.0, contestants)
    row = results.new_row(case.title, case.op, case.direction, "fp32", case.shape)
    cpu_models.run(case, row, DRY)
    return row


def test_a_peer_that_cannot_run_on_a_cpu_is_in_the_row_with_its_reason():
    right = torch.ones(3)
    row = _measured(sdpa=right, eager=1.1 * right, compile=right, onnxruntime=RuntimeError("broken"), accelerated=right)
    assert row["peers"].keys() == {"sdpa"}
    assert row["unavailable"]["eager"].startswith("WrongResult: eager errs by 0.1")
    assert row["unavailable"]["compile"] == "not compiled in a dry run"
    assert row["unavailable"]["onnxruntime"] == "RuntimeError: broken"
    assert row["unavailable"]["openvino"] == cpu_cases.NOT_HERE
    assert row["ours_ms"] > 0
    assert row["max_error"] == 0


def test_on_a_cpu_ours_is_held_to_the_first_peer():
    with pytest.raises(accuracy.WrongResult, match="accelerated errs by"):
        _measured(sdpa=torch.ones(3), accelerated=1.1 * torch.ones(3))
    with pytest.raises(RuntimeError, match="no peer ran"):
        _measured(sdpa=RuntimeError("broken"), accelerated=torch.ones(3))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["*one point", "*masks at*", "*SAM-B*step*", "*DINOv2-L*"])
def test_large_models_on_a_cpu_in_small(case, tmp_path):
    """Everyone that is not compiled computes the same, and nobody is missing but for what is not installed here."""
    result, path = suite.run(suite.Run("cpu", (suite.LARGE,), tmp_path, case=case, dry=True))
    assert path is None
    (row,) = result["rows"]
    assert "error" not in row, row.get("traceback")
    said = {name: reason for name, reason in row["unavailable"].items() if reason != cpu_cases.NOT_HERE}
    said.pop("compile", None)
    said.pop("openvino", None)
    assert not said or "torchvision" in said["eager"]  # its nms, where it is built for another PyTorch
    assert row["max_error"] < 1e-4


def test_the_spread_of_two_runs_is_their_distance():
    timing = measure.summarize([3.0, 1.0])
    assert (timing.ms, timing.spread, timing.p95_ms) == (2.0, 1.0, 3.0)


def test_a_compiled_model_without_a_length_trains():
    """``torch.compile``'s module asks the model for its length where it is asked whether it is true."""
    model = torch.nn.Linear(3, 2)
    step = training.trainer(
        model, torch.ones(1, 3), torch.zeros(1, 2), autocast=False, forward=torch.compile(model, backend="eager")
    )
    assert step().numel() == sum(p.numel() for p in model.parameters())

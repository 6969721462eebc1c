"""How float32 products are multiplied follows PyTorch's own setting, through its older and its newer name."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

SETTINGS = {
    "pass": "ieee",
    "matmul.allow_tf32 = True": "tf32",
    "matmul.allow_tf32 = True; matmul.allow_tf32 = False": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "matmul.fp32_precision = 'tf32'": "tf32",
    "matmul.fp32_precision = 'tf32'; matmul.fp32_precision = 'ieee'": "ieee",
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_float32_products_follow_pytorch(setting):
    """In a process of its own: once the newer name was used, PyTorch refuses the older one for good."""
    if "fp32_precision" in setting and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this PyTorch has only the older name")
    code = f"""
import torch
from fastvit.kernels.linear import input_precision
matmul = torch.backends.cuda.matmul
{setting}
print(input_precision(torch.float32), input_precision(torch.bfloat16))
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.split() == [SETTINGS[setting], "ieee"]

"""Whole models as other libraries run them: ONNX Runtime, OpenVINO, TensorRT, and torchao's float8.

Each raises ``ImportError`` where the library, or its provider for the device, is missing, so that the row can say so. ONNX
Runtime reads and writes PyTorch's own memory (IO binding): no copy is timed.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], Tensor]
FLOAT8_FROM = (8, 9)  # compute capability


def export(model: nn.Module, x: Tensor, file: Path) -> Path:
    """The model as an ONNX file for images of x's shape and dtype; one that is there already stays."""
    import onnx  # noqa: F401  # what the exporter says without it does not name it

    if not file.exists():
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns of every branch that a trace fixes
            torch.onnx.export(model, (x,), str(file), dynamo=False, opset_version=17)
    return file


def onnxruntime_provider(x: Tensor) -> str:
    """ONNX Runtime's name for x's device. Raises ``ImportError`` where it does not serve that."""
    import onnxruntime as ort

    provider = "CUDAExecutionProvider" if x.is_cuda else "CPUExecutionProvider"
    if provider not in ort.get_available_providers():
        raise ImportError(f"onnxruntime {ort.__version__} has no {provider}")
    return provider


def onnxruntime(file: Path, x: Tensor, cuda_graph: bool = False) -> Call:
    """A call of the file's model on x, the result in x's dtype, and in the same memory every time.

    On a GPU ``cuda_graph`` lets ONNX Runtime capture and replay. A run waits for its result, as its users' do.
    """
    import onnxruntime as ort

    provider = onnxruntime_provider(x)
    options, of_provider = ort.SessionOptions(), {}
    options.log_severity_level = 3  # errors
    if x.is_cuda:
        of_provider = {"device_id": str(x.device.index or 0), "enable_cuda_graph": str(int(cuda_graph))}
    else:
        options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(file), options, providers=[(provider, of_provider)])
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"onnxruntime left {provider} for {session.get_providers()[0]}")
    x, shape = x.contiguous(), session.get_outputs()[0].shape
    if not all(isinstance(size, int) for size in shape):  # the exporter could not tell: a run can
        shape = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})[0].shape
    out = torch.empty(*shape, dtype=x.dtype, device=x.device)
    binding = session.io_binding()
    for bind, port, tensor in (
        (binding.bind_input, session.get_inputs()[0], x),
        (binding.bind_output, session.get_outputs()[0], out),
    ):
        element = torch.empty(0, dtype=tensor.dtype).numpy().dtype.type
        bind(port.name, tensor.device.type, tensor.device.index or 0, element, tuple(tensor.shape), tensor.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return out

    call.inputs = x  # type: ignore[attr-defined]  # the binding holds an address alone
    return call


def openvino(file: Path, x: Tensor) -> Call:
    """A call of the file's model on x, on the CPU, in float32: by itself OpenVINO would take bfloat16 where the CPU has that."""
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    model = ov.Core().compile_model(str(file), "CPU", settings)
    given = x.numpy()
    return lambda: torch.from_numpy(model([given])[0])


def tensorrt(model: nn.Module, x: Tensor) -> Call:
    """Torch-TensorRT's engine of the model, in the model's own dtype."""
    import torch_tensorrt  # type: ignore[import-not-found]

    engine: Any = torch_tensorrt.compile(model, ir="dynamo", inputs=[x], use_explicit_typing=True, min_block_size=1)

    def call() -> Tensor:
        with torch.no_grad():
            return engine(x)

    return call


def float8(model: nn.Module) -> nn.Module:
    """torchao's dynamic float8 on the model's linears in place, weights by output row, activations by token."""
    from torchao.quantization import (  # type: ignore[import-not-found]
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    have = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if have < FLOAT8_FROM:
        raise RuntimeError(f"float8 needs compute capability 8.9; this device has {have[0]}.{have[1]}")
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return model


def int8(model: nn.Module) -> nn.Module:
    """torchao's dynamic int8 on the model's linears in place, weights by output row, activations by token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_  # type: ignore[import-not-found]

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model

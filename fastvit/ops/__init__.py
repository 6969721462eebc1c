"""Operators: ``attention``, ``layer_norm``, ``linear`` bring the Triton kernels behind ``torch.library`` operators and
``torch.autograd.Function``s; ``torch_backend`` is the same mathematics on PyTorch's own operators."""

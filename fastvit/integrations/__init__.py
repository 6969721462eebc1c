"""How blocks of other libraries are recognised and served: no library is imported here, blocks are known by their shape.

``layouts`` names the children a block may have, ``matching`` finds them (or why not), ``parts`` looks them up, ``call`` reads
what a block was called with, ``recheck`` whether its parts still are what was found. ``block`` computes with them: ``whole`` at
once, or ``branches`` and ``sums`` step by step (``grid`` where the hidden states are images), with the ``operators`` of a
backend, in ``pieces`` of a batch; ``reading`` and ``dropping`` ask the parts for what these need; ``quantized`` computes in 8
bits. ``multihead`` does all this for ``torch.nn.MultiheadAttention``, ``decoder`` for the attention of SAM's mask decoder,
``two_way`` for the blocks of it. ``probe`` proves on random weights that this computes what the module's own forward does,
``swap`` puts it into a module, ``dispatched`` finds the forwards that Hugging Face accelerate's hooks hold.
"""

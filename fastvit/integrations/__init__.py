"""How blocks of other libraries are recognised and served: no library is imported here, blocks are known by their shape.

``layouts`` names the children a block may have, ``parts`` reads them out (or says why not), ``block`` computes with them,
``probe`` proves on random weights that this computes what the block's own forward does, ``swap`` puts it into a module.
"""

"""Run-length encodings of masks, as COCO's tools read and write them.

Uncompressed: {"size": [H, W], "counts": [n₀, n₁, …]}, runs of 0 and 1 in turn, column by column, the first of 0 (perhaps none).
Compressed: the counts as a string. From the fourth on, a count is written as its difference to the one two before. A number
goes, lowest bits first, in groups of 5 of its two's complement; a sixth bit says that more follow, and 48 + bits is a character.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

RLE = Mapping[str, Any]


def encode_rle(masks: Tensor) -> list[dict[str, Any]]:
    """(N, H, W) bool, on any device → N uncompressed encodings."""
    if not len(masks):
        return []
    height, width = masks.shape[-2:]
    columns = masks.transpose(1, 2).flatten(1)
    changes = (columns[:, 1:] != columns[:, :-1]).nonzero().cpu().numpy()
    ends = np.searchsorted(changes[:, 0], np.arange(len(masks)), side="right")
    encoded = []
    for begins_with_one, position in zip(columns[:, 0].tolist(), np.split(changes[:, 1] + 1, ends[:-1]), strict=True):
        counts = np.diff(position, prepend=0, append=height * width).tolist()
        encoded.append({"size": [height, width], "counts": [0, *counts] if begins_with_one else counts})
    return encoded


def decode_rle(rle: RLE) -> np.ndarray:
    """Either encoding → (H, W) bool. Raises ``ValueError`` for counts that do not fill the mask."""
    height, width = rle["size"]
    counts = decompress_counts(rle["counts"]) if isinstance(rle["counts"], str) else rle["counts"]
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError(f"rle holds runs of {sum(counts)} pixels in all; expected {height}×{width} = {height * width}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def area_of_rle(rle: RLE) -> int:
    """Pixels of the mask, from an uncompressed encoding."""
    return sum(rle["counts"][1::2])


def compress_rle(rle: RLE) -> dict[str, Any]:
    """An uncompressed encoding → COCO's compressed one, as JSON can hold it."""
    return {"size": list(rle["size"]), "counts": compress_counts(rle["counts"])}


def compress_counts(counts: list[int]) -> str:
    characters = []
    for index, count in enumerate(counts):
        number = count - counts[index - 2] if index > 2 else count
        more = True
        while more:
            group, number = number & 31, number >> 5
            more = number != (-1 if group & 16 else 0)  # until only copies of the sign, the group's highest bit, are left
            characters.append(chr(48 + group + (32 if more else 0)))
    return "".join(characters)


def decompress_counts(text: str) -> list[int]:
    """Raises ``ValueError`` for a string that no encoder writes."""
    counts: list[int] = []
    for index, number in enumerate(_numbers(text)):
        counts.append(number + counts[index - 2] if index > 2 else number)
    return counts


def _numbers(text: str) -> Iterator[int]:
    number = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"rle counts hold {character!r}; expected characters from '0' to 'o'")
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            yield number - (1 << shift) if bits & 16 else number
            number = shift = 0
    if shift:
        raise ValueError("rle counts end within a number")

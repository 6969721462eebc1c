"""Segment Anything's prompt encoder (Kirillov et al. 2023, section 3 and appendix A): points, boxes and an embedding of text
or of an image become tokens, a mask becomes an addition to the image's embedding."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ... import _checks
from ...nn import Linear, check_count, pair
from .layers import LayerNorm2d, is_untouched

POSITIVE, NEGATIVE, PADDING = 1, 0, -1  # labels of points


class RandomFourierPositions(nn.Module):
    """[sin(2π·Gᵀp), cos(2π·Gᵀp)] for a place p in [−1, 1]² and a fixed random matrix G (2, dim / 2) (Tancik et al. 2020).

    Computed in float32, also under autocast and beside weights of lower precision.
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None):
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, dim // 2, device=device, dtype=dtype))

    def forward(self, size: tuple[int, int]) -> Tensor:
        """The centres of a grid's cells, (dim, height, width), lying channels last in memory."""
        matrix = self.positional_encoding_gaussian_matrix
        y, x = (torch.arange(count, device=matrix.device, dtype=self._dtype) for count in size)
        y, x = torch.meshgrid((y + 0.5) / size[0], (x + 0.5) / size[1], indexing="ij")
        return self._encode(x, y).permute(2, 0, 1)

    def forward_with_coords(self, coordinates: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Places (..., 2) as (x, y) in pixels of an image of ``image_size`` (height, width) → (..., dim)."""
        x, y = coordinates.to(self._dtype).unbind(-1)
        return self._encode(x / image_size[1], y / image_size[0])

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.positional_encoding_gaussian_matrix.dtype, torch.float32)

    def _encode(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y (...) in [0, 1]. Products one by one: a matrix product would be rounded to TF32, or under autocast."""
        matrix = self.positional_encoding_gaussian_matrix.to(self._dtype)
        angles = (2 * x - 1).unsqueeze(-1) * matrix[0] + (2 * y - 1).unsqueeze(-1) * matrix[1]
        angles = angles * (2 * math.pi)
        return torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.positional_encoding_gaussian_matrix.dtype)


class PromptEncoder(nn.Module):
    """Prompts of B masks of one image → (tokens (B, N, dim), addition to the image's embedding (B, dim, h, w)).

    Parameters are named as in Segment Anything's checkpoints; ``text_embedding`` alone, of which no
    weights were published, is named here.

    Args:
        dim: channels of tokens and embeddings.
        image_embedding_size: (height, width) of the image's embedding.
        input_image_size: (height, width) of the padded image, in whose pixels points and boxes are.
        mask_in_channels: hidden channels for masks.
        text_dim: channels of a CLIP embedding of a text or an image, which a trainable linear then makes a token of
            (sections 3 and 7.5 of the paper); None leaves it out.
        norm_eps: added to the variance in the norms of masks.
    """

    def __init__(
        self,
        dim: int = 256,
        image_embedding_size: int | tuple[int, int] = 64,
        input_image_size: int | tuple[int, int] = 1024,
        mask_in_channels: int = 16,
        text_dim: int | None = None,
        norm_eps: float = 1e-6,
        *,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        check_count("dim", dim, minimum=2)
        check_count("mask_in_channels", mask_in_channels, minimum=4)
        if dim % 2:
            raise ValueError(f"dim is {dim}; expected an even number, a sine and a cosine each frequency")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim = dim
        self.image_embedding_size = pair("image_embedding_size", image_embedding_size)
        self.input_image_size = pair("input_image_size", input_image_size)
        self.mask_input_size = (4 * self.image_embedding_size[0], 4 * self.image_embedding_size[1])
        self.pe_layer = RandomFourierPositions(dim, **factory)
        # For a negative point, a positive one, a box's upper left and its lower right corner.
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim, **factory) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, dim, **factory)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_in_channels // 4, 2, stride=2, **factory),
            LayerNorm2d(mask_in_channels // 4, norm_eps, **factory),
            nn.GELU(),
            nn.Conv2d(mask_in_channels // 4, mask_in_channels, 2, stride=2, **factory),
            LayerNorm2d(mask_in_channels, norm_eps, **factory),
            nn.GELU(),
            nn.Conv2d(mask_in_channels, dim, 1, **factory),
        )
        self.no_mask_embed = nn.Embedding(1, dim, **factory)
        self._dense_pe: tuple[Tensor, tuple, Tensor] | None = None  # of which matrix, in which state, the positions
        self.text_embedding: nn.Module | None = None
        if text_dim is not None:
            check_count("text_dim", text_dim)
            self.text_embedding = Linear(text_dim, dim, **factory)

    def get_dense_pe(self) -> Tensor:
        """The positions of the image's embedding, (1, dim, h, w). They are computed once and kept for as long as the matrix
        stays what it is: they would be a good part of the time that a prompt takes."""
        matrix = self.pe_layer.positional_encoding_gaussian_matrix
        if not self._may_keep(matrix):
            return self.pe_layer(self.image_embedding_size).unsqueeze(0)
        kept = self._dense_pe
        if kept is None or kept[0] is not matrix or kept[1] != self._state(matrix, kept[2]):
            with torch.inference_mode(False), torch.no_grad():  # what inference mode makes, no later gradient could use
                positions = self.pe_layer(self.image_embedding_size).unsqueeze(0)
            self._dense_pe = kept = (matrix, self._state(matrix, positions), positions)
        return kept[2]

    def _may_keep(self, matrix: Tensor) -> bool:
        """Not what is traced, transformed, captured, hooked or trained."""
        if torch.compiler.is_compiling() or type(matrix) is not Tensor or matrix.requires_grad or matrix.is_inference():
            return False
        if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
            return False
        if matrix.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        return is_untouched(self.pe_layer, RandomFourierPositions)

    def _state(self, matrix: Tensor, positions: Tensor) -> tuple:
        """What changes when something is loaded into the matrix, or the positions that were given out are written to."""
        return matrix._version, matrix.data_ptr(), positions._version, self.image_embedding_size

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._dense_pe = None  # its memory is on the device that the module leaves
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dense_pe": None}

    def forward(
        self,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
        text: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            points: coordinates (B, N, 2) as (x, y), and labels (B, N): 1 inside the object, 0 outside, −1 no point. Another
                label marks a place alone. Without boxes one token "no point" more follows.
            boxes: (B, 4), (B, 1, 4) or (B, 2, 2), as (x0, y0, x1, y1), two tokens each.
            masks: (B, 1, 4·h, 4·w), logits that the decoder has returned for an earlier prompt. One mask may go with B other
                prompts, and one other prompt with B masks: the decoder takes the one for all.
            text: (B, text_dim), one token each.

        Returns:
            (B, tokens, dim), tokens of points, boxes and text in this order; and of masks (B, dim, h, w), which without masks
            is one vector seen everywhere. Without prompts B is 1, and there are no tokens.

        Raises:
            TypeError, ValueError: shapes or batches that do not fit, or text without a ``text_dim``.
        """
        batch = self._check(points, boxes, masks, text)
        dtype = self.no_mask_embed.weight.dtype
        tokens: list[Tensor] = []
        if points is not None:
            tokens.append(self._embed_points(*points, pad=boxes is None))
        if boxes is not None:
            tokens.append(self._embed_boxes(boxes))
        if text is not None and self.text_embedding is not None:
            tokens.append(self.text_embedding(text.to(dtype)).unsqueeze(1))
        sparse = torch.cat(tokens, dim=1) if tokens else self.no_mask_embed.weight.new_empty(batch, 0, self.embed_dim)
        if masks is not None:
            return sparse, self.mask_downscaling(masks.to(dtype))
        return sparse, self.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(batch, -1, *self.image_embedding_size)

    def _embed_points(self, coordinates: Tensor, labels: Tensor, pad: bool) -> Tensor:
        places = self.pe_layer.forward_with_coords(coordinates + 0.5, self.input_image_size)  # the centre of the pixel
        labels = labels.unsqueeze(-1)
        negative, positive = self._point(NEGATIVE), self._point(POSITIVE)
        tokens = torch.where(labels == POSITIVE, places + positive, torch.where(labels == NEGATIVE, places + negative, places))
        tokens = torch.where(labels == PADDING, self.not_a_point_embed.weight, tokens)
        return torch.cat([tokens, self.not_a_point_embed.weight.expand(tokens.shape[0], 1, -1)], dim=1) if pad else tokens

    def _embed_boxes(self, boxes: Tensor) -> Tensor:
        places = self.pe_layer.forward_with_coords(boxes.reshape(-1, 2, 2) + 0.5, self.input_image_size)
        return places + torch.cat([self._point(2), self._point(3)])

    def _point(self, index: int) -> Any:
        return self.point_embeddings[index].weight

    def _check(self, points: Any, boxes: Tensor | None, masks: Tensor | None, text: Tensor | None) -> int:
        """B. Raises for prompts that do not fit the encoder or each other."""
        prompts: dict[str, Any] = {}
        if points is not None:
            if not isinstance(points, (tuple, list)) or len(points) != 2:
                raise TypeError(f"points is {type(points).__name__}; expected a pair of tensors, coordinates and labels")
            prompts |= {"points": points[0], "labels of points": points[1]}
        prompts |= {name: t for name, t in (("boxes", boxes), ("text", text), ("masks", masks)) if t is not None}
        for name, tensor in prompts.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} is {type(tensor).__name__}; expected a torch.Tensor")
        batch = next(iter(prompts.values())).shape[:1].numel() if prompts else 1
        if points is not None:
            count = points[0].shape[1] if points[0].dim() == 3 else 0
            _checks.check_shape("points", points[0], (batch, count, 2), "one (x, y) each point of each mask")
            _checks.check_shape("labels of points", points[1], (batch, count), "one label each point")
        if boxes is not None and tuple(boxes.shape[1:]) not in ((1, 4), (2, 2)):
            _checks.check_shape("boxes", boxes, (batch, 4), "one (x0, y0, x1, y1) each mask")
        elif boxes is not None and boxes.shape[0] != batch:
            raise ValueError(f"boxes has shape {tuple(boxes.shape)}; expected {batch} of them")
        if masks is not None:
            count = masks.shape[:1].numel() if batch == 1 or masks.shape[:1] == (1,) else batch
            _checks.check_shape("masks", masks, (count, 1, *self.mask_input_size), "one mask of mask_input_size each mask")
        if text is not None:
            if self.text_embedding is None:
                raise ValueError("text was given to a prompt encoder without text_dim; expected one made with text_dim=…")
            width: Any = getattr(self.text_embedding, "in_features", text.shape[-1])
            _checks.check_shape("text", text, (batch, width), "one embedding of text_dim channels each mask")
        return batch

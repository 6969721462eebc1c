"""SAM's image encoder in bf16 on a GPU: ``fastvit.models``' and the accelerated original, against what others make of it.

Peers, all with the same random weights: segment_anything's encoder and transformers' SDPA mode, eager and compiled; and
segment_anything's with the relative positions folded into channels, or as FlexAttention's score_mod (``ways``). At batch 1 each,
ours as theirs, is a CUDA graph too. Two rows more have the encoder in FP8 and INT8 (as ``models``).
End to end, the decoder in float32: one image encoded and one point decoded; and masks of everything in a photograph-sized
picture, 1024 points of a grid, by either library's ``SamAutomaticMaskGenerator``.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastvit
from fastvit._torchvision import ensure_importable
from fastvit.reference_quantized import FORMATS

from . import contest, floors, image_peers, models, peers, results
from .settings import Settings, Task
from .ways import WAYS

SIZES: dict[str, dict[str, Any]] = {
    "SAM-B": {"dim": 768, "depth": 12, "heads": 12, "globals": (2, 5, 8, 11)},
    "SAM-L": {"dim": 1024, "depth": 24, "heads": 16, "globals": (5, 11, 17, 23)},
    "SAM-H": {"dim": 1280, "depth": 32, "heads": 16, "globals": (7, 15, 23, 31)},
}
FULL = {"image": 1024, "window": 14, "prompt_dim": 256}
DRY = {"image": 128, "window": 3, "prompt_dim": 32, "dim": 32, "depth": 2, "heads": 2, "globals": (1,)}
PATCH = 16


def sizes_of(name: str, settings: Settings) -> dict[str, Any]:
    return FULL | SIZES[name] | (DRY if settings.dry else {})


def original(sizes: dict[str, Any]) -> nn.Module:
    """segment_anything's Sam, its relative and absolute positions random too."""
    ensure_importable()
    from segment_anything import modeling

    torch.manual_seed(0)
    grid, image, prompt_dim = sizes["image"] // PATCH, sizes["image"], sizes["prompt_dim"]
    encoder = modeling.ImageEncoderViT(
        img_size=image,
        patch_size=PATCH,
        embed_dim=sizes["dim"],
        depth=sizes["depth"],
        num_heads=sizes["heads"],
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        global_attn_indexes=sizes["globals"],
        window_size=sizes["window"],
        out_chans=prompt_dim,
    )
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=prompt_dim, num_heads=8, mlp_dim=2048)
    sam = modeling.Sam(
        encoder,
        modeling.PromptEncoder(prompt_dim, (grid, grid), (image, image), mask_in_chans=16),
        modeling.MaskDecoder(transformer_dim=prompt_dim, transformer=transformer),
    )
    _disturb(sam)
    return sam.eval().requires_grad_(False)


def own(sizes: dict[str, Any], like: nn.Module | None) -> nn.Module:
    """fastvit's Sam with the weights of segment_anything's, or with random ones where there is none."""
    from fastvit.models import sam

    torch.manual_seed(0)
    model = sam.build_sam(
        image_size=sizes["image"],
        patch_size=PATCH,
        dim=sizes["dim"],
        depth=sizes["depth"],
        num_heads=sizes["heads"],
        global_attention=sizes["globals"],
        window_size=sizes["window"],
        prompt_dim=sizes["prompt_dim"],
    )
    if like is None:
        _disturb(model)
    else:
        model.load_state_dict(like.state_dict())
    return model.eval().requires_grad_(False)


def _disturb(sam: Any) -> None:
    """Positions begin at zero, where some implementations could save themselves the work, and estimates of quality around it,
    where a threshold is none."""
    for name, parameter in sam.image_encoder.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            nn.init.normal_(parameter, std=0.02)
    nn.init.ones_(sam.mask_decoder.iou_prediction_head.layers[-1].bias)


def transformers_encoder(sizes: dict[str, Any], like: nn.Module) -> nn.Module:
    """transformers' encoder in its SDPA mode with the weights of segment_anything's encoder; gives the embeddings alone."""
    ensure_importable()
    from transformers import SamVisionConfig, SamVisionModel

    config = SamVisionConfig(
        image_size=sizes["image"],
        patch_size=PATCH,
        hidden_size=sizes["dim"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["heads"],
        global_attn_indexes=list(sizes["globals"]),
        window_size=sizes["window"],
        output_channels=sizes["prompt_dim"],
        attn_implementation="sdpa",
    )
    names = {
        "blocks.": "layers.",
        "norm1.": "layer_norm1.",
        "norm2.": "layer_norm2.",
        "patch_embed.proj": "patch_embed.projection",
    }
    necks = {"neck.0": "neck.conv1", "neck.1": "neck.layer_norm1", "neck.2": "neck.conv2", "neck.3": "neck.layer_norm2"}
    state = {}
    for name, tensor in like.state_dict().items():
        for old, new in (names | necks).items():
            name = name.replace(old, new)
        state[f"vision_encoder.{name}"] = tensor
    model = SamVisionModel(config)
    model.load_state_dict(state)
    return Embeddings(model.eval().requires_grad_(False))


class Embeddings(nn.Module):
    """transformers' vision model, without its output class."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, return_dict=False)[0]


class OtherAttention(nn.Module):
    """segment_anything's attention, its scores and bias computed in another of ``ways``."""

    def __init__(self, attention: Any, way: Callable):
        super().__init__()
        self.attention, self.way = attention, way

    def forward(self, x: Tensor) -> Tensor:
        own = self.attention
        return own.proj(image_peers.attend(self.way, own.qkv(x), own.num_heads, own.rel_pos_h, own.rel_pos_w))


def by_way(encoder: nn.Module, way: Callable) -> nn.Module:
    """The encoder, all its attention in that way."""
    model: Any = contest.twin(encoder)
    for block in model.blocks:
        block.attn = OtherAttention(block.attn, way)
    return model


def encode_and_decode(sam: Any, encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Low-resolution masks (B=1, 3, h, w) of one point; the encoder in the images' dtype, the rest in float32."""

    def run(images: Tensor) -> Tensor:
        side = images.shape[-1]
        point = torch.full((1, 1, 2), side / 2, device=images.device)
        label = torch.ones(1, 1, dtype=torch.int, device=images.device)
        sparse, dense = sam.prompt_encoder(points=(point, label), boxes=None, masks=None)
        masks, _ = sam.mask_decoder(
            image_embeddings=encode(images).float(),
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        return masks

    return run


class InOwnDtype(nn.Module):
    """An image encoder for callers that give and take float32, as segment_anything's predictor does."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder, self.img_size = encoder, encoder.img_size

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images.to(next(self.encoder.parameters()).dtype)).float()


class Everything:
    """Calls that find all masks in a picture; ``check()``: what the decoder makes of the first points of the grid.

    With random weights nobody's estimate of quality says anything, so the generators keep the tenth of the masks that the exact
    model rates highest, and no stability is asked for.
    """

    def __init__(self, generator: Any, predictor: Any, pixels: Any):
        self.generator, self.predictor, self.pixels = generator, predictor, pixels

    def __call__(self) -> Tensor:
        return torch.tensor(float(len(self.generator.generate(self.pixels))))

    def check(self) -> Tensor:
        return rated(self.predictor, self.pixels, self.generator.points_per_batch)[0]


def rated(predictor: Any, pixels: Any, count: int) -> tuple[Tensor, Tensor]:
    """(low-resolution masks (count, 3, h, w), estimated quality (count, 3)) of a row of points across the picture."""
    predictor.set_image(pixels)
    side = predictor.model.image_encoder.img_size
    across = torch.linspace(0.1 * side, 0.9 * side, count, device=predictor.device)
    points = torch.stack([across, across.flip(0)], dim=-1)[:, None]
    labels = torch.ones(count, 1, dtype=torch.int, device=predictor.device)
    _, quality, low_res = predictor.predict_torch(points, labels)
    return low_res, quality


BATCH_IN_8_BITS = 8


def tasks(settings: Settings) -> Iterator[Task]:
    """What is asked for most comes first: the encoders at batch 8."""

    def task(title: str, name: str, batch: int, run: Callable, dtype: str = settings.dtype) -> Task:
        image = sizes_of(name, settings)["image"]
        shape = [min(batch, 2) if settings.dry else batch, 3, image, image]
        return Task(results.new_row(title, "sam", "forward", dtype, shape), functools.partial(run, name))

    for batch in (8, 1):
        for name in SIZES:
            yield task(f"{name} encoder, batch {batch}", name, batch, run_encoder)
    for precision in FORMATS:
        yield task(f"SAM-H encoder, batch {BATCH_IN_8_BITS}, {precision}", "SAM-H", BATCH_IN_8_BITS, run_in_8_bits, precision)
    for name in SIZES:
        yield task(f"{name} encode + 1 point", name, 1, run_prompt)
        yield task(f"{name} masks of everything", name, 1, run_everything)


def gflop(name: str, settings: Settings) -> float:
    sizes = sizes_of(name, settings)
    counted = {"dim": sizes["dim"], "depth": sizes["depth"], "globals_": len(sizes["globals"]), "window": sizes["window"]}
    return floors.sam_encoder_flops(**counted, side=sizes["image"] // PATCH, out=sizes["prompt_dim"]) / 1e9


class Subject:
    """Both models on the device in float32, the images, and the exact result of what ``run`` makes of a model.

    segment_anything is a peer like others: without it our own model on the torch backend says what is exact.
    """

    def __init__(self, name: str, row: results.Row, settings: Settings, run: Callable[[Any], Callable[[Tensor], Tensor]]):
        row["gflop"] = row["shape"][0] * gflop(name, settings)
        row["floor_ms"] = settings.floor_ms(row["gflop"])
        self.sizes, self.theirs, self.absent = sizes_of(name, settings), None, ""
        try:
            self.theirs = original(self.sizes).to(settings.device)
        except ImportError as error:
            self.absent = str(error)
        self.mine = own(self.sizes, self.theirs).to(settings.device)
        x = torch.randn(row["shape"], device=settings.device)
        row["exact"] = "fastvit, torch backend" if self.theirs is None else "segment_anything"
        with fastvit.use_backend("torch"):
            whole = run(self.mine if self.theirs is None else self.theirs)
            self.exact = torch.cat([contest.inference(whole, image)() for image in x.split(1)]).cpu()
        for sam in (self.mine, self.theirs):
            if sam is not None:
                sam.image_encoder.to(torch.bfloat16)
        self.picture, self.x = x, x.to(torch.bfloat16)

    def original(self) -> Any:
        """segment_anything's model. Raises ``ImportError`` without that library."""
        if self.theirs is None:
            raise ImportError(self.absent)
        return self.theirs

    def call(self, encoder: Callable[[], Callable]) -> Callable[[], Callable[[], Tensor]]:
        """What builds an inference call on the images, ``encoder`` being what builds the model."""
        return lambda: contest.inference(encoder(), self.x)


def run_encoder(name: str, row: results.Row, settings: Settings) -> None:
    subject = Subject(name, row, settings, lambda sam: sam.image_encoder)
    small = row["shape"][0] == 1

    def hf() -> nn.Module:
        return transformers_encoder(subject.sizes, subject.mine.image_encoder).to(settings.device, torch.bfloat16)

    encoders: dict[str, Callable[[], Any]] = {
        "segment_anything": lambda: subject.original().image_encoder,
        "transformers_sdpa": hf,
    }
    others: dict[str, Callable] = {}
    for peer, build in encoders.items():
        others |= contest.variants(peer, subject.call(build), small, autotuned=True)
    for way in ("bias_folded", "bias_folded_flash", "flex"):
        build = functools.partial(lambda way: by_way(subject.original().image_encoder, WAYS[way]), way)
        others |= contest.variants(way, subject.call(build), small)
    for uncompiled in ("flex", "flex_graph"):  # it would write out the whole scores
        others.pop(uncompiled, None)
    ours = contest.variants("fastvit", subject.call(lambda: subject.mine.image_encoder), small)
    if small:
        graphed = functools.cache(lambda: fastvit.accelerate(contest.twin(subject.mine.image_encoder), cuda_graphs=True))
        ours["fastvit_cuda_graphs"] = lambda: contest.replayed(graphed(), contest.inference(graphed(), subject.x))
    if subject.theirs is not None:
        ours["accelerated"] = subject.call(lambda: fastvit.accelerate(contest.twin(subject.theirs.image_encoder)))
    contest.run(row, settings, subject.exact, others, ours)


def run_in_8_bits(name: str, row: results.Row, settings: Settings) -> None:
    models.require(row["dtype"], settings)
    subject = Subject(name, row, settings, lambda sam: sam.image_encoder)
    encoder = subject.original().image_encoder  # fastvit's own is no subject of ``accelerate``
    models.compete_in_8_bits(encoder, subject.x, subject.exact, row, settings)


def run_prompt(name: str, row: results.Row, settings: Settings) -> None:
    subject = Subject(name, row, settings, lambda sam: encode_and_decode(sam, sam.image_encoder))
    mine = subject.mine

    def theirs(mode: str | None = None) -> Callable[[Tensor], Tensor]:
        sam = subject.original()
        return encode_and_decode(sam, peers.compiled(sam.image_encoder, mode) if mode else sam.image_encoder)

    others = {
        "segment_anything": subject.call(theirs),
        "segment_anything_compile": subject.call(lambda: theirs("default")),
        "segment_anything_compile_max_autotune": subject.call(lambda: theirs("max-autotune")),
    }
    graphed = functools.cache(lambda: fastvit.accelerate(contest.twin(mine), cuda_graphs=True))
    in_graphs = subject.call(lambda: encode_and_decode(graphed(), graphed().image_encoder))
    ours = {
        "fastvit": subject.call(lambda: encode_and_decode(mine, mine.image_encoder)),
        "fastvit_compile": subject.call(lambda: encode_and_decode(mine, peers.compiled(mine.image_encoder))),
        "fastvit_cuda_graphs": lambda: contest.replayed(graphed(), in_graphs()),
    }
    contest.run(row, settings, subject.exact, others, ours)


def run_everything(name: str, row: results.Row, settings: Settings) -> None:
    side = 2 if settings.dry else 32  # points along either side of the picture, 64 of them at once
    seen: dict[str, Tensor] = {}

    def exact(sam: Any) -> Callable[[Tensor], Tensor]:
        def run(images: Tensor) -> Tensor:
            low_res, seen["quality"] = rated(fastvit.SamPredictor(sam), pixels(images), min(side**2, 64))
            return low_res

        return run

    def pixels(images: Tensor) -> Any:
        return images[0].float().mul(40).add(128).clamp(0, 255).permute(1, 2, 0).to("cpu", torch.uint8).numpy()

    subject = Subject(name, row, settings, exact)
    picture = pixels(subject.picture)
    options = {"points_per_side": side, "points_per_batch": min(side**2, 64), "stability_score_thresh": 0.0}
    options["pred_iou_thresh"] = seen["quality"].quantile(0.9).item()

    def mine(compiled: bool) -> contest.Call:
        sam = subject.mine
        if compiled:
            sam = contest.twin(sam)
            sam.image_encoder = InOwnDtype(sam.image_encoder)
            sam.image_encoder.forward = peers.compiled(sam.image_encoder.forward)
        return Everything(fastvit.SamAutomaticMaskGenerator(sam, **options), fastvit.SamPredictor(sam), picture)

    def theirs(compiled: bool) -> contest.Call:
        from segment_anything import SamAutomaticMaskGenerator, SamPredictor

        sam = contest.twin(subject.original())
        sam.image_encoder = InOwnDtype(sam.image_encoder)
        if compiled:
            sam.image_encoder.forward = peers.compiled(sam.image_encoder.forward)
        return Everything(SamAutomaticMaskGenerator(sam, **options), SamPredictor(sam), picture)

    others = {"segment_anything": lambda: theirs(False), "segment_anything_compile": lambda: theirs(True)}
    ours = {"fastvit": lambda: mine(False), "fastvit_compile": lambda: mine(True)}
    contest.run(row, settings, subject.exact, others, ours)

"""SAM's weights from files: Meta's, safetensors and Hugging Face's give one model, and what is wrong is one line."""

import json
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastvit
from fastvit import loading
from fastvit.loading import LoadError
from fastvit.models import load_sam, sam_vit_b
from fastvit.models.sam import CheckpointError, build_sam, infer_sizes, to_huggingface_state_dict, variants
from fastvit.models.sam.checkpoints import _to_meta
from tests.model_errors import relative
from tests.models_for_acceleration import perturb

OUTPUT = 1e-5  # relative to the largest value: sums in another order
SIZES = {"dim": 32, "depth": 3, "num_heads": 2, "global_attention": (1,), "window_size": 3, "mask_in_channels": 8}
SIZES |= {"prompt_dim": 64, "decoder_mlp_dim": 48, "iou_head_hidden_dim": 64}


def small(**options):
    return perturb(build_sam(96, **{**SIZES, **options}))


def outcome(model):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 96, 70, generator=generator) * 255
    places, labels = torch.tensor([[[10.0, 20.0], [60.0, 3.0]]]), torch.tensor([[1, 0]])
    record = {"image": image, "original_size": (40, 50), "point_coords": places, "point_labels": labels}
    return model([record], True)[0]["low_res_logits"]


def meta_file(model, path, **wrapped):
    torch.save(wrapped or model.state_dict(), path)
    return path


def hugging_face_twin(vision_more=(), prompt_more=(), decoder_more=()):
    """A SamModel of the small sizes with random weights, whose decoder's eps is Hugging Face's own 1e-6."""
    from transformers import SamConfig, SamModel

    vision = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 96, "patch_size": 16}
    vision |= {"window_size": 3, "global_attn_indexes": [1], "output_channels": 64, "num_pos_feats": 32, "mlp_dim": 128}
    prompt = {"hidden_size": 64, "image_size": 96, "patch_size": 16, "mask_input_channels": 8}
    decoder = {"hidden_size": 64, "mlp_dim": 48, "iou_head_hidden_dim": 64, **dict(decoder_more)}
    vision, prompt = vision | dict(vision_more), prompt | dict(prompt_more)
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    model = perturb(SamModel(config))
    with torch.no_grad():
        for name, table in model.named_parameters():
            if "rel_pos" in name:
                table.normal_(generator=torch.Generator().manual_seed(2))
    return model


# Files that hold one


@pytest.mark.parametrize("kind", ["pth", "legacy", "model", "state_dict", "safetensors"])
def test_a_file_gives_the_model_that_was_saved(kind, tmp_path):
    model, path = small(), tmp_path / f"sam.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_file(model.state_dict(), path)
    elif kind == "legacy":
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        torch.save(model.state_dict() if kind == "pth" else {kind: model.state_dict(), "epoch": 3}, path)
    found = load_sam(path)
    assert torch.equal(outcome(found), outcome(model))
    assert list(found.state_dict()) == list(model.state_dict())
    assert not found.training
    assert all(p.requires_grad for p in found.parameters())
    path.write_bytes(b"")  # nothing of the model may lie in the file
    assert torch.equal(outcome(found), outcome(model))


@pytest.mark.parametrize(
    "options",
    [
        {"global_attention": (0, 1, 2)},
        {"global_attention": ()},
        {"window_size": 4},
        {"window_size": 14},
        {"patch_size": 8},
        {"mlp_ratio": 1.37},
        {"text_dim": 5},
        {"decoder_depth": 1, "decoder_downsample_rate": 4, "num_multimask_outputs": 2, "iou_head_depth": 4},
    ],
    ids=str,
)
def test_sizes_are_read_from_shapes(options, tmp_path):
    model = small(**options)
    found = load_sam(meta_file(model, tmp_path / "sam.pth"))
    assert torch.equal(outcome(found), outcome(model))
    assert found.state_dict().keys() == model.state_dict().keys()


def test_sizes_of_metas_model_are_read_from_its_shapes():
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        theirs = sam_model_registry["vit_b"]()
    sizes = {"dim": 768, "depth": 12, "num_heads": 12, "global_attention": (2, 5, 8, 11)}
    found = infer_sizes(theirs.state_dict())
    assert {name: found[name] for name in sizes} == sizes
    assert (found["image_size"], found["patch_size"], found["window_size"], found["mlp_ratio"]) == (1024, 16, 14, 4.0)
    assert build_sam(**found, device="meta").state_dict().keys() == theirs.state_dict().keys()


def test_a_dtype_is_the_files_unless_told(tmp_path):
    path = meta_file(small().bfloat16(), tmp_path / "sam.pth")
    for dtype in (None, torch.float32):
        found = load_sam(path, dtype=dtype)
        expected = dtype or torch.bfloat16
        assert {t.dtype for t in (*found.parameters(), *found.buffers())} == {expected}


def test_a_text_projection_begins_at_random_where_there_is_none(tmp_path):
    model = small()
    found = load_sam(meta_file(model, tmp_path / "sam.pth"), text_dim=7)
    assert found.prompt_encoder.text_embedding.weight.shape == (64, 7)
    assert found.prompt_encoder.text_embedding.weight.any()
    assert torch.equal(outcome(found), outcome(model))
    kept = load_sam(meta_file(found, tmp_path / "text.pth"))
    assert torch.equal(kept.prompt_encoder.text_embedding.weight, found.prompt_encoder.text_embedding.weight)


def test_a_size_takes_a_file_and_overrides(tmp_path):
    model = small()
    path = meta_file(model, tmp_path / "sam.pth")
    found = sam_vit_b(path, image_size=96, **SIZES, pixel_mean=[1.0, 2.0, 3.0], text_dim=3)
    assert found.pixel_mean.flatten().tolist() == [1.0, 2.0, 3.0]
    assert torch.equal(found.image_encoder.pos_embed, model.image_encoder.pos_embed)
    with pytest.raises(CheckpointError, match=r"sam.pth: lacks \d+ tensors of the model: image_encoder.blocks"):
        sam_vit_b(path)


def test_a_checkpoint_of_another_size_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(
        variants.SIZES, "vit_l", {name: SIZES[name] for name in ("dim", "depth", "num_heads", "global_attention")}
    )
    path = meta_file(small(), tmp_path / "sam.pth")
    with pytest.raises(CheckpointError, match=r"sam.pth: holds a vit_l; expected a vit_b"):
        sam_vit_b(path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wrappers_put_before_names_is_taken_off(prefix, tmp_path):
    model = small()
    torch.save({prefix + name: tensor for name, tensor in model.state_dict().items()}, tmp_path / "sam.pth")
    assert torch.equal(outcome(load_sam(tmp_path / "sam.pth")), outcome(model))


# Hugging Face


def of_hugging_face(model, image, places, labels, mask=None):
    points = {"input_points": places.unsqueeze(1), "input_labels": labels.unsqueeze(1)}
    out = model(pixel_values=image, **points, input_masks=mask, multimask_output=True)
    return out.pred_masks[:, 0], out.iou_scores[:, 0]


FOLDERS = {
    "as it comes": {},
    "eps of the encoder": {"vision_more": {"layer_norm_eps": 1e-2}},
    "eps of masks": {"prompt_more": {"layer_norm_eps": 1e-2}},
    "eps of the decoder": {"decoder_more": {"layer_norm_eps": 1e-2}},
    "heads of the decoder": {"decoder_more": {"num_attention_heads": 4}},
    "no bias": {"vision_more": {"qkv_bias": False}},
    "no positions": {"vision_more": {"use_abs_pos": False}},
    "no relative positions": {"vision_more": {"use_rel_pos": False}},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_hugging_faces_gives_its_masks(name, tmp_path):
    theirs = hugging_face_twin(**FOLDERS[name])
    theirs.save_pretrained(tmp_path)
    ours = load_sam(tmp_path)
    mask = torch.randn(1, 1, 24, 24, generator=torch.Generator().manual_seed(5))
    image = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(4))
    places, labels = torch.tensor([[[10.0, 20.0], [60.0, 3.0]]]), torch.tensor([[1, 0]])
    with torch.no_grad():
        expected = of_hugging_face(theirs, image, places, labels, mask)
        embeddings = ours.image_encoder(image)
        assert relative(embeddings, theirs.get_image_embeddings(image)) <= OUTPUT
        sparse, dense = ours.prompt_encoder((places, labels), masks=mask)
        actual = ours.mask_decoder(embeddings, ours.prompt_encoder.get_dense_pe(), sparse, dense, True)
    for one, other in zip(actual, expected, strict=True):
        assert relative(one, other) <= OUTPUT


def test_hugging_faces_names_to_metas_and_back():
    theirs = hugging_face_twin()
    state = theirs.state_dict()
    ours = build_sam(96, **SIZES)
    ours.load_state_dict(_to_meta(state))
    back = to_huggingface_state_dict(ours)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    theirs.load_state_dict(back)


def test_names_to_hugging_face_of_heads_of_another_depth_and_with_text():
    ours = small(iou_head_depth=5, text_dim=3)
    renamed = to_huggingface_state_dict(ours)
    linears = {name.split(".")[2] + name.split(".")[3] * name.split(".")[3].isdigit() for name in renamed if "iou_pred" in name}
    assert linears == {"proj_in", "layers0", "layers1", "layers2", "proj_out"}
    again = _to_meta(renamed)
    state = {name: tensor for name, tensor in ours.state_dict().items() if "text_embedding" not in name}
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_an_id_is_fetched_once_and_read_from_the_cache(tmp_path, monkeypatch):
    hugging_face_twin().save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(tmp_path)
    )
    assert torch.equal(outcome(load_sam("owner/sam")), outcome(load_sam(tmp_path)))
    files = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
    assert asked == [("owner/sam", ["config.json", *files])]


def test_an_id_without_network_is_one_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert "not to be had from the Hugging Face Hub (OSError)" in refusal("owner/sam")


# fastvit.load


def test_load_takes_a_file_and_accelerates(tmp_path):
    model = small()
    path = meta_file(model, tmp_path / "sam.pth")
    found = fastvit.load(path, dtype=torch.float32)
    assert isinstance(found, fastvit.models.Sam)
    assert relative(outcome(found), outcome(model)) <= OUTPUT
    empty = loading.load_original(path, weights=False)
    assert empty.device.type == "meta"
    assert empty.state_dict().keys() == model.state_dict().keys()


def test_load_gives_a_folders_own_class(tmp_path):
    hugging_face_twin().save_pretrained(tmp_path)
    assert type(fastvit.load(tmp_path)).__name__ == "SamModel"


def test_its_pictures_are_its_own_affair(tmp_path):
    path = meta_file(small(), tmp_path / "sam.pth")
    for what in (path, loading.load_original(path)):
        with pytest.raises(LoadError, match="prepares them itself"):
            loading.preprocessing(what)


def sharded(folder, model=None):
    (model or hugging_face_twin()).save_pretrained(folder, max_shard_size="30KB")
    index = folder / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    assert len(set(shards.values())) > 3
    return index, shards


def test_a_folder_in_shards_gives_the_model_that_was_saved(tmp_path):
    model = hugging_face_twin()
    sharded(tmp_path / "shards", model)
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(outcome(load_sam(tmp_path / "shards")), outcome(load_sam(tmp_path / "whole")))
    assert type(fastvit.load(tmp_path / "shards")).__name__ == "SamModel"


# What is refused


SHARDS = {
    "no JSON": (lambda shards, place: "{", "model.safetensors.index.json: is no JSON"),
    "no object": (lambda shards, place: "[]", "has no weight_map"),
    "no map": (lambda shards, place: "{}", "has no weight_map"),
    "an empty map": (lambda shards, place: '{"weight_map": {}}', "has no weight_map"),
    "a place that is none": (lambda shards, place: with_place(shards, 3), "says that weights lie in 3; expected the name"),
    "a path upwards": (lambda shards, place: with_place(shards, f"../{place}"), "lie in '../model-0"),
    "a path of Windows": (lambda shards, place: with_place(shards, f"C:\\{place}"), "expected the name of a file beside it"),
    "a shard that is absent": (
        lambda shards, place: with_place(shards, "absent.safetensors"),
        "absent.safetensors, which is not",
    ),
    "a tensor that is absent": (lambda shards, place: as_index({**shards, "x": place}), "does not hold what model.safetensors.i"),
    "a tensor not named": (lambda shards, place: as_index(dict(list(shards.items())[1:])), "does not hold what"),
}


def as_index(shards):
    return json.dumps({"weight_map": shards})


def with_place(shards, place):
    return as_index({**shards, next(iter(shards)): place})


@pytest.mark.parametrize("name", SHARDS)
def test_an_index_that_is_wrong_is_refused(name, tmp_path):
    change, says = SHARDS[name]
    index, shards = sharded(tmp_path / "sam")
    index.write_text(change(shards, next(iter(shards.values()))))
    assert says in refusal(tmp_path / "sam")


def test_a_damaged_shard_is_refused(tmp_path):
    _, shards = sharded(tmp_path)
    path = tmp_path / next(iter(shards.values()))
    path.write_bytes(path.read_bytes()[:-9])
    message = refusal(tmp_path)
    assert "damaged" in message
    assert path.name in message


def refusal(path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_sam(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


class Code:
    def __reduce__(self):
        return (print, ("this must not be printed",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capfd):
    path = tmp_path / "sam.pth"
    for zipped in (True, False):
        torch.save({"image_encoder.pos_embed": Code()}, path, _use_new_zipfile_serialization=zipped)
        assert "could run code: it is refused" in refusal(path)
    assert "this must not be printed" not in capfd.readouterr().out


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("kind", ["pth", "legacy", "safetensors"])
def test_a_truncated_file_is_refused(kind, share, tmp_path):
    path, state = tmp_path / f"sam.{kind.replace('legacy', 'pth')}", small().state_dict()
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    message = refusal(path)
    assert str(path) in message
    assert "damaged" in message


def altered(change):
    state = dict(small().state_dict())
    change(state)
    return state


def cut(name):
    return lambda state: state.update({name: state[name][:-1].clone()})


ALTERED = {
    "another model": (lambda s: (s.clear(), s.update(nn.Linear(3, 3).state_dict())), "for it has no image_encoder.pos_embed"),
    "nothing": (lambda s: s.clear(), "holds no state dict"),
    "a missing tensor": (
        lambda s: s.pop("mask_decoder.iou_token.weight"),
        "lacks 1 tensors of the model: mask_decoder.iou_token",
    ),
    "a missing block": (lambda s: [s.pop(n) for n in list(s) if ".blocks.1." in n], "it has no image_encoder.blocks.1.attn"),
    "no decoder": (lambda s: [s.pop(n) for n in list(s) if n.startswith("mask_")], "it has no mask_decoder.transformer"),
    "one more": (lambda s: s.update(x=torch.zeros(1)), "has 1 tensors that the model has not: x"),
    "a wrong shape": (cut("image_encoder.blocks.2.mlp.lin2.weight"), r"lin2.weight has shape (31, 128); expected (32, 128)"),
    "a wrong rank": (lambda s: s.update({"image_encoder.pos_embed": torch.zeros(3)}), "has shape (3,); expected 4 dimensions"),
    "an empty table": (lambda s: s.update({"image_encoder.pos_embed": torch.zeros(1, 0, 0, 32)}), "has shape (1, 0, 0, 32)"),
    "a short table": (
        cut("image_encoder.blocks.0.attn.rel_pos_w"),
        "blocks.0.attn.rel_pos_w has shape (4, 16); expected (5, 16)",
    ),
    "windows of two sizes": (
        lambda s: s.update({"image_encoder.blocks.0.attn.rel_pos_h": torch.zeros(7, 16)}),
        "windows have sides of 3, 4; expected one size",
    ),
    "heads that do not divide": (
        lambda s: [s.update({n: torch.zeros(5, 24)}) for n in list(s) if "rel_pos" in n],
        "rel_pos_h has",
    ),
    "integers": (lambda s: s.update({"image_encoder.pos_embed": torch.zeros(3, dtype=torch.int64)}), "no floating-point tensor"),
    "no tensor": (lambda s: s.update(x=3), "its 'x' is no floating-point tensor"),
    "sparse": (
        lambda s: s.update({"mask_decoder.iou_token.weight": s["mask_decoder.iou_token.weight"].to_sparse()}),
        "its 'mask_decoder.iou_token.weight' is a tensor laid out as torch.sparse_coo; expected a dense one",
    ),
    "without values": (
        lambda s: s.update({name: tensor.to("meta") for name, tensor in s.items()}),
        "is a tensor without values; expected a dense one",
    ),
    "a wide projection": (
        lambda s: s.update({"mask_decoder.transformer.layers.0.cross_attn_token_to_image.q_proj.weight": torch.zeros(128, 64)}),
        "q_proj.weight has shape (128, 64); expected (64, 64)",
    ),
    "more than is stored": (lambda s: s.update(x=torch.zeros(1).expand(10**12)), "is damaged, for its 'x' has more elements"),
    "a block without an end": (
        lambda s: s.update({"image_encoder.blocks.999999999999.x": torch.zeros(1)}),
        "it has no image_encoder.blocks.3",
    ),
}


@pytest.mark.parametrize("name", ALTERED)
def test_what_is_no_segment_anything_is_refused(name, tmp_path):
    change, says = ALTERED[name]
    path = tmp_path / "sam.pth"
    torch.save(altered(change), path)
    message = refusal(path)
    assert says in message
    assert str(path) in message
    with pytest.raises(LoadError) as caught:
        fastvit.load(path)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"not a checkpoint", "damaged"), (b"\x80\x02K\x03.", "damaged"), (b"PK\x05\x06" + bytes(18), "damaged")],
)
def test_a_file_of_something_else_is_refused(content, says, tmp_path):
    for suffix in ("pth", "safetensors"):
        path = tmp_path / f"sam.{suffix}"
        path.write_bytes(content)
        assert says in refusal(path)


def test_a_list_and_a_script_are_refused(tmp_path):
    path = tmp_path / "sam.pth"
    torch.save([torch.zeros(1)], path)
    assert "holds no state dict" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.txt", "nothing of torch's")
    assert "damaged" in refusal(path)


LOST = {
    "a" * 300: "cannot be looked for (File name too long)",
    "b/" + "a" * 300 + ".pth": "no such file or folder",
    "~nobody9/x.pth": "no such folder",
}


@pytest.mark.parametrize("name", LOST, ids=lambda name: name[:12])
def test_a_name_that_no_file_can_have(name):
    assert LOST[name] in refusal(name)
    with pytest.raises(LoadError):
        fastvit.load(name)


def test_what_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    """Permissions do not bind every user that tests run as: the refusal of the file system is played."""
    path = meta_file(small(), tmp_path / "sam.pth")

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "open", refuse)
        assert "sam.pth: may not be read (Permission denied)" in refusal(path)
    monkeypatch.setattr(type(path), "stat", refuse)
    assert "sam.pth: cannot be looked for (Permission denied)" in refusal(path)


@pytest.mark.parametrize("name", ["absent.pth", "./absent", "absent/a.safetensors", "", "a b"])
def test_a_name_of_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name:
        assert "no such file or folder" in refusal(name)
    else:
        assert "no folder of a saved model" in refusal(name)


def sam_config(part, values):
    return {"model_type": "sam", part: values}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "has no config.json"),
        ("[1]", "is no config of a Segment Anything"),
        ("{", "config.json: is no JSON"),
        ({"model_type": "vit"}, "its model_type is 'vit'; expected 'sam'"),
        (sam_config("vision_config", 3), "its vision_config is 3; expected an object"),
        (sam_config("vision_config", {"hidden_act": "silu"}), "the hidden_act of its vision_config is 'silu'; expected 'gelu'"),
        (sam_config("prompt_encoder_config", {"hidden_act": "relu"}), "of its prompt_encoder_config is 'relu'; expected 'gelu'"),
        (sam_config("vision_config", {"layer_norm_eps": "x"}), "layer_norm_eps of its vision_config is 'x'; expected a number"),
        (sam_config("vision_config", {"layer_norm_eps": -1}), "is -1; expected a number from 0 to 1"),
        (sam_config("vision_config", {"layer_norm_eps": float("nan")}), "is nan; expected a number from 0 to 1"),
        (sam_config("vision_config", {"use_rel_pos": 0}), "use_rel_pos of its vision_config is 0; expected true or false"),
        (sam_config("vision_config", {"window_size": 10**9}), "is 1000000000; expected a whole number from 1 to 16384"),
        (sam_config("vision_config", {"global_attn_indexes": "2"}), "is '2'; expected a list of whole numbers"),
        (sam_config("prompt_encoder_config", {"image_size": 2048}), "image_size is 2048 in its prompt_encoder_config and 1024"),
        (sam_config("mask_decoder_config", {"num_attention_heads": 0}), "is 0; expected a whole number from 1"),
        (sam_config("mask_decoder_config", {"num_attention_heads": -8}), "is -8; expected a whole number from 1"),
        (sam_config("mask_decoder_config", {"attention_downsample_rate": 1}), "is 1; expected 2"),
        (sam_config("mask_decoder_config", {"num_attention_heads": 7}), "no Segment Anything has such sizes"),
        ({"model_type": "sam"}, "holds none of model.safetensors, pytorch_model.bin"),
    ],
    ids=str,
)
def test_a_folder_that_is_none(config, says, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if "such sizes" in says:
        meta_file(small(), tmp_path / "pytorch_model.bin")
    assert says in refusal(tmp_path)

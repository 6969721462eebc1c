"""A small CLIP with random weights, saved as Hugging Face's are, with a tokenizer that spells words letter by letter."""

import json
import string
from pathlib import Path

import torch
import transformers


def save_clip(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: index for index, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=40)
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    start, end = len(letters), len(letters) + 1
    tower = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 40, "pad_token_id": end}
    torch.manual_seed(seed)
    config = transformers.CLIPConfig(
        text_config={**tower, **text, "bos_token_id": start, "eos_token_id": end},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder

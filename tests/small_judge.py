"""A small random CLIP model in the folder format of the shipped judge."""

import json
import string
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer


def save_small_judge(folder: Path) -> Path:
    """Write it to a folder: 32 x 32 pixels, 24 tokens that are single letters, 12 features."""
    letters = list(string.ascii_lowercase)
    pieces = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": len(pieces),
        "max_position_embeddings": 24,
        "bos_token_id": 52,
        "eos_token_id": 53,
        "pad_token_id": 53,
    }
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=layers | text, vision_config=layers | {"image_size": 32, "patch_size": 8}, projection_dim=12
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder

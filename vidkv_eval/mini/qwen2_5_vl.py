"""A small Qwen2.5-VL: stock classes, its processor files, and the same arithmetic laid out for training.

A vision tower of 3 layers, a language model of 4 layers with 7 query heads and 1 key/value head of width 64 (the class
sets hidden size = heads x width). A clip of 32 frames, merged in pairs, gives 16 x 16 = 256 visual tokens.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vidkv_eval.mini.scenes import FRAMES, SIDE
from vidkv_eval.mini.text import END_OF_TURN, PADDING, QWEN_SPECIALS, QWEN_TEMPLATE, save_tokenizer, write_json

SPECIALS, TEMPLATE, VIDEO_TOKEN = QWEN_SPECIALS, QWEN_TEMPLATE, "<|video_pad|>"
PATCH = 14
GRID = SIDE // PATCH  # patches along a side
CELLS = GRID // 2  # merged visual tokens along a side
STEPS = FRAMES // 2  # pairs of frames
VISUAL_TOKENS = STEPS * CELLS * CELLS


def build(tokenizer: Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """The model with random weights, initialised for training from scratch."""
    text = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 448,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10]},
        "bos_token_id": tokenizer.token_to_id(PADDING),
        "eos_token_id": tokenizer.token_to_id(END_OF_TURN),
        "pad_token_id": tokenizer.token_to_id(PADDING),
    }
    vision = {
        "depth": 3,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": SIDE,
        "fullatt_block_indexes": [2],
        "out_hidden_size": 448,
        # With 4 frames a second, a pair of frames lasts half a second and advances the temporal position by one.
        "tokens_per_second": 2,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.token_to_id("<|image_pad|>"),
        video_token_id=tokenizer.token_to_id(VIDEO_TOKEN),
        vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_to_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            nn.init.normal_(weight, std=0.02 if "embed_tokens" in name else 0.7 * weight[0].numel() ** -0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")):
            weight.data *= 0.4
    return model


def save_processor(folder: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer, image, video and processor files of the checkpoint."""
    save_tokenizer(folder, tokenizer, SPECIALS, TEMPLATE)
    pixels = {
        "size": {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "processor_class": "Qwen2_5_VLProcessor",
    }
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor", **pixels})
    write_json(folder / "video_preprocessor_config.json", {"video_processor_type": "Qwen2VLVideoProcessor", **pixels})
    write_json(folder / "processor_config.json", {"processor_class": "Qwen2_5_VLProcessor"})


def patches(frames: Tensor) -> Tensor:
    """Frames [N, FRAMES, 3, SIDE, SIDE] as the processor hands them over: [N * STEPS * GRID * GRID, 3 * 2 * PATCH * PATCH]."""
    x = frames.reshape(len(frames), STEPS, 2, 3, CELLS, 2, PATCH, CELLS, 2, PATCH).permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return x.reshape(len(frames) * STEPS * GRID * GRID, 3 * 2 * PATCH * PATCH)


def video_inputs(pixels: Tensor, ids: Tensor, video_id: int) -> dict[str, Tensor]:
    """Keyword arguments of the stock forward for normalised frames [N, FRAMES, 3, SIDE, SIDE] and prompts [N, L]."""
    return {
        "pixel_values_videos": patches(pixels),
        "video_grid_thw": torch.tensor([[STEPS, GRID, GRID]] * len(ids), device=ids.device),
        "second_per_grid_ts": torch.full((len(ids),), 0.5, device=ids.device),
        "mm_token_type_ids": 2 * (ids == video_id).int(),
    }


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def vision_block(block: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One vision layer on [windows, patches, C]: every frame pair is one window here, so all windows run as a batch."""
    windows, length, width = hidden.shape
    qkv = block.attn.qkv(block.norm1(hidden)).view(windows, length, 3, block.attn.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = ((x * cos + _rotate_half(x) * sin).to(value.dtype) for x in (query, key))
    mixed = nn.functional.scaled_dot_product_attention(query, key, value)
    hidden = hidden + block.attn.proj(mixed.transpose(1, 2).reshape(windows, length, width))
    return hidden + block.mlp(block.norm2(hidden))


class TrainingView(nn.Module):
    """The stock forward with the layout of the prompt known in advance: batched windows, compiled layers."""

    visual_tokens = VISUAL_TOKENS
    cell_frames = 2

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, compiled: bool):
        super().__init__()
        self.model = model
        wrap = torch.compile if compiled else (lambda layer: layer)
        self.text_layers = [wrap(layer) for layer in model.model.language_model.layers]
        self.vision_block = wrap(vision_block)
        index = torch.arange(GRID * GRID)
        block, place = index // 4, index % 4  # patches come in merge blocks of 2 x 2
        rows, columns = block // CELLS * 2 + place // 2, block % CELLS * 2 + place % 2
        head_width = 128 // 4
        frequency = 1.0 / (10000 ** (torch.arange(0, head_width // 2, 2).float() / (head_width // 2)))
        angle = torch.cat([rows[:, None] * frequency, columns[:, None] * frequency], -1).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def cells(self, frames: Tensor) -> Tensor:
        """Visual tokens [N, STEPS * 16, C] of normalised frames [N, FRAMES, 3, SIDE, SIDE]."""
        tower = self.model.model.visual
        projection = tower.patch_embed.proj.weight
        hidden = nn.functional.linear(patches(frames).to(frames.dtype), projection.flatten(1).to(frames.dtype))
        hidden = hidden.view(len(frames) * STEPS, GRID * GRID, -1)
        for block in tower.blocks:
            hidden = self.vision_block(block, hidden, self.cos, self.sin)
        return tower.merger(hidden.flatten(0, 1)).view(len(frames), VISUAL_TOKENS, -1)

    def visual(self, cells: Tensor) -> Tensor:
        return cells

    def positions(self, head: int, tail: list[int], device: str) -> Tensor:
        """M-RoPE positions [3, 1, L], as Transformers 5.23 computes them: text goes on CELLS after the start of the video."""
        before = torch.arange(head).expand(3, -1)
        step, row, column = torch.meshgrid(torch.arange(STEPS), torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
        video = head + torch.stack([step, row, column]).flatten(1)
        after = (head + CELLS + torch.tensor(tail)).expand(3, -1)
        return torch.cat([before, video, after], 1)[:, None].to(device)

    def decode(self, hidden: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        language_model = self.model.model.language_model
        rope = language_model.rotary_emb(hidden, positions)
        for layer in self.text_layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rope)
        return language_model.norm(hidden)

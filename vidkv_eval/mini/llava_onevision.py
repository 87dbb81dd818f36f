"""A small LLaVA-OneVision: stock classes, its processor files, and the same arithmetic laid out for training.

SigLIP of 3 layers at 112 pixels, a Qwen2 of 5 layers with 7 query heads and 1 key/value head of width 128. A clip of 32
frames gives 32 x 16 + 1 = 513 visual tokens.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from vidkv_eval.mini.scenes import FRAMES, SIDE
from vidkv_eval.mini.text import END_OF_TURN, LLAVA_SPECIALS, LLAVA_TEMPLATE, PADDING, save_tokenizer, write_json

SPECIALS, TEMPLATE, VIDEO_TOKEN = LLAVA_SPECIALS, LLAVA_TEMPLATE, "<video>"
CELLS = 4  # pooled visual tokens along a side of a frame
VISUAL_TOKENS = FRAMES * CELLS * CELLS + 1
PATCH = 14


def build(tokenizer: Tokenizer) -> LlavaOnevisionForConditionalGeneration:
    """The model with random weights, initialised for training from scratch."""
    image_id, video_id = tokenizer.token_to_id("<image>"), tokenizer.token_to_id(VIDEO_TOKEN)
    text = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=5,
        num_attention_heads=7,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.token_to_id(PADDING),
        eos_token_id=tokenizer.token_to_id(END_OF_TURN),
        pad_token_id=tokenizer.token_to_id(PADDING),
    )
    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        video_token_index=video_id,
        image_token_id=image_id,
        video_token_id=video_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[SIDE, SIDE]],
        tie_word_embeddings=True,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and "position" not in name:
            nn.init.normal_(weight, std=0.02 if "embed" in name else 0.7 * weight[0].numel() ** -0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
            weight.data *= 0.4
    return model


def save_processor(folder: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer, image, video and processor files of the checkpoint."""
    save_tokenizer(folder, tokenizer, SPECIALS, TEMPLATE)
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": SIDE, "width": SIDE}}
    pixels["processor_class"] = "LlavaOnevisionProcessor"
    image = {"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": [[SIDE, SIDE]]}
    write_json(folder / "preprocessor_config.json", {**image, **pixels})
    write_json(folder / "video_preprocessor_config.json", {"video_processor_type": "LlavaOnevisionVideoProcessor", **pixels})
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": (SIDE // PATCH) ** 2,
        "vision_feature_select_strategy": "full",
        "image_token": "<image>",
        "video_token": VIDEO_TOKEN,
        "vision_aspect_ratio": "anyres_max_9",
    }
    write_json(folder / "processor_config.json", processor)


def video_inputs(pixels: Tensor, ids: Tensor, video_id: int) -> dict[str, Tensor]:
    """Keyword arguments of the stock forward for normalised frames [N, FRAMES, 3, SIDE, SIDE] and prompts [N, L]."""
    return {"pixel_values_videos": pixels}


class TrainingView(nn.Module):
    """The stock forward with the layout of the prompt known in advance: no placeholder search, compiled layers."""

    visual_tokens = VISUAL_TOKENS
    cell_frames = 1  # frames merged into one row of cells

    def __init__(self, model: LlavaOnevisionForConditionalGeneration, compiled: bool):
        super().__init__()
        self.model = model
        wrap = torch.compile if compiled else (lambda layer: layer)
        self.vision_layers = [wrap(layer) for layer in model.model.vision_tower.encoder.layers]
        self.text_layers = [wrap(layer) for layer in model.model.language_model.layers]

    def cells(self, frames: Tensor) -> Tensor:
        """Visual tokens [N, FRAMES * 16, C] of normalised frames [N, FRAMES, 3, SIDE, SIDE], without the newline token."""
        inner = self.model.model
        hidden = inner.vision_tower.embeddings(frames.flatten(0, 1))
        for layer in self.vision_layers:
            hidden = layer(hidden, None)
        hidden = inner.multi_modal_projector(hidden)
        # Halving bilinearly an even grid, as the stock pooling does, is the mean over 2 x 2.
        hidden = hidden.view(len(hidden), CELLS, 2, CELLS, 2, -1).mean((2, 4))
        return hidden.reshape(len(frames), FRAMES * CELLS * CELLS, -1)

    def visual(self, cells: Tensor) -> Tensor:
        newline = self.model.model.image_newline[None, None].expand(len(cells), 1, -1)
        return torch.cat([cells, newline.to(cells.dtype)], 1)

    def positions(self, head: int, tail: list[int], device: str) -> Tensor:
        """RoPE positions [1, L] of head, video and tail tokens; `tail` counts from 0 at the first token after the video."""
        before = list(range(head + VISUAL_TOKENS))
        return torch.tensor([before + [head + VISUAL_TOKENS + i for i in tail]], device=device)

    def decode(self, hidden: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        language_model = self.model.model.language_model
        rope = language_model.rotary_emb(hidden, positions)
        for layer in self.text_layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rope, position_ids=positions)
        return language_model.norm(hidden)

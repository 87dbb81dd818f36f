"""Checkpoints of the 7B models with their true sizes and names, but random weights and the small tokenizer.

They load through the same code as the real ones, so that memory, speed and stored bytes can be seen without a download.
What such a model says means nothing.

Settings are those of config.json, generation_config.json and preprocessor_config.json of
llava-hf/llava-onevision-qwen2-7b-ov-hf and Qwen/Qwen2.5-VL-7B-Instruct, except for the ids of special tokens. The first
follow from `convert_llava_onevision_weights_to_hf.py` in Transformers: Qwen2-7B, whose 152064 embeddings grow by the two
tokens for images and videos and are padded to a multiple of 64; SigLIP so400m without its last layer and head.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from vidkv_eval.mini.text import (
    END_OF_TURN,
    LLAVA_SPECIALS,
    LLAVA_TEMPLATE,
    PADDING,
    QWEN_SPECIALS,
    QWEN_TEMPLATE,
    save_tokenizer,
    train_tokenizer,
    write_json,
)

QWEN2_7B = {
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}
LLAVA_CONFIG = {
    "architectures": ["LlavaOnevisionForConditionalGeneration"],
    "model_type": "llava_onevision",
    "projector_hidden_act": "gelu",
    "text_config": QWEN2_7B | {"model_type": "qwen2", "max_position_embeddings": 32768, "sliding_window": 131072, "vocab_size": 152128},
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_aspect_ratio": "anyres_max_9",
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 26,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
QWEN_CONFIG = QWEN2_7B | {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "max_position_embeddings": 128000,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_chans": 3,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
    "vocab_size": 152064,
}
LLAVA_PROCESSOR = {
    "preprocessor_config.json": {
        "image_grid_pinpoints": [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "LlavaOnevisionProcessor",
        "resample": 3,
        "size": {"height": 384, "width": 384},
    },
    "processor_config.json": {
        "image_token": "<image>",
        "num_image_tokens": 729,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>",
        "vision_feature_select_strategy": "full",
    },
}
QWEN_PROCESSOR = {
    "preprocessor_config.json": {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_pixels": 12845056,
        "merge_size": 2,
        "min_pixels": 3136,
        "patch_size": 14,
        "processor_class": "Qwen2_5_VLProcessor",
        "temporal_patch_size": 2,
    },
}


@dataclass(frozen=True)
class Family:
    """What the published checkpoint of a model holds beside its weights.

    Attributes:
        config: config.json, without ids of tokens.
        token_ids: keys of the config that hold the id of a token, and that token.
        generation: generation_config.json, without ids of tokens.
        processor: contents of the processor's files.
        specials, template: of the tokenizer.
        names: prefixes of parameters in Transformers' classes, and what stands in the files instead.
    """

    config: dict
    token_ids: dict[str, str]
    generation: dict
    processor: dict[str, dict]
    config_class: type[PretrainedConfig]
    model_class: type[PreTrainedModel]
    specials: tuple[str, ...]
    template: str
    names: dict[str, str]


FAMILIES = {
    "llava_onevision_7b": Family(
        config=LLAVA_CONFIG,
        token_ids={"image_token_index": "<image>", "video_token_index": "<video>"},
        generation={},
        processor=LLAVA_PROCESSOR,
        config_class=LlavaOnevisionConfig,
        model_class=LlavaOnevisionForConditionalGeneration,
        specials=LLAVA_SPECIALS,
        template=LLAVA_TEMPLATE,
        names={
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.vision_tower.": "vision_tower.vision_model.",
            "model.": "",
        },
    ),
    "qwen2_5_vl_7b": Family(
        config=QWEN_CONFIG,
        token_ids={
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
            "vision_token_id": "<|vision_pad|>",
        },
        generation={"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-06},
        processor=QWEN_PROCESSOR,
        config_class=Qwen2_5_VLConfig,
        model_class=Qwen2_5_VLForConditionalGeneration,
        specials=QWEN_SPECIALS,
        template=QWEN_TEMPLATE,
        names={"model.language_model.": "model.", "model.visual.": "visual."},
    ),
}


def config_file(model: str, tokenizer: Tokenizer, layers: int | None = None) -> dict:
    """Return the content of config.json.

    Args:
        model: a key of `FAMILIES`.
        tokenizer: gives the ids of special tokens.
        layers: depth of text decoder and vision tower; None for the true ones.
    """
    family = FAMILIES[model]
    config = copy.deepcopy(family.config)
    text, vision = config.get("text_config", config), config["vision_config"]
    text |= {"bos_token_id": tokenizer.token_to_id(PADDING), "eos_token_id": tokenizer.token_to_id(END_OF_TURN)}
    config |= {key: tokenizer.token_to_id(token) for key, token in family.token_ids.items()}
    if layers is not None:
        text["num_hidden_layers"] = layers
        vision["depth" if "depth" in vision else "num_hidden_layers"] = layers
    return config


def build(model: str, config: dict, device: str) -> PreTrainedModel:
    """Make the model in its own dtype on a device, with whatever numbers the memory held ("meta" takes no memory)."""
    family = FAMILIES[model]
    with torch.device("meta"):
        shell = family.model_class(family.config_class(**config))
    return shell.to(getattr(torch, config["torch_dtype"])).to_empty(device=device)


@torch.no_grad()
def randomize(model: PreTrainedModel, tokenizer: Tokenizer, seed: int) -> None:
    """Fill a model with seeded random weights of a size that keeps states finite in float16.

    Queries and keys are larger, so that attention looks at few tokens and what it sees depends on the cache. Tokens that
    are special, or not in the tokenizer, have no output weights: answers are text, and run to the limit of new tokens.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            weight.fill_(float("norm" in name and name.endswith("weight")))
        elif "embed_tokens" in name or "position" in name:
            weight.normal_(std=0.02, generator=generator)
        else:
            gain = 2.0 if name.endswith(("q_proj.weight", "k_proj.weight")) else 0.7
            weight.normal_(std=gain * weight[0].numel() ** -0.5, generator=generator)
    head = model.get_output_embeddings().weight
    head[tokenizer.get_vocab_size() :] = 0
    for token in tokenizer.get_added_tokens_decoder():
        head[token] = 0


def published_name(model: str, name: str) -> str:
    """Return the name that a parameter has in the published files."""
    names = FAMILIES[model].names
    prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
    return names.get(prefix, "") + name.removeprefix(prefix)


def published_states(model: str, built: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name in the published files and weight of each parameter."""
    for name, weight in built.named_parameters():
        yield published_name(model, name), weight


def write_checkpoint(model: str, folder: Path, *, device: str, layers: int | None = None, seed: int = 0, shard: str = "5GB") -> int:
    """Write a checkpoint folder.

    Args:
        model: a key of `FAMILIES`.
        folder: is made.
        device: where the weights are drawn; a GPU takes seconds.
        layers: as in `config_file`.
        seed: of the weights.
        shard: largest weight file.
    Returns:
        Number of parameters.
    """
    family, tokenizer = FAMILIES[model], train_tokenizer(FAMILIES[model].specials)
    config = config_file(model, tokenizer, layers)
    built = build(model, config, device)
    randomize(built, tokenizer, seed)
    save_tokenizer(folder, tokenizer, family.specials, family.template)
    end, padding = tokenizer.token_to_id(END_OF_TURN), tokenizer.token_to_id(PADDING)
    write_json(folder / "config.json", config)
    tokens = {"bos_token_id": padding, "eos_token_id": end, "pad_token_id": padding}
    write_json(folder / "generation_config.json", tokens | family.generation)
    for name, content in family.processor.items():
        write_json(folder / name, content)
    states = {name: weight.detach() for name, weight in published_states(model, built)}
    shards = split_torch_state_dict_into_shards(states, max_shard_size=shard)
    for name, members in shards.filename_to_tensors.items():
        save_file({member: states[member] for member in members}, folder / name, metadata={"format": "pt"})
    if shards.is_sharded:
        write_json(folder / "model.safetensors.index.json", {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})
    return sum(weight.numel() for weight in states.values())

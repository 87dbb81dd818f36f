"""Tiny random checkpoints, clips and rows: everything lmms-eval needs, made in seconds in a temporary folder.

Prompts are longer than 128 tokens, so that a part of each cache is quantized.
"""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from vidkv_eval.quant.affine import Affine
from vidkv_eval.quant.identity import Identity
from vidkv_eval.recipe import Recipe, load_recipe, recipe_names

FP16 = Recipe("fp16", "FP16", "", Identity(), Identity())
LOW_BIT = Recipe("low_bit", "2 bit", "", Affine(2, "per_channel", 32), Affine(2, "per_token", 32))
RECIPES = (FP16, LOW_BIT)
QUANTIZER_RECIPES = [name for name in recipe_names() if isinstance(load_recipe(name), Recipe)]


def _kinds() -> list[str]:
    """Recipes that together have every kind of quantizer, for keys and for values, with every flush."""

    def kind(config):
        if isinstance(config, dict):
            return tuple((name, kind(value)) for name, value in config.items() if name not in ("fraction", "select"))
        return config

    seen, chosen = set(), []
    for name in QUANTIZER_RECIPES:
        config = load_recipe(name).to_config()
        kinds = {(side, config["flush"], kind(config[side])) for side in ("key", "value")}
        if not kinds <= seen:
            chosen.append(name)
        seen |= kinds
    return chosen


KINDS = _kinds()
LIBRARY_RECIPES = [name for name in recipe_names() if name not in QUANTIZER_RECIPES]

FRAMES = 16
CLIPS = 3
QUESTIONS = ("Which way does the box move?", "Describe the video in detail.", "What is the colour of the box?")

_QWEN_SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_LLAVA_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'video' %}VIDEO{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_qwen2_5_vl(folder: Path) -> Path:
    """Write a random Qwen2.5-VL checkpoint with its processor."""
    ids = _make_tokenizer(folder, _QWEN_SPECIALS, _TEMPLATE.replace("VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"))
    text = _text_config(ids) | {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]}}
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128,
        "fullatt_block_indexes": [1], "window_size": 112, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    _save_random(Qwen2_5_VLForConditionalGeneration, config, folder)
    pixels = {
        "min_pixels": 784, "max_pixels": 12544, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "processor_class": "Qwen2_5_VLProcessor",
    }  # fmt: skip
    _write(folder / "preprocessor_config.json", pixels | {"image_processor_type": "Qwen2VLImageProcessor"})
    _write(folder / "video_preprocessor_config.json", pixels | {"video_processor_type": "Qwen2VLVideoProcessor"})
    _write(folder / "processor_config.json", {"processor_class": "Qwen2_5_VLProcessor"})
    return folder


def make_llava_onevision(folder: Path) -> Path:
    """Write a random LLaVA-OneVision checkpoint with its processor."""
    ids = _make_tokenizer(folder, _LLAVA_SPECIALS, _TEMPLATE.replace("VIDEO", "<video>"))
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "patch_size": 14, "image_size": 84, "vision_use_head": False,
    }  # fmt: skip
    config = LlavaOnevisionConfig(
        text_config=_text_config(ids) | {"model_type": "qwen2"},
        vision_config=vision,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=[[84, 84], [84, 168]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    _save_random(LlavaOnevisionForConditionalGeneration, config, folder)
    pixels = {
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "size": {"height": 84, "width": 84},
        "processor_class": "LlavaOnevisionProcessor",
    }  # fmt: skip
    image = {"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": config.image_grid_pinpoints}
    _write(folder / "preprocessor_config.json", pixels | image)
    _write(folder / "video_preprocessor_config.json", pixels | {"video_processor_type": "LlavaOnevisionVideoProcessor"})
    processor = {
        "processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 36, "vision_feature_select_strategy": "full",
        "image_token": "<image>", "video_token": "<video>", "vision_aspect_ratio": "anyres_max_9",
    }  # fmt: skip
    _write(folder / "processor_config.json", processor)
    return folder


def make_data(folder: Path) -> dict:
    """Write clips and rows for `video_dc499` and `moviechat_global`; returns the `data` argument of a session."""
    for suite in ("videochatgpt", "moviechat_1k_test"):
        for index in range(CLIPS):
            make_clip(folder / "hf_home" / suite / "Test_Videos" / f"clip{index}.mp4", index)
    rows = {
        "video_dc499": [{"video_name": f"clip{i}", "question": QUESTIONS[i], "answer": "A box moves."} for i in range(CLIPS)],
        "moviechat_global": [
            {"video_name": f"clip{i}.mp4", "question": QUESTIONS[i], "answer": "A box moves.", "time": 10} for i in range(CLIPS)
        ],
    }
    (folder / "rows").mkdir()
    for task, lines in rows.items():
        (folder / "rows" / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"hf_home": str(folder / "hf_home"), "rows": str(folder / "rows")}


def make_clip(path: Path, seed: int, frames: int = 24) -> None:
    """Write a white box moving over a coloured ground, 112 x 112 pixels, H.264."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 112, 112, "yuv420p"
        for index in range(frames):
            image = np.full((112, 112, 3), 40, np.uint8)
            image[..., seed % 3] = 40 + index * 8
            left = 90 * (index if seed % 2 else frames - index) // frames
            image[20 + 10 * seed : 50 + 10 * seed, left : left + 20] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@contextlib.contextmanager
def canned_judge(reply: str) -> Iterator[dict]:
    """Serve the same reply to every request; yields the `judge` argument of a session."""
    content = json.dumps({"model": "canned", "choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"url": f"http://127.0.0.1:{server.server_port}/v1/chat/completions", "model": "canned", "api_key": "none"}
        server.shutdown()


def _text_config(ids: dict[str, int]) -> dict:
    return {
        "vocab_size": max(ids.values()) + 1, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rope_theta": 1e4,
        "initializer_range": 0.2, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }  # fmt: skip


def _make_tokenizer(folder: Path, specials: tuple[str, ...], template: str) -> dict[str, int]:
    """Write a byte-level tokenizer with a few merges; returns its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(QUESTIONS, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "model_max_length": 4096, "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    _write(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(template)
    return tokenizer.get_vocab()


def _save_random(model_class: type[PreTrainedModel], config: object, folder: Path) -> None:
    torch.manual_seed(0)
    model = model_class(config)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    model.save_pretrained(folder)


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1))

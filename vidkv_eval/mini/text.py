"""Tokenizers and chat templates of the mini models.

A byte-level BPE tokenizer, trained on the sentences of the scenes until every word is one token, in the format of the
real checkpoints. The templates are those of Qwen2.5-VL and of LLaVA-OneVision's qwen_1_5 conversation: a system turn,
a user turn with the video before the text, the start of the assistant's turn.
"""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vidkv_eval.mini.scenes import QUESTION_KINDS, ask, describe, sample_scene

SYSTEM_PROMPT = "You are a helpful assistant."
# The text that lmms-eval's moviechat task puts before every question (tasks/moviechat/_default_template_yaml, 0.7.3).
MOVIECHAT_PROMPT = (
    "You are able to understand the visual content that the user provides."
    "Follow the instructions carefully and explain your answers in detail."
)
END_OF_TURN, PADDING = "<|im_end|>", "<|endoftext|>"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_SPECIALS = (*CHATML, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
LLAVA_SPECIALS = (*CHATML, "<image>", "<video>")

_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM_PROMPT + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}@IMAGE@{% elif part['type'] == 'video' %}@VIDEO@"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_TEMPLATE = _TEMPLATE.replace("@IMAGE@", "<|vision_start|><|image_pad|><|vision_end|>").replace(
    "@VIDEO@", "<|vision_start|><|video_pad|><|vision_end|>"
)
LLAVA_TEMPLATE = _TEMPLATE.replace("@IMAGE@", "<image>\n").replace("@VIDEO@", "<video>\n")


def train_tokenizer(specials: tuple[str, ...]) -> Tokenizer:
    """Byte-level BPE in which every word of the scenes' sentences is one token; the same tokenizer at every call."""
    rng = random.Random(0)
    lines = [SYSTEM_PROMPT, MOVIECHAT_PROMPT, "system\nuser\nassistant\n"]
    for _ in range(400):
        scene = sample_scene(rng)
        for prompt, answer in [describe(scene), *(ask(scene, kind, rng) for kind in QUESTION_KINDS)]:
            lines += [prompt, answer]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer, specials: tuple[str, ...], template: str) -> None:
    """Write the tokenizer files and the chat template of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
            "special": True,
        }
        for token in specials
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": added,
        "eos_token": END_OF_TURN,
        "pad_token": PADDING,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(template)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")

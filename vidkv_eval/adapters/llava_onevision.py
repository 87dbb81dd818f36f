"""LLaVA-OneVision through lmms-eval's `llava_hf` chat adapter."""

from collections.abc import Callable
from typing import Any

import torch
from lmms_eval.models.chat.llava_hf import LlavaHf
from transformers import LlavaOnevisionForConditionalGeneration

from vidkv_eval.adapters.base import OnceProcessor, Settled, VidKVAdapter, named_dtype, stock_attention, with_names
from vidkv_eval.attention import OURS, use_attention
from vidkv_eval.frames import read_frames


class VidKVLlavaOnevision(VidKVAdapter, LlavaHf):
    """`llava_hf` with a quantized cache, and able to answer about a video without an image."""

    model_type = "llava_onevision"

    def __init__(
        self,
        pretrained: str,
        *,
        recipe: str | None = None,
        storage_dtype: str | None = None,
        keep_dense: bool = False,
        revision: str = "main",
        dtype: str = "float16",
        frames: int = 32,
        attn_implementation: str | None = None,
        device: str = "cuda",
        device_map: str | None = None,
        **stock: Any,
    ):
        """Load the model.

        Args:
            pretrained: folder, or repository on the hub.
            recipe: name or file of a recipe; None leaves the cache to the caller.
            storage_dtype, keep_dense: as in `QuantizedCache`.
            revision: of the repository.
            dtype: of the weights.
            frames: read from each video, spread evenly.
            attn_implementation: a name of Transformers, or of `vidkv_eval.attention`: grouped_sdpa, fused; None: its default.
            device, device_map: where the model runs; the map defaults to the device.
            **stock: further arguments of `llava_hf`.
        """
        self._refuse_other_family(pretrained, revision)
        model_class = Settled(LlavaOnevisionForConditionalGeneration, dtype=named_dtype(dtype))
        load = with_names(LlavaHf.__init__, model_map={self.model_type: model_class})
        stock |= stock_attention(attn_implementation)
        load(self, pretrained, revision=revision, device=device, device_map=device_map or device, max_frames_num=frames, **stock)
        self._image_processor = OnceProcessor(VideoProcessor(self._image_processor, frames), self.once)
        self.use_recipe(recipe, storage_dtype, keep_dense)
        if attn_implementation in OURS:
            use_attention(self.model, attn_implementation)


class VideoProcessor:
    """A processor that can be called the way `llava_hf` does for a video.

    The stock call passes an empty list of images, which the processor refuses, and the bare path of the video, of which the
    processor would take every frame.
    """

    def __init__(self, processor: Callable, frames: int):
        self._processor = processor
        self._frames = frames

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *, images: list | None = None, videos: list[str] | None = None, **options: Any) -> Any:
        frames = [torch.from_numpy(read_frames(path, self._frames)).permute(0, 3, 1, 2) for path in videos or ()]
        return self._processor(images=images or None, videos=frames or None, **options)

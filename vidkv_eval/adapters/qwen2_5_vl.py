"""Qwen2.5-VL through lmms-eval's `qwen2_5_vl` chat adapter. Frames are sampled by qwen-vl-utils, as in the stock adapter."""

import contextlib
import io
from typing import Any

from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL
from qwen_vl_utils import process_vision_info
from qwen_vl_utils.vision_process import get_video_reader_backend
from transformers import AutoProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from vidkv_eval.adapters.base import OnceProcessor, Settled, VidKVAdapter, named_dtype, stock_attention, with_names
from vidkv_eval.attention import OURS, use_attention
from vidkv_eval.frames import VideoUnreadable


class VidKVQwen25VL(VidKVAdapter, Qwen2_5_VL):
    """`qwen2_5_vl` with a quantized cache, any dtype, and any device."""

    model_type = "qwen2_5_vl"

    def __init__(
        self,
        pretrained: str,
        *,
        recipe: str | None = None,
        storage_dtype: str | None = None,
        keep_dense: bool = False,
        revision: str = "main",
        dtype: str = "bfloat16",
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
            frames: read from each video, spread evenly, at most; an even number, because the model merges pairs.
            attn_implementation: a name of Transformers, or of `vidkv_eval.attention`: grouped_sdpa, fused; None: its default.
            device, device_map: where the model runs; the map defaults to the device.
            **stock: further arguments of `qwen2_5_vl`.
        """
        self._refuse_other_family(pretrained, revision)
        load = with_names(
            Qwen2_5_VL.__init__,
            Qwen2_5_VLForConditionalGeneration=Settled(Qwen2_5_VLForConditionalGeneration, dtype=named_dtype(dtype), revision=revision),
            # False is what the pinned Transformers does unasked; asked for, it does not warn about later releases.
            AutoProcessor=Settled(AutoProcessor, revision=revision, cap_pixels_per_frame=False),
            AutoTokenizer=Settled(AutoTokenizer, revision=revision),
        )
        stock |= stock_attention(attn_implementation)
        load(self, pretrained, device=device, device_map=device_map or device, max_num_frames=frames, **stock)
        self.processor = OnceProcessor(self.processor, self.once)
        self.use_recipe(recipe, storage_dtype, keep_dense)
        if attn_implementation in OURS:
            use_attention(self.model, attn_implementation)
        _demand_decord()

    def _loop_names(self) -> dict[str, Any]:
        return {"process_vision_info": self._read_videos_once}

    def _read_videos_once(self, messages: list, **options: Any) -> tuple:
        return self.once(("videos", str(messages)), lambda: _read_videos(messages, **options))


def _read_videos(messages: list, **options: Any) -> tuple:
    try:
        return process_vision_info(messages, **options)
    except AttributeError as error:
        # After a failure of decord, qwen-vl-utils turns to torchvision.io.read_video, which the pinned torchvision lacks.
        if "read_video" not in str(error):
            raise
        paths = [part["video"] for turns in messages for turn in turns for part in turn["content"] if "video" in part]
        raise VideoUnreadable(", ".join(paths), "decord cannot give the frames asked for (at least 2 are needed)") from error


def _demand_decord() -> None:
    """Raise unless qwen-vl-utils reads with decord; other readers give other pixels."""
    with contextlib.redirect_stderr(io.StringIO()):
        backend = get_video_reader_backend()
    if backend != "decord":
        raise RuntimeError(f"qwen-vl-utils reads videos with {backend}; set FORCE_QWENVL_VIDEO_READER=decord")

"""Clips: scenes written as H.264 mp4 files."""

from pathlib import Path

import av
import torch

from vidkv_eval.mini.render import render, scene_array
from vidkv_eval.mini.scenes import SIDE, Event

FRAMES_PER_SECOND = 4


def write_clip(path: Path, scene: tuple[Event, ...], seed: int) -> None:
    """Render a scene and write it as H.264 (yuv420p, FRAMES_PER_SECOND, constant quality, one thread: the same bytes each time)."""
    generator = torch.Generator().manual_seed(seed)
    frames = render(torch.tensor([scene_array(scene)]), generator)[0]
    pixels = frames.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "16", "preset": "slow"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())

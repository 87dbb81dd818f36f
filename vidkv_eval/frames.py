"""Uniform frame sampling with decord."""

import os

import decord
import numpy as np


class VideoUnreadable(Exception):
    """A video is missing, or its frames cannot be decoded.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(f"cannot read video {path}: {reason}; replace the file, or leave its samples out")
        self.path = path
        self.reason = reason


def read_frames(path: str, count: int) -> np.ndarray:
    """Read `count` frames spread evenly from the first to the last; a video with fewer frames repeats some.

    Returns:
        uint8 [count, height, width, 3], RGB.
    Raises:
        VideoUnreadable: the file is missing or damaged, or holds no frames.
    """
    reader = open_video(path)
    indices = np.linspace(0, len(reader) - 1, count, dtype=int)
    try:
        return reader.get_batch(indices).asnumpy()
    except (RuntimeError, decord.DECORDError) as error:
        raise VideoUnreadable(path, _short(error)) from error


def open_video(path: str) -> decord.VideoReader:
    """Open a video that has at least one frame.

    Raises:
        VideoUnreadable: the file is missing or damaged, or holds no frames.
    """
    if not os.path.exists(path):
        raise VideoUnreadable(path, "no such file")
    try:
        reader = decord.VideoReader(path)
    except (RuntimeError, decord.DECORDError) as error:
        raise VideoUnreadable(path, f"not a video that can be decoded ({_short(error)})") from error
    if len(reader) == 0:
        raise VideoUnreadable(path, "it holds no frames")
    return reader


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]

"""Pixels of scenes: many scenes at once on any device, for training on a GPU as for writing clips on a CPU."""

import torch
from torch import Tensor

from vidkv_eval.mini.scenes import COLOURS, FRAMES, MOTIONS, SHAPES, SIDE, Event

SLOTS = 6
CLUTTER = 4
RGB = (
    (230, 30, 30),
    (30, 200, 40),
    (40, 60, 240),
    (240, 230, 40),
    (230, 40, 220),
    (40, 220, 230),
    (12, 12, 12),
    (250, 250, 250),
)
_FIELDS = ("present", "shape", "colour", "blinks", "start", "end", "x0", "y0", "x1", "y1", "r0", "r1")


def scene_array(scene: tuple[Event, ...]) -> list[list[float]]:
    """A scene as SLOTS rows of numbers, in the order of `_FIELDS`; unused slots are zero."""
    rows = [
        [1, SHAPES.index(e.shape), COLOURS.index(e.colour), e.motion == list(MOTIONS)[7], e.start, e.end, *e.track, *e.radii]
        for e in scene
    ]
    return [[float(x) for x in row] for row in rows] + [[0.0] * len(_FIELDS)] * (SLOTS - len(rows))


def inside_shape(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Whether points lie inside a shape of radius about one; `shape` indexes SHAPES, y points down. All broadcast."""
    square_distance = x * x + y * y
    upward = (y <= 0.65) & (x.abs() * 1.75 <= y + 1.25)
    downward = (y >= -0.65) & (x.abs() * 1.75 <= 1.25 - y)
    return (
        ((shape == 0) & (square_distance <= 1))
        | ((shape == 1) & (torch.maximum(x.abs(), y.abs()) <= 0.85))
        | ((shape == 2) & upward)
        | ((shape == 3) & (upward | downward))
        | ((shape == 4) & (x.abs() * 1.5 + y.abs() <= 1.3))
        | ((shape == 5) & (square_distance <= 1.2) & (square_distance >= 0.42))
    )


def draw(image: Tensor, shape: Tensor, rgb: Tensor, x: Tensor, y: Tensor, radius: Tensor, visible: Tensor) -> Tensor:
    """Paint one object a clip over `image` [N, F, 3, Y, X]; shape [N], rgb [N, 3], the others [N, F] (F may be 1)."""
    pixel = torch.arange(SIDE, device=image.device) + 0.5
    dx = (pixel[None, None, None, :] - x[..., None, None]) / radius[..., None, None]
    dy = (pixel[None, None, :, None] - y[..., None, None]) / radius[..., None, None]
    mask = inside_shape(shape[:, None, None, None], dx, dy) & visible[..., None, None]
    return torch.where(mask[:, :, None], rgb[:, None, :, None, None].to(image.dtype), image)


def tracks(scenes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where every object is at every frame.

    Args:
        scenes: [N, SLOTS, 12] rows of `scene_array`.
    Returns:
        x, y, radius in pixels and visible (bool), each [N, SLOTS, FRAMES].
    """
    present, _, _, blinks, start, end, x0, y0, x1, y1, r0, r1 = scenes[..., None].unbind(2)
    frame = torch.arange(FRAMES, device=scenes.device)[None, None]
    share = ((frame - start) / (end - start - 1).clamp(min=1)).clamp(0, 1)
    visible = (present > 0) & (frame >= start) & (frame < end)
    visible &= ~((blinks > 0) & (torch.remainder(frame - start, 4) >= 2))
    return x0 + (x1 - x0) * share, y0 + (y1 - y0) * share, (r0 + (r1 - r0) * share).clamp(min=1), visible


def render(scenes: Tensor, generator: torch.Generator, draw=draw) -> Tensor:
    """Draw scenes over a random texture and CLUTTER small still shapes that nobody asks about.

    Args:
        scenes: [N, SLOTS, 12] rows of `scene_array`.
        generator: random state of textures and clutter, on the device of `scenes`.
        draw: the painter; a caller may pass a compiled one.
    Returns:
        float32 [N, FRAMES, 3, SIDE, SIDE], 0 to 255.
    """
    device, count = scenes.device, len(scenes)

    def noise(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    rgb = torch.tensor(RGB, device=device, dtype=torch.float32)
    ground = 105 + 60 * (noise(count, 3, 1, 1) - 0.5) + 70 * (noise(count, 1, 1, 1) - 0.5)
    texture = torch.nn.functional.interpolate(noise(count, 3, 10, 10) - 0.5, size=(SIDE, SIDE), mode="bilinear") * 130
    image = (ground + texture).clamp(0, 255)[:, None]
    for _ in range(CLUTTER):
        which = noise(count, 5)
        shape, colour = (which[:, 0] * len(SHAPES)).long(), (which[:, 1] * len(COLOURS)).long()
        x, y, radius = 6 + 100 * which[:, 2:3], 6 + 100 * which[:, 3:4], 4 + 2.5 * which[:, 4:5]
        image = draw(image, shape, rgb[colour], x, y, radius, torch.ones_like(x, dtype=torch.bool))
    image = image.expand(count, FRAMES, 3, SIDE, SIDE)
    x, y, radius, visible = tracks(scenes)
    for slot in range(SLOTS):
        shape, colour = scenes[:, slot, 1].long(), scenes[:, slot, 2].long()
        image = draw(image, shape, rgb[colour], x[:, slot], y[:, slot], radius[:, slot], visible[:, slot])
    return image


def imitate_h264(frames: Tensor, generator: torch.Generator) -> Tensor:
    """What a yuv420p codec does to training frames, cheaply: half-resolution colour, and noise of a few levels.

    Args:
        frames: [N, F, 3, Y, X], 0 to 255.
    """
    red, green, blue = frames.unbind(2)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = torch.stack([blue - luma, red - luma], 2)
    chroma = torch.nn.functional.avg_pool2d(chroma.flatten(0, 1), 2)
    chroma = torch.nn.functional.interpolate(chroma, scale_factor=2.0, mode="bilinear").unflatten(0, frames.shape[:2])
    blue, red = chroma[:, :, 0] + luma, chroma[:, :, 1] + luma
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    strength = 10 * torch.rand(len(frames), 1, 1, 1, 1, device=frames.device, generator=generator)
    jitter = torch.rand(len(frames), frames.shape[1], 1, SIDE, SIDE, device=frames.device, generator=generator) - 0.5
    return (torch.stack([red, green, blue], 2) + strength * jitter).clamp(0, 255)

"""Scenes: which objects appear, when, where and what they do, and the sentences that are true of them.

A scene lasts FRAMES frames. Four to six objects appear one after the other, two in view at a time. Every object has a
colour of its own, a shape, a motion and a zone of a 4 x 4 grid in which it ends. Nothing here knows pixels or tensors.
"""

import random
from dataclasses import dataclass

FRAMES = 32
SIDE = 112

SHAPES = ("circle", "square", "triangle", "star", "diamond", "ring")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan", "black", "white")
ROWS = ("top", "upper", "lower", "bottom")
COLUMNS = ("left", "midleft", "midright", "right")
COUNTS = {4: "four", 5: "five", 6: "six"}
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
# What an object does, and the words that lead from there to the zone where it ends.
MOTIONS = {
    "leftward": "moves leftward to",
    "rightward": "moves rightward to",
    "upward": "moves upward to",
    "downward": "moves downward to",
    "still": "stays still at",
    "bigger": "grows bigger at",
    "smaller": "shrinks smaller at",
    "repeatedly": "blinks repeatedly at",
}
ZONE_CENTRES = (16, 42, 70, 96)
MIN_GAP = 24  # pixels between two objects in view, so that neither hides the other

DESCRIPTION_PROMPT = "Please describe the video in detail, object by object."
QUESTION_KINDS = ("first", "last", "after", "before", "which", "count", "where")


@dataclass(frozen=True)
class Event:
    """One object: what it is, what it does, and when and where.

    Attributes:
        start, end: frames [start, end) in which it is in view.
        track: (x0, y0, x1, y1) centre at the first and the last frame, in pixels.
        radii: (r0, r1) at the first and the last frame, in pixels.
    """

    colour: str
    shape: str
    motion: str
    row: str
    column: str
    start: int
    end: int
    track: tuple[float, float, float, float]
    radii: tuple[float, float]

    @property
    def object(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def doing(self) -> str:
        return f"{MOTIONS[self.motion]} the {self.row} {self.column}"

    def centre(self, frame: int) -> tuple[float, float]:
        share = (frame - self.start) / max(1, self.end - self.start - 1)
        x0, y0, x1, y1 = self.track
        return x0 + (x1 - x0) * share, y0 + (y1 - y0) * share


def sample_scene(rng: random.Random) -> tuple[Event, ...]:
    """Draw a scene; the same generator state gives the same scene."""
    while True:
        count = rng.choice(list(COUNTS))
        objects = [(colour, rng.choice(SHAPES)) for colour in rng.sample(COLOURS, count)]
        cuts = [round(FRAMES * i / (count + 1)) for i in range(count + 2)]
        for i in range(1, count + 1):
            cuts[i] += rng.choice((-1, 0, 0, 1))
        events: list[Event] = []
        for i, (colour, shape) in enumerate(objects):
            event = _place(rng, colour, shape, cuts[i], cuts[i + 2], events[-1:])
            if event is None:
                break
            events.append(event)
        if len(events) == count:
            return tuple(events)


def _place(rng: random.Random, colour: str, shape: str, start: int, end: int, others: list[Event]) -> Event | None:
    for _ in range(12):
        event = _sample_event(rng, colour, shape, start, end)
        if all(_apart(event, other) for other in others):
            return event
    return None


def _sample_event(rng: random.Random, colour: str, shape: str, start: int, end: int) -> Event:
    zones = range(len(ZONE_CENTRES))
    motion = rng.choice(list(MOTIONS))
    row, column = rng.choice(zones), rng.choice(zones)
    row0, column0 = row, column
    low, high = sorted(rng.sample(zones, 2))
    if motion == "leftward":
        column0, column = high, low
    elif motion == "rightward":
        column0, column = low, high
    elif motion == "upward":
        row0, row = high, low
    elif motion == "downward":
        row0, row = low, high
    dx, dy, radius = rng.uniform(-4, 4), rng.uniform(-4, 4), rng.uniform(12, 15)
    radii = {"bigger": (8.0, 19.0), "smaller": (19.0, 8.0)}.get(motion, (radius, radius))
    track = (ZONE_CENTRES[column0] + dx, ZONE_CENTRES[row0] + dy, ZONE_CENTRES[column] + dx, ZONE_CENTRES[row] + dy)
    return Event(colour, shape, motion, ROWS[row], COLUMNS[column], start, end, track, radii)


def _apart(one: Event, other: Event) -> bool:
    for frame in range(max(one.start, other.start), min(one.end, other.end)):
        (ax, ay), (bx, by) = one.centre(frame), other.centre(frame)
        if abs(ax - bx) < MIN_GAP and abs(ay - by) < MIN_GAP:
            return False
    return True


def describe(scene: tuple[Event, ...]) -> tuple[str, str]:
    """Prompt and true description of a scene."""
    parts = [f"The video shows {COUNTS[len(scene)]} objects."]
    parts += [f"{ORDINALS[i].capitalize()} a {event.object} {event.doing}." for i, event in enumerate(scene)]
    return DESCRIPTION_PROMPT, " ".join(parts)


def ask(scene: tuple[Event, ...], kind: str, rng: random.Random) -> tuple[str, str]:
    """A question of `kind` (one of QUESTION_KINDS) about a scene, and its true answer.

    `which` needs a motion that occurs once; a scene without one is asked for its last object instead.
    """
    if kind == "which":
        motions = [event.motion for event in scene]
        candidates = [event for event in scene if motions.count(event.motion) == 1]
        if not candidates:
            return ask(scene, "last", rng)
        event = rng.choice(candidates)
        doing = " ".join(MOTIONS[event.motion].split()[:2])
        return _full(f"Which object {doing} in the video?"), f"The object that {event.doing} of the video frame is a {event.object}."
    if kind == "first":
        return _full("What happened first in the video?"), f"The first object is a {scene[0].object} that {scene[0].doing}."
    if kind == "last":
        return _full("What happened last in the video?"), f"The last object is a {scene[-1].object} that {scene[-1].doing}."
    if kind == "after":
        i = rng.randrange(len(scene) - 1)
        answer = f"Just after the {scene[i].object} comes a {scene[i + 1].object} that {scene[i + 1].doing}."
        return _full(f"What happened just after the {scene[i].object}?"), answer
    if kind == "before":
        i = rng.randrange(1, len(scene))
        answer = f"Just before the {scene[i].object} comes a {scene[i - 1].object} that {scene[i - 1].doing}."
        return _full(f"What happened just before the {scene[i].object}?"), answer
    if kind == "count":
        answer = f"There are {COUNTS[len(scene)]} objects in the video and the last one is a {scene[-1].object}."
        return _full("How many objects appear in the video?"), answer
    if kind == "where":
        event = rng.choice(scene)
        return _full(f"Where did the {event.object} go?"), f"The {event.object} {event.doing} of the video frame."
    raise ValueError(f"unknown kind of question {kind!r}; allowed: {', '.join(QUESTION_KINDS)}")


def _full(question: str) -> str:
    """Add a request of 11 or 12 tokens, so that every question is 19 tokens long.

    With it the whole prompt is a multiple of 32 tokens and no question token escapes quantization into the residual.
    """
    words = len(question.split())
    return f"{question} Please answer in one full sentence that names all {'the ' if words == 6 else ''}facts."

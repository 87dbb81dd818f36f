"""What a session returns."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question of a task: its place in the dataset, the prompt text, the reference answer and the path of its video."""

    id: int
    question: str
    target: str
    video: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """One sample answered with one recipe.

    Attributes:
        sample: its id.
        recipe: its name.
        text: the answer; may be empty, if the model said nothing.
        seconds: wall time of this answer. The first recipe of a sample also pays for reading the video and for the prefill;
            recipes that decode as one batch share its time evenly.
        key_bytes, value_bytes: all that the cache stored at the end of this answer, metadata included.
        key_elements, value_elements: numbers that these bytes stand for.
    """

    sample: int
    recipe: str
    text: str
    prompt_tokens: int
    output_tokens: int
    seconds: float
    key_bytes: int
    value_bytes: int
    key_elements: int
    value_elements: int


@dataclasses.dataclass(frozen=True)
class Scores:
    """What lmms-eval made of the answers.

    Attributes:
        metrics: the task's aggregate of each metric.
        per_sample: value of each metric for each sample, in the order of the samples.
        reviews: the judge's reply on each sample, empty where the task asks no judge.
    """

    metrics: dict[str, float]
    per_sample: dict[str, list[float]]
    reviews: list[str]


class JudgeFailed(Exception):
    """The judge gave no usable verdict on a sample; lmms-eval would have counted it as 0."""

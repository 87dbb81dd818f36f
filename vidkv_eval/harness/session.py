"""One model and one task."""

import contextlib
import dataclasses
import functools
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vidkv_eval import torchvision_cpu
from vidkv_eval.frames import open_video
from vidkv_eval.harness.results import Answer, Sample, Scores
from vidkv_eval.harness.variables import environment_variables
from vidkv_eval.inject import GenerateCall, GenerateFailed, PrefillMemo, injected, injected_rows
from vidkv_eval.recipe import BaseRecipe, RecipeError


class Session:
    """Answers the samples of a task with recipes, and scores texts.

    The task is loaded at once, the model when it first answers, so that recorded texts can be scored without it. Nothing is
    written under data.hf_home.

    Attributes:
        samples: the first `limit` samples of the task, in order.
    """

    def __init__(self, model: dict, benchmark: dict, data: dict, *, device: str, judge: dict | None = None, limit: int | None = None):
        """Load the task.

        Args:
            model: adapter (model id of `adapters.plugin`), pretrained, and optionally revision, dtype, frames,
                attn_implementation and args (further arguments of the adapter).
            benchmark: task (name in lmms-eval), max_new_tokens, and optionally split.
            data: hf_home, rows and optionally revision, as in `load_task`.
            device: where the model runs, such as "cpu" or "cuda".
            judge: url (complete, ending in chat/completions), model, api_key; None: texts cannot be scored by a judge.
            limit: number of samples; None: all.
        """
        _import_lmms_eval()
        from vidkv_eval.harness.task import load_task

        self._model = model
        self._device = device
        self._scratch = tempfile.TemporaryDirectory(prefix="vidkv-")
        with _without_bars():
            self._task = load_task(benchmark, data, judge, scratch=Path(self._scratch.name))
        documents = self._task.test_docs()
        count = len(documents) if limit is None else min(limit, len(documents))
        self.samples = [self._sample(index, documents[index]) for index in range(count)]

    @functools.cached_property
    def adapter(self):
        """The loaded model, an adapter of lmms-eval."""
        from lmms_eval.models import MODEL_REGISTRY_V2

        from vidkv_eval.adapters import plugin

        plugin.register()
        names = [manifest.model_id for manifest in plugin.manifests()]
        if self._model["adapter"] not in names:
            raise ValueError(f"unknown adapter {self._model['adapter']!r}; known: {', '.join(names)}")
        settings = {name: self._model.get(name) for name in ("revision", "dtype", "frames", "attn_implementation")}
        arguments = {name: value for name, value in settings.items() if value is not None} | dict(self._model.get("args") or {})
        adapter_class = MODEL_REGISTRY_V2.get_model_class(self._model["adapter"])
        with _without_bars():
            adapter = adapter_class(pretrained=str(self._model["pretrained"]), device=self._device, **arguments)
        adapter.task_dict[self._task.config.task] = self._task.dataset
        return adapter

    def answer(self, sample_id: int, recipes: Sequence[BaseRecipe], cache_options: dict) -> Iterator[Answer]:
        """Answer one sample with each recipe in turn; each answer comes as soon as it is there.

        The video is read once, and the prefill of all recipes with `prefill: exact` is computed once. No text depends on which
        other recipes run beside it.

        Args:
            sample_id: index into `samples`.
            recipes: in the order wanted.
            cache_options: storage_dtype (name) and keep_dense, as in `QuantizedCache`, and rows: how many recipes decode as one
                batch, null for one after the other. A batch is always filled up to that many rows, because the size of a
                batch changes the rounding of matrix products: with it, a recipe alone computes what it computes in company.
        Raises:
            VideoUnreadable: its video is missing or damaged.
            GenerateFailed: the model or the cache raised an error.
            RecipeError: a recipe needs a package that is not installed.
        """
        sample = self.samples[sample_id]
        open_video(sample.video)
        prefill = PrefillMemo()
        options = dict(cache_options)
        rows = options.pop("rows", None)
        with self.adapter.one_sample():
            for shares_prefill, part in itertools.groupby(recipes, lambda recipe: recipe.prefill == "exact"):
                if rows and shares_prefill:
                    yield from self._answer_in_batches(sample, list(part), rows, prefill, options)
                    continue
                memo = prefill if shares_prefill else None
                for recipe in part:
                    with injected(self.adapter.model, lambda recipe=recipe: self.adapter.make_cache(recipe, **options), memo) as calls:
                        yield self._answer(sample, recipe, calls)

    def score(self, texts: Sequence[str]) -> Scores:
        """Score one text for each sample with the task's own code.

        Raises:
            JudgeFailed: the judge gave no verdict on a sample, or one that the task cannot read.
        """
        from vidkv_eval.harness.scoring import score

        if len(texts) != len(self.samples):
            raise ValueError(f"{len(texts)} texts for {len(self.samples)} samples; score every sample, in order")
        with _without_bars():
            return score(self._task, texts, scratch=Path(self._scratch.name))

    def _answer_in_batches(
        self, sample: Sample, recipes: list[BaseRecipe], rows: int, prefill: PrefillMemo, options: dict
    ) -> Iterator[Answer]:
        for start in range(0, len(recipes), rows):
            part = recipes[start : start + rows]
            try:
                answers = self._answer_together(sample, part, rows, prefill, options)
            except (GenerateFailed, RecipeError):
                # Each by itself, so that the one that fails is the one that is blamed.
                for recipe in part:
                    yield from self._answer_together(sample, [recipe], rows, prefill, options)
            else:
                yield from answers

    def _answer_together(
        self, sample: Sample, recipes: Sequence[BaseRecipe], rows: int, prefill: PrefillMemo, options: dict
    ) -> list[Answer]:
        filled = [*recipes, *[recipes[0]] * (rows - len(recipes))]
        caches = [self.adapter.make_cache(recipe, **options) for recipe in filled]
        started = time.perf_counter()
        with injected_rows(self.adapter.model, caches, prefill) as calls:
            answers = [self._answer(sample, recipe, calls) for recipe in recipes]
        share = (time.perf_counter() - started) / len(answers)
        return [dataclasses.replace(answer, seconds=share) for answer in answers]

    def _answer(self, sample: Sample, recipe: BaseRecipe, calls: list[GenerateCall]) -> Answer:
        """Ask the adapter; `calls` is the log of whoever injects the cache."""
        config = self._task.config
        metadata = {"task": config.task, "split": config.test_split, "doc_id": sample.id, "repeats": 1}
        request = self._task.construct_requests(doc_id=sample.id, ctx=sample.question, metadata=metadata)
        started = time.perf_counter()
        (result,) = self.adapter.generate_until([request])
        call = calls[-1]
        return Answer(
            sample=sample.id,
            recipe=recipe.name,
            text=result.text,
            prompt_tokens=call.prompt_tokens,
            output_tokens=call.output_tokens,
            seconds=time.perf_counter() - started,
            key_bytes=call.footprint.key_bytes,
            value_bytes=call.footprint.value_bytes,
            key_elements=call.footprint.key_elements,
            value_elements=call.footprint.value_elements,
        )

    def _sample(self, index: int, document: dict) -> Sample:
        return Sample(index, self._task.doc_to_text(document), str(self._task.doc_to_target(document)), self._video_of(document))

    def _video_of(self, document: dict) -> str:
        """The path of a document's video, also if no file is there, for which shipped task code leaves the program."""
        try:
            (path,) = self._task.doc_to_visual(document)
        except SystemExit as refusal:
            message = str(refusal.code)
            return message.partition("video path:")[2].partition(" does not exist")[0] or message
        return path


@functools.cache
def _import_lmms_eval() -> None:
    """Import lmms-eval, which sends its log to the screen, and leave of that log the warnings, on stderr.

    The libraries below it report their use over the network, also for local rows, unless told otherwise before their import.
    """
    torchvision_cpu.install()
    with environment_variables(HF_UPDATE_DOWNLOAD_COUNTS="0", HF_HUB_DISABLE_TELEMETRY="1"):
        import lmms_eval.evaluator  # noqa: F401
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the progress bars of libraries off the screen; their log handlers hold the real stderr and still write to it."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield

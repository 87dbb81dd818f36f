"""The bridge to lmms-eval: one model answers the samples of one task, and lmms-eval's own code scores the answers."""

from vidkv_eval.frames import VideoUnreadable as VideoUnreadable
from vidkv_eval.harness.results import Answer as Answer
from vidkv_eval.harness.results import JudgeFailed as JudgeFailed
from vidkv_eval.harness.results import Sample as Sample
from vidkv_eval.harness.results import Scores as Scores
from vidkv_eval.harness.session import Session as Session
from vidkv_eval.inject import GenerateFailed as GenerateFailed

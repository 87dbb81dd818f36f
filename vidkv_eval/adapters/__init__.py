"""lmms-eval models that answer with a quantized cache: subclasses of its own chat adapters, one file a model family.

lmms-eval finds them through `plugin`. On a CPU build of torch its command needs a launcher, `python -m vidkv_eval.adapters`.
"""

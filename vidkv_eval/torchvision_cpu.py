"""Let the CUDA-built torchvision wheel import beside a CPU build of torch.

The wheel's compiled library needs libraries that only a CUDA torch has. Without them the two operators below stay undefined,
and torchvision fails on import because it describes them to torch. Defining their signatures is enough for everything that
is plain Python (transforms, resize). Calling `torchvision.ops.nms` still fails; nothing here does.
"""

import functools
import importlib
import sys

import torch


@functools.cache
def install() -> torch.library.Library | None:
    """Import torchvision; to be called before transformers, evaluate or lmms_eval are imported.

    Returns:
        None where torchvision imports by itself, else the definitions that it needed (they live as long as this object).
    """
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    definitions = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        definitions.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
    return definitions

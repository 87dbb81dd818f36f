"""How lmms-eval gets to know the adapters; importing this loads neither torch nor the adapters."""

from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> list[ModelManifest]:
    """Describe the adapters to lmms-eval (entry-point group `lmms_eval.models`)."""
    return [
        ModelManifest(model_id="vidkv_llava_onevision", chat_class_path="vidkv_eval.adapters.llava_onevision.VidKVLlavaOnevision"),
        ModelManifest(model_id="vidkv_qwen2_5_vl", chat_class_path="vidkv_eval.adapters.qwen2_5_vl.VidKVQwen25VL"),
    ]


def register() -> None:
    """Add the adapters to lmms-eval's registry of this process; needed where this package is not installed."""
    from lmms_eval.models import MODEL_REGISTRY_V2

    for manifest in manifests():
        MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)

"""lmms-eval's own command, for any build of torch: `python -m vidkv_eval.adapters --model vidkv_qwen2_5_vl ...`.

With a CUDA build of torch the plain `lmms-eval` command does the same. With a CPU build torchvision has to be imported with
care before lmms-eval imports it, and lmms-eval loads its plugins too late for that.
"""

from vidkv_eval import torchvision_cpu


def main() -> None:
    """Run the command with the arguments of this process."""
    torchvision_cpu.install()
    from lmms_eval.cli.dispatch import main as lmms_eval

    from vidkv_eval.adapters import plugin

    plugin.register()
    lmms_eval()


if __name__ == "__main__":
    main()

"""What every test module needs before it imports transformers."""

from vidkv_eval import torchvision_cpu

torchvision_cpu.install()

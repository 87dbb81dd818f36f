"""What the README shows is true: its example runs, its table is the recorded one."""

import re
import subprocess
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vidkv_eval.settings import PROJECT

README = (PROJECT / "README.md").read_text(encoding="utf-8")


def test_the_examples_run_on_a_stock_model_and_store_fewer_bits(capsys):
    example, fused = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    )
    inputs = {"input_ids": torch.randint(0, 64, (1, 200)), "max_new_tokens": 8, "do_sample": False}
    names = {"model": LlamaForCausalLM(config).eval(), "inputs": inputs}
    exec(example, names)
    assert names["output"].shape == (1, 208)
    assert float(capsys.readouterr().out) < 6
    expected = names["output"]
    exec(fused + example, names)
    assert torch.equal(names["output"], expected)
    assert float(capsys.readouterr().out) < 6


def test_every_command_and_linked_file_exists():
    for target in set(re.findall(r"`?make ([a-z0-9-]+)", README)):
        pattern = re.escape(target) if not target.startswith("reproduce-") else "reproduce-%"
        assert re.search(rf"^{pattern}:", (PROJECT / "Makefile").read_text(), re.MULTILINE), target
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (PROJECT / path).exists(), path


def test_the_table_is_the_recorded_one():
    assert subprocess.run([sys.executable, str(PROJECT / "scripts" / "update_readme.py"), "--check"], cwd=PROJECT).returncode == 0

"""A history filled by kernels holds and reads back what the quantizers of its recipe give, but for ties."""

import pytest
import torch
from direct_checks import RECIPES, check_reads_back


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_held_is_what_the_quantizers_of_the_recipe_store(gpu, name, width):
    check_reads_back(name, gpu, torch.bfloat16, width)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_states_of_other_dtypes_are_taken(gpu, dtype):
    check_reads_back("vidkv_k150_v158_scaled", gpu, dtype, 128)

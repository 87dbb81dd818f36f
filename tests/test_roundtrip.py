"""`vidkv roundtrip`: what is written and printed, and what is said about arguments and files that do not fit."""

import numpy as np
import pytest
import tiny
import torch

from vidkv_eval import cli
from vidkv_eval.library_cache import LibraryCache
from vidkv_eval.quant.split_tokens import SplitTokens
from vidkv_eval.recipe import load_recipe
from vidkv_eval.roundtrip import roundtrip

BATCH, HEADS, TOKENS, WIDTH = 1, 2, 100, 64


def make_states(batch=BATCH, tokens=TOKENS, dtype=np.float16, seed=0):
    numbers = np.random.default_rng(seed)
    return {name: numbers.standard_normal((batch, HEADS, tokens, WIDTH)).astype(dtype) for name in ("key", "value")}


@pytest.fixture
def files(tmp_path):
    """Write states; return the two path settings and a function that runs the command on them and reads what it wrote."""
    paths = [f"states={tmp_path}/in.npz", f"out={tmp_path}/out.npz"]

    def run(*settings, **arrays):
        np.savez(tmp_path / "in.npz", **arrays)
        assert cli.main(["roundtrip", *paths, *settings]) == 0
        with np.load(tmp_path / "out.npz") as file:
            return {name: file[name] for name in file.files}

    return paths, run


@pytest.mark.parametrize("name", tiny.QUANTIZER_RECIPES)
def test_every_recipe_reads_back_what_its_quantizers_do(name, files, tmp_path):
    states, recipe = make_states(), load_recipe(name)
    settings, protected = [], torch.arange(0, 96, 3)[None]
    if recipe.chooses_tokens:
        np.save(tmp_path / "protected.npy", protected[0].numpy())
        settings = [f"protected={tmp_path}/protected.npy"]
    found = files[1](f"recipe={name}", "prompt_tokens=96", *settings, **states)
    for side in ("key", "value"):
        quantizer, exact = getattr(recipe, side), torch.from_numpy(states[side])
        like = quantizer.choice(protected, WIDTH) if isinstance(quantizer, SplitTokens) else None
        history = quantizer.dequantize(quantizer.quantize(exact[:, :, :96], like=like), torch.float16)
        assert found[side].dtype == np.float32
        assert np.array_equal(found[side], torch.cat([history, exact[:, :, 96:]], dim=2).float().numpy())


@pytest.mark.parametrize("name", tiny.LIBRARY_RECIPES)
def test_every_library_recipe_reads_back_what_attention_sees_next(name, files, capsys):
    states, recipe = make_states(), load_recipe(name)
    exact = {side: torch.from_numpy(array) for side, array in states.items()}
    found = files[1](f"recipe={name}", "prompt_tokens=96", **states)
    cache, part = LibraryCache(recipe, 1), 96
    for start, stop in ((0, part), (part, TOKENS), (0, 1)):
        seen = cache.update(exact["key"][:, :, start:stop], exact["value"][:, :, start:stop], 0)
        if stop == TOKENS:
            stored = cache.footprint()
    for side, states_seen in zip(("key", "value"), seen, strict=True):
        assert np.array_equal(found[side], states_seen[:, :, :TOKENS].float().numpy())
        assert np.array_equal(found[side][:, :, part:], exact[side][:, :, part:].float().numpy())
    assert "wide_channels" not in found
    assert f"together {stored.effective_bits:.3f}" in capsys.readouterr().out


def test_tokens_after_the_prompt_are_fed_one_by_one(files):
    states = make_states(tokens=230)
    whole = files[1]("recipe=kivi_k2_v2", **states)["key"]
    assert (whole[:, :, 224:] == states["key"][:, :, 224:]).all() and (whole[:, :, 223] != states["key"][:, :, 223]).any()
    later = files[1]("recipe=kivi_k2_v2", "prompt_tokens=70", **states)["key"]
    assert (later[:, :, 192:] == states["key"][:, :, 192:]).all() and (later[:, :, 191] != states["key"][:, :, 191]).any()


def test_what_is_printed(files, capsys):
    states = make_states(tokens=96)
    found = files[1]("recipe=vidkv_k150_v158_scaled", **states)
    text = capsys.readouterr().out
    for side in ("key", "value"):
        exact = states[side].astype(np.float64)
        assert f"{side} {np.linalg.norm(found[side] - exact) / np.linalg.norm(exact):.6f}" in text
    assert "nominal bits    key 1.50, value 1.58" in text
    assert "1 sequence(s), 2 head(s), 96 + 0 tokens, float16" in text
    key_bits = 0.5 * (2 + 1) + 0.5 * (1 + 1) + 8 * 32 / (2 * 96 * 64)  # scale and minimum, scale and mean, channel indices
    assert f"effective bits  key {key_bits:.3f}, value 2.102" in text  # 410 bytes hold 2048 ternary codes


def test_group_size_and_residual_length_may_be_given(files, capsys):
    states = make_states(tokens=128)
    files[1]("recipe=kivi_k2_v2", "group_size=64", "residual_length=64", **states)
    assert "together 2.500" in capsys.readouterr().out
    later = files[1]("recipe=vidkv_k150_v158_released", "group_size=16", "residual_length=64", "prompt_tokens=16", **states)
    assert (later["key"][:, :, 80:] == states["key"][:, :, 80:]).all() and (later["key"][:, :, 79] != states["key"][:, :, 79]).any()


def test_wide_channels_are_those_of_each_sequence(files):
    states = make_states(batch=2, tokens=64)
    states["key"][0, :, :, :32] *= 20
    states["key"][1, :, :, 32:] *= 20
    found = files[1]("recipe=vidkv_k150_v158_scaled", **states)["wide_channels"]
    assert found.tolist() == [list(range(32)), list(range(32, 64))]
    one = {name: array[:1] for name, array in states.items()}
    assert files[1]("recipe=vidkv_k150_v158_scaled", **one)["wide_channels"].tolist() == list(range(32))
    assert "wide_channels" not in files[1]("recipe=kivi_k2_v2", **states)


def test_full_precision_gives_the_states_back(files):
    for dtype in (np.float16, np.float32, np.float64):
        states = make_states(dtype=dtype)
        found = files[1]("recipe=fp16", "prompt_tokens=1", **states)
        assert all((found[name] == states[name].astype(np.float32)).all() for name in ("key", "value"))


def test_as_a_function():
    states = [torch.from_numpy(array) for array in make_states().values()]
    result = roundtrip(load_recipe("fp16"), *states, prompt_tokens=7)
    assert torch.equal(result.key, states[0])
    assert result.footprint.effective_bits == 16
    assert result.wide_channels is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["recipe=kivi_k2v2"], "did you mean 'kivi_k2_v2'?"),
        ([], "missing recipe=...; allowed: recipe: NAME"),
        (["recipe=fp16", "prompt=3"], "unknown setting 'prompt'; allowed: recipe: NAME"),
        (["recipe=fp16", "3"], "roundtrip takes key=value; found: 3"),
        (["recipe=fp16", "prompt_tokens=0"], "prompt_tokens=0 does not fit; allowed: a whole number from 1"),
        (["recipe=fp16", "prompt_tokens=101"], "prompt_tokens=101, but there are 100 tokens; allowed: 1 to 100"),
        (["recipe=kivi_k2_v2", "group_size=x"], "group_size=x does not fit; allowed: a whole number from 1"),
        (["recipe=kivi_k2_v2", "residual_length=100"], "Recipe.residual_length is 100; allowed: multiples of 32"),
        (["recipe=kivi_k2_v2", "group_size=48", "residual_length=96"], "64 channels cannot be cut into groups of 48"),
        (["recipe=fp16", "states=/nowhere/in.npz"], "states=/nowhere/in.npz: no such file"),
        (["recipe=fp16", "out=/nowhere/out.npz"], "out=/nowhere/out.npz cannot be written: No such file or directory"),
    ],
)
def test_arguments_that_do_not_fit(settings, message, files, tmp_path, capsys):
    np.savez(tmp_path / "in.npz", **make_states())
    assert cli.main(["roundtrip", *files[0], *settings]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vidkv: ") and message in error and "Traceback" not in error


KEY, NAN = make_states()["key"], np.full((1, 1, 32, 4), np.nan, np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"key": KEY}, "has no array 'value'; it holds key"),
        ({"keys": KEY, "value": KEY}, "has no array 'key'; it holds keys, value"),
        ({"key": KEY[0], "value": KEY}, "has shape [2, 100, 64]; allowed: [B, H, T, D]"),
        ({"key": KEY[:, :, :0], "value": KEY}, "has shape [1, 2, 0, 64]; allowed: [B, H, T, D] with at least one of each"),
        ({"key": KEY, "value": KEY[:, :, :9]}, "have shapes [1, 2, 100, 64] and [1, 2, 9, 64]; allowed: the same B, H and T"),
        ({"key": KEY.astype(np.int32), "value": KEY}, "is int32; allowed: float16, float32, float64"),
        ({"key": NAN, "value": NAN}, "layer 0, key states cannot be quantized: they hold NaN or infinity"),
    ],
)
def test_arrays_that_do_not_fit(arrays, message, files, tmp_path, capsys):
    np.savez(tmp_path / "in.npz", **arrays)
    assert cli.main(["roundtrip", "recipe=vidkv_k200_v200", *files[0]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vidkv: ") and message in error and "Traceback" not in error


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 broken"])
def test_a_file_that_is_no_npz_is_named(content, files, tmp_path, capsys):
    (tmp_path / "in.npz").write_bytes(content)
    assert cli.main(["roundtrip", "recipe=fp16", *files[0]]) == 2
    assert "in.npz is not an npz file with arrays of numbers" in capsys.readouterr().err


def test_a_single_array_is_no_npz(files, tmp_path, capsys):
    with open(tmp_path / "in.npz", "wb") as file:
        np.save(file, KEY)
    assert cli.main(["roundtrip", "recipe=fp16", *files[0]]) == 2
    assert "in.npz is not an npz file" in capsys.readouterr().err


def test_protected_tokens_must_fit_the_recipe(files, tmp_path, capsys):
    paths, run = files
    run("recipe=fp16", **make_states())
    stp = "recipe=vidkv_k150_v166_published"

    def message(*settings):
        assert cli.main(["roundtrip", *paths, *settings]) == 2
        return capsys.readouterr().err

    assert "Salient needs to know which of its tokens are visual" in message(stp) and "protected=" in message(stp)
    assert "no such file" in message(stp, f"protected={tmp_path}/none.npy")
    np.save(tmp_path / "half.npy", np.arange(16))
    assert "16 listed tokens do not fit; allowed: a multiple of 32" in message(stp, f"protected={tmp_path}/half.npy")
    np.save(tmp_path / "late.npy", np.arange(68, 100))
    assert "positions below 96" in message(stp, f"protected={tmp_path}/late.npy")
    np.save(tmp_path / "real.npy", np.linspace(0, 1, 32))
    assert "does not hold one array of integers" in message(stp, f"protected={tmp_path}/real.npy")
    np.save(tmp_path / "good.npy", np.arange(32))
    assert "treats all tokens alike" in message("recipe=kivi_k2_v2", f"protected={tmp_path}/good.npy")

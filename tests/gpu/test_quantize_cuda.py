"""States quantized straight into records agree with the references; run with `make test-gpu`, without a device these fail.

`FragmentHistory._quantize_plain` is the contract: the references of the single operations, then records in torch.
"""

import pytest
import torch

from vidkv_kernels import choose_channels, quantize_cuda, quantize_keys, quantize_values
from vidkv_kernels.fragment_history import KEY_METADATA, KEY_STATES, VALUE_METADATA, VALUE_STATES, FragmentHistory
from vidkv_kernels.fragments import Form, UnsupportedForm
from vidkv_kernels.packed import Segment
from vidkv_kernels.quantize_keys import key_matrix, real_fourier
from vidkv_kernels.quantize_values import exact_states
from vidkv_kernels.span import Span

pytestmark = pytest.mark.usefixtures("poisoned_memory")
CPU = torch.device("cpu")
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def wide(channels: int) -> Segment:
    return Segment(channels, 2, "minimum")


def narrow(channels: int, *kinds: str) -> tuple[Segment, ...]:
    """Channels of 1 bit; of two kinds, the first has one more, as the parts of a spectrum do."""
    first = channels if len(kinds) == 1 else channels // 2 + 1
    return tuple(Segment(count, 1, kind) for count, kind in zip((first, channels - first), kinds, strict=False))


def make(device, form, *, batch=1, heads=2, held=0, room=512, transform=None, order=True, seed=0):
    """A history whose sequences hold `held` tokens of nothing in particular, with a random order of channels."""
    generator = torch.Generator(device).manual_seed(seed)
    places = None
    if order:
        orders = [torch.randperm(form.width, generator=generator, device=device) for _ in range(batch)]
        places = torch.stack(orders).to(torch.uint8).unsqueeze(1)
    matrix = None if transform is None else key_matrix(form.width, transform)
    history = FragmentHistory(form, batch=batch, heads=heads, capacity=room, device=device, order=places, matrix=matrix)
    history.lengths += torch.as_tensor(held, dtype=torch.int32, device=device)
    history.held = [room // 4] * batch
    return history


def quantize_plainly(history, keys, values, threshold=0.0, begin=None, count=None):
    """The reference, with the signature of `quantize`."""
    size, nothing = history.form.group_size, torch.zeros_like(history.lengths)
    span = Span(nothing if begin is None else begin, nothing + keys.shape[2] if count is None else count, nothing)
    if keys.shape[2] >= size:
        history._quantize_plain(keys, values, threshold, span)
    history.lengths += span.count - span.count % size
    history.held = [history.capacity] * len(history.held)


def signs(device, channels):
    """A matrix that keeps sums exact."""
    return torch.randint(0, 2, (channels, channels), generator=torch.Generator(device).manual_seed(0), device=device).float() * 2 - 1


def check_equal(found, expected):
    """Every byte, what lies beyond the tokens included."""
    for name in ("keys", "values", "lengths", "key_scale_max", "value_scale_max", "faults"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def run_both(device, form, keys, values, *, threshold=0.75, begin=None, count=None, **options):
    found, expected = (make(device, form, batch=keys.shape[0], heads=keys.shape[1], **options) for _ in range(2))
    bounds = {name: None if bound is None else torch.tensor(bound, dtype=torch.int32, device=device) for name, bound in
              (("begin", begin), ("count", count))}  # fmt: skip
    found.quantize(keys, values, threshold, held=[found.capacity] * len(found.held), **bounds)
    quantize_plainly(expected, keys, values, threshold, **bounds)
    return found, expected


@pytest.mark.parametrize("name", choose_channels.cases(CPU))
def test_the_order_of_channels_is_that_of_the_reference(gpu, name):
    states, span, wide_channels = choose_channels.cases(gpu)[name]
    batch, heads, _, width = states.shape
    history = make(gpu, Form(width, (wide(wide_channels),) * (wide_channels > 0) + narrow(width - wide_channels, "mean")
                             * (wide_channels < width)), batch=batch, heads=heads)  # fmt: skip
    # Once more, over what the first call left.
    for keys in (100 * states.flip(3), states):
        expected = choose_channels.choose_channels_reference(keys, span, wide_channels)
        history.choose_order(keys, begin=span.begin, count=span.count)
        assert torch.equal(history.order.squeeze(1).int(), expected)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
def test_long_prompts_get_the_order_of_the_reference(gpu, dtype):
    generator = torch.Generator(gpu).manual_seed(0)
    states = torch.randn(2, 1000, 3, 128, generator=generator, device=gpu).to(dtype).transpose(1, 2)
    history = make(gpu, Form(128, (wide(64), *narrow(64, "mean"))), batch=2, heads=3)
    history.choose_order(states)
    expected = choose_channels.choose_channels_reference(states, Span.of(gpu, [0, 0], [1000] * 2, [0, 0]), 64)
    assert torch.equal(history.order.squeeze(1).int(), expected)


def test_widths_that_are_no_numbers_still_give_an_order(gpu):
    states = torch.full((1, 1, 64, 64), float("nan"), device=gpu).half()
    states[..., 3:] = float("inf")
    states[:, :, 0, 9] = 1
    history = make(gpu, Form(64, (wide(32), *narrow(32, "mean"))), heads=1)
    history.choose_order(states)
    assert torch.equal(history.order.flatten().sort().values.int(), torch.arange(64, device=gpu).int())


@pytest.mark.parametrize("name", quantize_keys.cases(CPU))
def test_keys_are_those_of_the_reference(gpu, name):
    states, span, order, transform, keys = quantize_keys.cases(gpu)[name]
    form = Form(64, keys.segments, keys.group_size)
    found, expected = (make(gpu, form, batch=len(order), transform=transform, held=span.start) for _ in range(2))
    for history in (found, expected):
        history.order.copy_(order.unsqueeze(1))
    found.quantize(states, states, 0.75, begin=span.begin, count=span.count)
    quantize_plainly(expected, states, states, 0.75, begin=span.begin, count=span.count)
    check_equal(found, expected)


@pytest.mark.parametrize("name", [name for name in quantize_values.cases(CPU) if name != "ternary, five a byte"])
def test_values_are_those_of_the_reference(gpu, name):
    states, span, threshold, values = quantize_values.cases(gpu)[name]
    size = values.group_size if values.granularity == "per_channel" else 32
    form = Form(64, (wide(64),), size, values.levels, values.offset_kind, values.granularity, values.scale is not None)
    found, expected = (make(gpu, form, batch=states.shape[0], held=span.start, order=False) for _ in range(2))
    found.quantize(states, states, threshold, begin=span.begin, count=span.count)
    quantize_plainly(expected, states, states, threshold, begin=span.begin, count=span.count)
    check_equal(found, expected)


FORMS = {
    "VidKV scaled": (HALF, (wide(64), *narrow(64, "mean")), {}),
    "VidKV scaled, float32": (SINGLE, (wide(64), *narrow(64, "mean")), {"levels": 4, "offset_kind": "minimum"}),
    "VidKV published": (BRAIN, (wide(64), *narrow(64, "none", "centred")), {"is_scaled": False}),
    "few wide channels": (HALF, (wide(12), *narrow(116, "mean")), {"granularity": "per_token"}),
    "few wide channels, published": (BRAIN, (wide(12), *narrow(116, "none", "centred")), {"levels": 2, "offset_kind": "none"}),
    "no wide channel": (BRAIN, narrow(128, "mean"), {"levels": 2, "offset_kind": "mean"}),
    "groups of 64": (BRAIN, (wide(40), *narrow(88, "centred")), {"group_size": 64, "granularity": "per_token"}),
    "groups of 64, float32": (SINGLE, (wide(40), *narrow(88, "centred")), {"group_size": 64, "levels": 2, "offset_kind": "minimum"}),
    "groups of 128": (HALF, (wide(96), *narrow(32, "minimum")), {"group_size": 128, "levels": 4, "offset_kind": "minimum"}),
    "groups of 128, float32": (SINGLE, (wide(96), *narrow(32, "mean")), {"group_size": 128}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_byte_is_that_of_the_reference_where_sums_are_exact(gpu, name):
    dtype, segments, values = FORMS[name]
    form = Form(128, segments, **values)
    size = form.group_size
    generator = torch.Generator(gpu).manual_seed(1)
    # Heads beside each other in a token, as a model makes them.
    states = (exact_states(generator, dtype, 4, 3 * size + 9, 7, 128).transpose(1, 2) for _ in range(2))
    found, expected = run_both(
        gpu, form, *states, begin=[0, 3, 9, 1], count=[2 * size + size // 2, size - 1, 3 * size, 0], held=[size, 0, 2 * size, 0],
        room=8 * size, transform=signs(gpu, 128 - form.wide_channels),
    )  # fmt: skip
    check_equal(found, expected)
    assert found.lengths.tolist() == [3 * size, 0, 5 * size, 0]


def test_channels_without_order_are_taken_as_they_are(gpu):
    generator = torch.Generator(gpu).manual_seed(2)
    states = [exact_states(generator, HALF, 1, 2, 96, 128) for _ in range(2)]
    form = Form(128, (wide(128),), 32, 4, "minimum", "per_token")
    check_equal(*run_both(gpu, form, *states, order=False))


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 64])
def test_all_tokens_are_taken_if_no_bounds_are_given(gpu, tokens):
    generator = torch.Generator(gpu).manual_seed(3)
    states = [exact_states(generator, HALF, 2, 2, 64, 128)[:, :, :tokens] for _ in range(2)]
    found, expected = run_both(gpu, Form(128, (wide(64), *narrow(64, "centred"))), *states, held=32)
    check_equal(found, expected)
    assert found.lengths.tolist() == [32 + tokens // 32 * 32] * 2


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_rows_that_begin_anywhere_are_taken(gpu, dtype):
    generator = torch.Generator(gpu).manual_seed(4)
    states = [exact_states(generator, dtype, 1, 2, 65, 129)[:, :, 1:, 1:] for _ in range(2)]
    check_equal(*run_both(gpu, Form(128, (wide(64), *narrow(64, "mean")), 64), *states))


def test_each_head_may_have_an_order(gpu):
    generator = torch.Generator(gpu).manual_seed(5)
    keys, values = (exact_states(generator, HALF, 2, 3, 64, 64) for _ in range(2))
    form = Form(64, (wide(32), *narrow(32, "mean")))
    found, expected = (make(gpu, form, batch=2, heads=3) for _ in range(2))
    orders = [torch.randperm(64, generator=generator, device=gpu).to(torch.uint8) for _ in range(6)]
    found.order = torch.stack(orders).view(2, 3, 64)
    found.quantize(keys, values, 0.75)
    reordered = keys.gather(-1, found.order.long().unsqueeze(2).expand(keys.shape))
    expected.order = None
    quantize_plainly(expected, reordered, values, 0.75)
    check_equal(found, expected)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize(
    ("segments", "values"),
    [
        ((wide(64), *narrow(64, "mean")), {}),
        ((wide(12), *narrow(116, "none", "centred")), {"levels": 4, "offset_kind": "minimum", "granularity": "per_token"}),
    ],
    ids=["half", "few wide"],
)
def test_spectra_get_the_codes_of_the_reference_but_for_ties(gpu, segments, values, dtype):
    form = Form(128, segments, **values)
    generator = torch.Generator(gpu).manual_seed(0)
    sizes = torch.arange(1, 129, device=gpu) / 32
    # A bias as keys have it, in channels that are not the widest.
    bias = torch.where(torch.arange(128, device=gpu) % 50 == 7, 40.0, 0.0)
    states = [(torch.randn(2, 4, 1024, 128, generator=generator, device=gpu) * sizes + bias).to(dtype) for _ in range(2)]
    transform = real_fourier(128 - form.wide_channels, gpu)
    found, expected = run_both(gpu, form, *states, threshold=0.7, room=1024, transform=transform)
    (found_keys, (found_values,)), (expected_keys, (expected_values,)) = found.unpack(), expected.unpack()
    for left, right in ((found_keys, expected_keys), (found_values, expected_values)):
        assert (left.unpack() != right.unpack()).float().mean() < 1e-4
        for part in ("scale", "offset"):
            if getattr(right, part) is not None:
                # A step of half precision, here up to 2^-10 of the size, and what sums of such numbers lose near zero.
                torch.testing.assert_close(getattr(left, part), getattr(right, part), rtol=2**-10, atol=1e-5)
    torch.testing.assert_close(found.key_scale_max, expected.key_scale_max, rtol=2**-10, atol=0)


@pytest.mark.parametrize(
    ("where", "value", "dtype", "bits"),
    [
        ("key", float("nan"), HALF, KEY_STATES),
        ("key", float("-inf"), BRAIN, KEY_STATES),
        ("key", float("nan"), SINGLE, KEY_STATES),
        ("value", float("inf"), HALF, VALUE_STATES),
        ("value", float("nan"), BRAIN, VALUE_STATES),
        ("value", float("inf"), SINGLE, VALUE_STATES),
        ("key", 1e30, BRAIN, KEY_METADATA),
        ("value", 3e6, SINGLE, VALUE_METADATA),
        ("value", 6e4, HALF, 0),
        ("beyond", float("nan"), HALF, 0),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_leaves_a_fault(gpu, where, value, dtype, bits):
    keys, values = (torch.ones(2, 2, 100, 128, device=gpu).to(dtype) for _ in range(2))
    target, token = {"key": (keys, 40), "value": (values, 63), "beyond": (keys, 97)}[where]
    target[1, 1, token, 77] = value
    transform = real_fourier(64, gpu)
    history = make(gpu, Form(128, (wide(64), *narrow(64, "mean"))), batch=2, transform=transform)
    history.quantize(keys, values, 0.7)
    # Beside states that are not finite, metadata may be so as well.
    assert history.faults.item() & ~(2 * (bits & (KEY_STATES | VALUE_STATES))) == bits
    history.quantize(torch.ones_like(keys), torch.ones_like(values), 0.7)
    assert history.faults.item() & ~(2 * (bits & (KEY_STATES | VALUE_STATES))) == bits
    assert torch.equal(history.select_batch(torch.tensor([0], device=gpu)).faults, history.faults)


def test_a_graph_appends_behind_what_is_held_at_each_replay(gpu):
    generator = torch.Generator(gpu).manual_seed(6)
    form = Form(128, (wide(64), *narrow(64, "mean")))
    transform = signs(gpu, 64)
    found, expected = (make(gpu, form, batch=2, transform=transform) for _ in range(2))
    keys, values = (exact_states(generator, HALF, 2, 2, 64, 128) for _ in range(2))
    count = torch.zeros(2, dtype=torch.int32, device=gpu)
    found.quantize(keys, values, 0.75, count=count)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found.quantize(keys, values, 0.75, count=count, held=[found.capacity] * len(found.held))
    for counts in ([64, 32], [0, 64], [32, 33]):
        for states in (keys, values):
            states.copy_(exact_states(generator, HALF, 2, 2, 64, 128))
        count.copy_(torch.tensor(counts))
        graph.replay()
        quantize_plainly(expected, keys, values, 0.75, count=count)
        check_equal(found, expected)


def test_places_beyond_two_to_the_31_are_reached(gpu):
    tokens = 2**22 + 128
    states = torch.zeros(1, 4, tokens, 128, dtype=HALF, device=gpu)
    small = exact_states(torch.Generator(gpu).manual_seed(7), HALF, 1, 4, 64, 128)
    states[:, :, -64:] = small
    form = Form(128, (wide(128),), 32, 4, "minimum")
    begin, count = (torch.tensor([number], dtype=torch.int32, device=gpu) for number in (tokens - 64, 64))
    found, expected = (make(gpu, form, heads=4) for _ in range(2))
    found.quantize(states, states, begin=begin, count=count, held=[64] * len(found.held))
    quantize_plainly(expected, small, small)
    check_equal(found, expected)


def test_what_is_not_supported_is_refused_before_a_launch(gpu):
    states = torch.zeros(1, 2, 64, 128, device=gpu).half()
    history = make(gpu, Form(128, (wide(128),)))
    for name, arguments in {
        "keys has shape": (states[..., :64], states),
        "values has shape": (states, states[:, :1]),
        "keys is torch.float64": (states.double(), states.double()),
        "values is torch.float32": (states, states.float()),
    }.items():
        with pytest.raises(ValueError, match=name):
            history.quantize(*arguments)
    with pytest.raises(ValueError, match="begin is torch.int64"):
        history.quantize(states, states, begin=torch.zeros(1, dtype=torch.int64, device=gpu))
    with pytest.raises(ValueError, match="call reserve first"):
        history.quantize(states, states, held=[1024] * len(history.held))
    for form in (Form(128, (Segment(128, 2, "mean"),)), Form(128, (wide(128),), levels=4, offset_kind="none")):
        with pytest.raises(UnsupportedForm, match="states are quantized"):
            make(gpu, form).quantize(states, states)
    with pytest.raises(UnsupportedForm, match="changes the 64 channels of 2 bits"):
        mixed = make(gpu, Form(128, (wide(64), *narrow(64, "mean"))), transform=torch.eye(128, device=gpu).roll(1, 0))
        mixed.quantize(states, states)
    assert (history.faults == 0).all() and (history.lengths == 0).all()


def test_kinds_are_those_of_the_source():
    assert quantize_cuda.KINDS[-1] == "ternary" and quantize_cuda.KINDS[2:5] == ("mean", "centred", "none")
    source = quantize_cuda.SOURCE.read_text(encoding="utf-8")
    assert "enum Kind { MINIMUM_2, MINIMUM_1, MEAN, CENTRED, NONE, TERNARY };" in source
    assert f"RANGE_THREADS = {quantize_cuda.RANGE_THREADS}, RANGE_TOKENS = {quantize_cuda.RANGE_TOKENS};" in source

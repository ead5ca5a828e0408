"""QuantState: how it travels, and its bytes against bitsandbytes' own."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from qlora_native.functional import dequantize_4bit, quantize_4bit
from qlora_native.quant_state import QuantState

bnb = pytest.importorskip("bitsandbytes")

BLOB = "weight.quant_state.bitsandbytes__nf4"
DOUBLE = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])


def quantized(double_quant=True, shape=(96, 50), dtype=torch.float32, **options):
    torch.manual_seed(0)
    return quantize_4bit(torch.randn(shape).to(dtype), double_quant=double_quant, **options)


def bnb_layer(double_quant, format="nf4", dtype=torch.float32, shape=(96, 50)):
    layer = bnb.nn.Linear4bit(
        shape[1], shape[0], quant_type=format, compress_statistics=double_quant
    )
    torch.manual_seed(0)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(shape).to(dtype),
        requires_grad=False,
        quant_type=format,
        compress_statistics=double_quant,
    )
    return layer.to("cpu")


# ---- bitsandbytes' keys -------------------------------------------------------------------------


@DOUBLE
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_writes_bitsandbytes_keys_byte_for_byte(double_quant, format, dtype):
    want = bnb_layer(double_quant, format, dtype).state_dict()
    packed, state = quantized(
        double_quant, dtype=dtype, format=format, scale_rounding="bitsandbytes_cpu"
    )
    got = {"weight": packed, "bias": want["bias"], **state.to_bnb_dict()}
    assert list(got) == list(want)
    for key in want:
        assert got[key].dtype == want[key].dtype, key
        assert got[key].shape == want[key].shape, key
        assert got[key].numpy().tobytes() == want[key].numpy().tobytes(), key


@DOUBLE
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_reads_what_bitsandbytes_writes_and_writes_it_back(double_quant, format):
    layer = bnb_layer(double_quant, format)
    tensors = load(save({k: v.contiguous() for k, v in layer.state_dict().items()}))
    state = QuantState.from_bnb_dict(tensors)
    want = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(dequantize_4bit(tensors["weight"], state), want)
    for key, tensor in state.to_bnb_dict().items():
        assert torch.equal(tensor, tensors[key]), key


@DOUBLE
def test_bitsandbytes_reads_what_we_write(double_quant):
    packed, state = quantized(double_quant)
    stats = {key.removeprefix("weight."): t for key, t in state.to_bnb_dict().items()}
    weight = bnb.nn.Params4bit.from_prequantized(packed, stats, device="cpu")
    got = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(got, dequantize_4bit(packed, state))


@pytest.mark.parametrize("storage", [torch.int8, torch.float16, torch.bfloat16, torch.float32])
def test_other_storage_dtypes_view_the_same_bytes(storage):
    packed, state = quantized()
    assert torch.equal(state.check_packed(packed.view(-1).view(storage)), packed)


def test_reads_under_another_default_dtype_and_device():
    _, state = quantized()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert QuantState.from_bnb_dict(state.to_bnb_dict()) == state
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("prefix", ["", "weight.", "model.layers.0.q_proj.weight."])
def test_any_prefix(prefix):
    _, state = quantized()
    assert QuantState.from_bnb_dict(state.to_bnb_dict(prefix), prefix) == state


def broken(**changes):
    """The keys of a good state, with some changed, or left out where the change is None."""
    tensors = {**quantized()[1].to_bnb_dict(), **changes}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


def blob(**changes):
    settings = json.loads(bytes(quantized()[1].to_bnb_dict()[BLOB].tolist()))
    settings = {key: value for key, value in {**settings, **changes}.items() if value != "gone"}
    return {BLOB: as_bytes(json.dumps(settings).encode())}


def as_bytes(text):
    return torch.tensor(list(text), dtype=torch.uint8)


WRONG_MAP = torch.linspace(-1, 1, 256)

REFUSED = {
    "no quant_state": (lambda: broken(**{BLOB: None}), KeyError, "not a 4-bit weight"),
    "two quant_states": (
        lambda: broken(**{BLOB[:-3] + "fp4": as_bytes(b"{}")}),
        ValueError,
        "one key .*nf4 or .*fp4",
    ),
    "unknown format": (
        lambda: broken(**{BLOB: None, BLOB[:-3] + "nf3": as_bytes(b"{}")}),
        ValueError,
        "format must be one of .*'nf3'",
    ),
    "truncated JSON": (
        lambda: broken(**{BLOB: as_bytes(b'{"quant_type": "nf')}),
        ValueError,
        "not whole UTF-8 JSON",
    ),
    "JSON too deep": (lambda: broken(**{BLOB: as_bytes(b"[" * 99999)}), ValueError, "not whole"),
    "not UTF-8": (lambda: broken(**{BLOB: as_bytes(b"\xff\xfe{}")}), ValueError, "UTF-8 JSON"),
    "JSON of a list": (lambda: broken(**{BLOB: as_bytes(b"[1]")}), ValueError, "JSON object"),
    "blob of floats": (lambda: broken(**{BLOB: torch.zeros(3)}), TypeError, "uint8.*float32"),
    "no blocksize": (lambda: broken(**blob(blocksize="gone")), ValueError, "lacks 'blocksize'"),
    "blocksize 48": (lambda: broken(**blob(blocksize=48)), ValueError, "blocksize .*got 48"),
    "dtype int8": (lambda: broken(**blob(dtype="int8")), ValueError, "dtype must be .*'int8'"),
    "shape a string": (lambda: broken(**blob(shape="96")), ValueError, "shape must be .*'96'"),
    "negative shape": (lambda: broken(**blob(shape=[-1, 5])), ValueError, "shape must be"),
    "format unlike the key": (
        lambda: broken(**blob(quant_type="fp4")),
        ValueError,
        "quant_type must be 'nf4', as in the key, got 'fp4'",
    ),
    "nested blocksize 64": (
        lambda: broken(**blob(nested_blocksize=64)),
        ValueError,
        "nested_blocksize must be 256, got 64",
    ),
    "offset NaN": (
        lambda: broken(**blob(nested_offset=float("nan"))),
        ValueError,
        "nested_offset is nan: .*quantize it again",
    ),
    "offset missing": (
        lambda: broken(**blob(nested_offset="gone")),
        ValueError,
        "lacks 'nested_offset'",
    ),
    "nested scales, plain settings": (
        lambda: broken(**blob(nested_offset="gone", nested_blocksize="gone", nested_dtype="gone")),
        ValueError,
        "absmax is uint8, so double-quantized",
    ),
    "no absmax": (
        lambda: broken(**{"weight.absmax": None}),
        KeyError,
        "weight.absmax is missing beside",
    ),
    "no nested_absmax": (
        lambda: broken(**{"weight.nested_absmax": None}),
        KeyError,
        "weight.nested_absmax is missing",
    ),
    "short absmax": (
        lambda: broken(**{"weight.absmax": torch.zeros(74, dtype=torch.uint8)}),
        ValueError,
        r"weight.absmax must have shape \[75\], got \[74\]",
    ),
    "absmax in fp16": (
        lambda: broken(**{"weight.absmax": torch.zeros(75, dtype=torch.float16)}),
        TypeError,
        "weight.absmax must be torch.uint8, got torch.float16",
    ),
    "wrong quant_map": (
        lambda: broken(**{"weight.quant_map": torch.linspace(-1, 1, 16)}),
        ValueError,
        r"weight.quant_map must be the nf4 map; entry \d+ is",
    ),
    "quant_map of 15": (
        lambda: broken(**{"weight.quant_map": torch.zeros(15)}),
        ValueError,
        r"weight.quant_map must be float32 \[16\], got torch.float32 \[15\]",
    ),
    "wrong nested_quant_map": (
        lambda: broken(**{"weight.nested_quant_map": WRONG_MAP}),
        ValueError,
        "weight.nested_quant_map must be the signed dynamic map; entry",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    tensors, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        QuantState.from_bnb_dict(tensors())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
SETTINGS = (
    "quant_type", "blocksize", "dtype", "shape",
    "nested_blocksize", "nested_dtype", "nested_offset",
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(SETTINGS), JSON, min_size=1))
@settings(max_examples=100, deadline=None)
def test_any_settings_give_a_state_or_a_clear_error(changes):
    tensors = broken(**blob(**changes))
    try:
        state = QuantState.from_bnb_dict(tensors)
    except (ValueError, TypeError) as error:
        assert "weight." in str(error)
    else:
        assert state.n_blocks == 75


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_damaged_byte_of_the_settings_gives_a_state_or_a_clear_error(data):
    tensors = broken()
    settings = tensors[BLOB]
    at = data.draw(st.integers(0, len(settings) - 1))
    settings[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError, TypeError):
        QuantState.from_bnb_dict(tensors)


def test_refuses_packed_of_another_size():
    packed, state = quantized()
    with pytest.raises(ValueError, match=r"must hold 2400 bytes for shape \[96, 50\].*got 2399"):
        state.check_packed(packed[1:])


FIELDS = {
    "blocksize": ({"blocksize": 65}, ValueError, "blocksize must be one of .*got 65"),
    "format": ({"format": "int4"}, ValueError, "format must be one of .*'int4'"),
    "dtype": ({"dtype": torch.float64}, TypeError, "dtype must be one of .*float64"),
    "absmax": ({"absmax": torch.zeros(3)}, ValueError, r"absmax must have shape \[2\], got \[3\]"),
    "half nested": ({"nested_absmax": torch.zeros(1)}, ValueError, "together or not at all"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_refuses_parts_that_do_not_fit(case):
    changes, error, message = FIELDS[case]
    good = {"absmax": torch.zeros(2), "shape": (2, 50), "dtype": torch.float32}
    good |= {"blocksize": 64, "format": "nf4"}
    with pytest.raises(error, match=message):
        QuantState(**{**good, **changes})


# ---- travelling ---------------------------------------------------------------------------------


@DOUBLE
def test_deepcopy_pickle_and_torch_save(double_quant):
    _, state = quantized(double_quant)
    copied = copy.deepcopy(state)
    assert copied == state and copied.absmax.data_ptr() != state.absmax.data_ptr()
    assert pickle.loads(pickle.dumps(state)) == state
    file = io.BytesIO()
    torch.save(state, file)
    assert torch.load(io.BytesIO(file.getvalue()), weights_only=False) == state


@DOUBLE
def test_to_device_keeps_dtypes(double_quant):
    _, state = quantized(double_quant)
    moved = state.to("meta")
    for name, tensor in state.tensors().items():
        assert moved.tensors()[name].device.type == "meta"
        assert moved.tensors()[name].dtype == tensor.dtype
    assert state.to("cpu") == state


@DOUBLE
def test_keys_on_the_meta_device(double_quant):
    want = quantized(double_quant)[1].to_bnb_dict()
    got = quantized(double_quant)[1].to("meta").to_bnb_dict()
    assert {k: t.dtype for k, t in got.items()} == {k: t.dtype for k, t in want.items()}
    assert all(tensor.is_meta for tensor in got.values())


def test_equality_is_of_bits():
    _, state = quantized(double_quant=False)
    other = copy.deepcopy(state)
    other.absmax[0] = torch.nan
    assert state != other and other == copy.deepcopy(other)
    other = copy.deepcopy(state)
    other.shape = torch.Size([50, 96])
    assert state != other and state != "nf4"


def test_nbytes_counts_what_is_held():
    _, state = quantized(double_quant=False)
    assert state.nbytes == 75 * 4
    _, state = quantized(double_quant=True)
    assert state.nbytes == 75 + 4 + 4

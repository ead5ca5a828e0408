"""qlora_native.bitsandbytes beside the package from PyPI: bits, dictionaries, layers, files."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load, save

import qlora_native.bitsandbytes as ours

theirs = pytest.importorskip("bitsandbytes")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORAGES = (torch.uint8, torch.bfloat16, torch.float32)
K, N = 448, 300  # whole blocks in a row: on AVX-512 the package mixes up scales of other rows

pytestmark = pytest.mark.usefixtures("one_thread")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def both_quantized(**options):
    """The same linear in the two packages' layers, quantized."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(K, N)
    layers = [package.nn.Linear4bit(K, N, **options) for package in (theirs, ours)]
    for layer in layers:
        layer.load_state_dict(linear.state_dict())
    return [layer.to("cpu") for layer in layers]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_and_dictionaries(quant_type, compress, storage, dtype):
    x = torch.randn(N, K).to(dtype)
    options = {
        "quant_type": quant_type,
        "compress_statistics": compress,
        "quant_storage": storage,
    }
    want, their_state = theirs.functional.quantize_4bit(x, **options)
    got, our_state = ours.functional.quantize_4bit(x, **options)
    assert same(got, want)
    for packed in (False, True):
        a, b = their_state.as_dict(packed), our_state.as_dict(packed)
        assert list(a) == list(b)
        for key, value in a.items():
            assert same(b[key], value) if torch.is_tensor(value) else b[key] == value, key
    for states in (ours.functional.QuantState, theirs.functional.QuantState):
        read = states.from_dict(dict(a), "cpu")
        assert read == states.from_dict(dict(b), "cpu") and list(read.as_dict(True)) == list(a)
    want = theirs.functional.dequantize_4bit(got, their_state)
    assert same(ours.functional.dequantize_4bit(got, our_state), want)
    assert same(ours.functional.dequantize_4bit(got, our_state, out=torch.empty_like(want)), want)


def test_out_and_absmax_arguments_are_written():
    x = torch.randn(2, 128)
    absmax, out = torch.zeros(4), torch.zeros(128, 1, dtype=torch.uint8)
    packed, state = ours.functional.quantize_nf4(x, absmax=absmax, out=out)
    want, want_state = ours.functional.quantize_4bit(x, quant_type="nf4")
    assert packed is out and state.absmax is absmax
    assert same(out, want) and same(absmax, want_state.absmax)
    values = ours.functional.dequantize_nf4(out, absmax=absmax, out=torch.empty_like(x))
    assert same(values, ours.functional.dequantize_4bit(want, want_state))


def test_a_row_of_codes_gives_the_transpose_and_one_byte_does_not():
    x = torch.randn(6, 64)
    packed, state = ours.functional.quantize_4bit(x)
    values = ours.functional.dequantize_4bit(packed, state)
    assert same(ours.functional.dequantize_4bit(packed.t(), state), values.t())
    x = torch.randn(2, 1)
    packed, state = ours.functional.quantize_4bit(x)
    assert ours.functional.dequantize_4bit(packed, state).shape == (2, 1)
    assert ours.functional.dequantize_4bit(*ours.functional.quantize_4bit(x.view(2))).shape == (2,)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [256, 4096])
def test_8bit_bits(nested, blocksize):
    x = torch.randn(3, 5000)
    want, their_state = theirs.functional.quantize_blockwise(x, blocksize=blocksize, nested=nested)
    got, our_state = ours.functional.quantize_blockwise(x, blocksize=blocksize, nested=nested)
    assert same(got, want)
    values = theirs.functional.dequantize_blockwise(want, their_state)
    assert same(ours.functional.dequantize_blockwise(got, our_state), values)


def test_other_8bit_maps_are_read_and_not_written():
    code = theirs.functional.create_linear_map()
    codes, state = theirs.functional.quantize_blockwise(torch.randn(5000), code, blocksize=256)
    values = ours.functional.dequantize_blockwise(
        codes, absmax=state.absmax, code=code, blocksize=256
    )
    assert same(values, theirs.functional.dequantize_blockwise(codes, state))
    with pytest.raises(NotImplementedError, match="other 8-bit maps"):
        ours.functional.quantize_blockwise(torch.randn(5000), code)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [(7, 8), (2, 4), (5, 6), (3, 8)])
def test_dynamic_maps(signed, bits):
    if not signed and bits[0] < bits[1] - 1:
        pytest.skip("bitsandbytes makes no unsigned map with so few bits of exponent")
    want = theirs.functional.create_dynamic_map(signed, *bits)
    assert same(ours.functional.create_dynamic_map(signed, *bits), want)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_4bit_maps(name):
    want = theirs.functional.get_4bit_type(name, "cpu")
    assert same(ours.functional.get_4bit_type(name, "cpu"), want)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_layers_agree_and_read_each_other(quant_type, compress, storage):
    options = {
        "quant_type": quant_type,
        "compress_statistics": compress,
        "quant_storage": storage,
    }
    their_layer, our_layer = both_quantized(**options)
    a, b = their_layer.state_dict(), our_layer.state_dict()
    assert list(a) == list(b) and all(same(a[key], b[key]) for key in a)

    x = torch.randn(3, 5, K, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    want, got = their_layer(x), our_layer(y)
    torch.testing.assert_close(got, want)
    for out in (want, got):
        out.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad)

    file = load(save({key: value.contiguous() for key, value in a.items()}))
    read = ours.nn.Linear4bit(K, N, device="meta", **options)
    read.load_state_dict(file, assign=True)
    assert same(read(y), got)
    parts = {key: value for key, value in b.items() if key.startswith("weight.")}
    back = theirs.nn.Params4bit.from_prequantized(b["weight"], parts, device="cpu")
    values = theirs.functional.dequantize_4bit(back.data, back.quant_state)
    weight = our_layer.weight
    assert same(ours.functional.dequantize_4bit(weight.data, weight.quant_state), values)


@pytest.mark.parametrize("storage", STORAGES)
def test_casts_never_touch_the_codes(storage):
    layer = both_quantized(quant_type="nf4", quant_storage=storage)[1]
    codes = layer.weight.data.clone()
    for cast in (
        lambda: layer.half(),
        lambda: layer.bfloat16(),
        lambda: layer.float(),
        lambda: layer.to(torch.float16),
        lambda: layer.to("cpu", torch.float64),
    ):
        cast()
        assert type(layer.weight) is ours.nn.Params4bit and same(layer.weight.data, codes)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_hold_themselves_together(copied):
    layer = both_quantized(quant_type="nf4")[1]
    twin = copied(layer)
    weight = twin.weight
    assert type(weight) is ours.nn.Params4bit and weight.module is twin
    assert weight.data_ptr() != layer.weight.data_ptr()
    assert weight.quant_state == layer.weight.quant_state
    assert weight.quant_state is not layer.weight.quant_state
    x = torch.randn(2, K)
    assert same(twin(x), layer(x))
    shallow = copy.copy(layer.weight)
    assert shallow.quant_state is layer.weight.quant_state
    assert shallow.data_ptr() == layer.weight.data_ptr()


def test_pieces_stay_parameters():
    weight = both_quantized()[1].weight
    for pieces in (torch.chunk(weight, 2), torch.split(weight, 1000)):
        assert all(type(p) is ours.nn.Params4bit and p.bnb_quantized for p in pieces)
        assert same(torch.cat([p.data for p in pieces]), weight.data)


def test_fields_that_fsdp_walks_to():
    weight = both_quantized(quant_type="nf4")[1].weight
    for key, value in weight.quant_state.as_dict(packed=True).items():
        found = weight
        for name in key.split("."):
            found = getattr(found, name)
        assert same(found, value)
    assert not hasattr(ours.nn.Params4bit(torch.randn(64, 64)), "absmax")


def test_a_weight_that_lost_its_state_gets_the_layers():
    layer = both_quantized()[1]
    x = torch.randn(2, K)
    want = layer(x)
    layer._parameters["weight"] = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    assert same(layer(x), want)


def test_a_layer_that_was_not_moved_says_so():
    with pytest.raises(RuntimeError, match="not quantized"):
        ours.nn.LinearNF4(64, 64)(torch.randn(1, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_of_inputs_and_computation(dtype, caplog):
    their_layer, our_layer = both_quantized(quant_type="nf4", compute_dtype=dtype)
    for x in (torch.randn(3, K), torch.randn(3, K).bfloat16()):
        want, got = their_layer(x), our_layer(x)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)
    layer = both_quantized()[1]
    assert layer(torch.randn(1, K).half()).dtype == torch.float16 and "bnb_4bit" in caplog.text


def test_autocast_computes_in_its_dtype():
    their_layer, our_layer = both_quantized(quant_type="nf4", compute_dtype=torch.float32)
    x = torch.randn(3, K)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(our_layer(x), their_layer(x), atol=0.02, rtol=0.02)


def test_products_of_tensors():
    x, w, bias = torch.randn(4, 128), torch.randn(64, 128), torch.randn(64)
    packed, state = ours.functional.quantize_4bit(w, compress_statistics=True)
    want = x @ ours.functional.dequantize_4bit(packed, state).t() + bias
    torch.testing.assert_close(ours.matmul_4bit(x, packed, state, bias=bias), want)
    out = torch.empty(4, 64)
    assert ours.matmul_4bit(x, packed.t(), state, out=out, bias=bias) is out
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(ours.functional.gemv_4bit(x, packed, state=state), want - bias)
    packed, state = ours.functional.quantize_4bit(w.t().contiguous())
    with pytest.warns(DeprecationWarning, match="in_features, out_features"):
        got = ours.matmul_4bit(x, packed, state)
    torch.testing.assert_close(got, x @ ours.functional.dequantize_4bit(packed, state))
    assert ours.matmul_4bit(x[:0], *ours.functional.quantize_4bit(w)).shape == (0, 64)


def test_scales_of_another_blocksize_are_dequantized_first():
    w = torch.randn(64, 128)
    packed, state = ours.functional.quantize_4bit(w)
    state.offset = state.absmax.mean()
    state.absmax, state.state2 = ours.functional.quantize_blockwise(
        state.absmax - state.offset, blocksize=64
    )
    x = torch.randn(3, 128)
    want = x @ ours.functional.dequantize_4bit(packed, state).t()
    torch.testing.assert_close(ours.matmul_4bit(x, packed, state), want)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ours.functional.quantize_4bit(torch.ones(4), blocksize=48), ValueError, "blocks"),
        (lambda: ours.functional.quantize_4bit(torch.ones(4).int()), ValueError, "dtype"),
        (lambda: ours.functional.quantize_4bit(torch.ones(4), quant_type="x"), ValueError, "nf4"),
        (
            lambda: ours.functional.quantize_4bit(torch.ones(2), quant_storage=torch.float32),
            ValueError,
            "quant_storage",
        ),
        (lambda: ours.functional.dequantize_4bit(torch.ones(4)), ValueError, "quant_state"),
        (lambda: ours.functional.dequantize_blockwise(torch.ones(4)), ValueError, "absmax"),
        (lambda: ours.functional.QuantState.from_dict({}, "cpu"), ValueError, "quant_type"),
        (lambda: ours.functional.get_4bit_type("af4"), NotImplementedError, "'af4'"),
        (lambda: ours.functional.int8_vectorwise_quant, AttributeError, "LLM.int8"),
        (lambda: ours.nn.Linear8bitLt(2, 2), NotImplementedError, "Linear8bitLt"),
        (lambda: ours.nn.Int8Params(torch.ones(2)), NotImplementedError, "Int8Params"),
        (lambda: ours.nn.Embedding4bit(2, 2), NotImplementedError, "Embedding4bit"),
        (lambda: ours.matmul(1, 2), NotImplementedError, "matmul"),
        (lambda: ours.research, AttributeError, "research"),
        (lambda: ours.no_such_name, AttributeError, "no_such_name"),
    ],
)
def test_errors_name_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_replace_linear():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ModuleDict())
    model[1]["lm_head"] = torch.nn.Linear(64, 64)
    model[1]["inner"] = torch.nn.Linear(64, 64, bias=False)
    ours.utils.replace_linear(model, ours.nn.LinearNF4, copy_weights=True)
    assert type(model[0]) is type(model[1]["inner"]) is ours.nn.LinearNF4
    assert type(model[1]["lm_head"]) is torch.nn.Linear and model[1]["inner"].bias is None


@pytest.mark.parametrize("compress", [False, True])
def test_a_layer_compiles_without_breaks(compress):
    layer = ours.nn.LinearNF4(64, 96, compress_statistics=compress).to("cpu")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 64, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        compiled(x).square().sum().backward()
        layer(y).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)

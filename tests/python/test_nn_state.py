"""The state of Linear4bit and QLoRALinear: saved, loaded, copied, cast, refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from layers import DOUBLE, KINDS, make_layer
from qlora_native.functional import quantize_4bit
from qlora_native.nn import Linear4bit, QLoRALinear


@KINDS
@DOUBLE
def test_state_dict_round_trip(kind, double_quant):
    layer, other = (
        make_layer(kind, double_quant=double_quant),
        make_layer(kind, double_quant=double_quant),
    )
    other.reset_parameters()
    assert other.quant_state != layer.quant_state
    state = load(save(layer.state_dict()))
    pointer = state["weight.absmax"].data_ptr()
    assert other.load_state_dict(state).missing_keys == []
    assert other.quant_state == layer.quant_state
    assert other.absmax.data_ptr() != pointer
    x = torch.randn(2, 96)
    assert torch.equal(other(x), layer(x))


@DOUBLE
def test_bitsandbytes_layer_loads_and_the_other_way_round(double_quant):
    bnb = pytest.importorskip("bitsandbytes")
    # in_features a multiple of blocksize: where a block crosses a row's end, and in_features is a
    # multiple of 32, the AVX-512 kernel of bitsandbytes 0.50.2 dequantizes with the wrong scale.
    theirs = bnb.nn.Linear4bit(128, 48, quant_type="nf4", compress_statistics=double_quant)
    theirs = theirs.to("cpu")
    ours = make_layer(k=128, double_quant=not double_quant, format="fp4", blocksize=128)
    ours.load_state_dict(theirs.state_dict())
    assert ours.format == "nf4" and ours.double_quant == double_quant and ours.blocksize == 64
    want = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(ours.dequantize(), want)
    got, wanted = ours.state_dict(), theirs.state_dict()
    assert list(got) == list(wanted)
    for key in wanted:
        assert torch.equal(got[key], wanted[key]), key


def test_load_state_dict_quantizes_a_float_weight():
    linear = nn.Linear(96, 48)
    layer = make_layer(blocksize=32)
    layer.load_state_dict(linear.state_dict())
    packed, state = quantize_4bit(linear.weight.detach(), 32, double_quant=True)
    assert torch.equal(layer.weight, packed) and layer.quant_state == state


def without(*keys):
    return lambda state: {k: v for k, v in state.items() if k not in keys}


BAD_STATES = {
    "no weight": (without("weight"), 'Missing key.*"weight"'),
    "half a weight": (without("weight.absmax"), "weight.absmax is missing beside"),
    "no bias": (without("bias"), 'Missing key.*"bias"'),
    "another shape": (
        lambda state: make_layer(n=24).state_dict(),
        r"weight must be of shape \[48, 96\], its quant_state says \[24, 96\]",
    ),
    "short weight": (
        lambda state: {**state, "weight": state["weight"][1:]},
        "weight must hold 2304 bytes .*got 2303 bytes",
    ),
    "stray key": (lambda state: {**state, "what": torch.zeros(1)}, "Unexpected key.*what"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_load_state_dict_refuses(case):
    change, message = BAD_STATES[case]
    layer = make_layer()
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(change(layer.state_dict()))


@KINDS
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double().float(),
        lambda m: m.type(torch.float16),
        lambda m: m.to("cpu", torch.float16),
    ],
    ids=["half", "to bf16", "double float", "type", "to device dtype"],
)
def test_casts_never_touch_the_quantized_parts(kind, cast):
    layer = make_layer(kind)
    if kind is QLoRALinear:
        layer.merge()
    before = copy.deepcopy(layer.quant_state), layer.weight.clone()
    bias = cast(layer).bias.dtype
    assert layer.quant_state == before[0] and torch.equal(layer.weight, before[1])
    if kind is QLoRALinear:
        assert layer.lora_A.dtype == bias and layer.merged_state.absmax.dtype == torch.uint8
        layer.unmerge()
    x = torch.randn(2, 96).to(bias)
    assert layer(x).dtype == bias


@KINDS
def test_deepcopy_pickle_and_torch_save(kind):
    layer = make_layer(kind)
    x = torch.randn(2, 96)
    file = io.BytesIO()
    torch.save(layer, file)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(io.BytesIO(file.getvalue()), weights_only=False),
    ]
    for other in copies:
        assert torch.equal(other(x), layer(x))
        assert other.weight.data_ptr() != layer.weight.data_ptr()
    assert copy.copy(layer).weight is layer.weight


def _forward_elsewhere(layer, x, answer):
    answer.put(layer(x).detach().numpy())


def test_a_layer_goes_to_a_spawned_process():
    layer, x = make_layer(QLoRALinear), torch.randn(2, 96)
    context = torch.multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_forward_elsewhere, args=(layer, x, answer))
    process.start()
    got = torch.from_numpy(answer.get(timeout=60))
    process.join()
    assert torch.equal(got, layer(x))


@KINDS
def test_meta_device(kind):
    layer = make_layer(kind, device="meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    assert layer(torch.empty(2, 96, device="meta")).shape == (2, 48)
    with pytest.raises(RuntimeError, match="on the meta device: load it first"):
        layer(torch.randn(2, 96))
    want = make_layer(kind)
    with pytest.raises(RuntimeError, match="pass assign=True"):
        layer.load_state_dict(want.state_dict())
    layer.load_state_dict(want.state_dict(), assign=True)
    x = torch.randn(2, 96)
    assert torch.equal(layer(x), want(x))
    emptied = make_layer(kind, device="meta").to_empty(device="cpu")
    emptied.load_state_dict(want.state_dict())
    assert torch.equal(emptied(x), want(x))


def test_from_linear_keeps_bias_dtype_and_mode():
    linear = nn.Linear(96, 48, dtype=torch.bfloat16).eval()
    layer = Linear4bit.from_linear(linear)
    assert layer.bias is linear.bias and not layer.training
    assert layer.dequantize().dtype == torch.bfloat16
    assert layer.weight.dtype == torch.uint8 and layer.weight.device == linear.weight.device
    with pytest.raises(TypeError, match=r"q_proj must have dtype one of .*float64"):
        Linear4bit.from_linear(linear.double(), name="q_proj")


def test_from_tensors_shares_and_checks():
    packed, state = quantize_4bit(torch.randn(48, 96))
    layer = Linear4bit.from_tensors(packed, state, torch.zeros(48))
    assert layer.weight.data_ptr() == packed.data_ptr() and layer.absmax is state.absmax
    with pytest.raises(ValueError, match=r"bias must have shape \[48\], got \[47\]"):
        Linear4bit.from_tensors(packed, state, torch.zeros(47))
    with pytest.raises(ValueError, match=r"state must be of a matrix \[N, K\], got shape \[4\]"):
        Linear4bit.from_tensors(*quantize_4bit(torch.randn(4)))


BAD_OPTIONS = {
    "r": ({"r": 0}, "r must be an integer of at least 1, got 0"),
    "dropout": ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    "alpha": ({"alpha": float("inf")}, "alpha must be finite, got inf"),
    "blocksize": ({"blocksize": 100}, "blocksize must be one of .*got 100"),
    "format": ({"format": "int4"}, "format must be one of .*'int4'"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_refuses_options(case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        QLoRALinear(96, 48, **options)


def test_repr_tells_the_layout():
    text = repr(make_layer(QLoRALinear, r=4, use_rslora=True, blocksize=128))
    for part in ("in_features=96", "'nf4'", "blocksize=128", "r=4", "use_rslora=True"):
        assert part in text

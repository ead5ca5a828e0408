"""Linear4bit and QLoRALinear: their state, their numbers against PEFT's, where they run."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from qlora_native import reference
from qlora_native.functional import dequantize_4bit, quantize_4bit
from qlora_native.nn import Linear4bit, QLoRALinear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DOUBLE = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
KINDS = pytest.mark.parametrize("kind", [Linear4bit, QLoRALinear], ids=lambda kind: kind.__name__)

# Error of a product of K ~ 100 values of size 1, relative to the result: eps of the dtype by 4.
RTOL = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make(kind=Linear4bit, n=48, k=96, **options):
    torch.manual_seed(0)
    layer = kind(k, n, **options)
    if kind is QLoRALinear:
        nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def close(got, want, dtype=torch.float32):
    want = want.detach().double()
    error = (got.detach().double() - want).norm() / want.norm().clamp(min=1e-30)
    assert error < RTOL[dtype], f"relative error {error:.2e}"


def want_of(layer, x):
    """What the layer computes, by the reference."""
    w = layer.dequantize(torch.float32)
    if isinstance(layer, QLoRALinear):
        return reference.qlora_linear(x, w, layer.bias, layer.lora_A, layer.lora_B, layer.scaling)
    return reference.linear(x, w, layer.bias)


# ---- numbers ------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", [(), (5,), (2, 17), (0,)], ids=str)
def test_forward_is_the_references(kind, bias, dtype, leading):
    layer = make(kind, bias=bias)
    x = torch.randn(*leading, 96).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*leading, 48)
    close(y, want_of(layer, x), dtype)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@DOUBLE
def test_gradients_are_the_references(format, double_quant):
    layer = make(QLoRALinear, format=format, double_quant=double_quant)
    x = torch.randn(7, 96, requires_grad=True)
    grad = torch.randn(7, 48)
    parameters = [x, layer.bias, layer.lora_A, layer.lora_B]
    got = torch.autograd.grad(layer(x), parameters, grad)
    want = torch.autograd.grad(want_of(layer, x), parameters, grad.double())
    for g, w in zip(got, want, strict=True):
        close(g, w)


def test_training_dropout_is_a_function_of_the_seed_that_forward_draws():
    layer = make(QLoRALinear, dropout=0.3)
    x = torch.randn(6, 96, requires_grad=True)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    seed = int(torch.randint(0, 2**62, (1,), dtype=torch.int64))
    w = layer.dequantize()
    want = reference.qlora_linear(
        x, w, layer.bias, layer.lora_A, layer.lora_B, layer.scaling, 0.3, seed
    )
    close(y, want)
    parameters = [x, layer.lora_A, layer.lora_B]
    got = torch.autograd.grad(y.sum(), parameters)
    for g, w in zip(got, torch.autograd.grad(want.sum(), parameters), strict=True):
        close(g, w)


def test_dropout_is_off_in_eval_and_draws_nothing():
    layer = make(QLoRALinear, dropout=0.3).eval()
    x = torch.randn(6, 96)
    before = torch.get_rng_state()
    close(layer(x), want_of(layer, x))
    assert torch.equal(before, torch.get_rng_state())
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_train_evaluate_train_gradients_by_finite_differences():
    """An evaluation must not change what training computes, as it does in bitsandbytes."""
    torch.manual_seed(0)
    model = nn.Sequential(make(QLoRALinear, 24, 32), nn.Tanh(), make(QLoRALinear, 8, 24))
    x = torch.randn(5, 32)
    grad = torch.randn(5, 8)

    def loss(model):
        return (model(x) * grad).sum()

    def step():
        model.zero_grad()
        loss(model.train()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    before = step()
    with torch.no_grad():
        model.eval()(x)
    with torch.inference_mode():
        model(x[:1])
    after = step()
    for name in before:
        assert torch.equal(before[name], after[name]), name

    def reference_loss():
        h = torch.tanh(want_of(model[0], x))
        return (want_of(model[2], h) * grad).sum()

    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        eps = 1e-3
        with torch.no_grad():
            parameter += eps * direction
            up = reference_loss()
            parameter -= 2 * eps * direction
            down = reference_loss()
            parameter += eps * direction
        slope = (after[name] * direction).sum().item()
        assert slope == pytest.approx((up - down).item() / (2 * eps), rel=1e-2, abs=1e-3), name


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_nn_linears(kind, dtype):
    layer = make(kind)
    x = torch.randn(3, 96)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        assert y.dtype == nn.Linear(96, 48)(x).dtype == dtype
        assert layer(torch.arange(96.0)[None].to(dtype)).dtype == dtype
    close(y, want_of(layer, x), dtype)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_bias_is_cast_to_the_inputs_dtype(x_dtype, bias_dtype):
    layer = make(dtype=bias_dtype)
    x = torch.randn(3, 96).to(x_dtype)
    assert layer(x).dtype == x_dtype
    close(layer(x), want_of(layer, x), max(x_dtype, bias_dtype, key=RTOL.get))


# ---- PEFT ---------------------------------------------------------------------------------------


def peft_twin(layer, **config):
    """PEFT's LoRA over the same base, dequantized, with the same adapter."""
    peft = pytest.importorskip("peft")
    base = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        base.weight.copy_(layer.dequantize(torch.float32))
        base.bias.copy_(layer.bias)
    lora = peft.LoraConfig(
        r=layer.r,
        lora_alpha=layer.alpha,
        use_rslora=layer.use_rslora,
        use_dora=layer.use_dora,
        target_modules=["0"],
        **config,
    )
    twin = peft.get_peft_model(nn.Sequential(base), lora).base_model.model[0]
    with torch.no_grad():
        twin.lora_A.default.weight.copy_(layer.lora_A)
        twin.lora_B.default.weight.copy_(layer.lora_B)
        if layer.use_dora:
            layer.lora_magnitude.mul_(1 + 0.1 * torch.rand(layer.out_features))
            twin.lora_magnitude_vector.default.weight.copy_(layer.lora_magnitude)
    return twin


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_outputs_and_gradients_are_pefts(options):
    layer = make(QLoRALinear, r=4, alpha=6, **options)
    twin = peft_twin(layer)
    x, grad = torch.randn(5, 96, requires_grad=True), torch.randn(5, 48)
    y, want = layer(x), twin(x)
    close(y, want)
    ours = [x, layer.lora_A, layer.lora_B]
    theirs = [x, twin.lora_A.default.weight, twin.lora_B.default.weight]
    if layer.use_dora:
        ours.append(layer.lora_magnitude)
        theirs.append(twin.lora_magnitude_vector.default.weight)
    got = torch.autograd.grad(y, ours, grad)
    for g, w in zip(got, torch.autograd.grad(want, theirs, grad), strict=True):
        close(g, w)


def test_dora_with_dropout_is_pefts():
    layer = make(QLoRALinear, r=4, use_dora=True, dropout=0.25)
    twin = peft_twin(layer, lora_dropout=0.25).train()
    x = torch.randn(5, 96)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    close(y, twin(x))


def test_a_new_adapter_changes_nothing_and_is_initialized_as_pefts():
    layer = make()
    x = torch.randn(3, 96)
    for options in ({}, {"use_dora": True}):
        lora = QLoRALinear.from_base(layer, r=64, **options)
        close(lora(x), layer(x))
        assert not lora.lora_B.any()
        assert lora.lora_A.abs().max() <= 96**-0.5  # kaiming_uniform, a = sqrt(5)
        assert lora.lora_A.std().item() == pytest.approx(96**-0.5 / 3**0.5, rel=0.05)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 2.0), (True, 8.0)])
def test_scaling(rslora, scaling):
    assert make(QLoRALinear, r=16, alpha=32, use_rslora=rslora).scaling == scaling


# ---- state --------------------------------------------------------------------------------------


@KINDS
@DOUBLE
def test_state_dict_round_trip(kind, double_quant):
    layer, other = make(kind, double_quant=double_quant), make(kind, double_quant=double_quant)
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
    ours = make(k=128, double_quant=not double_quant, format="fp4", blocksize=128)
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
    layer = make(blocksize=32)
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
        lambda state: make(n=24).state_dict(),
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
    layer = make()
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
    layer = make(kind)
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
    layer = make(kind)
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


@KINDS
def test_meta_device(kind):
    layer = make(kind, device="meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    assert layer(torch.empty(2, 96, device="meta")).shape == (2, 48)
    with pytest.raises(RuntimeError, match="on the meta device: load it first"):
        layer(torch.randn(2, 96))
    want = make(kind)
    with pytest.raises(RuntimeError, match="pass assign=True"):
        layer.load_state_dict(want.state_dict())
    layer.load_state_dict(want.state_dict(), assign=True)
    x = torch.randn(2, 96)
    assert torch.equal(layer(x), want(x))
    emptied = make(kind, device="meta").to_empty(device="cpu")
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
    text = repr(make(QLoRALinear, r=4, use_rslora=True, blocksize=128))
    for part in ("in_features=96", "'nf4'", "blocksize=128", "r=4", "use_rslora=True"):
        assert part in text


# ---- merging ------------------------------------------------------------------------------------


@DOUBLE
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_merge_then_unmerge_restores_every_bit(double_quant, options):
    layer = make(QLoRALinear, double_quant=double_quant, **options)
    x = torch.randn(3, 96)
    before, state = layer(x), copy.deepcopy(layer.state_dict())
    layer.merge("nearest")
    assert layer.merged
    merged = layer(x)
    want = quantize_4bit(layer.merged_weight(), double_quant=double_quant)
    assert torch.equal(layer.merged_packed, want[0]) and layer.merged_state == want[1]
    assert not torch.equal(merged, before)
    close(merged, reference.linear(x, dequantize_4bit(*want, torch.float32), layer.bias))
    after = layer.state_dict()
    assert all(torch.equal(state[key], after[key]) for key in state) and len(after) == len(state)
    layer.unmerge()
    assert not layer.merged and torch.equal(layer(x), before)


@DOUBLE
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_stochastic_merging_keeps_the_adapter_on_average(double_quant, format):
    layer = make(QLoRALinear, n=33, k=95, blocksize=32, double_quant=double_quant, format=format)
    with torch.no_grad():
        layer.lora_B.mul_(0.01)
        change = layer.merged_weight() - layer.dequantize()
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(200):
        layer.merge(generator=generator)
        stored = dequantize_4bit(layer.merged_packed, layer.merged_state, torch.float32)
        found.append(stored - layer.dequantize())
        layer.unmerge()
    kept = [((got * change).sum() / change.square().sum()).item() for got in found]
    assert sum(kept) / 200 == pytest.approx(1, abs=0.1)
    mean = torch.stack(found).mean(0)
    assert (mean - change).norm() < 0.2 * torch.stack(found).std(0).norm()
    nearest = dequantize_4bit(*layer.quantized_again("nearest"), torch.float32)
    lost = ((nearest - layer.dequantize()) * change).sum() / change.square().sum()
    assert lost < 0.5


def test_stochastic_merging_is_a_function_of_the_seed_and_leaves_zero_changes():
    layer = make(QLoRALinear)
    first, again = layer.quantized_again()[0], layer.quantized_again()[0]
    other = layer.quantized_again(generator=torch.Generator().manual_seed(2))[0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    nn.init.zeros_(layer.lora_B)
    packed, state = layer.quantized_again()
    assert torch.equal(packed, layer.weight) and state == layer.quant_state
    with pytest.raises(ValueError, match="rounding must be 'stochastic' or 'nearest', got 'up'"):
        layer.merge("up")
    nn.init.constant_(layer.lora_A, torch.nan)
    with pytest.raises(ValueError, match="must be finite, got NaN or Inf in the adapter"):
        layer.merge()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_merged_weight_is_pefts(options):
    layer = make(QLoRALinear, r=4, **options)
    twin = peft_twin(layer)
    twin.merge()
    close(layer.merged_weight(), twin.base_layer.weight)
    assert layer.merged_weight(torch.bfloat16).dtype == torch.bfloat16


def test_loading_a_state_dict_drops_the_merged_copy():
    layer, other = make(QLoRALinear), make(QLoRALinear)
    other.reset_parameters()
    layer.merge()
    layer.load_state_dict(other.state_dict())
    assert not layer.merged
    x = torch.randn(2, 96)
    assert torch.equal(layer(x), other(x))


def test_disabled_adapter_is_the_base():
    layer = make(QLoRALinear)
    x = torch.randn(2, 96)
    layer.adapter_enabled = False
    assert torch.equal(layer(x), layer.base()(x))


# ---- compile ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiles_whole_forward_and_backward(dropout):
    torch._dynamo.reset()
    model = nn.Sequential(
        make(QLoRALinear, 32, 32, dropout=dropout), nn.GELU(), make(QLoRALinear, 8, 32)
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 32)
    if dropout:
        assert torch.isfinite(compiled(x)).all()
        model.eval()
    y, want = compiled(x), model(x)
    close(y, want)
    parameters = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(y.square().sum(), parameters)
    for g, w in zip(got, torch.autograd.grad(want.square().sum(), parameters), strict=True):
        close(g, w)

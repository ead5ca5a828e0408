"""Folders that another method has quantized: FP8 read, GPTQ and AWQ refused or quantized again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_native.loading import CheckpointError, load_model
from qlora_native.loading.cost import QuantizationCost
from qlora_native.loading.fp8 import decode_fp8
from qlora_native.loading.packed_integers import decode_awq, decode_gptq
from tiny_llama import save_folder

pytestmark = pytest.mark.usefixtures("one_thread")

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's: place i of a word holds value AWQ_ORDER[i]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("plain") / "model")


def encoded_folder(folder: Path, to: Path, settings: dict, encode) -> tuple[Path, dict]:
    """A copy whose linears are encode(W) -> (tensors by suffix, the floats they stand for)."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    tensors, floats = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        parts, floats[name] = encode(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + suffix: t for suffix, t in parts.items()}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return to, floats


# ---- integers ------------------------------------------------------------------------------------


def integers(weight: torch.Tensor, bits: int, size: int, symmetric: bool):
    """q [K, N], z and scales [G, N], as GPTQ and AWQ choose them for the columns' groups."""
    n, k = weight.shape
    groups = weight.t().reshape(k // size, size, n)
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scales = ((high - low) / (2**bits - 1)).half()
    z = (-low / scales.float()).round().clamp(1, 2**bits - 1).int()
    q = (groups / scales.float()[:, None] + z[:, None]).round().clamp(0, 2**bits - 1).int()
    return q.reshape(k, n), z, scales


def packed(values: torch.Tensor, bits: int, order=None) -> torch.Tensor:
    """Along the last axis, one value after the other, by Python's integers."""
    per_word = 32 // bits
    words = []
    for row in values.tolist():
        for at in range(0, len(row), per_word):
            word = row[at : at + per_word]
            places = range(per_word) if order is None else order
            total = sum(word[value] << (bits * place) for place, value in enumerate(places))
            words.append(total - 2**32 if total >= 2**31 else total)
    return torch.tensor(words, dtype=torch.int32).view(values.shape[0], -1)


def as_gptq(weight, bits=4, size=32, version="gptq", shuffled=False):
    q, z, scales = integers(weight, bits, size, symmetric=True)
    group = torch.arange(q.shape[0]) // size
    if shuffled:  # desc_act
        order = torch.randperm(q.shape[0], generator=torch.Generator().manual_seed(0))
        q, group = q[order], group[order]
    stands_for = (scales.float()[group] * (q - z[group])).t()
    stored = z - 1 if version == "gptq" else z
    tensors = {
        "qweight": packed(q.t().contiguous(), bits).t().contiguous(),
        "qzeros": packed(stored, bits),
        "scales": scales,
        "g_idx": group.int(),
    }
    return tensors, stands_for


def as_awq(weight, size=32):
    q, z, scales = integers(weight, 4, size, symmetric=False)
    stands_for = (
        scales.float().repeat_interleave(size, 0) * (q - z.repeat_interleave(size, 0))
    ).t()
    tensors = {"qweight": packed(q, 4, AWQ_ORDER), "qzeros": packed(z, 4, AWQ_ORDER)}
    return {**tensors, "scales": scales}, stands_for


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_gptq_values(bits, version, shuffled):
    tensors, want = as_gptq(torch.randn(96, 64), bits, 32, version, shuffled)
    settings = {"group_size": 32, "checkpoint_format": version}
    assert torch.equal(decode_gptq(tensors, bits, settings), want)
    if not shuffled:
        del tensors["g_idx"]
        assert torch.equal(decode_gptq(tensors, bits, settings), want)


def test_awq_values():
    tensors, want = as_awq(torch.randn(96, 64))
    assert torch.equal(decode_awq(tensors, {"group_size": 32}), want)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize(("settings", "encode"), [(GPTQ, as_gptq), (AWQ, as_awq)])
def test_integers_are_refused_with_the_loss_or_quantized_again(folder, tmp_path, settings, encode):
    path, floats = encoded_folder(folder, tmp_path / "model", settings, encode)
    kind = settings["quant_method"].upper()
    message = (
        rf"already quantized by {kind} \(4 bits, groups of 32\): to quantize it again compounds "
        r"the loss: 'model\.layers\.\S+_proj\.weight' would move by (\d+\.\d\d)% \(relative error\)"
        r".*requantize=True"
    )
    with pytest.raises(CheckpointError, match=message) as refused:
        load_model(path)
    told = float(re.search(message, str(refused.value)).group(1))
    assert 5 < told < 15  # NF4 of what is spread evenly

    cost = QuantizationCost()
    with pytest.warns(UserWarning, match=rf"{kind} and now to 4 bits again: .*% \(relative"):
        model, _ = load_model(path, requantize=True, cost=cost)
    assert cost.layers == len(floats)
    squares = [0.0, 0.0]
    for name, weight in floats.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        squares[0] += float((layer.dequantize(torch.float32) - weight).double().square().sum())
        squares[1] += float(weight.double().square().sum())
    assert cost.relative_error == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-6)

    plain, _ = load_model(path, quantize=False)
    for name, weight in floats.items():
        assert torch.equal(plain.get_parameter(name), weight)


def test_a_companion_that_is_missing_is_named(folder, tmp_path):
    def without_zeros(weight):
        tensors, floats = as_gptq(weight)
        return {k: v for k, v in tensors.items() if k != "qzeros"}, floats

    path, _ = encoded_folder(folder, tmp_path / "model", GPTQ, without_zeros)
    with pytest.raises(CheckpointError, match=r"no file of the folder holds .*qzeros"):
        load_model(path, requantize=True)


@pytest.mark.parametrize(
    "settings",
    [
        {**GPTQ, "bits": 3},
        {**AWQ, "version": "gemv"},
        {"quant_method": "hqq"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ],
)
def test_forms_without_a_reader_are_refused(folder, tmp_path, settings):
    path, _ = encoded_folder(folder, tmp_path / "model", settings, as_gptq)
    with pytest.raises(CheckpointError, match=r"which cannot be read: .* take the original"):
        load_model(path, requantize=True)


# ---- FP8 -----------------------------------------------------------------------------------------


def as_fp8(weight, rows, columns, dtype=torch.float8_e4m3fn):
    """Codes and scales of blocks of rows x columns, the last ones cut off."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
    blocks = padded.unfold(0, rows, rows).unfold(1, columns, columns)
    scale = blocks.abs().amax((-1, -2)) / torch.finfo(dtype).max
    spread = scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
    return (weight / spread).to(dtype), scale, spread


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("block", [(32, 16), (1, 64), (96, 64)])
def test_fp8_values_are_transformers_own(dtype, block):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight, scale, spread = as_fp8(torch.randn(96, 64), *block, dtype)
    got = decode_fp8({"weight": weight, "scale": scale})
    want = fp8.Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(got, want) and torch.equal(got, weight.float() * spread)


def test_fp8_scales_of_other_kinds():
    weight, scale, spread = as_fp8(torch.randn(90, 70), 32, 32)
    want = weight.float() * spread  # blocks that are cut off, of which transformers has none
    assert torch.equal(decode_fp8({"weight": weight, "scale": scale}, [32, 32]), want)
    with pytest.raises(ValueError, match="3 scales for 70 values"):
        decode_fp8({"weight": weight, "scale": scale})
    rows = torch.rand(90) + 0.5
    want = weight.float() * rows[:, None]
    for scale in (rows, rows[:, None]):
        assert torch.equal(decode_fp8({"weight": weight, "scale": scale}), want)
    exponents = torch.tensor([[126]], dtype=torch.uint8)
    assert torch.equal(decode_fp8({"weight": weight, "scale": exponents}), weight.float() / 2)
    halves = torch.tensor([[0.5]]).to(torch.float8_e8m0fnu)
    assert torch.equal(decode_fp8({"weight": weight, "scale": halves}), weight.float() / 2)


BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
ROWS = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {"weights": {"num_bits": 8, "type": "float"}, "targets": ["Linear"]}
    },
}


@pytest.mark.parametrize(
    ("settings", "suffix", "block"),
    [
        (BLOCKS, "weight_scale_inv", (32, 32)),
        (ROWS, "weight_scale", (1, 1 << 20)),
        (COMPRESSED, "weight_scale", (1 << 20, 1 << 20)),
    ],
)
def test_fp8_folders_load(folder, tmp_path, settings, suffix, block):
    def encode(weight):
        rows, columns = (min(b, s) for b, s in zip(block, weight.shape, strict=True))
        codes, scale, spread = as_fp8(weight, rows, columns)
        tensors = {"weight": codes, suffix: scale, "input_scale": torch.ones(1)}
        return tensors, codes.float() * spread

    path, floats = encoded_folder(folder, tmp_path / "model", settings, encode)
    plain, _ = load_model(path, quantize=False)
    for name, weight in floats.items():
        assert torch.equal(plain.get_parameter(name), weight)
    cost = QuantizationCost()
    model, _ = load_model(path, cost=cost)
    assert cost.layers == len(floats)
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=0.1, rtol=0.1)


def test_an_fp8_weight_without_its_scale_is_named(folder, tmp_path):
    path, _ = encoded_folder(
        folder, tmp_path / "model", BLOCKS, lambda w: ({"weight": w.to(torch.float8_e4m3fn)}, w)
    )
    with pytest.raises(CheckpointError, match=r"its scale, model\.\S+weight_scale_inv"):
        load_model(path)

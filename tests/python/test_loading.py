"""load_model on folders: the same logits as transformers', and every kind of broken folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_llama
from qlora_native.linear import Linear4bit
from qlora_native.loading import CheckpointError, load_model, save_quantized
from qlora_native.loading.cost import QuantizationCost
from qlora_native.loading.safetensors_io import SafetensorsReader, write_safetensors

transformers = pytest.importorskip("transformers")

IDS = torch.arange(3, 35)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.save_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama.make_model(tie=False)
    return tiny_llama.save_folder(tmp_path_factory.mktemp("sharded"), model, max_shard_size="100KB")


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def dequantized_twin(folder: Path, model: Any) -> Any:
    """transformers' model of `folder` with the 4-bit weights of `model` as floats."""
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            twin.get_submodule(name).weight.data = module.dequantize(model.dtype)
    return twin.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", ["folder", "sharded"])
def test_logits_equal_transformers_on_dequantized_weights(
    request: pytest.FixtureRequest, name: str
) -> None:
    path = request.getfixturevalue(name)
    model, tokenizer = load_model(path)
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 14
    torch.testing.assert_close(logits(model), logits(dequantized_twin(path, model)))
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    reference = transformers.AutoTokenizer.from_pretrained(path)
    chat = [{"role": "user", "content": "what is a model?"}]
    assert tokenizer.apply_chat_template(chat) == reference.apply_chat_template(chat)
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 2


def test_dtype_reaches_everything_but_the_linears(folder: Path) -> None:
    model, _ = load_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # Quantized from the file's float32, not from bfloat16.
    exact, _ = load_model(folder)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(model.get_submodule(name).weight, exact.get_submodule(name).weight)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)


def test_the_dtype_is_the_checkpoints_by_default(tmp_path: Path) -> None:
    half = tiny_llama.save_folder(tmp_path, tiny_llama.make_model(dtype=torch.float16))
    assert load_model(half)[0].dtype == torch.float16


def test_ties_follow_the_config(folder: Path, sharded: Path) -> None:
    tied, _ = load_model(folder)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied, _ = load_model(sharded)
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)


def test_settings_reach_the_layers(folder: Path) -> None:
    model, _ = load_model(
        folder, format="fp4", blocksize=128, double_quant=False, skip=("lm_head", "down_proj")
    )
    layer = model.model.layers[0]
    state = layer.self_attn.q_proj.quant_state
    assert (state.format, state.blocksize, state.double_quant) == ("fp4", 128, False)
    assert type(layer.mlp.down_proj) is torch.nn.Linear
    plain, _ = load_model(folder, quantize=False)
    assert not any(isinstance(m, Linear4bit) for m in plain.modules())
    assert torch.equal(logits(plain), logits(dequantized_twin(folder, plain)))


def test_biases_and_their_shards(tmp_path: Path) -> None:
    model = tiny_llama.make_model(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    path = tiny_llama.save_folder(tmp_path, model, max_shard_size="20KB")
    loaded, _ = load_model(path)
    assert loaded.model.layers[0].mlp.up_proj.bias.abs().sum() > 0
    torch.testing.assert_close(logits(loaded), logits(dequantized_twin(path, loaded)))


def test_gpt2_stores_its_weights_transposed(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=320, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    path = tiny_llama.save_folder(tmp_path / "gpt2", model)
    loaded, tokenizer = load_model(path)
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, Linear4bit)}
    assert len(layers) == 8
    for name, layer in layers.items():
        model.get_submodule(name).weight.data = layer.dequantize().T
    torch.testing.assert_close(logits(loaded), logits(model))
    save_quantized(loaded, tokenizer, tmp_path / "packed")
    again, _ = load_model(tmp_path / "packed")
    assert torch.equal(logits(again), logits(loaded))


# ---- the quantized folder ------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_a_saved_folder_loads_to_the_same_bits(
    folder: Path, tmp_path: Path, shard_bytes: int
) -> None:
    model, tokenizer = load_model(folder)
    save_quantized(model, tokenizer, tmp_path / "q", max_shard_bytes=shard_bytes)
    again, tokenizer_again = load_model(tmp_path / "q")
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert tokenizer_again.chat_template == tokenizer.chat_template
    assert tokenizer_again.get_vocab() == tokenizer.get_vocab()
    assert [p.name for p in tmp_path.iterdir()] == ["q"]
    assert (tmp_path / "q" / "model.safetensors").exists() == (shard_bytes == 10**9)


@pytest.mark.parametrize("double_quant", [True, False])
def test_transformers_with_bitsandbytes_loads_our_folder(
    folder: Path, tmp_path: Path, double_quant: bool
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    model, tokenizer = load_model(folder, double_quant=double_quant)
    save_quantized(model, tokenizer, tmp_path / "q")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = theirs.get_submodule(name).weight
            values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            torch.testing.assert_close(values, module.dequantize())
    # It computes in bfloat16 where the processor can.
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0.05, atol=0.005)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_folder_of_bitsandbytes_loads_without_conversion(
    folder: Path, tmp_path: Path, storage: torch.dtype
) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=storage,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path)
    ours, _ = load_model(_with_tokenizer(tmp_path))
    layer = theirs.model.layers[1].self_attn.o_proj
    packed = ours.model.layers[1].self_attn.o_proj.weight
    assert torch.equal(packed.flatten(), layer.weight.data.view(torch.uint8).flatten())
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0.05, atol=0.005)


def _with_tokenizer(folder: Path) -> Path:
    tiny_llama.make_tokenizer().save_pretrained(folder)
    return folder


def test_saving_replaces_a_model_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(folder)
    save_quantized(model, tokenizer, tmp_path / "q")
    save_quantized(model, tokenizer, tmp_path / "q")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="exists and is no model folder"):
        save_quantized(model, tokenizer, tmp_path / "other")
    plain, _ = load_model(folder, quantize=False)
    with pytest.raises(ValueError, match="has no 4-bit layer"):
        save_quantized(plain, tokenizer, tmp_path / "p")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "q"]


def test_a_full_disk_leaves_the_old_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(folder)
    save_quantized(model, tokenizer, tmp_path / "q")
    before = (tmp_path / "q" / "model.safetensors").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_quantized(model, tokenizer, tmp_path / "q")
    monkeypatch.undo()
    assert (tmp_path / "q" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


# ---- broken folders ------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    with SafetensorsReader(path) as reader:
        tensors = {name: reader.read(name) for name in reader.entries}
    edit(tensors)
    write_safetensors(path, tensors)


def drop(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def add(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.extra.weight": torch.zeros(2)}))


def reshape(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.zeros(65)}))


def poison(folder: Path) -> None:
    edit_tensors(folder, lambda t: t["model.layers.0.mlp.up_proj.weight"][0, 0].fill_(torch.nan))


def truncate(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def gptq(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def eight_bit(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})


def unknown_type(folder: Path) -> None:
    edit_config(folder, model_type="flux-capacitor")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (drop, ["lacks the tensor 'model.layers.1.mlp.up_proj.weight'"]),
        (add, ["model.safetensors holds the tensor 'model.extra.weight'", "strict=False"]),
        (reshape, ["'model.norm.weight' has shape [65]", "asks for [64]"]),
        (poison, ["'model.layers.0.mlp.up_proj.weight' cannot be quantized", "1 NaN"]),
        (truncate, ["model.safetensors is truncated: tensor '"]),
        (no_weights, ["holds no model.safetensors and no model.safetensors.index.json"]),
        (pickled, ["it does hold pytorch_model.bin: only safetensors are read"]),
        (gptq, ["already quantized by GPTQ", "take the original"]),
        (eight_bit, ["already quantized by 8-bit bitsandbytes"]),
        (unknown_type, ["config.json cannot be used", "flux-capacitor"]),
        (no_config, ["holds no config.json"]),
        (no_tokenizer, ["holds no tokenizer that transformers can read"]),
    ],
)
def test_a_broken_folder_is_refused_with_the_reason(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], messages: list[str]
) -> None:
    broken = copy_of(folder, tmp_path / "broken")
    damage(broken)
    with pytest.raises(CheckpointError) as error:
        load_model(broken)
    for message in [str(broken), *messages]:
        assert message in str(error.value)


def test_unexpected_tensors_can_be_allowed(folder: Path, tmp_path: Path) -> None:
    broken = copy_of(folder, tmp_path / "broken")
    add(broken)
    model, _ = load_model(broken, strict=False)
    assert torch.equal(logits(model), logits(load_model(folder)[0]))


def missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00005.safetensors").unlink()


def lying_index(folder: Path) -> None:
    edit_index(folder, lambda m: m.update({"model.ghost.weight": next(iter(m.values()))}))


def escaping_index(folder: Path) -> None:
    edit_index(folder, lambda m: m.update({"model.norm.weight": "../elsewhere.safetensors"}))


def broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def edit_index(folder: Path, edit: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_shard, "model-00002-of-00005.safetensors is missing"),
        (lying_index, "holds no tensor 'model.ghost.weight', though"),
        (escaping_index, "names a file outside its folder: '../elsewhere.safetensors'"),
        (broken_index, "is not an index of shards"),
    ],
)
def test_a_broken_index_is_refused_with_the_reason(
    sharded: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    broken = copy_of(sharded, tmp_path / "broken")
    damage(broken)
    with pytest.raises(CheckpointError, match=message):
        load_model(broken)


def packed_folder(folder: Path, to: Path) -> Path:
    model, tokenizer = load_model(folder)
    return save_quantized(model, tokenizer, to)


WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(WEIGHT), f"but no file of the folder holds '{WEIGHT}'"),
        (lambda t: t.pop(f"{WEIGHT}.nested_absmax"), f"'{WEIGHT}' cannot be used: .*nested_absmax"),
        (lambda t: t.update({WEIGHT: t[WEIGHT][:-1]}), f"'{WEIGHT}' cannot be used: .*2048 bytes"),
        (
            lambda t: t.update({k: t[k.replace("q_proj", "k_proj")] for k in t if WEIGHT in k}),
            f"'{WEIGHT}' cannot be used: its shape is \\[32, 64\\], not \\[64, 64\\]",
        ),
    ],
)
def test_a_broken_packed_folder_is_refused_with_the_reason(
    folder: Path, tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    path = packed_folder(folder, tmp_path / "q")
    edit_tensors(path, edit)
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


def test_sources_that_are_nothing() -> None:
    with pytest.raises(CheckpointError, match=r"no model at .*nowhere: give a model folder"):
        load_model("nowhere")
    with pytest.raises(CheckpointError, match=r"is neither a model folder nor a \.gguf file"):
        load_model(Path(__file__))


# ---- cost and memory -----------------------------------------------------------------------------


def test_cost_counts_bits_and_error(folder: Path) -> None:
    cost = QuantizationCost()
    model, _ = load_model(folder, cost=cost)
    assert cost.layers == 14
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert cost.parameters == sum(m.in_features * m.out_features for m in layers)
    assert 4.1 < cost.bits_per_parameter < 4.2
    assert 0.05 < cost.relative_error < 0.15  # a normal distribution at 4 bits: about 0.09
    assert cost.worst_error >= cost.relative_error and cost.worst.startswith("model.layers.")


PEAK = """
import json, re, sys, threading
from pathlib import Path
import torch
import transformers.models.llama.modeling_llama  # code is not what is measured
from qlora_native.loading import load_model
from qlora_native.model import footprint

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

load_model(sys.argv[2])  # whatever is set up once
highest, done, before = 0, threading.Event(), anonymous()
def watch():
    global highest
    while not done.wait(0.0005):
        highest = max(highest, anonymous())
thread = threading.Thread(target=watch); thread.start()
model, _ = load_model(sys.argv[1])
done.set(); thread.join()
print(json.dumps({"peak": highest - before, "size": footprint(model).total_bytes}))
"""


def test_peak_memory_stays_near_the_quantized_size(folder: Path, tmp_path: Path) -> None:
    """Anonymous memory (what the process itself holds), sampled every half millisecond."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc to measure anonymous memory with")
    torch.manual_seed(0)
    model = tiny_llama.make_model(
        tie=False,
        dtype=torch.bfloat16,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=8,
        vocab_size=4096,
    )
    largest = max(p.nbytes for p in model.parameters())
    whole = sum(p.nbytes for p in model.parameters())
    big = tiny_llama.save_folder(tmp_path / "big", model, max_shard_size="40MB")
    del model
    command = [sys.executable, "-c", PEAK, str(big), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    measured = json.loads(done.stdout.splitlines()[-1])
    bound = 1.3 * measured["size"] + largest
    assert bound < 0.6 * whole  # so that holding the float model would show
    assert 0.8 * measured["size"] < measured["peak"] <= bound, measured

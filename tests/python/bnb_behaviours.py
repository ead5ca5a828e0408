"""What the suites of bitsandbytes, transformers, peft and trl check of 4-bit models, on tiny ones.

    python bnb_behaviours.py FOLDER      with whatever `import bitsandbytes` finds

Each function is one behaviour; docs/integrations.md lists them with the tests they are of.
"""

from __future__ import annotations

import copy
import io
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

IDS = torch.arange(3, 15).view(2, 6)
TOKENS = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "gpt2": transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **TOKENS
    ),
    "opt": transformers.OPTConfig(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=64, dropout=0.0, **TOKENS,
    ),
    "bloom": transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, **TOKENS),
    "t5": transformers.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
        **TOKENS,
    ),
}  # fmt: skip
MADE: dict[str, Path] = {}


def make(folder: Path) -> None:
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        auto = transformers.AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
        MADE[name] = folder / name
        auto.from_config(config).save_pretrained(folder / name)


def in_4bit(name: str, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32, **options}
    config = BitsAndBytesConfig(load_in_4bit=True, **settings)
    dtype = settings["bnb_4bit_compute_dtype"]
    return auto.from_pretrained(
        MADE[name], quantization_config=config, dtype=dtype, device_map="auto"
    ).train()


def raises(call: Callable[[], Any], error: type[Exception], message: str = "") -> None:
    try:
        call()
    except error as caught:
        assert message in str(caught), caught
    else:
        raise AssertionError(f"{error.__name__} was not raised")


def linears(model: Any) -> list[Any]:
    found = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert found
    return found


# ---- transformers: tests/quantization/bnb/test_4bit.py -------------------------------------------


def sizes_classes_and_config() -> None:
    for name in ("gpt2", "opt", "bloom"):
        plain = AutoModelForCausalLM.from_pretrained(MADE[name], dtype=torch.float32)
        model = in_4bit(name)
        assert model.num_parameters() == plain.num_parameters()
        saved = sum(7 * layer.weight.nbytes for layer in linears(model))  # of 4 bytes a value, 3.5
        assert plain.get_memory_footprint() - model.get_memory_footprint() == saved
        assert all(layer.weight.dtype == torch.uint8 for layer in linears(model))
        assert all(type(layer.weight) is bnb.nn.Params4bit for layer in linears(model))
        assert type(model.get_output_embeddings().weight) is torch.nn.Parameter
        config = model.config
        assert config.quantization_config and config.to_dict() and config.to_diff_dict()
        assert "load_in_4bit" in config.to_json_string()


def heads_stay_as_they_are() -> None:
    model = in_4bit("opt", transformers.AutoModelForSequenceClassification)
    assert type(model.score.weight) is torch.nn.Parameter and linears(model)


def casts_are_refused_and_moves_are_not() -> None:
    model = in_4bit("opt")
    codes = linears(model)[0].weight.data.clone()
    for cast in (model.half, model.float, lambda: model.to(torch.float16)):
        raises(cast, ValueError)
    model.to("cpu")
    assert torch.equal(linears(model)[0].weight.data, codes)


def conv1d_is_quantized_the_right_way_round() -> None:
    model = in_4bit("gpt2")
    plain = AutoModelForCausalLM.from_pretrained(MADE["gpt2"], dtype=torch.float32).train()
    layer, conv = model.transformer.h[0].mlp.c_fc, plain.transformer.h[0].mlp.c_fc
    assert isinstance(conv, Conv1D) and isinstance(layer, bnb.nn.Linear4bit)
    values = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    error = (values - conv.weight.t()).norm() / conv.weight.norm()
    assert values.shape == conv.weight.t().shape and error < 0.12


def modules_kept_in_float32() -> None:
    auto = transformers.AutoModelForSeq2SeqLM
    model = in_4bit("t5", auto, bnb_4bit_compute_dtype=torch.float16)
    wo = model.decoder.block[0].layer[2].DenseReluDense.wo
    assert wo.weight.dtype == torch.float32 and not isinstance(wo, bnb.nn.Linear4bit)
    attention = model.decoder.block[0].layer[0].SelfAttention
    assert isinstance(attention.q, bnb.nn.Linear4bit)
    assert in_4bit("t5", auto).generate(IDS, max_new_tokens=3).shape[0] == 2


def generation_and_dequantization() -> None:
    for name in ("gpt2", "opt", "bloom"):
        model = in_4bit(name)
        before = model(IDS).logits
        made = model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert made.shape[1] > IDS.shape[1]
        model = model.dequantize().train()
        assert not any(isinstance(m, bnb.nn.Linear4bit) for m in model.modules())
        torch.testing.assert_close(model(IDS).logits, before, atol=1e-4, rtol=1e-4)


def folders_come_back_as_they_were(folder: Path) -> None:
    for quant_type in ("nf4", "fp4"):
        for double in (False, True):
            options = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double}
            model = in_4bit("opt", **options)
            model.save_pretrained(folder / "saved")
            again = AutoModelForCausalLM.from_pretrained(folder / "saved").train()
            a, b = dict(model.named_parameters()), dict(again.named_parameters())
            assert a.keys() == b.keys() and again.config.quantization_config
            for name, value in a.items():
                assert b[name].dtype == value.dtype and torch.equal(b[name], value)
                if isinstance(value, bnb.nn.Params4bit):
                    assert type(b[name].quant_state) is bnb.functional.QuantState
                    assert b[name].quant_state == value.quant_state
            assert torch.equal(model(IDS).logits, again(IDS).logits)
            assert model.get_memory_footprint() == again.get_memory_footprint()


class LoRALayer(torch.nn.Module):
    """As transformers' test writes it: around any linear."""

    def __init__(self, module: Any, rank: int) -> None:
        super().__init__()
        self.module = module
        self.adapter = torch.nn.Sequential(
            torch.nn.Linear(module.in_features, rank, bias=False),
            torch.nn.Linear(rank, module.out_features, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x) + self.adapter(x)


def training_of_adapters_under_autocast() -> None:
    model = in_4bit("opt", bnb_4bit_compute_dtype=torch.bfloat16)
    for param in model.parameters():
        param.requires_grad = False
        if param.ndim == 1:
            param.data = param.data.to(torch.float32)
    for module in list(model.modules()):
        if "OPTAttention" in type(module).__name__ or type(module).__name__ == "OPTAttention":
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(module, name, LoRALayer(getattr(module, name), 4))
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS).logits.float().norm().backward()
    adapters = [m for m in model.modules() if isinstance(m, LoRALayer)]
    assert len(adapters) == 6
    assert all(m.adapter[1].weight.grad.norm() > 0 for m in adapters)
    assert all(m.weight.grad is None for m in linears(model))


def bad_configs_are_refused() -> None:
    raises(lambda: BitsAndBytesConfig(load_in_4bit=True, load_in_8bit=True), ValueError)
    raises(lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="add"), ValueError)


# ---- bitsandbytes: tests/test_linear4bit.py ------------------------------------------------------


def layers_from_parts_and_through_files() -> None:
    linear = torch.nn.Linear(300, 400, dtype=torch.float16)
    for storage in (torch.uint8, torch.float16, torch.bfloat16, torch.float32):
        layer = bnb.nn.Linear4bit(300, 400, device="meta", quant_storage=storage)
        layer.weight = bnb.nn.Params4bit(linear.weight, quant_storage=storage)
        layer.bias = torch.nn.Parameter(linear.bias)
        layer = layer.to("cpu").train()
        state = layer.state_dict()
        bias, weight = state.pop("bias"), state.pop("weight")
        again = bnb.nn.Linear4bit(300, 400, device="meta")
        again.weight = bnb.nn.Params4bit.from_prequantized(weight, state, device="cpu")
        again.bias = torch.nn.Parameter(bias)
        x = torch.rand(42, 300)
        want = layer(x)
        assert torch.equal(again.to("cpu").train()(x), want)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), want)
        keys = set(bnb.nn.Params4bit(linear.weight).__dict__)
        assert set(copy.deepcopy(layer.weight).__dict__) == set(layer.weight.__dict__) == keys


# ---- peft: what test_common_gpu.py checks of bitsandbytes' layers --------------------------------


def adapters_of_many_kinds() -> None:
    base = in_4bit("opt")
    want = base(IDS).logits
    for options in (
        {"r": 4},
        {"r": 4, "use_rslora": True},
        {"r": 4, "use_dora": True},
        {"r": 4, "modules_to_save": ["lm_head"]},
        {"r": 4, "rank_pattern": {"q_proj": 2}},
    ):
        lora = peft.LoraConfig(target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(copy.deepcopy(base), lora).train()
        torch.testing.assert_close(model(IDS).logits, want, atol=1e-4, rtol=1e-4)
        model(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, want)
    pissa = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa")
    raises(lambda: peft.get_peft_model(copy.deepcopy(base), pissa), TypeError, "PiSSA")
    ia3 = peft.IA3Config(target_modules=["q_proj", "fc1"], feedforward_modules=["fc1"])
    torch.testing.assert_close(peft.get_peft_model(copy.deepcopy(base), ia3)(IDS).logits, want)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"]))
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(model.unload().train()(IDS).logits, want, atol=1e-4, rtol=1e-4)


# ---- trl: test_peft_with_quantization of test_{sft,dpo,kto}_trainer.py --------------------------


def trl_trains_adapters_alone(folder: Path) -> None:
    import datasets
    import trl
    from trl.experimental.kto import KTOConfig, KTOTrainer

    from tiny import make_tokenizer

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(tokenizer),
    )  # fmt: skip
    MADE["qwen2"] = folder / "qwen2"
    AutoModelForCausalLM.from_config(config).save_pretrained(MADE["qwen2"])
    kinds = (
        (trl.SFTTrainer, trl.SFTConfig, [{"text": "one and two and three"}]),
        (
            trl.DPOTrainer,
            trl.DPOConfig,
            [{"prompt": "one and ", "chosen": "two", "rejected": "three"}],
        ),
        (
            KTOTrainer,
            KTOConfig,
            [
                {"prompt": "one and ", "completion": "two", "label": True},
                {"prompt": "one and ", "completion": "three", "label": False},
            ],
        ),
    )
    for make_trainer, make_config, rows in kinds:
        model = in_4bit(
            "qwen2", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
        )
        trainer = make_trainer(
            model=model,
            args=make_config(
                str(folder / "trl"), learning_rate=0.1, max_steps=3, use_cpu=True, bf16=False,
                per_device_train_batch_size=2, report_to="none",
            ),
            train_dataset=datasets.Dataset.from_list(rows * 8),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(),
        )  # fmt: skip
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        assert trainer.state.log_history[-1]["train_loss"] is not None
        for name, old in before.items():
            changed = not torch.equal(trainer.model.get_parameter(name), old)
            assert changed == ("lora" in name), (make_trainer.__name__, name)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    make(folder)
    behaviours = (
        sizes_classes_and_config,
        heads_stay_as_they_are,
        casts_are_refused_and_moves_are_not,
        conv1d_is_quantized_the_right_way_round,
        modules_kept_in_float32,
        generation_and_dequantization,
        lambda: folders_come_back_as_they_were(folder),
        training_of_adapters_under_autocast,
        bad_configs_are_refused,
        layers_from_parts_and_through_files,
        adapters_of_many_kinds,
        lambda: trl_trains_adapters_alone(folder),
    )
    failed = 0
    for behaviour in behaviours:
        try:
            behaviour()
        except Exception:
            traceback.print_exc()
            failed += 1
    if failed:
        raise SystemExit(f"{failed} of {len(behaviours)} behaviours failed")
    print(len(behaviours), "behaviours of", bnb.__name__)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

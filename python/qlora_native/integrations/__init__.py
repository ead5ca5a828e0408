"""qlora_native inside other libraries. Each module registers with one of them when it is imported.

    transformers.py      `QLoRANativeConfig` for from_pretrained(quantization_config=…)
    peft.py              LoRA of peft on our 4-bit layers, in one op where it can be

docs/integrations.md shows them in use. Nothing here is imported by the rest of the package.
"""

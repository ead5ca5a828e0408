"""Shapes by their models' names: [out_features, in_features] of their linears."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    intermediate: int
    kv: int  # rows of k_proj and v_proj
    layers: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The seven linears of one layer."""
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (self.kv, self.hidden),
            "v_proj": (self.kv, self.hidden),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    def lora_shapes(self, r: int) -> list[tuple[int, int]]:
        """lora_A [r, in] and lora_B [out, r] of every linear of every layer."""
        pair = [((r, n_in), (n_out, r)) for n_out, n_in in self.linears.values()]
        return [shape for shapes in pair * self.layers for shape in shapes]


SMOLLM2_135M = Model("SmolLM2-135M", hidden=576, intermediate=1536, kv=192, layers=30)
QWEN25_7B = Model("Qwen2.5-7B", hidden=3584, intermediate=18944, kv=512, layers=28)
LLAMA3_8B = Model("Llama-3-8B", hidden=4096, intermediate=14336, kv=1024, layers=32)
MODELS = (SMOLLM2_135M, QWEN25_7B, LLAMA3_8B)

# The shape that the project's targets are stated for (Llama-3-8B's q_proj).
SQUARE_4096 = (4096, 4096)

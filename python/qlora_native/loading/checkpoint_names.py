"""A model's tensors under the names that its checkpoints on the Hub have.

transformers renames and fuses tensors while it loads them (experts, mostly: one by one in a
checkpoint, stacked in the model). What is written for others to read goes the way back, by
transformers' own rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from qlora_native.loading.hf import hf
from qlora_native.loading.skeleton import Model


class CheckpointNames:
    """`outline`: the checkpoint's tensors by name, on the meta device, in the order to write them.

    Args:
        model: a model of transformers.
        outline: its tensors by name, on the meta device.
    """

    def __init__(self, model: Model, outline: Mapping[str, Tensor]) -> None:
        self.model = model
        self.outline = self._revert(outline)
        names = {id(tensor): name for name, tensor in outline.items()}
        # Those that are renamed at most: checkpoint name -> model name.
        self.renamed = {new: names[id(t)] for new, t in self.outline.items() if id(t) in names}
        # Parts: checkpoint name -> name of the model's tensor that it is a part of.
        fused = outline.keys() - self.renamed.values()
        self.part_of = {new: name for name in fused for new in self._revert({name: outline[name]})}
        self.parts: dict[str, Tensor] = {}  # of the tensor that was split last

    def value(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The checkpoint's tensor of this name. `read` gives the model's tensor of a name."""
        if name in self.renamed:
            return read(self.renamed[name])
        if name not in self.parts:
            source = self.part_of[name]
            self.parts = self._revert({source: read(source)})
        return self.parts[name].contiguous()

    def _revert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        revert = hf("core_model_loading").revert_weight_conversion
        reverted: dict[str, Tensor] = revert(self.model, dict(tensors))
        return reverted

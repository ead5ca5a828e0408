"""The state of a run, taken and given back, so that a resumed run goes on to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qlora_native.config import ConfigError, TrainConfig


def capture(
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that a later step depends on; `identity` says which run it belongs to."""
    return {
        "step": step,
        "identity": dict(identity),
        "parameters": {name: parameter.detach() for name, parameter in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "random": random_state(),
    }


def restore(
    state: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Gives the state back and returns the step to go on from."""
    saved = state["parameters"]
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())
        raise ConfigError(
            f"the checkpoint trains other parameters than the model has: {', '.join(odd[:4])}, …"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = saved[name]
            if value.shape != parameter.shape or value.dtype != parameter.dtype:
                raise ConfigError(
                    f"{name} is {_tensor(value)} in the checkpoint, "
                    f"{_tensor(parameter)} in the model"
                )
            parameter.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    set_random_state(state["random"])
    return int(state["step"])


def identity(config: TrainConfig, steps: int, data_sha256: str) -> dict[str, Any]:
    """What must be the same in a run and in its continuation."""
    return {"settings": config.as_dict(), "steps": steps, "data_sha256": data_sha256}


def check_same_run(saved: Mapping[str, Any], config: TrainConfig, now: Mapping[str, Any]) -> None:
    """Raises ConfigError if the checkpoint belongs to other settings or other data."""
    differences = config.differences(saved["settings"])
    if saved["data_sha256"] != now["data_sha256"]:
        differences.append("the training data is not the same")
    if not differences and saved["steps"] != now["steps"]:
        differences.append(f"steps: was {saved['steps']}, now {now['steps']}")
    if differences:
        raise ConfigError(
            f"cannot resume, the run in output was made otherwise ({'; '.join(differences)}); use "
            "its settings, or start anew in another output folder"
        )


def random_state() -> dict[str, Any]:
    """Of torch's generators."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """As random_state told it."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _tensor(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"

